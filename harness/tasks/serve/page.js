// The built-in page: sends requests, and shows every request of this server. It polls one list; an event stream for
// each request would soon use up the six connections that browsers allow to one server.

const FAST_MS = 300, SLOW_MS = 2000;
const byId = id => document.getElementById(id);
const items = new Map(); // by request id: its list item
let timer = 0;

async function call(path, options) {
  const response = await fetch(path, options);
  const body = await response.json();
  if (!response.ok) throw new Error(body.error.message);
  return body;
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
  element.src = new URL(url).pathname;
  return element;
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

async function refresh() {
  clearTimeout(timer);
  let outstanding = 0;
  try {
    const [requests, health] = await Promise.all([call("/v1/requests"), call("/health")]);
    const rendered = requests.data.map(render);
    const itemsIn = list => rendered.filter(([target]) => target === list).map(([, item]) => item);
    arrange(byId("queue"), itemsIn(byId("queue")).reverse()); // the next request on top
    arrange(byId("results"), itemsIn(byId("results"))); // the newest on top
    for (const id of items.keys()) if (!requests.data.some(request => request.id === id)) items.delete(id);
    outstanding = health.running + health.queued;
    showHealth(health);
  } catch {
    showHealth({ state: "failed", reason: "the server does not answer", running: 0, queued: 0 });
  }
  clearTimeout(timer);
  timer = setTimeout(refresh, outstanding ? FAST_MS : SLOW_MS);
}

async function start() {
  byId("generate").addEventListener("submit", submit);
  byId("prompt").addEventListener("keydown", event => {
    if (event.key === "Enter" && !event.shiftKey) {
      event.preventDefault();
      byId("generate").requestSubmit();
    }
  });
  const [model] = (await call("/v1/models")).data, defaults = model.triptych;
  byId("about").textContent = `${model.id} · ${defaults.scheduler} · ${defaults.solver}`;
  for (const name of ["steps", "guidance", "size", "frames"]) byId(name).value = defaults[name];
  byId("steps").max = defaults.max_steps;
  byId("n").max = defaults.max_images;
  byId("frames").max = defaults.max_frames;
  byId("video").hidden = defaults.max_frames === 1;
  refresh();
}

start();
