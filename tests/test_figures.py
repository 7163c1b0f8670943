"""
Tables and figures: what they measure, and the commands on two small tokenizers.

    pytest tests/test_figures.py
"""
import dataclasses
import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import figures
import train
from baselines import VQGAN, DiT, DiTConfig, VQGANConfig
from ddt import DDT, VAE, Config
from lm import Llama, LlamaConfig
from train import Problem


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """A run folder with untrained models; the codebooks are filled from pictures."""
    folder, x = tmp_path_factory.mktemp("run"), torch.rand(40, 3, 16, 16, generator=seeded())
    torch.manual_seed(0)
    vae = VAE({"block_out_channels": [8, 16], "layers_per_block": 1, "latent_channels": 3, "norm_num_groups": 4,
               "scaling_factor": 1.0, "use_quant_conv": False, "use_post_quant_conv": False})
    ddt = DDT(Config(size=16, queries=4, image_width=16, query_width=32, encoder_layers=2, width=32, layers=2, heads=2, eval_clips=1), vae)
    vqgan = VQGAN(VQGANConfig(size=16, width=8, levels=3))
    with torch.no_grad():
        ddt.quantizer.fill(ddt.quantizer.vectors(ddt.encoder(ddt.latent(x))).flatten(0, 1))
        vqgan.quantizer.fill(vqgan.quantizer.vectors(vqgan.vectors(x)).flatten(0, 1))
    vae.save(folder / "vae")
    ddt.save(folder / "ddt")
    vqgan.save(folder / "vqgan")
    dit = DiT(DiTConfig(size=16, width=32, layers=1, heads=2, levels=4, calls=2), vae)
    torch.nn.init.normal_(dit.patch_out.weight, std=0.1)
    dit.save(folder / "dit")
    for name in ("sft", "grpo"):
        Llama(LlamaConfig(257, 32, 48, 2, 4, 2, 8, n_visual=256, bos_token_id=0)).save(folder / name)
        train.made_of(folder / name, **{x: folder / x / "model.safetensors" for x in ("ddt", "sft")[:1 + (name == "grpo")]})
        settings = dataclasses.asdict(getattr(figures, name).Config(seed=3, clips=12, lr=1e-4))
        (folder / name / "trained.json").write_text(json.dumps({k: v for k, v in settings.items() if k not in train.FREE}))
    return folder


@pytest.mark.parametrize("flags, files", [
    (["--table", "4"], ["table4.json"]), (["--figure", "prefix"], ["prefix.json", "prefix.png", "prefix_error.png"]),
    (["--figure", "5"], ["figure5.json", "figure5.png"]), (["--figure", "6"], ["figure6.json", "figure6.png"]),
    (["--figure", "7"], ["figure7.png"]), (["--table", "1"], ["dit.json", "sft.json", "grpo.json"]),
    (["--table", "2"], ["sft.json", "grpo.json"]), (["--figure", "4"], ["figure4.png"]),
    (["--figure", "8"], ["figure8.json", "figure8.png"])], ids=lambda x: " ".join(x))
def test_commands(out, flags, files, capsys, monkeypatch):
    monkeypatch.setattr(figures, "STEPS", (2,))
    monkeypatch.setattr(figures, "SAMPLES", 2)
    monkeypatch.setattr(figures, "RADII", figures.RADII[::6])
    monkeypatch.setattr(figures, "SPEEDS", figures.SPEEDS[::6])
    figures.main(["--out", str(out), "--clips", "1", *flags])
    if flags[0] == "--table":                                # a second call reads what is there
        monkeypatch.setattr(figures.reward, "evaluate", None)
        figures.main(["--out", str(out), "--clips", "1", *flags])
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
    with pytest.raises(Problem, match="sft.py"):
        figures.main(["--out", str(tmp_path), "--figure", "8"])
    with pytest.raises(Problem, match="no model that predicts"):
        figures.main(["--out", str(tmp_path), "--table", "1"])
    for flags in (["--table", "order"], ["--table", "rl"], ["--figure", "3"]):
        with pytest.raises(Problem, match="make it with `python sft.py"):
            figures.main(["--out", str(tmp_path), *flags])
    with pytest.raises(Problem, match="elsewhere is missing"):
        figures.main(["--out", str(out), "--others", "elsewhere", "--table", "2"])
    with pytest.raises(Problem, match="names a run twice"):
        figures.main(["--out", str(out), "--others", f"{out}/", "--table", "2"])
    for name, command, path in (("vae", "ablation", "vae/trained.json"), ("sft", "rl", "sft/trained.json")):
        shutil.copytree(out / name, tmp_path / name)
        (tmp_path / path).write_text(json.dumps({"preset": "small", "scenario": "all"}))
        with pytest.raises(Problem, match=f"{name} of small and all"):
            figures.main(["--out", str(tmp_path), "--table", command])
    with pytest.raises(Problem, match="no table 9"):
        figures.main(["--out", str(out), "--table", "9"])


def results(**of_splits):
    """What reward.evaluate gives for a scenario, as far as comparisons read it: split -> reward and drift_error of each clip."""
    return {"uniform": {split: {"each": {"reward": r, "drift_error": d}} for split, (r, d) in of_splits.items()}}


def test_clips_are_compared_one_by_one():
    """Two samples of three clips, the last without a frame that counts: their mean, and of each clip the one with more reward."""
    nan = math.nan
    a, b = ([r["uniform"] for r in [results(iid=(reward, drift))]][0]
            for reward, drift in (([1.0, 5.0, nan], [0.7, 0.1, nan]), ([2.0, 4.0, nan], [0.9, 0.5, nan])))
    torch.testing.assert_close(figures.clip_by_clip([a, b], ["iid"], "drift_error"), torch.tensor([0.8, 0.3], dtype=torch.float64))
    torch.testing.assert_close(figures.clip_by_clip([a, b], ["iid"], "drift_error", best=True),
                               torch.tensor([0.9, 0.1], dtype=torch.float64))
    assert figures.clip_by_clip([a, b], ["iid"], "reward", best=True).tolist() == [2.0, 5.0]


def test_standard_errors_are_over_runs_or_clips():
    one, other = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4.0, 4.0])
    assert figures.cell([one]) == "2.000 +- 0.577"                                           # 1 / sqrt(3)
    assert figures.cell([one, other]) == "3.000 +- 1.000"                                    # of 2 and 4: sqrt(2) / sqrt(2)


def test_comparison_stands_beside_the_paper():
    levels = {level: ([1.0, 2.0], [3.0, 3.0]) for level in figures.sim.levels("uniform")}
    run = results(iid=([4.0, 4.5], [0.25, 0.75]), **levels)
    text = figures.comparison({"DDT, SFT": [([run], False)], "VQGAN, SFT": []}, figures.PAPER2)
    uniform, parabola, _ = text.strip().split("\n\n")
    assert "0.500 +- 0.250    3.000 +- 0.000    4.250 +- 0.250    1.500 +- 0.224" in uniform   # 3 levels of 2 clips
    assert [line.split()[-1] for line in uniform.splitlines() if "paper" in line] == ["0.884", "0.281", "0.763", "0.057"]
    assert "VQGAN, SFT                            0       not run yet" in uniform and "not run yet" in parabola


def few(monkeypatch):
    """sft.py and grpo.py at a few steps, whatever figures.py asks for; -> what it asked for."""
    asked = []
    for stage, flags in ((figures.sft, ["--steps", "2", "--clips", "8", "--batch", "4", "--eval_clips", "2", "--layers", "1"]),
                         (figures.grpo, ["--steps", "9", "--clips", "8", "--prompts", "2", "--group", "2", "--eval_clips", "2"])):
        def main(argv, main=stage.main, flags=flags):
            asked.append(argv)
            keep = [x for x in argv if x not in ("--steps", "1000", "2000")]                    # the least of steps
            main(flags + keep)
        monkeypatch.setattr(stage, "main", main)
    monkeypatch.setattr(figures.sim, "SHOWN", ("iid", "ood", "slow", "fast"))
    monkeypatch.setattr(figures.grpo, "pictures", lambda *args: None)
    return asked


def sft_row(out, drift):
    """A table with a row of SFT: every split has two clips."""
    result = {"each": {"reward": [1.0, 2.0], "drift_error": drift}, "drift_error": sum(drift) / 2, "drift_error_se": 0.5}
    results = {"SFT": {"uniform": {s: result for s in figures.sim.SHOWN}}}
    (out / "results.json").write_text(json.dumps(results))
    return results


def test_order(out, capsys, monkeypatch):
    asked = few(monkeypatch)
    sft_row(out, [0.5, 1.5])
    figures.main(["--out", str(out), "--table", "order"])
    forward = next(line for line in capsys.readouterr().out.splitlines() if "uniform, forward" in line)
    assert forward.split()[:3] == ["uniform,", "forward", "1"] and forward.count("1.000 +- 0.500") == 4
    assert asked == [["--preset", "tiny", "--seed", "3", "--clips", "12", "--lr", "0.0001", "--out", str(out / "reverse")]]
    ddt, turned = (DDT.load(place / "ddt") for place in (out, out / "reverse"))
    frames = torch.rand(4, 3, 16, 16, generator=seeded(1))
    assert torch.equal(ddt.encode(frames), turned.encode(frames).flip(1))
    (model,) = (out / "reverse").glob("sft/model.safetensors")
    before = model.stat().st_mtime_ns
    figures.main(["--out", str(out), "--table", "order"])                                       # what is there is not done again
    line = next(line for line in capsys.readouterr().out.splitlines() if "uniform, reverse" in line)
    assert line.split()[2] == "1" and model.stat().st_mtime_ns == before
    assert train.checksum(model) != train.checksum(out / "sft" / "model.safetensors")
    assert train.checksum(out / "ddt" / "model.safetensors") != train.checksum(out / "reverse" / "ddt" / "model.safetensors")


def test_figure_3(out, capsys, monkeypatch):
    """The run's own model is one of the points; the others are trained."""
    asked = few(monkeypatch)
    results = sft_row(out, [0.5, 1.5])
    monkeypatch.setattr(figures, "SIZES", {"tiny": (8, 12)})
    results["SFT"]["uniform"].pop("ood")                                                        # sft.py was stopped there
    (out / "results.json").write_text(json.dumps(results))
    for flags in (["--figure", "3"], ["--table", "order"]):
        with pytest.raises(Problem, match="no whole row of SFT"):
            figures.main(["--out", str(out), *flags])
    assert asked == []
    sft_row(out, [0.5, 1.5])
    figures.main(["--out", str(out), "--figure", "3"])
    assert [argv[argv.index("--clips") + 1] for argv in asked] == ["8"]
    curves = json.loads((out / "figures" / "figure3.json").read_text())
    assert [x for x, _ in curves["uniform, iid"]] == [math.log10(8), math.log10(12)] and len(curves) == 2
    assert curves["uniform, ood"][1][1] == 1.0
    assert curves["uniform, iid"][0][1] == json.loads((out / "clips/8/results.json").read_text())["SFT"]["uniform"]["iid"]["drift_error"]
    capsys.readouterr()


def test_rl(out, capsys, monkeypatch):
    """Each row is trained from the run's SFT model, or one of another length; a second call trains nothing."""
    asked = few(monkeypatch)
    monkeypatch.setattr(figures.sim, "SHOWN", ("iid", "ood", "slow", "fast"))
    (out / "results.json").unlink(missing_ok=True)
    monkeypatch.setattr(figures, "RL", {"as it is": {"usual": {}}, "more": {"other": {"horizon": 2, "whole_clip": True, "sft": 1000}}})
    command = ["--out", str(out), "--table", "rl", "--clips", "1"]
    figures.main(command)
    rows = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines() if line.startswith(("usual", "other"))}
    assert rows.keys() == {"usual", "other"} and len(rows["usual"]) == 2 + 3 + 6 * 3             # 3 numbers, 6 with +-
    assert asked[0][4:] == [] and asked[2][4:] == ["--horizon", "2", "--whole_clip"]
    assert asked[1][:-2] == ["--preset", "tiny", "--seed", "3", "--clips", "12", "--lr", "0.0001", "--steps", "1000"]
    config = json.loads((out / "rl" / "other" / "grpo" / "trained.json").read_text())
    assert config["horizon"] == 2 and config["whole_clip"] and config["seed"] == 3
    log = [json.loads(line) for line in (out / "rl" / "other" / "grpo" / "log.jsonl").read_text().splitlines()]
    curve = [sum(line["reward"] for line in log[i:i + 5]) / 5 for i in range(5)]                 # 9 steps
    assert rows["other"][2] == f"{sum(curve) / 5:.3f}"
    results = json.loads((out / "rl" / "other" / "results.json").read_text())
    of = lambda row: torch.tensor(results[row]["uniform"]["slow"]["each"]["drift_error"])
    assert " ".join(rows["other"][14:17]) == figures.cell([of("SFT + RL") - of("SFT")])
    sums = {place: train.checksum(out / place / "sft" / "model.safetensors") for place in (".", "rl/usual", "rl/other")}
    assert sums["rl/usual"] == sums["."] != sums["rl/other"]
    with Image.open(out / "figures" / "rl_more_velocity.png") as picture:
        assert picture.getextrema() != ((255, 255),) * 3
    before = {p: p.stat().st_mtime_ns for p in (out / "rl").rglob("model.safetensors")}
    figures.main(command)
    assert {p: p.stat().st_mtime_ns for p in (out / "rl").rglob("model.safetensors")} == before
    (out / "rl" / "usual" / "sft" / "model.safetensors").write_bytes((out / "rl/other/sft/model.safetensors").read_bytes())
    with pytest.raises(Problem, match="made from another sft"):
        figures.main(command)


def test_a_copy_is_whole_or_not_there(out, tmp_path, monkeypatch):
    real = figures.shutil.copytree
    monkeypatch.setattr(figures.shutil, "copytree", lambda a, b, **options: real(a, b, **options) if a.name == "vae" else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        figures.copied(out, tmp_path / "copy", "vae", "ddt")
    assert not (tmp_path / "copy").exists()
    monkeypatch.undo()
    assert {p.name for p in figures.copied(out, tmp_path / "copy", "vae", "ddt").iterdir()} == {"vae", "ddt", "results.json"}


def test_results_of_another_model_are_forgotten(out, tmp_path):
    (tmp_path / "sft").mkdir()
    weights, path = tmp_path / "sft" / "model.safetensors", tmp_path / "sft.json"
    weights.write_bytes(b"one")
    figures.of_these(path, tmp_path, "sft")
    path.write_text("{}")
    figures.of_these(path, tmp_path, "sft")
    assert path.exists()
    weights.write_bytes(b"other")
    figures.of_these(path, tmp_path, "sft")
    assert not path.exists()


def test_heat_maps(tmp_path):
    """Slow and small is at the lower left; white is 0, red the top, grey nothing."""
    value = torch.tensor([[0.0, 1.0], [math.nan, 0.5]])                                          # (radius, speed)
    radii, speeds = torch.tensor([0.5, 1.9]), torch.tensor([0.3, 5.0])
    figures.heat_maps(tmp_path / "map.png", [("x", value, 1.0)], radii, speeds, side=200)
    picture = Image.open(tmp_path / "map.png")
    at = lambda x, y: picture.getpixel((45 + x, 25 + y))
    assert at(20, 180) == (255, 255, 255) and at(20, 20) == (255, 0, 0)
    assert at(180, 180) == (128, 128, 128) and at(180, 20) == (255, 127, 127)


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
    figures.main(command + ["--clips", "2"])                                            # measured again, not trained again
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


@pytest.mark.parametrize("shift, kept, near", [(0, "100.0%", "0.0%"), (1, "0.0%", "100.0%"), (3, "0.0%", "0.0%")])
def test_codes_that_come_back(shift, kept, near):
    """One token, the ball's x in steps of 0.04 units on a ring of 256 codes, decoded to a ball that is `shift` steps off."""
    angle = torch.arange(256) * 2 * math.pi / 256
    model = Stub(blind=False)
    model.quantizer = SimpleNamespace(codebook=torch.stack([angle.cos(), angle.sin()], 1))
    model.encode = lambda frames: (figures.reward.detect(frames[:, None], 1)[0][:, 0, 0, :1] * 25).round().long().clamp(0, 255)

    def decode(codes, generator):
        position = torch.stack([(codes + shift) / 25, torch.full(codes.shape, 5.0)], -1)                  # (n, 1, 2)
        return figures.sim.render(position[:, None], torch.full(codes.shape, 0.6), 32)[:, 0]
    model.decode = decode
    text = figures.what_codes_say(model, "uniform", "stub", figures.Config(clips=1))
    assert f"keeps {kept} of the codes" in text and f"makes of {near} one of" in text


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


@pytest.mark.parametrize("y, top, bottom", [((0.0, 1.0), 0.05 / 1.05, 1.0), ((3.0, 3.5), 0.025 / 0.525, 1.0),
                                            ((1.0, 4.0), 0.2 / 4.2, 3.2 / 4.2), ((-1.0, 1.0), 0.1 / 2.1, 1.0), ((0.0, 0.0), 1.0, 1.0),
                                            ((2.0, 2.0), 1.0, 1.0)])
def test_chart(tmp_path, y, top, bottom):
    """The curve is where its points are, as shares of the height from the top; near 0 the axis begins at 0."""
    figures.chart(tmp_path / "chart.png", "x", "y", {"line": [(2, y[0]), (3, y[1])]}, width=720, height=400)
    picture = Image.open(tmp_path / "chart.png")
    rows = lambda x: [r for r in range(20, 370) if picture.getpixel((x, r)) == (200, 40, 40)]
    assert sum(rows(62)) / len(rows(62)) == pytest.approx(30 + 325 * bottom, abs=3)              # two pixels from either end
    assert sum(rows(558)) / len(rows(558)) == pytest.approx(30 + 325 * top, abs=3)
