"""
The scripts as a user runs them, with a few steps each: alone, killed and continued, on two ranks, and with bad input.

    pytest tests/test_pipeline.py
"""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import baselines
import ddt
import grpo
import reward
import sft
import sim
import train
from lm import Llama
from train import Problem

ROOT = Path(__file__).parent.parent
DDT = ["--vae_steps", "4", "--vae_batch", "8", "--steps", "8", "--batch", "8", "--clips", "16",
       "--save_every", "2", "--eval_clips", "2"]
SFT = ["--steps", "4", "--batch", "4", "--clips", "16", "--eval_clips", "2", "--save_every", "1"]
GRPO = ["--steps", "2", "--prompts", "3", "--group", "2", "--clips", "8", "--eval_clips", "2", "--save_every", "1"]
ENV = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def run(script: str, *args: str, ranks: int = 0) -> subprocess.CompletedProcess:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks else [sys.executable]
    return subprocess.run([*launch, str(ROOT / script), *map(str, args)], capture_output=True, text=True, env=ENV, timeout=240)


def complaint(capsys, main, *args) -> str:
    """What a script says before it ends with code 2."""
    capsys.readouterr()                                                           # of what ran before
    with pytest.raises(SystemExit) as end:
        train.cli(lambda: main([str(x) for x in args]))
    assert end.value.code == 2
    said = capsys.readouterr().err.strip()
    assert "Traceback" not in said
    return said


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(next(folder.glob("*.safetensors")))


def same(a: dict, b: dict, tolerance: float = 0) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name].double() - b[name].double()).abs().max() <= tolerance, name


def steps(log: Path) -> list[int]:
    return [json.loads(line)["step"] for line in log.read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run folder with every stage done in a few steps, each by its own command."""
    out = tmp_path_factory.mktemp("run")
    for script, args in (("ddt.py", DDT), ("sft.py", SFT), ("grpo.py", GRPO)):
        result = run(script, "--out", out, *args)
        assert result.returncode == 0, result.stderr
        (out / f"{script}.txt").write_text(result.stdout)
    return out


def test_every_stage_leaves_a_model_a_log_and_no_checkpoint(finished):
    for stage, n in (("vae", 4), ("ddt", 8), ("sft", 4), ("grpo", 2)):
        assert steps(finished / stage / "log.jsonl") == list(range(n))
        assert (finished / stage / "config.json").exists() and weights(finished / stage)
        assert not list((finished / stage).glob("checkpoint-*"))
    assert not list(finished.rglob("*.part"))


def test_the_table_has_every_row_and_split(finished):
    results = json.loads((finished / "results.json").read_text())
    assert list(results) == ["ground truth", "VAE", "DDT", "SFT", "SFT + RL"]
    for row, result in results.items():
        assert {"iid", "ood", "slow", "fast", "small", "large"} <= set(result["uniform"])
        assert row in (finished / "grpo.py.txt").read_text()
    assert results["ground truth"]["uniform"]["iid"]["drift_error"] < 0.01


def test_pictures_are_there(finished):
    with Image.open(finished / "clips.gif") as gif:
        assert gif.n_frames > 3                                                   # equal pictures are merged
    for name in ("clips.png", "ddt/reconstruction.png"):
        with Image.open(finished / name) as picture:
            assert picture.width > 200 and picture.height > 100


def test_health_is_logged(finished):
    line = json.loads((finished / "grpo" / "log.jsonl").read_text().splitlines()[0])
    assert {"reward", "reward_std", "rewards/velocity/mean", "rewards/mass/mean", "frac_reward_zero_std", "kl", "entropy",
            "clip_ratio/region_mean", "grad_norm", "learning_rate", "step_time"} <= set(line)
    assert abs(line["kl"]) < 1e-5 and line["clip_ratio/region_mean"] == 0          # before the first update nothing has moved
    assert abs(line["reward"] - line["rewards/velocity/mean"] - line["rewards/mass/mean"]) < 1e-3


def test_a_finished_run_is_not_done_again(finished):
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*.safetensors")}
    result = run("grpo.py", "--out", finished, *GRPO)
    assert result.returncode == 0 and "is missing" not in result.stdout and "is trained" in result.stdout
    assert {p: p.stat().st_mtime_ns for p in finished.rglob("*.safetensors")} == before


def test_a_run_killed_while_it_evaluated_gets_its_whole_table(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "results.json").unlink()
    (tmp_path / "run" / "ddt" / "reconstruction.png").unlink()
    result = run("grpo.py", "--out", tmp_path / "run", *GRPO)
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "run" / "results.json").read_text()) == json.loads((finished / "results.json").read_text())
    assert (tmp_path / "run" / "ddt" / "reconstruction.png").exists()


def test_sft_starts_from_given_weights(finished, tmp_path, capsys, monkeypatch):
    """--llm: loaded, extended by 256 codes, trained, saved; the text part is still there."""
    llm = shutil.copytree(ROOT / "tests" / "fixtures" / "llama31", tmp_path / "llm")
    for stage in ("vae", "ddt"):
        shutil.copytree(finished / stage, tmp_path / "run" / stage)
    args = ["--out", tmp_path / "run", "--llm", llm, *SFT]
    config = json.loads((llm / "config.json").read_text())
    context = lambda n: (llm / "config.json").write_text(json.dumps(config | {"max_position_embeddings": n}))
    context(128)
    short = complaint(capsys, sft.main, *args)
    assert "129 tokens, this model's context 128" in short and "\n" not in short
    context(129)
    monkeypatch.setattr(sim, "SHOWN", ("iid",))                                   # one split to evaluate, for time
    sft.main([str(x) for x in args])
    model = Llama.load(tmp_path / "run" / "sft")
    assert model.config.vocab_size == 320 + 256 and model.config.n_visual == 256
    before = Llama.load(llm, n_visual=256).head.detach()
    moved = (model.head.detach() - before).abs().amax(1) > 0
    assert moved[320:].all()                                     # every code is in the softmax
    (llm / "config.json").unlink()
    missing = complaint(capsys, sft.main, *args, "--fresh")
    assert "config.json" in missing and "\n" not in missing


def test_a_vae_of_diffusers(tmp_path, monkeypatch, capsys):
    sd1, sd3 = (ROOT / "tests" / "fixtures" / name for name in ("vae-sd1", "vae-sd3"))
    monkeypatch.setattr(sim, "SHOWN", ("iid",))
    ddt.main(["--out", str(tmp_path), *DDT, "--vae", str(sd3)])
    assert "step 4: quantization starts, but" in capsys.readouterr().out           # in 4 steps nothing is learnt
    assert not (tmp_path / "vae" / "log.jsonl").exists()                          # not trained
    same(weights(tmp_path / "vae"), load_file(sd3 / "diffusion_pytorch_model.safetensors"))
    assert load_file(tmp_path / "ddt" / "model.safetensors")["decoder.latent_out.weight"].shape[0] == 16 * 2 * 2
    with pytest.raises(Problem, match="holds another VAE"):
        ddt.main(["--out", str(tmp_path), *DDT, "--vae", str(sd1)])
    with pytest.raises(Problem, match="nowhere"):
        ddt.main(["--out", str(tmp_path / "new"), *DDT, "--vae", str(tmp_path / "nowhere")])

    def row(name):
        return json.loads((tmp_path / "results.json").read_text())[name]["uniform"]["iid"]
    before = weights(tmp_path / "ddt"), row("VAE")
    with pytest.raises(Problem, match="nowhere"):
        ddt.main(["--out", str(tmp_path), *DDT, "--fresh", "--vae", str(tmp_path / "nowhere")])
    same(weights(tmp_path / "ddt"), before[0])                                    # a slip of the pen deletes nothing
    ddt.main(["--out", str(tmp_path), *DDT, "--fresh", "--vae", str(tmp_path / "vae")])
    same(weights(tmp_path / "vae"), load_file(sd3 / "diffusion_pytorch_model.safetensors"))
    same(weights(tmp_path / "ddt"), before[0])
    assert row("VAE") == before[1]
    ddt.main(["--out", str(tmp_path), *DDT, "--fresh", "--vae", str(sd1)])
    same(weights(tmp_path / "vae"), load_file(sd1 / "diffusion_pytorch_model.safetensors"))
    assert row("VAE") != before[1]


def test_a_vae_of_other_flags(finished, tmp_path):
    """A VAE that is there already must be the one that is asked for, or be named."""
    shutil.copytree(finished / "vae", tmp_path / "vae")
    for flags, culprit in ((["--vae_steps", "5"], "vae_steps was 4, is 5"), (["--seed", "3"], "seed was 0, is 3"),
                           (["--scenario", "collision"], "scenario was uniform, is collision")):
        with pytest.raises(Problem, match=culprit):
            ddt.main(["--out", str(tmp_path), *DDT, *flags])
    ddt.main(["--out", str(tmp_path), *DDT, "--seed", "3", "--vae", str(tmp_path / "vae")])
    same(weights(tmp_path / "vae"), weights(finished / "vae"))


def test_another_tokenizer(tmp_path, monkeypatch):
    """The stages run on VQGAN's tokens as on DDT's, and its file is what they are made of."""
    vqgan = ["vqgan", "--steps", "4", "--batch", "8", "--clips", "16", "--save_every", "2", "--eval_clips", "2"]
    monkeypatch.setattr(sim, "SHOWN", ("iid",))                                   # one split to evaluate, for time
    baselines.main([*vqgan, "--out", str(tmp_path)])
    for stage, args in ((sft, SFT), (grpo, GRPO)):
        stage.main([*args, "--out", str(tmp_path), "--tokenizer", "vqgan"])
    assert json.loads((tmp_path / "sft" / "made_of.json").read_text()).keys() == {"vqgan"}
    assert json.loads((tmp_path / "grpo" / "made_of.json").read_text()).keys() == {"vqgan", "sft"}
    assert np.load(tmp_path / "sft" / "tokens" / "uniform-00000.npy").shape == (16, 32, 16)
    assert not (tmp_path / "ddt").exists()
    rows = json.loads((tmp_path / "results.json").read_text())
    assert rows.keys() == {"VQGAN", "SFT", "SFT + RL"}
    with pytest.raises(Problem, match="choose ddt or vqgan"):
        sft.main([*SFT, "--out", str(tmp_path), "--tokenizer", "words"])


def test_ctrl_c_is_one_line(finished, tmp_path):
    for name in ("vae", "ddt"):
        shutil.copytree(finished / name, tmp_path / name)
    process = subprocess.Popen([sys.executable, ROOT / "sft.py", "--out", tmp_path, *SFT, "--steps", "1000"], env=ENV,
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not train.checkpoints(tmp_path / "sft") and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "Traceback" not in error and "goes on from the last checkpoint" in error


def test_torchrun_on_two_ranks(finished, tmp_path):
    """3 prompts on 2 ranks: the weights of one rank. (How ranks share a batch, for every stage: test_scale.py.)"""
    for name in ("vae", "ddt", "sft"):
        shutil.copytree(finished / name, tmp_path / name)
    result = run("grpo.py", "--out", tmp_path, *GRPO, ranks=2)
    assert result.returncode == 0, result.stderr
    assert steps(tmp_path / "grpo" / "log.jsonl") == [0, 1]
    same(weights(tmp_path / "grpo"), weights(finished / "grpo"), 1e-6)


@pytest.mark.parametrize("script, args, culprit", [
    (ddt, ["--preset", "huge"], "huge"),
    (ddt, ["--batchsize", "4"], "--batch"),
    (sft, ["--lr", "fast"], "--lr"),
    (grpo, ["--steps", "-1"], "--steps"),
    (grpo, ["--steps", "0"], "--steps"),
    (grpo, ["--group", "1"], "--group"),
    (grpo, ["--scenario", "pendulum"], "pendulum"),
    (ddt, ["--scenario", "pendulum"], "pendulum"),
    (ddt, ["--shift", "0"], "--shift 0"), (ddt, ["--width", "36", "--heads", "6"], "--query_width 128"),
    (ddt, ["--width", "36", "--query_width", "36", "--heads", "6"], "4 times --heads 6"),
    (ddt, ["--size", "30"], "--size"),
    (ddt, ["--prefix", "some"], "--prefix"),
    (sim, ["--split", "nope"], "nope"),
    (reward, ["--n", "0"], "n = 0"),
], ids=lambda x: getattr(x, "__name__", None))
def test_bad_flags_get_one_line(tmp_path, capsys, script, args, culprit):
    out = [] if script in (sim, reward) else ["--out", tmp_path]
    assert culprit in complaint(capsys, script.main, *out, *args).splitlines()[-1]
    assert not list(tmp_path.rglob("*.safetensors"))


def test_bad_folders_get_one_line(finished, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    cases = {"unwritable": (["--out", tmp_path / "file" / "run"], "cannot write")}
    for stage in ("vae", "ddt"):
        shutil.copytree(finished / stage, tmp_path / "changed" / stage)
    process = subprocess.Popen([sys.executable, ROOT / "sft.py", "--out", tmp_path / "changed", *SFT], env=ENV,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not train.checkpoints(tmp_path / "changed" / "sft"):
        time.sleep(0.01)
    process.kill()
    process.wait()
    shutil.copytree(tmp_path / "changed", tmp_path / "truncated")
    for checkpoint in train.checkpoints(tmp_path / "truncated" / "sft"):
        os.truncate(checkpoint / "model.safetensors", 1000)
    cases["truncated"] = (["--out", tmp_path / "truncated"], "model.safetensors is not what was written")
    cases["changed"] = (["--out", tmp_path / "changed", "--lr", "0.5"], "lr was")
    for name, (args, culprit) in cases.items():
        assert culprit in complaint(capsys, sft.main, *SFT, *args), name
