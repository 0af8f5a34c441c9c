"""Find errors and oddities in a dataset in COCO format before training does."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from tabulate import tabulate

from dino_d2.modeling.denoising import PlainDenoising

from .annotations import can_be_evaluated, is_box
from .coco import has_no_valid_polygon
from .datasets import CocoFiles, read_coco
from .images import read_reduced

EXAMPLES = 3  # per finding
WIDTHS = [None, None, 34, 38, 40]  # of the table's columns, in characters
SMALLEST_SIDE, LARGEST_SIDE, LARGEST_ASPECT = 32, 10_000, 8  # images beyond these are reported
MARGIN = 1.0  # pixels by which a box may exceed its image, because of rounding
SMALLEST_OBJECT = 8  # pixels at the model's input: half a token of stride 16
FEW = 0.1  # of all objects may be smaller
MANY_OBJECTS = 500  # in one image: then denoising queries outnumber all others and should be limited

Entry = dict[str, Any]  # an image, annotation or category of the file


class Severity(Enum):
    ERROR = "error"  # training would stop, or learn something wrong
    WARNING = "warning"  # training runs, but perhaps not as intended
    INFO = "info"


@dataclass(frozen=True)
class Kind:
    """A kind of finding: what was found, and its consequence or remedy."""

    severity: Severity
    what: str
    advice: str


@dataclass(frozen=True)
class Finding:
    """A kind of finding with its number of occurrences and a few examples (names or ids)."""

    kind: Kind
    count: int
    examples: tuple[str, ...]


def _error(what: str, advice: str) -> Kind:
    return Kind(Severity.ERROR, what, advice)


def _warning(what: str, advice: str) -> Kind:
    return Kind(Severity.WARNING, what, advice)


def _info(what: str, advice: str) -> Kind:
    return Kind(Severity.INFO, what, advice)


MISSING_IMAGE = _error("missing images", "file_name is relative to the image folder")
UNREADABLE_IMAGE = _error("unreadable images", "replace them, or remove their entries")
OTHER_SIZE = _error(
    "images whose size differs from the annotation",
    "the boxes were drawn on another version of the image, or before EXIF rotation",
)
BROKEN_IMAGE_ENTRY = _error(
    "malformed image entries", "each needs id, file_name, width and height; the last two are positive integers"
)
REPEATED_IMAGE_ID = _error("duplicate image ids", "give each image a different id")
MIXED_IDS = _error("image ids that are numbers and others that are strings", "images are sorted by id: use one kind")
TINY_IMAGE = _warning(
    f"images with a side below {SMALLEST_SIDE} pixels", "little of them remains in the coarser feature maps"
)
EXTREME_IMAGE = _warning(
    f"images longer than {LARGEST_SIDE} pixels or {LARGEST_ASPECT} times their shorter side",
    "resized to the model's input, their objects nearly vanish: cut them into tiles",
)

BROKEN_ANNOTATION = _error("annotations without id or image_id", "each needs both: integers or strings, not 1.0")
REPEATED_ANNOTATION_ID = _error("duplicate annotation ids", "give each annotation a different id")
UNKNOWN_CATEGORY = _error("annotations of an unknown category", 'add it to "categories", or remove them')
NO_BOX = _error("boxes that are not four numbers", "a bbox is [x, y, width, height] in pixels, without NaN or infinity")
NEGATIVE_BOX = _error("boxes of negative width or height", "a bbox is [x, y, width, height], not two corners")
IGNORED = _error('annotations marked "ignore"', 'detectron2 rejects them: mark them "iscrowd", or remove them')
UNKNOWN_IMAGE = _warning(
    "annotations of an unknown image", "ignored; are ids strings in one place and numbers in the other?"
)
NO_POLYGON = _warning(
    "objects without a valid polygon", 'ignored, including their boxes: remove "segmentation", or give it three points'
)
INCOMPLETE = _info(
    "annotations without a number as area or iscrowd", "evaluation takes the area of the box, and no crowd, instead"
)
CROWD = _info("crowds (iscrowd)", "not trained on; evaluation ignores detections in them")

ZERO_AREA = _warning("boxes of zero area", "ignored")
OUTSIDE = _warning("boxes outside their image", "ignored")
PARTLY_OUTSIDE = _warning("boxes partly outside their image", "clipped to the image")
DUPLICATE = _warning(
    "duplicate boxes (same image, class, box)", "the model learns to detect the object twice: keep one of them"
)

NO_OBJECTS = _error("no usable box in the whole file", "there is nothing to learn")
EMPTY_IMAGE = _info("images without boxes", "used for training as background images")
EMPTY_CATEGORY = _warning("categories without boxes", "the model cannot learn them")
REPEATED_NAME = _warning("duplicate category names", "the model treats them as different classes")
ID_GAP = _info("gaps in the category ids", "harmless: classes are numbered from 0 in order of their ids")
MANY_QUERIES = _warning(
    f"images with more than {MANY_OBJECTS} objects",
    "each object makes at least two denoising queries: set MODEL.DINO.DN.MAX_QUERIES, say to 400",
)


class _Cases(defaultdict[Kind, list[str]]):
    """The occurrences found so far, by kind."""

    def __init__(self) -> None:
        super().__init__(list)

    def findings(self) -> list[Finding]:
        order = list(Severity)
        found = [Finding(kind, len(cases), tuple(cases[:EXAMPLES])) for kind, cases in self.items()]
        return sorted(found, key=lambda finding: order.index(finding.kind.severity))


def as_table(findings: Sequence[Finding]) -> str:
    """The findings as a table for a terminal of 150 columns."""
    rows = []
    for finding in findings:
        examples = "\n".join(finding.examples) + ("\n…" if finding.count > len(finding.examples) else "")
        kind = finding.kind
        rows.append([kind.severity.value, finding.count, kind.what, examples, kind.advice])
    headers = ["", "count", "what", "examples", "consequence or remedy"]
    return tabulate(rows, headers, tablefmt="simple_grid", maxcolwidths=WIDTHS, disable_numparse=True)


def report(
    parts: Sequence[CocoFiles], denoising: PlainDenoising | None, input_size: tuple[int, int]
) -> list[CocoFiles]:
    """Print what :func:`inspect_dataset` finds in each of the datasets; returns those that cannot be trained on."""
    faulty = []
    for files in parts:
        print(f"{files.annotations}: reading the images …", flush=True)
        findings = inspect_dataset(files, denoising, input_size)
        print(as_table(findings) if findings else "nothing to report")
        if not training_can_start(findings):
            faulty.append(files)
    return faulty


def inspect_dataset(files: CocoFiles, denoising: PlainDenoising | None, input_size: tuple[int, int]) -> list[Finding]:
    """Check a dataset for everything above. Returns the findings, errors first.

    Reads every image to its end.

    Args:
        files: the dataset.
        denoising: the model's, to compare its limits with the objects per image; None if denoising is off.
        input_size: `INPUT.MIN_SIZE_TEST` and `INPUT.MAX_SIZE_TEST`, to compare the objects' sizes with.

    Raises:
        FileNotFoundError, ValueError: the annotation file cannot be read (see :func:`read_coco`).
    """
    content = read_coco(files.annotations)
    categories = {entry["id"]: entry["name"] for entry in content["categories"]}
    cases = _Cases()
    images = _valid_images(content["images"], cases)
    _check_files(files.images, list(images.values()), cases)
    objects = _valid_objects(content["annotations"], images, categories, cases)
    _check_boxes(objects, images, cases)
    _check_categories(objects, categories, cases)
    _check_objects_per_image(objects, images, denoising, cases)
    _check_sizes(objects, images, input_size, cases)
    return cases.findings()


def training_can_start(findings: Iterable[Finding]) -> bool:
    """Whether none of the findings is an error."""
    return all(finding.kind.severity is not Severity.ERROR for finding in findings)


def _valid_images(entries: list[Entry], cases: _Cases) -> dict[Hashable, Entry]:
    """The valid images by id."""
    valid: dict[Hashable, Entry] = {}
    for number, entry in enumerate(entries):
        name, width, height = entry.get("file_name"), entry.get("width"), entry.get("height")
        if not (_is_id(entry.get("id")) and isinstance(name, str) and _is_length(width) and _is_length(height)):
            cases[BROKEN_IMAGE_ENTRY].append(name if isinstance(name, str) else f"entry {number}")
            continue
        if entry["id"] in valid:
            cases[REPEATED_IMAGE_ID].append(f"id {entry['id']}")
            continue
        valid[entry["id"]] = entry
        if min(width, height) < SMALLEST_SIDE:
            cases[TINY_IMAGE].append(f"{name}: {width} x {height}")
        if max(width, height) > min(LARGEST_SIDE, LARGEST_ASPECT * min(width, height)):
            cases[EXTREME_IMAGE].append(f"{name}: {width} x {height}")
    if len({isinstance(number, str) for number in valid}) > 1:
        cases[MIXED_IDS].append(next(f"id {number!r}" for number in valid if isinstance(number, str)))
    return valid


def _check_files(folder: Path, images: list[Entry], cases: _Cases) -> None:
    def check(entry: Entry) -> tuple[Kind, str] | None:
        name = entry["file_name"]
        if not (folder / name).is_file():
            return MISSING_IMAGE, name
        try:
            _, (height, width) = read_reduced(folder / name, "RGB", 1)  # the whole file, but few pixels of it
        except ValueError as error:
            return UNREADABLE_IMAGE, f"{name}: {error}"
        if (width, height) != (entry["width"], entry["height"]):
            return OTHER_SIZE, f"{name}: {width} x {height} but annotated as {entry['width']} x {entry['height']}"
        return None

    with ThreadPoolExecutor() as pool:
        for case in filter(None, pool.map(check, images)):
            kind, example = case
            cases[kind].append(example)


def _valid_objects(
    entries: list[Entry], images: dict[Hashable, Entry], categories: dict[int, str], cases: _Cases
) -> list[Entry]:
    """The annotations used for training."""
    valid = []
    seen: set[Hashable] = set()
    for number, entry in enumerate(entries):
        if not (_is_id(entry.get("id")) and _is_id(entry.get("image_id"))):
            cases[BROKEN_ANNOTATION].append(f"entry {number}")
            continue
        name, category, box = f"id {entry['id']}", entry.get("category_id"), entry.get("bbox")
        if entry["id"] in seen:
            cases[REPEATED_ANNOTATION_ID].append(name)
        seen.add(entry["id"])
        if entry["image_id"] not in images:
            cases[UNKNOWN_IMAGE].append(f"{name}: image {entry['image_id']}")
        elif not (_is_id(category) and category in categories):
            cases[UNKNOWN_CATEGORY].append(f"{name}: category {category}")
        elif not is_box(box):
            cases[NO_BOX].append(f"{name}: {box}")
        elif box[2] < 0 or box[3] < 0:
            cases[NEGATIVE_BOX].append(f"{name}: {box}")
        elif entry.get("ignore"):
            cases[IGNORED].append(name)
        elif has_no_valid_polygon(entry.get("segmentation")):
            cases[NO_POLYGON].append(name)
        else:
            if not can_be_evaluated(entry):
                cases[INCOMPLETE].append(name)
            if entry.get("iscrowd"):
                cases[CROWD].append(f"{name} in {images[entry['image_id']]['file_name']}")
            else:
                valid.append(entry)
    return valid


def _check_boxes(objects: list[Entry], images: dict[Hashable, Entry], cases: _Cases) -> None:
    seen: set[Hashable] = set()
    for entry in objects:
        image = images[entry["image_id"]]
        x, y, width, height = entry["bbox"]
        right, bottom = x + width, y + height
        example = f"id {entry['id']} in {image['file_name']}: {entry['bbox']}"
        if width == 0 or height == 0:
            cases[ZERO_AREA].append(example)
        elif x >= image["width"] or y >= image["height"] or right <= 0 or bottom <= 0:
            cases[OUTSIDE].append(example)
        elif min(x, y, image["width"] - right, image["height"] - bottom) < -MARGIN:
            cases[PARTLY_OUTSIDE].append(example)
        same = (entry["image_id"], entry["category_id"], *entry["bbox"])
        if same in seen:
            cases[DUPLICATE].append(example)
        seen.add(same)


def _check_categories(objects: list[Entry], categories: dict[int, str], cases: _Cases) -> None:
    used = {entry["category_id"] for entry in objects}
    for number, name in categories.items():
        if number not in used:
            cases[EMPTY_CATEGORY].append(name)
    for name, count in Counter(categories.values()).items():
        if count > 1:
            cases[REPEATED_NAME].append(name)
    ids = sorted(categories)
    for low, high in zip([0, *ids], ids, strict=False):
        if high > low + 1:
            cases[ID_GAP].append(f"{low + 1} to {high - 1}" if high > low + 2 else str(low + 1))


def _check_objects_per_image(
    objects: list[Entry], images: dict[Hashable, Entry], denoising: PlainDenoising | None, cases: _Cases
) -> None:
    counts = Counter(entry["image_id"] for entry in objects)
    if not any(entry["bbox"][2] * entry["bbox"][3] > 0 for entry in objects):
        cases[NO_OBJECTS].append("none")
    for number, image in images.items():
        if number not in counts:
            cases[EMPTY_IMAGE].append(image["file_name"])
    if denoising is None:
        return
    one_group = _info(
        f"images with more than {denoising.number} objects (MODEL.DINO.DN.NUMBER)",
        "a batch with one of them has a single group of denoising queries",
    )
    limits = [(denoising.number, one_group)]
    if denoising.max_queries:
        most = denoising.max_queries // denoising.parts
        some_denoised = _info(
            f"images with more than {most} objects (MODEL.DINO.DN.MAX_QUERIES)",
            "each step denoises a random subset of their objects",
        )
        limits.append((most, some_denoised))
    else:
        limits.append((MANY_OBJECTS, MANY_QUERIES))
    for number, count in counts.most_common():  # most objects first
        for limit, kind in limits:
            if count > limit:
                cases[kind].append(f"{images[number]['file_name']}: {count}")


def _check_sizes(
    objects: list[Entry], images: dict[Hashable, Entry], input_size: tuple[int, int], cases: _Cases
) -> None:
    """Whether many objects are too small when the model sees them, as in photographs that are large, or from afar."""
    small = []
    for entry in objects:
        image = images[entry["image_id"]]
        shorter, longer = sorted((image["width"], image["height"]))
        scale = min(input_size[0] / shorter, input_size[1] / longer) if input_size[0] else 1
        width, height = entry["bbox"][2:]
        if 0 < scale * math.sqrt(width * height) < SMALLEST_OBJECT:
            seen = f"seen as {scale * width:.1f} x {scale * height:.1f}"
            small.append(f"id {entry['id']} in {image['file_name']}: {width:g} x {height:g}, {seen}")
    if len(small) > FEW * len(objects):
        kind = _warning(
            f"objects below {SMALLEST_OBJECT} pixels (root of the area) at INPUT.MIN_SIZE_TEST {input_size[0]}",
            "too small to be found: cut the images into tiles, or enlarge them with INPUT.MIN_SIZE_TRAIN and "
            "INPUT.MIN_SIZE_TEST and their maxima",
        )
        cases[kind] = small


def _is_id(value: object) -> bool:
    return isinstance(value, int | str)


def _is_length(value: object) -> bool:
    return type(value) is int and value > 0
