"use strict";
// One chart: curves of several runs on a canvas, a cursor that all charts share, zoom by dragging.

const DASHES = [[], [7, 4], [2, 3], [9, 3, 2, 3]];
const MARGIN = { left: 54, right: 12, top: 8, bottom: 24 };

class Chart {
  // spec: {id, title, note, format, log, wide, lines(view)} -> lines {run, name, xs, ys, width, alpha, dash, dots}
  constructor(spec, view) {
    this.spec = spec;
    this.view = view;
    this.base = make("canvas", { "aria-hidden": "true" });
    this.layer = make("canvas", { "aria-hidden": "true" });
    this.tip = make("div", { class: "tip", hidden: true, role: "status" });
    this.empty = make("div", { class: "empty", hidden: true }, "no values");
    this.plot = make("div", {
      class: "plot", tabindex: "0", role: "application",
      "aria-label": `${spec.title}: left and right move the cursor, plus and minus zoom, Escape shows everything`,
    }, this.base, this.layer, this.empty, this.tip);
    this.logButton = make("button", {
      type: "button", "aria-pressed": "false", title: "logarithmic scale", onclick: () => this.toggleLog(),
    }, "log");
    this.note = make("span", { class: "note" }, spec.note || "");
    this.element = make("div", { class: "chart card" + (spec.wide ? " wide" : ""), id: "chart-" + spec.id },
      make("header", {}, make("h3", {}, spec.title), this.note, this.logButton), this.plot);
    this.setLog(Boolean(spec.log));
    this.listen();
  }

  setLog(on) {
    this.isLog = on;
    this.logButton.setAttribute("aria-pressed", String(on));
  }

  toggleLog() {
    this.setLog(!this.isLog);
    this.draw();
    this.drawCursor();
  }

  refresh() {
    this.lines = this.spec.lines(this.view).filter((line) => line.ys.some((y) => y !== null));
    this.draw();
  }

  draw() {
    const width = this.plot.clientWidth, height = this.plot.clientHeight;
    if (!width || !this.lines) return;
    for (const canvas of [this.base, this.layer]) fit(canvas, width, height);
    const shown = this.lines.filter((line) => !this.view.hidden.has(line.run.name));
    this.empty.hidden = shown.length > 0;
    const [x0, x1] = this.view.range();
    this.x = new Scale(x0, x1, MARGIN.left, width - MARGIN.right, false);
    const [y0, y1] = this.valueRange(shown, x0, x1);
    this.y = new Scale(y0, y1, height - MARGIN.bottom, MARGIN.top, this.isLog);
    const context = this.base.getContext("2d");
    context.clearRect(0, 0, width, height);
    if (!shown.length) return;
    this.drawGrid(context, width, height);
    context.save();
    context.beginPath();
    context.rect(MARGIN.left - 4, 0, width - MARGIN.left - MARGIN.right + 8, height - MARGIN.bottom + 4);
    context.clip();
    this.drawMarks(context, height);
    for (const line of shown) this.drawLine(context, line);
    context.restore();
  }

  valueRange(lines, x0, x1) {
    let low = Infinity, high = -Infinity;
    for (const line of lines) {
      for (let i = 0; i < line.xs.length; i++) {
        const y = line.ys[i];
        if (y === null || line.xs[i] < x0 || line.xs[i] > x1 || (this.isLog && y <= 0)) continue;
        if (y < low) low = y;
        if (y > high) high = y;
      }
    }
    if (low > high) return this.isLog ? [0.1, 1] : [0, 1];
    if (this.isLog) return [low / 1.06, high * 1.06];
    const pad = (high - low) * 0.06 || Math.abs(high) * 0.1 || 1;
    return [low >= 0 && (low - pad < 0 || this.spec.zero) ? 0 : low - pad, high + pad];
  }

  drawGrid(context, width, height) {
    const [ink, grid] = [colour("--soft"), colour("--grid")];
    context.font = "11px system-ui, sans-serif";
    context.fillStyle = ink;
    context.strokeStyle = grid;
    context.lineWidth = 1;
    context.textBaseline = "middle";
    context.textAlign = "right";
    const format = this.spec.tick || ((value) => compact(value));
    for (const value of this.y.ticks(height < 220 ? 5 : 7)) {
      const y = Math.round(this.y.at(value)) + 0.5;
      segment(context, MARGIN.left, y, width - MARGIN.right, y);
      context.fillText(format(value), MARGIN.left - 7, y);
    }
    context.textBaseline = "top";
    context.textAlign = "center";
    for (const value of this.x.ticks(Math.max(2, Math.floor(width / 75)), this.view.axis)) {
      const x = Math.round(this.x.at(value)) + 0.5;
      segment(context, x, MARGIN.top, x, height - MARGIN.bottom);
      const label = this.view.axis.tick(value), half = context.measureText(label).width / 2;
      context.fillText(label, Math.min(Math.max(x, half), width - half - 1), height - MARGIN.bottom + 7);
    }
  }

  drawMarks(context, height) {
    context.setLineDash([3, 4]);
    context.lineWidth = 1;
    for (const run of this.view.visible()) {
      context.strokeStyle = colour(`--run-${run.index % 8}`);
      context.globalAlpha = 0.55;
      for (const mark of run.marks) {
        const x = this.x.at(mark[this.view.axis.key]);
        segment(context, x, MARGIN.top, x, height - MARGIN.bottom);
      }
    }
    context.globalAlpha = 1;
    context.setLineDash([]);
  }

  drawLine(context, line) {
    const { xs, ys } = line, [x0, x1] = this.view.range();
    const first = Math.max(0, nearest(xs, x0) - 1), last = Math.min(xs.length - 1, nearest(xs, x1) + 1);
    const { highlight, hidden } = this.view;
    const isFaded = highlight && !hidden.has(highlight) && highlight !== line.run.name;
    context.strokeStyle = context.fillStyle = colour(`--run-${line.run.index % 8}`);
    context.globalAlpha = (line.alpha || 1) * (isFaded ? 0.25 : 1);
    context.lineWidth = line.width || 1.8;
    context.lineJoin = "round";
    context.setLineDash(line.dash || DASHES[Math.floor(line.run.index / 8) % DASHES.length]);
    context.beginPath();
    let isOpen = false;
    for (let i = first; i <= last; i++) {
      if (ys[i] === null || (this.y.log && ys[i] <= 0)) {
        isOpen = false;
        continue;
      }
      const x = this.x.at(xs[i]), y = this.y.at(ys[i]);
      if (isOpen) context.lineTo(x, y); else context.moveTo(x, y);
      isOpen = true;
    }
    context.stroke();
    context.setLineDash([]);
    const isDrawn = (i) => i >= 0 && i < ys.length && ys[i] !== null && !(this.y.log && ys[i] <= 0);
    for (let i = first; i <= last; i++) {
      // A point between gaps is no part of any line.
      if (isDrawn(i) && (line.dots || last - first < 2 || !(isDrawn(i - 1) || isDrawn(i + 1)))) {
        dot(context, this.x.at(xs[i]), this.y.at(ys[i]), 2.6);
      }
    }
    context.globalAlpha = 1;
  }

  // What the cursor touches: the point of each shown line that is nearest to it.
  picked() {
    if (this.view.cursor === null || !this.lines) return [];
    return this.lines
      .filter((line) => !this.view.hidden.has(line.run.name))
      .map((line) => {
        const index = nearest(line.xs, this.view.cursor);
        return { line, index, x: line.xs[index], y: line.ys[index] };
      })
      .filter((point) => point.x !== undefined && this.reaches(point));
  }

  // A run that ended before the cursor, or starts after it, has no value there.
  reaches({ line, index, x }) {
    const spacing = line.xs.length > 1 ? Math.abs(line.xs[Math.min(index + 1, line.xs.length - 1)] -
      line.xs[Math.max(index - 1, 0)]) : 0;
    const [x0, x1] = this.view.range();
    return Math.abs(x - this.view.cursor) <= Math.max(spacing, (x1 - x0) / 100);
  }

  drawCursor() {
    const context = this.layer.getContext("2d");
    const width = this.plot.clientWidth, height = this.plot.clientHeight;
    context.clearRect(0, 0, width, height);
    this.tip.hidden = true;
    if (!this.x) return;
    if (this.drag) {
      const [from, to] = [this.drag.from, this.drag.to].sort((a, b) => a - b);
      context.fillStyle = colour("--shade");
      context.fillRect(from, MARGIN.top, to - from, height - MARGIN.top - MARGIN.bottom);
      return;
    }
    const points = this.picked();
    if (!points.length) return;
    const anchor = points.reduce((a, b) => Math.abs(a.x - this.view.cursor) <= Math.abs(b.x - this.view.cursor) ? a : b);
    const x = this.x.at(anchor.x);
    if (x < MARGIN.left - 1 || x > width - MARGIN.right + 1) return;
    context.strokeStyle = colour("--soft");
    context.lineWidth = 1;
    segment(context, Math.round(x) + 0.5, MARGIN.top, Math.round(x) + 0.5, height - MARGIN.bottom);
    for (const point of points) {
      if (point.y === null || (this.y.log && point.y <= 0)) continue;
      context.fillStyle = colour("--card");
      dot(context, this.x.at(point.x), this.y.at(point.y), 5);
      context.fillStyle = colour(`--run-${point.line.run.index % 8}`);
      dot(context, this.x.at(point.x), this.y.at(point.y), 3.4);
    }
    if (this.view.hovered === this) this.showTip(anchor, points, x, width);
  }

  showTip(anchor, points, x, width) {
    const text = (y) => (y === null ? "not finite" : this.spec.format(y));
    // A smoothed curve has no row of its own: its value stands beside the one it smooths.
    const smooth = new Map(points.filter((point) => point.line.smooths).map((point) => [point.line.smooths, point.y]));
    const rows = points.filter((point) => !point.line.smooths).map(({ line, x: at, y }) => make("tr", {},
      make("td", {}, swatch(line.run.index)),
      make("td", { class: "name" }, line.name),
      make("td", { class: "num" }, text(y)),
      smooth.has(line.run) ? make("td", { class: "note num" }, " smoothed " + text(smooth.get(line.run))) : null,
      at === anchor.x ? null : make("td", { class: "note" }, " at " + this.view.axis.exact(at))));
    this.tip.replaceChildren(
      make("div", { class: "at num" }, this.view.describe(anchor.line, anchor.index)),
      make("table", {}, rows));
    this.tip.hidden = false;
    const size = this.tip.offsetWidth, left = x + 14 + size > width ? x - 14 - size : x + 14;
    this.tip.style.left = Math.max(2, Math.min(left, width - size - 2)) + "px";
    this.tip.style.top = MARGIN.top + "px";
  }

  listen() {
    const at = (event) => event.clientX - this.plot.getBoundingClientRect().left;
    this.plot.addEventListener("pointermove", (event) => {
      if (!this.x) return;
      if (this.drag) this.drag.to = Math.min(Math.max(at(event), this.x.from), this.x.to);
      this.view.point(this, this.x.value(at(event)));
    });
    this.plot.addEventListener("pointerleave", (event) => {
      if (!this.drag && event.pointerType !== "touch") this.view.point(null, null);
    });
    this.plot.addEventListener("pointerdown", (event) => {
      if (!this.x) return;
      if (event.pointerType === "touch") {
        this.view.point(this, this.x.value(at(event)));
      } else if (event.button === 0) {
        this.drag = { from: at(event), to: at(event) };
        this.plot.setPointerCapture(event.pointerId);
      }
    });
    this.plot.addEventListener("pointerup", () => this.endDrag(true));
    this.plot.addEventListener("pointercancel", () => this.endDrag(false));
    this.plot.addEventListener("dblclick", () => this.view.zoomTo(null));
    this.plot.addEventListener("blur", () => { if (this.view.hovered === this) this.view.point(null, null); });
    this.plot.addEventListener("keydown", (event) => this.onKey(event));
  }

  endDrag(isDone) {
    const drag = this.drag;
    this.drag = null;
    if (!drag) return;
    if (isDone && Math.abs(drag.to - drag.from) > 6) {
      this.view.zoomTo([drag.from, drag.to].sort((a, b) => a - b).map((pixel) => this.x.value(pixel)));
    }
    this.drawCursor();
  }

  onKey(event) {
    const moves = { ArrowLeft: -1, ArrowRight: 1 };
    if (event.key in moves) this.step(moves[event.key]);
    else if (event.key === "+" || event.key === "=") this.view.zoomBy(0.5);
    else if (event.key === "-") this.view.zoomBy(2);
    else if (event.key === "Escape") this.view.zoomTo(null);
    else return;
    event.preventDefault();
  }

  step(direction) {
    const line = this.lines && this.lines.find((line) => !this.view.hidden.has(line.run.name));
    if (!line) return;
    const start = this.view.cursor === null ? this.view.range()[0] : this.view.cursor;
    const index = Math.min(Math.max(nearest(line.xs, start) + direction, 0), line.xs.length - 1);
    this.view.point(this, line.xs[index]);
  }
}

function fit(canvas, width, height) {
  const ratio = window.devicePixelRatio || 1;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  canvas.getContext("2d").setTransform(ratio, 0, 0, ratio, 0, 0);
}

function segment(context, x0, y0, x1, y1) {
  context.beginPath();
  context.moveTo(x0, y0);
  context.lineTo(x1, y1);
  context.stroke();
}

function dot(context, x, y, radius) {
  context.beginPath();
  context.arc(x, y, radius, 0, 2 * Math.PI);
  context.fill();
}

// A tick label: at most four characters of digits.
function compact(value) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e4) return Format.count(size).replace(/^/, value < 0 ? "-" : "");
  if (size < 1e-3) return value.toExponential(1).replace(".0e", "e");
  return String(parseFloat(value.toPrecision(4)));
}
