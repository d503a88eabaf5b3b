"""What a run's curve leaves beside the weights: `curve.png` to look at, `curve.json` to compute with."""

import json
import math
from pathlib import Path

from PIL import Image, ImageDraw

from custom_diffusion.files import CURVE_IMAGE, CURVE_VALUES, whole_file
from custom_diffusion.training.curve import CONCEPT_LOSS, PRIOR_LOSS, Point

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 400, 64, 24, 56, 44  # pixels, and the margins among them
FINENESS = 2  # drawn so many times larger, then made smaller: smooth lines
COLORS = {CONCEPT_LOSS: "#1f6f8b", PRIOR_LOSS: "#c2571a"}
GRID, TEXT, MARK = "#dddddd", "#444444", "#888888"


def write_curve(folder: Path, points: list[Point], marks: dict[str, int | None]) -> None:
    """Write both files into `folder`; arguments as those of `draw_curve`."""
    values = [{"step": point.step, **point.by_name()} for point in points]
    with whole_file(folder / CURVE_VALUES) as path:
        path.write_text(json.dumps({**marks, "points": values}, indent=2) + "\n", encoding="utf-8")
    with whole_file(folder / CURVE_IMAGE) as path:
        draw_curve(points, marks).save(path, format="PNG", optimize=True)


def draw_curve(points: list[Point], marks: dict[str, int | None]) -> Image.Image:
    """Both losses against the optimizer step, (WIDTH, HEIGHT) pixels.

    Args:
        marks: steps to point out, by what is said of them; None is left out.
    """
    lines = {name: [] for name in COLORS}
    for point in points:
        for name, loss in point.by_name().items():
            if math.isfinite(loss):
                lines[name].append((point.step, loss))
    lines = {name: line for name, line in lines.items() if line}
    plot = _Plot([at for line in lines.values() for at in line])
    plot.grid()
    for index, (what, step) in enumerate((what, step) for what, step in marks.items() if step is not None):
        plot.mark(step, f"{what}: {step}", index)
    for index, (name, line) in enumerate(lines.items()):
        plot.line(line, COLORS[name], name, index)
    return plot.image.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)


class _Plot:
    """An image that shows all of `values`, (step, loss) pairs, and what is drawn into it."""

    def __init__(self, values):
        self.image = Image.new("RGB", (FINENESS * WIDTH, FINENESS * HEIGHT), "white")
        self.pen = ImageDraw.Draw(self.image)
        self.steps = _ticks([step for step, _ in values] or [0], 1)
        self.losses = _ticks([loss for _, loss in values] or [0], 0)

    def place(self, step, loss):
        """Pixels of the larger image."""
        across, up = (
            (value - ticks[0]) / (ticks[-1] - ticks[0]) for value, ticks in ((step, self.steps), (loss, self.losses))
        )
        x, y = LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)
        return FINENESS * x, FINENESS * y

    def text(self, place, text, color, anchor):
        self.pen.text(place, text, fill=color, anchor=anchor, font_size=FINENESS * 13)

    def grid(self):
        for loss in self.losses:
            self.pen.line(
                [self.place(self.steps[0], loss), self.place(self.steps[-1], loss)], fill=GRID, width=FINENESS
            )
            x, y = self.place(self.steps[0], loss)
            self.text((x - FINENESS * 8, y), f"{loss:.4g}", TEXT, "rm")
        for step in self.steps:
            x, y = self.place(step, self.losses[0])
            self.text((x, y + FINENESS * 8), f"{step:g}", TEXT, "mt")
        self.text((FINENESS * WIDTH / 2, FINENESS * (HEIGHT - 4)), "optimizer steps", TEXT, "mb")

    def mark(self, step, text, index):
        bottom, top = self.place(step, self.losses[0]), self.place(step, self.losses[-1])
        self.pen.line([bottom, top], fill=MARK, width=FINENESS)
        side = 1 if top[0] < FINENESS * WIDTH * 0.8 else -1  # right of the line, where there is room
        self.text(
            (top[0] + side * FINENESS * 4, top[1] + FINENESS * (4 + 18 * index)), text, TEXT, "lt" if side > 0 else "rt"
        )

    def line(self, values, color, name, index):
        """`values` joined, and what they are, in a line of the legend."""
        places = [self.place(*value) for value in values]
        self.pen.line(places, fill=color, width=FINENESS * 2, joint="curve")
        for x, y in places:
            r = FINENESS * 2.5
            self.pen.ellipse([x - r, y - r, x + r, y + r], fill=color)
        text = f"{name}: {values[0][1]:.4f} to {values[-1][1]:.4f}"
        self.text((FINENESS * LEFT, FINENESS * (14 + 20 * index)), text, color, "lm")


def _ticks(values, smallest_gap):
    """About five round numbers, from one that is at most the least of the values to one that is at least the largest."""
    low, high = min(values), max(values)
    rough = max((high - low) / 5, smallest_gap, abs(high) * 1e-6, 1e-12)
    power = 10.0 ** math.floor(math.log10(rough))
    gap = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / gap + 1e-9), math.ceil(high / gap - 1e-9)
    return [number * gap for number in range(first, max(last, first + 1) + 1)]
