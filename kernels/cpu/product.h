// The packed product: included once for each instruction set, see body.h.

// Weights are asked for ahead of their use, a whole number of tiles and at least this many
// bytes, in the order in which they lie in memory: asked for row by row, as they are used, the
// memory gave a Zen 5 0.81 of its read rate instead of 0.96 (results/README.md).
constexpr int64_t kPrefetch = 4096;
// The same where several rows of activations share the weights: 12 to 16 KiB took a tenth off
// the time of 8192x28672 and nothing off 2560x6912.
constexpr int64_t kPrefetchShared = 12288;

// Into the first-level cache where it is large. Into that of a Zen 4, 32 KiB, the few misses
// it may have in flight become the limit: 11 GB/s a thread instead of 26.
static const bool kIntoFirstLevel = first_level_bytes() >= 48 << 10;

inline void ask_for(const uint8_t* line, bool into_first_level) {
  if (into_first_level)
    __builtin_prefetch(line, 0, 3);
  else
    __builtin_prefetch(line, 0, 2);
}

// What a tile asks for: at `byte` of its rows, line r of these.
struct Ahead {
  const uint8_t* from;
  int64_t along, across;
  bool into_first_level;
  void ask(int64_t byte, int r) const { ask_for(from + byte * along + r * across, into_first_level); }
};

// Rows of W whose sums are kept together before they become floats.
constexpr int kRows = 16;
// Output rows whose activations stay in the first-level cache while rows of W, a quarter of
// their bytes, go by from the second.
constexpr int64_t kTokens = 4;

alignas(64) constexpr uint8_t kOnes[64] = {
    1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1,
    1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};

// Puts one row of activations in plane order, group by group, padded with zeros to whole
// vectors: step s, plane p of a group holds the activations of bytes s * kWidth .. of it.
template <int kBits>
inline void prepare(const Product& call, const int8_t* x, int64_t k_size, int64_t row, int8_t* out, int32_t* sums) {
  constexpr int kPlanes = 8 / kBits, kRun = 16 / kPlanes;  // codes side by side in a block
  const int64_t group_bytes = call.row_bytes / call.groups;
  const int64_t group_k = group_bytes * kPlanes, steps = (group_bytes + kWidth - 1) / kWidth;
  for (int64_t g = 0; g < call.groups; g++, out += steps * kWidth * kPlanes) {
    const int64_t k = std::min(group_k, k_size - g * group_k);  // shorter in the last group alone
    const int8_t* from = x + g * group_k;
    int64_t at = 0, step = 0;
    for (; at + kWidth * kPlanes <= k; step++)
      for (int64_t run = 0; run < kWidth; run += kRun, at += 16)
#pragma GCC unroll 4
        for (int p = 0; p < kPlanes; p++)
          std::memcpy(out + (step * kPlanes + p) * kWidth + run, from + at + p * kRun, kRun);
    if (step < steps) {
      int8_t* to = out + step * kPlanes * kWidth;
      std::memset(to, 0, kPlanes * kWidth);
      for (int64_t i = 0; at < k; i++, at++)
        to[i % 16 / kRun * kWidth + i / 16 * kRun + i % kRun] = from[at];
    }
    Acc sum = acc_zero();
    const Bytes ones = load(kOnes);
    for (int64_t i = 0; i < steps * kPlanes; i++) sum = dot<2>(sum, ones, out + i * kWidth);
    sums[g * call.digits * call.tokens + row] = reduce(sum);
  }
}

static void prepare_row(const Product& call, const int8_t* x, int64_t k_size, int64_t row, int8_t* out, int32_t* sums) {
  if (call.bits == 2) return prepare<2>(call, x, k_size, row, out, sums);
  if (call.bits == 4) return prepare<4>(call, x, k_size, row, out, sums);
  prepare<8>(call, x, k_size, row, out, sums);
}

// part[m][r] = sum over one group of codes(row r) * x(m), for R (1 or 4) rows and M
// activation rows, x_stride bytes and part_stride sums apart.
//
// Every loop over r and m is unrolled, also the cold ones: one that is not would keep the
// accumulators in memory.
template <int kBits, int R, int M>
inline void tile(const uint8_t* w, int64_t row_bytes, const int8_t* x, int64_t x_stride,
                 int64_t group_bytes, const Ahead ahead, int32_t* part, int64_t part_stride) {
  constexpr int kPlanes = 8 / kBits;
  constexpr bool kStay = kInPlace && M == 1 && kPlanes > 1;
  constexpr int kSums = kStay ? kPlanes : 1;
  Acc acc[kSums][M][R];
#pragma GCC unroll 4
  for (int p = 0; p < kSums; p++)
#pragma GCC unroll 8
    for (int m = 0; m < M; m++)
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) acc[p][m][r] = acc_zero();
  int64_t byte = 0;
  for (; byte + kWidth <= group_bytes; byte += kWidth) {
    Bytes v[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      ahead.ask(byte, r);
      v[r] = load(w + r * row_bytes + byte);
    }
#pragma GCC unroll 4
    for (int p = 0; p < kPlanes; p++) {
      Bytes u[R];
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) u[r] = kStay ? codes_in_place<kBits>(v[r], p) : codes<kBits>(v[r], p);
#pragma GCC unroll 8
      for (int m = 0; m < M; m++) {
        const int8_t* xm = x + m * x_stride + byte * kPlanes + p * kWidth;
        Acc(&sum)[R] = acc[kStay ? p : 0][m];
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) sum[r] = dot<kBits>(sum[r], u[r], xm);
      }
    }
  }
#pragma GCC unroll 4
  for (int p = 1; p < kSums; p++)
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) acc[0][0][r] = add_scaled_down(acc[0][0][r], acc[p][0][r], kBits * p);
  if (byte < group_bytes) {
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const Bytes v = load_part(w + r * row_bytes + byte, group_bytes - byte);
#pragma GCC unroll 4
      for (int p = 0; p < kPlanes; p++)
#pragma GCC unroll 8
        for (int m = 0; m < M; m++)
          acc[0][m][r] = dot<kBits>(acc[0][m][r], codes<kBits>(v, p),
                                    x + m * x_stride + byte * kPlanes + p * kWidth);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; m++) {
    if (R == 4)
      reduce4(acc[0][m], part + m * part_stride);
    else
      part[m * part_stride] = reduce(acc[0][m][0]);
  }
}

// R rows of one (plane, group) times `count` (1 to 4) activation rows: exact sums into
// part[m][r]. Later passes over the same weights find them in the cache.
template <int kBits, int R>
inline void tiles(const Product& call, const uint8_t* w, const int8_t* x, int64_t x_stride, int64_t count,
                  bool first, int32_t* part, int64_t part_stride) {
  const int64_t group_bytes = call.row_bytes / call.groups, row = call.row_bytes;
  const int64_t tile_bytes = R * row;
  const int64_t least = count > 1 ? kPrefetchShared : kPrefetch;
  const int64_t next = (least + tile_bytes - 1) / tile_bytes * tile_bytes;
  // A group is a piece of each row: only whole rows lie one behind the other.
  const bool whole = call.groups == 1;
  const Ahead ahead{w + (first ? next : 0), whole ? R : 1, whole ? kWidth : row, kIntoFirstLevel};
  switch (count) {
    case 1: return tile<kBits, R, 1>(w, row, x, x_stride, group_bytes, ahead, part, part_stride);
    case 2: return tile<kBits, R, 2>(w, row, x, x_stride, group_bytes, ahead, part, part_stride);
    case 3: return tile<kBits, R, 3>(w, row, x, x_stride, group_bytes, ahead, part, part_stride);
    default: return tile<kBits, R, 4>(w, row, x, x_stride, group_bytes, ahead, part, part_stride);
  }
}

// Exact sums, the codes' offset still in them, of one (plane, group): `count` (up to kRows) rows
// from `row` times all digits of tokens first .. first + tokens, into part[digit][token][r].
template <int kBits>
inline void sums(const Product& call, int64_t plane, int64_t group, int64_t row, int64_t count,
                 int64_t first, int64_t tokens, int32_t part[3][kTokens * kRows]) {
  const int64_t group_bytes = call.row_bytes / call.groups;
  const int64_t steps = (group_bytes + kWidth - 1) / kWidth;
  const uint8_t* w = call.data + (plane * call.rows + row) * call.row_bytes + group * group_bytes;
  const int8_t* x = call.x + first * call.x_stride + group * steps * kWidth * (8 / kBits);
  // One token's digits go through together, so that its weights are read once.
  const bool together = tokens == 1;
  const int64_t passes = together ? 1 : call.digits, in_pass = together ? call.digits : tokens;
  const int64_t x_stride = together ? call.tokens * call.x_stride : call.x_stride;
  const int64_t part_stride = together ? kTokens * kRows : kRows;
  const int64_t side = kOneByOne && (in_pass == 1 || (kBits == 8 && in_pass <= 3)) ? 1 : 4;
  for (int64_t d = 0; d < passes; d++) {
    const int8_t* xd = x + d * call.tokens * call.x_stride;
    int64_t r = 0;
    for (; side == 4 && r + 4 <= count; r += 4)
      tiles<kBits, 4>(call, w + r * call.row_bytes, xd, x_stride, in_pass, !first && !d, part[d] + r, part_stride);
    for (; r < count; r++)
      tiles<kBits, 1>(call, w + r * call.row_bytes, xd, x_stride, in_pass, !first && !d, part[d] + r, part_stride);
  }
}

// What the offset of its codes has added to a sum over one group of an activation row.
template <int kBits>
inline int32_t offset_in(const Product& call, int64_t group, int64_t digit, int64_t token) {
  constexpr int kTaken = kBits == 8 ? kInt8Offset : kOffset[kBits];
  return kTaken * call.sums[(group * call.digits + digit) * call.tokens + token];
}

// Turns exact sums of one (plane, group) into their share of y, for `count` rows.
template <int kBits>
inline void share(const Product& call, int64_t plane, int64_t group, int64_t row, int64_t count,
                  int64_t token, const int32_t* const part[3]) {
  const int64_t at = (plane * call.groups + group) * call.scale_columns;
  const bool columns = call.scale_columns > 1;
  const float x_scale = call.x_scale[token];
  int32_t offset[3];
  for (int64_t d = 0; d < call.digits; d++) offset[d] = offset_in<kBits>(call, group, d, token);
  int64_t whole = 0;  // the sum of the activations
  for (int64_t d = call.digits - 1; call.zero && d >= 0; d--)
    whole = whole * 128 + call.sums[(group * call.digits + d) * call.tokens + token];
  const int64_t out = token * call.rows + row;
  const float* before = plane + group ? call.y + out : call.residual ? call.residual + out : nullptr;
  for (int64_t i = 0; i < count; i += kLanes) {
    const int64_t n = std::min<int64_t>(kLanes, count - i);
    Floats total{};
    for (int64_t d = call.digits - 1; d >= 0; d--) {
      Ints exact;
      std::memcpy(&exact, part[d] + i, sizeof(exact));
      total = total * 128.0f + __builtin_convertvector(exact - offset[d], Floats);
    }
    const auto of_rows = [&](const float* p) { return columns ? load_floats(p + at + row + i, n) : Floats{} + p[at]; };
    if (call.zero) total += of_rows(call.zero) * static_cast<float>(whole);
    total *= x_scale * of_rows(call.scale);
    if (before) total += load_floats(before + i, n);
    store_floats(call.y + out + i, total, n);
  }
}

// Four rows of many short groups times one token of D digits. A sum across lanes for every
// group would cost more than its dots, so lanes become floats, take the group's scale, and
// are summed once a row. The codes' offset comes off as an integer, before that; a lane of
// three digits may take all of a float's 24 bits and is then rounded, as sums of groups are.
template <int kBits, int D>
inline Four grouped_tile(const Product& call, int64_t row, const float* scale) {
  constexpr int kPlanes = 8 / kBits;
  const int64_t group_bytes = call.row_bytes / call.groups, tile_bytes = 4 * call.row_bytes;
  const uint8_t* w = call.data + row * call.row_bytes;
  const Ahead ahead{w + (kPrefetch + tile_bytes - 1) / tile_bytes * tile_bytes, 4, kWidth, kIntoFirstLevel};
  const uint8_t* const begin = w;
  const int8_t* x = call.x;
  const int64_t step = call.scale_columns > 1 ? 1 : 0;
  Floats total[4] = {};
  for (int64_t g = 0; g < call.groups; g++, scale += call.scale_columns) {
    Acc acc[D][4];
#pragma GCC unroll 4
    for (int d = 0; d < D; d++)
#pragma GCC unroll 4
      for (int r = 0; r < 4; r++) acc[d][r] = acc_of(-kOffset[kBits] * call.sums[g * D + d]);
    for (int64_t byte = 0; byte < group_bytes; byte += kWidth, x += kWidth * kPlanes, w += kWidth)
#pragma GCC unroll 4
      for (int r = 0; r < 4; r++) {
        ahead.ask(w - begin, r);
        const Bytes v = load(w + r * call.row_bytes);
#pragma GCC unroll 4
        for (int p = 0; p < kPlanes; p++)
#pragma GCC unroll 4
          for (int d = 0; d < D; d++)
            acc[d][r] = dot<kBits>(acc[d][r], codes<kBits>(v, p), x + d * call.x_stride + p * kWidth);
      }
#pragma GCC unroll 4
    for (int r = 0; r < 4; r++) {
      Floats whole = to_floats(acc[D - 1][r]);
#pragma GCC unroll 4
      for (int d = D - 2; d >= 0; d--) whole = whole * 128.0f + to_floats(acc[d][r]);
      total[r] += whole * scale[r * step];
    }
  }
  return sum4(total);
}

// One token over rows first .. last of a grouped weight, whole fours: see grouped_tile.
template <int kBits>
static void grouped_rows(const Product& call, int64_t first, int64_t last) {
  const int64_t columns = call.scale_columns, step = columns > 1 ? 1 : 0;
  float* whole = scratch<float>(3, call.groups);  // the sum of each group's activations
  for (int64_t g = 0; g < call.groups; g++) {
    int64_t sum = 0;
    for (int d = call.digits - 1; d >= 0; d--) sum = sum * 128 + call.sums[g * call.digits + d];
    whole[g] = static_cast<float>(sum);
  }
  for (int64_t row = first; row < last; row += 4) {
    const float* scale = call.scale + row * step;
    Four y = call.digits == 3 ? grouped_tile<kBits, 3>(call, row, scale) : grouped_tile<kBits, 1>(call, row, scale);
    for (int64_t g = 0; call.zero && g < call.groups; g++, scale += columns)
      for (int r = 0; r < 4; r++)
        y[r] += scale[r * step] * call.zero[g * columns + (row + r) * step] * whole[g];
    for (int r = 0; r < 4; r++) {
      const float share = call.x_scale[0] * y[r];
      call.y[row + r] = call.residual ? call.residual[row + r] + share : share;
    }
  }
}

// Rows first .. last of the output, all tokens.
template <int kBits>
void bits_rows(const Product& call, int64_t begin, int64_t end) {
  if (kWideSums && kBits < 8 && call.y && call.tokens == 1 && call.planes == 1 && call.groups > 1 &&
      call.digits != 2 && call.row_bytes / call.groups % kWidth == 0) {
    const int64_t whole = begin + (end - begin) / 4 * 4;
    grouped_rows<kBits>(call, begin, whole);
    begin = whole;
  }
  int32_t part[3][kTokens * kRows] = {};
  for (int64_t t0 = 0; t0 < call.tokens; t0 += kTokens) {
    const int64_t tokens = std::min<int64_t>(kTokens, call.tokens - t0);
    for (int64_t row = begin; row < end; row += kRows) {
      const int64_t count = std::min<int64_t>(kRows, end - row);
      if (call.acc) {
        sums<kBits>(call, 0, 0, row, count, t0, tokens, part);
        for (int64_t t = 0; t < tokens; t++)
          for (int64_t i = 0; i < count; i++)
            call.acc[(t0 + t) * call.rows + row + i] = part[0][t * kRows + i] - offset_in<kBits>(call, 0, 0, t0 + t);
        continue;
      }
      for (int64_t plane = 0; plane < call.planes; plane++)
        for (int64_t group = 0; group < call.groups; group++) {
          sums<kBits>(call, plane, group, row, count, t0, tokens, part);
          for (int64_t t = 0; t < tokens; t++) {
            const int32_t* const digits[3] = {part[0] + t * kRows, part[1] + t * kRows, part[2] + t * kRows};
            share<kBits>(call, plane, group, row, count, t0 + t, digits);
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
