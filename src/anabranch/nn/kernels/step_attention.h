// Attention of one token over blocks of keys and values, for few queries per sequence. Included by decode.cpp.
// Shapes: H query heads, G key heads (each shared by H / G query heads), W head width.

#pragma once

#include "step.h"

namespace {

constexpr int CHUNK = 64;  // keys that are scored at a time

// totals of VL vectors, that of v[l] in lane l
template <int STEP, bool HIGH>
struct Neighbour {
  static constexpr int at(int lane) {
    bool odd = lane & STEP;
    return HIGH ? (odd ? lane + VL : lane + STEP) : (odd ? lane - STEP + VL : lane);
  }
};
template <int STEP = 1>
inline vec totals(vec* v) {
#pragma GCC unroll 8
  for (int i = 0; i < VL / (2 * STEP); ++i) {
    vec a = v[2 * i], b = v[2 * i + 1];
    v[i] = picked<Neighbour<STEP, false>>(a, b) + picked<Neighbour<STEP, true>>(a, b);
  }
  if constexpr (2 * STEP < VL)
    return totals<2 * STEP>(v);
  else
    return v[0];
}

// ---- attention of one token and one key head ----

struct Head {  // the queries of one key head, scaled, and what has been seen so far
  const float* query[MOST_GROUP];
  float* y[MOST_GROUP];
  float most[MOST_GROUP], sum[MOST_GROUP];
};

void score(const Head& head, int queries, const float* const* keys, int count, int64_t W, float* scores) {
  for (int first = 0; first < count; first += VL)
    for (int h = 0; h < queries; ++h) {
      vec part[VL];
#pragma GCC unroll 16
      for (int i = 0; i < VL; ++i) part[i] = vec{};
      for (int64_t c = 0; c < W; c += VL) {
        vec q = load(head.query[h] + c);
#pragma GCC unroll 16
        for (int i = 0; i < VL; ++i) part[i] = fused(q, load(keys[first + i] + c), part[i]);
      }
      store(scores + h * CHUNK + first, totals(part));
    }
}

// y = y * shrink + scores . values
void gather_values(float* y, float shrink, const float* weight, const float* const* values, int count, int64_t W) {
  int64_t c = 0;
  for (; c + 4 * VL <= W; c += 4 * VL) {
    vec sum[4];
    for (int v = 0; v < 4; ++v) sum[v] = load(y + c + v * VL) * shrink;
    for (int i = 0; i < count; ++i) {
      vec p = spread(weight[i]);
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) sum[v] = fused(p, load(values[i] + c + v * VL), sum[v]);
    }
    for (int v = 0; v < 4; ++v) store(y + c + v * VL, sum[v]);
  }
  for (; c < W; c += VL) {
    vec sum = load(y + c) * shrink;
    for (int i = 0; i < count; ++i) sum = fused(spread(weight[i]), load(values[i] + c), sum);
    store(y + c, sum);
  }
}

// Rows of the pool as floats: where they lie, or copied. Behind `count` the last one again, up to whole vectors.
void point(const char* pool, const int64_t* slots, int count, int64_t row_bytes, int64_t W, bool half, float* copies, const float** rows) {
  for (int i = 0; i < count; ++i) {
    const char* from = pool + slots[i] * row_bytes;
    rows[i] = half ? copies + i * W : (const float*)from;
    if (half)
      for (int64_t c = 0; c < W; c += VL) store(copies + i * W + c, load((const bf16*)from + c));
  }
  for (int i = count; i < (count + VL - 1) / VL * VL; ++i) rows[i] = rows[count - 1];
}

// Scores to weights of what has been seen so far; returns by how much the earlier sums shrink.
float soften(Head& head, int h, float* scores, int count) {
  const int whole = (count + VL - 1) / VL * VL;
  for (int i = count; i < whole; ++i) scores[i] = -INFINITY;
  vec top = load(scores);
  for (int i = VL; i < whole; i += VL) top = load(scores + i) > top ? load(scores + i) : top;
  float most = head.most[h];
  for (int i = 0; i < VL; ++i) most = std::max(most, top[i]);
  float shrink = std::exp(head.most[h] - most);
  vec sum{};
  for (int i = 0; i < whole; i += VL) {
    vec s = load(scores + i), e = exponential(s - most);
    e = s == -INFINITY ? vec{} : e;
    store(scores + i, e);
    sum += e;
  }
  head.sum[h] = head.sum[h] * shrink + total(sum);
  head.most[h] = most;
  return shrink;
}

// One token's key heads from `begin` to `end`; chunk by chunk, so that a position's heads, which lie together, are read together.
void attend(const Model& m, const Block& block, const int32_t* table, int64_t context, int64_t begin, int64_t end, Head* heads,
            Scratch& scratch) {
  const int64_t item = m.half_store ? 2 : 4, row_bytes = m.G * m.W * item;
  const int queries = (int)(m.H / m.G);
  float* copies = scratch.get<float>(SPARE, CHUNK * m.W);
  alignas(64) float scores[MOST_GROUP * CHUNK];
  const float* rows[CHUNK];
  int64_t slots[CHUNK];
  for (int64_t g = begin; g < end; ++g)
    for (int h = 0; h < queries; ++h) {
      heads[g].most[h] = -INFINITY;
      heads[g].sum[h] = 0.f;
      memset(heads[g].y[h], 0, m.W * sizeof(float));
    }
  for (int64_t first = 0; first < context; first += CHUNK) {
    int count = (int)std::min<int64_t>(CHUNK, context - first);
    for (int i = 0; i < count; ++i) {
      int64_t p = first + i;
      slots[i] = table[p / m.block_tokens] * m.block_tokens + p % m.block_tokens;
      for (int64_t c = 0; c < (end - begin) * m.W * item; c += 64) __builtin_prefetch(block.value + slots[i] * row_bytes + begin * m.W * item + c);
    }
    for (int64_t g = begin; g < end; ++g) {
      Head& head = heads[g];
      point(block.key + g * m.W * item, slots, count, row_bytes, m.W, m.half_store, copies, rows);
      score(head, queries, rows, count, m.W, scores);
      float shrink[MOST_GROUP];
      for (int h = 0; h < queries; ++h) shrink[h] = soften(head, h, scores + h * CHUNK, count);
      point(block.value + g * m.W * item, slots, count, row_bytes, m.W, m.half_store, copies, rows);
      for (int h = 0; h < queries; ++h) gather_values(head.y[h], shrink[h], scores + h * CHUNK, rows, count, m.W);
    }
  }
  for (int64_t g = begin; g < end; ++g)
    for (int h = 0; h < queries; ++h)
      for (int64_t c = 0; c < m.W; c += VL) store(heads[g].y[h] + c, load(heads[g].y[h] + c) / heads[g].sum[h]);
}

}  // namespace
