// The CUDA kernels behind plain functions, for ctypes.
#include "cuda_on_cpu.h"

#include "../../../ops/csrc/cuda/plan.h"

using namespace dino_d2;
using namespace dino_d2::cuda;

namespace {

struct Call {  // the layout of the structure that the test fills in
  int64_t dtype;  // 0 float32, 1 float64, 2 bfloat16, 3 float16
  int64_t batch, tokens, heads, channels, queries, levels, points;
  const int64_t* shapes;
  const void *value, *positions, *weights, *reference;
  int64_t reference_size;
  void* output;
  const void* grad_output;
  void *grad_value, *grad_positions, *grad_weights;
  int64_t deterministic, aligned, backwards, samples_as_values;
};

template <class F>
void with_dtype(const Call& c, const F& f) {
  if (c.dtype == 0) return f(float{}, float{});
  if (c.dtype == 1) return f(double{}, double{});
  if (c.dtype == 2) return f(__nv_bfloat16{}, float{});
  f(__half{}, float{});
}

std::vector<Level> levels_of(const Call& c) {
  std::vector<Level> levels;
  int64_t start = 0;
  for (int64_t i = 0; i < c.levels; ++i) {
    levels.push_back({c.shapes[2 * i], c.shapes[2 * i + 1], start});
    start += c.shapes[2 * i] * c.shapes[2 * i + 1];
  }
  return levels;
}

Sizes sizes_of(const Call& c) { return {c.batch, c.tokens, c.heads, c.channels, c.queries, c.levels, c.points}; }

template <class A, class S>
Sampling<A, S> sampling_of(const Call& c) {
  return {static_cast<const S*>(c.positions), static_cast<const S*>(c.weights), static_cast<const A*>(c.reference),
          c.reference_size, static_cast<S*>(c.grad_positions), static_cast<S*>(c.grad_weights)};
}

// Calls f with the layout and the type of positions and weights.
template <class V, class A, class F>
void with_layout_of(const Call& c, const F& f) {
  if constexpr (sizeof(V) == 2) {
    if (c.samples_as_values) return f(KnownLayout<V>{}, V{});
  }
  with_layout<V>(sizes_of(c), c.aligned, [&](auto layout) { f(layout, A{}); });
}

// A kernel for rows of layout L: f(tiles).
template <class L, class A, class F>
void run(const std::vector<Level>& levels, const Sizes& sizes, const F& f) {
  const Launch launch = plan_launch<L, A>(levels, sizes);
  const Index blocks{static_cast<unsigned>(launch.tiles.count), static_cast<unsigned>(sizes.heads),
                     static_cast<unsigned>(sizes.batch)};
  emulation::launch(blocks, launch.threads, launch.shared_bytes, [&] { f(launch.tiles); });
}

template <class T>
double largest_of(const T* x, int64_t count) {
  unsigned long long bits = 0;
  emulation::launch({3, 1, 1}, kMostThreads, 0, [&] { largest_kernel<T>(x, count, &bits); });
  double result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}

}  // namespace

extern "C" void forward(const Call* call) {
  const Call& c = *call;
  emulation::backwards = c.backwards;
  const std::vector<Level> levels = levels_of(c);
  const Sizes sizes = sizes_of(c);
  with_dtype(c, [&](auto v, auto a) {
    using V = decltype(v);
    using A = decltype(a);
    with_layout_of<V, A>(c, [&](auto layout, auto s) {
      using L = decltype(layout);
      using S = decltype(s);
      const Forward<V, A, S> problem{sizes, sampling_of<A, S>(c), static_cast<const V*>(c.value),
                                     static_cast<V*>(c.output)};
      run<L, A>(levels, sizes, [&](const Tiles& tiles) {
        forward_kernel<V, A, L, S>(problem, plan_levels(levels, sizes.points), tiles);
      });
    });
  });
}

// Returns what the additions into the gradient of the values did to the memory.
extern "C" emulation::Traffic backward(const Call* call) {
  const Call& c = *call;
  emulation::traffic = {};
  emulation::first_sum = reinterpret_cast<uint64_t>(c.grad_value);
  emulation::backwards = c.backwards;
  const std::vector<Level> levels = levels_of(c);
  const Sizes sizes = sizes_of(c);
  with_dtype(c, [&](auto v, auto a) {
    using V = decltype(v);
    using A = decltype(a);
    const auto problem_of = [&](auto s) {
      using S = decltype(s);
      return Backward<V, A, S>{sizes, sampling_of<A, S>(c), static_cast<const V*>(c.value),
                               static_cast<const V*>(c.grad_output), static_cast<A*>(c.grad_value)};
    };
    const Levels on_device = plan_levels(levels, sizes.points);
    if (c.deterministic) {
      const auto problem = problem_of(A{});
      const int64_t count = sizes.batch * sizes.tokens * sizes.heads * sizes.channels;
      const int64_t rows = sizes.batch * sizes.queries * sizes.heads;
      std::vector<long long> sums(count);
      emulation::first_sum = reinterpret_cast<uint64_t>(sums.data());
      const double largest[2] = {largest_of(problem.grad_output, rows * sizes.channels),
                                 c.reference ? 1.0 : largest_of(problem.sampling.weights, rows * sizes.samples())};
      const int64_t additions = sizes.queries * (c.reference ? 1 : sizes.samples());
      double scale;
      emulation::launch({1, 1, 1}, 32, 0, [&] { scale_kernel(largest, static_cast<double>(additions), &scale); });
      run<AnyLayout, A>(levels, sizes, [&](const Tiles& tiles) {
        backward_kernel<V, A, AnyLayout, true>(problem, on_device, tiles, FixedPoint{sums.data(), &scale});
      });
      emulation::launch({2, 1, 1}, kMostThreads, 0,
                        [&] { from_fixed_kernel<A>(sums.data(), &scale, count, problem.grad_value); });
      return;
    }
    with_layout_of<V, A>(c, [&](auto layout, auto s) {
      using L = decltype(layout);
      run<L, A>(levels, sizes, [&](const Tiles& tiles) {
        backward_kernel<V, A, L, false, decltype(s)>(problem_of(s), on_device, tiles, FixedPoint{});
      });
    });
  });
  return emulation::traffic;
}
