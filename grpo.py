"""
Stage 4, GRPO: reinforcement learning with a reward computed from the physics of the decoded frames.
The main job.

    condition: the first 3 frames of a clip, as codes
      -> the policy samples a group of G continuations (lm.py)
      -> they are decoded to frames (ddt.py) and scored against the simulation (reward.py)
      -> advantage: how much better than its group each one is
      -> each sampled token is made more or less likely by its advantage

Source: Phys-AR section 3.4, Table 3 and appendix D; GRPO is Shao et al. 2024,
https://arxiv.org/abs/2402.03300.

Differences from textbook GRPO, and choices where the paper is silent (measured: docs/RESULTS.md)
1. The KL is to the frozen SFT model. The paper's is to pi_old, where it is zero after one update.
2. The KL is exact: a sum over the 256 codes of every token, no estimate from the sampled one.
3. Old and new log-probabilities are of the distribution that was sampled (top-k 50, top-p 0.95).
4. Advantages divide by std + 0.1: that is the noise of the reward between two decodings.
5. All clips have one length: no mask, and the loss is the mean over all tokens of the global batch.
6. Reward-to-go: a token is judged by the eight frames from its own on (--whole_clip: by all).
7. The KL is also taken on ground-truth clips of SFT's range, which RL would forget (beta_pretrain).

    torchrun grpo.py               # from nothing: VAE, DDT, SFT (if missing), GRPO, table, pictures
    python grpo.py --fresh --beta 0     # trains the policy again; any field of Config is a flag
    torchrun --nproc_per_node=8 grpo.py # 8 ranks; the global batch stays as it is

Expected at `tiny` on 2 CPU cores: 19 to 35 minutes in all, of them 2 to 4 for GRPO.

Axes: B clips, F frames, K tokens of a frame, P prompts, G group (rollouts per prompt), R = P G
rollouts, S sequence, T sampled tokens, V codes, H W pixels.
"""
import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import checkpoint
import evaluate
import pictures
import reward
import sft
import sim
import train
from checkpoint import check
from ddt import DDT
from lm import Llama, generate, logprobs
from sim import CONDITION, FRAMES


@dataclass
class Config:
    # run
    preset: str = "tiny"        # named set of defaults: tiny, small or paper
    out: str = ""               # run folder (empty: runs/<preset>)
    seed: int = 0               # seed of the conditions and of sampling
    fresh: bool = False         # delete this stage's model and train it again
    save_every: int = 5         # steps between two checkpoints
    # data
    scenario: str = "uniform"   # motion: uniform, parabola, collision, or all three
    clips: int = 2000           # clips to draw conditions from, per motion
    tokenizer: str = "ddt"      # ddt, or vqgan (experiments/vqgan.py)
    # rollout
    prompts: int = 8            # conditions per step, P, over all ranks
    group: int = 8              # rollouts per condition, G
    top_k: int = 50             # sampling: only the most likely codes, this many
    top_p: float = 0.95         # sampling: of these the fewest that hold this probability
    # loss
    clip_eps: float = 0.2    # PPO's epsilon: the ratio of new to old policy is clipped to 1 +- this
    horizon: int = 8            # frames whose reward judges a token, its own the first of them
    whole_clip: bool = False    # judge every token by the reward of the whole clip, as in the paper
    beta: float = 0.02          # weight of the KL to the SFT model on rollouts
    beta_pretrain: float = 0.05 # weight of the KL to the SFT model on clips of SFT's range
    # optimization
    steps: int = 50             # optimizer steps, each on new rollouts
    micro_batch: int = 32       # rollouts per backward pass and rank
    checkpointing: bool = False # recompute activations in the backward pass, to save memory
    lr: float = 1e-4            # peak learning rate
    warmup: int = 5             # steps of linear warm-up, before a cosine to zero
    beta1: float = 0.9          # AdamW: decay of the mean of gradients
    beta2: float = 0.99         # AdamW: decay of the mean of their squares
    eps: float = 1e-6           # AdamW: added to the root of the mean square
    weight_decay: float = 0.05  # AdamW: on matrices only
    max_grad_norm: float = 1.0  # gradient clipping; 0: none
    # evaluation
    eval_clips: int = 256       # clips per split of the result table


# `paper` is Table 3, on 8 GPUs: 3 or 4 prompts each. The paper gives neither group nor beta: they
# are those of `tiny`. Its batch of 28 is taken as prompts.
PRESETS = {
    "tiny": {},
    "small": dict(scenario="all", clips=20000, prompts=32, micro_batch=64, steps=300, lr=2e-5,
                  warmup=20),
    "paper": dict(scenario="all", clips=30000, prompts=28, whole_clip=True, beta_pretrain=0.0,
                  micro_batch=8, checkpointing=True, steps=1600, lr=3e-6, warmup=100, save_every=50,
                  eval_clips=1000),
}
REWARD_NOISE = 0.1              # std of the reward between two decodings of the same codes

# ------------------------------------------------------------------ loss


def advantages(reward: Tensor) -> Tensor:
    """Eq. 8: reward (P, G), or per frame (P, G, F) -> the same shape, normalised in each group."""
    mean, std = reward.mean(1, keepdim=True), reward.std(1, keepdim=True)
    return ((reward - mean) / (std + REWARD_NOISE)).nan_to_num()        # NaN: no frame counts


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Exact KL(p || q), a sum over all codes: log-probabilities (..., V) each -> (...)."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def grpo_loss(logits: Tensor, logits_ref: Tensor, codes: Tensor, support: Tensor, logp_old: Tensor,
              advantage: Tensor, clip_eps: float, beta: float) -> dict[str, Tensor]:
    """
    Eq. 9-10 with PPO's clipped ratio, per rollout: the mean over its tokens of
    -min(ratio A, clip(ratio) A) + beta KL(pi || pi_ref).

    logits, logits_ref, support (R, T, V); codes, logp_old (R, T); advantage (R,), or (R, T) of each
    token -> {loss, kl, entropy, clipped}, (R,) each.
    At ratio 1 the loss is -A + beta KL, and its gradient that of -A log pi + beta KL.
    """
    advantage = advantage if advantage.ndim == 2 else advantage[:, None]    # (R, T) or (R, 1)
    ratio = (logprobs(logits, codes, support) - logp_old).exp()             # (R, T)
    gain = ratio * advantage
    clipped_gain = ratio.clamp(1 - clip_eps, 1 + clip_eps) * advantage
    policy_loss = -torch.minimum(gain, clipped_gain)                        # (R, T)
    # KL and entropy are of the whole softmax: on the support, a code that the reference excludes
    # would make the KL infinite
    log_pi, log_ref = logits.float().log_softmax(-1), logits_ref.float().log_softmax(-1)
    kl = kl_divergence(log_pi, log_ref)                                     # (R, T)
    entropy = -(log_pi.exp() * log_pi).sum(-1)                              # (R, T)
    clipped = (gain > clipped_gain).float()
    return {"loss": (policy_loss + beta * kl).mean(1), "kl": kl.mean(1),
            "entropy": entropy.detach().mean(1), "clipped": clipped.mean(1)}


# ------------------------------------------------------------------ rollouts


@dataclass
class Rollout:
    ids: Tensor                 # (R, S)        BOS, condition, sampled tokens
    codes: Tensor               # (R, T)        the sampled tokens as codes
    support: Tensor             # (R, T, V)     the codes that each was drawn from
    logp_old: Tensor            # (R, T)        log-probabilities under the policy that sampled
    logits_ref: Tensor          # (R, T, V)     logits of the frozen SFT model
    advantage: Tensor           # (R, T)
    scores: dict[str, Tensor]   # (P, G) each: reward, velocity, mass

    def split(self, n: int) -> list["Rollout"]:
        """n micro-batches of rollouts."""
        fields = (self.ids, self.codes, self.support, self.logp_old, self.logits_ref,
                  self.advantage)
        return [Rollout(*part, self.scores) for part in zip(*(x.tensor_split(n) for x in fields))]


@dataclass
class TrueClips:
    ids: Tensor                 # (B, S)        BOS, the codes of a ground-truth clip
    logits_ref: Tensor          # (B, T, V)     logits of the frozen SFT model after the condition

    def split(self, n: int) -> list["TrueClips"]:
        """n micro-batches of clips."""
        parts = zip(self.ids.tensor_split(n), self.logits_ref.tensor_split(n))
        return [TrueClips(*part) for part in parts]


class CodeLogits(nn.Module):
    """
    A model's logits over the visual codes for the last T tokens of each sequence:
    ids (B, S) -> (B, T, V). A module, since DDP hooks the forward of one.
    """

    def __init__(self, model: Llama):
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, T: int) -> Tensor:
        hidden = self.model(ids[:, :-1])[:, -T:]            # (B, T, D)
        return self.model.visual_logits(hidden)             # (B, T, V)


@torch.no_grad()
def rollout(policy: Llama, reference: Llama, tokenizer: DDT, clips: sim.Clips, config: Config,
            generators: list[torch.Generator]) -> Rollout:
    """Samples G continuations per clip, with a generator per clip, decodes and scores them."""
    P, G, K = len(clips), config.group, tokenizer.config.queries
    T = (FRAMES - CONDITION) * K

    # the condition as a prompt
    given = sim.render(clips.position[:, :CONDITION], clips.radius, tokenizer.config.size)
    codes = tokenizer.encode(given.flatten(0, 1)).view(P, CONDITION, K)      # given (P, 3, 3, H, W)
    prompt = sft.sequence(policy, codes)                                        # (P, 1 + 3 K)

    # sampling, and the support that each code was drawn from
    codes, support = generate(policy, prompt, T, G, config.top_k, config.top_p, generators)
    ids = prompt.repeat_interleave(G, 0)                                        # (R, 1 + 3 K)
    ids = torch.cat([ids, policy.first_code + codes.flatten(0, 1)], 1)          # (R, S)

    # codes (P, G, T) to frames
    frames = [sft.decode(tokenizer, c.view(G, -1, K), g) for c, g in zip(codes, generators)]
    frames = torch.cat([given.repeat_interleave(G, 0), torch.cat(frames)], 1)   # (R, F, 3, H, W)

    # frames to rewards, and those to advantages
    clip_of = torch.arange(P, device=codes.device).repeat_interleave(G)         # (R,)
    scores = reward.reward(frames, clips[clip_of], config.horizon)
    scores = {name: x.unflatten(0, (P, G)) for name, x in scores.items()}      # (P, G) or (P, G, F)
    to_go = scores.pop("ahead")[:, :, CONDITION:]                               # (P, G, F - 3)
    advantage = advantages(to_go)
    if config.whole_clip:
        advantage = advantages(scores["reward"])[:, :, None].expand_as(to_go)
    advantage = advantage.flatten(0, 1).repeat_interleave(K, 1)                 # (R, T)

    # log-probabilities as the trainer computes them, not as the cached decoder did
    codes, support = codes.flatten(0, 1), support.flatten(0, 1)                 # (R, T), (R, T, V)
    logits = code_logits(policy, ids, T, config.micro_batch)                    # (R, T, V)
    logits_ref = code_logits(reference, ids, T, config.micro_batch)
    logp_old = logprobs(logits, codes, support)                                 # (R, T)
    return Rollout(ids, codes, support, logp_old, logits_ref, advantage, scores)


@torch.no_grad()
def true_clips(reference: Llama, tokenizer: DDT, clips: sim.Clips) -> TrueClips:
    """Ground-truth clips, for the KL to the SFT model where there are no rollouts."""
    codes = sft.tokenize(tokenizer, clips)                                      # (B, F, K)
    ids = sft.sequence(reference, codes.to(reference.head.device))              # (B, S)
    T = (FRAMES - CONDITION) * codes.shape[2]
    return TrueClips(ids, code_logits(reference, ids, T, len(ids)))             # (B, T, V)


def code_logits(model: Llama, ids: Tensor, T: int, micro_batch: int) -> Tensor:
    """CodeLogits of ids (R, S), so many rows at a time -> (R, T, V)."""
    return torch.cat([CodeLogits(model)(part, T) for part in ids.split(micro_batch)])


# ------------------------------------------------------------------ training


def train_grpo(config: Config, tokenizer: DDT, reference: Llama, world: train.World) -> Llama:
    """Trains a copy of the SFT model and saves it in <out>/grpo."""
    folder = checkpoint.writable(Path(config.out, "grpo"))
    if config.fresh:
        checkpoint.delete_model(folder)
    checkpoint.write_provenance(folder, world, **sources(config))
    policy = copy.deepcopy(reference).requires_grad_(True)
    policy.checkpointing = config.checkpointing
    policy_logits = train.distribute(CodeLogits(policy), world)
    P, R = config.prompts, config.prompts * config.group
    T = (FRAMES - CONDITION) * tokenizer.config.queries
    world.print0(f"GRPO: {config.steps} steps of {P} prompts x {config.group} rollouts")
    names = train.scenarios(config.scenario)
    posttrain = [sim.sample(name, "posttrain", config.clips, config.seed) for name in names]
    pretrain = [sim.sample(name, "pretrain", config.clips, config.seed) for name in names]
    n = world.accumulation_steps(P, config.micro_batch, config.group)           # of rollouts
    n_true = world.accumulation_steps(P, config.micro_batch)                    # of true clips

    with train.Run(folder, policy, config, world, show=("reward", "kl")) as run:
        for step in run:
            motion, turn = step % len(names), step // len(names)               # one motion per step
            index = world.shard(train.batch_indices(config.seed, turn, P, config.clips))
            # a generator per prompt: rollouts do not depend on the number of ranks
            generators = [train.generator(config.seed, step, p, device=world.device)
                          for p in range(P)]
            clips = posttrain[motion][index].to(world.device)
            r = rollout(policy, reference, tokenizer, clips, config, world.shard(generators))
            micro_batches = r.split(n)
            if config.beta_pretrain:
                clips = pretrain[motion][index].to(world.device)                # as many as prompts
                micro_batches += true_clips(reference, tokenizer, clips).split(n_true)

            total, outs, kl_pretrain = 0.0, [], torch.zeros((), device=world.device)
            for part in run.accumulate(micro_batches, policy_logits):
                logits = policy_logits(part.ids, T)
                if isinstance(part, Rollout):
                    out = grpo_loss(logits, part.logits_ref, part.codes, part.support,
                                    part.logp_old, part.advantage, config.clip_eps, config.beta)
                    loss = out["loss"].sum() / R
                    outs.append({name: x.detach() for name, x in out.items()})
                else:
                    kl = kl_divergence(logits.log_softmax(-1), part.logits_ref.log_softmax(-1))
                    loss = config.beta_pretrain * kl.mean(1).sum() / P
                    kl_pretrain += kl.detach().mean(1).sum()
                (loss * world.size).backward()              # DDP averages over ranks; this: the sum
                total += loss.detach()
            run.step(total, kl_pretrain=world.all_reduce(kl_pretrain) / P,
                     **metrics(r.scores, outs, R, world))

    if world.is_main:
        evaluate.drop_rows(folder.parent / "results.json", "SFT + RL")
    checkpoint.finish(folder, policy.save, config, policy, world)
    return policy.eval()


def metrics(scores: dict[str, Tensor], outs: list[dict[str, Tensor]], R: int,
            world: train.World) -> dict[str, Tensor]:
    """For the log, named as in TRL: means over the global batch of R rollouts."""
    values = {name: torch.cat([out[name] for out in outs]) for name in outs[0]} | scores
    mean = {name: world.all_reduce(x.sum()) / R for name, x in values.items()}
    std = scores["reward"].std(1)                                               # (P,) of each group
    groups = torch.stack([std.sum(), (std < REWARD_NOISE).sum(), torch.ones_like(std).sum()])
    std, zero_std, P = world.all_reduce(groups)
    return {"reward": mean["reward"], "reward_std": std / P, "frac_reward_zero_std": zero_std / P,
            "rewards/velocity/mean": mean["velocity"], "rewards/mass/mean": mean["mass"],
            "kl": mean["kl"], "entropy": mean["entropy"], "clip_ratio/region_mean": mean["clipped"]}


# ------------------------------------------------------------------ the stage


def sources(config: Config) -> dict[str, Path]:
    """The weight files that the policy is trained from."""
    return sft.tokenizer_file(config) | {"sft": Path(config.out, "sft", "model.safetensors")}


def report(config: Config, tokenizer: DDT, models: dict[str, Llama], world: train.World) -> None:
    """Table before and after, the change clip by clip, and pictures: truth and predictions."""
    out, names, size = Path(config.out), train.scenarios(config.scenario), tokenizer.config.size
    for row, model in models.items():
        evaluate.add_row(out / "results.json", row, sft.predictor(model, tokenizer), names,
                         ("posttrain", *evaluate.SPLITS), config.eval_clips, size=size,
                         device=world.device)
    print(evaluate.table(out / "results.json"))
    print("\n" + evaluate.difference(out / "results.json", "SFT", "SFT + RL"))

    splits = ("posttrain", "iid", "fast", "large", "slow")
    clips = [sim.sample(names[0], split, 1, evaluate.EVAL_SEED) for split in splits]
    truth = torch.cat([sim.render(c.position, c.radius, size) for c in clips]).to(world.device)
    videos = {"truth": truth}
    for row, model in models.items():
        videos[row] = sft.predictor(model, tokenizer)(truth[:, :CONDITION])
    titles = [f"{split}\nradius {c.radius[0, 0]:.1f}, speed {c.velocity[0, 0]:.1f}"
              for split, c in zip(splits, clips)]
    pictures.save_gif(out / "clips.gif", videos, titles, truth=clips, given=CONDITION)
    pictures.save_strip(out / "clips.png", videos, titles, truth=clips, given=CONDITION)
    print(f"\nresults: {out}/results.json   pictures: {out}/clips.gif, {out}/clips.png")


def main(argv: list[str] | None = None) -> None:
    config = train.parse(Config, PRESETS, argv)
    train.scenarios(config.scenario)
    check(config.group > 1, f"--group {config.group}: advantages compare the rollouts of a group, "
          "it needs at least 2")
    world = train.start(config.seed, config.out)
    tokenizer = sft.load_tokenizer(config, world)
    reference = sft.ensure(config, tokenizer, world).requires_grad_(False)
    folder = Path(config.out, "grpo")
    if checkpoint.is_trained(folder, "model.safetensors", config, world):
        policy = sft.load(folder, **sources(config)).to(world.device)
    else:
        policy = train_grpo(config, tokenizer, reference, world)
    if world.is_main:
        report(config, tokenizer, {"SFT": reference, "SFT + RL": policy}, world)
    world.barrier()


if __name__ == "__main__":
    train.cli(main)
