"""detectron2's `VIS_PERIOD`: pictures of what the model finds while it is trained, for TensorBoard."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from detectron2.data.detection_utils import convert_image_to_rgb
from detectron2.structures import Instances
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage, has_event_storage
from detectron2.utils.visualizer import Visualizer
from torch import Tensor

DETECTIONS = 20  # that are drawn, as in detectron2's R-CNN
NAME = "Left: annotations;  Right: detections"


@dataclass(frozen=True)
class TrainingPicture:
    """period: in iterations; 0: no pictures. input_format: of the images, `INPUT.FORMAT`."""

    period: int
    input_format: str

    @property
    def is_due(self) -> bool:
        """Whether a picture belongs to the iteration of detectron2's `EventStorage`; never outside of training, and
        only in the main process, which writes it: the others would keep theirs."""
        wanted = self.period > 0 and comm.is_main_process() and has_event_storage()
        return wanted and get_event_storage().iter % self.period == 0

    def draw(self, image: Tensor, annotated: Instances, found: Instances) -> None:
        """Put an augmented image, (3, H, W) in [0, 255], into the `EventStorage`, with its objects and its best
        detections side by side."""
        pixels = convert_image_to_rgb(image.permute(1, 2, 0), self.input_format)
        panels = []
        for boxes in (annotated.gt_boxes, found.pred_boxes[:DETECTIONS]):
            corners = boxes.tensor.detach().cpu().numpy()
            panels.append(Visualizer(pixels).overlay_instances(boxes=corners).get_image())
        get_event_storage().put_image(NAME, np.concatenate(panels, axis=1).transpose(2, 0, 1))
