// What a patch of one frame is similar to in all frames; nothing here comes from elsewhere.

const PANELS = ["left", "right"];
const DEFAULTS = ["raw last layer", "adapted"];
const THUMBNAILS = 12; // in the strip, at most
const DIM = 0.7; // of the grey frame under the heat, as in the films
const OPACITY = 0.8;

const at = (id) => document.getElementById(id);
const clip = await get("clip.json").then((answer) => answer.json());
const [width, height] = clip.size;
const [columns, rows] = clip.grid;
const cells = columns * rows;
const pictures = new Array(clip.frames);
const grey = new Array(clip.frames);
const colours = {}; // kind -> (T, h, w, 3) bytes
const asked = {}; // what the similarities below were asked for, by panel
const cosines = {}; // panel -> (T, h, w) int16, 32767 for 1
const state = initial();
let timer = null;

// ---------- what is shown lives in the address, so that a view can be bookmarked and sent on

function initial() {
  const given = new URLSearchParams(location.hash.slice(1) || location.search.slice(1));
  const number = (name, fallback, most) => {
    const value = Number.parseFloat(given.get(name));
    return Number.isFinite(value) ? Math.min(Math.max(value, 0), most) : fallback;
  };
  const one = (name, known, fallback) => (known.includes(given.get(name)) ? given.get(name) : fallback);
  const [first, last] = [clip.kinds[0], clip.kinds[clip.kinds.length - 1]];
  const frame = Math.round(number("frame", 0, clip.frames - 1));
  return {
    frame,
    query: Math.round(number("query", frame, clip.frames - 1)),
    x: number("x", width / 2, width),
    y: number("y", height / 2, height),
    view: one("view", ["similarity", "pca", "frame"], "similarity"),
    scale: one("scale", ["common", "own"], "common"),
    left: one("left", clip.kinds, clip.kinds.includes(DEFAULTS[0]) ? DEFAULTS[0] : first),
    right: one("right", clip.kinds, clip.kinds.includes(DEFAULTS[1]) ? DEFAULTS[1] : last),
  };
}

function remember() {
  const words = { ...state, x: Math.round(state.x), y: Math.round(state.y) };
  history.replaceState(null, "", `#${new URLSearchParams(words)}`);
}

// ---------- from the server

async function get(path) {
  const answer = await fetch(path).catch(() => {
    throw new Error("The server does not answer any more; was cosettle-adapter view stopped?");
  });
  if (!answer.ok) throw new Error(await answer.text());
  return answer;
}

function loadPicture(index) {
  return new Promise((done, failed) => {
    pictures[index] = new Image();
    pictures[index].onload = done;
    pictures[index].onerror = () => failed(new Error(`Frame ${index + 1} could not be loaded.`));
    pictures[index].src = `frame?index=${index}`;
  });
}

// The frame without its colours, made when it is first shown.
function greyed(index) {
  if (!grey[index]) {
    const [surface, context] = offscreen(pictures[index].naturalWidth, pictures[index].naturalHeight);
    context.drawImage(pictures[index], 0, 0);
    const pixels = context.getImageData(0, 0, surface.width, surface.height);
    for (let i = 0; i < pixels.data.length; i += 4) {
      const [r, g, b] = [pixels.data[i], pixels.data[i + 1], pixels.data[i + 2]];
      pixels.data.fill(DIM * (0.299 * r + 0.587 * g + 0.114 * b), i, i + 3);
    }
    context.putImageData(pixels, 0, 0);
    grey[index] = surface;
  }
  return grey[index];
}

async function ask(panel) {
  const words = { kind: state[panel], frame: state.query, x: state.x.toFixed(2), y: state.y.toFixed(2) };
  const question = `similarity?${new URLSearchParams(words)}`;
  if (asked[panel] === question) return;
  asked[panel] = question;
  const answer = new Int16Array(await (await get(question)).arrayBuffer());
  if (asked[panel] === question) cosines[panel] = answer; // else a later click came first
}

async function paint(kind) {
  colours[kind] ??= new Uint8Array(await (await get(`colours?${new URLSearchParams({ kind })}`)).arrayBuffer());
}

async function refresh() {
  try {
    if (state.view === "similarity") await Promise.all(PANELS.map(ask));
    if (state.view === "pca") await Promise.all(PANELS.map((panel) => paint(state[panel])));
    at("trouble").hidden = true;
  } catch (error) {
    for (const panel of PANELS) delete asked[panel];
    return complain(error);
  }
  remember();
  draw();
  drawStrip();
}

function complain(error) {
  at("trouble").textContent = error.message;
  at("trouble").hidden = false;
}

// ---------- drawing

function offscreen(w, h) {
  const surface = document.createElement("canvas");
  [surface.width, surface.height] = [w, h];
  return [surface, surface.getContext("2d", { willReadFrequently: true })];
}

function range(panel) {
  if (state.scale === "common") return [0, 1];
  let [low, high] = [32767, -32767];
  for (const value of cosines[panel]) {
    if (value < low) low = value;
    if (value > high) high = value;
  }
  return [low / 32767, Math.max(high / 32767, low / 32767 + 1e-3)];
}

function heat(panel, frame) {
  const [surface, context] = offscreen(columns, rows);
  const pixels = context.createImageData(columns, rows);
  const [low, high] = range(panel);
  for (let cell = 0; cell < cells; cell++) {
    const cosine = cosines[panel][frame * cells + cell] / 32767;
    const value = Math.min(Math.max((cosine - low) / (high - low), 0), 1);
    pixels.data.set(clip.colours[Math.round(255 * value)], 4 * cell);
    pixels.data[4 * cell + 3] = 255 * OPACITY * value * (2 - value);
  }
  context.putImageData(pixels, 0, 0);
  return surface;
}

function components(kind, frame) {
  const [surface, context] = offscreen(columns, rows);
  const pixels = context.createImageData(columns, rows);
  for (let cell = 0; cell < cells; cell++) {
    const from = 3 * (frame * cells + cell);
    pixels.data.set(colours[kind].subarray(from, from + 3), 4 * cell);
    pixels.data[4 * cell + 3] = 255;
  }
  context.putImageData(pixels, 0, 0);
  return surface;
}

// Map a grid to the pixels that its cells cover; the margins of overlapping patches stay bare.
function lay(context, surface, w, h, smooth) {
  const [left, top, right, bottom] = clip.covered;
  context.imageSmoothingEnabled = smooth;
  context.imageSmoothingQuality = "high";
  const [sx, sy] = [w / width, h / height];
  context.drawImage(surface, left * sx, top * sy, (right - left) * sx, (bottom - top) * sy);
  context.imageSmoothingEnabled = true;
}

function scene(context, panel, frame, w, h) {
  const similar = state.view === "similarity" && cosines[panel];
  context.drawImage(similar ? greyed(frame) : pictures[frame], 0, 0, w, h);
  if (similar) lay(context, heat(panel, frame), w, h, true);
  if (state.view === "pca" && colours[state[panel]]) lay(context, components(state[panel], frame), w, h, false);
}

function peak(panel, frame) {
  let best = 0;
  const from = frame * cells;
  for (let cell = 1; cell < cells; cell++) {
    if (cosines[panel][from + cell] > cosines[panel][from + best]) best = cell;
  }
  const [left, top, right, bottom] = clip.covered;
  return {
    x: left + ((right - left) * ((best % columns) + 0.5)) / columns,
    y: top + ((bottom - top) * (Math.floor(best / columns) + 0.5)) / rows,
    cosine: cosines[panel][from + best] / 32767,
  };
}

function ring(context, x, y, radius) {
  for (const [line, colour] of [[radius * 0.75, "#000"], [radius * 0.35, "#fff"]]) {
    context.beginPath();
    context.arc(x, y, radius, 0, 2 * Math.PI);
    [context.lineWidth, context.strokeStyle] = [line, colour];
    context.stroke();
  }
}

function cross(context, x, y, reach) {
  for (const [line, colour] of [[4.5, "#000"], [1.8, "#4fd6ff"]]) {
    context.beginPath();
    for (const [dx, dy] of [[1, 0], [-1, 0], [0, 1], [0, -1]]) {
      context.moveTo(x + dx * reach * 0.6, y + dy * reach * 0.6); // leaves room for the ring
      context.lineTo(x + dx * reach, y + dy * reach);
    }
    [context.lineWidth, context.strokeStyle] = [line, colour];
    context.stroke();
  }
}

function draw() {
  const crisp = window.devicePixelRatio || 1;
  for (const panel of PANELS) {
    const canvas = at(panel).querySelector("canvas");
    const [w, h] = [canvas.clientWidth, canvas.clientHeight];
    [canvas.width, canvas.height] = [Math.round(w * crisp), Math.round(h * crisp)];
    const context = canvas.getContext("2d");
    context.scale(crisp, crisp);
    scene(context, panel, state.frame, w, h);
    let told = "";
    if (state.view === "similarity" && cosines[panel]) {
      const best = peak(panel, state.frame);
      const radius = Math.min(Math.max(0.02 * Math.min(w, h), 5), 9);
      ring(context, (best.x * w) / width, (best.y * h) / height, radius);
      told = `peak ${best.cosine.toFixed(2)} at ${Math.round(best.x)}, ${Math.round(best.y)}`;
      Object.assign(at(panel).dataset, { peakX: best.x.toFixed(1), peakY: best.y.toFixed(1) });
    }
    if (state.view === "similarity" && state.frame === state.query) {
      cross(context, (state.x * w) / width, (state.y * h) / height, 20);
    }
    at(panel).querySelector(".peak").textContent = told;
    canvas.setAttribute("aria-label", `Frame ${state.frame + 1}, ${state[panel]}, ${state.view}. ${told}`);
  }
  at("scrub").value = state.frame;
  const total = clip.times[clip.frames - 1].toFixed(2).length;
  at("moment").textContent =
    `frame ${state.frame + 1} of ${clip.frames} \u00b7 ${clip.times[state.frame].toFixed(2).padStart(total)} s`;
  at("asked").textContent = state.view === "similarity"
    ? `Patch at ${Math.round(state.x)}, ${Math.round(state.y)} of frame ${state.query + 1}; the ring marks what is most similar.`
    : state.view === "pca" ? "Three principal components, one basis for all frames." : "The frames alone.";
  const own = state.scale === "own";
  [at("low").textContent, at("high").textContent] = own ? ["min", "max"] : ["0", "1"];
  for (const id of ["legend", "scale"]) at(id).classList.toggle("off", state.view !== "similarity");
  for (const button of at("strip").children) {
    button.setAttribute("aria-current", String(Number(button.dataset.frame) === nearest(state.frame)));
  }
}

function moments() {
  const shown = Math.min(clip.frames, THUMBNAILS);
  return Array.from({ length: shown }, (_, i) => Math.round((i * (clip.frames - 1)) / Math.max(1, shown - 1)));
}

function nearest(frame) {
  return moments().reduce((best, each) => (Math.abs(each - frame) < Math.abs(best - frame) ? each : best));
}

function drawStrip() {
  for (const button of at("strip").children) {
    PANELS.forEach((panel, row) => {
      const canvas = button.children[row];
      [canvas.width, canvas.height] = [192, Math.round((192 * height) / width)];
      scene(canvas.getContext("2d"), panel, Number(button.dataset.frame), canvas.width, canvas.height);
    });
  }
}

// ---------- what a reader does

function show(frame) {
  state.frame = Math.min(Math.max(frame, 0), clip.frames - 1);
  if (timer === null) remember(); // browsers refuse a new address many times a second
  draw();
}

function pick(x, y, frame) {
  Object.assign(state, { x: Math.min(Math.max(x, 0), width), y: Math.min(Math.max(y, 0), height), query: frame });
  refresh();
}

function where(event) {
  const box = event.currentTarget.getBoundingClientRect();
  return [((event.clientX - box.left) / box.width) * width, ((event.clientY - box.top) / box.height) * height];
}

function hover(panel, event) {
  let told = "";
  if (event && state.view === "similarity" && cosines[panel]) {
    const [left, top, right, bottom] = clip.covered;
    const [x, y] = where(event);
    const column = Math.min(Math.max(Math.floor(((x - left) / (right - left)) * columns), 0), columns - 1);
    const row = Math.min(Math.max(Math.floor(((y - top) / (bottom - top)) * rows), 0), rows - 1);
    told = `here ${(cosines[panel][state.frame * cells + row * columns + column] / 32767).toFixed(2)}`;
  }
  at(panel).querySelector(".here").textContent = told;
}

function play(on) {
  clearInterval(timer);
  const length = clip.times[clip.frames - 1] - clip.times[0];
  const pause = clip.frames > 1 ? (1000 * length) / (clip.frames - 1) : 1000;
  timer = on ? setInterval(() => show((state.frame + 1) % clip.frames), Math.min(Math.max(pause, 40), 400)) : null;
  if (!on) remember();
  at("play").textContent = on ? "\u275a\u275a" : "\u25b6";
  at("play").setAttribute("aria-label", on ? "Pause" : "Play");
}

// Bring the controls in line with the state, wherever that came from.
function reflect() {
  for (const name of ["view", "scale"]) document.querySelector(`#${name} input[value=${state[name]}]`).checked = true;
  for (const panel of PANELS) at(panel).querySelector("select").value = state[panel];
}

function change(changes) {
  Object.assign(state, changes);
  reflect();
  refresh();
}

function press(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.tagName === "SELECT") return;
  const [dx, dy] = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key] ?? [0, 0];
  const radio = event.target.type === "radio";
  if (event.shiftKey && (dx || dy)) pick(state.x + (dx * width) / columns, state.y + (dy * height) / rows, state.query);
  else if (dx && !radio) play(false), show(state.frame + dx);
  else if (event.key === "Home") play(false), show(0);
  else if (event.key === "End") play(false), show(clip.frames - 1);
  else if (event.key === " " && !radio && event.target.tagName !== "BUTTON") play(timer === null);
  else if (event.key === "p") change({ view: state.view === "pca" ? "similarity" : "pca" });
  else return;
  event.preventDefault();
}

function prepare() {
  document.title = `${clip.name} \u2013 cosettle-adapter`;
  document.documentElement.style.setProperty("--aspect", width / height);
  at("name").textContent = clip.name;
  at("facts").textContent = Object.values(clip.facts).join(" \u00b7 ");
  at("scrub").max = clip.frames - 1;
  const ramp = at("ramp").getContext("2d");
  clip.colours.forEach(([r, g, b], i) => {
    ramp.fillStyle = `rgb(${r} ${g} ${b})`;
    ramp.fillRect(i, 0, 1, 1);
  });
  for (const panel of PANELS) {
    const select = at(panel).querySelector("select");
    select.append(...clip.kinds.map((kind) => new Option(kind)));
    select.addEventListener("change", () => change({ [panel]: select.value }));
    const canvas = at(panel).querySelector("canvas");
    canvas.addEventListener("click", (event) => pick(...where(event), state.frame));
    canvas.addEventListener("pointermove", (event) => hover(panel, event));
    canvas.addEventListener("pointerleave", () => hover(panel, null));
  }
  for (const frame of moments()) {
    const button = document.createElement("button");
    Object.assign(button, { type: "button", title: `frame ${frame + 1}` });
    button.dataset.frame = frame;
    button.append(document.createElement("canvas"), document.createElement("canvas"));
    button.addEventListener("click", () => { play(false); show(frame); });
    at("strip").append(button);
  }
  for (const name of ["view", "scale"]) {
    at(name).addEventListener("change", (event) => change({ [name]: event.target.value }));
  }
  at("scrub").addEventListener("input", (event) => { play(false); show(Number(event.target.value)); });
  at("play").addEventListener("click", () => play(timer === null));
  document.addEventListener("keydown", press);
  window.addEventListener("hashchange", () => change(initial()));
  reflect();
}

try {
  prepare();
  await Promise.all(Array.from(pictures, (_, index) => loadPicture(index)));
  new ResizeObserver(draw).observe(document.querySelector(".panels"));
  await refresh();
  document.body.dataset.ready = "true";
} catch (error) {
  complain(error);
}
