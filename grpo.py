"""
Physics reasoning: GRPO with a reward computed from the physics of the decoded frames. The main job.

Source: Phys-AR section 3.4, Table 3 and appendix D; GRPO is Shao et al. 2024, https://arxiv.org/abs/2402.03300.
For each condition (the first 3 frames of a clip at speeds and sizes just outside the training range) the model samples
a group of continuations. They are decoded to frames, scored (reward.py), and each is made more likely or less by how
much better than its group it did.

Differences from textbook GRPO, and choices where the paper is silent
1. The KL term is to the frozen SFT model. The paper writes pi_old; with one update per rollout that term is zero.
2. It is exact: a sum over the 256 codes of every token, not an estimate from the sampled one.
3. Log-probabilities are taken on the support the sampler drew from (top-k 50, top-p 0.95), kept with the rollout, for the
   old policy and the new. So the ratio is exactly 1 at the first update.
4. Advantages divide by std + 0.1, about what the reward of a whole clip (0.05 to 0.11) or of eight frames (0.08) differs by (std)
   between two decodings of the same codes: equal rollouts must not be told apart by noise. (Groups differ by 0.25 to 0.4.)
5. Clips have one length: no mask, no length normalisation. The loss is the mean over all tokens of the global batch.
6. A token is judged by the reward of the eight frames from its own on, not by the whole clip's: it cannot change what was
   before it, and what is long after it says little of it. Where no frame counts (the true ball has left the view) nothing is
   learnt. The paper's way is --whole_clip.
7. The KL to the SFT model is also taken on true clips of the training range, where there are no rollouts (`true_clips`). Without
   it the two bands that are trained pull what lies between them to themselves: at v in [2, 3] drift_error rose from 0.16 to 0.44
   while the bands improved (seed 1, the other settings as here).

    torchrun grpo.py                    # from nothing: VAE, DDT, SFT (if missing in runs/tiny), GRPO, table, pictures
    python grpo.py --fresh --beta 0     # trains the policy again, without torchrun; any field of Config is a flag
    torchrun --nproc_per_node=8 grpo.py # 8 ranks; the global batch stays as it is

Expected at `tiny` on 2 CPU cores: 19 minutes in all, GRPO 2.5 of them (2.7 seconds a step); up to twice that on slower ones.

Axes: P prompts, G rollouts per prompt (group), R = P G rollouts, S sequence, T sampled tokens, V visual codes, F frames,
K tokens of a frame.
"""
import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import ddt as tokenizers
import reward
import sft
import sim
import train
from ddt import DDT
from lm import Cache, Llama, LlamaConfig, generate, logprobs
from sim import CONDITION, FRAMES


@dataclass
class Config:
    preset: str = "tiny"
    out: str = ""               # run folder; empty: runs/<preset>
    seed: int = 0
    fresh: bool = False         # start over, ignoring checkpoints
    save_every: int = 5         # steps between checkpoints
    plan: bool = False          # print what the run would need, and end
    world: int = 0              # ... on so many ranks; 0: as many as there are now
    # data
    scenario: str = "uniform"   # one of sim.SCENARIOS, or all
    clips: int = 2000           # conditions to draw from, per scenario
    tokenizer: str = "ddt"      # or vqgan (baselines.py)
    # rollout
    prompts: int = 8            # P, per step
    group: int = 8              # G
    top_k: int = 50
    top_p: float = 0.95
    # loss
    ratio_clip: float = 0.2     # PPO's epsilon
    horizon: int = 8            # frames by whose reward a token is judged, its own the first of them
    whole_clip: bool = False    # ... or by all of the clip's, as in the paper
    beta: float = 0.02          # weight of the KL to the SFT model on rollouts
    keep: float = 0.05          # ... and on clips of the training range
    # optimization
    micro: int = 32             # rollouts per backward pass: 64 at once take the CPU 1.5 to 3 times as long
    checkpointing: bool = False # keep only the blocks' inputs for the backward pass, and compute the rest again there
    steps: int = 50
    lr: float = 1e-4
    warmup: int = 5
    beta1: float = 0.9
    beta2: float = 0.99
    eps: float = 1e-6
    weight_decay: float = 0.05
    clip: float = 1.0           # gradient norm; 0: no clipping
    eval_clips: int = 256       # per split of the table at the end


# `paper` is Table 3, on 8 GPUs: 3 or 4 prompts each. The paper gives neither group nor beta. 28 is taken as prompts; groups
# of 8 and beta are those of `tiny` (the KL stays below 0.2 nats a token there; groups of 4 and 16 do no better).
PRESETS = {
    "tiny": {},
    "small": dict(scenario="all", clips=20000, prompts=32, micro=64, steps=300, lr=2e-5, warmup=20),
    "paper": dict(scenario="all", clips=30000, prompts=28, whole_clip=True, keep=0.0, micro=8, checkpointing=True, steps=1600,
                  lr=3e-6, warmup=100, save_every=50, eval_clips=1000),
}
EXPECTED = {"tiny": "2 to 4 minutes on 2 CPU cores.", "small": "Not run yet.", "paper": "Not run yet."}
NOISE = 0.1                     # of the reward: its std between two decodings of the same codes, three tokenizers

# ------------------------------------------------------------------ the algorithm


@dataclass
class Rollout:
    ids: Tensor                 # (R, S)        BOS, condition, sampled tokens
    codes: Tensor               # (R, T)        the sampled tokens as codes
    support: Tensor             # (R, T, V)     what each was drawn from
    logp_old: Tensor            # (R, T)        under the policy that sampled
    logits_ref: Tensor          # (R, T, V)     of the frozen SFT model
    advantage: Tensor           # (R, T)
    scores: dict[str, Tensor]   # (P, G) each   reward, velocity, mass

    def split(self, n: int) -> list["Rollout"]:
        """n parts of the rollouts for as many backward passes."""
        fields = (self.ids, self.codes, self.support, self.logp_old, self.logits_ref, self.advantage)
        return [Rollout(*part, self.scores) for part in zip(*(x.tensor_split(n) for x in fields))]


def advantages(reward: Tensor) -> Tensor:
    """Eq. 8: reward (P, G), or one for each frame (P, G, F) -> the same shape, normalised within each group. NaN: 0."""
    return ((reward - reward.mean(1, keepdim=True)) / (reward.std(1, keepdim=True) + NOISE)).nan_to_num()


def last_logits(model: nn.Module, ids: Tensor, T: int) -> Tensor:
    """Logits over the visual codes for the last T tokens: ids (R, S) -> (R, T, V)."""
    return model.visual_logits(model(ids[:, :-1])[:, -T:])


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Exact KL(p || q) of log-probabilities (..., V) -> (...)."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def grpo_loss(logits: Tensor, logits_ref: Tensor, codes: Tensor, support: Tensor, logp_old: Tensor, advantage: Tensor,
              ratio_clip: float, beta: float) -> dict[str, Tensor]:
    """
    Eq. 9-10 with PPO's clipped ratio, per rollout: the mean over its tokens of
    -min(ratio A, clip(ratio) A) + beta KL(pi || pi_ref).

    logits, logits_ref (R, T, V), codes, logp_old (R, T), support (R, T, V), advantage (R,), or (R, T) of each token ->
    {loss, kl, entropy, clipped}, (R,) each.
    With ratio 1 the loss is -A + beta KL, and its gradient that of -A log pi + beta KL.
    """
    logp = logprobs(logits, codes, support)                                       # (R, T)
    ratio = (logp - logp_old).exp()
    A = advantage if advantage.ndim == 2 else advantage[:, None]                  # (R, T) or (R, 1)
    gain = torch.minimum(ratio * A, ratio.clamp(1 - ratio_clip, 1 + ratio_clip) * A)
    # KL and entropy are the untruncated policies': on a support, a code outside the reference's would make it infinite
    log_pi, log_ref = logits.float().log_softmax(-1), logits_ref.float().log_softmax(-1)
    kl = kl_divergence(log_pi, log_ref)                                           # (R, T)
    entropy = -(log_pi.exp() * log_pi).sum(-1)
    clipped = (ratio * A > ratio.clamp(1 - ratio_clip, 1 + ratio_clip) * A).float()
    return {"loss": (-gain + beta * kl).mean(1), "kl": kl.mean(1), "entropy": entropy.detach().mean(1),
            "clipped": clipped.mean(1)}


@torch.no_grad()
def rollout(policy: Llama, reference: Llama, ddt: DDT, clips: sim.Clips, config: Config,
            generators: list[torch.Generator]) -> Rollout:
    """Samples config.group continuations of each clip's condition, with a generator each, decodes and scores them."""
    P, G, K = len(clips), config.group, ddt.config.queries
    T = (FRAMES - CONDITION) * K
    shown = sim.render(clips.position[:, :CONDITION], clips.radius, ddt.config.size)              # (P, 3, 3, H, W)
    prompt = sft.sequence(policy, ddt.encode(shown.flatten(0, 1)).view(P, CONDITION, K))          # (P, 1 + 3 K)
    codes, support = generate(policy, prompt, T, G, config.top_k, config.top_p, generators)       # (P, G, T)
    predicted = torch.cat([sft.decode(ddt, c.view(G, -1, K), g) for c, g in zip(codes, generators)])      # (R, 29, 3, H, W)
    codes, support = codes.flatten(0, 1), support.flatten(0, 1)                                   # (R, T)
    frames = torch.cat([shown.repeat_interleave(G, 0), predicted], 1)                             # (R, F, 3, H, W)
    prompt_of = torch.arange(P, device=codes.device).repeat_interleave(G)
    scores = {k: v.unflatten(0, (P, G)) for k, v in reward.reward(frames, clips[prompt_of], config.horizon).items()}
    ahead = scores.pop("ahead")[:, :, CONDITION:]                                                 # (P, G, F - 3)
    if config.whole_clip:
        ahead = scores["reward"][:, :, None]                                                      # (P, G, 1)
    advantage = advantages(ahead).flatten(0, 1).expand(-1, FRAMES - CONDITION).repeat_interleave(K, 1)    # (R, T)

    ids = torch.cat([prompt.repeat_interleave(G, 0), policy.first_code + codes], 1)               # (R, S)
    logits, logits_ref = (torch.cat([last_logits(model, part, T) for part in ids.split(config.micro)])      # (R, T, V)
                          for model in (policy, reference))
    return Rollout(ids, codes, support, logprobs(logits, codes, support), logits_ref, advantage, scores)


@dataclass
class TrueClips:
    ids: Tensor                 # (B, S)        BOS and the codes of all frames
    logits_ref: Tensor          # (B, T, V)     of the frozen SFT model, for the last T tokens

    def split(self, n: int) -> list["TrueClips"]:
        return [TrueClips(*part) for part in zip(self.ids.tensor_split(n), self.logits_ref.tensor_split(n))]


@torch.no_grad()
def true_clips(reference: Llama, ddt: DDT, clips: sim.Clips) -> TrueClips:
    """Ground-truth clips, for the KL to the SFT model where there are no rollouts."""
    codes = sft.tokenize(ddt, clips).to(ddt.quantizer.codebook.device).long()                     # (B, F, K)
    ids = sft.sequence(reference, codes)                                                          # (B, S)
    return TrueClips(ids, last_logits(reference, ids, codes[:, CONDITION:].flatten(1).shape[1]))


class LastLogits(nn.Module):
    """`last_logits` as a forward of its own: DDP hooks forward() only."""

    def __init__(self, policy: Llama):
        super().__init__()
        self.policy = policy

    def forward(self, ids: Tensor, T: int) -> Tensor:
        return last_logits(self.policy, ids, T)


# ------------------------------------------------------------------ training


def sources(config: Config) -> dict[str, Path]:
    return sft.tokenizer_file(config) | {"sft": Path(config.out, "sft", "model.safetensors")}


def plan(config: Config, ranks: int) -> train.Plan:
    """
    Memory and work of train_grpo, for the model of <out>/sft, or as long as there is none for the one that sft.py's preset
    describes, and the tokenizer of ddt.py's preset.
    """
    base, tokens = (stage.Config(**{"preset": config.preset} | stage.PRESETS[config.preset]) for stage in (sft, tokenizers))
    made = Path(config.out, "sft")
    if (made / "model.safetensors").exists():
        base.llm, base.dtype = str(made), reward.read(made / "trained.json").get("dtype", base.dtype)
    return plan_for(config, ranks, sft.shape(base, tokens.queries), getattr(torch, base.dtype), tokens)


def plan_for(config: Config, ranks: int, c: LlamaConfig, dtype: torch.dtype, tokens: tokenizers.Config) -> train.Plan:
    K, V = tokens.queries, c.n_visual
    S, T = 1 + FRAMES * K, (FRAMES - CONDITION) * K
    P = -(-config.prompts // ranks)
    R = P * config.group
    rows = train.rows_at_once(config.prompts, ranks, config.micro, config.group)
    with torch.device("meta"):
        model = Llama(c).to(dtype)
        cache = Cache(c, R, S, dtype=dtype).kv.nbytes
    flops, activations = sft.language_model_pass(c, dtype, rows, S, config.checkpointing)
    flops *= config.prompts * config.group / rows                               # a forward pass of all rollouts
    memory = train.training_memory(model, ranks)
    memory |= {"reference": memory["parameters"], "tokenizer": sum(p.nbytes for p in tokenizers.planned(tokens).parameters()),
               "logits and supports of rollouts": R * T * V * 5}
    weights = memory["parameters"] - (2 - c.tie_word_embeddings) * model.head.nbytes      # of the head only the codes' rows are read
    training = 4 if config.checkpointing else 3                                  # forward passes' worth of a step
    passes = T / S + 2 + training + (1 + training) * bool(config.keep) / config.group
    return train.Plan(memory, {"KV cache": cache * (1 + 1 / config.group), "activations": activations},
                      config.prompts * config.group * T, passes * flops, T * (weights + cache))


def train_grpo(config: Config, ddt: DDT, reference: Llama, world: train.World) -> Llama:
    """Trains a copy of the SFT model and saves it in <out>/grpo."""
    folder = train.writable(Path(config.out, "grpo"))
    if config.fresh:
        train.discard(folder)
    train.made_of(folder, **sources(config))
    policy = copy.deepcopy(reference).requires_grad_(True)
    policy.checkpointing = config.checkpointing
    names = train.scenarios(config.scenario)
    data, home = ([sim.sample(name, split, config.clips, config.seed) for name in names] for split in ("posttrain", "pretrain"))
    world.say(f"GRPO: {config.steps} steps of {config.prompts} prompts x {config.group} rollouts. "
              f"{EXPECTED.get(config.preset, '')}")
    policy_logits = train.distribute(LastLogits(policy), world)
    R = config.prompts * config.group
    parts, known_parts = (world.parts(config.prompts, config.micro, each) for each in (config.group, 1))
    with train.Run(folder, policy, config, world, show=("reward", "kl")) as run:
        for step in run:
            clips = data[step % len(data)]                                        # one scenario a step
            rows = world.share(train.rows(config.seed, step // len(data), config.prompts, len(clips)))
            # one for each prompt: so rollouts do not depend on the number of ranks
            generators = world.share([train.generator(config.seed, step, i, device=world.device) for i in range(config.prompts)])
            r = rollout(policy, reference, ddt, clips[rows].to(world.device), config, generators)
            batch = r.split(parts)
            if config.keep:                                                       # as many clips as prompts
                batch += true_clips(reference, ddt, home[step % len(data)][rows].to(world.device)).split(known_parts)
            results, total, kl_known = [], 0.0, torch.zeros((), device=world.device)
            for part in run.accumulate(batch, policy_logits):
                logits = policy_logits(part.ids, part.logits_ref.shape[1])
                if isinstance(part, Rollout):
                    result = grpo_loss(logits, part.logits_ref, part.codes, part.support, part.logp_old, part.advantage,
                                       config.ratio_clip, config.beta)
                    loss = result["loss"].sum() / R
                    results.append({k: x.detach() for k, x in result.items()})
                else:
                    kl = kl_divergence(logits.log_softmax(-1), part.logits_ref.log_softmax(-1)).mean(1)
                    loss = config.keep * kl.sum() / config.prompts
                    kl_known += kl.detach().sum()
                (loss * world.size).backward()                                    # DDP averages over ranks: this makes it the sum
                total += loss.detach()
            result = {k: torch.cat([x[k] for x in results]) for k in results[0]} | r.scores
            mean = {k: train.total(v.sum()) / R for k, v in result.items()}
            kl_known = train.total(kl_known)
            std = r.scores["reward"].std(1)
            group_std, zero = train.total(torch.stack([std.sum(), (std < NOISE).sum()])) / config.prompts
            run.step(total, **{"reward": mean["reward"], "reward_std": group_std, "frac_reward_zero_std": zero,       # zero: below NOISE
                       "rewards/velocity/mean": mean["velocity"], "rewards/mass/mean": mean["mass"],
                       "kl": mean["kl"], "kl_known": kl_known / config.prompts, "entropy": mean["entropy"],
                       "clip_ratio/region_mean": mean["clipped"]})
    if world.is_main:
        reward.drop_rows(folder.parent / "results.json", "SFT + RL")
    train.finish(folder, policy.save, config, policy, world)
    return policy.eval()


def pictures(out: Path, ddt: DDT, models: dict[str, Llama], scenario: str, device) -> None:
    """Truth above, predictions below: <out>/clips.gif and <out>/clips.png, the first clip of five splits of a scenario."""
    splits = ("iid", "slow", "fast", "small", "large")
    truth = [sim.sample(scenario, split, 1, reward.EVAL_SEED) for split in splits]
    frames = torch.cat([sim.render(c.position, c.radius, ddt.config.size) for c in truth]).to(device)
    shown = frames[:, :CONDITION]
    rows = {"truth": frames} | {name: sft.predictor(model, ddt)(shown) for name, model in models.items()}
    sim.save_gif(out / "clips.gif", list(rows.values()), list(rows), pixels=128)
    strip = {f"{split}, {name}": clips[i] for i, split in enumerate(splits) for name, clips in rows.items()}
    sim.save_strip(out / "clips.png", list(strip.values()), list(strip), pixels=64)


def main(argv: list[str] | None = None) -> None:
    config = train.parse(Config, PRESETS, argv)
    names = train.scenarios(config.scenario)
    train.need(config.group > 1, f"--group {config.group}: advantages compare rollouts of a group, it needs at least 2")
    if config.plan:
        return train.show_plan(plan, config)
    world = train.start(config.seed)
    train.check_fits(plan, config, world)
    out = train.writable(Path(config.out))
    train.occupy(out, world)
    ddt = sft.tokenizer(config, world)
    reference = sft.ensure(config, ddt, world).requires_grad_(False)
    if train.is_trained(out / "grpo", "model.safetensors", config, world):
        policy = sft.load(out / "grpo", **sources(config)).to(world.device)
    else:
        policy = train_grpo(config, ddt, reference, world)
    if world.is_main:
        for row, model in (("SFT", reference), ("SFT + RL", policy)):
            reward.add_row(out / "results.json", row, sft.predictor(model, ddt), names, ("posttrain", *sim.SHOWN),
                           config.eval_clips, size=ddt.config.size, device=world.device)
        print(reward.table(out / "results.json"))
        print("\n" + reward.difference(out / "results.json", "SFT", "SFT + RL"))
        pictures(out, ddt, {"SFT": reference, "SFT + RL": policy}, names[0], world.device)
        print(f"\nresults: {out}/results.json   pictures: {out}/clips.gif, {out}/clips.png")
    train.wait(world)


if __name__ == "__main__":
    train.cli(main)
