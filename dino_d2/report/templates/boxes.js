// Pictures with boxes over them.

/** The score above which boxes are shown: the report's, of each detector, until the slider chooses one for all. */
class Threshold {
  /** scores: one for each detector. change: called whenever it changes. */
  constructor(scores, change) {
    Object.assign(this, { scores, change, chosen: null });
    this.lowest = Math.floor(100 * data.lowest) / 100; // of the sliders, which go in steps of 0.01
    this.slider = byId("threshold");
    this.slider.min = this.lowest;
    this.slider.addEventListener("input", () => this.set(Number(this.slider.value)));
    byId("threshold-reset").textContent = `Back to ${this.text()}`;
    byId("threshold-reset").addEventListener("click", () => this.set(null));
  }

  get(view = 0) {
    return this.chosen ?? this.scores[view];
  }

  set(value) {
    this.chosen = value;
    this.show();
    this.change();
  }

  show() {
    this.slider.value = this.get();
    byId("threshold-value").textContent = this.text();
  }

  text() {
    const scores = this.chosen === null ? this.scores : [this.chosen];
    return [...new Set(scores.map(scoreText))].join(" and ");
  }
}

/** Intersection over union of two boxes [x1, y1, x2, y2, …]. */
function iou(a, b) {
  const width = Math.min(a[2], b[2]) - Math.max(a[0], b[0]);
  const height = Math.min(a[3], b[3]) - Math.max(a[1], b[1]);
  if (width <= 0 || height <= 0) return 0;
  const area = (box) => (box[2] - box[0]) * (box[3] - box[1]);
  return (width * height) / (area(a) + area(b) - width * height);
}

/** Of each object, whether the report calls it found. */
function hitsOf(image) {
  return image.truth.map((box) => box[5]);
}

/**
 * What a threshold leaves of an image: indices of the boxes found, and of the objects that none of them hits.
 * hits: of each object, whether the report says that this detector found it.
 */
function judge(image, found, threshold, hits = hitsOf(image)) {
  const shown = found.flatMap((box, index) => (box[5] > threshold ? [index] : []));
  const objects = image.truth.flatMap((box, index) => (box[6] ? [] : [index]));
  const open = new Set(objects);
  const right = shown.filter((index) => found[index][6] === "right").sort((a, b) => found[b][5] - found[a][5]);
  for (const index of right) {
    const fitting = [...open].filter((object) => image.truth[object][4] === found[index][4]);
    // Boxes are rounded: of objects in the same place, take the one that the report calls found.
    const overlap = (object) => iou(image.truth[object], found[index]) + 0.02 * hits[object];
    if (fitting.length)
      open.delete(fitting.reduce((best, object) => (overlap(object) > overlap(best) ? object : best)));
  }
  const wrong = shown.filter((index) => !["right", "ignored"].includes(found[index][6]));
  const f1 =
    objects.length + wrong.length ? (200 * right.length) / (objects.length + right.length + wrong.length) : 100;
  return { shown, objects, missed: [...open], right, wrong, f1 };
}

function summary({ objects, missed, wrong, f1 }) {
  return `F1 ${number(f1, 0)} · ${objects.length - missed.length} of ${objects.length} found · ${wrong.length} wrong`;
}

function outline(box, kind) {
  const width = Math.max(box[2] - box[0], 0);
  const height = Math.max(box[3] - box[1], 0);
  return shape("rect", { x: box[0], y: box[1], width, height, class: kind });
}

/**
 * The boxes of an image as SVG. found: its detections. verdict: from `judge`. marked: { truth, found: Sets of indices,
 * boxes: more boxes }, drawn heavier while the others are faint. region: [x, y, width, height] that is seen.
 */
function overlay(image, found, verdict, marked = {}, region = whole(image)) {
  const missed = new Set(verdict.missed);
  const any = marked.truth?.size || marked.found?.size || marked.boxes?.length;
  const weight = (set, index) => (set?.has(index) ? " marked" : any ? " faint" : "");
  const truth = image.truth.map((box, index) =>
    outline(box, `box truth${box[6] ? " crowd" : missed.has(index) ? " missed" : ""}${weight(marked.truth, index)}`),
  );
  const boxes = verdict.shown.map((index) =>
    outline(found[index], `box found ${found[index][6]}${weight(marked.found, index)}`),
  );
  const extra = (marked.boxes ?? []).map((box) => outline(box, "box extra marked"));
  const all = [...image.truth, ...verdict.shown.map((index) => found[index]), ...(marked.boxes ?? [])];
  // Dark lines under bright ones are seen on any ground.
  const halo = all.map(([x1, y1, x2, y2]) => `M${x1} ${y1}H${x2}V${y2}H${x1}Z`).join("");
  const view = { viewBox: region.join(" "), preserveAspectRatio: "none", "aria-hidden": "true" };
  return shape(
    "svg",
    { ...view, class: any ? "boxes dimmed" : "boxes" },
    shape("path", { class: "halo", d: halo }),
    boxes,
    extra,
    truth,
  );
}

/** A frame of the image's shape for a picture and its boxes. large: the full picture instead of the small one. */
function frame(image, large = false) {
  const ground = element("span", {
    class: "frame",
    style: `aspect-ratio:${image.width}/${image.height};--shape:${image.width / image.height}`,
  });
  const picture = element("img", { alt: "" });
  const small = () => {
    picture.onerror = null;
    if (image.thumbnail) picture.src = image.thumbnail;
    else picture.replaceWith(element("span", { class: "absent" }, "picture not found"));
  };
  ground.append(picture);
  if (large && image.thumbnail) {
    picture.onerror = small; // moved away since
    picture.src = image.link;
  } else {
    small();
  }
  return ground;
}

function whole(image) {
  return [0, 0, image.width, image.height];
}

/** The part of an image, of its shape, in the middle of which a box takes a third. */
function regionAround([x1, y1, x2, y2], image) {
  const share = Math.min(1, Math.max((3 * (x2 - x1)) / image.width, (3 * (y2 - y1)) / image.height, 0.05));
  const [width, height] = [share * image.width, share * image.height];
  const inside = (low, most) => Math.max(0, Math.min(low, most));
  return [
    inside((x1 + x2 - width) / 2, image.width - width),
    inside((y1 + y2 - height) / 2, image.height - height),
    width,
    height,
  ];
}

/** Show only a region of the picture in a frame. */
function zoom(ground, image, [x, y, width, height]) {
  const percent = (part, of) => `${(100 * part) / of}%`;
  const size = { width: percent(image.width, width), height: percent(image.height, height) };
  Object.assign(ground.querySelector("img, .absent").style, size, {
    left: percent(-x, width),
    top: percent(-y, height),
  });
}

function fileName(image) {
  return image.file.split("/").pop();
}
