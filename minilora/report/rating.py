"""The part of a page on which a person rates two systems without knowing which is which.

Sides are shuffled row by row. The marks are counted only when asked for, kept in the browser's own storage, and written as a
JSON file by a click. The script knows texts as text (textContent): an answer cannot become markup.
"""

import hashlib
import json

from .html import embed, escape

RATE_STYLE = """
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: .8rem } @media (max-width: 40rem) { .pair { grid-template-columns: 1fr } }
#rate button { font: inherit; color: var(--text); background: var(--card); border: 1px solid var(--line); border-radius: 6px;
  padding: .4rem .8rem; margin: .3rem .4rem .3rem 0; cursor: pointer } #rate button:hover, #rate button:focus-visible { border-color: var(--a) }
#rate button.chosen { border: 2px solid var(--a) }
"""

RATE_SCRIPT = """
"use strict";
(() => {
  const box = document.getElementById("rate");
  if (!box) return;
  const data = JSON.parse(document.getElementById("rate-data").textContent);
  const at = name => document.getElementById("rate-" + name);
  let storage = null;
  try { storage = window.localStorage; storage.getItem(data.key); } catch { storage = null; }
  let state = null;
  try { state = JSON.parse(storage.getItem(data.key)); } catch {}
  if (!state || !Array.isArray(state.flip) || state.flip.length !== data.pairs.length)
    state = { flip: data.pairs.map(() => Math.random() < 0.5), marks: data.pairs.map(() => null) };
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
      at("result").textContent = data.a + " is better in " + c.a + " rows, " + data.b + " in " + c.b + ", as good in " + c.tie +
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
      state = { flip: data.pairs.map(() => Math.random() < 0.5), marks: data.pairs.map(() => null) };
      place = 0;
      keep();
      at("result").textContent = "";
    }
    show();
  });
  box.hidden = false;
  show();
})();
"""


def rating_block(pairs: list[list[str]], a: str, b: str) -> str:
    """HTML of the rating of pairs [question, reference, answer of a, answer of b]; a and b are the names to be told at the end."""
    key = "minilora-rating-" + hashlib.sha256(json.dumps([pairs, a, b]).encode()).hexdigest()[:16]
    marks = (("left", "Left is better"), ("right", "Right is better"), ("tie", "As good"), ("bad", "Both bad"))
    buttons = "".join(f'<button data-mark="{mark}">{escape(text)}</button>' for mark, text in marks)
    data = embed("rate-data", {"key": key, "a": a, "b": b, "pairs": pairs})
    return (
        f'<noscript><p class="dim">Rating needs the script of this page.</p></noscript><section id="rate" hidden>'
        f'<p id="rate-place" class="dim"></p><div class="text" id="rate-question"></div>'
        f'<details><summary>reference</summary><div class="text" id="rate-reference"></div></details>'
        f'<div class="pair"><div class="text" id="rate-left"></div><div class="text" id="rate-right"></div></div>'
        f'<p>{buttons}</p><p><button data-go="-1">Back</button><button data-go="1">Skip</button>'
        f'<button id="rate-reveal">Show the result</button><button id="rate-export">Export ratings</button>'
        f'<button id="rate-clear">Start again</button></p><p id="rate-result" role="status"></p></section>{data}'
    )
