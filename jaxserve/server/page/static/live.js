// What the engine does: asked for about once a second while somebody looks, and kept for charts.

import { request } from "./sse.js";

const MAX_STEPS = 600;
const MAX_REQUESTS = 500;
const MAX_MOMENTS = 180; // of the gauges
const SECONDS = { shown: 1, aside: 5, most: 15 };

/** Polls `/live`. `onChange` functions run after every poll, also a failed one. */
export class Live {
  constructor() {
    this.now = null; // the last snapshot
    this.problem = ""; // why there is none newer
    this.onChange = [];
    this._timer = 0;
    this._numFailures = 0;
    this._isPolling = this._isWanted = false;
    this._forget();
  }

  /** The served model's name; "" until it is known. */
  get modelName() {
    return this.now?.model?.name ?? "";
  }

  /** Poll from now on, whenever the page can be seen. */
  start() {
    document.addEventListener("visibilitychange", () => this.pollSoon());
    document.addEventListener("tabchange", () => this.pollSoon());
    this.pollSoon();
  }

  /** Poll now, unless the page is hidden: then nothing is asked until it shows again. */
  pollSoon() {
    this._numFailures = 0;
    this._isWanted = true; // also if a poll is under way, which may have the old API key
    this._schedule(0);
  }

  _schedule(seconds) {
    clearTimeout(this._timer);
    if (!document.hidden) this._timer = setTimeout(() => this._poll(), seconds * 1000);
  }

  _forget() {
    this._cursor = "";
    this.steps = []; // {time, tokens, tokenBucket, rows, rowBucket, seconds}
    this.requests = []; // {time, ttft, itl, tokens}
    this.moments = []; // {time, running, waiting, generated, prompt, steps}
  }

  async _poll() {
    if (this._isPolling) return;
    this._isPolling = true;
    this._isWanted = false;
    try {
      const path = this._cursor ? `live?since=${encodeURIComponent(this._cursor)}` : "live";
      const response = await request(path);
      this._take(await response.json());
      this.problem = "";
      this._numFailures = 0;
    } catch (error) {
      this.problem = error.status === 401 ? "needs an API key" : error.message;
      this._numFailures += 1;
    }
    this._isPolling = false;
    for (const changed of this.onChange) changed();
    const isShown = document.getElementById("pane-engine").offsetParent !== null;
    const pause = isShown ? SECONDS.shown : SECONDS.aside;
    const patience = 2 ** Math.min(4, Math.max(0, this._numFailures - 1));
    this._schedule(this._isWanted ? 0 : Math.min(SECONDS.most, pause * patience));
  }

  _take(snapshot) {
    if (snapshot.from_start) this._forget(); // the first one, or another process answers
    this._cursor = snapshot.cursor;
    this.now = snapshot;
    for (const [time, tokens, tokenBucket, rows, rowBucket, seconds] of snapshot.steps) {
      this.steps.push({ time, tokens, tokenBucket, rows, rowBucket, seconds });
    }
    for (const [time, ttft, itl, tokens] of snapshot.requests) {
      this.requests.push({ time, ttft, itl, tokens });
    }
    const load = snapshot.load;
    if (load) {
      this.moments.push({
        time: snapshot.time,
        running: load.num_running,
        waiting: load.num_waiting,
        generated: load.num_generated_tokens,
        prompt: load.num_prompt_tokens,
        steps: load.num_steps,
      });
    }
    this.steps.splice(0, this.steps.length - MAX_STEPS);
    this.requests.splice(0, this.requests.length - MAX_REQUESTS);
    this.moments.splice(0, this.moments.length - MAX_MOMENTS);
  }

  /** A counter's growth per second, over the last few seconds. */
  rate(counter, seconds = 4) {
    const last = this.moments.at(-1);
    const first = this.moments.find((moment) => moment.time >= (last?.time ?? 0) - seconds - 0.5);
    if (!last || !first || last.time <= first.time) return 0;
    return (last[counter] - first[counter]) / (last.time - first.time);
  }
}
