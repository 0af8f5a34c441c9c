// What the host decides before a launch: layout, tiles, number of blocks.
#pragma once

#include <cstdint>
#include <vector>

#include "backward.cuh"
#include "forward.cuh"

namespace dino_d2::cuda {

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

// As many queries as tokens: an encoder, whose queries lie as the tokens do. (If they do not, only time is lost.)
inline Tiles plan_tiles(const std::vector<Level>& levels, const Sizes& sizes, int rows) {
  Tiles tiles{};
  if (sizes.queries != sizes.tokens) {
    tiles.count = static_cast<int>((sizes.queries + rows - 1) / rows);
    return tiles;
  }
  const int64_t tile_height = rows / kTileWidth;
  tiles.levels = static_cast<int>(levels.size());
  for (size_t i = 0; i < levels.size(); ++i) {
    tiles.first[i] = tiles.count;
    tiles.across[i] = static_cast<int>((levels[i].width + kTileWidth - 1) / kTileWidth);
    tiles.count += tiles.across[i] * static_cast<int>((levels[i].height + tile_height - 1) / tile_height);
  }
  return tiles;
}

inline int64_t plan_blocks(const Tiles& tiles, const Sizes& sizes) { return sizes.batch * sizes.heads * tiles.count; }

// Calls f with the layout for rows of so many channels. `aligned`: every row of channels begins at a multiple of 16 bytes.
template <class V, class F>
void with_layout(int64_t channels, bool aligned, const F& f) {
  if constexpr (sizeof(V) <= 4) {
    constexpr int VEC = 16 / sizeof(V);
    if (aligned && channels == 4 * VEC) return f(Layout<VEC, 4, true>{});
    if (aligned && channels == 8 * VEC) return f(Layout<VEC, 8, true>{});
    if (aligned && channels == 16 * VEC) return f(Layout<VEC, 16, true>{});
  }
  f(Layout<1, 32, false>{});
}

}  // namespace dino_d2::cuda
