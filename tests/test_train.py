"""
What the loops share: flags, shards of ranks, order of the data, optimizer, the steps of a run, log.

    pytest tests/test_train.py
"""
import copy
import importlib
import json
import math
import os
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, fields
from pathlib import Path

import kills
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn

import ddt
import grpo
import sft
import train
from checkpoint import UserError, checkpoints
from train import World

ROOT = Path(__file__).parent.parent


@dataclass
class Config:
    preset: str = "tiny"
    out: str = ""
    seed: int = 0
    fresh: bool = False         # 100 % new
    save_every: int = 3
    steps: int = 10
    batch: int = 5
    # optimization
    lr: float = 1e-2            # peak learning rate
    warmup: int = 2
    beta1: float = 0.9
    beta2: float = 0.99
    eps: float = 1e-8
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0


PRESETS = {"tiny": {}, "large": {"preset": "large", "batch": 64, "lr": 1e-4}}
CPU = torch.device("cpu")
ALONE = World(0, 1, CPU)


def mlp():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 2))


def fit(folder, config, stop=None, model=None, world=ALONE, micro_batch=0):
    """A short training, killed before step `stop` if given -> the model, the step it began with."""
    model = model or mlp()
    data = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
    everywhere = train.distribute(model, world)
    n = world.accumulation_steps(config.batch, micro_batch)
    with train.Run(folder, model, config, world) as run:
        for step in run:
            if step == stop:
                break
            x = data[train.batch_indices(config.seed, step, config.batch, len(data))]
            noise = torch.randn(x.shape, generator=train.generator(config.seed, step))
            x = world.shard(torch.cat([x, 0.1 * noise], 1))
            total = 0.0
            for part in run.accumulate(x.tensor_split(n), everywhere):
                error = everywhere(part[:, :4] + part[:, 4:]) - part[:, :2]
                loss = error.square().sum() / config.batch
                (loss * world.size).backward()
                total += loss.detach()
            run.step(total)
    return model, run.first


def spawn(function, ranks, *args):
    """Runs function(rank, *args) in a process for each rank, to its end."""
    context = kills.context()
    processes = [context.Process(target=function, args=(rank, *args)) for rank in range(ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * ranks


# ------------------------------------------------------------------ flags


def test_parse_defaults_and_overrides():
    assert train.parse(Config, PRESETS, []) == Config(out="runs/tiny")
    large = train.parse(Config, PRESETS, ["--preset", "large"])
    assert large == Config("large", "runs/large", batch=64, lr=1e-4)
    argv = "--preset large --out x --lr 3e-3 --seed 7 --fresh --max_grad_norm 0 --steps=4"
    expected = Config("large", "x", 7, True, batch=64, lr=3e-3, max_grad_norm=0.0, steps=4)
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
    ("--lr -1e-3", ("--lr", "-0.001", "at least 0")),
    ("--lr -inf", ("--lr", "at least 0")),
    ("--lr nan", ("--lr", "nan")),
    ("--lr inf", ("--lr", "inf")),
    ("--beta2 1", ("--beta2", "1.0")),
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


def help_of(main, capsys, *argv) -> str:
    """What --help prints, its white space made even."""
    with pytest.raises(SystemExit) as stop:
        main([*argv, "--help"])
    assert stop.value.code == 0
    return " ".join(capsys.readouterr().out.split())


def test_help_of_a_config(capsys):
    """A field without a comment, one before the first heading, a % in a comment: no trouble."""
    text = help_of(lambda argv: train.parse(Config, PRESETS, argv), capsys, "--preset", "large")
    assert "--batch INT (default: 64)" in text
    assert "--fresh 100 % new --save_every INT" in text
    assert "optimization: --lr FLOAT peak learning rate (default: 0.0001)" in text


STAGES = ("prior", "vae", "ddt", "sft", "grpo", "experiments.vqgan", "experiments.dit")
HEADINGS = {"run", "data", "model", "loss", "rollout", "diffusion", "optimization", "evaluation"}


@pytest.mark.parametrize("preset", ["tiny", "small"])
@pytest.mark.parametrize("name", STAGES)
def test_help_of_a_stage(name, preset, capsys):
    """Every field has a comment; --help prints it with the preset's default, under its heading."""
    stage = importlib.import_module(name)
    text = help_of(stage.main, capsys, "--preset", preset)
    notes = train.field_help(stage.Config)
    defaults = stage.Config(**stage.PRESETS[preset])
    headings = [heading for heading, _ in notes.values()]
    starts = [text.index(f" {heading}: --") for heading in dict.fromkeys(headings)]
    assert set(headings) <= HEADINGS and starts == sorted(starts)
    assert list(dict.fromkeys(headings))[:2] == ["run", "data"]
    assert [*notes] == [field.name for field in fields(stage.Config)]
    for field in fields(stage.Config):
        heading, comment = notes[field.name]
        assert comment and not comment.startswith("...")
        section = text[text.index(f" {heading}: --"):]
        if field.type is bool:
            assert f"--{field.name} {comment}" in section
        else:
            default, kind = getattr(defaults, field.name), field.type.__name__.upper()
            assert f"--{field.name} {kind} {comment}" in section
            assert default == "" or f"{comment} (default: {default})" in section


@pytest.mark.parametrize("motion", ["parabola", "collision", "all"])
def test_defaults_of_a_motion(motion, capsys):
    """`--scenario` changes defaults, --help tells them, flags and later stages go by them."""
    def parse(stage, *argv):
        return train.parse(stage.Config, stage.PRESETS, [*argv])

    of_motion = "--scenario", motion
    assert parse(sft).llm == "prior" and parse(sft, *of_motion).llm == "none"
    assert parse(ddt).queries == 3 and parse(ddt, *of_motion).queries == 4
    assert parse(ddt, *of_motion, "--queries", "5").queries == 5
    assert parse(ddt, *of_motion, "--preset", "small") == parse(ddt, "--preset", "small",
                                                                f"--scenario={motion}")
    assert parse(ddt, *of_motion, "--preset", "small").queries == 6
    assert "K (default: 4)" in help_of(lambda argv: parse(ddt, *argv), capsys, *of_motion)

    later = parse(grpo, *of_motion, "--out", "x")
    assert later.steps == 50
    missing = train.stage_config("ddt", ddt.Config, ddt.PRESETS, later)
    assert missing == parse(ddt, *of_motion, "--out", "x")

    with pytest.raises(SystemExit):                         # no preset of that name
        parse(ddt, "--preset", "tiny other")
    assert "tiny other" not in capsys.readouterr().err.split("choose one of")[1]


@pytest.mark.parametrize("preset, said", [("tiny", False), ("large", True)])
def test_a_large_preset_on_a_cpu_is_said(tmp_path, capsys, preset, said):
    fit(tmp_path, Config(preset=preset, steps=1))
    assert ("meant for a GPU" in capsys.readouterr().out) == said


def test_interrupting_says_how_to_go_on(capsys):
    def main():
        raise KeyboardInterrupt
    with pytest.raises(SystemExit) as stop:
        train.cli(main)
    assert stop.value.code == 130 and "goes on" in capsys.readouterr().err


def test_out_of_memory_names_the_flags_that_help(capsys):
    def main():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nMore of it.")
    with pytest.raises(SystemExit) as stop:
        train.cli(main)
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(lines) == 1
    words = ("9 GiB", "--micro_batch", "--checkpointing", "goes on")
    assert all(word in lines[0] for word in words)


# ------------------------------------------------------------------ ranks


def test_shards_cover_every_row_once():
    for n in range(0, 30):
        for size in range(1, 10):
            if n < size:
                with pytest.raises(UserError, match=f"{n} cannot be sharded over {size} ranks"):
                    World(0, size, CPU).shard(torch.arange(n))
                continue
            shards = [World(rank, size, CPU).shard(torch.arange(n)) for rank in range(size)]
            sizes = [len(shard) for shard in shards]
            assert torch.equal(torch.cat(shards), torch.arange(n))
            assert max(sizes) - min(sizes) <= 1


def test_accumulation_steps_are_the_same_on_every_rank():
    for batch in (5, 28, 768):
        for size in (1, 2, 3, 5):
            shards = [World(rank, size, CPU).shard(torch.arange(batch)) for rank in range(size)]
            largest = max(len(shard) for shard in shards)
            for micro_batch in (0, 1, 2, 9, 1000):
                for rows in (1, 8):
                    n = World(0, size, CPU).accumulation_steps(batch, micro_batch, rows)
                    assert n == (math.ceil(largest * rows / micro_batch) if micro_batch else 1)


def test_without_a_process_group():
    x = torch.randn(3, 2)
    assert torch.equal(ALONE.all_reduce(x), x)
    assert torch.equal(torch.cat(ALONE.all_gather(x)), x)
    # else a running mean of losses would keep every step's graph
    assert not ALONE.all_reduce(x.requires_grad_()).requires_grad
    ALONE.barrier()
    model = mlp()
    assert train.distribute(model, ALONE) is model


ROWS = 7                                                    # 3 on one rank, 4 on the other


def step_of(world):
    """One update of the mean loss over ROWS rows -> weights, gradient norm."""
    torch.manual_seed(0)
    x, y, config = torch.randn(ROWS, 4), torch.randn(ROWS, 2), Config(max_grad_norm=0.5)
    model = mlp()
    everywhere = train.distribute(model, world)
    with tempfile.TemporaryDirectory() as folder:
        with train.Run(Path(folder), model, config, world) as run:
            loss = (everywhere(world.shard(x)) - world.shard(y)).square().sum() / ROWS
            (loss * world.size).backward()
            assert run.step(loss)
            return [*model.state_dict().values(), run.line["grad_norm"], run.line["loss"]]


def of_two_ranks(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    world = World(rank, 2, CPU)
    mine = world.shard(torch.arange(ROWS * 2.0).view(ROWS, 2))
    result = {"total": world.all_reduce(mine.sum(0)), "gather": torch.cat(world.all_gather(mine))}
    result |= {f"step{i}": x.clone() for i, x in enumerate(step_of(world))}
    save_file(result, f"{folder}/{rank}.safetensors")
    dist.barrier()
    time.sleep(0.3)                     # gloo aborts a rank that still talks to one that has left
    dist.destroy_process_group()


def test_two_ranks_of_unequal_shards_do_what_one_does(tmp_path):
    spawn(of_two_ranks, 2, str(tmp_path))
    ranks = [load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1)]
    data, alone = torch.arange(ROWS * 2.0).view(ROWS, 2), step_of(ALONE)
    for r in ranks:
        assert torch.equal(r["total"], data.sum(0)) and torch.equal(r["gather"], data)
        for i, x in enumerate(alone):
            torch.testing.assert_close(r[f"step{i}"], x)
            assert torch.equal(r[f"step{i}"], ranks[0][f"step{i}"])


# ------------------------------------------------------------------ order of the data


@pytest.mark.parametrize("n, batch", [(12, 5), (7, 7), (3, 8), (20, 1)])
def test_batch_indices_are_shuffled_epochs(n, batch):
    steps = 3 * n

    def all_indices(seed):
        return torch.cat([train.batch_indices(seed, step, batch, n) for step in range(steps)])
    seen = all_indices(4)
    epochs = seen.view(-1, n)                               # 3 * batch epochs
    assert torch.equal(epochs.sort(1).values, torch.arange(n).expand_as(epochs))
    assert len(epochs.unique(dim=0)) > 1
    for step in reversed(range(steps)):                     # whatever was asked before
        indices = train.batch_indices(4, step, batch, n)
        assert torch.equal(indices, seen[step * batch:(step + 1) * batch])
    assert not torch.equal(all_indices(5), seen)
    by_hand = [train._epoch(4, i // n, n)[i % n].item() for i in range(steps * batch)]
    assert seen.tolist() == by_hand


def test_generators_are_functions_of_their_key():
    keys = [(0, 1), (1, 0), (1, 1), (0, 2), (2, 3)]
    draws = {key: torch.rand(4, generator=train.generator(*key)) for key in keys}
    for key, x in draws.items():
        assert torch.equal(x, torch.rand(4, generator=train.generator(*key)))
    assert len(torch.stack(list(draws.values())).unique()) == 20


# ------------------------------------------------------------------ optimizer


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
        kept = 1 - 0.1 * 0.5 if value.ndim == 2 else 1
        torch.testing.assert_close(value, before[name] * kept)


@pytest.mark.parametrize("limit, buckets", [(1, 6), (20, 4), (1 << 26, 2)])
def test_adamw_is_torchs(limit, buckets):
    """100 steps beside torch.optim.AdamW, in fp32."""
    betas, eps, weight_decay = (0.9, 0.99), 1e-8, 0.1
    ours, theirs = mlp(), mlp()
    optimizer = train.AdamW(ours, betas, eps, weight_decay, limit=limit)
    matrices = [p for p in theirs.parameters() if p.ndim == 2]
    vectors = [p for p in theirs.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay},
              {"params": vectors, "weight_decay": 0.0}]
    other = torch.optim.AdamW(groups, betas=betas, eps=eps)
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
    assert len(optimizer.buckets) == buckets


def test_weights_keep_their_layout():
    """channels_last weights stay so, and get the gradient of their own elements."""
    ours = nn.Conv2d(2, 3, 2).to(memory_format=torch.channels_last)
    theirs = copy.deepcopy(ours)
    optimizer = train.AdamW(ours)
    for p, q in zip(ours.parameters(), theirs.parameters()):
        p.grad = q.grad = torch.randn(p.shape)
    optimizer.step(0.1, torch.tensor(1.0))
    torch.optim.AdamW(theirs.parameters(), 0.1, eps=1e-8, weight_decay=0.0).step()
    assert ours.weight.stride() == theirs.weight.stride() != torch.empty(3, 2, 2, 2).stride()
    for p, q in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(p, q)


def test_bf16_weights_need_masters():
    """At lr 3e-6 they follow fp32 weights with masters, and hardly move without."""
    torch.manual_seed(0)
    start = nn.Linear(64, 64, bias=False)
    nn.init.normal_(start.weight, std=0.02)
    start = start.bfloat16()
    exact, masters, bare = copy.deepcopy(start).float(), copy.deepcopy(start), copy.deepcopy(start)
    of_exact, of_masters = (train.AdamW(model, (0.9, 0.99), 1e-6) for model in (exact, masters))
    naive = torch.optim.AdamW(bare.parameters(), 3e-6, (0.9, 0.99), 1e-6, weight_decay=0.0)
    g = torch.Generator().manual_seed(1)
    direction = torch.randn(64, 64, generator=g)
    for _ in range(100):
        gradient = (direction + 0.1 * torch.randn(64, 64, generator=g)).bfloat16()
        for model in (exact, masters, bare):
            model.weight.grad = gradient.to(model.weight.dtype)
        of_exact.step(3e-6, torch.ones(()))
        of_masters.step(3e-6, torch.ones(()))
        naive.step()
    master = of_masters.buckets[0].master
    torch.testing.assert_close(master, exact.weight.flatten(), rtol=0, atol=1e-8)
    assert torch.equal(masters.weight, exact.weight.bfloat16())

    def moved(model):
        return (model.weight.float() - start.weight.float()).norm().item()
    assert moved(masters) == pytest.approx(moved(exact), rel=0.1)
    assert moved(bare) < 0.3 * moved(exact)


def test_adamw_refuses_another_models_state(tmp_path):
    optimizer = train.AdamW(mlp())
    save_file({k: v.clone() for k, v in optimizer.state().items()}, tmp_path / "a")
    wide = nn.Sequential(nn.Linear(4, 9), nn.LayerNorm(9), nn.GELU(), nn.Linear(9, 2))
    with pytest.raises(ValueError, match="bucket 0 of its optimizer has 48 elements, not 54"):
        train.AdamW(wide).load([tmp_path / "a"])
    with pytest.raises(ValueError, match="its optimizer has 8 tensors, not 24"):
        train.AdamW(mlp(), limit=1).load([tmp_path / "a"])


# ------------------------------------------------------------------ steps


@pytest.mark.parametrize("limit", [0.0, 0.01])
def test_a_step_clips_and_reports(limit, tmp_path):
    config, model = Config(max_grad_norm=limit, lr=0.2, warmup=4), mlp()
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    gradient = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    norm = torch.cat([g.flatten() for g in gradient]).norm().item()
    with train.Run(tmp_path, model, config, ALONE) as run:
        run.current = 1
        loss = model(x).square().sum()
        loss.backward()
        assert run.step(loss, kl=2.0)
        line = {k: float(v) for k, v in run.line.items()}
    expected = {"loss": loss.item(), "grad_norm": norm, "learning_rate": 0.2 * 2 / 4, "skipped": 0,
                "kl": 2.0}
    assert line == pytest.approx(expected) and norm > 1
    matrices, vectors = (bucket.state()["exp_avg"] for bucket in run.optimizer.buckets)
    scale = 0.1 * (limit / norm if limit else 1)
    of_matrices = torch.cat([g.flatten() for g in gradient if g.ndim == 2])
    of_vectors = torch.cat([g.flatten() for g in gradient if g.ndim == 1])
    torch.testing.assert_close(matrices, scale * of_matrices)
    torch.testing.assert_close(vectors, scale * of_vectors)
    assert all(p.grad is None for p in model.parameters())


def test_micro_batches_add_up(tmp_path):
    config = Config(max_grad_norm=0.0)
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    whole = mlp()(x).square().sum().item() / 6
    after = []
    for n in (1, 3):
        model = mlp()
        with train.Run(tmp_path, model, config, ALONE) as run:
            total = 0.0
            for part in run.accumulate(x.tensor_split(n), model):
                loss = model(part).square().sum() / 6
                loss.backward()
                total += loss.detach()
            run.step(total)
            assert run.line["loss"] == pytest.approx(whole)
        after.append(torch.cat([p.flatten() for p in model.parameters()]))
    torch.testing.assert_close(*after)


def test_what_is_not_finite_is_left_out(tmp_path):
    config, model = Config(steps=40), mlp()
    good, bad = torch.ones(1, 4), torch.full((1, 4), math.nan)
    with pytest.raises(UserError) as error, train.Run(tmp_path, model, config, ALONE) as run:
        for step in run:
            before = {k: v.clone() for k, v in model.state_dict().items()}
            fine = step < 8 or step == 17
            loss = model(good if fine else bad).sum()
            loss.backward()
            assert run.step(loss) == fine
            unmoved = all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
            assert unmoved != fine
    words = (str(tmp_path), "10 steps up to 27", "--lr", "checkpoint-00000018")
    assert all(word in str(error.value) for word in words)
    lines = log_of(tmp_path)
    skipped = [0] * 8 + [*range(1, 10)] + [0] + [*range(1, 10)]
    assert [line["skipped"] for line in lines] == skipped
    assert lines[8]["loss"] == "nan"


def test_a_step_that_breaks_the_weights_ends_the_run(tmp_path):
    """
    Adam with eps 0 divides 0 by 0 where a gradient is 0. Loss and gradient are finite; the weights
    that come out are not, and no checkpoint of them pushes out the good ones.
    """
    model, config = mlp(), Config(eps=0.0, save_every=1)
    with pytest.raises(UserError) as error, train.Run(tmp_path, model, config, ALONE) as run:
        for step in run:
            loss = model(torch.ones(1, 4)).square().sum()
            loss.backward()
            if step == 4:
                for p in model.parameters():
                    p.grad.zero_()
                for bucket in run.optimizer.buckets:
                    for x in bucket.adamw.state[bucket.master].values():
                        x.zero_()
            assert run.step(loss)
    assert step == 4
    words = (str(tmp_path), "step 4", "weights that are not finite", "--lr", "--eps (now 0.0)",
             "checkpoint-00000004")
    assert all(word in str(error.value) for word in words)
    assert [path.name[-1] for path in checkpoints(tmp_path)] == ["3", "4"]


@pytest.mark.parametrize("bad", [1, 3, 9])
def test_a_run_whose_last_loss_is_not_finite_has_failed(tmp_path, bad):
    """Fewer than PATIENCE bad steps at the end; and calling it again makes it no better."""
    for first in (0, 6 if bad > 1 else 9):
        model, config = mlp(), Config(steps=10)
        with pytest.raises(UserError, match="the loss of the last step is not finite") as error:
            with train.Run(tmp_path, model, config, ALONE) as run:
                assert run.first == (first if bad < 9 else 0)
                for step in run:
                    x = math.nan if step >= 10 - bad else 1.0
                    loss = model(torch.full((1, 4), x)).sum()
                    loss.backward()
                    run.step(loss)
    assert "--fresh" in str(error.value)
    assert max([0, *(int(path.name[-8:]) for path in checkpoints(tmp_path))]) <= 10 - bad


def test_one_bad_gradient_at_the_end_is_not_the_end(tmp_path):
    """The loss is finite: the weights are those of the step before."""
    model = mlp()
    with train.Run(tmp_path, model, Config(), ALONE) as run:
        for step in run:
            loss = model(torch.ones(1, 4)).sum()
            loss.backward()
            if step == 9:
                model[0].weight.grad[0, 0] = math.inf
            assert run.step(loss) == (step < 9)
    assert [line["skipped"] for line in log_of(tmp_path)] == [0] * 9 + [1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_the_run_after_its_step(tmp_path, number, request):
    before = signal.getsignal(number)
    request.addfinalizer(lambda: signal.signal(number, before))
    before_run = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    signal.signal(number, before_run)                       # nohup pytest ignores SIGHUP
    model, config = mlp(), Config(save_every=100)
    with pytest.raises(KeyboardInterrupt), train.Run(tmp_path, model, config, ALONE) as run:
        for step in run:
            if step == 4:
                os.kill(os.getpid(), number)
            loss = model(torch.ones(1, 4)).sum()
            loss.backward()
            run.step(loss)
    assert step == 4 and signal.getsignal(number) == before_run
    saved = [path.name for path in checkpoints(tmp_path)]
    assert saved == ["checkpoint-00000004", "checkpoint-00000005"]      # at once, after the step
    assert fit(tmp_path, config)[1] == 5


# ------------------------------------------------------------------ log


def log_of(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_log_has_every_step_once(tmp_path):
    for first, last in ((0, 7), (6, 9)):                # killed in step 7, with a checkpoint at 6
        model = mlp()
        with train.Run(tmp_path, model, Config(steps=9), ALONE) as run:
            assert run.first == first
            for step in run:
                if step == last:
                    break
                run.log(value=torch.tensor(step / 3), run=first, name="x")
    lines = log_of(tmp_path)
    assert [line["step"] for line in lines] == list(range(9))
    assert [line["run"] for line in lines] == [0] * 6 + [6] * 3
    thirds = [step / 3 for step in range(9)]
    assert [line["value"] for line in lines] == pytest.approx(thirds, rel=1e-5)
    assert all(set(line) == {"step", "value", "run", "name", "step_time"} for line in lines)
    assert all(line["step_time"] >= 0 for line in lines)
    with train.Run(tmp_path, mlp(), Config(steps=9, fresh=True), ALONE) as run:
        for step in run:                                    # the first step starts a new log
            assert len(log_of(tmp_path)) == 9 - 8 * step
            if step == 1:
                break


def test_a_new_run_does_not_read_the_old_log(tmp_path):
    """Whatever is in it: a damaged log must not stop --fresh."""
    (tmp_path / "log.jsonl").write_bytes(b"\xff\xfe\x00 no text")
    with train.Run(tmp_path, mlp(), Config(steps=2, fresh=True), ALONE) as run:
        for step in run:
            pass
    assert [line["step"] for line in log_of(tmp_path)] == [0, 1]


def test_a_damaged_log_does_not_stop_a_run(tmp_path, capsys):
    """It starts again with the step that the run goes on with."""
    fit(tmp_path, Config(), stop=8)
    (tmp_path / "log.jsonl").write_bytes(b"\xff\xfe\x00 no text")
    assert fit(tmp_path, Config())[1] == 6
    assert [line["step"] for line in log_of(tmp_path)] == [6, 7, 8, 9]
    assert "log.jsonl is damaged" in capsys.readouterr().out


def test_a_log_that_cannot_be_written_does_not_stop_a_run(tmp_path, capsys):
    with train.Run(tmp_path, mlp(), Config(), ALONE) as run:
        for step in run:
            if step == 3:
                run.file = open("/dev/full", "a")
            run.log(value=1.0)
    error = capsys.readouterr().err
    assert step == 9 and "could not write /dev/full (No space left on device)" in error


def test_log_is_written_step_by_step(tmp_path):
    with train.Run(tmp_path, mlp(), Config(), ALONE) as run:
        for step in run:
            if step == 1:
                assert json.loads((tmp_path / "log.jsonl").read_text())["value"] == 2.0
            run.log(value=2.0)


def test_only_rank_0_writes_the_log(tmp_path):
    config = Config(save_every=100, steps=200)
    with train.Run(tmp_path, mlp(), config, World(1, 2, CPU)) as run:
        for step in run:
            run.log(value=1.0)
            if step == 3:
                break
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------ the form of the project


def test_lines_fit_in_100_columns():
    long = []
    for folder in ("", "experiments", "tests"):
        for path in sorted((ROOT / folder).glob("*.py")):
            for i, line in enumerate(path.read_text().splitlines()):
                if len(line) > 100:
                    long.append(f"{path.relative_to(ROOT)}:{i + 1}")
    assert not long


@pytest.mark.parametrize("name", STAGES)
def test_the_loop_is_in_sight(name):
    """Every stage's file holds its own training loop."""
    text = (ROOT / f"{name.replace('.', '/')}.py").read_text()
    order = ["with train.Run(", "for step in run:", ".backward()", "run.step("]
    places = [text.index(line) for line in order]
    assert places == sorted(places)


def test_the_two_commands_are_in_the_readme():
    lines = [line.strip() for line in (ROOT / "README.md").read_text().splitlines()]
    assert "pip install -r requirements.txt && torchrun grpo.py" in lines
    assert "pip install -r requirements.txt && pytest" in lines
