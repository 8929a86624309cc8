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

#include "failure.h"
#include "matmul.h"

namespace {

// a[rows][length] times the transpose of rows of w: vector v of panel j holds rows first(j, v) ... + VL of w.
template <class P, class W, class First, class Emit>
void multiply_by_rows(Scratch& scratch, const Rows<P>& a, int rows, int length, const W* w, int panels, int columns,
                      First first, Emit emit) {
  alignas(64) float out[SUM_ROWS * NR];
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
      pack_rows_as_columns<P>(w + first(j, v) * (int64_t)length, length, panel + v * VL, spare, length);
    const int64_t bytes = VL * length * (int64_t)sizeof(W), lines = j + 1 < panels ? 2 * bytes / 64 : 0;
    product(a, rows, length / P::pack, panel, j * NR, vectors, out, emit, lines, [&](int64_t line) {
      const int v = line >= lines / 2;
      return (const char*)(w + first(j + 1, v) * (int64_t)length) + line * 64 - v * bytes;
    });
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
  alignas(64) float out[SUM_ROWS * NR];
  auto* panel = scratch.get<typename P::elem>(PANEL, (int64_t)depth / P::pack * NR);
  for (int j = 0; j < columns; j += NR) {
    int vectors = std::min(2, (columns - j) / VL);
    pack_rows<P>(depth, vectors * VL, NR, panel, [&](int k) { return w + (int64_t)k * columns + j; }, Unscaled());
    constexpr int64_t OF_ROW = NR * sizeof(W) / 64;
    product(a, rows, depth / P::pack, panel, j, vectors, out, emit, j + NR < columns ? depth * OF_ROW : 0,
            [&](int64_t line) { return (const char*)(w + line / OF_ROW * columns + j + NR) + line % OF_ROW * 64; });
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

// The gradient of one expert's matrix, [M][columns], that sums over rows are written or added to.
template <class W>
struct Gradient {
  W* to;
  int M, columns;
  bool add, around;

  // Ask for what `finish` of m rows from i on will add to.
  void fetch(int64_t i, int m, int64_t j) const {
    for (int r = 0; r < m && add; ++r)
      for (int64_t byte = 0; byte < NR * (int64_t)sizeof(W); byte += 64) __builtin_prefetch((const char*)(to + (i + r) * columns + j) + byte, 1, 2);
  }

  void finish(int64_t i, int64_t j, float* row, int vectors) const {
    W* place = to + i * columns + j;
    for (int v = 0; v < vectors && add; ++v) store(row + v * VL, load(row + v * VL) + load(place + v * VL));
    write(place, row, vectors, around);
  }
};

// Few rows: whole rows of the gradient are written, as they lie.
template <class P, class W, class Left, class Right, class Scale>
void accumulate_few(Scratch& scratch, const Gradient<W>& gradient, int rows, int first, int last, Left left, Right right, Scale scale) {
  alignas(64) float out[MR * NR];
  int M = gradient.M, depth = (rows + P::pack - 1) / P::pack;
  auto* a = scratch.get<typename P::elem>(LEFT, (int64_t)depth * M);
  auto* panel = scratch.get<typename P::elem>(PANEL, (int64_t)depth * (last - first));
  pack_rows<P>(rows, M, M, a, left, Unscaled());
  pack_rows<P>(rows, last - first, last - first, panel, [&](int k) { return right(k) + first; }, scale);
  for (int i = 0; i < M; i += MR)
    for (int j = first; j < last; j += NR) {
      int m = std::min(MR, M - i), vectors = std::min(2, (last - j) / VL);
      tile_any<P, 1>(m, vectors, a + i, M, panel + j - first, last - first, depth, out, NR, false);
      for (int r = 0; r < m; ++r) gradient.finish(i + r, j, out + r * NR, vectors);
    }
}

// to[M][columns first..last] (+)= sum over rows of left(row)[M] right(row)[columns]: the gradient of one expert's matrix.
template <class P, class W, class Left, class Right, class Scale>
void accumulate(Scratch& scratch, Gradient<W> gradient, int rows, int first, int last, Left left, Right right, Scale scale) {
  gradient.around = gradient.around && !gradient.add && (uintptr_t)gradient.to % 64 == 0 && gradient.columns % NR == 0 && first % NR == 0;
  if (rows <= FEW) return accumulate_few<P>(scratch, gradient, rows, first, last, left, right, scale);
  alignas(64) float out[SUM_ROWS * NR];
  const int M = gradient.M, steps = (rows + GRADIENT_ROWS - 1) / GRADIENT_ROWS, step_rows = ((rows + steps - 1) / steps + 1) / 2 * 2;
  Columns<P> columns(scratch, LEFT, step_rows, M);
  const int64_t panel_elements = (int64_t)(step_rows / P::pack + TILE_PAIRS) * NR;
  auto* panel = scratch.get<typename P::elem>(PANEL, panel_elements);
  auto* sum = scratch.get<float>(SUM, steps > 1 ? (int64_t)M * (last - first) : 0);
  for (int step = 0; step < steps; ++step) {
    const int begin = step * step_rows, count = std::min(step_rows, rows - begin);
    columns.pack(count, [&](int k) { return left(begin + k); });
    if (takes_tiles<P>()) memset((void*)panel, 0, panel_elements * sizeof *panel);
    for (int j = first; j < last; j += NR) {
      int vectors = std::min(2, (last - j) / VL);
      pack_rows<P>(count, vectors * VL, NR, panel, [&](int k) { return right(begin + k) + j; },
                   [&](int k) { return scale(begin + k); });
      for (int i = 0; i < M; i += columns.height()) {
        int m = std::min(columns.height(), M - i);
        if (step + 1 == steps) gradient.fetch(i, m, j);
        columns.times(i, m, panel, vectors, out);
        for (int r = 0; r < m; ++r) {
          float *row = out + r * NR, *partial = sum + (int64_t)(i + r) * (last - first) + (j - first);
          for (int v = 0; v < vectors && step > 0; ++v) store(row + v * VL, load(row + v * VL) + load(partial + v * VL));
          if (step + 1 < steps)
            memcpy(partial, row, vectors * VL * sizeof(float));
          else
            gradient.finish(i + r, j, row, vectors);
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

  // Whether rows end in order and within what there is, and stand at places that there are.
  bool is_in_range() const {
    int64_t end = 0;
    for (int64_t e = 0; e < E; ++e) {
      if (offset[e] < end || offset[e] > N * K) return false;
      end = offset[e];
    }
    uint64_t most = 0;
    for (int64_t r = 0; r < end; ++r) most = std::max(most, (uint64_t)place[r]);
    return end == 0 || most < (uint64_t)(N * K);
  }

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
          scratch, Gradient<W>{dw13 + t.expert * 2 * F * D, (int)(2 * F), (int)D, add, around}, t.rows, from, to,
          [&](int k) { return dz + (int64_t)(t.begin + k) * 2 * F; }, [&](int k) { return x + item(t.begin + k) * D; },
          [&](int k) { return on_input ? weight_of(t.begin + k) : 1.f; });
    else
      accumulate<P>(
          scratch, Gradient<W>{dw2 + t.expert * D * F, (int)D, (int)F, add, around}, t.rows, from, to,
          [&](int k) { return dy + item(t.begin + k) * D; }, [&](int k) { return act + (int64_t)(t.begin + k) * F; },
          Unscaled());
  }

  using Big = std::conditional_t<sizeof(X) == 2, Half, Plain>;

  int forward(X* y, X* z) const {
    int64_t R = offset[E - 1];
    Workspace workspace(R * D * sizeof(X));
    if (!workspace.data) return NO_MEMORY;
    X* y_rows = (X*)workspace.data;
    Failure failure;
    auto tasks = blocks();
    auto row = row_of_place();
    if (z) advise(z, N * K * 2 * F * sizeof(X));
#pragma omp parallel num_threads(threads)
    {
      static thread_local Scratch scratch;
      Tiles tiles;
#pragma omp for schedule(dynamic, 1)
      for (size_t i = 0; i < tasks.size(); ++i)
        failure.guard([&] {
          if (tasks[i].rows <= FEW)
            forward_block<Plain>(scratch, tasks[i], z, y_rows);
          else
            forward_block<Big>(scratch, tasks[i], z, y_rows);
        });
#pragma omp for schedule(static)
      for (int64_t n = 0; n < N; ++n) join(*this, y_rows, row.data(), y, n);
    }
    return failure.status();
  }

  int backward(const X* dy, const X* z, X* dx, float* dweight, W* dw13, W* dw2, bool add) const {
    int64_t R = offset[E - 1];
    bool need_rows = dx || on_input;
    Workspace workspace(R * (3 * F + (need_rows ? D : 0)) * sizeof(X));
    if (!workspace.data) return NO_MEMORY;
    Failure failure;
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
      Tiles tiles;
#pragma omp for schedule(dynamic, 1)
      for (size_t i = 0; i < tasks.size(); ++i)
        failure.guard([&] {
          if (tasks[i].rows <= FEW)
            backward_block<Plain>(scratch, tasks[i], dy, z, dz, act, dx_rows, dweight);
          else
            backward_block<Big>(scratch, tasks[i], dy, z, dz, act, dx_rows, dweight);
        });
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
        } else {
          failure.guard([&] {
            if (t.rows <= FEW)
              gradient_block<Plain>(scratch, t, first_matrix, part, parts, dy, dz, act, dw13, dw2, add);
            else
              gradient_block<Big>(scratch, t, first_matrix, part, parts, dy, dz, act, dw13, dw2, add);
          });
        }
      }
      if (dx)
#pragma omp for schedule(static)
        for (int64_t n = 0; n < N; ++n) join(*this, dx_rows, row.data(), dx, n);
    }
    return failure.status();
  }
};

template <class Call>
int dispatch_types(const Layer& layer, int types, Call call) {
  if (!layer.is_in_range()) return OUT_OF_RANGE;
  return status_of([&] {
    switch (types) {
      case 0: return call((float*)nullptr, (float*)nullptr);
      case 1: return call((bf16*)nullptr, (bf16*)nullptr);
      default: return call((bf16*)nullptr, (float*)nullptr);
    }
  });
}

}  // namespace

// types: 0 all fp32; 1 all bf16; 2 bf16 items on fp32 weights (autocast), whose gradients are fp32. Return a
// Status. A null z is not kept (forward) or computed again (backward); a null dx, dw13 or dw2 is not computed.
extern "C" int anabranch_expert_forward(int types, const void* x, const int64_t* place, const int32_t* offset,
                                        const float* weight, const void* w13, const void* w2, void* y, void* z, int64_t N,
                                        int64_t E, int64_t K, int64_t D, int64_t F, int on_input, int threads) {
  Layer layer{place, offset, weight, N, E, K, D, F, on_input != 0, threads};
  return dispatch_types(layer, types, [&](auto* item, auto* matrix) {
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
  return dispatch_types(layer, types, [&](auto* item, auto* matrix) {
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
