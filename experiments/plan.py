"""
What a training stage needs, computed before it is run: memory per rank, FLOPs, hours.

    python -m experiments.plan grpo --preset paper --world 8
    python -m experiments.plan grpo --help      # any flag of the stage's Config

STAGE is prior, vae, ddt, sft or grpo. Nothing is trained, no GPU is needed.

Method. The stage's model is built on the meta device, where a tensor has a shape but no data. A
forward pass of one micro-batch computes nothing there, and yet shows
- the activations: autograd hands each tensor that it keeps for the backward pass to saved-tensor
  hooks; their storages are summed, each once, without the model's own parameters and buffers;
- the FLOPs: FlopCounterMode counts matrix products and convolutions. A backward pass takes twice
  those of its forward pass; recomputing activations (--checkpointing) takes them once more;
- attention as a fused kernel has it, which keeps q, k, v and its output. (That of the meta device
  would keep an S x S matrix.) Its FLOPs are counted for all pairs of tokens, causal or not.
Weights, gradients and optimizer state are counted from the parameters' shapes.

Not counted: temporary tensors inside an operation, the allocator's gaps, the frames of a rollout.
The VAE and the tokenizer are counted in fp32, without autocast to bf16.

How this compares with real runs: docs/RESULTS.md, section 15.2.
"""
import argparse
import dataclasses
import functools
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

import checkpoint
import ddt
import experiments.vqgan as vqgan
import grpo
import prior
import sft
import train
import vae
from checkpoint import UserError, check
from ddt import DDT
from lm import CONFIGS, Cache, Llama, LlamaConfig
from sim import CONDITION, FRAMES
from vae import VAE
from weights import read_config

GIB = 2 ** 30
UTILISATION = 0.4               # share of a card's FLOP/s that training reaches: an assumption
BUCKET = 1 << 26                # parameters per optimizer bucket, the default of train.AdamW
CODES = 256                     # visual codes, V

# stable-diffusion-3-medium's VAE, on which `paper` stands
SD3 = dict(block_out_channels=[128, 256, 512, 512], layers_per_block=2, latent_channels=16,
           norm_num_groups=32, use_quant_conv=False, use_post_quant_conv=False)


class Card(NamedTuple):
    memory: float               # bytes that a process can use
    flops: float                # FLOP/s in bf16, by the data sheet
    bandwidth: float            # bytes/s that are read from memory, by the data sheet


CARDS = {
    "A800-80GB": Card(79.3 * GIB, 312e12, 2.0e12),
    "H200": Card(139.8 * GIB, 989e12, 4.8e12),
}


@dataclass
class Plan:
    """Bytes on one rank; work of one step, all ranks together."""
    fixed: dict[str, float]     # bytes that are there all the time: parameters, gradients, ...
    passing: dict[str, float]   # bytes that are there one after the other: only the largest counts
    tokens: float               # tokens trained on or sampled per step (of the VAE: frames)
    flops: float                # FLOPs per step
    read: float = 0.0           # bytes that one rank reads from memory to sample, per step

    @property
    def total(self) -> float:
        """Bytes at the peak."""
        return sum(self.fixed.values()) + max(self.passing.values())

    def hours(self, card: str, ranks: int, steps: int) -> float:
        """Of `steps` steps. Sampling a token waits for memory, not for FLOPs: it comes on top."""
        c = CARDS[card]
        compute = self.flops / (UTILISATION * c.flops * ranks)
        sampling = self.read / c.bandwidth
        return steps * (compute + sampling) / 3600


# ------------------------------------------------------------------ measuring on the meta device


class FusedAttention(torch.autograd.Function):
    """Computes nothing, and keeps what a fused kernel keeps: q, k, v and the output."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out)
        return out


class FusedAttentionMode(TorchFunctionMode):
    """Within it, scaled_dot_product_attention is FusedAttention. Counts its FLOPs."""

    def __init__(self):
        super().__init__()
        self.flops = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is not nnf.scaled_dot_product_attention:
            return function(*args, **(kwargs or {}))
        q, k, v = args                                      # (B, heads, S, d)
        keys = k.shape[-2]
        one_product = 2 * q.numel() * keys                  # a multiplication and an addition
        self.flops += 2 * one_product                       # q k^T, and its softmax times v
        return FusedAttention.apply(q, k, v)


class ForwardPass(NamedTuple):
    flops: float
    kept: float                 # bytes kept for the backward pass: the activations


def measure(forward: Callable[[], Tensor], model: nn.Module) -> ForwardPass:
    """One call of `forward`, a forward pass of `model` on the meta device."""
    tensors = (*model.parameters(), *model.buffers())
    own = {x.untyped_storage()._cdata for x in tensors}
    kept: dict[int, Tensor] = {}                            # by storage: views share one

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage()._cdata] = x
        return x

    def unpack(x: Tensor) -> Tensor:
        return x

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, unpack)
    with FusedAttentionMode() as attention, FlopCounterMode(display=False) as counter, hooks:
        forward()
    sizes = [x.untyped_storage().nbytes() for key, x in kept.items() if key not in own]
    return ForwardPass(counter.get_total_flops() + attention.flops, sum(sizes))


def training_flops(forward: float, checkpointing: bool = False) -> float:
    """FLOPs of a forward pass -> of the forward and backward pass."""
    backward = 2 * forward                                  # gradients of inputs and of weights
    recomputation = forward if checkpointing else 0
    return forward + backward + recomputation


def training_memory(model: nn.Module, ranks: int) -> dict[str, float]:
    """Bytes of weights, gradients and this rank's shard of the optimizer, whatever the batch."""
    buckets = train.group_parameters(model, BUCKET)
    trained = sum(p.numel() for bucket in buckets for p in bucket)
    sizes = [sum(p.nbytes for p in bucket) for bucket in buckets]
    return {
        "parameters": nbytes(model),
        "gradients": sum(sizes),
        "masters and moments, fp32": 3 * 4 * trained / ranks,
        "copies of a bucket": 2 * max(sizes),               # its gradients, its new weights
    }


def nbytes(model: nn.Module) -> int:
    return sum(p.nbytes for p in model.parameters())


def largest_shard(batch: int, ranks: int) -> int:
    """Elements of a batch on the last rank; no rank has more. UserError if one would have none."""
    last = train.World(ranks - 1, ranks, torch.device("meta"))
    return len(last.shard(range(batch)))


def largest_micro_batch(batch: int, ranks: int, micro_batch: int, rows: int = 1) -> int:
    """Rows of the largest backward pass on any rank, if an element of the batch has `rows` rows."""
    world = train.World(0, ranks, torch.device("meta"))
    shard = largest_shard(batch, ranks) * rows
    return train.ceil_div(shard, world.accumulation_steps(batch, micro_batch, rows))


# ------------------------------------------------------------------ VAE and tokenizer


def plan_vae(config: vae.Config, ranks: int) -> Plan:
    """vae.py: the training of the small VAE."""
    b, size = largest_micro_batch(config.batch, ranks, config.micro_batch), config.size
    with torch.device("meta"):
        model = vae.small_vae(config)
        check(size % model.shrink == 0, f"--size {size}: must be a multiple of {model.shrink}, by "
              f"which --levels {config.levels} shrink it")
        side = size // model.shrink
        images = torch.zeros(b, 3, size, size)
        noise = torch.zeros(b, config.latent, side, side)

    def loss() -> Tensor:                                   # as in vae.train_vae
        reconstruction, mean, logvar = model(images, noise)
        mse = (reconstruction - images).square().mean((1, 2, 3))
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum((1, 2, 3))
        return mse + kl

    forward = measure(loss, model)
    flops = training_flops(forward.flops) * config.batch / b
    return Plan(training_memory(model, ranks), {"activations": forward.kept}, config.batch, flops)


def plan_ddt(config: ddt.Config, ranks: int) -> Plan:
    """ddt.py: the training of the tokenizer on a VAE that is there already."""
    b, size = largest_micro_batch(config.batch, ranks, config.micro_batch), config.size
    tokenizer = meta_ddt(config)
    with torch.device("meta"):
        frames = torch.zeros(b, 3, size, size)
        tokens = torch.zeros(b, config.queries, config.code_dim)
        t, k = torch.zeros(b), torch.zeros(b)
        latent = tokenizer.latent(frames)
    frozen_vae = measure(lambda: tokenizer.latent(frames), tokenizer)
    encoder = measure(lambda: tokenizer.encoder(latent), tokenizer)
    decoder = measure(lambda: tokenizer.decoder(latent, t, tokens, k), tokenizer)

    flops, memory = training_flops(encoder.flops + decoder.flops), training_memory(tokenizer, ranks)
    if config.frames < len(train.scenarios(config.scenario)) * config.clips * FRAMES:
        memory["latents"] = config.frames * latent[0].nbytes                    # see ddt.Latents
    else:
        flops += frozen_vae.flops
    activations = {"activations": encoder.kept + decoder.kept}
    return Plan(memory, activations, config.batch * config.queries, flops * config.batch / b)


def meta_ddt(config: ddt.Config) -> DDT:
    """The tokenizer of a config, with the VAE of --vae or <out>/vae, or else of the preset."""
    folder = config.vae or Path(config.out, "vae")
    if config.vae or Path(folder, vae.WEIGHTS).exists():
        known = VAE.load(folder).config
    elif config.preset not in vae.PRESETS:                  # `paper`: a pre-trained one
        known = SD3
    else:
        known = None
    with torch.device("meta"):
        return DDT(config, VAE(**known) if known else vae.small_vae(vae_config(config)))


def vae_config(config: ddt.Config) -> vae.Config:
    """The config with which ddt.py trains a VAE that is missing: see vae.ensure."""
    return train.stage_config("vae", vae.Config, vae.PRESETS, config, size=config.size,
                              clips=config.clips)


def trains_vae(config: ddt.Config) -> bool:
    """Whether ddt.py would train a VAE first."""
    there = Path(config.out, "vae", vae.WEIGHTS).exists()
    return not config.vae and not there and config.preset in vae.PRESETS


@functools.cache
def meta_tokenizer(name: str, preset: str, scenario: str) -> nn.Module:
    """--tokenizer: the DDT or VQGAN that a preset describes, for the motion --scenario."""
    check(name in ("ddt", "vqgan"), f"--tokenizer {name}: choose ddt or vqgan")
    if name == "ddt":
        fields = train.preset_fields(ddt.PRESETS, preset, scenario)
        return meta_ddt(ddt.Config(**fields | {"preset": preset, "scenario": scenario}))
    check(preset in vqgan.PRESETS, f"--tokenizer vqgan: it has no preset {preset}")
    with torch.device("meta"):
        return vqgan.VQGAN(vqgan.Config(**vqgan.PRESETS[preset]))


# ------------------------------------------------------------------ language model


def plan_prior(config: prior.Config, ranks: int) -> Plan:
    """prior.py: the training of a language model on sequences of S numbers, the longest of them."""
    S = 1 + max(config.length // K * K for K in prior.numbers_of_hands(config))
    c = prior.new_shape(config, prior.CONTEXT, prior.PLACES)
    return plan_llama(c, getattr(torch, config.dtype), config.batch, S, ranks, config.micro_batch)


def plan_sft(config: sft.Config, ranks: int) -> Plan:
    """sft.py: the training of the language model on clips of S tokens."""
    tokenizer = meta_tokenizer(config.tokenizer, config.preset, config.scenario)
    S = 1 + FRAMES * tokenizer.config.queries
    return plan_llama(llama_config(config, S), getattr(torch, config.dtype), batch_of(config), S,
                      ranks, config.micro_batch, config.checkpointing)


def plan_llama(c: LlamaConfig, dtype: torch.dtype, batch: int, S: int, ranks: int,
               micro_batch: int, checkpointing: bool = False) -> Plan:
    """The training of a language model on batches of sequences of S tokens."""
    b = largest_micro_batch(batch, ranks, micro_batch)
    with torch.device("meta"):
        model = Llama(c).to(dtype)
    forward = llama_pass(c, dtype, b, S, checkpointing)
    flops = training_flops(forward.flops, checkpointing) * batch / b
    return Plan(training_memory(model, ranks), {"activations": forward.kept}, batch * (S - 1),
                flops)


def llama_config(config: sft.Config, S: int) -> LlamaConfig:
    """The model that sft.py trains: new, prior.py's or that of --llm (`paper`: Llama-3.1-8B)."""
    if config.llm == "none":
        return sft.new_shape(config, S, CODES)
    c = CONFIGS["llama-3.1-8b"]
    if config.llm == "prior":
        of_prior = prior.Config(**prior.PRESETS[config.preset])
        c = dataclasses.replace(prior.new_shape(of_prior, prior.CONTEXT, CODES), n_visual=0)
    elif config.llm:
        try:
            c = read_config(config.llm)
        except ValueError as error:
            raise UserError(f"--llm {config.llm}: {error}") from None
    if c.n_visual:
        return c
    return dataclasses.replace(c, vocab_size=c.vocab_size + CODES, n_visual=CODES)


def llama_pass(c: LlamaConfig, dtype: torch.dtype, B: int, S: int,
               checkpointing: bool) -> ForwardPass:
    """
    A forward pass of B clips of S tokens, extrapolated from models of one and of two layers.

    With checkpointing, a layer keeps only its input; one at a time is recomputed in full.
    """
    def with_layers(n: int) -> ForwardPass:
        with torch.device("meta"):
            model = Llama(dataclasses.replace(c, num_hidden_layers=n)).to(dtype)
            loss_of = sft.NextToken(model)
            ids = torch.zeros(B, S, dtype=torch.int64)
        return measure(lambda: loss_of(ids, ids), loss_of)

    one, two = with_layers(1), with_layers(2)
    layer = ForwardPass(two.flops - one.flops, two.kept - one.kept)
    layer_input = B * (S - 1) * c.hidden_size * dtype.itemsize
    others = c.num_hidden_layers - 1
    kept_by_others = others * (layer_input if checkpointing else layer.kept)
    return ForwardPass(one.flops + others * layer.flops, one.kept + kept_by_others)


def plan_grpo(config: grpo.Config, ranks: int) -> Plan:
    """
    grpo.py, with the model of <out>/sft (as long as there is none: of sft.py's preset) and the
    tokenizer of the preset.
    """
    base = train.stage_config("sft", sft.Config, sft.PRESETS, config)
    folder = Path(config.out, "sft")
    if (folder / "model.safetensors").exists():
        base.llm = str(folder)
        base.dtype = checkpoint.read_json(folder / "trained.json").get("dtype", base.dtype)
    tokenizer = meta_tokenizer(config.tokenizer, config.preset, config.scenario)
    c = llama_config(base, 1 + FRAMES * tokenizer.config.queries)
    return plan_for(config, ranks, c, getattr(torch, base.dtype), tokenizer)


def plan_for(config: grpo.Config, ranks: int, c: LlamaConfig, dtype: torch.dtype,
             tokenizer: nn.Module) -> Plan:
    """grpo.py with a language model of config `c` and a tokenizer, on whatever device it is."""
    K, V = tokenizer.config.queries, c.n_visual
    S, T = 1 + FRAMES * K, (FRAMES - CONDITION) * K
    R = largest_shard(config.prompts, ranks) * config.group                 # rollouts of one rank
    b = largest_micro_batch(config.prompts, ranks, config.micro_batch, config.group)
    with torch.device("meta"):
        model = Llama(c).to(dtype)
        cache = Cache(c, R, S, dtype=dtype).kv.nbytes

    # memory
    micro_batch = llama_pass(c, dtype, b, S, config.checkpointing)
    fixed = training_memory(model, ranks)
    fixed["reference"] = fixed["parameters"]
    fixed["tokenizer"] = nbytes(tokenizer)
    fixed["supports of rollouts"] = R * T * V                               # bool
    prompts_cache = cache / config.group                    # there until it is copied to the group
    passing = {"KV cache": cache + prompts_cache, "activations": micro_batch.kept}

    # forward passes over all rollouts, and their backward pass
    rollouts = config.prompts * config.group
    forward = micro_batch.flops * rollouts / b
    sampling = forward * T / S                              # the prompt is one for the group
    old_logprobs, reference_logits = forward, forward
    training = training_flops(forward, config.checkpointing)
    # the KL on clips and on number sequences: one of each kind per group
    kinds = bool(config.beta_pretrain) + bool(config.beta_numbers)
    known = kinds * (reference_logits + training) / config.group
    flops = sampling + old_logprobs + reference_logits + training + known

    # each sampled token reads the weights and the cache, but not the rows of all text words
    matrices = 1 if c.tie_word_embeddings else 2            # embedding and head
    weights = fixed["parameters"] - matrices * model.head.nbytes
    return Plan(fixed, passing, rollouts * T, flops, T * (weights + cache))


# ------------------------------------------------------------------ the command


class Stage(NamedTuple):
    module: ModuleType
    plan: Callable[..., Plan]
    unit: str                   # of Plan.tokens


STAGES = {
    "prior": Stage(prior, plan_prior, "tokens"),
    "vae": Stage(vae, plan_vae, "frames"),
    "ddt": Stage(ddt, plan_ddt, "tokens"),
    "sft": Stage(sft, plan_sft, "tokens"),
    "grpo": Stage(grpo, plan_grpo, "tokens"),
}


def show(name: str, config, ranks: int) -> None:
    """Prints what a stage needs beside what the cards have."""
    _, plan_stage, unit = STAGES[name]
    plan, steps = plan_stage(config, ranks), config.steps
    largest = max(plan.passing.values())
    print(f"{name}, {config.preset}, {ranks} rank{'s' * (ranks > 1)}: GiB on each\n")
    for part, size in plan.fixed.items():
        print(f"  {part:35s} {size / GIB:9.2f}")
    for part, size in plan.passing.items():
        note = "" if size == largest else "  (at another time)"
        print(f"  {part:35s} {size / GIB:9.2f}{note}")
    print(f"  {'at the peak':35s} {plan.total / GIB:9.2f}\n")

    print(f"{steps} steps of {plan.tokens:.3g} {unit} and {plan.flops:.3g} FLOPs "
          f"(matrix products), in all {steps * plan.tokens:.3g} {unit}, "
          f"{steps * plan.flops:.3g} FLOPs.")
    print(f"Hours if {UTILISATION:.0%} of a card's FLOP/s are reached, sampling bound by memory:")
    for card, c in CARDS.items():
        verdict = "fits"
        if plan.total > c.memory:
            verdict = f"DOES NOT FIT: {what_fits(plan_stage, config, ranks, c.memory)}"
        print(f"  {card:12s} {c.memory / GIB:6.1f} GiB  {plan.hours(card, ranks, steps):10.1f} h   "
              f"{verdict}")


def batch_of(config) -> int:
    """What a step shards over the ranks: frames, sequences or, of grpo.py, prompts."""
    if isinstance(config, sft.Config):
        return config.batch + sft.replayed(config)          # clips and number sequences
    return config.prompts if isinstance(config, grpo.Config) else config.batch


def what_fits(plan_stage: Callable[..., Plan], config, ranks: int, memory: float) -> str:
    """The first change that fits, as flags: micro-batches, checkpointing, more ranks."""
    batch, sizes = batch_of(config), dict.fromkeys((config.micro_batch, 8, 4, 2, 1))
    changes = [{"micro_batch": n} for n in sizes]
    if hasattr(config, "checkpointing"):
        switches = dict.fromkeys((config.checkpointing, True))
        changes = [change | {"checkpointing": on} for change in changes for on in switches]
    for factor in (1, 2, 4, 8, 16, 32, 64, 128):
        if ranks * factor > batch:
            break
        for change in changes:
            plan = plan_stage(dataclasses.replace(config, **change), ranks * factor)
            if plan.total <= memory:
                words = []
                for name, x in change.items():
                    if x != getattr(config, name):
                        words.append(f"--{name}" if x is True else f"--{name} {x}")
                if factor > 1:
                    words.append(f"on {ranks * factor} ranks")
                return " ".join(words)
    return "not with any setting known here"


def check_config(name: str, config) -> None:
    """The stage's own checks; only that a plan of `paper` needs no weights."""
    if name == "sft" and config.preset == "paper" and not config.llm:
        config = dataclasses.replace(config, preset="")
    STAGES[name].module.check_config(config)


def check_ranks(name: str, config, ranks: int) -> None:
    """UserError if the batch of a stage, or of one before it that is missing, has too few rows."""
    largest_shard(batch_of(config), ranks)
    before = {"ddt": ["vae"], "sft": ["vae", "ddt"], "grpo": ["vae", "ddt", "sft"]}.get(name, [])
    if getattr(config, "tokenizer", "ddt") == "vqgan":
        before = ["vqgan", *before[2:]]
    if getattr(config, "llm", "") == "prior":
        before.append("prior")
    for stage in before:
        folder = Path(config.out, "llm" if stage == "prior" else stage)
        module = vqgan if stage == "vqgan" else STAGES[stage].module
        missing = not list(folder.glob("*.safetensors")) and not getattr(config, "vae", "")
        if missing and config.preset in module.PRESETS:
            batch = batch_of(module.Config(**module.PRESETS[config.preset]))
            check(batch >= ranks, f"{folder} is missing, and {name}.py trains it first: its batch "
                  f"of {batch} cannot be sharded over {ranks} ranks")


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        "python -m experiments.plan", add_help=False, allow_abbrev=False,
        usage="%(prog)s STAGE [--world N] [--preset tiny] [any flag of the stage ...]",
        description="What a stage needs: memory per rank, FLOPs, hours. Nothing is trained.")
    parser.add_argument("stage", choices=STAGES, metavar="STAGE", help=", ".join(STAGES))
    parser.add_argument("--world", type=int, default=1, metavar="N",
                        help="ranks, one per GPU (default: 1)")
    if {"-h", "--help"} & set(argv):
        parser.print_help()
        if argv[0] not in STAGES:
            print("\nThe flags of a stage: python -m experiments.plan STAGE --help")
            return
        print(f"\nThe flags of {argv[0]}.py:\n")
    given, flags = parser.parse_known_args(argv)
    name, ranks = given.stage, given.world
    check(ranks > 0, f"--world {ranks}: must be at least 1")
    module = STAGES[name].module
    config = train.parse(module.Config, module.PRESETS, flags)
    check_config(name, config)
    check_ranks(name, config, ranks)
    try:
        if name == "ddt" and trains_vae(config):
            print(f"{config.out}/vae is missing: ddt.py trains it first, then the tokenizer.\n")
            show("vae", vae_config(config), ranks)
            print()
        show(name, config, ranks)
    except ValueError as error:                             # of a model that cannot be built
        raise UserError(str(error)) from None


if __name__ == "__main__":
    train.cli(main)
