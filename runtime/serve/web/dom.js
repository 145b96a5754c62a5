// Elements are made by name and text alone: nothing is ever parsed as HTML.

/** The element with an id. */
export const by = (id) => document.getElementById(id);

/** A new element: its properties, then children (elements or texts). */
export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes("-") || name === "role") element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children);
  return element;
}

/** A button that does something. label: what a screen reader says where the text is a sign. */
export function button(text, does, label = "") {
  const made = make("button", { type: "button", className: "quiet", textContent: text });
  if (label) made.setAttribute("aria-label", label);
  made.addEventListener("click", does);
  return made;
}

/** Copy a text; where the browser does not let us, through a selection. */
export async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const area = make("textarea", { value: text, className: "unseen" });
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
}

/** Calls `work` at most once per frame, and at last with what was asked for last. */
export function perFrame(work) {
  let waiting = false;
  return () => {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => {
      waiting = false;
      work();
    });
  };
}
