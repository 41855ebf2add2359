// What the page does with a script: sort tables, hide shown texts again. Without one, all of it can be read.
"use strict";

// A cell's sort key: data-value where a number stands behind the text, else the text. Empty cells sort last.
const keyOf = (row, index) => {
  const cell = row.cells[index];
  const value = cell === undefined ? "" : (cell.dataset.value ?? cell.textContent).trim();
  const number = Number(value);
  return value === "" ? null : Number.isNaN(number) ? value : number;
};

const compare = (a, b) => {
  if (typeof a === "number" && typeof b === "number") return a - b;
  return String(a).localeCompare(String(b), undefined, { numeric: true });
};

const sortBy = (table, header, descending) => {
  const index = header.cellIndex;
  const body = table.tBodies[0];
  const rows = Array.from(body.rows, (row) => ({ row, key: keyOf(row, index) }));
  rows.sort((a, b) => {
    if (a.key === null || b.key === null) return (a.key === null) - (b.key === null);
    return descending ? compare(b.key, a.key) : compare(a.key, b.key);
  });
  body.append(...rows.map(({ row }) => row));
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", descending ? "descending" : "ascending");
};

for (const table of document.querySelectorAll("table.sortable")) {
  for (const header of table.tHead.rows[0].cells) {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "sort";
    button.append(...header.childNodes);
    button.title = "Sort by this column";
    // Numbers begin with the largest, where the trouble is; text with A.
    button.addEventListener("click", () => {
      const now = header.getAttribute("aria-sort");
      const first = header.classList.contains("text") ? "ascending" : "descending";
      const next = now === null ? first : now === "descending" ? "ascending" : "descending";
      sortBy(table, header, next === "descending");
    });
    header.append(button);
  }
}

const hide = document.getElementById("hide-texts");
if (hide !== null) {
  const texts = document.querySelectorAll("details.reveal");
  const update = () => { hide.hidden = !Array.from(texts).some((text) => text.open); };
  for (const text of texts) text.addEventListener("toggle", update);
  hide.addEventListener("click", () => { for (const text of texts) text.open = false; });
  update();
}
