// The forward kernel.
#pragma once

#include "sampling.cuh"

namespace dino_d2::cuda {

template <class V, class A, class L, class S = A>
__global__ void __launch_bounds__(kMostThreads, L::WHOLE ? 3 : 1)
    forward_kernel(const Forward<V, A, S> p, const Levels levels, const Tiles tiles) {
  using Values = Pack<V, L::VEC>;
  const Sizes& z = p.sizes;
  const Row<L> row(z, levels, tiles);
  const Samples<L, A, S> samples(row, p.sampling, levels, z);
  Staged<L, A>& staged = shared_memory<Staged<L, A>>()[row.place];
  const int channels = L::channels(z);
  const uint32_t pitch = static_cast<uint32_t>(z.heads) * (channels / L::VEC);
  for (int turn = 0; turn < channels; turn += L::LANES * L::VEC) {
    const int channel = turn + row.lane * L::VEC;
    const bool has_channels = L::WHOLE || channel < channels;
    const uint64_t value = kept_address_of(p.value + row.value + channel);
    A sum[L::VEC] = {};
#pragma unroll L::PASSES > 0 ? L::PASSES : 1
    for (int pass = 0; pass < samples.passes(); ++pass) {
      const Sample<A> sample = samples.sample(pass, pitch);
      const unsigned inside = staged.put(row.lane, sample, sample.inside ? samples.weight(pass) : A(0));
      if (inside == 0 || !has_channels) continue;
#pragma unroll 2
      for (int i = 0; i < samples.taken(pass); ++i) {
        const Pack<uint32_t, 4> offset = staged.offset[i];
        const Pack<A, 4> share = staged.share[i];
#pragma unroll
        for (int corner = 0; corner < 4; ++corner) {
          A wide[L::VEC];
          widen(read_at<Values>(address_of<sizeof(Values)>(value, offset.x[corner])), wide);
#pragma unroll
          for (int e = 0; e < L::VEC; ++e) sum[e] += share.x[corner] * wide[e];
        }
      }
    }
    if (!row.exists || !has_channels) continue;
    *reinterpret_cast<Values*>(p.output + row.index * channels + channel) = narrow<V>(sum);
  }
}

}  // namespace dino_d2::cuda
