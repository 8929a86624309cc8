// One more id of each of several sequences through ExpertFlow's route predictor, the small decoder of predictors/network.py, on one thread:
// beside it the model itself computes, and this holds no lock of the interpreter. C ABI; compiled and loaded by kernels/__init__.py.
//
// What is kept of a sequence is one piece of memory that is read and written where it lies: `Kept`, then for each layer the keys and
// values of the last ids [2 D][S], a ring of which the place of id i is i mod window; then for each layer those of the prompt [2 D][P'].
// They lie transposed, so that scores of neighbouring positions fill a vector whatever the width of a head.
//
// Shapes: B sequences, D width, H heads, F hidden width, W window; S and P': W and P ids of a prompt, up to whole vectors of 16; C outputs.

#include "failure.h"
#include "step.h"

namespace {

struct Affine {  // y = x w^T + bias; mirrored by predictors/compiled.py, as is all below
  Matrix w;
  const float* bias;  // up to whole panels
};

struct PathLayer {
  const float *norm, *cross_norm, *feed_forward_norm;
  Affine qkv, out, cross_query, cross_out, up, down;
};

struct PathNetwork {
  int64_t depth, D, H, F, window, stride, vocab, outputs;  // stride: S
  const float* embedding;  // [vocab + 1, D], the last of an unknown id
  const float* bias;       // [H][W + S]: entry W + k is that of distance -k mod W
  const float* last_norm;
  Affine heads;
  const PathLayer* layers;
  float eps;
};

struct Kept {
  int64_t seen, prompt;  // ids in the ring so far, and in the prompt
  float* ring() { return (float*)this + WIDE; }
};

thread_local Scratch scratch_of_call;

// emit(row, first of VL columns, numbers)
template <class Emit>
void product(const Affine& p, const float* x, int64_t B, Emit emit) {
  Activations a{(char*)x, p.w.depth, p.w.depth * (int64_t)sizeof(float), p.w.kind};
  multiply(p.w, a, 0, B, 0, p.w.panels(), [&](int64_t b, int64_t panel, const float* out) {
    for (int64_t c = 0; c < WIDE; c += VL) emit(b, panel * WIDE + c, load(out + c) + load(p.bias + panel * WIDE + c));
  });
}

// Scores of one head to weights; of `whole` positions those from `count` on weigh nothing.
void soften(float* score, int64_t count, int64_t whole) {
  for (int64_t i = count; i < whole; ++i) score[i] = -INFINITY;
  vec top = load(score);
  for (int64_t i = VL; i < whole; i += VL) top = load(score + i) > top ? load(score + i) : top;
  float most = top[0];
  for (int i = 1; i < VL; ++i) most = std::max(most, top[i]);
  vec sum{};
  for (int64_t i = 0; i < whole; i += VL) {
    vec s = load(score + i), e = s == -INFINITY ? vec{} : exponential(s - most);
    store(score + i, e);
    sum += e;
  }
  const float share = 1.f / total(sum);
  for (int64_t i = 0; i < whole; i += VL) store(score + i, load(score + i) * share);
}

// One query over the first `count` positions; bias: of head h and position i at [h * (W + S) + i], null for none.
void attend(const PathNetwork& n, const float* query, const float* kept, int64_t stride, int64_t count, const float* bias, float* score,
            float* to) {
  if (!count) {  // an empty prompt
    memset(to, 0, n.D * sizeof(float));
    return;
  }
  const int64_t width = n.D / n.H, whole = (count + VL - 1) / VL * VL;
  const float scale = 1.f / std::sqrt((float)width);
  for (int64_t h = 0; h < n.H; ++h) {
    float* own = score + h * stride;
    for (int64_t i = 0; i < whole; i += VL) {
      vec sum{};
      for (int64_t d = h * width; d < (h + 1) * width; ++d) sum = fused(spread(query[d]), load(kept + d * stride + i), sum);
      sum *= scale;
      store(own + i, bias ? sum + load(bias + h * (n.window + n.stride) + i) : sum);
    }
    soften(own, count, whole);
  }
  const float* value = kept + n.D * stride;
  for (int64_t d = 0; d < n.D; d += VL) {
    vec sum[VL];
    for (int64_t j = 0; j < VL; ++j) {
      const float *weight = score + (d + j) / width * stride, *row = value + (d + j) * stride;
      sum[j] = vec{};
      for (int64_t i = 0; i < whole; i += VL) sum[j] = fused(load(weight + i), load(row + i), sum[j]);
    }
    store(to + d, totals(sum));
  }
}

struct Work {  // what a step works out on its way, row after row
  float *x, *normed, *mixed, *qkv, *score;
};

void self_attention(const PathNetwork& n, const PathLayer& layer, int64_t number, int64_t B, Kept* const* kept, const Work& r) {
  for (int64_t b = 0; b < B; ++b) norm_row(r.x + b * n.D, layer.norm, n.D, n.eps, r.normed + b * n.D);
  product(layer.qkv, r.normed, B, [&](int64_t b, int64_t c, vec v) { store(r.qkv + b * 3 * n.D + c, v); });
  for (int64_t b = 0; b < B; ++b) {
    const float* qkv = r.qkv + b * 3 * n.D;
    float* ring = kept[b]->ring() + number * 2 * n.D * n.stride;
    const int64_t place = kept[b]->seen % n.window;
    for (int64_t d = 0; d < 2 * n.D; ++d) ring[d * n.stride + place] = qkv[n.D + d];
    attend(n, qkv, ring, n.stride, std::min(kept[b]->seen + 1, n.window), n.bias + n.window - place, r.score, r.mixed + b * n.D);
  }
}

void cross_attention(const PathNetwork& n, const PathLayer& layer, int64_t number, int64_t B, Kept* const* kept, const Work& r) {
  for (int64_t b = 0; b < B; ++b) norm_row(r.x + b * n.D, layer.cross_norm, n.D, n.eps, r.normed + b * n.D);
  product(layer.cross_query, r.normed, B, [&](int64_t b, int64_t c, vec v) { store(r.qkv + b * n.D + c, v); });
  for (int64_t b = 0; b < B; ++b) {
    const int64_t stride = (kept[b]->prompt + WIDE - 1) / WIDE * WIDE;
    const float* prompt = kept[b]->ring() + 2 * n.D * (n.depth * n.stride + number * stride);
    attend(n, r.qkv + b * n.D, prompt, stride, kept[b]->prompt, nullptr, r.score, r.mixed + b * n.D);
  }
}

// out[m][16] (+)= rows of a times `depth` rows of a panel
void panel_tile(int m, const float* a, const float* panel, int64_t depth, float* out, int64_t so, bool add) {
  for (int v = 0; v < NV; v += 2)
    tile_any<Plain, LDA>(m, std::min(2, NV - v), a, 1, panel + v * VL, WIDE, depth, out + v * VL, so, add);
}

// Of `m` rows: a piece of the hidden units at a time, which stays in the first cache.
void feed_forward_block(const PathNetwork& n, const PathLayer& layer, int m, const Rows<Plain>& normed, const Rows<Plain>& hidden,
                        float* x) {
  alignas(64) float out[MR * WIDE];
  const auto panel_of = [](const Matrix& w, int64_t panel, int64_t k) { return (const float*)(w.data + panel * w.panel_bytes) + k * WIDE; };
  for (int64_t first = 0; first < n.F; first += LANE_K) {
    const int64_t count = std::min<int64_t>(LANE_K, n.F - first);
    for (int64_t f = first; f < first + count; f += WIDE) {
      for (int64_t k = 0; k < n.D; k += LANE_K)
        panel_tile(m, normed.at(0, k / LANE_K), panel_of(layer.up.w, f / WIDE, k), std::min<int64_t>(LANE_K, n.D - k), out, WIDE, k > 0);
      for (int i = 0; i < m; ++i)
        for (int c = 0; c < WIDE; c += VL) {
          const vec v = load(out + i * WIDE + c) + load(layer.up.bias + f + c);
          hidden.put(i, f - first + c, v > 0.f ? v : vec{});
        }
    }
    for (int64_t d = 0; d < n.D; d += WIDE)
      panel_tile(m, hidden.at(0, 0), panel_of(layer.down.w, d / WIDE, first), count, x + d, n.D, true);
  }
}

void feed_forward(const PathNetwork& n, const PathLayer& layer, int64_t B, const Work& r) {
  const Rows<Plain> normed = scratch_of_call.rows<Plain>(SPARE, MR, n.D), hidden = scratch_of_call.rows<Plain>(MIDDLE, MR, LANE_K);
  const int64_t blocks = (B + MR - 1) / MR;
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t begin = B * block / blocks, end = B * (block + 1) / blocks;
    for (int64_t b = begin; b < end; ++b) {
      float* x = r.x + b * n.D;
      norm_row(x, layer.feed_forward_norm, n.D, n.eps, r.normed);
      for (int64_t d = 0; d < n.D; d += VL) {
        normed.put(b - begin, d, load(r.normed + d));
        store(x + d, load(x + d) + load(layer.down.bias + d));  // to which the product is added
      }
    }
    feed_forward_block(n, layer, (int)(end - begin), normed, hidden, r.x + begin * n.D);
  }
}

}  // namespace

// ids [B]; prob [B][outputs]. Each sequence has one id more when this returns.
extern "C" int anabranch_path_step(const PathNetwork* network, int64_t B, const int64_t* ids, Kept* const* kept, float* prob, int64_t outputs) {
  const PathNetwork& n = *network;
  if (outputs != n.outputs) return OUT_OF_RANGE;
  return status_of([&] {
    int64_t longest = n.stride;
    for (int64_t b = 0; b < B; ++b) longest = std::max(longest, kept[b]->prompt + WIDE);
    float* memory = scratch_of_call.get<float>(LEFT, B * 6 * n.D + n.H * longest);
    Work r;
    r.x = memory, r.normed = r.x + B * n.D, r.mixed = r.normed + B * n.D, r.qkv = r.mixed + B * n.D;
    r.score = r.qkv + B * 3 * n.D;
    auto add = [&](int64_t b, int64_t c, vec v) { store(r.x + b * n.D + c, load(r.x + b * n.D + c) + v); };
    for (int64_t b = 0; b < B; ++b) {
      const int64_t id = ids[b] >= 0 && ids[b] < n.vocab ? ids[b] : n.vocab;
      memcpy(r.x + b * n.D, n.embedding + id * n.D, n.D * sizeof(float));
    }
    for (int64_t number = 0; number < n.depth; ++number) {
      const PathLayer& layer = n.layers[number];
      self_attention(n, layer, number, B, kept, r);
      product(layer.out, r.mixed, B, add);
      cross_attention(n, layer, number, B, kept, r);
      product(layer.cross_out, r.mixed, B, add);
      feed_forward(n, layer, B, r);
    }
    for (int64_t b = 0; b < B; ++b) norm_row(r.x + b * n.D, n.last_norm, n.D, n.eps, r.normed + b * n.D);
    product(n.heads, r.normed, B, [&](int64_t b, int64_t c, vec v) {
      vec p = sigmoid(v);
      memcpy(prob + b * n.outputs + c, &p, std::min<int64_t>(VL, std::max<int64_t>(n.outputs - c, 0)) * sizeof(float));
    });
    for (int64_t b = 0; b < B; ++b) ++kept[b]->seen;
    return DONE;
  });
}
