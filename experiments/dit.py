"""
DiT, what the paper compares its language model with: a video diffusion model without tokens.

    latents of 32 frames, noisy, + those of the first 3, clean
      -> attention over space and time -> v-prediction -> DDIM -> VAE decoder -> frames

Source: PhyWorld, Kang et al. 2024, https://arxiv.org/abs/2411.02385. Sizes, full space-time
attention, 3D rope, how the first frames are given, v-prediction with zero terminal SNR and the
optimizer are PhyWorld's, as far as they are known: its training code is not public.

Differences, and choices where it is silent
1. One modulation for all blocks and a table for each (PixArt), by the published parameter counts.
2. DDPM's linear noise levels, rescaled. 25 DDIM steps.
3. The loss is of the predicted frames.
4. q and k are RMS-normalised.
5. No horizontal flips: uniform balls only move to the right.

    python -m experiments.dit                               # trains <out>/dit, on the VAE of <out>
    python -m experiments.dit --preset B --out runs/paper   # PhyWorld's DiT-B; S and L likewise

Axes: B batch, F frames, C latent channels, h w latent cells, L vectors of a clip, D width.
"""
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import torch
import torch.nn.functional as nnf
from einops import rearrange
from torch import Tensor, nn

import checkpoint
import ddt
import evaluate
import sim
import train
import vae as vae_stage
from checkpoint import UserError, check
from ddt import described, load_model, modulate, sincos
from lm import rotate
from sim import CONDITION, FRAMES
from vae import VAE, Frames, check_data, check_ranges, frames_per_call, save_folder


@dataclass
class Config:
    # run
    preset: str = "tiny"        # named set of defaults: tiny, small, or PhyWorld's S, B, L
    out: str = ""               # run folder (empty: runs/<preset>)
    seed: int = 0               # seed of weights, data order and noise
    fresh: bool = False         # train this stage's model again; the old one stays until the end
    save_every: int = 100       # steps between two checkpoints
    compile: int = 1            # compile the blocks on a GPU; 0: no, which starts sooner
    # data
    scenario: str = "uniform"   # motion: uniform, parabola, collision, or all three
    clips: int = 6000           # training clips per motion
    size: int = 32              # pixels per side of a frame
    # model
    patch: int = 2              # cells of the latent per side of a patch
    width: int = 96             # width of the transformer
    layers: int = 7             # transformer blocks
    heads: int = 4              # attention heads
    # diffusion
    levels: int = 1000          # noise levels
    calls: int = 25             # calls of the model to sample a clip (DDIM steps)
    # optimization
    steps: int = 1275           # optimizer steps: 46 TFLOP (prior.py and sft.py: 25 and 27)
    batch: int = 8              # clips per step, over all ranks
    micro_batch: int = 0        # clips per backward pass and rank; 0: the whole shard at once
    lr: float = 1e-3            # peak learning rate
    warmup: int = 100           # steps of linear warm-up, before a cosine to zero
    beta1: float = 0.9          # AdamW: decay of the mean of gradients
    beta2: float = 0.999        # AdamW: decay of the mean of their squares
    eps: float = 1e-8           # AdamW: added to the root of the mean square
    weight_decay: float = 0.01  # AdamW: on matrices only
    max_grad_norm: float = 1.0  # gradient clipping; 0: none
    # evaluation
    eval_clips: int = 256       # clips per split of the result table


# `tiny`, `small`: as many parameters as sft.py's language models. S, B, L: PhyWorld's.
PRESETS = {
    "tiny": {},
    "small": dict(scenario="all", clips=20000, size=128, width=768, layers=11, heads=12, steps=3000,
                  batch=64, lr=2e-4, warmup=300),
}
for name, width, layers, heads in (("S", 384, 12, 6), ("B", 768, 12, 12), ("L", 1024, 24, 16)):
    PRESETS[name] = dict(scenario="all", clips=3_000_000, size=128, width=width, layers=layers,
                         heads=heads, steps=100_000, batch=256, lr=1e-4, warmup=1000,
                         max_grad_norm=0.0, eval_clips=1000)

# ------------------------------------------------------------------ model


def zero_terminal_snr(levels: int) -> tuple[Tensor, Tensor]:
    """
    DDPM's noise levels, rescaled to leave nothing of the clip at the last one -> alpha, sigma
    (levels,). Lin et al. 2023, https://arxiv.org/abs/2305.08891.
    """
    beta = torch.linspace(1e-4, 0.02, levels, dtype=torch.float64)
    alpha = (1 - beta).cumprod(0).sqrt()
    alpha = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
    return alpha.float(), (1 - alpha ** 2).sqrt().float()


def rope_3d(frames: int, side: int, d: int) -> tuple[Tensor, Tensor]:
    """
    cos, sin (F side side, d) for lm.rotate: a third of the channel pairs turns with the frame, a
    third with the row, a third with the column.
    """
    pairs = d // 2
    counts = (pairs - 2 * (pairs // 3), pairs // 3, pairs // 3)                 # frame, row, column
    axes = torch.arange(frames), torch.arange(side), torch.arange(side)
    place = torch.cartesian_prod(*axes).float()                                 # (L, 3)
    angle = [x[:, None] * 10000 ** (-torch.arange(n) / n) for x, n in zip(place.T, counts)]
    angle = torch.cat(angle, 1).repeat(1, 2)                                    # (L, d)
    return angle.cos(), angle.sin()


class Block(nn.Module):
    """
    Attention and MLP, shifted, scaled and gated by the sum of one modulation that all blocks share
    and a table of the block's own.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"),
                                 nn.Linear(4 * width, width))
        self.table = nn.Parameter(torch.randn(6, width) / width ** 0.5)

    def forward(self, x: Tensor, modulation: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x (B, L, D), modulation (B, 6, D), cos and sin (L, d) -> (B, L, D)."""
        modulation = (self.table + modulation)[:, :, None]                      # (B, 6, 1, D)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.unbind(1)     # (B, 1, D) each

        # attention
        h = self.qkv(modulate(self.norm1(x), shift1, scale1))
        axes = "b l (three heads d) -> three b heads l d"
        q, k, v = rearrange(h, axes, three=3, heads=self.heads)
        q = rotate(nnf.rms_norm(q, q.shape[-1:]), cos, sin).to(v.dtype)
        k = rotate(nnf.rms_norm(k, k.shape[-1:]), cos, sin).to(v.dtype)
        h = nnf.scaled_dot_product_attention(q, k, v)                           # (B, heads, L, d)
        x = x + gate1 * self.out(rearrange(h, "b heads l d -> b l (heads d)"))

        # MLP
        return x + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2))


class DiT(nn.Module):
    """A clip's latents, noisy, beside its first three frames, clean -> the velocity v."""
    block = staticmethod(Block.forward)         # compiled in training

    def __init__(self, config: Config, vae: VAE):
        super().__init__()
        self.config, self.vae = config, vae.eval().requires_grad_(False)
        self.channels, self.side = vae.config["latent_channels"], config.size // vae.shrink
        if config.size % (vae.shrink * config.patch):
            multiple = vae.shrink * config.patch
            raise ValueError(f"--size {config.size} must be a multiple of {multiple} (VAE "
                             f"{vae.shrink} x patch {config.patch})")
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
        cos, sin = rope_3d(FRAMES, self.side // p, D // config.heads)
        alpha, sigma = zero_terminal_snr(config.levels)
        for name, table in dict(cos=cos, sin=sin, alpha=alpha, sigma=sigma).items():
            self.register_buffer(name, table, persistent=False)

    def train(self, mode: bool = True):
        super().train(mode)
        self.vae.eval()
        return self

    def velocity(self, x: Tensor, t: Tensor, given: Tensor) -> Tensor:
        """x (B, F, C, h, w) at noise level t (B,), given (B, 3, C, h, w) -> v (B, F, C, h, w)."""
        p = self.config.patch
        condition = torch.zeros_like(x)
        condition[:, :CONDITION] = given
        mask = x.new_zeros(x.shape[1], 1, 1, 1)
        mask[:CONDITION] = 1
        h = torch.cat([x, condition, mask.expand_as(x[:, :, :1])], 2)        # (B, F, 2 C + 1, h, w)
        h = rearrange(h, "b f c (h p) (w q) -> b (f h w) (c p q)", p=p, q=p)
        h = self.patch_in(h)                                                    # (B, L, D)
        time = self.time(sincos(t, 256).to(h.dtype))                            # (B, D)
        modulation = self.modulation(nnf.silu(time)).unflatten(-1, (6, -1))     # (B, 6, D)
        for block in self.blocks:
            h = self.block(block, h, modulation, self.cos, self.sin)
        shift, scale = (self.table + time[:, None])[:, :, None].unbind(1)       # (B, 1, D) each
        h = self.patch_out(modulate(self.norm(h), shift, scale))                # (B, L, C p p)
        return rearrange(h, "b (f h w) (c p q) -> b f c (h p) (w q)", f=x.shape[1],
                         h=x.shape[-2] // p, p=p, q=p)

    def forward(self, latent: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """
        Clean latents x_0 (B, F, C, h, w), noise levels t (B,), noise like x_0 -> squared error of
        v = alpha eps - sigma x_0 in the predicted frames (B,).
        """
        alpha, sigma = (s[t][:, None, None, None, None] for s in (self.alpha, self.sigma))
        v = self.velocity(alpha * latent + sigma * noise, t, latent[:, :CONDITION])
        error = v - (alpha * noise - sigma * latent)
        return error[:, CONDITION:].square().mean((1, 2, 3, 4))

    @torch.no_grad()
    def sample(self, given: Tensor, noise: Tensor) -> Tensor:
        """
        DDIM from noise (B, F, C, h, w) at the last level: given (B, 3, C, h, w) -> (B, F, C, h, w).
        The given frames are as noisy as the others all the way, as in training: no loss teaches the
        model to denoise them.
        """
        last = self.config.levels - 1
        levels = torch.linspace(last, 0, self.config.calls + 1).round().long()[:-1].tolist()
        x = noise.clone()
        for t, t_next in zip(levels, [*levels[1:], None]):
            alpha, sigma = self.alpha[t], self.sigma[t]
            x[:, :CONDITION] = alpha * given + sigma * noise[:, :CONDITION]
            v = self.velocity(x, torch.full((len(x),), t, device=x.device), given)
            clean = alpha * x - sigma * v
            if t_next is not None:
                x = self.alpha[t_next] * clean + self.sigma[t_next] * (sigma * x + alpha * v)
        return torch.cat([given, clean[:, CONDITION:]], 1)

    @torch.no_grad()
    def latent(self, frames: Tensor) -> Tensor:
        """frames (B, F, 3, H, W) in [0, 1] -> latents (B, F, C, h, w)."""
        parts = (2 * frames - 1).flatten(0, 1).split(frames_per_call(frames.device))
        return torch.cat([self.vae.encode(x) for x in parts]).unflatten(0, frames.shape[:2])

    def predictor(self, seed: int = 0) -> Callable[[Tensor], Tensor]:
        """For evaluate.evaluate: frames (B, 3, 3, H, W) -> (B, 32, 3, H, W), one sample each."""
        @torch.no_grad()
        def predict(frames: Tensor) -> Tensor:
            ddt.check_first_frames(frames, self.config.size)
            given = self.latent(frames)                                         # (B, 3, C, h, w)
            shape = (FRAMES, *given.shape[2:])
            noise = torch.stack([torch.randn(shape, generator=generator, device=given.device)
                                 for generator in ddt.clip_generators(frames, seed)])
            pairs = zip(given.split(16), noise.split(16))
            latents = torch.cat([self.sample(*pair) for pair in pairs])         # (B, F, C, h, w)
            parts = latents[:, CONDITION:].flatten(0, 1).split(frames_per_call(frames.device))
            painted = torch.cat([(self.vae.decode(x) / 2 + 0.5).clamp(0, 1) for x in parts])
            return torch.cat([frames, painted.unflatten(0, (len(frames), -1))], 1)
        return predict

    def save(self, folder) -> None:
        config = {"dit": described(self.config), "vae": self.vae.config}
        save_folder(folder, config, self, ddt.MODEL)

    @classmethod
    def load(cls, folder) -> "DiT":
        """A folder written by `save`. Raises UserError for what is missing, damaged or unfit."""
        return load_model(folder, "DiT",
                          lambda config: cls(Config(**config["dit"]), VAE(**config["vae"])))


# ------------------------------------------------------------------ training


def train_dit(config: Config, vae: VAE, world: train.World) -> DiT:
    """Trains the denoiser on whole clips and saves it in <out>/dit."""
    torch.manual_seed(config.seed)
    try:
        dit = DiT(config, vae).to(world.device)
    except ValueError as error:
        raise UserError(str(error)) from None
    folder, weights = Path(config.out, "dit"), vae_stage.weights_of(config.out)
    sources = checkpoint.start_stage(folder, config, world, vae=weights)

    B, data = config.batch, Frames(config, world.device)
    clips, shape = len(data) // FRAMES, (FRAMES, dit.channels, dit.side, dit.side)
    parameters = sum(p.numel() for p in dit.parameters() if p.requires_grad)
    world.print0(f"DiT: {parameters / 1e6:.2f}M parameters, {config.steps} steps of {B} clips of "
                 f"{len(dit.cos)} vectors, {clips} clips")
    dit.block = world.compile(dit.block)
    model = train.distribute(dit, world)
    n = world.accumulation_steps(B, config.micro_batch)

    with train.Run(folder, dit, config, world, sources=sources) as run:
        for step in run:
            model.train()
            index = world.shard(train.batch_indices(config.seed, step, B, clips))       # (b,)
            generator = train.generator(config.seed, step, device=world.device)
            t = torch.randint(config.levels, (B,), generator=generator, device=world.device)
            t = world.shard(t)                                                          # (b,)
            mine = world.shard(torch.arange(B)).tolist()    # noise of this rank's own clips only
            generators = [train.generator(config.seed, step, i, device=world.device) for i in mine]
            noise = torch.stack([torch.randn(shape, generator=generator, device=world.device)
                                 for generator in generators])                     # (b, F, C, h, w)

            total = 0.0
            micro_batches = zip(*(x.tensor_split(n) for x in (index, t, noise)))
            for i, level, eps in run.accumulate(micro_batches, model):
                frames = data[(i[:, None] * FRAMES + torch.arange(FRAMES)).flatten()]
                with world.autocast():
                    latent = dit.latent(frames.unflatten(0, (len(i), FRAMES))).float()
                    loss = model(latent, level, eps).sum() / B
                (loss * world.size).backward()              # times ranks: a sum, not DDP's average
                total += loss.detach()
            run.step(total)

    checkpoint.finish(folder, dit.save, config, dit, world, sources)
    return dit.eval().requires_grad_(False)


def check_config(c: Config) -> None:
    """UserError for flags that cannot work."""
    check_data(c)
    check_ranges(c, size=sim.SIZES, patch=(1, 64), width=(2, 8192), layers=(1, 256),
                 heads=(1, 256), levels=(1, 100_000), batch=(1, 65536))
    check(c.width % (2 * c.heads) == 0 and c.width // c.heads >= 6, f"--width {c.width} must "
          f"divide by twice --heads {c.heads}, into at least 6 per head")
    check(1 < c.levels >= c.calls, f"--levels {c.levels}: at least 2, and at least the {c.calls} "
          "of --calls")


def main(argv: list[str] | None = None) -> None:
    config = c = train.parse(Config, PRESETS, argv)
    check_config(c)
    world = train.start(c.seed, c.out, c.compile)
    out = Path(c.out)
    vae = vae_stage.ensure(config, world)
    if checkpoint.is_trained(out / "dit", c, world):
        checkpoint.check_provenance(out / "dit", vae=vae_stage.weights_of(c.out))
        dit = DiT.load(out / "dit").to(world.device)
        dit.config.calls = c.calls
    else:
        dit = train_dit(config, vae, world)
    predictors = {f"DiT, {c.calls} calls": dit.predictor()}
    results = evaluate.add_rows(c, predictors, ("vae", "dit"), c.size, world)
    if world.is_main:
        print(evaluate.table(results))


if __name__ == "__main__":
    train.cli(main)
