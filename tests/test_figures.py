"""
Tables and figures: what they measure, and the commands on two small tokenizers.

    pytest tests/test_figures.py
"""
import dataclasses
import json
import math

import pytest
import torch
from PIL import Image

import figures
from baselines import VQGAN, VQGANConfig
from ddt import DDT, VAE, Config
from train import Problem


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """A run folder with untrained tokenizers whose codebooks are filled from pictures."""
    folder, x = tmp_path_factory.mktemp("run"), torch.rand(40, 3, 16, 16, generator=seeded())
    torch.manual_seed(0)
    vae = VAE({"block_out_channels": [8, 16], "layers_per_block": 1, "latent_channels": 3, "norm_num_groups": 4,
               "scaling_factor": 1.0, "use_quant_conv": False, "use_post_quant_conv": False})
    ddt = DDT(Config(size=16, queries=4, image_width=16, query_width=32, encoder_layers=2, width=32, layers=2, heads=2), vae)
    vqgan = VQGAN(VQGANConfig(size=16, width=8, levels=3))
    with torch.no_grad():
        ddt.quantizer.fill(ddt.quantizer.vectors(ddt.encoder(ddt.latent(x))).flatten(0, 1))
        vqgan.quantizer.fill(vqgan.quantizer.vectors(vqgan.vectors(x)).flatten(0, 1))
    vae.save(folder / "vae")
    ddt.save(folder / "ddt")
    vqgan.save(folder / "vqgan")
    return folder


@pytest.mark.parametrize("flags, files", [
    (["--table", "4"], ["table4.json"]), (["--figure", "prefix"], ["prefix.json", "prefix.png", "prefix_error.png"]),
    (["--figure", "5"], ["figure5.json", "figure5.png"]), (["--figure", "6"], ["figure6.json", "figure6.png"]),
    (["--figure", "7"], ["figure7.png"])], ids=lambda x: " ".join(x))
def test_commands(out, flags, files, capsys, monkeypatch):
    monkeypatch.setattr(figures, "STEPS", (2,))
    figures.main(["--out", str(out), "--clips", "2", *flags])
    if flags[0] == "--table":                                # a second call reads what is there
        monkeypatch.setattr(figures.reward, "evaluate", None)
        figures.main(["--out", str(out), "--clips", "2", *flags])
    assert len(capsys.readouterr().out.splitlines()) > 2
    for name in files:
        path = out / "figures" / name
        if name.endswith("png"):
            assert Image.open(path).getextrema() != ((255, 255),) * 3
        else:
            json.loads(path.read_text())


def test_what_is_missing_is_named(out, tmp_path):
    with pytest.raises(Problem, match="ddt.py"):
        figures.main(["--out", str(tmp_path), "--table", "4"])
    with pytest.raises(Problem, match="ddt.py"):
        figures.main(["--out", str(tmp_path), "--table", "ablation"])
    with pytest.raises(Problem, match="no table 9"):
        figures.main(["--out", str(out), "--table", "9"])


def test_ablation(out, capsys, monkeypatch):
    """Rows at equal work, mean and standard error over seeds; what is done is not done again."""
    base = Config(size=16, clips=4, image_width=16, query_width=32, width=32, heads=2, batch=4, eval_clips=1, steps=6)
    monkeypatch.setattr(figures, "BASE", base)
    monkeypatch.setattr(figures, "SEEDS", (0, 1))
    monkeypatch.setattr(figures, "ABLATION", {"deep": {"layers": 9}})
    monkeypatch.setattr(figures.sim, "SHOWN", ("iid",))
    monkeypatch.setattr(figures, "reading", lambda model, scenario, n: model.config.seed + 0.5)
    command = ["--out", str(out), "--clips", "1", "--table", "ablation"]
    figures.main(command)
    row = capsys.readouterr().out.split("\ndeep ")[1].splitlines()[0].split()
    work = lambda c: figures.tokenizers.plan(c, 1).flops
    fewer = round(6 * work(base) / work(dataclasses.replace(base, layers=9)))
    assert int(row[0]) == fewer and 1 < fewer < 5
    assert " ".join(row[-3:]) == "1.000 +- 0.500"                                       # of 0.5 and 1.5
    monkeypatch.setattr(figures.tokenizers, "main", None)
    figures.main(command)
    monkeypatch.setattr(figures, "ABLATION", {"deep": {"lr": 1e-3}})
    with pytest.raises(TypeError):
        figures.main(command)


class Stub:
    """A tokenizer of which each token is a rounded coordinate, or nothing."""

    def __init__(self, blind: bool):
        self.config, self.blind = Config(size=32, queries=1), blind

    def encode(self, frames):
        center = figures.reward.detect(frames[:, None], 1)[0][:, 0, 0, :1]        # (B, 1), x
        return torch.zeros_like(center).long() if self.blind else (center.clamp(0, 5) * 51).long()


def test_reading():
    """Tokens that say where the ball is, to 0.02 units, tell its speed to about 0.1; a constant leaves the spread of speeds."""
    truth = figures.sim.first_frames("uniform", "pretrain", 50, figures.reward.EVAL_SEED).velocity
    guess = (truth - truth.mean()).abs().mean().item()
    assert figures.reading(Stub(blind=True), "uniform", 400, steps=100) == pytest.approx(guess, rel=0.15)
    assert figures.reading(Stub(blind=False), "uniform", 2000, steps=300) < 0.5 * guess


def test_carried():
    """A code that is the attribute carries all of it; one that is a coin's toss, one bit and none of it."""
    x = torch.arange(8.0).repeat(50)
    coin = torch.randint(2, (400,), generator=seeded())
    one, other, constant = figures.carried(torch.stack([x.long(), coin, torch.zeros(400).long()], 1), x[:, None])
    assert one["codes"] == 8 and one["bits"] == pytest.approx(3) and one["perplexity"] == pytest.approx(8)
    assert one["explained"] == pytest.approx([1])
    assert other["codes"] == 2 and other["bits"] == pytest.approx(1, abs=0.01) and abs(other["explained"][0]) < 0.02
    assert constant == {"codes": 1, "perplexity": 1, "bits": 0, "explained": [pytest.approx(0, abs=1e-6)]}


def test_ball_errors():
    frames, position, radius = figures.still(6, "collision", "iid", 64)
    assert frames.shape == (6, 3, 64, 64) and position.shape == (6, 2, 2)
    right = figures.ball_errors(frames, position, radius)
    assert right["center"] < 0.01 and right["radius"] < 0.01 and right["missing"] == 0
    wrong = figures.ball_errors(frames, position + torch.tensor([0.3, 0.4]), radius - 0.2)
    assert wrong["center"] == pytest.approx(0.5, abs=0.01) and wrong["radius"] == pytest.approx(0.2, abs=0.01)
    white = figures.ball_errors(torch.ones_like(frames), position, radius)
    assert white["missing"] == 1 and math.isnan(white["center"])


def test_similarity():
    a = torch.randn(3, 4, 5, generator=seeded())
    torch.testing.assert_close(figures.similarity(a, 3 * a), torch.ones(3))
    torch.testing.assert_close(figures.similarity(a, -a), -torch.ones(3))


def test_chart(tmp_path):
    """The curve is where its points are: a red pixel at the top right end, none at the bottom right."""
    figures.chart(tmp_path / "chart.png", "x", "y", {"line": [(0, 0), (1, 1)]}, width=640, height=400)
    picture = Image.open(tmp_path / "chart.png")
    red = [(x, y) for x in range(600, 640) for y in range(45, 400) if picture.getpixel((x, y)) == (200, 40, 40)]
    assert red and max(y for _, y in red) < 80
