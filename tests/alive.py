"""A count of the bytes of live tensors, for tests of the planner."""

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Alive(TorchDispatchMode):
    """Counts the bytes of tensors created inside this context that are still alive (in autograd's graph, say)."""

    def __init__(self):
        super().__init__()
        self.made = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        old = {a.untyped_storage()._cdata for a in tree_leaves((args, kwargs)) if isinstance(a, torch.Tensor)}
        for tensor in (v for v in tree_leaves(out) if isinstance(v, torch.Tensor)):
            storage = tensor.untyped_storage()
            if storage._cdata not in old:
                self.made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return out

    def bytes(self) -> int:
        return sum(size for ref, size in self.made.values() if not ref.expired())
