// The built-in page: sends requests, and shows every request of this server. It polls one list, and follows the event
// streams of a few running requests alone, for their previews: browsers allow six connections to one server. The API
// key, if the server has one, stays in this page's memory: images come through fetch, as img elements send no header.

const FAST_MS = 300, SLOW_MS = 2000, MAX_STREAMS = 2;
const SETTINGS = ["prompt", "negative_prompt", "steps", "guidance", "size", "frames", "solver"];
const byId = id => document.getElementById(id);
const items = new Map(); // by request id: its list item
const streams = new Set(); // the ids of the requests whose events are being read
let timer = 0, key = "";

async function send(path, options = {}) {
  const headers = { ...options.headers, ...(key && { authorization: `Bearer ${key}` }) };
  const response = await fetch(path, { ...options, headers }).catch(() => {
    throw new Error("the server does not answer");
  });
  if (response.ok) return response;
  if (response.status === 401) askForKey();
  const body = await response.json().catch(() => null);
  throw new Error(body?.error?.message ?? `the server answered with status ${response.status}`);
}

async function call(path, options) {
  return (await send(path, options)).json();
}

function setText(element, text) { // only if it changes: screen readers may read a status again at each write
  if (element.textContent !== text) element.textContent = text;
}

function askForKey() {
  byId("key-error").textContent = key && "This key is not one of the server's.";
  key = "";
  byId("access").hidden = false;
  byId("generate").hidden = byId("lists").hidden = true;
  byId("key").focus();
  clearTimeout(timer);
}

function useKey(event) {
  event.preventDefault();
  key = byId("key").value.trim();
  byId("key").value = "";
  begin();
}

// The form

function formBody() {
  const number = id => (byId(id).value === "" ? null : Number(byId(id).value));
  const triptych = { steps: number("steps"), guidance: number("guidance"), seed: number("seed"),
    negative_prompt: byId("negative_prompt").value, frames: number("frames"),
    solver: byId("solver").value || null, previews: byId("previews").checked };
  return { prompt: byId("prompt").value, n: number("n"), size: byId("size").value, triptych };
}

async function submit(event) {
  event.preventDefault();
  const options = { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(formBody()) };
  try {
    await call("/v1/requests", options);
    byId("form-error").textContent = "";
  } catch (error) {
    byId("form-error").textContent = error.message;
  }
  refresh();
}

async function cancel(id) {
  try {
    await call(`/v1/requests/${id}`, { method: "DELETE" });
  } catch (error) {
    byId("form-error").textContent = error.message;
  }
  refresh();
}

function reuse(request, seed, n) {
  for (const name of SETTINGS) byId(name).value = request[name];
  byId("seed").value = seed;
  byId("n").value = n;
  byId("form-error").textContent = "";
  setText(byId("news"), `The form has these settings, with seed ${seed}.`);
  byId("prompt").focus();
}

// One request

function itemOf(request) {
  if (!items.has(request.id)) {
    const item = byId("request").content.firstElementChild.cloneNode(true);
    const prompt = request.prompt || "(no prompt)", [stop, again] = item.querySelectorAll("button");
    item.dataset.id = request.id;
    item.querySelector(".prompt").textContent = prompt;
    item.querySelector(".prompt").title = request.prompt;
    item.querySelector(".preview").alt = `Preview of ${prompt}`;
    item.querySelector("progress").ariaLabel = `Steps of ${prompt}`;
    Object.assign(stop, { ariaLabel: `Cancel: ${prompt}`, onclick: () => cancel(request.id) });
    again.ariaLabel = `Reuse the settings of ${prompt}`;
    again.onclick = () => reuse(request, request.seed, request.n);
    items.set(request.id, item);
  }
  return items.get(request.id);
}

function sample(url, k, request) {
  const figure = byId("sample").content.firstElementChild.cloneNode(true), path = new URL(url).pathname;
  const again = figure.querySelector("button"), link = figure.querySelector("a"), seed = request.seed + k;
  const element = media(path, request), name = `seed ${seed}, ${request.prompt}`;
  again.onclick = () => reuse(request, seed, 1);
  if (request.frames === 1) Object.assign(element, { onclick: again.onclick, title: `Reuse seed ${seed}` });
  again.ariaLabel = `Reuse ${name}`;
  Object.assign(link, { href: path, ariaLabel: `Download ${name}`, onclick: download });
  figure.prepend(element);
  return figure;
}

function media(path, request) {
  const element = document.createElement(request.frames > 1 ? "video" : "img");
  if (request.frames > 1) Object.assign(element, { controls: true, loop: true, muted: true, preload: "metadata" });
  element[request.frames > 1 ? "ariaLabel" : "alt"] = request.prompt;
  [element.width, element.height] = request.size.split("x").map(Number);
  loadMedia(element, path);
  return element;
}

async function loadMedia(element, path) {
  if (!key) {
    element.src = path;
    return;
  }
  try {
    const source = URL.createObjectURL(await (await send(path)).blob());
    element.onload = () => URL.revokeObjectURL(source);
    element.src = source;
  } catch {
    element.alt = "the image could not be loaded";
  }
}

async function download(event) { // without a key the browser does it, with the name that the server gives
  if (!key) return;
  event.preventDefault();
  try {
    const response = await send(event.currentTarget.pathname), source = URL.createObjectURL(await response.blob());
    const disposition = response.headers.get("content-disposition");
    const [, encoded, plain] = disposition.match(/filename(?:\*=utf-8''([^;]+)|="([^"]+)")/);
    const name = plain ?? decodeURIComponent(encoded);
    Object.assign(document.createElement("a"), { href: source, download: name }).click();
    setTimeout(() => URL.revokeObjectURL(source), SLOW_MS);
  } catch (error) {
    byId("form-error").textContent = error.message;
  }
}

function stageText(request) {
  if (request.status === "queued") return request.ahead ? `queued, ${request.ahead} ahead` : "queued, next";
  if (request.stage === "denoising") return `step ${request.done} of ${request.total}`;
  const stage = request.stage.replaceAll("_", " ");
  return request.stage_total > 1 ? `${stage} ${request.stage_done} of ${request.stage_total}` : stage;
}

function duration(seconds) {
  if (seconds < 60) return `${seconds.toFixed(1)} s`;
  return `${Math.floor(seconds / 60)} min ${Math.floor(seconds % 60)} s`;
}

function elapsed(request) { // in the queue until it begins, and then at work
  const began = request.began_at ?? request.created_at;
  return duration(Math.max(0, request.created_at + request.elapsed_s - began));
}

function settingsText(request, outstanding) {
  const lastSeed = request.n > 1 ? ` to ${request.seed + request.n - 1}` : "";
  const { seed, solver, steps, guidance, size } = request;
  const parts = [`seed ${seed}${lastSeed}`, `${solver}, ${steps} steps`, `guidance ${guidance}`, size];
  return (outstanding ? parts : [...parts, elapsed(request)]).join(" · ");
}

function render(request) {
  const item = itemOf(request), outstanding = ["queued", "running"].includes(request.status);
  if (!outstanding && item.dataset.status && item.dataset.status !== request.status)
    setText(byId("news"), `${request.status === "done" ? "Done" : "Failed"} in ${elapsed(request)}: ${request.prompt}`);
  item.dataset.status = request.status;
  item.dataset.count = request.n > 4 ? "many" : request.n > 1 ? "few" : "one";
  setText(item.querySelector(".settings"), settingsText(request, outstanding));
  setText(item.querySelector(".stage"), `${stageText(request)} · ${elapsed(request)}`);
  Object.assign(item.querySelector("progress"), { value: request.done, max: Math.max(1, request.total) });
  setText(item.querySelector(".error"), request.error ? request.error.message : "");
  const samples = item.querySelector(".samples");
  samples.style.setProperty("--columns", request.n === 4 ? 2 : Math.min(3, request.n));
  if (samples.childElementCount !== request.urls.length)
    samples.replaceChildren(...request.urls.map((url, k) => sample(url, k, request)));
  return [outstanding ? byId("queue") : byId("results"), item];
}

// Previews

function followPreviews(requests) {
  const running = requests.filter(({ id, status, previews }) => status === "running" && previews && !streams.has(id));
  for (const { id } of running.reverse().slice(0, MAX_STREAMS - streams.size)) follow(id); // the oldest first
}

async function follow(id) {
  streams.add(id);
  try {
    for await (const event of events(`/v1/requests/${id}/events`)) if (event.preview) showPreview(id, event);
  } catch { // the list of requests says what became of it
  } finally {
    streams.delete(id);
  }
}

async function* events(path) {
  const reader = (await send(path)).body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (let part = await reader.read(); !part.done; part = await reader.read()) {
    const blocks = (text + part.value).split(/\r?\n\r?\n/);
    text = blocks.pop();
    for (const block of blocks) {
      const data = block.split(/\r?\n/).filter(line => line.startsWith("data:")).map(line => line.slice(5)).join("\n");
      if (data) yield JSON.parse(data);
    }
  }
}

function showPreview(id, event) {
  const image = items.get(id)?.querySelector(".preview");
  if (image) Object.assign(image, { src: `data:image/png;base64,${event.preview}`, hidden: false });
}

// All requests

function arrange(list, wanted) {
  const focused = document.activeElement;
  wanted.forEach((item, k) => {
    if (list.children[k] !== item) list.insertBefore(item, list.children[k] ?? null);
  });
  while (list.childElementCount > wanted.length) list.lastElementChild.remove();
  if (focused !== document.activeElement) // an element that moves loses the focus
    (focused.checkVisibility() ? focused : byId("queue-title")).focus();
}

function showHealth(health) {
  const busy = health.running + health.queued ? `, ${health.running} running, ${health.queued} queued` : "";
  setText(byId("state"), health.state === "ready" ? `ready${busy}` : `${health.state}: ${health.reason}`);
  byId("state").className = health.state;
}

async function health() {
  try {
    return await call("/health");
  } catch (error) {
    const [state, ...reason] = error.message.split(": "); // of a server that answers: failed or stopping
    if (!["failed", "stopping"].includes(state)) throw error;
    return { state, reason: reason.join(": "), running: 0, queued: 0 };
  }
}

async function refresh() {
  clearTimeout(timer);
  let outstanding = 0;
  try {
    const [requests, found] = await Promise.all([call("/v1/requests"), health()]);
    const rendered = requests.data.map(render);
    const itemsIn = list => rendered.filter(([target]) => target === list).map(([, item]) => item);
    arrange(byId("results"), itemsIn(byId("results"))); // the newest on top
    arrange(byId("queue"), itemsIn(byId("queue")).reverse()); // the next request on top
    for (const id of items.keys()) if (!requests.data.some(request => request.id === id)) items.delete(id);
    followPreviews(requests.data);
    outstanding = found.running + found.queued;
    showHealth(found);
  } catch {
    if (!byId("access").hidden) return;
    showHealth({ state: "failed", reason: "the server does not answer", running: 0, queued: 0 });
  }
  clearTimeout(timer);
  timer = setTimeout(refresh, outstanding ? FAST_MS : SLOW_MS);
}

// The start

async function begin() {
  let model;
  try {
    [model] = (await call("/v1/models")).data;
  } catch {
    if (!byId("access").hidden) return;
    showHealth({ state: "failed", reason: "the server does not answer" });
    timer = setTimeout(begin, SLOW_MS);
    return;
  }
  byId("access").hidden = true;
  byId("generate").hidden = byId("lists").hidden = false;
  const defaults = model.triptych;
  byId("about").textContent = `${model.id} · ${defaults.scheduler} · ${defaults.solver}`;
  offerSolvers(defaults);
  offerPreviews(defaults);
  for (const name of SETTINGS) if (!byId(name).value) byId(name).value = defaults[name] ?? "";
  byId("steps").max = defaults.max_steps;
  byId("n").max = defaults.max_images;
  byId("frames").max = defaults.max_frames;
  byId("size").title = `WIDTHxHEIGHT in pixels, multiples of ${defaults.size_multiple}`;
  byId("video").hidden = defaults.max_frames === 1;
  refresh();
}

function offerSolvers(defaults) {
  byId("solver-choice").hidden = defaults.solvers.length < 2;
  if (!byId("solver").length) byId("solver").append(...defaults.solvers.map(name => new Option(name, name)));
  byId("solver").value ||= defaults.solver;
}

function offerPreviews(defaults) {
  if (!defaults.max_previews || !byId("preview-choice").hidden) return;
  byId("preview-choice").hidden = false;
  byId("previews").checked = true;
}

function start() {
  byId("generate").addEventListener("submit", submit);
  byId("access").addEventListener("submit", useKey);
  byId("prompt").addEventListener("keydown", event => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      byId("generate").requestSubmit();
    }
  });
  begin();
}

start();
