// Markdown to elements. What a model writes is not trusted: its HTML is shown as text, pictures become links (nothing
// is loaded), and DOMPurify keeps only the tags below.

import { Marked } from "./vendor/marked.esm.js";
import { copyButton, el } from "./dom.js";

const escapes = { "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#39;" };
const escape = (text) => text.replace(/[&<>"']/g, (character) => escapes[character]);

const marked = new Marked({
  gfm: true,
  breaks: true,
  renderer: {
    html: ({ text }) => escape(text),
    image: ({ href, text }) => `<a href="${escape(href)}">${escape(text || href)}</a>`,
  },
});

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

/** A fragment of clean elements. */
export function renderMarkdown(text) {
  const fragment = window.DOMPurify.sanitize(marked.parse(text), RULES);
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
