"""
VQGAN, the tokenizer that the paper compares with.

    pytest tests/test_vqgan.py

Takes 3 seconds on one CPU core.
"""
import json
import os

import pytest
import torch

from checkpoint import UserError
from experiments.vqgan import PRESETS, VQGAN, Config, main


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def config(**other) -> Config:
    return Config(**{"size": 16, "width": 8, "levels": 3} | other)


def frames(n=6):
    return torch.rand(n, 3, 16, 16, generator=seeded(2))


@pytest.fixture
@torch.no_grad()
def vqgan() -> VQGAN:
    torch.manual_seed(0)
    model = VQGAN(config())
    model.quantizer.fill(model.quantizer.vectors(model.vectors(frames(60))).flatten(0, 1))
    return model.eval()


@pytest.mark.parametrize("size, levels, side", [(32, 4, 4), (16, 3, 4), (32, 3, 8)])
def test_a_token_per_cell(size, levels, side):
    model = VQGAN(config(size=size, levels=levels))
    assert model.config.queries == side ** 2
    assert model.vectors(torch.rand(2, 3, size, size)).shape[:2] == (2, side ** 2)
    assert model.paint(torch.randn(2, side ** 2, 16)).shape == (2, 3, size, size)


@pytest.mark.parametrize("preset, millions", [("tiny", 0.34), ("small", 10.7)])
def test_presets(preset, millions):
    """As many tokens and parameters as the comment says."""
    with torch.device("meta"):
        model = VQGAN(Config(**PRESETS[preset]))
    assert model.config.queries == 16
    parameters = sum(p.numel() for p in model.parameters())
    assert parameters / 1e6 == pytest.approx(millions, rel=0.01)


@torch.no_grad()
def test_tokens_are_in_reading_order(vqgan):
    """Token 4 row + column is that of the cell, row 0 on top, both encoded and decoded."""
    x, tokens = frames(2), torch.randn(2, 16, 16, generator=seeded())
    grid = torch.empty(2, 16, 4, 4)
    encoded, vectors = vqgan.encoder(2 * x - 1), vqgan.vectors(x)
    for row in range(4):
        for column in range(4):
            assert torch.equal(vectors[:, 4 * row + column], encoded[:, :, row, column])
            grid[:, :, row, column] = tokens[:, 4 * row + column]
    torch.testing.assert_close(vqgan.paint(tokens), vqgan.decoder(grid) / 2 + 0.5)


def test_training_loss(vqgan):
    x = frames()
    out = vqgan(x, x.var())
    codes = vqgan.encode(x)
    painted = vqgan.paint(vqgan.quantizer.codebook[codes])
    assert out["loss"].shape == (6,)
    torch.testing.assert_close(out["loss"], out["mse"] + 0.25 * out["commitment"])
    torch.testing.assert_close(out["mse"].mean(), ((painted - x) ** 2).mean() / x.var())
    assert torch.equal(out["codes"], codes)
    assert torch.equal(vqgan.quantizer.nearest(out["vectors"]), codes)
    out["loss"].sum().backward()
    assert vqgan.encoder.conv_in.weight.grad.abs().sum() > 0        # straight-through


def test_learns_one_batch():
    """A few pictures, quantized: the error falls to a twentieth of their variance."""
    torch.manual_seed(0)
    model, x = VQGAN(config()), frames(4).round()
    quantizer = model.quantizer
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for step in range(150):
        if step == 20:
            with torch.no_grad():
                quantizer.fill(quantizer.vectors(model.vectors(x)).flatten(0, 1))
        out = model(x, x.var())
        optimizer.zero_grad()
        out["loss"].sum().backward()
        optimizer.step()
        quantizer.update(out["vectors"].flatten(0, 1), out["codes"].flatten())
    assert quantizer.active and out["mse"].mean() < 0.05


def test_encode_and_decode(vqgan):
    codes = vqgan.encode(frames())
    assert codes.shape == (6, 16) and codes.dtype == torch.int64
    assert 0 <= codes.min() and codes.max() < 256
    x = vqgan.decode(codes)
    assert x.shape == (6, 3, 16, 16) and 0 <= x.min() and x.max() <= 1
    assert torch.equal(vqgan.decode(codes, generator=seeded()), x)  # nothing random
    for dtype in (torch.uint8, torch.int16, torch.int32, torch.uint16):
        assert torch.equal(vqgan.decode(codes.to(dtype)), x)
    for dtype in (torch.bool, torch.float32):
        with pytest.raises(ValueError, match="must be integers"):
            vqgan.decode(codes.to(dtype))
    for wrong in (frames() * 2 - 1, frames() * 255, frames().byte()):
        with pytest.raises(ValueError, match="0, 1"):
            vqgan.encode(wrong)
    with pytest.raises(ValueError, match="16, 16"):
        vqgan.encode(torch.rand(2, 3, 8, 8))
    for wrong in (codes[:, :3], codes - 300, codes + 256, codes[:0]):
        with pytest.raises(ValueError, match="codes must be"):
            vqgan.decode(wrong)


def test_save_and_load(vqgan, tmp_path):
    vqgan.save(tmp_path)
    loaded = VQGAN.load(tmp_path)
    assert loaded.config == vqgan.config
    assert torch.equal(loaded.encode(frames()), vqgan.encode(frames()))
    (tmp_path / "config.json").write_text(json.dumps({"ddt": {}}))
    with pytest.raises(UserError, match="config.json"):
        VQGAN.load(tmp_path)
    vqgan.save(tmp_path)
    os.truncate(tmp_path / "model.safetensors", 1000)
    with pytest.raises(UserError, match="model.safetensors"):
        VQGAN.load(tmp_path)


@pytest.mark.parametrize("argv, culprit", [
    (["--width", "12"], "--width 12"), (["--size", "20"], "--size 20"),
    (["--quantize_at", "1"], "--quantize_at 1"), (["--scenario", "rain"], "--scenario 'rain'"),
    (["--seed", "1000003"], "held-out clips"), (["--eval_clips", "1"], "--eval_clips 1"),
    (["--size", "1000000000"], "--size"), (["--clips", "1000000000000"], "--clips"),
    (["--levels", "1"], "1024 cells"), (["--levels", "40"], "--levels"),
    (["--blocks", "1000000"], "--blocks"), (["--commitment", "1e9"], "--commitment")])
def test_bad_flags(argv, culprit, tmp_path):
    with pytest.raises(UserError, match=culprit):
        main([*argv, "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())
