// Tiers: what /v1/models tells of them, the strip of their blocks, and the dialog to choose one.

import { $, el } from "./dom.js";

/** The share of the twenty questions answered rightly, sampled as the model is served if that was measured; or null. */
function share(tier) {
  const asked = tier?.pruning?.questions;
  const right = asked?.right_sampled ?? asked?.right;
  return typeof right === "number" ? right / asked.of : null;
}

/** "76 % right", or nothing where it was not measured. */
export function shareText(tier) {
  const known = share(tier);
  return known === null ? "" : `${Math.round(100 * known)} % right`;
}

/** What the shares are of. */
export function questionsSource(tiers) {
  const asked = tiers.map((tier) => tier.pruning?.questions).find(Boolean);
  if (!asked) return "";
  const { temperature, top_p: topP } = asked.sampling;
  const how = asked.right_sampled === null ? "greedily"
    : `${asked.samples} times each${temperature === undefined ? "" : ` at temperature ${temperature}, top p ${topP}`}`;
  return `Right: of ${asked.of} plain questions, asked ${how}.`;
}

/** "30" or "30 of 36 blocks", as far as it is known. */
export function blocksText(tier) {
  const pruning = tier?.pruning;
  return pruning ? `${pruning.blocks_kept} of ${pruning.num_blocks} blocks` : "";
}

export function bytesText(bytes) {
  const units = ["bytes", "KiB", "MiB", "GiB", "TiB"];
  let index = 0;
  while (bytes >= 1024 && index < units.length - 1) {
    bytes /= 1024;
    index += 1;
  }
  return `${index === 0 || bytes >= 100 ? Math.round(bytes) : bytes.toPrecision(2)} ${units[index]}`;
}

/** For each block [attention kept, MLP kept]; units removed are "3", "3.attention" or "3.mlp". */
export function keptParts(pruning) {
  const kept = Array.from({ length: pruning.num_blocks }, () => [true, true]);
  for (const unit of pruning.units_removed) {
    const [block, part] = unit.split(".");
    const parts = kept[Number(block)];
    if (!parts) continue;
    if (part !== "mlp") parts[0] = false;
    if (part !== "attention") parts[1] = false;
  }
  return kept;
}

/** A cell a block: filled where it runs, hollow where it is skipped; upper half attention, lower half MLP. */
export function blockStrip(tier) {
  const pruning = tier?.pruning;
  if (!pruning) return null;
  const removed = pruning.units_removed.join(", ");
  const label = `${blocksText(tier)} run` + (removed ? `; skipped: ${removed}` : "");
  const cells = keptParts(pruning).map((parts, index) => {
    const state = parts.every(Boolean) ? "runs" : parts.some(Boolean) ? (parts[0] ? "without MLP"
      : "without attention") : "skipped";
    return el("span", { class: "block", title: `Block ${index}: ${state}` },
      ...parts.map((kept) => el("i", { class: kept ? "" : "out" })));
  });
  return el("div", { class: "strip", role: "img", "aria-label": label }, ...cells);
}

function facts(tier) {
  const { pruning, max_model_len: context } = tier;
  if (!pruning) return [];
  const list = [["Depth", String(pruning.depth)], ["Blocks", `${pruning.blocks_kept} of ${pruning.num_blocks}`]];
  if (share(tier) !== null) list.push(["Questions", shareText(tier), pruning.questions.command]);
  if (pruning.weight_bytes) list.push(["Weights", bytesText(pruning.weight_bytes)]);
  if (pruning.perplexity) {
    list.push(["Perplexity", pruning.perplexity.pruned.toPrecision(3)]);
  } else {
    list.push(["Perplexity", "not known", pruning.perplexity_unknown]);
  }
  if (pruning.speedup) list.push(["Speed", `${pruning.speedup.value.toFixed(2)} times`]);
  if (pruning.kv_bytes_per_token) list.push(["KV a token", bytesText(pruning.kv_bytes_per_token)]);
  if (context) list.push(["Context", `${context.toLocaleString("en")} tokens`]);
  return list;
}

/** Where the figures of the cards come from. */
function sources(tiers) {
  const find = (name) => tiers.map((tier) => tier.pruning?.[name]).find(Boolean);
  const [perplexity, speedup] = [find("perplexity"), find("speedup")];
  const parts = [];
  if (perplexity) {
    const texts = tiers.map((tier) => tier.pruning?.perplexity?.dataset).filter(Boolean);
    parts.push(`Perplexity on ${[...new Set(texts)].join(", ")}, which took no part in the search, lower is better; `
      + `the full model has ${perplexity.dense.toPrecision(3)}.`);
  }
  if (speedup) {
    const on = speedup.device ? ` on ${speedup.device}` : "";
    parts.push(`Speed against the full model, measured${on} (${speedup.test}, batch ${speedup.batch}).`);
  }
  return [questionsSource(tiers), ...parts].filter(Boolean).join(" ");
}

/** The radio button, strip and facts of a tier. */
function tierCard(tier, chosen, index) {
  const radio = el("input", { type: "radio", name: "tier", value: tier.id, id: `tier-${index}` });
  radio.checked = chosen;
  const list = el("dl", { class: "facts" },
    ...facts(tier).map(([name, value, why]) =>
      el("div", why ? { title: why } : {}, el("dt", { text: name }), el("dd", { text: value }))));
  return el("label", { class: "tier-card", for: `tier-${index}` },
    el("span", { class: "tier-name" }, radio, el("strong", { text: tier.id })), blockStrip(tier), list);
}

/** Opens the dialog; the promise gives the id chosen, or null. */
export function chooseTier(tiers, chosen, heading) {
  const dialog = $("tier-dialog");
  $("tier-heading").textContent = heading;
  $("tier-cards").replaceChildren(...tiers.map((tier, index) => tierCard(tier, tier.id === chosen, index)));
  $("tier-source").textContent = sources(tiers);
  dialog.returnValue = "";
  dialog.showModal();
  dialog.querySelector("input:checked")?.focus();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => {
      const id = dialog.querySelector("input:checked")?.value ?? null;
      resolve(dialog.returnValue === "use" ? id : null);
    }, { once: true });
  });
}
