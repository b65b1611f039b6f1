// The charts of a sweep's report, drawn by Plotly; sweep_report.js follows in the same script and
// has the data, the texts and the page.
"use strict";
const SHADES = 10;

let theme = {};
function readTheme() {
  const style = getComputedStyle(document.documentElement);
  const names = ["back", "panel", "text", "faint", "line", "grid", "finished", "stopped", "failed",
    "chosen", "picked", "front", "second", "low", "high"];
  theme = Object.fromEntries(names.map((name) => [name, style.getPropertyValue(`--${name}`).trim()]));
}

const narrow = () => innerWidth < 640;

function axis(title, more = {}) {
  return {
    title: { text: title, standoff: 10 }, gridcolor: theme.grid, linecolor: theme.line, zeroline: false,
    tickcolor: theme.line, automargin: true, fixedrange: narrow(), ...more,
  };
}

// Plotly shows a single value between -1 and 1.
function around(values) {
  const low = Math.min(...values), high = Math.max(...values);
  return low < high ? {} : { range: [low - Math.max(.01, Math.abs(low) * .2), low + Math.max(.01, Math.abs(low) * .2)] };
}

function draw(id, traces, layout, summary) {
  const place = byId(id), height = layout.height ?? (narrow() ? 340 : 400);
  place.style.height = `${height}px`;
  const whole = {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", hovermode: "closest",
    font: { family: "system-ui, sans-serif", size: narrow() ? 12 : 13, color: theme.text },
    margin: { l: 56, r: 12, t: 8, b: 48 }, dragmode: narrow() ? false : "zoom", height,
    legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", itemsizing: "constant" },
    hoverlabel: { bgcolor: theme.panel, bordercolor: theme.line, align: "left", font: { color: theme.text } },
    ...layout,
  };
  Plotly.react(place, traces, whole, {
    responsive: false, displayModeBar: false,
  });
  place.setAttribute("role", "group");
  place.setAttribute("aria-label", summary);
  if (!place.dataset.listens) {
    place.dataset.listens = "yes";
    place.on("plotly_click", (event) => {
      const index = event.points.map((point) => point.customdata).find((one) => Number.isInteger(one));
      if (index !== undefined) pick(rows[index]);
    });
  }
}

function empty(id, text) {
  const place = byId(id);
  if (place.classList.contains("js-plotly-plot")) Plotly.purge(place);
  place.style.height = "auto";
  place.replaceChildren(element("p", {}, text));
}

function points(list, x, y, name, marker, more = {}) {
  return {
    type: "scatter", mode: "markers", name, x: list.map(x), y: list.map(y), marker,
    customdata: list.map((row) => row.index), text: list.map(about), hovertemplate: "%{text}<extra></extra>",
    ...more,
  };
}

function marker(status, more = {}) {
  const symbol = { finished: "circle", stopped: "diamond-open", failed: "x" }[status];
  return { color: theme[status], symbol, size: status === "failed" ? 9 : 8, ...more };
}

// The chosen trial and the picked one, drawn last and so on top.
function special(x, y, among) {
  const traces = [];
  if (chosen && among.includes(chosen)) {
    traces.push(points([chosen], x, y, `chosen: trial ${chosen.trial}`, {
      symbol: "star", size: 17, color: theme.chosen, line: { color: theme.back, width: 1.5 },
    }));
  }
  if (picked && picked !== chosen && among.includes(picked)) {
    traces.push(points([picked], x, y, `trial ${picked.trial}`, {
      symbol: "circle-open", size: 16, color: theme.picked, line: { width: 3 },
    }));
  }
  return traces;
}

function drawPareto() {
  const note = byId("pareto-note");
  if (!usable.length) {
    empty("pareto", "No trial has metrics.");
    return;
  }
  const x = (row) => row.ddi_rate, y = (row) => row.jaccard;
  const traces = ["stopped", "finished"].map((status) => [status, usable.filter((row) => row.status === status)])
    .filter(([, list]) => list.length)
    .map(([status, list]) => points(list, x, y, STATUS[status], marker(status)));
  const front = rows.filter((row) => row.front).sort((a, b) => a.ddi_rate - b.ddi_rate);
  traces.unshift({
    type: "scatter", mode: "lines", name: "Pareto front", x: front.map(x), y: front.map(y),
    line: { color: theme.front, width: 2.5, shape: "hv" }, hoverinfo: "skip",
  });
  const shapes = [], annotations = [];
  if (limit !== null) {
    shapes.push({ type: "line", x0: limit, x1: limit, y0: 0, y1: 1, yref: "paper",
      line: { color: theme.failed, width: 1.5, dash: "dash" } });
    annotations.push({ x: limit, y: 0, yref: "paper", yanchor: "bottom", xanchor: "left", xshift: 3,
      text: `DDI ≤ ${limit}`, showarrow: false, font: { color: theme.failed } });
  }
  traces.push(...special(x, y, usable));
  draw("pareto", traces, {
    xaxis: axis("DDI rate, less is better", around([...usable.map(x), ...(limit === null ? [] : [limit])])),
    yaxis: axis("Jaccard, more is better", around(usable.map(y))), shapes, annotations,
  }, `${counted(usable.length, "trial")} by Jaccard and DDI rate, ${front.length} of them on the Pareto front`);
  const without = rows.length - usable.length;
  note.textContent = `${counted(front.length, "trial")} on the front: ` +
    `${clipped(front.map((row) => row.trial).join(", "), 120)}.` +
    (without ? ` ${counted(without, "trial")} without metrics not shown.` : "");
}

function drawHistory() {
  const metric = byId("history-metric").value, note = byId("history-note");
  if (!usable.length) {
    empty("history", "No trial has metrics.");
    note.textContent = "";
    return;
  }
  const x = (row) => row.trial, y = (row) => row[metric];
  const traces = [];
  const bounded = limit !== null && metric === "jaccard";
  if (metric !== "num_medications") {
    const better = LESS_IS_BETTER.has(metric) ? Math.min : Math.max;
    let best = null;
    const line = [...rows].sort((a, b) => a.trial - b.trial).map((row) => {
      const counts = row.usable && row[metric] !== null && (!bounded || row.ddi_rate <= limit);
      if (counts) best = best === null ? row[metric] : better(best, row[metric]);
      return [row.trial, best];
    });
    traces.push({ type: "scatter", mode: "lines", name: "best so far", x: line.map((p) => p[0]),
      y: line.map((p) => p[1]), line: { color: theme.front, width: 2.5, shape: "hv" }, hoverinfo: "skip" });
  }
  for (const status of ["stopped", "finished"]) {
    const list = usable.filter((row) => row.status === status);
    if (list.length) traces.push(points(list, x, y, STATUS[status], marker(status)));
  }
  const failed = rows.filter((row) => !row.usable);
  if (failed.length) {  // on a line of their own below: they have no value
    traces.push(points(failed, x, () => 0, "failed", marker("failed"), { yaxis: "y2" }));
  }
  traces.push(...special(x, y, usable));
  const first = Math.min(...rows.map(x)), last = Math.max(...rows.map(x));
  const beside = Math.max(.5, (last - first) * .03);
  draw("history", traces, {
    xaxis: axis("Trial", { range: [first - beside, last + beside], anchor: failed.length ? "y2" : "y",
      ...(rows.length < 8 ? { dtick: 1 } : {}) }),
    yaxis: axis(METRICS[metric], { domain: [failed.length ? .12 : 0, 1], ...around(usable.map(y)) }),
    yaxis2: { domain: [0, .08], showgrid: false, zeroline: false, showticklabels: false, fixedrange: true,
      range: [-1, 1] },
  }, `${METRICS[metric]} of ${counted(rows.length, "trial")} in their order`);
  note.textContent = (bounded ? `Best so far counts trials with a DDI rate of at most ${limit}. ` : "") +
    (failed.length ? "Failed trials are below the axis." : "");
}

function drawCurves() {
  const metric = byId("curves-metric").value;
  const shown = rows.filter((row) => row.history.epoch.length);
  if (!shown.length) {
    empty("curves", "No trial ended an epoch.");
    return;
  }
  const traces = [];
  for (const status of ["failed", "stopped", "finished"]) {
    const list = shown.filter((row) => row.status === status && !row.chosen && row !== picked);
    if (!list.length) continue;
    // One trace for all: a null between two trials lifts the pen.
    const joined = (values) => list.flatMap((row) => [...values(row), null]);
    traces.push({
      type: "scatter", mode: "lines", name: STATUS[status], opacity: .45,
      x: joined((row) => row.history.epoch), y: joined((row) => row.history[metric]),
      customdata: joined((row) => row.history.epoch.map(() => row.index)),
      text: joined((row) => row.history.epoch.map(() => String(row.trial))),
      hovertemplate: "Trial %{text}, epoch %{x}: %{y:.4f}<extra></extra>",
      line: { color: theme[status], width: 1 }, connectgaps: false,
    });
  }
  const mark = (row, name, color) => traces.push({
    type: "scatter", mode: "lines", name, x: row.history.epoch, y: row.history[metric],
    customdata: row.history.epoch.map(() => row.index), line: { color, width: 3 },
    hovertemplate: `Trial ${row.trial}, epoch %{x}: %{y:.4f}<extra></extra>`,
  });
  if (picked && picked !== chosen && shown.includes(picked)) mark(picked, `trial ${picked.trial}`, theme.picked);
  if (chosen && shown.includes(chosen)) {
    mark(chosen, `chosen: trial ${chosen.trial}`, theme.chosen);
    const at = chosen.history.epoch.indexOf(chosen.best_epoch);
    if (at >= 0) {
      traces.push({ type: "scatter", mode: "markers", showlegend: false, x: [chosen.best_epoch],
        y: [chosen.history[metric][at]], marker: { symbol: "star", size: 14, color: theme.chosen,
          line: { color: theme.back, width: 1.5 } }, hoverinfo: "skip" });
    }
  }
  const longest = Math.max(...shown.map((row) => row.epochs));
  draw("curves", traces, {
    xaxis: axis("Epoch", { rangemode: "tozero", ...(longest < 8 ? { dtick: 1 } : {}) }),
    yaxis: axis(METRICS[metric]),
  }, `${METRICS[metric]} of ${counted(shown.length, "trial")} by epoch`);
  byId("curves-note").textContent = chosen ? "The star is the epoch whose model was kept." : "";
}

function drawImportances() {
  const found = data.importances.map(({ metric, sets }) => ({
    metric, trials: sets[0]?.trials ?? 0, values: new Map(sets.flatMap((one) => one.values)), sets,
  })).filter(({ values }) => values.size);
  const note = byId("importances-note");
  if (!found.length) {
    empty("importances", "Importances need at least five finished trials that differ.");
    return;
  }
  const names = [...new Set(found.flatMap(({ values }) => [...values.keys()]))];
  const first = found[0].values;
  names.sort((a, b) => (first.get(a) ?? 0) - (first.get(b) ?? 0));
  const colors = { jaccard: theme.finished, ddi_rate: theme.second };
  const traces = [...found].reverse().map(({ metric, values }) => ({
    type: "bar", orientation: "h", name: METRICS[metric], y: names.map((name) => broken(short(name), 18)),
    x: names.map((name) => values.get(name) ?? 0), marker: { color: colors[metric] },
    text: names.map((name) => (values.get(name) ?? 0).toFixed(2)), textposition: "outside",
    cliponaxis: false, textfont: { color: theme.text },
    hovertemplate: names.map((name) => `${plain(name)}: %{x:.3f}<extra>${METRICS[metric]}</extra>`),
  }));
  const most = Math.max(...found.flatMap(({ values }) => [...values.values()]));
  draw("importances", traces, {
    barmode: "group", bargap: .25, height: Math.max(narrow() ? 340 : 400, 90 + 44 * names.length),
    legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", traceorder: "reversed" },
    xaxis: axis("Share of the variance", { range: [0, Math.max(.1, most * 1.15)] }),
    yaxis: axis("", { type: "category", gridcolor: "rgba(0,0,0,0)", ticks: "" }),
  }, `Importances of ${counted(names.length, "parameter")}`);
  const few = found[0].trials < 30 ? " So few trials say little." : "";
  const part = found[0].sets.filter((one) => one.trials < found[0].trials);
  note.textContent = `fANOVA over ${counted(found[0].trials, "finished trial")}.${few}` +
    part.map((one) => ` ${one.values.map(([name]) => short(name)).join(", ")}: ` +
      `over the ${one.trials} that have them.`).join("");
}

// --- Parallel coordinates ---------------------------------------------------------------------
// Drawn as lines and points: Plotly's own kind needs WebGL and eval, and cannot show that a trial
// has no value of a parameter.

function wrapped(text, longest) {
  if (text.length <= longest) return text;
  return text.replace(/[_.]/g, (mark) => `${mark}\u200b`).split("\u200b").reduce((lines, word) => {
    const last = lines.length - 1;
    if (last >= 0 && (lines[last] + word).length <= longest) lines[last] += word;
    else lines.push(word);
    return lines;
  }, []).join("\n");
}
const broken = (text, longest) => wrapped(text, longest).split("\n").map(plain).join("<br>");

function niceTicks(low, high, log) {
  if (log) {
    const from = Math.log10(low), to = Math.log10(high), ticks = [];
    const steps = to - from > 2.5 ? [1] : to - from > 1.2 ? [1, 3] : [1, 2, 5];
    for (let power = Math.floor(from); power <= Math.ceil(to); power++) {
      for (const step of steps) {
        const tick = step * 10 ** power;
        if (tick >= low * .999 && tick <= high * 1.001) ticks.push(tick);
      }
    }
    if (ticks.length >= 2) return ticks;
  }
  const rough = (high - low) / 4, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((factor) => factor * power).find((size) => size >= rough * .999);
  const ticks = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) ticks.push(i * step);
  return ticks;
}

function tickText(value) {
  if (value !== 0 && (Math.abs(value) < 1e-3 || Math.abs(value) >= 1e5)) {
    return value.toExponential(1).replace(".0e", "e").replace("e+", "e");
  }
  return String(Number(value.toPrecision(4)));
}

// An axis: place(row) in [0, 1], or null without a value; ticks as [place, text].
function numberAxis(name, title, entry, value) {
  const found = rows.map(value).filter((one) => one !== null);
  const padded = entry.low === undefined ? (Math.max(...found) - Math.min(...found)) * .02 : 0;
  let low = Math.min(entry.low ?? Infinity, ...found) - padded;
  let high = Math.max(entry.high ?? -Infinity, ...found) + padded;
  if (!(low < high)) [low, high] = [low - .5, high + .5];
  const log = Boolean(entry.log) && low > 0, scale = log ? Math.log : (x) => x;
  const place = (x) => (scale(x) - scale(low)) / (scale(high) - scale(low));
  // The ends of a space are named whatever they are, others where they leave room.
  const ends = entry.low === undefined ? [] : [low, high];
  const inner = niceTicks(low, high, log).filter((tick) =>
    !ends.length || (place(tick) > .08 && place(tick) < .92));
  return {
    name, title, ticks: [...ends, ...inner].map((tick) => [place(tick), tickText(tick)]),
    place: (row) => value(row) === null ? null : place(value(row)),
  };
}

function choiceAxis(name, title, entry, value) {
  const found = rows.map(value).filter((one) => one !== null).map(String);
  const listed = (entry.choices ?? []).filter((one) => one !== null).map(String);
  const choices = [...new Set([...listed, ...found])];
  if (!listed.length) choices.sort((a, b) => a.localeCompare(b, "en", { numeric: true }));
  const place = (text) => choices.length === 1 ? .5 : choices.indexOf(text) / (choices.length - 1);
  return {
    name, title, ticks: choices.map((text) => [place(text), clipped(text, 12)]),
    place: (row) => value(row) === null ? null : place(String(value(row))),
  };
}

function parallelAxes() {
  const varied = data.parameters.filter(({ name }) => new Set(rows.map((row) => row[name])).size > 1);
  const axes = varied.map((entry) => {
    const { name } = entry, value = (row) => row[name];
    const numeric = entry.type !== "categorical" &&
      rows.every((row) => row[name] === null || typeof row[name] === "number");
    const made = (numeric ? numberAxis : choiceAxis)(name, short(name), entry, value);
    if (rows.some((row) => row[name] === null)) {  // conditional, or a choice that is null
      made.none = true;
    }
    return made;
  });
  for (const name of ["ddi_rate", "jaccard"]) {
    if (usable.some((row) => row[name] !== null)) {
      axes.push(numberAxis(name, METRICS[name], {}, (row) => row.usable ? row[name] : null));
    }
  }
  return axes;
}

const NONE = -.13;  // where a trial without a value of a parameter crosses its axis

function mix(share) {
  const part = (color, i) => parseInt(color.slice(1 + 2 * i, 3 + 2 * i), 16);
  const made = [0, 1, 2].map((i) => Math.round(part(theme.low, i) + share * (part(theme.high, i) - part(theme.low, i))));
  return `rgb(${made.join(",")})`;
}

function passes(row, axes) {
  return [...filters].every(([i, [low, high]]) => {
    const at = axes[i].place(row) ?? (axes[i].none ? NONE : null);
    return at !== null && at >= low && at <= high;
  });
}

function drawParallel() {
  const axes = parallelAxes(), across = narrow(), note = byId("parallel-note");
  byId("parallel").style.width = "100%";
  if (axes.length < 2 || rows.length < 2) {
    empty("parallel", "Needs at least two trials that differ.");
    note.textContent = "";
    return;
  }
  const ranks = [...usable].sort((a, b) => a.jaccard - b.jaccard || a.index - b.index);
  const share = new Map(ranks.map((row, i) => [row, ranks.length > 1 ? i / (ranks.length - 1) : 1]));
  const shade = (row) => Math.min(SHADES - 1, Math.floor((share.get(row) ?? 0) * SHADES));
  const path = (row) => axes.map((one, i) => [i, one.place(row) ?? (one.none ? NONE : null)])
    .filter(([, at]) => at !== null);
  const turned = (xs, ys) => across ? { x: ys, y: xs } : { x: xs, y: ys };
  const traces = [];
  const line = (list, style, more = {}) => {
    const joined = list.flatMap((row) => [...path(row), [null, null]]);
    traces.push({ type: "scatter", mode: "lines", hoverinfo: "skip", showlegend: false, connectgaps: false,
      ...turned(joined.map((p) => p[0]), joined.map((p) => p[1])), line: style, ...more });
  };
  const kept = rows.filter((row) => passes(row, axes));
  const faded = rows.filter((row) => !kept.includes(row));
  if (faded.length) line(faded, { color: theme.grid, width: 1 });
  const failed = kept.filter((row) => !row.usable);
  if (failed.length) line(failed, { color: theme.failed, width: 1, dash: "dot" }, { opacity: .7 });
  for (let i = 0; i < SHADES; i++) {
    const list = kept.filter((row) => row.usable && shade(row) === i);
    if (list.length) line(list, { color: mix(i / (SHADES - 1)), width: 1.3 }, { opacity: .85 });
  }
  const dots = kept.flatMap((row) => path(row).map(([i, at]) => [row, i, at]));
  traces.push({
    type: "scatter", mode: "markers", showlegend: false,
    ...turned(dots.map((d) => d[1]), dots.map((d) => d[2])), customdata: dots.map((d) => d[0].index),
    text: dots.map((d) => about(d[0])), hovertemplate: "%{text}<extra></extra>",
    marker: { size: 5, color: dots.map((d) => d[0].usable ? mix(shade(d[0]) / (SHADES - 1)) : theme.failed) },
  });
  if (chosen) line([chosen], { color: theme.chosen, width: 3.5 });
  if (picked && picked !== chosen) line([picked], { color: theme.picked, width: 3.5 });
  const frame = byId("parallel-frame").clientWidth;
  const width = across ? frame : Math.max(frame, 90 * axes.length);
  const shapes = [], annotations = [], lowest = axes.some((one) => one.none) ? NONE : 0;
  axes.forEach((one, i) => {
    const along = (from, to, style) => shapes.push({ type: "line", layer: "above",
      ...(across ? { y0: i, y1: i, x0: from, x1: to } : { x0: i, x1: i, y0: from, y1: to }), line: style });
    along(0, 1, { color: theme.faint, width: 1.2 });
    const range = filters.get(i);
    if (range) along(Math.max(range[0], lowest), Math.min(range[1], 1), { color: theme.front, width: 7 });
    const label = (at, text, more = {}) => annotations.push({
      ...(across ? { x: at, y: i, yanchor: "top", yshift: -3, xanchor: at > .85 ? "right" : "center",
        xshift: at > .85 ? 8 : 0 } : { x: i, y: at, xanchor: "right", xshift: -4 }),
      text: plain(text), showarrow: false, bgcolor: theme.back, borderpad: 1, opacity: .92,
      font: { size: 11, color: theme.faint }, ...more,
    });
    one.ticks.forEach(([at, text]) => label(at, text));
    if (one.none) label(NONE, "none");
    annotations.push(across
      ? { x: lowest, y: i, xanchor: "left", yanchor: "bottom", yshift: 5, text: `<b>${plain(one.title)}</b>`,
        showarrow: false, bgcolor: theme.back, opacity: .92 }
      : { x: i, y: 1, yanchor: "bottom", yshift: 10, text: `<b>${broken(one.title, Math.floor(width / axes.length / 8.5))}</b>`, showarrow: false });
  });
  byId("parallel").style.width = `${width}px`;
  const spread = { range: [-.55, axes.length - .6], visible: false, fixedrange: true };
  const value = { range: [lowest - .06, 1.04], visible: false, fixedrange: true };
  draw("parallel", traces, {
    width, height: across ? 60 + 62 * axes.length : 470, shapes, annotations, selections: [],
    margin: across ? { l: 14, r: 14, t: 24, b: 20 } : { l: 20, r: 10, t: 58, b: 8 },
    dragmode: across ? false : "select", showlegend: false,
    xaxis: across ? value : spread, yaxis: across ? { ...spread, range: [axes.length - .4, -.6] } : value,
  }, `Parallel coordinates of ${counted(rows.length, "trial")} over ${counted(axes.length, "axis", "axes")}`);
  const same = parameters.filter((name) => !axes.some((one) => one.name === name));
  const how = across ? "" : filters.size
    ? `${counted(kept.length, "trial")} of ${rows.length} within the marked ranges. `
    : "Draw a box over a part of an axis to see the trials that pass there; more boxes narrow further. ";
  note.textContent = how + (usable.length ? "A stronger colour is a higher Jaccard." : "") +
    (chosen ? " The thick line is the chosen trial." : "") +
    (failed.length ? " Dotted: failed." : "") +
    (axes.some((one) => one.none) ? " none: null, or no option of the trial's model." : "") +
    (same.length ? ` The same in all: ${same.map((name) => `${short(name)} = ${number(rows[0][name])}`).join(", ")}.` : "");
  byId("clear").hidden = !filters.size;
}

function brush(event) {
  if (!event?.range) return;
  const [left, right] = [...event.range.x].sort((a, b) => a - b);
  const range = [...event.range.y].sort((a, b) => a - b);
  const inside = parallelAxes().map((_, i) => i).filter((i) => i >= left && i <= right);
  for (const i of inside) filters.set(i, range);
  // Not within Plotly's own handling of the end of the drag.
  setTimeout(drawParallel);
}
