"""
Runs on several ranks: what kills, ranks, micro-batches and a rank's death do to them. See kills.py,
which also runs alone, with more kills.

    pytest tests/test_scale.py
"""
import os
import random
import signal
import time
from pathlib import Path

import kills
import pytest
import torch
from safetensors.torch import load_file

from checkpoint import checkpoints


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Path:
    """A folder with every stage trained, in a few steps."""
    out = tmp_path_factory.mktemp("done")
    kills.whole_run(out)
    return out


@pytest.mark.parametrize("name, ranks, n", [
    ("llm", 1, 2), ("llm", 2, 2), ("vae", 1, 2), ("ddt", 1, 4), ("ddt", 2, 3), ("vqgan", 2, 2),
    ("sft", 1, 3), ("sft", 2, 3), ("grpo", 1, 3), ("grpo", 2, 3)])
def test_killed_runs_end_as_if_nothing_had_been(done, name, ranks, n):
    count = kills.survive(name, ranks, n, done, random.Random(0))
    assert count["kills"] == n


@pytest.mark.parametrize("name, micro_batch", [
    ("llm", 2), ("ddt", 2), ("sft", 1), ("grpo", 2), ("dit", 1)])
def test_ranks_and_micro_batches_do_not_change_the_weights(done, tmp_path, name, micro_batch):
    """
    On one rank, in micro-batches, and on two ranks with unequal shards and in micro-batches. (A
    large eps: Adam divides rounding by itself.)
    """
    ways = {"alone": (1, 1000), "micro-batches": (1, micro_batch), "ranks": (2, micro_batch)}
    weights = {}
    for way, (ranks, n) in ways.items():
        out = kills.prepare(name, done, tmp_path / way)
        finished = kills.run(name, out, ranks, steps=10, eps=1e-2, save_every=100, micro_batch=n)
        assert finished, kills.printed(out)
        weights[way] = load_file(out / name / "model.safetensors")
    start, alone = load_file(done / name / "model.safetensors"), weights["alone"]
    moved = [(start[k] - v).abs().max() for k, v in alone.items() if v.is_floating_point()]
    assert max(moved) > 1e-4
    for way in ("micro-batches", "ranks"):
        for key, value in alone.items():
            torch.testing.assert_close(weights[way][key], value, rtol=1e-6, atol=1e-6,
                                       msg=lambda text: f"{way}, {key}: {text}")


def test_a_dead_rank_ends_the_others(done, tmp_path):
    out = kills.prepare("sft", done, tmp_path / "run")
    alive, dead = kills.start("sft", out, 2, steps=10_000)
    while not checkpoints(out / "sft") and alive.is_alive():
        time.sleep(0.01)
    os.kill(dead.pid, signal.SIGKILL)
    begin = time.monotonic()
    alive.join(60)
    assert alive.exitcode == 1 and time.monotonic() - begin < 60
    text = (out / "printed0").read_text()
    assert "another rank died or hangs" in text and "goes on from the last checkpoint" in text
    assert "Traceback" not in text
