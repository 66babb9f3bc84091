// One message on the screen, and what is said about an answer while and after it streams.

import { byId, copyText, digits, duration, el, whole } from "./format.js";
import { TokenText } from "./tokens.js";

const ENDS = {
  stop: "complete",
  length: "cut at max tokens",
  content_filter: "filtered",
  tool_calls: "calls a tool",
  abort: "aborted",
};

/** Say something to screen readers. */
function announce(text) {
  const announcer = byId("announcer");
  announcer.append(el("p", {}, text));
  while (announcer.children.length > 20) announcer.firstElementChild.remove();
}

/** The reader's message. */
export function userMessage(text) {
  return el(
    "li",
    { className: "message user" },
    el("h3", { className: "sr-only" }, "You"),
    el("div", { className: "body" }, text),
  );
}

/** A model's answer: streams in by `add`, ends by `end`. */
export class Answer {
  /** `actions`: {regenerate, curl}, functions for the buttons. */
  constructor(actions) {
    this._body = el("div", { className: "body" });
    this._meta = el("p", { className: "meta" }, "waiting for the first token");
    this._actions = el("div", { className: "actions", hidden: true });
    const heading = el("h3", { className: "sr-only" }, "Model");
    const foot = el("div", { className: "foot" }, this._meta, this._actions);
    this.element = el("li", { className: "message model streaming" }, heading, this._body, foot);
    this._content = new TokenText(this._body);
    this._thinking = null;
    this._spoken = 0;
    this._sentAt = performance.now();
    this._firstAt = this._lastAt = 0;
    this._numTokens = 0;
    this._finish = "";
    this._usage = null;
    this._buttons(actions);
  }

  /** The answer's text so far, without the thinking. */
  get text() {
    return this._content.text;
  }

  _buttons({ regenerate, curl }) {
    const copied = (button, text) => async () => {
      const label = button.textContent;
      try {
        await copyText(text());
        button.textContent = "Copied";
      } catch (error) {
        button.textContent = error.message;
      }
      setTimeout(() => (button.textContent = label), 1500);
    };
    const again = el("button", { type: "button", className: "quiet regenerate" }, "Regenerate");
    again.addEventListener("click", regenerate);
    const copy = el("button", { type: "button", className: "quiet" }, "Copy");
    copy.addEventListener("click", copied(copy, () => this.text));
    const shell = el("button", { type: "button", className: "quiet" }, "Copy as curl");
    shell.addEventListener("click", copied(shell, curl));
    this._actions.append(again, copy, shell);
  }

  /** Take one chunk of the stream. */
  add(chunk) {
    if (chunk.usage) this._usage = chunk.usage;
    const choice = chunk.choices?.[0];
    if (!choice) return;
    const { content, reasoning_content: reasoning, refusal } = choice.delta ?? {};
    const logprobs = choice.logprobs?.content ?? [];
    if (content || reasoning || logprobs.length) {
      this._lastAt = performance.now();
      this._firstAt ||= this._lastAt;
      this._numTokens += logprobs.length || 1;
    }
    if (reasoning) this._thinkingText().add(reasoning, content ? [] : logprobs);
    if (content || (logprobs.length && !reasoning)) this._content.add(content ?? "", logprobs);
    if (refusal) this._content.add(refusal);
    if (choice.finish_reason) this._finish = choice.finish_reason;
    this._meta.textContent = this._rates();
    this._speak(false);
  }

  _thinkingText() {
    if (!this._thinking) {
      const body = el("div", { className: "body" });
      const box = el("details", { className: "thinking", open: true }, el("summary", {}, "Thinking"), body);
      this._body.before(box);
      this._thinking = new TokenText(body);
    }
    return this._thinking;
  }

  /** The stream is over: `how` is "" if by itself, else what ended it. */
  end(how = "") {
    this._content.end();
    this._thinking?.end();
    this.element.classList.remove("streaming");
    this._actions.hidden = false;
    if (!this._body.textContent && !how) this._body.append(el("em", {}, "(no text)"));
    const parts = [how || (ENDS[this._finish] ?? this._finish), this._rates(), this._counts()];
    this._meta.textContent = parts.filter(Boolean).join(" · ");
    this._speak(true);
    announce(`Answer ${how || "complete"}.`);
  }

  _rates() {
    if (!this._firstAt) return "";
    const ttft = `first token ${duration((this._firstAt - this._sentAt) / 1000)}`;
    const tokens = this._usage?.completion_tokens ?? this._numTokens;
    const seconds = (this._lastAt - this._firstAt) / 1000;
    if (tokens < 2 || seconds <= 0) return ttft;
    return `${ttft} · ${digits((tokens - 1) / seconds)} tokens/s`;
  }

  _counts() {
    if (!this._usage) return "";
    const { prompt_tokens: input, completion_tokens: output } = this._usage;
    const cached = this._usage.prompt_tokens_details?.cached_tokens ?? 0;
    const note = cached ? ` (${whole(cached)} cached)` : "";
    return `${whole(input)} in${note}, ${whole(output)} out`;
  }

  /** Hand whole sentences to screen readers, not every token. */
  _speak(isEnd) {
    const unspoken = this.text.slice(this._spoken);
    const cut = isEnd ? unspoken.length : unspoken.search(/[.!?\n:;]\s[^]*$/) + 1;
    if (cut <= 0) return;
    this._spoken += cut;
    announce(unspoken.slice(0, cut));
  }
}

/** A failure, in the conversation, with a way to try again. */
export function failure(error, retry) {
  const title =
    error.status === 401
      ? "The server asks for an API key"
      : error.status
        ? `The server refused (${error.status}${error.kind ? `, ${error.kind}` : ""})`
        : "That did not work";
  const button = el("button", { type: "button" }, "Try again");
  button.addEventListener("click", retry);
  return el(
    "li",
    { className: "message failure", role: "alert" },
    el("h3", {}, title),
    el("p", {}, error.message),
    ...(error.param ? [el("p", { className: "hint" }, `Parameter: ${error.param}`)] : []),
    button,
  );
}
