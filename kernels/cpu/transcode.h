// The passes over a matrix: included once for each instruction set, see transcode.cc.

#include "transcode_isa.h"

// Past the caches a store that does not read its line first saves a third of the traffic.
template <bool kStream>
inline void store16(uint8_t* p, Line v, int i);
#if TERNAX_AVX512 || TERNAX_AVX2
template <>
inline void store16<true>(uint8_t* p, Line v, int i) {
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), lane(v, i));
}
template <>
inline void store16<false>(uint8_t* p, Line v, int i) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), lane(v, i));
}
inline void drain() { _mm_sfence(); }
inline Line gather(const uint8_t* const rows[4], int64_t at) {
  auto piece = [at](const uint8_t* row) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(row + at));
  };
  return from_lanes(piece(rows[0]), piece(rows[1]), piece(rows[2]), piece(rows[3]));
}
#else
template <bool kStream>
inline void store16(uint8_t* p, Line v, int i) { std::memcpy(p, v.w + 4 * i, 16); }
inline void drain() {}
inline Line gather(const uint8_t* const rows[4], int64_t at) {
  Line v;
  for (int i = 0; i < 4; i++) std::memcpy(v.w + 4 * i, rows[i] + at, 16);
  return v;
}
#endif

template <bool kStream>
inline void store(uint8_t* p, Line v) {
  if (!kStream) return store_plain(p, v);
  store16<kStream>(p, v, 0);
  store16<kStream>(p + 16, v, 1);
  store16<kStream>(p + 32, v, 2);
  store16<kStream>(p + 48, v, 3);
}

inline void scatter(uint8_t stage[4][16 * kCheck], int64_t at, Line v) {
  store16<false>(stage[0] + at, v, 0);
  store16<false>(stage[1] + at, v, 1);
  store16<false>(stage[2] + at, v, 2);
  store16<false>(stage[3] + at, v, 3);
}

// A run of bytes, a multiple of 16, on to the output.
template <bool kStream>
inline void put(uint8_t* p, const uint8_t* run, int64_t count) {
  if (!kStream) {
    std::memcpy(p, run, count);
    return;
  }
  int64_t i = 0;
  for (; i + 64 <= count; i += 64) store<true>(p + i, load(run + i));
  for (; i < count; i += 16) std::memcpy(p + i, run + i, 16);
}

// How lines of two-bit codes turn into canonical ones (kBack: the other way).
template <bool kBack>
inline Line turned(Line v, const uint32_t* order) {
  return kBack ? tiles(ordered(v, order)) : ordered(tiles(v), order);
}

// Codes of the same bytes in both layouts, units of 64: i2_s.
template <bool kStream, bool kBack>
int64_t plain_lines(const Job& job, const uint32_t* order, int64_t first, int64_t last) {
  const int64_t bytes = job.k * job.n / 4;
  int64_t bad = 0;
  for (int64_t begin = first; begin < last; begin += kCheck) {
    const int64_t end = std::min(last, begin + kCheck), whole = std::min(end, bytes / 64);
    Line seen = nothing();
    for (int64_t i = begin; i < whole; i++) {
      const Line v = load(job.in + 64 * i);
      seen = threes(seen, v);
      store<kStream>(job.out + 64 * i, turned<kBack>(v, order));
    }
    if (any(seen)) bad += count_threes(job.in + 64 * begin, 64 * (whole - begin));
    if (whole < end) {
      uint8_t rest[64];
      const int64_t count = bytes - 64 * whole;
      std::memset(rest, kZeroes, 64);
      std::memcpy(rest, job.in + 64 * whole, count);
      bad += count_threes(rest, 64);
      store_plain(rest, turned<kBack>(load(rest), order));
      std::memcpy(job.out + 64 * whole, rest, count);
    }
  }
  return bad;
}

// Blocks of 64 bytes and a scale, units of one block: tq2_0.
template <bool kStream, bool kBack>
int64_t tq2_blocks(const Job& job, const uint32_t* order, int64_t first, int64_t last) {
  int64_t bad = 0;
  for (int64_t begin = first; begin < last; begin += kCheck) {
    const int64_t end = std::min(last, begin + kCheck);
    Line seen = nothing();
    for (int64_t i = begin; i < end; i++) {
      const Line v = load(job.in + (kBack ? 64 : 66) * i);
      seen = threes(seen, v);
      if (kBack) {
        store_plain(job.out + 66 * i, turned<true>(v, order));
        std::memcpy(job.out + 66 * i + 64, job.scale + 2 * i, 2);
      } else {
        store<kStream>(job.out + 64 * i, turned<false>(v, order));
        std::memcpy(job.scale + 2 * i, job.in + 66 * i + 64, 2);
      }
    }
    if (any(seen))
      for (int64_t i = begin; i < end; i++) bad += count_threes(job.in + (kBack ? 64 : 66) * i, 64);
  }
  return bad;
}

// Blocks of 52 bytes in base 3 and a scale: tq1_0. No byte decodes to an invalid code.
template <bool kStream>
int64_t tq1_decode(const Job& job, int64_t first, int64_t last) {
  for (int64_t i = first; i < last; i++) {
    const uint8_t* block = job.in + 54 * i;
    Line x, y;
    digits(load_tq1(block), x, y);
    store<kStream>(job.out + 64 * i, joined(tiles(x), tiles(y), x));
    std::memcpy(job.scale + 2 * i, block + kTq1Codes, 2);
  }
  return 0;
}

inline int64_t tq1_encode(const Job& job, int64_t first, int64_t last) {
  int64_t bad = 0;
  for (int64_t begin = first; begin < last; begin += kCheck) {
    const int64_t end = std::min(last, begin + kCheck);
    Line seen = nothing();
    for (int64_t i = begin; i < end; i++) {
      const Line v = load(job.in + 64 * i);
      seen = threes(seen, v);
      Line x, y;
      parted(v, x, y);
      store_tq1(job.out + 54 * i, numbers(x, y));
      std::memcpy(job.out + 54 * i + kTq1Codes, job.scale + 2 * i, 2);
    }
    if (any(seen)) bad += count_threes(job.in + 64 * begin, 64 * (end - begin));
  }
  return bad;
}

// The row of codes in field q of row r of bytes: hf's are a quarter of N apart, those of i2_s_rows
// neighbours, the first in the highest bits.
inline int64_t row_of(const Job& job, int64_t r, int q) {
  return job.layout == kHf ? q * (job.n / 4) + r : 4 * r + 3 - q;
}

// Units of one row of bytes, which holds four rows of codes: hf, i2_s_rows.
// The four words of a tile go to (come from) the four rows; 64 bytes are 16 of each. Each row
// gets a kilobyte at a time, by way of L1: stores past the caches that go back and forth among
// the rows reached half the rate.
template <bool kStream>
int64_t rows_split(const Job& job, int64_t first, int64_t last) {
  const int64_t row_bytes = (job.k + 15) / 16 * 4, lines = job.k / 64;
  alignas(64) uint8_t stage[4][16 * kCheck];
  int64_t bad = 0;
  for (int64_t r = first; r < last; r++) {
    const uint8_t* in = job.in + r * job.k;
    uint8_t* rows[4];
    for (int q = 0; q < 4; q++) rows[q] = job.out + row_of(job, r, q) * row_bytes;
    for (int64_t begin = 0; begin < lines; begin += kCheck) {
      const int64_t count = std::min(lines - begin, kCheck);
      Line seen = nothing();
      for (int64_t i = 0; i < count; i++) {
        const Line v = load(in + 64 * (begin + i));
        seen = threes(seen, v);
        scatter(stage, 16 * i, across(tiles(v)));
      }
      if (any(seen)) bad += count_threes(in + 64 * begin, 64 * count);
      for (int q = 0; q < 4; q++) put<kStream>(rows[q] + 16 * begin, stage[q], 16 * count);
    }
    if (64 * lines < job.k) {
      uint8_t rest[64];
      std::memset(rest, kZeroes, 64);
      std::memcpy(rest, in + 64 * lines, job.k - 64 * lines);
      bad += count_threes(rest, 64);
      store_plain(rest, across(tiles(load(rest))));
      for (int q = 0; q < 4; q++)
        std::memcpy(rows[q] + 16 * lines, rest + 16 * q, row_bytes - 16 * lines);
    }
  }
  return bad;
}

template <bool kStream>
int64_t rows_merge(const Job& job, int64_t first, int64_t last) {
  const int64_t row_bytes = (job.k + 15) / 16 * 4, lines = job.k / 64;
  int64_t bad = 0;
  for (int64_t r = first; r < last; r++) {
    uint8_t* out = job.out + r * job.k;
    const uint8_t* rows[4];
    for (int q = 0; q < 4; q++) rows[q] = job.in + row_of(job, r, q) * row_bytes;
    Line seen = nothing();
    for (int64_t i = 0; i < lines; i++) {
      const Line v = gather(rows, 16 * i);
      seen = threes(seen, v);
      store<kStream>(out + 64 * i, tiles(across(v)));
    }
    if (any(seen))
      for (const uint8_t* row : rows) bad += count_threes(row, 16 * lines);
    if (64 * lines < job.k) {
      uint8_t rest[64];
      std::memset(rest, kZeroes, 64);
      for (int q = 0; q < 4; q++)
        std::memcpy(rest + 16 * q, rows[q] + 16 * lines, row_bytes - 16 * lines);
      bad += count_threes(rest, 64);
      store_plain(rest, tiles(across(load(rest))));
      std::memcpy(out + 64 * lines, rest, job.k - 64 * lines);
    }
  }
  return bad;
}

template <bool kStream>
int64_t choose(const Job& job, int64_t first, int64_t last) {
  switch (job.layout) {
    case kHf:
    case kI2sRows:
      return job.back ? rows_merge<kStream>(job, first, last)
                      : rows_split<kStream>(job, first, last);
    case kTq10: return job.back ? tq1_encode(job, first, last) : tq1_decode<kStream>(job, first, last);
    case kTq20:
      return job.back ? tq2_blocks<kStream, true>(job, kTq2Back, first, last)
                      : tq2_blocks<kStream, false>(job, kTq2Order, first, last);
    default: {
      const bool x86 = job.layout == kI2sX86;
      return job.back
                 ? plain_lines<kStream, true>(job, x86 ? kX86Back : kArmOrder, first, last)
                 : plain_lines<kStream, false>(job, x86 ? kX86Order : kArmOrder, first, last);
    }
  }
}

inline int64_t pass(const Job& job, int64_t first, int64_t last) {
  if (!job.stream) return choose<false>(job, first, last);
  const int64_t bad = choose<true>(job, first, last);
  drain();
  return bad;
}
