// Attention over the cache: included once for each instruction set, see body.h.

// Distance at which cached rows are asked for ahead of their use.
constexpr int64_t kAttendAhead = 4096;
// Rows of values that all columns are summed over before the next: they stay in the cache.
constexpr int64_t kBlendRows = 128;

// One stored value.
template <int kStore>
inline float stored(const char* row, int64_t e) {
  if (kStore == 1) return reinterpret_cast<const int8_t*>(row)[e];
  if (kStore == 4) return reinterpret_cast<const float*>(row)[e];
  const uint32_t bits = uint32_t{reinterpret_cast<const uint16_t*>(row)[e]} << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// Q queries against `count` rows of `store`: out[q * slots + s] = q . row(s) * scale[s].
template <int kStore, int Q>
inline void scores(const float* q, int64_t width, const char* store, const float* scale, int64_t count,
                   int64_t slots, float* out) {
  const int64_t whole = width / kLanes * kLanes;
  for (int64_t s = 0; s < count; s += 4) {
    const char* row[4];
    for (int64_t i = 0; i < 4; i++) row[i] = store + std::min(s + i, count - 1) * width * kStore;
    for (int64_t line = 0; line < 4 * width * kStore; line += 64)
      __builtin_prefetch(row[0] + kAttendAhead + line, 0, 2);
    Floats acc[Q][4] = {};
    for (int64_t e = 0; e < whole; e += kLanes) {
      Floats k[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) k[i] = widen<kStore>(row[i] + e * kStore);
#pragma GCC unroll 4
      for (int j = 0; j < Q; j++)
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) acc[j][i] += k[i] * load_floats(q + j * width + e);
    }
    const int64_t left = count - s;
    Four by = Four{} + 1.0f;
    if (scale && left >= 4)
      by = *reinterpret_cast<const FourAt*>(scale + s);
    else if (scale)
      for (int64_t i = 0; i < left; i++) by[i] = scale[s + i];
#pragma GCC unroll 4
    for (int j = 0; j < Q; j++) {
      Four found = sum4(acc[j]);
      for (int64_t e = whole; e < width; e++)
        for (int64_t i = 0; i < 4; i++) found[i] += stored<kStore>(row[i], e) * q[j * width + e];
      found *= by;
      if (left >= 4)
        *reinterpret_cast<FourAt*>(out + j * slots + s) = found;
      else
        for (int64_t i = 0; i < left; i++) out[j * slots + s + i] = found[i];
    }
  }
}

// out[q] += sum over s of weight[q * slots + s] * row(s), for Q queries.
template <int kStore, int Q>
inline void blend_rows(const float* weight, int64_t slots, const char* store, int64_t count, int64_t width,
                       float* const out[Q]) {
  constexpr int kColumns = 4;  // vectors of a row held at a time
  int64_t e = 0;
  for (; e + kColumns * kLanes <= width; e += kColumns * kLanes) {
    Floats acc[Q][kColumns];
#pragma GCC unroll 4
    for (int j = 0; j < Q; j++)
#pragma GCC unroll 4
      for (int c = 0; c < kColumns; c++) acc[j][c] = load_floats(out[j] + e + c * kLanes);
    for (int64_t s = 0; s < count; s++) {
      const char* row = store + (s * width + e) * kStore;
      if (!e)
        for (int64_t line = 0; line < width * kStore; line += 64)
          __builtin_prefetch(row + kAttendAhead + line, 0, 2);
      Floats v[kColumns];
#pragma GCC unroll 4
      for (int c = 0; c < kColumns; c++) v[c] = widen<kStore>(row + c * kLanes * kStore);
#pragma GCC unroll 4
      for (int j = 0; j < Q; j++)
#pragma GCC unroll 4
        for (int c = 0; c < kColumns; c++) acc[j][c] += v[c] * weight[j * slots + s];
    }
#pragma GCC unroll 4
    for (int j = 0; j < Q; j++)
#pragma GCC unroll 4
      for (int c = 0; c < kColumns; c++) store_floats(out[j] + e + c * kLanes, acc[j][c]);
  }
  for (; e < width; e++)
    for (int j = 0; j < Q; j++)
      for (int64_t s = 0; s < count; s++)
        out[j][e] += weight[j * slots + s] * stored<kStore>(store + s * width * kStore, e);
}

template <int kStore, int Q>
inline void blend(const float* weight, int64_t slots, const char* store, int64_t count, int64_t width,
                  float* const out[Q]) {
  for (int j = 0; j < Q; j++) std::fill(out[j], out[j] + width, 0.0f);
  for (int64_t s = 0; s < count; s += kBlendRows)
    blend_rows<kStore, Q>(weight + s, slots, store + s * width * kStore, std::min(kBlendRows, count - s), width, out);
}

// e^(score - peak) over the sum of all, in place, times `scale` of each slot where given.
inline void softmax(float* score, int64_t count, const float* scale) {
  Floats peaks = Floats{} - INFINITY, sums{};
  int64_t s = 0;
  for (; s + kLanes <= count; s += kLanes) peaks = maximum(peaks, load_floats(score + s));
  float peak = largest(peaks);
  for (int64_t i = s; i < count; i++) peak = larger(peak, score[i]);
  for (s = 0; s < count; s += kLanes) {
    const int64_t n = std::min<int64_t>(kLanes, count - s);
    const Floats e = exponential(load_floats(score + s, n) - peak);
    store_floats(score + s, e, n);
    if (n == kLanes) sums += e;
    else for (int64_t i = 0; i < n; i++) sums[0] += e[i];
  }
  const float inverse = 1.0f / sum(sums);
  for (s = 0; s < count; s++) score[s] *= scale ? inverse * scale[s] : inverse;
}

// Rotates pairs (x[i], x[i + half]) as ternax/nn/rope.py does.
inline void rotate(const float* x, const float* cosine, const float* sine, int64_t half, float* out) {
  for (int64_t i = 0; i < half; i++) {
    const float a = x[i], b = x[half + i];
    out[i] = a * cosine[i] - b * sine[i];
    out[half + i] = b * cosine[i] + a * sine[i];
  }
}

// Stores one row of the cache as ternax/nn/cache.py does, rounding half to even.
inline void keep(const float* x, int64_t width, int store, void* to, float* scale) {
  if (store == 4) {
    std::memcpy(to, x, width * sizeof(float));
  } else if (store == 2) {
    for (int64_t e = 0; e < width; e++) {
      uint32_t bits;
      std::memcpy(&bits, x + e, 4);
      static_cast<uint16_t*>(to)[e] = x[e] != x[e] ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    }
  } else {
    float peak = 1e-8f;
    for (int64_t e = 0; e < width; e++) peak = larger(peak, std::fabs(x[e]));
    *scale = peak / 127.0f;
    const bool finite = std::isfinite(peak);  // else the scale alone tells
    for (int64_t e = 0; e < width; e++)
      static_cast<int8_t*>(to)[e] = finite ? static_cast<int8_t>(std::nearbyint(x[e] / *scale)) : 1;
  }
}

// Puts new keys, rotated, and values of one (row of the batch, kv head) into the cache:
// tokens first .. last. `row` holds one row of floats.
static void keep_tokens(const Attention& call, int64_t pair, int64_t first, int64_t last, float* row) {
  const int64_t b = pair / call.groups, g = pair % call.groups, width = call.width, half = width / 2;
  for (int64_t t = first; t < last; t++) {
    const int64_t token = b * call.tokens + t, slot = pair * call.slots + call.length + t;
    const float* x = call.qkv + token * (call.heads + 2 * call.groups) * width;
    rotate(x + (call.heads + g) * width, call.cosine + token * half, call.sine + token * half, half, row);
    const int64_t at = slot * width * call.store;
    float* none = nullptr;
    keep(row, width, call.store, static_cast<char*>(call.k) + at, call.store == 1 ? call.k_scale + slot : none);
    keep(x + (call.heads + call.groups + g) * width, width, call.store, static_cast<char*>(call.v) + at,
         call.store == 1 ? call.v_scale + slot : none);
  }
}

// The queries of one (row of the batch, kv head), tokens first .. last: rotated and scaled, into queries[(t - first) * share + head of the share].
inline void take_queries(const Attention& call, int64_t pair, int64_t first, int64_t last, float* queries) {
  const int64_t b = pair / call.groups, g = pair % call.groups, width = call.width, half = width / 2;
  const int64_t share = call.heads / call.groups;
  const float norm = 1.0f / std::sqrt(static_cast<float>(width));
  for (int64_t t = first; t < last; t++) {
    const int64_t token = b * call.tokens + t;
    for (int64_t h = 0; h < share; h++, queries += width) {
      const int64_t head = g * share + h;
      rotate(call.qkv + (token * (call.heads + 2 * call.groups) + head) * width, call.cosine + token * half,
             call.sine + token * half, half, queries);
      for (int64_t e = 0; e < width; e++) queries[e] *= norm;
    }
  }
}

// One row of the batch and one kv head: queries of tokens first .. last over the slots in use.
// queries: [(last - first) * share, width]; memory: 4 * call.slots scores.
template <int kStore>
static void attend(const Attention& call, int64_t pair, int64_t first, int64_t last, float* queries, float* memory) {
  const int64_t b = pair / call.groups, g = pair % call.groups, width = call.width, slots = call.slots;
  const int64_t share = call.heads / call.groups;
  const int64_t begin = std::min<int64_t>(call.start[b], call.length + call.tokens);
  const int64_t origin = pair * slots + begin;
  const char* k = static_cast<const char*>(call.k) + origin * width * kStore;
  const char* v = static_cast<const char*>(call.v) + origin * width * kStore;
  const float* k_scale = kStore == 1 ? call.k_scale + origin : nullptr;
  const float* v_scale = kStore == 1 ? call.v_scale + origin : nullptr;
  take_queries(call, pair, first, last, queries);
  // Query i = (token, head of the share); four at a time see what the last of them sees.
  const int64_t stop = last * share;
  for (int64_t i = first * share; i < stop; i += 4, queries += 4 * width) {
    const int64_t n = std::min<int64_t>(4, stop - i);
    const auto seen = [&](int64_t j) { return std::max<int64_t>(0, call.length + j / share + 1 - begin); };
    const int64_t used = seen(i + n - 1);
    float* out[4];
    for (int64_t j = 0; j < n; j++)
      out[j] = call.out + ((b * call.tokens + (i + j) / share) * call.heads + g * share + (i + j) % share) * width;
    if (kStore == 1 && n == 4 && seen(i) == used &&
        digit_attend(queries, width, k, k_scale, v, v_scale, used, slots, memory, out))
      continue;
    if (n == 4)
      scores<kStore, 4>(queries, width, k, k_scale, used, slots, memory);
    else
      for (int64_t j = 0; j < n; j++)
        scores<kStore, 1>(queries + j * width, width, k, k_scale, used, slots, memory + j * slots);
    for (int64_t j = 0; j < n; j++) {
      if (seen(i + j)) softmax(memory + j * slots, seen(i + j), v_scale);
      std::fill(memory + j * slots + seen(i + j), memory + j * slots + used, 0.0f);
    }
    if (n == 4)
      blend<kStore, 4>(memory, slots, v, used, width, out);
    else
      for (int64_t j = 0; j < n; j++) blend<kStore, 1>(memory + j * slots, slots, v, used, width, out + j);
  }
}

static void attend_tokens(const Attention& call, int64_t pair, int64_t first, int64_t last, float* queries,
                          float* memory) {
  if (call.store == 1) return attend<1>(call, pair, first, last, queries, memory);
  if (call.store == 2) return attend<2>(call, pair, first, last, queries, memory);
  attend<4>(call, pair, first, last, queries, memory);
}
