// Numbers and sentences as people read them; numbers read as gulliver/report/units.py writes them (a test compares).

const THIN_SPACE = "\u202f";
export const NO_BREAK = "\u00a0";
const MINUS = "\u2212";
export const NOT_MEASURED = "not measured";

// Evidence writes a number that JSON cannot hold as null, "inf" or "-inf".
export function readNumber(value) {
  if (value === null || value === undefined) return NaN;
  return value === "inf" ? Infinity : value === "-inf" ? -Infinity : Number(value);
}

export function formatValue(value, unit = "") {
  if (value === null || value === undefined) return NOT_MEASURED;
  if (Number.isNaN(value)) return "not a number";
  const [factor, shown] = scale(value, unit);
  return withUnit(formatNumber(value * factor, decimals(value * factor)), shown);
}

// [value, 95 % interval] as texts with as many digits as the interval's width deserves.
export function formatMeasured(value, low, high, unit) {
  if (![value, low, high].every(Number.isFinite)) return [formatValue(value, unit), "no interval"];
  if (low === high) return [formatValue(value, unit), "single value"];
  const [factor, shown] = scale(value, unit);
  const halfWidth = (Math.abs(high - low) / 2) * factor;
  const digits = Math.min(6, Math.max(0, 1 - Math.floor(Math.log10(halfWidth))));
  const ends = `${formatNumber(low * factor, digits)} to ${formatNumber(high * factor, digits)}`;
  return [withUnit(formatNumber(value * factor, digits), shown), withUnit(ends, shown)];
}

export function formatNumber(value, digits) {
  if (!Number.isFinite(value)) return `${value < 0 ? MINUS : ""}infinity`;
  const [whole, part] = Math.abs(value).toFixed(digits).split(".");
  const text = whole.replace(/\B(?=(\d{3})+$)/g, THIN_SPACE) + (part ? `.${part}` : "");
  return value < 0 && /[1-9]/.test(text) ? MINUS + text : text;
}

export function formatSeconds(seconds) {
  return `${formatNumber(seconds, seconds < 10 ? 2 : 1)}${NO_BREAK}s`;
}

export function plural(count, word) {
  return `${formatNumber(count, 0)}${NO_BREAK}${word}${count === 1 ? "" : "s"}`;
}

// A message of the server, which may begin in lower case and end without a full stop.
export function sentence(text) {
  return text.charAt(0).toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? "" : ".");
}

function scale(value, unit) {
  if (unit === "bytes") {
    for (const [size, name] of [[1e9, "GB"], [1e6, "MB"], [1e3, "kB"]]) {
      if (Number.isFinite(value) && Math.abs(value) >= size) return [1 / size, name];
    }
    return [1, "bytes"];
  }
  if (unit === "fraction") return [100, "%"];
  return [1, ["ratio", "count", "cosine"].includes(unit) ? "" : unit];
}

function withUnit(number, shown) {
  return shown ? `${number}${NO_BREAK}${shown}` : number;
}

function decimals(shown) {
  const size = Math.abs(shown);
  if (!Number.isFinite(size) || (Number.isInteger(size) && size < 1e6)) return 0;
  return Math.min(6, Math.max(0, 3 - Math.floor(Math.log10(size))));
}
