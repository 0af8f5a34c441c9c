// What the kernels are made of, without torch: numbers and their types, memory, what lanes tell each other.
#pragma once

#include <cstdint>
#include <type_traits>

namespace dino_d2::cuda {

constexpr int kThreads = 256;

template <class A>
__device__ __forceinline__ A widen(A x) { return x; }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

__device__ __forceinline__ void narrow(double x, double* to) { *to = x; }
__device__ __forceinline__ void narrow(float x, float* to) { *to = x; }
__device__ __forceinline__ void narrow(float x, __half* to) { *to = __float2half(x); }
__device__ __forceinline__ void narrow(float x, __nv_bfloat16* to) { *to = __float2bfloat16(x); }

// How many neighbouring sums in float32 one instruction adds to.
#if __CUDA_ARCH__ >= 900
constexpr int kAddedAtOnce = 4;
#else
constexpr int kAddedAtOnce = 1;
#endif

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
__device__ __forceinline__ void add_at(uint64_t address, float x, float y, float z, float w) {  // from 9.0 on
  asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(address), "f"(x), "f"(y), "f"(z), "f"(w)
               : "memory");
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
  __device__ __forceinline__ void add(int token, int channel, const T (&x)[VEC]) const {
    const uint64_t address = address_of(first_, token, stride_) + channel * sizeof(T);
    if constexpr (VEC == 4) {
      add_at(address, x[0], x[1], x[2], x[3]);
    } else {
      static_assert(VEC == 1);
      add_at(address, x[0]);
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

}  // namespace dino_d2::cuda
