// The page of two detectors: the images that got better and worse, side by side.

const threshold = new Threshold(data.thresholds, () =>
  document.querySelectorAll(".card").forEach((one) => one.redraw()),
);

/** A pair of small pictures that opens the viewer on `items[at]`. */
function pairCard(items, at) {
  const { image, views } = items[at];
  const frames = views.map(() => frame(image));
  const change = `F1 ${number(image.F1_a, 0)} → ${number(image.F1_b, 0)}`;
  const caption = element(
    "span",
    { class: "caption" },
    element("bdi", { class: "file" }, fileName(image)),
    element("span", { class: "summary" }, change),
  );
  const button = element(
    "button",
    {
      type: "button",
      class: "card",
      "aria-label": `Open ${fileName(image)}`,
      click: () => new Viewer(items, at, threshold),
    },
    element(
      "span",
      { class: "pair" },
      frames.map((one) => element("span", { class: "mount" }, one)),
    ),
    caption,
  );
  button.redraw = () =>
    frames.forEach((ground, index) => {
      const { found, hits } = views[index];
      ground.querySelector("svg")?.remove();
      ground.append(overlay(image, found, judge(image, found, threshold.get(index), hits)));
    });
  button.redraw();
  return button;
}

for (const kind of ["better", "worse"]) {
  if (!byId(`${kind}-pictures`)) continue;
  const items = data[kind].map((index) => {
    const image = data.images[index];
    const [first, second] = data.names;
    const views = [
      { title: first, found: image.found_a, hits: image.found_by_a },
      { title: second, found: image.found_b, hits: hitsOf(image) },
    ];
    return { image, views, marked: {} };
  });
  showInSteps(
    byId(`${kind}-pictures`),
    byId(`${kind}-more`),
    items.map((_, at) => at),
    (at) => pairCard(items, at),
    12,
  );
}
threshold.show();
if (byId("find-class")) filterRows(byId("find-class"), byId("class-table"));
drawTraining();
