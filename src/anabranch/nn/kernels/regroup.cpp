// ExpertFlow's Token Scheduler on sets of bits: the numbers of token_scheduler.py, all of them integers, without the interpreter's lock.
// C ABI; compiled and loaded by kernels/__init__.py.
//
// Shapes: X tokens, C cells (a layer's expert each), P words of 64 cells; A, B tokens of the first and the second batch.

#include <algorithm>
#include <cstdint>
#include <vector>

#include "failure.h"

namespace {

using Word = uint64_t;
using Bits = std::vector<Word>;
using Side = std::vector<char>;  // of each token, whether it is in the first batch

inline int64_t ones(const Word* bits, int64_t P) {
  int64_t sum = 0;
  for (int64_t p = 0; p < P; ++p) sum += __builtin_popcountll(bits[p]);
  return sum;
}

struct Tokens {
  int64_t X, P;
  Bits bits;  // [X][P]
  const Word* of(int64_t x) const { return bits.data() + x * P; }
};

Tokens packed(const uint8_t* chosen, int64_t X, int64_t C) {
  Tokens t{X, (C + 63) / 64, {}};
  t.bits.assign(X * t.P, 0);
  for (int64_t x = 0; x < X; ++x)
    for (int64_t c = 0; c < C; ++c) t.bits[x * t.P + c / 64] |= (Word)(chosen[x * C + c] != 0) << (c % 64);
  return t;
}

// Cells that a token of the side has, and those that only one has.
void count(const Tokens& t, const Side& first, char side, Bits& any, Bits& alone) {
  any.assign(t.P, 0);
  Bits more(t.P, 0);
  for (int64_t x = 0; x < t.X; ++x)
    if (first[x] == side)
      for (int64_t p = 0; p < t.P; ++p) {
        more[p] |= any[p] & t.of(x)[p];
        any[p] |= t.of(x)[p];
      }
  alone.resize(t.P);
  for (int64_t p = 0; p < t.P; ++p) alone[p] = any[p] & ~more[p];
}

int64_t objective(const Tokens& t, const Side& first) {
  Bits any, alone;
  int64_t sum = 0;
  for (char side : {0, 1}) {
    count(t, first, side, any, alone);
    sum += ones(any.data(), t.P);
  }
  return sum;
}

// The token of a side that differs least from the others there, of equals the first.
int64_t medoid(const std::vector<int32_t>& hamming, const Side& first, char side) {
  const int64_t X = (int64_t)first.size();
  int64_t best = -1, least = 0;
  for (int64_t x = 0; x < X; ++x) {
    if (first[x] != side) continue;
    int64_t sum = 0;
    for (int64_t y = 0; y < X; ++y) sum += first[y] == side ? hamming[x * X + y] : 0;
    if (best < 0 || sum < least) best = x, least = sum;
  }
  return best;
}

Side clustered(const Tokens& t, Side first, int64_t size, int64_t max_rounds) {
  const int64_t X = t.X;
  std::vector<int32_t> hamming(X * X);
  for (int64_t x = 0; x < X; ++x)
    for (int64_t y = 0; y < x; ++y) {
      int32_t sum = 0;
      for (int64_t p = 0; p < t.P; ++p) sum += __builtin_popcountll(t.of(x)[p] ^ t.of(y)[p]);
      hamming[x * X + y] = hamming[y * X + x] = sum;
    }
  const int64_t farthest = std::max_element(hamming.begin(), hamming.end()) - hamming.begin();
  int64_t one = farthest / X, two = farthest % X;
  std::vector<int64_t> order(X);
  for (int64_t round = 0; round < max_rounds; ++round) {
    for (int64_t x = 0; x < X; ++x) order[x] = x;
    std::stable_sort(order.begin(), order.end(), [&](int64_t x, int64_t y) {
      return hamming[one * X + x] - hamming[two * X + x] < hamming[one * X + y] - hamming[two * X + y];
    });
    std::fill(first.begin(), first.end(), 0);
    for (int64_t i = 0; i < size; ++i) first[order[i]] = 1;
    const int64_t next_one = medoid(hamming, first, 1), next_two = medoid(hamming, first, 0);
    if (next_one == one && next_two == two) break;
    one = next_one, two = next_two;
  }
  return first;
}

// What a token takes along when it leaves its batch, less what it brings to the other one.
int64_t own_gain(const Word* token, const Bits& alone, const Bits& any_other, int64_t P) {
  int64_t sum = 0;
  for (int64_t p = 0; p < P; ++p) sum += __builtin_popcountll(token[p] & alone[p]) - __builtin_popcountll(token[p] & ~any_other[p]);
  return sum;
}

// Exchange the pair of tokens that helps most, of equals the first, again and again.
void exchange(const Tokens& t, Side& first, int64_t max_exchanges) {
  const int64_t P = t.P;
  Bits any[2], alone[2];
  std::vector<int64_t> gain(t.X);
  for (int64_t turn = 0; turn < max_exchanges; ++turn) {
    for (char side : {0, 1}) count(t, first, side, any[(int)side], alone[(int)side]);
    for (int64_t x = 0; x < t.X; ++x) gain[x] = own_gain(t.of(x), alone[(int)first[x]], any[1 - first[x]], P);
    int64_t most = 0, leaving = -1, coming = -1;
    for (int64_t a = 0; a < t.X; ++a) {
      if (!first[a]) continue;
      for (int64_t b = 0; b < t.X; ++b) {
        if (first[b] || gain[a] + gain[b] <= most) continue;  // what both have only lowers the gain
        int64_t both = 0;
        for (int64_t p = 0; p < P; ++p)
          both += __builtin_popcountll(t.of(a)[p] & t.of(b)[p] & alone[0][p]) + __builtin_popcountll(t.of(a)[p] & t.of(b)[p] & alone[1][p]);
        if (gain[a] + gain[b] - both > most) most = gain[a] + gain[b] - both, leaving = a, coming = b;
      }
    }
    if (leaving < 0) break;
    first[leaving] = 0, first[coming] = 1;
  }
}

}  // namespace

// chosen [X][C], of which the first `size` tokens are the first batch, neither empty; order [X]; objectives [2]: before, after.
extern "C" int anabranch_regroup(const uint8_t* chosen, int64_t X, int64_t C, int64_t size, int64_t max_rounds, int64_t max_exchanges,
                                 int64_t* order, int64_t* objectives) {
  if (size < 1 || size >= X) return OUT_OF_RANGE;
  return status_of([&] {
    const Tokens t = packed(chosen, X, C);
    Side given(X, 0);
    std::fill(given.begin(), given.begin() + size, 1);
    Side starts[2] = {given, clustered(t, given, size, max_rounds)}, best = given;
    objectives[0] = objectives[1] = objective(t, given);
    for (Side& start : starts) {
      exchange(t, start, max_exchanges);
      const int64_t value = objective(t, start);
      if (value < objectives[1]) best = start, objectives[1] = value;
    }
    for (char side : {1, 0})
      for (int64_t x = 0; x < X; ++x)
        if (best[x] == side) *order++ = x;
    return DONE;
  });
}
