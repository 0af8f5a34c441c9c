// The backward kernel.
#pragma once

#include "fixed_point.cuh"
#include "sampling.cuh"

namespace dino_d2::cuda {

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

// Adds the gradients of `channels` channels of the values for the samples that are staged, beginning with channel `turn`.
template <class L, class Sum, class V, class A>
__device__ __forceinline__ void add_to_values(const Staged<L, A>& staged, const Row<L, A>& row, const V* grad_output,
                                              Sum* grad_value, int64_t stride, int turn, int channels, double scale) {
  using Share = typename L::template Additions<Sum>;
  const int first = Share::channel(0);
  const Channels<Sum, Share::UNIT> to(grad_value + turn + first, stride);
#pragma unroll
  for (int r = 0; r < Share::ROWS; ++r) {
    const int place = row.place / Share::ROWS * Share::ROWS + r;
    int64_t index = row.index;
    if constexpr (Share::ROWS > 1) index = __shfl_sync(0xffffffffu, index, r * L::LANES, Share::TOGETHER);
    A grad[Share::UNITS][Share::UNIT];
#pragma unroll
    for (int unit = 0; unit < Share::UNITS; ++unit) {
      const int channel = turn + Share::channel(unit);
      Pack<V, Share::UNIT> g{};
      if (L::WHOLE || channel < channels) {
        g = *reinterpret_cast<const Pack<V, Share::UNIT>*>(grad_output + index * channels + channel);
      }
#pragma unroll
      for (int e = 0; e < Share::UNIT; ++e) grad[unit][e] = widen(g.x[e]);
    }
#pragma unroll 2
    for (int i = 0; i < L::LANES; ++i) {
      const Pack<int, 4> token = staged.token[place * L::LANES + i];
      if (token.x[0] < 0 || !(L::WHOLE || turn + first < channels)) continue;
      const Pack<A, 4> share = staged.share[place * L::LANES + i];
#pragma unroll
      for (int corner = 0; corner < 4; ++corner) {
#pragma unroll
        for (int unit = 0; unit < Share::UNITS; ++unit) {
          Sum part[Share::UNIT];
#pragma unroll
          for (int e = 0; e < Share::UNIT; ++e) part[e] = part_of(Sum{}, share.x[corner] * grad[unit][e], scale);
          to.add(token.x[corner], Share::channel(unit) - first, part);
        }
      }
    }
  }
}

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
      A grad[L::VEC] = {};
      if (has_channels) {
        const auto g = *reinterpret_cast<const Pack<V, L::VEC>*>(grad_output + channel);
        for (int e = 0; e < L::VEC; ++e) grad[e] = widen(g.x[e]);
      }
      if (grad_value) {
        add_to_values<L>(staged, row, p.grad_output, grad_value + offset, stride, turn, channels, scale);
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

}  // namespace dino_d2::cuda
