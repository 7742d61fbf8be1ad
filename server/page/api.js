// The server: requests with the key, errors as text, and streams of events.

import { getKey } from "./store.js";

const ROOT = new URL("../", import.meta.url); // also right where a proxy serves the page under a prefix

/** An answer that is an error, or none at all (status 0). */
export class ApiError extends Error {
  constructor(status, message, code = null) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

/** The response, if it is a good one. Throws ApiError, or AbortError when `signal` stopped it. */
export async function request(path, { body, signal } = {}) {
  const headers = {};
  const key = getKey();
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(new URL(path, ROOT), {
      method: body === undefined ? "GET" : "POST",
      headers,
      body: body === undefined ? undefined : JSON.stringify(body),
      signal,
      cache: "no-store",
      credentials: "same-origin",
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "The server cannot be reached. Is it running?");
  }
  if (!response.ok) throw await readError(response);
  return response;
}

async function readError(response) {
  let error = null;
  try {
    error = (await response.json()).error;
  } catch {
    // not one of ours: a proxy's page, perhaps
  }
  const message = error?.message ?? `The server answered ${response.status} ${response.statusText}`.trim();
  return new ApiError(response.status, message, error?.code ?? null);
}

/** The tiers, as GET /v1/models lists them, each under its first name only. */
export async function fetchTiers() {
  const cards = (await (await request("v1/models")).json()).data;
  const depths = cards.map((card) => card.pruning?.depth ?? card.id);
  return cards.filter((card, index) => depths.indexOf(depths[index]) === index);
}

/** The data of each event of a response, as text. */
export async function* readEvents(body) {
  const reader = body.getReader();
  const decoder = new TextDecoder();
  let buffer = "";
  let data = [];
  try {
    for (;;) {
      const { value, done } = await reader.read();
      buffer += decoder.decode(value, { stream: !done });
      const lines = buffer.split("\n");
      buffer = done ? "" : lines.pop();
      for (const raw of lines) {
        const line = raw.endsWith("\r") ? raw.slice(0, -1) : raw;
        if (line.startsWith("data:")) data.push(line.slice(line[5] === " " ? 6 : 5));
        if (line === "" && data.length) {
          yield data.join("\n");
          data = [];
        }
      }
      if (done) return;
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** Streams a chat completion: onChunk(chunk) for each, until [DONE]. Throws ApiError or AbortError. */
export async function streamChat(body, { signal, onChunk }) {
  const response = await request("v1/chat/completions", {
    body: { ...body, stream: true, stream_options: { include_usage: true } },
    signal,
  });
  try {
    for await (const data of readEvents(response.body)) {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ApiError(200, chunk.error.message ?? String(chunk.error), chunk.error.code);
      onChunk(chunk);
    }
  } catch (error) {
    if (error.name === "AbortError" || error instanceof ApiError) throw error;
    throw new ApiError(0, "The connection broke before the answer was complete.");
  }
  throw new ApiError(0, "The connection ended before the answer was complete.");
}
