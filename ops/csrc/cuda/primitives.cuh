// What the kernels are made of, without torch: numbers and their types, memory, what lanes tell each other.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace dino_d2::cuda {

constexpr int kMostThreads = 256;  // of a block
constexpr unsigned kAllLanes = 0xffffffffu;

// How many neighbouring sums in float32 one instruction adds to. (Undefined on the host, which adds nothing.)
#if __CUDA_ARCH__ >= 900
constexpr int kAddedAtOnce = 4;
#else
constexpr int kAddedAtOnce = 1;
#endif

template <class T, int N>
struct alignas(N * sizeof(T) < 16 ? N * sizeof(T) : 16) Pack {
  T x[N];
};

template <class A>
__device__ __forceinline__ A widen(A x) { return x; }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class V, class A, int N>
__device__ __forceinline__ void widen(const Pack<V, N>& from, A (&to)[N]) {
  if constexpr (std::is_same_v<V, __nv_bfloat16> && N % 2 == 0) {  // the upper halves of floats, two to a word
    uint32_t words[N / 2], wide[N];
    memcpy(words, &from, sizeof(words));
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      wide[2 * i] = words[i] << 16;
      wide[2 * i + 1] = words[i] & 0xffff0000u;
    }
    memcpy(to, wide, sizeof(wide));
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) to[i] = widen(from.x[i]);
  }
}

__device__ __forceinline__ void narrow(double x, double* to) { *to = x; }
__device__ __forceinline__ void narrow(float x, float* to) { *to = x; }
__device__ __forceinline__ void narrow(float x, __half* to) { *to = __float2half(x); }
__device__ __forceinline__ void narrow(float x, __nv_bfloat16* to) { *to = __float2bfloat16(x); }

template <class V, class A, int N>
__device__ __forceinline__ Pack<V, N> narrow(const A (&from)[N]) {
  Pack<V, N> result;
#pragma unroll
  for (int i = 0; i < N; ++i) narrow(from[i], &result.x[i]);
  return result;
}

// Memory, in instructions of its own: the compiler would take an address apart and spend three instructions on every
// corner of every sample, where one multiplies by a constant and adds. (The tests bring what serves on a CPU.)
#if defined(__CUDACC__)
__device__ __forceinline__ uint64_t address_of(const void* pointer) { return __cvta_generic_to_global(pointer); }
// The same, not worked out again at every use.
__device__ __forceinline__ uint64_t kept_address_of(const void* pointer) {
  uint64_t address = address_of(pointer);
  asm volatile("" : "+l"(address));
  return address;
}
template <int SIZE>
__device__ __forceinline__ uint64_t address_of(uint64_t first, uint32_t index) {
  uint64_t address;
  asm("mad.wide.u32 %0, %1, %2, %3;" : "=l"(address) : "r"(index), "n"(SIZE), "l"(first));
  return address;
}
// Of what no kernel writes.
template <class T>
__device__ __forceinline__ T read_at(uint64_t address) {
  T result;
  if constexpr (sizeof(T) == 16) {
    uint4 words;
    asm("ld.global.nc.v4.b32 {%0, %1, %2, %3}, [%4];"
        : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
        : "l"(address));
    memcpy(&result, &words, sizeof(result));
  } else if constexpr (sizeof(T) == 8) {
    uint2 words;
    asm("ld.global.nc.v2.b32 {%0, %1}, [%2];" : "=r"(words.x), "=r"(words.y) : "l"(address));
    memcpy(&result, &words, sizeof(result));
  } else {
    result = *static_cast<const T*>(__cvta_global_to_generic(address));
  }
  return result;
}
__device__ __forceinline__ void add_at(uint64_t address, float x) {
  asm volatile("red.global.add.f32 [%0], %1;" ::"l"(address), "f"(x));
}
__device__ __forceinline__ void add_at(uint64_t address, double x) {
  asm volatile("red.global.add.f64 [%0], %1;" ::"l"(address), "d"(x));
}
__device__ __forceinline__ void add_at(uint64_t address, long long x) {
  asm volatile("red.global.add.u64 [%0], %1;" ::"l"(address), "l"(x));
}
__device__ __forceinline__ void add_at(uint64_t address, float x, float y, float z, float w) {  // from 9.0 on
  asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(address), "f"(x), "f"(y), "f"(z), "f"(w));
}
// Of numbers from 1 to the number of samples, or NaN: nothing that a division has to be careful about.
__device__ __forceinline__ float reciprocal(float x) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}
__device__ __forceinline__ double reciprocal(double x) { return 1 / x; }
__device__ __forceinline__ int lowest_bit(unsigned x) { return __ffs(x) - 1; }
template <class T>
__device__ __forceinline__ T* shared_memory() {
  extern __shared__ uint4 memory[];
  return reinterpret_cast<T*>(memory);
}
#endif

template <class S, int N>
__device__ __forceinline__ void add_at(uint64_t address, const S (&x)[N]) {
  if constexpr (N == 4) {
    add_at(address, x[0], x[1], x[2], x[3]);
  } else {
    static_assert(N == 1);
    add_at(address, x[0]);
  }
}

template <int LANES, class A>
__device__ __forceinline__ A largest_of_row(A x) {
#pragma unroll
  for (int distance = LANES / 2; distance > 0; distance /= 2) {
    x = fmax(x, __shfl_xor_sync(kAllLanes, x, distance));  // passes over NaN
  }
  return x;
}
template <int LANES, class A>
__device__ __forceinline__ A sum_of_row(A x) {
#pragma unroll
  for (int distance = LANES / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(kAllLanes, x, distance);
  return x;
}

}  // namespace dino_d2::cuda
