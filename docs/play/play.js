// The page: form, cards and playback. worker.js runs the networks.

import { caption, changes, check, noise, parse, pixels, tidy } from "./world.js";

const $ = (id) => document.getElementById(id);
const SHOWN = 4;  // small pictures of a card
const FIELDS = ["colour", "kind", "direction", "speed", "change", "other"];

const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
const cards = {}, ready = new Set();
let page, worker, asked = null, id = 0, frame = 0, playing = !still;

const seconds = (value) => `${value < 10 ? value.toFixed(2) : value.toFixed(0)} s`;
const total = () => Object.values(page.bytes).reduce((a, b) => a + b);
const megabytes = () => (total() / 1e6).toFixed(1);
const evaluations = ({ times, blocks, guidance }) => times.length * blocks * (guidance === 1 ? 1 : 2);

class Card {
  constructor(way, plan, most) {
    const whole = $("card").content.cloneNode(true);
    for (const name of ["h2", "how", "clip", "start", "time", "steps"]) {
      this[name] = whole.querySelector(name === "h2" ? name : `.${name}`);
    }
    const count = plan.times.length, doubled = plan.guidance === 1 ? "" : "2 × ", work = evaluations(plan);
    this.way = way;
    this.plan = plan;
    this.title = `${plan.network === "student" ? "Student" : "Teacher"}, ${count}\u00a0steps`;
    this.h2.textContent = this.title;
    this.how.textContent = `${work.toLocaleString("en")} blocks: ${doubled}${count} steps × ${plan.blocks}`;
    whole.querySelector(".cost i").style.width = `${100 * work / most}%`;
    whole.querySelector(".card").classList.add(way);
    whole.querySelector(".card").setAttribute("aria-label", this.title);
    const shown = Math.min(SHOWN, count);
    this.buttons = Array.from({ length: shown }, (_, i) => this.button(Math.round((i + 1) * count / shown)));
    this.steps.append(...this.buttons);
    this.steps.setAttribute("aria-label", `${this.title}: the estimate after a step`);
    this.canvases = [this.clip, ...this.buttons.map((button) => button.firstChild)];
    for (const canvas of this.canvases) [canvas.width, canvas.height] = page.side;
    this.start.onclick = () => this.ask();
    this.clear();
    document.querySelector(".cards").append(whole);
  }

  button(step) {
    const button = document.createElement("button");
    button.type = "button";
    button.step = step;
    button.append(document.createElement("canvas"), `${step}`);
    button.setAttribute("aria-label", `After step ${step}`);
    button.onclick = () => { this.picked = step; this.draw(); };
    return button;
  }

  // Shows the noise that all clips start from.
  clear(start = null) {
    this.estimates = start ? [start] : [];
    this.picked = null;
    this.tell("", true);
    this.draw();
  }

  ask() {
    this.start.hidden = true;
    this.tell("waiting", true);
    worker.postMessage({ ...asked, id, way: this.way });
  }

  tell(text, busy) {
    this.time.textContent = text;
    this.time.classList.toggle("busy", busy);
  }

  take(step, time, frames) {
    this.estimates[step] = frames;
    this.done = step === this.plan.times.length;
    this.tell(this.done ? seconds(time) : `step ${step} of ${this.plan.times.length}`, !this.done);
    this.seconds = time;
    this.draw();
  }

  // What is shown has changed.
  draw() {
    this.shown = this.picked ?? this.estimates.length - 1;
    const where = this.shown < 1 ? "noise" : `after step ${this.shown} of ${this.plan.times.length}`;
    this.clip.setAttribute("aria-label", `${this.title}: ${asked ? `“${asked.prompt}”, ${where}` : "no clip yet"}`);
    for (const button of this.buttons) {
      button.disabled = !this.estimates[button.step];
      button.setAttribute("aria-pressed", this.shown === button.step);
    }
    this.paint();
  }

  paint() {
    const pictures = [this.shown, ...this.buttons.map((button) => button.step)];
    pictures.forEach((step, i) => paint(this.canvases[i], this.estimates[step]));
  }
}

function paint(canvas, frames) {
  const brush = canvas.getContext("2d"), size = 4 * canvas.width * canvas.height;
  if (!frames) return brush.clearRect(0, 0, canvas.width, canvas.height);
  brush.putImageData(new ImageData(frames.slice(frame * size, (frame + 1) * size), canvas.width), 0, 0);
}

function seek(number) {
  frame = number % page.latent[2];
  $("frame").value = frame + 1;
  $("count").textContent = `${frame + 1} / ${page.latent[2]}`;
  for (const card of Object.values(cards)) card.paint();
}

function setPlaying(value) {
  playing = value;
  $("play").textContent = playing ? "Pause" : "Play";
}

function say(text) { $("status").textContent = text; }

function refuse(text) {
  $("hint").textContent = text;
  $("prompt").setAttribute("aria-invalid", text !== "");
}

// The sentence as it is checked; the choices follow it if they can make it.
function read() {
  const prompt = tidy($("prompt").value), made = parse(prompt, page.choices);
  for (const name of FIELDS) if (made) $(name).value = made[name];
  label();
  return prompt;
}

// A turn is named after the direction that it leads to.
function label() {
  changes($("direction").value, page.choices).forEach((then, i) => { $("change").options[i].text = then; });
}

function generate() {
  const prompt = read();
  try {
    check(prompt, page.world);
  } catch (error) {
    refuse(error.message);
    return;
  }
  refuse("");
  const seed = Math.abs(Math.trunc($("seed").value)) || 0;
  asked = { prompt, seed };
  id += 1;
  const size = page.latent.reduce((a, b) => a * b);
  const start = pixels(noise(seed, size).next().value, page.latent, page.world);
  for (const card of Object.values(cards)) card.clear(start);
  if (still) seek(Math.floor(page.latent[2] / 2));
  cards.slow.start.hidden = false;
  cards.student.ask();
  cards.teacher.ask();
  announce();
}

function announce() {
  if (!ready.has("student")) return say(`Loading ${megabytes()} MB, once.`);
  const taught = parse(asked.prompt, page.choices) ? "" : " It was taught no such sentence, so anything may come.";
  return say(`Writing “${asked.prompt}”.${taught}`);
}

function choose() {
  label();
  $("prompt").value = caption(Object.fromEntries(FIELDS.map((name) => [name, $(name).value])), page.choices);
  generate();
}

function surprise() {
  for (const name of FIELDS) {
    const options = $(name).options;
    $(name).selectedIndex = Math.floor(Math.random() * options.length);
  }
  if ($("other").value.startsWith(`${$("colour").value} `)) $("other").value = "";  // never the same colour twice
  $("seed").value = Math.floor(Math.random() * 10000);
  choose();
}

function fill(name, values, labels = values) {
  $(name).replaceChildren(...values.map((value, i) => new Option(labels[i], value)));
  $(name).onchange = choose;
}

function open(given) {
  page = given;
  const [, , frames, height, width] = page.latent, { colours, kinds, directions, speeds } = page.choices;
  page.side = [2 * width, 2 * height];
  const most = Math.max(...Object.values(page.ways).map(evaluations));
  for (const [way, plan] of Object.entries(page.ways)) cards[way] = new Card(way, plan, most);
  cards.slow.start.textContent = `Run ${page.ways.slow.times.length} steps`;
  $("frame").max = frames;
  fill("colour", colours);
  fill("kind", kinds);
  fill("direction", directions);
  fill("speed", speeds);
  fill("change", [0, 1, 2, 3, 4]);
  const others = colours.flatMap((colour) => kinds.map((kind) => `${colour} ${kind}`));
  fill("other", ["", ...others], ["nothing", ...others]);
  $("progress").max = total();
  $("size").textContent = `This page loads ${megabytes()} MB once: two networks, and onnxruntime-web (MIT) as WebAssembly.`;
  $("status").className = "";
  $("prompt").onkeydown = (event) => {
    if (event.key === "Enter" && !event.isComposing) { event.preventDefault(); generate(); }
  };
  $("form").onsubmit = (event) => { event.preventDefault(); generate(); };
  $("prompt").oninput = () => { refuse(""); read(); };
  $("seed").onchange = generate;
  $("surprise").onclick = surprise;
  $("play").onclick = () => setPlaying(!playing);
  $("frame").oninput = () => { setPlaying(false); seek($("frame").value - 1); };
  setPlaying(playing);
  setInterval(() => { if (playing) seek(frame + 1); }, 1000 / page.fps);
  generate();
}

function took(card) {
  const { student } = cards;
  if (card === student) return say(`The student took ${seconds(student.seconds)}.`);
  const ratio = (card.seconds / student.seconds).toFixed(1).replace(/\.0$/, "");
  return say(`The student took ${seconds(student.seconds)}, the teacher in ${card.plan.times.length} steps ` +
    `${seconds(card.seconds)}, ${ratio} times as long.`);
}

const hear = {
  page: (message) => open(message.page),
  loaded: ({ bytes }) => { $("progress").value += bytes; },
  ready: ({ name }) => {
    ready.add(name);
    $("progress").hidden = ready.size === 2;
    if (asked && name === "student") announce();
  },
  failed: ({ text }) => {
    $("progress").hidden = true;
    say(`The networks do not run: ${text}. Reload the page, or try another browser.`);
  },
  step: (message) => {
    if (message.id !== id) return;
    const card = cards[message.way];
    card.take(message.step, message.seconds, message.frames);
    if (card.done) took(card);
  },
};

$("picks").open = matchMedia("(min-width: 761px)").matches;
worker = new Worker("worker.js", { type: "module" });
worker.onmessage = ({ data }) => hear[data.type](data);
worker.onerror = (error) => hear.failed({ text: error.message || "this browser runs no module workers" });
