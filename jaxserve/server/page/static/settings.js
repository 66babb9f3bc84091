// The sampling settings: built from one table, kept in localStorage, turned into a request.
// The API key is not among them: it lives in sessionStorage and in no request body.

import { byId, el } from "./format.js";

// An empty number is left out of the request: the model's or the server's default applies. `neutral`
// is the default of a model that has none of its own.
const NUMBERS = [
  { id: "temperature", label: "Temperature", min: 0, max: 2, step: 0.05, neutral: 1, range: true },
  { id: "top_p", label: "Top-p", min: 0.05, max: 1, step: 0.01, neutral: 1, range: true },
  { id: "min_p", label: "Min-p", min: 0, max: 1, step: 0.01, neutral: 0, range: true },
  { id: "top_k", label: "Top-k (0: all)", min: 0, max: 100000, step: 1, neutral: 0 },
  { id: "max_tokens", label: "Max tokens", min: 1, max: 1000000, step: 1 },
  { id: "seed", label: "Seed", min: 0, max: 4294967295, step: 1, hint: "random" },
  { id: "repetition_penalty", label: "Repetition penalty", min: 0.5, max: 2, step: 0.05, neutral: 1, range: true },
  { id: "presence_penalty", label: "Presence penalty", min: -2, max: 2, step: 0.1, neutral: 0, range: true },
  { id: "frequency_penalty", label: "Frequency penalty", min: -2, max: 2, step: 0.1, neutral: 0, range: true },
];
const INITIAL = { system: "", stop: "", schema: "", logprobs: true, tint: true, top_logprobs: 5 };
for (const { id } of NUMBERS) INITIAL[id] = "";
const STORED = "jaxserve.settings";
let modelDefaults = {};

/** Build the controls, restore what was chosen last, and keep what changes. */
export function setUpSettings() {
  byId("controls").append(...NUMBERS.map(control));
  let stored = {};
  try {
    stored = JSON.parse(localStorage.getItem(STORED)) ?? {};
  } catch {
    // nothing stored, or not ours
  }
  fill({ ...INITIAL, ...stored });
  const form = byId("settings");
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", (event) => {
    event.preventDefault();
    fill(INITIAL);
    keep();
  });
  form.addEventListener("input", keep);
  const key = byId("api-key");
  key.value = sessionStorage.getItem("jaxserve.api-key") ?? "";
  key.addEventListener("change", () => {
    if (key.value) sessionStorage.setItem("jaxserve.api-key", key.value.trim());
    else sessionStorage.removeItem("jaxserve.api-key");
    document.dispatchEvent(new CustomEvent("keychange"));
  });
}

/** Show, where nothing was chosen, what the served model is sampled with. */
export function showDefaults(defaults) {
  modelDefaults = defaults ?? {};
  for (const { id, hint } of NUMBERS) {
    byId(id).placeholder = hint ?? defaultOf(id) ?? "default";
    placeSlider(id);
  }
}

const defaultOf = (id) => modelDefaults[id] ?? NUMBERS.find((number) => number.id === id)?.neutral;

function placeSlider(id) {
  const slider = byId(`${id}-range`);
  if (slider) slider.value = byId(id).value === "" ? defaultOf(id) : byId(id).value;
}

function control({ id, label, min, max, step, hint, neutral, range }) {
  const placeholder = hint ?? neutral ?? "default";
  const number = el("input", { type: "number", id, min, max, step, placeholder });
  const head = el("div", { className: "field inline" }, el("label", { htmlFor: id }, label), number);
  if (!range) return head;
  const slider = el("input", { type: "range", min, max, step, "aria-label": `${label}, slider` });
  slider.id = `${id}-range`;
  slider.addEventListener("input", () => (number.value = slider.value));
  number.addEventListener("input", () => placeSlider(id));
  return el("div", { className: "ranged" }, head, slider);
}

function fill(values) {
  for (const [id, value] of Object.entries(values)) {
    const input = byId(id);
    if (!input || !(id in INITIAL)) continue;
    if (input.type === "checkbox") input.checked = Boolean(value);
    else input.value = value;
    placeSlider(id);
  }
  showTint();
  checkSchema();
}

function keep() {
  showTint();
  checkSchema();
  const values = {};
  for (const id of Object.keys(INITIAL)) {
    const input = byId(id);
    values[id] = input.type === "checkbox" ? input.checked : input.value;
  }
  try {
    localStorage.setItem(STORED, JSON.stringify(values));
  } catch {
    // then for this visit only
  }
}

function showTint() {
  document.body.classList.toggle("tinted", byId("tint").checked);
}

/** The schema's problem as a sentence, or "". */
function checkSchema() {
  const text = byId("schema").value.trim();
  let problem = "";
  if (text) {
    try {
      const schema = JSON.parse(text);
      if (typeof schema !== "object" || schema === null) problem = "A JSON schema is an object.";
    } catch (error) {
      problem = `Not JSON yet: ${error.message}`;
    }
  }
  const shown = byId("schema-error");
  shown.hidden = !problem;
  if (shown.textContent !== problem) shown.textContent = problem;
  byId("schema").setAttribute("aria-invalid", String(Boolean(problem)));
  return problem;
}

/**
 * The body of a chat request for some messages.
 *
 * Throws an Error, in words for the reader, if a setting cannot be used.
 */
export function requestBody(model, messages) {
  const system = byId("system").value.trim();
  const all = system ? [{ role: "system", content: system }, ...messages] : messages;
  const body = { model, messages: all, stream: true, stream_options: { include_usage: true } };
  for (const { id, label } of NUMBERS) {
    const input = byId(id);
    if (input.validity.badInput) throw new Error(`${label} is not a number.`);
    if (input.value === "") continue;
    body[id] = Number(input.value);
  }
  const stop = byId("stop").value.split("\n").filter(Boolean);
  if (stop.length) body.stop = stop;
  if (byId("schema").value.trim()) {
    const problem = checkSchema();
    if (problem) throw new Error(`JSON schema: ${problem}`);
    const schema = JSON.parse(byId("schema").value);
    body.response_format = { type: "json_schema", json_schema: { name: "answer", schema } };
  }
  if (byId("logprobs").checked) {
    body.logprobs = true;
    body.top_logprobs = Number(byId("top_logprobs").value || 0);
  }
  return body;
}

/** A request as a shell command; the API key stays a variable's name. */
export function asCurl(body) {
  const url = new URL("v1/chat/completions", document.baseURI).href;
  const lines = [`curl -N ${quoted(url)}`, `-H 'Content-Type: application/json'`];
  if (byId("api-key").value) lines.push(`-H "Authorization: Bearer $JAXSERVE_API_KEY"`);
  lines.push(`-d ${quoted(JSON.stringify(body, null, 2))}`);
  return lines.join(" \\\n  ");
}

const quoted = (text) => `'${text.replaceAll("'", `'\\''`)}'`;
