// Schemas, and what Python needs to import the library. The kernels register themselves: see cpu/ and cuda/.
#include <Python.h>
#include <torch/csrc/stable/library.h>

// spatial_shapes is h0, w0, h1, w1, …: integers, so that export and torch.compile can trace them as symbols and
// no tensor is read back from a device. The starts of the levels follow from it.
STABLE_TORCH_LIBRARY(dino_d2, m) {
  m.def(
      "ms_deform_attn(Tensor value, SymInt[] spatial_shapes, Tensor sampling_locations, Tensor attention_weights) "
      "-> Tensor");
  // Gradients of value, sampling_locations and attention_weights, in the precision that they are accumulated
  // in; of shape (0,) where not wanted. deterministic: the same bits every time, which costs time on a GPU.
  m.def(
      "ms_deform_attn_backward(Tensor grad_output, Tensor value, SymInt[] spatial_shapes, Tensor sampling_locations, "
      "Tensor attention_weights, bool value_wanted, bool sampling_wanted, bool deterministic) "
      "-> (Tensor, Tensor, Tensor)");
  // The same with the locations and the softmax inside: see Sampling in problem.h. The reference has no gradient. On CUDA,
  // offsets and logits may be stored as the values are; so are their gradients then.
  m.def(
      "ms_deform_attn_fused(Tensor value, SymInt[] spatial_shapes, Tensor reference, Tensor sampling_offsets, "
      "Tensor attention_logits) -> Tensor");
  m.def(
      "ms_deform_attn_fused_backward(Tensor grad_output, Tensor value, SymInt[] spatial_shapes, Tensor reference, "
      "Tensor sampling_offsets, Tensor attention_logits, bool value_wanted, bool sampling_wanted, bool deterministic) "
      "-> (Tensor, Tensor, Tensor)");
  // For the doctor: the set of CPU kernels that this processor uses, the sets that the library holds, and what its
  // CUDA kernels were compiled for (nothing is registered behind it where there are none).
  m.def("cpu_kernels() -> str");
  m.def("cpu_kernels_held() -> str");
  m.def("accelerator_architectures() -> str");
}

// An empty module: importing it loads the library, which registers the operators.
PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
  return PyModule_Create(&definition);
}
