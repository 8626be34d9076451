"""README.md of an ONNX folder: how to make a clip, what the step reads, and how to call it from another program."""

from typing import Any

PAGE = """# A student as ONNX

`step.onnx` ({bytes}, {weights} weights) is one evaluation of the network at {size} (height x width x frames), batch 1. All
shapes are static. `generate.py` needs Python, numpy and onnxruntime 1.23 or newer, and nothing else:

```
{calls}
```

{calling}

`seed=N` decides the noise, `noise=FILE.npy` gives it ({steps} x {noise}; the first row starts, the others are fresh
noise after each step), `threads=N` limits the CPU cores.

## Sampling

{steps} steps at t = {times}, sampler `{sampler}`, guidance {guidance:g} (in the weights: one prediction per step), shift
{shift:g}, {fps} frames per second. The network predicts v = noise - clip. {rule} Other steps, samplers or guidance
are not what this student was trained for.

## Inputs and output

| name | shape | type |
|---|---|---|
{rows}
"""

RULES = {
    "ode": "A step from t to t' is x + (t' - t) v; the last one goes to t' = 0.",
    "stochastic": "A step from t to t' is (1 - t') (x - t v) + t' noise with fresh noise; the last result is x - t v.",
}

WORLD = """The prompt is a sentence of the built-in world; a word that it does not know is refused with the list of those that it does.
`out=FILE.png` is an animated picture, `out=FILE.npy` the frames as uint8 [frame, row, column, colour]. The picture that a
clip may start from is not among the keys: its input channels are zeros."""

REAL = """`FOLDER` holds one `NAME.npy` per input below, except x_t and t, and `hint.npy` where the pipeline has one. The result is
latents: encoders and decoder are not part of this folder. With the pipeline of the teacher:

```python
import numpy, torch
from fastlightgen.pipelines.world import Pipeline

pipeline = Pipeline("PIPELINE", torch.device("cpu"), torch.float32, "{size}")
wish = pipeline.wish("{prompt}", None, {picture}, 1)
for name in {names}:
    numpy.save(f"FOLDER/{{name}}.npy", getattr(wish.cond, name).numpy())
if wish.hint is not None:
    numpy.save("FOLDER/hint.npy", wish.hint.numpy())
# After generate.py: frames as uint8 [clip, frame, row, column, colour].
frames = pipeline.frames(torch.from_numpy(numpy.load("latents.npy")))
```"""

WORLD_PROMPT = "a red ball moves right fast then stops"
PROMPT = "a cat runs over wet sand at sunset"


def readme(settings: dict[str, Any], shown_bytes: str) -> str:
    """Compose the text; `settings`: contents of fastlightgen.json."""
    inputs, latent, world = settings["inputs"], settings["latent"], "world" in settings
    call = f'prompt="{WORLD_PROMPT}" out=clip.png' if world else "inputs=FOLDER out=latents.npy"
    picture = '"first.png"' if "image" in inputs else '""'
    named = {"x_t": latent, "t": [1], **inputs, "v (output)": latent}
    rows = [
        f"| {name} | {' x '.join(map(str, shape))} | {'int64' if name == 'text_len' else 'float32'} |"
        for name, shape in named.items()
    ]
    return PAGE.format(
        bytes=shown_bytes,
        weights=settings["weights"],
        size=settings["size"],
        calls=f"pip install numpy onnxruntime\npython generate.py {call}",
        calling=WORLD if world else REAL.format(size=settings["size"], prompt=PROMPT, picture=picture, names=[*inputs]),
        steps=len(settings["ladder"]),
        noise=" x ".join(map(str, latent[1:])),
        times=", ".join(f"{t:.4g}" for t in settings["ladder"]),
        sampler=settings["sampler"],
        guidance=settings["guidance"],
        shift=settings["shift"],
        fps=settings["fps"],
        rule=RULES[settings["sampler"]],
        rows="\n".join(rows),
    )
