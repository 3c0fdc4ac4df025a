// The sections in their order, and what a reader types and clicks.

const SECTIONS = { tradeoff: renderTradeoff, latency: renderStages, ranks: renderScaling, caches: renderBaselines, loads: renderCurve,
  compared: renderSweeps, history: renderHistory, images: renderGrids, datasets: renderCategories, notes: renderNotes, provenance: renderProvenance };

/** The rows that match, in the order of the table. */
const shownRows = () => ordered(rows.filter(matches));

/** Show every section that has something to show; the last one says why the others are absent. */
function render() {
  const shown = shownRows();
  renderTable(shown);
  const absent = Object.entries(SECTIONS).flatMap(([id, part]) => {
    const [section, link] = [$(id), document.querySelector(`nav a[href="#${id}"]`)];
    section.hidden = false; // a chart takes its width from its section
    const reason = part(shown);
    section.hidden = link.hidden = reason !== null;
    if (reason !== null) clear(section);
    return section.hidden ? [element("dt", {}, section.querySelector("h2").textContent), element("dd", {}, reason)] : [];
  });
  $("absent").hidden = !absent.length;
  $("absent-list").replaceChildren(...absent);
}

/** Take the content of a hidden section away. */
function clear(section) {
  section.querySelectorAll(".chart").forEach((chart) => Plotly.purge(chart));
  section.querySelectorAll("table").forEach((table) => table.replaceChildren());
}

function addPick(key) {
  const choices = [...new Set(rows.map((row) => picked(row, key)))].sort(compareText);
  if (choices.length < 2) return;
  const options = choices.map((text) => element("option", { value: text }, short(text, 40)));
  const select = element("select", { "data-pick": key }, element("option", { value: "", "data-all": "" }, "all"), ...options);
  select.addEventListener("change", () => {
    if (select.selectedIndex) view.picks.set(key, select.value); else view.picks.delete(key);
    render();
  });
  $("picks").append(element("label", {}, key, select));
}

function addSelector(name, choices) {
  $(name).append(...choices.map(([value, text]) => element("option", { value }, text)));
  $(name).value = view[name];
  $(name).addEventListener("change", ({ target }) => { view[name] = target.value; render(); });
}

/** Keys by which the first figure can be coloured and split, those of what is compared most often first. */
function groupingKeys() {
  const usual = ["scheduler.solver.name", "cache", "parallel", "attention.backend", "model.name", "scheduler.family"];
  const count = (key) => valuesIn(rows, key).length;
  return [...usual.filter((key) => page.keys.includes(key)), ...page.keys.filter((key) => !usual.includes(key))].filter((key) => count(key) > 1);
}

/** The first figure as it opens: quality against evaluations, or the error against latency if errors have one reference. */
function chooseFigure() {
  const errors = rows.filter((row) => row.pixel);
  const oneReference = new Set(errors.map((row) => row.reference)).size === 1 && separates(METRICS.rel_l2);
  const order = oneReference ? ["rel_l2", ...Object.keys(METRICS)] : Object.keys(METRICS);
  view.metric = order.find((key) => separates(METRICS[key])) ?? order.find((key) => rows.some((row) => scored(row, METRICS[key]))) ?? "rel_l2";
  view.cost = ["rel_l2", "psnr_db"].includes(view.metric) || !varies((row) => row.nfe) ? "latency" : "nfe";
  const keys = groupingKeys().filter((key) => ![STEPS, "request.prompts"].includes(key));
  view.facet = keys.includes("scheduler.family") && keys.length > 1 && valuesIn(rows, "scheduler.family").length <= 6 ? "scheduler.family" : "";
  view.colour = keys.find((key) => key !== view.facet && valuesIn(rows, key).length <= 16) ?? "";
  if (!separates(METRICS[view.metric])) $("ranks").after($("tradeoff")); // one level is no first figure
}

function addFigure() {
  chooseFigure();
  const offered = (parts, some) => Object.entries(parts).filter(([, part]) => rows.some((row) => some(row, part))).map(([key, { name }]) => [key, name]);
  addSelector("metric", offered(METRICS, scored));
  addSelector("cost", offered(COSTS, (row, cost) => known(cost.of(row))));
  const keys = groupingKeys();
  addSelector("colour", [["", "nothing"], ...keys.map((key) => [key, key])]);
  addSelector("facet", [["", "nothing"], ...keys.filter((key) => valuesIn(rows, key).length <= 12).map((key) => [key, key])]);
}

function start() {
  const states = [...Map.groupBy(rows, (row) => row.state)].map(([state, own]) => `${own.length} ${state}`).join(", ");
  $("about").textContent = `${rows.length} runs in ${page.root}: ${states}. Made on ${page.made}.`;
  document.title = `Triptych report: ${page.root}`;
  ["state", ...page.keys].forEach(addPick);
  addBaselines();
  addSweeps();
  addFigure();
  $("words").addEventListener("input", ({ target }) => {
    // steps=4 must not match steps=40, but a half-typed word matches what it may become
    view.words = target.value.toLowerCase().split(/\s+/).filter(Boolean).map((word) => (/=./.test(word) ? `${word} ` : word));
    render();
  });
  $("filter").addEventListener("submit", (event) => event.preventDefault());
  $("filter").addEventListener("reset", () => { view.words = []; view.picks.clear(); view.baseline = ""; render(); });
  $("csv").addEventListener("click", () => save("runs.csv", "text/csv", asCsv(shownRows())));
  $("json").addEventListener("click", () => save("runs.json", "application/json", asJson(shownRows())));
  $("table").addEventListener("click", ({ target }) => {
    const key = target.closest("[data-sort]")?.dataset.sort;
    if (key === undefined) return;
    view.sort = { key, down: view.sort.key === key && !view.sort.down };
    render();
  });
  for (const query of [NARROW, matchMedia("(prefers-color-scheme: dark)")]) query.addEventListener("change", render);
  render();
}

start();
