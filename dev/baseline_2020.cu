// What dev/benchmark_op.py measures the CUDA kernels against: the design of 2020 that most DINOs still run, in its
// straightforward form. Forward: a thread per channel, which repeats all arithmetic of a sample. Backward: a block per
// query and head, an atomic addition per corner and channel, sums over channels made by one thread in shared memory.
// Single precision, softmax and locations outside.
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/shim_utils.h>

#include <tuple>
#include <vector>

namespace {

using torch::stable::Tensor;

constexpr int kMostLevels = 8;
constexpr int kChannels = 32;  // of a head
struct Problem {
  int batch, tokens, heads, channels, queries, levels, points;
  int height[kMostLevels], width[kMostLevels], start[kMostLevels];
};

struct Corner {
  float weight, slope_x, slope_y;
  int offset;  // from the first token of the level
  bool inside;
};

__device__ void corners_of(int height, int width, int stride, float x, float y, Corner (&corners)[4]) {
  const int left = static_cast<int>(floorf(x)), top = static_cast<int>(floorf(y));
  const float right_share = x - left, bottom_share = y - top;
  const int top_left = (top * width + left) * stride;
  for (int i = 0; i < 4; ++i) {
    const float across = i % 2 ? right_share : 1 - right_share, down = i / 2 ? bottom_share : 1 - bottom_share;
    corners[i].weight = across * down;
    corners[i].slope_x = i % 2 ? down : -down;
    corners[i].slope_y = i / 2 ? across : -across;
    corners[i].offset = top_left + (i % 2 ? stride : 0) + (i / 2 ? width * stride : 0);
    corners[i].inside = (i % 2 ? left + 1 < width : left >= 0) && (i / 2 ? top + 1 < height : top >= 0);
  }
}

__global__ void forward_kernel(Problem p, const float* value, const float* locations, const float* weights, float* output) {
  const int index = blockIdx.x * blockDim.x + threadIdx.x;
  if (index >= p.batch * p.queries * p.heads * p.channels) return;
  const int channel = index % p.channels, row = index / p.channels, head = row % p.heads;
  const int image = row / p.heads / p.queries, stride = p.heads * p.channels;
  const float* mine = value + image * p.tokens * stride + head * p.channels + channel;
  float sum = 0;
  for (int level = 0; level < p.levels; ++level) {
    const float* of_level = mine + p.start[level] * stride;
    for (int point = 0; point < p.points; ++point) {
      const int sample = (row * p.levels + level) * p.points + point;
      const float x = locations[2 * sample] * p.width[level] - 0.5f;
      const float y = locations[2 * sample + 1] * p.height[level] - 0.5f;
      if (!(x > -1 && y > -1 && x < p.width[level] && y < p.height[level])) continue;
      Corner corners[4];
      corners_of(p.height[level], p.width[level], stride, x, y, corners);
      float sampled = 0;
      for (const Corner& c : corners) {
        if (!c.inside) continue;
        sampled += c.weight * of_level[c.offset];
      }
      sum += weights[sample] * sampled;
    }
  }
  output[index] = sum;
}

// A thread per channel.
__global__ void backward_kernel(Problem p, const float* grad_output, const float* value, const float* locations,
                                const float* weights, float* grad_value, float* grad_locations, float* grad_weights) {
  __shared__ float shared[3 * kChannels];
  const int channel = threadIdx.x, row = blockIdx.x, head = row % p.heads, image = row / p.heads / p.queries;
  const int stride = p.heads * p.channels, offset = image * p.tokens * stride + head * p.channels + channel;
  const float grad = grad_output[row * p.channels + channel];
  for (int level = 0; level < p.levels; ++level) {
    const int height = p.height[level], width = p.width[level], of_level = offset + p.start[level] * stride;
    for (int point = 0; point < p.points; ++point) {
      const int sample = (row * p.levels + level) * p.points + point;
      const float x = locations[2 * sample] * width - 0.5f;
      const float y = locations[2 * sample + 1] * height - 0.5f;
      float sampled = 0, along_x = 0, along_y = 0;
      if (x > -1 && y > -1 && x < width && y < height) {
        Corner corners[4];
        corners_of(height, width, stride, x, y, corners);
        for (const Corner& c : corners) {
          if (!c.inside) continue;
          const int at = of_level + c.offset;
          atomicAdd(grad_value + at, grad * weights[sample] * c.weight);
          sampled += c.weight * value[at];
          along_x += c.slope_x * value[at];
          along_y += c.slope_y * value[at];
        }
      }
      shared[3 * channel] = grad * sampled;
      shared[3 * channel + 1] = grad * weights[sample] * width * along_x;
      shared[3 * channel + 2] = grad * weights[sample] * height * along_y;
      __syncthreads();
      if (channel == 0) {
        float sums[3] = {};
        for (int i = 0; i < kChannels; ++i) {
          for (int k = 0; k < 3; ++k) sums[k] += shared[3 * i + k];
        }
        grad_weights[sample] = sums[0];
        grad_locations[2 * sample] = sums[1];
        grad_locations[2 * sample + 1] = sums[2];
      }
      __syncthreads();
    }
  }
}

Problem problem_of(const Tensor& value, const std::vector<int64_t>& shapes, const Tensor& weights) {
  STD_TORCH_CHECK(shapes.size() / 2 <= kMostLevels, "at most 8 levels");
  STD_TORCH_CHECK(value.size(3) == kChannels, "32 channels a head");
  Problem p{};
  p.batch = value.size(0), p.tokens = value.size(1), p.heads = value.size(2), p.channels = value.size(3);
  p.queries = weights.size(1), p.levels = weights.size(3), p.points = weights.size(4);
  int start = 0;
  for (int i = 0; i < p.levels; ++i) {
    p.height[i] = shapes[2 * i], p.width[i] = shapes[2 * i + 1], p.start[i] = start;
    start += p.height[i] * p.width[i];
  }
  return p;
}

cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device(), &stream));
  return static_cast<cudaStream_t>(stream);
}

const float* numbers(const Tensor& tensor) { return static_cast<const float*>(tensor.const_data_ptr()); }

Tensor forward(const Tensor& value, std::vector<int64_t> shapes, const Tensor& locations, const Tensor& weights) {
  const Problem p = problem_of(value, shapes, weights);
  Tensor output = torch::stable::new_zeros(value, {p.batch, p.queries, p.heads * p.channels});
  const int threads = 1024, blocks = (p.batch * p.queries * p.heads * p.channels + threads - 1) / threads;
  forward_kernel<<<blocks, threads, 0, current_stream(value)>>>(p, numbers(value), numbers(locations), numbers(weights),
                                                                static_cast<float*>(output.mutable_data_ptr()));
  return output;
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_output, const Tensor& value, std::vector<int64_t> shapes,
                                            const Tensor& locations, const Tensor& weights) {
  const Problem p = problem_of(value, shapes, weights);
  Tensor grad_value = torch::stable::new_zeros(value, {p.batch, p.tokens, p.heads, p.channels});
  Tensor grad_locations =
      torch::stable::new_zeros(locations, {p.batch, p.queries, p.heads, p.levels, p.points, 2});
  Tensor grad_weights = torch::stable::new_zeros(weights, {p.batch, p.queries, p.heads, p.levels, p.points});
  backward_kernel<<<p.batch * p.queries * p.heads, kChannels, 0, current_stream(value)>>>(
      p, numbers(grad_output), numbers(value), numbers(locations), numbers(weights),
      static_cast<float*>(grad_value.mutable_data_ptr()), static_cast<float*>(grad_locations.mutable_data_ptr()),
      static_cast<float*>(grad_weights.mutable_data_ptr()));
  return {grad_value, grad_locations, grad_weights};
}

}  // namespace

STABLE_TORCH_LIBRARY(dino_d2_baseline_2020, m) {
  m.def("forward(Tensor value, int[] shapes, Tensor locations, Tensor weights) -> Tensor");
  m.def(
      "backward(Tensor grad_output, Tensor value, int[] shapes, Tensor locations, Tensor weights) "
      "-> (Tensor, Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(dino_d2_baseline_2020, CUDA, m) {
  m.impl("forward", TORCH_BOX(&forward));
  m.impl("backward", TORCH_BOX(&backward));
}
