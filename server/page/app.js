// The page: which conversation is open, what runs, and what the buttons and keys do.

import { fetchTiers } from "./api.js";
import { $, announce, el, icon, toast } from "./dom.js";
import { LivePanel } from "./metrics.js";
import { fillAnswer, messagesFor, newAnswer } from "./run.js";
import { askForKey, bindSettings, bindTheme, Drawers } from "./settings.js";
import { renderSidebar, titleOf } from "./sidebar.js";
import * as store from "./store.js";
import { blocksText, blockStrip, chooseTier, questionsSource, shareText } from "./tiers.js";
import { exportAll, importFile } from "./transfer.js";
import { TurnView } from "./view.js";

const SAVE_MS = 1000; // between two savings of a stream
// Of the twenty of `sleb eval --questions`; the full SmolLM2 answers each rightly.
const EXAMPLES = ["What is the capital of Japan?", "Who wrote Romeo and Juliet?", "What is the largest ocean on Earth?"];

const settings = {};
const choices = store.loadChoices();
const running = new Map(); // id of a conversation -> {chat, controller}
const views = new Map(); // turn -> TurnView, of the open conversation
let tiers = [];
let chat = store.newChat();
let stuck = true; // to the end of the conversation

const live = new LivePanel();
const drawers = new Drawers({ menu: "sidebar", "open-settings": "settings", "open-live": "live" }, (part, open) => {
  if (part === "live") open ? live.open() : live.close();
});

// Tiers

const tierOf = (id) => tiers.find((tier) => tier.id === id);

async function loadTiers() {
  try {
    tiers = await fetchTiers();
    $("banner").hidden = true;
  } catch (error) {
    if (error.status === 401 && (await askForKey(error.message))) return loadTiers();
    showBanner(error.message);
    return undefined;
  }
  if (tiers.length) useModel(tiers[0]);
  const ids = tiers.map((tier) => tier.id);
  choices.models = choices.models.filter((id) => ids.includes(id));
  choices.models[0] ??= ids[0];
  choices.models[1] ??= ids.find((id) => id !== choices.models[0]) ?? ids[0];
  showChoices();
  renderChat();
  return undefined;
}

function showBanner(text) {
  $("banner").replaceChildren(el("span", { text }), el("button", { type: "button", class: "button", text: "Try again",
    onclick: loadTiers }));
  $("banner").hidden = false;
}

function showChoices() {
  const { models, compare, inTurns } = choices;
  for (const [index, id] of [[0, "tier-a"], [1, "tier-b"]]) {
    const tier = tierOf(models[index]);
    $(id).replaceChildren(el("span", { class: "name", text: models[index] ?? "no model" }),
      el("span", { class: "muted", text: tier?.pruning ? `${tier.pruning.blocks_kept}/${tier.pruning.num_blocks}` : "" }),
      icon("down"));
    $(id).title = blocksText(tier);
  }
  $("tier-b").hidden = $("in-turns-label").hidden = !compare;
  $("compare").setAttribute("aria-pressed", String(compare));
  $("in-turns").checked = inTurns;
  store.saveChoices(choices);
}

async function pickTier(index) {
  const heading = choices.compare ? `Depth of the ${index ? "second" : "first"} answer` : "Depth of the answers";
  const id = await chooseTier(tiers, choices.models[index], heading);
  if (id === null) return;
  choices.models[index] = id;
  showChoices();
}

// The conversation

function openChat(id) {
  chat = running.get(id)?.chat ?? store.loadChat(id) ?? store.newChat();
  store.setCurrentChat(chat.id);
  stuck = true;
  renderChat();
  if (drawers.isNarrow) drawers.closeAll();
}

function startChat() {
  openChat(null);
  $("text").focus();
}

function renderChat() {
  views.clear();
  for (const turn of chat.turns) {
    views.set(turn, new TurnView(turn, { tierOf, onretry: again, onedit: edit, onrendered: stick }));
  }
  $("log").replaceChildren(...[...views.values()].map((view) => view.element));
  $("empty").hidden = chat.turns.length > 0;
  if (!chat.turns.length) renderEmpty();
  update();
}

function renderEmpty() {
  $("empty-tiers").replaceChildren(...tiers.map((tier) => el("li", {}, el("span", { class: "name", text: tier.id }),
    blockStrip(tier), el("span", { class: "muted", text: [blocksText(tier), shareText(tier)].filter(Boolean).join(", ") }))));
  $("empty-source").textContent = questionsSource(tiers);
  $("examples").replaceChildren(...EXAMPLES.map((text) => el("button", { type: "button", class: "button", text,
    onclick: () => send(text) })));
}

/** Everything that depends on what runs, or on the list of conversations. */
function update() {
  const busy = running.has(chat.id);
  for (const [turn, view] of views) view.update(turn === chat.turns.at(-1), busy);
  $("log").setAttribute("aria-busy", String(busy));
  $("title").textContent = chat.turns.length ? titleOf(chat) : "";
  document.title = chat.turns.length ? `${titleOf(chat)} – sleb` : "sleb";
  $("send").hidden = busy;
  $("stop").hidden = !busy;
  renderSidebar(sidebarActions);
  stick();
}

function stick() {
  if (stuck) $("scroller").scrollTop = $("scroller").scrollHeight;
}

const sidebarActions = {
  open: openChat,
  opened: () => chat.id,
  removed(id) {
    running.get(id)?.controller.abort();
    running.delete(id);
    if (id === chat.id) openChat(null);
  },
  renamed(id, title) {
    const renamed = id === chat.id ? chat : (running.get(id)?.chat ?? store.loadChat(id));
    renamed.title = title;
    store.saveChat(renamed);
    update();
  },
};

// Answers

function send(text) {
  if (!text.trim() || running.has(chat.id)) return;
  if (!chat.turns.length) chat.title = text.trim().replace(/\s+/g, " ").slice(0, 120);
  const turn = { text, answers: [] };
  chat.turns.push(turn);
  stuck = true;
  answer(turn);
}

/** Once more, by the models that are chosen now. */
function again(turn) {
  if (!running.has(chat.id)) answer(turn);
}

function edit(turn, text) {
  if (running.has(chat.id)) return;
  turn.text = text;
  answer(turn);
}

function chooseSeed(compared) {
  if (settings.seed !== "") return Number(settings.seed);
  return compared ? Math.floor(Math.random() * 2 ** 31) : null;
}

async function answer(turn) {
  const models = choices.compare ? choices.models : choices.models.slice(0, 1);
  const seed = chooseSeed(models.length > 1);
  turn.answers = models.map((model) => newAnswer(model, seed));
  const run = { chat, controller: new AbortController() };
  running.set(chat.id, run);
  save(chat);
  renderChat();
  announce("The answer begins.");
  const saver = setInterval(() => save(run.chat), SAVE_MS);
  const fill = (each, column) => fillAnswer(each, messagesFor(run.chat, turn, column, settings.system), settings,
    run.controller.signal, () => views.get(turn)?.answers[column]?.changed());
  const failures = [];
  if (choices.inTurns) {
    for (const [column, each] of turn.answers.entries()) failures.push(await fill(each, column));
  } else {
    failures.push(...await Promise.all(turn.answers.map(fill)));
  }
  clearInterval(saver);
  if (running.get(run.chat.id) !== run) return; // deleted meanwhile
  running.delete(run.chat.id);
  run.chat.updated = Date.now();
  save(run.chat);
  update();
  announce(turn.answers.some((each) => each.state === "stopped") ? "Stopped." : "The answer is complete.");
  const refused = failures.find((failure) => failure?.status === 401);
  if (refused && chat === run.chat && (await askForKey(refused.message))) {
    if (!tiers.length) await loadTiers();
    again(turn);
  }
}

function save(saved) {
  if (!store.saveChat(saved)) {
    toast("The browser has no room left for this conversation. Delete or export old ones.");
  }
}

async function importChosen() {
  const [file] = $("import-file").files;
  if (!file) return;
  try {
    const { added, known } = await importFile(file);
    if (added.length) openChat(added[0]);
    toast(`${added.length} imported${known ? `, ${known} here already` : ""}.`);
  } catch (error) {
    toast(`Nothing was imported. ${error.message}.`);
  }
  $("import-file").value = ""; // the same file may be chosen again
}

function stop() {
  running.get(chat.id)?.controller.abort();
}

// Keys and buttons

function fitText() {
  const area = $("text");
  area.style.height = "auto";
  area.style.height = `${Math.min(area.scrollHeight, 240)}px`;
}

function submit() {
  if (running.has(chat.id)) return;
  const text = $("text").value;
  $("text").value = "";
  fitText();
  send(text);
}

function bind() {
  $("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    submit();
  });
  $("text").addEventListener("input", fitText);
  $("text").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      submit();
    }
  });
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || document.querySelector("dialog[open]")) return;
    if (running.has(chat.id)) stop();
    else drawers.closeAll();
  });
  $("stop").addEventListener("click", () => {
    stop();
    $("text").focus();
  });
  $("scroller").addEventListener("scroll", () => {
    const { scrollTop, scrollHeight, clientHeight } = $("scroller");
    stuck = scrollHeight - scrollTop - clientHeight < 40;
  });
  $("tier-a").addEventListener("click", () => pickTier(0));
  $("tier-b").addEventListener("click", () => pickTier(1));
  $("compare").addEventListener("click", () => {
    choices.compare = !choices.compare;
    showChoices();
  });
  $("in-turns").addEventListener("change", () => {
    choices.inTurns = $("in-turns").checked;
    showChoices();
  });
  for (const button of document.querySelectorAll(".new-chat")) button.addEventListener("click", startChat);
  $("export-all").addEventListener("click", exportAll);
  $("import").addEventListener("click", () => $("import-file").click());
  $("import-file").addEventListener("change", importChosen);
  $("change-key").addEventListener("click", async () => {
    if (await askForKey()) loadTiers();
  });
  store.onOtherTab(() => renderSidebar(sidebarActions));
  window.addEventListener("pagehide", () => running.forEach((run) => {
    run.controller.abort();
    store.saveChat(run.chat);
  }));
}

const useModel = bindSettings(settings);
bindTheme(() => live.repaint());
bind();
if (!drawers.isNarrow) drawers.set("menu", true, false);
openChat(store.currentChat() ?? store.listChats()[0]?.id);
loadTiers();
