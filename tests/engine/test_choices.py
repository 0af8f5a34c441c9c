"""What the options of tools/train_net.py stand for: length, batch, learning rate, classes, weights."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.solver import build_lr_scheduler
from detectron2.utils import comm

from dino_d2.config import find_config_file, load_config, overlay
from dino_d2.data import CocoFiles, ImageMapper, register_datasets
from dino_d2.data.datasets import TRAIN_NAME, VAL_NAME
from dino_d2.engine import batch_size, choices, pace
from dino_d2.engine.batch_size import largest_batch, largest_divisor, largest_size, make_steps
from dino_d2.engine.choices import Run, choose, schedule
from dino_d2.engine.run import train_or_evaluate
from dino_d2.tools import train_net
from tests.synthetic import COLOURS, make_batch, write_rectangles

RECIPE = "dino_r50_4scale_12ep"


@pytest.fixture(autouse=True)
def _forget_data_sets() -> Iterator[None]:
    yield
    for name in {TRAIN_NAME, VAL_NAME} & set(DatasetCatalog.list()):
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """train.json and its images; nothing to evaluate on."""
    annotations, images = write_rectangles(tmp_path / "data", count=10, size=64, empty=1)
    annotations.rename(tmp_path / "data" / "train.json")
    images.rename(tmp_path / "data" / "train")
    return tmp_path / "data"


def chosen(*arguments: object) -> Run:
    return choose(train_net.parse([str(argument) for argument in arguments]))


# --- length


@pytest.mark.parametrize(
    ("images", "batch", "epochs", "length", "drop", "period"),
    [
        (300, 2, 24, 3600, 3000, 300),  # 12 evaluations
        (300, 2, 12, 1800, 1500, 150),
        (301, 2, 12, 1812, 1510, 151),
        (5, 16, 6, 6, 5, 1),  # fewer images than the batch
        (100, 4, 50, 1250, 1041, 125),  # every 5 epochs
    ],
)
def test_schedule_in_epochs(images: int, batch: int, epochs: int, length: int, drop: int, period: int) -> None:
    epoch = math.ceil(images / batch)
    values = {choice.key: choice.value for choice in schedule(epochs * epoch, epoch, 0, "")}
    assert values == {
        "SOLVER.MAX_ITER": length,
        "SOLVER.STEPS": (drop,),
        "TEST.EVAL_PERIOD": period,
        "SOLVER.CHECKPOINT_PERIOD": period,
    }


def test_length_in_minutes(data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """As many steps as fit, at the pace of this process with its share of the batch, in parts."""
    asked = []
    monkeypatch.setattr(choices, "seconds_per_step", lambda cfg, *how: asked.append((cfg, *how)) or 0.3)
    arguments = ("--data", data, "--config-file", RECIPE, "--minutes", 2, "--batch-size", 4)
    cfg = chosen(*arguments, "SOLVER.ACCUMULATION_STEPS", "2").config()
    assert (cfg.SOLVER.MAX_ITER, cfg.TEST.EVAL_PERIOD) == (400, 34)  # 200 epochs of 2 steps, 17 between evaluations
    assert asked[0][1:] == (4, 2)
    assert asked[0][0].SOLVER.IMS_PER_BATCH == 4
    said = "SOLVER.MAX_ITER 400  # 2 minutes at 0.3 s per step, measured now; 200.0 epochs"
    assert said in capsys.readouterr().out


def test_a_resumed_run_keeps_the_length_it_was_begun_with(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though its steps would take another time now."""
    output = tmp_path / "out"
    monkeypatch.setattr(choices, "seconds_per_step", lambda cfg, *how: 0.5)
    arguments = ("--data", data, "--config-file", RECIPE, "--minutes", 1, "--output", output, "--resume")
    cfg = chosen(*arguments).config()
    (output / "config.yaml").write_text(cfg.dump())
    (output / "last_checkpoint").write_text("model_0000009.pth")
    monkeypatch.setattr(choices, "seconds_per_step", lambda cfg, *how: 0.1)
    assert chosen(*arguments).config().SOLVER.MAX_ITER == cfg.SOLVER.MAX_ITER == 120


def test_run_that_has_weights_but_no_checkpoint_is_begun_again_only_when_asked(data: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "model_best.pth").touch()
    arguments = ("--data", data, "--config-file", RECIPE, "--output", output)
    with pytest.raises(FileExistsError, match=r"model_best\.pth of another run"):
        chosen(*arguments)
    assert chosen(*arguments, "--resume").train is not None


def test_pace_is_that_of_a_step_with_its_data(tiny_cfg: CfgNode, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every image is loaded; the first steps do not count."""
    loaded, clock = [], itertools.count()
    read = ImageMapper.__call__
    monkeypatch.setattr(ImageMapper, "__call__", lambda mapper, x: loaded.append(1) or read(mapper, x))
    monkeypatch.setattr(batch_size.time, "perf_counter", lambda: float(max(0, next(clock) - pace.WARM_UP + 1)))
    tiny_cfg.DATASETS.COCO_FORMAT = [["own", str(data / "train.json"), str(data / "train")]]
    tiny_cfg.DATASETS.TRAIN = ("own",)
    register_datasets(tiny_cfg)
    try:
        assert pace.seconds_per_step(tiny_cfg, share=2, parts=2) == 1
    finally:
        DatasetCatalog.remove("own")
        MetadataCatalog.remove("own")
    assert len(loaded) == 2 * (pace.WARM_UP + pace.TIMED)


@pytest.mark.parametrize(
    ("interrupted", "threads", "device", "warned"),
    [(18, 2, "cpu", False), (145, 2, "cpu", True), (145, 1, "cpu", False), (145, 2, "cuda", False)],
)  # per second of processor time
def test_pace_beside_other_programs_is_warned_about(
    interrupted: int, threads: int, device: str, warned: bool, tiny_cfg: CfgNode, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    usage = iter([SimpleNamespace(ru_utime=t, ru_stime=t, ru_nivcsw=2 * t * interrupted) for t in (5, 9)])
    monkeypatch.setattr(pace.resource, "getrusage", lambda who: next(usage))
    monkeypatch.setattr(pace.torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(pace, "make_steps", lambda *how: list(range(pace.WARM_UP + pace.TIMED)))
    monkeypatch.setattr(pace, "release", lambda device: None)
    tiny_cfg.MODEL.DEVICE = device
    assert pace.seconds_per_step(tiny_cfg, share=2, parts=1) == 1
    assert ("OMP_NUM_THREADS" in caplog.text) == warned


@pytest.mark.parametrize(("share", "enabled"), [(0.2, True), (0.8, False), (7.0, False)])
def test_a_cpu_trains_in_bfloat16_where_that_is_quicker(
    data: Path, share: float, enabled: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(choices, "bfloat16_share", lambda: share)
    measured = []
    monkeypatch.setattr(choices, "seconds_per_step", lambda cfg, *how: measured.append(cfg.SOLVER.AMP.ENABLED) or 1.0)
    arguments = ("--data", data, "--config-file", RECIPE, "--minutes", 1, "MODEL.DEVICE", "cpu")
    amp = chosen(*arguments).config().SOLVER.AMP
    assert (amp.ENABLED, amp.DTYPE == "bfloat16") == (enabled, enabled)
    assert measured == [enabled]  # the pace is that of the precision
    said = f"SOLVER.AMP.ENABLED {enabled}  # bfloat16 products take {share:.2g} of float32's time on this processor"
    assert said in capsys.readouterr().out
    assert not chosen(*arguments, "SOLVER.AMP.ENABLED", "False").config().SOLVER.AMP.ENABLED


def test_minutes_choose_the_precision_without_data(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of a recipe that names its data sets, as the demo's."""
    monkeypatch.setattr(choices, "bfloat16_share", lambda: 2.0)
    monkeypatch.setattr(choices, "seconds_per_step", lambda cfg, *how: 1.0)
    sets = f'[["own", "{data / "train.json"}", "{data / "train"}"]]'
    recipe = tmp_path / "own.yaml"
    recipe.write_text(
        f"_BASE_: {find_config_file(RECIPE)}\nMODEL: {{DEVICE: cpu}}\nSOLVER: {{AMP: {{ENABLED: True}}}}\n"
        f"DATASETS: {{COCO_FORMAT: {sets}, TRAIN: [own], TEST: []}}\n"
    )
    try:
        assert not chosen("--config-file", recipe, "--minutes", 1).config().SOLVER.AMP.ENABLED
    finally:
        DatasetCatalog.remove("own")
        MetadataCatalog.remove("own")


def test_a_resumed_run_keeps_its_precision(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though this processor would have another."""
    monkeypatch.setattr(choices, "bfloat16_share", lambda: 0.2)
    output = tmp_path / "out"
    arguments = ("--data", data, "--config-file", RECIPE, "--output", output, "--resume", "MODEL.DEVICE", "cpu")
    cfg = chosen(*arguments).config()
    (output / "config.yaml").write_text(cfg.dump())
    (output / "last_checkpoint").write_text("model_0000009.pth")
    monkeypatch.setattr(choices, "bfloat16_share", lambda: 2.0)
    amp = chosen(*arguments).config().SOLVER.AMP
    assert (amp.ENABLED, amp.DTYPE) == (True, "bfloat16")


def test_a_share_is_of_a_product_that_is_as_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 takes 2 s, bfloat16 1 s; the first of each, which warms up, 9 s."""
    seen: list[tuple[torch.dtype, torch.Size, torch.Size]] = []

    def seconds(a: torch.Tensor, b: torch.Tensor) -> float:
        seen.append((a.dtype, a.shape, b.shape))
        return 9.0 if len(seen) <= 2 else {torch.float32: 2.0, torch.bfloat16: 1.0}[a.dtype]

    monkeypatch.setattr(pace, "_seconds_of_product", seconds)
    assert pace.bfloat16_share() == 0.5
    assert len({tuple(shapes) for _, *shapes in seen}) == 1


def test_warmup_is_no_longer_than_an_epoch_or_a_tenth_of_the_run() -> None:
    assert {choice.key: choice.value for choice in schedule(240, 10, 150, "")}["SOLVER.WARMUP_ITERS"] == 10
    assert {choice.key: choice.value for choice in schedule(600, 200, 150, "")}["SOLVER.WARMUP_ITERS"] == 60
    assert "SOLVER.WARMUP_ITERS" not in {choice.key for choice in schedule(4800, 200, 150, "")}


@pytest.mark.parametrize("name", ["few_photos", "fine_tuning"])
@pytest.mark.parametrize(("length", "epoch"), [(30, 30), (35, 100), (60, 100), (160, 500), (720, 30)])
def test_short_runs_reach_their_learning_rate(name: str, length: int, epoch: int) -> None:
    """A warm-up as long as the run would leave it near 0: a cosine has come down by then."""
    settings = [part for layer in ("few_photos", name) for item in overlay(layer) for part in item]
    cfg = load_config(RECIPE, settings)
    chosen = schedule(length, epoch, cfg.SOLVER.WARMUP_ITERS, "")
    cfg.merge_from_list([part for choice in chosen for part in (choice.key, choice.value)])
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = build_lr_scheduler(cfg, optimizer)
    rates = []
    for _ in range(length):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert max(rates) > 0.9


def test_a_run_shorter_than_an_epoch_is_saved_in_between() -> None:
    """Of hours on a CPU, less than an epoch of COCO."""
    values = {choice.key: choice.value for choice in schedule(3350, 59144, 0, "")}
    assert values["SOLVER.CHECKPOINT_PERIOD"] == 279


def test_a_run_of_one_step_has_no_decay() -> None:
    assert {choice.key: choice.value for choice in schedule(1, 1, 0, "")}["SOLVER.STEPS"] == ()


# --- batch


@pytest.mark.parametrize(
    ("share", "limit", "part"), [(16, 99, 16), (16, 5, 4), (12, 8, 6), (6, 3, 2), (7, 4, 1), (2, 1, 1), (8, 0, 0)]
)
def test_parts_are_doubled_until_they_do_not_fit_and_divide_the_share(share: int, limit: int, part: int) -> None:
    tried = []

    def fits(size: int) -> bool:
        tried.append(size)
        return size <= limit

    assert largest_divisor(share, fits) == part
    assert len(tried) == len(set(tried))
    assert sum(size > limit for size in tried) <= 1  # running out of memory is slow


class Memory:
    """A device that holds so many images; `make_steps` for `largest_batch`."""

    def __init__(self, limit: int):
        self.limit, self.batches = limit, []

    def __call__(self, cfg: CfgNode, batches: list[list[dict]]) -> None:
        batch = batches[0]
        self.batches.append(batch)
        if len(batch) > self.limit:
            raise torch.OutOfMemoryError("of the test")


@pytest.fixture
def device_cfg(tiny_cfg: CfgNode, monkeypatch: pytest.MonkeyPatch) -> CfgNode:
    """Of a device that is not the CPU."""
    monkeypatch.setattr(batch_size, "release", lambda device: None)
    tiny_cfg.MODEL.DEVICE = "meta"
    return tiny_cfg


def test_memory_is_tried_with_the_largest_photographs(device_cfg: CfgNode, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = Memory(limit=5)
    monkeypatch.setattr(batch_size, "make_steps", memory)
    device_cfg.INPUT.MIN_SIZE_TRAIN, device_cfg.INPUT.MAX_SIZE_TRAIN = (32, 48), 80
    assert largest_batch(device_cfg, share=16, most_objects=7) == 4
    assert [len(batch) for batch in memory.batches] == [1, 2, 4, 8]
    (photograph,) = memory.batches[0]
    assert photograph["image"].shape == (3, 48, 88)  # a tenth more
    assert len(photograph["instances"]) == 7
    device_cfg.DATALOADER.ASPECT_RATIO_GROUPING = False  # wide ones and tall ones are padded to a square
    assert largest_size(device_cfg) == (80, 88)


def test_too_little_memory_for_one_photograph_is_an_error(device_cfg: CfgNode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_size, "make_steps", Memory(limit=0))
    with pytest.raises(ValueError, match=r"one image of 800 x 1467 .*INPUT\.MIN_SIZE_TRAIN"):
        largest_batch(device_cfg, share=16, most_objects=1)


@pytest.mark.parametrize(("share", "part"), [(1, 1), (2, 2), (3, 1), (16, 2)])
def test_a_cpu_is_given_two(tiny_cfg: CfgNode, share: int, part: int) -> None:
    assert largest_batch(tiny_cfg, share, most_objects=1) == part


def test_the_steps_that_try_are_steps_of_the_training(tiny_cfg: CfgNode, monkeypatch: pytest.MonkeyPatch) -> None:
    models = []
    build = batch_size.build_model
    monkeypatch.setattr(batch_size, "build_model", lambda cfg: models.append(build(cfg)) or models[-1])
    torch.manual_seed(0)
    make_steps(tiny_cfg, [make_batch([2, 0])] * 2)
    (model,) = models
    moved = model.decoder.norm.weight
    assert not torch.equal(moved, torch.ones_like(moved))
    assert all(parameter.grad is None for parameter in model.parameters())


# --- all of it


def test_the_steps_that_try_ask_no_other_process(tiny_cfg: CfgNode, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others wait for the choices of the main process."""
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *arguments: pytest.fail("asks the others"))
    make_steps(tiny_cfg, [make_batch([2, 0])] * 2)


def test_a_folder_makes_the_config(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    output = tmp_path / "out"
    run = chosen("--data", data, "--config-file", RECIPE, "--epochs", 6, "--batch-size", 4, "--output", output)
    cfg = run.config()
    assert (str(output), (TRAIN_NAME,), (VAL_NAME,)) == (cfg.OUTPUT_DIR, cfg.DATASETS.TRAIN, cfg.DATASETS.TEST)
    assert (2, list(COLOURS)) == (cfg.MODEL.DINO.NUM_CLASSES, cfg.MODEL.DINO.CLASS_NAMES)
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS, cfg.TEST.EVAL_PERIOD) == (12, (10,), 2)  # 8 of 10 images are left
    settings = dict(overlay("few_photos"))
    rate = settings["SOLVER.BASE_LR"] * 4 / settings["SOLVER.IMS_PER_BATCH"]
    assert (4, pytest.approx(rate)) == (cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.BASE_LR)
    assert cfg.SOLVER.BEST_METRIC == settings["SOLVER.BEST_METRIC"] == "bbox/AP"
    printed = capsys.readouterr().out
    assert "held out" in printed
    assert "images without boxes" in printed  # of the check
    assert "SOLVER.MAX_ITER 12  #" in printed
    assert f"SOLVER.BASE_LR {cfg.SOLVER.BASE_LR}  # scaled with the batch size" in printed


def test_values_of_the_user_win(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    own = (
        "SOLVER.MAX_ITER",
        "7",
        "SOLVER.BASE_LR",
        "0.5",
        "SOLVER.IMS_PER_BATCH",
        "8",
        "OUTPUT_DIR",
        tmp_path / "mine",
    )
    cfg = chosen("--data", data, "--config-file", RECIPE, "--output", tmp_path / "out", *own).config()
    assert (7, 0.5, str(tmp_path / "mine")) == (cfg.SOLVER.MAX_ITER, cfg.SOLVER.BASE_LR, cfg.OUTPUT_DIR)
    assert cfg.SOLVER.STEPS == (20,)  # 24 epochs of one step: the batch is the user's
    assert cfg.SOLVER.ACCUMULATION_STEPS == 4  # of 2 images, on a CPU
    assert not (tmp_path / "out").exists()
    assert "SOLVER.MAX_ITER" not in capsys.readouterr().out


def test_every_process_gets_a_photograph(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comm, "get_world_size", lambda: 3)
    cfg = chosen("--data", data, "--config-file", RECIPE, "--output", tmp_path / "out").config()
    assert cfg.SOLVER.IMS_PER_BATCH == 3  # not 2
    assert pytest.approx(1.5 * dict(overlay("few_photos"))["SOLVER.BASE_LR"]) == cfg.SOLVER.BASE_LR
    assert cfg.SOLVER.MAX_ITER == 24 * 3
    assert cfg.SOLVER.ACCUMULATION_STEPS == 1


def test_weights_of_the_zoo_bring_their_recipe(data: Path, tmp_path: Path) -> None:
    run = chosen("--data", data, "--weights", "dino_r50_4scale_12ep", "--output", tmp_path / "out")
    cfg = run.config()
    assert cfg.MODEL.WEIGHTS == "dino://dino_r50_4scale_12ep"
    assert cfg.MODEL.DINO.SHARE_HEADS is False  # what the publisher's weights need
    assert cfg.MODEL.DINO.NUM_CLASSES == 2
    assert cfg.SOLVER.MAX_ITER == 24 * 4


def test_backbone_of_published_weights_is_not_downloaded_again() -> None:
    cfg = chosen("--weights", "dino_convnexts_4scale_12ep", "--eval-only").config()
    assert not cfg.MODEL.TIMM.PRETRAINED


def test_a_checkpoint_brings_the_config_beside_it_but_not_its_classes(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "earlier"
    folder.mkdir()
    (folder / "model_final.pth").touch()
    weights = ("--weights", folder / "model_final.pth")
    with pytest.raises(FileNotFoundError, match=r"config\.yaml"):
        chosen("--data", data, *weights, "--output", tmp_path / "out")
    cfg = chosen("--config-file", RECIPE).config()
    cfg.MODEL.DINO.NUM_CLASSES, cfg.MODEL.DINO.CLASS_NAMES, cfg.MODEL.DINO.DEC_LAYERS = 3, ["a", "b", "c"], 2
    cfg.MODEL.TIMM.PRETRAINED = True
    cfg.DATASETS.COCO_FORMAT = [[TRAIN_NAME, "gone.json", "gone"]]
    (folder / "config.yaml").write_text(cfg.dump())
    cfg = chosen("--data", data, *weights, "--output", tmp_path / "out").config()
    assert str(folder / "model_final.pth") == cfg.MODEL.WEIGHTS
    assert (2, list(COLOURS)) == (cfg.MODEL.DINO.DEC_LAYERS, cfg.MODEL.DINO.CLASS_NAMES)
    assert not cfg.MODEL.TIMM.PRETRAINED  # the checkpoint has the backbone


def test_evaluation_changes_no_training(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = chosen("--eval-only", "--data", data, "--config-file", RECIPE, "--output", tmp_path / "out")
    cfg = run.config()
    assert (run.train, run.val) == (None, CocoFiles(data / "train.json", data / "train"))
    assert f"{data}: COCO, 10 images to evaluate on" in capsys.readouterr().out
    assert (cfg.DATASETS.TEST, cfg.SOLVER.BASE_LR, cfg.SOLVER.BEST_METRIC) == ((VAL_NAME,), 1e-4, "")


def test_augmented_evaluation_looks_at_sizes_around_the_test_size(capsys: pytest.CaptureFixture) -> None:
    options = ("--config-file", "small/dino_mobilenetv2_400", "--eval-only", "--augment")
    cfg = chosen(*options, "TEST.QUERY_METRICS", "True", "TEST.AUG.FLIP", "False").config()
    assert "TEST.AUG.MIN_SIZES '(360, 400, 440)'" in capsys.readouterr().out
    aug = cfg.TEST.AUG
    assert (aug.ENABLED, aug.MIN_SIZES, aug.MAX_SIZE, cfg.INPUT.MIN_SIZE_TEST) == (True, (360, 400, 440), 704, 0)
    assert (aug.FLIP, cfg.TEST.QUERY_METRICS) == (False, True)  # the user's own come last
    cfg = chosen(*options, "INPUT.MIN_SIZE_TEST", "200").config()
    assert cfg.TEST.AUG.MIN_SIZES == (180, 200, 220)


def test_without_these_options_nothing_is_chosen(capsys: pytest.CaptureFixture) -> None:
    assert chosen("--config-file", RECIPE, "SEED", "1") == Run(RECIPE, ("SEED", "1"), None, None)
    assert capsys.readouterr().out == ""


def test_faulty_data_stop_with_the_table_and_one_line(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    content = json.loads((data / "train.json").read_text())
    content["annotations"][0]["bbox"] = [1, 1, -5, 5]
    (data / "train.json").write_text(json.dumps(content))
    arguments = ["--data", str(data), "--config-file", RECIPE, "--output", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as ended:
        train_or_evaluate(train_net.parse(arguments))
    printed = capsys.readouterr()
    assert ended.value.code == 2
    assert "boxes of negative width or height" in printed.out
    (line,) = printed.err.splitlines()
    assert "training cannot start: correct the errors above in" in line


def test_a_run_is_not_begun_over_another(data: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    arguments = ("--data", data, "--config-file", RECIPE, "--output", output)
    (output / "config.yaml").write_text(chosen(*arguments).config().dump())
    (output / "last_checkpoint").write_text("model_final.pth")
    before = (output / "data" / "train.json").read_text()
    with pytest.raises(FileExistsError, match="already holds a run"):
        chosen(*arguments)
    chosen("--resume", *arguments)
    content = json.loads((data / "train.json").read_text())
    content["images"].pop()
    (data / "train.json").write_text(json.dumps(content))
    with pytest.raises(FileExistsError, match="from different data"):
        chosen("--resume", *arguments)
    assert (output / "data" / "train.json").read_text() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "3"], "--weights NAME_OR_PATH to start from, or --config-file"),
        (["--config-file", RECIPE, "--epochs", "0"], "0 is not a positive integer"),
        (["--config-file", RECIPE, "--batch-size", "some"], "some is not a positive integer"),
        (["--config-file", RECIPE, "--data", ".", "--train-json", "a", "--train-images", "b"], "give only one of them"),
        (["--config-file", RECIPE, "--eval-only", "--epochs", "3"], "are for training"),
        (["--config-file", RECIPE, "--eval-only", "--minutes", "3"], "are for training"),
        (["--config-file", RECIPE, "--augment"], "--augment is for evaluation"),
        (["--config-file", RECIPE, "--minutes", "-1"], "-1 is not a number of minutes above 0"),
        (["--config-file", RECIPE, "--minutes", "nan"], "nan is not a number of minutes above 0"),
        (["--config-file", RECIPE, "--minutes", "3", "--epochs", "3"], "both set the length"),
        (["--config-file", RECIPE, "--batch-size", "3", "SOLVER.IMS_PER_BATCH", "3"], "give only one of them"),
    ],
)
def test_options_that_make_no_sense_are_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as ended:
        train_net.parse(arguments)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_without_data_to_evaluate_on_no_best_weights_are_sought(data: Path, tmp_path: Path) -> None:
    """As when the weights of an earlier run are trained on: its config wants them."""
    config = tmp_path / "config.yaml"
    config.write_text(f"_BASE_: {find_config_file(RECIPE)}\nSOLVER: {{BEST_METRIC: bbox/AP, EARLY_STOPPING: 5}}\n")
    files = ("--config-file", config, "--train-json", data / "train.json", "--train-images", data / "train")
    solver = chosen(*files).config().SOLVER
    assert (solver.BEST_METRIC, solver.EARLY_STOPPING) == ("", 0)
    solver = chosen(*files, "--val-json", data / "train.json", "--val-images", data / "train").config().SOLVER
    assert (solver.BEST_METRIC, solver.EARLY_STOPPING) == ("bbox/AP", 5)


def test_batch_without_images_is_refused(data: Path) -> None:
    files = ("--train-json", data / "train.json", "--train-images", data / "train", "--epochs", 3)
    for source in (files, ("--data", data)):
        with pytest.raises(ValueError, match=r"SOLVER\.IMS_PER_BATCH is 0; it must be at least 1$"):
            chosen(*source, "--config-file", RECIPE, "SOLVER.IMS_PER_BATCH", "0")


def test_epochs_and_batch_alone_change_nothing_else(data: Path) -> None:
    files = ("--train-json", data / "train.json", "--train-images", data / "train")
    run = chosen(*files, "--config-file", RECIPE, "--epochs", 3, "--batch-size", 5)
    given = dict(zip(run.overrides[::2], run.overrides[1::2], strict=True))
    assert given.keys() == {
        "SOLVER.IMS_PER_BATCH",
        "SOLVER.BASE_LR",
        "SOLVER.MAX_ITER",
        "SOLVER.STEPS",
        "SOLVER.CHECKPOINT_PERIOD",
    }  # no evaluation without data for it
    assert (given["SOLVER.MAX_ITER"], given["SOLVER.BASE_LR"]) == (6, pytest.approx(1e-4 * 5 / 16, rel=1e-3))


def test_a_detector_is_fine_tuned_and_a_backbone_trained(data: Path, tmp_path: Path) -> None:
    """With other learning rates; what the two have in common is the same."""
    common = ("--data", data, "--output", tmp_path / "out")
    trained = chosen("--config-file", RECIPE, *common).config()
    tuned = chosen("--weights", RECIPE, *common).config()
    few_photos, fine_tuning = dict(overlay("few_photos")), dict(overlay("fine_tuning"))
    assert trained.SOLVER.BASE_LR == few_photos["SOLVER.BASE_LR"] > tuned.SOLVER.BASE_LR
    assert fine_tuning["SOLVER.BASE_LR"] == tuned.SOLVER.BASE_LR
    assert (trained.MODEL.DINO.MATCHER.COPIES, tuned.MODEL.DINO.MATCHER.COPIES) == (4, 1)
    assert (trained.INPUT.MOSAIC, tuned.INPUT.MOSAIC) == (0.5, 0)
    assert (trained.MODEL.DINO.NMS_THRESHOLD, tuned.MODEL.DINO.NMS_THRESHOLD) == (0.6, 1)
    assert (trained.SOLVER.EARLY_STOPPING, tuned.SOLVER.EARLY_STOPPING) == (0, 5)
    for cfg in (trained, tuned):
        assert few_photos["MODEL.DINO.DN.MAX_QUERIES"] == cfg.MODEL.DINO.DN.MAX_QUERIES
