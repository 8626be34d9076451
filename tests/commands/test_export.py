"""The export command: stock diffusers loads the exported folder and samples the same clips as this package."""

import json
import shutil

import numpy as np
import pytest
import torch
from helpers import error_line, typed
from safetensors.torch import load_file, save_file
from students import KEEP, SHIFT, STEPS, make_student, same_noise, stock

from fastlightgen.config import load, main
from fastlightgen.export import export
from fastlightgen.flow import ladder
from fastlightgen.models.base import Cond
from fastlightgen.models.folder.weights import load_model, save_model
from fastlightgen.models.sample import sample
from fastlightgen.pipelines.copies import copy_parts
from fastlightgen.pipelines.export import block_map, call_of

SIZE = {"height": 32, "width": 32, "num_frames": 9}
LATENT = (1, 16, 3, 4, 4)


def run(*words: str) -> None:
    main(export, "export", [*words, "threads=1", "progress=false"])


def refused(capsys, *words: str) -> str:
    return error_line(capsys, run, *words)


@pytest.fixture(scope="module")
def exported(pipeline, tmp_path_factory):
    """kind -> (pipeline folder, student folder, export)."""
    done: dict[tuple, tuple] = {}

    def get(kind: str, sampler: str = "stochastic"):
        if (kind, sampler) not in done:
            root, source = tmp_path_factory.mktemp(kind), pipeline(kind)
            model = make_student(source, root / "model", sampler)
            run(f"model={model}", f"pipeline={source}", f"out={root / 'out'}", "dtype=float32")
            done[kind, sampler] = source, model, root / "out"
        return done[kind, sampler]

    return get


@pytest.mark.parametrize("sampler", ["stochastic", "ode"])
@torch.no_grad()
def test_stock_pipeline_samples_what_we_sample(exported, monkeypatch, sampler):
    """Text-to-video, 4 steps, no guidance, the same noise: the latents agree in float32."""
    source, model, out = exported("wan_t2v", sampler)
    pipe = stock(out)
    assert type(pipe).__name__ == "WanPipeline" and len(pipe.transformer.blocks) == len(KEEP)
    torch.manual_seed(0)
    noise, *fresh = (torch.randn(LATENT) for _ in range(STEPS + 1))
    same_noise(monkeypatch, fresh)
    call = json.loads((out / "fastlightgen.json").read_text())["call"]
    assert call == {"num_inference_steps": STEPS, "guidance_scale": 1.0}
    got = pipe(prompt="a red ball", latents=noise, output_type="latent", **SIZE, **call).frames

    text, _ = pipe.encode_prompt("a red ball", do_classifier_free_guidance=False, max_sequence_length=512)
    draws = iter(fresh)
    monkeypatch.setattr("fastlightgen.models.sample.normal_like", lambda *_: next(draws))
    wanted = sample(load_model(model), Cond(text), None, noise, ladder(STEPS, SHIFT), 1.0, sampler)
    print(f"latents, {sampler}: {(got - wanted).abs().max():.2g} of {wanted.abs().max():.2g}")
    # float32 through 4 network calls and sigmas that differ by rounding (2e-6, tests/commands/test_scheduler.py)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    frames = pipe(prompt="a red ball", **SIZE, **call).frames
    assert frames.shape == (1, 9, 32, 32, 3) and np.isfinite(frames).all()


@torch.no_grad()
def test_image_to_video(exported, monkeypatch):
    from PIL import Image

    source, model, out = exported("wan_i2v")
    pipe = stock(out)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8))
    torch.manual_seed(0)
    noise, *fresh = (torch.randn(LATENT) for _ in range(STEPS + 1))
    same_noise(monkeypatch, fresh)
    call = {"num_inference_steps": STEPS, "guidance_scale": 1.0, "output_type": "latent"}
    got = pipe(image=picture, prompt="a red ball", latents=noise, **SIZE, **call).frames

    text, _ = pipe.encode_prompt("a red ball", do_classifier_free_guidance=False, max_sequence_length=512)
    pixels = pipe.video_processor.preprocess(picture, height=32, width=32)
    _, image = pipe.prepare_latents(pixels, 1, 16, 32, 32, 9, torch.float32, "cpu", None, noise)
    cond = Cond(text, image=image, image_embeds=pipe.encode_image(picture, "cpu"))
    draws = iter(fresh)
    monkeypatch.setattr("fastlightgen.models.sample.normal_like", lambda *_: next(draws))
    wanted = sample(load_model(model), cond, None, noise, ladder(STEPS, SHIFT), 1.0, "stochastic")
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)  # as above


def test_what_is_written(exported):
    source, model, out = exported("wan_t2v")
    assert sorted(p.name for p in out.iterdir()) == [
        "README.md", "fastlightgen.json", "manifest.json", "model_index.json", "scheduler", "text_encoder", "tokenizer",
        "transformer", "vae",
    ]  # fmt: skip
    for name in ("text_encoder", "tokenizer", "vae"):
        for file in (source / name).iterdir():
            assert (out / name / file.name).read_bytes() == file.read_bytes()
    index = json.loads((source / "model_index.json").read_text())
    assert json.loads((out / "model_index.json").read_text()) == index | {
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    }
    teacher = load_file(source / "transformer" / "diffusion_pytorch_model.safetensors")
    student = load_file(out / "transformer" / "diffusion_pytorch_model.safetensors")
    for new, old in enumerate(KEEP):  # renumbered, untouched
        key = "blocks.{}.ffn.net.2.weight"
        assert torch.equal(student[key.format(new)], teacher[key.format(old)])
    config = json.loads((source / "transformer" / "config.json").read_text())
    written = json.loads((out / "transformer" / "config.json").read_text())
    assert written == {k: v for k, v in config.items() if k in written} | {"num_layers": 3}
    card = json.loads((out / "fastlightgen.json").read_text())
    assert card["block_map"] == {"blocks": {"0": 0, "2": 1, "3": 2}}
    assert (card["kept_blocks"], card["shift"], card["guidance"]) == (KEEP, SHIFT, 1.0)
    assert card["ladder"] == [1.0, 0.9375, pytest.approx(5 / 6), 0.625]
    text = (out / "README.md").read_text()
    assert text.startswith("---\nlibrary_name: diffusers\npipeline_tag: text-to-video\n")
    assert "3 of 4 `blocks`" in text and "| dropped | `blocks` 1 |" in text


def test_teacher_keeps_its_scheduler_and_parts_can_be_links(pipeline, tmp_path, capsys):
    """A model folder without fastlightgen.json is exported as a many-step network; bfloat16 is the default."""
    source = pipeline("wan_t2v")
    shutil.copytree(source / "transformer", tmp_path / "teacher")
    run(f"model={tmp_path / 'teacher'}", f"pipeline={source}", f"out={tmp_path / 'out'}", "link=true")
    out = capsys.readouterr().out
    assert "the same weights bit for bit and predicts the same v within" in out and "(bfloat16, random inputs)" in out
    name, words = typed(out.splitlines()[-1].removeprefix("next: "))
    assert name == "generate" and load(words, name).model == str(tmp_path / "out") and not load(words, name).image
    for name in ("scheduler", "vae", "text_encoder", "tokenizer"):
        assert (tmp_path / "out" / name).is_symlink() and (tmp_path / "out" / name).resolve() == (
            source / name
        ).resolve()
    weights = load_file(tmp_path / "out" / "transformer" / "diffusion_pytorch_model.safetensors")
    before = load_file(source / "transformer" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(weights[k], v.bfloat16()) for k, v in before.items())
    pipe = stock(tmp_path / "out")
    assert type(pipe.scheduler).__name__ == "UniPCMultistepScheduler" and pipe.scheduler.config.flow_shift == 3.0


def lora_of(network: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A LoRA on the query of every block's self-attention."""
    g, out = torch.Generator().manual_seed(0), {}
    for key in (k for k in network if k.endswith("attn1.to_q.weight")):
        head, dim = f"transformer.{key.removesuffix('.weight')}", network[key].shape[0]
        out[f"{head}.lora_A.weight"] = torch.randn(2, dim, generator=g)
        out[f"{head}.lora_B.weight"] = torch.randn(dim, 2, generator=g)
    return out


def test_copied_parts_are_counted_in_bytes(tmp_path, capsys):
    for name, size in (("vae", 1500), ("text_encoder", 1_000_000)):
        (tmp_path / "from" / name).mkdir(parents=True)
        (tmp_path / "from" / name / "weights").write_bytes(bytes(size))
    copy_parts(tmp_path / "from", tmp_path / "to", ["vae", "text_encoder"], False, True)
    assert (tmp_path / "to" / "vae" / "weights").stat().st_size == 1500
    assert capsys.readouterr().err.startswith("copying parts: 100% 1.00M/1.00M [")


def test_lora_of_the_teacher(exported, tmp_path, capsys):
    """The student with the renumbered file, in stock diffusers, equals the teacher with its LoRA, then pruned."""
    source, model, _ = exported("wan_t2v")
    tensors = lora_of(load_file(source / "transformer" / "diffusion_pytorch_model.safetensors"))
    save_file(tensors, tmp_path / "style.safetensors")
    words = [f"pipeline={source}", f"out={tmp_path / 'out'}", f"lora={tmp_path / 'style.safetensors'}", "dtype=float32"]
    run(f"model={model}", *words)
    assert "lora: 3 blocks renumbered, 1 dropped with the student's" in capsys.readouterr().out
    assert 'weight_name="style.safetensors"' in (tmp_path / "out" / "README.md").read_text()
    pipe, inputs = stock(tmp_path / "out"), load_model(model).example_inputs()
    pipe.load_lora_weights(tmp_path / "out" / "lora", weight_name="style.safetensors")
    wanted = load_model(source / "transformer")
    with torch.no_grad():
        for i, block in enumerate(wanted.blocks):
            up, down = (tensors[f"transformer.blocks.{i}.attn1.to_q.lora_{x}.weight"] for x in "BA")
            block.attn1.to_q.weight += up @ down
        x_t, t, cond, _ = inputs
        got = pipe.transformer(x_t, t * 1000, cond.text).sample
        torch.testing.assert_close(got, wanted.prune(KEEP)(x_t, t, cond), rtol=1e-5, atol=1e-5)


def test_refusals(exported, pipeline, tmp_path, capsys):
    hunyuan = pipeline("hunyuan_t2v")
    source, model, out = exported("wan_t2v")
    words = [f"pipeline={source}", f"out={tmp_path / 'out'}"]
    assert "exists and is not empty" in refused(capsys, f"model={model}", f"pipeline={source}", f"out={out}")
    error = refused(capsys, f"model={model}", f"pipeline={pipeline('wan_i2v')}", words[1])
    assert "its network has in_channels 36, the model 16; give the pipeline of the teacher" in error
    error = refused(capsys, f"model={model}", f"pipeline={hunyuan}", words[1])
    assert "_class_name HunyuanVideoTransformer3DModel, the model WanTransformer3DModel" in error
    error = refused(capsys, "model=tiny", *words)
    assert "in_channels 16, the model 25" in error
    error = refused(capsys, f"model={model}", f"pipeline={model}", words[1])
    assert "has no model_index.json" in error
    error = refused(capsys, f"model={model}", "pipeline=tiny", words[1])
    assert f"the built-in world has no pipeline folder; diffusers loads {model} as it is" in error

    deeper = load_model(source / "transformer")
    deeper.blocks.extend(load_model(source / "transformer").blocks)
    save_model(deeper, tmp_path / "deep")
    error = refused(capsys, f"model={tmp_path / 'deep'}", *words)
    assert "give the pipeline of the teacher that the model was pruned from" in error
    shutil.copytree(model, tmp_path / "odd")
    card = json.loads((tmp_path / "odd" / "fastlightgen.json").read_text())
    (tmp_path / "odd" / "fastlightgen.json").write_text(json.dumps(card | {"ladder": [1.0, 0.5]}))
    assert "is not the one of 2 steps and shift 5" in refused(capsys, f"model={tmp_path / 'odd'}", *words)
    broken = tmp_path / "broken"
    shutil.copytree(source, broken)
    shutil.rmtree(broken / "vae")
    assert "names vae, and there is no such folder" in refused(capsys, f"model={model}", f"pipeline={broken}", words[1])
    index = json.loads((source / "model_index.json").read_text())
    (broken / "model_index.json").write_text(json.dumps({"../vae": index.pop("vae")} | index))
    assert "names a part outside the folder" in refused(capsys, f"model={model}", f"pipeline={broken}", words[1])
    assert not (tmp_path / "out").exists() and not (tmp_path / ".out.tmp").exists()


def test_a_wrong_export_is_not_left_behind(exported, tmp_path, capsys, monkeypatch):
    """Weights that changed while they were written are found, and no incomplete export stays."""
    from fastlightgen.pipelines import export as module

    source, model, _ = exported("wan_t2v")
    honest = module.save_model

    def damaged(network, folder, *args, **keys):
        honest(network, folder, *args, **keys)
        file = folder / "diffusion_pytorch_model.safetensors"
        tensors = load_file(file)
        tensors["blocks.1.norm2.weight"][0] += 1
        save_file(tensors, file, metadata={"format": "pt"})

    monkeypatch.setattr(module, "save_model", damaged)
    error = refused(capsys, f"model={model}", f"pipeline={source}", f"out={tmp_path / 'out'}")
    assert "blocks.1.norm2.weight differs from the model's" in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["hunyuan_t2v", "hunyuan_i2v", "hunyuan_i2v_token"])
def test_hunyuan(exported, tmp_path, kind, capsys):
    """Two block lists renumbered, a scheduler that only shifts, a LoRA on both lists."""
    source, model, out = exported(kind)
    network = stock(out).transformer
    assert (len(network.transformer_blocks), len(network.single_transformer_blocks)) == (1, 2)
    card = json.loads((out / "fastlightgen.json").read_text())
    assert card["block_map"] == {"transformer_blocks": {"0": 0}, "single_transformer_blocks": {"0": 0, "1": 1}}
    scheduler = json.loads((out / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["shift"] == SHIFT and scheduler["stochastic_sampling"] and "shift_terminal" not in scheduler
    key = "transformer.transformer_blocks.{}.attn.to_q.lora_A.weight"
    save_file({key.format(i): torch.full((1, 20), float(i)) for i in (0, 1)}, tmp_path / "a.safetensors")
    words = [f"pipeline={source}", f"out={tmp_path / 'out'}", f"lora={tmp_path / 'a.safetensors'}"]
    run(f"model={model}", *words)
    assert "lora: 1 blocks renumbered, 1 dropped" in capsys.readouterr().out
    assert load_file(tmp_path / "out" / "lora" / "a.safetensors")[key.format(0)].unique() == 0


HUNYUAN = {"_class_name": "HunyuanVideoTransformer3DModel", "num_layers": 2, "num_single_layers": 3}


def test_block_map_of_two_lists():
    """`kept` indexes the teacher's double blocks and then its single ones."""
    teacher = HUNYUAN | {"num_layers": 4, "num_single_layers": 5}
    assert block_map(HUNYUAN, [0, 3, 4, 6, 8], teacher) == {
        "transformer_blocks": {0: 0, 3: 1},
        "single_transformer_blocks": {0: 0, 2: 1, 4: 2},
    }
    whole = block_map(teacher, None, teacher)
    assert whole["single_transformer_blocks"] == {i: i for i in range(5)}
    for kept in ([0, 1, 3, 4, 6], [0, 3, 4, 6, 9], None):  # three doubles; beyond the end; absent
        with pytest.raises(ValueError, match="give the pipeline of the teacher that the model was pruned from"):
            block_map(HUNYUAN, kept, teacher)


@pytest.mark.parametrize(
    "config, guidance, call",
    [
        ({}, 1.0, {"guidance_scale": 1.0}),
        ({}, None, {}),
        (HUNYUAN | {"guidance_embeds": False}, 1.0, {"true_cfg_scale": 1.0}),
        (HUNYUAN | {"guidance_embeds": True}, 6.0, {"guidance_scale": 6.0, "true_cfg_scale": 1.0}),
    ],
)
def test_how_to_call_it(config, guidance, call):
    card = {"ladder": [1.0, 0.75], "guidance": guidance}
    assert call_of(card, config) == {"num_inference_steps": 2} | call
