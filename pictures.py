"""
Film strips (PNG) and GIFs of clips, with the true balls outlined over the predicted frames.

Drawn with Pillow, at twice the size, and reduced to half at the end: this smooths text and lines.

Axes: n clips, F frames, N balls, H W pixels.
"""
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from checkpoint import replacing
from evaluate import EVAL_SEED, Predictor
from sim import CONDITION, DT, WORLD, Clips, check_frames, render, sample, to_uint8

INK = (30, 30, 30)
GREY = (190, 190, 190)
BLUE = (0, 90, 180)
FONT = ImageFont.load_default(size=26)
LINE = 36                               # height of a line of text in pixels before the reduction
GAP = 8


def save_picture(path, picture: Image.Image, **options) -> None:
    """Saves a picture as a whole file or not at all, in a folder that is made if need be."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part:
        picture.save(part, format=path.suffix[1:], **options)


def is_whole(path) -> bool:
    """Whether a picture is there and can be read to its end. PNG holds checksums of its pixels."""
    try:
        with Image.open(path) as picture:
            picture.load()
        return True
    except (OSError, SyntaxError, ValueError):              # SyntaxError: a damaged header
        return False


def _true_balls(truth, i, f):
    """Centre (2,) and radius () of each ball of clip i in frame f; no ball if `truth` is empty."""
    if not truth:
        return []
    clip = truth[i]
    return list(zip(clip.position[0, f], clip.radius[0]))


def _draw_frame(frame, balls, side, given):
    """A frame (3, H, W) with the outlines of balls and a border, which is blue if it is given."""
    check_frames(frame)
    pixels = to_uint8(frame).permute(1, 2, 0).cpu().numpy()
    picture = Image.fromarray(pixels).resize((side, side), Image.BICUBIC)
    draw = ImageDraw.Draw(picture)
    for center, radius in balls:
        x, y = center.tolist()
        x, y, r = [value * side / WORLD for value in (x, y, radius.item())]
        y = side - y                                   # row 0 is on top
        draw.ellipse((x - r, y - r, x + r, y + r), outline=INK, width=3)
    color, width = (BLUE, 6) if given else (GREY, 2)
    draw.rectangle((0, 0, side - 1, side - 1), outline=color, width=width)
    return picture


def _draw_table(groups, columns, spans, given, pixels):
    """
    A table of frames, `pixels` wide each, with labelled rows and columns.

    groups: (title, {label: frames (n, 3, H, W)}, balls): rows that are set apart from other groups.
    balls: the `_true_balls` of each column, outlined in all its rows. columns: n headings.
    spans: (text, first, end), a heading over the columns first to end - 1. given: number of columns
    with a blue border.
    """
    side = 2 * pixels
    labels = [label for _, rows, _ in groups for label in rows]
    label_width = max(FONT.getlength(label) for label in labels)
    left = GAP + int(label_width) // 2 * 2             # even: frames stay sharp when reduced
    if label_width > 0:
        left += 2 * GAP
    x = [left + column * (side + GAP) for column in range(len(columns) + 1)]

    top = GAP + LINE * max(len(heading.splitlines()) for heading in columns)
    if spans:
        top += LINE + GAP
    height = top
    for title, rows, _ in groups:
        height += (side + GAP) * len(rows) + 2 * GAP
        if title:
            height += LINE + GAP
    canvas = Image.new("RGB", (x[-1], height), "white")
    draw = ImageDraw.Draw(canvas)
    _draw_spans(draw, spans, x, given)
    _draw_headings(draw, columns, x, side, top - GAP)

    y = top
    for title, rows, balls in groups:
        if title:
            y += LINE + GAP
            draw.text((left, y - GAP), title, INK, FONT, anchor="ls", stroke_width=0.5)
        for label, frames in rows.items():
            draw.text((left - 2 * GAP, y + pixels), label, INK, FONT, anchor="rm")
            for column, frame in enumerate(frames):
                picture = _draw_frame(frame, balls[column], side, column < given)
                canvas.paste(picture, (x[column], y))
            y += side + GAP
        y += 2 * GAP
    return canvas.reduce(2)


def _draw_spans(draw, spans, x, given):
    """Headings over several columns, underlined, blue over given ones; x: where columns begin."""
    for text, first, end in spans:
        color = BLUE if first < given else INK
        start = x[first]
        stop = x[end] - GAP
        middle = (start + stop) / 2
        draw.text((middle, LINE), text, color, FONT, anchor="ms")
        draw.line((start, LINE + GAP, stop - 1, LINE + GAP), color, width=3)


def _draw_headings(draw, columns, x, side, bottom):
    """The heading of each column, begun at x; its last line is at `bottom`."""
    for start, heading in zip(x, columns):
        y = bottom
        for text in reversed(heading.splitlines()):
            draw.text((start + side / 2, y), text, INK, FONT, anchor="ms")
            y -= LINE


def save_strip(path, videos: dict[str, Tensor], names: list[str], *, truth: list[Clips] = (),
               given: int = 0, every: int = 4, columns: list[str] = (), pixels: int = 80) -> None:
    """
    A film strip as one PNG: time runs to the right. Each clip is a group with one row per video.

    videos: {label: (n, F, 3, H, W)}; names: one per clip. truth: per clip a `Clips` of length 1,
    whose balls are outlined over every picture. The strip shows every `every`-th frame under its
    time, from the last `given` one on; with `columns`, F headings, it shows all frames.
    """
    F = next(iter(videos.values())).shape[1]
    if columns:
        shown = list(range(F))
    else:
        shown = list(range(max(given - 1, 0), F, every))
        columns = [f"{DT * f:.1f} s" for f in shown]
    groups = []
    for i, name in enumerate(names):
        rows = {label: video[i, shown] for label, video in videos.items()}
        balls = [_true_balls(truth, i, f) for f in shown]
        groups.append((name.replace("\n", ", "), rows, balls))
    shown_given = sum(f < given for f in shown)
    spans = []
    if shown_given:
        spans = [("given", 0, shown_given), ("predicted", shown_given, len(shown))]
    save_picture(path, _draw_table(groups, columns, spans, shown_given, pixels))


def save_gif(path, videos: dict[str, Tensor], names: list[str], *, truth: list[Clips] = (),
             given: int = 0, pixels: int = 128) -> None:
    """
    A GIF: clips side by side under their names, one row per video. Arguments as for `save_strip`.

    It plays in real time, but holds the last given frame for 0.5 s and the last of all for 1.5 s.
    """
    F = next(iter(videos.values())).shape[1]
    n = len(names)
    images = []
    for f in range(F):
        rows = {label: video[:, f] for label, video in videos.items()}
        balls = [_true_balls(truth, i, f) for i in range(n)]
        time = f"{DT * f:.1f} s"
        blue = 0                                       # number of columns with a blue border
        if f < given:
            time = f"given, {time}"
            blue = n
        elif given:
            time = f"predicted, {time}"
        groups = [("", rows, balls)]
        spans = [(time, 0, n)]
        image = _draw_table(groups, names, spans, blue, pixels)
        images.append(image)

    # All images as one, below each other, get one palette of 64 colours.
    stack = np.concatenate(images)
    stack[stack >= 248] = 255                          # noise too faint to be seen triples the file
    stack = Image.fromarray(stack).quantize(64, dither=Image.Dither.NONE)
    width, height = images[0].size
    tops = range(0, F * height, height)
    first, *others = [stack.crop((0, top, width, top + height)) for top in tops]
    hold = {given - 1: 500, F - 1: 1500}               # milliseconds
    duration = [hold.get(f, int(1000 * DT)) for f in range(F)]
    save_picture(path, first, save_all=True, append_images=others, duration=duration, loop=0)


def save_predictions(out: Path, predictors: dict[str, Predictor], scenario: str, size: int,
                     device) -> None:
    """<out>/clips.gif and clips.png: a held-out clip of each of five splits, true and predicted."""
    splits = ("posttrain", "iid", "fast", "large", "slow")
    clips = [sample(scenario, split, 1, EVAL_SEED) for split in splits]
    frames = [render(clip.position, clip.radius, size) for clip in clips]
    frames = torch.cat(frames).to(device)
    videos = {"truth": frames}
    for name, predict in predictors.items():
        videos[name] = predict(frames[:, :CONDITION])
    titles = []
    for split, clip in zip(splits, clips):
        radius = clip.radius[0, 0]
        speed = clip.velocity[0, 0]
        titles.append(f"{split}\nradius {radius:.1f}, speed {speed:.1f}")
    save_gif(out / "clips.gif", videos, titles, truth=clips, given=CONDITION)
    save_strip(out / "clips.png", videos, titles, truth=clips, given=CONDITION)
    print(f"\nresults: {out}/results.json   pictures: {out}/clips.gif, {out}/clips.png")
