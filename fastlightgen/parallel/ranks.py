"""The processes (ranks) of a run: joining and leaving, small collectives, how a batch is divided among them."""

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

GO_ON = "run the same command (without overwrite=true) to continue from the last checkpoint, if there is one"
# Messages of the RuntimeErrors that gloo and NCCL raise when another rank has ended or is late.
LOST = re.compile(r"gloo|nccl|connection (closed|reset)|timed? ?out|broken pipe", re.IGNORECASE)


def launched() -> int:
    """Return how many processes torchrun, deepspeed or Slurm started; 1 for plain python."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    """Return the index of this process; 0 outside a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    """Return the number of processes; 1 outside a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def join(device: torch.device, timeout: float) -> None:
    """Join the process group (NCCL between GPUs, gloo between CPUs), or create a group of one without a launcher.

    `timeout`: seconds after which a collective fails.
    """
    if dist.is_initialized():
        return
    count_collectives()
    limit = timedelta(seconds=timeout)
    # DeepSpeed calls collectives by names that torch deprecates, for the sake of older torch versions.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    if "RANK" in os.environ:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=limit)
    else:
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=limit)


def shares(sequence: int) -> tuple[int, int]:
    """Return (index, count) of the shares of a batch; ranks that share a clip's tokens have the same index."""
    return rank() // sequence, size() // sequence


def turns(count: int, sequence: int) -> list[tuple[int, bool]]:
    """Return the items, of `count`, that this rank works on, each with True if this rank reports its result.

    All ranks get equally many, because sharded weights need all ranks in every walk. A rank without an item left
    repeats the last one and does not report it. Of the ranks that share a clip's tokens only the first one reports.
    """
    share, groups = shares(sequence)
    reports = rank() % sequence == 0
    return [(min(i, count - 1), reports and i < count) for i in range(share, -(-count // groups) * groups, groups)]


@cache
def sequence_group(sequence: int, timeout: float) -> SequenceGroup | None:
    """Return the group of ranks that share a clip's tokens with this rank, or None if sequence is 1.

    A group consists of consecutive ranks, so that it lies on one node if it fits there. `timeout`: seconds.
    """
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
    """Return the integer of every rank, in order of rank. It runs over gloo and does not wait for a GPU."""
    if size() == 1:
        return [number]
    mine, out = torch.tensor([number]), torch.empty(size(), dtype=torch.int64)
    dist.all_gather_into_tensor(out, mine)
    return out.tolist()


def anyone(flag: bool) -> bool:
    """Return whether the flag is set on any rank."""
    return any(gathered(int(flag)))


def barrier() -> None:
    """Wait until all ranks are here."""
    gathered(0)


def leave() -> None:
    """Leave the process group together and end this process. A single process just returns."""
    if size() > 1:
        barrier()
        dist.destroy_process_group()
        end_process(0)


def end_process(code: int) -> NoReturn:
    """End this process now, without the interpreter's shutdown. With several ranks each ends here, or in HangWatch.

    Why: the interpreter's shutdown can abort inside gloo ("terminate called without an active exception", exit code
    -6). A gloo thread releases the tensors of a collective after the training thread has gone on, on a busy machine
    much later. It takes the interpreter's lock for that (AsyncWork's destructor, decref_pyobject). If the shutdown
    begins while it waits for the lock, Python unwinds the thread, and C++ forbids unwinding through a destructor.

    Two remedies do not work. destroy_process_group ends only the threads of groups without references, but
    `sequence_group` and DeepSpeed keep references for ever. Joining the threads may take until `timeout`, because a
    thread whose partner has died waits that long.
    """
    try:
        atexit._run_exitfuncs()  # os._exit skips exit handlers: those of the writers, of coverage
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def from_rank(owner: int, value: Any) -> Any:
    """Return the value of rank `owner` (anything that JSON can hold) on every rank. All ranks call this together."""
    if size() == 1:
        return value
    data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    length = gathered(len(data))[owner]
    out = data if rank() == owner else torch.empty(length, dtype=torch.uint8)
    dist.broadcast(out, owner)
    return json.loads(bytes(out.tolist()))


def from_first(value: Any) -> Any:
    """Return the value of rank 0 on every rank."""
    return from_rank(0, value)


def to_first(clip: Tensor | None) -> Tensor | None:
    """Send the frames, uint8 [F, H, W, 3], of the one rank that has them to rank 0; return None on the others."""
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
    """Return a 63-bit hash of repr(value); it fits into a signed 64-bit integer."""
    return int.from_bytes(hashlib.sha256(repr(value).encode()).digest()[:8], "big") >> 1


def differing(numbers: Sequence[int]) -> list[int]:
    """Return the ranks whose number is not the most frequent one. In a tie the number of the lowest rank counts."""
    usual = Counter(numbers).most_common(1)[0][0]
    return [r for r, n in enumerate(numbers) if n != usual]


def agree(what: str, value: Any) -> None:
    """Raise on all ranks if `value` differs between ranks, and name the ranks that differ.

    Without this check, ranks that differ would later wait for each other in different collectives.
    """
    if odd := differing(gathered(digest(value))):
        raise ValueError(
            f"{what} differs on rank {', '.join(map(str, odd))} of {size()} (here, on rank {rank()}: {value}); "
            "start all ranks with the same command, code and data"
        )


def agree_on_keys(values: dict[str, Any]) -> None:
    """As `agree`, for a dictionary with the same keys on every rank; the error names the first key that differs."""
    if differing(gathered(digest(values))):
        for key, value in values.items():
            agree(key, value)


def lost_partner(err: Exception) -> bool:
    """Return whether a collective failed because another rank has ended or is late; else this rank is at fault."""
    return isinstance(err, dist.DistError) or bool(LOST.search(str(err)))


def summed(x: Tensor) -> Tensor:
    """Return the sum over the ranks of a tensor that has the same shape on all of them."""
    if size() == 1:
        return x
    total = x.detach().cpu()
    dist.all_reduce(total)
    return total.to(x.device)


def speaks_first(wait: float = 1.0) -> bool:
    """Elect one stopping rank to report the error, preferably rank 0; return whether it is this one.

    The first rank that asks is elected. Ranks other than 0 wait `wait` seconds before they ask.
    """
    if size() == 1:
        return True
    if rank():
        time.sleep(wait)
    try:
        return dist.distributed_c10d._get_default_store().add("flg/stopped", 1) == 1
    except dist.DistError:  # the process that held the store has ended
        return True


def gone(limit: float = 15.0) -> list[int]:
    """Return the ranks that have ended. Every rank whose collective has failed calls this.

    Each caller signs in at the store; a rank that has not signed in within `limit` seconds counts as ended. A living
    rank signs in as soon as its own collective fails, so that nobody waits for long if all ranks live.
    """
    store = dist.distributed_c10d._get_default_store()
    until, missing = time.monotonic() + limit, list(range(size()))
    try:
        store.set(f"flg/here/{rank()}", "1")
        while (missing := [r for r in missing if not store.check([f"flg/here/{r}"])]) and time.monotonic() < until:
            time.sleep(0.1)
    except dist.DistError:  # the process that held the store has ended
        return []
    return missing


def mean(values: Sequence[float]) -> list[float]:
    """Return the mean over the ranks of each number."""
    if size() == 1:
        return list(values)
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total)
    return (total / size()).tolist()


def workers(count: int, sequence: int) -> str:
    """Describe the ranks, or groups of ranks, that work on different clips."""
    return f"{count} ranks" if sequence == 1 else f"{count} groups of {sequence} ranks"


def accumulation(batch: int, micro_batch: int, ranks: int, sequence: int = 1) -> int:
    """Return the number of micro-batches per step of each rank (or group of ranks) that make up `batch` clips.

    Without `micro_batch` a rank takes its clips in one micro-batch.
    """
    count, who = ranks // sequence, workers(ranks // sequence, sequence)
    micro = micro_batch or max(1, batch // count)
    if batch % (micro * count):
        least = micro * count
        raise ValueError(
            f"batch={batch}: is not a multiple of {least}, which is {who} with {micro} clips each; "
            f"use batch={max(1, round(batch / least)) * least}, another micro_batch or another number of ranks"
        )
    return batch // (micro * count)
