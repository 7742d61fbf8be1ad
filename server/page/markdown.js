// Texts of models as elements. What a model writes is not trusted: its Markdown is parsed in a worker, for a second at
// most, so that no text can hold the page; its HTML is shown as text, pictures become links (nothing is loaded), and
// DOMPurify keeps only the tags below. What cannot be shown as Markdown is shown as it is.

import { copyButton, el } from "./dom.js";

const LIMIT_MS = 1000; // for the worker, a text
const LATE_MS = 200; // until a text that waits for the worker is shown as it is
const MAX_PIECE = 8000; // characters that are laid out at once

const RULES = {
  ALLOWED_TAGS: [
    "a", "blockquote", "br", "code", "del", "em", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "input", "li", "ol", "p",
    "pre", "strong", "table", "tbody", "td", "th", "thead", "tr", "ul",
  ],
  ALLOWED_ATTR: ["align", "checked", "class", "disabled", "href", "start", "title", "type"],
  ADD_URI_SAFE_ATTR: ["align", "start", "type"], // their values are no addresses
  ALLOWED_URI_REGEXP: /^(?:https?|mailto):/i,
  RETURN_DOM_FRAGMENT: true,
};

const latest = new WeakMap(); // element -> the text that it is to show
const tooMuch = new WeakSet(); // elements whose text was no Markdown to show; it only grows
const jobs = []; // {text, element, resolve}, not with the worker yet
let worker = null;
let isReady = false;
let current = null; // the job that the worker has
let timer = null;

/** Shows `text` in `element`: as Markdown, else as it is. Resolves when it is there, or something newer is to be. */
export async function showMarkdown(element, text) {
  latest.set(element, text);
  if (!text) {
    element.replaceChildren();
    return;
  }
  const isWanted = () => latest.get(element) === text;
  let html = null;
  if (!tooMuch.has(element)) {
    const late = setTimeout(() => isWanted() && !element.hasChildNodes() && showPlain(element, text), LATE_MS);
    html = await new Promise((resolve) => {
      jobs.push({ text, element, resolve });
      queueMicrotask(next); // when the caller has put the element into the page
    });
    clearTimeout(late);
  }
  if (html === undefined || !isWanted()) return;
  if (html === null) {
    tooMuch.add(element);
    showPlain(element, text);
  } else {
    element.replaceChildren(clean(html));
  }
}

/** Shows `text` as it is, in pieces, of which the browser lays out only those in sight; whole pieces are kept. */
export function showPlain(element, text) {
  let box = element.firstElementChild;
  if (!box?.classList.contains("plain")) {
    box = el("div", { class: "plain" });
    element.replaceChildren(box);
  }
  let begin = 0;
  let count = 0;
  for (; begin < text.length; count += 1) {
    const piece = text.slice(begin, endOfPiece(text, begin));
    begin += piece.length;
    const old = box.children[count];
    if (!old) box.append(el("div", { text: piece }));
    else if (old.textContent !== piece) old.textContent = piece;
  }
  while (box.children.length > count) box.lastElementChild.remove();
  box.classList.toggle("too-much", tooMuch.has(element));
}

/** After the last line of a piece, else its last word, else wherever; not between the halves of a character. */
function endOfPiece(text, begin) {
  const limit = begin + MAX_PIECE;
  if (limit >= text.length) return text.length;
  const piece = text.slice(begin, limit);
  const end = piece.lastIndexOf("\n") + 1 || piece.lastIndexOf(" ") + 1 || MAX_PIECE;
  return begin + end - (end === MAX_PIECE && /[\ud800-\udbff]$/.test(piece));
}

function startWorker() {
  isReady = false;
  worker = new Worker(new URL("./markdown-worker.js", import.meta.url), { type: "module" });
  worker.onmessage = ({ data }) => {
    if (data.ready) isReady = true;
    else finish(data.html);
    next();
  };
  worker.onerror = (event) => {
    event.preventDefault();
    endWorker();
  };
}

/** Its text, or the next one if it never came so far, is shown as it is. */
function endWorker() {
  worker.terminate();
  worker = null;
  current ??= jobs.shift() ?? null;
  finish(null);
  next();
}

function finish(html) {
  clearTimeout(timer);
  current?.resolve(html);
  current = null;
}

function next() {
  while (jobs.length && !isShown(jobs[0])) jobs.shift().resolve();
  if (current || !jobs.length) return;
  if (!worker) startWorker();
  if (!isReady) return;
  current = jobs.shift();
  timer = setTimeout(endWorker, LIMIT_MS);
  worker.postMessage(current.text);
}

const isShown = ({ text, element }) => element.isConnected && latest.get(element) === text;

/** A fragment of clean elements. */
function clean(html) {
  const fragment = window.DOMPurify.sanitize(html, RULES);
  for (const link of fragment.querySelectorAll("a")) {
    link.target = "_blank";
    link.rel = "noopener noreferrer";
  }
  for (const input of fragment.querySelectorAll("input")) {
    if (input.type !== "checkbox") input.remove();
    input.disabled = true;
  }
  for (const table of fragment.querySelectorAll("table")) {
    const scroller = el("div", { class: "scroller", tabindex: "0" });
    table.replaceWith(scroller);
    scroller.append(table);
  }
  for (const pre of fragment.querySelectorAll("pre")) frameCode(pre);
  return fragment;
}

function frameCode(pre) {
  const code = pre.querySelector("code") ?? pre;
  const language = /language-(\S+)/.exec(code.className)?.[1] ?? "code";
  const head = el("div", { class: "code-head" }, el("span", { text: language }),
    copyButton("Copy the code", () => code.textContent.replace(/\n$/, "")));
  const frame = el("div", { class: "code" }, head);
  pre.replaceWith(frame);
  pre.tabIndex = 0;
  frame.append(pre);
}
