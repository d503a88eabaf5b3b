"""What a run writes into its output folder: checkpoints on the way, the trained weights at the end."""

import math
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list

from custom_diffusion.errors import InputError
from custom_diffusion.files import can_hold
from custom_diffusion.model.concept_model import ConceptModel
from custom_diffusion.model.inpainting import paints_holes
from custom_diffusion.training.checkpoints import Checkpoint, remove_old_checkpoints, save_checkpoint
from custom_diffusion.training.readback import predicts_finite
from custom_diffusion.training.settings import weights_config
from custom_diffusion.training.stopping import RunStopped, non_finite_message
from custom_diffusion.weights.format import write_weights

logger = get_logger(__name__)


@dataclass(frozen=True)
class RunFolder:
    """Where the trained parts of `model` go. Nothing is written of a model whose predictions are no longer finite.

    Attributes:
        settings: the run's (`run_settings`).
        validation_prompt: what the sample images are drawn from, for those who share the folder.
        formats: of the weights at the end, as in `write_weights`; of a checkpoint the first is enough.
        total_limit: how many checkpoints to keep, None for all.
        stateful: what a checkpoint holds beside the weights, by name: optimizer, schedule and perhaps gradient scaler.
        probe: a `prompt` and a `latent_shape`, (1, C, h, w), to predict with.
    """

    path: Path
    model: ConceptModel
    settings: dict
    validation_prompt: str | None
    formats: tuple[str, ...]
    probe: dict
    total_limit: int | None
    stateful: dict

    def save_checkpoint(self, step: int, position: int, best: int | None = None) -> None:
        """Write `checkpoint-<step>` of a run that has seen `position` samples, and remove the oldest over the limit.

        That of step `best` is not removed.

        Raises:
            RunStopped: the model's predictions are not finite.
        """
        weights = self._trained_weights(step)
        state = {name: part.state_dict() for name, part in self.stateful.items()}
        checkpoint = Checkpoint(step, position, weights, state, self.settings)
        path = save_checkpoint(self.path, checkpoint, self.model.unet, self.formats[:1])
        remove_old_checkpoints(path, self.total_limit, best)
        logger.info(f"Saved {path}")

    def save_weights(self, step: int) -> None:
        """Write the trained weights themselves. Raises RunStopped as `save_checkpoint` does."""
        write_weights(self.path, self._trained_weights(step), self.model.unet, self.formats)

    def config(self, step: int) -> dict:
        """The settings file of the weights after `step` optimizer steps."""
        inpainting = paints_holes(self.model.unet.config)
        return weights_config(
            self.settings, step, self.validation_prompt, self.model.text.family.name, inpainting=inpainting
        )

    def _trained_weights(self, step):
        if not predicts_finite(self.model, **self.probe):
            raise RunStopped(non_finite_message("prediction", math.nan, step, self.path))
        return self.model.trained_weights(self.config(step))


def check_token_files(accelerator: Accelerator, output_dir: Path, tokens: list[str]) -> None:
    """Raises InputError, in all processes, if the output folder's file system cannot hold a token's file, or none at all."""
    problem = [None]
    if accelerator.is_main_process:
        try:
            refused = [token for token in tokens if not can_hold(output_dir, f"{token}.safetensors")]
        except OSError as error:
            refused = []
            problem[0] = f"--output_dir: cannot write to '{output_dir}': {error}; choose another folder, or make room"
        if refused:
            better = "+".join(f"new{index + 1}" for index in range(len(tokens)))
            problem[0] = (
                f"--modifier_token: the file system of '{output_dir}' cannot hold a file named "
                f"'{refused[0]}.safetensors'; use --modifier_token {better}, in the prompts too"
            )
    broadcast_object_list(problem)
    if problem[0]:
        raise InputError(problem[0])
