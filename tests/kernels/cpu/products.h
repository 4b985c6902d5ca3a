// Accumulate and Matmul against exact sums.
#pragma once

#include "bench.h"

namespace {

struct Product {
  int isa, bits;
  int64_t rows, k, n;  // rows: of the output
  int threads = 1, groups = 1, planes = 1, digits = 1;
  bool zero = false, columns = false, bare = true;  // bare: int32 accumulators
  int extreme = -1;  // or drawn
};

void multiply(Bench& b, const Product& c, Random& random) {
  const auto mode = static_cast<Pool::Mode>(random.below(Pool::kModes));
  const int extreme = c.extreme < 0 ? random.below(kExtremes) : c.extreme;
  const Anywhere place{random};
  std::snprintf(now, sizeof(now),
                "%s %s: %d bits, M %lld, K %lld, N %lld, %d planes, %d groups, %d digits, zero %d, "
                "columns %d, inputs %s, %d threads, tasks %s",
                c.bare ? "accumulate" : "matmul", kIsas[c.isa].name, c.bits, (long long)c.rows,
                (long long)c.k, (long long)c.n, c.planes, c.groups, c.digits, c.zero, c.columns,
                kExtremeName[extreme], c.threads, kModeName[mode]);
  const int64_t layers = c.k > 5000 ? 1 : 2, layer = layers - 1;
  const int64_t row_bytes = (c.k + 15) / 16 * 2 * c.bits, columns = c.columns ? c.n : 1;
  Weights w{c.bits, c.planes, c.n, c.k, row_bytes};
  w.draw(extreme, random);
  b.data.take({layers, c.planes, c.n, row_bytes}, place(), 0xee);
  w.pack(b.data.data + layer * c.planes * c.n * row_bytes);
  b.x.take({c.digits * c.rows, c.k}, place());
  draw_activations(b.x.data, b.x.count, extreme, random);
  b.layer.take({}, place())[0] = layer;
  const Sums sums(w, b.x.data, c.digits, c.rows, c.groups);
  const auto call = [&](int threads) {
    ffi::Error error;
    b.pool.run(mode, [&](ffi::ThreadPool pool) {
      error = c.bare ? ternax::Accumulate(pool, b.x.buffer(), b.data.buffer(), b.layer.buffer(),
                                          b.acc.buffer(), c.bits, c.isa, threads)
                     : ternax::Matmul(pool, b.x.buffer(), b.x_scale.buffer(), b.data.buffer(),
                                      b.scale.buffer(), b.zero.buffer(), b.layer.buffer(),
                                      b.y.buffer(), c.bits, c.isa, threads);
    });
    if (!error.success()) fail("refused");
    if (!(c.bare ? b.acc.memory.intact() : b.y.memory.intact())) fail("a store beside the output");
  };
  if (c.bare) {
    b.acc.take({c.rows, c.n}, place(), 0xa5);
    call(c.threads);
    for (int64_t i = 0; i < b.acc.count; i++)
      if (b.acc.data[i] != sums.at(0, 0, 0, i / c.n, i % c.n)) fail("a wrong sum");
    return;
  }
  b.x_scale.take({c.rows}, place(), random);
  b.scale.take({layers, c.planes, c.groups, columns}, place(), random);
  b.zero.take({c.zero ? layers : 0, c.planes, c.groups, columns}, place(), random);
  b.y.take({c.rows, c.n}, place(), 0xff);  // NaN
  call(c.threads);
  const int64_t first = layer * c.planes * c.groups * columns;
  for (int64_t i = 0; i < b.y.count; i++) {
    const Near expected = sums.scaled(i / c.n, i % c.n, b.x_scale.data, b.scale.data + first,
                                      c.zero ? b.zero.data + first : nullptr, columns);
    if (!expected.holds(b.y.data[i])) fail("a result outside its bound");
  }
  const std::vector<float> shared(b.y.data, b.y.data + b.y.count);
  b.y.clear(0xff);
  call(1);
  if (b.y.count && std::memcmp(shared.data(), b.y.data, b.y.count * sizeof(float)))
    fail("other bits than one thread's");
}

}  // namespace
