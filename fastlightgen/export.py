"""python -m fastlightgen.export model=DIR pipeline=DIR out=DIR: writes a pipeline folder that stock diffusers loads.

to=comfyui out=FILE.safetensors and to=gguf out=FILE.gguf write one file for ComfyUI, and a workflow beside it. Of two
experts each gets a file of its own.
to=onnx or to=executorch out=DIR writes a folder that makes clips with that runtime, without this package.
to=lora teacher=DIR out=FILE.safetensors writes what turns the teacher into a student with all blocks.
"""

from operator import itemgetter
from pathlib import Path

from fastlightgen.config import PROMPT, SHAPES_PROMPT, UserError, built_in, command, main


def export(cfg) -> None:
    ways = {"diffusers": to_diffusers, "onnx": to_step, "executorch": to_step, "lora": to_lora}
    ways.get(cfg.to, to_file)(cfg)


def check_new(out: Path) -> None:
    """Raise ValueError if the file or folder exists: an export never replaces anything."""
    if out.exists():
        raise ValueError(f"out={out}: exists; delete it or give another name")


def to_file(cfg) -> None:
    """Write the file (of two experts two) and the workflow; print what they are and how near they are to the model."""
    import torch

    from fastlightgen.models.folder.pair import networks
    from fastlightgen.models.folder.weights import load_model, trained_folder
    from fastlightgen.parallel.log import say, size
    from fastlightgen.parallel.threads import set_threads
    from fastlightgen.pipelines.comfyui import LOADER, SAMPLERS, file_of, ladder_error, write_comfyui, write_workflow
    from fastlightgen.pipelines.gguf_file import write_gguf

    set_threads(cfg.threads)
    out, dtype = Path(cfg.out), getattr(torch, cfg.dtype)
    found = [(place, card, file_of(out, card)) for place, card in networks(trained_folder(cfg.model)).values()]
    for _, _, file in found:
        check_new(file)
    for place, card, file in found:  # one after the other: both networks of 14B may not fit into memory
        model = load_model(place, dtype=dtype).requires_grad_(False)
        report = {"comfyui": write_comfyui, "gguf": write_gguf}[cfg.to](model, card, file, dtype, cfg.stored)
        exact = (
            "the same weights bit for bit"
            if report["weights"] == 0
            else (
                f"weights within {report['weights']:.2%} and a prediction within {report['prediction']:.2%} of the "
                "model's"
            )
        )
        say(f"{file}: {size(report['bytes'])}, read back: {exact}")
    loader, place = (LOADER, "diffusion_models") if cfg.to == "comfyui" else ("UnetLoaderGGUF", "unet")
    write_workflow(model.config, card, out, loader)
    say(
        f"{out.with_suffix('.workflow.json')}: {len(card['ladder'])} steps, sampler "
        f"{SAMPLERS[card['sampler']]}, scheduler simple, shift {card['shift']:g}, cfg 1; its noise levels are at most "
        f"{ladder_error(card):.1g} from the student's"
    )
    files = "the file" if len(found) == 1 else "both files"
    say(f"next: copy {files} to ComfyUI's models/{place}, and drop the workflow on its canvas")


def to_step(cfg) -> None:
    """Write the folder for onnxruntime or ExecuTorch, and print how near it is to the model."""
    import torch

    from fastlightgen.data.version import check_model, same_latents
    from fastlightgen.models.folder.pair import networks
    from fastlightgen.models.folder.weights import config_of, load_model, read_card, trained_folder
    from fastlightgen.parallel.log import say, size
    from fastlightgen.parallel.threads import set_threads
    from fastlightgen.pipelines.executorch_folder import need_executorch, write_executorch
    from fastlightgen.pipelines.onnx_folder import need_onnx, write_onnx
    from fastlightgen.world.source import ShapesSource

    {"onnx": need_onnx, "executorch": need_executorch}[cfg.to]()
    set_threads(cfg.threads)
    folder, out = trained_folder(cfg.model), Path(cfg.out)
    check_new(out)
    if len(networks(folder)) > 1:
        raise UserError(
            f"to={cfg.to}: {folder} has two experts, and the folder's generate.py steps with one network; use "
            "to=diffusers, comfyui or gguf"
        )
    check_model(folder, ShapesSource.description)
    world = same_latents(config_of(folder), ShapesSource.description)
    if world and cfg.vae:
        raise UserError(f"vae={cfg.vae}: clips of the built-in world have a decoder of their own; leave vae= out")
    if cfg.vae:
        say("tracing the decoder too, which takes minutes for a clip of many frames")
    model = load_model(folder, dtype=torch.float32).requires_grad_(False)
    given = f'prompt="{SHAPES_PROMPT}" out=clip.png' if world else "inputs=FOLDER"
    if cfg.to == "executorch":
        report = write_executorch(model, read_card(folder), out, cfg.size, world, cfg.vae)
        say(
            f"{out}/step.pte: {size(report['bytes'])}, float32, {report['settings']['size']}, run: ExecuTorch predicts "
            f"v within {report['largest']:.2g} of the model's, whose largest number is {report['scale']:.2g}"
        )
        if decoder := report.get("decoder"):
            near = f"frames within {decoder['largest']:.2g} of {cfg.vae}'s"
            say(f"{out}/decoder.pte: {size(decoder['bytes'])}, run: {near}")
        say(f"next: python {out}/generate.py {given}; it needs executorch alone, {out}/README.md explains it")
        return
    report = write_onnx(model, read_card(folder), out, cfg.stored, cfg.size, world, cfg.vae)
    settings = report["settings"]
    near = f"the same weights bit for bit; a step is {report['flops'] / 1e12:.3g} TFLOP and was not run"
    if "largest" in report:
        near = (
            f"onnxruntime predicts v within {report['largest']:.2g} of the model's (relative {report['relative']:.2g})"
        )
    elif settings["weights"] == "int8":
        near = f"8 bits of the same weights; a step is {report['flops'] / 1e12:.3g} TFLOP and was not run"
    say(f"{out}/step.onnx: {size(report['bytes'])}, {settings['weights']}, {settings['size']}, read back: {near}")
    if decoder := report.get("decoder"):
        seen = f"frames within {decoder['largest']:.2g} of {cfg.vae}'s" if "largest" in decoder else "not run: large"
        say(f"{out}/decoder.onnx: {size(decoder['bytes'])}, read back: {seen}")
    say(f"next: python {out}/generate.py {given}; it needs onnxruntime and numpy alone, {out}/README.md explains it")


def to_lora(cfg) -> None:
    """Write the two files (of each expert), and print how much of the student they hold."""
    import torch

    from fastlightgen.models.folder.pair import networks
    from fastlightgen.models.folder.weights import load_model, trained_folder
    from fastlightgen.parallel.log import say
    from fastlightgen.parallel.threads import set_threads
    from fastlightgen.pipelines.comfyui import SAMPLERS, file_of
    from fastlightgen.pipelines.lora_student import FULL_RANK, check_pair, write_lora

    set_threads(cfg.threads)
    out, students = Path(cfg.out), networks(trained_folder(cfg.model))
    teachers = networks(trained_folder(cfg.teacher))
    if len(students) != len(teachers):
        raise ValueError(
            f"teacher={cfg.teacher}: number of networks {len(teachers)}, the student's {len(students)}; give the "
            "student's teacher"
        )
    files = {part: file_of(out, card) for part, (_, card) in students.items()}
    for file in files.values():
        check_new(file)
    for part, (place, card) in students.items():
        model, teacher = (load_model(net).requires_grad_(False) for net in (place, teachers[part][0]))
        check_pair(model, teacher, cfg.teacher)
        rank = cfg.rank or card.get("lora_rank") or FULL_RANK
        say_lora(write_lora(model, card, teacher, files[part], getattr(torch, cfg.dtype), rank))
    if card.get("ladder"):
        say(
            f"sample with {len(card['ladder'])} steps, shift {card['shift']:g}, guidance {card['guidance']:g}, sampler "
            f"{card['sampler']} (ComfyUI: {SAMPLERS[card['sampler']]}, scheduler simple)"
        )
    first, *others = map(str, files.values())
    say(f"next: in Python, diffusers.DiffusionPipeline.from_pretrained(TEACHER).load_lora_weights({first!r})")
    for other in others:
        say(f"and on the same pipeline load_lora_weights({other!r}, load_into_transformer_2=True)")


def say_lora(report: dict) -> None:
    """Print how much of one student a LoRA holds."""
    from fastlightgen.parallel.log import say, size

    for path, count in report["files"].items():
        say(f"{path}: {size(count)}")
    left = ", ".join(f"rank {rank}: {error:.1%}" for rank, error in report["errors"].items())
    say(f"{report['layers']} linear layers; what each rank leaves out of their change: {left}")
    say(
        f"norms, biases and tables are {report['left']:.1%} of the change: diffusers' file leaves them out, ComfyUI's "
        f"holds them. A prediction of the teacher is {report['before']:.1%} from the student's, with diffusers' file "
        f"{report['after']:.1%}"
    )


def to_diffusers(cfg) -> None:
    """Write the folder, compare stock diffusers' network with the model, and print the result."""
    import torch

    from fastlightgen.models.folder.pair import networks
    from fastlightgen.models.folder.weights import load_model, trained_folder
    from fastlightgen.parallel.log import say
    from fastlightgen.parallel.threads import set_threads
    from fastlightgen.pipelines.encoders import family_of_folder
    from fastlightgen.pipelines.export import check_number, check_out, parts_of, write_pipeline
    from fastlightgen.pipelines.lora_file import LORA
    from fastlightgen.pipelines.stock import compare, compare_own, need_diffusers, say_not_stock

    need_diffusers()
    set_threads(cfg.threads)
    folder, out, pipeline = trained_folder(cfg.model), Path(cfg.out), Path(cfg.pipeline)
    check_out(out)
    if built_in(cfg.pipeline):
        raise ValueError(
            f"pipeline={cfg.pipeline}: the built-in world has no pipeline folder; diffusers loads {folder} as it is"
        )
    found = networks(folder)
    check_number(parts_of(pipeline), len(found), pipeline)
    stock, dtype = say_not_stock(folder), getattr(torch, cfg.dtype)
    nets = {part: (load_model(place, dtype=dtype).requires_grad_(False), card) for part, (place, card) in found.items()}
    for silent in (card["silent"] for _, card in nets.values() if card.get("silent")):
        heads = sum(map(len, silent.values()))
        say(
            f"note: {heads} heads in {len(silent)} blocks are silenced by zeroed weights (method=f3); stock diffusers "
            "computes them all the same, so that they save no time"
        )

    def verify(written: Path) -> dict:
        reports = [(compare if stock else compare_own)(net, card, written, part) for part, (net, card) in nets.items()]
        return max(reports, key=itemgetter("difference"))

    report = write_pipeline(
        nets,
        pipeline,
        out,
        verify,
        dtype=dtype,
        link=cfg.link,
        vae=cfg.vae,
        loras={part: Path(vars(cfg)[key]) for part, key in LORA.items() if vars(cfg)[key]},
        original=cfg.original,
        progress=cfg.progress,
    )
    for part, (_, kept, lost) in report["loras"].items():
        say(f"{LORA[part]}: {kept} blocks renumbered, {lost} dropped with the student's")
    if "sigmas" in report:
        times = ", ".join(f"{s:.4f}" for s in report["sigmas"])
        say(f"scheduler: steps at {times}; at most {report['ladder_error']:.1g} from the student's ladder")
    subject = f"networks, {' and '.join(nets)}" if len(nets) > 1 else "network"
    whose = "stock diffusers" if stock else "fastlightgen, and not stock diffusers,"
    say(
        f"{subject}: {whose} holds the same weights bit for bit and predicts the same v within "
        f"{report['difference']:.2g} ({cfg.dtype}, random inputs)"
    )
    if cfg.vae:
        say(f"vae: stock diffusers loads {cfg.vae}, and decodes with it")
    say(f"{out}: complete")
    name, family = family_of_folder(pipeline)
    picture = {"image": "first.png"} if family.pipelines[name] else {}
    say(f"next: {command('generate', model=out, prompt=PROMPT, **picture, out='clip.mp4')}")


if __name__ == "__main__":
    main(export, "export")
