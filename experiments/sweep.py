"""
Twelve short trainings in two rounds of six, side by side on one GPU: which settings are worth it?

Round 1, SFT from random weights for the same time; round 2, GRPO from the first model of round 1,
all with the perfect tokens of experiments/ideal.py (no tokenizer has to be trained). Every training
prints a line: its steps, ms per step beside five others, and drift_error on every split.

    python -m experiments.sweep                             # on one GPU, in four minutes
    python -m experiments.sweep --sft_seconds 300 --grpo_seconds 600

The time for a step is measured on the first of them, while the others of the round run, too. The
number of steps follows, and with it the schedule of the learning rate. All of it is kept in
runs/sweep.

Source of the questions: sizes of `small` in sft.py and grpo.py.
"""
import dataclasses
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import checkpoint
import evaluate
import grpo
import sft
import train
from checkpoint import UserError, check
from experiments.ideal import SPLITS, Ideal
from vae import check_data, check_ranges, millions

SIZES = {                   # hidden, ffn, layers, heads
    "1M": dict(hidden=128, ffn=384, layers=4, heads=4),
    "5M": dict(hidden=256, ffn=768, layers=6, heads=4),
    "26M": dict(hidden=512, ffn=1536, layers=8, heads=8),
}
BASE = dict(batch=128, dtype="bfloat16", lr=1e-3) | SIZES["5M"]
SFT = {                     # variant -> what it changes
    "SFT 5M, near 3, lr 1e-3": {},
    "SFT 1M": SIZES["1M"],
    "SFT 26M": SIZES["26M"],
    "SFT near 5": dict(near=5),
    "SFT near 7": dict(near=7),
    "SFT lr 3e-3": dict(lr=3e-3),
}
GRPO = {                    # variant -> what it changes; `steps` is reduced if time is short
    "RL 16 x 8, 100 steps, lr 1e-4": {},
    "RL 16 x 16": dict(group=16),
    "RL 64 x 8": dict(prompts=64),
    "RL 300 steps": dict(steps=300),
    "RL lr 3e-5": dict(lr=3e-5),
    "RL lr 3e-4": dict(lr=3e-4),
}
PILOT = 20                  # steps that are timed; of the first half, nothing counts
SMALLEST = {                # of --small
    "SFT": dict(batch=2, hidden=32, ffn=32, layers=1, heads=2, dtype="float32"),
    "RL": dict(prompts=2, group=2),
}


@dataclass
class Config:
    # run
    preset: str = "tiny"        # the only one: tiny
    out: str = "runs/sweep"     # folder of the results, a new one
    seed: int = 0               # seed of weights and data
    only: str = ""              # name of the one variant to train in this process
    small: bool = False         # the smallest sizes, to try the command
    # data
    clips: int = 12000          # training clips of SFT
    eval_clips: int = 128       # clips per split of the table
    size: int = 32              # pixels per side of the painted frames
    # time
    sft_seconds: float = 50.0   # of optimizer steps in round 1
    grpo_seconds: float = 90.0  # of optimizer steps in round 2, at most


PRESETS = {"tiny": {}}


def folder_of(config: Config, variant: str) -> Path:
    return Path(config.out, variant.replace(" ", "-").replace(",", ""))


def stage_config(config: Config, variant: str, out: Path, **more):
    """The stage's Config of a variant, in the run folder `out`."""
    same = dict(out=str(out), seed=config.seed, tokenizer="ideal", save_every=10 ** 6) | more
    smallest = SMALLEST[variant.split()[0]] if config.small else {}
    if variant in SFT:
        options = dict(clips=config.clips, llm="none", replay=0.0) | BASE | SFT[variant]
        return sft.Config(**options | same | smallest)
    options = dict(prompts=16, steps=100, warmup=10, micro_batch=128, beta_numbers=0.0)
    return grpo.Config(**options | GRPO[variant] | same | smallest)


def train_variant(config: Config, world: train.World) -> str:
    """Trains the variant config.only, as many steps as fit its time -> its line."""
    variant, tokenizer = config.only, Ideal(config.size, world.device)
    out = folder_of(config, variant)
    seconds = config.sft_seconds if variant in SFT else config.grpo_seconds

    def fit(folder: Path, steps: int):
        """Trains from the start in a new run folder."""
        tokenizer.save(folder)
        stage = stage_config(config, variant, folder, steps=steps)
        if variant in SFT:
            checkpoint.writable(folder / "sft")
            for file in Path(config.out).glob("codes.*"):
                shutil.copy(file, folder / "sft")
            return sft.train_sft(stage, tokenizer, world)
        first = folder_of(config, next(iter(SFT)))
        shutil.copytree(first / "sft", folder / "sft")
        reference = sft.load(folder / "sft").to(world.device).requires_grad_(False)
        return grpo.train_grpo(stage, tokenizer, reference, world)

    name = "sft" if variant in SFT else "grpo"
    fit(out / "pilot", PILOT)
    log = (out / "pilot" / name / "log.jsonl").read_text(encoding="utf-8").splitlines()
    step_time = median(json.loads(line)["step_time"] for line in log[PILOT // 2:])
    steps = max(1, int(seconds / step_time))
    if variant in GRPO:
        steps = min(steps, stage_config(config, variant, out).steps)
    model = fit(out, steps)

    predict = sft.predictor(model, tokenizer)
    line = f"{variant:30s} {millions(model):>7s} {steps:6d} {1e3 * step_time:7.1f}"
    for split in SPLITS:
        result = evaluate.evaluate(predict, "uniform", split, config.eval_clips, evaluate.EVAL_SEED,
                                   size=config.size, batch=128, device=world.device)
        line += f"{result['drift_error']:10.3f}"
    return line


def side_by_side(config: Config, variants: dict) -> list[str]:
    """Trains each variant in a process of its own, all at once -> names of those that failed."""
    kept = {k: v for k, v in dataclasses.asdict(config).items() if k not in ("only", "small")}
    flags = [f"--{k}={v}" for k, v in kept.items()] + ["--small"] * config.small
    processes = {}
    for variant in variants:
        log = checkpoint.writable(folder_of(config, variant)) / "output.txt"
        command = [sys.executable, "-m", "experiments.sweep", f"--only={variant}", *flags]
        processes[variant] = subprocess.Popen(command, stdout=log.open("w"),
                                              stderr=subprocess.STDOUT), log
    failed = []
    for variant, (process, log) in processes.items():
        code = process.wait()
        last = (log.read_text(encoding="utf-8").strip() or "no output").splitlines()[-1]
        print(last if code == 0 else f"{variant}: exit code {code}: {last}", flush=True)
        failed += [variant] if code else []
    return failed


def main(argv: list[str] | None = None) -> None:
    config = train.parse(Config, PRESETS, argv)
    check_data(sft.Config(clips=config.clips, eval_clips=config.eval_clips, seed=config.seed))
    check_ranges(config, sft_seconds=(0.01, 1e5), grpo_seconds=(0.01, 1e5))
    check(config.only in ("", *SFT, *GRPO), f"--only {config.only}: no such variant")
    world = train.start(config.seed)
    check(world.size == 1, "run this on one rank")
    if config.only:
        print("\n" + train_variant(config, world))
        return

    check(not Path(config.out).exists(), f"{config.out} is there: choose another --out")
    first = next(iter(SFT))
    sft.training_codes(stage_config(config, first, folder_of(config, first)),
                       Ideal(config.size, world.device), Path(config.out, "codes.npy"), world)
    heading = f"{'drift_error':30s} {'':7s} {'steps':>6s} {'ms':>7s}"
    print(heading + "".join(f"{split:>10s}" for split in SPLITS), flush=True)
    failed = side_by_side(config, SFT)
    if first not in failed:
        failed += side_by_side(config, GRPO)
    if failed:
        raise UserError(f"failed: {', '.join(failed)}; see output.txt in {config.out}")


if __name__ == "__main__":
    train.cli(main)
