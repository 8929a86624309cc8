// Passes over rows of activations that a library makes of a dozen operations, each through memory: RMSNorm, rotary positions and weighted
// sums, forward and backward. C ABI; compiled and loaded by kernels/__init__.py.
//
// Shapes: N rows, D width, a multiple of 16; B sequences, H heads, L positions, W head width, a multiple of 32; C parts of a sum.
//
// Memory is what costs: a row is read once and its second use finds it in the cache. No number depends on how many threads there are.

#include "failure.h"
#include "matmul.h"

namespace {

constexpr int64_t SMALL = 1 << 14;  // elements; below, a second thread costs more than it does
constexpr int64_t BLOCK = 64;       // rows whose share of a weight's gradient is summed in one place

template <class T>
void norm_forward(const T* x, const float* weight, T* y, float* scale, int64_t N, int64_t D, float eps, int threads) {
#pragma omp parallel for num_threads(threads) if (N * D > SMALL) schedule(static)
  for (int64_t n = 0; n < N; ++n) {
    const T* row = x + n * D;
    vec sum{};
    for (int64_t k = 0; k < D; k += VL) sum += load(row + k) * load(row + k);
    float r = 1.f / std::sqrt(total(sum) / D + eps);
    for (int64_t k = 0; k < D; k += VL) store(y + n * D + k, load(row + k) * r * load(weight + k));
    if (scale) scale[n] = r;
  }
}

// dx = r g w - x r^3 mean(g w x); dweight = sum over rows of g x r, block by block.
template <class T>
void norm_backward(const T* g, const T* x, const float* weight, const float* scale, T* dx, float* dweight, int64_t N, int64_t D,
                   int threads) {
  const int64_t blocks = (N + BLOCK - 1) / BLOCK;
  std::vector<float> parts(blocks * D);
#pragma omp parallel num_threads(threads) if (N * D > SMALL)
  {
#pragma omp for schedule(static)
    for (int64_t block = 0; block < blocks; ++block) {
      float* part = parts.data() + block * D;
      for (int64_t n = block * BLOCK; n < std::min(N, (block + 1) * BLOCK); ++n) {
        const T *row = x + n * D, *gradient = g + n * D;
        const float r = scale[n];
        vec sum{};
        for (int64_t k = 0; k < D; k += VL) {
          vec product = load(gradient + k) * load(row + k);
          sum += product * load(weight + k);
          store(part + k, load(part + k) + product * r);
        }
        const float inner = total(sum) / D * r * r * r;
        for (int64_t k = 0; k < D; k += VL)
          store(dx + n * D + k, load(gradient + k) * load(weight + k) * r - load(row + k) * inner);
      }
    }
#pragma omp for schedule(static)
    for (int64_t k = 0; k < D; k += VL) {
      vec sum{};
      for (int64_t block = 0; block < blocks; ++block) sum += load(parts.data() + block * D + k);
      store(dweight + k, sum);
    }
  }
}

struct Strides {
  int64_t sequence, head, position;
};

template <class T>
void turn(const T* x, Strides from, T* y, Strides to, const T* cos, Strides of_cos, const T* sin, Strides of_sin, int64_t B, int64_t H,
          int64_t L, int64_t W, float sign, int threads) {
#pragma omp parallel for collapse(2) num_threads(threads) if (B * H * L * W > SMALL) schedule(static)
  for (int64_t b = 0; b < B; ++b)
    for (int64_t l = 0; l < L; ++l) {
      const T *c = cos + b * of_cos.sequence + l * of_cos.position, *s = sin + b * of_sin.sequence + l * of_sin.position;
      for (int64_t h = 0; h < H; ++h) {
        const T* row = x + b * from.sequence + h * from.head + l * from.position;
        T* out = y + b * to.sequence + h * to.head + l * to.position;
        for (int64_t k = 0; k < W / 2; k += VL) {  // both halves of cos and sin are the same
          vec left = load(row + k), right = load(row + W / 2 + k), turned = load(s + k) * sign;
          store(out + k, left * load(c + k) - right * turned);
          store(out + W / 2 + k, right * load(c + k) + left * turned);
        }
      }
    }
}

// y_n = sum over c of weight[n][c] part_c[n]
template <class T>
void sum_forward(const T* const* part, const float* weight, T* y, int64_t N, int64_t D, int64_t C, int threads) {
#pragma omp parallel for num_threads(threads) if (N * D > SMALL) schedule(static)
  for (int64_t n = 0; n < N; ++n)
    for (int64_t k = n * D; k < (n + 1) * D; k += VL) {
      vec sum{};
      for (int64_t c = 0; c < C; ++c) sum += load(part[c] + k) * weight[n * C + c];
      store(y + k, sum);
    }
}

template <class T>
void sum_backward(const T* g, const T* const* part, const float* weight, T* const* dpart, float* dweight, int64_t N, int64_t D,
                  int64_t C, int threads) {
#pragma omp parallel for num_threads(threads) if (N * D > SMALL) schedule(static)
  for (int64_t n = 0; n < N; ++n)
    for (int64_t c = 0; c < C; ++c) {
      vec sum{};
      for (int64_t k = n * D; k < (n + 1) * D; k += VL) {
        vec gradient = load(g + k);
        sum += gradient * load(part[c] + k);
        store(dpart[c] + k, gradient * weight[n * C + c]);
      }
      dweight[n * C + c] = total(sum);
    }
}

template <class Call>
void of_type(int half, Call call) {
  if (half)
    call((bf16*)nullptr);
  else
    call((float*)nullptr);
}

}  // namespace

// half: items are bfloat16, else float32. A null scale is not kept.
extern "C" void anabranch_norm_forward(int half, const void* x, const float* weight, void* y, float* scale, int64_t N, int64_t D,
                                       float eps, int threads) {
  of_type(half, [&](auto* type) {
    using T = decltype(type);
    norm_forward((std::remove_pointer_t<T> const*)x, weight, (T)y, scale, N, D, eps, threads);
  });
}

extern "C" int anabranch_norm_backward(int half, const void* gradient, const void* x, const float* weight, const float* scale,
                                       void* dx, float* dweight, int64_t N, int64_t D, int threads) {
  return status_of([&] {
    of_type(half, [&](auto* type) {
      using T = decltype(type);
      norm_backward((std::remove_pointer_t<T> const*)gradient, (std::remove_pointer_t<T> const*)x, weight, scale, (T)dx, dweight, N, D,
                    threads);
    });
    return DONE;
  });
}

// strides: of x, y, cos and sin, each over sequences, heads and positions.
extern "C" void anabranch_turn(int half, const void* x, void* y, const void* cos, const void* sin, const int64_t* strides, int64_t B,
                               int64_t H, int64_t L, int64_t W, float sign, int threads) {
  of_type(half, [&](auto* type) {
    using T = decltype(type);
    using C = std::remove_pointer_t<T> const*;
    auto of = [&](int tensor) { return Strides{strides[3 * tensor], strides[3 * tensor + 1], strides[3 * tensor + 2]}; };
    turn((C)x, of(0), (T)y, of(1), (C)cos, of(2), (C)sin, of(3), B, H, L, W, sign, threads);
  });
}

extern "C" void anabranch_sum_forward(int half, const void* part, const float* weight, void* y, int64_t N, int64_t D, int64_t C,
                                      int threads) {
  of_type(half, [&](auto* type) {
    using T = decltype(type);
    sum_forward((std::remove_pointer_t<T> const* const*)part, weight, (T)y, N, D, C, threads);
  });
}

extern "C" void anabranch_sum_backward(int half, const void* gradient, const void* part, const float* weight, void* dpart,
                                       float* dweight, int64_t N, int64_t D, int64_t C, int threads) {
  of_type(half, [&](auto* type) {
    using T = decltype(type);
    using P = std::remove_pointer_t<T> const*;
    sum_backward((P)gradient, (P const*)part, weight, (T const*)dpart, dweight, N, D, C, threads);
  });
}
