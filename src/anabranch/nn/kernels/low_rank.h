// Products of rows with low-rank adapters, y += B (A x), whose matrices lie as they are kept: float32 or bfloat16, summed in float32.
// Included by the kernels beside.
//
// A row's numbers are summed in one order, whatever rows, ranks and columns are computed beside it: along the inputs in vectors and then
// across their lanes, and to an output rank after rank. So they depend neither on the batch nor on the threads.

#pragma once

#include "packed.h"

namespace {

constexpr int LOW = 4;               // rows and ranks of a block
constexpr int64_t LOW_ROWS = 32;     // rows that share the block of ranks that was read
constexpr int PANEL_ROWS = 8;

inline float number(const float* p) { return *p; }
inline float number(const bf16* p) { return as<float>((uint32_t)p->bits << 16); }

// As for vectors, see packed.h.
inline float fused(float a, float b, float c) {
#if defined(__FMA__)
  return __builtin_fmaf(a, b, c);
#else
  return c + a * b;
#endif
}

template <int COUNT>
inline void totals_of(const vec* sums, float* to) {
  for (int i = 0; i < COUNT; i += VL) {
    vec part[VL];
    for (int j = 0; j < VL; ++j) part[j] = i + j < COUNT ? sums[i + j] : vec{};
    store(to + i, totals(part));
  }
}

// to[i][j] = x_i . a_j of M rows and N ranks, `depth` long.
template <int M, int N, class X, class W>
void low_block(const X* const* x, const W* a, int64_t depth, float* const* to) {
  vec sum[M * N] = {};
  int64_t k = 0;
  for (; k + VL <= depth; k += VL) {
    vec row[M];
#pragma GCC unroll 4
    for (int i = 0; i < M; ++i) row[i] = load(x[i] + k);
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) {
      vec along = load(a + j * depth + k);
      // Of few rows, memory is what costs, and these are short: what is next is asked for, which the machine would see too late.
      if constexpr (M <= 2) __builtin_prefetch(a + (j + N) * depth + k, 0, 2);
#pragma GCC unroll 4
      for (int i = 0; i < M; ++i) sum[i * N + j] = fused(row[i], along, sum[i * N + j]);
    }
  }
  float made[(M * N + VL - 1) / VL * VL];
  totals_of<M * N>(sum, made);
  for (int i = 0; i < M; ++i)
    for (int j = 0; j < N; ++j) {
      float one = made[i * N + j];
      for (int64_t rest = k; rest < depth; ++rest) one = fused(number(x[i] + rest), number(a + j * depth + rest), one);
      to[i][j] = one;
    }
}

// y_i += sum_j h_i[j] b_j of M rows and N ranks, `width` columns; rows of b are `size` apart.
template <int M, int N, class W>
void high_block(const float* const* h, const W* b, int64_t size, int64_t width, float* const* y) {
  vec factor[M][N];
  for (int i = 0; i < M; ++i)
    for (int j = 0; j < N; ++j) factor[i][j] = spread(h[i][j]);
  int64_t c = 0;
  for (; c + VL <= width; c += VL) {
    vec along[N];
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) {
      along[j] = load(b + j * size + c);
      if constexpr (M <= 2) __builtin_prefetch(b + (j + N) * size + c, 0, 2);
    }
#pragma GCC unroll 4
    for (int i = 0; i < M; ++i) {
      vec one = load(y[i] + c);
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) one = fused(factor[i][j], along[j], one);
      store(y[i] + c, one);
    }
  }
  for (; c < width; ++c)
    for (int i = 0; i < M; ++i)
      for (int j = 0; j < N; ++j) y[i][c] = fused(h[i][j], number(b + j * size + c), y[i][c]);
}

// y_i += sum_r h_i[r] panel[r], of M rows and NR columns; rows of the panel are `stride` apart.
template <int M>
void panel_block(const float* const* h, const float* panel, int64_t stride, int64_t ranks, float* const* y) {
  vec sum[M][2];
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i) sum[i][0] = load(y[i]), sum[i][1] = load(y[i] + VL);
  for (int64_t r = 0; r < ranks; ++r, panel += stride) {
    vec first = load(panel), second = load(panel + VL);
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) {
      vec one = spread(h[i][r]);
      sum[i][0] = fused(one, first, sum[i][0]);
      sum[i][1] = fused(one, second, sum[i][1]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i) store(y[i], sum[i][0]), store(y[i] + VL, sum[i][1]);
}

// call(first, M) with M rows known when it is compiled: most at a time.
template <int MOST, class Call>
inline void in_blocks(int64_t count, Call call) {
  int64_t i = 0;
  for (; i + MOST <= count; i += MOST) call(i, std::integral_constant<int, MOST>());
  if constexpr (MOST > 1)
    if (i < count) in_blocks<MOST / 2>(count - i, [&](int64_t from, auto m) { call(i + from, m); });
}

// to(i)[r] = row(i) . a_r of `count` rows and `ranks` ranks.
template <class W, class Row, class To>
void low_product(const W* a, int64_t ranks, int64_t depth, int64_t count, Row row, To to) {
  using X = std::remove_pointer_t<decltype(row(0))>;
  in_blocks<LOW>(count, [&](int64_t i, auto m) {
    constexpr int M = decltype(m)::value;
    X* rows[M];
    for (int j = 0; j < M; ++j) rows[j] = row(i + j);
    // Of ranks that are left over each alone.
    for (int64_t r = 0; r < ranks;) {
      float* made[M];
      for (int j = 0; j < M; ++j) made[j] = to(i + j) + r;
      if (ranks - r >= LOW)
        low_block<M, LOW>(rows, a + r * depth, depth, made), r += LOW;
      else
        low_block<M, 1>(rows, a + r * depth, depth, made), r += 1;
    }
  });
}

// y(i) += sum_r h(i)[r] b_r of `count` rows, `ranks` ranks and `width` columns; rows of b are `size` apart.
template <class W, class Low, class To>
void high_product(const W* b, int64_t ranks, int64_t size, int64_t width, int64_t count, Low h, To y) {
  in_blocks<LOW>(count, [&](int64_t i, auto m) {
    constexpr int M = decltype(m)::value;
    float* to[M];
    for (int j = 0; j < M; ++j) to[j] = y(i + j);
    for (int64_t r = 0; r < ranks;) {
      const float* low[M];
      for (int j = 0; j < M; ++j) low[j] = h(i + j) + r;
      if (ranks - r >= LOW)
        high_block<M, LOW>(low, b + r * size, size, width, to), r += LOW;
      else
        high_block<M, 1>(low, b + r * size, size, width, to), r += 1;
    }
  });
}

// Tasks that all threads go through, of which each takes those that begin within its share of their cost.
class Shares {
 public:
  Shares(int64_t cost, int thread, int threads) : own(share_of(cost, thread, threads)) {}
  bool takes(int64_t cost) {
    const int64_t begin = at;
    at += cost;
    return begin >= own.begin && begin < own.end;
  }

 private:
  Range own;
  int64_t at = 0;
};

// What a block of ranks costs on so many rows.
inline int64_t cost_of(int64_t rows) { return (rows + LOW - 1) / LOW; }

// call(first rank, ranks, first row, rows) of each task of a first product with `ranks` ranks on `count` rows.
template <class Call>
inline void low_tasks(int64_t ranks, int64_t count, Call call) {
  for (int64_t i = 0; i < count; i += LOW_ROWS)
    for (int64_t r = 0; r < ranks; r += LOW) call(r, std::min<int64_t>(LOW, ranks - r), i, std::min(LOW_ROWS, count - i));
}

}  // namespace
