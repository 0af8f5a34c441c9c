"""detectron2's checkpointer for DINO: classes by name, no code run, and no file of another model taken in silence."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.checkpoint import DetectionCheckpointer
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from .assumptions import EXTRA_STATE, Assumptions
from .backbone import COMPUTED, DETECTORS_OWN
from .classes import CLASS_BIAS, CLASS_ROWS, match_classes
from .files import check_arrays_only, write_checkpoint, write_whole

LOADABLE = (
    "What can be loaded: checkpoints that tools/train_net.py wrote; what tools/convert_checkpoint.py makes of "
    "published DINO weights (the authors', detrex's, MMDetection's) or of a backbone; detectron2's ImageNet backbones."
)
# With a backbone alone at least this much of it is in the file, and at least this much of the file is it: what is left
# over is an ImageNet classifier then, not another detector or a deeper backbone.
BACKBONE_SHARE = 0.9
# Learned by the query: what it starts from and, of static queries, where.
CONTENT, ANCHORS = "query_selection.content.weight", "query_selection.anchor_logits.weight"
OPTIONAL = (EXTRA_STATE, *COMPUTED, "running_mean", "running_var")  # names that do not count: a file may lack them


class DINOCheckpointer(DetectionCheckpointer):
    """Loads what :class:`DetectionCheckpointer` loads, and

    - copies the rows of classes by name where weights are for other classes, and says which;
    - takes the first content queries where weights have more of them than the model;
    - refuses files that could run code;
    - refuses files that hold another model;
    - writes whole files or none, and says what to do about a damaged one.

    With the optimizer or any other of the `checkpointables` training is resumed: then the classes must be the same.

    Args:
        model: a DINO, also one that is wrapped for several processes.
        save_dir: where checkpoints are written and the last one is looked for.
        trust_files: load files that could run code.
        for_evaluation: refuse weights that lack a class or a query of the model, which would be random.
        others: see detectron2; `checkpointables` among them.
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
        super().__init__(model, save_dir, **others)
        self.trust_files, self.for_evaluation = trust_files, for_evaluation
        self._path, self._resumes = "", False

    def save(self, name: str, **kwargs: Any) -> None:
        """See fvcore; the file appears whole or not at all (`write_checkpoint`)."""
        if not self.save_dir or not self.save_to_disk:
            return
        parts = {key: part.state_dict() for key, part in self.checkpointables.items()}
        write_checkpoint({"model": self.model.state_dict(), **parts, **kwargs}, self.save_dir, f"{name}.pth")
        self.logger.info("Saved %s", os.path.join(self.save_dir, f"{name}.pth"))
        self.tag_last_checkpoint(f"{name}.pth")

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """See fvcore, whose file is empty for a moment: a run that is killed in it would not be found again."""
        write_whole(self.save_dir, "last_checkpoint", lambda file: file.write(last_filename_basename.encode()))

    def load(self, path: str, checkpointables: Sequence[str] | None = None) -> dict[str, Any]:
        """See fvcore.

        Raises:
            ValueError: a file that could run code, that holds another model or weights that contradict the config.
        """
        self._path = path
        self._resumes = bool(self.checkpointables if checkpointables is None else checkpointables)
        try:
            return super().load(path, checkpointables)
        finally:
            self._parsed_url_during_load = None  # detectron2 leaves it after an error, and refuses to load again

    def _load_file(self, filename: str) -> dict[str, Any]:
        try:
            if filename.endswith(".pkl") and not self.trust_files:
                check_arrays_only(filename)
            if filename.endswith(".safetensors"):
                return {"model": load_file(filename)}
            return super()._load_file(filename)
        except pickle.UnpicklingError as error:
            asked = re.search(r"GLOBAL (\S+)", str(error))  # torch goes on with advice for people who call torch.load
            reason = f"it asks for {asked[1]}" if asked else str(error)
            raise ValueError(
                f"{self._path} is no file of mere weights, and loading it could run code: {reason}\n"
                "Weights published with their authors' settings: tools/convert_checkpoint.py reads them without "
                "running anything. A file whose makers you trust: MODEL.TRUST_WEIGHTS True."
            ) from error
        except (RuntimeError, EOFError, SafetensorError) as error:
            raise ValueError(f"{filename} is damaged or no checkpoint ({error}). {self._advice(filename)}") from error

    def _advice(self, damaged: str) -> str:
        others = sorted(Path(damaged).parent.glob("model_*.pth"), key=lambda path: path.stat().st_mtime)
        earlier = [str(path) for path in others if path != Path(damaged) and not path.stem.endswith("_ema")]
        if not self._resumes or not earlier:
            return "There is no other in its folder." if self._resumes else "Fetch or copy it again."
        return f"To go on from the one before: --resume-from {earlier[-1]}"

    def _torch_load(self, f: str) -> dict[str, Any]:
        return torch.load(f, map_location="cpu", weights_only=not self.trust_files)

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        state = checkpoint["model"]
        names = list(state)
        if not all(isinstance(value, (Tensor, np.ndarray)) for value in state.values()):
            raise self._other_model(0, names)
        self._convert_ndarray_to_tensor(state)
        consume_prefix_in_state_dict_if_present(state, "module.")
        self._fit_classes(state)
        self._fit_queries(state)
        if self._resumes and not self.checkpointables.keys() <= checkpoint.keys():
            raise ValueError(
                f"{self._path} holds weights alone, no state of training that could be gone on with. To start a new "
                f"training from them: MODEL.WEIGHTS {self._path} and another OUTPUT_DIR, without --resume-from"
            )
        incompatible = super()._load_model(checkpoint)

        found = self._own_names() - set(incompatible.missing_keys)
        if not self._is_this_model(found, names):
            raise self._other_model(len(found), names)
        return incompatible

    def _own_names(self) -> set[str]:
        return {name for name in self.model.state_dict() if not name.endswith(OPTIONAL)}

    def _is_this_model(self, found: set[str], names: Sequence[str]) -> bool:
        """Whether most of the detector was found in a file with these names, or its whole backbone and little else."""
        own = self._own_names()
        backbone = {name for name in own if name.startswith("backbone.")}
        pretrained = {name for name in backbone if not DETECTORS_OWN.fullmatch(name.removeprefix("backbone."))}
        used = len(found) / max(1, sum(not name.endswith(OPTIONAL) for name in names))
        is_detector = 2 * len(found - backbone) >= len(own - backbone)
        return is_detector or (len(found & pretrained) >= BACKBONE_SHARE * len(pretrained) and used >= BACKBONE_SHARE)

    def _other_model(self, found: int, names: Sequence[str]) -> ValueError:
        return ValueError(
            f"{self._path} holds another model: {found} of the {len(self._own_names())} parameters of this one were "
            f"found in it. The names there are {', '.join(map(str, names[:5]))}{', …' if names[5:] else ''}\n"
            + LOADABLE
        )

    def _fit_classes(self, state: dict[str, Tensor]) -> None:
        """Bring the class rows of `state` into the model's number and order, in place."""
        if CLASS_BIAS not in state:
            if self.for_evaluation:
                raise ValueError(f"{self._path} has no class heads, so there is nothing to evaluate.\n{LOADABLE}")
            return
        assumed = Assumptions.from_tensor(state[EXTRA_STATE]) if EXTRA_STATE in state else None
        number, own_number = len(state[CLASS_BIAS]), self.model.decoder.num_classes
        if assumed and len(assumed.class_names) == number and self.model.assumptions.class_names:
            self._copy_by_name(state, assumed)
        elif number != own_number:
            problem = (
                f"{self._path} is for {number} classes, the model has {own_number}, and without the names of both they "
                "cannot be matched. MODEL.DINO.CLASS_NAMES names the classes of the model; set when weights are "
                "converted or trained, it names theirs."
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
                f"Training cannot be resumed with other classes, since the optimizer knows the old ones. {table}\n"
                "Set MODEL.DINO.CLASS_NAMES as it was, or start a new training from these weights (MODEL.WEIGHTS, "
                "another OUTPUT_DIR, no --resume), which copies them by name."
            )
        if self.for_evaluation and match.new:
            raise ValueError(f"Classes that the weights do not have cannot be evaluated. {table}")
        for name, own in self.model.state_dict().items():
            if CLASS_ROWS.fullmatch(name) and name in state and state[name].shape[1:] == own.shape[1:]:
                state[name] = match.copy_rows(state[name], own)
        state[EXTRA_STATE] = replace(assumed, class_names=ours, num_classes=len(ours)).to_tensor()
        self.logger.info(table)

    def _fit_queries(self, state: dict[str, Tensor]) -> None:
        """Bring the content queries of `state` into the model's number, in place: all of them were trained alike."""
        own = self.model.state_dict()
        if CLASS_BIAS not in state or CONTENT not in own:  # a backbone alone; a model whose queries learn nothing
            return
        content = state.get(CONTENT, own[CONTENT][:0])
        count, own_count = len(content), len(own[CONTENT])
        if count == own_count or content.shape[1:] != own[CONTENT].shape[1:]:
            return
        problem = f"{self._path} has {count} content queries, MODEL.DINO.NUM_QUERIES is {own_count}"
        if self._resumes:
            raise ValueError(
                f"{problem}. Training is resumed with as many, since the optimizer knows each; with fewer, start a new "
                "training from these weights (MODEL.WEIGHTS, another OUTPUT_DIR, no --resume)."
            )
        if ANCHORS in own:
            raise ValueError(
                f"{problem}. Static queries have learned where to look, each its part of the image: none may be left "
                f"out or added. Set MODEL.DINO.NUM_QUERIES {count}."
            )
        if count > own_count:
            state[CONTENT] = content[:own_count]
            self.logger.info(f"{problem}: the first {own_count} are taken.")
        elif self.for_evaluation:
            raise ValueError(f"{problem}: the others would be random. Set it to {count} or fewer.")
        else:
            state[CONTENT] = torch.cat([content, own[CONTENT][count:].to(content)])
            self.logger.warning(f"{problem}. Newly initialised: the last {own_count - count}.")
