// The settings panel: a system prompt and the sampling options, remembered in this browser.
//
// A field left empty is not sent, so that the server's own default holds; a value out of range is never sent. Only the
// temperature has a default of the page: OpenAI's default of 1 lets small models wander off.

import { element } from "./inline.js";
import { keep, recall } from "./memory.js";

// The one list of sampling options: name in the request, label, help, smallest, largest, whole numbers only.
const OPTIONS = [
  ["temperature", "Temperature", "0 to 2. 0 always takes the likeliest token.", 0, 2, false],
  ["max_tokens", "Longest answer", "Tokens, at least 1.", 1, 1e6, true],
  ["top_p", "Top p", "Above 0, up to 1. Keeps the likeliest tokens of this total probability.", 0.0001, 1, false],
  ["top_k", "Top k", "Keeps this many of the likeliest tokens. 0 keeps all.", 0, 1e6, true],
  ["min_p", "Min p", "0 to 1. Drops tokens below this share of the likeliest one.", 0, 1, false],
  ["repetition_penalty", "Repetition penalty", "Above 0, up to 2. More than 1 makes repeating rarer.", 0.01, 2, false],
  ["seed", "Seed", "A whole number. The same seed gives the same answer.", 0, 2 ** 32 - 1, true],
];

const DEFAULTS = { temperature: 0.7 };

// The number in a field's text; null when it is empty, undefined when it may not be sent.
function parse(text, [, , , smallest, largest, whole]) {
  if (!text.trim()) return null;
  const value = Number(text.trim().replace(",", "."));
  return value >= smallest && value <= largest && (!whole || Number.isInteger(value)) ? value : undefined;
}

export class Settings {
  // `form` holds the system prompt and the empty `#options`; `changed` gets the number of settings in use.
  constructor(form, changed) {
    this.form = form;
    this.changed = changed;
    this.system = form.querySelector("#system");
    this.fields = OPTIONS.map((option) => this.#field(option));
    form.querySelector("#options").append(...this.fields.map(({ row }) => row));
    const kept = recall("settings", {});
    this.#fill(kept && typeof kept === "object" ? kept : {});
    form.addEventListener("input", () => this.#update());
    form.querySelector("#restore").addEventListener("click", () => this.restore());
    this.#update();
  }

  restore() {
    this.#fill({});
    this.#update();
  }

  // The sampling options of a request.
  values() {
    return { ...DEFAULTS, ...this.#given() };
  }

  #given() {
    const pairs = this.fields.map(({ option, input }) => [option[0], parse(input.value, option)]);
    return Object.fromEntries(pairs.filter(([, value]) => value !== null && value !== undefined));
  }

  systemPrompt() {
    return this.system.value.trim();
  }

  #field(option) {
    const [name, label, help] = option;
    const decimal = option[5] ? "numeric" : "decimal";
    const input = element("input", { id: `option-${name}`, type: "text", inputMode: decimal, autocomplete: "off" });
    input.placeholder = String(DEFAULTS[name] ?? "default");
    input.setAttribute("aria-describedby", `help-${name}`);
    const about = element("p", { id: `help-${name}`, className: "soft" }, help);
    const title = element("label", { htmlFor: input.id }, label);
    const row = element("div", { className: "field option" }, title, input, about);
    return { option, input, row };
  }

  #fill(values) {
    this.system.value = typeof values.system === "string" ? values.system : "";
    for (const { option, input } of this.fields) {
      input.value = typeof values[option[0]] === "number" ? String(values[option[0]]) : "";
    }
  }

  #update() {
    for (const { option, input } of this.fields) {
      const wrong = parse(input.value, option) === undefined;
      input.setAttribute("aria-invalid", String(wrong));
      input.nextElementSibling.textContent = wrong ? `Not sent: ${option[2]}` : option[2];
    }
    const values = this.#given();
    const system = this.systemPrompt();
    keep("settings", { ...values, ...(system ? { system } : {}) });
    this.changed(Object.keys(values).length + (system ? 1 : 0));
  }
}
