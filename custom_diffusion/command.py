"""What the commands `python -m custom_diffusion.<tool>` have in common: their flags, how they check, how they fail.

Imports nothing heavy, so that `--help` and a wrong flag answer at once.
"""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

from custom_diffusion.args import InputError, exit_with_problems
from custom_diffusion.versions import version_problems

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
# The files that make a folder a trained one; `weights.py` says what is in them.
WEIGHTS_FILES = (
    "pytorch_custom_diffusion_weights.safetensors",
    "pytorch_custom_diffusion_weights.bin",
    "custom_diffusion_deltas.safetensors",
)


def make_parser(tool: str, description: str) -> argparse.ArgumentParser:
    """The description's first paragraph is what the tool does, the rest examples."""
    return argparse.ArgumentParser(
        prog=f"python -m custom_diffusion.{tool}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Which base model the weights belong to."""
    parser.add_argument("--model", help="base model, folder or Hub id (default: the one the weights were trained on)")
    parser.add_argument("--revision", help="branch, tag or commit of --model on the Hub")
    parser.add_argument("--variant", help="variant of --model's weight files, for example fp16")


def parse(parser: argparse.ArgumentParser, argv: list[str] | None, check: Callable) -> argparse.Namespace:
    """Parse the command line; exit with status 2 and a line for each problem that `check(args)` finds."""
    args = parser.parse_args(argv)
    problems = version_problems() + check(args)
    if problems:
        exit_with_problems(parser.prog, problems)
    # transformers would announce on import that torchvision, which nothing here uses, is missing.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    return args


def run(tool: str, main: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> None:
    """Call `main(args)`. Bad input ends in its lines and status 2, a failed write in one line and status 1."""
    program = f"python -m custom_diffusion.{tool}"
    try:
        main(args)
    except InputError as error:
        exit_with_problems(program, error.problems)
    except OSError as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print(f"{program}: stopped", file=sys.stderr)
        raise SystemExit(130) from None


def weights_problems(flag: str, path: str) -> list[str]:
    """A line if `path` can be neither a trained folder nor a Hub id."""
    folder = Path(path)
    if folder.is_dir():
        if any((folder / name).is_file() for name in WEIGHTS_FILES):
            return []
        return [f"{flag}: '{path}' has no {WEIGHTS_FILES[0]}, .bin or {WEIGHTS_FILES[2]}; give a trained folder"]
    if folder.is_file():
        return [f"{flag}: '{path}' is a file; give the folder that it is in"]
    if _cannot_be_hub_id(path):
        return [f"{flag}: folder '{path}' does not exist; give a trained folder or a Hub id"]
    return []


def model_problems(args: argparse.Namespace) -> list[str]:
    """A line if `--model` can be neither a diffusers folder nor a Hub id."""
    if args.model is None:
        return [
            f"--{name}: needs --model; give both or neither" for name in ("revision", "variant") if getattr(args, name)
        ]
    folder = Path(args.model)
    if folder.is_dir() and not (folder / "model_index.json").is_file():
        return [f"--model: '{args.model}' has no model_index.json; give a model in the diffusers layout"]
    if not folder.is_dir() and _cannot_be_hub_id(args.model):
        return [f"--model: folder '{args.model}' does not exist; give a folder with model_index.json or a Hub id"]
    return []


def _cannot_be_hub_id(path):
    return not path or path.startswith((".", "/", "~")) or path.count("/") > 1 or "\\" in path


def output_folder_problems(path: str) -> list[str]:
    """A line if `--output` cannot become a folder of ours. A folder that holds anything is never replaced."""
    folder = Path(path)
    if folder.is_dir() and any(folder.iterdir()):
        return [f"--output: folder '{path}' is not empty; name a new one"]
    if folder.exists() and not folder.is_dir():
        return [f"--output: '{path}' is a file; name a folder"]
    return writable_problems(path)


def writable_problems(path: str) -> list[str]:
    """A line if nothing can be written at `--output`."""
    parent = next(p for p in [Path(path), *Path(path).absolute().parents] if p.exists())
    if parent != Path(path) and not parent.is_dir():
        return [f"--output: '{parent}' is a file; choose another place"]
    if not os.access(parent, os.W_OK):
        return [f"--output: cannot write to '{parent}'; choose another place or change its permissions"]
    return []


def warn(line: str) -> None:
    """One line on stderr."""
    print(f"warning: {line}", file=sys.stderr)
