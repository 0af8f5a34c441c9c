// The gallery: which pictures it shows, and from which score on their boxes.

const FILTERS = {
  all: "All",
  worst_images: "Worst images",
  missed: "Missed",
  false: "False",
  wrong_class: "Wrong class",
  badly_placed: "Badly placed",
  duplicate: "Duplicates",
  second_class: "A second class",
  sure_but_wrong: "Sure but wrong",
};

const threshold = new Threshold([data.threshold.score], redraw);
const choice = { kind: "all", ofClass: null };

/** What a card and the viewer show of an image. */
function itemOf(image, marked, note = null) {
  return { image, views: [{ title: "", found: image.found, hits: hitsOf(image) }], marked, note };
}

/** A small picture that opens the viewer on `items[at]`. */
function card(items, at, caption = null) {
  const { image, marked } = items[at];
  const text = element(
    "span",
    { class: "caption" },
    element("bdi", { class: "file" }, fileName(image)),
    element("span", { class: "summary" }),
  );
  if (caption) text.append(element("span", { class: "reason" }, caption));
  const button = element(
    "button",
    {
      type: "button",
      class: "card",
      click: () => new Viewer(items, at, threshold),
      "aria-label": `Open ${fileName(image)}`,
    },
    element("span", { class: "mount" }, frame(image)),
    text,
  );
  button.redraw = () => {
    const verdict = judge(image, image.found, threshold.get());
    button.querySelector("svg")?.remove();
    button.querySelector(".frame").append(overlay(image, image.found, verdict, marked));
    button.querySelector(".summary").textContent = summary(verdict);
  };
  button.redraw();
  return button;
}

/** Draw the boxes of all pictures on the page anew. */
function redraw() {
  document.querySelectorAll(".card").forEach((one) => one.redraw());
  tellCount();
}

/** The pictures of a filter, in the order of their worst case: [{ image, marked }]. */
function chosenItems() {
  const { kind, ofClass } = choice;
  const unmarked = (index) => itemOf(data.images[index], {});
  const hasClass = ({ image }) =>
    ofClass === null || [...image.truth, ...image.found].some((box) => box[4] === ofClass);
  if (kind === "all") return data.images.map((_, index) => unmarked(index)).filter(hasClass);
  if (kind === "worst_images") return data.cases.worst_images.map(unmarked).filter(hasClass);
  const items = new Map();
  const list = kind === "missed" ? "truth" : "found";
  for (const [index, box] of data.cases[kind]) {
    const image = data.images[index];
    if (ofClass !== null && image[list][box][4] !== ofClass) continue;
    if (!items.has(index)) items.set(index, itemOf(image, { [list]: new Set() }));
    items.get(index).marked[list].add(box);
  }
  return [...items.values()];
}

function tellCount() {
  const cards = byId("gallery").querySelectorAll(".card");
  const boxes = byId("gallery").querySelectorAll(".box.found").length;
  const what = `${plural(boxes, "box", "boxes")} found with a score above ${threshold.text()}`;
  const where = `in the ${plural(cards.length, "picture")} shown.`;
  byId("gallery-count").textContent = cards.length ? `${what}, ${where}` : "No picture.";
}

function showGallery() {
  const items = chosenItems();
  showInSteps(
    byId("gallery"),
    byId("gallery-more"),
    items.map((_, at) => at),
    (at) => card(items, at),
  );
  for (const button of byId("filters").children) {
    button.setAttribute("aria-pressed", String(button.dataset.kind === choice.kind));
  }
  tellCount();
}

function startGallery() {
  for (const [kind, title] of Object.entries(FILTERS)) {
    const count = kind === "all" ? data.images.length : data.cases[kind].length;
    const choose = () => {
      choice.kind = kind;
      showGallery();
    };
    const button = element(
      "button",
      { type: "button", "data-kind": kind, disabled: !count, click: choose },
      title,
      element("small", {}, ` ${count}`),
    );
    byId("filters").append(button);
  }
  const select = byId("class-filter");
  data.classes.forEach((one, index) => select.append(element("option", { value: index }, one.name)));
  select.addEventListener("change", () => {
    choice.ofClass = select.value === "" ? null : Number(select.value);
    showGallery();
  });
  threshold.show();
  showGallery();
  byId("gallery-more").addEventListener("click", tellCount); // after more of them are shown
}

function startLabelErrors() {
  if (!byId("label-errors")) return;
  const items = data.label_errors.map((error) =>
    itemOf(data.images[error.image], { boxes: [error.box] }, `${error.kind}: ${error.reason}`),
  );
  const caption = (at) => {
    const error = data.label_errors[at];
    return [element("strong", {}, error.kind), ` (${className(error.class)}): `, error.reason];
  };
  showInSteps(
    byId("label-errors"),
    byId("labels-more"),
    items.map((_, at) => at),
    (at) => card(items, at, element("span", {}, caption(at))),
  );
}
