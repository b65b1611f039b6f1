// Elements and how codes and numbers are written. Text only ever becomes text, never HTML.

export const KINDS = ["diagnosis", "procedure", "medication", "laboratory"];

/** Makes an element; attributes that start with "on" are listeners, those of null are left out. */
export function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

/** "91.2 %"; what is not quite 0 or 100 is not written so. */
export function percent(share) {
  const whole = 100 * share;
  if (whole > 0 && whole < 0.05) return "< 0.1 %";
  if (whole < 100 && whole >= 99.95) return "> 99.9 %";
  return `${whole.toFixed(1)} %`;
}

/** A number with its sign. */
export function signed(number, digits) {
  return `${number < 0 ? "−" : "+"}${Math.abs(number).toFixed(digits)}`;
}

/** "the current visit", "1 visit before", … from a position in the request. */
export function visitName(position, number) {
  const before = number - 1 - position;
  if (before === 0) return "current visit";
  return before === 1 ? "1 visit before" : `${before} visits before`;
}

/** A code with its name, where it has one. */
export function titled(code, name) {
  return element(
    "span",
    { class: "titled" },
    element("span", { class: "name" }, name ?? code),
    name === null ? null : element("span", { class: "code" }, code),
  );
}
