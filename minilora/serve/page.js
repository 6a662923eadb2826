// The page of minilora serve. Whatever comes from a model, a file or a folder is set as text, never as markup.
"use strict";
const at = id => document.getElementById(id);
const make = (tag, text = "", look = "") => {
  const element = document.createElement(tag);
  element.textContent = text;
  element.className = look;
  return element;
};
const notice = text => { at("notice").textContent = text; };

// The server

class Failed extends Error {}

async function ask(path, options = {}) {
  const response = await fetch(path, options).catch(() => { throw new Failed("The server does not answer."); });
  if (response.status === 401) {
    await unlock();
    return ask(path, options);
  }
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  throw new Failed(body?.error?.message ?? "The server answered " + response.status + ".");
}

let unlocking = null;
function unlock() {
  unlocking ??= new Promise(done => {
    const lock = at("lock");
    lock.addEventListener("close", async () => {
      const headers = { "Content-Type": "application/json" };
      const response = await fetch("/key", { method: "POST", headers, body: JSON.stringify({ key: at("key").value }) });
      notice(response.ok ? "" : "This is not the key.");
      if (!response.ok) return lock.showModal();
      at("key").value = "";
      unlocking = null;
      done();
    });
    lock.showModal();
  });
  return unlocking;
}

// The objects of a stream of server-sent events.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = "";;) {
    const { value, done } = await reader.read();
    if (done) return;
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks)
      if (block.startsWith("data: ") && block !== "data: [DONE]") yield JSON.parse(block.slice(6));
  }
}

// Chat

const talks = [...document.querySelectorAll(".talk")].map(box => ({
  choice: box.querySelector("select"), said: box.querySelector(".said"), messages: [],
}));
let running = null;

function settings() {
  const found = {}, number = id => at(id).value === "" ? undefined : Number(at(id).value);
  found.temperature = number("temperature");
  found.seed = number("seed");
  found.max_tokens = number("max-tokens");
  if (at("thinking").checked) found.chat_template_kwargs = { enable_thinking: true };
  try {
    if (at("tools").value.trim()) found.tools = JSON.parse(at("tools").value);
  } catch (error) {
    throw new Failed("The tools are not JSON: " + error.message);
  }
  return found;
}

// A call of a tool: the function's name, and a line for each argument.
function called({ name, arguments: given }) {
  const block = make("div", "", "call"), plain = value => typeof value === "string" ? value : JSON.stringify(value);
  block.append(make("b", name), ...Object.entries(JSON.parse(given)).map(([key, value]) => "\n" + key + ": " + plain(value)));
  return block;
}

async function answer(talk, text, signal) {
  const model = talk.choice.value, system = at("system").value.trim();
  const asked = talk.messages.at(-1)?.tool_calls, calls = [];  // what follows a call is its result
  talk.messages.push(asked ? { role: "tool", tool_call_id: asked[0].id, content: text } : { role: "user", content: text });
  talk.said.append(make("div", text, "asked"));
  const shown = talk.said.appendChild(make("div", "", "answer")), about = talk.said.appendChild(make("div", model, "about"));
  const show = () => { talk.said.scrollTop = talk.said.scrollHeight; };
  show();
  const messages = system ? [{ role: "system", content: system }, ...talk.messages] : talk.messages;
  const began = performance.now();
  let said = "", tokens = 0, reason = "stopped";
  try {
    const body = { model, messages, stream: true, stream_options: { include_usage: true }, ...settings() };
    const headers = { "Content-Type": "application/json" };
    const response = await ask("/v1/chat/completions", { method: "POST", headers, body: JSON.stringify(body), signal });
    for await (const chunk of events(response)) {
      if (chunk.error) throw new Failed(chunk.error.message);
      const choice = chunk.choices[0];
      said += choice?.delta.content ?? "";
      for (const call of choice?.delta.tool_calls ?? []) {
        calls.push(call);
        about.before(called(call.function));
      }
      reason = choice?.finish_reason ?? reason;
      tokens = chunk.usage?.completion_tokens ?? tokens;
      shown.textContent = said;
      show();
    }
  } catch (error) {
    if (error instanceof Failed) {
      about.className = "about failed";
      reason = error.message;
    } else if (!signal.aborted) throw error;
  }
  const speed = tokens / (performance.now() - began) * 1000;
  const end = { stop: "", length: ", cut at its longest", tool_calls: ": your next message is the result" }[reason] ?? ", " + reason;
  shown.hidden = !said;
  about.textContent = model + (tokens ? ", " + tokens + " tokens, " + speed.toFixed(1) + " a second" : "") + end;
  talk.messages.push({ role: "assistant", content: said, ...(calls.length ? { tool_calls: calls } : {}) });
}

at("ask").addEventListener("submit", async event => {
  event.preventDefault();
  const text = at("text").value;
  if (running || !text.trim()) return;
  notice("");
  at("text").value = "";
  running = new AbortController();
  at("send").disabled = at("new").disabled = true;
  at("stop").disabled = false;
  await Promise.all(talks.filter(talk => talk.choice.value).map(talk => answer(talk, text, running.signal)));
  running = null;
  at("send").disabled = at("new").disabled = false;
  at("stop").disabled = true;
  at("text").focus();
});
at("text").addEventListener("keydown", event => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    at("ask").requestSubmit();
  }
});
at("stop").addEventListener("click", () => running?.abort());
at("new").addEventListener("click", () => {
  for (const talk of talks) {
    talk.messages = [];
    talk.said.replaceChildren();
  }
});

async function openChat() {
  const response = await ask("/v1/models").catch(() => null);
  const names = response ? (await response.json()).data.map(model => model.id) : [];
  talks.forEach((talk, side) => {
    const options = names.map(name => new Option(name));
    if (side) options.push(new Option("(no second model)", ""));
    talk.choice.replaceChildren(...options);
    talk.choice.selectedIndex = side;
  });
  return names.length > 0;
}

// Curves

const SVG = "http://www.w3.org/2000/svg";
const draw = (svg, tag, attributes, text = "") => {
  const element = svg.appendChild(document.createElementNS(SVG, tag));
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.textContent = text;
};
const number = value => value === 0 ? "0" : Math.abs(value) < 0.001 || Math.abs(value) >= 1e6 ? value.toExponential(2) : String(Number(value.toPrecision(4)));

// The exponential average over about a twentieth of a curve, bias-corrected, as in the reports.
function smoothed(points) {
  const keep = 1 - 1 / Math.max(points.length / 20, 1);
  let total = 0, weight = 0;
  return points.map(([x, y]) => [x, (total = keep * total + (1 - keep) * y) / (weight = keep * weight + 1 - keep)]);
}

class Chart {
  constructor(title, lines) {  // lines: points -> [{look, points [[x, y], ...], name}]
    this.lines = lines;
    this.figure = make("figure");
    const caption = this.figure.appendChild(make("figcaption"));
    caption.append(make("b", title));
    this.told = caption.appendChild(make("output"));
    this.svg = this.figure.appendChild(document.createElementNS(SVG, "svg"));
    this.svg.setAttribute("role", "img");
    this.svg.setAttribute("aria-label", title);
    this.svg.addEventListener("pointermove", event => this.tell(event.offsetX));
    this.svg.addEventListener("pointerleave", () => this.tell(null));
    new ResizeObserver(() => this.show(this.points ?? [])).observe(this.svg);
  }

  show(points) {
    this.points = points;
    const shown = this.shown = this.lines(points).filter(line => line.points.length);
    this.figure.hidden = !shown.length;
    const width = this.svg.clientWidth, height = this.svg.clientHeight;
    this.svg.replaceChildren();
    if (!shown.length || !width) return;
    const xs = shown.flatMap(line => line.points.map(p => p[0])), ys = shown.flatMap(line => line.points.map(p => p[1]));
    const span = values => values.reduce(([low, high], v) => [Math.min(low, v), Math.max(high, v)], [Infinity, -Infinity]);
    const [left, right] = span(xs), [bottom, top] = span(ys), pad = 60;
    this.x = x => pad + (width - pad - 8) * (right > left ? (x - left) / (right - left) : 0.5);
    const y = v => 10 + (height - 36) * (top > bottom ? (top - v) / (top - bottom) : 0.5);
    for (const v of top > bottom ? [top, (top + bottom) / 2, bottom] : [top]) {
      draw(this.svg, "line", { class: "grid", x1: pad, x2: width - 8, y1: y(v), y2: y(v) });
      draw(this.svg, "text", { x: pad - 6, y: y(v) + 4, "text-anchor": "end" }, number(v));
    }
    draw(this.svg, "text", { x: pad, y: height - 6 }, "step " + left);
    if (right > left) draw(this.svg, "text", { x: width - 8, y: height - 6, "text-anchor": "end" }, String(right));
    for (const line of shown) {
      draw(this.svg, "polyline", { class: line.look, points: line.points.map(p => this.x(p[0]) + "," + y(p[1])).join(" ") });
      if (line.look === "val") for (const p of line.points) draw(this.svg, "circle", { cx: this.x(p[0]), cy: y(p[1]), r: 3 });
    }
    this.tell(null);
  }

  // The values nearest to a place, or the last ones.
  tell(place) {
    if (!this.shown?.length || !this.x) return;
    const near = points => points.reduce((a, b) => Math.abs(this.x(b[0]) - place) < Math.abs(this.x(a[0]) - place) ? b : a);
    const told = this.shown.map(line => [line, place === null ? line.points.at(-1) : near(line.points)]);
    this.told.textContent = "step " + told[0][1][0] + ": " + told.map(([line, p]) => (line.name ? line.name + " " : "") + number(p[1])).join(", ");
  }
}

const column = (points, key) => points.filter(p => key in p && "step" in p).map(p => [p.step, p[key]]);
const charts = [
  new Chart("Loss", points => [
    { look: "pale", name: "", points: column(points, "loss") },
    { look: "", name: "smoothed", points: smoothed(column(points, "loss")) },
    { look: "val", name: "validation", points: column(points, "val_loss") },
  ]),
  ...[["Gradient norm", "grad_norm"], ["Learning rate", "lr"], ["Tokens a second", "tokens_per_second"]].map(
    ([title, key]) => new Chart(title, points => [{ look: "", name: "", points: column(points, key) }])),
];
at("curves").append(...charts.map(chart => chart.figure));

// Runs

let source = null, watched = null, points = [];
const path = name => name.split("/").map(encodeURIComponent).join("/");
const described = run => {
  const step = run.step ? "step " + run.step + (run.steps ? " of " + run.steps : "") : "no step yet";
  const left = run.state === "training" && run.step && run.steps ? run.time / run.step * (run.steps - run.step) : 0;
  return run.state + ", " + step + (left ? ", about " + (left < 90 ? Math.round(left) + " s" : Math.round(left / 60) + " min") + " left" : "");
};

function watch(name) {
  source?.close();
  watched = name;
  points = [];
  at("run").hidden = false;
  at("run").querySelector("h2").textContent = name;
  for (const button of at("list").querySelectorAll("button"))
    button.toggleAttribute("aria-current", button.textContent === name);
  source = new EventSource("/runs/" + path(name) + "/events");
  source.addEventListener("message", event => {
    const found = JSON.parse(event.data);
    notice("");
    points = found.anew ? found.points : [...points, ...found.points];
    at("state").textContent = described(found.state);
    for (const chart of charts) chart.show(points);
  });
  source.addEventListener("error", () => notice("The server does not answer: the curves are those of before."));
}

async function openRuns() {
  const response = await ask("/runs").catch(error => notice(error.message));
  if (!response) return false;
  const { runs, pages } = await response.json();
  const table = make("table"), head = table.createTHead().insertRow(), body = table.createTBody();
  for (const title of ["run", "", "loss", "validation"]) head.append(make("th", title));
  for (const run of runs) {
    const row = body.insertRow(), button = make("button", run.name);
    button.toggleAttribute("aria-current", run.name === watched);
    button.addEventListener("click", () => watch(run.name));
    row.insertCell().append(button);
    for (const text of [described(run), "loss" in run ? number(run.loss) : "", "val_loss" in run ? number(run.val_loss) : ""])
      row.append(make("td", text));
  }
  at("list").replaceChildren(runs.length ? table : make("p", "There is no run here yet."));
  at("reports").hidden = !pages.length;
  at("reports").querySelector("ul").replaceChildren(...pages.map(name => {
    const link = make("a", name), item = make("li");
    link.href = "/pages/" + path(name);
    link.target = "_blank";
    link.rel = "noopener";
    item.append(link);
    return item;
  }));
  if (watched === null && runs.length) watch((runs.find(run => run.state === "training") ?? runs[0]).name);
  return runs.length + pages.length > 0;
}

// Both

function open(name) {
  for (const part of ["chat", "runs"]) {
    at(part).hidden = part !== name;
    at("to-" + part).toggleAttribute("aria-current", part === name);
  }
  document.title = "minilora " + name;
  if (name === "runs") openRuns();
  else at("text").focus();
}

(async () => {
  const chat = await openChat(), runs = await openRuns();
  at("to-chat").hidden = !chat;
  at("to-runs").hidden = chat && !runs;
  for (const part of ["chat", "runs"]) at("to-" + part).addEventListener("click", () => open(part));
  open(chat ? "chat" : "runs");
  setInterval(() => { if (!at("runs").hidden && !document.hidden) openRuns(); }, 5000);
})();
