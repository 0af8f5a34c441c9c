// Where the samples of one query and head lie and how much each counts. Included inside kernel_body.h's anonymous
// namespace, once per instruction set. All of it is plain arithmetic on arrays of constant length, which compilers
// turn into vector code.

// The samples of one query and head, `padded` of each; what is behind the last sample has weight 0 and lies outside.
// In pixels, x = origin_x + scale_x * position, where a position is a location or an offset.
template <class A>
struct Row {
  const Sizes& sizes;
  const Sampling<A>& sampling;
  const SampleLevels<A>& levels;
  A *origin_x, *origin_y, *scale_x, *scale_y;  // of the query
  A *x, *y, *weight;
  A *grad_x, *grad_y, *grad_weight;  // in pixels

  // `memory`: kScratchArrays * padded numbers.
  Row(const Sizes& sizes, const Sampling<A>& sampling, const SampleLevels<A>& levels, A* memory)
      : sizes(sizes), sampling(sampling), levels(levels) {
    A** const arrays[kScratchArrays] = {&origin_x, &origin_y, &scale_x, &scale_y, &x,
                                        &y,        &weight,   &grad_x,  &grad_y,  &grad_weight};
    for (int i = 0; i < kScratchArrays; ++i) *arrays[i] = memory + i * levels.padded;
    for (int64_t i = 0; i < levels.padded; ++i) {
      // Locations are fractions of the level; the middle of the first pixel is 0.
      origin_x[i] = origin_y[i] = i < sizes.samples() ? A(-0.5) : A(-2);
      scale_x[i] = levels.width[i];
      scale_y[i] = levels.height[i];
    }
  }

  // `query` counts through the whole batch. To be called before `place` for one of its heads.
  DINO_D2_INLINE void begin_query(int64_t query) {
    if (!sampling.reference) return;
    const int64_t size = sampling.reference_size, points = sizes.points;
    for (int64_t level = 0; level < sizes.levels; ++level) {
      const A* reference = sampling.reference + (query * sizes.levels + level) * size;
      const A w = levels.width[level * points], h = levels.height[level * points];
      const bool box = size == 4;  // offsets are then fractions of its half size, otherwise pixels
      const A along_x = box ? reference[2] * w * A(0.5) / points : A(1);
      const A along_y = box ? reference[3] * h * A(0.5) / points : A(1);
      for (int64_t i = level * points; i < (level + 1) * points; ++i) {
        origin_x[i] = reference[0] * w - A(0.5);
        origin_y[i] = reference[1] * h - A(0.5);
        scale_x[i] = along_x;
        scale_y[i] = along_y;
      }
    }
  }

  // Fills x, y and weight. `row` counts through queries and heads.
  DINO_D2_INLINE void place(int64_t row) {
    constexpr int width = VectorOf<A>::width;
    const int64_t samples = sizes.samples();
    const A* positions = sampling.positions + 2 * row * samples;
    const A* weights = sampling.weights + row * samples;
    const A absent = sampling.reference ? -__builtin_inf() : A(0);
    for (int64_t first = 0; first < samples; first += width) {
      const int64_t there = samples - first;
      alignas(64) A across[width], down[width];
      if (there >= width) {
        for (int i = 0; i < width; ++i) {
          across[i] = positions[2 * (first + i)];
          down[i] = positions[2 * (first + i) + 1];
          weight[first + i] = weights[first + i];
        }
      } else {
        for (int i = 0; i < width; ++i) {
          across[i] = i < there ? positions[2 * (first + i)] : A(0);
          down[i] = i < there ? positions[2 * (first + i) + 1] : A(0);
          weight[first + i] = i < there ? weights[first + i] : absent;
        }
      }
      for (int i = 0; i < width; ++i) {
        x[first + i] = origin_x[first + i] + scale_x[first + i] * across[i];
        y[first + i] = origin_y[first + i] + scale_y[first + i] * down[i];
      }
    }
    if (sampling.reference) softmax();
  }

  // Turns the gradients of x, y and weight into those of positions and weights (or their logits).
  DINO_D2_INLINE void give_gradients(int64_t row, bool accumulate) {
    const int64_t samples = sizes.samples();
    A* to_positions = sampling.grad_positions + 2 * row * samples;
    A* to_weights = sampling.grad_weights + row * samples;
    A mean = A(0);
    if (sampling.reference) {
      for (int64_t i = 0; i < samples; ++i) mean += weight[i] * grad_weight[i];
    }
    for (int64_t i = 0; i < samples; ++i) {
      const A of_weight = sampling.reference ? weight[i] * (grad_weight[i] - mean) : grad_weight[i];
      to_weights[i] = of_weight + (accumulate ? to_weights[i] : A(0));
      to_positions[2 * i] = scale_x[i] * grad_x[i] + (accumulate ? to_positions[2 * i] : A(0));
      to_positions[2 * i + 1] = scale_y[i] * grad_y[i] + (accumulate ? to_positions[2 * i + 1] : A(0));
    }
  }

 private:
  DINO_D2_INLINE void softmax() {
    constexpr int width = VectorOf<A>::width;
    alignas(64) A lanes[width];
    for (int i = 0; i < width; ++i) lanes[i] = weight[i];
    for (int64_t first = width; first < sizes.samples(); first += width) {
      for (int i = 0; i < width; ++i) lanes[i] = weight[first + i] > lanes[i] ? weight[first + i] : lanes[i];
    }
    for (int half = width / 2; half > 0; half /= 2) {
      for (int i = 0; i < half; ++i) lanes[i] = lanes[i + half] > lanes[i] ? lanes[i + half] : lanes[i];
    }
    const A largest = lanes[0];
    for (int i = 0; i < width; ++i) lanes[i] = A(0);
    for (int64_t first = 0; first < sizes.samples(); first += width) {
      for (int i = 0; i < width; ++i) {
        weight[first + i] = exp_of_nonpositive(weight[first + i] - largest);
        lanes[i] += weight[first + i];
      }
    }
    for (int half = width / 2; half > 0; half /= 2) {
      for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    }
    const A share = A(1) / lanes[0];
    for (int64_t first = 0; first < sizes.samples(); first += width) {
      for (int i = 0; i < width; ++i) weight[first + i] *= share;
    }
  }
};

// As many samples as a vector holds, ready to be gathered. Corners are numbered 0 = top left, 1 = top right,
// 2 = bottom left, 3 = bottom right.
template <class A>
struct Corners {
  static constexpr int width = VectorOf<A>::width;
  alignas(64) A right[width];  // bilinear share of the right column, 0 where it lies outside
  alignas(64) A left[width];
  alignas(64) A bottom[width];
  alignas(64) A top[width];
  alignas(64) A column_slope[2][width];  // d left / dx, d right / dx: -1 or 0, 1 or 0
  alignas(64) A row_slope[2][width];
  alignas(64) A share[4][width];  // bilinear share times weight
  alignas(64) int32_t token[4][width];
  alignas(64) int32_t inside[width];  // 0: no corner of the sample lies in the level

  DINO_D2_INLINE Corners(const Row<A>& row, int64_t first) {
    const A* const level_width = row.levels.width + first;
    const A* const level_height = row.levels.height + first;
    const int32_t* const columns = row.levels.columns + first;
    const int32_t* const start = row.levels.start + first;
    for (int i = 0; i < width; ++i) {
      const A w = level_width[i], h = level_height[i], weight = row.weight[first + i];
      A x = row.x[first + i], y = row.y[first + i];
      // False for NaN too, so that what follows is finite and the conversion to integers defined.
      const bool is_inside = (x > A(-1)) & (y > A(-1)) & (x < w) & (y < h);
      x = is_inside ? x : A(0);
      y = is_inside ? y : A(0);
      const A x0 = sizeof(A) == 4 ? A(__builtin_floorf(x)) : A(__builtin_floor(x));
      const A y0 = sizeof(A) == 4 ? A(__builtin_floorf(y)) : A(__builtin_floor(y));
      const A has_left = x0 >= A(0) ? A(1) : A(0), has_right = x0 + A(1) < w ? A(1) : A(0);
      const A has_top = y0 >= A(0) ? A(1) : A(0), has_bottom = y0 + A(1) < h ? A(1) : A(0);
      left[i] = (A(1) - (x - x0)) * has_left;
      right[i] = (x - x0) * has_right;
      top[i] = (A(1) - (y - y0)) * has_top;
      bottom[i] = (y - y0) * has_bottom;
      column_slope[0][i] = -has_left;
      column_slope[1][i] = has_right;
      row_slope[0][i] = -has_top;
      row_slope[1][i] = has_bottom;
      share[0][i] = weight * top[i] * left[i];
      share[1][i] = weight * top[i] * right[i];
      share[2][i] = weight * bottom[i] * left[i];
      share[3][i] = weight * bottom[i] * right[i];
      // A corner outside has share 0 and is read at its neighbour inside, which is read anyway.
      const int32_t x_low = static_cast<int32_t>(x0 * has_left), y_low = static_cast<int32_t>(y0 * has_top);
      const int32_t x_high = static_cast<int32_t>(x0 + has_right), y_high = static_cast<int32_t>(y0 + has_bottom);
      token[0][i] = start[i] + y_low * columns[i] + x_low;
      token[1][i] = start[i] + y_low * columns[i] + x_high;
      token[2][i] = start[i] + y_high * columns[i] + x_low;
      token[3][i] = start[i] + y_high * columns[i] + x_high;
      inside[i] = is_inside;
    }
  }
};
