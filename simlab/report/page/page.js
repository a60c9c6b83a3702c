"use strict";
const D = JSON.parse(document.getElementById("data").textContent);
const $ = id => document.getElementById(id);
const NS = "http://www.w3.org/2000/svg";

// What is shown; kept in the address, so that a link shows the same.
const S = {q: D.quantity ?? "mean_square", scale: "", seeds: "band", relative: false, fit: false, share: D.share ?? false, rows: "block", off: D.off ?? null, hide: D.hide ?? [], extra: [], zoom: null, job: D.start ?? null};
try { Object.assign(S, JSON.parse(decodeURIComponent(location.hash.slice(1)) || "{}")) } catch { /* another's link */ }
let at = null, sorted = {}, chart = null;

const set = (e, attributes, children) => {
  for (const [name, value] of Object.entries(attributes)) name.startsWith("on") ? e.addEventListener(name.slice(2), value) : e.setAttribute(name, value);
  e.append(...children);
  return e;
};
const el = (tag, attributes = {}, ...children) => set(document.createElement(tag), attributes, children);
const sv = (tag, attributes = {}, ...children) => set(document.createElementNS(NS, tag), attributes, children);

// Numbers: four digits, powers of ten far from 1.
const power = n => (n < 0 ? "⁻" : "") + [...String(Math.abs(n))].map(c => "⁰¹²³⁴⁵⁶⁷⁸⁹"[c]).join("");
function text(v) {
  if (v == null || !isFinite(v)) return "";
  if (v === 0 || (Math.abs(v) >= 1e-3 && Math.abs(v) < 1e5)) return String(+v.toPrecision(4));
  const [digits, exponent] = v.toExponential(2).split("e");
  return `${+digits}·10${power(+exponent)}`;
}
function tick(v, log) {
  const e = Math.round(Math.log10(Math.abs(v)));
  return log && (v >= 1e4 || v < 1e-2) && Math.abs(v / 10 ** e - 1) < 1e-6 ? "10" + power(e) : text(v);
}

// Curves: one per job and kind, with its colour.
for (const job of D.jobs) for (const curve of job.curves) curve.steps = D.axes[curve.steps];
const several = D.jobs.length > 1, kinds = Math.max(...D.jobs.map(job => job.curves.length));
const COLOURS = {expected: "var(--dim)", got: "var(--c1)", random: "var(--c0)", checkpoint: "var(--c1)", model: "var(--c1)", theory: "var(--c2)"};
const DASHES = ["", "6 3", "2 3", "8 3 2 3"];
const ofJob = ({shade, colour}) => shade == null ? `var(--c${colour})` : `color-mix(in oklab, var(--to) ${Math.round(100 * shade)}%, var(--from))`;
const seedsOf = curve => curve.count > 1 ? ` (${curve.count} seeds: mean, least to most)` : curve.name === "theory" ? " (± 2 std of a seed)" : "";
const curves = D.jobs.flatMap((job, i) => job.curves.map(curve => ({
  ...curve, job: i, key: `${i}/${curve.name}`, color: several && D.looks ? ofJob(D.looks[i]) : COLOURS[curve.name],
  dash: !several || !D.looks ? "" : kinds > 1 ? (curve.name === "checkpoint" ? "" : "5 3") : DASHES[D.looks[i].dash % DASHES.length],
  short: several && D.looks ? job.label + (kinds > 1 ? `: ${curve.label}` : "") : curve.label,
  title: several && D.looks ? job.label + (kinds > 1 ? `: ${curve.label}` : "") : curve.label + seedsOf(curve),
})));
const most = list => Math.max(...list), two = curves.every(c => Math.ceil(most(c.steps.sublayer) / 2) === most(c.steps.block));
const laws = D.jobs.flatMap((job, i) => job.laws.map((law, n) => ({
  ...law, job: i, key: `law/${law.key}`, law: true, title: law.label, short: law.label, steps: job.curves[0].steps,
  color: {sqrt2: "var(--law2)", mean_field: "var(--c2)"}[law.key] || "var(--law)", dash: {sqrt2: "7 4", mean_field: "6 2 1 2"}[law.key] || "2 3",
})));
// At first a sweep of checkpoints shows the random inits of its first job alone.
S.off ??= several && kinds > 1 ? curves.filter(c => c.name === "random" && c.job > 0).map(c => c.key) : [];
const quantities = Object.keys(D.quantities).filter(q => curves.some(c => c.mean[q]));
const info = () => D.quantities[S.q], byBlock = q => D.quantities[q].by === "block";
// A sweep of many jobs has a switch per value of a swept key: S.hide has the values that are off, as "key=value";
// S.extra has the curves that are on all the same.
const hidden = c => S.job == null && D.keys && D.keys.some(({name}, k) => S.hide.includes(`${name}=${D.jobs[c.job].values[k]}`));
const on = c => !S.off.includes(c.key) && (!hidden(c) || S.extra.includes(c.key)) && (S.job == null || c.job === S.job);
const depths = new Set(D.jobs.map(job => job.depth));
function xs(c, q) {
  const last = byBlock(q) ? D.jobs[c.job].depth : D.jobs[c.job].sublayers;
  const x = byBlock(q) ? c.mean[q].map((_, i) => i + 2) : c.steps.x;
  return S.share && depths.size > 1 ? x.map(v => v / last) : x;
}
function place(c, i, q) {
  if (byBlock(q)) return `block ${i + 2}`;
  const {sublayer, kind, block} = c.steps;
  if (kind[i] === "embedding") return "the embedding";
  return kind[i] === "renorm" ? `the re-norm after block ${block[i]}` : `sublayer ${sublayer[i]}, ${kind[i]} of block ${block[i]}`;
}

// The lines to draw: each with x and y, and low and high for a band.
function lines(q, every) {
  const relative = S.relative && !byBlock(q), out = [];
  const base = job => curves.find(c => c.job === job && c.name === "random")?.mean[q];
  const seen = every ? curves.filter(c => !S.off.includes(c.key)) : curves.filter(on);
  const lawJob = several ? S.job : 0;
  const lawful = lawJob == null ? [] : laws.filter(law => law.job === lawJob && !S.off.includes(law.key));
  for (const c of [...seen, ...lawful]) {
    if (!c.mean[q]) continue;
    const by = relative ? base(c.job) : null;
    if (relative && !by) continue;
    const over = y => by && y ? y.map((v, i) => v == null || !by[i] ? null : v / by[i]) : y;
    const x = xs(c, q), band = S.seeds === "band" || (c.law && S.seeds !== "none");
    if (S.seeds === "lines") for (const seed of c.seeds ?? []) if (seed.values[q]) out.push({x, y: over(seed.values[q]), color: c.color, dash: "", width: 1, pale: true});
    out.push({c, x, y: over(c.mean[q]), low: band ? over(c.low[q]) : null, high: band ? over(c.high[q]) : null,
      range: [over(c.low[q]), over(c.high[q])], color: c.color, dash: c.dash, width: c.law ? 1.8 : c.name === "expected" ? 4.5 : 2.3});
  }
  return out;
}
// Jobs' curves two decades apart: a linear axis would show the largest alone.
function spread(q) {
  const of = D.looks ? curves.filter(c => c.mean[q]) : [], tops = of.map(c => Math.max(...c.mean[q])).filter(v => v > 0);
  return !of.some(c => c.mean[q].some(v => v < 0)) && Math.max(...tops) > 100 * Math.min(...tops);
}
const isLog = () => S.scale ? S.scale === "log" : S.relative || info().log || spread(S.q);
function extent(list, log, [x0, x1]) {
  let low = Infinity, high = -Infinity;
  const see = (x, y) => y?.forEach((v, i) => { if (v != null && x[i] >= x0 && x[i] <= x1 && (!log || v > 0)) { low = Math.min(low, v); high = Math.max(high, v) } });
  const own = list.filter(l => S.fit || !l.c?.law);
  for (const l of own.length ? own : list) { see(l.x, l.y); see(l.x, l.low); see(l.x, l.high) }
  if (low > high) return log ? [.1, 1] : [0, 1];
  if (log) return [low / 1.4, high * 1.4];
  const room = .06 * (high - low || Math.abs(high) || 1);
  return [low >= 0 && low < .5 * high ? 0 : low - room, high <= 0 && high > .5 * low ? 0 : high + room];
}
function linearTicks(low, high, count) {
  const rough = (high - low) / count, unit = 10 ** Math.floor(Math.log10(rough)), step = [1, 2, 5, 10].find(n => n * unit >= rough) * unit, out = [];
  for (let v = Math.ceil(low / step - 1e-9) * step; v <= high + 1e-9 * step; v += step) out.push(Math.abs(v) < 1e-9 * step ? 0 : +v.toPrecision(10));
  return out;
}
function logTicks(low, high) {
  const first = Math.floor(Math.log10(low)), last = Math.ceil(Math.log10(high)), every = Math.max(1, Math.ceil((last - first) / 7)), out = [];
  const within = last - first > 3 ? [1] : Math.log10(high / low) < 1 ? [1, 1.5, 2, 3, 5, 7] : [1, 2, 5];
  for (let e = first; e <= last; e += every) for (const m of within) if (m * 10 ** e >= low * .999 && m * 10 ** e <= high * 1.001) out.push(m * 10 ** e);
  return out;
}
function path(x, y, X, Y, fits) {
  let d = "", pen = false;
  y.forEach((v, i) => { if (v == null) return; if (!fits(v)) { pen = false; return } d += `${pen ? "L" : "M"}${X(x[i]).toFixed(1)} ${Y(v).toFixed(1)}`; pen = true });
  return d;
}
function area(x, low, high, X, Y, fits, floor) {
  const up = [], down = [];
  high.forEach((v, i) => { if (v != null && low[i] != null && fits(v)) { up.push(`${X(x[i]).toFixed(1)} ${Y(v).toFixed(1)}`); down.unshift(`${X(x[i]).toFixed(1)} ${Y(fits(low[i]) ? low[i] : floor).toFixed(1)}`) } });
  return up.length ? `M${[...up, ...down].join("L")}Z` : "";
}

function draw() {
  const box = $("plot"), W = Math.max(280, box.clientWidth), narrow = W < 520, H = narrow ? 300 : 410, log = isLog();
  const list = lines(S.q), view = S.job == null || !D.looks ? list : lines(S.q, true); // steps of a sweep share their axes
  const all = view.flatMap(l => l.x), whole = [Math.min(...all), Math.max(...all)], [x0, x1] = S.zoom ?? (all.length ? whole : [0, 1]);
  const [y0, y1] = extent(view, log, [x0, x1]), left = narrow ? 50 : 64, right = 14, top = 14, bottom = 42;
  const f = log ? Math.log10 : v => v, fits = v => !log || v > 0;
  const X = v => left + (v - x0) / (x1 - x0 || 1) * (W - left - right);
  const Y = v => Math.max(-5e3, Math.min(5e3, H - bottom - (f(v) - f(y0)) / (f(y1) - f(y0) || 1) * (H - top - bottom)));
  const svg = sv("svg", {viewBox: `0 0 ${W} ${H}`, height: H, role: "img", tabindex: 0,
    "aria-label": `${info().label} by ${byBlock(S.q) ? "block" : "sublayer"}, ${log ? "logarithmic" : "linear"} axis. Arrow keys read the values; the table below has them all.`});
  const write = (x, y, anchor, words) => svg.append(sv("text", {x, y, "text-anchor": anchor}, words));
  svg.append(sv("clipPath", {id: "inside"}, sv("rect", {x: left, y: top - 4, width: W - left - right + 3, height: H - top - bottom + 8})));
  for (const t of log ? logTicks(y0, y1) : linearTicks(y0, y1, 6)) {
    svg.append(sv("line", {class: "grid", x1: left, x2: W - right, y1: Y(t), y2: Y(t)}));
    write(left - 8, Y(t) + 4, "end", tick(t, log) + (S.relative ? "×" : ""));
  }
  const share = S.share && depths.size > 1;
  for (const t of linearTicks(x0, x1, narrow ? 5 : 10)) if (share || Number.isInteger(t)) {
    svg.append(sv("line", {class: "grid", x1: X(t), x2: X(t), y1: top, y2: H - bottom}));
    write(X(t), H - bottom + 17, "middle", String(t));
  }
  svg.append(sv("line", {class: "axis", x1: left, x2: W - right, y1: H - bottom, y2: H - bottom}));
  write((left + W - right) / 2, H - 6, "middle", share ? "share of the model's depth" : byBlock(S.q) ? "block" : `sublayer (0: the embedding${two ? "; a block has two" : ""})`);
  const inside = sv("g", {"clip-path": "url(#inside)"});
  svg.append(inside);
  for (const l of list) if (l.low && l.high) inside.append(sv("path", {d: area(l.x, l.low, l.high, X, Y, fits, y0), style: `fill:${l.color};opacity:${several && S.job == null ? .1 : .17}`}));
  for (const l of list) inside.append(sv("path", {d: path(l.x, l.y, X, Y, fits), "stroke-dasharray": l.dash || "none", style: `fill:none;stroke:${l.color};stroke-width:${l.width};opacity:${l.pale ? .5 : 1};stroke-linejoin:round`}));
  const gone = (several ? D.jobs[S.job] : D.jobs[0])?.departure;
  if (gone && S.q === "mean_square" && !share && gone.sublayer >= x0 && gone.sublayer <= x1) {
    const x = X(gone.sublayer), end = x > W / 2, words = narrow ? `outside from ${gone.sublayer} on` : gone.label;
    inside.append(sv("line", {x1: x, x2: x, y1: top, y2: H - bottom, "stroke-dasharray": "5 4", style: "stroke:var(--c1)"}),
      sv("text", {x: x + (end ? -6 : 6), y: top + 12, "text-anchor": end ? "end" : "start", class: "over", style: "fill:var(--c1)"}, words));
  }
  if (!list.length) write(W / 2, H / 2, "middle", "Nothing is switched on.");
  const cursor = sv("g", {}), frame = sv("rect", {y: top, height: H - top - bottom, width: 0, style: "fill:var(--link);opacity:.15"});
  svg.append(cursor, frame);
  const tip = el("div", {class: "tip", hidden: ""});
  box.replaceChildren(svg, tip);
  const marks = [...new Set(list.filter(l => l.c).flatMap(l => l.x))].filter(x => x >= x0 && x <= x1).sort((a, b) => a - b);
  chart = {list, X, Y, W, H, top, bottom, cursor, tip, marks, fits, x0, x1, whole};
  const value = event => { const r = svg.getBoundingClientRect(); return x0 + ((event.clientX - r.left) * W / r.width - left) / (W - left - right) * (x1 - x0) };
  const nearest = v => marks.reduce((best, x, i) => Math.abs(x - v) < Math.abs(marks[best] - v) ? i : best, 0);
  let down = null;
  svg.onpointermove = event => {
    const v = value(event);
    if (down != null) {
      const [a, b] = [down, v].map(u => X(Math.max(x0, Math.min(x1, u)))).sort((p, q) => p - q);
      frame.setAttribute("x", a); frame.setAttribute("width", b - a);
    }
    point(nearest(v));
  };
  svg.onpointerdown = event => { if (event.pointerType === "mouse") { down = value(event); svg.setPointerCapture(event.pointerId) } else point(nearest(value(event))) };
  svg.onpointerup = event => {
    if (down == null) return;
    const [a, b] = [down, value(event)].map(u => Math.max(x0, Math.min(x1, u))).sort((p, q) => p - q);
    down = null; frame.setAttribute("width", 0);
    if (b - a > .02 * (x1 - x0)) zoom([a, b]);
  };
  svg.onpointercancel = () => { down = null; frame.setAttribute("width", 0) };
  svg.onpointerleave = event => { if (down == null && event.pointerType === "mouse") point(null) }; // a finger's tip stays
  svg.ondblclick = () => zoom(null);
  svg.onkeydown = event => {
    const step = {ArrowRight: 1, ArrowLeft: -1, PageDown: 10, PageUp: -10, Home: -1e9, End: 1e9}[event.key];
    if (event.key === "Escape") { point(null); zoom(null) }
    else if (event.key === "+" || event.key === "=") closer(.5);
    else if (event.key === "-") closer(2);
    else if (step && marks.length) { event.preventDefault(); point(Math.max(0, Math.min(marks.length - 1, (at ?? (step > 0 ? -1 : marks.length)) + step)), true) }
  };
}
function zoom(range) { S.zoom = range; show(); $("plot").querySelector("svg").focus({preventScroll: true}) }
function closer(factor) {
  const {x0, x1, whole, marks} = chart, middle = at != null && marks[at] != null ? marks[at] : (x0 + x1) / 2, half = (x1 - x0) / 2 * factor;
  const least = S.share && depths.size > 1 ? .02 : 1;
  if (half < least) return;
  const range = [Math.max(whole[0], middle - half), Math.min(whole[1], middle + half)];
  zoom(range[0] <= whole[0] && range[1] >= whole[1] ? null : range);
}
const MOST = 10; // curves in a tip
function point(i, aloud) {
  at = i;
  const {list, X, Y, W, H, top, bottom, cursor, tip, marks, fits} = chart;
  document.querySelectorAll("#table tr.on").forEach(row => row.classList.remove("on"));
  cursor.replaceChildren();
  tip.hidden = i == null || marks[i] == null;
  if (tip.hidden) return;
  const x = marks[i];
  cursor.append(sv("line", {x1: X(x), x2: X(x), y1: top, y2: H - bottom, style: "stroke:var(--dim);opacity:.6"}));
  const rows = list.filter(l => l.c).map(l => ({l, i: l.x.indexOf(x)})).filter(({l, i}) => i >= 0 && l.y[i] != null).sort((a, b) => b.l.y[b.i] - a.l.y[a.i]);
  for (const {l, i} of rows) if (fits(l.y[i]) && Y(l.y[i]) > top - 4 && Y(l.y[i]) < H - bottom + 4) cursor.append(sv("circle", {cx: X(x), cy: Y(l.y[i]), r: 4, style: `fill:${l.color};stroke:var(--card)`}));
  const where = rows.length ? place(rows[0].l.c, rows[0].i, S.q) : "", table = el("table");
  for (const {l, i} of rows.slice(0, MOST)) {
    const [low, high] = l.range.map(r => r?.[i]);
    const range = low != null && high != null && low !== high ? ` (${text(low)} … ${text(high)})` : "";
    table.append(el("tr", {}, el("td", {}, el("span", {style: `color:${l.color}`, "aria-hidden": "true"}, l.dash ? "┅ " : "━ "), l.c.short), el("td", {}, el("b", {}, text(l.y[i])), range)));
  }
  tip.replaceChildren(el("b", {}, where), table, rows.length > MOST ? `and ${rows.length - MOST} more` : "");
  const box = $("plot").clientWidth, px = X(x) / W * box, width = tip.offsetWidth;
  tip.style.left = Math.max(0, Math.min(box - width, px > box / 2 ? px - width - 14 : px + 14)) + "px";
  if (rows.length) document.querySelector(`#table tr[data-at="${rows[0].i}"]`)?.classList.add("on");
  if (aloud) $("said").textContent = `${where}: ${rows.slice(0, MOST).map(({l, i}) => `${l.c.short} ${text(l.y[i])}`).join(", ")}`;
}

function turn(c, to) {
  for (const name of ["off", "extra"]) S[name] = S[name].filter(k => k !== c.key);
  if (!to) S.off = [...S.off, c.key]; else if (hidden(c)) S.extra = [...S.extra, c.key];
}
function keys() {
  const one = c => el("button", {class: "key", "aria-pressed": String(on(c)), onclick() { turn(c, !on(c)); show(c.key) }, "data-key": c.key},
    sv("svg", {viewBox: "0 0 28 10", "aria-hidden": "true"}, sv("line", {x1: 1, x2: 27, y1: 5, y2: 5, "stroke-dasharray": c.dash || "none", style: `stroke:${c.color};stroke-width:3`})), c.title);
  const lawJob = several ? S.job : 0;
  const list = [...curves.filter(c => c.mean[S.q] && (S.job == null || c.job === S.job)), ...laws.filter(law => law.job === lawJob && law.mean[S.q])];
  const buttons = list.map(one);
  if (list.length > 8) for (const [words, off] of [["all on", []], ["all off", list.map(c => c.key)]]) buttons.unshift(el("button", {onclick() { S.off = off; S.extra = []; if (!off.length) S.hide = []; show() }}, words));
  $("keys").replaceChildren(...buttons);
  values();
}
// A switch per value of each swept key, in the look of its curves; the jobs' own switches fold away.
function values() {
  const many = Boolean(D.keys) && S.job == null;
  $("values").hidden = $("each").hidden = !many;
  many ? $("each").append($("keys")) : $("each").after($("keys"));
  if (!many) return;
  const shown = new Set(curves.filter(c => c.mean[S.q] && on(c)).map(c => c.job)).size;
  $("each-title").textContent = `each job: ${shown} of ${D.jobs.length} are shown`;
  const one = ({name, look}, v) => {
    const id = `${name}=${v}`, of = curves.find(c => D.jobs[c.job].values[D.keys.findIndex(k => k.name === name)] === v);
    const line = look && of && sv("svg", {viewBox: "0 0 28 10", "aria-hidden": "true"}, sv("line", {x1: 1, x2: 27, y1: 5, y2: 5, "stroke-dasharray": look === "dash" ? of.dash || "none" : "none", style: `stroke:${look === "colour" ? of.color : "var(--dim)"};stroke-width:3`}));
    return el("button", {class: "key", "aria-pressed": String(!S.hide.includes(id)), "data-value": id, onclick() { S.hide = S.hide.includes(id) ? S.hide.filter(h => h !== id) : [...S.hide, id]; show(); document.querySelector(`[data-value="${CSS.escape(id)}"]`).focus() }}, ...(line ? [line] : []), v);
  };
  $("values").replaceChildren(...D.keys.map(key => el("div", {role: "group", "aria-label": `${key.name}, values to switch on and off`}, el("b", {}, key.name), ...key.values.map(v => one(key, v)))));
}
function mini(q) {
  const W = 180, H = 46, log = D.quantities[q].log || spread(q), shown = curves.filter(c => on(c) && c.mean[q]);
  let low = Infinity, high = -Infinity, x0 = Infinity, x1 = -Infinity;
  for (const c of shown) { xs(c, q).forEach(x => { x0 = Math.min(x0, x); x1 = Math.max(x1, x) }); for (const y of [c.mean[q], c.low[q], c.high[q]]) y?.forEach(v => { if (v != null && (!log || v > 0)) { low = Math.min(low, v); high = Math.max(high, v) } }) }
  const f = log ? Math.log10 : v => v, fits = v => !log || v > 0;
  if (!log && low > 0 && low < .5 * high) low = 0;
  const X = v => 2 + (v - x0) / (x1 - x0 || 1) * (W - 4), Y = v => H - 3 - (f(v) - f(low)) / (f(high) - f(low) || 1) * (H - 6);
  const svg = sv("svg", {viewBox: `0 0 ${W} ${H}`, preserveAspectRatio: "none", "aria-hidden": "true"});
  for (const c of shown) {
    const x = xs(c, q);
    if (c.low[q] && !several) svg.append(sv("path", {d: area(x, c.low[q], c.high[q], X, Y, fits, low), style: `fill:${c.color};opacity:.2`}));
    svg.append(sv("path", {d: path(x, c.mean[q], X, Y, fits), "stroke-dasharray": c.dash || "none", "vector-effect": "non-scaling-stroke", style: `fill:none;stroke:${c.color};stroke-width:1.6`}));
  }
  const ends = shown.slice(0, 2).map(c => text(c.mean[q].findLast(v => v != null))).join(" · ");
  return el("button", {class: "mini", "aria-current": String(q === S.q), onclick() { S.q = q; S.scale = ""; S.zoom = null; show(); $("chart-title").scrollIntoView({block: "center"}) }}, el("span", {}, D.quantities[q].label), svg, el("small", {}, `ends at ${ends}`));
}
function everything() {
  const groups = {};
  for (const q of quantities) (groups[D.quantities[q].group] ??= []).push(q);
  $("all").replaceChildren(...Object.entries(groups).flatMap(([name, list]) => [el("h3", {}, name), el("div", {class: "many"}, ...list.map(mini))]));
}
// A table whose heads sort it. texts: how many of its first columns are texts.
function fill(table, id, heads, rows, texts) {
  const by = sorted[id];
  if (by) rows.sort((a, b) => { const [p, q] = [a.cells[by.column], b.cells[by.column]]; return (p == null) - (q == null) || by.way * (typeof p === "string" || typeof q === "string" ? String(p).localeCompare(String(q), undefined, {numeric: true}) : p - q) });
  const head = heads.map((name, column) => el("th", {scope: "col", class: texts(column) ? "text" : "", "aria-sort": by?.column === column ? (by.way > 0 ? "ascending" : "descending") : "none"},
    el("button", {onclick() { sorted[id] = {column, way: by?.column === column ? -by.way : 1}; show(); table.querySelectorAll("th button")[column].focus() }}, name + (by?.column === column ? (by.way > 0 ? " ▴" : " ▾") : ""))));
  table.replaceChildren(el("thead", {}, el("tr", {}, ...head)), el("tbody", {}, ...rows.map(({cells, at}) =>
    el("tr", at == null ? {} : {"data-at": at}, ...cells.map((v, c) => el("td", {class: texts(c) ? "text" : ""}, typeof v === "number" ? text(v) : v ?? ""))))));
}
const WIDEST = 12; // curves in the table
function table() {
  const shown = [...curves.filter(c => on(c) && c.mean[S.q]), ...(several && S.job == null ? [] : laws.filter(law => law.job === (S.job ?? 0) && law.mean[S.q] && !S.off.includes(law.key)))].slice(0, WIDEST);
  const wide = shown.filter(c => !c.law).length <= 2;
  const heads = byBlock(S.q) ? ["block"] : ["sublayer", "block", "after"], rows = [], first = heads.length;
  for (const c of shown) heads.push(c.short, ...(wide && c.low[S.q] ? ["least", "most"] : []));
  const blocks = !byBlock(S.q) && S.rows === "block", size = c => c.mean[S.q].length + (blocks ? 1e6 * most(c.steps.block) : 0);
  const longest = shown.reduce((a, c) => !a || size(c) > size(a) ? c : a, null), {sublayer, kind, block} = longest?.steps ?? {};
  // Models with other sublayers in a block, as parallel ones: their block's last step, and only what they share is named.
  const alike = new Set(shown.filter(c => c.steps.block.every((b, n) => n >= block.length || (b === block[n] && c.steps.kind[n] === kind[n]))));
  for (let i = 0; longest && i < longest.mean[S.q].length; i++) {
    if (blocks && block[i] && block[i] === block[i + 1]) continue;
    const at = c => blocks && !alike.has(c) ? c.steps.block.lastIndexOf(block[i]) : i;
    const shared = list => shown.every(c => [undefined, longest.steps[list][i]].includes(c.steps[list][at(c)])) ? longest.steps[list][i] : null;
    const cells = byBlock(S.q) ? [i + 2] : [shared("sublayer"), shared("block") || null, shared("kind")];
    for (const c of shown) cells.push(c.mean[S.q][at(c)], ...(wide && c.low[S.q] ? [c.low[S.q][at(c)], c.high[S.q][at(c)]] : []));
    rows.push({cells, at: i});
  }
  $("table-title").textContent = `By ${byBlock(S.q) || S.rows === "block" ? "block" : "sublayer"}: ${info().label}`;
  $("rowbar").hidden = byBlock(S.q);
  fill($("table"), "table", heads, rows, c => first === 3 && c === 2);
}

function show(focus) {
  if (!quantities.includes(S.q)) S.q = quantities[0];
  if (S.job != null && !D.jobs[S.job]) S.job = null;
  $("quantity").value = S.q;
  const name = several && S.job != null ? `, ${D.jobs[S.job].label}` : "";
  $("chart-title").textContent = info().label[0].toUpperCase() + info().label.slice(1) + (S.relative && !byBlock(S.q) ? ", relative to the random inits' mean" : "") + name;
  const press = (attribute, value) => document.querySelectorAll(`[data-${attribute}]`).forEach(b => b.setAttribute("aria-pressed", String(b.dataset[attribute] === value)));
  press("scale", isLog() ? "log" : "linear"); press("seeds", S.seeds); press("rows", S.rows); press("mode", S.job == null ? "all" : "one");
  for (const id of ["relative", "fit", "share"]) $(id).setAttribute("aria-pressed", String(S[id]));
  $("slider").hidden = S.job == null; $("fit").hidden = !laws.some(law => law.job === (several ? S.job : 0));
  if (S.job != null) { $("job").value = S.job; $("jobname").value = S.job }
  draw(); keys(); everything(); table();
  if (D.table) fill($("jobtable"), "jobs", D.table.heads, D.table.rows.map(cells => ({cells: [...cells]})), c => D.table.rows.some(row => typeof row[c] === "string"));
  if (typeof focus === "string") document.querySelector(`[data-key="${CSS.escape(focus)}"]`)?.focus();
  try { history.replaceState(null, "", "#" + encodeURIComponent(JSON.stringify(S))) } catch { /* a sandboxed frame */ }
}

$("title").textContent = D.title; $("headline").textContent = D.headline;
$("warnings").append(...D.warnings.map(line => el("li", {}, line)));
$("notes").hidden = !D.warnings.length; $("notes").open = D.warnings.length < 3 || Boolean(D.notes);
$("notes-title").textContent = D.notes ?? (D.warnings.length > 1 ? `${D.warnings.length} things to know about these numbers` : "What to know about these numbers");
$("tiles").style.setProperty("--across", Math.ceil(D.tiles.length / Math.ceil(D.tiles.length / 6)));
$("lines").append(...D.lines.map(line => el("li", {}, line)));
$("tiles").append(...D.tiles.map(t => el("div", {class: "tile"}, el("b", {class: t.status}, t.value), el("span", {}, t.label))));
$("says").hidden = !D.lines.length && !D.tiles.length;
$("command").textContent = D.command; $("config").textContent = D.config;
for (const [name, value] of D.facts) $("facts").append(el("dt", {}, name), el("dd", {}, value));
const options = {};
for (const q of quantities) (options[D.quantities[q].group] ??= []).push(el("option", {value: q}, D.quantities[q].label));
for (const [name, list] of Object.entries(options)) $("quantity").append(el("optgroup", {label: name}, ...list));
$("quantity").onchange = event => { S.q = event.target.value; S.scale = ""; S.zoom = null; show() };
for (const name of ["scale", "seeds", "rows"]) document.querySelectorAll(`[data-${name}]`).forEach(b => b.onclick = () => { S[name] = b.dataset[name]; show() });
document.querySelectorAll("[data-mode]").forEach(b => b.onclick = () => { S.job = b.dataset.mode === "all" ? null : S.job ?? 0; show() });
for (const id of ["relative", "fit", "share"]) $(id).onclick = () => { S[id] = !S[id]; if (id === "share") S.zoom = null; show() };
$("relative").hidden = !(kinds > 1 && curves.some(c => c.name === "random"));
$("seeds").hidden = !curves.some(c => c.count > 1 || c.name === "theory");
document.querySelector('[data-seeds="lines"]').hidden = !curves.some(c => c.seeds);
$("share").hidden = depths.size < 2;
const noun = D.noun ?? "job";
$("jobs-title").textContent = noun[0].toUpperCase() + noun.slice(1) + "s";
document.querySelector("[data-mode=all]").textContent = `all ${noun}s`;
$("jobbar").hidden = !several; $("jobs").hidden = !D.table;
$("jobname").append(...D.jobs.map((job, i) => el("option", {value: i}, job.label)));
$("jobname").onchange = event => { S.job = +event.target.value; show() };
$("job").max = D.jobs.length - 1;
$("job").oninput = event => { S.job = +event.target.value; show() };
$("closer").onclick = () => closer(.5); $("wider").onclick = () => closer(2); $("whole").onclick = () => zoom(null);
$("theme").onclick = () => {
  const root = document.documentElement, now = root.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
  root.dataset.theme = now === "dark" ? "light" : "dark";
};
$("copy").onclick = async () => {
  try { await navigator.clipboard.writeText(D.command) } catch { getSelection().selectAllChildren($("command")); document.execCommand("copy") }
  $("copy").textContent = "copied";
};
$("svg").onclick = () => {
  const from = $("plot").querySelector("svg"), copy = from.cloneNode(true), now = [...from.querySelectorAll("*")];
  [...copy.querySelectorAll("*")].forEach((e, i) => { const style = getComputedStyle(now[i]); for (const name of ["fill", "stroke", "stroke-width", "stroke-dasharray", "opacity", "font-size", "font-family"]) e.style.setProperty(name, style.getPropertyValue(name)) });
  copy.setAttribute("xmlns", NS);
  el("a", {href: "data:image/svg+xml," + encodeURIComponent(new XMLSerializer().serializeToString(copy)), download: `${S.q}.svg`}).click();
};
show();
new ResizeObserver(() => { if (chart && chart.W !== Math.max(280, $("plot").clientWidth)) draw() }).observe($("plot"));
