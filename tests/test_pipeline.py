"""
The stages as a user runs them, with a few steps each: one after the other, from nothing, stopped,
on two ranks, and with bad input. main() is called in this process, except where a signal or
torchrun is what counts.

    pytest tests/test_pipeline.py
"""
import contextlib
import io
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

import checkpoint
import ddt
import evaluate
import grpo
import prior
import reward
import sft
import sim
import train
import vae
from checkpoint import UserError, checkpoints
from experiments import vqgan
from lm import Llama

ROOT = Path(__file__).parent.parent
FLAGS = {
    "llm": dict(steps=6, batch=4, length=16, save_every=2),
    "vae": dict(width=8, steps=4, batch=8, clips=16, eval_clips=2),
    "ddt": dict(steps=8, batch=8, clips=16, save_every=2, eval_clips=2),
    "sft": dict(llm="prior", steps=4, batch=4, clips=16, save_every=1, eval_clips=2),
    "grpo": dict(steps=2, prompts=3, group=2, clips=8, save_every=1, eval_clips=2),
    "vqgan": dict(size=24, width=8, steps=4, batch=8, clips=16, eval_clips=2)}
MAINS = {"llm": prior.main, "vae": vae.main, "ddt": ddt.main, "sft": sft.main,
         "grpo": grpo.main, "vqgan": vqgan.main}
ENV = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def argv(stage: str, out: Path, *more) -> list[str]:
    flags = [f"--{name}={value}" for name, value in FLAGS[stage].items()]
    return ["--out", str(out), *flags, *map(str, more)]


def run(stage: str, out: Path, *more) -> str:
    """A stage's command, in this process -> what it prints."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        MAINS[stage](argv(stage, out, *more))
    return printed.getvalue()


def complaint(capsys, main, *args) -> str:
    """What a script prints before it ends with code 2."""
    capsys.readouterr()                                     # of what ran before
    with pytest.raises(SystemExit) as end:
        train.cli(lambda: main([str(x) for x in args]))
    assert end.value.code == 2
    error = capsys.readouterr().err.strip()
    assert "Traceback" not in error
    return error


def copy(finished: Path, out: Path, *stages: str) -> Path:
    for stage in stages:
        shutil.copytree(finished / stage, out / stage)
    return out


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(next(folder.glob("*.safetensors")))


def same(a: dict, b: dict, tolerance: float = 0) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name].double() - b[name].double()).abs().max() <= tolerance, name


def log_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def results(out: Path) -> dict:
    return json.loads((out / "results.json").read_text())


@pytest.fixture(autouse=True)
def short_prior(monkeypatch):
    """Where sft.py trains a missing prior, that takes a second."""
    monkeypatch.setitem(prior.PRESETS, "tiny", FLAGS["llm"])


@pytest.fixture
def one_split(monkeypatch):
    """Tables of the iid split only, and few clips for the tokenizer's centre error."""
    monkeypatch.setattr(ddt.center_error, "__defaults__", (2,))
    defaults = evaluate.add_rows.__defaults__
    few = tuple(("iid",) if x == evaluate.SPLITS else x for x in defaults)
    monkeypatch.setattr(evaluate.add_rows, "__defaults__", few)
    monkeypatch.setattr(evaluate, "SPLITS", ("iid",))


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run folder with every stage done in a few steps, each by its own command."""
    out = tmp_path_factory.mktemp("run")
    for stage in ("llm", "vae", "ddt", "sft", "grpo"):
        (out / f"{stage}.txt").write_text(run(stage, out))
    return out


# ------------------------------------------------------------------ a finished run


def test_every_stage_leaves_a_model_a_log_and_no_checkpoint(finished):
    for stage, n in (("llm", 6), ("vae", 4), ("ddt", 8), ("sft", 4), ("grpo", 2)):
        assert [line["step"] for line in log_of(finished / stage)] == list(range(n))
        assert (finished / stage / "config.json").exists() and weights(finished / stage)
        assert not checkpoints(finished / stage)
    assert not list(finished.rglob("*.part"))


def test_the_table_has_every_row_and_split(finished):
    table, printed = results(finished), (finished / "grpo.txt").read_text()
    assert list(table) == ["ground truth", "VAE", "DDT", "SFT", "SFT + RL"]
    for row, result in table.items():
        assert {"iid", "ood", "slow", "fast", "small", "large"} <= set(result["uniform"])
        assert row in printed
    assert table["ground truth"]["uniform"]["iid"]["drift_error"] < 0.01
    assert "posttrain" in table["SFT + RL"]["uniform"]
    assert "SFT + RL minus SFT" in printed and "clips.gif" in printed.splitlines()[-1]


def test_pictures_are_there(finished):
    with Image.open(finished / "clips.gif") as gif:
        assert gif.n_frames > 3                             # equal pictures are merged
    for name in ("clips.png", "ddt/reconstruction.png"):
        with Image.open(finished / name) as picture:
            assert picture.width > 200 and picture.height > 100


def test_health_is_logged(finished):
    line = log_of(finished / "grpo")[0]
    assert {"reward", "reward_std", "rewards/velocity/mean", "rewards/mass/mean", "kl", "entropy",
            "frac_reward_zero_std", "kl_pretrain", "kl_numbers", "clip_ratio/region_mean", "loss",
            "grad_norm", "learning_rate", "step_time"} <= set(line)
    # before the first update nothing has moved
    assert abs(line["kl"]) < 1e-5 and line["clip_ratio/region_mean"] == 0
    sum_of_parts = line["rewards/velocity/mean"] + line["rewards/mass/mean"]
    assert abs(line["reward"] - sum_of_parts) < 1e-3


def random_reward(frames, clips, horizon):
    ahead = torch.rand(frames.shape[:2])                    # (B, F)
    return {"reward": ahead.mean(1), "velocity": ahead.mean(1), "mass": ahead[:, 0], "ahead": ahead}


@pytest.mark.parametrize("whole_clip", [False, True])
def test_the_logged_loss_is_that_of_the_formula(finished, tmp_path, monkeypatch, whole_clip):
    """
    At ratio 1 it is -mean(A) + beta KL, and with their betas the KL on SFT's range and on number
    sequences. Advantages of whole clips have mean 0 in each group.
    """
    copy(finished, tmp_path, "vae", "ddt", "sft")
    monkeypatch.setattr(reward, "reward", random_reward)
    mean_advantages, rollout = [], grpo.rollout

    def recorded(*args):
        result = rollout(*args)
        mean_advantages.append(result[0].advantage.mean().item())
        return result
    monkeypatch.setattr(grpo, "rollout", recorded)
    config = grpo.Config(out=str(tmp_path), steps=4, prompts=3, group=4, clips=8, micro_batch=5,
                         lr=1e-2, warmup=1, whole_clip=whole_clip)
    world = train.World(0, 1, torch.device("cpu"))
    reference = sft.load(tmp_path / "sft").requires_grad_(False)
    grpo.train_grpo(config, ddt.DDT.load(tmp_path / "ddt"), reference, world)

    lines = log_of(tmp_path / "grpo")
    assert len(lines) == len(mean_advantages) == 4
    for line, A in zip(lines, mean_advantages):
        assert not whole_clip or abs(A) < 1e-6
        divergence = config.beta * line["kl"] + config.beta_pretrain * line["kl_pretrain"]
        divergence += config.beta_numbers * line["kl_numbers"]
        assert line["loss"] == pytest.approx(-A + divergence, rel=1e-4, abs=1e-6)
        assert line["clip_ratio/region_mean"] == 0
    for name in ("kl", "kl_pretrain", "kl_numbers"):
        assert lines[0][name] < 1e-6 and lines[-1][name] > 1e-3, name


def test_a_finished_run_is_not_done_again(finished):
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*.safetensors")}
    printed = run("grpo", finished)
    assert "is missing" not in printed and "is trained" in printed
    assert {p: p.stat().st_mtime_ns for p in finished.rglob("*.safetensors")} == before


def test_a_run_killed_while_it_evaluated_gets_its_whole_table(finished, tmp_path):
    out = shutil.copytree(finished, tmp_path / "run")
    (out / "results.json").unlink()
    (out / "ddt" / "reconstruction.png").unlink()
    run("grpo", out)
    assert results(out) == results(finished)
    assert (out / "ddt" / "reconstruction.png").exists()


def test_from_nothing(finished, tmp_path, monkeypatch, one_split):
    """grpo.py alone trains all stages, each as its own command does with its preset's flags."""
    for stage in (vae, ddt, sft):
        monkeypatch.setitem(stage.PRESETS, "tiny", FLAGS[stage.__name__])
    printed = run("grpo", tmp_path)
    for stage in ("llm", "vae", "ddt", "sft", "grpo"):
        same(weights(tmp_path / stage), weights(finished / stage))
        assert stage == "grpo" or f"{tmp_path / stage} is missing: training it first" in printed


# ------------------------------------------------------------------ other ways through the stages


def test_sft_starts_from_given_weights(finished, tmp_path, capsys, one_split):
    """--llm: loaded, extended by 256 codes, trained, saved; the text part is still there."""
    llm = shutil.copytree(ROOT / "tests" / "fixtures" / "llama31", tmp_path / "llm")
    out = copy(finished, tmp_path / "run", "vae", "ddt")
    args = argv("sft", out, "--llm", llm)
    config = json.loads((llm / "config.json").read_text())

    def set_context(n):
        text = json.dumps(config | {"max_position_embeddings": n})
        (llm / "config.json").write_text(text)
    set_context(96)
    short = complaint(capsys, sft.main, *args)
    assert "97 tokens, this model's context 96" in short and "\n" not in short
    set_context(97)
    sft.main(args)
    model = Llama.load(out / "sft")
    assert model.config.vocab_size == 320 + 256 and model.config.n_visual == 256
    before = Llama.load(llm, n_visual=256).head.detach()
    moved = (model.head.detach() - before).abs().amax(1) > 0
    assert moved[320:].all()                                # every code is in the softmax
    (llm / "config.json").unlink()
    missing = complaint(capsys, sft.main, *args, "--fresh")
    assert "config.json" in missing and "\n" not in missing


def test_a_vae_of_diffusers(tmp_path, capsys, one_split):
    """--vae: copied into the run folder; another one is refused and deletes nothing."""
    sd1, sd3 = (ROOT / "tests" / "fixtures" / name for name in ("vae-sd1", "vae-sd3"))
    file = "diffusion_pytorch_model.safetensors"

    def stage(out, source, *more):
        ddt.main(argv("ddt", out, "--vae", source, *more))

    def row(name):
        return results(tmp_path)[name]["uniform"]["iid"]
    stage(tmp_path, sd3)
    assert "step 4: quantization starts, but" in capsys.readouterr().out    # it has learnt nothing
    assert not (tmp_path / "vae" / "log.jsonl").exists()    # not trained
    same(weights(tmp_path / "vae"), load_file(sd3 / file))
    before, of_sd3 = weights(tmp_path / "ddt"), row("VAE")
    assert before["decoder.latent_out.weight"].shape[0] == 16 * 2 * 2

    nowhere = tmp_path / "nowhere"
    for out, source, more, culprit in (
            (tmp_path, sd1, (), "holds another VAE"),
            (tmp_path, sd1, ("--fresh",), "holds another VAE"),
            (tmp_path, nowhere, ("--fresh",), "nowhere"),
            (tmp_path / "new", nowhere, (), "nowhere")):
        with pytest.raises(UserError, match=culprit):
            stage(out, source, *more)
    same(weights(tmp_path / "vae"), load_file(sd3 / file))
    same(weights(tmp_path / "ddt"), before)

    stage(tmp_path, tmp_path / "vae", "--fresh")            # the run folder's own
    same(weights(tmp_path / "vae"), load_file(sd3 / file))
    same(weights(tmp_path / "ddt"), before)
    assert row("VAE") == of_sd3

    shutil.rmtree(tmp_path / "vae")
    with pytest.raises(UserError, match="was trained from another vae"):
        stage(tmp_path, sd1)
    stage(tmp_path, sd1, "--fresh")
    same(weights(tmp_path / "vae"), load_file(sd1 / file))
    assert row("VAE") != of_sd3


def test_a_vae_of_other_flags(finished, tmp_path, one_split):
    """vae.py refuses other flags. Later stages take the VAE that is there, if it fits."""
    copy(finished, tmp_path, "vae")
    for flags, culprit in ((["--steps", "5"], "steps was 4, is 5"),
                           (["--seed", "3"], "seed was 0, is 3"),
                           (["--scenario", "collision"], "scenario was uniform, is collision")):
        with pytest.raises(UserError, match=culprit):
            run("vae", tmp_path, *flags)
    for flags, culprit in ((["--scenario", "collision"], "asks for collision, 32 pixels"),
                           (["--size", "16"], "asks for uniform, 16 pixels")):
        with pytest.raises(UserError, match=culprit):
            run("ddt", tmp_path, *flags)
    run("ddt", tmp_path, "--seed", "3")
    same(weights(tmp_path / "vae"), weights(finished / "vae"))


def test_later_stages_refuse_what_was_trained_again(finished, tmp_path, one_split):
    """--fresh deletes one stage's model. Those after it name the command that mends them."""
    copy(finished, tmp_path, "vae", "ddt", "sft", "grpo")
    run("ddt", tmp_path, "--fresh", "--seed", "1")
    same(weights(tmp_path / "vae"), weights(finished / "vae"))
    for stage, broken in (("sft", "sft"), ("grpo", "sft")):
        with pytest.raises(UserError, match="was trained from another ddt") as error:
            run(stage, tmp_path)
        assert f"python {broken}.py --fresh --out {tmp_path}" in str(error.value)
    run("sft", tmp_path, "--fresh")
    with pytest.raises(UserError, match="grpo was trained from another (ddt|sft)"):
        run("grpo", tmp_path)
    run("grpo", tmp_path, "--fresh")
    run("llm", tmp_path, "--fresh", "--seed", "1")
    for stage in ("sft", "grpo"):
        with pytest.raises(UserError, match="sft was trained from another llm"):
            run(stage, tmp_path)
    shutil.rmtree(tmp_path / "llm")                         # not needed any more, and not missed
    run("grpo", tmp_path)
    assert not (tmp_path / "llm").exists()


def test_from_random_weights(finished, tmp_path, monkeypatch, one_split):
    """--llm none: no prior, no number sequences in SFT, no KL on them in RL."""
    copy(finished, tmp_path, "vae", "ddt")

    def no_numbers(n, *_, **__):
        assert n == 0
        return torch.zeros(0, 32, 3, dtype=torch.int64)
    monkeypatch.setattr(sft, "number_sequences", no_numbers)
    monkeypatch.setattr(grpo, "number_sequences", None)
    run("sft", tmp_path, "--llm", "none", "--hidden", "64")
    run("grpo", tmp_path)
    assert not (tmp_path / "llm").exists()
    model = Llama.load(tmp_path / "grpo")
    assert model.config.vocab_size == 257 and model.config.hidden_size == 64
    assert all(line["kl_numbers"] == 0 for line in log_of(tmp_path / "grpo"))
    with pytest.raises(UserError, match="--hidden 64: the model of --llm prior has its own size"):
        run("sft", tmp_path / "new", "--hidden", "64")
    monkeypatch.chdir(tmp_path)                             # `none` is no path
    assert "is trained" in run("sft", tmp_path, "--llm", "none", "--hidden", "64")


def test_another_tokenizer(tmp_path, one_split):
    """The stages run on VQGAN's tokens as on DDT's, and note its file as what they started from."""
    run("vqgan", tmp_path)
    for stage in ("sft", "grpo"):
        run(stage, tmp_path, "--tokenizer", "vqgan")
    for stage, sources in (("sft", {"vqgan", "llm"}), ("grpo", {"vqgan", "sft"})):
        note = json.loads((tmp_path / stage / "provenance.json").read_text())
        assert note.keys() == sources | {"files"}
    assert np.load(tmp_path / "sft" / "codes.npy").shape == (16, 32, 9)
    assert not (tmp_path / "ddt").exists()
    assert results(tmp_path).keys() == {"VQGAN", "SFT", "SFT + RL"}
    with pytest.raises(UserError, match="choose ddt or vqgan"):
        run("sft", tmp_path, "--tokenizer", "words")


# ------------------------------------------------------------------ nothing finished is lost


def content(folder: Path) -> dict[str, bytes]:
    """Path -> bytes of the files of a run folder, without the lock."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*")
            if path.is_file() and path.name != ".lock"}


def test_fresh_that_cannot_train_deletes_nothing(finished, tmp_path, capsys):
    """A wrong --llm, NaN, a loss that is not finite: one line, the old model, no table."""
    copy(finished, tmp_path, "llm", "vae", "ddt", "sft", "grpo")
    shutil.copy(finished / "results.json", tmp_path)
    llm = shutil.copytree(ROOT / "tests" / "fixtures" / "llama31", tmp_path / "llama")
    (llm / "generation_config.json").unlink()               # it names a bos_token_id, too
    config = json.loads((llm / "config.json").read_text())
    config |= {"bos_token_id": None, "max_position_embeddings": 97}
    (llm / "config.json").write_text(json.dumps(config))
    before = content(tmp_path)
    for main, stage, flags, culprit in (
            (sft.main, "sft", ["--llm", llm], "bos_token_id"),
            (grpo.main, "grpo", ["--eps", 0], "weights that are not finite"),
            (grpo.main, "grpo", ["--lr", 1e30], "weights that are not finite")):
        error = complaint(capsys, main, *argv(stage, tmp_path, *flags, "--fresh"))
        assert culprit in error.splitlines()[-1]
        assert content(tmp_path) == before
    flags = ["--lr", 1e15, "--save_every", 100, "--fresh"]
    complaint(capsys, sft.main, *argv("sft", tmp_path, *flags))
    after = content(tmp_path)
    changed = {name for name in after if after[name] != before.get(name)}
    assert after.keys() == before.keys() and changed == {"sft/log.jsonl"}
    printed = run("grpo", tmp_path)                         # and all is as it was
    assert "is trained" in printed and results(tmp_path) == results(finished)


def test_the_old_model_is_not_taken_for_the_new_one(finished, tmp_path, monkeypatch, one_split):
    """SFT is trained again and stopped. GRPO finishes that first, then does not fit it any more."""
    copy(finished, tmp_path, "llm", "vae", "ddt", "sft", "grpo")
    monkeypatch.setitem(sft.PRESETS, "tiny", FLAGS["sft"])
    old = weights(finished / "sft")
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(checkpoint, "finish", lambda *_: sys.exit(1))
        run("sft", tmp_path, "--fresh")
    same(weights(tmp_path / "sft"), old)
    assert checkpoints(tmp_path / "sft")
    (tmp_path / "sft" / "model.safetensors").write_bytes(b"")       # not read
    run("grpo", tmp_path)                                   # SFT ends as it did: GRPO still fits it
    same(weights(tmp_path / "sft"), old)
    assert not checkpoints(tmp_path / "sft")


def test_results_are_those_of_the_weights_at_hand(finished, tmp_path, capsys, one_split):
    """Another policy is measured again. One that training did not save is refused."""
    copy(finished, tmp_path, "vae", "ddt", "sft", "grpo")
    shutil.copy(finished / "results.json", tmp_path)
    sums = {stage: checkpoint.checksum(next((tmp_path / stage).glob("*.safetensors")))
            for stage in ("vae", "ddt", "sft", "grpo")}
    rows = results(tmp_path)
    assert rows["VAE"]["uniform"]["iid"]["weights"] == {"vae": sums["vae"]}
    assert rows["SFT + RL"]["uniform"]["iid"]["weights"] == sums
    policy = tmp_path / "grpo" / "model.safetensors"
    shutil.copy(tmp_path / "sft" / "model.safetensors", policy)
    error = complaint(capsys, grpo.main, *argv("grpo", tmp_path))
    assert f"{policy} is not what training has saved" in error and "grpo.py --fresh" in error
    run("grpo", tmp_path, "--fresh", "--seed", "1")
    after = results(tmp_path)
    assert after["SFT + RL"]["uniform"]["iid"]["weights"]["grpo"] == checkpoint.checksum(policy)
    assert after["SFT"] == rows["SFT"]


def test_damaged_pictures_are_made_again(finished, tmp_path, one_split):
    copy(finished, tmp_path, "vae", "ddt")
    picture = tmp_path / "ddt" / "reconstruction.png"
    whole = picture.read_bytes()
    flipped = whole[:900] + bytes([whole[900] ^ 1]) + whole[901:]
    for damaged in (whole[:1000], b"", flipped):
        picture.write_bytes(damaged)
        run("ddt", tmp_path)
        assert picture.read_bytes() == whole


# ------------------------------------------------------------------ signals and ranks


def test_ctrl_c_is_one_line(finished, tmp_path):
    copy(finished, tmp_path, "llm", "vae", "ddt")
    command = [sys.executable, ROOT / "sft.py", *argv("sft", tmp_path, "--steps=1000")]
    process = subprocess.Popen(command, env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                               text=True)
    while not checkpoints(tmp_path / "sft") and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "Traceback" not in error
    assert "goes on from the last checkpoint" in error


def test_torchrun_on_two_ranks(finished, tmp_path):
    """
    3 prompts on 2 ranks: the weights of one rank. (How ranks share a batch, for every stage:
    test_scale.py.)
    """
    copy(finished, tmp_path, "vae", "ddt", "sft")
    shutil.copy(finished / "results.json", tmp_path)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launch, ROOT / "grpo.py", *argv("grpo", tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, env=ENV, timeout=240)
    assert result.returncode == 0, result.stderr
    assert [line["step"] for line in log_of(tmp_path / "grpo")] == [0, 1]
    same(weights(tmp_path / "grpo"), weights(finished / "grpo"), 1e-6)


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize("script, args, culprit", [
    (vae, ["--size", "30"], "--size 30"),
    (ddt, ["--preset", "huge"], "huge"),
    (ddt, ["--batchsize", "4"], "--batch"),
    (sft, ["--lr", "fast"], "--lr"),
    (grpo, ["--steps", "-1"], "--steps"),
    (grpo, ["--steps", "0"], "--steps"),
    (grpo, ["--group", "1"], "--group"),
    (grpo, ["--scenario", "pendulum"], "pendulum"),
    (ddt, ["--scenario", "pendulum"], "pendulum"),
    (ddt, ["--shift", "0"], "--shift 0"),
    (ddt, ["--width", "36", "--heads", "6"], "--query_width 128"),
    (ddt, ["--width", "36", "--query_width", "36", "--heads", "6"], "4 times --heads 6"),
    (ddt, ["--size", "30"], "--size"),
    (ddt, ["--prefix", "some"], "--prefix"),
    (ddt, ["--vae_steps", "4"], "--vae_steps"),
    (grpo, ["--preset", "paper"], "--vae DIR"),
    (sim, ["--split", "nope"], "nope"),
    (reward, ["--n", "0"], "n = 0"),
], ids=lambda x: getattr(x, "__name__", None))
def test_bad_flags_get_one_line(tmp_path, capsys, script, args, culprit):
    out = [] if script in (sim, reward) else ["--out", tmp_path]
    assert culprit in complaint(capsys, script.main, *out, *args).splitlines()[-1]
    assert not list(tmp_path.rglob("*.safetensors"))


def test_bad_folders_get_one_line(finished, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    killed = copy(finished, tmp_path / "killed", "llm", "vae", "ddt")
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(checkpoint, "finish", lambda *_: sys.exit(1))
        run("sft", killed)
    truncated = shutil.copytree(killed, tmp_path / "truncated")
    assert len(checkpoints(truncated / "sft")) == 2
    for path in checkpoints(truncated / "sft"):
        os.truncate(path / "model.safetensors", 1000)
    cases = (
        (tmp_path / "file" / "run", [], "cannot write"),
        (truncated, [], "model.safetensors is not what was written"),
        (killed, ["--lr", "0.5"], "lr was"))
    for out, flags, culprit in cases:
        assert culprit in complaint(capsys, sft.main, *argv("sft", out, *flags))
