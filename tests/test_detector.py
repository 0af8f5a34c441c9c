"""Detector finds what DefaultPredictor finds, and takes weights and images however they come."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import GeneratorType

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from PIL import Image
from safetensors.torch import load_file

from dino_d2 import Detections, Detector, load_config
from dino_d2.checkpoint.assumptions import CAPACITY, EXTRA_STATE, Assumptions
from dino_d2.data import read_image
from dino_d2.detector import pictures_in
from dino_d2.pretrained import find_pretrained
from tests.web import Web, serve

NAMES = ["ant", "bee", "cat", "dog", "elk"]


@pytest.fixture(scope="module")
def folder(tiny_config: Callable[..., CfgNode], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a training leaves: config.yaml and model_final.pth."""
    cfg = tiny_config(CLASS_NAMES=NAMES)
    cfg.INPUT.MIN_SIZE_TEST = 96
    folder = tmp_path_factory.mktemp("run")
    (folder / "config.yaml").write_text(cfg.dump())
    torch.manual_seed(0)
    torch.save({"model": build_model(cfg).state_dict()}, folder / "model_final.pth")
    return folder


@pytest.fixture(scope="module")
def detector(folder: Path) -> Detector:
    return Detector.from_pretrained(folder, device="cpu")


@pytest.fixture
def picture() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)


def same(first: Detections, second: Detections, within: float = 0) -> bool:
    return len(first) == len(second) > 0 and np.abs(first.boxes - second.boxes).max() <= within


@pytest.mark.parametrize("image_format", ["RGB", "BGR"])
def test_detections_are_those_of_default_predictor(folder: Path, picture: np.ndarray, image_format: str) -> None:
    cfg = load_config(str(folder / "config.yaml"), ["INPUT.FORMAT", image_format])
    model = build_model(cfg)
    torch.save({"model": model.state_dict()}, folder / f"{image_format}.pth")
    cfg.MODEL.WEIGHTS = str(folder / f"{image_format}.pth")
    expected = DefaultPredictor(cfg)(picture[:, :, ::-1])["instances"]
    detections = Detector.from_pretrained(cfg.MODEL.WEIGHTS, overrides=["INPUT.FORMAT", image_format])(
        picture, threshold=0
    )
    assert len(detections) == len(expected)
    assert np.array_equal(detections.boxes, expected.pred_boxes.tensor.numpy())
    assert np.array_equal(detections.scores, expected.scores.numpy())
    assert np.array_equal(detections.classes, expected.pred_classes.numpy())
    assert detections.image_size == (90, 120)


def test_pictures_come_in_every_way(detector: Detector, picture: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "photo.png"
    Image.fromarray(picture).save(path)
    expected = detector(picture, threshold=0)
    with serve() as web:
        web.files["/photo.png"] = path.read_bytes()
        of_web = detector(f"{web.url}/photo.png", threshold=0)
    for found in (
        detector(str(path), threshold=0),
        detector(path, threshold=0),
        detector(Image.open(path), threshold=0),
        detector(picture[:, :, ::-1], threshold=0, channel_order="bgr"),
        detector([picture], threshold=0)[0],
        detector(tmp_path, threshold=0)[0],
        of_web,
    ):
        assert same(found, expected)
        assert found.draw().size == (120, 90)
    assert not same(detector(picture[:, :, ::-1], threshold=0), expected)


def test_grey_models_see_what_they_were_trained_on(
    tiny_config: Callable[..., CfgNode], picture: np.ndarray, tmp_path: Path
) -> None:
    cfg = tiny_config(CLASS_NAMES=NAMES)
    cfg.INPUT.FORMAT, cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = "L", [120.0], [60.0]
    cfg.INPUT.MIN_SIZE_TEST = 0
    grey = Detector(cfg, build_model(cfg))
    Image.fromarray(picture).save(tmp_path / "colour.png")
    seen = torch.as_tensor(read_image(tmp_path / "colour.png", "L").astype("float32")).permute(2, 0, 1)
    with torch.no_grad():
        expected = grey.model([{"image": seen}])[0]["instances"]
    for source in (picture, tmp_path / "colour.png", Image.open(tmp_path / "colour.png")):
        found = grey(source, threshold=0)
        assert len(found) == len(expected) > 0
        assert np.array_equal(found.boxes, expected.pred_boxes.tensor.numpy())
        assert found.draw().size == (120, 90)


def test_batches_change_nothing_but_roundings(detector: Detector, picture: np.ndarray) -> None:
    pictures = [picture, picture[:60], picture[::-1], picture[:60, ::-1], picture[:, :70]]
    alone = detector(pictures, threshold=0)
    together = detector(pictures, threshold=0, batch_size=3)
    for one, other in zip(alone, together, strict=True):
        assert np.abs(one.scores - other.scores).max() < 1e-5
        distances = np.abs(one.boxes[:, None] - other.boxes).max(-1)
        assert distances.min(1).max() < 0.01  # objects that score alike may change places


def test_threshold_and_classes_choose(detector: Detector, picture: np.ndarray) -> None:
    everything = detector(picture, threshold=0)
    middle = float(np.median(everything.scores))
    assert len(detector(picture, threshold=middle)) == (everything.scores > middle).sum()
    assert set(detector(picture, threshold=0, classes=["bee", "elk"]).names) <= {"bee", "elk"}
    with pytest.raises(ValueError, match="unknown class bea; did you mean bee"):
        detector(picture, classes=["bea"])


def test_tiles_look_at_all_of_the_picture(detector: Detector, picture: np.ndarray) -> None:
    assert same(detector(picture, threshold=0, tile=120), detector(picture, threshold=0))
    tiled = detector(picture, threshold=0, tile=60)
    assert len(tiled) > 0
    assert not same(tiled, detector(picture, threshold=0))


def test_augmented_detections_are_those_of_test_time_augmentation(
    detector: Detector, folder: Path, picture: np.ndarray
) -> None:
    keys = ["TEST.AUG.ENABLED", True, "TEST.AUG.MIN_SIZES", (86, 96, 106), "TEST.AUG.MAX_SIZE", 1466]
    of_keys = Detector.from_pretrained(folder, device="cpu", overrides=[*keys, "INPUT.MIN_SIZE_TEST", 0])
    expected = of_keys(picture, threshold=0)
    augmented = detector(picture, threshold=0, augment=True)
    assert same(augmented, expected)
    assert not same(augmented, detector(picture, threshold=0))
    tiles = detector(picture, threshold=0, tile=60, augment=True)
    assert same(tiles, of_keys(picture, threshold=0, tile=60))


@pytest.mark.parametrize("voting", [False, True])
def test_the_threshold_for_duplicates_holds_across_tiles(
    folder: Path, picture: np.ndarray, voting: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two tiles that share columns 51 to 69 find an object beside the line between them, each on its own side."""
    overrides = ["MODEL.DINO.NMS_THRESHOLD", 0.6, "MODEL.DINO.BOX_VOTING", voting]
    for values, count in (([], 2), (overrides, 1)):
        detector = Detector.from_pretrained(folder, device="cpu", overrides=values)

        def on_its_own_side(parts: list[np.ndarray]) -> list[Instances]:
            first = np.array_equal(parts[0], picture[:75, :69])
            found = Instances(parts[0].shape[:2], scores=torch.tensor([0.9 if first else 0.8]))
            x = 59 if first else 61 - 51  # of its centre
            found.pred_boxes = Boxes(torch.tensor([[x - 10.0, 20, x + 10, 40]]))
            found.pred_classes = torch.tensor([3])
            return [found]

        monkeypatch.setattr(detector, "_predict", on_its_own_side)
        found = detector(picture[:75], threshold=0, tile=75)
        assert found.scores.tolist() == pytest.approx([0.9, 0.8][:count])


def test_frames_of_a_video_are_read_as_they_are_needed(detector: Detector, tmp_path: Path) -> None:
    cv2 = pytest.importorskip("cv2")
    path = str(tmp_path / "film.avi")
    writer = cv2.VideoWriter(path, cv2.VideoWriter_fourcc(*"MJPG"), 5, (64, 48))
    for brightness in range(0, 250, 50):
        writer.write(np.full((48, 64, 3), brightness, np.uint8))
    writer.release()
    found = detector(path, threshold=0, batch_size=2)
    assert isinstance(found, GeneratorType)
    frames = list(found)
    assert len(frames) == 5
    assert [abs(int(frame.image.mean()) - 50 * number) < 5 for number, frame in enumerate(frames)] == [True] * 5
    (tmp_path / "broken.mp4").write_bytes(b"no film")
    with pytest.raises(ValueError, match=r"broken\.mp4 cannot be read as a video"):
        detector(tmp_path / "broken.mp4")
    with pytest.raises(FileNotFoundError, match=r"missing\.mp4 does not exist"):
        detector("missing.mp4")


def test_wrong_pictures_are_named(detector: Detector, picture: np.ndarray, tmp_path: Path) -> None:
    (tmp_path / "broken.jpg").write_text("text")
    with pytest.raises(ValueError, match=r"broken\.jpg cannot be read as an image"):
        detector(tmp_path / "broken.jpg")
    with pytest.raises(FileNotFoundError):
        detector("nowhere.jpg")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no images found in .*empty"):
        detector(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"uint8 array \(height, width, 3\), got float64 \(90, 120, 3\)"):
        detector(picture / 255)
    with pytest.raises(ValueError, match="channel_order"):
        detector(picture, channel_order="gbr")


@pytest.mark.parametrize("shape", [(0, 80), (80, 0)])
def test_pictures_without_pixels_are_named(detector: Detector, shape: tuple[int, int]) -> None:
    empty = np.zeros((*shape, 3), np.uint8)
    for image in (empty, [empty], Image.new("RGB", shape[::-1])):
        with pytest.raises(ValueError, match=rf"the image is empty: \({shape[0]}, {shape[1]}, 3\)"):
            detector(image)


@pytest.mark.parametrize("size", [0, -1])
def test_batches_have_at_least_one_picture(detector: Detector, picture: np.ndarray, size: int) -> None:
    with pytest.raises(ValueError, match=f"batch_size is {size}; it must be at least 1"):
        detector([picture, picture], batch_size=size)


def test_half_precision_finds_nearly_the_same(folder: Path, detector: Detector, picture: np.ndarray) -> None:
    half = Detector.from_pretrained(folder, device="cpu", dtype="bfloat16")
    assert half.cfg.TEST.AMP.ENABLED
    scores, exact = half(picture, threshold=0).scores, detector(picture, threshold=0).scores
    assert not np.array_equal(scores, exact)
    assert np.abs(scores[:5] - exact[:5]).max() < 0.02
    with pytest.raises(ValueError, match="dtype is 'int8'"):
        Detector.from_pretrained(folder, dtype="int8")


# --- the threshold where none is given


@pytest.fixture
def with_threshold(folder: Path, picture: np.ndarray, tmp_path: Path) -> tuple[Path, float]:
    """A training's folder whose weights know a threshold, and that one: half of the detections score more."""
    run = shutil.copytree(folder, tmp_path / "with_threshold")
    scores = Detector.from_pretrained(folder)(picture, threshold=0).scores
    threshold = float(scores[len(scores) // 2 - 1] + scores[len(scores) // 2]) / 2
    content = torch.load(run / "model_final.pth", weights_only=True)
    assumed = Assumptions.from_tensor(content["model"][EXTRA_STATE])
    content["model"][EXTRA_STATE] = replace(assumed, score_threshold=threshold).to_tensor()
    torch.save(content, run / "model_final.pth")
    return run, threshold


def test_threshold_of_the_weights_is_taken(with_threshold: tuple[Path, float], picture: np.ndarray) -> None:
    run, threshold = with_threshold
    detector = Detector.from_pretrained(run)
    assert detector.threshold == threshold
    everything = detector(picture, threshold=0)
    expected = everything.above(threshold)
    assert 0 < len(expected) < len(everything)
    for found in (detector(picture), detector([picture])[0], detector(picture, threshold=threshold)):
        assert same(found, expected)
    assert f"threshold {threshold:.3f}, stored with the weights" in repr(detector)
    detector.threshold = 0
    assert same(detector(picture), everything)
    assert "threshold 0.000, set" in repr(detector)


def test_without_one_the_threshold_is_the_known_default(detector: Detector, picture: np.ndarray) -> None:
    assert detector.threshold == 0.3
    assert detector(picture).scores.tolist() == detector(picture, threshold=0.3).scores.tolist()
    assert "5 classes, threshold 0.3, the default: none is stored" in repr(detector)


def test_weights_of_before_there_was_a_threshold(folder: Path, tmp_path: Path) -> None:
    run = shutil.copytree(folder, tmp_path / "run")
    content = torch.load(run / "model_final.pth", weights_only=True)
    facts = json.loads(bytes(content["model"][EXTRA_STATE].numpy()).rstrip(b"\0"))
    del facts["score_threshold"]
    content["model"][EXTRA_STATE] = torch.zeros(CAPACITY, dtype=torch.uint8)
    text = json.dumps(facts).encode()
    content["model"][EXTRA_STATE][: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    torch.save(content, run / "model_final.pth")
    assert Detector.from_pretrained(run).threshold == 0.3
    del content["model"][EXTRA_STATE]
    torch.save(content, run / "model_final.pth")
    assert Detector.from_pretrained(run).threshold == 0.3


def test_threshold_is_saved_with_the_detector(with_threshold: tuple[Path, float], tmp_path: Path) -> None:
    run, threshold = with_threshold
    Detector.from_pretrained(run).save_pretrained(tmp_path / "mine")
    assert Detector.from_pretrained(tmp_path / "mine").threshold == threshold
    assert f"Score threshold: {threshold:.3f}" in (tmp_path / "mine" / "README.md").read_text()
    some = ["MODEL.DINO.CLASS_NAMES", NAMES[::-1][:3], "MODEL.DINO.NUM_CLASSES", 3]  # rows are copied by name
    assert Detector.from_pretrained(run, overrides=some).threshold == threshold


# --- weights


def test_saved_detector_is_the_same_one(detector: Detector, picture: np.ndarray, tmp_path: Path) -> None:
    detector.save_pretrained(tmp_path / "mine")
    assert {path.name for path in (tmp_path / "mine").iterdir()} == {"config.yaml", "model.safetensors", "README.md"}
    assert "ant, bee, cat" in (tmp_path / "mine" / "README.md").read_text()
    again = Detector.from_pretrained(tmp_path / "mine")
    assert again.class_names == tuple(NAMES)
    assert same(again(picture, threshold=0), detector(picture, threshold=0))
    assert load_file(tmp_path / "mine" / "model.safetensors").keys() == detector.model.state_dict().keys()


def test_training_folder_gives_its_best_weights(folder: Path, tmp_path: Path, picture: np.ndarray) -> None:
    run = shutil.copytree(folder, tmp_path / "run")
    best = torch.load(run / "model_final.pth", weights_only=True)
    best["model"] = {k: v + 0.01 if v.is_floating_point() else v for k, v in best["model"].items()}
    torch.save(best, run / "model_best.pth")
    alone = Detector.from_pretrained(run / "model_best.pth")(picture, threshold=0)
    assert same(Detector.from_pretrained(run)(picture, threshold=0), alone)
    (run / "model_best.pth").unlink()
    (run / "model_final.pth").rename(run / "model_0000009.pth")
    (run / "last_checkpoint").write_text("model_0000009.pth")
    assert not same(Detector.from_pretrained(run)(picture, threshold=0), alone)
    (run / "last_checkpoint").unlink()
    with pytest.raises(FileNotFoundError, match=r"no weights found in .*run"):
        Detector.from_pretrained(run)


@pytest.mark.parametrize(
    ("last", "chosen"),
    [
        ("model_final.pth", "model_final_ema.pth"),
        ("model_0000005.pth", "model_0000005.pth"),  # continued after its end, and killed
        (None, "model_final_ema.pth"),
    ],
)
def test_final_weights_are_used_while_they_are_the_last(tmp_path: Path, last: str | None, chosen: str) -> None:
    for name in ("config.yaml", "model_final.pth", "model_final_ema.pth", "model_0000005.pth"):
        (tmp_path / name).touch()
    if last:
        (tmp_path / "last_checkpoint").write_text(last)
    assert find_pretrained(str(tmp_path)).weights == str(tmp_path / chosen)


def test_checkpoint_without_a_config_says_so(folder: Path, tmp_path: Path) -> None:
    weights = shutil.copy(folder / "model_final.pth", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no config found for .*config\.yaml does not exist"):
        Detector.from_pretrained(weights)
    assert Detector.from_pretrained(weights, folder / "config.yaml").class_names == tuple(NAMES)


@pytest.mark.parametrize("datasets", [("coco_2017_val",), ("registered_elsewhere",), ()])
def test_names_are_those_of_the_weights_where_the_config_has_none(
    datasets: tuple[str, ...], folder: Path, picture: np.ndarray, tmp_path: Path
) -> None:
    """The recipes' data set is COCO; one that was registered in Python is unknown to the next process."""
    values = ["MODEL.DINO.CLASS_NAMES", [], "DATASETS.TRAIN", datasets, "DATASETS.TEST", datasets]
    detector = Detector.from_pretrained(folder, device="cpu", overrides=values)
    assert detector.labels == detector.class_names == tuple(NAMES)
    assert set(detector(picture, threshold=0).names) <= set(NAMES)
    detector.save_pretrained(tmp_path)
    assert Detector.from_pretrained(tmp_path, device="cpu").class_names == tuple(NAMES)


def test_names_of_a_data_set_with_other_classes_are_not_taken(
    tiny_config: Callable[..., CfgNode], tmp_path: Path
) -> None:
    cfg = tiny_config(CLASS_NAMES=[])
    assert cfg.DATASETS.TEST == ("coco_2017_val",)
    detector = Detector(cfg, build_model(cfg))
    assert detector.labels == ("class 0", "class 1", "class 2", "class 3", "class 4")
    detector.save_pretrained(tmp_path)
    assert Detector.from_pretrained(tmp_path, device="cpu").class_names == ()


def test_weights_of_another_config_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"model_final\.pth does not match the config(.|\n)*DEC_LAYERS"):
        Detector.from_pretrained(folder, overrides=["MODEL.DINO.DEC_LAYERS", 4])


def test_names_that_are_nothing_are_named() -> None:
    with pytest.raises(FileNotFoundError, match=r"weights nothing\.pth not found: give a name"):
        Detector.from_pretrained("nothing.pth")


HUB = """
import json, sys
from dino_d2 import Detector
try:
    print(json.dumps(Detector.from_pretrained(sys.argv[1]).class_names))
except (ValueError, OSError) as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""


def from_hub(url: str, name: str, cache: Path) -> subprocess.CompletedProcess:
    """HF_ENDPOINT is read when huggingface_hub is imported, so in a process of its own."""
    environment = os.environ | {"HF_ENDPOINT": url, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-W", "ignore", "-c", HUB, name]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)


@pytest.fixture(scope="module")
def saved(detector: Detector, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    detector.save_pretrained(folder)
    return folder


def publish(web: Web, files: dict[str, bytes]) -> None:
    """As a hub does, as the repository owner/insects."""
    web.files = {f"/owner/insects/resolve/main/{name}": content for name, content in files.items()}
    web.headers = {"X-Repo-Commit": "0" * 40, "X-Error-Code": "EntryNotFound"}


def test_repository_of_a_hub_is_read(saved: Path, tmp_path: Path) -> None:
    with serve() as web:
        publish(web, {path.name: path.read_bytes() for path in saved.iterdir()})
        result = from_hub(web.url, "owner/insects", tmp_path)
    assert result.returncode == 0, result.stderr[-2000:]
    assert json.loads(result.stdout) == NAMES


def test_of_a_hub_neither_pickles_nor_other_files_are_read(saved: Path, tmp_path: Path) -> None:
    with serve() as web:
        publish(web, {"config.yaml": b"_BASE_: /etc/passwd\n", "model.safetensors": b"", "model.pth": b"x"})
        based = from_hub(web.url, "owner/insects", tmp_path / "a")
        publish(web, {"config.yaml": (saved / "config.yaml").read_bytes(), "model.pth": b"x"})
        pickled = from_hub(web.url, "owner/insects", tmp_path / "b")
        web.headers["X-Error-Code"] = "RepoNotFound"
        absent = from_hub(web.url, "owner/nothing", tmp_path / "c")
        asked = [path for path, _ in web.requests]
    assert "ValueError: the config.yaml of owner/insects on Hugging Face has a _BASE_" in based.stderr
    assert "the Hugging Face repository owner/insects lacks config.yaml or model.safetensors" in pickled.stderr
    assert "weights owner/nothing not found, neither here nor on Hugging Face" in absent.stderr
    assert not [path for path in asked if path.endswith(".pth")]


# --- what comes along with weights


@pytest.fixture
def hub(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Publishes the saved detector as owner/insects, with more lines in its config."""
    folder = shutil.copytree(saved, tmp_path / "repository")

    def publish_with(lines: str) -> Path:
        (folder / "config.yaml").write_text((saved / "config.yaml").read_text() + lines)
        return folder

    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda name, file: str(folder / file))
    return publish_with


def test_config_of_a_hub_decides_on_no_files_of_the_user(hub: Callable[[str], Path], tmp_path: Path) -> None:
    lines = (
        f"OUTPUT_DIR: {tmp_path}/elsewhere\nWANDB_PROJECT: theirs\nDATASETS:\n  COCO_FORMAT: [[a, /etc/passwd, /]]\n"
    )
    hub(lines)
    cfg = Detector.from_pretrained("owner/insects").cfg
    assert (cfg.OUTPUT_DIR, cfg.WANDB_PROJECT, cfg.DATASETS.COCO_FORMAT) == ("./output", "", [])
    for line, error in (
        ("X: !!python/name:os.system\n", "plain YAML"),
        ("MODEL: {TIMM: {NAME: 'hf-hub:a/b'}}\n", "hf-hub"),
    ):
        hub(line)
        with pytest.raises(ValueError, match=error):
            Detector.from_pretrained("owner/insects")


def test_saved_config_tells_nothing_of_the_saver(detector: Detector, tmp_path: Path) -> None:
    cfg = detector.cfg.clone()
    cfg.OUTPUT_DIR, cfg.DATASETS.TRAIN = "secret/place", ("mine",)
    Detector(cfg, detector.model).save_pretrained(tmp_path)
    text = (tmp_path / "config.yaml").read_text()
    assert "secret" not in text
    assert "mine" not in text


def test_device_is_this_machines(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A config that was saved on a CPU names it."""
    monkeypatch.setattr("dino_d2.detector.default_device", lambda: "cpu:0")
    assert Detector.from_pretrained(folder).cfg.MODEL.DEVICE == "cpu:0"
    assert Detector.from_pretrained(folder, overrides=["MODEL.DEVICE", "cpu"]).cfg.MODEL.DEVICE == "cpu"


def test_precision_and_threshold_are_saved_and_can_be_changed(folder: Path, tmp_path: Path) -> None:
    half = Detector.from_pretrained(folder, device="cpu", dtype="bfloat16")
    half.threshold = 0.6
    half.save_pretrained(tmp_path)
    assert Detector.from_pretrained(tmp_path).cfg.TEST.AMP.ENABLED
    assert Detector.from_pretrained(tmp_path).threshold == 0.6
    assert not Detector.from_pretrained(tmp_path, dtype="float32").cfg.TEST.AMP.ENABLED


def test_default_threshold_that_was_set_is_saved(detector: Detector, tmp_path: Path) -> None:
    detector.model.assumptions = replace(detector.model.assumptions, score_threshold=0.7)
    other = Detector(detector.cfg, detector.model)
    other.threshold = 0.3
    other.save_pretrained(tmp_path)
    assert other.model.assumptions.score_threshold == 0.7
    detector.model.assumptions = replace(detector.model.assumptions, score_threshold=None)
    assert Detector.from_pretrained(tmp_path).threshold == 0.3
    assert "0.300, set" in (tmp_path / "README.md").read_text()


def test_deep_pictures_are_the_same_by_path_and_as_pil_image(detector: Detector, tmp_path: Path) -> None:
    deep = np.random.default_rng(0).integers(0, 2**16, (40, 50), dtype=np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    by_path = detector(tmp_path / "deep.png", threshold=0)
    assert same(detector(Image.open(tmp_path / "deep.png"), threshold=0), by_path)


@pytest.mark.parametrize("factor", [np.float32(1 / 255), np.int32(1000), np.int32(-1)])
def test_pil_images_of_unknown_range_are_refused_as_their_files_are(
    factor: np.number, detector: Detector, picture: np.ndarray, tmp_path: Path
) -> None:
    measured = Image.fromarray(picture[:, :, 0].astype(factor.dtype) * factor)
    measured.save(tmp_path / "measured.tif")
    for image, name in (
        (tmp_path / "measured.tif", r"measured\.tif"),
        (Image.open(tmp_path / "measured.tif"), r"measured\.tif"),
        (measured, "the image"),
    ):
        with pytest.raises(ValueError, match=f"{name} has pixel values of unknown range .* 8 or 16 bits"):
            detector(image)


def test_weights_of_two_hosts_are_not_confused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DINO_D2_CACHE", str(tmp_path))
    config = folder / "config.yaml"
    with serve() as one, serve() as other:
        one.files["/w.pth"] = (folder / "model_final.pth").read_bytes()
        Detector.from_pretrained(f"{one.url}/w.pth", config)
        other.files["/w.pth"] = b"something else"
        with pytest.raises(ValueError, match="damaged or no"):
            Detector.from_pretrained(f"{other.url}/w.pth", config)


def test_folder_named_like_a_picture_is_no_picture(tmp_path: Path) -> None:
    (tmp_path / "album.jpg").mkdir()
    with pytest.raises(FileNotFoundError, match="no images found"):
        pictures_in(tmp_path)
    (tmp_path / "photo.jpg").touch()
    assert pictures_in(tmp_path) == [str(tmp_path / "photo.jpg")]
