// Small helpers for making and finding elements.

export const $ = (id) => document.getElementById(id);

/** el("button", {class: "x", onclick: f, "aria-label": "…", text: "…"}, child, …); null children are left out. */
export function el(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null || value === false) continue;
    if (name === "text") element.textContent = value;
    else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

const SVG = "http://www.w3.org/2000/svg";

/** An icon of the sprite in index.html. */
export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  const use = document.createElementNS(SVG, "use");
  use.setAttribute("href", `#i-${name}`);
  svg.append(use);
  return svg;
}

/** A button that is an icon, with its name for those who cannot see it. */
export function iconButton(name, label, onclick, properties = {}) {
  return el("button", { type: "button", class: "icon-button", "aria-label": label, title: label, onclick,
    ...properties }, icon(name));
}

/** Says something to screen readers, without showing it. */
export function announce(text) {
  $("status").textContent = "";
  requestAnimationFrame(() => { $("status").textContent = text; });
}

/** A message at the bottom that goes by itself, with one action if given. */
export function toast(text, action, onaction) {
  const box = $("toast");
  clearTimeout(toast.timer);
  const close = () => { box.hidden = true; };
  const button = action ? el("button", { type: "button", text: action, onclick: () => { close(); onaction(); } }) : null;
  box.replaceChildren(el("span", { text }), ...(button ? [button] : []));
  box.hidden = false;
  toast.timer = setTimeout(close, 6000);
}

/** Copies text; clipboard access is only there on secure origins, so with the old way beside it. */
export async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const area = el("textarea", { class: "off-screen", "aria-hidden": "true" });
    area.value = text;
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  announce("Copied");
}

/** Turns a copy button into a tick for a moment. */
export function copyButton(label, getText) {
  const button = iconButton("copy", label, async () => {
    await copyText(getText());
    button.replaceChildren(icon("check"));
    setTimeout(() => button.replaceChildren(icon("copy")), 1500);
  });
  return button;
}

/** Offers `content` as a file to save. */
export function saveFile(name, content) {
  const url = URL.createObjectURL(new Blob([content], { type: "application/json" }));
  const link = el("a", { href: url, download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
}
