"""A network whose weights are constants for a while, so that a backward pass ends at its inputs."""

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def constant(net: nn.Module) -> Iterator[None]:
    """Inside, gradients flow through walks of `net` to their inputs, and none to its weights.

    The backward pass must run inside too. A sharded engine reduces the gradients of a block in a backward hook of the
    block, whether there are any or not. These hooks are left out; those that gather the weights stay.
    """
    trained = [p for p in net.parameters() if p.requires_grad]
    hooks = {module: module._backward_hooks for module in net.modules() if module._backward_hooks}
    for p in trained:
        p.requires_grad_(False)
    for module in hooks:
        module._backward_hooks = OrderedDict()
    try:
        yield
    finally:
        for p in trained:
            p.requires_grad_(True)
        for module, own in hooks.items():
            module._backward_hooks = own
