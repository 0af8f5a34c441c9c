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

// V stores the values (and the output), A is what is computed and accumulated in.
//   value (B, S, H, C), locations (B, Q, H, L, P, 2), weights (B, Q, H, L, P), output (B, Q, H * C)
template <class V, class A>
struct Forward {
  Sizes sizes;
  const V* value;
  const A* locations;
  const A* weights;
  V* output;
};

// Gradients have the layout of what they are the gradient of. A null pointer is a gradient that nobody
// asked for; grad_value arrives filled with zeros, the other two are written whole.
template <class V, class A>
struct Backward {
  Sizes sizes;
  const V* value;
  const A* locations;
  const A* weights;
  const V* grad_output;
  A* grad_value;
  A* grad_locations;
  A* grad_weights;
};

}  // namespace dino_d2
