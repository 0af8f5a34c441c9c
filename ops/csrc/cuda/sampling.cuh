// Who works on what, and where the samples of a row lie and how much they count.
//
// A row is one (image, query, head). LANES neighbouring lanes work on a row, each on VEC neighbouring channels (16
// bytes of values), so that a warp serves 32 / LANES rows. Where a sample lies and how much its corners count is worked
// out once, by one lane, and read by the others from shared memory. A block's rows are of one head and of queries that
// lie near each other, whose samples share lines of the L1 cache.
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

// Which queries a block takes. Where queries are the tokens themselves: a tile, kTileWidth wide and `height` high, of
// one level; the tiles of level l are numbered from first[l] on, `across` of them side by side. Otherwise (levels = 0):
// the next `rows`.
struct Tiles {
  int rows;
  int height;
  int levels;
  int count;
  int first[kMostLevels];
  float across[kMostLevels];
  float per_tile[kMostLevels];  // 1 / across
};
constexpr int kMostTiles = 1 << 20;  // of a level: fewer, and float32 finds the line of a tile

// How lanes share the work on a row. WHOLE: a row has LANES * VEC channels; otherwise it is worked on in turns. LEVELS
// and POINTS are 0 where they are known only at run time.
template <int VEC_, int LANES_, bool WHOLE_, int LEVELS_ = 0, int POINTS_ = 0>
struct Layout {
  static constexpr int VEC = VEC_, LANES = LANES_, LEVELS = LEVELS_, POINTS = POINTS_;
  static constexpr bool WHOLE = WHOLE_;
  static constexpr int SAMPLES = LEVELS * POINTS, PASSES = SAMPLES / LANES;
  static constexpr int GROUP = LANES == 8 ? 8 : 4;  // samples whose sums over channels are made together
  static constexpr int SPREAD = LANES / GROUP;      // lanes that end up with the same sum
  static_assert(32 % LANES == 0 && kMostThreads % (LANES * kTileWidth) == 0);
  static_assert(SAMPLES % LANES == 0 && POINTS % (PASSES > 0 ? PASSES : 1) == 0, "a lane's samples are of one level");

  // Additions to sums of type S. TOGETHER neighbouring lanes add to one row at a time, UNIT neighbouring channels each,
  // so that an instruction fills sectors of 32 bytes; the rows that these lanes serve have their turns.
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

  // In each pass over the samples, every lane works out one. Of those staged in a pass, this is the place of its own,
  // and where `sum_dots` delivers.
  static __device__ __forceinline__ int slot(int lane) { return lane % SPREAD * GROUP + lane / SPREAD; }
  static __device__ __forceinline__ int lane_of(int slot) { return slot % GROUP * SPREAD + slot / GROUP; }
  static __device__ __forceinline__ int samples(const Sizes& z) {
    return SAMPLES > 0 ? SAMPLES : static_cast<int>(z.samples());
  }
  static __device__ __forceinline__ int points(const Sizes& z) {
    return POINTS > 0 ? POINTS : static_cast<int>(z.points);
  }
  static __device__ __forceinline__ int channels(const Sizes& z) {
    return WHOLE ? LANES * VEC : static_cast<int>(z.channels);
  }
};

// One row, as its lanes see it; blocks are (tiles, heads, images). Lanes of a row that does not exist see query 0 and
// must write nothing.
template <class L>
struct Row {
  bool exists;
  int lane, place;       // of the lane in the row, of the row in the block
  int64_t query, index;  // query: through the batch; index: through queries and heads
  int64_t value;         // first channel of the row's image and head

  __device__ __forceinline__ Row(const Sizes& z, const Levels& levels, const Tiles& tiles) {
    const int tile = static_cast<int>(blockIdx.x), head = static_cast<int>(blockIdx.y);
    const int heads = static_cast<int>(z.heads);
    lane = static_cast<int>(threadIdx.x % L::LANES);
    place = static_cast<int>(threadIdx.x / L::LANES);
    int within = tile * tiles.rows + place;
    exists = within < static_cast<int>(z.queries);
    if (tiles.levels > 0) {
      int level = 0;
      for (int i = 1; i < (L::LEVELS > 0 ? L::LEVELS : tiles.levels); ++i) level = tile >= tiles.first[i] ? i : level;
      const float in_level = static_cast<float>(tile - tiles.first[level]);
      const float line = floorf((in_level + 0.5f) * tiles.per_tile[level]);
      const int column = static_cast<int>(in_level - line * tiles.across[level]);
      const int x = column * kTileWidth + static_cast<int>(threadIdx.x / L::LANES % kTileWidth);
      const int y = static_cast<int>(line) * tiles.height + static_cast<int>(threadIdx.x / L::LANES / kTileWidth);
      exists = x < levels.width[level] && y < levels.height[level];
      within = levels.start[level] + y * levels.width[level] + x;
    }
    query = static_cast<int64_t>(blockIdx.z) * static_cast<int>(z.queries) + (exists ? within : 0);
    index = query * heads + head;
    value = (static_cast<int64_t>(blockIdx.z) * static_cast<int>(z.tokens) * heads + head) * L::channels(z);
  }
};

// One level, as a query sees it: a sample lies `x + scale_x * position` pixels from the middle of the first.
template <class A>
struct Frame {
  int width, height, start;
  A x, y, scale_x, scale_y;

  template <class S>
  __device__ __forceinline__ Frame(const Sampling<A, S>& p, const Levels& levels, int64_t level_of_query, int level,
                                   int points)
      : width(levels.width[level]), height(levels.height[level]), start(levels.start[level]) {
    scale_x = width;
    scale_y = height;
    x = y = A(-0.5);
    if (!p.reference) return;
    const int numbers = static_cast<int>(p.reference_size);
    const A* const reference = p.reference + level_of_query * numbers;
    x += reference[0] * scale_x;
    y += reference[1] * scale_y;
    const A half = sizeof(A) == 4 ? A(0.5) * levels.per_point : A(0.5) / points;
    const bool box = numbers == 4;
    scale_x = box ? reference[2] * scale_x * half : A(1);
    scale_y = box ? reference[3] * scale_y * half : A(1);
  }
};

// Where one sample lies. Corners: 0 = top left, 1 = top right, 2 = bottom left, 3 = bottom right.
template <class A>
struct Sample {
  bool inside, has_left, has_right, has_top, has_bottom;
  A left, right, top, bottom;  // shares; 0 of what is outside
  Pack<uint32_t, 4> offset;    // of the corners, in units of the layout; one outside is read at its neighbour inside

  // `pitch`: units between tokens.
  __device__ __forceinline__ Sample(const Frame<A>& frame, bool exists, A position_x, A position_y, uint32_t pitch) {
    A x = frame.x + frame.scale_x * position_x, y = frame.y + frame.scale_y * position_y;
    inside = exists && x > A(-1) && y > A(-1) && x < frame.width && y < frame.height;  // false for NaN
    x = inside ? x : A(-2);  // where it has no neighbours
    y = inside ? y : A(-2);
    const A x0 = floor(x), y0 = floor(y);
    const int column = static_cast<int>(x0), line = static_cast<int>(y0);
    has_left = column >= 0;
    has_top = line >= 0;
    has_right = static_cast<unsigned>(column + 1) < static_cast<unsigned>(frame.width);
    has_bottom = static_cast<unsigned>(line + 1) < static_cast<unsigned>(frame.height);
    left = has_left ? A(1) - (x - x0) : A(0);
    top = has_top ? A(1) - (y - y0) : A(0);
    right = has_right ? x - x0 : A(0);
    bottom = has_bottom ? y - y0 : A(0);
    const int token = frame.start + max(line, 0) * frame.width + max(column, 0);
    const uint32_t first = static_cast<uint32_t>(token) * pitch;
    const uint32_t to_right = has_left && has_right ? pitch : 0;
    const uint32_t to_bottom = has_top && has_bottom ? frame.width * pitch : 0;
    offset = {first, first + to_right, first + to_bottom, first + to_bottom + to_right};
  }
};

// The samples that one lane works out, one in each pass, with their weights, as given or by softmax over given logits,
// and their gradients. Here the compiler knows their number: all are read at once, and all gradients are written at
// once.
template <class L, class A, class S>
class KnownSamples {
 public:
  __device__ __forceinline__ KnownSamples(const Row<L>& row, const Sampling<A, S>& p, const Levels& levels,
                                          const Sizes&)
      : p_(p),
        first_(row.index * L::SAMPLES + L::slot(row.lane) * L::PASSES),
        exists_(row.exists),
        level_(L::slot(row.lane) * L::PASSES / L::POINTS),
        frame_(p, levels, row.query * L::LEVELS + level_, level_, L::POINTS) {
    widen(*reinterpret_cast<const Pack<S, 2 * L::PASSES>*>(p.positions + 2 * first_), positions_);
    widen(*reinterpret_cast<const Pack<S, L::PASSES>*>(p.weights + first_), weights_);
    if (!p.reference) return;
    A largest = weights_[0], sum = 0;
#pragma unroll
    for (int i = 1; i < L::PASSES; ++i) largest = fmax(largest, weights_[i]);
    largest = largest_of_row<L::LANES>(largest);
#pragma unroll
    for (int i = 0; i < L::PASSES; ++i) sum += weights_[i] = exp(weights_[i] - largest);
    const A share = reciprocal(sum_of_row<L::LANES>(sum));
#pragma unroll
    for (int i = 0; i < L::PASSES; ++i) weights_[i] *= share;
  }

  __device__ __forceinline__ static constexpr int passes() { return L::PASSES; }
  // How many slots of a pass are taken: the first ones.
  __device__ __forceinline__ static constexpr int taken(int) { return L::LANES; }
  __device__ __forceinline__ A weight(int pass) const { return weights_[pass]; }
  __device__ __forceinline__ const Frame<A>& frame(int) const { return frame_; }
  __device__ __forceinline__ Sample<A> sample(int pass, uint32_t pitch) const {
    return {frame_, exists_, positions_[2 * pass], positions_[2 * pass + 1], pitch};
  }

  __device__ __forceinline__ void keep(int pass, A grad_weight, A grad_x, A grad_y) {
    grad_weights_[pass] = grad_weight;
    grad_positions_[2 * pass] = grad_x;
    grad_positions_[2 * pass + 1] = grad_y;
  }
  // Writes what was kept; of logits instead of weights where there is a softmax.
  __device__ __forceinline__ void write() {
    if (p_.reference) {
      A mean = 0;
#pragma unroll
      for (int i = 0; i < L::PASSES; ++i) mean += weights_[i] * grad_weights_[i];
      mean = sum_of_row<L::LANES>(mean);
#pragma unroll
      for (int i = 0; i < L::PASSES; ++i) grad_weights_[i] = weights_[i] * (grad_weights_[i] - mean);
    }
    if (!exists_) return;
    *reinterpret_cast<Pack<S, L::PASSES>*>(p_.grad_weights + first_) = narrow<S>(grad_weights_);
    *reinterpret_cast<Pack<S, 2 * L::PASSES>*>(p_.grad_positions + 2 * first_) = narrow<S>(grad_positions_);
  }

 private:
  const Sampling<A, S>& p_;
  int64_t first_;
  bool exists_;
  int level_;
  Frame<A> frame_;
  A positions_[2 * L::PASSES], grad_positions_[2 * L::PASSES];
  A weights_[L::PASSES], grad_weights_[L::PASSES];
};

// The same for any number of samples, which stay in memory, in the type that is computed in.
template <class L, class A>
class AnySamples {
 public:
  __device__ __forceinline__ AnySamples(const Row<L>& row, const Sampling<A>& p, const Levels& levels, const Sizes& z)
      : p_(p), levels_(levels), points_(L::points(z)) {
    const int samples = L::samples(z);
    passes_ = (samples + L::LANES - 1) / L::LANES;
    taken_ = static_cast<unsigned>(samples) / static_cast<unsigned>(passes_);
    more_ = samples - taken_ * passes_;
    at_ = L::slot(row.lane) * passes_;
    count_ = row.exists ? min(samples - at_, passes_) : 0;
    first_ = row.index * samples + at_;
    first_level_ = row.query * z.levels;
    if (!p.reference) return;
    A sum = 0;
    largest_ = -INFINITY;
    for (int i = 0; i < count_; ++i) largest_ = fmax(largest_, p.weights[first_ + i]);
    largest_ = largest_of_row<L::LANES>(largest_);
    for (int i = 0; i < count_; ++i) sum += exp(p.weights[first_ + i] - largest_);
    share_ = reciprocal(sum_of_row<L::LANES>(sum));
  }

  __device__ __forceinline__ int passes() const { return passes_; }
  __device__ __forceinline__ int taken(int pass) const { return taken_ + (pass < more_ ? 1 : 0); }
  __device__ __forceinline__ A weight(int pass) const {
    if (pass >= count_) return 0;
    const A given = p_.weights[first_ + pass];
    return p_.reference ? exp(given - largest_) * share_ : given;
  }
  __device__ __forceinline__ Frame<A> frame(int pass) const {
    const int level = pass < count_ ? static_cast<unsigned>(at_ + pass) / static_cast<unsigned>(points_) : 0;
    return {p_, levels_, first_level_ + level, level, points_};
  }
  __device__ __forceinline__ Sample<A> sample(int pass, uint32_t pitch) const {
    const bool exists = pass < count_;
    const A* const position = p_.positions + 2 * (exists ? first_ + pass : 0);
    return {frame(pass), exists, position[0], position[1], pitch};
  }

  __device__ __forceinline__ void keep(int pass, A grad_weight, A grad_x, A grad_y) {
    if (pass >= count_) return;
    mean_ += weight(pass) * grad_weight;
    p_.grad_weights[first_ + pass] = grad_weight;
    p_.grad_positions[2 * (first_ + pass)] = grad_x;
    p_.grad_positions[2 * (first_ + pass) + 1] = grad_y;
  }
  __device__ __forceinline__ void write() {
    if (!p_.reference) return;
    mean_ = sum_of_row<L::LANES>(mean_);
    for (int i = 0; i < count_; ++i) {
      A& grad_weight = p_.grad_weights[first_ + i];
      grad_weight = weight(i) * (grad_weight - mean_);
    }
  }

 private:
  const Sampling<A>& p_;
  const Levels& levels_;
  int points_, passes_;
  int taken_, more_;   // slots of a pass, of how many passes one more
  int at_, count_;  // of this lane: the first sample in the row, how many
  int64_t first_, first_level_;
  A largest_, share_;  // weight = exp(logit - largest) * share
  A mean_ = 0;         // of the gradients of the row's weights
};

template <class L, class A, class S>
using Samples = std::conditional_t<(L::SAMPLES > 0), KnownSamples<L, A, S>, AnySamples<L, A>>;

// What the lanes of a row tell each other in a pass. The padding keeps rows of a warp in banks of their own.
template <class L, class A>
struct Staged {
  Pack<A, 4> share[L::LANES];  // bilinear share times weight
  Pack<uint32_t, 4> offset[L::LANES];
  Pack<uint32_t, 4> padding;

  // Stages one sample of each lane and returns, bit by lane, which of the row lie inside. If any does, those outside,
  // which count nothing, are read where one inside is: nobody need ask, and a token that the row does not see counts
  // nowhere.
  __device__ __forceinline__ unsigned put(int lane, Sample<A> s, A weight) {
    constexpr unsigned kRow = L::LANES == 32 ? kAllLanes : (1u << L::LANES) - 1;
    const int first = static_cast<int>(threadIdx.x) % 32 - lane;
    const unsigned inside = __ballot_sync(kAllLanes, s.inside) >> first & kRow;
    const uint32_t seen = __shfl_sync(kAllLanes, s.offset.x[0], first + lowest_bit(inside), 32);
    if (!s.inside && inside != 0) s.offset = {seen, seen, seen, seen};
    const A top = weight * s.top, bottom = weight * s.bottom;
    const int slot = L::slot(lane);
    __syncwarp();  // what was staged before has been read
    share[slot] = {top * s.left, top * s.right, bottom * s.left, bottom * s.right};
    offset[slot] = s.offset;
    __syncwarp();
    return inside;
  }
};

}  // namespace dino_d2::cuda
