// A combobox that searches the model's vocabulary (WAI-ARIA's pattern: the list's active option is
// announced while the focus stays in the field).

import { element } from "./dom.js";

const LIMIT = 30;
const WAIT_MS = 150;
const NONE = "No such code. A code the model does not know can be given as icd9:428.0";
const SYSTEM_OF = { atc: ["medication"], lab: ["laboratory"] };

let made = 0;

/**
 * Makes the field.
 * @param label what it is for, to be read out
 * @param ask (query, kind) => Promise of [{kind, system, code, name}]; kind may be ""
 * @param add called with the code that was picked
 * @param say reads a sentence out
 */
export function searchField(label, ask, add, say) {
  made += 1;
  const id = `search-${made}`;
  const state = { options: [], active: -1, asked: 0, timer: 0 };
  const kind = element(
    "select",
    { "aria-label": `${label}: kind` },
    ...[
      ["", "all kinds"],
      ["diagnosis", "diagnoses"],
      ["procedure", "procedures"],
      ["medication", "medications"],
      ["laboratory", "laboratory"],
    ].map(([value, text]) => element("option", { value }, text)),
  );
  const list = element("ul", {
    id: `${id}-list`,
    role: "listbox",
    "aria-label": `${label}: codes found`,
    hidden: "",
  });
  const input = element("input", {
    id,
    role: "combobox",
    "aria-label": label,
    "aria-autocomplete": "list",
    "aria-expanded": "false",
    "aria-controls": list.id,
    spellcheck: "false",
    autocomplete: "off",
    enterkeyhint: "done",
    placeholder: "Search a code or name",
  });

  function close() {
    state.asked += 1;
    clearTimeout(state.timer);
    state.options = [];
    list.replaceChildren();
    list.hidden = true;
    input.setAttribute("aria-expanded", "false");
    input.removeAttribute("aria-activedescendant");
  }

  function activate(position) {
    state.active = position;
    [...list.children].forEach((option, i) =>
      option.setAttribute("aria-selected", String(i === position)),
    );
    input.setAttribute("aria-activedescendant", `${id}-${position}`);
    list.children[position].scrollIntoView({ block: "nearest" });
  }

  function pick(position) {
    const code = state.options[position];
    input.value = "";
    close();
    add(code);
  }

  function show(options) {
    state.options = options;
    list.replaceChildren(
      ...options.map((code, i) =>
        element(
          "li",
          {
            id: `${id}-${i}`,
            role: "option",
            "aria-selected": "false",
            // Before the field loses the focus, which closes the list.
            onpointerdown: (event) => event.preventDefault(),
            onclick: () => pick(i),
          },
          element("span", { class: `kind ${code.kind}` }, code.kind),
          element("span", { class: "code" }, `${code.system}:${code.code}`),
          element(
            "span",
            { class: "name" },
            code.typed ? "as typed; the model may not know it" : (code.name ?? ""),
          ),
        ),
      ),
    );
    if (options.length === 0)
      list.append(
        element(
          "li",
          { class: "none", role: "option", "aria-disabled": "true", "aria-selected": "false" },
          NONE,
        ),
      );
    say(
      options.length === 0
        ? NONE
        : options.length === 1
          ? "1 code found"
          : `${options.length} codes found`,
    );
    list.hidden = false;
    input.setAttribute("aria-expanded", "true");
    if (options.length > 0) activate(0);
    else input.removeAttribute("aria-activedescendant");
  }

  /** Searches what is typed; all codes if that is nothing and `browses`. */
  async function look(browses = false) {
    state.asked += 1;
    const mine = state.asked;
    const query = input.value.trim();
    if (query === "" && !browses) return close();
    const typed = asTyped(query, kind.value);
    const found = await ask(query, kind.value, LIMIT);
    if (mine !== state.asked) return undefined; // something else was typed since
    const written = new Set(found.map((code) => `${code.kind} ${code.system}:${code.code}`));
    return show([
      ...found,
      ...typed.filter((code) => !written.has(`${code.kind} ${code.system}:${code.code}`)),
    ]);
  }

  function soon() {
    clearTimeout(state.timer);
    state.timer = setTimeout(() => look(), WAIT_MS);
  }

  function press(event) {
    const number = state.options.length;
    if (event.key === "Escape") {
      if (!list.hidden) event.preventDefault();
      close();
    } else if (event.key === "Enter") {
      event.preventDefault(); // it never sends the form
      if (number > 0) pick(state.active);
      else look();
    } else if ((event.key === "ArrowDown" || event.key === "ArrowUp") && !event.altKey) {
      event.preventDefault();
      if (number === 0) look(true);
      else activate((state.active + (event.key === "ArrowDown" ? 1 : number - 1)) % number);
    }
  }

  input.addEventListener("input", soon);
  input.addEventListener("keydown", press);
  input.addEventListener("blur", close);
  kind.addEventListener("change", () => input.value && look());
  const field = element(
    "div",
    { class: "search" },
    kind,
    element("div", { class: "under" }, input, list),
  );
  return { field, input };
}

/** The codes that "system:code" may mean. */
function asTyped(query, kind) {
  const parts = /^\s*([a-z][a-z0-9_]*)\s*:\s*(\S.*)$/i.exec(query);
  if (parts === null) return [];
  const system = parts[1].toLowerCase();
  const code = parts[2].trim().replaceAll(".", "").toUpperCase();
  const kinds = SYSTEM_OF[system] ?? ["diagnosis", "procedure"];
  return (kind === "" ? kinds : [kind]).map((one) => ({
    kind: one,
    system,
    code,
    name: null,
    typed: true,
  }));
}
