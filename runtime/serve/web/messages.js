// One message on the page: its text, its buttons, and what it cost.

import { button, copy, make } from "./dom.js";
import { writer } from "./markdown.js";
import { strip } from "./strip.js";

const NAMES = { user: "You", assistant: "Model" };

/** A message's element, with `write`, `cost` and `end` for one that is still coming.
 *
 * does: what its buttons do: edit(message), again(message), remove(message).
 */
export function view(message, does, plain) {
  const body = make("div", { className: "body" });
  const cost = strip();
  const tools = make("div", { className: "tools" });
  const label = plain ? "Text" : NAMES[message.role];
  const root = make("article", { className: `message ${message.role}`, "aria-label": label });
  root.append(make("h2", { className: "who", textContent: label }), body);
  if (message.role === "assistant") root.append(cost.root);
  root.append(tools);
  const asMarkdown = message.role === "assistant" && !plain;
  const text = asMarkdown ? writer(body) : { write: (piece) => body.append(piece), end: () => {} };
  body.classList.toggle("plain", !asMarkdown);

  const ready = () => {
    tools.replaceChildren(button("Copy", () => copy(message.content), `Copy: ${label}`));
    if (message.role === "user") tools.append(button("Edit", () => edit(), "Edit and send again"));
    else tools.append(button("Again", () => does.again(message), "Answer again"));
    tools.append(button("Delete", () => does.remove(message), "Delete from here on"));
  };

  const edit = () => {
    const area = make("textarea", { value: message.content, "aria-label": "Edit the message" });
    const save = button("Send", () => does.edit(message, area.value));
    const leave = button("Leave", () => {
      form.replaceWith(body);
      ready();
    });
    const form = make("div", { className: "edit" }, area, make("div", { className: "bar end" }, leave, save));
    area.addEventListener("keydown", (event) => {
      if (event.key === "Escape") leave.click();
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        save.click();
      }
    });
    body.replaceWith(form);
    tools.replaceChildren();
    area.rows = Math.min(12, message.content.split("\n").length + 1);
    area.focus();
  };

  if (message.figures) cost.show(message.figures);
  return {
    root,
    write: text.write,
    cost: cost.show,
    end() {
      text.end();
      ready();
    },
  };
}
