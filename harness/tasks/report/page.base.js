"use strict";
// The page's data, and what all its parts use: text, numbers, intervals, colours, charts.
// Text from records is inserted as text, never as markup.

const page = JSON.parse(document.getElementById("data").textContent);
const rows = page.rows.map((row, id) => ({ ...row, id }));
const view = { words: [], picks: new Map(), sort: { key: "", down: false }, metric: "rel_l2", cost: "latency", colour: "", facet: "",
  baseline: "", first: "", second: "", pages: new Map() };

const SYMBOLS = ["circle", "square", "diamond", "triangle-up", "triangle-down", "hexagon"];
const TONES = { ok: "good", failed: "bad", oom: "bad", unsupported: "fair", cancelled: "fair",
  identical: "good", within_floor: "good", approximate: "fair", broken: "bad" };
const NARROW = matchMedia("(max-width: 600px)");
const RESAMPLES = 1000;
const FEWEST = 4; // repeats below which no interval is stated, as in harness/metrics/summary.py

// ---------------------------------------------------------------- text

const $ = (id) => document.getElementById(id);

function element(tag, attributes, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children.filter((child) => child != null));
  return made;
}

const known = (value) => value !== null && value !== undefined && value !== "";
const words = (name) => name.replaceAll("_", " ");
const percent = (share) => `${number(100 * share, 3)} %`;
const scaled = (share) => (known(share) ? 100 * share : share);
const threads = (row) => `${row.threads} thread${row.threads === 1 ? "" : "s"}`;
const plain = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;"); // plotly reads some tags
const short = (text, length) => (text.length > length ? `${text.slice(0, length - 1)}…` : text);
const compareText = (a, b) => a.localeCompare(b, "en", { numeric: true });
const toned = (value) => element("span", { class: TONES[value] ?? "" }, words(value));
const heading = (titles) => element("thead", {}, element("tr", {}, ...titles.map((title) => element("th", { scope: "col" }, title))));

function number(value, digits = 4) {
  if (value !== 0 && Math.abs(value) < 1e-3) return value.toExponential(1);
  return value.toLocaleString("en", { maximumSignificantDigits: digits });
}

/** The address of a run's folder, relative to the page. */
const address = (row) => `${[page.base, ...row.folder.split("/")].map(encodeURIComponent).join("/").replaceAll("%2F", "/")}/`;
const folderLink = (row, text) => element("a", { href: address(row), title: row.folder }, text);

/** A key and its value in a label, as in harness/tasks/report/keys.py. */
const labelPart = (key, value) => (["name", "family", "backend", "parallel", "cache"].includes(key.split(".").at(-1)) ? value : `${key.split(".").at(-1)}=${value}`);

/** The folder of a run's sweep. */
const parent = (row) => row.folder.split("/").slice(0, -1).join("/") || ".";

/** The name of a configuration: the label of a run without its folder. */
const configuration = (row) => row.label.replace(` (${row.folder})`, "");

// ---------------------------------------------------------------- intervals

const spread = (low, high, show = number) => element("span", { class: "spread" }, `${show(low)} to ${show(high)}`);

/** The interval of a median, its level if that is below 95 %, or the range of few measurements. */
function measuredSpread({ ci95, range, coverage }) {
  if (ci95) return [spread(...ci95), known(coverage) && coverage < 0.95 ? ` (${percent(coverage)})` : null];
  return range ? [spread(...range), " (range)"] : [];
}
const measured = (of) => (value, row) => [number(value), ...measuredSpread(of(row))];
const ends = ({ ci95, range, median, value }) => ci95 ?? range ?? [median ?? value, median ?? value];

function median(sorted) {
  const middle = sorted.length >> 1;
  return sorted.length % 2 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
}

/** Uniform numbers in [0, 1) from a seed (mulberry32), so that a page shows the same interval each time. */
function uniform(seed) {
  let state = seed;
  return () => {
    state = (state + 0x6d2b79f5) | 0;
    let mixed = Math.imul(state ^ (state >>> 15), 1 | state);
    mixed = (mixed + Math.imul(mixed ^ (mixed >>> 7), 61 | mixed)) ^ mixed;
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 4294967296;
  };
}

/** The medians of bootstrap samples of some values. */
function resampledMedians(values, random) {
  const sample = new Float64Array(values.length);
  return Array.from({ length: RESAMPLES }, () => {
    for (let k = 0; k < sample.length; k += 1) sample[k] = values[Math.floor(random() * values.length)];
    return median(sample.sort());
  });
}

/** The ratio of the median latencies of two runs, with the 95 % percentile bootstrap interval over their repeats. */
function latencyRatio(base, row) {
  if (!base?.latency || !row.latency) return null;
  const value = base.latency.median / row.latency.median;
  if (Math.min(base.repeats_ms.length, row.repeats_ms.length) < FEWEST) return { value, ci95: null };
  const random = uniform(1);
  const below = resampledMedians(row.repeats_ms, random);
  const ratios = Float64Array.from(resampledMedians(base.repeats_ms, random), (above, k) => above / below[k]).sort();
  return { value, ci95: [ratios[Math.floor(0.025 * RESAMPLES)], ratios[Math.ceil(0.975 * RESAMPLES) - 1]] };
}

// ---------------------------------------------------------------- charts

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const series = (k) => colour(`--series-${(k % 8) + 1}`);

function plot(id, traces, layout, height) {
  const axis = { gridcolor: colour("--line"), zerolinecolor: colour("--line"), linecolor: colour("--line"), automargin: true };
  const axes = Object.entries(layout).filter(([name]) => /^[xy]axis\d*$/.test(name)).map(([name, own]) => [name, { ...axis, ...own }]);
  const base = {
    height, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: colour("--ink"), size: 12 },
    margin: { l: 10, r: 20, t: 40, b: 10 }, bargap: 0.3, hoverlabel: { align: "left" },
    legend: { orientation: "h", yref: "container", y: 1, yanchor: "top", x: 0, traceorder: "normal" },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: colour("--faint"), activecolor: colour("--ink") },
  };
  $(id).style.height = `${height}px`;
  Plotly.react(id, traces, { ...base, ...layout, ...Object.fromEntries(axes) }, { responsive: true, displaylogo: false,
    displayModeBar: !NARROW.matches, modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]] });
}

/** An axis with one position per bar, the first on top. */
function barAxis(names) {
  const length = NARROW.matches ? 16 : 44;
  return { tickvals: names.map((_, k) => k), ticktext: names.map((name) => plain(short(name, length))),
    range: [names.length - 0.5, -0.5], showgrid: false, zeroline: false };
}

const barsHeight = (count) => (NARROW.matches ? 230 : 140) + 26 * count;

/** Round numbers between two positive ones: powers of ten, or finer where there would be few. */
function logTicks(low, high) {
  const first = Math.floor(Math.log10(low));
  const decades = Array.from({ length: Math.ceil(Math.log10(high)) - first + 1 }, (_, k) => 10 ** (first + k));
  for (const steps of [[1], [1, 3], [1, 2, 5], [1, 1.5, 2, 3, 4, 5, 7]]) {
    const ticks = decades.flatMap((decade) => steps.map((step) => Number((step * decade).toPrecision(3))))
      .filter((tick) => tick >= low && tick <= high);
    if (ticks.length >= 4) return ticks;
  }
  const step = [1, 2, 5, 10].map((factor) => factor * 10 ** Math.floor(Math.log10((high - low) / 4)))
    .find((each) => (high - low) / each <= 6);
  const start = Math.ceil(low / step);
  return Array.from({ length: Math.floor(high / step) - start + 1 }, (_, k) => Number(((start + k) * step).toPrecision(4)));
}

/** A logarithmic axis over some values, with ticks at these or at round numbers. */
function logarithmic(values, ticks = null) {
  const positive = values.filter((value) => value > 0 && Number.isFinite(value));
  if (!positive.length) return {};
  const [least, most] = [Math.min(...positive), Math.max(...positive)];
  const pad = Math.max(0.06 * Math.log10(most / least), 0.02);
  const [low, high] = [least * 10 ** -pad, most * 10 ** pad];
  const tickvals = ticks ?? logTicks(low, high);
  return { type: "log", range: [Math.log10(low), Math.log10(high)], tickvals, ticktext: tickvals.map((tick) => number(tick, 3)) };
}

/** Distinct values in rising order, without those that are too near to be read on a logarithmic axis. */
function distinctTicks(values) {
  const sorted = [...new Set(values)].sort((a, b) => a - b);
  return sorted.reduce((found, value) => (!found.length || value >= 1.25 * found.at(-1) ? [...found, value] : found), []);
}

function bars(intervals, values) {
  return { type: "data", symmetric: false, thickness: 1, width: 3, array: intervals.map(([, high], k) => high - values[k]),
    arrayminus: intervals.map(([low], k) => values[k] - low) };
}

/** The part of some items that a page of a section shows; its buttons turn the pages. */
function paged(id, items, size, again) {
  const last = Math.max(0, Math.ceil(items.length / size) - 1);
  const at = Math.min(view.pages.get(id) ?? 0, last);
  const turn = (to, text) => {
    const button = element("button", { type: "button", ...(to < 0 || to > last ? { disabled: "" } : {}) }, text);
    button.addEventListener("click", () => {
      view.pages.set(id, to);
      again();
      [...$(`${id}-pages`).querySelectorAll("button:enabled")].find((each) => each.textContent === text)?.focus();
    });
    return button;
  };
  const [from, to] = [at * size, Math.min((at + 1) * size, items.length)];
  $(`${id}-pages`).replaceChildren(...(last ? [turn(at - 1, "Previous"), element("span", {}, `${from + 1} to ${to} of ${items.length}`),
    turn(at + 1, "Next")] : []));
  return items.slice(from, to);
}
