// The charts, on canvas. Each function draws one picture of some data; none keeps anything.

const FONT = "11px system-ui, sans-serif";
const LEFT = 44; // room for the scale's numbers
const PITCH = 4; // of the bars

/** The palette of the current colour scheme. */
function colours() {
  const style = getComputedStyle(document.documentElement);
  const of = (name) => style.getPropertyValue(`--${name}`).trim();
  return {
    fill: of("chart-fill"), pad: of("chart-pad"), second: of("chart-second"),
    cached: of("chart-cached"), free: of("chart-free"), line: of("line"), muted: of("muted"),
  };
}

/** A canvas cleared and scaled to the screen's pixels: {draw, width, height}; null if hidden. */
function begin(canvas, height = Number(canvas.getAttribute("data-height") ?? 0)) {
  const width = canvas.clientWidth;
  if (!width) return null;
  const scale = window.devicePixelRatio || 1;
  const tall = height || canvas.clientHeight;
  const wanted = [Math.round(width * scale), Math.round(tall * scale)];
  if (canvas.width !== wanted[0]) canvas.width = wanted[0];
  if (canvas.height !== wanted[1]) canvas.height = wanted[1];
  const draw = canvas.getContext("2d");
  draw.setTransform(scale, 0, 0, scale, 0, 0);
  draw.clearRect(0, 0, width, tall);
  draw.font = FONT;
  draw.textBaseline = "middle";
  return { draw, width, height: tall };
}

/** Horizontal lines at some values, with their labels; `y` maps a value to a height. */
function grid(draw, width, values, y, label, palette) {
  draw.textAlign = "right";
  for (const value of values) {
    const at = Math.round(y(value)) + 0.5;
    draw.fillStyle = palette.line;
    draw.fillRect(LEFT, at - 0.5, width - LEFT, 1);
    draw.fillStyle = palette.muted;
    draw.fillText(label(value), LEFT - 6, at);
  }
}

/** A pattern of diagonal lines, for what is padding. */
function hatch(draw, colour) {
  const tile = document.createElement("canvas");
  tile.width = tile.height = 6;
  const ink = tile.getContext("2d");
  ink.strokeStyle = colour;
  ink.lineWidth = 1.6;
  for (const x of [-6, 0, 6]) {
    ink.moveTo(x, 6);
    ink.lineTo(x + 6, 0);
  }
  ink.stroke();
  return draw.createPattern(tile, "repeat");
}

/** Round numbers from 0 up to at least `most`: the scale of a chart. */
function scaleFor(most, parts = 2) {
  const rough = (most || 1) / parts;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].find((s) => s * power >= rough * 0.999) * power;
  return Array.from({ length: parts + 1 }, (_, i) => i * step);
}

/**
 * One bar per step: `filled` of it used, the rest up to `size` padding.
 *
 * Heights go by the square root: a prefill of 512 tokens and decodes of 8 are both to be seen.
 */
export function stepBars(canvas, bars, label) {
  const area = begin(canvas);
  if (!area) return;
  const { draw, width, height } = area;
  const palette = colours();
  const shown = bars.slice(-Math.floor((width - LEFT) / PITCH));
  const most = Math.max(4, ...shown.map((bar) => bar.size));
  const top = 8;
  const bottom = height - 6;
  const y = (value) => bottom - Math.sqrt(value / most) * (bottom - top);
  grid(draw, width, [0, most / 4, most].map(Math.round), y, label, palette);
  const padding = hatch(draw, palette.pad);
  let x = width - shown.length * PITCH;
  for (const { filled, size } of shown) {
    draw.fillStyle = padding;
    draw.fillRect(x, y(size), PITCH - 1, y(filled) - y(size));
    draw.fillStyle = palette.fill;
    draw.fillRect(x, y(filled), PITCH - 1, bottom - y(filled));
    x += PITCH;
  }
}

/** The index of the bar at a place on a chart of so many bars; -1 for none. */
export function barAt(canvas, count, x) {
  const width = canvas.clientWidth;
  const shown = Math.min(count, Math.floor((width - LEFT) / PITCH));
  const at = Math.floor((x - (width - shown * PITCH)) / PITCH);
  return at < 0 || at >= shown ? -1 : count - shown + at;
}

/**
 * Lines over time, the newest at the right edge.
 *
 * `lines`: [{values: [{time, value}], colour: "fill" | "second", area}], `dots`: [{time, value}].
 */
export function timeChart(canvas, { lines, dots = [], end, span, label, whole = false }) {
  const area = begin(canvas);
  if (!area) return;
  const { draw, width, height } = area;
  const palette = colours();
  const isShown = ({ time, value }) => time >= end - span && Number.isFinite(value);
  const values = [...dots, ...lines.flatMap((line) => line.values)].filter(isShown);
  let most = values.reduce((high, { value }) => Math.max(high, value), 0);
  if (whole) most = Math.max(2, most + (most % 2));
  const marks = whole ? [0, most / 2, most] : scaleFor(most);
  const top = 8;
  const bottom = height - 6;
  const y = (value) => bottom - (value / marks.at(-1)) * (bottom - top);
  const x = (time) => LEFT + 1 + ((time - (end - span)) / span) * (width - LEFT - 4);
  grid(draw, width, marks, y, label, palette);
  draw.globalAlpha = 0.45;
  draw.fillStyle = palette.muted;
  for (const dot of dots.filter(isShown)) {
    draw.beginPath();
    draw.arc(x(dot.time), y(dot.value), 1.7, 0, 7);
    draw.fill();
  }
  draw.globalAlpha = 1;
  for (const line of lines) {
    const points = line.values.filter(isShown).map(({ time, value }) => [x(time), y(value)]);
    if (!points.length) continue;
    draw.strokeStyle = draw.fillStyle = palette[line.colour];
    draw.lineWidth = 1.8;
    draw.lineJoin = "round";
    draw.beginPath();
    for (const point of points) draw.lineTo(...point);
    if (points.length === 1) draw.lineTo(points[0][0] + 2, points[0][1]);
    draw.stroke();
    if (line.area) {
      draw.lineTo(points.at(-1)[0], bottom);
      draw.lineTo(points[0][0], bottom);
      draw.globalAlpha = 0.16;
      draw.fill();
      draw.globalAlpha = 1;
    }
  }
}

/**
 * The pages of the device: a cell per page, or per bin of neighbouring pages.
 *
 * `shards`: [{pages, bin_pages, used: [per bin], cached: [per bin]}], one block below another.
 */
export function pageGrid(canvas, shards) {
  const width = canvas.clientWidth;
  if (!width) return;
  const numCells = shards.reduce((sum, shard) => sum + shard.used.length, 0);
  const pitch = Math.max(5, Math.min(14, Math.floor(Math.sqrt((width * 110) / Math.max(1, numCells)))));
  const perRow = Math.max(1, Math.floor((width + 1) / pitch));
  const gap = 6;
  const rows = shards.map((shard) => Math.ceil(shard.used.length / perRow));
  const height = rows.reduce((sum, n) => sum + n * pitch + gap, 0) - gap;
  canvas.style.height = `${height}px`;
  const { draw } = begin(canvas, height);
  const palette = colours();
  const size = pitch - 1;
  let top = 0;
  shards.forEach((shard, index) => {
    shard.used.forEach((used, i) => {
      const x = (i % perRow) * pitch;
      const y = top + Math.floor(i / perRow) * pitch;
      const held = Math.min(shard.bin_pages, shard.pages - i * shard.bin_pages);
      const usedTall = (used / held) * size;
      const cachedTall = (shard.cached[i] / held) * size;
      draw.fillStyle = palette.free;
      draw.fillRect(x, y, size, size);
      draw.fillStyle = palette.cached;
      draw.fillRect(x, y + size - usedTall - cachedTall, size, cachedTall);
      draw.fillStyle = palette.fill;
      draw.fillRect(x, y + size - usedTall, size, usedTall);
    });
    top += rows[index] * pitch + gap;
  });
}
