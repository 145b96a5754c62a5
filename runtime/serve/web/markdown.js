// A model's text as it comes, shown as Markdown. Elements are made one by one: what looks like HTML stays text.

import * as smd from "./vendor/streaming-markdown.js";
import { button, copy } from "./dom.js";

const SAFE = new Set(["http:", "https:", "mailto:"]);

/** Shows text in an element, piece by piece: `write(piece)`, then `end()`. */
export function writer(root) {
  const renderer = smd.default_renderer(root);
  const { data, add_token: add, end_token: end, set_attr: set } = renderer;
  const open = [];
  renderer.add_token = (_, type) => {
    open.push(type);
    // A picture is a link to it: fetching one would tell its server that it was shown.
    add(data, type === smd.IMAGE ? smd.LINK : type);
    if (type === smd.CHECKBOX) data.nodes[data.index].setAttribute("aria-label", "done");
  };
  renderer.end_token = () => {
    const type = open.pop();
    if (type === smd.CODE_FENCE || type === smd.CODE_BLOCK) finishCode(data.nodes[data.index]);
    end(data);
  };
  renderer.set_attr = (_, type, value) => {
    const element = data.nodes[data.index];
    if (type === smd.HREF || type === smd.SRC) setLink(element, value);
    else if (type === smd.LANG) element.dataset.language = value;
    else set(data, type, value);
  };
  const parser = smd.parser(renderer);
  return { write: (text) => smd.parser_write(parser, text), end: () => smd.parser_end(parser) };
}

function setLink(element, address) {
  let url;
  try {
    url = new URL(address);
  } catch {
    return; // of this server, or none at all: text
  }
  if (!SAFE.has(url.protocol)) return;
  element.href = url.href;
  element.rel = "noopener noreferrer nofollow";
  element.target = "_blank";
  if (!element.textContent) element.textContent = url.href;
}

function finishCode(code) {
  const pre = code.parentElement;
  pre.tabIndex = 0;
  const done = button("Copy", async () => {
    await copy(code.textContent);
    done.textContent = "Copied";
    setTimeout(() => (done.textContent = "Copy"), 1500);
  }, "Copy the code");
  done.classList.add("copy");
  pre.append(done);
}
