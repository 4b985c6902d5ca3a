// Step against rotation, cache update and attention apart, each in float64.
#pragma once

#include "bench.h"

namespace {

// What the new tokens are, of each call.
enum { kSteady, kNothing, kFaint, kLoudValues, kLoudKeys, kSpike, kTurnKinds };
const char* const kTurnName[] = {"ordinary", "0", "1e-30", "values 1e30", "keys 1e30, queries 1e-30", "one outlier"};

struct Turn {
  int isa, store;
  int64_t batch, groups, share, tokens, width, slots, length;
  int threads;
};

// A row turned by its angles.
TERNAX_PLAIN std::vector<Turned> turned(const float* x, const float* cosine, const float* sine, int64_t width) {
  std::vector<Turned> out(width);
  for (int64_t e = 0, half = width / 2; e < width; e++) {
    const int64_t i = e % half;
    const double along = static_cast<double>(x[e]) * cosine[i];
    const double across = static_cast<double>(x[e < half ? e + half : e - half]) * sine[i];
    out.data()[e] = {e < half ? along - across : along + across, std::abs(along) + std::abs(across)};
  }
  return out;
}

// The nearest number of 8 significant bits, ties to even.
TERNAX_PLAIN double nearest_bf16(double x) {
  int exponent;
  const double part = std::frexp(x, &exponent);
  return std::ldexp(std::nearbyint(std::ldexp(part, 8)), exponent - 8);
}

// One layer's keys or values as the kernel left them: checks the rows it wrote, against what
// was to be stored, and notes in `wide` the numbers that they stand for.
TERNAX_PLAIN bool stored_well(const std::vector<Turned>& wanted, bool exact, int store, const char* found,
                              const float* scale, float* wide) {
  const int64_t width = wanted.size();
  double peak = 0, peak_bound = 0, factor = 1;
  bool well = true;
  for (int64_t e = 0; e < width; e++) {
    peak = std::max(peak, std::abs(wanted.data()[e].value));
    if (!exact) peak_bound = std::max(peak_bound, wanted.data()[e].bound());
  }
  if (store == 1) {
    peak = std::max<double>(peak, 1e-8f), factor = *scale;
    well = Near{peak / 127, (peak_bound + 2 * kUlp * peak) / 127}.holds(*scale);
  }
  for (int64_t e = 0; e < width; e++) {
    const double value = wanted.data()[e].value, bound = exact ? 0 : wanted.data()[e].bound();
    if (store == 1) {
      const int code = reinterpret_cast<const int8_t*>(found)[e];
      const double t = value / factor;
      well &= std::abs(code - t) <= 0.5 + bound / factor + 2 * kUlp * std::abs(t);
      wide[e] = code * *scale;
    } else if (store == 2) {
      const uint32_t bits = uint32_t{reinterpret_cast<const uint16_t*>(found)[e]} << 16;
      std::memcpy(wide + e, &bits, 4);
      well &= nearest_bf16(value - bound) <= wide[e] && wide[e] <= nearest_bf16(value + bound);
    } else {
      std::memcpy(wide + e, found + 4 * e, 4);
      well &= Near{value, bound}.holds(wide[e]);
    }
  }
  return well;
}

void draw_tokens(float* qkv, int64_t tokens, int64_t heads, int64_t groups, int64_t width, int kind, Random& random) {
  const int64_t queries = heads * width, keys = groups * width, row = queries + 2 * keys;
  for (int64_t i = 0; i < tokens * row; i++) {
    const bool query = i % row < queries, value = i % row >= queries + keys;
    qkv[i] = random.number();
    if (kind == kNothing) qkv[i] *= 0;
    if (kind == kFaint || (kind == kLoudKeys && query)) qkv[i] *= 1e-30f;
    if ((kind == kLoudValues && value) || (kind == kLoudKeys && !query && !value)) qkv[i] *= 1e30f;
  }
  if (kind == kSpike) {
    float* last = qkv + random.below(tokens) * row + queries;
    last[random.below(keys)] = 300, last[keys + random.below(keys)] = -1e30f;
  }
}

void step(Bench& b, const Turn& c, Random& random) {
  const auto mode = static_cast<Pool::Mode>(random.below(Pool::kModes));
  const int kind = random.below(2) ? kSteady : random.below(kTurnKinds);
  const Anywhere place{random};
  const int64_t layers = 2, layer = random.below(layers), heads = c.groups * c.share, half = c.width / 2;
  std::snprintf(now, sizeof(now),
                "step %s: %d bytes, layer %lld, B %lld, G %lld, H/G %lld, T %lld, E %lld, S %lld, length %lld, "
                "tokens %s, %d threads, tasks %s",
                kIsas[c.isa].name, c.store, (long long)layer, (long long)c.batch, (long long)c.groups,
                (long long)c.share, (long long)c.tokens, (long long)c.width, (long long)c.slots,
                (long long)c.length, kTurnName[kind], c.threads, kModeName[mode]);
  b.start.take({c.batch}, place());
  for (int64_t i = 0; i < c.batch; i++) b.start.data[i] = random.below(c.length + c.tokens + 3);

  // What no token sees is NaN: not read, not even times 0.
  const int64_t rows = layers * c.batch * c.groups * c.slots, row_bytes = c.width * c.store;
  Cache cache(rows, c.width, c.store, false, random);
  const auto pair_of = [&](int64_t row) { return row / c.slots - layer * c.batch * c.groups; };
  const auto in_layer = [&](int64_t row) { return pair_of(row) >= 0 && pair_of(row) < c.batch * c.groups; };
  for (int64_t row = 0; row < rows; row++) {
    const int64_t slot = row % c.slots;
    if (in_layer(row) && slot >= b.start.data[pair_of(row) / c.groups] && slot < c.length) continue;
    for (auto* wide : {&cache.k, &cache.v}) std::fill_n(wide->begin() + row * c.width, c.width, NAN);
    if (c.store == 1)
      cache.k_scale[row] = cache.v_scale[row] = NAN;
    else if (c.store == 2)
      for (auto* bits : {&cache.k16, &cache.v16}) std::fill_n(bits->begin() + row * c.width, c.width, 0xffff);
  }
  const std::vector<int64_t> shape{layers, c.batch, c.groups, c.slots, c.width};
  const std::vector<float> was_k = cache.k, was_v = cache.v;
  const std::vector<int64_t> scales{c.store == 1 ? layers : 0, c.batch, c.groups, c.slots};
  b.qkv.take({c.batch, c.tokens, (heads + 2 * c.groups) * c.width}, place());
  draw_tokens(b.qkv.data, c.batch * c.tokens, heads, c.groups, c.width, kind, random);
  b.cosine.take({c.batch, c.tokens, half}, place(), random);
  b.sine.take({c.batch, c.tokens, half}, place(), random);
  b.length.take({}, place())[0] = c.length;
  b.layer.take({}, place())[0] = layer;
  const Guarded* memory[2] = {};
  const auto call = [&](int threads) {
    const auto k = c.store == 1   ? b.k8.put(shape, place(), cache.k8)
                   : c.store == 2 ? b.k16.put(shape, place(), cache.k16)
                                  : b.k32.put(shape, place(), was_k);
    const auto v = c.store == 1   ? b.v8.put(shape, place(), cache.v8)
                   : c.store == 2 ? b.v16.put(shape, place(), cache.v16)
                                  : b.v32.put(shape, place(), was_v);
    memory[0] = c.store == 1 ? &b.k8.memory : c.store == 2 ? &b.k16.memory : &b.k32.memory;
    memory[1] = c.store == 1 ? &b.v8.memory : c.store == 2 ? &b.v16.memory : &b.v32.memory;
    b.k_scale.put(scales, place(), cache.k_scale), b.v_scale.put(scales, place(), cache.v_scale);
    b.out.take({c.batch, c.tokens, heads, c.width}, place(), 0xff);
    ffi::Error error;
    b.pool.run(mode, [&](ffi::ThreadPool pool) {
      error = ternax::Step(pool, b.qkv.buffer(), b.cosine.buffer(), b.sine.buffer(), k, v, b.k_scale.buffer(),
                           b.v_scale.buffer(), b.start.buffer(), b.length.buffer(), b.layer.buffer(),
                           b.out.buffer(), k, v, b.k_scale.buffer(), b.v_scale.buffer(), c.isa, threads);
    });
    if (!error.success()) fail("refused");
    if (!b.out.memory.intact() || !memory[0]->intact() || !memory[1]->intact() || !b.k_scale.memory.intact() ||
        !b.v_scale.memory.intact())
      fail("a store beside an output");
    std::vector<char> bits;
    const auto add = [&](const void* from, int64_t bytes) {
      bits.insert(bits.end(), static_cast<const char*>(from), static_cast<const char*>(from) + bytes);
    };
    add(k.untyped_data(), rows * row_bytes), add(v.untyped_data(), rows * row_bytes);
    add(b.k_scale.data, b.k_scale.count * 4), add(b.v_scale.data, b.v_scale.count * 4);
    add(b.out.data, b.out.count * 4);
    return bits;
  };
  const std::vector<char> alone = call(1), shared = call(c.threads);
  if (alone != shared) fail("other bits than one thread's");

  // The cache: new tokens in their slots, everything else as it was.
  const char* found[2] = {shared.data(), shared.data() + rows * row_bytes};
  const void* before[2] = {c.store == 1   ? static_cast<const void*>(cache.k8.data())
                           : c.store == 2 ? static_cast<const void*>(cache.k16.data())
                                          : was_k.data(),
                           c.store == 1   ? static_cast<const void*>(cache.v8.data())
                           : c.store == 2 ? static_cast<const void*>(cache.v16.data())
                                          : was_v.data()};
  const float* scale[2] = {b.k_scale.data, b.v_scale.data};
  const float* scale_before[2] = {cache.k_scale.data(), cache.v_scale.data()};
  float* wide[2] = {cache.k.data(), cache.v.data()};
  const auto tokens_row = [&](int64_t token) { return b.qkv.data + token * (heads + 2 * c.groups) * c.width; };
  for (int64_t row = 0; row < rows; row++)
    for (int which = 0; which < 2; which++) {
      const int64_t t = row % c.slots - c.length;
      const char* now_there = found[which] + row * row_bytes;
      if (!in_layer(row) || t < 0 || t >= c.tokens) {
        if (std::memcmp(now_there, static_cast<const char*>(before[which]) + row * row_bytes, row_bytes) ||
            (c.store == 1 && std::memcmp(scale[which] + row, scale_before[which] + row, 4)))
          fail("another slot of the cache was written");
        continue;
      }
      const int64_t token = pair_of(row) / c.groups * c.tokens + t, group = pair_of(row) % c.groups;
      const float* x = tokens_row(token) + (heads + which * c.groups + group) * c.width;
      std::vector<Turned> wanted;
      if (which == 0)
        wanted = turned(x, b.cosine.data + token * half, b.sine.data + token * half, c.width);
      else
        for (int64_t e = 0; e < c.width; e++) wanted.push_back({x[e], 0});
      if (!stored_well(wanted, which == 1, c.store, now_there, scale[which] + row, wide[which] + row * c.width))
        fail(which ? "values stored wrong" : "keys stored wrong");
    }

  // Attention over what is in the cache now.
  for (int64_t i = 0; i < c.batch * c.tokens * heads; i++) {
    const int64_t token = i / heads, head = i % heads, row = token / c.tokens;
    const int64_t first = ((layer * c.batch + row) * c.groups + head / c.share) * c.slots;
    const auto q = turned(tokens_row(token) + head * c.width, b.cosine.data + token * half,
                          b.sine.data + token * half, c.width);
    const auto expected = cache.attend(q.data(), first, b.start.data[row], c.length + token % c.tokens + 1);
    for (int64_t e = 0; e < c.width; e++)
      if (!expected[e].holds(b.out.data[i * c.width + e])) fail("a result outside its bound");
  }
}

}  // namespace
