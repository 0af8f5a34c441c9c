"""Loading weights for other classes, of other models, and files that could run code."""

from __future__ import annotations

import argparse
import json
import logging
import pickle
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO

import numpy as np
import pytest
import torch
import torchvision
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.file_io import PathManager
from iopath.common.file_io import PathHandler
from torch import Tensor, nn

from dino_d2.checkpoint import DINOCheckpointer
from dino_d2.checkpoint.assumptions import CAPACITY, Assumptions
from dino_d2.engine.run_folder import check_run_folder
from dino_d2.meta_arch import DINO
from tests.checkpoint.test_convert import resnet_config

OLD = ["red", "green", "blue", "bird"]
NEW = ["Wild Bird", "purple", "blue", "Red", "white", "green"]  # shuffled, respelled, and two more
RENAMED = {"red": "Red", "bird": "Wild Bird", "green": "green", "blue": "blue"}
IMAGE = {"image": torch.linspace(0, 255, 3 * 96 * 96).view(3, 96, 96)}


@pytest.fixture
def detector(tiny_config: Callable) -> Callable[..., DINO]:
    """`detector("red", "blue", SHARE_HEADS=False)`: a new tiny DINO for classes of these names."""

    def make(*names: str, **overrides: object) -> DINO:
        overrides = {"NUM_CLASSES": len(names), "CLASS_NAMES": list(names)} | overrides
        return build_model(tiny_config(**overrides))

    return make


def saved(model: DINO, folder: Path) -> str:
    """The file of a model whose classes are told apart, and by the denoising labels too."""
    for name, tensor in model.state_dict().items():
        if "class_head" in name or "label_embed" in name:
            tensor.copy_(torch.randn_like(tensor))
    DINOCheckpointer(model, str(folder)).save("weights")
    return str(folder / "weights.pth")


def found(model: DINO, names: list[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """Scores and boxes of each class, every query's, in the order of the boxes: scores may be all but equal."""
    model.inference.max_detections = model.decoder.num_classes * 20
    with torch.no_grad():
        instances = model.eval()([IMAGE])[0]["instances"]
    instances = instances[(instances.pred_boxes.tensor @ torch.tensor([1.0, 2, 3, 5])).argsort()]
    rows = {name: instances[instances.pred_classes == number] for number, name in enumerate(names)}
    return {name: (x.scores, x.pred_boxes.tensor) for name, x in rows.items()}


def class_rows(model: DINO) -> Tensor:
    """(heads, K): the biases of every class head."""
    return torch.stack([*(head.bias for head in model.decoder.class_heads)]).detach()


@pytest.mark.parametrize("shared", [True, False], ids=["one head", "a head per layer"])
def test_each_class_is_found_as_before(shared: bool, detector: Callable, tmp_path: Path) -> None:
    """Queries are learned here: those that the encoder chooses change with the new classes, which it scores too."""
    old = detector(*OLD, SHARE_HEADS=shared, QUERY_SELECTION="static")
    path = saved(old, tmp_path)
    new = detector(*NEW, SHARE_HEADS=shared, QUERY_SELECTION="static")
    DINOCheckpointer(new).load(path)
    before, after = found(old, OLD), found(new, NEW)
    for name, renamed in RENAMED.items():
        assert len(before[name][0]) == 20
        torch.testing.assert_close(after[renamed][0], before[name][0])
        torch.testing.assert_close(after[renamed][1], before[name][1], rtol=1e-4, atol=1e-3)
    order = [OLD.index(name) for name in ("bird", "blue", "red", "green")]
    assert torch.equal(class_rows(new)[:, [0, 2, 3, 5]], class_rows(old)[:, order])
    labels, old_labels = new.denoising.label_embed.weight, old.denoising.label_embed.weight
    assert torch.equal(labels[[0, 2, 3, 5, 6]], old_labels[[*order, 4]])


def test_proposals_keep_their_scores_and_training_goes_on(detector: Callable, tmp_path: Path) -> None:
    """The encoder's head chooses the queries: with the rows of all its classes, and none else, it chooses the same."""
    old, shuffled = detector(*OLD), detector("bird", "blue", "green", "red")
    DINOCheckpointer(shuffled).load(saved(old, tmp_path))
    before, after = found(old, OLD), found(shuffled, ["bird", "blue", "green", "red"])
    for name in OLD:
        torch.testing.assert_close(after[name][0], before[name][0])

    new = detector(*NEW)
    DINOCheckpointer(new).load(str(tmp_path / "weights.pth"))
    head, old_head = (model.query_selection.proposals.class_head for model in (new, old))
    assert torch.equal(head.weight[0], old_head.weight[3])
    boxes = torch.tensor([[4.0, 8.0, 40.0, 60.0], [20.0, 20.0, 90.0, 80.0]])
    instances = Instances((96, 96), gt_boxes=Boxes(boxes), gt_classes=torch.tensor([0, 4]))
    losses = new.train()([IMAGE | {"instances": instances}])
    assert all(loss.isfinite() for loss in losses.values())


def test_new_classes_stay_as_initialised_and_the_table_names_them(
    detector: Callable, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = saved(detector(*OLD), tmp_path)
    new = detector("blue", "purple")
    before = class_rows(new)[:, 1].clone()
    with caplog.at_level(logging.INFO):
        DINOCheckpointer(new).load(path)
    assert torch.equal(class_rows(new)[:, 1], before)
    for line in ("copied (1): blue", "newly initialised (1): purple", "dropped (3): red, green, bird"):
        assert line in caplog.text


@pytest.mark.parametrize(("theirs", "ours"), [(OLD, []), ([], OLD), ([], [])])
def test_without_names_as_many_classes_load_as_they_are(
    theirs: list[str], ours: list[str], detector: Callable, tmp_path: Path
) -> None:
    old = detector(*theirs, NUM_CLASSES=4)
    new = detector(*ours, NUM_CLASSES=4)
    DINOCheckpointer(new).load(saved(old, tmp_path))
    assert torch.equal(class_rows(new), class_rows(old))


@pytest.mark.parametrize(("theirs", "ours"), [(OLD, []), ([], ["red", "blue"])])
def test_without_names_classes_of_another_number_start_anew(
    theirs: list[str], ours: list[str], detector: Callable, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = saved(detector(*theirs, NUM_CLASSES=4), tmp_path)
    new = detector(*ours, NUM_CLASSES=2)
    before = class_rows(new).clone()
    DINOCheckpointer(new).load(path)
    assert torch.equal(class_rows(new), before)
    assert "4 classes, the model has 2" in caplog.text
    assert "MODEL.DINO.CLASS_NAMES" in caplog.text
    with pytest.raises(ValueError, match="4 classes, the model has 2"):
        DINOCheckpointer(new, for_evaluation=True).load(path)


def test_data_set_gives_the_names_where_the_config_does_not(tiny_config: Callable) -> None:
    """The recipes' dataset is COCO, whose names detectron2 knows."""
    assert build_model(tiny_config(NUM_CLASSES=80)).assumptions.class_names[:2] == ("person", "bicycle")
    assert build_model(tiny_config(NUM_CLASSES=2)).assumptions.class_names == ()


@pytest.mark.parametrize("names", [["red"], ["red", "red"]])
def test_class_names_must_be_one_for_each_class(names: list[str], detector: Callable) -> None:
    with pytest.raises(ValueError, match=r"CLASS_NAMES has .*NUM_CLASSES is 2"):
        detector(*names, NUM_CLASSES=2)


# --- resuming, evaluating


@pytest.mark.parametrize(
    ("names", "number"), [(["blue", "green", "red", "bird"], 4), (["red", "green", "blue"], 3), ([], 3)]
)
def test_resuming_with_other_classes_is_an_error(
    names: list[str], number: int, detector: Callable, tmp_path: Path
) -> None:
    saved(detector(*OLD), tmp_path)
    model = detector(*names, NUM_CLASSES=number)
    checkpointer = DINOCheckpointer(model, str(tmp_path), trainer=nn.Linear(1, 1))
    before = class_rows(model).clone()
    with pytest.raises(ValueError, match=r"CLASS_NAMES"):
        checkpointer.resume_or_load("", resume=True)
    assert torch.equal(class_rows(model), before)


def test_weights_alone_are_matched_though_there_is_an_optimizer(detector: Callable, tmp_path: Path) -> None:
    old, new = detector(*OLD), detector("bird")
    checkpointer = DINOCheckpointer(new, str(tmp_path / "elsewhere"), trainer=nn.Linear(1, 1))
    checkpointer.resume_or_load(saved(old, tmp_path), resume=True)  # nothing there to resume
    assert torch.equal(class_rows(new)[0, 0], class_rows(old)[0, 3])


def test_evaluation_takes_a_choice_of_classes_and_refuses_new_ones(detector: Callable, tmp_path: Path) -> None:
    old = detector(*OLD)
    path = saved(old, tmp_path)
    some = detector("blue", "red")
    DINOCheckpointer(some, for_evaluation=True).load(path)
    assert torch.equal(class_rows(some), class_rows(old)[:, [2, 0]])
    with pytest.raises(ValueError, match=r"cannot be evaluated(.|\n)*newly initialised \(1\): purple"):
        DINOCheckpointer(detector("blue", "purple"), for_evaluation=True).load(path)


def test_other_contradictions_are_errors_still(detector: Callable, tmp_path: Path) -> None:
    path = saved(detector(*OLD), tmp_path)
    with pytest.raises(ValueError, match="POS_TEMPERATURE"):
        DINOCheckpointer(detector("bird", POS_TEMPERATURE=10000.0)).load(path)


def test_weights_of_the_other_encoder_are_refused(detector: Callable, tmp_path: Path) -> None:
    path = saved(detector(*OLD), tmp_path)
    for checkpointer in (DINOCheckpointer, DetectionCheckpointer):
        with pytest.raises(ValueError, match=r"MODEL\.DINO\.ENCODER is interleaved, the weights are for deformable"):
            checkpointer(detector(*OLD, ENCODER="interleaved")).load(path)


def test_checkpoint_of_before_there_was_another_encoder_is_of_the_deformable(detector: Callable) -> None:
    ours = detector(*OLD).assumptions
    facts = asdict(ours)
    del facts["encoder"]
    old = torch.zeros(CAPACITY, dtype=torch.uint8)
    text = json.dumps(facts).encode()
    old[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    assert Assumptions.from_tensor(old) == ours


def test_weights_of_a_newer_version_are_refused_by_name(detector: Callable) -> None:
    newer = torch.zeros(CAPACITY, dtype=torch.uint8)
    text = json.dumps(asdict(detector(NUM_CLASSES=3).assumptions) | {"query_shape": "star"}).encode()
    newer[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"newer version of dino_d2.*query_shape"):
        Assumptions.from_tensor(newer)


def test_score_threshold_comes_with_the_weights_and_goes_with_others(detector: Callable, tmp_path: Path) -> None:
    model, other = detector(*OLD), detector(*OLD)
    (tmp_path / "without").mkdir()
    without = saved(other, tmp_path / "without")
    model.assumptions = replace(model.assumptions, score_threshold=0.1 + 0.2)
    path = saved(model, tmp_path)
    for checkpointer in (DINOCheckpointer, DetectionCheckpointer):
        checkpointer(other).load(path)
        assert other.assumptions == model.assumptions
        checkpointer(other).load(without)
        assert other.assumptions.score_threshold is None


def test_names_come_with_the_weights_unless_they_are_a_start_for_other_data(detector: Callable, tmp_path: Path) -> None:
    path = saved(detector(*OLD), tmp_path)
    evaluated, resumed, started = (detector(NUM_CLASSES=len(OLD)) for _ in range(3))
    DINOCheckpointer(evaluated, for_evaluation=True).load(path)
    DINOCheckpointer(resumed, str(tmp_path)).resume_or_load("", resume=True)
    DINOCheckpointer(started, trainer=nn.Linear(1, 1)).load(path, checkpointables=[])
    names = [model.assumptions.class_names for model in (evaluated, resumed, started)]
    assert names == [tuple(OLD), tuple(OLD), ()]


def test_detectron2s_own_checkpointer_refuses_other_names(detector: Callable, tmp_path: Path) -> None:
    path = saved(detector(*OLD), tmp_path)
    with pytest.raises(ValueError, match="CLASS_NAMES"):
        DetectionCheckpointer(detector(*reversed(OLD))).load(path)


def test_names_in_front_of_which_data_parallelism_put_its_own(detector: Callable, tmp_path: Path) -> None:
    old, new = detector(*OLD), detector("bird")
    state = {f"module.{name}": value for name, value in old.state_dict().items()}
    torch.save({"model": state}, tmp_path / "parallel.pth")
    DINOCheckpointer(new).load(str(tmp_path / "parallel.pth"))
    assert torch.equal(class_rows(new)[0, 0], class_rows(old)[0, 3])


def test_compiled_model_has_the_names_of_the_plain_one(detector: Callable, tmp_path: Path) -> None:
    old, new = detector(*OLD), detector(*OLD)
    DINOCheckpointer(torch.compile(new), for_evaluation=True).load(saved(old, tmp_path))
    assert torch.equal(class_rows(new), class_rows(old))
    DINOCheckpointer(torch.compile(new), str(tmp_path)).save("compiled")
    DINOCheckpointer(detector(*OLD), for_evaluation=True).load(str(tmp_path / "compiled.pth"))


# --- fewer queries, and more


def with_queries(model: DINO, count: int) -> Instances:
    model.query_selection.num_queries = count
    with torch.no_grad():
        return model.eval()([IMAGE])[0]["instances"]


@pytest.mark.parametrize("for_evaluation", [True, False])
def test_fewer_queries_are_the_first_and_predict_as_if_lowered_after_loading(
    for_evaluation: bool, detector: Callable, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    old, fewer = detector(*OLD), detector(*OLD, NUM_QUERIES=7)
    path = saved(old, tmp_path)
    with caplog.at_level(logging.INFO):
        DINOCheckpointer(fewer, for_evaluation=for_evaluation).load(path)
    assert "has 20 content queries, MODEL.DINO.NUM_QUERIES is 7: using the first 7" in caplog.text
    assert torch.equal(fewer.query_selection.content.weight, old.query_selection.content.weight[:7])
    expected, found = with_queries(old, 7), with_queries(fewer, 7)
    assert len(found) == 7 * len(OLD)
    assert torch.equal(found.scores, expected.scores)
    assert torch.equal(found.pred_boxes.tensor, expected.pred_boxes.tensor)


def test_more_queries_are_an_error_in_evaluation_and_new_in_training(
    detector: Callable, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    old, more = detector(*OLD), detector(*OLD, NUM_QUERIES=30)
    path = saved(old, tmp_path)
    initial = more.query_selection.content.weight.detach().clone()
    with pytest.raises(ValueError, match=r"NUM_QUERIES is 30: the rest would be random. Set it to 20 or fewer"):
        DINOCheckpointer(more, for_evaluation=True).load(path)
    DINOCheckpointer(more).load(path)
    assert "Newly initialised: the last 10" in caplog.text
    assert torch.equal(more.query_selection.content.weight[:20], old.query_selection.content.weight)
    assert torch.equal(more.query_selection.content.weight[20:], initial[20:])


def test_training_is_resumed_with_as_many_queries(detector: Callable, tmp_path: Path) -> None:
    saved(detector(*OLD), tmp_path)
    checkpointer = DINOCheckpointer(detector(*OLD, NUM_QUERIES=7), str(tmp_path), trainer=nn.Linear(1, 1))
    with pytest.raises(ValueError, match=r"NUM_QUERIES is 7\. Resuming needs the same number"):
        checkpointer.resume_or_load("", resume=True)


@pytest.mark.parametrize("count", [7, 30])
def test_static_queries_are_not_a_choice(count: int, detector: Callable, tmp_path: Path) -> None:
    path = saved(detector(*OLD, QUERY_SELECTION="static"), tmp_path)
    with pytest.raises(ValueError, match=r"Each static query has learned its own part(.|\n)*NUM_QUERIES 20\."):
        DINOCheckpointer(detector(*OLD, QUERY_SELECTION="static", NUM_QUERIES=count)).load(path)


@pytest.mark.parametrize("count", [7, 30])
def test_queries_of_which_nothing_is_learned_may_be_any_number(count: int, detector: Callable, tmp_path: Path) -> None:
    model = detector(*OLD, QUERY_SELECTION="pure", NUM_QUERIES=count)
    DINOCheckpointer(model, for_evaluation=True).load(saved(detector(*OLD, QUERY_SELECTION="pure"), tmp_path))
    assert len(with_queries(model, count)) == count * len(OLD)


@pytest.mark.parametrize("count", [7, 30])
def test_detectron2s_own_checkpointer_leaves_no_query_random(count: int, detector: Callable, tmp_path: Path) -> None:
    path = saved(detector(*OLD), tmp_path)
    with pytest.raises(ValueError, match=rf"MODEL\.DINO\.NUM_QUERIES, {count}, so they were dropped\."):
        DetectionCheckpointer(detector(*OLD, NUM_QUERIES=count)).load(path)


# --- files of other models


def test_torchvisions_resnet_is_nothing_of_detectron2s(tmp_path: Path) -> None:
    """Though the frozen batch norms do not miss their statistics."""
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "torchvision.pth")
    with pytest.raises(ValueError, match=r"holds another model: it has 0 of"):
        DINOCheckpointer(build_model(resnet_config())).load(str(tmp_path / "torchvision.pth"))


def other_models(detector: Callable) -> dict[str, dict[str, Tensor]]:
    backbone = {name: x for name, x in detector("a").state_dict().items() if name.startswith("backbone.")}
    heads = {f"roi_heads.{i}.weight": torch.ones(1) for i in range(len(backbone) // 4)}
    resnet = {f"layer1.{i}.conv1.weight": torch.ones(1) for i in range(9)}
    return {"a torchvision file": resnet, "a detector on the same backbone": backbone | heads, "an empty file": {}}


@pytest.mark.parametrize("which", ["a torchvision file", "a detector on the same backbone", "an empty file"])
def test_another_model_is_refused(which: str, detector: Callable, tmp_path: Path) -> None:
    state = other_models(detector)[which]
    path = tmp_path / "other.pth"
    torch.save({"model": state}, path)
    with pytest.raises(ValueError, match=r"other\.pth holds another model: it has \d+ of this model.s \d+") as error:
        DINOCheckpointer(detector(*OLD)).load(str(path))
    assert all(name in str(error.value) for name in list(state)[:5])
    assert "tools/convert_checkpoint.py" in str(error.value)


def test_file_whose_weights_lie_deeper_is_refused(detector: Callable, tmp_path: Path) -> None:
    torch.save({"state_dict": {"x": torch.ones(1)}, "epoch": 1}, tmp_path / "mmdet.pth")
    with pytest.raises(ValueError, match=r"0 of this model.s \d+ .* state_dict, epoch"):
        DINOCheckpointer(detector(*OLD)).load(str(tmp_path / "mmdet.pth"))


@pytest.mark.parametrize(("theirs", "ours"), [("18", "34"), ("34", "18")], ids=["shallower", "deeper"])
def test_backbone_of_another_depth_is_refused(theirs: str, ours: str, tmp_path: Path) -> None:
    state = build_model(resnet_config("MODEL.RESNETS.DEPTH", theirs)).backbone.state_dict(prefix="backbone.")
    torch.save({"model": state}, tmp_path / "resnet.pth")
    with pytest.raises(ValueError, match=r"resnet\.pth holds another model"):
        DINOCheckpointer(build_model(resnet_config("MODEL.RESNETS.DEPTH", ours))).load(str(tmp_path / "resnet.pth"))
    same = build_model(resnet_config("MODEL.RESNETS.DEPTH", theirs))
    DINOCheckpointer(same).load(str(tmp_path / "resnet.pth"))
    assert torch.equal(same.backbone.stem.conv1.weight, state["backbone.stem.conv1.weight"])


def test_no_weights_are_nothing_to_evaluate(detector: Callable, tmp_path: Path) -> None:
    checkpointer = DINOCheckpointer(detector(*OLD), str(tmp_path / "nowhere"), for_evaluation=True)
    for resume in (False, True):
        with pytest.raises(ValueError, match=r"MODEL\.WEIGHTS is empty.*nowhere.*no checkpoint"):
            checkpointer.resume_or_load("", resume=resume)
    assert DINOCheckpointer(detector(*OLD)).load("") == {}  # to train from scratch


def test_backbone_alone_is_a_start_but_nothing_to_evaluate(detector: Callable, tmp_path: Path) -> None:
    state = {name: x + 1 for name, x in detector("a").state_dict().items() if name.startswith("backbone.")}
    state |= {"classifier.weight": torch.ones(1), "classifier.bias": torch.ones(1)}
    path = str(tmp_path / "imagenet.pth")
    torch.save(state, path)
    model = detector(*OLD)
    DINOCheckpointer(model).load(path)
    assert all(torch.equal(x, state[f"backbone.{name}"]) for name, x in model.backbone.state_dict().items())
    with pytest.raises(ValueError, match="no class heads"):
        DINOCheckpointer(model, for_evaluation=True).load(path)


OTHER_CONFIGS = [  # the config that predicts, the one that was trained, and what is said
    ({"DEC_LAYERS": 6}, {}, r"not in the weights .*decoder\.layers\.2\..*DEC_LAYERS"),
    ({"DEC_LAYERS": 1}, {}, r"not used by the model .*decoder\.layers\.1\..*DEC_LAYERS"),
    ({"ENC_LAYERS": 2}, {}, r"not in the weights .*encoder\.layers\.1\..*ENC_LAYERS"),
    ({"DIM_FEEDFORWARD": 128}, {}, r"of another shape .*ffn.* \(64,\), \(128,\) in the model.*DIM_FEEDFORWARD"),
    ({"NHEADS": 8}, {}, r"of another shape .*(attention_weights|sampling_offsets).*NHEADS"),
    ({"NUM_POINTS": 2}, {}, r"of another shape .*NUM_POINTS"),
    ({"HIDDEN_DIM": 32}, {}, r"of another shape .*HIDDEN_DIM"),
    ({"NUM_FEATURE_LEVELS": 5}, {}, r"not in the weights .*neck\..*NUM_FEATURE_LEVELS"),
    ({"QUERY_SELECTION": "static"}, {}, r"not in the weights .*query_selection\..*QUERY_SELECTION"),
    ({"QUERY_SELECTION": "pure"}, {}, r"not used by the model .*query_selection\.content\..*QUERY_SELECTION"),
    (
        {"INTERLEAVED__FINEST_FEEDFORWARD": 128},
        {"ENCODER": "interleaved"},
        r"of another shape .*finest\..*INTERLEAVED\.FINEST_FEEDFORWARD",
    ),
    (
        {"INTERLEAVED__COARSE_UPDATES": 1},
        {"ENCODER": "interleaved"},
        r"not used by the model .*coarse\.1\..*INTERLEAVED\.COARSE_UPDATES",
    ),
]


@pytest.mark.parametrize(("ours", "theirs", "said"), OTHER_CONFIGS, ids=[str(case[0]) for case in OTHER_CONFIGS])
def test_weights_of_another_config_are_not_evaluated(
    ours: dict, theirs: dict, said: str, detector: Callable, tmp_path: Path
) -> None:
    path = saved(detector(*OLD, **theirs), tmp_path)
    with pytest.raises(ValueError, match=rf"weights\.pth does not match the config(.|\n)*{said}"):
        DINOCheckpointer(detector(*OLD, **theirs, **ours), for_evaluation=True).load(path)
    DINOCheckpointer(detector(*OLD, **theirs), for_evaluation=True).load(path)


def test_weights_on_another_backbone_are_not_evaluated(
    detector: Callable, tiny_config: Callable, tmp_path: Path
) -> None:
    path = saved(detector(*OLD), tmp_path)
    cfg = tiny_config(NUM_CLASSES=len(OLD), CLASS_NAMES=OLD)
    cfg.MODEL.TIMM.NAME = "mobilenetv2_100"
    with pytest.raises(ValueError, match=r"of another shape .*backbone\.body.*MODEL\.BACKBONE\.NAME .*TIMM"):
        DINOCheckpointer(build_model(cfg), for_evaluation=True).load(path)
    DINOCheckpointer(build_model(cfg)).load(path)  # a start for training still


@pytest.mark.parametrize("ours", [{"DN__TYPE": "none"}, {"LOOK_FORWARD": "once"}])
def test_what_only_training_uses_may_differ_in_evaluation(ours: dict, detector: Callable, tmp_path: Path) -> None:
    path = saved(detector(*OLD), tmp_path)
    DINOCheckpointer(detector(*OLD, **ours), for_evaluation=True).load(path)
    path = saved(detector(*OLD, **ours), tmp_path)
    DINOCheckpointer(detector(*OLD), for_evaluation=True).load(path)


# --- files that could run code


class Trap:
    """Whose loading touches a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("suffix", ["pth", "pkl"])
def test_file_that_could_run_code_is_loaded_for_those_who_trust_it(
    suffix: str, detector: Callable, tmp_path: Path
) -> None:
    path, sprung = tmp_path / f"weights.{suffix}", tmp_path / "sprung"
    old, new = detector(*OLD), detector(*OLD)
    state = OrderedDict((name, x.numpy()) for name, x in old.state_dict().items())
    content = {"model": state, "__author__": "someone", "args": Trap(sprung)}
    if suffix == "pth":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match=rf"weights\.{suffix} (.|\n)*MODEL\.TRUST_WEIGHTS"):
        DINOCheckpointer(new).load(str(path))
    assert not sprung.exists()
    DINOCheckpointer(new, trust_files=True).load(str(path))
    assert sprung.exists()
    assert torch.equal(class_rows(new), class_rows(old))


@pytest.mark.parametrize("suffix", ["pth", "pkl"])
def test_what_a_file_asks_for_is_said(suffix: str, detector: Callable, tmp_path: Path) -> None:
    path = tmp_path / f"published.{suffix}"
    content = {"model": {}, "args": argparse.Namespace(lr=1)}
    if suffix == "pth":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    complaint = rf"published\.{suffix} .* it uses argparse\.Namespace\n.*convert_checkpoint"
    with pytest.raises(ValueError, match=complaint):
        DINOCheckpointer(detector(*OLD)).load(str(path))


NO_CHECKPOINTS = {
    "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 1234\n",
    "page": b"<!DOCTYPE html><html><body>Not found</body></html>",
    "text": b"Internal Server Error",
    "cut": pickle.dumps({"model": {"weight": np.ones(1000)}})[:-50],
    "empty": b"",
}


@pytest.mark.parametrize("suffix", ["pth", "pkl", "safetensors"])
@pytest.mark.parametrize("kind", NO_CHECKPOINTS)
def test_file_that_is_no_checkpoint_is_not_taken_for_code(
    kind: str, suffix: str, detector: Callable, tmp_path: Path
) -> None:
    path = tmp_path / f"{kind}.{suffix}"
    path.write_bytes(NO_CHECKPOINTS[kind])
    with pytest.raises(ValueError, match=rf"{kind}\.{suffix} is damaged or not a checkpoint") as caught:
        DINOCheckpointer(detector(*OLD)).load(str(path))
    message = str(caught.value)
    assert not any(word in message for word in ("TRUST", "trust", "weights_only"))
    assert ("git lfs pull" in message) == (kind == "pointer")


@pytest.mark.parametrize("protocol", [2, pickle.HIGHEST_PROTOCOL])
def test_arrays_of_the_model_zoo_need_no_trust(protocol: int, detector: Callable, tmp_path: Path) -> None:
    """As detectron2's ImageNet files are: without the name of the backbone, to be matched by their ends."""
    old, model = detector(*OLD), detector(*OLD)
    state = {name.removeprefix("body."): x.numpy() + 1 for name, x in old.backbone.state_dict().items() if x.dim()}
    content = {"model": state | {"fc.bias": np.ones(3)}, "__author__": "torchvision", "matching_heuristics": True}
    path = tmp_path / "R-50.pkl"
    path.write_bytes(pickle.dumps(content, protocol))
    DINOCheckpointer(model).load(str(path))
    expected = {name: torch.from_numpy(x) for name, x in state.items()}
    own = {name.removeprefix("body."): x for name, x in model.backbone.state_dict().items() if x.dim()}
    assert all(torch.equal(own[name], x) for name, x in expected.items())


@pytest.mark.parametrize("names", [["red", "green"], []], ids=["names", "no names"])
def test_detectron2s_checkpointer_refuses_weights_of_another_number_of_classes(
    names: list[str], detector: Callable, tmp_path: Path
) -> None:
    path = saved(detector(*names, NUM_CLASSES=2), tmp_path)
    other = detector(NUM_CLASSES=3)
    with pytest.raises(ValueError, match=r"NUM_CLASSES is 3, the weights are for 2: .*DINOCheckpointer"):
        DetectionCheckpointer(other).load(path)
    DetectionCheckpointer(detector(NUM_CLASSES=2, CLASS_NAMES=names)).load(path)


def test_predictor_refuses_weights_of_another_number_of_classes(tiny_config: Callable, tmp_path: Path) -> None:
    cfg = tiny_config(NUM_CLASSES=2)
    cfg.DATASETS.TEST = ()
    cfg.MODEL.WEIGHTS = saved(build_model(cfg), tmp_path)
    DefaultPredictor(cfg)
    cfg.MODEL.DINO.NUM_CLASSES = 4
    with pytest.raises(ValueError, match="NUM_CLASSES is 4, the weights are for 2"):
        DefaultPredictor(cfg)


def test_number_of_classes_of_older_checkpoints_is_that_of_their_names(detector: Callable) -> None:
    for names, number in ((["red", "green"], 2), ([], None)):
        facts = asdict(detector(*names, NUM_CLASSES=2).assumptions)
        del facts["num_classes"]
        old = torch.zeros(CAPACITY, dtype=torch.uint8)
        text = json.dumps(facts).encode()
        old[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        assert Assumptions.from_tensor(old).num_classes == number
        lines = detector(NUM_CLASSES=3).assumptions.contradictions(Assumptions.from_tensor(old))
        assert len(lines) == (0 if number is None else 1)


class Storage(PathHandler):
    """`test://a/b` is `root/a/b`: storage that is reached by its own handler."""

    def __init__(self, root: Path):
        super().__init__()
        self.root = root

    def _get_supported_prefixes(self) -> list[str]:
        return ["test://"]

    def _local(self, path: str) -> Path:
        return self.root / path.removeprefix("test://")

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **kwargs: object) -> IO:
        return open(self._local(path), mode)

    def _get_local_path(self, path: str, force: bool = False, **kwargs: object) -> str:
        return str(self._local(path))

    def _exists(self, path: str, **kwargs: object) -> bool:
        return self._local(path).exists()

    def _isfile(self, path: str, **kwargs: object) -> bool:
        return self._local(path).is_file()

    def _isdir(self, path: str, **kwargs: object) -> bool:
        return self._local(path).is_dir()

    def _ls(self, path: str, **kwargs: object) -> list[str]:
        return sorted(each.name for each in self._local(path).iterdir())

    def _mkdirs(self, path: str, **kwargs: object) -> None:
        self._local(path).mkdir(parents=True, exist_ok=True)

    def _rm(self, path: str, **kwargs: object) -> None:
        self._local(path).unlink()


def test_runs_lie_where_iopath_reaches(detector: Callable, tiny_config: Callable, tmp_path: Path) -> None:
    PathManager.register_handler(Storage(tmp_path), allow_override=True)
    cfg = tiny_config()
    cfg.OUTPUT_DIR = "test://run"
    check_run_folder(cfg, resume=False)
    checkpointer = DINOCheckpointer(detector("red", "blue"), "test://run")
    checkpointer.save("model_0000001")
    assert [path.name for path in sorted((tmp_path / "run").iterdir())] == ["last_checkpoint", "model_0000001.pth"]
    again = DINOCheckpointer(detector("red", "blue"), "test://run")
    again.resume_or_load("", resume=True)
    assert torch.equal(class_rows(again.model), class_rows(checkpointer.model))
    with pytest.raises(FileExistsError, match="test://run already holds a run"):
        check_run_folder(cfg, resume=False)
