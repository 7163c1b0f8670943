"""
What the paper compares with: the VQGAN tokenizer, the video DiT.

    pytest tests/test_baselines.py
"""
import json
import os

import pytest
import torch

import baselines
from baselines import DIT_PRESETS, VQGAN, VQGAN_PRESETS, DiT, DiTConfig, VQGANConfig, main
from ddt import VAE
from train import Problem


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def config(**other) -> VQGANConfig:
    return VQGANConfig(**{"size": 16, "width": 8, "levels": 3} | other)


def frames(n=6):
    return torch.rand(n, 3, 16, 16, generator=seeded(2))


@pytest.fixture
def vqgan() -> VQGAN:
    torch.manual_seed(0)
    model = VQGAN(config())
    with torch.no_grad():
        model.quantizer.fill(model.quantizer.vectors(model.vectors(frames(60))).flatten(0, 1))
    return model.eval()


@pytest.mark.parametrize("size, levels, side", [(32, 4, 4), (16, 3, 4), (32, 3, 8)])
def test_a_token_a_cell(size, levels, side):
    model = VQGAN(config(size=size, levels=levels))
    assert model.config.queries == side ** 2
    assert model.vectors(torch.rand(2, 3, size, size)).shape[:2] == (2, side ** 2)
    assert model.paint(torch.randn(2, side ** 2, 16)).shape == (2, 3, size, size)


@pytest.mark.parametrize("preset, millions", [("tiny", 0.34), ("small", 10.7)])
def test_presets(preset, millions):
    """As many tokens and parameters as the comment says."""
    with torch.device("meta"):
        model = VQGAN(VQGANConfig(**VQGAN_PRESETS[preset]))
    assert model.config.queries == 16
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.01)


@torch.no_grad()
def test_tokens_are_in_reading_order(vqgan):
    """Token 4 row + column is the cell's, row 0 on top, into the tokens and out of them."""
    x, tokens, grid = frames(2), torch.randn(2, 16, 16, generator=seeded()), torch.empty(2, 16, 4, 4)
    encoded, vectors = vqgan.encoder(2 * x - 1), vqgan.vectors(x)
    for row in range(4):
        for column in range(4):
            assert torch.equal(vectors[:, 4 * row + column], encoded[:, :, row, column])
            grid[:, :, row, column] = tokens[:, 4 * row + column]
    torch.testing.assert_close(vqgan.paint(tokens), vqgan.decoder(grid) / 2 + 0.5)


def test_training_loss(vqgan):
    x = frames()
    result = vqgan(x, x.var())
    codes = vqgan.encode(x)
    painted = vqgan.paint(vqgan.quantizer.codebook[codes])
    assert result["loss"].shape == (6,)
    torch.testing.assert_close(result["loss"], result["mse"] + 0.25 * result["commitment"])
    torch.testing.assert_close(result["mse"].mean(), ((painted - x) ** 2).mean() / x.var())
    assert torch.equal(result["codes"], codes) and torch.equal(vqgan.quantizer.nearest(result["vectors"]), codes)
    result["loss"].sum().backward()
    assert vqgan.encoder.conv_in.weight.grad.abs().sum() > 0                                # straight-through


def test_learns_one_batch():
    """A few pictures, quantized: the error falls to a twentieth of their variance."""
    torch.manual_seed(0)
    model, x = VQGAN(config()), frames(4).round()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for step in range(150):
        if step == 20:
            with torch.no_grad():
                model.quantizer.fill(model.quantizer.vectors(model.vectors(x)).flatten(0, 1))
        result = model(x, x.var())
        optimizer.zero_grad()
        result["loss"].sum().backward()
        optimizer.step()
        model.quantizer.update(result["vectors"].flatten(0, 1), result["codes"].flatten())
    assert model.quantizer.active and result["mse"].mean() < 0.05


def test_encode_and_decode(vqgan):
    codes = vqgan.encode(frames())
    assert codes.shape == (6, 16) and codes.dtype == torch.int64 and 0 <= codes.min() and codes.max() < 256
    x = vqgan.decode(codes)
    assert x.shape == (6, 3, 16, 16) and 0 <= x.min() and x.max() <= 1
    assert torch.equal(vqgan.decode(codes, generator=seeded()), x)                          # nothing random
    with pytest.raises(ValueError, match="16, 16"):
        vqgan.encode(torch.rand(2, 3, 8, 8))
    for wrong in (codes[:, :3], codes - 300, codes + 256, codes[:0]):
        with pytest.raises(ValueError, match="codes must be"):
            vqgan.decode(wrong)


def test_save_and_load(vqgan, tmp_path):
    vqgan.save(tmp_path)
    loaded = VQGAN.load(tmp_path)
    assert loaded.config == vqgan.config and torch.equal(loaded.encode(frames()), vqgan.encode(frames()))
    (tmp_path / "config.json").write_text(json.dumps({"ddt": {}}))
    with pytest.raises(Problem, match="config.json"):
        VQGAN.load(tmp_path)
    vqgan.save(tmp_path)
    os.truncate(tmp_path / "model.safetensors", 1000)
    with pytest.raises(Problem, match="model.safetensors"):
        VQGAN.load(tmp_path)


@pytest.mark.parametrize("argv, culprit", [([], "vqgan"), (["dit9"], "vqgan"), (["vqgan", "--width", "12"], "--width 12"),
                                           (["vqgan", "--size", "20"], "--size 20"), (["vqgan", "--quantize_at", "1"], "--quantize_at"),
                                           (["dit", "--heads", "5"], "--heads 5"), (["dit", "--calls", "1001"], "1001 of --calls"), (["dit", "--levels", "1"], "--levels 1"),
                                           (["dit"], "python ddt.py")])
def test_bad_flags(argv, culprit, tmp_path):
    with pytest.raises(Problem, match=culprit):
        main(argv + ["--out", str(tmp_path)] * bool(argv))
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------ video DiT


def autoencoder() -> VAE:
    torch.manual_seed(0)
    return VAE({"block_out_channels": [8, 16], "layers_per_block": 1, "latent_channels": 2, "norm_num_groups": 4,
                "scaling_factor": 1.0, "use_quant_conv": False, "use_post_quant_conv": False})


@pytest.fixture
def dit() -> DiT:
    torch.manual_seed(0)
    model = DiT(DiTConfig(size=8, width=24, layers=2, heads=2, calls=3), autoencoder()).eval()
    torch.nn.init.normal_(model.patch_out.weight, std=0.1)
    return model


def latents(n=2) -> torch.Tensor:
    return torch.randn(n, 32, 2, 4, 4, generator=seeded(1))


@pytest.mark.parametrize("preset, millions", [("S", 22.5), ("B", 89.5), ("L", 310), ("tiny", 0.88), ("small", 82.4)])
def test_dit_sizes(preset, millions):
    """Those of PhyWorld's paper, and about those of our language models (0.85M, 82.6M)."""
    with torch.device("meta"):
        model = DiT(DiTConfig(**DIT_PRESETS[preset]), VAE({"block_out_channels": [8] * 4, "layers_per_block": 1, "latent_channels": 4,
                                                           "norm_num_groups": 4}))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained / 1e6 == pytest.approx(millions, rel=0.005)


def test_zero_terminal_snr():
    alpha, sigma = (x.double() for x in baselines.zero_terminal_snr(1000))
    assert alpha[-1] == 0 and sigma[-1] == 1 and alpha[0] == pytest.approx(0.9999 ** 0.5) and (alpha.diff() < 0).all()
    torch.testing.assert_close(alpha ** 2 + sigma ** 2, torch.ones(1000, dtype=torch.float64), atol=1e-6, rtol=0)
    plain = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0).sqrt()
    ratio = (plain - alpha).diff() / plain.diff()               # stretched: one and the same straight line
    assert (ratio - ratio.mean()).abs().max() < 1e-3


def test_rope_sees_differences():
    """A product of two rotated vectors depends on how far apart their cells are, on each of the three axes, and on nothing else."""
    F, side, d = 4, 3, 22
    cos, sin = (x.view(F, side, side, d) for x in baselines.rope_3d(F, side, d))
    q, k = torch.randn(2, d, generator=seeded(), dtype=torch.float64)
    product = lambda a, b: (baselines.rotate(q, cos[a], sin[a]) * baselines.rotate(k, cos[b], sin[b])).sum().item()
    first = product((0, 0, 0), (1, 1, 1))
    assert product((2, 1, 1), (3, 2, 2)) == pytest.approx(first, abs=1e-5) and product((1, 1, 0), (2, 2, 1)) == pytest.approx(first, abs=1e-5)
    for other in ((2, 1, 1), (1, 2, 1), (1, 1, 2)):
        assert abs(product((0, 0, 0), other) - first) > 1e-3
    torch.testing.assert_close(baselines.rotate(q, cos[3, 2, 1], sin[3, 2, 1]).norm(), q.norm())


@torch.no_grad()
def test_dit_reads_only_the_given_frames(dit):
    """At the last noise level nothing of the clip is left: what comes out depends on the noise and the first three frames."""
    x, noise, t = latents(), torch.randn(2, 32, 2, 4, 4, generator=seeded(3)), torch.full((2,), 999)
    inputs = []
    dit.velocity, velocity = (lambda *a: inputs.append(a) or velocity(*a)), dit.velocity
    dit(x, t, noise)
    changed = x.clone()
    changed[:, 3:] += 1
    dit(changed, t, noise)
    assert all(torch.equal(a, b) for a, b in zip(*inputs)) and torch.equal(inputs[0][0], noise)
    given = x[:, :3].clone()
    given[:, 0] += 1
    before, after = velocity(noise, t, x[:, :3]), velocity(noise, t, given)
    assert (before - after).abs().amax((0, 2, 3, 4)).min() > 0                             # every frame looks at them
    late = noise.clone()
    late[:, 31] += 1
    assert (velocity(late, t, x[:, :3]) - before).abs().amax((0, 2, 3, 4)).min() > 0       # and at all others


def test_dit_loss_is_of_the_predicted_frames(dit):
    x, noise, t = latents(), torch.randn(2, 32, 2, 4, 4, generator=seeded(3)), torch.tensor([0, 700])
    alpha, sigma = baselines.zero_terminal_snr(1000)
    for i in range(2):
        a, s = alpha[t[i]], sigma[t[i]]
        v = dit.velocity((a * x + s * noise)[i:i + 1], t[i:i + 1], x[i:i + 1, :3])[0]
        loss = (v - (a * noise - s * x)[i])[3:].square().mean()
        torch.testing.assert_close(dit(x, t, noise)[i], loss)


@torch.no_grad()
def test_ddim_recovers_a_gaussian(dit):
    """With the velocity that is right for latents from N(1, 0.5^2), sampling gives that mean and deviation."""
    def velocity(x, t, given):
        alpha, sigma = dit.alpha[t[0]], dit.sigma[t[0]]
        clean = 1 + 0.25 * alpha / (0.25 * alpha ** 2 + sigma ** 2) * (x - alpha)           # E[x_0 | x]
        return (alpha * (x - alpha * clean) / sigma) - sigma * clean
    dit.velocity = velocity
    dit.config.calls = 200
    x = dit.sample(latents(8)[:, :3], torch.randn(8, 32, 2, 4, 4, generator=seeded(4)))
    assert torch.equal(x[:, :3], latents(8)[:, :3])
    assert x[:, 3:].mean().item() == pytest.approx(1, abs=0.02) and x[:, 3:].std().item() == pytest.approx(0.5, abs=0.02)


@torch.no_grad()
def test_given_frames_are_as_noisy_as_in_training(dit):
    """What sampling shows the model of the first three frames is what training shows it at that noise level."""
    seen, given, noise = [], latents()[:, :3], torch.randn(2, 32, 2, 4, 4, generator=seeded(3))
    dit.velocity = lambda x, t, given: seen.append((t[0].item(), x.clone())) or torch.zeros_like(x)
    dit.sample(given, noise)
    assert [t for t, _ in seen] == [999, 666, 333]
    for t, x in seen:
        torch.testing.assert_close(x[:, :3], dit.alpha[t] * given + dit.sigma[t] * noise[:, :3])


def test_dit_learns_one_batch(dit):
    x, noise, t = latents(), torch.randn(2, 32, 2, 4, 4, generator=seeded(3)), torch.tensor([999, 400])
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
    assert clip.shape == (3, 32, 3, 8, 8) and torch.equal(clip[:, :3], frames) and 0 <= clip.min() and clip.max() <= 1
    dit.save(tmp_path)
    loaded = DiT.load(tmp_path)
    assert torch.equal(loaded.predictor(seed=1)(frames), clip) and not torch.equal(loaded.predictor(seed=2)(frames), clip)
    (tmp_path / "config.json").write_text(json.dumps({"dit": {"depth": 3}, "vae": {}}))
    with pytest.raises(Problem, match="config.json"):
        DiT.load(tmp_path)


def test_dit_command(tmp_path, capsys, monkeypatch):
    """Trains, goes into the table, is not trained twice, and notices another VAE."""
    monkeypatch.setattr(baselines.sim, "SHOWN", ("iid",))
    autoencoder().save(tmp_path / "vae")
    command = ["dit", "--out", str(tmp_path), "--steps", "2", "--batch", "4", "--micro", "3", "--clips", "5", "--size", "8", "--width", "24",
               "--layers", "1", "--heads", "2", "--calls", "2", "--eval_clips", "2", "--save_every", "1"]
    main(command)
    assert "DiT, 2 calls" in capsys.readouterr().out and len((tmp_path / "dit" / "log.jsonl").read_text().splitlines()) == 2
    main(command + ["--calls", "3"])
    assert "is trained" in (said := capsys.readouterr().out) and "DiT, 2 calls" in said and "DiT, 3 calls" in said
    other = autoencoder()
    other.config["scaling_factor"] = 2.0
    torch.nn.init.ones_(next(other.parameters()))
    other.save(tmp_path / "vae")
    with pytest.raises(Problem, match="another vae"):
        main(command)
