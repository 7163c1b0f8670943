"""
What the loops share: flags, shares of ranks, order of the data, optimizer, checkpoints, log.

    pytest tests/test_train.py
"""
import dataclasses
import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import save_file
from torch import nn

import train
from train import Problem, World

ROOT = Path(__file__).parent.parent


@dataclass
class Config:
    preset: str = "tiny"
    out: str = ""
    seed: int = 0
    fresh: bool = False
    save_every: int = 3
    steps: int = 10
    batch: int = 5
    lr: float = 1e-2
    warmup: int = 2
    beta1: float = 0.9
    beta2: float = 0.99
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0


PRESETS = {"tiny": {}, "large": {"preset": "large", "batch": 64, "lr": 1e-4}}
ALONE = World(0, 1, torch.device("cpu"))

# ------------------------------------------------------------------ flags


def test_parse_defaults_and_overrides():
    assert train.parse(Config, PRESETS, []) == Config(out="runs/tiny")
    large = train.parse(Config, PRESETS, ["--preset", "large"])
    assert large == Config("large", "runs/large", batch=64, lr=1e-4)
    argv = "--preset large --out x --lr 3e-3 --seed 7 --fresh --clip 0 --steps=4"
    expected = Config("large", "x", 7, True, batch=64, lr=3e-3, clip=0.0, steps=4)
    assert train.parse(Config, PRESETS, argv.split()) == expected


@pytest.mark.parametrize("argv, words", [
    ("--step 3", ("--step", "did you mean --steps")),
    ("--weightdecay=3", ("--weightdecay", "did you mean --weight_decay")),
    ("--presets large", ("--presets", "did you mean --preset")),
    ("stray", ("stray",)),
    ("--preset larg", ("'larg'", "tiny, large", "did you mean large")),
    ("--preset enormous", ("'enormous'", "tiny, large")),
    ("--steps many", ("--steps", "many")),
    ("--steps 1.5", ("--steps", "1.5")),
    ("--lr fast", ("--lr", "fast")),
    ("--lr", ("--lr",)),
    ("--steps -1", ("--steps", "-1")),
    ("--steps 0", ("--steps", "0")),
    ("--batch 0", ("--batch", "0")),
    ("--lr -0.1", ("--lr", "-0.1")),
    ("--lr nan", ("--lr", "nan")),
    ("--lr inf", ("--lr", "inf")),
    ("--seed -1", ("--seed", "-1"))])
def test_bad_flags(argv, words, capsys, monkeypatch):
    """One line that names the flag, and exit code 2."""
    monkeypatch.setattr(sys, "argv", ["stage.py", *argv.split()])
    with pytest.raises(SystemExit) as stop:
        train.cli(lambda: train.parse(Config, PRESETS, None))
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2
    assert all(word in lines[-1] for word in words) and lines[-1].startswith("stage.py: ")
    assert len([line for line in lines if not line.startswith("usage:")]) == 1


def test_interrupting_says_how_to_go_on(capsys):
    def main():
        raise KeyboardInterrupt
    with pytest.raises(SystemExit) as stop:
        train.cli(main)
    assert stop.value.code == 130 and "goes on" in capsys.readouterr().err


# ------------------------------------------------------------------ ranks


def test_shares_cover_every_row_once():
    for n in range(0, 30):
        for size in range(1, 10):
            if n < size:
                with pytest.raises(Problem, match=f"{n} cannot be shared by {size} ranks"):
                    World(0, size, torch.device("cpu")).share(torch.arange(n))
                continue
            parts = [World(rank, size, torch.device("cpu")).share(torch.arange(n)) for rank in range(size)]
            assert torch.equal(torch.cat(parts), torch.arange(n))
            assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_without_a_process_group():
    x = torch.randn(3, 2)
    assert torch.equal(train.total(x), x) and torch.equal(train.gather(x), x)
    assert not train.total(x.requires_grad_()).requires_grad            # or a running mean of losses keeps every step's graph
    x = x.detach()
    train.wait(ALONE)
    model = mlp()
    assert train.distribute(model, ALONE) is model


ROWS = 7                                                                # 3 on one rank, 4 on the other


def step_of(world):
    """One update of the mean loss over ROWS rows -> weights, gradient norm."""
    torch.manual_seed(0)
    x, y, config = torch.randn(ROWS, 4), torch.randn(ROWS, 2), Config(clip=0.5)
    model = mlp()
    optimizer = train.adamw(model, config)
    everywhere = train.distribute(model, world)
    loss = (everywhere(world.share(x)) - world.share(y)).square().sum() / ROWS
    norm = train.update(model, optimizer, [loss], 0, config)["grad_norm"]
    return [*model.state_dict().values(), torch.tensor(norm)]


def of_two_ranks(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    world = World(rank, 2, torch.device("cpu"))
    mine = world.share(torch.arange(ROWS * 2.0).view(ROWS, 2))
    result = {"total": train.total(mine.sum(0)), "gather": train.gather(mine)}
    result |= {f"step{i}": x.clone() for i, x in enumerate(step_of(world))}
    save_file(result, f"{folder}/{rank}.safetensors")
    dist.destroy_process_group()


def test_two_ranks_of_unequal_shares_do_what_one_does(tmp_path):
    mp.spawn(of_two_ranks, (str(tmp_path),), 2)
    ranks = [train.read_safetensors(tmp_path / f"{rank}.safetensors")[0] for rank in (0, 1)]
    data, alone = torch.arange(ROWS * 2.0).view(ROWS, 2), step_of(ALONE)
    for r in ranks:
        assert torch.equal(r["total"], data.sum(0)) and torch.equal(r["gather"], data)
        for i, x in enumerate(alone):
            torch.testing.assert_close(r[f"step{i}"], x)
            assert torch.equal(r[f"step{i}"], ranks[0][f"step{i}"])


# ------------------------------------------------------------------ order of the data


@pytest.mark.parametrize("n, batch", [(12, 5), (7, 7), (3, 8), (20, 1)])
def test_rows_are_shuffled_epochs(n, batch):
    steps = 3 * n
    seen = torch.cat([train.rows(4, step, batch, n) for step in range(steps)])
    epochs = seen.view(-1, n)                                           # 3 * batch epochs
    assert torch.equal(epochs.sort(1).values, torch.arange(n).expand_as(epochs))
    assert len(epochs.unique(dim=0)) > 1
    for step in reversed(range(steps)):                                 # whatever was asked before
        assert torch.equal(train.rows(4, step, batch, n), seen[step * batch:(step + 1) * batch])
    assert not torch.equal(torch.cat([train.rows(5, step, batch, n) for step in range(steps)]), seen)


def test_generators_are_functions_of_their_key():
    keys = [(0, 1), (1, 0), (1, 1), (0, 2), (2, 3)]
    draws = {key: torch.rand(4, generator=train.generator(*key)) for key in keys}
    for key, x in draws.items():
        assert torch.equal(x, torch.rand(4, generator=train.generator(*key)))
    assert len(torch.stack(list(draws.values())).unique()) == 20


# ------------------------------------------------------------------ optimizer


def mlp():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 2))


@pytest.mark.parametrize("warmup", [0, 1, 10])
def test_learning_rate(warmup):
    config = Config(lr=0.5, warmup=warmup, steps=110)
    lr = [train.learning_rate(step, config) for step in range(config.steps + 1)]
    assert lr[:warmup] == pytest.approx([0.5 * (i + 1) / warmup for i in range(warmup)])
    assert lr[warmup] == 0.5 and lr[-1] == pytest.approx(0, abs=1e-12)
    assert lr[(warmup + 110) // 2] == pytest.approx(0.25, rel=0.02)
    assert all(a > b for a, b in zip(lr[warmup:], lr[warmup + 1:]))


def test_only_matrices_decay():
    config, model = Config(lr=0.1, weight_decay=0.5, warmup=0), mlp()
    model[3].bias.requires_grad_(False)
    nn.init.ones_(model[0].bias)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = train.adamw(model, config)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 5
    train.update(model, optimizer, [sum((0 * p).sum() for p in model.parameters())], 0, config)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name] * (1 - 0.1 * 0.5 if value.ndim == 2 else 1))


@pytest.mark.parametrize("clip", [0.0, 0.01])
def test_update_clips_and_reports(clip):
    config, model = Config(clip=clip, lr=0.2, warmup=4), mlp()
    optimizer = train.adamw(model, config)
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    gradient = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    norm = torch.cat([g.flatten() for g in gradient]).norm().item()
    health = train.update(model, optimizer, [model(x).square().sum()], 1, config)
    assert health == pytest.approx({"grad_norm": norm, "learning_rate": 0.2 * 2 / 4}) and norm > 1
    for p, g in zip(model.parameters(), gradient):
        torch.testing.assert_close(optimizer.state[p]["exp_avg"], 0.1 * g * (clip / norm if clip else 1))
        assert p.grad is None


def test_parts_of_a_loss_add_up():
    config, x = Config(clip=0.0), torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    after = []
    for parts in (1, 3):
        model = mlp()
        losses = (model(part).square().sum() / 6 for part in x.tensor_split(parts))
        train.update(model, train.adamw(model, config), losses, 0, config)
        after.append(torch.cat([p.flatten() for p in model.parameters()]))
    torch.testing.assert_close(*after)


def test_a_gradient_that_is_not_finite_changes_nothing():
    config, model = Config(), mlp()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(Problem, match="step 3 .*--lr"):
        train.update(model, train.adamw(model, config), [model(torch.full((1, 4), math.nan)).sum()], 3, config)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


# ------------------------------------------------------------------ checkpoints


def fit(folder, config, stop=None, model=None):
    """A little training, killed before step `stop` if given -> the model and the step it started with."""
    model = model or mlp()
    optimizer = train.adamw(model, config)
    first = train.resume(folder, model, optimizer, config)
    data = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
    with train.Log(folder, first, config, ALONE) as log:
        for step in range(first, config.steps):
            if step == stop:
                break
            x = data[train.rows(config.seed, step, config.batch, len(data))]
            noise = torch.randn(x.shape, generator=train.generator(config.seed, step))
            loss = (model(x + 0.1 * noise) - x[:, :2]).square().sum() / config.batch
            log(step, loss=loss, **train.update(model, optimizer, [loss], step, config))
            train.checkpoint(folder, model, optimizer, step, config, ALONE)
    return model, first


def equal(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture
def folders(tmp_path):
    """A run that was stopped at step 8, its last checkpoint after step 5, and an empty folder."""
    for name in "ab":
        (tmp_path / name).mkdir()
    fit(tmp_path / "a", Config(), stop=8)
    return tmp_path / "a", tmp_path / "b"


@pytest.mark.parametrize("stop, first", [(2, 0), (3, 3), (8, 6), (10, 10)])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, stop, first):
    for name in "ab":
        (tmp_path / name).mkdir()
    whole, _ = fit(tmp_path / "a", Config())
    half, _ = fit(tmp_path / "b", Config(), stop=stop)
    with torch.no_grad():
        other = mlp()
        for p in other.parameters():
            p += 1 if first else 0                                      # all that counts comes from the file
    resumed, started = fit(tmp_path / "b", Config(), model=other)
    assert started == first and equal(whole, resumed) and equal(half, whole) == (stop == 10)
    logs = [[{k: v for k, v in json.loads(line).items() if k != "step_time"}
             for line in (tmp_path / name / "log.jsonl").read_text().splitlines()] for name in "ab"]
    assert logs[0] == logs[1]


def test_only_rank_0_writes(tmp_path):
    model, second = mlp(), World(1, 2, torch.device("cpu"))
    train.checkpoint(tmp_path, model, train.adamw(model, Config()), 2, Config(), second)
    with train.Log(tmp_path, 0, Config(), second) as log:
        log(0, loss=1.0)
    assert not list(tmp_path.iterdir())


def test_an_interrupted_write_leaves_the_old_checkpoint(folders, monkeypatch):
    a, _ = folders
    path, before = a / "checkpoint.safetensors", (a / "checkpoint.safetensors").read_bytes()

    def killed(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        fit(a, Config())
    assert path.read_bytes() == before
    monkeypatch.undo()
    (a / "checkpoint.safetensors.part").write_bytes(before[:100])       # as a power cut leaves it
    assert fit(a, Config())[1] == 6 and path.read_bytes() != before


def rewritten(path, change):
    tensors, metadata = train.read_safetensors(path)
    change(tensors, metadata)
    save_file(tensors, path, metadata)


@pytest.mark.parametrize("damage", [
    lambda path: os.truncate(path, path.stat().st_size // 2),
    lambda path: os.truncate(path, path.stat().st_size - 1),
    lambda path: os.truncate(path, 5),
    lambda path: os.truncate(path, 0),
    lambda path: path.write_text("not safetensors at all"),
    lambda path: save_file({"x": torch.ones(2)}, path),
    lambda path: save_file({"x": torch.ones(2)}, path, {"format": "pt"}),
    lambda path: rewritten(path, lambda tensors, metadata: metadata.update(step="soon")),
    lambda path: rewritten(path, lambda tensors, metadata: metadata.update(config="{")),
    lambda path: rewritten(path, lambda tensors, metadata: tensors["model.0.weight"][0, 3:].fill_(math.nan)),
    lambda path: rewritten(path, lambda tensors, metadata: tensors["optimizer.0.exp_avg"].fill_(math.inf))],
    ids=["half", "a byte short", "5 bytes", "empty", "text", "foreign", "no step", "bad step", "bad config",
         "nan", "inf"])
def test_a_damaged_checkpoint_is_named_with_its_remedy(folders, damage):
    path, (a, _) = folders[0] / "checkpoint.safetensors", folders
    damage(path)
    with pytest.raises(Problem) as problem:
        fit(a, Config())
    assert str(path) in str(problem.value) and "--fresh" in str(problem.value)
    assert fit(a, Config(fresh=True))[1] == 0                           # and the remedy is one
    assert fit(a, Config(steps=10))[1] == 10


def test_a_checkpoint_of_another_configuration(folders):
    a, b = folders
    with pytest.raises(Problem) as problem:
        fit(a, Config(lr=0.5, batch=4))
    assert all(word in str(problem.value) for word in (
        str(a / "checkpoint.safetensors"), "lr was 0.01, is 0.5", "batch was 5, is 4", "--fresh", "--out"))
    assert fit(a, Config(out="elsewhere", save_every=1))[1] == 6        # but these may differ
    assert fit(b, Config(lr=0.5))[1] == 0


@pytest.mark.parametrize("model, culprit", [
    (lambda: nn.Sequential(nn.Linear(4, 9), nn.LayerNorm(9), nn.GELU(), nn.Linear(9, 2)), "0.weight"),
    (lambda: nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.GELU()), "3.bias"),
    (lambda: nn.Sequential(*mlp(), nn.Linear(2, 2)), "4.weight")],
    ids=["wider", "fewer layers", "more layers"])
def test_a_checkpoint_of_another_model(folders, model, culprit):
    a, _ = folders
    with pytest.raises(Problem) as problem:
        fit(a, Config(), model=model())
    assert culprit in str(problem.value) and str(a / "checkpoint.safetensors") in str(problem.value)


def test_finish(folders):
    """The model is saved, the checkpoint goes, and the stage is known as trained, with this configuration only."""
    a, _ = folders
    world, save = train.World(0, 1, torch.device("cpu")), lambda folder: (folder / "model.safetensors").touch()
    assert not train.is_trained(a, "model.safetensors", Config(), world)
    train.finish(a, save, Config(), mlp(), world)
    assert {path.name for path in a.iterdir()} == {"log.jsonl", "model.safetensors", "trained.json"}
    (a / "checkpoint.safetensors").touch()                              # killed between saving and cleaning up
    assert train.is_trained(a, "model.safetensors", Config(), world)
    assert not (a / "checkpoint.safetensors").exists()
    assert not train.is_trained(a, "model.safetensors", dataclasses.replace(Config(), fresh=True), world)
    with pytest.raises(Problem, match="lr was"):
        train.is_trained(a, "model.safetensors", dataclasses.replace(Config(), lr=0.123), world)


def test_one_training_at_a_time(tmp_path):
    """A second process is refused while the first one lives."""
    code = "import sys, train; train.occupy(__import__('pathlib').Path(sys.argv[1]), train.World(0, 1, None))"
    train.occupy(tmp_path, train.World(0, 1, torch.device("cpu")))
    train.occupy(tmp_path, train.World(0, 1, torch.device("cpu")))      # our own next stage may go on
    other = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, cwd=ROOT)
    assert other.returncode and "another process is training" in other.stderr


def test_discard(folders):
    a, _ = folders
    for name in ("model.safetensors", "diffusion_pytorch_model.safetensors", "tokens.safetensors"):
        (a / name).touch()
    train.discard(a)
    train.discard(a)
    assert {path.name for path in a.iterdir()} == {"log.jsonl", "tokens.safetensors"}


def test_what_a_stage_was_made_of(folders):
    stage, source = folders
    train.write_safetensors(source / "model.safetensors", {"x": torch.ones(9)}, {})
    train.made_of(stage, source=source / "model.safetensors")
    note = (stage / "made_of.json").read_text()
    train.made_of(stage, source=source / "model.safetensors")                                 # the same again is no problem
    train.write_safetensors(source / "model.safetensors", {"x": torch.zeros(9)}, {})
    with pytest.raises(Problem) as problem:
        train.made_of(stage, source=source / "model.safetensors")
    assert all(word in str(problem.value) for word in (str(stage), str(source), "--fresh", "--out"))
    assert (stage / "made_of.json").read_text() == note
    train.discard(stage)
    train.made_of(stage, source=source / "model.safetensors")                                 # nothing there that could not fit
    assert (stage / "made_of.json").read_text() != note
    assert {path.name for path in stage.iterdir()} == {"log.jsonl", "made_of.json"}


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_file_modes_follow_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        train.write_safetensors(tmp_path / "x.safetensors", {"x": torch.ones(1)}, {})
    finally:
        os.umask(before)
    assert (tmp_path / "x.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask


def test_an_unwritable_folder(tmp_path):
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "runs" / "x"):
        with pytest.raises(Problem) as problem:
            train.writable(folder)
        assert str(folder) in str(problem.value) and "--out" in str(problem.value)
    assert (tmp_path / "file").read_text() == "mine"
    assert not list(train.writable(tmp_path / "new" / "folder").iterdir())


# ------------------------------------------------------------------ log


def test_log_has_every_step_once(tmp_path):
    config = Config(steps=9)
    for first, last in ((0, 7), (4, 9)):                                # killed at step 7, checkpoint at 4
        with train.Log(tmp_path, first, config, ALONE) as log:
            for step in range(first, last):
                log(step, loss=torch.tensor(step / 3), run=first, name="x")
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(9))
    assert [line["run"] for line in lines] == [0] * 4 + [4] * 5
    assert [line["loss"] for line in lines] == pytest.approx([step / 3 for step in range(9)], rel=1e-5)
    assert all(set(line) == {"step", "loss", "run", "name", "step_time"} for line in lines)
    assert all(line["step_time"] >= 0 for line in lines)
    with train.Log(tmp_path, 0, config, ALONE):                         # a new run starts a new log
        pass
    assert (tmp_path / "log.jsonl").read_text() == ""


def test_log_is_written_step_by_step(tmp_path):
    with train.Log(tmp_path, 0, Config(), ALONE) as log:
        log(0, loss=2.0)
        assert json.loads((tmp_path / "log.jsonl").read_text())["loss"] == 2.0
