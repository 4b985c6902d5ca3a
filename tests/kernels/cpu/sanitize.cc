// The handlers of kernels/cpu/kernels.cc over everything that could overrun: ragged shapes,
// buffers of exact size at odd addresses, extreme codes times extreme activations, 1 to 8
// threads, every instruction set of this CPU. `make sanitize` builds and runs it.
//
// Results are held against int64 sums, bit for bit, and against float64 within a bound.
// usage: sanitize STRIDE K2 K4 K8   every STRIDE-th case; the longest K of each code width

#include <csignal>

#include "products.h"
#include "projections.h"
#include "steps.h"

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__) || TERNAX_HAS(address_sanitizer) || \
    TERNAX_HAS(thread_sanitizer)
#include <sanitizer/common_interface_defs.h>
#else
#define __sanitizer_set_death_callback(callback) ((void)(callback))
#endif

namespace {

// What a handler must refuse rather than read.
void refusals(Bench& b, int isa) {
  for (int64_t layer : {-1, 1}) {
    std::snprintf(now, sizeof(now), "layer %lld of 1 on %s", (long long)layer, kIsas[isa].name);
    b.x.take({1, 16}, kBack), b.data.take({1, 1, 3, 4}, kBack), b.acc.take({1, 3}, kBack);
    b.x_scale.take({1}, kBack), b.scale.take({1, 1, 1, 1}, kBack), b.zero.take({0}, kBack);
    b.y.take({1, 3}, kBack), b.layer.take({}, kBack)[0] = layer;
    b.k32.take({1, 1, 1, 8, 4}, kBack), b.k_scale.take({0}, kBack);
    b.start.take({1}, kBack)[0] = 0, b.length.take({}, kBack)[0] = 0, b.out.take({1, 1, 1, 4}, kBack);
    b.given.take({1, 16}, kBack), b.norm.take({0}, kBack), b.v32.take({1, 1, 1, 8, 4}, kBack);
    b.qkv.take({1, 1, 12}, kBack), b.cosine.take({1, 1, 2}, kBack);
    b.pool.run(Pool::kThreads, [&](ffi::ThreadPool pool) {
      const auto keys = ffi::AnyBuffer(&b.k32.raw);
      const auto step = [&](ffi::AnyBuffer kept) {
        return ternax::Step(pool, b.qkv.buffer(), b.cosine.buffer(), b.cosine.buffer(), keys, keys,
                            b.k_scale.buffer(), b.k_scale.buffer(), b.start.buffer(), b.length.buffer(),
                            b.layer.buffer(), b.out.buffer(), kept, keys, b.k_scale.buffer(),
                            b.k_scale.buffer(), isa, 1);
      };
      const auto refused = [&](ffi::Error error) { if (error.success()) fail("no refusal"); };
      refused(ternax::Accumulate(pool, b.x.buffer(), b.data.buffer(), b.layer.buffer(), b.acc.buffer(), 2, isa, 1));
      refused(ternax::Matmul(pool, b.x.buffer(), b.x_scale.buffer(), b.data.buffer(), b.scale.buffer(),
                             b.zero.buffer(), b.layer.buffer(), b.y.buffer(), 2, isa, 1));
      refused(ternax::Project(pool, b.given.buffer(), b.norm.buffer(), b.data.buffer(), b.scale.buffer(),
                              b.zero.buffer(), b.layer.buffer(), b.norm.buffer(), b.y.buffer(), 2, isa, 1, 0, 0));
      refused(step(keys));
      b.layer.data[0] = 0, b.length.data[0] = 8;  // the token would be slot 9 of 8
      refused(step(keys));
      b.length.data[0] = 0;
      refused(step(ffi::AnyBuffer(&b.v32.raw)));  // a cache that XLA copied
    });
  }
}

constexpr int64_t kRows[] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 17, 33};
constexpr int64_t kColumns[] = {1, 2, 3, 4, 5, 15, 16, 17, 33, 67};

struct Sweep {
  Bench& bench;
  int64_t stride, largest[9];
  int64_t counter = 0, done = 0;

  // One case of many alike. Their number is no multiple of the stride, so that each format
  // and instruction set gets others.
  template <class Case>
  void operator()(const Case& one) {
    if (++counter % stride == 0) always(one);
  }
  template <class Case>
  void always(const Case& one) {
    Random random(counter * 1000 + ++done);
    one(random);
  }

  void products(int isa) {
    const auto threads = [](Random& r) { return 1 + static_cast<int>(r.below(8)); };
    for (int bits : {2, 4, 8}) {
      for (int64_t k = 1; k <= 67; k++)
        for (int64_t n = 1; n <= 67; n++)
          (*this)([&](Random& r) { multiply(bench, {isa, bits, r.pick(kRows), k, n, threads(r)}, r); });
      for (int64_t k = 69; k <= 1001; k += 2)
        (*this)([&](Random& r) { multiply(bench, {isa, bits, r.pick(kRows), k, r.pick(kColumns), threads(r)}, r); });
      // Wide enough that every part of the work is shared out.
      for (int count = 1; count <= 8; count++)
        for (int64_t k : {64, 4099})
          always([&](Random& r) { multiply(bench, {isa, bits, 17, k, 50, count}, r); });
      for (int digits : {1, 3})
        for (int planes : {1, 2, 3})
          for (int64_t groups : {1, 2, 3, 4})
            for (int64_t blocks : {1, 2, 3, 4, 5, 9, 17})
              for (bool zero : {false, true})
                for (bool columns : {false, true})
                  (*this)([&](Random& r) {
                    const int64_t k = groups * blocks * 16 - (groups == 1 ? r.below(16) : 0);
                    multiply(bench, {isa, bits, r.pick(kRows), k, r.pick(kColumns), threads(r), static_cast<int>(groups), planes, digits, zero, columns, false}, r);
                  });
      // At the largest K one more could overflow an int32 sum.
      for (Product edge{isa, bits, 1, largest[bits], 1}; ++edge.extreme < kExtremes;)
        always([&](Random& r) { multiply(bench, edge, r); });
      for (Product empty : {Product{isa, bits, 0, 20, 5}, Product{isa, bits, 3, 20, 0}})
        for (bool bare : {true, false})
          always([&](Random& r) { empty.bare = bare, empty.threads = threads(r), multiply(bench, empty, r); });
    }
  }

  void projections(int isa) {
    const auto threads = [](Random& r) { return 1 + static_cast<int>(r.below(8)); };
    for (int bits : {2, 4, 8}) {
      for (int gate : {0, 1, 2})
        for (bool norm : {false, true})
          for (bool residual : {false, true}) {
            const auto plain = [&](int64_t k) {
              (*this)([&](Random& r) { project(bench, {isa, bits, r.pick(kRows), k, 1 + r.below(67), threads(r), gate, norm, residual}, r); });
            };
            for (int64_t k = 1; k <= 67; k++) plain(k);
            for (int64_t k = 69; k <= 1001; k += 62) plain(k);
          }
      for (int planes : {1, 2, 3})
        for (int groups : {1, 2, 3, 4})
          for (int64_t blocks : {1, 2, 3, 5, 9})
            for (bool zero : {false, true})
              for (bool columns : {false, true})
                (*this)([&](Random& r) {
                  const int64_t k = groups * blocks * 16 - (groups == 1 ? r.below(16) : 0);
                  const int gate = r.below(3);
                  const bool norm = r.below(2), residual = r.below(2);
                  project(bench, {isa, bits, r.pick(kRows), k, r.pick(kColumns), threads(r), gate, norm, residual, groups, planes, zero, columns}, r);
                });
      for (Projection empty : {Projection{isa, bits, 0, 20, 5}, Projection{isa, bits, 3, 20, 0}})
        always([&](Random& r) { empty.gate = r.below(3), empty.norm = true, project(bench, empty, r); });
    }
    // Wide enough that every part of the work is shared out.
    for (int count = 1; count <= 8; count++)
      always([&](Random& r) { project(bench, {isa, 2 << count % 3, 33, 4099, 50, count, count % 3, true, count % 2 == 0}, r); });
  }

  void steps(int isa) {
    for (int store : {1, 2, 4}) {
      for (int64_t width = 2; width <= 68; width += 2)
        for (int64_t tokens = 1; tokens <= 40; tokens++)
          if (tokens <= 3 || (tokens + width / 2) % 8 == 0)
            (*this)([&](Random& r) {
              const int64_t length = r.below(40), slots = length + tokens + r.below(9);
              const int64_t batch = 1 + r.below(3), groups = 1 + r.below(3), share = 1 + r.below(8);
              step(bench, {isa, store, batch, groups, share, tokens, width > 66 ? 128 : width, slots, length, 1 + static_cast<int>(r.below(8))}, r);
            });
      // Heads whose queries come in fours, over contexts of more than a block.
      for (int64_t width : {64, 128, 192, 256})
        for (int64_t share : {4, 6, 8})
          for (int64_t tokens : {1, 2, 3})
            (*this)([&](Random& r) {
              const int64_t length = r.below(300), slots = length + tokens + r.below(9);
              step(bench, {isa, store, 1 + r.below(2), 1 + r.below(2), share, tokens, width, slots, length, 1 + static_cast<int>(r.below(8))}, r);
            });
      for (int threads = 1; threads <= 8; threads++)  // long enough to be shared out
        always([&](Random& r) { step(bench, {isa, store, 2, 2, 1 + threads % 3, 15 + 3 * threads, 64, 70, 19, threads}, r); });
    }
  }
};

}  // namespace

int main(int argc, char** argv) {
  if (argc != 5) {
    std::fprintf(stderr, "usage: sanitize STRIDE K2 K4 K8\n");
    return 2;
  }
  __sanitizer_set_death_callback(say_case);
  std::signal(SIGABRT, [](int) { say_case(), std::_Exit(1); });  // UBSan knows no callback
  Bench bench;
  Sweep sweep{bench, std::atoll(argv[1]), {}};
  for (int i = 0; i < 3; i++) sweep.largest[2 << i] = std::atoll(argv[2 + i]);
  for (int isa = 0; const char* name = ternax_isa_name(isa); isa++) {
    if (!ternax_isa_supported(isa)) {
      std::printf("%-12s not on this CPU\n", name);
      continue;
    }
    std::printf("%-12s", name);
    const auto part = [&](const char* what, void (Sweep::*cases)(int)) {
      sweep.done = 0;
      (sweep.*cases)(isa);
      std::printf(" %lld %s", (long long)sweep.done, what);
      std::fflush(stdout);
    };
    part("products,", &Sweep::products);
    part("projections,", &Sweep::projections);
    part("steps\n", &Sweep::steps);
    refusals(bench, isa);
  }
}
