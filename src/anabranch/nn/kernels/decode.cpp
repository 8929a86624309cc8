// All layers of a decoder on the tokens of one step, in one call: a small model spends more time launching operations than computing.
// Llama-like blocks (RMSNorm, rotary, grouped-query attention over blocks of keys and values, SwiGLU) and mixtures of experts: a linear or
// recurrent router (RMoE), top-k, pools that layers share (ReXMoE), several passes over one (Chain-of-Experts); and feed-forwards used wide
// and deep (VersatileFFN). Everything between the products is float32. C ABI; compiled and loaded by kernels/__init__.py.
//
// Where experts come when they are wanted, a step is run in parts: to the router of a layer, its experts as they come, on to the next.
//
// Shapes: T tokens, D width, H query heads, G key heads, W head width, F hidden width, E experts, K per token, R = T K rows of experts,
// P width of a router's state.
//
// One team of threads runs the whole step. Between barriers each thread owns rows (norms, rotary, rounding), panels of weights (products)
// or pairs of a token and a key head (attention); no number depends on how many threads there are.

#include "failure.h"
#include "step_attention.h"
#include "step_work.h"

namespace {

// ---- the step ----

class Run {
 public:
  Run(const Model& m, const Step& s, const Work& w, Scratch& scratch, int thread, int threads)
      : m(m), s(s), w(w), scratch(scratch), thread(thread), threads(threads), own(share_of(s.T, thread, threads)) {}

  // From where the experts of layer `from` have run (-1: the beginning) to where the router of layer `to` has chosen (none: the end).
  void part(int64_t from, int64_t to) {
    if (from < 0)
      std::fill(w.state + own.begin * m.state, w.state + own.end * m.state, 0.f);
    else
      join(m.blocks[from].experts);
    for (int64_t layer = from + 1; layer < m.layers; ++layer) {
      const Block& block = m.blocks[layer];
      if (block.qkv.rows) attention(block, layer);
      if (block.loops.gate) {
        versatile(block);
      } else if (block.experts.router) {
        choose(block);
        if (layer == to) return;
        compute(block.experts, nullptr);
        join(block.experts);
      } else {
        dense(block.w13, block.w2, block.feed_forward_norm, nullptr, layer);
      }
    }
    if (!m.last_norm) return;
    for (int64_t t = own.begin; t < own.end; ++t) norm_row(row(t), m.last_norm, m.D, m.norm_eps, row(t));
  }

  // The experts that have a slot in the stack (none: all, each where its number says) on the rows that `choose` gave them.
  void compute(const Experts& e, const int32_t* slot_of) {
    auto each = [&](auto call) {
      for (int64_t i = 0; i < e.count; ++i) {
        int64_t count = w.offset[i + 1] - w.offset[i], slot = slot_of ? slot_of[i] : i;
        if (count && slot >= 0) call(slot, w.offset[i], count);
      }
    };
    auto each_row = [&](auto call) {
      each([&](int64_t, int64_t first, int64_t count) {
        for (int64_t r = first; r < first + count; ++r)
          if (r % threads == thread) call(r);
      });
    };
    Activations a = left_of(e.w13), b = left_of(e.w2);
    each_row([&](int64_t r) { put_row(a, r, w.normed + w.token_of_row[r] * m.D); });
#pragma omp barrier
    each([&](int64_t slot, int64_t first, int64_t count) { hidden(e.w13.of(slot), a, first, count, false); });
#pragma omp barrier
    each_row([&](int64_t r) { put_row(b, r, w.hidden + r * m.F); });
#pragma omp barrier
    each([&](int64_t slot, int64_t first, int64_t count) {
      times(e.w2.of(slot), b, first, count, [&](int64_t r, int64_t j, const float* out) {
        memcpy(w.out + r * m.D + j * WIDE, out, width_of(e.w2, j) * sizeof(float));
      });
    });
#pragma omp barrier
  }

 private:
  float* row(int64_t t) const { return s.x + t * m.D; }
  Activations left_of(const Matrix& matrix) const {
    return {w.left, matrix.depth, Activations::bytes_of_row(matrix.depth, matrix.kind), matrix.kind};
  }
  template <class Emit>
  void times(const Matrix& matrix, const Activations& a, int64_t first, int64_t count, Emit emit) {
    Range panels = share_of(matrix.panels(), thread, threads);
    multiply(matrix, a, first, count, panels.begin, panels.end, emit);
  }
  static void add(float* to, const float* from, int64_t width) {
    for (int64_t c = 0; c < width; ++c) to[c] += from[c];
  }
  int64_t width_of(const Matrix& matrix, int64_t panel) const { return std::min<int64_t>(WIDE, matrix.rows - panel * WIDE); }

  // ---- adapters: their first products while all threads wait for one another, shared out by ranks and rows; the second ones behind the
  // matrix's own product, each thread for the outputs that it made. So adapters of one row are everybody's work, too.

  // call(group, its numbers in `low`, ranks at these matrices, its parts there) of each that has any.
  template <class Call>
  void each_group(int64_t layer, Site from, Site to, Call call) const {
    float* low = w.low;
    for (const Group* group = s.group; group < s.group + s.groups; low += group->count * group->lows, ++group) {
      const int32_t* first = group->adapter->first + layer * SITES;
      const Part *begin = group->adapter->parts + first[from], *end = group->adapter->parts + first[to + 1];
      int64_t ranks = 0;
      for (const Part* part = begin; part < end; ++part) ranks += part->rank;
      if (ranks) call(*group, low, ranks, begin, end);
    }
  }
  bool adapts(int64_t layer, Site from, Site to) const {
    bool any = false;
    if (layer >= 0) each_group(layer, from, to, [&](const Group&, float*, int64_t, const Part*, const Part*) { any = true; });
    return any;
  }
  // A x of all that adapts these matrices, whose inputs are x, `across` floats from row to row.
  void adapt_inputs(int64_t layer, Site from, Site to, const float* x, int64_t across, int64_t depth) const {
    int64_t cost = 0;
    each_group(layer, from, to, [&](const Group& group, float*, int64_t, const Part* part, const Part* end) {
      for (; part < end; ++part)
        low_tasks(part->rank, group.count, [&](int64_t, int64_t, int64_t, int64_t rows) { cost += cost_of(rows); });
    });
    Shares shares(cost, thread, threads);
    each_group(layer, from, to, [&](const Group& group, float* low, int64_t all, const Part* part, const Part* end) {
      for (; part < end; low += part++->rank)
        low_tasks(part->rank, group.count, [&](int64_t rank, int64_t ranks, int64_t first, int64_t rows) {
          if (!shares.takes(cost_of(rows))) return;
          auto row = [&](int64_t i) { return x + group.token[first + i] * across; };
          auto made = [&](int64_t i) { return low + (first + i) * all + rank; };
          if (part->half)
            low_product((const bf16*)part->a + rank * depth, ranks, depth, rows, row, made);
          else
            low_product((const float*)part->a + rank * depth, ranks, depth, rows, row, made);
          for (int64_t i = 0; i < rows; ++i)
            for (int64_t r = 0; r < ranks; ++r) made(i)[r] *= part->scale * group.weight[first + i];
        });
    });
#pragma omp barrier
  }
  // y += B of that for matrices `from` to `to`, of which `site` is one, of the outputs in `panels`; y's rows are `apart` floats apart.
  void adapt_outputs(int64_t layer, Site from, Site to, Site site, const Matrix& matrix, Range panels, float* y, int64_t apart) const {
    const int64_t begin = panels.begin * WIDE, end = std::min(panels.end * WIDE, matrix.rows);
    each_group(layer, from, to, [&](const Group& group, const float* low, int64_t all, const Part* part, const Part*) {
      const Part *first = group.adapter->parts + group.adapter->first[layer * SITES + site],
                 *last = group.adapter->parts + group.adapter->first[layer * SITES + site + 1];
      for (; part < last; low += part++->rank) {
        const int64_t left = std::max(begin, part->start), right = std::min(end, part->start + part->size), at = left - part->start;
        if (part < first || left >= right) continue;
        auto ranks = [&](int64_t i) { return low + i * all; };
        auto row = [&](int64_t i) { return y + group.token[i] * apart + left; };
        if (part->half)
          high_product((const bf16*)part->b + at, part->rank, part->size, right - left, group.count, ranks, row);
        else
          high_product((const float*)part->b + at, part->rank, part->size, right - left, group.count, ranks, row);
      }
    });
  }
  Range panels_of(const Matrix& matrix) const { return share_of(matrix.panels(), thread, threads); }

  void attention(const Block& block, int64_t layer) {
    const int64_t Q = m.H * m.W, S = m.G * m.W, N = Q + 2 * S;
    const bool adapted = adapts(layer, QKV, QKV);
    Activations a = left_of(block.qkv);
    float* normed = scratch.get<float>(MIDDLE, m.D);
    for (int64_t t = own.begin; t < own.end; ++t) {
      // Adapters see all of them again.
      float* to = adapted ? w.normed + t * m.D : normed;
      norm_row(row(t), block.attention_norm, m.D, m.norm_eps, to);
      put_row(a, t, to);
      if (block.heads.pair) weigh(block.heads, m.H, m.D, to, w.scale + t * m.H);
    }
#pragma omp barrier
    if (adapted) adapt_inputs(layer, QKV, QKV, w.normed, m.D, m.D);
    auto keep = [&](int64_t t, int64_t j, const float* out) {
      float* to = w.qkv + t * N + j * WIDE;
      int64_t width = width_of(block.qkv, j);
      for (int64_t c = 0; c < width; ++c) to[c] = out[c] + (block.qkv_bias ? block.qkv_bias[j * WIDE + c] : 0.f);
    };
    // Norms and adapters of queries see all of them.
    if (block.heads.pair && !adapted && m.qk_norm != 2)
      times_wanted(block, a, keep);
    else
      times(block.qkv, a, 0, s.T, keep);
    if (adapted) adapt_outputs(layer, QKV, QKV, QKV, block.qkv, panels_of(block.qkv), w.qkv, N);
#pragma omp barrier
    for (int64_t t = own.begin; t < own.end; ++t) place(block, t, w.qkv + t * N, Q, S);
#pragma omp barrier
    const int64_t per = m.H / m.G;
    const bool together = s.T >= 4 * threads;  // all key heads of a token, which lie beside one another
    Head* heads = scratch.get<Head>(PRE, m.G);
    Query* queries = scratch.get<Query>(SUM, RUN * per);
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < s.T * m.G; ++task) {
      const int64_t t = task / m.G, g = task % m.G, count = w.run_end[t] - t;
      if (count > 1) attend_run(m, block, w, t, count, g, queries, scratch);
      if (count != 1 || (together && g > 0)) continue;
      const int64_t end = together ? m.G : g + 1;
      for (int64_t one = g; one < end; ++one) heads[one].queries = 0;
      for (int64_t h = g * per; h < end * per; ++h) {
        Head& head = heads[h / per];
        if (!is_on(m, block, w, t, h)) {
          memset(w.y + t * Q + h * m.W, 0, m.W * sizeof(float));
          continue;
        }
        head.query[head.queries] = w.qkv + t * N + h * m.W;
        head.y[head.queries++] = w.y + t * Q + h * m.W;
      }
      attend(m, block, w.table[t], w.context[t], g, end, heads, scratch);
    }
    Activations b = left_of(block.out);
    for (int64_t t = own.begin; t < own.end; ++t) {
      for (int64_t h = 0; block.heads.pair && h < m.H; ++h)
        for (int64_t c = 0; c < m.W; ++c) w.y[t * Q + h * m.W + c] *= w.scale[t * m.H + h];
      put_row(b, t, w.y + t * Q);
    }
#pragma omp barrier
    const bool adapts_out = adapts(layer, OUT, OUT);
    if (adapts_out) adapt_inputs(layer, OUT, OUT, w.y, Q, Q);
    times(block.out, b, 0, s.T, [&](int64_t t, int64_t j, const float* out) {
      add(row(t) + j * WIDE, out, width_of(block.out, j));
      if (block.out_bias) add(row(t) + j * WIDE, block.out_bias + j * WIDE, width_of(block.out, j));
    });
    if (adapts_out) adapt_outputs(layer, OUT, OUT, OUT, block.out, panels_of(block.out), s.x, m.D);
#pragma omp barrier
  }

  // The products of queries, keys and values, without the queries of heads that are off for all tokens.
  template <class Keep>
  void times_wanted(const Block& block, const Activations& a, Keep keep) {
    const int64_t each = m.W / WIDE, all = block.qkv.panels();
    char* wanted = scratch.get<char>(MIDDLE, m.H);
    int64_t total = all;
    for (int64_t h = 0; h < m.H; ++h) {
      wanted[h] = 0;
      for (int64_t t = 0; t < s.T && !wanted[h]; ++t) wanted[h] = is_on(m, block, w, t, h);
      if (!wanted[h]) total -= each;
    }
    const Range mine = share_of(total, thread, threads);
    auto is_wanted = [&](int64_t panel) { return panel >= m.H * each || wanted[panel / each]; };
    int64_t seen = 0;
    for (int64_t first = 0, last; first < all; first = last) {
      for (last = first; last < all && is_wanted(last); ++last) {}
      const int64_t begin = std::max(first, first + mine.begin - seen), end = std::min(last, first + mine.end - seen);
      if (begin < end) multiply(block.qkv, a, 0, s.T, begin, end, keep);
      seen += last - first;
      for (; last < all && !is_wanted(last); ++last) {}
    }
  }

  // Norms of queries and keys, clipping, rotation, scaling; keys and values to their slot.
  void place(const Block& block, int64_t t, float* qkv, int64_t Q, int64_t S) {
    float *key = qkv + Q, *value = key + S;
    if (m.qk_norm == 2) {
      norm_row(qkv, block.q_norm, Q, m.qk_eps, qkv);
      norm_row(key, block.k_norm, S, m.qk_eps, key);
    }
    if (m.clip > 0)
      for (int64_t i = 0; i < Q + 2 * S; ++i) qkv[i] = std::min(std::max(qkv[i], -m.clip), m.clip);
    const float scale = 1.f / std::sqrt((float)m.W);
    for (int64_t h = 0; h < m.H + m.G; ++h) {
      if (h < m.H && !is_on(m, block, w, t, h)) continue;
      float* head = qkv + h * m.W;
      if (m.qk_norm == 1) norm_row(head, h < m.H ? block.q_norm : block.k_norm, m.W, m.qk_eps, head);
      turn_row(head, s.cos + t * m.W, s.sin + t * m.W, m.W);
      for (int64_t c = 0; h < m.H && c < m.W; ++c) head[c] *= scale;
    }
    int64_t bytes = m.W * (m.half_store ? 2 : 4);
    for (int64_t g = 0; g < m.G; ++g) {
      keep_row(block.key + (w.slot[t] * m.G + g) * bytes, key + g * m.W, m.W, m.half_store);
      keep_row(block.value + (w.slot[t] * m.G + g) * bytes, value + g * m.W, m.W, m.half_store);
    }
  }

  // silu(gate) * up of `count` rows from `first` on into `hidden`; or `apart`: gate there, and up into `up`.
  void hidden(const Matrix& w13, const Activations& a, int64_t first, int64_t count, bool apart) {
    const int64_t F = w13.rows / 2, panels = F / WIDE;
    Range mine = share_of(panels, thread, threads);
    multiply(w13, a, first, count, mine.begin, mine.end, [&](int64_t r, int64_t j, const float* out) {
      memcpy(w.hidden + r * m.F + j * WIDE, out, WIDE * sizeof(float));
    });
    multiply(w13, a, first, count, panels + mine.begin, panels + mine.end, [&](int64_t r, int64_t j, const float* out) {
      const int64_t at = r * m.F + (j - panels) * WIDE;
      if (apart)
        memcpy(w.up + at, out, WIDE * sizeof(float));
      else
        close(w.hidden + at, out, WIDE);
    });
  }
  static void close(float* gate, const float* up, int64_t width) {
    for (int64_t c = 0; c < width; c += VL) {
      vec open = load(gate + c);
      store(gate + c, open * sigmoid(open) * load(up + c));
    }
  }

  // x += swiglu(norm(x)), times `factor` of each token where there is one. `layer` is whose adapters count; -1 for nobody's.
  void dense(const Matrix& w13, const Matrix& w2, const float* norm, const float* factor, int64_t layer) {
    Activations a = left_of(w13);
    for (int64_t t = own.begin; t < own.end; ++t) {
      float* normed = w.normed + t * m.D;
      if (norm) norm_row(row(t), norm, m.D, m.norm_eps, normed);
      put_row(a, t, normed);
    }
#pragma omp barrier
    const bool adapted = adapts(layer, GATE, UP), adapts_down = adapts(layer, DOWN, DOWN);
    if (adapted) adapt_inputs(layer, GATE, UP, w.normed, m.D, m.D);
    hidden(w13, a, 0, s.T, adapted);
    if (adapted) {
      Matrix half = w13;
      half.rows /= 2;
      const Range mine = panels_of(half);
      adapt_outputs(layer, GATE, UP, GATE, half, mine, w.hidden, m.F);
      adapt_outputs(layer, GATE, UP, UP, half, mine, w.up, m.F);
      for (int64_t t = 0; t < s.T; ++t)
        close(w.hidden + t * m.F + mine.begin * WIDE, w.up + t * m.F + mine.begin * WIDE, (mine.end - mine.begin) * WIDE);
    }
#pragma omp barrier
    Activations b = left_of(w2);
    for (int64_t t = own.begin; t < own.end; ++t) put_row(b, t, w.hidden + t * m.F);
#pragma omp barrier
    if (adapts_down) adapt_inputs(layer, DOWN, DOWN, w.hidden, m.F, w2.depth);
    times(w2, b, 0, s.T, [&](int64_t t, int64_t j, const float* out) {
      float* to = row(t) + j * WIDE;
      int64_t width = width_of(w2, j);
      for (int64_t c = 0; c < width; ++c) to[c] += factor ? out[c] * factor[t] : out[c];
    });
    if (adapts_down) adapt_outputs(layer, DOWN, DOWN, DOWN, w2, panels_of(w2), s.x, m.D);
#pragma omp barrier
  }

  // Products of a recurrent router, whose states all are where the routers before left them.
  void recur(const Recurrence& r) {
    const int64_t P = m.state;
    Activations x = left_of(r.projector), projected = floats(w.projected, P), state = floats(w.state, P);
    for (int64_t t = own.begin; t < own.end; ++t) put_row(x, t, w.normed + t * m.D);
#pragma omp barrier
    times(r.projector, x, 0, s.T, [&](int64_t t, int64_t j, const float* out) {
      memcpy(w.projected + t * P + j * WIDE, out, WIDE * sizeof(float));
    });
    times(r.hidden, state, 0, s.T, [&](int64_t t, int64_t j, const float* out) {
      memcpy(w.gates + (2 * t + 1) * 3 * P + j * WIDE, out, WIDE * sizeof(float));
    });
#pragma omp barrier
    times(r.input, projected, 0, s.T, [&](int64_t t, int64_t j, const float* out) {
      memcpy(w.gates + 2 * t * 3 * P + j * WIDE, out, WIDE * sizeof(float));
    });
#pragma omp barrier
  }
  static Activations floats(float* rows, int64_t width) { return {(char*)rows, width, width * (int64_t)sizeof(float), FLOAT}; }

  float* shared_gates() const { return w.logits + s.T * m.most_experts; }  // behind the logits

  // What each token is routed to, and the rows of the experts.
  void choose(const Block& block) {
    const Experts& e = block.experts;
    const Recurrence& r = e.recurrence;
    const int64_t K = e.top_k, P = m.state;
    float *score = scratch.get<float>(SUM, e.count), *gates = shared_gates();
    for (int64_t t = own.begin; t < own.end; ++t) {
      norm_row(row(t), block.feed_forward_norm, m.D, m.norm_eps, w.normed + t * m.D);
      if (e.shift) add(w.normed + t * m.D, e.shift, m.D);
    }
    if (r.projector.rows) recur(r);
    for (int64_t t = own.begin; t < own.end; ++t) {
      float *normed = w.normed + t * m.D, *state = w.state + t * P;
      if (r.projector.rows) advance(r, w.gates + 2 * t * 3 * P, w.gates + (2 * t + 1) * 3 * P, state);
      auto [seen, depth] = r.projector.rows ? std::pair<const float*, int64_t>{state, P} : std::pair<const float*, int64_t>{normed, m.D};
      route(e, depth, seen, w.logits + t * m.most_experts, score, w.index + t * K, w.weight + t * K);
      if (r.projector.rows && !r.hands_on) std::fill(state, state + P, 0.f);
      tell_routes(e, t);
      if (e.gate) gates[t] = 1.f / (1.f + std::exp(-dot(normed, e.gate, m.D)));
    }
#pragma omp barrier
#pragma omp single
    sort_places(e);
  }

  // x += the weighted sum of what the experts made, and what the shared ones make.
  void join(const Experts& e) {
    const int64_t K = e.top_k;
    for (int64_t t = own.begin; t < own.end; ++t)
      for (int64_t c = 0; c < m.D; ++c) {
        float sum = 0.f;
        for (int64_t k = 0; k < K; ++k) sum += w.weight[t * K + k] * w.out[w.row_of_place[t * K + k] * m.D + c];
        row(t)[c] += sum;
      }
#pragma omp barrier
    if (e.shared13.rows) dense(e.shared13, e.shared2, nullptr, e.gate ? shared_gates() : nullptr, -1);
  }

  void tell_routes(const Experts& e, int64_t t) {
    if (!s.routes) return;
    int32_t* to = s.routes + (e.number * s.T + t) * m.most_top_k;
    for (int64_t k = 0; k < m.most_top_k; ++k) to[k] = k < e.top_k ? w.index[t * e.top_k + k] : -1;
  }

  // x += share wide(x) + (1 - share) (f applied as often as the token's gate says), where wide(x) is the chosen virtual experts: slices of f's
  // hidden units, so the first loop has computed them. A token of one loop takes both in one row of the second product.
  void versatile(const Block& block) {
    const Experts& e = block.experts;
    const Loops& loops = block.loops;
    const int64_t K = e.top_k, F = block.w2.depth;
    float* score = scratch.get<float>(SUM, std::max(e.count, loops.most));
    for (int64_t t = own.begin; t < own.end; ++t) {
      route(e, m.D, row(t), w.logits + t * m.most_experts, score, w.index + t * K, w.weight + t * K);
      tell_routes(e, t);
      for (int64_t l = 0; l < loops.most; ++l) score[l] = dot(row(t), loops.gate + l * m.D, m.D);
      w.loops[t] = 1 + (int32_t)(std::max_element(score, score + loops.most) - score);
    }
    Activations a = left_of(block.w13), b = left_of(block.w2);
    norm_rows(block, a, s.T, [](int64_t t) { return t; }, nullptr);
#pragma omp barrier
    hidden(block.w13, a, 0, s.T, false);
#pragma omp single
    sort_loops(loops);
    float* mixed = scratch.get<float>(SUM, F);
    for (int64_t t = own.begin; t < own.end; ++t) {
      float *unit = w.hidden + t * m.F, share = share_of_width(loops, t);
      if (share > 0.f) {
        std::fill(mixed, mixed + F, 0.f);
        for (int64_t k = 0; k < K; ++k)
          for (int64_t i = 0; i < loops.width; ++i) mixed[loops.first[w.index[t * K + k]] + i] += w.weight[t * K + k];
        if (w.beside[t] < 0) {
          for (int64_t i = 0; i < F; ++i) unit[i] *= share * mixed[i] + (1.f - share);
        } else {
          for (int64_t i = 0; i < F; ++i) mixed[i] *= unit[i];
          put_row(b, w.beside[t], mixed);
        }
      }
      put_row(b, t, unit);
    }
#pragma omp barrier
    times(block.w2, b, 0, w.still[loops.most], [&](int64_t r, int64_t j, const float* out) {
      memcpy(w.out + r * m.D + j * WIDE, out, width_of(block.w2, j) * sizeof(float));
    });
#pragma omp barrier
    for (int64_t l = 1; l < loops.most && w.still[l]; ++l) {
      const int64_t count = w.still[l];
      Range rows = share_of(count, thread, threads);
      norm_rows(block, a, count, [&](int64_t p) { return w.order[p]; }, w.out);
#pragma omp barrier
      hidden(block.w13, a, 0, count, false);
#pragma omp barrier
      for (int64_t p = rows.begin; p < rows.end; ++p) put_row(b, p, w.hidden + p * m.F);
#pragma omp barrier
      times(block.w2, b, 0, count, [&](int64_t p, int64_t j, const float* out) {
        add(w.out + w.order[p] * m.D + j * WIDE, out, width_of(block.w2, j));
      });
#pragma omp barrier
    }
    for (int64_t t = own.begin; t < own.end; ++t) {
      const bool mixes = w.beside[t] >= 0;
      const float *deep = w.out + t * m.D, *wide = mixes ? w.out + w.beside[t] * m.D : deep, share = mixes ? share_of_width(loops, t) : 0.f;
      for (int64_t c = 0; c < m.D; ++c) row(t)[c] += share * wide[c] + (1.f - share) * deep[c];
    }
#pragma omp barrier
  }

  // Norms of the first `count` rows, of token(p) with `change` of it where there is one, ready for a product.
  template <class Token>
  void norm_rows(const Block& block, const Activations& to, int64_t count, Token token, const float* change) {
    Range rows = share_of(count, thread, threads);
    float* normed = scratch.get<float>(MIDDLE, m.D);
    for (int64_t p = rows.begin; p < rows.end; ++p) {
      memcpy(normed, row(token(p)), m.D * sizeof(float));
      if (change) add(normed, change + token(p) * m.D, m.D);
      norm_row(normed, block.feed_forward_norm, m.D, m.norm_eps, normed);
      put_row(to, p, normed);
    }
  }

  float share_of_width(const Loops& loops, int64_t t) const {
    float share = (float)(loops.most - w.loops[t]) / loops.most;
    return share > loops.threshold ? share : 0.f;
  }

  // Tokens by loops, most first; a row of its own behind them for each width path of a token that goes on looping. The last of `still` is how
  // many rows there are.
  void sort_loops(const Loops& loops) {
    std::fill(w.still, w.still + loops.most, 0);
    for (int64_t t = 0; t < s.T; ++t)
      for (int64_t l = 0; l < w.loops[t]; ++l) ++w.still[l];
    int64_t place = 0, rows = s.T;
    for (int64_t l = loops.most; l > 0; --l)
      for (int64_t t = 0; t < s.T; ++t)
        if (w.loops[t] == l) w.order[place++] = (int32_t)t;
    for (int64_t t = 0; t < s.T; ++t) w.beside[t] = w.loops[t] > 1 && share_of_width(loops, t) > 0.f ? (int32_t)rows++ : -1;
    w.still[loops.most] = rows;
  }

  // Rows of experts: places by expert, then by token.
  void sort_places(const Experts& e) {
    const int64_t places = s.T * e.top_k;
    std::fill(w.offset, w.offset + e.count + 1, 0);
    for (int64_t p = 0; p < places; ++p) ++w.offset[w.index[p] + 1];
    for (int64_t i = 0; i < e.count; ++i) w.offset[i + 1] += w.offset[i];
    int32_t* next = w.offset + m.most_experts + 1;
    std::copy(w.offset, w.offset + e.count, next);
    for (int64_t p = 0; p < places; ++p) {
      int32_t r = next[w.index[p]]++;
      w.row_of_place[p] = r;
      w.token_of_row[r] = p / e.top_k;
    }
  }

  const Model& m;
  const Step& s;
  const Work& w;
  Scratch& scratch;
  int thread, threads;
  Range own;
};

thread_local Scratch scratch_of_thread;

// All that a step takes of a thread's memory, before the step begins: in it threads wait for one another, so none may stop halfway.
void reserve(const Model& m, Scratch& scratch) {
  scratch.get<float>(MIDDLE, std::max(m.D, m.H));
  scratch.get<Head>(PRE, m.G);
  scratch.get<float>(SUM, std::max({m.most_experts, m.most_loops, m.F}));
  scratch.get<Query>(SUM, RUN * m.H / m.G);
  scratch.get<float>(SPARE, Keys::floats(m.W));
}

// Whether the groups' tokens are rows, and what they work out fits into the memory for it.
bool has_room(const Step& s) {
  int64_t lows = 0;
  for (const Group* group = s.group; group < s.group + s.groups; ++group) {
    if (group->count < 0 || group->lows < 0) return false;
    lows += group->count * group->lows;
    if (std::any_of(group->token, group->token + group->count, [&](int32_t t) { return t < 0 || t >= s.T; })) return false;
  }
  return lows <= s.lows;
}

// Whether the sequences are all of the rows, one after another, and their blocks among those that there are.
bool is_in_range(const Model& m, const Step& s) {
  int64_t rows = 0;
  for (int64_t n = 0; n < s.sequences; ++n) {
    const int64_t *sequence = s.sequence + 4 * n, count = sequence[1], past = sequence[2], first = sequence[3];
    if (sequence[0] != rows || count < 0 || past < 0 || first < 0 || count > s.T - rows) return false;
    rows += count;
    const int64_t blocks = (past + count + m.block_tokens - 1) / m.block_tokens;
    if (blocks > s.table_length - first) return false;
    for (int64_t u = first; u < first + blocks; ++u)
      if (s.table[u] < 0 || (s.table[u] + (int64_t)1) * m.block_tokens > m.slots) return false;
  }
  return rows == s.T && has_room(s);
}

Work work_of(const Model& m, const Step& s) {
  Memory memory(false);
  memory.start = s.memory;
  return cut(memory, m, s.T, s.lows);
}

}  // namespace

// Bytes of `memory` for a step of T tokens, with the `lows` of its adapters. It begins with what the experts of a layer see, float32 [T, D],
// and behind that, from the next multiple of 64 bytes on, the states of recurrent routers, [T, P].
extern "C" int64_t anabranch_decode_bytes(const Model* model, int64_t T, int64_t lows) {
  Memory size(true);
  cut(size, *model, T, lows);
  return size.used;
}

// A step, or the part of it from the experts of layer `from` (-1: the beginning) to the router of layer `to` (-1: the end).
extern "C" int anabranch_decode(const Model* model, const Step* step, int64_t from, int64_t to, int threads) {
  const Model& m = *model;
  const Step& s = *step;
  if (from < 0 && !is_in_range(m, s)) return OUT_OF_RANGE;
  Work w = work_of(m, s);
  Failure failure;
  for (int64_t n = 0; from < 0 && n < s.sequences; ++n) {
    const int64_t* sequence = s.sequence + 4 * n;
    for (int64_t i = 0; i < sequence[1]; ++i) {
      int64_t t = sequence[0] + i, p = sequence[2] + i;
      w.context[t] = p + 1;
      w.table[t] = s.table + sequence[3];
      w.slot[t] = w.table[t][p / m.block_tokens] * m.block_tokens + p % m.block_tokens;
      // Tokens of a few are cheaper one by one; others go along with the first of their run, and their own end lies behind them.
      const bool runs = sequence[1] - i / RUN * RUN >= LEAST_RUN;
      w.run_end[t] = !runs ? t + 1 : i % RUN ? 0 : sequence[0] + std::min(i + RUN, sequence[1]);
    }
  }
#pragma omp parallel num_threads(threads)
  {
    failure.guard([&] { reserve(m, scratch_of_thread); });
#pragma omp barrier
    if (!failure.happened()) {
      Tiles tiles;
      Run(m, s, w, scratch_of_thread, omp_get_thread_num(), omp_get_num_threads()).part(from, to);
    }
  }
  return failure.status();
}

// Experts of layer `layer`, whose router has chosen: those with a slot of at least 0, of `slots` in the stack; slot_of [E].
extern "C" int anabranch_decode_experts(const Model* model, const Step* step, int64_t layer, const int32_t* slot_of, int64_t E,
                                        int64_t slots, int threads) {
  if (layer < 0 || layer >= model->layers || E != model->blocks[layer].experts.count) return OUT_OF_RANGE;
  if (std::any_of(slot_of, slot_of + E, [&](int32_t slot) { return slot >= slots; })) return OUT_OF_RANGE;
  Work w = work_of(*model, *step);
#pragma omp parallel num_threads(threads)
  {
    Tiles tiles;
    Run(*model, *step, w, scratch_of_thread, omp_get_thread_num(), omp_get_num_threads()).compute(model->blocks[layer].experts, slot_of);
  }
  return DONE;
}
