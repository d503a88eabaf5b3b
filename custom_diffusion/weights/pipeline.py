"""Trained weights into a diffusers pipeline, and out again."""

import re
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.hooks import CpuOffload
from diffusers import DiffusionPipeline

from custom_diffusion.weights.format import ConceptWeights, cross_attention_names, read_weights


@dataclass
class _Loaded:
    """What `unload_custom_diffusion` needs to undo a load."""

    base_tensors: dict[str, torch.Tensor]
    tokens: list[str]


def load_custom_diffusion(pipe: DiffusionPipeline, weights: ConceptWeights | str | Path, **hub_options) -> None:
    """Put a trained concept into a Stable Diffusion pipeline.

    The trained keys and values (queries, outputs) take the place of the UNet's own, in its precision and on its device, so
    that drawing costs what it did before; the modifier tokens join the tokenizer and text encoder. Whatever concept was
    loaded before is taken out first. Works with offloading and with LoRA layers in place.

    Args:
        weights: trained folder, checkpoint folder, or Hub repository; or what `read_weights` has read of one.
        hub_options: `revision`, `token`, `cache_dir`... for the Hub.
    Raises:
        ValueError: the weights cannot be read, or do not fit the pipeline, which is then unchanged.
    """
    name = "the concept" if isinstance(weights, ConceptWeights) else f"'{weights}'"
    if not isinstance(weights, ConceptWeights):
        weights = read_weights(weights, **hub_options)
    with _without_offloading(pipe):
        earlier = _take_out(pipe)
        try:
            _check_fit(pipe, weights)
        except ValueError as error:
            if earlier is not None:
                _put_in(pipe, earlier)
            raise ValueError(f"{name} does not fit the pipeline: {error}") from None
        _put_in(pipe, weights)


def unload_custom_diffusion(pipe: DiffusionPipeline) -> None:
    """Undo `load_custom_diffusion`, bit for bit. Nothing happens if nothing is loaded."""
    with _without_offloading(pipe):
        _take_out(pipe)


def _put_in(pipe, weights):
    parameters = {name: _parameter(pipe.unet, name) for name in weights.shapes()}
    base = {name: parameter.detach().to("cpu", copy=True) for name, parameter in parameters.items()}
    with torch.no_grad():
        for name, parameter in parameters.items():
            delta = weights.deltas.get(name)
            parameter.copy_(weights.tensors[name] if delta is None else base[name].float() + delta.matrix())
    if weights.tokens:
        # Before diffusers does it: its way first models the distribution of all rows, which takes time.
        pipe.text_encoder.resize_token_embeddings(len(pipe.tokenizer) + len(weights.tokens), mean_resizing=False)
        pipe.load_textual_inversion([{t: e} for t, e in weights.tokens.items()], token=list(weights.tokens))
    pipe._custom_diffusion = _Loaded(base, list(weights.tokens))


def _take_out(pipe):
    """Take the loaded concept out and return it, in the pipeline's precision."""
    loaded = getattr(pipe, "_custom_diffusion", None)
    if loaded is None:
        return None
    tensors = {name: _parameter(pipe.unet, name).detach().to("cpu", copy=True) for name in loaded.base_tensors}
    embedding = pipe.text_encoder.get_input_embeddings().weight
    ids = pipe.tokenizer.convert_tokens_to_ids(loaded.tokens)
    tokens = {token: embedding[i].detach().cpu().clone() for token, i in zip(loaded.tokens, ids)}
    with torch.no_grad():
        for name, tensor in loaded.base_tensors.items():
            _parameter(pipe.unet, name).copy_(tensor)
    if loaded.tokens:
        pipe.unload_textual_inversion(loaded.tokens)
    pipe._custom_diffusion = None
    return ConceptWeights(tensors, tokens)


def _parameter(unet, name):
    """The UNet's own parameter, below any LoRA layer that wraps its module."""
    path, _, leaf = name.rpartition(".")
    module = unet.get_submodule(path)
    return getattr(getattr(module, "base_layer", module), leaf)


def _check_fit(pipe, weights):
    for part in ("unet", "text_encoder", "tokenizer"):
        if getattr(pipe, part, None) is None:
            raise ValueError(f"it has no {part}")
    attentions = set(cross_attention_names(pipe.unet))
    named = {re.match(r".+\.attn2", name).group() for name in weights.shapes()}
    if named != attentions:
        raise ValueError(
            f"the weights are for {len(named)} cross-attentions of another model, not these {len(attentions)}"
        )
    for name, given in weights.shapes().items():
        shape = _parameter(pipe.unet, name).shape
        if given != shape:
            raise ValueError(
                f"{name} is {tuple(given)}, the model's is {tuple(shape)}; was it trained on another model?"
            )
    width = pipe.text_encoder.get_input_embeddings().weight.shape[1]
    for token, embedding in weights.tokens.items():
        if embedding.shape != (width,):
            raise ValueError(f"the embedding of {token} is {tuple(embedding.shape)}, the model's have {width} values")
        if token in pipe.tokenizer.get_vocab():
            raise ValueError(f"its tokenizer already has {token}; unload what brought it")


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
