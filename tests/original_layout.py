"""Single files as people have them: a diffusers folder's weights under the names of the original layout."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection

RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
          "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}  # fmt: skip
UNET_ENDS = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
             "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
             "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
             "mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1",
             "mid_block.resnets.1": "middle_block.2"}  # fmt: skip
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def save_single_file(model: Path, file: Path, dtype: torch.dtype = torch.float32, *, open_clip: bool = False,
                     without: tuple[str, ...] = (), metadata: dict | None = None) -> Path:  # fmt: skip
    """Write the weights of a diffusers folder into one file, as trainers and A1111 do.

    Args:
        open_clip: the first text encoder has OpenCLIP's names, as in 2.x.
        without: prefixes of names to leave out.
    """
    state = unet_state(UNet2DConditionModel.from_pretrained(model, subfolder="unet"))
    state |= vae_state(AutoencoderKL.from_pretrained(model, subfolder="vae"))
    first = CLIPTextModel.from_pretrained(model, subfolder="text_encoder")
    if (model / "text_encoder_2").is_dir():
        second = CLIPTextModelWithProjection.from_pretrained(model, subfolder="text_encoder_2")
        state |= clip_state(first, "conditioner.embedders.0.transformer.")
        state |= open_clip_state(second, "conditioner.embedders.1.model.")
    elif open_clip:
        state |= open_clip_state(first, "cond_stage_model.model.")
    else:
        state |= clip_state(first, "cond_stage_model.transformer.")
    state = {name: tensor.to(dtype).contiguous() for name, tensor in state.items() if not name.startswith(without)}
    positions = "cond_stage_model.transformer.text_model.embeddings.position_embedding.weight"
    if positions in state:  # older programs save this buffer too
        state["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(len(state[positions]))[
            None
        ]
    save_file(state, file, metadata={"format": "pt"} | (metadata or {}))
    return file


def unet_state(unet: UNet2DConditionModel) -> dict[str, torch.Tensor]:
    """Blocks of the original layout are numbered through, a down- or upsampler with them."""
    places, number = dict(UNET_ENDS), 1
    for i, block in enumerate(unet.down_blocks):
        for j in range(len(block.resnets)):
            places[f"down_blocks.{i}.resnets.{j}"] = f"input_blocks.{number}.0"
            places[f"down_blocks.{i}.attentions.{j}"] = f"input_blocks.{number}.1"
            number += 1
        if block.downsamplers:
            places[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{number}.0.op"
            number += 1
    number = 0
    for i, block in enumerate(unet.up_blocks):
        for j in range(len(block.resnets)):
            places[f"up_blocks.{i}.resnets.{j}"] = f"output_blocks.{number}.0"
            places[f"up_blocks.{i}.attentions.{j}"] = f"output_blocks.{number}.1"
            number += 1
        upsampler = 2 if hasattr(block, "attentions") else 1
        places[f"up_blocks.{i}.upsamplers.0.conv"] = f"output_blocks.{number - 1}.{upsampler}.conv"
    return {
        "model.diffusion_model." + renamed(name, places, RESNET): tensor for name, tensor in unet.state_dict().items()
    }


def vae_state(vae: AutoencoderKL) -> dict[str, torch.Tensor]:
    """The decoder's blocks are numbered from the image on, and attention is made of convolutions."""
    last = len(vae.decoder.up_blocks) - 1
    places = {}
    for half in ("encoder", "decoder"):
        places[f"{half}.conv_norm_out"] = f"{half}.norm_out"
        places |= {f"{half}.mid_block.resnets.{j}": f"{half}.mid.block_{j + 1}" for j in range(2)}
        places[f"{half}.mid_block.attentions.0"] = f"{half}.mid.attn_1"
    for i in range(last + 1):
        places[f"encoder.down_blocks.{i}.downsamplers.0.conv"] = f"encoder.down.{i}.downsample.conv"
        places[f"decoder.up_blocks.{i}.upsamplers.0.conv"] = f"decoder.up.{last - i}.upsample.conv"
        for j in range(9):
            places[f"encoder.down_blocks.{i}.resnets.{j}"] = f"encoder.down.{i}.block.{j}"
            places[f"decoder.up_blocks.{i}.resnets.{j}"] = f"decoder.up.{last - i}.block.{j}"
    state = {}
    for name, tensor in vae.state_dict().items():
        attention = ".attentions." in name
        if attention and name.endswith("weight") and tensor.dim() == 2:
            tensor = tensor[:, :, None, None]
        inner = VAE_ATTENTION if attention else {"conv_shortcut": "nin_shortcut"}
        state["first_stage_model." + renamed(name, places, inner)] = tensor
    return state


def renamed(name: str, places: dict[str, str], inner: dict[str, str]) -> str:
    """A parameter's name with its module's place, and what it is called inside of the module, in the other layout."""
    for ours, theirs in places.items():
        if name.startswith(ours + "."):
            rest = name.removeprefix(ours + ".")
            return f"{theirs}." + next(
                (rest.replace(a, b, 1) for a, b in inner.items() if rest.startswith(a + ".")), rest
            )
    return name


def clip_state(encoder: CLIPTextModel, prefix: str) -> dict[str, torch.Tensor]:
    """Newer versions of transformers leave out `text_model.` in front."""
    return {f"{prefix}text_model.{name.removeprefix('text_model.')}": t for name, t in encoder.state_dict().items()}


def open_clip_state(encoder, prefix: str) -> dict[str, torch.Tensor]:
    """OpenCLIP keeps queries, keys and values in one matrix, and the projection turned over."""
    mine = {name.removeprefix("text_model."): tensor for name, tensor in encoder.state_dict().items()}
    state = {"token_embedding.weight": mine["embeddings.token_embedding.weight"],
             "positional_embedding": mine["embeddings.position_embedding.weight"],
             "ln_final.weight": mine["final_layer_norm.weight"], "ln_final.bias": mine["final_layer_norm.bias"],
             "text_projection": mine.get("text_projection.weight", torch.eye(encoder.config.hidden_size)).T}  # fmt: skip
    for i in range(encoder.config.num_hidden_layers):
        layer, block = f"encoder.layers.{i}", f"transformer.resblocks.{i}"
        for kind in ("weight", "bias"):
            state[f"{block}.attn.in_proj_{kind}"] = torch.cat(
                [mine[f"{layer}.self_attn.{x}_proj.{kind}"] for x in "qkv"]
            )
            state[f"{block}.attn.out_proj.{kind}"] = mine[f"{layer}.self_attn.out_proj.{kind}"]
            for ours, theirs in {
                "layer_norm1": "ln_1",
                "layer_norm2": "ln_2",
                "mlp.fc1": "mlp.c_fc",
                "mlp.fc2": "mlp.c_proj",
            }.items():
                state[f"{block}.{theirs}.{kind}"] = mine[f"{layer}.{ours}.{kind}"]
    return {prefix + name: tensor for name, tensor in state.items()}
