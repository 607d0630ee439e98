// How turns look: what the reader wrote, a model's answer as it grows, and an error in the place of an answer.

import { MarkdownStream } from "./markdown.js";
import { formatNumber, formatSeconds, plural, sentence } from "./units.js";

const NUMBERS_MS = 250; // numbers that change faster cannot be read
const TITLES = {
  401: "An API key is needed",
  403: "Not allowed",
  404: "Not found",
  413: "Too long",
  429: "The server is busy",
  503: "The server is not ready",
};
const ADVICE = { context_length_exceeded: "Start a new chat, or edit your last message and make it shorter." };
const FINISHES = { length: "stopped at its token limit", stopped: "stopped by you", lost: "incomplete" };

function fromTemplate(id) {
  return document.getElementById(id).content.firstElementChild.cloneNode(true);
}

export function questionView(turn) {
  const view = fromTemplate("question");
  view.querySelector(".text").textContent = turn.content;
  return view;
}

// An answer: `write` while it streams, `finish` with its statistics when it ends.
export class AnswerView {
  #stream;
  #thoughts;
  #body;
  #numbers;
  #text = "";
  #frame = 0;
  #timer = 0;

  // `drawn` is called after each change of the page.
  constructor(turn, drawn = () => {}) {
    this.element = fromTemplate("answer");
    this.element.querySelector(".who").textContent = turn.model || "Model";
    this.#body = this.element.querySelector(".text");
    this.#numbers = this.element.querySelector(".numbers");
    this.#stream = new MarkdownStream(this.#body);
    this.#thoughts = new MarkdownStream(this.element.querySelector(".thoughts"));
    this.drawn = drawn;
    if (turn.content) this.#draw(turn.content);
    this.#numbers.textContent = turn.stats ? statsText(turn.stats) : "";
  }

  // Start to show the time and, from the first token on, the speed; `live` gives the statistics of this moment.
  start(live) {
    this.element.classList.add("running");
    this.element.setAttribute("aria-busy", "true");
    const show = () => {
      this.#numbers.textContent = liveText(live());
    };
    show();
    this.#timer = setInterval(show, NUMBERS_MS);
  }

  // All of the answer so far. However often this is called, the page changes once a frame.
  write(text) {
    this.#text = text;
    this.#frame ||= requestAnimationFrame(() => this.#draw(this.#text));
  }

  finish(turn) {
    clearInterval(this.#timer);
    if (turn.content) this.#draw(turn.content);
    this.element.classList.remove("running");
    this.element.removeAttribute("aria-busy");
    this.#numbers.textContent = statsText(turn.stats);
    this.drawn();
  }

  plainText() {
    return this.#body.textContent;
  }

  #draw(text) {
    cancelAnimationFrame(this.#frame);
    this.#frame = 0;
    const [thoughts, answer] = withoutThoughts(text);
    if (thoughts) {
      this.element.querySelector("details").hidden = false;
      this.#thoughts.update(thoughts);
    }
    this.#stream.update(answer);
    this.drawn();
  }
}

// [thoughts, answer]: some models think aloud between <think> and </think> before they answer.
function withoutThoughts(text) {
  const start = /^\s*<think>\s*/.exec(text);
  if (!start) return ["", text];
  const end = text.indexOf("</think>");
  if (end < 0) return [text.slice(start[0].length), ""];
  return [text.slice(start[0].length, end).trimEnd(), text.slice(end + "</think>".length)];
}

function liveText({ tokens, firstSeconds, rate, waitedSeconds }) {
  if (firstSeconds === null) return `Waiting for the first token, ${formatNumber(waitedSeconds, 1)}\u00a0s`;
  return joined([speed(rate), plural(tokens, "token"), `first token after ${formatSeconds(firstSeconds)}`]);
}

function statsText({ tokens, exact, firstSeconds, rate, finish }) {
  if (firstSeconds === null) return FINISHES[finish] ?? "an empty answer";
  const count = `${exact ? "" : "about "}${plural(tokens, "token")}`;
  return joined([speed(rate), count, `first token after ${formatSeconds(firstSeconds)}`, FINISHES[finish]]);
}

function joined(parts) {
  return parts.filter(Boolean).join(" · ");
}

function speed(rate) {
  return rate ? `${formatNumber(rate, rate < 100 ? 1 : 0)}\u00a0tokens/s` : "";
}

// An error with a way on. For a busy server the button counts down to when it may be asked again.
export function errorView(error, { again, askKey }) {
  const view = fromTemplate("failure");
  const button = view.querySelector("button");
  view.querySelector(".title").textContent = TITLES[error.status] ?? "No answer";
  view.querySelector(".text").textContent = sentence(error.message);
  view.querySelector(".advice").textContent = ADVICE[error.code] ?? "";
  button.addEventListener("click", error.status === 401 ? askKey : again);
  if (error.status === 401) button.textContent = "Enter an API key";
  if (error.retryAfterSeconds > 0) countDown(button, error.retryAfterSeconds);
  return view;
}

function countDown(button, seconds) {
  const end = performance.now() + seconds * 1000;
  const show = () => {
    const left = Math.ceil((end - performance.now()) / 1000);
    button.disabled = left > 0;
    button.textContent = left > 0 ? `Try again in ${left}\u00a0s` : "Try again";
    if (left > 0 && (button.isConnected || left > seconds - 1)) setTimeout(show, 200);
  };
  show();
}
