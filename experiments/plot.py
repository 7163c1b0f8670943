"""
Charts and heat maps as PNGs, with Pillow alone: drawn at twice the size and reduced.

`chart` draws curves: round ticks, axis titles, a legend where no curve is, running means over
pale raw curves. `heat_maps` draws a measure over radius and speed, with the ranges of training.
"""
import math
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

import pictures
import sim

INK, PALE, GREY, BLUE = (30, 30, 30), (228, 228, 228), (150, 150, 150), (0, 70, 200)
COLORS = ((0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (230, 159, 0), (60, 60, 60))
SHADES = ((255, 255, 255), (254, 224, 180), (253, 158, 90), (215, 48, 31), (110, 0, 20))
FONT, SMALL = ImageFont.load_default(size=28), ImageFont.load_default(size=24)

Points = list[tuple[float, float]]


# ------------------------------------------------------------------ numbers

def ticks(low: float, high: float, *, whole: bool = False, most: int = 7) -> list[float]:
    """Round values, 1, 2 or 5 x 10^k apart, that cover low to high in at most `most` steps."""
    span = high - low or abs(high) or 1.0
    power = math.floor(math.log10(span)) - 2
    for step in (factor * 10.0 ** k for k in range(power, power + 5) for factor in (1, 2, 5)):
        first = math.floor(low / step + 1e-9)
        last = max(math.ceil(high / step - 1e-9), first + 1)
        if last - first <= most and (step >= 1 or not whole):
            break
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def log_ticks(low: float, high: float, *, most: int = 9) -> list[float]:
    """1, 2, 5 x 10^k that cover low to high (both > 0); powers of 10 if those are too many."""
    powers = range(math.floor(math.log10(low)), math.floor(math.log10(high)) + 2)
    for factors in ((1, 2, 5), (1,)):
        values = [float(f"{factor}e{k}") for k in powers for factor in factors]
        first = max(i for i, value in enumerate(values) if value <= low)
        last = min(i for i, value in enumerate(values) if value >= high)
        if last - first <= most:
            break
    return values[first:max(last, first + 1) + 1]


def written(values: list[float]) -> list[str]:
    """Ticks as text, all with the decimals that one of them needs: 0.0, 0.5, 1.0; 5000, 10k, 5M."""
    decimals = max(len(f"{value:.10f}".rstrip("0").split(".")[1]) for value in values)

    def text(value):
        if abs(value) >= 1e6:
            return f"{value / 1e6:g}M"
        return f"{value / 1e3:g}k" if abs(value) >= 1e4 else f"{value:.{decimals}f}"
    return [text(value) for value in values]


def smooth(points: Points, window: int) -> Points:
    """Running means of y over `window` points, or all if fewer, at the middle of their x."""
    window = min(window, len(points))
    parts = [points[i:i + window] for i in range(len(points) - window + 1) if window]
    return [((part[0][0] + part[-1][0]) / 2, sum(y for _, y in part) / window) for part in parts]


# ------------------------------------------------------------------ curves

def chart(path: Path, x_label: str, y_label: str, curves: dict[str, Points], *, window: int = 1,
          log_x: bool = False, width: int = 720, height: int = 420) -> None:
    """
    Curves {name: [(x, y), ...]} as a PNG, NaN left out. Raises ValueError if nothing is left.

    window: the running mean over so many points is drawn, the points themselves pale behind it.
    The axis of y begins at 0 unless all values are far from it. Whole x (int) get whole ticks.
    """
    finite = [[point for point in points if math.isfinite(point[1])] for points in curves.values()]
    names = [name if points else f"{name}: no values" for name, points in zip(curves, finite)]
    colors = [COLORS[i % len(COLORS)] for i in range(len(names))]
    x_all, y_all = ([point[i] for points in finite for point in points] for i in (0, 1))
    if not x_all:
        raise ValueError(f"{path}: no finite point to draw")
    whole = all(isinstance(x, int) for x in x_all)
    if log_x:
        x_ticks = log_ticks(min(x_all), max(x_all))
    else:
        x_ticks = ticks(min(x_all), max(x_all), whole=whole, most=10)
    low, high = min(y_all), max(y_all)
    y_ticks = ticks(0.0 if 0 <= low < high / 2 else low, high)
    left, top, right, bottom = 2 * 78, 2 * 16, 2 * (width - 24), 2 * (height - 58)
    scale = math.log10 if log_x else float

    def place(x, y):
        across = (scale(x) - scale(x_ticks[0])) / (scale(x_ticks[-1]) - scale(x_ticks[0]))
        up = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return left + (right - left) * across, bottom - (bottom - top) * up

    wide, tall = max(map(FONT.getlength, names)) + 90, 36 * len(names) + 16
    sides = right - 14 - wide, left + 14
    corners = [(x, y) for y in (top + 10, bottom - 10 - tall) for x in sides]
    for _ in range(9):                            # more room on top until the legend hides no curve
        lines = [[place(*point) for point in points] for points in finite]
        dots = [dot for line in lines for dot in _along(line)]
        hidden = [sum(-8 < a - x < wide + 8 and -8 < b - y < tall + 8 for a, b in dots)
                  for x, y in corners]
        if min(hidden) == 0 or len(names) == 1:
            break
        y_ticks.append(float(f"{2 * y_ticks[-1] - y_ticks[-2]:.12g}"))

    picture = Image.new("RGB", (2 * width, 2 * height), "white")
    draw = ImageDraw.Draw(picture)
    for y in y_ticks:
        draw.line((left, place(x_ticks[0], y)[1], right, place(x_ticks[0], y)[1]), PALE, 2)
    _axes(picture, (left, top, right, bottom), x_label, y_label,
          [place(x, y_ticks[0])[0] for x in x_ticks], written(x_ticks),
          [place(x_ticks[0], y)[1] for y in y_ticks], written(y_ticks))
    for raw in (True, False) if window > 1 else (False,):
        for color, points in zip(colors, finite):
            if raw:
                color, thick = tuple(255 - (255 - c) * 3 // 10 for c in color), 3
            else:
                points, thick = smooth(points, window), 5
            line = [place(*point) for point in points]
            for x, y in line if len(line) <= 16 and not raw else ():
                draw.ellipse((x - 7, y - 7, x + 7, y + 7), color)
            if line:
                draw.line(line, color, thick, joint="curve")
    if len(names) > 1:
        x, y = corners[hidden.index(min(hidden))]
        draw.rectangle((x, y, x + wide, y + tall), "white", PALE, 2)
        for color, name in zip(colors, names):
            draw.line((x + 16, y + 26, x + 60, y + 26), color, 5)
            draw.text((x + 74, y + 26), name, INK, FONT, anchor="lm")
            y += 36
    pictures.save_picture(path, picture.reduce(2))


def _along(line: Points) -> Points:
    """The points of a line and 20 between each two."""
    return line[-1:] + [(a + (c - a) * i / 21, b + (d - b) * i / 21)
                        for (a, b), (c, d) in zip(line, line[1:]) for i in range(21)]


def _axes(picture: Image.Image, box: tuple, x_label: str, y_label: str,
          x_places: list, x_texts: list[str], y_places: list, y_texts: list[str]) -> None:
    """Axes at the left and the bottom of a box with ticks and titles; places are pixels."""
    left, top, right, bottom = box
    draw = ImageDraw.Draw(picture)
    draw.line([(left, top), (left, bottom), (right, bottom)], INK, 2)
    for x, text in zip(x_places, x_texts):
        draw.line((x, bottom, x, bottom + 8), INK, 2)
        draw.text((x, bottom + 12), text, INK, SMALL, anchor="ma")
    for y, text in zip(y_places, y_texts):
        draw.line((left - 8, y, left, y), INK, 2)
        draw.text((left - 14, y), text, INK, SMALL, anchor="rm")
    draw.text(((left + right) / 2, bottom + 50), x_label, INK, FONT, anchor="ma")
    title = Image.new("RGB", (int(FONT.getlength(y_label)) + 4, 38), "white")
    ImageDraw.Draw(title).text((2, 2), y_label, INK, FONT)
    title = title.rotate(90, expand=True)
    margin = 24 + max(SMALL.getlength(text) for text in y_texts)
    picture.paste(title, (int(left - margin - title.width), int((top + bottom - title.height) / 2)))


# ------------------------------------------------------------------ maps

def shade(share: float) -> tuple[int, int, int]:
    """The colour of a share of the top value: white 0, dark red from 1 on, grey NaN."""
    if not math.isfinite(share):
        return GREY
    where = min(max(share, 0.0), 1.0) * (len(SHADES) - 1)
    i = min(int(where), len(SHADES) - 2)
    return tuple(round(a + (b - a) * (where - i)) for a, b in zip(SHADES[i], SHADES[i + 1]))


def heat_maps(path: Path, panels: list[tuple[str, Tensor, float]], radii: Tensor, speeds: Tensor,
              side: int = 280) -> None:
    """
    Panels (title, values (radii, speeds), value of the darkest colour), two in a row, as a PNG.

    radii in units and speeds in units/s are the middles of equal cells. A cell of NaN is grey.
    """
    across, down = 2 * (side + 122), 2 * (side + 92)
    size = across * min(2, len(panels)), down * math.ceil(len(panels) / 2)
    picture = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(picture)

    def edges(middles):
        half = (middles[1] - middles[0]) / 2
        return (middles[0] - half).item(), (middles[-1] + half).item()

    def within(low, high):
        return [tick for tick in ticks(low, high, most=6) if low - 1e-9 <= tick <= high + 1e-9]

    (r0, r1), (v0, v1) = edges(radii), edges(speeds)
    for i, (title, values, high) in enumerate(panels):
        left, top = 2 * 58 + i % 2 * across, 2 * 32 + i // 2 * down
        right, bottom = left + 2 * side, top + 2 * side

        def place(r, v):
            return left + (r - r0) / (r1 - r0) * 2 * side, bottom - (v - v0) / (v1 - v0) * 2 * side

        cells = Image.new("RGB", (len(radii), len(speeds)))
        cells.putdata([shade(x / high) for row in values.T.flip(0).tolist() for x in row])
        picture.paste(cells.resize((2 * side, 2 * side), Image.NEAREST), (left, top))
        draw.rectangle((left, top, right, bottom), outline=INK, width=2)
        draw.text((left, top - 12), title, INK, FONT, anchor="ls", stroke_width=0.5)
        _axes(picture, (left, top, right, bottom), "radius, units", "initial speed, units/s",
              [place(r, v0)[0] for r in within(r0, r1)], written(within(r0, r1)),
              [place(r0, v)[1] for v in within(v0, v1)], written(within(v0, v1)))

        (a, b), = sim.RADIUS["pretrain"]
        (c, d), = sim.SPEED["pretrain"]
        draw.rectangle((*place(a, d), *place(b, c)), outline=INK, width=5)
        for r in sim.RADIUS["posttrain"]:
            for v in sim.SPEED["posttrain"]:
                draw.rectangle((*place(r[0], v[1]), *place(r[1], v[0])), outline=BLUE, width=5)
        for name, color, v in (("training range", INK, d - 0.4), ("RL bands", BLUE, d + 0.3)):
            middle = place((a + b) / 2, v)
            draw.text(middle, name, color, SMALL, "mm", stroke_width=4, stroke_fill="white")

        bar = Image.new("RGB", (1, 256))
        bar.putdata([shade(1 - j / 255) for j in range(256)])
        picture.paste(bar.resize((28, 2 * side)), (right + 24, top))
        draw.rectangle((right + 24, top, right + 52, bottom), outline=INK, width=2)
        marks = within(0.0, high)
        for tick, text in zip(marks, written(marks)):
            y = bottom - tick / high * 2 * side
            draw.line((right + 52, y, right + 60, y), INK, 2)
            draw.text((right + 66, y), text + "+" * (tick == high), INK, SMALL, anchor="lm")
    pictures.save_picture(path, picture.reduce(2))
