// The conversation: what was said, what is being answered, and the buttons around it.

import { Answer, failure, userMessage } from "./answer.js";
import { byId, el } from "./format.js";
import { asCurl, requestBody } from "./settings.js";
import { events, request } from "./sse.js";
import { hide as hideTip } from "./tokens.js";

const EXAMPLES = [
  "Why is the sky blue? Two sentences.",
  "Write a haiku about a river in winter.",
  "Give three names for a bakery, one per line.",
];

/** Wire up the chat; `model()` is the served model's name. */
export function setUpChat(model) {
  const chat = new Chat(model);
  const prompt = byId("prompt");
  const resize = () => {
    prompt.style.height = "auto";
    prompt.style.height = `${Math.min(prompt.scrollHeight, innerHeight * 0.35)}px`;
  };
  const submit = () => {
    const text = prompt.value.trim();
    if (!text || chat.isBusy) return;
    prompt.value = "";
    resize();
    chat.say(text);
  };
  prompt.addEventListener("input", resize);
  prompt.addEventListener("keydown", (event) => {
    // While an input method composes a word, Enter is the input method's.
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    submit();
  });
  byId("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    submit();
  });
  byId("stop-button").addEventListener("click", () => chat.stop());
  byId("new-chat").addEventListener("click", () => {
    chat.clear();
    prompt.focus();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !hideTip()) chat.stop();
  });
  for (const text of EXAMPLES) {
    const button = el("button", { type: "button" }, text);
    button.addEventListener("click", () => chat.say(text));
    byId("examples").append(button);
  }
}

class Chat {
  constructor(model) {
    this._model = model;
    this._messages = []; // {role, content}, as sent
    this._abort = null; // of the answer that streams
  }

  get isBusy() {
    return this._abort !== null;
  }

  /** Send a message and stream the answer. */
  say(text) {
    if (this.isBusy) return;
    this._messages.push({ role: "user", content: text });
    byId("messages").append(userMessage(text));
    this._answer();
  }

  /** Stop the answer that streams; its text so far stays. */
  stop() {
    this._abort?.abort();
  }

  /** Forget the conversation. */
  clear() {
    this.stop();
    this._messages = [];
    byId("messages").replaceChildren();
    byId("announcer").replaceChildren();
    byId("empty").hidden = false;
  }

  async _answer() {
    const messages = this._messages;
    const list = byId("messages");
    byId("empty").hidden = true;
    let body;
    try {
      body = requestBody(this._model(), messages);
    } catch (error) {
      this._fail(error);
      return;
    }
    const answer = new Answer({ regenerate: () => this._again(), curl: () => asCurl(body) });
    list.append(answer.element);
    this._follow(true);
    const abort = new AbortController();
    this._setBusy(abort);
    let problem = null;
    try {
      await this._stream(body, abort.signal, answer);
    } catch (error) {
      if (!abort.signal.aborted) problem = error;
    }
    if (this._abort === abort) this._setBusy(null);
    answer.end(problem ? "failed" : abort.signal.aborted ? "stopped" : "");
    if (messages !== this._messages) return; // cleared meanwhile
    if (answer.text) messages.push({ role: "assistant", content: answer.text });
    else if (problem) answer.element.remove();
    if (problem) this._fail(problem);
    this._follow(false);
  }

  async _stream(body, signal, answer) {
    const response = await request("v1/chat/completions", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(body),
      signal,
    });
    for await (const chunk of events(response)) {
      if (signal.aborted) return;
      const isAtEnd = this._isAtEnd();
      answer.add(chunk);
      if (isAtEnd) this._follow(true);
    }
  }

  /** Answer the last message anew. */
  _again() {
    if (this.isBusy) return;
    const list = byId("messages");
    while (list.lastElementChild && !list.lastElementChild.classList.contains("user")) {
      list.lastElementChild.remove();
    }
    if (this._messages.at(-1)?.role === "assistant") this._messages.pop();
    if (this._messages.length) this._answer();
    byId("prompt").focus();
  }

  _fail(error) {
    byId("messages").append(failure(error, () => this._again()));
    if (error.status === 401) document.dispatchEvent(new CustomEvent("keyneeded"));
    this._follow(true);
  }

  _setBusy(abort) {
    this._abort = abort;
    const stop = byId("stop-button");
    const hadFocus = document.activeElement === stop;
    byId("send").hidden = this.isBusy;
    stop.hidden = !this.isBusy;
    byId("messages").setAttribute("aria-busy", String(this.isBusy));
    if (hadFocus && !this.isBusy) byId("prompt").focus();
  }

  _isAtEnd() {
    const log = byId("log");
    return log.scrollHeight - log.scrollTop - log.clientHeight < 48;
  }

  /** Scroll to the end, always or only if the reader is there. */
  _follow(always) {
    const log = byId("log");
    if (always || this._isAtEnd()) log.scrollTop = log.scrollHeight;
  }
}
