// Small helpers: DOM elements from plain values, and numbers as people read them.

/** An element with properties, dataset entries and children; text is only ever text. */
export function el(tag, { dataset, ...properties } = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes("-") || name === "role") node.setAttribute(name, value);
    else node[name] = value;
  }
  Object.assign(node.dataset, dataset);
  node.append(...children);
  return node;
}

export const byId = (id) => document.getElementById(id);

/** 1234567 as "1,234,567". */
export const whole = (n) => Math.round(n).toLocaleString("en");

/** 12,345 as "12.3k": at most four characters or so. */
export function short(n) {
  if (n < 9_999.5) return whole(n);
  const [divisor, unit] = n < 999_950 ? [1e3, "k"] : n < 999_950_000 ? [1e6, "M"] : [1e9, "G"];
  const value = n / divisor;
  return (value < 99.95 ? value.toFixed(1) : value.toFixed(0)) + unit;
}

/** A rate or a small measure: three significant digits. */
export function digits(n) {
  if (n === 0) return "0";
  return n >= 100 ? whole(n) : n >= 10 ? n.toFixed(1) : n.toFixed(2);
}

/** Seconds as "840 µs", "12.3 ms" or "4.56 s". */
export function duration(seconds) {
  if (!Number.isFinite(seconds)) return "–";
  if (seconds < 0.00095) return `${Math.round(seconds * 1e6)} µs`;
  if (seconds < 0.9995) return `${digits(seconds * 1e3)} ms`;
  return `${digits(seconds)} s`;
}

/** A share as "12 %", small ones as "0.4 %". */
export function percent(share) {
  const value = share * 100;
  if (!Number.isFinite(value)) return "–";
  return `${value > 0 && value < 9.95 ? value.toFixed(1) : Math.round(value)} %`;
}

/** Bytes as "1.5 GiB". */
export function bytes(n) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  const power = n ? Math.min(units.length - 1, Math.floor(Math.log2(n) / 10)) : 0;
  return `${digits(n / 2 ** (10 * power)).replace(/\.0+$/, "")} ${units[power]}`;
}

/** The nearest-rank percentile of sorted numbers; NaN of none. */
export function percentile(sorted, share) {
  if (!sorted.length) return NaN;
  return sorted[Math.max(0, Math.ceil(share * sorted.length) - 1)];
}

/** Copy a text, also on plain HTTP, where browsers have no clipboard API. */
export async function copyText(text) {
  if (navigator.clipboard && window.isSecureContext) return navigator.clipboard.writeText(text);
  const area = el("textarea", { value: text, className: "sr-only" });
  document.body.append(area);
  area.select();
  const done = document.execCommand("copy");
  area.remove();
  if (!done) throw new Error("the browser does not let this page copy");
}
