// Products of one sparse vector with many, by lists of the rows that have each of its features. C ABI; compiled and loaded by
// kernels/__init__.py.
//
// Shapes: F features of the vector, T postings of all features, M rows.

#include <cstdint>

#include "failure.h"

// score_m += weight_f value_p for each posting p of feature f, from start_f to end_f, whose row is m.
extern "C" int anabranch_postings(const int64_t* start, const int64_t* end, const double* weight, const int32_t* row, const double* value,
                                  double* score, int64_t F, int64_t T, int64_t M) {
  for (int64_t f = 0; f < F; ++f) {
    if (start[f] < 0 || start[f] > end[f] || end[f] > T) return OUT_OF_RANGE;
    const double factor = weight[f];
    for (int64_t p = start[f]; p < end[f]; ++p) {
      if (row[p] < 0 || row[p] >= M) return OUT_OF_RANGE;
      score[row[p]] += factor * value[p];
    }
  }
  return DONE;
}
