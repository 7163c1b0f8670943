"""
Whole files only: atomic writes, checkpoints with a manifest, resuming, and the files of a finished
model.

What a kill, a full disk or a second process could leave half-done is written beside its place and
renamed. At every path there is the old file or the new one, never a part of one.

<folder>/checkpoint-<steps done>/
    model.safetensors               the weights
    optimizer-<rank>.safetensors    every rank's shard of the optimizer state
    manifest.json                   steps, ranks, config, checksums; without it, no checkpoint

The last two are kept. Data order and noise are functions of (seed, step): a checkpoint holds no
random state.

`world` is train.World: rank, size, is_main, barrier(), all_gather(object), print0(text).
"""
import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
import sys
import zlib
from pathlib import Path
from typing import Callable, Iterator

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm


class UserError(Exception):
    """What the user can put right. Shown as one line without a traceback; exit code 2."""


def check(condition, text: str) -> None:
    """Raises UserError(text) unless the condition holds."""
    if not condition:
        raise UserError(text)


# ------------------------------------------------------------------ files


def writable(folder: Path) -> Path:
    """Makes a folder and tries to write in it, before hours of training do."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"cannot write to {folder} ({error.strerror}): choose another folder "
                        "with --out")
    return folder


_locks: dict[str, object] = {}


def lock(folder: Path, world) -> None:
    """
    One training at a time per run folder: two would overwrite each other's checkpoints. The lock is
    freed when the process ends. Collective: no rank goes on before the folder is known to be free.
    """
    if world.is_main and str(folder) not in _locks:
        _locks[str(folder)] = file = open(folder / ".lock", "w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is training in {folder}: stop it, or choose "
                            "another --out") from None
    world.barrier()


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to; afterwards it is flushed to disk and renamed to `path`."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")    # several ranks may write the same
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
    """The object in a JSON file; {} when there is no file. Raises UserError for a damaged one."""
    try:
        value = json.loads(path.read_text()) if path.exists() else {}
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): {remedy}") from None
    check(isinstance(value, dict), f"{path} is damaged (it holds no JSON object): {remedy}")
    return value


def write_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    with replacing(path) as part:
        tensors = {k: v.detach().contiguous().cpu() for k, v in tensors.items()}
        save_file(tensors, part, metadata)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(part, 0o666 & ~umask)      # safetensors writes 0600 whatever the umask


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Raises UserError for a file that is missing, damaged or holds NaN or infinity."""
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
    """load_state_dict with one line for what does not fit."""
    own = model.state_dict()
    for name in [*own, *tensors]:
        if name not in tensors or name not in own or own[name].shape != tensors[name].shape:
            ours, theirs = (tuple(x[name].shape) if name in x else "nothing"
                            for x in (own, tensors))
            raise UserError(f"{path} does not fit this model: {name} should be {ours}, the file "
                            f"has {theirs}")
    model.load_state_dict(tensors)


def checksum(path: Path) -> str:
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
    Saves what is there after `step`. Collective. If that fails (a full disk), training goes on and
    the last checkpoint stays.
    """
    path = folder / f"checkpoint-{step + 1:08d}"
    files = {f"optimizer-{world.rank}.safetensors": optimizer.state()}
    if world.is_main:
        files["model.safetensors"] = model.state_dict()
        if path.exists():
            shutil.rmtree(path)             # incomplete or damaged: training would not be here else
    world.barrier()

    error, sums = "", {}
    try:
        path.mkdir(exist_ok=True)
        for name, tensors in files.items():
            write_safetensors(path / name, tensors, {})
        sums = {name: checksum(path / name) for name in files}
    except (OSError, SafetensorError) as problem:
        error = str(problem)

    everyone = world.all_gather((error, sums))
    error = next((error for error, _ in everyone if error), "")
    if world.is_main:
        try:
            if error:
                raise OSError(error)
            sums = {name: crc for _, of_rank in everyone for name, crc in of_rank.items()}
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
    """The manifest goes first: what a kill leaves of it is not taken for a checkpoint."""
    (path / "manifest.json").unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)


def verify(path: Path, world) -> str:
    """What is wrong with a checkpoint; "" if nothing is. Collective: the ranks share the work."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        right = manifest.pop("checksum") == _checksum_of(manifest)
        if not right or path.name != f"checkpoint-{manifest['step']:08d}":
            return "manifest.json is not what was written"
        files = manifest["files"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"manifest.json is not what was written: {error!r}"
    damage = ""
    for name in sorted(files)[world.rank::world.size]:
        try:
            if checksum(path / name) != files[name]:
                damage = f"{name} is not what was written"
            else:
                read_safetensors(path / name)
        except (OSError, UserError) as error:
            damage = str(error)
    return next(filter(None, world.all_gather(damage)), "")


def resume(folder: Path, model: nn.Module, optimizer, config, world) -> int:
    """
    Loads the newest whole checkpoint -> the step to go on with; 0 without one, or with --fresh.

    A damaged one is named and the one before it taken. Raises UserError if all are damaged, or if
    they are of another configuration.
    """
    damaged = []
    for path in [] if config.fresh else checkpoints(folder)[::-1]:
        if damage := verify(path, world):
            damaged.append(f"{path} is damaged ({damage})")
            world.print0(damaged[-1])
            continue
        manifest = json.loads((path / "manifest.json").read_text())
        changed = [*changed_fields(manifest["config"], config).values()]
        check(not changed, f"{path} is of another configuration ({'; '.join(changed[:4])}): "
              "restore that, choose another --out, or start over with --fresh")
        load_state(model, read_safetensors(path / "model.safetensors"), path)
        files = [path / f"optimizer-{rank}.safetensors" for rank in range(manifest["ranks"])]
        try:
            optimizer.load(files)
        except ValueError as error:
            raise UserError(f"{path} does not fit this model: {error}") from None
        return manifest["step"]
    check(not damaged, f"{'; '.join(damaged)}: start over with --fresh, or choose another --out")
    return 0


# fields that two runs of one training may differ in: they change how it is computed or reported,
# not what comes out; the weights of --vae are compared themselves, wherever they lie
FREE_FIELDS = {"out", "vae", "fresh", "save_every", "eval_clips", "micro_batch", "checkpointing",
               "calls"}


def changed_fields(then: dict, config) -> dict[str, str]:
    """Field -> what it was and is, of the fields that a training depends on."""
    now = dataclasses.asdict(config)
    return {name: f"{name} was {then.get(name)}, is {value}" for name, value in now.items()
            if name not in FREE_FIELDS and then.get(name) != value}


# ------------------------------------------------------------------ a stage's folder


def model_files(out: str, *stages: str) -> dict[str, Path]:
    """Stage -> the weights that it has saved in the run folder `out`."""
    return {stage: Path(out, stage, "model.safetensors") for stage in stages}


def start_stage(folder: Path, config, world, **sources: Path) -> Path:
    """
    The folder that a stage trains in: made, freed of an old model with --fresh, and marked with the
    weight files that the stage starts from. UserError if what is there started from others.
    """
    writable(folder)
    if config.fresh:
        delete_model(folder)
    sums = check_provenance(folder, **sources)
    if sources and world.is_main:
        write_json(folder / "provenance.json", sums)
    return folder


def finish(folder: Path, save: Callable[[Path], None], config, model: nn.Module, world) -> None:
    """Saves the finished model with `save(folder)` and its config; deletes the checkpoints."""
    weights = [p.detach() for p in model.state_dict().values() if p.is_floating_point()]
    means = torch.stack([p.double().mean() for p in weights])
    if (world.all_reduce(means) / world.size - means).abs().max() > 1e-12:
        raise RuntimeError(f"the ranks hold different models at the end of {folder}: this is a bug")
    if world.is_main:
        trained = {k: v for k, v in dataclasses.asdict(config).items() if k not in FREE_FIELDS}
        write_json(folder / "trained.json", trained)
        save(folder)
        _remove_checkpoints(folder)
    world.barrier()


def is_trained(folder: Path, name: str, config, world) -> bool:
    """
    Whether a finished model's weights, `name`, are there (and --fresh is not given). Collective.
    Raises UserError if it was trained with another configuration.
    """
    if config.fresh or not (folder / name).exists():
        return False
    if then := read_json(folder / "trained.json", "train it again with --fresh"):
        changed = [*changed_fields(then, config).values()]
        check(not changed, f"{folder} was trained with another configuration "
              f"({'; '.join(changed[:4])}): restore that, choose another --out, or train it again "
              "with --fresh")
    world.barrier()
    if world.is_main:
        _remove_checkpoints(folder)         # left by a kill between saving and cleaning up
    world.print0(f"{folder} is trained (--fresh trains it again)")
    return True


def _remove_checkpoints(folder: Path) -> None:
    for path in folder.glob("checkpoint-*"):
        _remove(path)


def delete_model(folder: Path) -> None:
    """For --fresh: an interrupted retraining must not be mistaken for the old model."""
    _remove_checkpoints(folder)
    for name in ("model.safetensors", "diffusion_pytorch_model.safetensors", "trained.json",
                 "reconstruction.png"):
        (folder / name).unlink(missing_ok=True)


def command(stage: str) -> str:
    """What trains the model in <out>/<stage>."""
    return f"python -m experiments.{stage}" if stage in ("vqgan", "dit") else f"python {stage}.py"


def check_provenance(folder: Path, **sources: Path) -> dict[str, str]:
    """
    Checksums of weight files. Raises UserError if the folder's model or checkpoint started from
    others: a model must not be used with the codes of a tokenizer that was trained anew since.
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
    A uint8 array of some shape, mapped from the file `path`. If that is missing, damaged or of
    another stamp (a text), the ranks make it together: make(chunk) gives the rows of one chunk.
    """
    note = path.with_suffix(".txt")
    array = _load_array(path, note, stamp, shape)
    world.barrier()                         # every rank has looked before one writes
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
        note.write_text(stamp)              # last: with its stamp the array is whole
    world.barrier()
    return _load_array(path, note, stamp, shape)


def _load_array(path: Path, note: Path, stamp: str, shape: tuple) -> np.ndarray | None:
    try:
        array = np.load(path, mmap_mode="r")
        whole = array.shape == shape and array.dtype == np.uint8 and note.read_text() == stamp
        return array if whole else None
    except (OSError, ValueError, EOFError):
        return None
