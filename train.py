"""
What the training loops share: start-up with or without torchrun, flags from a dataclass, the optimizer and its schedule,
the order of the data, checkpoints and the log. Nothing in here knows what is being trained.

A stage's loop reads:

    config = train.parse(Config, PRESETS, argv)             # flags -> dataclass, one clear error for what is wrong
    world = train.start(config.seed)                        # rank, size, device
    optimizer = train.adamw(model, config)
    first = train.resume(folder, model, optimizer, config)  # 0, or the step after the last checkpoint
    with train.Log(folder, first, config, world) as log:
        for step in range(first, config.steps):
            rows = world.share(train.rows(config.seed, step, config.batch, len(data)))
            loss = ...                                      # sum over this rank's rows / the global batch
            log(step, loss=..., **train.update(model, optimizer, [loss], step, config))
            train.checkpoint(folder, model, optimizer, step, config, world)

Everything random in a step is drawn from a generator made of (seed, step), never from a running state. So a run that was
killed and goes on draws what it would have drawn, and the number of ranks does not change which data a step sees. (The
samples of a rollout are drawn on each rank's device and do depend on the number of ranks.)

Left for the paper's scale: a sharded optimizer with fp32 master weights belongs into `adamw`, its state into `checkpoint`.
"""
import argparse
import ctypes
import dataclasses
import datetime
import difflib
import fcntl
import functools
import json
import math
import os
import signal
import sys
import time
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Iterable

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
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


def start(seed: int) -> World:
    """Joins torchrun's process group if there is one, chooses the device, seeds torch. May be called more than once."""
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
    if size > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo",
                                timeout=datetime.timedelta(hours=2))        # rank 0 evaluates, the others wait
    torch.manual_seed(seed)                 # the same initial weights on every rank
    return World(rank, size, device)


def total(x: Tensor) -> Tensor:
    """Sum of a tensor over the ranks, for the log: without its graph, which a running mean would keep alive."""
    x = x.detach()
    if dist.is_initialized():
        x = x.clone()
        dist.all_reduce(x)
    return x


def gather(x: Tensor) -> Tensor:
    """Rows of all ranks, in the order of the ranks: (n, ...) each -> (sum of n, ...). For CPU tensors."""
    if not dist.is_initialized():
        return x
    parts: list = [None] * dist.get_world_size()
    dist.all_gather_object(parts, x)
    return torch.cat(parts)


def wait(world: World) -> None:
    """All ranks meet here: nobody reads a file before rank 0 has written it."""
    if world.size > 1:
        dist.barrier()


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

def adamw(model: nn.Module, config) -> torch.optim.AdamW:
    """AdamW; weight decay on matrices only."""
    params = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in params if p.ndim >= 2], "weight_decay": config.weight_decay},
              {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)


def learning_rate(step: int, config) -> float:
    """Linear warm-up, then a cosine to zero."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.lr * 0.5 * (1 + math.cos(math.pi * done))


def update(model: nn.Module, optimizer: torch.optim.AdamW, losses: Iterable[Tensor], step: int, config) -> dict[str, float]:
    """
    A backward pass for each of `losses`, then one optimizer step. A loss is this rank's sum over rows / the size of the
    global batch; DDP averages gradients over ranks, so it is scaled back to a sum: ranks may hold unequal shares. Every
    rank gives as many losses; a generator computes each when the last one's graph is gone.
    """
    for loss in losses:
        (loss * (dist.get_world_size() if dist.is_initialized() else 1)).backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip or math.inf)
    lr = learning_rate(step, config)
    for group in optimizer.param_groups:
        group["lr"] = lr
    if not torch.isfinite(norm):
        raise Problem(f"the gradient at step {step} is not finite: lower --lr (now {config.lr}), or look at the data")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {"grad_norm": norm.item(), "learning_rate": lr}


# ------------------------------------------------------------------ checkpoints

FREE = {"out", "fresh", "save_every", "eval_clips"}       # fields that may change between two runs of the same training


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
    """One training at a time in a run folder: two would overwrite each other's checkpoints. Freed when the process ends."""
    if world.is_main and str(folder) not in _occupied:
        _occupied[str(folder)] = file = open(folder / ".lock", "w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Problem(f"another process is training in {folder}: stop it, or choose another --out") from None


_occupied: dict[str, object] = {}


def write_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes aside, flushes to disk and renames: at `path` there is the old file or the new one, never half of one."""
    aside = path.with_name(path.name + ".part")
    save_file({k: v.detach().contiguous().cpu() for k, v in tensors.items()}, aside, metadata)
    umask = os.umask(0)
    os.umask(umask)
    os.chmod(aside, 0o666 & ~umask)         # safetensors writes 0600 whatever the umask
    with open(aside, "rb") as file:
        os.fsync(file.fileno())
    os.replace(aside, path)


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


def checkpoint(folder: Path, model: nn.Module, optimizer, step: int, config, world: World) -> None:
    """Writes model, optimizer, step and config as one file, every `save_every` steps and after the last."""
    if not world.is_main or ((step + 1) % config.save_every and step + 1 != config.steps):
        return
    tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
    for i, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{k}": v for k, v in state.items()}
    write_safetensors(folder / "checkpoint.safetensors", tensors,
                      {"step": str(step + 1), "config": json.dumps(dataclasses.asdict(config))})


def resume(folder: Path, model: nn.Module, optimizer, config) -> int:
    """
    Loads the checkpoint of `folder` if there is one -> the step to go on with (0 without).

    Raises Problem for a damaged checkpoint or one of another configuration. With --fresh it is ignored.
    """
    path = folder / "checkpoint.safetensors"
    if config.fresh or not path.exists():
        return 0
    tensors, metadata = read_safetensors(path)
    try:
        then, step = json.loads(metadata["config"]), int(metadata["step"])
    except (KeyError, ValueError):
        raise Problem(f"{path} is not a checkpoint of this project: delete it, or start over with --fresh")
    if changed := _changed(then, config):
        raise Problem(f"{path} is of another configuration ({'; '.join(changed[:4])}): restore that, choose another "
                      "--out, or start over with --fresh")
    load_state(model, {k[6:]: v for k, v in tensors.items() if k.startswith("model.")}, path)
    state: dict[int, dict] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, i, key = name.split(".")
            state.setdefault(int(i), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    for p, moments in optimizer.state.items():      # the fused kernel walks memory: moments must lie as their parameter
        for key, value in moments.items():          # does (channels_last in a VAE)
            if value.shape == p.shape:
                moments[key] = torch.empty_like(p).copy_(value)
    return step


def _changed(then: dict, config) -> list[str]:
    return [f"{k} was {then.get(k)}, is {v}" for k, v in dataclasses.asdict(config).items()
            if k not in FREE and then.get(k) != v]


def finish(folder: Path, save, config, model: nn.Module, world: World) -> None:
    """Saves the finished model with `save(folder)` and the config beside it; the checkpoint has done its work."""
    mean = torch.stack([p.detach().double().mean() for p in model.state_dict().values() if p.is_floating_point()])
    if (total(mean) / world.size - mean).abs().max() > 1e-12:
        raise RuntimeError(f"the ranks hold different models at the end of {folder}: this is a bug")
    if world.is_main:
        _write_json(folder / "trained.json", {k: v for k, v in dataclasses.asdict(config).items() if k not in FREE})
        save(folder)
        (folder / "checkpoint.safetensors").unlink(missing_ok=True)
    wait(world)


def is_trained(folder: Path, name: str, config, world: World) -> bool:
    """Whether a finished model is there (and not --fresh). Problem when it was trained with another configuration."""
    if config.fresh or not (folder / name).exists():
        return False
    if (folder / "trained.json").exists():
        if changed := _changed(json.loads((folder / "trained.json").read_text()), config):
            raise Problem(f"{folder} was trained with another configuration ({'; '.join(changed[:4])}): restore that, "
                          "choose another --out, or train it again with --fresh")
    (folder / "checkpoint.safetensors").unlink(missing_ok=True)         # left by a kill between saving and cleaning up
    world.say(f"{folder} is trained (--fresh trains it again)")
    return True


def _write_json(path: Path, value) -> None:
    aside = path.with_name(f"{path.name}.{os.getpid()}.part")
    aside.write_text(json.dumps(value) + "\n")
    os.replace(aside, path)


def discard(folder: Path) -> None:
    """--fresh: what a stage had made is gone, so that a run killed half-way does not pass for the old one."""
    for name in ("checkpoint.safetensors", "model.safetensors", "diffusion_pytorch_model.safetensors", "trained.json"):
        (folder / name).unlink(missing_ok=True)


def made_of(folder: Path, **sources: Path) -> None:
    """
    Notes which weight files a stage starts from; Problem when the folder's model or checkpoint started from others.
    Without it, a model would silently be used with the codes of a tokenizer that has been trained anew since.
    """
    now = {}
    for name, source in sources.items():
        with open(source, "rb") as file:
            crc = 0
            while block := file.read(1 << 24):
                crc = zlib.crc32(block, crc)
        now[name] = f"{crc:08x}"
    note = folder / "made_of.json"
    if note.exists() and any((folder / name).exists() for name in ("checkpoint.safetensors", "model.safetensors")):
        then = json.loads(note.read_text())
        other = [name for name in now if then.get(name) != now[name]]
        if other:
            raise Problem(f"{folder} was trained from another {other[0]} than {sources[other[0]].parent}: train it again with "
                          f"`python {folder.name}.py --fresh --out {folder.parent}`, or choose another --out")
    _write_json(note, now)                                                # every rank writes the same


# ------------------------------------------------------------------ log

class Log:
    """
    log.jsonl, one object a step, and a progress bar that shows the metrics named in `show`. Only rank 0 writes.
    Lines of steps that are done again after a crash are dropped, so that every step stands in the file once.
    """

    def __init__(self, folder: Path, first: int, config, world: World, show: tuple[str, ...] = ("loss",)):
        self.path, self.on, self.show = folder / "log.jsonl", world.is_main, show
        self.first, self.steps = first, config.steps

    def __enter__(self):
        if self.on:
            kept = self.path.read_text().splitlines()[:self.first] if self.first and self.path.exists() else []
            aside = self.path.with_name("log.jsonl.part")
            aside.write_text("".join(line + "\n" for line in kept))
            os.replace(aside, self.path)
            self.file = open(self.path, "a")
            quiet = not sys.stderr.isatty()                 # in a file: a line every 10 seconds, not ten a second
            self.bar = tqdm(total=self.steps, initial=self.first, desc=self.path.parent.name, ncols=100, unit="step",
                            mininterval=10 if quiet else 0.2)
            self.time = time.perf_counter()
        return self

    def __call__(self, step: int, **metrics) -> None:
        if self.on:
            now = time.perf_counter()
            metrics = {k: v.item() if isinstance(v, Tensor) else v for k, v in metrics.items()}
            line = {"step": step} | metrics | {"step_time": now - self.time}
            self.time = now
            short = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in line.items()}
            self.file.write(json.dumps(short) + "\n")
            self.file.flush()
            self.bar.set_postfix({k: f"{metrics[k]:.3g}" for k in self.show if k in metrics}, refresh=False)
            self.bar.update()

    def __exit__(self, *_) -> None:
        if self.on:
            self.file.close()
            self.bar.close()
