// One product of a packed matrix (see packed.h). C ABI; compiled and loaded by kernels/__init__.py.

#include "failure.h"
#include "packed.h"

namespace {
thread_local Scratch scratch_of_call;

int product(const Matrix& w, const float* x, const float* bias, float* y, int64_t count, int threads) {
  Activations a{nullptr, w.depth, Activations::bytes_of_row(w.depth, w.kind), w.kind};
  if (int status = status_of([&] { a.data = scratch_of_call.get<char>(LEFT, (count + SPARE_ROWS) * a.row_bytes); return DONE; })) return status;
#pragma omp parallel num_threads(threads)
  {
    Tiles tiles;
    int thread = omp_get_thread_num(), team = omp_get_num_threads();
    Range rows = share_of(count, thread, team), panels = share_of(w.panels(), thread, team);
    for (int64_t i = rows.begin; i < rows.end; ++i) put_row(a, i, x + i * w.depth);
#pragma omp barrier
    multiply(w, a, 0, count, panels.begin, panels.end, [&](int64_t i, int64_t j, const float* out) {
      int64_t width = std::min<int64_t>(WIDE, w.rows - j * WIDE);
      float* to = y + i * w.rows + j * WIDE;
      for (int64_t c = 0; c < width; ++c) to[c] = out[c] + (bias ? bias[j * WIDE + c] : 0.f);
    });
  }
  return DONE;
}
}  // namespace

// y[count][rows] = x[count][depth] w^T + bias (null for none); float32 throughout.
extern "C" int anabranch_packed_linear(const char* data, int64_t N, int64_t K, int64_t group, int64_t panel_bytes, int64_t kind,
                                       const float* x, const float* bias, float* y, int64_t count, int threads) {
  return product({data, N, K, group, panel_bytes, kind, 0, 0, nullptr}, x, bias, y, count, threads);
}

// The same of a matrix in parts.
extern "C" int anabranch_packed_parts(const Matrix* w, const float* x, const float* bias, float* y, int64_t count, int64_t N, int64_t K,
                                      int threads) {
  if (N != w->rows || K != w->depth) return OUT_OF_RANGE;
  return product(*w, x, bias, y, count, threads);
}

// Ask for 2 MB pages before large weights are written: small ones cost a look-up every 4 KB that is read.
extern "C" void anabranch_advise(void* p, int64_t bytes) {
#ifdef MADV_HUGEPAGE
  uintptr_t page = 1 << 21, start = ((uintptr_t)p + page - 1) / page * page, end = ((uintptr_t)p + bytes) / page * page;
  if (end > start) madvise((void*)start, end - start, MADV_HUGEPAGE);
#endif
}
