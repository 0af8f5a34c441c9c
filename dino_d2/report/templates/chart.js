// Line charts as SVG. The values under the pointer, or under the cursor that the arrow keys move, are told beneath.

const SIZE = { width: 380, height: 240, left: 46, right: 12, top: 12, bottom: 38 };
const COLOURS = 7; // classes c0 to c6 in the style sheet

function ticks([low, high], onlyWhole = false, count = 5) {
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const round = power * [1, 2, 5, 10].find((factor) => factor * power >= rough * 0.999);
  const step = onlyWhole ? Math.max(round, 1) : round;
  const first = Math.ceil(low / step - 1e-9);
  const last = Math.floor(high / step + 1e-9);
  return Array.from({ length: last - first + 1 }, (_, i) => (first + i) * step);
}

function powersOfTen(low, high) {
  const first = Math.ceil(Math.log10(low) - 1e-9);
  const last = Math.floor(Math.log10(high) + 1e-9);
  return Array.from({ length: Math.max(last - first + 1, 0) }, (_, i) => 10 ** (first + i));
}

function tickText(value) {
  const size = Math.abs(value);
  if (size && size < 1e-3) return value.toExponential(0).replace("-", "−");
  return size >= 10000 ? `${Number((value / 1000).toPrecision(4))}k` : String(Number(value.toPrecision(4)));
}

/** A scale from values to pixels. */
function scale([low, high], from, to, log = false) {
  const place = (value) => (log ? Math.log10(value) : value);
  const span = place(high) - place(low) || 1;
  return (value) => from + ((place(value) - place(low)) / span) * (to - from);
}

/**
 * x, y: { title, domain: [low, high], log, whole: only whole numbers }.
 * series: [{ name, points: [[x, y, note], …], dots }] in the order of their colours. dots: whether to draw the
 * points, or a function from their index to their radius.
 * marks: [{ x, text }], vertical lines. diagonal: whether to draw y = x.
 */
function lineChart({ label, x, y, series, marks = [], diagonal = false }) {
  const { width, height, left, right, top, bottom } = SIZE;
  const toX = scale(x.domain, left, width - right);
  const toY = scale(y.domain, height - bottom, top, y.log);
  const picture = shape("svg", {
    viewBox: `0 0 ${width} ${height}`,
    role: "img",
    "aria-label": label,
    tabindex: 0,
    class: "chart",
  });
  for (const value of y.log ? powersOfTen(...y.domain) : ticks(y.domain)) {
    picture.append(
      shape("line", { class: "grid", x1: left, x2: width - right, y1: toY(value), y2: toY(value) }),
      shape("text", { class: "tick", x: left - 6, y: toY(value) + 3.5, "text-anchor": "end" }, tickText(value)),
    );
  }
  for (const value of ticks(x.domain, x.whole)) {
    picture.append(
      shape(
        "text",
        { class: "tick", x: toX(value), y: height - bottom + 15, "text-anchor": "middle" },
        tickText(value),
      ),
    );
  }
  picture.append(
    shape("line", { class: "axis", x1: left, x2: width - right, y1: height - bottom, y2: height - bottom }),
    shape("text", { class: "title", x: (left + width - right) / 2, y: height - 4, "text-anchor": "middle" }, x.title),
    shape(
      "text",
      {
        class: "title",
        transform: `translate(11 ${(top + height - bottom) / 2}) rotate(-90)`,
        "text-anchor": "middle",
      },
      y.title,
    ),
  );
  if (diagonal) {
    picture.append(shape("line", { class: "diagonal", x1: toX(0), y1: toY(0), x2: toX(1), y2: toY(1) }));
  }
  const visible = series.map((one) => ({
    ...one,
    points: one.points.filter(([, value]) => value !== null && (!y.log || value > 0)),
  }));
  visible.forEach((one, index) => {
    const path = one.points.map(([a, b]) => `${toX(a).toFixed(1)},${toY(b).toFixed(1)}`).join(" ");
    picture.append(shape("polyline", { class: `line c${index % COLOURS}`, points: path }));
    if (one.dots) {
      picture.append(
        ...one.points.map(([a, b], at) =>
          shape("circle", {
            class: `dot c${index % COLOURS}`,
            cx: toX(a),
            cy: toY(b),
            r: one.dots === true ? 3 : one.dots(at),
          }),
        ),
      );
    }
  });
  for (const mark of marks) {
    const end = toX(mark.x) > width * 0.6;
    picture.append(
      shape("line", { class: "mark", x1: toX(mark.x), x2: toX(mark.x), y1: top, y2: height - bottom }),
      shape(
        "text",
        {
          class: "mark-text",
          x: toX(mark.x) + (end ? -4 : 4),
          y: height - bottom - 6,
          "text-anchor": end ? "end" : "start",
        },
        mark.text,
      ),
    );
  }
  return element("figure", { class: "plot" }, picture, readout(picture, visible, x, y, toX));
}

/** The line beneath a chart that tells the values under the cursor. */
function readout(picture, series, x, y, toX) {
  const told = element("output", { class: "readout" });
  const line = shape("line", { class: "cursor", y1: SIZE.top, y2: SIZE.height - SIZE.bottom, visibility: "hidden" });
  picture.append(line);
  const places = [...new Set(series.flatMap((one) => one.points.map(([a]) => a)))].sort((a, b) => a - b);
  let current = -1;
  const nearest = (points, at) =>
    points.reduce((best, point) => (Math.abs(point[0] - at) < Math.abs(best[0] - at) ? point : best), points[0]);
  const show = (index) => {
    if (!places.length) return;
    current = Math.max(0, Math.min(index, places.length - 1));
    const at = places[current];
    line.setAttribute("x1", toX(at));
    line.setAttribute("x2", toX(at));
    line.setAttribute("visibility", "visible");
    const values = series
      .filter((one) => one.points.length)
      .map((one) => {
        const [, height, note = ""] = nearest(one.points, at);
        const value = tickText(height) + note;
        return series.length > 1 ? `${one.name} ${value}` : `${y.title} ${value}`;
      });
    told.textContent = `${x.title} ${tickText(at)}: ${values.join(", ")}`;
  };
  const hide = () => {
    line.setAttribute("visibility", "hidden");
    told.textContent = "";
  };
  picture.addEventListener("pointermove", (event) => {
    const box = picture.getBoundingClientRect();
    const at = ((event.clientX - box.left) / box.width) * SIZE.width;
    const found = nearest(
      places.map((place) => [toX(place), place]),
      at,
    );
    if (found) show(places.indexOf(found[1]));
  });
  picture.addEventListener("pointerleave", hide);
  picture.addEventListener("blur", hide);
  picture.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    show(current < 0 && step < 0 ? places.length - 1 : current + step);
  });
  return told;
}

/** From 0, or the lowest, to a round number above the highest value of all series. */
function domainOf(series, log = false) {
  const values = series
    .flatMap((one) => one.points.map(([, value]) => value))
    .filter((value) => value !== null && (!log || value > 0));
  if (!values.length) return [0.1, 1];
  const low = Math.min(...values);
  const high = Math.max(...values);
  if (log) return [low / 1.5, high * 1.5];
  const domain = [Math.min(low, 0), high > 0 ? high : 1];
  const [first, second] = ticks(domain);
  return [domain[0], Math.ceil(domain[1] / (second - first) - 1e-9) * (second - first)];
}
