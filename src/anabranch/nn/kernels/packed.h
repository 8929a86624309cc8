// Weights packed for few rows of activations, and their products: float32, bfloat16, int8, int4 and fp4. Included by the kernels beside.
//
// A matrix [rows, depth] lies in panels of 16 rows, so that a product fills whole vectors without sums across lanes. Within a panel, for
// k along the depth:
//
//     FLOAT    [k][16] float
//     HALF     [k / 2][16][2] bf16, what both the dot product of bf16 pairs and AMX tiles read
//     INT8     groups of [k / 4][16][4] bytes u, then [16] fp16 scales s, then 32 bytes of nothing:       w = s (u - 128)
//     INT4     groups of [k / 8][16][4] bytes, low half k .. k + 3, high half k + 4 .. k + 7 (u),
//              then [16] fp16 scales s, then [16] fp16 minima m:                                          w = s u + m
//     FP4      as INT4, whose u stand for t[u], then [16] bf16 scales s, then 32 bytes of nothing:        w = s t[u]
//
// Blocks of 256 along the depth, of 32 weights each (parts), with scales of small integers (superblocks.py), are kept as they were stored:
//
//     SUPER4   8 parts as of INT4, then [8][16] bytes s, [8][16] bytes m, [16] fp16 d, [16] fp16 e:      w = d s u - e m
//     SUPER5   the same, behind each part [16][4] bytes with the fifth bits: that of column 4 i + j is bit i of byte j
//     SUPER6   8 parts as of INT4, behind each two times [16][4] bytes with the two highest bits: those of column 4 i + j are bits 2 i of
//              byte j of the first or (i > 3) second; then [16][16] signed bytes s, one for 16 weights, and [16] fp16 d: w = d s (u - 32)
//
// and what is not packed, since it has just come and goes soon (experts of a budget), has its rows as they lie:
//
//     ROWS     [16][k] float
//     HALVES   [16][k] bf16
//
// Rows that are stored in several kinds of integers are parts, each of whole panels, one behind the other.
//
// Activations of integer weights are rounded to int8, 32 at a time with a scale of their own. A row's result does not depend on how many
// rows there are: every row is summed in one order, by the same instructions.

#pragma once

#include "matmul.h"
#include "tiles.h"

namespace {

constexpr int WIDE = 16;       // rows of a panel
constexpr int NV = WIDE / VL;  // vectors that hold them
constexpr int SHARE = 32;      // activations that share a scale
constexpr int BLOCK_ROWS = VL == 16 ? 12 : 4;

enum Kind : int64_t { FLOAT, HALF, INT8, INT4, ROWS, HALVES, SUPER4, SUPER5, SUPER6, FP4 };

inline bool takes_floats(int64_t kind) { return kind == FLOAT || kind == ROWS || kind == HALVES; }

struct Matrix {  // mirrored by packed.py
  const char* data;
  int64_t rows, depth, group, panel_bytes, kind, expert_bytes;
  int64_t first;       // panel of the whole that this part begins with
  const Matrix* next;  // the part behind, of other integers; null for none. `rows` of the first part are those of all
  int64_t beyond;      // bytes from the first matrix of a stack to this one: `data` is there already, that of parts behind is not

  int64_t panels() const { return (rows + WIDE - 1) / WIDE; }
  const Matrix& part_of(int64_t panel) const {
    const Matrix* part = this;
    while (part->next && panel >= part->next->first) part = part->next;
    return *part;
  }
  Matrix of(int64_t expert) const {
    Matrix one = *this;
    one.data += expert * expert_bytes;
    one.beyond += expert * expert_bytes;
    return one;
  }
};

// ---- activations ----

struct Activations {
  char* data;
  int64_t depth, row_bytes, kind;

  static int64_t bytes_of_row(int64_t depth, int64_t kind) {
    int64_t bytes = takes_floats(kind) ? depth * 4 : kind == HALF ? depth * 2 : depth + depth / SHARE * 12;
    return (bytes + 63) / 64 * 64;
  }
  char* row(int64_t i) const { return data + i * row_bytes; }
};

using bvec = int8_t __attribute__((vector_size(VL)));

inline void round_row(char* to, const float* x, int64_t depth) {
  float* scale = (float*)(to + depth);
  int32_t *sum = (int32_t*)(scale + depth / SHARE), *half = sum + depth / SHARE;
  const float magic = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer
  for (int64_t g = 0; g < depth / SHARE; ++g, x += SHARE, to += SHARE) {
    vec most{};
    for (int k = 0; k < SHARE; k += VL) {
      vec v = load(x + k), size = v < 0.f ? -v : v;
      most = size > most ? size : most;
    }
    float top = most[0];
    for (int i = 1; i < VL; ++i) top = std::max(top, most[i]);
    float inverse = top > 0.f ? 127.f / top : 0.f;
    vec added{}, first{};
    for (int k = 0; k < SHARE; k += VL) {
      vec whole = (load(x + k) * inverse + magic) - magic;
      added += whole;
      if (k < SHARE / 2) first += whole;
      bvec bytes = __builtin_convertvector(__builtin_convertvector(whole, ivec), bvec);
      memcpy(to + k, &bytes, sizeof bytes);
    }
    // What is no number has no integer: the scale says so, and with it all that the row gives.
    const float all = total(added);
    const bool is_number = all == all;
    scale[g] = is_number ? top / 127.f : NAN;
    sum[g] = is_number ? (int32_t)all : 0;
    half[g] = is_number ? (int32_t)total(first) : 0;
  }
}

inline void put_row(const Activations& a, int64_t row, const float* x) {
  char* to = a.row(row);
  if (a.kind == HALVES)  // rounded as for HALF, kept wide
    for (int64_t k = 0; k < a.depth; k += VL) store((float*)to + k, as<vec>(round_bits(load(x + k)) << 16));
  else if (takes_floats(a.kind))
    memcpy(to, x, a.depth * sizeof(float));
  else if (a.kind == HALF)
    for (int64_t k = 0; k < a.depth; k += VL) store((bf16*)to + k, load(x + k));
  else
    round_row(to, x, a.depth);
}

inline vec spread(float x) {
#if defined(__AVX512F__)
  return as<vec>(_mm512_set1_ps(x));
#else
  return x - vec{};  // x + 0 would be another number for -0, so a compiler would have to add
#endif
}

// c + a b, rounded once where there is an instruction for it: said in full, since a compiler may decide for some numbers of rows only.
inline vec fused(vec a, vec b, vec c) {
#if defined(__AVX512F__)
  return as<vec>(_mm512_fmadd_ps(as<__m512>(a), as<__m512>(b), as<__m512>(c)));
#elif defined(__FMA__) && defined(__AVX__)
  return as<vec>(_mm256_fmadd_ps(as<__m256>(a), as<__m256>(b), as<__m256>(c)));
#else
  return c + a * b;
#endif
}

// ---- sums of four products of bytes ----

using uvec8 = uint8_t __attribute__((vector_size(4 * VL)));

inline vec half_floats(const uint16_t* p) {
#if defined(__AVX512F__)
  return as<vec>(_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)));
#elif defined(__F16C__) && defined(__AVX__)
  return as<vec>(_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)));
#else
  vec v;
  for (int i = 0; i < VL; ++i) {
    uint32_t sign = (uint32_t)(p[i] & 0x8000) << 16, rest = p[i] & 0x7fff;
    float size = as<float>((rest << 13) + (112u << 23));       // a normal number
    if (rest < 0x400) size = (float)rest * 5.9604644775390625e-8f;  // below them, steps of 2^-24
    v[i] = as<float>(as<uint32_t>(size) | sign);
  }
  return v;
#endif
}

// sum + u[0..3] a[0..3] in each lane; u below 128 unless there are instructions for it.
inline ivec dot4(ivec sum, uvec8 u, int32_t a) {
#if defined(__AVX512VNNI__)
  return as<ivec>(_mm512_dpbusd_epi32(as<__m512i>(sum), as<__m512i>(u), _mm512_set1_epi32(a)));
#elif defined(__AVXVNNI__) && !defined(__AVX512F__)
  return as<ivec>(_mm256_dpbusd_avx_epi32(as<__m256i>(sum), as<__m256i>(u), _mm256_set1_epi32(a)));
#elif defined(__AVX2__) && !defined(__AVX512F__)
  __m256i pairs = _mm256_maddubs_epi16(as<__m256i>(u), _mm256_set1_epi32(a));
  return sum + as<ivec>(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#else
  for (int i = 0; i < VL; ++i)
    for (int j = 0; j < 4; ++j) sum[i] += (int32_t)u[4 * i + j] * (int8_t)(a >> (8 * j));
  return sum;
#endif
}
inline ivec dot4_bytes(ivec sum, uvec8 u, int32_t a) {
#if defined(__AVX2__) && !defined(__AVXVNNI__) && !defined(__AVX512F__)
  return dot4(sum, u & 15, a) + (dot4(ivec{}, u >> 4, a) << 4);  // pairs of larger bytes would overflow 16 bits
#else
  return dot4(sum, u, a);
#endif
}

// The whole numbers that codes of FP4 stand for, plus 12.
inline uvec8 levels(uvec8 u) {
  alignas(16) static constexpr uint8_t table[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};
#if defined(__AVX512BW__)
  return as<uvec8>(_mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_load_si128((const __m128i*)table)), as<__m512i>(u)));
#elif defined(__AVX2__) && !defined(__AVX512F__)
  return as<uvec8>(_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_load_si128((const __m128i*)table)), as<__m256i>(u)));
#else
  for (int i = 0; i < 4 * VL; ++i) u[i] = table[u[i]];
  return u;
#endif
}

// ---- products: out[M][16] = M rows of activations times one panel ----

template <int BITS, bool LEVELS, int M>
void product_integers(const Matrix& w, const char* panel, const char* const* rows, float* out) {
  vec sum[M][NV] = {};
  const int64_t shares = w.depth / SHARE, parts = w.group / SHARE;
  const int32_t* a[M];
  for (int i = 0; i < M; ++i) a[i] = (const int32_t*)rows[i];
  for (int64_t share = 0; share < shares;) {
    const uint16_t* side = (const uint16_t*)(panel + w.group * 2 * BITS);
    vec scale[NV], least[NV];
    for (int v = 0; v < NV; ++v) {
      scale[v] = LEVELS ? load((const bf16*)side + v * VL) : half_floats(side + v * VL);
      least[v] = BITS == 4 && !LEVELS ? half_floats(side + WIDE + v * VL) : vec{};
    }
    for (int64_t part = 0; part < parts; ++part, ++share) {
      ivec dot[M][NV];
#pragma GCC unroll 12
      for (int i = 0; i < M; ++i) {
        constexpr int32_t zero = BITS == 8 ? 128 : LEVELS ? 12 : 0;
        int32_t start = zero ? -zero * ((const int32_t*)(rows[i] + w.depth))[shares + share] : 0;
        for (int v = 0; v < NV; ++v) dot[i][v] = ivec{} + start;
      }
      const int64_t base = share * (SHARE / 4);
#pragma GCC unroll 8
      for (int step = 0; step < SHARE * BITS / 32; ++step, panel += 64) {
        for (int v = 0; v < NV; ++v) {
          uvec8 u = read<uvec8>(panel + v * 4 * VL);
          if constexpr (BITS == 4) {
            uvec8 low = u & 15, high = as<uvec8>((as<uvec>(u) >> 4) & 0x0f0f0f0fu);
            if constexpr (LEVELS) low = levels(low), high = levels(high);
#pragma GCC unroll 12
            for (int i = 0; i < M; ++i) dot[i][v] = dot4(dot[i][v], low, a[i][base + 2 * step]);
#pragma GCC unroll 12
            for (int i = 0; i < M; ++i) dot[i][v] = dot4(dot[i][v], high, a[i][base + 2 * step + 1]);
          } else {
#pragma GCC unroll 12
            for (int i = 0; i < M; ++i) dot[i][v] = dot4_bytes(dot[i][v], u, a[i][base + step]);
          }
        }
      }
#pragma GCC unroll 12
      for (int i = 0; i < M; ++i) {
        const float* scales = (const float*)(rows[i] + w.depth);
        float own = scales[share];
        float shift = BITS == 4 && !LEVELS ? own * (float)((const int32_t*)scales)[shares + share] : 0.f;
        for (int v = 0; v < NV; ++v) {
          sum[i][v] = fused(__builtin_convertvector(dot[i][v], vec), scale[v] * spread(own), sum[i][v]);
          if constexpr (BITS == 4 && !LEVELS) sum[i][v] = fused(least[v], spread(shift), sum[i][v]);
        }
      }
    }
    panel += 64;
  }
  for (int i = 0; i < M; ++i)
    for (int v = 0; v < NV; ++v) store(out + i * WIDE + v * VL, sum[i][v]);
}

// A part's numbers of one step: 4 columns in the low halves of bytes, 4 in the high ones, and above them the bits that are kept apart.
template <int BITS>
inline void numbers_of(const char* part, int step, int v, uvec8& low, uvec8& high) {
  uvec8 u = read<uvec8>(part + step * 64 + v * 4 * VL);
  low = u & 15, high = as<uvec8>((as<uvec>(u) >> 4) & 0x0f0f0f0fu);
  if constexpr (BITS > 4) {
    constexpr int own = BITS - 4;
    constexpr uint32_t mask = own == 1 ? 0x01010101u : 0x03030303u;
    uvec bits = as<uvec>(read<uvec8>(part + 256 + (own == 1 ? 0 : step / 2 * 64) + v * 4 * VL));
    int shift = own == 1 ? 2 * step : 4 * (step % 2);
    low |= as<uvec8>(((bits >> shift) & mask) << 4);
    high |= as<uvec8>(((bits >> (shift + own)) & mask) << 4);
  }
}

template <int BITS, int M>
void product_super(const Matrix& w, const char* panel, const char* const* rows, float* out) {
  using ubvec = uint8_t __attribute__((vector_size(VL)));
  constexpr int PARTS = 8, TURNS = BITS == 6 ? 2 : 1, STEPS = 4 / TURNS;  // turns: weights of a part with one scale
  vec sum[M][NV] = {};
  const int64_t shares = w.depth / SHARE;
  const int32_t* a[M];
  for (int i = 0; i < M; ++i) a[i] = (const int32_t*)rows[i];
  for (int64_t share = 0; share < shares;) {
    const char* side = panel + PARTS * 64 * BITS;
    const uint16_t* whole = (const uint16_t*)(side + PARTS * 2 * WIDE);
    for (int part = 0; part < PARTS; ++part, ++share, panel += 64 * BITS)
      for (int turn = 0; turn < TURNS; ++turn) {
        ivec dot[M][NV];
#pragma GCC unroll 12
        for (int i = 0; i < M; ++i) {
          const int32_t* sums = (const int32_t*)(rows[i] + w.depth) + shares;
          int32_t start = BITS != 6 ? 0 : -32 * (turn ? sums[share] - sums[shares + share] : sums[shares + share]);
          for (int v = 0; v < NV; ++v) dot[i][v] = ivec{} + start;
        }
#pragma GCC unroll 4
        for (int step = turn * STEPS; step < (turn + 1) * STEPS; ++step)
          for (int v = 0; v < NV; ++v) {
            uvec8 low, high;
            numbers_of<BITS>(panel, step, v, low, high);
            const int64_t base = share * (SHARE / 4) + 2 * step;
#pragma GCC unroll 12
            for (int i = 0; i < M; ++i) dot[i][v] = dot4(dot[i][v], low, a[i][base]);
#pragma GCC unroll 12
            for (int i = 0; i < M; ++i) dot[i][v] = dot4(dot[i][v], high, a[i][base + 1]);
          }
        for (int v = 0; v < NV; ++v) {
          const char* at = side + (part * TURNS + turn) * WIDE + v * VL;
          vec scale = half_floats(whole + v * VL), least{};
          if constexpr (BITS == 6)
            scale *= __builtin_convertvector(read<bvec>(at), vec);
          else {
            scale *= __builtin_convertvector(read<ubvec>(at), vec);
            least = -half_floats(whole + WIDE + v * VL) * __builtin_convertvector(read<ubvec>(at + PARTS * WIDE), vec);
          }
#pragma GCC unroll 12
          for (int i = 0; i < M; ++i) {
            const float* scales = (const float*)(rows[i] + w.depth);
            float own = scales[share];
            sum[i][v] = fused(__builtin_convertvector(dot[i][v], vec), scale * spread(own), sum[i][v]);
            if constexpr (BITS != 6) sum[i][v] = fused(least, spread(own * (float)((const int32_t*)scales)[shares + share]), sum[i][v]);
          }
        }
      }
    panel += WIDE * (BITS == 6 ? 18 : 20);
  }
  for (int i = 0; i < M; ++i)
    for (int v = 0; v < NV; ++v) store(out + i * WIDE + v * VL, sum[i][v]);
}

template <int M>
void product_floats(const Matrix& w, const char* panel, const char* const* rows, float* out) {
  vec sum[M][NV] = {};
  for (int64_t k = 0; k < w.depth; ++k, panel += 4 * WIDE)
    for (int v = 0; v < NV; ++v) {
      vec column = read<vec>(panel + v * 4 * VL);
#pragma GCC unroll 12
      for (int i = 0; i < M; ++i) sum[i][v] = fused(spread(((const float*)rows[i])[k]), column, sum[i][v]);
    }
  for (int i = 0; i < M; ++i)
    for (int v = 0; v < NV; ++v) store(out + i * WIDE + v * VL, sum[i][v]);
}

template <int M>
void product_halves(const Matrix& w, const char* panel, const char* const* rows, float* out) {
  vec sum[M][NV] = {};
  for (int64_t k = 0; k < w.depth / 2; ++k, panel += 4 * WIDE)
    for (int v = 0; v < NV; ++v) {
      vec pairs = read<vec>(panel + v * 4 * VL);
#pragma GCC unroll 12
      for (int i = 0; i < M; ++i) {
        uint32_t pair = ((const uint32_t*)rows[i])[k];
#ifdef __AVX512BF16__
        sum[i][v] = Pairs::fma(sum[i][v], pair, pairs);
#else
        sum[i][v] = fused(spread(as<float>(pair << 16)), as<vec>(as<uvec>(pairs) << 16), sum[i][v]);
        sum[i][v] = fused(spread(as<float>(pair & 0xffff0000u)), as<vec>(as<uvec>(pairs) & 0xffff0000u), sum[i][v]);
#endif
      }
    }
  for (int i = 0; i < M; ++i)
    for (int v = 0; v < NV; ++v) store(out + i * WIDE + v * VL, sum[i][v]);
}

// Sums along the rows: each of a weight row with an activation is one chain, so that none depends on how many there are.
template <class W, int M>
void product_rows(const Matrix& w, const char* panel, const char* const* rows, float* out) {
  constexpr int TOGETHER = M <= 2 ? 8 : M <= 4 ? 4 : 2;  // of them, as many as registers hold
  vec all[M][WIDE];
  for (int c = 0; c < WIDE; c += TOGETHER) {
    vec sum[TOGETHER][M] = {};
    const W* weight = (const W*)panel + c * w.depth;
    for (int64_t k = 0; k < w.depth; k += VL) {
      vec x[M];
#pragma GCC unroll 12
      for (int i = 0; i < M; ++i) x[i] = load((const float*)rows[i] + k);
#pragma GCC unroll 8
      for (int j = 0; j < TOGETHER; ++j) {
        vec along = load(weight + j * w.depth + k);
#pragma GCC unroll 12
        for (int i = 0; i < M; ++i) sum[j][i] = fused(along, x[i], sum[j][i]);
      }
    }
#pragma GCC unroll 12
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 8
      for (int j = 0; j < TOGETHER; ++j) all[i][c + j] = sum[j][i];
  }
  for (int i = 0; i < M; ++i)
    for (int v = 0; v < NV; ++v) store(out + i * WIDE + v * VL, totals(all[i] + v * VL));
}

using Product = void (*)(const Matrix&, const char*, const char* const*, float*);
template <int... M>
inline Product product_of(std::integer_sequence<int, M...>, int64_t kind, int m) {
  static constexpr Product floats[] = {product_floats<M + 1>...}, halves[] = {product_halves<M + 1>...};
  static constexpr Product bytes[] = {product_integers<8, false, M + 1>...}, nibbles[] = {product_integers<4, false, M + 1>...};
  static constexpr Product fours[] = {product_integers<4, true, M + 1>...};
  static constexpr Product rows[] = {product_rows<float, M + 1>...}, half_rows[] = {product_rows<bf16, M + 1>...};
  static constexpr Product super4[] = {product_super<4, M + 1>...}, super5[] = {product_super<5, M + 1>...};
  static constexpr Product super6[] = {product_super<6, M + 1>...};
  static constexpr const Product* of_kind[] = {floats, halves, bytes, nibbles, rows, half_rows, super4, super5, super6, fours};
  return of_kind[kind][m - 1];
}

constexpr int64_t SPARE_ROWS = PAIRED_ROWS;  // readable rows behind the last one of activations

// emit(row, panel, out[16]) for `count` rows from `first` on and the panels from `begin` to `end`.
template <class Emit>
void multiply(const Matrix& w, const Activations& a, int64_t first, int64_t count, int64_t begin, int64_t end, Emit emit) {
  alignas(64) float out[2 * PAIRED_ROWS * WIDE];
#ifdef ANABRANCH_TILES
  if (w.kind == HALF && may_use_tiles()) {
    float* beside = out + PAIRED_ROWS * WIDE;
    for (int64_t j = begin; j < end; j += 2) {
      bool two = j + 1 < end;
      const char* panel = w.data + j * w.panel_bytes;
      TiledRight right{panel, two ? panel + w.panel_bytes : nullptr, 4 * WIDE};
      for (int64_t i = 0; i < count; i += PAIRED_ROWS) {
        int64_t m = std::min(PAIRED_ROWS, count - i);
        multiply_tiles({a.row(first + i), a.row_bytes, m > TILE}, right, w.depth / (2 * TILE_PAIRS), {out, beside, 4 * WIDE}, false);
        for (int64_t r = 0; r < m; ++r) emit(first + i + r, j, out + r * WIDE);
        for (int64_t r = 0; two && r < m; ++r) emit(first + i + r, j + 1, beside + r * WIDE);
      }
    }
    return;
  }
#endif
  const char* rows[BLOCK_ROWS];
  int64_t blocks = (count + BLOCK_ROWS - 1) / BLOCK_ROWS;
  for (int64_t j = begin; j < end; ++j) {
    const Matrix& part = w.part_of(j);
    const char* data = &part == &w ? w.data : part.data + w.beyond;
    for (int64_t block = 0; block < blocks; ++block) {
      int64_t from = count * block / blocks, m = count * (block + 1) / blocks - from;
      for (int64_t r = 0; r < m; ++r) rows[r] = a.row(first + from + r);
      product_of(std::make_integer_sequence<int, BLOCK_ROWS>{}, part.kind, (int)m)(part, data + (j - part.first) * part.panel_bytes, rows, out);
      for (int64_t r = 0; r < m; ++r) emit(first + from + r, j, out + r * WIDE);
    }
  }
}

struct Range {
  int64_t begin, end;
};
inline Range share_of(int64_t count, int thread, int threads) { return {count * thread / threads, count * (thread + 1) / threads}; }

}  // namespace
