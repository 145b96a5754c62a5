// What this page's charts show, and what its two sliders do. Every figure comes from the facts in the page; nothing is planned here.

const facts = JSON.parse(document.getElementById("facts").textContent);
const placement = facts.placement;
const nLayers = facts.structure.block_count;
const layers = facts.layers;
const byId = (id) => document.getElementById(id);

const DASH = "-";
const percent = (share, digits = 1) => (share === null || share === undefined ? DASH : `${(100 * share).toFixed(digits)}%`);
const memory = (n) => (n >= 2 ** 30 ? `${(n / 2 ** 30).toFixed(2)} GiB` : `${(n / 2 ** 20).toFixed(1)} MiB`);
const sum = (values) => values.reduce((total, value) => total + value, 0);
const side = (onDevice) => (onDevice ? "device" : "CPU");

function number(value) {
  const size = Math.abs(value);
  const digits = size >= 100 ? 0 : size >= 10 ? 1 : size >= 1 ? 2 : 3;
  return value.toLocaleString("en-US", { minimumFractionDigits: digits, maximumFractionDigits: digits });
}

function duration(seconds) {
  return seconds >= 1e-3 ? `${number(1e3 * seconds)} ms` : `${number(1e6 * seconds)} µs`;
}

function byteUnit(n) {
  const units = [[1e9, "GB"], [1e6, "MB"], [1e3, "kB"]];
  const [scale, name] = units.find(([size]) => n >= size) || [1, "B"];
  return { scale, name };
}

function bytes(n) {
  const { scale, name } = byteUnit(n);
  return `${(n / scale).toFixed(scale === 1 ? 0 : 2)} ${name}`;
}

document.documentElement.classList.add("scripted");

// --- bytes -----------------------------------------------------------------------------------------------------------

const PART_KINDS = { attention: "attention", mamba: "attention", embeddings: "head", output: "head", norms: "other", neurons: "other", other: "other" };

rowsChart("parts", {
  label: "Bytes of the file by part",
  rows: () =>
    facts.groups.map((group) => ({
      name: group.kind,
      text: bytes(group.bytes),
      bars: [{ value: group.bytes, kind: PART_KINDS[group.kind] || "ffn" }],
    })),
  top: () => Math.max(...facts.groups.map((group) => group.bytes)),
  unit: byteUnit,
  read: (i) => {
    const group = facts.groups[i];
    return `${group.kind}: ${bytes(group.bytes)}, ${percent(group.bytes / facts.bytes)} of the file, in ${group.tensors} tensors (${Object.keys(group.types).join(", ")})`;
  },
});

const TRAFFIC = { ffn: "FFN and predictor", attention: "attention", head: "output head", other: "other" };
const all = facts.bytes_per_token.exact_all;

if (facts.modes.length) {
  rowsChart("modes", {
    label: "Weights that one token reads, by mode",
    rows: () =>
      facts.modes.map((mode) => ({
        name: mode.mode,
        text: bytes(mode.bytes),
        bars: Object.keys(TRAFFIC).map((part) => ({ value: mode.parts[part], kind: part })),
      })),
    top: () => Math.max(...facts.modes.map((mode) => mode.bytes)),
    unit: byteUnit,
    read: (i) => {
      const { mode, parts, bytes: read } = facts.modes[i];
      const split = Object.entries(TRAFFIC).map(([part, text]) => `${text} ${bytes(parts[part])}`);
      return `${mode}: ${bytes(read)}, ${percent(read / all)} of all: ${split.join(", ")}`;
    },
  });
  rowsChart("bounds", {
    label: "Tokens per second that each memory allows at most, by mode",
    apart: true,
    rows: () =>
      facts.bounds.map((bound) => ({
        name: bound.mode,
        bars: [
          { value: bound.cpu_tokens_per_s, kind: "cold", text: number(bound.cpu_tokens_per_s) },
          { value: bound.device_tokens_per_s, kind: "hot", text: number(bound.device_tokens_per_s) },
        ],
      })),
    top: () => Math.max(...facts.bounds.map((bound) => Math.max(bound.cpu_tokens_per_s, bound.device_tokens_per_s))),
    unit: () => ({ scale: 1, name: "tokens/s" }),
    read: (i) => {
      const bound = facts.bounds[i];
      return `${bound.mode}: ${bytes(bound.bytes)} per token; CPU ${number(bound.cpu_tokens_per_s)}, device ${number(bound.device_tokens_per_s)} tokens/s at most`;
    },
  });
} else {
  for (const name of ["modes", "bounds"]) byId(`chart-${name}`).hidden = true;
}

// --- neurons ---------------------------------------------------------------------------------------------------------

let layer = 0;
const redrawLayer = [];

function chooseLayer(i) {
  layer = i;
  byId("layer").value = i;
  byId("layer-name").textContent = `${i}: ${percent(layers[i].active)} fire`;
  byId("layer").setAttribute("aria-valuetext", `layer ${i}, ${percent(layers[i].active)} of its neurons fire`);
  for (const draw of redrawLayer) draw();
}

if (facts.curves.length) {
  const points = facts.curves[0].length;
  const across = (fold) => Array.from({ length: points }, (_, i) => fold(facts.curves.map((curve) => curve[i])));
  const lowest = across((values) => Math.min(...values));
  const highest = across((values) => Math.max(...values));
  const mean = across((values) => sum(values) / values.length);
  const line100 = (values) => values.map((value, i) => [(100 * i) / (points - 1), 100 * value]);
  const share = Math.max(...layers.map((one) => one.active));

  redrawLayer.push(
    chart("curves", {
      label: "Share of the activations that the hottest neurons carry",
      count: points,
      height: 280,
      first: () => Math.round((points - 1) / 5),
      draw(root, width, height, item) {
        const place = axes(root, width, height, { low: 0, high: 100, label: "% of the neurons, hottest first" }, { low: 0, high: 100, label: "% of the activations" });
        const upper = line100(highest);
        const edge = [...upper, ...line100(lowest).reverse()].map(([x, y]) => `${place.x(x).toFixed(1)},${place.y(y).toFixed(1)}`);
        svg(root, "polygon", { class: "band", points: edge.join(" ") });
        line(root, "mean", line100(mean), place);
        line(root, "hot", line100(facts.curves[layer]), place);
        if (item !== null) {
          const x = (100 * item) / (points - 1);
          rule(root, x, place);
          svg(root, "circle", { class: "hot", cx: place.x(x), cy: place.y(100 * facts.curves[layer][item]), r: 4 });
        }
        return (x) => Math.round((place.fromX(x) / 100) * (points - 1));
      },
      read: (i) =>
        `layer ${layer}: the hottest ${((100 * i) / (points - 1)).toFixed(0)} % carry ${percent(facts.curves[layer][i])}; all layers ${percent(lowest[i])} to ${percent(highest[i])}, mean ${percent(mean[i])}`,
    }),
    chart("firing", {
      label: "Share of the neurons that fires for a token, by layer",
      count: nLayers,
      height: 280,
      first: () => layer,
      choose: chooseLayer,
      draw(root, width, height, item) {
        const place = axes(root, width, height, layerAxis(nLayers), shareAxis("% of the neurons", share));
        layers.forEach((one, i) => column(root, `${i === layer ? "hot" : "cold"}${i === item ? " pointed" : ""}`, i, 0, 100 * one.active, place));
        return (x) => Math.round(place.fromX(x));
      },
      read: (i) =>
        `layer ${i}: ${percent(layers[i].active)} fire; ${percent(layers[i].hot)} carry 80 % of the activations; ${percent(layers[i].rare)} fire for less than 1 % of the tokens`,
    }),
  );
  byId("layer").addEventListener("input", (event) => chooseLayer(Number(event.target.value)));
  chooseLayer(0);
}

// --- predictors ------------------------------------------------------------------------------------------------------

function readPredictor(i) {
  const one = layers[i];
  if (!one.rank) return `layer ${i}: no predictor, computed exactly`;
  return `layer ${i}: ${one.type || ""} rank ${one.rank}; recall ${percent(one.recall)}, precision ${percent(one.precision)}, ${percent(one.predicted_share)} predicted, energy kept ${percent(one.energy_kept, 2)}`;
}

// Layers without a predictor are shaded.
function shadeExact(root, place) {
  layers.forEach((one, i) => {
    if (!one.rank) svg(root, "rect", { class: "exact", x: place.x(i - 0.5), y: place.top, width: place.x(1) - place.x(0), height: place.bottom - place.top });
  });
}

const QUALITY = { precision: "precision", recall: "recall", energy_kept: "energy" };

chart("quality", {
  label: "Recall, precision and energy kept of each layer's predictor",
  count: nLayers,
  height: 260,
  read: readPredictor,
  draw(root, width, height, item) {
    const place = axes(root, width, height, layerAxis(nLayers), { low: 0, high: 100, label: "%" });
    shadeExact(root, place);
    if (item !== null) rule(root, item, place);
    for (const [key, kind] of Object.entries(QUALITY)) {
      const values = layers.map((one) => (one.rank && Number.isFinite(one[key]) ? 100 * one[key] : null));
      line(root, kind, values.map((value, i) => [i, value]), place);
      values.forEach((value, i) => value !== null && svg(root, "circle", { class: kind, cx: place.x(i), cy: place.y(value), r: nLayers > 40 ? 1.6 : 2.6 }));
    }
    return (x) => Math.round(place.fromX(x));
  },
});

chart("candidates", {
  label: "Share of the neurons that fires, and that is predicted to, by layer",
  count: nLayers,
  height: 260,
  read: (i) => `layer ${i}: ${percent(layers[i].active)} fire, ${layers[i].rank ? `${percent(layers[i].predicted_share)} predicted` : "no predictor: computed exactly"}`,
  draw(root, width, height, item) {
    const most = Math.max(...layers.map((one) => Math.max(one.active || 0, (one.rank && one.predicted_share) || 0)));
    const place = axes(root, width, height, layerAxis(nLayers), shareAxis("% of the neurons", most));
    shadeExact(root, place);
    layers.forEach((one, i) => {
      if (Number.isFinite(one.active)) column(root, `cold${i === item ? " pointed" : ""}`, i, 0, 100 * one.active, place);
      if (one.rank && Number.isFinite(one.predicted_share)) dash(root, i, 100 * one.predicted_share, place);
    });
    return (x) => Math.round(place.fromX(x));
  },
});

// --- placement -------------------------------------------------------------------------------------------------------

const budgets = placement.budgets;
let chosen = placement.begin;
const now = () => budgets[chosen];
const redrawPlacement = [];

redrawPlacement.push(
  chart("split", {
    label: "Share of each layer's neurons on the device",
    count: nLayers,
    height: 280,
    draw(root, width, height, item) {
      const strip = 16;
      const place = axes(root, width, height, layerAxis(nLayers), { low: 0, high: 100, label: "% of the neurons" }, strip);
      now().hot.forEach((n, i) => {
        const pointed = i === item ? " pointed" : "";
        const share = placement.neurons[i] ? (100 * n) / placement.neurons[i] : 0;
        column(root, `hot${pointed}`, i, 0, share, place);
        column(root, `pale${pointed}`, i, share, 100, place);
        if (n > 0) dash(root, i, 100 * now().activations[i], place);
        const box = column(root, i >= now().resident_from ? "hot" : "pale", i, 0, 0, place);
        box.classList.add("strip");
        box.setAttribute("y", place.bottom + 6);
        box.setAttribute("height", strip - 8);
      });
      svg(root, "text", { class: "axis", x: 0, y: height - 6 }, "strip: attention");
      return (x) => Math.round(place.fromX(x));
    },
    read: (i) =>
      `layer ${i}: ${now().hot[i].toLocaleString("en-US")} of ${placement.neurons[i].toLocaleString("en-US")} neurons on the device, ${percent(now().activations[i])} of the activations; attention: ${side(i >= now().resident_from)}; ${number(now().us[i])} µs, waits for the ${side(now().waits[i] === "d")}`,
  }),
);

const most = budgets[budgets.length - 1].budget;
const least = Math.min(placement.reserve, most);
const fromZero = least <= most / 2;
const memoryUnit = most >= 2 ** 31 ? [2 ** 30, "GiB"] : [2 ** 20, "MiB"];

redrawPlacement.push(
  chart("speed", {
    label: "Expected tokens per second over the memory budget",
    count: budgets.length,
    height: 260,
    first: () => chosen,
    choose: chooseBudget,
    draw(root, width, height, item) {
      const [scale, unit] = memoryUnit;
      const low = (fromZero ? 0 : least - (most - least) / 20) / scale;
      const fastest = Math.max(...budgets.map((row) => row.tokens_per_s));
      const place = axes(root, width, height, { low, high: most / scale, label: `budget, ${unit}` }, { low: 0, high: fastest * 1.08, label: "tokens/s" });
      const x = (i) => Math.max(low, budgets[i].budget / scale);
      const stairs = budgets.flatMap((row, i) => (i ? [[x(i), budgets[i - 1].tokens_per_s], [x(i), row.tokens_per_s]] : [[x(i), row.tokens_per_s]]));
      line(root, "speed", stairs, place);
      if (item !== null) rule(root, x(item), place);
      const marker = svg(root, "circle", { class: "marker", cx: place.x(x(chosen)), cy: place.y(now().tokens_per_s), r: 5.5 });
      marker.id = "marker";
      return (pixel) => {
        const wanted = place.fromX(pixel);
        const distance = budgets.map((_, i) => Math.abs(x(i) - wanted));
        return distance.indexOf(Math.min(...distance));
      };
    },
    read: (i) => `${memory(budgets[i].budget)}: ${number(budgets[i].tokens_per_s)} tokens/s, ${memory(budgets[i].bytes)} used`,
  }),
);

const partNames = Object.keys(now().parts);
const longest = Math.max(...budgets.flatMap((row) => Object.values(row.parts)));
const PART_SIDES = { "attention (device)": "hot", "attention (CPU)": "cold", "hot neurons": "hot", "cold neurons": "cold" };
const partKind = (name) => (name === "head" ? (now().head_on_device ? "hot" : "cold") : PART_SIDES[name] || "other");

redrawPlacement.push(
  rowsChart("times", {
    label: "Time per token, by what it waits for",
    rows: () =>
      partNames.map((name) => ({
        name,
        text: now().parts[name] ? duration(now().parts[name]) : "0",
        bars: [{ value: now().parts[name], kind: partKind(name) }],
      })),
    top: () => longest,
    unit: (most) => (most >= 1e-3 ? { scale: 1e-3, name: "ms" } : { scale: 1e-6, name: "µs" }),
    read: (i) => `${partNames[i]}: ${duration(now().parts[partNames[i]])}, ${percent(now().parts[partNames[i]] / now().seconds)} of a token`,
  }),
);

function layerCells(i) {
  const row = now();
  return [
    side(i >= row.resident_from),
    row.hot[i].toLocaleString("en-US"),
    percent(placement.neurons[i] ? row.hot[i] / placement.neurons[i] : null),
    percent(row.activations[i]),
    number(row.us[i]),
    side(row.waits[i] === "d"),
  ];
}

function chooseBudget(i) {
  chosen = i;
  const row = now();
  const texts = {
    "budget-name": memory(row.budget),
    "tokens-per-s": number(row.tokens_per_s),
    time: duration(row.seconds),
    "on-device": memory(row.bytes),
    "hot-share": percent(sum(row.hot) / sum(placement.neurons)),
    limit: row.limit,
    "plan-budget": `${row.budget / 2 ** 20}MiB`,
  };
  for (const [id, text] of Object.entries(texts)) byId(id).textContent = text;
  byId("budget").value = i;
  byId("budget").setAttribute("aria-valuetext", `${memory(row.budget)}: ${number(row.tokens_per_s)} tokens per second`);
  byId("table-layers").querySelectorAll("tbody tr").forEach((tr, layerOf) => {
    layerCells(layerOf).forEach((text, j) => (tr.cells[j + 1].textContent = text));
  });
  for (const draw of redrawPlacement) draw();
}

byId("budget").addEventListener("input", (event) => chooseBudget(Number(event.target.value)));
chooseBudget(Number(byId("budget").min) + placement.begin);
