#!/usr/bin/env python3
"""Published DINO weights to this project's, and back.

    tools/convert_checkpoint.py --source auto IN.pth OUT.pth --config-file configs/dino_r50_4scale_12ep.yaml
    tools/convert_checkpoint.py --to official IN.pth OUT.pth --config-file CONFIG [KEY VALUE ...]
    tools/convert_checkpoint.py --source ema output/model_0004999.pth OUT.pth --config-file output/config.yaml

The config says what the weights are used with; a name left over, missing or of another shape stops the conversion.
detrex's weights need MODEL.DINO.SHARE_HEADS False MODEL.DINO.POS_TEMPERATURE 10000.0 MODEL.DINO.POS_OFFSET -0.5,
MMDetection's need MODEL.DINO.SHARE_HEADS False, and its "improved" R-50 the other two as well. ImageNet weights of a
backbone alone (torchvision's ResNets, the Swin release, timm's Swin, MAE's ViTs) become weights to start training from.
`ema` takes the moving average of the weights out of a checkpoint of your own training.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch
from detectron2.modeling import build_model
from detectron2.utils.file_io import PathManager

from dino_d2 import load_config
from dino_d2.checkpoint import from_backbone, from_published, read_published, to_published
from dino_d2.checkpoint.backbone import is_backbone
from dino_d2.checkpoint.convert import ConversionError, detect_source, summarize
from dino_d2.checkpoint.files import average_of, write_checkpoint
from dino_d2.checkpoint.names import SOURCES


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    way = parser.add_mutually_exclusive_group(required=True)
    way.add_argument("--source", choices=[*SOURCES, "backbone", "ema", "auto"], help="whose weights IN holds")
    way.add_argument("--to", choices=["official"], help="write OUT in the published program's names")
    parser.add_argument("input", metavar="IN")
    parser.add_argument("output", metavar="OUT")
    parser.add_argument("--config-file", required=True, metavar="CFG")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="config values to change")
    return parser.parse_intermixed_args(arguments)


def write(state: dict[str, torch.Tensor], path: str) -> None:
    folder, name = os.path.split(path)
    PathManager.mkdirs(folder or ".")
    write_checkpoint({"model": state}, folder, name)
    print(f"{path}: {len(state)} tensors")


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    if not Path(args.input).is_file():
        sys.exit(f"{args.input}: there is no such file")
    cfg = load_config(args.config_file, [*args.opts, "MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", ""])
    model = build_model(cfg)
    try:
        if args.source == "ema":
            write(average_of(args.input), args.output)
            return
        published = read_published(args.input)
        state = published.state
        if args.to:
            conversion = to_published(state, args.to, model)
        elif args.source == "backbone" or (args.source == "auto" and is_backbone(state)):
            conversion = from_backbone(state, model)
        else:
            source = detect_source(state) if args.source == "auto" else args.source
            conversion = from_published(state, source, model, published.config)
    except (ConversionError, ValueError) as error:
        sys.exit(f"{args.input}: {error}")
    write(conversion.state, args.output)
    if conversion.notes:
        print(summarize(conversion.notes))


if __name__ == "__main__":
    main()
