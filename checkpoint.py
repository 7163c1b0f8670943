"""
Files that are whole or not there: atomic writes, checkpoints, resuming, finished models, caches.

What a kill, a full disk or a second process could leave half-done is written beside its place and
renamed. At every path there is the old file or the new one, never a part of one.

<folder>/checkpoint-<steps done>/       the last two are kept
    model.safetensors                   the weights
    optimizer-<rank>.safetensors        each rank's shard of the optimizer's state
    manifest.json                       steps, ranks, config, checksums. It is written last: a
                                        folder without it is no checkpoint

A checkpoint holds no random state, because data order and noise are functions of (seed, step).

`world` is a train.World. "Collective" functions must be called by all ranks.
"""
import contextlib
import dataclasses
import json
import os
import shutil
import socket
import sys
import time
import zlib
from pathlib import Path
from typing import Callable, Iterator, TextIO

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

try:
    import fcntl
except ImportError:     # Windows
    fcntl = None


class UserError(Exception):
    """An error that the user can put right. train.cli prints it as one line; exit code 2."""


def check(condition, text: str) -> None:
    """Raises UserError(text) unless the condition holds."""
    if not condition:
        raise UserError(text)


# ------------------------------------------------------------------ files


def writable(folder: Path) -> Path:
    """Makes a folder and tries to write in it: an error comes now, not after hours of training."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"cannot write to {folder} ({error.strerror}): choose another folder "
                        "with --out")
    return folder


_locked: dict[str, TextIO] = {}                 # folder -> open file: closing it would unlock


def lock(folder: Path, world) -> None:
    """
    One process at a time per run folder: two would overwrite each other's checkpoints. The lock is
    freed when the process ends. Collective: no rank goes on before the folder is known to be free,
    and to be the same folder on all machines.
    """
    check(fcntl, "training needs Linux or macOS (this Python has no fcntl); on Windows use WSL")
    path = folder / ".lock"
    if world.is_main and str(folder) not in _locked:
        file = open(path, "a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is training in {folder}: stop it, or choose "
                            "another --out") from None
        except OSError as error:            # Lustre without the option flock, some NFS
            print(f"{folder} cannot be locked ({error.strerror}): going on; no other process may "
                  "train in it", flush=True)
        file.truncate(0)
        file.write(f"{socket.gethostname()} {os.getpid()} {time.time_ns()}\n")
        file.flush()
        os.fsync(file.fileno())
        _locked[str(folder)] = file
    world.barrier()
    found = path.read_text(encoding="utf-8") if path.exists() else ""
    check(len(set(world.all_gather(found))) == 1, f"{folder} is not the same folder for all ranks: "
          "choose an --out on a file system that all machines share")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to; at the end it is flushed to disk and renamed to `path`."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")    # another name in each process
    try:
        yield part
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_json(path: Path, value) -> None:
    with replacing(path) as part:
        part.write_text(json.dumps(value) + "\n")


def read_json(path: Path, remedy: str = "delete it") -> dict:
    """The object of a JSON file; {} if there is no file. UserError for a damaged one."""
    try:
        value = json.loads(path.read_text()) if path.exists() else {}
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): {remedy}") from None
    check(isinstance(value, dict), f"{path} is damaged (it holds no JSON object): {remedy}")
    return value


def write_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    tensors = {k: v.detach().contiguous().cpu() for k, v in tensors.items()}
    with replacing(path) as part:
        save_file(tensors, part, metadata)
        umask = os.umask(0)                 # reading it means setting it
        os.umask(umask)
        os.chmod(part, 0o666 & ~umask)      # safetensors writes 0600, whatever the umask


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file. UserError if it is missing, damaged or holds NaN or infinity."""
    remedy = "If a stage here made it, start that over with --fresh"
    try:
        with safe_open(path, "pt") as file:
            tensors = {k: file.get_tensor(k) for k in file.keys()}
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {path} ({error}). {remedy}")
    for name, x in tensors.items():
        if x.is_floating_point():
            check(torch.isfinite(x).all(), f"{path} holds NaN or infinity in {name}. {remedy}")
    return tensors


def load_state(model: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """load_state_dict, with one line for the first tensor that does not fit."""
    ours = {name: tuple(x.shape) for name, x in model.state_dict().items()}
    theirs = {name: tuple(x.shape) for name, x in tensors.items()}
    for name in [*ours, *theirs]:
        expected, found = ours.get(name, "nothing"), theirs.get(name, "nothing")
        check(found == expected, f"{path} does not fit this model: {name} should be {expected}, "
              f"the file has {found}")
    model.load_state_dict(tensors)


def checksum(path: Path) -> str:
    """CRC-32 of a file, as 8 hexadecimal digits."""
    crc = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            crc = zlib.crc32(block, crc)
    return f"{crc:08x}"


# ------------------------------------------------------------------ checkpoints


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints of a folder, oldest first."""
    found = [path.parent for path in folder.glob("checkpoint-*/manifest.json")]
    return sorted(found, key=lambda path: path.name)


def save_checkpoint(folder: Path, model: nn.Module, optimizer, step: int, config, world) -> None:
    """
    Saves a checkpoint after `step`. Collective. If that fails (a full disk), training goes on and
    the last checkpoint stays.
    """
    path = folder / f"checkpoint-{step + 1:08d}"
    files = {f"optimizer-{world.rank}.safetensors": optimizer.state()}
    if world.is_main:
        files["model.safetensors"] = model.state_dict()
        if path.exists():
            shutil.rmtree(path)             # incomplete or damaged, or training had begun after it
    world.barrier()

    error, sums = "", {}
    try:
        path.mkdir(exist_ok=True)
        for name, tensors in files.items():
            write_safetensors(path / name, tensors, {})
            sums[name] = checksum(path / name)
    except (OSError, SafetensorError) as problem:
        error = str(problem)
    errors, sums_of_ranks = zip(*world.all_gather((error, sums)))

    if world.is_main:
        try:
            if any(errors):
                raise OSError(next(filter(None, errors)))
            sums = {name: crc for sums in sums_of_ranks for name, crc in sums.items()}
            manifest = {"step": step + 1, "ranks": world.size,
                        "config": dataclasses.asdict(config), "files": sums}
            manifest["checksum"] = _checksum_of(manifest)
            write_json(path / "manifest.json", manifest)
            for old in checkpoints(folder)[:-2]:
                _remove(old)
        except OSError as problem:
            _remove(path)
            sys.stderr.write(f"\ncould not save {path} ({problem}): training goes on, and tries "
                             "again at the next checkpoint\n")
    world.barrier()


def _checksum_of(manifest: dict) -> str:
    return f"{zlib.crc32(json.dumps(manifest, sort_keys=True).encode()):08x}"


def _remove(path: Path) -> None:
    """Deletes a checkpoint, its manifest first: what a kill leaves is no checkpoint any more."""
    (path / "manifest.json").unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)


def verify(path: Path, world) -> str:
    """What is wrong with a checkpoint, "" if nothing. Collective: every rank reads some files."""
    damage, files = "", {}
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        right = manifest.pop("checksum") == _checksum_of(manifest)
        check(right and path.name == f"checkpoint-{manifest['step']:08d}", "another checksum")
        files = manifest["files"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, UserError) as error:
        damage = f"manifest.json is not what was written: {error!r}"
    for name in sorted(files)[world.rank::world.size]:
        try:
            check(checksum(path / name) == files[name], f"{name} is not what was written")
            read_safetensors(path / name)
        except (OSError, UserError) as error:
            damage = str(error)
    return next(filter(None, world.all_gather(damage)), "")     # the first that a rank found


def resume(folder: Path, model: nn.Module, optimizer, config, world) -> int:
    """
    Loads the newest checkpoint -> the step to go on with; 0 without one, or with --fresh.

    If it is damaged, that is printed, and the one before is loaded. UserError if all are damaged,
    or if it is of another configuration or model.
    """
    if config.fresh:
        return 0
    damaged = []
    for path in reversed(world.all_gather(checkpoints(folder))[0]):     # as rank 0 sees them
        if damage := verify(path, world):
            damaged.append(f"{path} is damaged ({damage})")
            world.print0(damaged[-1])
            continue
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        changes = changed_fields(manifest["config"], config)
        check(not changes, f"{path} is of another configuration ({changes}): restore that, choose "
              "another --out, or start over with --fresh")
        load_state(model, read_safetensors(path / "model.safetensors"), path)
        files = [path / f"optimizer-{rank}.safetensors" for rank in range(manifest["ranks"])]
        try:
            optimizer.load(files)
        except ValueError as error:
            raise UserError(f"{path} does not fit this model: {error}") from None
        return manifest["step"]
    check(not damaged, f"{'; '.join(damaged)}: start over with --fresh, or choose another --out")
    return 0


# fields that may change while a model is trained: they decide where, how fast and how often
# something is done, not what is learnt (of --vae, the weights are compared, not the folder)
FREE_FIELDS = {"out", "vae", "fresh", "save_every", "eval_clips", "micro_batch", "checkpointing",
               "calls"}


def changed_fields(then: dict, config) -> str:
    """What has changed (four fields at most) since the configuration `then`, "" if nothing."""
    changes = []
    for name, value in dataclasses.asdict(config).items():
        if name not in FREE_FIELDS and then.get(name) != value:
            changes.append(f"{name} was {then.get(name)}, is {value}")
    return "; ".join(changes[:4])


# ------------------------------------------------------------------ a stage's folder


def model_files(out: str, *stages: str) -> dict[str, Path]:
    """Stage -> the weights that it has saved in the run folder `out`."""
    return {stage: Path(out, stage, "model.safetensors") for stage in stages}


def start_stage(folder: Path, config, world, **sources: Path) -> Path:
    """
    Prepares the folder that a stage trains in: makes it, deletes the old model with --fresh, and
    notes the checksums of the weights that training starts from (name=path). UserError if a model
    or checkpoint is there that started from others.
    """
    writable(folder)
    if config.fresh:
        delete_model(folder)
    sums = check_provenance(folder, **sources)
    if sources and world.is_main:
        write_json(folder / "provenance.json", sums)
    return folder


def finish(folder: Path, save: Callable[[Path], None], config, model: nn.Module, world) -> None:
    """Saves the finished model with `save(folder)` and its config, and deletes the checkpoints."""
    weights = [x for x in model.state_dict().values() if x.is_floating_point()]
    means = torch.stack([x.double().mean() for x in weights])
    if (world.all_reduce(means) / world.size - means).abs().max() > 1e-12:
        raise RuntimeError(f"the ranks hold different models at the end of {folder}: this is a bug")
    if world.is_main:
        trained = {k: v for k, v in dataclasses.asdict(config).items() if k not in FREE_FIELDS}
        write_json(folder / "trained.json", trained)
        save(folder)                        # after its config: is_trained looks for the weights
        _remove_checkpoints(folder)
    world.barrier()


def is_trained(folder: Path, name: str, config, world) -> bool:
    """
    Whether a finished model is there, its weights in the file `name`. False with --fresh. UserError
    if it was trained with another configuration. Collective.
    """
    if config.fresh or not (folder / name).exists():
        return False
    if then := read_json(folder / "trained.json", "train it again with --fresh"):
        changes = changed_fields(then, config)
        check(not changes, f"{folder} was trained with another configuration ({changes}): restore "
              "that, choose another --out, or train it again with --fresh")
    world.barrier()
    if world.is_main:
        _remove_checkpoints(folder)         # left by a kill between saving and cleaning up
    world.print0(f"{folder} is trained (--fresh trains it again)")
    return True


def _remove_checkpoints(folder: Path) -> None:
    for path in folder.glob("checkpoint-*"):
        _remove(path)


def delete_model(folder: Path) -> None:
    """For --fresh: if the new training is interrupted, the old model must not pass for its end."""
    _remove_checkpoints(folder)
    for name in ("model.safetensors", "diffusion_pytorch_model.safetensors", "trained.json",
                 "reconstruction.png"):
        (folder / name).unlink(missing_ok=True)


def command(stage: str) -> str:
    """The command that trains the model in <out>/<stage>, for error messages."""
    return f"python -m experiments.{stage}" if stage in ("vqgan", "dit") else f"python {stage}.py"


def check_provenance(folder: Path, **sources: Path) -> dict[str, str]:
    """
    The checksums of weight files (name=path). UserError if the model or checkpoint of the folder
    started from others: a language model is of no use with the codes of another tokenizer.
    """
    now = {name: checksum(path) for name, path in sources.items()}
    if checkpoints(folder) or (folder / "model.safetensors").exists():
        then = read_json(folder / "provenance.json", "train that stage again with --fresh")
        for name in now if then else ():
            check(then.get(name) == now[name], f"{folder} was trained from another {name} than "
                  f"{sources[name].parent}: train it again with `{command(folder.name)} --fresh "
                  f"--out {folder.parent}`, or choose another --out")
    return now


# ------------------------------------------------------------------ cached arrays


def cached_array(path: Path, stamp: str, shape: tuple[int, ...], chunks: list[slice],
                 make: Callable[[slice], np.ndarray], world) -> np.ndarray:
    """
    A uint8 array of this shape, mapped from the file `path`. If that is missing, damaged or has
    another stamp (a text that says what it was made from), the ranks make it together: make(chunk)
    returns the rows of one chunk. Collective.
    """
    note = path.with_suffix(".txt")         # holds the stamp
    array = _load_array(path, note, stamp, shape)
    world.barrier()                         # every rank has looked before rank 0 writes
    if array is not None:
        return array
    part = path.with_suffix(".part")
    if world.is_main:
        writable(path.parent)
        note.unlink(missing_ok=True)
        np.lib.format.open_memmap(part, "w+", np.uint8, shape)
    world.barrier()
    array = np.lib.format.open_memmap(part, "r+")
    mine = chunks[world.rank::world.size]
    for chunk in tqdm(mine, path.stem, ncols=100, mininterval=5, disable=not world.is_main):
        array[chunk] = make(chunk)
    array.flush()
    world.barrier()
    if world.is_main:
        part.replace(path)
        note.write_text(stamp)              # last: an array with a stamp is whole
    world.barrier()
    return _load_array(path, note, stamp, shape)


def _load_array(path: Path, note: Path, stamp: str, shape: tuple) -> np.ndarray | None:
    try:
        array = np.load(path, mmap_mode="r")
        fits = array.shape == shape and array.dtype == np.uint8
        return array if fits and note.read_text() == stamp else None
    except (OSError, ValueError, EOFError):
        return None
