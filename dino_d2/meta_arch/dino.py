"""DINO as a detectron2 meta-architecture (arXiv 2203.03605)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import batched_nms
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, build_backbone, detector_postprocess
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor, nn

from dino_d2.autocast import autocast, autocast_of_config
from dino_d2.checkpoint.assumptions import Assumptions
from dino_d2.geometry import cxcywh_to_xyxy, xyxy_to_cxcywh
from dino_d2.modeling import build
from dino_d2.modeling.backbone.frozen_norm import fold_frozen_norms
from dino_d2.modeling.criterion import SetCriterion
from dino_d2.modeling.decoder import DINODecoder
from dino_d2.modeling.encoder import DeformableEncoder
from dino_d2.modeling.int8 import multiply_in_int8
from dino_d2.modeling.layers import maybe_checkpoint
from dino_d2.modeling.neck import ChannelMapper
from dino_d2.modeling.query_selection import filter_by_score
from dino_d2.structures import DenoisingQueries, Memory, Predictions, Targets

from .augmented_inference import TestTimeAugmentation, build_test_time_augmentation
from .duplicates import vote
from .training_picture import TrainingPicture

CANDIDATES = 3  # times as many as detections, where NMS drops some: duplicates take no places of others

logger = logging.getLogger(__name__)


@dataclass
class InferenceSettings:
    """Settings for inference.

    max_detections: per image.
    query_score_threshold: drop queries from tokens that score less, so that each image has as many queries as it needs,
        at most `query_selection.num_queries`; 0: the same number for all images. In units of the model's own scores,
        which depend on its class loss.
    nms_threshold: IoU threshold of per-class NMS; 1: no NMS.
    box_voting: with NMS, average the boxes around the same object.
    autocast: name of the autocast dtype; None: no mixed precision.
    int8: on a CPU, products of encoder and decoder in 8-bit integers.
    test_time_augmentation: None: a single pass per image.
    """

    max_detections: int
    query_score_threshold: float
    nms_threshold: float
    box_voting: bool
    autocast: str | None
    int8: bool
    test_time_augmentation: TestTimeAugmentation | None

    @property
    def drops_duplicates(self) -> bool:
        return self.nms_threshold < 1

    @property
    def candidates(self) -> int:
        """How many of the best (query, class) pairs of an image are looked at."""
        return CANDIDATES * self.max_detections if self.drops_duplicates else self.max_detections

    def without_duplicates(self, found: Instances) -> Tensor:
        """Indices of the detections that overlap no better one of their class too much, highest score first."""
        # detectron2 makes the boxes float32, and torchvision wants one dtype
        return batched_nms(found.pred_boxes.tensor, found.scores.float(), found.pred_classes, self.nms_threshold)

    @classmethod
    def of_config(cls, cfg: CfgNode) -> InferenceSettings:
        return cls(
            cfg.TEST.DETECTIONS_PER_IMAGE,
            build.query_score_threshold(cfg),
            cfg.MODEL.DINO.NMS_THRESHOLD,
            cfg.MODEL.DINO.BOX_VOTING,
            autocast_of_config("TEST.AMP", cfg.TEST.AMP),
            build.int8_of_config(cfg),
            build_test_time_augmentation(cfg),
        )


@META_ARCH_REGISTRY.register()
class DINO(nn.Module):
    """The DINO detector: takes images, returns weighted losses (training) or Instances (evaluation).

    Args:
        backbone: its feature maps named `in_features`, finest first, are the neck's inputs.
        neck, encoder, query_selection, decoder: applied in this order.
        denoising: makes denoising queries; used only in training.
        criterion: computes the losses.
        pixel_mean, pixel_std: per channel, in the units and channel order of the input images.
        recompute_backbone: use activation checkpointing for the backbone.
        inference: settings for evaluation.
        training_picture: drawn every so many iterations.
        assumptions: saved with the weights, and compared when weights are loaded.
    """

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        in_features: Sequence[str],
        neck: ChannelMapper,
        encoder: DeformableEncoder,
        query_selection: nn.Module,
        denoising: nn.Module,
        decoder: DINODecoder,
        criterion: SetCriterion,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        recompute_backbone: bool,
        inference: InferenceSettings,
        training_picture: TrainingPicture,
        assumptions: Assumptions,
    ):
        super().__init__()
        fold_frozen_norms(backbone)
        self.backbone = backbone.to(memory_format=torch.channels_last)  # fastest for convolutions
        self.in_features = tuple(in_features)
        self.neck = neck.to(memory_format=torch.channels_last)
        self.encoder = encoder
        self.query_selection = query_selection
        self.denoising = denoising
        self.decoder = decoder
        self.criterion = criterion
        self.recompute_backbone = recompute_backbone
        self.inference = inference
        self.training_picture = training_picture
        self.assumptions = assumptions
        if inference.int8:
            multiply_in_int8(self)
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), persistent=False)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        build.check_counts(cfg)
        backbone = build_backbone(cfg)
        shapes = backbone.output_shape()
        return {
            "backbone": backbone,
            "in_features": cfg.MODEL.DINO.IN_FEATURES,
            "neck": build.build_neck(cfg, [shapes[name].channels for name in cfg.MODEL.DINO.IN_FEATURES]),
            "encoder": build.build_encoder(cfg, [shapes[name].stride for name in cfg.MODEL.DINO.IN_FEATURES]),
            "query_selection": build.build_query_selection(cfg),
            "denoising": build.build_denoising(cfg),
            "decoder": build.build_decoder(cfg),
            "criterion": build.build_criterion(cfg),
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "recompute_backbone": cfg.MODEL.DINO.CHECKPOINT.BACKBONE,
            "inference": InferenceSettings.of_config(cfg),
            "training_picture": TrainingPicture(cfg.VIS_PERIOD, cfg.INPUT.FORMAT),
            "assumptions": Assumptions.of_config(cfg),
        }

    def get_extra_state(self) -> Tensor:
        return self.assumptions.to_tensor()

    def set_extra_state(self, state: Tensor) -> None:
        """Check that the weights' assumptions match this model, and take over their score threshold.

        A model without class names takes over theirs, if there is one for each class.

        Raises:
            ValueError: they differ; each line of the message names a config key.
        """
        theirs = Assumptions.from_tensor(state)
        lines = self.assumptions.contradictions(theirs)
        if lines:
            raise ValueError("The checkpoint was made for another model:\n  " + "\n  ".join(lines))
        fitting = theirs.class_names if len(theirs.class_names) == self.decoder.num_classes else ()
        self.assumptions = replace(
            self.assumptions,
            score_threshold=theirs.score_threshold,
            class_names=self.assumptions.class_names or fitting,
        )
        for_queries = self.inference.query_score_threshold
        if theirs.score_threshold is not None and for_queries > theirs.score_threshold:
            logger.warning(
                "MODEL.DINO.QUERY_SCORE_THRESHOLD is %.3g, but with these weights detections count from a score of "
                "%.3g: objects are lost that would be shown. Set it lower, or to 0",
                for_queries,
                theirs.score_threshold,
            )

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    def forward(self, batched_inputs: Sequence[dict[str, Any]]) -> dict[str, Tensor] | list[dict[str, Instances]]:
        """
        Args:
            batched_inputs: in detectron2's format. "image": (3, H, W) in the range of `pixel_mean`. In training
                "instances" with `gt_boxes` and `gt_classes`, and "most_objects", the maximum per image over a larger
                batch that these are part of. In evaluation the "height" and "width" of the output (default: the
                image's).

        Returns:
            In training the losses, whose sum is the objective. Otherwise {"instances": Instances} for each image, with
            `pred_boxes`, `scores`, `pred_classes`, highest score first.
        """
        if self.training or self.inference.test_time_augmentation is None:
            return self.forward_once(batched_inputs)
        return [self.inference.test_time_augmentation(self.forward_once, x) for x in batched_inputs]

    def forward_once(self, batched_inputs: Sequence[dict[str, Any]]) -> dict[str, Tensor] | list[dict[str, Instances]]:
        """`forward` without test-time augmentation."""
        if self.training:
            layers, proposals, denoising, targets = self.training_outputs(batched_inputs)
            if self.training_picture.is_due:
                _, matched = layers[-1].split(len(denoising))
                self._draw(batched_inputs[0], matched)
            return self.criterion(layers, proposals, denoising, targets)
        images, padding_mask = self.preprocess_image(batched_inputs)
        with autocast(self.device.type, self.inference.autocast):
            predictions = self.predict(images.tensor, padding_mask)
        return self.postprocess(predictions, batched_inputs, images.image_sizes)

    @torch.no_grad()
    def _draw(self, x: dict[str, Any], predictions: Predictions) -> None:
        """Draw the first image of a batch, with what was found in it."""
        first = Predictions(predictions.logits[:1], predictions.boxes[:1])
        size = tuple(x["image"].shape[-2:])
        found = self.postprocess(first, [{}], [size])[0]["instances"]
        self.training_picture.draw(x["image"], x["instances"], found)

    def training_outputs(
        self, batched_inputs: Sequence[dict[str, Any]]
    ) -> tuple[list[Predictions], Predictions | None, DenoisingQueries, list[Targets]]:
        """Inputs of the criterion: predictions of every layer, proposals, denoising queries, targets."""
        images, padding_mask = self.preprocess_image(batched_inputs)
        memory = self.encode(images.tensor, padding_mask)
        selection = self.query_selection(memory)
        targets = self.prepare_targets(batched_inputs)
        denoising = self.denoising(targets, max(x.get("most_objects", 0) for x in batched_inputs))
        queries = denoising.concatenated_with(selection.queries)
        mask = denoising.attention_mask(selection.queries.content.shape[1])
        return self.decoder(queries, memory, mask), selection.proposals, denoising, targets

    def encode(self, images: Tensor, padding_mask: Tensor | None) -> Memory:
        """Compute the encoder's tokens from normalised images (B, 3, H, W) and `padding_mask` (B, H, W), True on
        padding; None if no image is padded."""
        images = images.contiguous(memory_format=torch.channels_last)
        features = maybe_checkpoint(self.backbone, images, recompute=self.recompute_backbone)
        maps = self.neck([features[name] for name in self.in_features])
        return self.encoder(maps, padding_mask, (images.shape[-2], images.shape[-1]))

    def predict(self, images: Tensor, padding_mask: Tensor | None) -> Predictions:
        """Predictions of the last layer, without denoising; arguments as in :meth:`encode`."""
        memory = self.encode(images, padding_mask)
        selection = self.query_selection(memory)
        if self.inference.query_score_threshold == 0:
            return self.decoder(selection.queries, memory)[-1]
        queries, valid = filter_by_score(selection, self.inference.query_score_threshold)
        # Mask filler queries, so that the detections of an image do not depend on the others in its batch.
        blocked = ~valid[:, None].expand(-1, valid.shape[1], -1)
        mask = blocked.repeat_interleave(self.decoder.layers[0].self_attn.num_heads, dim=0)
        return self.decoder(queries, memory, mask)[-1].masked(valid)

    def preprocess_image(self, batched_inputs: Sequence[dict[str, Any]]) -> tuple[ImageList, Tensor | None]:
        """Normalise, pad at the right and bottom to a common size, and return the padding mask (B, H, W), True on
        padding; None if no image is padded.

        Every image uses the memory of one as tall as the tallest and as wide as the widest in the batch.

        Raises:
            ValueError: the number of channels of an image and `pixel_mean` differ.
        """
        channels = len(self.pixel_mean)
        for x in batched_inputs:
            if x["image"].dim() != 3 or len(x["image"]) != channels:
                name, shape = x.get("file_name", "an image"), tuple(x["image"].shape)
                raise ValueError(
                    f"{name} has the shape {shape}; it must be ({channels}, height, width). dino_d2.data.read_image "
                    "converts grey and transparent images"
                )
        images = [x["image"].to(self.device, non_blocking=True) for x in batched_inputs]
        batch = ImageList.from_tensors([(image - self.pixel_mean) / self.pixel_std for image in images])
        if all(image.shape == batch.tensor.shape[1:] for image in images):
            return batch, None
        sizes = torch.tensor(batch.image_sizes).to(self.device, non_blocking=True)
        return batch, padding_of(sizes, *batch.tensor.shape[-2:])

    def prepare_targets(self, batched_inputs: Sequence[dict[str, Any]]) -> list[Targets]:
        """The ground truth of each image, with boxes relative to it.

        Raises:
            ValueError: an image without "instances", or a class index out of range.
        """
        num_classes = self.decoder.num_classes
        labels, boxes = [], []
        for x in batched_inputs:
            name = x.get("file_name", "an image")
            if "instances" not in x:
                raise ValueError(f'{name} has no "instances": training inputs need them, even without objects')
            classes, corners = x["instances"].gt_classes, x["instances"].gt_boxes.tensor.to(self.pixel_mean.dtype)
            if len(classes) and not 0 <= int(classes.min()) <= int(classes.max()) < num_classes:
                raise ValueError(
                    f"{name} has classes from {int(classes.min())} to {int(classes.max())}, but "
                    f"MODEL.DINO.NUM_CLASSES is {num_classes}: classes must be 0 to {num_classes - 1}"
                )
            height, width = x["image"].shape[-2:]
            labels.append(classes)
            boxes.append(xyxy_to_cxcywh(corners / corners.new_tensor([width, height, width, height])))
        counts = [len(x) for x in labels]
        labels, boxes = (torch.cat(x).to(self.device, non_blocking=True).split(counts) for x in (labels, boxes))
        return [Targets(*of_image) for of_image in zip(labels, boxes, strict=True)]

    def postprocess(
        self,
        predictions: Predictions,
        batched_inputs: Sequence[dict[str, Any]],
        image_sizes: Sequence[tuple[int, int]],
    ) -> list[dict[str, Instances]]:
        """The highest-scoring (query, class) pairs of each image as Instances of the output size."""
        results = []
        best = predictions.topk(self.inference.candidates)
        for scores, boxes, classes, x, (height, width) in zip(
            best.scores, best.boxes, best.classes, batched_inputs, image_sizes, strict=True
        ):
            size = torch.tensor([width, height, width, height], dtype=boxes.dtype)
            boxes = cxcywh_to_xyxy(boxes) * size.to(self.device, non_blocking=True)
            instances = Instances((height, width))
            instances.pred_boxes = Boxes(boxes)
            instances.scores = scores
            instances.pred_classes = classes
            if self.inference.drops_duplicates:
                kept = self.inference.without_duplicates(instances)
                if self.inference.box_voting:
                    voted = vote(boxes[None], scores[None], classes[None], self.inference.nms_threshold)
                    instances.pred_boxes = Boxes(voted[0])
                instances = instances[kept[: self.inference.max_detections]]
            output_size = (x.get("height", height), x.get("width", width))
            results.append({"instances": detector_postprocess(instances, *output_size)})
        return results


def padding_of(sizes: Tensor, height: int, width: int) -> Tensor:
    """Padding mask (B, height, width) bool, True on padding, for images of heights and widths `sizes` (B, 2)."""
    below = torch.arange(height, device=sizes.device)[:, None] >= sizes[:, 0, None, None]
    right = torch.arange(width, device=sizes.device) >= sizes[:, 1, None, None]
    return below | right
