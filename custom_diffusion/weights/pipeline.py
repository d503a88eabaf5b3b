"""Trained weights into a diffusers pipeline, and out again."""

import re
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.hooks import CpuOffload
from diffusers import DiffusionPipeline, UNet2DConditionModel
from diffusers.loaders import TextualInversionLoaderMixin
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from custom_diffusion.families import closest_family, missing_parts
from custom_diffusion.weights.end_token import pool_at
from custom_diffusion.weights.format import ConceptWeights, cross_attention_names, read_weights


@dataclass(frozen=True)
class _Reader:
    """A tokenizer and text encoder that were given tokens; weak references.

    Attributes:
        end_token_id: by which the encoder found a prompt's end before; None if that stayed as it was.
    """

    tokenizer: weakref.ref
    text_encoder: weakref.ref
    end_token_id: int | None


@dataclass(frozen=True)
class _Loaded:
    """What is loaded into a UNet, kept at the UNet itself: pipelines come and go, and share their parts.

    Attributes:
        base_tensors: the UNet's own parameters by name, on the CPU.
        tokens: that were added to the readers.
    """

    base_tensors: dict[str, torch.Tensor]
    tokens: list[str]
    readers: list[_Reader]


def load_custom_diffusion(
    pipe: DiffusionPipeline, weights: ConceptWeights | str | Path, *, scale: float = 1.0, **hub_options
) -> None:
    """Put a trained concept into a Stable Diffusion pipeline of any family and kind, and so into every pipeline that shares its UNet.

    The trained keys and values (queries, outputs) take the place of the UNet's own, in its precision and on its device, so
    that drawing costs what it did before; the modifier tokens join the tokenizers and text encoders. Whatever concept
    was loaded before, through whichever pipeline, is taken out first. Works with offloading, with compiled UNets and text encoders,
    and with LoRA layers in place.

    Args:
        weights: trained folder, checkpoint folder, or Hub repository; or what `read_weights` has read of one.
        scale: 1 for the trained weights, 0 for the base model's, in between a blend of both, like a LoRA's weight. The modifier
            tokens are the trained ones at any scale.
        hub_options: `revision`, `token`, `cache_dir`... for the Hub.
    Raises:
        ValueError: the weights cannot be read, or do not fit the pipeline, or a LoRA is fused into it. The pipeline is then
            unchanged.
    """
    name = "the concept" if isinstance(weights, ConceptWeights) else f"'{weights}'"
    if not isinstance(weights, ConceptWeights):
        weights = read_weights(weights, **hub_options)
    try:
        _check_fit(pipe, weights)
    except ValueError as error:
        raise ValueError(f"{name} does not fit the pipeline: {error}") from None
    with _without_offloading(pipe):
        _take_out(_unwrapped(pipe.unet))
        _put_in(pipe, weights, scale)


def unload_custom_diffusion(pipe: DiffusionPipeline) -> None:
    """Undo `load_custom_diffusion`, bit for bit, through whichever pipeline it was. Nothing happens if nothing is loaded.

    Raises:
        ValueError: a LoRA was fused into the loaded weights.
    """
    unet = _unwrapped(pipe.unet)
    if _loaded(unet) is not None:
        _check_nothing_is_fused(unet)
        with _without_offloading(pipe):
            _take_out(unet)


def _put_in(pipe, weights, scale):
    unet = _unwrapped(pipe.unet)
    parameters = {name: _parameter(unet, name) for name in weights.shapes()}
    base = {name: parameter.detach().to("cpu", copy=True) for name, parameter in parameters.items()}
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(_blended(weights, name, base[name], scale))
    unet._custom_diffusion = _Loaded(base, list(weights.tokens), _add_tokens(pipe, weights) if weights.tokens else [])


def _readers_of(pipe) -> list[tuple[PreTrainedTokenizerBase, PreTrainedModel]]:
    """The pipeline's tokenizers and text encoders, in the order in which a token's rows are joined."""
    texts = closest_family(pipe.components).texts
    return [(getattr(pipe, text.tokenizer), _unwrapped(getattr(pipe, text.encoder))) for text in texts]


def _add_tokens(pipe, weights):
    """Give the tokens to all tokenizers and text encoders of the pipeline; returns these as `_Reader`s."""
    readers, pools = _readers_of(pipe), closest_family(pipe.components).pools
    widths = [encoder.get_input_embeddings().weight.shape[1] for _, encoder in readers]
    rows = [embedding.split(widths) for embedding in weights.tokens.values()]
    given = []
    for (tokenizer, text_encoder), own_rows in zip(readers, zip(*rows)):
        with _same_random_state(text_encoder.device):
            # Before diffusers does it: its way draws the new rows from the old ones' distribution first, which takes time.
            text_encoder.resize_token_embeddings(len(tokenizer) + len(weights.tokens), mean_resizing=False)
            pipe.load_textual_inversion(
                [{token: row} for token, row in zip(weights.tokens, own_rows)],
                token=list(weights.tokens),
                tokenizer=tokenizer,
                text_encoder=text_encoder,
            )
        end = pool_at(text_encoder, tokenizer.eos_token_id) if pools else None
        given.append(_Reader(weakref.ref(tokenizer), weakref.ref(text_encoder), end))
    return given


def _blended(weights, name, base, scale):
    """A parameter's value, (out, in) or (out,), between the base model's and the trained one."""
    delta = weights.deltas.get(name)
    if delta is not None:
        return base.float() + scale * delta.matrix()
    if scale == 1:
        return weights.tensors[name]
    return torch.lerp(base.float(), weights.tensors[name].float(), scale)


def _take_out(unet):
    """Restore the UNet, and the tokenizers and text encoders that were loaded with it, if anything is loaded."""
    loaded = _loaded(unet)
    if loaded is None:
        return
    with torch.no_grad():
        for name, tensor in loaded.base_tensors.items():
            _parameter(unet, name).copy_(tensor)
    for reader in loaded.readers:
        if reader.tokenizer() is not None and reader.text_encoder() is not None:
            _remove_tokens(reader, loaded.tokens)
    unet._custom_diffusion = None


def _remove_tokens(reader, loaded_tokens):
    """Those of the tokens that nobody has removed in the meantime."""
    tokenizer, text_encoder = reader.tokenizer(), reader.text_encoder()
    vocabulary = tokenizer.get_vocab()
    tokens = [token for token in loaded_tokens if token in vocabulary]
    if tokens:
        with _same_random_state(text_encoder.device):
            _TokenRemover().unload_textual_inversion(tokens, tokenizer=tokenizer, text_encoder=text_encoder)
    # diffusers leaves the configuration at the size with the tokens, and a model saved so could not be read.
    rows = text_encoder.get_input_embeddings().weight.shape[0]
    text_encoder.config.vocab_size = rows
    if reader.end_token_id is not None:
        pool_at(text_encoder, reader.end_token_id)


class _TokenRemover(TextualInversionLoaderMixin):
    """diffusers' way to remove tokens, which belongs to pipelines, for a tokenizer and text encoder without one."""


def _loaded(unet) -> _Loaded | None:
    return getattr(unet, "_custom_diffusion", None)


def _unwrapped(module: nn.Module) -> nn.Module:
    """The module itself, where `torch.compile` has put another around it."""
    return getattr(module, "_orig_mod", module)


def _parameter(unet, name):
    """The UNet's own parameter, below any LoRA layer that wraps its module."""
    path, _, leaf = name.rpartition(".")
    module = unet.get_submodule(path)
    return getattr(getattr(module, "base_layer", module), leaf)


def _check_fit(pipe, weights):
    family = closest_family(pipe.components)
    if missing := [part for part in missing_parts(family, pipe.components) if part != "vae"]:
        raise ValueError(f"it has no {missing[0]}")
    unet: UNet2DConditionModel = _unwrapped(pipe.unet)
    _check_nothing_is_fused(unet)
    attentions = set(cross_attention_names(unet))
    named = {re.match(r".+\.attn2", name).group() for name in weights.shapes()}
    if named != attentions:
        raise ValueError(
            f"the weights are for {len(named)} cross-attentions of another model, not these {len(attentions)}"
        )
    for name, given in weights.shapes().items():
        shape = _parameter(unet, name).shape
        if given != shape:
            raise ValueError(
                f"{name} is {tuple(given)}, the model's is {tuple(shape)}; was it trained on another model?"
            )
    _check_tokens_fit(_readers_of(pipe), weights, _loaded(unet))


def _check_tokens_fit(
    readers: list[tuple[PreTrainedTokenizerBase, PreTrainedModel]], weights: ConceptWeights, loaded: _Loaded | None
):
    widths = tuple(encoder.get_input_embeddings().weight.shape[1] for _, encoder in readers)
    for token, embedding in weights.tokens.items():
        if embedding.shape != (sum(widths),) or (weights.token_widths or widths) != widths:
            own = " + ".join(map(str, widths))
            raise ValueError(f"the embedding of {token} is {tuple(embedding.shape)}, the model's have {own} values")
    given = [reader.tokenizer() for reader in loaded.readers] if loaded is not None else []
    for tokenizer, _ in readers:
        leaving = set(loaded.tokens) if any(tokenizer is other for other in given) else set()
        taken = tokenizer.get_vocab().keys() - leaving
        for token in weights.tokens:
            if token in taken:
                raise ValueError(f"its tokenizer already has {token}; unload what brought it")


def _check_nothing_is_fused(unet):
    """A fused LoRA is part of the very numbers that would be replaced."""
    if any(getattr(module, "merged", False) for module in unet.modules() if hasattr(module, "base_layer")):
        raise ValueError("a LoRA is fused into its UNet; call `pipe.unfuse_lora()` first, and fuse it again afterwards")


@contextmanager
def _same_random_state(device: torch.device) -> Iterator[None]:
    """New embeddings are drawn at random before they get their values; whoever draws next must not notice."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield


@contextmanager
def _without_offloading(pipe):
    """Take CPU offloading off, which keeps weights out of reach, and put it back."""
    hooks = [m._hf_hook for m in pipe.components.values() if hasattr(m, "_hf_hook")]
    if not hooks:
        yield
        return
    model_offload = any(isinstance(hook, CpuOffload) for hook in hooks)
    device = pipe._offload_device
    pipe.remove_all_hooks()
    try:
        yield
    finally:
        if model_offload:
            pipe.enable_model_cpu_offload(device=device)
        else:
            pipe.enable_sequential_cpu_offload(device=device)
