"""CUDA graphs without a GPU: what is recorded are the operators that run, and a replay runs them again on the same memory.

Only the device is replaced. torch's own `make_graphed_callables` runs on top, so what a recording must not do, and what a replay
overwrites, is as on a GPU.
"""

import contextlib

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

READS_NUMBERS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)


class EmulatedGraph:
    """In place of `torch.cuda.CUDAGraph`."""

    replays = 0  # of all graphs

    def __init__(self):
        self.calls = []

    @torch.no_grad()
    def replay(self):
        EmulatedGraph.replays += 1
        for operator, args, kwargs, recorded in self.calls:
            for old, new in zip(tree_leaves(recorded), tree_leaves(operator(*args, **kwargs))):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class _Recorder(TorchDispatchMode):
    def __init__(self, graph):
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in READS_NUMBERS:
            raise RuntimeError(f"{func}: the CPU must not wait for numbers while a graph is recorded")
        result = func(*args, **(kwargs or {}))
        self.graph.calls.append((func, args, kwargs or {}, result))
        return result


def install(patch=setattr) -> None:
    """Put the emulation into torch. `patch`: monkeypatch.setattr undoes it."""
    patch(torch.cuda, "CUDAGraph", EmulatedGraph)
    patch(torch.cuda, "graph", lambda graph, pool: _Recorder(graph))
    patch(torch.cuda, "Stream", lambda: None)
    patch(torch.cuda, "stream", contextlib.nullcontext)
    patch(torch.cuda, "synchronize", lambda: None)
    patch(torch.cuda.graphs, "graph_pool_handle", lambda: None)
