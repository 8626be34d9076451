"""The processes of a run: who this one is, what all of them must agree on, and how a batch is divided among them."""

import atexit
import hashlib
import json
import os
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from functools import cache
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from fastlightgen.parallel.clock import count_collectives
from fastlightgen.parallel.sequence import SequenceGroup
from fastlightgen.parallel.shares import divisors

GO_ON = "run the same command to continue from the last checkpoint, if there is one"
LOST = re.compile(r"gloo|nccl|connection (closed|reset)|timed? ?out|broken pipe", re.IGNORECASE)


def launched() -> int:
    """How many processes torchrun, deepspeed or Slurm started; 1 for a plain python."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def join(device: torch.device, timeout: float) -> None:
    """Enter the process group: NCCL between GPUs, gloo between CPUs; alone if nothing launched several processes."""
    if dist.is_initialized():
        return
    count_collectives()
    limit = timedelta(seconds=timeout)
    # DeepSpeed supports torch versions in which the collectives' new names do not exist yet.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    if "RANK" in os.environ:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=limit)
    else:
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=limit)


def shares(sequence: int) -> tuple[int, int]:
    """Which share of the data this rank works on, of how many: ranks that share a clip's tokens work on the same."""
    return rank() // sequence, size() // sequence


def turns(count: int, sequence: int) -> list[tuple[int, bool]]:
    """Which of `count` items this rank works on, and whether it reports the result of each.

    All ranks walk together, so that one without an item left repeats the last one; nobody reports that. Of those that
    share a clip's tokens, and so have the same result, one does.
    """
    share, groups = shares(sequence)
    reports = rank() % sequence == 0
    return [(min(i, count - 1), reports and i < count) for i in range(share, -(-count // groups) * groups, groups)]


@cache
def sequence_group(sequence: int, timeout: float) -> SequenceGroup | None:
    """The neighbours, on one node where they fit, that share a clip's tokens with this rank; None: it is alone."""
    if size() % sequence:
        raise ValueError(
            f"sequence_parallel={sequence}: does not divide the number of processes, {size()}; "
            f"use one of {divisors(size())}"
        )
    if sequence == 1:
        return None
    group, _ = dist.new_subgroups(sequence, timeout=timedelta(seconds=timeout))
    return SequenceGroup(group, rank() % sequence, sequence)


def gathered(number: int) -> list[int]:
    """One whole number of every rank; over gloo, so that nothing on a GPU is waited for."""
    if size() == 1:
        return [number]
    mine, out = torch.tensor([number]), torch.empty(size(), dtype=torch.int64)
    dist.all_gather_into_tensor(out, mine)
    return out.tolist()


def anyone(flag: bool) -> bool:
    """Does any rank say so?"""
    return any(gathered(int(flag)))


def barrier() -> None:
    gathered(0)


def leave() -> None:
    """End this rank, once all of them have come here; a process that is alone goes on."""
    if size() > 1:
        barrier()
        dist.destroy_process_group()
        end_process(0)


def end_process(code: int) -> NoReturn:
    """End this rank now, with its exit code. Every rank of several ends here, or in HangWatch.

    The interpreter's own shutdown can abort. A thread of gloo drops a collective's tensors after it has told the
    training thread that the collective is complete, on a busy machine much later, and takes the interpreter's lock for
    that (AsyncWork's destructor, decref_pyobject). If the shutdown begins while it waits for the lock, Python unwinds
    the thread, and C++ does not let an unwinding through a destructor: "terminate called without an active exception",
    exit code -6. destroy_process_group ends only the threads of groups that nothing refers to any more, but
    `sequence_group` and DeepSpeed refer to theirs for ever. Joining the threads is no remedy: a thread whose partner
    has died waits for it until `timeout`.
    """
    try:
        atexit._run_exitfuncs()  # as the interpreter would: writers, the coverage of tests
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def from_rank(owner: int, value: Any) -> Any:
    """One rank's value (text, numbers, lists of them) on every rank; all of them call this."""
    if size() == 1:
        return value
    data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    length = gathered(len(data))[owner]
    out = data if rank() == owner else torch.empty(length, dtype=torch.uint8)
    dist.broadcast(out, owner)
    return json.loads(bytes(out.tolist()))


def from_first(value: Any) -> Any:
    """Rank 0's value on every rank."""
    return from_rank(0, value)


def to_first(clip: Tensor | None) -> Tensor | None:
    """On rank 0 the frames, uint8 [F, H, W, 3], of the one rank that has some; None elsewhere."""
    owner = gathered(int(clip is not None)).index(1)
    if owner == 0 or rank() not in (0, owner):
        return clip if rank() == 0 else None
    if rank() == owner:
        assert clip is not None
        dist.send(torch.tensor(clip.shape), 0)
        dist.send(clip, 0)
        return None
    shape = torch.empty(4, dtype=torch.int64)
    dist.recv(shape, owner)
    out = torch.empty(shape.tolist(), dtype=torch.uint8)
    dist.recv(out, owner)
    return out


def digest(value: Any) -> int:
    """63 bits of a value's text."""
    return int.from_bytes(hashlib.sha256(repr(value).encode()).digest()[:8], "big") >> 1


def differing(numbers: Sequence[int]) -> list[int]:
    """The ranks whose number is not the most frequent one (of equally frequent ones, the lowest rank's)."""
    usual = Counter(numbers).most_common(1)[0][0]
    return [r for r, n in enumerate(numbers) if n != usual]


def agree(what: str, value: Any) -> None:
    """Stop every rank, and name the odd one, before ranks that differ wait for each other in a collective."""
    if odd := differing(gathered(digest(value))):
        raise ValueError(
            f"{what} differs on rank {', '.join(map(str, odd))} of {size()} (here, on rank {rank()}: {value}); "
            "start all ranks with the same command, code and data"
        )


def agree_on_keys(values: dict[str, Any]) -> None:
    """As `agree`, for the same keys on every rank: names the first key that differs."""
    if differing(gathered(digest(values))):
        for key, value in values.items():
            agree(key, value)


def lost_partner(err: Exception) -> bool:
    """Did a collective fail, because a partner has gone or is too late? Other errors are this rank's own."""
    return isinstance(err, dist.DistError) or bool(LOST.search(str(err)))


def summed(x: Tensor) -> Tensor:
    """Sum over the ranks of a tensor of the same shape on all of them."""
    if size() == 1:
        return x
    total = x.detach().cpu()
    dist.all_reduce(total)
    return total.to(x.device)


def speaks_first(wait: float = 1.0) -> bool:
    """Elect one of the ranks that stop to report the error: the first that asks.

    Ranks other than 0 ask `wait` seconds later, so that rank 0 is elected if it stops at the same time.
    """
    if size() == 1:
        return True
    if rank():
        time.sleep(wait)
    try:
        return dist.distributed_c10d._get_default_store().add("flg/stopped", 1) == 1
    except dist.DistError:  # the store has gone with the process that held it
        return True


def gone(limit: float = 15.0) -> list[int]:
    """The ranks that do not come here within `limit` seconds; called by those whose collective has failed.

    A rank that lives comes as soon as its own collective fails, so that nobody waits where all ranks live.
    """
    store = dist.distributed_c10d._get_default_store()
    until, missing = time.monotonic() + limit, list(range(size()))
    try:
        store.set(f"flg/here/{rank()}", "1")
        while (missing := [r for r in missing if not store.check([f"flg/here/{r}"])]) and time.monotonic() < until:
            time.sleep(0.1)
    except dist.DistError:  # the store has gone with the process that held it
        return []
    return missing


def mean(values: Sequence[float]) -> list[float]:
    """Mean over the ranks of some numbers."""
    if size() == 1:
        return list(values)
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total)
    return (total / size()).tolist()


def workers(count: int, sequence: int) -> str:
    """Those that work on clips of their own, in words."""
    return f"{count} ranks" if sequence == 1 else f"{count} groups of {sequence} ranks"


def accumulation(batch: int, micro_batch: int, ranks: int, sequence: int = 1) -> int:
    """Micro-batches per rank (or group of ranks) and step, so that all together work on `batch` clips."""
    count, who = ranks // sequence, workers(ranks // sequence, sequence)
    micro = micro_batch or max(1, batch // count)
    if batch % (micro * count):
        least = micro * count
        raise ValueError(
            f"batch={batch}: is not a multiple of {least}, which is {who} with {micro} clips each; "
            f"use batch={max(1, round(batch / least)) * least}, another micro_batch or another number of ranks"
        )
    return batch // (micro * count)
