"""One walk, many streams: the only block loop in the project.

A stream is one prediction of the same weights for the same noisy latent: a condition, a set of blocks and whether it
carries gradient. Streams stay merged until the first block that only some of them run, or, where their prompts differ,
until text first enters. A block is called once for all the streams that run it, and a skipped block costs nothing: a
block leaves x + gate y with the sum untaken, and whatever runs next for that stream fuses it with its own norm.

A model supplies `tables` (time, positions), `prompt` (what is read of a condition), `embed` (latent to hidden states),
`blocks` and `unembed`. Shapes: x_t, v [B, C, F, H, W] latents; t [B] in (0, 1]; hidden states [B, L, D].
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fastlightgen.blocks import check_keep
from fastlightgen.models.config import NetworkConfig
from fastlightgen.models.recompute import recomputed
from fastlightgen.models.streams import Cond, Job, Made, Prompt, State, Stream, Tables, tensors_of, with_tensors
from fastlightgen.parallel.sequence import SequenceGroup

__all__ = ["Block", "Cond", "Job", "Prompt", "State", "Stream", "Tables", "VideoDiT", "gradient"]


def gradient(on: bool):
    """Nothing for a grad stream (the caller's mode rules), no_grad for the others."""
    return nullcontext() if on else torch.no_grad()


class Block(nn.Module):
    """What can be skipped: one residual step of the hidden states, run for all streams in one module call."""

    def forward(
        self, jobs: list[Job], tables: Tables, recompute: str | None = None, made: Made | None = None, *tensors: Tensor
    ) -> list[list[State]] | tuple[Tensor, ...]:
        """Per job one state for each of its prompts.

        With `made` the states go there and their tensors are returned; `tensors` are those of jobs and tables. A
        sharded engine sees only tensors that are arguments and results of a module call, and puts its own in their
        place to learn when the block's backward pass begins and ends.
        """
        if tensors:
            jobs, tables = with_tensors((jobs, tables), tensors)
        read = self._read_once(jobs)
        out = []
        for job in jobs:
            with gradient(any(job.grads)):
                if recompute and any(job.grads) and torch.is_grad_enabled():
                    out.append(recomputed(self.run_settled, recompute, job, tables, read))
                else:
                    out.append(self.run(job, tables, read))
        if made is None:
            return out
        made.states = out
        return tuple(tensors_of(out))

    def _read_once(self, jobs: list[Job]) -> dict[Prompt, Any]:
        """`read` of each prompt, once however many streams go on with it."""
        grads: dict[Prompt, bool] = {}
        for job in jobs:
            for prompt, grad in zip(job.prompts, job.grads, strict=True):
                grads[prompt] = grads.get(prompt, False) or grad
        out = {}
        for prompt, grad in grads.items():
            with gradient(grad):
                out[prompt] = self.read(prompt)
        return out

    def run_settled(self, job: Job, tables: Tables, read: dict[Prompt, Any]) -> list[State]:
        """With the sum taken: a checkpoint then keeps one hidden tensor, not two."""
        return [state.settled() for state in self.run(job, tables, read, settle=True)]

    def read(self, prompt: Prompt) -> Any:
        """What the block makes of a prompt before it sees the hidden states."""
        raise NotImplementedError

    def run(self, job: Job, tables: Tables, read: dict[Prompt, Any], settle: bool = False) -> list[State]:
        """One state per prompt; with `settle` the last product may take the sum along that is left open otherwise."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class Group:
    """Streams (by index) that share their hidden states so far."""

    state: State
    members: list[int]


class VideoDiT(nn.Module):
    """A video diffusion transformer whose blocks can be skipped, walked by several streams at once, or pruned."""

    family: str  # name of its record in families.py
    config_class: str  # its class in diffusers
    cfg: NetworkConfig
    blocks: nn.ModuleList
    block_calls: int = 0  # block evaluations since the counter was last set to 0
    grad_block_calls: int = 0  # those of them that carried gradient
    checkpointing: bool = False  # keep one hidden tensor per block and compute the block again in the backward pass
    sequence: SequenceGroup | None = None  # the ranks that share a clip's tokens, and call this network together
    keep_attention: int = 0  # with checkpointing: how many of the blocks keep their self-attention outputs

    @property
    def num_blocks(self) -> int:
        return len(self.blocks)

    @property
    def config(self) -> dict:
        """config.json of the weights as they are now, pruned or not."""
        raise NotImplementedError

    @property
    def released(self) -> dict[str, float]:
        """`steps`, `guidance` and `shift` that the family's released weights are sampled with."""
        return self.cfg.released

    @property
    def embeds_guidance(self) -> bool:
        """Does it read Cond.guidance, so that one prediction is a guided one?"""
        return self.cfg.embeds_guidance

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def walk(self, x_t: Tensor, t: Tensor | float, streams: Sequence[Stream]) -> list[Tensor]:
        """v for every stream. Each block is visited once, and once called for all the streams that run it."""
        return self(x_t, t, streams)

    def forward(self, x_t: Tensor, t: Tensor | float, cond: Cond | Sequence[Stream], keep: Sequence[int] | None = None):
        """v for one condition (`keep` names the blocks that run), or what `walk` returns for streams."""
        if isinstance(cond, Cond):
            return self._walk(x_t, t, [Stream(cond, keep, grad=True)])[0]
        return self._walk(x_t, t, cond)

    def _walk(self, x_t: Tensor, t: Tensor | float, streams: Sequence[Stream]) -> list[Tensor]:
        t = torch.as_tensor(t, dtype=torch.float32, device=x_t.device).expand(x_t.shape[0])
        keeps = [check_keep(s.keep, self.num_blocks) for s in streams]
        self.check(x_t, [s.cond for s in streams])

        def grad(members: Sequence[int]) -> bool:
            return any(streams[i].grad for i in members)

        def same(key) -> list[list[int]]:  # streams with the same key, as lists of indices
            keys = [key(s) for s in streams]
            return [[i for i, k in enumerate(keys) if k == key] for key in dict.fromkeys(keys)]

        # Computed once: time and positions for all, the context per prompt, the first hidden states per merge key.
        with gradient(grad(range(len(streams)))):
            tables = self.tables(x_t, t)
        cut = None if self.sequence is None else self.sequence.cut(tables.grid)
        if cut is not None:
            x_t, tables = cut.part(x_t), tables.part(cut)
        prompts: list[Prompt | None] = [None] * len(streams)
        for members in same(lambda s: id(s.cond)):
            with gradient(grad(members)):
                cond = streams[members[0]].cond
                if cut is not None and cond.image is not None:
                    cond = replace(cond, image=cut.part(cond.image))
                prompt = self.prompt(cond, tables)
            for i in members:
                prompts[i] = prompt
        groups = []
        for members in same(lambda s: self.merge_key(s.cond)):
            with gradient(grad(members)):
                groups.append(Group(self.embed(x_t, prompts[members[0]]), members))

        for index, block in enumerate(self.blocks):
            running, waiting = [], []
            for group in groups:
                inside = [i for i in group.members if index in keeps[i]]
                outside = [i for i in group.members if index not in keeps[i]]
                if inside and outside:  # fork: one sum for both sides; a side without a grad stream leaves the graph
                    with gradient(grad(group.members)):
                        state = group.state.settled()
                    inner, outer = (state if grad(side) else state.detach() for side in (inside, outside))
                    running.append(Group(inner, inside))
                    waiting.append(Group(outer, outside))
                else:
                    (running if inside else waiting).append(group)
            if running:
                recompute = ("attention" if index < self.keep_attention else "all") if self.checkpointing else None
                groups = self._call(block, running, tables, prompts, grad, recompute) + waiting

        out: list[Tensor | None] = [None] * len(streams)
        for group in groups:
            for members in self._by_prompt(group.members, prompts):  # still merged only if no block ran
                with gradient(grad(members)):
                    v = self.unembed(group.state, prompts[members[0]], tables)
                    v = v if cut is None else cut.whole(v)
                for i in members:
                    out[i] = v if streams[i].grad else v.detach()
        return out

    def _call(self, block, groups: list[Group], tables: Tables, prompts, grad, recompute: str | None) -> list[Group]:
        """One module call for all groups, so that a sharded engine gathers the block's weights once."""
        parts = [self._by_prompt(g.members, prompts) for g in groups]
        jobs = [
            Job(g.state, [prompts[m[0]] for m in part], [grad(m) for m in part])
            for g, part in zip(groups, parts, strict=True)
        ]
        made = Made()
        tensors = block(jobs, tables, recompute, made, *tensors_of((jobs, tables)))
        states = with_tensors(made.states, tensors)
        flags = [flag for job in jobs for flag in job.grads]
        self.block_calls += len(flags)
        self.grad_block_calls += sum(flags) * torch.is_grad_enabled()  # a caller under no_grad has no backward
        return [Group(s, m) for row, part in zip(states, parts, strict=True) for s, m in zip(row, part, strict=True)]

    @staticmethod
    def _by_prompt(members: list[int], prompts: list[Prompt]) -> list[list[int]]:
        order = dict.fromkeys(id(prompts[i]) for i in members)
        return [[i for i in members if id(prompts[i]) == key] for key in order]

    def units(self) -> list[dict]:
        """The blocks by name, as a ranking lists them."""
        return [{"name": f"blocks.{i}", "kind": "block", "index": i} for i in range(self.num_blocks)]

    def merge_key(self, cond: Cond) -> int:
        """Streams with equal keys start from the same hidden states."""
        return id(cond)

    def hidden_bytes(self, x_t: Tensor) -> int:
        """Size of one hidden state of this batch: what a block boundary, a fork or a kept attention output costs."""
        raise NotImplementedError

    def block_flops(self, x_t: Tensor, cond: Cond) -> list[int]:
        """Floating-point operations of each block in one prediction: 2 for a multiply and add of a matrix product."""
        raise NotImplementedError

    def tables(self, x_t: Tensor, t: Tensor) -> Tables:
        raise NotImplementedError

    def prompt(self, cond: Cond, tables: Tables) -> Prompt:
        raise NotImplementedError

    def embed(self, x_t: Tensor, prompt: Prompt) -> State:
        raise NotImplementedError

    def unembed(self, state: State, prompt: Prompt, tables: Tables) -> Tensor:
        raise NotImplementedError

    def check(self, x_t: Tensor, conds: list[Cond]) -> None:
        raise NotImplementedError

    def example_inputs(
        self, batch: int = 1, seed: int = 0, size: tuple[int, int, int] | None = None
    ) -> tuple[Tensor, Tensor, Cond, Cond]:
        """(x_t, t, cond, null): random, of the right shapes; `size` is the latent (F, H, W)."""
        raise NotImplementedError

    def prune(self, keep: Sequence[int]) -> "VideoDiT":
        """Delete the blocks outside `keep` for good, in place; the others keep their order."""
        keep = sorted(check_keep(keep, self.num_blocks))
        self.blocks = nn.ModuleList([self.blocks[i] for i in keep])
        return self
