// Where the samples of one query and head lie and how much each counts. Included inside kernel_body.h's anonymous
// namespace, once per instruction set.

// The next rows of one head lie too far apart for the processor to foresee them, so they are asked for so many queries
// ahead.
constexpr int64_t kRowsAhead = 4;

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
      scale_x[i] = sampling.reference ? A(1) : levels.width[i];
      scale_y[i] = sampling.reference ? A(1) : levels.height[i];
    }
  }

  // `query` counts through the whole batch. To be called before `place` for one of its heads.
  DINO_D2_INLINE void begin_query(int64_t query) {
    if (!sampling.reference) return;
    const int64_t size = sampling.reference_size, points = sizes.points;
    for (int64_t level = 0; level < sizes.levels; ++level) {
      const A* reference = sampling.reference + (query * sizes.levels + level) * size;
      const int64_t first = level * points;
      const A w = levels.width[first], h = levels.height[first];
      repeat(reference[0] * w - A(0.5), points, origin_x + first);
      repeat(reference[1] * h - A(0.5), points, origin_y + first);
      if (size == 2) continue;  // offsets are in pixels, otherwise fractions of the box's half size
      repeat(reference[2] * w * A(0.5) / points, points, scale_x + first);
      repeat(reference[3] * h * A(0.5) / points, points, scale_y + first);
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
      if (there >= width) {
        const A* from = positions + 2 * first;
        const Pairs<A> xy = unzip<A>(load<A>(from), load<A>(from + width));
        put(first, xy.first, xy.second, load<A>(weights + first));
        continue;
      }
      alignas(64) A across[width], down[width], given[width];
      for (int i = 0; i < width; ++i) {
        across[i] = i < there ? positions[2 * (first + i)] : A(0);
        down[i] = i < there ? positions[2 * (first + i) + 1] : A(0);
        given[i] = i < there ? weights[first + i] : absent;
      }
      put(first, load<A>(across), load<A>(down), load<A>(given));
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
      const Vector<A> given = load<A>(grad_weight + first);
      const Vector<A> of_weight = sampling.reference ? load<A>(weight + first) * (given - mean) : given;
      const Vector<A> across = load<A>(scale_x + first) * load<A>(grad_x + first);
      const Vector<A> down = load<A>(scale_y + first) * load<A>(grad_y + first);
      const int64_t left = samples - first;
      if (left >= width && !accumulate) {
        const Pairs<A> xy = zip<A>(across, down);
        store<A>(to_positions + 2 * first, xy.first);
        store<A>(to_positions + 2 * first + width, xy.second);
        store<A>(to_weights + first, of_weight);
        continue;
      }
      const int count = left < width ? static_cast<int>(left) : width;
      for (int i = 0; i < count; ++i) {
        A* position = to_positions + 2 * (first + i);
        position[0] = across[i] + (accumulate ? position[0] : A(0));
        position[1] = down[i] + (accumulate ? position[1] : A(0));
        to_weights[first + i] = of_weight[i] + (accumulate ? to_weights[first + i] : A(0));
      }
    }
  }

 private:
  // Four at a time: that is how many points a level has nearly everywhere.
  static DINO_D2_INLINE void repeat(A number, int64_t times, A* to) {
    typedef A Four __attribute__((vector_size(4 * sizeof(A)), aligned(sizeof(A)), may_alias));
    int64_t i = 0;
    for (; i + 4 <= times; i += 4) *reinterpret_cast<Four*>(to + i) = Four{number, number, number, number};
    for (; i < times; ++i) to[i] = number;
  }
  DINO_D2_INLINE void put(int64_t first, Vector<A> across, Vector<A> down, Vector<A> given) {
    store<A>(x + first, load<A>(origin_x + first) + load<A>(scale_x + first) * across);
    store<A>(y + first, load<A>(origin_y + first) + load<A>(scale_y + first) * down);
    store<A>(weight + first, given);
  }

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

// What gradients of a vector of samples need beside their corners.
template <class A>
struct Bilinear {
  Vector<A> left, right, top, bottom;  // shares of columns and rows, 0 of what lies outside
  Vector<A> column_slope[2];           // d left / dx, d right / dx: -1 or 0, 1 or 0
  Vector<A> row_slope[2];
};

// As many samples as a vector holds, ready to be gathered. Corners are numbered 0 = top left, 1 = top right,
// 2 = bottom left, 3 = bottom right.
template <class A>
struct Corners {
  static constexpr int width = VectorOf<A>::width;
  typedef Index<A> Indices __attribute__((vector_size(DINO_D2_VECTOR_BYTES)));

  alignas(64) A share[4][width];  // bilinear share times weight
  alignas(64) Index<A> offset[4][width];  // of the corner's token, in numbers
  alignas(64) Index<A> inside[width];  // 0: no corner of the sample lies in the level

  // Of the samples from `first` on that `row` has placed; tokens are `stride` numbers apart.
  DINO_D2_INLINE Bilinear<A> find(const Row<A>& row, int64_t first, Index<A> stride) {
    const SampleLevels<A>& levels = row.levels;
    const Vector<A> zero{}, one = zero + A(1), w = load<A>(levels.width + first), h = load<A>(levels.height + first);
    const Vector<A> weight = load<A>(row.weight + first);
    Vector<A> x = load<A>(row.x + first), y = load<A>(row.y + first);
    // False for NaN too, so that what follows is finite and the conversion to integers defined.
    const Indices is_inside = (x > -one) & (y > -one) & (x < w) & (y < h);
    x = is_inside ? x : zero;
    y = is_inside ? y : zero;
    const Indices column = floor_of(x), line = floor_of(y);
    const Vector<A> x0 = __builtin_convertvector(column, Vector<A>), y0 = __builtin_convertvector(line, Vector<A>);
    const Indices has_left = column >= 0, has_right = x0 + one < w, has_top = line >= 0, has_bottom = y0 + one < h;
    Bilinear<A> result;
    result.left = has_left ? one - (x - x0) : zero;
    result.right = has_right ? x - x0 : zero;
    result.top = has_top ? one - (y - y0) : zero;
    result.bottom = has_bottom ? y - y0 : zero;
    result.column_slope[0] = has_left ? -one : zero;
    result.column_slope[1] = has_right ? one : zero;
    result.row_slope[0] = has_top ? -one : zero;
    result.row_slope[1] = has_bottom ? one : zero;
    const Vector<A> upper = weight * result.top, lower = weight * result.bottom;
    store<A>(share[0], upper * result.left);
    store<A>(share[1], upper * result.right);
    store<A>(share[2], lower * result.left);
    store<A>(share[3], lower * result.right);
    // A corner outside has share 0 and is read at its neighbour inside, which is read anyway. What is true is -1.
    const Indices columns = load_indices(levels.columns + first) * stride;
    const Indices to_right = has_left & has_right & stride, to_bottom = has_top & has_bottom & columns;
    const Indices first_of_line = load_indices(levels.start + first) * stride + (line & has_top) * columns;
    const Indices top_left = first_of_line + (column & has_left) * stride;
    store_indices(offset[0], top_left);
    store_indices(offset[1], top_left + to_right);
    store_indices(offset[2], top_left + to_bottom);
    store_indices(offset[3], top_left + to_bottom + to_right);
    store_indices(inside, is_inside);
    return result;
  }

 private:
  typedef Index<A> Unaligned __attribute__((vector_size(DINO_D2_VECTOR_BYTES), aligned(sizeof(A)), may_alias));

  static DINO_D2_INLINE Indices load_indices(const Index<A>* from) {
    return *reinterpret_cast<const Unaligned*>(from);
  }
  static DINO_D2_INLINE void store_indices(Index<A>* to, Indices x) { *reinterpret_cast<Unaligned*>(to) = x; }
  static DINO_D2_INLINE Indices floor_of(Vector<A> x) {
    const Indices towards_zero = __builtin_convertvector(x, Indices);
    return towards_zero + (__builtin_convertvector(towards_zero, Vector<A>) > x);
  }
};

// The samples of a part's queries and heads in turn, a vector of them at a time.
template <class A>
class Walk {
 public:
  Walk(Row<A>& row, const Part& part, Index<A> stride)
      : row_(row), part_(part), query_(part.begin), head_(part.first_head), stride_(stride) {}

  // Fills `corners` with the next samples, if there are any.
  DINO_D2_INLINE void next(Corners<A>& corners) {
    if (query_ == part_.end) return;
    const int64_t heads = row_.sizes.heads;
    if (first_ == 0) {
      if (head_ == part_.first_head) row_.begin_query(query_);
      if (part_.end_head - part_.first_head == 1) row_.prefetch((query_ + kRowsAhead) * heads + head_);
      row_.place(query_ * heads + head_);
    }
    corners.find(row_, first_, stride_);
    first_ += Corners<A>::width;
    if (first_ < row_.sizes.samples()) return;
    first_ = 0;
    if (++head_ < part_.end_head) return;
    head_ = part_.first_head;
    ++query_;
  }

 private:
  Row<A>& row_;
  const Part part_;
  int64_t query_, head_;
  int64_t first_ = 0;  // sample
  Index<A> stride_;
};
