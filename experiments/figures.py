"""
The paper's tables and figures, made from what a run folder holds.

    python -m experiments.figures --table 1         # DiT and language models, IID and OOD
    python -m experiments.figures --table 2         # VQGAN and DDT, SFT and RL; greedy and sampled
    python -m experiments.figures --table 4         # reconstruction, and what the tokens encode
    python -m experiments.figures --table order     # trains SFT on the codes in reverse order
    python -m experiments.figures --table ablation  # trains tokenizers that differ in one factor
    python -m experiments.figures --table rl        # trains policies that differ in one factor
    python -m experiments.figures --figure 3        # trains SFT on fewer clips: error against clips
    python -m experiments.figures --figure 4        # predicted clips beside the truth
    python -m experiments.figures --figure 5        # similarity of the tokens when a ball is moved
    python -m experiments.figures --figure 6        # similarity of the tokens of near frames
    python -m experiments.figures --figure 7        # first tokens of a frame replaced by another's
    python -m experiments.figures --figure 8        # errors over radius and speed, SFT and SFT + RL
    python -m experiments.figures --figure prefix   # reconstruction from the first k tokens

It reads runs/tiny (--out), names the command that makes what is missing, and writes pictures (PNG)
and numbers (JSON) to <out>/figures/. An interrupted table is continued. Tables 1, 2, order and rl
also take the runs in --others: other seeds, motions or tokenizers.

The mean of several runs has the standard error over runs. For a single run it is over clips and
ignores the variance between trainings. One process, on the GPU if there is one.

Axes: B frames or clips, F frames of a clip, N balls, K tokens of a frame, L vectors of width D,
A attributes.
"""
import dataclasses
import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import torch
from torch import Tensor, nn

import checkpoint
import ddt
import evaluate
import grpo
import pictures
import reward
import sft
import sim
import train
import vae
from checkpoint import UserError, check, checksum, nan_for_null, read_json, write_json
from ddt import DDT, MODEL
from evaluate import EVAL_SEED
from experiments.dit import DiT
from experiments.plot import Points, chart, heat_maps, smooth
from experiments.vqgan import VQGAN
from lm import Llama
from sim import CONDITION, FRAMES
from text import Tokenizer


@dataclass
class Config:
    # run
    preset: str = "tiny"    # preset of the run folder: tiny, small or paper
    out: str = ""           # run folder (empty: runs/<preset>)
    others: str = ""        # more run folders, separated by commas, for tables 1, 2, order and rl
    # what to make
    table: str = ""         # table to make: 1, 2, 4, order, ablation or rl
    figure: str = ""        # figure to make: 3 to 8, or prefix
    clips: int = 32         # clips per split; tables 1 and 2 take four times as many
    llm: str = ""           # folder of a text model, whose embeddings figures 5 and 6 add


PRESETS = {"tiny": {}, "small": {}, "paper": {}}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# ------------------------------------------------------------------ run folders


def check_run(run: Path, name: str, **needed) -> dict:
    """
    -> the settings that the model in <run>/<name> was trained with; {} for a VAE of --vae.

    Raises UserError if there is no model, with the command that trains it, and if one of the
    `needed` settings is another one.
    """
    flags = "".join(f" --{field} {value}" for field, value in needed.items())
    command = f"{checkpoint.command(name)} --out {run}{flags}"
    preset = "" if "preset" in needed else ", with the --preset that the folder has"
    check(checkpoint.has_model(run / name), f"{run}/{name} is missing or not finished: make it "
          f"with `{command}`{preset}")
    settings = read_json(run / name / "trained.json", checkpoint.remedy(run / name), needed)
    for field, value in needed.items() if settings else ():
        check(settings[field] == value, f"{run}/{name} was trained with --{field} "
              f"{settings[field]}; this table is of --{field} {value}: choose another --out")
    return settings


def load(run: Path, name: str) -> DDT | VQGAN | DiT:
    """The model of <run>/ddt, vqgan or dit."""
    check_run(run, name)
    kinds = {"ddt": DDT, "vqgan": VQGAN, "dit": DiT}
    return kinds[name].load(run / name).to(DEVICE)


def load_tokenizers(config: Config) -> dict[str, DDT | VQGAN]:
    """Both tokenizers of a run folder. Raises UserError if they are not of the same frames."""
    models = {"VQGAN": load(Path(config.out), "vqgan"), "DDT": load(Path(config.out), "ddt")}
    frames = {f"{m.config.scenario}, {m.config.size} pixels" for m in models.values()}
    check(len(frames) == 1, f"{config.out}: DDT and VQGAN are of different frames "
          f"({'; '.join(sorted(frames))}): train one of them again with --fresh")
    return models


def tokenizer_of(run: Path) -> str:
    """ddt or vqgan: the tokenizer that a run's language models were trained with."""
    return "vqgan" if "vqgan" in read_json(run / "sft" / "provenance.json") else "ddt"


def load_language_model(run: Path, name: str) -> tuple[Llama, DDT | VQGAN]:
    """<run>/sft or <run>/grpo and its tokenizer. UserError if one was trained anew since."""
    kind = tokenizer_of(run)
    check_run(run, name, **{"tokenizer": kind} if kind == "vqgan" else {})
    sources = {kind: run / kind / MODEL}
    if name == "grpo":
        sources["sft"] = run / "sft" / MODEL
    tokenizer = load(run, kind)
    return sft.load(run / name, **sources).to(DEVICE), tokenizer


def motions(run: Path, name: str) -> list[str]:
    """The scenarios that a run's language model was trained on. (Its tokenizer may know more.)"""
    return train.scenarios(check_run(run, name)["scenario"])


def run_folders(config: Config) -> list[Path]:
    """--out and --others. Raises UserError for one that is missing or named twice."""
    names = [config.out, *config.others.split(",")]
    folders = [Path(name.strip()) for name in names if name.strip()]
    for folder in folders:
        check(folder.is_dir(), f"{folder} is missing: make it with `python grpo.py --out {folder}`")
    different = {folder.resolve() for folder in folders}
    check(len(different) == len(folders), f"--others {config.others}: names a run twice")
    return folders


def sft_config(run: Path, **changes) -> sft.Config:
    """The Config that a run's SFT model was trained with, but for `changes`."""
    settings = check_run(run, "sft")
    return sft.Config(**sft.PRESETS[settings["preset"]] | settings | changes)


def train_sft(config: sft.Config) -> None:
    """Trains a language model and evaluates it; what is done already is not done again."""
    world = train.start(config.seed, config.out)
    sft.run_stage(config, sft.load_tokenizer(config, world), world)


def sft_row(run: Path) -> dict:
    """SFT's row of a run's table: scenario -> split -> result. Raises UserError if not whole."""
    row = evaluate.read_results(run / "results.json").get("SFT", {})
    for scenario in motions(run, "sft"):
        missing = [split for split in evaluate.SPLITS if split not in row.get(scenario, {})]
        check(not missing, f"{run}/results.json has no whole row of SFT: `python sft.py --out "
              f"{run}` adds what is missing")
    return row


ROWS = {"llm": (), "vae": ("ground truth", "VAE"), "ddt": ("DDT",), "sft": ("SFT",)}


def prior_of(run: Path) -> list[str]:
    """["llm"], or [] if the run has no prior (sft.py --llm)."""
    return ["llm"] if (run / "llm").is_dir() else []


def fork(run: Path, place: Path, *names: str) -> Path:
    """
    Makes a run folder that begins with some of another's models and their rows of the table.

    Raises UserError if it is there, but was made from other weights than `run` now holds.
    """
    if not place.exists():
        part = place.with_name(place.name + ".part")        # renamed when it is whole
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        for name in names:
            no_log = shutil.ignore_patterns("log.jsonl")
            shutil.copytree(run / name, part / name, ignore=no_log)
        known = evaluate.read_results(run / "results.json")
        rows = [row for name in names for row in ROWS[name] if row in known]
        write_json(part / "results.json", {row: known[row] for row in rows})
        part.rename(place)
    for name in names:
        file = vae.WEIGHTS if name == "vae" else MODEL
        same = checksum(place / name / file) == checksum(run / name / file)
        check(same, f"{place} was made from another {name} than {run} now holds: delete it, it is "
              "made again")
    return place


def forget_others(path: Path, run: Path, *names: str) -> None:
    """Deletes a file of results that were measured on other models than <run>/<name>."""
    note = path.with_suffix(".of.json")
    stamp = {name: checksum(run / name / MODEL) for name in names}
    if read_json(note) != stamp:
        path.unlink(missing_ok=True)
        write_json(note, stamp)


# ------------------------------------------------------------------ what is measured


def in_chunks(f: Callable[..., Tensor], *x: Tensor) -> Tensor:
    """f of the rows of x, 64 at a time, on the device; the result is on the CPU."""
    chunks = zip(*(y.split(64) for y in x))
    return torch.cat([f(*(y.to(DEVICE) for y in chunk)).cpu() for chunk in chunks])


def decode(model: DDT | VQGAN, codes: Tensor) -> Tensor:
    """codes (B, K) -> frames (B, 3, H, W), each from noise of its own, a function of its codes."""
    def from_own_noise(codes):
        generators = [train.generator(0, *code, device=DEVICE) for code in codes.tolist()]
        return model.decode(codes, generator=generators)
    return in_chunks(from_own_noise, codes)


def still_frames(n: int, scenario: str, split: str, size: int,
                 seed: int = EVAL_SEED) -> tuple[Tensor, Tensor, Tensor]:
    """n first frames of clips -> frames (n, 3, H, W), positions (n, N, 2), radii (n, N)."""
    clips = sim.sample(scenario, split, n, seed)            # every clip starts wholly in view
    frames = sim.render(clips.position[:, :1], clips.radius, size)[:, 0]
    return frames, clips.position[:, 0], clips.radius


def token_information(codes: Tensor, attributes: Tensor) -> list[dict]:
    """
    What each token encodes: codes (B, K), attributes (B, A) -> per token the codes in use, their
    perplexity, their entropy in bits, and the share of each attribute's variance that the code
    explains.

    The share is of the second half of the rows, with the mean of each code in the first half:
    frames of one clip are alike, and on the same rows a code would explain what it has memorised.
    """
    rows, half = [], len(codes) // 2
    first, second = attributes[:half], attributes[half:]
    for k in range(codes.shape[1]):
        _, inverse, count = codes[:, k].unique(return_inverse=True, return_counts=True)
        n = len(count)
        p = count / count.sum()
        bits = -(p * p.log2()).sum().item()

        total = torch.zeros(n, first.shape[1], dtype=first.dtype)
        total.index_add_(0, inverse[:half], first)                              # (n, A)
        seen = torch.bincount(inverse[:half], minlength=n)[:, None]             # (n, 1)
        mean = torch.where(seen > 0, total / seen.clamp(min=1), first.mean(0))  # (n, A)
        residual = second - mean[inverse[half:]]
        explained = 1 - residual.square().mean(0) / second.var(0, correction=0)
        rows.append({"codes": n, "perplexity": 2 ** bits, "bits": bits,
                     "explained": explained.tolist()})
    return rows


def ball_errors(frames: Tensor, position: Tensor, radius: Tensor) -> dict[str, float]:
    """
    frames (B, 3, H, W), true positions (B, N, 2) and radii (B, N) -> median error of the centre
    and of the radius in units, and the share of balls that are not found.
    """
    center, size, found = reward.detect(frames[:, None], radius.shape[1])       # (B, 1, N, ..)
    center_error = (center[:, 0] - position).norm(dim=-1)
    radius_error = (size[:, 0] - radius).abs()
    return {"center": center_error.nanmedian().item(), "radius": radius_error.nanmedian().item(),
            "missing": (~found).float().mean().item()}


# ------------------------------------------------------------------ tables 1 and 2

# the paper's velocity error, in distribution / out of it: uniform, parabola, collision
PAPER1 = {
    "DiT-S": "0.015 / 0.288  0.052 / 0.311  0.023 / 0.153",
    "DiT-B": "0.014 / 0.358  0.036 / 0.287  0.018 / 0.211",
    "DiT-L": "0.012 / 0.427  0.035 / 0.337  0.015 / 0.161",
    "Qwen-1.5B": "0.025 / 0.271  0.023 / 0.399  0.056 / 0.185",
    "Qwen-7B": "0.016 / 0.071  0.017 / 0.068  0.043 / 0.047",
    "Llama3.1-8B": "0.014 / 0.057  0.018 / 0.062  0.048 / 0.051",
}
PAPER2 = {
    "VQGAN, SFT": "0.032 / 0.884  0.090 / 0.951  0.054 / 0.322",
    "VQGAN, SFT + RL": "0.030 / 0.281  0.082 / 0.426  0.053 / 0.120",
    "DDT, SFT": "0.032 / 0.763  0.024 / 0.685  0.050 / 0.184",
    "DDT, SFT + RL": "0.014 / 0.057  0.018 / 0.062  0.048 / 0.051",
}
STAGES = {"sft": "SFT", "grpo": "SFT + RL"}
SAMPLES = 8

# of one run: a result per sample (scenario -> split -> evaluate's), and whether the best is taken
OneRun = tuple[list[dict], bool]


def predictions(run: Path, name: str, config: Config, samples: int = 0) -> dict[str, dict]:
    """
    Evaluates <run>/dit, sft or grpo on iid clips and on each out-of-distribution level:
    row -> scenario -> split -> result of evaluate, kept in <run>/figures/<name>.json.

    Rows: "" (a sample of DiT, greedy decoding of a language model) and, of language models,
    "sample 1" to "sample <samples>" (top-k 50, top-p 0.95, as the rollouts of RL).
    """
    if name == "dit":
        model = load(run, "dit")
        predictors = {"": model.predictor()}
        size, scenarios = model.config.size, train.scenarios(model.config.scenario)
    else:
        model, tokenizer = load_language_model(run, name)
        predictors = {"": sft.predictor(model, tokenizer)}
        for i in range(samples):
            predictors[f"sample {i + 1}"] = sft.predictor(model, tokenizer, i, 50, 0.95)
        size, scenarios = tokenizer.config.size, motions(run, name)
    path = checkpoint.writable(run / "figures") / f"{name}.json"
    forget_others(path, run, name)
    for row, predict in predictors.items():
        for scenario in scenarios:
            splits = ("iid", *sim.levels(scenario))
            evaluate.add_row(path, row, predict, [scenario], splits, 4 * config.clips, size=size,
                             device=DEVICE)
    results = evaluate.read_results(path)
    return {row: results[row] for row in predictors}


def clip_by_clip(results: list[dict], splits: list[str], measure: str,
                 best: bool = False) -> Tensor:
    """
    A measure of every clip of the splits (B,): the mean over results (samples), or with `best`
    that of the result with the highest reward. Clips in which no frame counts are left out.
    """
    def values(name):                                       # (results, B)
        rows = [[x for split in splits for x in result[split]["each"][name]] for result in results]
        return torch.tensor(rows, dtype=torch.float64)

    value = values(measure)
    if best:
        value = value.gather(0, values("reward").argmax(0, keepdim=True))[0]
    else:
        value = value.mean(0)
    return value[~value.isnan()]


def cell(values: list[Tensor]) -> str:
    """Mean +- standard error: over runs; for a single run over its clips."""
    x = torch.stack([v.mean() for v in values]) if len(values) > 1 else values[0]
    return f"{x.mean():.3f} +- {x.std() / math.sqrt(len(x)):.3f}"


def comparison(rows: dict[str, list[OneRun]], paper: dict[str, str]) -> str:
    """
    A block per scenario: the drift_error, which is very likely what the paper's tables hold
    (docs/RESULTS.md), and the reward of each row, then the paper's numbers.
    """
    lines = []
    for i, scenario in enumerate(sim.SCENARIOS):
        columns = ("drift_error, IID", "OOD", "reward, IID", "OOD")
        title = f"\n{scenario}".ljust(38) + "runs"
        lines.append(title + "".join(f"{column:>18s}" for column in columns))
        blocks = {}
        for label, of_runs in rows.items():
            blocks[label] = [([result[scenario] for result in results], best)
                             for results, best in of_runs if scenario in results[0]]
        for label, of_runs in blocks.items():
            cells = [] if of_runs else ["not run yet"]
            for measure in ("drift_error", "reward") if of_runs else ():
                for splits in (["iid"], sim.levels(scenario)):
                    cells.append(cell([clip_by_clip(results, splits, measure, best)
                                       for results, best in of_runs]))
            if any(blocks.values()):
                line = f"  {label:35s}{len(of_runs):4d}"
                lines.append(line + "".join(f"{text:>18s}" for text in cells))
        if not any(blocks.values()):
            lines.append(f"  not run yet: python grpo.py --scenario {scenario} --out FOLDER, and "
                         "--others FOLDER here")
        for label, numbers in paper.items():
            iid, ood = numbers.split("  ")[i].split(" / ")
            lines.append(f"  {'paper: ' + label:39s}{iid:>18s}{ood:>18s}")
    return "\n".join(lines)


def table1(config: Config, folder: Path) -> str:
    rows: dict[str, list[OneRun]] = {}
    for run in run_folders(config):
        for name in ("dit", *STAGES):
            if not (run / name / MODEL).exists():
                continue
            if name == "dit":
                label = f"DiT, {load(run, name).config.preset}"
            else:
                label = f"{tokenizer_of(run).upper()}, {STAGES[name]}"
            results = [predictions(run, name, config)[""]]
            rows.setdefault(label, []).append((results, False))
    check(rows, f"{config.out} holds no model that predicts: make one with `python grpo.py --out "
          f"{config.out}`")
    return comparison(rows, PAPER1)


def table2(config: Config, folder: Path) -> str:
    """The best of 8 samples is chosen by the true reward: a bound, which no predictor can know."""
    sampled, best = ", sampled", f", best of {SAMPLES} (oracle)"
    rows: dict[str, list[OneRun]] = {}
    for kind in ("VQGAN", "DDT"):
        for label in STAGES.values():
            for how in ("", sampled, best):
                rows[f"{kind}, {label}{how}"] = []
    for run in run_folders(config):
        for name, label in STAGES.items():
            row = f"{tokenizer_of(run).upper()}, {label}"
            greedy, *samples = predictions(run, name, config, SAMPLES).values()
            rows[row].append(([greedy], False))
            rows[row + sampled].append((samples, False))
            rows[row + best].append((samples, True))
    return comparison(rows, PAPER2)


# ------------------------------------------------------------------ order of the codes


def order(config: Config, folder: Path) -> str:
    """Each run's SFT beside one on the reversed codes of a frame, trained in <run>/reverse."""
    found: dict[str, list[list[Tensor]]] = {}
    for run in run_folders(config):
        check_run(run, "sft")
        sft_row(run)                                        # fails before hours of training
        tokenizer, place = load(run, "ddt"), fork(run, run / "reverse", *prior_of(run))
        own = tokenizer.config.order
        other = {"forward": "reverse", "reverse": "forward"}[own]
        tokenizer.config.order = other
        if not (place / "ddt" / MODEL).exists():
            tokenizer.save(checkpoint.writable(place / "ddt"))
        codebook = load(place, "ddt").quantizer.codebook
        check(torch.equal(codebook, tokenizer.quantizer.codebook), f"{place} was made from another "
              f"ddt than {run} now holds: delete it, it is made again")
        train_sft(sft_config(run, out=str(place)))
        for folder_of, name in ((run, own), (place, other)):
            for scenario, splits in sft_row(folder_of).items():
                values = [clip_by_clip([splits], [split], "drift_error")
                          for split in evaluate.SPLITS]
                found.setdefault(f"{scenario}, {name}", []).append(values)
    title = "drift_error of SFT".ljust(29) + "runs"
    lines = [title + "".join(f"{split:>18s}" for split in evaluate.SPLITS)]
    for name, of_runs in sorted(found.items()):
        cells = [cell(list(values)) for values in zip(*of_runs)]
        line = f"  {name:27s}{len(of_runs):4d}"
        lines.append(line + "".join(f"{text:>18s}" for text in cells))
    return "\n".join(lines)


# ------------------------------------------------------------------ table 4

STEPS = (4, 16, 50)


def table4(config: Config, folder: Path) -> str:
    models, path = load_tokenizers(config), folder / "table4.json"
    tokenizer = models["DDT"]
    scenarios, size = train.scenarios(tokenizer.config.scenario), tokenizer.config.size

    rows = {"ground truth": lambda frames: frames, "VAE": vae.reconstruction(tokenizer.vae)}
    for kind, model in models.items():
        rows[kind] = ddt.reconstruction(model)
    for steps in STEPS:
        rows[f"DDT, {steps} Euler steps"] = ddt.reconstruction(tokenizer, steps=steps)
    forget_others(path, Path(config.out), "ddt", "vqgan")
    for row, predict in rows.items():
        for scenario in scenarios:
            splits = ("iid", *sim.levels(scenario))
            evaluate.add_row(path, row, predict, [scenario], splits, config.clips, size=size,
                             shown=FRAMES, device=DEVICE)
    blocks = [evaluate.table(path)]
    for scenario in scenarios:
        for kind, model in models.items():
            blocks.append(what_tokens_encode(model, scenario, kind, config))
    return "\n".join(blocks)


def what_tokens_encode(model: DDT | VQGAN, scenario: str, kind: str, config: Config) -> str:
    """Per token of held-out frames: codes in use, bits, and the variance they explain."""
    clips = sim.sample(scenario, "iid", 8 * config.clips, EVAL_SEED)
    inside, N = clips.inside.all(-1), clips.radius.shape[1]                     # (B, F)

    def render(position, radius):
        return sim.render(position, radius, model.config.size)
    frames = in_chunks(render, clips.position, clips.radius)[inside]            # (n, 3, H, W)
    radius = clips.radius[:, None].expand(-1, FRAMES, -1)                       # (B, F, N)
    attributes = torch.cat([clips.position.flatten(2), radius], -1)[inside]     # (n, 3 N)
    names = [f"{axis}{i + 1}" for i in range(N) for axis in "xy"]
    names += [f"r{i + 1}" for i in range(N)]

    codes = in_chunks(model.encode, frames)                                     # (n, K)
    again = in_chunks(lambda c: model.encode(decode(model, c).to(DEVICE)), codes)
    near = sft.nearest_codes(model.quantizer.codebook, 5)[codes]                # (n, K, 5)
    kept = (again == codes).double().mean()
    to_near = (again[..., None] == near[..., 1:]).any(-1)   # the first is the code itself
    moved = to_near.double().mean()
    tokens = token_information(codes, attributes)
    bits = sum(token["bits"] for token in tokens)

    used = len(codes.unique())
    lines = [f"\n{scenario}, {kind}: {used} codes in use, at most {bits:.1f} bits per frame; "
             f"encode(decode(codes)) keeps {kept:.1%} of the codes and makes of {moved:.1%} one of "
             "their four nearest"]
    title = "token   codes  perplexity    bits   variance explained: "
    lines.append(title + "  ".join(f"{name:>5s}" for name in names))
    for k, token in enumerate(tokens):
        line = f"{k + 1:5d}{token['codes']:8d}{token['perplexity']:12.1f}{token['bits']:8.2f}"
        lines.append(line + " " * 22 + "  ".join(f"{x:5.2f}" for x in token["explained"]))
    return "\n".join(lines)


# ------------------------------------------------------------------ ablation of the tokenizer

# none restarts; every row takes as many steps as make the same number of FLOPs
BASE = ddt.Config(steps=2000)
SEEDS = (0, 1, 2)
ABLATION = {                    # row -> fields that differ from BASE; "vae": its own VAE's Config
    "as it is": {},
    "4 tokens": {"queries": 4},
    "8 tokens": {"queries": 8},
    "16 tokens": {"queries": 16},
    # with less noise the tokens stay alike
    "codes of 16 dimensions": {"code_dim": 16, "token_noise": 0.2},
    # a sphere, not a circle
    "codes of 4 dimensions": {"code_dim": 4},
    "all tokens at every time": {"prefix": "all"},
    # token noise and crowding wait for its error to fall
    "no pure noise (nor what waits for it)": {"pure_noise": 0.0},
    "6 in 10 of pure noise": {"pure_noise": 0.6},
    "time not skewed": {"shift": 1.0},
    "time less skewed": {"shift": 8.0},
    "time more skewed": {"shift": 40.0},
    "decoder 4 layers": {"layers": 4},
    "VAE of 150 steps": {"vae": vae.Config(steps=150, warmup=25)},
    "no token noise, no crowding": {"token_noise": 0.0, "spread": 0.0},
    "twice the budget": {"steps": 4000},
}
QUALITY = ("centre", "radius", "drift", "codes", "bits", "speed probe")


def flops(config: ddt.Config) -> float:
    """FLOPs of one training step."""
    from experiments.plan import plan_ddt
    return plan_ddt(config, 1).flops


def ablation(config: Config, folder: Path) -> str:
    """
    Tokenizers of uniform motion that differ from `tiny` in one factor, trained in <out>/ablation
    for hours: mean and standard error over seeds. All use the VAE of <out>, but for the row of
    another VAE.
    """
    shared = Path(config.out, "vae")
    check_run(shared.parent, "vae", preset="tiny", scenario="uniform")
    path, work = folder / "ablation.json", BASE.steps * flops(BASE)
    done = read_json(path)
    lines = [f"{'steps':>43s}" + "".join(f"{name:>18s}" for name in QUALITY)]
    for name, change in ABLATION.items():
        fields = dict(change)
        own_vae = fields.pop("vae", None)
        c = dataclasses.replace(BASE, **fields)
        if "steps" not in change:
            c.steps = round(work / flops(c))
        c.warmup = max(c.steps // 5, 1)
        c.vae = "" if own_vae else str(shared)
        rows = []
        for seed in SEEDS:
            run = f"{name}-{seed}".replace(" ", "-").replace(",", "")
            c.seed, c.out = seed, str(folder.parent / "ablation" / run)
            of = dataclasses.asdict(c) | {"out": ""}
            of["vae"] = dataclasses.asdict(own_vae) if own_vae else checksum(shared / vae.WEIGHTS)
            known = done.get(run, {})
            if known.get("of") != of:
                train_tokenizer(c, own_vae, fresh=bool(known))
            if (known.get("of"), known.get("clips")) != (of, config.clips):
                measured = quality(Path(c.out), config.clips)
                known = done[run] = {"of": of, "clips": config.clips, "quality": measured}
                write_json(path, done)
            rows.append(nan_for_null(known["quality"]))
        x = torch.tensor(rows, dtype=torch.float64)         # (seeds, measures)
        line = f"{name:38s}{c.steps:5d}"
        for mean, error in zip(x.mean(0), x.std(0) / math.sqrt(len(rows))):
            line += f"{mean:9.3f} +-{error:6.3f}"
        lines.append(line)
        print(line)                                         # the next row may take an hour
    return "\n".join(lines)


def train_tokenizer(config: ddt.Config, own_vae: vae.Config | None, fresh: bool) -> None:
    """Trains a tokenizer, first its VAE if it has its own; fresh: both again."""
    world = train.start(config.seed, config.out)
    if fresh:
        checkpoint.delete_model(Path(config.out, "vae"))
    if own_vae:
        same = {field: getattr(config, field) for field in ("out", "seed", "clips", "size")}
        vae.run_stage(dataclasses.replace(own_vae, **same), world)
    ddt.run_stage(dataclasses.replace(config, fresh=fresh), world)


def quality(run: Path, clips: int) -> list[float]:
    """
    Of the tokenizer of a run, uniform motion: median centre error, radius and drift error of
    reconstructed iid clips; codes in use; bits per frame; error of the speed probe.
    """
    model, scenario = load(run, "ddt"), "uniform"
    center, used = ddt.center_error(model, scenario, DEVICE, 4 * clips)
    row = evaluate.read_results(run / "results.json")["DDT"][scenario]["iid"]
    held_out = sim.sample(scenario, "iid", 4 * clips, EVAL_SEED)
    frames = sim.render(held_out.position, held_out.radius, model.config.size)
    frames = frames[held_out.inside.all(-1)]
    tokens = token_information(in_chunks(model.encode, frames), torch.zeros(len(frames), 1))
    bits = sum(token["bits"] for token in tokens)
    probe = speed_probe(model, scenario, 200 * clips)
    return [center, row["radius_error"], row["drift_error"], used, bits, probe]


def speed_probe(model: DDT | VQGAN, scenario: str, n: int, steps: int = 1000) -> float:
    """
    What a language model has to do first: to tell the speed from the tokens of the given frames.
    Here by a small MLP trained on n clips -> its mean error on other clips of the training range,
    units/s.
    """
    def encode(position, radius):
        return model.encode(sim.render(position, radius, model.config.size).flatten(0, 1))

    def draw(n: int, seed: int) -> tuple[Tensor, Tensor]:
        clips = sim.first_frames(scenario, "pretrain", n, seed)
        position = sim.closed_form(clips)[:, :CONDITION]
        codes = in_chunks(encode, position, clips.radius).view(n, -1)           # (n, 3 K)
        ids = codes + torch.arange(codes.shape[1]) * 256
        return ids, clips.velocity[:, :1].float()

    ids, speed = draw(n, 0)
    ids_test, speed_test = draw(max(n // 8, 1), EVAL_SEED)
    tokens = ids.shape[1]
    with torch.random.fork_rng(devices=[]):                 # on the CPU: too small for a GPU
        torch.manual_seed(0)
        mlp = nn.Sequential(nn.Embedding(256 * tokens, 64), nn.Flatten(),
                            nn.Linear(64 * tokens, 256), nn.GELU(),
                            nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 1))
        optimizer = torch.optim.AdamW(mlp.parameters(), 3e-3, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
        for _ in range(steps):
            batch = torch.randint(n, (512,))
            loss = (mlp(ids[batch]) - speed[batch]).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        with torch.no_grad():
            return (mlp(ids_test) - speed_test).abs().mean().item()


# ------------------------------------------------------------------ ablation of RL

# factor -> row -> fields that differ from grpo.py's defaults; "sft_steps": trains another SFT model
RL = {
    "as it is": {"the next 8 frames": {}},
    "credit": {"the whole clip": {"whole_clip": True}, "all frames ahead": {"horizon": FRAMES}},
    "known clips": {"no KL on known clips": {"beta_pretrain": 0.0}},
    "groups": {"16 groups of 4": {"prompts": 16, "group": 4},
               "4 groups of 16": {"prompts": 4, "group": 16}},
    "KL": {"beta 0": {"beta": 0.0}, "beta 0.01": {"beta": 0.01}, "beta 0.04": {"beta": 0.04}},
    "SFT": {"SFT of 400 steps": {"sft_steps": 400}, "SFT of 800 steps": {"sft_steps": 800}},
}
CURVES = {  # file name -> key in log.jsonl, title of the axis
    "reward": ("reward", "reward of rollouts"),
    "velocity": ("rewards/velocity/mean", "velocity reward of rollouts"),
    "mass": ("rewards/mass/mean", "mass reward of rollouts"),
    "kl": ("kl", "KL to the SFT model, nats per token"),
    "entropy": ("entropy", "entropy, nats per token"),
    "zero_std": ("frac_reward_zero_std", "share of groups with std below 0.1"),
}
CHANGED = {"posttrain": "reward", "pretrain": "drift_error", "iid": "drift_error",
           "ood": "drift_error", "slow": "drift_error", "fast": "drift_error"}
WINDOW = 5  # steps of the running mean


def train_policy(run: Path, name: str, change: dict, clips: int) -> Path:
    """
    GRPO with a change -> <run>/rl/<name>, with the rows of both language models in its table. It
    starts from the run's SFT model, or from one trained for `sft_steps`.
    """
    change = dict(change)
    sft_steps = change.pop("sft_steps", 0)
    copied = (*prior_of(run), "vae", "ddt") if sft_steps else ("vae", "ddt", "sft")
    place = fork(run, run / "rl" / name.replace(" ", "-"), *copied)
    if sft_steps:
        train_sft(sft_config(run, steps=sft_steps, out=str(place)))
    change |= {"out": place, "seed": check_run(run, "sft")["seed"]}
    grpo.main([f"--{field}" if value is True else f"--{field}={value}"
               for field, value in change.items()])
    for stage, row in STAGES.items():                       # the stages do not evaluate pretrain
        model, tokenizer = load_language_model(place, stage)
        evaluate.add_row(place / "results.json", row, sft.predictor(model, tokenizer), ["uniform"],
                         ("pretrain",), clips, size=tokenizer.config.size, device=DEVICE)
    return place


def change_by_rl(place: Path, split: str, measure: str) -> Tensor:
    """SFT + RL minus SFT, clip by clip (B,); clips in which no frame counts are left out."""
    results = evaluate.read_results(place / "results.json")
    before, after = (torch.tensor(results[row]["uniform"][split]["each"][measure])
                     for row in STAGES.values())
    difference = after - before
    return difference[~difference.isnan()]


def rl(config: Config, folder: Path) -> str:
    """
    GRPO on each run's SFT model with one factor changed: learning curves, and what RL changed. With
    more or fewer groups, the rewards of rollouts are of other conditions.
    """
    runs = run_folders(config)
    for run in runs:
        check_run(run, "sft", preset="tiny", scenario="uniform")
    title = " " * 20 + "runs"
    title += "".join(f"{name:>17s}" for name in ("training reward", "kl", "entropy"))
    for split, measure in CHANGED.items():
        title += f"{split + ' ' + measure.split('_')[0]:>18s}"
    lines, curves = [title], {curve: {} for curve in CURVES}
    for factor, rows in RL.items():
        for name, change in rows.items():
            places = [train_policy(run, name, change, 8 * config.clips) for run in runs]
            logs = [read_log(place / "grpo") for place in places]
            for curve, (key, _) in CURVES.items():
                mean = torch.tensor([[line[key] for line in log] for log in logs]).mean(0)
                curves[curve][name] = list(enumerate(mean.tolist()))
            line = f"{name:20s}{len(places):4d}"
            for curve in ("reward", "kl", "entropy"):
                end = smooth(curves[curve][name], WINDOW)[-5:]
                line += f"{sum(y for _, y in end) / len(end):17.3f}"
            for split, measure in CHANGED.items():
                line += f"{cell([change_by_rl(place, split, measure) for place in places]):>18s}"
            lines.append(line)
            print(line)
        for curve, (_, label) in CURVES.items():
            shown = {name: curves[curve][name] for name in [*RL["as it is"], *rows]}
            chart(folder / f"rl_{factor.replace(' ', '_')}_{curve}.png", "step", label, shown,
                  window=WINDOW)
    write_json(folder / "rl.json", curves)
    lines.append("(of rollouts at the end of training; then SFT + RL minus SFT on the same clips)")
    return "\n".join(lines)


def read_log(folder: Path) -> list[dict]:
    text = (folder / "log.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


# ------------------------------------------------------------------ figures 3, 4 and 8

SIZES = {"tiny": (60, 600, 6000), "small": (200, 2000, 20_000),
         "paper": (30_000, 300_000, 3_000_000)}


def figure3(config: Config, folder: Path) -> str:
    """drift_error of SFT against the number of training clips, all on the run's tokenizer."""
    run = Path(config.out)
    settings = check_run(run, "sft")
    sft_row(run)                                            # fails before hours of training
    curves: dict[str, Points] = {}
    lines = []
    for n in SIZES[settings["preset"]]:
        place = run
        if n != settings["clips"]:
            place = fork(run, run / "clips" / str(n), *prior_of(run), "vae", "ddt")
            train_sft(sft_config(run, clips=n, out=str(place)))
        line = f"{n:9d}"
        for scenario, splits in sft_row(place).items():
            for split in ("iid", "ood"):
                mean, error = (splits[split][name] for name in ("drift_error", "drift_error_se"))
                curves.setdefault(f"{scenario}, {split}", []).append((n, mean))
                line += f"{f'{mean:.3f} +- {error:.3f}':>20s}"
        lines.append(line)
    write_json(folder / "figure3.json", curves)
    chart(folder / "figure3.png", "training clips per motion", "drift error, units/s", curves,
          log_x=True)
    title = f"{'clips':>9s}" + "".join(f"{name:>20s}" for name in curves)
    return "\n".join([title, *lines])


def figure4(config: Config, folder: Path) -> str:
    """One clip of each split: the truth above what each model predicts from its first frames."""
    run = Path(config.out)
    policy, tokenizer = load_language_model(run, "grpo")
    reference, _ = load_language_model(run, "sft")
    scenarios, size = motions(run, "grpo"), tokenizer.config.size
    predictors = {"SFT": sft.predictor(reference, tokenizer),
                  "SFT + RL": sft.predictor(policy, tokenizer)}
    if (run / "dit" / MODEL).exists():
        dit = load(run, "dit")
        known = train.scenarios(dit.config.scenario)
        check(dit.config.size == size and set(scenarios) <= set(known), f"{run}: the DiT is of "
              f"{dit.config.size} pixels and {dit.config.scenario}, the policy of {size} and "
              f"{', '.join(scenarios)}: train one of them again with --fresh")
        predictors = {"DiT": dit.predictor()} | predictors

    splits = []
    for scenario in scenarios:
        splits += [(scenario, split) for split in ("iid", *sim.levels(scenario))]
    clips = [sim.sample(scenario, split, 1, EVAL_SEED) for scenario, split in splits]
    truth = [sim.render(clip.position, clip.radius, size) for clip in clips]
    videos = {"truth": torch.cat(truth)}                                        # (n, F, 3, H, W)
    for name, predict in predictors.items():
        predicted = [predict(frames[:, :CONDITION].to(DEVICE)).cpu() for frames in truth]
        videos[name] = torch.cat(predicted)
    names = [f"{scenario}, {split}" for scenario, split in splits]
    pictures.save_strip(folder / "figure4.png", videos, names, truth=clips, given=CONDITION)
    return f"{len(clips)} clips, {', '.join(videos)}; outlined: the true balls"


RADII = torch.arange(0.35, 2.0, 0.1, dtype=torch.float64)
SPEEDS = torch.arange(0.25, 6.0, 0.5, dtype=torch.float64)
HEIGHTS = 4


def grid_of_clips() -> sim.Clips:
    """Uniform balls that start at the left: all radii x speeds x heights."""
    heights = torch.linspace(0.1, 0.9, HEIGHTS, dtype=torch.float64)
    grid = torch.meshgrid(RADII, SPEEDS, heights, indexing="ij")
    radius, speed, height = (x.flatten()[:, None] for x in grid)                # (B, 1) each
    x, y = radius + 0.3, radius + 0.5 + height * (9 - 2 * radius)
    start = torch.stack([x, y], -1)[:, None]                                    # (B, 1, 1, 2)
    inside = torch.ones_like(radius)[:, None]
    return sim.play(sim.Clips("uniform", radius, speed, start, inside))


def regions() -> dict[str, Tensor]:
    """Name -> mask (radii, speeds)."""
    def within(name):
        r = torch.stack([(a <= RADII) & (RADII <= b) for a, b in sim.RADIUS[name]]).any(0)
        v = torch.stack([(a <= SPEEDS) & (SPEEDS <= b) for a, b in sim.SPEED[name]]).any(0)
        return r[:, None] & v
    return {"training range": within("pretrain"), "RL bands": within("posttrain"),
            "r and v out of range": within("ood"),
            "everything": torch.ones(len(RADII), len(SPEEDS), dtype=torch.bool)}


def figure8(config: Config, folder: Path) -> str:
    """Drift and radius error of SFT and SFT + RL over radius and speed of uniform balls."""
    run, clips = Path(config.out), grid_of_clips()
    maps: dict[str, dict[str, Tensor]] = {"drift_error": {}, "radius_error": {}}
    for stage, label in STAGES.items():
        model, tokenizer = load_language_model(run, stage)
        known = motions(run, stage)
        check("uniform" in known, f"{run}/{stage} is of {', '.join(known)}: figure 8 is of uniform "
              "motion")
        predict, errors = sft.predictor(model, tokenizer), []
        for i in range(0, len(clips), 64):
            part = clips[i:i + 64].to(DEVICE)
            frames = sim.render(part.position[:, :CONDITION], part.radius, tokenizer.config.size)
            errors.append(reward.errors(predict(frames), part))
        for measure in maps:
            value = torch.cat([error[measure] for error in errors]).cpu()
            value = value.view(len(RADII), len(SPEEDS), HEIGHTS)
            maps[measure][label] = value.nanmean(-1)        # (radii, speeds)

    panels, numbers = [], {"radius": RADII.tolist(), "speed": SPEEDS.tolist()}
    masks = regions()
    lines = [f"{'mean of':28s}" + "".join(f"{name:>22s}" for name in masks)]
    units = {"drift_error": ("drift error, units/s", 2.0),
             "radius_error": ("radius error, units", 0.5)}
    for measure, (title, darkest) in units.items():
        for label, value in maps[measure].items():
            panels.append((f"{label}: {title}", value, darkest))
            numbers[f"{label}, {measure}"] = value.tolist()
            means = [value[mask].nanmean() for mask in masks.values()]
            lines.append(f"{f'{label}, {measure}':28s}" + "".join(f"{x:22.3f}" for x in means))
    write_json(folder / "figure8.json", numbers)
    heat_maps(folder / "figure8.png", panels, RADII, SPEEDS)
    return "\n".join(lines)


# ------------------------------------------------------------------ figures of the tokenizers


def prefix(config: Config, folder: Path) -> str:
    """
    Reconstruction from the first k tokens: from pure noise, for which training always gives all K;
    and at the time t(k / K) that k tokens belong to, where the noisy frame itself helps. Beside it
    the same noisy frame without any token, which training never gives.
    """
    tokenizer = load(Path(config.out), "ddt")
    c = tokenizer.config
    K, scenario = c.queries, train.scenarios(c.scenario)[0]
    frames, position, radius = still_frames(8 * config.clips, scenario, "iid", c.size)
    latent = in_chunks(tokenizer.latent, frames)                                # (B, C, h, w)
    codes = in_chunks(tokenizer.encode, frames)                                 # (B, K)
    tokens = tokenizer.quantizer.codebook.cpu()[tokenizer.ordered(codes)]       # (B, K, dim)
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def reconstruct(x: Tensor, t: float, k: int) -> Tensor:
        """Noisy latents x at time t, the first k tokens -> frames (B, 3, H, W)."""
        def decode(x, tokens):
            visible = torch.full((len(x),), k, device=DEVICE)
            clean = tokenizer.decoder(x, x.new_full((len(x),), t), tokens, visible)
            return (tokenizer.vae.decode(clean) / 2 + 0.5).clamp(0, 1)
        return in_chunks(decode, x, tokens)

    shown = 8
    rows, strip = [], {"truth": frames[:shown]}
    for k in range(1, K + 1):
        t = tokenizer.times(torch.tensor([k / K]))[0].item()
        noisy = t * noise + (1 - t) * latent
        painted = {"noise": reconstruct(noise, 1.0, k), "own time": reconstruct(noisy, t, k),
                   "no tokens": reconstruct(noisy, t, 0)}
        strip[f"first {k}" if k < K else f"all {K}"] = painted["noise"][:shown]
        measured = {name: ball_errors(x, position, radius) for name, x in painted.items()}
        rows.append({"k": k, "t": t} | measured)

    write_json(folder / "prefix.json", rows)
    title = f"{scenario}, iid: reconstruction from pure noise and the first k tokens of a frame"
    videos = {name: x[None] for name, x in strip.items()}                     # (1, n, 3, H, W)
    pictures.save_strip(folder / "prefix.png", videos, [title], columns=[""] * len(strip["truth"]))
    names = {"noise": "pure noise, first k tokens", "own time": "noise of t(k), first k tokens",
             "no tokens": "noise of t(k), no token"}
    curves = {}
    for kind, name in names.items():
        curves[name] = [(row["k"], row[kind]["center"]) for row in rows]
    if any(math.isfinite(y) for points in curves.values() for _, y in points):
        chart(folder / "prefix_error.png", "tokens given to the decoder, k",
              "median centre error, units", curves)
    lines = [" " * 14 + "".join(f"{name:>31s}" for name in names.values()),
             f"{'k':>5s}{'t(k)':>9s}" + f"{'centre':>13s}{'radius':>9s}{'missing':>9s}" * 3]
    for row in rows:
        line = f"{row['k']:5d}{row['t']:9.3f}"
        for kind in names:
            error = row[kind]
            line += f"{error['center']:13.3f}{error['radius']:9.3f}{error['missing']:9.1%}"
        lines.append(line)
    return "\n".join(lines)


# frames (B, 3, H, W) and positions (B, N, 2) -> embeddings (B, L, D)
Embedder = Callable[[Tensor, Tensor], Tensor]


def embedders(config: Config, models: dict[str, DDT | VQGAN]) -> dict[str, Embedder]:
    """The tokenizers' code vectors and, with --llm, a text model's embedding of the coordinates."""
    def of_tokens(model):
        codebook = model.quantizer.codebook.cpu()
        return lambda frames, position: codebook[in_chunks(model.encode, frames)]

    found = {name: of_tokens(model) for name, model in models.items()}
    if config.llm:
        try:
            table = Llama.load(config.llm).model["embed_tokens"].weight
            text = Tokenizer.load(config.llm)
        except ValueError as error:
            raise UserError(f"--llm {config.llm}: {error}") from None

        def of_text(frames, position):
            means = []
            for numbers in position.flatten(1).tolist():
                words = " ".join(f"{x:.2f}" for x in numbers)
                ids = torch.tensor(text.encode(words, bos=False))
                means.append(table[ids].float().mean(0, keepdim=True))
            return torch.stack(means)                       # (B, 1, D)
        found["text"] = of_text
    return found


def similarity(a: Tensor, b: Tensor) -> Tensor:
    """Embeddings (B, L, D) each -> mean cosine (B,) of the L pairs of vectors."""
    return torch.cosine_similarity(a, b, dim=-1).mean(-1)


def figure5(config: Config, folder: Path) -> str:
    """Balls are moved to the right: how similar are the tokens before and after?"""
    models = load_tokenizers(config)
    size = models["DDT"].config.size
    shifts = [0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0]
    generator = torch.Generator().manual_seed(0)
    x, y, r = torch.rand(3, 4 * config.clips, 1, generator=generator, dtype=torch.float64)
    start, radius = torch.stack([1.5 + x, 2 + 6 * y], -1), 0.8 + 0.6 * r        # (B, 1, 2), (B, 1)
    curves: dict[str, Points] = {}
    for name, embed in embedders(config, models).items():
        embedded = []
        for shift in shifts:
            position = start + torch.tensor([shift, 0.0])
            frames = sim.render(position[:, None], radius, size)[:, 0]
            embedded.append(embed(frames, position))
        curves[name] = [(shift, similarity(embedded[0], moved).mean().item())
                        for shift, moved in zip(shifts, embedded)]
    write_json(folder / "figure5.json", curves)
    chart(folder / "figure5.png", "shift of the ball, units", "cosine similarity of the embeddings",
          curves)
    return as_table("shift", curves)


def figure6(config: Config, folder: Path) -> str:
    """Frames of one clip, some frames apart: how similar are their tokens?"""
    models = load_tokenizers(config)
    c = models["DDT"].config
    clips = sim.sample(train.scenarios(c.scenario)[0], "iid", config.clips, EVAL_SEED)
    frames = sim.render(clips.position, clips.radius, c.size)                   # (B, F, 3, H, W)
    inside = clips.inside.all(-1)                                               # (B, F)
    curves: dict[str, Points] = {}
    for name, embed in embedders(config, models).items():
        e = embed(frames.flatten(0, 1), clips.position.flatten(0, 1))           # (B F, L, D)
        e = e.unflatten(0, inside.shape)                                        # (B, F, L, D)
        curves[name] = []
        for gap in range(1, 11):
            pairs = inside[:, :-gap] & inside[:, gap:]                          # (B, F - gap)
            alike = similarity(e[:, :-gap][pairs], e[:, gap:][pairs])
            curves[name].append((gap, alike.mean().item()))
    write_json(folder / "figure6.json", curves)
    chart(folder / "figure6.png", "distance in time, frames", "cosine similarity of the embeddings",
          curves)
    return as_table("frames apart", curves)


def figure7(config: Config, folder: Path) -> str:
    """Counterfactual interpolation: the first m tokens are another frame's."""
    models = load_tokenizers(config)
    c = models["DDT"].config
    scenario = train.scenarios(c.scenario)[0]
    frames, _, _ = still_frames(4, scenario, "iid", c.size, seed=5)
    parts = min(8, *(model.config.queries for model in models.values()))
    rows: dict[str, list[Tensor]] = {name: [] for name in models}
    for a, b in ((0, 1), (2, 3)):
        for name, model in models.items():
            codes, K = in_chunks(model.encode, frames), model.config.queries
            replaced = [K * i // parts for i in range(parts + 1)]
            mixed = torch.stack([torch.cat([codes[b, :m], codes[a, m:]]) for m in replaced])
            painted = decode(model, mixed)
            rows[name].append(torch.cat([frames[a:a + 1], painted, frames[b:b + 1]]))
    columns = ["frame A", *(f"{i}/{parts}" for i in range(parts + 1)), "frame B"]
    names = [f"{scenario}, pair {i}: A's first tokens replaced by B's" for i in (1, 2)]
    videos = {name: torch.stack(strips) for name, strips in rows.items()}
    pictures.save_strip(folder / "figure7.png", videos, names, columns=columns)
    return (f"from frame A to frame B: reconstructions of A with the first 0/{parts} to "
            f"{parts}/{parts} of its tokens replaced by B's")


def as_table(title: str, curves: dict[str, Points]) -> str:
    """Curves over the same x as text."""
    lines = [f"{title:>14s}" + "".join(f"{name:>10s}" for name in curves)]
    for points in zip(*curves.values()):
        line = f"{points[0][0]:14.2f}"
        lines.append(line + "".join(f"{y:10.3f}" for _, y in points))
    return "\n".join(lines)


# ------------------------------------------------------------------ the command

COMMANDS = {
    "table 1": table1, "table 2": table2, "table 4": table4, "table order": order,
    "table ablation": ablation, "table rl": rl, "figure 3": figure3, "figure 4": figure4,
    "figure 5": figure5, "figure 6": figure6, "figure 7": figure7, "figure 8": figure8,
    "figure prefix": prefix,
}
WITH_OTHERS = ("table 1", "table 2", "table order", "table rl")
WITH_LLM = ("figure 5", "figure 6")


def check_config(c: Config) -> str:
    """The command that the flags name. UserError for flags that mean nothing together."""
    choices = "choose one of " + ", ".join("--" + name for name in COMMANDS)
    check(bool(c.table) != bool(c.figure), f"a table or a figure: {choices}")
    asked = f"figure {c.figure}" if c.figure else f"table {c.table}"
    check(asked in COMMANDS, f"there is no {asked}: {choices}")
    check(not c.others or asked in WITH_OTHERS, f"--others: {asked} is of one run")
    check(not c.llm or asked in WITH_LLM, f"--llm: {asked} uses no text model")
    vae.check_ranges(c, clips=(1, 10_000))
    check(Path(c.out).is_dir(), f"{c.out} is missing: make it with `python grpo.py --out {c.out}`")
    return asked


def main(argv: list[str] | None = None) -> None:
    config = train.parse(Config, PRESETS, argv)
    asked = check_config(config)
    check(train.start(0).size == 1, "experiments.figures runs in one process: leave torchrun out")
    folder = checkpoint.writable(Path(config.out, "figures"))
    try:
        print(COMMANDS[asked](config, folder))
        print(f"\n{folder}/")
    finally:
        if not any(folder.iterdir()):                       # nothing came of it
            folder.rmdir()


if __name__ == "__main__":
    train.cli(main)
