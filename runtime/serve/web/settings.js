// The system prompt and how tokens are chosen: what is left empty is the server's choice.

import { by } from "./dom.js";
import { key, setKey } from "./api.js";

const NAME = "lazyneuron-settings";
const NUMBERS = ["temperature", "top_k", "top_p", "min_p", "repeat_penalty", "max_tokens", "seed"];
const TEXTS = ["system", "stop"];

/** What the user set, by name; texts. */
export function load() {
  try {
    return JSON.parse(localStorage.getItem(NAME)) ?? {};
  } catch {
    return {};
  }
}

/** The fields of a request. */
export function fields() {
  const set = load();
  const found = {};
  for (const name of NUMBERS) if (set[name]) found[name] = Number(set[name]);
  const stops = (set.stop ?? "").split("\n").filter(Boolean);
  if (stops.length) found.stop = stops;
  return found;
}

export const system = () => load().system ?? "";

/** Let the dialog open and save. focus: the field to begin with. */
export function open(focus = "system") {
  const form = by("settings-form");
  const set = load();
  for (const name of [...NUMBERS, ...TEXTS]) form.elements[name].value = set[name] ?? "";
  form.elements.key.value = key();
  by("settings").showModal();
  form.elements[focus].focus();
}

export function setUp(changed) {
  const form = by("settings-form");
  form.addEventListener("submit", (event) => {
    const reset = event.submitter?.value === "reset";
    const set = {};
    for (const name of [...NUMBERS, ...TEXTS]) if (!reset && form.elements[name].value) set[name] = form.elements[name].value;
    localStorage.setItem(NAME, JSON.stringify(set));
    setKey(form.elements.key.value.trim());
    changed();
  });
  by("open-settings").addEventListener("click", () => open());
}

/** Light, dark, or as the system says: each press of the button takes the next. */
export function setUpTheme() {
  const apply = (theme) => {
    if (theme) document.documentElement.dataset.theme = theme;
    else delete document.documentElement.dataset.theme;
    by("theme").setAttribute("aria-label", `Light or dark: ${theme ?? "as the system"}`);
  };
  let theme = localStorage.getItem("lazyneuron-theme");
  apply(theme);
  by("theme").addEventListener("click", () => {
    theme = { light: "dark", dark: null }[theme] ?? (theme === "dark" ? null : "light");
    if (theme) localStorage.setItem("lazyneuron-theme", theme);
    else localStorage.removeItem("lazyneuron-theme");
    apply(theme);
  });
}
