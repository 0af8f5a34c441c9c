// From the operator's arguments to sizes: the checks that keep every kernel inside its memory.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <vector>

#include "problem.h"

namespace dino_d2 {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::vector<Level> levels_of(const std::vector<int64_t>& spatial_shapes) {
  STD_TORCH_CHECK(spatial_shapes.size() % 2 == 0, "spatial_shapes must be pairs of (height, width)");
  std::vector<Level> levels;
  int64_t start = 0;
  for (size_t i = 0; i < spatial_shapes.size(); i += 2) {
    const int64_t height = spatial_shapes[i], width = spatial_shapes[i + 1];
    STD_TORCH_CHECK(height > 0 && width > 0, "spatial_shapes: level ", i / 2, " is ", height, " x ", width,
                    ", both must be positive");
    levels.push_back({height, width, start});
    start += height * width;
  }
  return levels;
}

// `positions` and `weights` as in Sampling; `stored` is the type that they must have beside these values.
inline Sizes sizes_of(const Tensor& value, const std::vector<Level>& levels, const Tensor& positions,
                      const Tensor& weights, ScalarType stored) {
  STD_TORCH_CHECK(value.dim() == 4, "value must be (batch, tokens, heads, channels), but has ", value.dim(),
                  " dimensions");
  STD_TORCH_CHECK(positions.dim() == 6 && positions.size(5) == 2,
                  "sampling positions must be (batch, queries, heads, levels, points, 2)");
  STD_TORCH_CHECK(weights.dim() == 5, "attention weights must be (batch, queries, heads, levels, points)");
  const Sizes sizes{value.size(0),     value.size(1),     value.size(2),    value.size(3),
                    positions.size(1), positions.size(3), positions.size(4)};
  STD_TORCH_CHECK(positions.size(0) == sizes.batch && positions.size(2) == sizes.heads,
                  "sampling positions and value disagree in batch or heads");
  for (int64_t d = 0; d < 5; ++d) {
    STD_TORCH_CHECK(weights.size(d) == positions.size(d), "attention weights and sampling positions disagree in dimension ",
                    d, ": ", weights.size(d), " and ", positions.size(d));
  }
  STD_TORCH_CHECK(sizes.levels == static_cast<int64_t>(levels.size()), "sampling positions has ", sizes.levels,
                  " levels, spatial_shapes has ", levels.size());
  const int64_t tokens = levels.empty() ? 0 : levels.back().start + levels.back().height * levels.back().width;
  STD_TORCH_CHECK(tokens == sizes.tokens, "value has ", sizes.tokens, " tokens, spatial_shapes add up to ", tokens);
  STD_TORCH_CHECK(tokens < (int64_t(1) << 31), "more than 2^31 tokens");
  STD_TORCH_CHECK(positions.scalar_type() == stored && weights.scalar_type() == stored,
                  "sampling positions and attention weights must be ", toString(stored), " beside ",
                  toString(value.scalar_type()), " values");
  return sizes;
}

inline void check_reference(const Tensor& reference, const Sizes& sizes, ScalarType accumulate) {
  STD_TORCH_CHECK(reference.dim() == 4 && reference.size(0) == sizes.batch && reference.size(1) == sizes.queries &&
                      reference.size(2) == sizes.levels && (reference.size(3) == 2 || reference.size(3) == 4),
                  "reference must be (batch, queries, levels, 2 or 4)");
  STD_TORCH_CHECK(reference.scalar_type() == accumulate, "reference must be ", toString(accumulate));
}

inline void check_grad_output(const Tensor& grad_output, const Tensor& value, const Sizes& sizes) {
  STD_TORCH_CHECK(grad_output.dim() == 3 && grad_output.size(0) == sizes.batch &&
                      grad_output.size(1) == sizes.queries &&
                      grad_output.size(2) == sizes.heads * sizes.channels &&
                      grad_output.scalar_type() == value.scalar_type(),
                  "grad_output must be (batch, queries, heads * channels) and of value's dtype");
}

}  // namespace dino_d2
