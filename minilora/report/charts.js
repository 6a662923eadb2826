// Show the values of a chart under the pointer or the finger: of lines from data-values, of a heat map from its cells' titles.
"use strict";
for (const chart of document.querySelectorAll(".chart")) {
  const plot = chart.querySelector(".plot"), told = chart.querySelector("output");
  const cursor = chart.querySelector(".cursor"), slots = chart.querySelectorAll(".legend b");
  const data = JSON.parse(chart.dataset.values || "null");
  const share = x => data.log ? Math.log(x / data.low) / Math.log(data.high / data.low) : (x - data.low) / (data.high - data.low);
  const number = value => String(Number(value.toPrecision(5)));
  const nearest = (points, far) => points.reduce((a, b) => far(b) < far(a) ? b : a);
  function read(event) {
    if (!data) {
      const cell = event.target.querySelector("title");
      if (cell) told.textContent = cell.textContent;
      return;
    }
    const box = plot.getBoundingClientRect(), at = (event.clientX - box.left) / box.width;
    const near = data.series.map(points => nearest(points, p => Math.abs(share(p[0]) - at)));
    const here = nearest(near, p => Math.abs(share(p[0]) - at)), place = 100 * share(here[0]) + "%";
    told.textContent = data.x + " " + (here[2] ?? number(here[0])) + (slots.length ? "" : ": " + number(here[1]));
    slots.forEach((slot, i) => {
      const apart = Math.abs(share(near[i][0]) - share(here[0])) > 0.005;
      slot.textContent = number(near[i][1]) + (apart ? " at " + (near[i][2] ?? number(near[i][0])) : "");
    });
    cursor.setAttribute("x1", place);
    cursor.setAttribute("x2", place);
    cursor.style.visibility = "visible";
  }
  function leave(event) {
    if (event.pointerType !== "mouse") return;  // what a finger has pointed at stays
    told.textContent = "";
    for (const slot of slots) slot.textContent = "";
    if (cursor) cursor.style.visibility = "hidden";
  }
  plot.addEventListener("pointermove", read);
  plot.addEventListener("pointerdown", read);
  plot.addEventListener("pointerleave", leave);
}
