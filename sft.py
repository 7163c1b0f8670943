"""
Symbol learning: a Llama learns the tokens of clips like a foreign language.

Source: Phys-AR section 3.3. Every frame of a clip becomes K codes (ddt.py), a clip the sequence BOS + 32 K codes, and the model
is trained with next-token cross-entropy on all of them. At inference it is given the codes of 3 frames and continues.

Choices where the paper is silent
1. The softmax is over the 256 visual codes only: at inference text words are masked anyway.
2. Codes enter in the order of their time steps, V_1 first. In reverse (three seeds) drift_error on iid clips is the same (+0.006
   +- 0.014), lower on small balls (-0.21 +- 0.05) and higher on slow ones (+0.08 +- 0.03).
3. Clips are tokenised once, before training. They are a few bytes each: 32 K uint8.
4. What the model itself will have said may be wrong, so what it reads in training is too. After the given frames, which are
   always true, a code is read as one of its three nearest (itself among them), and one in ten as any code; what is to be said
   stays true. A model that has only read true clips derails at its own first odd code: iid drift_error 0.55 without random
   codes, 0.33 with (one run each, an earlier tokenizer); what the near ones gain has not been measured apart.
5. A new model's embedding and head begin alike for near codes (`begin_alike`). From independent rows it has to learn of 256
   codes one by one that they are neighbours: iid drift_error 0.61 without, 0.39 with (one run each, 2000 steps, eight angles
   a frame).
6. Evaluation takes the most likely code each time. Samples (top-k 50, top-p 0.95, those of GRPO's rollouts) have a larger
   drift_error on iid clips (0.44 against 0.34, one model), and vary.

    python sft.py                       # makes runs/tiny/vae and runs/tiny/ddt first if they are missing
    python sft.py --llm DIR             # starts from the weights of a Llama or Qwen2 (Hugging Face's or Meta's layout)

Expected at `tiny` on 2 CPU cores: 7 to 14 minutes, of them 1 to 2 for the tokens; loss 1.4 nats a token, drift_error 0.24 to
0.29 on iid clips.

Axes: B clips, F frames, K tokens of a frame, S sequence, V visual codes.
"""
import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import ddt as tokenizers
import reward
import sim
import train
from ddt import DDT, at_a_time
from lm import CONFIGS, Llama, LlamaConfig, generate, read_config
from sim import CONDITION, FRAMES


@dataclass
class Config:
    preset: str = "tiny"
    out: str = ""               # run folder; empty: runs/<preset>
    seed: int = 0
    fresh: bool = False         # start over, ignoring checkpoints
    save_every: int = 100       # steps between checkpoints
    plan: bool = False          # print what the run would need, and end
    world: int = 0              # ... on so many ranks; 0: as many as there are now
    # data
    scenario: str = "uniform"   # one of sim.SCENARIOS, or all
    clips: int = 6000           # training clips per scenario
    corrupt: float = 0.1        # share of the codes read, after the given frames, that are replaced by random ones
    near: int = 3               # the others are read as one of their so many nearest, themselves among them; 1: as they are
    tokenizer: str = "ddt"      # or vqgan (baselines.py)
    # model
    llm: str = ""               # folder of weights to start from (lm.py); empty: a new model of the size below
    hidden: int = 128
    ffn: int = 384
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    dtype: str = "float32"      # of the weights, or bfloat16; the optimizer's are float32
    checkpointing: bool = False # keep only the blocks' inputs for the backward pass, and compute the rest again there
    # optimization
    steps: int = 4000
    batch: int = 16             # twice the steps of 32 clips learn more in the same time
    micro: int = 0              # clips per backward pass and rank; 0: all at once
    lr: float = 1.5e-3
    warmup: int = 50
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-6
    weight_decay: float = 0.05
    clip: float = 1.0           # gradient norm; 0: no clipping
    eval_clips: int = 256       # per split of the table at the end


# `paper` is Table 3, on 80 GPUs: 9 or 10 clips each. It needs --llm, the folder of Llama-3.1-8B.
PRESETS = {
    "tiny": {},
    "small": dict(scenario="all", clips=20000, hidden=768, ffn=2304, layers=12, heads=12, kv_heads=4, dtype="bfloat16",
                  steps=6000, batch=128, lr=6e-4, warmup=300),
    "paper": dict(scenario="all", clips=3_000_000, corrupt=0.0, near=1, dtype="bfloat16", checkpointing=True, steps=360_000,
                  batch=768, lr=1e-4, warmup=5000, save_every=1000, eval_clips=1000),
}
EXPECTED = {"tiny": "7 to 14 minutes on 2 CPU cores.", "small": "Not run yet.", "paper": "Not run yet."}

# ------------------------------------------------------------------ clips as sequences


def tokenizer(config, world: train.World) -> DDT:
    """The tokenizer of <out> that --tokenizer names, made first if it is missing. A VQGAN has DDT's encode and decode."""
    train.need(config.tokenizer in ("ddt", "vqgan"), f"--tokenizer {config.tokenizer}: choose ddt or vqgan")
    if config.tokenizer == "ddt":
        return tokenizers.ensure(config, world)
    import baselines                        # only what compares needs it
    return baselines.ensure(config, world)


def tokenizer_file(config) -> dict[str, Path]:
    return {config.tokenizer: Path(config.out, config.tokenizer, "model.safetensors")}


@torch.no_grad()
def tokenize(ddt: DDT, clips: sim.Clips) -> Tensor:
    """Clips -> codes (B, F, K), uint8, painted and encoded on the tokenizer's device."""
    device, size = ddt.quantizer.codebook.device, ddt.config.size
    codes, batch = torch.empty(len(clips), FRAMES, ddt.config.queries, dtype=torch.uint8), at_a_time(device) // FRAMES
    for i in range(0, len(clips), batch):
        part = clips[i:i + batch].to(device)
        frames = sim.render(part.position, part.radius, size)
        codes[i:i + batch] = ddt.encode(frames.flatten(0, 1)).unflatten(0, frames.shape[:2]).cpu()
    return codes


def sequence(model: Llama, codes: Tensor) -> Tensor:
    """codes (B, F, K) -> ids (B, 1 + F K), the first of them BOS."""
    ids = model.first_code + codes.flatten(1).long()
    return torch.cat([torch.full_like(ids[:, :1], model.config.bos_token_id), ids], 1)


@torch.no_grad()
def decode(ddt: DDT, codes: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """codes (B, F, K) -> frames (B, F, 3, H, W) in [0, 1], one call of the decoder each."""
    frames = [ddt.decode(part, generator=generator) for part in codes.flatten(0, 1).split(at_a_time(codes.device))]
    return torch.cat(frames).unflatten(0, codes.shape[:2])


def predictor(model: Llama, ddt: DDT, seed: int = 0, top_k: int = 1, top_p: float = 1.0) -> Callable[[Tensor], Tensor]:
    """
    The model as reward.evaluate wants it: frames (B, 3, 3, H, W) -> frames (B, 32, 3, H, W), the most likely code each time,
    or samples with another top_k.
    """
    @torch.no_grad()
    def predict(frames: Tensor) -> Tensor:
        K, generator = ddt.config.queries, torch.Generator(frames.device).manual_seed(seed)
        shown = ddt.encode(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])           # (B, 3, K)
        codes, _ = generate(model, sequence(model, shown), (FRAMES - CONDITION) * K, 1, top_k, top_p, generator)
        return torch.cat([frames, decode(ddt, codes.view(len(frames), -1, K), generator)], 1)
    return predict


# ------------------------------------------------------------------ training


class Codes:
    """Codes of clips (n, F, K), uint8, in .npy files mapped into memory: codes[rows (B,)] reads what is asked for, (B, F, K)."""

    def __init__(self, paths: list[Path]):
        self.files = [np.load(path, mmap_mode="r") for path in paths]
        self.ends = np.cumsum([len(file) for file in self.files])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, rows: Tensor) -> Tensor:
        file = np.searchsorted(self.ends, rows.numpy(), "right")
        return torch.from_numpy(np.stack([self.files[f][i - self.ends[f]] for f, i in zip(file, rows.tolist())]))


def training_codes(config: Config, ddt: DDT, folder: Path, world: train.World) -> Codes:
    """The codes of the training clips, from <folder>/<scenario>-<part>.npy. The ranks share the making of parts that are missing."""
    stamp = json.dumps({"scenario": config.scenario, "clips": config.clips, "seed": config.seed,
                        "codebook": ddt.quantizer.codebook.double().sum().item()})            # tokens of another tokenizer are stale
    folder, note = train.writable(folder), folder / "of.json"
    if world.is_main and (not note.exists() or note.read_text() != stamp):
        for path in [note, *folder.glob("*.npy")]:
            path.unlink(missing_ok=True)
        note.write_text(stamp)
    train.wait(world)
    size = max(1024, 2 ** (config.clips // 64).bit_length())                      # clips a part: some hundred parts at most
    firsts = {name: sim.first_frames(name, "pretrain", config.clips, config.seed) for name in train.scenarios(config.scenario)}
    parts = {folder / f"{name}-{i // size:05d}.npy": clips[i:i + size]
             for name, clips in firsts.items() for i in range(0, len(clips), size)}
    missing = [(path, part) for path, part in parts.items() if not whole(path, len(part), ddt)]
    train.wait(world)                                                             # every rank has looked before one writes
    mine = missing[world.rank::world.size]
    bar = tqdm(total=sum(len(part) for _, part in mine), desc="tokens", unit="clip", ncols=100, mininterval=5,
               disable=not (world.is_main and mine))
    for path, part in mine:
        clips, codes = sim.play(part), []
        for i in range(0, len(clips), 128):
            codes.append(tokenize(ddt, clips[i:i + 128]))
            bar.update(len(codes[-1]))
        with train.replacing(path) as aside, open(aside, "wb") as file:
            np.save(file, torch.cat(codes).numpy())
    bar.close()
    train.wait(world)
    return Codes(list(parts))


def whole(path: Path, n: int, ddt: DDT) -> bool:
    """Whether a file holds n clips' codes. One that was cut off or is not ours does not, and is made again."""
    try:
        codes = np.load(path, mmap_mode="r")
        return codes.shape == (n, FRAMES, ddt.config.queries) and codes.dtype == np.uint8
    except (OSError, ValueError):
        return False


def neighbours(codebook: Tensor, n: int) -> Tensor:
    """codebook (V, dim), unit vectors -> the n nearest codes of each (V, n), itself the first, also where two are equal."""
    codebook = codebook.double().cpu()
    return (codebook @ codebook.T).fill_diagonal_(2).topk(n).indices


def misread(codes: Tensor, near: Tensor, corrupt: float, generator: torch.Generator) -> Tensor:
    """
    What the model reads of codes (B, F, K): the given frames as they are; of those after them one of the `near` codes (V, n)
    of each, and of a share `corrupt` any code at all. Head of this file, 4.
    """
    close = near[codes, torch.randint(near.shape[1], codes.shape, generator=generator)]
    wrong = torch.rand(codes.shape, generator=generator) < corrupt
    read = torch.where(wrong, torch.randint(len(near), codes.shape, generator=generator), close)
    return torch.cat([codes[:, :CONDITION], read[:, CONDITION:]], 1)


def batch_of(model: Llama, codes: Tensor, near: Tensor, corrupt: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Clips' codes (B, F, K) -> what is to be said, and what is read while it is said: ids (B, 1 + F K) each."""
    return sequence(model, codes), sequence(model, misread(codes, near, corrupt, generator))


@torch.no_grad()
def begin_alike(model: Llama, codebook: Tensor, frequency: float = 5.0) -> None:
    """
    Embedding and head rows of the codes begin as random Fourier features (Rahimi and Recht 2007) of the codebook (V, dim):
    cos(w c + b), b uniform, w ~ N(0, s^2) with an s for each channel from 1 to `frequency`, as large as the rows they replace.
    So near codes are alike from the start, and what is learnt of one holds for its neighbours.
    """
    for weight in (model.model["embed_tokens"].weight, model.lm_head.weight):             # (1 + V, D); a new model's are not tied
        D, rows = weight.shape[1], weight[model.first_code:]
        w = torch.randn(codebook.shape[1], D) * torch.logspace(0, math.log10(frequency), D)
        features = math.sqrt(2) * torch.cos(codebook.cpu() @ w + 2 * math.pi * torch.rand(D))   # (V, D), of variance 1
        rows.copy_(rows.std() * features.to(rows.device))


class NextToken(nn.Module):
    """
    Cross-entropy of every code of ids (B, S) given those that were `read` before it (B, S) -> nats a token, per clip (B,).
    """

    def __init__(self, model: Llama):
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, read: Tensor) -> Tensor:
        logits = self.model.visual_logits(self.model(read[:, :-1]))                       # (B, S - 1, V)
        target = ids[:, 1:] - self.model.first_code                                       # (B, S - 1)
        return F.cross_entropy(logits.flatten(0, 1).float(), target.flatten(), reduction="none").view_as(target).mean(1)


def shape(config: Config, queries: int, V: int = 256) -> LlamaConfig:
    """The model to be trained: that of --llm (or Llama-3.1-8B, for a plan of `paper` without) and V codes, or a new one."""
    if config.llm or config.preset == "paper":
        try:
            c = read_config(config.llm) if config.llm else CONFIGS["llama-3.1-8b"]
        except ValueError as error:
            raise train.Problem(f"--llm {config.llm}: {error}") from None
        return c if c.n_visual else dataclasses.replace(c, vocab_size=c.vocab_size + V, n_visual=V)
    return LlamaConfig(1 + V, config.hidden, config.ffn, config.layers, config.heads, config.kv_heads,
                       config.hidden // config.heads, max_position_embeddings=1 + FRAMES * queries, n_visual=V)


def plan(config: Config, ranks: int) -> train.Plan:
    """Memory and work of train_sft. `measure` runs the model on the meta device."""
    K = tokenizers.Config(**tokenizers.PRESETS[config.preset]).queries if config.tokenizer == "ddt" else 16
    c, S = shape(config, K), 1 + FRAMES * K
    rows = train.rows_at_once(config.batch, ranks, config.micro)
    with torch.device("meta"):
        model = Llama(c).to(getattr(torch, config.dtype))
    flops, activations = language_model_pass(c, model.head.dtype, rows, S, config.checkpointing)
    return train.Plan(train.training_memory(model, ranks), {"activations": activations}, config.batch * (S - 1),
                      (4 if config.checkpointing else 3) * flops * config.batch / rows)


def language_model_pass(c: LlamaConfig, dtype: torch.dtype, rows: int, S: int, checkpointing: bool) -> tuple[float, float]:
    """FLOPs of a forward pass of `rows` clips of S tokens, and the bytes it keeps for the backward pass."""
    def passed(layers: int) -> tuple[float, float]:
        with torch.device("meta"):
            loss_of = NextToken(Llama(dataclasses.replace(c, num_hidden_layers=layers)).to(dtype))
            ids = torch.zeros(rows, S, dtype=torch.int64)
        return train.measure(lambda: loss_of(ids, ids), loss_of)
    (flops1, kept1), (flops2, kept2) = passed(1), passed(2)                 # layers are alike
    L = c.num_hidden_layers
    inputs = rows * (S - 1) * c.hidden_size * dtype.itemsize
    return flops1 + (L - 1) * (flops2 - flops1), kept1 + (L - 1) * (inputs if checkpointing else kept2 - kept1)


def train_sft(config: Config, ddt: DDT, world: train.World) -> Llama:
    """Trains a Llama on the training clips' codes and saves it in <out>/sft."""
    folder = train.writable(Path(config.out, "sft"))
    if config.fresh:
        train.discard(folder)
    train.made_of(folder, **tokenizer_file(config))
    torch.manual_seed(config.seed)
    S = 1 + FRAMES * ddt.config.queries
    V = len(ddt.quantizer.codebook)
    if config.llm:
        try:
            model = Llama.load(config.llm, getattr(torch, config.dtype), world.device, n_visual=V)
        except ValueError as error:
            raise train.Problem(f"--llm {config.llm}: {error}") from None
        train.need(model.config.bos_token_id is not None, f"--llm {config.llm}: its config.json names no bos_token_id, which "
                   "every clip begins with")
        train.need(S <= model.config.max_position_embeddings, f"--llm {config.llm}: a clip is {S} tokens, this model's "
                   f"context {model.config.max_position_embeddings}")
    else:
        model = Llama(shape(config, ddt.config.queries, V)).to(world.device, getattr(torch, config.dtype))
        begin_alike(model, ddt.quantizer.codebook)
    model.checkpointing = config.checkpointing
    codes = training_codes(config, ddt, folder / "tokens", world)
    world.say(f"SFT: {sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters, {config.steps} steps of "
              f"{config.batch} clips of {S} tokens, {len(codes)} clips")
    near = neighbours(ddt.quantizer.codebook, config.near)
    loss_of, parts = train.distribute(NextToken(model), world), world.parts(config.batch, config.micro)
    with train.Run(folder, model, config, world) as run:
        for step in run:
            clips = codes[train.rows(config.seed, step, config.batch, len(codes))].long()         # (B, F, K)
            asked, read = batch_of(model, clips, near, config.corrupt, train.generator(config.seed, step))
            batch = (world.share(ids).to(world.device).tensor_split(parts) for ids in (asked, read))
            total = 0.0
            for part in run.accumulate(zip(*batch), loss_of):
                loss = loss_of(*part).sum() / config.batch
                (loss * world.size).backward()                      # DDP averages over ranks: this makes it the sum
                total += loss.detach()
            run.step(total)
    if world.is_main:
        reward.drop_rows(folder.parent / "results.json", "SFT", "SFT + RL")
    train.finish(folder, model.save, config, model, world)
    return model.eval()


def report(config, ddt: DDT, model: Llama, world: train.World) -> None:
    """The model's row of the result table; what is there already is not done again."""
    if world.is_main:
        reward.add_row(Path(config.out, "results.json"), "SFT", predictor(model, ddt), train.scenarios(config.scenario),
                       sim.SHOWN, config.eval_clips, size=ddt.config.size, device=world.device)
    train.wait(world)


def ensure(config, ddt: DDT, world: train.World) -> Llama:
    """The supervised model of <out>: loaded, or trained first."""
    folder = Path(config.out, "sft")
    if not (folder / "model.safetensors").exists():
        world.say(f"{folder} is missing: training it first. {EXPECTED.get(config.preset, '')}")
        main(train.handed_on(config) + ["--tokenizer", config.tokenizer])
    report(config, ddt, model := load(folder, **tokenizer_file(config)).to(world.device), world)
    return model


def load(folder: Path, **sources: Path) -> Llama:
    """A trained model, after a look at what it was made of, as far as `sources` say. Raises train.Problem."""
    train.check_made_of(Path(folder), **sources)
    try:
        return Llama.load(folder).eval()
    except ValueError as error:
        raise train.Problem(f"{error}: delete {folder}, or train it again with --fresh") from None


def main(argv: list[str] | None = None) -> None:
    config = train.parse(Config, PRESETS, argv)
    train.scenarios(config.scenario)
    train.need(config.dtype in ("float32", "bfloat16"), f"--dtype {config.dtype}: choose float32 or bfloat16")
    train.need(0 <= config.corrupt < 1, f"--corrupt {config.corrupt}: a share of the codes, below 1")
    train.need(1 <= config.near <= 256, f"--near {config.near}: between 1 and the 256 codes there are")
    train.need(config.hidden % (2 * config.heads) == 0 and config.heads % config.kv_heads == 0,
               f"--hidden {config.hidden} must divide by twice --heads {config.heads}, and that by --kv_heads {config.kv_heads}")
    if config.llm:
        shape(config, queries=1)            # a folder that cannot be read is known before a tokenizer is trained
    if config.plan:
        return train.show_plan(plan, config)
    out = Path(config.out)
    train.need(config.llm or config.preset != "paper" or (out / "sft" / "model.safetensors").exists(),
               f"{out / 'sft'} is missing, and the paper's model starts from Llama-3.1-8B: make it with "
               f"`python sft.py --preset paper --out {out} --llm DIR`, DIR that model's folder")
    world = train.start(config.seed)
    train.check_fits(plan, config, world)
    train.writable(out)
    train.occupy(out, world)
    ddt = tokenizer(config, world)
    if train.is_trained(out / "sft", "model.safetensors", config, world):
        model = load(out / "sft", **tokenizer_file(config)).to(world.device)
    else:
        model = train_sft(config, ddt, world)
    report(config, ddt, model, world)
    if world.is_main:
        print(reward.table(out / "results.json"))


if __name__ == "__main__":
    train.cli(main)
