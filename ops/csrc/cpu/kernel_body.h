// Forward and backward kernels, written once in GCC/Clang vector extensions and compiled once per
// instruction set: the including file defines DINO_D2_VECTOR_BYTES and DINO_D2_KERNELS and switches the
// compiler's target on. No standard header may be included here: its inline functions would be compiled for
// that target too, and the linker could keep them for everybody.

namespace dino_d2::cpu {
namespace {

#define DINO_D2_INLINE inline __attribute__((always_inline))

template <class A>
struct VectorOf {
  static constexpr int width = DINO_D2_VECTOR_BYTES / sizeof(A);
  typedef A Type __attribute__((vector_size(DINO_D2_VECTOR_BYTES)));
  typedef A Unaligned __attribute__((vector_size(DINO_D2_VECTOR_BYTES), aligned(sizeof(A)), may_alias));
};
template <class A>
using Vector = typename VectorOf<A>::Type;

// One row of channels, loaded as A whatever it is stored as.
template <class A>
DINO_D2_INLINE Vector<A> load(const A* from) {
  return *reinterpret_cast<const typename VectorOf<A>::Unaligned*>(from);
}
template <class A>
DINO_D2_INLINE Vector<A> load(const BFloat16* from) {
  typedef uint16_t Halves
      __attribute__((vector_size(DINO_D2_VECTOR_BYTES / 2), aligned(sizeof(uint16_t)), may_alias));
  typedef uint32_t Words __attribute__((vector_size(DINO_D2_VECTOR_BYTES)));
  const Halves halves = *reinterpret_cast<const Halves*>(from);
  return reinterpret_cast<Vector<float>>(__builtin_convertvector(halves, Words) << 16);
}
template <class A>
DINO_D2_INLINE void store(A* to, Vector<A> x) {
  *reinterpret_cast<typename VectorOf<A>::Unaligned*>(to) = x;
}

DINO_D2_INLINE float widen(float x) { return x; }
DINO_D2_INLINE double widen(double x) { return x; }
DINO_D2_INLINE float widen(BFloat16 x) {
  const uint32_t word = static_cast<uint32_t>(x.bits) << 16;
  float result;
  __builtin_memcpy(&result, &word, sizeof(result));
  return result;
}
DINO_D2_INLINE void narrow(float x, float* to) { *to = x; }
DINO_D2_INLINE void narrow(double x, double* to) { *to = x; }
DINO_D2_INLINE void narrow(float x, BFloat16* to) {  // to nearest, ties to even; NaN stays NaN
  uint32_t word;
  __builtin_memcpy(&word, &x, sizeof(word));
  to->bits = x != x ? 0x7fc0 : static_cast<uint16_t>((word + 0x7fff + ((word >> 16) & 1)) >> 16);
}

// Pairwise sums: the first half of the result holds a[0]+a[1], a[2]+a[3], …, the second half those of b.
// log2(width) rounds of it turn `width` vectors into the vector of their sums.
template <class A>
DINO_D2_INLINE Vector<A> add_pairs(Vector<A> a, Vector<A> b) {
  constexpr int width = VectorOf<A>::width;
#if defined(__clang__)
#define DINO_D2_PAIRS(...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
  typedef __typeof__(a < b) Mask;
#define DINO_D2_PAIRS(...) __builtin_shuffle(a, b, Mask{__VA_ARGS__})
#endif
  if constexpr (width == 2) {
    return DINO_D2_PAIRS(0, 2) + DINO_D2_PAIRS(1, 3);
  } else if constexpr (width == 4) {
    return DINO_D2_PAIRS(0, 2, 4, 6) + DINO_D2_PAIRS(1, 3, 5, 7);
  } else if constexpr (width == 8) {
    return DINO_D2_PAIRS(0, 2, 4, 6, 8, 10, 12, 14) + DINO_D2_PAIRS(1, 3, 5, 7, 9, 11, 13, 15);
  } else {
    static_assert(width == 16);
    return DINO_D2_PAIRS(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
           DINO_D2_PAIRS(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
  }
#undef DINO_D2_PAIRS
}

// sums[i] = the sum over the lanes of partial[i]; `partial` is used up.
template <class A>
DINO_D2_INLINE void sum_lanes(Vector<A>* partial, A* sums) {
  for (int rows = VectorOf<A>::width; rows > 1; rows /= 2) {
    for (int i = 0; i < rows / 2; ++i) partial[i] = add_pairs<A>(partial[2 * i], partial[2 * i + 1]);
  }
  store<A>(sums, partial[0]);
}

// As many samples of one query and head as a vector holds, ready to be gathered. Corners are numbered
// 0 = top left, 1 = top right, 2 = bottom left, 3 = bottom right.
template <class A>
struct Samples {
  static constexpr int width = VectorOf<A>::width;
  alignas(64) A attention[width];
  alignas(64) A right[width];       // bilinear share of the right column, 0 where it lies outside
  alignas(64) A left[width];
  alignas(64) A bottom[width];
  alignas(64) A top[width];
  alignas(64) A column_slope[2][width];  // d left / dx, d right / dx, in pixels: -1 or 0, 1 or 0
  alignas(64) A row_slope[2][width];
  alignas(64) int32_t token[4][width];
  alignas(64) int32_t inside[width];     // 0: no corner of the sample lies in the level
};

// `locations` and `attention` are the samples [first, first + count) of one query and head. All of it is
// plain arithmetic on arrays of constant length, which compilers turn into vector code.
template <class A>
DINO_D2_INLINE void locate(const A* locations, const A* attention, const SampleLevels<A>& levels, int64_t first,
                           int count, Samples<A>& s) {
  constexpr int width = VectorOf<A>::width;
  alignas(64) A xs[width], ys[width];
  if (count == width) {
    for (int i = 0; i < width; ++i) {
      xs[i] = locations[2 * i];
      ys[i] = locations[2 * i + 1];
      s.attention[i] = attention[i];
    }
  } else {
    for (int i = 0; i < width; ++i) {
      const bool there = i < count;
      xs[i] = there ? locations[2 * i] : A(-1);
      ys[i] = there ? locations[2 * i + 1] : A(-1);
      s.attention[i] = there ? attention[i] : A(0);
    }
  }
  const A* level_width = levels.width + first;
  const A* level_height = levels.height + first;
  const int32_t* columns = levels.columns + first;
  const int32_t* start = levels.start + first;
  for (int i = 0; i < width; ++i) {
    const A w = level_width[i], h = level_height[i];
    A x = xs[i] * w - A(0.5), y = ys[i] * h - A(0.5);
    // False for NaN too, so that what follows is finite and the conversion to integers defined.
    const bool inside = (x > A(-1)) & (y > A(-1)) & (x < w) & (y < h);
    x = inside ? x : A(0);
    y = inside ? y : A(0);
    const A x0 = sizeof(A) == 4 ? A(__builtin_floorf(x)) : A(__builtin_floor(x));
    const A y0 = sizeof(A) == 4 ? A(__builtin_floorf(y)) : A(__builtin_floor(y));
    const A has_left = x0 >= A(0) ? A(1) : A(0), has_right = x0 + A(1) < w ? A(1) : A(0);
    const A has_top = y0 >= A(0) ? A(1) : A(0), has_bottom = y0 + A(1) < h ? A(1) : A(0);
    s.left[i] = (A(1) - (x - x0)) * has_left;
    s.right[i] = (x - x0) * has_right;
    s.top[i] = (A(1) - (y - y0)) * has_top;
    s.bottom[i] = (y - y0) * has_bottom;
    s.column_slope[0][i] = -has_left * w;
    s.column_slope[1][i] = has_right * w;
    s.row_slope[0][i] = -has_top * h;
    s.row_slope[1][i] = has_bottom * h;
    // A corner outside has share 0 and is read at its neighbour inside, which is read anyway.
    const int32_t x_low = static_cast<int32_t>(x0 * has_left), y_low = static_cast<int32_t>(y0 * has_top);
    const int32_t x_high = static_cast<int32_t>(x0 + has_right), y_high = static_cast<int32_t>(y0 + has_bottom);
    s.token[0][i] = start[i] + y_low * columns[i] + x_low;
    s.token[1][i] = start[i] + y_low * columns[i] + x_high;
    s.token[2][i] = start[i] + y_high * columns[i] + x_low;
    s.token[3][i] = start[i] + y_high * columns[i] + x_high;
    s.inside[i] = inside;
  }
}

// Rows: how one head's channels are held. FixedRow<N> keeps them in N registers; a head size that is not
// such a multiple takes the plain loops of AnyRow.
template <class V, class A, int N>
struct FixedRow {
  static constexpr int width = VectorOf<A>::width;
  Vector<A> x[N];

  explicit FixedRow(int64_t) {
    for (int n = 0; n < N; ++n) x[n] = Vector<A>{};
  }
  DINO_D2_INLINE void read(const V* from) {
    for (int n = 0; n < N; ++n) x[n] = load<A>(from + n * width);
  }
  DINO_D2_INLINE void add(A share, const V* from) {
    for (int n = 0; n < N; ++n) x[n] += share * load<A>(from + n * width);
  }
  // partial products whose lanes sum to the dot product
  DINO_D2_INLINE Vector<A> dot(const V* other) const {
    Vector<A> sum = x[0] * load<A>(other);
    for (int n = 1; n < N; ++n) sum += x[n] * load<A>(other + n * width);
    return sum;
  }
  DINO_D2_INLINE void add_to(A share, A* to) const {
    for (int n = 0; n < N; ++n) store<A>(to + n * width, load<A>(to + n * width) + share * x[n]);
  }
  DINO_D2_INLINE void write(V* to) const {
    if constexpr (sizeof(V) == sizeof(A)) {
      for (int n = 0; n < N; ++n) store<A>(to + n * width, x[n]);
    } else {
      for (int n = 0; n < N; ++n) {
        for (int i = 0; i < width; ++i) narrow(x[n][i], to + n * width + i);
      }
    }
  }
};

template <class V, class A>
struct AnyRow {
  static constexpr int capacity = 256;  // channels worked on at once; more are taken in turns
  int64_t channels;
  A x[capacity];

  explicit AnyRow(int64_t count) : channels(count) {
    for (int64_t c = 0; c < channels; ++c) x[c] = A(0);
  }
  DINO_D2_INLINE void read(const V* from) {
    for (int64_t c = 0; c < channels; ++c) x[c] = widen(from[c]);
  }
  DINO_D2_INLINE void add(A share, const V* from) {
    for (int64_t c = 0; c < channels; ++c) x[c] += share * widen(from[c]);
  }
  DINO_D2_INLINE Vector<A> dot(const V* other) const {
    Vector<A> sum{};
    for (int64_t c = 0; c < channels; ++c) sum[0] += x[c] * widen(other[c]);
    return sum;
  }
  DINO_D2_INLINE void add_to(A share, A* to) const {
    for (int64_t c = 0; c < channels; ++c) to[c] += share * x[c];
  }
  DINO_D2_INLINE void write(V* to) const {
    for (int64_t c = 0; c < channels; ++c) narrow(x[c], to + c);
  }
};

// `channels` of them, from `first_channel` on, of every query in [begin, end) and every head.
template <class V, class A, class Row>
void forward_rows(const Forward<V, A>& p, const SampleLevels<A>& levels, int64_t begin, int64_t end,
                  int64_t first_channel, int64_t channels) {
  const Sizes& z = p.sizes;
  const int64_t samples = z.samples(), token_stride = z.heads * z.channels;
  for (int64_t query = begin; query < end; ++query) {
    const V* image = p.value + query / z.queries * z.tokens * token_stride + first_channel;
    for (int64_t head = 0; head < z.heads; ++head) {
      const int64_t row = query * z.heads + head;
      const V* value = image + head * z.channels;
      Row sum(channels);
      for (int64_t first = 0; first < samples; first += VectorOf<A>::width) {
        const int64_t left = samples - first;
        const int count = left < VectorOf<A>::width ? static_cast<int>(left) : VectorOf<A>::width;
        Samples<A> s;
        locate<A>(p.locations + 2 * (row * samples + first), p.weights + row * samples + first, levels, first, count,
                  s);
        alignas(64) A share[4][VectorOf<A>::width];
        for (int i = 0; i < VectorOf<A>::width; ++i) {
          share[0][i] = s.attention[i] * s.top[i] * s.left[i];
          share[1][i] = s.attention[i] * s.top[i] * s.right[i];
          share[2][i] = s.attention[i] * s.bottom[i] * s.left[i];
          share[3][i] = s.attention[i] * s.bottom[i] * s.right[i];
        }
        for (int i = 0; i < count; ++i) {
          if (!s.inside[i]) continue;
          for (int corner = 0; corner < 4; ++corner) {
            sum.add(share[corner][i], value + s.token[corner][i] * token_stride);
          }
        }
      }
      sum.write(p.output + row * z.channels + first_channel);
    }
  }
}

// As forward_rows, over whole (batch, head) planes. `accumulate`: the gradients of locations and weights
// already hold the share of earlier channels.
template <class V, class A, class Row>
void backward_rows(const Backward<V, A>& p, const SampleLevels<A>& levels, int64_t begin, int64_t end,
                   int64_t first_channel, int64_t channels) {
  constexpr int width = VectorOf<A>::width;
  const Sizes& z = p.sizes;
  const int64_t samples = z.samples(), token_stride = z.heads * z.channels;
  const bool accumulate = first_channel > 0;
  for (int64_t plane = begin; plane < end; ++plane) {
    const int64_t image = plane / z.heads, head = plane % z.heads;
    const int64_t offset = image * z.tokens * token_stride + head * z.channels + first_channel;
    const V* value = p.value + offset;
    A* grad_value = p.grad_value ? p.grad_value + offset : nullptr;
    for (int64_t query = 0; query < z.queries; ++query) {
      const int64_t row = (image * z.queries + query) * z.heads + head;
      Row grad(channels);
      grad.read(p.grad_output + row * z.channels + first_channel);
      for (int64_t first = 0; first < samples; first += width) {
        const int64_t left = samples - first;
        const int count = left < width ? static_cast<int>(left) : width;
        Samples<A> s;
        locate<A>(p.locations + 2 * (row * samples + first), p.weights + row * samples + first, levels, first, count,
                  s);
        if (grad_value) {
          alignas(64) A share[4][width];
          for (int i = 0; i < width; ++i) {
            share[0][i] = s.attention[i] * s.top[i] * s.left[i];
            share[1][i] = s.attention[i] * s.top[i] * s.right[i];
            share[2][i] = s.attention[i] * s.bottom[i] * s.left[i];
            share[3][i] = s.attention[i] * s.bottom[i] * s.right[i];
          }
          for (int i = 0; i < count; ++i) {
            if (!s.inside[i]) continue;
            for (int corner = 0; corner < 4; ++corner) {
              grad.add_to(share[corner][i], grad_value + s.token[corner][i] * token_stride);
            }
          }
        }
        if (!p.grad_weights) continue;
        // dot[corner]: output gradient times the value at that corner
        alignas(64) A dot[4][width];
        Vector<A> partial[4][width];
        for (int i = 0; i < width; ++i) {
          for (int corner = 0; corner < 4; ++corner) {
            partial[corner][i] = i < count && s.inside[i]
                                     ? grad.dot(value + s.token[corner][i] * token_stride)
                                     : Vector<A>{};
          }
        }
        for (int corner = 0; corner < 4; ++corner) sum_lanes<A>(partial[corner], dot[corner]);
        alignas(64) A grad_x[width], grad_y[width], grad_weight[width];
        for (int i = 0; i < width; ++i) {
          const A upper = s.left[i] * dot[0][i] + s.right[i] * dot[1][i];
          const A lower = s.left[i] * dot[2][i] + s.right[i] * dot[3][i];
          grad_weight[i] = s.top[i] * upper + s.bottom[i] * lower;
          grad_y[i] = s.attention[i] * (s.row_slope[0][i] * upper + s.row_slope[1][i] * lower);
          grad_x[i] = s.attention[i] *
                      (s.column_slope[0][i] * (s.top[i] * dot[0][i] + s.bottom[i] * dot[2][i]) +
                       s.column_slope[1][i] * (s.top[i] * dot[1][i] + s.bottom[i] * dot[3][i]));
        }
        A* to_weights = p.grad_weights + row * samples + first;
        A* to_locations = p.grad_locations + 2 * (row * samples + first);
        for (int i = 0; i < count; ++i) {
          to_weights[i] = grad_weight[i] + (accumulate ? to_weights[i] : A(0));
          to_locations[2 * i] = grad_x[i] + (accumulate ? to_locations[2 * i] : A(0));
          to_locations[2 * i + 1] = grad_y[i] + (accumulate ? to_locations[2 * i + 1] : A(0));
        }
      }
    }
  }
}

// Head sizes with channels in registers: 16, 32 and 64 single-precision channels on every instruction set
// that has room for them.
#define DINO_D2_CHOOSE(FUNCTION, PROBLEM)                                                        \
  do {                                                                                           \
    constexpr int width = VectorOf<A>::width;                                                    \
    const int64_t channels = (PROBLEM).sizes.channels;                                           \
    if (channels == width) {                                                                     \
      FUNCTION<V, A, FixedRow<V, A, 1>>(PROBLEM, levels, begin, end, 0, channels);               \
    } else if (channels == 2 * width) {                                                          \
      FUNCTION<V, A, FixedRow<V, A, 2>>(PROBLEM, levels, begin, end, 0, channels);               \
    } else if (channels == 4 * width) {                                                          \
      FUNCTION<V, A, FixedRow<V, A, 4>>(PROBLEM, levels, begin, end, 0, channels);               \
    } else if (channels == 8 * width) {                                                          \
      FUNCTION<V, A, FixedRow<V, A, 8>>(PROBLEM, levels, begin, end, 0, channels);               \
    } else {                                                                                     \
      constexpr int64_t capacity = AnyRow<V, A>::capacity;                                       \
      for (int64_t c = 0; c < channels; c += capacity) {                                         \
        const int64_t count = channels - c < capacity ? channels - c : capacity;                 \
        FUNCTION<V, A, AnyRow<V, A>>(PROBLEM, levels, begin, end, c, count);                     \
      }                                                                                          \
    }                                                                                            \
  } while (false)

template <class V, class A>
void forward(const Forward<V, A>& problem, const SampleLevels<A>& levels, int64_t begin, int64_t end) {
  DINO_D2_CHOOSE(forward_rows, problem);
}

template <class V, class A>
void backward(const Backward<V, A>& problem, const SampleLevels<A>& levels, int64_t begin, int64_t end) {
  DINO_D2_CHOOSE(backward_rows, problem);
}

}  // namespace

extern const Kernels DINO_D2_KERNELS = {
    DINO_D2_NAME,
    {forward<float, float>, backward<float, float>},
    {forward<double, double>, backward<double, double>},
    {forward<BFloat16, float>, backward<BFloat16, float>},
};

}  // namespace dino_d2::cpu
