// Project: what enters the product against float64, then the product of the codes found.
#pragma once

#include "bench.h"

namespace {

// What the rows of a projection's input are, drawn for each row.
enum { kOrdinary, kZeros, kTiny, kHuge, kOutlier, kOverflow, kRowKinds };

struct Projection {
  int isa, bits;
  int64_t rows, k, n;
  int threads = 1, gate = 0;
  bool norm = false, residual = false;
  int groups = 1, planes = 1;
  bool zero = false, columns = false;
};

constexpr double kSmallest = 0x1p-126;  // below it float32 numbers lose bits, or all of them

// One row as it enters the product, before rounding to codes: value and bound of each
// 127 v / max |v|, and of the scale.
struct Entered {
  std::vector<Near> code;
  Near scale;
};

// A gate rounds a few times beside an exponential good to 2 units, whose argument stops at
// 88; a norm rounds once a number summed; the peak is as far off as the worst number.
TERNAX_PLAIN Entered entered(const float* x, const float* norm, int64_t k, int gate, float eps) {
  Entered out{std::vector<Near>(k), {}};
  Near* v = out.code.data();
  double squares = 0, squares_bound = 0, peak = 0, peak_bound = 0;
  for (int64_t i = 0; i < k; i++) {
    const double a = x[i], up = gate ? x[k + i] : 1;
    v[i] = {a, 0};
    if (gate == 1) {
      v[i].value = a / (1 + std::exp(-a)) * up;
      v[i].bound = 12 * kUlp * std::abs(v[i].value) + 2 * std::exp(-87) * std::abs(a * up);
    } else if (gate == 2) {
      v[i].value = a > 0 ? a * a * up : 0;
      v[i].bound = 3 * kUlp * std::abs(v[i].value);
    }
    if (gate) v[i].bound += kSmallest * (1 + std::abs(up));
    squares += v[i].value * v[i].value;
    squares_bound += (2 * std::abs(v[i].value) + v[i].bound) * v[i].bound + kSmallest;
  }
  if (norm) {
    const double mean = squares / k + eps;
    const double relative = (squares_bound + (k + 4) * kUlp * squares) / k / mean + 8 * kUlp;
    // Past float32's end the root of the mean is infinite, as in the composition.
    const double shrink = squares > 3.4028235e38 ? 0 : 1 / std::sqrt(mean);
    for (int64_t i = 0; i < k; i++) {
      const double value = norm[i] * v[i].value * shrink;
      v[i] = {value, std::abs(norm[i]) * shrink * v[i].bound + relative * std::abs(value) +
                         2 * kSmallest * (shrink != 0)};
    }
  }
  for (int64_t i = 0; i < k; i++) {
    peak = std::max(peak, std::abs(v[i].value));
    peak_bound = std::max(peak_bound, v[i].bound);
  }
  peak = std::max<double>(peak, 1e-5f);
  for (int64_t i = 0; i < k; i++) {
    const double t = v[i].value / peak;
    v[i] = {127 * t, 127 * (1.01 * (v[i].bound + std::abs(t) * peak_bound) / peak + 6 * kUlp * std::abs(t))};
  }
  out.scale = {peak / 127, (peak_bound + 6 * kUlp * peak) / 127};
  return out;
}

// One row of the input. Gated, the first half carries what is extreme, as far as its square
// stays a float32; kOverflow goes past that.
TERNAX_PLAIN void draw_row(float* x, int64_t k, int gate, int kind, Random& random) {
  const float huge = gate == 2 ? 1e15f : 1e30f;
  for (int64_t i = 0; i < (gate ? 2 * k : k); i++) {
    x[i] = random.number();
    if (kind == kZeros) x[i] *= 0;  // both zeros
    if (kind == kTiny) x[i] *= 1e-30f;
    if (kind == kHuge && i < k) x[i] *= huge;
    if (kind == kOverflow) x[i] *= gate ? 1e30f : INFINITY;
  }
  if (kind == kOutlier) x[random.below(k)] = gate || random.below(2) ? huge : -huge;
}

void project(Bench& b, const Projection& c, Random& random) {
  const auto mode = static_cast<Pool::Mode>(random.below(Pool::kModes));
  const Anywhere place{random};
  std::snprintf(now, sizeof(now),
                "project %s: %d bits, M %lld, K %lld, N %lld, gate %d, norm %d, residual %d, %d planes, "
                "%d groups, zero %d, columns %d, %d threads, tasks %s",
                kIsas[c.isa].name, c.bits, (long long)c.rows, (long long)c.k, (long long)c.n, c.gate,
                c.norm, c.residual, c.planes, c.groups, c.zero, c.columns, c.threads, kModeName[mode]);
  const int64_t layers = 2, layer = random.below(layers);
  const int64_t row_bytes = (c.k + 15) / 16 * 2 * c.bits, columns = c.columns ? c.n : 1;
  const float eps = random.below(2) ? 1e-5f : 1e-6f;
  Weights w{c.bits, c.planes, c.n, c.k, row_bytes};
  w.draw(random.below(kExtremes), random);
  b.data.take({layers, c.planes, c.n, row_bytes}, place(), 0xee);
  w.pack(b.data.data + layer * c.planes * c.n * row_bytes);
  b.layer.take({}, place())[0] = layer;
  b.scale.take({layers, c.planes, c.groups, columns}, place(), random);
  b.zero.take({c.zero ? layers : 0, c.planes, c.groups, columns}, place(), random);
  b.norm.take({c.norm ? c.k : 0}, place(), random);
  b.residual.take({c.residual ? c.rows : 0, c.n}, place(), random);
  const int64_t row_size = c.gate ? 2 * c.k : c.k;
  b.given.take({c.rows, row_size}, place());
  std::vector<int> kind(c.rows);
  for (int64_t r = 0; r < c.rows; r++) {
    kind[r] = random.below(2) ? kOrdinary : random.below(kRowKinds);
    draw_row(b.given.data + r * row_size, c.k, c.gate, kind[r], random);
  }

  // The codes, where every byte beside what is theirs is out of bounds.
  b.x.take({c.rows, c.k}, place(), 0x55), b.x_scale.take({c.rows}, place(), 0xff);
  b.memory.take({c.k}, place(), 0xff);
  const float* norm = c.norm ? b.norm.data : nullptr;
  const ternax::Entry entry{b.given.data, norm, c.k, c.gate, eps, b.x.data, b.x_scale.data};
  for (int64_t r = 0; r < c.rows; r++) {
    kIsas[c.isa].enter(entry, r, b.memory.data);
    if (kind[r] == kOverflow) continue;
    const Entered expected = entered(b.given.data + r * row_size, norm, c.k, c.gate, eps);
    if (!expected.scale.holds(b.x_scale.data[r])) fail("a wrong scale");
    for (int64_t i = 0; i < c.k; i++) {
      const Near code = expected.code[i];
      if (!Near{code.value, code.bound + 0.5}.holds(b.x.data[r * c.k + i])) fail("a wrong code");
    }
  }
  if (!b.x.memory.intact() || !b.x_scale.memory.intact() || !b.memory.memory.intact())
    fail("a store beside the codes");

  b.y.take({c.rows, c.n}, place(), 0xff);  // NaN
  const auto call = [&](int threads) {
    ffi::Error error;
    b.pool.run(mode, [&](ffi::ThreadPool pool) {
      error = ternax::Project(pool, b.given.buffer(), b.norm.buffer(), b.data.buffer(), b.scale.buffer(),
                              b.zero.buffer(), b.layer.buffer(), b.residual.buffer(), b.y.buffer(), c.bits,
                              c.isa, threads, c.gate, eps);
    });
    if (!error.success()) fail("refused");
    if (!b.y.memory.intact()) fail("a store beside the output");
  };
  call(c.threads);
  const Sums sums(w, b.x.data, 1, c.rows, c.groups);
  const int64_t first = layer * c.planes * c.groups * columns;
  for (int64_t i = 0; i < b.y.count; i++) {
    if (kind[i / c.n] == kOverflow) continue;
    Near expected = sums.scaled(i / c.n, i % c.n, b.x_scale.data, b.scale.data + first,
                                c.zero ? b.zero.data + first : nullptr, columns);
    if (c.residual) {
      expected.value += b.residual.data[i];
      expected.bound += (c.planes * c.groups + 1) * kUlp * std::abs(b.residual.data[i]);
    }
    if (!expected.holds(b.y.data[i])) fail("a result outside its bound");
  }
  const std::vector<float> shared(b.y.data, b.y.data + b.y.count);
  b.y.clear(0xff);
  call(1);
  if (b.y.count && std::memcmp(shared.data(), b.y.data, b.y.count * sizeof(float)))
    fail("other bits than one thread's");
}

}  // namespace
