// What stands in front of a projection: included once for each instruction set, see body.h.

// One row through the gate, the norm and the quantizer, in the order in which the
// composition in ternax/nn/linear.py applies them: int8 codes and their scale.
// `memory` holds call.k_size floats.
static void enter_row(const Entry& call, int64_t row, float* memory) {
  const int64_t k = call.k_size;
  const float* x = call.x + row * (call.gate ? 2 * k : k);
  Floats squares{};
  if (call.gate || call.norm) {
    for (int64_t i = 0; i < k; i += kLanes) {
      Floats v = load_floats(x + i, k - i);
      if (call.gate) {
        const Floats up = load_floats(x + k + i, k - i);
        if (call.gate == kSilu) {
          v = v / (exponential(-v) + 1.0f) * up;
        } else {
          v = maximum(v, Floats{});
          v = v * v * up;
        }
        store_floats(memory + i, v, k - i);
      }
      squares += v * v;
    }
    if (call.gate) x = memory;
  }
  Floats peaks{};
  if (call.norm) {
    const float shrink = 1.0f / std::sqrt(sum(squares) / static_cast<float>(k) + call.eps);
    for (int64_t i = 0; i < k; i += kLanes) {
      const Floats v = load_floats(call.norm + i, k - i) * (load_floats(x + i, k - i) * shrink);
      store_floats(memory + i, v, k - i);
      peaks = maximum(peaks, magnitude(v));
    }
    x = memory;
  } else {
    for (int64_t i = 0; i < k; i += kLanes) peaks = maximum(peaks, magnitude(load_floats(x + i, k - i)));
  }
  const float inverse = 1.0f / larger(largest(peaks), 1e-5f) * 127.0f;
  call.scale[row] = 1.0f / inverse;
  int8_t* codes = call.codes + row * k;
  for (int64_t i = 0; i < k; i += kLanes)
    store_bytes(codes + i, (Ints)(load_floats(x + i, k - i) * inverse + kRound) - kRoundBits, k - i);
}
