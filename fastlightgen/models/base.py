"""One walk, many streams: the only block loop in the project.

A stream is one prediction of the same weights for the same noisy latent: a condition, the blocks that run, and whether
it carries gradient. Streams share their hidden states until the first block that only some of them run, or, where their
prompts differ, until the text first enters; `schedule.py` computes these points. A block is called once for all streams
that run it. A block does not add its last residual: it returns x, y and gate, and the next block that runs for that
stream computes x + gate y in one kernel with its norm. Skipping a block therefore costs nothing.

A model supplies `tables` (time, positions), `prompt` (a condition as the blocks read it), `embed` (latent to hidden
states), `blocks` and `unembed`. Shapes: x_t, v [B, C, F, H, W] latents; t [B] in (0, 1]; hidden states [B, L, D].
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, Generic

import torch
from torch import Tensor, nn

from fastlightgen.blocks import check_keep
from fastlightgen.models.config import NetworkConfig
from fastlightgen.models.plumbing import FlatModule, flat_call
from fastlightgen.models.recompute import recomputed
from fastlightgen.models.schedule import Fork, Group, Step, read_once, schedule
from fastlightgen.models.streams import (
    AnyPrompt,
    AnyTables,
    Cond,
    Features,
    Job,
    Prompt,
    Prunable,
    State,
    Stream,
    Tables,
    Watch,
)
from fastlightgen.parallel.sequence import SequenceGroup

__all__ = ["Block", "Cond", "Features", "Job", "Prompt", "State", "Stream", "Tables", "VideoDiT", "gradient"]


def gradient(on: bool) -> AbstractContextManager:
    """A no_grad context unless `on`; with `on` the caller's grad mode stays in force."""
    return nullcontext() if on else torch.no_grad()


class Block(FlatModule[AnyPrompt, AnyTables]):
    """The unit that can be skipped: one residual step of the hidden states, for all streams in one module call."""

    def prunable(self) -> list[Prunable]:
        """The rows that width pruning can drop; none in a family that does not name them."""
        return []

    def run_jobs(self, jobs: list[Job[AnyPrompt]], tables: AnyTables, recompute: str | None) -> list[list[State]]:
        """Run the block; return per job one state for each of its prompts.

        `recompute`: see `recomputed`; None keeps all activations.
        """
        # Jobs may share a prompt: read each distinct prompt once.
        parts = [part for job in jobs for part in zip(job.prompts, job.grads, strict=True)]
        read = {}
        for prompt, grad in read_once(parts).items():
            with gradient(grad):
                read[prompt] = self.read(prompt)
        out = []
        for job in jobs:
            with gradient(any(job.grads)):
                if recompute and any(job.grads) and torch.is_grad_enabled():
                    out.append(recomputed(self, self.run_settled, recompute, job, tables, read))
                else:
                    out.append(self.run(job, tables, read))
        return out

    def run_settled(self, job: Job[AnyPrompt], tables: AnyTables, read: dict[AnyPrompt, Any]) -> list[State]:
        """`run`, then add the deferred residuals: a checkpoint keeps one hidden tensor instead of x and y."""
        return [state.settled() for state in self.run(job, tables, read, settle=True)]

    def read(self, prompt: AnyPrompt) -> Any:
        """Compute the part of the block that depends on the prompt alone, such as keys and values of the text."""
        raise NotImplementedError

    def run(
        self, job: Job[AnyPrompt], tables: AnyTables, read: dict[AnyPrompt, Any], settle: bool = False
    ) -> list[State]:
        """One state per prompt. With `settle`, the last matmul may add the residual instead of deferring it."""
        raise NotImplementedError

    def attention_outputs(self) -> list[tuple[nn.Module, bool]]:
        """The layers that read the self-attention in their first inputs; does their bias belong to it alone?"""
        raise NotImplementedError


class VideoDiT(nn.Module, Generic[AnyPrompt, AnyTables]):
    """A video diffusion transformer whose blocks can be skipped, walked by several streams at once, or pruned."""

    family: str  # name of the family's record in families.py
    config_class: str  # name of the network's class in diffusers
    cfg: NetworkConfig
    blocks: nn.ModuleList
    block_calls: int = 0  # block evaluations since the counter was last set to 0
    grad_block_calls: int = 0  # those block evaluations that carried gradient
    checkpointing: bool = False  # keep one hidden tensor per block and compute the block again in the backward pass
    keep_attention: int = 0  # with checkpointing: number of leading blocks that keep their self-attention outputs too
    watch: Watch | None = None  # called with queries and keys of every attention among a clip's tokens
    sequence: SequenceGroup | None = None  # the processes that split a clip's tokens and call this network together

    @property
    def num_blocks(self) -> int:
        return len(self.blocks)

    @property
    def config(self) -> dict:
        """Contents of config.json for the network as it is now, pruned or not."""
        raise NotImplementedError

    @property
    def released(self) -> dict[str, float]:
        """Sampling settings of the family's released weights: `steps`, `guidance` and `shift`."""
        return self.cfg.released

    @property
    def embeds_guidance(self) -> bool:
        """True if the network reads Cond.guidance, so that a single prediction is already guided."""
        return self.cfg.embeds_guidance

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def walk(self, x_t: Tensor, t: Tensor | float, streams: Sequence[Stream]) -> list[Tensor]:
        """Predict v for every stream. Each block is called once, for all the streams that run it."""
        out = self(x_t, t, streams)
        kept = iter(out[len(streams) :])
        for features in [s.features for s in streams if s.features is not None]:
            features.update((block, next(kept)) for block in features.blocks)
        return out[: len(streams)]

    def forward(
        self, x_t: Tensor, t: Tensor | float, cond: Cond | Sequence[Stream], keep: Sequence[int] | None = None
    ) -> Tensor | list[Tensor]:
        """Predict v for one condition (`keep`: indices of the blocks that run), or a list of v, one per stream.

        The list goes on with the hidden states that streams ask for: a sharded engine has to see all that carries
        gradient. `walk` puts them into the streams' Features.
        """
        if isinstance(cond, Cond):
            return self._walk(x_t, t, [Stream(cond, keep, grad=True)])[0]
        return self._walk(x_t, t, cond)

    def _walk(self, x_t: Tensor, t: Tensor | float, streams: Sequence[Stream]) -> list[Tensor]:
        t = torch.as_tensor(t, dtype=torch.float32, device=x_t.device).expand(x_t.shape[0])
        keeps = [check_keep(s.keep, self.num_blocks) for s in streams]
        self.check(x_t, [s.cond for s in streams])
        prompt_keys, start_keys = [id(s.cond) for s in streams], [self.merge_key(s.cond) for s in streams]
        plan = schedule(keeps, prompt_keys, start_keys, [s.grad for s in streams], self.num_blocks)

        # Embed: time and positions once for all streams, each prompt once, each start state once.
        with gradient(plan.everyone.grad):
            tables = self.tables(x_t, t)
        tables = tables if self.watch is None else replace(tables, watch=self.watch)
        if self.sequence is not None:  # from here to the unembedding this process has a part of the tokens
            cut = self.sequence.cut(tables.grid)
            x_t, tables = cut.part(x_t), tables.part(cut)
        prompts: dict[int, AnyPrompt] = {}  # stream index -> its prompt
        for group in plan.prompts:
            with gradient(group.grad):
                prompt = self._prompt([streams[i] for i in group.members], tables)
            prompts |= dict.fromkeys(group.members, prompt)
        states: dict[Group, State] = {}
        for group in plan.starts:
            with gradient(group.grad):
                states[group] = self.embed(x_t, prompts[group.members[0]])

        # Blocks: first split off the streams that skip this block, then run it for all others in one call.
        blocks = self.blocks
        hidden: dict[tuple[int, int], Tensor] = {}  # (stream index, block) -> hidden states that the stream keeps
        for step in plan.steps:
            for fork in step.forks:
                self._fork(fork, states)
            self._run(blocks[step.block], step, states, prompts, tables)
            hidden |= self._features(step.block, streams, states, tables)

        # Unembed: one prediction for each prompt of a group. Its streams without gradient are detached here.
        out: dict[int, Tensor] = {}
        for group, parts in plan.ends:
            for part in parts:
                with gradient(part.grad):
                    v = self.unembed(states[group], prompts[part.members[0]], tables)
                    v = v if tables.cut is None else tables.cut.whole(v)
                out |= {i: v if streams[i].grad else v.detach() for i in part.members}
        kept = [(i, block) for i, s in enumerate(streams) if s.features is not None for block in s.features.blocks]
        return [*(out[i] for i in range(len(streams))), *(hidden[place] for place in kept)]

    def _prompt(self, streams: list[Stream], tables: AnyTables) -> AnyPrompt:
        """Embed the condition that these streams have in common."""
        cond, text_keys = streams[0].cond, streams[0].text_keys
        assert all(s.text_keys is text_keys for s in streams), "streams with one condition share its text_keys"
        if tables.cut is not None and cond.image is not None:
            cond = replace(cond, image=tables.cut.part(cond.image))
        prompt = self.prompt(cond, tables)
        return prompt if text_keys is None else replace(prompt, text_keys=text_keys)

    @staticmethod
    def _fork(fork: Fork, states: dict[Group, State]) -> None:
        """Split a group: add the deferred residual once for both sides, and detach a side without gradient."""
        with gradient(fork.group.grad):
            state = states.pop(fork.group).settled()
        for side in (fork.inside, fork.outside):
            states[side] = state if side.grad else state.detach()

    def _run(
        self, block: nn.Module, step: Step, states: dict[Group, State], prompts: dict[int, AnyPrompt], tables: AnyTables
    ) -> None:
        """Run a block for all its groups in one module call, so that a sharded engine gathers its weights once."""
        jobs = [
            Job(states.pop(group), [prompts[part.members[0]] for part in parts], [part.grad for part in parts])
            for group, parts in step.runs
        ]
        recompute = None
        if self.checkpointing:
            recompute = "attention" if step.block < self.keep_attention else "all"
        results = flat_call(block, jobs, tables, recompute)
        for (_, parts), after in zip(step.runs, results, strict=True):
            states.update(zip(parts, after, strict=True))
        grads = [grad for job in jobs for grad in job.grads]
        self.block_calls += len(grads)
        self.grad_block_calls += sum(grads) * torch.is_grad_enabled()  # a caller under no_grad has no backward pass

    def _features(
        self, block: int, streams: Sequence[Stream], states: dict[Group, State], tables: AnyTables
    ) -> dict[tuple[int, int], Tensor]:
        """The hidden states after a block, of the streams that keep them: image tokens, those of all processes."""
        found = {}
        for i, stream in enumerate(streams):
            if stream.features is not None and block in stream.features.blocks:
                state = next(state for group, state in states.items() if i in group.members)
                with gradient(stream.grad):
                    x = self.image_tokens(state, tables)
                    x = x if tables.cut is None else tables.cut.joined(x)
                found[i, block] = x if stream.grad else x.detach()
        return found

    def units(self) -> list[dict]:
        """Name, kind and index of every block, as importance.json lists them."""
        return [{"name": f"blocks.{i}", "kind": "block", "index": i} for i in range(self.num_blocks)]

    def merge_key(self, cond: Cond) -> int:
        """Streams with equal keys start from the same hidden states. Equal conditions must give equal keys."""
        return id(cond)

    def hidden_bytes(self, x_t: Tensor) -> int:
        """Bytes of one hidden state of this batch: the cost of a block boundary, a fork or a kept attention output."""
        raise NotImplementedError

    def block_flops(self, x_t: Tensor, cond: Cond) -> list[int]:
        """Floating-point operations of each block in one prediction; a multiply and an add count as 2."""
        raise NotImplementedError

    def tables(self, x_t: Tensor, t: Tensor) -> AnyTables:
        """Compute the tensors that all blocks and streams of a walk share: time and positions."""
        raise NotImplementedError

    def prompt(self, cond: Cond, tables: AnyTables) -> AnyPrompt:
        """Embed a condition into the form that the blocks read."""
        raise NotImplementedError

    def embed(self, x_t: Tensor, prompt: AnyPrompt) -> State:
        """Turn the latent, and the image condition of the prompt, into hidden states."""
        raise NotImplementedError

    def image_tokens(self, state: State, tables: AnyTables) -> Tensor:
        """The hidden states [B, L, D] of this process's image tokens, with their deferred residual added."""
        return state.settled().x

    def unembed(self, state: State, prompt: AnyPrompt, tables: AnyTables) -> Tensor:
        """Turn the hidden states after the last block into v; under a sequence group, into this process's part of v."""
        raise NotImplementedError

    def with_given(self, x: Tensor, cond: Cond) -> Tensor:
        """Sampled latents [B, C, F, H, W] with the frames that the condition gives, exactly as given."""
        return x

    def check(self, x_t: Tensor, conds: list[Cond]) -> None:
        """Raise ValueError if the latent or a condition does not fit the network."""
        raise NotImplementedError

    def example_inputs(
        self, batch: int = 1, seed: int = 0, size: tuple[int, int, int] | None = None
    ) -> tuple[Tensor, Tensor, Cond, Cond]:
        """Random (x_t, t, cond, null) of shapes that fit the network; `size` is the latent's (F, H, W)."""
        raise NotImplementedError

    def prune(self, keep: Sequence[int]) -> "VideoDiT":
        """Delete the blocks outside `keep`, in place and for good; the others keep their order."""
        keep = sorted(check_keep(keep, self.num_blocks))
        self.blocks = nn.ModuleList([self.blocks[i] for i in keep])
        return self
