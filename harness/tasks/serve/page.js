// The built-in page: asks for pictures, and shows every request of this server. It polls one list; an event stream for
// each request would soon use up the six connections that browsers allow one server.

const FAST_MS = 300, SLOW_MS = 2000;
const field = name => document.getElementById(name);
const shown = new Map(); // by request id: its element
let timer = 0;

async function call(path, options) {
  const answer = await fetch(path, options);
  const body = await answer.json();
  if (!answer.ok) throw new Error(body.error.message);
  return body;
}

function asked() {
  const number = name => (field(name).value === "" ? null : Number(field(name).value));
  const triptych = { steps: number("steps"), guidance: number("guidance"), seed: number("seed"),
    negative_prompt: field("negative_prompt").value || null, frames: number("frames") };
  return { prompt: field("prompt").value, n: number("n"), size: field("size").value, triptych };
}

async function ask(event) {
  event.preventDefault();
  const options = { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(asked()) };
  try {
    await call("/v1/requests", options);
    field("refusal").textContent = "";
  } catch (error) {
    field("refusal").textContent = error.message;
  }
  refresh();
}

async function cancel(id) {
  try {
    await call(`/v1/requests/${id}`, { method: "DELETE" });
  } catch (error) {
    field("refusal").textContent = error.message;
  }
  refresh();
}

function element(request) {
  if (!shown.has(request.id)) {
    const made = field("request").content.firstElementChild.cloneNode(true);
    made.dataset.id = request.id;
    made.querySelector(".prompt").textContent = request.prompt || "(no prompt)";
    made.querySelector(".prompt").title = request.prompt;
    made.querySelector("button").onclick = () => cancel(request.id);
    shown.set(request.id, made);
  }
  return shown.get(request.id);
}

function picture(url, request) {
  const made = document.createElement(request.frames > 1 ? "video" : "img");
  if (request.frames > 1) Object.assign(made, { controls: true, loop: true, muted: true, preload: "metadata" });
  else made.alt = request.prompt;
  [made.width, made.height] = request.size.split("x").map(Number);
  made.src = new URL(url).pathname;
  return made;
}

function where(request) {
  if (request.status === "queued") return request.ahead ? `queued, ${request.ahead} ahead` : "queued, next";
  const stage = request.stage.replaceAll("_", " ");
  return request.done < request.total ? `step ${request.done} of ${request.total}` : stage;
}

function draw(request) {
  const made = element(request), outstanding = ["queued", "running"].includes(request.status);
  const several = request.n > 1 ? ` to ${request.seed + request.n - 1}` : "";
  made.dataset.status = request.status;
  made.querySelector(".settings").textContent =
    `seed ${request.seed}${several} · ${request.steps} steps · guidance ${request.guidance} · ${request.size}`;
  made.querySelector(".where").textContent = where(request);
  Object.assign(made.querySelector("progress"), { value: request.done, max: Math.max(1, request.total) });
  made.querySelector(".error").textContent = request.error ? request.error.message : "";
  const pictures = made.querySelector(".pictures");
  pictures.style.setProperty("--columns", Math.ceil(Math.sqrt(request.n)));
  if (pictures.childElementCount !== request.urls.length)
    pictures.replaceChildren(...request.urls.map(url => picture(url, request)));
  return [outstanding ? field("queue") : field("answers"), made];
}

function place(list, wanted) {
  wanted.forEach((made, k) => {
    if (list.children[k] !== made) list.insertBefore(made, list.children[k] ?? null);
  });
  while (list.childElementCount > wanted.length) list.lastElementChild.remove();
}

function say(health) {
  const busy = health.running + health.queued ? `, ${health.running} being drawn, ${health.queued} waiting` : "";
  field("state").textContent = health.state === "ready" ? `ready${busy}` : `${health.state}: ${health.reason}`;
  field("state").className = health.state;
}

async function refresh() {
  clearTimeout(timer);
  let outstanding = 0;
  try {
    const [requests, health] = await Promise.all([call("/v1/requests"), call("/health")]);
    const drawn = requests.data.map(draw);
    const of = list => drawn.filter(([where]) => where === list).map(([, made]) => made);
    place(field("queue"), of(field("queue")).reverse()); // the next to be drawn on top
    place(field("answers"), of(field("answers"))); // the newest on top
    for (const id of shown.keys()) if (!requests.data.some(request => request.id === id)) shown.delete(id);
    outstanding = health.running + health.queued;
    say(health);
  } catch {
    say({ state: "failed", reason: "the server does not answer", running: 0, queued: 0 });
  }
  clearTimeout(timer);
  timer = setTimeout(refresh, outstanding ? FAST_MS : SLOW_MS);
}

async function begin() {
  field("ask").addEventListener("submit", ask);
  field("prompt").addEventListener("keydown", event => {
    if (event.key === "Enter" && !event.shiftKey) {
      event.preventDefault();
      field("ask").requestSubmit();
    }
  });
  const [model] = (await call("/v1/models")).data, own = model.triptych;
  field("about").textContent = `${model.id} · ${own.scheduler} · ${own.solver}`;
  for (const name of ["steps", "guidance", "size", "frames"]) field(name).value = own[name];
  field("steps").max = own.max_steps;
  field("n").max = own.max_pictures;
  field("frames").max = own.max_frames;
  field("video").hidden = own.max_frames === 1;
  refresh();
}

begin();
