"""What a training step holds in memory, counted on tensors that have shapes and no values: nothing is computed."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# bitsandbytes: two states of a byte a value, and a float32 scale for each block of them; float32 states for small tensors.
BLOCK_SIZE, SMALLEST_8BIT = 256, 4096


@dataclass(frozen=True)
class PassMemory:
    """Bytes that a computation holds beside its parameters.

    Attributes:
        kept: by the tensors that the forward pass keeps for the backward pass.
        peak: at most, those included.
    """

    kept: int
    peak: int


def parameter_bytes(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())


def optimizer_bytes(parameters: list[nn.Parameter], use_8bit_adam: bool) -> int:
    """Of the gradients and of AdamW's two states."""
    return sum(parameter.nbytes + _state_bytes(parameter, use_8bit_adam) for parameter in parameters)


def _state_bytes(parameter, use_8bit_adam):
    if use_8bit_adam and parameter.numel() >= SMALLEST_8BIT:
        return 2 * (parameter.numel() + 4 * -(-parameter.numel() // BLOCK_SIZE))
    return 2 * parameter.nbytes


def count_passes(predict: Callable[[], torch.Tensor], modules: list[nn.Module]) -> PassMemory:
    """Memory of a forward and a backward pass, under `FakeTensorMode` without the time they take.

    Gradients of parameters are dropped as soon as they are there: `optimizer_bytes` has them.

    Args:
        predict: the forward pass; without a gradient in what it returns there is no backward pass.
        modules: whose parameters are not counted.
    """
    parameters = [parameter for module in modules for parameter in module.parameters()]
    hooks = [p.register_post_accumulate_grad_hook(_drop_gradient) for p in parameters if p.requires_grad]
    own = {_key(parameter.untyped_storage()) for parameter in parameters}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if _key(storage) not in own:
            kept[_key(storage)] = storage
        return tensor

    with _LiveBytes(own) as live:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            prediction = predict()
        kept_bytes = sum(storage.nbytes() for storage in kept.values())
        kept.clear()
        if prediction.requires_grad:
            prediction.float().square().mean().backward()
    for hook in hooks:
        hook.remove()
    return PassMemory(kept_bytes, live.peak)


def _drop_gradient(parameter):
    parameter.grad = None


def _key(storage):
    """The same for every tensor on the same memory."""
    return storage._cdata


class _LiveBytes(TorchDispatchMode):
    """Counts the memory of all tensors made while it is on, each storage once, until they are freed.

    Args:
        known: keys of storages that are not counted.
    """

    def __init__(self, known: set):
        super().__init__()
        self.sizes = dict.fromkeys(known, 0)  # of those that are alive
        self.now = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        self.peak = max(self.peak, self.now)
        return result

    def _count(self, storage):
        key = _key(storage)
        if key not in self.sizes:
            self.sizes[key] = storage.nbytes()
            self.now += storage.nbytes()
            weakref.finalize(storage, self._freed, key)

    def _freed(self, key):
        self.now -= self.sizes.pop(key)
