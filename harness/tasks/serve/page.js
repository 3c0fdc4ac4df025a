// The built-in page: sends requests, and shows every request of this server. It polls one list; an event stream for
// each request would soon use up the six connections that browsers allow to one server. The API key, if the server has
// one, stays in this page's memory: images come through fetch, because an img element sends no header.

const FAST_MS = 300, SLOW_MS = 2000;
const byId = id => document.getElementById(id);
const items = new Map(); // by request id: its list item
let timer = 0, key = "";

async function send(path, options = {}) {
  const headers = { ...options.headers, ...(key && { authorization: `Bearer ${key}` }) };
  const response = await fetch(path, { ...options, headers });
  if (response.ok) return response;
  if (response.status === 401) askForKey();
  throw new Error((await response.json()).error.message);
}

async function call(path, options) {
  return (await send(path, options)).json();
}

function askForKey() {
  byId("key-error").textContent = key && "This key is not one of the server's.";
  key = "";
  byId("access").hidden = false;
  byId("generate").hidden = byId("lists").hidden = true;
  clearTimeout(timer);
}

function useKey(event) {
  event.preventDefault();
  key = byId("key").value.trim();
  byId("key").value = "";
  begin();
}

function formBody() {
  const number = id => (byId(id).value === "" ? null : Number(byId(id).value));
  const triptych = { steps: number("steps"), guidance: number("guidance"), seed: number("seed"),
    negative_prompt: byId("negative_prompt").value || null, frames: number("frames") };
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

function itemOf(request) {
  if (!items.has(request.id)) {
    const item = byId("request").content.firstElementChild.cloneNode(true);
    item.dataset.id = request.id;
    item.querySelector(".prompt").textContent = request.prompt || "(no prompt)";
    item.querySelector(".prompt").title = request.prompt;
    item.querySelector("button").onclick = () => cancel(request.id);
    items.set(request.id, item);
  }
  return items.get(request.id);
}

function media(url, request) {
  const element = document.createElement(request.frames > 1 ? "video" : "img");
  if (request.frames > 1) Object.assign(element, { controls: true, loop: true, muted: true, preload: "metadata" });
  else element.alt = request.prompt;
  [element.width, element.height] = request.size.split("x").map(Number);
  loadMedia(element, new URL(url).pathname);
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

function stageText(request) {
  if (request.status === "queued") return request.ahead ? `queued, ${request.ahead} ahead` : "queued, next";
  const stage = request.stage.replaceAll("_", " ");
  return request.done < request.total ? `step ${request.done} of ${request.total}` : stage;
}

function render(request) {
  const item = itemOf(request), outstanding = ["queued", "running"].includes(request.status);
  const lastSeed = request.n > 1 ? ` to ${request.seed + request.n - 1}` : "";
  item.dataset.status = request.status;
  item.querySelector(".settings").textContent =
    `seed ${request.seed}${lastSeed} · ${request.steps} steps · guidance ${request.guidance} · ${request.size}`;
  item.querySelector(".stage").textContent = stageText(request);
  Object.assign(item.querySelector("progress"), { value: request.done, max: Math.max(1, request.total) });
  item.querySelector(".error").textContent = request.error ? request.error.message : "";
  const samples = item.querySelector(".samples");
  samples.style.setProperty("--columns", Math.ceil(Math.sqrt(request.n)));
  if (samples.childElementCount !== request.urls.length)
    samples.replaceChildren(...request.urls.map(url => media(url, request)));
  return [outstanding ? byId("queue") : byId("results"), item];
}

function arrange(list, wanted) {
  wanted.forEach((item, k) => {
    if (list.children[k] !== item) list.insertBefore(item, list.children[k] ?? null);
  });
  while (list.childElementCount > wanted.length) list.lastElementChild.remove();
}

function showHealth(health) {
  const busy = health.running + health.queued ? `, ${health.running} running, ${health.queued} queued` : "";
  byId("state").textContent = health.state === "ready" ? `ready${busy}` : `${health.state}: ${health.reason}`;
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
    arrange(byId("queue"), itemsIn(byId("queue")).reverse()); // the next request on top
    arrange(byId("results"), itemsIn(byId("results"))); // the newest on top
    for (const id of items.keys()) if (!requests.data.some(request => request.id === id)) items.delete(id);
    outstanding = found.running + found.queued;
    showHealth(found);
  } catch {
    if (!byId("access").hidden) return;
    showHealth({ state: "failed", reason: "the server does not answer", running: 0, queued: 0 });
  }
  clearTimeout(timer);
  timer = setTimeout(refresh, outstanding ? FAST_MS : SLOW_MS);
}

function start() {
  byId("generate").addEventListener("submit", submit);
  byId("access").addEventListener("submit", useKey);
  byId("prompt").addEventListener("keydown", event => {
    if (event.key === "Enter" && !event.shiftKey) {
      event.preventDefault();
      byId("generate").requestSubmit();
    }
  });
  begin();
}

async function begin() {
  let model;
  try {
    [model] = (await call("/v1/models")).data;
  } catch {
    return byId("access").hidden && showHealth({ state: "failed", reason: "the server does not answer" });
  }
  byId("access").hidden = true;
  byId("generate").hidden = byId("lists").hidden = false;
  const defaults = model.triptych;
  byId("about").textContent = `${model.id} · ${defaults.scheduler} · ${defaults.solver}`;
  for (const name of ["steps", "guidance", "size", "frames"]) byId(name).value = defaults[name];
  byId("steps").max = defaults.max_steps;
  byId("n").max = defaults.max_images;
  byId("frames").max = defaults.max_frames;
  byId("video").hidden = defaults.max_frames === 1;
  refresh();
}

start();
