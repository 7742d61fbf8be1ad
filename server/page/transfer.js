// Conversations as files: saved from the browser, and read back. What is read is checked whole before any of it is kept.

import { saveFile } from "./dom.js";
import * as store from "./store.js";

const MAX_BYTES = 20 * 2 ** 20; // a browser keeps 5 or 10 MB
const MAX_CHATS = 1000;

/** One conversation as it is stored, whatever it is. */
export function exportChat(id) {
  saveFile(`sleb-${id}.json`, store.storedChat(id));
}

export function exportAll() {
  saveFile("sleb-conversations.json", JSON.stringify(store.listChats().filter((chat) => chat.turns), null, 2));
}

/**
 * Keeps the conversations of a file that was exported: {added: their ids, known: how many were here already}. None that is
 * here is replaced. Throws Error with what is wrong, and then nothing is kept.
 */
export async function importFile(file) {
  if (file.size > MAX_BYTES) throw new Error(`${file.name} is larger than ${MAX_BYTES / 2 ** 20} MiB`);
  let content;
  try {
    content = JSON.parse(await file.text());
  } catch {
    throw new Error(`${file.name} is no JSON`);
  }
  const found = Array.isArray(content) ? content : [content];
  if (!found.length || found.length > MAX_CHATS) {
    throw new Error(`${file.name} holds ${found.length} conversations; it may be 1 to ${MAX_CHATS}`);
  }
  const chats = found.map((chat, index) => {
    const checked = store.readChat(chat);
    if (!checked) throw new Error(`${file.name}: number ${index + 1} is no conversation that this page exported`);
    return checked;
  });
  return keep(chats);
}

function keep(chats) {
  const here = new Set(store.listChats().filter((chat) => chat.turns).map((chat) => JSON.stringify(store.readChat(chat))));
  const added = [];
  let known = 0;
  for (const chat of chats) {
    if (here.has(JSON.stringify(chat))) {
      known += 1;
      continue;
    }
    if (store.storedChat(chat.id) !== null) chat.id = store.newChat().id; // another of that id stays
    if (!store.saveChat(chat)) {
      added.forEach(store.deleteChat);
      throw new Error("The browser has no room for them: delete conversations, or import fewer");
    }
    added.push(chat.id);
    here.add(JSON.stringify(chat));
  }
  return { added, known };
}
