// One answer: the request made from a conversation, and the stream read into it.

import { streamChat } from "./api.js";

// A page that is left loses its connections before it is told so: that is a stop, not a failure.
let leaving = false;
window.addEventListener("beforeunload", () => {
  leaving = true;
  setTimeout(() => { leaving = false; }, 3000); // it stayed after all
});

const NUMBERS = ["temperature", "top_p", "top_k", "max_tokens"];

/** An answer before its first token. */
export function newAnswer(model, seed) {
  return { model, seed, content: "", reasoning: "", state: "running", error: null, stats: null };
}

/** The messages that lead to `turn`, as its column has them; turns without an answer are left out. */
export function messagesFor(chat, turn, column, system) {
  const messages = system.trim() ? [{ role: "system", content: system }] : [];
  for (const earlier of chat.turns.slice(0, chat.turns.indexOf(turn))) {
    const answer = earlier.answers[Math.min(column, earlier.answers.length - 1)];
    if (!answer?.content) continue;
    messages.push({ role: "user", content: earlier.text }, { role: "assistant", content: answer.content });
  }
  return [...messages, { role: "user", content: turn.text }];
}

function requestBody(answer, messages, settings) {
  const body = { model: answer.model, messages };
  for (const name of NUMBERS) {
    if (settings[name] !== "") body[name] = Number(settings[name]);
  }
  if (answer.seed !== null) body.seed = answer.seed;
  return body;
}

/** Fills `answer` until it is done, stopped or failed; onChange() after each piece. Returns the error, if any. */
export async function fillAnswer(answer, messages, settings, signal, onChange) {
  const begin = performance.now();
  let first = null;
  let last = null;
  let pieces = 0;
  let usage = null;
  let timings = null;
  let finish = null;
  const measure = () => {
    const seconds = first === null ? 0 : (last - first) / 1000;
    const tokens = timings?.predicted_n ?? usage?.completion_tokens ?? pieces;
    return {
      firstMs: first === null ? null : first - begin,
      tokens,
      exact: Boolean(timings ?? usage), // else a piece is taken for a token
      rate: timings?.predicted_per_second ?? (seconds > 0 ? Math.max(tokens - 1, 0) / seconds : null),
      promptTokens: usage?.prompt_tokens ?? null,
      cachedTokens: timings?.cache_n ?? usage?.prompt_tokens_details?.cached_tokens ?? null,
      promptRate: timings?.prompt_per_second ?? null,
      finish,
    };
  };
  const onChunk = (chunk) => {
    const choice = chunk.choices?.[0];
    const content = choice?.delta?.content ?? "";
    const reasoning = choice?.delta?.reasoning_content ?? "";
    if (content || reasoning) {
      last = performance.now();
      first ??= last;
      pieces += 1;
      answer.content += content;
      answer.reasoning += reasoning;
    }
    finish = choice?.finish_reason ?? finish;
    usage = chunk.usage ?? usage;
    timings = chunk.timings ?? timings;
    answer.stats = measure();
    onChange();
  };
  let failure = null;
  try {
    await streamChat(requestBody(answer, messages, settings), { signal, onChunk });
    answer.state = "done";
  } catch (error) {
    if (error.name === "AbortError" || (leaving && error.status === 0)) {
      answer.state = "stopped";
    } else {
      failure = error;
      answer.state = "error";
      answer.error = error.message;
    }
  }
  onChange();
  return failure;
}
