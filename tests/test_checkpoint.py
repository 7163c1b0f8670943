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

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors import SafetensorError
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
    places = ("out", "fresh", "save_every")                 # decide nothing that is learnt
    kept = {k: v for k, v in dataclasses.asdict(Config()).items() if k not in places}
    assert manifest["config"] == kept
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


def save(folder):
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint.write_json(folder / "config.json", {})
    checkpoint.write_safetensors(folder / "model.safetensors", mlp().state_dict(), {})


def test_finish(stopped):
    """
    The model is saved, the checkpoint goes, and the stage is known as trained, with this
    configuration only.
    """
    def is_trained(config):
        return checkpoint.is_trained(stopped, config, ALONE)
    assert not is_trained(Config())
    checkpoint.finish(stopped, save, Config(), mlp(), ALONE)
    found = {path.name for path in stopped.iterdir()}
    assert found == {"log.jsonl", "model.safetensors", "config.json", "trained.json",
                     "provenance.json"}
    (stopped / "checkpoint-00000010").mkdir()               # killed between saving and cleaning up
    assert is_trained(Config())
    assert not (stopped / "checkpoint-00000010").exists()
    assert not is_trained(Config(fresh=True))
    with pytest.raises(UserError, match="lr was"):
        is_trained(Config(lr=0.123))


def content(folder):
    return {path.relative_to(folder): path.read_bytes()
            for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def finished(stopped):
    """The folder of a finished model. (That of an untrained `mlp()`: `save` says which.)"""
    fit(stopped, Config())
    checkpoint.finish(stopped, save, Config(), mlp(), ALONE)
    return stopped


def test_fresh_that_fails_at_its_first_step_changes_nothing(finished):
    """Too many ranks, out of memory, wrong weights: all are found before the first step is done."""
    before = content(finished)
    with pytest.raises(RuntimeError), train.Run(finished, mlp(), Config(fresh=True), ALONE) as run:
        for step in run:
            raise RuntimeError("out of memory")
    assert content(finished) == before


def test_an_older_training_stays_until_the_first_step_of_fresh(stopped):
    with train.Run(stopped, mlp(), Config(fresh=True, save_every=5), ALONE) as run:
        for step in run:
            run.log(loss=0.5)
            assert names(stopped) == (["checkpoint-00000003", "checkpoint-00000006"]
                                      if step == 0 else [])
            if step == 2:
                break
    assert [line["step"] for line in log_of(stopped)] == [0, 1]


def test_fresh_replaces_the_model_at_its_end(finished, uninterrupted):
    """Interrupted, the new training goes on without --fresh; the old model is not used any more."""
    old = content(finished)
    kept = [path for path in old if path.suffix in (".json", ".safetensors")]
    with pytest.raises(UserError, match="lr was 0.01, is 0.02"):
        checkpoint.is_trained(finished, Config(lr=0.02), ALONE)
    fit(finished, Config(lr=0.02, fresh=True), stop=8)
    assert all((finished / path).read_bytes() == old[path] for path in kept)
    assert not checkpoint.has_model(finished)
    assert not checkpoint.is_trained(finished, Config(lr=0.02), ALONE)
    with pytest.raises(UserError, match="of another configuration"):
        checkpoint.start_stage(finished, Config(), ALONE)
    checkpoint.start_stage(finished, Config(lr=0.02), ALONE)
    model, first = fit(finished, Config(lr=0.02))
    assert first == 6 and not checkpoint.has_model(finished)

    def save_new(folder):
        folder.mkdir()
        checkpoint.write_json(folder / "config.json", {"new": 1})
        checkpoint.write_safetensors(folder / "model.safetensors", model.state_dict(), {})
    checkpoint.finish(finished, save_new, Config(lr=0.02), model, ALONE)
    assert checkpoint.is_trained(finished, Config(lr=0.02), ALONE)
    saved = load_file(finished / "model.safetensors")
    assert all(torch.equal(saved[name], x) for name, x in model.state_dict().items())
    assert json.loads((finished / "config.json").read_text()) == {"new": 1}
    assert content(finished).keys() == old.keys()


@pytest.mark.parametrize("at", range(4))
def test_a_kill_while_the_new_model_replaces_the_old(finished, tmp_path, monkeypatch, at):
    """Whichever file came last: the stage is not finished, and ends as it should."""
    model, _ = fit(finished, Config(lr=0.02, fresh=True))
    config, replace = Config(lr=0.02), Path.replace

    def save_new(folder):
        save(folder)
        checkpoint.write_safetensors(folder / "model.safetensors", model.state_dict(), {})

    def killed(source, target):
        if source.parent.name == "new":
            killed.left -= 1
            if killed.left < 0:
                raise SystemExit
        return replace(source, target)
    killed.left = at
    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(SystemExit):
        checkpoint.finish(finished, save_new, config, model, ALONE)
    monkeypatch.undo()
    assert not checkpoint.is_trained(finished, config, ALONE)
    copy = shutil.copytree(finished, tmp_path / "copy")     # the worst: no checkpoint was saved
    checkpoint.forget_checkpoints(copy)
    if at == 0:
        assert checkpoint.is_trained(copy, Config(), ALONE)
        checkpoint.check_provenance(copy)
    else:
        with pytest.raises(UserError, match="not what training has saved"):
            checkpoint.check_provenance(copy)
    again, first = fit(finished, config)
    assert first == 10 and equal(again, model)
    checkpoint.finish(finished, save_new, config, again, ALONE)
    assert checkpoint.is_trained(finished, config, ALONE)
    checkpoint.check_provenance(finished)


def test_a_full_disk_at_the_end_loses_neither_model(finished, monkeypatch):
    model, _ = fit(finished, Config(lr=0.02, fresh=True))
    before = content(finished)

    def full(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise SafetensorError("No space left on device")
    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(UserError) as error:
        checkpoint.finish(finished, save, Config(lr=0.02), model, ALONE)
    words = ("model.safetensors", "No space left on device", "goes on from", "checkpoint-00000010")
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)
    assert content(finished) == before


def test_what_is_not_finite_is_not_saved(stopped, capsys):
    """The checkpoints that are there stay, and there is no model."""
    before = content(stopped)
    for broken in ("model", "optimizer"):
        model = mlp()
        optimizer = train.AdamW(model)
        with torch.no_grad():
            if broken == "model":
                model[0].weight[0, 0] = math.nan
            else:
                optimizer.buckets[0].master[0] = math.inf
        checkpoint.save_checkpoint(stopped, model, optimizer, 6, Config(), ALONE)
        error = capsys.readouterr().err
        assert "checkpoint-00000007" in error and "holds NaN or infinity" in error
        assert content(stopped) == before
    with pytest.raises(UserError, match="at the end are not finite"):
        model = mlp()
        torch.nn.init.constant_(model[0].weight, math.nan)
        checkpoint.finish(stopped, save, Config(), model, ALONE)
    assert content(stopped) == before


def test_a_run_that_begins_again_replaces_later_checkpoints(stopped, monkeypatch):
    """One of step 2 replaces those of the steps 3 and 6, but not before it is whole."""
    model = mlp()
    optimizer = train.AdamW(model)
    before = names(stopped)
    assert before == ["checkpoint-00000003", "checkpoint-00000006"]

    def full(*args):
        raise OSError("No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_json", full)
        checkpoint.save_checkpoint(stopped, model, optimizer, 1, Config(), ALONE)
    assert names(stopped) == before
    checkpoint.save_checkpoint(stopped, model, optimizer, 1, Config(), ALONE)
    assert names(stopped) == ["checkpoint-00000002"]


def test_the_message_of_the_last_checkpoint(tmp_path, monkeypatch, capsys):
    def full(*args):
        raise SafetensorError("No space left on device")
    monkeypatch.setattr(checkpoint, "save_file", full)
    fit(tmp_path, Config(steps=6))
    first, last = [line for line in capsys.readouterr().err.splitlines() if "could not" in line]
    assert "checkpoint-00000003" in first and "tries again at the next checkpoint" in first
    assert "checkpoint-00000006" in last and "it was the last one" in last


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_one_bit_of_a_finished_model(finished, name):
    """The files that make the numbers have checksums, and the line names the way out."""
    path = finished / name
    data, place = path.read_bytes(), finished.rename(finished.parent / "grpo")
    path = place / name
    for i in range(len(data) - 2, len(data)):
        path.write_bytes(data[:i] + bytes([data[i] ^ 1]) + data[i + 1:])
        with pytest.raises(UserError) as error:
            checkpoint.check_provenance(place)
        words = (str(path), "not what training has saved", "python grpo.py --fresh --out",
                 str(place.parent))
        assert all(word in str(error.value) for word in words)
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match="cannot read .*python grpo.py --fresh"):
        checkpoint.check_provenance(place)


DAMAGES = {"cut": lambda data: data[:len(data) // 2], "empty": lambda data: b"",
           "null": lambda data: b"null", "list": lambda data: b"[]", "number": lambda data: b"3",
           "no UTF-8": lambda data: b"\xff\xfe" + data, "folder": None}


@pytest.mark.parametrize("how", [*DAMAGES, "other fields"])
@pytest.mark.parametrize("name", ["trained.json", "provenance.json"])
def test_damaged_notes_of_a_finished_model(finished, name, how):
    place = finished.rename(finished.parent / "sft")
    path = place / name
    data = path.read_bytes()
    path.unlink()
    if how == "folder":
        path.mkdir()
    elif how == "other fields":
        path.write_text('{"SFT": 3, "files": 3}')
    else:
        path.write_bytes(DAMAGES[how](data))
    with pytest.raises(UserError) as error:
        checkpoint.is_trained(place, Config(), ALONE)
        checkpoint.check_provenance(place)
    text = str(error.value)
    assert str(path) in text and "damaged" in text and "\n" not in text
    assert f"python sft.py --fresh --out {place.parent}" in text


@dataclasses.dataclass
class WithFolder(Config):
    llm: str = ""


def test_a_folder_has_one_name(tmp_path, monkeypatch):
    """DIR, DIR/, a relative path and a link are the same --llm."""
    (tmp_path / "llm").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "llm")
    monkeypatch.chdir(tmp_path)
    names = [f"{tmp_path}/llm", f"{tmp_path}/llm/", "llm", "./llm/", "llm/../llm", "link"]
    then = checkpoint.settings(WithFolder(llm=names[0]))
    for name in names:
        assert not checkpoint.changed_fields(then, WithFolder(llm=name)), name
    for name in ("other", ""):
        assert "llm was" in checkpoint.changed_fields(then, WithFolder(llm=name))
    assert checkpoint.settings(WithFolder())["llm"] == ""


def test_a_manifest_that_is_a_folder(stopped, uninterrupted):
    """It is damaged, and the next saves remove it."""
    manifest = stopped / "checkpoint-00000006" / "manifest.json"
    manifest.unlink()
    manifest.mkdir()
    checkpoint.start_stage(stopped, Config(), ALONE)
    model, first = fit(stopped, Config())
    assert first == 3 and equal(model, uninterrupted)
    assert names(stopped) == ["checkpoint-00000009", "checkpoint-00000010"]


def test_one_bit_of_a_cached_array(tmp_path):
    """It is made again, as one without its note, or of another stamp."""
    path, made = tmp_path / "codes.npy", []

    def rows(chunk):
        made.append(chunk)
        return np.full((2, 3), chunk.start, np.uint8)

    def array(stamp="of clips"):
        made.clear()
        chunks = [slice(0, 2), slice(2, 4)]
        result = checkpoint.cached_array(path, stamp, (4, 3), chunks, rows, ALONE)
        assert result.tolist() == [[0] * 3] * 2 + [[2] * 3] * 2
        return len(made)
    assert [array(), array()] == [2, 0]
    for i in range(1, 13):
        data = bytearray(path.read_bytes())
        data[-i] ^= 1 << i % 8
        path.write_bytes(data)
        assert [array(), array()] == [2, 0]
    assert array("of others") == 2
    path.with_suffix(".txt").write_bytes(b"\xff")
    assert [array("of others"), array("of others")] == [2, 0]
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match="codes.npy is a folder"):
        array()


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
    for name in (*weights, "trained.json", "provenance.json", "note"):
        (stopped / name).touch()
    checkpoint.delete_model(stopped)
    checkpoint.delete_model(stopped)
    assert {path.name for path in stopped.iterdir()} == {"log.jsonl", "note"}


def test_a_stage_knows_what_it_started_from(tmp_path):
    """Another tokenizer is refused, until the stage is trained again with --fresh."""
    source, stage = tmp_path / "source" / "model.safetensors", tmp_path / "sft"
    source.parent.mkdir()

    def start(**flags):
        config = Config(steps=2, save_every=1, **flags)
        return checkpoint.start_stage(stage, config, ALONE, source=source)

    def refused():
        for function in (start, lambda: checkpoint.check_provenance(stage, source=source)):
            with pytest.raises(UserError) as error:
                function()
            words = (str(stage), str(source.parent), "python sft.py --fresh", "--out")
            assert all(word in str(error.value) for word in words)
    checkpoint.write_safetensors(source, {"x": torch.ones(9)}, {})
    sums = start()
    assert sums == {"source": checkpoint.checksum(source)} and stage.is_dir()
    model, config = mlp(), Config(steps=2, save_every=1)
    with train.Run(stage, model, config, ALONE, sources=sums) as run:
        for step in run:
            run.log(loss=1.0)
    assert start() == sums                                  # the same again is no problem
    checkpoint.write_safetensors(source, {"x": torch.zeros(9)}, {})
    refused()                                               # by the checkpoint
    checkpoint.finish(stage, save, config, model, ALONE, sums)
    refused()                                               # by the model
    note = json.loads((stage / "provenance.json").read_text())
    assert note.pop("files") and note == sums
    before = {path: path.read_bytes() for path in stage.iterdir()}
    assert start(fresh=True) != sums                        # may train, and deletes nothing
    assert {path: path.read_bytes() for path in stage.iterdir()} == before


def test_a_damaged_source_is_named_itself(tmp_path):
    """Not the stage that was trained from it: training that again would start from the damage."""
    config, sources = Config(steps=2), {"ddt": tmp_path / "ddt" / "model.safetensors"}
    checkpoint.finish(checkpoint.writable(tmp_path / "ddt"), save, config, mlp(), ALONE)
    sums = checkpoint.start_stage(tmp_path / "sft", config, ALONE, **sources)
    checkpoint.finish(tmp_path / "sft", save, config, mlp(), ALONE, sums)
    checkpoint.write_safetensors(sources["ddt"], {"x": torch.zeros(9)}, {})
    with pytest.raises(UserError, match="ddt/model.safetensors is not what .*python ddt.py"):
        checkpoint.check_provenance(tmp_path / "sft", **sources)


def test_a_lock_that_cannot_be_written_is_named(tmp_path):
    """A full disk: an error of `write` itself does not say which file."""
    (tmp_path / ".lock").symlink_to("/dev/full")
    with pytest.raises(UserError, match=".lock"):
        checkpoint.lock(tmp_path, ALONE)
