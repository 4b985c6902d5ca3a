// Primitives of one instruction set: included once for each, see body.h.

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
inline Bytes codes_in_place(Bytes v, int p) {
  return _mm512_and_si512(v, _mm512_set1_epi8(((1 << kBits) - 1) << (kBits * p)));
}
inline Acc add_scaled_down(Acc a, Acc b, int bits) { return _mm512_add_epi32(a, _mm512_srai_epi32(b, bits)); }
inline Acc dot_bytes(Acc acc, Bytes u, Bytes s) {
  // In place: GCC 12 moves the intrinsic's accumulators between registers and the stack, which
  // costs a product of 128 rows 6 to 9 % of its rate (results/README.md).
  asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(u), "v"(s));
  return acc;
}
template <int kBits>
inline Acc dot(Acc acc, Bytes u, const int8_t* x) { return dot_bytes(acc, u, _mm512_load_si512(x)); }
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
#if TERNAX_AVXVNNI
template <int kBits>
inline Bytes codes_in_place(Bytes v, int p) {
  return _mm256_and_si256(v, _mm256_set1_epi8(((1 << kBits) - 1) << (kBits * p)));
}
inline Acc add_scaled_down(Acc a, Acc b, int bits) { return _mm256_add_epi32(a, _mm256_srai_epi32(b, bits)); }
#endif
template <int kBits>
inline Acc dot(Acc acc, Bytes u, const int8_t* x) {
  const __m256i v = _mm256_load_si256(reinterpret_cast<const __m256i*>(x));
#if TERNAX_AVXVNNI
  asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(acc) : "x"(u), "x"(v));  // in place, as above
  return acc;
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
  // There is no unsigned x signed dot before i8mm: int8 codes lose their offset here, and
  // kInt8Offset says that it is gone.
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

#if TERNAX_AVX512 || TERNAX_AVXVNNI
// A dot of all eight bits leaves the codes where they are, one accumulator a bit position,
// and shifts only the sums: for one row of activations that is the shorter way.
constexpr bool kInPlace = true;
#else
constexpr bool kInPlace = false;
template <int kBits>
inline Bytes codes_in_place(Bytes v, int) { return v; }
inline Acc add_scaled_down(Acc a, Acc, int) { return a; }
#endif

// Whether the dots of a few rows of activations leave so much time that rows of W, read from
// memory one behind the other, come faster than four side by side, which share the loads of
// activations (results/README.md).
#if TERNAX_AVX512
constexpr bool kOneByOne = true;
#else
constexpr bool kOneByOne = false;
#endif

#if TERNAX_NEON
constexpr int kInt8Offset = 0;
#else
constexpr int kInt8Offset = 128;
#endif

// Floats, kLanes at a time; the compiler maps them to the instruction set's registers.
constexpr int kLanes = kWidth / 4;
typedef float Floats __attribute__((vector_size(kWidth)));
typedef int32_t Ints __attribute__((vector_size(kWidth)));
// The same anywhere in memory. For values it will not do: copies of one on the stack are
// then taken for aligned in one place and not in another.
typedef float FloatsAt __attribute__((vector_size(kWidth), aligned(4), may_alias));

inline Floats load_floats(const float* p) { return *reinterpret_cast<const FloatsAt*>(p); }
// The first n of kLanes, zeros behind.
inline Floats load_floats(const float* p, int64_t n) {
  if (n >= kLanes) return load_floats(p);
  Floats v{};
  if (n > 0) std::memcpy(&v, p, n * sizeof(float));
  return v;
}
inline void store_floats(float* p, Floats v, int64_t n = kLanes) {
  if (n >= kLanes)
    *reinterpret_cast<FloatsAt*>(p) = v;
  else
    std::memcpy(p, &v, n * sizeof(float));
}
inline float sum(Floats v) {
  float s = 0;
  for (int i = 0; i < kLanes; i++) s += v[i];
  return s;
}
// Maxima that keep a NaN, from either side: a model gone wrong must show it.
inline float larger(float a, float b) { return a > b || a != a ? a : b; }
inline float largest(Floats v) {
  float m = v[0];
  for (int i = 1; i < kLanes; i++) m = larger(m, v[i]);
  return m;
}
inline Floats maximum(Floats a, Floats b) { return (a > b) | (a != a) ? a : b; }
inline Floats magnitude(Floats a) { return (Floats)((Ints)a & 0x7fffffff); }

// Adding it leaves a float's integer part, rounded half to even, in the low bits.
constexpr float kRound = 12582912.0f;  // 1.5 * 2^23
constexpr int32_t kRoundBits = 0x4b400000;

// e^x within 2 units of the last place; x is held between -87 and 88.
inline Floats exponential(Floats x) {
  const Floats low = Floats{} - 87.0f, high = Floats{} + 88.0f;
  x = maximum(x, low);
  x = x > high ? high : x;
  const Floats t = x * 1.44269504f + kRound, n = t - kRound;
  const Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  return p * (Floats)(((Ints)t - kRoundBits + 127) << 23);
}

#if TERNAX_AVX512
constexpr bool kWideSums = true;  // an Acc has kLanes sums, which can become floats side by side
inline Floats to_floats(Acc a) { return (Floats)_mm512_cvtepi32_ps(a); }
inline Acc acc_of(int32_t first) { return _mm512_zextsi128_si512(_mm_cvtsi32_si128(first)); }
#elif TERNAX_AVX2
constexpr bool kWideSums = true;
inline Floats to_floats(Acc a) { return (Floats)_mm256_cvtepi32_ps(a); }
inline Acc acc_of(int32_t first) { return _mm256_zextsi128_si256(_mm_cvtsi32_si128(first)); }
#else
constexpr bool kWideSums = false;
inline Floats to_floats(Acc) { return Floats{}; }
inline Acc acc_of(int32_t) { return acc_zero(); }
#endif

// kLanes stored values as floats. kStore: bytes of one, 1 int8, 2 the bits of bf16, 4 f32.
template <int kStore>
inline Floats widen(const void* p) {
  if (kStore == 4) return load_floats(static_cast<const float*>(p));
#if TERNAX_AVX512
  if (kStore == 2)
    return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(p))), 16);
  return (Floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p))));
#elif TERNAX_AVX2
  if (kStore == 2)
    return (Floats)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p))), 16);
  return (Floats)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(p))));
#else
  Ints v{};
  for (int i = 0; i < kLanes; i++)
    v[i] = kStore == 2 ? int32_t(uint32_t{static_cast<const uint16_t*>(p)[i]} << 16)
                       : static_cast<const int8_t*>(p)[i];
  if (kStore == 2) return (Floats)v;
  Floats f;
  for (int i = 0; i < kLanes; i++) f[i] = static_cast<float>(v[i]);
  return f;
#endif
}

// The low bytes of kLanes integers.
inline void store_bytes(int8_t* p, Ints v, int64_t n) {
#if TERNAX_AVX512
  if (n >= kLanes) return _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8((__m512i)v));
#endif
  for (int i = 0; i < std::min<int64_t>(n, kLanes); i++) p[i] = static_cast<int8_t>(v[i]);
}

// The sums of four vectors.
typedef float Four __attribute__((vector_size(16)));
typedef float FourAt __attribute__((vector_size(16), aligned(4), may_alias));

inline Four sum4(const Floats a[4]) {
#if TERNAX_AVX512
  const __m512 x = (__m512)a[0], y = (__m512)a[1], z = (__m512)a[2], u = (__m512)a[3];
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(x, y), _mm512_unpackhi_ps(x, y));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(z, u), _mm512_unpackhi_ps(z, u));
  const __m512 s = _mm512_add_ps(
      _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd))),
      _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd))));
  const __m256 t = _mm256_add_ps(_mm512_castps512_ps256(s), _mm512_extractf32x8_ps(s, 1));
  return (Four)_mm_add_ps(_mm256_castps256_ps128(t), _mm256_extractf128_ps(t, 1));
#elif TERNAX_AVX2
  const __m256 s = _mm256_hadd_ps(_mm256_hadd_ps((__m256)a[0], (__m256)a[1]),
                                  _mm256_hadd_ps((__m256)a[2], (__m256)a[3]));
  return (Four)_mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
#else
  Four out;
  for (int i = 0; i < 4; i++) out[i] = sum(a[i]);
  return out;
#endif
}
