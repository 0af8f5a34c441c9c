// The table of kernels that each instruction set fills in, and how one is chosen at run time.
#pragma once

#include "../problem.h"

namespace dino_d2::cpu {

// As wide as the numbers that it is worked out from.
template <class A>
struct IndexOf;
template <>
struct IndexOf<float> {
  typedef int32_t Type;
};
template <>
struct IndexOf<double> {
  typedef int64_t Type;
};
template <class A>
using Index = typename IndexOf<A>::Type;

// The level of every sample of a query, spread out so that samples can be worked on as a vector.
// Each array has `padded` entries, a multiple of every vector width; the tail repeats a harmless level.
template <class A>
struct SampleLevels {
  const A* width;
  const A* height;
  const Index<A>* columns;  // width as an integer
  const Index<A>* start;
  int64_t padded;
};

constexpr int64_t kLargestVector = 16;  // samples; `padded` is a multiple of this
constexpr int64_t kMostChannels = 256;  // of a head worked on at once; more are taken in turns
constexpr int64_t kScratchArrays = 10;  // of `padded` numbers, that a kernel keeps one query's samples in

// `value` has strides of its own: (tokens, heads, channels), or one head's (tokens, channels).
template <class V, class A>
struct StridedForward : Forward<V, A> {
  int64_t image_stride, token_stride, head_stride;
};

// Queries [begin, end) of the flattened (batch, query) axis, and of each the heads [first_head, end_head).
struct Part {
  int64_t begin, end, first_head, end_head;
};

template <class V, class A>
struct PlanesBackward : Backward<V, A> {
  bool staged;  // grad_value is written whole, through a copy per head; otherwise it arrives filled with zeros
};

template <class V, class A>
struct KernelsOf {
  // `scratch`: kScratchArrays * padded numbers.
  void (*forward)(const StridedForward<V, A>&, const SampleLevels<A>&, A* scratch, const Part&);
  // One plane of the flattened (batch, head) axis: heads never share a gradient, so threads that own whole heads need
  // no atomics. `scratch`: as above, and 2 * tokens * min(channels, kMostChannels) more for a staged problem.
  void (*backward)(const PlanesBackward<V, A>&, const SampleLevels<A>&, A* scratch, int64_t plane);
};

struct BFloat16 {
  uint16_t bits;
};

struct Kernels {
  const char* name;
  KernelsOf<float, float> float32;
  KernelsOf<double, double> float64;
  KernelsOf<BFloat16, float> bfloat16;
};

extern const Kernels generic_kernels;
#if defined(__x86_64__)
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;
#endif

}  // namespace dino_d2::cpu
