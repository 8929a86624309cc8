// Matmul tiles of CPU vectors, and what goes into them: what the kernels beside share. Included by each, so all of it is theirs alone.

#pragma once

#include <omp.h>

#include <algorithm>
#include <cmath>
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

#include "tiles.h"

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
constexpr int SUM_ROWS = PAIRED_ROWS;  // of the sums that a product holds at a time, at most
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

// Lanes of a, and from as many on as it has of b. GCC takes them as a vector, in all its versions; clang one by one.
template <class Mask, int... LANE, class V>
inline V shuffled(V a, V b) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, LANE...);
#else
  return __builtin_shuffle(a, b, Mask{LANE...});
#endif
}
template <class Index, int... LANE>
inline vec picked(vec a, vec b, std::integer_sequence<int, LANE...>) {
  return shuffled<ivec, Index::at(LANE)...>(a, b);
}
template <class Index>
inline vec picked(vec a, vec b) {
  return picked<Index>(a, b, std::make_integer_sequence<int, VL>());
}

template <int WIDTH>
struct Across {
  static constexpr int at(int lane) { return lane ^ WIDTH; }
};
template <int WIDTH = VL / 2>
inline float total(vec v) {  // halves onto halves, in registers
  v += picked<Across<WIDTH>>(v, v);
  if constexpr (WIDTH > 1)
    return total<WIDTH / 2>(v);
  else
    return v[0];
}

// Lane i is the sum of vectors[i]: halves of two are added at a time, which takes a quarter of the work of so many totals.
template <int HALF, int SHIFT>
struct HalfOf {
  static constexpr int at(int lane) {
    int within = lane % (2 * HALF), first = lane - within;
    return SHIFT + (within < HALF ? lane : VL + first + within - HALF);
  }
};
template <int HALF>
inline void add_halves(vec* part) {
#pragma GCC unroll 8
  for (int i = 0; i < HALF; ++i) part[i] = picked<HalfOf<HALF, 0>>(part[i], part[i + HALF]) + picked<HalfOf<HALF, HALF>>(part[i], part[i + HALF]);
  if constexpr (HALF > 1) add_halves<HALF / 2>(part);
}
inline vec totals(const vec* vectors) {
  vec part[VL];
  for (int i = 0; i < VL; ++i) part[i] = vectors[i];
  add_halves<VL / 2>(part);
  return part[0];
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

// VL rows to columns, of a panel or of anything else whose rows are `stride` apart.
inline void transpose(const uint32_t* source, int64_t ld, int64_t depth, uint32_t* panel, int64_t stride = NR) {
  for (int c = 0; c < VL; c += 4)
    for (int64_t k = 0; k < depth; k += 4) {
      const uint32_t* p = source + c * ld + k;
      quad a = read<quad>(p), b = read<quad>(p + ld), d = read<quad>(p + 2 * ld), e = read<quad>(p + 3 * ld);
      quad ab0 = shuffled<quad, 0, 4, 1, 5>(a, b), ab1 = shuffled<quad, 2, 6, 3, 7>(a, b);
      quad de0 = shuffled<quad, 0, 4, 1, 5>(d, e), de1 = shuffled<quad, 2, 6, 3, 7>(d, e);
      quad column[4] = {shuffled<quad, 0, 1, 4, 5>(ab0, de0), shuffled<quad, 2, 3, 6, 7>(ab0, de0),
                        shuffled<quad, 0, 1, 4, 5>(ab1, de1), shuffled<quad, 2, 3, 6, 7>(ab1, de1)};
      for (int i = 0; i < 4; ++i) memcpy(panel + (k + i) * stride + c, &column[i], 16);
    }
}

// VL rows, `stride` apart, summed along their length: column c of the panel is row c.
template <class P, class W>
void pack_rows_as_columns(const W* w, int64_t length, typename P::elem* panel, typename P::elem* spare, int64_t stride) {
  if (sizeof(W) * P::pack == 4 && stride % P::pack == 0) {
    transpose((const uint32_t*)w, stride / P::pack, length / P::pack, (uint32_t*)panel);
  } else {  // convert first
    for (int c = 0; c < VL; ++c)
      for (int64_t k = 0; k < length; k += VL) {
        if constexpr (P::pack == 1)
          store((float*)spare + c * length + k, load(w + c * stride + k));
        else
          store((bf16*)spare + c * length + k, load(w + c * stride + k));
      }
    transpose((const uint32_t*)spare, length / P::pack, length / P::pack, (uint32_t*)panel);
  }
}

struct Unscaled {
  constexpr float operator()(int) const { return 1.f; }
};

// VL numbers of rows k and k + 1, as a matmul sums them: row(k) points at the first, scaled by scale(k); nothing stands behind `count`.
template <class P, class Row, class Scale>
inline vec summed_rows(int k, int count, int column, Row row, Scale scale) {
  bool both = P::pack == 2 && k + 1 < count;
  auto low = row(k) + column, high = both ? row(k + 1) + column : low;
  if constexpr (P::pack == 2 && sizeof *low == 2 && std::is_same_v<Scale, Unscaled>) {
    uvec bits = __builtin_convertvector(read<hvec>(low), uvec);
    return as<vec>(both ? bits | __builtin_convertvector(read<hvec>(high), uvec) << 16 : bits);
  }
  return P::pair(load(low) * scale(k), both ? load(high) * scale(k + 1) : vec{});
}

// `count` rows of `columns` numbers, summed over rows.
template <class P, class Row, class Scale>
inline void pack_rows(int count, int columns, int stride, typename P::elem* panel, Row row, Scale scale) {
  for (int k = 0; k < count; k += P::pack) {
    float* out = (float*)panel + (int64_t)(k / P::pack) * stride;
    for (int c = 0; c < columns; c += VL) store(out + c, summed_rows<P>(k, count, c, row, scale));
  }
}

// The same for a left operand of matrix units: [column][pair], `stride` apart, with zeros up to whole tiles.
template <class P, class Row>
inline void pack_rows_turned(int count, int columns, int64_t stride, typename P::elem* to, Row row) {
  alignas(64) uint32_t block[TILE_PAIRS * VL];
  for (int k = 0; k < count; k += 2 * TILE_PAIRS)
    for (int c = 0; c < columns; c += VL) {
      for (int pair = 0; pair < TILE_PAIRS; ++pair)
        store((float*)block + pair * VL, k + 2 * pair < count ? summed_rows<P>(k + 2 * pair, count, c, row, Unscaled()) : vec{});
      transpose(block, VL, VL, (uint32_t*)to + c * stride + k / 2, stride);
    }
}

// ---- matmuls of a block of rows; emit(first row, rows, first column, vectors, out, stride of out) takes each tile ----

#ifdef ANABRANCH_TILES
// The right's two vectors of columns as matrix units take them.
inline TiledRight tiled(const uint32_t* panel, int vectors) { return {panel, vectors == 2 ? panel + TILE : nullptr, 4 * NR}; }
inline TiledSums tiled(float* out) { return {out, out + TILE, 4 * NR}; }

template <class P, class Emit, class Fetch>
void product_in_tiles(const Rows<P>& a, int rows, int depth, const uint32_t* panel, int column, int vectors, float* out, Emit& emit,
                      Fetch& fetch) {
  static_assert(VL == TILE);
  for (int i = 0; i < rows; i += PAIRED_ROWS) {
    int m = std::min<int>(PAIRED_ROWS, rows - i);
    fetch(i + m);
    for (int k = 0; k < depth; k += LANE_K) {
      int pairs = std::min(LANE_K, depth - k), whole = pairs / TILE_PAIRS * TILE_PAIRS, lane = k / LANE_K;
      const uint32_t* right = panel + (int64_t)k * NR;
      if (whole) multiply_tiles({a.at(i, lane), 4 * LDA, m > TILE}, tiled(right, vectors), whole / TILE_PAIRS, tiled(out), k > 0);
      for (int r = 0; whole < pairs && r < m; r += MR)
        tile_any<P, LDA>(std::min(MR, m - r), vectors, a.at(i + r, lane) + whole, 1, right + whole * NR, NR, pairs - whole,
                         out + r * NR, NR, k + whole > 0);
    }
    emit(i, m, column, vectors, out, NR);
  }
}
#endif

template <class P>
inline bool takes_tiles() {
  return P::pack == 2 && may_use_tiles();
}

// Meanwhile the first `lines` of what comes next are asked for, which lie at line(i): weights come from memory, a panel from many places.
template <class P, class Emit, class Line>
inline void product(const Rows<P>& a, int rows, int depth, const typename P::elem* panel, int column, int vectors,
                    float* out, Emit& emit, int64_t lines, Line line) {
  auto fetch = [&, asked = (int64_t)0](int done) mutable {
    for (const int64_t until = lines * done / rows; asked < until; ++asked) __builtin_prefetch(line(asked), 0, 2);
  };
#ifdef ANABRANCH_TILES
  if constexpr (P::pack == 2)
    if (takes_tiles<P>()) return product_in_tiles(a, rows, depth, panel, column, vectors, out, emit, fetch);
#endif
  for (int i = 0; i < rows; i += MR) {
    int m = std::min(MR, rows - i);
    fetch(i + m);
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

enum Slot { LEFT, MIDDLE, PANEL, SPARE, PRE, SUM, TURNED, RIGHT, SCORES, CHANGES, GRADIENTS, SLOTS };

struct Scratch {  // one thread's memory; grows, and is kept between calls
  std::vector<char> memory[SLOTS];
  template <class T>
  T* get(int slot, int64_t count) {
    int64_t bytes = count * (int64_t)sizeof(T) + 64;
    if ((int64_t)memory[slot].size() < bytes) memory[slot].resize(bytes);
    return (T*)(((uintptr_t)memory[slot].data() + 63) & ~(uintptr_t)63);
  }
  template <class P>
  Rows<P> rows(int slot, int count, int columns) {
    int lanes = (columns + LANE_K * P::pack - 1) / (LANE_K * P::pack);
    if (takes_tiles<P>()) count = (int)((count + PAIRED_ROWS - 1) / PAIRED_ROWS * PAIRED_ROWS);
    return {get<typename P::elem>(slot, (int64_t)lanes * count * LDA), count};
  }
};

// The left operand of a gradient: columns of rows that are summed over, as the machine's matmul reads them.
template <class P>
class Columns {
 public:
  Columns(Scratch& scratch, Slot slot, int rows, int M)
      : M(M), pairs((rows + 1) / 2 + 2 * TILE_PAIRS), data(scratch.get<typename P::elem>(slot, takes_tiles<P>() ? pairs * M : (int64_t)rows * M)) {}

  template <class Row>
  void pack(int count, Row row) {
    depth = (count + P::pack - 1) / P::pack;
    if constexpr (P::pack == 2)
      if (takes_tiles<P>()) return pack_rows_turned<P>(count, M, pairs, data, row);
    pack_rows<P>(count, M, M, data, row, Unscaled());
  }

  static int height() { return takes_tiles<P>() ? (int)PAIRED_ROWS : MR; }

  // out[m][NR] = the m columns from i on times a panel, whose pairs end in zeros up to whole tiles.
  void times(int i, int m, const typename P::elem* panel, int vectors, float* out) const {
#ifdef ANABRANCH_TILES
    if constexpr (P::pack == 2)
      if (takes_tiles<P>())
        return multiply_tiles({data + i * pairs, 4 * pairs, m > TILE}, tiled(panel, vectors), (depth + TILE_PAIRS - 1) / TILE_PAIRS, tiled(out), false);
#endif
    tile_any<P, 1>(m, vectors, data + i, M, panel, NR, depth, out, NR, false);
  }

 private:
  int M;
  int64_t pairs;  // between columns for tiles; what is more than whole tiles keeps them out of each other's cache sets
  typename P::elem* data;
  int depth = 0;
};

}  // namespace
