"""dev/benchmark.py with a tiny model: which numbers there are and what they belong to, not how large they are."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2] / "dev"))

import benchmark
import benchmark_runners
from benchmark import grown, main, measure, peak_of
from benchmark_report import Case, Measurement, Report, Seconds, compare
from benchmark_runners import RunnerFactory, StageClock, make_batch, time_stages

CPU = torch.device("cpu")
INFERENCE = ["preprocess", "backbone", "neck", "encoder", "query selection", "decoder", "postprocess", "rest"]
TRAINING = [*INFERENCE[:5], "denoising", "decoder", "criterion", "backward", "optimizer", "rest"]
CASE = Case("dino_d2", "", "infer", "float32", 1, "64x96", 0)
TRAINING_CASE = replace(CASE, mode="train", objects=2)


@pytest.fixture
def config_file(tiny_cfg: CfgNode, tmp_path: Path) -> str:
    path = tmp_path / "tiny.yaml"
    path.write_text(tiny_cfg.dump())
    return str(path)


def report_of(config_file: str, *arguments: str) -> Report:
    path = Path(config_file).with_name("numbers.json")
    main(["--config-file", config_file, "--size", "64", "96", "--rounds", "2", "--json", str(path), *arguments])
    return Report.read(path)


def measurement(case: Case, seconds: float, **stages: float) -> Measurement:
    parts = {name: Seconds(median, median) for name, median in stages.items()}
    return Measurement(case, parts, Seconds(seconds, seconds), case.batch / seconds, 2**30)


# --- a run


@pytest.mark.parametrize(("mode", "stages"), [("infer", INFERENCE), ("train", TRAINING)])
def test_every_stage_of_every_case_is_there(
    mode: str, stages: list[str], config_file: str, capsys: pytest.CaptureFixture
) -> None:
    report = report_of(
        config_file, "--mode", mode, "--batch", "2", "--dtype", "float32", "bfloat16",
        "--variant", "few", "MODEL.DINO.NUM_QUERIES", "5", "--variant", "few", "MODEL.DINO.DEC_LAYERS", "1",
    )  # fmt: skip
    assert [(m.case.variant, m.case.dtype) for m in report.measurements] == [
        (variant, dtype) for dtype in ("float32", "bfloat16") for variant in ("dino_d2", "few")
    ]
    few = next(m.case for m in report.measurements if m.case.variant == "few")
    assert few.overrides == "MODEL.DINO.NUM_QUERIES 5 MODEL.DINO.DEC_LAYERS 1"
    for m in report.measurements:
        assert sorted(m.stages) == sorted(stages)
        assert all(0 < seconds.median <= seconds.p90 for seconds in (*m.stages.values(), m.end_to_end))
        assert m.images_per_second == pytest.approx(m.case.batch / m.end_to_end.median)
    output = capsys.readouterr().out
    assert f"dino_d2: {mode}, bfloat16, 2 x 64x96" in output
    tables = [line for line in output.splitlines() if line.startswith("|  | dino_d2 (ms) | 90 % | share | few (ms)")]
    assert len(tables) == 2  # one for each dtype, the variants side by side


@pytest.mark.parametrize("case", [CASE, TRAINING_CASE])
def test_dtype_is_that_of_the_products(case: Case, config_file: str) -> None:
    """Although cases share a model."""
    factory = RunnerFactory(config_file, [], CPU)
    runners = [factory.runner(replace(case, dtype=dtype)) for dtype in ("float32", "bfloat16")]
    seen = []
    runners[0].model.neck.projections[0][0].register_forward_hook(lambda conv, args, out: seen.append(out.dtype))
    for runner in (*runners, *runners):
        runner.call()
    assert seen == [torch.float32, torch.bfloat16] * 2


def test_what_was_written_is_read(config_file: str, tmp_path: Path) -> None:
    report = report_of(config_file)
    report.write(tmp_path / "again.json")
    assert Report.read(tmp_path / "again.json") == report
    assert report.config == "tiny.yaml"  # no path
    assert f"torch {torch.__version__}" in report.machine


def test_operators_are_listed(config_file: str, capsys: pytest.CaptureFixture) -> None:
    report_of(config_file, "--mode", "train", "--profile")
    assert "dino_d2::ms_deform_attn_fused_backward" in capsys.readouterr().out


def test_turns_are_taken_and_each_timed_call_follows_one_of_its_own() -> None:
    log = []

    class Logged:
        def __init__(self, name: str):
            self.name = name

        def call(self) -> None:
            log.append(self.name)

        def stages(self) -> dict[str, float]:
            log.append(f"{self.name} in stages")
            return {"rest": 1.0}

        def own_memory(self) -> None:
            return None

    runners = {replace(CASE, variant=name): Logged(name) for name in "ab"}
    measurements = measure(runners, rounds=2, device=CPU)
    turn_of_both = ["a", "a in stages", "a", "b", "b in stages", "b"]
    assert log == ["a", "a", "b", "b", *turn_of_both, *turn_of_both]
    assert [m.case.variant for m in measurements] == ["a", "b"]


# --- stages


@pytest.mark.parametrize("case", [CASE, TRAINING_CASE])
def test_stages_add_up_to_the_call_and_leave_the_model_as_it_was(case: Case, config_file: str) -> None:
    runner = RunnerFactory(config_file, [], CPU).runner(case)
    before = [set(vars(module)) for module in runner.model.modules()]
    runner.call()
    start = time.perf_counter()
    stages = runner.stages()
    elapsed = time.perf_counter() - start
    assert elapsed / 2 < sum(stages.values()) <= elapsed
    assert [set(vars(module)) for module in runner.model.modules()] == before


def test_stage_inside_a_stage_is_not_counted_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    def work(seconds: float) -> None:
        now[0] += seconds

    class Parts:
        def outer(self) -> None:
            work(1)
            self.inner()
            work(2)

        def inner(self) -> None:
            work(10)

    def call() -> None:
        work(100)
        parts.outer()

    parts = Parts()
    monkeypatch.setattr(benchmark_runners.time, "perf_counter", lambda: now[0])
    watched = [benchmark_runners.Watched(parts, name, name) for name in ("outer", "inner")]
    assert time_stages(call, watched, CPU) == {"outer": 3, "inner": 10, "rest": 100}


def test_backward_pass_of_each_part_and_what_it_computes_again(
    config_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered = []
    enter = StageClock.enter
    monkeypatch.setattr(StageClock, "enter", lambda clock, stage: entered.append(stage) or enter(clock, stage))
    opts = ["SOLVER.ACCUMULATION_STEPS", "2", "MODEL.DINO.CHECKPOINT.BACKBONE", "True"]
    RunnerFactory(config_file, opts, CPU).runner(replace(TRAINING_CASE, batch=2)).stages()
    first, second, step = (stage for stage in "|".join(entered).replace("criterion|rest|backward", "X").split("X"))
    assert first.startswith("rest|rest|preprocess|rest|backbone|rest|neck")
    assert second.startswith("|backbone|backward|rest|preprocess|")  # again, then the next part
    assert step.startswith("|backbone|backward|rest|rest|optimizer|rest")


# --- inputs


def test_mixed_shapes_are_those_of_evaluation_and_padded(tiny_config: Callable[..., CfgNode], config_file: str) -> None:
    cfg = tiny_config()
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 48, 80
    batch = make_batch(cfg, replace(CASE, shape="mixed", batch=3, objects=4))
    assert [tuple(x["image"].shape) for x in batch] == [(3, 48, 64), (3, 64, 48), (3, 48, 72)]
    assert all(len(x["instances"]) == 4 for x in batch)
    model = RunnerFactory(config_file, [], CPU).runner(CASE).model
    images, padding = model.preprocess_image(batch)
    assert images.tensor.shape == (3, 3, 64, 72)
    assert padding.flatten(1).any(1).all()


def test_memory_is_what_a_call_takes_at_its_peak() -> None:
    def call() -> None:
        torch.ones(1 << 24)  # float32

    peak = peak_of(call, CPU)
    if peak is None:
        pytest.skip("this system does not tell")
    assert 60 << 20 < peak < 80 << 20  # the system counts a few pages later


# --- growth


def test_growth_starts_from_the_case_that_is_there(tiny_config: Callable[..., CfgNode], config_file: str) -> None:
    cfg = tiny_config(NUM_QUERIES=30, ENC_LAYERS=3, DEC_LAYERS=6)
    points = {axis: grown(cfg, TRAINING_CASE, axis) for axis in benchmark.GROWTH}
    assert all(TRAINING_CASE in cases.values() for cases in points.values())
    assert [case.shape for case in points["size"].values()] == ["32x48", "48x72", "64x96"]
    assert list(points["queries"]) == [10, 20, 30]
    assert list(points["layers"]) == [3, 6, 9]
    assert points["layers"][3].overrides == "MODEL.DINO.ENC_LAYERS 1 MODEL.DINO.DEC_LAYERS 2"
    model = RunnerFactory(config_file, [], CPU).runner(points["layers"][3]).model
    assert (len(model.encoder.layers), len(model.decoder.layers)) == (1, 2)


def test_growth_is_drawn_and_what_axes_share_is_timed_once(config_file: str, tmp_path: Path) -> None:
    picture = tmp_path / "new" / "growth.png"
    report = report_of(config_file, "--growth", "queries", "batch", "--plot", str(picture))
    assert [m.case.variant for m in report.measurements] == ["dino_d2", "7 queries", "13 queries", "dino_d2", "dino_d2"]
    assert [m.case.batch for m in report.measurements] == [1, 1, 1, 2, 4]
    assert len(np.unique(np.asarray(Image.open(picture).convert("RGB")).reshape(-1, 3), axis=0)) > len(INFERENCE)


# --- exported models


def test_exported_model_gets_the_same_images(
    config_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    seen = []

    class Session:
        def __init__(self, path: str, options: Any, providers: list[str]):
            assert (options.intra_op_num_threads, providers) == (torch.get_num_threads(), ["CPUExecutionProvider"])

        def get_inputs(self) -> list[SimpleNamespace]:
            return [SimpleNamespace(name=name) for name in ("pixels", "image_sizes", "original_sizes")]

        def run(self, outputs: None, inputs: dict[str, np.ndarray]) -> None:
            seen.append(inputs)

    runtime = ModuleType("onnxruntime")
    runtime.InferenceSession, runtime.SessionOptions = Session, SimpleNamespace
    runtime.get_available_providers = lambda: ["CPUExecutionProvider"]
    monkeypatch.setitem(sys.modules, "onnxruntime", runtime)
    exported = tmp_path / "dino.onnx"
    exported.touch()
    report = report_of(config_file, "--batch", "2", "--onnx", str(exported))
    first, second = report.measurements
    assert second.case == replace(first.case, variant="dino.onnx")
    assert (second.stages, second.peak_memory) == ({}, None)
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("| backbone "))
    assert line.endswith("|  |  |  |")  # the inside of an exported model is not seen
    images = make_batch(RunnerFactory(config_file, [], CPU).config(), first.case)
    for number, x in enumerate(images):
        assert torch.equal(torch.from_numpy(seen[0]["pixels"][number]), x["image"])
    assert seen[0]["image_sizes"].tolist() == seen[0]["original_sizes"].tolist() == [[64, 96], [64, 96]]


# --- comparison


def test_comparison_has_ratios_and_names_what_only_one_run_has(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    two, four = replace(CASE, batch=2), replace(CASE, batch=4)
    old = Report("old machine", "a.yaml", 3, [measurement(CASE, 0.2, encoder=0.1), measurement(two, 1.0)])
    new = Report("new machine", "a.yaml", 5, [measurement(four, 1.0), measurement(CASE, 0.1, encoder=0.03)])
    paths = [tmp_path / "old.json", tmp_path / "new.json"]
    for report, path in zip((old, new), paths, strict=True):
        report.write(path)
    main(["--compare", *map(str, paths)])
    output = capsys.readouterr().out
    assert "- A: a.yaml; old machine; 3 rounds" in output
    assert "| encoder | 100.00 | 100.00 | 100% | 30.00 | 30.00 | 0.30 |" in output
    assert "| end to end | 200.00 | 200.00 |  | 100.00 | 100.00 | 0.50 |" in output
    assert "| images per second | 5.00 |  |  | 10.00 |  | 2.00 |" in output
    assert f"Only in A: {two}" in output
    assert f"Only in B: {four}" in output


def test_runs_that_cannot_be_compared_are_named(tmp_path: Path) -> None:
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path, case in zip(paths, (CASE, TRAINING_CASE), strict=True):
        Report("a machine", "a.yaml", 1, [measurement(case, 1.0)]).write(path)
    with pytest.raises(ValueError, match=r"a\.json and .*b\.json have no cases in common: dino_d2: infer"):
        compare(paths)
    for content in ("{", "[]", '{"machine": ""}', '{"measurements": [{"case": {}, "stages": {}}]}'):
        paths[1].write_text(content)
        with pytest.raises(ValueError, match=r"b\.json was not written by dev/benchmark\.py --json"):
            compare(paths)
    with pytest.raises(ValueError, match=r"missing\.json was not written"):
        compare([paths[0], tmp_path / "missing.json"])


# --- bad input


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--mode", "train"], "give --config-file FILE"),
        (["--config-file", "x"], "--config-file x does not exist"),
        (["--config-file", "x", "--device", "cuda"], "--device cuda is not available"),
        (["--config-file", "x", "MODEL.DINO.OP"], "MODEL.DINO.OP has no value"),
        (["--config-file", "x", "MODEL.DEVICE", "cuda"], "MODEL.DEVICE: use --device instead"),
        (["--config-file", "x", "--variant", "half", "SOLVER.AMP.ENABLED", "True"], "SOLVER.AMP.ENABLED: use --dtype"),
        (["--config-file", "x", "TEST.AMP.DTYPE", "float16"], "TEST.AMP.DTYPE: use --dtype instead"),
        (["--config-file", "x", "--batch", "2", "MODEL.DINO.OP", "reference"], "right after --config-file"),
        (["--config-file", "x", "--batch", "0"], "'0' is not a positive integer"),
        (["--config-file", "x", "--size", "64", "-3"], "'-3' is not a positive integer"),
        (["--config-file", "x", "--objects", "-1"], "--objects -1: must be at least 0"),
        (["--config-file", "x", "--growth", "size"], "--growth AXIS … and --plot PNG must be given together"),
        (["--config-file", "x", "--plot", "x.png"], "--growth AXIS … and --plot PNG must be given together"),
        (["--config-file", "x", "--growth", "objects", "--plot", "x.png"], "--growth objects needs --mode train"),
        (["--config-file", "x", "--growth", "size", "--plot", "x.png", "--mixed"], "--growth starts from one case"),
        (["--config-file", "x", "--mode", "train", "--onnx", "x.onnx"], "exported models cannot be trained"),
        (["--config-file", "x", "--onnx", "a/x.onnx", "b/x.onnx"], "names must be unique"),
        (["--config-file", "x", "--mode", "train", "--openvino", "x.onnx"], "exported models cannot be trained"),
        (["--config-file", "x", "--openvino", "a/x.onnx", "b/x.onnx"], "names must be unique"),
        (["--config-file", "x", "--variant", "dino_d2", "MODEL.DINO.OP", "reference"], "names must be unique"),
    ],
)
def test_options_that_make_no_sense_are_explained(
    arguments: list[str], error: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        main(arguments)
    assert error in capsys.readouterr().err


def test_exported_model_in_openvino(config_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, np.ndarray]] = []

    class Compiled:
        inputs = tuple(SimpleNamespace(any_name=name) for name in ("pixels", "image_sizes", "original_sizes"))

        def __call__(self, inputs: dict[str, np.ndarray]) -> None:
            seen.append(inputs)

    def compile_model(path: str, device: str, settings: dict[str, Any]) -> Compiled:
        assert device == "CPU"
        assert settings == {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
        return Compiled()

    runtime = SimpleNamespace(Core=lambda: SimpleNamespace(compile_model=compile_model))
    monkeypatch.setitem(sys.modules, "openvino", runtime)
    monkeypatch.setitem(sys.modules, "openvino_telemetry", None)
    exported = tmp_path / "dino.onnx"
    exported.touch()
    report = report_of(config_file, "--openvino", str(exported))
    assert [x.case.variant for x in report.measurements] == ["dino_d2", "dino.onnx in OpenVINO"]
    assert seen[0]["pixels"].shape == (1, 3, 64, 96)


@pytest.mark.parametrize(("installed", "error"), [(True, "does not exist"), (False, "pip install {}")])
@pytest.mark.parametrize(("option", "name"), [("--onnx", "onnxruntime"), ("--openvino", "openvino")])
def test_exported_model_that_cannot_run_is_explained(
    option: str, name: str, installed: bool, error: str, config_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = SimpleNamespace(get_available_providers=lambda: ["CPUExecutionProvider"])
    monkeypatch.setitem(sys.modules, name, runtime if installed else None)
    monkeypatch.setitem(sys.modules, "openvino_telemetry", None)
    with pytest.raises(ValueError, match=rf"{option} missing\.onnx.*{error.format(name)}"):
        report_of(config_file, option, "missing.onnx")
