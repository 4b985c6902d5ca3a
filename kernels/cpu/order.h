// In which order a program multiplies its matrices, learnt as it runs.
#pragma once

#include <algorithm>
#include <cstdint>

#include "memory.h"
#include "parallel.h"

namespace ternax {

// A matrix as the threads of a product share it: rows in chunks.
struct Matrix {
  const uint8_t* data = nullptr;
  int64_t rows = 0, row_bytes = 0, chunk = 1;

  // Where thread i begins, no more than half of what its second-level cache holds.
  Stretch beginning(int i, int threads) const {
    static const int64_t most = second_level_bytes() / 2;
    if (!data) return {};
    const int64_t chunks = (rows + chunk - 1) / chunk;
    const int64_t first = range_start(chunks, i, threads) * chunk;
    const int64_t last = std::min(rows, range_start(chunks, i + 1, threads) * chunk);
    return {data + first * row_bytes, std::min((last - first) * row_bytes, most)};
  }
};

// Decoding goes round: what came behind a matrix in one step comes behind it in the next. Each
// caller has a memory of its own. A guess may be wrong or freed: it is only ever prefetched.
class Order {
 public:
  // Notes that `now` is multiplied; returns what was behind it the last time, or no matrix.
  Matrix behind(const Matrix& now) {
    Entry& before = entry(last_);
    before = {last_, now};
    last_ = now.data;
    const Entry& found = entry(now.data);
    return found.matrix == now.data ? found.next : Matrix{};
  }

 private:
  static constexpr int kBits = 10;  // four matrices a layer and the head: enough for 255 layers
  struct Entry {
    const uint8_t* matrix;
    Matrix next;
  };
  Entry& entry(const uint8_t* data) {
    return entries_[(reinterpret_cast<uintptr_t>(data) >> 4) * 0x9e3779b97f4a7c15u >> (64 - kBits)];
  }

  Entry entries_[1 << kBits] = {};
  const uint8_t* last_ = nullptr;
};

}  // namespace ternax
