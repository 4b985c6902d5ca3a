// Rows of floats to int8 codes and a scale each: included once for each instruction set, see
// transcode.cc.

// The bits of a magnitude are ordered as magnitudes are, so that the largest is found without
// converting any; what is not finite has kOdd or more.
struct Bf16 {
  using Bits = uint16_t;
  static constexpr Bits kMagnitude = 0x7fff, kOdd = 0x7f80;
  static float value(uint32_t bits) { return as_float(bits << 16); }
};
struct F16 {
  using Bits = uint16_t;
  static constexpr Bits kMagnitude = 0x7fff, kOdd = 0x7c00;
  static float value(uint32_t bits) {  // exact, subnormals included: 2^112 corrects the exponent's bias
    return as_float((bits & 0x7fffu) << 13 | (bits & 0x8000u) << 16) * 0x1p112f;
  }
};
struct F32 {
  using Bits = uint32_t;
  static constexpr Bits kMagnitude = 0x7fffffff, kOdd = 0x7f800000;
  static float value(uint32_t bits) { return as_float(bits); }
};

// The largest magnitude of rows [first, last); infinity where a value is not finite.
template <class T, bool kStream>
float int8_rows(const RowsJob& job, int64_t first, int64_t last) {
  using Bits = typename T::Bits;
  const int64_t padded = (job.columns + 15) / 16 * 16;
  alignas(64) uint8_t stage[kStage];
  Bits most = 0;
  for (int64_t r = first; r < last; r++) {
    const Bits* row = static_cast<const Bits*>(job.in) + r * job.columns;
    Bits top = 0;
    for (int64_t i = 0; i < job.columns; i++) top = std::max<Bits>(top, row[i] & T::kMagnitude);
    most = std::max(most, top);
    // As XLA computes quant.integer.Int8: both quotients are products with a rounded inverse.
    const float scale = std::max(T::value(top), kEps) * (1.0f / 127.0f), inverse = 1.0f / scale;
    job.scale[r] = scale;
    for (int64_t begin = 0; begin < padded; begin += kStage) {
      const int64_t count = std::min(kStage, job.columns - begin), filled = std::min(kStage, padded - begin);
      // Adding kRound leaves the nearest integer, ties to even, in the low bits.
      for (int64_t i = 0; i < count; i++)
        stage[i] = static_cast<uint8_t>(as_bits(T::value(row[begin + i]) * inverse + kRound) + 128);
      for (int64_t i = count; i < filled; i++) stage[i] = 128;
      put<kStream>(job.out + r * padded + begin, stage, filled);
    }
  }
  return most >= T::kOdd ? std::numeric_limits<float>::infinity() : T::value(most);
}

template <bool kStream>
float choose_rows(const RowsJob& job, int64_t first, int64_t last) {
  switch (job.kind) {
    case kBf16: return int8_rows<Bf16, kStream>(job, first, last);
    case kF16: return int8_rows<F16, kStream>(job, first, last);
    default: return int8_rows<F32, kStream>(job, first, last);
  }
}

inline float rows(const RowsJob& job, int64_t first, int64_t last) {
  if (!job.stream) return choose_rows<false>(job, first, last);
  const float most = choose_rows<true>(job, first, last);
  drain();
  return most;
}
