// Charts drawn as SVG into a page's figures: rows of bars, and plots with two axes. Knows pixels and labels; knows nothing of models.
"use strict";

const SVG = "http://www.w3.org/2000/svg";
const LINE = 18; // pixels of a line of small text
const LETTER = 7; // pixels of a letter of it, at most on average
const WIDEST = 56; // pixels of a column

function svg(parent, name, attributes, text) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  parent.append(element);
  return element;
}

// Round numbers from 0 or below `low` to `high`, some `n` of them.
function ticks(low, high, n) {
  const rough = (high - low) / n || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough * 0.85);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9) + 0; i * step <= high * (1 + 1e-9); i++) found.push(i * step);
  return found;
}

// As many decimals as tell the ticks apart.
function tickText(values) {
  const step = values.length > 1 ? values[1] - values[0] : 1;
  const digits = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
  return (value) => value.toLocaleString("en-US", { minimumFractionDigits: digits, maximumFractionDigits: digits });
}

/* A chart in the figure `chart-NAME`. It draws itself anew when its width changes, when it is told to, and when another item is pointed at.

   label: what it shows, for those who cannot see it. height: in pixels, or a function of the width.
   draw(root, width, height, item): fills the SVG element; item is the number of the one pointed at, or null. Returns what finds an item: (x, y) => number.
   count: how many items there are. read(item): its values in words. choose(item): what a click or Enter does with it. */
function chart(name, options) {
  const figure = document.getElementById(`chart-${name}`);
  if (!figure) return () => {};
  const plot = figure.querySelector(".plot");
  const readout = figure.querySelector(".readout");
  const label = `${options.label}. Arrow keys move from item to item.`;
  const root = svg(plot, "svg", { tabindex: 0, role: "img", "aria-label": label });
  let item = null;
  let find = () => null;

  function draw() {
    const width = plot.clientWidth || 600;
    const height = typeof options.height === "function" ? options.height(width) : options.height;
    root.replaceChildren();
    root.setAttribute("viewBox", `0 0 ${width} ${height}`);
    find = options.draw(root, width, height, item);
    readout.textContent = item === null ? "" : options.read(item);
  }

  function point(next) {
    const bounded = next === null ? null : Math.min(options.count - 1, Math.max(0, next));
    if (bounded === item) return;
    item = bounded;
    draw();
  }

  function at(event) {
    const box = root.getBoundingClientRect();
    const scale = root.viewBox.baseVal.width / box.width;
    return find((event.clientX - box.left) * scale, (event.clientY - box.top) * scale);
  }

  root.addEventListener("pointermove", (event) => point(at(event)));
  root.addEventListener("pointerleave", () => point(null));
  root.addEventListener("blur", () => point(null));
  root.addEventListener("focus", () => root.matches(":focus-visible") && point(options.first ? options.first() : 0));
  root.addEventListener("click", (event) => {
    point(at(event));
    if (options.choose && item !== null) options.choose(item);
  });
  root.addEventListener("keydown", (event) => {
    const last = options.count - 1;
    const from = item === null ? 0 : item;
    const moves = { ArrowLeft: from - 1, ArrowUp: from - 1, ArrowRight: from + 1, ArrowDown: from + 1, Home: 0, End: last };
    if (event.key === "Enter" && options.choose && item !== null) options.choose(item);
    else if (event.key in moves) point(moves[event.key]);
    else return;
    event.preventDefault();
  });
  readout.setAttribute("aria-live", "polite");
  new ResizeObserver(draw).observe(plot);
  draw();
  return draw;
}

/* Rows of horizontal bars: a name, one bar of consecutive pieces (or, with `apart`, one bar each), and a text at its end.

   rows(): [{ name, text, bars: [{ value, kind }] }]. top(): the largest value that must fit. unit(top): { scale, name } of the axis. */
function rowsChart(name, { label, rows, top, unit, apart, read }) {
  const count = rows().length;
  const thick = apart ? 13 : 16;
  const pitch = apart ? rows()[0].bars.length * (thick + 3) + 12 : 27;
  return chart(name, {
    label,
    count,
    read,
    height: count * pitch + LINE + 8,
    draw(root, width, height, item) {
      const found = rows();
      const left = Math.max(...found.map((row) => row.name.length)) * LETTER + 14;
      const texts = found.flatMap((row) => (apart ? row.bars.map((bar) => bar.text) : [row.text]));
      const { scale, name: unitName } = unit(top());
      const right = width - Math.max(unitName.length + 2, ...texts.map((text) => text.length)) * LETTER - 12;
      const bottom = count * pitch + 4;
      const x = (value) => left + ((right - left) * value) / (top() || 1);
      const marks = ticks(0, top() / scale, Math.max(2, (right - left) / 80));
      for (const mark of marks) {
        svg(root, "line", { class: "grid", x1: x(mark * scale), x2: x(mark * scale), y1: 2, y2: bottom });
        svg(root, "text", { class: "tick middle", x: x(mark * scale), y: bottom + 14 }, tickText(marks)(mark));
      }
      svg(root, "text", { class: "axis end", x: width - 2, y: bottom + 14 }, unitName);
      found.forEach((row, i) => {
        const y = i * pitch + 6;
        const group = svg(root, "g", { class: item === i ? "row pointed" : "row" });
        svg(group, "text", { class: "name end", x: left - 10, y: y + (pitch - 12) / 2 + 5 }, row.name);
        let start = 0;
        row.bars.forEach((bar, j) => {
          const at = apart ? y + j * (thick + 3) : y;
          const from = apart ? 0 : start;
          const wide = x(from + bar.value) - x(from);
          svg(group, "rect", { class: bar.kind, x: x(from), y: at, width: Math.max(wide, bar.value > 0 ? 1 : 0), height: thick });
          if (apart) svg(group, "text", { class: "value", x: x(bar.value) + 6, y: at + thick - 2 }, bar.text);
          start += bar.value;
        });
        if (!apart) svg(group, "text", { class: "value", x: x(start) + 6, y: y + thick - 3 }, row.text);
      });
      return (_, y) => Math.floor((y - 2) / pitch);
    },
  });
}

/* The axes of a plot. x, y: { low, high, label, format }; returns the pixels of a value, and the edges. */
function axes(root, width, height, x, y, under = 0) {
  const top = LINE + 8;
  const bottom = height - 2 * LINE - 4 - under;
  const yMarks = ticks(y.low, y.high, Math.max(2, (bottom - top) / 44));
  const yText = y.format || tickText(yMarks);
  const left = Math.max(...yMarks.map((mark) => yText(mark).length)) * LETTER + 10;
  const right = width - 10;
  const toX = (value) => left + ((right - left) * (value - x.low)) / (x.high - x.low || 1);
  const toY = (value) => bottom - ((bottom - top) * (value - y.low)) / (y.high - y.low || 1);
  for (const mark of yMarks) {
    svg(root, "line", { class: "grid", x1: left, x2: right, y1: toY(mark), y2: toY(mark) });
    svg(root, "text", { class: "tick end", x: left - 6, y: toY(mark) + 4 }, yText(mark));
  }
  const wanted = Math.max(2, (right - left) / 70);
  const xMarks = ticks(Math.max(x.low, x.first ?? x.low), x.high, x.whole ? Math.min(wanted, x.high - x.low) : wanted);
  const shown = x.whole ? xMarks.filter(Number.isInteger) : xMarks;
  for (const mark of shown) {
    svg(root, "text", { class: "tick middle", x: toX(mark), y: bottom + under + 15 }, tickText(shown)(mark));
  }
  svg(root, "line", { class: "base", x1: left, x2: right, y1: bottom, y2: bottom });
  svg(root, "text", { class: "axis", x: 0, y: 12 }, y.label);
  svg(root, "text", { class: "axis end", x: right, y: height - 6 }, x.label);
  const fromX = (pixel) => x.low + ((pixel - left) / (right - left)) * (x.high - x.low);
  return { x: toX, y: toY, fromX, left, right, top, bottom };
}

// The axis of layers, one unit wide each.
function layerAxis(n) {
  return { low: -0.5, high: n - 0.5, first: 0, whole: true, label: "layer" };
}

// An axis of shares, in percent, from 0 to something round.
function shareAxis(label, most) {
  const high = Math.min(1, most * 1.05 || 1);
  return { low: 0, high: Math.min(100, Math.ceil(high * 20) * 5), label };
}

// A line through points [x, y], broken where y is null or missing.
function line(root, kind, points, place) {
  let drawn = "";
  let pen = "M";
  for (const [x, y] of points) {
    if (y === null || y === undefined) pen = "M";
    else {
      drawn += `${pen}${place.x(x).toFixed(1)} ${place.y(y).toFixed(1)}`;
      pen = "L";
    }
  }
  return svg(root, "path", { class: `line ${kind}`, d: drawn || "M0 0" });
}

function columnWidth(place) {
  return Math.min(WIDEST, (place.x(1) - place.x(0)) * 0.82);
}

// One column of a plot over layers: a rectangle of the layer's width from `low` to `high` on the axis.
function column(root, kind, layer, low, high, place) {
  const wide = columnWidth(place);
  const y = place.y(high);
  return svg(root, "rect", { class: kind, x: place.x(layer) - wide / 2, y, width: wide, height: Math.max(0, place.y(low) - y) });
}

// A short line across a layer's column.
function dash(root, layer, value, place) {
  const y = place.y(value);
  const half = columnWidth(place) / 2;
  svg(root, "line", { class: "mark", x1: place.x(layer) - half, x2: place.x(layer) + half, y1: y, y2: y });
}

// A thin line at one place of the x axis.
function rule(root, x, place) {
  svg(root, "line", { class: "rule", x1: place.x(x), x2: place.x(x), y1: place.top, y2: place.bottom });
}
