// Draws the page of `mdkv inspect` from the JSON block that Python put in it.
"use strict";
const $ = id => document.getElementById(id);
const data = JSON.parse($("data").textContent);
const cells = Uint8Array.from(atob(data.cells), c => c.charCodeAt(0));
const count = data.tokens.length, rows = data.layers * data.heads, kinds = data.formatNames.length;
const marked = new Set(data.marked);
// First and last token of each marked place.
const runs = [];
for (const t of data.marked) runs.length && runs.at(-1)[1] === t - 1 ? runs.at(-1)[1]++ : runs.push([t, t]);
const percent = (x, digits = 1) => (100 * x).toFixed(digits) + " %";

// What each token keeps: how many rows hold it in which format, and the mean share of its bytes.
const held = new Uint32Array(count * kinds), share = new Float64Array(count);
cells.forEach((kind, i) => { held[i % count * kinds + kind]++; share[i % count] += data.formatShares[kind] / rows; });
function totals(tokens) {
  const sums = new Array(kinds).fill(0);
  for (const t of tokens) for (let k = 0; k < kinds; k++) sums[k] += held[t * kinds + k] / (rows * tokens.length);
  return sums;
}
const everything = totals([...share.keys()]), wanted = marked.size ? totals(data.marked) : null;
const worth = sums => sums.reduce((sum, part, k) => sum + part * data.formatShares[k], 0);

function add(parent, tag, text, className) {
  const node = parent.appendChild(document.createElement(tag));
  if (text !== undefined) node.textContent = text;
  if (className) node.className = className;
  return node;
}
const visible = text => text.replace(/ /g, "␣").replace(/\r?\n/g, "↵").replace(/\t/g, "⇥");
const name = t => data.tokens[t] ? `“${visible(data.tokens[t])}”` : "(rest of the character before)";
const perFormat = t => data.formatNames.map((n, k) => `${n} ${held[t * kinds + k]}`).join("  ·  ");
const describe = t => `token ${t}  ${name(t)}  keeps ${percent(share[t])}`;

// Colours: grey for dropped, then from light to dark (dark to light at night) as bytes grow.
let theme, palette;
function readTheme() {
  const style = getComputedStyle(document.documentElement);
  const colour = n => style.getPropertyValue("--" + n).trim();
  theme = Object.fromEntries(["paper", "ink", "faint", "line", "mark"].map(n => [n, colour(n)]));
  const stops = ["cheap", "middle", "dear"].map(n => rgb(colour(n)));
  const stored = data.formatNames.filter(n => n !== "drop").length;
  let i = 0;
  palette = data.formatNames.map(n => {
    if (n === "drop") return rgb(colour("drop"));
    const at = stored > 1 ? 2 * i++ / (stored - 1) : 2, low = Math.min(1, Math.floor(at));
    return stops[low].map((c, d) => Math.round(c + (stops[low + 1][d] - c) * (at - low)));
  });
}
const rgb = hex => [1, 3, 5].map(i => parseInt(hex.slice(i, i + 2), 16));

function writeSummary() {
  document.title = `mdkv inspect: ${data.model}`;
  const settings = Object.entries(data.settings).map(([k, v]) => `${k} = ${JSON.stringify(v)}`);
  const lines = {
    "model": `${data.model} (${data.dtype})`,
    "tokens": `${count} in ${data.layers} layers × ${data.heads} KV heads`,
    "budget": percent(data.budget),
    "really held": `${percent(data.share, 2)} of the full cache's 16-bit bytes`,
    "tokens alone": `${percent(worth(everything), 2)}; page table and page ends take the rest`,
    "settings": settings.join(", ") || "the server's defaults",
  };
  for (const [term, text] of Object.entries(lines)) { add($("summary"), "dt", term); add($("summary"), "dd", text); }
  if (!data.compressed) add($("summary").parentNode, "p",
    "Not compressed: the budget, the prompt's length or the settings leave this prompt alone.");
  $("answer").textContent = data.answer || "(nothing)";
  $("full-answer").textContent = data.fullAnswer || "(nothing)";
  $("verdict").textContent = (data.answer === data.fullAnswer ? "Both are the same. " : "") +
    "The first token comes from before compression.";
  if (!wanted) return;
  // Places apart: the question often repeats the words, and the window keeps those in full.
  const dropped = data.formatNames.indexOf("drop");
  const places = runs.slice(0, 6).map(([from, to]) => {
    const sums = totals(data.marked.filter(t => from <= t && t <= to));
    return `tokens ${from} to ${to} keep ${percent(worth(sums))}` +
      (dropped < 0 ? "" : ` (dropped in ${percent(sums[dropped])} of layers and heads)`);
  });
  if (runs.length > places.length) places.push(`${runs.length - places.length} more`);
  $("found").textContent = `“${data.wanted}”: ${places.join("; ")}. ` +
    `All tokens keep ${percent(worth(everything))}.`;
  $("mark-key").hidden = $("next").hidden = false;
}
function writeFormats() {
  $("formats").replaceChildren(); $("legend").replaceChildren();
  const head = add($("formats"), "tr");
  for (const title of ["format", "bytes", "tokens", ...(wanted ? ["marked"] : [])]) add(head, "th", title);
  data.formatNames.forEach((format, k) => {
    const row = add($("formats"), "tr"), cell = add(row, "td");
    for (const place of [cell, $("legend")]) {
      add(place, "span", "", "swatch").style.background = `rgb(${palette[k]})`;
      place.append(format + (place === cell ? "" : "\u2003"));
    }
    for (const part of [data.formatShares[k], everything[k], ...(wanted ? [wanted[k]] : [])]) add(row, "td", percent(part));
  });
}

// The grid: one bitmap pixel per cell, of which the canvas shows the part scrolled to.
const grid = $("grid"), canvas = grid.querySelector("canvas"), pen = canvas.getContext("2d");
const bitmap = document.createElement("canvas");
const LEFT = 62, TOP = 24, BOTTOM = 8;
let fitted = true, width = 0, cellWidth = 1, cellHeight = 4, chosen = -1;
function paintBitmap() {
  bitmap.width = count; bitmap.height = rows;
  const image = new ImageData(count, rows);
  cells.forEach((kind, i) => image.data.set([...palette[kind], 255], 4 * i));
  bitmap.getContext("2d").putImageData(image, 0, 0);
}
function layout() {
  width = grid.clientWidth;
  const fit = (width - LEFT) / count;
  cellWidth = fitted ? fit : Math.max(fit, cellWidth);
  cellHeight = Math.max(2, Math.min(16, Math.floor(.44 * innerHeight / rows)));
  const height = TOP + rows * cellHeight + BOTTOM, ratio = devicePixelRatio || 1;
  canvas.width = width * ratio; canvas.height = height * ratio;
  canvas.style.width = width + "px"; canvas.style.height = height + "px";
  canvas.parentNode.style.width = Math.max(width, LEFT + count * cellWidth) + "px";
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  draw();
}
const left = t => LEFT + t * cellWidth - grid.scrollLeft;
function draw() {
  const bottom = TOP + rows * cellHeight, first = grid.scrollLeft / cellWidth;
  const shown = Math.min(count - first, (width - LEFT) / cellWidth);
  pen.clearRect(0, 0, width, bottom + BOTTOM);
  pen.imageSmoothingEnabled = cellWidth * devicePixelRatio < 1;
  pen.imageSmoothingQuality = "high";
  pen.drawImage(bitmap, first, 0, shown, rows, LEFT, TOP, shown * cellWidth, rows * cellHeight);
  pen.font = "11px system-ui, sans-serif"; pen.textBaseline = "middle"; pen.textAlign = "right";
  const tall = cellHeight * data.heads, every = [1, 2, 5, 10, 20, 50].find(n => n * tall >= 13) || 100;
  for (let layer = 0; layer < data.layers; layer++) {
    const y = TOP + layer * tall;
    pen.fillStyle = theme.paper;
    if (layer && tall >= 6) pen.fillRect(LEFT, y - .5, width, 1);
    pen.fillStyle = theme.faint;
    if (layer % every === 0) pen.fillText(`layer ${layer}`, LEFT - 6, y + Math.max(tall / 2, 6));
  }
  pen.save(); pen.beginPath(); pen.rect(LEFT, 0, width, bottom + BOTTOM); pen.clip();
  pen.textAlign = "left";
  const step = [1, 2, 5].flatMap(n => [n, 10 * n, 100 * n, 1e3 * n, 1e4 * n]).sort((a, b) => a - b)
    .find(n => n * cellWidth >= 60) || 1e5;
  for (let t = Math.floor(first / step) * step; t < first + shown; t += step) {
    pen.fillStyle = theme.line; pen.fillRect(left(t), 2, 1, TOP - 8);
    pen.fillStyle = theme.faint; pen.fillText(t, left(t) + 4, 9);
  }
  pen.fillStyle = theme.mark;
  for (const [from, to] of runs) {
    const x = left(from), wide = Math.max(2, (to - from + 1) * cellWidth);
    for (const y of [TOP - 5, bottom + 1]) pen.fillRect(x - 1, y, wide + 2, 5);
    for (const edge of [x - 1, x + wide]) pen.fillRect(edge, TOP - 5, 1, bottom - TOP + 10);
  }
  if (chosen >= 0) {
    pen.strokeStyle = theme.ink; pen.lineWidth = 2;
    pen.strokeRect(left(chosen) - 1, TOP - 1, Math.max(2, cellWidth) + 2, bottom - TOP + 2);
  }
  pen.restore();
}

function zoom(factor, centre = chosen >= 0 ? chosen : (grid.scrollLeft + (width - LEFT) / 2) / cellWidth) {
  const at = Math.min(Math.max(left(centre), LEFT), width);
  fitted = factor === 0;
  cellWidth = Math.min(24, cellWidth * factor);
  layout();
  grid.scrollLeft = LEFT + centre * cellWidth - at;
  fitted ||= cellWidth * count <= width - LEFT + 1;
  draw();
}

// The text, one span per token.
// Few tokens keep most of their bytes: the scale ends where differences do, and says so.
const LOST = .02;
const most = Math.min(1, Math.ceil(25 * worth(everything)) / 10);
$("most").textContent = percent(most, 0) + (most < 1 ? " and more" : "");
const spans = data.tokens.map((piece, t) => {
  const span = add($("text"), "span", piece);
  span.style.setProperty("--depth", Math.min(1, share[t] / most));
  span.classList.toggle("lost", share[t] < LOST);
  span.classList.toggle("break", piece.includes("\n"));
  span.classList.toggle("none", !piece);
  span.classList.toggle("marked", marked.has(t));
  span.dataset.token = t;
  return span;
});
const hint = "Click a token, or focus grid or text: ← → moves, + − 0 zooms, N goes to the next mark, Esc lets go.";
function choose(t, scrollText = true) {
  if (chosen >= 0) spans[chosen].classList.remove("chosen");
  chosen = t;
  $("status").textContent = t < 0 ? hint : `${describe(t)}   in layers × heads:  ${perFormat(t)}`;
  if (t >= 0) {
    spans[t].classList.add("chosen");
    const box = $("text"), top = spans[t].offsetTop - box.offsetTop;
    if (scrollText && (top < box.scrollTop || top > box.scrollTop + box.clientHeight - 30))
      box.scrollTop = top - box.clientHeight / 2;
    const x = left(t);
    if (x < LEFT || x > width - cellWidth) grid.scrollLeft = t * cellWidth - (width - LEFT) / 2;
  }
  draw();
}
function nextMark() {
  if (runs.length) choose((runs.find(run => run[0] > chosen) || runs[0])[0]);
}

function tip(event, lines) {
  const box = $("tip");
  box.style.display = lines ? "block" : "none";
  if (!lines) return;
  box.textContent = lines.join("\n");
  box.style.left = Math.max(4, Math.min(event.clientX + 14, innerWidth - box.offsetWidth - 8)) + "px";
  box.style.top = (event.clientY + 18 + box.offsetHeight > innerHeight ? event.clientY - box.offsetHeight - 10
    : event.clientY + 18) + "px";
}
function cellAt(event) {
  const box = canvas.getBoundingClientRect(), x = event.clientX - box.left, y = event.clientY - box.top;
  const token = Math.floor((x - LEFT + grid.scrollLeft) / cellWidth), row = Math.floor((y - TOP) / cellHeight);
  return x >= LEFT && token >= 0 && token < count && row >= 0 && row < rows ? { token, row } : null;
}
canvas.addEventListener("mousemove", event => {
  const at = cellAt(event);
  tip(event, at && [`layer ${Math.floor(at.row / data.heads)}  head ${at.row % data.heads}  ` +
    `${data.formatNames[cells[at.row * count + at.token]]}`, describe(at.token)]);
});
canvas.addEventListener("click", event => { const at = cellAt(event); if (at) choose(at.token); });
$("text").addEventListener("mousemove", event => {
  const t = event.target.dataset.token;
  tip(event, t && [describe(+t), perFormat(+t)]);
});
$("text").addEventListener("click", event => {
  if (event.target.dataset.token) choose(+event.target.dataset.token, false);
});
for (const node of [canvas, $("text")]) node.addEventListener("mouseleave", event => tip(event, null));
for (const node of [grid, $("text")]) node.addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const actions = {
    ArrowLeft: () => choose(Math.max(0, chosen - 1)), ArrowRight: () => choose(Math.min(count - 1, chosen + 1)),
    Home: () => choose(0), End: () => choose(count - 1), Escape: () => choose(-1),
    n: nextMark, "+": () => zoom(1.6), "=": () => zoom(1.6), "-": () => zoom(1 / 1.6), 0: () => zoom(0),
  };
  const action = actions[event.key] || actions[event.key.toLowerCase()];
  if (action) { event.preventDefault(); action(); }
});
grid.addEventListener("wheel", event => {
  if (!event.ctrlKey) return;
  event.preventDefault();
  const at = cellAt(event);
  zoom(event.deltaY < 0 ? 1.25 : .8, at ? at.token : undefined);
}, { passive: false });
grid.addEventListener("scroll", draw);
$("in").onclick = () => zoom(1.6); $("out").onclick = () => zoom(1 / 1.6); $("fit").onclick = () => zoom(0);
$("next").onclick = nextMark;

function show() { readTheme(); writeFormats(); paintBitmap(); layout(); }
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", show);
new ResizeObserver(layout).observe(grid);
writeSummary(); show(); choose(-1);
