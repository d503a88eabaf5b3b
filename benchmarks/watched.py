"""Run a training script and write down when it logged each step, and what memory of the device it had taken by then.

    python benchmarks/watched.py '{"record": "record.json", "profile": true}' SCRIPT [FLAG...]

`Watch` says what else can be asked for. Any script is watched that logs every step through accelerate.
"""

import json
import multiprocessing
import os
import re
import runpy
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator

PROFILED_STEPS = 3
# Kinds of work, told by the names of kernels and operators; the first that fits counts.
KINDS = {
    "optimizer": "adam|multi_tensor",
    "matrix products, convolutions, attention": "gemm|gemv|conv|cutlass|cublas|xmma|wgrad|dgrad|fprop|nvjet|flash|fmha|attention|"
    "::(add)?b?mm$|::linear$|splitk",
    "normalisation": "norm|welford",
    "copies and layout": "copy|memcpy|memset|cat|transpose|nchw|nhwc|fill|::to$|contiguous",
    "other": "",
}
WAITS = "cudaStreamSynchronize|cudaEventSynchronize|cudaDeviceSynchronize|cudaMemcpy$"


@dataclass(frozen=True)
class Watch:
    """What is done to a run beside starting it.

    Attributes:
        record: JSON file to write.
        profile: after this many logged steps, `PROFILED_STEPS` of them are profiled; 0 for none.
        compile_blocks: the UNet's repeated blocks are compiled by torch.
        deterministic: sums are taken in a fixed order, and in full float32.
        moved: note which parameters are trained, and which have changed when the last step is logged.
    """

    record: str
    profile: int = 0
    compile_blocks: bool = False
    deterministic: bool = False
    moved: bool = False


def run_watched(watch: Watch, argv: list[str]) -> None:
    """Run `argv` as a script of its own, watched."""
    record = {"steps": [], "profile": None, "moved": None}
    models = watch_model(watch)
    watch_log(watch, record, models)
    if watch.deterministic:
        make_deterministic()
    sys.argv, sys.path[0] = argv, str(Path(argv[0]).resolve().parent)
    try:
        runpy.run_path(argv[0], run_name="__main__")
    finally:
        usage = os.times()
        record["cpu_seconds"] = usage.user + usage.system + usage.children_user + usage.children_system
        Path(watch.record).write_text(json.dumps(record))


def watch_log(watch: Watch, record: dict, models: list) -> None:
    """Note time and memory whenever accelerate is given a step's numbers; profile some of the steps."""
    log, profiler = Accelerator.log, None

    def noted(self, values, *args, **kwargs):
        nonlocal profiler
        if "loss" not in values:  # of something else, between steps
            return log(self, values, *args, **kwargs)
        steps = record["steps"]
        steps.append({"time": time.time()} | memory())
        if watch.profile and len(steps) == watch.profile:
            profiler = torch.profiler.profile()
            profiler.start()
        if profiler is not None and len(steps) == watch.profile + PROFILED_STEPS:
            profiler.stop()
            record["profile"] = summary(profiler.events())
            profiler = None
        if models:
            record["moved"] = moved(*models)
        return log(self, values, *args, **kwargs)

    Accelerator.log = noted


def watch_model(watch: Watch) -> list:
    """Compile or copy the model as soon as a run has built it. Returns a list that then holds it and the copy."""
    from custom_diffusion.model.concept_model import ConceptModel

    make, models = ConceptModel.__init__, []

    def make_watched(self, *args, **kwargs):
        make(self, *args, **kwargs)
        if watch.compile_blocks:
            self.unet.compile_repeated_blocks()
        if watch.moved and not models:
            models.extend((self, {name: p.detach().clone() for name, p in self.named_parameters()}))

    ConceptModel.__init__ = make_watched
    return models


def moved(model: torch.nn.Module, before: dict[str, torch.Tensor]) -> dict[str, list[str]]:
    """Names of the trained parameters, and of those that differ from what they were."""
    now = dict(model.named_parameters())
    return {
        "trained": [name for name, parameter in now.items() if parameter.requires_grad],
        "moved": [name for name, parameter in now.items() if not torch.equal(parameter, before[name])],
    }


def memory() -> dict[str, int]:
    """The most that the device's memory held so far, in bytes."""
    if not torch.cuda.is_available():
        return {"allocated_bytes": 0, "reserved_bytes": 0}
    return {
        "allocated_bytes": torch.cuda.max_memory_allocated(),
        "reserved_bytes": torch.cuda.max_memory_reserved(),
    }


def make_deterministic() -> None:
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.allow_tf32 = False
    # The fast kinds of attention sum gradients in no fixed order.
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)


def summary(events) -> dict:
    """What the device did in the profiled steps, in milliseconds a step, and where the CPU waited for it.

    On a CPU the operators themselves stand for the kernels.
    """
    on_device = [
        event
        for event in events
        if event.device_type == torch.autograd.DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
    ]
    busy = [(event.time_range.start, event.time_range.end) for event in on_device]
    if on_device:
        work = [(event.name, event.time_range.elapsed_us()) for event in on_device]
    else:
        work = [(event.name, event.self_cpu_time_total) for event in events if event.name.startswith("aten::")]
        busy = [(event.time_range.start, event.time_range.end) for event in events if event.name.startswith("aten::")]
    kinds, names = dict.fromkeys(KINDS, 0.0), {}
    for name, microseconds in work:
        kinds[kind_of(name)] += microseconds
        names[name] = names.get(name, 0.0) + microseconds
    waits = [event.self_cpu_time_total for event in events if re.search(WAITS, event.name)]
    per_step = 1 / 1000 / PROFILED_STEPS
    wall = max(end for _, end in busy) - min(start for start, _ in busy)
    return {
        "device_ms": wall * per_step,
        "idle_ms": (wall - covered(busy)) * per_step,
        "cpu_waits_ms": sum(waits) * per_step,
        "launches": len(work) / PROFILED_STEPS,
        "kinds_ms": {kind: microseconds * per_step for kind, microseconds in kinds.items()},
        "longest_ms": {
            name[:120]: microseconds * per_step
            for name, microseconds in sorted(names.items(), key=lambda item: -item[1])[:15]
        },
    }


def kind_of(name: str) -> str:
    return next(kind for kind, pattern in KINDS.items() if re.search(pattern, name, re.IGNORECASE))


def covered(intervals: list[tuple[float, float]]) -> float:
    """Length of the union of (start, end)."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(end - max(start, reached), 0.0)
        reached = max(reached, end)
    return total


def run_forked(watch: dict, argv: list[str], log: str) -> None:
    """`run_watched` in a forked process."""
    begin_forked(log)
    run_watched(Watch(**watch), argv)


def call_forked(log: str, function, *args) -> None:
    """Call a function in a forked process."""
    begin_forked(log)
    function(*args)


def begin_forked(log: str) -> None:
    """A process group of its own, and its output in a file."""
    multiprocessing.set_start_method("fork", force=True)  # for DataLoader's workers, as in any other process
    os.setsid()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)


if __name__ == "__main__":
    run_watched(Watch(**json.loads(sys.argv[1])), sys.argv[2:])
