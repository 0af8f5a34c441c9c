// Where the samples of one query and head lie and how much each counts. Included inside kernel_body.h's anonymous
// namespace, once per instruction set.

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
      alignas(64) A across[width], down[width], given[width];
      if (there >= width) {
        for (int i = 0; i < width; ++i) {
          across[i] = positions[2 * (first + i)];
          down[i] = positions[2 * (first + i) + 1];
          given[i] = weights[first + i];
        }
      } else {
        for (int i = 0; i < width; ++i) {
          across[i] = i < there ? positions[2 * (first + i)] : A(0);
          down[i] = i < there ? positions[2 * (first + i) + 1] : A(0);
          given[i] = i < there ? weights[first + i] : absent;
        }
      }
      store<A>(x + first, load<A>(origin_x + first) + load<A>(scale_x + first) * load<A>(across));
      store<A>(y + first, load<A>(origin_y + first) + load<A>(scale_y + first) * load<A>(down));
      store<A>(weight + first, load<A>(given));
    }
    if (sampling.reference) softmax();
  }

  DINO_D2_INLINE void prefetch(int64_t row) const {
    constexpr int64_t line = 64 / sizeof(A);
    const int64_t samples = sizes.samples();
    for (int64_t i = 0; i < 2 * samples; i += line) {
      __builtin_prefetch(sampling.positions + 2 * row * samples + i);
      if (sampling.grad_weights) __builtin_prefetch(sampling.grad_positions + 2 * row * samples + i, 1);
    }
    for (int64_t i = 0; i < samples; i += line) {
      __builtin_prefetch(sampling.weights + row * samples + i);
      if (sampling.grad_weights) __builtin_prefetch(sampling.grad_weights + row * samples + i, 1);
    }
  }

  // Turns the gradients of x, y and weight into those of positions and weights (or their logits).
  DINO_D2_INLINE void give_gradients(int64_t row, bool accumulate) {
    constexpr int width = VectorOf<A>::width;
    const int64_t samples = sizes.samples();
    A* to_positions = sampling.grad_positions + 2 * row * samples;
    A* to_weights = sampling.grad_weights + row * samples;
    A mean = A(0);
    if (sampling.reference) {
      Vector<A> sum{};
      for (int64_t first = 0; first < samples; first += width) {
        sum += load<A>(weight + first) * load<A>(grad_weight + first);
      }
      mean = sum_of_lanes<A>(sum);
    }
    for (int64_t first = 0; first < samples; first += width) {
      alignas(64) A across[width], down[width], of_weight[width];
      const Vector<A> given = load<A>(grad_weight + first);
      store<A>(of_weight, sampling.reference ? load<A>(weight + first) * (given - mean) : given);
      store<A>(across, load<A>(scale_x + first) * load<A>(grad_x + first));
      store<A>(down, load<A>(scale_y + first) * load<A>(grad_y + first));
      const int64_t left = samples - first;
      const int count = left < width ? static_cast<int>(left) : width;
      if (count == width && !accumulate) {
        for (int i = 0; i < width; ++i) {
          to_positions[2 * (first + i)] = across[i];
          to_positions[2 * (first + i) + 1] = down[i];
          to_weights[first + i] = of_weight[i];
        }
        continue;
      }
      for (int i = 0; i < count; ++i) {
        A* position = to_positions + 2 * (first + i);
        position[0] = across[i] + (accumulate ? position[0] : A(0));
        position[1] = down[i] + (accumulate ? position[1] : A(0));
        to_weights[first + i] = of_weight[i] + (accumulate ? to_weights[first + i] : A(0));
      }
    }
  }

 private:
  DINO_D2_INLINE void softmax() {
    constexpr int width = VectorOf<A>::width;
    Vector<A> largest = load<A>(weight);
    for (int64_t first = width; first < sizes.samples(); first += width) {
      const Vector<A> next = load<A>(weight + first);
      largest = next > largest ? next : largest;
    }
    const A most = largest_lane<A>(largest);
    Vector<A> sum{};
    for (int64_t first = 0; first < sizes.samples(); first += width) {
      const Vector<A> power = exp_of_nonpositive<A>(load<A>(weight + first) - most);
      store<A>(weight + first, power);
      sum += power;
    }
    const A share = A(1) / sum_of_lanes<A>(sum);
    for (int64_t first = 0; first < sizes.samples(); first += width) {
      store<A>(weight + first, load<A>(weight + first) * share);
    }
  }
};

// As many samples as a vector holds, ready to be gathered. Corners are numbered 0 = top left, 1 = top right,
// 2 = bottom left, 3 = bottom right.
template <class A>
struct Corners {  // plain arithmetic on arrays of constant length, which compilers turn into vector code
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

  // Of the samples from `first` on that `row` has placed.
  DINO_D2_INLINE void find(const Row<A>& row, int64_t first) {
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

// The samples of queries [begin, end) and all their heads in turn, a vector of them at a time.
template <class A>
class Walk {
 public:
  Walk(Row<A>& row, int64_t begin, int64_t end)
      : row_(row), index_(begin * row.sizes.heads), end_(end * row.sizes.heads) {}

  // Fills `corners` with the next samples, if there are any.
  DINO_D2_INLINE void next(Corners<A>& corners) {
    if (index_ == end_) return;
    if (first_ == 0) {
      if (index_ % row_.sizes.heads == 0) row_.begin_query(index_ / row_.sizes.heads);
      row_.place(index_);
    }
    corners.find(row_, first_);
    first_ += Corners<A>::width;
    if (first_ < row_.sizes.samples()) return;
    first_ = 0;
    ++index_;
  }

 private:
  Row<A>& row_;
  int64_t index_, end_;  // through queries and heads
  int64_t first_ = 0;    // sample
};
