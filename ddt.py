"""
Stage 2, DDT: a frame becomes K discrete tokens, and the tokens become a frame.

    frame -> VAE -> latent -> Q-former: K learned queries attend to it -> linear, LayerNorm,
      normalised: K unit vectors -> VQ: each becomes the nearest of 256 codes
    codes -> MMDiT: denoises a latent, given the tokens -> VAE decoder -> frame

A code is an index, a vector is what is quantized, a token is what the decoder is given for it.

Diffusion timestep tokens. Training is a rectified flow: noise eps is mixed into the latent x_0,
x_t = t eps + (1 - t) x_0, and the decoder predicts x_0. At time t it is given a prefix of the
tokens, the first k of them, where k grows with t: one at little noise, all K at pure noise (t = 1).
Thus token i encodes what the noise destroys at the time at which the token is added.

Training in time:
    step 0      The decoder ignores the tokens and predicts the mean frame: its error at t = 1 is
                about 1, the variance of the latents. Vectors are not quantized.
    error < 0.5 The plateau has ended, tokens carry information: token noise (Gaussian noise on the
                vectors) and the crowding loss begin.
    step 600    Training restarts with other weights if the error at t = 1 is above 0.37: it usually
                is where tokens mix x, height and radius. (`tiny`, uniform motion only. 0.37 was
                chosen for these flags; with others set --restart_above, or --restart_at 0.)
    40 %        The codebook is filled, quantization begins, token noise ends; crowding stays.
    the end     The codes are numbered along a short closed path through them.

Source: Phys-AR (Lin et al. 2025, https://arxiv.org/abs/2504.15932), section 3.2 and appendix A.1.
MMDiT: Stable Diffusion 3, Esser et al. 2024, https://arxiv.org/abs/2403.03206.

Differences from the paper, and choices where it is silent (docs/RESULTS.md, 8)
1. Time is skewed to noise: u ~ U(0, 1), but u = 1 in 3 of 10 samples; t = s u / (1 + (s - 1) u),
   s = 20 (8 at `small`, and with other motions than uniform); k = ceil(u K). Up to t = 0.95 balls
   show through, and no token is needed.
2. A frame is decoded by one call at t = 1 with all tokens; `decode` can also take Euler steps.
3. Quantization starts late: a codebook of an encoder that has learnt nothing is worth nothing.
4. `tiny` and `small` have codes of 3 dimensions. LayerNorm leaves of them a closed curve: a code is
   an angle and has room for one quantity only.
5. A linear layer per token, large position vectors and token noise keep different tokens from
   encoding the same. The crowding loss spreads the vectors of one token over its curve.
6. In the encoder the latent attends to itself only, the queries to both ("unified-direction").
7. q and k are RMS-normalised before attention, which keeps bf16 stable.
8. A LayerNorm precedes the normalisation of the vectors: without it all fell to one code.
9. The commitment loss is a mean over tokens, times 0.25; the paper has a sum and no weight.
10. At `tiny` and `small` the VAE encodes a sample of the frames once, not frames in every step.

    python ddt.py                       # trains <out>/ddt (and first <out>/vae, if it is missing)
    python ddt.py --steps 8000          # any field of Config is a flag
    python ddt.py --vae DIR             # on a VAE in diffusers' layout

Expected at `tiny` on 2 CPU cores: 4 to 10 minutes; median centre error of a reconstructed ball 0.02
to 0.05 world units (a frame is 10 wide), all 256 codes in use. In uniform motion the error at
t = 1 (mse_noise) ends at 0.004 to 0.007; where the tokens were mixed it ended at 0.05.

Axes: B batch (b this rank's shard), F frames, C channels, H W pixels, h w cells of the latent, L
patches, K tokens of a frame, D width of a stream, d of a head, V codes, dim of a code, n any rows.
"""
import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)    # Ctrl-C during the imports: no traceback

import dataclasses
import math
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as nnf
from einops import rearrange
from torch import Tensor, nn

import checkpoint
import evaluate
import pictures
import reward
import sim
import train
import vae as vae_stage
from checkpoint import UserError, check
from sim import CONDITION
from vae import VAE, Frames, check_ranges, frames_per_call, load_folder, millions, save_folder

# ------------------------------------------------------------------ config


@dataclass
class Config:
    # run
    preset: str = "tiny"        # named set of defaults: tiny, small or paper
    out: str = ""               # run folder (empty: runs/<preset>)
    seed: int = 0               # seed of weights, data order and noise
    fresh: bool = False         # train this stage's model again; the old one stays until the end
    save_every: int = 200       # steps between two checkpoints
    compile: int = 1            # compile the blocks on a GPU; 0: no, which starts sooner
    # data
    scenario: str = "uniform"   # motion (sets defaults, too): uniform, parabola, collision, or all
    clips: int = 6000           # training clips (of 32 frames) per motion
    frames: int = 49152         # frames to train on, encoded once (if all there are: in each step)
    size: int = 32              # pixels per side of a frame
    vae: str = ""               # folder of a VAE in diffusers' layout (empty: <out>/vae)
    # model
    queries: int = 3            # tokens per frame, K
    code_dim: int = 3           # dimensions of a code; of 3 an angle is left (head of ddt.py, 4)
    prefix: str = "growing"     # tokens that the decoder is given in training: growing, or all
    order: str = "forward"      # codes as encode returns them: forward (token 1 first) or reverse
    patch: int = 2              # cells of the latent per side of a patch
    image_width: int = 64       # encoder: width of the latent's stream
    query_width: int = 128      # encoder: width of the queries' stream
    encoder_layers: int = 2     # encoder: dual-stream blocks
    width: int = 128            # decoder: width of both streams
    layers: int = 3             # decoder: dual-stream blocks
    heads: int = 4              # attention heads of encoder and decoder
    # loss
    shift: float = 20.0         # s of the time t = s u / (1 + (s - 1) u); 1: uniform
    pure_noise: float = 0.3     # share of the samples with t = 1
    quantize_at: float = 0.4    # share of the steps after which quantization starts
    commitment: float = 0.25    # weight of the commitment loss
    token_noise: float = 0.05   # std of the noise on the vectors, until quantization starts
    spread: float = 0.02        # weight of the crowding loss
    noise_below: float = 0.5    # the plateau ends when the error at t = 1 falls below this
    # optimization
    steps: int = 3000           # optimizer steps
    batch: int = 64             # frames per step, over all ranks
    micro_batch: int = 0        # frames per backward pass and rank; 0: the whole shard at once
    lr: float = 1.5e-3          # peak learning rate
    warmup: int = 800           # steps of linear warm-up; a long one shortens the plateau
    restart_at: int = 0         # step at which training restarts if the error is large; 0: never
    restart_above: float = 0.37     # error at t = 1 that is too large at step restart_at
    beta1: float = 0.9          # AdamW: decay of the mean of gradients
    beta2: float = 0.99         # AdamW: decay of the mean of their squares
    eps: float = 1e-8           # AdamW: added to the root of the mean square
    weight_decay: float = 0.0   # AdamW: on matrices only
    max_grad_norm: float = 1.0  # gradient clipping; 0: none
    # evaluation
    eval_clips: int = 32        # clips per split of the reconstruction table


# `paper` is Table 3 and appendix A.1. Where they contradict themselves: frames are 128 x 128, of
# which a VAE that shrinks 8 times leaves 256 latent vectors at patch 1 (1024 are those of 256 x
# 256); the encoder is 128 wide for the latent and 256 for the queries ("latent dimension 128", yet
# tokens of 256). No gradient clipping is stated. Parameters: encoder 12.5M, decoder 111.1M;
# `small`: 8.2M, 30.6M; `tiny`: 0.49M, 1.66M.
#
# `small`, for one GPU of 80 GB: 1.38 TFLOP per step, which took 61 ms on an H200 that was busy a
# quarter of the time: 2000 steps take 122 s, compiling 42 s.
PRESETS = {
    "tiny": dict(restart_at=600),
    # other motions (RESULTS, 6)
    "tiny other": dict(queries=4, shift=8.0, steps=4000, restart_at=0),
    "small": dict(scenario="all", clips=20000, frames=150_000, size=128, queries=6,
                  image_width=128, query_width=384, encoder_layers=4, width=384, layers=6, heads=6,
                  shift=8.0, steps=2000, batch=256, lr=8e-4, warmup=400, save_every=1000),
    "paper": dict(scenario="all", clips=3_000_000, frames=300_000_000, size=128, queries=16,
                  code_dim=16, token_noise=0.2, patch=1, image_width=128, query_width=256,
                  encoder_layers=12, width=512, layers=12, heads=8, steps=140_000, batch=1024,
                  lr=1e-4, warmup=5000, eps=1e-6, max_grad_norm=0.0, eval_clips=1000),
}
EXPECTED = {"tiny": "4 to 10 minutes on 2 CPU cores.",
            "small": "3 minutes on one H200.", "paper": "Not run yet."}

MODEL = "model.safetensors"     # the weights, in a model's folder
MAX_RESTARTS = 9                # after so many, training goes on whatever the error

# ------------------------------------------------------------------ quantizer


class TokenLinear(nn.Module):
    """A linear layer of its own for each of K tokens: (B, K, d_in) -> (B, K, d_out)."""

    def __init__(self, tokens: int, d_in: int, d_out: int):
        super().__init__()
        bound = d_in ** -0.5                                # as nn.Linear
        self.weight = nn.Parameter(torch.empty(tokens, d_in, d_out).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(tokens, d_out).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bki,kio->bko", x, self.weight) + self.bias


def all_reduce(x: Tensor) -> Tensor:
    """Sum over all ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def all_gather(x: Tensor) -> Tensor:
    """
    Rows (n, ...) of each rank -> those of all, in the order of the ranks, without gradient. n may
    differ between ranks, which dist.all_gather does not allow: each rank adds its rows to zeros.
    """
    x = x.detach()
    if not dist.is_initialized():
        return x
    sizes = torch.zeros(dist.get_world_size(), dtype=torch.int64, device=x.device)
    sizes[dist.get_rank()] = len(x)
    all_reduce(sizes)
    end = sizes.cumsum(0)[dist.get_rank()]
    rows = x.new_zeros(int(sizes.sum()), *x.shape[1:])
    rows[end - len(x):end] = x
    return all_reduce(rows)


class EMAVectorQuantizer(nn.Module):
    """
    Nearest of V codes by cosine similarity. The codes follow the vectors that are matched with them
    by exponential moving averages (EMA): van den Oord et al. 2017, appendix A.1,
    https://arxiv.org/abs/1711.00937. Statistics are summed over the ranks, which keeps their
    codebooks identical.

    fill(z)             once, to start quantizing; before, vectors pass through as they are
    forward(x)          in every step
    update(z, codes)    after every optimizer step; not after one that was skipped
    number()            at the end: codes i and i + 1 are neighbours

    project: module (B, K, D) -> (B, K, dim), such as nn.Linear(D, dim).
    """

    def __init__(self, project: nn.Module, codes: int = 256, dim: int = 16, decay: float = 0.95,
                 dead_below: float = 0.2):
        super().__init__()
        self.decay, self.dead_below = decay, dead_below
        self.project = project
        self.norm = nn.LayerNorm(dim)       # without it all vectors fell to one code
        codebook = nnf.normalize(torch.randn(codes, dim), dim=-1)
        self.register_buffer("codebook", codebook)          # (V, dim)
        self.register_buffer("count", torch.ones(codes))    # EMA of the matches of a code
        self.register_buffer("sum", codebook.clone())       # EMA of the sum of matched vectors
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))     # seed of revivals
        self.register_buffer("active", torch.zeros((), dtype=torch.bool))       # quantizing

    def vectors(self, x: Tensor) -> Tensor:
        """Encoder outputs (B, K, D) -> unit vectors (B, K, dim)."""
        return nnf.normalize(self.norm(self.project(x.float())), dim=-1)

    def nearest(self, z: Tensor) -> Tensor:
        """Unit vectors (..., dim) -> index of the most similar code (...)."""
        # fp64: on a curve a code's cosine with its neighbour is 1 - 3e-4, and tf32 rounds at 5e-4
        codebook = self.codebook.T.double()                 # (dim, V)
        parts = z.reshape(-1, z.shape[-1]).split(1024)      # 1024 x V cosines fit a CPU's cache
        # max: on a CPU faster than argmax
        codes = [(part.double() @ codebook).max(-1).indices for part in parts]
        return torch.cat(codes).view(z.shape[:-1])

    def forward(self, x: Tensor,
                noise: Tensor | float = 0.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """
        x (B, K, D) -> vectors for the decoder (B, K, dim), codes (B, K), commitment loss (B,) and
        the unit vectors (B, K, dim), which `update` is given with the codes.
        noise (B, K, dim) is added to the vectors as long as they are not quantized.
        """
        with torch.autocast(x.device.type, enabled=False):  # fp32: in bf16 near vectors are equal
            z = self.vectors(x)                             # (B, K, dim)
            codes = self.nearest(z)                         # (B, K)
            if not self.active:
                return nnf.normalize(z + noise, dim=-1), codes, z.new_zeros(len(z)), z
            quantized = self.codebook[codes]                # (B, K, dim)
            commitment = (z - quantized).square().sum(-1).mean(-1)      # mean over the tokens
            straight_through = z + (quantized - z).detach()             # gradient as of z
            return straight_through, codes, commitment, z

    @torch.no_grad()
    def update(self, z: Tensor, codes: Tensor, decay: float | None = None) -> None:
        """
        One EMA step with vectors z (n, dim) matched with codes (n,), then the revival of dead
        codes: those matched too rarely move to random vectors. Does nothing before `fill`. decay
        overrides the quantizer's.
        """
        if not self.active:
            return
        rate = 1 - (self.decay if decay is None else decay)
        V, (n, dim) = len(self.codebook), z.shape
        rows = torch.cat([z.new_ones(n, 1), z], 1)                                  # (n, 1 + dim)
        sums = all_reduce(z.new_zeros(V, 1 + dim).index_add_(0, codes, rows))
        count, total = sums[:, 0], sums[:, 1:]                                      # (V,), (V, dim)
        self.count.lerp_(count, rate)
        self.sum.lerp_(total, rate)
        self.codebook.copy_(nnf.normalize(self.sum, dim=-1))

        mean_count = count.sum() / V
        dead = self.count < self.dead_below * mean_count
        self.move(dead, self.random_vectors(z), mean_count)         # with less, dead again at once
        self.updates += 1

    def move(self, mask: Tensor, z: Tensor, count: Tensor) -> None:
        """Moves the codes in the mask (V,) to z (V, dim), as if each had `count` matches there."""
        # torch.where: a mask as index would make the CPU wait for a GPU
        self.codebook.copy_(torch.where(mask[:, None], z, self.codebook))
        self.count.copy_(torch.where(mask, count, self.count))
        self.sum.copy_(torch.where(mask[:, None], z * count, self.sum))

    def random_vectors(self, z: Tensor) -> Tensor:
        """V random rows of z (n, dim) of all ranks, the same on every rank -> (V, dim)."""
        rows = all_gather(z)
        generator = torch.Generator().manual_seed(int(self.updates))
        drawn = torch.randint(len(rows), (len(self.codebook),), generator=generator)
        return rows[drawn.to(z.device)]

    @torch.no_grad()
    def fill(self, z: Tensor) -> None:
        """
        Starts quantizing: the codes are random vectors of z (n, dim), then 10 rounds of k-means.
        If z is larger than the batches of later updates, the counts start too high. That does no
        harm: until they have decayed (80 updates for 16 batches) codes move slowly, none is dead.
        """
        n = all_reduce(torch.tensor(float(len(z)), device=z.device))
        everywhere = torch.ones_like(self.count, dtype=torch.bool)
        self.move(everywhere, self.random_vectors(z), n / len(self.codebook))
        self.active.fill_(True)
        for _ in range(10):                 # with decay 0 a code becomes the mean of its vectors
            self.update(z, self.nearest(z), decay=0.0)

    @torch.no_grad()
    def number(self) -> None:
        """
        Renumbers the codes along `closed_path`: where the codes are a circle, as those of 3
        dimensions are, a code is an angle. What is encoded and decoded stays the same.
        """
        order = closed_path(self.codebook)
        for x in (self.codebook, self.count, self.sum):
            x.copy_(x[order])

    def usage(self, codes: Tensor) -> dict[str, float]:
        """
        For the log: how many codes of a step are distinct, and the perplexity of their shares, over
        all ranks. codes (n,): this rank's. 0 before `fill`.
        """
        if not self.active:
            return {"codes_used": 0, "perplexity": 0.0}
        count = all_reduce(torch.bincount(codes, minlength=len(self.codebook)).float())
        share = count / count.sum()
        perplexity = math.exp(torch.special.entr(share).sum())
        return {"codes_used": int((count > 0).sum()), "perplexity": perplexity}


def closed_path(points: Tensor) -> Tensor:
    """
    points (V, dim) -> their order (V,) along a short closed path: greedily to the nearest point not
    yet visited, then 2-opt (segments are reversed while that shortens the path). Cut open at the
    longest edge.
    """
    # fp64: neighbours are near; on the CPU, so that all ranks find the same path
    points = points.double().cpu()
    distance = (points[:, None] - points).norm(dim=-1)                          # (V, V)
    unvisited, path = distance.clone(), [0]                                     # inf: visited
    for _ in range(len(points) - 1):
        unvisited[:, path[-1]] = math.inf
        path.append(int(unvisited[path[-1]].argmin()))
    path, shorter = torch.tensor(path), True
    while shorter:
        shorter = False
        for i in range(len(path) - 1):
            # edges a-b and c-d become a-c and b-d: the segment b ... c is reversed
            a, b, c, d = path[i], path[i + 1], path[i + 1:], path.roll(-1)[i + 1:]
            change = distance[a, c] + distance[b, d] - distance[a, b] - distance[c, d]
            j = int(change.argmin())
            if change[j] < -1e-9:
                path[i + 1:i + 2 + j] = path[i + 1:i + 2 + j].flip(0)
                shorter = True
    longest = int(distance[path, path.roll(-1)].argmax())
    return path.roll(-1 - longest)


def crowding(z: Tensor, others: Tensor) -> Tensor:
    """
    How near unit vectors z (B, K, dim) are to those of the same token in others (n, K, dim) ->
    (B,), log of the mean of exp(-2 distance^2), mean over the tokens. 0 if all are equal, less if
    they are spread: as a loss, it pushes them apart.
    Uniformity, Wang and Isola 2020, https://arxiv.org/abs/2005.10242.
    """
    cosine = torch.einsum("bkd,nkd->bkn", z, others)        # distance^2 = 2 - 2 cosine
    return ((4 * cosine - 4).logsumexp(-1) - math.log(len(others))).mean(-1)


# ------------------------------------------------------------------ transformers


def sincos(positions: Tensor, width: int, period: float = 10000.0) -> Tensor:
    """Positions (...,) -> sinusoidal features (..., width)."""
    exponents = torch.arange(width // 2, device=positions.device) / (width // 2)
    frequency = torch.exp(-math.log(period) * exponents)
    angle = positions[..., None].float() * frequency
    return torch.cat([angle.sin(), angle.cos()], -1)


def sincos_2d(side: int, width: int) -> Tensor:
    """Positions of a side x side grid -> (side * side, width): half row, half column."""
    x = sincos(torch.arange(side), width // 2)              # (side, width / 2)
    row = x[:, None].expand(-1, side, -1)                   # (side, side, width / 2)
    column = x[None].expand(side, -1, -1)
    return torch.cat([row, column], -1).flatten(0, 1)


def patchify(x: Tensor, p: int) -> Tensor:
    return rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=p, q=p)


def unpatchify(x: Tensor, p: int, side: int) -> Tensor:
    return rearrange(x, "b (h w) (c p q) -> b c (h p) (w q)", p=p, q=p, h=side)


class Modulation(NamedTuple):
    """adaLN-zero: shift and scale of a layer's normalised input, gate of its output, (B, 1, D)."""
    shift: Tensor
    scale: Tensor
    gate: Tensor | None = None


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale) + shift


class Stream(nn.Module):
    """
    The layers of one stream (modality) of a dual-stream block. It has no forward of its own:
    QFormer.block and MMDiT.block, below, connect two of them.

    inner            heads x d of the attention, equal in both streams
    condition_width  width of the vector that modulates the stream; 0: it is not modulated
    last             the output after this block is not used: no output projection, no MLP
    """

    def __init__(self, width: int, inner: int, heads: int, condition_width: int = 0,
                 last: bool = False):
        super().__init__()
        self.heads, self.last = heads, last
        affine = not condition_width
        self.norm1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=affine)
        self.qkv = nn.Linear(width, 3 * inner)
        if condition_width:
            self.modulation = nn.Linear(condition_width, (2 if last else 6) * width)
            nn.init.zeros_(self.modulation.weight)
            nn.init.zeros_(self.modulation.bias)
        if not last:
            self.out = nn.Linear(inner, width)
            self.norm2 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=affine)
            self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"),
                                     nn.Linear(4 * width, width))

    def modulations(self, condition: Tensor) -> tuple[Modulation, Modulation | None]:
        """condition (B, condition_width) -> modulation of the attention and of the MLP."""
        x = self.modulation(nnf.silu(condition))[:, None]   # (B, 1, 6 D), or 2 D
        if self.last:
            return Modulation(*x.chunk(2, -1)), None
        x = x.chunk(6, -1)
        return Modulation(*x[:3]), Modulation(*x[3:])

    def qkv_heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, L, D) -> q, k, v (B, heads, L, d) each, q and k RMS-normalised."""
        axes = "b l (three heads d) -> three b heads l d"
        q, k, v = rearrange(self.qkv(x), axes, three=3, heads=self.heads)
        return nnf.rms_norm(q, q.shape[-1:]), nnf.rms_norm(k, k.shape[-1:]), v

    def project_out(self, attended: Tensor) -> Tensor:
        """(B, heads, L, d) -> (B, L, D)."""
        return self.out(rearrange(attended, "b heads l d -> b l (heads d)"))


class QFormer(nn.Module):
    """
    K learned queries attend to a latent (B, channels, side, side) -> (B, K, query_width). Two
    streams: the latent attends to itself, the queries to both.
    """

    def __init__(self, channels: int, side: int, queries: int, patch: int = 2,
                 image_width: int = 64, query_width: int = 128, layers: int = 2, heads: int = 4):
        super().__init__()
        self.patch = patch
        self.latent_in = nn.Linear(channels * patch ** 2, image_width)
        position = sincos_2d(side // patch, image_width)
        self.register_buffer("position", position, persistent=False)
        self.queries = nn.Parameter(torch.randn(queries, query_width))
        self.image_blocks = nn.ModuleList(
            Stream(image_width, query_width, heads, last=i == layers - 1) for i in range(layers))
        self.query_blocks = nn.ModuleList(
            Stream(query_width, query_width, heads) for i in range(layers))
        self.norm = nn.LayerNorm(query_width, eps=1e-6)

    def forward(self, latent: Tensor) -> Tensor:            # (B, C, h, w)
        x = self.latent_in(patchify(latent, self.patch)) + self.position       # (B, L, image_width)
        # contiguous, here and in MMDiT: else torch.compile would compile the first block separately
        y = self.queries.expand(len(x), -1, -1).contiguous()                   # (B, K, query_width)
        for image, query in zip(self.image_blocks, self.query_blocks):
            x, y = self.block(image, query, x, y)
        return self.norm(y)                                                    # (B, K, query_width)

    @staticmethod
    def block(image: Stream, query: Stream, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """One dual-stream block: latent x (B, L, image_width) and queries y (B, K, query_width)."""
        # queries, keys and values of both streams
        xq, xk, xv = image.qkv_heads(image.norm1(x))         # (B, heads, L, d)
        yq, yk, yv = query.qkv_heads(query.norm1(y))         # (B, heads, K, d)

        # the queries' stream: attention to both streams, then MLP
        k, v = torch.cat([xk, yk], 2), torch.cat([xv, yv], 2)                 # (B, heads, L + K, d)
        y = y + query.project_out(nnf.scaled_dot_product_attention(yq, k, v))
        y = y + query.mlp(query.norm2(y))

        # the latent's stream: attention to itself, then MLP; not used after the last block
        if not image.last:
            x = x + image.project_out(nnf.scaled_dot_product_attention(xq, xk, xv))
            x = x + image.mlp(image.norm2(x))
        return x, y


class MMDiT(nn.Module):
    """
    SD3's denoiser: a noisy latent (B, channels, side, side) and tokens (B, K, code_dim), two
    streams joined in one attention and modulated by the time t. It predicts the clean latent x_0.
    """

    def __init__(self, channels: int, side: int, n_tokens: int, code_dim: int, patch: int = 2,
                 width: int = 128, layers: int = 3, heads: int = 4):
        super().__init__()
        self.patch, self.grid = patch, side // patch
        self.latent_in = nn.Linear(channels * patch ** 2, width)
        self.token_in = TokenLinear(n_tokens, code_dim, width)
        position = sincos_2d(self.grid, width)
        self.register_buffer("position", position, persistent=False)
        # std 0.5, not the usual 0.02: tokens must be told apart from the start, or several of them
        # learn the same
        self.token_position = nn.Parameter(0.5 * torch.randn(n_tokens, width))
        self.time = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.image_blocks = nn.ModuleList(
            Stream(width, width, heads, condition_width=width) for i in range(layers))
        self.token_blocks = nn.ModuleList(
            Stream(width, width, heads, condition_width=width, last=i == layers - 1)
            for i in range(layers))
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.modulation = nn.Linear(width, 2 * width)
        self.latent_out = nn.Linear(width, channels * patch ** 2)
        for layer in (self.modulation, self.latent_out):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, latent: Tensor, t: Tensor, tokens: Tensor, k: Tensor) -> Tensor:
        """
        Noisy latent x_t (B, C, h, w), t (B,), tokens (B, K, code_dim), of which the first k (B,)
        are visible -> x_0 (B, C, h, w). t and k may be (1,), the same for all. The other tokens are
        masked as keys in every block: they have exactly no influence.
        """
        visible = torch.arange(tokens.shape[1], device=k.device) < k[:, None]   # (B, K)
        x = self.latent_in(patchify(latent, self.patch)) + self.position        # (B, L, D)
        y = (self.token_in(tokens) + self.token_position).contiguous()          # (B, K, D)
        condition = self.time(sincos(1000 * t, 256).to(x.dtype))                # (B, D)
        mask = nnf.pad(visible, (x.shape[1], 0), value=True)                    # (B, L + K)
        mask = mask[:, None, None]                                              # (B, 1, 1, L + K)
        for image, token in zip(self.image_blocks, self.token_blocks):
            x, y = self.block(image, token, x, y, condition, mask)
        shift, scale = self.modulation(nnf.silu(condition))[:, None].chunk(2, -1)
        x = self.latent_out(modulate(self.norm(x), shift, scale))               # (B, L, C p p)
        return unpatchify(x, self.patch, self.grid)

    @staticmethod
    def block(image: Stream, token: Stream, x: Tensor, y: Tensor, condition: Tensor,
              mask: Tensor) -> tuple[Tensor, Tensor]:
        """One dual-stream block: latent x (B, L, D), tokens y (B, K, D), condition (B, D)."""
        # modulations of the attention (1) and of the MLP (2)
        x_mod1, x_mod2 = image.modulations(condition)
        y_mod1, y_mod2 = token.modulations(condition)

        # queries, keys and values of both streams
        x_normed = modulate(image.norm1(x), x_mod1.shift, x_mod1.scale)
        y_normed = modulate(token.norm1(y), y_mod1.shift, y_mod1.scale)
        xq, xk, xv = image.qkv_heads(x_normed)              # (B, heads, L, d)
        yq, yk, yv = token.qkv_heads(y_normed)              # (B, heads, K, d)

        # one attention over both
        q = torch.cat([xq, yq], 2)                          # (B, heads, L + K, d)
        k = torch.cat([xk, yk], 2)
        v = torch.cat([xv, yv], 2)
        attended = nnf.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x_attended, y_attended = attended.split([x.shape[1], y.shape[1]], 2)

        # the latent's stream
        x = x + x_mod1.gate * image.project_out(x_attended)
        x = x + x_mod2.gate * image.mlp(modulate(image.norm2(x), x_mod2.shift, x_mod2.scale))

        # the tokens' stream; not used after the last block
        if not token.last:
            y = y + y_mod1.gate * token.project_out(y_attended)
            y = y + y_mod2.gate * token.mlp(modulate(token.norm2(y), y_mod2.shift, y_mod2.scale))
        return x, y


# ------------------------------------------------------------------ the tokenizer


class DDT(nn.Module):
    """
    The whole: VAE (frozen), Q-former, quantizer, MMDiT. Raises ValueError for frames that VAE and
    patches cannot divide.
    """

    def __init__(self, config: Config, vae: VAE):
        super().__init__()
        self.config, self.vae = config, vae.eval().requires_grad_(False)
        c, channels, side = config, vae.config["latent_channels"], config.size // vae.shrink
        if c.size % (vae.shrink * c.patch):
            raise ValueError(f"--size {c.size} must be a multiple of {vae.shrink * c.patch} (VAE "
                             f"{vae.shrink} x patch {c.patch})")
        self.encoder = QFormer(channels, side, c.queries, c.patch, c.image_width, c.query_width,
                               c.encoder_layers, c.heads)
        project = TokenLinear(c.queries, c.query_width, c.code_dim)
        self.quantizer = EMAVectorQuantizer(project, dim=c.code_dim)
        self.decoder = MMDiT(channels, side, c.queries, c.code_dim, c.patch, c.width, c.layers,
                             c.heads)
        self.register_buffer("mse_noise", torch.ones(()))   # running mean of the error at t = 1

    def train(self, mode: bool = True):
        super().train(mode)
        self.vae.eval()
        return self

    @property
    def past_plateau(self) -> bool:
        """Whether tokens carry information; while they do, noise and crowding keep them apart."""
        return bool(self.mse_noise < self.config.noise_below)

    def times(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """u (B,) in [0, 1] -> time t (B,) in [0, 1], and the number of visible tokens k (B,)."""
        s = self.config.shift
        t = s * u / (1 + (s - 1) * u)
        share = u if self.config.prefix == "growing" else torch.ones_like(u)
        return t, torch.ceil(share * self.config.queries).long()

    def forward(self, latent: Tensor, u: Tensor, noise: Tensor, token_noise: Tensor | float = 0.0,
                others: Tensor | None = None) -> dict[str, Tensor]:
        """
        The loss of training, per sample:
        mean of (d(x_t, t, first k tokens) - x_0)^2 + 0.25 commitment + 0.02 crowding (if past the
        plateau).

        latent x_0 (B, C, h, w), u (B,), noise like x_0, token_noise (B, K, dim). others (n, K,
        dim): the vectors of the global batch; None: those of these latents, on all ranks.
        -> {loss, mse, commitment, crowding: (B,) each; codes (B, K); vectors (B, K, dim)}.
        """
        c = self.config
        tokens, codes, commitment, z = self.quantizer(self.encoder(latent), token_noise)
        t, k = self.times(u)                                                    # (B,) each
        x_t = t[:, None, None, None] * noise + (1 - t[:, None, None, None]) * latent
        clean = self.decoder(x_t, t, tokens, k)                                 # (B, C, h, w)
        mse = (clean - latent).square().mean((1, 2, 3))                         # (B,)
        with torch.autocast(z.device.type, enabled=False):  # fp32, as in the quantizer
            crowd = crowding(z, all_gather(z) if others is None else others)    # (B,)
        loss = mse + c.commitment * commitment
        if self.past_plateau:
            loss = loss + c.spread * crowd
        return {"loss": loss, "mse": mse, "commitment": commitment, "crowding": crowd,
                "codes": codes, "vectors": z.detach()}

    @torch.no_grad()
    def latent(self, frames: Tensor) -> Tensor:
        """frames (B, 3, H, W) in [0, 1] -> VAE latents (B, C, h, w)."""
        return self.vae.encode(2 * frames - 1)

    def vectors(self, latent: Tensor) -> Tensor:
        """VAE latents (B, C, h, w) -> the unit vectors to be quantized (B, K, dim)."""
        return self.quantizer.vectors(self.encoder(latent))

    @torch.no_grad()
    def encode(self, frames: Tensor) -> Tensor:
        """frames (B, 3, H, W) in [0, 1] or ValueError -> codes (B, K), int64, in config.order."""
        frames = checked_frames(frames, self.config.size)
        return self.ordered(self.quantizer.nearest(self.vectors(self.latent(frames))))

    def ordered(self, codes: Tensor) -> Tensor:
        """codes (..., K), token 1 first -> in config.order; and back."""
        return codes.flip(-1) if self.config.order == "reverse" else codes

    @torch.no_grad()
    def decode(self, codes: Tensor, steps: int = 1,
               generator: torch.Generator | list[torch.Generator] | None = None) -> Tensor:
        """
        codes (B, K), of any integer type -> frames (B, 3, H, W) in [0, 1], from the generator's
        noise, by `steps` calls of the decoder. Of a list, each generator draws for an equal share
        of the rows, such as a clip's frames. ValueError for wrong codes, steps or list.
        """
        codebook = self.quantizer.codebook
        codes = checked_codes(codes, self.config.queries, len(codebook)).to(codebook.device)
        if steps < 1:
            raise ValueError(f"steps = {steps}: at least one call of the decoder")
        generators = generator if isinstance(generator, list) else [generator]
        if not generators or len(codes) % len(generators):
            raise ValueError(f"{len(codes)} frames cannot be shared by {len(generators)} "
                             "generators")
        channels, side = self.vae.config["latent_channels"], self.config.size // self.vae.shrink
        shape = (len(codes) // len(generators), channels, side, side)
        noise = torch.cat([torch.randn(shape, generator=g, device=codes.device)
                           for g in generators])                                # (B, C, h, w)
        tokens = codebook[self.ordered(codes)]                                  # (B, K, dim)
        latent = self.sample(tokens, noise, steps)                              # (B, C, h, w)
        return (self.vae.decode(latent) / 2 + 0.5).clamp(0, 1)

    def sample(self, tokens: Tensor, x: Tensor, steps: int) -> Tensor:
        """
        Euler steps of the flow dx/dt = eps - x_0 = (x - x_0) / t, given tokens (B, K, code_dim),
        from noise x (B, C, h, w) at t = 1 to a latent:
        x + (t_next - t) (x - x_0) / t = x_0 + (t_next / t) (x - x_0).
        """
        grid = torch.linspace(1, 0, steps + 1, device=x.device)
        for u, u_next in zip(grid[:-1], grid[1:]):
            t, k = self.times(u[None])                      # (1,): the same for all
            t_next = self.times(u_next)[0]
            clean = self.decoder(x, t, tokens, k)
            x = clean + (t_next / t)[:, None, None, None] * (x - clean)
        return x

    def save(self, folder) -> None:
        save_folder(folder, {"ddt": described(self.config), "vae": self.vae.config}, self, MODEL)

    @classmethod
    def load(cls, folder) -> "DDT":
        """A folder written by `save`. Raises UserError for what is missing, damaged or unfit."""
        return load_model(folder, "tokenizer",
                          lambda config: cls(Config(**config["ddt"]), VAE(**config["vae"])))


def checked_frames(frames: Tensor, size: int) -> Tensor:
    """Frames to be encoded, in fp32. ValueError for another shape or range."""
    if frames.ndim != 4 or frames.shape[1:] != (3, size, size):
        raise ValueError(f"this tokenizer encodes frames (B, 3, {size}, {size}); got "
                         f"{tuple(frames.shape)}")
    sim.check_frames(frames)
    return frames.float()


def checked_codes(codes: Tensor, K: int, V: int) -> Tensor:
    """Codes to be decoded, in int64. ValueError for another shape, type or range."""
    if codes.ndim != 2 or codes.shape[1] != K or not len(codes):
        raise ValueError(f"codes must be (B, {K}); got {tuple(codes.shape)}")
    if codes.dtype == torch.bool or codes.is_floating_point() or codes.is_complex():
        raise ValueError(f"codes are {codes.dtype}: they must be integers")
    codes = codes.long()
    lowest, highest = codes.min().item(), codes.max().item()
    if lowest < 0 or highest >= V:
        raise ValueError(f"codes must be in [0, {V}); got {lowest} to {highest}")
    return codes


def check_first_frames(frames: Tensor, size: int) -> None:
    """ValueError unless these can be the first frames of clips: (B, 3, 3, size, size) in [0, 1]."""
    if frames.ndim != 5 or frames.shape[1:] != (CONDITION, 3, size, size):
        raise ValueError(f"a clip is predicted from its first {CONDITION} frames (B, {CONDITION}, "
                         f"3, {size}, {size}); got {tuple(frames.shape)}")
    sim.check_frames(frames)


def clip_generators(frames: Tensor, seed: int = 0) -> list[torch.Generator]:
    """
    A generator for each clip of frames (B, F, 3, H, W), a function of the seed and of the clip's
    first 3 frames: what it draws for a clip does not depend on the batch that the clip is in.
    """
    first = sim.to_uint8(frames[:, :CONDITION]).cpu().numpy()
    return [train.generator(seed, zlib.crc32(clip.tobytes()), device=frames.device)
            for clip in first]


def described(config) -> dict:
    """The fields of a config that are kept with the weights."""
    left_out = ("out", "vae", "fresh", "save_every", "compile")
    return {k: v for k, v in dataclasses.asdict(config).items() if k not in left_out}


def load_model(folder, kind: str, build: Callable[[dict], nn.Module]) -> nn.Module:
    """Builds the model of a folder's config.json and loads its weights. Raises UserError."""
    config, tensors = load_folder(folder, MODEL)
    try:
        model = build(config)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder}/config.json is not that of a {kind} of this version "
                        f"({error})") from None
    checkpoint.load_state(model, tensors, Path(folder))
    return model.eval().requires_grad_(False)


# ------------------------------------------------------------------ training


class Latents:
    """
    The latents (C, h, w) of config.frames random frames of the training clips, a function of the
    seed. They are encoded here, once, each rank its shard. If there are not more frames than that,
    none is kept: a frame is encoded when it is indexed.
    """

    def __init__(self, tokenizer: DDT, config: Config, world: train.World):
        self.tokenizer, self.world = tokenizer, world
        self.data = Frames(config, world.device)
        self.n = min(config.frames, len(self.data))
        self.kept = None                                                        # (n, C, h, w)
        if self.n < len(self.data):
            drawn = torch.randperm(len(self.data), generator=train.generator(config.seed))
            calls = world.shard(drawn[:self.n]).split(frames_per_call(world.device))
            self.kept = all_gather(torch.cat([self.encode(index) for index in calls]))

    def __len__(self) -> int:
        return self.n

    def encode(self, index: Tensor) -> Tensor:
        with self.world.autocast():
            return self.tokenizer.latent(self.data[index]).float()

    def __getitem__(self, index: Tensor) -> Tensor:         # (B,) -> (B, C, h, w)
        return self.encode(index) if self.kept is None else self.kept[index]


def train_ddt(config: Config, vae: VAE, world: train.World) -> DDT:
    """
    Trains encoder, quantizer and decoder together and saves the tokenizer in <out>/ddt. Restarts
    with other weights, MAX_RESTARTS times at most, if the error at t = 1 is too large at step
    config.restart_at and vectors are not quantized yet.
    """
    try:
        tokenizer = new_tokenizer(config, vae).to(world.device)
    except ValueError as error:
        raise UserError(str(error)) from None
    folder, weights = Path(config.out, "ddt"), vae_stage.weights_of(config.out)
    sources = checkpoint.start_stage(folder, config, world, vae=weights)

    data = Latents(tokenizer, config, world)
    world.print0(f"DDT: {millions(tokenizer.encoder)} parameters encoder, "
                 f"{millions(tokenizer.decoder)} decoder, {config.steps} steps of {config.batch} "
                 "frames")
    tokenizer.encoder.block = world.compile(QFormer.block)
    tokenizer.decoder.block = world.compile(MMDiT.block)
    # how often training has restarted: in checkpoints and log, not in the finished model
    tokenizer.register_buffer("restarts", torch.zeros((), dtype=torch.int64, device=world.device))
    model = train.distribute(tokenizer, world)              # the tokenizer, or DDP around it

    restarted = False
    while not train_once(model, tokenizer, data, config, world, sources, restarted):
        restarted, count = True, tokenizer.restarts + 1
        world.print0(f"step {config.restart_at}: the error at pure noise is "
                     f"{tokenizer.mse_noise:.2f}, above {config.restart_above}. Training restarts "
                     f"with other weights: restart {count} of at most {MAX_RESTARTS} "
                     "(--restart_at 0 turns this off)")
        new = new_tokenizer(config, vae, int(count)).state_dict()
        tokenizer.load_state_dict(new | {"restarts": count})
    del tokenizer.restarts

    tokenizer.quantizer.number()
    checkpoint.finish(folder, tokenizer.save, config, tokenizer, world, sources)
    return tokenizer.eval().requires_grad_(False)


def new_tokenizer(config: Config, vae: VAE, restarts: int = 0) -> DDT:
    """An untrained tokenizer, a function of the seed and of how often training has restarted."""
    seed = config.seed
    if restarts:
        seed = train.generator(config.seed, restarts).initial_seed()
    torch.manual_seed(seed)
    return DDT(config, vae)


def train_once(model: nn.Module, tokenizer: DDT, data: Latents, config: Config, world: train.World,
               sources: dict[str, str], restarted: bool) -> bool:
    """
    Trains `tokenizer` (model: it, or DDP around it). False if it stopped at step config.restart_at
    because the error at t = 1 was too large.
    """
    B, n = config.batch, world.accumulation_steps(config.batch, config.micro_batch)
    shown = ("mse", "mse_noise", "codes_used")              # in the progress bar
    folder = Path(config.out, "ddt")
    with train.Run(folder, tokenizer, config, world, shown, sources, restarted) as run:
        for step in run:
            if step == config.restart_at and should_restart(tokenizer):
                return False
            model.train()
            batch = world.shard(train.batch_indices(config.seed, step, B, len(data)))
            latent = data[batch]                                                # (b, C, h, w)
            u, noise, token_noise = draw_noise(tokenizer, latent.shape[1:], step, world)
            if step >= config.quantize_at * config.steps and not tokenizer.quantizer.active:
                start_quantizing(tokenizer, data, step, n, world)
            # for the crowding loss: with one micro-batch, the model takes the batch's own vectors
            others = global_vectors(tokenizer, latent, n, world) if n > 1 else None

            total, outs = 0.0, []
            micro_batches = zip(*(x.tensor_split(n) for x in (latent, u, noise, token_noise)))
            for micro_batch in run.accumulate(micro_batches, model):
                with world.autocast():
                    out = model(*micro_batch, others)
                loss = out["loss"].sum() / B
                (loss * world.size).backward()              # times ranks: a sum, not DDP's average
                total += loss.detach()
                outs.append({name: x.detach() for name, x in out.items()})

            # clip the gradient norm, AdamW, zero_grad; False if skipped because it is not finite
            taken = run.step(total)
            out = {name: torch.cat([part[name] for part in outs]) for name in outs[0]}
            codes = out["codes"].flatten()
            if taken:
                tokenizer.quantizer.update(out["vectors"].flatten(0, 1), codes)
                update_mse_noise(tokenizer, out["mse"][u == 1], world)
            run.log(mse=world.all_reduce(out["mse"].sum()) / B, mse_noise=tokenizer.mse_noise,
                    commitment=world.all_reduce(out["commitment"].sum()) / B,
                    restarts=tokenizer.restarts, **tokenizer.quantizer.usage(codes))
    return True


def should_restart(tokenizer: DDT) -> bool:
    """Whether the error at t = 1 is too large at step config.restart_at; not the tenth time."""
    c, q = tokenizer.config, tokenizer.quantizer
    bad = c.restart_at and tokenizer.mse_noise > c.restart_above and not q.active
    return bool(bad and tokenizer.restarts < MAX_RESTARTS)


def draw_noise(tokenizer: DDT, shape: tuple, step: int, world: train.World) -> list[Tensor]:
    """
    This rank's u (b,), noise (b, *shape) of the latents and token noise (b, K, dim), which the
    quantizer ignores once it quantizes. Drawn for the global batch, whatever the number of ranks.
    """
    c, device = tokenizer.config, world.device
    source = dict(generator=train.generator(c.seed, step, device=device), device=device)
    u = torch.rand(c.batch, **source)
    u = torch.where(torch.rand(c.batch, **source) < c.pure_noise, 1.0, u)
    noise = torch.randn(c.batch, *shape, **source)
    scale = c.token_noise if tokenizer.past_plateau else 0.0
    token_noise = scale * torch.randn(c.batch, c.queries, c.code_dim, **source)
    return [world.shard(x) for x in (u, noise, token_noise)]


@torch.no_grad()
def global_vectors(tokenizer: DDT, latent: Tensor, n: int, world: train.World) -> Tensor:
    """This rank's latents (b, C, h, w), n micro-batches -> vectors of all ranks (B, K, dim)."""
    with world.autocast():
        z = torch.cat([tokenizer.vectors(x) for x in latent.tensor_split(n)])
    return all_gather(z)


def update_mse_noise(tokenizer: DDT, mse: Tensor, world: train.World) -> None:
    """Moves the running mean toward the mean of all ranks' errors mse (n,) at t = 1, n may be 0."""
    count = torch.tensor(float(len(mse)), device=mse.device)
    total, count = world.all_reduce(torch.stack([mse.sum(), count]))
    if count:
        tokenizer.mse_noise.lerp_(total / count, 0.05)


@torch.no_grad()
def start_quantizing(tokenizer: DDT, data: Latents, step: int, n: int, world: train.World) -> None:
    """Fills the codebook from the vectors of 16 batches of frames, encoded in n parts per rank."""
    c = tokenizer.config
    index = world.shard(train.batch_indices(c.seed, step, 16 * c.batch, len(data)))
    latent = torch.cat([data[i] for i in index.split(frames_per_call(world.device))])
    with world.autocast():
        z = torch.cat([tokenizer.vectors(x) for x in latent.tensor_split(n)])
    tokenizer.quantizer.fill(z.flatten(0, 1))
    if not tokenizer.past_plateau:
        world.print0(f"step {step}: quantization starts, but the error at pure noise is still "
                     f"{tokenizer.mse_noise:.2f}: the tokens carry little information. Give it "
                     "more --steps, a later --quantize_at, or another --seed")


# ------------------------------------------------------------------ the stage


def reconstruction(tokenizer, **options) -> Callable[[Tensor], Tensor]:
    """
    For evaluate.evaluate with shown = 32: frames (B, F, 3, H, W) -> their reconstructions. options:
    of the tokenizer's `decode`.
    """
    @torch.no_grad()
    def predict(frames: Tensor) -> Tensor:
        clips_per_call = max(frames_per_call(frames.device) // frames.shape[1], 1)
        parts = []
        for clips in frames.split(clips_per_call):                              # (b, F, 3, H, W)
            codes = tokenizer.encode(clips.flatten(0, 1))                       # (b F, K)
            parts.append(tokenizer.decode(codes, generator=clip_generators(clips), **options))
        return torch.cat(parts).view_as(frames)
    return predict


def center_error(tokenizer, scenario: str, device, n: int = 32) -> tuple[float, int]:
    """Of n reconstructed iid clips: median centre error in world units; number of codes in use."""
    clips = sim.sample(scenario, "iid", n, evaluate.EVAL_SEED).to(device)
    frames = sim.render(clips.position, clips.radius, tokenizer.config.size)
    center, _, _ = reward.detect(reconstruction(tokenizer)(frames), clips.radius.shape[1])
    used = len(tokenizer.encode(frames.flatten(0, 1)).unique())
    error = (center - clips.position).norm(dim=-1)[clips.inside]
    return error.nanmedian().item(), used


def report(config, tokenizer: DDT, world: train.World) -> Path:
    """The VAE's and the tokenizer's rows and pictures, unless they are there -> results.json."""
    c, predict = tokenizer.config, reconstruction(tokenizer)
    c = dataclasses.replace(c, out=config.out, scenario=config.scenario)        # of this run
    vae_stage.report(c, tokenizer.vae, world)
    results = evaluate.add_rows(c, {"DDT": predict}, ("vae", "ddt"), c.size, world,
                                shown=sim.FRAMES)
    picture = Path(config.out, "ddt", "reconstruction.png")
    if world.is_main and not pictures.is_whole(picture):
        splits = [(name, split) for name in train.scenarios(config.scenario)
                  for split in ("iid", "small", "large")]
        clips = [sim.sample(*pair, 1, evaluate.EVAL_SEED) for pair in splits]
        truth = [sim.render(x.position, x.radius, c.size).to(world.device) for x in clips]
        videos = {"truth": torch.cat(truth), "DDT": torch.cat([predict(x) for x in truth])}
        titles = [f"{name}, {split}: radius {x.radius[0, 0]:.2f}"
                  for (name, split), x in zip(splits, clips)]
        pictures.save_strip(picture, videos, titles, truth=clips)
    world.barrier()
    return results


def ensure(config, world: train.World) -> DDT:
    """The tokenizer of <out> for a later stage with `config`: loaded, or trained first."""
    folder = Path(config.out, "ddt")
    if not checkpoint.has_model(folder):
        world.print0(f"{folder} is missing: training it first. {EXPECTED.get(config.preset, '')}")
        run_stage(train.stage_config("ddt", Config, PRESETS, config), world)
    weights = vae_stage.weights_of(config.out)
    checkpoint.check_provenance(folder, **({"vae": weights} if weights.exists() else {}))
    tokenizer = DDT.load(folder).to(world.device)
    check_scenario(config, tokenizer, folder)
    report(config, tokenizer, world)
    return tokenizer


def check_scenario(config, tokenizer, folder: Path) -> None:
    """UserError for a motion that a tokenizer was not trained on."""
    known = tokenizer.config.scenario
    unknown = set(train.scenarios(config.scenario)) - set(train.scenarios(known))
    check(not unknown, f"--scenario {config.scenario}: {folder} was trained on {known}; choose "
          "another --out")


def check_config(c: Config) -> None:
    """UserError for flags that cannot work."""
    vae_stage.check_data(c)
    check(c.prefix in ("growing", "all"), f"--prefix {c.prefix}: choose growing or all")
    check(c.order in ("forward", "reverse"), f"--order {c.order}: choose forward or reverse")
    check(c.code_dim >= 3, f"--code_dim {c.code_dim}: at least 3, since LayerNorm takes two "
          "dimensions away")
    check(c.shift > 0, f"--shift {c.shift}: must be above 0; 1 leaves time as it is")
    check(c.pure_noise > 0 or not c.restart_at, "--pure_noise 0 leaves the error at t = 1 unknown: "
          "add --restart_at 0")
    check(c.quantize_at < 1, f"--quantize_at {c.quantize_at}: a share of the steps, below 1")
    check_ranges(c, size=sim.SIZES, queries=(1, 256), code_dim=(3, 256), patch=(1, 64))
    check_ranges(c, image_width=(4, 8192), query_width=(1, 8192), encoder_layers=(1, 256),
                 width=(4, 8192), layers=(1, 256), heads=(1, 256), batch=(1, 65536))
    check_ranges(c, shift=(0.01, 1000), pure_noise=(0, 1), commitment=(0, 100),
                 token_noise=(0, 100), spread=(0, 100), noise_below=(0, 100),
                 restart_above=(0, 100))
    check(c.query_width % c.heads == 0, f"--query_width {c.query_width}: must be a multiple of "
          f"--heads {c.heads}")
    check(c.width % (4 * c.heads) == 0, f"--width {c.width}: must be a multiple of 4 times --heads "
          f"{c.heads}")
    check(c.image_width % 4 == 0, f"--image_width {c.image_width}: must be a multiple of 4")


def run_stage(config: Config, world: train.World) -> None:
    """Loads the tokenizer that `config` describes, or trains it; then its rows of the table."""
    folder, names = Path(config.out, "ddt"), train.scenarios(config.scenario)
    vae = vae_stage.ensure(config, world)
    if checkpoint.is_trained(folder, config, world):
        checkpoint.check_provenance(folder, vae=vae_stage.weights_of(config.out))
        tokenizer = DDT.load(folder).to(world.device)
    else:
        tokenizer = train_ddt(config, vae, world)
    results = report(config, tokenizer, world)
    if world.is_main:
        print(evaluate.table(results))
        for name in names:
            median, used = center_error(tokenizer, name, world.device)
            print(f"\n{name}: median centre error {median:.4f} world units, {used} codes in use")
        print(f"picture: {folder}/reconstruction.png")
    world.barrier()


def main(argv: list[str] | None = None) -> None:
    config = train.parse(Config, PRESETS, argv)
    check_config(config)
    run_stage(config, train.start(config.seed, config.out, config.compile))


if __name__ == "__main__":
    train.cli(main)
