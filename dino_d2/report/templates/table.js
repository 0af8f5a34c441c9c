// Tables that are sorted by the button in a heading: numbers from the largest, text from A; again for the reverse.

function sortTable(table, column) {
  const headings = [...table.tHead.rows[0].cells];
  const text = headings[column].dataset.kind === "text";
  const before = headings[column].getAttribute("aria-sort");
  const ascending = before ? before === "descending" : text;
  const order = new Intl.Collator(undefined, { numeric: true, sensitivity: "base" });
  const value = (row) => row.cells[column].dataset.value;
  const compare = (a, b) => {
    if (value(a) === "" || value(b) === "") return (value(a) === "") - (value(b) === ""); // missing ones last
    const difference = text ? order.compare(value(a), value(b)) : value(a) - value(b);
    return ascending ? difference : -difference;
  };
  table.tBodies[0].append(...[...table.tBodies[0].rows].sort(compare));
  for (const heading of headings) heading.removeAttribute("aria-sort");
  headings[column].setAttribute("aria-sort", ascending ? "ascending" : "descending");
}

for (const table of document.querySelectorAll("table.sortable")) {
  [...table.tHead.rows[0].cells].forEach((heading, column) => {
    if (heading.dataset.kind) heading.querySelector("button").addEventListener("click", () => sortTable(table, column));
  });
}

/** Show only the rows whose first cell contains what is typed. */
function filterRows(input, table) {
  input.addEventListener("input", () => {
    const wanted = input.value.trim().toLocaleLowerCase();
    for (const row of table.tBodies[0].rows) {
      row.hidden = !row.cells[0].dataset.value.toLocaleLowerCase().includes(wanted);
    }
  });
}
