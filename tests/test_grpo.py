"""
GRPO: advantages in groups, the loss against its formula and its gradient, rollouts.

    pytest tests/test_grpo.py
"""
import copy
import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import ddt
import evaluate
import grpo
import reward
import sft
import sim
from checkpoint import UserError
from grpo import advantages, frozen_logits, grpo_loss, kl_divergence
from lm import Llama, LlamaConfig, draw, logprobs, truncate
from vae import VAE

R, T, V = 6, 5, 12
EVERYTHING = torch.ones(R, T, V, dtype=torch.bool)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def example(seed=0, top_k=8, top_p=0.9):
    """Logits that need a gradient, the reference's, codes from the policy, support, advantages."""
    g = seeded(seed)
    logits = (2 * torch.randn(R, T, V, generator=g)).requires_grad_()
    logits_ref = logits.detach() + torch.randn(R, T, V, generator=g)
    support = truncate(logits.detach(), top_k, top_p)
    codes = draw(logits.detach(), support, g)
    return logits, logits_ref, codes, support, torch.randn(R, generator=g)


def kl_by_hand(logits, logits_ref):
    """KL(pi || pi_ref) of every token in float64, term by term: (R, T)."""
    result = np.zeros(logits.shape[:2])
    for i in np.ndindex(*result.shape):
        p, q = (np.exp(x[i].detach().double().numpy()) for x in (logits, logits_ref))
        p, q = p / p.sum(), q / q.sum()
        result[i] = sum(a * math.log(a / b) for a, b in zip(p, q))
    return torch.tensor(result)


@pytest.mark.parametrize("argv, culprit", [
    (["--group", "1"], "--group 1: advantages compare"), (["--group", "1000000"], "--group"),
    (["--top_p", "2"], "--top_p 2.0"), (["--top_p", "0"], "--top_p 0.0"),
    (["--top_k", "1"], "--top_k 1: greedy"), (["--top_k", "0"], "--top_k 0"),
    (["--top_k", "-1"], "--top_k -1"), (["--top_k", "257"], "--top_k 257"),
    (["--horizon", "1000"], "--horizon 1000: must be from 1 to 32"),
    (["--clip_eps", "5"], "--clip_eps 5.0"), (["--clip_eps", "0"], "--clip_eps 0.0"),
    (["--beta", "1e9"], "--beta"), (["--prompts", "1000000000"], "--prompts"),
    (["--clips", "1000000000000"], "--clips"), (["--eval_clips", "1"], "--eval_clips 1"),
    (["--seed", "1000003"], "--seed 1000003: that of the held-out clips"),
    (["--tokenizer", "words"], "--tokenizer words"), (["--scenario", "rain"], "--scenario 'rain'")])
def test_bad_flags(argv, culprit, tmp_path):
    with pytest.raises(UserError, match=culprit):
        grpo.main([*argv, "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------ advantages


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_scores_that_none_can_be_are_refused(value):
    """NaN is legal where all of a group are: the true ball has left the view."""
    score = torch.rand(3, 4, 5)
    score[1, :, 2] = math.nan
    assert advantages(score).isfinite().all() and (advantages(score)[1, :, 2] == 0).all()
    score[2, 1, 0] = value
    with pytest.raises(ValueError, match="infinity, or NaN in a part of a group"):
        advantages(score)


def test_advantages_against_numpy():
    reward = torch.rand(5, 8, generator=seeded())
    for group, result in zip(reward.numpy(), advantages(reward)):
        expected = (group - np.mean(group)) / (np.std(group, ddof=1) + grpo.REWARD_NOISE)
        np.testing.assert_allclose(result.numpy(), expected, rtol=1e-4, atol=1e-5)


def test_advantages_do_not_see_a_shift():
    reward = torch.rand(5, 8, generator=seeded())
    shift = torch.tensor([0.0, -1.0, 0.5, 3.0, 8.0])[:, None]
    torch.testing.assert_close(advantages(reward + shift), advantages(reward), rtol=0, atol=1e-3)
    torch.testing.assert_close(advantages(reward).mean(1), torch.zeros(5), rtol=0, atol=1e-6)


def test_noise_is_not_told_apart():
    reward = 0.7 + 1e-6 * torch.randn(4, 8, generator=seeded(), dtype=torch.float64)
    assert 0 < advantages(reward).abs().max() < 1e-3
    assert advantages(torch.full((4, 8), 0.3)).abs().max() < 1e-5


def test_groups_do_not_mix():
    reward = torch.rand(3, 8, generator=seeded())
    other = torch.cat([reward[:1], 5 + 9 * reward[1:2], reward[2:]])
    assert torch.equal(advantages(other)[[0, 2]], advantages(reward)[[0, 2]])
    assert torch.equal(advantages(reward[[2, 0, 1]]), advantages(reward)[[2, 0, 1]])
    assert torch.equal(advantages(reward)[0].argsort(), reward[0].argsort())


def test_advantages_of_frames():
    """Each frame is a column of its own; one that counts in no rollout has no advantage."""
    reward = torch.rand(3, 8, 4, generator=seeded())
    reward[1, :, 2] = math.nan
    result = advantages(reward)
    for f in (0, 1, 3):
        torch.testing.assert_close(result[..., f], advantages(reward[..., f]))
    assert (result[1, :, 2] == 0).all() and (result[0, :, 2] != 0).all()


# ------------------------------------------------------------------ the loss


@pytest.mark.parametrize("beta", [0.0, 0.02, 3.0])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_loss_and_gradient_at_ratio_one(beta, seed):
    logits, logits_ref, codes, support, A = example(seed)
    logp_old = logprobs(logits, codes, support).detach()
    result = grpo_loss(logits, logits_ref, codes, support, logp_old, A, 0.2, beta)
    kl = kl_by_hand(logits, logits_ref).mean(1).float()
    torch.testing.assert_close(result["loss"], -A + beta * kl, rtol=1e-5, atol=1e-5)
    assert all(x.shape == (R,) for x in result.values()) and not result["clipped"].any()

    plain = -A[:, None] * logprobs(logits, codes, support)
    log_pi, log_ref = logits.log_softmax(-1), logits_ref.log_softmax(-1)
    plain = plain + beta * (log_pi.exp() * (log_pi - log_ref)).sum(-1)
    gradient = torch.autograd.grad(result["loss"].sum(), logits)[0]
    expected = torch.autograd.grad(plain.mean(1).sum(), logits)[0]
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)
    assert gradient.abs().sum() > 0.1


def strength_of(loss, logits):
    """How strongly each token's logits are pushed: (R, T)."""
    return torch.autograd.grad(loss.sum(), logits)[0].abs().sum(-1)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("ratio", [0.5, 0.79, 0.81, 1.0, 1.19, 1.21, 2.0])
def test_clipping(sign, ratio):
    """
    Beyond the clip nothing more is gained in the advantage's direction. The way back stays open.
    """
    logits, logits_ref, codes, support, _ = example(top_k=V, top_p=0.999)
    A = sign * torch.arange(1.0, R + 1)
    logp_old = logprobs(logits, codes, support).detach() - math.log(ratio)
    result = grpo_loss(logits, logits_ref, codes, support, logp_old, A, 0.2, 0.0)
    clipped = ratio > 1.2 if sign > 0 else ratio < 0.8
    gain = min(max(ratio, 0.8), 1.2) if clipped else ratio
    torch.testing.assert_close(result["loss"], -gain * A)
    assert (result["clipped"] == float(clipped)).all()
    strength = strength_of(result["loss"], logits)
    assert (strength == 0).all() if clipped else (strength > 0).all()


def test_tokens_have_advantages_of_their_own():
    logits, logits_ref, codes, support, _ = example()
    logp_old, A = logprobs(logits, codes, support).detach(), torch.zeros(R, T)
    A[:, 2] = 2.0
    loss = grpo_loss(logits, logits_ref, codes, support, logp_old, A, 0.2, 0.0)["loss"]
    torch.testing.assert_close(loss, torch.full((R,), -2.0 / T))
    strength = strength_of(loss, logits)
    assert (strength[:, 2] > 0).all() and strength.sum() == strength[:, 2].sum()
    A = torch.arange(R) - 2.0
    equal = [grpo_loss(logits, logits_ref, codes, support, logp_old, a, 0.2, 0.1)["loss"]
             for a in (A, A[:, None].expand(R, T))]
    torch.testing.assert_close(*equal)


def test_tokens_are_clipped_one_by_one():
    logits, logits_ref, codes, support, _ = example(top_k=V, top_p=0.999)
    ratio = torch.tensor([0.5, 1.0, 1.5, 1.1, 3.0]).expand(R, T)
    logp_old = logprobs(logits, codes, support).detach() - ratio.log()
    A = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0, -1.0])
    result = grpo_loss(logits, logits_ref, codes, support, logp_old, A, 0.2, 0.0)
    moved = strength_of(result["loss"], logits) > 0                         # (R, T)
    upwards = torch.tensor([True, True, False, True, False])
    downwards = torch.tensor([False, True, True, True, True])
    assert torch.equal(moved[:3], upwards.expand(3, T))
    assert torch.equal(moved[3:], downwards.expand(3, T))
    expected = [-(0.5 + 1.0 + 1.2 + 1.1 + 1.2) / 5] * 3 + [(0.8 + 1.0 + 1.5 + 1.1 + 3.0) / 5] * 3
    torch.testing.assert_close(result["loss"], torch.tensor(expected))
    torch.testing.assert_close(result["clipped"], torch.tensor([0.4] * 3 + [0.2] * 3))


# ------------------------------------------------------------------ KL and entropy


def measured(logits, logits_ref, codes, support):
    """The loss with beta 1 and without advantages: the KL alone."""
    logp_old, A = logprobs(logits, codes, support), torch.zeros(len(codes))
    return grpo_loss(logits, logits_ref, codes, support, logp_old, A, 0.2, 1.0)


def test_kl_is_the_sum_over_all_codes():
    logits, logits_ref, codes, support, _ = example()
    result, by_hand = measured(logits, logits_ref, codes, support), kl_by_hand(logits, logits_ref)
    torch.testing.assert_close(result["kl"].double(), by_hand.mean(1), rtol=1e-4, atol=1e-6)
    assert by_hand.min() > 1e-3
    apart = kl_divergence(logits, logits_ref)                                               # (R, T)
    torch.testing.assert_close(apart.double(), by_hand, rtol=1e-4, atol=1e-6)
    p = logits.detach().double().softmax(-1)
    entropy = -(p * p.log()).sum(-1).mean(1)
    torch.testing.assert_close(result["entropy"].double(), entropy, rtol=1e-4, atol=1e-6)
    shifted = logits.detach() + 3.0                         # the same for a softmax
    same = measured(logits, shifted, codes, support)
    assert same["kl"].abs().max() < 1e-6
    assert torch.autograd.grad(same["loss"].sum(), logits)[0].abs().max() < 1e-6


def test_kl_is_what_sampling_estimates():
    logits, logits_ref, codes, support, _ = example()
    exact = measured(logits, logits_ref, codes, support)["kl"][0]
    n = 20_000
    a, b = (x[0].detach().expand(n, T, V) for x in (logits, logits_ref))
    everything = torch.ones(n, T, V, dtype=torch.bool)
    drawn = draw(a, everything, seeded(3))
    log_ratio = logprobs(a, drawn, everything) - logprobs(b, drawn, everything)             # (n, T)
    estimates = log_ratio.mean(1)
    assert abs(estimates.mean() - exact) < 4 * estimates.std() / n ** 0.5 < 0.2 * exact


def test_untruncated_policy_is_the_softmax():
    logits, logits_ref, codes, _, A = example()
    logp = logits.log_softmax(-1).gather(-1, codes[..., None])[..., 0]
    torch.testing.assert_close(logprobs(logits, codes, EVERYTHING), logp)
    assert truncate(logits.detach(), V, 1.0).all()
    old = logp.detach() + 0.1 * torch.randn(R, T, generator=seeded(1))
    ratio = (logp - old).exp()
    gain, clipped_gain = ratio * A[:, None], ratio.clamp(0.8, 1.2) * A[:, None]
    expected = -torch.minimum(gain, clipped_gain).mean(1)
    result = grpo_loss(logits, logits_ref, codes, EVERYTHING, old, A, 0.2, 0.0)
    torch.testing.assert_close(result["loss"], expected)


# ------------------------------------------------------------------ with a model


def language_model(n_visual=256):
    torch.manual_seed(0)
    model = Llama(LlamaConfig(1 + n_visual, 32, 48, 2, 4, 2, 8, n_visual=n_visual))
    for p in model.parameters():
        if p.ndim == 2:
            torch.nn.init.normal_(p, std=0.2)
    return model


def test_a_step_favours_what_was_better():
    model = language_model(V)
    ids = torch.randint(1, 1 + V, (R, 3 + T), generator=seeded())
    codes, A = ids[:, -T:] - 1, torch.tensor([1.5, -1.5, 0.5, -0.5, 1.0, -1.0])

    def logp():
        return logprobs(grpo.CodeLogits(model)(ids, T), codes, EVERYTHING)                  # (R, T)
    before, reference = logp().detach(), frozen_logits(model, ids, T)
    logits = grpo.CodeLogits(model)(ids, T)
    result = grpo_loss(logits, reference, codes, EVERYTHING, before, A, 0.2, 0.02)
    result["loss"].sum().backward()
    with torch.no_grad():
        for p in model.parameters():
            p -= 1e-3 * p.grad
    gained = (logp() - before).sum(1)
    assert (gained.sign() == A.sign()).all()


def test_code_logits_are_those_before_each_code():
    model = language_model(V)
    ids = torch.randint(1, 1 + V, (3, 9), generator=seeded())
    logits = grpo.CodeLogits(model)(ids, 4)
    assert logits.shape == (3, 4, V)
    for i in range(4):
        torch.testing.assert_close(logits[:, i], model.logits(model(ids[:, :5 + i]))[:, -1, 1:])
    codes = ids[:, -4:] - 1
    support = truncate(logits, 5, 0.9).scatter(-1, codes[..., None], True)
    expected = logprobs(logits, codes, support)
    for micro_batch in (1, 2, 3, 9):
        scored = grpo.frozen_logprobs(model, ids, codes, support, micro_batch)
        torch.testing.assert_close(scored, expected)
        assert not scored.requires_grad


@pytest.fixture(scope="module")
def rollout():
    """A real one, of random models: 3 clips, groups of 4."""
    torch.manual_seed(0)
    vae = VAE([8, 16], 4, norm_num_groups=4, use_quant_conv=False, use_post_quant_conv=False)
    small = ddt.Config(size=16, queries=2, patch=4, image_width=16, query_width=16,
                       encoder_layers=1, width=16, layers=1, heads=2)
    tokenizer = ddt.DDT(small, vae).eval()
    torch.nn.init.normal_(tokenizer.decoder.latent_out.weight)
    policy, reference = language_model().eval(), language_model().eval()
    with torch.no_grad():
        reference.head.add_(0.05 * torch.randn(reference.head.shape, generator=seeded(4)))
    config, clips = grpo.Config(group=4, top_k=20, top_p=0.9), sim.sample("uniform", "posttrain", 3)
    frames = sim.render(clips.position, clips.radius, 16).flatten(0, 1)
    with torch.no_grad():                                                # other frames, other codes
        tokenizer.quantizer.fill(tokenizer.vectors(tokenizer.latent(frames)).flatten(0, 1))
    generators = [seeded(i) for i in range(3)]
    r, scores = grpo.rollout(policy, tokenizer, clips, config, generators)
    return SimpleNamespace(policy=policy, reference=reference, tokenizer=tokenizer, clips=clips,
                           config=config, r=r, scores=scores)


def sample(rollout, clips=None, generators=None, **change):
    """The rollout again, with something changed -> rollouts, scores."""
    x = rollout
    clips = x.clips if clips is None else clips
    generators = generators or [seeded(i) for i in range(3)]
    config = dataclasses.replace(x.config, **change)
    return grpo.rollout(x.policy, x.tokenizer, clips, config, generators)


def test_ratio_is_one_before_the_first_update(rollout):
    config, r = rollout.config, rollout.r
    logits = frozen_logits(rollout.policy, r.ids, r.codes.shape[1])
    logits_ref = frozen_logits(rollout.reference, r.ids, r.codes.shape[1])
    assert torch.equal(logprobs(logits, r.codes, r.support), r.logp_old)
    result = grpo_loss(logits, logits_ref, r.codes, r.support, r.logp_old, r.advantage,
                       config.clip_eps, config.beta)
    expected = -r.advantage.mean(1) + config.beta * result["kl"]
    torch.testing.assert_close(result["loss"], expected, rtol=0, atol=1e-5)
    assert not result["clipped"].any() and result["kl"].min() > 1e-4
    # sampled with a cache, this without
    agree = truncate(logits, config.top_k, config.top_p) == r.support
    assert agree.float().mean() > 0.9999 and r.support.sum(-1).max() <= 20
    assert r.support.gather(-1, r.codes[..., None]).all()


def test_rollouts_stand_beside_their_condition(rollout):
    r, policy, clips = rollout.r, rollout.policy, rollout.clips
    T = (sim.FRAMES - sim.CONDITION) * 2
    assert r.ids.shape == (12, 1 + 2 * sim.FRAMES)
    assert r.codes.shape == (12, T) and r.support.shape == (12, T, 256)
    for i, (ids, codes) in enumerate(zip(r.ids, r.codes)):
        clip = clips[i // 4:i // 4 + 1]
        frames = sim.render(clip.position, clip.radius, 16)[0]
        given = rollout.tokenizer.encode(frames[:sim.CONDITION])[None]
        prompt = sft.sequence(policy, given)[0]
        assert torch.equal(ids, torch.cat([prompt, policy.first_code + codes]))
    assert len(r.codes.unique(dim=0)) == 12 and len(r.ids[:, :-T].unique(dim=0)) == 3
    assert not r.logp_old.requires_grad
    assert {name: x.shape for name, x in rollout.scores.items()} == {
        name: (3, 4) for name in ("reward", "velocity", "mass")}
    assert r.advantage.shape == (12, T)
    assert torch.equal(r.advantage[:, ::2], r.advantage[:, 1::2])           # two tokens per frame


def test_micro_batches_of_a_rollout(rollout):
    parts = grpo.micro_batches(rollout.r, 5)
    assert [len(part.ids) for part in parts] == [3, 3, 2, 2, 2]
    for name, x in vars(rollout.r).items():
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), x)


@pytest.mark.parametrize("whole_clip", [False, True])
def test_a_token_is_judged_by_the_frames_from_its_own_on(rollout, monkeypatch, whole_clip):
    clips, codes = rollout.clips, rollout.r.codes.view(12, -1, 2)
    decoded = [sft.decode(rollout.tokenizer, group, seeded(9)) for group in codes.split(4)]
    turns = iter(decoded)
    monkeypatch.setattr(sft, "decode", lambda *_: next(turns))
    r, _ = sample(rollout, whole_clip=whole_clip)
    assert torch.equal(r.codes, rollout.r.codes)

    given = sim.render(clips.position[:, :sim.CONDITION], clips.radius, 16).repeat_interleave(4, 0)
    frames = torch.cat([given, torch.cat(decoded)], 1)
    scores = reward.reward(frames, clips[torch.arange(3).repeat_interleave(4)], 8)
    if whole_clip:
        expected = advantages(scores["reward"].view(3, 4)).flatten()[:, None].expand(12, 29)
    else:
        expected = advantages(scores["ahead"].view(3, 4, 32))[:, :, sim.CONDITION:].flatten(0, 1)
    assert torch.equal(r.advantage, expected.repeat_interleave(2, 1))
    assert expected.abs().max() > 0.1


def test_the_kl_on_true_clips_holds_the_policy_at_the_reference(rollout):
    """It is zero at the reference, and a step from elsewhere goes back to it."""
    reference = rollout.reference
    drawn = sim.sample("uniform", "pretrain", 5)
    clips = grpo.known_sequences(reference, sft.tokenize(rollout.tokenizer, drawn))
    assert clips.ids.shape == (5, 65)
    halves = grpo.micro_batches(clips, 2)
    assert [len(part.ids) for part in halves] == [3, 2]
    assert torch.equal(torch.cat([part.ids for part in halves]), clips.ids)
    logits_ref = frozen_logits(reference, clips.ids, 58)

    def kl(policy):
        return kl_divergence(grpo.CodeLogits(policy)(clips.ids, 58), logits_ref).mean()
    assert kl(reference).abs() < 1e-6
    policy = copy.deepcopy(reference)
    with torch.no_grad():
        policy.head.add_(0.05 * torch.randn(policy.head.shape, generator=seeded(5)))
    before = kl(policy)
    assert before > 1e-3
    policy.head.requires_grad_(True)
    gradient = torch.autograd.grad(kl(policy), policy.head)[0]
    with torch.no_grad():
        policy.head.sub_(gradient)
    assert kl(policy) < before


def test_a_rollout_does_not_depend_on_the_others_of_its_batch(rollout):
    """Thus ranks may share the prompts in any way."""
    alone, scores = sample(rollout, rollout.clips[1:2], [seeded(1)])
    assert torch.equal(alone.ids, rollout.r.ids[4:8])
    assert torch.equal(alone.support, rollout.r.support[4:8])
    torch.testing.assert_close(scores["reward"][0], rollout.scores["reward"][1])


@pytest.mark.parametrize("top_k, top_p", [(1, 1.0), (20, 0.9)])
def test_a_prediction_does_not_depend_on_the_others_of_its_batch(rollout, top_k, top_p):
    """Greedy and sampled: one batch, batches of any size, another order: the same codes, frames."""
    clips = sim.sample("uniform", "iid", 7)
    frames = sim.render(clips.position[:, :3], clips.radius, 16)

    def predict(frames, seed=3):
        return sft.predictor(rollout.policy, rollout.tokenizer, seed, top_k, top_p)(frames)
    whole = predict(frames)
    encoded = rollout.tokenizer.encode(whole.flatten(0, 1))
    for size in (1, 2, 3):
        parts = torch.cat([predict(part) for part in frames.split(size)])
        torch.testing.assert_close(parts, whole, rtol=0, atol=1e-5)
        assert torch.equal(rollout.tokenizer.encode(parts.flatten(0, 1)), encoded)
    order = torch.tensor([6, 1, 0, 3, 2, 5, 4])
    torch.testing.assert_close(predict(frames[order]), whole[order], rtol=0, atol=1e-5)
    assert (predict(frames, seed=4) - whole)[:, 3:].abs().amax((1, 2, 3, 4)).min() > 0.01

    # and no two clips or frames share their noise
    same = frames[:1].expand(2, -1, -1, -1, -1).clone()
    same[1, 0, 0, 0, 0] = 0                                             # one red pixel less
    a, b = sft.decode(rollout.tokenizer, torch.zeros(2, 2, 2).long(), ddt.clip_generators(same))
    pictures = torch.cat([a, b]).flatten(1)
    assert torch.cdist(pictures, pictures).fill_diagonal_(9).min() > 0.01


def test_measured_rewards_do_not_depend_on_the_batch(rollout):
    predictor = sft.predictor(rollout.policy, rollout.tokenizer)
    a, b = (evaluate.evaluate(predictor, "uniform", "iid", 7, size=16, batch=batch, each=True)
            for batch in (7, 2))
    for name, values in a["each"].items():
        assert values == pytest.approx(b["each"][name], abs=1e-4)


@pytest.mark.parametrize("shape", [(2, 2, 3, 16, 16), (2, 5, 3, 16, 16), (2, 3, 1, 16, 16),
                                   (2, 3, 3, 8, 8), (3, 3, 16, 16)])
def test_a_predictor_is_given_three_frames(rollout, shape):
    with pytest.raises(ValueError, match="first 3 frames") as error:
        sft.predictor(rollout.policy, rollout.tokenizer)(torch.ones(shape))
    assert f"got {shape}" in str(error.value)


@pytest.mark.parametrize("spoil, culprit", [
    (lambda frames: frames * 2 - 1, "from -1 to 1"), (lambda frames: frames * 255, "0 to 255"),
    (lambda frames: frames + float("nan"), "NaN"), (sim.to_uint8, "uint8")])
def test_a_predictor_refuses_what_are_no_frames(rollout, spoil, culprit):
    clips = sim.sample("uniform", "iid", 2)
    frames = spoil(sim.render(clips.position[:, :3], clips.radius, 16))
    with pytest.raises(ValueError, match=culprit):
        sft.predictor(rollout.policy, rollout.tokenizer)(frames)


def test_what_is_tokenized_can_be_decoded(rollout):
    """In every type of integer that holds the codes; and of no other type."""
    codes = sft.tokenize(rollout.tokenizer, rollout.clips)                      # (3, 32, 2) uint8
    frames = sft.decode(rollout.tokenizer, codes, seeded())
    assert frames.shape == (3, 32, 3, 16, 16)
    for name in "int16 int32 int64 uint16 uint32 uint64".split():
        same = codes.to(getattr(torch, name))
        assert torch.equal(sft.decode(rollout.tokenizer, same, seeded()), frames)
    for n in (1, 2, 4):
        with pytest.raises(ValueError, match=f"{n} generators for 3 clips"):
            sft.decode(rollout.tokenizer, codes, [seeded()] * n)
    for dtype in (torch.bool, torch.float32, torch.float64, torch.complex64):
        with pytest.raises(ValueError, match="must be integers"):
            sft.decode(rollout.tokenizer, codes.to(dtype), seeded())


def test_rollouts_are_scored_against_their_own_clip(rollout, monkeypatch):
    """Were every continuation the true one, all of a group would score what the truth scores."""
    clips = rollout.clips
    truth = sim.render(clips.position, clips.radius, 16)
    turns = iter(truth[:, sim.CONDITION:])
    monkeypatch.setattr(sft, "decode", lambda *_: next(turns).expand(4, -1, -1, -1, -1))
    _, scores = sample(rollout)
    for name, expected in reward.reward(truth, clips).items():
        torch.testing.assert_close(scores[name], expected[:, None].expand(3, 4))
    scrambled = reward.reward(truth.roll(1, 0), clips)["reward"]
    assert (scrambled < scores["reward"][:, 0] - 0.1).all()     # another clip's would score less
