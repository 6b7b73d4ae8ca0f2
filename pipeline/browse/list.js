"use strict";
// Which pairs are found, in which order, and which one is shown.
browse.start = (index) => {
  const PAGE = 50;
  const at = (id) => document.getElementById(id);
  const { columns, splits, categories, marks } = index;
  const total = columns.id.length;
  const rowOf = new Map(columns.id.map((id, row) => [id, row]));
  browse.rowOf = (id) => rowOf.get(id);
  const letters = ["P", "R", "T", "X"];
  let found = [...Array(total).keys()];
  let page = 0;
  let current = null; // row of the pair that is shown
  let asked = 0; // number of the latest search; an older one gives up

  const bound = (id) => (at(id).value === "" || !Number.isFinite(at(id).valueAsNumber) ? null : at(id).valueAsNumber);
  const within = (value, least, most) =>
    (least === null && most === null) || (value !== null && (least === null || value >= least) && (most === null || value <= most));

  /** What the small columns decide, as a predicate of rows. */
  const filter = () => {
    const [split, category, kind, missing] = ["split", "category", "marks", "missing-rows"].map((id) => at(id).value);
    const bounds = ["margin-least", "margin-most", "length-least", "length-most"].map(bound);
    const bit = 1 << marks.indexOf(kind);
    return (row) =>
      (split === "" || splits[columns.split[row]] === split) &&
      (category === "" || columns.category[row] === Number(category)) &&
      within(columns.margin[row], bounds[0], bounds[1]) &&
      within(Math.max(columns.chosen[row], columns.rejected[row]), bounds[2], bounds[3]) &&
      (kind === "" || (kind === "none" ? columns.marks[row] === 0 : kind === "some" ? columns.marks[row] > 0 : (columns.marks[row] & bit) > 0)) &&
      (missing === "" || (missing === "0" ? columns.missing[row] === 0 : columns.missing[row] > 0));
  };

  /** Those of `rows` whose texts hold `words`, read file by file; null where another search began meanwhile. */
  const search = async (rows, words, mine) => {
    const hits = [];
    for (let number = 0; number < index.files; number++) {
      const some = rows.filter((row) => Math.floor(row / index.pairs_a_file) === number);
      rows = rows.slice(some.length);
      if (!some.length) continue;
      const texts = await browse.textsOf(number);
      if (mine !== asked) return null;
      for (const row of some)
        if (texts[row % index.pairs_a_file].some((text) => text.toLowerCase().includes(words))) hits.push(row);
      if (number % 20 === 0) at("state").textContent = `Searching: ${number + 1} of ${index.files} files`;
    }
    return hits;
  };

  const key = (order) => (order === "difference" ? (row) => columns.chosen[row] - columns.rejected[row] : (row) => columns[order][row]);
  const sorted = (rows) => {
    const value = key(at("order").value);
    const sign = at("descending").checked ? -1 : 1;
    // A pair without a margin comes last either way.
    return rows.sort((a, b) => {
      const [x, y] = [value(a), value(b)];
      if (x === null || y === null) return (x === null) - (y === null) || a - b;
      return sign * (x - y) || a - b;
    });
  };

  const cell = (text, number = false) => {
    const made = document.createElement("td");
    made.textContent = text;
    if (number) made.className = "n";
    return made;
  };
  const shown = (value, digits) => (value === null ? "–" : value.toFixed(digits).replace("-", "−"));
  const named = (text) => {
    const made = cell(text);
    made.className = "category";
    made.title = text;
    return made;
  };
  const line = (row) => {
    const made = document.createElement("tr");
    const link = document.createElement("a");
    link.href = `#pair=${columns.id[row]}`;
    link.textContent = columns.id[row];
    const head = document.createElement("th");
    head.scope = "row";
    head.append(link);
    const also = letters.filter((_, bit) => columns.marks[row] & (1 << bit)).join("");
    made.append(head, cell(splits[columns.split[row]]), named(categories[columns.category[row]] ?? ""),
      cell(shown(columns.margin[row], 2), true), cell(shown(columns.token_margin[row], 3), true),
      cell(`${columns.chosen[row]} / ${columns.rejected[row]}`, true), cell(also));
    if (row === current) made.setAttribute("aria-current", "true");
    return made;
  };
  const list = () => {
    const last = Math.max(0, Math.ceil(found.length / PAGE) - 1);
    page = Math.max(0, Math.min(page, last));
    at("rows").replaceChildren(...found.slice(page * PAGE, (page + 1) * PAGE).map(line));
    at("page").textContent = `page ${page + 1} of ${last + 1}`;
    at("earlier").disabled = page === 0;
    at("later").disabled = page === last;
  };
  const turn = (step) => {
    page += step;
    list();
  };

  const update = async () => {
    const mine = ++asked;
    const words = at("search").value.toLowerCase();
    const accept = filter();
    try {
      let rows = [...Array(total).keys()].filter(accept);
      if (words) rows = await search(rows, words, mine);
      if (rows === null) return;
      found = sorted(rows);
      page = 0;
      at("state").textContent = `${found.length.toLocaleString("en")} of ${total.toLocaleString("en")} pairs found`;
      list();
    } catch (error) {
      at("state").textContent = error.message;
    }
  };

  const open = async (row) => {
    current = row;
    const place = found.indexOf(row);
    if (place >= 0) page = Math.floor(place / PAGE);
    list();
    try {
      const pair = await browse.pair(row);
      if (row !== current) return; // another one was asked for meanwhile
      const facts = { category: categories[columns.category[row]] ?? null, split: splits[columns.split[row]] };
      for (const name of ["id", "margin", "token_margin"]) facts[name] = columns[name][row];
      browse.drawPair(at("pair"), facts, pair);
      at("rows").querySelector("[aria-current]")?.scrollIntoView({ block: "nearest" });
    } catch (error) {
      at("pair").textContent = error.message;
    }
  };
  const follow = () => {
    const asked = /^#pair=(\d+)$/.exec(location.hash);
    if (!asked) return found.length && current === null ? open(found[0]) : undefined;
    const row = rowOf.get(Number(asked[1]));
    if (row === undefined) at("pair").textContent = `Pair ${asked[1]} is not on this page: refcache browse wrote a choice of the pairs.`;
    else return open(row);
  };
  const step = (by) => {
    if (!found.length) return;
    const place = found.indexOf(current);
    const next = place < 0 ? 0 : Math.max(0, Math.min(found.length - 1, place + by));
    location.hash = `#pair=${columns.id[found[next]]}`;
  };

  at("filters").addEventListener("input", update);
  at("filters").addEventListener("submit", (event) => event.preventDefault());
  at("filters").addEventListener("reset", () => setTimeout(update)); // once the fields are empty
  at("earlier").addEventListener("click", () => turn(-1));
  at("later").addEventListener("click", () => turn(1));
  addEventListener("hashchange", follow);
  addEventListener("keydown", (event) => {
    const typing = event.target.closest("input, select, textarea");
    if (typing && event.key === "Escape") typing.blur();
    if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "/") at("search").focus();
    else if (event.key === "j" || event.key === "ArrowRight") step(1);
    else if (event.key === "k" || event.key === "ArrowLeft") step(-1);
    else return;
    event.preventDefault();
  });
  update();
  follow();
};
