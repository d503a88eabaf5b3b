"""Say what a trained folder or Hub repository holds.

custom-diffusion info cat
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from custom_diffusion.cli.tool_flags import weights_problems

if TYPE_CHECKING:
    from custom_diffusion.weights.format import ConceptWeights


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("weights", help="trained folder, checkpoint folder or Hub id")


def flag_problems(args: argparse.Namespace) -> list[str]:
    return weights_problems("weights", args.weights)


def main(args: argparse.Namespace) -> None:
    """Print a line for each thing that is known."""
    for name, value in info(args.weights):
        print(f"{name + ':':<16}{value}")


def info(weights: ConceptWeights | str | Path) -> list[tuple[str, str]]:
    """(what, value) of a trained folder, checkpoint folder, Hub id, or weights already read; else InputError."""
    from custom_diffusion.weights.format import as_weights
    from custom_diffusion.weights.low_rank import rank_summary

    weights = as_weights(weights)
    config, shapes = weights.config, weights.shapes()
    projections = sorted({name.split(".attn2.")[1].removesuffix(".weight").removesuffix(".bias") for name in shapes})
    attentions = {name.split(".attn2.")[0] for name in shapes}
    stored = [*weights.tensors.values(), *(factor for d in weights.deltas.values() for factor in (d.up, d.down))]
    lines = [
        ("base model", _base(config)),
        *([("family", config["family"])] if config.get("family") else []),
        ("tokens", ", ".join(f"{token} ({_widths(weights, row)} values)" for token, row in weights.tokens.items()) or "none"),
        *[("prompt", f"{c.get('instance_prompt')} (class: {c.get('class_prompt') or 'none'})") for c in config.get("concepts", [])],
        ("method", f"{'crossattn' if 'to_q' in projections else 'crossattn_kv'}: {', '.join(projections)} of {len(attentions)} cross-attentions"),
        ("parameters", f"{sum(shape.numel() for shape in shapes.values()):,} in {len(shapes)} tensors"),
        ("size", f"{sum(t.numel() * t.element_size() for t in stored) / 1e6:.2f} MB"),
    ]  # fmt: skip
    if weights.deltas:
        lines.append(("compressed", rank_summary([delta.up.shape[1] for delta in weights.deltas.values()])))
    for part in config.get("merged_from", []):
        lines.append(("merged from", f"{part['weights']} ({', '.join(part['tokens'])})"))
    if config.get("steps") is not None:
        lines.append(("steps", str(config["steps"])))
    settings = {
        n: v for n, v in config.get("settings", {}).items() if n not in ("concepts", "modifier_tokens", "base_file")
    }
    if settings:
        lines.append(
            ("training", ", ".join(f"{name}={value}" for name, value in settings.items() if value is not None))
        )
    if versions := config.get("versions"):
        lines.append(("versions", ", ".join(f"{name} {version}" for name, version in versions.items())))
    return lines


def _widths(weights, row):
    """How many values a word has; for several text encoders, in each."""
    return " + ".join(map(str, weights.token_widths or (len(row),)))


def _base(config):
    if not config.get("base_model"):
        return "not recorded"
    extra = [f"{name} {config[name]}" for name in ("revision", "variant") if config.get(name)]
    if file := config.get("base_file"):
        extra += [f"{file['size']:,} bytes", f"SHA-256 of its header {file['header_sha256']}"]
    if config.get("inpainting"):
        extra.append("inpainting")
    return " ".join([config["base_model"], *(f"({e})" for e in extra)])
