// Attention over blocks of keys and values: of one token, and of a run of tokens of one sequence, with the same bits. Included by decode.cpp.
// Shapes: H query heads, G key heads (each shared by H / G query heads), W head width.

#pragma once

#include "step.h"
#include "step_work.h"

namespace {

// Whether a head has anything to do for a token.
inline bool is_on(const Model& m, const Block& block, const Work& w, int64_t t, int64_t h) {
  return !block.heads.pair || w.scale[t * m.H + h] != 0.f;
}

constexpr int CHUNK = 64;  // keys that are scored at a time
constexpr int RUN = 16;    // tokens of a run, at most: chunks of keys are unpacked once for all of them
constexpr int LEAST_RUN = 4;
constexpr int BESIDE = 4;  // queries that go over a chunk together

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
  int queries;
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
float soften(float& most_so_far, float& sum_so_far, float* scores, int count) {
  const int whole = (count + VL - 1) / VL * VL;
  for (int i = count; i < whole; ++i) scores[i] = -INFINITY;
  vec top = load(scores);
  for (int i = VL; i < whole; i += VL) top = load(scores + i) > top ? load(scores + i) : top;
  float most = most_so_far;
  for (int i = 0; i < VL; ++i) most = std::max(most, top[i]);
  float shrink = std::exp(most_so_far - most);
  vec sum{};
  for (int i = 0; i < whole; i += VL) {
    vec s = load(scores + i), e = exponential(s - most);
    e = s == -INFINITY ? vec{} : e;
    store(scores + i, e);
    sum += e;
  }
  sum_so_far = sum_so_far * shrink + total(sum);
  most_so_far = most;
  return shrink;
}

// One token's key heads from `begin` to `end`; chunk by chunk, so that a position's heads, which lie together, are read together.
void attend(const Model& m, const Block& block, const int32_t* table, int64_t context, int64_t begin, int64_t end, Head* heads,
            Scratch& scratch) {
  const int64_t item = m.half_store ? 2 : 4, row_bytes = m.G * m.W * item;
  float* copies = scratch.get<float>(SPARE, CHUNK * m.W);
  alignas(64) float scores[MOST_GROUP * CHUNK];
  const float* rows[CHUNK];
  int64_t slots[CHUNK];
  bool any = false;
  for (int64_t g = begin; g < end; ++g) {
    any |= heads[g].queries > 0;
    for (int h = 0; h < heads[g].queries; ++h) {
      heads[g].most[h] = -INFINITY;
      heads[g].sum[h] = 0.f;
      memset(heads[g].y[h], 0, m.W * sizeof(float));
    }
  }
  if (!any) return;
  for (int64_t first = 0; first < context; first += CHUNK) {
    int count = (int)std::min<int64_t>(CHUNK, context - first);
    for (int i = 0; i < count; ++i) {
      int64_t p = first + i;
      slots[i] = table[p / m.block_tokens] * m.block_tokens + p % m.block_tokens;
      for (int64_t c = 0; c < (end - begin) * m.W * item; c += 64) __builtin_prefetch(block.value + slots[i] * row_bytes + begin * m.W * item + c);
    }
    for (int64_t g = begin; g < end; ++g) {
      Head& head = heads[g];
      const int queries = head.queries;
      if (!queries) continue;
      point(block.key + g * m.W * item, slots, count, row_bytes, m.W, m.half_store, copies, rows);
      score(head, queries, rows, count, m.W, scores);
      float shrink[MOST_GROUP];
      for (int h = 0; h < queries; ++h) shrink[h] = soften(head.most[h], head.sum[h], scores + h * CHUNK, count);
      point(block.value + g * m.W * item, slots, count, row_bytes, m.W, m.half_store, copies, rows);
      for (int h = 0; h < queries; ++h) gather_values(head.y[h], shrink[h], scores + h * CHUNK, rows, count, m.W);
    }
  }
  for (int64_t g = begin; g < end; ++g)
    for (int h = 0; h < heads[g].queries; ++h)
      for (int64_t c = 0; c < m.W; c += VL) store(heads[g].y[h] + c, load(heads[g].y[h] + c) / heads[g].sum[h]);
}

// ---- a run of tokens and one key head ----

struct Keys {  // a chunk for all queries of a run: keys by VL of them with their dimensions in columns, and values, both as floats
  float *turned, *values;
  int64_t W;
  Keys(Scratch& scratch, int64_t W) : turned(scratch.get<float>(SPARE, floats(W))), values(turned + CHUNK * W), W(W) {}
  static int64_t floats(int64_t W) { return (2 * CHUNK + VL) * W; }

  void unpack(const Model& m, const Block& block, const int64_t* slots, int count, int64_t g) const {
    const int64_t item = m.half_store ? 2 : 4, row_bytes = m.G * W * item, from = g * W * item;
    float* spare = values + CHUNK * W;
    for (int first = 0; first < count; first += VL) {
      for (int i = 0; i < VL; ++i) copy(block.key + slots[std::min(first + i, count - 1)] * row_bytes + from, m.half_store, spare + i * W);
      transpose((const uint32_t*)spare, W, W, (uint32_t*)turned + first * W, VL);
    }
    for (int i = 0; i < count; ++i) copy(block.value + slots[i] * row_bytes + from, m.half_store, values + i * W);
  }

 private:
  void copy(const char* row, bool half, float* to) const {
    if (!half) {
      memcpy(to, row, W * sizeof(float));
      return;
    }
    for (int64_t c = 0; c < W; c += VL) store(to + c, load((const bf16*)row + c));
  }
};

struct Query {  // of one token and one query head
  const float* query;
  float *y, most, sum;
  int64_t context;
};

// The products of LANES dimensions of each VL, from `lane` on, added up in the order that `totals` adds lanes in.
template <int LANES, int M>
inline void add_lanes(const float* const* query, const float* turned, int64_t W, int lane, vec* sum) {
  if constexpr (LANES == 1) {
#pragma GCC unroll 4
    for (int i = 0; i < M; ++i) sum[i] = vec{};
    for (int64_t c = lane; c < W; c += VL) {
      vec key = load(turned + c * VL);
#pragma GCC unroll 4
      for (int i = 0; i < M; ++i) sum[i] = fused(spread(query[i][c]), key, sum[i]);
    }
  } else {
    vec other[M];
    add_lanes<LANES / 2, M>(query, turned, W, lane, sum);
    add_lanes<LANES / 2, M>(query, turned, W, lane + LANES / 2, other);
#pragma GCC unroll 4
    for (int i = 0; i < M; ++i) sum[i] += other[i];
  }
}

// y = y * shrink + weights . values, each query over its own count of them.
template <int M, int WIDTH>
inline void gather_values_of(Query* const* query, const float* shrink, const float* weight, const float* values, const int* count, int64_t W) {
  const int all = *std::min_element(count, count + M);
  for (int64_t c = 0; c < W; c += WIDTH * VL) {
    vec sum[M][WIDTH];
#pragma GCC unroll 4
    for (int i = 0; i < M; ++i)
      for (int v = 0; v < WIDTH; ++v) sum[i][v] = load(query[i]->y + c + v * VL) * shrink[i];
    for (int k = 0; k < all; ++k) {
      vec value[WIDTH];
      for (int v = 0; v < WIDTH; ++v) value[v] = load(values + k * W + c + v * VL);
#pragma GCC unroll 4
      for (int i = 0; i < M; ++i)
        for (int v = 0; v < WIDTH; ++v) sum[i][v] = fused(spread(weight[i * CHUNK + k]), value[v], sum[i][v]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < M; ++i) {
      for (int k = all; k < count[i]; ++k)
        for (int v = 0; v < WIDTH; ++v) sum[i][v] = fused(spread(weight[i * CHUNK + k]), load(values + k * W + c + v * VL), sum[i][v]);
      for (int v = 0; v < WIDTH; ++v) store(query[i]->y + c + v * VL, sum[i][v]);
    }
  }
}

// M queries over the chunk of keys from position `first` on.
template <int M>
void attend_chunk(Query* const* query, const Keys& keys, int64_t first) {
  alignas(64) float scores[M * CHUNK];
  const float* of[M];
  int count[M];
  float shrink[M];
  for (int i = 0; i < M; ++i) {
    of[i] = query[i]->query;
    count[i] = (int)std::min<int64_t>(CHUNK, query[i]->context - first);
  }
  const int most = *std::max_element(count, count + M);
  for (int key = 0; key < most; key += VL) {
    vec sum[M];
    add_lanes<VL, M>(of, keys.turned + key * keys.W, keys.W, 0, sum);
    for (int i = 0; i < M; ++i) store(scores + i * CHUNK + key, sum[i]);
  }
  for (int i = 0; i < M; ++i) shrink[i] = soften(query[i]->most, query[i]->sum, scores + i * CHUNK, count[i]);
  auto gather = keys.W % (2 * VL) ? gather_values_of<M, 1> : gather_values_of<M, 2>;
  gather(query, shrink, scores, keys.values, count, keys.W);
}

// `count` tokens from row `t` on, which follow one another in a sequence, and key head g.
void attend_run(const Model& m, const Block& block, const Work& w, int64_t t, int64_t count, int64_t g, Query* queries, Scratch& scratch) {
  const int64_t per = m.H / m.G, Q = m.H * m.W, N = Q + 2 * m.G * m.W;
  const Keys keys(scratch, m.W);
  int64_t slots[CHUNK], made = 0, begin = 0;
  for (int64_t i = t; i < t + count; ++i)
    for (int64_t h = g * per; h < (g + 1) * per; ++h) {
      memset(w.y + i * Q + h * m.W, 0, m.W * sizeof(float));
      if (!is_on(m, block, w, i, h)) continue;
      queries[made++] = {w.qkv + i * N + h * m.W, w.y + i * Q + h * m.W, -INFINITY, 0.f, w.context[i]};
    }
  if (!made) return;
  const int64_t last = queries[made - 1].context;
  for (int64_t first = 0; first < last; first += CHUNK) {
    int here = (int)std::min<int64_t>(CHUNK, last - first);
    for (int i = 0; i < here; ++i) slots[i] = w.table[t][(first + i) / m.block_tokens] * m.block_tokens + (first + i) % m.block_tokens;
    keys.unpack(m, block, slots, here, g);
    while (queries[begin].context <= first) ++begin;  // their last key has been
    Query* beside[BESIDE];
    for (int64_t q = begin; q < made;) {
      const bool many = q + BESIDE <= made;
      for (int i = 0; i < (many ? BESIDE : 1); ++i) beside[i] = queries + q + i;
      many ? attend_chunk<BESIDE>(beside, keys, first) : attend_chunk<1>(beside, keys, first);
      q += many ? BESIDE : 1;
    }
  }
  for (int64_t q = 0; q < made; ++q)
    for (int64_t c = 0; c < m.W; c += VL) store(queries[q].y + c, load(queries[q].y + c) / queries[q].sum);
}

}  // namespace
