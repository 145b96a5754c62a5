// One answer from the server: what is sent, and what its events add up to.

import { stream } from "./api.js";
import { fields, system } from "./settings.js";

/** Ask for what follows some messages. props: the server's; told(piece, figures, layers) after every event.
 *
 * Returns the figures; raises what the stream raises. Figures: {tokens, speed, layers, share, bytes, dense, reason}.
 */
export async function answer(messages, props, signal, told) {
  const chats = Boolean(props.chat_template);
  const path = chats ? "v1/chat/completions" : "v1/completions";
  const sums = { tokens: 0, counted: 0, layers: [], bytes: 0 };
  let reason = null;
  let first = 0;
  let exact = null;
  for await (const event of stream(path, request(messages, chats), signal)) {
    const choice = event.choices?.[0];
    const piece = choice?.delta?.content ?? choice?.text ?? "";
    reason = choice?.finish_reason ?? reason;
    if (event.timings && event.lazyneuron) exact = final(event); // the chunk with the usage has times alone
    else if (choice && event.lazyneuron) {
      first ||= performance.now();
      add(sums, event.lazyneuron);
    }
    told(piece, exact ?? so_far(sums, first, props), event.lazyneuron?.layers);
  }
  return { ...(exact ?? so_far(sums, first, props)), reason };
}

function request(messages, chats) {
  const texts = messages.map(({ role, content }) => ({ role, content }));
  // A model without a chat template goes on with the text as it stands.
  if (!chats) return { max_tokens: 256, ...fields(), prompt: texts.map((message) => message.content).join("") };
  if (system()) texts.unshift({ role: "system", content: system() });
  return { ...fields(), messages: texts };
}

function add(sums, { layers, bytes_per_token: bytes }) {
  sums.tokens += 1;
  if (!layers?.length) return;
  sums.counted += 1;
  sums.bytes += bytes;
  layers.forEach((share, i) => (sums.layers[i] = (sums.layers[i] ?? 0) + share));
}

function so_far(sums, first, props) {
  const n = sums.counted;
  const layers = sums.layers.map((sum) => sum / n);
  const neurons = props.neurons ?? [];
  const all = neurons.reduce((a, b) => a + b, 0);
  return {
    tokens: sums.tokens,
    speed: sums.tokens > 1 ? (1000 * (sums.tokens - 1)) / (performance.now() - first) : 0,
    layers,
    share: all ? layers.reduce((sum, share, i) => sum + share * neurons[i], 0) / all : 0,
    bytes: n ? sums.bytes / n : 0,
    dense: props.dense_bytes_per_token,
  };
}

function final({ timings, lazyneuron }) {
  return {
    tokens: timings.predicted_n,
    speed: timings.predicted_per_second,
    layers: timings.predicted_n > 1 ? lazyneuron.layers : [],
    share: lazyneuron.computed_share,
    bytes: lazyneuron.bytes_per_token,
    dense: lazyneuron.dense_bytes_per_token,
  };
}
