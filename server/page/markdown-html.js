// Markdown to HTML, as far as a page can show it. Nothing here bounds the time: it runs in markdown-worker.js, which is
// ended when it takes too long.

import { Marked } from "./vendor/marked.esm.js";

const MAX_TEXT = 200_000; // characters
const MAX_PARTS = 5_000; // elements and lines
const MAX_DEPTH = 50; // of elements in one another
const VOID = new Set(["br", "hr", "input"]); // that have no end

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

/** HTML, not clean yet; null if the text is too long, or would be too many elements, or too deep ones. */
export function toHtml(text) {
  if (text.length > MAX_TEXT) return null;
  try {
    const html = marked.parse(text);
    return fits(html) ? html : null;
  } catch {
    return null; // nested beyond the parser's stack
  }
}

function fits(html) {
  let parts = 0;
  let depth = 0;
  for (const [, end, name] of html.matchAll(/<(\/?)([a-z][a-z0-9]*)|\n/g)) {
    if (!end) parts += 1;
    if (end) depth -= 1;
    else if (name && !VOID.has(name)) depth += 1;
    if (parts > MAX_PARTS || depth > MAX_DEPTH) return false;
  }
  return true;
}
