"""Scores as a table on the terminal, as results.json and as results.csv. Imports nothing heavy."""

from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Sequence
from pathlib import Path

from custom_diffusion.files import whole_file

RESULTS_JSON, RESULTS_CSV, PAGE = "results.json", "results.csv", "index.html"
# How those that this tool wrote begin, the table with its first columns
RESULTS_START = '{\n  "settings": {'
PAGE_START = '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Evaluation of '
# Score -> its name, and whether more is better. The last is there only with class images.
SCORES = {
    "clip_t": ("CLIP-T", True),
    "clip_i": ("CLIP-I", True),
    "dino": ("DINO", True),
    "kid_clip": ("KID-CLIP", False),
}
IMAGE_SCORES = ("clip_t", "clip_t_cosine", "clip_i", "dino")
CSV_COLUMNS = (
    "weights", "steps", "concept", "num_images", "clip_t", "clip_t_error", "clip_t_cosine", "clip_t_cosine_error", "clip_i",
    "clip_i_error", "dino", "dino_error", "kid_clip", "kid_clip_deviation", "num_class_images",
)  # fmt: skip


def foreign_results(folder: Path) -> list[str]:
    """A line for each file in the place of the results that is somebody else's."""

    def is_ours(name, text):
        if name == RESULTS_JSON:
            return text.startswith(RESULTS_START)
        return text.startswith(PAGE_START if name == PAGE else ",".join(CSV_COLUMNS[:2]))

    return [
        f"--output: '{folder / name}' was not written by this tool; name another folder"
        for name in (RESULTS_JSON, RESULTS_CSV, PAGE)
        if (folder / name).exists() and not is_ours(name, (folder / name).read_text(encoding="utf-8", errors="replace"))
    ]


def summary(images: Sequence[dict]) -> dict[str, float | None]:
    """Means of the images' scores, and as `<score>_error` the standard error of each over prompts, None with one prompt."""
    by_prompt = {}
    for image in images:
        by_prompt.setdefault(image["template"], []).append(image)
    result = {}
    for score in IMAGE_SCORES:
        result[score] = statistics.fmean(image[score] for image in images)
        means = [statistics.fmean(image[score] for image in group) for group in by_prompt.values()]
        result[f"{score}_error"] = statistics.stdev(means) / len(means) ** 0.5 if len(means) > 1 else None
    return result


def best_and_worst(rows: Sequence[dict], score: str) -> tuple[int, int] | None:
    """Places of the best and the worst of several rows, or None if they cannot be told apart."""
    values = [row.get(score) for row in rows]
    if None in values or len(set(values)) < 2:
        return None
    high, low = values.index(max(values)), values.index(min(values))
    return (high, low) if SCORES[score][1] else (low, high)


def shown(row: dict, score: str) -> str:
    """A score as it is shown: "0.752 ± 0.004"."""
    if row.get(score) is None:
        return ""
    if score == "kid_clip":
        return f"{row[score]:.2f} ± {row['kid_clip_deviation']:.2f}"
    error = row[f"{score}_error"]
    return f"{row[score]:.3f}" + ("" if error is None else f" ± {error:.3f}")


def scores_of(rows: Sequence[dict]) -> list[str]:
    """The scores that any row has."""
    return [score for score in SCORES if any(row.get(score) is not None for row in rows)]


def text_table(rows: Sequence[dict]) -> str:
    scores = scores_of(rows)
    cells = [["weights", "steps", *(SCORES[score][0] for score in scores)]]
    for row in rows:
        steps = "" if row["steps"] is None else str(row["steps"])
        cells.append([row["weights"], steps, *(shown(row, score) for score in scores)])
    return align(cells)


def align(cells: Sequence[Sequence[str]]) -> str:
    """Rows of cells as lines, every column as wide as its widest cell."""
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in cells)


def write_results(folder: Path, settings: dict, rows: Sequence[dict]) -> None:
    """results.json with everything, results.csv with a line for each row."""
    with whole_file(folder / RESULTS_JSON) as path:
        path.write_text(json.dumps({"settings": settings, "results": list(rows)}, indent=2) + "\n", encoding="utf-8")
    with whole_file(folder / RESULTS_CSV) as path, path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, CSV_COLUMNS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
