"""One HTML page of scores and images. It loads nothing but the images beside it, so it opens without a network."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from html import escape
from pathlib import Path
from urllib.parse import quote

from custom_diffusion.evaluation.report import PAGE, PAGE_START, SCORES, best_and_worst, scores_of, shown
from custom_diffusion.files import whole_file

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em; color: #222; background: #fff }
table { border-collapse: collapse; margin: 1em 0 2em }
th, td { padding: .3em .7em; text-align: left; vertical-align: top; border-top: 1px solid #ddd }
td.number { font-variant-numeric: tabular-nums }
figure { display: inline-block; margin: 2px; border: 3px solid transparent }
figure img { display: block; width: 128px; height: auto }
figcaption { font-size: 12px; text-align: center }
.best { color: #0a6b2d; border-color: #0a6b2d }
.worst { color: #b3261e; border-color: #b3261e }
td .best, td .worst { font-weight: bold }
svg { max-width: 100%; height: auto; margin-right: 1em }
svg text { font: 12px system-ui, sans-serif; fill: #444 }
""".strip()
_MARKS = ("best", "worst")
_WIDTH, _HEIGHT, _MARGIN = 420, 200, 44  # of a plot, in SVG units


def write_page(folder: Path, settings: dict, rows: Sequence[dict]) -> None:
    """Write the page of `rows`, as in results.json, into the folder in which their images are."""
    count = f"{len(rows)} {'model' if len(rows) == 1 else 'models'}"
    facts = ", ".join(f"{name} {value}" for name, value in settings.items() if value is not None)
    body = [
        f"<h1>Evaluation of {count}</h1>",
        f"<p>{escape(facts)}</p>",
        _score_table(rows),
        *(_plot(rows, score) for score in scores_of(rows)),
        "<p>The best and the worst image of each prompt have the highest and the lowest mean of CLIP-T, CLIP-I and DINO.</p>",
        _image_table(rows),
    ]
    head = f"{PAGE_START}{count}</title><style>{_STYLE}</style></head>"
    page = f"{head}<body>\n" + "\n".join(body) + "\n</body></html>\n"
    with whole_file(folder / PAGE) as path:
        path.write_text(page, encoding="utf-8")


def _score_table(rows):
    scores = scores_of(rows)
    marks = {score: best_and_worst(rows, score) for score in scores}
    head = "".join(f"<th>{escape(name)}</th>" for name in ("weights", "steps", *(SCORES[score][0] for score in scores)))
    lines = []
    for place, row in enumerate(rows):
        cells = [f"<td>{escape(row['weights'])}</td>", f"<td>{'' if row['steps'] is None else row['steps']}</td>"]
        for score in scores:
            mark = next((m for m, marked in zip(_MARKS, marks[score] or ()) if marked == place), None)
            text = escape(shown(row, score))
            cells.append(f'<td class="number">{_marked(text, mark)}</td>')
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return f"<table><tr>{head}</tr>{''.join(lines)}</table>"


def _marked(text, mark):
    return f'<span class="{mark}">{text} ({mark})</span>' if mark else text


def _plot(rows, score):
    """A score over optimizer steps, or over the order of the rows where some have none."""
    name, more_is_better = SCORES[score]
    points = [(row["steps"], row[score], row["weights"]) for row in rows if row.get(score) is not None]
    axis = "optimizer steps"
    if any(steps is None for steps, _, _ in points):
        points = [(number, value, label) for number, (_, value, label) in enumerate(points, start=1)]
        axis = "models in the order given"
    points.sort(key=lambda point: point[0])
    xs, ys = [x for x, _, _ in points], [y for _, y, _ in points]
    placed = [
        (_scaled(x, xs, _MARGIN, _WIDTH - 16), _scaled(y, ys, _HEIGHT - _MARGIN, 28), label) for x, y, label in points
    ]
    # A line only where it leads from one checkpoint to the next; a run's folder is its last checkpoint once more.
    course = list(dict.fromkeys((x, y) for x, y, _ in placed))
    is_course = axis == "optimizer steps" and len({x for x, _ in course}) == len(course)
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in course) if is_course else ""
    dots = "".join(
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="#1f5fbf"><title>{escape(label)}: {value:.4f}</title></circle>'
        for (x, y, label), value in zip(placed, ys)
    )
    aim = "more" if more_is_better else "less"
    bottom = _HEIGHT - _MARGIN
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" role="img" aria-label="{escape(name)} over {axis}">'
        f'<text x="{_MARGIN}" y="16">{escape(name)} ({aim} is better)</text>'
        f'<path d="M{_MARGIN} 24V{bottom}H{_WIDTH - 8}" fill="none" stroke="#999"/>'
        f'<text x="{_MARGIN - 4}" y="32" text-anchor="end">{max(ys):.3g}</text>'
        f'<text x="{_MARGIN - 4}" y="{bottom}" text-anchor="end">{min(ys):.3g}</text>'
        f'<text x="{_MARGIN}" y="{bottom + 16}">{min(xs)}</text>'
        f'<text x="{_WIDTH - 16}" y="{bottom + 16}" text-anchor="end">{max(xs)}</text>'
        f'<text x="{_WIDTH / 2}" y="{_HEIGHT - 8}" text-anchor="middle">{axis}</text>'
        f'<polyline points="{line}" fill="none" stroke="#1f5fbf" stroke-width="2"/>{dots}</svg>'
    )


def _scaled(value, values, start, end):
    """The place of a value between those of the smallest and the largest; the middle if they are one."""
    low, high = min(values), max(values)
    return start + (end - start) * ((value - low) / (high - low) if high > low else 0.5)


def _image_table(rows):
    """Prompts down, models across."""
    head = "".join(f"<th>{escape(row['weights'])}</th>" for row in rows)
    lines = []
    for prompt in dict.fromkeys(image["template"] for row in rows for image in row["images"]):
        cells = [[image for image in row["images"] if image["template"] == prompt] for row in rows]
        every = sorted((image for cell in cells for image in cell), key=_overall)
        marks = {id(every[-1]): "best", id(every[0]): "worst"} if _overall(every[-1]) > _overall(every[0]) else {}
        shown_cells = "".join(
            f"<td>{''.join(_figure(image, marks.get(id(image))) for image in cell)}</td>" for cell in cells
        )
        lines.append(f"<tr><th>{escape(prompt)}</th>{shown_cells}</tr>")
    return f"<table><tr><th>prompt</th>{head}</tr>{''.join(lines)}</table>"


def _overall(image):
    return statistics.fmean(image[score] for score in ("clip_t", "clip_i", "dino"))


def _figure(image, mark):
    scores = ", ".join(f"{SCORES[score][0]} {image[score]:.3f}" for score in ("clip_t", "clip_i", "dino"))
    source, alt = quote(image["file"]), escape(image["prompt"], quote=True)
    caption = f"<figcaption>{mark}</figcaption>" if mark else ""
    opening = f'<figure class="{mark}">' if mark else "<figure>"
    return f'{opening}<img src="{source}" alt="{alt}" title="{scores}" loading="lazy">{caption}</figure>'
