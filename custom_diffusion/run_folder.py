"""What a run writes into its output folder: checkpoints on the way, the trained weights at the end."""

import math
from dataclasses import dataclass
from pathlib import Path

from accelerate.logging import get_logger

from custom_diffusion.checkpoints import Checkpoint, remove_old_checkpoints, save_checkpoint
from custom_diffusion.interruption import RunStopped, not_finite_message
from custom_diffusion.models import ConceptModel
from custom_diffusion.readback import predicts_numbers
from custom_diffusion.settings import weights_config
from custom_diffusion.weights import ConceptWeights, write_weights

logger = get_logger(__name__)


@dataclass(frozen=True)
class RunFolder:
    """Where the trained parts of `model` go. Nothing is written of a model that no longer predicts numbers.

    Attributes:
        tokens: the modifier tokens, in the order of the model's rows.
        settings: the run's (`run_settings`).
        formats: of the weights at the end, as in `write_weights`; of a checkpoint the first is enough.
        probe: a `prompt` and a `latent_shape`, (1, C, h, w), to predict with.
    """

    path: Path
    model: ConceptModel
    tokens: list[str]
    settings: dict
    formats: tuple[str, ...]
    probe: dict

    def save_checkpoint(self, step: int, position: int, stateful: dict, total_limit: int | None) -> None:
        """Write `checkpoint-<step>`, and remove the oldest if there are more than `total_limit`.

        Args:
            position: samples seen. stateful: optimizer, schedule and perhaps scaler by name.
        Raises:
            RunStopped: the model predicts no numbers.
        """
        weights = self._trained_weights(step)
        state = {name: part.state_dict() for name, part in stateful.items()}
        checkpoint = Checkpoint(step, position, weights, state, self.settings)
        path = save_checkpoint(self.path, checkpoint, self.model.unet, self.formats[:1])
        remove_old_checkpoints(path, total_limit)
        logger.info(f"Saved {path}")

    def save_weights(self, step: int) -> None:
        """Write the trained weights themselves. Raises RunStopped as `save_checkpoint` does."""
        write_weights(self.path, self._trained_weights(step), self.model.unet, self.formats)

    def _trained_weights(self, step):
        if not predicts_numbers(self.model, **self.probe):
            raise RunStopped(not_finite_message("prediction", math.nan, step, self.path))
        tensors, rows = self.model.trained_tensors()
        return ConceptWeights(tensors, dict(zip(self.tokens, rows)), weights_config(self.settings, step))
