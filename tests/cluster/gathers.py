"""Count how often DeepSpeed gathers each sharded weight."""

from collections import Counter

from fastlightgen.parallel import ranks

ORIGINAL: dict = {}  # DeepSpeed's own method by name; the counting one calls it


def count_gathers(counter: Counter) -> None:
    """Count how often each sharded weight of a block is gathered."""
    if ranks.size() == 1:
        return
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator as Coordinator

    name = "_PartitionedParameterCoordinator__all_gather_params_"
    real = ORIGINAL.setdefault(name, getattr(Coordinator, name))

    def counting(self, params, *args, **keys):
        counter.update(p.ds_id for p in params)
        return real(self, params, *args, **keys)

    setattr(Coordinator, name, counting)


def gathers(counter: Counter, nets: list) -> list[list[int]]:
    """Return the gathers per network and block; -1 if the weights of a block were not gathered equally often."""
    if ranks.size() == 1:
        return []
    out = []
    for net in nets:
        row = []
        for block in net.blocks:
            counts = {counter[p.ds_id] for p in block.parameters() if hasattr(p, "ds_id") and not p.ds_persist}
            row.append(counts.pop() if len(counts) == 1 else -1)
        out.append(row)
    return out
