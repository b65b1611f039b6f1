// The patient's form: visits, codes, options; asks the endpoint and shows what it answers.

import { answered } from "./answer.js";
import { KINDS, element, percent, visitName } from "./dom.js";
import { searchField } from "./search.js";

const FIELDS = { diagnosis: "diagnoses", procedure: "procedures", medication: "medications" };
const TITLES = {
  diagnosis: "Diagnoses",
  procedure: "Procedures",
  medication: "Medications",
  laboratory: "Laboratory",
};

const at = (id) => document.getElementById(id);
/** Visits, the current one first; each a list of codes with their kind. */
const visits = [[]];
let asking = null;

function say(text) {
  at("said").textContent = text;
}

/** Asks the endpoint; the key is read from its field each time and kept nowhere else. */
async function call(path, options = {}) {
  const key = at("key").value;
  const headers = { ...options.headers, ...(key === "" ? {} : { Authorization: `Bearer ${key}` }) };
  return fetch(path, { ...options, headers, credentials: "omit", cache: "no-store" });
}

async function findCodes(query, kind, limit) {
  const wanted = new URLSearchParams({ query, limit, ...(kind === "" ? {} : { kind }) });
  try {
    const reply = await call(`v1/codes?${wanted}`);
    if (!reply.ok) {
      await refused(reply, false);
      return [];
    }
    return (await reply.json()).codes;
  } catch {
    problem("The server does not answer.", [], false);
    return [];
  }
}

function drawVisits(focus) {
  const drawn = visits.map((codes, v) => visitFields(codes, v));
  at("visits").replaceChildren(...drawn.map((one) => one.fields));
  if (focus !== undefined) drawn[Math.min(focus, drawn.length - 1)].input.focus();
}

function visitFields(codes, v) {
  const name = visitName(visits.length - 1 - v, visits.length);
  const title = name[0].toUpperCase() + name.slice(1);
  const chips = element("div", { class: "chips" });
  const search = searchField(
    `Add a code to the ${name}`,
    findCodes,
    (code) => {
      if (codes.some((one) => same(one, code))) {
        say(`${code.system}:${code.code} is there already`);
        return;
      }
      codes.push({ ...code, value: "" });
      changed();
      drawChips(chips, codes, name, search.input);
      say(`Added ${code.kind} ${code.system}:${code.code}`);
      if (code.kind === "laboratory") chips.querySelector(".laboratory:last-child input").focus();
    },
    say,
  );
  drawChips(chips, codes, name, search.input);
  const fields = element(
    "fieldset",
    { class: "visit" },
    element("legend", {}, title),
    search.field,
    v === 0
      ? element(
          "p",
          { class: "faint" },
          "Medications of the current visit are those taken already: they are checked for interactions.",
        )
      : null,
    chips,
    v === 0
      ? null
      : element(
          "button",
          {
            type: "button",
            class: "quiet",
            "aria-label": `Remove this visit, ${name}`,
            onclick: () => removeVisit(v),
          },
          "Remove this visit",
        ),
  );
  return { fields, input: search.input };
}

function same(a, b) {
  return a.kind === b.kind && a.system === b.system && a.code === b.code;
}

function drawChips(chips, codes, name, input) {
  chips.replaceChildren(
    ...KINDS.filter((kind) => codes.some((code) => code.kind === kind)).map((kind) =>
      element(
        "div",
        {},
        element(
          "h3",
          {},
          kind === "medication" && name === "current visit"
            ? "Medications taken already"
            : TITLES[kind],
        ),
        element(
          "ul",
          { class: "codes" },
          ...codes
            .filter((code) => code.kind === kind)
            .map((code) =>
              element(
                "li",
                { class: kind },
                element(
                  "span",
                  { class: "titled" },
                  element("span", { class: "code" }, `${code.system}:${code.code}`),
                  code.name ? element("span", { class: "name" }, code.name) : null,
                ),
                kind === "laboratory" ? valueField(code) : null,
                element(
                  "button",
                  {
                    type: "button",
                    "aria-label": `Remove ${code.system}:${code.code} from the ${name}`,
                    onclick: () => {
                      codes.splice(codes.indexOf(code), 1);
                      changed();
                      drawChips(chips, codes, name, input);
                      say(`Removed ${code.system}:${code.code}`);
                      input.focus();
                    },
                  },
                  "×",
                ),
              ),
            ),
        ),
      ),
    ),
  );
}

function valueField(code) {
  const input = element("input", {
    type: "number",
    step: "any",
    inputmode: "decimal",
    "aria-label": `Value of ${code.system}:${code.code}`,
    placeholder: "value",
  });
  input.value = code.value;
  input.addEventListener("input", () => {
    code.value = input.value;
    changed();
  });
  return input;
}

function removeVisit(v) {
  visits.splice(v, 1);
  changed();
  drawVisits(v - 1);
  say("Removed a visit");
}

/** The request's body. */
function request() {
  const sent = visits.toReversed().map((codes) => ({
    ...Object.fromEntries(
      Object.entries(FIELDS).map(([kind, field]) => [
        field,
        codes.filter((code) => code.kind === kind).map(({ system, code }) => ({ system, code })),
      ]),
    ),
    laboratory: codes
      .filter((code) => code.kind === "laboratory")
      .map(({ code, value }) => ({ item: code, value: number(value) })),
  }));
  const allergies = at("allergies")
    .value.split(/[\s,;]+/)
    .filter((text) => text !== "");
  const limit = number(at("max-ddi").value);
  return {
    patients: [{ sex: at("sex").value, age: number(at("age").value), allergies, visits: sent }],
    options: {
      max_ddi_rate: limit === null ? null : limit / 100,
      top_k: number(at("top-k").value),
      explain: at("explain").checked,
    },
  };
}

function number(text) {
  return text.trim() === "" ? null : Number(text);
}

async function ask(event) {
  event.preventDefault();
  asking?.abort();
  const mine = new AbortController();
  asking = mine;
  at("problem").hidden = true;
  at("ask").setAttribute("aria-busy", "true");
  say("Asking");
  const body = request();
  const names = new Map(
    visits
      .flat()
      .filter((code) => code.kind === "medication")
      .map((code) => [`${code.system}:${code.code}`, code.name]),
  );
  try {
    const reply = await call("v1/recommend", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(body),
      signal: mine.signal,
    });
    if (reply.ok) show(await reply.json(), { names, number: body.patients[0].visits.length });
    else await refused(reply);
  } catch (error) {
    if (error.name !== "AbortError") problem("The server does not answer.");
  } finally {
    if (asking === mine) at("ask").removeAttribute("aria-busy");
  }
}

function show(response, asked) {
  at("nothing").hidden = true;
  at("found").replaceChildren(answered(response.recommendations[0], asked, response));
  at("answer").classList.remove("stale");
  say("");
  at("answer").focus({ preventScroll: true });
  at("answer").scrollIntoView({ block: "start" });
}

/** Says why a request was refused, with the fields that are wrong; moves the focus if it may. */
async function refused(reply, moves = true) {
  const body = await reply.json().catch(() => ({}));
  const wait = reply.headers.get("Retry-After");
  if (reply.status === 401 || reply.status === 403) {
    at("access").open = true;
    problem(
      `${body.message ?? "This server asks for an API key"}: enter the key under “API key”.`,
      [],
      false,
    );
    if (moves) at("key").focus();
  } else if (wait !== null) {
    problem(`The server has too much to do. Ask again in ${wait} s.`, [], moves);
  } else {
    problem(body.message ?? `The server answers ${reply.status}.`, body.problems ?? [], moves);
  }
}

function problem(message, fields = [], moves = true) {
  const box = at("problem");
  box.replaceChildren(
    element("p", {}, message),
    element(
      "ul",
      {},
      ...fields.map((one) =>
        element("li", {}, element("strong", {}, `${plainField(one.field)}: `), one.message),
      ),
    ),
  );
  box.hidden = false;
  say(moves ? "" : message);
  if (moves) box.focus();
}

/** "patients[0].visits[1].diagnoses[0].code" → "current visit, diagnoses[0].code". */
function plainField(field) {
  const visit = /^patients\[0\]\.visits\[(\d+)\]\.?(.*)$/.exec(field);
  if (visit !== null)
    return [visitName(Number(visit[1]), visits.length), visit[2]].filter(Boolean).join(", ");
  return field === "patients[0]" ? "this patient" : field.replace(/^patients\[0\]\./, "");
}

/** What is shown was for the patient as it was before. */
function changed() {
  if (at("nothing").hidden) at("answer").classList.add("stale");
}

/** Says which model answers, and what is known of it. */
async function describe() {
  try {
    const reply = await call("v1/model");
    if (!reply.ok) return;
    const card = await reply.json();
    at("model").textContent = `${card.name}, version ${card.version}`;
    at("inputs").hidden = card.inputs === "current";
    at("about").hidden = false;
    at("about").lastElementChild.replaceChildren(...about(card));
  } catch {
    // It is said when something is asked.
  }
}

function about(card) {
  const sizes = `It knows ${card.num_diagnoses} diagnoses, ${card.num_procedures} procedures, ${card.num_medications} medications and ${card.laboratory_items.length} laboratory items, and recommends from a probability of ${percent(card.threshold)}.`;
  const measured = card.card?.metrics?.test?.values?.jaccard;
  const quality =
    measured === undefined
      ? "It was not evaluated on test patients."
      : `On test patients its recommendations and what was prescribed have a mean Jaccard index of ${measured[0].toFixed(3)} (95 % interval ${measured[1].toFixed(3)} to ${measured[2].toFixed(3)}).`;
  return [
    element("p", {}, sizes),
    element("p", {}, quality),
    element("ul", { class: "plain" }, ...card.limits.map((limit) => element("li", {}, limit))),
  ];
}

at("patient").addEventListener("submit", ask);
at("patient").addEventListener("change", changed);
at("key").addEventListener("change", describe);
at("add-visit").addEventListener("click", () => {
  visits.push([]);
  changed();
  drawVisits(visits.length - 1);
});
drawVisits();
describe();
