// The operators on CPU tensors: choose kernels for this processor, share the work among threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <optional>
#include <string>
#include <tuple>

#include "../arguments.h"
#include "kernels.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace dino_d2::cpu {
namespace {

// The best set this processor has, or the one that DINO_D2_CPU_KERNELS names if the processor has it.
const Kernels& kernels() {
  static const Kernels& chosen = []() -> const Kernels& {
    const char* wanted = std::getenv("DINO_D2_CPU_KERNELS");
    const auto allowed = [&](const Kernels& k) { return wanted == nullptr || std::string(wanted) == k.name; };
#if defined(__x86_64__)
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (avx512 && allowed(avx512_kernels)) return avx512_kernels;
    if (avx2 && allowed(avx2_kernels)) return avx2_kernels;
#endif
    STD_TORCH_CHECK(allowed(generic_kernels), "DINO_D2_CPU_KERNELS=", wanted,
                    " is not among the kernels that this processor can run (generic, avx2, avx512)");
    return generic_kernels;
  }();
  return chosen;
}

template <class A>
class OwnedSampleLevels {
 public:
  OwnedSampleLevels(const std::vector<Level>& levels, const Sizes& sizes) {
    const int64_t padded = (sizes.samples() + kLargestVector - 1) / kLargestVector * kLargestVector;
    for (int64_t i = 0; i < padded; ++i) {
      const Level& level = levels[std::min(i, sizes.samples() - 1) / sizes.points];
      width_.push_back(static_cast<A>(level.width));
      height_.push_back(static_cast<A>(level.height));
      columns_.push_back(static_cast<Index<A>>(level.width));
      start_.push_back(static_cast<Index<A>>(level.start));
    }
  }
  SampleLevels<A> view() const {
    return {width_.data(), height_.data(), columns_.data(), start_.data(), static_cast<int64_t>(width_.size())};
  }

 private:
  std::vector<A> width_, height_;
  std::vector<Index<A>> columns_, start_;
};

// Calls f with (value type, accumulation type, kernels) for the dtype of the values.
template <class F>
auto with_dtype(ScalarType dtype, const F& f) {
  switch (dtype) {
    case ScalarType::Double:
      return f(double{}, double{}, kernels().float64);
    case ScalarType::BFloat16:
      return f(BFloat16{}, float{}, kernels().bfloat16);
    default:
      STD_TORCH_CHECK(dtype == ScalarType::Float, "no CPU kernel for values of ", toString(dtype),
                      " (there are float32, float64 and bfloat16)");
      return f(float{}, float{}, kernels().float32);
  }
}

ScalarType accumulation_type(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Kernels whose sums are float32 number the values of an image in 32 bits.
void check_count(const Sizes& sizes, ScalarType accumulate) {
  const int64_t count = sizes.tokens * sizes.heads * sizes.channels;
  STD_TORCH_CHECK(accumulate == ScalarType::Double || count < (int64_t(1) << 31), "an image has ", count,
                  " values, more than the 2^31 - 1 that the CPU kernels can number");
}

// In fresh memory the first touch of each small page can cost more than the writing, and a walk through many of them
// more than the reading; Linux may follow the hint to take large ones.
constexpr uintptr_t kLargePage = uintptr_t(2) << 20;

void prefer_large_pages([[maybe_unused]] void* memory, [[maybe_unused]] size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const uintptr_t begin = reinterpret_cast<uintptr_t>(memory);
  const uintptr_t first = (begin + kLargePage - 1) / kLargePage * kLargePage;
  const uintptr_t last = (begin + bytes) / kLargePage * kLargePage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

// Like new_empty.
Tensor new_result(const Tensor& like, const std::vector<int64_t>& shape, ScalarType dtype) {
  Tensor result = torch::stable::new_empty(like, shape, dtype);
  prefer_large_pages(result.mutable_data_ptr(), result.numel() * result.element_size());
  return result;
}

// Memory of one thread, which begins with a large page if it is as large as one.
template <class A>
class Scratch {
 public:
  explicit Scratch(int64_t count) {
    const size_t bytes = count * sizeof(A), unit = bytes < kLargePage ? 64 : kLargePage;
    const size_t rounded = (bytes + unit - 1) / unit * unit;
    memory_.reset(static_cast<A*>(std::aligned_alloc(unit, rounded)));
    STD_TORCH_CHECK(memory_ != nullptr, "no memory for ", bytes, " bytes");
    prefer_large_pages(memory_.get(), rounded);
  }
  A* get() const { return memory_.get(); }

 private:
  struct Free {
    void operator()(A* memory) const { std::free(memory); }
  };
  std::unique_ptr<A[], Free> memory_;
};

// Without a reference, positions are locations and weights attention weights; see Sampling.
template <class A>
Sampling<A> sampling_of(const Tensor& positions, const Tensor& weights, const std::optional<Tensor>& reference) {
  Sampling<A> sampling{};
  sampling.positions = static_cast<const A*>(positions.const_data_ptr());
  sampling.weights = static_cast<const A*>(weights.const_data_ptr());
  if (reference) {
    sampling.reference = static_cast<const A*>(reference->const_data_ptr());
    sampling.reference_size = reference->size(3);
  }
  return sampling;
}

std::optional<Tensor> contiguous(const std::optional<Tensor>& tensor) {
  return tensor ? std::optional<Tensor>(torch::stable::contiguous(*tensor)) : std::nullopt;
}

// One head's values lie heads * channels apart, which uses few of a cache's sets, and those of all heads may be more
// than the caches hold. Where tokens are visited more often than this it pays to copy a head's values side by side and
// to go through the queries head by head. Small maps, which the caches hold anyway, lose a few per cent.
constexpr int64_t kVisitsPerCopy = 2;

bool worth_copies(const Sizes& sizes, int64_t queries) {
  return queries * sizes.samples() > kVisitsPerCopy * sizes.tokens;
}

template <class V, class A>
void forward_by_head(const StridedForward<V, A>& problem, const SampleLevels<A>& levels, const KernelsOf<V, A>& set) {
  const Sizes& z = problem.sizes;
  torch::stable::parallel_for(0, z.batch * z.heads * z.queries, 16, [&](int64_t begin, int64_t end) {
    const Scratch<A> scratch(kScratchArrays * levels.padded);
    const Scratch<V> values(z.tokens * z.channels);
    while (begin < end) {
      const int64_t plane = begin / z.queries, first = begin % z.queries;
      const int64_t count = std::min(z.queries - first, end - begin);
      const int64_t image = plane / z.heads, head = plane % z.heads;
      const V* from = problem.value + image * problem.image_stride + head * problem.head_stride;
      for (int64_t token = 0; token < z.tokens; ++token) {
        std::copy_n(from + token * problem.token_stride, z.channels, values.get() + token * z.channels);
      }
      StridedForward<V, A> of_head = problem;
      of_head.value = values.get();
      of_head.token_stride = z.channels;
      of_head.image_stride = of_head.head_stride = 0;
      const int64_t query = image * z.queries + first;
      set.forward(of_head, levels, scratch.get(), {query, query + count, head, head + 1});
      begin += count;
    }
  });
}

Tensor forward(const Tensor& any_value, const std::vector<int64_t>& spatial_shapes, const Tensor& any_positions,
               const Tensor& any_weights, const std::optional<Tensor>& any_reference) {
  const std::vector<Level> levels = levels_of(spatial_shapes);
  const ScalarType accumulate = accumulation_type(any_value.scalar_type());
  const Sizes sizes = sizes_of(any_value, levels, any_positions, any_weights, accumulate);
  check_count(sizes, accumulate);
  const Tensor value = torch::stable::contiguous(any_value), positions = torch::stable::contiguous(any_positions),
               weights = torch::stable::contiguous(any_weights);
  const std::optional<Tensor> reference = contiguous(any_reference);
  if (reference) check_reference(*reference, sizes, accumulate);
  const std::vector<int64_t> output_shape{sizes.batch, sizes.queries, sizes.heads * sizes.channels};
  if (sizes.samples() * sizes.heads * sizes.channels == 0) return torch::stable::new_zeros(value, output_shape);
  Tensor output = new_result(value, output_shape, value.scalar_type());
  with_dtype(value.scalar_type(), [&](auto v, auto a, const auto& set) {
    using V = decltype(v);
    using A = decltype(a);
    const int64_t token_stride = sizes.heads * sizes.channels;
    const StridedForward<V, A> problem{
        {sizes, sampling_of<A>(positions, weights, reference), static_cast<const V*>(value.const_data_ptr()),
         static_cast<V*>(output.mutable_data_ptr())},
        sizes.tokens * token_stride,
        token_stride,
        sizes.channels};
    const OwnedSampleLevels<A> sample_levels(levels, sizes);
    // A thread copies every head that it has a share of, so its own visits count.
    const int64_t of_thread = sizes.batch * sizes.heads * sizes.queries / torch::stable::get_num_threads();
    if (worth_copies(sizes, std::min(sizes.queries, of_thread))) {
      forward_by_head(problem, sample_levels.view(), set);
      return;
    }
    torch::stable::parallel_for(0, sizes.batch * sizes.queries, 16, [&](int64_t begin, int64_t end) {
      const Scratch<A> scratch(kScratchArrays * sample_levels.view().padded);
      set.forward(problem, sample_levels.view(), scratch.get(), {begin, end, 0, sizes.heads});
    });
  });
  return output;
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& any_grad_output, const Tensor& any_value,
                                            const std::vector<int64_t>& spatial_shapes, const Tensor& any_positions,
                                            const Tensor& any_weights, const std::optional<Tensor>& any_reference,
                                            bool value_wanted, bool sampling_wanted) {
  // Without gradients of the sampling, values are not read and may be a stand-in of the same shape.
  const std::vector<Level> levels = levels_of(spatial_shapes);
  const ScalarType accumulate = accumulation_type(any_value.scalar_type());
  const Sizes sizes = sizes_of(any_value, levels, any_positions, any_weights, accumulate);
  check_count(sizes, accumulate);
  const Tensor value = sampling_wanted ? torch::stable::contiguous(any_value) : any_value;
  const Tensor grad_output = torch::stable::contiguous(any_grad_output),
               positions = torch::stable::contiguous(any_positions), weights = torch::stable::contiguous(any_weights);
  const std::optional<Tensor> reference = contiguous(any_reference);
  if (reference) check_reference(*reference, sizes, accumulate);
  check_grad_output(grad_output, value, sizes);
  const bool staged = worth_copies(sizes, sizes.queries);
  const auto gradient = [&](const Tensor& of, bool wanted, bool written_whole) {
    std::vector<int64_t> shape{0};
    if (wanted) {
      shape.clear();
      for (int64_t d = 0; d < of.dim(); ++d) shape.push_back(of.size(d));
    }
    return written_whole ? new_result(of, shape, accumulate)
                         : torch::stable::new_zeros(of, shape, accumulate);
  };
  Tensor grad_value = gradient(value, value_wanted, staged);
  Tensor grad_positions = gradient(positions, sampling_wanted, true);
  Tensor grad_weights = gradient(weights, sampling_wanted, true);
  if (sizes.samples() == 0) return {grad_value, grad_positions, grad_weights};
  with_dtype(value.scalar_type(), [&](auto v, auto a, const auto& set) {
    using V = decltype(v);
    using A = decltype(a);
    Sampling<A> sampling = sampling_of<A>(positions, weights, reference);
    if (sampling_wanted) {
      sampling.grad_positions = static_cast<A*>(grad_positions.mutable_data_ptr());
      sampling.grad_weights = static_cast<A*>(grad_weights.mutable_data_ptr());
    }
    const PlanesBackward<V, A> problem{{sizes, sampling, static_cast<const V*>(value.const_data_ptr()),
                                        static_cast<const V*>(grad_output.const_data_ptr()),
                                        value_wanted ? static_cast<A*>(grad_value.mutable_data_ptr()) : nullptr},
                                       staged};
    const OwnedSampleLevels<A> sample_levels(levels, sizes);
    const int64_t staging = staged ? 2 * sizes.tokens * std::min(sizes.channels, kMostChannels) : 0;
    torch::stable::parallel_for(0, sizes.batch * sizes.heads, 1, [&](int64_t begin, int64_t end) {
      const Scratch<A> scratch(kScratchArrays * sample_levels.view().padded + staging);
      for (int64_t plane = begin; plane < end; ++plane) {
        set.backward(problem, sample_levels.view(), scratch.get(), plane);
      }
    });
  });
  return {grad_value, grad_positions, grad_weights};
}

Tensor plain_forward(const Tensor& value, std::vector<int64_t> spatial_shapes, const Tensor& locations,
                     const Tensor& weights) {
  return forward(value, spatial_shapes, locations, weights, std::nullopt);
}

std::tuple<Tensor, Tensor, Tensor> plain_backward(const Tensor& grad_output, const Tensor& value,
                                                  std::vector<int64_t> spatial_shapes, const Tensor& locations,
                                                  const Tensor& weights, bool value_wanted, bool sampling_wanted,
                                                  bool /*deterministic: always*/) {
  return backward(grad_output, value, spatial_shapes, locations, weights, std::nullopt, value_wanted, sampling_wanted);
}

Tensor fused_forward(const Tensor& value, std::vector<int64_t> spatial_shapes, const Tensor& reference,
                     const Tensor& offsets, const Tensor& logits) {
  return forward(value, spatial_shapes, offsets, logits, reference);
}

std::tuple<Tensor, Tensor, Tensor> fused_backward(const Tensor& grad_output, const Tensor& value,
                                                  std::vector<int64_t> spatial_shapes, const Tensor& reference,
                                                  const Tensor& offsets, const Tensor& logits, bool value_wanted,
                                                  bool sampling_wanted, bool /*deterministic: always*/) {
  return backward(grad_output, value, spatial_shapes, offsets, logits, reference, value_wanted, sampling_wanted);
}

std::string kernel_name() { return kernels().name; }

std::string kernels_held() {
  std::string names = generic_kernels.name;
#if defined(__x86_64__)
  for (const Kernels* k : {&avx2_kernels, &avx512_kernels}) names += std::string(", ") + k->name;
#endif
  return names;
}

}  // namespace
}  // namespace dino_d2::cpu

STABLE_TORCH_LIBRARY_IMPL(dino_d2, CPU, m) {
  m.impl("ms_deform_attn", TORCH_BOX(&dino_d2::cpu::plain_forward));
  m.impl("ms_deform_attn_backward", TORCH_BOX(&dino_d2::cpu::plain_backward));
  m.impl("ms_deform_attn_fused", TORCH_BOX(&dino_d2::cpu::fused_forward));
  m.impl("ms_deform_attn_fused_backward", TORCH_BOX(&dino_d2::cpu::fused_backward));
}

STABLE_TORCH_LIBRARY_IMPL(dino_d2, CompositeExplicitAutograd, m) {
  m.impl("cpu_kernels", TORCH_BOX(&dino_d2::cpu::kernel_name));
  m.impl("cpu_kernels_held", TORCH_BOX(&dino_d2::cpu::kernels_held));
}
