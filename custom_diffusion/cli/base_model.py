"""What can be seen at once of a base model that a flag names, for training and for the tools. Imports nothing heavy.

A file of its own, because flags of both ask for the same.
"""

import argparse
import json
from pathlib import Path

from custom_diffusion.files import LORA_FILE, MODEL_INDEX, WEIGHTS_FILES
from custom_diffusion.single_file import model_in


def single_file_problems(flag: str, model: str, args: argparse.Namespace) -> list[str]:
    """What is wrong with a model that is one file, and with the flags beside it."""
    problems = [
        f"--{name}: has no meaning with a single file; leave it out"
        for name in ("revision", "variant")
        if getattr(args, name, None) is not None
    ]
    try:
        model_in(model)
    except ValueError as error:
        problems.append(f"{flag}: '{model}' {error}")
    return problems + config_problems(args.config_from)


def needless_config_problems(flag: str, model: str, args: argparse.Namespace) -> list[str]:
    """A line if `--config_from` stands beside a model that brings its configuration."""
    if args.config_from is None:
        return []
    return [f"--config_from: is for a {flag} that is a single file, which '{model}' is not; leave it out"]


def config_problems(config_from: str | None) -> list[str]:
    """A line if `--config_from` can be neither a diffusers folder nor a Hub id."""
    if config_from is None:
        return []
    folder = Path(config_from)
    if folder.is_dir() and not (folder / MODEL_INDEX).is_file():
        return [
            f"--config_from: '{config_from}' has no {MODEL_INDEX}; give a folder in the diffusers layout or a Hub id"
        ]
    if not folder.is_dir() and cannot_be_hub_id(config_from):
        return [f"--config_from: folder '{config_from}' does not exist; give one with {MODEL_INDEX} or a Hub id"]
    return []


def what_folder_is(folder: Path) -> str | None:
    """What a folder without `MODEL_INDEX` is, with its article, as far as its files' names and configuration tell."""
    if any((folder / name).is_file() for name in WEIGHTS_FILES):
        return "a trained folder of Custom Diffusion, not the model it was trained on"
    if (folder / LORA_FILE).is_file() or (folder / "adapter_config.json").is_file():
        return "a LoRA"
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        name = config.get("_class_name") or config["architectures"][0]
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError):
        return None
    return f"a single part of a model, {name}"


def cannot_be_hub_id(path: str) -> bool:
    """Whether this can only be a place on this computer."""
    return not path or path.startswith((".", "/", "~")) or path.count("/") > 1 or "\\" in path
