// Matrix units that multiply tiles of bfloat16 (AMX): whether this process may use them, their configuration, and a product. Included by
// the kernels beside. With ANABRANCH_TILES_IN_SOFTWARE the tiles are arrays and their instructions functions, for tests on processors that
// have none.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#if defined(ANABRANCH_TILES_IN_SOFTWARE)
#define ANABRANCH_TILES 1
#elif defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__linux__)
#define ANABRANCH_TILES 1
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#if defined(ANABRANCH_TILES_IN_SOFTWARE)
// Products of tiles so far, for tests to see that there were any.
extern "C" {
__attribute__((weak)) int64_t anabranch_software_products = 0;
}
#endif

namespace {

constexpr int TILE = 16;             // rows of a tile, and columns of a tile of sums
constexpr int TILE_PAIRS = 16;       // pairs of bfloat16 in its row
constexpr int64_t PAIRED_ROWS = 32;  // rows that one product takes; as many must be readable from every multiple of it on

#if defined(ANABRANCH_TILES_IN_SOFTWARE)
// What Intel's manual says of each instruction, but for the order of the two products of a pair. Use before configuration aborts.
struct SoftwareTiles {
  uint8_t configuration[64] = {};
  alignas(64) uint8_t tile[8][TILE][64];

  int rows(int t) const {
    int rows = configuration[48 + t];
    if (configuration[0] != 1 || rows < 1 || rows > TILE) abort();
    return rows;
  }
  int bytes(int t) const {
    int bytes = ((const uint16_t*)(configuration + 16))[t];
    if (configuration[0] != 1 || bytes < 1 || bytes > 64) abort();
    return bytes;
  }
  void configure(const void* wanted) {
    memcpy(configuration, wanted, 64);
    memset(tile, 0, sizeof tile);
  }
  void zero(int t) { memset(tile[t], 0, sizeof tile[t]); }
  void load(int t, const void* from, int64_t stride) {
    zero(t);
    for (int i = 0; i < rows(t); ++i) memcpy(tile[t][i], (const char*)from + i * stride, bytes(t));
  }
  void store(int t, void* to, int64_t stride) const {
    for (int i = 0; i < rows(t); ++i) memcpy((char*)to + i * stride, tile[t][i], bytes(t));
  }
  void multiply(int sum, int left, int right) {
    if (rows(sum) != rows(left) || bytes(sum) != bytes(right) || rows(right) != bytes(left) / 4) abort();
    __atomic_fetch_add(&anabranch_software_products, 1, __ATOMIC_RELAXED);
    auto number = [&](int t, int row, int half) {
      uint32_t bits = (uint32_t)((const uint16_t*)tile[t][row])[half] << 16;
      float value;
      memcpy(&value, &bits, 4);
      return value;
    };
    for (int i = 0; i < rows(sum); ++i)
      for (int k = 0; k < rows(right); ++k)
        for (int j = 0; j < bytes(right) / 4; ++j) {
          float& to = ((float*)tile[sum][i])[j];
          to += number(left, i, 2 * k) * number(right, k, 2 * j);
          to += number(left, i, 2 * k + 1) * number(right, k, 2 * j + 1);
        }
  }
};
inline thread_local SoftwareTiles software_tiles;
inline bool may_use_tiles() { return true; }
inline void written(const void*) {}
#define TILE_ZERO(t) software_tiles.zero(t)
#define TILE_LOAD(t, from, stride) software_tiles.load(t, from, stride)
#define TILE_STORE(t, to, stride) software_tiles.store(t, to, stride)
#define TILE_MULTIPLY(sum, left, right) software_tiles.multiply(sum, left, right)
inline void store_configuration(void* to) { memcpy(to, software_tiles.configuration, 64); }
inline void load_configuration(const void* from) { software_tiles.configure(from); }
inline void release_tiles() { software_tiles.configuration[0] = 0; }
#elif defined(ANABRANCH_TILES)
inline bool may_use_tiles() {  // Linux lends the tile registers to processes that ask
  static const bool granted = syscall(SYS_arch_prctl, 0x1023, 18) == 0;
  return granted;
}
// GCC's intrinsics do not all say what memory they read; without this it may leave out or put off what is written there before.
inline void written(const void* p) { asm volatile("" : : "r"(p) : "memory"); }
#define TILE_ZERO(t) _tile_zero(t)
#define TILE_LOAD(t, from, stride) _tile_loadd(t, from, stride)
#define TILE_STORE(t, to, stride) _tile_stored(t, to, stride)
#define TILE_MULTIPLY(sum, left, right) _tile_dpbf16ps(sum, left, right)
inline void store_configuration(void* to) {
  _tile_storeconfig(to);
  written(to);
}
inline void load_configuration(const void* from) {
  written(from);
  _tile_loadconfig(from);
}
inline void release_tiles() { _tile_release(); }
#else
inline bool may_use_tiles() { return false; }
#endif

#ifdef ANABRANCH_TILES
// The tiles' shape while it lives; what was set before, by a library that shares the thread, comes back.
class Tiles {
 public:
  Tiles() {
    if (!may_use_tiles()) return;
    store_configuration(before);
    alignas(64) uint8_t wanted[64] = {1};
    for (int t = 0; t < 8; ++t) {
      ((uint16_t*)(wanted + 16))[t] = 4 * TILE_PAIRS;
      wanted[48 + t] = TILE;
    }
    load_configuration(wanted);
  }
  ~Tiles() {
    if (!may_use_tiles()) return;
    if (before[0])
      load_configuration(before);
    else
      release_tiles();
  }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

 private:
  alignas(64) uint8_t before[64] = {};
};

struct TiledLeft {  // rows of pairs, `stride` bytes apart; more than TILE of them with `below`
  const void* rows;
  int64_t stride;
  bool below;
};
struct TiledRight {  // [pair][TILE] columns of pairs, `stride` bytes apart, twice; the second may be null
  const void *first, *second;
  int64_t stride;
};
struct TiledSums {  // up to PAIRED_ROWS rows of TILE floats, `stride` bytes apart, for each of the right's two
  float *first, *second;
  int64_t stride;
};

// sums (+)= left right along `steps` times TILE_PAIRS pairs.
inline void multiply_tiles(const TiledLeft& left, const TiledRight& right, int64_t steps, const TiledSums& sums, bool add) {
  const int64_t half = TILE * sums.stride;
  const char *above = (const char*)left.rows, *below = above + TILE * left.stride;
  const char *one = (const char*)right.first, *other = (const char*)right.second;
  written(left.rows);
  written(right.first);
  TILE_ZERO(0);
  TILE_ZERO(1);
  TILE_ZERO(2);
  TILE_ZERO(3);
  if (add) {
    TILE_LOAD(0, sums.first, sums.stride);
    if (other) TILE_LOAD(1, sums.second, sums.stride);
    if (left.below) TILE_LOAD(2, (char*)sums.first + half, sums.stride);
    if (left.below && other) TILE_LOAD(3, (char*)sums.second + half, sums.stride);
  }
  for (int64_t k = 0; k < steps; ++k) {
    TILE_LOAD(4, above + k * 4 * TILE_PAIRS, left.stride);
    TILE_LOAD(6, one + k * TILE_PAIRS * right.stride, right.stride);
    TILE_MULTIPLY(0, 4, 6);
    if (other) {
      TILE_LOAD(7, other + k * TILE_PAIRS * right.stride, right.stride);
      TILE_MULTIPLY(1, 4, 7);
    }
    if (left.below) {
      TILE_LOAD(5, below + k * 4 * TILE_PAIRS, left.stride);
      TILE_MULTIPLY(2, 5, 6);
      if (other) TILE_MULTIPLY(3, 5, 7);
    }
  }
  TILE_STORE(0, sums.first, sums.stride);
  if (other) TILE_STORE(1, sums.second, sums.stride);
  if (left.below) {
    TILE_STORE(2, (char*)sums.first + half, sums.stride);
    if (other) TILE_STORE(3, (char*)sums.second + half, sums.stride);
  }
}
#else
class Tiles {
 public:
  Tiles() {}
};
#endif

}  // namespace
