// What the browser remembers: conversations (each under its own key, so that two tabs do not overwrite each other),
// settings, the theme and, if asked, the API key.

const PREFIX = "sleb.";
const CHAT = `${PREFIX}chat.`;

/** localStorage or sessionStorage, or a plain map where the browser refuses them. */
function open(name) {
  try {
    const storage = window[name];
    storage.getItem(`${PREFIX}probe`);
    return storage;
  } catch {
    const map = new Map();
    return {
      getItem: (key) => map.get(key) ?? null,
      setItem: (key, value) => map.set(key, value),
      removeItem: (key) => map.delete(key),
      key: (index) => [...map.keys()][index] ?? null,
      get length() { return map.size; },
    };
  }
}

const local = open("localStorage");
const session = open("sessionStorage");

function read(storage, key) {
  try {
    return JSON.parse(storage.getItem(key));
  } catch {
    return null;
  }
}

/** A conversation: turns of a text and one answer, or two that are compared. */
export function newChat() {
  const id = Date.now().toString(36) + Math.random().toString(36).slice(2, 8);
  return { id, title: "", created: Date.now(), updated: Date.now(), turns: [] };
}

const isText = (value) => typeof value === "string";
const isNumber = (value) => value === null || value === undefined || typeof value === "number";
const isStats = (stats) => ["rate", "firstMs", "tokens", "promptTokens", "promptRate"].every((name) => isNumber(stats?.[name]));
const isAnswer = (answer) => [answer?.model, answer?.content, answer?.reasoning].every(isText) && isStats(answer.stats);
const isTurn = (turn) => isText(turn?.text) && Array.isArray(turn.answers) && turn.answers.length > 0
  && turn.answers.every(isAnswer);
const numberOr = (value, otherwise) => (Number.isFinite(value) ? value : otherwise);
const STATES = ["done", "stopped", "error"]; // one that runs was stopped: the page was closed on it
const STATS = ["firstMs", "tokens", "rate", "promptTokens", "cachedTokens", "promptRate"];

function readAnswer({ model, seed, content, reasoning, state, error, stats }) {
  return {
    model, seed: numberOr(seed, null), content, reasoning,
    state: STATES.includes(state) ? state : "stopped",
    error: isText(error) ? error : null,
    stats: Number.isFinite(stats?.tokens) ? {
      ...Object.fromEntries(STATS.map((name) => [name, numberOr(stats[name], null)])),
      exact: Boolean(stats.exact),
      finish: isText(stats.finish) ? stats.finish : null,
    } : null,
  };
}

/** A conversation of any JSON value: its known fields alone; null if it could not be shown. */
export function readChat(value) {
  if (!Array.isArray(value?.turns) || !value.turns.every(isTurn)) return null;
  const made = newChat();
  return {
    id: isText(value.id) && /^[a-z0-9]{1,40}$/.test(value.id) ? value.id : made.id,
    title: isText(value.title) ? value.title.slice(0, 120) : "",
    created: numberOr(value.created, made.created),
    updated: numberOr(value.updated, made.updated),
    turns: value.turns.map(({ text, answers }) => ({ text, answers: answers.slice(0, 2).map(readAnswer) })),
  };
}

/** A conversation as it was stored; null if there is none that could be shown. */
export function loadChat(id) {
  const chat = readChat(read(local, CHAT + id));
  return chat && { ...chat, id };
}

/** All conversations, the latest first; one that cannot be shown has no turns. */
export function listChats() {
  const keys = Array.from({ length: local.length }, (_, index) => local.key(index));
  const ids = keys.filter((key) => key?.startsWith(CHAT)).map((key) => key.slice(CHAT.length));
  return ids.map((id) => loadChat(id) ?? { id, title: "Cannot be shown", updated: 0 })
    .sort((a, b) => b.updated - a.updated);
}

/** False if the browser has no room left. */
export function saveChat(chat) {
  try {
    local.setItem(CHAT + chat.id, JSON.stringify(chat));
    return true;
  } catch {
    return false;
  }
}

/** The text that is stored, whatever it is. */
export function storedChat(id) {
  return local.getItem(CHAT + id);
}

/** Returns what brings it back, where the browser has room for it still. */
export function deleteChat(id) {
  const stored = storedChat(id);
  local.removeItem(CHAT + id);
  return () => local.setItem(CHAT + id, stored);
}

/** Calls back when another tab has changed the conversations. */
export function onOtherTab(callback) {
  window.addEventListener("storage", (event) => {
    if (event.key === null || event.key.startsWith(CHAT)) callback();
  });
}

export function currentChat() {
  return session.getItem(`${PREFIX}current`);
}

export function setCurrentChat(id) {
  session.setItem(`${PREFIX}current`, id);
}

export const DEFAULTS = Object.freeze({
  temperature: "", top_p: "", top_k: "", max_tokens: "", seed: "", system: "",
});

const settingsKey = (model) => `${PREFIX}settings${model && `.${model}`}`;

/** Settings for a model as the fields hold them, those from before it was known ("") else; an empty one is left to the server. */
export function loadSettings(model) {
  const stored = read(local, settingsKey(model)) ?? read(local, settingsKey(""));
  const texts = Object.entries(stored ?? {}).filter(([name, value]) => name in DEFAULTS && isText(value));
  return { ...DEFAULTS, ...Object.fromEntries(texts) };
}

export function saveSettings(model, settings) {
  local.setItem(settingsKey(model), JSON.stringify(settings));
}

/** What is chosen outside the sampling settings: models, compare, order, differences, panel. */
export function loadChoices() {
  return { models: [], compare: false, inTurns: false, ...read(local, `${PREFIX}choices`) };
}

export function saveChoices(choices) {
  local.setItem(`${PREFIX}choices`, JSON.stringify(choices));
}

export function getKey() {
  return session.getItem(`${PREFIX}key`) ?? local.getItem(`${PREFIX}key`) ?? "";
}

/** Keeps the key until the tab closes, or on this device; an empty one is forgotten everywhere. */
export function setKey(key, keep) {
  session.removeItem(`${PREFIX}key`);
  local.removeItem(`${PREFIX}key`);
  if (key) (keep ? local : session).setItem(`${PREFIX}key`, key);
}

export function keyIsKept() {
  return local.getItem(`${PREFIX}key`) !== null;
}

export function setTheme(theme) {
  local.setItem(`${PREFIX}theme`, theme);
}
