// Takes texts, gives {html} for each in its order; {ready} first.

import { toHtml } from "./markdown-html.js";

addEventListener("message", ({ data }) => postMessage({ html: toHtml(data) }));
postMessage({ ready: true });
