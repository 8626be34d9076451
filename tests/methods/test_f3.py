"""method=f3: attention between frames against explicit attention; silenced heads; the recovery against Eq. 7."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from helpers import BLOCKS, KEPT, batches, small_hunyuan, small_wan
from method_cases import TEACHER, built, compare_with_plan, with_gradient, without_gradient, write_hunyuan, write_models

from fastlightgen.config import ConfigError, load, main
from fastlightgen.export import export
from fastlightgen.methods.f3 import dropped, lowest
from fastlightgen.models.folder.weights import load_model, read_card, save_model
from fastlightgen.ops import attend
from fastlightgen.rng import generator, normal_like
from fastlightgen.stages.attention import between_frames, masks_of, silence

DOUBLE = batches(2, torch.float64)
FEW = ["clips=2", "timesteps=2", "queries=3"]


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> list[str]:
    teacher = next(w for w in write_models(tmp_path_factory.mktemp("models")) if w.startswith("model="))
    return ["stage=2", "method=f3", teacher, *FEW]


def given(tmp_path, mass) -> str:
    """The word that names a file with this attention of blocks and heads."""
    (tmp_path / "attention.json").write_text(json.dumps({"mass": mass}))
    return f"attention={tmp_path / 'attention.json'}"


MASS = [[0.9, 0.1], [0.3, 0.2], [0.05, 0.35], [0.8, 0.7]]  # means .5, .25, .2, .75: blocks 1 and 2 are the lowest


@pytest.mark.parametrize("text", [0, 3])
def test_attention_between_frames_by_explicit_sums(text):
    """2 frames of 2 tokens, and text behind them, of which the last token is padding."""
    gen = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 4 + text, 3, 5, generator=gen, dtype=torch.float64) for _ in range(2))
    mask = None
    if text:
        mask = torch.ones(2, 1, 1, 4 + text, dtype=torch.bool)
        mask[1, ..., -1] = False
    picked, frame = torch.tensor([0, 2, 3]), torch.tensor([0, 0, 1, 1])
    wanted = torch.zeros(2, 3, dtype=torch.float64)
    for b in range(2):
        for h in range(3):
            for i in picked.tolist():
                weights = [(q[b, i, h] @ k[b, j, h] / 5**0.5).exp() for j in range(4 + text)]
                if mask is not None:
                    weights = [w for w, read in zip(weights, mask[b, 0, 0]) if read]
                other = [j for j in range(4) if frame[j] != frame[i]]
                wanted[b, h] += sum(weights[j] for j in other) / sum(weights) / 3
    found = between_frames(q[:, picked], k, frame[picked], frame, mask)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)


@pytest.mark.parametrize("make", [small_wan, small_hunyuan], ids=["wan", "hunyuan"])
def test_the_queries_and_keys_are_those_of_the_blocks(make):
    """softmax(q k^T) v is what the attention's output layer reads; v is caught on its way."""
    net = make().double()
    seen, read = [], []
    net.watch = lambda q, k, mask: seen.append((q, k, mask))
    values = {}
    for i, block in enumerate(net.blocks):
        attn = getattr(block, "attn1", None) or block.attn
        attn.to_v.register_forward_hook(lambda m, a, out, i=i: values.update({i: out}))
        layer, _ = block.attention_outputs()[0]
        layer.register_forward_pre_hook(lambda m, args: read.append(args[0]))
    x_t, t, cond, _ = net.example_inputs(2)
    cond = cond.map(lambda x: x.double() if x.is_floating_point() else x)
    net(x_t.double(), t, cond)
    assert len(seen) == net.num_blocks == len(read)
    for i, ((q, k, mask), got) in enumerate(zip(seen, read, strict=True)):
        v = values[i].unflatten(2, (2, -1))
        image = v.shape[1]
        if image < q.shape[1]:  # a double block: its text has values of its own, of which only the share differs
            scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
            scores = scores if mask is None else scores.masked_fill(~mask, float("-inf"))
            assert scores.softmax(-1)[..., :image].sum(-1).max() <= 1 + 1e-12 and got.shape[1] == image
            continue
        wanted = attend(q, k, v, mask)
        torch.testing.assert_close(got[..., : wanted.shape[2]], wanted, rtol=1e-9, atol=1e-9)


def test_what_is_dropped_by_hand():
    mass, cfg = torch.tensor(MASS), lambda f3, ratio: type("Cfg", (), {"f3": f3, "ratio": ratio})
    assert dropped(cfg("block", 0.5), mass) == ([0, 3], {})
    assert dropped(cfg("attention", 0.5), mass) == ([0, 1, 2, 3], {1: [0, 1], 2: [0, 1]})
    assert dropped(cfg("head", 0.4), mass) == ([0, 1, 2, 3], {0: [1], 1: [1], 2: [0]})  # .1, .2, .05 of 8 heads
    assert lowest(torch.tensor([2.0, 1.0, 1.0, 3.0]), 0.25) == [1]  # of equal ones the first


def test_silenced_attention_adds_nothing():
    """A block without self-attention: the hidden states skip it. One head of two: the other one's part is left."""
    net, x = small_wan(), torch.randn(1, 8, 16)
    whole = copy.deepcopy(net)
    silence(net, masks_of(net, {1: [0, 1], 2: [1]}))
    out = [n.blocks[i].attn1.to_out[0] for n in (net, whole) for i in (1, 2)]
    assert not out[0](x).any()
    torch.testing.assert_close(out[1](x), x[..., :8] @ out[3].weight[:, :8].T + out[3].bias, rtol=1e-5, atol=1e-6)
    changed = {n for (n, a), b in zip(net.named_parameters(), whole.parameters()) if not torch.equal(a, b)}
    assert changed == {
        "blocks.1.attn1.to_out.0.weight",
        "blocks.1.attn1.to_out.0.bias",
        "blocks.2.attn1.to_out.0.weight",
    }


def test_a_single_block_keeps_its_feed_forward():
    net = small_hunyuan()
    whole = copy.deepcopy(net)
    silence(net, masks_of(net, {0: [0, 1], 3: [0, 1]}))
    assert not net.blocks[0].attn.to_out[0].weight.any() and not net.blocks[0].attn.to_add_out.bias.any()
    single, before = net.blocks[3].proj_out, whole.blocks[3].proj_out
    assert not single.weight[:, :16].any() and torch.equal(single.weight[:, 16:], before.weight[:, 16:])
    assert torch.equal(single.bias, before.bias)


def test_the_measurement_is_that_of_explicit_attention(words, tmp_path):
    """All tokens, one clip at one time: the file holds the attention of a network that is walked by hand."""
    built(*words, f"run={tmp_path}", "clips=1", "timesteps=1", "queries=100", "batch=2")
    found = json.loads((tmp_path / "stage2/attention.json").read_text())["mass"]
    net, batch, gen = small_wan(seed=TEACHER), batches(2)(0), generator(0, 1, 0, 0)
    u = 0.02 + 0.96 * torch.rand(1, generator=gen)
    t = 3 * u / (1 + 2 * u)
    x_t = (1 - t) * batch.x0[:1] + t * normal_like(batch.x0[:1], gen)
    rows = []

    def explicit(q, k, mask):
        scores = torch.einsum("qhd,khd->hqk", q[0].double(), k[0].double()) / 8**0.5
        paid = scores.exp() / scores.exp().sum(-1, keepdim=True)
        rows.append(((paid[:, :4, 4:].sum(-1).sum(-1) + paid[:, 4:, :4].sum(-1).sum(-1)) / 8).tolist())

    net.watch = explicit
    with torch.no_grad():
        net(x_t, t, batch.cond.map(lambda x: x[:1]))
    torch.testing.assert_close(torch.tensor(found), torch.tensor(rows), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("f3", ["attention", "head", "block"])
@pytest.mark.parametrize("family", ["wan", "hunyuan"])
def test_what_the_untrained_network_is(family, f3, tmp_path):
    make, root = (small_wan, write_models) if family == "wan" else (small_hunyuan, write_hunyuan)
    teacher = next(w for w in root(tmp_path) if w.startswith("model="))
    stage = built("stage=2", "method=f3", teacher, *FEW, f"run={tmp_path}", f"f3={f3}", "ratio=0.4")
    assert (stage.iters, stage.roles, stage.updates(0)) == (0, {}, [])
    stage.save(tmp_path / "model")
    mass = torch.tensor(json.loads((tmp_path / "stage2/attention.json").read_text())["mass"])
    assert 0 < mass.min() and mass.max() < 1
    keep, silent = dropped(stage_cfg(f3), mass)
    net, made, card = make(seed=TEACHER), load_model(tmp_path / "model"), read_card(tmp_path / "model")
    silence(net, masks_of(net, silent))
    x_t, t, cond, _ = net.example_inputs(2)
    with torch.no_grad():
        assert torch.equal(made(x_t, t, cond), net(x_t, t, cond, keep))
    assert (card["stage"], card["kept_blocks"]) == (2, keep)
    assert {int(i): heads for i, heads in card.get("silent", {}).items()} == silent


def stage_cfg(f3: str):
    return type("Cfg", (), {"f3": f3, "ratio": 0.4})


def test_an_untrained_network_of_other_keys_is_made_anew(words, tmp_path):
    own, folder = [*words, given(tmp_path, MASS), f"run={tmp_path}", "ratio=0.5"], tmp_path / "stage2/start"
    built(*own, "f3=block")
    assert load_model(folder).num_blocks == len(KEPT)
    written = (folder / "fastlightgen.json").stat().st_mtime_ns
    built(*own, "f3=block")
    assert (folder / "fastlightgen.json").stat().st_mtime_ns == written  # with the same keys it stays
    built(*own, "f3=head")
    assert load_model(folder).num_blocks == BLOCKS and len(read_card(folder)["silent"]) == 3


@pytest.mark.parametrize(
    "more", [["f3=block"], ["alpha=0.4", "guided=2"], ["f3=head", "ratio=0.4", "checkpointing=true"]], ids=" ".join
)
def test_the_recovery_is_eq_7(words, more, tmp_path):
    """The teacher's prediction and the data, for what is left; silenced weights get no gradient."""
    stage = built(*words, given(tmp_path, MASS), "ratio=0.5", *more, "recover=true", f"run={tmp_path}")
    own = dict(m.split("=") for m in more)
    alpha, w = float(own.get("alpha", 1)), float(own.get("guided", 1))
    student, teacher = load_model(tmp_path / "stage2/start").double(), small_wan(seed=TEACHER).double()
    for step in (0, 3):
        batch, gen = DOUBLE(step), generator(0, 23, step)
        u = torch.rand(2, generator=gen).clamp(1e-4, 1)
        t = (3 * u / (1 + 2 * u)).double()
        empty = torch.rand(2, generator=gen) < 0.1
        cond = replace(batch.cond, text=torch.where(empty[:, None, None], batch.null.text, batch.cond.text))
        noise, at = normal_like(batch.x0, gen), t.view(-1, 1, 1, 1, 1)
        x_t = (1 - at) * batch.x0 + at * noise
        v_c, v_n = teacher(x_t, t, cond), teacher(x_t, t, batch.null)
        target = (v_n + w * (v_c - v_n)).detach()
        v = student(x_t, t, cond)
        wanted = alpha * (v - target).square().mean() + (1 - alpha) * (v - (noise - batch.x0)).square().mean()
        loss, record = stage.loss(step)
        assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)
        assert record["distill"] == pytest.approx((v - target).square().mean().item(), rel=1e-6)
        hand = torch.autograd.grad(wanted, list(student.parameters()), allow_unused=True)
        loss.backward()
        assert without_gradient(stage.teacher)
        for (name, p), h in zip(stage.student.named_parameters(), hand, strict=True):
            if name in masks_of(student, silent_of(tmp_path)):
                assert not p.grad[p == 0].any() and (p.grad[p != 0].any() or not p.any())
                h = h * (p != 0)
            torch.testing.assert_close(p.grad, h, rtol=1e-5, atol=1e-9 + 1e-6 * h.abs().max().item())
        stage.student.zero_grad()
    if own.get("f3") == "block":
        loss, _ = stage.loss(1)
        loss.backward()
        assert with_gradient(stage.student) and stage.student.num_blocks == len(KEPT)


def silent_of(run) -> dict:
    return {int(i): heads for i, heads in read_card(run / "stage2/start").get("silent", {}).items()}


@pytest.mark.parametrize("more", [["f3=block"], ["guided=2"]], ids=" ".join)
def test_the_planner_counts_a_real_step(words, more, tmp_path):
    """Silenced heads are computed all the same."""
    words = [*words, given(tmp_path, MASS), "ratio=0.5", "recover=true", f"run={tmp_path}"]
    cost = compare_with_plan(built(*words, *more, dtype=torch.float32))
    student = len(KEPT) if "f3=block" in more else BLOCKS
    assert cost.total("grad_calls") == student
    assert cost.total("calls") == student + BLOCKS * (2 if "guided=2" in more else 1)


def test_errors_are_one_line(words, tmp_path):
    with pytest.raises(ConfigError) as error:
        load(["stage=2", "run=r", "method=f3", "guided=2", "teacher_guidance=embedded"])
    assert str(error.value) == "guided=2.0: teacher_guidance=embedded guides the target too; use guided=1"
    file = given(tmp_path, MASS[:3])
    still = save_model(small_wan(), tmp_path / "still", stage=2, kept_blocks=[0, 1, 2, 3], silent={"1": [0, 1]})
    for own, message in (
        (
            [*words, file],
            f"{file}: has 3 blocks of 2 heads, the model 4 of 2; leave attention= out to measure it",
        ),
        (
            ["stage=3", words[2], f"stage2_model={still}"],
            f"{still}: method=f3 silenced the self-attention of 1 blocks, which Stage III would train again; use a mo",
        ),
        (
            ["stage=3", "method=regression", words[2], "student=full", f"start_model={still}"],
            f"{still}: method=f3 silenced the self-attention of 1 blocks, which Stage III would train again; use a mo",
        ),
    ):
        with pytest.raises(ValueError) as error:
            built(*own, f"run={tmp_path}")
        assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_clips_of_one_frame_are_refused(words, tmp_path, monkeypatch):
    import method_cases

    whole = method_cases.Source.batch

    def first(self, *args):
        batch = whole(self, *args)
        cut = lambda x: x[:, :, :1] if x.dim() == 5 else x  # noqa: E731
        return type(batch)(cut(batch.x0), batch.cond.map(cut), batch.null.map(cut))

    monkeypatch.setattr(method_cases.Source, "batch", first)
    with pytest.raises(ValueError, match="^method=f3: the clips have 1 latent frame, and attention between frames"):
        built(*words, f"run={tmp_path}", dtype=torch.float32)


def test_export_says_that_silenced_heads_save_no_time(pipeline, tmp_path, capsys):
    """Stock diffusers loads the network as it is; export itself compares weights and a prediction."""
    source = pipeline("wan_t2v")
    net = load_model(source / "transformer")
    silence(net, masks_of(net, {1: [0]}))
    card = {"stage": 2, "kept_blocks": list(range(net.num_blocks)), "steps": 2, "guidance": 2.0, "shift": 3.0}
    model = save_model(net, tmp_path / "model", silent={1: [0]}, **card)
    words = [f"model={model}", f"pipeline={source}", f"out={tmp_path / 'out'}", "dtype=float32", "threads=1"]
    main(export, "export", [*words, "progress=false"])
    said = capsys.readouterr().out
    assert said.index("note: 1 heads in 1 blocks are silenced") < said.index("network: stock diffusers holds the same")
    assert read_card(tmp_path / "out")["call"]["num_inference_steps"] == 2
