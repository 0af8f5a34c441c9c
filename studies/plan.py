"""A study: its YAML file, the runs it asks for, and the config of each.

    budget: 600                      # of training, evaluations not counted
    unit: seconds                    # or steps: of budget and evaluate_at; optional
    evaluate_at: [60, 300, 600]      # at most the budget
    metrics: [AP, AP50]              # shown in the table and the plot; optional
    seeds: [1, 2, 3]
    settings: SETTINGS               # of every run
    data:
      raccoon: {train: train, test: test, folder: PATH, settings: SETTINGS}    # all optional
    detectors:
      dino: {config: RECIPE, settings: SETTINGS}                               # settings optional

SETTINGS are config keys with values, or a list of such mappings and of YAML files with more of them; later ones count.
Those of the detector are laid over its recipe, then those of the study, then those of the data set, so that what the
pictures go through is the same for every detector. Paths are relative to the root of the repository. `train` and `test`
name annotation files in the data set's folder, without `.json`: to choose settings, take `train_fit` and `train_held`.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from detectron2.config import CfgNode

from dino_d2.config import flat, load_config
from dino_d2.data import CocoFiles
from dino_d2.data.datasets import class_names_of
from dino_d2.engine.choices import DECAY

WORK = Path("output/studies")  # data, checkpoints and logs; nothing there is committed
SHOWN = ("AP", "AP50")  # metrics, unless a study names others
SAVES = 10  # checkpoints per run, of which the newest is kept
DECIDED = (  # by the study, so not by settings
    "DATASETS.COCO_FORMAT", "DATASETS.TRAIN", "DATASETS.TEST", "MODEL.DINO.NUM_CLASSES", "MODEL.DINO.CLASS_NAMES",
    "OUTPUT_DIR", "SEED", "SOLVER.MAX_ITER", "SOLVER.STEPS", "SOLVER.CHECKPOINT_PERIOD", "SOLVER.CHECKPOINT_KEEP",
    "SOLVER.BEST_METRIC", "SOLVER.EARLY_STOPPING", "TEST.EVAL_PERIOD",
)  # fmt: skip
PATHS = ("MODEL.WEIGHTS",)  # differ between machines
COSTLESS = (
    "SOLVER.",
    "TEST.",
    "MODEL.DINO.NMS_THRESHOLD",
    "MODEL.DINO.BOX_VOTING",
    "MODEL.DINO.LOSS.",
    "MODEL.DINO.MATCHER.",
)
SECONDS, STEPS = "seconds", "steps"  # units
COSTLY = ("SOLVER.IMS_PER_BATCH", "SOLVER.ACCUMULATION_STEPS", "SOLVER.AMP.", "SOLVER.EMA.")

Settings = dict[str, Any]  # value by dotted config key


@dataclass(frozen=True)
class DataSet:
    """A data set of a study. train, test: names of annotation files in `folder`, without suffix."""

    name: str
    folder: Path
    train: str
    test: str
    settings: Settings

    def files(self, part: str) -> CocoFiles:
        """The images are in a folder named like the part, else in that of the training images.

        Raises:
            FileNotFoundError: the data has not been made.
        """
        annotations = self.folder / f"{part}.json"
        if not annotations.is_file():
            raise FileNotFoundError(f"{annotations} does not exist: make the data first, with dev/study.py data")
        own = self.folder / part
        return CocoFiles(annotations, own if own.is_dir() else self.folder / "train")


@dataclass(frozen=True)
class Candidate:
    """A detector of a study. config: a recipe or config file."""

    name: str
    config: str
    settings: Settings


@dataclass(frozen=True)
class Run:
    """One training with its evaluations."""

    data: DataSet
    detector: Candidate
    seed: int

    def __str__(self) -> str:
        return f"{self.data.name}/{self.detector.name}/seed_{self.seed}"


@dataclass(frozen=True)
class Study:
    """A study as written in `file`. unit: of budget and evaluate_at. work: for data, checkpoints and logs."""

    file: Path
    work: Path
    budget: float
    unit: str
    evaluate_at: tuple[float, ...]
    metrics: tuple[str, ...]
    seeds: tuple[int, ...]
    settings: Settings
    data: tuple[DataSet, ...]
    detectors: tuple[Candidate, ...]

    @property
    def name(self) -> str:
        return self.file.stem

    @property
    def results(self) -> Path:
        """Folder of the result files, beside the study's file."""
        return self.file.parent / "results" / self.name

    def pairs(self) -> list[tuple[DataSet, Candidate]]:
        return [(data, detector) for data in self.data for detector in self.detectors]

    def runs(self) -> list[Run]:
        """All runs, seed after seed, so that an unfinished study already compares everything."""
        return [Run(data, detector, seed) for seed in self.seeds for data, detector in self.pairs()]

    def config(self, data: DataSet, detector: Candidate) -> CfgNode:
        """The config of all runs of this pair, without what `config_of_run` adds.

        Raises:
            ValueError, FileNotFoundError: see `dino_d2.load_config`; the message names the pair.
        """
        settings = detector.settings | self.settings | data.settings
        try:
            return load_config(detector.config, [part for item in settings.items() for part in item])
        except (ValueError, AssertionError) as error:
            raise ValueError(f"{self.file}, {detector.name} on {data.name}: {error}") from error

    def config_of_run(self, run: Run, iterations: int, output: Path) -> CfgNode:
        """The frozen config of a run of that many iterations, whose files are written to `output`.

        The learning rate drops after 5/6 of the run, as in the recipes, if it drops by steps.

        Raises:
            FileNotFoundError: the data or the weights to start from have not been made.
        """
        cfg = self.config(run.data, run.detector)
        weights = cfg.MODEL.WEIGHTS
        if weights and "://" not in weights and not Path(weights).is_file():
            raise FileNotFoundError(f"{weights} (MODEL.WEIGHTS) does not exist: make it, with dev/study.py data")
        parts = {f"{run.data.name}_{part}": run.data.files(part) for part in (run.data.train, run.data.test)}
        names = class_names_of(run.data.files(run.data.train).annotations)
        cfg.MODEL.DINO.NUM_CLASSES, cfg.MODEL.DINO.CLASS_NAMES = len(names), names
        cfg.DATASETS.COCO_FORMAT = [[name, str(part.annotations), str(part.images)] for name, part in parts.items()]
        cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (
            (f"{run.data.name}_{run.data.train}",),
            (f"{run.data.name}_{run.data.test}",),
        )
        drop = iterations * DECAY[0] // DECAY[1]
        cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS = iterations, (drop,) if drop else ()
        cfg.SOLVER.CHECKPOINT_PERIOD, cfg.SOLVER.CHECKPOINT_KEEP = max(iterations // SAVES, 1), 1
        cfg.SOLVER.BEST_METRIC, cfg.SOLVER.EARLY_STOPPING, cfg.TEST.EVAL_PERIOD = "", 0, 0
        cfg.SEED, cfg.OUTPUT_DIR = run.seed, str(output)
        cfg.freeze()
        return cfg

    def settings_digest(self, data: DataSet, detector: Candidate) -> str:
        """Digest of all settings of the pair that do not depend on data, paths, seed or length of the run."""
        return _digest({key: value for key, value in _of_pair(self.config(data, detector))})

    def cost_digest(self, data: DataSet, detector: Candidate) -> str:
        """Digest of the settings that a step's time may depend on."""
        pairs = _of_pair(self.config(data, detector))
        return _digest({key: value for key, value in pairs if key.startswith(COSTLY) or not key.startswith(COSTLESS)})


def read_study(file: Path, work: Path = WORK) -> Study:
    """Read and check a study.

    Raises:
        FileNotFoundError: the file, a recipe or a file of settings does not exist.
        ValueError: a key is unknown or missing, or a value is wrong; the message names it.
    """
    content = _mapping(_read_yaml(file), str(file))
    _check_keys(
        content,
        str(file),
        needed=("budget", "evaluate_at", "seeds", "data", "detectors"),
        others=("unit", "metrics", "settings"),
    )
    budget, moments, seeds = content["budget"], content["evaluate_at"], content["seeds"]
    unit, metrics = content.get("unit", SECONDS), content.get("metrics", SHOWN)
    if unit not in (SECONDS, STEPS):
        raise ValueError(f"{file}: unit is {unit!r}; it must be {SECONDS} or {STEPS}")
    if not _is_list(list(metrics), lambda name: isinstance(name, str)):
        raise ValueError(f"{file}: metrics is {metrics!r}; it must be a list of names, such as {list(SHOWN)}")
    if not _is_number(budget) or budget <= 0:
        raise ValueError(f"{file}: budget is {budget!r}; it must be a number of {unit} above 0")
    if (
        not _is_list(moments, _is_number)
        or sorted(set(moments)) != moments
        or not 0 < moments[0] <= moments[-1] <= budget
    ):
        raise ValueError(
            f"{file}: evaluate_at is {moments!r}; it must be ascending {unit}, at most the budget, {budget}"
        )
    if not _is_list(seeds, lambda seed: type(seed) is int and seed >= 0) or len(set(seeds)) < len(seeds):
        raise ValueError(f"{file}: seeds is {seeds!r}; it must be a list of different integers, at least 0")
    data = [_data_set(name, entry, file, work) for name, entry in _named(content, "data", file)]
    detectors = [_candidate(name, entry, file) for name, entry in _named(content, "detectors", file)]
    settings = _settings(content.get("settings"), f"{file}: settings")
    study = Study(
        file, work, budget, unit, tuple(moments), tuple(metrics), tuple(seeds), settings, tuple(data), tuple(detectors)
    )
    for pair in study.pairs():
        study.config(*pair)  # unknown keys and wrong values, before anything runs
    return study


def iterations_at(seconds: float, seconds_per_step: float) -> int:
    """The iterations that are done after so many seconds of training; at least one."""
    return max(int(seconds / seconds_per_step + 1e-9), 1)


def _data_set(name: str, entry: Any, file: Path, work: Path) -> DataSet:
    where = f"{file}: data: {name}"
    entry = _mapping(entry or {}, where)
    _check_keys(entry, where, others=("train", "test", "folder", "settings"))
    folder = Path(entry.get("folder") or work / "data" / name)
    settings = _settings(entry.get("settings"), f"{where}: settings")
    return DataSet(name, folder, entry.get("train", "train"), entry.get("test", "test"), settings)


def _candidate(name: str, entry: Any, file: Path) -> Candidate:
    where = f"{file}: detectors: {name}"
    entry = _mapping(entry, where)
    _check_keys(entry, where, needed=("config",), others=("settings",))
    return Candidate(name, entry["config"], _settings(entry.get("settings"), f"{where}: settings"))


def _settings(given: Any, where: str) -> Settings:
    """Settings by dotted key, later ones over earlier ones."""
    found: Settings = {}
    for item in given if isinstance(given, list) else [given or {}]:
        if isinstance(item, str):
            found |= flat(_mapping(_read_yaml(Path(item)), item))
            continue
        own = flat(_mapping(item, where))
        decided = sorted(own.keys() & set(DECIDED))
        if decided:
            raise ValueError(f"{where}: {decided[0]} is decided by the study itself: remove it")
        found |= own
    return found


def _named(content: Mapping[str, Any], key: str, file: Path) -> list[tuple[str, Any]]:
    entries = list(_mapping(content[key], f"{file}: {key}").items())
    for name, _ in entries:
        if not isinstance(name, str) or not name.replace("-", "_").isidentifier():
            raise ValueError(f"{file}: {key}: {name!r} becomes a folder's name: use letters, digits, - and _")
    return entries


def _read_yaml(file: Path) -> Any:
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist; paths in a study are relative to the root of the repository")
    try:
        return yaml.safe_load(file.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is not plain YAML: {error}") from error


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{where} is {value!r}; it must be a mapping of keys to values")
    return value


def _check_keys(given: Mapping[str, Any], where: str, needed: Sequence[str] = (), others: Sequence[str] = ()) -> None:
    known = (*needed, *others)
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
            raise ValueError(f"{where}: unknown key {key!r}; {hint}")
    for key in needed:
        if not given.get(key):
            raise ValueError(f"{where}: {key} is missing or empty")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_list(value: Any, of_kind: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(of_kind, value))


def _of_pair(cfg: CfgNode) -> Iterator[tuple[str, Any]]:
    return ((key, value) for key, value in flat(cfg).items() if key not in (*DECIDED, *PATHS))


def _digest(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]
