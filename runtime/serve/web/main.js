// The page: a list of conversations, the one that is open, and a place to write.

import { ServerError, get } from "./api.js";
import { answer } from "./answer.js";
import { by, button, make, perFrame } from "./dom.js";
import { view } from "./messages.js";
import * as settings from "./settings.js";
import * as store from "./store.js";

const state = { props: {}, open: blank(), list: [], running: null };

function blank() {
  return { id: crypto.randomUUID(), title: "", messages: [], changed: Date.now() };
}

const plain = () => !state.props.chat_template;

// The conversation

function show() {
  const log = by("log");
  log.replaceChildren();
  for (const message of state.open.messages) {
    const shown = view(message, does, plain());
    log.append(shown.root);
    shown.write(message.content);
    shown.end();
  }
  if (!state.open.messages.length) log.append(welcome());
  log.scrollTop = log.scrollHeight;
}

function welcome() {
  const what = plain()
    ? "This model has no chat template: it goes on with the text that you write."
    : "Write a message. Below each answer you see how many of the model's neurons it took.";
  return make("p", { className: "welcome", textContent: what });
}

const does = {
  edit(message, text) {
    if (state.running || !text.trim()) return;
    cutFrom(message);
    send(text);
  },
  again(message) {
    if (state.running) return;
    cutFrom(message);
    respond();
  },
  async remove(message) {
    if (state.running) return;
    cutFrom(message);
    await save();
    show();
    by("text").focus();
  },
};

function cutFrom(message) {
  state.open.messages.splice(state.open.messages.indexOf(message));
}

async function save() {
  const open = state.open;
  open.changed = Date.now();
  open.title ||= (open.messages[0]?.content ?? "").trim().replace(/\s+/g, " ").slice(0, 60);
  if (open.messages.length) await store.keep(open);
  else await store.forget(open.id);
  await list();
}

async function send(text) {
  state.open.messages.push({ role: "user", content: text });
  await save();
  await respond();
}

async function respond() {
  const conversation = state.open;
  const asked = [...conversation.messages];
  const message = { role: "assistant", content: "", figures: null };
  const running = (state.running = new AbortController());
  clearNotice();
  show();
  const shown = view(message, does, plain());
  by("log").querySelector(".welcome")?.remove();
  by("log").append(shown.root);
  busy(true);
  const painted = painter(shown);
  let failed = null;
  try {
    message.figures = await answer(asked, state.props, running.signal, (piece, figures, layers) => {
      message.content += piece;
      message.figures = figures;
      painted.add(piece, figures, layers);
    });
  } catch (error) {
    if (error.name === "AbortError") message.figures = { ...message.figures, reason: "stopped" };
    else failed = error;
  }
  painted.end(message.figures);
  state.running = null;
  busy(false);
  if (message.content || !failed) conversation.messages.push(message);
  else shown.root.remove();
  if (state.open === conversation) await save();
  else await store.keep(conversation);
  if (failed) complain(failed);
  else hear(`The answer is complete: ${message.figures?.tokens ?? 0} tokens.`);
}

/** Puts what came onto the page once per frame, however fast it comes. */
function painter(shown) {
  const log = by("log");
  let text = "";
  let figures = null;
  let layers = null;
  const sentences = speaker();
  const paint = () => {
    const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 60;
    if (text) shown.write(text);
    text = "";
    if (figures) shown.cost(figures, layers);
    if (atEnd) log.scrollTop = log.scrollHeight;
  };
  const soon = perFrame(paint);
  return {
    add(piece, newFigures, newLayers) {
      text += piece;
      figures = newFigures;
      layers = newLayers?.length ? newLayers : layers;
      sentences(piece);
      soon();
    },
    end(last) {
      figures = last;
      layers = null;
      paint();
      shown.end();
      log.scrollTop = log.scrollHeight;
    },
  };
}

/** Tells screen readers finished sentences, not tokens. */
function speaker() {
  let rest = "";
  let told = 0;
  return (piece) => {
    rest += piece;
    const end = Math.max(rest.lastIndexOf(". "), rest.lastIndexOf("\n"), rest.lastIndexOf("? "), rest.lastIndexOf("! "));
    if (end < 0 || performance.now() - told < 1500) return;
    hear(rest.slice(0, end + 1));
    rest = rest.slice(end + 1);
    told = performance.now();
  };
}

const hear = (text) => (by("heard").textContent = text);

function busy(is) {
  by("send").hidden = is;
  by("stop").hidden = !is;
  by("log").setAttribute("aria-busy", String(is));
  if (!is) by("text").focus();
}

// Notices

function complain(error) {
  const heals = error instanceof ServerError && (error.seconds !== null || error.status === 0);
  by("notice-text").textContent = error instanceof ServerError ? error.message : `The page failed: ${error.message}`;
  by("notice-again").hidden = !heals;
  by("notice").hidden = false;
  if (error.status === 401) settings.open("key");
}

function clearNotice() {
  by("notice").hidden = true;
}

// The list

async function list() {
  state.list = await store.all();
  by("list").replaceChildren(...state.list.map(entry));
}

function entry(conversation) {
  const open = button(conversation.title || "Untitled", () => choose(conversation));
  open.className = "entry";
  if (conversation.id === state.open.id) open.setAttribute("aria-current", "true");
  const rename = button("✎", () => renamed(conversation, item), `Rename: ${conversation.title}`);
  const remove = button("✕", () => removed(conversation), `Delete: ${conversation.title}`);
  const item = make("li", {}, open, rename, remove);
  return item;
}

function renamed(conversation, item) {
  const field = make("input", { value: conversation.title, "aria-label": "Title of the conversation" });
  const done = async (keep) => {
    if (keep && field.value.trim()) {
      conversation.title = field.value.trim();
      if (conversation.id === state.open.id) state.open.title = conversation.title;
      await store.keep(conversation);
    }
    await list();
  };
  field.addEventListener("keydown", (event) => {
    if (event.key === "Enter") done(true);
    if (event.key === "Escape") done(false);
  });
  item.replaceChildren(field, button("Keep", () => done(true)));
  field.select();
}

async function removed(conversation) {
  await store.forget(conversation.id);
  if (conversation.id === state.open.id) choose(blank());
  await list();
}

function choose(conversation) {
  if (state.running) state.running.abort();
  state.open = conversation;
  clearNotice();
  show();
  list();
  narrow(false);
  by("text").focus();
}

function narrow(open) {
  by("side").classList.toggle("open", open);
  by("open-side").setAttribute("aria-expanded", String(open));
  if (open) by("new").focus();
}

// Files of conversations

async function download() {
  const address = URL.createObjectURL(new Blob([await store.exported()], { type: "application/json" }));
  make("a", { href: address, download: "lazyneuron-conversations.json" }).click();
  setTimeout(() => URL.revokeObjectURL(address), 1000);
}

async function upload(file) {
  try {
    for (const conversation of store.imported(await file.text())) await store.keep(conversation);
  } catch (error) {
    complain(new ServerError(1, `This file cannot be imported: ${error.message}.`));
  }
  await list();
}

// Begin

function setUpWriting() {
  const text = by("text");
  const grow = () => {
    text.rows = Math.min(10, text.value.split("\n").length);
  };
  const submit = () => {
    if (state.running || !text.value.trim()) return;
    const value = plain() ? text.value : text.value.trim();
    text.value = "";
    grow();
    send(value);
  };
  text.addEventListener("input", grow);
  text.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      submit();
    }
  });
  by("write").addEventListener("submit", (event) => {
    event.preventDefault();
    submit();
  });
  by("stop").addEventListener("click", () => state.running?.abort());
}

function setUpButtons() {
  by("new").addEventListener("click", () => choose(blank()));
  by("open-side").addEventListener("click", () => narrow(true));
  by("close-side").addEventListener("click", () => narrow(false));
  by("export").addEventListener("click", download);
  by("import").addEventListener("click", () => by("import-file").click());
  by("import-file").addEventListener("change", async (event) => {
    if (event.target.files[0]) await upload(event.target.files[0]);
    event.target.value = "";
  });
  by("notice-close").addEventListener("click", clearNotice);
  by("notice-again").addEventListener("click", async () => {
    clearNotice();
    if (!state.props.n_ctx) await meet();
    if (state.open.messages.at(-1)?.role === "user") respond();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || by("settings").open) return;
    if (state.running) state.running.abort();
    narrow(false);
  });
}

/** Ask the server what it serves. */
async function meet() {
  try {
    state.props = await get("props");
  } catch (error) {
    complain(error);
    return;
  }
  const { model_alias: name, ffn, n_ctx: context, neurons } = state.props;
  by("name").textContent = name;
  document.title = `${name} · lazyneuron`;
  by("facts").textContent = `${ffn} · ${neurons.length} layers · ${context} tokens of context`;
  by("text").placeholder = plain() ? "Text to go on with" : "Message";
  show();
}

settings.setUp(() => {
  if (!state.props.n_ctx) meet();
});
settings.setUpTheme();
setUpWriting();
setUpButtons();
await store.open();
await list();
if (state.list.length) state.open = state.list[0];
show();
await list();
await meet();
document.documentElement.dataset.ready = "";
by("text").focus();
