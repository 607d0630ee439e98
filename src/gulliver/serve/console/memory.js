// What this browser remembers. localStorage: settings, model, conversation. sessionStorage: the API key, for this tab.

const PREFIX = "gulliver.";

// The JSON value that was kept under `name`, or `otherwise` when there is none or it cannot be read.
export function recall(name, otherwise) {
  try {
    return JSON.parse(localStorage.getItem(PREFIX + name)) ?? otherwise;
  } catch {
    return otherwise;
  }
}

// False when the browser refuses to keep it (private window, or more than its limit).
export function keep(name, value) {
  try {
    localStorage.setItem(PREFIX + name, JSON.stringify(value));
    return true;
  } catch {
    return false;
  }
}

let key; // here too, for a browser that refuses to keep anything

export const apiKey = {
  get() {
    try {
      return (key ??= sessionStorage.getItem(`${PREFIX}key`) ?? "");
    } catch {
      return key ?? "";
    }
  },
  set(value) {
    key = value;
    try {
      sessionStorage.setItem(`${PREFIX}key`, value);
    } catch {
      // Kept until the page is left.
    }
  },
};

export function forgetEverything() {
  key = "";
  try {
    for (const storage of [localStorage, sessionStorage]) {
      for (const name of Object.keys(storage)) if (name.startsWith(PREFIX)) storage.removeItem(name);
    }
  } catch {
    // Nothing can have been kept.
  }
}

// The kept conversation, without anything that does not have a turn's shape.
export function recallTurns() {
  const turns = recall("turns", []);
  if (!Array.isArray(turns)) return [];
  return turns.filter((turn) => ["user", "assistant"].includes(turn?.role) && typeof turn.content === "string");
}
