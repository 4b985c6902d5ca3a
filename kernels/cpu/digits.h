// Attention over an int8 cache in integers: included once for each instruction set, see body.h.
//
// Floats that meet stored int8 values become digits of base 256 under one scale, three of
// them, as many bits as a float has. What is summed is turned so that the dot's four bytes
// run along the sum and its lanes along the result, for keys and for values alike:
//
//   scores   lanes: 32 slots    sum over the head's width    digits of the query, signed
//   values   lanes: 32 columns  sum over a block of slots    digits of the weights, unsigned
//
// One dot then does 64 products where a fused multiply-add of widened values does 16.

#if TERNAX_AVX512
constexpr int kDigits = 3, kQueries = 4, kDigitRows = kDigits * kQueries;
constexpr int64_t kPairLanes = 2 * kLanes;  // two vectors of results side by side
constexpr int64_t kPairBytes = 2 * kWidth;  // and what they take in at a step: four values a lane
constexpr int64_t kBlock = 128;             // slots of values that are turned at a time
constexpr int64_t kMostWide = 256;          // columns of a head
constexpr int64_t kKeysAhead = 8192;        // distance at which keys are asked for
// The largest whole numbers of three digits, less what rounding a product may add.
constexpr float kMostSigned = 8355700.0f, kMostUnsigned = 16777208.0f;
// Weights share one scale, so that those of slots with small scales have fewer bits. Down to this
// part of the largest they are right within 2^-15, a 128th of what storing the slot as int8 took.
constexpr float kMostUneven = 1024.0f;

// row[digit * kQueries + query]: a digit of the values summed over, four bytes a step.
struct Digits {
  alignas(64) int8_t row[kDigitRows][kMostWide];
  float scale[kQueries];
};

// `most` in digits is `peak`: returns what turns values into whole numbers, keeps what turns those back.
inline float set_scale(float peak, float most, int q, Digits& digits) {
  peak = larger(peak, 1e-30f);
  digits.scale[q] = peak / most;
  return most / peak;
}

// 64 values of query `q`, from value i on, that are whole numbers but for rounding.
template <bool kSigned>
inline void put_digits(const Floats x[4], int64_t i, int q, Digits& digits) {
  // Byte d of four neighbours into word d of their 128 bits.
  const Bytes planes = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  const Bytes half = _mm512_set1_epi32(0x808080);
  Bytes v[4];
#pragma GCC unroll 4
  for (int j = 0; j < 4; j++) {
    v[j] = _mm512_cvtps_epi32((__m512)x[j]);
    // Digits -128 .. 127: what a half below them carries, and the half taken off again.
    if (kSigned) v[j] = _mm512_xor_si512(_mm512_add_epi32(v[j], half), half);
    v[j] = _mm512_shuffle_epi8(v[j], planes);
  }
  const Bytes a = _mm512_unpacklo_epi32(v[0], v[1]), b = _mm512_unpacklo_epi32(v[2], v[3]);
  const Bytes c = _mm512_unpackhi_epi32(v[0], v[1]), d = _mm512_unpackhi_epi32(v[2], v[3]);
  const Bytes plane[kDigits] = {_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b), _mm512_unpacklo_epi64(c, d)};
  const Bytes order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
#pragma GCC unroll 3
  for (int j = 0; j < kDigits; j++)
    _mm512_store_si512(digits.row[j * kQueries + q] + i, _mm512_permutexvar_epi32(order, plane[j]));
}

// Memory asked for ahead of its use, a little with every piece of work: the lines of a block
// spread over the work on the block before.
struct Lines {
  const char* line;
  void ask() {
    __builtin_prefetch(line, 0, 3);
    line += 64;
  }
};

// acc[row][half] += dots of `steps` steps, an even number, of turned values with the digits of every row.
template <bool kSigned>
inline void all_dots(const uint8_t* turned, const Digits& digits, int64_t steps, Lines& ahead, Acc acc[kDigitRows][2]) {
  Lines lines = ahead;
  for (int64_t s = 0; s < steps; s += 2) {
#pragma GCC unroll 2
    for (int64_t step = s; step < s + 2; step++, turned += kPairBytes) {
      lines.ask();
      if (step > s) lines.ask();
      const Bytes left = load(turned), right = load(turned + kWidth);
#pragma GCC unroll 12
      for (int r = 0; r < kDigitRows; r++) {
        int32_t four;
        std::memcpy(&four, digits.row[r] + 4 * step, 4);
        const Bytes d = _mm512_set1_epi32(four);
        acc[r][0] = kSigned ? dot_bytes(acc[r][0], left, d) : dot_bytes(acc[r][0], d, left);
        acc[r][1] = kSigned ? dot_bytes(acc[r][1], right, d) : dot_bytes(acc[r][1], d, right);
      }
    }
  }
  ahead = lines;
}

// The sums of a query's three digits as one. A sum is under 2^22 or so (256 columns or slots of
// 128 * 128, 128 of 255 * 128), so that two of them still fit an int32 together.
inline Floats together(const Acc acc[kDigitRows][2], int q, int half) {
  const Acc low = _mm512_add_epi32(acc[q][half], _mm512_slli_epi32(acc[kQueries + q][half], 8));
  return to_floats(acc[2 * kQueries + q][half]) * 65536.0f + to_floats(low);
}

// `count` rows of `width` at `store`; where that is fewer than `whole`, a copy with zeros behind them.
inline const char* whole_rows(const char* store, int64_t count, int64_t whole, int64_t width, char* copy) {
  if (count >= whole) return store;
  std::memcpy(copy, store, count * width);
  std::memset(copy + count * width, 0, (whole - count) * width);
  return copy;
}

// 32 rows of keys with 128 added, turned: out[step][lane] are values 4 step .. 4 step + 3 of row `lane`.
inline void turn_keys(const char* rows, int64_t width, Lines& ahead, uint8_t* out) {
  const Bytes offset = _mm512_set1_epi8(-128);
  for (int64_t e = 0; e < width; e += kWidth)
    for (int half = 0; half < 2; half++) {
      Bytes t[4][4];  // [rows 4 g ..][j]: lane L of 128 bits holds step 4 L + j of four rows
#pragma GCC unroll 4
      for (int g = 0; g < 4; g++) {
        ahead.ask();
        Bytes r[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) r[i] = _mm512_xor_si512(load(rows + (half * kLanes + 4 * g + i) * width + e), offset);
        const Bytes a = _mm512_unpacklo_epi32(r[0], r[1]), b = _mm512_unpackhi_epi32(r[0], r[1]);
        const Bytes c = _mm512_unpacklo_epi32(r[2], r[3]), d = _mm512_unpackhi_epi32(r[2], r[3]);
        t[g][0] = _mm512_unpacklo_epi64(a, c), t[g][1] = _mm512_unpackhi_epi64(a, c);
        t[g][2] = _mm512_unpacklo_epi64(b, d), t[g][3] = _mm512_unpackhi_epi64(b, d);
      }
      uint8_t* to = out + e / 4 * kPairBytes + half * kWidth;
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) {
        const Bytes a = _mm512_shuffle_i32x4(t[0][j], t[1][j], 0x44), b = _mm512_shuffle_i32x4(t[0][j], t[1][j], 0xee);
        const Bytes c = _mm512_shuffle_i32x4(t[2][j], t[3][j], 0x44), d = _mm512_shuffle_i32x4(t[2][j], t[3][j], 0xee);
        _mm512_store_si512(to + j * kPairBytes, _mm512_shuffle_i32x4(a, c, 0x88));
        _mm512_store_si512(to + (4 + j) * kPairBytes, _mm512_shuffle_i32x4(a, c, 0xdd));
        _mm512_store_si512(to + (8 + j) * kPairBytes, _mm512_shuffle_i32x4(b, d, 0x88));
        _mm512_store_si512(to + (12 + j) * kPairBytes, _mm512_shuffle_i32x4(b, d, 0xdd));
      }
    }
}

// Rows of values, turned: out[pair of vectors][step][lane] are rows 4 step .. 4 step + 3 of one
// column; lane 4 L + i of vector j of 64 columns is column 16 L + 4 j + i, see in_order().
inline void turn_values(const char* rows, int64_t width, int64_t steps, Lines& ahead, uint8_t* out) {
  for (int64_t s = 0; s < steps; s++)
    for (int64_t e = 0; e < width; e += kWidth) {
      ahead.ask();
      Bytes r[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) r[i] = load(rows + (4 * s + i) * width + e);
      const Bytes a = _mm512_unpacklo_epi8(r[0], r[1]), b = _mm512_unpackhi_epi8(r[0], r[1]);
      const Bytes c = _mm512_unpacklo_epi8(r[2], r[3]), d = _mm512_unpackhi_epi8(r[2], r[3]);
      uint8_t* to = out + (e / kWidth * 2 * steps + s) * kPairBytes;
      _mm512_store_si512(to, _mm512_unpacklo_epi16(a, c));
      _mm512_store_si512(to + kWidth, _mm512_unpackhi_epi16(a, c));
      _mm512_store_si512(to + steps * kPairBytes, _mm512_unpacklo_epi16(b, d));
      _mm512_store_si512(to + steps * kPairBytes + kWidth, _mm512_unpackhi_epi16(b, d));
    }
}

// Columns as turn_values() left them, put back, times `by`.
inline void in_order(const Floats* turned, int64_t width, float by, float* out) {
  for (int64_t i = 0; i < width / kLanes; i++) {
    const Floats scaled = turned[i] * by;
    for (int64_t lane = 0; lane < 4; lane++)
      std::memcpy(out + i / 4 * kWidth + 16 * lane + i % 4 * 4, reinterpret_cast<const float*>(&scaled) + 4 * lane, 16);
  }
}

// Whether values of `count` slots can be blended by digits; their largest scale into `most`.
inline bool even(const float* scale, int64_t count, float& most) {
  if (count < kLanes) return false;
  Floats high{}, low = Floats{} - INFINITY;  // low: of the scales' negatives
  for (int64_t s = 0; s < count; s += kLanes) {
    const Floats by = load_floats(scale + std::min(s, count - kLanes));
    high = maximum(high, by), low = maximum(low, -by);
  }
  most = largest(high);
  return !(most > kMostUneven * -largest(low));  // so for a NaN, which the digits' scale then shows
}

// out[q * slots + s] = query q . row(s) * scale[s] for `count` rows; the largest of each query into peak.
inline void digit_scores(const float* query, int64_t width, const char* store, const float* scale, int64_t count,
                         int64_t slots, float* out, float peak[kQueries]) {
  Digits digits;
  alignas(64) uint8_t turned[kPairLanes * kMostWide];
  char copy[kPairLanes * kMostWide];
  Acc offset[kDigitRows];
  Floats peaks[kQueries];
  for (int q = 0; q < kQueries; q++, query += width) {
    Floats most{};
    for (int64_t e = 0; e < width; e += kLanes) most = maximum(most, magnitude(load_floats(query + e)));
    const float by = set_scale(largest(most), kMostSigned, q, digits);
    for (int64_t e = 0; e < width; e += kWidth) {
      Floats x[4];
      for (int j = 0; j < 4; j++) x[j] = load_floats(query + e + j * kLanes) * by;
      put_digits<true>(x, e, q, digits);
    }
    peaks[q] = Floats{} - INFINITY, peak[q] = -INFINITY;
  }
  for (int r = 0; r < kDigitRows; r++)
    offset[r] = _mm512_set1_epi32(-128 * std::accumulate(digits.row[r], digits.row[r] + width, 0));
  for (int64_t s = 0; s < count; s += kPairLanes) {
    const char* rows = store + s * width;
    Lines ahead{rows + kKeysAhead};
    turn_keys(whole_rows(rows, count - s, kPairLanes, width, copy), width, ahead, turned);
    Acc acc[kDigitRows][2];
#pragma GCC unroll 12
    for (int r = 0; r < kDigitRows; r++) acc[r][0] = acc[r][1] = offset[r];
    all_dots<true>(turned, digits, width / 4, ahead, acc);
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) {
      const int64_t at = s + half * kLanes, n = count - at;
      if (n <= 0) break;
      const Floats by = load_floats(scale + at, n);
#pragma GCC unroll 4
      for (int q = 0; q < kQueries; q++) {
        const Floats found = together(acc, q, half) * digits.scale[q] * by;
        store_floats(out + q * slots + at, found, n);
        if (n >= kLanes)
          peaks[q] = maximum(peaks[q], found);
        else
          for (int64_t i = 0; i < n; i++) peak[q] = larger(peak[q], found[i]);
      }
    }
  }
  for (int q = 0; q < kQueries; q++) peak[q] = larger(peak[q], largest(peaks[q]));
}

// Digits of e^(score - peak) * scale * by of n slots of query `q`; the powers are added to `total`.
inline void weigh(const float* score, float peak, const float* scale, float by, int64_t n, int q, Digits& digits,
                  Floats& total) {
  for (int64_t i = 0; i < n; i += kWidth) {
    Floats weight[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
      const int64_t at = i + j * kLanes, left = n - at;
      Floats power = exponential(load_floats(score + at, left) - peak);
      for (int64_t lane = std::max<int64_t>(left, 0); lane < kLanes; lane++) power[lane] = 0.0f;
      total += power;
      weight[j] = power * (load_floats(scale + at, left) * by);
    }
    put_digits<false>(weight, i, q, digits);
  }
}

// out[q] = sum over s of e^(score(q, s) - peak[q]) scale[s] row(s), over the sum of those powers;
// no scale is over `most`.
inline void digit_blend(const float* score, const float peak[kQueries], int64_t slots, const char* store,
                        const float* scale, float most, int64_t count, int64_t width, float* const out[kQueries]) {
  Digits digits;
  alignas(64) uint8_t turned[kBlock * kMostWide];
  char copy[kBlock * kMostWide];
  Floats sums[kQueries][kMostWide / kLanes] = {}, totals[kQueries] = {};
  const float by = set_scale(most, kMostUnsigned, 0, digits);  // no power is over 1
  for (int64_t s = 0; s < count; s += kBlock) {
    const int64_t n = std::min(kBlock, count - s), steps = (n + 7) / 8 * 2;
    for (int q = 0; q < kQueries; q++) weigh(score + q * slots + s, peak[q], scale + s, by, n, q, digits, totals[q]);
    const char* rows = store + s * width;
    Lines ahead{rows + kBlock * width};
    turn_values(whole_rows(rows, n, 4 * steps, width, copy), width, steps, ahead, turned);
    for (int64_t e = 0; e < width; e += kPairLanes) {
      Acc acc[kDigitRows][2];
#pragma GCC unroll 12
      for (int r = 0; r < kDigitRows; r++) acc[r][0] = acc[r][1] = acc_zero();
      all_dots<false>(turned + e * 4 * steps, digits, steps, ahead, acc);
#pragma GCC unroll 4
      for (int q = 0; q < kQueries; q++)
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) sums[q][e / kLanes + half] += together(acc, q, half) * digits.scale[0];
    }
  }
  for (int q = 0; q < kQueries; q++) {
    in_order(sums[q], width, 1.0f / sum(totals[q]), out[q]);
  }
}

// Four queries that see the same `count` slots of one head; memory: scores, 4 * slots. False where
// digits will not do, with nothing written.
inline bool digit_attend(const float* query, int64_t width, const char* k, const float* k_scale, const char* v,
                         const float* v_scale, int64_t count, int64_t slots, float* memory, float* const out[kQueries]) {
  float peak[kQueries], most;
  if (width % kWidth || width > kMostWide || !even(v_scale, count, most)) return false;
  digit_scores(query, width, k, k_scale, count, slots, memory, peak);
  digit_blend(memory, peak, slots, v, v_scale, most, count, width, out);
  return true;
}
#else
inline bool digit_attend(const float*, int64_t, const char*, const float*, const char*, const float*, int64_t, int64_t,
                         float*, float* const[4]) {
  return false;
}
#endif
