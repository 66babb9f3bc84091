// Requests to this server: JSON in, JSON or server-sent events out, failures as one kind of error.

/** What went wrong, in words for the reader. `status` is the HTTP status, 0 for no answer. */
export class ServerError extends Error {
  constructor(message, { status = 0, kind = "", param = "" } = {}) {
    super(message);
    this.status = status;
    this.kind = kind;
    this.param = param;
  }
}

const apiKey = () => sessionStorage.getItem("jaxserve.api-key") ?? "";

export function authorization() {
  return apiKey() ? { Authorization: `Bearer ${apiKey()}` } : {};
}

/** `fetch` on a path beside this page, with the API key; raises ServerError unless 2xx. */
export async function request(path, options = {}) {
  let response;
  try {
    const headers = { ...authorization(), ...options.headers };
    response = await fetch(path, { ...options, headers, cache: "no-store", credentials: "omit" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server does not answer. Is it still running?");
  }
  if (!response.ok) throw await errorOf(response);
  return response;
}

async function errorOf(response) {
  const status = response.status;
  const text = await response.text().catch(() => "");
  let body;
  try {
    body = JSON.parse(text);
  } catch {
    body = null;
  }
  const error = body?.error ?? body ?? {};
  const message =
    error.message ?? error.detail ?? (text.slice(0, 500) || `HTTP status ${status}`);
  const words = typeof message === "string" ? message : JSON.stringify(message);
  return new ServerError(words, { status, kind: error.type ?? "", param: error.param ?? "" });
}

/** The JSON values of a stream of server-sent events, until `[DONE]` or its end. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      const { value, done } = await reader.read();
      // A stream may end within a line, and a "\r\n" may be cut in two.
      rest += done ? "\n\n" : value;
      const lines = rest.split(/\r\n|\n|\r(?!$)/);
      rest = lines.pop();
      for (const line of lines) {
        if (line.startsWith("data:")) {
          data.push(line.slice(line[5] === " " ? 6 : 5));
        } else if (line === "" && data.length) {
          const text = data.join("\n");
          data = [];
          if (text === "[DONE]") return;
          yield parsed(text);
        }
      }
      if (done) return;
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

function parsed(text) {
  let value;
  try {
    value = JSON.parse(text);
  } catch {
    throw new ServerError(`The server sent something that is not JSON: ${text.slice(0, 200)}`);
  }
  if (value.error) {
    const { message = "The stream failed", type = "", param = "", code } = value.error;
    throw new ServerError(message, { status: Number(code) || 0, kind: type, param: param ?? "" });
  }
  return value;
}
