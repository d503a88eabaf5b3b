"""What the tests check of training on a CPU, checked on a device, in whole runs of the script on the demo's model.

In every run the trained values must move, and no others; what was saved is read back by the script itself.
"""

import importlib.util
import json
import math
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from bench import common_flags, custom_diffusion_flags, step_flags
from diffusers import DiffusionPipeline
from make_model import ROOT, make_data

from custom_diffusion import load_custom_diffusion, read_weights, unload_custom_diffusion

MODEL = ROOT / "demo/model"
RESUME = "--resume_from_checkpoint=checkpoint-1"
LIMIT = 90  # seconds a run
# Adam divides by the size of the gradient: with its usual epsilon, rounding would decide the signs of the smallest ones.
FLAGS = ["--learning_rate=1e-3", "--adam_epsilon=1e-4", "--dataloader_num_workers=0", "--checkpointing_steps=1"]
SAME_PICTURES = ["--noaug", "--center_crop"]


@dataclass(frozen=True)
class Check:
    """A run, and the run whose trained weights its own must equal.

    Attributes:
        flags: of the script, beside those of every check.
        like: name of the other check; None if the run has only to end well, having read back what it saved.
        tolerance: largest difference of a trained value.
        needs: "cuda", or a package that must be installed.
        quick: also checked where there is little time.
    """

    name: str
    flags: list[str] = field(default_factory=list)
    like: str | None = None
    tolerance: float = 0.0
    needs: str | None = None
    quick: bool = False


CHECKS = [
    Check("float32", quick=True),
    Check("float32, resumed from a checkpoint", [RESUME], like="float32", quick=True),
    Check("float32, other loader workers", ["--dataloader_num_workers=2"], like="float32"),
    Check(
        "float32, accumulated",
        ["--train_batch_size=1", "--gradient_accumulation_steps=2"],
        like="float32",
        tolerance=1e-5,
    ),
    Check("float32, checkpointing", ["--gradient_checkpointing"], like="float32", quick=True),
    Check("float32, graphs", ["--cuda_graphs"], like="float32", needs="cuda"),
    Check("float32, graphs and checkpointing", ["--cuda_graphs", "--gradient_checkpointing"], "float32", needs="cuda"),
    Check("crossattn", ["--freeze_model=crossattn"]),
    Check("bf16", ["--mixed_precision=bf16"], like="float32", tolerance=5e-3, quick=True),
    Check("bf16, graphs", ["--mixed_precision=bf16", "--cuda_graphs"], like="bf16", needs="cuda"),
    Check("bf16, images drawn", ["--mixed_precision=bf16", "--validation_prompt=photo of a <new1> circle", "--num_validation_images=1", "--validation_steps=2"], like="bf16"),
    Check("fp16, scaled", ["--mixed_precision=fp16"], like="float32", tolerance=5e-3, needs="cuda"),
    Check("fp16, graphs", ["--mixed_precision=fp16", "--cuda_graphs"], like="fp16, scaled", needs="cuda"),
    Check("same images", SAME_PICTURES, quick=True),
    Check("same images, cached", [*SAME_PICTURES, "--cache_latents"], like="same images", tolerance=1e-4, quick=True),
    Check("8-bit Adam", ["--use_8bit_adam"], needs="bitsandbytes"),
    Check("xformers", ["--enable_xformers_memory_efficient_attention", "--mixed_precision=fp16"], needs="xformers"),
]  # fmt: skip


def run_checks(runner, folder: Path, *, cuda: bool, quick: bool) -> Iterator[dict]:
    """Results, as soon as they are known: name, passed (None where it cannot be tried), and what was seen.

    Args:
        runner: `processes.Runner`. folder: where runs write.
    """
    shutil.rmtree(folder, ignore_errors=True)
    data = make_data(folder / "data", num_class_images=4, size=96)
    wanted = [check for check in CHECKS if check.quick or not quick]
    possible = [check for check in wanted if missing(check, cuda) is None]

    def train(check):
        arguments, fork = argv(check, folder, data, steps=2 if quick else 4), check.needs != "bitsandbytes"
        return runner.run(check.name, arguments, limit=LIMIT, fork=fork, deterministic=True, moved=True)

    # Runs that begin where another ended wait for it.
    first = [check for check in possible if RESUME not in check.flags]
    with ThreadPoolExecutor(8 if cuda else 1) as pool:
        started = {check.name: pool.submit(train, check) for check in first}
        runs = {}
        for check in wanted:
            if check in first:
                runs[check.name] = started[check.name].result()
            if RESUME not in check.flags:
                yield result_of(check, folder, runs, missing(check, cuda))
    for check in possible:
        if check not in first:
            source, target = (output_dir(folder, name) / "checkpoint-1" for name in (check.like, check.name))
            if source.is_dir():
                shutil.copytree(source, target)
            runs[check.name] = train(check)
            yield result_of(check, folder, runs, None)
    answer = folder / "loading.json"
    device, weights = "cuda" if cuda else "cpu", str(output_dir(folder, CHECKS[0].name))
    status = runner.call("loading and unloading", load_and_unload, str(answer), device, weights, limit=LIMIT)
    if status == "ok":
        yield from json.loads(answer.read_text())
    else:
        yield {"name": "loading and unloading", "passed": False, "seen": status}


def missing(check: Check, cuda: bool) -> str | None:
    """What a check needs and is not there."""
    if check.needs is None or (check.needs == "cuda" and cuda):
        return None
    if check.needs != "cuda" and cuda and importlib.util.find_spec(check.needs):
        return None
    return "a CUDA device" if check.needs == "cuda" or not cuda else f"{check.needs}, which is not installed"


def argv(check: Check, folder: Path, data: Path, steps: int) -> list[str]:
    # Unmirrored, as cached views are mirrored otherwise and would show other photos.
    common = common_flags(
        MODEL, data, num_class_images=4, resolution=64, batch_size=2, mixed_precision="no"
    )  # of a flag given twice, the last counts
    return [
        str(ROOT / "train_custom_diffusion.py"), *common, *step_flags(steps), *custom_diffusion_flags(data, flip=False), *FLAGS,
        *check.flags, f"--output_dir={output_dir(folder, check.name)}",
    ]  # fmt: skip


def output_dir(folder: Path, name: str) -> Path:
    return folder / name.replace(", ", "-").replace(" ", "_")


def result_of(check: Check, folder: Path, runs: dict, lacks: str | None) -> dict:
    if lacks is not None:
        return {"name": check.name, "passed": None, "seen": f"needs {lacks}"}
    if runs[check.name]["status"] != "ok":
        return {"name": check.name, "passed": False, "seen": runs[check.name]["status"]}
    moved = runs[check.name]["moved"]
    if moved["trained"] != moved["moved"]:
        wrong = sorted(set(moved["trained"]) ^ set(moved["moved"]))
        return {
            "name": check.name,
            "passed": False,
            "seen": f"{len(wrong)} parameters moved or stayed wrongly: {wrong[0]}",
        }
    if check.like is None:
        return {"name": check.name, "passed": True, "seen": "trained, saved and read back"}
    if runs[check.like]["status"] != "ok":
        return {"name": check.name, "passed": False, "seen": f"nothing to compare with: {check.like} failed"}
    largest = difference(output_dir(folder, check.name), output_dir(folder, check.like))
    return {
        "name": check.name,
        "passed": largest <= check.tolerance,
        "seen": f"{largest:.2g} from {check.like}, at most {check.tolerance:g} allowed",
    }


def difference(folder: Path, other: Path) -> float:
    """The largest between any two trained values; infinite if there are other ones."""
    one, two = ({**w.tensors, **w.tokens} for w in map(read_weights, (folder, other)))
    if one.keys() != two.keys():
        return math.inf
    return max((one[name] - two[name]).abs().max().item() for name in one)


def load_and_unload(output: str, device: str, weights: str) -> None:
    """Whether a pipeline on the device draws with trained weights, and is itself again without; written to `output`."""
    results = []
    for precision, dtype in (("float32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        pipe = DiffusionPipeline.from_pretrained(MODEL, torch_dtype=dtype).to(device)
        pipe.set_progress_bar_config(disable=True)
        before = {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}
        plain = draw(pipe)
        load_custom_diffusion(pipe, weights)
        trained = draw(pipe)
        unload_custom_diffusion(pipe)
        restored = all(torch.equal(before[name], tensor) for name, tensor in pipe.unet.state_dict().items())
        seen = f"drawn images differ by {abs(trained - plain).max():.2g} of 1; {'all' if restored else 'not all'} bits restored"
        passed = restored and bool(np.isfinite(trained).all()) and not np.array_equal(plain, trained)
        results.append({"name": f"loading and unloading, {precision}", "passed": passed, "seen": seen})
    Path(output).write_text(json.dumps(results))


def draw(pipe) -> np.ndarray:
    random = torch.Generator().manual_seed(0)
    return pipe("photo of a circle", num_inference_steps=2, generator=random, output_type="np").images[0]
