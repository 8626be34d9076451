"""method=f3: drop what has the least temporal attention (F3-Pruning, Su et al. 2023, arXiv 2312.03459).

The paper ranks the temporal-attention layers of a text-to-video network by their aggregate attention value and drops
the lowest, without training. Video transformers have no temporal layers. Here a head's value is the attention that
tokens pay to other frames than their own. Dropped are self-attentions, their heads, or blocks; `recover` then trains
what is left with Stage II's loss. The values stay in RUN/stage2/attention.json, the untrained network in
RUN/stage2/start.

Shapes: x0, noise, x_t, v [B, C, F, H, W]; t [B].
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastlightgen import flow
from fastlightgen.atomic import write_json
from fastlightgen.blocks import num_dropped
from fastlightgen.config import GUIDANCES, TEACHER_GUIDANCE, TIMES, ConfigError, Run, TrainingKeys, field
from fastlightgen.config.limits import MOST_CLIPS
from fastlightgen.data.source import Batch
from fastlightgen.engine.roles import Role, Update
from fastlightgen.files.border import read_json
from fastlightgen.files.kinds import ATTENTION
from fastlightgen.models.base import VideoDiT
from fastlightgen.models.cost import Network
from fastlightgen.models.families import depth
from fastlightgen.models.folder.files import digest
from fastlightgen.models.folder.networks import config_of, trained_folder
from fastlightgen.models.folder.weights import load_model, read_card, save_model
from fastlightgen.models.sample import preview_plan
from fastlightgen.parallel import ranks
from fastlightgen.parallel.log import say
from fastlightgen.planner.step import Iteration, Net, Walk, undropped
from fastlightgen.planner.walk import Route
from fastlightgen.stages.attention import Silent, attention_mass, keep_silent, masks_of, silence
from fastlightgen.stages.build import Builder
from fastlightgen.stages.matching import distance
from fastlightgen.stages.method import ALONE, SILENCED, Guess, Method, Subject
from fastlightgen.stages.networks import guided_prediction
from fastlightgen.stages.prune import eq7
from fastlightgen.stages.scores import evaluation_set
from fastlightgen.stages.teacher import noised

DRAWS = 23  # the purpose of this file's random draws


@dataclass(kw_only=True)
class F3Keys(TrainingKeys):
    """Keys of F3-Pruning."""

    f3: str = field(
        "attention",
        "what is dropped; attention: self-attentions; head: heads of them; block: whole blocks",
        choices=("attention", "head", "block"),
        everyday=True,
    )
    ratio: float = field(0.3, "share of them to drop", above=0, below=1, everyday=True)
    recover: bool = field(
        False, "false: no training, as in the paper; true: train the rest for `iters` steps", everyday=True
    )
    clips: int = field(16, "clips on which attention is measured", lo=1, hi=MOST_CLIPS)
    timesteps: int = field(8, "stratified times per clip", lo=1, hi=1_000)
    t_range: list[float] = field([0.02, 0.98], "range of the times before the shift", lo=0, hi=1)
    queries: int = field(256, "tokens per clip and time whose attention is measured", lo=1, hi=1_000_000)
    attention: str = field("", "attention.json of another run; empty: measure")
    iters: int = field(4000, "recover: optimizer steps", lo=1, everyday=True)
    lr: float = field(1e-5, "recover: learning rate", lo=0, everyday=True)
    alpha: float = field(1.0, "recover: weight of distillation; 1 - alpha weighs the data (Eq. 7)", lo=0, hi=1)
    guided: float = field(1.0, "recover: guidance of the target, null + w (cond - null); 1: the plain prediction")
    text_dropout: float = field(0.1, "recover: probability of the empty prompt, which guidance needs", lo=0, hi=1)
    time: str = field("uniform", "recover: how t is drawn before the shift", choices=TIMES)
    teacher_guidance: str = field("null", TEACHER_GUIDANCE, choices=GUIDANCES)
    teacher: str = field("", "model folder of the teacher; empty: model")

    def check(self) -> None:
        super().check()
        self.check_ordered("t_range")
        if self.guided != 1 and self.teacher_guidance == "embedded":
            raise ConfigError(f"guided={self.guided}: teacher_guidance=embedded guides the target too; use guided=1")


class Config(F3Keys, Run):
    """A configuration of this method: its own keys and those of every stage."""


def lowest(values: Tensor, ratio: float) -> list[int]:
    """The indices of the share `ratio` with the lowest values, in order."""
    return sorted(values.argsort(stable=True)[: num_dropped(len(values), ratio)].tolist())


def dropped(cfg: Config, mass: Tensor) -> tuple[list[int], Silent]:
    """What the ranking leaves: the kept blocks and the silent heads."""
    blocks, heads = mass.shape
    everything = list(range(blocks))
    if cfg.f3 == "head":
        silent: Silent = {}
        for i in lowest(mass.flatten(), cfg.ratio):
            silent.setdefault(i // heads, []).append(i % heads)
        return everything, silent
    low = lowest(mass.mean(1), cfg.ratio)
    if cfg.f3 == "attention":
        return everything, {i: list(range(heads)) for i in low}
    return [i for i in everything if i not in low], {}


class Written:
    """The untrained result, for the loop: nothing is trained, and the folder is there already."""

    number, iters = 2, 0
    loss_key, drifts = "loss", False
    teacher = None
    frozen: Sequence[VideoDiT] = ()

    def __init__(self, made: Path):
        self.made = made
        self.roles: dict[str, Role] = {}

    def begin(self) -> None:
        """Nothing to measure."""

    def updates(self, step: int) -> list[Update]:
        return []

    def check(self, step: int) -> None:
        """Nothing to check."""

    def sampler(self) -> dict[str, Any]:
        raise AssertionError("a stage without steps makes no clips")

    def save(self, folder: Path, write: Callable[..., Any] = save_model) -> None:
        if ranks.rank() == 0:
            self.made.rename(folder)
        ranks.barrier()


class Recovery:
    """The student and its frozen teacher for the loop."""

    number = 2
    loss_key, drifts = "loss", False

    def __init__(
        self,
        cfg: Config,
        student: VideoDiT,
        teacher: VideoDiT,
        batches: Callable[[int], Batch],
        card: dict[str, Any],
    ):
        self.cfg, self.iters, self.card, self.batches = cfg, cfg.iters, card, batches
        self.student, self.teacher, self.frozen = student, teacher, [teacher]
        self.roles = {"student": Role.of(student, cfg)}

    def begin(self) -> None:
        """Nothing to measure before training."""

    def check(self, step: int) -> None:
        """Nothing to check beyond the loop's own checks: the teacher is fixed."""

    def updates(self, step: int) -> list[Update]:
        return [Update("student", lambda: self.loss(step))]

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        """Eq. 7 for what is left of the network, in the place of the pruned path; the target is the frozen teacher."""
        cfg, batch = self.cfg, self.batches(step)
        x_t, t, noise, cond = noised(batch, cfg, cfg.seed, DRAWS, step)
        target = guided_prediction(self.teacher, x_t, t, cond, batch.null, cfg.guided)
        v = self.student(x_t, t, cond)
        loss = eq7(v, None, target, flow.velocity(batch.x0, noise), cfg.alpha)
        return loss, {"distill": distance(v.detach(), target).item()}

    def sampler(self) -> dict[str, Any]:
        return {"model": self.student} | preview_plan(self.card, self.cfg.shift, self.student.released)

    def save(self, folder: Path, write: Callable[..., Any] = save_model) -> None:
        write(self.student, folder, **self.card)


def start_folder(cfg: Config) -> Path:
    """The folder of the untrained network."""
    return Path(cfg.run) / "stage2" / "start"


def made_with(cfg: Config) -> dict[str, Any]:
    """The keys that decide the untrained network, as its card names them."""
    keys = ["f3", "ratio", "model", "teacher", "seed", "shift"]
    keys += ["attention"] if cfg.attention else ["clips", "timesteps", "t_range", "queries", "batch", "dtype"]
    return {key: getattr(cfg, key) for key in keys}


def read_attention(file: str, blocks: int, heads: int) -> Tensor:
    """Read the attention between frames [blocks, heads] from an attention.json."""
    mass = read_json(Path(file), ATTENTION, "wanted an attention.json that method=f3 wrote")["mass"]
    found = sorted({len(row) for row in mass})
    if (len(mass), found) != (blocks, [heads]):
        raise ValueError(
            f"attention={file}: has {len(mass)} blocks of {' or '.join(map(str, found))} heads, the model {blocks} of "
            f"{heads}; leave attention= out to measure it"
        )
    return torch.tensor(mass, dtype=torch.float64)


def measured(cfg: Config, with_: Builder, folder: Path) -> Tensor:
    """The attention between frames [blocks, heads], from the file `attention` or from the teacher.

    The teacher is loaded whole by every process, which a GPU that generates clips with it has room for.
    """
    if cfg.attention:
        config = config_of(folder)
        return read_attention(cfg.attention, depth(config), config["num_attention_heads"])
    dtype = torch.bfloat16 if cfg.dtype == "bfloat16" else torch.float32
    net, theirs = load_model(folder, with_.device, dtype, cfg.seed, cfg.allow_pt), read_card(folder)
    with_.read_guidance(cfg.teacher_guidance, net, theirs)
    with_.check_data(net, theirs)
    say(f"measuring the attention between frames: {cfg.clips} clips at {cfg.timesteps} times")
    samples = list(evaluation_set(cfg, with_.batches))
    return attention_mass(cfg, net.requires_grad_(False), samples, "method=f3")


def write_start(cfg: Config, with_: Builder, folder: Path, made: Path) -> None:
    """Measure, drop, and write the untrained network with a card that names what it lacks."""
    mass = measured(cfg, with_, folder)
    keep, silent = dropped(cfg, mass)
    if ranks.rank() == 0:
        made.parent.mkdir(parents=True, exist_ok=True)
        write_json(made.with_name("attention.json"), {"model": str(folder), "seed": cfg.seed, "mass": mass.tolist()})
        net, theirs = load_model(folder, allow_pt=cfg.allow_pt), read_card(folder)
        with_.read_guidance(cfg.teacher_guidance, net, theirs)
        silence(net, masks_of(net, silent))
        card = with_.card(source=str(folder), steps=theirs.get("steps"), guidance=theirs.get("guidance"))
        card |= {"stage": 2, "kept_blocks": keep, "shift": cfg.shift, "f3": made_with(cfg)}
        card |= {"silent": silent} if silent else {}
        save_model(net.prune(keep), made, **card)
    ranks.barrier()
    heads = sum(map(len, silent.values()))
    say(f"f3={cfg.f3}: " + (f"silences {heads} heads in blocks {sorted(silent)}" if silent else f"keeps blocks {keep}"))
    if cfg.f3 == "block" and not cfg.recover:
        say("warning: f3=block without recovery generates no plausible videos; compare it with recover=true")


def build(cfg: Config, with_: Builder) -> Written | Recovery:
    folder, made = trained_folder(cfg.teacher or cfg.model), start_folder(cfg)
    if ranks.from_first(read_card(made).get("f3") != made_with(cfg)):  # an interrupted run may have had other keys
        write_start(cfg, with_, folder, made)
    if not cfg.recover:
        return Written(made)
    teacher, card = with_.load(folder).requires_grad_(False), read_card(made)
    with_.read_guidance(cfg.teacher_guidance, teacher, read_card(folder))
    student = with_.load(made).requires_grad_(True)
    keep_silent(student, masks_of(student, {int(i): heads for i, heads in card.get("silent", {}).items()}))
    with_.checkpoint(cfg, student)
    card |= {"guidance": 1.0} if cfg.guided != 1 else {}  # a guided target has it in the weights
    stage = Recovery(cfg, student, teacher, with_.batches, card)
    stage.roles["student"].file_values = with_.file_values(made)
    return stage


def walks(net: Network, keep: Sequence[int], cfg: Config) -> Iteration:
    """Count the measurement, or with recover=true a step: the teacher's target and what is left of the network."""
    if not cfg.recover:
        return Iteration({"teacher": Net()}, [Walk("teacher", [Route()])], clips=1, count=cfg.clips * cfg.timesteps)
    blocks = len(net.blocks)
    if len(keep) != blocks - num_dropped(blocks, cfg.ratio):  # a guess at another ratio
        keep = undropped(blocks, cfg.ratio)
    nets = {"student": Net(keep if cfg.f3 == "block" else None, updates=1), "teacher": Net()}
    target = [Route(), Route(1)] if cfg.guided != 1 else [Route()]
    return Iteration(nets, [Walk("teacher", target), Walk("student", [Route(grad=True)])])


def subject(cfg: Config, guess: Guess | None = None) -> Subject:
    config, made = config_of(trained_folder(cfg.teacher or cfg.model)), start_folder(cfg)
    if cfg.f3 == "block" and read_card(made).get("f3") == made_with(cfg):
        return config, read_card(made)["kept_blocks"]
    return config, undropped(depth(config), cfg.ratio)


def leaves(cfg: Config) -> str:
    return ALONE if cfg.f3 == "block" else SILENCED


def inputs(cfg: Config) -> dict[str, Any]:
    return {"attention_used": digest(Path(cfg.attention))} if cfg.attention else {}


METHOD = Method(
    stage="2",
    name="f3",
    title="F3-Pruning",
    about="drops what has the least attention between frames, without training or with recovery (F3-Pruning)",
    keys=F3Keys,
    build=build,
    walks=walks,
    subject=subject,
    inputs=inputs,
    leaves=leaves,
)
