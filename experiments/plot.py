"""
Charts and heat maps as PNGs, with Pillow alone: drawn at twice the size and reduced.

`chart` draws curves: round ticks, axis titles, a legend where no curve is, running means over
pale raw curves. `heat_maps` draws a measure over radius and speed, with the ranges of training.
All sizes are in pixels of the picture before it is reduced.
"""
import math
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

import pictures
import sim

INK = (30, 30, 30)
PALE = (228, 228, 228)
GREY = (150, 150, 150)
BLUE = (0, 70, 200)
COLORS = (                                        # of curves, in their order
    (0, 114, 178),                                # blue
    (213, 94, 0),                                 # vermilion
    (0, 158, 115),                                # green
    (204, 121, 167),                              # pink
    (230, 159, 0),                                # orange
    (60, 60, 60))                                 # dark grey
SHADES = ((255, 255, 255), (254, 224, 180), (253, 158, 90), (215, 48, 31), (110, 0, 20))
FONT = ImageFont.load_default(size=28)
SMALL = ImageFont.load_default(size=24)
LEGEND_LINE = 36                                  # height of a line of the legend

Points = list[tuple[float, float]]


# ------------------------------------------------------------------ numbers

def ticks(low: float, high: float, *, whole: bool = False, most: int = 7) -> list[float]:
    """Round values, 1, 2 or 5 x 10^k apart, that cover low to high in at most `most` steps."""
    span = high - low or abs(high) or 1.0
    power = math.floor(math.log10(span)) - 2
    steps = [factor * 10.0 ** k for k in range(power, power + 5) for factor in (1, 2, 5)]
    if whole:
        steps = [step for step in steps if step >= 1]
    for step in steps:                            # the finest that needs few enough
        first = math.floor(low / step + 1e-9)
        last = math.ceil(high / step - 1e-9)
        last = max(last, first + 1)
        if last - first <= most:
            break
    return [_round(i * step) for i in range(first, last + 1)]


def log_ticks(low: float, high: float, *, most: int = 9) -> list[float]:
    """1, 2, 5 x 10^k that cover low to high (both > 0); powers of 10 if those are too many."""
    powers = range(math.floor(math.log10(low)), math.floor(math.log10(high)) + 2)
    for factors in ((1, 2, 5), (1,)):
        values = [float(f"{factor}e{k}") for k in powers for factor in factors]
        first = max(i for i, value in enumerate(values) if value <= low)
        last = min(i for i, value in enumerate(values) if value >= high)
        if last - first <= most:
            break
    last = max(last, first + 1)
    return values[first:last + 1]


def written(values: list[float]) -> list[str]:
    """Ticks as text, all with the decimals that one of them needs: 0.0, 0.5, 1.0; 5000, 10k, 5M."""
    fractions = [f"{value:.10f}".rstrip("0").split(".")[1] for value in values]
    decimals = max(map(len, fractions))

    def text(value):
        if abs(value) >= 1e6:
            return f"{value / 1e6:g}M"
        if abs(value) >= 1e4:
            return f"{value / 1e3:g}k"
        return f"{value:.{decimals}f}"
    return [text(value) for value in values]


def smooth(points: Points, window: int) -> Points:
    """Running means of y over `window` points, or all if fewer, at the middle of their x."""
    if not points:
        return []
    window = min(window, len(points))
    means = []
    for i in range(len(points) - window + 1):
        x, y = zip(*points[i:i + window])
        middle = (x[0] + x[-1]) / 2
        means.append((middle, sum(y) / window))
    return means


def _round(value: float) -> float:
    """Removes the rounding errors of float arithmetic: 0.30000000000000004 becomes 0.3."""
    return float(f"{value:.12g}")


# ------------------------------------------------------------------ axes

@dataclass
class Axes:
    """A box of a picture, and the ranges of x and y that it shows."""
    picture: Image.Image
    box: tuple                                    # left, top, right, bottom in pixels
    x_range: tuple                                # values at the left and the right edge
    y_range: tuple                                # values at the bottom and the top edge
    log_x: bool = False

    @property
    def draw(self):
        return ImageDraw.Draw(self.picture)

    def place(self, x, y):
        """The pixel of a point."""
        left, top, right, bottom = self.box
        start, end = self.x_range
        low, high = self.y_range
        if self.log_x:
            x, start, end = map(math.log10, (x, start, end))
        across = (x - start) / (end - start)
        up = (y - low) / (high - low)
        return left + (right - left) * across, bottom - (bottom - top) * up

    def places(self, points):
        """The pixels of points."""
        return [self.place(x, y) for x, y in points]

    def outline(self, x_range, y_range, color):
        """Draws the edges of a range of x and y."""
        left, bottom = self.place(x_range[0], y_range[0])
        right, top = self.place(x_range[1], y_range[1])
        self.draw.rectangle((left, top, right, bottom), outline=color, width=5)

    def draw_axes(self, x_label, y_label, x_ticks, y_ticks):
        """Draws axes at the left and the bottom, with ticks and titles."""
        left, top, right, bottom = self.box
        self.draw.line([(left, top), (left, bottom), (right, bottom)], INK, 2)
        for value, text in zip(x_ticks, written(x_ticks)):
            x, _ = self.place(value, self.y_range[0])
            self.draw.line((x, bottom, x, bottom + 8), INK, 2)
            self.draw.text((x, bottom + 12), text, INK, SMALL, anchor="ma")
        for value, text in zip(y_ticks, written(y_ticks)):
            _, y = self.place(self.x_range[0], value)
            self.draw.line((left - 8, y, left, y), INK, 2)
            self.draw.text((left - 14, y), text, INK, SMALL, anchor="rm")

        middle = (left + right) / 2
        self.draw.text((middle, bottom + 50), x_label, INK, FONT, anchor="ma")
        title = _upward_text(y_label)
        ticks_width = max(map(SMALL.getlength, written(y_ticks)))
        x = left - 24 - ticks_width - title.width
        y = (top + bottom - title.height) / 2
        self.picture.paste(title, (int(x), int(y)))


def _upward_text(text):
    """A picture of a text that runs from the bottom to the top."""
    width = int(FONT.getlength(text)) + 4
    picture = Image.new("RGB", (width, 38), "white")
    ImageDraw.Draw(picture).text((2, 2), text, INK, FONT)
    return picture.rotate(90, expand=True)


# ------------------------------------------------------------------ curves

def chart(path: Path, x_label: str, y_label: str, curves: dict[str, Points], *, window: int = 1,
          log_x: bool = False, width: int = 720, height: int = 420) -> None:
    """
    Curves {name: [(x, y), ...]} as a PNG, NaN left out. Raises ValueError if nothing is left.

    window: the running mean over so many points is drawn, the points themselves pale behind it.
    The axis of y begins at 0 unless all values are far from it. Whole x (int) get whole ticks.
    """
    names, lines = [], []
    for name, points in curves.items():
        finite = [point for point in points if math.isfinite(point[1])]
        names.append(name if finite else f"{name}: no values")
        lines.append(finite)
    if not any(lines):
        raise ValueError(f"{path}: no finite point to draw")
    colors = [COLORS[i % len(COLORS)] for i in range(len(names))]

    picture = Image.new("RGB", (2 * width, 2 * height), "white")
    box = (156, 32, 2 * width - 48, 2 * height - 116)
    x_ticks, y_ticks = _chart_ticks(lines, log_x)
    axes = Axes(picture, box, _ends(x_ticks), _ends(y_ticks), log_x)
    if len(names) > 1:
        legend = _place_legend(axes, y_ticks, lines, names)
    for y in y_ticks:
        level = axes.places([(x, y) for x in axes.x_range])
        axes.draw.line(level, PALE, 2)
    axes.draw_axes(x_label, y_label, x_ticks, y_ticks)
    if window > 1:
        for points, color in zip(lines, colors):
            pale = tuple(255 - (255 - c) * 3 // 10 for c in color)
            _draw_curve(axes, points, pale, 3)
    for points, color in zip(lines, colors):
        means = smooth(points, window)
        _draw_curve(axes, means, color, 5, dots=len(means) <= 16)
    if len(names) > 1:
        _draw_legend(axes.draw, legend, names, colors)
    pictures.save_picture(path, picture.reduce(2))


def _chart_ticks(lines, log_x):
    """Ticks of x and y that cover all points of all curves."""
    x, y = zip(*sum(lines, []))
    if log_x:
        x_ticks = log_ticks(min(x), max(x))
    else:
        whole = all(isinstance(value, int) for value in x)
        x_ticks = ticks(min(x), max(x), whole=whole, most=10)
    low, high = min(y), max(y)
    if 0 <= low < high / 2:
        low = 0.0
    return x_ticks, ticks(low, high)


def _ends(values):
    return values[0], values[-1]


def _draw_curve(axes, points, color, thickness, dots=False):
    line = axes.places(points)
    if line:
        axes.draw.line(line, color, thickness, joint="curve")
    if dots:
        for x, y in line:
            axes.draw.ellipse((x - 7, y - 7, x + 7, y + 7), color)


# ------------------------------------------------------------------ legend

def _place_legend(axes, y_ticks, lines, names):
    """
    The box (left, top, right, bottom), in one of the corners, that hides least of the curves.

    While every corner hides something, the axis of y gets another tick on top, nine at the most.
    """
    left, top, right, bottom = axes.box
    width = 90 + max(map(FONT.getlength, names))
    height = 16 + LEGEND_LINE * len(names)
    boxes = []
    for y in (top + 10, bottom - 10 - height):
        for x in (right - 14 - width, left + 14):
            boxes.append((x, y, x + width, y + height))
    for _ in range(9):
        dots = []
        for points in lines:
            dots += _along(axes.places(points))
        hidden = [_count_hidden(box, dots) for box in boxes]
        if min(hidden) == 0:
            break
        y_ticks.append(_round(2 * y_ticks[-1] - y_ticks[-2]))
        axes.y_range = _ends(y_ticks)
    return boxes[hidden.index(min(hidden))]


def _along(line):
    """The points of a line and 20 between each two."""
    dots = line[-1:]
    for (x0, y0), (x1, y1) in zip(line, line[1:]):
        for i in range(21):
            x = x0 + (x1 - x0) * i / 21
            y = y0 + (y1 - y0) * i / 21
            dots.append((x, y))
    return dots


def _count_hidden(box, dots):
    """Number of dots inside a box or within 8 pixels of it."""
    left, top, right, bottom = box
    count = 0
    for x, y in dots:
        count += left - 8 < x < right + 8 and top - 8 < y < bottom + 8
    return count


def _draw_legend(draw, box, names, colors):
    draw.rectangle(box, "white", PALE, 2)
    x, y, _, _ = box
    y += 26                                       # the middle of the first line
    for name, color in zip(names, colors):
        draw.line((x + 16, y, x + 60, y), color, 5)
        draw.text((x + 74, y), name, INK, FONT, anchor="lm")
        y += LEGEND_LINE


# ------------------------------------------------------------------ maps

def shade(share: float) -> tuple[int, int, int]:
    """The colour of a share of the top value: white 0, dark red from 1 on, grey NaN."""
    if not math.isfinite(share):
        return GREY
    share = min(max(share, 0.0), 1.0)
    position = share * (len(SHADES) - 1)
    i = min(int(position), len(SHADES) - 2)
    weight = position - i
    return tuple(round(a + (b - a) * weight) for a, b in zip(SHADES[i], SHADES[i + 1]))


def heat_maps(path: Path, panels: list[tuple[str, Tensor, float]], radii: Tensor, speeds: Tensor,
              side: int = 280) -> None:
    """
    Panels (title, values (radii, speeds), value of the darkest colour), two in a row, as a PNG.

    radii in units and speeds in units/s are the middles of equal cells. A cell of NaN is grey.
    """
    side = 2 * side
    across, down = side + 244, side + 184         # from one panel to the next
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / 2)
    picture = Image.new("RGB", (across * columns, down * rows), "white")
    for i, (title, values, top_value) in enumerate(panels):
        left = 116 + i % 2 * across
        top = 64 + i // 2 * down
        box = (left, top, left + side, top + side)
        axes = Axes(picture, box, _edges(radii), _edges(speeds))
        _draw_cells(axes, values, top_value)
        axes.draw.text((left, top - 12), title, INK, FONT, anchor="ls", stroke_width=0.5)
        r_ticks = _ticks_within(*axes.x_range)
        v_ticks = _ticks_within(*axes.y_range)
        axes.draw_axes("radius, units", "initial speed, units/s", r_ticks, v_ticks)
        _draw_training_ranges(axes)
        _draw_color_bar(axes, top_value)
    pictures.save_picture(path, picture.reduce(2))


def _edges(middles):
    """The outer edges of the first and the last of equal cells."""
    half = (middles[1] - middles[0]) / 2
    low, high = middles[0] - half, middles[-1] + half
    return low.item(), high.item()


def _ticks_within(low, high):
    """Ticks from low to high; none lies outside."""
    values = ticks(low, high, most=6)
    return [value for value in values if low - 1e-9 <= value <= high + 1e-9]


def _draw_shades(axes, shares, size, box, resample):
    """Shares as colours, row by row from the top: `size` cells that fill a box with a border."""
    left, top, right, bottom = box
    cells = Image.new("RGB", size)
    cells.putdata([shade(share) for share in shares])
    cells = cells.resize((right - left, bottom - top), resample)
    axes.picture.paste(cells, (left, top))
    axes.draw.rectangle(box, outline=INK, width=2)


def _draw_cells(axes, values, top_value):
    """A coloured cell per value (radii, speeds); the row of the lowest speed is at the bottom."""
    rows = values.T.flip(0).tolist()
    shares = [value / top_value for row in rows for value in row]
    _draw_shades(axes, shares, tuple(values.shape), axes.box, Image.NEAREST)


def _draw_training_ranges(axes):
    """The range of pre-training in black, the bands of GRPO's prompts in blue, and their names."""
    radius, = sim.RADIUS["pretrain"]
    speed, = sim.SPEED["pretrain"]
    axes.outline(radius, speed, INK)
    for radii in sim.RADIUS["posttrain"]:
        for speeds in sim.SPEED["posttrain"]:
            axes.outline(radii, speeds, BLUE)
    middle, top = sum(radius) / 2, speed[1]
    halo = {"stroke_width": 4, "stroke_fill": "white"}
    axes.draw.text(axes.place(middle, top - 0.4), "training range", INK, SMALL, "mm", **halo)
    axes.draw.text(axes.place(middle, top + 0.3), "RL bands", BLUE, SMALL, "mm", **halo)


def _draw_color_bar(axes, top_value):
    """The colours of 0 to the top value, with ticks; "+": larger values have the top's colour."""
    _, top, right, bottom = axes.box
    left, right = right + 24, right + 52
    shares = [1 - i / 255 for i in range(256)]
    _draw_shades(axes, shares, (1, 256), (left, top, right, bottom), Image.BICUBIC)
    marks = _ticks_within(0.0, top_value)
    for mark, text in zip(marks, written(marks)):
        y = bottom - mark / top_value * (bottom - top)
        if mark == top_value:
            text += "+"
        axes.draw.line((right, y, right + 8, y), INK, 2)
        axes.draw.text((right + 14, y), text, INK, SMALL, anchor="lm")
