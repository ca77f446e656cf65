// Hover read-outs and the layer buttons. Without this script the page still shows everything but the other layers.
"use strict";
const tip = document.getElementById("tip");

function say(event, rows) {
  tip.replaceChildren(...rows);
  tip.hidden = false;
  const { offsetWidth: w, offsetHeight: h } = tip;
  const x = event.clientX + 18 + w > innerWidth ? event.clientX - 18 - w : event.clientX + 18;
  tip.style.left = `${Math.max(4, x)}px`;
  tip.style.top = `${Math.max(4, Math.min(event.clientY + 14, innerHeight - h - 8))}px`;
}

function line(text, css, tag = "div") {
  const row = document.createElement(tag);
  if (css) {
    const key = document.createElement("i");
    key.className = `key ${css}`;
    row.append(key);
  }
  row.append(text);
  return row;
}

function titled(text) {
  const row = line(text);
  row.className = "title";
  return row;
}

// Where the pointer is, in the units of the drawing.
function position(svg, event) {
  return new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
}

function nearest(values, wanted) {
  let best = 0;
  values.forEach((value, i) => { if (Math.abs(value - wanted) < Math.abs(values[best] - wanted)) best = i; });
  return best;
}

const number = (value) => (value === null ? "–" : Number(value).toLocaleString("en", { maximumSignificantDigits: 5 }));

for (const svg of document.querySelectorAll("svg.chart")) {
  const chart = JSON.parse(svg.dataset.chart);
  const cursor = svg.querySelector(".cursor");
  const [left, right] = chart.frame;
  svg.addEventListener("pointermove", (event) => {
    const at = Math.min(right, Math.max(left, position(svg, event).x));
    const fraction = (at - left) / (right - left);
    const x = chart.x.low + fraction * (chart.x.high - chart.x.low);
    const rows = chart.lines.map((l) => line(`${l.name}: ${number(l.y[nearest(l.x, x)])}`, l.css));
    cursor.setAttribute("x1", at);
    cursor.setAttribute("x2", at);
    cursor.removeAttribute("hidden");
    say(event, [titled(`${chart.x.label}: ${number(x)}`), ...rows, titled(chart.unit)]);
  });
  svg.addEventListener("pointerleave", () => { tip.hidden = true; cursor.setAttribute("hidden", ""); });
}

for (const score of document.querySelectorAll(".score")) {
  const data = JSON.parse(score.querySelector("script").textContent);
  for (const svg of score.querySelectorAll("svg.row")) {
    const columns = svg.dataset.columns.split(",").map(Number);
    const column = svg.querySelector(".column");
    svg.addEventListener("pointermove", (event) => {
      const at = Math.floor((position(svg, event).x - data.left) / data.cell);
      if (at < 0) return;
      let i = columns.length - 1;
      while (columns[i] > at) i -= 1;
      const token = Number(svg.dataset.first) + i;
      column.setAttribute("x", data.left + data.cell * columns[i]);
      column.setAttribute("width", data.cell * Math.max(1, [...data.texts[token]].length));
      const heading = line(`token ${token + 1}: `);
      heading.append(line(data.texts[token], "", "b"));
      const rows = data.staves.flatMap((staff) => [
        titled(staff.title), ...staff.lines.map(([name, css, values]) => line(`${name}: ${number(values[token])}`, css)),
      ]);
      say(event, [heading, ...rows]);
    });
    svg.addEventListener("pointerleave", () => { tip.hidden = true; column.setAttribute("x", -99); });
  }
}

for (const button of document.querySelectorAll(".tabs button")) {
  button.addEventListener("click", () => {
    for (const other of document.querySelectorAll(".tabs button")) other.setAttribute("aria-pressed", String(other === button));
    for (const panel of document.querySelectorAll(".panel")) panel.hidden = panel.dataset.group !== button.dataset.group;
  });
}
