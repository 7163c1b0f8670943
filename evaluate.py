"""
Evaluates any model that predicts frames, and keeps the results in a JSON file.

`evaluate` gives a model the first frames of n clips, measures the frames that it predicts
(reward.py), and returns the mean and the standard error of each measure.

The other functions write and read a file, results.json. It holds a row per model:
{row: {scenario: {split: result}}}, where a result is what `evaluate` returns, "of", the
[n, size, seed] for which it was measured, and "weights", the checksums of the models: a row of
other weights than those at hand is measured again.
"""
import contextlib
import math
from pathlib import Path
from typing import Callable

import torch
from torch import Tensor

import reward
import sim
from checkpoint import UserError, checksums, nan_for_null, read_json, write_json
from sim import CONDITION, FRAMES

Predictor = Callable[[Tensor], Tensor]      # the first frames of clips -> all their frames
EVAL_SEED = 1_000_003       # seed of the clips of all tables: held out, no training uses it
SPLITS = ("iid", "ood", "slow", "fast", "small", "large")
COLUMNS = ("velocity_error", "drift_error", "radius_error", "missing", "reward")    # of `table`
PAIRED = ("reward", "drift_error")          # measures stored for each clip, for `difference`


def evaluate(predict: Predictor, scenario: str, split: str, n: int, seed: int = 0, *,
             size: int = 128, shown: int = CONDITION, batch: int = 64, device="cpu",
             each: bool = False) -> dict:
    """
    Evaluates a model that is given the first `shown` frames of n clips.

    predict: frames (B, shown, 3, size, size) in [0, 1] -> frames (B, 32, 3, size, size). Both are
    rounded to 8 bits, as in a saved video. shown = 32 evaluates a reconstruction.
    Returns the mean of each measure of reward.errors and reward.reward, its standard error as
    `<name>_se`, n (clips with a velocity_error) and left_out (clips without one). With `each` also
    the PAIRED measures of every clip, NaN where the clip is left out.
    Raises ValueError for an unknown split, n < 1, and a prediction of a wrong shape, with NaN or
    outside [0, 1].
    """
    if not 1 <= shown <= FRAMES or batch < 1:
        raise ValueError(f"shown = {shown}, batch = {batch}: at least 1 each, and shown at most "
                         f"{FRAMES}")
    clips = sim.sample(scenario, split, n, seed)
    batches = []
    for i in range(0, n, batch):
        truth = clips[i:i + batch].to(device)
        frames = sim.render(truth.position, truth.radius, size)       # (B, 32, 3, H, W)
        predicted = predict(_round(frames[:, :shown]))
        if predicted.shape != frames.shape:
            raise ValueError(f"predict returned {tuple(predicted.shape)}, "
                             f"expected {tuple(frames.shape)}")
        sim.check_frames(predicted)
        predicted = _round(predicted)
        balls = reward.detect(predicted, truth.radius.shape[1])
        errors = reward.errors(predicted, truth, balls)
        batches.append(errors | reward.reward(predicted, truth, balls=balls))

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
    """To 8 bits and back."""
    return sim.to_uint8(frames).float() / 255


def _mean_and_se(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over clips and its standard error, without the clips that are NaN."""
    values = values[~values.isnan()]
    n = len(values)
    se = values.std() / math.sqrt(n) if n > 1 else torch.tensor(math.nan)
    return values.mean(), se


# ------------------------------------------------------------------ the file of results

def add_row(path: Path, row: str, predict: Predictor, scenarios: list[str],
            splits: tuple[str, ...], n: int, *, size: int, weights: dict[str, str] | None = None,
            **options) -> None:
    """
    Evaluates a model on all scenarios and splits and stores the results in the file as `row`.

    A stored result is kept if n, size and weights (stage: checksum) are the same, thus an
    interrupted table can be continued. `options` are passed on to `evaluate`.
    """
    results, note = read_results(path), {"of": [n, size, EVAL_SEED], "weights": weights or {}}
    for scenario in scenarios:
        for split in splits:
            by_split = results.setdefault(row, {}).setdefault(scenario, {})
            known = by_split.get(split, {})
            if {name: known.get(name) for name in note} == note:
                continue
            result = evaluate(predict, scenario, split, n, EVAL_SEED,
                              size=size, each=True, **options)
            by_split[split] = result | note
            write_json(path, results)


def add_rows(config, predictors: dict[str, Predictor], stages: tuple[str, ...], size: int, world,
             n: int = 0, splits: tuple[str, ...] = (), shown: int = CONDITION) -> Path:
    """
    Adds a row {name: predictor} per model to <config.out>/results.json -> the file's path.

    config, world: of the training stage (train.py); rank 0 evaluates, the other ranks wait.
    stages: those whose weights in the run folder the models use or were trained from. Rows of older
    weights of these stages are deleted. n: clips per split (0: config.eval_clips). splits: empty
    for SPLITS.
    """
    path, batch = Path(config.out, "results.json"), 64 if world.device.type == "cpu" else 256
    scenarios = sim.SCENARIOS if config.scenario == "all" else [config.scenario]
    if world.is_main:
        weights = checksums(config.out, *stages)
        drop_older(path, weights)
        for row, predict in predictors.items():
            add_row(path, row, predict, scenarios, splits or SPLITS, n or config.eval_clips,
                    size=size, weights=weights, shown=shown, batch=batch, device=world.device)
    world.barrier()
    return path


def drop_older(path: Path, weights: dict[str, str]) -> None:
    """Deletes the rows that were measured on other weights of one of these stages."""
    def is_older(row: dict) -> bool:
        stored = [result.get("weights", {}) for by_split in row.values()
                  for result in by_split.values()]
        return any(other.get(stage, now) != now for other in stored
                   for stage, now in weights.items())
    results = read_results(path)
    with damage(path):
        kept = {name: row for name, row in results.items() if not is_older(row)}
    if len(kept) < len(results):
        write_json(path, kept)


def read_results(path: Path) -> dict:
    """The rows of the file, {} if there is none. UserError for a damaged one."""
    results = read_json(path, AGAIN)
    with damage(path):
        for row in results.values():
            for by_split in row.values():
                for split, result in by_split.items():
                    result.keys()                     # a dictionary, as all those around it
                    by_split[split] = nan_for_null(result)
    return results


AGAIN = "delete it, and what is in it is measured again"


@contextlib.contextmanager
def damage(path: Path):
    """One line for a file whose content has another shape than that which `add_row` writes."""
    try:
        yield
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error!r}): {AGAIN}") from None


def table(path: Path) -> str:
    """The file as text: a block per scenario and split, a line per row, mean +- standard error."""
    with damage(path):
        return _table(read_results(path))


def _table(results: dict) -> str:
    blocks = {}                                       # (scenario, split) -> {row: result}
    for row, by_scenario in results.items():
        for scenario, by_split in by_scenario.items():
            for split, result in by_split.items():
                blocks.setdefault((scenario, split), {})[row] = result
    lines = []
    for (scenario, split), rows in blocks.items():
        title = f"\n{scenario}, {split}".ljust(24)
        lines.append(title + "clips" + "".join(f"{name:>17s}" for name in COLUMNS))
        for row, result in rows.items():
            line = f"  {row:20s}{result['n']:6d}"
            for name in COLUMNS:
                line += f"{result[name]:9.3f} +-{result[name + '_se']:6.3f}"
            lines.append(line)
    return "\n".join(lines)


def difference(path: Path, before: str, after: str) -> str:
    """
    Row `after` minus row `before` as text: the mean of the difference over clips, its standard
    error, and their ratio in brackets. Both rows are measured on the same clips. Comparing them
    clip by clip removes the differences between clips from the standard error.
    """
    with damage(path):
        return _difference(read_results(path), before, after)


def _difference(results: dict, before: str, after: str) -> str:
    title = f"{after} minus {before}, the same clips".ljust(42)
    lines = [title + "".join(f"{name:>28s}" for name in PAIRED)]
    for scenario, by_split in results[after].items():
        for split, result in by_split.items():
            line = f"  {scenario}, {split}".ljust(42)
            for name in PAIRED:
                old = torch.tensor(results[before][scenario][split]["each"][name])
                new = torch.tensor(result["each"][name])
                mean, se = _mean_and_se(new - old)
                line += f"{mean:+10.3f} +-{se:6.3f} ({mean / se:+5.1f})"
            lines.append(line)
    return "\n".join(lines) + "\n(in brackets: in standard errors)"
