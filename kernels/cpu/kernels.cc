// XLA FFI handlers of the CPU backend. One body, compiled once per instruction set.
//
// Weights are read in the canonical packed layout (kernels/packing.py), rows of N:
// no repacked copy exists. The bytes of a row are multiplied plane by plane: masking
// bit position p of consecutive bytes gives codes of consecutive runs of k, and the
// activations are put in that order once a call. Sums are exact in int32.
//
//   row of W      | 64 bytes | 64 bytes | ...        one vector w
//   activations   | p0 p1 p2 p3 | p0 p1 p2 p3 | ...  one vector x a plane p
//   acc          += dot(w >> bits p & mask, x_p)

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "memory.h"
#include "order.h"
#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace ternax {

// One call of the packed product, as every instruction set sees it.
struct Product {
  const uint8_t* data;   // [planes, rows, row_bytes] of one layer
  const float* scale;    // [planes, groups, 1 or rows], or null: int32 output
  const float* zero;     // like scale, or null
  int64_t rows, row_bytes, groups, scale_columns, planes;
  int bits, digits;
  int64_t tokens;        // output rows; activations have digits * tokens rows
  const int8_t* x;       // prepared activations, see prepare()
  int64_t x_stride;      // bytes of one prepared activation row
  const int32_t* sums;   // [groups, digits * tokens]: sum of activations
  const float* x_scale;  // [tokens]
  int32_t* acc;          // [tokens, rows] or null
  float* y;              // [tokens, rows] or null
  const float* residual; // like y, added to it, or null
};

// What goes into a projection, row by row: gate, norm, int8 codes a token.
constexpr int kSilu = 1;  // gates: 0 none, 1 silu, 2 squared relu
struct Entry {
  const float* x;     // [rows, k_size]; gated [rows, 2 * k_size]: act(first half) * second
  const float* norm;  // [k_size] or null
  int64_t k_size;
  int gate;
  float eps;
  int8_t* codes;  // [rows, k_size]
  float* scale;   // [rows]
};

// What attention over the cache needs of one layer.
struct Attention {
  const float* qkv;          // [batch, tokens, (heads + 2 * groups) * width], not yet rotated
  const float *cosine, *sine;  // [batch, tokens, width / 2]
  void *k, *v;               // [batch, groups, slots, width] of one layer
  float *k_scale, *v_scale;  // [batch, groups, slots], for int8
  const int32_t* start;      // [batch]
  int64_t length, batch, tokens, heads, groups, slots, width;
  int store;                 // bytes of a stored value: 1 int8, 2 bf16, 4 f32
  float* out;                // [batch, tokens, heads, width]
};

constexpr int kOffset[9] = {0, 0, 1, 0, 8, 0, 0, 0, 128};

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma")
#define TERNAX_ISA avx512vnni
#define TERNAX_AVX512 1
#include "body.h"
#undef TERNAX_AVX512
#undef TERNAX_ISA
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avxvnni,avx2,fma")
#define TERNAX_ISA avxvnni
#define TERNAX_AVX2 1
#define TERNAX_AVXVNNI 1
#include "body.h"
#undef TERNAX_AVXVNNI
#undef TERNAX_ISA
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define TERNAX_ISA avx2
#include "body.h"
#undef TERNAX_AVX2
#undef TERNAX_ISA
#pragma GCC pop_options
#endif
#if defined(__ARM_FEATURE_DOTPROD)
#define TERNAX_ISA neon
#define TERNAX_NEON 1
#include "body.h"
#undef TERNAX_NEON
#undef TERNAX_ISA
#endif
#define TERNAX_ISA portable
#define TERNAX_PORTABLE 1
#include "body.h"
#undef TERNAX_PORTABLE
#undef TERNAX_ISA

// Instruction sets, fastest first; the index is the `isa` attribute of a call.
struct Isa {
  const char* name;
  bool (*supported)();
  int64_t vector_bytes;
  void (*prepare)(const Product&, const int8_t* x, int64_t k_size, int64_t row, int8_t* out, int32_t* sums);
  void (*rows)(const Product&, int64_t first, int64_t last);
  void (*enter)(const Entry&, int64_t row, float* memory);
  void (*keep)(const Attention&, int64_t pair, int64_t first, int64_t last, float* row);
  void (*attend)(const Attention&, int64_t pair, int64_t first, int64_t last, float* queries, float* memory);
};

#define TERNAX_ENTRY(isa) isa::kWidth, isa::prepare_row, isa::product_rows, isa::enter_row, isa::keep_tokens, isa::attend_tokens
static const Isa kIsas[] = {
#if defined(__x86_64__)
    {"avx512vnni",
     [] { return __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
                 __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"); },
     TERNAX_ENTRY(avx512vnni)},
    {"avxvnni", [] { return __builtin_cpu_supports("avxvnni") != 0; }, TERNAX_ENTRY(avxvnni)},
    {"avx2", [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); },
     TERNAX_ENTRY(avx2)},
#endif
#if defined(__ARM_FEATURE_DOTPROD)
    {"neon", [] { return true; }, TERNAX_ENTRY(neon)},
#endif
    {"portable", [] { return true; }, TERNAX_ENTRY(portable)},
};

// Rows of W one thread takes at a time: about 128 KiB of weights.
static int64_t chunk_rows(int64_t row_bytes, int64_t rows, int threads) {
  int64_t chunk = std::max<int64_t>(1, (128 << 10) / std::max<int64_t>(1, row_bytes));
  chunk = std::min(chunk, (rows + 4 * threads - 1) / (4 * threads));
  return (std::max<int64_t>(1, chunk) + 15) / 16 * 16;
}

// Rows of activations that one thread makes ready sooner than a second one is awake.
static int64_t few_entries(int64_t k_size) { return 1 + (1 << 16) / std::max<int64_t>(1, k_size); }

// Lines of weights asked for at once while the activations are not ready, and how many in all.
constexpr int64_t kLine = 64, kBurst = 16, kMeanwhile = 1024;

// The product of x, whose row r enter(r) makes.
template <class Enter>
static void run_product(Product call, const int8_t* x, int64_t k_size, const Isa& isa, ThreadPool& pool,
                        const Enter& enter) {
  const int64_t rows = call.digits * call.tokens;
  const int64_t group_bytes = call.row_bytes / call.groups;
  const int64_t steps = (group_bytes + isa.vector_bytes - 1) / isa.vector_bytes;
  call.x_stride = steps * isa.vector_bytes * (8 / call.bits) * call.groups;
  auto buffer = scratch<int8_t>(0, rows * call.x_stride + 64);
  auto sums = scratch<int32_t>(1, rows * call.groups);
  int8_t* aligned = buffer + (64 - reinterpret_cast<uintptr_t>(buffer) % 64) % 64;
  call.x = aligned;
  call.sums = sums;
  const auto ready = [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; r++) {
      enter(r);
      isa.prepare(call, x + r * k_size, k_size, r, aligned + r * call.x_stride, sums);
    }
  };
  const auto ask = [&](int64_t burst, int64_t row) {
    if (burst * kBurst >= kMeanwhile) return pause();
    const uint8_t* line = call.data + row * call.row_bytes + burst * kBurst * kLine;
    for (int64_t i = 0; i < kBurst; i++) __builtin_prefetch(line + i * kLine, 0, 2);
  };
  const auto rows_of = [&](int64_t first, int64_t last) { isa.rows(call, first, last); };
  const int64_t chunk = chunk_rows(call.row_bytes, call.rows, pool.threads);
  const int64_t few = few_entries(k_size);
  if (rows <= few) {
    thread_local Order order;
    const Matrix behind = order.behind({call.data, call.rows, call.row_bytes, chunk});
    const auto next = [&](int i, int threads) { return behind.beginning(i, threads); };
    return parallel_for(pool, call.rows, chunk, rows_of, [&] { ready(0, rows); }, ask, next);
  }
  parallel_for(pool, rows, (few + 7) / 8, ready);
  parallel_for(pool, call.rows, chunk, rows_of);
}

static ffi::Error check(bool ok, const char* what) {
  return ok ? ffi::Error::Success() : ffi::Error::InvalidArgument(what);
}

// The weights of one layer of a stack: data u8 [L, P, N, bytes], scale f32 [L, P, G, 1 or N],
// zero like scale or empty.
static Product weights(ffi::Buffer<ffi::U8>& data, ffi::Buffer<ffi::F32>& scale, ffi::Buffer<ffi::F32>& zero,
                       int64_t layer, int64_t bits) {
  auto d = data.dimensions();
  auto s = scale.dimensions();
  Product call{};
  call.data = data.typed_data() + layer * d[1] * d[2] * d[3];
  call.scale = scale.typed_data() + layer * s[1] * s[2] * s[3];
  call.zero = zero.element_count() ? zero.typed_data() + layer * s[1] * s[2] * s[3] : nullptr;
  call.rows = d[2], call.row_bytes = d[3], call.planes = d[1];
  call.groups = s[2], call.scale_columns = s[3];
  call.bits = bits;
  return call;
}

static bool in_stack(ffi::Buffer<ffi::S32>& layer, int64_t layers) {
  return layer.typed_data()[0] >= 0 && layer.typed_data()[0] < layers;
}

// x s8 [R, K], data u8 [L, P, N, bytes], layer s32 -> s32 [R, N]; bits, isa, threads.
static ffi::Error Accumulate(ffi::ThreadPool xla_pool, ffi::Buffer<ffi::S8> x, ffi::Buffer<ffi::U8> data,
                             ffi::Buffer<ffi::S32> layer, ffi::ResultBuffer<ffi::S32> acc, int64_t bits,
                             int64_t isa, int64_t threads) {
  auto d = data.dimensions();
  if (!in_stack(layer, d[0]) || d[1] != 1)
    return check(false, "ternax_accumulate: layer out of range, or more than one plane");
  Product call{};
  call.data = data.typed_data() + layer.typed_data()[0] * d[1] * d[2] * d[3];
  call.rows = d[2], call.row_bytes = d[3], call.groups = 1, call.planes = 1;
  call.bits = bits, call.digits = 1, call.tokens = x.dimensions()[0];
  call.acc = acc->typed_data();
  ThreadPool pool{xla_pool, static_cast<int>(threads)};
  run_product(call, x.typed_data(), x.dimensions()[1], kIsas[isa], pool, [](int64_t) {});
  return ffi::Error::Success();
}

// x s8 [D * M, K], x_scale f32 [M], weights, layer s32 -> f32 [M, N]; bits, isa, threads.
static ffi::Error Matmul(ffi::ThreadPool xla_pool, ffi::Buffer<ffi::S8> x, ffi::Buffer<ffi::F32> x_scale,
                         ffi::Buffer<ffi::U8> data, ffi::Buffer<ffi::F32> scale, ffi::Buffer<ffi::F32> zero,
                         ffi::Buffer<ffi::S32> layer, ffi::ResultBuffer<ffi::F32> y, int64_t bits,
                         int64_t isa, int64_t threads) {
  const int64_t tokens = y->dimensions()[0];
  if (!in_stack(layer, data.dimensions()[0])) return check(false, "ternax_matmul: layer out of range");
  if (!tokens) return ffi::Error::Success();  // there is no number of digits to find then
  Product call = weights(data, scale, zero, layer.typed_data()[0], bits);
  call.tokens = tokens, call.digits = x.dimensions()[0] / tokens;
  call.x_scale = x_scale.typed_data();
  call.y = y->typed_data();
  ThreadPool pool{xla_pool, static_cast<int>(threads)};
  run_product(call, x.typed_data(), x.dimensions()[1], kIsas[isa], pool, [](int64_t) {});
  return ffi::Error::Success();
}

// x f32 [M, K], gated [M, 2 K], norm f32 [K] or empty, weights, layer s32, residual f32 [M, N]
// or empty -> f32 [M, N]; bits, isa, threads, gate, eps.
static ffi::Error Project(ffi::ThreadPool xla_pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::F32> norm,
                          ffi::Buffer<ffi::U8> data, ffi::Buffer<ffi::F32> scale, ffi::Buffer<ffi::F32> zero,
                          ffi::Buffer<ffi::S32> layer, ffi::Buffer<ffi::F32> residual,
                          ffi::ResultBuffer<ffi::F32> y, int64_t bits, int64_t isa, int64_t threads,
                          int64_t gate, float eps) {
  if (!in_stack(layer, data.dimensions()[0])) return check(false, "ternax_project: layer out of range");
  const int64_t rows = x.dimensions()[0], k_size = x.dimensions()[1] / (gate ? 2 : 1);
  const int64_t norms = norm.element_count(), added = residual.element_count();
  if ((norms && norms != k_size) || (added && added != rows * data.dimensions()[2]))
    return check(false, "ternax_project: norm or residual has another shape than the product");
  Entry entry{x.typed_data(), norm.element_count() ? norm.typed_data() : nullptr, k_size, static_cast<int>(gate), eps,
              scratch<int8_t>(1, rows * k_size), scratch<float>(0, rows)};
  ThreadPool pool{xla_pool, static_cast<int>(threads)};
  Product call = weights(data, scale, zero, layer.typed_data()[0], bits);
  call.tokens = rows, call.digits = 1;
  call.x_scale = entry.scale;
  call.y = y->typed_data();
  call.residual = residual.element_count() ? residual.typed_data() : nullptr;
  run_product(call, entry.codes, k_size, kIsas[isa], pool,
              [&](int64_t r) { kIsas[isa].enter(entry, r, scratch<float>(1, k_size)); });
  return ffi::Error::Success();
}

// One layer of a cache; the rest of the call is the caller's to fill in.
static Attention cache_of(ffi::AnyBuffer& k, ffi::AnyBuffer& v, ffi::Buffer<ffi::F32>& k_scale,
                          ffi::Buffer<ffi::F32>& v_scale, ffi::Buffer<ffi::S32>& start,
                          ffi::Buffer<ffi::S32>& length, int64_t layer) {
  auto d = k.dimensions();
  const int64_t first = layer * d[1] * d[2] * d[3];
  Attention call{};
  call.store = k.size_bytes() / std::max<int64_t>(1, k.element_count());
  call.k = static_cast<char*>(k.untyped_data()) + first * d[4] * call.store;
  call.v = static_cast<char*>(v.untyped_data()) + first * d[4] * call.store;
  call.k_scale = k_scale.element_count() ? k_scale.typed_data() + first : nullptr;
  call.v_scale = v_scale.element_count() ? v_scale.typed_data() + first : nullptr;
  call.start = start.typed_data(), call.length = length.typed_data()[0];
  call.batch = d[1], call.groups = d[2], call.slots = d[3], call.width = d[4];
  return call;
}

// Tokens whose queries one task attends with.
constexpr int64_t kAttendTokens = 16;

static ffi::Error run_attention(ffi::ThreadPool xla_pool, const Attention& call, int64_t isa, int64_t threads) {
  if (call.length < 0 || call.length + call.tokens > call.slots)
    return check(false, "ternax attention: the cache is too short");
  if (!call.tokens) return ffi::Error::Success();
  const int64_t share = call.heads / call.groups, width = call.width;
  ThreadPool pool{xla_pool, static_cast<int>(threads)};
  // A task is a row of the batch, a kv head and a few tokens: enough tasks for every thread.
  const int64_t few = std::min<int64_t>(call.tokens, kAttendTokens);
  const int64_t blocks = (call.tokens + few - 1) / few, tasks = call.batch * call.groups * blocks;
  // Waking a helper costs more than attending to a short context.
  const int64_t work = call.batch * call.heads * call.tokens * (call.length + call.tokens) * width;
  const int64_t chunk = work < (1 << 17) ? tasks : 1;
  const auto keep = [&](int64_t task) {
    const int64_t t = task % blocks * few;
    kIsas[isa].keep(call, task / blocks, t, std::min(t + few, call.tokens), scratch<float>(2, width));
  };
  // Later tokens attend to earlier ones of their own prompt, which must be there then.
  if (blocks > 1)
    parallel_for(pool, tasks, chunk, [&](int64_t first, int64_t last) {
      for (int64_t task = first; task < last; task++) keep(task);
    });
  parallel_for(pool, tasks, chunk, [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; task++) {
      if (blocks == 1) keep(task);
      float* queries = scratch<float>(2, few * share * width + 4 * call.slots);
      const int64_t t = task % blocks * few;
      kIsas[isa].attend(call, task / blocks, t, std::min(t + few, call.tokens), queries, queries + few * share * width);
    }
  });
  return ffi::Error::Success();
}

// qkv f32 [B, T, (H + 2 G) E], cosine and sine f32 [B, T, E / 2], k and v [L, B, G, S, E] (s8,
// u16 bits of bf16, f32), their scales f32 [L, B, G, S] or empty, start s32 [B], length s32,
// layer s32 -> f32 [B, T, H, E] and the cache, whose buffers go in and come out as the same
// memory: q and k are rotated, k and v stored, and then q attends.
static ffi::Error Step(ffi::ThreadPool xla_pool, ffi::Buffer<ffi::F32> qkv, ffi::Buffer<ffi::F32> cosine,
                       ffi::Buffer<ffi::F32> sine, ffi::AnyBuffer k, ffi::AnyBuffer v,
                       ffi::Buffer<ffi::F32> k_scale, ffi::Buffer<ffi::F32> v_scale,
                       ffi::Buffer<ffi::S32> start, ffi::Buffer<ffi::S32> length, ffi::Buffer<ffi::S32> layer,
                       ffi::ResultBuffer<ffi::F32> out, ffi::Result<ffi::AnyBuffer> new_k,
                       ffi::Result<ffi::AnyBuffer> new_v, ffi::ResultBuffer<ffi::F32> new_k_scale,
                       ffi::ResultBuffer<ffi::F32> new_v_scale, int64_t isa, int64_t threads) {
  if (!in_stack(layer, k.dimensions()[0])) return check(false, "ternax_step: layer out of range");
  if (new_k->untyped_data() != k.untyped_data() || new_v->untyped_data() != v.untyped_data() ||
      (k_scale.element_count() && (new_k_scale->typed_data() != k_scale.typed_data() ||
                                   new_v_scale->typed_data() != v_scale.typed_data())))
    return check(false, "ternax_step: the cache must be updated in place");
  Attention call = cache_of(k, v, k_scale, v_scale, start, length, layer.typed_data()[0]);
  call.qkv = qkv.typed_data(), call.cosine = cosine.typed_data(), call.sine = sine.typed_data();
  call.tokens = qkv.dimensions()[1];
  call.heads = qkv.dimensions()[2] / call.width - 2 * call.groups;
  call.out = out->typed_data();
  return run_attention(xla_pool, call, isa, threads);
}

// -> zeros of any type, on huge pages.
static ffi::Error Zeros(ffi::ThreadPool xla_pool, ffi::Result<ffi::AnyBuffer> out, int64_t threads) {
  auto* data = static_cast<uint8_t*>(out->untyped_data());
  const int64_t bytes = static_cast<int64_t>(out->size_bytes());
  ask_for_huge_pages(data, bytes);
  ThreadPool pool{xla_pool, static_cast<int>(threads)};
  parallel_for(pool, bytes, kHugePage, [&](int64_t first, int64_t last) { std::memset(data + first, 0, last - first); });
  return ffi::Error::Success();
}

}  // namespace ternax

#define TERNAX_ATTRS .Attr<int64_t>("isa").Attr<int64_t>("threads")
#define TERNAX_WEIGHTS .Arg<ffi::Buffer<ffi::U8>>().Arg<ffi::Buffer<ffi::F32>>().Arg<ffi::Buffer<ffi::F32>>().Arg<ffi::Buffer<ffi::S32>>()
XLA_FFI_DEFINE_HANDLER_SYMBOL(ternax_accumulate, ternax::Accumulate,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<ffi::Buffer<ffi::S8>>().Arg<ffi::Buffer<ffi::U8>>()
        .Arg<ffi::Buffer<ffi::S32>>().Ret<ffi::Buffer<ffi::S32>>().Attr<int64_t>("bits") TERNAX_ATTRS);
XLA_FFI_DEFINE_HANDLER_SYMBOL(ternax_matmul, ternax::Matmul,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<ffi::Buffer<ffi::S8>>().Arg<ffi::Buffer<ffi::F32>>()
        TERNAX_WEIGHTS .Ret<ffi::Buffer<ffi::F32>>().Attr<int64_t>("bits") TERNAX_ATTRS);
XLA_FFI_DEFINE_HANDLER_SYMBOL(ternax_project, ternax::Project,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<ffi::Buffer<ffi::F32>>().Arg<ffi::Buffer<ffi::F32>>()
        TERNAX_WEIGHTS .Arg<ffi::Buffer<ffi::F32>>().Ret<ffi::Buffer<ffi::F32>>().Attr<int64_t>("bits")
        TERNAX_ATTRS .Attr<int64_t>("gate").Attr<float>("eps"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(ternax_step, ternax::Step,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<ffi::Buffer<ffi::F32>>().Arg<ffi::Buffer<ffi::F32>>()
        .Arg<ffi::Buffer<ffi::F32>>().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Arg<ffi::Buffer<ffi::F32>>()
        .Arg<ffi::Buffer<ffi::F32>>().Arg<ffi::Buffer<ffi::S32>>().Arg<ffi::Buffer<ffi::S32>>()
        .Arg<ffi::Buffer<ffi::S32>>().Ret<ffi::Buffer<ffi::F32>>().Ret<ffi::AnyBuffer>()
        .Ret<ffi::AnyBuffer>().Ret<ffi::Buffer<ffi::F32>>().Ret<ffi::Buffer<ffi::F32>>() TERNAX_ATTRS);

XLA_FFI_DEFINE_HANDLER_SYMBOL(ternax_zeros, ternax::Zeros,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Ret<ffi::AnyBuffer>().Attr<int64_t>("threads"));

// The name of instruction set `index`, or null past the last; and whether this CPU has it.
extern "C" const char* ternax_isa_name(int index) {
  const int count = sizeof(ternax::kIsas) / sizeof(ternax::kIsas[0]);
  return index >= 0 && index < count ? ternax::kIsas[index].name : nullptr;
}
extern "C" int ternax_isa_supported(int index) {
#if defined(__x86_64__)
  __builtin_cpu_init();
#endif
  return ternax::kIsas[index].supported();
}
