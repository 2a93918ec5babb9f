"use strict";
// The view: what is shown of which runs, over which axis; everything is drawn from it.

const AXES = {
  step: { key: "step", label: "step", tick: compact, exact: Format.integer, least: 1 },
  tokens: { key: "tokens_seen", label: "tokens", tick: Format.count, exact: Format.integer, least: 1 },
  time: { key: "seconds", label: "wall time", tick: Format.tickDuration, exact: Format.duration, steps: TIME_STEPS },
};
// Columns with a chart of their own; any other number of a record gets one below "more".
const DRAWN = ["loss", "smoothed_loss", "lr", "weight_decay", "grad_norm", "kt_s", "wait_share", "memory_bytes", "mfu"];
// What evaluation counts, as opposed to what it measures.
const COUNTS = ["step", "epoch", "tokens_seen", "seconds", "target_tokens", "examples", "loss", "bits_per_byte", "perplexity"];
const UNDRAWN = ["step", "epoch", "tokens", "target_tokens", "tokens_seen", "seconds", "wall_seconds", "target_kt_s", "it_s"];
const POLL_MS = 2000;

const view = {
  runs: [], charts: [], hidden: new Set(), axis: AXES.step, zoom: null, cursor: null, hovered: null, highlight: null,
  smoothing: 2, configFilter: "", configChoice: "", sampleStep: null, allSamples: false,
  visible() { return this.runs.filter((run) => !this.hidden.has(run.name)); },
  range() { return this.zoom || this.extent(); },
  extent() {
    let low = Infinity, high = -Infinity;
    for (const run of this.visible()) {
      for (const columns of [run.columns, ...run.evals.map((set) => set.columns)]) {
        const xs = columns[this.axis.key];
        if (xs.length) [low, high] = [Math.min(low, xs[0]), Math.max(high, xs[xs.length - 1])];
      }
    }
    if (low > high) return [0, 1];
    return low === high ? [low - 1, high + 1] : [low, high];
  },
  describe(line, index) {
    return `step ${Format.integer(line.columns.step[index])} · ${Format.count(line.columns.tokens_seen[index])} tokens · ` +
      Format.duration(line.columns.seconds[index]);
  },
  point(chart, x) {
    this.hovered = chart;
    this.cursor = x;
    for (const each of this.charts) each.drawCursor();
  },
  zoomTo(range) {
    this.zoom = range;
    document.getElementById("reset").disabled = !range;
    this.draw();
  },
  zoomBy(factor) {
    const [low, high] = this.range(), [first, last] = this.extent();
    const middle = this.cursor === null ? (low + high) / 2 : Math.min(Math.max(this.cursor, low), high);
    const range = [Math.max(first, middle - (middle - low) * factor), Math.min(last, middle + (high - middle) * factor)];
    this.zoomTo(range[0] <= first && range[1] >= last ? null : range);
  },
  draw() { for (const chart of this.charts) { chart.refresh(); chart.drawCursor(); } },
};

function line(run, columns, name, label, style) {
  return { run, name: label, columns, xs: columns[view.axis.key], ys: columns[name] || [], ...style };
}

function lossLines() {
  return view.runs.flatMap((run) => {
    const raw = line(run, run.columns, "loss", run.name, view.smoothing ? { alpha: 0.38, width: 1 } : { width: 1.4 });
    if (!view.smoothing) return [raw];
    const ys = smoothed(run.columns.step, raw.ys, view.smoothing / 100);
    return [raw, { ...raw, smooths: run, ys, alpha: 1, width: 2.2 }];
  });
}

// Exponential mean over the steps that remembers this share of the run; gaps are bridged, but not the one at the end:
// a run whose loss is lost has no curve from there.
function smoothed(steps, values, share) {
  const reach = share * (steps[steps.length - 1] - steps[0]) || 1;
  const end = values.findLastIndex((value) => value !== null);
  let sum = 0, weight = 0;
  return values.map((value, i) => {
    if (i > end) return null;
    const gap = i ? steps[i] - steps[i - 1] : 1, keep = Math.exp(-gap / reach);
    if (value === null) return weight ? sum / weight : null;
    sum = keep * sum + (1 - keep) * value;
    weight = keep * weight + (1 - keep);
    return sum / weight;
  });
}

function evalLines(name) {
  return view.runs.flatMap((run) => run.evals.map((set, index) => line(run, set.columns, name,
    set.set === "validation" ? run.name : `${run.name}, ${set.set}`, { dots: true, dash: index ? DASHES[index % DASHES.length] : null })));
}

function plain(name, unit = 1) {
  return () => view.runs.map((run) => {
    const found = line(run, run.columns, name, run.name);
    return unit === 1 ? found : { ...found, ys: found.ys.map((y) => (y === null ? null : y / unit)) };
  });
}

function chartSpecs() {
  const has = (name, test) => view.runs.some((run) => (run.columns[name] || []).some(test || ((y) => y !== null)));
  const hasEvals = (name) => view.runs.some((run) => run.evals.some((set) => name in set.columns));
  const precise = (value) => value.toFixed(4);
  const specs = [
    { id: "loss", title: "Training loss", note: "nats per target token", wide: true, lines: lossLines, format: precise },
    hasEvals("loss") && { id: "eval", title: "Validation loss", note: "nats per target token", lines: () => evalLines("loss"), format: precise },
    hasEvals("bits_per_byte") && { id: "bits", title: "Validation, bits per byte", note: "comparable between tokenizers", lines: () => evalLines("bits_per_byte"), format: precise },
    { id: "lr", title: "Learning rate", lines: plain("lr"), format: (v) => v.toExponential(3), zero: true },
    has("weight_decay", (y) => y > 0) && { id: "wd", title: "Weight decay", lines: plain("weight_decay"), format: Format.number, zero: true },
    { id: "grad", title: "Gradient norm", note: "before clipping", lines: plain("grad_norm"), format: Format.number, zero: true },
    { id: "speed", title: "Throughput", note: "thousands of tokens per second", lines: plain("kt_s"), format: (v) => v.toFixed(3) + " Kt/s", zero: true },
    has("mfu") && { id: "mfu", title: "Model FLOPs utilisation", lines: plain("mfu"), format: Format.percent, tick: (v) => Math.round(100 * v) + "%", zero: true },
    { id: "wait", title: "Waiting for data", note: "share of the training time", lines: plain("wait_share"), format: Format.percent, tick: (v) => parseFloat((100 * v).toPrecision(3)) + "%", zero: true },
    { id: "memory", title: "Memory", note: "peak of the main process", zero: true, lines: plain("memory_bytes", 2 ** 30), format: Format.gib, tick: (v) => compact(v) + " G" },
  ].filter(Boolean);
  const drawn = new Set([...DRAWN, ...UNDRAWN]);
  const names = (columns) => [...new Set(columns.flatMap((each) => Object.keys(each)))];
  const measured = names(view.runs.flatMap((run) => run.evals.map((set) => set.columns)))
    .filter((name) => !COUNTS.includes(name) && !name.startsWith("num_"));
  const others = names(view.runs.map((run) => run.columns))
    .filter((name) => !drawn.has(name) && has(name, (y) => y !== null && y !== 0));
  return [...specs,
    ...measured.map((name) => ({ id: "e-" + name, title: "Validation, " + name.replaceAll("_", " "), lines: () => evalLines(name), format: Format.number })),
    ...others.map((name) => ({ id: "x-" + name, title: name.replaceAll("_", " "), lines: plain(name), format: Format.number }))];
}

function buildCharts() {
  const specs = chartSpecs();
  if (specs.map((spec) => spec.id).join() === view.charts.map((chart) => chart.spec.id).join()) return;
  const old = Object.fromEntries(view.charts.map((chart) => [chart.spec.id, chart]));
  view.charts = specs.map((spec) => old[spec.id] || new Chart(spec, view));
  document.getElementById("curves").replaceChildren(
    make("h2", {}, "Curves", make("small", {}, "drag to zoom, double-click to see everything")),
    make("div", { class: "grid" }, view.charts.map((chart) => chart.element)));
}

function buildControls() {
  const legend = make("div", { class: "legend", role: "group", "aria-label": "Runs" }, view.runs.map((run) => make("button", {
    type: "button", class: "chip", "aria-pressed": String(!view.hidden.has(run.name)), title: run.path,
    onclick: () => { view.hidden.has(run.name) ? view.hidden.delete(run.name) : view.hidden.add(run.name); drawAll(); },
    onpointerenter: () => { view.highlight = view.runs.length > 1 ? run.name : null; view.draw(); },
    onpointerleave: () => { view.highlight = null; view.draw(); },
  }, swatch(run.index), make("span", {}, run.name))));
  const axis = make("div", { class: "switch", role: "group", "aria-label": "Horizontal axis" },
    Object.entries(AXES).map(([name, each]) => make("button", {
      type: "button", id: "axis-" + name, "aria-pressed": String(view.axis === each),
      onclick: () => { view.axis = each; view.cursor = null; view.zoom = null; drawAll(); },
    }, each.label)));
  const toggle = (id, text, isOn, onclick) => make("button", { type: "button", id, "aria-pressed": String(isOn), onclick }, text);
  const isLog = view.charts.length > 0 && view.charts[0].isLog;
  document.getElementById("controls").replaceChildren(legend, make("span", { class: "spacer" }), axis,
    make("div", { class: "group" },
      make("label", { class: "group note", for: "smoothing" }, "smoothing", make("input", {
        type: "range", id: "smoothing", min: 0, max: 10, step: 0.5, value: view.smoothing,
        title: "share of the run that the smoothed loss remembers",
        oninput: (event) => { view.smoothing = Number(event.target.value); view.draw(); },
      })),
      toggle("log", "log scale", isLog, () => { view.charts.slice(0, 3).forEach((chart) => chart.setLog(!isLog)); drawAll(); })),
    make("div", { class: "group" },
      make("button", { type: "button", id: "zoom-in", "aria-label": "Zoom in", onclick: () => view.zoomBy(0.5) }, "+"),
      make("button", { type: "button", id: "zoom-out", "aria-label": "Zoom out", onclick: () => view.zoomBy(2) }, "−"),
      make("button", { type: "button", id: "reset", disabled: !view.zoom, onclick: () => view.zoomTo(null) }, "reset zoom")));
}

// Section -> how it is drawn, and what of each run it is drawn from.
const SECTIONS = {
  overview: [drawOverview, (run) => [run.headline, run.notes]],
  comparison: [drawComparison, (run) => run.summary],
  samples: [drawSamples, (run) => run.samples],
  tokens: [drawTokens, (run) => run.token_losses],
  config: [drawConfig, (run) => [run.config, run.changed]],
  messages: [drawMessages, (run) => [run.events, run.messages]],
};
const drawnFrom = {};

// News of a live run redraw what has changed alone: a slider in use, or a picked token, stays.
function drawSections(isForced) {
  for (const [id, [draw, pick]] of Object.entries(SECTIONS)) {
    const text = JSON.stringify(view.runs.map(pick));
    if (isForced || drawnFrom[id] !== text) draw(document.getElementById(id), view);
    drawnFrom[id] = text;
  }
}

function drawAll() {
  buildCharts();
  buildControls();
  drawSections(true);
  view.draw();
}

function take(data, isFirst) {
  view.runs = data.runs.map((run, index) => ({ ...run, index }));
  const [first] = view.runs, isOne = view.runs.length === 1;
  document.title = `${isOne ? first.name : view.runs.length + " runs"} - rwkv_accel`;
  document.getElementById("title").textContent = isOne ? first.path : `${view.runs.length} runs`;
  document.getElementById("footer").textContent = `written ${data.made}`;
  if (isFirst) return drawAll();
  buildCharts();
  drawSections(false);
  view.draw();
}

// Theme: the system's, or the one that was chosen last.
const THEMES = { "": "auto", light: "light", dark: "dark" };

function setTheme(name) {
  if (name) document.documentElement.dataset.theme = name;
  else delete document.documentElement.dataset.theme;
  document.getElementById("theme").textContent = `theme: ${THEMES[name]}`;
}

function stored(action) {
  try { return action(window.localStorage); } catch { return null; }
}

function listenTheme() {
  const saved = stored((storage) => storage.getItem("rwkv_accel-theme"));
  setTheme(saved in THEMES ? saved : "");
  document.getElementById("theme").addEventListener("click", () => {
    const names = Object.keys(THEMES), now = document.documentElement.dataset.theme || "";
    const next = names[(names.indexOf(now) + 1) % names.length];
    stored((storage) => storage.setItem("rwkv_accel-theme", next));
    setTheme(next);
    drawAll();
  });
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
}

async function follow(tag) {
  const badge = document.getElementById("live");
  const show = (text, isOn) => {
    badge.hidden = false;
    badge.textContent = text;
    badge.className = isOn ? "on" : "off";
  };
  show("live", true);
  for (;;) {
    await new Promise((resolve) => setTimeout(resolve, POLL_MS));
    if (document.hidden) continue;
    try {
      const answer = await fetch("data.json?since=" + encodeURIComponent(tag), { cache: "no-store" });
      if (answer.status === 200) {
        const data = await answer.json();
        tag = data.tag;
        take(data, false);
      }
      show("live", true);
    } catch {
      show("no answer from the server, trying again", false);
    }
  }
}

listenTheme();
const start = JSON.parse(document.getElementById("data").textContent);
take(start, true);
let pendingResize = 0;
new ResizeObserver(() => {
  cancelAnimationFrame(pendingResize);
  pendingResize = requestAnimationFrame(() => view.draw());
}).observe(document.getElementById("curves"));
if (start.live) follow(start.tag);
