// The live panel: counters of /metrics every two seconds, as rates over the last five minutes.

import { request } from "./api.js";
import { $ } from "./dom.js";

const INTERVAL_MS = 2000;
const SPAN_SECONDS = 300;

/** Prometheus text: name, without the prefix that the server was told -> [{labels, value}]. */
export function parseMetrics(text) {
  const metrics = new Map();
  for (const line of text.split("\n")) {
    const found = /^(?:\w+:)?([A-Za-z_]\w*)(?:\{(.*)\})?\s+(\S+)/.exec(line);
    if (!found) continue;
    const labels = {};
    for (const [, key, value] of (found[2] ?? "").matchAll(/(\w+)="((?:\\.|[^"\\])*)"/g)) {
      labels[key] = value.replace(/\\(.)/g, (_, character) => (character === "n" ? "\n" : character));
    }
    if (!metrics.has(found[1])) metrics.set(found[1], []);
    metrics.get(found[1]).push({ labels, value: Number(found[3]) });
  }
  return metrics;
}

const values = (metrics, name) => (metrics.get(name) ?? []).map((sample) => sample.value);
const sum = (metrics, name) => values(metrics, name).reduce((total, value) => total + value, 0);

/** A chart of one rate. */
class Chart {
  constructor(element, name) {
    this.element = element;
    this.name = name;
  }

  /** Anew, as the theme's colours are fixed in it. */
  build(data) {
    this.plot?.destroy();
    const style = getComputedStyle(this.element);
    const axis = { stroke: style.color, grid: { stroke: style.borderColor, width: 1 }, ticks: { show: false },
      font: `11px ${style.fontFamily}` };
    this.plot = new window.uPlot({
      width: this.element.clientWidth,
      height: 120,
      padding: [8, 18, 0, 0],
      legend: { show: false },
      cursor: { show: false },
      scales: { x: { time: false, range: [-SPAN_SECONDS, 0] }, y: { range: (_, low, high) => [0, Math.max(high * 1.1, 1)] } },
      axes: [
        { ...axis, space: 60, size: 24, values: (_, ticks) => ticks.map((t) => (t ? `${t / 60} min` : "now")),
          splits: () => [-300, -240, -180, -120, -60, 0] },
        { ...axis, size: 44, values: (_, ticks) => ticks.map((t) => (t >= 1000 ? `${t / 1000}k` : t)) },
      ],
      series: [{}, { stroke: style.outlineColor, width: 1.5, points: { show: false }, spanGaps: false }],
    }, data, this.element);
  }

  draw(times, rates, now) {
    const data = [times.map((time) => (time - now) / 1000), rates];
    if (!this.plot || this.plot.width !== this.element.clientWidth) this.build(data);
    else this.plot.setData(data);
    this.element.setAttribute("aria-label", `${this.name}, now ${rates.at(-1)?.toFixed(1) ?? "not known"} tokens/s`);
  }
}

export class LivePanel {
  constructor() {
    this.samples = []; // {time, prompt, generation} in tokens/s
    this.last = null;
    this.timer = null;
    this.charts = {
      prompt: new Chart($("chart-prompt"), "Prompt"),
      generation: new Chart($("chart-generation"), "Generation"),
    };
    document.addEventListener("visibilitychange", () => this.wake());
  }

  open() {
    this.isOpen = true;
    this.wake();
  }

  close() {
    this.isOpen = false;
    clearTimeout(this.timer);
    this.timer = null;
  }

  /** Colours have changed. */
  repaint() {
    for (const chart of Object.values(this.charts)) {
      chart.plot?.destroy();
      chart.plot = null;
    }
    if (this.isOpen && this.samples.length) this.draw();
  }

  wake() {
    if (this.isOpen && !document.hidden && this.timer === null) this.poll();
  }

  async poll() {
    this.timer = 0; // taken
    try {
      this.add(parseMetrics(await (await request("metrics")).text()));
      this.note("");
    } catch (error) {
      this.last = null;
      this.note(error.status === 404 ? "This server has no /metrics, so there is nothing to show." : error.message);
    }
    this.timer = this.isOpen && !document.hidden ? setTimeout(() => this.poll(), INTERVAL_MS) : null;
  }

  note(text) {
    $("live-note").textContent = text;
    $("live-note").hidden = !text;
    $("live-values").hidden = Boolean(text);
  }

  add(metrics) {
    const time = Date.now();
    const now = {
      time,
      prompt: sum(metrics, "prompt_tokens_total"),
      generation: sum(metrics, "generation_tokens_total"),
    };
    if (this.last) {
      const seconds = (time - this.last.time) / 1000;
      const rate = (name) => Math.max(now[name] - this.last[name], 0) / seconds; // less than before: a new server
      this.samples.push({ time, prompt: rate("prompt"), generation: rate("generation") });
    }
    this.last = now;
    this.samples = this.samples.filter((sample) => time - sample.time <= SPAN_SECONDS * 1000);
    const usage = Math.max(0, ...values(metrics, "kv_cache_usage_perc"));
    $("live-running").textContent = sum(metrics, "num_requests_running");
    $("live-waiting").textContent = sum(metrics, "num_requests_waiting");
    $("live-kv").textContent = `${(usage * 100).toFixed(1)} %`;
    $("live-kv-bar").value = usage;
    $("live-values").hidden = false;
    this.draw();
  }

  draw() {
    const times = this.samples.map((sample) => sample.time);
    for (const [name, chart] of Object.entries(this.charts)) {
      const rates = this.samples.map((sample) => sample[name]);
      $(`live-${name}`).textContent = rates.length ? rates.at(-1).toFixed(1) : "–";
      chart.draw(times, rates, Date.now());
    }
  }
}
