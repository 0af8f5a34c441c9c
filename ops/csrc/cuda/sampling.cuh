// Who works on what, and where the samples of a row lie and how much they count.
//
// A row is one (image, query, head). LANES neighbouring lanes work on a row, each on VEC neighbouring channels (16 bytes
// of values), so that a warp serves 32 / LANES rows. Where a sample lies and how much its corners count is worked out
// once, by one lane, and read by the others from shared memory. A block's rows are of one head and of queries that lie
// near each other, whose samples share lines of the L1 cache.
#pragma once

#include "../problem.h"
#include "primitives.cuh"

namespace dino_d2::cuda {

constexpr int kMostLevels = 16;
constexpr int kTileWidth = 8;  // queries

struct Levels {  // travels as a kernel argument, so that nothing is copied to the device
  float per_point;  // 1 / points
  int height[kMostLevels];
  int width[kMostLevels];
  int start[kMostLevels];
};

// Which queries a block takes. Where queries are the tokens themselves: a tile, kTileWidth wide, of one level; the
// tiles of level l are numbered from first[l] on, across[l] of them side by side. Otherwise (levels = 0) the next few.
struct Tiles {
  int levels;
  int count;
  int first[kMostLevels];
  int across[kMostLevels];
};

// How lanes share the work on a row. Samples are taken LANES at a time, each by the lane that `sample` names, which is
// also where `Dots` delivers. WHOLE: a row has LANES * VEC channels; otherwise it is worked on in turns.
template <int VEC_, int LANES_, bool WHOLE_>
struct Layout {
  static constexpr int VEC = VEC_, LANES = LANES_, ROWS = kThreads / LANES_;
  static constexpr bool WHOLE = WHOLE_;
  static constexpr int GROUP = LANES == 8 ? 8 : 4;      // samples whose sums over channels are made together
  static constexpr int SPREAD = LANES / GROUP;         // lanes that end up with the same sum

  // Additions to sums of type S. TOGETHER neighbouring lanes add to one row at a time, UNIT neighbouring channels each, so
  // that an instruction fills sectors of 32 bytes; the rows that these lanes serve have their turns.
  template <class S>
  struct Additions {
    static constexpr int UNIT = std::is_same_v<S, float> && VEC % kAddedAtOnce == 0 ? kAddedAtOnce : 1;
    static constexpr int FILLED = 32 / (UNIT * sizeof(S));
    static constexpr int TOGETHER = LANES < FILLED ? FILLED : LANES;
    static constexpr int ROWS = TOGETHER / LANES;
    static constexpr int UNITS = VEC / (UNIT * ROWS);  // of a lane, in each of these rows
    static_assert(UNITS * UNIT * ROWS == VEC);

    static __device__ __forceinline__ int channel(int unit) {
      return (unit * TOGETHER + static_cast<int>(threadIdx.x) % TOGETHER) * UNIT;
    }
  };

  static __device__ __forceinline__ int sample(int lane) { return lane % SPREAD * GROUP + lane / SPREAD; }
  static __device__ __forceinline__ int channels(const Sizes& z) {
    return WHOLE ? LANES * VEC : static_cast<int>(z.channels);
  }
};

// One row, as its lanes see it. Lanes of a row that does not exist see row 0 and must write nothing.
template <class L, class A>
struct Row {
  bool exists;
  int lane, place;        // of the lane in the row, of the row in the block
  int64_t image, head, query, index;  // query: through the batch; index: through queries and heads
  int samples, points;

  __device__ __forceinline__ Row(const Sizes& z, const Levels& levels, const Tiles& tiles) {
    lane = threadIdx.x % L::LANES;
    place = threadIdx.x / L::LANES;
    head = blockIdx.x % z.heads;
    const int64_t block = blockIdx.x / z.heads;
    image = block / tiles.count;
    const int tile = static_cast<int>(block % tiles.count);
    int64_t within;
    if (tiles.levels == 0) {
      within = int64_t(tile) * L::ROWS + place;
      exists = within < z.queries;
    } else {
      int level = 0;
      while (level + 1 < tiles.levels && tile >= tiles.first[level + 1]) ++level;
      const int in_level = tile - tiles.first[level];
      const int x = in_level % tiles.across[level] * kTileWidth + place % kTileWidth;
      const int y = in_level / tiles.across[level] * (L::ROWS / kTileWidth) + place / kTileWidth;
      exists = x < levels.width[level] && y < levels.height[level];
      within = levels.start[level] + int64_t(y) * levels.width[level] + x;
    }
    query = image * z.queries + (exists ? within : 0);
    index = query * z.heads + head;
    samples = static_cast<int>(z.samples());
    points = static_cast<int>(z.points);
  }
};

// Where one sample lies. Corners: 0 = top left, 1 = top right, 2 = bottom left, 3 = bottom right.
template <class A>
struct Sample {
  bool inside;
  bool has_left, has_right, has_top, has_bottom;
  A right, bottom;  // distance from the column and row before it
  A scale_x, scale_y;  // pixels per unit of position
  int token[4];     // a corner outside is read at its neighbour inside, with share 0

  // `at`: index of the sample in the row.
  template <class L>
  __device__ __forceinline__ Sample(const Row<L, A>& row, const Sampling<A>& p, const Levels& levels, int64_t level_count,
                                    int at) {
    inside = has_left = has_right = has_top = has_bottom = false;
    token[0] = token[1] = token[2] = token[3] = -1;
    if (!row.exists || at >= row.samples) return;
    const int level = static_cast<int>((at + 0.5f) * levels.per_point);
    const int w = levels.width[level], h = levels.height[level];
    const A* position = p.positions + 2 * (row.index * row.samples + at);
    A x, y;
    if (p.reference) {
      const A* reference = p.reference + (row.query * level_count + level) * p.reference_size;
      const bool box = p.reference_size == 4;
      const A half = sizeof(A) == 4 ? A(0.5) * levels.per_point : A(0.5) / row.points;
      scale_x = box ? reference[2] * w * half : A(1);
      scale_y = box ? reference[3] * h * half : A(1);
      x = reference[0] * w - A(0.5) + scale_x * position[0];
      y = reference[1] * h - A(0.5) + scale_y * position[1];
    } else {
      scale_x = w;
      scale_y = h;
      x = position[0] * w - A(0.5);
      y = position[1] * h - A(0.5);
    }
    inside = x > A(-1) && y > A(-1) && x < w && y < h;  // false for NaN
    if (!inside) return;
    const A x0 = floor(x), y0 = floor(y);
    right = x - x0;
    bottom = y - y0;
    const int column = static_cast<int>(x0), line = static_cast<int>(y0);
    has_left = column >= 0;
    has_top = line >= 0;
    has_right = column + 1 < w;
    has_bottom = line + 1 < h;
    token[0] = levels.start[level] + (has_top ? line : 0) * w + (has_left ? column : 0);
    const int to_right = has_left && has_right, to_bottom = has_top && has_bottom ? w : 0;
    token[1] = token[0] + to_right;
    token[2] = token[0] + to_bottom;
    token[3] = token[2] + to_right;
  }

  __device__ __forceinline__ A of_left() const { return has_left ? A(1) - right : A(0); }
  __device__ __forceinline__ A of_right() const { return has_right ? right : A(0); }
  __device__ __forceinline__ A of_top() const { return has_top ? A(1) - bottom : A(0); }
  __device__ __forceinline__ A of_bottom() const { return has_bottom ? bottom : A(0); }
};

// The attention weights of a row: as given, or by softmax over given logits.
template <class L, class A>
struct Weights {
  const A* given;
  bool softmax;
  A largest, share;  // weight = exp(logit - largest) * share

  __device__ __forceinline__ Weights(const Row<L, A>& row, const Sampling<A>& p) {
    given = p.weights + row.index * row.samples;
    softmax = p.reference != nullptr;
    if (!softmax) return;
    largest = -INFINITY;
    for (int i = row.lane; i < row.samples; i += L::LANES) {
      const A logit = given[i];
      largest = logit > largest || logit != logit ? logit : largest;
    }
    largest = largest_of_row<L::LANES>(largest);
    A sum = 0;
    for (int i = row.lane; i < row.samples; i += L::LANES) sum += exp(given[i] - largest);
    share = A(1) / sum_of_row<L::LANES>(sum);
  }

  __device__ __forceinline__ A operator[](int at) const {
    return softmax ? exp(given[at] - largest) * share : given[at];
  }
};

// What the lanes of a row tell each other about LANES samples.
template <class L, class A>
struct Staged {
  Pack<A, 4> share[kThreads];  // bilinear share times weight
  Pack<int, 4> token[kThreads];  // token[0] < 0: no such sample, or nothing of it is inside

  __device__ __forceinline__ void put(const Row<L, A>& row, const Sample<A>& s, A weight) {
    const int slot = row.place * L::LANES + L::sample(row.lane);
    const A top = weight * s.of_top(), bottom = weight * s.of_bottom();
    const A left = s.of_left(), right = s.of_right();
    share[slot] = {top * left, top * right, bottom * left, bottom * right};
    token[slot] = {s.token[0], s.token[1], s.token[2], s.token[3]};
  }
};

}  // namespace dino_d2::cuda
