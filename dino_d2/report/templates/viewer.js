// A picture in a window over the page, with a list of its boxes. In a comparison: one picture for each detector.

/** `views` of an item are [{ title, found, hits }], one for each detector; its other keys are those of `overlay`. */
class Viewer {
  /** items: [{ image, views, marked, note }]. threshold: a `Threshold`, which the slider shows and changes. */
  constructor(items, at, threshold) {
    Object.assign(this, { items, at, threshold, shown: { truth: true, found: true, names: true } });
    this.window = byId("viewer");
    this.title = element("h2");
    this.about = element("p", { class: "note about-picture" });
    this.status = element("p", { class: "note", role: "status" });
    this.stage = element("div", { class: "stage" });
    this.list = element("div", { class: "list", tabindex: 0, role: "region", "aria-label": "Boxes" });
    this.score = element("output");
    this.slider = element("input", { type: "range", min: threshold.lowest, max: 1, step: 0.01, "aria-label": "Score threshold" });
    this.slider.addEventListener("input", () => {
      threshold.set(Number(this.slider.value));
      this.draw();
    });
    this.lay();
    const opener = document.activeElement;
    this.window.onclose = () => opener?.focus();
    this.window.onkeydown = (event) => this.press(event);
    this.window.onclick = (event) => {
      if (event.target === this.window) this.window.close(); // beside what it shows
    };
    this.open();
    this.window.showModal();
  }

  lay() {
    const button = (text, label, click) => element("button", { type: "button", "aria-label": label, click }, text);
    const turn = [
      button("‹", "Previous picture", () => this.turn(-1)),
      button("›", "Next picture", () => this.turn(1)),
      button("×", "Close", () => this.window.close()),
    ];
    const boxes = ["truth", "found", "names"].map((name) => {
      const change = (event) => {
        this.shown[name] = event.target.checked;
        this.draw();
      };
      return element("label", {}, element("input", { type: "checkbox", checked: true, change }), ` ${name}`);
    });
    const tools = element(
      "div",
      { class: "toolbar" },
      element("label", { class: "slider" }, "Score > ", this.score, " ", this.slider),
      boxes,
    );
    const side = element("div", { class: "side" }, this.about, this.status, tools, this.list);
    this.window.replaceChildren(
      element("div", { class: "window" }, element("header", {}, this.title, turn), this.stage, side),
    );
  }

  press(event) {
    if (event.target === this.slider || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "ArrowRight") this.turn(1);
    else if (event.key === "ArrowLeft") this.turn(-1);
  }

  turn(step) {
    this.at = (this.at + step + this.items.length) % this.items.length;
    this.open();
  }

  /** Show another picture. */
  open() {
    const { image, note, views } = this.items[this.at];
    this.region = whole(image);
    this.near = null;
    if (this.list.contains(document.activeElement)) this.list.focus(); // its rows are replaced
    this.title.textContent = fileName(image);
    const link = element("a", { href: image.link, target: "_blank", rel: "noopener" }, "full picture");
    const place = element("span", {}, `${this.at + 1} of ${this.items.length}`);
    this.about.replaceChildren(place, link, ...(note ? [element("span", {}, note)] : []));
    const titled = (view) =>
      element("div", { class: "view" }, view.title ? element("h3", {}, view.title) : null, frame(image, true));
    this.stage.replaceChildren(...views.map(titled));
    this.draw();
  }

  /** Draw the boxes and their list anew. */
  draw() {
    const { image, views } = this.items[this.at];
    this.slider.value = this.threshold.get(0);
    this.score.textContent = this.threshold.text();
    this.verdicts = views.map(({ found, hits }, view) => judge(image, found, this.threshold.get(view), hits));
    this.status.replaceChildren(...this.verdicts.map((verdict) => element("span", {}, summary(verdict))));
    this.list.replaceChildren(...views.map((view, index) => this.table(index)));
    this.drawBoxes();
  }

  /** light: { view, kind: "truth" or "found", index } of the box to draw heavier than the others. */
  drawBoxes(light = null) {
    const { image, views, marked } = this.items[this.at];
    const seen = this.shown.truth ? image : { ...image, truth: [] };
    views.forEach(({ found }, index) => {
      const ground = this.stage.querySelectorAll(".frame")[index];
      const verdict = this.shown.found ? this.verdicts[index] : { ...this.verdicts[index], shown: [] };
      const heavy = light?.view === index ? { [light.kind]: new Set([light.index]) } : light ? {} : marked;
      ground.querySelectorAll("svg, .tag").forEach((old) => old.remove());
      ground.append(overlay(seen, found, verdict, heavy, this.region));
      zoom(ground, image, this.region);
      if (this.shown.names) ground.append(...tags(seen, found, verdict, this.region));
    });
  }

  /** Show what is around a box, or the whole picture if that was shown. */
  look(button, box) {
    const { image } = this.items[this.at];
    this.near = this.near === box ? null : box;
    this.list.querySelectorAll("[aria-pressed]").forEach((one) => one.setAttribute("aria-pressed", "false"));
    button.setAttribute("aria-pressed", String(this.near !== null));
    this.region = this.near ? regionAround(box, image) : whole(image);
    this.drawBoxes();
  }

  /** The boxes of a view as a table: missed objects, then what was found. */
  table(view) {
    const { image, views } = this.items[this.at];
    const { title, found } = views[view];
    const { missed, shown } = this.verdicts[view];
    const row = (kind, index, box, ...cells) => {
      const light = () => this.drawBoxes({ view, kind, index });
      const dark = () => this.drawBoxes();
      const look = (event) => this.look(event.currentTarget, box);
      const button = element(
        "button",
        { type: "button", "aria-pressed": String(this.near === box), focus: light, blur: dark, click: look },
        className(box[4]),
      );
      const hover = { class: kind, pointerenter: light, pointerleave: dark };
      return element(
        "tr",
        hover,
        [button, ...cells].map((cell) => element("td", {}, cell)),
      );
    };
    const rows = [
      ...missed.map((index) => row("truth", index, image.truth[index], "", "missed")),
      ...shown.map((index) => row("found", index, found[index], number(found[index][5], 2), KINDS[found[index][6]])),
    ];
    const head = element(
      "tr",
      {},
      ["class", "score", "is"].map((text) => element("th", { scope: "col" }, text)),
    );
    return element(
      "table",
      {},
      title ? element("caption", {}, title) : null,
      element("thead", {}, head),
      element("tbody", {}, rows),
    );
  }
}

/** Names at the corners of the boxes found, and of the objects missed. */
function tags(image, found, verdict, [left, top, width, height]) {
  const percent = (part, of) => `${((100 * part) / of).toFixed(2)}%`;
  const tag = (box, kind, text) => {
    const place = kind === "found" && box[1] - top > 0.05 * height ? "above" : "inside";
    const [x, y] = [Math.max(box[0] - left, 0), Math.max(box[1] - top, 0)];
    const style = `left:${percent(x, width)};top:${percent(y, height)}`;
    return element("span", { class: `tag ${kind} ${place}`, "aria-hidden": "true", style }, text);
  };
  const missed = verdict.missed.filter((index) => image.truth[index]);
  const seen = (box) => box[0] < left + width && box[2] > left && box[1] < top + height && box[3] > top;
  return [
    ...missed
      .filter((index) => seen(image.truth[index]))
      .map((index) => tag(image.truth[index], "truth", className(image.truth[index][4]))),
    ...verdict.shown
      .filter((index) => seen(found[index]))
      .map((index) => tag(found[index], "found", `${className(found[index][4])} ${number(found[index][5], 2)}`)),
  ];
}
