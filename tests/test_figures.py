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

import checkpoint
import ddt
import evaluate
import grpo
import pictures
import reward
import sft
import sim
import vae
from checkpoint import UserError, checksum, read_json, write_json
from ddt import DDT
from experiments import dit, figures, vqgan
from experiments.dit import DiT
from experiments.vqgan import VQGAN
from lm import Llama, LlamaConfig
from vae import VAE

MODEL = "model.safetensors"


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def small_ddt(**changes) -> ddt.Config:
    return ddt.Config(size=16, image_width=16, query_width=32, width=32, heads=2, eval_clips=1,
                      **changes)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """A run folder with untrained models; the codebooks are filled from pictures."""
    folder, x = tmp_path_factory.mktemp("run"), torch.rand(40, 3, 16, 16, generator=seeded())
    torch.manual_seed(0)
    autoencoder = VAE([8, 16], 3, norm_num_groups=4, use_quant_conv=False,
                      use_post_quant_conv=False)
    tokenizer = DDT(small_ddt(encoder_layers=2, layers=2), autoencoder)
    spatial = VQGAN(vqgan.Config(size=16, width=8, levels=3))
    with torch.no_grad():
        tokenizer.quantizer.fill(tokenizer.vectors(tokenizer.latent(x)).flatten(0, 1))
        spatial.quantizer.fill(spatial.quantizer.vectors(spatial.vectors(x)).flatten(0, 1))
    autoencoder.save(folder / "vae")
    tokenizer.save(folder / "ddt")
    spatial.save(folder / "vqgan")
    video = DiT(dit.Config(size=16, width=32, layers=1, heads=2, levels=4, calls=2), autoencoder)
    torch.nn.init.normal_(video.patch_out.weight, std=0.1)
    video.save(folder / "dit")
    sources = {"ddt": folder / "ddt" / MODEL}
    configs = {"sft": sft.Config(seed=3, clips=12, lr=1e-4, llm="none"),
               "grpo": grpo.Config(seed=3, clips=12, lr=1e-4)}
    for name, config in configs.items():
        shape = LlamaConfig(257, 32, 48, 2, 4, 2, 8, n_visual=256, bos_token_id=0)
        Llama(shape).save(folder / name)
        sums = {source: checksum(path) for source, path in sources.items()}
        write_json(folder / name / "provenance.json", sums)
        settings = dataclasses.asdict(config)
        kept = {k: v for k, v in settings.items() if k not in checkpoint.FREE_FIELDS}
        write_json(folder / name / "trained.json", kept)
        sources[name] = folder / name / MODEL
    return folder


# ------------------------------------------------------------------ the commands


@pytest.mark.parametrize("flags, files", [
    (["--table", "4"], ["table4.json"]),
    (["--figure", "prefix"], ["prefix.json", "prefix.png"]),
    (["--figure", "5"], ["figure5.json", "figure5.png"]),
    (["--figure", "6"], ["figure6.json", "figure6.png"]),
    (["--figure", "7"], ["figure7.png"]),
    (["--table", "1"], ["dit.json", "sft.json", "grpo.json"]),
    (["--table", "2"], ["sft.json", "grpo.json"]),
    (["--figure", "4"], ["figure4.png"]),
    (["--figure", "8"], ["figure8.json", "figure8.png"]),
], ids=lambda x: " ".join(x))
def test_commands(out, flags, files, capsys, monkeypatch):
    monkeypatch.setattr(figures, "STEPS", (2,))
    monkeypatch.setattr(figures, "SAMPLES", 2)
    monkeypatch.setattr(figures, "RADII", figures.RADII[::6])
    monkeypatch.setattr(figures, "SPEEDS", figures.SPEEDS[::6])
    command = ["--out", str(out), "--clips", "1", *flags]
    figures.main(command)
    if flags[0] == "--table":                               # a second call reads what is there
        monkeypatch.setattr(evaluate, "evaluate", None)
        figures.main(command)
    assert len(capsys.readouterr().out.splitlines()) > 2
    for name in files:
        path = out / "figures" / name
        if name.endswith("png"):
            assert Image.open(path).getextrema() != ((255, 255),) * 3
        else:
            json.loads(path.read_text())


def test_prefix(out, monkeypatch, capsys):
    """Rows of the table and of the chart; without any ball (above) there is no chart."""
    error = {"center": 0.25, "radius": 0.5, "missing": 0.0}
    monkeypatch.setattr(figures, "ball_errors", lambda frames, position, radius: error)
    figures.main(["--out", str(out), "--clips", "1", "--figure", "prefix"])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[0] for row in rows[2:5]] == ["1", "2", "3"]
    assert all(row[2:] == ["0.250", "0.500", "0.0%"] * 3 for row in rows[2:5])
    picture = Image.open(out / "figures" / "prefix_error.png")
    assert picture.getextrema() != ((255, 255),) * 3


def test_what_is_missing_is_named(out, tmp_path):
    def refused(match, *flags, folder=tmp_path):
        with pytest.raises(UserError, match=match):
            figures.main(["--out", str(folder), *flags])

    refused("python -m experiments.vqgan --out", "--table", "4")
    refused("python ddt.py --out", "--figure", "prefix")
    refused("python vae.py --out .* --preset tiny", "--table", "ablation")
    refused("sft.py|grpo.py|ddt.py", "--figure", "8")
    refused("no model that predicts", "--table", "1")
    for flags in (["--table", "order"], ["--table", "rl"], ["--figure", "3"]):
        refused("make it with `python sft.py", *flags)
    refused("elsewhere is missing", "--others", "elsewhere", "--table", "2", folder=out)
    refused("names a run twice", "--others", f"{out}/", "--table", "2", folder=out)
    for name, table in (("vae", "ablation"), ("sft", "rl")):
        shutil.copytree(out / name, tmp_path / name)
        write_json(tmp_path / name / "trained.json", {"preset": "small", "scenario": "all"})
        refused(f"{name} was trained with --preset small", "--table", table)
    refused("no table 9", "--table", "9", folder=out)


def test_what_means_nothing_is_refused(out, tmp_path):
    """In one line, and no folder is left behind."""
    for flags, culprit in (
            ([], "a table or a figure: choose one of --table 1"),
            (["--table", "1", "--figure", "4"], "a table or a figure"),
            (["--figure", "4", "--others", str(out)], "figure 4 is of one run"),
            (["--table", "1", "--llm", str(out)], "table 1 uses no text model"),
            (["--figure", "4", "--clips", str(10 ** 12)], "--clips")):
        with pytest.raises(UserError, match=culprit):
            figures.main(["--out", str(out), *flags])
    with pytest.raises(UserError, match="typo is missing: make it with"):
        figures.main(["--out", str(tmp_path / "typo"), "--figure", "4"])
    with pytest.raises(UserError, match="ddt is missing"):
        figures.main(["--out", str(tmp_path), "--figure", "prefix"])
    assert not list(tmp_path.iterdir())


def test_tokenizers_of_other_frames_are_refused(out, tmp_path):
    shutil.copytree(out / "ddt", tmp_path / "ddt")
    VQGAN(vqgan.Config(size=32, width=8, levels=4)).save(tmp_path / "vqgan")
    with pytest.raises(UserError, match="uniform, 16 pixels; uniform, 32 pixels"):
        figures.main(["--out", str(tmp_path), "--figure", "7"])


# ------------------------------------------------------------------ tables 1 and 2


def results(**of_splits):
    """What comparisons read of evaluate's results: split -> reward and drift_error per clip."""
    splits = {}
    for split, (scores, drift) in of_splits.items():
        splits[split] = {"each": {"reward": scores, "drift_error": drift}}
    return {"uniform": splits}


def test_clips_are_compared_one_by_one():
    """Two samples of three clips, the last without a frame that counts: their mean, their best."""
    nan = math.nan
    a = results(iid=([1.0, 5.0, nan], [0.7, 0.1, nan]))["uniform"]
    b = results(iid=([2.0, 4.0, nan], [0.9, 0.5, nan]))["uniform"]
    mean = figures.clip_by_clip([a, b], ["iid"], "drift_error")
    torch.testing.assert_close(mean, torch.tensor([0.8, 0.3], dtype=torch.float64))
    best = figures.clip_by_clip([a, b], ["iid"], "drift_error", best=True)
    torch.testing.assert_close(best, torch.tensor([0.9, 0.1], dtype=torch.float64))
    assert figures.clip_by_clip([a, b], ["iid"], "reward", best=True).tolist() == [2.0, 5.0]


def test_standard_errors_are_over_runs_or_clips():
    one, other = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4.0, 4.0])
    assert figures.cell([one]) == "2.000 +- 0.577"                      # 1 / sqrt(3)
    assert figures.cell([one, other]) == "3.000 +- 1.000"               # sqrt(2) / sqrt(2)


def test_comparison_stands_beside_the_paper():
    levels = {level: ([1.0, 2.0], [3.0, 3.0]) for level in sim.levels("uniform")}
    run = results(iid=([4.0, 4.5], [0.25, 0.75]), **levels)
    rows = {"DDT, SFT": [([run], False)], "VQGAN, SFT": []}
    text = figures.comparison(rows, figures.PAPER2)
    uniform, parabola, _ = text.strip().split("\n\n")
    cells = "0.500 +- 0.250    3.000 +- 0.000    4.250 +- 0.250    1.500 +- 0.224"
    assert cells in uniform                                             # ood: 3 levels of 2 clips
    ood = [line.split()[-1] for line in uniform.splitlines() if "paper" in line]
    assert ood == ["0.884", "0.281", "0.763", "0.057"]
    assert "VQGAN, SFT                            0       not run yet" in uniform
    assert "not run yet" in parabola


def test_results_of_another_model_are_forgotten(out, tmp_path):
    (tmp_path / "sft").mkdir()
    weights, path = tmp_path / "sft" / MODEL, tmp_path / "sft.json"
    weights.write_bytes(b"one")
    figures.forget_others(path, tmp_path, "sft")
    path.write_text("{}")
    figures.forget_others(path, tmp_path, "sft")
    assert path.exists()
    weights.write_bytes(b"other")
    figures.forget_others(path, tmp_path, "sft")
    assert not path.exists()


# ------------------------------------------------------------------ what trains models


@pytest.fixture
def few(monkeypatch):
    """SFT and GRPO take a few steps, whatever figures.py asks for; -> what it asked for."""
    asked, sft_main, grpo_main = [], sft.run_stage, grpo.main

    def short_sft(config, tokenizer, world):
        asked.append(config)
        short = dataclasses.replace(config, steps=2, batch=4, eval_clips=2, layers=1)
        return sft_main(short, tokenizer, world)

    def short_grpo(argv):
        asked.append(argv)
        grpo_main("--steps 9 --clips 8 --prompts 2 --group 2 --eval_clips 2".split() + argv)
    monkeypatch.setattr(sft, "run_stage", short_sft)
    monkeypatch.setattr(grpo, "main", short_grpo)
    monkeypatch.setattr(evaluate, "SPLITS", ("iid", "ood", "slow", "fast"))
    for name in ("save_gif", "save_strip"):
        monkeypatch.setattr(pictures, name, lambda *args, **options: None)
    return asked


def write_sft_row(out, drift):
    """A table with a row of SFT: every split has two clips."""
    result = {"each": {"reward": [1.0, 2.0], "drift_error": drift}, "drift_error": sum(drift) / 2,
              "drift_error_se": 0.5}
    table = {"SFT": {"uniform": {split: result for split in evaluate.SPLITS}}}
    write_json(out / "results.json", table)
    return table


def test_order(out, capsys, few):
    def line_of(name):
        lines = capsys.readouterr().out.splitlines()
        return next(line for line in lines if f"uniform, {name}" in line)

    write_sft_row(out, [0.5, 1.5])
    command = ["--out", str(out), "--table", "order"]
    figures.main(command)
    forward = line_of("forward")
    assert forward.split()[:3] == ["uniform,", "forward", "1"]
    assert forward.count("1.000 +- 0.500") == 4
    assert few == [sft.Config(seed=3, clips=12, lr=1e-4, llm="none",
                              out=str(out / "reverse"))]
    tokenizer, reverse = (DDT.load(place / "ddt") for place in (out, out / "reverse"))
    frames = torch.rand(4, 3, 16, 16, generator=seeded(1))
    assert torch.equal(tokenizer.encode(frames), reverse.encode(frames).flip(1))
    model = out / "reverse" / "sft" / MODEL
    before = model.stat().st_mtime_ns
    figures.main(command)                                   # what is done is not done again
    assert line_of("reverse").split()[2] == "1" and model.stat().st_mtime_ns == before
    for name in ("sft", "ddt"):
        assert checksum(out / name / MODEL) != checksum(out / "reverse" / name / MODEL)


def test_a_fork_takes_the_prior_along(out, tmp_path):
    run = shutil.copytree(out, tmp_path / "run", ignore=shutil.ignore_patterns("rl", "clips"))
    assert figures.prior_of(run) == []
    shutil.copytree(run / "sft", run / "llm")
    place = figures.fork(run, tmp_path / "place", *figures.prior_of(run), "vae")
    assert {path.name for path in place.iterdir()} == {"llm", "vae", "results.json"}
    assert checksum(place / "llm" / MODEL) == checksum(run / "llm" / MODEL)


def test_figure_3(out, few, monkeypatch):
    """The run's own model is one of the points; the others are trained."""
    monkeypatch.setattr(figures, "SIZES", {"tiny": (8, 12)})
    table = write_sft_row(out, [0.5, 1.5])
    table["SFT"]["uniform"].pop("ood")                      # sft.py was stopped there
    write_json(out / "results.json", table)
    for flags in (["--figure", "3"], ["--table", "order"]):
        with pytest.raises(UserError, match="no whole row of SFT"):
            figures.main(["--out", str(out), *flags])
    assert few == []
    write_sft_row(out, [0.5, 1.5])
    figures.main(["--out", str(out), "--figure", "3"])
    assert [config.clips for config in few] == [8]
    curves = read_json(out / "figures" / "figure3.json")
    iid, ood = curves["uniform, iid"], curves["uniform, ood"]
    assert len(curves) == 2 and [n for n, _ in iid] == [8, 12] and ood[1][1] == 1.0
    trained = read_json(out / "clips" / "8" / "results.json")
    assert iid[0][1] == trained["SFT"]["uniform"]["iid"]["drift_error"]


def test_rl(out, capsys, few, monkeypatch):
    """Rows start from the run's SFT model, or one of other length; a second call trains nothing."""
    (out / "results.json").unlink(missing_ok=True)
    change = {"horizon": 2, "whole_clip": True, "sft_steps": 1000}
    monkeypatch.setattr(figures, "RL", {"as it is": {"usual": {}}, "more": {"other": change}})
    command = ["--out", str(out), "--table", "rl", "--clips", "1"]
    figures.main(command)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    rows = {words[0]: words for words in lines if words and words[0] in ("usual", "other")}
    assert len(rows["usual"]) == 2 + 3 + 6 * 3              # 3 numbers, 6 with +-
    usual, other = out / "rl" / "usual", out / "rl" / "other"
    assert few[0] == [f"--out={usual}", "--seed=3"]
    assert few[1] == sft.Config(seed=3, clips=12, lr=1e-4, llm="none", steps=1000,
                                out=str(other))
    assert few[2] == ["--horizon=2", "--whole_clip", f"--out={other}", "--seed=3"]
    config = read_json(other / "grpo" / "trained.json")
    assert (config["horizon"], config["whole_clip"], config["seed"]) == (2, True, 3)

    log = figures.read_log(other / "grpo")                  # 9 steps: 5 means over 5
    means = [sum(line["reward"] for line in log[i:i + 5]) / 5 for i in range(5)]
    assert rows["other"][2] == f"{sum(means) / 5:.3f}"
    table = read_json(other / "results.json")
    before, after = (torch.tensor(table[row]["uniform"]["slow"]["each"]["drift_error"])
                     for row in ("SFT", "SFT + RL"))
    assert " ".join(rows["other"][14:17]) == figures.cell([after - before])
    own, same, longer = (checksum(place / "sft" / MODEL) for place in (out, usual, other))
    assert own == same != longer
    with Image.open(out / "figures" / "rl_more_velocity.png") as picture:
        assert picture.getextrema() != ((255, 255),) * 3

    files = list((out / "rl").rglob(MODEL))
    times = [path.stat().st_mtime_ns for path in files]
    figures.main(command)
    assert [path.stat().st_mtime_ns for path in files] == times
    shutil.copy(other / "sft" / MODEL, usual / "sft" / MODEL)
    with pytest.raises(UserError, match="made from another sft"):
        figures.main(command)


def test_a_fork_is_whole_or_not_there(out, tmp_path, monkeypatch):
    real, place = shutil.copytree, tmp_path / "copy"

    def broken(source, target, **options):
        return real(source, target, **options) if source.name == "vae" else 1 / 0
    monkeypatch.setattr(shutil, "copytree", broken)
    with pytest.raises(ZeroDivisionError):
        figures.fork(out, place, "vae", "ddt")
    assert not place.exists()
    monkeypatch.undo()
    figures.fork(out, place, "vae", "ddt")
    assert {path.name for path in place.iterdir()} == {"vae", "ddt", "results.json"}


def test_ablation(out, capsys, monkeypatch):
    """Rows at equal FLOPs, mean and standard error over seeds; what is done is not done again."""
    base = small_ddt(clips=4, batch=4, steps=6)
    own = vae.Config(width=8, levels=2, latent=3, steps=2, warmup=1, batch=4)
    monkeypatch.setattr(figures, "BASE", base)
    monkeypatch.setattr(figures, "SEEDS", (0, 1))
    monkeypatch.setattr(figures, "ABLATION", {"deep": {"layers": 9}})
    monkeypatch.setattr(figures, "speed_probe", lambda model, scenario, n: model.config.seed + 0.5)
    monkeypatch.setattr(evaluate, "SPLITS", ("iid",))
    command = ["--out", str(out), "--clips", "1", "--table", "ablation"]
    figures.main(command)
    row = capsys.readouterr().out.split("\ndeep ")[1].splitlines()[0].split()
    deep = dataclasses.replace(base, layers=9)
    fewer = round(6 * figures.flops(base) / figures.flops(deep))
    assert int(row[0]) == fewer and 1 < fewer < 5
    assert " ".join(row[-3:]) == "1.000 +- 0.500"           # of 0.5 and 1.5

    real = figures.train_tokenizer
    monkeypatch.setattr(figures, "train_tokenizer", None)
    figures.main(command)
    figures.main(command + ["--clips", "2"])                # measured again, not trained again
    monkeypatch.setattr(figures, "ABLATION", {"deep": {"lr": 1e-3}, "own": {"vae": own}})
    with pytest.raises(TypeError):
        figures.main(command)
    monkeypatch.setattr(figures, "train_tokenizer", real)   # another row of this name: trained anew
    figures.main(command)
    assert DDT.load(out / "ablation" / "deep-0" / "ddt").config.lr == 1e-3

    places = (out, out / "ablation" / "deep-0", out / "ablation" / "own-0")
    shared, same, other = (VAE.load(place / "vae").state_dict() for place in places)
    assert all(torch.equal(same[name], x) for name, x in shared.items())
    assert not torch.equal(other["encoder.conv_in.weight"], shared["encoder.conv_in.weight"])


# ------------------------------------------------------------------ what tokens encode


class Stub:
    """A tokenizer of which each token is a rounded coordinate, or nothing."""

    def __init__(self, blind: bool):
        self.config, self.blind = ddt.Config(size=32, queries=1), blind

    def encode(self, frames):
        center = reward.detect(frames[:, None], 1)[0][:, 0, 0, :1]              # (B, 1), x
        if self.blind:
            return torch.zeros_like(center).long()
        return (center.clamp(0, 5) * 51).long()


def test_speed_probe():
    """
    Tokens that encode the position to 0.02 units give the speed to about 0.1; a constant leaves
    the spread of speeds.
    """
    truth = sim.first_frames("uniform", "pretrain", 50, evaluate.EVAL_SEED).velocity
    spread = (truth - truth.mean()).abs().mean().item()
    blind = figures.speed_probe(Stub(blind=True), "uniform", 400, steps=60)
    assert blind == pytest.approx(spread, rel=0.15)
    assert figures.speed_probe(Stub(blind=False), "uniform", 1500, steps=200) < 0.5 * spread


@pytest.mark.parametrize("shift, kept, near", [(0, "100.0%", "0.0%"), (1, "0.0%", "100.0%"),
                                               (3, "0.0%", "0.0%")])
def test_codes_that_come_back(shift, kept, near):
    """
    One token, the ball's x in steps of 0.04 units on a ring of 256 codes, decoded to a ball that
    is `shift` steps off.
    """
    angle = torch.arange(256) * 2 * math.pi / 256
    model = Stub(blind=False)
    codebook = torch.stack([angle.cos(), angle.sin()], 1)
    model.quantizer = SimpleNamespace(codebook=codebook)

    def encode(frames):
        x = reward.detect(frames[:, None], 1)[0][:, 0, 0, :1]
        return (x * 25).round().long().clamp(0, 255)

    def decode(codes, generator):
        position = torch.stack([(codes + shift) / 25, torch.full(codes.shape, 5.0)], -1)
        return sim.render(position[:, None], torch.full(codes.shape, 0.6), 32)[:, 0]
    model.encode, model.decode = encode, decode
    text = figures.what_tokens_encode(model, "uniform", "stub", figures.Config(clips=1))
    assert f"keeps {kept} of the codes" in text and f"makes of {near} one of" in text


def test_token_information():
    """A code that is the attribute explains all of it; a coin's toss is one bit, explains none."""
    x = torch.arange(8.0).repeat(50)
    coin = torch.randint(2, (400,), generator=seeded())
    codes = torch.stack([x.long(), coin, torch.zeros(400).long()], 1)
    one, other, constant = figures.token_information(codes, x[:, None])
    assert one["codes"] == 8 and one["bits"] == pytest.approx(3)
    assert one["perplexity"] == pytest.approx(8) and one["explained"] == pytest.approx([1])
    assert other["codes"] == 2 and other["bits"] == pytest.approx(1, abs=0.01)
    assert abs(other["explained"][0]) < 0.02
    assert constant == {"codes": 1, "perplexity": 1, "bits": 0,
                        "explained": [pytest.approx(0, abs=1e-6)]}


def test_ball_errors():
    frames, position, radius = figures.still_frames(6, "collision", "iid", 64)
    assert frames.shape == (6, 3, 64, 64) and position.shape == (6, 2, 2)
    right = figures.ball_errors(frames, position, radius)
    assert right["center"] < 0.01 and right["radius"] < 0.01 and right["missing"] == 0
    wrong = figures.ball_errors(frames, position + torch.tensor([0.3, 0.4]), radius - 0.2)
    assert wrong["center"] == pytest.approx(0.5, abs=0.01)
    assert wrong["radius"] == pytest.approx(0.2, abs=0.01)
    white = figures.ball_errors(torch.ones_like(frames), position, radius)
    assert white["missing"] == 1 and math.isnan(white["center"])


def test_similarity():
    a = torch.randn(3, 4, 5, generator=seeded())
    torch.testing.assert_close(figures.similarity(a, 3 * a), torch.ones(3))
    torch.testing.assert_close(figures.similarity(a, -a), -torch.ones(3))
