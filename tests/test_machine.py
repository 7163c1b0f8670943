"""
Machines as they are: slow disks, file systems without locks, signals, cores that may not be used,
terminals and locales that are not UTF-8, GPUs without bf16, no C compiler.

    pytest tests/test_machine.py
"""
import ast
import datetime
import errno
import fcntl
import importlib
import io
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import packaging.requirements
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from test_train import ALONE, CPU, ROOT, Config, fit, mlp

import checkpoint
import kills
import train
from checkpoint import UserError, checkpoints
from train import World

# ------------------------------------------------------------------ slow disks


class Counted:
    """An open safetensors file that adds up in `read` how many elements are taken out of it."""

    def __init__(self, path, framework, read):
        self.file, self.read = safe_open(path, framework), read

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def keys(self):
        return self.file.keys()

    def get_tensor(self, name):
        x = self.file.get_tensor(name)
        self.read.append(x.numel())
        return x

    def get_slice(self, name):
        whole, read = self.file.get_slice(name), self.read

        class Slice:
            get_shape = whole.get_shape

            def __getitem__(self, index):
                read.append(whole[index].numel())
                return whole[index]
        return Slice()


@pytest.mark.parametrize("limit", [1 << 26, 1])             # a bucket each for 2 kinds, 6 tensors
@pytest.mark.parametrize("then, now", [(2, 2), (8, 3), (1, 4), (4, 1), (5, 7), (3, 64)])
def test_each_rank_reads_its_own_slice(tmp_path, monkeypatch, then, now, limit):
    """Saved by `then` ranks, read by `now`: every element once, and in its place."""
    model = mlp()
    whole = {}                                              # <bucket>.<name> -> (n,)
    shards = [{} for _ in range(then)]
    for i, bucket in enumerate(train.AdamW(model, limit=limit).buckets):
        for name in ("master", "exp_avg", "exp_avg_sq"):
            x = whole[f"{i}.{name}"] = torch.randn(bucket.n)
            size = -(-bucket.n // then)
            padded = torch.cat([x, torch.zeros(then * size - bucket.n)])
            for rank, part in enumerate(padded.split(size)):
                shards[rank] |= {f"{i}.{name}": part.clone(), f"{i}.step": torch.tensor(7.0)}
    paths = [tmp_path / f"{rank}.safetensors" for rank in range(then)]
    for path, tensors in zip(paths, shards):
        save_file(tensors, path)

    read, states = [], []
    monkeypatch.setattr(train, "safe_open", lambda *args: Counted(*args, read))
    for rank in range(now):
        optimizer = train.AdamW(model, rank=rank, ranks=now, limit=limit)
        optimizer.load(paths)
        states.append(optimizer.state())
    for name, x in whole.items():
        assert torch.equal(torch.cat([state[name] for state in states])[:len(x)], x)
    steps = {float(state[name]) for state in states for name in state if name.endswith("step")}
    assert steps == {7.0}
    n, buckets = sum(p.numel() for p in model.parameters()), len(whole) // 3
    assert sum(read) == 3 * n + now * buckets               # and the number of steps on each rank


def slow_rank(rank, folder, port):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port)}
    train.STEP_TIMEOUT = datetime.timedelta(seconds=2)
    world = train.start(0)
    config = Config(batch=4, save_every=1, steps=4)
    fit(Path(folder), config, 2, world=world)
    plain = train.AdamW.load

    def load(self, paths):                                  # from a slow disk
        time.sleep(3 * rank)
        plain(self, paths)
    train.AdamW.load = load
    assert fit(Path(folder), config, world=world)[1] == 2
    world.barrier()
    Path(folder, f"done{rank}").touch()
    world.barrier()
    train.dist.destroy_process_group()


def test_a_slow_disk_costs_time_not_the_run(tmp_path):
    """One rank loads its checkpoint for longer than a step may take."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    processes = [kills.context().Process(target=slow_rank, args=(rank, str(tmp_path), port))
                 for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert len(list(tmp_path.glob("done*"))) == 2


class OneOf(World):
    """A rank of several, whose all_gather gives what it gave and what the others `say`."""
    said = ()

    def all_gather(self, x):
        return [x, *self.said]

    def barrier(self):
        pass


def test_a_checkpoint_is_checked_once_by_all_ranks_together(tmp_path, monkeypatch):
    fit(tmp_path, Config(), stop=4)
    path = checkpoints(tmp_path)[-1]
    checked, plain = [], checkpoint.checksum
    monkeypatch.setattr(checkpoint, "checksum", lambda p: checked.append(p.name) or plain(p))
    for rank in range(3):
        assert checkpoint.verify(path, OneOf(rank, 3, CPU)) == ""
    assert sorted(checked) == ["model.safetensors", "optimizer-0.safetensors"]
    (path / "manifest.json").unlink()           # seen by one rank: all must come to the same end
    other = OneOf(1, 3, CPU)
    other.said = ["rank 2 saw it"]
    assert "manifest.json" in checkpoint.verify(path, other)


# ------------------------------------------------------------------ locks


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL])
def test_a_file_system_without_locks(tmp_path, monkeypatch, capsys, number):
    def flock(*_):
        raise OSError(number, os.strerror(number))
    monkeypatch.setattr(fcntl, "flock", flock)
    train.start(0, str(tmp_path / "run"))
    out = capsys.readouterr().out
    assert str(tmp_path / "run") in out and "cannot be locked" in out
    assert os.strerror(number) in out and len(out.splitlines()) == 1


def test_without_fcntl(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "fcntl", None)
    with pytest.raises(UserError, match="Linux or macOS"):
        train.start(0, str(tmp_path))


def test_a_folder_that_not_all_machines_share(tmp_path):
    here = OneOf(1, 2, CPU)
    checkpoint.lock(tmp_path, OneOf(0, 2, CPU))
    here.said = [(tmp_path / ".lock").read_text(encoding="utf-8")]
    checkpoint.lock(tmp_path, here)
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(UserError, match="not the same folder"):
        checkpoint.lock(tmp_path / "elsewhere", here)


# ------------------------------------------------------------------ signals


def send(number, after=0.0):
    """The signal, `after` so many seconds by the clock of train."""
    clock = time.monotonic
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.time, "monotonic", lambda: clock() + after)
        os.kill(os.getpid(), number)


def signalled(folder, monkeypatch, signals, **fields):
    """A run with signals {step: (number, after)} -> its last step, what alarm was called with."""
    alarms, model = [], mlp()
    monkeypatch.setattr(signal, "alarm", alarms.append)
    step = None
    with train.Run(folder, model, Config(save_every=100, **fields), ALONE) as run:
        try:
            for step in run:
                for arguments in signals.get(step, ()):
                    send(*arguments)
                loss = model(torch.ones(1, 4)).sum()
                loss.backward()
                run.step(loss)
                run.log(finished=1.0)
        except KeyboardInterrupt:
            pass
        run.stopping = False                                # or leaving raises once more
    return step, alarms


def test_a_repeated_signal_is_one(tmp_path, monkeypatch):
    """torchrun and Slurm signal a rank that the terminal or Slurm has signalled already."""
    signals = {4: [(signal.SIGTERM,), (signal.SIGTERM, 0.1), (signal.SIGHUP, 0.2)]}
    step, alarms = signalled(tmp_path, monkeypatch, signals)
    assert step == 4 and alarms == [train.STOP_TIMEOUT, 0]
    assert [path.name[-2:] for path in checkpoints(tmp_path)] == ["04", "05"]


def test_a_second_signal_ends_at_once(tmp_path, monkeypatch):
    """What the steps before did was saved at the first."""
    signals = {4: [(signal.SIGTERM,), (signal.SIGINT, 5)]}
    step, alarms = signalled(tmp_path, monkeypatch, signals)
    assert step == 4 and alarms == [train.STOP_TIMEOUT, 30]
    assert [path.name[-2:] for path in checkpoints(tmp_path)] == ["04"]


def test_a_signal_in_the_first_step_ends_at_once(tmp_path, monkeypatch):
    """There is nothing to save yet, and torch.compile may take minutes, or forever."""
    step, alarms = signalled(tmp_path, monkeypatch, {0: [(signal.SIGTERM,)]})
    assert step == 0 and alarms == [30] and not checkpoints(tmp_path)


def test_a_signal_after_the_last_step_ends_the_stage(tmp_path):
    with pytest.raises(KeyboardInterrupt), train.Run(tmp_path, mlp(), Config(), ALONE) as run:
        for step in run:
            run.optimizer.updates += 1
        os.kill(os.getpid(), signal.SIGTERM)
    assert step == Config().steps - 1


def test_nohup_is_respected(tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with train.Run(tmp_path, mlp(), Config(), ALONE):
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def hanging(folder):
    """A run whose step 3 waits for what never comes, as for a compiler that a signal has ended."""
    train.STOP_TIMEOUT = 1
    with train.Run(Path(folder), mlp(), Config(save_every=100), ALONE) as run:
        for step in run:
            if step == 3:
                os.kill(os.getpid(), signal.SIGTERM)
                threading.Event().wait()
            run.optimizer.updates += 1


def test_a_run_that_hangs_after_a_signal_is_ended(tmp_path):
    process = kills.context().Process(target=hanging, args=(str(tmp_path),))
    process.start()
    process.join(30)
    assert process.exitcode == -signal.SIGALRM
    assert [path.name[-2:] for path in checkpoints(tmp_path)] == ["03"]


# ------------------------------------------------------------------ the environment


def environment(monkeypatch, **variables):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR",
                 "MASTER_PORT", "OMP_NUM_THREADS", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


HOST = {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.mark.parametrize("variables, expected", [
    ({}, (0, 1, 0, 1)),
    ({"WORLD_SIZE": ""}, (0, 1, 0, 1)),
    ({"WORLD_SIZE": "1", "RANK": "0"}, (0, 1, 0, 1)),
    (HOST | {"WORLD_SIZE": "2", "RANK": "1"}, (1, 2, 0, 2)),
    (HOST | {"WORLD_SIZE": "16", "RANK": "9", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "8"},
     (9, 16, 1, 8)),
])
def test_places_of_ranks(monkeypatch, variables, expected):
    environment(monkeypatch, **variables)
    assert train.place() == expected


@pytest.mark.parametrize("culprit, variables", [
    ("WORLD_SIZE=abc", {"WORLD_SIZE": "abc"}),
    ("WORLD_SIZE=1.5", {"WORLD_SIZE": "1.5"}),
    ("WORLD_SIZE=0", {"WORLD_SIZE": "0"}),
    ("WORLD_SIZE=-2", {"WORLD_SIZE": "-2"}),
    ("no RANK", HOST | {"WORLD_SIZE": "2"}),
    ("no MASTER_ADDR", {"WORLD_SIZE": "2", "RANK": "0", "MASTER_PORT": "29500"}),
    ("no MASTER_PORT", {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost"}),
    ("RANK=3", {"RANK": "3"}),
    ("RANK=2", HOST | {"WORLD_SIZE": "2", "RANK": "2"}),
    ("RANK=x", {"RANK": "x"}),
    ("LOCAL_RANK=8", HOST | {"WORLD_SIZE": "16", "RANK": "8", "LOCAL_RANK": "8",
                             "LOCAL_WORLD_SIZE": "8"}),
    ("rank 1", {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "x"}),
])
def test_a_stray_environment_gets_one_line(monkeypatch, culprit, variables):
    environment(monkeypatch, **variables)
    with pytest.raises(UserError) as error:
        train.start(0)
    text = str(error.value)
    assert culprit in text and "torchrun" in text and "unset" in text and "\n" not in text


# ------------------------------------------------------------------ cores


@pytest.mark.parametrize("files, expected", [
    ({}, 8),
    ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "250000 100000"}, 2),
    ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "50000 100000"}, 1),
    ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "max 100000"}, 8),
    ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "3200000 100000"}, 8),
    # the limit of a group above; the group itself is not to be seen from here
    ({"proc/self/cgroup": "0::/slurm/job_1/step_0", "sys/fs/cgroup/slurm/job_1/cpu.max":
      "300000 100000", "sys/fs/cgroup/slurm/job_1/step_0/cpu.max": "max 100000"}, 3),
    ({"proc/self/cgroup": "5:memory:/docker/a\n4:cpu,cpuacct:/docker/a",
      "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "400000",
      "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"}, 4),
    ({"proc/self/cgroup": "4:cpu,cpuacct:/", "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
      "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"}, 8),
])
def test_cores_that_may_be_used(tmp_path, monkeypatch, files, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n", encoding="utf-8")
    assert train.cores(tmp_path) == expected


def threads(monkeypatch, default=1, **variables):
    """The number of threads that train.start sets, on 8 cores."""
    environment(monkeypatch, **variables)
    chosen = [default]
    monkeypatch.setattr(train, "cores", lambda: 8)
    monkeypatch.setattr(torch, "get_num_threads", lambda: default)
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr(train.dist, "init_process_group", lambda *a, **k: None)
    monkeypatch.setattr(train.dist, "new_group", lambda *a, **k: None)
    train.start(0)
    return chosen[-1]


def test_threads(monkeypatch):
    two = HOST | {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    assert threads(monkeypatch, **two) == 4
    assert threads(monkeypatch, **two | {"LOCAL_WORLD_SIZE": "16"}) == 1
    assert threads(monkeypatch, default=32) == 8            # torch does not see a quota
    assert threads(monkeypatch, default=4) == 4             # a thread per core, not per hyperthread
    for number in ("1", "3"):                               # the user's
        default = int(number)
        assert threads(monkeypatch, default, OMP_NUM_THREADS=number, **two) == default
    by_torchrun = two | {"TORCHELASTIC_RUN_ID": "none"}
    assert threads(monkeypatch, 3, OMP_NUM_THREADS="3", **by_torchrun) == 3
    for started_with, expected in ((b"A=b\0", 4), (b"A=b\0OMP_NUM_THREADS=1\0", 1)):
        monkeypatch.setattr(Path, "read_bytes", lambda _: started_with)
        assert threads(monkeypatch, OMP_NUM_THREADS="1", **by_torchrun) == expected


# ------------------------------------------------------------------ GPUs and compilers


@pytest.mark.parametrize("device, capable, expected", [
    ("cuda", True, True), ("cuda", False, False), ("cpu", True, False)])
def test_bf16_only_where_the_gpu_has_it(monkeypatch, device, capable, expected):
    asked, used = [], []
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **k: asked.append(k) or capable)
    monkeypatch.setattr(torch, "autocast", lambda *a, enabled: used.append((*a, enabled)))
    World(0, 1, torch.device(device)).autocast()
    assert used == [(device, torch.bfloat16, expected)]
    assert asked == [{"including_emulation": False}] * (device == "cuda")


def test_without_a_compiler(monkeypatch, capsys):
    """Training goes on uncompiled, and says so once."""
    def no_compiler(function):
        raise RuntimeError("Failed to find C compiler. Please specify via CC.\nMore of it.")
    monkeypatch.setattr(torch, "compile", no_compiler)
    train.can_compile.cache_clear()
    for _ in range(2):
        assert World(0, 1, torch.device("cuda")).compile(abs) is abs
    out = capsys.readouterr().out
    assert "Failed to find C compiler" in out and len(out.splitlines()) == 1
    train.can_compile.cache_clear()


@pytest.mark.parametrize("device, compiles, expected", [
    ("cuda", True, True), ("cuda", False, False), ("cpu", True, False)])
def test_blocks_are_compiled_on_a_gpu_for_training(monkeypatch, device, compiles, expected):
    """And where no gradients are taken, the function itself runs."""
    options = []
    monkeypatch.setattr(torch, "compile", lambda f, **o: options.append(o) or (lambda x: "fast"))
    monkeypatch.setattr(train, "can_compile", lambda *_: True)
    block = World(0, 1, torch.device(device), compiles).compile(lambda x: "plain")
    assert block(1) == ("fast" if expected else "plain")
    assert options == [{"dynamic": False}] * expected
    with torch.no_grad():
        assert block(1) == "plain"


@pytest.mark.parametrize("name", ["ddt", "sft", "grpo", "experiments.dit"])
def test_compile_0_switches_it_off(name, monkeypatch):
    stage, asked = importlib.import_module(name), []

    def start(seed, out, compiles):
        asked.append(compiles)
        raise KeyboardInterrupt
    monkeypatch.setattr(train, "start", start)
    for argv in ([], ["--compile", "0"]):
        with pytest.raises(KeyboardInterrupt):
            stage.main(argv)
    assert asked == [1, 0]


# ------------------------------------------------------------------ text


def test_a_terminal_that_cannot_print_a_letter(monkeypatch):
    terminal = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(terminal, "ascii", line_buffering=True))
    train.cli(lambda: print("a caf\xe9, \u2192"))
    assert terminal.getvalue() == b"a caf?, ?\n"
    monkeypatch.setattr(sys, "stdout", io.StringIO())       # as in a notebook
    train.cli(lambda: print("\u2192"))


def test_every_text_file_is_utf8():
    """Whatever the locale: no text file is opened without its encoding."""
    for path in [*ROOT.glob("*.py"), *ROOT.glob("experiments/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1]
            if name == "open" and ast.unparse(node.func) == "open":
                mode = node.args[1].value if len(node.args) > 1 else "r"
            elif name in ("read_text", "write_text") and "." in ast.unparse(node.func):
                mode = "r"
            else:
                continue
            encodings = [k.value.value for k in node.keywords if k.arg == "encoding"]
            where = f"{path.name}:{node.lineno}"
            assert "b" in mode or encodings == ["utf-8"], f"{where} opens a text in the locale"


# ------------------------------------------------------------------ requirements


@pytest.mark.parametrize("version, kept", [
    ("2.11.0", True), ("2.11.0+cu128", True), ("2.12.1+cu130", True), ("2.13.0+cpu", True),
    ("2.13.0+rocm7.1", True), ("2.11.0a0+1234.nv26.2", True), ("2.10.0+cu128", False),
    ("2.14.0", False)])
def test_requirements_keep_an_installed_torch(version, kept):
    line = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()[0]
    requirement = packaging.requirements.Requirement(line.split("#")[0])
    assert requirement.name == "torch" and requirement.specifier.contains(version) == kept
