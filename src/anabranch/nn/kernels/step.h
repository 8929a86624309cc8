// What a compiled step is told of a model and of its tokens, and the small pieces of a layer. Included by decode.cpp.
// Shapes: T tokens, D width, H query heads, G key heads, W head width, F hidden width, E experts, K per token, P width of a router's state.

#pragma once

#include "low_rank.h"

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

struct Heads {  // how much the heads of an attention count for each token (anabranch.heads)
  const float *routed, *bias;  // [M, D], [M] of the last M heads; bias null for none
  const float* pair;           // [2, D]; null where heads are not routed
  const float* shared;         // [H - M, D] of the others; null where they count alike
  int64_t count, top_k;        // M; top_k 0: what is above 0 counts, else so many of a softmax
  float floor, cap, most_pair, factor;
};

struct Block {  // without attention (qkv of no rows) it is one more pass over the layer before
  const float *attention_norm, *feed_forward_norm;
  const float *qkv_bias, *out_bias, *q_norm, *k_norm;  // null for none
  char *key, *value;                                   // [slots, G, W]
  Matrix qkv, out, w13, w2;                            // the last two of a dense layer
  Experts experts;                                     // with `loops` the router alone, of virtual experts
  Loops loops;
  Heads heads;
};

enum Site { QKV, OUT, GATE, UP, DOWN, SITES };  // the matrices of a layer that adapters may add to; gate and up are of a dense layer

struct Part {  // scale B A x of an adapter, added to `size` outputs from `start` on
  const void *a, *b;  // [rank, inputs], [rank, size]: B lies transposed
  int64_t rank, start, size;
  float scale;
  int32_t half;  // whether A and B are bfloat16, float32 otherwise
};

struct Adapter {
  const Part* parts;
  const int32_t* first;  // [layers * SITES + 1]: of each matrix the first of its parts
};

struct Group {  // the tokens of a step that use one adapter
  const Adapter* adapter;
  const int32_t* token;  // [count], each once
  const float* weight;   // [count]
  int64_t count, lows;   // lows: of each token, the most ranks that its adapter has at matrices with one input
};

struct Model {
  int64_t layers, D, H, G, W, F, block_tokens, slots;  // F: the widest hidden layer
  int64_t most_experts, most_top_k, state;  // state: P, 0 without recurrences
  int64_t rows, most_loops;                 // rows: of experts or paths, the most per token
  float norm_eps, qk_eps, clip;  // clip 0 for none
  int32_t qk_norm;               // 0 none, 1 per head, 2 over the whole width
  int32_t half_store;            // keys and values are bfloat16
  const float* last_norm;        // null where other blocks come behind
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
  const Group* group;      // of tokens by adapter, in an order that does not depend on the step; a token may be in several
  int64_t groups, lows;    // lows: floats of the groups' first products, the sum of count * lows
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

// What each of H heads is multiplied by for a token of which the attention sees x, D wide; 0: it is off.
void weigh(const Heads& heads, int64_t H, int64_t D, const float* x, float* scale) {
  const int64_t M = heads.count, S = H - M;
  auto bound = [](float z, float least, float most) { return z < least ? least : z > most ? most : z; };
  float pair[2];
  for (int i = 0; i < 2; ++i) pair[i] = bound(dot(x, heads.pair + i * D, D), -heads.most_pair, heads.most_pair);
  const float first = heads.factor / (1.f + std::exp(pair[1] - pair[0])), second = heads.factor / (1.f + std::exp(pair[0] - pair[1]));
  auto soften = [](float* z, int64_t count) {
    float most = *std::max_element(z, z + count), sum = 0.f;
    for (int64_t i = 0; i < count; ++i) sum += z[i] = std::exp(z[i] - most);
    for (int64_t i = 0; i < count; ++i) z[i] /= sum;
  };
  if (heads.shared) {
    for (int64_t h = 0; h < S; ++h) scale[h] = dot(x, heads.shared + h * D, D);
    soften(scale, S);
  }
  for (int64_t h = 0; h < S; ++h) scale[h] = first * (heads.shared ? S * scale[h] : 1.f);
  float* routed = scale + S;
  for (int64_t i = 0; i < M; ++i) routed[i] = dot(x, heads.routed + i * D, D) + (heads.bias ? heads.bias[i] : 0.f);
  if (!heads.top_k) {
    for (int64_t i = 0; i < M; ++i) routed[i] = second * bound(bound(routed[i], heads.floor, heads.cap), 0.f, heads.cap);
    return;
  }
  soften(routed, M);
  // The largest stay, of equals the first; a sign marks the others.
  float sum = 1e-20f;
  for (int64_t i = 0; i < M; ++i) {
    int64_t before = 0;
    for (int64_t j = 0; j < M; ++j) before += std::fabs(routed[j]) > routed[i] || (j < i && std::fabs(routed[j]) == routed[i]);
    if (before < heads.top_k)
      sum += routed[i];
    else
      routed[i] = -routed[i];
  }
  for (int64_t i = 0; i < M; ++i) routed[i] = std::signbit(routed[i]) ? 0.f : second * heads.top_k * routed[i] / sum;
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
