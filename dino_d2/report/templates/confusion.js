// The confusion matrix: a grid of buttons that open the pictures behind them.

const MOST_FREQUENT = 8;

function whatOf(truth, found) {
  const name = (index) => element("bdi", {}, className(index));
  if (truth === BACKGROUND) return [name(found), " found where there is none"];
  if (found === BACKGROUND) return [name(truth), " missed"];
  return [name(truth), " found as ", name(found)];
}

function drawConfusion() {
  const { classes, cells, totals } = data.confusion;
  const order = [...classes, BACKGROUND];
  const counts = new Map(cells.map(([truth, found, count, ids]) => [`${truth} ${found}`, { count, ids }]));
  const name = (index, found) => (index === BACKGROUND ? (found ? "missed" : "nothing") : className(index));
  const head = element(
    "tr",
    {},
    element("td", { class: "corner" }, "truth ↓ found →"),
    order.map((found) => element("th", { scope: "col" }, element("span", {}, element("bdi", {}, name(found, true))))),
  );
  const body = order.map((truth, row) =>
    element(
      "tr",
      {},
      element("th", { scope: "row" }, element("bdi", {}, name(truth, false))),
      order.map((found) => {
        const cell = counts.get(`${truth} ${found}`);
        if (!cell) return element("td", {});
        const share = cell.count / totals[row];
        const text = `${element("span", {}, whatOf(truth, found)).textContent}: ${cell.count}`;
        return element(
          "td",
          {},
          element(
            "button",
            {
              type: "button",
              class: truth === found ? "cell right" : "cell",
              style: `--share:${(100 * Math.sqrt(share)).toFixed(0)}%`,
              "aria-label": text,
              title: text,
              "data-truth": truth,
              "data-found": found,
              click: (event) => openCell(event.currentTarget, truth, found, cell),
            },
            cell.count < 10000 ? String(cell.count) : `${Math.round(cell.count / 1000)}k`,
          ),
        );
      }),
    ),
  );
  const size = order.length > 16 ? "matrix small" : "matrix";
  const confused = cells.filter(([truth, found]) => truth !== found && truth !== BACKGROUND && found !== BACKGROUND);
  const most = confused.sort((a, b) => b[2] - a[2]).slice(0, MOST_FREQUENT);
  const open = (truth, found) =>
    byId("confusion").querySelector(`[data-truth="${truth}"][data-found="${found}"]`).click();
  byId("most-confused").replaceChildren(
    ...most.map(([truth, found, count]) =>
      element(
        "li",
        {},
        element("button", { type: "button", class: "plain", click: () => open(truth, found) }, whatOf(truth, found)),
        ` ${count}`,
      ),
    ),
  );
  byId("most-confused").parentElement.hidden = !most.length;
  byId("confusion").replaceChildren(
    element("table", { class: size }, element("thead", {}, head), element("tbody", {}, body)),
  );
}

/** Which boxes of an image a cell counts, at the report's threshold. */
function boxesOfCell(image, truth, found) {
  const { missed, shown } = judge(image, image.found, data.threshold.score);
  const isMissed = new Set(missed);
  const kind = (index) => image.found[index][6];
  const takenFor = (object, index) =>
    kind(index) === "wrong_class" && iou(image.truth[object], image.found[index]) >= 0.5;
  const objects = image.truth
    .map((_, index) => index)
    .filter((index) => image.truth[index][4] === truth && !image.truth[index][6]);
  const boxes = shown.filter((index) => image.found[index][4] === found);
  const sets = (ofTruth, ofFound) => ({ truth: new Set(ofTruth), found: new Set(ofFound) });
  if (truth === found) {
    return sets(
      objects.filter((object) => !isMissed.has(object)),
      boxes.filter((index) => kind(index) === "right"),
    );
  }
  if (truth === BACKGROUND) {
    return sets(
      [],
      boxes.filter((index) => !["right", "wrong_class", "ignored"].includes(kind(index))),
    );
  }
  const open = objects.filter((object) => isMissed.has(object));
  if (found === BACKGROUND) {
    return sets(
      open.filter((object) => !shown.some((index) => takenFor(object, index))),
      [],
    );
  }
  const pairs = open.flatMap((object) =>
    boxes.filter((index) => takenFor(object, index)).map((index) => [object, index]),
  );
  return sets(
    pairs.map(([object]) => object),
    pairs.map(([, index]) => index),
  );
}

function openCell(button, truth, found, { count, ids }) {
  document.querySelectorAll(".cell[aria-pressed]").forEach((one) => one.removeAttribute("aria-pressed"));
  button.setAttribute("aria-pressed", "true");
  const byImage = new Map(data.images.map((image) => [image.id, image]));
  const items = ids
    .filter((id) => byImage.has(id))
    .map((id) => itemOf(byImage.get(id), boxesOfCell(byImage.get(id), truth, found)));
  const others = ids.filter((id) => !byImage.has(id));
  const panel = byId("confusion-pictures");
  const heading = element("h4", { tabindex: -1 }, whatOf(truth, found), `: ${count}`);
  panel.replaceChildren(
    heading,
    element(
      "div",
      { class: "cards" },
      items.map((_, at) => card(items, at)),
    ),
  );
  if (others.length) {
    panel.append(
      element(
        "p",
        { class: "note" },
        `Not in the gallery: ${plural(others.length, "image")} with the id ${others.join(", ")}.`,
      ),
    );
  }
  heading.focus({ preventScroll: true });
  panel.scrollIntoView({ block: "nearest" });
}
