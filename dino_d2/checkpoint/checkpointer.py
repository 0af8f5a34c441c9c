"""detectron2's checkpointer for DINO: matches classes by name, runs no code, rejects files of other models."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from detectron2.checkpoint import DetectionCheckpointer
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from .assumptions import EXTRA_STATE, Assumptions
from .backbone import COMPUTED, DETECTOR_ONLY
from .classes import CLASS_BIAS, CLASS_ROWS, match_classes
from .files import check_arrays_only, write_atomically, write_checkpoint
from .mismatch import explain_mismatch

if TYPE_CHECKING:
    from fvcore.common.checkpoint import _IncompatibleKeys

LOADABLE = (
    "Supported files: checkpoints written by tools/train_net.py; published DINO weights (official, detrex, MMDet) "
    "or a backbone, converted by tools/convert_checkpoint.py; detectron2's ImageNet backbones."
)
# In a backbone file, at least this fraction of the backbone is found and at least this fraction of the file is used:
# the rest is an ImageNet classifier then, not another detector or a deeper backbone.
BACKBONE_SHARE = 0.9
# Learned per query: its content and, for static queries, its anchor.
CONTENT, ANCHORS = "query_selection.content.weight", "query_selection.anchor_logits.weight"
# What torch and `check_arrays_only` say of an object that only code can make, and torch between advice for its callers.
GLOBAL, TORCH_REASON = re.compile(r"GLOBAL (\S+)"), re.compile(r"WeightsUnpickler error: (.*)")
GIT_LFS = b"version https://git-lfs"  # how its pointers begin
OPTIONAL = (EXTRA_STATE, *COMPUTED, "running_mean", "running_var")  # names that a file may lack


class DINOCheckpointer(DetectionCheckpointer):
    """A :class:`DetectionCheckpointer` that

    - copies class rows by name if the weights are for other classes, and logs which;
    - takes the first content queries if the weights have more than the model;
    - rejects files that can run code;
    - rejects files that hold another model, and for evaluation those of another config;
    - writes files atomically, and says what to do about a damaged one.

    Loading the optimizer or any other `checkpointables` resumes training, which requires the same classes.

    Args:
        model: a DINO, possibly wrapped for distributed training or by `torch.compile`.
        save_dir: folder for checkpoints.
        trust_files: load files that can run code.
        for_evaluation: reject weights that lack anything that inference uses, which would be random, such as a class or
            a query, and weights with parts that the model does not use. Without it, they are a start for training.
        others: as in detectron2, including `checkpointables`.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        trust_files: bool = False,
        for_evaluation: bool = False,
        **others: Any,
    ):
        super().__init__(_uncompiled(model), save_dir, **others)
        self.model = _uncompiled(self.model)  # inside a wrapper for distributed training
        self.trust_files, self.for_evaluation = trust_files, for_evaluation
        self._path, self._resumes = "", False

    def save(self, name: str, **kwargs: Any) -> None:
        """As in fvcore, but atomic (`write_checkpoint`)."""
        if not self.save_dir or not self.save_to_disk:
            return
        parts = {key: part.state_dict() for key, part in self.checkpointables.items()}
        write_checkpoint({"model": self.model.state_dict(), **parts, **kwargs}, self.save_dir, f"{name}.pth")
        self.logger.info("Saved %s", os.path.join(self.save_dir, f"{name}.pth"))
        self.tag_last_checkpoint(f"{name}.pth")

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """As in fvcore, but atomic: a run killed while the file is empty could not be resumed."""
        write_atomically(self.save_dir, "last_checkpoint", lambda file: file.write(last_filename_basename.encode()))

    def load(self, path: str, checkpointables: Sequence[str] | None = None) -> dict[str, Any]:
        """As in fvcore.

        Raises:
            ValueError: a file that can run code, a file of another model, weights that do not match the config, or
                none for an evaluation.
        """
        if self.for_evaluation and not path:
            raise ValueError(
                "No weights to evaluate: MODEL.WEIGHTS is empty"
                + (f", and {self.save_dir} holds no checkpoint" if self.save_dir else "")
                + ". Give --weights FILE, or --resume with the OUTPUT_DIR of a run."
            )
        self._path = path
        self._resumes = bool(self.checkpointables if checkpointables is None else checkpointables)
        try:
            return super().load(path, checkpointables)
        finally:
            self._parsed_url_during_load = None  # detectron2 leaves it set after an error, and then cannot load again

    def _load_file(self, filename: str) -> dict[str, Any]:
        try:
            if filename.endswith(".pkl") and not self.trust_files:
                check_arrays_only(filename)
            if filename.endswith(".safetensors"):
                return {"model": load_file(filename)}
            return super()._load_file(filename)
        except (pickle.UnpicklingError, RuntimeError, EOFError, LookupError, ValueError, SafetensorError) as error:
            used = GLOBAL.search(str(error)) if isinstance(error, pickle.UnpicklingError) else None
            if used:
                raise ValueError(
                    f"{self._path} holds more than weights, and loading it could run code: it uses {used[1]}\n"
                    "For weights published with their training settings, use tools/convert_checkpoint.py, which runs "
                    "nothing. If you trust the file, set MODEL.TRUST_WEIGHTS True."
                ) from error
            reason = TORCH_REASON.search(str(error))
            raise ValueError(
                f"{filename} is damaged or not a checkpoint ({reason[1] if reason else error}). "
                f"{self._advice(filename)}"
            ) from error

    def _advice(self, damaged: str) -> str:
        with open(damaged, "rb") as file:
            if file.read(len(GIT_LFS)) == GIT_LFS:
                return "It is a pointer of git-lfs, not the file itself, which `git lfs pull` gets."
        others = sorted(Path(damaged).parent.glob("model_*.pth"), key=lambda path: path.stat().st_mtime)
        earlier = [str(path) for path in others if path != Path(damaged) and not path.stem.endswith("_ema")]
        if not self._resumes or not earlier:
            return "Its folder has no other checkpoint." if self._resumes else "Download or copy it again."
        return f"To resume from the previous one: --resume-from {earlier[-1]}"

    def _torch_load(self, f: str) -> dict[str, Any]:
        return torch.load(f, map_location="cpu", weights_only=not self.trust_files)

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        state = checkpoint["model"]
        names = list(state)
        if not all(isinstance(value, (Tensor, np.ndarray)) for value in state.values()):
            raise self._wrong_model(0, names)
        self._convert_ndarray_to_tensor(state)
        consume_prefix_in_state_dict_if_present(state, "module.")
        self._fit_classes(state)
        self._fit_queries(state)
        if self._resumes and not self.checkpointables.keys() <= checkpoint.keys():
            raise ValueError(
                f"{self._path} holds only weights, so training cannot be resumed from it. To start a new training run "
                f"from these weights: MODEL.WEIGHTS {self._path} and another OUTPUT_DIR, without --resume-from"
            )
        incompatible = super()._load_model(checkpoint)

        if self.for_evaluation:
            self._check_fit(incompatible)
            return incompatible
        found = self._parameter_names() - set(incompatible.missing_keys)
        if not self._matches_model(found, names):
            raise self._wrong_model(len(found), names)
        return incompatible

    def _check_fit(self, incompatible: _IncompatibleKeys) -> None:
        lines = explain_mismatch(incompatible, ignored=OPTIONAL)
        if lines:
            raise ValueError(
                f"{self._path} does not match the config. Use the config that the weights were trained with, or "
                "correct yours:\n  " + "\n  ".join(lines)
            )

    def _parameter_names(self) -> set[str]:
        return {name for name in self.model.state_dict() if not name.endswith(OPTIONAL)}

    def _matches_model(self, found: set[str], names: Sequence[str]) -> bool:
        """Whether a file with these names has most of the detector, or its whole backbone and little else."""
        own = self._parameter_names()
        backbone = {name for name in own if name.startswith("backbone.")}
        pretrained = {name for name in backbone if not DETECTOR_ONLY.fullmatch(name.removeprefix("backbone."))}
        used = len(found) / max(1, sum(not name.endswith(OPTIONAL) for name in names))
        is_detector = 2 * len(found - backbone) >= len(own - backbone)
        return is_detector or (len(found & pretrained) >= BACKBONE_SHARE * len(pretrained) and used >= BACKBONE_SHARE)

    def _wrong_model(self, found: int, names: Sequence[str]) -> ValueError:
        return ValueError(
            f"{self._path} holds another model: it has {found} of this model's {len(self._parameter_names())} "
            f"parameters. Its names are {', '.join(map(str, names[:5]))}{', …' if names[5:] else ''}\n" + LOADABLE
        )

    def _fit_classes(self, state: dict[str, Tensor]) -> None:
        """Convert the class rows of `state` to the model's number and order, in place."""
        if CLASS_BIAS not in state:
            if self.for_evaluation:
                raise ValueError(f"{self._path} has no class heads, so it cannot be evaluated.\n{LOADABLE}")
            return
        assumed = Assumptions.from_tensor(state[EXTRA_STATE]) if EXTRA_STATE in state else None
        number, own_number = len(state[CLASS_BIAS]), self.model.decoder.num_classes
        if assumed and not self.model.assumptions.class_names and self.checkpointables and not self._resumes:
            # A start for training on data without known names, which may have other classes.
            assumed = replace(assumed, class_names=())
            state[EXTRA_STATE] = assumed.to_tensor()
        if assumed and len(assumed.class_names) == number and self.model.assumptions.class_names:
            self._copy_by_name(state, assumed)
        elif number != own_number:
            problem = (
                f"{self._path} is for {number} classes, the model has {own_number}, and they cannot be matched because "
                "not both have class names. Set MODEL.DINO.CLASS_NAMES for the model, and when converting or training "
                "the weights."
            )
            if self._resumes or self.for_evaluation:
                raise ValueError(problem)
            for name in [name for name in state if CLASS_ROWS.fullmatch(name)]:
                del state[name]
            if assumed:
                state[EXTRA_STATE] = replace(assumed, num_classes=own_number).to_tensor()
            self.logger.warning(f"{problem} Newly initialised: all {own_number} classes.")

    def _copy_by_name(self, state: dict[str, Tensor], assumed: Assumptions) -> None:
        ours = self.model.assumptions.class_names
        match = match_classes(assumed.class_names, ours)
        if match.theirs == match.ours:
            return
        table = f"Classes of {self._path} and of the model:\n{match.table()}"
        if self._resumes:
            raise ValueError(
                f"Training cannot be resumed with other classes, because the optimizer's state is for the old ones. "
                f"{table}\nSet MODEL.DINO.CLASS_NAMES as before, or start a new training run from these weights "
                "(MODEL.WEIGHTS, another OUTPUT_DIR, no --resume), which copies classes by name."
            )
        if self.for_evaluation and match.new:
            raise ValueError(f"The weights lack classes of the model, so it cannot be evaluated. {table}")
        for name, own in self.model.state_dict().items():
            if CLASS_ROWS.fullmatch(name) and name in state and state[name].shape[1:] == own.shape[1:]:
                state[name] = match.copy_rows(state[name], own)
        state[EXTRA_STATE] = replace(assumed, class_names=ours, num_classes=len(ours)).to_tensor()
        self.logger.info(table)

    def _fit_queries(self, state: dict[str, Tensor]) -> None:
        """Convert the content queries of `state` to the model's number, in place: they are interchangeable."""
        own = self.model.state_dict()
        if CLASS_BIAS not in state or CONTENT not in own:  # a backbone; a model without learned queries
            return
        content = state.get(CONTENT, own[CONTENT][:0])
        count, own_count = len(content), len(own[CONTENT])
        if count == own_count or content.shape[1:] != own[CONTENT].shape[1:]:
            return
        problem = f"{self._path} has {count} content queries, MODEL.DINO.NUM_QUERIES is {own_count}"
        if self._resumes:
            raise ValueError(
                f"{problem}. Resuming needs the same number, because the optimizer has state for each; to change it, "
                "start a new training run from these weights (MODEL.WEIGHTS, another OUTPUT_DIR, no --resume)."
            )
        if ANCHORS in own:
            raise ValueError(
                f"{problem}. Each static query has learned its own part of the image, so none can be added or removed. "
                f"Set MODEL.DINO.NUM_QUERIES {count}."
            )
        if count > own_count:
            state[CONTENT] = content[:own_count]
            self.logger.info(f"{problem}: using the first {own_count}.")
        elif self.for_evaluation:
            raise ValueError(f"{problem}: the rest would be random. Set it to {count} or fewer.")
        else:
            state[CONTENT] = torch.cat([content, own[CONTENT][count:].to(content)])
            self.logger.warning(f"{problem}. Newly initialised: the last {own_count - count}.")


def _uncompiled(model: nn.Module) -> nn.Module:
    """The model inside what `torch.compile` returns, whose parameters have other names."""
    return getattr(model, "_orig_mod", model)
