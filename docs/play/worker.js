// Runs the networks beside the page, so that it stays responsive: onnxruntime-web on one thread.

import * as ort from "./onnxruntime/ort.wasm.bundle.min.mjs";
import { encode, noise, pixels, sample } from "./world.js";

const RUNTIME = "onnxruntime/ort-wasm-simd-threaded.wasm.gz";
ort.env.wasm.numThreads = 1;  // more need headers that a plain file server does not send
ort.env.logLevel = "error";

const page = await (await fetch("play.json")).json();
const size = page.latent.reduce((a, b) => a * b);
let latest = 0;  // id of the newest request; older ones end at their next step

async function unpacked(file) {
  const response = await fetch(file);
  if (!response.ok) throw new Error(`${file} is missing (${response.status})`);
  const parts = [], reader = response.body.getReader();
  for (let part; !(part = await reader.read()).done;) {
    parts.push(part.value);
    postMessage({ type: "loaded", file, bytes: part.value.length });
  }
  const blob = new Blob(parts), start = new Uint8Array(await blob.slice(0, 2).arrayBuffer());
  const packed = start[0] === 0x1f && start[1] === 0x8b;  // some servers unpack .gz themselves
  const stream = packed ? blob.stream().pipeThrough(new DecompressionStream("gzip")) : blob.stream();
  return new Response(stream).arrayBuffer();
}

// docs/play/make.py describes the file.
async function open(file) {
  const data = await unpacked(file), [graph, count] = new Uint32Array(data, 0, 2);
  const [first, second, third] = [0, 1, 2].map((plane) => new Uint8Array(data, 8 + graph + plane * count, count));
  const weights = new Uint32Array(count);
  for (let i = 0; i < count; i++) weights[i] = first[i] << 24 | second[i] << 16 | third[i] << 8;  // bits of a float32
  await runtime;
  const session = await ort.InferenceSession.create(new Uint8Array(data, 8, graph), {
    executionProviders: ["wasm"],
    externalData: [{ path: "weights", data: new Uint8Array(weights.buffer) }],
  });
  await predict(session, encode("", page.world), new Float32Array(size), 1);  // the first evaluation is a slow one
  return session;
}

async function predict(session, text, x, t) {
  const [, , ...grid] = page.latent;
  const channels = 1 + page.latent[1];  // of the first frame, which is not given here
  const { v } = await session.run({
    x_t: new ort.Tensor("float32", x, page.latent),
    t: new ort.Tensor("float32", [t], [1]),
    text: new ort.Tensor("float32", text, [1, page.world.tokens, text.length / page.world.tokens]),
    image: new ort.Tensor("float32", new Float32Array(channels * grid.reduce((a, b) => a * b)), [1, channels, ...grid]),
  });
  return v.data;
}

const runtime = unpacked(RUNTIME).then((binary) => { ort.env.wasm.wasmBinary = binary; });
const networks = { student: open("student.net.gz") };
networks.teacher = networks.student.then(() => open("teacher.net.gz"));
const failed = (error) => postMessage({ type: "failed", text: error.message });
for (const [name, network] of Object.entries(networks)) network.then(() => postMessage({ type: "ready", name }), failed);

async function make({ id, way, prompt, seed }) {
  const { network, guidance, times, sampler } = page.ways[way];
  const session = await networks[network];
  if (id !== latest) return;
  const text = encode(prompt, page.world), blank = encode("", page.world);
  const guided = async (x, t) => {
    const v = await predict(session, text, x, t);
    if (guidance === 1) return v;
    const without = await predict(session, blank, x, t);
    return v.map((value, k) => without[k] + guidance * (value - without[k]));
  };
  let seconds = 0, step = 0, started = performance.now();
  for await (const estimate of sample(guided, times, sampler, noise(seed, size))) {
    seconds += (performance.now() - started) / 1000;
    const frames = pixels(estimate, page.latent, page.world);
    postMessage({ type: "step", id, way, step: ++step, seconds, frames }, [frames.buffer]);
    await new Promise((done) => setTimeout(done));  // lets a newer request in
    if (id !== latest) return;
    started = performance.now();
  }
}

let queue = Promise.resolve();
onmessage = ({ data }) => {
  latest = data.id;
  queue = queue.then(() => make(data)).catch(failed);
};
postMessage({ type: "page", page });
