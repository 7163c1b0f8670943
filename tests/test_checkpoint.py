"""
Files that are whole or not there: checkpoints, killed and damaged in every way; finished models.

    pytest tests/test_checkpoint.py
"""
import dataclasses
import json
import math
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn

import checkpoint
import train
from checkpoint import UserError, checkpoints
from test_train import ALONE, CPU, ROOT, Config, fit, log_of, mlp, spawn
from train import World


def equal(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def names(folder):
    return [path.name for path in checkpoints(folder)]


@pytest.fixture(scope="module")
def stopped_once(tmp_path_factory):
    """A run that was stopped at step 8, its last checkpoints after 3 and 6 steps."""
    folder = tmp_path_factory.mktemp("stopped")
    fit(folder, Config(), stop=8)
    return folder


@pytest.fixture
def stopped(stopped_once, tmp_path):
    return shutil.copytree(stopped_once, tmp_path / "stopped")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The model that a run makes which is not stopped."""
    return fit(tmp_path_factory.mktemp("uninterrupted"), Config())[0]


# ------------------------------------------------------------------ files


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_file_modes_follow_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        checkpoint.write_safetensors(tmp_path / "x.safetensors", {"x": torch.ones(1)}, {})
    finally:
        os.umask(before)
    assert (tmp_path / "x.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask


def test_an_unwritable_folder(tmp_path):
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "runs" / "x"):
        with pytest.raises(UserError) as error:
            checkpoint.writable(folder)
        assert str(folder) in str(error.value) and "--out" in str(error.value)
    assert (tmp_path / "file").read_text() == "mine"
    assert not list(checkpoint.writable(tmp_path / "new" / "folder").iterdir())


def test_replacing_leaves_the_old_file_or_the_new_one(tmp_path):
    path = tmp_path / "x.json"
    checkpoint.write_json(path, {"a": 1})
    with pytest.raises(RuntimeError), checkpoint.replacing(path) as part:
        part.write_text("ha")
        raise RuntimeError
    assert checkpoint.read_json(path) == {"a": 1}
    checkpoint.write_json(path, {"a": 2})
    assert checkpoint.read_json(path) == {"a": 2} and list(tmp_path.iterdir()) == [path]


def test_read_json(tmp_path):
    path = tmp_path / "x.json"
    assert checkpoint.read_json(path) == {}                 # no file
    for text in ("", "{", "[1]", "null", '{"a": '):
        path.write_text(text)
        with pytest.raises(UserError) as error:
            checkpoint.read_json(path, "train it again")
        assert all(word in str(error.value) for word in (str(path), "damaged", "train it again"))


# ------------------------------------------------------------------ resuming


@pytest.mark.parametrize("stop, first", [(2, 0), (3, 3), (8, 6), (10, 10)])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, stop, first):
    for name in "ab":
        (tmp_path / name).mkdir()
    whole, _ = fit(tmp_path / "a", Config())
    half, _ = fit(tmp_path / "b", Config(), stop=stop)
    with torch.no_grad():
        other = mlp()
        for p in other.parameters():
            p += 1 if first else 0                          # all that counts comes from the file
    resumed, started = fit(tmp_path / "b", Config(), model=other)
    assert started == first and equal(whole, resumed) and equal(half, whole) == (stop == 10)
    logs = [log_of(tmp_path / name) for name in "ab"]
    for line in (*logs[0], *logs[1]):
        line.pop("step_time")
    assert logs[0] == logs[1]


def test_the_last_two_are_kept(tmp_path):
    fit(tmp_path, Config())
    assert names(tmp_path) == ["checkpoint-00000009", "checkpoint-00000010"]
    assert len(list(tmp_path.glob("checkpoint-*"))) == 2
    manifest = json.loads((tmp_path / "checkpoint-00000010" / "manifest.json").read_text())
    assert manifest["step"] == 10 and manifest["ranks"] == 1
    assert manifest["config"] == dataclasses.asdict(Config())
    assert set(manifest["files"]) == {"model.safetensors", "optimizer-0.safetensors"}


@pytest.mark.parametrize("at", range(6))
def test_a_kill_while_saving_leaves_the_old_checkpoint(stopped, uninterrupted, monkeypatch, at):
    replace = os.replace

    def killed(source, target):
        if "checkpoint-" in str(target):
            killed.left -= 1
            if killed.left < 0:
                raise SystemExit
        replace(source, target)
    killed.left = at
    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(SystemExit):                         # of the 3 files of checkpoint 9 or 10
        fit(stopped, Config())
    monkeypatch.undo()
    resumed, first = fit(stopped, Config())
    assert first == (6 if at < 3 else 9) and equal(resumed, uninterrupted)
    assert names(stopped) == ["checkpoint-00000009", "checkpoint-00000010"]


def test_a_full_disk_does_not_end_the_run(stopped, uninterrupted, monkeypatch, capsys):
    def full(tensors, path, metadata):
        if "checkpoint-00000009" in str(path):
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save_file(tensors, path, metadata)
    monkeypatch.setattr(checkpoint, "save_file", full)
    model, _ = fit(stopped, Config())
    error = capsys.readouterr().err
    words = ("checkpoint-00000009", "No space left on device", "goes on")
    assert all(word in error for word in words)
    assert names(stopped) == ["checkpoint-00000006", "checkpoint-00000010"]
    assert equal(model, uninterrupted)


def sharded(rank, size, folder, stop):
    torch.set_num_threads(1)
    store = f"file://{folder}/store{stop}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size)
    world = World(rank, size, CPU)
    model, first = fit(Path(folder, "run"), Config(batch=7), stop, world=world, micro_batch=2)
    save_file(model.state_dict() | {"first": torch.tensor(first)}, f"{folder}/{rank}.safetensors")
    dist.barrier()
    time.sleep(0.3)                     # gloo aborts a rank that still talks to one that has left
    dist.destroy_process_group()


@pytest.mark.parametrize("then", [1, 3])
def test_a_checkpoint_of_two_ranks_resumes_on_others(tmp_path, then):
    """
    On 2 ranks, stopped, then on 1 or 3, with accumulation and unequal shards: what one rank does
    alone.
    """
    for name in ("run", "alone"):
        (tmp_path / name).mkdir()
    alone = fit(tmp_path / "alone", Config(batch=7))[0].state_dict()
    spawn(sharded, 2, 2, str(tmp_path), 7)
    newest = checkpoints(tmp_path / "run")[-1]
    manifest = json.loads((newest / "manifest.json").read_text())
    assert manifest["step"] == 6 and manifest["ranks"] == 2 and len(manifest["files"]) == 3
    spawn(sharded, then, then, str(tmp_path), 11)
    for rank in range(then):
        tensors = load_file(tmp_path / f"{rank}.safetensors")
        assert tensors.pop("first") == 6
        for name, value in alone.items():
            torch.testing.assert_close(tensors[name], value, rtol=1e-6, atol=1e-6)


# ------------------------------------------------------------------ damage

FOREIGN_MANIFESTS = [
    "{}", "[]", "null", "", "{", '{"step": 6}',
    '{"step": "six", "ranks": 1, "config": {}, "files": {}}',
    '{"step": 6, "ranks": -1, "config": [], "files": {"model.safetensors": "0"}}']


def damage(path, how, rng):
    """One of the ways in which a checkpoint comes to grief."""
    victim = rng.choice(sorted(path.iterdir()))
    if how == "truncated":
        os.truncate(victim, rng.randrange(victim.stat().st_size))
    elif how == "flipped":
        data = bytearray(victim.read_bytes())
        for _ in range(rng.randint(1, 8)):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        victim.write_bytes(data)
    elif how == "missing":
        victim.unlink()
    elif how == "foreign manifest":
        (path / "manifest.json").write_text(rng.choice(FOREIGN_MANIFESTS))
    else:                                                   # NaN, with a manifest that fits
        name = rng.choice(["model.safetensors", "optimizer-0.safetensors"])
        tensors = load_file(path / name)
        tensor = tensors[rng.choice(sorted(tensors))]
        tensor.view(-1)[rng.randrange(tensor.numel())] = rng.choice([math.nan, math.inf])
        save_file(tensors, path / name)
        manifest = json.loads((path / "manifest.json").read_text())
        manifest.pop("checksum")
        manifest["files"][name] = checkpoint.checksum(path / name)
        manifest["checksum"] = checkpoint._checksum_of(manifest)
        (path / "manifest.json").write_text(json.dumps(manifest))


def test_damaged_checkpoints(stopped, tmp_path, capsys):
    """
    300 of them: the one before is taken, or one clear error says what is wrong. There is never a
    wrong start.
    """
    rng, config, start = random.Random(0), Config(), mlp()
    before = load_file(stopped / "checkpoint-00000003" / "model.safetensors")
    for i in range(300):
        how = ("truncated", "flipped", "missing", "foreign manifest", "nan")[i % 5]
        folder = shutil.copytree(stopped, tmp_path / "copy")
        newest = folder / "checkpoint-00000006"
        damage(newest, how, rng)
        both = rng.random() < 0.3
        if both:
            damage(folder / "checkpoint-00000003", how, rng)
        try:
            model = mlp()
            first = checkpoint.resume(folder, model, train.AdamW(model), config, ALONE)
            printed = capsys.readouterr().out
            hidden = not (newest / "manifest.json").exists()    # not a checkpoint at all
            assert first in (0, 3), (i, how)
            assert hidden or str(newest) in printed
            if first == 0:
                assert both and hidden and equal(model, start)
            else:
                assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        except UserError as error:
            words = (str(folder), "--fresh", "damaged")
            assert both and all(word in str(error) for word in words)
        shutil.rmtree(folder)
    assert fit(stopped, Config(fresh=True))[1] == 0         # and the remedy is one


def test_a_checkpoint_of_another_configuration(stopped, tmp_path):
    with pytest.raises(UserError) as error:
        fit(stopped, Config(lr=0.5, batch=4))
    words = (str(stopped / "checkpoint-00000006"), "lr was 0.01, is 0.5", "batch was 5, is 4",
             "--fresh", "--out")
    assert all(word in str(error.value) for word in words)
    assert fit(stopped, Config(out="elsewhere", save_every=1))[1] == 6      # these may differ
    (tmp_path / "empty").mkdir()
    assert fit(tmp_path / "empty", Config(lr=0.5))[1] == 0


@pytest.mark.parametrize("model, culprit", [
    (lambda: nn.Sequential(nn.Linear(4, 9), nn.LayerNorm(9), nn.GELU(), nn.Linear(9, 2)),
     "0.weight"),
    (lambda: nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.GELU()), "3.bias"),
    (lambda: nn.Sequential(*mlp(), nn.Linear(2, 2)), "4.weight")],
    ids=["wider", "fewer layers", "more layers"])
def test_a_checkpoint_of_another_model(stopped, model, culprit):
    with pytest.raises(UserError) as error:
        fit(stopped, Config(), model=model())
    assert culprit in str(error.value) and str(stopped / "checkpoint-00000006") in str(error.value)


def test_a_checkpoint_of_another_optimizer(stopped, monkeypatch):
    """The weights fit, the optimizer's state is in other buckets."""
    defaults = list(train.AdamW.__init__.__defaults__)
    monkeypatch.setattr(train.AdamW.__init__, "__defaults__", (*defaults[:-1], 1))
    with pytest.raises(UserError, match="does not fit this model: its optimizer has 8 tensors"):
        fit(stopped, Config())


# ------------------------------------------------------------------ finished models


def test_finish(stopped):
    """
    The model is saved, the checkpoint goes, and the stage is known as trained, with this
    configuration only.
    """
    def save(folder):
        (folder / "model.safetensors").touch()

    def is_trained(config):
        return checkpoint.is_trained(stopped, "model.safetensors", config, ALONE)
    assert not is_trained(Config())
    checkpoint.finish(stopped, save, Config(), mlp(), ALONE)
    found = {path.name for path in stopped.iterdir()}
    assert found == {"log.jsonl", "model.safetensors", "trained.json"}
    (stopped / "checkpoint-00000010").mkdir()               # killed between saving and cleaning up
    assert is_trained(Config())
    assert not (stopped / "checkpoint-00000010").exists()
    assert not is_trained(Config(fresh=True))
    with pytest.raises(UserError, match="lr was"):
        is_trained(Config(lr=0.123))


def test_one_training_at_a_time(tmp_path):
    """A second process is refused while the first one lives."""
    code = "import sys, pathlib, checkpoint, train\n" \
           "checkpoint.lock(pathlib.Path(sys.argv[1]), train.World(0, 1, None))"
    checkpoint.lock(tmp_path, ALONE)
    checkpoint.lock(tmp_path, ALONE)                        # our own next stage may go on
    command = [sys.executable, "-c", code, str(tmp_path)]
    other = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert other.returncode and "another process is training" in other.stderr


def test_delete_model(stopped):
    weights = ("model.safetensors", "diffusion_pytorch_model.safetensors")
    for name in (*weights, "trained.json", "note"):
        (stopped / name).touch()
    checkpoint.delete_model(stopped)
    checkpoint.delete_model(stopped)
    assert {path.name for path in stopped.iterdir()} == {"log.jsonl", "note"}


def test_a_stage_knows_what_it_started_from(stopped, tmp_path):
    """Another tokenizer is refused, until the stage is trained again with --fresh."""
    source, note = tmp_path / "source" / "model.safetensors", stopped / "provenance.json"
    source.parent.mkdir()

    def start(**flags):
        return checkpoint.start_stage(stopped, Config(**flags), ALONE, source=source)

    def check():
        return checkpoint.check_provenance(stopped, source=source)
    checkpoint.write_safetensors(source, {"x": torch.ones(9)}, {})
    assert start() == stopped
    before = note.read_text()
    assert json.loads(before) == check() == {"source": checkpoint.checksum(source)}
    start()                                                 # the same again is no problem
    checkpoint.write_safetensors(source, {"x": torch.zeros(9)}, {})
    for function in (start, check):
        with pytest.raises(UserError) as error:
            function()
        words = (str(stopped), str(source.parent), "--fresh", "--out")
        assert all(word in str(error.value) for word in words)
    assert note.read_text() == before and checkpoints(stopped)
    start(fresh=True)                                       # nothing is left to contradict it
    assert note.read_text() != before
    assert {path.name for path in stopped.iterdir()} == {"log.jsonl", "provenance.json"}
    assert checkpoint.start_stage(tmp_path / "new" / "stage", Config(), ALONE).is_dir()
