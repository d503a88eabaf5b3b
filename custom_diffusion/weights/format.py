"""The trained folder: what it holds, how it is written and read."""

import glob
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import safetensors.torch
import torch
from diffusers import UNet2DConditionModel

from custom_diffusion.errors import InputError, first_line
from custom_diffusion.families import FAMILIES, TOKEN_KEYS, Family
from custom_diffusion.files import CONFIG_NAME, DELTAS_NAME, WEIGHTS_FILES, WEIGHTS_NAME, whole_file

_KEY = re.compile(
    r"(?P<attention>.+\.attn2)\.processor\.(?P<projection>to_[qkv]|to_out)_custom_diffusion"
    r"(?P<index>\.0)?\.(?P<name>weight|bias)"
)
_METADATA = {"format": "pt"}
_SAFETENSORS_TYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip


@dataclass(frozen=True)
class LowRankDelta:
    """A change of a weight matrix (out, in): up (out, rank) times down (rank, in)."""

    up: torch.Tensor
    down: torch.Tensor

    @property
    def shape(self) -> torch.Size:
        return torch.Size([self.up.shape[0], self.down.shape[1]])

    @property
    def num_bytes(self) -> int:
        return self.up.nbytes + self.down.nbytes

    def matrix(self) -> torch.Tensor:
        """(out, in) float32."""
        return self.up.float() @ self.down.float()


@dataclass
class ConceptWeights:
    """What training has learned, on the CPU.

    Attributes:
        tensors: the UNet's parameters by their names in it, "...attn2.to_k.weight" -> (out, in) or (out,) float32.
        tokens: modifier token -> (dim,) embedding; for several text encoders, its rows in them joined.
        config: base model, concepts and training settings; empty for folders that other trainers wrote.
        deltas: of compressed weights, parameters by name as changes of the base model's; none of them is in `tensors`.
        token_widths: how many values of an embedding belong to each of several text encoders; () for one.
    """

    tensors: dict[str, torch.Tensor]
    tokens: dict[str, torch.Tensor]
    config: dict = field(default_factory=dict)
    deltas: dict[str, LowRankDelta] = field(default_factory=dict)
    token_widths: tuple[int, ...] = ()

    @property
    def family(self) -> Family:
        """Of the base model: the settings name it, or else the words' rows tell."""
        named = [family for family in FAMILIES if family.name == self.config.get("family")]
        alike = [family for family in FAMILIES if len(family.texts) == max(len(self.token_widths), 1)]
        return (named or alike)[0]

    def shapes(self) -> dict[str, torch.Size]:
        """The shape of every parameter that the weights bring, by name."""
        return {name: value.shape for name, value in (self.tensors | self.deltas).items()}


def token_to_file(token: str, embedding: torch.Tensor, widths: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """What the file of a token holds: its embedding, or with several text encoders (1, width) rows by the encoders' keys.

    The latter is what kohya writes, and A1111 and ComfyUI read. Each is a copy: a row of a table would bring the whole along.
    """
    if not widths:
        return {token: embedding.clone()}
    return {key: row.unsqueeze(0).clone() for key, row in zip(TOKEN_KEYS[len(widths)], embedding.split(widths))}


def token_from_file(token: str, state: dict) -> tuple[torch.Tensor, tuple[int, ...]]:
    """Inverse of `token_to_file`: embedding and widths. Raises ValueError for anything else."""
    if set(state) == {token} and isinstance(state[token], torch.Tensor) and state[token].dim() == 1:
        return state[token], ()
    keys = next((keys for keys in TOKEN_KEYS.values() if set(state) & set(keys)), ())
    if missing := [key for key in keys if key not in state]:
        raise ValueError(f"it lacks {missing[0]!r}, the embedding of {token!r} for another text encoder")
    rows = [state[key] for key in keys]
    if set(state) != set(keys) or not all(isinstance(r, torch.Tensor) and r.dim() == 2 and len(r) == 1 for r in rows):
        raise ValueError(f"it is not the embedding of {token!r}")
    return torch.cat(rows, dim=1)[0], tuple(row.shape[1] for row in rows)


def cross_attention_names(unet: UNet2DConditionModel) -> list[str]:
    """Module names of all cross-attentions of the UNet."""
    return [name for name, _ in unet.named_modules() if name.endswith(".attn2")]


def to_file_keys(tensors: dict[str, torch.Tensor], self_attention_names: list[str], empty) -> dict:
    """Names of the file format: "...attn2.processor.to_k_custom_diffusion.weight", and `empty` for self-attentions.

    diffusers' loader demands an entry for every attention, trained or not.
    """
    state = {}
    for name, tensor in tensors.items():
        attention, projection, rest = re.fullmatch(r"(.+\.attn2)\.(to_[qkv]|to_out)(.*)", name).groups()
        state[f"{attention}.processor.{projection}_custom_diffusion{rest}"] = tensor
    return state | {f"{name}.processor": empty for name in self_attention_names}


def from_file_keys(state: dict) -> dict[str, torch.Tensor]:
    """Inverse of `to_file_keys`. Raises ValueError for a key or value that the format does not have."""
    tensors = {}
    for key, value in state.items():
        if len(value) == 0 and key.endswith(".processor"):
            continue
        match = _KEY.fullmatch(key)
        if match is None or not isinstance(value, torch.Tensor):
            raise ValueError(f"{key!r} is no key of Custom Diffusion weights")
        tensors["{attention}.{projection}{index}.{name}".format(**match.groupdict(default=""))] = value
    if not tensors:
        raise ValueError("it has no Custom Diffusion weights")
    return tensors


def deltas_to_file(weights: ConceptWeights) -> dict[str, torch.Tensor]:
    """Keys of the compressed file: "<name>.up" and "<name>.down" for changes, "<name>" for whole parameters."""
    state = {name: tensor.contiguous() for name, tensor in weights.tensors.items()}
    for name, delta in weights.deltas.items():
        state |= {f"{name}.up": delta.up.contiguous(), f"{name}.down": delta.down.contiguous()}
    return state


def deltas_from_file(state: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, LowRankDelta]]:
    """Inverse of `deltas_to_file`: whole parameters, and changes. Raises ValueError if the keys do not pair up."""
    deltas = {}
    for key in [key for key in state if key.endswith(".up")]:
        name = key.removesuffix(".up")
        up, down = state.get(key), state.get(f"{name}.down")
        if down is None or up.dim() != 2 or down.dim() != 2 or up.shape[1] != down.shape[0]:
            raise ValueError(f"{key!r} has no fitting '{name}.down'")
        deltas[name] = LowRankDelta(up, down)
    rest = {key: value for key, value in state.items() if key.removesuffix(".up").removesuffix(".down") not in deltas}
    if wrong := [key for key in [*deltas, *rest] if not re.fullmatch(r".+\.attn2\.to_.+\.(weight|bias)", key)]:
        raise ValueError(f"{wrong[0]!r} is no key of compressed weights")
    if not deltas:
        raise ValueError("it has no compressed weights")
    return rest, deltas


def write_weights(folder: Path, weights: ConceptWeights, unet: UNet2DConditionModel, formats: tuple[str, ...]) -> None:
    """Write the weights, one file per token, and the settings into `folder`, each file whole or not at all.

    Weights with deltas go into one compressed file instead.

    Args:
        unet: names the self-attentions.
        formats: of "safetensors" and "bin".
    """
    folder.mkdir(parents=True, exist_ok=True)
    self_attentions = [n.removesuffix(".processor") for n in unet.attn_processors if n.endswith(".attn1.processor")]
    for suffix in formats:
        if suffix == "safetensors":
            save, empty = save_tensors, torch.zeros(0)
        else:
            save, empty = save_state, {}
        if not weights.deltas:
            with whole_file(folder / f"{WEIGHTS_NAME}.{suffix}") as path:
                save(to_file_keys(weights.tensors, self_attentions, empty), path)
        for token, embedding in weights.tokens.items():
            with whole_file(folder / f"{token}.{suffix}") as path:
                save(token_to_file(token, embedding, weights.token_widths), path)
    if weights.deltas:
        with whole_file(folder / DELTAS_NAME) as path:
            save_tensors(deltas_to_file(weights), path)
    with whole_file(folder / CONFIG_NAME) as path:
        path.write_text(json.dumps(weights.config, indent=2) + "\n", encoding="utf-8")


# Written here, not by the libraries' own writers: those hide why a write failed, for example on a full disk, and safetensors'
# copies all tensors first.
def save_tensors(state: dict[str, torch.Tensor], path: Path, metadata: Mapping[str, str] = _METADATA) -> None:
    """A safetensors file, one tensor after the other. Raises OSError if it cannot be written."""
    # Larger elements first, so that all are aligned; the rest of the order is the library's own.
    names = sorted(state, key=lambda name: (-state[name].element_size(), name))
    header, end = {"__metadata__": dict(metadata)}, 0
    for name in names:
        start, end = end, end + state[name].nbytes
        kind, shape = _SAFETENSORS_TYPES[state[name].dtype], list(state[name].shape)
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [start, end]}
    line = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    line += b" " * (-len(line) % 8)
    with path.open("wb") as file:
        file.write(len(line).to_bytes(8, "little") + line)
        for name in names:
            file.write(state[name].contiguous().reshape(-1).view(torch.uint8).numpy().data)


def save_state(state: dict, path: Path) -> None:
    """`torch.save`, one tensor after the other. Raises OSError if the file cannot be written."""
    with path.open("wb") as file:
        watched = _Watched(file)
        try:
            torch.save(state, watched)
        except Exception:
            if watched.error is not None:
                raise watched.error from None
            raise


class _Watched:
    """A file that keeps why it could not be written: torch says something else."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self.error: OSError | None = None

    def write(self, data) -> int:
        if self.error is not None:
            raise self.error  # torch would go on, and then say that the archive has the wrong size
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self._file.flush()


def as_weights(weights: ConceptWeights | str | Path, flag: str = "weights") -> ConceptWeights:
    """Weights that may have been read already. Raises InputError, naming the flag, where `read_weights` raises ValueError."""
    if isinstance(weights, ConceptWeights):
        return weights
    try:
        return read_weights(weights)
    except ValueError as error:
        raise InputError(f"{flag}: {error}") from None


def read_weights(path_or_hub_id: str | Path, **hub_options) -> ConceptWeights:
    """Read a trained folder, a checkpoint folder, or a Hub repository.

    Args:
        hub_options: `revision`, `token`, `cache_dir`... of `huggingface_hub.snapshot_download`.
    Raises:
        ValueError: nothing usable is there; the message says what is wrong with which file.
    """
    folder = Path(path_or_hub_id)
    if not folder.is_dir():
        folder = _download(str(path_or_hub_id), **hub_options)
    path = next((folder / name for name in WEIGHTS_FILES if (folder / name).is_file()), None)
    if path is None:
        raise ValueError(f"'{folder}' has no {', '.join(WEIGHTS_FILES[:2])} or {DELTAS_NAME}; is it a trained folder?")
    try:
        state, deltas = _read_state(path), {}
        if path.name == DELTAS_NAME:
            tensors, deltas = deltas_from_file(state)
        else:
            tensors = from_file_keys(state)
        _check_complete([*tensors, *deltas])
    except ValueError as error:
        raise ValueError(f"'{path}' cannot be used: {error}") from None
    config = _read_config(folder / CONFIG_NAME)
    names = config.get("modifier_tokens")
    if names is None:
        names = sorted({p.stem for s in ("safetensors", "bin") for p in folder.glob(f"<*>.{s}")})
    tokens, widths = {}, {}
    for token in names:
        file = next((p for s in ("safetensors", "bin") if (p := folder / f"{token}.{s}").is_file()), None)
        if file is None:
            raise ValueError(f"'{folder}' lacks the embedding of {token!r}, '{token}.safetensors' or .bin")
        state = _read_state(file)
        try:
            tokens[token], widths[token] = token_from_file(token, state)
        except ValueError as error:
            raise ValueError(f"'{file}' cannot be used: {error}") from None
        if widths[token] != widths[names[0]]:
            raise ValueError(f"'{folder}' has embeddings of different models: {names[0]!r} and {token!r}")
    return ConceptWeights(tensors, tokens, config, deltas, next(iter(widths.values()), ()))


def _check_complete(names):
    """Raises ValueError unless every cross-attention has the same parameters, keys and values among them."""
    split = [re.fullmatch(r"(.+\.attn2)\.(.+)", name).groups() for name in names]
    kinds = {"to_k.weight", "to_v.weight"} | {kind for _, kind in split}
    for attention in sorted({attention for attention, _ in split}):
        if missing := [kind for kind in sorted(kinds) if (attention, kind) not in split]:
            raise ValueError(f"{attention}.{missing[0]} is missing")


def _read_config(path):
    try:
        config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"'{path}' cannot be used: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"'{path}' cannot be used: it is not a JSON object")
    return config


def _read_state(path):
    try:
        if path.suffix == ".safetensors":
            state = safetensors.torch.load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files raise many types in torch and safetensors
        raise ValueError(f"'{path}' is damaged or not a weights file ({first_line(error)})") from None
    if not isinstance(state, dict) or not all(
        isinstance(k, str) and (isinstance(v, dict) or (isinstance(v, torch.Tensor) and v.dim()))
        for k, v in state.items()
    ):
        raise ValueError(f"'{path}' is not a dictionary of tensors")
    for key, value in state.items():
        if isinstance(value, torch.Tensor) and not value.is_floating_point():
            raise ValueError(f"'{path}' cannot be used: {key!r} holds {value.dtype} instead of floating-point numbers")
        if isinstance(value, torch.Tensor) and not value.isfinite().all():
            raise ValueError(f"'{path}' cannot be used: {key!r} has non-finite values (NaN or infinity)")
    return state


def _download(hub_id, **hub_options):
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = [f"{WEIGHTS_NAME}.*", DELTAS_NAME, CONFIG_NAME, "<*>.*"]
    try:
        folder = Path(snapshot_download(hub_id, allow_patterns=wanted, **hub_options))
        tokens = _read_config(folder / CONFIG_NAME).get("modifier_tokens") or []
        if others := [f"{glob.escape(token)}.*" for token in tokens if not re.fullmatch("<.*>", token)]:
            snapshot_download(hub_id, allow_patterns=others, **hub_options)
        return folder
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"'{hub_id}' is neither a folder nor a Hub repository that can be reached ({first_line(error)})"
        ) from None
