"""
gpu.sh as far as it goes without a GPU, and what it calls: the sweep's variants, the table of times.
The parts themselves: REHEARSE=1 tests/gpu.sh.

    pytest tests/test_gpu_sh.py
"""
import dataclasses
import json
import os
import re
import subprocess
from pathlib import Path

import bench
import pytest

import grpo
import sft
import train
import vae
from checkpoint import UserError
from experiments import sweep, times

SCRIPT = Path(__file__).with_name("gpu.sh")
TEXT = SCRIPT.read_text(encoding="utf-8")
PARTS = re.search(r"^PARTS=\((.*)\)$", TEXT, re.MULTILINE)[1].split()


def gpu_sh(*args, **variables) -> subprocess.CompletedProcess:
    return subprocess.run(["bash", SCRIPT, *args], capture_output=True, text=True,
                          env=os.environ | variables)


def test_syntax():
    assert subprocess.run(["bash", "-n", SCRIPT]).returncode == 0


def test_every_part_has_a_function_a_limit_and_a_line_in_the_head():
    limits = dict(re.findall(r"\[(\w+)\]=(\d+)", TEXT))
    assert PARTS == [*limits] == ["tests", "bench", "small", "sweep"]
    for part, limit in limits.items():
        assert f"\npart_{part}() {{" in TEXT
        assert re.search(rf"^#     tests/gpu.sh {part} .*\({limit} s\)$", TEXT, re.MULTILINE)


def test_an_unknown_part_is_named(tmp_path):
    run = gpu_sh("tests", "smal", OUT=str(tmp_path / "out"))
    assert run.returncode == 2 and "'smal'" in run.stderr and "small" in run.stderr
    assert not (tmp_path / "out").exists()


def test_wheels_that_are_not_there(tmp_path):
    run = gpu_sh("tests", WHEELS=str(tmp_path), OUT=str(tmp_path / "out"))
    assert run.returncode == 2 and f"wheels in {tmp_path}" in run.stderr
    assert not (tmp_path / "out").exists()


def test_without_a_gpu_it_says_so(tmp_path):
    run = gpu_sh(OUT=str(tmp_path / "out"), CUDA_VISIBLE_DEVICES="")
    assert run.returncode == 2 and "no CUDA GPU" in run.stderr and "REHEARSE=1" in run.stderr
    assert not (tmp_path / "out").exists()


def test_short_repeats(monkeypatch):
    """--short: two calls each, and of the largest model fewer tokens; --small wins over nothing."""
    monkeypatch.setattr(bench, "MOST_REPEATS", 1)
    calls = []
    bench.alternate({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 9)
    assert calls == ["a", "b", "a", "b"]


# ------------------------------------------------------------------ sweep.py


@pytest.mark.parametrize("variant", [*sweep.SFT, *sweep.GRPO])
def test_variants(variant):
    """Each is a configuration of its stage, and differs from the first one of its round."""
    module, first = (sft, next(iter(sweep.SFT))) if variant in sweep.SFT else \
        (grpo, next(iter(sweep.GRPO)))
    config = sweep.stage_config(sweep.Config(), variant, Path("x"))
    base = sweep.stage_config(sweep.Config(), first, Path("x"))
    module.check_config(dataclasses.replace(config, tokenizer="ddt"))
    assert (config != base) == (variant != first)
    small = sweep.stage_config(sweep.Config(small=True), variant, Path("x"), steps=2)
    assert small.steps == 2 and (small.batch if variant in sweep.SFT else small.prompts) == 2


def test_the_sweep_asks_what_it_should():
    """Sizes, near 3, 5, 7, learning rates; 16 x 16 and 64 x 8 rollouts; 100 and 300 steps."""
    assert len(sweep.SFT) == len(sweep.GRPO) == 6
    made = [sweep.stage_config(sweep.Config(), name, Path("x")) for name in sweep.SFT]
    assert {c.near for c in made} == {3, 5, 7}
    assert len({c.hidden for c in made}) == 3 and len({c.lr for c in made}) == 2
    made = [sweep.stage_config(sweep.Config(), name, Path("x")) for name in sweep.GRPO]
    assert {(c.prompts, c.group) for c in made} == {(16, 8), (16, 16), (64, 8)}
    assert {c.steps for c in made} == {100, 300} and len({c.lr for c in made}) == 3


def test_sweep_refuses(tmp_path):
    with pytest.raises(UserError, match="choose another --out"):
        sweep.main(["--out", str(tmp_path)])
    with pytest.raises(UserError, match="no such variant"):
        sweep.main(["--only", "SFT 2M"])


# ------------------------------------------------------------------ times.py


def test_times_of_a_run(tmp_path):
    """By hand: ends of stages, 3 steps of 10, 20 and 90 ms."""
    def write(name: str, text: str, at: float) -> None:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
        os.utime(tmp_path / name, (at, at))
    config = vae.Config(steps=3)
    steps = [json.dumps({"step": i, "step_time": s}) for i, s in enumerate((0.09, 0.01, 0.02))]
    write(".lock", "", 1000)
    write("vae/log.jsonl", "\n".join(steps) + "\n", 1003)
    write("vae/trained.json", json.dumps(dataclasses.asdict(config)), 1004.5)
    write("sft/codes.txt", "", 1010)
    lines = [line.split() for line in times.table(tmp_path).splitlines()]
    flops = times.plan.plan_vae(config, 1).flops
    assert lines[1][:5] == ["VAE", "4.5", "0.1", "3", "20.0"]
    assert float(lines[1][5]) == pytest.approx(flops / 1e12, abs=6e-4)
    assert float(lines[1][6]) == pytest.approx(flops / 1e12 / 0.02, abs=0.06)
    assert lines[2] == ["tokens", "of", "the", "clips", "5.5"]
    assert lines[3] == ["in", "all", "10.0"] and len(lines) == 4
    with pytest.raises(UserError, match="not a run folder"):
        times.table(tmp_path / "vae")


def test_small_is_one_model():
    """sft.py's model has prior.py's size, from random weights too; it is of all motions."""
    import prior
    config = train.parse(sft.Config, sft.PRESETS, ["--preset", "small"])
    of_prior = prior.Config(**prior.PRESETS["small"])
    for name in ("hidden", "ffn", "layers", "heads", "kv_heads", "dtype"):
        assert getattr(config, name) == getattr(of_prior, name)
    assert config.scenario == "all"
