"""
Stage 0, the prior: a small Llama is trained on sequences of numbers, before any clip.

The paper starts from Llama-3.1-8B, whose training text is full of numbers. This model stands in for
it; `number_sequences` is its whole corpus. SFT starts from it with --llm prior, the default
of `tiny` for uniform motion: the rows of code i in embedding and head are copied from the word for
the number i.

K series of numbers modulo 256 are interleaved, as the K tokens of every frame of a clip will be.
Each is a hand on a clock with 256 places. The model learns to continue steady motion at any speed,
and standstill. It learns nothing of balls, radii and walls, nor which code means which place.

    places (F, K) of K hands in F frames -> BOS and F x K words -> Llama -> next word

Choices (measured: docs/RESULTS.md)
1. The vocabulary is BOS (id 0) and 256 words; the word for the number i has the id 1 + i.
2. Rows of near numbers start alike: random Fourier features of the places on the circle.
3. Inputs are corrupted as in SFT (`corrupt_inputs`). Targets stay clean.
4. `<out>/llm` is a Hugging Face folder, like that of any Llama; numbers.json lists the words' ids.

    python prior.py                     # trains <out>/llm

Expected at `tiny` on 2 CPU cores: 3 to 5 minutes.

Axes: B sequences, F frames, K tokens of a frame (here: hands), S = 1 + F K, V codes, D width.
"""
import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)    # Ctrl-C during the imports: no traceback

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

import checkpoint
import train
from checkpoint import UserError, check
from lm import Llama, LlamaConfig, generate
from sim import CONDITION, FRAMES
from vae import check_ranges, millions

PLACES = 256                # of the clock, and words for numbers: as many as there are codes
CONTEXT = 1024              # of the model, in tokens: clips may have up to 31 tokens per frame
NUMBERS = "numbers.json"    # in the model's folder: ids of the words for 0..255, and the corpus


@dataclass
class Config:
    # run
    preset: str = "tiny"        # named set of defaults: tiny or small
    out: str = ""               # run folder (empty: runs/<preset>)
    seed: int = 0               # seed of weights and number sequences
    fresh: bool = False         # train this stage's model again; the old one stays until the end
    save_every: int = 100       # steps between two checkpoints
    # data
    hands: str = "3,3,2,3,3,4"  # hands per sequence, K: one number per step, in turn
    length: int = 96            # numbers per sequence, F K, of all hands together
    still: float = 0.4          # share of the hands that stand still
    slowest: float = 0.0        # least speed of the others, in places per frame
    fastest: float = 24.0       # largest speed of the others, in places per frame
    accelerate: float = 0.05    # share of the hands with a constant acceleration
    change: float = 0.05        # share of the hands that change their speed at some moment
    follow: float = 0.05        # share of the hands that move -1, 1, 2 or 3 times as far as another
    warp: float = 0.35          # unevenness of the places: local speeds vary by up to this share
    noise: float = 0.25         # standard deviation of the noise, in places: its mean over hands
    corrupt: float = 0.1        # share of the inputs that are replaced by random numbers
    # model
    hidden: int = 128           # width, D
    ffn: int = 384              # width of the feed-forward layers
    layers: int = 4             # transformer blocks
    heads: int = 4              # attention heads
    kv_heads: int = 2           # heads of keys and values (grouped-query attention)
    dtype: str = "float32"      # of weights and gradients: float32 or bfloat16
    # optimization
    steps: int = 1500           # optimizer steps
    batch: int = 32             # sequences per step, over all ranks
    micro_batch: int = 0        # sequences per backward pass and rank; 0: the whole shard at once
    lr: float = 2.5e-3          # peak learning rate
    warmup: int = 50            # steps of linear warm-up, before a cosine to zero
    beta1: float = 0.9          # AdamW: decay of the mean of gradients
    beta2: float = 0.95         # AdamW: decay of the mean of their squares
    eps: float = 1e-6           # AdamW: added to the root of the mean square
    weight_decay: float = 0.05  # AdamW: on matrices only
    max_grad_norm: float = 1.0  # gradient clipping; 0: none


# There is no `paper`: its prior is Llama-3.1-8B (sft.py --llm DIR).
#
# `small`, for one GPU of 80 GB: 6.6M parameters, because on an H200 5M with 1550 steps did better
# than 27M with 675 in the same time. 1.05 TFLOP per step, which took 24 ms: 2400 steps take 58 s.
# After 960 steps it did not yet continue moving hands. SFT of `small` needs --llm prior to use it.
PRESETS = {
    "tiny": {},
    "small": dict(hands="4,6,6,8", length=192, hidden=256, ffn=768, layers=8, dtype="bfloat16",
                  steps=2400, batch=128, lr=1.5e-3, warmup=100, save_every=1200),
}
EXPECTED = {"tiny": "3 to 5 minutes on 2 CPU cores.",
            "small": "A minute on one H200."}
# parameters of `number_sequences`, kept in numbers.json: SFT and GRPO mix in sequences like these
CORPUS = ("still", "slowest", "fastest", "accelerate", "change", "follow", "warp", "noise")

# ------------------------------------------------------------------ number sequences


def number_sequences(n: int, K: int, F: int, generator: torch.Generator, still: float = 0.4,
                     slowest: float = 0.0, fastest: float = 24.0, accelerate: float = 0.05,
                     change: float = 0.05, follow: float = 0.05, warp: float = 0.35,
                     noise: float = 0.25) -> Tensor:
    """
    n sequences of the places of K hands in F frames: (n, F, K), int64 in 0..255, on the generator's
    device. Every hand draws its own random values. The parameters: see Config.
    """
    device = generator.device
    rng = dict(generator=generator, device=device)

    def uniform() -> Tensor:                                # in [0, 1), a value per hand
        return torch.rand(n, 1, K, **rng)

    def velocity() -> Tensor:                               # (n, 1, K): speed times a random sign
        return (slowest + (fastest - slowest) * uniform()) * (2 * (uniform() < 0.5) - 1)

    # steady, with constant acceleration, or with another velocity from the moment t_change on
    t = torch.arange(F, device=device)[:, None]                                 # (F, 1)
    v = velocity() * (uniform() >= still)                                       # places per frame
    kind = uniform()
    a = 0.3 * torch.randn(n, 1, K, **rng) * (kind < accelerate)                 # per frame squared
    dv = (velocity() - v) * (kind >= 1 - change)
    t_change = F * uniform()
    place = PLACES * uniform() + v * t + a * t ** 2 / 2 + dv * (t - t_change).clamp(min=0)

    # a follower moves -1, 1, 2 or 3 times as far as another hand, its leader
    offset = torch.randint(1, max(K, 2), (n, 1, K), **rng)
    leader = (torch.arange(K, device=device) + offset) % K                      # (n, 1, K)
    ratios = torch.tensor([-1, 1, 2, 3], device=device)
    ratio = ratios[torch.randint(4, (n, 1, K), **rng)]
    followed = PLACES * uniform() + ratio * place.gather(2, leader.expand(n, F, K))
    place = torch.where(uniform() < follow, followed, place)                    # (n, F, K)

    # the places are spaced unevenly, smoothly around the clock, and a little noise is added
    turns = place / PLACES
    for periods in (1, 2):                                  # of a sine around the clock
        strength = warp / 2 * uniform()
        wave = torch.sin(2 * math.pi * (periods * turns + uniform()))
        turns = turns + strength * wave / (2 * math.pi * periods)
    std = 2 * noise * uniform()
    place = PLACES * turns + std * torch.randn(n, F, K, **rng)
    return place.round().long() % PLACES


def corpus_of(folder: Path) -> dict[str, float]:
    """The parameters of `number_sequences` kept in a model's folder ({}: its defaults)."""
    return checkpoint.read_json(Path(folder, NUMBERS), "restore it").get("corpus", {})


def circle(n: int = PLACES) -> Tensor:
    """n points at equal distances on the unit circle (n, 2): the places of a clock."""
    angle = 2 * math.pi * torch.arange(n) / n
    return torch.stack([angle.cos(), angle.sin()], -1)


# ------------------------------------------------------------------ sequences, inputs and targets


def sequence(model: Llama, codes: Tensor) -> Tensor:
    """codes (B, F, K) -> ids (B, 1 + F K), the first BOS. ValueError for codes outside [0, V)."""
    codes, V = codes.flatten(1).long(), model.config.n_visual
    if (codes < 0).any() or (codes >= V).any():
        raise ValueError(f"codes must be in [0, {V}), the visual codes of this model")
    ids = model.first_code + codes
    bos = torch.full_like(ids[:, :1], model.config.bos_token_id)
    return torch.cat([bos, ids], 1)


def nearest_codes(codebook: Tensor, n: int) -> Tensor:
    """codebook (V, dim) of unit vectors -> the n nearest codes of each, first itself: (V, n)."""
    codebook = codebook.double().cpu()
    cosine = codebook @ codebook.T                                              # (V, V)
    cosine.fill_diagonal_(2)                                # first, even if another code is equal
    return cosine.topk(n).indices


def corrupt_inputs(codes: Tensor, near: Tensor, corrupt: float,
                   generator: torch.Generator) -> Tensor:
    """
    codes (B, F, K) -> inputs (B, F, K). Against exposure bias: a model that generates is given its
    own mistakes, so its inputs in training hold mistakes, too. From the fourth frame on, a code
    becomes a random one with probability `corrupt`, else one of its nearest, near (V, n), of which
    it is one itself. All tensors are on the generator's device.
    """
    V, n = near.shape
    rng = dict(generator=generator, device=generator.device)
    codes = codes.long()                                    # a uint8 index would be a mask
    nearby = near[codes, torch.randint(n, codes.shape, **rng)]                  # (B, F, K)
    is_random = torch.rand(codes.shape, **rng) < corrupt
    random = torch.randint(V, codes.shape, **rng)
    corrupted = torch.where(is_random, random, nearby)
    return torch.cat([codes[:, :CONDITION], corrupted[:, CONDITION:]], 1)


class NextToken(nn.Module):
    """
    The loss, with teacher forcing: the cross-entropy of every target given the inputs before it.
    targets and inputs, ids (B, S) -> mean over the tokens of each sequence (B,), in nats.
    """

    def __init__(self, model: Llama):
        super().__init__()
        self.model = model

    def forward(self, targets: Tensor, inputs: Tensor) -> Tensor:
        hidden = self.model(inputs[:, :-1])                                     # (B, S - 1, D)
        logits = self.model.visual_logits(hidden)                               # (B, S - 1, V)
        codes = targets[:, 1:] - self.model.first_code                          # (B, S - 1)
        nats = nnf.cross_entropy(logits.flatten(0, 1).float(), codes.flatten(), reduction="none")
        return nats.view_as(codes).mean(1)


# ------------------------------------------------------------------ a new model


def new_shape(config, S: int, V: int) -> LlamaConfig:
    """The shape of a new model for BOS and V codes (no text), with a context of S tokens."""
    return LlamaConfig(
        vocab_size=1 + V, hidden_size=config.hidden, intermediate_size=config.ffn,
        num_hidden_layers=config.layers, num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads, head_dim=config.hidden // config.heads,
        max_position_embeddings=S, n_visual=V)


def check_shape(c) -> None:
    """UserError for a size or dtype that a new model cannot have. c: the Config of a stage."""
    check(c.dtype in ("float32", "bfloat16"), f"--dtype {c.dtype}: choose float32 or bfloat16")
    check_ranges(c, hidden=(2, 16384), ffn=(1, 65536), layers=(1, 256), heads=(1, 256),
                 kv_heads=(1, 256), batch=(1, 65536))
    check(c.hidden % (2 * c.heads) == 0 and c.heads % c.kv_heads == 0, f"--hidden {c.hidden} must "
          f"be a multiple of twice --heads {c.heads}, and that of --kv_heads {c.kv_heads}")


@torch.no_grad()
def init_near_alike(model: Llama, codebook: Tensor, frequency: float = 5.0) -> None:
    """
    Near codes start with similar rows: what is learnt of one holds for its neighbours, too. The
    codes' rows in the embedding and the head become random Fourier features (Rahimi and Recht 2007)
    of the codebook (V, dim): cos(w c + b), with b uniform and w ~ N(0, s^2), where s grows from 1
    to `frequency` over the D channels. The rows keep their standard deviation.
    """
    for weight in (model.model.embed_tokens.weight, model.lm_head.weight):
        D, rows = weight.shape[1], weight[model.first_code:]                    # (V, D)
        s = torch.logspace(0, math.log10(frequency), D)
        w = torch.randn(codebook.shape[1], D) * s                               # (dim, D)
        b = 2 * math.pi * torch.rand(D)
        features = math.sqrt(2) * torch.cos(codebook.cpu() @ w + b)             # (V, D), variance 1
        rows.copy_(rows.std() * features.to(rows.device))


# ------------------------------------------------------------------ training


def train_prior(config: Config, world: train.World) -> Llama:
    """
    Trains a Llama on number sequences and saves it in <out>/llm. In training its words are called
    visual codes, as NextToken wants them; it is saved as a model of text without such codes.
    """
    folder, B = Path(config.out, "llm"), config.batch
    checkpoint.start_stage(folder, config, world)
    torch.manual_seed(config.seed)
    model = Llama(new_shape(config, CONTEXT, PLACES))
    init_near_alike(model, circle())
    model.to(world.device, getattr(torch, config.dtype))
    hands = numbers_of_hands(config)
    corpus = {name: getattr(config, name) for name in CORPUS}
    near = nearest_codes(circle(), 3).to(world.device)      # itself and the places beside it
    world.print0(f"prior: {millions(model)} parameters, {config.steps} steps of {B} sequences of "
                 f"{config.length} numbers")
    loss_of = train.distribute(NextToken(model), world)
    n = world.accumulation_steps(B, config.micro_batch)     # micro-batches per rank

    with train.Run(folder, model, config, world) as run:
        for step in run:
            K = hands[step % len(hands)]
            generator = train.generator(config.seed, step, device=world.device)
            targets = number_sequences(B, K, config.length // K, generator, **corpus)  # (B, F, K)
            inputs = corrupt_inputs(targets, near, config.corrupt, generator)
            targets = world.shard(sequence(model, targets))                     # (b, S)
            inputs = world.shard(sequence(model, inputs))                       # (b, S)

            total = 0.0
            micro_batches = zip(targets.tensor_split(n), inputs.tensor_split(n))
            for micro_batch in run.accumulate(micro_batches, loss_of):
                loss = loss_of(*micro_batch).sum() / B
                (loss * world.size).backward()              # times ranks: a sum, not DDP's average
                total += loss.detach()
            run.step(total)             # clip the gradient norm, AdamW, zero_grad; and the log

    def save(new: Path) -> None:
        model.save(new)
        ids = list(range(model.config.vocab_size - PLACES, model.config.vocab_size))
        checkpoint.write_json(new / NUMBERS, {"ids": ids, "corpus": corpus})

    model.config = dataclasses.replace(model.config, n_visual=0)    # SFT appends visual codes
    checkpoint.finish(folder, save, config, model, world)
    return model.eval()


@torch.no_grad()
def continuation_error(model: Llama, speed: float, K: int = 3, n: int = 32) -> float:
    """
    Greedy decoding of 29 frames, given 3, in n sequences of K steady hands that move `speed` places
    per frame: mean distance to the true places, in places. Random guesses would be 64 off.
    """
    steady = dict.fromkeys(CORPUS, 0.0) | {"slowest": speed, "fastest": speed}
    numbers = number_sequences(n, K, FRAMES, train.generator(0), **steady).to(model.head.device)
    prompt, T = sequence(model, numbers[:, :CONDITION]), (FRAMES - CONDITION) * K
    predicted = generate(model, prompt, T, top_k=1)[0].view(n, -1, K)
    error = (predicted - numbers[:, CONDITION:]) % PLACES
    return torch.minimum(error, PLACES - error).double().mean().item()


# ------------------------------------------------------------------ the stage


def load(folder: Path, **sources: Path) -> Llama:
    """A trained model. UserError if it was trained from other weights (name=path) than these."""
    folder = Path(folder)
    checkpoint.check_provenance(folder, **sources)
    try:
        return Llama.load(folder).eval()
    except ValueError as error:
        raise UserError(f"{error}: {checkpoint.remedy(folder)}") from None


def ensure(config, world: train.World) -> None:
    """Trains <out>/llm for a later stage with `config`, unless it is there."""
    folder = Path(config.out, "llm")
    if checkpoint.has_model(folder):
        checkpoint.check_files(folder)
    else:
        prior_config = train.stage_config("llm", Config, PRESETS, config)
        world.print0(f"{folder} is missing: training it first. {EXPECTED[config.preset]}")
        run_stage(prior_config, world)


def numbers_of_hands(config: Config) -> list[int]:
    """--hands as integers. UserError for anything else."""
    try:
        return [int(number) for number in config.hands.split(",")]
    except ValueError:
        raise UserError(f"--hands {config.hands}: whole numbers with commas between them, "
                        "such as 2,3,4") from None


def check_config(c: Config) -> None:
    """UserError for flags that cannot work."""
    check_shape(c)
    check_ranges(c, length=(8, CONTEXT - 1), slowest=(0, PLACES / 2), fastest=(0, PLACES / 2),
                 still=(0, 1), accelerate=(0, 1), change=(0, 1), follow=(0, 1), warp=(0, 1),
                 noise=(0, PLACES))
    check(c.corrupt < 1, f"--corrupt {c.corrupt}: a share of the numbers, below 1")
    check(c.slowest <= c.fastest, f"--slowest {c.slowest}: above --fastest {c.fastest}")
    check(c.accelerate + c.change <= 1, "--accelerate and --change are shares of the hands, at "
          "most 1 together")
    for K in numbers_of_hands(c):
        check(1 <= K <= c.length // (CONDITION + 1), f"--hands {c.hands}: a sequence of --length "
              f"{c.length} must hold more than {CONDITION} frames of {K}")


def run_stage(config: Config, world: train.World) -> None:
    """Trains the model of `config`, unless it is there; prints its error at four speeds."""
    check_config(config)
    folder = Path(config.out, "llm")
    if checkpoint.is_trained(folder, config, world):
        model = load(folder).to(world.device)
    else:
        model = train_prior(config, world)
    if world.is_main:
        model.config = dataclasses.replace(model.config, n_visual=PLACES)       # words as codes
        errors = [f"{continuation_error(model, v):.1f} at speed {v}" for v in (0, 4, 12, 24)]
        print(f"steady hands, mean error in places: {', '.join(errors)}")
    world.barrier()


def main(argv: list[str] | None = None) -> None:
    config = train.parse(Config, PRESETS, argv)
    check_config(config)
    run_stage(config, train.start(config.seed, config.out))


if __name__ == "__main__":
    train.cli(main)
