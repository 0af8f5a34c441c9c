// The forward kernel.
#pragma once

#include "sampling.cuh"

namespace dino_d2::cuda {

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

}  // namespace dino_d2::cuda
