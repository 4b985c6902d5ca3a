// What the kernels must give, by another route: codes one at a time, int64 and float64.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

// The oracles are not what is under test: without instrumentation the sweep takes a third.
#define TERNAX_PLAIN __attribute__((no_sanitize("address", "undefined", "thread")))

// splitmix64: the same draws everywhere.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15u) {}
  TERNAX_PLAIN uint64_t next() {
    uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  int64_t below(int64_t bound) { return static_cast<int64_t>(next() % static_cast<uint64_t>(bound)); }
  template <class T, size_t kCount>
  T pick(const T (&from)[kCount]) {
    return from[below(kCount)];
  }
  // In [-1, 1), none of them tiny: a bound then says something.
  float number() {
    const float size = 0.25f + 0.75f * static_cast<float>(next() >> 40) * 0x1p-24f;
    return next() & 1 ? size : -size;
  }

 private:
  uint64_t state_;
};

// A float64 value and how far a float32 computation of it may be off.
struct Near {
  double value, bound;
  bool holds(float found) const { return std::abs(found - value) <= bound; }  // false for NaN
};
constexpr double kUlp = 0x1p-24;  // one float32 rounding, relative

// What activations and codes are, of each call.
enum { kMixed, kLowLow, kLowHigh, kHighLow, kHighHigh, kFlips, kExtremes };
const char* const kExtremeName[] = {"mixed",        "-128 x lowest",  "-128 x highest",
                                    "+127 x lowest", "+127 x highest", "extremes mixed"};

TERNAX_PLAIN inline void draw_activations(int8_t* x, int64_t count, int extreme, Random& random) {
  for (int64_t i = 0; i < count; i++)
    x[i] = extreme == kMixed    ? static_cast<int8_t>(random.next())
           : extreme == kFlips  ? (random.next() & 1 ? 127 : -128)
           : extreme < kHighLow ? -128
                                : 127;
}

// Codes of one layer, unpacked: code[(plane * n + row) * padded + k].
struct Weights {
  int bits, planes;
  int64_t n, k, row_bytes, padded = 8 / bits * row_bytes;
  std::vector<uint8_t> code = {};

  int offset() const { return bits == 2 ? 1 : bits == 4 ? 8 : 128; }

  // Every code that the bits can hold, also those no quantizer emits; and past K anything,
  // since noise on the stored bits does not stop at the padding.
  TERNAX_PLAIN void draw(int extreme, Random& random) {
    const int top = (1 << bits) - 1;
    const bool low = extreme == kLowLow || extreme == kHighLow;
    code.resize(planes * n * padded);
    uint8_t* to = code.data();
    for (int64_t i = 0, at = 0; i < planes * n * padded; i++, at = at + 1 == padded ? 0 : at + 1) {
      const uint64_t drawn = random.next();
      to[i] = extreme == kMixed || at >= k ? drawn & top : extreme == kFlips ? (drawn & 1) * top : low ? 0 : top;
    }
  }

  // The layout of kernels/packing.py: code k of a row in byte 2 bits (k / 16) + k % (2 bits).
  TERNAX_PLAIN void pack(uint8_t* out) const {
    const uint8_t* from = code.data();
    for (int64_t i = 0; i < planes * n * row_bytes; i++) out[i] = 0;
    for (int64_t row = 0; row < planes * n; row++)
      for (int64_t i = 0; i < padded; i++) {
        const int64_t inside = i % 16;
        out[row * row_bytes + i / 16 * 2 * bits + inside % (2 * bits)] |= from[row * padded + i] << (inside / (2 * bits) * bits);
      }
  }
};

// The exact sums of a product, for every plane, group, digit, row and column.
class Sums {
 public:
  TERNAX_PLAIN Sums(const Weights& w, const int8_t* x, int digits, int64_t rows, int64_t groups)
      : w_(w), digits_(digits), rows_(rows), groups_(groups),
        sum_(w.planes * groups * digits * rows * w.n), inputs_(groups * digits * rows) {
    const int64_t part = w.k / groups, offset = w.offset();
    for (int64_t group = 0; group < groups; group++)
      for (int64_t row = 0; row < digits * rows; row++) {
        const int8_t* from = x + row * w.k + group * part;
        int64_t& inputs = inputs_.data()[group * digits * rows + row];
        for (int64_t i = 0; i < part; i++) inputs += from[i];
        for (int64_t plane = 0; plane < w.planes; plane++)
          for (int64_t n = 0; n < w.n; n++) {
            const uint8_t* code = w.code.data() + (plane * w.n + n) * w.padded + group * part;
            int64_t sum = 0;
            for (int64_t i = 0; i < part; i++) sum += (code[i] - offset) * from[i];
            sum_.data()[index(plane, group, row, n)] = sum;
          }
      }
  }

  TERNAX_PLAIN int64_t at(int64_t plane, int64_t group, int64_t digit, int64_t row, int64_t n) const {
    return sum_.data()[index(plane, group, digit * rows_ + row, n)];
  }

  // y[row, n]. Every float32 operation rounds what is at most `size`: a digit's conversion,
  // product and sum, those of the zero point, two scales, and one sum a plane and group.
  TERNAX_PLAIN Near scaled(int64_t row, int64_t n, const float* x_scale, const float* scale,
                           const float* zero, int64_t columns) const {
    double value = 0, size = 0;
    for (int64_t plane = 0; plane < w_.planes; plane++)
      for (int64_t group = 0; group < groups_; group++) {
        const int64_t at_scale = (plane * groups_ + group) * columns + (columns > 1 ? n : 0);
        double total = 0, all = 0;
        for (int64_t digit = 0, power = 1; digit < digits_; digit++, power *= 128) {
          const double sum = power * at(plane, group, digit, row, n);
          const double inputs = power * inputs_.data()[(group * digits_ + digit) * rows_ + row];
          const double point = zero ? zero[at_scale] * inputs : 0;
          total += sum + point;
          all += std::abs(sum) + std::abs(point);
        }
        const double factor = static_cast<double>(x_scale[row]) * scale[at_scale];
        value += total * factor;
        size += all * std::abs(factor);
      }
    return {value, (3 * digits_ + 6 + w_.planes * groups_) * kUlp * size};
  }

 private:
  TERNAX_PLAIN int64_t index(int64_t plane, int64_t group, int64_t row, int64_t n) const {
    return ((plane * groups_ + group) * digits_ * rows_ + row) * w_.n + n;
  }
  const Weights& w_;
  int64_t digits_, rows_, groups_;
  std::vector<int64_t> sum_, inputs_;
};

// A number of float64 and the size of what was summed for it.
struct Turned {
  double value, size;
  double bound() const { return 3 * kUlp * size + 0x1p-126; }
};

// Rows of a KV cache as stored, and as the float32 numbers those stand for.
struct Cache {
  int64_t width;
  std::vector<int8_t> k8, v8;
  std::vector<uint16_t> k16, v16;
  std::vector<float> k, v, k_scale, v_scale;

  Cache(int64_t rows, int64_t width, int store, bool extreme, Random& random) : width(width) {
    fill(rows, store, extreme, random, k8, k16, k, k_scale);
    fill(rows, store, extreme, random, v8, v16, v, v_scale);
  }

  // One query over rows first + begin .. first + end: float64 softmax.
  //
  // A score of `width` products is off by (width + 6) roundings of their sizes, twice that
  // between two scores; weights by as much, relatively, and by exp, which stops at e^-87,
  // and a sum over the rows.
  TERNAX_PLAIN std::vector<Near> attend(const Turned* q, int64_t first, int64_t begin, int64_t end) const {
    std::vector<Near> out(width, Near{0, 0});
    if (begin >= end) return out;
    std::vector<double> weight(end - begin);
    double peak = -1e300, size = 0, total = 0;
    for (int64_t s = begin; s < end; s++) {
      double score = 0, all = 0;
      for (int64_t e = 0; e < width; e++) {
        const double key = k.data()[(first + s) * width + e];
        score += q[e].value * key, all += q[e].size * std::abs(key);
      }
      weight.data()[s - begin] = score /= std::sqrt(static_cast<double>(width));
      peak = std::max(peak, score);
      size = std::max(size, all / std::sqrt(static_cast<double>(width)));
    }
    for (double& w : weight) total += w = std::exp(w - peak);
    const double relative = (2 * (width + 8) * size + 2 * (end - begin) + 16) * kUlp;
    for (int64_t s = begin; s < end; s++)
      for (int64_t e = 0; e < width; e++) {
        const double value = v.data()[(first + s) * width + e], term = weight.data()[s - begin] / total * value;
        out.data()[e].value += term;
        out.data()[e].bound += 2 * relative * std::abs(term) + 2e-38 * std::abs(value) + 0x1p-126;
      }
    return out;
  }

 private:
  TERNAX_PLAIN void fill(int64_t rows, int store, bool extreme, Random& random, std::vector<int8_t>& s8,
                         std::vector<uint16_t>& s16, std::vector<float>& wide, std::vector<float>& scale) {
    const int8_t all = random.next() & 1 ? 127 : -128;
    for (int64_t row = 0; row < rows; row++) {
      if (store == 1) scale.push_back(std::abs(random.number()) / 100);
      for (int64_t e = 0; e < width; e++) {
        float value = random.number();
        if (store == 1) {
          s8.push_back(extreme ? all : static_cast<int8_t>(random.next()));
          value = s8.back() * scale.back();
        } else if (store == 2) {
          uint32_t bits;
          if (extreme) value *= 64;
          std::memcpy(&bits, &value, 4);
          s16.push_back(bits >> 16);
          bits &= 0xffff0000u;
          std::memcpy(&value, &bits, 4);
        }
        wide.push_back(value);
      }
    }
  }
};
