// The numbers of the page, and what every script needs to show them.

const data = JSON.parse(document.getElementById("data").textContent);
const BACKGROUND = -1;
const KINDS = {
  right: "right",
  wrong_class: "wrong class",
  badly_placed: "badly placed",
  duplicate: "duplicate",
  second_class: "a second class",
  false: "false",
  ignored: "in a crowd",
};

function byId(id) {
  return document.getElementById(id);
}

/** A number as text; a missing one is a dash. */
function number(value, digits = 1) {
  return value === null || value === undefined ? "–" : value.toFixed(digits).replace("-", "−");
}

/** A score as text, with the digits that tell small ones apart. */
function scoreText(value) {
  return number(value, value < 0.1 ? 3 : 2);
}

function plural(count, one, many = `${one}s`) {
  return `${count.toLocaleString("en")} ${count === 1 ? one : many}`;
}

function className(index) {
  return index === BACKGROUND ? "background" : data.classes[index].name;
}

/** An element of HTML. Attributes that are null or false are left out; functions become listeners ("click"). */
function element(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

/** An element of SVG. */
function shape(tag, attributes = {}, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") node.addEventListener(name, value);
    else if (value !== null && value !== undefined && value !== false)
      node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}

/** Cards in a container, the first `step` of them and more on request. `make`: item -> element. */
function showInSteps(container, button, items, make, step = 24) {
  let shown = 0;
  const more = () => {
    container.append(...items.slice(shown, shown + step).map(make));
    shown = Math.min(shown + step, items.length);
    button.hidden = shown === items.length;
    button.textContent = `Show more (${items.length - shown} left)`;
  };
  container.replaceChildren();
  button.onclick = () => {
    const first = shown;
    more();
    container.children[first]?.querySelector("button")?.focus();
  };
  more();
}
