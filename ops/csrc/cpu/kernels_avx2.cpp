// The kernels for processors with AVX2 and FMA.
#include "kernels.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#define DINO_D2_VECTOR_BYTES 32
#define DINO_D2_NAME "avx2"
#define DINO_D2_KERNELS avx2_kernels
#include "kernel_body.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
