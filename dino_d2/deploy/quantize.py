"""Products of an ONNX file in 8-bit integers (`TEST.QUANTIZE`), by onnxruntime's dynamic quantization."""

from __future__ import annotations

import logging
from pathlib import Path

import onnx
from onnxruntime.quantization import quantize_dynamic

from dino_d2.modeling.int8 import QuantizableLinear

from .check import ExportError

CLASS_HIERARCHY = "pkg.torch.onnx.class_hierarchy"  # written by torch.onnx: the modules that a node is of


def quantize_file(path: Path) -> None:
    """Let a file multiply in 8-bit integers where the model has `QuantizableLinear`.

    Weights get a scale for each output channel and 7 bits: of 8, the sum of two products can exceed the 16 bits in
    which processors without VNNI add them. Inputs are rounded at every call.

    Args:
        path: exported by torch.onnx; replaced.

    Raises:
        ExportError: none of the products can be told to be such a layer's.
    """
    model = onnx.load(path)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    products = [node.name for node in model.graph.node if node.op_type == "MatMul" and _is_quantizable(node)]
    if not products:  # onnxruntime would take an empty list for all nodes
        raise ExportError(f"no product can be quantized: no node's {CLASS_HIERARCHY} names QuantizableLinear")
    level = logging.getLogger().level
    logging.getLogger().setLevel(logging.ERROR)  # it warns on the root logger that shapes were not inferred
    try:
        quantize_dynamic(
            model,
            path,
            op_types_to_quantize=["MatMul"],
            nodes_to_quantize=products,
            per_channel=True,
            reduce_range=True,
        )
    finally:
        logging.getLogger().setLevel(level)
    model = onnx.load(path)
    del model.graph.value_info[:]  # shapes that it inferred for the sizes that were traced; others would be refused
    onnx.helper.set_model_props(model, metadata)
    onnx.save(model, path)


def _is_quantizable(node: onnx.NodeProto) -> bool:
    name = f"{QuantizableLinear.__module__}.{QuantizableLinear.__qualname__}"
    return any(name in entry.value for entry in node.metadata_props if entry.key == CLASS_HIERARCHY)
