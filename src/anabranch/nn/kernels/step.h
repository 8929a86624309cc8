// What a compiled step is told of a model and of its tokens, and the small pieces of a layer. Included by decode.cpp.
// Shapes: T tokens, D width, H query heads, G key heads, W head width, F hidden width, E experts, K per token, P width of a router's state.

#pragma once

#include "packed.h"

namespace {

constexpr int MOST_GROUP = 16, MOST_WIDTH = 256;

struct Recurrence {  // a gated recurrent unit before the router's matrix; mirrored by serving/fast/layout.py, as is all below
  Matrix projector, input, hidden;         // float32: [P, D], [3 P, P] of r, z, n, the same; rows 0 for none
  const float *input_bias, *hidden_bias;   // [3 P]
  int64_t hands_on;                        // whether the next router goes on from this one's state
};

struct Experts {
  const float* router;     // [E, D], or [E, P] behind a recurrence; null for a dense layer
  const float* bias;       // [E], for the choice alone; null for none
  const float* gate;       // [D], of the shared experts; null for none
  const float* shift;      // [D], added to what the layer sees; null for none
  Recurrence recurrence;
  Matrix w13, w2;          // stacks, of slots where experts come when they are wanted
  Matrix shared13, shared2;  // rows 0 for none
  int64_t count, top_k, activation, normalize;
  float scale;
  int32_t number;  // among the routed layers
};

struct Loops {  // of a feed-forward used wide and deep (VersatileFFN)
  const float* gate;     // [most, D], of the loops; null for any other feed-forward
  const int32_t* first;  // [E], first hidden unit of each virtual expert
  int64_t most, width;   // loops, hidden units of a virtual expert
  float threshold;       // a share of the width path up to this counts as none
};

struct Block {  // without attention (qkv of no rows) it is one more pass over the layer before
  const float *attention_norm, *feed_forward_norm;
  const float *qkv_bias, *out_bias, *q_norm, *k_norm;  // null for none
  char *key, *value;                                   // [slots, G, W]
  Matrix qkv, out, w13, w2;                            // the last two of a dense layer
  Experts experts;                                     // with `loops` the router alone, of virtual experts
  Loops loops;
};

enum Site { QKV, OUT, GATE, UP, DOWN, SITES };  // the matrices of a layer that adapters may add to; gate and up are of a dense layer

struct Part {  // scale B A x of an adapter, added to `size` outputs from `start` on
  const float *a, *b;  // [rank, inputs], [rank, size]: B lies transposed
  int64_t rank, start, size;
  float scale;
  int32_t unused;
};

struct Adapter {
  const Part* parts;
  const int32_t* first;  // [layers * SITES + 1]: of each matrix the first of its parts
};

struct Model {
  int64_t layers, D, H, G, W, F, block_tokens, slots;  // F: the widest hidden layer
  int64_t most_experts, most_top_k, state;  // state: P, 0 without recurrences
  int64_t rows, most_loops;                 // rows: of experts or paths, the most per token
  float norm_eps, qk_eps, clip;  // clip 0 for none
  int32_t qk_norm;               // 0 none, 1 per head, 2 over the whole width
  int32_t half_store;            // keys and values are bfloat16
  const float* last_norm;
  const Block* blocks;
};

struct Step {
  int64_t T;
  const int64_t* sequence;  // [N][4]: first row, rows, past, first entry of the table
  int64_t sequences;
  const int32_t* table;
  int64_t table_length;
  const float *cos, *sin;  // [T, W]
  float* x;                // [T, D], embedded tokens in, normed hidden states out
  int32_t* routes;         // [routed layers, T, most_top_k] or null
  char* memory;            // of anabranch_decode_bytes, kept from one part of a step to the next
  const int32_t* use_first;        // [T + 1]: of each token the first of its uses of adapters; null where nobody uses any
  const Adapter* const* adapters;  // of each use
  const float* use_weight;         // of each use
};

// ---- small pieces ----

void norm_row(const float* x, const float* weight, int64_t n, float eps, float* to) {
  vec sum{};
  int64_t k = 0;
  for (; k + VL <= n; k += VL) sum = fused(load(x + k), load(x + k), sum);
  float all = total(sum);
  for (; k < n; ++k) all += x[k] * x[k];
  float scale = 1.f / std::sqrt(all / n + eps);
  for (k = 0; k + VL <= n; k += VL) store(to + k, load(x + k) * scale * load(weight + k));
  for (; k < n; ++k) to[k] = x[k] * scale * weight[k];
}

void turn_row(float* x, const float* cos, const float* sin, int64_t W) {
  int64_t half = W / 2;
  for (int64_t i = 0; i < half; ++i) {
    float left = x[i], right = x[i + half];
    x[i] = left * cos[i] - right * sin[i];
    x[i + half] = right * cos[i + half] + left * sin[i + half];
  }
}

void keep_row(char* to, const float* from, int64_t W, bool half) {
  if (!half) {
    memcpy(to, from, W * sizeof(float));
    return;
  }
  for (int64_t i = 0; i < W; i += VL) store((bf16*)to + i, load(from + i));
}

// y += scale B A x of N rows, `across` floats apart in x and `apart` in y. Each row is summed in the same order whatever N is.
template <int N>
void add_rows(const Part& p, float scale, const float* x, int64_t across, int64_t depth, float* y, int64_t apart) {
  constexpr int PAIR = 2;  // ranks at a time
  for (int64_t r = 0; r < p.rank; r += PAIR) {
    const bool is_pair = r + 1 < p.rank;
    const float *a[PAIR] = {p.a + r * depth, p.a + (r + is_pair) * depth}, *b[PAIR] = {p.b + r * p.size, p.b + (r + is_pair) * p.size};
    vec sum[N][PAIR] = {};
    int64_t k = 0;
    for (; k + VL <= depth; k += VL)
      for (int i = 0; i < N; ++i)
        for (int j = 0; j < PAIR; ++j) sum[i][j] = fused(load(x + i * across + k), load(a[j] + k), sum[i][j]);
    float h[N][PAIR];
    for (int i = 0; i < N; ++i)
      for (int j = 0; j < PAIR; ++j) {
        h[i][j] = total(sum[i][j]);
        for (int64_t rest = k; rest < depth; ++rest) h[i][j] += x[i * across + rest] * a[j][rest];
        h[i][j] *= scale;
      }
    int64_t c = 0;
    for (; c + VL <= p.size; c += VL)
      for (int i = 0; i < N; ++i) {
        vec made = fused(spread(h[i][0]), load(b[0] + c), load(y + i * apart + c));
        store(y + i * apart + c, is_pair ? fused(spread(h[i][1]), load(b[1] + c), made) : made);
      }
    for (; c < p.size; ++c)
      for (int i = 0; i < N; ++i) {
        y[i * apart + c] += h[i][0] * b[0][c];
        if (is_pair) y[i * apart + c] += h[i][1] * b[1][c];
      }
  }
}

// The same of `rows` rows that use the part with the same weight.
void add_part(const Part& p, float weight, const float* x, int64_t across, int64_t depth, float* y, int64_t apart, int64_t rows) {
  const float scale = p.scale * weight;
  y += p.start;
  for (; rows >= 4; rows -= 4, x += 4 * across, y += 4 * apart) add_rows<4>(p, scale, x, across, depth, y, apart);
  for (; rows; --rows, x += across, y += apart) add_rows<1>(p, scale, x, across, depth, y, apart);
}

// ---- routing of one token ----

float activated(float z, int64_t activation) {
  if (activation == 1) return 1.f / (1.f + std::exp(-z));
  float soft = z > 20.f ? z : std::log1p(std::exp(z));
  return soft > 1e-30f ? std::sqrt(soft) : 0.f;
}

// h = (1 - z) n + z h, from the products of both matrices with what came in and with h.
void advance(const Recurrence& r, const float* input, const float* hidden, float* h) {
  const int64_t P = r.projector.rows;
  auto before = [&](int64_t at) { return load(input + at) + load(r.input_bias + at); };
  auto kept = [&](int64_t at) { return load(hidden + at) + load(r.hidden_bias + at); };
  for (int64_t k = 0; k < P; k += VL) {
    vec reset = sigmoid(before(k) + kept(k)), update = sigmoid(before(P + k) + kept(P + k));
    vec fresh = 2.f * sigmoid(2.f * (before(2 * P + k) + reset * kept(2 * P + k))) - 1.f;  // tanh
    store(h + k, fresh + update * (load(h + k) - fresh));
  }
}

float dot(const float* a, const float* b, int64_t n) {
  vec sum{};
  for (int64_t k = 0; k < n; k += VL) sum = fused(load(a + k), load(b + k), sum);
  return total(sum);
}

// From x, `depth` wide.
void route(const Experts& e, int64_t depth, const float* x, float* logits, float* score, int32_t* index, float* weight) {
  for (int64_t i = 0; i < e.count; ++i) logits[i] = dot(x, e.router + i * depth, depth);
  if (e.activation == 0) {
    float most = *std::max_element(logits, logits + e.count), sum = 0.f;
    for (int64_t i = 0; i < e.count; ++i) sum += score[i] = std::exp(logits[i] - most);
    for (int64_t i = 0; i < e.count; ++i) score[i] /= sum;
  } else {
    for (int64_t i = 0; i < e.count; ++i) score[i] = activated(logits[i], e.activation);
  }
  for (int64_t k = 0; k < e.top_k; ++k) {  // the largest that is left, of equals the first
    int64_t best = -1;
    float most = 0.f;
    for (int64_t i = 0; i < e.count; ++i) {
      if (std::find(index, index + k, (int32_t)i) != index + k) continue;
      float value = score[i] + (e.bias ? e.bias[i] : 0.f);
      if (best < 0 || value > most) best = i, most = value;
    }
    index[k] = (int32_t)best;
    weight[k] = score[best];
  }
  if (e.normalize == 2) {
    float most = -INFINITY;
    for (int64_t k = 0; k < e.top_k; ++k) most = std::max(most, logits[index[k]]);
    for (int64_t k = 0; k < e.top_k; ++k) weight[k] = std::exp(logits[index[k]] - most);
  }
  if (e.normalize) {
    float sum = 0.f;
    for (int64_t k = 0; k < e.top_k; ++k) sum += weight[k];
    if (e.normalize == 1) sum += 1e-20f;
    for (int64_t k = 0; k < e.top_k; ++k) weight[k] /= sum;
  }
  for (int64_t k = 0; k < e.top_k; ++k) weight[k] *= e.scale;
}

}  // namespace
