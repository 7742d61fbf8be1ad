// Panels and dialogs around the conversation: sampling settings, API key, theme, drawers.

import { $ } from "./dom.js";
import { DEFAULTS, getKey, keyIsKept, loadSettings, saveSettings, setKey, setTheme } from "./store.js";

const fields = () => document.querySelectorAll("[data-setting]");

/** Fills the fields, and keeps what is typed into `settings`; returns what changes the model that they are kept for. */
export function bindSettings(settings) {
  let model = "";
  const show = () => {
    for (const field of fields()) field.value = settings[field.dataset.setting];
  };
  for (const field of fields()) {
    field.addEventListener("input", () => {
      settings[field.dataset.setting] = field.value;
      saveSettings(model, settings);
    });
  }
  $("reset").addEventListener("click", () => {
    Object.assign(settings, DEFAULTS);
    saveSettings(model, settings);
    show();
  });
  Object.assign(settings, loadSettings(model));
  show();
  return (tier) => {
    model = tier.root ?? "";
    Object.assign(settings, loadSettings(model));
    show();
    for (const [name, value] of Object.entries(tier.sampling ?? {})) {
      const field = document.querySelector(`[data-setting="${name}"]`);
      if (field) field.placeholder = name === "top_k" && value < 1 ? "all, the server's choice" : `${value}, the server's choice`;
    }
  };
}

/** Asks for the API key; the promise gives whether one was entered. */
export function askForKey(reason = "") {
  const dialog = $("key-dialog");
  if (dialog.open) return Promise.resolve(false);
  $("key-reason").textContent = reason;
  $("key-reason").hidden = !reason;
  $("key").value = getKey();
  $("keep-key").checked = keyIsKept();
  dialog.returnValue = "";
  dialog.showModal();
  $("key").select();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => {
      const given = dialog.returnValue === "use";
      if (given) setKey($("key").value.trim(), $("keep-key").checked);
      $("key").value = "";
      resolve(given);
    }, { once: true });
  });
}

/** The button that swaps light and dark; calls back when colours change. */
export function bindTheme(onchange) {
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (document.documentElement.dataset.theme ?? (dark.matches ? "dark" : "light")) === "dark";
  const label = () => {
    const text = isDark() ? "Light colours" : "Dark colours";
    $("theme").setAttribute("aria-label", text);
    $("theme").title = text;
    $("theme").querySelector("use").setAttribute("href", isDark() ? "#i-sun" : "#i-moon");
  };
  $("theme").addEventListener("click", () => {
    const theme = isDark() ? "light" : "dark";
    document.documentElement.dataset.theme = theme;
    setTheme(theme);
    label();
    onchange();
  });
  dark.addEventListener("change", () => {
    label();
    onchange();
  });
  label();
}

const narrow = window.matchMedia("(max-width: 899px)");

/** Parts at the sides: `buttons` {id of the button: id of the part}. On a narrow screen one at a time is open. */
export class Drawers {
  constructor(buttons, onchange) {
    this.buttons = buttons;
    this.onchange = onchange;
    for (const [button, part] of Object.entries(buttons)) {
      $(button).addEventListener("click", () => this.set(button, $(part).hidden));
    }
    $("backdrop").addEventListener("click", () => this.closeAll());
    for (const close of document.querySelectorAll("[data-close]")) {
      close.addEventListener("click", () => this.set(close.dataset.close, false, true));
    }
    narrow.addEventListener("change", () => this.showBackdrop());
  }

  get isNarrow() {
    return narrow.matches;
  }

  set(button, open, focus = open) {
    if (open) {
      for (const other of Object.keys(this.buttons)) {
        const shares = narrow.matches || (other !== "menu" && button !== "menu"); // the same place on the screen
        if (other !== button && shares) this.apply(other, false);
      }
    }
    this.apply(button, open);
    if (focus) (open ? $(this.buttons[button]).querySelector("button, input, textarea") : $(button))?.focus();
    this.showBackdrop();
  }

  apply(button, open) {
    const part = $(this.buttons[button]);
    if (part.hidden === !open) return;
    part.hidden = !open;
    $(button).setAttribute("aria-expanded", String(open));
    this.onchange(this.buttons[button], open);
  }

  /** On a narrow screen: closes what is open; true if something was. */
  closeAll() {
    if (!narrow.matches) return false;
    const open = Object.keys(this.buttons).find((button) => !$(this.buttons[button]).hidden);
    if (open) this.set(open, false, true);
    return Boolean(open);
  }

  showBackdrop() {
    $("backdrop").hidden = !narrow.matches || Object.values(this.buttons).every((part) => $(part).hidden);
  }
}
