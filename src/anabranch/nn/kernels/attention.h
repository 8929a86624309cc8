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

// Whether values may be multiplied by weights of zero: blocks of queries share products, and zero times what is not finite is NaN.
template <class X>
bool are_finite(const X* rows, int64_t stride, int64_t count, int64_t D) {
  vec sum{};
  for (int64_t r = 0; r < count; ++r)
    for (int64_t c = 0; c < D; c += VL) sum += load(rows + r * stride + c) * 0.f;
  return total(sum) == 0.f;
}

// y = factor times the sum of weight(s) value(s) over a query's own keys: what follows them is not read, so it reaches no earlier position.
template <class X, class Weight>
void weigh_own(Weight weight, int64_t own, const X* values, int64_t stride, int64_t D, float factor, X* y) {
  for (int64_t c = 0; c < D; c += VL) {
    vec sum{};
    for (int64_t s = 0; s < own; ++s) sum += load(values + s * stride + c) * weight(s);
    store(y + c, sum * factor);
  }
}

template <class Task>
int each_head(const Shape& shape, int threads, Task task) {
  Failure failure;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (int64_t n = 0; n < shape.B * shape.G; ++n) failure.guard([&] { task(n / shape.G, n % shape.G); });
  return failure.status();
}

}  // namespace
