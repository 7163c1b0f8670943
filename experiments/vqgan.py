"""
VQGAN, what the paper compares its tokenizer with: spatial tokens for the same language model.

    frame -> convolutions -> 4 x 4 grid of vectors -> nearest of 256 codes -> convolutions -> frame

A token encodes what is in its cell of the picture, not what a step of a diffusion has destroyed.
The tokens of a frame go to the language model row by row.

Source: Esser et al. 2021, https://arxiv.org/abs/2012.09841. The convolutions are those of vae.py,
the quantizer is that of ddt.py.

Choices where the paper is silent (measured: docs/RESULTS.md)
1. The loss is squared error + commitment. VQGAN's perceptual loss needs a network trained on
   photographs; a patch discriminator was tried and made nothing better.
2. Quantization starts after a tenth of the training: a convolution depends on the picture at once.
3. One linear layer serves all cells: a ball looks the same in every one.

    python -m experiments.vqgan --steps 1500 --out runs/vqgan   # the tokenizer alone
    python sft.py --tokenizer vqgan --llm none --out runs/vqgan # a language model of its tokens
    python grpo.py --tokenizer vqgan --out runs/vqgan           # and RL

Axes: B batch, C channels, H W pixels, K = cells of the grid, D width, V codes.
"""
from dataclasses import dataclass
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor, nn

import checkpoint
import ddt
import evaluate
import sim
import train
from checkpoint import check
from ddt import (EMAVectorQuantizer, checked_codes, checked_frames, described, load_model,
                 reconstruction)
from vae import (Decoder, Encoder, Frames, check_data, check_ranges, frames_per_call, millions,
                 save_folder)


@dataclass
class Config:
    # run
    preset: str = "tiny"        # named set of defaults: tiny or small
    out: str = ""               # run folder (empty: runs/<preset>)
    seed: int = 0               # seed of weights and data order
    fresh: bool = False         # train this stage's model again; the old one stays until the end
    save_every: int = 200       # steps between two checkpoints
    # data
    scenario: str = "uniform"   # motion: uniform, parabola, collision, or all three
    clips: int = 6000           # training clips (of 32 frames) per motion
    size: int = 32              # pixels per side of a frame
    # model
    width: int = 16             # channels of the first level; the others have twice as many
    levels: int = 4             # resolutions: 4 give a grid 8 times smaller than the picture
    blocks: int = 1             # residual blocks per level
    # loss
    quantize_at: float = 0.1    # share of the steps after which quantization starts
    commitment: float = 0.25    # weight of the commitment loss
    # optimization
    steps: int = 4000           # optimizer steps
    batch: int = 64             # frames per step, over all ranks
    lr: float = 2e-3            # peak learning rate
    warmup: int = 200           # steps of linear warm-up, before a cosine to zero
    beta1: float = 0.9          # AdamW: decay of the mean of gradients
    beta2: float = 0.99         # AdamW: decay of the mean of their squares
    eps: float = 1e-8           # AdamW: added to the root of the mean square
    weight_decay: float = 0.0   # AdamW: on matrices only
    max_grad_norm: float = 1.0  # gradient clipping; 0: none
    # evaluation
    eval_clips: int = 32        # clips per split of the reconstruction table

    @property
    def side(self) -> int:
        return self.size // 2 ** (self.levels - 1)

    @property
    def queries(self) -> int:
        """Tokens per frame, by the name that DDT's config has for it."""
        return self.side ** 2


# both have 16 tokens per frame; 0.34M and 10.7M parameters
PRESETS = {
    "tiny": {},
    "small": dict(scenario="all", clips=20000, size=128, width=64, levels=6, blocks=2, steps=8000,
                  batch=256, lr=1e-3, warmup=400, eval_clips=64),
}


class VQGAN(nn.Module):
    """Convolutional encoder, EMA-VQ, convolutional decoder, with DDT's `encode` and `decode`."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        channels = [config.width] + [2 * config.width] * (config.levels - 1)
        D = 2 * channels[-1]
        self.encoder = Encoder(channels, config.blocks, D, groups=8)
        self.quantizer = EMAVectorQuantizer(nn.Linear(D, 16))
        self.decoder = Decoder(channels, config.blocks, 16, groups=8)
        self.to(memory_format=torch.channels_last)

    def vectors(self, frames: Tensor) -> Tensor:
        """frames (B, 3, H, W) in [0, 1] -> (B, K, D)."""
        return rearrange(self.encoder(2 * frames - 1), "b d h w -> b (h w) d")

    def paint(self, tokens: Tensor) -> Tensor:
        """Vectors (B, K, 16) -> frames (B, 3, H, W)."""
        x = rearrange(tokens, "b (h w) d -> b d h w", h=self.config.side)
        return self.decoder(x) / 2 + 0.5

    def forward(self, frames: Tensor, variance: Tensor) -> dict[str, Tensor]:
        """
        frames (B, 3, H, W) in [0, 1], their variance -> {loss, mse (in units of it), commitment
        (B,); codes (B, K), vectors (B, K, 16)}.
        """
        tokens, codes, commitment, z = self.quantizer(self.vectors(frames))
        mse = (self.paint(tokens) - frames).square().mean((1, 2, 3)) / variance
        loss = mse + self.config.commitment * commitment
        return {"loss": loss, "mse": mse, "commitment": commitment, "codes": codes,
                "vectors": z.detach()}

    @torch.no_grad()
    def encode(self, frames: Tensor) -> Tensor:
        """frames (B, 3, H, W) in [0, 1] -> codes (B, K), int64, row by row."""
        frames = checked_frames(frames, self.config.size)
        return self.quantizer.nearest(self.quantizer.vectors(self.vectors(frames)))

    @torch.no_grad()
    def decode(self, codes: Tensor, generator=None) -> Tensor:
        """codes (B, K) -> frames (B, 3, H, W) in [0, 1]. Not random: generator is not used."""
        codebook = self.quantizer.codebook
        codes = checked_codes(codes, self.config.queries, len(codebook)).to(codebook.device)
        return self.paint(codebook[codes]).clamp(0, 1)

    def save(self, folder) -> None:
        save_folder(folder, {"vqgan": described(self.config)}, self, ddt.MODEL)

    @classmethod
    def load(cls, folder) -> "VQGAN":
        """A folder written by `save`. Raises UserError for what is missing, damaged or unfit."""
        return load_model(folder, "VQGAN", lambda config: cls(Config(**config["vqgan"])))


def train_vqgan(config: Config, world: train.World) -> VQGAN:
    """Trains the tokenizer on single frames and saves it in <out>/vqgan."""
    folder = Path(config.out, "vqgan")
    checkpoint.start_stage(folder, config, world)
    torch.manual_seed(config.seed)
    vqgan = VQGAN(config).to(world.device)
    B, data, quantizer = config.batch, Frames(config, world.device), vqgan.quantizer
    world.print0(f"VQGAN: {millions(vqgan)} parameters, {config.queries} tokens per frame, "
                 f"{config.steps} steps of {B} frames")
    model = train.distribute(vqgan, world)
    variance = data[train.batch_indices(config.seed, 0, 512, len(data))].var()

    with train.Run(folder, vqgan, config, world, show=("mse", "codes_used")) as run:
        for step in run:
            model.train()
            if step >= config.quantize_at * config.steps and not quantizer.active:
                index = world.shard(train.batch_indices(config.seed, step, 16 * B, len(data)))
                with torch.no_grad():
                    z = [quantizer.vectors(vqgan.vectors(data[i]))
                         for i in index.split(frames_per_call(world.device))]
                quantizer.fill(torch.cat(z).flatten(0, 1))
            frames = data[world.shard(train.batch_indices(config.seed, step, B, len(data)))]
            with world.autocast():
                out = model(frames, variance)
            loss = out["loss"].sum() / B
            (loss * world.size).backward()                  # times ranks: a sum, not DDP's average
            taken = run.step(loss)

            codes = out["codes"].flatten()
            if taken:
                quantizer.update(out["vectors"].flatten(0, 1), codes)
            means = {name: world.all_reduce(out[name].sum()) / B for name in ("mse", "commitment")}
            run.log(**means, **quantizer.usage(codes))

    quantizer.number()
    checkpoint.finish(folder, vqgan.save, config, vqgan, world)
    return vqgan.eval().requires_grad_(False)


def report(config, vqgan: VQGAN, world: train.World) -> Path:
    """The tokenizer's row of the result table; what is there already is not done again."""
    return evaluate.add_rows(config, {"VQGAN": reconstruction(vqgan)}, ("vqgan",),
                             vqgan.config.size, world, n=vqgan.config.eval_clips, shown=sim.FRAMES)


def ensure(config, world: train.World) -> VQGAN:
    """The VQGAN of <out> for a later stage with `config`: loaded, or trained first."""
    folder = Path(config.out, "vqgan")
    if not checkpoint.has_model(folder):
        world.print0(f"{folder} is missing: training it first.")
        run_stage(train.stage_config("vqgan", Config, PRESETS, config), world)
    vqgan = VQGAN.load(folder).to(world.device)
    ddt.check_scenario(config, vqgan, folder)
    report(config, vqgan, world)
    return vqgan


def run_stage(config: Config, world: train.World) -> None:
    """Loads the VQGAN that `config` describes, or trains it; then its row of the table."""
    folder = Path(config.out, "vqgan")
    if checkpoint.is_trained(folder, config, world):
        vqgan = VQGAN.load(folder).to(world.device)
    else:
        vqgan = train_vqgan(config, world)
    results = report(config, vqgan, world)
    if world.is_main:
        print(evaluate.table(results))
        for name in train.scenarios(config.scenario):
            median, used = ddt.center_error(vqgan, name, world.device)
            print(f"\n{name}: median centre error {median:.4f} world units, {used} codes in use")
    world.barrier()


def check_config(c: Config) -> None:
    """UserError for flags that cannot work."""
    check_data(c)
    check_ranges(c, size=sim.SIZES, width=(8, 4096), levels=(1, 10), blocks=(1, 64),
                 commitment=(0, 100), batch=(1, 65536))
    shrink = 2 ** (c.levels - 1)
    check(c.quantize_at < 1, f"--quantize_at {c.quantize_at}: a share of the steps, below 1")
    check(c.width % 8 == 0, f"--width {c.width}: must be a multiple of 8 (its norms have 8 groups)")
    check(c.size % shrink == 0, f"--size {c.size}: must be a multiple of {shrink}, by which "
          f"--levels {c.levels} shrink it")
    check(c.queries <= 256, f"--levels {c.levels}: leaves {c.queries} cells, each a token; at most "
          "256 can be")


def main(argv: list[str] | None = None) -> None:
    config = train.parse(Config, PRESETS, argv)
    check_config(config)
    run_stage(config, train.start(config.seed, config.out))


if __name__ == "__main__":
    train.cli(main)
