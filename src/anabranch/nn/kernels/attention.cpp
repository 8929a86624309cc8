// Causal attention in float32, forward and backward, on CPUs: softmax(scale Q K^T) V, where the keys may have entries in front that every
// query sees. C ABI; compiled and loaded by kernels/__init__.py.
//
// Shapes: B sequences, H query heads, G key heads (each shared by H / G query heads), L queries, M entries in front, S = M + L keys,
// D head width (a multiple of 16). Tensors are [B, heads, positions, D] of any strides but the last.
//
// A task is one key head of one sequence, whose keys and values stay in the cache of its core. A block of queries makes all its scores at
// once, so softmax needs no second pass over the products; keys that no query of the block sees are not touched, which halves the work.
// Scores are made again in the backward pass. Every sum has one fixed order, whatever the number of threads.

#include "attention.h"

namespace {

constexpr int BLOCK = 4 * MR;  // queries

// Rows as columns: panel j holds NR of them, [D][NR]; rows behind the last are zero.
float* pack_columns(Scratch& scratch, int slot, const float* rows, int64_t stride, int64_t count, int64_t D) {
  int64_t panels = (count + NR - 1) / NR;
  float* to = scratch.get<float>(slot, panels * NR * D);
  alignas(64) float rest[VL * 512];
  for (int64_t first = 0; first < panels * NR; first += VL) {
    float* panel = to + first / NR * NR * D + first % NR;
    if (first + VL <= count) {
      transpose((const uint32_t*)(rows + first * stride), stride, D, (uint32_t*)panel);
      continue;
    }
    memset(rest, 0, sizeof rest);
    for (int64_t r = first; r < count; ++r) memcpy(rest + (r - first) * D, rows + r * stride, D * sizeof(float));
    transpose((const uint32_t*)rest, D, D, (uint32_t*)panel);
  }
  return to;
}

// to[rows][keys up to `panels` panels] = a[rows][D] times the packed columns.
void scores(const Rows<Plain>& a, int rows, int64_t D, const float* packed, int64_t panels, const Rows<Plain>& to) {
  for (int64_t j = 0; j < panels; ++j)
    for (int i = 0; i < rows; i += MR) {
      float* out = to.data + ((j * NR / LANE_K) * to.capacity + i) * LDA + j * NR % LANE_K;
      tile_any<Plain, LDA>(std::min(MR, rows - i), 2, a.at(i, 0), 1, packed + j * NR * D, NR, D, out, LDA, false);
    }
}

// emit(first row, rows, first column, vectors, sums) of p[rows][keys] times right[keys][D].
template <class Emit>
void weigh(const Rows<Plain>& p, int rows, int64_t keys, const float* right, int64_t stride, int64_t D, Emit emit) {
  alignas(64) float out[MR * NR];
  for (int64_t c = 0; c < D; c += NR) {
    int vectors = (int)std::min<int64_t>(2, (D - c) / VL);
    for (int i = 0; i < rows; i += MR) {
      int m = std::min(MR, rows - i);
      for (int64_t k = 0; k < keys; k += LANE_K)
        tile_any<Plain, LDA>(m, vectors, p.at(i, k / LANE_K), 1, right + k * stride + c, stride, std::min<int64_t>(LANE_K, keys - k),
                             out, NR, k > 0);
      emit(i, m, c, vectors, out);
    }
  }
}

// to[keys][D] += the transpose of p[rows][keys] times right[rows][D].
void spread(const Rows<Plain>& p, int rows, int64_t keys, const float* right, int64_t stride, int64_t D, float* to, int64_t to_stride) {
  for (int64_t lane = 0; lane < keys; lane += LANE_K)
    for (int64_t k = lane; k < std::min<int64_t>(keys, lane + LANE_K); k += MR) {
      int m = (int)std::min<int64_t>(MR, std::min<int64_t>(keys, lane + LANE_K) - k);
      for (int64_t c = 0; c < D; c += NR)
        tile_any<Plain, 1>(m, (int)std::min<int64_t>(2, (D - c) / VL), p.at(0, lane / LANE_K) + (k - lane), LDA, right + c, stride, rows,
                           to + k * to_stride + c, to_stride, true);
    }
}

inline void put_rows(const Rows<Plain>& to, const float* from, int64_t stride, int rows, int64_t D, float factor) {
  for (int i = 0; i < rows; ++i)
    for (int64_t c = 0; c < D; c += VL) to.put(i, (int)c, load(from + i * stride + c) * factor);
}

inline float* key_at(const Rows<Plain>& p, int row, int64_t k) {
  return p.data + ((k / LANE_K) * p.capacity + row) * LDA + k % LANE_K;
}

// Row's scores to exp(score - shift), zero from `seen` keys on (up to whole panels); returns their sum.
inline float exponentials(const Rows<Plain>& p, int row, int64_t seen, int64_t width, float shift) {
  vec sum{};
  for (int64_t k = 0; k < width; k += VL) {
    float* at = key_at(p, row, k);
    if (k >= seen) {
      store(at, vec{});
      continue;
    }
    vec e = exponential(load(at) - shift);
    if (k + VL > seen) e = counting(k) < (float)seen ? e : vec{};
    store(at, e);
    sum += e;
  }
  return total(sum);
}

inline float largest(const Rows<Plain>& p, int row, int64_t seen) {
  vec most = vec{} - INFINITY;
  for (int64_t k = 0; k < seen; k += VL) {
    vec v = load(key_at(p, row, k));
    if (k + VL > seen) v = counting(k) < (float)seen ? v : vec{} - INFINITY;
    most = v > most ? v : most;
  }
  return greatest(most);
}

thread_local Scratch scratch_of_thread;

void forward_of(const Shape& shape, int64_t b, int64_t g, const Heads<float>& q, const Heads<float>& k, const Heads<float>& v, const Heads<float>& y, float* lse) {
  Scratch& scratch = scratch_of_thread;
  const int64_t D = shape.D;
  const float* keys = pack_columns(scratch, PANEL, k.at(b, g, 0), k.row, shape.S, D);
  const bool finite = are_finite(v.at(b, g, 0), v.row, shape.S, D);
  auto a = scratch.rows<Plain>(LEFT, BLOCK, (int)D);
  auto p = scratch.rows<Plain>(MIDDLE, BLOCK, (int)((shape.S + NR - 1) / NR * NR));
  for (int64_t h = g * (shape.H / shape.G); h < (g + 1) * (shape.H / shape.G); ++h)
    for (int64_t first = 0; first < shape.L; first += BLOCK) {
      int rows = (int)std::min<int64_t>(BLOCK, shape.L - first);
      int64_t seen = shape.front() + first + rows, panels = (seen + NR - 1) / NR;
      put_rows(a, q.at(b, h, first), q.row, rows, D, shape.scale);
      scores(a, rows, D, keys, panels, p);
      float inverse[BLOCK];
      for (int i = 0; i < rows; ++i) {
        int64_t own = shape.front() + first + i + 1;
        float most = largest(p, i, own), sum = exponentials(p, i, own, panels * NR, most);
        inverse[i] = 1.f / sum;
        lse[(b * shape.H + h) * shape.L + first + i] = most + std::log(sum);
      }
      weigh(p, rows, seen, v.at(b, g, 0), v.row, D, [&](int i, int m, int64_t c, int vectors, const float* out) {
        for (int r = 0; r < m; ++r)
          for (int n = 0; n < vectors; ++n) store(y.at(b, h, first + i + r) + c + n * VL, load(out + r * NR + n * VL) * inverse[i + r]);
      });
      for (int i = 0; i < rows && !finite; ++i) {
        int64_t own = shape.front() + first + i + 1;
        weigh_own([&](int64_t s) { return *key_at(p, i, s); }, own, v.at(b, g, 0), v.row, D, inverse[i], y.at(b, h, first + i));
      }
    }
}

void backward_of(const Shape& shape, int64_t b, int64_t g, const Heads<float>& dy, const Heads<float>& q, const Heads<float>& k, const Heads<float>& v, const Heads<float>& y,
                 const float* lse, const Heads<float>& dq, const Heads<float>& dk, const Heads<float>& dv) {
  Scratch& scratch = scratch_of_thread;
  const int64_t D = shape.D;
  const float* keys = pack_columns(scratch, PANEL, k.at(b, g, 0), k.row, shape.S, D);
  const float* values = pack_columns(scratch, SPARE, v.at(b, g, 0), v.row, shape.S, D);
  auto a = scratch.rows<Plain>(LEFT, BLOCK, (int)D);
  auto p = scratch.rows<Plain>(MIDDLE, BLOCK, (int)((shape.S + NR - 1) / NR * NR));
  auto d = scratch.rows<Plain>(PRE, BLOCK, (int)((shape.S + NR - 1) / NR * NR));
  for (int64_t s = 0; s < shape.S; ++s) {
    memset(dk.at(b, g, s), 0, D * sizeof(float));
    memset(dv.at(b, g, s), 0, D * sizeof(float));
  }
  for (int64_t h = g * (shape.H / shape.G); h < (g + 1) * (shape.H / shape.G); ++h)
    for (int64_t first = 0; first < shape.L; first += BLOCK) {
      int rows = (int)std::min<int64_t>(BLOCK, shape.L - first);
      int64_t seen = shape.front() + first + rows, panels = (seen + NR - 1) / NR;
      put_rows(a, q.at(b, h, first), q.row, rows, D, shape.scale);
      scores(a, rows, D, keys, panels, p);
      put_rows(a, dy.at(b, h, first), dy.row, rows, D, 1.f);
      scores(a, rows, D, values, panels, d);
      for (int i = 0; i < rows; ++i) {
        exponentials(p, i, shape.front() + first + i + 1, panels * NR, lse[(b * shape.H + h) * shape.L + first + i]);
        vec inner{};
        for (int64_t c = 0; c < D; c += VL) inner += load(dy.at(b, h, first + i) + c) * load(y.at(b, h, first + i) + c);
        float delta = total(inner);
        for (int64_t s = 0; s < panels * NR; s += VL) {
          float* at = key_at(d, i, s);
          store(at, load(key_at(p, i, s)) * (load(at) - delta) * shape.scale);
        }
      }
      weigh(d, rows, seen, k.at(b, g, 0), k.row, D, [&](int i, int m, int64_t c, int vectors, const float* out) {
        for (int r = 0; r < m; ++r)
          for (int n = 0; n < vectors; ++n) store(dq.at(b, h, first + i + r) + c + n * VL, load(out + r * NR + n * VL));
      });
      spread(d, rows, seen, q.at(b, h, first), q.row, D, dk.at(b, g, 0), dk.row);
      spread(p, rows, seen, dy.at(b, h, first), dy.row, D, dv.at(b, g, 0), dv.row);
    }
}

}  // namespace

// `strides` holds (batch, head, row) of q, k, v, y, and in the backward pass of dy, dq, dk, dv behind them; lse is [B, H, L].
extern "C" int anabranch_attention_forward(void* q, void* k, void* v, void* y, float* lse, const int64_t* strides, int64_t B, int64_t H,
                                           int64_t G, int64_t L, int64_t S, int64_t D, float scale, int threads) {
  Shape shape{B, H, G, L, S, D, scale};
  Heads<float> at[4] = {{q, strides}, {k, strides + 3}, {v, strides + 6}, {y, strides + 9}};
  return each_head(shape, threads, [&](int64_t b, int64_t g) { forward_of(shape, b, g, at[0], at[1], at[2], at[3], lse); });
}

extern "C" int anabranch_attention_backward(void* q, void* k, void* v, void* y, void* dy, void* dq, void* dk, void* dv, const float* lse,
                                            const int64_t* strides, int64_t B, int64_t H, int64_t G, int64_t L, int64_t S, int64_t D,
                                            float scale, int threads) {
  Shape shape{B, H, G, L, S, D, scale};
  Heads<float> at[8];
  void* data[8] = {q, k, v, y, dy, dq, dk, dv};
  for (int i = 0; i < 8; ++i) at[i] = {data[i], strides + 3 * i};
  return each_head(shape, threads, [&](int64_t b, int64_t g) {
    backward_of(shape, b, g, at[4], at[0], at[1], at[2], at[3], lse, at[5], at[6], at[7]);
  });
}
