// A pool of low-rank adapters on rows sorted by adapter: y_n += w_u B_e (A_e x_n) for each use u, of adapter e by item n. C ABI; compiled
// and loaded by kernels/__init__.py.
//
// Shapes: N items, E adapters, U uses, C inputs, O outputs, R greatest rank. A is [E, R, C], B [E, O, R], or turned: [E, R, O], of which an
// adapter of few ranks has a piece in one.
//
// The first product is shared out by ranks and rows; the second by columns, so that no two threads add to one output, and each output gets
// what its adapters add in the order of their numbers.

#include "failure.h"
#include "low_rank.h"

namespace {

struct Uses {
  const int64_t *end, *rank, *item;  // [E], [E], [U]
  const float* weight;               // [U]
  float *low, *kept;                 // [U, R]: A x times the weight, and without it; the second may be null
  float* y;                          // [N, O], rows S apart
  int64_t N, C, E, R, O, U, S;
  bool turned;

  bool is_in_range() const {
    int64_t begin = 0;
    for (int64_t e = 0; e < E; ++e) {
      if (end[e] < begin || end[e] > U || rank[e] < 0 || rank[e] > R) return false;
      begin = end[e];
    }
    return std::all_of(item, item + begin, [&](int64_t n) { return n >= 0 && n < N; });
  }
  // call(adapter, first use, uses) of each that has any.
  template <class Call>
  void each(Call call) const {
    for (int64_t e = 0, begin = 0; e < E; begin = end[e++])
      if (end[e] > begin) call(e, begin, end[e] - begin);
  }
};

template <class X, class W>
void first_product(const Uses& s, const X* x, const W* a, int thread, int threads) {
  int64_t cost = 0;
  s.each([&](int64_t e, int64_t, int64_t count) {
    low_tasks(s.rank[e], count, [&](int64_t, int64_t, int64_t, int64_t rows) { cost += cost_of(rows); });
  });
  Shares shares(cost, thread, threads);
  s.each([&](int64_t e, int64_t begin, int64_t count) {
    low_tasks(s.rank[e], count, [&](int64_t rank, int64_t ranks, int64_t from, int64_t rows) {
      if (!shares.takes(cost_of(rows))) return;
      const int64_t first = begin + from;
      auto row = [&](int64_t i) { return x + s.item[first + i] * s.C; };
      auto to = [&](int64_t i) { return s.low + (first + i) * s.R + rank; };
      low_product(a + (e * s.R + rank) * s.C, ranks, s.C, rows, row, to);
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t r = 0; r < ranks; ++r) {
          if (s.kept) s.kept[(first + i) * s.R + rank + r] = to(i)[r];
          to(i)[r] *= s.weight[first + i];
        }
    });
  });
}

// A panel of b: at[r * stride + c], of `width` columns.
struct Panel {
  const float* at;
  int64_t stride;
};

// The panel of `width` rows of b. What is beyond the ranks of an adapter, which may have few of R, is not read but to fill a vector.
template <class W>
Panel turn(const W* b, int64_t R, int64_t ranks, int64_t width, float* panel, float* spare) {
  if (width == NR && R % VL == 0) {
    const int64_t depth = (ranks + VL - 1) / VL * VL;
    for (int v = 0; v < 2; ++v) pack_rows_as_columns<Plain>(b + v * VL * R, depth, panel + v * VL, spare, R);
  } else {
    for (int64_t c = 0; c < width; ++c)
      for (int64_t r = 0; r < ranks; ++r) panel[r * NR + c] = number(b + c * R + r);
  }
  return {panel, NR};
}

// The same of b that is turned. Floats that are read once stay where they lie; a panel that is read again and again lies together, since
// rows of b may be as far apart as sets of a cache repeat.
template <class W>
Panel turned_panel(const W* b, int64_t O, int64_t ranks, int64_t width, int64_t count, float* panel) {
  if (width < NR) {
    for (int64_t r = 0; r < ranks; ++r)
      for (int64_t c = 0; c < width; ++c) panel[r * NR + c] = number(b + r * O + c);
    return {panel, NR};
  }
  if constexpr (std::is_same_v<W, float>)
    if (count <= PANEL_ROWS) return {b, O};
  for (int64_t r = 0; r < ranks; ++r)
    for (int v = 0; v < 2; ++v) store(panel + r * NR + v * VL, load(b + r * O + v * VL));
  return {panel, NR};
}

template <class W>
void second_product(const Uses& s, const W* b, Scratch& scratch, int thread, int threads) {
  float *room = scratch.get<float>(PANEL, s.R * NR), *spare = scratch.get<float>(SPARE, s.R * VL);
  const Range own = share_of((s.O + NR - 1) / NR, thread, threads);
  s.each([&](int64_t e, int64_t begin, int64_t count) {
    const int64_t ranks = s.rank[e];
    for (int64_t j = own.begin; ranks && j < own.end; ++j) {
      const int64_t column = j * NR, width = std::min<int64_t>(NR, s.O - column);
      const Panel panel = s.turned ? turned_panel(b + e * s.R * s.O + column, s.O, ranks, width, count, room)
                                   : turn(b + (e * s.O + column) * s.R, s.R, ranks, width, room, spare);
      auto low = [&](int64_t i) { return s.low + (begin + i) * s.R; };
      auto to = [&](int64_t i) { return s.y + s.item[begin + i] * s.S + column; };
      if (width < NR) {
        for (int64_t i = 0; i < count; ++i) high_product(panel.at, ranks, NR, width, 1, [&](int64_t) { return low(i); }, [&](int64_t) { return to(i); });
        continue;
      }
      in_blocks<PANEL_ROWS>(count, [&](int64_t i, auto m) {
        constexpr int M = decltype(m)::value;
        const float* h[M];
        float* y[M];
        for (int k = 0; k < M; ++k) h[k] = low(i + k), y[k] = to(i + k);
        // An item that names an adapter twice has one output.
        bool is_twice = false;
        for (int k = 1; k < M; ++k) is_twice |= y[k] == y[k - 1];
        if (!is_twice) return panel_block<M>(h, panel.at, panel.stride, ranks, y);
        for (int k = 0; k < M; ++k) panel_block<1>(h + k, panel.at, panel.stride, ranks, y + k);
      });
    }
  });
}

constexpr int64_t SMALL = 1 << 16;  // multiplications; below, a second thread costs more than it does

thread_local Scratch scratch_of_thread;

template <class T>
int low_rank(const Uses& s, const T* x, const T* a, const T* b, int threads) {
  if (!s.is_in_range()) return OUT_OF_RANGE;
  if (s.U * s.R * (s.C + s.O) <= SMALL) threads = 1;
  Failure failure;
#pragma omp parallel num_threads(threads)
  {
    const int thread = omp_get_thread_num(), team = omp_get_num_threads();
    failure.guard([&] {
      scratch_of_thread.get<float>(PANEL, s.R * NR);
      scratch_of_thread.get<float>(SPARE, s.R * VL);
    });
#pragma omp barrier
    if (!failure.happened()) first_product(s, x, a, thread, team);
#pragma omp barrier
    if (!failure.happened()) second_product(s, b, scratch_of_thread, thread, team);
  }
  return failure.status();
}

}  // namespace

// end: of each adapter behind its last use; item and weight: of each use, sorted by adapter and then by item. y may be some columns of
// wider rows, as far apart as `strides` says.
extern "C" int anabranch_low_rank(int half, int turned, const void* x, const void* a, const void* b, const int64_t* end, const int64_t* rank,
                                  const int64_t* item, const float* weight, float* low, float* kept, float* y, const int64_t* strides,
                                  int64_t N, int64_t C, int64_t E, int64_t R, int64_t O, int64_t U, int threads) {
  const Uses uses{end, rank, item, weight, low, kept, y, N, C, E, R, O, U, strides[0], turned != 0};
  return half ? low_rank(uses, (const bf16*)x, (const bf16*)a, (const bf16*)b, threads)
              : low_rank(uses, (const float*)x, (const float*)a, (const float*)b, threads);
}
