"use strict";
(() => {
  const tip = document.getElementById("tip");
  document.addEventListener("mousemove", (event) => {
    const mark = event.target.closest ? event.target.closest("[data-tip]") : null;
    tip.hidden = !mark;
    if (!mark) return;
    tip.textContent = mark.getAttribute("data-tip");
    const left = Math.min(event.clientX + 14, window.innerWidth - tip.offsetWidth - 12);
    const below = event.clientY + 18 + tip.offsetHeight < window.innerHeight;
    tip.style.left = Math.max(left, 8) + "px";
    tip.style.top = (below ? event.clientY + 18 : event.clientY - tip.offsetHeight - 10) + "px";
  });

  const root = document.documentElement;
  document.getElementById("theme").addEventListener("click", () => {
    const system = window.matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
    root.dataset.theme = (root.dataset.theme || system) === "dark" ? "light" : "dark";
  });

  const copy = document.getElementById("copy");
  if (copy) copy.addEventListener("click", () => {
    const code = document.getElementById("apply");
    const range = document.createRange();
    range.selectNodeContents(code);
    const selection = window.getSelection();
    selection.removeAllRanges();
    selection.addRange(range);
    const done = () => { copy.textContent = "copied"; };
    if (navigator.clipboard) navigator.clipboard.writeText(code.textContent).then(done, () => {});
    else if (document.execCommand("copy")) done();
  });

  const valueOf = (row, column, isNumber) => {
    const cell = row.cells[column];
    const value = cell.dataset.value !== undefined ? cell.dataset.value : cell.textContent.trim();
    if (!isNumber) return cell.textContent.trim();
    return value === "" ? -Infinity : Number(value);
  };
  const compare = (a, b) => (typeof a === "number" ? a - b : a.localeCompare(b, "en", { numeric: true }));
  const sortBy = (table, column, head) => {
    const isNumber = head.dataset.sort === "number";
    const first = isNumber ? "descending" : "ascending";
    const other = isNumber ? "ascending" : "descending";
    const body = table.tBodies[0];
    [...body.rows].forEach((row, at) => { row.dataset.at = row.dataset.at || at; });
    const now = head.getAttribute("aria-sort");
    const order = now === first ? other : now === other ? "" : first;
    for (const each of table.tHead.rows[0].cells) each.removeAttribute("aria-sort");
    if (order) head.setAttribute("aria-sort", order);
    const rows = [...body.rows].filter((row) => !row.classList.contains("detail"));
    const pairs = rows.map((row) => {
      const next = row.nextElementSibling;
      return { row, detail: next && next.classList.contains("detail") ? next : null };
    });
    const sign = order === "ascending" ? 1 : -1;
    const inModelOrder = (a, b) => Number(a.row.dataset.at) - Number(b.row.dataset.at);
    const byColumn = (a, b) => sign * compare(valueOf(a.row, column, isNumber), valueOf(b.row, column, isNumber));
    pairs.sort(order ? byColumn : inModelOrder);
    for (const pair of pairs) {
      body.append(pair.row);
      if (pair.detail) body.append(pair.detail);
    }
  };
  for (const table of document.querySelectorAll("#table, table.sortable")) {
    [...table.tHead.rows[0].cells].forEach((head, column) => {
      if (head.dataset.sort) head.addEventListener("click", () => sortBy(table, column, head));
    });
  }

  const table = document.getElementById("table");
  if (!table) return;
  const toggle = (row) => {
    const detail = row && row.nextElementSibling;
    if (detail && detail.classList.contains("detail")) detail.hidden = !detail.hidden;
  };
  const body = table.tBodies[0];
  body.addEventListener("click", (event) => {
    if (!window.getSelection().toString()) toggle(event.target.closest("tr.row"));
  });
  body.addEventListener("keydown", (event) => {
    if (event.key === "Enter") toggle(event.target.closest("tr.row"));
  });
  const filter = document.getElementById("filter");
  const shown = document.getElementById("shown");
  const rows = [...body.querySelectorAll("tr.row")];
  filter.addEventListener("input", () => {
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    let count = 0;
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      const fits = words.every((word) => text.includes(word));
      row.hidden = !fits;
      if (!fits && row.nextElementSibling) row.nextElementSibling.hidden = true;
      count += fits ? 1 : 0;
    }
    shown.textContent = count + " of " + rows.length + " layers";
  });
})();
