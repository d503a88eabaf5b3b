"""What is to be learned: a concept's photos and prompt, and its class's images and prompt."""

import argparse
import json
import os
import re
import shlex
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from custom_diffusion.class_folder import read_class_folder
from custom_diffusion.errors import first_line
from custom_diffusion.images import find_images, open_image

CONCEPT_KEYS = ("instance_prompt", "instance_data_dir", "class_prompt", "class_data_dir")


@dataclass(frozen=True)
class Concept:
    """One concept. After `parse_args`, only `class_prompt` and `class_data_dir` may be None, without prior preservation.

    `source` says where it was given ("flags", or file and line), for messages.
    """

    instance_prompt: str
    instance_data_dir: Path | None
    class_prompt: str | None
    class_data_dir: Path | None
    source: str = "flags"

    def name(self, key: str) -> str:
        """How to call one of this concept's settings in a message."""
        return f"--{key}" if self.source == "flags" else f"--concepts_list: {self.source}: {key!r}"

    def photos(self) -> list[Path]:
        """The concept's images, by name."""
        return find_images(self.instance_data_dir)


def concepts_from_args(args: argparse.Namespace) -> tuple[list[Concept], list[str]]:
    """The concepts of `--concepts_list`, or the one of the flags, and what is wrong with their description."""
    required = CONCEPT_KEYS if args.with_prior_preservation else CONCEPT_KEYS[:2]
    if args.concepts_list is None:
        entries = [("flags", {key: getattr(args, key) for key in CONCEPT_KEYS})]
    else:
        try:
            entries = read_concepts_list(Path(args.concepts_list))
        except ValueError as error:
            return [], [f"--concepts_list: {error}"]
    concepts, problems = [], []
    for source, entry in entries:
        bad = [k for k in CONCEPT_KEYS if entry.get(k) is not None and not isinstance(entry[k], str)]
        missing = [k for k in required if k not in bad and not (entry.get(k) or "").strip()]
        if source == "flags":
            problems += [f"--{k}: is missing; give it, or describe the concepts in --concepts_list" for k in missing]
        else:
            problems += [f"--concepts_list: {source}: key {k!r} is missing or empty; add it" for k in missing]
            problems += [f"--concepts_list: {source}: key {k!r} must be a string" for k in bad]
        # A concept that lacks something is kept, so that what it does have is checked too.
        text = {key: entry.get(key) or "" for key in CONCEPT_KEYS if key not in bad}
        concepts.append(
            Concept(
                instance_prompt=text.get("instance_prompt", ""),
                instance_data_dir=_folder(text.get("instance_data_dir")),
                class_prompt=text.get("class_prompt") or None,
                class_data_dir=_folder(text.get("class_data_dir")),
                source=source,
            )
        )
    return concepts, problems + _prompt_problems(args, concepts) + _sharing_problems(args, concepts)


_WANTED_LIST = f"must be a list of concepts like [{{{', '.join(CONCEPT_KEYS)}}}]"


def _folder(name):
    return Path(name) if name else None


def read_concepts_list(path: Path) -> list[tuple[str, dict]]:
    """The entries of a concept list, each with "'file', concept N at line L" of where it starts; their values unchecked.

    Raises:
        ValueError: a file that cannot be read, or is no JSON list of objects; one line.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        entries = json.loads(text)
    except OSError as error:
        raise ValueError(f"'{path}' cannot be read ({error.strerror}); name a JSON file") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ValueError(f"'{path}', line {line}: is not UTF-8 text; save it as UTF-8") from None
    except RecursionError:
        raise ValueError(f"'{path}': nested too deep; {_WANTED_LIST}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"'{path}', line {error.lineno}, column {error.colno}: not valid JSON ({error.msg})") from None
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"'{path}', line 1: {_WANTED_LIST}")
    decoder, position, located = json.JSONDecoder(), text.index("[") + 1, []
    for number, entry in enumerate(entries, start=1):
        position = re.compile(r"[\s,]*").match(text, position).end()
        line = text.count("\n", 0, position) + 1
        _, position = decoder.raw_decode(text, position)
        if not isinstance(entry, dict):
            raise ValueError(
                f"'{path}', line {line}: concept {number} must be an object with {', '.join(CONCEPT_KEYS)}"
            )
        located.append((f"'{path}', concept {number} at line {line}", entry))
    return located


def _prompt_problems(args, concepts):
    """Every modifier token must stand in some prompt, and every prompt must hold one."""
    problems = []
    tokens = args.modifier_token.split("+") if args.modifier_token else []
    prompts = [(concept.name("instance_prompt"), concept.instance_prompt) for concept in concepts]
    for name, prompt in prompts:
        if tokens and prompt.strip() and not any(token in prompt for token in tokens):
            problems.append(
                f"{name}: {prompt!r} has none of the modifier tokens "
                f"{', '.join(tokens)}; write for example 'photo of a {tokens[0]} cat'"
            )
    for token in tokens:
        if concepts and not any(token in prompt for _, prompt in prompts):
            problems.append(
                f"--modifier_token: no instance prompt has {token!r}; add it to one, or leave the token out"
            )
    for name, prompt in [*prompts, ("--validation_prompt", args.validation_prompt or "")]:
        for word in re.findall(r"<[\w-]+>", prompt):
            if not any(word in token for token in tokens):
                problems.append(f"{name}: {word!r} is not one of the modifier tokens; add it to --modifier_token")
    return problems


def _sharing_problems(args, concepts):
    """Generated class images must not land among photos, nor among those of another class."""
    if not args.with_prior_preservation or args.real_prior:
        return []
    problems, prompt_of = [], {}
    photo_folders = {c.instance_data_dir.resolve() for c in concepts if c.instance_data_dir}
    for concept in concepts:
        if concept.class_data_dir is None:
            continue
        name, folder = concept.name("class_data_dir"), concept.class_data_dir.resolve()
        if folder in photo_folders:
            problems.append(f"{name}: '{concept.class_data_dir}' holds photos; name another folder for class images")
        if prompt_of.setdefault(folder, concept.class_prompt) != concept.class_prompt:
            problems.append(
                f"{name}: '{concept.class_data_dir}' is also for class {prompt_of[folder]!r}; give each class a folder"
            )
    return problems


def concept_problems(concept: Concept, args: argparse.Namespace) -> list[str]:
    """What is wrong with a concept's folders and images, one line each. Decodes every image."""
    checks = []
    if concept.instance_data_dir:
        checks.append(("instance_data_dir", _photo_problems))
    if args.with_prior_preservation and concept.class_data_dir:
        checks.append(("class_data_dir", _real_prior_problems if args.real_prior else _generated_prior_problems))
    problems = []
    for key, check in checks:
        name, folder = concept.name(key), getattr(concept, key)
        try:
            if folder.exists() and not folder.is_dir():
                problems.append(f"{name}: '{folder}' is a file; name a folder")
            else:
                problems += check(concept, name, folder, args)
            if args.output_dir.strip() and Path(args.output_dir).resolve() == folder.resolve():
                # Its curve.png would be one of the images that the next run is trained on.
                problems.append(f"--output_dir: '{args.output_dir}' is the folder of {name}; name another")
        except OSError as error:  # above all, no permission
            problems.append(f"{name}: cannot read '{error.filename or folder}' ({error.strerror}); name another folder")
    return problems


def _photo_problems(concept, name, folder, _):
    if not folder.exists():
        return [f"{name}: folder '{folder}' does not exist; put the photos of the concept there"]
    photos = concept.photos()
    if not photos:
        return [f"{name}: no image in folder '{folder}'; put 4-20 photos of the concept there"]
    return decode_problems(name, photos)


def _real_prior_problems(concept, name, folder, args):
    try:
        rows = read_class_folder(folder)
    except ValueError as error:
        return [f"{name}: {error} ({retrieve_command(concept, args)})"]
    if len(rows) < args.num_class_images:
        command = retrieve_command(concept, args)
        return [f"{name}: '{folder}' has {len(rows)} of {args.num_class_images} class images; run: {command}"]
    return decode_problems(name, [path for path, _ in rows[: args.num_class_images]])


def _generated_prior_problems(_, name, folder, args):
    existing = find_images(folder) if folder.exists() else []
    problems = folder_problems(name, folder) if len(existing) < args.num_class_images else []
    return problems + decode_problems(name, existing)


def folder_problems(name: str, folder: Path) -> list[str]:
    """Why nothing can be written to `folder`, which need not exist yet."""
    there = next(p for p in [folder, *folder.absolute().parents] if p.exists())
    if not there.is_dir():
        return [f"{name}: '{there}' is a file; name a folder"]
    if not os.access(there, os.R_OK | os.W_OK | os.X_OK):
        return [f"{name}: cannot write to '{there}'; choose another folder or change its permissions"]
    return []


def retrieve_command(concept: Concept, args: argparse.Namespace) -> str:
    """The command that fetches this concept's class images."""
    return shlex.join(
        ["python", "retrieve.py", "--class_prompt", concept.class_prompt or "", "--class_data_dir",
         str(concept.class_data_dir), "--num_class_images", str(args.num_class_images)]
    )  # fmt: skip


def decode_problems(name: str, images: Iterable[Path]) -> list[str]:
    """A line, which begins with `name`, for each image that does not decode to its last pixel."""

    def problem(path):
        try:
            open_image(path)
        except Exception as error:  # Pillow raises many types on foreign bytes, and all mean the same here
            return f"{name}: cannot read image '{path}' ({first_line(error)}); replace it, or save it as JPEG or PNG"
        return None

    with ThreadPoolExecutor() as pool:
        return [line for line in pool.map(problem, images) if line]
