// The page of one code: its causes, effects and estimates, from the data block of the page.
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const KINDS = {
  diagnosis: "diagnosis", procedure: "procedure",
  previous_medication: "medication before", medication: "medication",
};
const MOST_RESULTS = 30, MOST_DRAWN = 8, MOST_EFFECTS = 20;
const nodes = data.nodes.map((name, id) => {
  const cut = name.indexOf("/"), code = name.slice(cut + 1);
  return {
    id, name, kind: name.slice(0, cut), code, key: plain(code),
    bare: plain(code.slice(code.indexOf(":") + 1)), causes: [], effects: [], lines: [],
  };
});
const byName = new Map(nodes.map((node) => [node.name, node]));
const edges = data.edges.source.map((source, i) => ({
  source: nodes[source], target: nodes[data.edges.target[i]], directed: data.edges.directed[i],
  strength: data.edges.strength[i], stability: data.edges.stability[i],
  support: data.edges.support[i],
}));
for (const edge of edges) {
  edge.source[edge.directed ? "effects" : "lines"].push(edge);
  edge.target[edge.directed ? "causes" : "lines"].push(edge);
}
const stronger = (a, b) => (b.strength ?? -1) - (a.strength ?? -1) || b.support - a.support;
for (const node of nodes) for (const part of ["causes", "effects", "lines"]) node[part].sort(stronger);
const estimates = new Map();
data.effects.code.forEach((code, i) => {
  const pair = { code: nodes[code], medication: nodes[data.effects.medication[i]] };
  for (const part of ["effect", "low", "high", "minimum", "maximum", "support"]) {
    pair[part] = data.effects[part][i];
  }
  for (const end of [pair.code, pair.medication]) {
    if (!estimates.has(end)) estimates.set(end, []);
    estimates.get(end).push(pair);
  }
});

function plain(text) { return text.toUpperCase().replaceAll(".", "").trim(); }
function degree(node) { return node.causes.length + node.effects.length + node.lines.length; }
function address(node) { return "#" + encodeURIComponent(node.name); }
function counted(number, one) {
  return `${number.toLocaleString("en")} ${one}${number === 1 ? "" : "s"}`;
}

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

// The namespace of drawings, asked of the parser: a page without addresses cannot load from one.
const drawings = new DOMParser().parseFromString("<svg></svg>", "text/html")
  .querySelector("svg").namespaceURI;

function shape(tag, attributes = {}, ...children) {
  const made = document.createElementNS(drawings, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

function link(node) {
  return element("a", { href: address(node) }, node.code);
}

function table(caption, columns, rows) {
  const head = columns.map(([title, style]) => element("th", { scope: "col", class: style }, title));
  const body = rows.map((row) => element("tr", {}, ...row.map((content, i) =>
    element("td", { class: columns[i][1] }, ...[content].flat()))));
  return element("table", { "aria-label": caption },
    element("thead", {}, element("tr", {}, ...head)), element("tbody", {}, ...body));
}

function part(title, note, content) {
  const made = element("div", {}, element("h3", {}, title));
  if (note) made.append(element("p", { class: "faint" }, note));
  if (content) made.append(content);
  return made;
}

function edgeTable(title, list, end) {
  if (!list.length) return part(title, "None.");
  const columns = [["Code", ""], ["Strength", ""], ["Stability", ""], ["Visits", ""]];
  const rows = list.map((edge) => {
    const other = end(edge);
    return [
      [link(other), element("span", { class: "faint" }, KINDS[other.kind])],
      edge.strength === null ? "–" : edge.strength.toFixed(1),
      edge.stability === null ? "–" : edge.stability.toFixed(2),
      edge.support.toLocaleString("en"),
    ];
  });
  return part(`${title} (${list.length})`, "", table(title, columns, rows));
}

function signed(scaled) {
  return (scaled < 0 ? "−" : "+") + (Math.abs(scaled) / data.effects.scale).toFixed(3);
}

function range(pair) {
  if (pair.minimum === pair.maximum) return [];
  const text = `${signed(pair.minimum)} to ${signed(pair.maximum)} over the class`;
  return [element("span", { class: "faint" }, text)];
}

function intervalBar(pair, widest) {
  const x = (value) => 50 + 48 * value / widest;
  return shape("svg", { viewBox: "0 0 100 12", width: "100", height: "12", "aria-hidden": "true" },
    shape("line", { x1: 50, x2: 50, y1: 0, y2: 12, class: "zero" }),
    shape("line", { x1: x(pair.low), x2: x(pair.high), y1: 6, y2: 6, class: "bar" }),
    shape("circle", { cx: x(pair.effect), cy: 6, r: 3, class: "dot" }));
}

function effectTable(node) {
  const ofCode = node.kind !== "medication";
  const title = ofCode ? "Effects on medications" : "Codes with an effect on it";
  const list = (estimates.get(node) ?? []).slice()
    .sort((a, b) => Math.abs(b.effect) - Math.abs(a.effect)).slice(0, MOST_EFFECTS);
  if (!list.length) return part(title, "None with enough visits.");
  const widest = Math.max(1, ...list.map((pair) => Math.max(Math.abs(pair.low), Math.abs(pair.high))));
  const columns = [
    [ofCode ? "Medication" : "Code", ""], ["Effect", ""], ["95 % interval", "interval"],
    ["", "wide"], ["Visits", ""],
  ];
  const rows = list.map((pair) => {
    const other = ofCode ? pair.medication : pair.code;
    const name = ofCode ? [link(other)]
      : [link(other), element("span", { class: "faint" }, KINDS[other.kind])];
    return [
      name, signed(pair.effect), [`${signed(pair.low)} to ${signed(pair.high)}`, ...range(pair)],
      intervalBar(pair, widest), pair.support.toLocaleString("en"),
    ];
  });
  const which = list.length < MOST_EFFECTS ? `all ${list.length}` : `the ${list.length} largest`;
  const note = `Differences of probabilities, ${data.effects.estimator.replaceAll("_", " ")}; ` +
    `${which} that have enough visits.`;
  return part(title, note, table(title, columns, rows));
}

function box(node, x, y, width, current) {
  const longest = Math.max(3, Math.floor((width - 10) / 7.2));
  const label = node.code.length > longest ? node.code.slice(0, longest - 1) + "…" : node.code;
  const rounded = node.kind === "procedure" ? 12 : 3;
  const drawn = [
    shape("title", {}, `${KINDS[node.kind]} ${node.code}`),
    shape("rect", { x, y: y - 13, width, height: 26, rx: rounded, class: `node ${node.kind}` }),
    shape("text", { x: x + width / 2, y: y + 4, "text-anchor": "middle",
      "font-weight": current ? "bold" : "normal" }, label),
  ];
  // The tables below hold the same links for the keyboard.
  return current ? shape("g", {}, ...drawn)
    : shape("a", { href: address(node), tabindex: "-1" }, ...drawn);
}

function drawing(node) {
  const width = Math.max(280, Math.min(document.getElementById("view").clientWidth, 900));
  const wide = Math.min(150, (width - 70) / 3), row = 36;
  const left = node.causes.slice(0, MOST_DRAWN), right = node.effects.slice(0, MOST_DRAWN);
  const lines = node.lines.slice(0, MOST_DRAWN);
  const half = Math.ceil(lines.length / 2), above = lines.slice(0, half), below = lines.slice(half);
  const rows = Math.max(left.length, right.length, 1 + 2 * Math.max(above.length, below.length));
  const height = rows * row + 8, middle = height / 2, start = (width - wide) / 2;
  const strongest = Math.max(1, ...[...left, ...right, ...lines].map((edge) => edge.strength ?? 1));
  const picture = shape("svg", {
    viewBox: `0 0 ${width} ${height}`, height, role: "img",
    "aria-label": `${node.code} with ${counted(left.length, "cause")}, ` +
      `${counted(right.length, "effect")} and ${counted(lines.length, "neighbour")} without direction`,
  });
  picture.append(shape("defs", {}, shape("marker", { id: "head", viewBox: "0 0 8 8", refX: 7, refY: 4,
    markerWidth: 8, markerHeight: 8, markerUnits: "userSpaceOnUse", orient: "auto" },
  shape("path", { d: "M0 0 L8 4 L0 8 z", class: "head" }))));
  const curve = (x1, y1, x2, y2, edge, bend = (x1 + x2) / 2) => {
    const thick = 1 + 3 * Math.sqrt(Math.max(edge.strength ?? 1, 0) / strongest);
    const path = shape("path", { class: "edge", "stroke-width": thick.toFixed(2),
      d: `M${x1} ${y1} C${bend} ${y1} ${bend} ${y2} ${x2} ${y2}` });
    if (edge.directed) path.setAttribute("marker-end", "url(#head)");
    picture.append(path);
  };
  const spread = (i, count) => middle + (i - (count - 1) / 2) * row;
  const boxes = [box(node, start, middle, wide, true)];
  left.forEach((edge, i) => {
    curve(wide, spread(i, left.length), start - 2, middle, edge);
    boxes.push(box(edge.source, 1, spread(i, left.length), wide - 1));
  });
  right.forEach((edge, i) => {
    curve(start + wide, middle, width - wide - 2, spread(i, right.length), edge);
    boxes.push(box(edge.target, width - wide - 1, spread(i, right.length), wide));
  });
  for (const [list, side] of [[above, -1], [below, 1]]) {
    list.forEach((edge, i) => {
      // Around the boxes between, on the side where the tips of arrows are not.
      const y = middle + side * (i + 1) * row, end = start + wide;
      curve(end, middle, end, y, edge, end + 10 + 8 * i);
      boxes.push(box(edge.source === node ? edge.target : edge.source, start, y, wide));
    });
  }
  picture.append(...boxes);
  return element("figure", {}, picture, legend(), element("figcaption", { class: "faint" },
    `Causes left, effects right, neighbours without direction above and below; at most ` +
    `${MOST_DRAWN} of each, the strongest; thicker is stronger.`));
}

function legend() {
  const entries = Object.entries(KINDS).map(([kind, name]) => element("span", {},
    shape("svg", { viewBox: "0 0 26 16", "aria-hidden": "true" }, shape("rect", {
      x: 2, y: 2, width: 22, height: 12, rx: kind === "procedure" ? 6 : 2, class: `node ${kind}`,
    })), " ", name));
  return element("div", { class: "legend faint" }, ...entries);
}

function overview() {
  const most = nodes.filter((node) => degree(node) && node.kind !== "medication")
    .sort((a, b) => degree(b) - degree(a)).slice(0, 15);
  const rows = most.map((node) => [
    [link(node), element("span", { class: "faint" }, KINDS[node.kind])],
    String(node.causes.length), String(node.effects.length), String(node.lines.length),
  ]);
  const columns = [["Code", ""], ["Causes", ""], ["Effects", ""], ["Undirected", ""]];
  return most.length ? part("Codes with most edges", "", table("Codes with most edges", columns, rows))
    : part("The graph has no edges", "");
}

// Draws what the address names; gives the heading of a code.
function render() {
  const view = document.getElementById("view");
  let name = "";
  try { name = decodeURIComponent(location.hash.slice(1)); } catch { /* not an address of ours */ }
  const node = byName.get(name);
  document.title = node ? `${node.code} – Causal graph` : "Causal graph";
  if (!node) {
    view.replaceChildren(...(name ? [part("No such code", name)] : []), overview());
    return null;
  }
  const title = element("h2", { tabindex: "-1" }, `${node.code} `,
    element("span", { class: "faint" }, KINDS[node.kind]));
  const parts = [edgeTable("Causes", node.causes, (edge) => edge.source)];
  if (node.kind !== "medication") {
    parts.push(edgeTable("Effects in the graph", node.effects, (edge) => edge.target));
    if (node.lines.length) {
      parts.push(edgeTable("Neighbours without direction", node.lines,
        (edge) => edge.source === node ? edge.target : edge.source));
    }
  }
  parts.push(effectTable(node));
  view.replaceChildren(title, ...(degree(node) ? [drawing(node)] : []), ...parts);
  return title;
}

function show() {
  const title = render();
  title?.focus({ preventScroll: true });
  title?.scrollIntoView({ block: "start" });
}

function search() {
  const text = document.getElementById("query").value, wanted = plain(text);
  const list = document.getElementById("results"), status = document.getElementById("found");
  if (!wanted) {
    list.replaceChildren();
    status.textContent = "";
    return;
  }
  const rank = (node) => [node.bare, node.key].includes(wanted) ? 0
    : node.bare.startsWith(wanted) || node.key.startsWith(wanted) ? 1 : 2;
  const hits = nodes.filter((node) => node.key.includes(wanted))
    .map((node) => [rank(node), -degree(node), node])
    .sort((a, b) => a[0] - b[0] || a[1] - b[1] || a[2].id - b[2].id);
  status.textContent = hits.length > MOST_RESULTS
    ? `${counted(hits.length, "code")}, the first ${MOST_RESULTS} are listed`
    : counted(hits.length, "code");
  list.replaceChildren(...hits.slice(0, MOST_RESULTS).map(([, , node]) => element("li", {},
    element("a", { href: address(node) }, `${node.code} `, element("span", { class: "faint" },
      `${KINDS[node.kind]}, ${counted(degree(node), "edge")}`)))));
}

function step(event) {
  if (event.key !== "ArrowDown" && event.key !== "ArrowUp") return;
  const stops = [document.getElementById("query"), ...document.querySelectorAll("#results a")];
  const at = stops.indexOf(document.activeElement);
  const next = stops[at + (event.key === "ArrowDown" ? 1 : -1)];
  if (at < 0 || !next) return;
  event.preventDefault();
  next.focus();
}

document.getElementById("summary").textContent = data.summary;
document.getElementById("query").addEventListener("input", search);
document.querySelector("form").addEventListener("keydown", step);
document.querySelector("form").addEventListener("submit", (event) => {
  event.preventDefault();
  document.querySelector("#results a")?.click();
});
document.getElementById("results").addEventListener("click", () => {
  document.getElementById("query").value = "";
  search();
});
let width = innerWidth;
addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; render(); } });
addEventListener("hashchange", show);
render();
