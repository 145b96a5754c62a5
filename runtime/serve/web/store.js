// Conversations, in this browser's database. Without one (private windows) they last as long as the page.

const NAME = "lazyneuron";
const TABLE = "conversations";
let database = null;
const memory = new Map();

/** Open the database. */
export async function open() {
  database = await new Promise((resolve) => {
    let request;
    try {
      request = indexedDB.open(NAME, 1);
    } catch {
      resolve(null);
      return;
    }
    request.onupgradeneeded = () => request.result.createObjectStore(TABLE, { keyPath: "id" });
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => resolve(null);
  });
}

/** All conversations, the one that changed last first. */
export async function all() {
  const found = database ? await run("readonly", (table) => table.getAll()) : [...memory.values()];
  return found.sort((a, b) => b.changed - a.changed);
}

/** Keep a conversation: {id, title, messages, changed}. */
export async function keep(conversation) {
  const plain = structuredClone(conversation);
  if (database) await run("readwrite", (table) => table.put(plain));
  else memory.set(plain.id, plain);
}

/** Forget one. */
export async function forget(id) {
  if (database) await run("readwrite", (table) => table.delete(id));
  else memory.delete(id);
}

/** A text with all conversations, and those of such a text; raises where it is none. */
export async function exported() {
  return JSON.stringify({ lazyneuron: 1, conversations: await all() }, null, 1);
}

export function imported(text) {
  const { lazyneuron, conversations } = JSON.parse(text);
  if (lazyneuron !== 1 || !Array.isArray(conversations)) throw new Error("no conversations of this page");
  return conversations.map(checked);
}

function checked({ title, messages, changed }) {
  if (!Array.isArray(messages)) throw new Error("a conversation without messages");
  const roles = ["user", "assistant"];
  return {
    id: crypto.randomUUID(),
    title: String(title ?? ""),
    changed: Number(changed) || Date.now(),
    messages: messages.map((message) => {
      if (!roles.includes(message.role)) throw new Error(`a message of role ${message.role}`);
      return { role: message.role, content: String(message.content), figures: message.figures ?? null };
    }),
  };
}

function run(mode, work) {
  return new Promise((resolve, reject) => {
    const request = work(database.transaction(TABLE, mode).objectStore(TABLE));
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}
