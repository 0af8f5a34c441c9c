"""The page of `dino-d2 app`: pictures in, boxes out, in a browser on this machine.

It is served on loopback alone and asks no other host for anything: no telemetry, no share link, no fonts. Uploaded
pictures are removed with the process.
"""

from __future__ import annotations

import json
import os
import socket
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from .data import read_image

if TYPE_CHECKING:
    from .detections import Detections
    from .detector import Detector

# Gradio reads these while it is imported.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
_UPLOADS = tempfile.TemporaryDirectory(prefix="dino_d2_app_")
os.environ.setdefault("GRADIO_TEMP_DIR", _UPLOADS.name)

try:
    import gradio as gr
except ModuleNotFoundError as error:
    if error.name != "gradio":
        raise
    raise ImportError("the page needs Gradio, which is not installed: pip install 'dino-d2[app]'") from error

HOST = "127.0.0.1"
PORTS_TRIED = 100
THRESHOLD = 0.3  # at first
LONGEST_SHOWN = 2048  # pixels of a side of what is drawn; larger pictures are found in as they are, shown smaller
THUMBNAIL = 160
SMALLEST_TILE = 64
TABLE = ("class", "score", "x1", "y1", "x2", "y2")
PRESS_DOWNLOAD = "() => document.querySelector('#coco_file').click()"

Value = dict[Any, Any]  # of Gradio's components


@dataclass(frozen=True)
class Picture:
    """A picture of the queue and everything that the model found in it.

    name: of its file, without folders.
    shown: the picture, RGB, its sides at most `LONGEST_SHOWN`.
    found: in pixels of the file, whatever the score.
    tile: with which it was found; see `Detector`.
    """

    name: str
    shown: Image.Image
    found: Detections
    tile: int

    def kept(self, threshold: float, classes: Sequence[str]) -> Detections:
        """What is surer than the threshold and of these classes; of all if none is named."""
        kept = self.found.above(threshold)
        return kept.of(*classes) if classes else kept

    def draw(self, kept: Detections) -> Image.Image:
        height, width = self.found.image_size
        scale = max(self.shown.size) / max(height, width)
        size = (self.shown.height, self.shown.width)
        return replace(kept, boxes=kept.boxes * scale, image_size=size).draw(self.shown)

    def thumbnail(self) -> Image.Image:
        return _at_most(self.shown, THUMBNAIL)


def look_at(detector: Detector, path: str, tile: int) -> Picture:
    """Run the model on a file.

    Raises:
        ValueError: it is no picture, or cannot be looked at; the message names the file without its folder.
    """
    name = Path(path).name
    try:
        pixels = read_image(path, "RGB")
        found = detector(pixels, threshold=0.0, tile=tile)
    except ValueError as error:
        raise ValueError(str(error).replace(path, name)) from error
    return Picture(name, _at_most(Image.fromarray(pixels), LONGEST_SHOWN), found, tile)


def to_coco(
    pictures: Sequence[Picture], threshold: float, classes: Sequence[str], class_names: Sequence[str]
) -> dict[str, list[dict[str, Any]]]:
    """What is kept of all pictures as a data set in COCO's format; annotations have scores, too."""
    images, annotations = [], []
    for number, picture in enumerate(pictures, start=1):
        height, width = picture.found.image_size
        images.append({"id": number, "file_name": picture.name, "height": height, "width": width})
        for entry in picture.kept(threshold, classes).to_coco(number):
            _, _, box_width, box_height = entry["bbox"]
            area = {"area": box_width * box_height, "iscrowd": 0}
            annotations.append({"id": len(annotations) + 1, **area, **entry})
    categories = [{"id": number, "name": name} for number, name in enumerate(class_names)]
    return {"images": images, "annotations": annotations, "categories": categories}


def build_page(detector: Detector, title: str, tile: int = 0) -> gr.Blocks:
    """The page, to be started by :func:`launch`.

    The model looks at a picture once, when it is uploaded or the tiles change; all it finds stays in the session, and
    threshold and classes choose from that.

    Args:
        detector: finds objects.
        title: of the page: what the model is called.
        tile: longest side in pixels of what is looked at at once, at first; 0: whole pictures.
    """
    with gr.Blocks(title=f"{title} · DINO", analytics_enabled=False, fill_width=True) as page:
        pictures, current = gr.State({}), gr.State(None)  # Picture by path; the path of the one that is shown
        gr.Markdown(f"# {title}")
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                files = gr.File(label="Pictures", file_count="multiple", file_types=["image"], height=180)
                note = gr.Markdown(elem_id="note")
                threshold = gr.Slider(0, 1, THRESHOLD, step=0.01, label="Score above", elem_id="threshold")
                classes = gr.Dropdown(
                    list(detector.class_names),
                    value=[],
                    multiselect=True,
                    label="Classes",
                    info="None chosen: all are shown",
                    visible=bool(detector.class_names),
                    elem_id="classes",
                )
                tiles = gr.Number(
                    tile,
                    label="Tiles",
                    info="Pixels; 0: the whole picture at once. Tiles find small objects in large pictures",
                    precision=0,
                    minimum=0,
                    elem_id="tiles",
                )
                again = gr.Button("Find again with these tiles")
                download = gr.Button("Download COCO JSON", variant="primary")
                file = gr.DownloadButton(visible="hidden", elem_id="coco_file")
            with gr.Column(scale=3, min_width=480):
                summary = gr.Markdown("Upload pictures to begin.", elem_id="summary")
                shown = gr.Image(
                    show_label=False,
                    format="jpeg",
                    interactive=False,
                    buttons=["download", "fullscreen"],
                    height="65vh",
                    elem_id="shown",
                )
                queue = gr.Gallery(
                    label="Queue",
                    format="jpeg",
                    columns=8,
                    height=150,
                    allow_preview=False,
                    interactive=False,
                    visible=False,
                    buttons=[],
                    elem_id="queue",
                )
                table = gr.Dataframe(headers=list(TABLE), interactive=False, max_height=360, elem_id="table")

        def view(picture: Picture | None, threshold: float, classes: list[str]) -> Value:
            if picture is None:
                return {shown: None, summary: "Upload pictures to begin.", table: []}
            kept = picture.kept(threshold, classes)
            return {shown: picture.draw(kept), summary: _summary(picture, kept), table: _rows(kept)}

        def run(
            paths: list[str] | None,
            tile: int,
            threshold: float,
            classes: list[str],
            before: dict[str, Picture],
            selected: str | None,
        ) -> Iterator[Value]:
            """Look at the files that the model has not seen with these tiles; show the first one as soon as it is."""
            if 0 < tile < SMALLEST_TILE:
                gr.Warning(f"Tiles of {tile} pixels are too small: 0 (the whole picture) or {SMALLEST_TILE} and more")
                yield {note: gr.skip()}
                return
            paths = list(dict.fromkeys(paths or []))
            after = {path: before[path] for path in paths if path in before}
            selected = selected if selected in after else next(iter(after), None)
            problems = []
            for number, path in enumerate(paths, start=1):
                if path in after and after[path].tile == tile:
                    continue
                yield {note: f"Looking at {_plain(Path(path).name)} ({number} of {len(paths)}) …"}
                try:
                    after = after | {path: look_at(detector, path, tile)}
                except ValueError as error:
                    problems.append(_plain(str(error)))
                    gr.Warning(problems[-1])
                    continue
                selected = selected or path
                update = view(after[path], threshold, classes) if path == selected else {}
                yield {pictures: after, current: selected, queue: thumbnails(after, selected), **update}
            yield {
                pictures: after,
                current: selected,
                note: "  \n".join(f"⚠ {problem}" for problem in problems),
                queue: thumbnails(after, selected),
                **view(after.get(selected), threshold, classes),
            }

        def thumbnails(all_of_them: dict[str, Picture], selected: str | None) -> Any:
            return gr.Gallery(
                [(picture.thumbnail(), picture.name) for picture in all_of_them.values()],
                visible=len(all_of_them) > 1,
                selected_index=list(all_of_them).index(selected) if selected else None,
            )

        def redraw(pictures: dict[str, Picture], current: str | None, threshold: float, classes: list[str]) -> Value:
            return view(pictures.get(current), threshold, classes)

        def select(
            event: gr.SelectData, all_of_them: dict[str, Picture], threshold: float, classes: list[str]
        ) -> Value:
            path = list(all_of_them)[event.index]
            return {current: path, **view(all_of_them[path], threshold, classes)}

        def write(pictures: dict[str, Picture], threshold: float, classes: list[str]) -> str:
            path = Path(tempfile.mkdtemp(dir=page.GRADIO_CACHE), "detections.json")
            path.write_text(json.dumps(to_coco(list(pictures.values()), threshold, classes, detector.class_names)))
            return str(path)

        shows = [shown, summary, table]
        gr.on(
            [files.change, again.click, tiles.submit],
            run,
            [files, tiles, threshold, classes, pictures, current],
            [pictures, current, note, queue, *shows],
            show_progress="hidden",  # the note says how far it is, and what is there already stays to be seen
            trigger_mode="always_last",
            concurrency_id="model",
        )
        gr.on(
            [threshold.change, classes.change],
            redraw,
            [pictures, current, threshold, classes],
            shows,
            show_progress="hidden",
            trigger_mode="always_last",
        )
        queue.select(select, [pictures, threshold, classes], [current, *shows], show_progress="hidden")
        download.click(write, [pictures, threshold, classes], file, show_progress="hidden").then(None, js=PRESS_DOWNLOAD)
    return page


def launch(page: gr.Blocks, port: int) -> str:
    """Serve the page in threads of this process until `page.close()`.

    Args:
        page: of :func:`build_page`.
        port: the first one that is tried; if it is taken, the next free one.

    Returns:
        the address.

    Raises:
        OSError: no port is free.
    """
    # Gradio asks its own server whether it is up; a proxy for the network beyond must not be asked for that.
    os.environ["NO_PROXY"] = ",".join(filter(None, (os.environ.get("NO_PROXY", os.environ.get("no_proxy")), HOST)))
    theme = gr.themes.Base(
        primary_hue="blue", neutral_hue="slate", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    )
    _, address, _ = page.launch(
        server_name=HOST,
        server_port=_free_port(port),
        share=False,
        ssr_mode=False,
        footer_links=[],
        theme=theme,
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


def _at_most(image: Image.Image, longest: int) -> Image.Image:
    small = image.copy()
    small.thumbnail((longest, longest))
    return small


def _rows(kept: Detections) -> list[list[str | float]]:
    rows = zip(kept.names, kept.scores.tolist(), kept.boxes.tolist(), strict=True)
    return [[name, round(score, 3), *(round(side, 1) for side in box)] for name, score, box in rows]


def _summary(picture: Picture, kept: Detections) -> str:
    counts = {name: kept.names.count(name) for name in dict.fromkeys(kept.names)}
    listed = ", ".join(f"{count} {_plain(name)}" for name, count in counts.items())
    height, width = picture.found.image_size
    objects = "1 object" if len(kept) == 1 else f"{len(kept)} objects"
    return f"**{_plain(picture.name)}** ({width} × {height}): {objects}{': ' if listed else ''}{listed}"


def _plain(text: str) -> str:
    """The text as Markdown that shows it as it is."""
    return "".join(f"\\{character}" if character in "\\`*_{}[]()<>#+-.!|$&~" else character for character in text)
