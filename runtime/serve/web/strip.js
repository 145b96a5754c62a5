// What an answer cost: tokens per second, the share of the neurons computed, bytes read; and a strip with a bar for
// each layer, live.

import { make } from "./dom.js";

const HEIGHT = 28;

/** Figures below a message: `show(figures, last)`, with the means and the last token's layers. */
export function strip() {
  const words = make("span", { className: "figures" });
  const canvas = make("canvas", { className: "layers", height: HEIGHT, "aria-hidden": "true" });
  const root = make("div", { className: "cost" }, canvas, words);
  let drawn = "";
  return {
    root,
    show(figures, last = null) {
      words.textContent = said(figures);
      words.title = inWords(figures);
      const key = JSON.stringify([figures.layers, last]);
      canvas.hidden = !figures.layers?.length;
      if (key !== drawn && !canvas.hidden) draw(canvas, figures.layers, last);
      drawn = key;
    },
  };
}

function draw(canvas, means, last) {
  const scale = window.devicePixelRatio || 1;
  const step = Math.max(2, Math.min(8, Math.floor(260 / means.length)));
  canvas.width = means.length * step * scale;
  canvas.height = HEIGHT * scale;
  canvas.style.width = `${means.length * step}px`;
  canvas.style.height = `${HEIGHT}px`;
  const pen = canvas.getContext("2d");
  const colours = getComputedStyle(document.documentElement); // the canvas may not be in the document yet
  const [cold, hot] = ["--cold", "--hot"].map((name) => colours.getPropertyValue(name).trim());
  pen.scale(scale, scale);
  // Shares are small: the root makes one in a hundred visible beside one in three.
  const tall = (share) => Math.max(1, Math.sqrt(share) * HEIGHT);
  means.forEach((mean, i) => {
    pen.fillStyle = cold;
    pen.fillRect(i * step, HEIGHT - tall(mean), step - 1, tall(mean));
    if (last?.length) {
      pen.fillStyle = hot;
      pen.fillRect(i * step, HEIGHT - tall(last[i]), step - 1, 2);
    }
  });
}

function said(f) {
  const parts = [];
  if (f.tokens) parts.push(`${f.tokens} tokens`);
  if (f.speed) parts.push(`${short(f.speed)} tokens/s`);
  if (f.layers?.length) parts.push(`${percent(f.share)} of neurons`);
  if (f.bytes) parts.push(`${size(f.bytes)} a token${f.dense ? ` (dense: ${size(f.dense)})` : ""}`);
  if (f.reason === "length") parts.push("length limit reached");
  if (f.reason === "stopped") parts.push("stopped");
  return parts.join(" · ");
}

/** The strip for those who cannot see it. */
function inWords(f) {
  if (!f.layers?.length) return "";
  const most = f.layers.indexOf(Math.max(...f.layers));
  return `Of ${f.layers.length} layers, layer ${most} computed most: ${percent(f.layers[most])} of its neurons.`;
}

const short = (x) => (x < 10 ? x.toFixed(1) : Math.round(x).toString());
const percent = (x) => `${(100 * x).toFixed(x < 0.0995 ? 1 : 0)} %`;

function size(bytes) {
  for (const [unit, least] of [["GB", 1e9], ["MB", 1e6], ["kB", 1e3]]) {
    if (bytes >= least) return `${short(bytes / least)} ${unit}`;
  }
  return `${bytes} B`;
}
