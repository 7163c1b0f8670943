"""
What the paper compares with: the VQGAN tokenizer.

    pytest tests/test_baselines.py
"""
import json
import os

import pytest
import torch

from baselines import VQGAN, VQGANConfig, main
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
                                           (["vqgan", "--size", "20"], "--size 20"), (["vqgan", "--quantize_at", "1"], "--quantize_at")])
def test_bad_flags(argv, culprit, tmp_path):
    with pytest.raises(Problem, match=culprit):
        main(argv + ["--out", str(tmp_path)] * bool(argv))
    assert not list(tmp_path.iterdir())
