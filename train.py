"""
What the training loops share: ranks, flags from a dataclass, AdamW with sharded fp32 state, and
Run, the toolbox of a loop.

A stage's loop:

    config = train.parse(Config, PRESETS, argv)                 # flags -> dataclass
    world = train.start(config.seed, config.out)          # rank, size, device; locks the run folder
    loss_of = train.distribute(Loss(model), world)              # DDP if there are several ranks
    with train.Run(folder, model, config, world) as run:    # resumes, logs, saves, stops on SIGTERM
        for step in run:
            i = world.shard(train.batch_indices(config.seed, step, B, len(data)))
            total = 0.0
            for x in run.accumulate(data[i].split(n), loss_of): # gradient accumulation
                loss = loss_of(x).sum() / B                     # this rank's sum / the global batch
                (loss * world.size).backward()      # DDP averages over ranks: this makes it the sum
                total += loss.detach()
            run.step(total)                                     # clip, AdamW, zero_grad, log

Everything random in a step is drawn from a generator made of (seed, step), never from a running
state. Thus a run that was killed and resumed draws what it would have drawn, and the number of
ranks does not change what a step sees.

Source of the sharded optimizer: ZeRO, Rajbhandari et al. 2020, https://arxiv.org/abs/1910.02054,
stage 1.
"""
import argparse
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
from typing import Iterable, Iterator

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as nnf
from safetensors import safe_open
from torch import Tensor, nn
from tqdm import tqdm

import checkpoint
import sim
from checkpoint import UserError, check


def cli(main) -> None:
    """Runs a script's main(); turns what a user can mend into one line and an exit code."""
    script = Path(sys.argv[0]).name
    go_on = "The same command (without --fresh) goes on from the last checkpoint."
    try:
        main()
    except (UserError, OSError) as error:   # OSError: a full disk, a file that vanished
        sys.stderr.write(f"\n{script}: {error}\n")
        sys.exit(2)
    except torch.OutOfMemoryError as error:
        sys.stderr.write(f"\n{script}: {str(error).splitlines()[0]} Try --micro_batch 1, "
                         f"--checkpointing where there is such a flag, or more ranks. {go_on}\n")
        sys.exit(2)
    except RuntimeError as error:           # of gloo and NCCL: the other end is gone or silent
        lost = ("closed by peer", "reset by peer", "Broken pipe", "imed out", "timeout")
        if not dist.is_initialized() or not any(text in str(error) for text in lost):
            raise
        sys.stderr.write(f"\n{script}: rank {dist.get_rank()}: another rank died or hangs; see its "
                         f"error above. {go_on}\n")
        sys.stderr.flush()
        os._exit(1)                         # destroying the group would wait for the lost rank
    except KeyboardInterrupt:
        sys.stderr.write(f"\nstopped. {go_on}\n")
        sys.exit(130)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


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
    Command line -> Config. Every field is a flag (`--lr 1e-3`; a bool is a switch), `--preset` sets
    the others' defaults, and `--help` prints each field's comment and the default of the preset
    chosen.

    Raises SystemExit (code 2, one line) for an unknown flag or preset or a value of the wrong type,
    UserError for a number out of range.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", nargs="?", default="tiny")
    preset = first.parse_known_args(argv)[0].preset
    defaults = Config(**presets.get(preset, {}))
    fields, text = dataclasses.fields(Config), field_help(Config)

    usage = "%(prog)s [--preset tiny] [--FIELD VALUE ...]"
    parser = argparse.ArgumentParser(allow_abbrev=False, usage=usage)
    groups = {}
    for field in fields:
        heading, comment = text[field.name]
        if heading not in groups:
            groups[heading] = parser.add_argument_group(heading)
        default = getattr(defaults, field.name)
        if field.type is bool:
            kind = dict(action="store_true")
        else:
            kind = dict(type=field.type, metavar=field.type.__name__.upper())
            comment += "" if default == "" else f" (default: {default})"
        comment = comment.replace("%", "%%")
        groups[heading].add_argument(f"--{field.name}", default=None, help=comment, **kind)
    given, unknown = parser.parse_known_args(argv)

    if unknown:
        flags = [f"--{field.name}" for field in fields]
        near = difflib.get_close_matches(unknown[0].split("=")[0], flags, 1, 0.6)
        parser.error(f"unknown argument {unknown[0]}"
                     + (f": did you mean {near[0]}?" if near else ""))
    if preset not in presets:
        near = difflib.get_close_matches(str(preset), presets, 1, 0.4)
        parser.error(f"unknown preset {preset!r}: choose one of {', '.join(presets)}"
                     + (f" (did you mean {near[0]}?)" if near else ""))

    given = {name: value for name, value in vars(given).items() if value is not None}
    config = dataclasses.replace(defaults, **given)
    config.out = config.out or f"runs/{config.preset}"
    for field in fields:
        name, value = field.name, getattr(config, field.name)
        if field.type in (int, float):
            check(math.isfinite(value) and value >= 0,
                  f"--{name} {value}: must be a finite number of at least 0")
        if field.type is int and field.default != 0:
            check(value > 0, f"--{name} 0: must be at least 1")
        too_large = name in ("beta1", "beta2") and value >= 1 or name == "seed" and value >= 2 ** 63
        check(not too_large, f"--{name} {value}: too large")
    return config


def stage_config(name: str, Config, presets: dict[str, dict], config, **more):
    """
    The Config with which a later stage trains an earlier one, `name`, that is missing: the defaults
    of its preset of the same name, the same run folder, seed and motions, and the fields in `more`.
    """
    check(config.preset in presets, f"{Path(config.out, name)} is missing, and {name} has no "
          f"preset {config.preset}: train it with `{checkpoint.command(name)} --out {config.out}`")
    same = {field: getattr(config, field) for field in ("preset", "out", "seed", "scenario")}
    return Config(**presets[config.preset] | same | more)


def scenarios(name: str) -> list[str]:
    """--scenario: one of the simulator's, or all."""
    check(name == "all" or name in sim.SCENARIOS, f"unknown --scenario {name!r}: choose one of "
          f"all, {', '.join(sim.SCENARIOS)}")
    return list(sim.SCENARIOS) if name == "all" else [name]


# ------------------------------------------------------------------ ranks

_patient = None         # a process group for what may take long: waiting for rank 0 to evaluate


@dataclass
class World:
    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Rank 0 prints, evaluates and writes files."""
        return self.rank == 0

    def print0(self, text: str) -> None:
        if self.is_main:
            print(text, flush=True)

    def shard(self, x):
        """
        This rank's shard of a global batch; shards differ in size by one at most. UserError if one
        would be empty.
        """
        n = len(x)
        check(n >= self.size, f"a batch of {n} cannot be sharded over {self.size} ranks: use fewer "
              "ranks or a larger batch")
        return x[n * self.rank // self.size: n * (self.rank + 1) // self.size]

    def accumulation_steps(self, batch: int, micro_batch: int, rows: int = 1) -> int:
        """
        Into how many micro-batches of at most `micro_batch` rows (0: no limit) the largest shard of
        a batch is cut, each element of which has `rows` rows: the same number on every rank.
        """
        return ceil_div(ceil_div(batch, self.size) * rows, micro_batch) if micro_batch else 1

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum over the ranks, for the log: without a graph, which a running mean would keep."""
        x = x.detach()
        if dist.is_initialized():
            x = x.clone()
            dist.all_reduce(x)
        return x

    def all_gather(self, x) -> list:
        """An object from each rank -> those of all of them, in the order of the ranks."""
        everyone = [x]
        if dist.is_initialized():
            everyone = [None] * self.size
            dist.all_gather_object(everyone, x, group=_patient)
        return everyone

    def barrier(self) -> None:
        """All ranks meet here: nobody reads a file before rank 0 has written it."""
        if self.size > 1:
            dist.barrier(group=_patient)

    def autocast(self):
        """Matrix products in bf16 on a GPU; fp32 on the CPU, where many have no bf16."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    def compile(self, *modules: nn.Module) -> None:
        """torch.compile in place on a GPU, where small models are bound by kernel launches."""
        for module in modules if self.device.type == "cuda" else ():
            module.compile()


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def start(seed: int, out: str = "") -> World:
    """
    Joins torchrun's process group if there is one, chooses the device, seeds torch, and makes and
    locks the run folder `out` if one is named. May be called more than once.
    """
    global _patient
    rank, local = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
    size = int(os.environ.get("WORLD_SIZE", 1))
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    check(not gpus or local < gpus, f"{local + 1} ranks on {gpus} GPUs: lower --nproc_per_node, or "
          "set CUDA_VISIBLE_DEVICES= to run on the CPU")
    device = torch.device("cuda", local) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    else:
        torch.set_flush_denormal(True)      # ten times slower, they fill a nearly collapsed model
        if size > 1:
            local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", size))
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_ranks))
    if size > 1 and not dist.is_initialized():
        minute, day = datetime.timedelta(minutes=1), datetime.timedelta(days=1)
        # a rank that hangs ends the others within a minute, unless they wait for it to evaluate
        dist.init_process_group("nccl" if gpus else "gloo", timeout=minute)
        _patient = dist.new_group(backend="gloo", timeout=day)
    torch.manual_seed(seed)                 # the same initial weights on every rank
    world = World(rank, size, device)
    if out:
        checkpoint.lock(checkpoint.writable(Path(out)), world)
    return world


def distribute(model: nn.Module, world: World) -> nn.Module:
    """DistributedDataParallel if there are several ranks. Buffers (codebooks) stay equal anyway."""
    if world.size == 1:
        return model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)      # 2.13 renames broadcast_buffers
        return nn.parallel.DistributedDataParallel(model, broadcast_buffers=False,
                                                   gradient_as_bucket_view=True)


# ------------------------------------------------------------------ randomness and data order


def generator(*key: int, device="cpu") -> torch.Generator:
    """A generator that is a function of integers such as (seed, step)."""
    state = np.random.SeedSequence((len(key), *key)).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(state >> 1))


@functools.lru_cache(maxsize=2)
def _epoch(seed: int, epoch: int, n: int) -> Tensor:
    return torch.randperm(n, generator=generator(seed, epoch))


def batch_indices(seed: int, step: int, batch: int, n: int) -> Tensor:
    """Indices (batch,) of the data that a step sees: shuffled epochs of n, one after the other."""
    at = torch.arange(step * batch, (step + 1) * batch)
    return torch.stack([_epoch(seed, int(i) // n, n)[i % n] for i in at])


# ------------------------------------------------------------------ optimizer


class Bucket:
    """
    Some parameters seen as one flat vector, of which every rank owns an equal shard: `master`, in
    fp32, and its moments.

    After torch's fused AdamW has updated the masters, the ranks gather the new weights from each
    other.
    """

    def __init__(self, params: list[nn.Parameter], rank: int, ranks: int, **options):
        self.params, self.rank, self.ranks = params, rank, ranks
        self.n = sum(p.numel() for p in params)
        self.shard_size = -(-self.n // ranks)             # the last rank's may be padded with zeros
        flat = torch.cat([p.detach().flatten() for p in params])
        self.master = nn.Parameter(self.shard(flat).float().clone())
        self.adamw = torch.optim.AdamW([self.master], fused=True, **options)

    def shard(self, flat: Tensor) -> Tensor:
        """This rank's shard (shard_size,) of a flat vector (n,)."""
        mine = flat[self.rank * self.shard_size:(self.rank + 1) * self.shard_size]
        return nnf.pad(mine, (0, self.shard_size - len(mine)))

    @torch.no_grad()
    def step(self, lr: float, scale: Tensor) -> None:
        """One update with `scale` times the parameters' gradients."""
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.params]
        self.master.grad = self.shard(torch.cat([g.flatten() for g in gradients])).float() * scale
        self.adamw.param_groups[0]["lr"] = lr
        self.adamw.step()
        self.master.grad = None
        new = self.master.detach().to(self.params[0].dtype)
        if self.ranks > 1:
            shards = new.new_empty(self.ranks * self.shard_size)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # torch 2.13 renames it
                dist.all_gather_into_tensor(shards, new)
            new = shards
        for p, x in zip(self.params, new[:self.n].split([p.numel() for p in self.params])):
            p.copy_(x.view(p.shape))

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps of this rank's shard. All but the step are (shard_size,)."""
        state = self.adamw.state.get(self.master)
        if not state:                                           # before the first step
            zeros = torch.zeros_like(self.master)
            state = {"exp_avg": zeros, "exp_avg_sq": zeros.clone(), "step": torch.zeros(())}
        return {"master": self.master.detach()} | state

    def load(self, shards: dict[str, list[Tensor]]) -> None:
        """
        shards: every name in `state` -> the tensors of all ranks, which may have been more or fewer
        than now.
        """
        state = {}
        for name, x in shards.items():
            whole = torch.cat(x)[:self.n].to(self.master.device) if name != "step" else x[0]
            state[name] = whole if name == "step" else self.shard(whole)
        self.master.data.copy_(state.pop("master"))
        self.adamw.state[self.master] = {name: x.clone() for name, x in state.items()}


def group_parameters(model: nn.Module, limit: int) -> list[list[nn.Parameter]]:
    """
    The trained parameters, in lists of one dtype, matrices or vectors, of at most `limit` elements
    or one tensor: what a step copies stays small beside a model of billions.
    """
    groups: list[list[nn.Parameter]] = []
    size, kind = 0, None
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in sorted(trained, key=lambda p: p.ndim < 2):
        if not groups or kind != (p.ndim < 2, p.dtype) or size + p.numel() > limit:
            groups.append([])
            size, kind = 0, (p.ndim < 2, p.dtype)
        groups[-1].append(p)
        size += p.numel()
    return groups


class AdamW:
    """
    AdamW with fp32 masters and moments, sharded over the ranks (ZeRO-1): 12 bytes per parameter,
    divided by the number of ranks. Weight decay on matrices only.

    Without masters bf16 weights do not follow: beside 0.02 they are 1.2e-4 apart, and a step of
    3e-6 rounds to nothing.
    """

    def __init__(self, model: nn.Module, betas: tuple[float, float] = (0.9, 0.999),
                 eps: float = 1e-8, weight_decay: float = 0.0, rank: int = 0, ranks: int = 1,
                 limit: int = 1 << 26):
        self.buckets = []
        for params in group_parameters(model, limit):
            decay = weight_decay if params[0].ndim >= 2 else 0.0
            bucket = Bucket(params, rank, ranks, betas=betas, eps=eps, weight_decay=decay)
            self.buckets.append(bucket)
        self.params = [p for bucket in self.buckets for p in bucket.params]

    def step(self, lr: float, scale: Tensor) -> None:
        """One update with `scale` (a tensor of one number) times the gradients."""
        for bucket in self.buckets:
            bucket.step(lr, scale)

    def zero_grad(self) -> None:
        for p in self.params:
            p.grad = None

    def state(self) -> dict[str, Tensor]:
        """This rank's shard as a checkpoint keeps it: <bucket>.<name>."""
        return {f"{i}.{name}": x for i, bucket in enumerate(self.buckets)
                for name, x in bucket.state().items()}

    def load(self, paths: list[Path]) -> None:
        """
        The files of all ranks that wrote a checkpoint, in their order. Raises ValueError for those
        of another model.
        """
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(safe_open(path, "pt")) for path in paths]
            names = sorted(self.state())
            for file in files:
                if sorted(file.keys()) != names:
                    raise ValueError(f"its optimizer has {len(file.keys())} tensors, not "
                                     f"{len(names)}")
            for i, bucket in enumerate(self.buckets):
                n = sum(file.get_slice(f"{i}.master").get_shape()[0] for file in files)
                if not 0 <= n - bucket.n < len(files):          # each rank pads by less than one
                    raise ValueError(f"bucket {i} of its optimizer has {n} elements, not "
                                     f"{bucket.n}")
                bucket.load({name: [file.get_tensor(f"{i}.{name}") for file in files]
                             for name in bucket.state()})


def learning_rate(step: int, config) -> float:
    """Linear warm-up, then a cosine to zero."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.lr * 0.5 * (1 + math.cos(math.pi * progress))


# ------------------------------------------------------------------ a run

PATIENCE = 10       # steps in a row without a finite loss and gradient, then the run gives up


class Run:
    """
    The toolbox of a training loop in `folder`: it resumes from the last checkpoint, updates the
    weights, logs and saves.

    Iterating over it gives the steps still to do. After each, the log's line is written and a
    checkpoint where one is due. SIGTERM or Ctrl-C end the run after the current step, with a
    checkpoint; a second one ends it at once.

    `log.jsonl` holds one object per step. Lines of steps that are repeated after a crash are
    dropped first: every step is in it once. A progress bar shows the metrics named in `show`. Only
    rank 0 writes either.
    """

    def __init__(self, folder: Path, model: nn.Module, config, world: World,
                 show: tuple[str, ...] = ("loss",)):
        self.folder, self.model, self.config, self.world = folder, model, config, world
        self.show = show                    # the metrics of the progress bar
        self.optimizer = AdamW(model, (config.beta1, config.beta2), config.eps,
                               config.weight_decay, world.rank, world.size)
        self.first = checkpoint.resume(folder, model, self.optimizer, config, world)
        self.current, self.skipped, self.stopping, self.line = self.first, 0, False, {}

    # -- what a loop calls

    def accumulate(self, micro_batches: Iterable, model: nn.Module) -> Iterator:
        """
        Gradient accumulation: yields the micro-batches, of which there are as many on every rank.
        DDP (model) averages the gradients over the ranks in the backward pass of the last one only.
        """
        micro_batches = list(micro_batches)
        for i, micro_batch in enumerate(micro_batches):
            last = i + 1 == len(micro_batches)
            model.require_backward_grad_sync = last         # DDP reads it; others ignore it
            yield micro_batch

    def step(self, loss: Tensor, **metrics) -> bool:
        """
        Clips the gradients, takes one AdamW step and clears them -> whether it was taken. For the
        log: loss, this rank's sum / the global batch, and other metrics.

        A loss or gradient that is not finite is skipped, by all ranks together; UserError after
        PATIENCE in a row.
        """
        loss = self.world.all_reduce(loss)
        gradients = [p.grad for p in self.optimizer.params if p.grad is not None]
        norms = [torch.linalg.vector_norm(g, dtype=torch.float32) for g in gradients]
        norm = torch.stack(norms).norm()
        lr = learning_rate(self.current, self.config)
        finite = bool(torch.isfinite(loss) & torch.isfinite(norm))
        if finite:
            limit = self.config.max_grad_norm or math.inf
            self.optimizer.step(lr, (limit / (norm + 1e-6)).clamp(max=1.0))
        self.optimizer.zero_grad()
        self.skipped = 0 if finite else self.skipped + 1
        self.log(loss=loss, grad_norm=norm, learning_rate=lr, skipped=self.skipped, **metrics)
        if self.skipped == PATIENCE:
            saved = checkpoint.checkpoints(self.folder)
            raise UserError(f"{self.folder}: loss or gradient was not finite in the {PATIENCE} "
                            f"steps up to {self.current}: lower --lr (now {self.config.lr}), or "
                            "look at the data. Last good checkpoint: "
                            f"{saved[-1] if saved else 'none'}")
        return finite

    def log(self, **metrics) -> None:
        """Adds metrics (numbers, or tensors of one) to the line of this step."""
        self.line |= metrics

    # -- the steps

    def __iter__(self) -> Iterator[int]:
        for self.current in range(self.first, self.config.steps):
            yield self.current
            self._write_line()
            done = self.current + 1
            stopping = torch.tensor(float(self.stopping), device=self.world.device)
            stop = self.world.all_reduce(stopping) > 0          # on any rank
            if stop or done % self.config.save_every == 0 or done == self.config.steps:
                checkpoint.save_checkpoint(self.folder, self.model, self.optimizer, self.current,
                                           self.config, self.world)
            if stop:
                raise KeyboardInterrupt

    def __enter__(self) -> "Run":
        self.handlers = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self.handlers[number] = signal.signal(number, self._stop)
        if self.world.is_main:
            path = self.folder / "log.jsonl"
            lines = path.read_text().splitlines() if path.exists() else []
            with checkpoint.replacing(path) as part:
                part.write_text("".join(line + "\n" for line in lines[:self.first]))
            self.file = open(path, "a")
            interval = 0.2 if sys.stderr.isatty() else 10       # in a file: a line every 10 seconds
            self.bar = tqdm(total=self.config.steps, initial=self.first, desc=self.folder.name,
                            ncols=100, unit="step", mininterval=interval)
        self.time = time.perf_counter()
        return self

    def _stop(self, number, frame) -> None:
        self.stopping = True
        signal.signal(number, self.handlers[number])            # the second signal ends the process

    def __exit__(self, *_) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if self.world.is_main:
            self.file.close()
            self.bar.close()

    def _write_line(self) -> None:
        now = time.perf_counter()
        line = {k: v.item() if isinstance(v, Tensor) else v for k, v in self.line.items()}
        if self.world.is_main:
            whole = {"step": self.current} | line | {"step_time": now - self.time}
            self.file.write(json.dumps({k: _short(v) for k, v in whole.items()}) + "\n")
            self.file.flush()
            shown = {name: f"{line[name]:.3g}" for name in self.show if name in line}
            self.bar.set_postfix(shown, refresh=False)
            self.bar.update()
        self.time, self.line = now, {}


def _short(x):
    """A float with six digits; as a text where JSON has no number for it."""
    if not isinstance(x, float):
        return x
    return float(f"{x:.6g}") if math.isfinite(x) else str(x)
