// Gradients of the values that come out the same in whatever order they are added.
#pragma once

#include "primitives.cuh"

namespace dino_d2::cuda {

// Sums in 64-bit integers, which come out the same in whatever order they are made: what is added is multiplied by
// `scale` first, a power of two such that no sum can overflow.
struct FixedPoint {
  long long* sums;      // like grad_value, filled with zeros
  const double* scale;  // on the device
};

template <class A>
__device__ __forceinline__ A part_of(A, A x, double) { return x; }
template <class A>
__device__ __forceinline__ long long part_of(long long, A x, double scale) { return __double2ll_rn(x * scale); }

// The bits of the largest magnitude of `count` numbers, which sort like unsigned integers; NaN is larger than all.
template <class T>
__global__ void __launch_bounds__(kMostThreads) largest_kernel(const T* x, int64_t count, unsigned long long* result) {
  double largest = 0;
  const int64_t threads = int64_t(gridDim.x) * kMostThreads;
  for (int64_t i = int64_t(blockIdx.x) * kMostThreads + threadIdx.x; i < count; i += threads) {
    const double magnitude = fabs(static_cast<double>(widen(x[i])));
    largest = magnitude > largest || magnitude != magnitude ? magnitude : largest;
  }
  auto bits = static_cast<unsigned long long>(__double_as_longlong(largest));
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    const unsigned long long other = __shfl_xor_sync(kAllLanes, bits, distance);
    bits = other > bits ? other : bits;
  }
  if (threadIdx.x % 32 == 0) atomicMax(result, bits);
}

// `largest`: of two factors of which `additions` products may meet in one sum. 2^62 is not reached.
static __global__ void scale_kernel(const double* largest, double additions, double* scale) {
  int exponent;
  frexp(largest[0] * largest[1] * additions, &exponent);
  *scale = isfinite(largest[0] * largest[1]) ? ldexp(1.0, 61 - exponent) : static_cast<double>(NAN);
}

template <class A>
__global__ void __launch_bounds__(kMostThreads)
    from_fixed_kernel(const long long* sums, const double* scale, int64_t count, A* result) {
  const int64_t threads = int64_t(gridDim.x) * kMostThreads;
  for (int64_t i = int64_t(blockIdx.x) * kMostThreads + threadIdx.x; i < count; i += threads) {
    result[i] = static_cast<A>(static_cast<double>(sums[i]) / *scale);
  }
}

}  // namespace dino_d2::cuda
