"use strict";
const $ = (id) => document.getElementById(id);
const rtols = (share) => Math.exp(Math.log(about.least_rtol) + share * Math.log(1 / about.least_rtol));
let about = { least_rtol: 0.005, most_n: 16, most_nfe: 250, classes: [], solvers: [] };
let picture = null, painted = false;

function headers() {
  const token = sessionStorage.getItem("token");
  return token ? { Authorization: `Bearer ${token}` } : {};
}

async function ask(path, options = {}) {
  const answer = await fetch(path, { ...options, headers: { ...headers(), ...options.headers } });
  if (answer.status === 401) $("token-field").hidden = false;
  if (!answer.ok) {
    const body = await answer.json().catch(() => null);
    throw new Error(body?.error?.message ?? `the server answered ${answer.status}.`);
  }
  return answer;
}

async function learn() {
  about = await (await ask("v1/about")).json();
  $("model").textContent = about.model;
  document.title = `fastsde: ${about.model}`;
  $("n").max = about.most_n;
  $("n").value = Math.min(about.most_n, 8);
  $("nfe").max = Math.min(about.most_nfe, 60);
  $("prompt-field").hidden = !about.prompts;
  $("class-field").hidden = !about.classes.length;
  $("edit").hidden = !about.edits;
  $("solver-fields").hidden = !about.solvers.length;
  $("class").replaceChildren(new Option("a mix of all", ""), ...about.classes.map((name) => new Option(name)));
  $("solver").replaceChildren(...about.solvers.map((name) => new Option(name, name, false, name === "ExponentialPC")));
  if (!about.solvers.length) $("solver").add(new Option("", ""));
  show();
  busy();
}

function busy() {
  $("load").textContent = `${about.running} samples running, ${about.waiting} waiting`;
}

async function refresh() {
  if (document.hidden) return;
  try {
    about = await (await ask("v1/about")).json();
    busy();
  } catch (error) {
    $("load").textContent = error.message;
  }
}

function by() {
  return document.querySelector("input[name=by]:checked").value;
}

function show() {
  $("rtol-field").hidden = by() !== "rtol";
  $("nfe-field").hidden = by() !== "nfe";
  $("rtol-now").textContent = rtols(Number($("rtol").value)).toPrecision(2);
  for (const name of ["nfe", "eta", "strength"]) $(`${name}-now`).textContent = $(name).value;
  $("eta-field").hidden = $("solver").value !== "ExponentialPC";
}

function wanted() {
  const asked = { n: Number($("n").value), seed: Number($("seed").value) };
  const prompt = about.prompts ? $("prompt").value : $("class").value;
  if (prompt) asked.prompt = prompt;
  if (by() === "rtol") asked.rtol = Number(rtols(Number($("rtol").value)).toPrecision(2));
  else asked.nfe = Number($("nfe").value);
  if (about.solvers.length && $("solver").value !== "ExponentialPC") asked.solver = $("solver").value;
  else if (about.solvers.length && Number($("eta").value)) asked.eta = Number($("eta").value);
  return asked;
}

function caption(asked) {
  const said = Object.entries(asked).filter(([key]) => key !== "n").map(([key, value]) => `${key} ${value}`);
  return `${asked.n} images, ${said.join(", ")}`;
}

async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    text += value;
    const parts = text.split("\n\n");
    text = parts.pop();
    for (const part of parts) {
      const found = /^event: (\w+)\ndata: (.*)$/s.exec(part);
      if (found) yield [found[1], JSON.parse(found[2])];
    }
  }
}

function tile(run, k, png, words) {
  const old = run.querySelector(".grid").children[k];
  const image = new Image();
  image.src = `data:image/png;base64,${png}`;
  image.alt = words;
  const place = document.createElement("span");
  place.append(image);
  old.replaceWith(place);
}

function bars(run, nfe) {
  const counts = new Map();
  for (const calls of nfe) counts.set(calls, (counts.get(calls) ?? 0) + 1);
  const keys = [...counts.keys()].sort((a, b) => a - b);
  const svg = run.querySelector(".bars"), most = Math.max(...counts.values());
  const width = Math.min(40, 300 / keys.length), every = Math.ceil(keys.length / 12);
  svg.setAttribute("viewBox", `0 0 ${Math.max(width * keys.length, 120)} 80`);
  svg.setAttribute("aria-label", keys.map((key) => `${counts.get(key)} samples with ${key} calls`).join(", "));
  svg.replaceChildren(...keys.flatMap((key, k) => {
    const bar = document.createElementNS("http://www.w3.org/2000/svg", "rect");
    const height = (50 * counts.get(key)) / most;
    for (const [name, value] of Object.entries({ x: k * width + 2, y: 64 - height, width: width - 4, height })) bar.setAttribute(name, value);
    const texts = [[key, 76], [counts.get(key), 60 - height]].map(([words, y]) => {
      const text = document.createElementNS("http://www.w3.org/2000/svg", "text");
      text.setAttribute("x", (k + 0.5) * width);
      text.setAttribute("y", y);
      text.textContent = words;
      return text;
    });
    return [bar, ...(k % every ? [] : texts)];
  }));
}

async function draw() {
  $("problem").textContent = "";
  const asked = wanted(), title = caption(asked);
  if (picture) {
    asked.image = picture;
    if ($("mask").files[0]) asked.mask = await base64(await small($("mask").files[0]));
    else if (painted) asked.mask = mask();
    else asked.strength = Number($("strength").value);
  }
  const run = $("run").content.firstElementChild.cloneNode(true);
  const state = run.querySelector(".state"), bar = run.querySelector("progress");
  run.querySelector("h2").textContent = title + (picture ? ", edited" : "");
  run.querySelector(".grid").replaceChildren(...Array.from({ length: asked.n }, () => {
    const place = document.createElement("span");
    place.className = "waits";
    place.textContent = "waits";
    return place;
  }));
  const stop = new AbortController();
  run.querySelector(".cancel").onclick = () => stop.abort();
  let placed = false;
  try {
    const json = { "Content-Type": "application/json" };
    const answer = await ask("v1/samples", { method: "POST", body: JSON.stringify(asked), headers: json, signal: stop.signal });
    $("runs").prepend(run);
    $("hint").hidden = placed = true;
    let first = null;
    const shares = new Array(asked.n).fill(0);
    for await (const [name, data] of events(answer)) {
      if (name === "queued") state.textContent = "waits for a slot";
      if (name === "progress") {
        first ??= Math.max(...data.t);
        data.index.forEach((index, k) => {
          shares[index] = Math.max(shares[index], 1 - data.t[k] / first);
          if (data.images) tile(run, index, data.images[k], `sample ${index} after ${data.nfe[k]} calls`);
        });
        bar.value = shares.reduce((a, b) => a + b, 0) / asked.n;
        state.textContent = `${data.finished} of ${asked.n} are there`;
      }
      if (name === "done") finish(run, asked, data);
      if (name === "failed") throw new Error(data.message);
    }
  } catch (error) {
    const words = error.name === "AbortError" ? "cancelled" : error.message;
    if (placed) state.textContent = words;
    else $("problem").textContent = words;
  }
  run.querySelector(".cancel").hidden = true;
  refresh();
}

function finish(run, asked, data) {
  const mean = data.nfe.reduce((a, b) => a + b, 0) / data.nfe.length;
  run.querySelector(".state").textContent = `${mean.toFixed(1)} calls per sample, ${data.seconds} s`;
  run.querySelector("progress").value = 1;
  data.images.forEach((png, k) => {
    const old = run.querySelector(".grid").children[k];
    if (!png) {
      old.textContent = data.status[k];
      return;
    }
    tile(run, k, png, `sample ${k}, ${data.nfe[k]} calls`);
    const link = document.createElement("a");
    link.href = `data:image/png;base64,${png}`;
    link.download = `${about.model.replace(/\W+/g, "-")}-${data.seed}-${k}.png`;
    link.title = "Download, with the record in the file";
    link.append(run.querySelector(".grid").children[k].firstChild);
    run.querySelector(".grid").children[k].replaceWith(link);
  });
  bars(run, data.nfe);
  const record = run.querySelector(".record"), { images, ...rest } = data;
  record.href = URL.createObjectURL(new Blob([JSON.stringify(rest, null, 1)], { type: "application/json" }));
  record.hidden = false;
}

async function base64(blob) {
  const bytes = new Uint8Array(await blob.arrayBuffer());
  let text = "";
  for (let k = 0; k < bytes.length; k += 0x8000) text += String.fromCharCode(...bytes.subarray(k, k + 0x8000));
  return btoa(text);
}

async function small(file) {
  const bitmap = await createImageBitmap(file), side = Math.max(bitmap.width, bitmap.height);
  const scale = Math.min(1, 1024 / side);
  const canvas = new OffscreenCanvas(Math.ceil(bitmap.width * scale), Math.ceil(bitmap.height * scale));
  canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return canvas.convertToBlob({ type: "image/png" });
}

let under = null, cover = null;
function repaint() {
  const canvas = $("canvas"), brush = canvas.getContext("2d");
  brush.imageSmoothingEnabled = false;
  brush.clearRect(0, 0, canvas.width, canvas.height);
  if (under) brush.drawImage(under, 0, 0, canvas.width, canvas.height);
  brush.globalAlpha = 0.6;
  if (cover) brush.drawImage(cover, 0, 0);
  brush.globalAlpha = 1;
}

async function load() {
  const file = $("image").files[0];
  if (!file) return remove();
  const made = await small(file);
  picture = await base64(made);
  under = await createImageBitmap(made);
  $("canvas").height = Math.round((280 * under.height) / under.width);
  $("paint").hidden = false;
  clean();
}

function clean() {
  cover = new OffscreenCanvas($("canvas").width, $("canvas").height);
  painted = false;
  repaint();
}

function remove() {
  picture = under = cover = null;
  painted = false;
  $("image").value = $("mask").value = "";
  $("paint").hidden = true;
}

function fill(x, y, width, height) {
  const brush = cover.getContext("2d");
  brush.fillStyle = "#e33";
  brush.fillRect(x, y, width, height);
  painted = true;
  repaint();
}

function stroke(event) {
  if (!(event.buttons & 1) || !cover) return;
  const box = $("canvas").getBoundingClientRect(), scale = $("canvas").width / box.width;
  fill((event.clientX - box.left) * scale - 14, (event.clientY - box.top) * scale - 14, 28, 28);
}

function mask() {
  const made = document.createElement("canvas");
  [made.width, made.height] = [cover.width, cover.height];
  const brush = made.getContext("2d");
  brush.drawImage(cover, 0, 0);
  brush.globalCompositeOperation = "source-in";
  brush.fillStyle = "#fff";
  brush.fillRect(0, 0, made.width, made.height);
  brush.globalCompositeOperation = "destination-over";
  brush.fillStyle = "#000";
  brush.fillRect(0, 0, made.width, made.height);
  return made.toDataURL("image/png").split(",")[1];
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  draw();
});
$("form").addEventListener("input", show);
$("new-seed").onclick = () => { $("seed").value = Math.floor(Math.random() * 1e9); };
$("image").onchange = load;
$("clear").onclick = clean;
$("remove").onclick = remove;
$("middle").onclick = () => fill($("canvas").width / 4, $("canvas").height / 4, $("canvas").width / 2, $("canvas").height / 2);
$("canvas").onpointerdown = $("canvas").onpointermove = stroke;
$("token").onchange = () => {
  sessionStorage.setItem("token", $("token").value);
  learn().then(() => { $("token-field").hidden = true; $("problem").textContent = ""; }, (error) => { $("problem").textContent = error.message; });
};
learn().catch((error) => { $("problem").textContent = error.message; });
setInterval(refresh, 3000);
