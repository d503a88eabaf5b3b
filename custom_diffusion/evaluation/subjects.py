"""What is scored: the base model, or trained weights with what their concept is called."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from custom_diffusion.errors import InputError
from custom_diffusion.evaluation.drawing import weights_digest
from custom_diffusion.evaluation.prompts import class_prompt_of, concept_of, without_tokens
from custom_diffusion.files import checkpoint_step
from custom_diffusion.model.source import ModelSource, base_of
from custom_diffusion.weights.format import ConceptWeights, as_weights

NAMELESS = "--concept: say what the base model calls the concept, for example --concept cat"


@dataclass(frozen=True)
class Subject:
    """Weights to be scored, or None for the base model.

    Attributes:
        name: as they were given. digest: tells the weights wherever they lie, and so names the folder of their images.
        concept: what stands for the concept in a prompt, "<new1> cat".
        plain_concept: what the base model calls it, "cat"; empty where nobody says.
        steps: optimizer steps that trained them, None where they do not say.
    """

    name: str
    weights: ConceptWeights | None
    digest: str
    concept: str
    plain_concept: str
    steps: int | None

    @property
    def tokens(self) -> list[str]:
        return [] if self.weights is None else list(self.weights.tokens)

    def class_prompts(self, captions: Sequence[str | None]) -> list[str]:
        """What shows the class: each caption, or where there is none, the concept as the base model calls it."""
        if None in captions and not self.plain_concept:
            raise InputError(NAMELESS)
        return [caption or f"photo of a {self.plain_concept}" for caption in captions]


def read_subjects(given: Sequence[ConceptWeights | str | Path], concept: str | None, with_base: bool) -> list[Subject]:
    """The base model, where it is asked for or nothing is given, then the weights in the order given.

    Raises:
        InputError: weights cannot be read, or nobody says what the concept is called.
    """
    trained = [_trained(one, number, concept) for number, one in enumerate(given, start=1)]
    if trained and not with_base:
        return trained
    plain = trained[0].plain_concept if trained else concept
    if not plain:
        raise InputError(NAMELESS)
    return [Subject("base model", None, weights_digest(None), plain, plain, 0), *trained]


def _trained(given, number, concept):
    weights = as_weights(given)
    name = f"weights {number}" if isinstance(given, ConceptWeights) else str(given)
    steps = weights.config.get("steps")
    if steps is None and checkpoint_step(Path(name)) >= 0:
        steps = checkpoint_step(Path(name))
    tokens = list(weights.tokens)
    names_base = concept and tokens and not any(token in concept for token in [*tokens, "<"])
    called = concept_of(weights.config, tokens, name) if names_base or not concept else concept
    plain = (
        (names_base and concept) or without_tokens(called, tokens) or class_prompt_of(weights.config, called, tokens)
    )
    return Subject(name, weights, weights_digest(weights), called, plain, steps)


def common_base(
    subjects: Sequence[Subject],
    model: str | None,
    revision: str | None,
    variant: str | None,
    config_from: str | None = None,
) -> ModelSource:
    """The base model of all subjects. Raises InputError if they name several, or none."""
    sources = {}
    for subject in subjects:
        if subject.weights is not None or model is not None:
            config = {} if subject.weights is None else subject.weights.config
            sources.setdefault(base_of(config, model, revision, variant, config_from), subject.name)
    if not sources:
        raise InputError("weights: give trained weights, or a --model to score")
    if len(sources) > 1:
        (one, its), (other, others) = list(sources.items())[:2]
        raise InputError(
            f"weights: '{its}' was trained on '{one.path}', '{others}' on '{other.path}'; evaluate them apart, or name one --model"
        )
    return next(iter(sources))
