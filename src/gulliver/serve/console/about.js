// The dialog about a model: what runs, its evidence as a table, and its card.

import { getJson } from "./api.js";
import { element } from "./inline.js";
import { markdown } from "./markdown.js";
import { formatMeasured, formatNumber, formatValue, NO_BREAK, NOT_MEASURED, readNumber, sentence } from "./units.js";

const TILES = [["quality_loss", "Quality given up"], ["decode_tokens_per_s", "Speed"]];
const BETTER = { lower: "↓ lower is better", higher: "↑ higher is better", none: "for comparison" };

// { id, size_bytes, backend, why, context, card, evidence } of a model.
export function readAbout(id, key) {
  return getJson(`api/models/${encodeURIComponent(id)}`, key);
}

// Tiles as the reports have them, of what matters most: size, quality, speed and context, each where it is known.
export function factsView(about) {
  const rows = newest(about.evidence ?? []);
  const found = [["Size", formatValue(about.size_bytes, "bytes"), "all weight files"]];
  for (const [metric, name] of TILES) {
    const row = rows.findLast((other) => other.metric === metric);
    if (!row) continue;
    const [value, interval] = texts(row);
    const ends = interval.split(NO_BREAK)[0];
    found.push([name, value, ends.includes(" to ") ? `95 % interval ${ends}` : ""]);
  }
  const context = `${formatNumber(about.context ?? 0, 0)}${NO_BREAK}tokens`;
  if (about.context) found.push(["Context", context, "question and answer"]);
  return element("dl", { className: "figures" }, ...found.map((tile) => tileView(...tile)));
}

function tileView(name, value, note) {
  const [number, unit] = value.split(NO_BREAK);
  const big = element("dd", { className: "big" }, number);
  if (unit) big.append(" ", element("span", { className: "unit" }, unit));
  const small = note ? [element("dd", { className: "soft" }, note)] : [];
  return element("div", {}, element("dt", {}, name), big, ...small);
}

export function showAbout(dialog, about) {
  dialog.querySelector("h2").textContent = about.id;
  const backend = about.backend && `Runs on the ${about.backend} backend.`;
  const how = [backend, about.why && sentence(about.why)].filter(Boolean).join(" ");
  dialog.querySelector(".summary").replaceChildren(factsView(about), element("p", { className: "soft" }, how));
  dialog.querySelector("#evidence-panel").replaceChildren(...evidenceView(about.evidence ?? []));
  const none = element("p", { className: "soft" }, "This model has no card.");
  dialog.querySelector("#card-panel").replaceChildren(about.card ? markdown(withoutFrontMatter(about.card)) : none);
}

// Two tabs, moved between with the arrow keys, as the ARIA pattern for tabs has it.
export function wireTabs(list) {
  const tabs = [...list.querySelectorAll("[role=tab]")];
  const choose = (chosen) => {
    for (const tab of tabs) {
      tab.setAttribute("aria-selected", String(tab === chosen));
      tab.tabIndex = tab === chosen ? 0 : -1;
      document.getElementById(tab.getAttribute("aria-controls")).hidden = tab !== chosen;
    }
  };
  for (const tab of tabs) tab.addEventListener("click", () => choose(tab));
  list.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const next = tabs[(tabs.indexOf(event.target) + step + tabs.length) % tabs.length];
    choose(next);
    next.focus();
  });
  choose(tabs[0]);
}

// The newest evidence for each metric and data set, in the order in which they were first recorded.
function newest(evidence) {
  return [...new Map(evidence.map((row) => [`${row.metric} ${row.data_hash}`, row])).values()];
}

function texts(row) {
  return formatMeasured(readNumber(row.value), readNumber(row.low), readNumber(row.high), row.unit);
}

function evidenceView(evidence) {
  const rows = newest(evidence);
  if (!rows.length) return [element("p", {}, `Evidence: ${NOT_MEASURED}. gulliver audit measures it.`)];
  const measured = new Set(rows.map((row) => row.metric));
  // A baseline is shown beside what it is a baseline of, where that was measured.
  const isBeside = (row) => row.metric.startsWith("baseline_") && measured.has(row.metric.slice("baseline_".length));
  const lines = rows.filter((row) => !isBeside(row)).map((row) => {
    const base = rows.find((other) => other.metric === `baseline_${row.metric}` && other.data_hash === row.data_hash);
    return evidenceRow(row, base);
  });
  const heads = ["What", "Value", "95 % interval", "n", "Beside it"].map((text, index) =>
    element("th", { scope: "col", className: [1, 3].includes(index) ? "number" : "" }, text),
  );
  const legend = "Every number is about this exact artifact. The bar is the 95 % interval, the line the value.";
  const head = element("thead", {}, element("tr", {}, ...heads));
  const parts = [element("caption", {}, legend), head, element("tbody", {}, ...lines)];
  return [element("table", { className: "stack" }, ...parts), ...repeatView(rows)];
}

function evidenceRow(row, base) {
  const [value, interval] = texts(row);
  const name = row.metric.replace("_per_s", " per s").replace("_bytes", "").replaceAll("_", " ");
  const help = element("span", { className: "soft help" }, BETTER[row.direction] ?? "");
  const beside = base ? `baseline ${formatValue(readNumber(base.value), base.unit)}` : "";
  const bounds = element("td", { "data-label": "95 % interval" }, interval);
  const bar = intervalBar(...[row.value, row.low, row.high].map(readNumber));
  if (bar) bounds.append(bar);
  return element(
    "tr",
    {},
    element("th", { scope: "row" }, name, help),
    element("td", { className: "number", "data-label": "Value" }, value),
    bounds,
    element("td", { className: "number", "data-label": "n" }, formatNumber(row.n, 0)),
    element("td", { "data-label": "Beside it" }, beside),
  );
}

// The interval on an axis of ±10 % around the value, wider where it needs it, as the reports draw it.
function intervalBar(value, low, high) {
  if (![value, low, high].every(Number.isFinite) || low === high) return null;
  const reach = Math.max(Math.abs(value) * 0.1, (high - low) * 0.75, 1e-12);
  const place = (number) => (100 * (number - value + reach)) / (2 * reach);
  const range = element("i");
  range.style.left = `${place(low)}%`;
  range.style.width = `${place(high) - place(low)}%`;
  return element("span", { className: "interval", "aria-hidden": "true" }, range, element("b"));
}

function repeatView(rows) {
  const machines = [...new Set(rows.map((row) => row.machine).filter(Boolean))];
  const commands = [...new Set(rows.map((row) => row.command).filter(Boolean))];
  const views = [];
  const where = machines.length ? `Measured on ${machines.join("; ")}. ` : "";
  views.push(element("p", { className: "soft" }, `${where}Artifact ${rows[0].artifact_id || "not named"}.`));
  if (commands.length) {
    const list = element("pre", {}, element("code", {}, commands.join("\n")));
    views.push(element("details", {}, element("summary", {}, "Commands to repeat the measurements"), list));
  }
  return views;
}

// A card opens with YAML that the Hugging Face hub reads and people do not.
function withoutFrontMatter(card) {
  return card.replace(/^---\r?\n[^]*?\n---\r?\n/, "");
}
