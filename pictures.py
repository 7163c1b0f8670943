"""
Film strips (PNG) and moving pictures (GIF) of clips, with the true balls outlined over predictions.

Drawn at twice the size and reduced, by Pillow alone.

Axes: n clips, F frames, H W pixels, N balls.
"""
import os
from pathlib import Path
from typing import Callable

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from evaluate import EVAL_SEED
from sim import CONDITION, DT, WORLD, Clips, render, sample, to_uint8


def save_picture(path, picture: Image.Image, **options) -> None:
    """Writes aside and renames: a write that breaks off leaves no half picture."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".part")
    try:
        picture.save(aside, format=path.suffix[1:], **options)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def _tile(groups: list, columns: list[str], spans: list, given: int, pixels: int) -> Image.Image:
    """
    A table of pictures, drawn at twice the size and reduced.

    groups: (title, {label: pictures (n, 3, H, W)}, balls), set apart from each other; `balls`, per
    column (centres (N, 2), radii (N,)), are outlined over every picture. columns: n headings.
    spans: (text, first, end) over the headings. The first `given` columns are framed in blue.
    """
    font = ImageFont.load_default(size=26)
    side, gap, line = 2 * pixels, 8, 36
    ink, grey, blue = (30, 30, 30), (190, 190, 190), (0, 90, 180)
    labels = [label for _, rows, _ in groups for label in rows]
    widest = max(font.getlength(label) for label in labels)
    left = gap + 2 * bool(widest) * gap + int(widest) // 2 * 2           # even: frames stay sharp
    lines = max(heading.count("\n") + bool(heading) for heading in columns)
    top = gap + line * lines + (line + gap) * bool(spans)
    heights = [(line + gap) * bool(title) + (side + gap) * len(rows) + 2 * gap
               for title, rows, _ in groups]
    x = [left + column * (side + gap) for column in range(len(columns) + 1)]
    canvas = Image.new("RGB", (x[-1], top + sum(heights)), "white")
    draw = ImageDraw.Draw(canvas)
    for text, first, end in spans:
        color, middle = blue if first < given else ink, (x[first] + x[end] - gap) / 2
        draw.text((middle, line), text, color, font, anchor="ms")
        draw.line((x[first], line + gap, x[end] - gap - 1, line + gap), color, width=3)
    for column, heading in enumerate(columns):
        for i, text in enumerate(reversed(heading.split("\n"))):
            draw.text((x[column] + side / 2, top - gap - i * line), text, ink, font, anchor="ms")
    y = top
    for title, rows, balls in groups:
        if title:
            y += line + gap
            draw.text((left, y - gap), title, ink, font, anchor="ls", stroke_width=0.5)
        for label, pictures in rows.items():
            draw.text((left - 2 * gap, y + pixels), label, ink, font, anchor="rm")
            images = to_uint8(pictures).permute(0, 2, 3, 1).cpu().numpy()
            for column, picture in enumerate(images):
                tile = Image.fromarray(picture).resize((side, side), Image.BICUBIC)
                brush = ImageDraw.Draw(tile)
                for center, radius in zip(*balls[column]) if balls else ():
                    a, b, r = (value * side / WORLD for value in (*center.tolist(), radius.item()))
                    brush.ellipse((a - r, side - b - r, a + r, side - b + r), outline=ink, width=3)
                color, width = (blue, 6) if column < given else (grey, 2)
                brush.rectangle((0, 0, side - 1, side - 1), outline=color, width=width)
                canvas.paste(tile, (x[column], y))
            y += side + gap
        y += 2 * gap
    return canvas.reduce(2)


def save_strip(path, videos: dict[str, Tensor], names: list[str], *, truth: list[Clips] = (),
               given: int = 0, every: int = 4, columns: list[str] = (), pixels: int = 80) -> None:
    """
    A film strip as one PNG. Each clip is a group of rows, one row per label.

    videos: {label: (n, F, 3, H, W)}; names: one per clip. truth: n times one clip, whose balls are
    outlined over every picture. Shown are the last of the `given` frames, framed, and from there on
    every `every`-th, under their times; with headings in `columns`, all F pictures under those.
    """
    F = next(iter(videos.values())).shape[1]
    shown = list(range(F) if columns else range(max(given - 1, 0), F, every))
    columns = list(columns) or [f"{DT * f:.1f} s" for f in shown]
    groups = []
    for i, name in enumerate(names):
        rows = {label: video[i, shown] for label, video in videos.items()}
        balls = [(truth[i].position[0, f], truth[i].radius[0]) for f in shown] if truth else ()
        groups.append((name.replace("\n", ", "), rows, balls))
    n = sum(f < given for f in shown)
    spans = [("given", 0, n), ("predicted", n, len(shown))] if n else []
    save_picture(path, _tile(groups, columns, spans, n, pixels))


def save_gif(path, videos: dict[str, Tensor], names: list[str], *, truth: list[Clips] = (),
             given: int = 0, pixels: int = 128) -> None:
    """
    A moving picture: clips side by side under their names, a row per label (see `save_strip`).

    It plays in real time, but holds the last given frame for 0.5 s and the last of all for 1.5 s.
    """
    F, n, images = next(iter(videos.values())).shape[1], len(names), []
    for f in range(F):
        rows = {label: video[:, f] for label, video in videos.items()}
        balls = [(clip.position[0, f], clip.radius[0]) for clip in truth]
        text = f"{DT * f:.1f} s"
        if given:
            text = f"{'given' if f < given else 'predicted'}, {text}"
        images.append(_tile([("", rows, balls)], names, [(text, 0, n)], n * (f < given), pixels))
    stack = np.concatenate(images)
    stack[stack >= 248] = 255                          # noise too faint to be seen triples the file
    stack = Image.fromarray(stack).quantize(64, dither=Image.Dither.NONE)
    width, height = images[0].size
    first, *others = [stack.crop((0, f * height, width, (f + 1) * height)) for f in range(F)]
    hold = {given - 1: 500, F - 1: 1500}
    duration = [hold.get(f, int(1000 * DT)) for f in range(F)]                     # milliseconds
    save_picture(path, first, save_all=True, append_images=others, duration=duration, loop=0)


def save_predictions(out: Path, predictors: dict[str, Callable[[Tensor], Tensor]], scenario: str,
                     size: int, device) -> None:
    """
    <out>/clips.gif and clips.png: the first held-out clip of five splits, truth above predictions.
    predictors: as evaluate.evaluate wants them.
    """
    splits = ("posttrain", "iid", "fast", "large", "slow")
    clips = [sample(scenario, split, 1, EVAL_SEED) for split in splits]
    frames = torch.cat([render(c.position, c.radius, size) for c in clips]).to(device)
    videos = {"truth": frames}
    for name, predict in predictors.items():
        videos[name] = predict(frames[:, :CONDITION])
    titles = [f"{split}\nradius {c.radius[0, 0]:.1f}, speed {c.velocity[0, 0]:.1f}"
              for split, c in zip(splits, clips)]
    save_gif(out / "clips.gif", videos, titles, truth=clips, given=CONDITION)
    save_strip(out / "clips.png", videos, titles, truth=clips, given=CONDITION)
    print(f"\nresults: {out}/results.json   pictures: {out}/clips.gif, {out}/clips.png")
