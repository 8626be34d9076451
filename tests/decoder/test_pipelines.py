"""export and generate with another decoder: stock diffusers loads the pipeline, and the VAE must fit it."""

import json
import shutil

import pytest
import torch
from helpers import error_line
from students import make_student, stock
from vaes import small_vae

from fastlightgen.config import main
from fastlightgen.decoder.folder import CARD, read_vae, write_vae
from fastlightgen.decoder.prune import compress
from fastlightgen.export import export
from fastlightgen.pipelines.encoders import Encoders


def run(*words: str) -> None:
    main(export, "export", [*words, "threads=1", "progress=false", "dtype=float32"])


def refused(capsys, *words: str) -> str:
    return error_line(capsys, run, *words)


def compressed(pipeline, folder, dropped: int = 0):
    """The pipeline's VAE with half of its decoder's channels."""
    vae, z, x = read_vae(pipeline), torch.randn(1, 16, 2, 2, 2), torch.rand(1, 3, 5, 16, 16)
    small, record = compress(vae, [(z, x)], 0.5, dropped, "norm")
    write_vae(small, folder, {"stage": "decoder", "steps": 7} | record)
    return folder


@pytest.mark.parametrize(("kind", "dropped"), [("wan_t2v", 1), ("hunyuan_t2v", 0), ("wan_i2v", 0)])
@torch.no_grad()
def test_stock_pipeline_decodes_with_it(pipeline, tmp_path, kind, dropped):
    source = pipeline(kind)
    model = make_student(source, tmp_path / "model") if kind != "hunyuan_t2v" else source / "transformer"
    with torch.enable_grad():
        vae = compressed(source, tmp_path / "vae", dropped)
    run(f"model={model}", f"pipeline={source}", f"vae={vae}", f"out={tmp_path / 'out'}")
    pipe, small = stock(tmp_path / "out"), read_vae(vae)
    state = {k: v for k, v in pipe.vae.state_dict().items() if not k.startswith("encoder.")}
    assert all(torch.equal(v, small.state_dict()[k]) for k, v in state.items())
    z = torch.randn(1, 16, 2, 2, 2)
    frames = pipe.vae.decode(z).sample
    assert torch.equal(frames, small.decode(z).sample)
    assert not torch.equal(frames, read_vae(source).decode(z).sample)
    before, after = json.loads((vae / CARD).read_text())["parameters"]
    assert sum(p.numel() for p in pipe.vae.decoder.parameters()) == after < before / 2
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| VAE | a smaller decoder" in card and ("no encoder" in card) == (kind != "wan_i2v")
    latents = torch.randn(16, 2, 2, 2)  # generate vae= decodes what the exported pipeline would
    encoders = Encoders(source)
    encoders.decode_with(str(vae))
    assert torch.equal(encoders.decode(latents), Encoders(tmp_path / "out").decode(latents))


def test_a_vae_that_does_not_fit(pipeline, tmp_path, capsys):
    source = pipeline("wan_i2v")
    words = [f"model={make_student(source, tmp_path / 'model')}", f"pipeline={source}", f"out={tmp_path / 'out'}"]
    small_vae("hunyuan").save_pretrained(tmp_path / "hunyuan")
    small_vae("wan").save_pretrained(tmp_path / "wan")
    err = refused(capsys, *words, f"vae={tmp_path / 'hunyuan'}")
    assert "is a AutoencoderKLHunyuanVideo, and the pipeline's is a AutoencoderKLWan" in err
    assert "has z_dim 4, and the pipeline's VAE 16" in refused(capsys, *words, f"vae={tmp_path / 'wan'}")
    shutil.copytree(source / "vae", tmp_path / "scaled")
    config = json.loads((tmp_path / "scaled" / "config.json").read_text())
    config["latents_std"][3] += 1
    (tmp_path / "scaled" / "config.json").write_text(json.dumps(config))
    assert "has latents_std" in refused(capsys, *words, f"vae={tmp_path / 'scaled'}")
    decodes = compressed(source, tmp_path / "decodes", 1)
    assert "has no encoder, and this pipeline encodes" in refused(capsys, *words, f"vae={decodes}")
    cut = compressed(source, tmp_path / "cut") / "diffusion_pytorch_model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-100])
    assert "cannot be loaded" in refused(capsys, *words, f"vae={tmp_path / 'cut'}")
    assert not (tmp_path / "out").exists()
