// The engine's side of the page: numbers, charts and facts from the live data.

import { barAt, pageGrid, stepBars, timeChart } from "./charts.js";
import { byId, bytes, digits, duration, el, percent, percentile, short, whole } from "./format.js";

const SPAN = 120; // seconds in the charts over time
const WINDOW = 100; // requests that a percentile looks at

/** Show what `live` polls, from now on. */
export function setUpEngine(live) {
  const show = () => showAll(live);
  live.onChange.push(show);
  setUpPointing(live);
  // Colours and widths change the pictures, not the data.
  document.addEventListener("themechange", () => showCharts(live));
  document.addEventListener("tabchange", () => showCharts(live));
  addEventListener("resize", () => showCharts(live));
}

function showAll(live) {
  showState(live);
  if (!live.now?.load) return;
  showTiles(live);
  showFacts(live.now);
  showCharts(live);
}

function showState({ now, problem }) {
  const state = byId("state");
  const words = problem ? (now ? "no connection" : problem) : now.state;
  state.dataset.state = problem ? "problem" : now.state;
  if (state.textContent !== words) state.textContent = words;
  state.title = problem;
  byId("live-note").textContent = problem;
  byId("model-name").textContent = now?.model?.name ?? "";
  if (now?.model) document.title = `${now.model.name} · jaxserve`;
}

/** Set a list of terms and values, touching only what changed. */
function setList(list, entries) {
  entries.forEach(([term, value, tone = ""], i) => {
    let row = list.children[i];
    if (!row) {
      row = el("div", {}, el("dt"), el("dd"));
      list.append(row);
    }
    const [dt, dd] = row.children;
    if (dt.textContent !== term) dt.textContent = term;
    if (dd.textContent !== value) dd.textContent = value;
    dd.className = tone;
  });
  while (list.children.length > entries.length) list.lastElementChild.remove();
}

function showTiles(live) {
  const { load, model } = live.now;
  const recent = live.steps.slice(-50);
  const stepTime = recent.reduce((sum, step) => sum + step.seconds, 0) / recent.length;
  setList(byId("tiles"), [
    ["Running", `${whole(load.num_running)} / ${whole(model.max_num_seqs)}`],
    ["Waiting", whole(load.num_waiting)],
    ["Tokens/s out", digits(live.rate("generated"))],
    ["Prompt tokens/s", digits(live.rate("prompt"))],
    ["KV in use", percent(load.num_used_pages / load.num_total_pages)],
    ["Step", duration(stepTime)],
  ]);
}

function showFacts({ load, model, pages }) {
  setList(byId("facts"), [
    ["Name", model.name],
    ["Family", `${model.family}, ${model.num_layers} layers`],
    ["Runs on", `${model.platform}, ${model.dtype}`],
    ["Mesh", model.mesh],
    ["Attention", model.attention_implementation],
    ["Linear layers", model.linear_implementation],
    ["Context", `${whole(model.max_model_len)} tokens`],
    ["Vocabulary", whole(model.vocab_size)],
    ["KV cache", `${whole(model.num_pages)} pages of ${model.page_size} tokens, ${model.kv_cache_dtype}`],
    ["Batch", `${model.max_num_seqs} requests, ${model.max_num_batched_tokens} tokens`],
  ]);
  const late = load.compiles_after_ready;
  const hits = load.num_device_hit_tokens + load.num_store_hit_tokens;
  setList(byId("totals"), [
    ["Compiles at start-up", whole(load.compiles_before_ready)],
    ["Compiles while serving", whole(late), late ? "bad" : "good"],
    ["Steps", whole(load.num_steps)],
    ["Prompt tokens", whole(load.num_prompt_tokens)],
    ["Generated tokens", whole(load.num_generated_tokens)],
    ["Finished", whole(load.num_finished)],
    ["Aborted, shed", `${whole(load.num_aborted)}, ${whole(load.num_shed)}`],
    ["Preemptions", whole(load.num_preemptions)],
    ["Prefix cache hits", percent(load.num_queried_tokens ? hits / load.num_queried_tokens : 0)],
  ]);
  setList(byId("tiers"), ["host", "disk"].map((tier) => tierRow(tier, pages[tier])));
}

function tierRow(name, tier) {
  const term = { host: "Host memory", disk: "Disk" }[name];
  if (!tier?.max_pages) return [term, "off", "quiet-value"];
  const size = tier.bytes ? `, ${bytes(tier.bytes)}` : "";
  return [term, `${short(tier.pages)} of ${short(tier.max_pages)} pages${size}`];
}

function showCharts(live) {
  if (!live.now?.load) return;
  showSteps(live);
  showRequests(live);
  showPages(live.now);
  showLatency("ttft", live, "No answer has begun yet.");
  showLatency("itl", live, "No answer of two tokens yet.");
}

/** The step that the reader points at: {chart: "steps" | "rows", x}; null for none. */
let pointed = null;

function setUpPointing(live) {
  for (const chart of ["steps", "rows"]) {
    const canvas = byId(`${chart}-chart`);
    const point = (event) => {
      pointed = event.type === "pointerleave" ? null : { chart, x: event.offsetX };
      if (live.now?.load) showSteps(live);
    };
    for (const type of ["pointermove", "pointerdown", "pointerleave"]) {
      canvas.addEventListener(type, point);
    }
  }
}

function showSteps({ steps, now }) {
  const bars = {
    steps: steps.map((step) => ({ filled: step.tokens, size: step.tokenBucket })),
    rows: steps.map((step) => ({ filled: step.rows, size: step.rowBucket })),
  };
  for (const chart of ["steps", "rows"]) {
    const canvas = byId(`${chart}-chart`);
    stepBars(canvas, bars[chart], short);
    const at = pointed?.chart === chart ? barAt(canvas, steps.length, pointed.x) : -1;
    byId(`${chart}-text`).textContent =
      at >= 0 ? stepText(steps[at], now.time) : paddingText(bars[chart]);
  }
}

function stepText({ tokens, tokenBucket, rows, rowBucket, seconds, time }, now) {
  const ago = duration(Math.max(0, now - time));
  return `${tokens} of ${tokenBucket} tokens, ${rows} of ${rowBucket} rows; ${duration(seconds)}, ${ago} ago`;
}

function paddingText(bars) {
  const numSteps = bars.length;
  if (!numSteps) return "No step has run yet.";
  const size = bars.reduce((sum, bar) => sum + bar.size, 0);
  const filled = bars.reduce((sum, bar) => sum + bar.filled, 0);
  const { filled: last, size: bucket } = bars.at(-1);
  const share = size ? percent(1 - filled / size) : "–";
  return `last ${whole(last)} of ${whole(bucket)}; padding ${share} of ${whole(numSteps)} steps`;
}

function showRequests({ moments, now }) {
  const of = (name) => moments.map((moment) => ({ time: moment.time, value: moment[name] }));
  timeChart(byId("requests-chart"), {
    lines: [
      { values: of("running"), colour: "fill", area: true },
      { values: of("waiting"), colour: "second" },
    ],
    end: now.time,
    span: SPAN,
    label: short,
    whole: true,
  });
  const { num_running: running, num_waiting: waiting } = now.load;
  byId("requests-text").textContent = `${whole(running)} running, ${whole(waiting)} waiting; over ${SPAN / 60} minutes`;
}

function showPages({ load, pages }) {
  const binPages = pages.device[0]?.bin_pages ?? 1;
  byId("cell-text").textContent =
    binPages === 1 ? "a cell is a page" : `a cell is ${whole(binPages)} pages`;
  byId("pages-text").textContent =
    `on the device ${short(load.num_used_pages)} used, ` +
    `${short(load.num_cached_pages)} cached, ${short(load.num_free_pages)} free`;
  pageGrid(byId("pages-chart"), pages.device);
}

function showLatency(name, { requests, now }, none) {
  const dots = requests
    .map((one) => ({ time: one.time, value: one[name] }))
    .filter(({ value }) => value !== null);
  const over = (share) => dots.map(({ time }, i) => ({ time, value: windowed(dots, i, share) }));
  const p50 = over(0.5);
  const p99 = over(0.99);
  timeChart(byId(`${name}-chart`), {
    lines: [
      { values: p99, colour: "second" },
      { values: p50, colour: "fill" },
    ],
    dots,
    end: now.time,
    span: SPAN,
    label: shortDuration,
  });
  const count = Math.min(WINDOW, dots.length);
  byId(`${name}-text`).textContent = dots.length
    ? `p50 ${duration(p50.at(-1).value)}, p99 ${duration(p99.at(-1).value)} of the last ${count}`
    : none;
}

function windowed(dots, end, share) {
  const window = dots.slice(Math.max(0, end + 1 - WINDOW), end + 1).map(({ value }) => value);
  return percentile(window.sort((a, b) => a - b), share);
}

/** For a scale, where there is little room. */
function shortDuration(seconds) {
  if (seconds === 0) return "0";
  const trimmed = (n) => String(Number(n.toPrecision(2)));
  if (seconds < 0.001) return `${trimmed(seconds * 1e6)}µs`;
  return seconds < 1 ? `${trimmed(seconds * 1e3)}ms` : `${trimmed(seconds)}s`;
}
