"""
What the training loops share: start-up with or without torchrun, flags from a dataclass, the optimizer and its schedule,
the order of the data, checkpoints and the log. Nothing in here knows what is being trained.

A stage's loop reads:

    config = train.parse(Config, PRESETS, argv)             # flags -> dataclass, one clear error for what is wrong
    world = train.start(config.seed)                        # rank, size, device
    loss_of = train.distribute(Loss(model), world)
    with train.Run(folder, model, config, world) as run:    # goes on from the last checkpoint
        for step in run:                                    # saves where due
            rows = world.share(train.rows(config.seed, step, config.batch, len(data)))
            loss = loss_of(data[rows]).sum() / config.batch         # this rank's sum / the global batch
            (loss * world.size).backward()                          # DDP averages over ranks: this makes it the sum
            run.step(loss, accuracy=...)

Everything random in a step is drawn from a generator made of (seed, step), never from a running state. So a run that was
killed and goes on draws what it would have drawn, and the number of ranks does not change what a step sees.
"""
import argparse
import contextlib
import ctypes
import dataclasses
import datetime
import difflib
import fcntl
import functools
import json
import math
import os
import shutil
import signal
import sys
import threading
import time
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Iterable, Iterator

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import sim


class Problem(Exception):
    """Something the user can put right. Shown as one line, without a traceback; exit code 2."""


def cli(main) -> None:
    """Runs a script's main(); turns what a user can mend into one line and an exit code."""
    try:
        main()
    except Problem as problem:
        sys.stderr.write(f"\n{Path(sys.argv[0]).name}: {problem}\n")
        sys.exit(2)
    except OSError as error:                # a full disk, a file that vanished: the message names it
        sys.stderr.write(f"\n{Path(sys.argv[0]).name}: {error}\n")
        sys.exit(2)
    except RuntimeError as error:           # of gloo and NCCL, when the other end of a connection is gone or silent
        lost = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out", "timed out", "timeout")
        if not dist.is_initialized() or not any(text in str(error) for text in lost):
            raise
        sys.stderr.write(f"\n{Path(sys.argv[0]).name}: rank {dist.get_rank()} has lost another, which died or hangs: see what that "
                         "one said. The same command (without --fresh) goes on from the last checkpoint.\n")
        sys.stderr.flush()
        os._exit(1)                         # destroying the group would wait for the lost one
    except KeyboardInterrupt:
        sys.stderr.write("\nstopped. The same command (without --fresh) goes on from the last checkpoint.\n")
        sys.exit(130)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


# ------------------------------------------------------------------ flags

def parse(Config, presets: dict[str, dict], argv: list[str] | None):
    """
    Command line -> Config. Every field is a flag (`--lr 1e-3`; a bool is a switch); `--preset` fills the rest.

    Raises SystemExit (code 2, one line) for an unknown flag or preset or a value of the wrong type, Problem for a number
    out of range.
    """
    fields = dataclasses.fields(Config)
    parser = argparse.ArgumentParser(allow_abbrev=False, usage="%(prog)s [--preset tiny] [--FIELD VALUE ...]")
    parser.add_argument("--preset", default="tiny", help=f"one of {', '.join(presets)} (default: tiny)")
    for field in fields:
        if field.name == "preset":
            continue
        elif field.type is bool:
            parser.add_argument(f"--{field.name}", action="store_true", default=None)
        else:
            parser.add_argument(f"--{field.name}", type=field.type, default=None, metavar=field.type.__name__)
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        known = [f"--{field.name}" for field in fields]
        near = difflib.get_close_matches(unknown[0].split("=")[0], known, 1, 0.4)
        parser.error(f"unknown argument {unknown[0]}" + (f": did you mean {near[0]}?" if near else ""))
    if given.preset not in presets:
        near = difflib.get_close_matches(given.preset, presets, 1, 0.4)
        parser.error(f"unknown preset {given.preset!r}: choose one of {', '.join(presets)}"
                     + (f" (did you mean {near[0]}?)" if near else ""))
    config = Config(**presets[given.preset])
    for name, value in vars(given).items():
        if value is not None:
            setattr(config, name, value)
    config.out = config.out or f"runs/{config.preset}"
    for field in fields:
        value = getattr(config, field.name)
        if field.type in (int, float) and not (math.isfinite(value) and value >= 0):
            raise Problem(f"--{field.name} {value}: must be a finite number of at least 0")
        if field.type is int and value == 0 and field.default != 0:
            raise Problem(f"--{field.name} 0: must be at least 1")
        if field.name in ("beta1", "beta2") and value >= 1 or field.name == "seed" and value >= 2 ** 63:
            raise Problem(f"--{field.name} {value}: too large")
    return config


def handed_on(config) -> list[str]:
    """The flags with which a stage starts the one before it; the rest are that stage's own defaults."""
    return ["--preset", config.preset, "--out", config.out, "--seed", str(config.seed), "--scenario", config.scenario]


def scenarios(name: str) -> list[str]:
    """--scenario: one of the simulator's, or all."""
    if name != "all" and name not in sim.SCENARIOS:
        raise Problem(f"unknown --scenario {name!r}: choose one of all, {', '.join(sim.SCENARIOS)}")
    return list(sim.SCENARIOS) if name == "all" else [name]


def need(condition: bool, text: str) -> None:
    """One line for a configuration that cannot work."""
    if not condition:
        raise Problem(text)


# ------------------------------------------------------------------ ranks

@dataclass
class World:
    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Rank 0: prints, evaluates and writes files."""
        return self.rank == 0

    def share(self, x):
        """This rank's part of a global batch; parts differ in size by one at most. Problem if one would be empty."""
        n = len(x)
        if n < self.size:
            raise Problem(f"a batch of {n} cannot be shared by {self.size} ranks: use fewer ranks or a larger batch")
        return x[n * self.rank // self.size: n * (self.rank + 1) // self.size]

    def parts(self, batch: int, micro: int, each: int = 1) -> int:
        """
        Into how many backward passes of at most `micro` rows (0: no limit) the largest share of a batch is cut, of `each`
        rows an element: the same on every rank.
        """
        return parts_of(math.ceil(batch / self.size) * each, micro)

    def autocast(self):
        """Matrix products in bf16 on a GPU; fp32 on the CPU, where many have no bf16."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    def compile(self, *modules: nn.Module) -> None:
        """torch.compile in place on a GPU, where small models are bound by launches. (A CPU would need a C++ compiler.)"""
        for module in modules if self.device.type == "cuda" else ():
            module.compile()

    def say(self, text: str) -> None:
        if self.is_main:
            print(text, flush=True)


def parts_of(share: int, micro: int) -> int:
    return math.ceil(share / micro) if micro else 1


def start(seed: int) -> World:
    """Joins torchrun's process group if there is one, chooses the device, seeds torch. May be called more than once."""
    global _patient
    rank, size, local = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)      # die with torchrun: kill -9 would leave its workers training
    if torch.cuda.is_available() and local >= torch.cuda.device_count():
        raise Problem(f"{local + 1} ranks on {torch.cuda.device_count()} GPUs: lower --nproc_per_node, or set "
                      "CUDA_VISIBLE_DEVICES= to run on the CPU")
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    else:
        torch.set_flush_denormal(True)      # a nearly collapsed model is full of denormals: 1.36 s a step against 0.14
        if size > 1:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", size))))
    if size > 1 and not dist.is_initialized():          # a rank that dies or hangs ends the others within a minute ...
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(minutes=1))
        _patient = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=1))   # ... unless they wait for it to evaluate
    torch.manual_seed(seed)                 # the same initial weights on every rank
    return World(rank, size, device)


def total(x: Tensor) -> Tensor:
    """Sum of a tensor over the ranks, for the log: without its graph, which a running mean would keep alive."""
    x = x.detach()
    if dist.is_initialized():
        x = x.clone()
        dist.all_reduce(x)
    return x


_patient = None         # a process group for what may take long


def gather_objects(x) -> list:
    """An object of each rank -> those of all of them, in the order of the ranks."""
    everyone = [x]
    if dist.is_initialized():
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, x, group=_patient)
    return everyone


def wait(world: World) -> None:
    """All ranks meet here: nobody reads a file before rank 0 has written it."""
    if world.size > 1:
        dist.barrier(group=_patient)


def distribute(model: nn.Module, world: World) -> nn.Module:
    """DistributedDataParallel if there are several ranks. Buffers (EMA codebooks) keep themselves equal."""
    if world.size == 1:
        return model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)      # torch 2.13 renames broadcast_buffers, 2.11 knows no other
        return nn.parallel.DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)


# ------------------------------------------------------------------ randomness and the order of the data

def generator(*key: int, device="cpu") -> torch.Generator:
    """A generator that is a function of integers such as (seed, step)."""
    state = np.random.SeedSequence((len(key), *key)).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(state >> 1))


@functools.lru_cache(maxsize=2)
def _epoch(seed: int, epoch: int, n: int) -> Tensor:
    return torch.randperm(n, generator=generator(seed, epoch))


def rows(seed: int, step: int, batch: int, n: int) -> Tensor:
    """Indices (batch,) of the data that a step sees: shuffled epochs of n, one after the other."""
    at = torch.arange(step * batch, (step + 1) * batch)
    return torch.stack([_epoch(seed, int(i) // n, n)[i % n] for i in at])


# ------------------------------------------------------------------ optimizer

class Bucket:
    """
    Some parameters seen as one flat vector, of which every rank owns an equal part: `master`, in fp32, and its moments.

    After torch's AdamW (fused) has updated the masters, the ranks gather the new weights from each other.
    """

    def __init__(self, params: list[nn.Parameter], weight_decay: float, config, world: World):
        self.params, self.rank, self.size = params, world.rank, world.size
        self.n = sum(p.numel() for p in params)
        self.part = -(-self.n // self.size)                             # the last rank's may be filled up with zeros
        self.master = nn.Parameter(self.own(torch.cat([p.detach().flatten() for p in params])).float().clone())
        self.adamw = torch.optim.AdamW([self.master], lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps,
                                       weight_decay=weight_decay, fused=True)

    def own(self, flat: Tensor) -> Tensor:
        """This rank's part (part,) of a flat vector (n,)."""
        mine = flat[self.rank * self.part:(self.rank + 1) * self.part]
        return nn.functional.pad(mine, (0, self.part - len(mine)))

    @torch.no_grad()
    def step(self, lr: float, scale: Tensor) -> None:
        """One update with `scale` times the parameters' gradients."""
        gradient = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in self.params])
        self.master.grad = self.own(gradient).float() * scale
        self.adamw.param_groups[0]["lr"] = lr
        self.adamw.step()
        self.master.grad = None
        new = self.master.detach().to(self.params[0].dtype)
        if self.size > 1:
            parts = new.new_empty(self.size * self.part)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)          # torch 2.13 renames it, 2.11 knows no other
                dist.all_gather_into_tensor(parts, new)
            new = parts
        for p, x in zip(self.params, new[:self.n].split([p.numel() for p in self.params])):
            p.copy_(x.view(p.shape))

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps of this rank's part. All but the step are (part,)."""
        zeros = {"exp_avg": torch.zeros_like(self.master), "exp_avg_sq": torch.zeros_like(self.master), "step": torch.zeros(())}
        return {"master": self.master.detach()} | (self.adamw.state.get(self.master) or zeros)

    def load(self, parts: dict[str, list[Tensor]]) -> None:
        """`parts`: of every name in `state` the tensors of all ranks, which may have been more or fewer than now."""
        state = {k: v[0] if k == "step" else self.own(torch.cat(v)[:self.n].to(self.master.device)) for k, v in parts.items()}
        self.master.data.copy_(state.pop("master"))
        self.adamw.state[self.master] = {k: v.clone() for k, v in state.items()}


def grouped(model: nn.Module, limit: int = 1 << 26) -> list[list[nn.Parameter]]:
    """
    What is trained, in lists of one dtype, matrices or vectors, of at most `limit` elements or one tensor: what a step
    copies stays small beside a model of billions.
    """
    groups: list[list[nn.Parameter]] = []
    for p in sorted((p for p in model.parameters() if p.requires_grad), key=lambda p: p.ndim < 2):
        if not groups or (groups[-1][0].ndim < 2, groups[-1][0].dtype) != (p.ndim < 2, p.dtype) \
                or sum(x.numel() for x in groups[-1]) + p.numel() > limit:
            groups.append([])
        groups[-1].append(p)
    return groups


class AdamW:
    """
    AdamW with fp32 masters and moments, sharded over the ranks (ZeRO-1, Rajbhandari et al. 2020): 12 bytes a parameter,
    divided by the number of ranks. Weight decay on matrices only.

    Without masters bf16 weights do not follow: next to 0.02 they are 1.2e-4 apart, and a step of 3e-6 rounds to nothing.
    """

    def __init__(self, model: nn.Module, config, world: World, limit: int = 1 << 26):
        self.buckets = [Bucket(params, config.weight_decay if params[0].ndim >= 2 else 0.0, config, world)
                        for params in grouped(model, limit)]
        self.params = [p for bucket in self.buckets for p in bucket.params]

    def step(self, lr: float, scale: Tensor) -> None:
        for bucket in self.buckets:
            bucket.step(lr, scale)

    def zero_grad(self) -> None:
        for p in self.params:
            p.grad = None

    def state(self) -> dict[str, Tensor]:
        """This rank's part, as a checkpoint keeps it: <bucket>.<name>."""
        return {f"{i}.{k}": v for i, bucket in enumerate(self.buckets) for k, v in bucket.state().items()}

    def load(self, files: list[Path], path: Path) -> None:
        """The files of all ranks that wrote a checkpoint, in their order. Raises Problem for another model's."""
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(safe_open(file, "pt")) for file in files]
            names = sorted(self.state())
            for file in files:
                need(sorted(file.keys()) == names, f"{path} does not fit this model: its optimizer has {len(file.keys())} "
                     f"tensors, not {len(names)}")
            for i, bucket in enumerate(self.buckets):
                n = sum(file.get_slice(f"{i}.master").get_shape()[0] for file in files)
                need(0 <= n - bucket.n < len(files), f"{path} does not fit this model: bucket {i} of its optimizer has {n} "
                     f"elements, not {bucket.n}")
                bucket.load({k: [file.get_tensor(f"{i}.{k}") for file in files] for k in bucket.state()})


def learning_rate(step: int, config) -> float:
    """Linear warm-up, then a cosine to zero."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.lr * 0.5 * (1 + math.cos(math.pi * done))


# ------------------------------------------------------------------ a run

# fields that may change between two runs of the same training: parts of a batch and checkpointing change only how it is computed,
# and of --vae the weights are compared, wherever they lie
FREE = {"out", "vae", "fresh", "save_every", "eval_clips", "plan", "world", "micro", "checkpointing", "calls"}
PATIENCE = 10       # steps in a row without a finite gradient, then the run gives up


class Run:
    """
    A training run in `folder`: goes on from its last checkpoint, updates the weights, keeps the log and saves.

    Iterating over it gives the steps still to do. After each the log's line is written and a checkpoint where one is due;
    SIGTERM or Ctrl-C end the run after the step at hand, with a checkpoint. A second one ends it at once.

    `log.jsonl` holds one object a step; lines of steps that are done again after a crash are dropped, so that every step
    stands in it once. A progress bar shows the metrics named in `show`. Only rank 0 writes either.
    """

    def __init__(self, folder: Path, model: nn.Module, config, world: World, show: tuple[str, ...] = ("loss",)):
        self.folder, self.model, self.config, self.world, self.show = folder, model, config, world, show
        self.optimizer = AdamW(model, config, world)
        self.first = resume(folder, model, self.optimizer, config, world)
        self.current, self.skipped, self.stopping, self.line = self.first, 0, False, {}

    # -- the steps

    def __enter__(self) -> "Run":
        if threading.current_thread() is threading.main_thread():
            self.handlers = {s: signal.signal(s, self._stop) for s in (signal.SIGTERM, signal.SIGINT)}
        else:
            self.handlers = {}
        if self.world.is_main:
            path = self.folder / "log.jsonl"
            kept = path.read_text().splitlines()[:self.first] if self.first and path.exists() else []
            with replacing(path) as aside:
                aside.write_text("".join(line + "\n" for line in kept))
            self.file = open(path, "a")
            quiet = not sys.stderr.isatty()                 # in a file: a line every 10 seconds, not ten a second
            self.bar = tqdm(total=self.config.steps, initial=self.first, desc=self.folder.name, ncols=100, unit="step",
                            mininterval=10 if quiet else 0.2)
        self.time = time.perf_counter()
        return self

    def _stop(self, number, frame) -> None:
        self.stopping = True
        signal.signal(number, self.handlers[number])

    def __iter__(self) -> Iterator[int]:
        for self.current in range(self.first, self.config.steps):
            yield self.current
            self._write_line()
            stop = total(torch.tensor(float(self.stopping), device=self.world.device)) > 0      # on any rank
            if stop or (self.current + 1) % self.config.save_every == 0 or self.current + 1 == self.config.steps:
                checkpoint(self.folder, self.model, self.optimizer, self.current, self.config, self.world)
            if stop:
                raise KeyboardInterrupt

    def __exit__(self, *_) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if self.world.is_main:
            self.file.close()
            self.bar.close()

    # -- what a step does

    def accumulate(self, parts: Iterable, model: nn.Module) -> Iterator:
        """
        Gradient accumulation: yields the micro-batches `parts`, of which there are as many on every rank. Under DDP the
        gradients are averaged over the ranks in the backward pass of the last one only.
        """
        parts = list(parts)
        for i, part in enumerate(parts):
            model.require_backward_grad_sync = i + 1 == len(parts)          # of DDP; on one rank nothing looks at it
            yield part

    def step(self, loss: Tensor, **metrics) -> bool:
        """
        One optimizer step with the gradients that there are -> whether it was taken. loss: this rank's sum over its rows /
        the size of the global batch, for the log, beside other metrics.

        A loss or gradient that is not finite is left out, by all ranks together; Problem after PATIENCE of them in a row.
        """
        loss = total(loss)
        norm = torch.stack([torch.linalg.vector_norm(p.grad, dtype=torch.float32)
                            for p in self.optimizer.params if p.grad is not None]).norm()
        lr = learning_rate(self.current, self.config)
        finite = bool(torch.isfinite(loss) & torch.isfinite(norm))
        if finite:
            clip = self.config.clip or math.inf
            self.optimizer.step(lr, (clip / (norm + 1e-6)).clamp(max=1.0))
        self.optimizer.zero_grad()
        self.skipped = 0 if finite else self.skipped + 1
        self.log(loss=loss, grad_norm=norm, learning_rate=lr, skipped=self.skipped, **metrics)
        if self.skipped == PATIENCE:
            last = checkpoints(self.folder)
            raise Problem(f"{self.folder}: loss or gradient was not finite in the {PATIENCE} steps up to {self.current}: lower --lr "
                          f"(now {self.config.lr}), or look at the data. Last good checkpoint: {last[-1] if last else 'none'}")
        return finite

    def log(self, **metrics) -> None:
        """Metrics (numbers, or tensors of one) for the line of this step."""
        self.line |= metrics

    def _write_line(self) -> None:
        now = time.perf_counter()
        line = {k: v.item() if isinstance(v, Tensor) else v for k, v in self.line.items()}
        if self.world.is_main:
            whole = {"step": self.current} | line | {"step_time": now - self.time}
            short = {k: (float(f"{v:.6g}") if math.isfinite(v) else str(v)) if isinstance(v, float) else v for k, v in whole.items()}
            self.file.write(json.dumps(short) + "\n")
            self.file.flush()
            self.bar.set_postfix({k: f"{line[k]:.3g}" for k in self.show if k in line}, refresh=False)
            self.bar.update()
        self.time, self.line = now, {}


# ------------------------------------------------------------------ files

def writable(folder: Path) -> Path:
    """Makes a folder and tries to write in it, before hours of training do."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise Problem(f"cannot write to {folder} ({error.strerror}): choose another folder with --out")
    return folder


def occupy(folder: Path, world: World) -> None:
    """
    One training at a time in a run folder: two would overwrite each other's checkpoints. Freed when the process ends. All ranks
    call it, and none goes on before the folder is known to be free.
    """
    if world.is_main and str(folder) not in _occupied:
        _occupied[str(folder)] = file = open(folder / ".lock", "w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Problem(f"another process is training in {folder}: stop it, or choose another --out") from None
    wait(world)


_occupied: dict[str, object] = {}


@contextlib.contextmanager
def replacing(path: Path, suffix: str = ".part") -> Iterator[Path]:
    """
    A name to write to beside `path`; afterwards it is flushed to disk and renamed. At `path` there is the old file or the
    new one, never half of one.
    """
    aside = path.with_name(path.name + suffix)
    yield aside
    with open(aside, "rb") as file:
        os.fsync(file.fileno())
    os.replace(aside, path)


def write_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """At `path` there is the old file or the new one, never half of one."""
    with replacing(path) as aside:
        save_file({k: v.detach().contiguous().cpu() for k, v in tensors.items()}, aside, metadata)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(aside, 0o666 & ~umask)     # safetensors writes 0600 whatever the umask


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """-> tensors, metadata. Raises Problem for a file that is missing or damaged."""
    try:
        with safe_open(path, "pt") as file:
            tensors, metadata = {k: file.get_tensor(k) for k in file.keys()}, file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise Problem(f"cannot read {path} ({error}). If a stage here made it, start that over with --fresh")
    broken = [k for k, v in tensors.items() if v.is_floating_point() and not torch.isfinite(v).all()]
    if broken:
        raise Problem(f"{path} holds NaN or infinity in {broken[0]}. If a stage here made it, start that over with --fresh")
    return tensors, metadata


def load_state(model: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """load_state_dict with one line for what does not fit."""
    own = model.state_dict()
    for name in [*own, *tensors]:
        if name not in tensors or name not in own or own[name].shape != tensors[name].shape:
            shapes = [tuple(d[name].shape) if name in d else "nothing" for d in (own, tensors)]
            raise Problem(f"{path} does not fit this model: {name} should be {shapes[0]}, the file has {shapes[1]}")
    model.load_state_dict(tensors)


def _write_json(path: Path, value) -> None:
    with replacing(path, f".{os.getpid()}.part") as aside:          # several ranks may write the same
        aside.write_text(json.dumps(value) + "\n")


def checksum(path: Path) -> str:
    crc = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            crc = zlib.crc32(block, crc)
    return f"{crc:08x}"


# ------------------------------------------------------------------ checkpoints

# <folder>/checkpoint-<steps done>/ holds model.safetensors, optimizer-<rank>.safetensors of every rank and, written last,
# manifest.json: steps done, ranks, config, checksum of every file. Without a manifest it is not one. The last two are kept.
# What is random and which data a step sees are functions of (seed, step): there is no state of theirs to keep.


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints of a folder, oldest first."""
    return sorted((path.parent for path in folder.glob("checkpoint-*/manifest.json")), key=lambda path: path.name)


def checkpoint(folder: Path, model: nn.Module, optimizer: AdamW, step: int, config, world: World) -> None:
    """Saves after `step`. If that fails (a full disk), the run says so and goes on; the last checkpoint stays."""
    path, error = folder / f"checkpoint-{step + 1:08d}", ""
    files = {f"optimizer-{world.rank}.safetensors": optimizer.state()}
    if world.is_main:
        files["model.safetensors"] = model.state_dict()
        if path.exists():
            shutil.rmtree(path)             # incomplete, or damaged: a whole one would not be done again
    wait(world)
    try:
        path.mkdir(exist_ok=True)
        for name, tensors in files.items():
            write_safetensors(path / name, tensors, {})
        sums = {name: checksum(path / name) for name in files}
    except (OSError, SafetensorError) as problem:
        error, sums = str(problem), {}
    everywhere = gather_objects((error, sums))
    error = next((e for e, _ in everywhere if e), "")
    if world.is_main:
        try:
            if error:
                raise OSError(error)
            manifest = {"step": step + 1, "ranks": world.size, "config": dataclasses.asdict(config),
                        "files": {name: crc for _, of_rank in everywhere for name, crc in of_rank.items()}}
            _write_json(path / "manifest.json", manifest | {"checksum": _checksum_of(manifest)})
            for old in checkpoints(folder)[:-2]:
                _remove(old)
        except OSError as problem:
            _remove(path)
            sys.stderr.write(f"\ncould not save {path} ({problem}): training goes on, and tries again at the next checkpoint\n")
    wait(world)


def _checksum_of(manifest: dict) -> str:
    return f"{zlib.crc32(json.dumps(manifest, sort_keys=True).encode()):08x}"


def damage(path: Path, world: World) -> str:
    """What is wrong with a checkpoint; nothing: an empty text. The ranks share the reading."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        if manifest.pop("checksum") != _checksum_of(manifest) or path.name != f"checkpoint-{manifest['step']:08d}":
            return "manifest.json is not what was written"
        files = manifest["files"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"manifest.json is not what was written: {error!r}"
    wrong = ""
    for name in sorted(files)[world.rank::world.size]:
        try:
            if checksum(path / name) != files[name]:
                wrong = f"{name} is not what was written"
            else:
                read_safetensors(path / name)
        except (OSError, Problem) as error:
            wrong = str(error)
    return next(filter(None, gather_objects(wrong)), "")


def resume(folder: Path, model: nn.Module, optimizer: AdamW, config, world: World) -> int:
    """
    Loads the newest whole checkpoint of `folder` -> the step to go on with; 0 without one, or with --fresh.

    A damaged one is named and the one before it taken. Raises Problem when all are damaged, or for another configuration.
    """
    found = [] if config.fresh else checkpoints(folder)[::-1]
    reasons = []
    for path in found:
        reason = damage(path, world)
        if reason:
            reasons.append(f"{path} is damaged ({reason})")
            world.say(reasons[-1])
            continue
        manifest = json.loads((path / "manifest.json").read_text())
        if changed := [*differences(manifest["config"], config).values()]:
            raise Problem(f"{path} is of another configuration ({'; '.join(changed[:4])}): restore that, choose another "
                          "--out, or start over with --fresh")
        load_state(model, read_safetensors(path / "model.safetensors")[0], path)
        optimizer.load([path / f"optimizer-{i}.safetensors" for i in range(manifest["ranks"])], path)
        return manifest["step"]
    if reasons:
        raise Problem(f"{'; '.join(reasons)}: start over with --fresh, or choose another --out")
    return 0


def differences(then: dict, config) -> dict[str, str]:
    """Field -> what it was and is, of those that a training depends on."""
    return {k: f"{k} was {then.get(k)}, is {v}" for k, v in dataclasses.asdict(config).items()
            if k not in FREE and then.get(k) != v}


def finish(folder: Path, save, config, model: nn.Module, world: World) -> None:
    """Saves the finished model with `save(folder)` and the config beside it; the checkpoints have done their work."""
    mean = torch.stack([p.detach().double().mean() for p in model.state_dict().values() if p.is_floating_point()])
    if (total(mean) / world.size - mean).abs().max() > 1e-12:
        raise RuntimeError(f"the ranks hold different models at the end of {folder}: this is a bug")
    if world.is_main:
        _write_json(folder / "trained.json", {k: v for k, v in dataclasses.asdict(config).items() if k not in FREE})
        save(folder)
        _drop_checkpoints(folder)
    wait(world)


def is_trained(folder: Path, name: str, config, world: World) -> bool:
    """Whether a finished model is there (and not --fresh). Problem when it was trained with another configuration."""
    if config.fresh or not (folder / name).exists():
        return False
    if (folder / "trained.json").exists():
        if changed := [*differences(json.loads((folder / "trained.json").read_text()), config).values()]:
            raise Problem(f"{folder} was trained with another configuration ({'; '.join(changed[:4])}): restore that, "
                          "choose another --out, or train it again with --fresh")
    wait(world)
    if world.is_main:
        _drop_checkpoints(folder)           # left by a kill between saving and cleaning up
    world.say(f"{folder} is trained (--fresh trains it again)")
    return True


def _drop_checkpoints(folder: Path) -> None:
    for path in folder.glob("checkpoint-*"):
        _remove(path)


def _remove(checkpoint: Path) -> None:
    """The manifest first: what a kill leaves of it does not pass for a checkpoint."""
    (checkpoint / "manifest.json").unlink(missing_ok=True)
    shutil.rmtree(checkpoint, ignore_errors=True)


def discard(folder: Path) -> None:
    """--fresh: what a stage had made is gone, so that a run killed half-way does not pass for the old one."""
    _drop_checkpoints(folder)
    for name in ("model.safetensors", "diffusion_pytorch_model.safetensors", "trained.json"):
        (folder / name).unlink(missing_ok=True)


def script(name: str) -> str:
    """What trains the model in <out>/<name>."""
    return f"baselines.py {name}" if name in ("vqgan", "dit") else f"{name}.py"


def made_of(folder: Path, **sources: Path) -> None:
    """Notes which weight files a stage starts from, once `check_made_of` has nothing against them."""
    _write_json(folder / "made_of.json", check_made_of(folder, **sources))                # every rank writes the same


def check_made_of(folder: Path, **sources: Path) -> dict[str, str]:
    """
    Checksums of weight files; Problem when the folder's model or checkpoint started from others. Without it, a model would
    silently be used with the codes of a tokenizer that has been trained anew since.
    """
    now = {name: checksum(source) for name, source in sources.items()}
    note = folder / "made_of.json"
    if note.exists() and (checkpoints(folder) or (folder / "model.safetensors").exists()):
        then = json.loads(note.read_text())
        other = [name for name in now if then.get(name) != now[name]]
        if other:
            raise Problem(f"{folder} was trained from another {other[0]} than {sources[other[0]].parent}: train it again with "
                          f"`python {script(folder.name)} --fresh --out {folder.parent}`, or choose another --out")
    return now


# ------------------------------------------------------------------ what a run will need

GIB = 2 ** 30
CARDS = {"A800-80GB": (79.3 * GIB, 312e12, 2.0e12), "H200": (139.8 * GIB, 989e12, 4.8e12)}   # memory, bf16 FLOP/s, bytes/s by datasheet
UTILISATION = 0.4       # of the FLOP/s, assumed


@dataclass
class Plan:
    """What a rank of a stage needs (bytes), and what a step costs all ranks together."""
    fixed: dict[str, float]     # parameters, gradients, ...: always there
    passing: dict[str, float]   # one after the other: only the largest counts
    tokens: float               # trained on or sampled, a step
    flops: float                # of matrix products, a step
    read: float = 0.0           # bytes that a rank reads while it decodes, a step: decoding waits for memory, not for FLOPs

    @property
    def total(self) -> float:
        return sum(self.fixed.values()) + max(self.passing.values())

    def hours(self, card: str, ranks: int, steps: int) -> float:
        _, rate, bandwidth = CARDS[card]
        return steps * (self.flops / (UTILISATION * rate * ranks) + self.read / bandwidth) / 3600


def training_memory(model: nn.Module, ranks: int) -> dict[str, float]:
    """Of a model on any device, meta included: its weights, their gradients, this rank's part of the optimizer."""
    groups = grouped(model)
    sizes = [sum(p.nbytes for p in params) for params in groups]
    return {"parameters": sum(p.nbytes for p in model.parameters()), "gradients": sum(sizes),
            "masters and moments, fp32": 12 * sum(p.numel() for params in groups for p in params) / ranks,
            "copies of a bucket": 2 * max(sizes)}


def rows_at_once(batch: int, ranks: int, micro: int, each: int = 1) -> int:
    """Rows of the largest backward pass on any rank: see World.parts."""
    share = math.ceil(batch / ranks) * each
    return math.ceil(share / parts_of(share, micro))


class FusedAttention(torch.autograd.Function):
    """Computes nothing, and keeps what a fused kernel keeps: q, k, v and the output. (The meta device would keep S x S.)"""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v, out := torch.empty_like(q))
        return out


def measure(forward: Callable[[], Tensor], model: nn.Module) -> tuple[float, float]:
    """
    A forward pass of `model`, which is on the meta device and so computes nothing -> FLOPs of its matrix products, bytes
    it keeps for the backward pass besides the model's own tensors.
    """
    attention, plain = 0, nn.functional.scaled_dot_product_attention

    def fused(q: Tensor, k: Tensor, v: Tensor, **_) -> Tensor:
        nonlocal attention
        attention += 4 * q.numel() * k.shape[-2]
        return FusedAttention.apply(q, k, v)
    own = {x.untyped_storage()._cdata for x in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage()._cdata] = x
        return x
    nn.functional.scaled_dot_product_attention = fused
    try:
        with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            forward()
    finally:
        nn.functional.scaled_dot_product_attention = plain
    return counter.get_total_flops() + attention, sum(x.untyped_storage().nbytes() for i, x in kept.items() if i not in own)


def show_plan(plan: Callable[..., Plan], config) -> None:
    """--plan: prints what a run would need on --world ranks, beside what there is."""
    ranks = config.world or int(os.environ.get("WORLD_SIZE", 1))
    p = plan(config, ranks)
    print(f"{config.preset}, {ranks} rank{'s' * (ranks > 1)}: GiB on each\n")
    for name, size in p.fixed.items():
        print(f"  {name:35s} {size / GIB:9.2f}")
    for name, size in p.passing.items():
        print(f"  {name:35s} {size / GIB:9.2f}" + ("  (at another time)" if size != max(p.passing.values()) else ""))
    print(f"  {'at the peak':35s} {p.total / GIB:9.2f}\n")
    print(f"{config.steps} steps of {p.tokens:.3g} tokens and {p.flops:.3g} FLOPs (matrix products), in all {config.steps * p.tokens:.3g} "
          f"tokens, {config.steps * p.flops:.3g} FLOPs.\nHours if {UTILISATION:.0%} of a card's FLOP/s are reached, decoding bound by memory:")
    for card, (memory, *_) in CARDS.items():
        fits = "fits" if p.total <= memory else f"DOES NOT FIT: {smaller(plan, config, ranks, memory)}"
        print(f"  {card:12s} {memory / GIB:6.1f} GiB  {p.hours(card, ranks, config.steps):10.1f} h   {fits}")


def smaller(plan: Callable[..., Plan], config, ranks: int, memory: float) -> str:
    """The first setting that fits, in words: checkpointing, smaller parts of a batch, more ranks."""
    changes = [{"micro": micro} for micro in dict.fromkeys((config.micro, 8, 4, 2, 1))]
    if hasattr(config, "checkpointing"):
        changes = [c | {"checkpointing": on} for c in changes for on in dict.fromkeys((config.checkpointing, True))]
    for more in (1, 2, 4, 8, 16, 32, 64, 128):
        for change in changes:
            if plan(dataclasses.replace(config, **change), ranks * more).total <= memory:
                flags = [f"--{k} {v}" if v is not True else f"--{k}" for k, v in change.items() if getattr(config, k) != v]
                return " ".join(flags + ([f"on {ranks * more} ranks"] if more > 1 else []))
    return "not with any setting known here"


def check_fits(plan: Callable[..., Plan], config, world: World) -> None:
    """Problem for a run that needs more memory than there is, with a setting that would do."""
    if world.device.type == "cpu" and config.preset == "tiny" and not getattr(config, "llm", ""):
        return                              # it fits where Python does, and a plan takes seconds
    if world.device.type == "cuda":
        there = torch.cuda.mem_get_info(world.device)[1]
    else:
        there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    needed = plan(config, world.size).total
    need(needed <= there, f"this run needs {needed / GIB:.1f} GiB on each rank, there are {there / GIB:.1f} (--plan shows for what): "
         f"try {smaller(plan, config, world.size, there)}")
