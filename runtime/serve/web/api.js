// The server's endpoints. The key is kept for this tab only, and never put into an address.

const KEY = "lazyneuron-key";

export const key = () => sessionStorage.getItem(KEY) ?? "";
export const setKey = (value) => (value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY));

/** What went wrong, in words. status: 0 where there was no answer; seconds: when to try again, if it can heal. */
export class ServerError extends Error {
  constructor(status, message, seconds = null) {
    super(message);
    this.status = status;
    this.seconds = seconds;
  }
}

/** A JSON object from the server. */
export async function get(path) {
  const response = await ask(path, {});
  return response.json();
}

/** The events of a streamed answer, as objects. signal: ends it. */
export async function* stream(path, body, signal) {
  const response = await ask(path, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true }, return_activity: true }),
    signal,
  });
  for await (const data of events(response.body, signal)) {
    if (data === "[DONE]") return;
    const event = JSON.parse(data);
    if (event.error) throw new ServerError(200, event.error.message ?? "the answer failed");
    yield event;
  }
  throw new ServerError(0, "The answer was cut off: the server has gone.");
}

async function ask(path, options) {
  const headers = { ...options.headers };
  if (key()) headers.Authorization = `Bearer ${key()}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError(0, "The server does not answer. Is it still running?", 3);
  }
  if (response.ok) return response;
  throw await refused(response);
}

async function refused(response) {
  let message = `The server answers with status ${response.status}.`;
  try {
    const { error } = await response.json();
    message = error.message ?? message;
    if (error.n_prompt_tokens && error.n_ctx) {
      message = `The conversation has ${error.n_prompt_tokens} tokens; the model takes ${error.n_ctx}. Begin a new one, or delete messages.`;
    }
  } catch {
    // not our server's form: the status must do
  }
  if (response.status === 401) message = "The server asks for an API key: see Settings.";
  const seconds = Number(response.headers.get("Retry-After")) || null;
  return new ServerError(response.status, message, [429, 503].includes(response.status) ? seconds ?? 5 : null);
}

/** The data of server-sent events, whatever pieces they come in. */
async function* events(body, signal) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      rest += value;
      const blocks = rest.split(/\r?\n\r?\n/);
      rest = blocks.pop();
      for (const block of blocks) {
        const lines = block.split(/\r?\n/).filter((line) => line.startsWith("data:"));
        if (lines.length) yield lines.map((line) => line.slice(5).replace(/^ /, "")).join("\n");
      }
    }
  } finally {
    if (!signal?.aborted) reader.cancel().catch(() => {});
  }
}
