// The kernels for CUDA devices, without torch.
//
// A row is one (image, query, head). LANES neighbouring lanes work on a row, each on VEC neighbouring channels (16 bytes
// of values), so that a warp serves 32 / LANES rows. Where a sample lies and how much its corners count is worked out
// once, by one lane, and read by the others from shared memory. A block's rows are of one head and of queries that lie
// near each other, whose samples share lines of the L1 cache.
#pragma once

#include <type_traits>

#include "../problem.h"

namespace dino_d2::cuda {

constexpr int kThreads = 256;
constexpr int kMostLevels = 16;
constexpr int kTileWidth = 8;  // queries

struct Levels {  // travels as a kernel argument, so that nothing is copied to the device
  float per_point;  // 1 / points
  int height[kMostLevels];
  int width[kMostLevels];
  int start[kMostLevels];
};

// Which queries a block takes. Where queries are the tokens themselves: a tile, kTileWidth wide, of one level; the
// tiles of level l are numbered from first[l] on, across[l] of them side by side. Otherwise (levels = 0) the next few.
struct Tiles {
  int levels;
  int count;
  int first[kMostLevels];
  int across[kMostLevels];
};

// Sums in 64-bit integers, which come out the same in whatever order they are made: what is added is multiplied by
// `scale` first, a power of two such that no sum can overflow.
struct FixedPoint {
  long long* sums;      // like grad_value, filled with zeros
  const double* scale;  // on the device
};

template <class A>
__device__ __forceinline__ A widen(A x) { return x; }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

__device__ __forceinline__ void narrow(double x, double* to) { *to = x; }
__device__ __forceinline__ void narrow(float x, float* to) { *to = x; }
__device__ __forceinline__ void narrow(float x, __half* to) { *to = __float2half(x); }
__device__ __forceinline__ void narrow(float x, __nv_bfloat16* to) { *to = __float2bfloat16(x); }

template <class T, int N>
struct alignas(N * sizeof(T) < 16 ? N * sizeof(T) : 16) Pack {
  T x[N];
};

// Addresses in global memory, reading and adding there. In instructions of their own, since the compiler would take the
// address apart and multiply in 64 bits for every corner of every sample. (The tests bring what serves on a CPU.)
#if defined(__CUDACC__)
__device__ __forceinline__ uint64_t address_of(const void* pointer) { return __cvta_generic_to_global(pointer); }
__device__ __forceinline__ uint64_t address_of(uint64_t first, int index, int stride) {
  uint64_t address;
  asm("mad.wide.s32 %0, %1, %2, %3;" : "=l"(address) : "r"(index), "r"(stride), "l"(first));
  return address;
}
template <class T>
__device__ __forceinline__ T read_at(uint64_t address) {
  T result;
  if constexpr (sizeof(T) == 16) {
    uint32_t* const words = reinterpret_cast<uint32_t*>(&result);
    asm("ld.global.nc.v4.b32 {%0, %1, %2, %3}, [%4];"
        : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
        : "l"(address));
  } else {
    result = *static_cast<const T*>(__cvta_global_to_generic(address));
  }
  return result;
}
__device__ __forceinline__ void add_at(uint64_t address, float x) {
  asm volatile("red.global.add.f32 [%0], %1;" ::"l"(address), "f"(x) : "memory");
}
__device__ __forceinline__ void add_at(uint64_t address, double x) {
  asm volatile("red.global.add.f64 [%0], %1;" ::"l"(address), "d"(x) : "memory");
}
__device__ __forceinline__ void add_at(uint64_t address, long long x) {
  asm volatile("red.global.add.u64 [%0], %1;" ::"l"(address), "l"(x) : "memory");
}
__device__ __forceinline__ void add_at(uint64_t address, float x, float y, float z, float w) {
#if __CUDA_ARCH__ >= 900
  asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(address), "f"(x), "f"(y), "f"(z), "f"(w)
               : "memory");
#else
  add_at(address, x);
  add_at(address + 4, y);
  add_at(address + 8, z);
  add_at(address + 12, w);
#endif
}
#endif

// The channels of all tokens that one lane works on; `first` are those of token 0.
template <class T, int VEC>
class Channels {
 public:
  __device__ __forceinline__ Channels(T* first, int64_t stride)
      : first_(address_of(first)), stride_(static_cast<int>(stride * sizeof(T))) {}

  __device__ __forceinline__ Pack<std::remove_const_t<T>, VEC> operator[](int token) const {
    return read_at<Pack<std::remove_const_t<T>, VEC>>(address_of(first_, token, stride_));
  }
  __device__ __forceinline__ void add(int token, const T (&x)[VEC]) const {
    const uint64_t address = address_of(first_, token, stride_);
    if constexpr (VEC % 4 == 0) {
#pragma unroll
      for (int e = 0; e < VEC; e += 4) add_at(address + e * sizeof(T), x[e], x[e + 1], x[e + 2], x[e + 3]);
    } else {
#pragma unroll
      for (int e = 0; e < VEC; ++e) add_at(address + e * sizeof(T), x[e]);
    }
  }

 private:
  uint64_t first_;
  int stride_;  // bytes
};

template <int LANES, class A>
__device__ __forceinline__ A largest_of_row(A x) {
  for (int distance = LANES / 2; distance > 0; distance /= 2) {
    const A other = __shfl_xor_sync(0xffffffffu, x, distance);
    x = other > x || other != other ? other : x;  // NaN wins
  }
  return x;
}
template <int LANES, class A>
__device__ __forceinline__ A sum_of_row(A x) {
  for (int distance = LANES / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(0xffffffffu, x, distance);
  return x;
}

// How lanes share the work on a row. Samples are taken LANES at a time, each by the lane that `sample` names, which is
// also where `Dots` delivers. WHOLE: a row has LANES * VEC channels; otherwise it is worked on in turns.
template <int VEC_, int LANES_, bool WHOLE_>
struct Layout {
  static constexpr int VEC = VEC_, LANES = LANES_, ROWS = kThreads / LANES_;
  static constexpr bool WHOLE = WHOLE_;
  static constexpr int GROUP = LANES == 8 ? 8 : 4;      // samples whose sums over channels are made together
  static constexpr int SPREAD = LANES / GROUP;         // lanes that end up with the same sum

  static __device__ __forceinline__ int sample(int lane) { return lane % SPREAD * GROUP + lane / SPREAD; }
  static __device__ __forceinline__ int channels(const Sizes& z) {
    return WHOLE ? LANES * VEC : static_cast<int>(z.channels);
  }
};

// One row, as its lanes see it. Lanes of a row that does not exist see row 0 and must write nothing.
template <class L, class A>
struct Row {
  bool exists;
  int lane, place;        // of the lane in the row, of the row in the block
  int64_t image, head, query, index;  // query: through the batch; index: through queries and heads
  int samples, points;

  __device__ __forceinline__ Row(const Sizes& z, const Levels& levels, const Tiles& tiles) {
    lane = threadIdx.x % L::LANES;
    place = threadIdx.x / L::LANES;
    head = blockIdx.x % z.heads;
    const int64_t block = blockIdx.x / z.heads;
    image = block / tiles.count;
    const int tile = static_cast<int>(block % tiles.count);
    int64_t within;
    if (tiles.levels == 0) {
      within = int64_t(tile) * L::ROWS + place;
      exists = within < z.queries;
    } else {
      int level = 0;
      while (level + 1 < tiles.levels && tile >= tiles.first[level + 1]) ++level;
      const int in_level = tile - tiles.first[level];
      const int x = in_level % tiles.across[level] * kTileWidth + place % kTileWidth;
      const int y = in_level / tiles.across[level] * (L::ROWS / kTileWidth) + place / kTileWidth;
      exists = x < levels.width[level] && y < levels.height[level];
      within = levels.start[level] + int64_t(y) * levels.width[level] + x;
    }
    query = image * z.queries + (exists ? within : 0);
    index = query * z.heads + head;
    samples = static_cast<int>(z.samples());
    points = static_cast<int>(z.points);
  }
};

// Where one sample lies. Corners: 0 = top left, 1 = top right, 2 = bottom left, 3 = bottom right.
template <class A>
struct Sample {
  bool inside;
  bool has_left, has_right, has_top, has_bottom;
  A right, bottom;  // distance from the column and row before it
  A scale_x, scale_y;  // pixels per unit of position
  int token[4];     // a corner outside is read at its neighbour inside, with share 0

  // `at`: index of the sample in the row.
  template <class L>
  __device__ __forceinline__ Sample(const Row<L, A>& row, const Sampling<A>& p, const Levels& levels, int64_t level_count,
                                    int at) {
    inside = has_left = has_right = has_top = has_bottom = false;
    token[0] = token[1] = token[2] = token[3] = -1;
    if (!row.exists || at >= row.samples) return;
    const int level = static_cast<int>((at + 0.5f) * levels.per_point);
    const int w = levels.width[level], h = levels.height[level];
    const A* position = p.positions + 2 * (row.index * row.samples + at);
    A x, y;
    if (p.reference) {
      const A* reference = p.reference + (row.query * level_count + level) * p.reference_size;
      const bool box = p.reference_size == 4;
      const A half = sizeof(A) == 4 ? A(0.5) * levels.per_point : A(0.5) / row.points;
      scale_x = box ? reference[2] * w * half : A(1);
      scale_y = box ? reference[3] * h * half : A(1);
      x = reference[0] * w - A(0.5) + scale_x * position[0];
      y = reference[1] * h - A(0.5) + scale_y * position[1];
    } else {
      scale_x = w;
      scale_y = h;
      x = position[0] * w - A(0.5);
      y = position[1] * h - A(0.5);
    }
    inside = x > A(-1) && y > A(-1) && x < w && y < h;  // false for NaN
    if (!inside) return;
    const A x0 = floor(x), y0 = floor(y);
    right = x - x0;
    bottom = y - y0;
    const int column = static_cast<int>(x0), line = static_cast<int>(y0);
    has_left = column >= 0;
    has_top = line >= 0;
    has_right = column + 1 < w;
    has_bottom = line + 1 < h;
    token[0] = levels.start[level] + (has_top ? line : 0) * w + (has_left ? column : 0);
    const int to_right = has_left && has_right, to_bottom = has_top && has_bottom ? w : 0;
    token[1] = token[0] + to_right;
    token[2] = token[0] + to_bottom;
    token[3] = token[2] + to_right;
  }

  __device__ __forceinline__ A of_left() const { return has_left ? A(1) - right : A(0); }
  __device__ __forceinline__ A of_right() const { return has_right ? right : A(0); }
  __device__ __forceinline__ A of_top() const { return has_top ? A(1) - bottom : A(0); }
  __device__ __forceinline__ A of_bottom() const { return has_bottom ? bottom : A(0); }
};

// The attention weights of a row: as given, or by softmax over given logits.
template <class L, class A>
struct Weights {
  const A* given;
  bool softmax;
  A largest, share;  // weight = exp(logit - largest) * share

  __device__ __forceinline__ Weights(const Row<L, A>& row, const Sampling<A>& p) {
    given = p.weights + row.index * row.samples;
    softmax = p.reference != nullptr;
    if (!softmax) return;
    largest = -INFINITY;
    for (int i = row.lane; i < row.samples; i += L::LANES) {
      const A logit = given[i];
      largest = logit > largest || logit != logit ? logit : largest;
    }
    largest = largest_of_row<L::LANES>(largest);
    A sum = 0;
    for (int i = row.lane; i < row.samples; i += L::LANES) sum += exp(given[i] - largest);
    share = A(1) / sum_of_row<L::LANES>(sum);
  }

  __device__ __forceinline__ A operator[](int at) const {
    return softmax ? exp(given[at] - largest) * share : given[at];
  }
};

// What the lanes of a row tell each other about LANES samples.
template <class L, class A>
struct Staged {
  Pack<A, 4> share[kThreads];  // bilinear share times weight
  Pack<int, 4> token[kThreads];  // token[0] < 0: no such sample, or nothing of it is inside

  __device__ __forceinline__ void put(const Row<L, A>& row, const Sample<A>& s, A weight) {
    const int slot = row.place * L::LANES + L::sample(row.lane);
    const A top = weight * s.of_top(), bottom = weight * s.of_bottom();
    const A left = s.of_left(), right = s.of_right();
    share[slot] = {top * left, top * right, bottom * left, bottom * right};
    token[slot] = {s.token[0], s.token[1], s.token[2], s.token[3]};
  }
};

template <class V, class A, class L>
__global__ void __launch_bounds__(kThreads, L::WHOLE ? 4 : 1)
    forward_kernel(const Forward<V, A> p, const Levels levels, const Tiles tiles) {
  __shared__ Staged<L, A> staged;
  const Sizes& z = p.sizes;
  const Row<L, A> row(z, levels, tiles);
  const Weights<L, A> weights(row, p.sampling);
  const int channels = L::channels(z);
  const int64_t stride = z.heads * z.channels, offset = row.image * z.tokens * stride + row.head * z.channels;
  for (int turn = 0; turn < channels; turn += L::LANES * L::VEC) {
    const int channel = turn + row.lane * L::VEC;
    const bool has_channels = L::WHOLE || channel < channels;
    const Channels<const V, L::VEC> value(p.value + offset + channel, stride);
    A sum[L::VEC] = {};
    for (int first = 0; first < row.samples; first += L::LANES) {
      const int mine = first + L::sample(row.lane);
      const Sample<A> sample(row, p.sampling, levels, z.levels, mine);
      __syncwarp();  // what was staged before has been read
      staged.put(row, sample, sample.inside ? weights[mine] : A(0));
      __syncwarp();
#pragma unroll 4
      for (int i = 0; i < L::LANES; ++i) {
        const Pack<int, 4> token = staged.token[row.place * L::LANES + i];
        if (token.x[0] < 0 || !has_channels) continue;
        const Pack<A, 4> share = staged.share[row.place * L::LANES + i];
#pragma unroll
        for (int corner = 0; corner < 4; ++corner) {
          const auto v = value[token.x[corner]];
#pragma unroll
          for (int e = 0; e < L::VEC; ++e) sum[e] += share.x[corner] * widen(v.x[e]);
        }
      }
    }
    if (!row.exists || !has_channels) continue;
    Pack<V, L::VEC> result;
    for (int e = 0; e < L::VEC; ++e) narrow(sum[e], &result.x[e]);
    *reinterpret_cast<Pack<V, L::VEC>*>(p.output + row.index * z.channels + channel) = result;
  }
}

// Sums x over the lanes of a row. Afterwards x[0] holds the four sums of sample L::sample(lane): while there is more than
// one sample left, each step hands on half of them instead of all.
template <int LEFT, int DISTANCE, class A, int N>
__device__ __forceinline__ void sum_dots(A (&x)[N][4], int lane) {
  if constexpr (LEFT > 1) {
    const bool upper = lane & DISTANCE;
#pragma unroll
    for (int i = 0; i < LEFT / 2; ++i) {
#pragma unroll
      for (int corner = 0; corner < 4; ++corner) {
        const A given = upper ? x[i][corner] : x[i + LEFT / 2][corner];
        const A kept = upper ? x[i + LEFT / 2][corner] : x[i][corner];
        x[i][corner] = kept + __shfl_xor_sync(0xffffffffu, given, DISTANCE);
      }
    }
    sum_dots<LEFT / 2, DISTANCE / 2>(x, lane);
  } else if constexpr (DISTANCE > 0) {
#pragma unroll
    for (int corner = 0; corner < 4; ++corner) x[0][corner] += __shfl_xor_sync(0xffffffffu, x[0][corner], DISTANCE);
    sum_dots<1, DISTANCE / 2>(x, lane);
  }
}

// Adds to `dots`, for the sample of this lane if it is one of this group: `grad` times the value at each corner.
template <class L, class V, class A>
__device__ __forceinline__ void add_dots(const Staged<L, A>& staged, const Row<L, A>& row, int group, bool has_channels,
                                         const Channels<V, L::VEC>& value, const A (&grad)[L::VEC], A (&dots)[4]) {
  A partial[L::GROUP][4];
#pragma unroll
  for (int i = 0; i < L::GROUP; ++i) {
    const Pack<int, 4> token = staged.token[row.place * L::LANES + group * L::GROUP + i];
    const bool there = token.x[0] >= 0 && has_channels;
#pragma unroll
    for (int corner = 0; corner < 4; ++corner) {
      partial[i][corner] = 0;
      if (!there) continue;
      const auto v = value[token.x[corner]];
#pragma unroll
      for (int e = 0; e < L::VEC; ++e) partial[i][corner] += grad[e] * widen(v.x[e]);
    }
  }
  sum_dots<L::GROUP, L::LANES / 2>(partial, row.lane);
  if (group != row.lane % L::SPREAD) return;
  for (int corner = 0; corner < 4; ++corner) dots[corner] += partial[0][corner];
}

template <class A>
__device__ __forceinline__ A part_of(A, A x, double) { return x; }
template <class A>
__device__ __forceinline__ long long part_of(long long, A x, double scale) { return __double2ll_rn(x * scale); }

// FIXED: gradients of the values are collected in fixed point.
template <class V, class A, class L, bool FIXED>
__global__ void __launch_bounds__(kThreads, L::WHOLE ? 2 : 1)
    backward_kernel(const Backward<V, A> p, const Levels levels, const Tiles tiles, const FixedPoint fixed) {
  __shared__ Staged<L, A> staged;
  const Sizes& z = p.sizes;
  const Row<L, A> row(z, levels, tiles);
  const Weights<L, A> weights(row, p.sampling);
  using Sum = std::conditional_t<FIXED, long long, A>;
  const int channels = L::channels(z);
  const int64_t stride = z.heads * z.channels, offset = row.image * z.tokens * stride + row.head * z.channels;
  Sum* grad_value;
  if constexpr (FIXED) {
    grad_value = fixed.sums;
  } else {
    grad_value = p.grad_value;
  }
  const V* grad_output = p.grad_output + row.index * z.channels;
  const bool sampling_wanted = p.sampling.grad_weights != nullptr;
  const double scale = FIXED ? *fixed.scale : 0;
  A mean = 0;  // of the gradients of the row's weights
  for (int first = 0; first < row.samples; first += L::LANES) {
    const int mine = first + L::sample(row.lane);
    const Sample<A> sample(row, p.sampling, levels, z.levels, mine);
    const A weight = sample.inside ? weights[mine] : A(0);
    __syncwarp();  // what was staged before has been read
    staged.put(row, sample, weight);
    __syncwarp();
    A dots[4] = {};  // of sample `mine`: output gradient times the value at each corner
    for (int turn = 0; turn < channels; turn += L::LANES * L::VEC) {
      const int channel = turn + row.lane * L::VEC;
      const bool has_channels = L::WHOLE || channel < channels;
      const Channels<const V, L::VEC> value(p.value + offset + channel, stride);
      const Channels<Sum, L::VEC> to(grad_value + offset + channel, stride);
      A grad[L::VEC] = {};
      if (has_channels) {
        const auto g = *reinterpret_cast<const Pack<V, L::VEC>*>(grad_output + channel);
        for (int e = 0; e < L::VEC; ++e) grad[e] = widen(g.x[e]);
      }
      if (grad_value) {
#pragma unroll 2
        for (int i = 0; i < L::LANES; ++i) {
          const Pack<int, 4> token = staged.token[row.place * L::LANES + i];
          if (token.x[0] < 0 || !has_channels) continue;
          const Pack<A, 4> share = staged.share[row.place * L::LANES + i];
#pragma unroll
          for (int corner = 0; corner < 4; ++corner) {
            Sum part[L::VEC];
#pragma unroll
            for (int e = 0; e < L::VEC; ++e) part[e] = part_of(Sum{}, share.x[corner] * grad[e], scale);
            to.add(token.x[corner], part);
          }
        }
      }
      if (!sampling_wanted) continue;
      if constexpr (L::SPREAD == 1) {  // no loop for the compiler to keep
        add_dots<L>(staged, row, 0, has_channels, value, grad, dots);
      } else {
#pragma unroll 1
        for (int group = 0; group < L::SPREAD; ++group) {
          add_dots<L>(staged, row, group, has_channels, value, grad, dots);
        }
      }
    }
    if (!sampling_wanted || !row.exists || mine >= row.samples) continue;
    A grad_weight = 0, grad_x = 0, grad_y = 0;
    if (sample.inside) {
      const A left = sample.of_left(), right = sample.of_right(), top = sample.of_top(), bottom = sample.of_bottom();
      const A upper = left * dots[0] + right * dots[1], lower = left * dots[2] + right * dots[3];
      const A to_left = top * dots[0] + bottom * dots[2], to_right = top * dots[1] + bottom * dots[3];
      grad_weight = top * upper + bottom * lower;
      grad_x = weight * sample.scale_x * ((sample.has_right ? to_right : A(0)) - (sample.has_left ? to_left : A(0)));
      grad_y = weight * sample.scale_y * ((sample.has_bottom ? lower : A(0)) - (sample.has_top ? upper : A(0)));
    }
    mean += weight * grad_weight;
    const int64_t at = row.index * row.samples + mine;
    p.sampling.grad_weights[at] = grad_weight;
    p.sampling.grad_positions[2 * at] = grad_x;
    p.sampling.grad_positions[2 * at + 1] = grad_y;
  }
  if (!sampling_wanted || !weights.softmax) return;
  mean = sum_of_row<L::LANES>(mean);
  if (!row.exists) return;
  for (int mine = L::sample(row.lane); mine < row.samples; mine += L::LANES) {  // each lane what it wrote itself
    A* grad_weight = p.sampling.grad_weights + row.index * row.samples + mine;
    *grad_weight = weights[mine] * (*grad_weight - mean);
  }
}

// The bits of the largest magnitude of `count` numbers, which sort like unsigned integers; NaN is larger than all.
template <class T>
__global__ void __launch_bounds__(kThreads) largest_kernel(const T* x, int64_t count, unsigned long long* result) {
  double largest = 0;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < count; i += int64_t(gridDim.x) * kThreads) {
    const double magnitude = fabs(static_cast<double>(widen(x[i])));
    largest = magnitude > largest || magnitude != magnitude ? magnitude : largest;
  }
  largest = largest_of_row<32>(largest);
  if (threadIdx.x % 32 == 0) atomicMax(result, static_cast<unsigned long long>(__double_as_longlong(largest)));
}

// `largest`: of two factors of which `additions` products may meet in one sum. 2^62 is not reached.
static __global__ void scale_kernel(const double* largest, double additions, double* scale) {
  int exponent;
  frexp(largest[0] * largest[1] * additions, &exponent);
  *scale = isfinite(largest[0] * largest[1]) ? ldexp(1.0, 61 - exponent) : static_cast<double>(NAN);
}

template <class A>
__global__ void __launch_bounds__(kThreads)
    from_fixed_kernel(const long long* sums, const double* scale, int64_t count, A* result) {
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < count; i += int64_t(gridDim.x) * kThreads) {
    result[i] = static_cast<A>(static_cast<double>(sums[i]) / *scale);
  }
}

}  // namespace dino_d2::cuda
