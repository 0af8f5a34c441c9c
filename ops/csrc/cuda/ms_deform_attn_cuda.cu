// The operators on CUDA tensors: checks, memory, launches. The kernels are in forward.cuh, backward.cuh and
// fixed_point.cuh.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/shim_utils.h>

#include <optional>
#include <string>
#include <tuple>

#include "../arguments.h"
#include "plan.h"

namespace dino_d2::cuda {
namespace {

cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device(), &stream));
  return static_cast<cudaStream_t>(stream);
}

void check_launch() {
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, "CUDA: ", cudaGetErrorString(error));
}

void check_same_device(const Tensor& value, const Tensor& other, const char* name) {
  STD_TORCH_CHECK(other.is_cuda() && other.get_device() == value.get_device(), name,
                  " must be on the device of value");
}

template <class F>
void with_dtype(ScalarType dtype, const F& f) {
  switch (dtype) {
    case ScalarType::Double:
      return f(double{}, double{});
    case ScalarType::Half:
      return f(__half{}, float{});
    case ScalarType::BFloat16:
      return f(__nv_bfloat16{}, float{});
    default:
      STD_TORCH_CHECK(dtype == ScalarType::Float, "no CUDA kernel for values of ", toString(dtype));
      return f(float{}, float{});
  }
}

ScalarType accumulation_type(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

bool is_aligned(const Tensor& tensor) { return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0; }

template <class T>
const T* read(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}
template <class T>
T* written(const Tensor& tensor) {
  return static_cast<T*>(const_cast<Tensor&>(tensor).mutable_data_ptr());
}

// The arguments of a call, contiguous, checked and on one device.
struct Arguments {
  Tensor value, positions, weights;
  std::optional<Tensor> reference;
  std::vector<Level> levels;
  ScalarType accumulate;
  Sizes sizes;

  // `value_is_read`: otherwise it may be a stand-in of which only the shape counts. Offsets and logits in 16 bits stay so
  // where there is a kernel for it, if `others_allow` it.
  Arguments(const Tensor& any_value, const std::vector<int64_t>& spatial_shapes, const Tensor& any_positions,
            const Tensor& any_weights, const std::optional<Tensor>& any_reference, bool value_is_read,
            bool others_allow)
      : value(value_is_read ? torch::stable::contiguous(any_value) : any_value),
        positions(torch::stable::contiguous(any_positions)),
        weights(torch::stable::contiguous(any_weights)),
        levels(levels_of(spatial_shapes)),
        accumulate(accumulation_type(value.scalar_type())) {
    const bool as_values = any_reference && positions.scalar_type() == value.scalar_type();
    sizes = sizes_of(value, levels, positions, weights, as_values ? value.scalar_type() : accumulate);
    STD_TORCH_CHECK(levels.size() <= kMostLevels, "the CUDA kernels take at most ", kMostLevels, " levels, not ",
                    levels.size());
    check_same_device(value, positions, "sampling positions");
    check_same_device(value, weights, "attention weights");
    const bool aligned = samples_are_aligned() && (!value_is_read || is_aligned(value));
    if (as_values && !(others_allow && is_known(sizes, aligned))) {
      positions = torch::stable::to(positions, accumulate);
      weights = torch::stable::to(weights, accumulate);
    }
    if (!any_reference) return;
    reference = torch::stable::contiguous(*any_reference);
    check_reference(*reference, sizes, accumulate);
    check_same_device(value, *reference, "reference");
  }

  bool samples_are_aligned() const { return is_aligned(positions) && is_aligned(weights); }

  template <class A, class S>
  Sampling<A, S> sampling() const {
    Sampling<A, S> result{};
    result.positions = read<S>(positions);
    result.weights = read<S>(weights);
    if (reference) {
      result.reference = read<A>(*reference);
      result.reference_size = reference->size(3);
    }
    return result;
  }

  // Calls f with the layout for these rows and the type of positions and weights. `aligned`: everything else is.
  template <class V, class A, class F>
  void with_layout(bool aligned, const F& f) const {
    if constexpr (sizeof(V) == 2) {
      if (positions.scalar_type() != accumulate) return f(KnownLayout<V>{}, V{});
    }
    cuda::with_layout<V>(sizes, aligned && samples_are_aligned(), [&](auto layout) { f(layout, A{}); });
  }
};

// Launches a kernel for rows of layout L: calls f(blocks, launch).
template <class L, class A, class F>
void launch(const Arguments& arguments, const F& f) {
  const Sizes& sizes = arguments.sizes;
  constexpr int64_t kMost = int64_t(1) << 31, kMostOffsets = int64_t(1) << 32;
  STD_TORCH_CHECK(sizes.queries < kMost && sizes.samples() < kMost, "2^31 queries or samples or more");
  STD_TORCH_CHECK(sizes.batch < (1 << 16) && sizes.heads < (1 << 16), "2^16 images or heads or more in one call");
  STD_TORCH_CHECK(sizes.tokens * sizes.heads * sizes.channels / L::VEC < kMostOffsets,
                  "an image of ", sizes.tokens * sizes.heads * sizes.channels, " values is too large");
  const Launch launch = plan_launch<L, A>(arguments.levels, sizes);
  f(dim3(launch.tiles.count, sizes.heads, sizes.batch), launch);
  check_launch();
}

Tensor forward(const Tensor& any_value, const std::vector<int64_t>& spatial_shapes, const Tensor& any_positions,
               const Tensor& any_weights, const std::optional<Tensor>& any_reference) {
  const Arguments in(any_value, spatial_shapes, any_positions, any_weights, any_reference, true, true);
  const torch::stable::accelerator::DeviceGuard guard(in.value.get_device());
  const std::vector<int64_t> shape{in.sizes.batch, in.sizes.queries, in.sizes.heads * in.sizes.channels};
  if (in.sizes.samples() == 0) return torch::stable::new_zeros(in.value, shape);
  const Tensor output = torch::stable::new_empty(in.value, shape);
  if (output.numel() == 0) return output;
  with_dtype(in.value.scalar_type(), [&](auto v, auto a) {
    using V = decltype(v);
    using A = decltype(a);
    in.with_layout<V, A>(is_aligned(in.value), [&](auto layout, auto s) {
      using L = decltype(layout);
      using S = decltype(s);
      const Forward<V, A, S> problem{in.sizes, in.sampling<A, S>(), read<V>(in.value), written<V>(output)};
      launch<L, A>(in, [&](dim3 blocks, const Launch& launch) {
        forward_kernel<V, A, L, S><<<blocks, launch.threads, launch.shared_bytes, current_stream(in.value)>>>(
            problem, plan_levels(in.levels, in.sizes.points), launch.tiles);
      });
    });
  });
  return output;
}

// Where gradients of values are collected if their sum must not depend on the order of its parts.
class FixedPointSums {
 public:
  FixedPointSums(const Arguments& in, const Tensor& grad_output)
      : sums_(torch::stable::new_zeros(in.value, shape_of(in.value), ScalarType::Long)),
        numbers_(torch::stable::new_zeros(in.value, {3}, ScalarType::Double)) {
    const cudaStream_t stream = current_stream(in.value);
    double* largest = written<double>(numbers_);
    find_largest(grad_output, largest, stream);
    const Tensor one = torch::stable::full({1}, 1.0, ScalarType::Double, std::nullopt, in.value.device());
    find_largest(in.reference ? one : in.weights, largest + 1, stream);  // a softmax sums to 1
    const int64_t additions = in.sizes.queries * (in.reference ? 1 : in.sizes.samples());
    scale_kernel<<<1, 1, 0, stream>>>(largest, static_cast<double>(additions), largest + 2);
    check_launch();
  }

  FixedPoint view() const { return {written<long long>(sums_), read<double>(numbers_) + 2}; }

  template <class A>
  void write(const Tensor& result) const {
    from_fixed_kernel<A><<<kBlocks, kMostThreads, 0, current_stream(result)>>>(
        read<long long>(sums_), read<double>(numbers_) + 2, result.numel(), written<A>(result));
    check_launch();
  }

 private:
  static constexpr int kBlocks = 1024;

  static std::vector<int64_t> shape_of(const Tensor& tensor) {
    std::vector<int64_t> shape;
    for (int64_t d = 0; d < tensor.dim(); ++d) shape.push_back(tensor.size(d));
    return shape;
  }
  static void find_largest(const Tensor& of, double* result, cudaStream_t stream) {
    with_dtype(of.scalar_type(), [&](auto t, auto) {
      largest_kernel<decltype(t)><<<kBlocks, kMostThreads, 0, stream>>>(read<decltype(t)>(of), of.numel(),
                                                                    reinterpret_cast<unsigned long long*>(result));
    });
    check_launch();
  }

  Tensor sums_, numbers_;  // numbers: the two largest magnitudes, the scale
};

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& any_grad_output, const Tensor& any_value,
                                            const std::vector<int64_t>& spatial_shapes, const Tensor& any_positions,
                                            const Tensor& any_weights, const std::optional<Tensor>& any_reference,
                                            bool value_wanted, bool sampling_wanted, bool deterministic) {
  const bool fixed = deterministic && value_wanted;
  const Tensor grad_output = torch::stable::contiguous(any_grad_output);
  const Arguments in(any_value, spatial_shapes, any_positions, any_weights, any_reference, sampling_wanted,
                     is_aligned(grad_output) && !fixed);
  check_grad_output(grad_output, in.value, in.sizes);
  check_same_device(in.value, grad_output, "grad_output");
  const torch::stable::accelerator::DeviceGuard guard(in.value.get_device());
  const auto gradient = [&](const Tensor& of, ScalarType dtype, bool wanted, bool written_whole) {
    std::vector<int64_t> shape{0};
    if (wanted) {
      shape.clear();
      for (int64_t d = 0; d < of.dim(); ++d) shape.push_back(of.size(d));
    }
    return written_whole ? torch::stable::new_empty(of, shape, dtype) : torch::stable::new_zeros(of, shape, dtype);
  };
  const ScalarType stored = in.positions.scalar_type();
  const bool nothing_to_add = in.weights.numel() == 0 || in.value.numel() == 0;
  const Tensor grad_value = gradient(in.value, in.accumulate, value_wanted, fixed && !nothing_to_add);
  const Tensor grad_positions = gradient(in.positions, stored, sampling_wanted, !nothing_to_add);
  const Tensor grad_weights = gradient(in.weights, stored, sampling_wanted, !nothing_to_add);
  const auto gradients = [&] {  // in the types of what they are gradients of
    const ScalarType given = any_positions.scalar_type();
    if (given == stored) return std::tuple{grad_value, grad_positions, grad_weights};
    return std::tuple{grad_value, torch::stable::to(grad_positions, given), torch::stable::to(grad_weights, given)};
  };
  if (nothing_to_add) return gradients();
  std::optional<FixedPointSums> sums;
  if (fixed) sums.emplace(in, grad_output);
  with_dtype(in.value.scalar_type(), [&](auto v, auto a) {
    using V = decltype(v);
    using A = decltype(a);
    const Levels levels = plan_levels(in.levels, in.sizes.points);
    const cudaStream_t stream = current_stream(in.value);
    const auto problem_of = [&](auto s) {
      using S = decltype(s);
      Sampling<A, S> sampling = in.sampling<A, S>();
      if (sampling_wanted) {
        sampling.grad_positions = written<S>(grad_positions);
        sampling.grad_weights = written<S>(grad_weights);
      }
      return Backward<V, A, S>{in.sizes, sampling, read<V>(in.value), read<V>(grad_output),
                               value_wanted ? written<A>(grad_value) : nullptr};
    };
    if (fixed) {
      launch<AnyLayout, A>(in, [&](dim3 blocks, const Launch& launch) {
        backward_kernel<V, A, AnyLayout, true><<<blocks, launch.threads, launch.shared_bytes, stream>>>(
            problem_of(A{}), levels, launch.tiles, sums->view());
      });
      sums->write<A>(grad_value);
      return;
    }
    const bool aligned = is_aligned(grad_output) && (!sampling_wanted || is_aligned(in.value));
    in.with_layout<V, A>(aligned, [&](auto layout, auto s) {
      using L = decltype(layout);
      launch<L, A>(in, [&](dim3 blocks, const Launch& launch) {
        backward_kernel<V, A, L, false, decltype(s)><<<blocks, launch.threads, launch.shared_bytes, stream>>>(
            problem_of(s), levels, launch.tiles, FixedPoint{});
      });
    });
  });
  return gradients();
}

Tensor plain_forward(const Tensor& value, std::vector<int64_t> spatial_shapes, const Tensor& locations,
                     const Tensor& weights) {
  return forward(value, spatial_shapes, locations, weights, std::nullopt);
}

std::tuple<Tensor, Tensor, Tensor> plain_backward(const Tensor& grad_output, const Tensor& value,
                                                  std::vector<int64_t> spatial_shapes, const Tensor& locations,
                                                  const Tensor& weights, bool value_wanted, bool sampling_wanted,
                                                  bool deterministic) {
  return backward(grad_output, value, spatial_shapes, locations, weights, std::nullopt, value_wanted, sampling_wanted,
                  deterministic);
}

Tensor fused_forward(const Tensor& value, std::vector<int64_t> spatial_shapes, const Tensor& reference,
                     const Tensor& offsets, const Tensor& logits) {
  return forward(value, spatial_shapes, offsets, logits, reference);
}

std::tuple<Tensor, Tensor, Tensor> fused_backward(const Tensor& grad_output, const Tensor& value,
                                                  std::vector<int64_t> spatial_shapes, const Tensor& reference,
                                                  const Tensor& offsets, const Tensor& logits, bool value_wanted,
                                                  bool sampling_wanted, bool deterministic) {
  return backward(grad_output, value, spatial_shapes, offsets, logits, reference, value_wanted, sampling_wanted,
                  deterministic);
}

#define DINO_D2_TEXT_OF(x) #x
#define DINO_D2_TEXT(x) DINO_D2_TEXT_OF(x)

// What nvcc put into the binary, as setup.py asked for: sm_80+sm_90+compute_90, machine code and portable code, which
// nvcc's own __CUDA_ARCH_LIST__ does not tell apart.
std::string architectures() { return DINO_D2_TEXT(DINO_D2_CUDA_CODE); }

}  // namespace
}  // namespace dino_d2::cuda

STABLE_TORCH_LIBRARY_IMPL(dino_d2, CUDA, m) {
  m.impl("ms_deform_attn", TORCH_BOX(&dino_d2::cuda::plain_forward));
  m.impl("ms_deform_attn_backward", TORCH_BOX(&dino_d2::cuda::plain_backward));
  m.impl("ms_deform_attn_fused", TORCH_BOX(&dino_d2::cuda::fused_forward));
  m.impl("ms_deform_attn_fused_backward", TORCH_BOX(&dino_d2::cuda::fused_backward));
}

STABLE_TORCH_LIBRARY_IMPL(dino_d2, CompositeExplicitAutograd, m) {
  m.impl("accelerator_architectures", TORCH_BOX(&dino_d2::cuda::architectures));
}
