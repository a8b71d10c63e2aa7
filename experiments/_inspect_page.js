"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const make = (tag, className, text) => {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
};
const svg = (tag, attributes) => {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  return node;
};
const number = (x, digits = 3) => (x === null || x === undefined ? "–" : x.toFixed(digits).replace(/^-(0\.0+)$/, "$1"));
const LABELS = { own: "model", contiguous: "contiguous", random: "random", kmeans: "k-means", gumbel: "gumbel" };

const asked = new URLSearchParams(location.hash.slice(1));
const pick = (list, key, value) => Math.max(0, list.findIndex((x) => String(x[key]) === String(value)));
const state = { layer: pick(data.layers, "layer", asked.get("layer") ?? data.layer), window: 0, name: null, pinned: null };
state.window = pick(data.layers[state.layer].windows, "window", asked.get("window") ?? data.window);
state.name = asked.get("grouping");
let tokens = [], marks = [], chips = [], view, cursor, plot;

const hue = (grouping, group, groups) => (360 * grouping.hue[group]) / groups + 20;
function paint(node, group) {
  // Alike groups have neighbouring hues; every second one is a shade darker.
  const layer = data.layers[state.layer];
  node.style.setProperty("--h", hue(view, group, layer.groups).toFixed(1));
  node.style.setProperty("--l", view.hue[group] % 2 ? ".86" : ".925");
  return node;
}

function drawText() {
  const layer = data.layers[state.layer], start = layer.windows[state.window].window * layer.window_size;
  const box = $("text");
  box.replaceChildren();
  tokens = [];
  let line = null;
  view.index.forEach((group, i) => {
    const at = start + i - data.start;
    const [glyph, kind] = [data.glyphs[at], data.kinds[at]];
    if (!line) {
      const row = box.appendChild(make("div", "line"));
      row.append(make("i", "", String(start + i)));
      line = row.appendChild(make("span"));
    }
    const node = paint(make("span", `t group is-${kind}`, glyph), group);
    tokens.push(node);
    node.dataset.i = i;
    line.append(node);
    if (kind === "n") line = null;
  });
}

function drawChips() {
  const layer = data.layers[state.layer];
  const box = $("chips");
  box.replaceChildren();
  chips = Array.from({ length: layer.groups }, (_, group) => {
    const node = paint(make("button", "group", String(group)), group);
    node.title = `group ${group}`;
    node.dataset.g = group;
    return box.appendChild(node);
  });
}

function drawMap() {
  const layer = data.layers[state.layer], window = layer.windows[state.window];
  const box = $("map"), width = Math.max(200, box.clientWidth);
  const left = 26, right = 6, top = 4, bottom = 20;
  const row = Math.max(4, Math.min(12, 320 / layer.groups)), height = row * layer.groups;
  const step = (width - left - right) / layer.window_size;
  plot = { left, top, row, step };
  const root = svg("svg", { height: top + height + bottom, viewBox: `0 0 ${width} ${top + height + bottom}`, role: "img" });
  root.append(Object.assign(svg("title", {}), { textContent: "Group of each position of the window" }));
  const every = Math.max(1, Math.ceil(14 / row));
  for (let g = 0; g < layer.groups; g += every) {
    const y = top + (g + 0.5) * row;
    root.append(Object.assign(svg("text", { x: left - 6, y: y + 4, "text-anchor": "end" }), { textContent: g }));
    root.append(svg("line", { class: "axis", x1: left, x2: width - right, y1: y, y2: y }));
  }
  const start = window.window * layer.window_size;
  for (const part of [0, 0.25, 0.5, 0.75, 1]) {
    const at = Math.round(part * layer.window_size);
    const anchor = part === 0 ? "start" : part === 1 ? "end" : "middle";
    root.append(Object.assign(svg("text", { x: left + at * step, y: top + height + 15, "text-anchor": anchor }),
      { textContent: start + at }));
  }
  marks = view.index.map((group, i) => {
    const gap = row > 5 ? 1 : 0;
    const mark = paint(svg("rect", { class: "m", x: left + i * step, y: top + group * row + gap, width: Math.max(step, 1.2), height: row - 2 * gap }), group);
    return root.appendChild(mark);
  });
  cursor = root.appendChild(svg("line", { class: "cursor", y1: top, y2: top + height, x1: -9, x2: -9 }));
  box.replaceChildren(root);
}

const ROWS = [
  ["inside", "coherence inside", 1], ["between", "coherence between", 0], ["silhouette", "silhouette", 1],
  ["class ami", `${data.class_title}: AMI`, 1], ["class homogeneity", `${data.class_title}: purity`, 1],
  ["block ami", `${data.block_title}: AMI`, 1], ["block homogeneity", `${data.block_title}: purity`, 1],
];
function drawMetrics() {
  const layer = data.layers[state.layer], window = layer.windows[state.window];
  const whole = $("scope").value === "all", names = Object.keys(window.groupings);
  const source = (name) => (whole ? layer.means[name] : window.groupings[name].metrics);
  const table = $("table");
  table.replaceChildren();
  const head = table.createTHead().insertRow();
  head.append(make("th", "", ""));
  for (const name of names) head.append(make("th", name === layer.own ? "own" : "", LABELS[name] ?? name));
  const body = table.createTBody();
  for (const [key, title, better] of ROWS) {
    const row = body.insertRow();
    row.append(make("th", "", title));
    const values = names.map((name) => source(name)[key] ?? null);
    const best = better ? Math.max(...values.map((x) => x ?? -Infinity)) : null;
    names.forEach((name, i) => {
      const cell = make("td", name === layer.own ? "own" : "", number(values[i]));
      if (values[i] !== null && values[i] === best) cell.classList.add("best");
      row.append(cell);
    });
  }
  const row = body.insertRow();
  row.append(make("th", "", "prototype use, all text"));
  for (const name of names) row.append(make("td", name === layer.own ? "own" : "", name === layer.own ? number(layer.use) : "–"));
}

function drawCard(group) {
  const layer = data.layers[state.layer], window = layer.windows[state.window];
  const card = $("card"), start = window.window * layer.window_size;
  card.replaceChildren();
  if (group === null) {
    const sizes = Array(layer.groups).fill(0);
    for (const g of view.index) sizes[g]++;
    card.append(make("h2", "", "No group chosen"));
    card.append(make("p", "hint", "Point at a token, a number or the map to see a group; click to keep it."));
    facts(card, [["groups", `${sizes.filter(Boolean).length} of ${layer.groups} used`],
      ["sizes", `${Math.min(...sizes)} to ${Math.max(...sizes)} tokens, at most ${layer.slots[state.name]}`]]);
    return;
  }
  const members = view.index.flatMap((g, i) => (g === group ? [i] : []));
  const title = card.appendChild(make("h2"));
  title.append(paint(make("span", "swatch group"), group), make("span", "", `Group ${group}`));
  if (state.pinned === group) title.append(make("span", "hint", "kept, click again to release"));
  const counts = new Map();
  for (const i of members) {
    const name = data.names[data.classes[start + i - data.start]];
    counts.set(name, (counts.get(name) ?? 0) + 1);
  }
  const common = [...counts].sort((a, b) => b[1] - a[1]).slice(0, 3);
  const near = view.nearest[group];
  facts(card, [
    ["size", `${members.length} of ${layer.window_size} tokens, at most ${layer.slots[state.name]}`],
    ["coherence", number(view.coherence[group])],
    ["most like", near === null ? "–" : `group ${near}, cosine ${number(view.nearness[group])}`],
    ["holds", common.map(([name, n]) => `${name} ${Math.round((100 * n) / members.length)}%`).join(", ") || "nothing"],
  ]);
  const box = card.appendChild(make("div", "members"));
  const piece = (from, to) => data.glyphs
    .slice(start - data.start + Math.max(0, from), start - data.start + Math.min(layer.window_size, to))
    .join("").replaceAll(" ", "\u00a0");
  for (let i = 0; i < members.length; ) {
    let end = i + 1;
    while (end < members.length && members[end] === members[end - 1] + 1) end++;
    const first = members[i], last = members[end - 1] + 1;
    const run = box.appendChild(make("span"));
    run.title = `position ${start + first}`;
    run.append(make("i", "", piece(first - 4, first)), paint(make("b", "group", piece(first, last)), group),
      make("i", "", piece(last, last + 4)));
    i = end;
  }
}

function facts(card, pairs) {
  const list = card.appendChild(make("dl", "facts"));
  for (const [term, value] of pairs) list.append(make("dt", "", term), make("dd", "", value));
}

let shown = null, here = null;
function light(group, at = null) {
  if (here !== null && tokens[here]) tokens[here].classList.remove("here");
  here = at;
  if (at !== null) tokens[at].classList.add("here");
  if (cursor) {
    const x = at === null ? -9 : plot.left + (at + 0.5) * plot.step;
    cursor.setAttribute("x1", x);
    cursor.setAttribute("x2", x);
  }
  if (group === shown) return;
  shown = group;
  const lit = group !== null;
  $("reading").classList.toggle("lit", lit);
  $("map").firstChild.classList.toggle("lit", lit);
  view.index.forEach((g, i) => {
    tokens[i].classList.toggle("on", lit && g === group);
    marks[i].classList.toggle("on", lit && g === group);
  });
  chips.forEach((chip, g) => chip.classList.toggle("on", lit && g === group));
  drawCard(group);
}
function pin(group) {
  state.pinned = state.pinned === group ? null : group;
  shown = undefined;
  light(state.pinned ?? group);
}
const rest = () => light(state.pinned);

function redraw() {
  const layer = data.layers[state.layer], window = layer.windows[state.window];
  if (!window.groupings[state.name]) state.name = layer.own;
  view = window.groupings[state.name];
  if (state.pinned !== null && state.pinned >= layer.groups) state.pinned = null;
  $("windows").replaceChildren(...layer.windows.map((w, i) => new Option(
    `${w.window} (bytes ${w.window * layer.window_size}–${(w.window + 1) * layer.window_size - 1})`, i, false, i === state.window)));
  $("names").replaceChildren(...Object.keys(window.groupings).map((name) => {
    const button = make("button", "", (LABELS[name] ?? name) + (name === layer.own ? " (model)" : ""));
    button.setAttribute("aria-pressed", name === state.name);
    button.onclick = () => { state.name = name; redraw(); };
    return button;
  }));
  $("before").disabled = state.window === 0;
  $("after").disabled = state.window === layer.windows.length - 1;
  $("scope").options[1].text = `mean of ${layer.windows.length} windows`;
  drawText();
  drawChips();
  drawMap();
  drawMetrics();
  shown = undefined;
  here = null;
  light(state.pinned);
}

function moveTo(layer, window) {
  const size = data.layers[state.layer].window_size, at = data.layers[state.layer].windows[state.window].window * size;
  state.layer = layer;
  const next = data.layers[layer];
  // Another layer shows the same part of the text, as far as it has it.
  state.window = window ?? pick(next.windows, "window", Math.floor(at / next.window_size));
  redraw();
}

const layers = $("layers");
layers.replaceChildren(...data.layers.map((l, i) => new Option(`${l.layer} (${l.own}, ${l.groups} groups of about ${l.group_size})`, i, false, i === state.layer)));
layers.onchange = () => moveTo(Number(layers.value));
$("windows").onchange = (event) => moveTo(state.layer, Number(event.target.value));
$("before").onclick = () => moveTo(state.layer, state.window - 1);
$("after").onclick = () => moveTo(state.layer, state.window + 1);
$("scope").onchange = drawMetrics;

const text = $("text");
const tokenOf = (event) => (event.target.dataset && event.target.dataset.i !== undefined ? Number(event.target.dataset.i) : null);
text.addEventListener("mouseover", (event) => {
  const i = tokenOf(event);
  if (i !== null) light(state.pinned ?? view.index[i], i);
});
text.addEventListener("mouseleave", rest);
text.addEventListener("click", (event) => { const i = tokenOf(event); if (i !== null) pin(view.index[i]); });

const chipBox = $("chips");
const chipOf = (event) => (event.target.dataset.g === undefined ? null : Number(event.target.dataset.g));
for (const kind of ["mouseover", "focusin"]) chipBox.addEventListener(kind, (event) => { const g = chipOf(event); if (g !== null) light(state.pinned ?? g); });
for (const kind of ["mouseleave", "focusout"]) chipBox.addEventListener(kind, rest);
chipBox.addEventListener("click", (event) => { const g = chipOf(event); if (g !== null) pin(g); });

function mapPlace(event) {
  const layer = data.layers[state.layer], box = $("map").firstChild.getBoundingClientRect();
  const group = Math.floor((event.clientY - box.top - plot.top) / plot.row);
  if (group < 0 || group >= layer.groups) return null;
  const x = (event.clientX - box.left - plot.left) / plot.step - 0.5;
  let nearest = null;
  view.index.forEach((g, i) => { if (g === group && (nearest === null || Math.abs(i - x) < Math.abs(nearest - x))) nearest = i; });
  return [group, nearest];
}
$("map").addEventListener("mousemove", (event) => { const at = mapPlace(event); if (at) light(state.pinned ?? at[0], state.pinned === null ? at[1] : null); else rest(); });
$("map").addEventListener("mouseleave", rest);
$("map").addEventListener("click", (event) => { const at = mapPlace(event); if (at) pin(at[0]); });
document.addEventListener("keydown", (event) => { if (event.key === "Escape") { state.pinned = null; light(null); } });
let width = $("map").clientWidth;
new ResizeObserver(() => { if ($("map").clientWidth !== width) { width = $("map").clientWidth; drawMap(); shown = undefined; rest(); } }).observe($("map"));
redraw();
if (asked.get("group") !== null) pin(Number(asked.get("group")));
