"use strict";
// Charts as SVG. Texts from runs go in as text nodes, never as markup.

const SVG = "http://www.w3.org/2000/svg";

function shape(name, attributes, parent, text) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "style") Object.assign(made.style, value); // the page's policy forbids the attribute
    else made.setAttribute(key, value);
  }
  if (text !== undefined) made.textContent = text;
  if (parent) parent.append(made);
  return made;
}

function element(name, properties, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(properties || {})) {
    if (value === undefined || value === null || value === false) continue;
    if (key === "class") made.className = value;
    else if (key === "style") Object.assign(made.style, value);
    else if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else made.setAttribute(key, value === true ? "" : value);
  }
  for (const child of children.flat()) if (child !== null && child !== undefined) made.append(child);
  return made;
}

const tone = (name) => `var(--${["bad", "warn", "good", "save"].includes(name) ? name : "plain"})`;

function secondsText(s) {
  if (s === null || s === undefined || !isFinite(s)) return "";
  if (s < 60) return `${s < 10 ? s.toFixed(1) : Math.round(s)} s`;
  const minutes = Math.round(s / 60);
  if (minutes < 60) return `${minutes} min`;
  const hours = Math.floor(minutes / 60);
  return hours < 48 ? `${hours} h ${String(minutes % 60).padStart(2, "0")}` : `${Math.round(hours / 24)} d`;
}

function clockText(s) { // of a chart's axis
  if (s < 60) return `${+s.toFixed(1)} s`;
  const whole = Math.round(s), h = Math.floor(whole / 3600), m = Math.floor((whole % 3600) / 60), rest = whole % 60;
  if (h >= 48 && m === 0 && h % 24 === 0) return `${h / 24} d`;
  if (h) return m ? `${h} h ${String(m).padStart(2, "0")}` : `${h} h`;
  return rest ? `${m}:${String(rest).padStart(2, "0")} min` : `${m} min`;
}

const numberText = (v) => v === null || v === undefined ? "–"
  : Math.abs(v) >= 1e5 || (v !== 0 && Math.abs(v) < 1e-3) ? v.toExponential(2)
  : Math.abs(v) >= 1000 ? Math.round(v).toLocaleString("en") : String(+v.toPrecision(4));

function ticks(low, high, about) {
  const rough = (high - low) / Math.max(1, about) || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((f) => f * power).find((s) => s >= rough * 0.999);
  const found = [];
  for (let v = Math.ceil(low / step - 1e-9) * step; v <= high + step * 1e-9; v += step) found.push(+v.toPrecision(12));
  return found;
}

function timeTicks(high, about) {
  const steps = [1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 14400, 21600, 43200, 86400, 172800, 604800];
  const step = high < about ? ticks(0, high, about)[1] || high || 1
    : steps.find((s) => high / s <= about) || 86400 * Math.ceil(high / 86400 / about);
  const found = [];
  for (let v = 0; v <= high; v += step) found.push(v);
  return found;
}

const path = (points) => points.map(([x, y], i) => `${i ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`).join("");

// A chart is drawn anew when its host changes width; it is read with the pointer or with the arrow keys.
function chart(host, draw) {
  const render = () => {
    const width = host.clientWidth;
    if (!width) return;
    host.replaceChildren();
    const drawn = draw(width);
    host.append(drawn.svg);
    if (drawn.read) follow(host, drawn);
  };
  new ResizeObserver(() => { if (host.dataset.width !== String(host.clientWidth)) { host.dataset.width = host.clientWidth; render(); } }).observe(host);
  render();
}

function follow(host, { svg, read, count, at, top, bottom }) {
  const cross = shape("line", { class: "cross", y1: top, y2: bottom, visibility: "hidden" }, svg);
  const tip = element("div", { class: "tip", hidden: true });
  host.append(tip);
  let chosen = -1;
  const show = (i) => {
    if (i < 0 || i >= count) return;
    chosen = i;
    const x = at(i);
    cross.setAttribute("x1", x); cross.setAttribute("x2", x); cross.setAttribute("visibility", "visible");
    tip.replaceChildren(...read(i).map((line) => element("div", {}, ...line)));
    tip.hidden = false;
    const left = x + 14 + tip.offsetWidth > host.clientWidth ? x - 14 - tip.offsetWidth : x + 14;
    tip.style.left = `${Math.max(0, left)}px`; tip.style.top = `${top + 8}px`;
  };
  const hide = () => { tip.hidden = true; cross.setAttribute("visibility", "hidden"); };
  host.onpointermove = (event) => {
    const x = event.clientX - host.getBoundingClientRect().left;
    let low = 0, high = count - 1;
    while (low < high) { const mid = (low + high) >> 1; if (at(mid) < x) low = mid + 1; else high = mid; }
    if (low > 0 && x - at(low - 1) < at(low) - x) low -= 1;
    show(low);
  };
  host.onpointerleave = hide;
  host.onblur = hide;
  host.onkeydown = (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1, Home: -count, End: count }[event.key];
    if (by === undefined) return;
    event.preventDefault();
    show(Math.min(count - 1, Math.max(0, (chosen < 0 ? count : chosen) + by)));
  };
}

// Loss above, workers below, over the same time; what happened is marked in both.
function courseChart(host, run) {
  const course = run.history, curve = course.curves.loss;
  const sizes = course.worlds.map((w) => w[1]);
  host.setAttribute("role", "img");
  host.tabIndex = 0;
  host.setAttribute("aria-label", `Loss and workers over ${secondsText(course.elapsed_s)}. ` +
    `Loss now ${numberText(curve.mean.at(-1))}; workers ${sizes.length ? sizes.at(-1) || sizes.at(-2) || 0 : 0}. ` +
    `Marked: ${course.marks.map((m) => m.word).join(", ") || "nothing"}. Arrow keys read the values.`);
  chart(host, (width) => {
    const left = 46, right = 10, lossTop = 14, lossHigh = width < 560 ? 190 : 250, gap = 26, worldHigh = 92;
    const worldTop = lossTop + lossHigh + gap, bottom = worldTop + worldHigh, height = bottom + 26;
    const svg = shape("svg", { viewBox: `0 0 ${width} ${height}`, height, "aria-hidden": "true" });
    const end = Math.max(course.elapsed_s, 1e-6);
    const x = (s) => left + (width - left - right) * Math.min(1, s / end);
    const seen = curve.mean.map((v, i) => i).filter((i) => curve.mean[i] !== null);
    const evals = (course.evaluations["eval/loss"] || []);
    // The first steps of a run are far above all others: they may leave the picture, what is usual may not.
    const all = seen.map((i) => curve.mean[i]).concat(evals.map((e) => e[2])).sort((a, b) => a - b);
    let low = all.length ? all[0] : 0, high = all.length ? all[Math.floor((all.length - 1) * 0.995)] : 1;
    if (high - low < 1e-12) { high += Math.abs(high) * 0.1 || 1; low -= Math.abs(low) * 0.1; }
    const pad = (high - low) * 0.06; low -= pad; high += pad;
    const y = (v) => lossTop + lossHigh * (1 - (v - low) / (high - low));
    const most = Math.max(1, ...sizes), w = (n) => worldTop + worldHigh * (1 - n / (most * 1.12));

    for (const v of ticks(low, high, 5)) {
      shape("line", { class: "grid-line", x1: left, x2: width - right, y1: y(v), y2: y(v) }, svg);
      shape("text", { x: left - 9, y: y(v) + 4, "text-anchor": "end" }, svg, numberText(v));
    }
    const whole = most <= 4 ? [...Array(most + 1).keys()] : ticks(0, most, 3);
    for (const n of whole) {
      shape("line", { class: "grid-line", x1: left, x2: width - right, y1: w(n), y2: w(n) }, svg);
      shape("text", { x: left - 9, y: w(n) + 4, "text-anchor": "end" }, svg, n);
    }
    for (const s of timeTicks(end, width < 560 ? 4 : 9)) {
      shape("text", { x: x(s), y: bottom + 18, "text-anchor": x(s) < left + 12 ? "start" : x(s) > width - 30 ? "end" : "middle" }, svg, clockText(s));
    }
    const clip = `clip-${Math.random().toString(36).slice(2)}`;
    shape("rect", { x: left, y: lossTop, width: width - left - right, height: lossHigh }, shape("clipPath", { id: clip }, shape("defs", {}, svg)));
    const inside = shape("g", { "clip-path": `url(#${clip})` }, svg);
    const points = seen.map((i) => [x(course.elapsed[i]), y(curve.mean[i])]);
    if (points.length) {
      const band = seen.map((i) => [x(course.elapsed[i]), y(curve.high[i])]).concat(seen.slice().reverse().map((i) => [x(course.elapsed[i]), y(curve.low[i])]));
      shape("path", { d: path(band) + "Z", fill: "var(--loss)", opacity: 0.13 }, inside);
      shape("path", { d: path(points), fill: "none", stroke: "var(--loss)", "stroke-width": 1.8, "stroke-linejoin": "round" }, inside);
      if (run.status === "running") shape("circle", { cx: points.at(-1)[0], cy: points.at(-1)[1], r: 3.5, fill: "var(--loss)" }, inside);
    }
    for (const [, at, value] of evals) shape("circle", { cx: x(at), cy: y(value), r: 3.2, fill: "var(--paper)", stroke: "var(--ink)", "stroke-width": 1.5 }, inside);

    const steps = [];
    course.worlds.forEach(([at, size], i) => {
      if (i) steps.push([x(at), w(course.worlds[i - 1][1])]);
      steps.push([x(at), w(size)]);
    });
    if (steps.length && steps[0][0] - left > 70) shape("text", { x: (left + steps[0][0]) / 2, y: worldTop + worldHigh / 2, "text-anchor": "middle" }, svg, "start-up");
    if (steps.length) {
      steps.push([x(end), w(sizes.at(-1))]);
      shape("path", { d: `${path(steps)}L${x(end).toFixed(1)} ${w(0)}L${steps[0][0].toFixed(1)} ${w(0)}Z`, fill: "var(--world)", opacity: 0.2 }, svg);
      shape("path", { d: path(steps), fill: "none", stroke: "var(--world)", "stroke-width": 1.8 }, svg);
    }
    for (const [at, step] of course.saves) {
      const dot = shape("path", { d: `M${x(at)} ${bottom - 1}l3.4 5.4h-6.8z`, fill: "var(--save)" }, svg);
      shape("title", {}, dot, `checkpoint of step ${step}`);
    }
    const lines = [-1e9, -1e9, -1e9];
    for (const mark of course.marks) {
      const at = x(mark.elapsed), colour = tone(mark.tone), room = mark.word.length * 6.6 + 12;
      for (const [from, to] of [[lossTop, lossTop + lossHigh], [worldTop, bottom]]) {
        shape("line", { class: "mark", x1: at, x2: at, y1: from, y2: to, style: { stroke: colour } }, svg);
      }
      const before = at + room > width;
      const start = before ? at - room : at, line = lines.findIndex((taken) => start > taken);
      if (line < 0) continue;
      lines[line] = start + room;
      shape("text", { class: "mark-word", x: at + (before ? -5 : 5), y: lossTop + 10 + 14 * line, "text-anchor": before ? "end" : "start", style: { fill: colour } }, svg, mark.word);
    }
    shape("text", { x: left, y: lossTop - 5, "font-weight": 560 }, svg, "loss");
    shape("text", { x: left, y: worldTop - 7, "font-weight": 560 }, svg, "workers");
    const size = (s) => { let n = 0; for (const [at, now] of course.worlds) if (at <= s) n = now; return n; };
    return {
      svg, count: course.elapsed.length, at: (i) => x(course.elapsed[i]), top: lossTop, bottom,
      read: (i) => [
        [element("b", {}, `step ${course.steps[i].toLocaleString("en")}`), ` · ${clockText(course.elapsed[i])}`],
        ...Object.entries(course.curves).map(([name, c]) => [`${name} `, element("b", {}, numberText(c.mean[i]))]),
        ["workers ", element("b", {}, String(size(course.elapsed[i])))],
      ],
    };
  });
}

const PARTS = ["compute", "synchronisation", "data", "checkpoint", "restore", "other"];

// Where steps took their time, stacked, over the steps.
function splitChart(host, course) {
  const names = PARTS.filter((name) => course.totals[name] > 0), count = course.steps.length;
  host.setAttribute("role", "img");
  host.tabIndex = 0;
  host.setAttribute("aria-label", "Milliseconds of a step by where they went, over the steps. Arrow keys read the values.");
  const bars = Math.min(count, 90); // a mean over several steps: single ones are noise
  const mean = (name, i) => {
    const from = Math.floor(i * count / bars), to = Math.max(from + 1, Math.floor((i + 1) * count / bars));
    return 1e3 * course.split[name].slice(from, to).reduce((a, b) => a + b, 0) / (to - from);
  };
  const parts = names.map((name) => Array.from({ length: bars }, (_, i) => mean(name, i)));
  const sums = Array.from({ length: bars }, (_, i) => parts.reduce((a, p) => a + p[i], 0));
  const most = 1.15 * ([...sums].sort((a, b) => a - b)[Math.floor((bars - 1) * 0.95)] || 1);
  chart(host, (width) => {
    const left = 46, top = 14, high = 150, bottom = top + high, height = bottom + 22, wide = (width - left - 10) / bars;
    const svg = shape("svg", { viewBox: `0 0 ${width} ${height}`, height, "aria-hidden": "true" });
    const y = (v) => bottom - high * Math.min(1, v / most);
    for (const v of ticks(0, most, 4)) {
      shape("line", { class: "grid-line", x1: left, x2: width - 10, y1: y(v), y2: y(v) }, svg);
      shape("text", { x: left - 9, y: y(v) + 4, "text-anchor": "end" }, svg, numberText(v));
    }
    for (let i = 0; i < bars; i++) {
      let below = 0;
      names.forEach((name, n) => {
        const from = y(below), to = y(below + parts[n][i]);
        below += parts[n][i];
        if (from - to > 0.2) shape("rect", { x: left + i * wide, width: Math.max(0.8, wide - (wide > 4 ? 1 : 0)), y: to, height: from - to, fill: `var(--${name})` }, svg);
      });
    }
    const step = (i) => course.steps[Math.min(count - 1, Math.floor((i + 0.5) * count / bars))];
    for (const i of [0, Math.floor(bars / 2), bars - 1].filter((v, n, all) => all.indexOf(v) === n)) {
      shape("text", { x: left + (i + 0.5) * wide, y: bottom + 17, "text-anchor": i === 0 ? "start" : i === bars - 1 ? "end" : "middle" }, svg, `step ${step(i).toLocaleString("en")}`);
    }
    shape("text", { x: left, y: top - 4, "font-weight": 560 }, svg, "ms a step");
    return {
      svg, count: bars, at: (i) => left + (i + 0.5) * wide, top, bottom,
      read: (i) => [
        [element("b", {}, `step ${step(i).toLocaleString("en")}`), ` · ${numberText(sums[i])} ms`],
        ...names.map((name, n) => [`${name} `, element("b", {}, `${numberText(parts[n][i])} ms`)]),
      ],
    };
  });
}
