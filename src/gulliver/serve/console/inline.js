// Inline markdown to DOM nodes. Model text is hostile: it becomes text nodes and elements made here, never HTML.
//
// A hand-written scanner in place of regular expressions with nested repeats: its time stays near linear whatever a
// model writes, because a closing mark that was not found once is not looked for again.

const SPECIAL = /[\\`*_~[!<&\n]|https?:\/\//g;
const ENTITIES = { amp: "&", lt: "<", gt: ">", quot: '"', "#39": "'", nbsp: "\u00a0" };
// [label](address "title"), the address perhaps in <> or with parentheses of its own.
const LINK = /^\[((?:[^[\]\\]|\\.)*)\]\(\s?(<[^<>\s]*>|[^\s()]*(?:\([^\s()]*\)[^\s()]*)*)(?:\s"[^"]*")?\s?\)/;
const MAX_DEPTH = 6;
const MAX_LINK_LENGTH = 2000;

// An element with properties (or attributes) and children: texts, nodes, or lists of them of any length.
export function element(name, properties = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (key in made) made[key] = value;
    else made.setAttribute(key, value);
  }
  for (const child of children.flat()) made.append(child);
  return made;
}

// The address if a link may lead there: http, https or mailto, written out; null otherwise.
export function safeAddress(text) {
  const address = text.trim();
  if (/[\u0000-\u0020\u007f]/.test(address) || !/^(https?:\/\/|mailto:)/i.test(address)) return null;
  try {
    return new URL(address).href;
  } catch {
    return null;
  }
}

function link(address, ...children) {
  const rel = "noopener noreferrer nofollow";
  return element("a", { href: address, title: address, target: "_blank", rel }, ...children);
}

// A DocumentFragment for one run of text. `inLink` keeps links out of links.
export function inline(text, depth = 0, inLink = false) {
  const scanner = { text, depth, inLink, missing: new Set(), out: document.createDocumentFragment() };
  let plain = "";
  let at = 0;
  const flush = () => {
    if (plain) scanner.out.append(plain);
    plain = "";
  };
  while (at < text.length) {
    SPECIAL.lastIndex = at;
    const found = SPECIAL.exec(text);
    if (!found) break;
    plain += text.slice(at, found.index);
    const made = special(scanner, found.index, found[0]);
    if (made.node) {
      flush();
      scanner.out.append(made.node);
    } else {
      plain += made.text;
    }
    at = made.end;
  }
  plain += text.slice(at);
  flush();
  return scanner.out;
}

function special(scanner, at, mark) {
  const { text } = scanner;
  const made =
    mark === "\n" ? { node: element("br"), end: at + 1 }
    : mark === "\\" ? escaped(text, at)
    : mark === "&" ? entity(text, at)
    : mark === "`" ? codeSpan(scanner, at)
    : mark === "[" ? bracketLink(scanner, at, at)
    : mark === "!" ? text[at + 1] === "[" && bracketLink(scanner, at, at + 1) // a picture would load: show its link
    : mark === "<" ? angleLink(scanner, at)
    : mark.startsWith("http") ? bareLink(scanner, at)
    : emphasis(scanner, at, mark);
  return made || { text: mark, end: at + mark.length };
}

function escaped(text, at) {
  const next = text[at + 1];
  if (next === "\n") return { node: element("br"), end: at + 2 };
  return next && /[!-/:-@[-`{-~]/.test(next) ? { text: next, end: at + 2 } : null;
}

function entity(text, at) {
  const end = at + text.slice(at, at + 8).indexOf(";"); // no further: a rest without one would be searched at every mark
  const name = text.slice(at + 1, Math.max(end, at + 1));
  return Object.hasOwn(ENTITIES, name) ? { text: ENTITIES[name], end: end + 1 } : null;
}

function runLength(text, at) {
  let end = at + 1;
  while (text[end] === text[at]) end += 1;
  return end - at;
}

function codeSpan(scanner, at) {
  const { text, missing } = scanner;
  const length = runLength(text, at);
  const fence = "`".repeat(length);
  let close = missing.has(fence) ? -1 : text.indexOf(fence, at + length);
  while (close >= 0 && runLength(text, close) !== length) {
    close = text.indexOf(fence, close + runLength(text, close));
  }
  if (close < 0) {
    missing.add(fence);
    return { text: fence, end: at + length };
  }
  let body = text.slice(at + length, close).replaceAll("\n", " ");
  if (/^ .* $/.test(body) && body.trim()) body = body.slice(1, -1);
  return { node: element("code", {}, body), end: close + length };
}

const isSpace = (letter) => letter === undefined || /\s/.test(letter);
const isWord = (letter) => letter !== undefined && /[\p{L}\p{N}_]/u.test(letter);

function emphasis(scanner, at, mark) {
  const { text, depth, missing } = scanner;
  const run = runLength(text, at);
  const length = mark === "~" ? 2 : Math.min(run, 3);
  const fence = mark.repeat(length);
  const literal = { text: mark.repeat(run), end: at + run };
  const allowed = mark === "~" ? run === 2 : run <= 3 && !(mark === "_" && isWord(text[at - 1]));
  const opens = allowed && !isSpace(text[at + run]);
  if (!opens || depth >= MAX_DEPTH || missing.has(fence)) return literal;
  const close = closing(text, at + run, mark, length);
  if (close < 0) {
    missing.add(fence);
    return literal;
  }
  const body = inline(text.slice(at + length, close), depth + 1, scanner.inLink);
  const node =
    mark === "~" ? element("del", {}, body)
    : length === 3 ? element("strong", {}, element("em", {}, body))
    : element(length === 2 ? "strong" : "em", {}, body);
  return { node, end: close + length };
}

// Where a run of exactly `length` marks closes what was opened before `from`; -1 when nowhere.
function closing(text, from, mark, length) {
  let at = text.indexOf(mark, from);
  while (at >= 0) {
    const run = runLength(text, at);
    const fits = run === length || (run === 3 && length < 3 && mark !== "~");
    const inside = text[at - 1] !== "\\" && !isSpace(text[at - 1]);
    if (fits && inside && !(mark === "_" && isWord(text[at + run]))) return run === length ? at : at + run - length;
    at = text.indexOf(mark, at + run);
  }
  return -1;
}

function bracketLink(scanner, at, open) {
  if (scanner.inLink || scanner.depth >= MAX_DEPTH) return null;
  const text = scanner.text.slice(open, open + MAX_LINK_LENGTH);
  const found = LINK.exec(text);
  const address = found && safeAddress(found[2].replace(/^<|>$/g, ""));
  if (!address) return null;
  const label = inline(found[1] || address, scanner.depth + 1, true);
  return { node: link(address, label), end: open + found[0].length };
}

function angleLink(scanner, at) {
  const found = /^<((?:https?:\/\/|mailto:)[^\s<>]+)>/i.exec(scanner.text.slice(at, at + MAX_LINK_LENGTH));
  const address = found && !scanner.inLink && safeAddress(found[1]);
  return address ? { node: link(address, found[1]), end: at + found[0].length } : null;
}

function bareLink(scanner, at) {
  if (scanner.inLink || isWord(scanner.text[at - 1])) return null;
  let shown = /^[^\s<>"'`\]*]+/.exec(scanner.text.slice(at, at + MAX_LINK_LENGTH))[0];
  const openParts = shown.split("(").length;
  shown = shown.replace(openParts === shown.split(")").length ? /[.,;:!?]+$/ : /[.,;:!?)]+$/, "");
  const address = safeAddress(shown);
  return address && shown.length > 8 ? { node: link(address, shown), end: at + shown.length } : null;
}
