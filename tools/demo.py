#!/usr/bin/env python3
"""Detect objects in your own images and draw them."""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from dino_d2_cli import CommandParser, user_errors

EXAMPLES = [
    "--weights dino_r50_4scale_12ep --input street.jpg --output found",
    "--weights output/pets --input PHOTO... FOLDER... --output found --tile 400",
    "--config-file CONFIG --weights MODEL.pth --input PHOTO --output found [KEY VALUE ...]",
]
DESCRIPTION = """\
Detects objects in images. For each image it writes a PNG with the boxes and a JSON file that lists them to DIR, under
the image's name (with its folders if two images have the same name)."""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser(EXAMPLES, DESCRIPTION)
    parser.add_argument("--weights", required=True, help="name in the zoo, checkpoint, or folder of a run")
    parser.add_argument("--config-file", metavar="CONFIG", help="for a checkpoint without config.yaml beside it")
    parser.add_argument("--input", required=True, nargs="+", metavar="PHOTO", help="images or folders")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR")
    parser.add_argument("--score-threshold", type=float, help="minimum score (default: the weights' own, else 0.3)")
    parser.add_argument("--classes", nargs="+", default=[], metavar="NAME", help="keep only these classes")
    parser.add_argument(
        "--tile", type=int, default=0, metavar="PIXELS", help="split images into tiles of at most this side"
    )
    parser.add_argument(
        "--augment", action="store_true", help="look at six copies of each image: more accurate, and six times as slow"
    )
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="config values to change")
    args = parser.parse_args(arguments)
    if args.tile < 0:
        parser.error(f"--tile {args.tile}: it must be at least 0")
    return args


def names_of_results(photos: Sequence[Path], folder: Path) -> dict[Path, Path]:
    """A different PNG path for each image: DIR/name.png, with folders and suffix if two images have that name.

    If names still collide, DIR gets the folder structure below the images' common folder.
    """
    photos = list(dict.fromkeys(photos))  # without duplicates
    counts = Counter(path.stem for path in photos)
    common = Path(os.path.commonpath([path.resolve().parent for path in photos]))
    places = [path.resolve().relative_to(common) for path in photos]
    pairs = zip(photos, places, strict=True)
    names = [path.stem if counts[path.stem] == 1 else "_".join(place.parts) for path, place in pairs]
    if len(set(names)) < len(set(places)):
        names = [str(place) for place in places]
    return {path: folder / f"{name}.png" for path, name in zip(photos, names, strict=True)}


def photos_of(inputs: Sequence[str]) -> list[Path]:
    """The given files, and the images in the given folders.

    Raises:
        FileNotFoundError: one does not exist, or a folder has no images.
    """
    from dino_d2.detector import pictures_in

    missing = [path for path in inputs if not Path(path).exists()]
    if missing:
        raise FileNotFoundError(f"--input not found: {', '.join(missing)}")
    files = [pictures_in(Path(path)) if Path(path).is_dir() else [path] for path in inputs]
    return [Path(path) for group in files for path in group]


def results_for(photos: Sequence[Path], output: Path) -> dict[Path, Path]:
    """`names_of_results`; results of an earlier run are replaced, files beside the photographs are not.

    Raises:
        ValueError: a result would overwrite a file in a folder of photographs.
    """
    pictures = names_of_results(photos, output)
    folders = {path.resolve().parent for path in pictures}
    results = [file.resolve() for picture in pictures.values() for file in (picture, picture.with_suffix(".json"))]
    overwritten = [file for file in results if file.parent in folders and file.exists()]
    if overwritten:
        raise ValueError(f"--output {output}: a result would overwrite {min(overwritten)}; choose another folder")
    return pictures


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    from dino_d2 import Detector
    from dino_d2.data import read_image
    from dino_d2.detections import check_classes

    with user_errors():
        pictures = results_for(photos_of(args.input), args.output)
        detector = Detector.from_pretrained(args.weights, args.config_file, overrides=args.opts)
        check_classes(args.classes, detector.labels)
        args.output.mkdir(parents=True, exist_ok=True)
    print(f"score threshold: {detector.explain_threshold() if args.score_threshold is None else args.score_threshold}")
    how = {"threshold": args.score_threshold, "classes": args.classes, "tile": args.tile, "augment": args.augment}
    unreadable = 0
    for path, picture in pictures.items():
        try:
            pixels = read_image(path, "RGB")
        except ValueError as error:
            print(error, file=sys.stderr)
            unreadable += 1
            continue
        found = detector(pixels, **how)
        found.save(picture)
        found.save(picture.with_suffix(".json"))
        print(f"{path}: {len(found)} objects -> {picture}")
    if unreadable:
        print(f"--input: {unreadable} of {len(pictures)} images could not be read", file=sys.stderr)
    return 1 if unreadable else 0


if __name__ == "__main__":
    sys.exit(main())
