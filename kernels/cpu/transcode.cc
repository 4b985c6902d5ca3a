// Transcoding between foreign packed ternary layouts and the canonical one, and rows of floats
// to canonical int8.
//
// kernels/transcode.py and rows.py define them; this gives the same bytes at the speed of
// memory. A library of its own, plain C functions over the caller's memory: one pass reads
// the input once, writes the output once and counts codes 3 on the way.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <limits>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace ternax {

enum Layout : int { kHf, kTq10, kTq20, kI2sX86, kI2sArm, kI2sRows };  // the numbers in LAYOUTS

struct Job {
  int layout;
  bool back;    // from canonical to the layout
  bool stream;  // whether the output may be stored past the caches
  const uint8_t* in;
  uint8_t* out;
  uint8_t* scale;  // f16 a block of tq*: written, or read if back
  int64_t k, n;
};

enum RowKind : int { kBf16, kF16, kF32 };  // the numbers in rows.KINDS

struct RowsJob {
  int kind;
  bool stream;
  const void* in;  // rows of `columns` floats, aligned to one
  uint8_t* out;    // rows of codes, padded to 16
  float* scale;
  int64_t columns;
};

constexpr float kEps = 1e-5f;         // quant.scheme.EPS: the least magnitude that a scale is made of
constexpr float kRound = 12582912.0f;  // 1.5 * 2^23
constexpr int64_t kStage = 4096;      // codes on their way from L1 past the caches

inline float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline uint32_t as_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

constexpr int64_t kCheck = 64;      // lines between two looks for codes 3: they are still in L1
constexpr uint8_t kZeroes = 0x55;   // four codes of zero
constexpr int kTq1Codes = 52;       // bytes of a tq1_0 block before its scale
// A byte q of tq1_0 has the leading digit q * 3 >> 8: 1 past 85, 2 past 170; less 128 here,
// since vectors compare signed. Tripling commutes with the shift by 128.
constexpr int8_t kOneThird = 85 - 128, kTwoThirds = 170 - 128;
// Five digits of number v are stored as ceil(v * 256 / 243) = v + floor(13 v / 243) + (v > 0),
// and floor(13 v / 243) = (219 v + 16) >> 12 for all v < 243, within 16 bits.
constexpr int kCeilFactor = 219, kCeilRound = 16, kCeilShift = 12;

// Orders of words: entry i names the word that comes to place i.
constexpr uint32_t kAcross[16] = {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15};
// 32 bytes of tq2_0 hold k = 32 l + 16 h + 4 p + b in field l of word 4 h + p.
constexpr uint32_t kTq2Order[16] = {0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15};
constexpr uint32_t kTq2Back[16] = {0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15};
// i2_s the same in field 3 - l; its blocks of 64 have no h.
constexpr uint32_t kX86Order[16] = {3, 7, 2, 6, 1, 5, 0, 4, 11, 15, 10, 14, 9, 13, 8, 12};
constexpr uint32_t kX86Back[16] = {6, 4, 2, 0, 7, 5, 3, 1, 14, 12, 10, 8, 15, 13, 11, 9};
constexpr uint32_t kArmOrder[16] = {3, 2, 1, 0, 7, 6, 5, 4, 11, 10, 9, 8, 15, 14, 13, 12};
// tq1_0: digits 0..3 are the fields of x, digit 4 alone is y. Words of tiles(x), from 16 on
// those of tiles(y), and 28 for x's own word 12, the qh bytes, whose fields are in place.
constexpr uint32_t kTq1Joined[16] = {0, 4, 1, 5, 2, 6, 3, 7, 16, 20, 8, 9, 10, 11, 24, 28};
constexpr uint32_t kTq1Tiles[16] = {0, 2, 4, 6, 1, 3, 5, 7, 10, 11, 12, 13, 15, 15, 15, 15};
constexpr uint32_t kTq1Last[16] = {8, 0, 0, 0, 9, 0, 0, 0, 14, 0, 0, 0, 0, 0, 0, 0};

inline int64_t count_threes(const uint8_t* bytes, int64_t count) {
  int64_t found = 0;
  for (int64_t i = 0; i < count; i++) {
    const unsigned v = bytes[i] & (bytes[i] >> 1) & 0x55u;
    found += (v & 1) + (v >> 2 & 1) + (v >> 4 & 1) + (v >> 6);
  }
  return found;
}

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx2")
namespace avx512 {
#define TERNAX_AVX512 1
#include "transcode.h"
#include "rows.h"
#undef TERNAX_AVX512
}  // namespace avx512
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2")
namespace avx2 {
#define TERNAX_AVX2 1
#include "transcode.h"
#include "rows.h"
#undef TERNAX_AVX2
}  // namespace avx2
#pragma GCC pop_options
#endif
namespace portable {
#include "transcode.h"
#include "rows.h"
}

struct InstructionSet {
  const char* name;
  bool (*supported)();
  int64_t (*pass)(const Job&, int64_t first, int64_t last);
  float (*rows)(const RowsJob&, int64_t first, int64_t last);
};

const InstructionSet kInstructionSets[] = {  // fastest first
#if defined(__x86_64__)
    {"avx512",
     [] { return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"); },
     avx512::pass, avx512::rows},
    {"avx2", [] { return __builtin_cpu_supports("avx2") != 0; }, avx2::pass, avx2::rows},
#endif
    {"portable", [] { return true; }, portable::pass, portable::rows},
};
constexpr int kSets = sizeof(kInstructionSets) / sizeof(kInstructionSets[0]);

constexpr int64_t kThreadBytes = 1 << 16;  // less is done before a thread has started
constexpr int64_t kStreamBytes = 1 << 22;  // outputs that no cache will hold for the reader

int64_t units_of(const Job& job) {
  switch (job.layout) {
    case kHf:
    case kI2sRows: return job.n / 4;
    case kTq10:
    case kTq20: return job.k / 256 * job.n;
    default: return (job.k * job.n / 4 + 63) / 64;
  }
}

// Whether every 16 bytes of the output lie at a multiple of 16.
bool aligned(const Job& job) {
  const bool rows = job.layout == kHf || job.layout == kI2sRows;
  const int64_t stride = rows ? (job.back ? job.k : (job.k + 15) / 16 * 4) : 0;
  return (reinterpret_cast<uintptr_t>(job.out) | static_cast<uintptr_t>(stride)) % 16 == 0;
}

// Calls work(i), i < count: on the caller and on helpers.
template <class Work>
void over_threads(int count, const Work& work) {
  std::vector<std::thread> helpers;
  for (int i = 1; i < count; i++) {
    try {
      helpers.emplace_back(work, i);
    } catch (const std::system_error&) {
      work(i);  // no more threads to be had
    }
  }
  work(0);
  for (std::thread& helper : helpers) helper.join();
}

// How many threads are worth starting for an output of so many bytes, cut into units.
int useful_threads(int threads, int64_t bytes, int64_t units) {
  const int64_t useful = std::min(std::max<int64_t>(1, bytes / kThreadBytes), units);
  return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, useful)));
}

}  // namespace ternax

extern "C" {

const char* ternax_transcode_isa_name(int index) {
  return index < ternax::kSets ? ternax::kInstructionSets[index].name : nullptr;
}

int ternax_transcode_isa_supported(int index) {
  return ternax::kInstructionSets[index].supported();
}

// Sizes are the caller's to check: K and N as the layout admits them, in and out as long as
// they imply. Returns how many codes 3 the input holds; the output then means nothing.
int64_t ternax_transcode(int layout, int back, int isa, int threads, const uint8_t* in, uint8_t* out,
                         uint8_t* scale, int64_t k, int64_t n) {
  using namespace ternax;
  Job job{layout, back != 0, false, in, out, scale, k, n};
  const int64_t bytes = k * n / 4, units = units_of(job);
  job.stream = bytes >= kStreamBytes && aligned(job);
  const auto pass = kInstructionSets[isa].pass;
  const int count = useful_threads(threads, bytes, units);
  std::atomic<int64_t> bad{0};
  over_threads(count, [&](int i) {
    bad += pass(job, units * i / count, units * (i + 1) / count);
  });
  return bad;
}

// Rows [n, k] of floats of `kind` as int8 codes [n, k padded to 16] and scales [n]. Returns the
// largest magnitude, infinity where a value is not finite; the output then means nothing.
float ternax_int8_rows(int kind, int isa, int threads, const void* in, uint8_t* out, float* scale, int64_t k,
                       int64_t n) {
  using namespace ternax;
  const int64_t bytes = (k + 15) / 16 * 16 * n;
  const bool stream = bytes >= kStreamBytes && reinterpret_cast<uintptr_t>(out) % 16 == 0;
  const RowsJob job{kind, stream, in, out, scale, k};
  const auto pass = kInstructionSets[isa].rows;
  const int count = useful_threads(threads, bytes, n);
  std::vector<float> most(count);
  over_threads(count, [&](int i) { most[i] = pass(job, n * i / count, n * (i + 1) / count); });
  return *std::max_element(most.begin(), most.end());
}

}  // extern "C"
