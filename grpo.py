"""
Stage 4, GRPO: reinforcement learning with a reward computed from the physics of the decoded frames.
(Stages: 0 prior.py, a language model of numbers, for uniform motion; 1 vae.py, images to latents; 2
ddt.py, frames to tokens and back; 3 sft.py, the language model of these tokens; 4 this file.)

    condition: the first 3 frames of a clip, as tokens
      -> the policy, a copy of the SFT model, samples a group of G continuations (lm.py)
      -> they are decoded to frames (ddt.py) and compared with the simulation: rewards (reward.py)
      -> advantage of a continuation: how much better it is than its group
      -> its tokens are made more likely if that is positive, less likely if negative

SFT has seen radii and speeds of one range ("pretrain" clips). RL trains on two bands just outside
it ("posttrain" clips).

Source: Phys-AR (Lin et al. 2025, https://arxiv.org/abs/2504.15932), section 3.4, Table 3 and
appendix D: "Eq." is an equation there. GRPO: Shao et al. 2024, https://arxiv.org/abs/2402.03300.

Differences from textbook GRPO, and choices where the paper is silent (docs/RESULTS.md, 3)
1. The KL is to the frozen SFT model. The paper's is to pi_old: 0 with one update per rollout.
2. The KL is exact: a sum over the 256 codes of every token, no estimate from the sampled one.
3. One update per rollout: the ratio, kept as in Eq. 9, is always 1, and nothing is clipped.
4. Old and new log-probabilities are of the distribution sampled from (top-k 50, top-p 0.95).
5. Advantages divide by std + 0.1: 0.1 is the reward's std over decodings of the same codes.
6. A token is judged by the reward of eight frames, its own the first (--whole_clip: of the clip).
7. The KL is also taken on clips of SFT's range (beta_pretrain) and, if the model has read numbers,
   on such sequences (beta_numbers): RL would forget both otherwise.

    torchrun grpo.py                    # from nothing: all stages, table, pictures
    python grpo.py --fresh --beta 0     # trains the policy again; any field of Config is a flag
    torchrun --nproc_per_node=8 grpo.py # 8 ranks; the global batch stays as it is

Expected at `tiny` on 2 CPU cores: 16 to 30 minutes in all, of them 2 to 4 for GRPO.

Axes: B clips, F frames, K tokens of a frame, P prompts, G group (rollouts per prompt), R = P G
rollouts, S = 1 + F K tokens of a clip, T = (F - 3) K sampled tokens, V codes, D width, H W pixels.
P, R and B are this rank's; n_prompts and n_rollouts those of all ranks.
"""
import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)    # Ctrl-C during the imports: no traceback

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import checkpoint
import evaluate
import pictures
import prior
import reward
import sft
import sim
import train
from checkpoint import check
from ddt import DDT
from lm import Llama, generate, logprobs
from prior import number_sequences
from sim import CONDITION, FRAMES
from vae import check_data, check_ranges


@dataclass
class Config:
    # run
    preset: str = "tiny"        # named set of defaults: tiny, small or paper
    out: str = ""               # run folder (empty: runs/<preset>)
    seed: int = 0               # seed of the conditions and of sampling
    fresh: bool = False         # train this stage's model again; the old one stays until the end
    save_every: int = 5         # steps between two checkpoints
    compile: int = 1            # compile the blocks on a GPU; 0: no, which starts sooner
    # data
    scenario: str = "uniform"   # motion (sets defaults, too): uniform, parabola, collision, or all
    clips: int = 2000           # clips to draw conditions from, per motion
    tokenizer: str = "ddt"      # ddt, or vqgan (experiments/vqgan.py)
    # rollout
    prompts: int = 8            # conditions per step, over all ranks
    group: int = 8              # rollouts per condition, G
    top_k: int = 50             # sampling: this many of the most likely codes are kept
    top_p: float = 0.95         # sampling: of these the fewest that together have this probability
    # loss
    clip_eps: float = 0.2       # PPO's epsilon: the ratio is clipped to 1 +- this
    horizon: int = 8            # frames whose reward judges a token, its own the first of them
    whole_clip: bool = False    # judge a token by the reward of the whole clip, as in the paper
    beta: float = 0.02          # weight of the KL to the SFT model on rollouts
    beta_pretrain: float = 0.05 # weight of the KL to the SFT model on clips of SFT's range
    beta_numbers: float = 0.05  # weight of the KL to the SFT model on number sequences of stage 0
    # optimization
    steps: int = 40             # optimizer steps, each on new rollouts
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


# `paper` is Table 3, on 8 GPUs: 3 or 4 prompts each. Its batch of 28 is taken as prompts. The paper
# gives neither group nor beta: both are as in `tiny`.
#
# `small`, for one GPU of 80 GB: 256 rollouts of 174 tokens take a second at an H200's rates (0.25 s
# to sample the tokens, 0.5 s to decode 7424 frames): 75 steps, 25 of each motion, take 75 s.
PRESETS = {
    "tiny": {},
    "tiny other": dict(steps=50),    # other motions (RESULTS, 6)
    "small": dict(scenario="all", prompts=32, micro_batch=128, steps=75, warmup=8, save_every=25,
                  eval_clips=128),
    "paper": dict(scenario="all", clips=30000, prompts=28, whole_clip=True, beta_pretrain=0.0,
                  beta_numbers=0.0, micro_batch=8, checkpointing=True, steps=1600, lr=3e-6,
                  warmup=100, save_every=50, eval_clips=1000),
}
REWARD_NOISE = 0.1              # std of the reward between two decodings of the same codes

# ------------------------------------------------------------------ loss


def advantages(score: Tensor) -> Tensor:
    """
    Eq. 8: scores (P, G), or of every frame (P, G, F) -> the same shape, normalised in each group.
    NaN becomes 0: where the true ball has left the view, no frame of the group has a score. Raises
    ValueError for what a reward never is: infinity, or NaN in a part of a group only.
    """
    missing = score.isnan()
    if score.isinf().any() or (missing.any(1) != missing.all(1)).any():
        raise ValueError("scores hold infinity, or NaN in a part of a group")
    mean = score.mean(1, keepdim=True)                      # (P, 1), or (P, 1, F)
    std = score.std(1, keepdim=True)
    return ((score - mean) / (std + REWARD_NOISE)).nan_to_num()


def kl_divergence(logits: Tensor, logits_ref: Tensor) -> Tensor:
    """Exact KL(pi || pi_ref) in nats of two logits (..., V), a sum over all codes -> (...)."""
    log_pi = logits.float().log_softmax(-1)
    log_ref = logits_ref.float().log_softmax(-1)
    return (log_pi.exp() * (log_pi - log_ref)).sum(-1)


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
    logp = logprobs(logits, codes, support)                                 # (R, T)
    ratio = (logp - logp_old).exp()
    gain = ratio * advantage
    clipped_gain = ratio.clamp(1 - clip_eps, 1 + clip_eps) * advantage
    policy_loss = -torch.minimum(gain, clipped_gain)                        # (R, T)
    # KL and entropy are of the whole softmax. Of the truncated distributions, the KL is infinite
    # where a code of the policy's support is not in the reference's
    kl = kl_divergence(logits, logits_ref)                                  # (R, T)
    log_pi = logits.detach().float().log_softmax(-1)                        # (R, T, V)
    entropy = -(log_pi.exp() * log_pi).sum(-1)                              # (R, T)
    was_clipped = (gain > clipped_gain).float()                             # (R, T)
    return {"loss": (policy_loss + beta * kl).mean(1), "kl": kl.mean(1),
            "entropy": entropy.mean(1), "clipped": was_clipped.mean(1)}


# ------------------------------------------------------------------ rollouts


@dataclass
class Rollouts:
    ids: Tensor                 # (R, S)        BOS, condition, sampled tokens
    codes: Tensor               # (R, T)        the sampled tokens as codes
    support: Tensor             # (R, T, V)     bool: the codes that top-k and top-p left to draw
    logp_old: Tensor            # (R, T)        log-probabilities under the policy that sampled
    advantage: Tensor           # (R, T)


@dataclass
class KnownSequences:
    """What the SFT model knows and RL does not sample: only a KL to that model is taken on it."""
    ids: Tensor                 # (B, S)        BOS and the codes of a clip, or number sequence


def micro_batches(batch: Rollouts | KnownSequences, n: int) -> list:
    """The batch, cut along its first axis into n of the same class."""
    parts = zip(*(x.tensor_split(n) for x in vars(batch).values()))
    return [type(batch)(*part) for part in parts]


class CodeLogits(nn.Module):
    """
    Logits over the visual codes that predict the last T tokens of each sequence: ids (B, S) ->
    (B, T, V). A module, because DDP synchronizes gradients of a module's forward only.
    """

    def __init__(self, model: Llama):
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, T: int) -> Tensor:
        hidden = self.model(ids[:, :-1])            # (B, S - 1, D): position s predicts token s + 1
        return self.model.visual_logits(hidden[:, -T:])     # (B, T, V)


@torch.no_grad()
def frozen_logits(model: Llama, ids: Tensor, T: int) -> Tensor:
    """CodeLogits without gradient: ids (R, S) -> (R, T, V)."""
    return CodeLogits(model)(ids, T)


def frozen_logprobs(model: Llama, ids: Tensor, codes: Tensor, support: Tensor,
                    micro_batch: int) -> Tensor:
    """
    Log-probabilities (R, T) of the codes (R, T) that end the sequences ids (R, S), under support
    (R, T, V) and without gradient. Holds the logits of micro_batch rows at a time.
    """
    parts = zip(*(x.split(micro_batch) for x in (ids, codes, support)))
    return torch.cat([logprobs(frozen_logits(model, part, c.shape[1]), c, s)
                      for part, c, s in parts])


@torch.no_grad()
def rollout(policy: Llama, tokenizer: DDT, clips: sim.Clips, config: Config,
            generators: list[torch.Generator]) -> tuple[Rollouts, dict[str, Tensor]]:
    """
    Samples G continuations of each of P clips, which has a generator of its own, decodes and scores
    them -> rollouts, and their scores {reward, velocity, mass}, (P, G) each.
    """
    P, G, K = len(clips), config.group, tokenizer.config.queries
    T = (FRAMES - CONDITION) * K

    # the condition as a prompt
    given = sim.render(clips.position[:, :CONDITION], clips.radius, tokenizer.config.size)
    given_codes = tokenizer.encode(given.flatten(0, 1))                         # (P 3, K)
    prompt = sft.sequence(policy, given_codes.view(P, CONDITION, K))            # (P, 1 + 3 K)

    # sampled codes (P, G, T), and the support that each was drawn from (P, G, T, V)
    codes, support = generate(policy, prompt, T, G, config.top_k, config.top_p, generators)

    # codes to frames: given (P, 3, 3, H, W) and decoded
    decoded = torch.cat([sft.decode(tokenizer, group.view(G, -1, K), generator)
                         for group, generator in zip(codes, generators)])   # (R, F - 3, 3, H, W)
    frames = torch.cat([given.repeat_interleave(G, 0), decoded], 1)             # (R, F, 3, H, W)

    # frames to scores, and scores to advantages
    clip_of = torch.arange(P, device=codes.device).repeat_interleave(G)         # (R,)
    scores = reward.reward(frames, clips[clip_of], config.horizon)
    scores = {name: x.unflatten(0, (P, G)) for name, x in scores.items()}
    # (P, G, F - 3): of each predicted frame, the reward of `horizon` frames, itself the first
    ahead = scores.pop("ahead")[:, :, CONDITION:]
    if config.whole_clip:
        advantage = advantages(scores["reward"])[:, :, None].expand_as(ahead)
    else:
        advantage = advantages(ahead)
    advantage = advantage.flatten(0, 1).repeat_interleave(K, 1)                 # (R, T)

    # log-probabilities without the cache of `generate`, as in training: with it they are rounded
    # differently, and the ratio would only be nearly 1
    codes, support = codes.flatten(0, 1), support.flatten(0, 1)                 # (R, T), (R, T, V)
    ids = torch.cat([prompt.repeat_interleave(G, 0), policy.first_code + codes], 1)     # (R, S)
    logp_old = frozen_logprobs(policy, ids, codes, support, config.micro_batch)  # (R, T)
    return Rollouts(ids, codes, support, logp_old, advantage), scores


@torch.no_grad()
def known_sequences(reference: Llama, codes: Tensor) -> KnownSequences:
    """codes (B, F, K) of simulated clips or number sequences -> ids, where the model is."""
    return KnownSequences(sft.sequence(reference, codes.to(reference.head.device)))


# ------------------------------------------------------------------ training


def train_grpo(config: Config, tokenizer: DDT, reference: Llama, world: train.World) -> Llama:
    """Trains a copy of the SFT model and saves it in <out>/grpo."""
    folder = Path(config.out, "grpo")
    files = checkpoint.model_files(config.out, config.tokenizer, "sft")
    sources = checkpoint.start_stage(folder, config, world, **files)
    policy = copy.deepcopy(reference).requires_grad_(True)
    policy.checkpointing = config.checkpointing
    policy.compile_decoding = world.can_compile
    policy_logits = train.distribute(CodeLogits(policy), world)
    T = (FRAMES - CONDITION) * tokenizer.config.queries
    n_prompts = config.prompts
    n_rollouts = config.prompts * config.group
    world.print0(f"GRPO: {config.steps} steps of {n_prompts} prompts x {config.group} rollouts")

    motions = train.scenarios(config.scenario)
    # initial states only: a step simulates the clips that it uses
    posttrain, pretrain = ([sim.first_frames(name, split, config.clips, config.seed)
                            for name in motions] for split in ("posttrain", "pretrain"))
    # micro-batches per rank, of rollouts and of known sequences
    n = world.accumulation_steps(n_prompts, config.micro_batch, config.group)
    n_known = world.accumulation_steps(n_prompts, config.micro_batch)
    betas = {"pretrain": config.beta_pretrain, "numbers": config.beta_numbers}
    if not sft.knows_numbers(config):
        betas["numbers"] = 0.0
    corpus = prior.corpus_of(files["sft"].parent)

    with train.Run(folder, policy, config, world, ("reward", "kl"), sources) as run:
        for step in run:
            # the clips of this step, all of one motion, and their rollouts
            motion = step % len(motions)
            turn = step // len(motions)                     # steps of this motion before this one
            index = train.batch_indices(config.seed, turn, n_prompts, config.clips)
            index = world.shard(index)                                          # (P,)
            # a generator per prompt: samples do not depend on the number of ranks
            generators = [train.generator(config.seed, step, prompt, device=world.device)
                          for prompt in range(n_prompts)]
            clips = sim.play(posttrain[motion], index).to(world.device)
            rollouts, scores = rollout(policy, tokenizer, clips, config, world.shard(generators))
            # known sequences, as many of each kind as prompts
            known = {}
            if betas["pretrain"]:
                clips = sim.play(pretrain[motion], index)
                known["pretrain"] = sft.tokenize(tokenizer, clips)              # (P, F, K)
            if betas["numbers"]:
                generator = train.generator(config.seed, step, device=world.device)
                numbers = number_sequences(n_prompts, tokenizer.config.queries, FRAMES, generator,
                                           **corpus)
                known["numbers"] = world.shard(numbers)                         # (P, F, K)
            parts = [("rollouts", part) for part in micro_batches(rollouts, n)]
            for kind, codes in known.items():
                sequences = known_sequences(reference, codes)
                parts += [(kind, part) for part in micro_batches(sequences, n_known)]

            # gradient accumulation; DDP averages gradients over the ranks in the last backward pass
            total, outs = 0.0, []
            kl_known = {kind: torch.zeros((), device=world.device) for kind in betas}
            for kind, part in run.accumulate(parts, policy_logits):
                logits = policy_logits(part.ids, T)                             # (rows, T, V)
                logits_ref = frozen_logits(reference, part.ids, T)
                if kind == "rollouts":
                    out = grpo_loss(logits, logits_ref, part.codes, part.support,
                                    part.logp_old, part.advantage, config.clip_eps, config.beta)
                    loss = out["loss"].sum() / n_rollouts
                    outs.append({name: x.detach() for name, x in out.items()})
                else:
                    kl = kl_divergence(logits, logits_ref).mean(1)              # (rows,)
                    loss = betas[kind] * kl.sum() / n_prompts
                    kl_known[kind] += kl.detach().sum()
                (loss * world.size).backward()              # times ranks: a sum, not DDP's average
                total += loss.detach()

            # clip the gradient norm, AdamW, zero_grad; log the loss (summed over ranks) and metrics
            kl_known = {f"kl_{kind}": world.all_reduce(kl) / n_prompts
                        for kind, kl in kl_known.items()}
            run.step(total, **kl_known, **metrics(scores, outs, n_prompts, n_rollouts, world))

    policy.compile_decoding = False         # evaluation has other shapes: it would compile again
    checkpoint.finish(folder, policy.save, config, policy, world, sources)
    return policy.eval()


def metrics(scores: dict[str, Tensor], outs: list[dict[str, Tensor]], n_prompts: int,
            n_rollouts: int, world: train.World) -> dict[str, Tensor]:
    """Means over all ranks, named as in TRL. zero_std: groups whose std is below REWARD_NOISE."""
    values = {name: torch.cat([out[name] for out in outs]) for name in outs[0]} | scores
    mean = {name: world.all_reduce(x.sum()) / n_rollouts for name, x in values.items()}
    std = scores["reward"].std(1)                                               # (P,) of each group
    sums = torch.stack([std.sum(), (std < REWARD_NOISE).sum()])
    std, zero_std = world.all_reduce(sums) / n_prompts
    return {"reward": mean["reward"], "reward_std": std, "frac_reward_zero_std": zero_std,
            "rewards/velocity/mean": mean["velocity"], "rewards/mass/mean": mean["mass"],
            "kl": mean["kl"], "entropy": mean["entropy"], "clip_ratio/region_mean": mean["clipped"]}


# ------------------------------------------------------------------ the stage


def check_config(c: Config) -> None:
    """UserError for flags that cannot work."""
    check_data(c)
    check(c.tokenizer in ("ddt", "vqgan"), f"--tokenizer {c.tokenizer}: choose ddt or vqgan")
    check(c.group > 1, f"--group {c.group}: advantages compare the rollouts of a group, it needs "
          "at least 2")
    check(c.top_k > 1, f"--top_k {c.top_k}: greedy rollouts of a group are alike, there is nothing "
          "to compare; at least 2")
    check(0 < c.top_p <= 1, f"--top_p {c.top_p}: a probability, above 0 and at most 1 (1: all)")
    check(0 < c.clip_eps < 1, f"--clip_eps {c.clip_eps}: the ratio is clipped to 1 +- this; above "
          "0 and below 1")
    check_ranges(c, prompts=(1, 4096), group=(2, 1024), top_k=(2, 256), horizon=(1, FRAMES),
                 beta=(0, 1000), beta_pretrain=(0, 1000), beta_numbers=(0, 1000))


def main(argv: list[str] | None = None) -> None:
    config = train.parse(Config, PRESETS, argv)
    check_config(config)
    motions = train.scenarios(config.scenario)
    world = train.start(config.seed, config.out, config.compile)
    tokenizer = sft.load_tokenizer(config, world)
    reference = sft.ensure(config, tokenizer, world).requires_grad_(False)
    folder = Path(config.out, "grpo")
    if checkpoint.is_trained(folder, config, world):
        sources = checkpoint.model_files(config.out, config.tokenizer, "sft")
        policy = sft.load(folder, **sources).to(world.device)
    else:
        policy = train_grpo(config, tokenizer, reference, world)
    predictors = {"SFT": sft.predictor(reference, tokenizer),
                  "SFT + RL": sft.predictor(policy, tokenizer)}
    stages = (*sft.stages(config), "grpo")
    splits, size = ("posttrain", *evaluate.SPLITS), tokenizer.config.size
    for row, its_stages in (("SFT", stages[:-1]), ("SFT + RL", stages)):
        results_file = evaluate.add_rows(config, {row: predictors[row]}, its_stages, size, world,
                                         splits=splits)
    if world.is_main:
        print(evaluate.table(results_file))
        print("\n" + evaluate.difference(results_file, "SFT", "SFT + RL"))
        pictures.save_predictions(Path(config.out), predictors, motions[0], size, world.device)
    world.barrier()


if __name__ == "__main__":
    train.cli(main)
