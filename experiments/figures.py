"""
The paper's tables and figures, from what a run folder holds.

    python figures.py --table 1             # DiT beside our language models, in and out of distribution
    python figures.py --table 2             # VQGAN and DDT tokens, without and with RL; most likely codes, samples, best of 8
    python figures.py --table 4             # reconstruction: ground truth, VAE, VQGAN, DDT; Euler steps; what the codes carry
    python figures.py --table order         # SFT on codes in the reverse order: trains it
    python figures.py --table ablation      # trains tokenizers that differ in one factor, three seeds each: hours
    python figures.py --table rl            # trains policies that differ in one factor
    python figures.py --figure 3            # error against the number of training clips: trains language models
    python figures.py --figure 4            # clips beside the truth
    python figures.py --figure 5            # how tokens answer to a ball that is moved
    python figures.py --figure 6            # how alike the tokens of near frames are
    python figures.py --figure 7            # one frame's tokens replaced by another's, span by span
    python figures.py --figure 8            # errors before and after RL, over the first frames' radius and speed
    python figures.py --figure prefix       # reconstruction from the first k tokens

Each reads what runs/tiny (--out) holds, says which command makes what is missing, and writes <out>/figures/: pictures as PNG,
numbers as JSON. A table goes on where it was stopped; tables 1, 2, order and rl take the runs of --others (other seeds; 1 and 2
also other motions and tokenizers) together with it. A mean of several runs has the standard error over runs; that of one run is
over its clips, and leaves out that another training would have ended elsewhere. One process, on the GPU if there is one.

Axes: B frames or clips, F frames of a clip, N balls, K tokens of a frame, L vectors of width D, A attributes.
"""
import dataclasses
import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

import ddt as tokenizers
import grpo
import reward
import sft
import sim
import train
from baselines import DiT, VQGAN
from ddt import DDT, center_error, reconstruction
from lm import Llama, Tokenizer


@dataclass
class Config:
    preset: str = "tiny"
    out: str = ""               # run folder; empty: runs/<preset>
    others: str = ""            # more run folders, separated by commas
    table: str = ""             # 1, 2, 4, order, ablation or rl
    figure: str = ""            # 3 to 8 or prefix
    clips: int = 32             # per split, of tokenizers; four times as many in tables 1 and 2
    llm: str = ""               # figures 5 and 6: folder of a text model, whose embedding of the coordinates is compared


PRESETS = {"tiny": {}, "small": {}, "paper": {}}        # the run folder's

# ------------------------------------------------------------------ what is measured


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def need_made(there, run: Path, name: str, flags: str = "") -> None:
    train.need(there, f"{run}/{name} is missing: make it with `python {train.script(name)} --out {run}{flags}`, and the --preset "
               "that the folder has")


def load(run: Path, name: str) -> DDT | VQGAN | DiT:
    """A run folder's model of frames, or one line that says how to make it."""
    need_made((run / name / "model.safetensors").exists(), run, name)
    return {"ddt": DDT, "vqgan": VQGAN, "dit": DiT}[name].load(run / name).to(DEVICE)


def both(config: Config) -> dict[str, DDT | VQGAN]:
    ddt, vqgan = (load(Path(config.out), name) for name in ("ddt", "vqgan"))
    train.need((ddt.config.size, ddt.config.scenario) == (vqgan.config.size, vqgan.config.scenario),
               f"{config.out}: the DDT is of {ddt.config.scenario}, {ddt.config.size} pixels, the VQGAN of "
               f"{vqgan.config.scenario}, {vqgan.config.size}: train one of them again with --fresh")
    return {"VQGAN": vqgan, "DDT": ddt}


def language_model(run: Path, name: str) -> tuple[Llama, DDT | VQGAN]:
    """The model of <run>/sft or <run>/grpo, and the tokenizer whose codes it speaks."""
    kind = speaks(run)
    need_made((run / name / "model.safetensors").exists(), run, name, " --tokenizer vqgan" if kind == "vqgan" else "")
    sources = [kind] + ["sft"] * (name == "grpo")
    model = sft.load(run / name, **{source: run / source / "model.safetensors" for source in sources}).to(DEVICE)
    return model, load(run, kind)


def motions(run: Path, name: str) -> list[str]:
    """What a run's language model was trained on. (Its tokenizer may know more.)"""
    return train.scenarios(trained(run, name)["scenario"])


def speaks(run: Path) -> str:
    """ddt or vqgan: the tokenizer of a run's language models."""
    return "vqgan" if "vqgan" in reward.read(run / "sft" / "made_of.json") else "ddt"


def runs(config: Config) -> list[Path]:
    folders = [Path(config.out), *(Path(name.strip()) for name in config.others.split(",") if name.strip())]
    for folder in folders:
        train.need(folder.is_dir(), f"{folder} is missing: make it with `python grpo.py --out {folder}`")
    train.need(len({folder.resolve() for folder in folders}) == len(folders), f"--others {config.others}: names a run twice")
    return folders


def trained(run: Path, name: str) -> dict:
    """What a run's model was trained with."""
    was = reward.read(run / name / "trained.json")
    need_made(was, run, name)
    return was


def sft_settings(run: Path) -> dict:
    """What a run's SFT model was trained with, where it is not a default."""
    was = trained(run, "sft")
    usual = sft.Config(**{"preset": was["preset"]} | sft.PRESETS[was["preset"]])
    return {key: value for key, value in was.items() if value != getattr(usual, key) or key == "preset"}


def flags(settings: dict) -> list[str]:
    return [text for key, value in settings.items() for text in ([f"--{key}"] if value is True else [f"--{key}", str(value)])]


def copied(run: Path, place: Path, *names: str) -> Path:
    """A run folder of its own that begins with some of another's models and their rows of the table."""
    rows = {"vae": ("ground truth", "VAE"), "ddt": ("DDT",), "sft": ("SFT",)}
    file = {"vae": tokenizers.VAE_WEIGHTS}
    weights = lambda folder, name: train.checksum(folder / name / file.get(name, "model.safetensors"))
    if not place.exists():
        part = place.with_name(place.name + ".part")                              # whole, or not there
        shutil.rmtree(part, ignore_errors=True)
        for name in names:
            shutil.copytree(run / name, part / name, ignore=shutil.ignore_patterns("log.jsonl"))
        known = reward.read(run / "results.json")
        reward.write(part / "results.json", {row: known[row] for name in names for row in rows[name] if row in known})
        part.rename(place)
    for name in names:
        train.need(weights(place, name) == weights(run, name),
                   f"{place} was made from another {name} than {run} now holds: delete it, it is made again")
    return place


def in_chunks(f: Callable[..., Tensor], *x: Tensor) -> Tensor:
    """f over rows, 64 at a time, on the device; the result is on the CPU."""
    return torch.cat([f(*(y.to(DEVICE) for y in part)).cpu() for part in zip(*(y.split(64) for y in x))])


def seeded() -> torch.Generator:
    return torch.Generator(DEVICE).manual_seed(0)


def still(n: int, scenario: str, split: str, size: int, seed: int = reward.EVAL_SEED) -> tuple[Tensor, Tensor, Tensor]:
    """n single frames with the balls wholly in view -> frames (n, 3, H, W), positions (n, N, 2), radii (n, N)."""
    clips = sim.sample(scenario, split, n, seed)
    frames = sim.render(clips.position[:, :1], clips.radius, size)[:, 0]          # every clip starts in view
    return frames, clips.position[:, 0], clips.radius


def carried(codes: Tensor, attributes: Tensor) -> list[dict]:
    """
    What each token says: codes (B, K), attributes (B, A) -> per token the codes in use, their perplexity, the entropy in
    bits, and the share of each attribute's variance that the code explains: in the second half of the rows, with each code's
    mean from the first. (Frames of one clip are alike: on the same rows, codes would explain what they only remember.)
    """
    rows, half = [], len(codes) // 2
    known, unknown = attributes[:half], attributes[half:]
    for k in range(codes.shape[1]):
        _, inverse, count = codes[:, k].unique(return_inverse=True, return_counts=True)
        p = count / count.sum()
        total = torch.zeros(len(count), known.shape[1], dtype=known.dtype).index_add_(0, inverse[:half], known)
        seen = torch.bincount(inverse[:half], minlength=len(count))[:, None]
        mean = torch.where(seen > 0, total / seen.clamp(min=1), known.mean(0))
        explained = 1 - (unknown - mean[inverse[half:]]).square().mean(0) / unknown.var(0, correction=0)
        bits = -(p * p.log2()).sum().item()
        rows.append({"codes": len(count), "perplexity": 2 ** bits, "bits": bits, "explained": explained.tolist()})
    return rows


def ball_errors(frames: Tensor, position: Tensor, radius: Tensor) -> dict[str, float]:
    """frames (B, 3, H, W) -> median distance of the found from the true centres, median radius error, share not found."""
    center, size, found = reward.detect(frames[:, None], radius.shape[1])         # (B, 1, N, 2), (B, 1, N) twice
    return {"center": (center[:, 0] - position).norm(dim=-1).nanmedian().item(),
            "radius": (size[:, 0] - radius).abs().nanmedian().item(), "missing": (~found).float().mean().item()}


def of_these(path: Path, run: Path, *names: str) -> None:
    """Forgets a file of results that were measured on other models than <run>/<name>."""
    note, stamp = path.with_suffix(".of.json"), {name: train.checksum(run / name / "model.safetensors") for name in names}
    if reward.read(note) != stamp:
        path.unlink(missing_ok=True)
        reward.write(note, stamp)


# ------------------------------------------------------------------ tables 1 and 2

# velocity error in and out of distribution: uniform, parabola, collision
PAPER1 = {"DiT-S": "0.015 / 0.288  0.052 / 0.311  0.023 / 0.153", "DiT-B": "0.014 / 0.358  0.036 / 0.287  0.018 / 0.211",
          "DiT-L": "0.012 / 0.427  0.035 / 0.337  0.015 / 0.161", "Qwen-1.5B": "0.025 / 0.271  0.023 / 0.399  0.056 / 0.185",
          "Qwen-7B": "0.016 / 0.071  0.017 / 0.068  0.043 / 0.047", "Llama3.1-8B": "0.014 / 0.057  0.018 / 0.062  0.048 / 0.051"}
PAPER2 = {"VQGAN, SFT": "0.032 / 0.884  0.090 / 0.951  0.054 / 0.322",
          "VQGAN, SFT + RL": "0.030 / 0.281  0.082 / 0.426  0.053 / 0.120",
          "DDT, SFT": "0.032 / 0.763  0.024 / 0.685  0.050 / 0.184", "DDT, SFT + RL": "0.014 / 0.057  0.018 / 0.062  0.048 / 0.051"}
SAMPLES = 8


def predictions(run: Path, name: str, config: Config, samples: int = 0) -> dict[str, dict]:
    """
    What <run>/dit, sft or grpo predicts of iid clips and of each out-of-distribution level: row -> scenario -> split ->
    reward.evaluate's result, kept in <run>/figures/<name>.json. Rows: "" (DiT's sample, a language model's most likely codes)
    and, of language models, "sample 1" to "sample <samples>" (top-k 50, top-p 0.95, those of the rollouts).
    """
    path = train.writable(run / "figures") / f"{name}.json"
    if name == "dit":
        model = load(run, "dit")
        predictors, size, scenarios = {"": model.predictor()}, model.config.size, train.scenarios(model.config.scenario)
    else:
        model, tokenizer = language_model(run, name)
        size, scenarios = tokenizer.config.size, motions(run, name)
        predictors = {"": sft.predictor(model, tokenizer)} | {
            f"sample {i + 1}": sft.predictor(model, tokenizer, i, 50, 0.95) for i in range(samples)}
    of_these(path, run, name)
    for row, predict in predictors.items():
        for scenario in scenarios:
            reward.add_row(path, row, predict, [scenario], ("iid", *sim.levels(scenario)), 4 * config.clips, size=size,
                           device=DEVICE)
    return {row: result for row, result in reward.read(path).items() if row in predictors}


def clip_by_clip(results: list[dict], splits: list[str], measure: str, best: bool = False) -> Tensor:
    """
    A measure of every clip of the splits, the mean over results (samples), or that of the result with the best reward: (B,).
    Clips in which no frame counts are left out.
    """
    value, score = (torch.tensor([[x for split in splits for x in r[split]["each"][name]] for r in results], dtype=torch.float64)
                    for name in (measure, "reward"))                              # (results, B) each
    value = value.gather(0, score.argmax(0, keepdim=True))[0] if best else value.mean(0)
    return value[~value.isnan()]


def cell(values: list[Tensor]) -> str:
    """Mean +- standard error: over runs, of one run over clips."""
    x = torch.stack([v.mean() for v in values]) if len(values) > 1 else values[0]
    return f"{x.mean():.3f} +- {x.std() / math.sqrt(len(x)):.3f}"


def comparison(rows: dict[str, list[tuple[list[dict], bool]]], paper: dict[str, str]) -> str:
    """
    Rows: label -> for every run its results (scenario -> split -> evaluate's) and whether the best is taken -> drift_error, which
    is very likely what the paper's tables hold (head of reward.py), and the reward, beside the paper's numbers.
    """
    lines = []
    for i, scenario in enumerate(sim.SCENARIOS):
        lines.append(f"\n{scenario}".ljust(38) + "runs" + "".join(
            f"{x:>18s}" for x in ("drift_error, IID", "OOD", "reward, IID", "OOD")))
        here = {label: [([r[scenario] for r in results], best) for results, best in of_runs if scenario in results[0]]
                for label, of_runs in rows.items()}
        for label, of_runs in here.items():
            cells = [cell([clip_by_clip(results, splits, measure, best) for results, best in of_runs])
                     for measure in ("drift_error", "reward") for splits in (["iid"], sim.levels(scenario)) if of_runs]
            if any(here.values()):
                lines.append(f"  {label:35s}{len(of_runs):4d}" + "".join(f"{x:>18s}" for x in cells or ["not run yet"]))
        if not any(here.values()):
            lines.append(f"  not run yet: python grpo.py --scenario {scenario} --out FOLDER, and --others FOLDER here")
        for label, numbers in paper.items():
            iid, ood = numbers.split("  ")[i].split(" / ")
            lines.append(f"  {'paper: ' + label:39s}{iid:>18s}{ood:>18s}")
    return "\n".join(lines)


def table1(config: Config, folder: Path) -> str:
    rows: dict[str, list] = {}
    for run in runs(config):
        for name, label in (("dit", "DiT"), ("sft", "SFT"), ("grpo", "SFT + RL")):
            if (run / name / "model.safetensors").exists():
                label = f"DiT, {load(run, name).config.preset}" if name == "dit" else f"{speaks(run).upper()}, {label}"
                rows.setdefault(label, []).append(([predictions(run, name, config)[""]], False))
    train.need(rows, f"{config.out} holds no model that predicts: make one with `python grpo.py --out {config.out}`")
    return comparison(rows, PAPER1)


def table2(config: Config, folder: Path) -> str:
    """The best of 8 samples is chosen by the true reward, which nobody has who has to predict: a bound, not a result."""
    rows = {}
    for kind in ("VQGAN", "DDT"):
        for label in ("SFT", "SFT + RL"):
            for how in ("", ", sampled", f", best of {SAMPLES} (oracle)"):
                rows[f"{kind}, {label}{how}"] = []
    for run in runs(config):
        for name, label in (("sft", "SFT"), ("grpo", "SFT + RL")):
            row = f"{speaks(run).upper()}, {label}"
            likely, *samples = predictions(run, name, config, SAMPLES).values()
            rows[row].append(([likely], False))
            rows[row + ", sampled"].append((samples, False))
            rows[row + f", best of {SAMPLES} (oracle)"].append((samples, True))
    return comparison(rows, PAPER2)


def order(config: Config, folder: Path) -> str:
    """SFT on each run's tokenizer with the codes of a frame reversed, in <run>/reverse, against the run's own."""
    found: dict[str, list[list[Tensor]]] = {}
    for run in runs(config):
        settings, ddt, turned = sft_settings(run), load(run, "ddt"), run / "reverse"
        evaluated(run)                                                            # known before hours of training
        own = ddt.config.order
        ddt.config.order = {"forward": "reverse", "reverse": "forward"}[own]
        if not (turned / "ddt" / "model.safetensors").exists():
            ddt.save(train.writable(turned / "ddt"))
        train.need(torch.equal(load(turned, "ddt").quantizer.codebook, ddt.quantizer.codebook),
                   f"{turned} was made from another ddt than {run} now holds: delete it, it is made again")
        sft.main(flags(settings | {"out": turned}))                               # what is done it does not do again
        for place, name in ((run, own), (turned, ddt.config.order)):
            for scenario, splits in evaluated(place).items():
                found.setdefault(f"{scenario}, {name}", []).append(
                    [clip_by_clip([splits], [split], "drift_error") for split in sim.SHOWN])
    lines = ["drift_error of SFT".ljust(29) + "runs" + "".join(f"{split:>18s}" for split in sim.SHOWN)]
    for name, of_runs in sorted(found.items()):
        lines.append(f"  {name:27s}{len(of_runs):4d}" + "".join(f"{cell(list(values)):>18s}" for values in zip(*of_runs)))
    return "\n".join(lines)


def evaluated(run: Path) -> dict:
    """SFT's row of a run's table: scenario -> split -> reward.evaluate's result."""
    row = reward.read(run / "results.json").get("SFT", {})
    train.need(all(split in row.get(scenario, {}) for scenario in motions(run, "sft") for split in sim.SHOWN),
               f"{run}/results.json has no whole row of SFT: `python sft.py --out {run}` adds what is missing")
    return row


# ------------------------------------------------------------------ table 4

STEPS = (4, 16, 50)


def table4(config: Config, folder: Path) -> str:
    models, out = both(config), Path(config.out)
    ddt, path = models["DDT"], folder / "table4.json"
    names, size = train.scenarios(ddt.config.scenario), ddt.config.size

    def euler(n):
        def predict(frames):
            generator = seeded()
            return in_chunks(lambda x: ddt.decode(ddt.encode(x), n, generator), frames.flatten(0, 1)).to(DEVICE).view_as(frames)
        return predict

    rows = {"ground truth": lambda frames: frames, "VAE": reconstruction(ddt.vae), "VQGAN": reconstruction(models["VQGAN"]),
            "DDT": reconstruction(ddt)} | {f"DDT, {n} Euler steps": euler(n) for n in STEPS}
    of_these(path, out, "ddt", "vqgan")
    for row, predict in rows.items():
        for name in names:
            reward.add_row(path, row, predict, [name], ("iid", *sim.levels(name)), config.clips, size=size, shown=sim.FRAMES,
                           device=DEVICE)
    return "\n".join([reward.table(path), *(what_codes_say(model, name, kind, config) for name in names
                                           for kind, model in models.items())])


def what_codes_say(model: DDT | VQGAN, scenario: str, kind: str, config: Config) -> str:
    """Per token of held-out frames: codes in use, bits, and what of positions and radii they explain."""
    clips = sim.sample(scenario, "iid", 8 * config.clips, reward.EVAL_SEED)
    inside, N = clips.inside.all(-1), clips.radius.shape[1]                       # (B, F)
    paint = lambda position, radius: sim.render(position, radius, model.config.size)
    frames = in_chunks(paint, clips.position, clips.radius)[inside]               # (n, 3, H, W)
    attributes = torch.cat([clips.position.flatten(2), clips.radius[:, None].expand(-1, sim.FRAMES, -1)], -1)[inside]
    labels = [f"{axis}{i + 1}" for i in range(N) for axis in "xy"] + [f"r{i + 1}" for i in range(N)]
    codes = in_chunks(model.encode, frames)                                       # (n, K)
    again = in_chunks(lambda c: model.encode(model.decode(c, generator=seeded())), codes)
    near = sft.neighbours(model.quantizer.codebook, 5)[codes]                     # (n, K, 5), the code itself the first
    rows = carried(codes, attributes)
    lines = [f"\n{scenario}, {kind}: {len(codes.unique())} codes in use, at most {sum(r['bits'] for r in rows):.1f} bits a frame; "
             f"encode(decode(codes)) keeps {(again == codes).double().mean():.1%} of the codes, makes of "
             f"{(again[..., None] == near[..., 1:]).any(-1).double().mean():.1%} one of their four nearest",
             "token   codes  perplexity    bits   variance explained: " + "  ".join(f"{label:>5s}" for label in labels)]
    return "\n".join(lines + [f"{k + 1:5d}{r['codes']:8d}{r['perplexity']:12.1f}{r['bits']:8.2f}" + " " * 22 +
                              "  ".join(f"{x:5.2f}" for x in r["explained"]) for k, r in enumerate(rows)])


# ------------------------------------------------------------------ what limits the tokenizer

BASE, SEEDS = tokenizers.Config(steps=2000), (0, 1, 2)      # every row takes as many steps as make the same number of FLOPs
ABLATION = {                        # one factor at a time
    "as it is": {},
    "8 tokens": {"queries": 8},
    "16 tokens": {"queries": 16},
    "codes of 16 dimensions": {"code_dim": 16, "token_noise": 0.2},     # with less noise tokens do not specialise
    "codes of 4 dimensions": {"code_dim": 4},                           # a sphere, not a circle
    "all tokens at every time": {"prefix": "all"},
    "no pure noise (nor what waits for it)": {"pure_noise": 0.0},       # its error is what token noise and crowding wait for
    "6 in 10 of pure noise": {"pure_noise": 0.6},
    "time not skewed": {"shift": 1.0},
    "decoder 4 layers": {"layers": 4},
    "VAE of 150 steps": {"vae_steps": 150},
    "no token noise, no crowding": {"token_noise": 0.0, "spread": 0.0},
    "twice the budget": {"steps": 4000},
}


def usual(what: str, place: str, was: dict) -> None:
    train.need((was["preset"], was["scenario"]) == ("tiny", "uniform"),
               f"{what} is of `tiny` and uniform motion, {place} of {was['preset']} and {was['scenario']}")


def ablation(config: Config, folder: Path) -> str:
    """
    `tiny` tokenizers of uniform motion that differ from ddt.py's defaults, trained in <out>/ablation: mean and standard error
    over seeds. All stand on the VAE of <out>, but for those whose VAE differs.
    """
    out = Path(config.out)
    vae = out / "vae" / tokenizers.VAE_WEIGHTS
    train.need(vae.exists(), f"{out / 'vae'} is missing: make it with `python ddt.py --out {out}`")
    if was := reward.read(out / "vae" / "trained.json"):                          # one of --vae has none
        usual("the ablation", f"{out}/vae", was)
    path, work = folder / "ablation.json", tokenizers.plan(BASE, 1).flops
    done = reward.read(path)
    lines = [f"{'steps':>43s}" + "".join(f"{name:>18s}" for name in QUALITY)]
    for name, change in ABLATION.items():
        c = dataclasses.replace(BASE, **change)
        if "steps" not in change:
            c.steps = round(BASE.steps * work / tokenizers.plan(c, 1).flops)
        c.warmup, c.vae = max(c.steps // 5, 1), "" if "vae_steps" in change else str(out / "vae")
        rows = []
        for seed in SEEDS:
            run = f"{name}-{seed}".replace(" ", "-").replace(",", "")
            c.seed, c.out = seed, str(out / "ablation" / run)
            of, known = dataclasses.asdict(c) | {"out": "", "vae": train.checksum(vae) if c.vae else ""}, done.get(run, {})
            if known.get("of") != of:
                settings = {f.name: getattr(c, f.name) for f in dataclasses.fields(c) if getattr(c, f.name) != f.default}
                tokenizers.main(flags(settings) + ["--fresh"] * bool(known))
            if (known.get("of"), known.get("clips")) != (of, config.clips):
                done[run] = {"of": of, "clips": config.clips, "quality": quality(Path(c.out), config.clips)}
                reward.write(path, done)
            rows.append(done[run]["quality"])
        x = torch.tensor(rows, dtype=torch.float64)
        lines.append(f"{name:38s}{c.steps:5d}" + "".join(f"{mean:9.3f} +-{se:6.3f}" for mean, se in zip(
            x.mean(0), x.std(0) / math.sqrt(len(rows)))))
        print(lines[-1])                                                          # hours: what is known is said
    return "\n".join(lines)


QUALITY = ("centre", "radius", "drift", "codes", "bits", "reading")


def quality(folder: Path, clips: int) -> list[float]:
    """
    Of a tokenizer in a run folder, uniform motion: median centre error; radius and drift error of reconstructed iid clips;
    codes in use; bits a frame; and `reading`, the mean error of a speed read from the tokens of a clip's first three frames.
    """
    model, name = DDT.load(folder / "ddt").to(DEVICE), "uniform"
    center, used = center_error(model, name, DEVICE, 4 * clips)
    row = reward.read(folder / "results.json")["DDT"][name]["iid"]
    seen = sim.sample(name, "iid", 4 * clips, reward.EVAL_SEED)
    frames = sim.render(seen.position, seen.radius, model.config.size)[seen.inside.all(-1)]
    bits = sum(token["bits"] for token in carried(in_chunks(model.encode, frames), torch.zeros(len(frames), 1)))
    return [center, row["radius_error"], row["drift_error"], used, bits, reading(model, name, 200 * clips)]


def reading(model: DDT | VQGAN, scenario: str, n: int, steps: int = 1000) -> float:
    """
    What a language model has to do first: the speed from the tokens of the given frames, here by a small MLP trained on n
    clips -> mean error on clips of the training range that it has not seen, units per second.
    """
    def drawn(n: int, seed: int) -> tuple[Tensor, Tensor]:
        clips = sim.first_frames(scenario, "pretrain", n, seed)
        position = sim.closed_form(clips)[:, :sim.CONDITION]
        encode = lambda position, radius: model.encode(sim.render(position, radius, model.config.size).flatten(0, 1))
        codes = in_chunks(encode, position, clips.radius).view(n, -1)             # (n, 3 K)
        return codes + torch.arange(codes.shape[1]) * 256, clips.velocity[:, :1].float()

    (codes, speed), (held_out, truth) = drawn(n, 0), drawn(max(n // 8, 1), reward.EVAL_SEED)
    with torch.random.fork_rng(devices=[]):                                       # the MLP is too small for a GPU
        torch.manual_seed(0)
        D = 64 * codes.shape[1]
        mlp = nn.Sequential(nn.Embedding(256 * codes.shape[1], 64), nn.Flatten(), nn.Linear(D, 256), nn.GELU(),
                            nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 1))
        optimizer = torch.optim.AdamW(mlp.parameters(), 3e-3, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
        for _ in range(steps):
            rows = torch.randint(n, (512,))
            (mlp(codes[rows]) - speed[rows]).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        with torch.no_grad():
            return (mlp(held_out) - truth).abs().mean().item()


# ------------------------------------------------------------------ what makes RL work

RL = {                              # factor -> what is drawn together: one change each from grpo.py's defaults
    "as it is": {"the next 8 frames": {}},
    "credit": {"the whole clip": {"whole_clip": True}, "all frames ahead": {"horizon": sim.FRAMES}},
    "known clips": {"no KL on known clips": {"keep": 0.0}},
    "groups": {"16 groups of 4": {"prompts": 16, "group": 4}, "4 groups of 16": {"prompts": 4, "group": 16}},
    "KL": {"beta 0": {"beta": 0.0}, "beta 0.01": {"beta": 0.01}, "beta 0.04": {"beta": 0.04}},
    "SFT": {"SFT of 1000 steps": {"sft": 1000}, "SFT of 2000 steps": {"sft": 2000}},
}


CURVES = {"reward": ("reward", "reward of rollouts"), "velocity": ("rewards/velocity/mean", "its velocity part"),
          "mass": ("rewards/mass/mean", "its mass part"), "kl": ("kl", "KL to the SFT model, nats a token"),
          "entropy": ("entropy", "entropy, nats a token"),
          "zero_std": ("frac_reward_zero_std", "share of groups with std below 0.1")}
CHANGED = {"posttrain": "reward", "pretrain": "drift_error", "iid": "drift_error", "ood": "drift_error", "slow": "drift_error",
           "fast": "drift_error"}


def another_policy(run: Path, name: str, change: dict, clips: int) -> Path:
    """<run>/rl/<name>: GRPO with a change, on the run's SFT model or on one of another length, and their rows of the table."""
    change, settings = dict(change), sft_settings(run)
    steps = change.pop("sft", 0)
    place = copied(run, run / "rl" / name.replace(" ", "-"), "vae", "ddt", *["sft"] * (not steps))
    if steps:
        sft.main(flags(settings | {"steps": steps, "out": place}))
    grpo.main(flags({"out": place, "seed": settings.get("seed", 0)} | change))
    for row, stage in (("SFT", "sft"), ("SFT + RL", "grpo")):                     # no stage looks at what it was trained on
        model, ddt = language_model(place, stage)
        reward.add_row(place / "results.json", row, sft.predictor(model, ddt), ["uniform"], ("pretrain",), clips,
                       size=ddt.config.size, device=DEVICE)
    return place


def rl(config: Config, folder: Path) -> str:
    """
    GRPO on each run's SFT model, but for one factor as grpo.py does it: learning curves, and what RL changed. The reward of
    rollouts is of other conditions where there are more or fewer groups.
    """
    for run in runs(config):
        usual("the ablation of RL", f"{run}/sft", trained(run, "sft"))
    lines = [f"{'':20s}runs" + "".join(f"{x:>17s}" for x in ("training reward", "kl", "entropy")) +
             "".join(f"{split + ' ' + measure.split('_')[0]:>18s}" for split, measure in CHANGED.items())]
    curves = {curve: {} for curve in CURVES}
    for factor, rows in RL.items():
        for name, change in rows.items():
            places = [another_policy(run, name, change, 8 * config.clips) for run in runs(config)]
            logs = [[json.loads(line) for line in (place / "grpo" / "log.jsonl").read_text().splitlines()] for place in places]
            for curve, (key, _) in CURVES.items():
                mean = torch.tensor([[line[key] for line in log] for log in logs]).mean(0)                    # (steps,)
                curves[curve][name] = [*enumerate(mean.unfold(0, 5, 1).mean(1).tolist())]
            end = [sum(y for _, y in curves[curve][name][-5:]) / 5 for curve in ("reward", "kl", "entropy")]
            cells = []
            for split, measure in CHANGED.items():
                of = [[torch.tensor(reward.read(place / "results.json")[row]["uniform"][split]["each"][measure])
                       for row in ("SFT", "SFT + RL")] for place in places]
                cells.append(cell([(after - before)[~(after - before).isnan()] for before, after in of]))
            lines.append(f"{name:20s}{len(logs):4d}" + "".join(f"{x:17.3f}" for x in end) + "".join(f"{x:>18s}" for x in cells))
            print(lines[-1])
        for curve, (_, label) in CURVES.items():
            chart(folder / f"rl_{factor.replace(' ', '_')}_{curve}.png", "step", f"{label}, mean of 5 steps",
                  {name: curves[curve][name] for name in [*RL["as it is"], *rows]})
    (folder / "rl.json").write_text(json.dumps(curves) + "\n")
    return "\n".join(lines) + "\n(of rollouts at the end of training; then SFT + RL minus SFT, the same clips)"


# ------------------------------------------------------------------ figures

SIZES = {"tiny": (60, 600, 6000), "small": (200, 2000, 20_000), "paper": (30_000, 300_000, 3_000_000)}


def figure3(config: Config, folder: Path) -> str:
    """drift_error of SFT against the number of training clips of each motion, all on the run's tokenizer."""
    run, curves, seen = Path(config.out), {}, {}
    settings = sft_settings(run)
    own = trained(run, "sft")["clips"]
    evaluated(run)                                                                # known before hours of training
    for n in SIZES[settings["preset"]]:
        place = run if n == own else copied(run, run / "clips" / str(n), "vae", "ddt")
        if place != run:
            sft.main(flags(settings | {"clips": n, "out": place}))
        for scenario, splits in evaluated(place).items():
            for split in ("iid", "ood"):
                mean, se = splits[split]["drift_error"], splits[split]["drift_error_se"]
                curves.setdefault(f"{scenario}, {split}", []).append((math.log10(n), mean))
                seen.setdefault(n, {})[f"{scenario}, {split}"] = f"{mean:.3f} +- {se:.3f}"
    (folder / "figure3.json").write_text(json.dumps(curves, indent=1) + "\n")
    chart(folder / "figure3.png", "log10 of the training clips", "drift_error, units a second", curves)
    return "\n".join([f"{'clips':>9s}" + "".join(f"{name:>20s}" for name in curves)] +
                     [f"{n:9d}" + "".join(f"{text:>20s}" for text in row.values()) for n, row in seen.items()])


def figure4(config: Config, folder: Path) -> str:
    """One clip of each split, the truth above what each model makes of its first frames."""
    run, rows, labels = Path(config.out), [], []
    policy, tokenizer = language_model(run, "grpo")
    predictors = {"SFT": sft.predictor(language_model(run, "sft")[0], tokenizer), "SFT + RL": sft.predictor(policy, tokenizer)}
    if (run / "dit" / "model.safetensors").exists():
        dit = load(run, "dit")
        train.need(dit.config.size == tokenizer.config.size and set(motions(run, "grpo")) <= set(train.scenarios(dit.config.scenario)),
                   f"{run}: the DiT is of {dit.config.size} pixels and {dit.config.scenario}, the policy of "
                   f"{tokenizer.config.size} and {trained(run, 'grpo')['scenario']}: train one of them again with --fresh")
        predictors = {"DiT": dit.predictor()} | predictors
    for scenario in motions(run, "grpo"):
        for split in ("iid", *sim.levels(scenario)):
            clip = sim.sample(scenario, split, 1, reward.EVAL_SEED)
            frames = sim.render(clip.position, clip.radius, tokenizer.config.size)
            shown = {"truth": frames} | {name: f(frames[:, :sim.CONDITION].to(DEVICE)).cpu() for name, f in predictors.items()}
            rows += [clips[0] for clips in shown.values()]
            labels += [f"{scenario}, {split}: {name}" for name in shown]
    sim.save_strip(folder / "figure4.png", rows, labels, every=3, pixels=64)
    return f"{len(rows)} rows, every third frame"


RADII, SPEEDS = torch.arange(0.35, 2.0, 0.1, dtype=torch.float64), torch.arange(0.25, 6.0, 0.5, dtype=torch.float64)


def figure8(config: Config, folder: Path) -> str:
    """
    drift_error and radius_error of SFT and SFT + RL over radius and speed: uniform balls that start at the left, at four heights
    each. Drawn: the training range (black) and what RL was trained on (blue).
    """
    run, N = Path(config.out), 4
    r, v, height = (x.flatten()[:, None] for x in torch.meshgrid(RADII, SPEEDS, torch.linspace(0.1, 0.9, N, dtype=torch.float64),
                                                                 indexing="ij"))               # (radii speeds 4, 1)
    start = torch.stack([r + 0.3, r + 0.5 + height * (9 - 2 * r)], -1)                         # (B, 1, 2)
    clips = sim.play(sim.Clips("uniform", r, v, start[:, None], torch.ones_like(r)[:, None]))
    panels, found = [], {}
    for label, name in (("SFT", "sft"), ("SFT + RL", "grpo")):
        model, tokenizer = language_model(run, name)
        predict, size = sft.predictor(model, tokenizer), tokenizer.config.size
        train.need("uniform" in motions(run, name), f"{run}/{name} is of {trained(run, name)['scenario']}: figure 8 is of uniform "
                   "motion")
        errors = []
        for i in range(0, len(clips), 64):
            part = clips[i:i + 64].to(DEVICE)
            errors.append(reward.errors(predict(sim.render(part.position[:, :sim.CONDITION], part.radius, size)), part))
        for measure, top in (("drift_error", 2.0), ("radius_error", 0.5)):
            value = torch.cat([e[measure] for e in errors]).cpu()
            value = value.view(len(RADII), len(SPEEDS), N).nanmean(-1)                         # (radius, speed)
            panels.append((f"{label}: {measure}, white 0, red {top} and more", value, top))
            found[f"{label}, {measure}"] = value.tolist()
    (folder / "figure8.json").write_text(json.dumps({"radius": RADII.tolist(), "speed": SPEEDS.tolist()} | found) + "\n")
    heat_maps(folder / "figure8.png", panels[::2] + panels[1::2], RADII, SPEEDS)
    within = lambda use: (torch.stack([(a <= RADII) & (RADII <= b) for a, b in sim.RADIUS[use]]).any(0)[:, None]
                          & torch.stack([(a <= SPEEDS) & (SPEEDS <= b) for a, b in sim.SPEED[use]]).any(0))
    places = {"training range": within("pretrain"), "bands of RL": within("posttrain"), "r and v out of range": within("ood"),
              "everything": within("pretrain") | True}
    lines = [f"{'mean of':28s}" + "".join(f"{place:>22s}" for place in places)]
    return "\n".join(lines + [f"{name:28s}" + "".join(f"{torch.tensor(x)[where].nanmean():22.3f}" for where in places.values())
                              for name, x in found.items()])


def heat_maps(path: Path, panels: list[tuple[str, Tensor, float]], radii: Tensor, speeds: Tensor, side: int = 300) -> None:
    """Panels [(title, value (radius, speed), value that is all red)], two a row, with the ranges of training drawn."""
    picture = Image.new("RGB", (2 * (side + 60), (len(panels) + 1) // 2 * (side + 60)), "white")
    draw = ImageDraw.Draw(picture)
    for i, (title, value, top) in enumerate(panels):
        left, upper = 45 + i % 2 * (side + 60), 25 + i // 2 * (side + 60)
        step = [(x[-1] - x[0]).item() / (len(x) - 1) for x in (radii, speeds)]
        place = lambda r, v: (left + ((r - radii[0].item()) / step[0] + 0.5) * side / len(radii),
                              upper + side - ((v - speeds[0].item()) / step[1] + 0.5) * side / len(speeds))

        def box(r, v, **options):
            (x0, y1), (x1, y0) = place(r[0], v[0]), place(r[1], v[1])
            draw.rectangle((x0, y0, x1, y1), **options)
        for j, r in enumerate(radii.tolist()):
            for k, v in enumerate(speeds.tolist()):
                x = value[j, k].item()
                fill = (128, 128, 128)                                                            # grey: nothing to measure
                if math.isfinite(x):
                    pale = int(255 * (1 - min(x / top, 1)))
                    fill = (255, pale, pale)
                box((r - step[0] / 2, r + step[0] / 2), (v - step[1] / 2, v + step[1] / 2), fill=fill)
        box(sim.RADIUS["pretrain"][0], sim.SPEED["pretrain"][0], outline="black", width=2)
        for r in sim.RADIUS["posttrain"]:
            for v in sim.SPEED["posttrain"]:
                box(r, v, outline=(40, 80, 200), width=2)
        draw.text((left, upper - 16), title, fill="black")
        for r in radii[[0, len(radii) // 2, -1]].tolist():
            draw.text((place(r, 0)[0] - 12, upper + side + 4), f"r {r:.2f}", fill="black")
        for v in speeds[[0, len(speeds) // 2, -1]].tolist():
            draw.text((left - 42, place(0, v)[1] - 6), f"v {v:.2f}", fill="black")
    picture.save(path)


def prefix(config: Config, folder: Path) -> str:
    """
    Reconstruction from the first k tokens: from pure noise, where training always shows all K; and at the time that k tokens
    belong to, t(k / K), where the noisy frame itself helps, beside the same frame without any token (which training never shows).
    """
    ddt = load(Path(config.out), "ddt")
    K, name = ddt.config.queries, train.scenarios(ddt.config.scenario)[0]
    frames, position, radius = still(8 * config.clips, name, "iid", ddt.config.size)
    latent, codes = in_chunks(ddt.latent, frames), in_chunks(ddt.encode, frames)
    tokens = ddt.quantizer.codebook.cpu()[ddt.ordered(codes)]
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(0))

    def measured(x: Tensor, t: float, k: int) -> tuple[dict[str, float], Tensor]:
        def paint(x, tokens):
            clean = ddt.decoder(x, x.new_full((len(x),), t), tokens, torch.full((len(x),), k, device=DEVICE))
            return (ddt.vae.decode(clean) / 2 + 0.5).clamp(0, 1)
        with torch.no_grad():
            painted = in_chunks(paint, x, tokens)
        return ball_errors(painted, position, radius), painted[:6]

    rows, pictures = [], [("truth", frames[:6])]
    for k in range(1, K + 1):
        t = ddt.times(torch.tensor([k / K]))[0].item()
        noisy = t * noise + (1 - t) * latent
        pure, painted = measured(noise, 1.0, k)
        pictures.append((f"first {k}", painted))
        rows.append({"k": k, "t": t, "noise": pure, "own time": measured(noisy, t, k)[0],
                     "no tokens": measured(noisy, t, 0)[0]})
    (folder / "prefix.json").write_text(json.dumps(rows, indent=1) + "\n")
    sim.save_strip(folder / "prefix.png", [x for _, x in pictures], [label for label, _ in pictures], every=1)
    chart(folder / "prefix_error.png", "tokens shown", "median centre error, units",
          {name: [(r["k"], r[name]["center"]) for r in rows] for name in ("noise", "own time", "no tokens")})
    kinds = {"noise": "pure noise, first k tokens", "own time": "noise of t(k), k tokens", "no tokens": "... no token (not trained)"}
    lines = [" " * 14 + "".join(f"{text:>27s}" for text in kinds.values()),
             f"{'k':>5s}{'t(k)':>9s}" + f"{'centre':>9s}{'radius':>9s}{'missing':>9s}" * 3]
    return "\n".join(lines + [f"{r['k']:5d}{r['t']:9.3f}" + "".join(
        f"{r[kind]['center']:9.3f}{r[kind]['radius']:9.3f}{r[kind]['missing']:9.1%}" for kind in kinds) for r in rows])


def embedders(config: Config, models: dict[str, DDT | VQGAN]) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Name -> (frames (B, 3, H, W), positions (B, N, 2)) -> embeddings (B, L, D), L vectors to be compared one by one."""
    def of_tokens(model):
        return lambda frames, position: model.quantizer.codebook.cpu()[in_chunks(model.encode, frames)]
    found = {name: of_tokens(model) for name, model in models.items()}
    if config.llm:
        try:
            table, text = Llama.load(config.llm).model["embed_tokens"].weight, Tokenizer.load(config.llm)
        except ValueError as error:
            raise train.Problem(f"--llm {config.llm}: {error}") from None

        def coordinates(frames, position):
            ids = [text.encode(" ".join(f"{x:.2f}" for x in row), bos=False) for row in position.flatten(1).tolist()]
            return torch.stack([table[torch.tensor(i)].float().mean(0, keepdim=True) for i in ids])     # (B, 1, D)
        found["text"] = coordinates
    return found


def similarity(a: Tensor, b: Tensor) -> Tensor:
    """Embeddings (B, L, D) twice -> mean cosine (B,)."""
    return torch.cosine_similarity(a, b, dim=-1).mean(-1)


def figure5(config: Config, folder: Path) -> str:
    """Balls are moved to the right: how alike are the tokens of before and after?"""
    models = both(config)
    ddt = models["DDT"].config
    shifts = [0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0]
    x, y, r = torch.rand(3, 4 * config.clips, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    start, radius = torch.stack([1.5 + x, 2 + 6 * y], -1), 0.8 + 0.6 * r          # (B, 1, 2), (B, 1)
    moved = [start + torch.tensor([shift, 0.0]) for shift in shifts]
    curves = {}
    for name, embed in embedders(config, models).items():
        embedded = [embed(sim.render(p[:, None], radius, ddt.size)[:, 0], p) for p in moved]
        curves[name] = [(shift, similarity(embedded[0], e).mean().item()) for shift, e in zip(shifts, embedded)]
    (folder / "figure5.json").write_text(json.dumps(curves, indent=1) + "\n")
    chart(folder / "figure5.png", "ball moved by, units", "similarity of the embeddings", curves)
    return columns("moved by", curves)


def figure6(config: Config, folder: Path) -> str:
    """Frames of one clip, g apart: how alike are their tokens?"""
    models = both(config)
    ddt = models["DDT"].config
    clips = sim.sample(train.scenarios(ddt.scenario)[0], "iid", config.clips, reward.EVAL_SEED)
    frames, inside = sim.render(clips.position, clips.radius, ddt.size), clips.inside.all(-1)       # (B, F)
    curves = {}
    for name, embed in embedders(config, models).items():
        e = embed(frames.flatten(0, 1), clips.position.flatten(0, 1)).unflatten(0, inside.shape)      # (B, F, L, D)
        curves[name] = []
        for gap in range(1, 11):
            pairs = inside[:, :-gap] & inside[:, gap:]                                                # (B, F - gap)
            curves[name].append((gap, similarity(e[:, :-gap][pairs], e[:, gap:][pairs]).mean().item()))
    (folder / "figure6.json").write_text(json.dumps(curves, indent=1) + "\n")
    chart(folder / "figure6.png", "frames apart", "similarity of the embeddings", curves)
    return columns("frames apart", curves)


def figure7(config: Config, folder: Path) -> str:
    """Counterfactual interpolation: the first m tokens of one frame, the rest of another."""
    models, rows, labels = both(config), [], []
    ddt = models["DDT"].config
    names = train.scenarios(ddt.scenario)
    frames, _, _ = still(4, names[0], "iid", ddt.size, seed=5)
    parts = min(8, *(model.config.queries for model in models.values()))
    for a, b in ((0, 1), (2, 3)):
        for name, model in models.items():
            codes, K = in_chunks(model.encode, frames), model.config.queries
            shares = [K * i // parts for i in range(parts + 1)]
            mixed = torch.stack([torch.cat([codes[b, :m], codes[a, m:]]) for m in shares])
            painted = in_chunks(lambda c: model.decode(c, generator=seeded()), mixed)
            rows.append(torch.cat([frames[a:a + 1], painted, frames[b:b + 1]]))
            labels.append(name)
    sim.save_strip(folder / "figure7.png", rows, labels, every=1, pixels=64)
    return (f"left: a frame; then its reconstruction, with 0, 1, ... {parts} of {parts} parts of its tokens replaced by those of "
            "the frame on the right")


def columns(head: str, curves: dict[str, list[tuple[float, float]]]) -> str:
    lines = [f"{head:>14s}" + "".join(f"{name:>10s}" for name in curves)]
    return "\n".join(lines + [f"{points[0][0]:14.2f}" + "".join(f"{y:10.3f}" for _, y in points)
                              for points in zip(*curves.values())])


COLORS = ((200, 40, 40), (40, 80, 200), (30, 140, 60), (150, 90, 20), (120, 60, 160), (0, 0, 0))


def chart(path: Path, x_label: str, y_label: str, curves: dict[str, list[tuple[float, float]]], width=720, height=400) -> None:
    """Curves {name: [(x, y), ...]} as a PNG. The axis of y begins at 0, or at the least y if all are far above 0."""
    x = [x for points in curves.values() for x, _ in points]
    x_min, x_max = min(x), max(x)
    y = [y for points in curves.values() for _, y in points if math.isfinite(y)]
    y_min, y_max = min(y, default=0.0), max(y, default=0.0)
    y_min = 0.0 if 0 <= y_min < y_max / 2 else y_min
    y_max += 0.05 * (y_max - y_min or abs(y_max) or 1.0)                        # a curve that is flat has room, too
    left, right, top, bottom = 60, width - 160, 30, height - 45
    place = lambda x, y: (left + (right - left) * (x - x_min) / (x_max - x_min or 1),
                          bottom - (bottom - top) * (y - y_min) / (y_max - y_min))
    picture = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(picture)
    draw.line([(left, top), (left, bottom), (right, bottom)], fill="black")
    for i in range(6):
        x, y = x_min + (x_max - x_min) * i / 5, y_min + (y_max - y_min) * i / 5
        draw.text((place(x, 0)[0] - 12, bottom + 6), f"{x:.3g}", fill="black")
        draw.text((8, place(0, y)[1] - 6), f"{y:.3g}", fill="black")
        draw.line([(left, place(0, y)[1]), (right, place(0, y)[1])], fill=(225, 225, 225))
    draw.text((left + (right - left) / 2 - 3 * len(x_label), height - 20), x_label, fill="black")
    draw.text((8, 8), y_label, fill="black")
    for i, (name, points) in enumerate(curves.items()):
        color = COLORS[i % len(COLORS)]
        draw.line([place(x, y) for x, y in points if math.isfinite(y)], fill=color, width=2)      # NaN: no ball found
        draw.text((right + 15, top + 14 * i), name, fill=color)
    picture.save(path)


def main(argv: list[str] | None = None) -> None:
    config = train.parse(Config, PRESETS, argv)
    what = {"table 1": table1, "table 2": table2, "table 4": table4, "table order": order, "table ablation": ablation,
            "table rl": rl, "figure 3": figure3, "figure 4": figure4, "figure 5": figure5, "figure 6": figure6, "figure 7": figure7,
            "figure 8": figure8, "figure prefix": prefix}
    asked = f"figure {config.figure}" if config.figure else f"table {config.table}"
    train.need(asked in what, f"there is no {asked}: choose one of {', '.join('--' + name for name in what)}")
    train.need(train.start(0).size == 1, "figures.py runs in one process: leave torchrun out")
    folder = train.writable(Path(config.out, "figures"))
    print(what[asked](config, folder))
    print(f"\n{folder}/")


if __name__ == "__main__":
    train.cli(main)
