// The blind rating of two systems: sides are shuffled row by row, marks are kept in the browser's own storage, and counted or
// exported only by a click. Texts are set as textContent: an answer cannot become markup.
"use strict";
(() => {
  const box = document.getElementById("rate");
  if (!box) return;
  const data = JSON.parse(document.getElementById("rate-data").textContent);
  const at = name => document.getElementById("rate-" + name);
  let storage = null;
  try { storage = window.localStorage; storage.getItem(data.key); } catch { storage = null; }
  const fresh = () => ({ flip: data.pairs.map(() => Math.random() < 0.5), marks: data.pairs.map(() => null) });
  let state = null;
  try { state = JSON.parse(storage.getItem(data.key)); } catch {}
  if (!state || !Array.isArray(state.flip) || state.flip.length !== data.pairs.length) state = fresh();
  let place = Math.max(0, state.marks.indexOf(null));
  const keep = () => { try { storage.setItem(data.key, JSON.stringify(state)); } catch {} };
  const system = mark => mark === "left" || mark === "right" ? ((mark === "left") !== state.flip[place] ? "a" : "b") : mark;
  function show() {
    const [question, reference, a, b] = data.pairs[place];
    at("place").textContent = "Row " + (place + 1) + " of " + data.pairs.length + ", " + state.marks.filter(m => m).length + " rated";
    at("question").textContent = question;
    at("reference").textContent = reference;
    at("left").textContent = state.flip[place] ? b : a;
    at("right").textContent = state.flip[place] ? a : b;
    for (const button of box.querySelectorAll("[data-mark]"))
      button.className = state.marks[place] && state.marks[place] === system(button.dataset.mark) ? "chosen" : "";
  }
  function count() {
    const n = { a: 0, b: 0, tie: 0, bad: 0 };
    for (const m of state.marks) if (m) n[m] += 1;
    const total = n.a + n.b;
    // two-sided sign test: how often a fair coin is as far from half
    let p = 0, term = Math.pow(0.5, total);
    for (let k = 0; k <= total; k++) {
      if (Math.abs(2 * k - total) >= Math.abs(n.a - n.b)) p += term;
      term = term * (total - k) / (k + 1);
    }
    return { a: n.a, b: n.b, tie: n.tie, bad: n.bad, p: total ? Math.min(1, p) : 1 };
  }
  box.addEventListener("click", event => {
    const button = event.target.closest("button");
    if (!button) return;
    if (button.dataset.mark) {
      state.marks[place] = system(button.dataset.mark);
      keep();
      at("result").textContent = "";
      if (place + 1 < data.pairs.length) place += 1;
    } else if (button.dataset.go) {
      place = Math.min(data.pairs.length - 1, Math.max(0, place + Number(button.dataset.go)));
    } else if (button.id === "rate-reveal") {
      const c = count();
      at("result").textContent = data.a + " is better in " + c.a + " rows, " + data.b + " in " + c.b + ", equally good in " + c.tie +
        ", both bad in " + c.bad + "; p of no preference (sign test) " + c.p.toFixed(3);
    } else if (button.id === "rate-export") {
      const rows = data.pairs.map((pair, i) => ({ question: pair[0], reference: pair[1], a: pair[2], b: pair[3],
        rating: state.marks[i], left: state.flip[i] ? "b" : "a" }));
      const link = document.createElement("a");
      link.href = URL.createObjectURL(new Blob([JSON.stringify({ a: data.a, b: data.b, result: count(), rows }, null, 1)],
        { type: "application/json" }));
      link.download = "ratings.json";
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 1000);
    } else if (button.id === "rate-clear") {
      state = fresh();
      place = 0;
      keep();
      at("result").textContent = "";
    }
    show();
  });
  box.hidden = false;
  show();
})();
