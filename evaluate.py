"""
Evaluates any model that predicts frames, and keeps the results in a JSON file.

`evaluate` gives the model the first frames of n clips, measures the predicted frames (reward.py),
and returns the mean and the standard error of each measure. `add_row` adds a model to the file,
`table` returns the file as text, `difference` compares two models clip by clip.

The file (results.json) is {row: {scenario: {split: what `evaluate` returns}}}, with the key "of",
[n, size, seed], added to each result.
"""
import math
from pathlib import Path
from typing import Callable

import torch
from torch import Tensor

import reward
import sim
from checkpoint import read_json, write_json
from sim import CONDITION

Predictor = Callable[[Tensor], Tensor]      # the first frames of clips -> whole clips
EVAL_SEED = 1_000_003       # of the clips in all tables; held out, because no training uses it
SPLITS = ("iid", "ood", "slow", "fast", "small", "large")
COLUMNS = ("velocity_error", "drift_error", "radius_error", "missing", "reward")
PAIRED = ("reward", "drift_error")      # kept of every clip, for `difference`


def evaluate(predict: Callable[[Tensor], Tensor], scenario: str, split: str, n: int, seed: int = 0,
             *, size: int = 128, shown: int = CONDITION, batch: int = 64, device="cpu",
             each: bool = False) -> dict:
    """
    Evaluates a model that is given the first `shown` frames of n clips.

    predict: frames (B, shown, 3, size, size) in [0, 1] -> frames (B, 32, 3, size, size). Both are
    rounded to 8 bits, as in a saved video. shown = 32 evaluates a reconstruction.
    Returns the mean of each measure of reward.errors and reward.reward, its standard error as
    `<name>_se`, n (clips measured) and left_out (clips in which no frame counts). With `each` also
    the reward and the drift_error of every clip, NaN where it is left out.
    Raises ValueError for an unknown split, n < 1, and a prediction of a wrong shape or with NaN.
    """
    clips = sim.sample(scenario, split, n, seed)
    batches = []
    for i in range(0, n, batch):
        truth = clips[i:i + batch].to(device)
        frames = sim.render(truth.position, truth.radius, size)       # (B, 32, 3, H, W)
        predicted = predict(_round(frames[:, :shown]))
        if predicted.shape != frames.shape:
            raise ValueError(f"predict returned {tuple(predicted.shape)}, "
                             f"expected {tuple(frames.shape)}")
        if not torch.isfinite(predicted).all():
            raise ValueError("predict returned NaN or infinity")
        predicted = _round(predicted)
        balls = reward.detect(predicted, truth.radius.shape[1])
        batches.append(reward.errors(predicted, truth, balls)
                       | reward.reward(predicted, truth, balls=balls))

    measured = {}                                                     # name -> (n,)
    for name in batches[0]:
        measured[name] = torch.cat([values[name].cpu().double() for values in batches])
    result = {}
    for name, values in measured.items():
        mean, se = _mean_and_se(values)
        result[name], result[name + "_se"] = mean.item(), se.item()
    left_out = int(measured["velocity_error"].isnan().sum())
    result |= {"n": n - left_out, "left_out": left_out}
    if each:
        result["each"] = {name: measured[name].tolist() for name in PAIRED}
    return result


def _round(frames: Tensor) -> Tensor:
    return sim.to_uint8(frames).float() / 255


def _mean_and_se(values: Tensor) -> tuple[Tensor, Tensor]:
    """The mean over clips and its standard error. Clips that are NaN are left out."""
    values = values[~values.isnan()]
    n = len(values)
    se = values.std() / math.sqrt(n) if n > 1 else torch.tensor(math.nan)
    return values.mean(), se


# ------------------------------------------------------------------ the file of results

def add_row(path: Path, row: str, predict: Callable[[Tensor], Tensor], scenarios: list[str],
            splits: tuple[str, ...], n: int, *, size: int, **options) -> None:
    """
    Evaluates a model on all scenarios and splits and adds the results to the file as `row`.

    Results for the same number of clips and the same size are kept, thus an interrupted table can
    be continued. `options` are passed on to `evaluate`.
    """
    results = read_json(path)
    of = [n, size, EVAL_SEED]
    for scenario in scenarios:
        for split in splits:
            known = results.setdefault(row, {}).setdefault(scenario, {})
            if known.get(split, {}).get("of") == of:
                continue
            result = evaluate(predict, scenario, split, n, EVAL_SEED,
                              size=size, each=True, **options)
            known[split] = result | {"of": of}
            write_json(path, results)


def add_rows(config, predictors: dict[str, Predictor], size: int, world, splits=SPLITS, n: int = 0,
             shown: int = CONDITION) -> Path:
    """
    Rows {name: predictor} of <config.out>/results.json, on every motion of config.scenario and n
    clips per split (0: config.eval_clips). Rank 0 evaluates, the others wait. -> the file's path.
    """
    path = Path(config.out, "results.json")
    motions = sim.SCENARIOS if config.scenario == "all" else [config.scenario]
    if world.is_main:
        for row, predict in predictors.items():
            add_row(path, row, predict, motions, splits, n or config.eval_clips, size=size,
                    shown=shown, device=world.device)
    world.barrier()
    return path


def drop_rows(path: Path, *rows: str) -> None:
    """Deletes rows: those of a model that is trained again, and of models built on it."""
    results = read_json(path)
    kept = {name: row for name, row in results.items() if name not in rows}
    if len(kept) < len(results):
        write_json(path, kept)


def table(path: Path) -> str:
    """The file as text: a block per scenario and split, a line per row, mean +- standard error."""
    results = read_json(path)
    blocks = {}                                       # (scenario, split) -> {row: result}
    for name, row in results.items():
        for scenario, by_split in row.items():
            for split, result in by_split.items():
                blocks.setdefault((scenario, split), {})[name] = result
    lines = []
    for (scenario, split), rows in blocks.items():
        title = f"\n{scenario}, {split}".ljust(24)
        lines.append(title + "clips" + "".join(f"{column:>17s}" for column in COLUMNS))
        for name, result in rows.items():
            line = f"  {name:20s}{result['n']:6d}"
            for column in COLUMNS:
                line += f"{result[column]:9.3f} +-{result[column + '_se']:6.3f}"
            lines.append(line)
    return "\n".join(lines)


def difference(path: Path, before: str, after: str) -> str:
    """
    Row `after` minus row `before` as text: the mean of the difference over clips, its standard
    error, and their ratio in brackets. Both rows are measured on the same clips. Comparing them
    clip by clip removes the differences between clips from the standard error.
    """
    results = read_json(path)
    title = f"{after} minus {before}, the same clips".ljust(42)
    lines = [title + "".join(f"{name:>28s}" for name in PAIRED)]
    for scenario, by_split in results[after].items():
        for split in by_split:
            line = f"  {scenario}, {split}".ljust(42)
            for name in PAIRED:
                old, new = (torch.tensor(results[row][scenario][split]["each"][name])
                            for row in (before, after))
                mean, se = _mean_and_se(new - old)
                line += f"{mean:+10.3f} +-{se:6.3f} ({mean / se:+5.1f})"
            lines.append(line)
    return "\n".join(lines) + "\n(in brackets: in standard errors)"
