"""
What the training loops share: flags from a dataclass, ranks, AdamW with sharded fp32 state, and
Run, the toolbox of a loop.

A stage's loop, where a rank holds b of the B elements of a batch:

    config = train.parse(Config, PRESETS, argv)             # flags -> dataclass
    world = train.start(config.seed, config.out)            # rank, size, device
    loss_of = train.distribute(Loss(model), world)          # DDP if there are several ranks
    n = world.accumulation_steps(B, config.micro_batch)     # micro-batches per step
    with train.Run(folder, model, config, world) as run:    # resumes, logs, saves, stops on SIGTERM
        for step in run:
            index = world.shard(train.batch_indices(config.seed, step, B, len(data)))     # (b,)
            total = 0.0
            for x in run.accumulate(data[index].tensor_split(n), loss_of):
                loss = loss_of(x).sum() / B                 # this rank's part of the batch's mean
                (loss * world.size).backward()              # times ranks: a sum, not DDP's average
                total += loss.detach()
            run.step(total)                                 # clip, AdamW, zero_grad, log

What a step draws is a function of (seed, step): the generator is made anew in each. Thus a run that
was killed and resumed draws what it would have drawn, and any number of ranks sees the same batch.

Source of the sharded optimizer: ZeRO stage 1, Rajbhandari et al. 2020,
https://arxiv.org/abs/1910.02054.
"""
import argparse
import atexit
import contextlib
import dataclasses
import datetime
import difflib
import functools
import inspect
import json
import math
import os
import re
import signal
import sys
import threading
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Iterable, Iterator

import numpy as np
import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn
from tqdm import tqdm

import checkpoint
import sim
from checkpoint import UserError, check


def cli(main) -> None:
    """Runs a script's main(). Errors that the user can put right print one line, no traceback."""
    script = Path(sys.argv[0]).name
    go_on = "The same command (without --fresh) goes on from the last checkpoint."

    def stop(code: int, text: str) -> None:
        sys.stderr.write(f"\n{text}\n")
        sys.exit(code)
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:   # as a script sets it while it imports
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if hasattr(sys.stdout, "reconfigure"):  # not in a notebook
        sys.stdout.reconfigure(errors="replace")        # a letter that the terminal lacks is a "?"
    try:
        main()
    except (UserError, OSError) as error:   # OSError: a full disk, a file that vanished
        stop(2, f"{script}: {error}")
    except (MemoryError, RuntimeError) as error:
        if out_of_memory(error):
            stop(2, f"{script}: {str(error).splitlines()[0]} Try smaller sizes, --micro_batch 1, "
                 f"--checkpointing where there is such a flag, or more ranks. {go_on}")
        # of gloo and NCCL: the other end is gone or silent
        lost = ("closed by peer", "reset by peer", "Broken pipe", "imed out", "timeout")
        if not dist.is_initialized() or not any(text in str(error) for text in lost):
            raise
        sys.stderr.write(f"\n{script}: rank {dist.get_rank()}: another rank died or hangs; see its "
                         f"error above. {go_on}\n")
        sys.stderr.flush()
        os._exit(1)                         # sys.exit would wait for the lost rank
    except KeyboardInterrupt:
        # torch waits for the processes of torch.compile, minutes if the signal ended them, too
        atexit.register(signal.alarm, 30)
        stop(130, f"stopped. {go_on}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def out_of_memory(error: Exception) -> bool:
    """Whether an allocation failed: of CUDA, numpy or, to be known by its words, torch on a CPU."""
    known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return known or "can't allocate memory" in str(error)


# ------------------------------------------------------------------ flags


def field_help(Config) -> dict[str, tuple[str, str]]:
    """Field -> (heading, comment): the `# heading` lines and trailing comments of its source."""
    found, heading = {}, "run"
    for line in inspect.getsource(Config).splitlines():
        if title := re.fullmatch(r"    # (.+)", line):
            heading = title[1]
        elif field := re.match(r"    (\w+): \w+ = .*?(?:# (.*))?$", line):
            found[field[1]] = heading, field[2] or ""
    return found


def parse(Config, presets: dict[str, dict], argv: list[str] | None):
    """
    Command line -> Config. Every field is a flag (`--lr 1e-3`; a bool is a switch). `--preset` and
    `--scenario` set their defaults, which `--help` prints together with the fields' comments.

    Raises SystemExit (code 2, one line) for an unknown flag or preset or a value of the wrong type,
    UserError for a number out of range.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", nargs="?", default="tiny")
    first.add_argument("--scenario", nargs="?")
    chosen = first.parse_known_args(argv)[0]
    preset, defaults = chosen.preset, preset_fields(presets, chosen.preset, chosen.scenario)

    parser = _parser(Config, Config(**defaults))
    parser._negative_number_matcher = re.compile(r"-(\d|\.\d|inf|nan)")       # -1e-3, too
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        flags = [f"--{field.name}" for field in dataclasses.fields(Config)]
        hint = _did_you_mean(unknown[0].split("=")[0], flags)
        parser.error(f"unknown argument {unknown[0]}{hint}")
    names = [name for name in presets if " " not in name]
    if preset not in names:
        hint = _did_you_mean(str(preset), names)
        parser.error(f"unknown preset {preset!r}: choose one of {', '.join(names)}{hint}")

    given = {name: value for name, value in vars(given).items() if value is not None}
    config = Config(**defaults | given)
    config.out = config.out or f"runs/{config.preset}"
    for field in dataclasses.fields(Config):
        _check_number(field, getattr(config, field.name))
    return config


def preset_fields(presets: dict[str, dict], preset: str, scenario: str | None) -> dict:
    """The fields a preset sets, and those of "<preset> other" where not all motion is uniform."""
    other = {} if scenario in (None, "uniform") else presets.get(f"{preset} other", {})
    return presets.get(preset, {}) | other


def _parser(Config, defaults) -> argparse.ArgumentParser:
    usage = "%(prog)s [--preset tiny] [--FIELD VALUE ...]"
    parser = argparse.ArgumentParser(allow_abbrev=False, usage=usage)
    notes, groups = field_help(Config), {}
    for field in dataclasses.fields(Config):
        heading, comment = notes[field.name]
        if heading not in groups:
            groups[heading] = parser.add_argument_group(heading)
        default = getattr(defaults, field.name)
        if field.type is bool:
            kind = dict(action="store_true")
        else:
            kind = dict(type=field.type, metavar=field.type.__name__.upper())
            comment += "" if default == "" else f" (default: {default})"
        comment = comment.replace("%", "%%")
        # None: not on the command line
        groups[heading].add_argument(f"--{field.name}", default=None, help=comment, **kind)
    return parser


def _did_you_mean(word: str, choices: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, choices, n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def _check_number(field: dataclasses.Field, value) -> None:
    flag = f"--{field.name} {value}"
    if field.type in (int, float):
        check(math.isfinite(value) and value >= 0, f"{flag}: must be a finite number of at least 0")
    if field.type is int and field.default != 0 and field.name != "compile":
        check(value > 0, f"{flag}: must be at least 1")     # 0 means something if it is the default
    if field.name in ("beta1", "beta2"):
        check(value < 1, f"{flag}: too large")
    if field.name == "seed":
        check(value < 2 ** 63, f"{flag}: too large")


def stage_config(name: str, Config, presets: dict[str, dict], config, **more):
    """
    The Config with which a later stage (`config`) trains an earlier one, `name`, that is missing:
    its defaults for the same preset and motion, the same run folder and seed, and the fields
    `more`.
    """
    command, own = checkpoint.command(name), {field.name for field in dataclasses.fields(Config)}
    check(config.preset in presets, f"{Path(config.out, name)} is missing, and `{command}` has no "
          f"preset {config.preset}: train it with `{command} --out {config.out}`")
    fields = own & {"preset", "out", "seed", "scenario"}
    same = {field: getattr(config, field) for field in fields}
    scenario = getattr(config, "scenario", None)
    return Config(**preset_fields(presets, config.preset, scenario) | same | more)


def scenarios(name: str) -> list[str]:
    """The value of --scenario, one of the simulator's motions or "all" -> a list of motions."""
    check(name == "all" or name in sim.SCENARIOS, f"unknown --scenario {name!r}: choose one of "
          f"all, {', '.join(sim.SCENARIOS)}")
    return list(sim.SCENARIOS) if name == "all" else [name]


# ------------------------------------------------------------------ ranks

STEP_TIMEOUT = datetime.timedelta(minutes=10)       # a rank that hangs in a step ends the others
_slow_group = None      # a process group with a timeout of a day: for loading, saving, evaluating


@dataclass
class World:
    """The process group, of one rank without torchrun."""
    rank: int
    size: int
    device: torch.device
    compiles: bool = True       # see `compile`

    @property
    def is_main(self) -> bool:
        """Rank 0 prints, evaluates and writes files."""
        return self.rank == 0

    def print0(self, text: str) -> None:
        """Prints on rank 0 only."""
        if self.is_main:
            print(text, flush=True)

    def check_batch(self, n: int) -> None:
        check(n >= self.size, f"a batch of {n} cannot be sharded over {self.size} ranks: use fewer "
              "ranks or a larger batch")

    def shard(self, x):
        """
        This rank's shard of a global batch; shards differ in size by one at most. UserError if one
        would be empty.
        """
        n = len(x)
        self.check_batch(n)
        first, end = n * self.rank // self.size, n * (self.rank + 1) // self.size
        return x[first:end]

    def accumulation_steps(self, batch: int, micro_batch: int, rows: int = 1) -> int:
        """
        Micro-batches per step, as many on every rank: those of the largest shard. A micro-batch has
        at most `micro_batch` rows (0: no limit), an element of the batch has `rows`.
        """
        self.check_batch(batch)
        if not micro_batch:
            return 1
        largest_shard = ceil_div(batch, self.size)
        return ceil_div(largest_shard * rows, micro_batch)

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over the ranks, for the log: detached, or the log would keep the graph."""
        x = x.detach()
        if dist.is_initialized():
            x = x.clone()
            dist.all_reduce(x)
        return x

    def all_gather(self, x) -> list:
        """An object from each rank -> those of all ranks, in their order."""
        if not dist.is_initialized():
            return [x]
        of_ranks = [None] * self.size
        dist.all_gather_object(of_ranks, x, group=_slow_group)
        return of_ranks

    def barrier(self) -> None:
        """
        All ranks meet here, however late one is: before they open a file that rank 0 writes, or
        after they have loaded something.
        """
        if dist.is_initialized():
            dist.barrier(group=_slow_group)

    def autocast(self):
        """
        Matrix products in bf16 on a GPU that has it, else in fp32: CPUs, and GPUs before Ampere.
        (Those have fp16, whose gradients underflow without a loss scaler.)
        """
        return torch.autocast(self.device.type, torch.bfloat16, enabled=has_bf16(self.device))

    @property
    def can_compile(self) -> bool:
        """Whether torch.compile is wanted (--compile) and works here: on GPUs."""
        on_gpu = self.device.type == "cuda"
        return self.compiles and on_gpu and can_compile(self.device, self.is_main)

    def compile(self, block: Callable) -> Callable:
        """
        Regional compilation: the function of a transformer's block, compiled on a GPU, where small
        models are bound by kernel launches. All blocks of one shape share it; a whole model would
        take as many times longer to compile. Without gradients it runs as it is: evaluation would
        compile it once more.
        """
        if not self.can_compile:
            return block
        compiled = torch.compile(block, dynamic=False)      # for fixed shapes

        def compiled_in_training(*args):
            return (compiled if torch.is_grad_enabled() else block)(*args)
        return compiled_in_training


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def has_bf16(device: torch.device) -> bool:
    """Whether it is a GPU that multiplies in bf16 without emulation."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


@functools.cache
def can_compile(device: torch.device, report: bool) -> bool:
    """Whether torch.compile works here, tried on an addition: it needs Triton and a C compiler."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(2, device=device))
        return True
    except Exception as error:          # of Dynamo, Inductor, Triton or the compiler: they vary
        if report:
            reason = (str(error).strip() or repr(error)).splitlines()[0]
            print(f"torch.compile does not work here ({reason}): going on without it, which is "
                  "slower", flush=True)
        return False


STRAY = "Start several ranks with torchrun, which sets {0}; if it is left over, `unset {0}`"


def place() -> tuple[int, int, int, int]:
    """Rank, ranks, and both on this machine, from torchrun's environment; 0, 1, 0, 1 without it."""
    def integer(name: str, default: int) -> int:
        text = os.environ.get(name) or str(default)
        check(re.fullmatch("[0-9]+", text), f"{name}={text} in the environment: a whole number is "
              f"expected. {STRAY.format(name)}")
        return int(text)
    rank, size = integer("RANK", 0), integer("WORLD_SIZE", 1)
    local_rank, local_size = integer("LOCAL_RANK", 0), integer("LOCAL_WORLD_SIZE", size)
    check(size > 0, f"WORLD_SIZE=0 in the environment: no ranks. {STRAY.format('WORLD_SIZE')}")
    check(rank < size, f"RANK={rank} in the environment, but WORLD_SIZE={size}: ranks are counted "
          f"from 0. {STRAY.format('RANK')}")
    check(0 < local_size and local_rank < local_size, f"LOCAL_RANK={local_rank} in the environment,"
          f" but LOCAL_WORLD_SIZE={local_size}. {STRAY.format('LOCAL_RANK')}")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if size > 1 else ():
        check(os.environ.get(name), f"WORLD_SIZE={size} in the environment, but no {name}. "
              f"{STRAY.format('WORLD_SIZE')}")
    return rank, size, local_rank, local_size


def cores(root: Path = Path("/")) -> int:
    """The CPU cores that this process may use, by its affinity and its control groups' quotas."""
    if hasattr(os, "sched_getaffinity"):                    # not on macOS
        n = len(os.sched_getaffinity(0))
    else:
        n = os.cpu_count() or 1
    files = []                                              # of every group that it is in
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            controllers, group = line.split(":", 2)[1:]
            version_2 = controllers == ""
            if version_2 or "cpu" in controllers.split(","):
                top = root / "sys/fs/cgroup" / ("" if version_2 else "cpu")
                folder = top / group.lstrip("/")
                names = ("cpu.max",) if version_2 else ("cpu.cfs_quota_us", "cpu.cfs_period_us")
                files += [[f / name for name in names] for f in (folder, *folder.parents)]
    for names in files:
        with contextlib.suppress(OSError, ValueError):      # ValueError: "max", no quota
            texts = [name.read_text(encoding="utf-8") for name in names]
            quota, period = map(int, " ".join(texts).split())
            if quota > 0:                                   # -1: none
                n = min(n, max(1, quota // period))
    return n


def threads_are_set() -> bool:
    """Whether the user set OMP_NUM_THREADS. If not, torchrun sets it to 1 for several ranks."""
    if os.environ.get("OMP_NUM_THREADS") != "1" or "TORCHELASTIC_RUN_ID" not in os.environ:
        return "OMP_NUM_THREADS" in os.environ
    with contextlib.suppress(OSError):                      # what torchrun itself was started with
        return b"OMP_NUM_THREADS=" in Path(f"/proc/{os.getppid()}/environ").read_bytes()
    return False                                            # macOS


def start(seed: int, out: str = "", compiles: bool = True) -> World:
    """
    Joins torchrun's process group if there is one, chooses the device, seeds torch, and makes and
    locks the run folder `out` if one is named. May be called more than once.
    """
    global _slow_group
    rank, size, local_rank, local_size = place()
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus:
        check(local_rank < gpus, f"{local_rank + 1} ranks on {gpus} GPUs: lower --nproc_per_node, "
              "or set CUDA_VISIBLE_DEVICES= to run on the CPU")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    else:
        device = torch.device("cpu")
        torch.set_flush_denormal(True)      # CPUs are ten times slower with denormal numbers
    if not threads_are_set():
        n = cores() // local_size if size > 1 else min(cores(), torch.get_num_threads())
        torch.set_num_threads(max(1, n))
    if size > 1 and not dist.is_initialized():
        try:
            dist.init_process_group("nccl" if gpus else "gloo", timeout=STEP_TIMEOUT)
            _slow_group = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=1))
        except (RuntimeError, ValueError) as error:
            raise UserError(f"rank {rank} of {size} cannot join the others ({error!r:.200}). "
                            f"{STRAY.format('WORLD_SIZE')}") from None
    # names that torch 2.13 gives up and older versions need
    warnings.filterwarnings("ignore", ".*(all_gather_into_tensor|broadcast_buffers)", FutureWarning)
    torch.manual_seed(seed)                 # the same initial weights on every rank
    world = World(rank, size, device, compiles)
    if out:
        checkpoint.lock(checkpoint.writable(Path(out)), world)
    return world


def distribute(model: nn.Module, world: World) -> nn.Module:
    """
    DistributedDataParallel if there are several ranks. Buffers (a codebook) are not broadcast: they
    are equal already, because every rank updates them from the data of all.
    """
    if world.size == 1:
        return model
    world.barrier()                         # DDP compares the models, within STEP_TIMEOUT
    return nn.parallel.DistributedDataParallel(model, broadcast_buffers=False,
                                               gradient_as_bucket_view=True)


# ------------------------------------------------------------------ randomness and data order


def generator(*key: int, device="cpu") -> torch.Generator:
    """
    A new generator, whose draws are a function of integers such as (seed, step). On a GPU: other
    draws than on the CPU, made while the CPU goes on.
    """
    state = np.random.SeedSequence((len(key), *key)).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(state >> 1))


def batch_indices(seed: int, step: int, batch: int, n: int) -> Tensor:
    """Indices (batch,) of the n data that a step sees: one shuffled epoch comes after the other."""
    first, end = step * batch, (step + 1) * batch           # places in the sequence of all epochs
    epochs = range(first // n, ceil_div(end, n))
    parts = [_epoch(seed, i, n)[max(first - i * n, 0):end - i * n] for i in epochs]
    return torch.cat(parts)


@functools.lru_cache(maxsize=2)                             # a batch may be of two epochs
def _epoch(seed: int, epoch: int, n: int) -> Tensor:
    return torch.randperm(n, generator=generator(seed, epoch))


# ------------------------------------------------------------------ optimizer


class Bucket:
    """
    Some parameters as one flat vector (n,), padded to `ranks` shards of (shard_size,): they become
    views of it, so that one copy updates them all. Every rank owns a shard: master weights in fp32
    and their moments. torch's fused AdamW updates it; then the ranks gather the whole vector.
    """

    def __init__(self, params: list[nn.Parameter], rank: int, ranks: int, **options):
        self.params, self.rank, self.ranks = params, rank, ranks
        self.n = sum(p.numel() for p in params)
        self.shard_size = -(-self.n // ranks)               # rounded up: the last shard is padded
        self.flat = self.flatten([p.detach() for p in params])
        start = 0
        for p in params:
            p.data = self.flat.as_strided(p.shape, p.stride(), start)
            start += p.numel()
        self.master = nn.Parameter(self.shard(self.flat).float().clone())
        self.adamw = torch.optim.AdamW([self.master], fused=True, **options)

    def flatten(self, tensors: list[Tensor]) -> Tensor:
        """
        Tensors of the parameters' shapes -> one flat vector, padded with zeros: the elements of
        each in the order in which the parameter has them in memory (channels_last or not).
        """
        rows = []
        for p, x in zip(self.params, tensors):
            axes = sorted(range(p.ndim), key=p.stride, reverse=True)
            rows.append(x.permute(axes).flatten())
        padding = rows[0].new_zeros(self.ranks * self.shard_size - self.n)
        return torch.cat([*rows, padding])

    def shard(self, flat: Tensor) -> Tensor:
        """This rank's shard (shard_size,) of a flat vector."""
        return flat[self.rank * self.shard_size:(self.rank + 1) * self.shard_size]

    @torch.no_grad()
    def step(self, lr: float, scale: Tensor) -> None:
        """One update with `scale` times the parameters' gradients."""
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.params]
        self.master.grad = self.shard(self.flatten(gradients)).float().mul_(scale)
        self.adamw.param_groups[0]["lr"] = lr
        self.adamw.step()
        self.master.grad = None

        mine = self.shard(self.flat).copy_(self.master)
        if self.ranks > 1:
            dist.all_gather_into_tensor(self.flat, mine.clone())

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps of this rank's shard: step (), all else (shard_size,)."""
        state = self.adamw.state.get(self.master)
        if not state:                                           # before the first step
            zeros = torch.zeros_like(self.master)
            state = {"exp_avg": zeros, "exp_avg_sq": zeros.clone(), "step": torch.zeros(())}
        return {"master": self.master.detach()} | state

    def load(self, files: list, prefix: str) -> None:
        """
        files: open safetensors of all ranks that saved `state`, in their order, with its names
        behind `prefix`. They may have been more or fewer than now: this rank reads only what
        overlaps its own shard.
        """
        saved_size = files[0].get_slice(f"{prefix}master").get_shape()[0]
        start = self.rank * self.shard_size
        stop = min(start + self.shard_size, self.n)
        state = {"step": files[0].get_tensor(f"{prefix}step").to(self.master.device)}
        for name in ("master", "exp_avg", "exp_avg_sq"):
            state[name] = torch.zeros_like(self.master.data)
            for i, file in enumerate(files):
                offset = i * saved_size                         # where this file's shard begins
                a, b = max(start, offset), min(stop, offset + saved_size)
                if a < b:
                    part = file.get_slice(f"{prefix}{name}")[a - offset:b - offset]
                    state[name][a - start:b - start] = part
        self.master.data.copy_(state.pop("master"))
        self.adamw.state[self.master] = state


def group_parameters(model: nn.Module, limit: int) -> list[list[nn.Parameter]]:
    """
    The trained parameters in lists of one kind: matrices or vectors, of one dtype. A list has at
    most `limit` elements or is a single tensor, because a step copies it.
    """
    groups: list[list[nn.Parameter]] = []
    size, kind = 0, None                                    # of the last list
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in sorted(trained, key=lambda p: p.ndim < 2):     # matrices first
        if kind != (p.ndim < 2, p.dtype) or size + p.numel() > limit:
            groups.append([])
            size, kind = 0, (p.ndim < 2, p.dtype)
        groups[-1].append(p)
        size += p.numel()
    return groups


class AdamW:
    """
    AdamW with fp32 master weights and moments, sharded over the ranks (ZeRO-1): 12 bytes per
    parameter, divided by the number of ranks. Weight decay on matrices only.

    bf16 weights need masters: near 0.02, two neighbouring bf16 numbers are 1.2e-4 apart, and an
    update of 3e-6 would be rounded away.
    """

    def __init__(self, model: nn.Module, betas: tuple[float, float] = (0.9, 0.999),
                 eps: float = 1e-8, weight_decay: float = 0.0, rank: int = 0, ranks: int = 1,
                 limit: int = 1 << 26):
        """limit: parameters per bucket."""
        self.buckets = []
        for params in group_parameters(model, limit):
            decay = weight_decay if params[0].ndim >= 2 else 0.0
            bucket = Bucket(params, rank, ranks, betas=betas, eps=eps, weight_decay=decay)
            self.buckets.append(bucket)
        self.params = [p for bucket in self.buckets for p in bucket.params]
        self.updates = 0                                        # begun since the start

    def step(self, lr: float, scale: Tensor) -> None:
        """One update with `scale` (a tensor of one number) times the gradients."""
        self.updates += 1
        for bucket in self.buckets:
            bucket.step(lr, scale)

    def zero_grad(self) -> None:
        for p in self.params:
            p.grad = None

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps of this rank's shards: <bucket>.<name> -> tensor."""
        return {f"{i}.{name}": x for i, bucket in enumerate(self.buckets)
                for name, x in bucket.state().items()}

    def load(self, paths: list[Path]) -> None:
        """
        paths: the files of all ranks that saved a checkpoint, in their order. Raises ValueError for
        those of another model.
        """
        names = sorted(self.state())
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(safe_open(path, "pt")) for path in paths]
            for file in files:
                if sorted(file.keys()) != names:
                    raise ValueError(f"its optimizer has {len(file.keys())} tensors, not "
                                     f"{len(names)}")
            for i, bucket in enumerate(self.buckets):
                n = sum(file.get_slice(f"{i}.master").get_shape()[0] for file in files)
                padding = n - bucket.n
                if not 0 <= padding < len(files):
                    raise ValueError(f"bucket {i} of its optimizer has {n} elements, not "
                                     f"{bucket.n}")
                bucket.load(files, f"{i}.")


def learning_rate(step: int, config) -> float:
    """Linear warm-up, then a cosine to zero."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.lr * 0.5 * (1 + math.cos(math.pi * progress))


# ------------------------------------------------------------------ a run

STOP_TIMEOUT = 600  # seconds that a step may still take after a signal
PATIENCE = 10       # the run ends after so many steps in a row without a finite loss and gradient


class Run:
    """
    The toolbox of a training loop in `folder`: it resumes from the last checkpoint, updates the
    weights, logs and saves.

    Iterating over it gives the steps still to do. After each, a line is added to log.jsonl and,
    every config.save_every steps, a checkpoint is saved. SIGTERM, SIGHUP (a closed terminal) or
    Ctrl-C end the run after the current step, with a checkpoint (a second one at once).

    The log holds every step once: lines after the checkpoint that is resumed from are dropped. A
    progress bar shows the metrics named in `show`. Only rank 0 writes them. With --fresh, log and
    checkpoints of an older training stay until the first step is done.

    sources: the checksums that checkpoint.start_stage returns, kept in the checkpoints.
    restarted: the run before this one was given up. It begins at step 0, with an empty log; the
    checkpoints of the other stay until the first of its own is saved.
    """

    def __init__(self, folder: Path, model: nn.Module, config, world: World,
                 show: tuple[str, ...] = ("loss",), sources: dict[str, str] | None = None,
                 restarted: bool = False):
        self.folder, self.model, self.config, self.world = folder, model, config, world
        self.show, self.sources = show, sources
        preset = getattr(config, "preset", "tiny")
        if preset != "tiny" and world.device.type == "cpu":
            world.print0(f"--preset {preset} is meant for a GPU: on this CPU it takes very long")
        self.optimizer = AdamW(model, (config.beta1, config.beta2), config.eps,
                               config.weight_decay, world.rank, world.size)
        self.restarted = restarted
        self.first = 0
        if not restarted:
            self.first = checkpoint.resume(folder, model, self.optimizer, config, world)
        self.current = self.first           # the step in progress
        self.line = {}                      # its line in the log
        self.skipped = 0                    # steps in a row, up to now, that were not finite
        self.last_loss = 0.0                # that of the last step
        self.file = None                    # log.jsonl, opened when the first step is done
        self.stopping = False               # whether a signal came,
        self.signalled = -math.inf          # and when
        self.updates = 0                    # of the optimizer before the step in progress

    # -- what a loop calls

    def accumulate(self, micro_batches: Iterable, model: nn.Module) -> Iterator:
        """
        Gradient accumulation: yields the micro-batches, as many on every rank. DDP (`model`)
        averages the gradients over the ranks in the backward pass of the last one only.
        """
        micro_batches = list(micro_batches)
        for i, micro_batch in enumerate(micro_batches):
            is_last = i + 1 == len(micro_batches)
            model.require_backward_grad_sync = is_last      # an attribute of DDP's
            yield micro_batch

    def step(self, loss: Tensor, **metrics) -> bool:
        """
        Clips the norm of the gradients, takes one AdamW step and clears them. loss: this rank's,
        which is added up over the ranks here. metrics: logged as they are.

        Returns whether the step was taken. One whose loss or gradient is not finite is skipped, by
        all ranks together; UserError after PATIENCE in a row, and at once for weights that are not
        finite.
        """
        loss = self.world.all_reduce(loss)
        gradients = [p.grad for p in self.optimizer.params if p.grad is not None]
        norms = torch._foreach_norm(gradients, 2, torch.float32)
        norm = torch.stack(norms).norm()
        lr = learning_rate(self.current, self.config)
        finite = bool(torch.isfinite(loss) & torch.isfinite(norm))
        if finite:
            limit = self.config.max_grad_norm or math.inf
            self.optimizer.step(lr, (limit / (norm + 1e-6)).clamp(max=1.0))
            weights = [bucket.flat.norm() for bucket in self.optimizer.buckets]
            if not torch.isfinite(torch.stack(weights)).all():
                self.fail(f"step {self.current} has made weights that are not finite")
        self.optimizer.zero_grad()
        self.skipped = 0 if finite else self.skipped + 1
        self.log(loss=loss, grad_norm=norm, learning_rate=lr, skipped=self.skipped, **metrics)
        if self.skipped == PATIENCE:
            self.fail(f"loss or gradient was not finite in the {PATIENCE} steps up to "
                      f"{self.current}")
        return finite

    def fail(self, what: str) -> None:
        """Ends the run. What was saved before is kept: all of it is finite."""
        saved = checkpoint.checkpoints(self.folder)
        older = ""
        if saved and checkpoint.weights_file(self.folder):
            older = "; without its checkpoints, the older model there is used again"
        raise UserError(f"{self.folder}: {what}: start again with --fresh and a lower --lr (now "
                        f"{self.config.lr}) or a larger --eps (now {self.config.eps}), or look at "
                        f"the data. Last checkpoint: {saved[-1] if saved else 'none'}{older}")

    def log(self, **metrics) -> None:
        """Adds metrics (numbers, or tensors of one) to this step's line of the log."""
        self.line |= metrics

    # -- from step to step

    def __iter__(self) -> Iterator[int]:
        self.world.barrier()                # all have loaded their checkpoint
        for step in range(self.first, self.config.steps):
            self.current, self.updates = step, self.optimizer.updates
            yield step
            self._write_line()
            done = step + 1
            stopping = torch.tensor(float(self.stopping), device=self.world.device)
            stop = self.world.all_reduce(stopping) > 0          # a signal came to any rank
            if stop:
                signal.alarm(0)             # the step has ended; saving may take its time
            due = stop or done % self.config.save_every == 0 or done == self.config.steps
            if due and not self.skipped:    # weights that give a finite loss
                self._save(step)
            if stop:
                raise KeyboardInterrupt
        if not math.isfinite(self.last_loss):
            self.fail("the loss of the last step is not finite")

    def __enter__(self) -> "Run":
        self.handlers = {}
        if threading.current_thread() is threading.main_thread():   # no other may set them
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                handler = signal.getsignal(number)
                if (number, handler) != (signal.SIGHUP, signal.SIG_IGN):    # nohup ignores it
                    self.handlers[number] = signal.signal(number, self._stop)
        if self.world.is_main:
            interval = 0.2 if sys.stderr.isatty() else 10       # seconds
            self.bar = tqdm(total=self.config.steps, initial=self.first, desc=self.folder.name,
                            ncols=100, unit="step", mininterval=interval)
        self.time = time.perf_counter()
        return self

    def _save(self, step: int) -> None:
        checkpoint.save_checkpoint(self.folder, self.model, self.optimizer, step, self.config,
                                   self.world, self.sources)

    def _stop(self, number, frame) -> None:
        """
        Handles a signal: the run ends after the step. If it hangs (for instance because the signal
        also ended the processes of torch.compile), it is killed after STOP_TIMEOUT.
        """
        now = time.monotonic()
        if now - self.signalled < 3:        # the same one again: torchrun or Slurm repeats it
            return
        self.signalled = now
        unchanged = self.optimizer.updates == self.updates      # the weights, in this step
        nothing_new = unchanged and self.current == self.first
        at_once, self.stopping = self.stopping or nothing_new, True
        signal.alarm(30 if at_once else STOP_TIMEOUT)
        if at_once:
            raise KeyboardInterrupt         # of which the alarm makes sure: torch may ignore it
        # a long step may be killed before its end: what the steps before it did is saved now (not
        # of several ranks, which cannot be sure to be in the same step)
        saved = self.current % self.config.save_every == 0
        graph = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
        if unchanged and not (saved or self.skipped or graph) and self.world.size == 1:
            self._save(self.current - 1)

    def __exit__(self, error, *_) -> None:
        if self.stopping:
            signal.alarm(0)
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if self.world.is_main:
            self.bar.close()
            with contextlib.suppress(AttributeError, OSError):      # None; a full disk
                self.file.close()
        if self.stopping and error is None:     # the signal came after the last step
            raise KeyboardInterrupt

    def _open_log(self) -> None:
        """Drops what an older training, or this one after its last checkpoint, has left."""
        path, kept = self.folder / "log.jsonl", []
        if self.first and path.exists():                        # else a new log
            try:
                kept = path.read_text(encoding="utf-8").splitlines()[:self.first]
            except (OSError, ValueError) as error:
                print(f"\n{path} is damaged ({error}): it starts again with step {self.first}")
        with checkpoint.replacing(path) as part:
            part.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        self.file = open(path, "a", encoding="utf-8")
        if self.config.fresh and not self.restarted:
            checkpoint.forget_checkpoints(self.folder)

    def _write_line(self) -> None:
        now = time.perf_counter()
        line = {k: v.item() if isinstance(v, Tensor) else v for k, v in self.line.items()}
        self.last_loss = line.get("loss", 0.0)
        if self.world.is_main:
            if not self.file:
                self._open_log()
            logged = {"step": self.current} | line | {"step_time": now - self.time}
            try:
                self.file.write(json.dumps({k: _rounded(v) for k, v in logged.items()}) + "\n")
                self.file.flush()
            except OSError as error:                            # a full disk: training goes on
                sys.stderr.write(f"\ncould not write {self.file.name} ({error.strerror})\n")
            shown = {name: f"{line[name]:.3g}" for name in self.show if name in line}
            self.bar.set_postfix(shown, refresh=False)
            self.bar.update()
        self.time, self.line = now, {}


def _rounded(x):
    """A float with six digits, or as text if it is NaN or infinite, which JSON cannot hold."""
    if not isinstance(x, float):
        return x
    return float(f"{x:.6g}") if math.isfinite(x) else str(x)
