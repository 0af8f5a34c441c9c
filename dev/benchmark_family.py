#!/usr/bin/env python3
"""Time the successors of DINO against it: criterion and matcher in training, encoder at inference.

    dev/benchmark_family.py [--rounds 20] [--objects 7 7] [--height 480 --width 640]

CPU time of one thread, all cases in turns, so that load on the machine affects them alike; "ratio" is the median over
rounds of the ratio to the first case. Inputs and weights are random. Prints Markdown tables.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from detectron2.config import CfgNode

from dino_d2.config import load_config
from dino_d2.modeling import build
from dino_d2.structures import Predictions, Targets

BASE = "dino_r50_4scale_12ep_tuned"
LOSS, COPIES = "MODEL.DINO.LOSS.CLASS", "MODEL.DINO.MATCHER.COPIES"
CASES: dict[str, tuple[str, list[str]]] = {  # name: recipe, config overrides
    "DINO, focal loss": (BASE, []),
    "iou_aware": (BASE, [LOSS, "iou_aware"]),
    "position_supervised": (BASE, [LOSS, "position_supervised"]),
    "matchability": (BASE, [LOSS, "matchability"]),
    "COPIES 2": (BASE, [COPIES, "2"]),
    "POSITION_MODULATED": (BASE, ["MODEL.DINO.MATCHER.POSITION_MODULATED", "True"]),
    "align_dino": ("family/align_dino_r50_4scale_12ep", []),
    "stable_dino": ("family/stable_dino_r50_4scale_12ep", []),
    "dino_mal": ("family/dino_mal_r50_4scale_12ep", []),
}


def in_turns(calls: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of each call in each round, after a warm-up round."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            start = time.process_time()
            call()
            if number:
                seconds[name].append(time.process_time() - start)
    return seconds


def row(name: str, *measured: tuple[list[float], list[float]]) -> str:
    """Table row: median milliseconds and median ratio of each (seconds of this case, of the first case)."""
    cells = [name]
    for own, first in measured:
        ratio = statistics.median(a / b for a, b in zip(own, first, strict=True))
        cells += [f"{1000 * statistics.median(own):.1f}", f"{ratio:.2f}"]
    return f"| {' | '.join(cells)} |"


def training_step(cfg: CfgNode, objects: Sequence[int]) -> tuple[Callable[[], None], Callable[[], None]]:
    """The criterion with backward pass, and the matcher alone."""
    torch.manual_seed(0)
    c, batch = cfg.MODEL.DINO, len(objects)
    targets = [Targets(torch.randint(c.NUM_CLASSES, (n,)), torch.rand(n, 4) * 0.4 + 0.2) for n in objects]
    denoising = build.build_denoising(cfg)(targets)

    def predictions(queries: int) -> Predictions:
        logits, boxes = torch.randn(batch, queries, c.NUM_CLASSES) - 4, torch.rand(batch, queries, 4) * 0.4 + 0.2
        return Predictions(logits.requires_grad_(), boxes.requires_grad_())

    layers = [predictions(len(denoising) + c.NUM_QUERIES) for _ in range(c.DEC_LAYERS)]
    proposals, criterion = predictions(c.NUM_QUERIES), build.build_criterion(cfg)
    to_match = [proposals, *(layer.split(len(denoising))[1] for layer in layers)]

    def step() -> None:
        sum(criterion(layers, proposals, denoising, targets).values()).backward()

    return step, lambda: criterion.matcher(to_match, targets) and None


def encoder_pass(cfg: CfgNode, height: int, width: int) -> Callable[[], None]:
    torch.manual_seed(0)
    encoder = build.build_encoder(cfg).eval()
    strides = (8, 16, 32, 64)[: cfg.MODEL.DINO.NUM_FEATURE_LEVELS]
    features = [torch.randn(1, cfg.MODEL.DINO.HIDDEN_DIM, -(-height // s), -(-width // s)) for s in strides]

    @torch.no_grad()
    def call() -> None:
        encoder(features, None)

    return call


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--objects", type=int, nargs="+", default=[7, 7], help="of each image of the batch")
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--width", type=int, default=640)
    parser.add_argument("overrides", nargs="*", default=[], metavar="KEY VALUE")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    device = ["MODEL.DEVICE", "cpu", *args.overrides]
    configs = {name: load_config(recipe, [*device, *values]) for name, (recipe, values) in CASES.items()}

    steps = {name: training_step(cfg, args.objects) for name, cfg in configs.items()}
    whole = in_turns({name: step for name, (step, _) in steps.items()}, args.rounds)
    matching = in_turns({name: matcher for name, (_, matcher) in steps.items()}, args.rounds)
    first = next(iter(CASES))
    print("| case | criterion, forward and backward (ms) | ratio | of it the matcher (ms) | ratio |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for name in CASES:
        print(row(name, (whole[name], whole[first]), (matching[name], matching[first])))

    encoders = {name: encoder_pass(configs[name], args.height, args.width) for name in (first, "stable_dino")}
    passes = in_turns(encoders, max(1, args.rounds // 4))
    print(f"\n| encoder, one image of {args.height} x {args.width} | ms | ratio |\n| --- | ---: | ---: |")
    for name, seconds in passes.items():
        print(row(name, (seconds, passes[first])))


if __name__ == "__main__":
    main()
