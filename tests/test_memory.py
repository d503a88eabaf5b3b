"""Freed memory goes back to the system, where it can be asked to take it; trained weights are not held twice."""

import ctypes
import json
import os
import platform
import subprocess
import sys

import launch
import pytest
from accelerate import Accelerator

# Blocks of 4 MB with small ones between them that live on: what glibc by itself keeps once it has seen larger blocks freed.
PROGRAM = """
import sys, torch
from custom_diffusion.training.memory import return_freed_memory

def resident():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS")) / 1024

torch.ones(2**22)
before = resident()
blocks, small = [], []
for _ in range(50):
    blocks.append(torch.ones(2**20))
    small.append(torch.ones(2**10))
del blocks
if sys.argv[1] == "returned":
    return_freed_memory(torch.device("cpu"))
print(resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_freed_blocks_do_not_stay_resident():
    def megabytes_left(argument):
        done = subprocess.run([sys.executable, "-c", PROGRAM, argument], capture_output=True, text=True, check=True)
        return float(done.stdout)

    assert megabytes_left("kept") > 100  # else this test would prove nothing
    assert megabytes_left("returned") < 20


def on_a_mac():
    """A system that has neither glibc nor Linux's own calls."""

    class Library(ctypes.CDLL):
        def __init__(self, name, *args, **kwargs):
            assert name is not None, "asked for what only Linux has"
            super().__init__(name, *args, **kwargs)

    sys.platform, ctypes.CDLL = "darwin", Library
    platform.libc_ver = lambda *_, **__: ("", "")
    os.environ.pop("THP_MEM_ALLOC_ENABLE", None)
    backward = Accelerator.backward

    def backward_without_huge_pages(self, loss):
        assert "THP_MEM_ALLOC_ENABLE" not in os.environ
        backward(self, loss)

    Accelerator.backward = backward_without_huge_pages


def test_elsewhere_nothing_is_asked_for_that_only_linux_has(run_arguments, tmp_path):
    launched = {"ACCELERATE_MIXED_PRECISION": "no"}  # on Linux this process would then die with its launcher
    arguments = run_arguments | {"max_train_steps": 2, "output_dir": tmp_path / "out"}
    launch.Run(launch.FORKED, arguments, tmp_path / "log", launched, changed_by=on_a_mac).ok()


# How far the peak of memory rises in each step, in sizes of the trained weights: 64 MB, the base model's in fp16 half as much.
STEPS = """
import json, sys
from pathlib import Path
from types import SimpleNamespace
import torch
from torch.nn import Linear, Module, ModuleDict, ModuleList
from custom_diffusion.model.attention import install_trained_projections, remove_trained_projections
from custom_diffusion.model.concept_model import ConceptModel
from custom_diffusion.model.loading import base_tensors
from custom_diffusion.model.source import ModelSource
from custom_diffusion.tools.export import lora_state, truncated
from custom_diffusion.training.memory import return_freed_memory
from custom_diffusion.weights.format import read_weights, save_tensors, write_weights
from custom_diffusion.weights.low_rank import changes, decompose

def memory(line):
    return next(int(text.split()[1]) * 1024 for text in open("/proc/self/status") if text.startswith(line))

def growth(step):
    return_freed_memory(torch.device("cpu"))
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before, result = memory("VmRSS"), step()
    rises[step.__name__] = (memory("VmHWM") - before) / size
    return result

def collect():
    return ConceptModel(unet, SimpleNamespace(trained_rows=list, modifier_tokens=[])).trained_weights({})

def write():
    write_weights(folder / "trained", trained, SimpleNamespace(attn_processors={}), ("safetensors", "bin"))

def remove():
    remove_trained_projections(unet, torch.float32)

def read():
    return read_weights(folder / "trained")

def compare():
    for _ in changes(weights, base_tensors(ModelSource(str(folder)), weights.shapes())):
        pass

def decompose_all():
    return truncated(((name, parts) for name in weights.tensors), rank=256, share=None)[0]

def make_lora():
    return lora_state(deltas, {name: name for name in deltas}, torch.float32)

folder, rises, unet = Path(sys.argv[1]), {}, Module()
unet.blocks = ModuleList(ModuleDict({"attn2": ModuleDict({f"to_{kind}": Linear(1024, 256, bias=False) for kind in "kv"})}) for _ in range(32))
install_trained_projections(unet, "crossattn_kv")
size = sum(parameter.nbytes for parameter in unet.parameters())
trained = growth(collect)
(folder / "unet").mkdir()
base = {name: tensor.half() for name, tensor in trained.tensors.items()}
save_tensors(base, folder / "unet/diffusion_pytorch_model.safetensors")
del base
growth(write)
del trained
growth(remove)
del unet
weights = growth(read)
growth(compare)
parts = decompose(weights.tensors["blocks.0.attn2.to_k.weight"])
deltas = growth(decompose_all)
lora = growth(make_lora)
assert sum(tensor.nbytes for tensor in lora.values()) > 1.2 * size
print(json.dumps(rises))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the peak of a part of a program")
def test_trained_weights_are_not_held_twice(tmp_path):
    command = [sys.executable, "-c", STEPS, str(tmp_path)]
    given_back = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # glibc: a freed matrix is at once the system's again
    done = subprocess.run(command, env=given_back, capture_output=True, text=True, check=True)
    rises = json.loads(done.stdout)
    assert rises["collect"] < 0.5  # what is trained on a CPU is written from where it lies
    assert rises["write"] < 0.5  # one tensor after the other
    assert rises["remove"] < 0.75  # a matrix goes before the next one comes
    assert rises["read"] < 1.5  # the file, mapped
    assert rises["compare"] < 1  # the base model's file, mapped, and a matrix at a time
    assert rises["decompose_all"] < 2  # the factors, which at full rank have 1.25 times as many values
    assert rises["make_lora"] < 0.5  # each takes the place of what it is made of
