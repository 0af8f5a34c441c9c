"""torchvision's detectors train and are evaluated as ours are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances, pairwise_iou

from dino_d2.checkpoint import DINOCheckpointer
from dino_d2.modeling.backbone.frozen_norm import FoldedBatchNorm
from studies import peers
from studies.plan import Study, read_study
from studies.training import FINAL, StudyTrainer, train
from tests.studies.conftest import ROOT

SIZES = {"TorchvisionFasterRCNN": [[16], [32], [64], [128]], "TorchvisionRetinaNet": [[8], [16], [32], [64], [128]]}


def detectors() -> dict[str, Any]:
    others = {"TEST.DETECTIONS_PER_IMAGE": 5, "MODEL.FPN.OUT_CHANNELS": 32}
    return {
        name: {
            "config": str(ROOT / "studies" / "peers.yaml"),
            "settings": {"MODEL.META_ARCHITECTURE": name, "MODEL.ANCHOR_GENERATOR.SIZES": sizes} | others,
        }
        for name, sizes in SIZES.items()
    }


@pytest.fixture
def config(make_study: Callable[..., Study], tmp_path: Path) -> Callable[..., CfgNode]:
    """`config(name, iterations)`: the config of a run of that peer."""

    def make(name: str, iterations: int = 2) -> CfgNode:
        study = make_study(detectors=detectors(), seeds=[1])
        run = next(run for run in study.runs() if run.detector.name == name)
        return study.config_of_run(run, iterations, tmp_path / name)

    return make


@pytest.mark.parametrize("name", SIZES)
def test_peers_train_and_are_evaluated(config: Callable[..., CfgNode], name: str) -> None:
    cfg = config(name)
    seen: list[int] = []
    found = train(cfg, [1, 2], lambda done, metrics: seen.append(done))
    assert seen == list(found) == [1, 2]
    assert all(0 <= found[done][key] <= 100 for done in found for key in ("AP", "AP50"))
    before = build_model(cfg).state_dict()
    after = torch.load(Path(cfg.OUTPUT_DIR, f"{FINAL}.pth"), weights_only=True)["model"]
    assert before.keys() == after.keys()


@pytest.mark.parametrize("name", SIZES)
def test_peers_learn_at_one_rate_and_keep_frozen_what_is_frozen(config: Callable[..., CfgNode], name: str) -> None:
    cfg = config(name)
    model = build_model(cfg).train()
    optimizer = StudyTrainer.build_optimizer(cfg, model)
    assert {group["lr"] for group in optimizer.param_groups} == {cfg.SOLVER.BASE_LR}
    kinds = torch.nn.BatchNorm2d | FoldedBatchNorm
    norms = [module for module in model.backbone.body.modules() if isinstance(module, kinds)]
    assert norms
    assert not any(norm.training or norm.weight.requires_grad for norm in norms)


@pytest.mark.parametrize("name", SIZES)
def test_peers_load_the_same_backbone_file(config: Callable[..., CfgNode], name: str, tmp_path: Path) -> None:
    cfg = config(name)
    file = tmp_path / "backbone.pth"
    donor = {key: x for key, x in build_model(cfg).state_dict().items() if key.startswith("backbone.body.")}
    donor = {key: x + 1 if x.is_floating_point() else x for key, x in donor.items()}
    torch.save({"model": donor}, file)
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.WEIGHTS = str(file)
    model = build_model(cfg)
    DINOCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    assert all(torch.equal(x, model.state_dict()[key]) for key, x in donor.items())


def record_of_one_object() -> dict[str, Any]:
    """A picture of 64 x 96 pixels, resized from one of twice the size, with an object of class 1."""
    image = torch.full((3, 64, 96), 120.0)
    image[:, 10:42, 20:60] = torch.tensor([220.0, 40, 40])[:, None, None]
    objects = Instances((64, 96), gt_boxes=Boxes(torch.tensor([[20.0, 10, 60, 42]])), gt_classes=torch.tensor([1]))
    return {"image": image, "instances": objects, "height": 128, "width": 192}


@pytest.mark.parametrize(("name", "label"), [("TorchvisionFasterRCNN", 2), ("TorchvisionRetinaNet", 1)])
def test_labels_and_boxes_are_translated(
    config: Callable[..., CfgNode], monkeypatch: pytest.MonkeyPatch, name: str, label: int
) -> None:
    """torchvision's Faster R-CNN counts the background as a class, its RetinaNet does not."""
    model = build_model(config(name))
    given: list[Any] = []

    def forward(self: object, images: list, targets: list | None = None) -> Any:
        given.append((images, targets))
        box = torch.tensor([[20.0, 10, 60, 42]])
        found = {"boxes": box, "scores": torch.tensor([0.9]), "labels": torch.tensor([label])}
        return {"classification": torch.ones(()), "loss_rpn": torch.ones(())} if targets else [found]

    monkeypatch.setattr(peers.FasterRCNN if label == 2 else peers.RetinaNet, "forward", forward)
    assert list(model.train()([record_of_one_object()])) == ["loss_classification", "loss_rpn"]
    ((image,), (target,)) = given[0]
    assert image.dtype == torch.float32
    assert (target["boxes"].tolist(), target["labels"].tolist()) == ([[20, 10, 60, 42]], [label])
    (found,) = model.eval()([record_of_one_object()])
    assert found["instances"].image_size == (128, 192)
    assert found["instances"].pred_classes.tolist() == [1]
    assert found["instances"].pred_boxes.tensor.tolist() == [[40, 20, 120, 84]]


def test_a_peer_learns_one_picture(config: Callable[..., CfgNode]) -> None:
    model = build_model(config("TorchvisionRetinaNet")).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 2e-3)
    for _ in range(30):
        losses = model([record_of_one_object()])
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    (found,) = model.eval()([record_of_one_object()])
    best = found["instances"][found["instances"].scores.argmax().item()]
    assert best.pred_classes.tolist() == [1]
    assert pairwise_iou(best.pred_boxes, Boxes(torch.tensor([[40.0, 20, 120, 84]]))).item() > 0.5


def test_pictures_come_as_the_loader_made_them() -> None:
    transform = peers.WithoutResizing(1, 1, [100.0] * 3, [50.0] * 3)
    batch, targets = transform([torch.full((3, 40, 50), 150.0)], [{"boxes": torch.ones(1, 4)}])
    assert batch.image_sizes == [(40, 50)]
    assert batch.tensors.shape == (1, 3, 64, 64)
    assert batch.tensors[0, :, :40, :50].unique().tolist() == [1]
    assert targets[0]["boxes"].tolist() == [[1, 1, 1, 1]]


@pytest.mark.parametrize("levels", [2, 3])
def test_anchors_that_fit_no_level_are_named(make_study: Callable[..., Study], levels: int, tmp_path: Path) -> None:
    study = make_study(detectors=detectors(), settings={"MODEL.ANCHOR_GENERATOR.SIZES": [[32]] * levels})
    with pytest.raises(ValueError, match=f"SIZES has {levels} lists; TorchvisionFasterRCNN has 4 levels"):
        peers._anchors(study.config(*study.pairs()[0]), 4)


def test_the_peers_of_few_photos_can_be_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    study = read_study(Path("studies/few_photos.yaml"))
    built: Sequence[str] = [
        type(build_model(study.config(study.data[0], detector))).__name__ for detector in study.detectors
    ]
    assert built == ["DINO", "FasterRCNNPeer", "RetinaNetPeer"]
