"""
Measures the physics in a video: finds the balls, compares their motion with the true motion, and
turns the errors into a reward.

Source: Phys-AR, section 3.4 and appendix D.
    velocity error   e_v = mean |v - v^|             (Eq. 4)
    velocity reward  alpha exp(-k e_v)               (Eq. 5 and 11), alpha = 4, k = 1.4
    mass reward      1 - e_r,  e_r = mean |r - r^|   (Eq. 6), r in world units
    reward           their sum                       (Eq. 7)

What the paper leaves open, decided here
1. v is the change of the ball's centre from frame f to f + 1, per second; v^ is the true ball's.
2. A frame f counts if f >= 3 and the true ball is wholly in view; a pair (f, f + 1) if both count.
3. In a collision the reward leaves out the pair with the impact, the errors also all pairs before.
4. A ball that is not found counts as an error of 10 units/s and of 2 units in radius. Errors of a
   ball that is found are limited to these values, thus losing a ball never pays.
5. Errors are averaged over time, then over balls.
6. A second velocity error, `drift_error`, is |mean (v - v^)|: noise between frames averages out.
   PhyWorld's evaluator measures this one, thus very likely the paper's tables hold it.

    python reward.py          # the calibration table: errors and reward of right and wrong videos

Takes 20 seconds on 2 CPU cores. Perfect 128-pixel frames have a velocity_error of 0.0014 and a
reward of 4.99; the largest reward is 5.

Axes: B clips, F frames, N balls, H W pixels; F-1 pairs of frames.
"""
import argparse
import math
from dataclasses import dataclass
from typing import Callable

import torch
import torch.nn.functional as nnf
from torch import Tensor

import sim
from sim import CONDITION, DT, FRAMES, WORLD, Clips

ALPHA = 4.0             # alpha of Eq. 5
DECAY = 1.4             # k of Eq. 5
MISSING = 10.0          # units per second: velocity error of a ball that is not found
RADIUS_MISSING = 2.0    # units: its radius error; equal to the largest radius of any split
SMALLEST = 0.15         # units: least radius of a ball, half the smallest radius of any split
MARGIN = 2.0            # pixels added to a ball's radius, to include its blurred edge


# ------------------------------------------------------------------ finding the balls

def detect(frames: Tensor, n_balls: int) -> tuple[Tensor, Tensor, Tensor]:
    """
    Finds a red ball, and with n_balls = 2 also a blue one, in every frame.

    frames (B, F, 3, H, W) in [0, 1] -> center (B, F, N, 2) and radius (B, F, N) in world units,
    found (B, F, N) bool. center and radius are NaN where found is False.

    1. The colours give the coverage, the share of each pixel that the ball fills. This is exact for
       every mix of white, red and blue; other colours (green, black, magenta) give 0. It is
       computed where the ball can be only.
    2. The pixels that are more than half covered give a rough disc.
    3. The coverage within this disc and a margin gives the precise centre and area. Noise elsewhere
       in the frame has no influence.
    Raises ValueError for a wrong shape, integers, NaN, and values outside [0, 1].
    """
    if frames.ndim != 5 or frames.shape[2] != 3 or frames.shape[3] != frames.shape[4]:
        raise ValueError(f"frames must be (B, F, 3, H, W) with H = W; got {tuple(frames.shape)}")
    if n_balls not in (1, 2):
        raise ValueError(f"n_balls = {n_balls}: a clip has one (red) or two (red, blue) balls")
    sim.check_frames(frames)
    frames = frames.float()
    top, left, h, w = _boxes(frames, n_balls)
    balls = [_measure(frames[part], top[part], left[part], h, w)
             for part in sim.parts(*frames.shape[:2])]
    center, radius, found = (torch.cat(values) for values in zip(*balls))
    return center, radius, found


def _boxes(frames: Tensor, n_balls: int) -> tuple[Tensor, Tensor, int, int]:
    """
    Windows, all of h x w pixels, that hold what steps 2 and 3 need -> first row and first column of
    each (B, F, N), h, w.
    """
    size = frames.shape[-1]
    # Step 2 needs the rows and columns with a pixel more than half covered. Such a pixel of a red
    # ball has blue < 0.5, of a blue ball red < 0.5.
    lacking = [frames[:, :, 2 - 2 * n] for n in range(n_balls)]
    lowest = [torch.stack([c.amin(dim) for c in lacking], 2) for dim in (-1, -2)]
    dark = torch.stack(lowest) < 0.5                                  # (2, B, F, N, size)
    index = torch.arange(size, device=frames.device)
    first = torch.where(dark, index, size).amin(-1)                   # (2, B, F, N)
    last = torch.where(dark, index, -1).amax(-1)
    h, w = (last - first + 1).flatten(1).amax(1).clamp(min=1).tolist()
    # Step 3 needs the circle around them. If pixels of area A lie within w columns, the circle of
    # area A with their centre reaches at most w / (2 pi) above the highest of them.
    above, beside = (math.ceil(side / (2 * math.pi) + MARGIN) for side in (w, h))
    h, w = min(h + 2 * above, size), min(w + 2 * beside, size)
    if frames.requires_grad:
        h = w = size                                                  # see sim.windows
    top, left = (first[0] - above).clamp(0, size - h), (first[1] - beside).clamp(0, size - w)
    return top, left, h, w


def _measure(frames: Tensor, top: Tensor, left: Tensor, h: int,
             w: int) -> tuple[Tensor, Tensor, Tensor]:
    """The balls in the windows (B, F, N) of frames -> center, radius, found, as `detect`."""
    (B, F, N), size, device = top.shape, frames.shape[-1], frames.device
    colour = 2 * torch.arange(N, device=device)                       # channel: red 0, blue 2
    channel = torch.stack([colour, torch.ones_like(colour), 2 - colour], 1)         # (N, 3)
    clip = torch.arange(B, device=device)[:, None, None, None]
    frame = torch.arange(F, device=device)[:, None, None]
    top, left = top[..., None], left[..., None]                       # (B, F, N, 1)
    window = sim.windows(frames, h, w)[clip, frame, channel, top, left]
    colour, green, other = window.unbind(3)                           # (B, F, N, h, w)
    coverage = (colour - green).minimum(1 - other)
    x = left + torch.arange(w, device=device) + 0.5                   # pixel centres, (.., w)
    y = top + torch.arange(h, device=device) + 0.5                    # (.., h)

    # Comparisons in place give floats 0 and 1, on the CPU five times faster than bools.
    area, cx, cy = _area_and_center((coverage - 0.5).gt_(0), x, y)    # (B, F, N), in pixels
    reach = (area / math.pi).sqrt() + MARGIN
    dx, dy = x - cx[..., None], y - cy[..., None]
    distance2 = (dx ** 2)[..., None, :] + (dy ** 2)[..., None]        # (B, F, N, h, w)
    near = distance2.le_((reach ** 2)[..., None, None])               # 0 where cx is NaN

    area, cx, cy = _area_and_center(coverage * near, x, y)
    found = area >= math.pi * (SMALLEST * size / WORLD) ** 2
    unit = WORLD / size                                               # world units per pixel
    center = torch.stack([cx, size - cy], -1) * unit                  # (B, F, N, 2), y up
    radius = (area.clamp(min=0) / math.pi).sqrt() * unit
    center = center.where(found[..., None], math.nan)
    return center, radius.where(found, math.nan), found


def _area_and_center(weight: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """
    (B, F, N, h, w) -> sum of weights; x and y of their centre, in pixels from the top left. Summed
    in float64: then zeros around the weights, and thus the window's size, change nothing.
    """
    weight = weight.double()
    columns, rows = weight.sum(-2), weight.sum(-1)
    area = rows.sum(-1)
    cx = (columns * x).sum(-1) / area                                 # NaN where area is 0
    cy = (rows * y).sum(-1) / area
    return area.float(), cx.float(), cy.float()


# ------------------------------------------------------------------ errors

@dataclass
class Comparison:
    """The errors of all frames and pairs, whether they count or not. See point 4 in the head."""
    found: Tensor                   # (B, F, N)
    found_pair: Tensor              # (B, F-1, N)     found in both frames of the pair
    velocity_difference: Tensor     # (B, F-1, N, 2)  v - v^, at most MISSING long; 0 if not found
    velocity_error: Tensor          # (B, F-1, N)     its length; MISSING if not found
    radius_error: Tensor            # (B, F, N)       |r - r^|; RADIUS_MISSING if not found


def _compare(frames: Tensor, clips: Clips, balls: tuple | None) -> Comparison:
    if frames.shape[:2] != (len(clips), FRAMES):
        raise ValueError(f"{len(clips)} clips of {FRAMES} frames cannot be compared with frames of "
                         f"shape {tuple(frames.shape)}")
    if clips.position.shape[1] != FRAMES:
        raise ValueError(f"the clips have {clips.position.shape[1]} positions, not {FRAMES}: "
                         "simulate them with sim.play")
    center, radius, found = balls or detect(frames, clips.radius.shape[1])
    if center.shape != clips.position.shape:
        raise ValueError(f"balls {tuple(center.shape)} are not those of clips "
                         f"{tuple(clips.position.shape)}")
    found_pair = found[:, 1:] & found[:, :-1]

    step, true_step = center.diff(dim=1), clips.position.diff(dim=1)  # (B, F-1, N, 2)
    difference = ((step - true_step) / DT).float()                    # v - v^
    difference = torch.where(found_pair[..., None], difference, 0)
    length = difference.norm(dim=-1)                                  # (B, F-1, N)
    difference *= (MISSING / length.clamp(min=MISSING))[..., None]
    velocity_error = torch.where(found_pair, length.clamp(max=MISSING), MISSING)

    radius_error = (radius - clips.radius[:, None].float()).abs()     # (B, F, N)
    radius_error = radius_error.clamp(max=RADIUS_MISSING).where(found, RADIUS_MISSING)
    return Comparison(found, found_pair, difference, velocity_error, radius_error)


def _frame_mask(clips: Clips) -> Tensor:
    """The frames that count (B, F, N): point 2 in the head."""
    predicted = torch.arange(FRAMES, device=clips.inside.device) >= CONDITION
    return clips.inside & predicted[:, None]


def _pair_mask(clips: Clips, only_after_impact: bool) -> Tensor:
    """The pairs that count (B, F-1, N): points 2 and 3 in the head."""
    frame_mask = _frame_mask(clips)
    mask = frame_mask[:, 1:] & frame_mask[:, :-1]
    if clips.scenario != "collision":
        return mask
    f = torch.arange(FRAMES - 1, device=mask.device)                  # first frame of the pair
    impact = sim.impact_time(clips)[:, None] / DT                     # (B, 1), in frames
    before, after = f + 1 <= impact, f >= impact                      # (B, F-1)
    counts = after if only_after_impact else before | after
    return mask & counts[..., None]


def _mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean over time, then over balls, of x where mask is True: (B, F, N) -> (B,), or NaN."""
    per_ball = torch.where(mask, x, 0).sum(1) / mask.sum(1)           # (B, N), 0 / 0 = NaN
    return per_ball.nanmean(-1)                                       # of the balls that count


def errors(frames: Tensor, clips: Clips, balls: tuple | None = None) -> dict[str, Tensor]:
    """
    frames (B, F, 3, H, W) -> {velocity_error, drift_error, radius_error, missing}, each (B,).

    velocity_error and drift_error are in units per second, radius_error in units; missing is the
    share of frames in which the ball is not found. An error is NaN for a clip in which nothing that
    it measures counts, because the balls leave the view too early.
    balls: what `detect` returns, to avoid a second detection.
    """
    compared = _compare(frames, clips, balls)
    frame_mask = _frame_mask(clips)                                   # (B, F, N)
    pair_mask = _pair_mask(clips, only_after_impact=True)             # (B, F-1, N)

    difference = torch.where(pair_mask[..., None], compared.velocity_difference, 0)
    count = pair_mask.sum(1)                                          # (B, N)
    drift = difference.sum(1) / count[..., None]                      # (B, N, 2)
    lost = (pair_mask & ~compared.found_pair).sum(1) / count          # share of the pairs
    drift_error = drift.norm(dim=-1) + MISSING * lost                 # (B, N)
    return {
        "velocity_error": _mean(compared.velocity_error, pair_mask),
        "drift_error": drift_error.nanmean(-1),
        "radius_error": _mean(compared.radius_error, frame_mask),
        "missing": _mean((~compared.found).float(), frame_mask),
    }


# ------------------------------------------------------------------ reward

def reward(frames: Tensor, clips: Clips, horizon: int = 0,
           balls: tuple | None = None) -> dict[str, Tensor]:
    """
    frames (B, F, 3, H, W) -> {reward, velocity, mass}, each (B,), by Eq. 4-7.

    velocity is in (0, 4], mass in [-1, 1], reward is their sum. NaN for a clip in which no frame
    or no pair counts. horizon > 0 adds `ahead` (B, F): for each frame f the reward computed from
    the frames f to f + horizon - 1 only, NaN where none of them counts. balls: as for `errors`.
    """
    if not 0 <= horizon <= FRAMES:
        raise ValueError(f"horizon = {horizon}: 0 to the {FRAMES} frames of a clip")
    compared = _compare(frames, clips, balls)
    frame_mask = _frame_mask(clips)                                   # (B, F, N)
    pair_mask = _pair_mask(clips, only_after_impact=False)            # (B, F-1, N)

    velocity_error = _mean(compared.velocity_error, pair_mask)        # (B,)  Eq. 4
    radius_error = _mean(compared.radius_error, frame_mask)
    velocity = ALPHA * torch.exp(-DECAY * velocity_error)             #       Eq. 5
    mass = 1 - radius_error                                           #       Eq. 6
    result = {"reward": velocity + mass, "velocity": velocity, "mass": mass}     # Eq. 7

    if horizon:
        # A pair belongs to the frame in which it ends: (B, F-1, N) -> (B, F, N).
        velocity_error = nnf.pad(compared.velocity_error, (0, 0, 1, 0))
        pair_mask = nnf.pad(pair_mask, (0, 0, 1, 0))
        velocity_error = _mean_ahead(velocity_error, pair_mask, horizon)      # (B, F)
        radius_error = _mean_ahead(compared.radius_error, frame_mask, horizon)
        result["ahead"] = ALPHA * torch.exp(-DECAY * velocity_error) + 1 - radius_error
    return result


def _mean_ahead(x: Tensor, mask: Tensor, horizon: int) -> Tensor:
    """As `_mean`, but of the frames f to f + horizon - 1, for every f: (B, F, N) -> (B, F)."""
    total = _sum_ahead(torch.where(mask, x, 0), horizon)              # (B, F, N)
    count = _sum_ahead(mask.float(), horizon)
    return (total / count).nanmean(-1)


def _sum_ahead(x: Tensor, horizon: int) -> Tensor:
    """Sum over the frames f to f + horizon - 1, for every f: (B, F, N) -> (B, F, N)."""
    x = nnf.pad(x, (0, 0, 0, horizon - 1))                            # zeros after the last frame
    return x.unfold(1, horizon, 1).sum(-1)                            # windows (B, F, N, horizon)


# ------------------------------------------------------------------ calibration

def _wrong_videos() -> dict[str, Callable[[Tensor], Tensor]]:
    """Name -> a function that spoils true frames (B, F, 3, H, W)."""
    generator = torch.Generator().manual_seed(0)                      # of the noise
    order = torch.arange(FRAMES)
    order[CONDITION:] = CONDITION + torch.randperm(
        FRAMES - CONDITION, generator=torch.Generator().manual_seed(0))

    def noise(frames):
        return (frames + 0.02 * torch.randn(frames.shape, generator=generator)).clamp(0, 1)

    def blur(frames):
        blurred = nnf.avg_pool2d(frames.flatten(0, 1), 5, 1, 2, count_include_pad=False)
        return blurred.unflatten(0, frames.shape[:2])

    def predicted(new):                                               # changes frames 3 to 31 only
        return lambda frames: torch.cat([frames[:, :CONDITION], new(frames)[:, CONDITION:]], 1)

    return {
        "truth": lambda frames: frames,
        "noise 0.02": noise,
        "blur 5 x 5": blur,
        "frozen": predicted(lambda frames: frames[:, CONDITION - 1, None].expand_as(frames)),
        "shuffled": lambda frames: frames[:, order],
        "wrong colour": predicted(lambda frames: frames[:, :, [1, 0, 2]]),    # red turns green
        "all white": predicted(torch.ones_like),
    }


def main(argv: list[str] | None = None) -> None:
    from evaluate import COLUMNS, SPLITS, evaluate

    parser = argparse.ArgumentParser(description="Prints what right and wrong videos score.")
    parser.add_argument("--size", type=int, default=128, help="pixels (default: 128)")
    parser.add_argument("--n", type=int, default=16, help="clips per row (default: 16)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if not 16 <= args.size <= sim.SIZES[1]:
        parser.error(f"--size {args.size}: use 16 to {sim.SIZES[1]} pixels")
    for scenario in sim.SCENARIOS:
        title = f"\n{scenario}, {args.size} pixels, {args.n} clips"
        print(title.ljust(34) + "".join(f"{name:>16s}" for name in COLUMNS))
        videos = _wrong_videos()
        rows = [(name, "iid", spoil) for name, spoil in videos.items()]
        rows += [(f"truth, {split}", split, videos["truth"]) for split in SPLITS if split != "iid"]
        for label, split, spoil in rows:
            try:                                                      # shown: spoil gets all frames
                result = evaluate(spoil, scenario, split, args.n, args.seed,
                                  size=args.size, shown=FRAMES, batch=4)
            except ValueError as error:                               # of --n or --seed
                parser.error(str(error))
            print(f"  {label:31s}" + "".join(f"{result[name]:16.4f}" for name in COLUMNS))


if __name__ == "__main__":
    main()
