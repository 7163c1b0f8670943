"""
The control of experiments/ideal.py: perfect tokens, and every model in a few steps.

    pytest tests/test_ideal.py
"""
import functools

import pytest
import torch

import prior
import reward
import sim
from experiments import ideal


def test_tokens_are_the_balls():
    """Codes are place and radius to half a step; what they decode to is the same clip."""
    clips = sim.sample("uniform", "iid", 8, 0)
    frames = sim.render(clips.position, clips.radius, 32)
    tokenizer = ideal.Ideal(32)
    codes = tokenizer.encode(frames.flatten(0, 1))
    assert codes.shape == (8 * 32, 3) and codes.dtype == torch.int64
    codes, inside = codes.view(8, 32, 3), clips.inside[:, :, 0]
    expected = torch.cat([clips.position[:, :, 0] * 25.5,
                          (clips.radius * 102)[:, None].expand(8, 32, 1)], -1)  # 255 / 10, / 2.5
    assert (codes - expected)[inside].abs().max() < 2
    decoded = tokenizer.decode(codes.flatten(0, 1)).view_as(frames)
    assert reward.errors(decoded, clips)["drift_error"].nanmean() < 0.03


def test_no_ball():
    white = torch.ones(2, 3, 32, 32)
    tokenizer = ideal.Ideal(32)
    codes = tokenizer.encode(white)
    assert (codes == 0).all() and torch.equal(tokenizer.decode(codes), white)


def test_every_model(tmp_path, capsys, monkeypatch):
    """In a few steps; a second call trains nothing and prints the same table."""
    monkeypatch.setattr(ideal, "SPLITS", ("iid", "fast"))
    few = functools.partial(ideal.grpo.Config, prompts=2, group=2, clips=8)
    monkeypatch.setattr(ideal.grpo, "Config", few)
    flags = ["--out", tmp_path, "--seeds", "7", "--clips", 20, "--eval_clips", 2,
             "--prior_steps", 2, "--sft_steps", 2, "--grpo_steps", 1]
    ideal.main([str(flag) for flag in flags])
    lines = capsys.readouterr().out.splitlines()[-17:]
    rows = [line[:34].strip() for line in lines]
    of = {name: ["SFT", "SFT + RL"] for name in ideal.MODELS}
    of |= {name: ["no clip seen", "SFT", "SFT + RL"] for name in ["prior", *ideal.OTHER_PRIORS]}
    assert rows == ["", *(f"{name}: {row}" for name in of for row in of[name])]
    assert all(line.count("-") >= 2 for line in lines[1:])
    monkeypatch.setattr(prior, "train_prior", None)
    monkeypatch.setattr(ideal.sft, "train_sft", None)
    monkeypatch.setattr(ideal.grpo, "train_grpo", None)
    ideal.main([str(flag) for flag in flags])
    assert capsys.readouterr().out.splitlines()[-17:] == lines


@pytest.mark.parametrize("flag, value", [
    ("--seeds", ""), ("--seeds", "0,x"), ("--seeds", "0,,1"), ("--seeds", "0,1000003"),
    ("--clips", str(10 ** 12)), ("--eval_clips", "1"), ("--size", "3")])
def test_bad_flags(flag, value, tmp_path):
    with pytest.raises(ideal.checkpoint.UserError, match=flag):
        ideal.main(["--out", str(tmp_path), flag, value])
    assert not list(tmp_path.iterdir())
