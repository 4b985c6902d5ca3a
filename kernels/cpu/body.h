// The kernels' body. kernels.cc includes it once per instruction set, each in a
// namespace of its own; only the primitives at the top differ.

namespace TERNAX_ISA {

#if TERNAX_AVX512
constexpr int64_t kWidth = 64;
using Bytes = __m512i;
using Acc = __m512i;
inline Acc acc_zero() { return _mm512_setzero_si512(); }
inline Bytes load(const void* p) { return _mm512_loadu_si512(p); }
inline Bytes load_part(const void* p, int64_t n) {
  return _mm512_maskz_loadu_epi8((1ull << n) - 1, p);
}
template <int kBits>
inline Bytes codes(Bytes v, int p) {
  if (kBits == 8) return v;
  return _mm512_and_si512(_mm512_srli_epi16(v, kBits * p), _mm512_set1_epi8((1 << kBits) - 1));
}
template <int kBits>
inline Acc dot(Acc acc, Bytes u, const int8_t* x) {
  return _mm512_dpbusd_epi32(acc, u, _mm512_load_si512(x));
}
inline int32_t reduce(Acc a) { return _mm512_reduce_add_epi32(a); }
inline void reduce4(const Acc a[4], int32_t* out) {
  const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a[0], a[1]), _mm512_unpackhi_epi32(a[0], a[1]));
  const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(a[2], a[3]), _mm512_unpackhi_epi32(a[2], a[3]));
  const __m512i s = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
  const __m256i t = _mm256_add_epi32(_mm512_castsi512_si256(s), _mm512_extracti64x4_epi64(s, 1));
  const __m128i u = _mm_add_epi32(_mm256_castsi256_si128(t), _mm256_extracti128_si256(t, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), u);
}
#elif TERNAX_AVX2
constexpr int64_t kWidth = 32;
using Bytes = __m256i;
using Acc = __m256i;
inline Acc acc_zero() { return _mm256_setzero_si256(); }
inline Bytes load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline Bytes load_part(const void* p, int64_t n) {
  alignas(32) uint8_t copy[32] = {};
  std::memcpy(copy, p, n);
  return load(copy);
}
template <int kBits>
inline Bytes codes(Bytes v, int p) {
  if (kBits == 8) return v;
  return _mm256_and_si256(_mm256_srli_epi16(v, kBits * p), _mm256_set1_epi8((1 << kBits) - 1));
}
template <int kBits>
inline Acc dot(Acc acc, Bytes u, const int8_t* x) {
  const __m256i v = _mm256_load_si256(reinterpret_cast<const __m256i*>(x));
#if TERNAX_AVXVNNI
  return _mm256_dpbusd_avx_epi32(acc, u, v);
#else
  const __m256i one = _mm256_set1_epi16(1);
  if (kBits < 8) {
    // At most 2 * 15 * 128 a pair: far from int16's end.
    return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(u, v), one));
  }
  // 255 * 128 twice would saturate: widen first.
  const __m256i low = _mm256_set1_epi16(0xff);
  const __m256i even = _mm256_madd_epi16(_mm256_and_si256(u, low), _mm256_srai_epi16(_mm256_slli_epi16(v, 8), 8));
  const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(u, 8), _mm256_srai_epi16(v, 8));
  return _mm256_add_epi32(acc, _mm256_add_epi32(even, odd));
#endif
}
inline int32_t reduce(Acc a) {
  __m128i s = _mm_add_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
}
inline void reduce4(const Acc a[4], int32_t* out) {
  const __m256i s = _mm256_hadd_epi32(_mm256_hadd_epi32(a[0], a[1]), _mm256_hadd_epi32(a[2], a[3]));
  const __m128i t = _mm_add_epi32(_mm256_castsi256_si128(s), _mm256_extracti128_si256(s, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), t);
}
#elif TERNAX_NEON
constexpr int64_t kWidth = 16;
using Bytes = uint8x16_t;
using Acc = int32x4_t;
inline Acc acc_zero() { return vdupq_n_s32(0); }
inline Bytes load(const void* p) { return vld1q_u8(static_cast<const uint8_t*>(p)); }
inline Bytes load_part(const void* p, int64_t n) {
  uint8_t copy[16] = {};
  std::memcpy(copy, p, n);
  return vld1q_u8(copy);
}
template <int kBits>
inline Bytes codes(Bytes v, int p) {
  if (kBits == 8) return v;
  return vandq_u8(vshlq_u8(v, vdupq_n_s8(-kBits * p)), vdupq_n_u8((1 << kBits) - 1));
}
template <int kBits>
inline Acc dot(Acc acc, Bytes u, const int8_t* x) {
  // There is no unsigned x signed dot before i8mm: int8 codes lose their offset here and
  // get it back below, in product_rows.
  const int8x16_t s = vreinterpretq_s8_u8(kBits == 8 ? veorq_u8(u, vdupq_n_u8(128)) : u);
  return vdotq_s32(acc, s, vld1q_s8(x));
}
inline int32_t reduce(Acc a) { return vaddvq_s32(a); }
inline void reduce4(const Acc a[4], int32_t* out) {
  vst1q_s32(out, vpaddq_s32(vpaddq_s32(a[0], a[1]), vpaddq_s32(a[2], a[3])));
}
#else
constexpr int64_t kWidth = 16;
struct Bytes { uint8_t b[16]; };
struct Acc { int32_t s; };
inline Acc acc_zero() { return {0}; }
inline Bytes load(const void* p) { Bytes v; std::memcpy(v.b, p, 16); return v; }
inline Bytes load_part(const void* p, int64_t n) { Bytes v{}; std::memcpy(v.b, p, n); return v; }
template <int kBits>
inline Bytes codes(Bytes v, int p) {
  if (kBits < 8) for (int i = 0; i < 16; i++) v.b[i] = (v.b[i] >> (kBits * p)) & ((1 << kBits) - 1);
  return v;
}
template <int kBits>
inline Acc dot(Acc acc, Bytes u, const int8_t* x) {
  for (int i = 0; i < 16; i++) acc.s += int32_t{u.b[i]} * x[i];
  return acc;
}
inline int32_t reduce(Acc a) { return a.s; }
inline void reduce4(const Acc a[4], int32_t* out) {
  for (int i = 0; i < 4; i++) out[i] = a[i].s;
}
#endif

#if TERNAX_NEON
constexpr int kInt8Offset = 0;
#else
constexpr int kInt8Offset = 128;
#endif

// Least distance, in bytes, at which weights are asked for ahead of their use, into the
// second-level cache. Into the first, the few misses that cache may have in flight become
// the limit: 11 GB/s a thread on a Zen 4 instead of 26. The distance is a whole number of
// tiles, so that what is asked for is the same columns of rows that come next; 8 KiB flat
// would ask for the middle of the present tile when rows are long (15 GB/s against 22).
constexpr int64_t kPrefetch = 8192;

// Rows of W whose sums are kept together before they become floats.
constexpr int kRows = 16;
// Output rows whose activations are used together, so that they stay in the cache.
constexpr int64_t kTokens = 16;

// part[m][r] = sum over one group of codes(row r) * x(m), for R (1 or 4) rows and M
// activation rows.
//
// Every loop over r and m is unrolled, also the cold ones: one that is not would keep the
// accumulators in memory.
template <int kBits, int R, int M>
inline void tile(const uint8_t* w, int64_t row_bytes, const int8_t* x, int64_t x_stride,
                 int64_t group_bytes, int64_t ahead, int32_t* part) {
  constexpr int kPlanes = 8 / kBits;
  Acc acc[M][R];
#pragma GCC unroll 8
  for (int m = 0; m < M; m++)
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) acc[m][r] = acc_zero();
  int64_t byte = 0;
  for (; byte + kWidth <= group_bytes; byte += kWidth) {
    Bytes v[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const uint8_t* at = w + r * row_bytes + byte;
      __builtin_prefetch(at + ahead, 0, 2);
      v[r] = load(at);
    }
#pragma GCC unroll 4
    for (int p = 0; p < kPlanes; p++) {
      Bytes u[R];
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) u[r] = codes<kBits>(v[r], p);
#pragma GCC unroll 8
      for (int m = 0; m < M; m++) {
        const int8_t* xm = x + m * x_stride + byte * kPlanes + p * kWidth;
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) acc[m][r] = dot<kBits>(acc[m][r], u[r], xm);
      }
    }
  }
  if (byte < group_bytes) {
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const Bytes v = load_part(w + r * row_bytes + byte, group_bytes - byte);
#pragma GCC unroll 4
      for (int p = 0; p < kPlanes; p++)
#pragma GCC unroll 8
        for (int m = 0; m < M; m++)
          acc[m][r] = dot<kBits>(acc[m][r], codes<kBits>(v, p),
                                 x + m * x_stride + byte * kPlanes + p * kWidth);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; m++) {
    if (R == 4)
      reduce4(acc[m], part + m * kRows);
    else
      part[m * kRows] = reduce(acc[m][0]);
  }
}

// R rows of one (plane, group) times `count` activation rows: exact sums into part[m][r].
template <int kBits, int R>
inline void tiles(const Product& call, const uint8_t* w, const int8_t* x, int64_t count, bool first,
                  int32_t* part) {
  const int64_t group_bytes = call.row_bytes / call.groups, stride = call.x_stride;
  const int64_t tile_bytes = R * call.row_bytes;
  const int64_t next = (kPrefetch + tile_bytes - 1) / tile_bytes * tile_bytes;
  for (int64_t m = 0; m < count; m += 4) {
    const int64_t ahead = first && m == 0 ? next : 0;  // later activations find the weights here
    const int8_t* xm = x + m * stride;
    int32_t* out = part + m * kRows;
    switch (count - m) {
      case 1: tile<kBits, R, 1>(w, call.row_bytes, xm, stride, group_bytes, ahead, out); break;
      case 2: tile<kBits, R, 2>(w, call.row_bytes, xm, stride, group_bytes, ahead, out); break;
      case 3: tile<kBits, R, 3>(w, call.row_bytes, xm, stride, group_bytes, ahead, out); break;
      default: tile<kBits, R, 4>(w, call.row_bytes, xm, stride, group_bytes, ahead, out);
    }
  }
}

// `count` (up to kRows) rows from `row` times activation rows first .. first + tokens, one
// (plane, group): exact sums, offset taken off, into part[token][r].
template <int kBits>
inline void sums(const Product& call, int64_t plane, int64_t group, int64_t row, int64_t count,
                 int64_t first, int64_t tokens, int32_t* part) {
  const int64_t group_bytes = call.row_bytes / call.groups;
  const int64_t steps = (group_bytes + kWidth - 1) / kWidth;
  const uint8_t* w = call.data + (plane * call.rows + row) * call.row_bytes + group * group_bytes;
  const int8_t* x = call.x + first * call.x_stride + group * steps * kWidth * (8 / kBits);
  int64_t r = 0;
  for (; r + 4 <= count; r += 4) tiles<kBits, 4>(call, w + r * call.row_bytes, x, tokens, !first, part + r);
  for (; r < count; r++) tiles<kBits, 1>(call, w + r * call.row_bytes, x, tokens, !first, part + r);
  const int offset = kBits == 8 ? kInt8Offset : kOffset[kBits];
  const int32_t* sum = call.sums + group * call.digits * call.tokens + first;
  for (int64_t t = 0; t < tokens; t++)
    for (int i = 0; i < kRows; i++) part[t * kRows + i] -= offset * sum[t];
}

// Turns exact sums of one (plane, group) into their share of y, for `count` rows.
inline void share(const Product& call, int64_t plane, int64_t group, int64_t row, int64_t count,
                  int64_t token, const int32_t* const part[3]) {
  const int64_t at = (plane * call.groups + group) * call.scale_columns;
  const bool columns = call.scale_columns > 1;
  const float x_scale = call.x_scale[token];
  float total[kRows], scale[kRows];
  for (int i = 0; i < kRows; i++) total[i] = static_cast<float>(part[call.digits - 1][i]);
  for (int d = call.digits - 2; d >= 0; d--)
    for (int i = 0; i < kRows; i++) total[i] = total[i] * 128.0f + static_cast<float>(part[d][i]);
  if (call.zero) {
    int64_t whole = 0;
    for (int d = call.digits - 1; d >= 0; d--)
      whole = whole * 128 + call.sums[(group * call.digits + d) * call.tokens + token];
    for (int64_t i = 0; i < count; i++)
      total[i] += call.zero[at + (columns ? row + i : 0)] * static_cast<float>(whole);
  }
  if (columns && count == kRows)
    std::memcpy(scale, call.scale + at + row, sizeof(scale));
  else
    for (int64_t i = 0; i < count; i++) scale[i] = call.scale[at + (columns ? row + i : 0)];
  float* y = call.y + token * call.rows + row;
  if (plane + group)
    for (int64_t i = 0; i < count; i++) y[i] += total[i] * (x_scale * scale[i]);
  else
    for (int64_t i = 0; i < count; i++) y[i] = total[i] * (x_scale * scale[i]);
}

// Rows first .. last of the output, all tokens.
template <int kBits>
void bits_rows(const Product& call, int64_t begin, int64_t end) {
  int32_t part[3][kTokens * kRows] = {};
  for (int64_t row = begin; row < end; row += kRows) {
    const int64_t count = std::min<int64_t>(kRows, end - row);
    for (int64_t t0 = 0; t0 < call.tokens; t0 += kTokens) {
      const int64_t tokens = std::min<int64_t>(kTokens, call.tokens - t0);
      if (call.acc) {
        sums<kBits>(call, 0, 0, row, count, t0, tokens, part[0]);
        for (int64_t t = 0; t < tokens; t++)
          std::memcpy(call.acc + (t0 + t) * call.rows + row, part[0] + t * kRows, count * sizeof(int32_t));
        continue;
      }
      for (int64_t plane = 0; plane < call.planes; plane++)
        for (int64_t group = 0; group < call.groups; group++) {
          for (int d = 0; d < call.digits; d++)
            sums<kBits>(call, plane, group, row, count, d * call.tokens + t0, tokens, part[d]);
          for (int64_t t = 0; t < tokens; t++) {
            const int32_t* const digits[3] = {part[0] + t * kRows, part[1] + t * kRows, part[2] + t * kRows};
            share(call, plane, group, row, count, t0 + t, digits);
          }
        }
    }
  }
}

static void product_rows(const Product& call, int64_t first, int64_t last) {
  if (call.bits == 2) return bits_rows<2>(call, first, last);
  if (call.bits == 4) return bits_rows<4>(call, first, last);
  bits_rows<8>(call, first, last);
}

// Floats of kLanes at a time; the compiler maps them to the instruction set's registers.
constexpr int kLanes = kWidth / 4;
typedef float Floats __attribute__((vector_size(kWidth), aligned(4), may_alias));

inline float total(Floats a) {
  float s = 0;
  for (int i = 0; i < kLanes; i++) s += a[i];
  return s;
}

// One stored key or value row as floats.
inline void widen(const Attention& call, const void* store, int64_t slot, float scale, float* out) {
  const int64_t at = slot * call.width;
  if (call.store == 2) {
    const uint16_t* from = static_cast<const uint16_t*>(store) + at;
    for (int64_t e = 0; e < call.width; e++) {
      const uint32_t bits = uint32_t{from[e]} << 16;
      std::memcpy(out + e, &bits, 4);
    }
  } else if (call.store == 1) {
    const int8_t* from = static_cast<const int8_t*>(store) + at;
    for (int64_t e = 0; e < call.width; e++) out[e] = from[e] * scale;
  } else {
    std::memcpy(out, static_cast<const float*>(store) + at, call.width * sizeof(float));
  }
}

inline float dot_floats(const float* a, const float* b, int64_t n) {
  Floats s0{}, s1{};
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    s0 += *reinterpret_cast<const Floats*>(a + i) * *reinterpret_cast<const Floats*>(b + i);
    s1 += *reinterpret_cast<const Floats*>(a + i + kLanes) *
          *reinterpret_cast<const Floats*>(b + i + kLanes);
  }
  float s = total(s0 + s1);
  for (; i < n; i++) s += a[i] * b[i];
  return s;
}

inline void add_scaled(float* out, const float* v, float weight, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    *reinterpret_cast<Floats*>(out + i) += *reinterpret_cast<const Floats*>(v + i) * weight;
  for (; i < n; i++) out[i] += weight * v[i];
}

// One row of the batch and one kv head: all its queries over the slots in use.
// memory: queries * slots scores, then two rows of floats.
static void attend_pair(const Attention& call, int64_t pair, float* memory) {
  const int64_t b = pair / call.groups, g = pair % call.groups;
  const int64_t share = call.heads / call.groups, width = call.width;
  const int64_t queries = share * call.tokens, end = call.length + call.tokens;
  const int64_t begin = std::min<int64_t>(call.start[b], end), slots = call.slots;
  const char* k = static_cast<const char*>(call.k) + pair * slots * width * call.store;
  const char* v = static_cast<const char*>(call.v) + pair * slots * width * call.store;
  const float* k_scale = call.k_scale ? call.k_scale + pair * slots : nullptr;
  const float* v_scale = call.v_scale ? call.v_scale + pair * slots : nullptr;
  float* scores = memory;
  float* row = memory + queries * slots;
  const float norm = 1.0f / std::sqrt(static_cast<float>(width));
  auto query = [&](int64_t i) {  // query i = (token, head of the share)
    return ((b * call.tokens + i / share) * call.heads + g * share + i % share) * width;
  };
  for (int64_t s = begin; s < end; s++) {
    widen(call, k, s, k_scale ? k_scale[s] : 1.0f, row);
    for (int64_t i = 0; i < queries; i++)
      scores[i * slots + s] = dot_floats(call.q + query(i), row, width) * norm;
  }
  for (int64_t i = 0; i < queries; i++) {
    const int64_t stop = std::max(begin, call.length + i / share + 1);
    float peak = -1e30f, sum = 0;
    for (int64_t s = begin; s < stop; s++) peak = std::max(peak, scores[i * slots + s]);
    for (int64_t s = begin; s < stop; s++) sum += scores[i * slots + s] = std::exp(scores[i * slots + s] - peak);
    for (int64_t s = begin; s < stop; s++) scores[i * slots + s] /= sum;
    for (int64_t s = stop; s < end; s++) scores[i * slots + s] = 0;
    std::memset(call.out + query(i), 0, width * sizeof(float));
  }
  for (int64_t s = begin; s < end; s++) {
    widen(call, v, s, v_scale ? v_scale[s] : 1.0f, row);
    for (int64_t i = 0; i < queries; i++)
      if (scores[i * slots + s] != 0) add_scaled(call.out + query(i), row, scores[i * slots + s], width);
  }
}

}  // namespace TERNAX_ISA
