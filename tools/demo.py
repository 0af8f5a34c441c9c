#!/usr/bin/env python3
"""Find objects in your own photographs and draw them.

    tools/demo.py --config-file CONFIG --weights MODEL.pth --input PHOTO... --output DIR [KEY VALUE ...]

For each photograph DIR gets a PNG with the boxes and a JSON file that lists them, of the same name (where two have one,
of their folders' names too). Large photographs with small objects: --tile 400 looks at them piece by piece.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.engine import DefaultPredictor
from detectron2.structures import Instances
from detectron2.utils.visualizer import Visualizer
from PIL import Image

from dino_d2 import load_config
from dino_d2.checkpoint import DINOCheckpointer
from dino_d2.data import build_test_augmentation, class_names, read_image
from dino_d2.tiles import predict_in_tiles

OVERLAP = 0.25  # of neighbouring tiles


def detect(predictor: DefaultPredictor, image: np.ndarray, tile: int) -> Instances:
    """Everything found in a BGR picture (H, W, 3); `tile`: longest side looked at at once, 0: all of it."""
    size = tile or max(image.shape[:2])
    return predict_in_tiles(
        lambda part: predictor(part)["instances"].to("cpu"), image, size, int(size * OVERLAP) if tile else 0
    )


def draw(image: np.ndarray, instances: Instances, names: list[str]) -> np.ndarray:
    """The BGR picture with boxes, class names and scores, as RGB."""
    metadata = MetadataCatalog.get("_demo").set(thing_classes=names) if names else None
    visualizer = Visualizer(image[:, :, ::-1], metadata)
    return visualizer.draw_instance_predictions(instances).get_image()


def as_json(instances: Instances, names: list[str]) -> list[dict]:
    return [
        {
            "class": names[label] if names else label,
            "score": round(score, 4),
            "box_xyxy": [round(side, 1) for side in box],
        }
        for label, score, box in zip(
            instances.pred_classes.tolist(),
            instances.scores.tolist(),
            instances.pred_boxes.tensor.tolist(),
            strict=True,
        )
    ]


def names_of_results(photos: Sequence[Path], folder: Path) -> dict[Path, Path]:
    """A PNG of its own for each photograph: DIR/name.png; where two have that name, with their folders and suffixes.

    Where that is still one name for two, all of them lie in DIR as the photographs do in the folder they share.
    """
    photos = list(dict.fromkeys(photos))  # given twice, it is one
    counts = Counter(path.stem for path in photos)
    common = Path(os.path.commonpath([path.resolve().parent for path in photos]))
    places = [path.resolve().relative_to(common) for path in photos]
    pairs = zip(photos, places, strict=True)
    names = [path.stem if counts[path.stem] == 1 else "_".join(place.parts) for path, place in pairs]
    if len(set(names)) < len(set(places)):
        names = [str(place) for place in places]
    return {path: folder / f"{name}.png" for path, name in zip(photos, names, strict=True)}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True)
    parser.add_argument("--weights", required=True, help="checkpoint made by training, or a converted one")
    parser.add_argument("--input", required=True, nargs="+", metavar="PHOTO")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR")
    parser.add_argument("--score-threshold", type=float, default=0.3, help="draw and list what is surer (default 0.3)")
    parser.add_argument("--tile", type=int, default=0, metavar="PIXELS", help="look at pieces of at most this side")
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="config values to change")
    return parser.parse_args()


def setup(args: argparse.Namespace) -> CfgNode:
    if not Path(args.weights).is_file():
        sys.exit(f"--weights {args.weights}: there is no such file")
    return load_config(args.config_file, [*args.opts, "MODEL.WEIGHTS", ""])  # not by detectron2's checkpointer


def main() -> None:
    args = parse()
    missing = [path for path in args.input if not Path(path).is_file()]
    if missing:
        sys.exit(f"--input: no such file: {', '.join(missing)}")
    cfg = setup(args)
    names = class_names(cfg)
    predictor = DefaultPredictor(cfg)
    checkpointer = DINOCheckpointer(predictor.model, trust_files=cfg.MODEL.TRUST_WEIGHTS, for_evaluation=True)
    checkpointer.load(args.weights)
    predictor.aug = build_test_augmentation(cfg)  # detectron2's own fails on very long pictures
    args.output.mkdir(parents=True, exist_ok=True)
    unreadable = 0
    pictures = names_of_results([Path(path) for path in args.input], args.output)
    overwritten = {path.resolve() for path in pictures} & {picture.resolve() for picture in pictures.values()}
    if overwritten:
        sys.exit(f"--output {args.output}: a result would take the place of {min(overwritten)}; name another folder")
    for path, picture in pictures.items():
        try:
            image = read_image(path, "BGR")
        except ValueError as error:
            print(error, file=sys.stderr)
            unreadable += 1
            continue
        instances = detect(predictor, image, args.tile)
        instances = instances[instances.scores > args.score_threshold]
        picture.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw(image, instances, names)).save(picture)
        picture.with_suffix(".json").write_text(json.dumps(as_json(instances, names), indent=1))
        print(f"{path}: {len(instances)} objects -> {picture}")
    if unreadable:
        sys.exit(f"--input: {unreadable} of {len(args.input)} photographs could not be read")


if __name__ == "__main__":
    main()
