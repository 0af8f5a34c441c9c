// What one call of multi-scale deformable attention works on: plain sizes and pointers.
#pragma once

#include <cstdint>

namespace dino_d2 {

// One feature level of the value tensor, on the host.
struct Level {
  int64_t height;
  int64_t width;
  int64_t start;  // index of its first token
};

struct Sizes {
  int64_t batch;
  int64_t tokens;    // S, over all levels
  int64_t heads;
  int64_t channels;  // per head
  int64_t queries;
  int64_t levels;
  int64_t points;    // per level

  constexpr int64_t samples() const { return levels * points; }  // per query and head
};

// Where each query looks and how much each sample counts; A is what is computed in, S what positions, weights and their
// gradients are stored in.
//   positions (B, Q, H, L, P, 2), weights (B, Q, H, L, P)
// Without `reference`, positions are locations in [0, 1] and weights are used as they are. With it, positions are
// offsets from it, in pixels of the level from a point (reference_size 2), in half sides / P of a box (4); and weights
// are logits, over whose L * P a softmax is taken.
// Gradients have the layout of what they are the gradient of and are written whole; null where nobody asked for them.
template <class A, class S = A>
struct Sampling {
  const S* positions;
  const S* weights;
  const A* reference;  // (B, Q, L, reference_size) or null
  int64_t reference_size;
  S* grad_positions;
  S* grad_weights;
};

// V stores the values (and the output), A is what is computed and accumulated in.
//   value (B, S, H, C), output (B, Q, H * C)
template <class V, class A, class S = A>
struct Forward {
  Sizes sizes;
  Sampling<A, S> sampling;
  const V* value;
  V* output;
};

template <class V, class A, class S = A>
struct Backward {
  Sizes sizes;
  Sampling<A, S> sampling;
  const V* value;
  const V* grad_output;
  A* grad_value;  // null: not wanted
};

}  // namespace dino_d2
