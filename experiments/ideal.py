"""
The control: language models of perfect tokens. What is lost here is not the tokenizer's fault.

A frame has three tokens, which are measured instead of learnt: x, y and radius of its ball, each in
256 steps. To decode them is to paint that ball. Everything else is as in sft.py and grpo.py.

    {random weights, prior, prior with replay} x {SFT, SFT + RL}: drift_error on every split

Has the prior not simply seen those speeds? So that everyone can judge, three other priors: of hands
that turn as fast as SFT's balls make them and no other way; of hands that turn faster than
those, or stand still; of all speeds, but on two or four hands, never on three.

    python -m experiments.ideal                             # three seeds: 90 minutes, one core
    python -m experiments.ideal --seeds 0 --sft_steps 1000  # one seed, a longer SFT

Everything is kept in runs/ideal/<seed>: what is done is not done again.

Axes: B frames, V codes, H W pixels.
"""
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

import checkpoint
import evaluate
import grpo
import prior
import reward
import sft
import sim
import train
from checkpoint import check
from lm import Llama
from sim import WORLD
from vae import check_data, check_ranges

V = 256
LARGEST = 2.5               # units: radius of code 255; 0 is "no ball in view"
SPLITS = ("pretrain", "posttrain", "iid", "slow", "fast", "small", "large")
MODELS = {                  # what SFT starts from, and whether numbers are mixed in
    "random weights": dict(llm="none", replay=0.0),
    "prior": dict(replay=0.0),
    "prior with replay": dict(),
}
# A ball of SFT's speeds, 1.5 to 3.5 units per second, moves 3.8 to 8.9 places per frame; one of the
# split fast, 4.5 to 6, moves 11.5 to 15.3.
STEADY = dict(accelerate=0.0, change=0.0, follow=0.0, warp=0.0)
OTHER_PRIORS = {            # flags of prior.py; all with replay
    "SFT's speeds only": dict(slowest=3.8, fastest=8.9, **STEADY),
    "faster ones only": dict(slowest=10.0, **STEADY),
    "2 and 4 hands only": dict(hands="2,4"),
}


@dataclass
class Config:
    # run
    preset: str = "tiny"        # the stages' preset: tiny
    out: str = "runs/ideal"     # a run folder for each seed is made in it
    seeds: str = "0,1,2"        # seeds of weights and data, with commas between them
    seed: int = 0               # not used: see seeds
    # data
    clips: int = 6000           # training clips of SFT
    eval_clips: int = 96        # clips per split of the table
    size: int = 32              # pixels per side of the painted frames
    # optimization
    prior_steps: int = 900      # optimizer steps of the prior
    sft_steps: int = 500        # optimizer steps of SFT
    grpo_steps: int = 30        # optimizer steps of GRPO


PRESETS = {"tiny": {}}


class Ideal:
    """A tokenizer with the methods of ddt.DDT that sft.py and grpo.py use."""

    def __init__(self, size: int, device="cpu"):
        self.config = SimpleNamespace(queries=3, size=size)
        self.quantizer = SimpleNamespace(codebook=prior.circle(V).to(device))

    def encode(self, frames: Tensor) -> Tensor:
        """frames (B, 3, H, W) -> codes (B, 3) of x, y and radius; all 0 if no ball is found."""
        center, radius, found = reward.detect(frames[:, None], n_balls=1)       # (B, 1, 1, ...)
        measured = torch.cat([center[:, 0, 0] / WORLD, radius[:, 0] / LARGEST], -1)     # (B, 3)
        codes = ((V - 1) * measured).round().clamp(0, V - 1)
        return torch.where(found[:, 0], codes, 0).long()

    def decode(self, codes: Tensor, generator=None) -> Tensor:
        """codes (B, 3) -> frames (B, 3, H, W): the ball, painted. Nothing is drawn at random."""
        x, y, radius = (codes / (V - 1)).unbind(-1)                             # (B,) each
        position = WORLD * torch.stack([x, y], -1)[:, None, None]               # (B, 1, 1, 2)
        radius = LARGEST * radius[:, None]                                      # (B, 1)
        least = torch.full_like(radius, sim.LEAST_RADIUS)
        frames = sim.render(position, radius.maximum(least), self.config.size)[:, 0]
        return torch.where((radius > 0)[..., None, None], frames, 1.0)          # white: no ball

    def save(self, run: Path) -> None:
        """In a run folder: the weights whose checksum sft.py and grpo.py note."""
        checkpoint.writable(run / "ideal")
        checkpoint.write_safetensors(run / "ideal" / "model.safetensors",
                                     {"codebook": self.quantizer.codebook}, {})


def train_all(config: Config, seed: int, world: train.World) -> Path:
    """Trains and evaluates all models of a seed -> the file of their results."""
    place = Path(config.out, str(seed))
    tokenizer = Ideal(config.size, world.device)
    path = place / "results.json"
    for name, flags in {"": {}, **OTHER_PRIORS}.items():
        out = place / name.replace(" ", "-")
        prior.run_stage(prior.Config(out=str(out), seed=seed, steps=config.prior_steps, **flags),
                        world)
    others = {name: dict(llm=str(place / name.replace(" ", "-") / "llm")) for name in OTHER_PRIORS}

    def add_row(name: str, model: Llama) -> None:
        predict = sft.predictor(model.to(world.device), tokenizer)
        evaluate.add_row(path, name, predict, ["uniform"], SPLITS, config.eval_clips,
                         size=config.size, device=world.device)

    for name, flags in (MODELS | others).items():
        out = place / name.replace(" ", "-")
        tokenizer.save(out)
        same = dict(out=str(out), seed=seed, tokenizer="ideal")
        flags = {"llm": str(place / "llm")} | flags
        sft_config = sft.Config(clips=config.clips, steps=config.sft_steps, **same | flags)
        if name == "prior" or name in others:
            add_row(f"{name}: no clip seen", sft.starting_model(sft_config, tokenizer, world))
        if not checkpoint.is_trained(out / "sft", sft_config, world):
            sft.train_sft(sft_config, tokenizer, world)
        reference = sft.load(out / "sft").to(world.device).requires_grad_(False)
        add_row(f"{name}: SFT", reference)
        betas = {} if sft_config.replay else {"beta_numbers": 0.0}
        grpo_config = grpo.Config(steps=config.grpo_steps, **same | betas)
        if not checkpoint.is_trained(out / "grpo", grpo_config, world):
            grpo.train_grpo(grpo_config, tokenizer, reference, world)
        add_row(f"{name}: SFT + RL", sft.load(out / "grpo"))
    return path


def table(paths: list[Path]) -> str:
    """drift_error of every model and split: mean over the seeds, and the least and largest."""
    of_seeds = [evaluate.read_results(path) for path in paths]
    lines = [" " * 34 + "".join(f"{split:>20s}" for split in SPLITS)]
    for row in of_seeds[0]:
        line = f"{row:34s}"
        for split in SPLITS:
            errors = torch.tensor([x[row]["uniform"][split]["drift_error"] for x in of_seeds])
            line += f"{errors.mean():8.3f} ({errors.min():.2f}-{errors.max():.2f})"
        lines.append(line)
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    config = train.parse(Config, PRESETS, argv)
    seeds = config.seeds.split(",")
    check(all(seed.isdecimal() for seed in seeds), f"--seeds {config.seeds}: whole numbers with "
          "commas between them, such as 0,1,2")
    check(str(evaluate.EVAL_SEED) not in seeds, f"--seeds {config.seeds}: {evaluate.EVAL_SEED} is "
          "that of the held-out clips")
    check_data(sft.Config(clips=config.clips, eval_clips=config.eval_clips))
    check_ranges(config, size=sim.SIZES)
    world = train.start(config.seed, config.out)
    check(world.size == 1, "run this on one rank")
    print(table([train_all(config, int(seed), world) for seed in seeds]))


if __name__ == "__main__":
    train.cli(main)
