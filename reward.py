"""
Measures the physics in a video: finds the balls, compares their motion with the simulator's, and turns it into a reward.

Source: Phys-AR section 3.4 and appendix D (Eq. 4-7 and 11). R = alpha exp(-k v_error) + (1 - r_error), alpha = 4, k = 1.4.

What the paper leaves open, decided here
1. Two velocity errors, always side by side. `velocity_error` is Eq. 4: the mean of |v - v^| over frames, which is what the
   reward sees. `drift_error` is |mean of (v - v^)|: averaged over frames first, which hides frame-to-frame noise. It is
   what PhyWorld's released evaluator does and so very likely what the papers' tables hold.
2. v is the forward difference of the found centres over 0.1 s, v^ the same difference of the true ones. A pair of frames
   counts when both are predicted (index >= 3) and the true ball is wholly in view in both. For collisions the errors look at
   the pairs after the impact (what the model had to infer), the reward at all but the impact's own.
3. A ball that is not found moves, for the errors, MISSING = 10 units per second wrongly: it crosses the whole view in a
   second. No pair scores worse than that, so losing the ball never pays. Its radius is wrong by RADIUS_MISSING = 2.
4. r_error is the mean |r - r^| in world units over the frames that count.

    python reward.py                    # the calibration table: what does each kind of wrong video score?

Takes 20 seconds on 2 CPU cores. Ground truth at 128 pixels: velocity_error 0.0014, reward 4.99 of at most 5.

Axes: B clips, F frames, N balls, H W pixels, P frame pairs (F - 1).
"""
import argparse
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, pad

import sim
from sim import CONDITION, DT, FRAMES, WORLD, Clips

ALPHA, K = 4.0, 1.4         # Eq. 5, appendix D
MISSING = 10.0              # units per second: the error of a pair without a ball, and the largest of any pair
RADIUS_MISSING = 2.0        # world units: the same for the radius; the largest ball of any split has radius 2
SMALLEST = 0.15             # world units: a patch smaller than such a ball (half the smallest) is no ball
MARGIN = 2.0                # pixels around a ball that are measured with it: its anti-aliased edge


# ------------------------------------------------------------------ finding the balls

def detect(frames: Tensor, n_balls: int) -> tuple[Tensor, Tensor, Tensor]:
    """
    Finds a red ball, and with n_balls = 2 a blue one too, in every frame.

    frames (B, F, 3, H, W) in [0, 1] -> center (B, F, N, 2) in world units, radius (B, F, N), found (B, F, N) bool.
    center and radius are NaN where found is False.

    A ball is looked for in coverage (B, F, N, H, W), the share of a pixel it fills: for the red ball red - green, at most
    1 - blue, for the blue one likewise. That is exact for any mix of white, red and blue, also where the two balls touch;
    other colours (green, black, magenta) cover nothing. Pixels more than half covered say roughly where it is; the
    coverage-weighted centre and area of that disc and a margin say it to a hundredth of a pixel, and noise elsewhere in
    the picture has no say.
    Raises ValueError for a wrong shape or NaN.
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
    red, green, blue = frames.float().unbind(2)                                       # (B, F, H, W)
    covered = torch.stack([(red - green).minimum(1 - blue), (blue - green).minimum(1 - red)][:n_balls], 2)
    axis = torch.arange(size, device=frames.device) + 0.5                             # pixel centres

    def measure(weight):                                   # (B, F, N, H, W) -> area, centre x and y in pixels (B, F, N)
        area = weight.sum((-2, -1))
        x = (weight.sum(-2) * axis).sum(-1) / area
        y = (weight.sum(-1) * axis).sum(-1) / area
        return area, x, y

    area, x, y = measure((covered > 0.5).float())
    rough = (area / math.pi).sqrt()
    distance2 = (axis - x[..., None, None]) ** 2 + (axis[:, None] - y[..., None, None]) ** 2
    near = distance2 <= (rough + MARGIN)[..., None, None] ** 2                        # False where x is NaN
    area, x, y = measure(covered * near)
    found = area >= math.pi * (SMALLEST * size / WORLD) ** 2
    center = torch.stack([x, size - y], -1) * (WORLD / size)
    radius = (area.clamp(min=0) / math.pi).sqrt() * (WORLD / size)
    return center.where(found[..., None], math.nan), radius.where(found, math.nan), found


# ------------------------------------------------------------------ errors

def _pairs(clips: Clips, after_impact: bool) -> Tensor:
    """Which frame pairs (f, f+1) of which ball count (B, P, N): see points 2 of the head of this file."""
    valid = clips.inside[:, 1:] & clips.inside[:, :-1]                                # (B, P, N)
    first = torch.arange(FRAMES - 1, device=valid.device)                             # (P,)
    valid = valid & (first >= CONDITION)[:, None]
    if clips.scenario != "collision":
        return valid
    hit = sim.impact_time(clips)[:, None] / DT                                        # (B, 1) in frames
    after, before = first >= hit, first + 1 <= hit                                    # (B, P)
    return valid & (after if after_impact else after | before)[..., None]


def _mean(x: Tensor, where: Tensor) -> Tensor:
    """Mean over time (dim 1), then over balls (dim 2), of the entries that count; NaN for a clip without any."""
    count = where.sum(1)                                                              # (B, N)
    per_ball = torch.where(where, x, 0).sum(1) / count                                # NaN where count is 0
    return per_ball.nanmean(-1)                                                       # (B,)


@dataclass
class Compared:
    """What is wrong with a clip's frames, pair by pair and frame by frame, whichever of them count."""
    wrong: Tensor               # (B, P, N, 2)  v - v^, at most MISSING long; 0 where a ball was not found
    seen: Tensor                # (B, P, N)     it was found, in both frames
    wrong_speed: Tensor         # (B, P, N)     |v - v^|, at most MISSING, which it also is where a ball was not found
    wrong_radius: Tensor        # (B, F, N)     |r - r^|, likewise with RADIUS_MISSING
    found: Tensor               # (B, F, N)


def _compare(frames: Tensor, clips: Clips) -> Compared:
    """Frames (B, F, 3, H, W) with the clips they should show."""
    if frames.shape[:2] != (len(clips), FRAMES):
        raise ValueError(f"{len(clips)} clips of {FRAMES} frames are compared with frames of shape "
                         f"{tuple(frames.shape)}")
    center, radius, found = detect(frames, clips.radius.shape[1])                     # (B, F, N, 2), (B, F, N) twice
    seen = found[:, 1:] & found[:, :-1]                                               # (B, P, N)
    wrong = ((center.diff(dim=1) - clips.position.diff(dim=1)) / DT).float()          # (B, P, N, 2)
    wrong = torch.where(seen[..., None], wrong, 0)
    size = wrong.norm(dim=-1)                                                         # (B, P, N)
    wrong = wrong * (MISSING / size.clamp(min=MISSING))[..., None]                    # a wild jump is no worse than no ball
    wrong_radius = (radius - clips.radius[:, None].float()).abs().clamp(max=RADIUS_MISSING)
    return Compared(wrong, seen, torch.where(seen, size.clamp(max=MISSING), MISSING),
                    torch.where(found, wrong_radius, RADIUS_MISSING), found)


def _valid(clips: Clips) -> Tensor:
    """Which frames count: predicted, the true ball in view (B, F, N)."""
    return clips.inside & (torch.arange(FRAMES, device=clips.inside.device) >= CONDITION)[:, None]


def _measure(c: Compared, clips: Clips, after_impact: bool) -> dict[str, Tensor]:
    pairs, valid = _pairs(clips, after_impact), _valid(clips)                         # (B, P, N), (B, F, N)
    count = pairs.sum(1)                                                              # (B, N)
    mean_wrong = torch.where((pairs & c.seen)[..., None], c.wrong, 0).sum(1) / count[..., None]
    lost = (pairs & ~c.seen).sum(1) / count                                           # share of pairs without a ball
    drift_error = (mean_wrong.norm(dim=-1) + MISSING * lost).nanmean(-1)              # (B,)
    return {"velocity_error": _mean(c.wrong_speed, pairs), "drift_error": drift_error,
            "radius_error": _mean(c.wrong_radius, valid), "missing": _mean((~c.found).float(), valid)}


def errors(frames: Tensor, clips: Clips) -> dict[str, Tensor]:
    """
    frames (B, F, 3, H, W) against the truth -> {velocity_error, drift_error, radius_error, missing}, each (B,).

    Units per second, units per second, world units, share of frames without a ball. See the head of the file for what
    counts. NaN for a clip in which nothing does (its balls are never in view after the condition or the impact).
    """
    return _measure(_compare(frames, clips), clips, after_impact=True)


def _reward(c: Compared, clips: Clips) -> dict[str, Tensor]:
    error = _measure(c, clips, after_impact=False)
    velocity = ALPHA * torch.exp(-K * error["velocity_error"])
    mass = 1 - error["radius_error"]
    return {"reward": velocity + mass, "velocity": velocity, "mass": mass}


def _ahead(c: Compared, clips: Clips, horizon: int) -> Tensor:
    """Eq. 5-7 of each frame and the horizon - 1 after it (B, F), with the pairs that end in them."""
    def window(x: Tensor, where: Tensor) -> Tensor:                                   # (B, F, N) -> (B, F)
        total, count = (pad(y, (0, 0, 0, horizon - 1)).unfold(1, horizon, 1).sum(-1)
                        for y in (torch.where(where, x, 0), where.float()))
        return (total / count).nanmean(-1)                                            # NaN: nothing counts

    wrong_speed, pairs = (pad(x, (0, 0, 1, 0)) for x in (c.wrong_speed, _pairs(clips, after_impact=False)))   # (B, F, N)
    return ALPHA * torch.exp(-K * window(wrong_speed, pairs)) + 1 - window(c.wrong_radius, _valid(clips))


def reward(frames: Tensor, clips: Clips, horizon: int = 0) -> dict[str, Tensor]:
    """
    Eq. 5-7: frames (B, F, 3, H, W) -> {reward, velocity, mass}, each (B,). velocity is in (0, 4], mass in [-1, 1], and
    reward their sum. NaN for a clip in which no frame counts.

    With a horizon also `ahead` (B, F): what the same formulas give for each frame and the horizon - 1 after it. NaN where
    none of them counts.
    """
    c = _compare(frames, clips)
    return _reward(c, clips) | ({"ahead": _ahead(c, clips, horizon)} if horizon else {})


# ------------------------------------------------------------------ evaluation

def evaluate(predict: Callable[[Tensor], Tensor], scenario: str, split: str, n: int, seed: int = 0, *,
             size: int = 128, shown: int = CONDITION, batch: int = 64, device="cpu", each: bool = False) -> dict:
    """
    Measures a model on n clips of a split it is given nothing of but the first frames.

    predict: frames (B, shown, 3, size, size) in [0, 1] -> frames (B, 32, 3, size, size). Predictions are measured as 8-bit
    pictures, as a saved video would be. shown = 32 measures reconstruction.
    Returns the means of velocity_error, drift_error, radius_error, missing, reward, velocity, mass, each with its
    standard error as `<name>_se`, and n (clips measured) and left_out (clips in which no frame counts). With `each`, also
    the reward and drift_error of every clip (NaN: left out): two models are best compared clip by clip.
    Raises ValueError for an unknown split, n < 1, or a prediction of another shape or with NaN.
    """
    clips = sim.sample(scenario, split, n, seed)
    collected: dict[str, list[Tensor]] = {}
    for i in range(0, n, batch):
        part = clips[i:i + batch].to(device)
        truth = sim.render(part.position, part.radius, size)
        frames = predict(sim.to_uint8(truth[:, :shown]).float() / 255)
        if frames.shape != truth.shape:
            raise ValueError(f"predict returned {tuple(frames.shape)}, expected {tuple(truth.shape)}")
        frames = sim.to_uint8(frames).float() / 255 if torch.isfinite(frames).all() else frames   # detect reports NaN
        c = _compare(frames, part)                                                    # once, for both
        for name, value in (_measure(c, part, after_impact=True) | _reward(c, part)).items():
            collected.setdefault(name, []).append(value.cpu().double())
    result = {}
    for name, parts in collected.items():
        value = torch.cat(parts)
        value = value[~value.isnan()]
        result[name] = value.mean().item()
        result[name + "_se"] = value.std().item() / math.sqrt(len(value)) if len(value) > 1 else math.nan
    kept = ~torch.cat(collected["velocity_error"]).isnan()
    result |= {"n": int(kept.sum()), "left_out": int((~kept).sum())}
    return result | {"each": {k: torch.cat(collected[k]).tolist() for k in ("reward", "drift_error")}} if each else result


COLUMNS = ("velocity_error", "drift_error", "radius_error", "missing", "reward")


EVAL_SEED = 1_000_003       # of the result tables. No training uses it, so that its clips are held out


def read(path: Path) -> dict:
    try:
        return json.loads(path.read_text()) if path.exists() else {}
    except json.JSONDecodeError as error:
        raise OSError(f"{path} is damaged ({error}): delete it, the table is made again") from None


def add_row(path: Path, row: str, predict: Callable[[Tensor], Tensor], scenarios: list[str], splits: tuple[str, ...],
            n: int, *, size: int, **options) -> None:
    """
    Evaluates a model on every scenario and split and adds the results to a JSON file: {row: {scenario: {split: result}}}.
    What stands there already, measured on as many clips of that size, is kept: an interrupted table is continued.
    """
    results, of = read(path), [n, size, EVAL_SEED]
    for scenario in scenarios:
        for split in splits:
            place = results.setdefault(row, {}).setdefault(scenario, {})
            if place.get(split, {}).get("of") != of:
                result = evaluate(predict, scenario, split, n, EVAL_SEED, size=size, each=True, **options)
                place[split] = result | {"of": of}
                write(path, results)


def drop_rows(path: Path, *rows: str) -> None:
    """Forgets the results of a model that has been trained anew, and of those that were made from it."""
    results = read(path)
    if any([results.pop(row, None) for row in rows]):           # a list: every one of them, not only up to the first
        write(path, results)


def write(path: Path, results: dict) -> None:
    aside = path.with_name(path.name + ".part")
    aside.write_text(json.dumps(results))
    os.replace(aside, path)


def table(path: Path) -> str:
    """The results of a JSON file as text: a block per scenario and split, a row per model, means +- standard errors."""
    results, lines = read(path), []
    for scenario, split in dict.fromkeys((s, p) for row in results.values() for s in row for p in row[s]):
        rows = {name: row[scenario][split] for name, row in results.items() if split in row.get(scenario, {})}
        lines.append(f"\n{scenario}, {split}".ljust(24) + "clips" + "".join(f"{c:>17s}" for c in COLUMNS))
        lines += [f"  {name:20s}{r['n']:6d}" + "".join(f"{r[c]:9.3f} +-{r[c + '_se']:6.3f}" for c in COLUMNS)
                  for name, r in rows.items()]
    return "\n".join(lines)


def difference(path: Path, before: str, after: str) -> str:
    """What changed from one row of a JSON file to another: mean and standard error of the difference, clip by clip."""
    results = read(path)
    lines = [f"{after} minus {before}, the same clips".ljust(42) + f"{'reward':>28s}{'drift_error':>28s}"]
    for scenario, splits in results[after].items():
        for split in splits:
            line = f"  {scenario}, {split}".ljust(42)
            for name in ("reward", "drift_error"):
                a, b = (torch.tensor(results[row][scenario][split]["each"][name]) for row in (before, after))
                change = (b - a)[~(b - a).isnan()]
                mean = change.mean()
                se = change.std() / len(change) ** 0.5 if len(change) > 1 else torch.tensor(math.nan)
                line += f"{mean:+10.3f} +-{se:6.3f} ({mean / se:+5.1f})"
            lines.append(line)
    return "\n".join(lines) + "\n(in brackets: in standard errors)"


# ------------------------------------------------------------------ calibration

def _spoiled(size: int) -> dict[str, Callable[[Tensor], Tensor]]:
    """Named ways to spoil a true clip, frames (B, F, 3, H, W) -> the same shape."""
    def after(frames, predicted):                                                     # the condition stays as it was
        return torch.cat([frames[:, :CONDITION], predicted], 1)

    def shuffled(frames):
        order = CONDITION + torch.randperm(FRAMES - CONDITION, generator=torch.Generator().manual_seed(0))
        return after(frames, frames[:, order])

    def blur(frames):
        return avg_pool2d(frames.flatten(0, 1), 5, 1, 2, count_include_pad=False).unflatten(0, frames.shape[:2])

    noise = torch.Generator().manual_seed(0)
    return {
        "truth": lambda f: f,
        "noise 0.02": lambda f: (f + 0.02 * torch.randn(f.shape, generator=noise)).clamp(0, 1),
        "blur 5 x 5": blur,
        "frozen": lambda f: after(f, f[:, CONDITION - 1:CONDITION].expand_as(f[:, CONDITION:])),
        "shuffled": shuffled,
        "wrong colour": lambda f: after(f, f[:, CONDITION:, [1, 0, 2]]),              # red turns green
        "all white": lambda f: after(f, torch.ones_like(f[:, CONDITION:])),
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Prints what right and wrong videos score.")
    parser.add_argument("--size", type=int, default=128, help="pixels (default: 128)")
    parser.add_argument("--n", type=int, default=16, help="clips per row (default: 16)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    try:
        if args.size < 16:
            raise ValueError(f"--size {args.size}: use at least 16 pixels")
        names = ("velocity_error", "drift_error", "radius_error", "missing", "reward")
        for scenario in sim.SCENARIOS:
            print(f"\n{scenario}, {args.size} pixels, {args.n} clips".ljust(34)
                  + "".join(f"{name:>16s}" for name in names))
            rows = [(name, "iid", spoil) for name, spoil in _spoiled(args.size).items()]
            rows += [(f"truth, {split}", split, lambda f: f) for split in ("ood", "slow", "fast", "small", "large")]
            for label, split, spoil in rows:
                result = evaluate(spoil, scenario, split, args.n, args.seed, size=args.size, shown=FRAMES, batch=4)
                print(f"  {label:31s}" + "".join(f"{result[name]:16.4f}" for name in names))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
