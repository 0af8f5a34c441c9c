"""The web page of `dino-d2 app`, which detects objects in uploaded images.

It is served only on localhost and contacts no other host: no telemetry, share link or fonts. Uploaded images are
deleted when the process ends.
"""

from __future__ import annotations

import json
import os
import socket
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from .data import read_image
from .detections import DEFAULT_THRESHOLD, Detections, number_categories
from .detector import Detector

# Gradio reads these when it is imported.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
_UPLOADS = tempfile.TemporaryDirectory(prefix="dino_d2_app_")
os.environ.setdefault("GRADIO_TEMP_DIR", _UPLOADS.name)

try:
    import gradio as gr
except ModuleNotFoundError as error:
    if error.name != "gradio":
        raise
    raise ImportError("the app needs Gradio, which is not installed: pip install 'dino-d2[app]'") from error

HOST = "127.0.0.1"
PORTS_TRIED = 100
DIGITS = 3  # of a score threshold
SHOWN = (1024, 2048)  # limits for the longer side of the displayed image in pixels; the model sees the original
THUMBNAIL = 160
SMALLEST_TILE = 64
NOTHING_YET = "Upload images to begin."
TABLE = ("class", "score", "x1", "y1", "x2", "y2")
PRESS_DOWNLOAD = "() => document.querySelector('#coco_file').click()"

Values = dict[Any, Any]  # Gradio component -> value


@dataclass(frozen=True)
class Look:
    """How the model looks at an image: `tile` and `augment` of a call of `Detector`."""

    tile: int = 0
    augment: bool = False


@dataclass(frozen=True, eq=False)
class Picture:
    """An image of the queue with all detections.

    name: file name without folders.
    shown: the image to draw on, RGB, resized to `SHOWN`.
    found: detections of any score, in pixels of the original.
    look: how they were found.
    """

    name: str
    shown: Image.Image
    found: Detections
    look: Look

    def draw(self, selected: Detections) -> Image.Image:
        height, width = self.found.image_size
        scale = max(self.shown.size) / max(height, width)
        size = (self.shown.height, self.shown.width)
        return replace(selected, boxes=selected.boxes * scale, image_size=size).draw(self.shown)

    def thumbnail(self) -> Image.Image:
        return _resize(self.shown, THUMBNAIL)


@dataclass
class Session:
    """The state of a visitor, shared by all events, which may change it while the model runs.

    pictures: by path of the uploaded file, in the order of the queue; always replaced as a whole.
    current: path of the selected picture.
    threshold, classes: show detections with a higher score, of these classes; empty: all classes.
    """

    pictures: dict[str, Picture] = field(default_factory=dict)
    current: str | None = None
    threshold: float = DEFAULT_THRESHOLD
    classes: Sequence[str] = ()

    @property
    def shown(self) -> Picture | None:
        """The selected picture, or the first."""
        return self.pictures.get(self.current, next(iter(self.pictures.values()), None))

    def select(self, picture: Picture) -> Detections:
        """The detections to show."""
        selected = picture.found.above(self.threshold)
        return selected.of(*self.classes) if self.classes else selected


def detect(detector: Detector, path: str, look: Look) -> Picture:
    """Run the model on a file.

    Raises:
        ValueError: it is not an image, or too large; the message names the file without its folder.
    """
    name = Path(path).name
    try:
        pixels = read_image(path, "RGB")
        found = replace(detector(pixels, threshold=0.0, tile=look.tile, augment=look.augment), image=None)
    except ValueError as error:
        raise ValueError(str(error).replace(path, name)) from error
    except torch.OutOfMemoryError as error:
        raise ValueError(f"{name} does not fit into device memory: use tiles") from error
    longest = max(SHOWN[0], min(max(found.image_size), SHOWN[1]))
    return Picture(name, _resize(Image.fromarray(pixels), longest), found, look)


def to_coco(session: Session, class_names: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """The selected detections of all images as a dataset in COCO format, with scores."""
    images, annotations = [], []
    pictures = list(session.pictures.values())
    names = different_names([picture.name for picture in pictures])
    for number, (picture, name) in enumerate(zip(pictures, names, strict=True), start=1):
        height, width = picture.found.image_size
        images.append({"id": number, "file_name": name, "height": height, "width": width})
        for result in session.select(picture).to_coco(number):
            area = result["bbox"][2] * result["bbox"][3]
            annotations.append({"id": len(annotations) + 1, **result, "area": area, "iscrowd": 0})
    numbered = zip(number_categories(class_names), class_names, strict=True)
    categories = [{"id": number, "name": name} for number, name in numbered]
    return {"images": images, "annotations": annotations, "categories": categories}


def different_names(names: Sequence[str]) -> list[str]:
    """File names that repeat an earlier one get a number, as browsers do: photo.jpg, photo (2).jpg."""
    different: list[str] = []
    for name in names:
        path = Path(name)
        numbered = (f"{path.stem} ({number}){path.suffix}" for number in count(2))
        different.append(name if name not in different else next(x for x in numbered if x not in [*names, *different]))
    return different


def build_page(detector: Detector, title: str, tile: int = 0) -> gr.Blocks:
    """Build the page; start it with :func:`launch`.

    The model runs once per image, on upload or when tiles or copies are wanted. All detections stay in the session;
    threshold and classes select from them.

    Args:
        detector: the model.
        title: name of the model.
        tile: initial tile size in pixels; 0: no tiles.
    """
    title = f"DINO · {title}"
    with gr.Blocks(title=title, analytics_enabled=False, fill_width=True) as blocks:
        gr.Markdown(f"# {_plain(title)}")
        _Page(detector, tile).connect()
    return blocks


class _Page:
    """The components and their event handlers.

    Handlers called by Gradio take component values and return new ones.
    """

    def __init__(self, detector: Detector, tile: int):
        self.detector, self.class_names = detector, detector.labels
        self.first_threshold = round(detector.threshold, DIGITS)
        self.session = gr.State(Session(threshold=self.first_threshold))  # each visitor gets a copy
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                self._add_controls(tile)
            with gr.Column(scale=3, min_width=480):
                self._add_results()
        self.view = [self.summary, self.shown, self.table]

    def _add_controls(self, tile: int) -> None:
        self.files = gr.File(label="Images", file_count="multiple", height=180)
        self.note = gr.Markdown(elem_id="note")
        self.threshold = gr.Slider(
            0, 1, self.first_threshold, step=10**-DIGITS, label="Score above", elem_id="threshold"
        )
        self.classes = gr.Dropdown(
            list(self.class_names),
            value=[],
            multiselect=True,
            label="Classes",
            info="Empty: show all",
            elem_id="classes",
        )
        self.tile = gr.Number(
            tile,
            label="Tiles",
            info="Pixels; 0: no tiles. Tiles help to find small objects in large images",
            precision=0,
            minimum=0,
            elem_id="tile",
        )
        self.augment = gr.Checkbox(
            label="Augment", info="Three sizes, flipped: better boxes, six times as slow", elem_id="augment"
        )
        self.again = gr.Button("Detect again")
        self.download = gr.Button("Download COCO JSON", variant="primary")
        self.file = gr.DownloadButton(visible="hidden", elem_id="coco_file")

    def _add_results(self) -> None:
        self.summary = gr.Markdown(NOTHING_YET, elem_id="summary")
        self.shown = gr.Image(
            show_label=False,
            format="jpeg",
            interactive=False,
            buttons=["download", "fullscreen"],
            height="65vh",
            elem_id="shown",
        )
        self.queue = gr.Gallery(
            label="Queue",
            format="jpeg",
            columns=8,
            fit_columns=False,
            height=170,
            allow_preview=False,
            interactive=False,
            visible=False,
            buttons=[],
            elem_id="queue",
        )
        self.table = gr.Dataframe(
            headers=list(TABLE), label="Boxes, in pixels", interactive=False, max_height=360, elem_id="table"
        )

    def connect(self) -> None:
        """Connect events to handlers."""
        choice = [self.session, self.threshold, self.classes]
        # No progress bars, which would hide current results; the note shows the progress.
        quiet: dict[str, Any] = {"show_progress": "hidden"}
        ran = gr.on(
            [self.files.change, self.again.click, self.tile.submit],
            self.run,
            [self.session, self.files, self.tile, self.augment],
            [self.note, self.queue, *self.view],
            trigger_mode="always_last",
            concurrency_id="model",
            **quiet,
        )
        in_turn = quiet | {"concurrency_id": "view"}  # so that the latest change is shown last
        ran.then(self.redraw, choice, self.view, **in_turn)
        changes = [self.threshold.change, self.classes.change]
        gr.on(changes, self.redraw, choice, self.view, trigger_mode="always_last", **in_turn)
        self.queue.select(self.select, self.session, self.view, **in_turn)
        written = self.download.click(self.write, choice, self.file, **in_turn)
        written.then(None, js=PRESS_DOWNLOAD)

    def run(self, session: Session, paths: list[str] | None, tile: int | None, augment: bool) -> Iterator[Values]:
        """Run the model on files at which it has not yet looked this way, and forget removed files."""
        look = Look(tile or 0, augment)  # None: the field is empty
        if 0 < look.tile < SMALLEST_TILE:
            yield {self.note: f"⚠ Tiles of {tile} pixels are too small: use 0 (no tiles) or at least {SMALLEST_TILE}"}
            return
        paths = list(dict.fromkeys(paths or []))
        session.pictures = {path: session.pictures[path] for path in paths if path in session.pictures}
        problems: list[str] = []
        for number, path in enumerate(paths, start=1):
            if path in session.pictures and session.pictures[path].look == look:
                continue
            yield {self.note: _lines(*problems, f"Processing {Path(path).name} ({number} of {len(paths)}) …")}
            try:
                picture = detect(self.detector, path, look)
            except ValueError as error:
                problems.append(f"⚠ {error}")
                continue
            session.pictures = session.pictures | {path: picture}
            yield {self.queue: self.thumbnails(session)} | (self.draw(session) if picture is session.shown else {})
        yield {self.note: _lines(*problems), self.queue: self.thumbnails(session)}

    def redraw(self, session: Session, threshold: float, classes: list[str]) -> Values:
        session.threshold, session.classes = threshold, classes
        return self.draw(session)

    def select(self, event: gr.SelectData, session: Session) -> Values:
        session.current = list(session.pictures)[event.index]
        return self.draw(session)

    def write(self, session: Session, threshold: float, classes: list[str]) -> str:
        session.threshold, session.classes = threshold, classes
        path = Path(tempfile.mkdtemp(dir=self.file.GRADIO_CACHE), "detections.json")
        path.write_text(json.dumps(to_coco(session, self.class_names)))
        return str(path)

    def draw(self, session: Session) -> Values:
        picture = session.shown
        if picture is None:
            return {self.summary: NOTHING_YET, self.shown: None, self.table: []}
        selected = session.select(picture)
        return {
            self.summary: _summary(picture, selected),
            self.shown: picture.draw(selected),
            self.table: _rows(selected),
        }

    def thumbnails(self, session: Session) -> gr.Gallery:
        pictures = list(session.pictures.values())
        return gr.Gallery(
            [(picture.thumbnail(), picture.name) for picture in pictures],
            visible=len(pictures) > 1,
            selected_index=pictures.index(session.shown) if pictures else None,
        )


def launch(page: gr.Blocks, port: int) -> str:
    """Serve the page in threads of this process until `page.close()`.

    Args:
        page: from :func:`build_page`.
        port: first port to try.

    Returns:
        the URL.

    Raises:
        OSError: no port is free.
    """
    # Gradio checks its own server over HTTP, which must not go through a proxy.
    os.environ["NO_PROXY"] = ",".join(filter(None, (os.environ.get("NO_PROXY", os.environ.get("no_proxy")), HOST)))
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}  # system fonts
    theme = gr.themes.Base(primary_hue="blue", neutral_hue="slate", **fonts)
    _, address, _ = page.launch(
        server_name=HOST,
        server_port=_free_port(port),
        share=False,
        ssr_mode=False,
        footer_links=[],
        theme=theme,
        show_error=True,
        quiet=True,
        prevent_thread_lock=True,
    )
    return address


def _free_port(first: int) -> int:
    for port in range(first, first + PORTS_TRIED):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
            return port
    raise OSError(f"no port from {first} to {first + PORTS_TRIED - 1} is free on {HOST}")


def _resize(image: Image.Image, longest: int) -> Image.Image:
    scale = longest / max(image.size)
    return image.resize(tuple(max(1, round(side * scale)) for side in image.size))


def _rows(detections: Detections) -> list[list[str | float]]:
    return [[found.name, round(found.score, 3), *(round(side, 1) for side in found.box)] for found in detections]


def _summary(picture: Picture, detections: Detections) -> str:
    counts = ", ".join(f"{count} {name}" for name, count in Counter(detections.names).most_common())
    height, width = picture.found.image_size
    objects = "1 object" if len(detections) == 1 else f"{len(detections)} objects"
    return f"**{_plain(picture.name)}** ({width} × {height}): {_plain(f'{objects}: {counts}' if counts else objects)}"


def _lines(*lines: str) -> str:
    return "  \n".join(map(_plain, lines))


def _plain(text: str) -> str:
    """Escape the text for Markdown."""
    return "".join(f"\\{character}" if character in "\\`*_{}[]()<>#+-.!|$&~" else character for character in text)
