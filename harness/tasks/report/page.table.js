// The table of runs: its columns, filter, order, baseline and files.

/** A column: `of` returns the value to sort by, `show` the content of the cell, `ends` the interval. */
function column(key, title, of, show = (value) => number(value), kind = "number", ends = () => null) {
  return { key, title, of, show: (row) => (known(of(row)) ? [].concat(show(of(row), row)) : []), kind, ends };
}

/** A column of an estimate with an interval. */
const estimate = (key, title, part) => column(key, title, (row) => part(row)?.median ?? part(row)?.value, measured(part), "number",
  (row) => part(row) && (part(row).ci95 ?? part(row).range));

const RUN = column("run", "run", (row) => row.label, (value, row) => folderLink(row, value), "text");
const RATIO = column("ratio", "times as fast as the baseline", (row) => baselineRatio(row)?.value, (value, row) => {
  const { ci95 } = baselineRatio(row);
  return baselineOf(row) === row ? "baseline" : [number(value, 3), ci95 && spread(...ci95, (x) => number(x, 3))];
}, "number", (row) => baselineRatio(row)?.ci95);
const COLUMNS = [
  column("state", "state", (row) => row.state, toned, "text"),
  estimate("latency", "latency, ms", (row) => row.latency),
  RATIO,
  column("nfe", "evaluations", (row) => row.nfe, (value, row) => [number(value), row.cache && element("span", { class: "spread" }, `${number(row.cache.branches_computed, 3)} of ${number(row.cache.branches, 3)} branches`)]),
  column("verdict", "fidelity", (row) => row.verdict, (value, row) => element("span", { class: TONES[value] ?? "", title: `declared ${words(row.declared)}` }, words(value)), "text"),
  column("rel_l2", "pixel error", (row) => row.pixel?.rel_l2, (value, row) => [row.pixel.identical ? "0, identical" : number(value, 2), withinRounding(row) && !row.pixel.identical && element("span", { class: "spread" }, "rounding")].filter(Boolean)),
  estimate("distance", "distance (0 = as requested)", (row) => row.distance),
  column("top1", "top-1", (row) => row.top1?.value, (value, row) => [percent(value), spread(...row.top1.ci95, (x) => number(100 * x, 3))], "number", (row) => row.top1?.ci95),
  estimate("clip_score", "CLIP score", (row) => row.clip_score),
  column("frechet", "Frechet distance", (row) => row.frechet),
  ...page.keys.map((key) => column(`key:${key}`, key, (row) => row.values[key],
    (value) => element("span", { title: value }, short(String(value), 60)), "text")),
  estimate("first_step", "first solver step, ms", (row) => row.first_step),
  estimate("step", "solver step, ms", (row) => row.step),
  column("offered", "offered, requests/s", (row) => row.load?.offered_per_s),
  column("throughput", "answers/s", (row) => row.load?.throughput_per_s),
  column("p50", "p50 under load, ms", (row) => row.load?.latency_ms?.p50),
  column("p99", "p99 under load, ms", (row) => row.load?.latency_ms?.p99, (value, row) => [number(value),
    element("span", { class: "spread" }, `of ${row.load.latency_ms.n}`)]),
  column("goodput", "good answers/s", (row) => row.load?.goodput_per_s, (value, row) => [number(value),
    element("span", { class: "spread" }, `within ${number(row.load.slo_ms)} ms`)]),
  column("carried", "images per forward", (row) => row.load?.images_per_evaluation, (value) => number(value, 3)),
  column("unanswered", "not ok", (row) => row.load && row.load.sent - (row.load.outcomes.ok ?? 0), (value, row) => [number(value),
    element("span", { class: "spread" }, Object.entries(row.load.outcomes).filter(([kind]) => kind !== "ok").map(([kind, count]) => `${count} ${kind}`).join(", "))]),
  column("speedup", "speed-up of ranks", speedup, (value, row) => [number(value, 3), speedupSpread(row) && spread(...speedupSpread(row), (x) => number(x, 3))], "number", speedupSpread),
  column("images", "images", (row) => row.images),
  column("memory", "peak memory, MiB", (row) => row.memory_mib),
  column("tflops", "TFLOP/s", (row) => row.tflops, (value) => number(value, 3)),
  column("ceiling", "of a matrix product", (row) => row.ceiling_share, percent),
  column("comm", "sent by a rank, MB", (row) => row.comm_mb, (value) => number(value, 3)),
  ...[...new Set(rows.flatMap((row) => Object.keys(row.metrics)))].map((name) => column(`metric:${name}`, words(name), (row) => row.metrics[name])),
  column("started", "date, UTC", (row) => row.started, (value) => value.slice(0, 16).replace("T", " "), "text"),
  column("commit", "commit", (row) => row.commit, (value) => value, "text"),
  column("front", "best of its search", (row) => row.front, (value) => value, "text"),
  column("error", "error", (row) => row.error, (value) => element("span", { title: value }, value), "error"),
  column("folder", "folder", (row) => row.folder, (value, row) => folderLink(row, value), "folder"),
].filter((each) => each === RATIO || rows.some((row) => known(each.of(row)) && each.of(row) !== 0));

const columns = () => COLUMNS.filter((each) => each !== RATIO || view.baseline);

/** Whether a run's error is one that rounding alone would cause. */
const withinRounding = (row) => Boolean(row.pixel) && (row.pixel.identical || (known(row.rounding) && row.pixel.rel_l2 <= row.rounding));

function speedup(row) {
  return row.comparison ? headline(row).ratio : row.scaling?.speedup.value;
}

function speedupSpread(row) {
  return row.comparison ? headline(row).interval : row.scaling?.speedup.ci95;
}

/** The first ratio of a comparison: of the whole request, or of an answer under load. */
function headline(row) {
  return Object.values(row.comparison.ratios)[0];
}

// ---------------------------------------------------------------- baseline

const baselineCache = { choice: null, of: new Map(), ratio: new Map() };

/** The values of a run as one text, without some keys. */
const valuesApart = (row, apart) => JSON.stringify(Object.entries(row.values).filter(([key, value]) => !apart.includes(key) && known(value)));

/** The run that another is held against: the chosen one, or the one that differs from it in one key only. */
function baselineOf(row) {
  const [kind, rest] = [view.baseline.slice(0, 4), view.baseline.slice(4)];
  if (kind === "run:") return rows[Number(rest)];
  const [key, value] = [rest.slice(0, rest.indexOf("=")), rest.slice(rest.indexOf("=") + 1)];
  if (baselineCache.choice !== view.baseline) {
    const timed = rows.filter((each) => each.latency && String(each.values[key]) === value);
    Object.assign(baselineCache, { choice: view.baseline, ratio: new Map(), of: Map.groupBy(timed, (each) => valuesApart(each, [key])) });
  }
  const found = baselineCache.of.get(valuesApart(row, [key])) ?? [];
  const beside = found.filter((each) => parent(each) === parent(row)); // of the same sweep, if several have one
  const candidates = beside.length ? beside : found;
  return candidates.length === 1 ? candidates[0] : null;
}

function baselineRatio(row) {
  if (!view.baseline) return null;
  const base = baselineOf(row);
  const id = `${base?.id} ${row.id}`;
  if (!baselineCache.ratio.has(id)) baselineCache.ratio.set(id, latencyRatio(base, row));
  return baselineCache.ratio.get(id);
}

/** Offer every run, and every value of a key that at least two runs share, as the baseline. */
function addBaselines() {
  const option = (value, text) => element("option", { value }, short(text, 60));
  const timed = rows.filter((row) => row.latency);
  const pairs = page.keys.flatMap((key) => {
    const shared = Map.groupBy(timed.filter((row) => known(row.values[key])), (row) => String(row.values[key]));
    return shared.size < 2 || shared.size > 20 ? [] : [...shared.keys()].sort(compareText).map((value) => [key, value]);
  });
  $("baseline").append(
    element("optgroup", { label: "the run that differs in this only" }, ...pairs.map(([key, value]) => option(`key:${key}=${value}`, `${key}=${value}`))),
    element("optgroup", { label: "one run" }, ...timed.map((row) => option(`run:${row.id}`, row.label))));
  $("baseline").addEventListener("change", ({ target }) => { view.baseline = target.value; render(); });
}

// ---------------------------------------------------------------- filter and order

const searched = new Map(rows.map((row) => [row, [row.folder, row.state, row.verdict, row.error, row.label,
  ...Object.entries(row.values).map(([key, value]) => `${key}=${value}`)].filter(known).map((text) => `${text} `.toLowerCase()).join("")]));

function matches(row) {
  return view.words.every((word) => searched.get(row).includes(word))
    && [...view.picks].every(([key, text]) => picked(row, key) === text);
}

const picked = (row, key) => (key === "state" ? row.state : known(row.values[key]) ? String(row.values[key]) : "(none)");

function ordered(shown) {
  const { key, down } = view.sort;
  const by = [RUN, ...columns()].find((each) => each.key === key);
  if (!by) return shown;
  const compare = (a, b) => (typeof a === "number" && typeof b === "number" ? a - b : compareText(String(a), String(b)));
  return shown.toSorted((a, b) => {
    const [x, y] = [by.of(a), by.of(b)];
    if (!known(x) || !known(y)) return known(y) - known(x); // rows without a value are last in either order
    return down ? compare(y, x) : compare(x, y);
  });
}

// ---------------------------------------------------------------- the table and its files

/** A dotted key that may break after a dot. */
const breakable = (key) => key.split(/(?<=\.)/).flatMap((part) => [part, element("wbr", {})]);

function renderTable(shown) {
  const heads = [RUN, ...columns()].map(({ key, title }) => {
    const sorted = view.sort.key === key ? (view.sort.down ? "descending" : "ascending") : "none";
    const arrow = { ascending: " ▲", descending: " ▼", none: "" }[sorted];
    const button = element("button", { type: "button", "data-sort": key }, ...breakable(title), arrow);
    return element("th", { scope: "col", "aria-sort": sorted }, button);
  });
  const body = paged("table", shown, 100, () => renderTable(shown)).map((row) => element("tr", {}, element("th", { scope: "row" }, ...RUN.show(row)),
    ...columns().map((each) => element("td", { class: each.kind }, ...each.show(row)))));
  const focused = document.activeElement?.dataset?.sort;
  $("table").replaceChildren(element("thead", {}, element("tr", {}, ...heads)), element("tbody", {}, ...body));
  if (focused) document.querySelector(`[data-sort="${CSS.escape(focused)}"]`)?.focus();
  $("count").textContent = `${shown.length} of ${rows.length} runs`;
}

/** The runs shown as CSV (RFC 4180), with both ends of an interval as columns. */
function asCsv(shown) {
  const all = [RUN, ...columns()].flatMap((each) => {
    const bounded = shown.some((row) => each.ends(row));
    return [[each.title, each.of], ...(bounded ? [0, 1].map((k) => [`${each.title} ${["low", "high"][k]}`, (row) => each.ends(row)?.[k]]) : [])];
  });
  const quoted = (value) => (/[",\r\n]/.test(String(value)) ? `"${String(value).replaceAll('"', '""')}"` : String(value));
  const lines = [all.map(([title]) => title), ...shown.map((row) => all.map(([, of]) => of(row) ?? ""))];
  return lines.map((line) => line.map(quoted).join(",")).join("\r\n") + "\r\n";
}

/** The runs shown as JSON, without their images. */
const asJson = (shown) => JSON.stringify({ root: page.root, made: page.made, keys: page.keys,
  rows: shown.map(({ id, grid, ...row }) => row) }, null, 1);

function save(name, type, text) {
  const link = element("a", { href: URL.createObjectURL(new Blob([text], { type })), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
}
