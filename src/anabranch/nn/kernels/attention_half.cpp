// Causal attention of bfloat16, forward and backward, on CPUs: what attention.cpp computes in float32. Products are of pairs of bfloat16
// where the processor has them, in matrix units where there are some, and of floats elsewhere; scores, softmax and sums are float32, and the
// weights of values and the changes of scores are rounded as operands of a product. C ABI; compiled and loaded by kernels/__init__.py.
//
// Shapes and tasks as there. A block of queries makes all its scores at once; keys that none of them sees are not touched.

#include "attention.h"

namespace {

using P = Half;
using Element = P::elem;

thread_local Scratch scratch_of_thread;

inline int block_rows() { return takes_tiles<P>() ? 2 * (int)PAIRED_ROWS : 4 * MR; }
inline int64_t up(int64_t count, int64_t step) { return (count + step - 1) / step * step; }

// Rows as columns, for sums over their length: panel j holds NR of them, [D / pack][NR]; rows behind the last are zero.
const Element* pack_across(Scratch& scratch, Slot slot, const bf16* rows, int64_t stride, int64_t count, int64_t D) {
  const int64_t panel_elements = D / P::pack * NR;
  Element* to = scratch.get<Element>(slot, up(count, NR) / NR * panel_elements);
  alignas(64) bf16 rest[VL * 256];
  alignas(64) Element spare[VL * 256];
  for (int64_t first = 0; first < up(count, NR); first += VL) {
    Element* panel = to + first / NR * panel_elements + first % NR;
    if (first + VL <= count) {
      pack_rows_as_columns<P>(rows + first * stride, D, panel, spare, stride);
      continue;
    }
    memset((void*)rest, 0, sizeof rest);
    for (int64_t r = first; r < count; ++r) memcpy((void*)(rest + (r - first) * D), rows + r * stride, D * sizeof(bf16));
    pack_rows_as_columns<P>(rest, D, panel, spare, D);
  }
  return to;
}

// Rows for sums over them: panel c holds NR of their columns, [rows / pack][NR], with zeros up to a multiple of NR rows.
struct Down {
  Element* data;
  int64_t panel_elements;

  Down(Scratch& scratch, Slot slot, const bf16* rows, int64_t stride, int64_t count, int64_t D) : panel_elements(up(count, NR) / P::pack * NR) {
    data = scratch.get<Element>(slot, up(D, NR) / NR * panel_elements);
    const int64_t filled = (count + P::pack - 1) / P::pack * NR;
    for (int64_t c = 0; c < D; c += NR) {
      Element* panel = data + c / NR * panel_elements;
      pack_rows<P>((int)count, (int)std::min<int64_t>(NR, D - c), NR, panel, [&](int k) { return rows + k * stride + c; }, Unscaled());
      memset((void*)(panel + filled), 0, (panel_elements - filled) * sizeof(Element));
    }
  }
  const Element* at(int64_t column) const { return data + column / NR * panel_elements; }
};

inline int vectors_at(int64_t column, int64_t D) { return (int)std::min<int64_t>(2, (D - column) / VL); }

struct Scores {  // of a block of queries, on whole panels of keys
  float* data;
  int64_t width;  // between rows, beyond the keys so that rows keep out of each other's cache sets
  Scores(Scratch& scratch, Slot slot, int64_t S) : width(up(S, NR) + VL) { data = scratch.get<float>(slot, block_rows() * width); }
  float* row(int i) const { return data + i * width; }
};

// Tiles of a product, `rows` of them.
struct Block {
  Scratch& scratch;
  int rows;
  int64_t D;

  // The products of rows, `stride` apart, with `panels` panels of columns, times `scale`: what softmax takes the largest of is what it takes
  // from the others, to the bit.
  void score(const bf16* from, int64_t stride, const Element* columns, int64_t panels, float scale, const Scores& to) const {
    auto a = scratch.rows<P>(LEFT, block_rows(), (int)D);
    for (int i = 0; i < rows; ++i)
      for (int64_t c = 0; c < D; c += VL) a.put(i, (int)c, load(from + i * stride + c));
    alignas(64) float out[SUM_ROWS * NR];
    auto emit = [&](int i, int m, int64_t column, int, const float* sums, int64_t so) {
      for (int r = 0; r < m; ++r)
        for (int v = 0; v < 2; ++v) store(to.row(i + r) + column + v * VL, load(sums + r * so + v * VL) * scale);
    };
    for (int64_t j = 0; j < panels; ++j)
      product(a, rows, (int)(D / P::pack), columns + j * D / P::pack * NR, (int)(j * NR), 2, out, emit, 0, nothing);
  }

  // emit(first row, rows, first column, vectors, sums, their stride) of weights on `keys` keys, whole panels, times what lies down.
  template <class Emit>
  void weigh(const Scores& weights, int64_t keys, const Down& right, Emit emit) const {
    auto a = scratch.rows<P>(MIDDLE, block_rows(), (int)keys);
    for (int i = 0; i < rows; ++i)
      for (int64_t k = 0; k < keys; k += VL) a.put(i, (int)k, load(weights.row(i) + k));
    alignas(64) float out[SUM_ROWS * NR];
    for (int64_t c = 0; c < D; c += NR)
      product(a, rows, (int)(keys / P::pack), right.at(c), (int)c, vectors_at(c, D), out, emit, 0, nothing);
  }

  // to[keys][D] += the transpose of the weights on `keys` keys times rows, `stride` apart.
  void spread(const Scores& weights, int64_t keys, const bf16* from, int64_t stride, float* to) const {
    Columns<P> left(scratch, TURNED, rows, (int)keys);
    left.pack(rows, [&](int k) { return weights.row(k); });
    const Down right(scratch, RIGHT, from, stride, rows, D);
    alignas(64) float out[SUM_ROWS * NR];
    for (int64_t c = 0; c < D; c += NR)
      for (int64_t i = 0; i < keys; i += left.height()) {
        int m = (int)std::min<int64_t>(left.height(), keys - i), vectors = vectors_at(c, D);
        left.times((int)i, m, right.at(c), vectors, out);
        for (int r = 0; r < m; ++r)
          for (int v = 0; v < vectors; ++v) {
            float* at = to + (i + r) * D + c + v * VL;
            store(at, load(at) + load(out + r * NR + v * VL));
          }
      }
  }

  static const char* nothing(int64_t) { return nullptr; }
};

// exp(score - shift) of the first `seen`, zero up to `width`; returns their sum.
inline float exponentials(float* row, int64_t seen, int64_t width, float shift) {
  vec sum{};
  for (int64_t k = 0; k < width; k += VL) {
    vec e = k < seen ? exponential(load(row + k) - shift) : vec{};
    if (k < seen && k + VL > seen) e = counting(k) < (float)seen ? e : vec{};
    store(row + k, e);
    sum += e;
  }
  return total(sum);
}

inline float largest(const float* row, int64_t seen) {
  vec most = vec{} - INFINITY;
  for (int64_t k = 0; k < seen; k += VL) {
    vec v = load(row + k);
    if (k + VL > seen) v = counting(k) < (float)seen ? v : vec{} - INFINITY;
    most = v > most ? v : most;
  }
  return greatest(most);
}

using Tensor = Heads<bf16>;

void forward_of(const Shape& shape, int64_t b, int64_t g, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& y, float* lse) {
  Scratch& scratch = scratch_of_thread;
  Tiles tiles;
  const int64_t D = shape.D, per = shape.H / shape.G;
  const Element* keys = pack_across(scratch, PANEL, k.at(b, g, 0), k.row, shape.S, D);
  const Down values(scratch, SPARE, v.at(b, g, 0), v.row, shape.S, D);
  const bool finite = are_finite(v.at(b, g, 0), v.row, shape.S, D);
  const Scores p(scratch, SCORES, shape.S);
  std::vector<float> inverse(block_rows());
  for (int64_t h = g * per; h < (g + 1) * per; ++h)
    for (int64_t first = 0; first < shape.L; first += block_rows()) {
      const Block block{scratch, (int)std::min<int64_t>(block_rows(), shape.L - first), D};
      const int64_t width = up(shape.front() + first + block.rows, NR);
      block.score(q.at(b, h, first), q.row, keys, width / NR, shape.scale, p);
      for (int i = 0; i < block.rows; ++i) {
        const int64_t own = shape.front() + first + i + 1;
        const float most = largest(p.row(i), own), sum = exponentials(p.row(i), own, width, most);
        inverse[i] = 1.f / sum;
        lse[(b * shape.H + h) * shape.L + first + i] = most + std::log(sum);
      }
      block.weigh(p, width, values, [&](int i, int m, int64_t c, int vectors, const float* out, int64_t so) {
        for (int r = 0; r < m; ++r)
          for (int n = 0; n < vectors; ++n) store(y.at(b, h, first + i + r) + c + n * VL, load(out + r * so + n * VL) * inverse[i + r]);
      });
      for (int i = 0; i < block.rows && !finite; ++i) {
        const int64_t own = shape.front() + first + i + 1;
        weigh_own([&](int64_t s) { return p.row(i)[s]; }, own, v.at(b, g, 0), v.row, D, inverse[i], y.at(b, h, first + i));
      }
    }
}

struct Gradients {
  const Tensor &dy, &q, &k, &v, &y, &dq, &dk, &dv;
  const float* lse;

  void of(const Shape& shape, int64_t b, int64_t g) const {
    Scratch& scratch = scratch_of_thread;
    Tiles tiles;
    const int64_t D = shape.D, per = shape.H / shape.G, whole = up(shape.S, NR) * D;
    const Element* keys = pack_across(scratch, PANEL, k.at(b, g, 0), k.row, shape.S, D);
    const Element* values = pack_across(scratch, SPARE, v.at(b, g, 0), v.row, shape.S, D);
    const Down keys_down(scratch, PRE, k.at(b, g, 0), k.row, shape.S, D);
    const Scores p(scratch, SCORES, shape.S), d(scratch, CHANGES, shape.S);
    float *key_sums = scratch.get<float>(GRADIENTS, 2 * whole), *value_sums = key_sums + whole;
    std::fill(key_sums, key_sums + 2 * whole, 0.f);
    for (int64_t h = g * per; h < (g + 1) * per; ++h)
      for (int64_t first = 0; first < shape.L; first += block_rows()) {
        const Block block{scratch, (int)std::min<int64_t>(block_rows(), shape.L - first), D};
        const int64_t width = up(shape.front() + first + block.rows, NR);
        block.score(q.at(b, h, first), q.row, keys, width / NR, shape.scale, p);
        block.score(dy.at(b, h, first), dy.row, values, width / NR, 1.f, d);
        for (int i = 0; i < block.rows; ++i) change(shape, b, h, first + i, width, p.row(i), d.row(i));
        block.weigh(d, width, keys_down, [&](int i, int m, int64_t c, int vectors, const float* out, int64_t so) {
          for (int r = 0; r < m; ++r)
            for (int n = 0; n < vectors; ++n) store(dq.at(b, h, first + i + r) + c + n * VL, load(out + r * so + n * VL));
        });
        block.spread(d, width, q.at(b, h, first), q.row, key_sums);
        block.spread(p, width, dy.at(b, h, first), dy.row, value_sums);
      }
    for (int64_t s = 0; s < shape.S; ++s)
      for (int64_t c = 0; c < D; c += VL) {
        store(dk.at(b, g, s) + c, load(key_sums + s * D + c));
        store(dv.at(b, g, s) + c, load(value_sums + s * D + c));
      }
  }

  // A query's scores to its weights, and the products of dy with values to the changes of the scores before scaling and softmax.
  void change(const Shape& shape, int64_t b, int64_t h, int64_t query, int64_t width, float* weight, float* changes) const {
    const int64_t own = shape.front() + query + 1;
    exponentials(weight, own, width, lse[(b * shape.H + h) * shape.L + query]);
    vec inner{};
    for (int64_t c = 0; c < shape.D; c += VL) inner += load(dy.at(b, h, query) + c) * load(y.at(b, h, query) + c);
    const float delta = total(inner);
    for (int64_t s = 0; s < width; s += VL) {
      vec change = load(weight + s) * (load(changes + s) - delta) * shape.scale;
      store(changes + s, s >= own ? vec{} : s + VL > own ? (counting(s) < (float)own ? change : vec{}) : change);
    }
  }
};

}  // namespace

// As in attention.cpp.
extern "C" int anabranch_attention_half_forward(void* q, void* k, void* v, void* y, float* lse, const int64_t* strides, int64_t B, int64_t H,
                                                int64_t G, int64_t L, int64_t S, int64_t D, float scale, int threads) {
  Shape shape{B, H, G, L, S, D, scale};
  Tensor at[4] = {{q, strides}, {k, strides + 3}, {v, strides + 6}, {y, strides + 9}};
  return each_head(shape, threads, [&](int64_t b, int64_t g) { forward_of(shape, b, g, at[0], at[1], at[2], at[3], lse); });
}

extern "C" int anabranch_attention_half_backward(void* q, void* k, void* v, void* y, void* dy, void* dq, void* dk, void* dv,
                                                 const float* lse, const int64_t* strides, int64_t B, int64_t H, int64_t G, int64_t L,
                                                 int64_t S, int64_t D, float scale, int threads) {
  Shape shape{B, H, G, L, S, D, scale};
  void* data[8] = {q, k, v, y, dy, dq, dk, dv};
  Tensor at[8];
  for (int i = 0; i < 8; ++i) at[i] = {data[i], strides + 3 * i};
  Gradients gradients{at[4], at[0], at[1], at[2], at[3], at[5], at[6], at[7], lse};
  return each_head(shape, threads, [&](int64_t b, int64_t g) { gradients.of(shape, b, g); });
}
