// The operators on CUDA tensors: a group of lanes works on one (batch, query, head), each lane on every
// `lanes`-th channel. Sampling arithmetic is repeated by each lane; sums over channels go through shuffles.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <string>
#include <tuple>

#include "../arguments.h"

namespace dino_d2::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kMaxLevels = 16;

struct Levels {  // travels as a kernel argument, so that nothing is copied to the device
  int height[kMaxLevels];
  int width[kMaxLevels];
  int start[kMaxLevels];
};

template <class A>
__device__ __forceinline__ A widen(A x) { return x; }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class V>
struct Narrow {
  template <class A>
  static __device__ __forceinline__ V from(A x) { return x; }
};
template <>
struct Narrow<__half> {
  static __device__ __forceinline__ __half from(float x) { return __float2half(x); }
};
template <>
struct Narrow<__nv_bfloat16> {
  static __device__ __forceinline__ __nv_bfloat16 from(float x) { return __float2bfloat16(x); }
};

// The four corners of one sample (0 = top left, 1 = top right, 2 = bottom left, 3 = bottom right).
template <class A>
struct Sample {
  bool inside;
  A left, right, top, bottom;    // bilinear shares, 0 for a column or row outside
  A has_left, has_right, has_top, has_bottom;
  int token[4];                  // a corner outside is read at its neighbour inside

  __device__ Sample(A location_x, A location_y, int height, int width, int start) {
    A x = location_x * width - A(0.5), y = location_y * height - A(0.5);
    inside = x > A(-1) && y > A(-1) && x < width && y < height;  // false for NaN
    if (!inside) return;
    const A x0 = floor(x), y0 = floor(y);
    has_left = x0 >= 0;
    has_top = y0 >= 0;
    has_right = x0 + 1 < width;
    has_bottom = y0 + 1 < height;
    left = (1 - (x - x0)) * has_left;
    right = (x - x0) * has_right;
    top = (1 - (y - y0)) * has_top;
    bottom = (y - y0) * has_bottom;
    const int x_low = max(static_cast<int>(x0), 0), x_high = min(static_cast<int>(x0) + 1, width - 1);
    const int y_low = max(static_cast<int>(y0), 0), y_high = min(static_cast<int>(y0) + 1, height - 1);
    token[0] = start + y_low * width + x_low;
    token[1] = start + y_low * width + x_high;
    token[2] = start + y_high * width + x_low;
    token[3] = start + y_high * width + x_high;
  }
};

template <class V, class A>
__global__ void __launch_bounds__(kThreads)
    forward_kernel(const Forward<V, A> p, const Levels levels, const int lanes) {
  const Sizes& z = p.sizes;
  const int lane = threadIdx.x % lanes;
  const int64_t row = (int64_t(blockIdx.x) * kThreads + threadIdx.x) / lanes;  // (batch, query, head)
  if (row >= z.batch * z.queries * z.heads) return;
  const int64_t head = row % z.heads, image = row / z.heads / z.queries;
  const int64_t token_stride = z.heads * z.channels;
  const V* value = p.value + image * z.tokens * token_stride + head * z.channels;
  const int64_t samples = z.samples();
  for (int64_t c = lane; c < z.channels; c += lanes) {
    A sum = 0;
    for (int64_t i = 0; i < samples; ++i) {
      const int level = i / z.points;
      const int64_t at = row * samples + i;
      const Sample<A> s(p.sampling.positions[2 * at], p.sampling.positions[2 * at + 1], levels.height[level], levels.width[level],
                        levels.start[level]);
      if (!s.inside) continue;
      const A upper = s.left * widen(value[s.token[0] * token_stride + c]) +
                      s.right * widen(value[s.token[1] * token_stride + c]);
      const A lower = s.left * widen(value[s.token[2] * token_stride + c]) +
                      s.right * widen(value[s.token[3] * token_stride + c]);
      sum += p.sampling.weights[at] * (s.top * upper + s.bottom * lower);
    }
    p.output[row * z.channels + c] = Narrow<V>::from(sum);
  }
}

template <class A>
__device__ __forceinline__ A sum_over_lanes(A x, int lanes) {
  for (int step = lanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}

template <class V, class A>
__global__ void __launch_bounds__(kThreads)
    backward_kernel(const Backward<V, A> p, const Levels levels, const int lanes) {
  const Sizes& z = p.sizes;
  const int lane = threadIdx.x % lanes;
  const int64_t row = (int64_t(blockIdx.x) * kThreads + threadIdx.x) / lanes;
  // Lanes past the end stay for the shuffles, with nothing to add.
  const bool active = row < z.batch * z.queries * z.heads;
  const int64_t safe_row = active ? row : 0;
  const int64_t head = safe_row % z.heads, image = safe_row / z.heads / z.queries;
  const int64_t token_stride = z.heads * z.channels;
  const int64_t offset = image * z.tokens * token_stride + head * z.channels;
  const V* value = p.value + offset;
  const V* grad_output = p.grad_output + safe_row * z.channels;
  const int64_t samples = z.samples();
  for (int64_t i = 0; i < samples; ++i) {
    const int level = i / z.points;
    const int64_t at = safe_row * samples + i;
    const A attention = p.sampling.weights[at];
    const int height = levels.height[level], width = levels.width[level];
    const Sample<A> s(p.sampling.positions[2 * at], p.sampling.positions[2 * at + 1], height, width, levels.start[level]);
    A dot[4] = {0, 0, 0, 0};
    if (active && s.inside) {
      const A share[4] = {attention * s.top * s.left, attention * s.top * s.right, attention * s.bottom * s.left,
                          attention * s.bottom * s.right};
      for (int64_t c = lane; c < z.channels; c += lanes) {
        const A grad = widen(grad_output[c]);
        for (int corner = 0; corner < 4; ++corner) {
          const int64_t index = s.token[corner] * token_stride + c;
          if (p.sampling.grad_weights) dot[corner] += grad * widen(value[index]);
          if (p.grad_value) atomicAdd(p.grad_value + offset + index, share[corner] * grad);
        }
      }
    }
    if (!p.sampling.grad_weights) continue;
    for (int corner = 0; corner < 4; ++corner) dot[corner] = sum_over_lanes(dot[corner], lanes);
    if (!active || lane != 0) continue;
    A grad_weight = 0, grad_x = 0, grad_y = 0;
    if (s.inside) {
      const A upper = s.left * dot[0] + s.right * dot[1], lower = s.left * dot[2] + s.right * dot[3];
      grad_weight = s.top * upper + s.bottom * lower;
      grad_y = attention * height * (s.has_bottom * lower - s.has_top * upper);
      grad_x = attention * width *
               (s.has_right * (s.top * dot[1] + s.bottom * dot[3]) - s.has_left * (s.top * dot[0] + s.bottom * dot[2]));
    }
    p.sampling.grad_weights[at] = grad_weight;
    p.sampling.grad_positions[2 * at] = grad_x;
    p.sampling.grad_positions[2 * at + 1] = grad_y;
  }
}

Levels to_device(const std::vector<Level>& levels) {
  STD_TORCH_CHECK(levels.size() <= kMaxLevels, "the CUDA kernels take at most ", kMaxLevels, " levels, not ",
                  levels.size());
  Levels result{};
  for (size_t i = 0; i < levels.size(); ++i) {
    result.height[i] = static_cast<int>(levels[i].height);
    result.width[i] = static_cast<int>(levels[i].width);
    result.start[i] = static_cast<int>(levels[i].start);
  }
  return result;
}

int lanes_for(int64_t channels) {
  int lanes = 1;
  while (lanes < 32 && lanes < channels) lanes *= 2;
  return lanes;
}

unsigned blocks_for(const Sizes& sizes, int lanes) {
  const int64_t threads = sizes.batch * sizes.queries * sizes.heads * lanes;
  const int64_t blocks = (threads + kThreads - 1) / kThreads;
  STD_TORCH_CHECK(blocks < (int64_t(1) << 31), "too many queries for one launch");
  return static_cast<unsigned>(blocks);
}

cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device(), &stream));
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
auto with_dtype(ScalarType dtype, const F& f) {
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

Tensor forward(const Tensor& any_value, std::vector<int64_t> spatial_shapes, const Tensor& any_locations,
               const Tensor& any_weights) {
  const Tensor value = torch::stable::contiguous(any_value), locations = torch::stable::contiguous(any_locations),
               weights = torch::stable::contiguous(any_weights);
  const std::vector<Level> levels = levels_of(spatial_shapes);
  const Sizes sizes = sizes_of(value, levels, locations, weights, accumulation_type(value.scalar_type()));
  check_same_device(value, locations, "sampling_locations");
  check_same_device(value, weights, "attention_weights");
  const torch::stable::accelerator::DeviceGuard guard(value.get_device());
  Tensor output = torch::stable::new_empty(value, {sizes.batch, sizes.queries, sizes.heads * sizes.channels});
  if (output.numel() == 0) return output;
  with_dtype(value.scalar_type(), [&](auto v, auto a) {
    using V = decltype(v);
    using A = decltype(a);
    Sampling<A> sampling{};
    sampling.positions = static_cast<const A*>(locations.const_data_ptr());
    sampling.weights = static_cast<const A*>(weights.const_data_ptr());
    const Forward<V, A> problem{sizes, sampling, static_cast<const V*>(value.const_data_ptr()),
                                static_cast<V*>(output.mutable_data_ptr())};
    const int lanes = lanes_for(sizes.channels);
    forward_kernel<V, A><<<blocks_for(sizes, lanes), kThreads, 0, current_stream(value)>>>(problem, to_device(levels),
                                                                                          lanes);
    check_launch();
  });
  return output;
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& any_grad_output, const Tensor& any_value,
                                            std::vector<int64_t> spatial_shapes, const Tensor& any_locations,
                                            const Tensor& any_weights, bool value_wanted, bool sampling_wanted) {
  // Without gradients of the sampling, values are not read and may be a stand-in of the same shape.
  const Tensor value = sampling_wanted ? torch::stable::contiguous(any_value) : any_value;
  const Tensor grad_output = torch::stable::contiguous(any_grad_output),
               locations = torch::stable::contiguous(any_locations), weights = torch::stable::contiguous(any_weights);
  const std::vector<Level> levels = levels_of(spatial_shapes);
  const ScalarType accumulate = accumulation_type(value.scalar_type());
  const Sizes sizes = sizes_of(value, levels, locations, weights, accumulate);
  check_grad_output(grad_output, value, sizes);
  check_same_device(value, locations, "sampling_locations");
  check_same_device(value, weights, "attention_weights");
  check_same_device(value, grad_output, "grad_output");
  const torch::stable::accelerator::DeviceGuard guard(value.get_device());
  const auto shape = [](const Tensor& of, bool wanted) {
    std::vector<int64_t> result{0};
    if (wanted) {
      result.clear();
      for (int64_t d = 0; d < of.dim(); ++d) result.push_back(of.size(d));
    }
    return result;
  };
  Tensor grad_value = torch::stable::new_zeros(value, shape(value, value_wanted), accumulate);
  Tensor grad_locations = torch::stable::new_empty(locations, shape(locations, sampling_wanted));
  Tensor grad_weights = torch::stable::new_empty(weights, shape(weights, sampling_wanted));
  if (weights.numel() == 0) return {grad_value, grad_locations, grad_weights};
  with_dtype(value.scalar_type(), [&](auto v, auto a) {
    using V = decltype(v);
    using A = decltype(a);
    Sampling<A> sampling{};
    sampling.positions = static_cast<const A*>(locations.const_data_ptr());
    sampling.weights = static_cast<const A*>(weights.const_data_ptr());
    if (sampling_wanted) {
      sampling.grad_positions = static_cast<A*>(grad_locations.mutable_data_ptr());
      sampling.grad_weights = static_cast<A*>(grad_weights.mutable_data_ptr());
    }
    const Backward<V, A> problem{sizes,
                                 sampling,
                                 static_cast<const V*>(value.const_data_ptr()),
                                 static_cast<const V*>(grad_output.const_data_ptr()),
                                 value_wanted ? static_cast<A*>(grad_value.mutable_data_ptr()) : nullptr,
                                 /*staged=*/false};
    const int lanes = lanes_for(sizes.channels);
    backward_kernel<V, A><<<blocks_for(sizes, lanes), kThreads, 0, current_stream(value)>>>(problem, to_device(levels),
                                                                                           lanes);
    check_launch();
  });
  return {grad_value, grad_locations, grad_weights};
}

std::string architectures() {
  std::string names;
  for (const int architecture : {__CUDA_ARCH_LIST__}) {  // ten times the number that NVIDIA writes with a point
    if (!names.empty()) names += ", ";
    names += std::to_string(architecture / 100) + "." + std::to_string(architecture / 10 % 10);
  }
  return "compute capability " + names;
}

}  // namespace
}  // namespace dino_d2::cuda

STABLE_TORCH_LIBRARY_IMPL(dino_d2, CUDA, m) {
  m.impl("ms_deform_attn", TORCH_BOX(&dino_d2::cuda::forward));
  m.impl("ms_deform_attn_backward", TORCH_BOX(&dino_d2::cuda::backward));
}

STABLE_TORCH_LIBRARY_IMPL(dino_d2, CompositeExplicitAutograd, m) {
  m.impl("accelerator_architectures", TORCH_BOX(&dino_d2::cuda::architectures));
}
