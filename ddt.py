"""
Diffusion timestep tokens (DDT): a frame becomes K discrete tokens, and the tokens become a frame.

Source: Phys-AR section 3.2 and appendix A.1.

    frame -> VAE -> latent -> Q-former: K learned queries read the latent -> unit vectors -> nearest of 256 codes (EMA-VQ)
    codes -> MMDiT: denoises a latent, the tokens as its text -> VAE decoder -> frame

Trained as a rectified flow whose decoder sees a growing prefix of the tokens: x_t = t eps + (1 - t) x_0, and at time t the
first k(t) tokens. Little noise, few tokens; pure noise (t = 1), all of them. So a token has to say what the noise of its
time step destroyed.

Differences from the paper, and choices where it is silent
1. Time is skewed to noise: u ~ U(0, 1), t = 8u / (1 + 7u), k = ceil(u K), and 3 steps in 10 have u = 1. A disc shows
   through the noise until t is about 0.95; with uniform t the decoder never needs the tokens and they collapse to one code.
2. Decoding is one call at t = 1 with all tokens. Euler steps are there too (`steps=`), but as sampling goes on the prefix
   shrinks and later calls know less than the first.
3. Quantization starts late, after a share of the steps by which the encoder should say where the ball is. Until then the
   decoder gets the continuous vectors. At step 0 they do not depend on the picture, and a codebook filled from them is worth
   nothing.
4. A token of `tiny` and `small` is an angle. Its vector has 3 dimensions; LayerNorm leaves of them a zero mean (a plane) and
   one length (a circle in it), and around that stand the 256 codes. (`paper` keeps 16 dimensions.) A token that has no room
   for two things says one, and the ball is found more exactly: median centre error 0.036 and 0.023 with four angles, 0.054
   and 0.056 with eight tokens of 16 dimensions (seeds 1, 2). Eight angles are more exact still (0.016, seed 2), but the spare
   ones go round several times while the ball crosses the view, like the hand of a clock, and the language model derails on
   them: drift_error on iid clips 0.39 with eight, 0.34 with four (SFT of 2000 steps, seed 2; their VAEs differ, too).
   The price of angles: out of the range of sizes they say less than codes that stand free. SFT's drift_error on small balls was
   0.6 with eight tokens of 16 dimensions (seeds 0, 1), 2.1 and 1.2 with four angles (seeds 1, 2); on large ones 0.6 and 0.7,
   and 1.4 and 1.1.
5. Against tokens that all say the same: (a) each token has linear layers of its own into and out of its code; (b) from when
   the error at pure noise leaves its plateau until quantization, the continuous vectors get noise; (c) from the same moment
   to the end, a small term (`crowding`) keeps the vectors of one token apart, so that it uses all of the circle. Measured in
   16 dimensions: with shared layers and without noise each token became a map of the plane, and eight maps told little more
   than one.
6. `tiny` and `small` train their own small VAE (mean squared error + KL; a disc on white needs no perceptual or adversarial
   loss). It takes the place of one that is pre-trained on pictures of all kinds, so it also sees the sizes and speeds of the
   `ood` splits (other clips than are measured): extrapolation is left to tokenizer and language model. Trained in the
   training range alone it loses small balls (30 % missing, against 1 to 3 %).
7. In the encoder the latent attends to itself only and the queries to both ("unified-direction").
8. q and k are RMS-normalised before attention (as SD3 does for large pictures): bf16 stays stable.
9. Vectors pass a LayerNorm before they are normalised: without it all share a large mean and fall to one code. The commitment is
   a mean over tokens, times 0.25; the paper writes a sum and names no weight.

    python ddt.py                       # trains what is missing in runs/tiny: vae/, then ddt/
    python ddt.py --steps 8000          # any field of Config is a flag

Expected at `tiny` on 2 CPU cores: 8 to 15 minutes; median centre error of one-call reconstruction 0.02 to 0.04 world units,
all 256 codes in use.

Axes: B batch, F frames, C channels, H W pixels or latent cells, P patches, K tokens of a frame, D width, N codes.
"""
import dataclasses
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

import reward
import sim
import train

# ------------------------------------------------------------------ config


@dataclass
class Config:
    preset: str = "tiny"
    out: str = ""               # run folder; empty: runs/<preset>
    seed: int = 0
    fresh: bool = False         # start over, ignoring checkpoints
    save_every: int = 200       # steps between checkpoints
    plan: bool = False          # print what the run would need, and end
    world: int = 0              # ... on so many ranks; 0: as many as there are now
    # data
    scenario: str = "uniform"   # one of sim.SCENARIOS, or all
    clips: int = 6000           # training clips (32 frames each) per scenario
    size: int = 32              # pixels
    # VAE
    vae: str = ""               # folder of a trained one in diffusers' layout; empty: train the small one described here
    vae_width: int = 16         # channels of the first level; the others have twice as many
    vae_levels: int = 3         # resolutions: 3 -> 4 times smaller, 4 -> 8 times
    vae_latent: int = 4         # latent channels
    vae_steps: int = 400
    vae_batch: int = 64
    vae_lr: float = 2e-3
    # tokenizer
    queries: int = 4            # K
    code_dim: int = 3           # a circle, by LayerNorm: head of this file, 4
    prefix: str = "growing"     # tokens that the decoder sees in training: the first k(t), or "all" at every time
    order: str = "forward"      # of the codes that encode gives and decode takes: V_1 first, or "reverse"
    patch: int = 2              # latent cells a side that make one vector of the transformers
    image_width: int = 64       # encoder, latent stream
    query_width: int = 128      # encoder, query stream
    encoder_layers: int = 2
    width: int = 128            # decoder
    layers: int = 3
    heads: int = 4
    shift: float = 8.0          # s of t = s u / (1 + (s - 1) u)
    pure_noise: float = 0.3     # share of steps with u = 1
    quantize_at: float = 0.4    # quantization starts at this share of the steps
    token_noise: float = 0.05   # before that: std per channel of the noise on the unit vectors, once the mean ...
    noise_below: float = 0.5    # ... error at pure noise has come down to this
    commitment: float = 0.25
    spread: float = 0.02        # weight of `crowding`, once that error is below noise_below
    # optimization
    steps: int = 4000
    batch: int = 64
    micro: int = 0              # frames per backward pass and rank, here and in the VAE's training; 0: all at once
    lr: float = 1.5e-3
    warmup: int = 800           # long: with 100 steps to 2e-3 the plateau took 900 to 1500 steps, so it takes 570 to 780
    beta1: float = 0.9
    beta2: float = 0.99
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float = 1.0           # gradient norm; 0: no clipping
    eval_clips: int = 32        # per split of the reconstruction table; each is 32 frames


# `paper` is Table 3 and appendix A.1. Where they contradict themselves: frames are 128 x 128, so that a VAE which shrinks 8
# times leaves 256 latent vectors at patch 1 (1024 are those of 256 x 256); and the encoder is 128 wide for the latent and
# 256 for the queries ("latent dimension 128", yet tokens of 256). No gradient clipping is stated. Parameters: VAE 83.8M
# (SD3's, --vae), encoder 12.5M, decoder 111.1M; `small`: 1.3M, 6.2M, 41.2M; `tiny`: 0.24M, 0.49M, 1.66M.
PRESETS = {
    "tiny": {},
    "small": dict(scenario="all", clips=20000, size=128, vae_width=32, vae_levels=4, vae_latent=8, vae_steps=2000, vae_batch=128,
                  vae_lr=1e-3, queries=8, image_width=128, query_width=256, encoder_layers=6, width=384, layers=8, heads=8,
                  steps=8000, batch=256, lr=8e-4, warmup=1000, eval_clips=64),
    "paper": dict(scenario="all", clips=3_000_000, size=128, queries=16, code_dim=16, token_noise=0.2, patch=1,
                  image_width=128, query_width=256, encoder_layers=12, width=512, layers=12, heads=8,
                  steps=140_000, batch=1024, lr=1e-4, warmup=5000, eps=1e-6, clip=0.0, eval_clips=1000),
}
EXPECTED = {"tiny": "8 to 15 minutes on 2 CPU cores (VAE 1 to 2, DDT 6 to 12).", "small": "Not run yet.", "paper": "Not run yet."}

# ------------------------------------------------------------------ VAE (diffusers' AutoencoderKL)


class ResnetBlock(nn.Module):
    def __init__(self, c_in: int, c_out: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps=1e-6)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, c_out, eps=1e-6)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:                                       # (B, c_in, H, W)
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.conv_shortcut(x) + h                                          # (B, c_out, H, W)


class AttentionBlock(nn.Module):
    """One head over all cells of the smallest resolution."""

    def __init__(self, c: int, groups: int):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, c, eps=1e-6)
        self.to_q, self.to_k, self.to_v = nn.Linear(c, c), nn.Linear(c, c), nn.Linear(c, c)
        self.to_out = nn.ModuleList([nn.Linear(c, c)])

    def forward(self, x: Tensor) -> Tensor:                                       # (B, C, H, W)
        h = rearrange(self.group_norm(x), "b c h w -> b 1 (h w) c")
        h = F.scaled_dot_product_attention(self.to_q(h), self.to_k(h), self.to_v(h))
        return x + rearrange(self.to_out[0](h), "b 1 (h w) c -> b c h w", h=x.shape[2])


class Resample(nn.Module):
    """Half the resolution (strided convolution) or twice (nearest neighbour, then convolution)."""

    def __init__(self, c: int, up: bool):
        super().__init__()
        self.up = up
        self.conv = nn.Conv2d(c, c, 3, stride=1 if up else 2, padding=1 if up else 0)

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=2.0) if self.up else F.pad(x, (0, 1, 0, 1))     # pads right and bottom only
        return self.conv(x)


class Level(nn.Module):
    """Residual blocks at one resolution, then a change of resolution (not at the last level)."""

    def __init__(self, c_in: int, c_out: int, blocks: int, groups: int, up: bool, last: bool):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(c_in if i == 0 else c_out, c_out, groups) for i in range(blocks))
        resample = nn.ModuleList([] if last else [Resample(c_out, up)])
        self.resample_name = "upsamplers" if up else "downsamplers"
        setattr(self, self.resample_name, resample)

    def forward(self, x: Tensor) -> Tensor:
        for block in [*self.resnets, *getattr(self, self.resample_name)]:
            x = block(x)
        return x


class Middle(nn.Module):
    def __init__(self, c: int, groups: int):
        super().__init__()
        self.resnets = nn.ModuleList([ResnetBlock(c, c, groups), ResnetBlock(c, c, groups)])
        self.attentions = nn.ModuleList([AttentionBlock(c, groups)])

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Encoder(nn.Module):
    def __init__(self, channels: list[int], blocks: int, latent: int, groups: int):
        super().__init__()
        self.conv_in = nn.Conv2d(3, channels[0], 3, padding=1)
        pairs = list(zip([channels[0], *channels], channels))
        self.down_blocks = nn.ModuleList(Level(a, b, blocks, groups, up=False, last=i == len(pairs) - 1)
                                         for i, (a, b) in enumerate(pairs))
        self.mid_block = Middle(channels[-1], groups)
        self.conv_norm_out = nn.GroupNorm(groups, channels[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(channels[-1], 2 * latent, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:                                       # (B, 3, H, W)
        x = self.conv_in(x)
        for level in self.down_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))       # (B, 2 C, h, w)  mean, log variance


class Decoder(nn.Module):
    def __init__(self, channels: list[int], blocks: int, latent: int, groups: int):
        super().__init__()
        channels = channels[::-1]
        self.conv_in = nn.Conv2d(latent, channels[0], 3, padding=1)
        self.mid_block = Middle(channels[0], groups)
        pairs = list(zip([channels[0], *channels], channels))
        self.up_blocks = nn.ModuleList(Level(a, b, blocks + 1, groups, up=True, last=i == len(pairs) - 1)
                                       for i, (a, b) in enumerate(pairs))
        self.conv_norm_out = nn.GroupNorm(groups, channels[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(channels[-1], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:                                       # (B, C, h, w)
        x = self.mid_block(self.conv_in(z))
        for level in self.up_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))                       # (B, 3, H, W)


VAE_WEIGHTS = "diffusion_pytorch_model.safetensors"
VAE_OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}      # in files of before 2023
VAE_ALWAYS = {"_class_name": "AutoencoderKL", "act_fn": "silu", "in_channels": 3, "out_channels": 3,
              "down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D", "mid_block_add_attention": True}


class VAE(nn.Module):
    """
    AutoencoderKL with diffusers' parameter names and config.json, so that SD1's and SD3's folders are the same thing.
    `encode` returns the posterior's mean as a latent of about zero mean and unit variance: (z - shift) * scale.
    """

    def __init__(self, config: dict):
        super().__init__()
        self.config = config
        channels, latent = list(config["block_out_channels"]), config["latent_channels"]
        blocks, groups = config["layers_per_block"], config["norm_num_groups"]
        self.encoder = Encoder(channels, blocks, latent, groups)
        self.decoder = Decoder(channels, blocks, latent, groups)
        if config.get("use_quant_conv", True):
            self.quant_conv = nn.Conv2d(2 * latent, 2 * latent, 1)
        if config.get("use_post_quant_conv", True):
            self.post_quant_conv = nn.Conv2d(latent, latent, 1)
        self.to(memory_format=torch.channels_last)      # convolutions are 1.6 times faster so on the CPU

    @property
    def shrink(self) -> int:
        """Pixels a side per latent cell."""
        return 2 ** (len(self.config["block_out_channels"]) - 1)

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images (B, 3, H, W) in [-1, 1] -> mean and log variance of the posterior, each (B, C, h, w), unscaled."""
        h = self.encoder(images)
        h = self.quant_conv(h) if hasattr(self, "quant_conv") else h
        mean, logvar = h.chunk(2, 1)
        return mean, logvar.clamp(-30, 20)

    def reconstruct(self, z: Tensor) -> Tensor:
        """Unscaled latents (B, C, h, w) -> images (B, 3, H, W), about [-1, 1]."""
        return self.decoder(self.post_quant_conv(z) if hasattr(self, "post_quant_conv") else z)

    def encode(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) in [-1, 1] -> latents (B, C, h, w), shifted and scaled."""
        return (self.moments(images)[0] - (self.config.get("shift_factor") or 0)) * self.config["scaling_factor"]

    def decode(self, latents: Tensor) -> Tensor:
        """The inverse: latents (B, C, h, w) -> images (B, 3, H, W) in about [-1, 1]."""
        return self.reconstruct(latents / self.config["scaling_factor"] + (self.config.get("shift_factor") or 0))

    def save(self, folder) -> None:
        save_folder(folder, self.config, self, VAE_WEIGHTS)

    @classmethod
    def load(cls, folder) -> "VAE":
        """
        A folder in diffusers' layout, in fp32 whatever its files hold. Raises train.Problem for what is missing, damaged,
        not finite or does not fit.
        """
        config, tensors = load_folder(folder, VAE_WEIGHTS)
        config.setdefault("scaling_factor", 0.18215)                # SD1's: its first files do not name it
        for key, ours in VAE_ALWAYS.items():
            value = config.get(key, ours)
            if value != ours and not (isinstance(value, list) and value and all(v == ours for v in value)):
                raise train.Problem(f"{folder}/config.json: {key} is {value}; only an AutoencoderKL with {ours} can be read")
        scale, shift = config.get("scaling_factor"), config.get("shift_factor") or 0
        if not (isinstance(scale, (int, float)) and 0 < scale < math.inf and isinstance(shift, (int, float)) and math.isfinite(shift)):
            raise train.Problem(f"{folder}/config.json: scaling_factor {scale!r}, shift_factor {shift!r} are not numbers, the "
                                "first of them above 0")
        tensors = {re.sub(r"(attentions\.0\.)(query|key|value|proj_attn)\b", lambda m: m[1] + VAE_OLD_NAMES[m[2]], name): x
                   for name, x in tensors.items()}
        try:
            vae = cls(config)
        except (LookupError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
            raise train.Problem(f"{folder}/config.json is not that of an AutoencoderKL ({error})") from None
        train.load_state(vae, tensors, Path(folder))
        return vae.eval().requires_grad_(False)


# ------------------------------------------------------------------ quantizer


class TokenLinear(nn.Module):
    """
    A linear layer of its own for each of K tokens: (B, K, a) -> (B, K, b). With one layer for all, tokens that see the same
    place say the same: head of this file, 5.
    """

    def __init__(self, tokens: int, a: int, b: int):
        super().__init__()
        bound = a ** -0.5                                                     # nn.Linear's own
        self.weight = nn.Parameter(torch.empty(tokens, a, b).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(tokens, b).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bka,kac->bkc", x, self.weight) + self.bias


def over_ranks(x: Tensor) -> Tensor:
    """Sum over all ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def of_all_ranks(x: Tensor) -> Tensor:
    """Rows (n, ...) of each rank, n differing -> all of them in the order of the ranks, without gradient."""
    x = x.detach()
    if not dist.is_initialized():
        return x
    sizes = torch.zeros(dist.get_world_size(), dtype=torch.int64, device=x.device)
    sizes[dist.get_rank()] = len(x)
    end = over_ranks(sizes).cumsum(0)[dist.get_rank()]
    rows = x.new_zeros(int(sizes.sum()), *x.shape[1:])
    rows[end - len(x):end] = x
    return over_ranks(rows)


def crowding(z: Tensor, others: Tensor) -> Tensor:
    """
    How near each row's unit vectors z (B, K, dim) are to those of the same token in the others (A, K, dim) -> (B,):
    log of the mean of exp(-2 d^2) over their distances d (uniformity, Wang and Isola 2020), mean over tokens. 0: all
    vectors are one. The gradient pushes a row away from where the others are.
    """
    similarity = torch.einsum("bkd,akd->bka", z, others)                      # d^2 = 2 - 2 similarity
    return ((4 * similarity - 4).logsumexp(-1) - math.log(len(others))).mean(-1)


class EMAVectorQuantizer(nn.Module):
    """
    Nearest of N codes by cosine similarity; the codes follow the vectors they are matched with (EMA, van den Oord et al.
    2017, appendix A.1). Statistics are summed over ranks, so that the codebooks stay identical. No autocast.
    """

    def __init__(self, project: nn.Module, codes: int = 256, dim: int = 16, decay: float = 0.95, dead_below: float = 0.2):
        super().__init__()
        self.decay, self.dead_below = decay, dead_below
        self.project = project              # (B, K, D) -> (B, K, dim)
        self.norm = nn.LayerNorm(dim)       # without it, all vectors share a large mean and fall to one code
        self.register_buffer("codebook", F.normalize(torch.randn(codes, dim), dim=-1))   # (N, dim)
        self.register_buffer("count", torch.ones(codes))          # EMA of the matches per update
        self.register_buffer("sum", self.codebook.clone())        # EMA of the sum of matched vectors
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self.register_buffer("active", torch.zeros((), dtype=torch.bool))   # False: vectors pass through unquantized

    def vectors(self, x: Tensor) -> Tensor:
        """Encoder outputs (B, K, D) -> unit vectors (B, K, dim)."""
        return F.normalize(self.norm(self.project(x.float())), dim=-1)

    def nearest(self, z: Tensor) -> Tensor:
        """Unit vectors (..., dim) -> index of the most similar code (...)."""
        return (z.double() @ self.codebook.T.double()).argmax(-1)     # neighbours on a circle: 3e-4 apart; tf32 rounds at 5e-4

    def forward(self, x: Tensor, noise: Tensor | float = 0.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """
        x (B, K, D) -> vectors for the decoder (B, K, dim), codes (B, K), commitment loss per row (B,), and the unit vectors
        (B, K, dim) that `update` is given with the codes once the step is done.
        noise (B, K, dim) is added to the vectors as long as they are not quantized.
        """
        with torch.autocast(x.device.type, enabled=False):
            z = self.vectors(x)                                               # (B, K, dim)
            codes = self.nearest(z)                                           # (B, K)
            if not self.active:
                return F.normalize(z + noise, dim=-1), codes, z.new_zeros(len(z)), z
            quantized = self.codebook[codes]                                  # (B, K, dim)
            commitment = (z - quantized).square().sum(-1).mean(-1)            # |V^_i - V_i|^2, mean over tokens
            return z + (quantized - z).detach(), codes, commitment, z         # straight-through

    @torch.no_grad()
    def update(self, z: Tensor, codes: Tensor) -> None:
        """One EMA step with vectors z (n, dim) matched to codes (n,), then revival of dead codes. Nothing before `fill`."""
        if not self.active:
            return
        count = torch.bincount(codes, minlength=len(self.codebook)).float()
        total = over_ranks(torch.cat([count[:, None], torch.zeros_like(self.sum).index_add_(0, codes, z)], 1))
        self.count.lerp_(total[:, 0], 1 - self.decay)
        self.sum.lerp_(total[:, 1:], 1 - self.decay)
        self.codebook.copy_(F.normalize(self.sum, dim=-1))
        share = total[:, 0].sum() / len(self.codebook)                        # matches of a code if all were equal
        dead = self.count < self.dead_below * share
        self.place(dead, self.random_vectors(z), share)
        self.updates += 1

    def place(self, where: Tensor, vectors: Tensor, count: Tensor) -> None:
        """Puts codes (mask (N,)) at vectors (N, dim), with EMA sums and a count above the threshold: else they die again."""
        self.codebook[where] = vectors[where]
        self.count[where] = count
        self.sum[where] = vectors[where] * count

    def random_vectors(self, z: Tensor) -> Tensor:
        """N random rows of z (n, dim), drawn from all ranks' rows and the same on all ranks."""
        rows = of_all_ranks(z)
        drawn = torch.randint(len(rows), (len(self.codebook),), generator=torch.Generator().manual_seed(int(self.updates)))
        return rows[drawn.to(z.device)]

    @torch.no_grad()
    def fill(self, z: Tensor) -> None:
        """
        Starts quantizing: codes are random encoder vectors of z (n, dim), followed by 10 k-means rounds. z may be larger than
        the batches of `update` to come: until its counts have decayed the codes move slowly, and none is taken for dead.
        """
        n = over_ranks(torch.tensor(float(len(z)), device=z.device))
        self.place(torch.ones_like(self.count, dtype=torch.bool), self.random_vectors(z), n / len(self.codebook))
        self.active.fill_(True)
        decay, self.decay = self.decay, 0.0
        for _ in range(10):
            self.update(z, self.nearest(z))
        self.decay = decay

    def usage(self, codes: Tensor) -> dict[str, float]:
        """
        Distinct codes among those of a step (n,) and of all ranks, and the perplexity of their shares; 0 before `fill`. (`count`
        would not do: revival keeps it up.) Of the 256 codes of a step of `tiny`, about 160 are distinct if all are in use.
        """
        if not self.active:
            return {"codes_used": 0, "perplexity": 0.0}
        count = over_ranks(torch.bincount(codes, minlength=len(self.codebook)).float())
        use = count / count.sum()
        return {"codes_used": int((count > 0).sum()), "perplexity": math.exp(torch.special.entr(use).sum())}


# ------------------------------------------------------------------ transformers


def sincos(positions: Tensor, width: int, period: float = 10000.0) -> Tensor:
    """Positions (...,) -> sinusoidal features (..., width)."""
    frequency = torch.exp(-math.log(period) * torch.arange(width // 2, device=positions.device) / (width // 2))
    angle = positions[..., None].float() * frequency
    return torch.cat([angle.sin(), angle.cos()], -1)


def sincos_2d(side: int, width: int) -> Tensor:
    """Positions of a side x side grid -> (side * side, width): half for the row, half for the column."""
    i = torch.arange(side)
    row, column = sincos(i, width // 2), sincos(i, width // 2)
    return torch.cat([row[:, None].expand(-1, side, -1), column[None].expand(side, -1, -1)], -1).flatten(0, 1)


class Stream(nn.Module):
    """
    One modality's half of a dual-stream block: its own norms, projections and MLP around a shared attention.
    `condition` > 0: shifted, scaled and gated by a vector of that width (adaLN-zero). `last`: the output is not used
    after this block's attention, so there is nothing behind it.
    """

    def __init__(self, width: int, inner: int, heads: int, condition: int = 0, last: bool = False):
        super().__init__()
        self.heads, self.last = heads, last
        self.norm1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=not condition)
        self.qkv = nn.Linear(width, 3 * inner)
        self.modulation = nn.Linear(condition, (2 if last else 6) * width) if condition else None
        if condition:
            nn.init.zeros_(self.modulation.weight)
            nn.init.zeros_(self.modulation.bias)
        if not last:
            self.out = nn.Linear(inner, width)
            self.norm2 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=not condition)
            self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"),
                                     nn.Linear(4 * width, width))

    def before(self, x: Tensor, condition: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        """x (B, L, D), condition (B, C) -> q, k, v (B, heads, L, head_dim) each, modulation for `after`."""
        shift, scale, *rest = (0, 0, 1, 0, 0, 1) if self.modulation is None else \
            self.modulation(F.silu(condition))[:, None].chunk(2 if self.last else 6, -1)
        h = self.qkv(self.norm1(x) * (1 + scale) + shift)
        h = rearrange(h, "b l (three heads d) -> three b heads l d", three=3, heads=self.heads)
        q, k, v = h
        return (F.rms_norm(q, q.shape[-1:]), F.rms_norm(k, k.shape[-1:]), v), rest

    def after(self, x: Tensor, attended: Tensor, rest: list[Tensor]) -> Tensor:
        """attended (B, heads, L, head_dim) -> x (B, L, D)."""
        gate1, shift, scale, gate2 = rest
        x = x + gate1 * self.out(rearrange(attended, "b heads l d -> b l (heads d)"))
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale) + shift)


def patchify(x: Tensor, p: int) -> Tensor:
    return rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=p, q=p)


def unpatchify(x: Tensor, p: int, side: int) -> Tensor:
    return rearrange(x, "b (h w) (c p q) -> b c (h p) (w q)", p=p, q=p, h=side)


class QFormer(nn.Module):
    """K learned queries read a latent. Two streams; the latent attends to itself, the queries to both."""

    def __init__(self, channels: int, side: int, c: Config):
        super().__init__()
        inner = c.query_width
        self.patch = c.patch
        self.latent_in = nn.Linear(channels * c.patch ** 2, c.image_width)
        self.register_buffer("position", sincos_2d(side // c.patch, c.image_width), persistent=False)
        self.queries = nn.Parameter(torch.randn(c.queries, c.query_width))
        self.image_blocks = nn.ModuleList(Stream(c.image_width, inner, c.heads, last=i == c.encoder_layers - 1)
                                          for i in range(c.encoder_layers))
        self.query_blocks = nn.ModuleList(Stream(c.query_width, inner, c.heads) for _ in range(c.encoder_layers))
        self.norm = nn.LayerNorm(c.query_width, eps=1e-6)

    def forward(self, latent: Tensor) -> Tensor:                                  # (B, C, h, w)
        x = self.latent_in(patchify(latent, self.patch)) + self.position          # (B, P, image_width)
        y = self.queries.expand(len(x), -1, -1)                                   # (B, K, query_width)
        for image, query in zip(self.image_blocks, self.query_blocks):
            (xq, xk, xv), x_rest = image.before(x, None)                          # (B, heads, P, d)
            (yq, yk, yv), y_rest = query.before(y, None)                          # (B, heads, K, d)
            k, v = torch.cat([xk, yk], 2), torch.cat([xv, yv], 2)                 # (B, heads, P + K, d)
            y = query.after(y, F.scaled_dot_product_attention(yq, k, v), y_rest)
            if not image.last:
                x = image.after(x, F.scaled_dot_product_attention(xq, xk, xv), x_rest)
        return self.norm(y)                                                       # (B, K, query_width)


class MMDiT(nn.Module):
    """SD3's denoiser: noisy latent and tokens, two streams in one attention. Predicts the clean latent x_0."""

    def __init__(self, channels: int, side: int, code_dim: int, c: Config):
        super().__init__()
        self.patch, self.side = c.patch, side // c.patch
        self.latent_in = nn.Linear(channels * c.patch ** 2, c.width)
        self.token_in = TokenLinear(c.queries, code_dim, c.width)
        self.register_buffer("position", sincos_2d(self.side, c.width), persistent=False)
        # Large enough to tell the tokens apart from the start: at 0.02 the decoder reads all alike, several learn to say
        # the same, and add little to each other (error at pure noise 0.11 against 0.06, 500 steps after quantization).
        self.token_position = nn.Parameter(0.5 * torch.randn(c.queries, c.width))
        self.time = nn.Sequential(nn.Linear(256, c.width), nn.SiLU(), nn.Linear(c.width, c.width))
        self.image_blocks = nn.ModuleList(Stream(c.width, c.width, c.heads, c.width) for _ in range(c.layers))
        self.token_blocks = nn.ModuleList(Stream(c.width, c.width, c.heads, c.width, last=i == c.layers - 1)
                                          for i in range(c.layers))
        self.norm = nn.LayerNorm(c.width, eps=1e-6, elementwise_affine=False)
        self.modulation = nn.Linear(c.width, 2 * c.width)
        self.latent_out = nn.Linear(c.width, channels * c.patch ** 2)
        for layer in (self.modulation, self.latent_out):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, latent: Tensor, t: Tensor, tokens: Tensor, k: Tensor) -> Tensor:
        """
        latent (B, C, h, w), t (B,), tokens (B, K, code_dim), k (B,) tokens shown -> x_0 (B, C, h, w).
        Tokens from k on are zeroed and masked as keys: they have exactly no influence.
        """
        shown = torch.arange(tokens.shape[1], device=k.device) < k[:, None]       # (B, K)
        x = self.latent_in(patchify(latent, self.patch)) + self.position          # (B, P, D)
        y = self.token_in(tokens * shown[..., None]) + self.token_position        # (B, K, D)
        condition = self.time(sincos(1000 * t, 256).to(x.dtype))                  # (B, D)
        P = x.shape[1]
        mask = torch.cat([shown.new_ones(len(x), P), shown], 1)[:, None, None]    # (B, 1, 1, P + K)
        for image, token in zip(self.image_blocks, self.token_blocks):
            (xq, xk, xv), x_rest = image.before(x, condition)
            (yq, yk, yv), y_rest = token.before(y, condition)
            q, k, v = (torch.cat(pair, 2) for pair in ((xq, yq), (xk, yk), (xv, yv)))     # (B, heads, P + K, d)
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            x = image.after(x, attended[:, :, :P], x_rest)
            if not token.last:
                y = token.after(y, attended[:, :, P:], y_rest)
        shift, scale = self.modulation(F.silu(condition))[:, None].chunk(2, -1)
        return unpatchify(self.latent_out(self.norm(x) * (1 + scale) + shift), self.patch, self.side)


# ------------------------------------------------------------------ the tokenizer


class DDT(nn.Module):
    """The whole: VAE (frozen), Q-former, quantizer, MMDiT."""

    def __init__(self, config: Config, vae: VAE):
        super().__init__()
        self.config, self.vae = config, vae.eval().requires_grad_(False)
        channels, side = vae.config["latent_channels"], config.size // vae.shrink
        if config.size % (vae.shrink * config.patch):
            raise train.Problem(f"--size {config.size} must be a multiple of {vae.shrink * config.patch} "
                                f"(VAE {vae.shrink} x patch {config.patch})")
        self.encoder = QFormer(channels, side, config)
        self.quantizer = EMAVectorQuantizer(TokenLinear(config.queries, config.query_width, config.code_dim), dim=config.code_dim)
        self.decoder = MMDiT(channels, side, self.quantizer.codebook.shape[1], config)
        self.register_buffer("noise_mse", torch.ones(()))       # running mean of the error at t = 1; 1: nothing learnt

    def train(self, mode: bool = True):
        super().train(mode)
        self.vae.eval()
        return self

    @property
    def past_plateau(self) -> bool:
        """The tokens say something: from here on noise and `crowding` see to it that they do not all say the same."""
        return bool(self.noise_mse < self.config.noise_below)

    def times(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """u (B,) in [0, 1] -> time t (B,) and the number of tokens shown there k (B,): k(0) = 0, k(1) = K (--prefix all: K)."""
        s, shown = self.config.shift, torch.ones_like(u) if self.config.prefix == "all" else u
        return s * u / (1 + (s - 1) * u), torch.ceil(shown * self.config.queries).long()

    def forward(self, latent: Tensor, u: Tensor, noise: Tensor, token_noise: Tensor | float = 0.0,
                others: Tensor | None = None) -> dict[str, Tensor]:
        """
        The training loss of clean latents x_0 (B, C, h, w) at u (B,), noise like x_0, token_noise for the quantizer, others
        (A, K, dim) the unit vectors of the global batch (None: these latents, on all ranks, are the batch) ->
        {loss (B,): |d(x_t, t, V_1..V_k) - x_0|^2 + commitment + spread; mse, commitment, crowding (B,);
        codes (B, K), vectors (B, K, dim)}.
        """
        tokens, codes, commitment, z = self.quantizer(self.encoder(latent), token_noise)
        t, k = self.times(u)
        x_t = t[:, None, None, None] * noise + (1 - t[:, None, None, None]) * latent
        mse = (self.decoder(x_t, t, tokens, k) - latent).square().mean((1, 2, 3))
        loss = mse + self.config.commitment * commitment
        with torch.autocast(z.device.type, enabled=False):      # in bf16, near vectors are one
            crowd = crowding(z, of_all_ranks(z) if others is None else others)
        if self.past_plateau:
            loss = loss + self.config.spread * crowd
        return {"loss": loss, "mse": mse, "commitment": commitment, "crowding": crowd, "codes": codes, "vectors": z.detach()}

    @torch.no_grad()
    def latent(self, frames: Tensor) -> Tensor:
        """frames (B, 3, H, W) in [0, 1] -> VAE latents (B, C, h, w)."""
        return self.vae.encode(2 * frames - 1)

    @torch.no_grad()
    def encode(self, frames: Tensor) -> Tensor:
        """frames (B, 3, H, W) in [0, 1] -> codes (B, K), int64, in config.order."""
        check_frames(frames, self.config.size)
        return self.ordered(self.quantizer.nearest(self.quantizer.vectors(self.encoder(self.latent(frames)))))

    def ordered(self, codes: Tensor) -> Tensor:
        """codes (..., K), V_1 first -> in config.order, and back."""
        return codes.flip(-1) if self.config.order == "reverse" else codes

    @torch.no_grad()
    def decode(self, codes: Tensor, steps: int = 1, generator: torch.Generator | None = None) -> Tensor:
        """codes (B, K) -> frames (B, 3, H, W) in [0, 1]. The noise to start from comes from the generator."""
        check_codes(codes, self.config.queries, len(self.quantizer.codebook))
        if steps < 1:
            raise ValueError(f"steps = {steps}: at least one call of the decoder")
        noise = torch.randn(len(codes), self.vae.config["latent_channels"], *2 * [self.config.size // self.vae.shrink],
                            generator=generator, device=codes.device)
        latent = self.sample(self.quantizer.codebook[self.ordered(codes)], noise, steps)
        return (self.vae.decode(latent) / 2 + 0.5).clamp(0, 1)

    def sample(self, tokens: Tensor, x: Tensor, steps: int) -> Tensor:
        """Euler steps of the flow from noise x (B, C, h, w) at t = 1 to a latent; dx/dt = eps - x_0 = (x - x_0) / t."""
        grid = torch.linspace(1, 0, steps + 1, device=x.device)
        for u, u_next in zip(grid[:-1], grid[1:]):
            t, k = self.times(u.expand(len(x)))
            t_next = self.times(u_next)[0]
            clean = self.decoder(x, t, tokens, k)
            x = clean + (t_next / t)[:, None, None, None] * (x - clean)
        return x

    def save(self, folder) -> None:
        save_folder(folder, {"ddt": described(self.config), "vae": self.vae.config}, self, "model.safetensors")

    @classmethod
    def load(cls, folder) -> "DDT":
        """A folder written by `save`. Raises train.Problem for what is missing, damaged or does not fit."""
        return load_model(folder, "tokenizer", lambda config: cls(Config(**config["ddt"]), VAE(config["vae"])))


def check_frames(frames: Tensor, size: int) -> None:
    if frames.ndim != 4 or frames.shape[1:] != (3, size, size):
        raise ValueError(f"this tokenizer encodes frames (B, 3, {size}, {size}); got {tuple(frames.shape)}")


def check_codes(codes: Tensor, K: int, N: int) -> None:
    if codes.ndim != 2 or codes.shape[1] != K or not len(codes) or codes.min() < 0 or codes.max() >= N:
        raise ValueError(f"codes must be (B, {K}) in [0, {N}); got {tuple(codes.shape)}")


def save_folder(folder, config: dict, model: nn.Module, name: str) -> None:
    """config.json, then the weights, which name it too (two orders of tokens are two models): a folder with weights is whole."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    Path(folder, "config.json").write_text(json.dumps(config, indent=2) + "\n")
    train.write_safetensors(Path(folder, name), model.state_dict(), {"format": "pt", "config": json.dumps(config)})


def load_folder(folder, name: str) -> tuple[dict, dict[str, Tensor]]:
    try:
        config = json.loads(Path(folder, "config.json").read_text())
    except (OSError, ValueError) as error:
        raise train.Problem(f"cannot read {Path(folder, 'config.json')} ({error}): is {folder} the right folder?")
    train.need(isinstance(config, dict), f"{Path(folder, 'config.json')} holds no settings: is {folder} the right folder?")
    return config, train.read_safetensors(Path(folder, name))[0]


def described(config) -> dict:
    """What of a config is kept with the weights: all but where they were made."""
    return {k: v for k, v in dataclasses.asdict(config).items() if k not in ("out", "vae", "fresh", "save_every")}


def load_model(folder, kind: str, build: Callable[[dict], nn.Module]) -> nn.Module:
    """A folder that save_folder wrote, `build` from its config.json, to be used as it is. Raises train.Problem."""
    config, tensors = load_folder(folder, "model.safetensors")
    try:
        model = build(config)
    except (KeyError, TypeError) as error:
        raise train.Problem(f"{folder}/config.json is not that of a {kind} of this version ({error})") from None
    train.load_state(model, tensors, Path(folder))
    return model.eval().requires_grad_(False)


# ------------------------------------------------------------------ training


def millions(model: nn.Module) -> str:
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M"


class Frames:
    """
    Single frames of clips, painted when they are asked for, from the closed form (at most 0.006 off the simulation). Index i
    is frame i % 32 of clip i // 32; config.clips of each scenario and split.
    """

    def __init__(self, config: Config, device, splits: tuple[str, ...] = ("pretrain",)):
        self.size, self.device = config.size, device
        self.clips = [sim.first_frames(scenario, split, config.clips, config.seed)
                      for scenario in train.scenarios(config.scenario) for split in splits]
        self.n = [len(c) * sim.FRAMES for c in self.clips]

    def __len__(self) -> int:
        return sum(self.n)

    def __getitem__(self, index: Tensor) -> Tensor:                               # (B,) -> (B, 3, H, W) in [0, 1]
        frames, first = torch.empty(len(index), 3, self.size, self.size, device=self.device), 0
        for clips, n in zip(self.clips, self.n):
            rows = ((index >= first) & (index < first + n)).nonzero()[:, 0]
            clip, frame = (index[rows] - first) // sim.FRAMES, (index[rows] - first) % sim.FRAMES
            if len(rows):
                drawn = clips[clip].to(self.device)
                position = sim.closed_form(drawn)[torch.arange(len(rows)), frame, None]          # (b, 1, N, 2)
                frames[rows] = sim.render(position, drawn.radius, self.size)[:, 0]
            first += n
        return frames


SD3 = {"_class_name": "AutoencoderKL", "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 16,
       "norm_num_groups": 32, "scaling_factor": 1.5305, "shift_factor": 0.0609, "use_quant_conv": False,
       "use_post_quant_conv": False}


def small_vae(config: Config) -> VAE:
    """The untrained AutoencoderKL that a config describes."""
    width = config.vae_width
    return VAE({"_class_name": "AutoencoderKL", "block_out_channels": [width] + [2 * width] * (config.vae_levels - 1),
                "layers_per_block": 1, "latent_channels": config.vae_latent, "norm_num_groups": 8,
                "in_channels": 3, "out_channels": 3, "act_fn": "silu", "sample_size": config.size,
                "down_block_types": ["DownEncoderBlock2D"] * config.vae_levels,
                "up_block_types": ["UpDecoderBlock2D"] * config.vae_levels,
                "use_quant_conv": False, "use_post_quant_conv": False,
                "scaling_factor": 1.0, "shift_factor": 0.0})


def train_vae(config: Config, world: train.World) -> VAE:
    """Trains a small AutoencoderKL on single frames and saves it in <out>/vae."""
    folder = train.writable(Path(config.out, "vae"))
    torch.manual_seed(config.seed)
    vae = small_vae(config).to(world.device)
    c = dataclasses.replace(config, steps=config.vae_steps, lr=config.vae_lr, batch=config.vae_batch,
                            warmup=config.vae_steps // 6)
    world.say(f"VAE: {millions(vae)} parameters, {c.steps} steps of {c.batch} frames")
    data = Frames(config, world.device, ("pretrain", "ood"))        # head of this file, 6
    side, parts = c.size // vae.shrink, world.parts(c.batch, c.micro)
    world.compile(vae.encoder, vae.decoder)
    model = train.distribute(AutoencoderLoss(vae), world)

    with train.Run(folder, vae, c, world, show=("mse",)) as run:
        for step in run:
            frames = data[world.share(train.rows(c.seed, step, c.batch, len(data)))]
            noise = torch.randn(c.batch, c.vae_latent, side, side, generator=train.generator(c.seed, step))
            noise = world.share(noise).to(world.device)
            total, measured = 0.0, 0.0
            for images, eps in run.accumulate(zip((2 * frames - 1).tensor_split(parts), noise.tensor_split(parts)), model):
                with world.autocast():
                    mse, kl = model(images, eps)
                loss = (mse + 1e-6 * kl).sum() / c.batch
                (loss * world.size).backward()              # DDP averages over ranks: this makes it the sum
                total += loss.detach()
                measured += torch.stack([mse.detach().sum(), kl.detach().sum()])
            mse, kl = train.total(measured) / c.batch
            run.step(total, mse=mse, kl=kl)
    with torch.no_grad():       # latents of zero mean and unit variance: the flow mixes them with unit noise
        mean = vae.moments(2 * data[train.rows(c.seed, 0, 512, len(data))] - 1)[0]
    vae.config |= {"shift_factor": mean.mean().item(), "scaling_factor": 1 / mean.std().item()}
    if world.is_main:
        reward.drop_rows(folder.parent / "results.json", "VAE", "DDT", "SFT", "SFT + RL")
    train.finish(folder, vae.save, c, vae, world)
    return vae.eval().requires_grad_(False)


def foreign_vae(config: Config, vae: VAE, world: train.World) -> VAE:
    """The VAE of --vae, and a copy of it in <out>/vae, so that the run folder is whole."""
    folder = Path(config.out, "vae")
    there = (folder / VAE_WEIGHTS).exists()
    if there:
        own = VAE.load(folder).state_dict()
        same = [*own] == [*vae.state_dict()] and all(torch.equal(own[k], x.cpu()) for k, x in vae.state_dict().items())
        train.need(same, f"{folder} holds another VAE than --vae {config.vae}: choose another --out, or start over with --fresh")
    train.wait(world)                   # every rank has looked before one writes
    if world.is_main and not there:
        vae.save(folder)
        reward.drop_rows(folder.parent / "results.json", "VAE", "DDT", "SFT", "SFT + RL")
    train.wait(world)
    return vae


def own_vae(config: Config, world: train.World) -> VAE:
    """The VAE of <out>, which must be the one that the flags describe."""
    folder = Path(config.out, "vae")
    was = reward.read(folder / "trained.json")                      # nothing: a copy of --vae's
    changed = [text for k, text in train.differences(was, config).items()
               if was and (k.startswith("vae_") or k in ("seed", "scenario", "clips", "size"))]
    train.need(not changed, f"{folder} was trained with another configuration ({'; '.join(changed[:4])}): restore that, choose "
               f"another --out, name it with --vae {folder} to take it as it is, or train it again with --fresh")
    return VAE.load(folder).to(world.device)


class AutoencoderLoss(nn.Module):
    """A forward of its own, so that DDP sees one: images, noise -> squared error and KL divergence per picture (B,)."""

    def __init__(self, vae: VAE):
        super().__init__()
        self.vae = vae

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        mean, logvar = self.vae.moments(images)
        reconstruction = self.vae.reconstruct(mean + (logvar / 2).exp() * noise)
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum((1, 2, 3))
        return (reconstruction - images).square().mean((1, 2, 3)), kl


def planned(config: Config) -> DDT:
    """The tokenizer on the meta device, with the VAE of --vae; that of `paper` without the flag with SD3's."""
    known = VAE.load(config.vae).config if config.vae else SD3 if config.preset == "paper" else None
    with torch.device("meta"):
        return DDT(config, VAE(known) if known else small_vae(config))


def plan(config: Config, ranks: int) -> train.Plan:
    """
    Memory of train_ddt and of train_vae, whichever needs more, and the work of train_ddt. `measure` runs the models on the meta
    device.
    """
    rows, ddt = train.rows_at_once(config.batch, ranks, config.micro), planned(config)
    with torch.device("meta"):
        frames = torch.zeros(rows, 3, config.size, config.size)
        latent = ddt.latent(frames)
        tokens, u = torch.zeros(rows, config.queries, config.code_dim), torch.zeros(rows)
    passes = [train.measure(lambda: ddt.encoder(latent), ddt), train.measure(lambda: ddt.decoder(latent, u, tokens, u), ddt)]
    flops = train.measure(lambda: ddt.latent(frames), ddt)[0] + 3 * sum(flops for flops, _ in passes)
    passing = {"activations": sum(kept for _, kept in passes)}
    if not config.vae and config.preset != "paper":
        n = train.rows_at_once(config.vae_batch, ranks, config.micro)
        with torch.device("meta"):
            loss_of = AutoencoderLoss(small_vae(config))
            images, noise = torch.zeros(n, 3, config.size, config.size), torch.zeros(n, *latent.shape[1:])
        passing["activations of the VAE's training"] = train.measure(lambda: loss_of(images, noise), loss_of)[1]
    return train.Plan(train.training_memory(ddt, ranks), passing,
                      config.batch * config.queries, flops * config.batch / rows)


def train_ddt(config: Config, vae: VAE, world: train.World) -> DDT:
    """Trains encoder, quantizer and decoder together and saves the tokenizer in <out>/ddt."""
    folder = train.writable(Path(config.out, "ddt"))
    train.made_of(folder, vae=folder.parent / "vae" / VAE_WEIGHTS)
    torch.manual_seed(config.seed)
    ddt = DDT(config, vae).to(world.device)
    world.say(f"DDT: {millions(ddt.encoder)} parameters encoder, {millions(ddt.decoder)} decoder, "
              f"{config.steps} steps of {config.batch} frames")
    data = Frames(config, world.device)
    B, device, parts = config.batch, world.device, world.parts(config.batch, config.micro)
    world.compile(ddt.encoder, ddt.decoder)
    model = train.distribute(ddt, world)

    @torch.no_grad()
    def vectors(x0: Tensor) -> Tensor:                      # what the quantizer gets, of a whole share
        with world.autocast():
            return torch.cat([ddt.quantizer.vectors(ddt.encoder(x)) for x in x0.tensor_split(parts)])

    with train.Run(folder, ddt, config, world, show=("mse", "mse_noise", "codes_used")) as run:
        for step in run:
            model.train()
            with world.autocast():
                x0 = ddt.latent(data[world.share(train.rows(config.seed, step, B, len(data)))]).float()
            generator = train.generator(config.seed, step)
            u = torch.rand(B, generator=generator)
            u = torch.where(torch.rand(B, generator=generator) < config.pure_noise, 1.0, u)
            noise = torch.randn(B, *x0.shape[1:], generator=generator)
            scale = config.token_noise if ddt.past_plateau else 0.0
            token_noise = scale * torch.randn(B, config.queries, ddt.quantizer.codebook.shape[1], generator=generator)
            u, noise, token_noise = (world.share(x).to(device) for x in (u, noise, token_noise))
            if step >= config.quantize_at * config.steps and not ddt.quantizer.active:
                rows = world.share(train.rows(config.seed, step, 16 * B, len(data)))
                ddt.quantizer.fill(vectors(torch.cat([ddt.latent(data[i]) for i in rows.split(at_a_time(device))])).flatten(0, 1))
                if not ddt.past_plateau:
                    world.say(f"step {step}: quantization starts, but the error at pure noise is still {ddt.noise_mse:.2f}: the "
                              "tokens say little. Give it more --steps, a later --quantize_at, or another --seed")
            others = of_all_ranks(vectors(x0)) if parts > 1 else None
            results, total = [], 0.0
            for part in run.accumulate(zip(*(x.tensor_split(parts) for x in (x0, u, noise, token_noise))), model):
                with world.autocast():
                    result = model(*part, others)
                loss = result["loss"].sum() / B
                (loss * world.size).backward()              # DDP averages over ranks: this makes it the sum
                total += loss.detach()
                results.append({k: x.detach() for k, x in result.items()})
            taken = run.step(total)
            result = {k: torch.cat([x[k] for x in results]) for k in results[0]}
            pure = u == 1
            at_noise = train.total(torch.stack([result["mse"][pure].sum(), pure.sum()]))
            if taken:
                ddt.quantizer.update(result["vectors"].flatten(0, 1), result["codes"].flatten())
                ddt.noise_mse.lerp_(at_noise[0] / at_noise[1].clamp(min=1), 0.05 if at_noise[1] else 0)
            run.log(mse=train.total(result["mse"].sum()) / B, mse_noise=ddt.noise_mse,
                    commitment=train.total(result["commitment"].sum()) / B, **ddt.quantizer.usage(result["codes"].flatten()))
    if world.is_main:
        reward.drop_rows(folder.parent / "results.json", "DDT", "SFT", "SFT + RL")
    train.finish(folder, ddt.save, config, ddt, world)
    return ddt.eval().requires_grad_(False)


def at_a_time(device) -> int:
    """
    Frames per call when there are thousands: on the CPU as many as its cache holds (2.7 times faster than 512), on a GPU such
    that SD3's VAE needs 6 GiB for 128 x 128 pixels (256 channels of fp32, three maps at once).
    """
    return 64 if torch.device(device).type == "cpu" else 128


def reconstruction(model: VAE | DDT) -> Callable[[Tensor], Tensor]:
    """A VAE or DDT as reward.evaluate wants it (with shown = 32): frames (B, F, 3, H, W) -> the same, reconstructed."""
    @torch.no_grad()
    def predict(frames: Tensor) -> Tensor:
        generator = torch.Generator(frames.device).manual_seed(0)
        parts = []
        for x in frames.flatten(0, 1).split(at_a_time(frames.device)):
            if isinstance(model, VAE):
                parts.append((model.decode(model.encode(2 * x - 1)) / 2 + 0.5).clamp(0, 1))
            else:
                parts.append(model.decode(model.encode(x), generator=generator))
        return torch.cat(parts).view_as(frames)
    return predict


def report(config, ddt: DDT, world: train.World) -> None:
    """The tokenizer's rows of the result table and its picture. What is there already is not done again."""
    picture = Path(config.out, "ddt", "reconstruction.png")
    if world.is_main:
        names, device, size = train.scenarios(config.scenario), world.device, ddt.config.size
        for row, predict in (("ground truth", lambda frames: frames), ("VAE", reconstruction(ddt.vae)),
                             ("DDT", reconstruction(ddt))):
            reward.add_row(Path(config.out, "results.json"), row, predict, names, sim.SHOWN, ddt.config.eval_clips,
                           size=size, shown=sim.FRAMES, device=device)
        if not picture.exists():
            clips = [sim.sample(name, split, 1, reward.EVAL_SEED)
                     for name in names for split in ("iid", "small", "large")]
            truth = [sim.render(c.position, c.radius, size).to(device) for c in clips]
            rows = [x for frames in truth for x in (frames[0], reconstruction(ddt)(frames)[0])]
            sim.save_strip(picture, rows, ["truth", "DDT"] * len(truth), pixels=64)
    train.wait(world)


def center_error(ddt: DDT, scenario: str, device, n: int = 32) -> tuple[float, int]:
    """Median distance of the found from the true centre, one-call reconstruction of in-distribution clips; codes used."""
    clips = sim.sample(scenario, "iid", n, reward.EVAL_SEED).to(device)
    frames = sim.render(clips.position, clips.radius, ddt.config.size)
    center, _, _ = reward.detect(reconstruction(ddt)(frames), clips.radius.shape[1])
    used = len(ddt.encode(frames.flatten(0, 1)).unique())
    return (center - clips.position).norm(dim=-1)[clips.inside].nanmedian().item(), used


def ensure(config, world: train.World) -> DDT:
    """The tokenizer of <out>: loaded, or made first, together with its VAE."""
    folder = Path(config.out, "ddt")
    if not (folder / "model.safetensors").exists():
        world.say(f"{folder} is missing: making it first. {EXPECTED.get(config.preset, '')}")
        main(train.handed_on(config))
    ddt = DDT.load(folder).to(world.device)
    check_scenario(config, ddt, folder)
    report(config, ddt, world)
    return ddt


def check_scenario(config, tokenizer, folder: Path) -> None:
    """Problem for a motion that a tokenizer was not trained on."""
    known = tokenizer.config.scenario
    train.need(set(train.scenarios(config.scenario)) <= set(train.scenarios(known)),
               f"--scenario {config.scenario}: {folder} was trained on {known}; choose another --out")


def main(argv: list[str] | None = None) -> None:
    config = c = train.parse(Config, PRESETS, argv)
    train.scenarios(c.scenario)
    shrink = 2 ** (c.vae_levels - 1) * c.patch
    has_vae = Path(c.out, "vae", VAE_WEIGHTS).exists() and not c.fresh
    train.need(0 <= c.quantize_at < 1, f"--quantize_at {c.quantize_at}: a share of the steps, below 1")
    train.need(c.order in ("forward", "reverse"), f"--order {c.order}: choose forward or reverse")
    train.need(c.prefix in ("growing", "all"), f"--prefix {c.prefix}: choose growing or all")
    train.need(c.code_dim >= 3, f"--code_dim {c.code_dim}: at least 3, for LayerNorm takes two dimensions away")
    train.need(c.token_noise >= 0, f"--token_noise {c.token_noise}: a standard deviation, at least 0")
    train.need(c.vae or c.size % shrink == 0, f"--size {c.size}: must be a multiple of {shrink}, what VAE and patches shrink it by")
    train.need(c.vae_width % 8 == 0, f"--vae_width {c.vae_width}: must be a multiple of 8 (its norms have 8 groups)")
    train.need(c.shift > 0, f"--shift {c.shift}: must be above 0; 1 leaves time as it is")
    train.need(c.query_width % c.heads == 0, f"--query_width {c.query_width}: must be a multiple of --heads {c.heads}")
    train.need(c.width % (4 * c.heads) == 0, f"--width {c.width}: must be a multiple of 4 times --heads {c.heads}")
    train.need(c.image_width % 4 == 0, f"--image_width {c.image_width}: must be a multiple of 4")
    if c.plan:
        return train.show_plan(plan, c)
    train.need(c.preset != "paper" or c.vae or has_vae, "the paper's tokenizer stands on a pre-trained VAE: name the folder "
               "of one with --vae, such as `vae` of stable-diffusion-3-medium-diffusers (python ddt.py --preset paper --vae DIR)")
    world = train.start(c.seed)
    train.check_fits(plan, c, world)
    out = train.writable(Path(c.out))
    train.occupy(out, world)
    foreign = VAE.load(c.vae).to(world.device) if c.vae else None       # before --fresh deletes: it may not be readable
    if c.fresh:
        if not c.vae or Path(c.vae).resolve() != (out / "vae").resolve():
            train.discard(out / "vae")
        train.discard(out / "ddt")
        Path(out, "ddt", "reconstruction.png").unlink(missing_ok=True)
    if foreign:
        vae = foreign_vae(c, foreign, world)
    elif has_vae:
        vae = own_vae(c, world)
    else:
        vae = train_vae(c, world)
    if train.is_trained(out / "ddt", "model.safetensors", c, world):
        ddt = DDT.load(out / "ddt").to(world.device)
    else:
        ddt = train_ddt(c, vae, world)
    report(c, ddt, world)
    if world.is_main:
        print(reward.table(out / "results.json"))
        for name in train.scenarios(c.scenario):
            median, used = center_error(ddt, name, world.device)
            print(f"\n{name}: median centre error {median:.4f} world units, {used} codes in use")
        print(f"picture: {out}/ddt/reconstruction.png")
    train.wait(world)


if __name__ == "__main__":
    train.cli(main)
