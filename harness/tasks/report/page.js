"use strict";
// Renders the page from its JSON. Text from records is inserted as text, never as markup.

const page = JSON.parse(document.getElementById("data").textContent);
const rows = page.rows.map((row, id) => ({ ...row, id }));
const view = { words: [], picks: new Map(), sort: { key: "", down: false }, metric: "rel_l2" };

const COLOURS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8C8C8C", "#B0A000"]; // Okabe and Ito 2008
const TONES = { ok: "good", failed: "bad", oom: "bad", unsupported: "fair", cancelled: "fair",
  identical: "good", within_floor: "good", approximate: "fair", broken: "bad" };

// ---------------------------------------------------------------- text

const $ = (id) => document.getElementById(id);

function element(tag, attributes, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children.filter((child) => child != null));
  return made;
}

const none = (text) => element("p", { class: "none" }, text);
const known = (value) => value !== null && value !== undefined && value !== "";
const words = (name) => name.replaceAll("_", " ");
const percent = (share) => `${number(100 * share, 3)} %`;

function number(value, digits = 4) {
  if (value !== 0 && Math.abs(value) < 1e-3) return value.toExponential(1);
  return value.toLocaleString("en", { maximumSignificantDigits: digits });
}

// plotly interprets some tags in text as markup
const plain = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
const short = (text, length) => (text.length > length ? `${text.slice(0, length - 1)}…` : text);

// ---------------------------------------------------------------- columns

const spread = (low, high, show = number) => element("span", { class: "spread" }, `${show(low)} to ${show(high)}`);

/** A column of the table: `of` returns the value to sort by, `show` the content of the cell. */
function column(key, title, of, show = (value) => number(value), kind = "number") {
  return { key, title, of, show: (row) => (known(of(row)) ? [].concat(show(of(row), row)) : []), kind };
}

const toned = (value) => element("span", { class: TONES[value] ?? "" }, words(value));
/** The interval of a median, its level if that is below 95 %, or the range of few measurements. */
function measuredSpread({ ci95, range, coverage }) {
  if (ci95) return [spread(...ci95), known(coverage) && coverage < 0.95 ? ` (${percent(coverage)})` : null];
  return range ? [spread(...range), " (range)"] : [];
}
const measured = (of) => (value, row) => [number(value), ...measuredSpread(of(row))];
const ends = ({ ci95, range, median, value }) => ci95 ?? range ?? [median ?? value, median ?? value];

const COLUMNS = [
  column("state", "state", (row) => row.state, toned, "text"),
  ...page.keys.map((key) => column(`key:${key}`, key, (row) => row.values[key],
    (value) => element("span", { title: value }, short(String(value), 60)), "text")),
  column("latency", "latency, ms", (row) => row.latency?.median, measured((row) => row.latency)),
  column("first_step", "first solver step, ms", (row) => row.first_step?.median, measured((row) => row.first_step)),
  column("step", "solver step, ms", (row) => row.step?.median, measured((row) => row.step)),
  column("nfe", "evaluations", (row) => row.nfe, (value, row) => [number(value), row.cache && element("span", { class: "spread" }, `${number(row.cache.branches_computed, 3)} of ${number(row.cache.branches, 3)} branches`)]),
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
  column("speedup", "speed-up", speedup, (value, row) => [number(value, 3), speedupSpread(row) && spread(...speedupSpread(row), (x) => number(x, 3))]),
  column("images", "images", (row) => row.images),
  column("memory", "peak memory, MiB", (row) => row.memory_mib),
  column("tflops", "TFLOP/s", (row) => row.tflops, (value) => number(value, 3)),
  column("ceiling", "of a matrix product", (row) => row.ceiling_share, percent),
  column("comm", "sent by a rank, MB", (row) => row.comm_mb, (value) => number(value, 3)),
  column("verdict", "fidelity", (row) => row.verdict, (value, row) => [toned(value),
    element("span", { class: "spread" }, `declared ${words(row.declared)}`)], "text"),
  column("rel_l2", "pixel error, relative L2", (row) => row.pixel?.rel_l2, (value, row) => (row.pixel.identical ? "0, identical" : number(value, 2))),
  column("distance", "distance (0 = as requested)", (row) => row.distance?.value, measured((row) => row.distance)),
  column("top1", "top-1", (row) => row.top1?.value, (value, row) => [percent(value), spread(...row.top1.ci95, percent)]),
  ...[...new Set(rows.flatMap((row) => Object.keys(row.metrics)))].map((name) => column(`metric:${name}`, words(name), (row) => row.metrics[name])),
  column("front", "best of its search", (row) => row.front, (value) => value, "text"),
  column("error", "error", (row) => row.error, (value) => value, "error"),
  column("folder", "folder", (row) => row.folder, (value) => value, "folder"),
].filter(({ of }) => rows.some((row) => known(of(row)) && of(row) !== 0));
const RUN = column("run", "run", (row) => row.label, (value) => value, "text");

function speedup(row) {
  return row.comparison ? headline(row).ratio : row.scaling?.speedup.value;
}

function speedupSpread(row) {
  return row.comparison ? headline(row).interval : row.scaling.speedup.ci95;
}

/** The first ratio of a comparison: of the whole request, or of an answer under load. */
function headline(row) {
  return Object.values(row.comparison.ratios)[0];
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
  const by = [RUN, ...COLUMNS].find((each) => each.key === key);
  if (!by) return shown;
  const compare = (a, b) => (typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), "en", { numeric: true }));
  return shown.toSorted((a, b) => {
    const [x, y] = [by.of(a), by.of(b)];
    if (!known(x) || !known(y)) return known(y) - known(x); // rows without a value are last in either order
    return down ? compare(y, x) : compare(x, y);
  });
}

// ---------------------------------------------------------------- parts of the page

/** A dotted key that may break after a dot. */
const breakable = (key) => key.split(/(?<=\.)/).flatMap((part) => [part, element("wbr", {})]);

function renderTable(shown) {
  const heads = [RUN, ...COLUMNS].map(({ key, title }) => {
    const sorted = view.sort.key === key ? (view.sort.down ? "descending" : "ascending") : "none";
    const arrow = { ascending: " ▲", descending: " ▼", none: "" }[sorted];
    const button = element("button", { type: "button", "data-sort": key }, ...breakable(title), arrow);
    return element("th", { scope: "col", "aria-sort": sorted }, button);
  });
  const body = shown.map((row) => element("tr", {}, element("th", { scope: "row" }, row.label),
    ...COLUMNS.map((each) => element("td", { class: each.kind }, ...each.show(row)))));
  const focused = document.activeElement?.dataset?.sort;
  $("table").replaceChildren(element("thead", {}, element("tr", {}, ...heads)), element("tbody", {}, ...body));
  if (focused) document.querySelector(`[data-sort="${CSS.escape(focused)}"]`)?.focus();
  $("count").textContent = `${shown.length} of ${rows.length} runs`;
}

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function plot(id, traces, layout, height) {
  const axis = { gridcolor: colour("--line"), zerolinecolor: colour("--line"), linecolor: colour("--line"), automargin: true };
  const { xaxis, yaxis, ...rest } = layout;
  const base = {
    height, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: colour("--ink"), size: 12 },
    margin: { l: 10, r: 20, t: 40, b: 10 }, bargap: 0.3, hoverlabel: { align: "left" },
    legend: { orientation: "h", yref: "container", y: 1, yanchor: "top", x: 0, traceorder: "normal" },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: colour("--faint"), activecolor: colour("--ink") },
    xaxis: { ...axis, ...xaxis }, yaxis: { ...axis, ...yaxis },
  };
  if (!$(id).querySelector(".plot-container")) $(id).replaceChildren();
  $(id).style.height = `${height}px`;
  Plotly.react(id, traces, { ...base, ...rest }, { responsive: true, displaylogo: false, displayModeBar: !NARROW.matches,
    modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]] });
}

function empty(id, text) {
  Plotly.purge(id);
  $(id).style.height = "";
  $(id).replaceChildren(none(text));
}

const NARROW = matchMedia("(max-width: 600px)");

/** An axis with one position per bar, the first on top. */
function barAxis(names) {
  const length = NARROW.matches ? 16 : 44;
  return { tickvals: names.map((_, k) => k), ticktext: names.map((name) => plain(short(name, length))),
    range: [names.length - 0.5, -0.5], showgrid: false, zeroline: false };
}

const barsHeight = (count) => (NARROW.matches ? 230 : 140) + 26 * count;

const STAGES = [...new Set(rows.flatMap((row) => Object.keys(row.stages)))];

function renderStages(shown) {
  const timed = shown.filter((row) => Object.keys(row.stages).length);
  if (!timed.length) return empty("stages", "No run shown has times.");
  const traces = STAGES.map((stage, k) => ({
    type: "bar", orientation: "h", name: words(stage), marker: { color: COLOURS[k % COLOURS.length] },
    x: timed.map((row) => row.stages[stage] ?? 0), y: timed.map((_, index) => index), hoverinfo: "text", textposition: "none",
    text: timed.map((row) => plain(`${row.label}: ${words(stage)} ${number(row.stages[stage] ?? 0)} ms`)),
  }));
  plot("stages", traces, { barmode: "stack", xaxis: { title: { text: "median, ms" }, rangemode: "tozero" },
    yaxis: barAxis(timed.map((row) => row.label)) }, barsHeight(timed.length));
}

const COMPARED_TIMES = [["request", "request"], ["step", "solver step"], ["answer", "throughput"], ["latency_p50", "p50 under load"],
  ["latency_p99", "p99 under load"]];

function speedupBars(row) {
  if (row.comparison) {
    const { ratios, efficiency, ranks } = row.comparison;
    return COMPARED_TIMES.filter(([name]) => ratios[name]).map(([name, title]) => ({
      name: `${row.label}, ${title}`, against: "a, in alternation",
      ranks: ranks[0] === ranks[1] ? null : ranks[1] / ranks[0], value: ratios[name].ratio, interval: ratios[name].interval, ends: ratios[name].interval,
      level: ratios[name].level, efficiency: efficiency?.[name], alternated: true,
      layout: `${ranks[0]} to ${ranks[1]} ranks`,
    }));
  }
  if (!row.scaling) return [];
  const { base, ranks, speedup: found, efficiency } = row.scaling;
  return [{ name: row.label, against: rows[base].label, ranks, value: found.value, interval: found.ci95, ends: ends(found), level: 0.95, efficiency,
    alternated: false, layout: `${ranks} ranks of ${threads(row)}, against 1 of ${threads(rows[base])}` }];
}

const threads = (row) => `${row.threads} thread${row.threads === 1 ? "" : "s"}`;

function renderScaling(shown) {
  const found = shown.flatMap(speedupBars);
  $("speedups").replaceChildren();
  if (!found.length) return empty("scaling", "No run shown has a matching one-rank run, or is a comparison.");
  const bars = [false, true].map((alternated) => {
    const own = found.map((each, index) => ({ ...each, index })).filter((each) => each.alternated === alternated);
    return {
      type: "bar", orientation: "h", name: alternated ? "b over a, in alternation" : "not in alternation",
      marker: { color: COLOURS[alternated ? 2 : 0] }, x: own.map((each) => each.value), y: own.map((each) => each.index),
      error_x: { type: "data", symmetric: false, thickness: 1.5, color: colour("--ink"), array: own.map((each) => each.ends[1] - each.value),
        arrayminus: own.map((each) => each.value - each.ends[0]) },
      hoverinfo: "text", textposition: "none",
      text: own.map((each) => plain(`${each.name}: ${number(each.value, 3)} (${each.layout})`)),
    };
  }).filter((trace) => trace.x.length);
  const ideal = found.flatMap((each, index) => (each.ranks ? [{ type: "line", x0: each.ranks, x1: each.ranks,
    y0: index - 0.45, y1: index + 0.45, line: { color: "#8C8C8C", width: 2 } }] : []));
  plot("scaling", bars, { barmode: "overlay", shapes: ideal, xaxis: { title: { text: "speed-up, times" }, rangemode: "tozero",
    range: [0, 1.08 * Math.max(...found.map((each) => Math.max(each.ranks ?? 1, each.ends[1])))] },
    yaxis: barAxis(found.map((each) => each.name)) }, barsHeight(found.length));
  const titles = ["run", "ranks", "against", "speed-up", "interval", "efficiency"];
  $("speedups").replaceChildren(heading(titles), element("tbody", {}, ...found.map((each) => element("tr", {},
    element("th", { scope: "row" }, each.name), element("td", { class: "text" }, each.layout),
    element("td", { class: "text" }, each.against), element("td", { class: "number" }, number(each.value, 3)),
    element("td", { class: "number" }, each.interval ? `${number(each.interval[0], 3)} to ${number(each.interval[1], 3)} (${percent(each.level)})` : "under 4 repeats: none"),
    element("td", { class: "number" }, known(each.efficiency) ? percent(each.efficiency) : "")))));
}

const heading = (titles) => element("thead", {}, element("tr", {}, ...titles.map((title) => element("th", { scope: "col" }, title))));

function renderBaselines(shown) {
  const found = shown.filter((row) => row.equal_latency);
  const body = found.map((row) => {
    const { run, error_at_equal_latency: interpolated, better } = row.equal_latency;
    const baseline = rows[run];
    const { evaluations, branches, branches_computed: computed } = row.cache;
    const numbers = [evaluations * computed / branches, row.latency.median, row.pixel.rel_l2];
    const baselineNumbers = [baseline.nfe, baseline.latency.median, baseline.pixel.rel_l2];
    const cell = (value) => element("td", { class: "number" }, known(value) ? number(value, 3) : "");
    return element("tr", {}, element("th", { scope: "row" }, row.label), ...numbers.map(cell),
      element("td", { class: "text" }, baseline.label), ...baselineNumbers.map(cell), cell(interpolated),
      element("td", { class: better === "cache" ? "text good" : "text fair" }, better));
  });
  const titles = ["cached run", "evaluations", "latency, ms", "error", "in fewer steps", "evaluations", "latency, ms", "error",
    "error at equal latency", "smaller error"];
  $("baselines").replaceChildren(...(found.length ? [heading(titles), element("tbody", {}, ...body)]
    : [element("caption", { class: "none" }, "No run shown has a cache and an equal-latency baseline with the same reference.")]));
}

const RATES = ["load.rate", "load.clients"]; // keys that vary along a line of the load chart

function renderCurve(shown) {
  const loaded = shown.filter((row) => row.load?.latency_ms);
  if (!loaded.length) return empty("curve", "No run shown was loaded with task=load.");
  const rest = (row) => Object.entries(row.values).filter(([key, value]) => !RATES.includes(key) && known(value));
  const lines = [...Map.groupBy(loaded, (row) => JSON.stringify(rest(row))).values()];
  const traces = lines.flatMap((own, k) => ["p50", "p99"].map((name) => {
    const along = own.toSorted((a, b) => (a.load.offered_per_s ?? a.load.clients) - (b.load.offered_per_s ?? b.load.clients));
    const differing = rest(own[0]).filter(([key, value]) => loaded.some((row) => row.values[key] !== value));
    const title = differing.map(([key, value]) => `${key.split(".").at(-1)}=${value}`).join(" ");
    return {
      type: "scatter", mode: "lines+markers", name: plain([short(title, 50), name].filter(Boolean).join(" ")),
      x: along.map((row) => row.load.throughput_per_s), y: along.map((row) => row.load.latency_ms[name]), hoverinfo: "text",
      line: { color: COLOURS[k % COLOURS.length], dash: name === "p50" ? "solid" : "dot", width: 2 }, marker: { size: 8 },
      text: along.map((row) => plain(`${row.label}: ${name} ${number(row.load.latency_ms[name])} ms at ${number(row.load.throughput_per_s, 3)} answers/s`)),
    };
  }));
  const values = traces.flatMap(({ y }) => y);
  plot("curve", traces, { xaxis: { title: { text: "answers/s" }, rangemode: "tozero" },
    yaxis: { title: { text: "latency, ms" }, ...(Math.max(...values) < 5 * Math.min(...values) ? { rangemode: "tozero" } : { type: "log" }) } }, 420);
}

const METRICS = {
  rel_l2: { name: "pixel error", title: "pixel error, relative L2 (lower is better)", of: (row) => row.pixel?.rel_l2, sign: -1,
    log: true, perfect: (row) => row.pixel?.identical || row.pixel?.rel_l2 === 0 },
  psnr_db: { name: "PSNR", title: "PSNR, dB (higher is better)", of: (row) => row.pixel?.psnr_db, sign: 1,
    perfect: (row) => row.pixel?.identical },
  distance: { name: "quality distance", title: "distance to the requested image (lower is better)", of: (row) => row.distance?.value,
    interval: (row) => ends(row.distance), sign: -1, perfect: () => false },
  top1: { name: "top-1", title: "prompt retrieval, top-1, % (higher is better)", of: (row) => scaled(row.top1?.value),
    interval: (row) => row.top1.ci95.map(scaled), sign: 1, perfect: () => false },
};
const scaled = (share) => (known(share) ? 100 * share : share);
const scored = (row, metric) => row.latency && (metric.perfect(row) || known(metric.of(row)));

/** The Pareto front of the runs that ended well: no other run is at least as fast and as good, and better in one. */
function paretoFront(points, sign) {
  const front = [];
  const sorted = points.filter(({ row }) => row.state === "ok").toSorted((a, b) => a.x - b.x || sign * (b.value - a.value));
  for (const point of sorted) {
    if (!front.length || sign * point.value > sign * front.at(-1).value) front.push(point);
  }
  return front;
}

/** Position on the axis for identical images: their error has no logarithm, and their PSNR is infinite. */
function identicalPosition(values, metric) {
  if (!values.length) return metric.log ? 1e-7 : 100;
  return metric.log ? 10 ** Math.floor(Math.log10(Math.min(...values)) - 1) : Math.max(...values) + 10;
}

function renderPareto(shown) {
  const metric = METRICS[view.metric];
  const plotted = shown.filter((row) => scored(row, metric));
  const missing = shown.length - plotted.length;
  $("unscored").textContent = missing ? `${missing} of the ${shown.length} runs shown have no ${metric.name} or no latency.` : "";
  $("front").replaceChildren();
  if (!plotted.length) return empty("pareto", `No run shown has a ${metric.name} and a latency.`);
  const edge = identicalPosition(plotted.filter((row) => !metric.perfect(row)).map(metric.of), metric);
  const points = plotted.map((row) => ({ row, x: row.latency.median, y: metric.perfect(row) ? edge : metric.of(row),
    value: metric.perfect(row) ? metric.sign * Infinity : metric.of(row) }));
  const front = paretoFront(points, metric.sign);
  const on = new Set(front.map(({ row }) => row));
  const describe = ({ row, value }) => `${row.label}: ${number(row.latency.median)} ms, ${Number.isFinite(value) ? number(value, 3) : "identical"}`;
  const group = (name, own, marker) => ({
    type: "scatter", mode: "markers", name, x: own.map(({ x }) => x), y: own.map(({ y }) => y), marker: { size: 10, ...marker },
    text: own.map((point) => plain(describe(point))), hoverinfo: "text",
    error_x: bars(own.map(({ row }) => ends(row.latency)), own.map(({ x }) => x)),
    ...(metric.interval && { error_y: bars(own.map(({ row }) => metric.interval(row)), own.map(({ y }) => y)) }),
  });
  const others = points.filter(({ row }) => !on.has(row));
  const traces = [
    { type: "scatter", mode: "lines", name: "front", x: front.map(({ x }) => x), y: front.map(({ y }) => y), hoverinfo: "skip",
      line: { color: COLOURS[2], shape: "hv", width: 2 }, showlegend: false },
    group("on the Pareto front", front, { color: COLOURS[2], symbol: "circle", size: 12 }),
    group("dominated", others.filter(({ row }) => row.state === "ok"), { color: COLOURS[0], symbol: "circle-open" }),
    group("failed", others.filter(({ row }) => row.state !== "ok"), { color: COLOURS[5], symbol: "x" }),
  ].filter((trace) => trace.x.length);
  const scale = metric.log ? logarithmic(points.map(({ y }) => y)) : {};
  const equal = points.some(({ row }) => metric.perfect(row))
    ? [{ xref: "paper", x: 0, xanchor: "left", y: scale.type === "log" ? Math.log10(edge) : edge, yanchor: "bottom", showarrow: false,
      text: "identical, bit for bit" }] : [];
  plot("pareto", traces, { annotations: equal, xaxis: { title: { text: "median latency of the request, ms" }, rangemode: "tozero" },
    yaxis: { title: { text: plain(metric.title) }, ...scale } }, 460);
  $("front").replaceChildren(...front.map((point) => element("li", {}, describe(point))));
}

function logarithmic(values) {
  const ratio = Math.max(...values) / Math.min(...values);
  if (ratio < 5) return { tickformat: "~e" }; // a logarithmic axis would have a tick or none
  return { type: "log", tickformat: ".1~e", dtick: ratio > 1e4 ? 1 : "D2" };
}

function bars(intervals, values) {
  return { type: "data", symmetric: false, thickness: 1, width: 3, array: intervals.map(([, high], k) => high - values[k]),
    arrayminus: intervals.map(([low], k) => values[k] - low) };
}

function renderGrids(shown) {
  const withGrid = shown.filter((row) => row.grid);
  const figures = withGrid.map((row) => element("figure", {},
    element("img", { src: row.grid, alt: `images of ${row.label}`, loading: "lazy" }),
    element("figcaption", {}, row.label, " ", row.verdict && toned(row.verdict),
      element("small", {}, [row.latency && `${number(row.latency.median)} ms`, row.state !== "ok" && row.state].filter(Boolean).join(", ")),
      element("small", {}, short(row.prompts.join(" · "), 160)))));
  $("grids").replaceChildren(...(figures.length ? figures : [none("No run shown has images.")]));
}

function renderCategories(shown) {
  const found = shown.flatMap((row) => row.categories.map((category) => ({ row, category })));
  const cell = (value, show) => element("td", { class: "number" }, ...(known(value) ? show(value) : []));
  const body = found.map(({ row, category }) => element("tr", {}, element("th", { scope: "row" }, row.label),
    element("td", { class: "text" }, category.name), cell(category.images, (count) => [number(count)]),
    cell(category.duration_ms, (times) => [number(times.median), ...measuredSpread(times)]),
    cell(category.top1, (share) => [percent(share.value), spread(...share.ci95, percent)]),
    cell(category.distance, (estimate) => [number(estimate.value), ...measuredSpread(estimate)]),
    cell(category.clip_score, (estimate) => [number(estimate.value), ...measuredSpread(estimate)])));
  const titles = ["run", "category", "images", "ms per image", "top-1", "distance", "CLIP score"];
  $("categories").replaceChildren(...(found.length ? [heading(titles), element("tbody", {}, ...body)]
    : [element("caption", { class: "none" }, "No run shown has a data set with categories.")]));
}

function renderNotes(shown) {
  const byNote = Map.groupBy(shown.flatMap((row) => row.notes.map((note) => ({ note, row }))), ({ note }) => note);
  const parts = [...byNote].flatMap(([note, by]) => [element("dt", {}, note),
    element("dd", {}, by.length === shown.length ? "every run shown" : short(by.map(({ row }) => row.label).join("; "), 400))]);
  $("note-list").replaceChildren(...(parts.length ? parts : [none("No run shown has notes.")]));
}

function renderProvenance(shown) {
  const from = shown.filter((row) => Object.keys(row.provenance).length);
  const keys = [...new Set(from.flatMap((row) => Object.keys(row.provenance)))].sort();
  const value = (row, key) => String(row.provenance[key] ?? "none");
  const counts = new Map(keys.map((key) => [key, Map.groupBy(from, (row) => value(row, key))]));
  const usual = (key) => [...counts.get(key)].toSorted((a, b) => b[1].length - a[1].length)[0][0];
  const differ = keys.filter((key) => counts.get(key).size > 1);
  const body = from.map((row) => element("tr", {}, element("th", { scope: "row" }, row.label),
    ...differ.map((key) => element("td", { class: value(row, key) === usual(key) ? "text" : "text odd" }, value(row, key)))));
  $("different").replaceChildren(...(differ.length ? [heading(["run", ...differ]), element("tbody", {}, ...body)]
    : [element("caption", { class: "none" }, from.length ? "Nothing differs." : "No run shown has a record.")]));
  $("same").replaceChildren(...keys.filter((key) => !differ.includes(key))
    .flatMap((key) => [element("dt", {}, key), element("dd", {}, value(from[0], key))]));
}

// ---------------------------------------------------------------- interaction

function render() {
  const shown = ordered(rows.filter(matches));
  for (const part of [renderTable, renderStages, renderScaling, renderBaselines, renderCurve, renderPareto, renderGrids, renderCategories, renderNotes, renderProvenance]) part(shown);
}

function addPick(key) {
  const choices = [...new Set(rows.map((row) => picked(row, key)))].sort((a, b) => a.localeCompare(b, "en", { numeric: true }));
  if (choices.length < 2) return;
  const options = choices.map((text) => element("option", { value: text }, short(text, 40)));
  const select = element("select", { "data-pick": key }, element("option", { value: "", "data-all": "" }, "all"), ...options);
  select.addEventListener("change", () => {
    if (select.selectedIndex) view.picks.set(key, select.value); else view.picks.delete(key);
    render();
  });
  $("picks").append(element("label", {}, key, select));
}

function addMetric(key) {
  const metric = METRICS[key];
  const some = rows.some((row) => scored(row, metric));
  const radio = element("input", { type: "radio", name: "metric", value: key, ...(some ? {} : { disabled: "" }) });
  radio.checked = key === view.metric;
  radio.addEventListener("change", () => { view.metric = key; render(); });
  $("metrics").append(element("label", {}, radio, metric.name));
}

function start() {
  const states = [...Map.groupBy(rows, (row) => row.state)].map(([state, own]) => `${own.length} ${state}`).join(", ");
  $("about").textContent = `${rows.length} runs in ${page.root}: ${states}. Made on ${page.made}.`;
  document.title = `Triptych report: ${page.root}`;
  view.metric = Object.keys(METRICS).find((key) => rows.some((row) => scored(row, METRICS[key]))) ?? view.metric;
  ["state", ...page.keys].forEach(addPick);
  Object.keys(METRICS).forEach(addMetric);
  $("words").addEventListener("input", ({ target }) => {
    // steps=4 must not match steps=40, but a half-typed word matches what it may become
    view.words = target.value.toLowerCase().split(/\s+/).filter(Boolean).map((word) => (/=./.test(word) ? `${word} ` : word));
    render();
  });
  $("filter").addEventListener("submit", (event) => event.preventDefault());
  $("filter").addEventListener("reset", () => { view.words = []; view.picks.clear(); render(); });
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
