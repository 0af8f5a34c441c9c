// What the host decides before a launch: layout, tiles, number of blocks.
#pragma once

#include <cstdint>
#include <vector>

#include "backward.cuh"
#include "forward.cuh"

namespace dino_d2::cuda {

constexpr int kFewThreads = 64;  // of a block where there are few queries
static_assert(kMostThreads % kFewThreads == 0);

using AnyLayout = Layout<1, 32, false>;  // for rows of any length, beginning anywhere

inline Levels plan_levels(const std::vector<Level>& levels, int64_t points) {
  Levels result{};
  result.per_point = 1.0f / static_cast<float>(points);
  for (size_t i = 0; i < levels.size(); ++i) {
    result.height[i] = static_cast<int>(levels[i].height);
    result.width[i] = static_cast<int>(levels[i].width);
    result.start[i] = static_cast<int>(levels[i].start);
  }
  return result;
}

// How the kernels for rows of a layout are launched.
struct Launch {
  Tiles tiles;
  int threads;         // of a block
  size_t shared_bytes;
};

// As many queries as tokens: an encoder, whose queries lie as the tokens do. (If they do not, only time is lost.)
inline Tiles plan_tiles(const std::vector<Level>& levels, int rows) {
  Tiles tiles{};
  tiles.rows = rows;
  tiles.height = rows / kTileWidth;
  tiles.levels = static_cast<int>(levels.size());
  for (size_t i = 0; i < levels.size(); ++i) {
    const int64_t across = (levels[i].width + kTileWidth - 1) / kTileWidth;
    const int64_t count = across * ((levels[i].height + tiles.height - 1) / tiles.height);
    if (count >= kMostTiles) return {};
    tiles.first[i] = tiles.count;
    tiles.across[i] = static_cast<float>(across);
    tiles.per_tile[i] = 1 / tiles.across[i];
    tiles.count += static_cast<int>(count);
  }
  return tiles;
}

// In an encoder, large blocks read once what their rows share. Otherwise queries are few, and small blocks spread over
// all multiprocessors.
template <class L, class A>
Launch plan_launch(const std::vector<Level>& levels, const Sizes& sizes) {
  Launch launch{};
  launch.threads = kMostThreads;
  if (sizes.queries == sizes.tokens) launch.tiles = plan_tiles(levels, launch.threads / L::LANES);
  if (launch.tiles.levels == 0) {
    launch.threads = kFewThreads;
    launch.tiles.rows = launch.threads / L::LANES;
    launch.tiles.count = static_cast<int>((sizes.queries + launch.tiles.rows - 1) / launch.tiles.rows);
  }
  launch.shared_bytes = launch.tiles.rows * sizeof(Staged<L, A>);
  return launch;
}

// Of DINO: 32 channels, 4 levels of 4 points.
template <class V>
using KnownLayout = Layout<16 / sizeof(V), 2 * sizeof(V), true, 4, 4>;

// `aligned`: every row of channels, positions and weights begins at a multiple of 16 bytes, if there are multiples of 16
// bytes of them.
inline bool is_known(const Sizes& sizes, bool aligned) {
  return aligned && sizes.channels == 32 && sizes.levels == 4 && sizes.points == 4;
}

// Calls f with the layout for such rows.
template <class V, class F>
void with_layout(const Sizes& sizes, bool aligned, const F& f) {
  if constexpr (sizeof(V) <= 4) {
    constexpr int VEC = 16 / sizeof(V);
    if (is_known(sizes, aligned)) return f(KnownLayout<V>{});
    if (aligned && sizes.channels == 4 * VEC) return f(Layout<VEC, 4, true>{});
    if (aligned && sizes.channels == 8 * VEC) return f(Layout<VEC, 8, true>{});
    if (aligned && sizes.channels == 16 * VEC) return f(Layout<VEC, 16, true>{});
  }
  f(AnyLayout{});
}

}  // namespace dino_d2::cuda
