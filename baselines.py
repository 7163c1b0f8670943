"""
What the paper compares with.

VQGAN (Esser et al. 2021), spatial tokens for the same language model:

    frame -> convolutions -> 4 x 4 grid of vectors -> nearest of 256 codes (the same EMA-VQ) -> convolutions -> frame

A token says what is in its cell of the picture, not what a step of a diffusion has destroyed; the tokens of a frame go to the
language model row by row. The convolutions are the VAE's of ddt.py. Choices where the paper is silent:

1. Loss: squared error + commitment, without VQGAN's two others. A perceptual loss needs a network trained on photographs, and
   there is nothing of them in a disc on white. A patch discriminator (hinge loss, VQGAN's adaptive weight times 0.5, in the last
   1000 of 1500 steps; one run) made nothing better: centre error 0.059 against 0.053, velocity_error of iid reconstructions
   0.82 +- 0.01 against 0.73 +- 0.02, drift_error the same.
2. Quantization starts after a tenth of the training. A convolution depends on the picture from the first step, so that no
   more waiting is needed; and one linear layer serves all cells, for a ball looks the same in every one.

DiT (PhyWorld, Kang et al. 2024, https://arxiv.org/abs/2411.02385), a video diffusion model without tokens:

    latents of 32 frames, noisy, + those of the first 3, clean -> attention over space and time -> v-prediction -> DDIM

Sizes, full space-time attention, 3D rope, how the first frames are given, v-prediction with zero terminal SNR and the optimizer
are PhyWorld's, as far as they are known (its training code is not public; memory is not planned here). Choices where it is
silent, and differences:

3. One modulation for all blocks and a table for each (as PixArt has it): the published parameter counts say so.
4. DDPM's linear noise levels, stretched. The loss is of the predicted frames. 25 DDIM steps. q and k are RMS-normalised.
5. No horizontal flips: uniform balls only move to the right.

    python baselines.py vqgan                               # trains it in runs/tiny/vqgan, for figures.py
    python sft.py --tokenizer vqgan --out runs/tiny-vqgan   # trains one there, and the same language model on its tokens
    python baselines.py dit                                 # trains it in runs/tiny/dit, on the VAE of runs/tiny
    python baselines.py dit --preset B --out runs/paper     # PhyWorld's DiT-B; S and L likewise

Axes: B batch, F frames, C latent channels, H W pixels, h w latent cells, K = cells of the grid, L = vectors of a clip, D width,
N codes.
"""
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import torch
from einops import rearrange
from torch import Tensor, nn

import reward
import sim
import train
from ddt import (VAE, VAE_WEIGHTS, Decoder, EMAVectorQuantizer, Encoder, Frames, at_a_time, center_error, check_codes,
                 check_frames, check_scenario, described, load_model, millions, reconstruction, save_folder, sincos)
from lm import rotate
from sim import CONDITION


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


# Both have 16 tokens a frame. Parameters: 0.34M and 10.7M.
VQGAN_PRESETS = {
    "tiny": {},
    "small": dict(scenario="all", clips=20000, size=128, width=64, levels=6, blocks=2, steps=8000, batch=256, lr=1e-3, warmup=400,
                  eval_clips=64),
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
        save_folder(folder, {"vqgan": described(self.config)}, self, "model.safetensors")

    @classmethod
    def load(cls, folder) -> "VQGAN":
        """A folder written by `save`. Raises train.Problem for what is missing, damaged or does not fit."""
        return load_model(folder, "VQGAN", lambda config: cls(VQGANConfig(**config["vqgan"])))


def train_vqgan(config: VQGANConfig, world: train.World) -> VQGAN:
    """Trains the tokenizer on single frames and saves it in <out>/vqgan."""
    folder = train.writable(Path(config.out, "vqgan"))
    torch.manual_seed(config.seed)
    vqgan = VQGAN(config).to(world.device)
    world.say(f"VQGAN: {millions(vqgan)} parameters, {config.queries} tokens a frame, {config.steps} steps of {config.batch}")
    data, q = Frames(config, world.device), vqgan.quantizer
    world.compile(vqgan.encoder, vqgan.decoder)
    model = train.distribute(vqgan, world)
    variance = data[train.rows(config.seed, 0, 512, len(data))].var()
    with train.Run(folder, vqgan, config, world, show=("mse", "codes_used")) as run:
        for step in run:
            model.train()
            if step >= config.quantize_at * config.steps and not q.active:
                rows = world.share(train.rows(config.seed, step, 16 * config.batch, len(data)))
                with torch.no_grad():
                    found = [q.vectors(vqgan.vectors(data[part])) for part in rows.split(at_a_time(world.device))]
                q.fill(torch.cat(found).flatten(0, 1))
            with world.autocast():
                result = model(data[world.share(train.rows(config.seed, step, config.batch, len(data)))], variance)
            loss = result["loss"].sum() / config.batch
            (loss * world.size).backward()                  # DDP averages over ranks: this makes it the sum
            if run.step(loss):
                q.update(result["vectors"].flatten(0, 1), result["codes"].flatten())
            errors = {name: train.total(result[name].sum()) / config.batch for name in ("mse", "commitment")}
            run.log(**errors, **q.usage(result["codes"].flatten()))
    if world.is_main:
        speak = ("SFT", "SFT + RL") if "vqgan" in reward.read(folder.parent / "sft" / "made_of.json") else ()     # its tokens
        reward.drop_rows(folder.parent / "results.json", "VQGAN", *speak)
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
    config = c = train.parse(VQGANConfig, VQGAN_PRESETS, argv)
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


# ------------------------------------------------------------------ video DiT


@dataclass
class DiTConfig:
    preset: str = "tiny"
    out: str = ""               # run folder; empty: runs/<preset>
    seed: int = 0
    fresh: bool = False         # start over, ignoring checkpoints
    save_every: int = 100       # steps between checkpoints
    # data
    scenario: str = "uniform"   # one of sim.SCENARIOS, or all
    clips: int = 6000           # training clips per scenario
    size: int = 32              # pixels
    # model: on the latents of <out>/vae
    patch: int = 2              # latent cells a side that make one vector
    width: int = 96
    layers: int = 7
    heads: int = 4
    # diffusion
    levels: int = 1000          # noise levels
    calls: int = 25             # of the model for a clip (DDIM)
    # optimization
    steps: int = 1275           # as many FLOPs as sft.py's 4000 steps of 16 clips
    batch: int = 8
    micro: int = 0              # clips per backward pass and rank; 0: all at once
    lr: float = 1e-3
    warmup: int = 100
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.01
    clip: float = 1.0           # gradient norm; 0: no clipping
    eval_clips: int = 256       # per split of the result table


# S, B, L: PhyWorld's. `tiny`, `small`: as many parameters as sft.py's language models.
DIT_PRESETS = {
    "tiny": {},
    "small": dict(scenario="all", clips=20000, size=128, width=768, layers=11, heads=12, steps=3000, batch=64, lr=2e-4, warmup=300),
} | {name: dict(scenario="all", clips=3_000_000, size=128, width=width, layers=layers, heads=heads, steps=100_000,
                batch=256, lr=1e-4, warmup=1000, clip=0.0, eval_clips=1000)
     for name, width, layers, heads in (("S", 384, 12, 6), ("B", 768, 12, 12), ("L", 1024, 24, 16))}


def zero_terminal_snr(levels: int) -> tuple[Tensor, Tensor]:
    """DDPM's noise levels, stretched so that nothing of the clip is left at the last -> alpha, sigma (levels,)."""
    alpha = (1 - torch.linspace(1e-4, 0.02, levels, dtype=torch.float64)).cumprod(0).sqrt()
    alpha = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
    return alpha.float(), (1 - alpha ** 2).sqrt().float()


def rope_3d(frames: int, side: int, d: int) -> tuple[Tensor, Tensor]:
    """cos, sin (F side side, d) for lm.rotate: a third of the pairs of channels turns with the row, a third with the column."""
    pairs = d // 2
    share = (pairs - 2 * (pairs // 3), pairs // 3, pairs // 3)                    # frame, row, column
    place = torch.cartesian_prod(torch.arange(frames), torch.arange(side), torch.arange(side)).float()
    angle = torch.cat([x[:, None] * 10000 ** (-torch.arange(n) / n) for x, n in zip(place.T, share)], 1).repeat(1, 2)
    return angle.cos(), angle.sin()


class Block(nn.Module):
    """Attention and MLP, shifted, scaled and gated by one modulation that all blocks share and a table of the block's own."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=1e-6, elementwise_affine=False) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))
        self.table = nn.Parameter(torch.randn(6, width) / width ** 0.5)

    def forward(self, x: Tensor, modulation: Tensor, cos: Tensor, sin: Tensor) -> Tensor:   # (B, L, D), (B, 6, D), (L, d) twice
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.table + modulation)[:, :, None].unbind(1)     # (B, 1, D) each
        h = self.qkv(self.norm1(x) * (1 + scale1) + shift1)
        q, k, v = rearrange(h, "b l (three heads d) -> three b heads l d", three=3, heads=self.heads)
        q, k = (rotate(nn.functional.rms_norm(y, y.shape[-1:]), cos, sin).to(v.dtype) for y in (q, k))
        h = nn.functional.scaled_dot_product_attention(q, k, v)                   # (B, heads, L, d)
        x = x + gate1 * self.out(rearrange(h, "b heads l d -> b l (heads d)"))
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class DiT(nn.Module):
    """A clip's latents, noisy, beside its first three frames, clean -> the velocity of the diffusion."""

    def __init__(self, config: DiTConfig, vae: VAE):
        super().__init__()
        self.config, self.vae = config, vae.eval().requires_grad_(False)
        self.channels, side = vae.config["latent_channels"], config.size // vae.shrink
        if config.size % (vae.shrink * config.patch):
            raise train.Problem(f"--size {config.size} must be a multiple of {vae.shrink * config.patch} "
                                f"(VAE {vae.shrink} x patch {config.patch})")
        D, p = config.width, config.patch
        self.patch_in = nn.Linear((2 * self.channels + 1) * p * p, D)
        self.time = nn.Sequential(nn.Linear(256, D), nn.SiLU(), nn.Linear(D, D))
        self.modulation = nn.Linear(D, 6 * D)
        self.blocks = nn.ModuleList(Block(D, config.heads) for _ in range(config.layers))
        self.norm = nn.LayerNorm(D, eps=1e-6, elementwise_affine=False)
        self.table = nn.Parameter(torch.randn(2, D) / D ** 0.5)
        self.patch_out = nn.Linear(D, self.channels * p * p)
        nn.init.zeros_(self.patch_out.weight)
        nn.init.zeros_(self.patch_out.bias)
        tables = *rope_3d(sim.FRAMES, side // p, D // config.heads), *zero_terminal_snr(config.levels)
        for name, table in zip(("cos", "sin", "alpha", "sigma"), tables):
            self.register_buffer(name, table, persistent=False)

    def train(self, mode: bool = True):
        super().train(mode)
        self.vae.eval()
        return self

    def velocity(self, x: Tensor, t: Tensor, given: Tensor) -> Tensor:
        """x (B, F, C, h, w) at noise level t (B,), given (B, 3, C, h, w) -> v (B, F, C, h, w)."""
        p, shown = self.config.patch, torch.zeros_like(x)
        shown[:, :CONDITION] = given
        mask = x.new_zeros(x.shape[1], 1, 1, 1)
        mask[:CONDITION] = 1
        h = torch.cat([x, shown, mask.expand_as(x[:, :, :1])], 2)                 # (B, F, 2 C + 1, h, w)
        h = self.patch_in(rearrange(h, "b f c (h p) (w q) -> b (f h w) (c p q)", p=p, q=p))         # (B, L, D)
        time = self.time(sincos(t, 256).to(h.dtype))                              # (B, D)
        modulation = self.modulation(nn.functional.silu(time)).unflatten(-1, (6, -1))               # (B, 6, D)
        for block in self.blocks:
            h = block(h, modulation, self.cos, self.sin)
        shift, scale = (self.table + time[:, None])[:, :, None].unbind(1)
        h = self.patch_out(self.norm(h) * (1 + scale) + shift)
        return rearrange(h, "b (f h w) (c p q) -> b f c (h p) (w q)", f=x.shape[1], h=x.shape[-2] // p, p=p, q=p)

    def forward(self, latent: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Clean latents x_0 (B, F, C, h, w), noise levels t (B,) -> squared error of v = alpha eps - sigma x_0, per clip (B,)."""
        alpha, sigma = (s[t][:, None, None, None, None] for s in (self.alpha, self.sigma))
        v = self.velocity(alpha * latent + sigma * noise, t, latent[:, :CONDITION])
        return (v - (alpha * noise - sigma * latent))[:, CONDITION:].square().mean((1, 2, 3, 4))

    @torch.no_grad()
    def sample(self, given: Tensor, noise: Tensor) -> Tensor:
        """
        DDIM from noise (B, F, C, h, w) at the last level: given (B, 3, C, h, w) -> latents (B, F, C, h, w). The given frames
        are as noisy as the others all the way, as in training; no loss has taught the model to denoise them.
        """
        last = self.config.levels - 1
        levels = torch.linspace(last, 0, self.config.calls + 1).round().long()[:-1].tolist()
        x = noise.clone()
        for t, then in zip(levels, [*levels[1:], None]):
            x[:, :CONDITION] = self.alpha[t] * given + self.sigma[t] * noise[:, :CONDITION]
            v = self.velocity(x, torch.full((len(x),), t, device=x.device), given)
            clean = self.alpha[t] * x - self.sigma[t] * v
            if then is not None:
                x = self.alpha[then] * clean + self.sigma[then] * (self.sigma[t] * x + self.alpha[t] * v)
        return torch.cat([given, clean[:, CONDITION:]], 1)

    @torch.no_grad()
    def latent(self, frames: Tensor) -> Tensor:
        """frames (B, F, 3, H, W) in [0, 1] -> latents (B, F, C, h, w)."""
        parts = (2 * frames - 1).flatten(0, 1).split(at_a_time(frames.device))
        return torch.cat([self.vae.encode(x) for x in parts]).unflatten(0, frames.shape[:2])

    def predictor(self, seed: int = 0) -> Callable[[Tensor], Tensor]:
        """The model as reward.evaluate wants it: frames (B, 3, 3, H, W) -> frames (B, 32, 3, H, W), one sample each."""
        @torch.no_grad()
        def predict(frames: Tensor) -> Tensor:
            generator = torch.Generator(frames.device).manual_seed(seed)
            given = self.latent(frames)
            noise = torch.randn(len(given), sim.FRAMES, *given.shape[2:], generator=generator, device=given.device)
            latents = torch.cat([self.sample(*part) for part in zip(given.split(16), noise.split(16))])
            parts = latents[:, CONDITION:].flatten(0, 1).split(at_a_time(frames.device))
            painted = torch.cat([(self.vae.decode(x) / 2 + 0.5).clamp(0, 1) for x in parts])
            return torch.cat([frames, painted.unflatten(0, (len(frames), -1))], 1)
        return predict

    def save(self, folder) -> None:
        save_folder(folder, {"dit": described(self.config), "vae": self.vae.config}, self, "model.safetensors")

    @classmethod
    def load(cls, folder) -> "DiT":
        """A folder written by `save`. Raises train.Problem for what is missing, damaged or does not fit."""
        return load_model(folder, "DiT", lambda config: cls(DiTConfig(**config["dit"]), VAE(config["vae"])))


def train_dit(config: DiTConfig, vae: VAE, world: train.World) -> DiT:
    """Trains the denoiser on whole clips and saves it in <out>/dit."""
    folder = train.writable(Path(config.out, "dit"))
    train.made_of(folder, vae=folder.parent / "vae" / VAE_WEIGHTS)
    torch.manual_seed(config.seed)
    dit = DiT(config, vae).to(world.device)
    data = Frames(config, world.device)
    clips, B, parts = len(data) // sim.FRAMES, config.batch, world.parts(config.batch, config.micro)
    shape = sim.FRAMES, dit.channels, config.size // vae.shrink, config.size // vae.shrink
    world.say(f"DiT: {sum(p.numel() for p in dit.parameters() if p.requires_grad) / 1e6:.2f}M parameters, {config.steps} steps of "
              f"{B} clips of {len(dit.cos)} vectors, {clips} clips")
    world.compile(*dit.blocks)
    model = train.distribute(dit, world)

    with train.Run(folder, dit, config, world, show=("loss",)) as run:
        for step in run:
            model.train()
            t = torch.randint(config.levels, (B,), generator=train.generator(config.seed, step))
            noise = torch.stack([torch.randn(shape, generator=train.generator(config.seed, step, i))      # of one's own clips only
                                 for i in world.share(torch.arange(B)).tolist()])
            rows = world.share(train.rows(config.seed, step, B, clips))
            batch, total = (rows, world.share(t).to(world.device), noise.to(world.device)), 0.0
            for clip, t, noise in run.accumulate(zip(*(x.tensor_split(parts) for x in batch)), model):
                frames = data[(clip[:, None] * sim.FRAMES + torch.arange(sim.FRAMES)).flatten()]
                with world.autocast():
                    latent = dit.latent(frames.unflatten(0, (len(clip), sim.FRAMES))).float()
                    loss = model(latent, t, noise).sum() / B
                (loss * world.size).backward()              # DDP averages over ranks: this makes it the sum
                total += loss.detach()
            run.step(total)
    if world.is_main:
        path = folder.parent / "results.json"
        reward.drop_rows(path, *(row for row in reward.read(path) if row.startswith("DiT")))
    train.finish(folder, dit.save, config, dit, world)
    return dit.eval().requires_grad_(False)


def dit_main(argv: list[str] | None) -> None:
    config = c = train.parse(DiTConfig, DIT_PRESETS, argv)
    names = train.scenarios(c.scenario)
    train.need(c.width % (2 * c.heads) == 0 and c.width // c.heads >= 6,
               f"--width {c.width} must divide by twice --heads {c.heads}, into at least 6 a head")
    train.need(1 < c.levels >= c.calls, f"--levels {c.levels}: at least 2, and at least the {c.calls} of --calls")
    world = train.start(c.seed)
    out = train.writable(Path(c.out))
    preset = c.preset if c.preset in VQGAN_PRESETS else "paper --vae DIR"
    train.need((out / "vae" / VAE_WEIGHTS).exists(),
               f"{out / 'vae'} is missing: make it with `python ddt.py --preset {preset} --out {out}`")
    note = out / "vae" / "trained.json"                     # of one that ddt.py has trained
    made = json.loads(note.read_text()) if note.exists() else {"size": c.size, "scenario": "all"}
    train.need(made["size"] == c.size and set(names) <= set(train.scenarios(made["scenario"])),
               f"{out / 'vae'} was trained on {made['scenario']}, {made['size']} pixels; this asks for {c.scenario}, {c.size}: "
               "choose another --out")
    train.occupy(out, world)
    if c.fresh:
        train.discard(out / "dit")
    if train.is_trained(out / "dit", "model.safetensors", c, world):
        train.check_made_of(out / "dit", vae=out / "vae" / VAE_WEIGHTS)
        dit = DiT.load(out / "dit").to(world.device)
        dit.config.calls = c.calls
    else:
        dit = train_dit(config, VAE.load(out / "vae").to(world.device), world)
    if world.is_main:
        reward.add_row(out / "results.json", f"DiT, {c.calls} calls", dit.predictor(), names, sim.SHOWN, c.eval_clips, size=c.size,
                       device=world.device)
        print(reward.table(out / "results.json"))
    train.wait(world)


def main(argv: list[str] | None = None) -> None:
    which, *flags = (sys.argv[1:] if argv is None else argv) or [""]
    train.need(which in ("vqgan", "dit"), "say which one: python baselines.py vqgan|dit [--FIELD VALUE ...]")
    (vqgan_main if which == "vqgan" else dit_main)(flags)


if __name__ == "__main__":
    train.cli(main)
