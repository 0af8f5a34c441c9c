"""SOLVER.EARLY_STOPPING: when a run ends, what it leaves, and what a resumed one does."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils import comm

from dino_d2 import load_config
from dino_d2.checkpoint import files
from dino_d2.checkpoint.files import write_atomically
from dino_d2.data import register_datasets
from dino_d2.engine import DINOTrainer, evaluations
from dino_d2.engine.run import of_best_weights
from tests.engine.test_distributed import torchrun
from tests.engine.test_resume import differing
from tests.synthetic import config_values, write_rectangles

RECIPE = "dino_r50_4scale_12ep"
NAN = float("nan")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_rectangles(tmp_path_factory.mktemp("early_stopping"), count=2, size=64)


class Run:
    """A run of at most 20 steps, evaluated every second one with the given results instead of its own."""

    def __init__(self, data: tuple[Path, Path], output: Path, monkeypatch: pytest.MonkeyPatch):
        self.data, self.output, self.monkeypatch = data, output, monkeypatch
        self.evaluated: list[int] = []
        self.results_of: Callable[[dict], dict] = lambda metrics: {"bbox": metrics}

    def train(self, scores: dict[int, float], *overrides: object) -> DINOTrainer:
        """`scores`: AP after so many steps."""

        def evaluate(trainer: DINOTrainer) -> dict:
            done = min(trainer.iter + 1, trainer.max_iter)
            self.evaluated.append(done)
            trainer._last_eval_results = self.results_of({"AP": scores.get(done, 0.0)})
            return trainer._last_eval_results

        self.monkeypatch.setattr(DINOTrainer, "evaluate", evaluate)
        settings = {
            "INPUT.MIN_SIZE_TRAIN": "(48,)",
            "SOLVER.MAX_ITER": 20,
            "SOLVER.STEPS": "()",
            "SOLVER.CHECKPOINT_PERIOD": 2,
            "TEST.EVAL_PERIOD": 2,
            "SOLVER.BEST_METRIC": "bbox/AP",
            "SOLVER.EARLY_STOPPING": 3,
        }
        values = [str(part) for item in settings.items() for part in item]
        values = [*config_values(self.data, self.output, f"early_{self.output.name}"), *values, *map(str, overrides)]
        cfg = load_config(RECIPE, values)
        register_datasets(cfg)
        torch.manual_seed(0)  # for the initial weights
        trainer = DINOTrainer(cfg)
        trainer.resume_or_load(resume=True)
        self.results = trainer.train()
        return trainer


@pytest.fixture
def run(data: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    return Run(data, tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("scores", "last"),
    [
        ({2: 10.0, 4: 30.0, 6: 20.0, 8: 30.0, 10: 29.0}, 10),  # as good is not better
        ({2: 10.0, 4: 9.0, 6: 8.0, 8: 11.0}, 14),
        ({2: NAN, 4: NAN, 6: NAN}, 14),  # counted from the first value, 0 after 8
        (dict.fromkeys(range(2, 22, 2), NAN), 20),  # nothing was ever measured
        ({2 * i: float(i) for i in range(11)}, 20),  # ever better: to the end
    ],
)
def test_run_ends_after_so_many_evaluations_without_a_better_one(run: Run, scores: dict[int, float], last: int) -> None:
    run.train(scores)
    assert run.evaluated == list(range(2, last + 1, 2))
    assert (run.output / "last_checkpoint").read_text() == "model_final.pth"
    final = torch.load(run.output / "model_final.pth", weights_only=True)
    assert final["iteration"] == last - 1
    assert final["trainer"]["iteration"] == last - 1
    assert run.results == {"bbox": {"AP": pytest.approx(scores.get(last, 0.0), nan_ok=True)}}
    lines = [json.loads(line) for line in (run.output / "metrics.json").read_text().splitlines()]
    assert [line["bbox/AP"] for line in lines if "bbox/AP" in line][-1] == pytest.approx(
        scores.get(last, 0.0), nan_ok=True
    )


def test_moving_average_is_saved_with_the_final_weights(run: Run) -> None:
    trainer = run.train({2: 10.0, 4: 30.0}, "SOLVER.EMA.ENABLED", True)
    assert run.evaluated[-1] == 10
    saved = torch.load(run.output / "model_final_ema.pth", weights_only=True)["model"]
    average = trainer.ema.model.state_dict()
    assert saved.keys() == average.keys()
    assert all(torch.equal(saved[name], average[name]) for name in saved)


def test_a_run_that_was_ended_is_over_when_it_is_resumed(run: Run) -> None:
    scores = {2: 10.0, 4: 30.0}
    run.train(scores)
    final = (run.output / "model_final.pth").stat().st_mtime_ns
    run.evaluated.clear()
    trainer = run.train(scores)
    assert run.evaluated == [11]  # once, of the weights that it was left with
    assert trainer.start_iter == trainer.iter == 10
    assert (run.output / "model_final.pth").stat().st_mtime_ns == final


def test_it_goes_on_if_more_evaluations_are_allowed(run: Run) -> None:
    run.train({2: 10.0, 4: 30.0})
    run.evaluated.clear()
    run.train({}, "SOLVER.EARLY_STOPPING", 5)
    assert run.evaluated == [12, 14]  # five since that after 4


def test_a_run_that_was_interrupted_ends_where_it_would_have_ended(run: Run) -> None:
    scores = {2: 10.0, 4: 30.0}

    class Interruption(Exception):
        pass

    step = DINOTrainer.run_step

    def run_step(trainer: DINOTrainer) -> None:
        if trainer.iter == 7:
            raise Interruption
        step(trainer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DINOTrainer, "run_step", run_step)
        with pytest.raises(Interruption):
            run.train(scores)
    run.train(scores)
    assert run.evaluated == [2, 4, 6, 8, 10]


SCORES = {2: 30.0, 4: 20.0}  # ends after 8


@pytest.fixture(scope="module")
def whole(data: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output of a run that was not interrupted."""
    with pytest.MonkeyPatch.context() as patch:
        run = Run(data, tmp_path_factory.mktemp("whole"), patch)
        run.train(SCORES)
    return run.output


@pytest.mark.parametrize("last", [2, 8])  # the best evaluation, and the one that ends the run
def test_evaluation_that_was_interrupted_is_repeated(run: Run, whole: Path, last: int) -> None:
    def results_of(metrics: dict) -> dict:
        if run.evaluated[-1] == last:
            raise KeyboardInterrupt
        return {"bbox": metrics}

    run.results_of = results_of
    with pytest.raises(KeyboardInterrupt):
        run.train(SCORES)
    run.results_of = lambda metrics: {"bbox": metrics}
    run.train(SCORES)
    assert run.evaluated == sorted([2, 4, 6, 8, last])
    assert run.results == {"bbox": {"AP": 0.0}}
    assert list(differences(run.output, whole)) == []
    lines = [json.loads(line) for line in (run.output / "metrics.json").read_text().splitlines()]
    assert [line["iteration"] for line in lines if "bbox/AP" in line][-1] == 7


def test_record_of_an_earlier_run_in_the_folder_does_not_count(run: Run) -> None:
    (run.output / "last_evaluation").write_text("2")
    run.results_of = interrupted
    with pytest.raises(KeyboardInterrupt):
        run.train(SCORES)
    run.results_of = lambda metrics: {"bbox": metrics}
    run.train(SCORES)
    assert run.evaluated == [2, 2, 4, 6, 8]


def interrupted(metrics: dict) -> dict:
    raise KeyboardInterrupt


@pytest.mark.parametrize("file", ["model_best.pth", "last_evaluation", "model_final.pth"])
def test_run_that_was_interrupted_while_saving_ends_as_if_it_was_not(
    run: Run, whole: Path, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(folder: str, name: str, content: Callable) -> None:
        if name == file:
            raise KeyboardInterrupt
        write_atomically(folder, name, content)

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_atomically", write)
        patch.setattr(evaluations, "write_atomically", write)
        with pytest.raises(KeyboardInterrupt):
            run.train(SCORES)
    run.train(SCORES)
    assert list(differences(run.output, whole)) == []


def differences(ours: Path, theirs: Path) -> Iterator[str]:
    for name in ("model_best.pth", "model_final.pth"):
        yield from differing(*(torch.load(folder / name, weights_only=True) for folder in (ours, theirs)), name)


def test_what_is_better_must_be_said(run: Run) -> None:
    with pytest.raises(ValueError, match=r"SOLVER\.EARLY_STOPPING needs SOLVER\.BEST_METRIC, such as bbox/AP"):
        run.train({}, "SOLVER.BEST_METRIC", "")


def test_metric_without_data_to_measure_it_on_is_refused(run: Run) -> None:
    with pytest.raises(ValueError, match=r"SOLVER\.BEST_METRIC is bbox/AP, but DATASETS\.TEST is empty"):
        run.train({}, "DATASETS.TEST", "()")


@pytest.mark.parametrize(
    ("metric", "results_of"),
    [
        ("bbox/ap", lambda metrics: {"bbox": metrics}),
        ("total_loss", lambda metrics: {"bbox": metrics}),  # in metrics.json, but the lower the better
        ("bbox/AP", lambda metrics: {"tiny": {"bbox": metrics}, "large": {"bbox": metrics}}),  # two test sets
    ],
)
def test_metric_that_is_not_measured_is_an_error_at_the_first_evaluation_that_loses_no_step(
    run: Run, metric: str, results_of: Callable[[dict], dict]
) -> None:
    run.results_of = results_of
    names = ", ".join(flatten_results_dict(results_of({"AP": 0})))
    with pytest.raises(ValueError, match=rf"SOLVER\.BEST_METRIC is {metric}, .* is not .*: {names}\."):
        run.train({}, "SOLVER.BEST_METRIC", metric, "SOLVER.CHECKPOINT_PERIOD", 1000)
    assert run.evaluated == [2]
    run.results_of = lambda metrics: {"bbox": metrics}
    run.train({4: 20.0})
    assert run.evaluated[-1] == 10


def test_evaluation_without_results_is_not_counted(run: Run) -> None:
    run.results_of = lambda metrics: {} if metrics["AP"] == 0 else {"bbox": metrics}
    run.train({10: 10.0})
    assert run.evaluated[-1] == 16


def test_it_is_off_by_default() -> None:
    assert load_config(RECIPE).SOLVER.EARLY_STOPPING == 0


IN_TWO_PROCESSES = """
import sys
from pathlib import Path
from detectron2.utils import comm
from dino_d2.engine import run
from dino_d2.engine.processes import run_in_every_process
from dino_d2.tools.train_net import parse

class Trainer(run.DINOTrainer):
    def evaluate(self):  # as detectron2: the other processes get no results
        return {"bbox": {"AP": {2: 30.0}.get(self.iter + 1, 20.0)}} if comm.is_main_process() else {}

run.DINOTrainer, run.own_dataset = Trainer, lambda cfg: ""
if __name__ == "__main__":
    run_in_every_process(run.train_or_evaluate, parse(sys.argv[1:]))
    threads = [file.read_text().strip() for file in Path("/proc/self/task").glob("*/comm")]
    count = sum("gloo" in name for name in threads)
    # In one piece, or those of two processes mix where Python's output is not buffered.
    sys.stdout.write(f"process ended {count} threads of gloo\\n")
    sys.stdout.flush()
"""


def test_all_processes_end_together(data: tuple[Path, Path], tmp_path: Path) -> None:
    script = tmp_path / "early.py"
    script.write_text(IN_TWO_PROCESSES)
    values = [*config_values(data, tmp_path / "run", "early_two"), "INPUT.MIN_SIZE_TRAIN", "[48]"]
    values += ["SOLVER.MAX_ITER", "20", "TEST.EVAL_PERIOD", "2", "SOLVER.BEST_METRIC", "bbox/AP"]
    result = torchrun(str(script), "--config-file", RECIPE, *values, "SOLVER.EARLY_STOPPING", "2")
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("process ended 0 threads of gloo") == 2, result.stdout  # one that runs on can abort it
    assert torch.load(tmp_path / "run" / "model_final.pth", weights_only=True)["iteration"] == 5


KILLED_IN_EVALUATION = IN_TWO_PROCESSES.replace(
    """    def evaluate(self):""",
    """    def evaluate(self):
        once = Path(self.cfg.OUTPUT_DIR, "killed")
        if comm.is_main_process() and self.iter == 3 and not once.exists():
            once.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        sys.stdout.write(f"evaluates after {self.iter + 1}\\n")  # in one piece, as below
        sys.stdout.flush()
        return self.results()

    def results(self):""",
).replace("import sys", "import os, signal, sys")


def test_all_processes_repeat_an_evaluation_in_which_the_main_one_was_killed(
    data: tuple[Path, Path], tmp_path: Path
) -> None:
    script = tmp_path / "killed.py"
    script.write_text(KILLED_IN_EVALUATION)
    values = [*config_values(data, tmp_path / "run", "early_killed"), "INPUT.MIN_SIZE_TRAIN", "[48]"]
    values += ["SOLVER.MAX_ITER", "5", "TEST.EVAL_PERIOD", "2", "SOLVER.CHECKPOINT_PERIOD", "2"]
    command = (str(script), "--config-file", RECIPE, "--resume", *values)
    assert torchrun(*command).returncode != 0
    assert not (tmp_path / "run" / "model_final.pth").exists()
    result = torchrun(*command)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("evaluates after 4") == 2
    assert result.stdout.count("evaluates after 2") == 0


def test_the_main_process_says_which_weights_are_the_best(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process may read the file before the main one has written the last evaluation's."""
    trainer = run.train({20: 50.0}, "SOLVER.EARLY_STOPPING", 0)
    monkeypatch.setattr(comm, "is_main_process", lambda: False)
    monkeypatch.setattr(comm, "all_gather", lambda value: [trainer.iter, value])
    monkeypatch.setattr(DINOTrainer, "test", lambda *arguments: pytest.fail("evaluates alone"))
    best = run.output / "model_best.pth"
    torch.save(torch.load(best, weights_only=True) | {"iteration": 1}, best)
    results, _ = of_best_weights(trainer, None)
    assert results is None
