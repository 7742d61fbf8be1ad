// A turn of the conversation as elements: the text asked, and its answer or the two that are compared.

import { copyButton, el, icon, iconButton } from "./dom.js";
import { diffWords } from "./diff.js";
import { showMarkdown, showPlain } from "./markdown.js";
import { blocksText, blockStrip } from "./tiers.js";

const MAX_COMPARED = 100_000; // characters
const FRAME_MS = 60; // between two renderings of a stream, longer where rendering itself is slow

/** "41.3 tokens/s", "first token 0.12 s", "128 tokens" */
function statsParts({ stats }) {
  if (!stats) return [];
  const parts = [];
  if (stats.rate) parts.push(`${stats.rate.toFixed(1)} tokens/s`);
  if (stats.firstMs !== null) parts.push(`first token ${(stats.firstMs / 1000).toFixed(2)} s`);
  parts.push(`${stats.exact ? "" : "about "}${stats.tokens} ${stats.tokens === 1 ? "token" : "tokens"}`);
  if (stats.finish === "length") parts.push("length limit reached");
  return parts;
}

function detailsText({ stats, seed }) {
  const parts = [];
  if (stats?.promptTokens) {
    const cached = stats.cachedTokens ? `, ${stats.cachedTokens} from the cache` : "";
    parts.push(`prompt ${stats.promptTokens} tokens${cached}`);
  }
  if (stats?.promptRate) parts.push(`read at ${stats.promptRate.toFixed(0)} tokens/s`);
  if (seed !== null && seed !== undefined) parts.push(`seed ${seed}`);
  return parts.join(" · ");
}

/** One answer; `changed()` after its data has changed. */
export class AnswerView {
  constructor(answer, tier, { onretry, onrendered }) {
    this.answer = answer;
    this.onrendered = onrendered;
    this.pieces = null; // of the difference view
    this.timer = null; // of the next rendering
    this.lastMs = 0;
    this.isRendering = this.isStale = false;
    this.thought = el("div", { class: "markdown" });
    this.thinking = el("details", { class: "reasoning", hidden: true }, el("summary", { text: "Reasoning" }), this.thought);
    this.body = el("div", { class: "markdown" });
    this.notice = el("div", { class: "notice", hidden: true });
    this.stats = el("span", { class: "stats" });
    this.actions = el("span", { class: "actions" });
    this.onretry = onretry;
    this.element = el("article", { class: "answer", "aria-label": `Answer of ${answer.model}` },
      el("header", { class: "answer-head" }, el("span", { class: "model", text: answer.model }),
        el("span", { class: "muted", text: blocksText(tier) }), blockStrip(tier)),
      this.thinking, this.body, this.notice,
      el("footer", { class: "answer-foot" }, this.stats, this.actions));
    this.render();
  }

  changed() {
    this.isStale = true;
    if (this.isRendering) return; // which ends with this
    if (this.answer.state !== "running") {
      clearTimeout(this.timer);
      this.render();
    } else {
      this.timer ??= setTimeout(() => this.render(), Math.max(FRAME_MS, 4 * this.lastMs));
    }
  }

  async render() {
    this.timer = null;
    this.isRendering = true;
    this.isStale = false;
    const begin = performance.now();
    const { answer } = this;
    const running = answer.state === "running";
    this.element.setAttribute("aria-busy", String(running));
    this.element.classList.toggle("waiting", running && !answer.content && !answer.reasoning);
    this.thinking.hidden = !answer.reasoning;
    this.thinking.classList.toggle("live", running && !answer.content);
    await Promise.all([showMarkdown(this.thought, answer.reasoning), this.renderBody()]);
    this.renderNotice();
    const parts = statsParts(answer); // each breaks from the next at a line's end, not within
    this.stats.replaceChildren(...parts.flatMap((part, index) =>
      [el("span", { text: index < parts.length - 1 ? `${part} ·` : part }), " "]));
    this.stats.title = detailsText(answer);
    this.lastMs = performance.now() - begin;
    this.isRendering = false;
    this.onrendered();
    if (this.isStale) this.changed();
  }

  renderBody() {
    if (this.pieces) {
      const body = el("div", { class: "markdown" }); // a new one: what may still be on its way goes to the old one
      this.body.replaceWith(body);
      this.body = body;
      const marked = this.pieces.flatMap(({ text, same }) => {
        const words = text.trimEnd();
        return same ? [text] : [el("mark", { text: words }), text.slice(words.length)];
      });
      body.append(el("p", { class: "diff" }, ...marked));
      return undefined;
    }
    return showMarkdown(this.body, this.answer.content);
  }

  renderNotice() {
    const { state, error, content } = this.answer;
    this.notice.hidden = true;
    this.notice.className = "notice";
    if (state === "error") {
      this.notice.hidden = false;
      this.notice.classList.add("error");
      const retry = el("button", { type: "button", class: "button", onclick: this.onretry }, "Try again");
      this.notice.setAttribute("role", "alert");
      this.notice.replaceChildren(el("span", { text: error }), retry);
    } else if (state === "stopped" || (state === "done" && !content)) {
      this.notice.hidden = false;
      this.notice.replaceChildren(state === "stopped" ? "Stopped." : "The answer is empty.");
    }
  }
}

/** A text and its answers. `context`: tierOf(id), onretry(turn), onedit(turn, text), onrendered(). */
export class TurnView {
  constructor(turn, context) {
    this.turn = turn;
    this.context = context;
    this.answers = turn.answers.map((answer) => new AnswerView(answer, context.tierOf(answer.model), {
      onretry: () => context.onretry(turn),
      onrendered: context.onrendered,
    }));
    this.question = el("div", { class: "question" });
    this.compareBar = el("div", { class: "compare-bar", hidden: true });
    const grid = el("div", { class: turn.answers.length > 1 ? "answers compared" : "answers" },
      ...this.answers.map((view) => view.element));
    this.element = el("section", { class: "turn" }, this.question, grid, this.compareBar);
    this.update(false, false);
  }

  /** The buttons depend on whether it is the last turn, and on whether something runs. */
  update(isLast, running) {
    const mayChange = isLast && !running;
    this.showQuestion(mayChange);
    for (const view of this.answers) {
      const { answer } = view;
      const buttons = [];
      if (answer.content) buttons.push(copyButton("Copy the answer", () => answer.content));
      if (mayChange && view === this.answers.at(-1)) {
        const label = this.answers.length > 1 ? "Answer both again" : "Answer again";
        buttons.push(iconButton("again", label, () => this.context.onretry(this.turn)));
      }
      view.actions.replaceChildren(...buttons);
    }
    const settled = this.turn.answers.every((answer) => answer.state !== "running");
    const isLong = this.turn.answers.some(({ content }) => content.length > MAX_COMPARED);
    this.compareBar.hidden = this.answers.length < 2 || !settled || isLong;
    if (!this.compareBar.hidden) this.showCompareBar();
  }

  showQuestion(mayChange) {
    const { text } = this.turn;
    const buttons = [copyButton("Copy the message", () => text)];
    if (mayChange) buttons.unshift(iconButton("edit", "Edit the message", () => this.edit()));
    const bubble = el("div", { class: "bubble" });
    showPlain(bubble, text);
    this.question.replaceChildren(bubble, el("span", { class: "actions" }, ...buttons));
  }

  edit() {
    const area = el("textarea", { "aria-label": "Edit the message", rows: 3 });
    area.value = this.turn.text;
    const cancel = () => this.showQuestion(true);
    const send = () => area.value.trim() && this.context.onedit(this.turn, area.value);
    area.addEventListener("keydown", (event) => {
      if (event.key === "Escape") cancel();
      else if (event.key === "Enter" && !event.shiftKey && !event.isComposing) send();
      else return;
      event.preventDefault();
      event.stopPropagation();
    });
    this.question.replaceChildren(el("div", { class: "editor" }, area, el("div", { class: "row" },
      el("button", { type: "button", class: "button primary", onclick: send }, "Send"),
      el("button", { type: "button", class: "button", onclick: cancel }, "Cancel"))));
    area.focus();
  }

  showCompareBar() {
    const [left, right] = this.turn.answers.map((answer) => answer.content);
    this.difference ??= diffWords(left, right); // a turn that is answered again has a new view
    const pressed = this.answers[0].pieces !== null;
    const toggle = el("button", { type: "button", class: "button", "aria-pressed": String(pressed), onclick: () => {
      const shown = this.answers[0].pieces !== null;
      this.answers[0].pieces = shown ? null : this.difference.left;
      this.answers[1].pieces = shown ? null : this.difference.right;
      for (const view of this.answers) view.renderBody();
      toggle.setAttribute("aria-pressed", String(!shown));
    } }, icon("diff"), "Show differences");
    const percent = Math.round(this.difference.share * 100);
    const summary = left === right ? "The answers are the same." : `${percent} % of the words in common`;
    const seed = this.turn.answers[0].seed;
    this.compareBar.replaceChildren(toggle, el("span", { class: "muted",
      text: seed === null ? summary : `${summary} · seed ${seed}` }));
  }
}
