"""
Symbol learning: a Llama learns the tokens of clips like a foreign language.

Source: Phys-AR section 3.3. Every frame of a clip becomes K codes (ddt.py), a clip the sequence BOS + 32 K codes, and the model
is trained with next-token cross-entropy on all of them. At inference it is given the codes of 3 frames and continues.

Choices where the paper is silent
1. The softmax is over the 256 visual codes only: at inference text words are masked anyway.
2. Codes enter in the order of their time steps, V_1 first.
3. Clips are tokenised once, before training. They are a few bytes each: 32 K uint8.
4. One code in ten of what the model reads is replaced by a random one; what it has to say stays true. A model that has only
   read true clips derails at its own first odd code, or at a ball whose size it does not know (iid drift_error 0.55
   without, 0.33 with; reward on post-training clips 1.67 and 2.21: one run each, 128 clips, an earlier tokenizer).

    python sft.py                       # makes runs/tiny/vae and runs/tiny/ddt first if they are missing
    python sft.py --llm DIR             # starts from the weights of a Llama or Qwen2 (Hugging Face's or Meta's layout)

Expected at `tiny` on 2 CPU cores: 11 minutes, of them 1 for the tokens; loss 0.2 nats a token, drift_error 0.3 on iid clips.

Axes: B clips, F frames, K tokens of a frame, S sequence, V visual codes.
"""
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import ddt as tokenizers
import reward
import sim
import train
from ddt import DDT, at_a_time
from lm import Llama, LlamaConfig, generate
from sim import CONDITION, FRAMES


@dataclass
class Config:
    preset: str = "tiny"
    out: str = ""               # run folder; empty: runs/<preset>
    seed: int = 0
    fresh: bool = False         # start over, ignoring checkpoints
    save_every: int = 100       # steps between checkpoints
    # data
    scenario: str = "uniform"   # one of sim.SCENARIOS, or all
    clips: int = 6000           # training clips per scenario
    corrupt: float = 0.1        # share of the codes read that are replaced by random ones
    tokenizer: str = "ddt"      # or vqgan (baselines.py)
    # model
    llm: str = ""               # folder of weights to start from (lm.py); empty: a new model of the size below
    hidden: int = 128
    ffn: int = 384
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    # optimization
    steps: int = 2200
    batch: int = 16             # twice the steps of 32 clips learn more in the same time
    lr: float = 1.5e-3
    warmup: int = 50
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-6
    weight_decay: float = 0.05
    clip: float = 1.0           # gradient norm; 0: no clipping
    eval_clips: int = 256       # per split of the table at the end


PRESETS = {
    "tiny": {},
}
EXPECTED = {"tiny": "About 11 minutes on 2 CPU cores."}

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


def predictor(model: Llama, ddt: DDT, seed: int = 0, top_k: int = 50, top_p: float = 0.95) -> Callable[[Tensor], Tensor]:
    """The model as reward.evaluate wants it: frames (B, 3, 3, H, W) -> frames (B, 32, 3, H, W), one sample each."""
    @torch.no_grad()
    def predict(frames: Tensor) -> Tensor:
        K, generator = ddt.config.queries, torch.Generator(frames.device).manual_seed(seed)
        shown = ddt.encode(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])           # (B, 3, K)
        codes, _ = generate(model, sequence(model, shown), (FRAMES - CONDITION) * K, 1, top_k, top_p, generator)
        return torch.cat([frames, decode(ddt, codes.view(len(frames), -1, K), generator)], 1)
    return predict


# ------------------------------------------------------------------ training


def training_codes(config: Config, ddt: DDT, folder: Path, world: train.World) -> Tensor:
    """The training clips as codes (B, F, K), uint8: from <out>/sft/tokens.safetensors, or made by all ranks together."""
    path = folder / "tokens.safetensors"
    stamp = str({"scenario": config.scenario, "clips": config.clips, "seed": config.seed,
                 "codebook": ddt.quantizer.codebook.double().sum().item()})       # tokens of another tokenizer are stale
    if path.exists():
        tensors, metadata = train.read_safetensors(path)
        if metadata.get("of") == stamp:
            return tensors["codes"]
    parts = []
    for name in train.scenarios(config.scenario):
        clips = world.share(sim.sample(name, "pretrain", config.clips, config.seed))
        pieces = [clips[i:i + 64] for i in range(0, len(clips), 64)]
        bar = tqdm(pieces, desc=f"tokens, {name}", ncols=100, mininterval=5, disable=not world.is_main)
        parts.append(train.gather(torch.cat([tokenize(ddt, piece) for piece in bar])))
    codes = torch.cat(parts)
    if world.is_main:
        train.write_safetensors(path, {"codes": codes}, {"of": stamp})
    train.wait(world)
    return codes


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
            model = Llama.load(config.llm, torch.float32, world.device, n_visual=V)
        except ValueError as error:
            raise train.Problem(f"--llm {config.llm}: {error}") from None
        train.need(model.config.bos_token_id is not None, f"--llm {config.llm}: its config.json names no bos_token_id, which "
                   "every clip begins with")
        train.need(S <= model.config.max_position_embeddings, f"--llm {config.llm}: a clip is {S} tokens, this model's "
                   f"context {model.config.max_position_embeddings}")
    else:
        model = Llama(LlamaConfig(1 + V, config.hidden, config.ffn, config.layers, config.heads, config.kv_heads,
                                  config.hidden // config.heads, max_position_embeddings=S, n_visual=V)).to(world.device)
    optimizer = train.adamw(model, config)
    first = train.resume(folder, model, optimizer, config)
    codes = training_codes(config, ddt, folder, world)
    world.say(f"SFT: {sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters, {config.steps} steps of "
              f"{config.batch} clips of {S} tokens, {len(codes)} clips")
    loss_of = train.distribute(NextToken(model), world)
    with train.Log(folder, first, config, world) as log:
        for step in range(first, config.steps):
            ids = sequence(model, codes[train.rows(config.seed, step, config.batch, len(codes))])         # (B, S)
            generator = train.generator(config.seed, step)
            wrong = torch.rand(ids.shape, generator=generator) < config.corrupt
            wrong[:, 0] = False                                                           # BOS stays
            other = model.first_code + torch.randint(V, ids.shape, generator=generator)
            read = torch.where(wrong, other, ids)
            loss = loss_of(world.share(ids).to(world.device), world.share(read).to(world.device)).sum() / config.batch
            log(step, loss=train.total(loss), **train.update(model, optimizer, [loss], step, config))
            train.checkpoint(folder, model, optimizer, step, config, world)
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
    """A trained model, after a look at what it was made of. Raises train.Problem."""
    train.made_of(folder, **sources)
    try:
        return Llama.load(folder).eval()
    except ValueError as error:
        raise train.Problem(f"{error}: delete {folder}, or train it again with --fresh") from None


def main(argv: list[str] | None = None) -> None:
    config = train.parse(Config, PRESETS, argv)
    train.scenarios(config.scenario)
    train.need(0 <= config.corrupt < 1, f"--corrupt {config.corrupt}: a share of the codes, below 1")
    train.need(config.hidden % (2 * config.heads) == 0 and config.heads % config.kv_heads == 0,
               f"--hidden {config.hidden} must divide by twice --heads {config.heads}, and that by --kv_heads {config.kv_heads}")
    world = train.start(config.seed)
    out = train.writable(Path(config.out))
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
