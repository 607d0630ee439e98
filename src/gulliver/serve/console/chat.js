// The chat page: wires the header, the composer, the dialogs and the conversation to each other.

import { factsView, readAbout, showAbout, wireTabs } from "./about.js";
import { getJson } from "./api.js";
import { Conversation } from "./conversation.js";
import { apiKey, forgetEverything, keep, recall, recallTurns } from "./memory.js";
import { Scroller } from "./scroll.js";
import { Settings } from "./settings.js";
import { copyText } from "./copy.js";

const find = (id) => document.getElementById(id);
const message = find("message");
const picker = find("model");
const touch = matchMedia("(pointer: coarse)");

const scroller = new Scroller(find("conversation"), find("turns"), find("jump"));
const settings = new Settings(find("settings-form"), showSettingsCount);
const conversation = new Conversation(find("turns"), {
  ask: () => ({ model: picker.value, key: apiKey.get(), system: settings.systemPrompt(), options: settings.values() }),
  changed: showState,
  drawn: () => scroller.follow(),
  answered: (turn, text) => say(`${turn.model} answered: ${text || "nothing"}`),
  askKey,
  notKept: () => notice("This browser has no room to keep the conversation; it is lost when the page closes."),
});
let editing = false;
let afterKey = null; // what to do again once there is a key

// Where typing goes on; not on a touch screen, where it would call up the keyboard.
function focusMessage() {
  if (!touch.matches) message.focus({ preventScroll: true });
}

// Text for screen readers; an answer is read when it is whole, not token by token.
function say(text) {
  find("spoken").textContent = text;
}

function notice(text, label = "", act = null) {
  const box = find("notice");
  const [words, button] = box.children;
  words.textContent = text;
  button.textContent = label;
  button.hidden = !act;
  button.onclick = () => {
    box.hidden = true;
    act();
  };
  box.hidden = !text;
}

function showState() {
  const running = Boolean(conversation.running);
  document.body.classList.toggle("running", running);
  find("send").hidden = running;
  find("stop").hidden = !running;
  find("send").disabled = !message.value.trim() || picker.disabled;
  find("welcome").hidden = conversation.turns.length > 0;
  find("new").disabled = !conversation.turns.length;
  if (document.activeElement === document.body) focusMessage();
}

function showSettingsCount(count) {
  find("settings-count").hidden = !count;
  find("settings-count").textContent = count;
  find("settings").setAttribute("aria-label", count ? `Settings, ${count} in use` : "Settings");
}

// ---- models

async function loadModels() {
  notice("");
  try {
    const { data } = await getJson("v1/models", apiKey.get());
    const names = await thatChat(data.map(({ id }) => id));
    if (!names.length) return notice("This server serves no model that chats.", "Look again", loadModels);
    const wanted = recall("model", "");
    picker.replaceChildren(...names.map((name) => new Option(name, name, false, name === wanted)));
    picker.disabled = false;
    find("about").disabled = false;
    showState();
    await showFacts();
  } catch (error) {
    picker.replaceChildren(new Option("No model"));
    if (error.status === 401) askKey(loadModels);
    else notice(error.message, "Try again", loadModels);
  }
}

// The names without those of models that only make embeddings.
async function thatChat(names) {
  const known = await Promise.allSettled(names.map((name) => readAbout(name, apiKey.get())));
  return names.filter((_, index) => known[index].value?.can?.includes("generate") ?? true);
}

// What the chosen model is, on the page that has no question yet.
async function showFacts() {
  const { value } = picker;
  try {
    const about = await readAbout(value, apiKey.get());
    if (picker.value === value) find("facts").replaceChildren(factsView(about));
    find("facts").hidden = false;
  } catch {
    find("facts").hidden = true; // the evidence button says why when it is asked
  }
}

picker.addEventListener("change", () => {
  keep("model", picker.value);
  showFacts();
});

// ---- dialogs

for (const dialog of document.querySelectorAll("dialog")) {
  dialog.querySelector(".close").addEventListener("click", () => dialog.close());
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog) dialog.close(); // the backdrop
  });
}
wireTabs(document.querySelector("[role=tablist]"));

find("about").addEventListener("click", async () => {
  try {
    showAbout(find("about-dialog"), await readAbout(picker.value, apiKey.get()));
    find("about-dialog").showModal();
  } catch (error) {
    if (error.status === 401) askKey(() => find("about").click());
    else notice(`Nothing is known about ${picker.value}. ${error.message}`, "Try again", () => find("about").click());
  }
});

find("settings").addEventListener("click", () => find("settings-dialog").showModal());
find("settings-form").addEventListener("submit", (event) => event.preventDefault());

find("forget").addEventListener("click", () => {
  const button = find("forget");
  if (button.dataset.sure) {
    conversation.show([]);
    settings.restore();
    forgetEverything();
    find("settings-dialog").close();
    notice("The conversation, the settings and the key are forgotten.");
  }
  button.dataset.sure = button.dataset.sure ? "" : "yes";
  button.textContent = button.dataset.sure ? "Press again to forget" : "Forget everything";
});
find("settings-dialog").addEventListener("close", () => {
  find("forget").dataset.sure = "";
  find("forget").textContent = "Forget everything";
});

function askKey(then = () => conversation.retry()) {
  afterKey = typeof then === "function" ? then : () => conversation.retry();
  const refused = "The server did not accept the key.";
  find("key-reason").textContent = apiKey.get() ? refused : "This server answers only with a key.";
  find("key").value = "";
  if (!find("key-dialog").open) find("key-dialog").showModal();
}

find("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  apiKey.set(find("key").value.trim());
  find("key-dialog").close();
  if (picker.disabled && afterKey !== loadModels) loadModels();
  afterKey?.();
});
find("key-dialog").addEventListener("close", () => {
  if (picker.disabled) notice("No model is shown without an API key.", "Enter a key", () => askKey(loadModels));
});

// ---- the composer

function fitMessage() {
  message.style.height = "auto";
  message.style.height = `${message.scrollHeight + 2}px`;
  showState();
}

function edit(on) {
  editing = on;
  find("editing").hidden = !on;
  message.value = on ? conversation.lastQuestion().content : "";
  fitMessage();
  message.focus();
}

function send(text) {
  if (!text.trim() || conversation.running || picker.disabled) return;
  const replace = editing;
  if (editing) edit(false);
  message.value = "";
  fitMessage();
  notice("");
  scroller.toEnd();
  if (replace) conversation.replaceLast(text.trim());
  else conversation.send(text.trim());
  if (touch.matches) message.blur(); // the on-screen keyboard would cover the answer
  else message.focus();
}

function stop() {
  conversation.stop();
  focusMessage();
}

message.addEventListener("input", fitMessage);
message.addEventListener("keydown", (event) => {
  if (event.isComposing || event.keyCode === 229) return; // an input method is choosing a character
  if (event.key === "Enter" && !event.shiftKey) {
    event.preventDefault();
    send(message.value);
  } else if (event.key === "ArrowUp" && !message.value && !conversation.running && conversation.lastQuestion()) {
    event.preventDefault();
    edit(true);
  }
});
find("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send(message.value);
});
find("stop").addEventListener("click", (event) => {
  if (event.detail < 2) stop(); // the second click of a double click on "Send" lands here
});
find("cancel-edit").addEventListener("click", () => edit(false));
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || event.isComposing || document.querySelector("dialog[open]")) return;
  if (conversation.running) stop();
  else if (editing) edit(false);
});

// ---- the conversation

find("welcome").addEventListener("click", (event) => {
  if (event.target.closest(".prompts button")) send(event.target.textContent);
});

find("turns").addEventListener("click", async (event) => {
  const button = event.target.closest("button");
  if (!button) return;
  if (button.matches(".retry")) {
    conversation.retry();
    focusMessage();
  }
  if (button.matches(".edit") && !conversation.running) edit(true);
  if (button.matches(".copy")) {
    const index = [...find("turns").children].indexOf(button.closest("li"));
    await copied(button.querySelector("span"), conversation.turns[index].content);
  }
});

document.addEventListener("click", (event) => {
  const button = event.target.closest(".copy-code");
  if (button) copied(button, button.closest(".code").querySelector("code").textContent);
});

async function copied(label, text) {
  label.textContent = (await copyText(text, label.closest("li, dialog"))) ? "Copied" : "Not copied";
  say(label.textContent);
  setTimeout(() => {
    label.textContent = "Copy";
  }, 1500);
}

find("new").addEventListener("click", () => {
  if (editing) edit(false);
  const before = conversation.snapshot();
  const undo = () => {
    conversation.show(before);
    scroller.toEnd();
  };
  conversation.show([]);
  scroller.toStart();
  notice("A new chat has begun.", "Undo", undo);
  focusMessage();
});

addEventListener("pagehide", () => {
  if (conversation.running) conversation.keepNow();
});

conversation.show(recallTurns());
scroller.toEnd();
fitMessage();
focusMessage();
loadModels();
