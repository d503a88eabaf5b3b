"""Train with this project and with a peer's script in turn, on the same model and pictures, and print the ratios.

    python benchmarks/bench.py --peer path/to/train_custom_diffusion.py --resolution 256
    python benchmarks/bench.py --peer path/to/train_custom_diffusion.py --resolution 512 --batch_size 2 --mixed_precision bf16
    python benchmarks/bench.py --peer path/to/train_dreambooth_lora_sdxl.py --size sdxl --mixed_precision bf16 --steps 4

The peer is the reference script of diffusers, its `train_dreambooth_lora.py`, or `train_dreambooth_lora_sdxl.py`. Step times are the intervals between the
losses that each script writes to TensorBoard, warm-up left out; "first step" is the time from launch to the first loss, "wall" that
to the exit; CPU time is that of the whole run, over all cores; memory is the operating system's (and nvidia-smi's) peak.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import threading
import time
from datetime import date
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
from make_model import ROOT, make_data, make_sd14_size_model, make_sdxl_size_model
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

WARM_UP = 2  # steps not counted
SIZES = {"sd14": make_sd14_size_model, "sdxl": make_sdxl_size_model}
OURS = ROOT / "train_custom_diffusion.py"
WITHOUT_TORCHVISION = ROOT / "benchmarks/without_torchvision.py"


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, required=True, help="the other script")
    parser.add_argument(
        "--size", choices=SIZES, default="sd14", help="of a model with random weights (default: %(default)s)"
    )
    parser.add_argument("--model", type=Path, help="model folder, instead of one with random weights")
    parser.add_argument("--work_dir", type=Path, default=ROOT / "benchmarks/work")
    parser.add_argument(
        "--output", type=Path, help="where the JSON goes (default: benchmarks/results/<device>-....json)"
    )
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--batch_size", type=int, default=1, help="photos, and as many class images")
    parser.add_argument("--mixed_precision", default="no", choices=["no", "fp16", "bf16"])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--num_class_images", type=int, default=4)
    parser.add_argument("--augmentations_per_image", type=int, default=1, help="for the run with --cache_latents")
    args = parser.parse_args()
    if not args.peer.is_file():
        parser.error(f"--peer: '{args.peer}' does not exist")
    return args


def main():
    args = parse_args()
    model = args.model or SIZES[args.size](args.work_dir / f"{args.size}-size")
    data = make_data(args.work_dir / "data", args.num_class_images)
    # With the cache, steps cost less once every picture has been seen; half of the steps are left for that.
    cached = ["--cache_latents", f"--augmentations_per_image={args.augmentations_per_image}"]
    sides = {
        "peer": (peer_script(args.peer), peer_flags(args.peer, data), args.steps, WARM_UP),
        "ours": ([OURS], custom_diffusion_flags(data), args.steps, WARM_UP),
        "ours --cache_latents": ([OURS], custom_diffusion_flags(data) + cached, 2 * args.steps, args.steps),
    }
    if torch.cuda.is_available():
        sides["ours --cuda_graphs"] = ([OURS], [*custom_diffusion_flags(data), "--cuda_graphs"], args.steps, WARM_UP)
    common = common_flags(
        model,
        data,
        num_class_images=args.num_class_images,
        resolution=args.resolution,
        batch_size=args.batch_size,
        mixed_precision=args.mixed_precision,
    )
    runs = {name: [] for name in sides}
    for round_number in range(args.rounds):
        for name, (script, own_flags, steps, warm_up) in sides.items():
            measured = run(script, [*common, *step_flags(steps), *own_flags], args.work_dir / "out", steps, warm_up)
            runs[name].append(measured)
            print(f"round {round_number + 1}, {name}: {measured['step_seconds']:.2f} s a step", flush=True)
    report(args, runs)


def common_flags(model, data, *, num_class_images, resolution, batch_size, mixed_precision):
    return [
        f"--pretrained_model_name_or_path={model}",
        "--with_prior_preservation",
        f"--num_class_images={num_class_images}",
        f"--resolution={resolution}",
        f"--train_batch_size={batch_size}",
        f"--mixed_precision={mixed_precision}",
        "--learning_rate=1e-5",
        "--lr_warmup_steps=0",
        "--seed=0",
        "--class_prompt=circle",
        f"--instance_data_dir={data / 'photos'}",
    ]


def step_flags(steps):
    return [f"--max_train_steps={steps}", f"--checkpointing_steps={steps}"]


def custom_diffusion_flags(data, flip=True):
    return [
        "--real_prior",
        f"--class_data_dir={data / 'class'}",
        "--instance_prompt=photo of a <new1> circle",
        "--modifier_token=<new1>",
        *(["--hflip"] if flip else []),
    ]


def peer_script(peer):
    """The command's words that run it."""
    return [peer] if find_spec("torchvision") else [WITHOUT_TORCHVISION, peer]


def peer_flags(peer, data):
    if "dreambooth_lora" in peer.name:
        return [f"--class_data_dir={data / 'class/images'}", "--instance_prompt=photo of a ktn circle", "--rank=16"]
    return custom_diffusion_flags(data)


def run(script, flags, output_dir, steps, warm_up):
    """One training process from launch to exit. Times in seconds, sizes in bytes."""
    shutil.rmtree(output_dir, ignore_errors=True)
    log = output_dir.with_suffix(".log")
    start = time.time()
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, *script, *flags, f"--output_dir={output_dir}"], stdout=file, stderr=file
        )
        gpu = GpuMemory()
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.time() - start
    if status != 0:
        sys.exit(f"{script[-1]} failed; the end of its log '{log}':\n" + log.read_text()[-2000:])
    times = step_times(output_dir)
    assert len(times) == steps, f"{len(times)} losses of {steps} steps in {output_dir}"
    intervals = [later - earlier for earlier, later in zip(times[warm_up - 1 :], times[warm_up:])]
    checkpoint = folder_size(output_dir / f"checkpoint-{steps}")
    logs = folder_size(output_dir / "logs")
    return {
        "step_seconds": statistics.median(intervals),
        "first_step_seconds": times[0] - start,
        "wall_seconds": wall,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_rss_bytes": usage.ru_maxrss * 1024,
        "peak_gpu_bytes": gpu.stop(),
        "checkpoint_bytes": checkpoint,
        "output_bytes": folder_size(output_dir) - checkpoint - logs,
    }


def step_times(output_dir):
    """When each step's loss was written, in seconds."""
    for events in sorted(output_dir.rglob("events.out.tfevents.*")):
        accumulator = EventAccumulator(str(events), size_guidance={"scalars": 0}).Reload()
        if "loss" in accumulator.Tags()["scalars"]:
            return [event.wall_time for event in accumulator.Scalars("loss")]
    return []


def folder_size(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


class GpuMemory(threading.Thread):
    """Watches the GPU's memory in use, as nvidia-smi tells it, until `stop`."""

    def __init__(self):
        super().__init__(daemon=True)
        self.peak, self.stopped = 0, threading.Event()
        if shutil.which("nvidia-smi"):
            self.start()

    def run(self):
        query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        while not self.stopped.wait(0.2):
            answer = subprocess.run(query, capture_output=True, text=True)
            self.peak = max(self.peak, *(int(line) * 2**20 for line in answer.stdout.split()), 0)

    def stop(self):
        self.stopped.set()
        return self.peak


def report(args, runs):
    """Print the table and save everything as JSON."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} x {cpu_name()}"
    medians = {
        name: {key: statistics.median(r[key] for r in measured) for key in measured[0]}
        for name, measured in runs.items()
    }
    ratios = {
        name: {
            key: statistics.median(own[key] / peer[key] for own, peer in zip(runs[name], runs["peer"]))
            for key, value in medians["peer"].items()
            if value
        }
        for name in runs
    }
    result = {
        "date": date.today().isoformat(),
        "device": device,
        "settings": {
            key: str(value) for key, value in vars(args).items() if key not in ("work_dir", "output", "peer", "model")
        }
        | {"peer": args.peer.name},
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers", "accelerate")}
        | {"python": platform.python_version()},
        "runs": runs,
        "medians": medians,
        "ratios_to_peer": ratios,
    }
    kind = "gpu" if torch.cuda.is_available() else "cpu"
    default = f"{kind}-{args.peer.stem}-{args.resolution}px-{args.mixed_precision}.json"
    output = args.output or ROOT / "benchmarks/results" / default
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=2) + "\n")
    units = dict.fromkeys(("step_seconds", "first_step_seconds", "wall_seconds", "cpu_seconds"), (1, "s"))
    print(
        f"\n{device}, {args.resolution} px, batch {args.batch_size} + {args.batch_size}, precision {args.mixed_precision}"
    )
    print("| | " + " | ".join(runs) + " | " + " | ".join(f"{name} / peer" for name in list(runs)[1:]) + " |")
    print("|---" * (2 * len(runs)) + "|")
    for key, value in medians["peer"].items():
        if not value:
            continue
        scale, unit = units.get(key, (1e9, "GB"))
        cells = [f"{medians[name][key] / scale:.2f} {unit}" for name in runs]
        cells += [f"{ratios[name][key]:.2f}" for name in list(runs)[1:]]
        print(f"| {key.rsplit('_', 1)[0].replace('_', ' ')} | " + " | ".join(cells) + " |")
    print(f"\nsaved {output}")


def cpu_name():
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
