// Causal attention over a paged key-value cache, for the rows of many sequences at once, on CPUs. C ABI; compiled and loaded by
// kernels/__init__.py.
//
// Shapes: P streams, T rows of a step, N sequences, H query heads, G key heads (each shared by H / G query heads), D head width, M entries
// in front of every sequence. The pool is [P, slots, G, D]; position p of a sequence lies in slot table[p / size] * size + p % size.
//
// First the new keys and values are written to their slots. Then a task is up to QUERIES rows of one sequence on one key head: its query
// heads are rows too, so that a row of keys is read once for all of them. Keys are taken KEYS at a time, turned into columns, scored, and
// weighed by a softmax that goes along (Milakov and Gimelshein 2018, arXiv 1805.02867).
//
// What makes it exact: blocks of keys begin at multiples of KEYS of the sequence, and every sum has one order. So a row's result depends
// neither on the other rows of the step, nor on how its sequence was cut into steps, nor on the number of threads.

#include "failure.h"
#include "matmul.h"

namespace {

constexpr int QUERIES = 4 * MR;  // rows of a task: query heads times positions
constexpr int KEYS = 2 * NR;     // of one turn; their columns stay in the first cache

// Multiplies and adds in one rounding, whatever the size of a tile: left to itself the compiler does so in some sizes only.
struct Fused : Plain {
  static inline vec fma(vec acc, float a, vec b) {
#if defined(__AVX512F__)
    return as<vec>(_mm512_fmadd_ps(_mm512_set1_ps(a), as<__m512>(b), as<__m512>(acc)));
#elif defined(__AVX__) && defined(__FMA__)
    return as<vec>(_mm256_fmadd_ps(_mm256_set1_ps(a), as<__m256>(b), as<__m256>(acc)));
#else
    return acc + a * b;
#endif
  }
};

struct Sequence {  // as the caller lays it out
  int64_t first, count, past, table;
};

template <class W>
struct Paged {
  const W *q, *new_k, *new_v;
  W *y, *pool_k, *pool_v;
  const W *front_k, *front_v;  // [P, G, M, D]
  const int64_t* strides;      // (stream, head, row) of q, new k, new v, y
  const Sequence* sequences;
  const int32_t* table;
  int64_t P, T, N, H, G, D, M, slots, block;
  float scale;

  int64_t at(int tensor, int64_t p, int64_t head, int64_t row) const {
    const int64_t* s = strides + 3 * tensor;
    return p * s[0] + head * s[1] + row * s[2];
  }
  int64_t slot(const Sequence& s, int64_t position) const {
    return (int64_t)table[s.table + position / block] * block + position % block;
  }
  int64_t stored(int64_t p, int64_t slot, int64_t g) const { return ((p * slots + slot) * G + g) * D; }
  int64_t queries_per_task() const { return std::max<int64_t>(1, QUERIES / (H / G)); }
};

struct Task {
  int64_t work;
  int32_t p, n, g;
  int64_t first;  // position in the chunk
};

template <class W>
void write_rows(const Paged<W>& a, int64_t p, int64_t n) {
  const Sequence& s = a.sequences[n];
  for (int64_t i = 0; i < s.count; ++i) {
    int64_t slot = a.slot(s, s.past + i);
    for (int64_t g = 0; g < a.G; ++g) {
      memcpy(a.pool_k + a.stored(p, slot, g), a.new_k + a.at(1, p, g, s.first + i), a.D * sizeof(W));
      memcpy(a.pool_v + a.stored(p, slot, g), a.new_v + a.at(2, p, g, s.first + i), a.D * sizeof(W));
    }
  }
}

inline float widen(float x) { return x; }
inline float widen(bf16 x) { return as<float>((uint32_t)x.bits << 16); }
inline void narrow(float* to, float x) { *to = x; }
inline void narrow(bf16* to, float x) {
  uint32_t u = as<uint32_t>(x);
  to->bits = x != x ? 0x7fc0 : (uint16_t)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

// A row of `width` numbers as floats, zeros up to a multiple of VL.
template <class W>
inline void widen_row(const W* from, int64_t width, float* to) {
  int64_t c = 0;
  for (; c + VL <= width; c += VL) store(to + c, load(from + c));
  for (int64_t end = (width + VL - 1) / VL * VL; c < end; ++c) to[c] = c < width ? widen(from[c]) : 0.f;
}

// Where rows of keys or values lie from one on that are evenly spaced: in front, or in a block.
template <class W>
struct Run {
  const W* row;
  int64_t stride, count;
};

template <class W>
Run<W> run_at(const Paged<W>& a, const Task& t, const W* pool, const W* front, int64_t index) {
  if (index < a.M) return {front + ((t.p * a.G + t.g) * a.M + index) * a.D, a.D, a.M - index};
  const int64_t position = index - a.M, within = position % a.block;
  const int64_t slot = (int64_t)a.table[a.sequences[t.n].table + position / a.block] * a.block + within;
  return {pool + a.stored(t.p, slot, t.g), a.G * a.D, a.block - within};
}

// `count` keys or values from `first` on, entries in front counted, as rows of floats; zeros up to `rows`.
template <class W>
void gather(const Paged<W>& a, const Task& t, const W* pool, const W* front, int64_t first, int64_t count, int64_t rows, int64_t width,
            float* to) {
  for (int64_t i = 0; i < count;) {
    Run<W> run = run_at(a, t, pool, front, first + i);
    for (int64_t end = std::min(count, i + run.count); i < end; ++i, run.row += run.stride) widen_row(run.row, a.D, to + i * width);
  }
  if (count < rows) memset(to + count * width, 0, (rows - count) * width * sizeof(float));
}

// KEYS keys as columns: panel j holds NR of them, [width][NR]. Those behind `count` are zero.
template <class W>
void gather_columns(const Paged<W>& a, const Task& t, int64_t first, int64_t count, int64_t width, float* spare, float* columns) {
  for (int64_t c = 0; c < KEYS; c += VL) {
    uint32_t* panel = (uint32_t*)(columns + c / NR * NR * width + c % NR);
    if (sizeof(W) == sizeof(float) && a.D == width && c + VL <= count) {
      Run<W> run = run_at(a, t, a.pool_k, a.front_k, first + c);
      if (run.count >= VL) {  // read where they lie
        transpose((const uint32_t*)run.row, run.stride, width, panel);
        continue;
      }
    }
    gather(a, t, a.pool_k, a.front_k, first + c, std::clamp<int64_t>(count - c, 0, VL), VL, width, spare);
    transpose((const uint32_t*)spare, width, width, panel);
  }
}

// out[rows][width] += weights[rows][count] times values `first` to `first + count`.
template <class W>
void add_values(const Paged<W>& a, const Task& t, int64_t first, int64_t count, int64_t width, int rows, const float* weight, float* spare,
                float* out) {
  auto multiply = [&](const float* value, int64_t stride, int64_t from, int64_t depth) {
    for (int i = 0; i < rows; i += MR)
      for (int64_t c = 0; c < width; c += NR)
        tile_any<Fused, LDA>(std::min(MR, rows - i), (int)std::min<int64_t>(2, (width - c) / VL), weight + i * LDA + from, 1, value + c,
                             stride, depth, out + i * width + c, width, true);
  };
  if (sizeof(W) == sizeof(float) && a.D == width && rows <= MR) {  // few rows: read where they lie
    for (int64_t i = 0; i < count;) {
      Run<W> run = run_at(a, t, a.pool_v, a.front_v, first + i);
      int64_t depth = std::min(run.count, count - i);
      multiply((const float*)run.row, run.stride, i, depth);
      i += depth;
    }
    return;
  }
  gather(a, t, a.pool_v, a.front_v, first, count, count, width, spare);
  multiply(spare, width, 0, count);
}

inline vec lanes_below(int64_t from, int64_t limit, vec v, float other) {  // v where from + lane < limit
  vec number;
  for (int i = 0; i < VL; ++i) number[i] = (float)(from + i);
  return number < (float)limit ? v : vec{} + other;
}

inline float greatest_of(vec v) {
  float found = v[0];
  for (int i = 1; i < VL; ++i) found = std::max(found, v[i]);
  return found;
}

struct Running {  // of one row: the largest score so far, and the sum of exp(score - largest)
  float most = -INFINITY, sum = 0.f;
};

// Scores of one row, of which it sees `seen`, to weights; the factor that what was summed before shrinks by.
inline float weigh_row(float* score, int64_t seen, Running& state) {
  vec most = vec{} - INFINITY;
  for (int k = 0; k < KEYS; k += VL) {
    vec v = lanes_below(k, seen, load(score + k), -INFINITY);
    most = v > most ? v : most;
  }
  float now = std::max(state.most, greatest_of(most));
  float factor = exponential(vec{} + (state.most - now))[0];
  vec sum{};
  for (int k = 0; k < KEYS; k += VL) {
    vec e = lanes_below(k, seen, exponential(load(score + k) - now), 0.f);
    store(score + k, e);
    sum += e;
  }
  state.sum = std::fma(state.sum, factor, total(sum));
  state.most = now;
  return factor;
}

thread_local Scratch scratch_of_paged;

template <class W>
void attend(const Paged<W>& a, const Task& t) {
  const Sequence& s = a.sequences[t.n];
  const int64_t shared = a.H / a.G, width = (a.D + VL - 1) / VL * VL;
  const int64_t positions = std::min(a.queries_per_task(), s.count - t.first);
  const int rows = (int)(positions * shared);
  Scratch& scratch = scratch_of_paged;
  float* query = scratch.get<float>(LEFT, rows * LDA);
  float* out = scratch.get<float>(SUM, rows * width);
  float* gathered = scratch.get<float>(SPARE, KEYS * width);
  float* columns = scratch.get<float>(PANEL, KEYS * width);
  float* score = scratch.get<float>(MIDDLE, rows * LDA);
  std::vector<Running> state(rows);
  for (int64_t i = 0; i < positions; ++i)
    for (int64_t h = 0; h < shared; ++h) {
      float* row = query + (i * shared + h) * LDA;
      widen_row(a.q + a.at(0, t.p, t.g * shared + h, s.first + t.first + i), a.D, row);
      for (int64_t c = 0; c < width; c += VL) store(row + c, load(row + c) * a.scale);
    }
  memset(out, 0, rows * width * sizeof(float));
  const int64_t first_sees = a.M + s.past + t.first + 1, end = first_sees + positions - 1;
  for (int64_t key = 0; key < end; key += KEYS) {
    int64_t count = std::min<int64_t>(KEYS, end - key);
    gather_columns(a, t, key, count, width, gathered, columns);
    for (int i = 0; i < rows; i += MR)
      for (int64_t c = 0; c < KEYS; c += NR)
        tile_any<Fused, LDA>(std::min(MR, rows - i), 2, query + i * LDA, 1, columns + c * width, NR, width, score + i * LDA + c, LDA,
                             false);
    for (int i = 0; i < rows; ++i) {
      int64_t seen = first_sees + i / shared - key;
      if (seen <= 0) {  // nothing of this block: it adds zeros
        memset(score + i * LDA, 0, KEYS * sizeof(float));
        continue;
      }
      float factor = weigh_row(score + i * LDA, seen, state[i]);
      if (factor != 1.f)
        for (int64_t c = 0; c < width; c += VL) store(out + i * width + c, load(out + i * width + c) * factor);
    }
    add_values(a, t, key, count, width, rows, score, gathered, out);
  }
  for (int i = 0; i < rows; ++i) {
    W* y = a.y + a.at(3, t.p, t.g * shared + i % shared, s.first + t.first + i / shared);
    float inverse = 1.f / state[i].sum;
    for (int64_t c = 0; c < a.D; ++c) narrow(y + c, out[i * width + c] * inverse);
  }
}

// Whether all rows and blocks are among those that there are.
template <class W>
bool is_in_range(const Paged<W>& a, int64_t length) {
  for (int64_t n = 0; n < a.N; ++n) {
    const Sequence& s = a.sequences[n];
    if (s.first < 0 || s.count < 0 || s.past < 0 || s.table < 0 || s.first > a.T - s.count) return false;
    const int64_t blocks = (s.past + s.count + a.block - 1) / a.block;
    if (blocks > length - s.table) return false;
    for (int64_t u = s.table; u < s.table + blocks; ++u)
      if (a.table[u] < 0 || (a.table[u] + (int64_t)1) * a.block > a.slots) return false;
  }
  return true;
}

template <class W>
int run(const Paged<W>& a, int64_t length, int threads) {
  if (a.block < 1 || !is_in_range(a, length)) return OUT_OF_RANGE;
  Failure failure;
  std::vector<Task> tasks;
  for (int64_t n = 0; n < a.N; ++n) {
    const Sequence& s = a.sequences[n];
    for (int64_t first = 0; first < s.count; first += a.queries_per_task()) {
      int64_t rows = std::min(a.queries_per_task(), s.count - first);
      int64_t work = (a.M + s.past + first + rows) * (rows + 2);  // what is gathered counts as much as two rows' products
      for (int64_t p = 0; p < a.P; ++p)
        for (int64_t g = 0; g < a.G; ++g) tasks.push_back({work, (int32_t)p, (int32_t)n, (int32_t)g, first});
    }
  }
  std::stable_sort(tasks.begin(), tasks.end(), [](const Task& x, const Task& y) { return x.work > y.work; });
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < a.P * a.N; ++i) write_rows(a, i / a.N, i % a.N);  // all are written before any is read
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < (int64_t)tasks.size(); ++i) failure.guard([&] { attend(a, tasks[i]); });
  }
  return failure.status();
}

}  // namespace

// `strides` are (stream, head, row) of q, new k, new v and y; `pool_k` and `pool_v` [P, slots, G, D]; `front_k` and `front_v` [P, G, M, D] or
// null; `sequences` [N][4]: first row, rows, positions stored before, where its blocks begin in `table` [U] of numbers of blocks.
extern "C" int anabranch_paged_attention(int half, const void* q, const void* new_k, const void* new_v, void* y, void* pool_k, void* pool_v,
                                         const void* front_k, const void* front_v, const int64_t* strides, const int64_t* sequences,
                                         const int32_t* table, int64_t P, int64_t T, int64_t N, int64_t H, int64_t G, int64_t D, int64_t M,
                                         int64_t slots, int64_t U, int64_t block, float scale, int threads) {
  return status_of([&] {
    auto call = [&](auto* type) {
      using W = std::remove_pointer_t<decltype(type)>;
      Paged<W> a{(const W*)q, (const W*)new_k, (const W*)new_v, (W*)y, (W*)pool_k, (W*)pool_v, (const W*)front_k, (const W*)front_v,
                 strides, (const Sequence*)sequences, table, P, T, N, H, G, D, M, slots, block, scale};
      return run(a, U, threads);
    };
    return half ? call((bf16*)nullptr) : call((float*)nullptr);
  });
}
