"""
Measures the physics in a video: finds the balls, compares their motion with the true motion, and
turns the errors into a reward.

Source: Phys-AR, section 3.4 and appendix D.
    velocity error   e_v = mean |v - v^|             (Eq. 4)
    velocity reward  alpha exp(-k e_v)               (Eq. 5), alpha = 4, k = 1.4
    mass reward      1 - e_r,  e_r = mean |r - r^|   (Eq. 6), r in world units
    reward           their sum                       (Eq. 7)

What the paper leaves open, decided here
1. v is the change of a ball's centre from frame f to f + 1, divided by 0.1 s; v^ is the true one's.
2. A pair (f, f + 1) counts if f >= 3 and the true ball is wholly in view in both frames.
3. Of a collision, the reward ignores the pair with the impact, the errors also all pairs before it.
4. A ball that is not found has an error of 10 units/s and 2 units. That is also the largest error
   of a ball that is found, thus losing a ball never pays.
5. Errors are means over time, then over balls.
6. There is a second velocity error: `drift_error` is |mean (v - v^)|, in which the noise between
   frames averages out. PhyWorld's evaluator measures it, thus very likely the paper's tables too.

    python reward.py          # the calibration table: what does each kind of wrong video score?

Takes 20 seconds on 2 CPU cores. Perfect 128-pixel frames have velocity_error 0.0014, reward 4.99
(the most is 5).

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
MISSING = 10.0          # units per second: crosses the whole view in a second
RADIUS_MISSING = 2.0    # units: the radius of the largest ball of any split
SMALLEST = 0.15         # units: half the radius of the smallest ball; less than that is no ball
MARGIN = 2.0            # pixels around a ball that are measured with it: its anti-aliased edge


# ------------------------------------------------------------------ finding the balls

def detect(frames: Tensor, n_balls: int) -> tuple[Tensor, Tensor, Tensor]:
    """
    Finds a red ball, and with n_balls = 2 also a blue one, in every frame.

    frames (B, F, 3, H, W) in [0, 1] -> center (B, F, N, 2) and radius (B, F, N) in world units,
    found (B, F, N) bool. center and radius are NaN where found is False.

    The coverage of a pixel is the share of it that the ball fills. It is exact for every mix of
    white, red and blue, also where two balls touch; green, black and magenta cover nothing. The
    pixels more than half covered give a rough disc. The precise centre and area are those of the
    coverage within that disc and a margin, thus noise elsewhere has no influence.
    Raises ValueError for a wrong shape, integers or NaN.
    """
    if frames.ndim != 5 or frames.shape[2] != 3 or frames.shape[3] != frames.shape[4]:
        raise ValueError(f"frames must be (B, F, 3, H, W) with H = W; got {tuple(frames.shape)}")
    if n_balls not in (1, 2):
        raise ValueError(f"n_balls = {n_balls}: a clip has one (red) or two (red, blue) balls")
    if not frames.is_floating_point():
        raise ValueError(f"frames are {frames.dtype}: give floats in [0, 1]")
    if not torch.isfinite(frames).all():
        raise ValueError("frames hold NaN or infinity: nothing can be measured in them")
    size = frames.shape[-1]
    red, green, blue = frames.float().unbind(2)                       # (B, F, H, W)
    red_ball = (red - green).minimum(1 - blue)
    blue_ball = (blue - green).minimum(1 - red)
    coverage = torch.stack([red_ball, blue_ball][:n_balls], 2)        # (B, F, N, H, W)

    area, x, y = _area_and_centre((coverage > 0.5).float())           # (B, F, N), in pixels
    reach = (area / math.pi).sqrt() + MARGIN
    axis = torch.arange(size, device=frames.device) + 0.5             # pixel centres
    dx = axis - x[..., None, None]                                    # (B, F, N, 1, W)
    dy = axis[:, None] - y[..., None, None]                           # (B, F, N, H, 1)
    near = dx ** 2 + dy ** 2 <= reach[..., None, None] ** 2           # False where x is NaN

    area, x, y = _area_and_centre(coverage * near)
    found = area >= math.pi * (SMALLEST * size / WORLD) ** 2
    unit = WORLD / size                                               # world units per pixel
    center = torch.stack([x, size - y], -1) * unit                    # (B, F, N, 2)
    radius = (area.clamp(min=0) / math.pi).sqrt() * unit
    return center.where(found[..., None], math.nan), radius.where(found, math.nan), found


def _area_and_centre(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(B, F, N, H, W) -> sum, x and y of the weighted mean, in pixels from the top left."""
    axis = torch.arange(weight.shape[-1], device=weight.device) + 0.5
    area = weight.sum((-2, -1))
    x = (weight.sum(-2) * axis).sum(-1) / area
    y = (weight.sum(-1) * axis).sum(-1) / area
    return area, x, y


# ------------------------------------------------------------------ errors

@dataclass
class Comparison:
    """The balls in a video compared with the true ones, whether a frame counts or not."""
    velocity_difference: Tensor     # (B, F-1, N, 2)  v - v^, 0 where the ball is lost
    speed_error: Tensor             # (B, F-1, N)     |v - v^|, MISSING where the ball is lost
    found_both: Tensor              # (B, F-1, N)     found in both frames of the pair
    radius_error: Tensor            # (B, F, N)       |r - r^|, RADIUS_MISSING where it is lost
    found: Tensor                   # (B, F, N)


def _compare(frames: Tensor, clips: Clips) -> Comparison:
    if frames.shape[:2] != (len(clips), FRAMES):
        raise ValueError(f"{len(clips)} clips of {FRAMES} frames cannot be compared with frames of "
                         f"shape {tuple(frames.shape)}")
    center, radius, found = detect(frames, clips.radius.shape[1])
    found_both = found[:, 1:] & found[:, :-1]

    moved = center.diff(dim=1) - clips.position.diff(dim=1)           # (B, F-1, N, 2)
    difference = torch.where(found_both[..., None], (moved / DT).float(), 0)
    length = difference.norm(dim=-1)                                  # (B, F-1, N)
    shrink = MISSING / length.clamp(min=MISSING)                      # to at most MISSING
    speed_error = torch.where(found_both, length.clamp(max=MISSING), MISSING)

    radius_error = (radius - clips.radius[:, None].float()).abs()     # (B, F, N)
    radius_error = radius_error.clamp(max=RADIUS_MISSING).where(found, RADIUS_MISSING)
    return Comparison(difference * shrink[..., None], speed_error, found_both, radius_error, found)


def _frame_mask(clips: Clips) -> Tensor:
    """The frames that count (B, F, N): predicted ones with the true ball in view."""
    predicted = torch.arange(FRAMES, device=clips.inside.device) >= CONDITION
    return clips.inside & predicted[:, None]


def _pair_mask(clips: Clips, after_impact: bool) -> Tensor:
    """The pairs that count (B, F-1, N): both frames do, and see point 3 in the file's head."""
    mask = _frame_mask(clips)
    mask = mask[:, 1:] & mask[:, :-1]
    if clips.scenario != "collision":
        return mask
    f = torch.arange(FRAMES - 1, device=mask.device)
    impact = sim.impact_time(clips)[:, None] / DT                     # (B, 1), in frames
    before, after = f + 1 <= impact, f >= impact                      # (B, F-1)
    counts = after if after_impact else before | after
    return mask & counts[..., None]


def _mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean over time, then over balls, where mask is True: (B, F, N) -> (B,). NaN: it never is."""
    per_ball = torch.where(mask, x, 0).sum(1) / mask.sum(1)           # (B, N), 0 / 0 = NaN
    return per_ball.nanmean(-1)


def errors(frames: Tensor, clips: Clips) -> dict[str, Tensor]:
    """
    frames (B, F, 3, H, W) -> {velocity_error, drift_error, radius_error, missing}, each (B,).

    Units per second, units per second, world units, share of the frames without the ball. NaN for
    a clip in which nothing counts, because its balls are out of view after condition and impact.
    """
    c = _compare(frames, clips)
    frame_mask = _frame_mask(clips)                                   # (B, F, N)
    pair_mask = _pair_mask(clips, after_impact=True)                  # (B, F-1, N)

    pairs = pair_mask.sum(1)                                          # (B, N)
    drift = torch.where(pair_mask[..., None], c.velocity_difference, 0).sum(1) / pairs[..., None]
    lost = (pair_mask & ~c.found_both).sum(1) / pairs                 # share of the pairs
    drift_error = drift.norm(dim=-1) + MISSING * lost                 # (B, N)
    return {
        "velocity_error": _mean(c.speed_error, pair_mask),
        "drift_error": drift_error.nanmean(-1),
        "radius_error": _mean(c.radius_error, frame_mask),
        "missing": _mean((~c.found).float(), frame_mask),
    }


# ------------------------------------------------------------------ reward

def reward(frames: Tensor, clips: Clips, horizon: int = 0) -> dict[str, Tensor]:
    """
    frames (B, F, 3, H, W) -> {reward, velocity, mass}, each (B,), by Eq. 4-7.

    velocity is in (0, 4], mass in [-1, 1], reward is their sum. NaN for a clip in which no frame
    counts. With a horizon also `ahead` (B, F): per frame, the reward of that frame and the
    horizon - 1 after it, NaN where none of them counts.
    """
    c = _compare(frames, clips)
    frame_mask = _frame_mask(clips)                                   # (B, F, N)
    pair_mask = _pair_mask(clips, after_impact=False)                 # (B, F-1, N)

    velocity_error = _mean(c.speed_error, pair_mask)                  # (B,)     Eq. 4
    radius_error = _mean(c.radius_error, frame_mask)                  # (B,)
    velocity = ALPHA * torch.exp(-DECAY * velocity_error)             #          Eq. 5
    mass = 1 - radius_error                                           #          Eq. 6
    result = {"reward": velocity + mass, "velocity": velocity, "mass": mass}   # Eq. 7

    if horizon:                                                       # the same formula per frame
        speed_error = nnf.pad(c.speed_error, (0, 0, 1, 0))            # (B, F, N): of the pair that
        pair_mask = nnf.pad(pair_mask, (0, 0, 1, 0))                  # ends in the frame
        velocity_error = _mean_ahead(speed_error, pair_mask, horizon)         # (B, F)
        radius_error = _mean_ahead(c.radius_error, frame_mask, horizon)
        result["ahead"] = ALPHA * torch.exp(-DECAY * velocity_error) + 1 - radius_error
    return result


def _mean_ahead(x: Tensor, mask: Tensor, horizon: int) -> Tensor:
    """_mean over each frame and the horizon - 1 after it: (B, F, N) -> (B, F)."""
    total = _sum_ahead(torch.where(mask, x, 0), horizon)              # (B, F, N)
    count = _sum_ahead(mask.float(), horizon)
    return (total / count).nanmean(-1)


def _sum_ahead(x: Tensor, horizon: int) -> Tensor:
    x = nnf.pad(x, (0, 0, 0, horizon - 1))                            # zeros after the last frame
    return x.unfold(1, horizon, 1).sum(-1)                            # (B, F, N, horizon) summed


# ------------------------------------------------------------------ calibration

def _wrong_videos() -> dict[str, Callable[[Tensor], Tensor]]:
    """Named ways to spoil the frames of true clips (B, F, 3, H, W)."""
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(FRAMES - CONDITION, generator=torch.Generator().manual_seed(0))

    def noise(frames):
        return (frames + 0.02 * torch.randn(frames.shape, generator=generator)).clamp(0, 1)

    def blur(frames):
        blurred = nnf.avg_pool2d(frames.flatten(0, 1), 5, 1, 2, count_include_pad=False)
        return blurred.unflatten(0, frames.shape[:2])

    def predict(change):                                              # the condition stays true
        return lambda frames: torch.cat([frames[:, :CONDITION], change(frames)], 1)

    return {
        "truth": lambda frames: frames,
        "noise 0.02": noise,
        "blur 5 x 5": blur,
        "frozen": predict(lambda f: f[:, CONDITION - 1:CONDITION].expand_as(f[:, CONDITION:])),
        "shuffled": predict(lambda f: f[:, CONDITION + order]),
        "wrong colour": predict(lambda f: f[:, CONDITION:, [1, 0, 2]]),       # red turns green
        "all white": predict(lambda f: torch.ones_like(f[:, CONDITION:])),
    }


def main(argv: list[str] | None = None) -> None:
    from evaluate import COLUMNS, SPLITS, evaluate

    parser = argparse.ArgumentParser(description="Prints what right and wrong videos score.")
    parser.add_argument("--size", type=int, default=128, help="pixels (default: 128)")
    parser.add_argument("--n", type=int, default=16, help="clips per row (default: 16)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.size < 16:
        parser.error(f"--size {args.size}: use at least 16 pixels")
    for scenario in sim.SCENARIOS:
        title = f"\n{scenario}, {args.size} pixels, {args.n} clips"
        print(title.ljust(34) + "".join(f"{name:>16s}" for name in COLUMNS))
        wrong = _wrong_videos()
        rows = [(name, "iid", spoil) for name, spoil in wrong.items()]
        rows += [(f"truth, {split}", split, wrong["truth"]) for split in SPLITS if split != "iid"]
        for label, split, spoil in rows:
            try:
                result = evaluate(spoil, scenario, split, args.n, args.seed,
                                  size=args.size, shown=FRAMES, batch=4)
            except ValueError as error:                               # of --n or --seed
                parser.error(str(error))
            print(f"  {label:31s}" + "".join(f"{result[name]:16.4f}" for name in COLUMNS))


if __name__ == "__main__":
    main()
