// SwiGLU experts on routed rows, forward and backward, on CPUs. C ABI; compiled and loaded by kernels/__init__.py.
//
//   y_n = sum_k weight_nk  w2_e (silu(gate_e x_n) * up_e x_n)
//
// Shapes as in nn/grouped.py: N items, E experts, K places per item, R = N K rows, D width, F hidden; D and F are multiples
// of 16. Rows are sorted by expert, place[r] = n * K + k, offset[e] = end row of expert e; what stands behind is unused.
//
// What makes it fast: a task is a block of one expert's rows on one thread, small enough to stay in its cache. Rows are
// gathered straight into the matmul's operand, SwiGLU and its derivative run on matmul tiles before they leave the cache,
// weights are read where they lie when rows are few, and gradients are written once, never zeroed first.
//
// What makes it exact: every sum has one fixed order, whatever the number of threads.

#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <utility>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif
#ifdef __x86_64__
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int VL = 16, MR = 12;  // floats in a vector, rows in a matmul tile: 12 x 2 of 32 registers accumulate
#elif defined(__AVX__)
constexpr int VL = 8, MR = 6;
#else
constexpr int VL = 4, MR = 6;
#endif
constexpr int NR = 2 * VL;        // columns of a tile
constexpr int LANE_K = 512;       // elements of one row that lie together in a left operand
constexpr int LDA = LANE_K + 16;  // their stride; the 16 keep rows out of each other's cache sets
constexpr int FEW = 8;            // up to so many rows, weights are not packed but read where they lie
constexpr int STRIP = 8;         // rows of weights read at a time then
constexpr int GRADIENT_ROWS = 512;  // rows of one accumulation step of a weight gradient
constexpr int64_t LARGE = 8 << 20;  // bytes; larger buffers get huge pages and are written around the cache

using vec = float __attribute__((vector_size(4 * VL)));
using ivec = int32_t __attribute__((vector_size(4 * VL)));
using uvec = uint32_t __attribute__((vector_size(4 * VL)));
using hvec = uint16_t __attribute__((vector_size(2 * VL)));
using quad = uint32_t __attribute__((vector_size(16)));

struct bf16 {
  uint16_t bits;
};

template <class To, class From>
inline To as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}
template <class V>
inline V read(const void* p) {
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}

// ---- numbers ----

inline vec load(const float* p) { return read<vec>(p); }
inline vec load(const bf16* p) { return as<vec>(__builtin_convertvector(read<hvec>(p), uvec) << 16); }

inline uvec round_bits(vec v) {  // bf16 bits, nearest even, in the low half of each lane
#ifdef __AVX512BF16__
  return __builtin_convertvector(as<hvec>(_mm512_cvtneps_pbh(as<__m512>(v))), uvec);
#else
  uvec u = as<uvec>(v);
  uvec rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  return as<uvec>(v != v) ? (uvec{} + 0x7fc0) : rounded;
#endif
}
inline void store(float* p, vec v) { memcpy(p, &v, sizeof v); }
inline void store(bf16* p, vec v) {
  hvec h = __builtin_convertvector(round_bits(v), hvec);
  memcpy(p, &h, sizeof h);
}

inline float total(vec v) {  // halves onto halves, in registers
  ivec lane;
  for (int i = 0; i < VL; ++i) lane[i] = i;
#pragma GCC unroll 4
  for (int width = VL / 2; width; width /= 2) v += __builtin_shuffle(v, lane ^ width);
  return v[0];
}

inline vec exponential(vec x) {  // Cephes expf: range reduction by ln 2, then a polynomial; 1 ulp
  x = x > 88.f ? (vec{} + 88.f) : x;
  x = x < -87.f ? (vec{} - 87.f) : x;
  const float magic = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer
  vec n = (x * 1.44269504088896341f + magic) - magic;
  vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
  vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.f;
  return p * as<vec>((__builtin_convertvector(n, ivec) + 127) << 23);
}
inline vec sigmoid(vec x) { return 1.f / (1.f + exponential(-x)); }

// ---- operands of a matmul: plain floats, or pairs of bf16 along the summed index ----

struct Plain {
  using elem = float;
  static constexpr int pack = 1;
  static inline vec fma(vec acc, float a, vec b) { return acc + a * b; }
  static inline vec pair(vec low, vec) { return low; }
};
#ifdef __AVX512BF16__
struct Pairs {
  using elem = uint32_t;
  static constexpr int pack = 2;
  static inline vec fma(vec acc, uint32_t a, vec b) {
    return as<vec>(_mm512_dpbf16_ps(as<__m512>(acc), as<__m512bh>(_mm512_set1_epi32((int)a)), as<__m512bh>(b)));
  }
  static inline vec pair(vec low, vec high) { return as<vec>(round_bits(low) | (round_bits(high) << 16)); }
};
using Half = Pairs;
#else
using Half = Plain;  // without bf16 instructions halves are widened and multiplied as floats
#endif
inline vec load(const uint32_t* p) { return read<vec>(p); }

// The left operand: rows in lanes of LANE_K elements, [lane][row][LDA].
template <class P>
struct Rows {
  typename P::elem* data;
  int capacity;
  const typename P::elem* at(int row, int lane) const { return data + ((int64_t)lane * capacity + row) * LDA; }
  inline void put(int row, int column, vec v) const {  // VL columns
    int lane = column / (LANE_K * P::pack), within = column % (LANE_K * P::pack);
    typename P::elem* p = data + ((int64_t)lane * capacity + row) * LDA;
    if constexpr (P::pack == 1)
      store(p + within, v);
    else
      store((bf16*)p + within, v);
  }
};

// out[M][NV * VL] (+)= a[M][depth] b[depth][NV * VL].  Element (i, k) of a stands at a[i * SA + k * sk], rows of b and out
// are sb and so apart.
template <class P, int M, int NV, int SA>
void tile(const typename P::elem* a, int64_t sk, const typename P::elem* b, int64_t sb, int64_t depth, float* out, int64_t so, bool add) {
  vec acc[M][NV];
#pragma GCC unroll 12
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < NV; ++j) acc[i][j] = add ? load(out + i * so + j * VL) : vec{};
  for (int64_t k = 0; k < depth; ++k, a += sk, b += sb) {
    vec bv[NV];
#pragma GCC unroll 2
    for (int j = 0; j < NV; ++j) bv[j] = load(b + j * VL);
#pragma GCC unroll 12
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 2
      for (int j = 0; j < NV; ++j) acc[i][j] = P::fma(acc[i][j], a[i * SA], bv[j]);
  }
#pragma GCC unroll 12
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < NV; ++j) store(out + i * so + j * VL, acc[i][j]);
}

template <class P, int NV, int SA, int... M>
inline auto tile_of(std::integer_sequence<int, M...>, int m) {
  static constexpr decltype(&tile<P, 1, NV, SA>) table[] = {tile<P, M + 1, NV, SA>...};
  return table[m - 1];
}
template <class P, int SA>
inline void tile_any(int m, int vectors, const typename P::elem* a, int64_t sk, const typename P::elem* b, int64_t sb,
                     int64_t depth, float* out, int64_t so, bool add) {
  std::make_integer_sequence<int, MR> sizes;
  (vectors == 2 ? tile_of<P, 2, SA>(sizes, m) : tile_of<P, 1, SA>(sizes, m))(a, sk, b, sb, depth, out, so, add);
}

// ---- packing the right operand: panel[depth][NR] ----

inline void transpose(const uint32_t* source, int64_t ld, int64_t depth, uint32_t* panel) {  // VL rows to columns
  for (int c = 0; c < VL; c += 4)
    for (int64_t k = 0; k < depth; k += 4) {
      const uint32_t* p = source + c * ld + k;
      quad a = read<quad>(p), b = read<quad>(p + ld), d = read<quad>(p + 2 * ld), e = read<quad>(p + 3 * ld);
      quad ab0 = __builtin_shuffle(a, b, quad{0, 4, 1, 5}), ab1 = __builtin_shuffle(a, b, quad{2, 6, 3, 7});
      quad de0 = __builtin_shuffle(d, e, quad{0, 4, 1, 5}), de1 = __builtin_shuffle(d, e, quad{2, 6, 3, 7});
      quad column[4] = {__builtin_shuffle(ab0, de0, quad{0, 1, 4, 5}), __builtin_shuffle(ab0, de0, quad{2, 3, 6, 7}),
                        __builtin_shuffle(ab1, de1, quad{0, 1, 4, 5}), __builtin_shuffle(ab1, de1, quad{2, 3, 6, 7})};
      for (int i = 0; i < 4; ++i) memcpy(panel + (k + i) * NR + c, &column[i], 16);
    }
}

// VL rows of weights, summed along their length: column c of the panel is row c.
template <class P, class W>
void pack_rows_as_columns(const W* w, int64_t length, typename P::elem* panel, typename P::elem* spare) {
  if constexpr (sizeof(W) * P::pack == 4) {
    transpose((const uint32_t*)w, length / P::pack, length / P::pack, (uint32_t*)panel);
  } else {  // convert first
    for (int c = 0; c < VL; ++c)
      for (int64_t k = 0; k < length; k += VL) {
        if constexpr (P::pack == 1)
          store((float*)spare + c * length + k, load(w + c * length + k));
        else
          store((bf16*)spare + c * length + k, load(w + c * length + k));
      }
    transpose((const uint32_t*)spare, length / P::pack, length / P::pack, (uint32_t*)panel);
  }
}

// `count` rows, summed over rows: row(k) points at the first of `columns` numbers, scaled by scale(k).
template <class P, class Row, class Scale>
inline void pack_rows(int count, int columns, int stride, typename P::elem* panel, Row row, Scale scale) {
  for (int k = 0; k < count; k += P::pack) {
    bool both = P::pack == 2 && k + 1 < count;
    auto low = row(k), high = both ? row(k + 1) : low;
    float s0 = scale(k), s1 = both ? scale(k + 1) : 0.f;
    float* out = (float*)panel + (int64_t)(k / P::pack) * stride;
    for (int c = 0; c < columns; c += VL) store(out + c, P::pair(load(low + c) * s0, both ? load(high + c) * s1 : vec{}));
  }
}

// ---- matmuls of a block of rows; emit(first row, rows, first column, vectors, out, stride of out) takes each tile ----

template <class P, class Emit>
inline void product(const Rows<P>& a, int rows, int depth, const typename P::elem* panel, int column, int vectors,
                    float* out, Emit& emit) {
  for (int i = 0; i < rows; i += MR) {
    int m = std::min(MR, rows - i);
    for (int k = 0; k < depth; k += LANE_K)
      tile_any<P, LDA>(m, vectors, a.at(i, k / LANE_K), 1, panel + (int64_t)k * NR, NR, std::min(LANE_K, depth - k), out,
                       NR, k > 0);
    emit(i, m, column, vectors, out, NR);
  }
}

template <int M, class W>
inline void dots(const Rows<Plain>& a, int length, const W* w, float* out) {  // VL rows of w against M rows of a
  constexpr int CHAINS = M == 1 ? 4 : M <= 4 ? 2 : 1;  // independent sums, to hide the latency of adding
  for (int c = 0; c < VL; ++c) {
    vec acc[M][CHAINS] = {};
    for (int lane = 0; lane * LANE_K < length; ++lane) {
      int count = std::min(LANE_K, length - lane * LANE_K), k = 0;
      const float* row = a.at(0, lane);
      const W* weight = w + (int64_t)c * length + lane * LANE_K;
      auto step = [&](int chain) {
        vec wv = load(weight + k);
#pragma GCC unroll 8
        for (int i = 0; i < M; ++i) acc[i][chain] += load(row + i * LDA + k) * wv;
        k += VL;
      };
      while (k + CHAINS * VL <= count)
#pragma GCC unroll 4
        for (int chain = 0; chain < CHAINS; ++chain) step(chain);
      while (k < count) step(0);
    }
    for (int i = 0; i < M; ++i) {
      vec sum = acc[i][0];
      for (int chain = 1; chain < CHAINS; ++chain) sum += acc[i][chain];
      out[i * NR + c] = total(sum);
    }
  }
}
template <class W, int... M>
inline void dots_of(std::integer_sequence<int, M...>, int m, const Rows<Plain>& a, int length, const W* w, float* out) {
  using function = void (*)(const Rows<Plain>&, int, const W*, float*);
  static constexpr function table[] = {dots<M + 1, W>...};
  table[m - 1](a, length, w, out);
}

struct Scratch {  // one thread's memory; grows, and is kept between calls
  std::vector<char> memory[6];
  template <class T>
  T* get(int slot, int64_t count) {
    int64_t bytes = count * (int64_t)sizeof(T) + 64;
    if ((int64_t)memory[slot].size() < bytes) memory[slot].resize(bytes);
    return (T*)(((uintptr_t)memory[slot].data() + 63) & ~(uintptr_t)63);
  }
  template <class P>
  Rows<P> rows(int slot, int count, int columns) {
    int lanes = (columns + LANE_K * P::pack - 1) / (LANE_K * P::pack);
    return {get<typename P::elem>(slot, (int64_t)lanes * count * LDA), count};
  }
};
enum Slot { LEFT, MIDDLE, PANEL, SPARE, PRE, SUM };

// a[rows][length] times the transpose of rows of w: vector v of panel j holds rows first(j, v) ... + VL of w.
template <class P, class W, class First, class Emit>
void multiply_by_rows(Scratch& scratch, const Rows<P>& a, int rows, int length, const W* w, int panels, int columns,
                      First first, Emit emit) {
  alignas(64) float out[MR * NR];
  auto* panel = scratch.get<typename P::elem>(PANEL, (int64_t)length / P::pack * NR);
  auto* spare = scratch.get<typename P::elem>(SPARE, (int64_t)length * VL);
  for (int j = 0; j < panels; ++j) {
    int vectors = std::min(2, (columns - j * NR) / VL);
    if constexpr (P::pack == 1)
      if (rows <= FEW && rows <= MR) {
        for (int v = 0; v < vectors; ++v)
          dots_of(std::make_integer_sequence<int, std::min(FEW, MR)>(), rows, a, length, w + first(j, v) * length,
                  out + v * VL);
        emit(0, rows, j * NR, vectors, out, NR);
        continue;
      }
    for (int v = 0; v < vectors; ++v)
      pack_rows_as_columns<P>(w + first(j, v) * (int64_t)length, length, panel + v * VL, spare);
    product(a, rows, length / P::pack, panel, j * NR, vectors, out, emit);
  }
}

// a[rows][depth] times w[depth][columns].
template <class P, class W, class Emit>
void multiply(Scratch& scratch, const Rows<P>& a, int rows, int depth, const W* w, int columns, Emit emit) {
  if constexpr (P::pack == 1)
    if (rows <= FEW) {  // w is read from memory: in the order it lies, a strip of whole rows at a time
      float* sum = scratch.get<float>(SUM, (int64_t)rows * columns);
      float* strip = scratch.get<float>(PANEL, (int64_t)STRIP * columns);
      for (int k = 0; k < depth; k += STRIP) {
        int64_t count = std::min(STRIP, depth - k);
        for (int64_t i = 0; i < count * columns; i += VL) store(strip + i, load(w + (int64_t)k * columns + i));
        for (int j = 0; j < columns; j += NR) {
          const char* next = (const char*)(w + (int64_t)(k + STRIP) * columns + (int64_t)j * STRIP);
          for (int byte = 0; byte < STRIP * NR * (int)sizeof(W); byte += 64) __builtin_prefetch(next + byte, 0, 2);
          for (int i = 0; i < rows; i += MR)
            tile_any<P, LDA>(std::min(MR, rows - i), std::min(2, (columns - j) / VL),
                             a.at(i, k / LANE_K) + k % LANE_K, 1, strip + j, columns, count,
                             sum + (int64_t)i * columns + j, columns, k > 0);
        }
      }
      for (int j = 0; j < columns; j += NR) emit(0, rows, j, std::min(2, (columns - j) / VL), sum + j, columns);
      return;
    }
  alignas(64) float out[MR * NR];
  auto* panel = scratch.get<typename P::elem>(PANEL, (int64_t)depth / P::pack * NR);
  for (int j = 0; j < columns; j += NR) {
    int vectors = std::min(2, (columns - j) / VL);
    pack_rows<P>(depth, vectors * VL, NR, panel, [&](int k) { return w + (int64_t)k * columns + j; },
                 [](int) { return 1.f; });
    product(a, rows, depth / P::pack, panel, j, vectors, out, emit);
  }
}

// One row of a tile into memory; `around` the cache where a gradient is too large to stay there and p is aligned.
inline void write(float* p, const float* out, int vectors, bool around) {
  for (int v = 0; v < vectors; ++v) {
#ifdef __AVX512F__
    if (around) {
      _mm512_stream_ps(p + v * VL, as<__m512>(load(out + v * VL)));
      continue;
    }
#endif
    store(p + v * VL, load(out + v * VL));
  }
}
inline void write(bf16* p, const float* out, int vectors, bool around) {
#ifdef __AVX512BF16__
  if (around && vectors == 2) {
    auto both = _mm512_cvtne2ps_pbh(as<__m512>(load(out + VL)), as<__m512>(load(out)));
    return _mm512_stream_si512((__m512i*)p, as<__m512i>(both));
  }
#endif
  for (int v = 0; v < vectors; ++v) store(p + v * VL, load(out + v * VL));
}

// to[M][columns first..last] (+)= sum over rows of left(row)[M] right(row)[columns]: the gradient of one expert's matrix.
template <class P, class W, class Left, class Right, class Scale>
void accumulate(Scratch& scratch, int rows, int M, int columns, int first, int last, W* to, bool add, bool around, Left left,
                Right right, Scale scale) {
  alignas(64) float out[MR * NR];
  auto finish = [&](int64_t i, int64_t j, float* row, int vectors) {
    W* place = to + i * columns + j;
    for (int v = 0; v < vectors && add; ++v) store(row + v * VL, load(row + v * VL) + load(place + v * VL));
    write(place, row, vectors, around);
  };
  int steps = (rows + GRADIENT_ROWS - 1) / GRADIENT_ROWS, step_rows = ((rows + steps - 1) / steps + 1) / 2 * 2;
  around = around && !add && (uintptr_t)to % 64 == 0 && columns % NR == 0 && first % NR == 0;
  auto* a = scratch.get<typename P::elem>(LEFT, (int64_t)step_rows * M);
  auto* panel = scratch.get<typename P::elem>(PANEL, (int64_t)step_rows * std::max(NR, rows <= FEW ? last - first : 0));
  auto* sum = scratch.get<float>(SUM, steps > 1 ? (int64_t)M * (last - first) : 0);
  for (int step = 0; step < steps; ++step) {
    int begin = step * step_rows, count = std::min(step_rows, rows - begin), depth = (count + P::pack - 1) / P::pack;
    pack_rows<P>(count, M, M, a, [&](int k) { return left(begin + k); }, [](int) { return 1.f; });
    if (rows <= FEW) {  // write whole rows of the gradient, as they lie
      pack_rows<P>(count, last - first, last - first, panel, [&](int k) { return right(k) + first; }, scale);
      for (int i = 0; i < M; i += MR)
        for (int j = first; j < last; j += NR) {
          int m = std::min(MR, M - i), vectors = std::min(2, (last - j) / VL);
          tile_any<P, 1>(m, vectors, a + i, M, panel + j - first, last - first, depth, out, NR, false);
          for (int r = 0; r < m; ++r) finish(i + r, j, out + r * NR, vectors);
        }
      return;
    }
    for (int j = first; j < last; j += NR) {
      int vectors = std::min(2, (last - j) / VL);
      pack_rows<P>(count, vectors * VL, NR, panel, [&](int k) { return right(begin + k) + j; },
                   [&](int k) { return scale(begin + k); });
      for (int i = 0; i < M; i += MR) {
        int m = std::min(MR, M - i);
        tile_any<P, 1>(m, vectors, a + i, M, panel, NR, depth, out, NR, false);
        for (int r = 0; r < m; ++r) {
          float *row = out + r * NR, *partial = sum + (int64_t)(i + r) * (last - first) + (j - first);
          for (int v = 0; v < vectors && step > 0; ++v) store(row + v * VL, load(row + v * VL) + load(partial + v * VL));
          if (step + 1 < steps)
            memcpy(partial, row, vectors * VL * sizeof(float));
          else
            finish(i + r, j, row, vectors);
        }
      }
    }
  }
}

// ---- memory ----

void advise(void* p, int64_t bytes) {  // a fresh large buffer costs a page fault every 4 KB; ask for 2 MB pages
#ifdef MADV_HUGEPAGE
  if (bytes < LARGE) return;
  uintptr_t page = 1 << 21, start = ((uintptr_t)p + page - 1) / page * page, end = ((uintptr_t)p + bytes) / page * page;
  if (end > start) madvise((void*)start, end - start, MADV_HUGEPAGE);
#endif
}

struct Workspace {  // rows between phases; the last one is kept for the next call, since fresh pages are slow
  static constexpr int64_t KEEP = 512 << 20;
  static inline std::mutex mutex;
  static inline char* kept = nullptr;
  static inline int64_t kept_bytes = 0;
  char* data = nullptr;
  int64_t bytes;
  explicit Workspace(int64_t wanted) : bytes((wanted + (1 << 21)) / (1 << 21) * (1 << 21)) {
    {
      std::lock_guard<std::mutex> guard(mutex);
      if (kept && kept_bytes >= bytes) {
        data = std::exchange(kept, nullptr);
        bytes = kept_bytes;
      }
    }
    if (!data) {
      data = (char*)std::aligned_alloc(1 << 21, bytes);
      if (data) advise(data, bytes);
    }
  }
  ~Workspace() {
    std::lock_guard<std::mutex> guard(mutex);
    if (bytes <= KEEP && bytes > (kept ? kept_bytes : 0)) {
      std::swap(kept, data);
      kept_bytes = bytes;
    }
    std::free(data);
  }
};

// ---- the layer ----

struct Layer {
  const int64_t* place;
  const int32_t* offset;
  const float* weight;
  int64_t N, E, K, D, F;
  bool on_input;
  int threads;

  int begin(int e) const { return e ? offset[e - 1] : 0; }
  int rows(int e) const { return offset[e] - begin(e); }
  int64_t item(int64_t r) const { return place[r] / K; }
  float weight_of(int64_t r) const { return weight[place[r]]; }

  std::vector<int32_t> row_of_place() const {
    std::vector<int32_t> row(N * K, -1);
    for (int32_t r = 0; r < offset[E - 1]; ++r) row[place[r]] = r;
    return row;
  }

  struct Task {
    int expert, begin, rows;
  };
  std::vector<Task> blocks() const {
    int most = (int)(600'000 / (4 * std::max(D, 2 * F)));  // the left operand should stay in the second-level cache
    most = std::min(288, std::max(96, most / MR * MR));
    std::vector<Task> tasks;
    for (int e = 0; e < E; ++e) {
      int count = rows(e), parts = (count + most - 1) / most;
      int size = parts ? ((count + parts - 1) / parts + MR - 1) / MR * MR : 0;
      for (int done = 0; done < count; done += size) tasks.push_back({e, begin(e) + done, std::min(size, count - done)});
    }
    return tasks;
  }
};

// y[n] = sum over places of rows[row of place], in place order.
template <class X>
inline void join(const Layer& layer, const X* rows, const int32_t* row, X* y, int64_t n) {
  for (int64_t c = 0; c < layer.D; c += VL) {
    vec sum = {};
    for (int64_t k = 0; k < layer.K; ++k)
      if (int32_t r = row[n * layer.K + k]; r >= 0) sum += load(rows + (int64_t)r * layer.D + c);
    store(y + n * layer.D + c, sum);
  }
}

template <class X, class W>
struct Experts : Layer {
  const X* x;
  const W *w13, *w2;

  template <class P, class Scale>
  Rows<P> gather(Scratch& scratch, Slot slot, const X* from, const Task& t, Scale scale) const {
    auto a = scratch.rows<P>(slot, t.rows, D);
    for (int i = 0; i < t.rows; ++i) {
      const X* row = from + item(t.begin + i) * D;
      float s = scale(t.begin + i);
      for (int c = 0; c < D; c += VL) a.put(i, c, load(row + c) * s);
    }
    return a;
  }

  // Gate and up of the same features share a tile: emit(row, feature, gate, up).
  template <class P, class Emit>
  void pre_activations(Scratch& scratch, const Task& t, Emit emit) const {
    auto a = gather<P>(scratch, LEFT, x, t, [&](int r) { return on_input ? weight_of(r) : 1.f; });
    multiply_by_rows<P>(
        scratch, a, t.rows, D, w13 + t.expert * 2 * F * D, F / VL, 2 * F,
        [&](int j, int v) { return v * F + (int64_t)j * VL; },
        [&](int i, int m, int column, int, const float* out, int64_t so) {
          for (int r = 0; r < m; ++r) emit(i + r, column / 2, load(out + r * so), load(out + r * so + VL));
        });
  }

  template <class P>
  void forward_block(Scratch& scratch, const Task& t, X* z, X* y_rows) const {
    auto act = scratch.rows<P>(MIDDLE, t.rows, F);
    pre_activations<P>(scratch, t, [&](int i, int f, vec gate, vec up) {
      act.put(i, f, gate * sigmoid(gate) * up);
      if (z) {
        X* row = z + (int64_t)(t.begin + i) * 2 * F + f;
        store(row, gate);
        store(row + F, up);
      }
    });
    multiply_by_rows<P>(
        scratch, act, t.rows, F, w2 + t.expert * D * F, (D + NR - 1) / NR, D,
        [](int j, int v) { return (int64_t)j * NR + v * VL; },
        [&](int i, int m, int column, int vectors, const float* out, int64_t so) {
          for (int r = 0; r < m; ++r) {
            int64_t row = t.begin + i + r;
            float s = on_input ? 1.f : weight_of(row);
            for (int v = 0; v < vectors; ++v) store(y_rows + row * D + column + v * VL, load(out + r * so + v * VL) * s);
          }
        });
  }

  // Phase 1 of the backward pass: dz, the weighted activation, the rows of dx, and dweight, of one block.
  template <class P>
  void backward_block(Scratch& scratch, const Task& t, const X* dy, const X* z, X* dz, X* act, X* dx_rows,
                      float* dweight) const {
    if (!z) {  // recompute
      X* again = scratch.get<X>(PRE, (int64_t)t.rows * 2 * F);
      pre_activations<P>(scratch, t, [&](int i, int f, vec gate, vec up) {
        store(again + (int64_t)i * 2 * F + f, gate);
        store(again + (int64_t)i * 2 * F + F + f, up);
      });
      z = again;
    } else {
      z += (int64_t)t.begin * 2 * F;
    }
    auto dy_rows = gather<P>(scratch, LEFT, dy, t, [](int) { return 1.f; });
    auto dz_rows = scratch.rows<P>(MIDDLE, t.rows, 2 * F);
    std::vector<vec> dot(t.rows, vec{});
    multiply<P>(scratch, dy_rows, t.rows, D, w2 + t.expert * D * F, F,
                [&](int i, int m, int column, int vectors, const float* out, int64_t so) {
                  for (int r = 0; r < m; ++r)
                    for (int v = 0; v < vectors; ++v) {
                      int64_t row = t.begin + i + r, f = column + v * VL;
                      const X* pre = z + (int64_t)(i + r) * 2 * F + f;
                      vec gate = load(pre), up = load(pre + F), sig = sigmoid(gate), silu = gate * sig;
                      vec dact = load(out + r * so + v * VL);  // w2^T dy
                      float s = on_input ? 1.f : weight_of(row);
                      dot[i + r] += dact * silu * up;  // dy . y_row = (w2^T dy) . act: y_row itself is not needed
                      dact *= s;
                      vec dgate = dact * up * (sig + silu * (1.f - sig)), dup = dact * silu;
                      dz_rows.put(i + r, f, dgate);
                      dz_rows.put(i + r, F + f, dup);
                      store(dz + row * 2 * F + f, dgate);
                      store(dz + row * 2 * F + F + f, dup);
                      store(act + row * F + f, silu * up * s);
                    }
                });
    if (!on_input)
      for (int i = 0; i < t.rows; ++i) dweight[place[t.begin + i]] = total(dot[i]);
    if (!dx_rows) return;
    std::fill(dot.begin(), dot.end(), vec{});
    multiply<P>(scratch, dz_rows, t.rows, 2 * F, w13 + t.expert * 2 * F * D, D,
                [&](int i, int m, int column, int vectors, const float* out, int64_t so) {
                  for (int r = 0; r < m; ++r)
                    for (int v = 0; v < vectors; ++v) {
                      int64_t row = t.begin + i + r, c = column + v * VL;
                      vec dx = load(out + r * so + v * VL);
                      if (on_input) {
                        dot[i + r] += dx * load(x + item(row) * D + c);
                        dx *= weight_of(row);
                      }
                      store(dx_rows + row * D + c, dx);
                    }
                });
    if (on_input)
      for (int i = 0; i < t.rows; ++i) dweight[place[t.begin + i]] = total(dot[i]);
  }

  // Phase 2: a range of columns of one expert's dw13 or dw2.
  template <class P>
  void gradient_block(Scratch& scratch, const Task& t, bool first_matrix, int part, int parts, const X* dy, const X* dz,
                      const X* act, W* dw13, W* dw2, bool add) const {
    int64_t columns = first_matrix ? D : F, vectors = columns / VL;
    int from = (int)(vectors * part / parts) * VL, to = (int)(vectors * (part + 1) / parts) * VL;
    bool around = E * D * F * 3 * (int64_t)sizeof(W) > LARGE;
    if (first_matrix)
      accumulate<P>(
          scratch, t.rows, 2 * F, D, from, to, dw13 + t.expert * 2 * F * D, add, around,
          [&](int k) { return dz + (int64_t)(t.begin + k) * 2 * F; }, [&](int k) { return x + item(t.begin + k) * D; },
          [&](int k) { return on_input ? weight_of(t.begin + k) : 1.f; });
    else
      accumulate<P>(
          scratch, t.rows, D, F, from, to, dw2 + t.expert * D * F, add, around,
          [&](int k) { return dy + item(t.begin + k) * D; }, [&](int k) { return act + (int64_t)(t.begin + k) * F; },
          [](int) { return 1.f; });
  }

  using Big = std::conditional_t<sizeof(X) == 2, Half, Plain>;

  int forward(X* y, X* z) const {
    int64_t R = offset[E - 1];
    Workspace workspace(R * D * sizeof(X));
    if (!workspace.data) return 1;
    X* y_rows = (X*)workspace.data;
    auto tasks = blocks();
    auto row = row_of_place();
    if (z) advise(z, N * K * 2 * F * sizeof(X));
#pragma omp parallel num_threads(threads)
    {
      static thread_local Scratch scratch;
#pragma omp for schedule(dynamic, 1)
      for (size_t i = 0; i < tasks.size(); ++i)
        if (tasks[i].rows <= FEW)
          forward_block<Plain>(scratch, tasks[i], z, y_rows);
        else
          forward_block<Big>(scratch, tasks[i], z, y_rows);
#pragma omp for schedule(static)
      for (int64_t n = 0; n < N; ++n) join(*this, y_rows, row.data(), y, n);
    }
    return 0;
  }

  int backward(const X* dy, const X* z, X* dx, float* dweight, W* dw13, W* dw2, bool add) const {
    int64_t R = offset[E - 1];
    bool need_rows = dx || on_input;
    Workspace workspace(R * (3 * F + (need_rows ? D : 0)) * sizeof(X));
    if (!workspace.data) return 1;
    X *dz = (X*)workspace.data, *act = dz + R * 2 * F, *dx_rows = need_rows ? act + R * F : nullptr;
    auto tasks = blocks();
    auto row = row_of_place();
    int active = 0;
    for (int e = 0; e < E; ++e) active += rows(e) > 0;
    int parts = std::max(1, 2 * threads / std::max(1, active));
    if (dw13 && !add) advise(dw13, E * 2 * F * D * sizeof(W));
    if (dw2 && !add) advise(dw2, E * D * F * sizeof(W));
    memset(dweight, 0, N * K * sizeof(float));
#pragma omp parallel num_threads(threads)
    {
      static thread_local Scratch scratch;
#pragma omp for schedule(dynamic, 1)
      for (size_t i = 0; i < tasks.size(); ++i)
        if (tasks[i].rows <= FEW)
          backward_block<Plain>(scratch, tasks[i], dy, z, dz, act, dx_rows, dweight);
        else
          backward_block<Big>(scratch, tasks[i], dy, z, dz, act, dx_rows, dweight);
#pragma omp for schedule(dynamic, 1) nowait
      for (int i = 0; i < (int)E * 2 * parts; ++i) {
        int e = i / parts % E, part = i % parts;
        bool first_matrix = i < (int)E * parts;
        Task t{e, begin(e), rows(e)};
        if (first_matrix ? !dw13 : !dw2) continue;
        if (t.rows == 0) {
          if (add) continue;
          if (part == 0 && first_matrix) memset((void*)(dw13 + e * 2 * F * D), 0, 2 * F * D * sizeof(W));
          if (part == 0 && !first_matrix) memset((void*)(dw2 + e * D * F), 0, D * F * sizeof(W));
        } else if (t.rows <= FEW) {
          gradient_block<Plain>(scratch, t, first_matrix, part, parts, dy, dz, act, dw13, dw2, add);
        } else {
          gradient_block<Big>(scratch, t, first_matrix, part, parts, dy, dz, act, dw13, dw2, add);
        }
      }
      if (dx)
#pragma omp for schedule(static)
        for (int64_t n = 0; n < N; ++n) join(*this, dx_rows, row.data(), dx, n);
    }
    return 0;
  }
};

template <class Call>
int dispatch_types(int types, Call call) {
  switch (types) {
    case 0: return call((float*)nullptr, (float*)nullptr);
    case 1: return call((bf16*)nullptr, (bf16*)nullptr);
    case 2: return call((bf16*)nullptr, (float*)nullptr);
  }
  return 2;
}

}  // namespace

// types: 0 all fp32; 1 all bf16; 2 bf16 items on fp32 weights (autocast), whose gradients are fp32. Return 0, or 1 when out
// of memory. A null z is not kept (forward) or computed again (backward); a null dx, dw13 or dw2 is not computed.
extern "C" int anabranch_expert_forward(int types, const void* x, const int64_t* place, const int32_t* offset,
                                        const float* weight, const void* w13, const void* w2, void* y, void* z, int64_t N,
                                        int64_t E, int64_t K, int64_t D, int64_t F, int on_input, int threads) {
  Layer layer{place, offset, weight, N, E, K, D, F, on_input != 0, threads};
  return dispatch_types(types, [&](auto* item, auto* matrix) {
    using X = std::remove_pointer_t<decltype(item)>;
    using W = std::remove_pointer_t<decltype(matrix)>;
    Experts<X, W> experts{layer, (const X*)x, (const W*)w13, (const W*)w2};
    return experts.forward((X*)y, (X*)z);
  });
}

extern "C" int anabranch_expert_backward(int types, const void* dy, const void* x, const int64_t* place,
                                         const int32_t* offset, const float* weight, const void* w13, const void* w2,
                                         const void* z, void* dx, float* dweight, void* dw13, void* dw2, int64_t N,
                                         int64_t E, int64_t K, int64_t D, int64_t F, int on_input, int threads, int add) {
  Layer layer{place, offset, weight, N, E, K, D, F, on_input != 0, threads};
  return dispatch_types(types, [&](auto* item, auto* matrix) {
    using X = std::remove_pointer_t<decltype(item)>;
    using W = std::remove_pointer_t<decltype(matrix)>;
    Experts<X, W> experts{layer, (const X*)x, (const W*)w13, (const W*)w2};
    return experts.backward((const X*)dy, (const X*)z, (X*)dx, dweight, (W*)dw13, (W*)dw2, add != 0);
  });
}

extern "C" void anabranch_release() {  // the kept workspace, back to the system
  std::lock_guard<std::mutex> guard(Workspace::mutex);
  std::free(std::exchange(Workspace::kept, nullptr));
  Workspace::kept_bytes = 0;
}
