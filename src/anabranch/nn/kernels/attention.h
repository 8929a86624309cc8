// What the kernels of attention share: sizes, where rows are, pieces of softmax. Included by attention.cpp and attention_half.cpp.
// Shapes: B sequences, H query heads, G key heads (each shared by H / G query heads), L queries, S keys, D head width.

#pragma once

#include "failure.h"
#include "matmul.h"

namespace {

template <class X>
struct Heads {  // where a tensor's rows are
  X* data;
  int64_t batch, head, row;
  Heads() = default;
  Heads(void* data, const int64_t* strides) : data((X*)data), batch(strides[0]), head(strides[1]), row(strides[2]) {}
  X* at(int64_t b, int64_t h, int64_t l) const { return data + b * batch + h * head + l * row; }
};

struct Shape {
  int64_t B, H, G, L, S, D;
  float scale;
  int64_t front() const { return S - L; }
};

inline vec counting(int64_t from) {
  vec number;
  for (int i = 0; i < VL; ++i) number[i] = (float)(from + i);
  return number;
}

inline float greatest(vec v) {
  float found = v[0];
  for (int i = 1; i < VL; ++i) found = std::max(found, v[i]);
  return found;
}

template <class Task>
int each_head(const Shape& shape, int threads, Task task) {
  Failure failure;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (int64_t n = 0; n < shape.B * shape.G; ++n) failure.guard([&] { task(n / shape.G, n % shape.G); });
  return failure.status();
}

}  // namespace
