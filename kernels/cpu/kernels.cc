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
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

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
};

// What attention over the cache needs of one layer.
struct Attention {
  const float* q;            // [batch, tokens, heads, width]
  const void *k, *v;         // [batch, groups, slots, width] of one layer
  const float *k_scale, *v_scale;  // [batch, groups, slots] or null
  const int32_t* start;      // [batch]
  int64_t length, batch, tokens, heads, groups, slots, width;
  int store;                 // bytes of a stored value: 1 int8, 2 bf16, 4 f32
  float* out;                // like q
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
  void (*rows)(const Product&, int64_t first, int64_t last);
  void (*attend)(const Attention&, int64_t pair, float* scratch);
};

static const Isa kIsas[] = {
#if defined(__x86_64__)
    {"avx512vnni",
     [] { return __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
                 __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"); },
     avx512vnni::kWidth, avx512vnni::product_rows, avx512vnni::attend_pair},
    {"avxvnni", [] { return __builtin_cpu_supports("avxvnni") != 0; }, avxvnni::kWidth,
     avxvnni::product_rows, avxvnni::attend_pair},
    {"avx2", [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); },
     avx2::kWidth, avx2::product_rows, avx2::attend_pair},
#endif
#if defined(__ARM_FEATURE_DOTPROD)
    {"neon", [] { return true; }, neon::kWidth, neon::product_rows, neon::attend_pair},
#endif
    {"portable", [] { return true; }, portable::kWidth, portable::product_rows,
     portable::attend_pair},
};

// Puts one row of activations in plane order, group by group, padded with zeros to whole
// vectors: step s, plane p of a group holds the activations of bytes s * width .. of it.
// kRun codes lie side by side in a block: 2 * bits of them, a divisor of every width.
template <int kRun>
static void prepare(const int8_t* x, int64_t k_size, const Product& call, int64_t width, int64_t row,
                    int8_t* out, int32_t* sums, int64_t total_rows) {
  constexpr int kPlanes = 16 / kRun;
  const int64_t group_bytes = call.row_bytes / call.groups;
  const int64_t steps = (group_bytes + width - 1) / width;
  if (group_bytes % width) std::memset(out, 0, call.x_stride);
  for (int64_t g = 0; g < call.groups; g++) {
    int32_t sum = 0;
    for (int64_t byte = 0; byte < group_bytes; byte += kRun) {
      const int64_t k0 = (g * group_bytes + byte) / kRun * 16;
      int8_t block[16] = {};
      std::memcpy(block, x + k0, std::min<int64_t>(16, k_size - k0));
      for (int i = 0; i < 16; i++) sum += block[i];
      int8_t* to = out + (g * steps + byte / width) * width * kPlanes + byte % width;
      for (int p = 0; p < kPlanes; p++) std::memcpy(to + p * width, block + p * kRun, kRun);
    }
    sums[g * total_rows + row] = sum;
  }
}

// Rows of W one thread takes at a time: about 128 KiB of weights.
static int64_t chunk_rows(int64_t row_bytes, int64_t rows, int threads) {
  int64_t chunk = std::max<int64_t>(1, (128 << 10) / std::max<int64_t>(1, row_bytes));
  chunk = std::min(chunk, (rows + 4 * threads - 1) / (4 * threads));
  return (std::max<int64_t>(1, chunk) + 15) / 16 * 16;
}

static void run_product(Product call, const int8_t* x, int64_t k_size, const Isa& isa, ThreadPool& pool) {
  const int64_t rows = call.digits * call.tokens;
  const int64_t group_bytes = call.row_bytes / call.groups;
  const int64_t steps = (group_bytes + isa.vector_bytes - 1) / isa.vector_bytes;
  call.x_stride = steps * isa.vector_bytes * (8 / call.bits) * call.groups;
  auto buffer = scratch<int8_t>(0, rows * call.x_stride + 64);
  auto sums = scratch<int32_t>(1, rows * call.groups);
  int8_t* aligned = buffer + (64 - reinterpret_cast<uintptr_t>(buffer) % 64) % 64;
  parallel_for(pool, rows, 1 + (1 << 16) / std::max<int64_t>(1, k_size), [&](int64_t first, int64_t last) {
    const auto put = call.bits == 2 ? prepare<4> : call.bits == 4 ? prepare<8> : prepare<16>;
    for (int64_t r = first; r < last; r++)
      put(x + r * k_size, k_size, call, isa.vector_bytes, r, aligned + r * call.x_stride, sums, rows);
  });
  call.x = aligned;
  call.sums = sums;
  parallel_for(pool, call.rows, chunk_rows(call.row_bytes, call.rows, pool.threads),
               [&](int64_t first, int64_t last) { isa.rows(call, first, last); });
}

static ffi::Error check(bool ok, const char* what) {
  return ok ? ffi::Error::Success() : ffi::Error::InvalidArgument(what);
}

// x s8 [R, K], data u8 [L, P, N, bytes], layer s32 -> s32 [R, N]; bits, isa, threads.
static ffi::Error Accumulate(ffi::ThreadPool xla_pool, ffi::Buffer<ffi::S8> x, ffi::Buffer<ffi::U8> data,
                             ffi::Buffer<ffi::S32> layer, ffi::ResultBuffer<ffi::S32> acc, int64_t bits,
                             int64_t isa, int64_t threads) {
  auto d = data.dimensions();
  const int64_t index = layer.typed_data()[0];
  if (index < 0 || index >= d[0] || d[1] != 1)
    return check(false, "ternax_accumulate: layer out of range, or more than one plane");
  Product call{};
  call.data = data.typed_data() + index * d[1] * d[2] * d[3];
  call.rows = d[2], call.row_bytes = d[3], call.groups = 1, call.planes = 1;
  call.bits = bits, call.digits = 1, call.tokens = x.dimensions()[0];
  call.acc = acc->typed_data();
  ThreadPool pool{xla_pool, static_cast<int>(threads)};
  run_product(call, x.typed_data(), x.dimensions()[1], kIsas[isa], pool);
  return ffi::Error::Success();
}

// x s8 [D * M, K], x_scale f32 [M], data u8 [L, P, N, bytes], scale f32 [L, P, G, 1 or N],
// zero like scale or empty, layer s32 -> f32 [M, N]; bits, isa, threads.
static ffi::Error Matmul(ffi::ThreadPool xla_pool, ffi::Buffer<ffi::S8> x, ffi::Buffer<ffi::F32> x_scale,
                         ffi::Buffer<ffi::U8> data, ffi::Buffer<ffi::F32> scale, ffi::Buffer<ffi::F32> zero,
                         ffi::Buffer<ffi::S32> layer, ffi::ResultBuffer<ffi::F32> y, int64_t bits,
                         int64_t isa, int64_t threads) {
  auto d = data.dimensions();
  auto s = scale.dimensions();
  const int64_t index = layer.typed_data()[0], tokens = y->dimensions()[0];
  if (index < 0 || index >= d[0]) return check(false, "ternax_matmul: layer out of range");
  Product call{};
  call.data = data.typed_data() + index * d[1] * d[2] * d[3];
  call.scale = scale.typed_data() + index * s[1] * s[2] * s[3];
  call.zero = zero.element_count() ? zero.typed_data() + index * s[1] * s[2] * s[3] : nullptr;
  call.rows = d[2], call.row_bytes = d[3], call.planes = d[1];
  call.groups = s[2], call.scale_columns = s[3];
  call.bits = bits, call.tokens = tokens, call.digits = x.dimensions()[0] / tokens;
  call.x_scale = x_scale.typed_data();
  call.y = y->typed_data();
  ThreadPool pool{xla_pool, static_cast<int>(threads)};
  run_product(call, x.typed_data(), x.dimensions()[1], kIsas[isa], pool);
  return ffi::Error::Success();
}

// q f32 [B, T, H, E], k and v [L, B, G, S, E] (s8, u16 bits of bf16, f32), their scales f32
// [L, B, G, S] or empty, start s32 [B], length s32, layer s32 -> f32 [B, T, H, E].
static ffi::Error Attend(ffi::ThreadPool xla_pool, ffi::Buffer<ffi::F32> q, ffi::AnyBuffer k, ffi::AnyBuffer v,
                         ffi::Buffer<ffi::F32> k_scale, ffi::Buffer<ffi::F32> v_scale,
                         ffi::Buffer<ffi::S32> start, ffi::Buffer<ffi::S32> length,
                         ffi::Buffer<ffi::S32> layer, ffi::ResultBuffer<ffi::F32> out, int64_t isa,
                         int64_t threads) {
  auto d = k.dimensions();
  auto qd = q.dimensions();
  const int64_t index = layer.typed_data()[0], per_layer = d[1] * d[2] * d[3];
  if (index < 0 || index >= d[0]) return check(false, "ternax_attend: layer out of range");
  Attention call{};
  call.store = k.size_bytes() / k.element_count();
  call.q = q.typed_data();
  call.k = static_cast<const char*>(k.untyped_data()) + index * per_layer * d[4] * call.store;
  call.v = static_cast<const char*>(v.untyped_data()) + index * per_layer * d[4] * call.store;
  call.k_scale = k_scale.element_count() ? k_scale.typed_data() + index * per_layer : nullptr;
  call.v_scale = v_scale.element_count() ? v_scale.typed_data() + index * per_layer : nullptr;
  call.start = start.typed_data(), call.length = length.typed_data()[0];
  call.batch = d[1], call.groups = d[2], call.slots = d[3], call.width = d[4];
  call.tokens = qd[1], call.heads = qd[2];
  call.out = out->typed_data();
  if (call.length + call.tokens > call.slots) return check(false, "ternax_attend: the cache is too short");
  const int64_t queries = call.heads / call.groups * call.tokens;
  ThreadPool pool{xla_pool, static_cast<int>(threads)};
  // Waking a helper costs more than attending to a short context.
  const int64_t work = call.batch * call.heads * call.tokens * (call.length + call.tokens) * call.width;
  parallel_for(pool, call.batch * call.groups, work < (1 << 18) ? call.batch * call.groups : 1, [&](int64_t first, int64_t last) {
    float* memory = scratch<float>(2, queries * (call.slots + 16) + call.width * 4);
    for (int64_t pair = first; pair < last; pair++) kIsas[isa].attend(call, pair, memory);
  });
  return ffi::Error::Success();
}

}  // namespace ternax

#define TERNAX_ATTRS .Attr<int64_t>("isa").Attr<int64_t>("threads")
XLA_FFI_DEFINE_HANDLER_SYMBOL(ternax_accumulate, ternax::Accumulate,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<ffi::Buffer<ffi::S8>>().Arg<ffi::Buffer<ffi::U8>>()
        .Arg<ffi::Buffer<ffi::S32>>().Ret<ffi::Buffer<ffi::S32>>().Attr<int64_t>("bits") TERNAX_ATTRS);
XLA_FFI_DEFINE_HANDLER_SYMBOL(ternax_matmul, ternax::Matmul,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<ffi::Buffer<ffi::S8>>().Arg<ffi::Buffer<ffi::F32>>()
        .Arg<ffi::Buffer<ffi::U8>>().Arg<ffi::Buffer<ffi::F32>>().Arg<ffi::Buffer<ffi::F32>>()
        .Arg<ffi::Buffer<ffi::S32>>().Ret<ffi::Buffer<ffi::F32>>().Attr<int64_t>("bits") TERNAX_ATTRS);
XLA_FFI_DEFINE_HANDLER_SYMBOL(ternax_attend, ternax::Attend,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<ffi::Buffer<ffi::F32>>().Arg<ffi::AnyBuffer>()
        .Arg<ffi::AnyBuffer>().Arg<ffi::Buffer<ffi::F32>>().Arg<ffi::Buffer<ffi::F32>>()
        .Arg<ffi::Buffer<ffi::S32>>().Arg<ffi::Buffer<ffi::S32>>().Arg<ffi::Buffer<ffi::S32>>()
        .Ret<ffi::Buffer<ffi::F32>>() TERNAX_ATTRS);

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
