// One conversation: its turns, the answer that runs, and what may be done with them.

import { ApiError, streamChat } from "./api.js";
import { keep } from "./memory.js";
import { AnswerView, errorView, questionView } from "./turns.js";

// Tokens and seconds of one answer. A chunk counts as one token until the server's usage says the number.
class Meter {
  #started = performance.now();
  #first = null;
  #last = null;
  #tokens = 0;
  #exact = false;

  take(chunk) {
    if (chunk.usage) {
      this.#tokens = chunk.usage.completion_tokens;
      this.#exact = true;
    }
    if (!chunk.choices?.[0]?.delta?.content) return;
    this.#last = performance.now();
    this.#first ??= this.#last;
    if (!this.#exact) this.#tokens += 1;
  }

  read(finish = null) {
    const spanSeconds = (this.#last - this.#first) / 1000;
    return {
      tokens: this.#tokens,
      exact: this.#exact,
      firstSeconds: this.#first === null ? null : (this.#first - this.#started) / 1000,
      waitedSeconds: (performance.now() - this.#started) / 1000,
      rate: this.#tokens > 1 && spanSeconds > 0.001 ? (this.#tokens - 1) / spanSeconds : null,
      finish,
    };
  }
}

export class Conversation {
  turns = [];
  running = null; // { controller, turn, view, meter } of the answer that streams

  // `ask()` gives { model, key, system, options } for a request; the other callbacks tell the page what happened.
  constructor(list, { ask, changed, drawn, answered, askKey, notKept }) {
    this.list = list;
    this.callbacks = { ask, changed, drawn, answered, askKey, notKept };
  }

  show(turns) {
    this.stop();
    this.running = null;
    this.turns = [...turns];
    this.list.replaceChildren(
      ...this.turns.map((turn) => (turn.role === "user" ? questionView(turn) : new AnswerView(turn).element)),
    );
    if (this.turns.at(-1)?.role === "user") this.#fail(new ApiError("This message has no answer yet."));
    this.#save();
  }

  send(text) {
    const turn = { role: "user", content: text };
    this.turns.push(turn);
    this.list.querySelector(".failure")?.remove();
    this.list.append(questionView(turn));
    return this.answer();
  }

  // Answer the last question, in place of the answer or the error that is there.
  retry() {
    if (this.running) return;
    this.list.querySelector(".failure")?.remove();
    if (this.turns.at(-1)?.role === "assistant") {
      this.turns.pop();
      this.list.lastElementChild.remove();
    }
    if (this.turns.length) this.answer();
  }

  stop() {
    this.running?.controller.abort();
  }

  lastQuestion() {
    return this.turns.findLast((turn) => turn.role === "user");
  }

  // Put `text` in the place of the last question and answer it; what followed the old one is dropped.
  replaceLast(text) {
    this.turns.length = this.turns.findLastIndex((turn) => turn.role === "user");
    const old = [...this.list.querySelectorAll(".question")].at(-1);
    while (old.nextElementSibling) old.nextElementSibling.remove();
    old.remove();
    return this.send(text);
  }

  async answer() {
    const { model, key, system, options } = this.callbacks.ask();
    const turn = { role: "assistant", content: "", model };
    const view = new AnswerView(turn, this.callbacks.drawn);
    const run = { controller: new AbortController(), turn, meter: new Meter(), view };
    this.running = run;
    this.list.append(view.element);
    view.start(() => run.meter.read());
    this.#save();
    this.callbacks.drawn();
    const body = { model, messages: messages(system, this.turns), ...options };
    const [finish, error] = await follow(run, body, key);
    if (this.running !== run) return view.finish({ ...turn, stats: run.meter.read(finish) }); // another chat has begun
    this.running = null;
    this.#finish(run, finish, error);
  }

  // The turns, with what has come of an answer that still runs.
  snapshot() {
    const { running } = this;
    const partial = running?.turn.content ? [{ ...running.turn, stats: running.meter.read("lost") }] : [];
    return [...this.turns, ...partial];
  }

  keepNow() {
    if (!keep("turns", this.snapshot())) this.callbacks.notKept();
  }

  #finish({ turn, view, meter }, finish, error) {
    if (error && !turn.content) {
      view.finish({ ...turn, stats: meter.read(finish) });
      view.element.remove();
    } else {
      turn.stats = meter.read(finish);
      this.turns.push(turn);
      view.finish(turn);
    }
    if (error) this.#fail(error);
    else this.callbacks.answered(turn, view.plainText());
    this.#save();
  }

  #fail(error) {
    const again = () => this.retry();
    this.list.append(errorView(error, { again, askKey: this.callbacks.askKey }));
    this.callbacks.drawn();
    if (error.status === 401) this.callbacks.askKey();
  }

  #save() {
    this.keepNow();
    this.callbacks.changed();
  }
}

// Stream an answer into its turn and view: [how it finished, the error that ended it or null].
async function follow({ controller, turn, view, meter }, body, key) {
  let finish = "stop";
  try {
    for await (const chunk of streamChat(body, key, controller.signal)) {
      const choice = chunk.choices?.[0];
      meter.take(chunk);
      if (choice?.finish_reason) finish = choice.finish_reason;
      if (!choice?.delta?.content) continue;
      turn.content += choice.delta.content;
      view.write(turn.content);
    }
    return [finish, null];
  } catch (error) {
    return error.name === "AbortError" ? ["stopped", null] : ["lost", error];
  }
}

// The messages of a request. Two in a row of one role become one, because many chat templates refuse them.
function messages(system, turns) {
  const made = system ? [{ role: "system", content: system }] : [];
  for (const { role, content } of turns) {
    if (!content) continue;
    if (made.at(-1)?.role === role) made.at(-1).content += `\n\n${content}`;
    else made.push({ role, content });
  }
  return made;
}
