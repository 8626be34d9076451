"""The keys of `plan`: a stage's configuration and the machine that it is planned for.

The defaults are the stage's, but for those that a real model on a cluster needs.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, make_dataclass
from functools import cache
from typing import Any

from fastlightgen.config.fields import Checked, ConfigError, field, section, with_default
from fastlightgen.config.files import built_in
from fastlightgen.config.gpus import GPUS, known_gpu
from fastlightgen.config.layers import shipped_layers
from fastlightgen.config.run import Run, compute_type
from fastlightgen.config.stages import DEFAULT, STAGES, keys_of, method_of

PLANNED = tuple(stage for stage in STAGES if stage not in ("all", "decoder"))
IN_TURN = ("1", "2", "3")  # the stages of stage=all
DEFAULTS = {"run": "", "model": "wan2.1-i2v-14b", "engine": "deepspeed"}  # in place of those of train


@dataclass(kw_only=True)
class Machine(Checked):
    """Keys of the machine, and guesses at the result of Stage I."""

    gpu: str = field("h100", f"kind of GPU: {', '.join(GPUS)}; cpu: processes on a CPU in place of GPUs", everyday=True)
    gpus: int = field(16, "GPUs in all", lo=1, hi=1_000_000, everyday=True)
    gpus_per_node: int = field(8, "GPUs in one host", lo=1, hi=1_000_000, everyday=True)
    efficiency: float = field(
        0.0, "share of the GPU's peak that the run reaches; 0: what the paper's 80 GPU-days imply", lo=0, hi=1
    )
    size: str = field("", "height x width x frames of the clips, in pixels; empty: the model's own", everyday=True)
    text_tokens: int = field(0, "tokens of a prompt; 0: what the family is used with", lo=0, hi=1_000_000)
    previews: bool = field(True, "a pipeline's VAE shows clips during training (pipeline= and sample_every= of train)")
    dropped: float = field(0.3, "share of the blocks that Stage I drops", above=0, below=1)
    prefix: int = field(-1, "first dropped block (they are taken to be adjacent); -1: in the middle", lo=-1, hi=10_000)
    table: bool = field(False, "instead: what fits on each kind of GPU, for every preset and stage", everyday=True)
    out: str = field("", "JSON file to write as well; empty: none", everyday=True)

    def check(self) -> None:
        super().check()
        kind = self.gpu if self.gpu == "cpu" else known_gpu(self.gpu)
        if kind is None:
            raise ConfigError(f"gpu={self.gpu}: wanted one of {', '.join(GPUS)}, cpu")
        self.gpu, self.gpus_per_node = kind, min(self.gpus_per_node, self.gpus)


@dataclass(kw_only=True)
class Plan(Machine, Run):
    """what a run needs in memory, operations, traffic and time, by arithmetic, before anything is started"""

    def check(self) -> None:
        super().check()
        if self.engine == "local" and self.gpus > 1:
            raise ConfigError(f"gpus={self.gpus}: engine=local is one process; use gpus=1 or engine=deepspeed")
        if self.gpus % self.sequence_parallel:
            raise ConfigError(
                f"sequence_parallel={self.sequence_parallel}: gpus={self.gpus} is not a multiple of it; change one"
            )
        self.dtype = compute_type(self.dtype, self.gpu != "cpu", not built_in(self.model))
        if self.fp8 != "off" and self.gpu != "cpu" and not (GPUS[self.gpu].float8 and self.dtype == "bfloat16"):
            raise ConfigError(
                f"fp8={self.fp8}: needs dtype=bfloat16 and a GPU with float8 products (sm_89 or later), "
                f"not dtype={self.dtype} on gpu={self.gpu}; use fp8=off"
            )

    @property
    def groups(self) -> int:
        """The number of groups of GPUs; each group works on its own clips."""
        return self.gpus // self.sequence_parallel

    @property
    def micro(self) -> int:
        """Clips in one pass of a group, as the engine divides `batch`; at least one."""
        return self.micro_batch or max(1, self.clips_per_step // self.groups)

    @property
    def accumulation(self) -> int:
        """Passes in one optimizer step."""
        return max(1, self.clips_per_step // (self.micro * self.groups))

    @property
    def clips_per_step(self) -> int:
        """The stage's `batch`; every stage has that key."""
        return int(vars(self)["batch"])


def plan_root(stage: str = "3", method: str = DEFAULT) -> type[Plan]:
    """The class whose fields are the keys of `plan stage=STAGE method=METHOD`."""
    keys: Any = keys_of(stage, method)
    return _plan_root(stage, (keys,))


def plan_all_root(methods: Mapping[str, str]) -> type[Plan]:
    """The class whose fields are the keys of `plan stage=all`; `methods`: stage -> name, if not the default."""
    keys: Any = tuple(keys_of(stage, methods.get(stage, DEFAULT)) for stage in IN_TURN)
    return _plan_root("all", keys)


@cache
def _plan_root(stage: str, keys: tuple[type[Any], ...]) -> type[Plan]:
    bases = (*keys, Plan) if stage != "all" else (Plan,)
    known: dict[str, dataclasses.Field[Any]] = {f.name: f for base in reversed(bases) for f in fields(base)}
    own: list[Any] = [("stage", str, field(stage, "which stage to plan", choices=(*PLANNED, "all")))]
    own += [(n, known[n].type, with_default(known[n], value)) for n, value in DEFAULTS.items() if n in known]
    if stage == "all":
        own += [(f"stage{n}", k, section(k, f"keys of stage {n}")) for n, k in zip(IN_TURN, keys, strict=True)]
    return make_dataclass("Plan", own, bases=bases, kw_only=True, namespace={"__doc__": Plan.__doc__})


def plan_of_stage(cfg: Any, stage: str) -> Plan:
    """The plan of one stage of `plan stage=all`."""
    part = getattr(cfg, f"stage{stage}")
    common = {f.name: getattr(cfg, f.name) for f in fields(Plan) if f.name != "stage"}
    return plan_root(stage, method_of(part))(**common, **asdict(part))


def plan_for(cfg: Any, **machine: Any) -> Plan:
    """The plan of a stage's configuration on a machine; `machine` holds the keys of Machine."""
    names = {f.name for f in fields(cfg)} - machine.keys()
    cls = plan_root(cfg.stage, method_of(cfg))
    return cls(**{name: getattr(cfg, name) for name in names}, **machine)


def another_stage(cfg: Plan, stage: str, **changes: Any) -> Plan:
    """The plan of another stage, with its own settings, on the same machine and with the same checkpointing."""
    cls = plan_root(stage)
    same = {f.name for f in fields(Plan)} - {"stage"} | {"checkpointing", "keep_attention"}
    common = {name: value for name, value in vars(cfg).items() if name in same & {f.name for f in fields(cls)}}
    shipped = shipped_layers(cls, {key: (common | changes)[key] for key in ("model", "preset")})
    settings = {key: value for _, layer in shipped for key, value in layer.items()}
    if stage == "0":  # where it is refused
        common["fp8"] = "off"
    return cls(**settings | common | changes)
