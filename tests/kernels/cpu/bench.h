// What the checks share: the case in progress, XLA buffers in guarded memory, the pool.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>
#include <vector>

#include "guarded.h"
#include "kernels.cc"
#include "oracle.h"

namespace {

using ternax::kIsas;

char now[512] = "nothing yet";  // the case in progress, said when something dies

void say_case() { std::fprintf(stderr, "\nsanitize: in %s\n", now); }

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "sanitize: %s in %s\n", what, now);
  std::_Exit(1);
}

// An XLA buffer of T in guarded memory.
template <class T, ffi::DataType kType>
struct Array {
  Guarded memory;
  T* data = nullptr;
  int64_t count = 0;
  std::vector<int64_t> dims;
  XLA_FFI_Buffer raw{};

  T* take(std::vector<int64_t> shape, Place place) {
    dims = std::move(shape), count = 1;
    for (int64_t d : dims) count *= d;
    data = reinterpret_cast<T*>(memory.take(count * sizeof(T), sizeof(T), place));
    raw.struct_size = XLA_FFI_Buffer_STRUCT_SIZE;
    raw.dtype = static_cast<XLA_FFI_DataType>(kType);
    raw.data = count ? data : nullptr;  // as XLA may pass what is empty
    raw.rank = dims.size(), raw.dims = dims.data();
    return data;
  }
  // The same, every byte `byte`.
  T* take(std::vector<int64_t> shape, Place place, int byte) {
    take(std::move(shape), place);
    return clear(byte);
  }
  // The same, filled with numbers.
  T* take(std::vector<int64_t> shape, Place place, Random& random) {
    take(std::move(shape), place);
    for (int64_t i = 0; i < count; i++) data[i] = random.number();
    return data;
  }
  // The same, with these values.
  template <class V>
  ffi::AnyBuffer put(std::vector<int64_t> shape, Place place, const std::vector<V>& values) {
    take(std::move(shape), place);
    std::copy(values.begin(), values.end(), data);
    return ffi::AnyBuffer(&raw);
  }
  T* clear(int byte) { return static_cast<T*>(std::memset(data, byte, count * sizeof(T))); }
  ffi::Buffer<kType> buffer() const { return ffi::Buffer<kType>(&raw); }
};

// All that one call may touch, made once.
struct Bench {
  Pool pool{7};
  Array<int8_t, ffi::S8> x;
  Array<float, ffi::F32> x_scale, scale, zero, y, k_scale, v_scale, out;
  Array<float, ffi::F32> qkv, given, norm, residual, memory, cosine, sine;
  Array<uint8_t, ffi::U8> data;
  Array<int32_t, ffi::S32> layer, acc, start, length;
  Array<int8_t, ffi::S8> k8, v8;
  Array<uint16_t, ffi::U16> k16, v16;
  Array<float, ffi::F32> k32, v32;
};

const char* kModeName[] = {"threads", "inline", "late"};

// A place for the next buffer.
struct Anywhere {
  Random& random;
  Place operator()() const { return static_cast<Place>(random.below(kPlaces)); }
};

}  // namespace
