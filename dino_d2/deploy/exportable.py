"""DINO as a function of tensors, for export."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from detectron2.layers import batched_nms
from torch import Tensor, nn

from dino_d2.autocast import autocast
from dino_d2.geometry import cxcywh_to_xyxy
from dino_d2.meta_arch.dino import DINO, padding_of
from dino_d2.meta_arch.duplicates import vote
from dino_d2.modeling.backbone.frozen_norm import fold_for_good
from dino_d2.modeling.deformable_attention import MultiScaleDeformableAttention
from dino_d2.modeling.int8 import QuantizableLinear
from dino_d2.structures import topk


class ExportableDINO(nn.Module):
    """A copy of a detector in evaluation mode, from pixels to boxes in the original images, without query filtering and
    quantization.

    Args:
        model: not modified.
        op: for deformable attention; same arguments and result as `dino_d2.ops.ms_deform_attn_fused`.
        half: weights and feature maps in float16; geometry, scores and outputs in float32.
    """

    def __init__(self, model: DINO, op: Callable[..., Tensor], half: bool = False):
        super().__init__()
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.half_precision = half
        for module in self.model.modules():
            if isinstance(module, MultiScaleDeformableAttention):
                module.op = op
            elif isinstance(module, QuantizableLinear):
                module.int8 = False  # cannot be traced; a file is quantized afterwards
            if getattr(module, "inplace", False):
                module.inplace = False  # tracing makes a copy anyway, at length
        fold_for_good(self.model.backbone)
        # Not buffers: export would add non-persistent buffers to the state dict, in float32 even for half precision.
        self.mean, self.std = (x.tolist() for x in (model.pixel_mean.flatten(), model.pixel_std.flatten()))
        if half:
            self.model.half()

    def forward(self, pixels: Tensor, image_sizes: Tensor, original_sizes: Tensor) -> tuple[Tensor, ...]:
        """
        Args:
            pixels: (B, 3, H, W) uint8, resized images in the channel order of INPUT.FORMAT, padded at the right and
                bottom with any values.
            image_sizes: (B, 2) int64, height and width of each without padding.
            original_sizes: (B, 2) int64, height and width before resizing, which the boxes refer to.

        Returns:
            boxes (B, n, 4) x1, y1, x2, y2 in pixels of the original images, clipped to them; scores (B, n), highest
            first, 0 for duplicates and boxes without area, which are no detections; classes (B, n) int64; tokens (B, Q)
            int64, the tokens that the queries were selected from, for comparing runtimes.
        """
        model = self.model
        padding_mask = padding_of(image_sizes, *pixels.shape[-2:])
        mean, std = (pixels.new_tensor(x, dtype=torch.float32).view(-1, 1, 1) for x in (self.mean, self.std))
        images = ((pixels - mean) / std).masked_fill(padding_mask[:, None], 0)
        with autocast(pixels.device.type, "float16" if self.half_precision else None):
            memory = model.encode(images, padding_mask)
            selection = model.query_selection(memory)
            predictions = model.decoder(selection.queries, memory)[-1]
        settings = model.inference
        best = predictions.topk(settings.candidates)
        size = original_sizes.flip(1).to(best.boxes.dtype).repeat(1, 2)[:, None]  # width, height, width, height
        scores, boxes, classes = best.scores, cxcywh_to_xyxy(best.boxes) * size, best.classes
        if settings.drops_duplicates:
            threshold = settings.nms_threshold
            duplicate = is_duplicate(boxes, scores, classes, model.decoder.num_classes, threshold)
            if settings.box_voting:
                boxes = vote(boxes, scores, classes, threshold)
            # Last and in order, not all equal: runtimes differ in which of equal scores they take.
            scores, index = topk(scores - duplicate.to(scores.dtype), settings.max_detections)
            scores = scores.clamp(min=0)
            boxes, classes = boxes.gather(1, index[..., None].expand(-1, -1, 4)), classes.gather(1, index)
        inside = torch.minimum(boxes.clamp(min=0), size)
        empty = (inside[..., 2:] <= inside[..., :2]).any(-1)
        return inside, scores.masked_fill(empty, 0), classes, selection.tokens


@torch.library.custom_op("dino_d2::is_duplicate", mutates_args=())
def is_duplicate(boxes: Tensor, scores: Tensor, classes: Tensor, num_classes: int, iou_threshold: float) -> Tensor:
    """Whether each box overlaps a higher-scoring one of its class and image by more than `iou_threshold`.

    A custom operator because its implementation cannot be traced; `export` translates it to ONNX.

    Args:
        boxes: (B, n, 4) x1, y1, x2, y2.
        scores, classes: (B, n); classes are below `num_classes`.

    Returns:
        (B, n) bool.
    """
    duplicate = torch.ones_like(scores, dtype=torch.bool)
    for i in range(len(boxes)):
        duplicate[i, batched_nms(boxes[i], scores[i], classes[i], iou_threshold)] = False
    return duplicate


@is_duplicate.register_fake
def _(boxes: Tensor, scores: Tensor, classes: Tensor, num_classes: int, iou_threshold: float) -> Tensor:
    return torch.empty_like(scores, dtype=torch.bool)
