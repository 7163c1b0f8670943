"""
Stage 3, SFT: a Llama learns to predict the next token of clips.

    frames -> codes (F, K) (ddt.py) -> BOS and F x K ids -> Llama -> next-token cross-entropy

At inference it is given the codes of the first 3 frames and generates those of the other 29.

Source: Phys-AR section 3.3 and Table 3.

Choices where the paper is silent (measured: docs/RESULTS.md)
1. The softmax is over the 256 visual codes only: at inference text tokens are masked anyway.
2. The codes of a frame are in the order of their time steps, V_1 first.
3. Clips are tokenized once, before training, and kept in a file.
4. Against exposure bias, inputs are corrupted in training: after the given frames, one code in ten
   is replaced by a random one, the others by one of their three nearest. Targets stay clean.
5. In a model that has read numbers, code i starts as the word for the number i
   (`init_code_embeddings`); against forgetting, number sequences are mixed in (`replay`).
6. Evaluation is by greedy decoding.

    python sft.py                       # trains <out>/sft (first the stages before it, if missing)
    python sft.py --llm DIR             # from the weights of a Llama or Qwen2 (weights.py)
    python sft.py --llm none            # from random weights instead of <out>/llm (prior.py)

Expected at `tiny` on 2 CPU cores: 4 to 10 minutes, of them 1 for the tokens; in uniform motion loss
1.8 nats per token, of clips and numbers, and drift_error 0.25 to 0.29 on iid clips.

Axes: B clips, F frames, K tokens of a frame, S sequence, V codes, D width.
"""
import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)    # Ctrl-C during the imports: no traceback

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import checkpoint
import ddt
import evaluate
import prior
import sim
import train
from checkpoint import UserError, check
from ddt import DDT
from lm import Llama, generate
from prior import (NextToken, circle, corrupt_inputs, load, nearest_codes, new_shape,
                   number_sequences, sequence)
from sim import CONDITION, FRAMES
from vae import check_data, check_ranges, frames_per_call, millions
from weights import is_meta, read_config, weight_files


@dataclass
class Config:
    # run
    preset: str = "tiny"        # named set of defaults: tiny, small or paper
    out: str = ""               # run folder (empty: runs/<preset>)
    seed: int = 0               # seed of weights, data order and corrupted inputs
    fresh: bool = False         # train this stage's model again; the old one stays until the end
    save_every: int = 100       # steps between two checkpoints
    compile: int = 1            # compile the tokenizer's blocks on a GPU, if it is missing; 0: no
    # data
    scenario: str = "uniform"   # motion (sets defaults, too): uniform, parabola, collision, or all
    clips: int = 6000           # training clips per motion
    tokenizer: str = "ddt"      # ddt, or vqgan (experiments/vqgan.py)
    corrupt: float = 0.1        # share of the input codes that are replaced by random codes
    near: int = 3               # a code not replaced becomes one of this many nearest, itself too
    replay: float = 1.0         # number sequences in a batch, per clip (with --llm none: 0)
    # model
    llm: str = "prior"          # start from: prior (prior.py), none (random weights) or DIR
    hidden: int = 128           # width, D (this and the four below: with --llm none only)
    ffn: int = 384              # width of the feed-forward layers
    layers: int = 4             # transformer blocks
    heads: int = 4              # attention heads
    kv_heads: int = 2           # heads of keys and values (grouped-query attention)
    dtype: str = "float32"      # of weights and gradients: float32 or bfloat16
    checkpointing: bool = False # recompute activations in the backward pass, to save memory
    # optimization
    steps: int = 1600           # optimizer steps
    batch: int = 16             # clips per step, over all ranks
    micro_batch: int = 0        # sequences per backward pass and rank; 0: the whole shard at once
    lr: float = 1e-3            # peak learning rate
    warmup: int = 50            # steps of linear warm-up, before a cosine to zero
    beta1: float = 0.9          # AdamW: decay of the mean of gradients
    beta2: float = 0.95         # AdamW: decay of the mean of their squares
    eps: float = 1e-6           # AdamW: added to the root of the mean square
    weight_decay: float = 0.05  # AdamW: on matrices only
    max_grad_norm: float = 1.0  # gradient clipping; 0: none
    # evaluation
    eval_clips: int = 256       # clips per split of the result table


# `paper` is Table 3, on 80 GPUs: 9 or 10 clips each. It needs --llm, the folder of Llama-3.1-8B.
#
# `small`, for one GPU of 80 GB: 1.05 TFLOP per step, 24 ms on an H200 at the rate that prior.py
# reached: 2400 steps, 17 epochs, take 58 s. The tokens of 18,000 clips take 31 s: 26 s at 22,000
# frames per second, and 5 s of simulation.
PRESETS = {
    "tiny": {},
    "tiny other": dict(llm="none", steps=4000, lr=1.5e-3),    # other motions (RESULTS, 6)
    "small": dict(llm="none", scenario="all", hidden=256, ffn=768, layers=8, dtype="bfloat16",
                  steps=2400, batch=128, lr=1.5e-3, warmup=100, save_every=1200, eval_clips=128),
    "paper": dict(llm="", scenario="all", clips=3_000_000, corrupt=0.0, near=1, replay=0.0,
                  dtype="bfloat16", checkpointing=True, steps=360_000, batch=768, lr=1e-4,
                  warmup=5000, save_every=1000, eval_clips=1000),
}
EXPECTED = {"tiny": "4 to 10 minutes on 2 CPU cores.",
            "small": "2 minutes on one GPU (computed, not run yet).", "paper": "Not run yet."}

# ------------------------------------------------------------------ clips as sequences


@torch.no_grad()
def tokenize(tokenizer: DDT, clips: sim.Clips) -> Tensor:
    """Clips -> codes (B, F, K), uint8, rendered and encoded on the tokenizer's device."""
    device = tokenizer.quantizer.codebook.device
    b = frames_per_call(device) // FRAMES                   # clips per call of the encoder
    codes = []
    for i in range(0, len(clips), b):
        part = clips[i:i + b].to(device)
        frames = sim.render(part.position, part.radius, tokenizer.config.size)  # (b, F, 3, H, W)
        codes.append(tokenizer.encode(frames.flatten(0, 1)).unflatten(0, frames.shape[:2]))
    return torch.cat(codes).to("cpu", torch.uint8)


@torch.no_grad()
def decode(tokenizer: DDT, codes: Tensor,
           generator: torch.Generator | list[torch.Generator] | None = None) -> Tensor:
    """
    codes (B, F, K) -> frames (B, F, 3, H, W) in [0, 1], from the generator's noise. With a list of
    one per clip (else ValueError), the frames of a clip do not depend on the other clips.
    """
    B, F, _ = codes.shape
    n = frames_per_call(tokenizer.quantizer.codebook.device)
    if isinstance(generator, list):
        if len(generator) != B:
            raise ValueError(f"{len(generator)} generators for {B} clips: one per clip")
        b = max(n // F, 1)                                                      # clips per call
        calls = [(codes[i:i + b].flatten(0, 1), generator[i:i + b]) for i in range(0, B, b)]
    else:
        calls = [(x, generator) for x in codes.flatten(0, 1).split(n)]
    frames = torch.cat([tokenizer.decode(x, generator=g) for x, g in calls])
    return frames.unflatten(0, (B, F))


def predictor(model: Llama, tokenizer: DDT, seed: int = 0, top_k: int = 1,
              top_p: float = 1.0) -> evaluate.Predictor:
    """
    A predictor for evaluate.py: first frames (B, 3, 3, H, W) -> clips (B, 32, 3, H, W). With
    top_k = 1 (greedy decoding) the seed decides on the decoder's noise alone. A clip's codes and
    noise do not depend on the other clips of the batch. ValueError for other first frames.
    """
    @torch.no_grad()
    def predict(frames: Tensor) -> Tensor:
        ddt.check_first_frames(frames, tokenizer.config.size)
        B, K = len(frames), tokenizer.config.queries
        generators = ddt.clip_generators(frames, seed)                          # one per clip
        given = tokenizer.encode(frames.flatten(0, 1)).view(B, CONDITION, K)
        prompt = sequence(model, given)                                         # (B, 1 + 3 K)
        T = (FRAMES - CONDITION) * K
        codes, _ = generate(model, prompt, max_new_tokens=T, group=1, top_k=top_k, top_p=top_p,
                            generator=generators)                               # (B, 1, T)
        predicted = decode(tokenizer, codes.view(B, -1, K), generators)         # (B, 29, 3, H, W)
        return torch.cat([frames, predicted], 1)
    return predict


# ------------------------------------------------------------------ training


def training_codes(config: Config, tokenizer: DDT, path: Path, world: train.World) -> np.ndarray:
    """Codes (clips, F, K) of the training clips, uint8, made once and kept in the file `path`."""
    parts, n = {}, 0                    # row of the first clip -> initial states simulated together
    for motion in train.scenarios(config.scenario):
        clips = sim.first_frames(motion, "pretrain", config.clips, config.seed)
        for i in range(0, config.clips, sim.SCENES):
            parts[n + i] = clips[i:i + sim.SCENES]
        n += config.clips
    chunks = [slice(start, start + len(part)) for start, part in parts.items()]

    def codes_of(chunk: slice) -> np.ndarray:
        clips = sim.play(parts[chunk.start])
        return tokenize(tokenizer, clips).numpy()                               # (b, F, K)

    stamp = json.dumps({"scenario": config.scenario, "clips": config.clips, "seed": config.seed,
                        "codebook": tokenizer.quantizer.codebook.double().sum().item()})
    shape = (n, FRAMES, tokenizer.config.queries)
    return checkpoint.cached_array(path, stamp, shape, chunks, codes_of, world)


def starting_model(config: Config, tokenizer: DDT, world: train.World) -> Llama:
    """
    With --llm none a new model, in which near codes start alike; else that of --llm with V more
    ids, the codes. UserError if it cannot be loaded or its context is shorter than a clip.
    """
    codebook, dtype = tokenizer.quantizer.codebook, getattr(torch, config.dtype)
    S, V = 1 + FRAMES * tokenizer.config.queries, len(codebook)
    if config.llm == "none":
        model = Llama(new_shape(config, S, V)).to(world.device, dtype)
        prior.init_near_alike(model, codebook)
        return model
    folder = llm_folder(config)
    try:
        has_codes = read_config(folder).n_visual > 0
        model = Llama.load(folder, dtype, world.device, n_visual=V)
    except ValueError as error:
        raise UserError(f"--llm {folder}: {error}") from None
    context = model.config.max_position_embeddings
    check(S <= context, f"--llm {folder}: a clip has {S} tokens, this model's context {context}")
    if not has_codes:                       # else their rows are trained already
        world.print0(init_code_embeddings(model, folder))
    return model


def llm_folder(config) -> Path:
    """The folder of the model that SFT starts from, unless --llm is none."""
    return Path(config.out, "llm") if config.llm == "prior" else Path(config.llm)


@torch.no_grad()
def init_code_embeddings(model: Llama, folder: Path) -> str:
    """
    Code i starts as the number i: it gets the rows of its word in the embedding and in the head,
    the mean of the rows where a number is spelled in several tokens. Without a text tokenizer it
    changes nothing. Returns a line that says what it did.
    """
    V, weights = model.config.n_visual, (model.model.embed_tokens.weight, model.head)
    try:
        words = number_words(folder, V)
    except ValueError as error:
        return f"codes start as random rows: {error}"
    for weight in weights:
        rows = [weight[ids].mean(0, dtype=torch.float32) for ids in words]
        weight[model.first_code:] = torch.stack(rows).to(weight.dtype)          # (V, D)
    longest = max(map(len, words))
    spelled = f", the mean of up to {longest} tokens that spell it" if longest > 1 else ""
    return f"code i starts as the word for the number i in {folder}{spelled}"


def number_words(folder: Path, n: int) -> list[list[int]]:
    """Ids of the tokens that spell each of the numbers 0 .. n - 1. ValueError for no tokenizer."""
    if words := checkpoint.read_json(folder / prior.NUMBERS, "restore it", ["ids"]):
        if len(words["ids"]) < n:
            raise ValueError(f"{folder / prior.NUMBERS} has words for {len(words['ids'])} numbers, "
                             f"there are {n} codes")
        return [[i] for i in words["ids"][:n]]
    from text import Tokenizer              # here, because only a text model needs it
    text = Tokenizer.load(folder)
    return [text.encode(str(i), bos=False) for i in range(n)]


def replayed(config: Config) -> int:
    """Number sequences in a batch; none for a model that has not read any before."""
    return 0 if config.llm == "none" else round(config.replay * config.batch)


def train_sft(config: Config, tokenizer: DDT, world: train.World) -> Llama:
    """Trains a Llama on the training clips' codes and saves it in <out>/sft."""
    folder = Path(config.out, "sft")
    stages = (config.tokenizer, "llm") if config.llm == "prior" else (config.tokenizer,)
    files = checkpoint.model_files(config.out, *stages)
    sources = checkpoint.start_stage(folder, config, world, **files)
    torch.manual_seed(config.seed)
    model = starting_model(config, tokenizer, world)
    model.checkpointing = config.checkpointing
    codes = training_codes(config, tokenizer, folder / "codes.npy", world)      # (clips, F, K)
    near = nearest_codes(tokenizer.quantizer.codebook, config.near).to(world.device)  # (V, near)
    near_number = nearest_codes(circle(len(near)), 3).to(world.device)          # (V, 3)
    B, K = config.batch, tokenizer.config.queries
    n_numbers = replayed(config)
    is_clip = torch.arange(B + n_numbers) < B
    corpus = prior.corpus_of(llm_folder(config)) if n_numbers else {}
    if config.dtype == "bfloat16" and world.device.type == "cuda" and \
            not train.has_bf16(world.device):
        world.print0("--dtype bfloat16: this GPU emulates it, slowly; try --dtype float32")
    world.print0(f"SFT: {millions(model)} parameters, {config.steps} steps of {B} clips and "
                 f"{n_numbers} number sequences of {1 + FRAMES * K} tokens, {len(codes)} clips")
    loss_of = train.distribute(NextToken(model), world)
    n = world.accumulation_steps(B + n_numbers, config.micro_batch)             # micro-batches

    with train.Run(folder, model, config, world, sources=sources) as run:
        for step in run:
            index = train.batch_indices(config.seed, step, B, len(codes))       # (B,)
            targets = torch.from_numpy(codes[index.numpy()])                    # (B, F, K)
            targets = targets.to(world.device).long()
            generator = train.generator(config.seed, step, device=world.device)
            inputs = corrupt_inputs(targets, near, config.corrupt, generator)   # (B, F, K)
            # the batch: B clips, then n_numbers number sequences of the same shape (F, K)
            numbers = number_sequences(n_numbers, K, FRAMES, generator, **corpus)
            corrupted = corrupt_inputs(numbers, near_number, config.corrupt, generator)
            targets, inputs = torch.cat([targets, numbers]), torch.cat([inputs, corrupted])
            targets = world.shard(sequence(model, targets))                     # (b, S)
            inputs = world.shard(sequence(model, inputs))                       # (b, S)

            outs = []
            micro_batches = zip(targets.tensor_split(n), inputs.tensor_split(n))
            for micro_batch in run.accumulate(micro_batches, loss_of):
                nats = loss_of(*micro_batch)                                    # (rows,)
                loss = nats.sum() / (B + n_numbers)
                (loss * world.size).backward()              # times ranks: a sum, not DDP's average
                outs.append(nats.detach())

            # clip the gradient norm, AdamW, zero_grad; and the log, with the clips' own loss
            nats = torch.cat(outs)                                              # (b,)
            loss_clips = world.all_reduce(nats[world.shard(is_clip)].sum()) / B
            run.step(nats.sum() / (B + n_numbers), loss_clips=loss_clips)

    checkpoint.finish(folder, model.save, config, model, world, sources)
    return model.eval()


# ------------------------------------------------------------------ the stage


def load_tokenizer(config, world: train.World) -> DDT:
    """The tokenizer of <out>, trained first if missing: a DDT, or a VQGAN with its methods."""
    if config.tokenizer == "ddt":
        return ddt.ensure(config, world)
    check(config.tokenizer == "vqgan", f"--tokenizer {config.tokenizer}: choose ddt or vqgan")
    import experiments.vqgan                                # only the comparison needs it
    return experiments.vqgan.ensure(config, world)


def stages(config) -> tuple[str, ...]:
    """The stages on whose weights the SFT model's rows in the result table depend."""
    return ("vae", "ddt", "sft") if config.tokenizer == "ddt" else (config.tokenizer, "sft")


def source_files(config) -> dict[str, Path]:
    """
    Name -> weights that the SFT model of <out> was trained from, for check_provenance: the
    tokenizer's, and the prior's if training started from <out>/llm and that still exists.
    """
    flags = checkpoint.read_json(Path(config.out, "sft", "trained.json"))
    files = checkpoint.model_files(config.out, config.tokenizer, "llm")
    if flags.get("llm") != "prior" or not files["llm"].exists():
        del files["llm"]
    return files


def knows_numbers(config) -> bool:
    """Whether the SFT model of <out> started from the prior or a text model, not from nothing."""
    flags = checkpoint.read_json(Path(config.out, "sft", "trained.json"))
    return flags.get("llm", "") not in ("", "none")


def ensure(config, tokenizer: DDT, world: train.World) -> Llama:
    """The SFT model of <out> for a later stage with `config`: loaded, or trained first."""
    folder = Path(config.out, "sft")
    if not checkpoint.has_model(folder):
        world.print0(f"{folder} is missing: training it first. {EXPECTED.get(config.preset, '')}")
        sft_config = train.stage_config("sft", Config, PRESETS, config, tokenizer=config.tokenizer)
        return run_stage(sft_config, tokenizer, world)
    return load(folder, **source_files(config)).to(world.device)


def check_config(c: Config) -> None:
    """UserError for flags that cannot work."""
    check_data(c)
    check(c.tokenizer in ("ddt", "vqgan"), f"--tokenizer {c.tokenizer}: choose ddt or vqgan")
    prior.check_shape(c)
    check(c.corrupt < 1, f"--corrupt {c.corrupt}: a share of the codes, below 1")
    check(c.near <= 256, f"--near {c.near}: between 1 and the 256 codes there are")
    check_ranges(c, replay=(0, 100))
    if c.llm != "none":
        default = Config(**PRESETS.get(c.preset, {}))
        for name in ("hidden", "ffn", "layers", "heads", "kv_heads"):
            check(getattr(c, name) == getattr(default, name), f"--{name} {getattr(c, name)}: the "
                  f"model of --llm {c.llm} has its own size; leave it out, or add --llm none")
    if c.llm not in ("", "none", "prior"):
        try:                                # a wrong folder is reported now, not after tokenizing
            bos = read_config(c.llm).bos_token_id
            if not is_meta(Path(c.llm)):
                weight_files(Path(c.llm))
        except ValueError as error:
            raise UserError(f"--llm {c.llm}: {error}") from None
        check(bos is not None, f"--llm {c.llm}: it names no bos_token_id, with which every clip "
              "begins")
    folder = Path(c.out, "sft")
    check(c.llm or c.preset != "paper" or (folder / "model.safetensors").exists(),
          f"{folder} is missing, and the paper's model starts from Llama-3.1-8B: make it with "
          f"`python sft.py --preset paper --out {c.out} --llm DIR`, DIR that model's folder")


def run_stage(config: Config, tokenizer: DDT, world: train.World) -> Llama:
    """Loads the model that `config` describes, or trains it; adds its row to the table."""
    check_config(config)
    folder = Path(config.out, "sft")
    if checkpoint.is_trained(folder, config, world):
        model = load(folder, **source_files(config)).to(world.device)
    else:
        if config.llm == "prior":
            prior.ensure(config, world)
        model = train_sft(config, tokenizer, world)
    predictors = {"SFT": predictor(model, tokenizer)}
    results = evaluate.add_rows(config, predictors, stages(config), tokenizer.config.size, world)
    if world.is_main:
        print(evaluate.table(results))
    return model


def main(argv: list[str] | None = None) -> None:
    config = train.parse(Config, PRESETS, argv)
    check_config(config)
    world = train.start(config.seed, config.out, config.compile)
    run_stage(config, load_tokenizer(config, world), world)


if __name__ == "__main__":
    train.cli(main)
