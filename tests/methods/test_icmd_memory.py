"""method=icmd: the tensors that the planner counts against the bytes that are alive in real steps."""

from dataclasses import replace

import pytest
import torch
from alive import Alive
from helpers import write_ranking
from method_cases import Source, built, configured

from fastlightgen.config import method_for
from fastlightgen.data.source import Batch
from fastlightgen.models.families import network
from fastlightgen.models.folder.weights import build, save_model
from fastlightgen.parallel.shares import Part
from fastlightgen.planner.step import step_cost
from fastlightgen.stages import frame_heads

LAYERS, PRUNED, SIZE, CLIPS = 12, [4, 5, 6, 7], (5, 16, 32), 2
NETWORK = {"patch_size": [1, 2, 2], "num_attention_heads": 2, "attention_head_dim": 32, "in_channels": 4}
NETWORK |= {"out_channels": 4, "text_dim": 20, "freq_dim": 32, "ffn_dim": 160, "num_layers": LAYERS}
NETWORK |= {"cross_attn_norm": True, "image_dim": None, "added_kv_proj_dim": None}


def batch(self, step: int, size: int, rows=None) -> Batch:
    """Random clips without a mask of the text."""
    x0, _, cond, null = build(NETWORK, 0).example_inputs(size, size=SIZE)
    return Batch(x0, replace(cond, text_len=None), replace(null, text_len=None))


@pytest.mark.parametrize("width", [8, 256], ids=lambda n: f"width={n}")  # heads that are narrow, and as wide as the net
@pytest.mark.parametrize("fused", [False, True], ids=["reference", "fused"])
def test_what_checkpointing_keeps(width, fused, tmp_path, monkeypatch):
    """Hidden states of student and teacher, and in the adversarial steps those of the teacher's second walk."""
    if fused:  # the registered operators run while torch compiles, so this pretends that it does
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(frame_heads, "WIDTH", width)
    monkeypatch.setattr(Source, "batch", batch)
    model = save_model(build(NETWORK, 0), tmp_path / "teacher", guidance=2.0, shift=3.0)
    ranking = write_ranking(tmp_path / "importance.json", PRUNED, LAYERS)
    words = ["stage=2", "method=icmd", f"model={model}", f"importance={ranking}", "mca_start=0", "checkpointing=true"]
    stage = built(*words, "data_check=off", dtype=torch.float32)
    clips = stage.batches(0)
    stage.batches = lambda step: clips
    net = network(NETWORK, SIZE, clips.cond.text.shape[1], fused)
    keep = [i for i in range(LAYERS) if i not in PRUNED]
    step = step_cost(net, method_for(stage.cfg).walks(net, keep, stage.cfg), stage.cfg)
    student = next(p for p in step.passes if p.net == "student")
    judge = next(p for p in step.passes if p.joined == 2)
    assert any(p.beside for p in step.passes)

    found, real = {}, torch.autograd.grad
    with Alive() as made:

        def grad(*args, **keys):
            found["beside"] = made.bytes()
            return real(*args, **keys)

        monkeypatch.setattr(torch.autograd, "grad", grad)
        loss, _ = stage.student_update(0)
        found["student"] = made.bytes()
    loss.backward()
    with Alive() as made:
        kept = stage.judge_update(0)
        found["judge"] = made.bytes()
    del kept
    planned = {
        "beside": step.kept_with(student, 4),
        "student": student.cost.kept_bytes(4),
        "judge": judge.cost.kept_bytes(4),
    }
    # The plan leaves out the clips that wait for the discriminator, some latents of 10 KB and the prompts.
    latents = 6 * clips.x0.nbytes
    for name, size in planned.items():
        assert found[name] - latents <= 1.02 * CLIPS * size and CLIPS * size <= 1.05 * found[name], name


def test_processes_that_share_a_clip_keep_the_states_of_all_its_tokens():
    """8 kept layers of 5 x 8 x 16 tokens, 64 wide: the states and their gradient, whatever the number of processes."""
    keep = [i for i in range(LAYERS) if i not in PRUNED]
    for processes, engine in ((1, "local"), (2, "deepspeed")):
        cfg = configured(
            "stage=2", "method=icmd", f"sequence_parallel={processes}", f"engine={engine}", "checkpointing=true"
        )
        net = network(NETWORK, SIZE, 7).divided(Part(1 / processes, processes))
        held = method_for(cfg).walks(net, keep, cfg).nets
        copies = 1 if processes == 1 else 2  # checkpointing keeps the states of one process anyway
        assert held["student"].head.saved.narrow == copies * 8 * 640 * 64
        assert held["discriminator"].head.constant.narrow == 3 * 640 * (64 * (processes > 1) + 8 * 64)
