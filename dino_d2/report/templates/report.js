// The page of one detector.

const points = (xs, ys) => xs.map((x, index) => [x, ys[index]]);

function showClass(index) {
  const one = data.classes[index];
  for (const button of document.querySelectorAll("[data-class]")) {
    button.setAttribute("aria-expanded", String(Number(button.dataset.class) === index));
  }
  const panel = byId("class-detail");
  panel.replaceChildren(element("h3", {}, element("bdi", {}, one.name)));
  if (!one.pr) {
    panel.append(element("p", { class: "note" }, one.objects ? "No curve." : "No object of this class is annotated."));
    return;
  }
  const recall = one.pr.map((_, at) => (100 * at) / (one.pr.length - 1));
  const best = `Best F1 ${number(one.best_F1)} at a score of ${scoreText(one.best_threshold)}.`;
  panel.append(
    lineChart({
      label: `Precision against recall of ${one.name}`,
      x: { title: "Recall", domain: [0, 100] },
      y: { title: "Precision", domain: [0, 100] },
      series: [{ name: one.name, points: points(recall, one.pr) }],
    }),
    f1Chart(one.f1, one.best_threshold, `F1 against the score threshold of ${one.name}`),
    element("p", { class: "note" }, best, ` ${plural(one.objects, "object")} in ${plural(one.images, "image")}.`),
  );
}

function f1Chart([scores, values], mark, label, word = "best") {
  return lineChart({
    label,
    x: { title: "Score threshold", domain: [0, 1] },
    y: { title: "F1", domain: [0, 100] },
    series: [{ name: "F1", points: points(scores, values) }],
    marks: mark === null ? [] : [{ x: mark, text: `${word}: ${scoreText(mark)}` }],
  });
}

function drawErrors() {
  const bins = data.calibration.bins.filter((bin) => bin.count);
  const most = Math.max(...bins.map((bin) => bin.count));
  const radius = (at) => 2 + 5 * Math.sqrt(bins[at].count / most);
  byId("calibration").append(
    lineChart({
      label: "Precision against score",
      x: { title: "Score", domain: [0, 1] },
      y: { title: "Precision", domain: [0, 1] },
      series: [
        {
          name: "Precision",
          points: bins.map((bin) => [bin.score, bin.precision, ` of ${plural(bin.count, "detection")}`]),
          dots: radius,
        },
      ],
      diagonal: true,
    }),
  );
  if (byId("f1")) {
    const { score, chosen } = data.threshold;
    byId("f1").append(f1Chart(data.f1, score, "F1 against the score threshold", chosen ? "best" : "set"));
  }
  if (byId("layers")) byId("layers").append(apChart("AP by decoder layer", "Decoder layer", data.layers, true));
}

function apChart(label, title, values, onlyWhole = false) {
  const series = [{ name: "AP", points: values, dots: true }];
  const domain = [values[0][0], values.at(-1)[0]];
  return lineChart({
    label,
    x: { title, domain: domain[0] < domain[1] ? domain : [0, domain[1]], whole: onlyWhole },
    y: { title: "AP", domain: domainOf(series) },
    series,
  });
}

for (const button of document.querySelectorAll("[data-class]")) {
  button.addEventListener("click", () => showClass(Number(button.dataset.class)));
}
if (byId("find-class")) filterRows(byId("find-class"), byId("class-table"));
if (data.classes.length) showClass(0);
drawErrors();
startGallery();
startLabelErrors();
drawConfusion();
drawTraining();
if (byId("sizes")) byId("sizes").append(apChart("AP by scale of the images", "Scale", data.sizes));
