"""Sharing on the Hub: the repository, the model card, the upload. Also a command, to upload any trained folder."""

# ruff: noqa: E402 (flags are parsed before the imports that take seconds)

import argparse
import glob
import shlex
import sys
from pathlib import Path

from custom_diffusion.args import InputError
from custom_diffusion.command import WEIGHTS_FILES, make_parser, parse, run, warn, weights_problems

EXAMPLE = """

  python -m custom_diffusion.hub logs/cat --hub_model_id user/cat

Writes a model card, README.md, into the folder if it has none yet, and uploads the weights, tokens, settings, samples and card.
"""
CONFIG_FILE = "custom_diffusion_config.json"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser("hub", "Upload a trained folder to the Hub." + EXAMPLE)
    parser.add_argument("weights", help="trained folder")
    parser.add_argument("--hub_model_id", help="Hub repository (default: the folder's name, in your own namespace)")
    parser.add_argument("--hub_token", help="Hub token, if not logged in")
    return parse(parser, argv, _problems)


def _problems(args):
    problems = weights_problems("weights", args.weights)
    if not problems and not Path(args.weights).is_dir():
        problems = [f"weights: folder '{args.weights}' does not exist; give a trained folder"]
    return problems


if __name__ == "__main__":
    args = parse_args()

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

from custom_diffusion.model_card import model_card, training_command


def create_repository(args: argparse.Namespace, accelerator: Accelerator) -> str:
    """Make the repository of `--push_to_hub`, or find that it is there and can be written to.

    Returns:
        Its id, "user/name", in every process.
    Raises:
        InputError: not logged in, no right to write, a wrong name, or the Hub cannot be reached.
    """
    made = [None, None]  # id, problem
    if accelerator.is_main_process:
        try:
            made[0] = make_repository(args.hub_model_id or Path(args.output_dir).resolve().name, args.hub_token)
        except InputError as error:
            made[1] = str(error)
    broadcast_object_list(made)
    repo_id, problem = made
    if problem:
        raise InputError(problem)
    return repo_id


def make_repository(name: str, token: str | None) -> str:
    """The full id of the repository `name`, which exists afterwards and can be written to; else InputError."""
    api = HfApi(token=token)
    try:
        repo_id = api.create_repo(name, exist_ok=True).repo_id
        try:
            _check_write(api, repo_id)  # an existing repository may be somebody else's
        except HfHubHTTPError as error:
            if _status(error) in (401, 403):
                raise
    except HFValidationError as error:
        raise InputError(f"--hub_model_id: {_first_line(error)}") from None
    except HfHubHTTPError as error:
        if _status(error) == 401:
            reason = (
                "the Hub does not accept the login; run `hf auth login` (before huggingface_hub 0.34 `huggingface-cli "
                "login`) with a token that may write"
            )
        elif _status(error) == 403:
            reason = (
                f"no right to write to '{name}'; log in with a token that may write, or name another --hub_model_id"
            )
        else:
            reason = f"the Hub refuses to make '{name}' ({_first_line(error)})"
        raise InputError(f"--push_to_hub: {reason}") from None
    except Exception as error:  # the client lets through what its HTTP library raises, which changed between versions
        raise InputError(
            f"--push_to_hub: cannot reach the Hub at {api.endpoint} ({_first_line(error)}); "
            "check the network, or leave the flag out and upload later with `python -m custom_diffusion.hub`"
        ) from None
    return repo_id


def _check_write(api, repo_id):
    """As `HfApi.auth_check(repo_id, write=True)`; older clients cannot ask for `write`."""
    headers = build_hf_headers(token=api.token)
    hf_raise_for_status(get_session().get(f"{api.endpoint}/api/models/{repo_id}/auth-check/write", headers=headers))


def _status(error):
    return None if error.response is None else error.response.status_code


def _first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def share(args: argparse.Namespace, output_dir: Path, repo_id: str, config: dict, pictures: list[Path]) -> bool:
    """Write the model card into `output_dir` and upload what a user needs. Called by the main process.

    A failure is told in one line, with the command that tries again; nothing on disk depends on it.

    Args:
        config: `settings.weights_config`.
        pictures: drawn from `args.validation_prompt`, below `output_dir`.
    Returns:
        Whether it is uploaded.
    """
    samples = [(path.relative_to(output_dir).as_posix(), args.validation_prompt) for path in pictures]
    card = model_card(repo_id, config, samples, training_command(sys.argv))
    write_card(output_dir, card)
    return upload(output_dir, repo_id, config, args.hub_token)


def upload(folder: Path, repo_id: str, config: dict, token: str | None) -> bool:
    """Upload weights, tokens, settings, samples and card; not checkpoints or logs. Returns as `share`."""
    try:
        url = HfApi(token=token).upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            allow_patterns=[
                *WEIGHTS_FILES,
                CONFIG_FILE,
                "README.md",
                "samples/*.png",
                *(f"{glob.escape(token)}.{s}" for token in config.get("modifier_tokens", []) for s in ("safetensors", "bin")),
            ],
            commit_message="Upload Custom Diffusion weights",
        )  # fmt: skip
    except Exception as error:  # as above, and whatever it is, the run was good and its files are there
        again = ["python", "-m", "custom_diffusion.hub", str(folder), "--hub_model_id", repo_id]
        warn(
            f"the upload to '{repo_id}' failed ({_first_line(error)}). Everything is in '{folder}'. "
            f"To upload it later: {shlex.join(again)}"
        )
        return False
    print(f"Uploaded to {url}")
    return True


def write_card(folder: Path, card: ModelCard) -> None:
    """Write README.md. A local folder as base model is left out of its metadata if the Hub does not take it."""
    from custom_diffusion.files import whole_file

    # Other faults than this one are for the upload to tell.
    if card_problem(card) and Path(card.data.base_model or "").is_dir():
        warn("the Hub takes no local folder as base_model: it is left out of the card's metadata")
        card.data.base_model = None
    with whole_file(folder / "README.md") as path:
        card.save(path)


def card_problem(card: ModelCard) -> str | None:
    """What the Hub has against the card; None if nothing, or if it cannot be asked now.

    As `ModelCard.validate`, which in older clients asks huggingface.co even where HF_ENDPOINT names another Hub.
    """
    try:
        response = get_session().post(
            f"{HfApi().endpoint}/api/validate-yaml",
            json={"repoType": "model", "content": str(card)},
            headers={"Accept": "text/plain"},
        )
    except Exception:  # the client lets through what its HTTP library raises
        return None
    return response.text if response.status_code == 400 else None


def main(args: argparse.Namespace) -> None:
    """Upload a folder that was trained, merged or compressed before."""
    from custom_diffusion.base_model import read_concept

    folder = Path(args.weights)
    config = read_concept("weights", args.weights).config
    repo_id = make_repository(args.hub_model_id or folder.resolve().name, args.hub_token)
    if not (folder / "README.md").is_file():
        write_card(folder, model_card(repo_id, config, samples=[]))
    if not upload(folder, repo_id, config, args.hub_token):
        raise SystemExit(1)


if __name__ == "__main__":
    run("hub", main, args)
