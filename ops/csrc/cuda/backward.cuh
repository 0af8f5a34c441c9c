// The backward kernel.
#pragma once

#include "fixed_point.cuh"
#include "sampling.cuh"

namespace dino_d2::cuda {

// Adds the gradients of `channels` channels of the values for the samples that are staged, beginning with channel
// `turn`. `first_row` is the staging of the first row of the block, of which `taken` slots count; `inside` is what
// `put` returned.
template <class L, class Sum, class V, class A>
__device__ __forceinline__ void add_to_values(const Staged<L, A>* first_row, const Row<L>& row, const V* grad_output,
                                              Sum* grad_value, int turn, int channels, int taken,
                                              unsigned inside, double scale) {
  using Share = typename L::template Additions<Sum>;
  const int first = turn + Share::channel(0);
  const uint64_t to = kept_address_of(grad_value + first);
#pragma unroll
  for (int r = 0; r < Share::ROWS; ++r) {
    const Staged<L, A>& staged = first_row[row.place / Share::ROWS * Share::ROWS + r];
    int64_t index = row.index;
    unsigned wanted = inside;
    if constexpr (Share::ROWS > 1) {
      index = __shfl_sync(kAllLanes, index, r * L::LANES, Share::TOGETHER);
      wanted = __shfl_sync(kAllLanes, wanted, r * L::LANES, Share::TOGETHER);
    }
    if (!L::WHOLE && first >= channels) continue;
    A grad[Share::UNITS][Share::UNIT];
#pragma unroll
    for (int unit = 0; unit < Share::UNITS; ++unit) {
      const int channel = turn + Share::channel(unit);
      Pack<V, Share::UNIT> g{};
      if (L::WHOLE || channel < channels) {
        g = read_at<Pack<V, Share::UNIT>>(address_of(grad_output + index * channels + channel));
      }
      widen(g, grad[unit]);
    }
#pragma unroll L::PASSES > 0 ? L::LANES : 2
    for (int i = 0; i < taken; ++i) {
      if (!(wanted >> L::lane_of(i) & 1)) continue;
      const Pack<uint32_t, 4> offset = staged.offset[i];
      const Pack<A, 4> share = staged.share[i];
#pragma unroll
      for (int corner = 0; corner < 4; ++corner) {
        const uint64_t address = address_of<L::VEC * sizeof(Sum)>(to, offset.x[corner]);
#pragma unroll
        for (int unit = 0; unit < Share::UNITS; ++unit) {
          Sum part[Share::UNIT];
#pragma unroll
          for (int e = 0; e < Share::UNIT; ++e) part[e] = part_of(Sum{}, share.x[corner] * grad[unit][e], scale);
          add_at(address + unit * Share::TOGETHER * Share::UNIT * sizeof(Sum), part);
        }
      }
    }
  }
}

// Sums over the lanes of a row what `partial` gives for the four corners of two samples, for the samples of a group
// that are STEP apart, beginning with `first`. Each lane gets the sums of one of them: two samples are joined by
// handing one on and keeping the other. For STEP = 1 it is sample `lane / SPREAD`.
template <class L, int STEP, class A, class F>
__device__ __forceinline__ Pack<A, 4> sum_dots(int first, int lane, const F& partial) {
  constexpr int DISTANCE = STEP * L::SPREAD;
  Pack<A, 4> lower{}, upper{}, result;
  if constexpr (2 * STEP == L::GROUP) {
    partial(first, lower, first + STEP, upper);
  } else {
    lower = sum_dots<L, 2 * STEP, A>(first, lane, partial);
    upper = sum_dots<L, 2 * STEP, A>(first + STEP, lane, partial);
  }
  const bool keeps_upper = lane & DISTANCE;
#pragma unroll
  for (int corner = 0; corner < 4; ++corner) {
    const A given = keeps_upper ? lower.x[corner] : upper.x[corner];
    const A kept = keeps_upper ? upper.x[corner] : lower.x[corner];
    result.x[corner] = kept + __shfl_xor_sync(kAllLanes, given, DISTANCE);
  }
  return result;
}

// `grad` times the value at each corner of a sample, over this lane's channels.
template <class L, class V, class A>
__device__ __forceinline__ Pack<A, 4> dots_of(const Pack<uint32_t, 4>& offset, uint64_t value,
                                              const A (&grad)[L::VEC]) {
  using Values = Pack<V, L::VEC>;
  Pack<A, 4> result;
#pragma unroll
  for (int corner = 0; corner < 4; ++corner) {
    A wide[L::VEC];
    widen(read_at<Values>(address_of<sizeof(Values)>(value, offset.x[corner])), wide);
    result.x[corner] = grad[0] * wide[0];
#pragma unroll
    for (int e = 1; e < L::VEC; ++e) result.x[corner] += grad[e] * wide[e];
  }
  return result;
}

// Adds the sums of the dots to `dots`, for the sample of this lane if it is one of this group. `reads`: this lane has
// something to read. (Asked for every two samples, or the compiler would read for so many that no registers are left.)
template <class L, class V, class A>
__device__ __forceinline__ void add_dots(const Staged<L, A>& staged, int lane, int group, bool reads, uint64_t value,
                                         const A (&grad)[L::VEC], A (&dots)[4]) {
  const auto* const offset = staged.offset + group * L::GROUP;
  const Pack<A, 4> sums = sum_dots<L, 1, A>(0, lane, [&](int i, Pack<A, 4>& of_i, int j, Pack<A, 4>& of_j) {
    if (!reads) return;
    of_i = dots_of<L, V>(offset[i], value, grad);
    of_j = dots_of<L, V>(offset[j], value, grad);
  });
#pragma unroll
  for (int corner = 0; corner < 4; ++corner) {
    const A sum = sum_of_row<L::SPREAD>(sums.x[corner]);
    if (group == lane % L::SPREAD) dots[corner] += sum;
  }
}

// FIXED: gradients of the values are collected in fixed point.
template <class V, class A, class L, bool FIXED, class S = A>
__global__ void __launch_bounds__(kMostThreads, L::WHOLE ? 2 : 1)
    backward_kernel(const Backward<V, A, S> p, const Levels levels, const Tiles tiles, const FixedPoint fixed) {
  using Sum = std::conditional_t<FIXED, long long, A>;
  const Sizes& z = p.sizes;
  const Row<L> row(z, levels, tiles);
  Samples<L, A, S> samples(row, p.sampling, levels, z);
  Staged<L, A>* const first_row = shared_memory<Staged<L, A>>();
  Staged<L, A>& staged = first_row[row.place];
  const int channels = L::channels(z);
  const uint32_t pitch = static_cast<uint32_t>(z.heads) * (channels / L::VEC);
  Sum* grad_value;
  if constexpr (FIXED) {
    grad_value = fixed.sums;
  } else {
    grad_value = p.grad_value;
  }
  const bool sampling_wanted = p.sampling.grad_weights != nullptr;
  const double scale = FIXED ? *fixed.scale : 0;
#pragma unroll L::PASSES > 0 ? L::PASSES : 1
  for (int pass = 0; pass < samples.passes(); ++pass) {
    const Sample<A> sample = samples.sample(pass, pitch);
    const A weight = sample.inside ? samples.weight(pass) : A(0);
    const unsigned inside = staged.put(row.lane, sample, weight);
    const int taken = samples.taken(pass);
    A dots[4] = {};  // of the sample of this lane: output gradient times the value at each corner
    for (int turn = 0; turn < channels; turn += L::LANES * L::VEC) {
      if (grad_value) {
        add_to_values<L>(first_row, row, p.grad_output, grad_value + row.value, turn, channels, taken, inside, scale);
      }
      if (!sampling_wanted) continue;
      const int channel = turn + row.lane * L::VEC;
      const bool has_channels = L::WHOLE || channel < channels;
      const uint64_t value = kept_address_of(p.value + row.value + channel);
      A grad[L::VEC] = {};
      if (has_channels) {
        widen(read_at<Pack<V, L::VEC>>(address_of(p.grad_output + row.index * channels + channel)), grad);
      }
      if constexpr (L::SPREAD == 1) {  // no loop for the compiler to keep
        add_dots<L, V>(staged, row.lane, 0, inside != 0 && has_channels, value, grad, dots);
      } else {
#pragma unroll 1
        for (int group = 0; group * L::GROUP < taken; ++group) {
          add_dots<L, V>(staged, row.lane, group, inside != 0 && has_channels, value, grad, dots);
        }
      }
    }
    if (!sampling_wanted) continue;
    const A upper = sample.left * dots[0] + sample.right * dots[1];
    const A lower = sample.left * dots[2] + sample.right * dots[3];
    const A to_left = sample.top * dots[0] + sample.bottom * dots[2];
    const A to_right = sample.top * dots[1] + sample.bottom * dots[3];
    const A along_x = (sample.has_right ? to_right : A(0)) - (sample.has_left ? to_left : A(0));
    const A along_y = (sample.has_bottom ? lower : A(0)) - (sample.has_top ? upper : A(0));
    const A nothing = 0;
    samples.keep(pass, sample.inside ? sample.top * upper + sample.bottom * lower : nothing,
                 sample.inside ? weight * samples.frame(pass).scale_x * along_x : nothing,
                 sample.inside ? weight * samples.frame(pass).scale_y * along_y : nothing);
  }
  if (sampling_wanted) samples.write();
}

}  // namespace dino_d2::cuda
