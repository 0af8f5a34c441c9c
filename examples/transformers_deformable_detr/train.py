"""Train Transformers' Deformable DETR with and without ideas of DINO, in the same number of steps, and print their AP.

python -m examples.transformers_deformable_detr.train --train JSON IMAGES --test JSON IMAGES
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import timm
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import DeformableDetrConfig, DeformableDetrImageProcessor, TimmBackboneConfig

from .data import CocoImages, collate, training_batches
from .model import IDEAS, DeformableDetrWithIdeas, TwoStageDeformableDetr

LEARNING_RATE, BACKBONE_FACTOR, WEIGHT_DECAY, GRADIENT_NORM = 2e-4, 0.1, 1e-4, 0.1
DROP_AT = 0.8  # of the steps, the learning rate is divided by 10


@dataclass
class Run:
    """One training. `ideas` is empty for Transformers' model; AP in percent; one loss per step."""

    ideas: tuple[str, ...]
    seed: int
    ap: float
    ap50: float
    seconds_per_step: float
    losses: list[float]


def configuration(backbone: str, num_labels: int) -> DeformableDetrConfig:
    """A small two-stage Deformable DETR with a backbone of timm, whose batch norms are frozen."""
    return DeformableDetrConfig(
        backbone_config=TimmBackboneConfig(backbone=backbone, out_indices=[2, 3, 4], freeze_batch_norm_2d=True),
        num_labels=num_labels,
        num_feature_levels=4,
        d_model=128,
        encoder_layers=2,
        decoder_layers=3,
        encoder_ffn_dim=512,
        decoder_ffn_dim=512,
        encoder_attention_heads=8,
        decoder_attention_heads=8,
        dropout=0.0,
        two_stage=True,
        with_box_refine=True,
        two_stage_num_proposals=100,
        auxiliary_loss=True,
    )


def load_backbone(backbone: nn.Module, name: str, file: Path | None) -> None:
    """Load weights under timm's names: those that timm downloads, or those of a file (.safetensors or PyTorch's).

    Raises:
        ValueError: the file lacks weights of this backbone.
    """
    if file is None:
        state = timm.create_model(name, pretrained=True).state_dict()
    elif file.suffix == ".safetensors":
        state = load_file(file)
    else:
        state = torch.load(file, map_location="cpu", weights_only=True)
        state = {key.removeprefix("backbone.body."): value for key, value in state.get("model", state).items()}
    for key, own in backbone.state_dict().items():
        if key not in state or state[key].shape != own.shape:
            raise ValueError(
                f"{file} has no {key} of {tuple(own.shape)}, so it is not of timm's {name}: see --backbone"
            )
    backbone.load_state_dict(state, strict=False)  # without the classifier


def build(ideas: Sequence[str], args: argparse.Namespace, num_labels: int, seed: int) -> TwoStageDeformableDetr:
    """What models share starts with the same weights for the same seed."""
    torch.manual_seed(seed)
    config = configuration(args.backbone, num_labels)
    model = DeformableDetrWithIdeas(config, ideas) if ideas else TwoStageDeformableDetr(config)
    load_backbone(model.model.backbone.model, args.backbone, args.backbone_weights)
    return model.to(args.device)


def to_device(batch: dict, device: str) -> dict:
    labels = [{name: value.to(device) for name, value in label.items()} for label in batch["labels"]]
    return {name: batch[name].to(device) for name in ("pixel_values", "pixel_mask")} | {"labels": labels}


def train(model: TwoStageDeformableDetr, images: CocoImages, args: argparse.Namespace, seed: int) -> list[float]:
    """The loss of every step."""
    backbone = list(model.model.backbone.parameters())
    others = [parameter for name, parameter in model.named_parameters() if not name.startswith("model.backbone.")]
    optimizer = torch.optim.AdamW(
        [{"params": others}, {"params": backbone, "lr": LEARNING_RATE * BACKBONE_FACTOR}],
        LEARNING_RATE,
        weight_decay=WEIGHT_DECAY,
    )
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [int(DROP_AT * args.steps)])
    losses = []
    model.train()
    for step, batch in enumerate(training_batches(images, args.steps, args.batch_size, seed), start=1):
        outputs = model(**to_device(batch, args.device))
        optimizer.zero_grad()
        outputs.loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_NORM)
        optimizer.step()
        schedule.step()
        losses.append(outputs.loss.item())
        if step % max(1, args.steps // 10) == 0:
            print(f"    step {step}: loss {losses[-1]:.2f}", flush=True)
    return losses


@torch.inference_mode()
def detect(model: TwoStageDeformableDetr, images: CocoImages, args: argparse.Namespace) -> list[dict]:
    """In COCO's format, with the index of the class as `category_id`."""
    processor = DeformableDetrImageProcessor()
    found = []
    model.eval()
    for image_id in images.image_ids:
        batch = to_device(collate([images.load(image_id)]), args.device)
        outputs = model(batch["pixel_values"], batch["pixel_mask"])
        size = images.coco.imgs[image_id]
        (result,) = processor.post_process_object_detection(outputs, 0.0, [(size["height"], size["width"])])
        values = (result[name].tolist() for name in ("scores", "labels", "boxes"))
        for score, label, (x1, y1, x2, y2) in zip(*values, strict=True):
            box = [x1, y1, x2 - x1, y2 - y1]
            found.append({"image_id": image_id, "category_id": label, "bbox": box, "score": score})
    return found


def run(ideas: tuple[str, ...], seed: int, args: argparse.Namespace) -> Run:
    """Train and evaluate one model."""
    training = CocoImages(*map(Path, args.train), args.size)
    test = CocoImages(*map(Path, args.test), args.size)
    model = build(ideas, args, len(training.categories), seed)
    start = time.perf_counter()
    losses = train(model, training, args, seed)
    seconds = (time.perf_counter() - start) / args.steps
    return Run(ideas, seed, *test.evaluate(detect(model, test, args)), seconds, losses)


def title(ideas: tuple[str, ...]) -> str:
    return "with " + ", ".join(ideas) if ideas else "without"


def ideas_from(text: str) -> tuple[str, ...]:
    """`none`, or some of `IDEAS` with commas between.

    Raises:
        ValueError: there is no such idea.
    """
    ideas = () if text == "none" else tuple(text.split(","))
    if not set(ideas) <= set(IDEAS):
        raise ValueError(text)
    return ideas


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    files = {"nargs": 2, "required": True, "metavar": ("JSON", "IMAGES")}
    parser.add_argument("--train", help="COCO annotation file and image folder to train on", **files)
    parser.add_argument("--test", help="and to compute AP on", **files)
    meaning = "of each model: none, or some of cdn,mixed,twice (default: none cdn,mixed,twice)"
    parser.add_argument("--ideas", nargs="+", type=ideas_from, default=[(), IDEAS], metavar="IDEAS", help=meaning)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--size", type=int, default=320, help="longer side of the images, in pixels")
    parser.add_argument("--backbone", default="resnet18", help="a model of timm (default: resnet18)")
    parser.add_argument("--backbone-weights", type=Path, metavar="FILE", help="default: timm downloads them")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> list[Run]:
    args = parse(arguments)
    runs = []
    for seed in args.seeds:
        for ideas in args.ideas:
            print(f"seed {seed}, {title(ideas)}", flush=True)
            runs.append(run(ideas, seed, args))
            print(f"    AP {runs[-1].ap:.1f}, AP50 {runs[-1].ap50:.1f}", flush=True)
    print(f"\nAfter {args.steps} steps:")
    for ideas in args.ideas:
        own = [each for each in runs if each.ideas == ideas]
        for name in ("ap", "ap50", "seconds_per_step"):
            values = [getattr(each, name) for each in own]
            each_seed = ", ".join(f"{value:.2f}" for value in values)
            print(f"{title(ideas):<24} {name:<16} {mean(values):6.2f}   seeds: {each_seed}")
    return runs


if __name__ == "__main__":
    main()
