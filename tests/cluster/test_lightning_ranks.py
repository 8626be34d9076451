"""method=lightning as a command on two ranks under DeepSpeed, against one process. gloo on the CPU.

The ranks measure the saliency of a sharded teacher, and load shards of the network that rank 0 wrote.
"""

import importlib.util

import pytest
import torch
from helpers import NETWORK, run_train
from launch import finish, launch
from safetensors.torch import load_file

from fastlightgen.engine.log import read_metrics
from fastlightgen.models.families import build
from fastlightgen.models.folder.weights import save_model

pytestmark = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("lightning")
    wide = NETWORK | {"num_layers": 3, "num_attention_heads": 4}
    teacher = save_model(build(wide, 2), folder / "teacher", guidance=2.0, steps=2)
    own = ["stage=2", "method=lightning", f"model={teacher}", "align_every=1", "clips=4", "iters=4", "batch=4"]
    return [*own, "lr=1e-3", "warmup=0", "log_every=1", "progress=false", "threads=1", "dtype=float32", "shift=3"]


@pytest.fixture(scope="module")
def alone(words, tmp_path_factory):
    run = tmp_path_factory.mktemp("alone")
    run_train(*words, f"run={run}")
    return run


@pytest.mark.parametrize("more", [["zero=3"], ["zero=2", "sequence_parallel=2"]], ids=" ".join)
def test_two_ranks_prune_and_train_as_one_process(words, alone, more, tmp_path):
    """Sums in float32 differ in their order; the same rows go, and the losses agree within 1e-5."""
    process = launch(2, *words, "engine=deepspeed", *more, f"run={tmp_path}")
    out, err = finish(process)
    assert process.returncode == 0, err[-3000:]
    names = "stage2/start/diffusion_pytorch_model.safetensors"
    one, two = (load_file(run / names) for run in (alone, tmp_path))
    assert one.keys() == two.keys() and one["blocks.0.attn1.to_q.weight"].shape == (16, 32)
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-6, atol=1e-7)
    one, two = (read_metrics(run / "stage2/metrics.jsonl") for run in (alone, tmp_path))
    assert len(one) == len(two) == 4
    for a, b in zip(one, two, strict=True):
        keys = {"loss", "align_output", "align_layers", "grad_norm"} & a.keys()
        assert {k: b[k] for k in keys} == pytest.approx({k: a[k] for k in keys}, rel=1e-5)
