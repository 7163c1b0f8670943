"""
Clips of moving balls: random initial states, simulation (pymunk), closed-form solution, renderer.

No video is ever stored. `sample` draws the initial states and simulates them, `render` paints the
frames when they are needed. Three million clips of one ball take 100 MB as initial states; as
stored 128 x 128 frames they would take 4.7 TB.

Source: PhyWorld's three motions, as used by Phys-AR (section 4.1 and appendix C).
    uniform      one ball at constant velocity, moving right
    parabola     one ball thrown to the right, gravity 2.5
    collision    two balls moving towards each other, elastic impact, mass proportional to area

Differences from PhyWorld's data
1. Frame 0 is at t = 0; PhyWorld stores it one solver step (0.01 s) later.
2. All impacts are elastic; PhyWorld's (Box2D) are inelastic at closing speeds of 1 or less.
3. Edges are anti-aliased by area coverage, thus centres can be measured to a fraction of a pixel.
4. A collision for which the view has no room is drawn again, not dropped.
5. A value from two intervals is uniform over their union: a longer interval gets more values.

    python sim.py                            # a GIF and a PNG film strip per scenario in runs/sim
    python sim.py --split fast --size 256    # any split, any size

Takes 3 seconds on 2 CPU cores.

Axes: B clips, F frames, N balls, C colour channels, H W pixels.
Units: world units (the view is 10 x 10, y up), seconds, units per second. Frame f is at t = DT f.
"""
import argparse
import math
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pymunk
import pymunk.batch
import torch
from torch import Tensor

SCENARIOS = ("uniform", "parabola", "collision")
WORLD = 10.0            # side of the square view
DT = 0.1                # seconds between frames
FRAMES = 32             # frames of a clip
CONDITION = 3           # number of first frames that a model is given
SIZES = (8, 1024)       # pixels per side: the smallest and the largest frames
MOST_CLIPS = 10_000_000         # of a sample: more would not fit into memory
GRAVITY = 2.5           # units / s^2, in the parabola only

# PhyWorld's rules for the initial position
IN_VIEW = 2.4           # seconds that a single ball stays wholly in view, wherever this is possible
IMPACT = (0.8, 2.4)     # seconds: the earliest and the latest impact of a collision
GAP = 0.5               # units: least distance from a ball to the view's upper and lower edge
DROP = 1.5              # units: largest distance from a thrown ball to the view's upper edge

# The solver detects an impact at most one step late. The positions after it are then off by at most
# (change of velocity) * DT / SUBSTEPS: about 0.006 at the fastest impact of any split.
SUBSTEPS = 250          # solver steps per frame
SCENES = 512            # clips that are simulated in one pymunk Space: a Space per clip is slow

# What `simulate` is sure of: a smaller or faster ball could pass another one between two steps.
LEAST_RADIUS = 0.05     # units
TOP_SPEED = 100.0       # units per second
FARTHEST = 1000.0       # units: largest coordinate of a centre

AT_ONCE = 64            # frames that are painted or measured in one go, for the CPU's cache

# ------------------------------------------------------------------ splits

# Phys-AR, section 4.1. A range is a list of intervals; `low` and `high` are the halves of `ood`.
RADIUS = {
    "pretrain": [(0.8, 1.4)],
    "posttrain": [(0.7, 0.8), (1.4, 1.5)],
    "iid": [(0.7, 1.5)],
    "ood": [(0.3, 0.6), (1.5, 2.0)],
    "low": [(0.3, 0.6)],
    "high": [(1.5, 2.0)],
}
SPEED = {
    "pretrain": [(1.5, 3.5)],
    "posttrain": [(1.0, 1.5), (3.5, 4.0)],
    "iid": [(1.0, 4.0)],
    "ood": [(0.0, 0.8), (4.5, 6.0)],
    "low": [(0.0, 0.8)],
    "high": [(4.5, 6.0)],
}

# Split -> names of ranges: first the radius of each ball, then the speed of each ball. Appendix C
# has the levels `ood-...`. slow, fast, small, large are ours: half of `ood`, for the first ball.
ONE_BALL = {
    "pretrain": ("pretrain", "pretrain"),
    "posttrain": ("posttrain", "posttrain"),
    "iid": ("iid", "iid"),
    "ood-r": ("ood", "iid"),
    "ood-v": ("iid", "ood"),
    "ood-rv": ("ood", "ood"),
    "slow": ("iid", "low"),
    "fast": ("iid", "high"),
    "small": ("low", "iid"),
    "large": ("high", "iid"),
}
TWO_BALLS = {
    "pretrain": ("pretrain",) * 4,
    "posttrain": ("posttrain",) * 4,
    "iid": ("iid",) * 4,
    "ood-r1": ("ood", "iid", "iid", "iid"),
    "ood-v1": ("iid", "iid", "ood", "iid"),
    "ood-r1r2": ("ood", "ood", "iid", "iid"),
    "ood-v1v2": ("iid", "iid", "ood", "ood"),
    "ood-r1v1": ("ood", "iid", "ood", "iid"),
    "ood-all": ("ood",) * 4,
    "slow": ("iid", "iid", "low", "iid"),
    "fast": ("iid", "iid", "high", "iid"),
    "small": ("low", "iid", "iid", "iid"),
    "large": ("high", "iid", "iid", "iid"),
}


def splits(scenario: str) -> dict[str, tuple[str, ...]]:
    """Split -> names of ranges, without `ood`. Raises ValueError for an unknown scenario."""
    if scenario not in SCENARIOS:
        choices = ", ".join(SCENARIOS)
        raise ValueError(f"unknown scenario {scenario!r}: choose one of {choices}")
    return TWO_BALLS if scenario == "collision" else ONE_BALL


def levels(scenario: str) -> list[str]:
    """The splits of which `ood` is the union."""
    return [name for name in splits(scenario) if name.startswith("ood-")]


# ------------------------------------------------------------------ clips

@dataclass
class Clips:
    """B clips as numbers, not frames: float64, the ground truth of all measurements."""
    scenario: str
    radius: Tensor      # (B, N)
    velocity: Tensor    # (B, N)        initial speed (>= 0); the paper's v
    position: Tensor    # (B, F, N, 2)  centres; F = 1 before the simulation
    inside: Tensor      # (B, F, N)     True where the ball is wholly in view

    def __len__(self) -> int:
        return len(self.radius)

    def __getitem__(self, index) -> "Clips":
        """Clips at `index`, a slice or a tensor of indices."""
        return Clips(self.scenario, self.radius[index], self.velocity[index],
                     self.position[index], self.inside[index])

    def to(self, device) -> "Clips":
        return Clips(self.scenario, self.radius.to(device), self.velocity.to(device),
                     self.position.to(device), self.inside.to(device))


def sample(scenario: str, split: str, n: int, seed: int = 0) -> Clips:
    """
    n simulated clips of a split. The same arguments give the same clips on every machine and rank.

    split: pretrain, posttrain, iid, slow, fast, small, large, one of the `levels`, or ood: all
    levels, one after the other, in equal shares.
    Raises ValueError for an unknown scenario or split, for seed < 0, for n < 1 and for an n that no
    memory holds.
    """
    return play(first_frames(scenario, split, n, seed))


def first_frames(scenario: str, split: str, n: int, seed: int = 0) -> Clips:
    """As `sample`, but not simulated: the clips hold the initial states only (F = 1)."""
    known = splits(scenario)
    if split not in known and split != "ood":
        choices = ", ".join(["ood", *known])
        raise ValueError(f"unknown split {split!r} of {scenario}: choose one of {choices}")
    if not 1 <= n <= MOST_CLIPS:
        raise ValueError(f"n = {n}: a sample has at least one clip, and at most {MOST_CLIPS}")
    if seed < 0:
        raise ValueError(f"seed = {seed}: must be at least 0")

    names = levels(scenario) if split == "ood" else [split]
    states = []
    for i, name in enumerate(names):
        extra = i < n % len(names)                        # the remainder goes to the first ones
        count = n // len(names) + extra
        if count > 0:
            states.append(_initial_states(scenario, name, count, seed))
    radius, speed, start = (torch.from_numpy(np.concatenate(x)) for x in zip(*states))
    position = start[:, None]                             # (B, 1, N, 2)
    return Clips(scenario, radius, speed, position, _in_view(radius, position))


def play(first: Clips, index: Tensor | None = None) -> Clips:
    """
    Simulates the initial states `first` (see `first_frames`), all or those at index (B,) int64.
    Equals play(first)[index] bit for bit, except y of colliding balls: within 1e-12.
    """
    chosen, scene = first, None
    if index is not None:
        chosen = first[index]
        if first.scenario != "collision":                 # single balls can share a scene
            scene = index % SCENES                        # that of play(first): y is rounded alike
    start = chosen.position[:, 0]
    position = simulate(first.scenario, chosen.radius, chosen.velocity, start, scene=scene)
    inside = _in_view(chosen.radius, position)
    return Clips(first.scenario, chosen.radius, chosen.velocity, position, inside)


def _in_view(radius: Tensor, position: Tensor) -> Tensor:
    """Whether balls are wholly in view: (B, N), (B, F, N, 2) -> (B, F, N)."""
    r = radius[:, None, :, None]                          # (B, 1, N, 1)
    return ((position >= r) & (position <= WORLD - r)).all(-1)


# ------------------------------------------------------------------ initial states

def _initial_states(scenario: str, split: str, n: int, seed: int) -> tuple[np.ndarray, ...]:
    """-> radius (n, N), speed (n, N), centre at t = 0 (n, N, 2)."""
    # Each scenario and split has its own random stream. hash() would differ between processes.
    stream = zlib.crc32(f"{scenario}/{split}".encode())
    rng = np.random.default_rng([seed, stream])
    ranges = splits(scenario)[split]
    if scenario == "collision":
        return _start_collision(rng, ranges, n)
    return _start_one_ball(rng, ranges, n, thrown=scenario == "parabola")


def _draw(rng: np.random.Generator, intervals: list[tuple[float, float]], n: int) -> np.ndarray:
    """n values, uniform over a union of intervals."""
    low, high = np.array(intervals).T
    length = high - low
    end = length.cumsum()                                 # the intervals laid end to end from 0
    begin = end - length
    x = rng.uniform(0, end[-1], n)
    i = np.searchsorted(end, x)                           # the interval in which x lies
    return low[i] + x - begin[i]


def _start_one_ball(rng: np.random.Generator, ranges: tuple[str, ...], n: int, thrown: bool):
    r = _draw(rng, RADIUS[ranges[0]], n)
    v = _draw(rng, SPEED[ranges[1]], n)

    rightmost = WORLD - (IN_VIEW * v + r)                 # from here, in view for just IN_VIEW s
    x_slow = rng.uniform(r, np.maximum(rightmost, r))
    x_fast = r + rng.uniform(0, GAP, n)                   # no room for that: near the left edge
    x = np.where(rightmost >= r, x_slow, x_fast)

    lowest = WORLD - DROP - r if thrown else r + GAP
    y = rng.uniform(lowest, WORLD - GAP - r)
    return r[:, None], v[:, None], np.stack([x, y], -1)[:, None]


def _start_collision(rng: np.random.Generator, ranges: tuple[str, ...], n: int):
    r, v = np.zeros((n, 2)), np.zeros((n, 2))
    redo = np.ones(n, dtype=bool)
    while redo.any():
        # Values for all n clips are drawn each time, and used where redo is True.
        new_r = np.stack([_draw(rng, RADIUS[name], n) for name in ranges[:2]], -1)
        new_v = np.stack([_draw(rng, SPEED[name], n) for name in ranges[2:]], -1)
        r = np.where(redo[:, None], new_r, r)
        v = np.where(redo[:, None], new_v, v)

        # The distance of the centres at t = 0 decides when they are r1 + r2 apart: the impact.
        closing, touch = v.sum(1), r.sum(1)
        nearest = IMPACT[0] * closing + touch
        farthest = np.minimum(IMPACT[1] * closing + touch, WORLD - touch)     # both in view
        redo = nearest > farthest                         # no room for this impact

    distance = rng.uniform(nearest, farthest)
    rightmost = WORLD - r[:, 1] - distance                # of ball 1, with ball 2 in view
    x1 = rng.uniform(r[:, 0], np.maximum(rightmost, r[:, 0]))
    x2 = x1 + distance
    y = rng.uniform(r.max(1) + GAP, WORLD - GAP - r.max(1))
    start = np.stack([np.stack([x1, y], -1), np.stack([x2, y], -1)], 1)
    return r, v, start


def initial_velocity(speed: Tensor) -> Tensor:
    """Speed (B, N) -> velocity (B, N, 2). The first ball moves right, the second left."""
    sign = torch.tensor([1.0, -1.0], dtype=speed.dtype, device=speed.device)
    vx = speed * sign[:speed.shape[1]]
    return torch.stack([vx, torch.zeros_like(speed)], -1)


# ------------------------------------------------------------------ physics

def simulate(scenario: str, radius: Tensor, velocity: Tensor, start: Tensor,
             substeps: int = SUBSTEPS, scenes: int = SCENES, scene: Tensor | None = None) -> Tensor:
    """
    Simulates clips with pymunk -> positions (B, F, N, 2), float64.

    radius (B, N), velocity (B, N; the initial speed) and start (B, N, 2; the centres at t = 0).
    scenes: number of clips that share a Space, stacked. scene (B,): the level of each, in views: it
    is moved up by so many while simulated, which decides how its y is rounded; by default 0, 1, ...
    Raises ValueError for wrong shapes, non-finite values, and numbers so small or large that pymunk
    would abort the process or compute nonsense; for balls that reach above or below the view or
    start at different heights, which could hit balls of other clips; and for balls that overlap or
    are not in their order, the first on the left.
    """
    radius, velocity, start = (torch.as_tensor(x, dtype=torch.float64).cpu()
                               for x in (radius, velocity, start))
    _check_states(scenario, radius, velocity, start)
    if min(substeps, scenes) < 1:
        raise ValueError(f"substeps = {substeps}, scenes = {scenes}: at least one of each")
    if scene is None:
        scene = torch.arange(len(radius)) % scenes
    positions = []
    for i in range(0, len(radius), scenes):
        part = slice(i, i + scenes)
        positions.append(_simulate_in_one_space(
            scenario, radius[part], velocity[part], start[part], substeps, scene[part]))
    return torch.cat(positions)


def _check_states(scenario: str, radius: Tensor, velocity: Tensor, start: Tensor) -> None:
    splits(scenario)                                      # raises for an unknown scenario
    N = 2 if scenario == "collision" else 1
    B = radius.numel() // N
    got = [tuple(x.shape) for x in (radius, velocity, start)]
    if B == 0 or got != [(B, N), (B, N), (B, N, 2)]:
        raise ValueError(f"{scenario} needs radius (B, {N}), velocity (B, {N}), start (B, {N}, 2) "
                         f"with B > 0; got {got[0]}, {got[1]}, {got[2]}")
    _check_finite(radius=radius, velocity=velocity, start=start)
    x, y = start.unbind(-1)                               # (B, N) each
    if (radius < LEAST_RADIUS).any():
        raise ValueError(f"radius must be at least {LEAST_RADIUS}")
    if (velocity < 0).any() or (velocity > TOP_SPEED).any():
        raise ValueError(f"velocity, a speed without direction, must be from 0 to {TOP_SPEED}")
    if (x.abs() > FARTHEST).any():
        raise ValueError(f"start must lie within {FARTHEST} units of the view's left edge")
    if (y < radius).any() or (y > WORLD - radius).any() or (y != y[:, :1]).any():
        raise ValueError("start must lie within the view's height, and both balls of a collision "
                         "at the same height")
    gap = x.diff(dim=1) - radius.sum(1, keepdim=True)     # (B, N - 1)
    if (gap < -1e-9).any():                               # 0: they touch
        raise ValueError("start must have the first ball of a collision on the left of the second, "
                         "and the two must not overlap")


def _check_finite(**tensors: Tensor) -> None:
    for name, x in tensors.items():
        if not torch.isfinite(x).all():
            raise ValueError(f"{name} holds NaN or infinity")


def _simulate_in_one_space(scenario: str, radius: Tensor, speed: Tensor, start: Tensor,
                           substeps: int, scene: Tensor) -> Tensor:
    """
    As `simulate`, in one Space: each clip is moved up by its scene, in view heights. Balls of
    different clips never touch: single balls have no shape, and colliding balls keep their height.
    """
    B, N = radius.shape
    step = DT / substeps
    velocity = initial_velocity(speed)
    space = pymunk.Space()
    if scenario == "parabola":
        space.gravity = (0, -GRAVITY)
        velocity[..., 1] -= GRAVITY * step / 2            # leapfrog: exact for constant forces
    offset = torch.zeros(B, 1, 2, dtype=torch.float64)    # broadcasts over the balls
    offset[:, 0, 1] = WORLD * scene

    radii = radius.flatten().tolist()
    centers = (start + offset).reshape(-1, 2).tolist()
    velocities = velocity.reshape(-1, 2).tolist()
    for r, (x, y), (vx, vy) in zip(radii, centers, velocities):
        mass = math.pi * r * r                            # density 1
        body = pymunk.Body(mass, pymunk.moment_for_circle(mass, 0, r))
        body.position = x, y
        body.velocity = vx, vy
        space.add(body)
        if N > 1:                                         # only a ball with a shape can collide
            circle = pymunk.Circle(body, r)
            circle.elasticity = 1.0
            circle.friction = 0.0
            space.add(circle)

    buffer = pymunk.batch.Buffer()
    frames = []
    for f in range(FRAMES):
        if f > 0:
            for _ in range(substeps):
                space.step(step)
        buffer.clear()
        pymunk.batch.get_space_bodies(space, pymunk.batch.BodyFields.POSITION, buffer)
        copied = bytes(buffer.float_buf())                # float64, in the order of space.add
        frames.append(np.frombuffer(copied, np.float64).reshape(B, N, 2))
    return torch.from_numpy(np.stack(frames, 1)) - offset[:, None]


def impact_time(clips: Clips) -> Tensor:
    """Seconds from t = 0 until the two balls touch (B,). inf if they never do or N = 1."""
    B, N = clips.radius.shape
    if N == 1:
        return torch.full((B,), math.inf, dtype=torch.float64, device=clips.radius.device)
    x1, x2 = clips.position[:, 0, :, 0].unbind(1)
    gap = x2 - x1 - clips.radius.sum(1)
    closing = clips.velocity.sum(1)
    return torch.where(closing > 0, gap / closing, math.inf)


def closed_form(clips: Clips) -> Tensor:
    """The exact positions, computed from the initial states only -> (B, F, N, 2), float64."""
    t = DT * torch.arange(FRAMES, dtype=torch.float64, device=clips.position.device)
    t = t[:, None, None]                                          # (F, 1, 1)
    start = clips.position[:, :1]                                 # (B, 1, N, 2)
    velocity = initial_velocity(clips.velocity)                   # (B, N, 2)
    if clips.scenario != "collision":
        position = start + velocity[:, None] * t                  # (B, F, N, 2)
        if clips.scenario == "parabola":
            position[..., 1] -= 0.5 * GRAVITY * t[..., 0] ** 2
        return position

    # A head-on elastic impact changes v to 2 v_cm - v, with v_cm of the centre of mass.
    mass = (clips.radius ** 2)[..., None]                         # (B, N, 1)  without factor pi
    v_cm = (mass * velocity).sum(1, keepdim=True) / mass.sum(1, keepdim=True)
    velocity_after = 2 * v_cm - velocity                          # (B, N, 2)
    impact = impact_time(clips)[:, None, None, None]              # (B, 1, 1, 1)
    time_before = t.minimum(impact)                               # (B, F, 1, 1)
    time_after = (t - impact).clamp(min=0)
    return start + velocity[:, None] * time_before + velocity_after[:, None] * time_after


# ------------------------------------------------------------------ pictures

def render(position: Tensor, radius: Tensor, size: int, slices: int = 8) -> Tensor:
    """
    Paints balls on white -> frames (B, F, 3, size, size), float32 in [0, 1].

    position (B, F, N, 2) and radius (B, N) in world units, on any device. The first ball is red,
    the second blue. A pixel on an edge mixes white and the ball's colour by the share of its area
    that the ball covers: an integral, exact along y, along x a sum of `slices` per pixel. It is
    computed in a window around each ball only; all windows are as large as the largest ball needs.
    Raises ValueError for wrong shapes, a third ball, radius <= 0, and for what is NaN or infinite
    in float32.
    """
    B, F, N = position.shape[:3] if position.ndim == 4 else (0, 0, 0)
    if F < 1 or N not in (1, 2) or position.shape[3] != 2 or radius.shape != (B, N):
        raise ValueError("render needs position (B, F, N, 2) and radius (B, N), N = 1 or 2 balls; "
                         f"got {tuple(position.shape)} and {tuple(radius.shape)}")
    if min(size, slices) < 1:
        raise ValueError(f"size = {size}, slices = {slices}: at least one of each")
    scale = size / WORLD                                          # pixels per world unit
    center = (position * scale).float()                           # (B, F, N, 2)
    r = (radius * scale).float()[:, None]                         # (B, 1, N)
    _check_finite(position=center, radius=r)
    radii = r.flatten().tolist()                                  # empty if B is 0
    if min(radii, default=1) <= 0:
        raise ValueError("radius must be > 0")

    side = min(size, int(2 * max(radii, default=1)) + 2)          # of a window, in pixels
    if center.requires_grad or r.requires_grad:
        side = size                                               # for autograd: see `windows`
    cx, cy = center[..., 0], size - center[..., 1]                # (B, F, N); row 0 is on top
    frames = _white_frames(B, F, size, position.device)
    for part in parts(B, F):
        _paint(frames[part], cx[part], cy[part], r[part], side, slices)
    return frames


def _paint(frames: Tensor, cx: Tensor, cy: Tensor, r: Tensor, side: int, slices: int) -> None:
    """Paints discs into white frames, in place. cx, cy (B, F, N) and r (B, 1, N), in pixels."""
    (B, F, N), size, device = cx.shape, frames.shape[-1], frames.device
    x0 = (cx - r).floor().clamp(0, size - side).long()            # first column of the window
    y0 = (cy - r).floor().clamp(0, size - side).long()            # first row
    pixel = torch.arange(side, device=device)
    left = (x0[..., None] + pixel).float()                        # (B, F, N, side)
    top = (y0[..., None] + pixel).float()[..., None, None]        # (B, F, N, side, 1, 1)

    offset = (torch.arange(slices, device=device) + 0.5) / slices  # middles, in pixels
    x = left[..., None, :] + offset[:, None] - cx[..., None, None]        # (B, F, N, slices, side)
    r, cy = r[..., None, None], cy[..., None, None]               # (B, 1 or F, N, 1, 1)
    half_chord = (r * r - x * x).clamp(min=0).sqrt()              # half the disc's height at x
    upper = (cy - half_chord)[..., None, :, :].maximum(top)       # (B, F, N, side, slices, side)
    lower = (cy + half_chord)[..., None, :, :].minimum(top + 1)
    covered = lower.sub_(upper).clamp_(0, 1)                      # in place: stays in the cache
    covered = sum(covered.unbind(-2)) / slices                    # (B, F, N, side, side)

    view = windows(frames, side, side)                            # writing to it changes frames
    green = view[:, :, 1]
    clip = torch.arange(B, device=device)[:, None]
    frame = torch.arange(F, device=device)
    for n in range(N):                      # red lacks blue (channel 2), blue lacks red (channel 0)
        window = clip, frame, y0[:, :, n], x0[:, :, n]
        view[:, :, 2 - 2 * n][window] = 1 - covered[:, :, n]      # no other ball changes it
        green[window] = (green[window] - covered[:, :, n]).clamp(min=0)


def _white_frames(B: int, F: int, size: int, device: torch.device) -> Tensor:
    """Ones (B, F, 3, size, size). For the CPU, NumPy allocates huge pages; torch does not."""
    shape = B, F, 3, size, size
    if device.type == "cpu":
        return torch.from_numpy(np.ones(shape, np.float32))
    return torch.ones(shape, device=device)


def parts(B: int, F: int) -> list[slice]:
    """Slices of the B clips, each of about AT_ONCE frames (at least one clip of F frames)."""
    clips = max(1, AT_ONCE // F)
    return [slice(i, i + clips) for i in range(0, B, clips)]


def windows(frames: Tensor, height: int, width: int) -> Tensor:
    """
    All windows of frames (.., H, W) as a view, without a copy: (.., H - height + 1, W - width + 1,
    height, width). At [.., y, x] is the window that begins in row y and column x. Autograd is not
    made for overlapping views: for a gradient, take the one window that is the whole frame.
    """
    return frames.unfold(-2, height, 1).unfold(-2, width, 1)


def check_frames(frames: Tensor) -> None:
    """ValueError unless frames are floats in [0, 1], or so little outside as noise would be."""
    if not isinstance(frames, Tensor) or not frames.is_floating_point():
        kind = frames.dtype if isinstance(frames, Tensor) else type(frames).__name__
        raise ValueError(f"frames are {kind}: give a tensor of floats in [0, 1]")
    if not frames.numel():
        raise ValueError(f"frames of shape {tuple(frames.shape)}: there is none")
    low, high = torch.stack([frames.amin(), frames.amax()]).tolist()      # NaN if one is NaN
    if not math.isfinite(low) or not math.isfinite(high):
        raise ValueError("frames hold NaN or infinity: nothing can be measured in them")
    if low < -0.15 or high > 1.15:
        raise ValueError(f"frames must be in [0, 1]; these are from {low:.3g} to {high:.3g}")


def to_uint8(frames: Tensor) -> Tensor:
    """Float frames in [0, 1] -> uint8 frames of the same shape, as in a saved picture."""
    return (frames.clamp(0, 1) * 255).round().to(torch.uint8)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Writes a GIF and a PNG film strip per scenario.")
    parser.add_argument("--split", default="iid", help="see sample() (default: iid)")
    parser.add_argument("--size", type=int, default=128, help="pixels (default: 128)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="runs/sim", help="folder (default: runs/sim)")
    args = parser.parse_args(argv)
    import pictures                                               # here: it imports sim itself
    from checkpoint import UserError, writable
    try:
        if not SIZES[0] <= args.size <= SIZES[1]:
            raise ValueError(f"--size {args.size}: use {SIZES[0]} to {SIZES[1]} pixels")
        if not args.out:
            raise ValueError("--out names no folder")
        for scenario in SCENARIOS:
            clips = sample(scenario, args.split, 4, args.seed)
            frames = render(clips.position, clips.radius, args.size)
            error = (clips.position - closed_form(clips)).norm(dim=-1).max()
            names = [f"{args.split} {i + 1}" for i in range(len(clips))]
            path = writable(Path(args.out)) / scenario
            pictures.save_gif(path.with_suffix(".gif"), {"": frames}, names)      # side by side
            rows = dict(zip(names, frames[:, None]))
            pictures.save_strip(path.with_suffix(".png"), rows, [""])             # a row per clip
            print(f"{scenario:10s} {args.out}/{scenario}.gif, .png   4 {args.split} clips, "
                  f"at most {error:.4f} units from the closed form")
    except (ValueError, OSError, UserError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
