// Forward and backward kernels, written once in GCC/Clang vector extensions and compiled once per
// instruction set: the including file defines DINO_D2_VECTOR_BYTES and DINO_D2_KERNELS and switches the
// compiler's target on. No standard header may be included here: its inline functions would be compiled for
// that target too, and the linker could keep them for everybody.

namespace dino_d2::cpu {
namespace {

#include "vector.h"

#include "samples.h"

// Registers that sums should fill: with eight of them additions need not wait for each other (four cycles each, two at
// a time), and half of the sixteen that most processors have are left.
constexpr int kSumRegisters = 8;

constexpr int sums_of(int registers) {
  return registers >= kSumRegisters ? 1 : kSumRegisters / registers < 4 ? kSumRegisters / registers : 4;
}

// How one head's channels are held, whatever they are stored as. RegisterChannels<N> keeps them in N registers; a head
// size that is not such a multiple takes the plain loops of AnyChannels. SUMS: the corners of a sample are added to so
// many sums in turn.
template <class A, int N>
struct RegisterChannels {
  static constexpr int width = VectorOf<A>::width, SUMS = sums_of(N);
  Vector<A> x[N];

  explicit RegisterChannels(int64_t) {
    for (int n = 0; n < N; ++n) x[n] = Vector<A>{};
  }
  template <class T>
  DINO_D2_INLINE void read(const T* from) {
    for (int n = 0; n < N; ++n) x[n] = load<A>(from + n * width);
  }
  DINO_D2_INLINE void add(const RegisterChannels& other) {
    for (int n = 0; n < N; ++n) x[n] += other.x[n];
  }
  template <class T>
  DINO_D2_INLINE void add(A share, const T* from) {
    for (int n = 0; n < N; ++n) x[n] += share * load<A>(from + n * width);
  }
  // partial products whose lanes sum to the dot product
  template <class T>
  DINO_D2_INLINE Vector<A> dot(const T* other) const {
    Vector<A> sum = x[0] * load<A>(other);
    for (int n = 1; n < N; ++n) sum += x[n] * load<A>(other + n * width);
    return sum;
  }
  DINO_D2_INLINE void add_to(A share, A* to) const {
    for (int n = 0; n < N; ++n) store<A>(to + n * width, load<A>(to + n * width) + share * x[n]);
  }
  template <class T>
  DINO_D2_INLINE void write(T* to) const {
    if constexpr (sizeof(T) == sizeof(A)) {
      for (int n = 0; n < N; ++n) store<A>(to + n * width, x[n]);
    } else {
      for (int n = 0; n < N; ++n) {
        for (int i = 0; i < width; ++i) narrow(x[n][i], to + n * width + i);
      }
    }
  }
};

// Channels stored as bfloat16, two to a word: N registers hold the even ones and N the odd ones, so that one load and two
// cheap instructions take the place of two widening loads.
template <int N>
struct PairedChannels {
  static constexpr int width = VectorOf<float>::width, SUMS = sums_of(2 * N);
  Vector<float> even[N], odd[N];

  explicit PairedChannels(int64_t) {
    for (int n = 0; n < N; ++n) even[n] = odd[n] = Vector<float>{};
  }
  DINO_D2_INLINE void add(const PairedChannels& other) {
    for (int n = 0; n < N; ++n) {
      even[n] += other.even[n];
      odd[n] += other.odd[n];
    }
  }
  DINO_D2_INLINE void add(float share, const BFloat16* from) {
    for (int n = 0; n < N; ++n) {
      const Words words = load_words(from + 2 * n * width);
      even[n] += share * reinterpret_cast<Vector<float>>(words << 16);
      odd[n] += share * reinterpret_cast<Vector<float>>(words & 0xffff0000u);
    }
  }
  DINO_D2_INLINE void write(BFloat16* to) const {
    for (int n = 0; n < N; ++n) {
      store_words(to + 2 * n * width, narrowed(even[n]) >> 16 | (narrowed(odd[n]) & 0xffff0000u));
    }
  }
};

template <class A>
struct AnyChannels {
  static constexpr int SUMS = 1;
  int64_t channels;
  A x[kMostChannels];

  explicit AnyChannels(int64_t count) : channels(count) {
    for (int64_t c = 0; c < channels; ++c) x[c] = A(0);
  }
  template <class T>
  DINO_D2_INLINE void read(const T* from) {
    for (int64_t c = 0; c < channels; ++c) x[c] = widen(from[c]);
  }
  DINO_D2_INLINE void add(const AnyChannels& other) {
    for (int64_t c = 0; c < channels; ++c) x[c] += other.x[c];
  }
  template <class T>
  DINO_D2_INLINE void add(A share, const T* from) {
    for (int64_t c = 0; c < channels; ++c) x[c] += share * widen(from[c]);
  }
  template <class T>
  DINO_D2_INLINE Vector<A> dot(const T* other) const {
    Vector<A> sum{};
    for (int64_t c = 0; c < channels; ++c) sum[0] += x[c] * widen(other[c]);
    return sum;
  }
  DINO_D2_INLINE void add_to(A share, A* to) const {
    for (int64_t c = 0; c < channels; ++c) to[c] += share * x[c];
  }
  template <class T>
  DINO_D2_INLINE void write(T* to) const {
    for (int64_t c = 0; c < channels; ++c) narrow(x[c], to + c);
  }
};

// `channels` of them, from `first_channel` on, of every query and head of the part.
template <class V, class A, class Channels>
void forward_rows(const StridedForward<V, A>& p, const SampleLevels<A>& levels, A* scratch, const Part& part,
                  int64_t first_channel, int64_t channels) {
  const Sizes& z = p.sizes;
  const int64_t samples = z.samples();
  Row<A> row(z, p.sampling, levels, scratch);
  Walk<A> walk(row, part, static_cast<Index<A>>(p.token_stride));
  Corners<A> corners[2];  // of these samples, and of the next ones
  int current = 0;
  walk.next(corners[current]);
  for (int64_t query = part.begin; query < part.end; ++query) {
    const V* image = p.value + query / z.queries * p.image_stride + first_channel;
    for (int64_t head = part.first_head; head < part.end_head; ++head) {
      const V* value = image + head * p.head_stride;
      Channels sum[4] = {Channels(channels), Channels(channels), Channels(channels), Channels(channels)};
      for (int64_t first = 0; first < samples; first += VectorOf<A>::width) {
        const int64_t left = samples - first;
        const int count = left < VectorOf<A>::width ? static_cast<int>(left) : VectorOf<A>::width;
        const Corners<A>& s = corners[current];
        current ^= 1;
        walk.next(corners[current]);  // a long chain of arithmetic, done while the values below are being fetched
        for (int i = 0; i < count; ++i) {
          if (!s.inside[i]) continue;
          for (int corner = 0; corner < 4; ++corner) {
            sum[corner % Channels::SUMS].add(s.share[corner][i], value + s.offset[corner][i]);
          }
        }
      }
      for (int left = Channels::SUMS / 2; left > 0; left /= 2) {
        for (int i = 0; i < left; ++i) sum[i].add(sum[i + left]);
      }
      sum[0].write(p.output + (query * z.heads + head) * z.channels + first_channel);
    }
  }
}

// The queries of one image and head. Tokens of `value` and `grad_value` are `token_stride` apart; `accumulate`: the
// gradients of positions and weights already hold the share of earlier channels.
template <class Channels, class T, class V, class A>
void backward_plane(const Backward<V, A>& p, Row<A>& row, int64_t plane, const T* value, A* grad_value,
                    int64_t token_stride, int64_t first_channel, int64_t channels) {
  constexpr int width = VectorOf<A>::width;
  const Sizes& z = p.sizes;
  const int64_t samples = z.samples(), image = plane / z.heads, head = plane % z.heads;
  for (int64_t query = image * z.queries; query < (image + 1) * z.queries; ++query) {
    const int64_t index = query * z.heads + head;
    Channels grad(channels);
    grad.read(p.grad_output + index * z.channels + first_channel);
    const int64_t soon = index + kRowsAhead * z.heads;
    row.prefetch(soon);
    for (int64_t c = 0; c < channels; c += 64 / sizeof(V)) {
      __builtin_prefetch(p.grad_output + soon * z.channels + first_channel + c);
    }
    row.begin_query(query);
    row.place(index);
    for (int64_t first = 0; first < samples; first += width) {
      const int64_t left = samples - first;
      const int count = left < width ? static_cast<int>(left) : width;
      Corners<A> s;
      const Bilinear<A> b = s.find(row, first, static_cast<Index<A>>(token_stride));
      if (grad_value) {
        for (int i = 0; i < count; ++i) {
          if (!s.inside[i]) continue;
          for (int corner = 0; corner < 4; ++corner) {
            grad.add_to(s.share[corner][i], grad_value + s.offset[corner][i]);
          }
        }
      }
      if (!p.sampling.grad_weights) continue;
      // dot[corner]: output gradient times the value at that corner
      Vector<A> dot[4];
      Vector<A> partial[width];
      for (int corner = 0; corner < 4; ++corner) {
        for (int i = 0; i < width; ++i) {
          partial[i] = i < count && s.inside[i] ? grad.dot(value + s.offset[corner][i]) : Vector<A>{};
        }
        dot[corner] = sum_lanes<A>(partial);
      }
      const Vector<A> weight = load<A>(row.weight + first);
      const Vector<A> upper = b.left * dot[0] + b.right * dot[1], lower = b.left * dot[2] + b.right * dot[3];
      const Vector<A> to_left = b.top * dot[0] + b.bottom * dot[2], to_right = b.top * dot[1] + b.bottom * dot[3];
      store<A>(row.grad_weight + first, b.top * upper + b.bottom * lower);
      store<A>(row.grad_x + first, weight * (b.column_slope[0] * to_left + b.column_slope[1] * to_right));
      store<A>(row.grad_y + first, weight * (b.row_slope[0] * upper + b.row_slope[1] * lower));
    }
    if (p.sampling.grad_weights) row.give_gradients(index, first_channel > 0);
  }
}

// Where it is worth copies, the head's values are copied in the precision of the sums, and its gradient is collected in
// a copy too.
template <class V, class A, class Channels>
void backward_rows(const PlanesBackward<V, A>& p, const SampleLevels<A>& levels, A* scratch, int64_t plane,
                   int64_t first_channel, int64_t channels) {
  const Sizes& z = p.sizes;
  const int64_t stride = z.heads * z.channels;
  const int64_t offset = plane / z.heads * z.tokens * stride + plane % z.heads * z.channels + first_channel;
  Row<A> row(z, p.sampling, levels, scratch);
  A* grad_value = p.grad_value ? p.grad_value + offset : nullptr;
  if (!p.staged) {
    backward_plane<Channels>(p, row, plane, p.value + offset, grad_value, stride, first_channel, channels);
    return;
  }
  A* const values = scratch + kScratchArrays * levels.padded;
  A* const gradient = values + z.tokens * channels;
  const Channels zero(channels);
  Channels buffer(channels);
  for (int64_t token = 0; token < z.tokens; ++token) {
    if (p.sampling.grad_weights) {  // nothing else reads the values
      buffer.read(p.value + offset + token * stride);
      buffer.write(values + token * channels);
    }
    if (grad_value) zero.write(gradient + token * channels);
  }
  backward_plane<Channels>(p, row, plane, values, grad_value ? gradient : nullptr, channels, first_channel, channels);
  if (!grad_value) return;
  for (int64_t token = 0; token < z.tokens; ++token) {
    buffer.read(gradient + token * channels);
    buffer.write(grad_value + token * stride);
  }
}

template <class V, class A, int N>
struct SumOf {
  typedef RegisterChannels<A, N> Channels;
};
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
template <int N>
struct SumOf<BFloat16, float, N> {
  typedef PairedChannels<N / 2> Channels;
};
template <>
struct SumOf<BFloat16, float, 1> {
  typedef RegisterChannels<float, 1> Channels;
};
#endif
template <class V, class A, int N>
using InSum = typename SumOf<V, A, N>::Channels;
template <class V, class A, int N>
using InOrder = RegisterChannels<A, N>;

// Head sizes with channels in registers: 16, 32 and 64 single-precision channels on every instruction set
// that has room for them.
#define DINO_D2_FOR_CHANNELS(FUNCTION, CHANNELS, ...)                                         \
  do {                                                                                        \
    constexpr int width = VectorOf<A>::width;                                                 \
    const int64_t channels = problem.sizes.channels;                                          \
    if (channels == width) {                                                                  \
      FUNCTION<V, A, CHANNELS<V, A, 1>>(problem, levels, scratch, __VA_ARGS__, 0, channels);  \
    } else if (channels == 2 * width) {                                                       \
      FUNCTION<V, A, CHANNELS<V, A, 2>>(problem, levels, scratch, __VA_ARGS__, 0, channels);  \
    } else if (channels == 4 * width) {                                                       \
      FUNCTION<V, A, CHANNELS<V, A, 4>>(problem, levels, scratch, __VA_ARGS__, 0, channels);  \
    } else if (channels == 8 * width) {                                                       \
      FUNCTION<V, A, CHANNELS<V, A, 8>>(problem, levels, scratch, __VA_ARGS__, 0, channels);  \
    } else {                                                                                  \
      for (int64_t c = 0; c < channels; c += kMostChannels) {                                 \
        const int64_t count = channels - c < kMostChannels ? channels - c : kMostChannels;    \
        FUNCTION<V, A, AnyChannels<A>>(problem, levels, scratch, __VA_ARGS__, c, count);      \
      }                                                                                       \
    }                                                                                         \
  } while (false)

template <class V, class A>
void forward(const StridedForward<V, A>& problem, const SampleLevels<A>& levels, A* scratch, const Part& part) {
  DINO_D2_FOR_CHANNELS(forward_rows, InSum, part);
}

template <class V, class A>
void backward(const PlanesBackward<V, A>& problem, const SampleLevels<A>& levels, A* scratch, int64_t plane) {
  DINO_D2_FOR_CHANNELS(backward_rows, InOrder, plane);
}

}  // namespace

extern const Kernels DINO_D2_KERNELS = {
    DINO_D2_NAME,
    {forward<float, float>, backward<float, float>},
    {forward<double, double>, backward<double, double>},
    {forward<BFloat16, float>, backward<BFloat16, float>},
};

}  // namespace dino_d2::cpu
