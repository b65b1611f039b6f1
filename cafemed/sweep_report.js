// A sweep's report: its data, its tables and what the reader does; the charts are in sweep_charts.js.
const data = JSON.parse(document.getElementById("data").textContent);
const METRICS = {
  jaccard: "Jaccard", f1: "F1", prauc: "PRAUC", ddi_rate: "DDI rate",
  num_medications: "Medications", train_loss: "Training loss",
};
const MEASURED = ["jaccard", "f1", "prauc", "ddi_rate", "num_medications"];
const LESS_IS_BETTER = new Set(["ddi_rate", "train_loss"]);
const STATUS = { finished: "finished", stopped: "stopped early", failed: "failed" };
const parameters = data.parameters.map((parameter) => parameter.name);
const rows = data.columns.trial.map((trial, index) => {
  const row = { index, front: data.front[index], chosen: trial === data.chosen, history: {} };
  for (const [name, values] of Object.entries(data.columns)) row[name] = values[index];
  for (const [name, values] of Object.entries(data.history)) row.history[name] = values[index];
  row.usable = row.status !== "failed" && row.jaccard !== null;
  return row;
});
const chosen = rows.find((row) => row.chosen) ?? null;
const usable = rows.filter((row) => row.usable);
const { limit } = data;
let picked = null;                 // a row that the reader asked for
const filters = new Map();         // parallel coordinates: number of an axis → [low, high] on it

// --- Text -------------------------------------------------------------------------------------

const byId = (id) => document.getElementById(id);

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

function counted(number, one, many = `${one}s`) {
  return `${number.toLocaleString("en")} ${number === 1 ? one : many}`;
}

// The option's name alone, where that says which one is meant.
function short(name) {
  if (name === "model.name") return "model";
  const option = name.slice(name.lastIndexOf(".") + 1);
  const alike = parameters.filter((other) => other.endsWith(`.${option}`)).length;
  return alike > 1 ? name.slice(name.split(".").length > 2 ? name.indexOf(".") + 1 : 0) : option;
}

function number(value, digits = 4) {
  if (value === null || value === undefined) return "–";
  if (typeof value !== "number") return String(value);
  if (Number.isInteger(value) && Math.abs(value) < 1e6) return String(value);
  const size = Math.abs(value);
  return size < 1e-3 || size >= 1e6 ? value.toExponential(2) : String(Number(value.toPrecision(digits)));
}

const fixed = (digits) => (value) => value === null || value === undefined ? "–" : value.toFixed(digits);
const metricText = (name) => name === "num_medications" ? fixed(2) : fixed(4);

function time(text) { return text === null ? "–" : text.slice(0, 19).replace("T", " "); }

// Plotly reads some markup in texts; names and values are not to be markup.
function plain(value) {
  return String(value).replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
}

function clipped(text, longest) { return text.length > longest ? `${text.slice(0, longest - 1)}…` : text; }

function about(row) {
  const lines = [`<b>Trial ${row.trial}</b>, ${STATUS[row.status] ?? plain(row.status)}` +
    (row.chosen ? ", chosen" : "")];
  if (row.usable) {
    lines.push(`Jaccard ${fixed(4)(row.jaccard)}, DDI rate ${fixed(4)(row.ddi_rate)}, ` +
      `epoch ${row.best_epoch} of ${row.epochs}`);
  } else if (row.error) lines.push(plain(clipped(row.error, 70)));
  for (const name of parameters) {
    if (row[name] !== null) lines.push(`${plain(short(name))} = ${plain(clipped(number(row[name]), 40))}`);
  }
  return lines.join("<br>");
}

// --- Tables -----------------------------------------------------------------------------------

// Columns: { title, value(row), text(value, row), kind: "number" | "text" | "long" | "first" }.
function table(label, columns, list, sortable) {
  const body = element("tbody");
  const heads = columns.map((column) => element("th", { scope: "col", class: column.kind ?? "number" }));
  const order = { column: -1, ascending: true };
  const fill = () => {
    const sorted = [...list];
    if (order.column >= 0) {
      const { value } = columns[order.column], sign = order.ascending ? 1 : -1;
      sorted.sort((a, b) => {
        const x = value(a), y = value(b);
        if (x === y) return a.index - b.index;
        if (x === null || x === undefined) return 1;   // what is not known comes last
        if (y === null || y === undefined) return -1;
        const both = typeof x === "number" && typeof y === "number";
        return sign * (both ? x - y : String(x).localeCompare(String(y), "en", { numeric: true }));
      });
    }
    body.replaceChildren(...sorted.map((row) => element("tr", {
      "data-trial": row.trial, class: row.chosen ? "chosen" : "",
    }, ...columns.map((column) => {
      const content = column.text ? column.text(column.value(row), row) : number(column.value(row));
      return element("td", { class: column.kind ?? "number" }, ...[content].flat());
    }))));
    markPicked();
  };
  heads.forEach((head, i) => {
    if (!sortable) {
      head.append(columns[i].title);
      return;
    }
    const button = element("button", { type: "button" }, columns[i].title);
    button.addEventListener("click", () => {
      order.ascending = order.column === i ? !order.ascending : true;
      order.column = i;
      heads.forEach((other, j) => other.setAttribute("aria-sort",
        j !== i ? "none" : order.ascending ? "ascending" : "descending"));
      fill();
    });
    head.setAttribute("aria-sort", "none");
    head.append(button);
  });
  fill();
  return element("div", {
    class: sortable ? "scroll tall" : "scroll", tabindex: "0", role: "region", "aria-label": label,
  }, element("table", { "aria-label": label },
    element("thead", {}, element("tr", {}, ...heads)), body));
}

function trialButton(value, row) {
  const button = element("button", { type: "button", "aria-label": `Show trial ${value} in the charts` },
    String(value));
  button.addEventListener("click", () => pick(row));
  return [button, ...(row.chosen ? [element("span", { class: "faint" }, "chosen")] : [])];
}

const trialColumn = { title: "Trial", kind: "first", value: (row) => row.trial, text: trialButton };
const statusColumn = {
  title: "Status", kind: "text", value: (row) => row.status, text: (value) => STATUS[value] ?? value,
};
function metricColumn(name) {
  const value = (row) => row.usable ? row[name] : null;
  return { title: METRICS[name], value, text: metricText(name) };
}
function parameterColumn(name) {
  const kind = rows.some((row) => typeof row[name] === "string") ? "text" : "number";
  return { title: short(name), kind, value: (row) => row[name] };
}

// What evaluated trials reached on the patients of the validation and the test split.
function testTable() {
  const tested = data.tested ?? {};
  const list = rows.filter((row) => tested[row.trial]).flatMap((row) => [
    { ...row, split: "validation", found: Object.fromEntries(MEASURED.map((name) => [name, row[name]])) },
    { ...row, split: "test", found: tested[row.trial].metrics, intervals: tested[row.trial].intervals },
  ]);
  if (!list.length) return [];
  const { patients, visits } = tested[list[0].trial];
  const columns = [trialColumn, { title: "Patients", kind: "text", value: (row) => row.split }];
  for (const name of MEASURED) {
    const show = metricText(name);
    columns.push({ title: METRICS[name], value: (row) => row.found[name], text: (value, row) => {
      const range = row.intervals?.[name];
      return range ? [show(value), element("span", { class: "faint" }, `${show(range[0])} to ${show(range[1])}`)]
        : show(value);
    } });
  }
  return [element("h2", {}, "On the test patients"),
    element("p", { class: "faint" }, `${counted(patients, "patient")} with ${counted(visits, "visit")}, ` +
      "in no trial and no choice; below each value its 95 % interval."),
    table("On the test patients", columns, list, false)];
}

function bestTable() {
  const list = data.best.map((index) => rows[index]);
  const columns = [
    trialColumn, ...MEASURED.map(metricColumn),
    { title: "Epoch", value: (row) => row.best_epoch, text: (value, row) => `${value} of ${row.epochs}` },
    statusColumn, ...parameters.map(parameterColumn),
  ];
  const note = "Metrics of the validation patients." +
    (limit === null ? "" : ` Those with a DDI rate of at most ${limit} come first.`);
  byId("best").append(...testTable(), element("h2", {}, "Best trials"), ...(list.length
    ? [element("p", { class: "faint" }, note), table("Best trials", columns, list, false)]
    : [element("p", {}, "None.")]));
}

function trialsTable() {
  const some = (name) => rows.some((row) => row[name] !== null && row[name] !== undefined);
  const columns = [trialColumn, statusColumn];
  if (some("error")) {
    columns.push({ title: "Error", kind: "long", value: (row) => row.error, text: (value) => value ?? "–" });
  }
  columns.push(
    ...MEASURED.map(metricColumn),
    { title: "Front", kind: "text", value: (row) => row.front ? 0 : 1, text: (value) => value ? "" : "yes" },
    { title: "Best epoch", value: (row) => row.best_epoch },
    { title: "Epochs", value: (row) => row.epochs },
    ...parameters.map(parameterColumn),
    { title: "Seconds", value: (row) => row.seconds, text: fixed(1) },
    { title: "Started (UTC)", kind: "text", value: (row) => row.started, text: time },
    { title: "Host", kind: "text", value: (row) => row.host || null },
    { title: "CPUs", value: (row) => row.cpus }, { title: "GPUs", value: (row) => row.gpus },
  );
  if (some("memory_gb")) columns.push({ title: "Memory (GB)", value: (row) => row.memory_gb });
  if (some("num_workers")) columns.push({ title: "Workers", value: (row) => row.num_workers });
  if (some("attempts")) columns.push({ title: "Attempts", value: (row) => row.attempts });
  columns.push({ title: "Seed", value: (row) => row.seed, text: String });
  byId("trials").append(element("h2", {}, `All trials (${rows.length})`),
    element("p", { class: "faint" }, "Press a heading to sort, a trial's number to show it in the charts."),
    table("All trials", columns, rows, true));
}

// --- The page ---------------------------------------------------------------------------------

function markPicked() {
  for (const line of document.querySelectorAll("tr[data-trial]")) {
    line.classList.toggle("picked", picked !== null && line.dataset.trial === String(picked.trial));
  }
}

function pick(row) {
  picked = row === picked ? null : row;
  const bar = byId("picked");
  bar.hidden = picked === null;
  if (picked) {
    const values = parameters.filter((name) => picked[name] !== null)
      .map((name) => `${short(name)} = ${clipped(number(picked[name]), 40)}`).join(", ");
    const found = picked.usable
      ? `Jaccard ${fixed(4)(picked.jaccard)}, DDI rate ${fixed(4)(picked.ddi_rate)}`
      : clipped(picked.error ?? "no metrics", 200);
    const close = element("button", { type: "button" }, "Close");
    close.addEventListener("click", () => pick(picked));
    bar.replaceChildren(element("b", {}, `Trial ${picked.trial}`),
      ` ${STATUS[picked.status] ?? picked.status}: ${found}; ${values}`, close);
  }
  markPicked();
  drawAll();
}

function showCommand() {
  if (!data.command.length) return;
  byId("reproduce").hidden = false;
  const longest = narrow() ? 44 : 100;
  const lines = [];
  for (const argument of data.command) {
    const last = lines.length - 1;
    if (last >= 0 && lines[last].length + argument.length + 1 <= longest) lines[last] += ` ${argument}`;
    else lines.push(argument);
  }
  byId("command").textContent = lines.join(" \\\n  ");
}

async function copyCommand() {
  const button = byId("copy");
  try {
    await navigator.clipboard.writeText(data.command.join(" "));
    button.textContent = "Copied";
  } catch {  // not allowed here: mark it, to be copied by hand
    getSelection().selectAllChildren(byId("command"));
    button.textContent = "Selected";
  }
  setTimeout(() => { button.textContent = "Copy"; }, 2000);
}

function drawAll() {
  readTheme();
  for (const one of [drawPareto, drawHistory, drawCurves, drawImportances, drawParallel]) one();
}

function choices(id, names, changed) {
  const select = byId(id);
  select.append(...names.map((name) => element("option", { value: name }, METRICS[name])));
  select.addEventListener("change", changed);
}

document.title = `${data.name} – Sweep report`;
byId("name").textContent = data.name;
byId("decision").textContent = data.decision;
byId("facts").append(...data.facts.map(([title, value]) =>
  element("div", {}, element("dt", {}, title), element("dd", {}, value))));
showCommand();
byId("copy").addEventListener("click", copyCommand);
bestTable();
trialsTable();
choices("history-metric", MEASURED, drawHistory);
choices("curves-metric", Object.keys(METRICS), drawCurves);
drawAll();
if (byId("parallel").on) byId("parallel").on("plotly_selected", brush);
byId("clear").addEventListener("click", () => { filters.clear(); drawParallel(); });
let width = innerWidth;
addEventListener("resize", () => {
  if (innerWidth === width) return;
  width = innerWidth;
  filters.clear();
  showCommand();
  drawAll();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
