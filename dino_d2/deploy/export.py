"""Export DINO to ONNX with standard operators, or to a `torch.export` program."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx_ir
import onnxruntime
import onnxscript.optimizer
import torch
from detectron2.config import CfgNode
from onnxscript import opset18
from torch import Tensor
from torch.export import Dim, ExportedProgram

from dino_d2.meta_arch import DINO
from dino_d2.modeling.build import int8_of_config
from dino_d2.ops import compiled, ms_deform_attn_fused

from .check import FULL, ROUNDED, ExportError, Outputs, check_agreement, example_inputs
from .exportable import ExportableDINO
from .onnx_predictor import METADATA_KEY
from .quantize import quantize_file
from .sampling import ms_deform_attn_for_onnx, ms_deform_attn_gather

logger = logging.getLogger(__name__)

OPSET = 18
FLOAT, INT32, INT64 = 1, 6, 7  # ONNX's codes for the types
INPUTS = ("pixels", "image_sizes", "original_sizes")
OUTPUTS = ("boxes", "scores", "classes", "tokens")
TRACED = (2, 101, 139)  # batch, height, width: all different, also from other sizes


def export_onnx(cfg: CfgNode, model: DINO, path: Path, half: bool) -> str:
    """Export `model` to ONNX, opset 18, with dynamic height, width and batch size.

    Args:
        cfg: of the model; its preprocessing settings are stored in the file's metadata for `OnnxPredictor`. With
            `TEST.QUANTIZE` int8 the file multiplies in 8-bit integers where the model does.
        path: written only if the file agrees with `model`.
        half: weights and feature maps in float16.

    Returns:
        a report on the comparison with the model.

    Raises:
        ExportError: the config has unsupported settings, the model cannot be traced, or the results differ.
    """
    check_exportable(cfg)
    int8 = int8_of_config(cfg)
    if int8 and half:
        raise ExportError("TEST.QUANTIZE int8 and --half are not supported in one file. Choose one of them")
    program = trace(ExportableDINO(model, ms_deform_attn_for_onnx, half))
    logger.info("converting to ONNX")
    with _without_stack_traces():
        onnx_program = torch.onnx.export(
            program,
            input_names=INPUTS,
            output_names=OUTPUTS,
            opset_version=OPSET,
            custom_translation_table={
                torch.ops.dino_d2.is_duplicate.default: _is_duplicate_in_onnx,
                torch.ops.dino_d2.weighted_rows.default: _weighted_rows_in_onnx,
            },
            optimize=False,  # slow, and runtimes optimise themselves
            verbose=False,
        )
    onnxscript.optimizer.fold_constants(onnx_program.model)
    onnxscript.optimizer.remove_unused_nodes(onnx_program.model)
    _name_dynamic_sizes(onnx_program.model.graph)
    onnx_program.model.metadata_props[METADATA_KEY] = json.dumps(
        {
            "input_format": cfg.INPUT.FORMAT,
            "min_size": cfg.INPUT.MIN_SIZE_TEST,
            "max_size": cfg.INPUT.MAX_SIZE_TEST,
            "class_names": model.assumptions.class_names,
            "score_threshold": model.assumptions.score_threshold,
        }
    )
    with _replaced_after_success(path) as temporary:
        logger.info("writing")
        onnx_program.save(temporary, external_data=False)
        if int8:
            logger.info("quantizing")
            quantize_file(temporary)
        logger.info("comparing with PyTorch")
        return check_agreement(model, load_onnx(temporary), ROUNDED if half or int8 else FULL)


def export_program(cfg: CfgNode, model: DINO, path: Path, half: bool) -> str:
    """Export `model` to a `torch.export` program; arguments, result and errors as in :func:`export_onnx`.

    Uses the compiled op if the model does; then run `import dino_d2` before loading the program.
    """
    check_exportable(cfg)
    if int8_of_config(cfg):
        raise ExportError("TEST.QUANTIZE int8 is not supported in torch.export programs. Set it to none, or write ONNX")
    uses_compiled = cfg.MODEL.DINO.OP != "reference" and compiled(model.device.type)
    op = ms_deform_attn_fused if uses_compiled else ms_deform_attn_gather
    program = trace(ExportableDINO(model, op, half))
    with _replaced_after_success(path) as temporary:
        logger.info("writing")
        torch.export.save(program, temporary)
        logger.info("comparing with PyTorch")
        return check_agreement(model, load_program(temporary), ROUNDED if half else FULL)


def trace(exportable: ExportableDINO) -> ExportedProgram:
    """Trace the model for any image and batch size.

    Raises:
        ExportError: part of the model, such as the backbone, does not support dynamic sizes.
    """
    logger.info("tracing")
    batch, height, width = TRACED
    device = exportable.model.device
    example = example_inputs(batch, height, width, device)
    dynamic = ({0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}, {0: Dim.DYNAMIC}, {0: Dim.DYNAMIC})
    no_specialization = torch.fx.experimental._config.patch(backed_size_oblivious=True)  # do not specialise on size 1
    try:
        with torch.no_grad(), no_specialization, _without_stack_traces():
            return torch.export.export(exportable, example, dynamic_shapes=dynamic)
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        raise ExportError(
            f"The model (backbone: {type(exportable.model.backbone).__name__}) cannot be traced with dynamic sizes: "
            f"{error}"
        ) from error


def check_exportable(cfg: CfgNode) -> None:
    """Raise ExportError for settings that change predictions but are not supported by exported files."""
    if cfg.TEST.AUG.ENABLED:
        raise ExportError("TEST.AUG.ENABLED is not supported in exported files. Set it to False")
    if cfg.TEST.AMP.ENABLED:
        raise ExportError(
            "TEST.AMP.ENABLED is not supported in exported files. Set it to False, and use --half for float16"
        )
    if cfg.MODEL.DINO.QUERY_SCORE_THRESHOLD > 0:
        raise ExportError(
            "MODEL.DINO.QUERY_SCORE_THRESHOLD is not supported in exported files, which use a fixed number of queries. "
            "Set it to 0, and choose MODEL.DINO.NUM_QUERIES"
        )
    if len(cfg.MODEL.PIXEL_MEAN) != 3:
        raise ExportError(f"MODEL.PIXEL_MEAN has {len(cfg.MODEL.PIXEL_MEAN)} numbers: only colour images are exported")
    if cfg.INPUT.FORMAT not in ("RGB", "BGR"):
        raise ExportError(f"INPUT.FORMAT is {cfg.INPUT.FORMAT}: an exported file takes RGB or BGR")


def load_onnx(path: Path) -> Callable[..., Outputs]:
    """Load the file as a function of tensors."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only; float16 causes many warnings about constant folding
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(*inputs: Tensor) -> Outputs:
        arrays = {name: tensor.cpu().numpy() for name, tensor in zip(INPUTS, inputs, strict=True)}
        return tuple(torch.from_numpy(array).to(inputs[0].device) for array in session.run(OUTPUTS, arrays))

    return run


def load_program(path: Path) -> Callable[..., Outputs]:
    """Load a program written by :func:`export_program` as a function of tensors, for any batch size."""
    # Guards would require a batch of at least 2, because tracing tested for 1 to choose the memory layout.
    return torch.export.load(path).module(check_guards=False)


def _is_duplicate_in_onnx(boxes, scores, classes, num_classes: int, iou_threshold: float):
    """`is_duplicate` in ONNX, whose NonMaxSuppression needs scores for each class: 0 for boxes of other classes."""
    op = opset18
    all_classes = op.Unsqueeze(op.Range(0, num_classes, 1), [0, 2])
    of_class = op.Equal(op.Unsqueeze(classes, [1]), op.Cast(all_classes, to=INT64))  # (B, K, n)
    scores_of_class = op.Where(of_class, op.Unsqueeze(scores, [1]), op.Constant(value_float=0.0))
    count = op.Shape(scores, start=1)
    keep = op.NonMaxSuppression(
        boxes, scores_of_class, count,
        op.Constant(value_floats=[iou_threshold]), op.Constant(value_floats=[0.0]),
    )  # fmt: skip
    keep = op.Gather(keep, op.Constant(value_ints=[0, 2]), axis=1)  # image and box
    ones = op.Expand(op.Constant(value_float=1.0), op.Shape(keep, start=0, end=1))
    return op.Equal(op.ScatterND(op.Mul(scores, 0.0), keep, ones), 0.0)


def _weighted_rows_in_onnx(value, rows, shares):
    """`weighted_rows` in ONNX, step by step the same."""
    op = opset18
    heads, channels = value.shape[2], value.shape[3]
    images = op.Range(0, op.Squeeze(op.Shape(value, start=0, end=1)), 1)
    first = op.Mul(images, op.Shape(value, start=1, end=2))  # row of each image's first token
    rows = op.Add(rows, op.Cast(op.Unsqueeze(first, [1, 2, 3]), to=INT32))
    tables = op.Reshape(op.Transpose(value, perm=[2, 0, 1, 3]), op.Constant(value_ints=[heads, -1, channels]))
    outputs = []
    for head in range(heads):
        of_head = op.Constant(value_int=head)
        values = op.Gather(op.Gather(tables, of_head, axis=0), op.Gather(rows, of_head, axis=2), axis=0)
        share = op.Unsqueeze(op.Gather(shares, of_head, axis=2), [2])
        outputs.append(op.MatMul(share, op.Cast(values, to=FLOAT)))
    return op.CastLike(op.Squeeze(op.Concat(*outputs, axis=-1), [2]), value)


def _name_dynamic_sizes(graph: onnx_ir.Graph) -> None:
    """Give dynamic input and output sizes names, and drop the shapes of intermediate values."""
    batch, count = "batch", "detections"
    shapes = (
        (batch, 3, "height", "width"), (batch, 2), (batch, 2),
        (batch, count, 4), (batch, count), (batch, count), (batch, "queries"),
    )  # fmt: skip
    for node in graph:
        for value in node.outputs:
            value.shape = None
    for value, shape in zip([*graph.inputs, *graph.outputs], shapes, strict=True):
        value.shape = onnx_ir.Shape(shape)


@contextmanager
def _without_stack_traces() -> Iterator[None]:
    """Skip the stack trace that torch keeps for every traced operator, a third of the time (not with torch 2.11)."""
    config = getattr(torch.fx, "config", None)
    before = getattr(config, "do_not_emit_stack_traces", None)
    if before is None:
        yield
        return
    config.do_not_emit_stack_traces = True
    try:
        yield
    finally:
        config.do_not_emit_stack_traces = before


@contextmanager
def _replaced_after_success(path: Path) -> Iterator[Path]:
    """Yield a temporary path, which is moved to `path` if no error is raised."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.unchecked{path.suffix}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
