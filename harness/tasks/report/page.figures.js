// The charts. Each part shows the rows that it is given, or returns the reason why it has nothing to show.

// ---------------------------------------------------------------- quality against cost

const METRICS = {
  distance: { name: "quality distance", title: "distance to the requested image (lower is better)", of: (row) => row.distance?.value,
    interval: (row) => ends(row.distance), sign: -1, log: true },
  clip_score: { name: "CLIP score", title: "CLIP score (higher is better)", of: (row) => row.clip_score?.value,
    interval: (row) => ends(row.clip_score), sign: 1 },
  frechet: { name: "Frechet distance", title: "Frechet distance (lower is better)", of: (row) => row.frechet, sign: -1, log: true },
  top1: { name: "top-1", title: "prompt retrieval, top-1, % (higher is better)", of: (row) => scaled(row.top1?.value),
    interval: (row) => row.top1.ci95.map(scaled), sign: 1 },
  rel_l2: { name: "pixel error", title: "pixel error, relative L2 (lower is better)", of: (row) => row.pixel?.rel_l2, sign: -1,
    log: true, level: withinRounding },
  psnr_db: { name: "PSNR", title: "PSNR, dB (higher is better)", of: (row) => row.pixel?.psnr_db, sign: 1, level: withinRounding },
  ...Object.fromEntries([...new Set(rows.flatMap((row) => Object.keys(row.metrics)))].map((name) => [`metric:${name}`,
    { name: words(name), title: words(name), of: (row) => row.metrics[name], sign: 0 }])), // which way is better is not known
};
const COSTS = {
  nfe: { name: "evaluations", title: "network evaluations per image", of: (row) => row.nfe, show: (value) => `${number(value)} evaluations` },
  latency: { name: "latency", title: "median latency of a request, ms", of: (row) => row.latency?.median, interval: (row) => ends(row.latency),
    show: (value) => `${number(value)} ms` },
  memory: { name: "peak memory", title: "peak memory, MiB", of: (row) => row.memory_mib, show: (value) => `${number(value)} MiB` },
};
const STEPS = "request.steps";
const onLevel = (row, metric) => Boolean(metric.level?.(row));
const scored = (row, metric) => onLevel(row, metric) || known(metric.of(row));
/** A value to three digits, so that no order is made of less than is shown. */
const metricValue = (row, metric) => (onLevel(row, metric) ? metric.sign * Infinity : Number(metric.of(row).toPrecision(3)));
const varies = (of) => new Set(rows.map(of).filter(known)).size > 1;
const separates = (metric) => varies((row) => (scored(row, metric) ? metricValue(row, metric) : null));

/** The Pareto front of the runs that ended well: no other run is at least as cheap and as good, and better in one.
 * Runs within rounding are equally good; if all are equally good, there is no front. */
function paretoFront(points, sign) {
  if (!sign || points.every(({ value }) => !Number.isFinite(value))) return [];
  if (points.length > 1 && new Set(points.map(({ value }) => value)).size === 1) return [];
  const front = [];
  const sorted = points.filter(({ row }) => row.state === "ok").toSorted((a, b) => a.x - b.x || sign * (b.value - a.value));
  for (const point of sorted) {
    if (!front.length || sign * point.value > sign * front.at(-1).value) front.push(point);
  }
  return front;
}

/** Position on the axis for images within rounding: their errors are noise, and an equal image's PSNR is infinite. */
function levelPosition(values, metric) {
  if (!values.length) return metric.log ? 1e-5 : 100;
  return metric.log ? 10 ** Math.floor(Math.log10(Math.min(...values)) - 0.5) : Math.max(...values) + 10;
}

const valueOf = (row, key) => (key ? picked(row, key) : "");
const valuesIn = (shown, key) => [...new Set(shown.map((row) => valueOf(row, key)))].sort(compareText);

function renderTradeoff(shown) {
  const [metric, cost] = [METRICS[view.metric], COSTS[view.cost]];
  const some = shown.some((row) => Object.values(METRICS).some((each) => scored(row, each)));
  if (!some) return "No run shown has an error or a quality.";
  const plotted = shown.filter((row) => scored(row, metric) && known(cost.of(row)));
  $("pareto").hidden = !plotted.length;
  describeTradeoff(shown, [], [], metric, cost);
  if (!plotted.length) return null;
  const finite = plotted.map((row) => metricValue(row, metric)).filter(Number.isFinite);
  const edge = levelPosition(finite, metric);
  const points = plotted.map((row) => ({ row, x: cost.of(row), y: onLevel(row, metric) ? edge : metric.of(row), value: metricValue(row, metric) }));
  const [facets, colours] = [valuesIn(plotted, view.facet), valuesIn(plotted, view.colour)];
  const fronts = facets.map((facet) => paretoFront(points.filter(({ row }) => valueOf(row, view.facet) === facet), metric.sign));
  const traces = facets.flatMap((facet, k) => {
    const own = points.filter(({ row }) => valueOf(row, view.facet) === facet);
    return [frontTrace(fronts[k], k), ...colours.map((name, c) => seriesTrace(own.filter(({ row }) => valueOf(row, view.colour) === name),
      { name, c, k, count: colours.length, front: new Set(fronts[k].map(({ row }) => row)), metric, cost }))];
  }).filter((trace) => trace.x.length);
  const named = new Set();
  for (const trace of traces) { // one entry of the legend for all facets
    trace.showlegend = colours.length <= 24 && trace.name !== "" && !named.has(trace.name);
    named.add(trace.name);
  }
  const [layout, height] = facetLayout(facets, tradeoffAxes(points, metric, cost), points.some(({ row }) => onLevel(row, metric)) ? edge : null, metric);
  plot("pareto", traces, layout, height);
  describeTradeoff(shown, points, fronts.flat(), metric, cost);
  return null;
}

const describePoint = ({ row, x, value }, metric, cost) =>
  `${row.label}: ${cost.show(x)}, ${Number.isFinite(value) ? `${metric.name} ${number(value, 3)}` : "within rounding"}`;

function frontTrace(front, k) {
  return { type: "scatter", mode: "lines", name: "Pareto front", legendgroup: "front", x: front.map(({ x }) => x), y: front.map(({ y }) => y),
    hoverinfo: "skip", line: { color: colour("--faint"), shape: "hv", width: 1.5, dash: "dot" }, xaxis: `x${k + 1}`, yaxis: `y${k + 1}` };
}

/** The points of one colour in one facet: a line through runs that differ in their steps only, with gaps between lines. */
function seriesTrace(points, { name, c, k, count, front, metric, cost }) {
  const lines = [...Map.groupBy(points, ({ row }) => valuesApart(row, [STEPS])).values()].map((line) => line.toSorted((a, b) => a.x - b.x));
  const gap = { row: null, x: null, y: null };
  const along = lines.flatMap((line, n) => (n ? [gap, ...line] : line));
  const dense = along.length > 100; // intervals would cover one another
  const base = SYMBOLS[Math.floor(c / 8 + c) % SYMBOLS.length];
  const symbol = ({ row }) => (!row ? base : row.state !== "ok" ? "x" : front.has(row) ? base : `${base}-open`);
  const aside = cost === COSTS.nfe && count > 1 ? 1 + 0.03 * ((2 * c) / (count - 1) - 1) : 1; // bars side by side
  const x = along.map((point) => (point.row ? point.x * aside : null));
  const interval = (of, values, at) => bars(along.map(({ row }, n) => (row && of(row) && !(at === "y" && onLevel(row, metric)) ? of(row) : [values[n], values[n]])), values);
  const y = along.map((point) => point.y);
  return {
    type: "scatter", mode: lines.some((line) => line.length > 1) ? "lines+markers" : "markers", name: plain(short(name, 50)), legendgroup: name || "runs",
    x, y, hoverinfo: "text", connectgaps: false, text: along.map((point) => (point.row ? plain(describePoint(point, metric, cost)) : "")),
    line: { color: series(c), width: 1.5 }, opacity: dense ? 0.6 : 1, marker: { color: series(c), size: dense ? 6 : 9, line: { width: 1.5, color: series(c) }, symbol: along.map(symbol) },
    ...(cost.interval && !dense && { error_x: interval(cost.interval, x, "x") }), ...(metric.interval && !dense && { error_y: interval(metric.interval, y, "y") }),
    xaxis: `x${k + 1}`, yaxis: `y${k + 1}`, customdata: along.map(({ row }) => row?.id ?? null),
  };
}

function tradeoffAxes(points, metric, cost) {
  const rowsOf = (part) => points.flatMap(({ row }) => (part.interval && !onLevel(row, part) ? part.interval(row) : []));
  const xs = points.map(({ x }) => x), ys = points.map(({ y }) => y);
  const x = logarithmic([...xs.map((value) => (cost === COSTS.nfe ? value * 0.97 : value)), ...xs.map((value) => value * 1.03), ...rowsOf(cost)],
    cost === COSTS.nfe ? distinctTicks(xs) : null);
  const y = metric.log ? logarithmic([...ys, ...rowsOf(metric)]) : {};
  return [{ ...x, title: { text: cost.title } }, { ...y, title: { text: plain(metric.title) } }];
}

/** The layout of one panel for each facet, all with the same axes; at most three side by side. */
function facetLayout(facets, [xaxis, yaxis], edge, metric) {
  const columns = Math.min(facets.length, NARROW.matches ? 1 : 3), lines = Math.ceil(facets.length / columns);
  const axes = facets.flatMap((_, k) => {
    const id = k ? String(k + 1) : "";
    const outer = (axis, shows) => (shows ? axis : { ...axis, title: undefined });
    return [[`xaxis${id}`, { ...outer(xaxis, k + columns >= facets.length), ...(k && { matches: "x" }) }],
      [`yaxis${id}`, { ...outer(yaxis, k % columns === 0), ...(k && { matches: "y" }) }]];
  });
  const titles = facets.length < 2 ? [] : facets.map((facet, k) => ({ text: plain(short(facet, 40)), xref: `x${k ? k + 1 : ""} domain`,
    yref: `y${k ? k + 1 : ""} domain`, x: 0, y: 1.02, yanchor: "bottom", xanchor: "left", showarrow: false }));
  const level = edge === null ? [] : facets.map((_, k) => ({ xref: `x${k ? k + 1 : ""} domain`, yref: `y${k ? k + 1 : ""}`, x: 0, xanchor: "left",
    y: metric.log ? Math.log10(edge) : edge, yanchor: "bottom", showarrow: false, text: "within rounding" }));
  return [{ ...Object.fromEntries(axes), grid: { rows: lines, columns, pattern: "independent", xgap: 0.08, ygap: 0.25 },
    annotations: [...titles, ...level], margin: { l: 10, r: 20, t: 70, b: 10 } }, Math.max(460, 320 * lines + 60)];
}

function describeTradeoff(shown, points, front, metric, cost) {
  const missing = shown.length - points.length, level = points.filter(({ row }) => onLevel(row, metric)).length;
  $("unscored").textContent = [
    missing ? `${missing} of the ${shown.length} runs shown have no ${metric.name} or no ${cost.name}.` : "",
    level ? `${level} of the runs plotted are within rounding of their reference: equally good.` : "",
    metric.sign ? "" : "No front: the page does not know which way of this metric is better.",
    metric.sign && points.length && !front.length ? "No front: the runs are equally good." : "",
  ].filter(Boolean).join(" ");
  $("front-title").hidden = !front.length;
  const first = front.slice(0, 20).map((point) => element("li", {}, describePoint(point, metric, cost)));
  $("front").replaceChildren(...first, ...(front.length > 20 ? [element("li", {}, `and ${front.length - 20} more`)] : []));
}

// ---------------------------------------------------------------- stages and ranks

const STAGES = [...new Set(rows.flatMap((row) => Object.keys(row.stages)))];
const BARS = 25; // on one page of a chart

function renderStages(shown) {
  const all = shown.filter((row) => Object.keys(row.stages).length);
  if (!all.length) return "No run shown has times by stage.";
  const timed = paged("stages", all, BARS, () => renderStages(shown));
  const traces = STAGES.map((stage, k) => ({
    type: "bar", orientation: "h", name: words(stage), marker: { color: series(k) },
    x: timed.map((row) => row.stages[stage] ?? 0), y: timed.map((_, index) => index), hoverinfo: "text", textposition: "none",
    text: timed.map((row) => plain(`${row.label}: ${words(stage)} ${number(row.stages[stage] ?? 0)} ms`)),
  }));
  plot("stages", traces, { barmode: "stack", xaxis: { title: { text: "median, ms" }, rangemode: "tozero" },
    yaxis: barAxis(timed.map((row) => row.label)) }, barsHeight(timed.length));
  return null;
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

function renderScaling(shown) {
  const all = shown.flatMap(speedupBars);
  if (!all.length) return "No run shown has a matching one-rank run, or is a comparison.";
  const found = paged("scaling", all, BARS, () => renderScaling(shown));
  const traces = [false, true].map((alternated) => {
    const own = found.map((each, index) => ({ ...each, index })).filter((each) => each.alternated === alternated);
    return {
      type: "bar", orientation: "h", name: alternated ? "b over a, in alternation" : "not in alternation",
      marker: { color: series(alternated ? 2 : 0) }, x: own.map((each) => each.value), y: own.map((each) => each.index),
      error_x: { ...bars(own.map((each) => each.ends), own.map((each) => each.value)), thickness: 1.5, color: colour("--ink") },
      hoverinfo: "text", textposition: "none",
      text: own.map((each) => plain(`${each.name}: ${number(each.value, 3)} (${each.layout})`)),
    };
  }).filter((trace) => trace.x.length);
  const ideal = found.flatMap((each, index) => (each.ranks ? [{ type: "line", x0: each.ranks, x1: each.ranks,
    y0: index - 0.45, y1: index + 0.45, line: { color: colour("--faint"), width: 2 } }] : []));
  plot("scaling", traces, { barmode: "overlay", shapes: ideal, xaxis: { title: { text: "speed-up, times" }, rangemode: "tozero",
    range: [0, 1.08 * Math.max(...found.map((each) => Math.max(each.ranks ?? 1, each.ends[1])))] },
    yaxis: barAxis(found.map((each) => each.name)) }, barsHeight(found.length));
  const titles = ["run", "ranks", "against", "speed-up", "interval", "efficiency"];
  $("speedups").replaceChildren(heading(titles), element("tbody", {}, ...found.map((each) => element("tr", {},
    element("th", { scope: "row" }, each.name), element("td", { class: "text" }, each.layout),
    element("td", { class: "text" }, each.against), element("td", { class: "number" }, number(each.value, 3)),
    element("td", { class: "number" }, each.interval ? `${number(each.interval[0], 3)} to ${number(each.interval[1], 3)} (${percent(each.level)})` : "under 4 repeats: none"),
    element("td", { class: "number" }, known(each.efficiency) ? percent(each.efficiency) : "")))));
  return null;
}

// ---------------------------------------------------------------- load

const RATES = ["load.rate", "load.clients"]; // keys that vary along a line of the load chart

function renderCurve(shown) {
  const loaded = shown.filter((row) => row.load?.latency_ms);
  if (!loaded.length) return "No run shown was loaded with task=load.";
  const rest = (row) => Object.entries(row.values).filter(([key, value]) => !RATES.includes(key) && known(value));
  const lines = [...Map.groupBy(loaded, (row) => JSON.stringify(rest(row))).values()];
  const traces = lines.flatMap((own, k) => ["p50", "p99"].map((name) => {
    const along = own.toSorted((a, b) => (a.load.offered_per_s ?? a.load.clients) - (b.load.offered_per_s ?? b.load.clients));
    const differing = rest(own[0]).filter(([key, value]) => loaded.some((row) => row.values[key] !== value));
    const title = differing.map((each) => labelPart(...each)).join(" ");
    return {
      type: "scatter", mode: "lines+markers", name: plain([short(title, 50), name].filter(Boolean).join(" ")),
      x: along.map((row) => row.load.throughput_per_s), y: along.map((row) => row.load.latency_ms[name]), hoverinfo: "text",
      line: { color: series(k), dash: name === "p50" ? "solid" : "dot", width: 2 }, marker: { size: 8, symbol: SYMBOLS[k % SYMBOLS.length] },
      text: along.map((row) => plain(`${row.label}: ${name} ${number(row.load.latency_ms[name])} ms at ${number(row.load.throughput_per_s, 3)} answers/s`)),
    };
  }));
  plot("curve", traces, { xaxis: { title: { text: "answers/s" }, rangemode: "tozero" },
    yaxis: { title: { text: "latency, ms" }, ...logarithmic(traces.flatMap(({ y }) => y)) } }, 420);
  return null;
}

// ---------------------------------------------------------------- two sweeps, and one configuration over time

const SWEEPS = [...Map.groupBy(rows.filter((row) => row.latency), parent)]
  .map(([folder, own]) => ({ folder, own, last: own.map((row) => row.started ?? "").sort().at(-1) }))
  .sort((a, b) => compareText(a.last, b.last) || compareText(a.folder, b.folder));

/** The runs of two sweeps with the same values of the keys that vary within either. */
function sweepPairs(shown) {
  const [a, b] = [view.first, view.second].map((folder) => shown.filter((row) => row.latency && parent(row) === folder));
  const keys = page.keys.filter((key) => [a, b].some((own) => new Set(own.map((row) => row.values[key])).size > 1));
  const by = (own) => Map.groupBy(own, (row) => JSON.stringify(keys.map((key) => row.values[key] ?? null)));
  const other = by(b);
  return [...by(a)].filter(([key, own]) => own.length === 1 && other.get(key)?.length === 1)
    .map(([key, [first]]) => ({ name: keys.map((each) => labelPart(each, first.values[each] ?? "none")).join(" ") || first.label,
      first, second: other.get(key)[0] }));
}

function renderSweeps(shown) {
  if (new Set(shown.filter((row) => row.latency).map(parent)).size < 2) return "No two folders have runs with times.";
  const pairs = view.first === view.second ? [] : sweepPairs(shown);
  const found = paged("sweeps", pairs, BARS, () => renderSweeps(shown)).map((pair) => ({ ...pair, ratio: latencyRatio(pair.first, pair.second) }));
  $("sweep-count").textContent = `${pairs.length} runs of each are shown with the same values of the keys that vary inside a sweep.`;
  if (!found.length) Plotly.purge("ratios");
  $("ratios").hidden = !found.length;
  if (found.length) {
    const values = found.map(({ ratio }) => ratio.value), between = found.map(({ ratio }) => ends(ratio));
    plot("ratios", [{ type: "scatter", mode: "markers", x: values, y: found.map((_, k) => k), error_x: bars(between, values), hoverinfo: "text",
      marker: { color: series(0), size: 9 }, text: found.map(({ name, ratio }) => plain(`${name}: ${number(ratio.value, 3)}`)), showlegend: false }],
    { xaxis: { ...logarithmic([1, ...values, ...between.flat()]), title: { text: "latency of the first over the second; above 1 the second is faster" } },
      yaxis: barAxis(found.map(({ name }) => name)), shapes: [{ type: "line", x0: 1, x1: 1, yref: "paper", y0: 0, y1: 1, line: { color: colour("--faint"), width: 1 } }] },
    barsHeight(found.length));
  }
  const metric = METRICS[view.metric];
  const cell = (content) => element("td", { class: "number" }, ...[].concat(content ?? []));
  const score = (row) => (!scored(row, metric) ? "" : onLevel(row, metric) ? "rounding" : [number(metric.of(row), 3), metric.interval && spread(...metric.interval(row), (x) => number(x, 3))]);
  $("pairs").replaceChildren(...(found.length ? [heading(["the same in both", "first, ms", "second, ms", "first over second", `first, ${metric.name}`, `second, ${metric.name}`]),
    element("tbody", {}, ...found.map(({ name, first, second, ratio }) => element("tr", {}, element("th", { scope: "row" }, name),
      ...[first, second].map((row) => cell([folderLink(row, number(row.latency.median)), ...measuredSpread(row.latency)])),
      cell([number(ratio.value, 3), ratio.ci95 && spread(...ratio.ci95, (x) => number(x, 3))]), cell(score(first)), cell(score(second)))))] : []));
  return null;
}

function addSweeps() {
  view.first = SWEEPS.at(-2)?.folder ?? "";
  view.second = SWEEPS.at(-1)?.folder ?? "";
  for (const name of ["first", "second"]) {
    $(name).append(...SWEEPS.map(({ folder, own, last }) => element("option", { value: folder }, `${short(folder, 60)} (${own.length} runs, ${last.slice(0, 10) || "no date"})`)));
    $(name).value = view[name];
    $(name).addEventListener("change", ({ target }) => { view[name] = target.value; render(); });
  }
}

/** Runs of one command on one machine at several times, the command with the most runs first. */
function histories(shown) {
  const dated = shown.filter((row) => row.latency && row.started && row.command !== null);
  return [...Map.groupBy(dated, (row) => JSON.stringify([row.command, row.machine])).values()]
    .map((own) => own.toSorted((a, b) => compareText(a.started, b.started)))
    .filter((own) => new Set(own.map((row) => row.started)).size > 1).sort((a, b) => b.length - a.length);
}

function renderHistory(shown) {
  const all = histories(shown);
  if (!all.length) return "No command was run twice on one machine.";
  const found = paged("history", all, 8, () => renderHistory(shown));
  const traces = found.map((own, k) => ({
    type: "scatter", mode: "lines+markers", name: plain(short(configuration(own.at(-1)), 50)), x: own.map((row) => row.started.slice(0, 19)), y: own.map((row) => row.latency.median),
    error_y: bars(own.map((row) => ends(row.latency)), own.map((row) => row.latency.median)), hoverinfo: "text",
    line: { color: series(k), width: 1.5 }, marker: { size: 9, color: series(k), symbol: SYMBOLS[k % SYMBOLS.length] },
    text: own.map((row) => plain(`${configuration(row)}: ${number(row.latency.median)} ms, ${row.started.slice(0, 16).replace("T", " ")}, ${row.commit ?? "no commit"}`)),
  }));
  const values = found.flat().flatMap((row) => [row.latency.median, ...ends(row.latency)]);
  plot("trend", traces, { xaxis: { type: "date", title: { text: "date, UTC" } }, yaxis: { ...logarithmic(values), title: { text: "median latency, ms" } } }, 420);
  const body = found.flatMap((own) => own.map((row, n) => {
    const ratio = n ? latencyRatio(own[n - 1], row) : null;
    return element("tr", {}, element("th", { scope: "row" }, folderLink(row, configuration(row))),
      element("td", { class: "text" }, row.started.slice(0, 16).replace("T", " ")), element("td", { class: "text" }, row.commit ?? ""),
      element("td", { class: "number" }, number(row.latency.median), ...measuredSpread(row.latency)),
      element("td", { class: "number" }, ratio && number(ratio.value, 3), ratio?.ci95 && spread(...ratio.ci95, (x) => number(x, 3))));
  }));
  $("dates").replaceChildren(heading(["configuration", "date, UTC", "commit", "latency, ms", "times as fast as the run before"]), element("tbody", {}, ...body));
  return null;
}
