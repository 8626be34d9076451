"""Helpers shared by the tests: very small networks with configurations (steps take milliseconds), videos, counters."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from fastlightgen.config import load, main, preset
from fastlightgen.data.cache import write_cache
from fastlightgen.data.source import Batch
from fastlightgen.engine.folder import commit
from fastlightgen.engine.log import read_metrics
from fastlightgen.models.base import VideoDiT
from fastlightgen.models.folder.weights import build, save_model
from fastlightgen.train import train
from fastlightgen.world.source import ShapesSource

BLOCKS, PRUNED = 4, [1, 2]
KEPT = [i for i in range(BLOCKS) if i not in PRUNED]
NETWORK = {
    "patch_size": [1, 2, 2],
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "in_channels": 25,
    "out_channels": 12,
    "text_dim": 48,
    "freq_dim": 16,
    "ffn_dim": 24,
}


def measured_with() -> dict[str, str | None]:
    """What a file of results says about its origin."""
    return {"torch": str(torch.__version__), "date": time.strftime("%Y-%m-%d"), "commit": commit()}


def small_wan(blocks: int = BLOCKS, seed: int = 0) -> VideoDiT:
    return build(NETWORK | {"num_layers": blocks}, seed)


def small_hunyuan(double: int = 2, single: int = 3, seed: int = 0, **changes) -> VideoDiT:
    """The network of model=tiny-hunyuan, but smaller."""
    network = preset("tiny-hunyuan")["network"] | {"num_attention_heads": 2, "attention_head_dim": 8}
    network |= {"rope_axes_dim": [4, 2, 2], "num_layers": double, "num_single_layers": single}
    return build(network | changes, seed)


# Plain settings of the stages for tests, whatever the tiny preset is tuned to.
PLAIN = {
    "1": "clips=64",
    "2": "guided=1 estimator=full p=0.5 lr=5e-4 lr_schedule=constant warmup=20",
    "3": "critic_start=0 rollouts=fresh sampler=stochastic lr=1e-4 lr_fake=4e-4 beta1=2.5 a1=0.5 b1=0.5 shift=3",
}


def plain(words: Sequence[str]) -> dict[str, str]:
    """The words of a training command as a dict, after the plain settings of its stages; later words win."""
    given = dict(w.split("=", 1) for w in words)
    stages = {"all": {n: f"stage{n}." for n in PLAIN}}.get(given["stage"], {given["stage"]: ""})
    if any("method" in key for key in given) or given.get("model", "tiny") != "tiny":
        stages = {}
    pairs = [(f"{prefix}{w}").split("=", 1) for n, prefix in stages.items() for w in PLAIN.get(n, "").split()]
    return dict(pairs) | given


def config(stage: int, *words: str):
    """The configuration of a stage for the small model; a later word replaces an earlier one with the same key."""
    own = ["critic_start=0"] if stage == 3 else []
    usual = ["run=unused", "batch=2", "shift=3", "dtype=float32", "progress=false"]
    given = plain([f"stage={stage}", *usual, *own, *words])
    return load([f"{k}={v}" for k, v in given.items()])


def crop(batch: Batch, size: int = 4, frames: int = 2) -> Batch:
    """A corner of every clip, so that network calls are fast."""

    def cut(x: torch.Tensor) -> torch.Tensor:
        return x[..., :frames, :size, :size].contiguous() if x.dim() == 5 else x

    return Batch(cut(batch.x0), batch.cond.map(cut), batch.null.map(cut))


def batches(size: int = 2, dtype: torch.dtype = torch.float32):
    """A function from a step to a cropped batch of the built-in world."""
    source = ShapesSource(0)

    def batch(step: int) -> Batch:
        b = crop(source.batch(step, size))
        return Batch(
            b.x0.to(dtype), *(replace(c, text=c.text.to(dtype), image=c.image.to(dtype)) for c in (b.cond, b.null))
        )

    return batch


def empty_sweep(sets: int, samples: int, width: int = 0) -> SimpleNamespace:
    """A sweep of Stage I that stands in no file and has no bar."""
    table = torch.full((sets, samples, width) if width else (sets, samples), torch.nan)
    return SimpleNamespace(table=table, tick=lambda scores: None, note=lambda: None)


def write_ranking(path: Path, pruned=PRUNED, blocks: int = BLOCKS) -> Path:
    """Write a ranking file with the parts of Stage I's file that Stage II reads."""
    kept = [i for i in range(blocks) if i not in pruned]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"units": [{"index": i} for i in range(blocks)], "kept": kept, "pruned": list(pruned)}))
    return path


def write_inputs(folder: Path) -> dict[int, list[str]]:
    """Write a teacher, a ranking and a Stage II model; return the command line of each stage that uses them."""
    save_model(small_wan(), folder / "teacher", steps=2, guidance=2.0, shift=3.0)
    save_model(small_wan(seed=1), folder / "stage2model", steps=2, guidance=2.0, shift=3.0, pruned_path=KEPT)
    ranking = write_ranking(folder / "importance.json")
    model = f"model={folder / 'teacher'}"
    common = [model, "batch=2", "shift=3", "progress=false", "threads=1", "iters=7", "save_every=3", "log_every=2"]
    return {
        0: [*common, f"init={folder / 'teacher'}"],
        2: [*common, f"importance={ranking}", "warmup=3", "lr=1e-3"],
        3: [*common, f"stage2_model={folder / 'stage2model'}", "ratio=2", "lr=1e-3", "lr_fake=1e-3", "critic_start=0"],
    }


def write_shapes(folder: Path, clips: int) -> None:
    """Write a latent cache of clips of the built-in world."""
    batch = ShapesSource(0).batch(0, clips)
    shard = {"latents": batch.x0, "text": batch.cond.text, "text_len": batch.cond.text_len, "image": batch.cond.image}
    write_cache(folder, [shard], {"text": batch.null.text[0], "text_len": batch.null.text_len[0]})


def without_flags() -> dict[str, str]:
    """The environment for a pytest of its own: without the flags of this one, such as a limit of coverage."""
    return {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}


def run_train(*words: str) -> None:
    """Run the command in this process; errors raise SystemExit. A later word replaces an earlier one."""
    main(train, "train", [f"{k}={v}" for k, v in plain(words).items()])


def tiny_run(root: Path, preset: str, ratio: float) -> Path:
    """The run folder of a preset of the built-in world: a teacher of one step, then one step of each stage."""
    common = ["progress=false", "threads=1", "batch=2", "sample_every=0"]
    run_train("stage=0", f"run={root / 'teacher'}", f"model={preset}", "iters=1", *common)
    common += [f"run={root / 'run'}", f"model={root / 'teacher/stage0/model'}"]
    run_train("stage=1", "clips=2", "timesteps=1", f"ratio={ratio}", *common[:3], *common[4:])
    run_train("stage=2", "iters=1", "checkpointing=true", *common)
    run_train("stage=3", "iters=1", "critic_start=0", "steps=2", "ratio=1", *common)
    return root / "run"


def with_random_norms(model: VideoDiT, seed: int) -> VideoDiT:
    """Move the weights of all norms, which start as the identity, so that a lost one is seen."""
    gen = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                p += 0.3 * torch.randn(p.shape, generator=gen)
    return model


def error_line(capsys: pytest.CaptureFixture, run: Callable[..., None], *words: str) -> str:
    """The one line with which a command refuses its words."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(*words)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1
    return err


def run_alone(folder: Path, banned: Sequence[str], *given: str) -> subprocess.CompletedProcess:
    """Run the generate.py of an exported folder in a process that can import neither this package nor `banned`."""
    code = (
        f"import runpy, sys; sys.modules.update(dict.fromkeys({['fastlightgen', *banned]})); "
        "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    command = [sys.executable, "-c", code, str(folder / "generate.py"), "threads=1", *given]
    alone = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(command, capture_output=True, text=True, cwd=folder.parent, env=alone)


def result(run: Path, stage: int) -> dict:
    """The results of a run that an interruption must not change."""
    folder = run / f"stage{stage}"
    latest = max((folder / "checkpoints").glob("step-*"))
    files = sorted(latest.glob("*.safetensors"))
    return {
        "model": load_file(folder / "model" / "diffusion_pytorch_model.safetensors"),
        "state": {f.name: load_file(f) for f in files},
        "card": json.loads((folder / "model" / "fastlightgen.json").read_text()),
        "metrics": [untimed(r) for r in read_metrics(folder / "metrics.jsonl")],
    }


def untimed(record: dict) -> dict:
    """A line of metrics.jsonl without its times."""
    return {k: v for k, v in record.items() if k != "sec_per_step" and not k.startswith("share_")}


def assert_same(a, b) -> None:
    """Assert bit equality, also inside dicts."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b)
    else:
        assert a == b


def numbered(count: int, height: int = 32, width: int = 48) -> np.ndarray:
    """A film [count, height, width, 3] whose picture k has the grey level 20 + 10 k."""
    return np.broadcast_to((20 + 10 * np.arange(count, dtype=np.uint8))[:, None, None, None], (count, height, width, 3))


def write_video(file: Path, film: np.ndarray, rate: int, stamps=None, options=None) -> Path:
    """Write a film as a video at `rate` pictures per second, or with picture k at stamps[k] / rate seconds."""
    import av

    codec, pixels = {".webm": ("libvpx", "yuv420p"), ".gif": ("gif", "rgb8")}.get(file.suffix, ("libx264", "yuv420p"))
    with av.open(str(file), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=options or {})
        stream.height, stream.width, stream.pix_fmt = film.shape[1], film.shape[2], pixels
        stream.codec_context.time_base = Fraction(1, rate)
        for k, picture in enumerate(film):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame.pts, frame.time_base = stamps[k] if stamps else k, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file


@torch.no_grad()
def counted_flops(model: VideoDiT, x_t: torch.Tensor, t: torch.Tensor, cond) -> list[int]:
    """Operations of each block by torch's counter: those of a forward pass minus those of one without the block."""
    out = []
    for keep in (None, *([j for j in range(model.num_blocks) if j != i] for i in range(model.num_blocks))):
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # it counts matrix products
            model(x_t, t, cond, keep)
        out.append(counter.get_total_flops())
    return [out[0] - n for n in out[1:]]


def counted(fn) -> int:
    """Operations by torch's counter, which lacks the CPU's attention kernel: it counts like the others."""
    aten = torch.ops.aten
    kernels = {
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, out_shape=None, **__: sdpa_flop_count(
            q, k, v
        ),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, v, *_, out_shape=None, **__: (
            sdpa_backward_flop_count(g, q, k, v)
        ),
    }
    with FlopCounterMode(display=False, custom_mapping=kernels) as counter:
        fn()
    return counter.get_total_flops()


def typed(line: str) -> tuple[str, list[str]]:
    """(command, words) of a command line after `-m fastlightgen.`, as bash and zsh read it where they are installed."""
    read = [
        subprocess.run([shell, "-c", f"printf '%s\\n' {line}"], capture_output=True, text=True, check=True).stdout
        for shell in ("bash", "zsh")
        if shutil.which(shell)
    ]
    assert len(set(read)) == 1
    words = read[0].splitlines()
    at = words.index("-m") + 1
    assert words[at].startswith("fastlightgen.")
    return words[at].removeprefix("fastlightgen."), words[at + 1 :]
