#!/usr/bin/env python3
"""Where the time of one training step goes, on random pictures: a Markdown report.

tools/profile_step.py --config-file configs/dino_r50_4scale_12ep.yaml
tools/profile_step.py --config-file configs/dino_r50_4scale_12ep.yaml --device cuda --batch 2 SOLVER.AMP.ENABLED True
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch.profiler import ProfilerActivity, profile

from dino_d2.config import load_config
from dino_d2.engine import build_optimizer
from dino_d2.engine.step import StepSettings, StepTrainer


def make_batch(cfg: CfgNode, count: int, height: int, width: int, objects: int) -> list[dict]:
    torch.manual_seed(0)
    batch = []
    for _ in range(count):
        corners = torch.rand(objects, 2, 2).sort(dim=1).values * torch.tensor([width, height])
        instances = Instances((height, width))
        instances.gt_boxes = Boxes(corners.flatten(1))
        instances.gt_classes = torch.randint(cfg.MODEL.DINO.NUM_CLASSES, (objects,))
        image = torch.randint(256, (3, height, width), dtype=torch.uint8)
        batch.append({"image": image, "height": height, "width": width, "instances": instances})
    return batch


class SameBatch:
    """A loader that gives one batch again and again."""

    seed = 0

    def __init__(self, batch: list[dict]):
        self.batch = batch

    def __iter__(self) -> Iterator[list[dict]]:
        while True:
            yield self.batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True)
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    parser.add_argument("--batch", type=int, default=1, help="pictures (default 1)")
    parser.add_argument("--size", type=int, nargs=2, default=(800, 1333), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--objects", type=int, default=8, help="in each picture (default 8)")
    parser.add_argument("--steps", type=int, default=5, help="timed, after two that are not (default 5)")
    parser.add_argument("opts", nargs="*", help="KEY VALUE … of the config")
    args = parser.parse_args()

    cfg = load_config(args.config_file, ["MODEL.DEVICE", args.device, "MODEL.WEIGHTS", "", *args.opts])
    on_accelerator = cfg.MODEL.DEVICE != "cpu"
    model = build_model(cfg)
    batch = make_batch(cfg, args.batch, *args.size, args.objects)
    trainer = StepTrainer(model, SameBatch(batch), build_optimizer(cfg, model), StepSettings.of_config(cfg))

    def step() -> float:
        start = time.perf_counter()
        trainer.run_step()
        if on_accelerator:
            torch.accelerator.synchronize()
        return time.perf_counter() - start

    with EventStorage():
        report(args, step, on_accelerator)


def report(args: argparse.Namespace, step: Callable[[], float], on_accelerator: bool) -> None:
    for _ in range(2):
        step()
    seconds = statistics.median(step() for _ in range(args.steps))
    if on_accelerator:
        memory = torch.cuda.max_memory_allocated()
    else:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # of the whole process
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_accelerator else [])
    with profile(activities=activities) as profiled:
        step()
    height, width = args.size
    device = "accelerator" if on_accelerator else "cpu"
    print(f"{args.batch} x {height} x {width}, {args.objects} objects each, {device}: {seconds * 1e3:.0f} ms a step")
    print(f"\npeak memory {memory / 2**30:.2f} GiB")
    order = "self_device_time_total" if on_accelerator else "self_cpu_time_total"
    print(f"\n```\n{profiled.key_averages().table(sort_by=order, row_limit=30, max_name_column_width=60)}\n```")


if __name__ == "__main__":
    main()
