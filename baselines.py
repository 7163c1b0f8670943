"""
What the paper compares with. Here: the VQGAN tokenizer (Esser et al. 2021), the paper's spatial tokens.

    frame -> convolutions -> 4 x 4 grid of vectors -> nearest of 256 codes (the same EMA-VQ) -> convolutions -> frame

A token says what is in its cell of the picture, not what a step of a diffusion has destroyed; the tokens of a frame go to the
language model row by row. The convolutions are the VAE's of ddt.py, one level deeper.

Choices where the paper is silent
1. Loss: squared error + commitment. A perceptual loss needs a network trained on photographs; there is nothing of them in a
   disc on white.
2. Quantization starts after a tenth of the training. A convolution depends on the picture from the first step, so that no
   more waiting is needed; and one linear layer serves all cells, for a ball looks the same in every one.

    python baselines.py vqgan                               # trains it in runs/tiny/vqgan
    python sft.py --tokenizer vqgan --out runs/tiny-vqgan   # the same language model on its tokens

Axes: B batch, F frames, H W pixels, K = cells of the grid, D width, N codes.
"""
import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor, nn

import reward
import sim
import train
from ddt import (Decoder, EMAVectorQuantizer, Encoder, Frames, center_error, check_codes, check_frames, check_scenario,
                 load_folder, millions, reconstruction, save_folder)


# ------------------------------------------------------------------ VQGAN


@dataclass
class VQGANConfig:
    preset: str = "tiny"
    out: str = ""               # run folder; empty: runs/<preset>
    seed: int = 0
    fresh: bool = False         # start over, ignoring checkpoints
    save_every: int = 200       # steps between checkpoints
    # data
    scenario: str = "uniform"   # one of sim.SCENARIOS, or all
    clips: int = 6000           # training clips (32 frames each) per scenario
    size: int = 32              # pixels
    # model
    width: int = 16             # channels of the first level; the others have twice as many
    levels: int = 4             # resolutions: 4 -> a grid 8 times smaller than the picture
    blocks: int = 1             # residual blocks a level
    quantize_at: float = 0.1    # quantization starts at this share of the steps
    commitment: float = 0.25
    # optimization
    steps: int = 4000
    batch: int = 64
    lr: float = 2e-3
    warmup: int = 200
    beta1: float = 0.9
    beta2: float = 0.99
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float = 1.0           # gradient norm; 0: no clipping
    eval_clips: int = 32        # per split of the reconstruction table

    @property
    def side(self) -> int:
        return self.size // 2 ** (self.levels - 1)

    @property
    def queries(self) -> int:
        """Tokens of a frame, by the name that DDT's config has for it."""
        return self.side ** 2


PRESETS = {
    "tiny": {},
}


class VQGAN(nn.Module):
    """Convolutional encoder, EMA-VQ, convolutional decoder, with DDT's `encode` and `decode`."""

    def __init__(self, config: VQGANConfig):
        super().__init__()
        self.config = config
        channels = [config.width] + [2 * config.width] * (config.levels - 1)
        D = 2 * channels[-1]
        self.encoder = Encoder(channels, config.blocks, D // 2, 8)                # it gives twice its latent channels
        self.quantizer = EMAVectorQuantizer(nn.Linear(D, 16))
        self.decoder = Decoder(channels, config.blocks, 16, 8)
        self.to(memory_format=torch.channels_last)

    def vectors(self, frames: Tensor) -> Tensor:                                  # (B, 3, H, W) in [0, 1]
        return rearrange(self.encoder(2 * frames - 1), "b d h w -> b (h w) d")    # (B, K, D)

    def paint(self, tokens: Tensor) -> Tensor:                                    # (B, K, 16)
        x = rearrange(tokens, "b (h w) d -> b d h w", h=self.config.side)
        return self.decoder(x) / 2 + 0.5                                          # (B, 3, H, W)

    def forward(self, frames: Tensor, variance: Tensor) -> dict[str, Tensor]:
        """
        frames (B, 3, H, W) in [0, 1], their variance -> {loss, mse (in units of it), commitment (B,); codes (B, K), vectors
        (B, K, 16)}.
        """
        tokens, codes, commitment, z = self.quantizer(self.vectors(frames))
        mse = (self.paint(tokens) - frames).square().mean((1, 2, 3)) / variance
        return {"loss": mse + self.config.commitment * commitment, "mse": mse, "commitment": commitment, "codes": codes,
                "vectors": z.detach()}

    @torch.no_grad()
    def encode(self, frames: Tensor) -> Tensor:
        """frames (B, 3, H, W) in [0, 1] -> codes (B, K), int64, row by row."""
        check_frames(frames, self.config.size)
        return self.quantizer.nearest(self.quantizer.vectors(self.vectors(frames)))

    @torch.no_grad()
    def decode(self, codes: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """codes (B, K) -> frames (B, 3, H, W) in [0, 1]. Nothing is random here: the generator is not used."""
        check_codes(codes, self.config.queries, len(self.quantizer.codebook))
        return self.paint(self.quantizer.codebook[codes]).clamp(0, 1)

    def save(self, folder) -> None:
        config = {k: v for k, v in dataclasses.asdict(self.config).items() if k not in ("out", "fresh", "save_every")}
        save_folder(folder, {"vqgan": config}, self, "model.safetensors")

    @classmethod
    def load(cls, folder) -> "VQGAN":
        """A folder written by `save`. Raises train.Problem for what is missing, damaged or does not fit."""
        config, tensors = load_folder(folder, "model.safetensors")
        try:
            model = cls(VQGANConfig(**config["vqgan"]))
        except (KeyError, TypeError) as error:
            raise train.Problem(f"{folder}/config.json is not that of a VQGAN of this version ({error})") from None
        train.load_state(model, tensors, Path(folder))
        return model.eval().requires_grad_(False)


def train_vqgan(config: VQGANConfig, world: train.World) -> VQGAN:
    """Trains the tokenizer on single frames and saves it in <out>/vqgan."""
    folder = train.writable(Path(config.out, "vqgan"))
    torch.manual_seed(config.seed)
    vqgan = VQGAN(config).to(world.device)
    world.say(f"VQGAN: {millions(vqgan)} parameters, {config.queries} tokens a frame, {config.steps} steps of {config.batch} frames")
    data, q = Frames(config, world.device), vqgan.quantizer
    model = train.distribute(vqgan, world)
    variance = data[train.rows(config.seed, 0, 512, len(data))].var()
    with train.Run(folder, vqgan, config, world, show=("mse", "codes_used")) as run:
        for step in run:
            model.train()
            if step >= config.quantize_at * config.steps and not q.active:
                rows = world.share(train.rows(config.seed, step, 16 * config.batch, len(data)))
                with torch.no_grad():
                    q.fill(q.vectors(vqgan.vectors(data[rows])).flatten(0, 1))
            result = model(data[world.share(train.rows(config.seed, step, config.batch, len(data)))], variance)
            if run.update(model, [result["loss"].sum() / config.batch]):
                q.update(result["vectors"].flatten(0, 1), result["codes"].flatten())
            run.log(**{name: train.total(result[name].sum()) / config.batch for name in ("mse", "commitment")}, **q.usage())
    if world.is_main:
        reward.drop_rows(folder.parent / "results.json", "VQGAN", "SFT", "SFT + RL")
    train.finish(folder, vqgan.save, config, vqgan, world)
    return vqgan.eval().requires_grad_(False)


def report(config, vqgan: VQGAN, world: train.World) -> None:
    """The tokenizer's row of the result table; what is there already is not done again."""
    if world.is_main:
        reward.add_row(Path(config.out, "results.json"), "VQGAN", reconstruction(vqgan), train.scenarios(config.scenario),
                       sim.SHOWN, vqgan.config.eval_clips, size=vqgan.config.size, shown=sim.FRAMES, device=world.device)
    train.wait(world)


def ensure(config, world: train.World) -> VQGAN:
    """The VQGAN of <out>: loaded, or trained first."""
    folder = Path(config.out, "vqgan")
    if not (folder / "model.safetensors").exists():
        world.say(f"{folder} is missing: training it first.")
        vqgan_main(train.handed_on(config))
    vqgan = VQGAN.load(folder).to(world.device)
    check_scenario(config, vqgan, folder)
    report(config, vqgan, world)
    return vqgan


def vqgan_main(argv: list[str] | None) -> None:
    config = c = train.parse(VQGANConfig, PRESETS, argv)
    names = train.scenarios(c.scenario)
    train.need(0 <= c.quantize_at < 1, f"--quantize_at {c.quantize_at}: a share of the steps, below 1")
    train.need(c.width % 8 == 0, f"--width {c.width}: must be a multiple of 8 (its norms have 8 groups)")
    train.need(c.size % 2 ** (c.levels - 1) == 0, f"--size {c.size}: must be a multiple of {2 ** (c.levels - 1)}, what "
               f"--levels {c.levels} shrink it by")
    world = train.start(c.seed)
    out = train.writable(Path(c.out))
    train.occupy(out, world)
    if c.fresh:
        train.discard(out / "vqgan")
    if train.is_trained(out / "vqgan", "model.safetensors", c, world):
        vqgan = VQGAN.load(out / "vqgan").to(world.device)
    else:
        vqgan = train_vqgan(config, world)
    report(c, vqgan, world)
    if world.is_main:
        print(reward.table(out / "results.json"))
        for name in names:
            median, used = center_error(vqgan, name, world.device)
            print(f"\n{name}: median centre error {median:.4f} world units, {used} codes in use")
    train.wait(world)


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    train.need(argv[:1] == ["vqgan"], "say which one: python baselines.py vqgan [--FIELD VALUE ...]")
    vqgan_main(argv[1:])


if __name__ == "__main__":
    train.cli(main)
