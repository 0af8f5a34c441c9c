"""The numbers of the published successors, in float64; docs/parity.md has the differences, which this file prints."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dino_d2 import geometry
from dino_d2.modeling.build import CLASS_LOSSES
from dino_d2.modeling.criterion import LossWeights, SetCriterion
from dino_d2.modeling.family.memory_fusion import FusingEncoder
from dino_d2.modeling.family.mixed_matching import MixedMatcher, rank_weights
from dino_d2.modeling.family.position_supervised import PositionModulatedMatcher
from dino_d2.modeling.matcher import HungarianMatcher
from dino_d2.structures import DenoisingQueries, Memory, Pairs, Predictions, Targets
from tests.golden.successors import recipe

FOLDER = Path(recipe.__file__).parent
FILES = {name: np.load(FOLDER / f"{name}.npz") for name in ("stable_dino", "align_detr", "mal")}
CLASS_LOSS = {"stable_dino": "position_supervised", "align_detr": "iou_aware", "mal": "matchability"}
WEIGHTS = {"stable_dino": LossWeights(6, 5, 2, 1), "align_detr": LossWeights(1, 5, 2), "mal": LossWeights(1, 5, 2)}
MATCHERS = {
    "stable_dino": PositionModulatedMatcher(2, 5, 2),
    "align_detr": MixedMatcher(HungarianMatcher(2, 5, 2), 2),
    "mal": HungarianMatcher(2, 5, 2),
}
# Where the published assignment is not that of each image alone: objects of one class share a table, and so do the
# images of a batch their number of copies.
NOT_CLEAN = {
    ("stable_dino", "repeat"),
    ("stable_dino", "crowded"),
    ("stable_dino", "crowded_last"),
    ("align_detr", "crowded"),
}
CASES = [(file, case) for file in FILES for case in recipe.LOSS_CASES if f"{case}/seed" in FILES[file]]
each_case = pytest.mark.parametrize(("file", "case"), CASES)
each_clean_case = pytest.mark.parametrize(("file", "case"), [x for x in CASES if x not in NOT_CLEAN])
SUFFIXES = ["_interm", "_0", "_1", ""]  # in the order of the network


def tensor(x: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(x))


def relative(found: Tensor, expected: np.ndarray) -> float:
    """The largest difference of two tensors as a part of the largest number expected."""
    expected = tensor(expected)
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-12)) if found.numel() else 0.0


class Case:
    """Inputs of a case, which gradients can be asked for, and what is stored of it."""

    def __init__(self, file: str, case: str):
        self.stored = {key.removeprefix(f"{case}/"): x for key, x in FILES[file].items() if key.startswith(f"{case}/")}
        inputs = recipe.losses(case, int(self.stored["seed"]))
        self.targets = [Targets(tensor(x), tensor(y)) for x, y in zip(inputs["labels"], inputs["boxes"], strict=True)]
        self.matched = [self.leaves(x) for x in (inputs["interm"], *inputs["layers"])]  # in the network's order
        self.denoised = [self.leaves(x) for x in inputs["denoising"] or []]
        image, query, number = tensor(inputs["known"])
        first = torch.tensor([0, *(len(t) for t in self.targets)]).cumsum(0)
        slots = self.denoised[0].logits.shape[1] if self.denoised else 0
        self.denoising = DenoisingQueries(
            content=torch.zeros(len(self.targets), slots, 1),
            anchors=torch.zeros(len(self.targets), slots, 4),
            group_size=2 * max(len(t) for t in self.targets),
            groups=inputs["groups"],
            pairs=Pairs(image, query, first[image] + number),
        )

    @staticmethod
    def leaves(x: Sequence[np.ndarray]) -> Predictions:
        return Predictions(*(tensor(part).requires_grad_() for part in x))

    def stored_pairs(self) -> list[Pairs]:
        return [Pairs(*tensor(self.stored[f"pairs{suffix}"]).unbind()) for suffix in SUFFIXES]

    def losses(self, file: str, weights: LossWeights) -> dict[str, Tensor]:
        """For the stored pairs."""

        def matcher(predictions: Sequence[Predictions], targets: Sequence[Targets]) -> list[Pairs]:
            pairs = self.stored_pairs()
            if file == "align_detr":
                ranked = rank_weights(predictions[:-1], pairs[:-1], targets)
                pairs = [*(replace(p, weight=w) for p, w in zip(pairs, ranked, strict=False)), pairs[-1]]
            return pairs

        proposals, *layers = self.matched
        if self.denoised:
            layers = [
                Predictions(torch.cat([a.logits, b.logits], 1), torch.cat([a.boxes, b.boxes], 1))
                for a, b in zip(self.denoised, layers, strict=True)
            ]
        criterion = SetCriterion(matcher, weights, CLASS_LOSSES[CLASS_LOSS[file]])
        return criterion(layers, proposals, self.denoising, self.targets)

    def gradients(self) -> Iterator[tuple[str, Tensor, np.ndarray]]:
        """Of the layers, the proposals, the denoising part: name, found, stored."""
        proposals, *layers = self.matched
        for suffix, parts in (("", layers), ("_dn", self.denoised)):
            for kind in ("logits", "boxes") if parts else ():
                found = torch.stack([getattr(part, kind).grad for part in parts])
                yield kind, found, self.stored[f"grad_{kind}{suffix}"]
        for kind in ("logits", "boxes"):
            yield kind, getattr(proposals, kind).grad, self.stored[f"grad_{kind}_interm"]


def triples(pairs: Pairs) -> list[tuple[int, int, int]]:
    return sorted(zip(pairs.image.tolist(), pairs.query.tolist(), pairs.target.tolist(), strict=True))


@pytest.fixture
def without_eps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(geometry, "IOU_EPS", 0.0)


def loss_differences(file: str, case: str) -> dict[str, float]:
    inputs = Case(file, case)
    found = inputs.losses(file, LossWeights(1, 1, 1))
    stored = {key.removeprefix("loss/"): x for key, x in inputs.stored.items() if key.startswith("loss/")}
    assert set(found) == set(stored)
    total = sum(inputs.losses(file, WEIGHTS[file]).values())
    total.backward()
    return {
        "losses": max(relative(found[name].detach(), x) for name, x in stored.items()),
        "total": relative(total.detach(), inputs.stored["total"]),
        "gradients": max(relative(grad, x) for _, grad, x in inputs.gradients()),
    }


def cost_difference(file: str, case: str) -> float:
    inputs, matcher = Case(file, case), MATCHERS[file]
    constant = matcher.giou_weight if file == "stable_dino" else 0  # published: 2 (1 - GIoU)
    differences = [0.0]
    with torch.no_grad():
        for suffix, layer in zip(SUFFIXES, inputs.matched, strict=True):
            for i, target in enumerate(inputs.targets):
                cost = matcher.cost(layer.logits[i], layer.boxes[i], target) + constant
                differences.append(relative(cost, inputs.stored[f"cost{suffix}/{i}"]))
    return max(differences)


# --- losses for the stored pairs


@each_case
def test_losses_and_gradients(file: str, case: str, request: pytest.FixtureRequest) -> None:
    if file == "mal":
        request.getfixturevalue("without_eps")  # DEIM's IoU has none
    differences = loss_differences(file, case)
    assert differences["losses"] < 1e-9
    assert differences["total"] < 1e-9
    assert differences["gradients"] < 1e-9


@pytest.mark.parametrize("case", [case for file, case in CASES if file == "mal"])
def test_our_eps_moves_matchability_hardly(case: str) -> None:
    differences = loss_differences("mal", case)
    assert max(differences["losses"], differences["total"]) < 5e-4


# --- assignment


@each_clean_case
def test_pairs(file: str, case: str) -> None:
    inputs = Case(file, case)
    found = MATCHERS[file](inputs.matched, inputs.targets)
    for ours, stored in zip(found, inputs.stored_pairs(), strict=True):
        assert triples(ours) == triples(stored)


@pytest.mark.parametrize(
    ("file", "case"), [x for x in CASES if x[0] == "align_detr" or (x[0] == "stable_dino" and x not in NOT_CLEAN)]
)
def test_costs(file: str, case: str) -> None:
    assert cost_difference(file, case) < 1e-9


@pytest.mark.parametrize("case", [case for file, case in CASES if file == "align_detr"])
def test_weights_of_the_copies(case: str) -> None:
    inputs = Case("align_detr", case)
    weights = rank_weights(inputs.matched[:-1], inputs.stored_pairs()[:-1], inputs.targets)
    for suffix, found in zip(SUFFIXES, weights, strict=False):
        assert relative(found, inputs.stored[f"weight{suffix}"]) < 1e-9
    assert (inputs.stored["weight"] == 1).all()


def test_a_crowded_image_takes_no_copies_from_the_next_one() -> None:
    """Published: the 9 objects of image 0 leave one copy to image 1, too. Here image 1 is matched as if alone."""
    crowded = Case("align_detr", "crowded")
    alone = MATCHERS["align_detr"](
        [Predictions(x.logits[1:], x.boxes[1:]) for x in crowded.matched], crowded.targets[1:]
    )
    found = MATCHERS["align_detr"](crowded.matched, crowded.targets)
    for pairs, of_image, copies in zip(found, alone, (2, 2, 2, 1), strict=True):
        assert len(of_image.query) == 3 * copies
        assert [(1, q, n + 9) for _, q, n in triples(of_image)] == [x for x in triples(pairs) if x[0] == 1]
    published = crowded.stored_pairs()
    first = [[x for x in triples(pairs) if x[0] == 0] for pairs in (*found, *published)]
    assert first[:4] == first[4:]  # and image 0 as published
    assert [int((p.image == 1).sum()) for p in published] == [3, 3, 3, 3]


def test_pairs_of_an_image_do_not_depend_on_classes_in_the_rest_of_its_batch() -> None:
    """Published: objects of one class overwrite each other in the table of v. Here image 1 is matched as if alone."""
    for case in ("repeat", "crowded", "crowded_last"):
        inputs = Case("stable_dino", case)
        found = MATCHERS["stable_dino"](inputs.matched, inputs.targets)
        for i, target in enumerate(inputs.targets):
            one = [Predictions(x.logits[i : i + 1], x.boxes[i : i + 1]) for x in inputs.matched]
            alone = MATCHERS["stable_dino"](one, [target])
            before = sum(len(t) for t in inputs.targets[:i])
            for pairs, of_image in zip(found, alone, strict=True):
                assert [(i, q, n + before) for _, q, n in triples(of_image)] == [x for x in triples(pairs) if x[0] == i]


# --- memory fusion


class Gives(nn.Module):
    """An encoder layer whose output is known."""

    def __init__(self, tokens: Tensor):
        super().__init__()
        self.tokens = tokens

    def forward(self, memory: Memory, position: Tensor, reference: Tensor) -> Memory:
        return replace(memory, tokens=self.tokens)


def fusion_differences() -> dict[str, float]:
    stored = {key.removeprefix("fusion/"): x for key, x in FILES["stable_dino"].items() if key.startswith("fusion/")}
    seed = int(stored["seed"])
    features, parameters = recipe.fusion(seed)
    entering, *leaving = features = [tensor(x).requires_grad_() for x in features]
    encoder = FusingEncoder([Gives(x) for x in leaving], entering.shape[-1], 1, 20.0, 0.0).double()
    encoder.fusion.load_state_dict({name: tensor(x) for name, x in parameters.items()})
    memory = Memory(entering, None, ((1, entering.shape[1]),), torch.ones(len(entering), 1, 2))
    out = encoder.refine(memory, entering, entering).tokens
    (out * tensor(recipe.generator(seed, "fusion.grad").standard_normal(out.shape))).sum().backward()
    gradients = {f"grad_feature{i}": x.grad for i, x in enumerate(features)}
    gradients |= {f"grad/{name}": x.grad for name, x in encoder.fusion.named_parameters()}
    return {
        "tokens": relative(out.detach(), stored["out"]),
        "gradients": max(relative(grad, stored[name]) for name, grad in gradients.items()),
    }


def test_memory_fusion() -> None:
    differences = fusion_differences()
    assert differences["tokens"] < 1e-9
    assert differences["gradients"] < 1e-9


if __name__ == "__main__":
    for file in FILES:
        geometry.IOU_EPS = 0.0 if file == "mal" else 1e-6
        largest: dict[str, float] = defaultdict(float)
        for case in (case for name, case in CASES if name == file):
            found = loss_differences(file, case)
            if file != "mal" and (file, case) not in NOT_CLEAN:
                found["costs"] = cost_difference(file, case)
            for name, value in found.items():
                largest[name] = max(largest[name], value)
        print(file, {name: f"{value:.1e}" for name, value in largest.items()})
    print("fusion", {name: f"{value:.1e}" for name, value in fusion_differences().items()})
