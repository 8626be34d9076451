"""README.md of an ONNX or ExecuTorch folder: how to make a clip, what the step reads, how other programs call it."""

from typing import Any

from fastlightgen.parallel.log import size

ONNX = """# A student as ONNX

`step.onnx` ({bytes}, {weights} weights) is one evaluation of the network for one clip of {size} (height x width x
frames). All shapes are static. On a CPU, onnxruntime also holds the attention weights of one block: {attention}.
`generate.py` needs Python, numpy and onnxruntime 1.23 or newer, and nothing else:
"""

EXECUTORCH = """# A student for ExecuTorch

`step.pte` ({bytes}, {weights} weights) is one evaluation of the network for one clip of {size} (height x width x
frames), lowered to XNNPACK for CPUs. All shapes are static. A program calls its method `forward` with the inputs in the
order of the table below. `generate.py` needs Python and the package executorch {version}, which brings torch and numpy:
"""

PAGE = """{start}
```
{calls}
```

{calling}

`seed=N` decides the noise, `noise=FILE.npy` gives it ({steps} x {noise}; the first row starts, the others are fresh
noise after each step), `threads=N` limits the CPU cores.

## Sampling

{steps} steps at t = {times} (shift {shift:g}), sampler `{sampler}`, guidance {guidance:g} with one prediction per step,
{fps} frames per second. This student was trained for no others. The network predicts v = noise - clip.
{rule}

## Inputs and output

| name | shape | type |
|---|---|---|
{rows}
"""

RULES = {
    "ode": "A step from t to t' is x + (t' - t) v; the last one goes to t' = 0.",
    "stochastic": "A step from t to t' is (1 - t') (x - t v) + t' noise with fresh noise; the last result is x - t v.",
}

WORLD = """The prompt is a sentence of the built-in world; an unknown word is refused with the list of all words.
`out=FILE.png` is an animated picture, `out=FILE.npy` the frames as uint8 [frame, row, column, colour]. No key gives the
picture that a clip may start from: its input channels are zeros."""

REAL = """`FOLDER` holds one `NAME.npy` per input below, except x_t and t, and `hint.npy` where the pipeline has one.
{result} With the pipeline of the teacher:

```python
import numpy, torch
from fastlightgen.pipelines.world import Pipeline

pipeline = Pipeline("PIPELINE", torch.device("cpu"), torch.float32, "{size}")
wish = pipeline.wish("{prompt}", None, {picture}, 1)
for name in {names}:
    numpy.save(f"FOLDER/{{name}}.npy", getattr(wish.cond, name).numpy())
if wish.hint is not None:
    numpy.save("FOLDER/hint.npy", wish.hint.numpy())
{after}```"""

LATENTS = {
    "result": "The result is latents: encoders and decoder are not part of this folder.",
    "after": """# After generate.py: frames as uint8 [clip, frame, row, column, colour].
frames = pipeline.frames(torch.from_numpy(numpy.load("latents.npy")))
""",
}
FRAMES = {
    "result": """`out=FILE.png` is an animated picture, `out=FILE.npy` the frames as uint8 [frame, row, column, colour].
`{decoder}` makes them: latents {latent} to frames [1, 3, frame, row, column] in [0, 1]. Encoders are not part of this
folder: they make the inputs.""",
    "after": "",
}

WORLD_PROMPT = "a red ball moves right fast then stops"
PROMPT = "a cat runs over wet sand at sunset"


def readme(settings: dict[str, Any], stored: int, attention: int, executorch: str = "") -> str:
    """Compose the text; `settings`: contents of fastlightgen.json, `stored`, `attention`: bytes.

    `executorch`: the version that the step was made with; empty: it is ONNX.
    """
    inputs, latent, world = settings["inputs"], settings["latent"], "world" in settings
    decoder = settings.get("decoder", "")
    made = "clip.png" if world or decoder else "latents.npy"
    call = f'prompt="{WORLD_PROMPT}" out={made}' if world else f"inputs=FOLDER out={made}"
    told = {
        key: text.format(decoder=decoder, latent=" x ".join(map(str, latent)))
        for key, text in (FRAMES if decoder else LATENTS).items()
    }
    asked = {"size": settings["size"], "prompt": PROMPT, "names": [*inputs]}
    picture = '"first.png"' if "image" in inputs else '""'
    named = {"x_t": latent, "t": [1], **inputs, "v (output)": latent}
    rows = [
        f"| {name} | {' x '.join(map(str, shape))} | {'int64' if name == 'text_len' else 'float32'} |"
        for name, shape in named.items()
    ]
    start = (EXECUTORCH if executorch else ONNX).format(
        bytes=size(stored),
        attention=size(attention),
        weights=settings["weights"],
        size=settings["size"],
        version=executorch,
    )
    packages = "executorch" if executorch else "numpy onnxruntime"
    return PAGE.format(
        start=start,
        calls=f"pip install {packages}\npython generate.py {call}",
        calling=WORLD if world else REAL.format(picture=picture, **asked, **told),
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
