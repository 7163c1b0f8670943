"""
The video DiT, which the paper compares its language model with.

    pytest tests/test_dit.py

Takes 2 seconds on one CPU core.
"""
import json

import pytest
import torch

import evaluate
from checkpoint import UserError
from experiments.dit import PRESETS, Config, DiT, main, rope_3d, zero_terminal_snr
from lm import rotate
from vae import VAE


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def autoencoder() -> VAE:
    torch.manual_seed(0)
    return VAE([8, 16], 2, norm_num_groups=4, use_quant_conv=False, use_post_quant_conv=False)


@pytest.fixture
def dit() -> DiT:
    torch.manual_seed(0)
    model = DiT(Config(size=8, width=24, layers=2, heads=2, calls=3), autoencoder()).eval()
    torch.nn.init.normal_(model.patch_out.weight, std=0.1)
    return model


def latents(n=2, seed=1) -> torch.Tensor:
    return torch.randn(n, 32, 2, 4, 4, generator=seeded(seed))


@pytest.mark.parametrize("preset, millions", [
    ("S", 22.5), ("B", 89.5), ("L", 310), ("tiny", 0.88), ("small", 82.4)])
def test_dit_sizes(preset, millions):
    """Those of PhyWorld's paper, and about those of our language models (0.85M, 82.6M)."""
    with torch.device("meta"):
        model = DiT(Config(**PRESETS[preset]), VAE([8] * 4, 4, norm_num_groups=4))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained / 1e6 == pytest.approx(millions, rel=0.005)


def test_a_size_that_does_not_divide():
    with pytest.raises(ValueError, match="size 10 must be a multiple of 4 .VAE 2 x patch 2."):
        DiT(Config(size=10), autoencoder())


def test_zero_terminal_snr():
    alpha, sigma = (x.double() for x in zero_terminal_snr(1000))
    assert alpha[-1] == 0 and sigma[-1] == 1
    assert alpha[0] == pytest.approx(0.9999 ** 0.5) and (alpha.diff() < 0).all()
    ones = torch.ones(1000, dtype=torch.float64)
    torch.testing.assert_close(alpha ** 2 + sigma ** 2, ones, atol=1e-6, rtol=0)
    plain = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0).sqrt()
    ratio = (plain - alpha).diff() / plain.diff()           # alpha is linear in plain
    assert (ratio - ratio.mean()).abs().max() < 1e-3


def test_rope_sees_differences():
    """
    The product of two rotated vectors depends on how far apart their cells are, on each of three
    axes, and on nothing else.
    """
    frames, side, d = 4, 3, 22
    cos, sin = (x.view(frames, side, side, d) for x in rope_3d(frames, side, d))
    q, k = torch.randn(2, d, generator=seeded(), dtype=torch.float64)

    def product(a, b):
        return (rotate(q, cos[a], sin[a]) * rotate(k, cos[b], sin[b])).sum().item()

    first = product((0, 0, 0), (1, 1, 1))
    assert product((2, 1, 1), (3, 2, 2)) == pytest.approx(first, abs=1e-5)
    assert product((1, 1, 0), (2, 2, 1)) == pytest.approx(first, abs=1e-5)
    for other in ((2, 1, 1), (1, 2, 1), (1, 1, 2)):
        assert abs(product((0, 0, 0), other) - first) > 1e-3
    rotated = rotate(q, cos[3, 2, 1], sin[3, 2, 1])
    torch.testing.assert_close(rotated.norm(), q.norm())


@torch.no_grad()
def test_dit_is_given_only_the_first_frames(dit):
    """
    At the last noise level nothing of the clip is left: the output depends on the noise and the
    first three frames.
    """
    x, noise, t = latents(), latents(seed=3), torch.full((2,), 999)
    velocity, inputs = dit.velocity, []

    def record(*args):
        inputs.append(args)
        return velocity(*args)

    dit.velocity = record
    dit(x, t, noise)
    changed = x.clone()
    changed[:, 3:] += 1
    dit(changed, t, noise)
    assert all(torch.equal(a, b) for a, b in zip(*inputs)) and torch.equal(inputs[0][0], noise)

    def change_per_frame(before, after):
        return (before - after).abs().amax((0, 2, 3, 4))    # (32,)

    before = velocity(noise, t, x[:, :3])
    given = x[:, :3].clone()
    given[:, 0] += 1
    after = velocity(noise, t, given)                       # every frame attends to the given ones
    assert change_per_frame(before, after).min() > 0
    late = noise.clone()
    late[:, 31] += 1
    after = velocity(late, t, x[:, :3])                     # and to all others
    assert change_per_frame(before, after).min() > 0


def test_dit_loss_is_of_the_predicted_frames(dit):
    x, noise, t = latents(), latents(seed=3), torch.tensor([0, 700])
    alpha, sigma = zero_terminal_snr(1000)
    for i in range(2):
        a, s = alpha[t[i]], sigma[t[i]]
        x_t = a * x + s * noise
        v = dit.velocity(x_t[i:i + 1], t[i:i + 1], x[i:i + 1, :3])[0]
        loss = (v - (a * noise - s * x)[i])[3:].square().mean()
        torch.testing.assert_close(dit(x, t, noise)[i], loss)


@torch.no_grad()
def test_ddim_recovers_a_gaussian(dit):
    """
    With the velocity that is right for latents from N(1, 0.5^2), samples have that mean and
    deviation.
    """
    def velocity(x, t, given):
        alpha, sigma = dit.alpha[t[0]], dit.sigma[t[0]]
        clean = 1 + 0.25 * alpha / (0.25 * alpha ** 2 + sigma ** 2) * (x - alpha)   # E[x_0 | x]
        return (alpha * (x - alpha * clean) / sigma) - sigma * clean

    dit.velocity = velocity
    dit.config.calls = 200
    given = latents(8)[:, :3]
    x = dit.sample(given, latents(8, seed=4))
    assert torch.equal(x[:, :3], given)
    assert x[:, 3:].mean().item() == pytest.approx(1, abs=0.02)
    assert x[:, 3:].std().item() == pytest.approx(0.5, abs=0.02)


@torch.no_grad()
def test_given_frames_are_as_noisy_as_in_training(dit):
    """While sampling, the first three frames have the noise that they have in training."""
    given, noise, inputs = latents()[:, :3], latents(seed=3), []

    def velocity(x, t, given):
        inputs.append((t[0].item(), x.clone()))
        return torch.zeros_like(x)

    dit.velocity = velocity
    dit.sample(given, noise)
    assert [t for t, _ in inputs] == [999, 666, 333]
    for t, x in inputs:
        expected = dit.alpha[t] * given + dit.sigma[t] * noise[:, :3]
        torch.testing.assert_close(x[:, :3], expected)


def test_dit_learns_one_batch(dit):
    x, noise, t = latents(), latents(seed=3), torch.tensor([999, 400])
    optimizer = torch.optim.Adam([p for p in dit.parameters() if p.requires_grad], 3e-3)
    before = dit(x, t, noise).mean().item()
    for _ in range(60):
        optimizer.zero_grad()
        loss = dit(x, t, noise).mean()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5 * before


def test_dit_predicts_saves_and_loads(dit, tmp_path):
    frames = torch.rand(3, 3, 3, 8, 8, generator=seeded(5))
    clip = dit.predictor(seed=1)(frames)
    assert clip.shape == (3, 32, 3, 8, 8) and torch.equal(clip[:, :3], frames)
    assert 0 <= clip.min() and clip.max() <= 1
    dit.save(tmp_path)
    loaded = DiT.load(tmp_path)
    assert torch.equal(loaded.predictor(seed=1)(frames), clip)
    assert not torch.equal(loaded.predictor(seed=2)(frames), clip)
    (tmp_path / "config.json").write_text(json.dumps({"dit": {"depth": 3}, "vae": {}}))
    with pytest.raises(UserError, match="config.json"):
        DiT.load(tmp_path)


def test_a_prediction_does_not_depend_on_the_others_of_its_batch(dit):
    frames = torch.rand(5, 3, 3, 8, 8, generator=seeded(5))
    whole = dit.predictor()(frames)
    for size in (1, 2):
        parts = torch.cat([dit.predictor()(part) for part in frames.split(size)])
        torch.testing.assert_close(parts, whole, rtol=0, atol=1e-4)
    torch.testing.assert_close(dit.predictor()(frames.flip(0)), whole.flip(0), rtol=0, atol=1e-4)


def test_a_predictor_is_given_three_frames(dit):
    for frames in (torch.ones(2, 2, 3, 8, 8), torch.ones(2, 5, 3, 8, 8), torch.ones(2, 3, 8, 8)):
        with pytest.raises(ValueError, match="first 3 frames"):
            dit.predictor()(frames)
    with pytest.raises(ValueError, match="from 255 to 255"):
        dit.predictor()(255 * torch.ones(2, 3, 3, 8, 8))


def test_dit_command(tmp_path, capsys, monkeypatch):
    """It trains, adds its row to the table, is not trained twice, and refuses another VAE."""
    monkeypatch.setattr(evaluate, "SPLITS", ("iid",))
    autoencoder().save(tmp_path / "vae")
    command = ["--out", str(tmp_path), "--steps", "2", "--batch", "4", "--micro_batch", "3",
               "--clips", "5", "--size", "8", "--width", "24", "--layers", "1", "--heads", "2",
               "--calls", "2", "--eval_clips", "2", "--save_every", "1"]
    main(command)
    assert "DiT, 2 calls" in capsys.readouterr().out
    assert len((tmp_path / "dit" / "log.jsonl").read_text().splitlines()) == 2
    main([*command, "--calls", "3"])
    printed = capsys.readouterr().out
    for text in ("is trained", "DiT, 2 calls", "DiT, 3 calls"):
        assert text in printed
    other = autoencoder()
    torch.nn.init.ones_(next(other.parameters()))
    other.save(tmp_path / "vae")
    with pytest.raises(UserError, match="another vae"):
        main(command)


@pytest.mark.parametrize("argv, culprit", [
    (["--heads", "5"], "--heads 5"), (["--calls", "1001"], "1001 of --calls"),
    (["--levels", "1"], "--levels 1"), (["--preset", "B"], "needs a pre-trained VAE"),
    (["--seed", "1000003"], "held-out clips"), (["--eval_clips", "1"], "--eval_clips 1"),
    (["--size", "1000000000"], "--size"), (["--clips", "1000000000000"], "--clips"),
    (["--layers", "1000000"], "--layers"), (["--levels", "1000000000000"], "--levels")])
def test_bad_flags(argv, culprit, tmp_path):
    with pytest.raises(UserError, match=culprit):
        main([*argv, "--out", str(tmp_path)])
    assert not [path for path in tmp_path.iterdir() if path.name != ".lock"]
