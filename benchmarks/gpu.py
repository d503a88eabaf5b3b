"""All that a GPU can tell of this project, in one go of under ten minutes: what holds there, how fast it is, what memory it takes.

    make gpu PEER=path/to/train_custom_diffusion.py
    python benchmarks/gpu.py --peer path/to/train_custom_diffusion.py --output results.json

It needs torch with CUDA and this project's requirements, and no network: models have random weights of the real sizes. Stages run
in the order of their worth, each run in a process of its own with a limit; when the time is over, the rest is left out, and said to
be. Beside the JSON an HTML page is written. `--device cpu --tiny` tries the script itself.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import time
from dataclasses import dataclass, field
from datetime import date
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import make_model
from bench import OURS, common_flags, cpu_name, custom_diffusion_flags, peer_flags, peer_script
from device_checks import MODEL, run_checks
from gpu_page import page
from processes import NoTime, Runner

LIBRARIES = ("torch", "diffusers", "transformers", "accelerate", "bitsandbytes", "xformers", "triton")
# Few enough images that all latents are cached before steps are counted.
CACHED = ["--cache_latents", "--augmentations_per_image=1", "--num_class_images=4"]
GB = 1e9


@dataclass(frozen=True)
class Size:
    """What the benchmark trains on.

    Attributes:
        small, large: pixels, of Stable Diffusion 1's size and of Stable Diffusion XL's.
        steps: of a run; run_steps: of one that is timed from launch to exit. warm_up: steps at first that are not counted.
        class_images: number of them. batch_sizes: photos, and as many class images.
    """

    small: int = 512
    large: int = 1024
    steps: int = 40
    run_steps: int = 250
    warm_up: int = 10
    class_images: int = 200
    batch_sizes: tuple[int, ...] = (1, 2, 4, 8, 16, 32)


TINY = Size(small=64, large=64, steps=4, run_steps=4, warm_up=1, class_images=4, batch_sizes=(1,))


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, help="the reference script, to compare with; left out if not given")
    parser.add_argument("--large_peer", type=Path, help="train_dreambooth_lora_sdxl.py; left out if not given")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny models and few steps: to try this script")
    parser.add_argument("--seconds", type=float, default=570, help="in which all must be done (default: %(default)s)")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="default: all")
    parser.add_argument("--work_dir", type=Path, default=make_model.ROOT / "benchmarks/work/gpu")
    parser.add_argument("--output", type=Path, help="JSON file (default: benchmarks/results/gpu-<device>.json)")
    args = parser.parse_args()
    for flag in ("peer", "large_peer"):
        path = getattr(args, flag)
        if path is not None and not path.is_file():
            parser.error(f"--{flag}: '{path}' does not exist")
    return args


@dataclass
class Bench:
    """What all stages share, and the results so far."""

    runner: Runner
    size: Size
    cuda: bool
    tiny: bool
    peer: Path | None
    large_peer: Path | None
    folder: Path
    small: Path | None = None  # models, once they are made
    large: Path | None = None
    runs: list[dict] = field(default_factory=list)
    checks: list[dict] = field(default_factory=list)

    def ours(self, name, *flags, batch_size=2, precision="bf16", steps=None, large=False, limit=90, **how) -> dict:
        """A run of our script, added to the results."""
        return self._train(name, [OURS], custom_diffusion_flags(self.data) + list(flags), batch_size=batch_size,
                           precision=precision, steps=steps, large=large, limit=limit, **how)  # fmt: skip

    def reference(self, name, *flags, batch_size=2, precision="bf16", steps=None, large=False, limit=90) -> None:
        """A run of the script to compare with, if there is one."""
        peer = self.large_peer if large else self.peer
        if peer is not None:
            self._train(name, peer_script(peer), peer_flags(peer, self.data) + list(flags), batch_size=batch_size,
                        precision=precision, steps=steps, large=large, limit=limit)  # fmt: skip

    def _train(self, name, script, flags, *, batch_size, precision, steps=None, large=False, limit, **how):
        model, resolution = (self.large, self.size.large) if large else (self.small, self.size.small)
        if model is None:
            raise FileNotFoundError("its model was not made")
        steps = steps or self.size.steps
        common = common_flags(
            model, self.data, num_class_images=self.size.class_images, resolution=resolution, batch_size=batch_size,
            mixed_precision=precision,
        )  # fmt: skip
        shutil.rmtree(self.folder / "out", ignore_errors=True)
        # Without a checkpoint: of the large model it is 5 GB.
        argv = [*map(str, script), *common, f"--max_train_steps={steps}", "--checkpointing_steps=10000", *flags]
        argv.append(f"--output_dir={self.folder / 'out'}")
        run = {"name": name, "script": Path(script[-1]).name, "flags": flags_told(flags), "batch_size": batch_size,
               "precision": precision, "resolution": resolution, "steps": steps}  # fmt: skip
        run |= self.runner.run(name, argv, limit=limit, **how)
        counted = run["step_seconds"][self.size.warm_up :]
        run["seconds_a_step"] = statistics.median(counted) if counted else None
        self.runs.append(run)
        speed = f"{1 / run['seconds_a_step']:.2f} steps/s" if counted else run["status"]
        print(f"  {name}: {speed}, {run['allocated_bytes'] / GB:.2f} GB, {run['wall_seconds']:.0f} s", flush=True)
        return run

    @cached_property
    def data(self) -> Path:
        """Photos and class images, made once."""
        return make_model.make_data(self.folder / "data", self.size.class_images)


def flags_told(flags) -> list[str]:
    """Those that tell runs apart: no folders, no prompts."""
    return [flag for flag in flags if "/" not in flag and "prompt" not in flag]


# Stages, the most valuable first


def make_small(bench: Bench) -> None:
    """A model of Stable Diffusion 1's size."""
    if bench.tiny:
        bench.small = MODEL
        return
    folder = bench.folder / "sd14-size"
    made(bench.runner.call("make the model", make_model.make_sd14_size_model, folder, device(bench), limit=90))
    bench.small = folder


def check(bench: Bench) -> None:
    """Everything that holds on a CPU."""
    for result in run_checks(bench.runner, bench.folder / "checks", cuda=bench.cuda, quick=bench.tiny):
        bench.checks.append(result)
        told = {True: "ok", False: "FAILED", None: "not tried"}[result["passed"]]
        print(f"  {result['name']}: {told} ({result['seen']})", flush=True)


def pace(bench: Bench) -> None:
    """The reference script and ours in turn, at what most people use; ours with less than all that makes it fast."""
    fastest = [*CACHED, *graphs(bench)]
    for _ in range(1 if bench.tiny else 2):
        bench.reference("reference")
        bench.ours("ours, fastest", *fastest)
    bench.ours("ours, cached", *CACHED)
    bench.ours("ours")
    if bench.cuda:
        bench.ours("ours, graphs", *graphs(bench))
        bench.ours("one, fastest", *fastest, batch_size=1)


def whole(bench: Bench) -> None:
    """A run from launch to exit, importing included."""
    steps = bench.size.run_steps
    flags = ["--cache_latents", *graphs(bench), f"--checkpointing_steps={steps}"]
    bench.ours("run", *flags, steps=steps, fork=bench.tiny)


def graphs(bench: Bench) -> list[str]:
    return ["--cuda_graphs"] if bench.cuda else []


def small_memory(bench: Bench) -> None:
    """One photo and one class image."""
    bench.ours("one", batch_size=1)
    bench.ours("one, checkpointing", "--gradient_checkpointing", batch_size=1)
    bench.reference("reference, one", batch_size=1)


def large_memory(bench: Bench) -> None:
    """Stable Diffusion XL's size, one photo and one class image."""
    folder = bench.folder / ("tiny-large" if bench.tiny else "large-size")
    make = make_model.make_tiny_sdxl_model if bench.tiny else make_model.make_sdxl_size_model
    made(bench.runner.call("make the large model", make, folder, device(bench), limit=120))
    bench.large = folder
    # The first ten steps are not counted.
    flags, run = ["--gradient_checkpointing"], {"batch_size": 1, "large": True, "steps": 2 if bench.tiny else 20}
    if bench.cuda:
        bench.ours("large, checkpointing, graphs", *flags, *graphs(bench), **run)
        bench.ours("large, graphs", *graphs(bench), **run)
    bench.ours("large, checkpointing", *flags, **run)
    bench.reference("large reference, checkpointing", *flags, **run)
    if bench.cuda:
        bench.ours("large", **run)
        if installed("bitsandbytes"):
            bench.ours("large, checkpointing, 8-bit Adam", *flags, "--use_8bit_adam", fork=False, **run)


def profile(bench: Bench) -> None:
    """Some steps, kernel by kernel."""
    after = 1 if bench.tiny else 30
    bench.ours("profile, cached", *CACHED, profile=after)
    if not bench.tiny:
        bench.ours("profile, one, cached", *CACHED, batch_size=1, profile=after)


def variants(bench: Bench) -> None:
    """What might pay: compiled blocks; another precision."""
    if bench.tiny:
        return
    bench.reference("reference, fp16", precision="fp16")
    bench.ours("ours, fastest, fp16", *CACHED, *graphs(bench), precision="fp16")
    bench.ours("ours, cached, compiled", *CACHED, compile_blocks=True, limit=120)


def batches(bench: Bench) -> None:
    """From one photo to as many as there is memory for."""
    for batch_size in bench.size.batch_sizes:
        steps = max(bench.size.steps // 2, 4)
        bench.ours(f"batch {batch_size}, fastest", *CACHED, *graphs(bench), batch_size=batch_size, steps=steps)


STAGES = {
    "model": make_small, "checks": check, "pace": pace, "whole": whole, "large": large_memory,
    "memory": small_memory, "profile": profile, "batches": batches, "variants": variants,
}  # fmt: skip


def made(status: str) -> None:
    if status != "ok":
        raise FileNotFoundError(status)


def device(bench: Bench) -> str:
    return "cuda" if bench.cuda else "cpu"


def installed(package: str) -> bool:
    return version_of(package) is not None


def version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


# What is asked of the results


def bars(runs: list[dict]) -> list[dict]:
    """name, wanted, measured, and passed: None where it was not measured."""
    by_name = {}
    for run in runs:
        if run["status"] == "ok" and run["seconds_a_step"]:
            by_name.setdefault(run["name"], []).append(run)
    medians = {name: statistics.median(run["seconds_a_step"] for run in own) for name, own in by_name.items()}
    whole_run = by_name.get("run", [None])[0]
    ratio = (
        medians["reference"] / medians["ours, fastest"] if {"reference", "ours, fastest"} <= medians.keys() else None
    )
    memory = {name: max(run["allocated_bytes"] for run in own) / GB for name, own in by_name.items()}
    results = [
        bar("steps/s, against the reference's", ratio, at_least=3),
        bar("seconds of a run's steps, the first aside", whole_run and sum(whole_run["step_seconds"]), at_most=8),
        bar("seconds of a run from launch to exit", whole_run and whole_run["wall_seconds"], at_most=20),
    ]
    for name, limit in (("one", 4.5), ("one, checkpointing", 3.5), ("large, checkpointing", 14), ("large, checkpointing, 8-bit Adam", 12)):  # fmt: skip
        results.append(bar(f"GB allocated: {name}", memory.get(name) or None, at_most=limit))
    return results


def bar(name: str, measured: float | None, *, at_least: float | None = None, at_most: float | None = None) -> dict:
    wanted = f"at least {at_least:g}" if at_most is None else f"at most {at_most:g}"
    passed = None
    if measured is not None:
        passed = bool(measured >= at_least if at_most is None else measured <= at_most)
    return {"name": name, "wanted": wanted, "measured": measured, "passed": passed}


def print_bars(results: list[dict]) -> None:
    for result in results:
        told = {True: "pass", False: "FAIL", None: "not measured"}[result["passed"]]
        measured = "" if result["measured"] is None else f"{result['measured']:.2f}, "
        print(f"{told}: {result['name']}: {measured}wanted {result['wanted']}")


def describe(output: str) -> None:
    """The device's name and memory, written to `output`. Runs in a process of its own: this one must not touch the device."""
    import torch

    properties = torch.cuda.get_device_properties(0)
    torch.zeros(1, device="cuda").add(1).item()
    Path(output).write_text(json.dumps({"name": properties.name, "memory_bytes": properties.total_memory}))


def find_device(runner: Runner, cuda: bool) -> dict:
    """Name and memory. Also finds out whether processes can be forked."""
    if not cuda:
        return {"name": f"{os.cpu_count()} x {cpu_name()}", "memory_bytes": 0}
    answer = runner.folder / "device.json"
    status = runner.call("device", describe, str(answer), limit=90)
    if status != "ok":
        print(f"no forked process can use the device ({status}): all are started anew")
        runner.start_anew()
        status = runner.call("device", describe, str(answer), limit=90)
    if status != "ok":
        raise SystemExit(f"gpu.py: there is no CUDA device ({status}); give --device cpu --tiny to try the script")
    return json.loads(answer.read_text())


def main():
    args, started = parse_args(), time.monotonic()
    runner = Runner(args.work_dir / "logs", args.seconds, patience=4 if args.tiny else 1)
    cuda = args.device == "cuda"
    found = find_device(runner, cuda)
    bench = Bench(runner, TINY if args.tiny else Size(), cuda, args.tiny, args.peer, args.large_peer, args.work_dir)
    result = {
        "date": date.today().isoformat(),
        "device": found,
        "python": platform.python_version(),
        "versions": {name: version_of(name) for name in LIBRARIES},
        "tiny": args.tiny,
        "peers": [peer.name for peer in (args.peer, args.large_peer) if peer],
        "stages": [],
    }
    default = f"gpu-{found['name'].replace(' ', '-').lower()}.json"
    output = args.output or make_model.ROOT / "benchmarks/results" / default
    output.parent.mkdir(parents=True, exist_ok=True)
    for name in args.stages:
        result["stages"].append(run_stage(name, bench))
        result |= {"checks": bench.checks, "runs": bench.runs, "bars": bars(bench.runs)}
        result["seconds"] = time.monotonic() - started
        # After each stage, so that what there is survives whatever comes.
        output.write_text(json.dumps(result, indent=1) + "\n")
        output.with_suffix(".html").write_text(page(result), encoding="utf-8")
    print_bars(result["bars"])
    print(f"{sum(check['passed'] is False for check in bench.checks)} of {len(bench.checks)} checks failed")
    print(f"saved {output} and {output.with_suffix('.html').name}, {result['seconds']:.0f} s")


def run_stage(name: str, bench: Bench) -> dict:
    """Name, what became of it, and how long it took."""
    print(f"{name} ({bench.runner.left():.0f} s left)", flush=True)
    started, status = time.monotonic(), "done"
    try:
        STAGES[name](bench)
    except NoTime:
        status = "no time left"
    except Exception as error:  # the other stages still have something to tell
        status = f"failed: {type(error).__name__}: {error}"
    if status != "done":
        print(f"  {status}")
    return {"name": name, "status": status, "seconds": time.monotonic() - started}


if __name__ == "__main__":
    main()
