"""README.md of an export: how to load and call the student, and its origin."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from fastlightgen.models.family import Clips, Family
from fastlightgen.models.folder.experts import PIPELINE_PARTS
from fastlightgen.parallel.log import count
from fastlightgen.pipelines.lora_file import LORA, BlockMap, Remapped
from fastlightgen.pipelines.origin import hub_id, licence, name_of

CARD = """---
{head}---

# {name}

{summary}

```{language}
{code}```

{calling}

## Where it comes from

| | |
|---|---|
{facts}
"""

CODE = """import torch
from diffusers import DiffusionPipeline
{imports}
pipe = DiffusionPipeline.from_pretrained("{name}", torch_dtype=torch.bfloat16)
pipe.to("cuda" if torch.cuda.is_available() else "cpu")
torch.manual_seed(0)
frames = pipe(
{arguments}
).frames[0]
# An animation in full colour. For mp4: diffusers.utils.export_to_video, which needs imageio and imageio-ffmpeg.
frames[0].save("clip.webp", save_all=True, append_images=frames[1:], duration=round(1000 / {fps}), loop=0, quality=90)
"""


OWN_CODE = """# Stock diffusers cannot load this network; the package fastlightgen can.
python -m fastlightgen.generate model={name} prompt="a cat runs over wet sand at sunset" {picture}out=clip.mp4
"""


def model_card(
    name: str,
    family: Family,
    pipeline: str,
    teacher_folder: Path,
    card: dict,
    blocks: Mapping[str, BlockMap],
    teacher: dict[str, int],
    loras: Mapping[str, Remapped],
    vae: dict | None = None,
) -> str:
    """Compose the text of README.md.

    `pipeline`: its class; `teacher_folder`: the folder that the other parts come from; `blocks`: per network and block
    list {teacher's index: student's}; `teacher`: number of the teacher's blocks per list; `loras`: the renumbered LoRA
    of each network; `vae`: fastlightgen.json of a VAE that is not the teacher's.
    """
    # The family may not list the pipeline class; diffusers puts ImageToVideo into the names of such classes.
    pictured = bool(family.pipelines.get(pipeline, "ImageToVideo" in pipeline))
    clips = family.clips.of(card)
    facts: dict[str, Any] = {}
    for part, kept in blocks.items():
        own = owner(part, blocks)
        facts[f"{own}network"] = ", ".join(f"{len(kept[k])} of {n} `{k}`" for k, n in teacher.items())
        gone = [f"`{k}` {dropped(kept[k], n)}" for k, n in teacher.items() if len(kept[k]) < n]
        facts[f"{own}dropped"] = "; ".join(gone)
    facts |= {
        "boundary": card.get("boundary"),
        "time shift": card.get("shift"),
        "sampling times": ", ".join(f"{t:.4f}" for t in card["ladder"]) if card.get("ladder") else None,
        "sampler": card.get("sampler") if card.get("ladder") else None,
        "clips": f"{clips.size}, {clips.fps:g} frames per second" if card.get("clips") else None,
        "trained from": card.get("source"),
        "stage": card.get("stage"),
        **{f"{owner(part, blocks)}LoRA": lora_row(name, part, *made) for part, made in loras.items()},
        "VAE": vae_row(vae) if vae is not None else None,
    }
    facts |= {f"score: {k}": v for k, v in (card.get("scores") or {}).items()}
    return CARD.format(
        head=head("image-to-video" if pictured else "text-to-video", teacher_folder),
        name=name,
        summary=summary(card, teacher, blocks),
        language="python" if is_stock(card) else "bash",
        code=code(name, clips, pictured, card["call"], pipeline in family.sized)
        if is_stock(card)
        else own_code(name, pictured),
        calling=calling(card, family),
        facts="\n".join(f"| {k} | {v} |" for k, v in facts.items() if v not in (None, "")),
    )


def head(task: str, teacher: Path) -> str:
    """The YAML head: what a hub shows and searches. What the teacher's folder does not tell stays a comment."""
    known = {
        "library_name": "diffusers",
        "pipeline_tag": task,
        "tags": ["fastlightgen", "video-generation", "distillation"],
    }
    text = yaml.safe_dump(known, sort_keys=False)
    if found := licence(teacher):
        text += yaml.safe_dump(found, sort_keys=False)
    else:
        text += "# license: the teacher's folder names none; write the one of its model page here\n"
    owner = hub_id(teacher)
    text += yaml.safe_dump({"base_model": owner or name_of(teacher.resolve())})
    return text if owner else text + "# base_model: this is the name of the teacher's folder; give its owner/name\n"


def code(name: str, clips: Clips, pictured: bool, call: dict, sized: bool) -> str:
    """A program that makes a clip with stock diffusers and Pillow, which diffusers needs anyway.

    `sized`: the picture decides the size of the clip.
    """
    height, width = clips.buckets[0]
    arguments: dict[str, object] = {"prompt": '"a cat runs over wet sand at sunset"'}
    if pictured:
        arguments["image"] = 'load_image("first.png")'
    arguments |= {} if sized else {"height": height, "width": width}
    arguments |= {"num_frames": clips.frames, **call, "output_type": '"pil"'}
    return CODE.format(
        imports="from diffusers.utils import load_image\n" * pictured,
        name=name,
        arguments="\n".join(f"    {k}={v}," for k, v in arguments.items()),
        fps=f"{clips.fps:g}",
    )


def is_stock(card: dict) -> bool:
    """True if stock diffusers loads the network."""
    return bool(card.get("stock", True))


def own_code(name: str, pictured: bool) -> str:
    """A command that makes a clip with this package."""
    return OWN_CODE.format(name=name, picture="image=first.png " * pictured)


def owner(part: str, networks: Mapping[str, object]) -> str:
    """The start of a table row that is about one of two networks."""
    return f"`{part}`: " if len(networks) > 1 else ""


def lora_row(name: str, part: str, file: str, kept: int, lost: int) -> str:
    """The table row about a renumbered LoRA."""
    second = ", load_into_transformer_2=True" if part == PIPELINE_PARTS[1] else ""
    load = f'`pipe.load_lora_weights("{name}/{LORA[part]}", weight_name="{file}"{second})`'
    return f"{kept} of its blocks are left, {lost} went with the dropped ones; {load}"


def vae_row(vae: dict) -> str:
    """The table row about a VAE that takes the place of the teacher's."""
    if "parameters" not in vae:
        return "not the teacher's own"
    before, after = vae["parameters"]
    encoder = "" if vae.get("encoder") else ", no encoder: it decodes only"
    return f"a smaller decoder, {count(after)} of {count(before)} parameters, {vae.get('steps', 0)} steps{encoder}"


def summary(card: dict, teacher: dict[str, int], blocks: Mapping[str, BlockMap]) -> str:
    """The sentence under the title: size and number of sampling steps."""
    total = len(blocks) * sum(teacher.values())
    left = sum(len(kept) for lists in blocks.values() for kept in lists.values())
    size = f"with {left} of its teacher's {total} blocks" if left < total else f"with all {total} blocks of its teacher"
    if not is_stock(card):
        size += " and fewer heads in each"
    if not card.get("ladder"):
        return f"A video diffusion transformer {size}{', in stock diffusers format' * is_stock(card)}."
    steps = len(card["ladder"])
    loads = (
        "It loads with stock diffusers and needs no other code." if is_stock(card) else "It loads with fastlightgen."
    )
    return f"A video diffusion transformer {size}, distilled to {steps} sampling step{'s' * (steps > 1)}. {loads}"


def calling(card: dict, family: Family) -> str:
    """The paragraph about guidance, steps and seeds."""
    if not card.get("ladder"):
        return "The scheduler is the one of the pipeline this was exported with."
    if not is_stock(card):
        return "Sampling times and guidance stand in `fastlightgen.json`, where the command reads them."
    setting = f"`{family.cfg_argument}=1.0`"
    call = f"its part `{family.guider}` has {setting}" if family.guider else f"always call it with {setting}"
    text = (
        f"Classifier-free guidance is distilled into the weights: {call}, which also halves the work. The scheduler's "
        f"settings belong to {len(card['ladder'])} steps; with another number the sampling times are not those it was "
        "trained on."
    )
    if card.get("sampler", "stochastic") == "stochastic":
        text += (
            " The sampler adds fresh noise between steps, which the pipeline draws from torch's global generator: "
            "`torch.manual_seed` makes a clip reproducible, `generator=` alone does not."
        )
    return text


def dropped(kept: dict[int, int], total: int) -> str:
    """List the indices of the dropped blocks."""
    return ", ".join(str(i) for i in range(total) if i not in kept)
