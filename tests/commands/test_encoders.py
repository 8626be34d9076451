"""Encoded clips against the inputs that stock pipelines give their networks, and against the VAEs called by hand."""

import json

import numpy as np
import pytest
import torch

from fastlightgen.pipelines.encoders import Encoders, component_id, family_of_folder

KINDS = ("wan_t2v", "wan_i2v", "hunyuan_t2v", "hunyuan_i2v", "hunyuan_i2v_token")
PROMPT = "a red ball moves right &amp; then turns back"
FRAMES = np.random.default_rng(0).integers(0, 256, (5, 32, 48, 3), np.uint8)


def fed_by_stock(folder, **given) -> dict:
    """The arguments with which the stock pipeline calls its network in one step without guidance."""
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    seen = []
    pipe.transformer.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    pipe(height=32, width=48, num_frames=5, num_inference_steps=1, guidance_scale=1.0, output_type="latent", **given)
    return seen[0]


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def encoders(kind, pipeline):
    return Encoders(pipeline(kind))


@pytest.fixture(scope="module")
def clip(encoders):
    return encoders.clip(FRAMES, PROMPT)


def test_a_pipeline_is_loaded_without_bars_of_other_libraries(pipeline, capfd):
    import diffusers
    import transformers

    folder = pipeline("wan_t2v")
    for library in (diffusers, transformers):
        library.utils.logging.enable_progress_bar()
    capfd.readouterr()  # drop what making the folder and the imports printed
    Encoders(folder).text(PROMPT)
    assert capfd.readouterr() == ("", "")


def test_the_network_is_fed_as_by_the_stock_pipeline(kind, pipeline, clip):
    """Bit-equal: the same components run on the same numbers."""
    from PIL import Image

    image = {"image": Image.fromarray(FRAMES[0])} if "i2v" in kind else {}
    stock = fed_by_stock(pipeline(kind), prompt=PROMPT, **image)
    text, length = stock["encoder_hidden_states"][0], int(clip["text_len"])
    assert clip["text"].shape == text.shape and 0 < length < len(text)
    assert torch.equal(clip["text"][:length], text[:length]) and not clip["text"][length:].any()
    if kind.startswith("wan"):
        assert not text[length:].any() and text[length - 1].any()
    else:
        mask = stock["encoder_attention_mask"][0].bool()
        assert mask[:length].all() and not mask[length:].any()
        assert torch.equal(clip["pooled"], stock["pooled_projections"][0])
    if kind == "wan_i2v":
        assert torch.equal(clip["image_embeds"], stock["encoder_hidden_states_image"][0])
    if kind == "hunyuan_i2v_token":
        assert torch.equal(clip["image"], stock["hidden_states"][0, :, :1])
        assert torch.equal(clip["latents"][:, :1], clip["image"])
    else:
        channels = stock["hidden_states"].shape[1]
        assert (channels == 16) == ("image" not in clip)
        assert channels == 16 or torch.equal(clip["image"], stock["hidden_states"][0, 16:])


def test_latents_are_the_normalised_mode_of_the_vae(kind, pipeline, clip):
    """Normalised by hand from the VAE's configuration; 1e-6 is the float32 rounding of (z - shift) * scale near 1."""
    from diffusers import AutoencoderKLHunyuanVideo, AutoencoderKLWan

    wan = kind.startswith("wan")
    vae = (AutoencoderKLWan if wan else AutoencoderKLHunyuanVideo).from_pretrained(pipeline(kind) / "vae")
    video = torch.from_numpy(FRAMES / 127.5 - 1).float().permute(3, 0, 1, 2)[None]
    with torch.no_grad():
        mean = vae.encode(video).latent_dist.mean[0].double()
    if wan:
        shift, std = (torch.tensor(vae.config[k]).double().view(16, 1, 1, 1) for k in ("latents_mean", "latents_std"))
        wanted = (mean - shift) / std
    else:
        wanted = mean * vae.config.scaling_factor
    start = 1 if kind == "hunyuan_i2v_token" else 0  # latent frame 0 is the image's latent
    assert clip["latents"].shape == (16, 2, 4, 6)
    assert (clip["latents"] - wanted)[:, start:].abs().max() <= 1e-5 * wanted.abs().max()


def test_decoding_undoes_the_normalisation(kind, encoders, pipeline):
    """decode(latents) equals the VAE's decoding of its posterior mean; latent_concat drops four frames."""
    video = torch.from_numpy(FRAMES).permute(3, 0, 1, 2).float() / 255 * 2 - 1
    with torch.no_grad():
        raw = encoders.vae.encode(video[None]).latent_dist.mode()
        wanted = encoders.vae.decode(raw).sample[0]
    got = encoders.decode(encoders.latents(video))
    wanted = wanted[:, 4:] if kind == "hunyuan_i2v" else wanted
    assert got.shape == wanted.shape and (got - wanted).abs().max() <= 1e-4


def test_null_prompt(kind, encoders, clip):
    null = encoders.null("", (32, 48))
    assert {k: v.shape for k, v in null.items()} == {k: clip[k].shape for k in null}
    assert int(null["text_len"]) < int(clip["text_len"])
    # HunyuanVideo's image-to-video text encoder reads a picture: black ones of all sizes give the same text
    assert all(torch.equal(v, encoders.null("", (64, 32))[k]) for k, v in null.items())


def test_description(kind, encoders, pipeline):
    about = encoders.description()
    assert (
        about["vae"] == component_id(pipeline(kind) / "vae") and about["in_channels"] == encoders.network["in_channels"]
    )
    wan = kind.startswith("wan")
    assert about["family"] == ("wan" if wan else "hunyuan")
    assert len(about["shift"]) == len(about["scale"]) == (16 if wan else 1)
    assert about["scale"][0] == pytest.approx(1 / 2.8184 if wan else 0.476986, rel=1e-6)
    assert json.loads(json.dumps(about)) == about


def test_component_ids(tmp_path):
    """The id changes with a weight or a setting, but not with the folder or the version of diffusers."""
    from safetensors.torch import save_file

    def write(name, value=1.0, **config):
        (tmp_path / name).mkdir()
        save_file({"w": torch.full((4,), value)}, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text(json.dumps({"dim": 4, "_name_or_path": name} | config))
        return component_id(tmp_path / name)

    ids = [write("a"), write("b", _diffusers_version="9"), write("c", 1.5), write("d", dim=5)]
    assert ids[0] == ids[1] and len(set(ids)) == 3
    assert component_id(tmp_path / "absent") is None


@pytest.mark.parametrize(
    "index, message",
    [
        (None, "is not a diffusers pipeline folder"),
        ("{", "is not a diffusers pipeline folder"),
        ('{"_class_name": "FluxPipeline"}', "is a FluxPipeline; wanted one of WanPipeline, "),
    ],
)
def test_other_folders_are_refused(tmp_path, index, message):
    if index:
        (tmp_path / "model_index.json").write_text(index)
    with pytest.raises(ValueError, match=message):
        family_of_folder(tmp_path)


def test_an_incomplete_pipeline_is_named_in_one_line(tmp_path, pipeline):
    import shutil

    shutil.copytree(pipeline("wan_t2v"), tmp_path / "p")
    (tmp_path / "p" / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ValueError, match=f"pipeline={tmp_path}/p: cannot be loaded .*") as error:
        Encoders(tmp_path / "p")
    assert "\n" not in str(error.value)
