// The tokens of an answer as spans: tinted by probability, with the alternatives in a tooltip.

import { byId, el } from "./format.js";

// Upper bounds of the tints, the least likely first.
const TINTS = [0.02, 0.1, 0.3, 0.6, 0.85];

/**
 * Divides a streamed text into its tokens.
 *
 * The text is what the server says it is; tokens only say where to cut it. Text may lag behind
 * its tokens (an unfinished character, a possible stop string), tokens may stand for no text
 * (markers, a stop string that is left out), and a character may take several tokens.
 */
export class TokenText {
  constructor(parent) {
    this.parent = parent;
    this.text = "";
    this._unplaced = ""; // text whose tokens are not known yet
    this._pending = []; // groups of tokens whose text has not come yet
    this._group = null; // tokens of an unfinished character
    this._decoder = new TextDecoder("utf-8");
    this._marked = false;
  }

  /** Take a piece of text and the log-probabilities that came with it. */
  add(text, logprobs) {
    this.text += text;
    this._unplaced += text;
    for (const entry of logprobs ?? []) this._addToken(entry);
    if (this._marked) this._place(false);
    else this._flush();
  }

  /** No more will come: place what is left. */
  end() {
    if (this._marked) this._place(true);
    this._flush();
  }

  _addToken(entry) {
    this._marked = true;
    const piece = entry.bytes
      ? this._decoder.decode(new Uint8Array(entry.bytes), { stream: true })
      : entry.token;
    this._group ??= { text: "", entries: [] };
    this._group.entries.push(entry);
    this._group.text += piece;
    // Without a complete character, the next token belongs to the same one.
    if (piece === "" && entry.bytes?.length) return;
    this._pending.push(this._group);
    this._group = null;
  }

  _place(isEnd) {
    while (this._pending.length && this._unplaced) {
      const group = this._pending[0];
      let text = group.text;
      // Some tokenizers drop the space before the first word.
      if (!this._unplaced.startsWith(text) && this.parent.childNodes.length === 0) text = text.trimStart();
      if (this._unplaced.startsWith(text)) {
        if (text) this._append(text, group.entries);
        this._unplaced = this._unplaced.slice(text.length);
      } else if (text.startsWith(this._unplaced)) {
        if (!isEnd) return; // the rest of its text is still to come
        this._append(this._unplaced, group.entries);
        this._unplaced = "";
      }
      this._pending.shift(); // also one that stands for no text
    }
  }

  _flush() {
    if (this._unplaced) this.parent.append(this._unplaced);
    this._unplaced = "";
  }

  _append(text, entries) {
    const probability = Math.exp(Math.min(...entries.map((entry) => entry.logprob)));
    const tint = TINTS.findIndex((bound) => probability < bound);
    // The space before a word is not painted: it may stand at the end of the line before.
    const space = text.match(/^\s*(?=\S)/)?.[0] ?? "";
    const ink = el("span", { className: "ink" }, text.slice(space.length));
    const span = el("span", { className: "token", tabIndex: -1 }, space, ink);
    if (tint >= 0) span.classList.add(`tint-${tint}`);
    span.tokenEntries = entries;
    if (!this.parent.querySelector(".token")) span.tabIndex = 0; // one tab stop per answer
    this.parent.append(span);
  }
}

/** Show the tooltip on hover, focus and tap, for all tokens on the page. */
export function setUpTokenTips() {
  const log = byId("log");
  const tokenOf = (event) => event.target.closest?.(".token");
  log.addEventListener("pointerover", (event) => {
    if (event.pointerType === "touch") return;
    const token = tokenOf(event);
    if (token) show(token);
    else hide();
  });
  log.addEventListener("pointerleave", hide);
  log.addEventListener("focusin", (event) => {
    const token = tokenOf(event);
    if (token && token.matches(":focus-visible")) show(token);
  });
  log.addEventListener("focusout", hide);
  log.addEventListener("click", (event) => {
    const token = tokenOf(event);
    if (!token || !getSelection().isCollapsed) return;
    focusToken(token);
    show(token);
  });
  log.addEventListener("scroll", hide, { passive: true });
  addEventListener("resize", hide);
  log.addEventListener("keydown", (event) => {
    const token = tokenOf(event);
    if (!token) return;
    const next = neighbour(token, event.key);
    if (next) {
      event.preventDefault();
      focusToken(next);
      show(next);
    }
  });
}

/** Hide the tooltip; whether it was shown. */
export function hide() {
  const tip = byId("tip");
  if (tip.hidden) return false;
  tip.hidden = true;
  document.querySelector("[aria-describedby=tip]")?.removeAttribute("aria-describedby");
  return true;
}

function neighbour(token, key) {
  const all = [...token.parentNode.querySelectorAll(".token")];
  const at = all.indexOf(token);
  const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: all.length - 1 }[key];
  return to === undefined ? undefined : all[to];
}

function focusToken(token) {
  token.parentNode.querySelector(".token[tabindex='0']")?.setAttribute("tabindex", "-1");
  token.tabIndex = 0;
  token.focus();
}

function show(token) {
  hide();
  const tip = byId("tip");
  tip.replaceChildren(...token.tokenEntries.flatMap(entryRows));
  token.setAttribute("aria-describedby", "tip");
  tip.hidden = false;
  const ink = token.querySelector(".ink");
  const box = ink.getClientRects()[0] ?? ink.getBoundingClientRect();
  const left = Math.min(box.left, document.documentElement.clientWidth - tip.offsetWidth - 8);
  tip.style.left = `${Math.max(8, left)}px`;
  const below = box.bottom + 6;
  const fits = below + tip.offsetHeight < document.documentElement.clientHeight - 8;
  tip.style.top = `${fits ? below : Math.max(8, box.top - tip.offsetHeight - 6)}px`;
}

function entryRows(entry) {
  const top = entry.top_logprobs ?? [];
  const isListed = top.some((one) => one.token === entry.token && one.logprob === entry.logprob);
  const all = isListed ? top : [...top, entry];
  const shown = [...all].sort((a, b) => b.logprob - a.logprob);
  const head = el(
    "p",
    { className: "tip-head" },
    el("b", {}, visible(entry)),
    ` ${probability(entry.logprob)}`,
    el("span", { className: "hint" }, ` log-probability ${entry.logprob.toFixed(3)}`),
  );
  const rows = shown.map((one) => {
    const isThis = one.token === entry.token && one.logprob === entry.logprob;
    const bar = el("i", { className: "bar" });
    bar.style.setProperty("--share", Math.exp(one.logprob));
    return el(
      "li",
      { className: isThis ? "chosen" : "" },
      bar,
      el("code", {}, visible(one)),
      el("span", {}, probability(one.logprob)),
    );
  });
  return [head, el("ol", {}, ...rows)];
}

/** A token with its spaces and line breaks made visible, or the bytes of a part of a character. */
function visible({ token, bytes }) {
  if (token === "") return "∅";
  if (token.includes("\ufffd") && bytes) {
    return bytes.map((byte) => `<${byte.toString(16).toUpperCase().padStart(2, "0")}>`).join("");
  }
  return token.replaceAll("\n", "↵").replaceAll("\t", "⇥").replaceAll(" ", "␣");
}

function probability(logprob) {
  const value = Math.exp(logprob) * 100;
  if (value >= 99.95 || value === 0) return `${value.toFixed(0)} %`;
  return value >= 0.1 ? `${value.toFixed(1)} %` : "< 0.1 %";
}
