"""
Stage 1, VAE: a convolutional variational autoencoder, trained on single frames.

    frame (3, H, W) -> encoder -> mean, log variance -> latent (C, h, w) -> decoder -> frame

The architecture is diffusers' AutoencoderKL, parameter names and config.json included: the VAE
folders of Stable Diffusion 1 and 3 load as they are. Source of the method: Rombach et al. 2022,
https://arxiv.org/abs/2112.10752. Phys-AR uses a frozen pre-trained VAE (section 3.2, appendix A.1).

Differences from the paper
1. This file trains a small VAE, from nothing. A pre-trained one is used with `ddt.py --vae DIR`.
2. The loss is squared error + KL: a disc on white needs no perceptual or adversarial loss.
3. It is also trained on the sizes and speeds of `ood` (in other clips than those of the
   evaluation), since a VAE pre-trained on all kinds of pictures knows them: docs/RESULTS.md.

    python vae.py                       # trains <out>/vae; any field of Config is a flag
    python vae.py --preset small --help

Expected at `tiny` on 2 CPU cores: 1 to 3 minutes; squared error 0.001.

Axes: B batch, C channels, H W pixels, h w cells of the latent.
"""
import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)    # Ctrl-C during the imports: no traceback

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as nnf
from einops import rearrange
from torch import Tensor, nn

import checkpoint
import evaluate
import sim
import train
from checkpoint import UserError, check

# ------------------------------------------------------------------ config


@dataclass
class Config:
    # run
    preset: str = "tiny"        # named set of defaults: tiny or small
    out: str = ""               # run folder (empty: runs/<preset>)
    seed: int = 0               # seed of weights, data order and noise
    fresh: bool = False         # train this stage's model again; the old one stays until the end
    save_every: int = 200       # steps between two checkpoints
    # data
    scenario: str = "uniform"   # motion: uniform, parabola, collision, or all three
    clips: int = 6000           # training clips (of 32 frames) per motion, as many again of `ood`
    size: int = 32              # pixels per side of a frame
    # model
    width: int = 16             # channels of the first level; the others have twice as many
    levels: int = 3             # resolutions, each half the one before: 3 make a latent of size / 4
    latent: int = 4             # channels of the latent
    # optimization
    steps: int = 400            # optimizer steps
    batch: int = 64             # frames per step, over all ranks
    micro_batch: int = 0        # frames per backward pass and rank; 0: the whole shard at once
    lr: float = 2e-3            # peak learning rate
    warmup: int = 66            # steps of linear warm-up, before a cosine to zero
    beta1: float = 0.9          # AdamW: decay of the mean of gradients
    beta2: float = 0.99         # AdamW: decay of the mean of their squares
    eps: float = 1e-8           # AdamW: added to the root of the mean square
    weight_decay: float = 0.0   # AdamW: on matrices only
    max_grad_norm: float = 1.0  # gradient clipping; 0: none
    # evaluation
    eval_clips: int = 32        # clips per split of the reconstruction table


# `small`, for one GPU of 80 GB: 0.63 TFLOP per step, which took 63 ms on an H200: 450 steps take
# 28 s.
PRESETS = {
    "tiny": {},
    "small": dict(scenario="all", clips=20000, size=128, width=16, levels=4, latent=8, steps=450,
                  batch=128, warmup=75, save_every=450),
}
EXPECTED = {"tiny": "1 to 3 minutes on 2 CPU cores.",
            "small": "Half a minute on one H200."}
KL_WEIGHT = 1e-6                # of the KL (a sum per frame) beside the squared error (a mean)

# ------------------------------------------------------------------ model


class ResnetBlock(nn.Module):
    def __init__(self, c_in: int, c_out: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps=1e-6)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, c_out, eps=1e-6)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:                 # (B, c_in, H, W)
        h = self.conv1(nnf.silu(self.norm1(x)))
        h = self.conv2(nnf.silu(self.norm2(h)))
        return self.conv_shortcut(x) + h                    # (B, c_out, H, W)


class AttentionBlock(nn.Module):
    """Self-attention among all cells of the smallest resolution, with one head."""

    def __init__(self, c: int, groups: int):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, c, eps=1e-6)
        self.to_q = nn.Linear(c, c)
        self.to_k = nn.Linear(c, c)
        self.to_v = nn.Linear(c, c)
        self.to_out = nn.ModuleList([nn.Linear(c, c)])

    def forward(self, x: Tensor) -> Tensor:                 # (B, C, H, W)
        h = rearrange(self.group_norm(x), "b c h w -> b 1 (h w) c")
        h = nnf.scaled_dot_product_attention(self.to_q(h), self.to_k(h), self.to_v(h))
        h = self.to_out[0](h)
        return x + rearrange(h, "b 1 (h w) c -> b c h w", h=x.shape[2])     # (B, C, H, W)


class Downsample(nn.Module):
    def __init__(self, c: int):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:                 # (B, C, H, W)
        x = nnf.pad(x, (0, 1, 0, 1))                        # right and bottom only
        return self.conv(x)                                 # (B, C, H / 2, W / 2)


class Upsample(nn.Module):
    def __init__(self, c: int):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:                 # (B, C, H, W)
        x = nnf.interpolate(x, scale_factor=2.0)            # nearest neighbour
        return self.conv(x)                                 # (B, C, 2 H, 2 W)


class DownBlock(nn.Module):
    """Residual blocks at one level, then half the resolution, except after the last level."""

    def __init__(self, c_in: int, c_out: int, blocks: int, groups: int, last: bool):
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock(c_in if i == 0 else c_out, c_out, groups) for i in range(blocks))
        self.downsamplers = nn.ModuleList([] if last else [Downsample(c_out)])

    def forward(self, x: Tensor) -> Tensor:
        for block in [*self.resnets, *self.downsamplers]:
            x = block(x)
        return x


class UpBlock(nn.Module):
    """Residual blocks at one level, then twice the resolution, except after the last level."""

    def __init__(self, c_in: int, c_out: int, blocks: int, groups: int, last: bool):
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock(c_in if i == 0 else c_out, c_out, groups) for i in range(blocks))
        self.upsamplers = nn.ModuleList([] if last else [Upsample(c_out)])

    def forward(self, x: Tensor) -> Tensor:
        for block in [*self.resnets, *self.upsamplers]:
            x = block(x)
        return x


class MidBlock(nn.Module):
    def __init__(self, c: int, groups: int):
        super().__init__()
        self.resnets = nn.ModuleList([ResnetBlock(c, c, groups), ResnetBlock(c, c, groups)])
        self.attentions = nn.ModuleList([AttentionBlock(c, groups)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.resnets[0](x)
        x = self.attentions[0](x)
        return self.resnets[1](x)


class Encoder(nn.Module):
    """Images (B, 3, H, W) -> (B, out, h, w). channels: per level, the largest resolution first."""

    def __init__(self, channels: list[int], blocks: int, out: int, groups: int):
        super().__init__()
        self.conv_in = nn.Conv2d(3, channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        for i, (c_in, c_out) in enumerate(zip([channels[0], *channels], channels)):
            last = i == len(channels) - 1
            self.down_blocks.append(DownBlock(c_in, c_out, blocks, groups, last))
        self.mid_block = MidBlock(channels[-1], groups)
        self.conv_norm_out = nn.GroupNorm(groups, channels[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(channels[-1], out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:                 # (B, 3, H, W)
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        x = self.mid_block(x)
        return self.conv_out(nnf.silu(self.conv_norm_out(x)))       # (B, out, h, w)


class Decoder(nn.Module):
    """Latents (B, C, h, w) -> images (B, 3, H, W). channels: in the encoder's order."""

    def __init__(self, channels: list[int], blocks: int, latent: int, groups: int):
        super().__init__()
        channels = channels[::-1]
        self.conv_in = nn.Conv2d(latent, channels[0], 3, padding=1)
        self.mid_block = MidBlock(channels[0], groups)
        self.up_blocks = nn.ModuleList()
        for i, (c_in, c_out) in enumerate(zip([channels[0], *channels], channels)):
            last = i == len(channels) - 1
            self.up_blocks.append(UpBlock(c_in, c_out, blocks + 1, groups, last))
        self.conv_norm_out = nn.GroupNorm(groups, channels[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(channels[-1], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:                 # (B, C, h, w)
        x = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(nnf.silu(self.conv_norm_out(x)))       # (B, 3, H, W)


class VAE(nn.Module):
    """
    diffusers' AutoencoderKL. Other stages use `encode` and `decode`: a latent is the posterior's
    mean, shifted and scaled to about zero mean and unit variance. `forward` is for training.
    """

    def __init__(self, block_out_channels: list[int], latent_channels: int,
                 layers_per_block: int = 1, norm_num_groups: int = 32, use_quant_conv: bool = True,
                 use_post_quant_conv: bool = True, scaling_factor: float = 1.0,
                 shift_factor: float | None = 0.0, **others):
        """The fields of diffusers' config.json. `others`, not used here, are kept for `save`."""
        super().__init__()
        self.config = {
            "block_out_channels": block_out_channels, "latent_channels": latent_channels,
            "layers_per_block": layers_per_block, "norm_num_groups": norm_num_groups,
            "use_quant_conv": use_quant_conv, "use_post_quant_conv": use_post_quant_conv,
            "scaling_factor": scaling_factor, "shift_factor": shift_factor} | others
        channels, C, groups = list(block_out_channels), latent_channels, norm_num_groups
        self.encoder = Encoder(channels, layers_per_block, 2 * C, groups)
        self.decoder = Decoder(channels, layers_per_block, C, groups)
        if use_quant_conv:
            self.quant_conv = nn.Conv2d(2 * C, 2 * C, 1)
        if use_post_quant_conv:
            self.post_quant_conv = nn.Conv2d(C, C, 1)
        self.to(memory_format=torch.channels_last)          # 1.6 times faster on the CPU

    @property
    def shrink(self) -> int:
        """Pixels per side of a latent cell."""
        return 2 ** (len(self.config["block_out_channels"]) - 1)

    @property
    def shift_and_scale(self) -> tuple[float, float]:
        return self.config["shift_factor"] or 0, self.config["scaling_factor"]

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images (B, 3, H, W) in [-1, 1] -> the posterior's mean, log variance (B, C, h, w)."""
        h = self.encoder(images)
        if self.config["use_quant_conv"]:
            h = self.quant_conv(h)
        mean, logvar = h.chunk(2, 1)
        return mean, logvar.clamp(-30, 20)

    def reconstruct(self, z: Tensor) -> Tensor:
        """z (B, C, h, w), as `moments` gives it -> images (B, 3, H, W) in about [-1, 1]."""
        if self.config["use_post_quant_conv"]:
            z = self.post_quant_conv(z)
        return self.decoder(z)

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """images (B, 3, H, W), noise (B, C, h, w) -> reconstructed images, mean, log variance."""
        mean, logvar = self.moments(images)
        z = mean + (logvar / 2).exp() * noise               # a sample of the posterior
        return self.reconstruct(z), mean, logvar

    def encode(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) in [-1, 1] -> latents (B, C, h, w), shifted and scaled."""
        shift, scale = self.shift_and_scale
        mean, _ = self.moments(images)
        return (mean - shift) * scale

    def decode(self, latents: Tensor) -> Tensor:
        """The inverse: latents (B, C, h, w) -> images (B, 3, H, W) in about [-1, 1]."""
        shift, scale = self.shift_and_scale
        return self.reconstruct(latents / scale + shift)

    def save(self, folder) -> None:
        save_folder(folder, self.config, self, WEIGHTS)

    @classmethod
    def load(cls, folder) -> "VAE":
        """
        The VAE of a folder in diffusers' layout, in fp32 whatever the type of its tensors. Raises
        UserError for what is missing, damaged, not finite or does not fit.
        """
        return load_vae(folder)


# ------------------------------------------------------------------ folders in diffusers' layout

WEIGHTS = "diffusion_pytorch_model.safetensors"
# names of the attention's tensors in files from before 2023 -> those of today
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
# fields of config.json, with the values that are followed here; a missing one has the first
SUPPORTED = {"_class_name": ["AutoencoderKL"], "act_fn": ["silu", "swish"],     # two names of one
             "in_channels": [3], "out_channels": [3], "mid_block_add_attention": [True],
             "use_quant_conv": [True, False], "use_post_quant_conv": [True, False],
             "latents_mean": [None], "latents_std": [None]}
LEVELS = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}
NUMBERS = {"block_out_channels", "latent_channels", "layers_per_block", "norm_num_groups",
           "scaling_factor", "shift_factor"}
NEUTRAL = {"sample_size", "force_upcast"}   # of tiles and of half precision, not used here


def weights_of(out: str) -> Path:
    """The VAE's weights in the run folder `out`: what later stages were trained from."""
    return Path(out, "vae", WEIGHTS)


def weights_in(folder: Path) -> str:
    """The name of the weights: another precision's (.fp16.safetensors) where it is the only one."""
    found = sorted(path.name for path in folder.glob("diffusion_pytorch_model*"))
    names = [name for name in found if name.endswith(".safetensors") and "-of-" not in name]
    if WEIGHTS in names or not found:
        return WEIGHTS
    variant = ', variant="fp16"' if ".fp16." in found[0] else ""
    check(names, f"{folder} holds {found[0]}, but only {WEIGHTS} can be read. Make it with "
          f"diffusers: AutoencoderKL.from_pretrained(DIR{variant}).save_pretrained(DIR)")
    check(len(names) == 1, f"{folder} holds {' and '.join(names)}: copy the one to use to "
          f"{WEIGHTS}")
    return names[0]


def load_vae(folder) -> VAE:
    folder = Path(folder)
    if not (folder / "config.json").exists() and (folder / "vae" / "config.json").exists():
        folder = folder / "vae"             # a whole pipeline, or a run folder
    weights = weights_in(folder)
    config, tensors = load_folder(folder, weights)
    path = f"{folder}/config.json"
    for key, value in config.items():
        known = key in LEVELS or key in NUMBERS or key in NEUTRAL or key[0:1] == "_"
        check(known or key in SUPPORTED, f"{path}: {key} = {value!r} is not a known field of an "
              "AutoencoderKL: remove it if it changes no number")
        values = SUPPORTED.get(key, [value])
        check(any(value is v or value == v for v in values), f"{path}: {key} is {value!r}; only "
              f"an AutoencoderKL with {' or '.join(map(str, values))} can be read")
    channels = config.setdefault("block_out_channels", [64])            # diffusers' defaults
    config.setdefault("latent_channels", 4)
    for key, supported in LEVELS.items():
        value = config.get(key, [supported] * len(channels) if isinstance(channels, list) else [])
        check(isinstance(channels, list) and value == [supported] * len(channels), f"{path}: {key} "
              f"is {value} and block_out_channels {channels}; each level must be a {supported}")
    scale = config.setdefault("scaling_factor", 0.18215)    # SD1's, which its first files leave out
    shift = config.get("shift_factor") or 0
    numbers = isinstance(scale, (int, float)) and isinstance(shift, (int, float))
    check(numbers and 0 < scale < math.inf and math.isfinite(shift), f"{path}: scaling_factor "
          f"{scale!r} and shift_factor {shift!r} must be numbers, the first of them above 0")
    for name, x in tensors.items():
        check(x.is_floating_point(), f"{folder} holds {name} as {x.dtype}: quantized weights "
              "cannot be read")
    try:
        vae = VAE(**config)
    except (LookupError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise UserError(f"{path} is not that of an AutoencoderKL ({error})") from None
    for old, new in OLD_NAMES.items():
        tensors = {name.replace(f"attentions.0.{old}.", f"attentions.0.{new}."): x
                   for name, x in tensors.items()}
    checkpoint.load_state(vae, tensors, folder / f"{weights} (described by config.json)")
    return vae.eval().requires_grad_(False)


def save_folder(folder, config: dict, model: nn.Module, weights: str) -> None:
    """Writes config.json and then the weights: where weights are, nothing is missing."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    text = json.dumps(config, indent=2) + "\n"
    with checkpoint.replacing(Path(folder, "config.json")) as part:
        part.write_text(text, encoding="utf-8")
    metadata = {"format": "pt", "config": json.dumps(config)}
    checkpoint.write_safetensors(Path(folder, weights), model.state_dict(), metadata)


def load_folder(folder, weights: str) -> tuple[dict, dict[str, Tensor]]:
    """What `save_folder` wrote -> config, tensors. UserError for what is missing or damaged."""
    checkpoint.check_files(Path(folder))
    path = Path(folder, "config.json")
    check(path.exists(), f"cannot read {path} (no such file): is {folder} the right folder?")
    config = checkpoint.read_json(path, f"is {folder} the right folder?")
    return config, checkpoint.read_safetensors(Path(folder, weights))


# ------------------------------------------------------------------ frames


class Frames:
    """
    The data of vae.py and ddt.py: all frames of config.clips clips per motion and split, rendered
    when asked for. Index i is frame i % 32 of clip i // 32. The positions are of the closed form,
    which needs no simulation and differs from it by at most 0.006 world units.
    """

    def __init__(self, config, device, splits: tuple[str, ...] = ("pretrain",)):
        self.size, self.device, self.n = config.size, device, config.clips
        self.clips = [sim.first_frames(scenario, split, self.n, config.seed)
                      for scenario in train.scenarios(config.scenario) for split in splits]

    def __len__(self) -> int:
        return len(self.clips) * self.n * sim.FRAMES

    def __getitem__(self, index: Tensor) -> Tensor:         # (B,) -> (B, 3, H, W) in [0, 1]
        images = torch.empty(len(index), 3, self.size, self.size, device=self.device)
        clip, frame = index // sim.FRAMES, index % sim.FRAMES
        for i, clips in enumerate(self.clips):              # of one motion and split
            rows = (clip // self.n == i).nonzero()[:, 0]
            if len(rows):
                chosen = clips[clip[rows] % self.n].to(self.device)
                positions = sim.closed_form(chosen)         # (b, 32, N, 2)
                position = positions[torch.arange(len(rows)), frame[rows]]      # (b, N, 2)
                rendered = sim.render(position[:, None], chosen.radius, self.size)
                images[rows] = rendered[:, 0]
        return images


def frames_per_call(device) -> int:
    """
    Frames per call where thousands are encoded or decoded: on the CPU as many as its cache holds
    (1.5 times faster than 256). On a GPU so many that the kernels take longer than the CPU needs to
    launch them; at 128 pixels they fill 6 GiB in `small`'s VAE, 25 GiB in SD3's.
    """
    return 32 if torch.device(device).type == "cpu" else 512


# ------------------------------------------------------------------ training


def small_vae(config: Config) -> VAE:
    """The untrained VAE that a config describes."""
    channels = [config.width] + [2 * config.width] * (config.levels - 1)
    for_diffusers = dict(                                   # not used here
        _class_name="AutoencoderKL", in_channels=3, out_channels=3, act_fn="silu",
        sample_size=config.size, down_block_types=["DownEncoderBlock2D"] * config.levels,
        up_block_types=["UpDecoderBlock2D"] * config.levels)
    return VAE(channels, config.latent, layers_per_block=1, norm_num_groups=8,
               use_quant_conv=False, use_post_quant_conv=False, **for_diffusers)


def train_vae(config: Config, world: train.World) -> VAE:
    """Trains a small VAE on single frames and saves it in <out>/vae."""
    folder = Path(config.out, "vae")
    checkpoint.start_stage(folder, config, world)
    torch.manual_seed(config.seed)
    vae = small_vae(config).to(world.device)
    B, data = config.batch, Frames(config, world.device, ("pretrain", "ood"))
    world.print0(f"VAE: {millions(vae)} parameters, {config.steps} steps of {B} frames")
    model = train.distribute(vae, world)
    noise_shape = (B, config.latent, config.size // vae.shrink, config.size // vae.shrink)
    n = world.accumulation_steps(B, config.micro_batch)

    with train.Run(folder, vae, config, world, show=("mse",)) as run:
        for step in run:
            index = world.shard(train.batch_indices(config.seed, step, B, len(data)))     # (b,)
            images = 2 * data[index] - 1                                # (b, 3, H, W) in [-1, 1]
            generator = train.generator(config.seed, step, device=world.device)
            noise = torch.randn(noise_shape, generator=generator, device=world.device)
            noise = world.shard(noise)                                  # (b, C, h, w)

            total, total_mse, total_kl = 0.0, 0.0, 0.0
            micro_batches = zip(images.tensor_split(n), noise.tensor_split(n))
            for x, eps in run.accumulate(micro_batches, model):
                with world.autocast():
                    reconstructed, mean, logvar = model(x, eps)
                    mse = (reconstructed - x).square().mean((1, 2, 3))                    # (b,)
                    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum((1, 2, 3)) # (b,)
                loss = (mse + KL_WEIGHT * kl).sum() / B
                (loss * world.size).backward()              # times ranks: a sum, not DDP's average
                total += loss.detach()
                total_mse += mse.detach().sum()
                total_kl += kl.detach().sum()
            # clip the gradient norm, AdamW, zero_grad; and the log
            run.step(total, mse=world.all_reduce(total_mse) / B, kl=world.all_reduce(total_kl) / B)

    # latents of zero mean and unit variance, because the flow of ddt.py mixes them with unit noise
    with torch.no_grad():
        frames = data[train.batch_indices(config.seed, 0, 512, len(data))]
        mean, _ = vae.moments(2 * frames - 1)
    vae.config |= {"shift_factor": mean.mean().item(), "scaling_factor": 1 / mean.std().item()}
    checkpoint.finish(folder, vae.save, config, vae, world)
    return vae.eval().requires_grad_(False)


def millions(model: nn.Module) -> str:
    """The number of parameters, as text."""
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M"


# ------------------------------------------------------------------ the stage


def reconstruction(vae: VAE) -> evaluate.Predictor:
    """A predictor for evaluate.py: frames (B, F, 3, H, W) in [0, 1] -> encoded and decoded."""
    @torch.no_grad()
    def predict(frames: Tensor) -> Tensor:
        sim.check_frames(frames)
        decoded = []
        for x in frames.flatten(0, 1).split(frames_per_call(frames.device)):
            images = vae.decode(vae.encode(2 * x - 1))
            decoded.append((images / 2 + 0.5).clamp(0, 1))
        return torch.cat(decoded).view_as(frames)
    return predict


def report(config, vae: VAE, world: train.World) -> Path:
    """
    Two rows of the result table, measured once: the true frames, which show the error of the
    measurement itself, and their reconstructions.
    """
    predictors = {"ground truth": lambda frames: frames, "VAE": reconstruction(vae)}
    return evaluate.add_rows(config, predictors, ("vae",), config.size, world, shown=sim.FRAMES)


def ensure(config, world: train.World) -> VAE:
    """
    The VAE for a later stage with `config`: that of the folder --vae, or else of <out>/vae, trained
    first if it is missing. UserError if it was trained on frames of another size or motion.
    """
    folder = Path(config.out, "vae")
    if getattr(config, "vae", ""):
        return adopt(folder, config.vae, world)
    if not checkpoint.has_model(folder):
        check(config.preset in PRESETS, f"{folder} is missing, and --preset {config.preset} needs "
              "a pre-trained VAE: name the folder of one, such as `vae` of stable-diffusion-3-"
              f"medium-diffusers (python ddt.py --preset paper --out {config.out} --vae DIR)")
        own = train.stage_config("vae", Config, PRESETS, config, size=config.size,
                                 clips=config.clips)
        multiple = 2 ** (own.levels - 1) * config.patch     # refused before, not after, training
        check(config.size % multiple == 0, f"--size {config.size}: must be a multiple of "
              f"{multiple}, by which the VAE and patches of {config.patch} divide it")
        world.print0(f"{folder} is missing: training it first. {EXPECTED[config.preset]}")
        return run_stage(own, world)
    trained = checkpoint.read_json(folder / "trained.json", checkpoint.remedy(folder),
                                   ("size", "scenario"))
    if trained:
        size, known = trained["size"], trained["scenario"]
        unknown = set(train.scenarios(config.scenario)) - set(train.scenarios(known))
        check(size == config.size and not unknown, f"{folder} was trained on {known}, {size} "
              f"pixels; this asks for {config.scenario}, {config.size} pixels: choose another "
              "--out, or train it again with `python vae.py --fresh`")
    return VAE.load(folder).to(world.device)


def adopt(folder: Path, source: str, world: train.World) -> VAE:
    """The VAE of the folder `source`, copied to `folder`: a run folder holds all that it uses."""
    vae = VAE.load(source)
    exists = (folder / WEIGHTS).exists()
    if exists:
        own = VAE.load(folder)
        ours, theirs = own.state_dict(), vae.state_dict()
        same = [*ours] == [*theirs] and all(torch.equal(ours[k], x) for k, x in theirs.items()) \
            and own.shift_and_scale == vae.shift_and_scale
        check(same, f"{folder} holds another VAE than --vae {source}: choose another --out, or "
              "delete that folder")
    world.barrier()                     # every rank has looked before rank 0 writes
    if world.is_main and not exists:
        vae.save(folder)
    world.barrier()
    return vae.to(world.device)


def run_stage(config: Config, world: train.World) -> VAE:
    """Loads the VAE that `config` describes, or trains it."""
    check_config(config)
    folder = Path(config.out, "vae")
    if checkpoint.is_trained(folder, config, world):
        return VAE.load(folder).to(world.device)
    return train_vae(config, world)


def check_ranges(config, **ranges: tuple[float, float]) -> None:
    """UserError for a field outside its range, which includes both ends."""
    for name, (least, most) in ranges.items():
        value = getattr(config, name)
        check(least <= value <= most, f"--{name} {value}: must be from {least} to {most}")


def check_data(config) -> None:
    """UserError for clips, of training or evaluation, that cannot be. For every stage's config."""
    train.scenarios(config.scenario)
    check(config.seed != evaluate.EVAL_SEED, f"--seed {config.seed}: that of the held-out clips "
          "of all tables, which no training may see; choose another")
    check(config.eval_clips > 1, f"--eval_clips {config.eval_clips}: a standard error needs at "
          "least 2 clips")
    check_ranges(config, clips=(1, sim.MOST_CLIPS), eval_clips=(2, 100_000))


def check_config(config: Config) -> None:
    """UserError for flags that cannot work."""
    check_data(config)
    check_ranges(config, size=sim.SIZES, width=(8, 4096), levels=(1, 10), latent=(1, 256),
                 batch=(1, 65536))
    shrink = 2 ** (config.levels - 1)
    check(config.size % shrink == 0, f"--size {config.size}: must be a multiple of {shrink}, by "
          f"which --levels {config.levels} shrink it")
    check(config.width % 8 == 0, f"--width {config.width}: must be a multiple of 8 (its norms have "
          "8 groups)")


def main(argv: list[str] | None = None) -> None:
    config = train.parse(Config, PRESETS, argv)
    check_config(config)
    world = train.start(config.seed, config.out)
    results = report(config, run_stage(config, world), world)
    if world.is_main:
        print(evaluate.table(results))


if __name__ == "__main__":
    train.cli(main)
