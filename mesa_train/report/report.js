"use strict";
(() => {
  for (const table of document.querySelectorAll("table.sortable")) {
    const body = table.tBodies[0];
    const original = [...body.rows];
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, index) => {
      head.querySelector("button").addEventListener("click", () => {
        const order = { none: "ascending", ascending: "descending", descending: "none" };
        const next = order[head.getAttribute("aria-sort")];
        heads.forEach((other) => other.setAttribute("aria-sort", "none"));
        head.setAttribute("aria-sort", next);
        if (next === "none") {
          body.append(...original);
          return;
        }
        const sign = next === "ascending" ? 1 : -1;
        const value = (row) => {
          const cell = row.cells[index];
          if (cell.dataset.value === undefined) return cell.textContent;
          return cell.dataset.value === "" ? null : Number(cell.dataset.value);
        };
        // A row without a value stays at the end, whichever way.
        body.append(...[...original].sort((a, b) => {
          const [x, y] = [value(a), value(b)];
          if (x === null || y === null) return (x === null) - (y === null);
          return sign * (typeof x === "number" ? x - y : x.localeCompare(y));
        }));
      });
    });
  }
  const nodes = [...document.querySelectorAll(".tree details")];
  for (const button of document.querySelectorAll("[data-open]")) {
    button.addEventListener("click", () => {
      for (const node of nodes) node.open = button.dataset.open === "1";
    });
  }
  let before = null;
  addEventListener("beforeprint", () => {
    before = nodes.map((node) => node.open);
    for (const node of nodes) node.open = true;
  });
  addEventListener("afterprint", () => {
    if (before !== null) nodes.forEach((node, index) => { node.open = before[index]; });
    before = null;
  });
})();
