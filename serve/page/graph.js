// The interaction graph: medications on two arcs, so that no label lies on another, and a curve
// for each interacting pair.

const SVG = "http://www.w3.org/2000/svg";
const ROW = 26;
const NARROW = 520;
const GAP = 10; // between a node and its label

/**
 * Draws into an element, again whenever its width changes.
 * @param nodes [{key, code, name, taken}]
 * @param pairs [{first, second, taken}], keys of nodes
 * @param summary what it shows, in words
 */
export function draw(container, nodes, pairs, summary) {
  let width = 0;
  new ResizeObserver(() => {
    if (container.clientWidth === width || container.clientWidth === 0) return;
    width = container.clientWidth;
    container.replaceChildren(drawn(nodes, pairs, summary, width));
    fit(container.querySelector("svg"));
  }).observe(container);
}

/** Marks a node, its pairs and their other ends, and lets the rest fade; null: nothing. */
export function mark(container, key) {
  const svg = container.querySelector("svg");
  if (svg === null) return;
  const joined = new Set([key]);
  for (const edge of svg.querySelectorAll(".pair")) {
    const ends = [edge.dataset.first, edge.dataset.second];
    const on = ends.includes(key);
    edge.classList.toggle("on", on);
    if (on) ends.forEach((end) => joined.add(end));
  }
  const known = [...svg.querySelectorAll(".node")].some((node) => node.dataset.key === key);
  svg.classList.toggle("marked", known);
  for (const node of svg.querySelectorAll(".node")) {
    node.classList.toggle("on", known && joined.has(node.dataset.key));
  }
}

function shape(tag, attributes, text) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = text;
  return node;
}

function drawn(nodes, pairs, summary, width) {
  const right = Math.ceil(nodes.length / 2);
  const height = (right + 1) * ROW;
  const places = new Map(
    nodes.map((node, i) => [node.key, placed(i, nodes.length, width, height)]),
  );
  const svg = shape("svg", {
    viewBox: `0 0 ${width} ${height}`,
    height,
    role: "img",
    "aria-label": summary,
  });
  for (const pair of pairs) {
    const [a, b] = [places.get(pair.first), places.get(pair.second)];
    const edge = shape("path", {
      class: pair.taken ? "pair taken" : "pair",
      d: `M${a.x} ${a.y}Q${bent(a.x, b.x, width / 2)} ${bent(a.y, b.y, height / 2)} ${b.x} ${b.y}`,
    });
    Object.assign(edge.dataset, { first: pair.first, second: pair.second });
    svg.append(edge);
  }
  for (const node of nodes) {
    const { x, y, side } = places.get(node.key);
    const group = shape("g", { class: node.taken ? "node taken" : "node" });
    group.dataset.key = node.key;
    const label = shape(
      "text",
      { x: x + GAP * side, y: y + 4.5, "text-anchor": side > 0 ? "start" : "end" },
      labelled(node, width),
    );
    label.dataset.room = (side > 0 ? width - x : x) - GAP;
    group.append(shape("title", {}, node.name ? `${node.code} ${node.name}` : node.code));
    group.append(shape("circle", { cx: x, cy: y, r: 6 }), label);
    svg.append(group);
  }
  return svg;
}

/** Where a node lies: down the right arc, then up the left one. */
function placed(i, number, width, height) {
  const right = Math.ceil(number / 2);
  const side = i < right ? 1 : -1;
  const rows = side > 0 ? right : number - right;
  const row = side > 0 ? i : number - 1 - i;
  const y = (height * (row + 1)) / (rows + 1);
  const reach = width < NARROW ? width * 0.28 : Math.min(width * 0.22, 170);
  const share = (y - height / 2) / (height / 2);
  return { x: width / 2 + side * reach * (0.35 + 0.65 * Math.sqrt(1 - share * share)), y, side };
}

function bent(a, b, centre) {
  return 0.5 * centre + 0.25 * (a + b);
}

function labelled(node, width) {
  return width < NARROW || !node.name ? node.code : `${node.code} ${node.name}`;
}

/** Shortens the labels that would leave the drawing; it must be shown, or nothing has a length. */
function fit(svg) {
  for (const label of svg.querySelectorAll("text")) {
    const room = Number(label.dataset.room);
    let text = label.textContent;
    for (
      let length = label.getComputedTextLength();
      length > room && text.length > 1;
      length = label.getComputedTextLength()
    ) {
      text = text.slice(0, Math.min(text.length - 1, Math.floor((text.length * room) / length)));
      label.textContent = `${text.trimEnd()}…`;
    }
  }
}
