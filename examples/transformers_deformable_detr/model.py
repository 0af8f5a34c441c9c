"""Transformers' two-stage Deformable DETR, and the same model with ideas of DINO put in.

Backbone, encoder, decoder, heads, matching and losses are Transformers'. Boxes are cx, cy, w, h in [0, 1] of the
unpadded image.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection
from transformers.loss.loss_deformable_detr import DeformableDetrForObjectDetectionLoss, DeformableDetrImageLoss
from transformers.models.deformable_detr.modeling_deformable_detr import DeformableDetrObjectDetectionOutput

from .dino.modeling.box_refinement import look_forward_once, look_forward_twice
from .dino.modeling.denoising import ContrastiveDenoising
from .dino.modeling.query_selection import EncoderProposals, MixedQuerySelection
from .dino.structures import DenoisingQueries, Memory, Predictions, Queries, Targets, map_sizes

IDEAS = ("cdn", "mixed", "twice")
CLASS_BIAS = -4.6  # a probability of 0.01 for each class, as in the paper's code

Labels = list[dict[str, Tensor]]
"""Of each image: `class_labels` (n,) int64 and `boxes` (n, 4)."""


class TwoStageDeformableDetr(DeformableDetrForObjectDetection):
    """Transformers' model, made ready to be trained from scratch.

    Transformers has no loss for its first stage, which then selects queries with weights that never change; and it
    starts its heads with a probability of 0.5 for each class. Both are done here as in the code of the paper.
    """

    def __init__(self, config: DeformableDetrConfig):
        super().__init__(config)
        self.loss_function = DeformableDetrForObjectDetectionLoss
        for head in self.class_embed:
            nn.init.constant_(head.bias, CLASS_BIAS)
        for head in self.bbox_embed:
            nn.init.zeros_(head.layers[-1].weight)

    def forward(
        self, pixel_values: Tensor, pixel_mask: Tensor, labels: Labels | None = None
    ) -> DeformableDetrObjectDetectionOutput:
        """
        Args:
            pixel_values: (B, 3, H, W), normalised.
            pixel_mask: (B, H, W) int64, 0 on padding.
            labels: None: no losses.
        """
        outputs = super().forward(pixel_values, pixel_mask=pixel_mask, labels=labels)
        if labels is not None:
            outputs.loss_dict["loss_first_stage"] = self.first_stage_loss(outputs, labels)
            outputs.loss = outputs.loss + outputs.loss_dict["loss_first_stage"]
        return outputs

    def first_stage_loss(self, outputs: Any, labels: Labels) -> Tensor:
        """All objects are of class 0, which is the only one that Transformers' selection looks at."""
        proposals = Predictions(outputs.enc_outputs_class, outputs.enc_outputs_coord_logits.sigmoid())
        return self.set_loss([proposals], [{**label, "class_labels": label["class_labels"] * 0} for label in labels])

    def set_loss(self, layers: list[Predictions], labels: Labels) -> Tensor:
        """Match the predictions of each layer with the objects, and sum Transformers' losses over the layers."""
        logits = torch.stack([layer.logits for layer in layers])
        boxes = torch.stack([layer.boxes for layer in layers])
        return self.loss_function(logits[-1], labels, self.device, boxes[-1], self.config, logits, boxes)[0]


class DeformableDetrWithIdeas(TwoStageDeformableDetr):
    """The same with contrastive denoising, mixed query selection and look forward twice, or some of them.

    Args:
        ideas: of `IDEAS`.
    """

    def __init__(self, config: DeformableDetrConfig, ideas: Collection[str]):
        super().__init__(config)
        classes, channels = config.num_labels, config.d_model
        self.denoising = self.selection = None
        if "cdn" in ideas:
            self.denoising = ContrastiveDenoising(
                classes,
                channels,
                number=20,
                label_noise_ratio=0.5,
                box_noise_scale=1.0,
                reorder_negatives=False,
                max_queries=200,
            )
        if "mixed" in ideas:
            proposals = EncoderProposals(channels, self.class_embed[-1], self.bbox_embed[-1])
            self.selection = MixedQuerySelection(config.two_stage_num_proposals, channels, proposals)
        self.refine = look_forward_twice if "twice" in ideas else look_forward_once

    def forward(
        self, pixel_values: Tensor, pixel_mask: Tensor, labels: Labels | None = None
    ) -> DeformableDetrObjectDetectionOutput:
        """As in the base class. Denoising queries are there if labels are, and are not in the output."""
        denoising = queries = proposals = None
        if self.denoising is not None and labels is not None:
            denoising = self.denoising([Targets(label["class_labels"], label["boxes"]) for label in labels])

        def give_queries(decoder: nn.Module, arguments: tuple, inputs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
            nonlocal queries, proposals
            queries = Queries(inputs["inputs_embeds"], inputs["reference_points"])
            if self.selection is not None:
                selection = self.selection(memory_of(inputs))
                queries, proposals = selection.queries, selection.proposals
            if denoising is not None:
                blocked = denoising.attention_mask(queries.anchors.shape[1])
                inputs["attention_mask"] = torch.zeros_like(blocked, dtype=queries.content.dtype).masked_fill(
                    blocked, -torch.inf
                )
                queries = denoising.concatenated_with(queries)
            inputs["inputs_embeds"], inputs["reference_points"] = queries.content, queries.anchors
            inputs["object_queries_position_embeddings"] = self.position(queries.anchors)
            return arguments, inputs

        with self.model.decoder.register_forward_pre_hook(give_queries, with_kwargs=True):
            outputs = self.model(pixel_values, pixel_mask=pixel_mask)

        layers = self.predictions(queries.anchors, outputs)
        count = 0 if denoising is None else len(denoising)
        denoised, matching = zip(*(layer.split(count) for layer in layers), strict=True)
        loss = loss_dict = None
        if labels is not None:
            loss_dict = {"loss_layers": self.set_loss(matching, labels)}
            if proposals is None:
                loss_dict["loss_first_stage"] = self.first_stage_loss(outputs, labels)
            else:
                loss_dict["loss_first_stage"] = self.set_loss([proposals], labels)
            if count:
                loss_dict["loss_denoising"] = self.denoising_loss(denoised, denoising, labels)
            loss = sum(loss_dict.values())
        return DeformableDetrObjectDetectionOutput(
            loss=loss, loss_dict=loss_dict, logits=matching[-1].logits, pred_boxes=matching[-1].boxes
        )

    def position(self, anchors: Tensor) -> Tensor:
        """Transformers' position embedding of anchors (B, Q, 4): (B, Q, C)."""
        embedding = self.model.get_proposal_pos_embed(torch.logit(anchors))
        return self.model.pos_trans_norm(self.model.pos_trans(embedding)).chunk(2, dim=-1)[0]

    def predictions(self, anchors: Tensor, outputs: Any) -> list[Predictions]:
        """Of every decoder layer.

        Transformers' decoder has moved the anchors itself, without gradients. What a layer predicts starts from them,
        or with look forward twice from the same boxes with gradients.
        """
        layers = []
        reference = anchors
        states = zip(
            outputs.intermediate_hidden_states.unbind(1),
            [anchors, *outputs.intermediate_reference_points.unbind(1)],
            self.class_embed,
            self.bbox_embed,
            strict=False,  # the last heads are the first stage's, the last anchors are of no layer
        )
        for state, anchor, class_head, box_head in states:
            delta = box_head(state)
            boxes, _, reference = self.refine(anchor, reference, delta, delta)
            layers.append(Predictions(class_head(state), boxes))
        return layers

    def denoising_loss(self, layers: Collection[Predictions], denoising: DenoisingQueries, labels: Labels) -> Tensor:
        """Transformers' losses with the known pairs in place of its matcher, averaged over the groups."""
        firsts = torch.tensor([0, *(len(label["class_labels"]) for label in labels)]).cumsum(0).tolist()
        pairs, mine = denoising.pairs, [denoising.pairs.image == image for image in range(len(labels))]
        known = [(pairs.query[own], pairs.target[own] - first) for own, first in zip(mine, firsts, strict=False)]
        losses = DeformableDetrImageLoss(
            lambda predictions, labels: known, self.config.num_labels, self.config.focal_alpha, ["labels", "boxes"]
        )
        weights = {
            "loss_ce": 1,
            "loss_bbox": self.config.bbox_loss_coefficient,
            "loss_giou": self.config.giou_loss_coefficient,
        }
        total = 0
        for layer in layers:
            values = losses({"logits": layer.logits, "pred_boxes": layer.boxes}, labels)
            total = total + sum(weights[name] * value for name, value in values.items())
        return total / denoising.groups


def memory_of(inputs: dict[str, Any]) -> Memory:
    """What Transformers gives to its decoder about the encoder's tokens, as the selection wants it."""
    shapes = tuple(inputs["spatial_shapes_list"])
    ratios = inputs["valid_ratios"]
    return Memory(
        tokens=inputs["encoder_hidden_states"],
        padding_mask=~inputs["encoder_attention_mask"],
        spatial_shapes=shapes,
        valid_sizes=(ratios * map_sizes(shapes, ratios.dtype, ratios.device)).round(),
    )
