// Vectors of one instruction set for transcoding: included once for each, see transcode.h.
//
// All 2-bit layouts here are made of tiles: 4 words of 4 bytes, one code at each of the 4
// bit positions ("fields") of a byte. With words p and fields l, canonical bytes are
//
//   word l, field p, byte b = the code at k = 16 l + 4 p + b
//
// where the foreign layouts have word p, field l: a tile is its 4x4 transpose, done on
// whole vectors in two butterflies. What then remains is an order of words.
//
// A Line is 64 bytes: 4 tiles, 16 words.

#if TERNAX_AVX512
using Line = __m512i;
inline Line load(const uint8_t* p) { return _mm512_loadu_si512(p); }
inline Line words(const uint32_t* table) { return _mm512_loadu_si512(table); }
inline __m128i lane(Line v, int i) {
  switch (i) {
    case 0: return _mm512_castsi512_si128(v);
    case 1: return _mm512_extracti32x4_epi32(v, 1);
    case 2: return _mm512_extracti32x4_epi32(v, 2);
    default: return _mm512_extracti32x4_epi32(v, 3);
  }
}
inline Line from_lanes(__m128i a, __m128i b, __m128i c, __m128i d) {
  const __m512i low = _mm512_inserti32x4(_mm512_castsi128_si512(a), b, 1);
  return _mm512_inserti32x4(_mm512_inserti32x4(low, c, 2), d, 3);
}
inline void store_plain(uint8_t* p, Line v) { _mm512_storeu_si512(p, v); }
inline Line threes(Line seen, Line v) {
  return _mm512_ternarylogic_epi32(seen, v, _mm512_srli_epi32(v, 1), 0xf8);  // seen | v & v>>1
}
inline Line nothing() { return _mm512_setzero_si512(); }
inline bool any(Line seen) { return _mm512_test_epi8_mask(seen, _mm512_set1_epi8(0x55)) != 0; }
inline Line tiles(Line v) {
  const __m512i near_turn = _mm512_set1_epi64((30ll << 32) | 2), far_turn = _mm512_set4_epi32(28, 28, 4, 4);
  const __m512i near_keep = _mm512_set1_epi64(static_cast<int64_t>(0xcccccccc33333333ull));
  const __m512i far_keep = _mm512_set4_epi32(-0x0f0f0f10, -0x0f0f0f10, 0x0f0f0f0f, 0x0f0f0f0f);
  __m512i other = _mm512_rolv_epi32(_mm512_shuffle_epi32(v, _MM_PERM_CDAB), near_turn);
  v = _mm512_ternarylogic_epi32(near_keep, v, other, 0xca);  // keep ? v : other
  other = _mm512_rolv_epi32(_mm512_shuffle_epi32(v, _MM_PERM_BADC), far_turn);
  return _mm512_ternarylogic_epi32(far_keep, v, other, 0xca);
}
inline Line ordered(Line v, const uint32_t* table) { return _mm512_permutexvar_epi32(words(table), v); }
inline Line across(Line v) { return ordered(v, kAcross); }

inline Line load_tq1(const uint8_t* p) { return _mm512_maskz_loadu_epi8((1ull << kTq1Codes) - 1, p); }
inline void store_tq1(uint8_t* p, Line v) { _mm512_mask_storeu_epi8(p, (1ull << kTq1Codes) - 1, v); }
inline void digits(Line bytes, Line& x, Line& y) {
  __m512i s = _mm512_xor_si512(bytes, _mm512_set1_epi8(-128));
  const __m512i one = _mm512_set1_epi8(kOneThird), two = _mm512_set1_epi8(kTwoThirds);
  x = nothing();
  for (int n = 0; n < 5; n++) {
    const __m512i unit = _mm512_set1_epi8(static_cast<char>(1 << (2 * n & 7)));
    __m512i& sum = n < 4 ? x : y;
    if (n == 4) y = nothing();
    sum = _mm512_mask_add_epi8(sum, _mm512_cmpgt_epi8_mask(s, one), sum, unit);
    sum = _mm512_mask_add_epi8(sum, _mm512_cmpgt_epi8_mask(s, two), sum, unit);
    s = _mm512_add_epi8(s, _mm512_add_epi8(s, s));
  }
}
inline __m512i rest_of_ceil(__m512i v) {
  v = _mm512_mullo_epi16(v, _mm512_set1_epi16(kCeilFactor));
  return _mm512_srli_epi16(_mm512_add_epi16(v, _mm512_set1_epi16(kCeilRound)), kCeilShift);
}
inline Line numbers(Line x, Line y) {
  const __m512i three = _mm512_set1_epi8(3), low = _mm512_set1_epi16(255);
  __m512i v = _mm512_and_si512(x, three);
  for (int n = 1; n < 5; n++) {
    const __m512i digit = n == 4 ? y : _mm512_and_si512(_mm512_srli_epi16(x, 2 * n), three);
    v = _mm512_add_epi8(_mm512_add_epi8(v, _mm512_add_epi8(v, v)), digit);
  }
  const __m512i even = rest_of_ceil(_mm512_and_si512(v, low));
  const __m512i odd = rest_of_ceil(_mm512_srli_epi16(v, 8));
  const __m512i step = _mm512_min_epu8(v, _mm512_set1_epi8(1));
  return _mm512_add_epi8(_mm512_add_epi8(v, step), _mm512_or_si512(even, _mm512_slli_epi16(odd, 8)));
}
inline Line joined(Line t, Line y, Line x) {
  const __m512i rest = _mm512_mask_mov_epi32(y, 1 << 12, x);
  return _mm512_permutex2var_epi32(t, words(kTq1Joined), rest);
}
inline void parted(Line c, Line& x, Line& y) {
  x = tiles(ordered(c, kTq1Tiles));
  x = _mm512_mask_permutexvar_epi32(x, 1 << 12, _mm512_set1_epi32(15), c);
  y = tiles(_mm512_maskz_permutexvar_epi32(0x111, words(kTq1Last), c));
}

#elif TERNAX_AVX2
struct Line { __m256i a, b; };
inline __m256i load32(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline Line load(const uint8_t* p) { return {load32(p), load32(p + 32)}; }
inline __m128i lane(Line v, int i) {
  const __m256i half = i < 2 ? v.a : v.b;
  return i & 1 ? _mm256_extracti128_si256(half, 1) : _mm256_castsi256_si128(half);
}
inline Line from_lanes(__m128i a, __m128i b, __m128i c, __m128i d) {
  return {_mm256_set_m128i(b, a), _mm256_set_m128i(d, c)};
}
inline void store_plain(uint8_t* p, Line v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v.a);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 32), v.b);
}
inline __m256i threes(__m256i seen, __m256i v) {
  return _mm256_or_si256(seen, _mm256_and_si256(v, _mm256_srli_epi32(v, 1)));
}
inline Line threes(Line seen, Line v) { return {threes(seen.a, v.a), threes(seen.b, v.b)}; }
inline Line nothing() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
inline bool any(Line seen) {
  return !_mm256_testz_si256(_mm256_or_si256(seen.a, seen.b), _mm256_set1_epi8(0x55));
}
inline __m256i select(__m256i keep, __m256i v, __m256i other) {
  return _mm256_xor_si256(other, _mm256_and_si256(_mm256_xor_si256(other, v), keep));
}
inline __m256i tiles(__m256i v) {
  const __m256i near_keep = _mm256_set1_epi64x(static_cast<int64_t>(0xcccccccc33333333ull));
  const __m256i far_keep = _mm256_set_epi64x(-0x0f0f0f0f0f0f0f10ll, 0x0f0f0f0f0f0f0f0fll,
                                             -0x0f0f0f0f0f0f0f10ll, 0x0f0f0f0f0f0f0f0fll);
  __m256i other = _mm256_shuffle_epi32(v, 0xb1);
  other = _mm256_blend_epi32(_mm256_slli_epi32(other, 2), _mm256_srli_epi32(other, 2), 0xaa);
  v = select(near_keep, v, other);
  other = _mm256_shuffle_epi32(v, 0x4e);
  other = _mm256_blend_epi32(_mm256_slli_epi32(other, 4), _mm256_srli_epi32(other, 4), 0xcc);
  return select(far_keep, v, other);
}
inline Line tiles(Line v) { return {tiles(v.a), tiles(v.b)}; }
inline __m256i ordered(__m256i v, const uint32_t* table) {
  return _mm256_permutevar8x32_epi32(v, load32(table));
}
// The second half of a table says of the second half of a Line what the first says of the first.
inline Line ordered(Line v, const uint32_t* table) { return {ordered(v.a, table), ordered(v.b, table)}; }
inline Line across(Line v) {
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  return {_mm256_permutevar8x32_epi32(_mm256_unpacklo_epi32(v.a, v.b), order),
          _mm256_permutevar8x32_epi32(_mm256_unpackhi_epi32(v.a, v.b), order)};
}

inline Line load_tq1(const uint8_t* p) {
  int32_t last;
  std::memcpy(&last, p + 48, 4);
  const __m128i third = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 32));
  return {load32(p), _mm256_set_m128i(_mm_cvtsi32_si128(last), third)};
}
inline void store_tq1(uint8_t* p, Line v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v.a);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 32), lane(v, 2));
  const int32_t last = _mm_cvtsi128_si32(lane(v, 3));
  std::memcpy(p + 48, &last, 4);
}
inline void digits(__m256i bytes, __m256i& x, __m256i& y) {
  __m256i s = _mm256_xor_si256(bytes, _mm256_set1_epi8(-128));
  const __m256i one = _mm256_set1_epi8(kOneThird), two = _mm256_set1_epi8(kTwoThirds);
  x = _mm256_setzero_si256();
  for (int n = 0; n < 5; n++) {
    const __m256i minus = _mm256_add_epi8(_mm256_cmpgt_epi8(s, one), _mm256_cmpgt_epi8(s, two));
    y = _mm256_sub_epi8(_mm256_setzero_si256(), minus);
    if (n < 4) x = _mm256_or_si256(x, _mm256_slli_epi16(y, 2 * n));
    s = _mm256_add_epi8(s, _mm256_add_epi8(s, s));
  }
}
inline void digits(Line bytes, Line& x, Line& y) {
  digits(bytes.a, x.a, y.a);
  digits(bytes.b, x.b, y.b);
}
inline __m256i rest_of_ceil(__m256i v) {
  v = _mm256_mullo_epi16(v, _mm256_set1_epi16(kCeilFactor));
  return _mm256_srli_epi16(_mm256_add_epi16(v, _mm256_set1_epi16(kCeilRound)), kCeilShift);
}
inline __m256i numbers(__m256i x, __m256i y) {
  const __m256i three = _mm256_set1_epi8(3), low = _mm256_set1_epi16(255);
  __m256i v = _mm256_and_si256(x, three);
  for (int n = 1; n < 5; n++) {
    const __m256i digit = n == 4 ? y : _mm256_and_si256(_mm256_srli_epi16(x, 2 * n), three);
    v = _mm256_add_epi8(_mm256_add_epi8(v, _mm256_add_epi8(v, v)), digit);
  }
  const __m256i even = rest_of_ceil(_mm256_and_si256(v, low));
  const __m256i odd = rest_of_ceil(_mm256_srli_epi16(v, 8));
  const __m256i step = _mm256_min_epu8(v, _mm256_set1_epi8(1));
  return _mm256_add_epi8(_mm256_add_epi8(v, step), _mm256_or_si256(even, _mm256_slli_epi16(odd, 8)));
}
inline Line numbers(Line x, Line y) { return {numbers(x.a, y.a), numbers(x.b, y.b)}; }
inline Line joined(Line t, Line y, Line x) {
  const __m256i middle = _mm256_permutevar8x32_epi32(t.b, _mm256_setr_epi32(0, 0, 0, 1, 2, 3, 0, 0));
  const __m256i first = _mm256_permutevar8x32_epi32(y.a, _mm256_setr_epi32(0, 4, 0, 0, 0, 0, 0, 0));
  const __m256i last = _mm256_permutevar8x32_epi32(_mm256_blend_epi32(y.b, x.b, 0x10),
                                                   _mm256_setr_epi32(0, 0, 0, 0, 0, 0, 0, 4));
  return {ordered(t.a, kTq1Joined),
          _mm256_blend_epi32(_mm256_blend_epi32(middle, first, 0x03), last, 0xc0)};
}
inline void parted(Line c, Line& x, Line& y) {
  const __m256i none = _mm256_setzero_si256();
  const __m256i third = _mm256_permutevar8x32_epi32(c.b, _mm256_setr_epi32(2, 3, 4, 5, 0, 0, 0, 0));
  const __m256i qh = _mm256_shuffle_epi32(c.b, 0xff);  // word 15 in the whole upper lane
  const __m256i first = _mm256_permutevar8x32_epi32(c.b, _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1));
  const __m256i last = _mm256_permutevar8x32_epi32(c.b, _mm256_set1_epi32(6));
  x = {tiles(ordered(c.a, kTq1Tiles)), _mm256_blend_epi32(tiles(third), qh, 0xf0)};
  y = {tiles(_mm256_blend_epi32(none, first, 0x11)), tiles(_mm256_blend_epi32(none, last, 0x01))};
}

#else
struct Line { uint32_t w[16]; };
struct Bytes { uint8_t b[64]; };
inline Bytes as_bytes(const Line& v) {
  Bytes bytes;
  std::memcpy(&bytes, &v, 64);
  return bytes;
}
inline Line load(const void* p) {
  Line v;
  std::memcpy(&v, p, 64);
  return v;
}
inline void store_plain(uint8_t* p, const Line& v) { std::memcpy(p, &v, 64); }
inline Line threes(Line seen, const Line& v) {
  for (int i = 0; i < 16; i++) seen.w[i] |= v.w[i] & v.w[i] >> 1;
  return seen;
}
inline Line nothing() { return Line{}; }
inline bool any(const Line& seen) {
  uint32_t all = 0;
  for (uint32_t w : seen.w) all |= w;
  return (all & 0x55555555u) != 0;
}
inline void swap_fields(uint32_t& a, uint32_t& b, int shift, uint32_t mask) {
  const uint32_t t = ((a >> shift) ^ b) & mask;
  b ^= t;
  a ^= t << shift;
}
inline Line tiles(Line v) {
  for (int i = 0; i < 16; i += 4) {
    uint32_t* w = v.w + i;
    swap_fields(w[0], w[1], 2, 0x33333333u);
    swap_fields(w[2], w[3], 2, 0x33333333u);
    swap_fields(w[0], w[2], 4, 0x0f0f0f0fu);
    swap_fields(w[1], w[3], 4, 0x0f0f0f0fu);
  }
  return v;
}
inline Line ordered(const Line& v, const uint32_t* table) {
  Line out;
  for (int i = 0; i < 16; i++) out.w[i] = v.w[table[i]];
  return out;
}
inline Line across(const Line& v) { return ordered(v, kAcross); }

inline Line load_tq1(const uint8_t* p) {
  Line v{};
  std::memcpy(&v, p, kTq1Codes);
  return v;
}
inline void store_tq1(uint8_t* p, const Line& v) { std::memcpy(p, &v, kTq1Codes); }
inline void digits(const Line& bytes, Line& x, Line& y) {
  Bytes q = as_bytes(bytes), sum{}, last{};
  for (int n = 0; n < 5; n++)
    for (int i = 0; i < 64; i++) {
      const uint8_t digit = (q.b[i] > 85) + (q.b[i] > 170);  // q * 3 >> 8
      if (n < 4) sum.b[i] = static_cast<uint8_t>(sum.b[i] | digit << (2 * n));
      else last.b[i] = digit;
      q.b[i] = static_cast<uint8_t>(3 * q.b[i]);
    }
  x = load(&sum);
  y = load(&last);
}
inline Line numbers(const Line& x, const Line& y) {
  const Bytes fields = as_bytes(x), last = as_bytes(y);
  Bytes out;
  for (int i = 0; i < 64; i++) {
    const uint8_t f = fields.b[i];
    const uint32_t v = 81u * (f & 3) + 27u * (f >> 2 & 3) + 9u * (f >> 4 & 3) + 3u * (f >> 6) + last.b[i];
    out.b[i] = static_cast<uint8_t>((v * 256 + 242) / 243);
  }
  return load(&out);
}
inline Line joined(const Line& t, const Line& y, const Line& x) {
  Line out;
  for (int i = 0; i < 16; i++) {
    const uint32_t from = kTq1Joined[i];
    out.w[i] = from == 28 ? x.w[12] : from >= 16 ? y.w[from - 16] : t.w[from];
  }
  return out;
}
inline void parted(const Line& c, Line& x, Line& y) {
  x = tiles(ordered(c, kTq1Tiles));
  x.w[12] = c.w[15];
  y = nothing();
  for (int i = 0; i < 12; i += 4) y.w[i] = c.w[kTq1Last[i]];
  y = tiles(y);
}
#endif
