"""
What the loops share: flags, shares of ranks, order of the data, optimizer, checkpoints, log.

    pytest tests/test_train.py
"""
import copy
import dataclasses
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
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
    assert torch.equal(train.total(x), x) and torch.equal(torch.cat(train.gather_objects(x)), x)
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
    everywhere = train.distribute(model, world)
    with tempfile.TemporaryDirectory() as folder, train.Run(Path(folder), model, config, world) as run:
        loss = (everywhere(world.share(x)) - world.share(y)).square().sum() / ROWS
        (loss * world.size).backward()
        assert run.step(loss)
        return [*model.state_dict().values(), run.line["grad_norm"], run.line["loss"]]


def of_two_ranks(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    world = World(rank, 2, torch.device("cpu"))
    mine = world.share(torch.arange(ROWS * 2.0).view(ROWS, 2))
    result = {"total": train.total(mine.sum(0)), "gather": torch.cat(train.gather_objects(mine))}
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


def test_only_matrices_decay(tmp_path):
    config, model = Config(lr=0.1, weight_decay=0.5, warmup=0), mlp()
    model[3].bias.requires_grad_(False)
    nn.init.ones_(model[0].bias)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with train.Run(tmp_path, model, config, ALONE) as run:
        assert len(run.optimizer.params) == 5
        loss = sum((0 * p).sum() for p in model.parameters())
        loss.backward()
        run.step(loss)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name] * (1 - 0.1 * 0.5 if value.ndim == 2 else 1))


@pytest.mark.parametrize("bucket", [1, 20, 1 << 26])
def test_adamw_is_torchs(bucket):
    """100 steps beside torch.optim.AdamW, in fp32."""
    config, ours, theirs = Config(), mlp(), mlp()
    optimizer = train.AdamW(ours, config, ALONE, bucket)
    groups = [{"params": [p for p in theirs.parameters() if (p.ndim < 2) == small], "weight_decay": decay}
              for small, decay in ((False, config.weight_decay), (True, 0.0))]
    other = torch.optim.AdamW(groups, betas=(config.beta1, config.beta2), eps=config.eps)
    g = torch.Generator().manual_seed(0)
    for step in range(100):
        for p, q in zip(ours.parameters(), theirs.parameters()):
            p.grad = torch.randn(p.shape, generator=g)
            q.grad = 0.5 * p.grad
        for group in other.param_groups:
            group["lr"] = 0.01 / (step + 1)
        optimizer.step(0.01 / (step + 1), torch.tensor(0.5))
        other.step()
    for p, q in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)
    assert len(optimizer.buckets) == {1: 6, 20: 4, 1 << 26: 2}[bucket]


def test_bf16_weights_need_masters():
    """At lr 3e-6 they follow fp32 weights with masters, and hardly move without."""
    torch.manual_seed(0)
    config, start = Config(weight_decay=0.0, eps=1e-6), nn.Linear(64, 64, bias=False)
    nn.init.normal_(start.weight, std=0.02)
    start = start.bfloat16()
    exact, masters, bare = copy.deepcopy(start).float(), copy.deepcopy(start), copy.deepcopy(start)
    optimizers = [train.AdamW(model, config, ALONE) for model in (exact, masters)]
    naive = torch.optim.AdamW(bare.parameters(), lr=3e-6, betas=(0.9, 0.99), eps=1e-6, weight_decay=0.0)
    g = torch.Generator().manual_seed(1)
    direction = torch.randn(64, 64, generator=g)
    for _ in range(100):
        gradient = (direction + 0.1 * torch.randn(64, 64, generator=g)).bfloat16()
        for model in (exact, masters, bare):
            model.weight.grad = gradient.to(model.weight.dtype)
        for optimizer in optimizers:
            optimizer.step(3e-6, torch.ones(()))
        naive.step()
    torch.testing.assert_close(optimizers[1].buckets[0].master, exact.weight.flatten(), rtol=0, atol=1e-8)
    assert torch.equal(masters.weight, exact.weight.bfloat16())
    moved, with_masters, without = ((m.weight.float() - start.weight.float()).norm().item() for m in (exact, masters, bare))
    assert with_masters == pytest.approx(moved, rel=0.1) and without < 0.3 * moved


@pytest.mark.parametrize("clip", [0.0, 0.01])
def test_update_clips_and_reports(clip, tmp_path):
    config, model = Config(clip=clip, lr=0.2, warmup=4), mlp()
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    gradient = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    norm = torch.cat([g.flatten() for g in gradient]).norm().item()
    with train.Run(tmp_path, model, config, ALONE) as run:
        run.current = 1
        loss = model(x).square().sum()
        loss.backward()
        assert run.step(loss, kl=2.0)
        assert run.line.pop("kl") == 2.0
        assert {k: float(v) for k, v in run.line.items()} == pytest.approx(
            {"loss": model_loss(x), "grad_norm": norm, "learning_rate": 0.2 * 2 / 4, "skipped": 0}) and norm > 1
    matrices, vectors = (bucket.state()["exp_avg"] for bucket in run.optimizer.buckets)
    scale = 0.1 * (clip / norm if clip else 1)
    torch.testing.assert_close(matrices, scale * torch.cat([g.flatten() for g in gradient if g.ndim == 2]))
    torch.testing.assert_close(vectors, scale * torch.cat([g.flatten() for g in gradient if g.ndim == 1]))
    assert all(p.grad is None for p in model.parameters())


def model_loss(x):
    return mlp()(x).square().sum().item()


def test_parts_of_a_loss_add_up(tmp_path):
    config, x = Config(clip=0.0), torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    after = []
    for parts in (1, 3):
        model = mlp()
        with train.Run(tmp_path, model, config, ALONE) as run:
            total = 0.0
            for part in run.accumulate(x.tensor_split(parts), model):
                loss = model(part).square().sum() / 6
                loss.backward()
                total += loss.detach()
            run.step(total)
            assert run.line["loss"] == pytest.approx(model_loss(x) / 6)
        after.append(torch.cat([p.flatten() for p in model.parameters()]))
    torch.testing.assert_close(*after)


def test_parts_are_the_same_on_every_rank():
    for batch in (5, 28, 768):
        for size in (1, 2, 3, 5):
            for micro in (0, 1, 2, 9, 1000):
                parts = World(0, size, torch.device("cpu")).parts(batch, micro)
                largest = max(len(World(r, size, torch.device("cpu")).share(torch.arange(batch))) for r in range(size))
                assert parts == (math.ceil(largest / micro) if micro else 1)


def test_what_is_not_finite_is_left_out(tmp_path):
    config, model = Config(steps=40), mlp()
    good, bad = torch.ones(1, 4), torch.full((1, 4), math.nan)
    with pytest.raises(Problem) as problem, train.Run(tmp_path, model, config, ALONE) as run:
        for step in run:
            before = {k: v.clone() for k, v in model.state_dict().items()}
            fine = step < 8 or step == 17
            loss = model(good if fine else bad).sum()
            loss.backward()
            assert run.step(loss) == fine
            assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) != fine
    assert all(word in str(problem.value) for word in (str(tmp_path), "10 steps up to 27", "--lr", "checkpoint-00000027"))
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["skipped"] for line in lines] == [0] * 8 + [*range(1, 10)] + [0] + [*range(1, 10)]
    assert lines[8]["loss"] == "nan"


# ------------------------------------------------------------------ checkpoints


def fit(folder, config, stop=None, model=None, world=ALONE, micro=0):
    """A little training, killed before step `stop` if given -> the model and the step it started with."""
    model = model or mlp()
    data = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
    everywhere, parts = train.distribute(model, world), world.parts(config.batch, micro)
    with train.Run(folder, model, config, world) as run:
        for step in run:
            if step == stop:
                break
            x = data[train.rows(config.seed, step, config.batch, len(data))]
            x = world.share(torch.cat([x, 0.1 * torch.randn(x.shape, generator=train.generator(config.seed, step))], 1))
            total = 0.0
            for part in run.accumulate(x.tensor_split(parts), everywhere):
                loss = (everywhere(part[:, :4] + part[:, 4:]) - part[:, :2]).square().sum() / config.batch
                (loss * world.size).backward()
                total += loss.detach()
            run.step(total)
    return model, run.first


def equal(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture
def folders(tmp_path):
    """A run that was stopped at step 8, its last checkpoints after 3 and 6 steps, and an empty folder."""
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


def whole(folder):
    return [path.name for path in train.checkpoints(folder)]


def test_the_last_two_are_kept(tmp_path):
    fit(tmp_path, Config())
    assert whole(tmp_path) == ["checkpoint-00000009", "checkpoint-00000010"]
    assert len(list(tmp_path.glob("checkpoint-*"))) == 2
    manifest = json.loads((tmp_path / "checkpoint-00000010" / "manifest.json").read_text())
    assert manifest["step"] == 10 and manifest["ranks"] == 1 and manifest["config"] == dataclasses.asdict(Config())
    assert set(manifest["files"]) == {"model.safetensors", "optimizer-0.safetensors"}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_after_its_step(tmp_path, number):
    before, model, config = signal.getsignal(number), mlp(), Config(save_every=100)
    with pytest.raises(KeyboardInterrupt), train.Run(tmp_path, model, config, ALONE) as run:
        for step in run:
            if step == 4:
                os.kill(os.getpid(), number)
            loss = model(torch.ones(1, 4)).sum()
            loss.backward()
            run.step(loss)
    assert step == 4 and whole(tmp_path) == ["checkpoint-00000005"] and signal.getsignal(number) == before
    assert fit(tmp_path, config)[1] == 5


@pytest.mark.parametrize("at", range(6))
def test_a_kill_while_saving_leaves_the_old_checkpoint(folders, monkeypatch, at):
    a, b = folders
    whole_run, replace = fit(b, Config())[0], os.replace

    def killed(source, target):
        if "checkpoint-" in str(target):
            killed.left -= 1
            if killed.left < 0:
                raise SystemExit
        replace(source, target)
    killed.left = at
    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(SystemExit):                     # of the 3 files of a checkpoint: 9's or 10's
        fit(a, Config())
    monkeypatch.undo()
    resumed, first = fit(a, Config())
    assert first == (6 if at < 3 else 9) and equal(resumed, whole_run)
    assert whole(a) == ["checkpoint-00000009", "checkpoint-00000010"]


def test_a_full_disk_does_not_end_the_run(folders, monkeypatch, capsys):
    a, b = folders
    save_file = train.save_file

    def full(tensors, path, metadata):
        if "checkpoint-00000009" in str(path):
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save_file(tensors, path, metadata)
    monkeypatch.setattr(train, "save_file", full)
    model, _ = fit(a, Config())
    error = capsys.readouterr().err
    assert "checkpoint-00000009" in error and "No space left on device" in error and "goes on" in error
    assert whole(a) == ["checkpoint-00000006", "checkpoint-00000010"] and equal(model, fit(b, Config())[0])


def sharded(rank, size, folder, stop):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store{stop}", rank=rank, world_size=size)
    model, first = fit(Path(folder) / "run", Config(batch=7), stop, world=World(rank, size, torch.device("cpu")), micro=2)
    save_file(model.state_dict() | {"first": torch.tensor(first)}, f"{folder}/{rank}.safetensors")
    dist.barrier()
    time.sleep(0.3)                         # gloo aborts a rank that still talks to one that has left
    dist.destroy_process_group()


@pytest.mark.parametrize("then", [1, 3])
def test_a_checkpoint_of_two_ranks_resumes_on_others(tmp_path, then):
    """2 ranks, stopped, then 1 or 3, with accumulation and unequal shares: what one rank does alone."""
    for name in ("run", "alone"):
        (tmp_path / name).mkdir()
    alone = fit(tmp_path / "alone", Config(batch=7))[0].state_dict()
    mp.spawn(sharded, (2, str(tmp_path), 7), 2)
    manifest = json.loads((train.checkpoints(tmp_path / "run")[-1] / "manifest.json").read_text())
    assert manifest["step"] == 6 and manifest["ranks"] == 2 and len(manifest["files"]) == 3
    mp.spawn(sharded, (then, str(tmp_path), 11), then)
    for rank in range(then):
        tensors, _ = train.read_safetensors(tmp_path / f"{rank}.safetensors")
        assert tensors.pop("first") == 6
        for name, value in alone.items():
            torch.testing.assert_close(tensors[name], value, rtol=1e-6, atol=1e-6)


def damaged(path, how, rng):
    """One of the ways in which a file or folder comes to grief."""
    files = sorted(p for p in path.iterdir())
    victim = rng.choice(files)
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
        content = rng.choice(["{}", "[]", "null", "", "{", '{"step": 6}', '{"step": "six", "ranks": 1, "config": {}, "files": {}}',
                              '{"step": 6, "ranks": -1, "config": [], "files": {"model.safetensors": "0"}}'])
        (path / "manifest.json").write_text(content)
    else:                                                               # NaN, with a manifest that fits
        name = rng.choice(["model.safetensors", "optimizer-0.safetensors"])
        tensors, _ = train.read_safetensors(path / name)
        tensor = tensors[rng.choice(sorted(tensors))]
        tensor.view(-1)[rng.randrange(tensor.numel())] = rng.choice([math.nan, math.inf])
        save_file(tensors, path / name)
        manifest = json.loads((path / "manifest.json").read_text())
        manifest["files"][name] = train.checksum(path / name)
        manifest["checksum"] = train._checksum_of({k: v for k, v in manifest.items() if k != "checksum"})
        (path / "manifest.json").write_text(json.dumps(manifest))


def test_damaged_checkpoints(folders, tmp_path, capsys):
    """300 of them: the one before is taken, or one clear error says what is wrong; never a wrong start."""
    rng, start = random.Random(0), folders[0]
    for i in range(300):
        how = ("truncated", "flipped", "missing", "foreign manifest", "nan")[i % 5]
        folder = shutil.copytree(start, tmp_path / "copy")
        newest = folder / "checkpoint-00000006"
        damaged(newest, how, rng)
        both = rng.random() < 0.3
        if both:
            damaged(folder / "checkpoint-00000003", how, rng)
        config = Config()
        try:
            model = mlp()
            first = train.resume(folder, model, train.AdamW(model, config, ALONE), config, ALONE)
            said = capsys.readouterr().out
            hidden = not (newest / "manifest.json").exists()            # not a checkpoint at all
            assert first in (0, 3), (i, how)
            assert hidden or str(newest) in said
            if first == 0:
                assert both and hidden and equal(model, mlp())
            else:
                reference = train.read_safetensors(start / "checkpoint-00000003" / "model.safetensors")[0]
                assert all(torch.equal(v, reference[k]) for k, v in model.state_dict().items())
        except Problem as problem:
            assert both and str(folder) in str(problem) and "--fresh" in str(problem) and "damaged" in str(problem)
        shutil.rmtree(folder)
    assert fit(start, Config(fresh=True))[1] == 0                       # and the remedy is one


def test_a_checkpoint_of_another_configuration(folders):
    a, b = folders
    with pytest.raises(Problem) as problem:
        fit(a, Config(lr=0.5, batch=4))
    assert all(word in str(problem.value) for word in (
        str(a / "checkpoint-00000006"), "lr was 0.01, is 0.5", "batch was 5, is 4", "--fresh", "--out"))
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
    assert culprit in str(problem.value) and str(a / "checkpoint-00000006") in str(problem.value)


def test_finish(folders):
    """The model is saved, the checkpoint goes, and the stage is known as trained, with this configuration only."""
    a, _ = folders
    world, save = train.World(0, 1, torch.device("cpu")), lambda folder: (folder / "model.safetensors").touch()
    assert not train.is_trained(a, "model.safetensors", Config(), world)
    train.finish(a, save, Config(), mlp(), world)
    assert {path.name for path in a.iterdir()} == {"log.jsonl", "model.safetensors", "trained.json"}
    (a / "checkpoint-00000010").mkdir()                                 # killed between saving and cleaning up
    assert train.is_trained(a, "model.safetensors", Config(), world)
    assert not (a / "checkpoint-00000010").exists()
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
    for first, last in ((0, 7), (6, 9)):                                # killed in step 7, with a checkpoint at 6
        model = mlp()
        with train.Run(tmp_path, model, Config(steps=9), ALONE) as run:
            assert run.first == first
            for step in run:
                if step == last:
                    break
                run.log(value=torch.tensor(step / 3), run=first, name="x")
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(9))
    assert [line["run"] for line in lines] == [0] * 6 + [6] * 3
    assert [line["value"] for line in lines] == pytest.approx([step / 3 for step in range(9)], rel=1e-5)
    assert all(set(line) == {"step", "value", "run", "name", "step_time"} for line in lines)
    assert all(line["step_time"] >= 0 for line in lines)
    with train.Run(tmp_path, mlp(), Config(steps=9, fresh=True), ALONE):                                # a new run starts a new log
        pass
    assert (tmp_path / "log.jsonl").read_text() == ""


def test_log_is_written_step_by_step(tmp_path):
    with train.Run(tmp_path, mlp(), Config(), ALONE) as run:
        for step in run:
            if step == 1:
                assert json.loads((tmp_path / "log.jsonl").read_text())["value"] == 2.0
            run.log(value=2.0)


def test_only_rank_0_writes_the_log(tmp_path):
    with train.Run(tmp_path, mlp(), Config(save_every=100, steps=200), World(1, 2, torch.device("cpu"))) as run:
        for step in run:
            run.log(value=1.0)
            if step == 3:
                break
    assert not list(tmp_path.iterdir())
