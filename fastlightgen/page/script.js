"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);

// --- clips: frames are cut from one picture per model, enlarged smoothly, and all play in step
(function () {
  const sheets = [...document.querySelectorAll("img.sprite")], canvases = [...document.querySelectorAll("canvas[data-s]")];
  if (!sheets.length) return;
  const sheetOf = new Map(sheets.map((s) => [s.dataset.id, s]));
  const FPS = 6, HOLD = 4, SIZE = 256;  // HOLD: frames for which the last one stays; SIZE: width of a canvas in pixels
  const frames = Math.max(...sheets.map((s) => +s.dataset.frames));
  document.querySelector(".clips").insertAdjacentHTML("beforebegin", '<div class="bar"><button id="play"></button><label>Speed <select id="speed">' +
    '<option value=".5">half</option><option value="1" selected>normal</option><option value="2">double</option></select></label>' +
    '<input id="seek" type="range" min="0" aria-label="frame"><output id="where" aria-live="off"></output></div>');
  const play = byId("play"), speed = byId("speed"), seek = byId("seek"), where = byId("where");
  const cut = document.createElement("canvas");
  let running = !matchMedia("(prefers-reduced-motion: reduce)").matches, position = 0, last = 0, shown = -1;

  function draw(frame) {
    if (frame === shown) return;
    shown = frame;
    for (const c of canvases) {
      const img = sheetOf.get(c.dataset.s), h = +img.dataset.h, w = +img.dataset.w, f = Math.min(frame, img.dataset.frames - 1);
      const zoom = Math.max(1, Math.round(SIZE / w));
      if (c.width !== w * zoom) { c.width = w * zoom; c.height = h * zoom; c.style.aspectRatio = w + " / " + h; }
      cut.width = w; cut.height = h;  // cutting first keeps a neighbouring frame from bleeding into the edge
      cut.getContext("2d").drawImage(img, f * w, c.dataset.k * h, w, h, 0, 0, w, h);
      const ctx = c.getContext("2d");
      ctx.imageSmoothingQuality = "high";
      ctx.drawImage(cut, 0, 0, c.width, c.height);
    }
    seek.value = frame;
    where.textContent = "frame " + (frame + 1) + " of " + frames;
  }
  function tick(now) {
    if (running) {
      position = (position + Math.min(now - last, 200) / 1000 * FPS * speed.value) % (frames + HOLD);
      draw(Math.min(Math.floor(position), frames - 1));
    }
    last = now;
    requestAnimationFrame(tick);
  }
  function set(on) { running = on; play.textContent = on ? "Pause" : "Play"; }
  seek.max = frames - 1;
  seek.oninput = () => { set(false); position = +seek.value; draw(position); };
  play.onclick = () => set(!running);
  set(running);
  Promise.all(sheets.map((s) => s.decode())).then(() => { draw(0); requestAnimationFrame(tick); });
})();

// --- charts, built as SVG. axis() maps the values lo..hi to the pixels start..end and chooses the ticks.
const text = (s) => String(s).replace(/[&<>"']/g, (c) => "&#" + c.charCodeAt(0) + ";");
const short = (v) => Math.abs(v) >= 1e4 ? v.toLocaleString("en") : String(+v.toPrecision(3));

function axis(lo, hi, start, end, log) {
  const f = log ? Math.log : (v) => v;
  const at = (v) => +(start + (end - start) * (f(Math.min(Math.max(v, lo), hi)) - f(lo)) / (f(hi) - f(lo))).toFixed(1);
  at.ticks = [];
  if (log && hi / lo > 4) {
    for (let k = Math.floor(Math.log10(lo)); k <= Math.log10(hi); k++)
      for (const m of hi / lo > 200 ? [1] : [1, 2, 5]) if (m * 10 ** k >= lo && m * 10 ** k <= hi) at.ticks.push(m * 10 ** k);
  } else {
    const raw = (hi - lo) / 5, power = 10 ** Math.floor(Math.log10(raw));
    const step = power * [1, 2, 5, 10].find((m) => m * power >= raw * 0.999);
    for (let k = Math.ceil(lo / step - 1e-9); k * step <= hi * (1 + 1e-9); k++) at.ticks.push(k * step || 0);
  }
  return at;
}
// The axis of a single value, at the pixel `middle`.
const alone = (value, middle) => Object.assign(() => +middle.toFixed(1), { ticks: [value] });
function valueAxis(lo, hi, start, end, log) {
  if (log) return axis(lo / 1.25, hi * 1.25, start, end, true);
  const pad = 0.08 * (hi - lo) || Math.abs(hi) || 1;
  return axis(lo >= 0 ? Math.max(lo - pad, 0) : lo - pad, hi + pad, start, end, false);
}
// A chart of `width` x `height` pixels, drawn at its real size so that its text stays readable on a phone.
function svg(width, height, y, names, summary, body) {
  const grid = y.ticks.map((t) => '<line class="grid" x1="' + LEFT + '" x2="' + (width - RIGHT) + '" y1="' + y(t) + '" y2="' + y(t) + '"/>' +
    '<text x="' + (LEFT - 6) + '" y="' + (y(t) + 4) + '" text-anchor="end">' + short(t) + "</text>").join("");
  const titles = '<text class="name" x="0" y="12">' + text(names.y) + '</text><text class="name" x="' + (LEFT + width - RIGHT) / 2 +
    '" y="' + (height - 6) + '" text-anchor="middle">' + text(names.x) + "</text>";
  return '<svg width="' + width + '" height="' + height + '" viewBox="0 0 ' + width + " " + height + '" role="img" aria-label="' + text(summary) + '">' +
    titles + grid + body + "</svg>";
}
const LEFT = 52, RIGHT = 8, TOP = 26;  // pixels around the plot
const label = (x, y, s) => '<text x="' + x + '" y="' + y + '" text-anchor="middle">' + s + "</text>";
const strip = (tip, x, width, top, height, body) => '<g data-tip="' + text(tip) + '"><rect class="hit" x="' + x.toFixed(1) + '" y="' + top +
  '" width="' + width.toFixed(1) + '" height="' + height + '"/>' + body + "</g>";
const logNote = (log) => log ? " (log scale)" : "";

function blocks(r, width) {
  const kept = new Set(r.kept), base = r.baseline_score, values = r.units.map((u) => u.score).concat(base), BOTTOM = 300;
  const low = Math.min(...r.units.map((u) => u.score - u.stderr), base), high = Math.max(...r.units.map((u) => u.score + u.stderr), base);
  const y = r.log ? valueAxis(Math.min(...values), high, BOTTOM, TOP, true) : valueAxis(low, high, BOTTOM, TOP, false);
  const slot = (width - LEFT - RIGHT) / r.units.length, every = Math.ceil(24 / slot), cap = Math.min(4, slot / 4);
  let body = '<defs><pattern id="hatch" width="7" height="7" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">' +
    '<rect width="7" height="7" style="fill:var(--drop);fill-opacity:.28"/><rect width="3" height="7" style="fill:var(--drop)"/></pattern></defs>';
  r.units.forEach((u, i) => {
    const x = LEFT + i * slot, mid = (x + slot / 2).toFixed(1), top = Math.min(y(u.score), y(base)), is = kept.has(u.index) ? "kept" : "dropped";
    const line = (v) => "M" + mid + " " + y(v) + "m-" + cap + " 0h" + 2 * cap;
    body += strip(u.name + ": " + u.score.toPrecision(4) + " ± " + u.stderr.toPrecision(2) + ", " + is, x, slot, TOP - 4, BOTTOM - TOP, '<rect class="' + is +
      '" rx="2" x="' + (x + slot * 0.15).toFixed(1) + '" y="' + top + '" width="' + (slot * 0.7).toFixed(1) + '" height="' + Math.abs(y(u.score) - y(base)).toFixed(1) +
      '"/><path class="err" d="M' + mid + " " + y(u.score - u.stderr) + "V" + y(u.score + u.stderr) + line(u.score - u.stderr) + line(u.score + u.stderr) + '"/>') +
      (i % every ? "" : label(mid, BOTTOM + 20, u.index));
  });
  body += '<line class="base" x1="' + LEFT + '" x2="' + (width - RIGHT) + '" y1="' + y(base) + '" y2="' + y(base) + '"/>';
  const sorted = [...r.units].sort((a, b) => a.score - b.score), least = sorted[0], most = sorted[sorted.length - 1];
  const summary = "Error when one block is skipped" + logNote(r.log) + ": " + short(base) + " with all blocks; least without " + least.name + ", " + short(least.score) +
    "; most without " + most.name + ", " + short(most.score) + "; " + r.kept.length + " of " + r.units.length + " blocks kept. The table below has all numbers.";
  return svg(width, BOTTOM + 46, y, { x: "block that is skipped", y: "error" + logNote(r.log) }, summary, body);
}

// Moving average over a twentieth of the points, with a shorter window at both ends.
function smooth(points) {
  const half = Math.floor(points.length / 40);
  return points.map(([s], i) => {
    const window = points.slice(Math.max(0, i - half), i + half + 1);
    return [s, window.reduce((a, p) => a + p[1], 0) / window.length];
  });
}
const thin = (list, most) => list.filter((_, i) => i % Math.ceil(list.length / most) === 0);

function curve(title, name, series, width) {
  const all = series.flatMap((s) => s.points), sorted = all.map((p) => p[1]).sort((a, b) => a - b), BOTTOM = 206;
  const low = sorted[0], high = sorted[Math.ceil(0.995 * (sorted.length - 1))];  // one outlier must not flatten the rest
  const first = Math.min(...all.map((p) => p[0])), last = Math.max(...all.map((p) => p[0])), log = low > 0 && high / low > 12;
  const x = first < last ? axis(first, last, LEFT + 6, width - RIGHT - 2, false) : alone(first, (LEFT + width - RIGHT) / 2);
  const y = valueAxis(low, high, BOTTOM, TOP, log), tips = new Map();
  let body = "", lines = "";
  series.forEach((s, i) => {
    const points = thin(smooth(s.points), 240);
    body += '<path class="raw s' + i + '" d="' + thin(s.points, 400).map((p) => "M" + x(p[0]) + " " + y(p[1]) + "h0").join("") + '"/>';
    lines += points.length > 1 ? '<polyline class="curve s' + i + '" points="' + points.map((p) => x(p[0]) + "," + y(p[1])).join(" ") + '"/>'
      : '<path class="curve dot s' + i + '" d="M' + x(points[0][0]) + " " + y(points[0][1]) + 'h0"/>';
    points.forEach((p) => tips.set(p[0], (tips.get(p[0]) || []).concat(s.label + " " + p[1].toPrecision(4))));
  });
  const steps = thin([...tips.keys()].sort((a, b) => a - b), 120);
  const edges = [LEFT + 4, ...steps.slice(1).map((s, i) => (x(s) + x(steps[i])) / 2), width - RIGHT];
  const strips = steps.map((s, i) => strip("step " + s + ": " + tips.get(s).join(", "), edges[i], edges[i + 1] - edges[i], TOP - 4, BOTTOM - TOP, "")).join("");
  const whole = x.ticks.filter(Number.isInteger), ticks = whole.filter((t, i) => i % Math.ceil(whole.length / ((width - LEFT) / 56)) === 0);
  const said = series.map((s) => {
    const mean = smooth(s.points), end = mean[mean.length - 1];
    return first === last ? s.label + " " + short(end[1]) + " at step " + last : s.label + " from " + short(mean[0][1]) + " at step " + mean[0][0] + " to " + short(end[1]) + " at step " + end[0];
  });
  const few = first < last ? "" : " (one point so far)";
  return svg(width, BOTTOM + 46, y, { x: "training step" + few, y: name + logNote(log) }, title + logNote(log) + ": " + said.join("; ") + ".",
    body + lines + ticks.map((t) => label(x(t), BOTTOM + 20, t.toLocaleString("en"))).join("") + strips);
}

const rungs = data.runs.length > 1 ? [] : Object.keys(data.runs[0].curves[3] || {}).map((key) => +key.split("student_x0_gap_rung")[1]).filter(Boolean).sort((a, b) => a - b);
// [stage, title, note, name of the values, [key in metrics.jsonl, label], ...] with one pair per line of the chart
const CURVES = [
  [0, "Stage 0 · flow matching", "Error of the predicted velocity.", "loss", ["loss", "loss"]],
  [2, "Stage II · loss", "Eq. 7, both paths together.", "loss", ["loss", "loss"]],
  [2, "Stage II · distance to the teacher", "The pruned path should fall; the full path is Stage III's strong teacher and should stay low.", "distance",
    ["distill_pruned", "pruned path"], ["distill_unpruned", "full path"]],
  [3, "Stage III · critic's loss", "Flow matching on the student's own clips.", "loss", ["fake_loss", "loss"]],
  [3, "Stage III · distance to the guided target", "x0 gap: mean |x0 - x0_real|, should fall.", "x0 gap", ["student_x0_gap", "x0 gap"]],
  [3, "Stage III · distance by rung", "The same, by the number of evaluations before the exit.", "x0 gap",
    ...rungs.map((k) => ["student_x0_gap_rung" + k, "rung " + k])],
  [3, "Stage III · contrast", "Spread of the student's latents; a steady rise over the data's means over-saturation.", "standard deviation",
    ["student_contrast", "student"], ["student_contrast_data", "data"]],
];

// Draw again whenever the width of a chart's frame changes: a phone that is turned, a window that is resized.
function drawn(frame, draw) {
  let width = 0;
  new ResizeObserver(() => {
    const now = Math.floor(frame.clientWidth);
    if (now && now !== width) frame.innerHTML = draw(width = now);
  }).observe(frame);
}
if (byId("blocks")) {
  byId("blocks").innerHTML = '<p class="legend"><span>kept</span><span class="dropped">dropped</span>' +
    '<span class="base">all blocks: ' + short(data.importance.baseline_score) + '</span></p><div class="frame"></div>';
  drawn(byId("blocks").querySelector(".frame"), (width) => blocks(data.importance, width));
}
for (const [stage, title, note, name, ...lines] of CURVES) {
  // One run: every line of a chart; several: the first line of each.
  const [[key]] = lines.length ? lines : [[""]], of = (run, key) => (run.curves[stage] || {})[key];
  const series = (data.runs.length > 1 ? data.runs.map((run) => ({ label: text(run.name), points: of(run, key) }))
    : lines.map(([key, line]) => ({ label: line, points: of(data.runs[0], key) }))).filter((s) => s.points);
  if (!series.length) continue;
  const names = series.length > 1 ? '<p class="legend">' + series.map((s, i) => '<span class="' + (i ? "s" + i : "") + '">' + s.label + "</span>").join("") + "</p>" : "";
  byId("curves").insertAdjacentHTML("beforeend", '<figure class="chart"><figcaption><h3>' + title + "</h3><small>" + note + "</small>" + names +
    '</figcaption><div class="frame"></div></figure>');
  drawn(byId("curves").lastElementChild.querySelector(".frame"), (width) => curve(title, name, series, width));
}

// --- a table that is wider than the screen says so, and the keyboard can scroll it
const tables = new ResizeObserver((seen) => seen.forEach(({ target: t }) => {
  const cut = t.scrollWidth > t.clientWidth + 1;
  t.toggleAttribute("data-cut", cut);
  for (const [key, value] of [["tabindex", "0"], ["role", "region"], ["aria-label", t.dataset.name + ", scrolls sideways"]])
    cut ? t.setAttribute(key, value) : t.removeAttribute(key);
}));
document.querySelectorAll(".scroll").forEach((t) => tables.observe(t));

// --- the value under the pointer
addEventListener("pointermove", (e) => {
  const target = e.target.closest && e.target.closest("[data-tip]"), tip = byId("tip");
  tip.style.opacity = target ? 1 : 0;
  if (!target) return;
  tip.textContent = target.dataset.tip;
  tip.style.left = Math.min(e.clientX + 14, innerWidth - tip.offsetWidth - 8) + "px";
  tip.style.top = Math.max(e.clientY - tip.offsetHeight - 12, 4) + "px";
});
