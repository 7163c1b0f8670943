"""
Where the time of a run went, by its files: seconds of every stage, and how fast its steps were.

    python -m experiments.times runs/small

`seconds` is the time from the end of the stage before to the end of this one, `in steps` the sum of
its steps' times (log.jsonl), and `ms` their median. The rest is loading, compiling, encoding,
measuring the table's rows, saving, and steps before a restart (ddt.py). FLOPs are those of
experiments/plan.py: of GRPO, the language model's alone. Of a run in one go: a stage that was
trained on another day counts as a long one.
"""
import argparse
import dataclasses
import json
from pathlib import Path
from statistics import median

import torch

import checkpoint
import train
from checkpoint import check
from experiments import plan

# what is done, the file that is written at its end, and (of a training) its name in plan.STAGES
ENDS = [("VAE", "vae/trained.json", "vae"), ("tokenizer", "ddt/trained.json", "ddt"),
        ("prior", "llm/trained.json", "prior"), ("tokens of the clips", "sft/codes.txt", ""),
        ("SFT", "sft/trained.json", "sft"), ("GRPO", "grpo/trained.json", "grpo"),
        ("table, pictures", "clips.png", "")]


def table(out: Path) -> str:
    """A line for each part of the run folder `out` that is done."""
    lines = [f"{'':20s} {'seconds':>8s} {'in steps':>9s} {'steps':>6s} {'ms':>8s} {'TFLOP':>7s} "
             f"{'TFLOP/s':>8s}"]
    check((out / ".lock").exists(), f"{out} is not a run folder")
    before = begin = (out / ".lock").stat().st_mtime        # written when the run starts
    for name, file, stage in ENDS:
        if not (out / file).exists():
            continue
        end = (out / file).stat().st_mtime
        line = f"{name:20s} {end - before:8.1f}"
        if stage:
            log = (out / file).with_name("log.jsonl").read_text(encoding="utf-8").splitlines()
            seconds = [json.loads(step)["step_time"] for step in log]
            ms, tflop = 1e3 * median(seconds), flops(out, file, stage) / 1e12
            line += (f" {sum(seconds):9.1f} {len(seconds):6d} {ms:8.1f} {tflop:7.3f} "
                     f"{1e3 * tflop / ms:8.1f}")
        lines.append(line)
        before = end
    return "\n".join([*lines, f"{'in all':20s} {before - begin:8.1f}"])


def flops(out: Path, file: str, stage: str) -> float:
    """FLOPs of a step of a stage that is trained."""
    module = plan.STAGES[stage].module
    flags = checkpoint.read_json(out / file) | {"out": str(out)}
    names = {field.name for field in dataclasses.fields(module.Config)}
    config = module.Config(**{name: x for name, x in flags.items() if name in names})
    return plan.STAGES[stage].plan(config, 1).flops


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m experiments.times",
                                     description="Where the time of a run went.")
    parser.add_argument("out", type=Path, help="run folder, such as runs/tiny")
    if torch.cuda.is_available():
        print(torch.cuda.get_device_name())
    print(table(parser.parse_args(argv).out))


if __name__ == "__main__":
    train.cli(main)
