// The memory of a compiled step, cut from one piece. Included by decode.cpp. Shapes as in step.h, R rows of experts or paths.

#pragma once

#include "step.h"

namespace {

struct Work {  // what a step needs beside its tensors
  float *normed, *qkv, *y, *hidden, *out, *weight, *logits;
  char* left;  // activations ready for a product
  int32_t *index, *row_of_place, *offset;
  int64_t* token_of_row;
  int64_t* context;            // of each token
  const int32_t** table;       // of each token
  int64_t* slot;
  int64_t* run_end;            // of each token that begins a run the row behind its last, 0 for those within one
  float *state, *projected, *gates;  // of recurrent routers: [T, P], [T, P], [T][2][3 P]
  int32_t *loops, *order, *beside;   // of looping feed-forwards: loops of each token, tokens by them, rows of width paths
  int64_t* still;                    // [n]: tokens that take more than n loops
  float* up;                         // [T, F] of dense layers with adapters
  float* scale;                      // [T, H]: what heads are multiplied by, where they are routed
  float* low;                        // of the groups, one after another: [count, ranks at the matrix] of A x, times scale and weight
};

class Memory {  // one piece, cut up
 public:
  explicit Memory(bool counts) : counts(counts) {}
  template <class T>
  T* take(int64_t count) {
    char* at = start + used;
    used += (count * (int64_t)sizeof(T) + 63) / 64 * 64;
    return counts ? nullptr : (T*)at;
  }
  char* start = nullptr;
  int64_t used = 0;

 private:
  bool counts;
};

int64_t left_bytes(const Model& m, int64_t T) {
  int64_t most = 0;
  auto see = [&](const Matrix& matrix, int64_t rows) {
    if (matrix.rows) most = std::max(most, (rows + SPARE_ROWS) * Activations::bytes_of_row(matrix.depth, matrix.kind));
  };
  for (int64_t i = 0; i < m.layers; ++i) {
    const Block& b = m.blocks[i];
    see(b.qkv, T);
    see(b.out, T);
    if (b.experts.router && !b.loops.gate) {
      see(b.experts.recurrence.projector, T);
      see(b.experts.w13, T * b.experts.top_k);
      see(b.experts.w2, T * b.experts.top_k);
      see(b.experts.shared13, T);
      see(b.experts.shared2, T);
    } else {
      see(b.w13, T);
      see(b.w2, b.loops.gate ? 2 * T : T);
    }
  }
  return most;
}

Work cut(Memory& memory, const Model& m, int64_t T, int64_t lows) {
  const int64_t R = T * m.rows, E = m.most_experts;
  Work w;
  w.normed = memory.take<float>(T * m.D);  // these two are read from outside
  w.state = memory.take<float>(T * m.state);
  w.qkv = memory.take<float>(T * (m.H + 2 * m.G) * m.W);
  w.y = memory.take<float>(T * m.H * m.W);
  w.hidden = memory.take<float>(R * m.F);
  w.out = memory.take<float>(R * m.D);
  w.weight = memory.take<float>(R);
  w.logits = memory.take<float>(T * (E + 1));
  w.left = memory.take<char>(left_bytes(m, T));
  w.index = memory.take<int32_t>(R);
  w.row_of_place = memory.take<int32_t>(R);
  w.offset = memory.take<int32_t>(2 * E + 2);
  w.token_of_row = memory.take<int64_t>(R);
  w.context = memory.take<int64_t>(T);
  w.table = memory.take<const int32_t*>(T);
  w.slot = memory.take<int64_t>(T);
  w.run_end = memory.take<int64_t>(T);
  w.projected = memory.take<float>(T * m.state);
  w.gates = memory.take<float>(T * 6 * m.state);
  w.loops = memory.take<int32_t>(T);
  w.order = memory.take<int32_t>(T);
  w.beside = memory.take<int32_t>(T);
  w.still = memory.take<int64_t>(m.most_loops + 1);
  w.up = memory.take<float>(lows ? T * m.F : 0);
  bool weighs = false;
  for (int64_t i = 0; i < m.layers; ++i) weighs |= m.blocks[i].heads.pair != nullptr;
  w.scale = memory.take<float>(weighs ? T * m.H : 0);
  w.low = memory.take<float>(lows);
  return w;
}

}  // namespace
