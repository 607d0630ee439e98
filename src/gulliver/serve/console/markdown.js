// A small, safe markdown: fenced code, headings, lists, quotes, tables, rules and paragraphs, as DOM nodes.
//
// `markdown(text)` renders a whole text; `MarkdownStream` one that grows. Blocks that cannot change any more stay as
// they are in the page; only the last one is made again, so an update costs the length of a block, not of an answer.

import { element, inline } from "./inline.js";

const MAX_DEPTH = 8;
const FENCE = /^( *)(`{3,}|~{3,})([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})(?: +(.*))?$/;
const RULE = /^ {0,3}([-*_])(?: *\1){2,} *$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])( {1,4}(?=\S)| *$| )/;

export function markdown(text) {
  const made = document.createDocumentFragment();
  for (const block of parse(text)) made.append(render(block));
  return made;
}

export class MarkdownStream {
  #container;
  #kept = 0; // characters whose blocks are in the page for good
  #tail = []; // { block, node } of the blocks that may still change

  constructor(container) {
    this.#container = container;
  }

  // Show `text`, which starts with what was shown before.
  update(text) {
    const rest = text.slice(this.#kept);
    const blocks = parse(rest);
    const shown = blocks.map((block, index) => this.#show(block, this.#tail[index]));
    for (const { node } of this.#tail.slice(blocks.length)) node.remove();
    // What follows a block decides where it ends, so a block is final once it is certain what the next one is.
    const firm = Math.max(0, blocks.findLastIndex((block) => isCertain(rest, block)));
    this.#tail = shown.slice(firm);
    if (firm > 0) this.#kept += blocks[firm].start;
  }

  #show(block, old) {
    if (old && grownCode(old, block)) return { block, node: old.node };
    const node = render(block);
    if (old) old.node.replaceWith(node);
    else this.#container.append(node);
    return { block, node };
  }
}

// True when no further text can change what kind of block this is: its first line is whole; of a table, two lines.
function isCertain(text, { start, kind }) {
  const end = text.indexOf("\n", start);
  return end >= 0 && (kind !== "table" || text.includes("\n", end + 1));
}

// Long code arrives line by line: append to its text node in place of making it again.
function grownCode(old, block) {
  if (old.block.kind !== "code" || block.kind !== "code" || old.block.language !== block.language) return false;
  if (!block.text.startsWith(old.block.text)) return false;
  old.node.querySelector("code").firstChild.appendData(block.text.slice(old.block.text.length));
  return true;
}

// The blocks of a text, each with `start`, the offset of its first line.
export function parse(text, depth = 0) {
  const raw = text.split("\n");
  const lines = raw.map((line) => line.replace(/\r$/, "").replace(/^[ \t]+/, (lead) => lead.replaceAll("\t", "    ")));
  const offsets = [0];
  for (const line of raw) offsets.push(offsets.at(-1) + line.length + 1);
  const blocks = [];
  let at = 0;
  while (at < lines.length) {
    if (!lines[at].trim()) {
      at += 1;
      continue;
    }
    const [block, next] = readBlock(lines, at, depth);
    blocks.push({ ...block, start: offsets[at] });
    at = next;
  }
  return blocks;
}

function readBlock(lines, at, depth) {
  const line = lines[at];
  const heading = HEADING.exec(line);
  if (FENCE.test(line)) return readCode(lines, at);
  if (heading) {
    const title = (heading[2] ?? "").trim();
    return [{ kind: "heading", level: heading[1].length, text: title.replace(/(^| )#+$/, "") }, at + 1];
  }
  if (RULE.test(line)) return [{ kind: "rule" }, at + 1];
  if (depth < MAX_DEPTH && QUOTE.test(line)) return readQuote(lines, at, depth);
  if (depth < MAX_DEPTH && ITEM.test(line)) return readList(lines, at, depth);
  if (startsTable(lines, at)) return readTable(lines, at);
  return readParagraph(lines, at);
}

const interrupts = (line) =>
  FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line) || /^ *([-*+]|1[.)]) +\S/.test(line);

function readParagraph(lines, at) {
  let end = at + 1;
  while (end < lines.length && lines[end].trim() && !interrupts(lines[end]) && !startsTable(lines, end)) end += 1;
  return [{ kind: "paragraph", text: lines.slice(at, end).map((line) => line.trim()).join("\n") }, end];
}

function readCode(lines, at) {
  const [, indent, fence, language] = FENCE.exec(lines[at]);
  const closes = (line) => {
    const mark = line.trim();
    return mark.length >= fence.length && mark === fence[0].repeat(mark.length);
  };
  let end = at + 1;
  while (end < lines.length && !closes(lines[end])) end += 1;
  const open = end === lines.length && lines[end - 1] === "" && end > at + 1; // the next line has not begun
  const body = lines.slice(at + 1, open ? end - 1 : end).map((line) => dedent(line, indent.length));
  return [{ kind: "code", language: language.trim().split(" ")[0], text: body.join("\n") }, end + 1];
}

function readQuote(lines, at, depth) {
  let end = at;
  while (end < lines.length && QUOTE.test(lines[end])) end += 1;
  const inner = lines.slice(at, end).map((line) => line.replace(QUOTE, "")).join("\n");
  return [{ kind: "quote", blocks: parse(inner, depth + 1) }, end];
}

const leading = (line) => line.length - line.trimStart().length;
const dedent = (line, width) => line.slice(Math.min(leading(line), width));

function readList(lines, at, depth) {
  const first = ITEM.exec(lines[at]);
  const base = first[1].length;
  const ordered = /\d/.test(first[2]);
  const sameList = (line) => {
    const item = ITEM.exec(line);
    return item && leading(line) < base + 2 && /\d/.test(item[2]) === ordered && !RULE.test(line);
  };
  const items = [];
  let end = at;
  while (end < lines.length && sameList(lines[end])) {
    const width = ITEM.exec(lines[end])[0].length;
    const body = [lines[end].slice(width)];
    end += 1;
    while (end < lines.length && belongs(lines, end, base, sameList)) {
      body.push(dedent(lines[end], width));
      end += 1;
    }
    items.push(parse(body.join("\n"), depth + 1));
    // Blank lines between items do not end the list; anything else that follows them does.
    let next = end;
    while (next < lines.length && !lines[next].trim()) next += 1;
    if (next > end && next < lines.length && sameList(lines[next])) end = next;
  }
  return [{ kind: "list", ordered, first: ordered ? parseInt(first[2], 10) : 1, items }, end];
}

function belongs(lines, at, base, sameList) {
  const line = lines[at];
  if (!line.trim()) {
    const next = lines.slice(at, at + 3).find((text) => text.trim());
    return next !== undefined && leading(next) >= base + 2;
  }
  if (leading(line) >= base + 2) return true;
  return Boolean(lines[at - 1].trim()) && !sameList(line) && !interrupts(line) && !ITEM.test(line);
}

function cells(line) {
  const found = [""];
  const row = line.trim().replace(/^\|/, "");
  for (let at = 0; at < row.length; at += 1) {
    if (row[at] === "\\" && row[at + 1] === "|") found[found.length - 1] += row[(at += 1)];
    else if (row[at] === "|") found.push("");
    else found[found.length - 1] += row[at];
  }
  if (found.length > 1 && !found.at(-1).trim()) found.pop();
  return found.map((cell) => cell.trim());
}

function startsTable(lines, at) {
  if (!lines[at].includes("|") || !lines[at + 1]?.includes("-") || !/^[ |:-]+$/.test(lines[at + 1])) return false;
  const marks = cells(lines[at + 1]);
  return marks.every((mark) => /^:?-+:?$/.test(mark)) && marks.length === cells(lines[at]).length;
}

function readTable(lines, at) {
  const heads = cells(lines[at]);
  const right = cells(lines[at + 1]).map((mark) => mark.endsWith(":"));
  const rows = [];
  let end = at + 2;
  while (end < lines.length && lines[end].includes("|") && !interrupts(lines[end])) {
    const row = cells(lines[end]);
    rows.push(heads.map((_, index) => row[index] ?? ""));
    end += 1;
  }
  return [{ kind: "table", heads, right, rows }, end];
}

function render(block) {
  return RENDERERS[block.kind](block);
}

const RENDERERS = {
  paragraph: (block) => element("p", {}, inline(block.text)),
  // A heading of an answer is below the page's own h1 and h2.
  heading: (block) => element(`h${Math.min(6, block.level + 2)}`, {}, inline(block.text)),
  rule: () => element("hr"),
  quote: (block) => element("blockquote", {}, block.blocks.map(render)),
  code: renderCode,
  list: renderList,
  table: renderTable,
};

function renderCode(block) {
  const copy = element("button", { type: "button", className: "quiet copy-code" }, "Copy");
  const bar = element("div", { className: "code-bar" }, element("span", {}, block.language || "code"), copy);
  const label = block.language ? `Code in ${block.language}` : "Code";
  const code = element("code", {}, document.createTextNode(block.text));
  return element("div", { className: "code" }, bar, scrollable("pre", label, code));
}

// A region that scrolls sideways, reachable by keyboard.
function scrollable(name, label, ...children) {
  return element(name, { className: "scroll", tabIndex: 0, role: "region", "aria-label": label }, ...children);
}

function renderList(block) {
  const list = element(block.ordered ? "ol" : "ul");
  if (block.ordered && block.first !== 1) list.start = block.first;
  for (const blocks of block.items) {
    const item = element("li");
    blocks.forEach((inner, index) => {
      if (index === 0 && inner.kind === "paragraph") item.append(inline(inner.text));
      else item.append(render(inner));
    });
    list.append(item);
  }
  return list;
}

function renderTable(block) {
  const cell = (name, text, index) => {
    const made = element(name, block.right[index] ? { className: "number" } : {}, inline(text));
    if (name === "th") made.scope = "col";
    return made;
  };
  const head = element("thead", {}, element("tr", {}, block.heads.map((text, index) => cell("th", text, index))));
  const rows = block.rows.map((row) => element("tr", {}, row.map((text, index) => cell("td", text, index))));
  const table = element("table", {}, head, element("tbody", {}, rows));
  return scrollable("div", "Table", table);
}
