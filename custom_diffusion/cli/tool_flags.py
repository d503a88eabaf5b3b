"""What the tools have in common: how their flags are parsed and checked, and how they fail. Imports nothing heavy."""

import argparse
import math
import os
import re
import sys
from pathlib import Path
from types import ModuleType

from custom_diffusion.cli.base_model import (
    cannot_be_hub_id,
    config_problems,
    needless_config_problems,
    single_file_problems,
    what_folder_is,
)
from custom_diffusion.cli.report import exit_with_problems
from custom_diffusion.cli.versions import version_problems
from custom_diffusion.errors import InputError
from custom_diffusion.families import SUPPORTED
from custom_diffusion.files import MODEL_INDEX, WEIGHTS_FILES
from custom_diffusion.single_file import is_single_file

LARGEST_SEED = 2**63 - 1  # torch's generators take twice that, which leaves room for the seeds of further images


def add_tool(tools, name: str, tool: ModuleType) -> None:
    """Add the subcommand of a module of `custom_diffusion.tools` to what `add_subparsers` returned.

    Its docstring is the help: the first line says what the tool does, the rest gives examples.
    """
    summary = tool.__doc__.strip().splitlines()[0]
    parser = tools.add_parser(
        name, help=summary, description=tool.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    tool.add_flags(parser)


def run_tool(program: str, tool: ModuleType, args: argparse.Namespace) -> None:
    """Check the flags, then call `tool.main(args)`.

    Raises:
        SystemExit: 2 after a line for each thing wrong with the input, 1 after one for a failed write, 130 for Ctrl-C.
    """
    problems = version_problems() + tool.flag_problems(args)
    if problems:
        exit_with_problems(program, problems)
    # transformers would announce on import that torchvision, which nothing here uses, is missing.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        tool.main(args)
    except InputError as error:
        exit_with_problems(program, error.problems)
    except BrokenPipeError:  # whoever read the output, `head` for example, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except OSError as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print(f"{program}: stopped", file=sys.stderr)
        raise SystemExit(130) from None


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Which base model the weights belong to."""
    parser.add_argument(
        "--model", help="base model: folder, Hub id or .safetensors file (default: the one the weights were trained on)"
    )
    parser.add_argument("--revision", help="branch, tag or commit of --model on the Hub")
    parser.add_argument("--variant", help="variant of --model's weight files, for example fp16")
    parser.add_argument(
        "--config_from",
        help="folder or Hub id whose configuration and tokenizers belong to a single file (default: its family's own)",
    )


def weights_problems(flag: str, path: str) -> list[str]:
    """A line if `path` can be neither a trained folder nor a Hub id."""
    folder = Path(path)
    if folder.is_dir():
        if any((folder / name).is_file() for name in WEIGHTS_FILES):
            return []
        return [f"{flag}: '{path}' has no {WEIGHTS_FILES[0]}, .bin or {WEIGHTS_FILES[2]}; give a trained folder"]
    if folder.is_file():
        return [f"{flag}: '{path}' is a file; give the folder that it is in"]
    if cannot_be_hub_id(path):
        return [f"{flag}: folder '{path}' does not exist; give a trained folder or a Hub id"]
    return []


def model_problems(args: argparse.Namespace) -> list[str]:
    """A line if `--model` can be neither a diffusers folder, nor a Hub id, nor a model in one file."""
    if args.model is None:
        # The weights may name a single file, whose configuration is now elsewhere.
        return config_problems(args.config_from) + [
            f"--{name}: needs --model; give both or neither" for name in ("revision", "variant") if getattr(args, name)
        ]
    if is_single_file(args.model):
        return single_file_problems("--model", args.model, args)
    problems, folder = needless_config_problems("--model", args.model, args), Path(args.model)
    if folder.is_dir() and not (folder / MODEL_INDEX).is_file():
        what = what_folder_is(folder)
        reason = (
            f"has no {MODEL_INDEX}; give a model in the diffusers layout" if what is None else f"is {what}; {SUPPORTED}"
        )
        problems.append(f"--model: '{args.model}' {reason}")
    elif not folder.is_dir() and cannot_be_hub_id(args.model):
        problems.append(f"--model: folder '{args.model}' does not exist; give a folder with {MODEL_INDEX} or a Hub id")
    return problems


def output_folder_problems(path: str) -> list[str]:
    """A line if `--output` cannot become a folder of ours. A folder that holds anything is never replaced."""
    folder = Path(path)
    if folder.is_dir() and any(folder.iterdir()):
        return [f"--output: folder '{path}' is not empty; name a new one"]
    if folder.exists() and not folder.is_dir():
        return [f"--output: '{path}' is a file; name a folder"]
    return writable_problems(path)


def check_output_folder(path: str | Path) -> None:
    """`output_folder_problems` for those who call a tool as a function; raises InputError."""
    if problems := output_folder_problems(str(path)):
        raise InputError(*problems)


def drawing_problems(args: argparse.Namespace, most_images: int | None = None) -> list[str]:
    """What is wrong with the numbers by which images are drawn. `most_images`: of a prompt, None for any number."""
    problems = []
    for name, least, most in (
        ("num_images", 1, most_images),
        ("num_inference_steps", 1, None),
        ("seed", 0, LARGEST_SEED),
    ):
        value = getattr(args, name)
        if value < least or (most is not None and value > most):
            problems.append(f"--{name}: {value} must be {least} {'or more' if most is None else f'to {most}'}")
    if not math.isfinite(args.guidance_scale):
        problems.append(f"--guidance_scale: {args.guidance_scale} must be a finite number")
    return problems


def writable_problems(path: str) -> list[str]:
    """A line if nothing can be written at `--output`."""
    parent = next(p for p in [Path(path), *Path(path).absolute().parents] if p.exists())
    if parent != Path(path) and not parent.is_dir():
        return [f"--output: '{parent}' is a file; choose another place"]
    if not os.access(parent, os.W_OK):
        return [f"--output: cannot write to '{parent}'; choose another place or change its permissions"]
    return []


def check_prompts(flag: str, prompts: list[str], tokens: list[str]) -> None:
    """Raises InputError for a word like <new9> that the weights do not know: it would be drawn as noise."""
    for prompt in prompts:
        for word in re.findall(r"<[^<>\s]+>", prompt):
            if word not in tokens:
                known = ", ".join(tokens) or "no token"
                raise InputError(f"{flag}: {prompt!r} has {word}, but the weights bring {known}")
