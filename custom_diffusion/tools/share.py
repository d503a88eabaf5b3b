"""Upload a trained folder to the Hub.

  custom-diffusion share cat --hub_model_id user/cat

Writes a model card, README.md, into the folder if it has none yet, and uploads the weights, tokens, settings, samples and card.
What is uploaded holds prompts, settings and versions, but no path of this computer and no file name of a photo.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from custom_diffusion.cli.tool_flags import weights_problems
from custom_diffusion.errors import InputError, first_line, warn
from custom_diffusion.files import CARD_NAME, CONFIG_NAME, CURVE_IMAGE, SAMPLES_DIR, WEIGHTS_FILES, whole_file

if TYPE_CHECKING:
    from accelerate import Accelerator
    from huggingface_hub import ModelCard


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("weights", help="trained folder")
    parser.add_argument("--hub_model_id", help="Hub repository (default: the folder's name, in your own namespace)")
    parser.add_argument("--hub_token", help="Hub token, if not logged in")


def flag_problems(args: argparse.Namespace) -> list[str]:
    problems = weights_problems("weights", args.weights)
    if not problems and not Path(args.weights).is_dir():
        problems = [f"weights: folder '{args.weights}' does not exist; give a trained folder"]
    return problems


def main(args: argparse.Namespace) -> None:
    """Upload; ends with status 1 if that fails."""
    if not share(args.weights, hub_model_id=args.hub_model_id, hub_token=args.hub_token):
        raise SystemExit(1)


def share(weights: str | Path, *, hub_model_id: str | None = None, hub_token: str | None = None) -> bool:
    """Upload a folder that was trained, merged or compressed before.

    Args:
        weights: the folder.
        hub_model_id: repository, by default the folder's name in the user's own namespace.
        hub_token: if not logged in.
    Returns:
        Whether it is uploaded; if not, a line says why.
    Raises:
        InputError: the folder is no trained one, or the repository cannot be written to.
    """
    from custom_diffusion.training.model_card import model_card
    from custom_diffusion.weights.format import as_weights

    folder = Path(weights)
    trained = as_weights(folder)
    config = trained.config
    repo_id = make_repository(hub_model_id or folder.resolve().name, hub_token, asked_by="--hub_model_id")
    if (folder / CARD_NAME).is_file():
        rename_in_card(folder / CARD_NAME, repo_id)
    else:
        has_curve = (folder / CURVE_IMAGE).is_file()
        said = config | {"family": trained.family.name}  # which older settings do not say
        card = model_card(repo_id, said, sample_images(folder, config), has_curve=has_curve)
        write_card(folder, card, config)
    return upload(folder, repo_id, config, hub_token)


def create_repository(args: argparse.Namespace, accelerator: Accelerator) -> str:
    """Make the repository of `--push_to_hub`, or find that it is there and can be written to.

    Returns:
        Its id, "user/name", in every process.
    Raises:
        InputError: not logged in, no right to write, a wrong name, or the Hub cannot be reached.
    """
    from accelerate.utils import broadcast_object_list

    made = [None, None]  # id, problem
    if accelerator.is_main_process:
        name = args.hub_model_id or Path(args.output_dir).resolve().name
        try:
            made[0] = make_repository(name, args.hub_token, asked_by="--push_to_hub")
        except InputError as error:
            made[1] = str(error)
    broadcast_object_list(made)
    repo_id, problem = made
    if problem:
        raise InputError(problem)
    return repo_id


def make_repository(name: str, token: str | None, *, asked_by: str) -> str:
    """The full id of the repository `name`, which exists afterwards and can be written to.

    Args:
        asked_by: the flag that a message begins with.
    Raises:
        InputError: one line that says why there is none.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    api = HfApi(token=token)
    try:
        repo_id = api.create_repo(name, exist_ok=True).repo_id
        try:
            _check_write(api, repo_id)  # an existing repository may be somebody else's
        except HfHubHTTPError as error:
            if _status(error) in (401, 403):
                raise
    except HFValidationError as error:
        raise InputError(f"--hub_model_id: {first_line(error)}") from None
    except HfHubHTTPError as error:
        if _status(error) == 401:
            asked_by = "--hub_token" if token else asked_by
            reason = "the Hub does not accept the login; run `hf auth login` with a token that may write"
        elif _status(error) == 403:
            reason = (
                f"no right to write to '{name}'; log in with a token that may write, or name another --hub_model_id"
            )
        else:
            reason = f"the Hub refuses to make '{name}' ({first_line(error)})"
        raise InputError(f"{asked_by}: {reason}") from None
    except Exception as error:  # the client lets through what its HTTP library raises, which changed between versions
        raise InputError(
            f"{asked_by}: cannot reach the Hub at {api.endpoint} ({first_line(error)}); check the network, or upload later "
            "with `python -m custom_diffusion share`"
        ) from None
    return repo_id


def _check_write(api, repo_id):
    """As `HfApi.auth_check(repo_id, write=True)`; older clients cannot ask for `write`."""
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    headers = build_hf_headers(token=api.token)
    hf_raise_for_status(get_session().get(f"{api.endpoint}/api/models/{repo_id}/auth-check/write", headers=headers))


def _status(error):
    return None if error.response is None else error.response.status_code


def upload_run(args: argparse.Namespace, output_dir: Path, repo_id: str, config: dict, images: list[Path]) -> bool:
    """Write the model card into `output_dir` and upload what a user needs. Called by the main process.

    A failure is told in one line, with the command that tries again; nothing on disk depends on it.

    Args:
        config: `settings.weights_config`.
        images: drawn from `args.validation_prompt`, below `output_dir`.
    Returns:
        Whether it is uploaded.
    """
    from custom_diffusion.training.model_card import model_card, training_command

    samples = [(path.relative_to(output_dir).as_posix(), args.validation_prompt) for path in images]
    card = model_card(repo_id, config, samples, training_command(sys.argv), has_curve=True)
    write_card(output_dir, card, config)
    return upload(output_dir, repo_id, config, args.hub_token)


def upload(folder: Path, repo_id: str, config: dict, token: str | None) -> bool:
    """Upload weights, tokens, public settings, samples and card; not checkpoints or logs. Returns as `share`."""
    from huggingface_hub import CommitOperationAdd, HfApi

    names = [
        *WEIGHTS_FILES,
        CARD_NAME,
        CURVE_IMAGE,
        *(f"{token}.{suffix}" for token in config.get("modifier_tokens", []) for suffix in ("safetensors", "bin")),
        *sorted(path.relative_to(folder).as_posix() for path in (folder / SAMPLES_DIR).glob("*.png")),
    ]
    settings = json.dumps(public_config(config), indent=2) + "\n"
    operations = [CommitOperationAdd(name, str(folder / name)) for name in names if (folder / name).is_file()]
    operations.append(CommitOperationAdd(CONFIG_NAME, settings.encode()))
    try:
        commit = HfApi(token=token).create_commit(repo_id, operations, commit_message="Upload Custom Diffusion weights")
    except Exception as error:  # as above, and whatever it is, the run was good and its files are there
        again = ["python", "-m", "custom_diffusion", "share", str(folder), "--hub_model_id", repo_id]
        warn(
            f"the upload to '{repo_id}' failed ({first_line(error)}). Everything is in '{folder}'. "
            f"To upload it later: {shlex.join(again)}"
        )
        return False
    print(f"Uploaded to {commit.repo_url}")
    return True


def public_config(config: dict) -> dict:
    """A trained folder's settings without any path of this computer and any file name of a photo."""
    from custom_diffusion.training.model_card import is_local
    from custom_diffusion.training.settings import PLACES

    def without_photos(concepts):
        return [{name: value for name, value in concept.items() if name != "photos"} for concept in concepts]

    settings = {
        name: None if name in PLACES and is_local(value) else value
        for name, value in config.get("settings", {}).items()
    }
    if "concepts" in settings:
        settings["concepts"] = without_photos(settings["concepts"])
    public = config | {
        name: None if is_local(config[name]) else config[name]
        for name in ("base_model", "config_from")
        if name in config
    }
    if "concepts" in config:
        public["concepts"] = without_photos(config["concepts"])
    return public | ({"settings": settings} if settings else {})


def sample_images(folder: Path, config: dict) -> list[tuple[str, str]]:
    """(path inside the folder, prompt) of the images that a run drew last; none if it is not known from which prompt."""
    prompt = config.get("validation_prompt")
    drawn = sorted((folder / SAMPLES_DIR).glob("*-*.png")) if prompt else []
    last = [path for path in drawn if path.name.startswith("final-")]
    if not last and drawn:
        last = [path for path in drawn if path.stem.rpartition("-")[0] == drawn[-1].stem.rpartition("-")[0]]
    return [(path.relative_to(folder).as_posix(), prompt) for path in last]


def rename_in_card(path: Path, repo_id: str) -> None:
    """Let a card that was written for another repository speak of this one. Whatever else its author wrote stays."""
    text = path.read_text(encoding="utf-8")
    found = re.search(r"load_custom_diffusion\(pipe, '([^']+)'\)", text)
    if found is None or found.group(1) == repo_id:
        return
    earlier = found.group(1)
    text = text.replace(f"'{earlier}'", f"'{repo_id}'")
    text = text.replace(
        f"# Custom Diffusion: {earlier.split('/')[-1]}\n", f"# Custom Diffusion: {repo_id.split('/')[-1]}\n"
    )
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_card(folder: Path, card: ModelCard, config: dict) -> None:
    """Write README.md. The card names no local folder as base model."""
    from custom_diffusion.training.model_card import is_local

    if config.get("base_model") and is_local(config["base_model"]):
        warn("the Hub takes no local folder as base_model: it is left out of the card's metadata")
    with whole_file(folder / CARD_NAME) as path:
        card.save(path)
