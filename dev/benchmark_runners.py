"""The workloads that dev/benchmark.py times: inference, a training step, an exported model; and timing of stages."""

from __future__ import annotations

import importlib
import shlex
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache, wraps
from pathlib import Path
from typing import Any, Protocol
from unittest.mock import patch

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import EventStorage

from benchmark_report import MIXED, Case
from dino_d2.autocast import DTYPES
from dino_d2.config import load_config
from dino_d2.data import build_test_augmentation
from dino_d2.engine import build_optimizer
from dino_d2.engine.optimizer import ClippedAdamW
from dino_d2.engine.step import StepSettings, StepTrainer
from dino_d2.meta_arch import DINO

# Heights and widths of COCO images, ordered so that the first two already differ.
COCO_SIZES = [(480, 640), (640, 480), (427, 640), (500, 375), (612, 612), (640, 427), (360, 640), (333, 500)]


def wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()


def make_batch(cfg: CfgNode, case: Case) -> list[dict[str, Any]]:
    """Random images with random objects as model inputs; mixed shapes are `COCO_SIZES` resized as in evaluation."""
    torch.manual_seed(0)
    resize = build_test_augmentation(cfg)
    batch = []
    for number in range(case.batch):
        if case.shape == MIXED:
            picture = np.empty((*COCO_SIZES[number % len(COCO_SIZES)], 3), np.uint8)
            height, width = resize.get_transform(picture).apply_image(picture).shape[:2]
        else:
            height, width = map(int, case.shape.split("x"))
        corners = torch.rand(case.objects, 2, 2).sort(dim=1).values * torch.tensor([width, height])
        instances = Instances((height, width))
        instances.gt_boxes = Boxes(corners.flatten(1))
        instances.gt_classes = torch.randint(cfg.MODEL.DINO.NUM_CLASSES, (case.objects,))
        image = torch.randint(256, (3, height, width), dtype=torch.uint8)
        batch.append({"image": image, "height": height, "width": width, "instances": instances})
    return batch


class SameBatch:
    """A loader that repeats one batch."""

    def __init__(self, batch: list[dict[str, Any]]):
        self.batch = batch

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        while True:
            yield self.batch


@dataclass(frozen=True)
class Watched:
    """Attributes calls of `owner.name` to a stage. then: the stage after the call; None: the stage before it."""

    owner: object
    name: str
    stage: str
    then: str | None = None


class StageClock:
    """Divides the time of a call into stages that add up to the total."""

    def __init__(self, device: torch.device):
        self.seconds: dict[str, float] = defaultdict(float)
        self._device, self._stage, self._since = device, "", 0.0

    def enter(self, stage: str) -> str:
        """Start a stage; returns the previous one."""
        wait_for(self._device)
        now = time.perf_counter()
        if self._stage:
            self.seconds[self._stage] += now - self._since
        left, self._stage, self._since = self._stage, stage, now
        return left

    def timed(self, function: Callable, stage: str, then: str | None) -> Callable:
        @wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            before = self.enter(stage)
            try:
                return function(*args, **kwargs)
            finally:
                self.enter(before if then is None else then)

        return run


def time_stages(call: Callable[[], None], watched: Sequence[Watched], device: torch.device) -> dict[str, float]:
    """Seconds in each stage of `call`, in the order they end; "rest" is the time between them.

    The functions are patched during the call, without changes to the model's code.
    """
    clock = StageClock(device)
    with ExitStack() as patches:
        for w in watched:
            patches.enter_context(patch.object(w.owner, w.name, clock.timed(getattr(w.owner, w.name), w.stage, w.then)))
        clock.enter("rest")
        call()
        clock.enter("")
    rest = clock.seconds.pop("rest")
    return {**clock.seconds, "rest": rest}


def stages_of(model: DINO) -> list[Watched]:
    modules = ("backbone", "neck", "encoder", "query_selection", "denoising", "decoder")
    return [
        Watched(model, "preprocess_image", "preprocess"),
        Watched(model, "prepare_targets", "preprocess"),
        *(Watched(getattr(model, name), "forward", name.replace("_", " ")) for name in modules),
        Watched(model, "criterion", "criterion"),
        Watched(model, "postprocess", "postprocess"),
    ]


class Runner(Protocol):
    def call(self) -> None: ...

    def stages(self) -> dict[str, float]:
        """Call once and return the seconds of each stage; empty if not available."""

    def own_memory(self) -> int | None:
        """Bytes held between calls; None if not available."""


class Inference:
    """Inference from decoded and resized images in memory to Instances."""

    def __init__(self, model: DINO, batch: list[dict[str, Any]], autocast: str | None):
        self.model, self.batch = model.eval(), batch
        self.settings = replace(model.inference, autocast=autocast)

    def call(self) -> None:
        self.model.inference = self.settings  # the model is shared with other dtypes
        with torch.no_grad():
            self.model(self.batch)

    def stages(self) -> dict[str, float]:
        return time_stages(self.call, stages_of(self.model), self.model.device)

    def own_memory(self) -> int:
        return size_of([*self.model.parameters(), *self.model.buffers()])


class TrainingStep:
    """`StepTrainer.run_step`: forward and backward pass, clipping, optimizer."""

    def __init__(
        self,
        model: DINO,
        optimizer: torch.optim.Optimizer,
        batch: list[dict[str, Any]],
        settings: StepSettings,
    ):
        self.model, self.optimizer = model, optimizer
        self.trainer = StepTrainer(model, SameBatch(batch), optimizer, settings, seed=0)

    def call(self) -> None:
        with EventStorage():
            self.trainer.run_step()

    def stages(self) -> dict[str, float]:
        watched = [
            *stages_of(self.model),
            # The backward pass is not a function: it is the time from the losses to the end of the last part.
            Watched(self.model, "forward", "rest", then="backward"),
            Watched(self.trainer, "after_backward", "rest", then="rest"),
            *([Watched(self.optimizer, "clip", "optimizer")] if isinstance(self.optimizer, ClippedAdamW) else []),
            Watched(self.optimizer, "step", "optimizer"),
        ]
        return time_stages(self.call, watched, self.model.device)

    def own_memory(self) -> int:
        parameters = list(self.model.parameters())
        gradients = [p.grad for p in parameters if p.grad is not None]
        state = [x for values in self.optimizer.state.values() for x in values.values() if isinstance(x, torch.Tensor)]
        return size_of([*parameters, *self.model.buffers(), *gradients, *state])


def size_of(tensors: Sequence[torch.Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


@dataclass(frozen=True)
class Exported:
    """A loaded file. inputs: names of pixels, image sizes and output sizes. run: takes these by name."""

    inputs: Sequence[str]
    run: Callable[[dict[str, np.ndarray]], object]


class ExportedInference:
    """An exported model, from the padded pixels of the same images to arrays."""

    def __init__(self, exported: Exported, batch: list[dict[str, Any]]):
        sizes = np.array([x["image"].shape[1:] for x in batch], np.int64)
        pixels = ImageList.from_tensors([x["image"] for x in batch]).tensor.numpy()
        self.run, self.inputs = exported.run, dict(zip(exported.inputs, (pixels, sizes, sizes), strict=True))

    def call(self) -> None:
        self.run(self.inputs)

    def stages(self) -> dict[str, float]:
        return {}

    def own_memory(self) -> None:
        return None


def in_onnxruntime(path: Path, device: torch.device) -> Exported:
    """With as many threads as PyTorch.

    Raises:
        ValueError: onnxruntime, its provider for the device, or the file is missing.
    """
    onnxruntime = _runtime_for("--onnx", path, "onnxruntime")
    provider = f"{device.type.upper()}ExecutionProvider"
    if provider not in onnxruntime.get_available_providers():
        raise ValueError(f"--onnx {path}: this onnxruntime has no {provider}; use --device cpu")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors only; it warns about every constant that it removes
    session = onnxruntime.InferenceSession(str(path), options, [provider])
    return Exported([given.name for given in session.get_inputs()], lambda inputs: session.run(None, inputs))


def in_openvino(path: Path, device: torch.device) -> Exported:
    """With as many threads as PyTorch, in float32.

    Raises:
        ValueError: OpenVINO or the file is missing, or the device is not a CPU.
    """
    # Else importing it reports to its maker.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    openvino = _runtime_for("--openvino", path, "openvino")
    if device.type != "cpu":
        raise ValueError(f"--openvino {path}: only timed on a CPU; use --device cpu")
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = openvino.Core().compile_model(str(path), "CPU", settings)
    return Exported([given.any_name for given in compiled.inputs], compiled)


def _runtime_for(option: str, path: Path, name: str) -> Any:
    try:
        runtime = importlib.import_module(name)
    except ImportError as error:
        raise ValueError(f"{option} {path} needs {name}: pip install {name}") from error
    if not path.is_file():
        raise ValueError(f"{option} {path} does not exist; create it with dino-d2 export")
    return runtime


class RunnerFactory:
    """Makes runners. Cases with the same overrides share a model and its optimizer."""

    def __init__(self, config_file: str, opts: Sequence[str], device: torch.device):
        self.config_file, self.opts, self.device = config_file, opts, device
        self._parts = cache(self._make_parts)

    def config(self, overrides: str = "") -> CfgNode:
        fixed = ["MODEL.DEVICE", str(self.device), "MODEL.TIMM.PRETRAINED", "False"]  # no download of weights
        return load_config(self.config_file, [*self.opts, *shlex.split(overrides), *fixed])

    def runner(self, case: Case) -> Runner:
        cfg, model, optimizer = self._parts(case.overrides)
        batch = make_batch(cfg, case)
        autocast = case.dtype if case.dtype in DTYPES else None
        if case.mode == "infer":
            return Inference(model, batch, autocast)
        return TrainingStep(model, optimizer, batch, replace(StepSettings.of_config(cfg), autocast=autocast))

    def _make_parts(self, overrides: str) -> tuple[CfgNode, DINO, torch.optim.Optimizer]:
        cfg = self.config(overrides)
        torch.manual_seed(0)
        model = build_model(cfg)
        return cfg, model, build_optimizer(cfg, model)
