// The list of conversations: choose, rename, delete (with a way back), export.

import { $, el, iconButton, toast } from "./dom.js";
import { deleteChat, listChats } from "./store.js";
import { exportChat } from "./transfer.js";

export const titleOf = (chat) => chat.title || "New conversation";

/** `actions`: open(id), opened() gives the current id, removed(id) before one is deleted, renamed(chat). */
export function renderSidebar(actions) {
  const chats = listChats();
  $("chats").replaceChildren(...chats.map((chat) => row(chat, actions)));
  $("no-chats").hidden = chats.length > 0;
  $("export-all").disabled = chats.length === 0;
}

function row(chat, actions) {
  const current = chat.id === actions.opened();
  const open = el("button", { type: "button", class: "chat-title", text: titleOf(chat), title: titleOf(chat),
    disabled: !chat.turns, "aria-current": current ? "true" : null, onclick: () => actions.open(chat.id) });
  const item = el("li", { class: current ? "current" : "" }, open, el("span", { class: "actions" },
    chat.turns ? iconButton("edit", `Rename: ${titleOf(chat)}`, () => rename(chat, item, actions)) : null,
    iconButton("save", `Export: ${titleOf(chat)}`, () => exportChat(chat.id)),
    iconButton("delete", `Delete: ${titleOf(chat)}`, () => remove(chat, actions))));
  return item;
}

function rename(chat, item, actions) {
  const input = el("input", { type: "text", "aria-label": "Title of the conversation", maxlength: 120 });
  input.value = titleOf(chat);
  let done = false;
  const finish = (keep) => {
    if (done) return;
    done = true;
    const title = input.value.trim();
    if (keep && title) actions.renamed(chat.id, title);
    renderSidebar(actions);
  };
  input.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.isComposing) finish(true);
    if (event.key === "Escape") {
      event.stopPropagation();
      finish(false);
    }
  });
  input.addEventListener("blur", () => finish(true));
  item.replaceChildren(input);
  input.select();
}

function remove(chat, actions) {
  actions.removed(chat.id);
  const restore = deleteChat(chat.id);
  renderSidebar(actions);
  toast("Conversation deleted.", "Undo", () => {
    restore();
    renderSidebar(actions);
  });
}
