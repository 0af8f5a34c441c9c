// The CPU kernels of 16-byte vectors in a program of its own: reads a problem from one file and writes results to another.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "../../../ops/csrc/cpu/kernels.h"

using namespace dino_d2;
using namespace dino_d2::cpu;

namespace {

struct Header {  // as the test writes it
  int64_t bytes;  // of a value: 4, 8, or 2 for bfloat16
  int64_t batch, tokens, heads, channels, queries, levels, points, reference_size, staged;
};

template <class T>
std::vector<T> read(std::FILE* file, int64_t count) {
  std::vector<T> result(count);
  if (std::fread(result.data(), sizeof(T), count, file) != static_cast<size_t>(count)) std::abort();
  return result;
}

template <class T>
void write(std::FILE* file, const std::vector<T>& x) {
  if (std::fwrite(x.data(), sizeof(T), x.size(), file) != x.size()) std::abort();
}

template <class V, class A>
void run(const Header& h, const KernelsOf<V, A>& kernels, std::FILE* in, std::FILE* out) {
  const Sizes sizes{h.batch, h.tokens, h.heads, h.channels, h.queries, h.levels, h.points};
  const int64_t samples = h.batch * h.queries * h.heads * sizes.samples(), values = h.batch * h.tokens * h.heads * h.channels;
  const int64_t outputs = h.batch * h.queries * h.heads * h.channels;
  const std::vector<int64_t> shapes = read<int64_t>(in, 2 * h.levels);
  const std::vector<V> value = read<V>(in, values);
  const std::vector<A> positions = read<A>(in, 2 * samples), weights = read<A>(in, samples);
  const std::vector<A> reference = read<A>(in, h.batch * h.queries * h.levels * h.reference_size);
  const std::vector<V> grad_output = read<V>(in, outputs);
  std::vector<V> output(outputs);
  std::vector<A> grad_value(values), grad_positions(2 * samples), grad_weights(samples);

  const int64_t padded = (sizes.samples() + kLargestVector - 1) / kLargestVector * kLargestVector;
  std::vector<A> width(padded), height(padded);
  std::vector<Index<A>> columns(padded), start(padded);
  for (int64_t i = 0; i < padded; ++i) {
    const int64_t level = std::min(i, sizes.samples() - 1) / h.points;
    for (int64_t l = 0; l < level; ++l) start[i] += shapes[2 * l] * shapes[2 * l + 1];
    height[i] = shapes[2 * level];
    width[i] = columns[i] = shapes[2 * level + 1];
  }
  const SampleLevels<A> levels{width.data(), height.data(), columns.data(), start.data(), padded};
  std::vector<A> scratch(kScratchArrays * padded + 2 * h.tokens * std::min(h.channels, kMostChannels));
  Sampling<A> sampling{positions.data(), weights.data(), h.reference_size ? reference.data() : nullptr, h.reference_size,
                       grad_positions.data(), grad_weights.data()};
  const int64_t token_stride = h.heads * h.channels;
  const StridedForward<V, A> forward{
      {sizes, sampling, value.data(), output.data()}, h.tokens * token_stride, token_stride, h.channels};
  const int64_t at_once = h.staged ? 1 : h.heads;
  for (int64_t head = 0; head < h.heads; head += at_once) {
    kernels.forward(forward, levels, scratch.data(), {0, h.batch * h.queries, head, head + at_once});
  }
  const PlanesBackward<V, A> backward{
      {sizes, sampling, value.data(), grad_output.data(), grad_value.data()}, h.staged != 0};
  for (int64_t plane = 0; plane < h.batch * h.heads; ++plane) kernels.backward(backward, levels, scratch.data(), plane);
  write(out, output);
  write(out, grad_value);
  write(out, grad_positions);
  write(out, grad_weights);
}

}  // namespace

int main(int, char** arguments) {
  std::FILE *in = std::fopen(arguments[1], "rb"), *out = std::fopen(arguments[2], "wb");
  const Header header = read<Header>(in, 1)[0];
  if (header.bytes == 8) {
    run(header, generic_kernels.float64, in, out);
  } else if (header.bytes == 4) {
    run(header, generic_kernels.float32, in, out);
  } else {
    run(header, generic_kernels.bfloat16, in, out);
  }
  return std::fclose(in) | std::fclose(out);
}
