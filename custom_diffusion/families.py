"""The model families: everything that differs between them, in one place.

A family is told from the model itself, by `family_of`. A new one is one more `Family` at the end of this file. On the ground
floor, because files, model, training and tools all ask it; torch is imported only where outputs are joined.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class TextPart:
    """One text encoder of a family.

    Attributes:
        encoder, tokenizer: what the pipeline's parts and the model's subfolders are called.
        class_name: of the encoder, in transformers.
        key: of a new word's rows in its file; None where the file holds one row under the word itself.
    """

    encoder: str
    tokenizer: str
    class_name: str
    key: str | None


@dataclass(frozen=True)
class Family:
    """What training and drawing must know of a family of models.

    Attributes:
        name: for people.
        texts: its text encoders, in the order in which their features are joined.
        layer: which hidden state of each encoder is its features; None for the last one after the final norm.
        addition_embed_type: what the UNet's configuration says of conditions beside the text features.
        resolution: side of the images that it was made for, in pixels; what `--resolution` is where it is not given.
        vae_overflows: in fp16, unless the VAE's configuration says `force_upcast: false`.
        text_to_image, inpainting: its pipelines' class names in diffusers.
        pipeline_options: with which a pipeline is made of modules in memory: without a safety checker or watermark.
        options_of_model: which options the model's index gives.
        tags: of a model card on the Hub.
        lora_versions: by which A1111 (`ss_...`) and Forge (`modelspec...`) tell what model a LoRA is for, for each width of the
            text features; under None for any other width. A1111 hides LoRAs of another model.
        original_names: whether other programs' LoRAs name layers as the original layout does, not diffusers'.
    """

    name: str
    texts: tuple[TextPart, ...]
    layer: int | None
    addition_embed_type: str | None
    resolution: int
    vae_overflows: bool
    text_to_image: str
    inpainting: str
    pipeline_options: Mapping[str, object] = field(default_factory=dict)
    options_of_model: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    lora_versions: Mapping[int | None, Mapping[str, str]] = field(default_factory=dict)
    original_names: bool = False

    @property
    def pools(self) -> bool:
        """Whether the UNet takes pooled text features beside those of each token."""
        return self.addition_embed_type == "text_time"

    def join(self, outputs: Sequence) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Text features of the encoders' outputs, as the UNet takes them.

        Args:
            outputs: of each of `texts`, called with `output_hidden_states=self.layer is not None`.
        Returns:
            (B, T, D) features, and (B, P) pooled features of the last encoder, or None where the UNet takes none.
        """
        import torch

        if self.layer is None:
            features = [output.last_hidden_state for output in outputs]
        else:
            features = [output.hidden_states[self.layer] for output in outputs]
        pooled = outputs[-1].text_embeds if self.pools else None
        return features[0] if len(features) == 1 else torch.cat(features, dim=-1), pooled

    def added_conditions(
        self, pooled: torch.Tensor | None, time_ids: torch.Tensor | None
    ) -> dict[str, torch.Tensor] | None:
        """What the UNet takes as `added_cond_kwargs`.

        Args:
            pooled: (B, P). time_ids: (B, 6) of each image's original height and width, the top and left of its crop, and the
                height and width that it is shown at, in pixels.
        """
        return {"text_embeds": pooled, "time_ids": time_ids} if self.pools else None

    def words_code(self, tokens: Sequence[str], folder: str, suffix: str, read: Callable[[str], str]) -> list[str]:
        """Python with which diffusers alone gives new words to `pipe`.

        Args:
            folder: or Hub id with a file for each, `<token><suffix>`.
            read: file name -> an expression for what is in the file; where it has several rows, diffusers cannot read it.
        """
        if len(self.texts) == 1:
            return [f"pipe.load_textual_inversion({folder!r}, weight_name={token + suffix!r})" for token in tokens]
        lines = []
        for token in tokens:
            lines.append(f"rows = {read(token + suffix)}")
            for text in self.texts:
                given = f"rows[{text.key!r}], token={token!r}, tokenizer=pipe.{text.tokenizer}"
                lines.append(f"pipe.load_textual_inversion({given}, text_encoder=pipe.{text.encoder})")
        if tokens and self.pools:  # as `weights/end_token.py` does
            last = self.texts[-1]
            lines.append(f"pipe.{last.encoder}.text_model.eos_token_id = pipe.{last.tokenizer}.eos_token_id")
        return lines


STABLE_DIFFUSION = Family(
    name="Stable Diffusion",
    texts=(TextPart("text_encoder", "tokenizer", "CLIPTextModel", None),),
    layer=None,
    addition_embed_type=None,
    resolution=512,
    vae_overflows=False,
    text_to_image="StableDiffusionPipeline",
    inpainting="StableDiffusionInpaintPipeline",
    pipeline_options={"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False},
    tags=("stable-diffusion",),
    lora_versions={
        # Forge would have to be told whether the model predicts velocities, which the weights do not say.
        1024: {"ss_v2": "True", "ss_base_model_version": "sd_v2"},
        None: {
            "ss_v2": "False",
            "ss_base_model_version": "sd_v1",
            "modelspec.architecture": "stable-diffusion-v1/lora",
        },
    },
)
STABLE_DIFFUSION_XL = Family(
    name="Stable Diffusion XL",
    texts=(
        TextPart("text_encoder", "tokenizer", "CLIPTextModel", "clip_l"),
        TextPart("text_encoder_2", "tokenizer_2", "CLIPTextModelWithProjection", "clip_g"),
    ),
    layer=-2,
    addition_embed_type="text_time",
    resolution=1024,
    vae_overflows=True,
    text_to_image="StableDiffusionXLPipeline",
    inpainting="StableDiffusionXLInpaintPipeline",
    pipeline_options={"add_watermarker": False},
    options_of_model=("force_zeros_for_empty_prompt",),
    tags=("stable-diffusion-xl", "stable-diffusion-xl-diffusers"),
    lora_versions={
        None: {
            "ss_v2": "False",
            "ss_base_model_version": "sdxl_base_v1-0",
            "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        }
    },
    original_names=True,
)
FAMILIES = (STABLE_DIFFUSION_XL, STABLE_DIFFUSION)  # those with more parts first
# Number of text encoders -> the keys under which a new word's file holds its row for each.
TOKEN_KEYS = {len(f.texts): tuple(text.key for text in f.texts) for f in FAMILIES if len(f.texts) > 1}
SUPPORTED = "Stable Diffusion 1.x, 2.x and XL models are supported"


def family_named(name: str | None) -> Family:
    """The family that settings name. Settings that name none are of the first that there was."""
    return next((family for family in FAMILIES if family.name == name), STABLE_DIFFUSION)


def closest_family(parts: Mapping[str, object]) -> Family:
    """The family whose parts these are by their names, whether all of them are there or not."""
    names = [{text.encoder for text in family.texts} for family in FAMILIES]
    return next((family for family, own in zip(FAMILIES, names) if own <= parts.keys()), STABLE_DIFFUSION)


def missing_parts(family: Family, parts: Mapping[str, object]) -> list[str]:
    """Which parts training and drawing need and are not there: absent, None, or (None, None), as a model's index has it."""
    wanted = ["unet", "vae", *(name for text in family.texts for name in (text.encoder, text.tokenizer))]
    return [name for name in wanted if (part := parts.get(name)) is None or part in ([None, None], (None, None))]


def family_of(parts: Mapping[str, object]) -> Family | None:
    """The family of a model or pipeline; None if it is of none.

    Args:
        parts: name -> what it is, of `model_index.json` or `pipe.components`.
    """
    family = closest_family(parts)
    return None if missing_parts(family, parts) or "text_encoder_3" in parts else family


def what_it_is(index: Mapping[str, object]) -> str:
    """What a model that `family_of` does not know calls itself, with its article."""
    name = f"a {index.get('_class_name', 'model of an unknown kind')}"
    if missing_parts(closest_family(index), index) == ["text_encoder", "tokenizer"] and "text_encoder_2" in index:
        return f"{name}, the refiner of {STABLE_DIFFUSION_XL.name}"
    return name
