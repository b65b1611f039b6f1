// The answer for one patient: medications, interactions, explanations, and what was left out.

import { element, percent, signed, titled, visitName } from "./dom.js";
import { draw, mark } from "./graph.js";

const WHY = {
  allergy: (one) => `falls under the allergy ${one.allergy}`,
  top_k: () => "more medications than asked for are more probable",
  max_ddi_rate: (one) =>
    one.pairs.length === 0
      ? "no room under the limit on interacting pairs"
      : `would exceed the limit on interacting pairs; it interacts with ${one.pairs.map((pair) => (pair.first === keyOf(one) ? pair.second : pair.first)).join(", ")}`,
};

/** Smallest change that is shown. */
const LEAST = 0.001;

/**
 * Builds the answer's elements.
 * @param asked {names, number}: names of the medications that were sent, and how many visits
 */
export function answered(answer, asked, response) {
  const names = new Map();
  for (const one of [...answer.medications, ...answer.left_out, ...answer.near_misses])
    names.set(keyOf(one), one.name);
  for (const [key, name] of asked.names) if (!names.get(key)) names.set(key, name);
  const graph = element("div", { class: "graph" });
  const parts = [
    element("p", { class: "summary" }, summary(answer)),
    answer.medications.length === 0 ? null : element("h3", {}, "Medications"),
    medications(answer, asked, graph),
    ...interactions(answer, names, graph),
    ...listed("Left out", answer.left_out, (one) => [
      titled(keyOf(one), one.name),
      ` ${percent(one.probability)}: ${WHY[one.reason](one)}`,
    ]),
    ...listed("Just below the threshold", answer.near_misses, (one) => [
      titled(keyOf(one), one.name),
      ` ${percent(one.probability)}`,
    ]),
    ...listed("Not known to the model", answer.unknown_codes, (one) => [
      element("span", { class: "code" }, one.code),
      ` (${one.kind}, ${visitName(one.visit, asked.number)}): had no influence, and its interactions cannot be known`,
    ]),
    explained(answer.explained_codes),
    element(
      "p",
      { class: "faint" },
      `${response.model.name}, version ${response.model.version}; request ${response.request_id}`,
    ),
  ];
  return element("div", {}, ...parts.filter((part) => part !== null));
}

function keyOf(one) {
  return `${one.system}:${one.code}`;
}

function counted(number, one, many) {
  return number === 1 ? `1 ${one}` : `${number} ${many}`;
}

function summary(answer) {
  const number = answer.medications.length;
  if (number === 0) return "No medication is probable enough to be recommended.";
  const pairs = answer.interactions.length;
  const taken = answer.interactions_with_taken.length;
  return [
    `${counted(number, "medication", "medications")} recommended; `,
    pairs === 0
      ? "no interacting pair among them is known"
      : `${counted(pairs, "pair", "pairs")} among them ${pairs === 1 ? "interacts" : "interact"} (${percent(answer.ddi_rate)} of all pairs)`,
    taken === 0 ? "." : `, ${taken} with what is taken already.`,
    answer.optimal === false
      ? " The search for the best choice under the limit was cut short."
      : "",
  ].join("");
}

function listed(title, all, described) {
  if (all.length === 0) return [];
  return [
    element("h3", {}, title),
    element("ul", { class: "plain" }, ...all.map((one) => element("li", {}, ...described(one)))),
  ];
}

function medications(answer, asked, graph) {
  const degree = new Map();
  const count = (key) => degree.set(key, (degree.get(key) ?? 0) + 1);
  for (const pair of answer.interactions) [pair.first, pair.second].forEach(count);
  for (const pair of answer.interactions_with_taken) count(pair.recommended);
  return element(
    "ol",
    { class: "medications" },
    ...answer.medications.map((one) => {
      const key = keyOf(one);
      const head = [
        titled(key, one.name),
        degree.has(key)
          ? element("span", { class: "warn" }, `interacts with ${degree.get(key)}`)
          : null,
        element("span", { class: "probability" }, percent(one.probability)),
        bar(one.probability),
      ];
      const marks = {
        onpointerenter: () => mark(graph, key),
        onpointerleave: () => mark(graph, null),
        onfocusin: () => mark(graph, key),
        onfocusout: () => mark(graph, null),
      };
      if (one.explanation === null)
        return element("li", marks, element("div", { class: "head" }, ...head));
      return element(
        "li",
        marks,
        element(
          "details",
          {},
          element("summary", {}, element("span", { class: "head" }, ...head)),
          ...influences("Raised by", one.explanation.raised, asked),
          ...influences("Lowered by", one.explanation.lowered, asked),
          element("p", { class: "faint rest" }, rest(one.explanation)),
        ),
      );
    }),
  );
}

function bar(share) {
  const inner = element("span", {});
  inner.style.width = `${100 * share}%`;
  return element("span", { class: "bar", "aria-hidden": "true" }, inner);
}

function influences(title, all, asked) {
  const shown = all.filter((one) => Math.abs(one.change) >= LEAST);
  if (shown.length === 0) return [];
  return [
    element("h4", {}, title),
    element(
      "ul",
      { class: "influences" },
      ...shown.map((one) =>
        element(
          "li",
          {},
          element(
            "p",
            {},
            titled(one.code, one.name),
            element(
              "span",
              { class: "faint" },
              ` ${one.kind}, ${visitName(one.visit, asked.number)}`,
            ),
          ),
          element(
            "p",
            { class: "change" },
            `${percent(one.score_without)} without it, `,
            element("strong", {}, signed(100 * one.change, 1)),
            " points with it",
          ),
          one.effect === null
            ? null
            : element(
                "p",
                {},
                `Estimated effect ${signed(100 * one.effect, 1)} points${one.standard_error === null ? "" : `, standard error ${(100 * one.standard_error).toFixed(1)}`}`,
              ),
          one.path === null ? null : path(one.path),
        ),
      ),
    ),
  ];
}

function rest({ raised, lowered }) {
  const all = [...raised, ...lowered];
  const small = all.filter((one) => Math.abs(one.change) < LEAST).length;
  if (small === all.length) return "No single code changes it by 0.1 points.";
  return small === 0
    ? ""
    : `${counted(small, "more code changes", "more codes change")} it by less than 0.1 points.`;
}

function path(found) {
  const steps = found.nodes.map((node) => node.replace("/", " ").replaceAll("_", " "));
  const stability = found.stability === null ? "" : `, stability ${found.stability.toFixed(2)}`;
  return element(
    "p",
    {},
    `In the causal graph: ${steps.join(found.directed ? " → " : " – ")}${found.directed ? "" : " (some directions are not known)"}${stability}`,
  );
}

function interactions(answer, names, graph) {
  const pairs = [
    ...answer.interactions.map((pair) => ({ ...pair, taken: false })),
    ...answer.interactions_with_taken.map((pair) => ({
      first: pair.recommended,
      second: pair.taken,
      taken: true,
    })),
  ];
  if (pairs.length === 0) return [];
  const taken = new Set(pairs.filter((pair) => pair.taken).map((pair) => pair.second));
  const keys = [...new Set([...answer.medications.map(keyOf), ...taken])].filter((key) =>
    pairs.some((pair) => pair.first === key || pair.second === key),
  );
  const nodes = keys.map((key) => ({
    key,
    code: key.split(":")[1],
    name: names.get(key),
    taken: taken.has(key),
  }));
  graph.addEventListener("pointerover", (event) =>
    mark(graph, event.target.closest(".node")?.dataset.key ?? null),
  );
  graph.addEventListener("pointerleave", () => mark(graph, null));
  draw(
    graph,
    nodes,
    pairs,
    `Graph of ${pairs.length} interacting pairs among ${nodes.length} medications; they are listed below`,
  );
  const written = (key) => titled(key, names.get(key) ?? null);
  return [
    element("h3", {}, "Interactions"),
    graph,
    taken.size === 0
      ? null
      : element("p", { class: "faint" }, "Hollow and dashed: what the patient takes already."),
    element(
      "details",
      { class: "pairs", open: pairs.length <= 8 ? "" : null },
      element("summary", {}, `All ${counted(pairs.length, "pair", "pairs")} in words`),
      element(
        "ul",
        { class: "plain" },
        ...pairs.map((pair) =>
          element(
            "li",
            {},
            written(pair.first),
            " and ",
            written(pair.second),
            pair.taken ? " (taken already)" : null,
          ),
        ),
      ),
    ),
  ];
}

function explained(codes) {
  if (codes === null) return null;
  return element(
    "details",
    { class: "meaning" },
    element("summary", {}, "What the explanations mean"),
    element(
      "p",
      {},
      `${codes.explained} of ${codes.given} codes were left out, one at a time, and the model asked again. “Without it” is the probability it then gives, a point being 1 %: a statement about this model, not about the patient, and changes do not add up.`,
    ),
    element(
      "p",
      {},
      `Effects and the causal graph were estimated (${codes.effect_estimator.replaceAll("_", " ")}) from visits of training patients and are the same for everybody: by how much a code makes being given the medication more probable, provided that nothing unmeasured causes both. Neither says that a medication is right.`,
    ),
  );
}
