"""
Clips of moving balls: the physics (pymunk), the start rules, and the pictures.

A data set here is nothing but the initial states of its clips. `sample` draws them and lets pymunk play them out,
`render` paints them when somebody needs pixels. Three million clips are so about 50 MB of initial states; as stored
128 x 128 frames they would be 4.7 TB.

Source: PhyWorld's three motions as used by Phys-AR (section 4.1 and appendix C): `uniform` (one ball, no forces),
`parabola` (one ball thrown horizontally, gravity 2.5) and `collision` (two balls head-on, elastic).

Differences from PhyWorld's data
1. Frame 0 is at t = 0; PhyWorld stores it one solver step (0.01 s) later.
2. Every collision is elastic. PhyWorld's Box2D makes contacts with a closing speed of 1 or less inelastic.
3. Edges are anti-aliased by area coverage, and a pixel's centre is where it is: drawing and measuring share one scale.
4. A collision for which the view has no room (fast and large balls) is drawn again instead of being dropped, so that
   `sample(..., n)` returns n clips. Ranges that are unions of two intervals are drawn uniformly over the union.

    python sim.py                                # a GIF and a PNG film strip per scenario in runs/sim
    python sim.py --split fast --size 256        # any split, any size

Takes 3 seconds on 2 CPU cores.

Axes: B clips, F frames, N balls, C colour channels, H W pixels.
Units: world units (the view is 10 x 10, y up), seconds, units per second. Frame f is at t = 0.1 f.
"""
import argparse
import dataclasses
import math
import os
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pymunk
import pymunk.batch
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

SCENARIOS = ("uniform", "parabola", "collision")
WORLD = 10.0        # side of the square view
DT = 0.1            # seconds between frames
FRAMES = 32         # frames of a clip
CONDITION = 3       # the first frames, which the models are shown
GRAVITY = 2.5       # parabola only
SUBSTEPS = 250      # solver steps a frame: a collision is noticed at most one step late, so positions are off by at
                    # most (change of speed) * 0.1 / 250, about 0.006 at the fastest impact of any split
SCENES = 512        # scenes that share one pymunk Space

# ------------------------------------------------------------------ initial states

# [S4.1]. `low` and `high` are the two halves of the out-of-distribution range.
RADIUS = {"pretrain": [(0.8, 1.4)], "posttrain": [(0.7, 0.8), (1.4, 1.5)], "iid": [(0.7, 1.5)],
          "ood": [(0.3, 0.6), (1.5, 2.0)], "low": [(0.3, 0.6)], "high": [(1.5, 2.0)]}
SPEED = {"pretrain": [(1.5, 3.5)], "posttrain": [(1.0, 1.5), (3.5, 4.0)], "iid": [(1.0, 4.0)],
         "ood": [(0.0, 0.8), (4.5, 6.0)], "low": [(0.0, 0.8)], "high": [(4.5, 6.0)]}

# Splits by name: the ranges of the balls' radii, then of their speeds. [C] names the ood levels; `ood` is all of them in
# equal shares. slow, fast, small, large show apart what ood-v and ood-r average.
_SAME = {s: (s, s) for s in ("pretrain", "posttrain", "iid")}
ONE_BALL = _SAME | {"ood-r": ("ood", "iid"), "ood-v": ("iid", "ood"), "ood-rv": ("ood", "ood"),
                    "slow": ("iid", "low"), "fast": ("iid", "high"), "small": ("low", "iid"), "large": ("high", "iid")}
TWO_BALLS = {s: (r, r, v, v) for s, (r, v) in _SAME.items()} | {
    "ood-r1": ("ood", "iid", "iid", "iid"), "ood-v1": ("iid", "iid", "ood", "iid"),
    "ood-r1r2": ("ood", "ood", "iid", "iid"), "ood-v1v2": ("iid", "iid", "ood", "ood"),
    "ood-r1v1": ("ood", "iid", "ood", "iid"), "ood-all": ("ood", "ood", "ood", "ood"),
    "slow": ("iid", "iid", "low", "iid"), "fast": ("iid", "iid", "high", "iid"),
    "small": ("low", "iid", "iid", "iid"), "large": ("high", "iid", "iid", "iid")}


def splits(scenario: str) -> dict[str, tuple[str, ...]]:
    """Every split of a scenario but `ood`: name -> range names of (radius per ball, speed per ball)."""
    if scenario not in SCENARIOS:
        raise ValueError(f"unknown scenario {scenario!r}: choose one of {', '.join(SCENARIOS)}")
    return TWO_BALLS if scenario == "collision" else ONE_BALL


def levels(scenario: str) -> list[str]:
    """The out-of-distribution levels that make up the split `ood`."""
    return [name for name in splits(scenario) if name.startswith("ood-")]


SHOWN = ("iid", "ood", "slow", "fast", "small", "large")      # the splits of the result tables


@dataclass
class Clips:
    """Simulated clips. Positions are float64 and exact enough to be the ground truth of every measurement."""
    scenario: str
    radius: Tensor      # (B, N)
    velocity: Tensor    # (B, N)        initial speed >= 0, the paper's v; the second ball of a collision moves left
    position: Tensor    # (B, F, N, 2)  centres
    inside: Tensor      # (B, F, N)     the ball is wholly in view

    def __len__(self) -> int:
        return len(self.radius)

    def _map(self, f) -> "Clips":
        return Clips(self.scenario, *(f(getattr(self, field.name)) for field in dataclasses.fields(self)[1:]))

    def __getitem__(self, index) -> "Clips":
        """Clips at `index`, a slice or a tensor of indices."""
        return self._map(lambda x: x[index])

    def to(self, device) -> "Clips":
        return self._map(lambda x: x.to(device))


def sample(scenario: str, split: str, n: int, seed: int = 0) -> Clips:
    """
    n simulated clips of a split. The same arguments give the same clips on every machine and rank.

    split: pretrain, posttrain, iid, ood (all levels in equal shares), a level (see `levels`), slow, fast, small, large.
    Raises ValueError for an unknown scenario or split and for n < 1.
    """
    return play(first_frames(scenario, split, n, seed))


def first_frames(scenario: str, split: str, n: int, seed: int = 0) -> Clips:
    """What `sample` simulates: clips of one frame, F = 1. All there is to a data set of millions."""
    known = splits(scenario)
    if split not in known and split != "ood":
        raise ValueError(f"unknown split {split!r} of {scenario}: choose one of ood, {', '.join(known)}")
    if n < 1:
        raise ValueError(f"n = {n}: a sample needs at least one clip")
    if seed < 0:
        raise ValueError(f"seed = {seed}: must be at least 0")
    names = levels(scenario) if split == "ood" else [split]
    share = [n // len(names) + (i < n % len(names)) for i in range(len(names))]
    drawn = [_initial_states(scenario, name, k, seed) for name, k in zip(names, share) if k]
    radius, velocity, start = (torch.from_numpy(np.concatenate(x)) for x in zip(*drawn))
    return Clips(scenario, radius, velocity, start[:, None], _inside(radius, start[:, None]))


def play(first: Clips) -> Clips:
    """Clips of which the first frame is known -> the whole clips, simulated."""
    position = simulate(first.scenario, first.radius, first.velocity, first.position[:, 0])
    return Clips(first.scenario, first.radius, first.velocity, position, _inside(first.radius, position))


def _inside(radius: Tensor, position: Tensor) -> Tensor:
    return ((position >= radius[:, None, :, None]) & (position <= WORLD - radius[:, None, :, None])).all(-1)


def _initial_states(scenario: str, split: str, n: int, seed: int) -> tuple[np.ndarray, ...]:
    """PhyWorld's start rules -> radius (n, N), speed (n, N), first centres (n, N, 2)."""
    rng = np.random.default_rng([seed, zlib.crc32(f"{scenario}/{split}".encode())])

    def draw(intervals):                                                 # uniform over a union of intervals
        length = np.array([hi - lo for lo, hi in intervals])
        x = rng.uniform(0, length.sum(), n)
        for (lo, _), before, width in zip(intervals, length.cumsum() - length, length):
            value = np.where((x >= before) & (x <= before + width), lo + x - before, np.nan)
            result = value if before == 0 else np.where(np.isnan(result), value, result)
        return result

    ranges = splits(scenario)[split]
    if scenario != "collision":
        r, v = draw(RADIUS[ranges[0]]), draw(SPEED[ranges[1]])
        room = WORLD - (2.4 * v + r)                                     # in view for 24 frames if started left of this
        x = np.where(room >= r, rng.uniform(r, np.maximum(room, r)), r + rng.uniform(0, 0.5, n))
        low, high = (r + 0.5, 9.5 - r) if scenario == "uniform" else (8.5 - r, 9.5 - r)
        return r[:, None], v[:, None], np.stack([x, rng.uniform(low, high)], -1)[:, None]

    r, v, gap_low, gap_high = np.zeros((n, 2)), np.zeros((n, 2)), np.ones(n), np.zeros(n)
    while (redo := gap_low > gap_high).any():                            # no room for an impact after 0.8 s: draw again
        new_r = np.stack([draw(RADIUS[ranges[i]]) for i in (0, 1)], -1)
        new_v = np.stack([draw(SPEED[ranges[i]]) for i in (2, 3)], -1)
        r, v = np.where(redo[:, None], new_r, r), np.where(redo[:, None], new_v, v)
        closing, touch = v.sum(1), r.sum(1)
        gap_low = 0.8 * closing + touch                                  # centres apart: impact at 0.8 s ...
        gap_high = np.minimum(2.4 * closing + touch, WORLD - touch)      # ... to 2.4 s, both balls in view
    gap = rng.uniform(gap_low, gap_high)
    left = rng.uniform(r[:, 0], np.maximum(WORLD - r[:, 1] - gap, r[:, 0]))
    y = rng.uniform(r.max(1) + 0.5, 9.5 - r.max(1))
    return r, v, np.stack([np.stack([left, y], -1), np.stack([left + gap, y], -1)], 1)


def initial_velocity(scenario: str, speed: Tensor) -> Tensor:
    """Speeds (B, N) -> velocity vectors (B, N, 2) at t = 0. The first ball moves right, the second left."""
    sign = torch.tensor([1.0, -1.0], dtype=speed.dtype, device=speed.device)[: speed.shape[1]]
    return torch.stack([speed * sign, torch.zeros_like(speed)], -1)


# ------------------------------------------------------------------ physics

def simulate(scenario: str, radius: Tensor, velocity: Tensor, start: Tensor, substeps: int = SUBSTEPS,
             scenes: int = SCENES) -> Tensor:
    """
    Plays initial states out in pymunk: radius, velocity (B, N) and start (B, N, 2) -> positions (B, F, N, 2), float64.

    Many scenes share one Space, each in its own storey of a tower, one view height above the last. No scenario changes
    the relative height of two balls (forces act on all alike, impacts are head-on), so storeys never touch.
    Raises ValueError for shapes that do not fit, non-finite values, radius <= 0 or velocity < 0 (pymunk itself would
    abort the process or, worse, go on in silence), and for balls outside the view's height or not head-on.
    """
    splits(scenario)                                                     # raises for an unknown scenario
    balls = 2 if scenario == "collision" else 1
    radius, velocity, start = (torch.as_tensor(x, dtype=torch.float64).cpu() for x in (radius, velocity, start))
    if radius.ndim != 2 or not len(radius) or radius.shape[1] != balls or velocity.shape != radius.shape \
            or start.shape != (*radius.shape, 2):
        raise ValueError(f"{scenario} needs radius (B, {balls}), velocity (B, {balls}), start (B, {balls}, 2); got "
                         f"{tuple(radius.shape)}, {tuple(velocity.shape)}, {tuple(start.shape)}")
    for name, x in (("radius", radius), ("velocity", velocity), ("start", start)):
        if not torch.isfinite(x).all():
            raise ValueError(f"{name} holds NaN or infinity: every initial state must be finite")
    if (radius <= 0).any() or (velocity < 0).any():
        raise ValueError("radius must be > 0 and velocity >= 0 (a speed; directions follow from the scenario)")
    y = start[..., 1]
    if (y < radius).any() or (y > WORLD - radius).any() or (y != y[:, :1]).any():
        raise ValueError("start must lie within the view's height, both balls of a collision at the same height")
    parts = [_simulate_tower(scenario, *(x[i:i + scenes] for x in (radius, velocity, start)), substeps)
             for i in range(0, len(radius), scenes)]
    return torch.cat(parts)


def _simulate_tower(scenario: str, radius: Tensor, speed: Tensor, start: Tensor, substeps: int) -> Tensor:
    B, N = radius.shape
    step = DT / substeps
    velocity = initial_velocity(scenario, speed)
    space = pymunk.Space()
    if scenario == "parabola":
        space.gravity = (0, -GRAVITY)
        velocity[..., 1] -= GRAVITY * step / 2                           # makes symplectic Euler exact for a projectile
    storey = torch.zeros(B, 1, 2, dtype=torch.float64)
    storey[:, 0, 1] = WORLD * torch.arange(B)
    for r, (x, y), v in zip(radius.flatten().tolist(), (start + storey).reshape(-1, 2).tolist(),
                            velocity.reshape(-1, 2).tolist()):
        mass = math.pi * r * r                                           # density 1
        body = pymunk.Body(mass, pymunk.moment_for_circle(mass, 0, r))
        body.position, body.velocity = (x, y), v
        space.add(body)
        if N > 1:                                                        # a single ball meets nothing: no shape needed
            ball = pymunk.Circle(body, r)
            ball.elasticity, ball.friction = 1.0, 0.0
            space.add(ball)

    buffer, frames = pymunk.batch.Buffer(), []
    for frame in range(FRAMES):
        for _ in range(substeps if frame else 0):
            space.step(step)
        buffer.clear()
        pymunk.batch.get_space_bodies(space, pymunk.batch.BodyFields.POSITION, buffer)
        frames.append(np.frombuffer(bytes(buffer.float_buf()), np.float64).reshape(B, N, 2))
    return torch.from_numpy(np.stack(frames, 1)) - storey[:, None]       # (B, F, N, 2)


def impact_time(clips: Clips) -> Tensor:
    """Seconds until the two balls of a collision touch (B,); infinity when they never do, or with one ball."""
    if clips.radius.shape[1] == 1:
        return torch.full((len(clips),), math.inf, dtype=torch.float64, device=clips.radius.device)
    gap = clips.position[:, 0, 1, 0] - clips.position[:, 0, 0, 0] - clips.radius.sum(1)
    closing = clips.velocity.sum(1)
    return torch.where(closing > 0, gap / closing, math.inf)


def closed_form(clips: Clips) -> Tensor:
    """The analytic solution from the clips' own initial states -> positions (B, F, N, 2), float64."""
    t = DT * torch.arange(FRAMES, dtype=torch.float64, device=clips.position.device)[:, None, None]      # (F, 1, 1)
    start = clips.position[:, :1]                                                                        # (B, 1, N, 2)
    before = initial_velocity(clips.scenario, clips.velocity)                                            # (B, N, 2)
    if clips.scenario != "collision":
        position = start + before[:, None] * t                                                           # (B, F, N, 2)
        if clips.scenario == "parabola":
            position[..., 1] -= 0.5 * GRAVITY * t[..., 0] ** 2
        return position
    mass = (clips.radius ** 2)[..., None]                                                                # (B, N, 1)
    mean = (mass * before).sum(1, keepdim=True) / mass.sum(1, keepdim=True)
    after = 2 * mean - before                     # an elastic impact mirrors velocities at that of the centre of mass
    hit = impact_time(clips)[:, None, None, None]
    return start + before[:, None] * t.minimum(hit) + after[:, None] * (t - hit).clamp(min=0)


# ------------------------------------------------------------------ pictures

def render(position: Tensor, radius: Tensor, size: int, slices: int = 8) -> Tensor:
    """
    Paints balls on white, the first red, the second blue -> frames (B, F, 3, size, size), float32 in [0, 1].

    position (B, F, N, 2) and radius (B, N) in world units, on any device. A pixel's colour is mixed by the area the
    ball covers of it: the pixel is cut into `slices` thin columns, and in each the disc is its exact chord. So the
    centre of a painted ball is sub-pixel: velocity_error of perfect 8-bit frames is 0.013 / 0.0037 / 0.0014 at
    32 / 64 / 128 pixels (uniform motion).
    Raises ValueError for shapes that do not fit or NaN.
    """
    if position.ndim != 4 or position.shape[-1] != 2 or radius.shape != position[:, 0, :, 0].shape:
        raise ValueError(f"render needs position (B, F, N, 2) and radius (B, N); got {tuple(position.shape)} and "
                         f"{tuple(radius.shape)}")
    if not (torch.isfinite(position).all() and torch.isfinite(radius).all()):
        raise ValueError("position or radius holds NaN or infinity: nothing can be painted there")
    B, F, N, _ = position.shape
    scale = size / WORLD
    center = (position * scale).float()[..., None, None]                              # (B, F, N, 2, 1, 1) pixels
    cx, cy = center[:, :, :, 0], size - center[:, :, :, 1]                            # (B, F, N, 1, 1)   row 0 is on top
    r = (radius * scale).float()[:, None, :, None, None]                              # (B, 1, N, 1, 1)
    edge = torch.arange(size, device=position.device, dtype=torch.float32)
    column, top = edge[None, :], edge[:, None]                                        # (1, W), (H, 1)
    covered = 0
    for i in range(slices):
        x = column + (i + 0.5) / slices - cx                                          # (B, F, N, 1, W)
        chord = (r * r - x * x).clamp(min=0).sqrt()                                   # half its height
        covered = covered + ((cy + chord).minimum(top + 1) - (cy - chord).maximum(top)).clamp(0, 1)
    covered = covered / slices                                                        # (B, F, N, H, W)
    red = covered[:, :, 0]
    blue = covered[:, :, 1] if N > 1 else torch.zeros_like(red)
    return torch.stack([1 - blue, 1 - red - blue, 1 - red], 2).clamp(0, 1)            # (B, F, 3, H, W)


def to_uint8(frames: Tensor) -> Tensor:
    """Frames in [0, 1] -> the same as stored pictures, uint8."""
    return (frames.clamp(0, 1) * 255).round().to(torch.uint8)


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
    stack = Image.fromarray(np.concatenate(images)).quantize(64, dither=Image.Dither.NONE)
    width, height = images[0].size
    colors, white = stack.getpalette(), 3 * stack.getpixel((0, 0))
    stack.putpalette(colors[:white] + [255, 255, 255] + colors[white + 3:])          # exactly white
    first, *others = [stack.crop((0, f * height, width, (f + 1) * height)) for f in range(F)]
    hold = {given - 1: 500, F - 1: 1500}
    duration = [hold.get(f, int(1000 * DT)) for f in range(F)]                       # milliseconds
    save_picture(path, first, save_all=True, append_images=others, duration=duration, loop=0)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Writes a GIF and a PNG film strip per scenario.")
    parser.add_argument("--split", default="iid", help="see sample() (default: iid)")
    parser.add_argument("--size", type=int, default=128, help="pixels (default: 128)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="runs/sim", help="folder (default: runs/sim)")
    args = parser.parse_args(argv)
    try:
        if args.size < 8:
            raise ValueError(f"--size {args.size}: use at least 8 pixels")
        for scenario in SCENARIOS:
            clips = sample(scenario, args.split, 4, args.seed)
            frames = render(clips.position, clips.radius, args.size)
            off = (clips.position - closed_form(clips)).norm(dim=-1).max()
            names = [f"{args.split} {i + 1}" for i in range(len(clips))]
            save_gif(Path(args.out, f"{scenario}.gif"), {"": frames}, names)
            save_strip(Path(args.out, f"{scenario}.png"), dict(zip(names, frames[:, None])), [""])
            print(f"{scenario:10s} {args.out}/{scenario}.gif, .png   4 {args.split} clips, at most {off:.4f} units "
                  "from the closed form")
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
