"""What is drawn: prompts with `{}` where the concept goes, and what the concept is called. Imports nothing heavy."""

from __future__ import annotations

import re
from pathlib import Path

from custom_diffusion.errors import InputError

_SETS = Path(__file__).with_name("prompt_sets")
MOST_IMAGES = 1000  # of a prompt: their seeds lie between those of two prompts
PROMPT_SETS = tuple(sorted(path.stem for path in _SETS.glob("*.txt")))


def read_prompts(name: str | Path) -> list[str]:
    """The prompts of a shipped set (`PROMPT_SETS`) or of a text file, one a line; empty lines are passed over.

    Raises:
        InputError: there is no such file, no prompt in it, or a prompt without `{}`.
    """
    path = _SETS / f"{name}.txt" if str(name) in PROMPT_SETS else Path(name)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(
            f"--prompts: '{name}' cannot be read ({error.strerror}); name a text file, or one of {', '.join(PROMPT_SETS)}"
        ) from None
    except UnicodeDecodeError:
        raise InputError(f"--prompts: '{name}' is not UTF-8 text; save it as UTF-8") from None
    lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not lines:
        raise InputError(f"--prompts: '{name}' is empty; write one prompt a line, with {{}} for the concept")
    for number, line in lines:
        if "{}" not in line:
            raise InputError(
                f"--prompts: line {number} of '{name}', {line!r}, has no {{}}; put it where the concept goes"
            )
    return [line for _, line in lines]


def fill(prompt: str, concept: str) -> str:
    return prompt.replace("{}", concept)


def without_tokens(text: str, tokens: list[str]) -> str:
    """The text as somebody who does not know the modifier tokens would write it: "a <new1> cat" -> "a cat"."""
    for token in tokens:
        text = text.replace(token, "")
    return re.sub(r"\s+", " ", text).strip()


def concept_of(config: dict, tokens: list[str], name: str) -> str:
    """What the weights' concept is called in a prompt: its instance prompt from the first modifier token on, "<new1> cat".

    Args:
        config: the trained folder's. tokens: of the weights. name: of the weights, for messages.
    Raises:
        InputError: the weights do not say, or hold several concepts.
    """
    found = []
    for concept in config.get("concepts", []):
        prompt = concept.get("instance_prompt") or ""
        places = [prompt.index(token) for token in tokens if token in prompt]
        if places:
            found.append(prompt[min(places) :].strip())
    if len(set(found)) == 1:
        return found[0]
    if found:
        raise InputError(f"--concept: '{name}' has several concepts; say which, for example --concept {found[0]!r}")
    example = f"{tokens[0]} cat" if tokens else "cat"
    raise InputError(f"--concept: '{name}' does not say what it is called; give it, for example --concept {example!r}")


def class_prompt_of(config: dict, called: str, tokens: list[str]) -> str:
    """The class prompt of the first concept in whose instance prompt a modifier token of `called` is; empty where there is none."""
    asked = [token for token in tokens if token in called]
    prompts = [
        concept.get("class_prompt")
        for concept in config.get("concepts", [])
        if any(token in (concept.get("instance_prompt") or "") for token in asked)
    ]
    return next(filter(None, prompts), "")
