// Curves of training runs, over each other.

function drawTraining() {
  if (!byId("curves")) return;
  const runs = Object.entries(data.curves);
  runs.forEach(([name], index) =>
    byId("runs").append(element("span", {}, element("i", { class: `c${index % COLOURS}` }), ` ${name}`)),
  );
  const last = Math.max(1, ...runs.flatMap(([, curves]) => Object.values(curves).map((curve) => curve.at(-1)[0])));
  for (const [key, { title, log }] of Object.entries(data.panels)) {
    if (!runs.some(([, curves]) => curves[key])) continue;
    const series = runs.map(([name, curves]) => ({
      name,
      points: curves[key] ?? [],
      dots: (curves[key] ?? []).length <= 20,
    }));
    const best =
      key === "bbox/AP"
        ? series.filter((one) => one.points.length).map((one) => one.points.reduce((a, b) => (b[1] > a[1] ? b : a)))
        : [];
    byId("curves").append(
      element(
        "div",
        {},
        element("h3", {}, title),
        lineChart({
          label: `${title} against iteration`,
          x: { title: "Iteration", domain: [0, last], whole: true },
          y: { title: "", domain: domainOf(series, log), log },
          series,
          marks: best.map(([iteration, ap]) => ({ x: iteration, text: `best: ${number(ap)}` })),
        }),
      ),
    );
  }
}
