"""Every key of `export`."""

from dataclasses import dataclass

from fastlightgen.config.fields import REQUIRED, Checked, ConfigError, field
from fastlightgen.config.limits import MOST_THREADS, parse_size
from fastlightgen.config.run import DRY_RUN, SIZE, THREADS

FILES = {  # to= -> the end of the file's name ("": a folder), the ways to store matrices
    "comfyui": (".safetensors", ("none", "fp8")),
    "gguf": (".gguf", ("q8_0", "q5_1", "q4_0")),
    "onnx": ("", ("none", "int8")),
    "executorch": ("", ("none",)),
    "lora": (".safetensors", ("none",)),
}
STEPS = {"onnx": ".onnx", "executorch": ".pte"}  # folders with one step of the network -> the end of its file


@dataclass(kw_only=True)
class Export(Checked):
    """write a pipeline folder that stock diffusers loads, one file for ComfyUI, ONNX or ExecuTorch"""

    model: str = field(REQUIRED, "a model folder", everyday=True)
    to: str = field(
        "diffusers",
        "diffusers: a pipeline folder; comfyui, gguf: one file (.safetensors, .gguf) and a workflow; onnx: a folder "
        "with one step of the network in float32, and code that makes clips without torch; executorch: the same for "
        "ExecuTorch with XNNPACK; lora: a file for diffusers "
        "and one for ComfyUI that turn the teacher into a student with all blocks",
        choices=("diffusers", *FILES),
        everyday=True,
    )
    pipeline: str = field(
        "",
        "to=diffusers: pipeline folder of the teacher: VAE, encoders and tokenizers come from it",
        everyday=True,
    )
    out: str = field(REQUIRED, "folder to write; to=comfyui, gguf and lora: the file", everyday=True)
    teacher: str = field("", "to=lora: the student's teacher, a preset or a model folder", everyday=True)
    rank: int = field(
        0, "to=lora: of every linear layer; 0: that of student_mode=lora, of other students 64", lo=0, hi=10_000
    )
    quant: str = field(
        "auto",
        "how the matrices of the blocks are stored; to=comfyui: none, fp8; to=gguf: q8_0, q5_1, q4_0; to=onnx: none, "
        "int8; auto: the first",
        choices=("auto", "none", "fp8", "q8_0", "q5_1", "q4_0", "int8"),
    )
    size: str = field(
        "",
        f"to=onnx, executorch: clips that it makes, as {SIZE}; empty: the family's own; the built-in world has one",
    )
    dtype: str = field(
        "bfloat16",
        "type of the written network; to=onnx, executorch: always float32",
        choices=("bfloat16", "float32"),
        everyday=True,
    )
    link: bool = field(False, "link the parts that stay as they are instead of copying them", everyday=True)
    vae: str = field(
        "",
        "folder of a VAE that stage=decoder wrote, in place of the pipeline's; empty: the pipeline's; to=onnx, "
        "executorch: any VAE of the student's family or a file in TAEHV's layout, written beside the step as decoder; "
        "empty: clips end as latents",
        everyday=True,
    )
    lora: str = field(
        "",
        "LoRA file trained on the teacher, to renumber for the model; of two experts for the high-noise one; empty: "
        "none",
        everyday=True,
    )
    lora_2: str = field("", "LoRA file for the low-noise expert of two; empty: none", everyday=True)
    original: bool = field(
        False, "also write the network in the format of the family's original repository", everyday=True
    )
    threads: int = field(0, THREADS, lo=0, hi=MOST_THREADS)
    progress: bool = field(True, "show a progress bar")
    dry_run: bool = field(False, DRY_RUN)

    @property
    def stored(self) -> str:
        """How matrices are stored: `quant`, or the first way of this output."""
        return FILES[self.to][1][0] if self.quant == "auto" else self.quant

    def check(self) -> None:
        if self.size:
            parse_size(self.size)
            if self.to not in STEPS:
                raise ConfigError(f"size={self.size}: is for to=onnx and to=executorch; leave it out")
        if self.to == "lora" and not self.teacher:
            raise ConfigError("teacher is required: to=lora writes the difference to it")
        if self.teacher and self.to != "lora":
            raise ConfigError(f"teacher={self.teacher}: is for to=lora; leave it out")
        if self.to == "diffusers":
            if not self.pipeline:
                raise ConfigError("pipeline is required: the pipeline folder of the teacher (to=comfyui needs none)")
            if self.quant != "auto":
                raise ConfigError(f"quant={self.quant}: is for to={', '.join(FILES)}; leave it out")
            return
        suffix, quants = FILES[self.to]
        if self.pipeline or self.lora or self.lora_2 or self.original or self.link:
            raise ConfigError(f"to={self.to}: takes no pipeline=, lora=, lora_2=, original= or link=; leave them out")
        if self.vae and self.to not in STEPS:
            raise ConfigError(f"vae={self.vae}: is for to=diffusers, {' and '.join(STEPS)}; leave it out")
        if not self.out.endswith(suffix):
            raise ConfigError(f"out={self.out}: to={self.to} writes one file; give a name that ends in {suffix}")
        if self.to in STEPS and self.out.endswith(STEPS[self.to]):
            raise ConfigError(f"out={self.out}: to={self.to} writes a folder; give a name without {STEPS[self.to]}")
        if self.quant not in ("auto", *quants):
            raise ConfigError(f"quant={self.quant}: to={self.to} has {', '.join(quants)}")
