// The sections without a chart. Each shows the rows that it is given, or returns the reason why it has nothing to show.

function renderBaselines(shown) {
  const found = shown.filter((row) => row.equal_latency);
  if (!found.length) return "No run shown has a cache and an equal-latency baseline with the same reference.";
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
  $("baselines").replaceChildren(heading(titles), element("tbody", {}, ...body));
  return null;
}

function renderGrids(shown) {
  const all = shown.filter((row) => row.grid);
  if (!all.length) return "No run shown has images.";
  const figures = paged("grids", all, 24, () => renderGrids(shown)).map((row) => element("figure", {},
    element("img", { src: row.grid, alt: `images of ${row.label}`, loading: "lazy" }),
    element("figcaption", {}, folderLink(row, row.label), " ", row.verdict && toned(row.verdict),
      element("small", {}, [row.latency && `${number(row.latency.median)} ms`, row.state !== "ok" && row.state].filter(Boolean).join(", ")),
      element("small", {}, short(row.prompts.join(" · "), 160)))));
  $("grids").replaceChildren(...figures);
  return null;
}

function renderCategories(shown) {
  const all = shown.flatMap((row) => row.categories.map((category) => ({ row, category })));
  if (!all.length) return "No run shown has a data set with categories.";
  const found = paged("categories", all, 100, () => renderCategories(shown));
  const cell = (value, show) => element("td", { class: "number" }, ...(known(value) ? show(value) : []));
  const body = found.map(({ row, category }) => element("tr", {}, element("th", { scope: "row" }, row.label),
    element("td", { class: "text" }, category.name), cell(category.images, (count) => [number(count)]),
    cell(category.duration_ms, (times) => [number(times.median), ...measuredSpread(times)]),
    cell(category.top1, (share) => [percent(share.value), spread(...share.ci95, percent)]),
    cell(category.distance, (each) => [number(each.value), ...measuredSpread(each)]),
    cell(category.clip_score, (each) => [number(each.value), ...measuredSpread(each)])));
  const titles = ["run", "category", "images", "ms per image", "top-1", "distance", "CLIP score"];
  $("categories").replaceChildren(heading(titles), element("tbody", {}, ...body));
  return null;
}

function renderNotes(shown) {
  const texts = (row) => [...(row.error ? [`${row.state}: ${row.error}`] : []), ...row.notes];
  const byNote = Map.groupBy(shown.flatMap((row) => texts(row).map((note) => ({ note, row }))), ({ note }) => note);
  if (!byNote.size) return "No run shown has notes.";
  const parts = [...byNote].slice(0, 200).flatMap(([note, by]) => [element("dt", {}, note),
    element("dd", {}, by.length === shown.length ? "every run shown" : short(by.map(({ row }) => row.label).join("; "), 400))]);
  $("note-list").replaceChildren(...parts);
  return null;
}

function renderProvenance(shown) {
  const from = shown.filter((row) => Object.keys(row.provenance).length);
  if (!from.length) return "No run shown has a record.";
  const keys = [...new Set(from.flatMap((row) => Object.keys(row.provenance)))].sort();
  const value = (row, key) => String(row.provenance[key] ?? "none");
  const counts = new Map(keys.map((key) => [key, Map.groupBy(from, (row) => value(row, key))]));
  const usual = (key) => [...counts.get(key)].toSorted((a, b) => b[1].length - a[1].length)[0][0];
  const differ = keys.filter((key) => counts.get(key).size > 1);
  const usuals = new Map(differ.map((key) => [key, usual(key)]));
  const body = paged("different", differ.length ? from : [], 50, () => renderProvenance(shown)).map((row) => element("tr", {}, element("th", { scope: "row" }, row.label),
    ...differ.map((key) => element("td", { class: value(row, key) === usuals.get(key) ? "text" : "text odd" }, value(row, key)))));
  $("different").replaceChildren(...(differ.length ? [heading(["run", ...differ]), element("tbody", {}, ...body)]
    : [element("caption", { class: "none" }, "Nothing differs.")]));
  $("same").replaceChildren(...keys.filter((key) => !differ.includes(key))
    .flatMap((key) => [element("dt", {}, key), element("dd", {}, value(from[0], key))]));
  return null;
}
