#!/usr/bin/env python3
"""`make demo`: train DINO on an aerial photograph, evaluate it on two others, predict, draw.

Writes to output/demo/: data/, train/ (detectron2's logs and the reports), metrics.json, photograph.png,
second_site.png, curves.png. A second run with the same data and config resumes from there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import matplotlib
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.structures import Instances
from PIL import Image, ImageDraw

from demo_data import (
    FEWEST_TREES,
    TEST_TILE,
    TRAIN_OVERLAP,
    TRAIN_TILE,
    Photo,
    fetch,
    read_photo,
    test_tiles,
    training_tiles,
    write_backbone,
    write_coco,
)
from dino_d2 import Detector
from dino_d2.config import load_config, overlay
from dino_d2.evaluation import APSettings, COCOEvaluator

matplotlib.use("Agg")
import matplotlib.pyplot as plt

CONFIG = "configs/demo/dino_mobilenetv2_trees.yaml"
# Those of `dino-d2 train --data`, but without a look at the test photograph; --minutes chooses the precision.
SETTINGS = [
    *(str(part) for item in overlay("few_photos") if not item[0].startswith("SOLVER.AMP.") for part in item),
    *("SOLVER.BEST_METRIC", "", "TEST.QUERY_METRICS", "True"),
    *("TEST.EVAL_PERIOD", "600", "SOLVER.CHECKPOINT_PERIOD", "300"),
]
MINUTES = 9  # of training; evaluations come on top
OUTPUT = Path("output/demo")
DATA = OUTPUT / "data"
FOUND, TRUTH = (255, 210, 0), (0, 200, 255)


def prepare() -> None:
    """Make photographs, tiles, annotation files and backbone weights, unless they are up to date."""
    settings = f"tiles of {TRAIN_TILE} ({TRAIN_OVERLAP} shared, {FEWEST_TREES} trees) and {TEST_TILE} pixels"
    made_from = DATA / "made_from.txt"  # written last
    if made_from.exists() and made_from.read_text() == settings:
        return
    print("[demo] preparing the photographs", flush=True)
    DATA.mkdir(parents=True, exist_ok=True)
    fetch(DATA)
    for which in ("train", "test", "second_site"):
        photo = read_photo(DATA, which)
        tiles = training_tiles(photo) if which == "train" else test_tiles(photo)
        shutil.rmtree(DATA / which, ignore_errors=True)
        write_coco(tiles, DATA / f"{which}.json", DATA / which)
    write_backbone(DATA, DATA / "mobilenetv2.pth")
    made_from.write_text(settings)


def train(seed: int, folder: Path) -> None:
    """Train into `folder`, or resume an interrupted run; a finished run is kept."""
    made_from = folder / "made_from.txt"
    settings = [*SETTINGS, "SEED", str(seed)]
    digest = hashlib.sha256(load_config(CONFIG, settings).dump().encode()).hexdigest()
    same = made_from.exists() and made_from.read_text() == digest
    if same and (folder / "model_final.pth").exists():
        print(f"[demo] {folder} is already trained; delete it to train again", flush=True)
        return
    if not same:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        made_from.write_text(digest)
    resume = ["--resume"] if (folder / "last_checkpoint").exists() else []
    print("[demo] training; the lines below end with the time left (eta)", flush=True)
    command = ["tools/train_net.py", "--config-file", CONFIG, "--minutes", str(MINUTES), *resume, *settings]
    subprocess.run([sys.executable, *command, "OUTPUT_DIR", str(folder)], check=True)


def evaluate(photo: Photo, found: Instances, name: str, settings: APSettings) -> dict[str, float | None]:
    """COCO metrics in percent for the detections in a whole photograph; None if it has no trees of that size."""
    with tempfile.TemporaryDirectory() as folder:
        json_file = Path(folder, "photo.json")
        write_coco([photo], json_file, Path(folder))
        register_coco_instances(name, {}, str(json_file), folder)
        DatasetCatalog.get(name)  # loading sets the category ids
        evaluator = COCOEvaluator(name, settings)
        evaluator.reset()
        evaluator.process([{"image_id": 1}], [{"instances": found}])
        metrics = evaluator.evaluate()["bbox"]
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    return {key: None if math.isnan(value) else round(value, 2) for key, value in metrics.items()}


def draw(photo: Photo, found: Instances, threshold: float, path: Path) -> None:
    """Draw detections above the threshold and annotations in different colours."""
    picture = Image.fromarray(photo.pixels)
    pen = ImageDraw.Draw(picture)
    drawn = found[found.scores > threshold].pred_boxes.tensor.tolist()
    for boxes, colour, width in ((photo.boxes.tolist(), TRUTH, 1), (drawn, FOUND, 2)):
        for box in boxes:
            pen.rectangle(box, outline=colour, width=width)
    pen.rectangle((0, 0, 330, 18), fill=(0, 0, 0))
    pen.text((6, 4), f"{len(photo.boxes)} drawn by hand", fill=TRUTH)
    pen.text((130, 4), f"{len(drawn)} found with score > {threshold:.2f}", fill=FOUND)
    picture.save(path)


def plot_curves(folder: Path, path: Path) -> None:
    """Loss and AP over the iterations, from detectron2's metrics.json."""
    lines = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    losses = [(x["iteration"], x["total_loss"]) for x in lines if "total_loss" in x]
    left.plot(*zip(*losses, strict=True))
    left.set(title="training loss", xlabel="iteration", yscale="log")
    for key, label in (("trees_test/bbox/AP50", "test photograph"), ("trees_second_site/bbox/AP50", "second site")):
        points = [(x["iteration"], x[key]) for x in lines if key in x]
        right.plot(*zip(*points, strict=True), marker="o", label=label)
    right.set(title="AP50 on tiles, in percent", xlabel="iteration", ylim=(0, None))
    right.legend()
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1, help="of weights, denoising and augmentation (default 1)")
    parser.add_argument("--output", type=Path, default=OUTPUT, help=f"folder for results (default {OUTPUT})")
    args = parser.parse_args()
    os.chdir(Path(__file__).resolve().parent.parent)

    start = time.time()
    prepare()
    folder = args.output / "train"
    train(args.seed, folder)
    detector = Detector.from_pretrained(folder)  # with the config that it was trained with
    settings = APSettings.of_config(detector.cfg)
    results = {}
    for which, picture in (("test", "photograph.png"), ("second_site", "second_site.png")):
        photo = read_photo(DATA, which)
        found = detector(photo.pixels, threshold=0, tile=TEST_TILE, augment=True).to_instances()
        results[which] = evaluate(photo, found, f"demo_{which}", settings)
        draw(photo, found, detector.threshold, args.output / picture)
    metrics = {**results["test"], "second_site": results["second_site"], "seed": args.seed}
    metrics["seconds"] = round(time.time() - start)
    (args.output / "metrics.json").write_text(json.dumps(metrics, indent=2))
    plot_curves(folder, args.output / "curves.png")

    print(f"[demo] done in {metrics['seconds']} s; AP50 on the test photograph: {metrics['AP50']:.1f}, "
          f"on the second site: {metrics['second_site']['AP50']:.1f}")  # fmt: skip
    print(f"[demo] look at {args.output}/photograph.png, second_site.png and curves.png; metrics.json has the numbers")
    print(f"[demo] what goes wrong: open {folder}/report/trees_test/index.html in a browser")
    print("[demo] to try it on your own photograph:")
    print(
        f"    .venv/bin/dino-d2 predict --weights {folder} --tile {TEST_TILE} --augment --input PHOTO "
        f"--output {args.output}/own"
    )


if __name__ == "__main__":
    main()
