"""
Files that are whole or not there: atomic writes, checkpoints, resuming, finished models, caches.

What a kill, a full disk or a second process could leave half-done is written beside its place and
renamed. At every path there is the old file or the new one, never a part of one.

<out>/<stage>/
    model.safetensors, config.json      the finished model
    trained.json                        the flags it was trained with
    provenance.json                     checksums: of these two files, and of the weights that
                                        training started from
    checkpoint-<steps done>/            of a training that is not finished; the last two are kept
        model.safetensors               the weights
        optimizer-<rank>.safetensors    each rank's shard of the optimizer's state
        manifest.json                   steps, ranks, config, checksums. It is written last: a
                                        folder without it is no checkpoint

A checkpoint holds no random state, because data order and noise are functions of (seed, step).

--fresh deletes no model. The new training leaves the old model where it is and replaces it at its
end. While there is a checkpoint the stage counts as not finished, and the old model is not used:
the same command without --fresh goes on with the new training. Without its checkpoints, deleted by
hand, the old model is the stage's model again.

`world` is a train.World. "Collective" functions must be called by all ranks.
"""
import contextlib
import dataclasses
import json
import math
import os
import shutil
import socket
import sys
import time
import zlib
from pathlib import Path
from typing import Callable, Iterable, Iterator, TextIO

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
        try:
            file.truncate(0)
            file.write(f"{socket.gethostname()} {os.getpid()} {time.time_ns()}\n")
            file.flush()
            os.fsync(file.fileno())
        except OSError as error:
            raise UserError(f"cannot write {path} ({error.strerror})") from None
        _locked[str(folder)] = file
    world.barrier()
    found = path.read_text(encoding="utf-8") if path.exists() else ""
    check(len(set(world.all_gather(found))) == 1, f"{folder} is not the same folder for all ranks: "
          "choose an --out on a file system that all machines share")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """
    A name beside `path` to write to; at the end it is flushed to disk and renamed to `path`.
    UserError, and the file as it was, if that fails (a full disk).
    """
    part = path.with_name(f"{path.name}.{os.getpid()}.part")    # another name in each process
    try:
        yield part
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot write {path} ({reason})") from None
    finally:
        part.unlink(missing_ok=True)


def write_json(path: Path, value) -> None:
    """NaN, which JSON does not have, becomes null."""
    text = json.dumps(map_leaves(lambda x: None if x != x else x, value))
    with replacing(path) as part:
        part.write_text(text + "\n", encoding="utf-8")


def nan_for_null(value):
    """What `write_json` was given, from what `read_json` returns of it."""
    return map_leaves(lambda x: math.nan if x is None else x, value)


def map_leaves(change: Callable, value):
    """A copy, with change(x) for every x in its lists and dictionaries."""
    if isinstance(value, dict):
        return {name: map_leaves(change, x) for name, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [map_leaves(change, x) for x in value]
    return change(value)


def read_json(path: Path, remedy: str = "delete it", fields: Iterable[str] = ()) -> dict:
    """
    The object of a JSON file, which must have these fields; {} if there is no file. UserError for
    a damaged one.
    """
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:      # ValueError: no UTF-8 or no JSON
        raise UserError(f"{path} is damaged ({error}): {remedy}") from None
    check(isinstance(value, dict), f"{path} is damaged (it holds no JSON object): {remedy}")
    missing = [name for name in fields if name not in value]
    check(not missing, f"{path} is damaged (it lacks {', '.join(missing[:4])}): {remedy}")
    return value


def write_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """UserError, and the file as it was, for tensors with NaN or infinity."""
    tensors = {k: v.detach().contiguous().cpu() for k, v in tensors.items()}
    for name, x in tensors.items():
        check(is_finite(x), f"{path} is not written: {name} holds NaN or infinity")
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
        quantized = x.is_floating_point() and x.element_size() == 1         # float8
        check(not quantized, f"{path} holds {name} as {x.dtype}: quantized weights cannot be read")
        check(is_finite(x), f"{path} holds NaN or infinity in {name}. {remedy}")
    return tensors


def is_finite(x: Tensor) -> bool:
    return not x.is_floating_point() or bool(torch.isfinite(x).all())


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
    """CRC-32 of a file, as 8 hexadecimal digits. UserError if it cannot be read."""
    crc = 0
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 24):
                crc = zlib.crc32(block, crc)
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror})") from None
    return f"{crc:08x}"


# ------------------------------------------------------------------ checkpoints


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints of a folder, oldest first."""
    found = [path.parent for path in folder.glob("checkpoint-*/manifest.json")]
    return sorted(found, key=lambda path: path.name)


def save_checkpoint(folder: Path, model: nn.Module, optimizer, step: int, config, world,
                    sources: dict[str, str] | None = None) -> None:
    """
    Saves a checkpoint after `step`. Collective. If that fails (a full disk, a number that is not
    finite), training goes on and the last checkpoint stays. sources: see `start_stage`.
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
    except (OSError, UserError) as problem:
        error = str(problem)
    errors, sums_of_ranks = zip(*world.all_gather((error, sums)))

    if world.is_main:
        try:
            check(not any(errors), next(filter(None, errors), ""))
            sums = {name: crc for sums in sums_of_ranks for name, crc in sums.items()}
            manifest = {"step": step + 1, "ranks": world.size,
                        "config": settings(config), "sources": sources or {}, "files": sums}
            manifest["checksum"] = _checksum_of(manifest)
            write_json(path / "manifest.json", manifest)
            saved = checkpoints(folder)
            # this one and the one before; later ones are of a run given up, or damaged
            kept = saved[:saved.index(path) + 1][-2:]
            for other in saved:
                if other not in kept:
                    _remove(other)
        except (OSError, UserError) as problem:
            _remove(path)
            then = "training goes on, and tries again at the next checkpoint"
            if step + 1 == config.steps:
                then = "it was the last one; now the model itself is saved"
            sys.stderr.write(f"\ncould not save {path} ({problem}): {then}\n")
    world.barrier()


def _checksum_of(manifest: dict) -> str:
    return f"{zlib.crc32(json.dumps(manifest, sort_keys=True).encode()):08x}"


def _remove(path: Path) -> None:
    """Deletes a checkpoint, its manifest first: what a kill leaves is no checkpoint any more."""
    with contextlib.suppress(OSError):
        (path / "manifest.json").unlink()
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
               "calls", "compile"}


def settings(config) -> dict:
    """The fields that decide what is learnt. A folder has one name: DIR, DIR/, a relative path."""
    kept = {k: v for k, v in dataclasses.asdict(config).items() if k not in FREE_FIELDS}
    if kept.get("llm", "none") not in ("", "none", "prior"):
        kept["llm"] = str(Path(kept["llm"]).resolve())
    return kept


def changed_fields(then: dict, config) -> str:
    """What has changed (four fields at most) since the settings `then`, "" if nothing."""
    changes = [f"{name} was {then.get(name)}, is {value}"
               for name, value in settings(config).items() if then.get(name) != value]
    return "; ".join(changes[:4])


# ------------------------------------------------------------------ a stage's folder

WEIGHTS = ("model.safetensors", "diffusion_pytorch_model.safetensors")      # of a stage; of a VAE


def weights_file(folder: Path) -> Path | None:
    """The weights of the model in a stage's folder, None if there are none."""
    return next((folder / name for name in WEIGHTS if (folder / name).exists()), None)


def has_model(folder: Path) -> bool:
    """Whether a finished model is there, and no checkpoint of a training that will replace it."""
    return weights_file(folder) is not None and not checkpoints(folder)


def model_files(out: str, *stages: str) -> dict[str, Path]:
    """Stage -> the weights that it has saved in the run folder `out`."""
    return {stage: Path(out, stage, "model.safetensors") for stage in stages}


def checksums(out: str, *stages: str) -> dict[str, str]:
    """Stage -> checksum of its weights in the run folder `out`, of the stages that are there."""
    files = {stage: weights_file(Path(out, stage)) for stage in stages}
    return {stage: checksum(path) for stage, path in files.items() if path}


def start_stage(folder: Path, config, world, **sources: Path) -> dict[str, str]:
    """
    Prepares the folder that a stage trains in -> the checksums of the weights that training starts
    from (name=path), for `Run` and `finish`. UserError if the checkpoint that is there started from
    others, or is of another configuration. Deletes nothing, with --fresh neither.
    """
    writable(folder)
    if config.fresh:
        return {name: checksum(path) for name, path in sources.items()}
    then = newest_manifest(folder).get("config")
    changes = changed_fields(then, config) if isinstance(then, dict) else ""
    check(not changes, f"{folder} holds a checkpoint of another configuration ({changes}): go on "
          f"with that, choose another --out, or start over with `{command(folder.name)} --fresh "
          f"--out {folder.parent}`")
    return check_provenance(folder, **sources)


def newest_manifest(folder: Path) -> dict:
    """That of the newest checkpoint whose manifest can be read, {} if there is none."""
    newest = {}
    for path in checkpoints(folder):
        with contextlib.suppress(UserError):
            newest = read_json(path / "manifest.json")
    return newest


def forget_checkpoints(folder: Path) -> None:
    """With --fresh, once the new training has done a step: no run goes on from an older one."""
    for path in folder.glob("checkpoint-*"):
        _remove(path)


def finish(folder: Path, save: Callable[[Path], None], config, model: nn.Module, world,
           sources: dict[str, str] | None = None) -> None:
    """
    Saves the finished model with `save(folder)`, its settings and checksums, and deletes the
    checkpoints. An older model stays until all files of the new one are on the disk.
    """
    tensors = [x for x in model.state_dict().values() if x.is_floating_point()]
    means = torch.stack([x.double().mean() for x in tensors])
    check(is_finite(means), f"{folder}: the weights at the end are not finite, and are not saved: "
          "start again with --fresh and a lower --lr")
    if (world.all_reduce(means) / world.size - means).abs().max() > 1e-12:
        raise RuntimeError(f"the ranks hold different models at the end of {folder}: this is a bug")
    if world.is_main:
        new = folder / "new"
        shutil.rmtree(new, ignore_errors=True)      # left by a kill
        try:
            save(new)
            weights = weights_file(new)
            files = {path.name: checksum(path) for path in (weights, new / "config.json")}
            write_json(new / "trained.json", settings(config))
            write_json(new / "provenance.json", (sources or {}) | {"files": files})
            (folder / "reconstruction.png").unlink(missing_ok=True)     # of an older model
            # the checksums first and the weights last: a kill in between leaves weights that do
            # not fit the checksums, and that no stage takes for the new ones
            middle = [path.name for path in new.iterdir()]
            middle = sorted({*middle} - {"provenance.json", weights.name})
            for name in ("provenance.json", *middle, weights.name):
                (new / name).replace(folder / name)
        except (OSError, UserError) as error:
            saved = checkpoints(folder)
            then = f"goes on from {saved[-1]}" if saved else "starts again: there is no checkpoint"
            raise UserError(f"{folder}: the model is trained, but could not be saved ({error}). "
                            f"Put that right; the same command, without --fresh, {then}") from None
        finally:
            shutil.rmtree(new, ignore_errors=True)
        forget_checkpoints(folder)          # from here on the stage is finished
    world.barrier()


def is_trained(folder: Path, config, world) -> bool:
    """
    Whether a finished model is there. False with --fresh. UserError if it was trained with another
    configuration. Collective.
    """
    if config.fresh or not has_model(folder):
        return False
    then = read_json(folder / "trained.json", remedy(folder), settings(config))
    changes = changed_fields(then, config) if then else ""
    check(not changes, f"{folder} was trained with another configuration ({changes}): restore "
          "that, choose another --out, or train it again with --fresh")
    world.barrier()
    if world.is_main:
        forget_checkpoints(folder)          # what a kill has left of them
    world.print0(f"{folder} is trained (--fresh trains it again)")
    return True


def delete_model(folder: Path) -> None:
    """Deletes a stage's model and checkpoints."""
    forget_checkpoints(folder)
    for name in (*WEIGHTS, "trained.json", "provenance.json", "reconstruction.png"):
        (folder / name).unlink(missing_ok=True)


def command(stage: str) -> str:
    """The command that trains the model in <out>/<stage>, for error messages."""
    if stage == "llm":
        return "python prior.py"
    return f"python -m experiments.{stage}" if stage in ("vqgan", "dit") else f"python {stage}.py"


def remedy(folder: Path) -> str:
    """What to do about a damaged file of <out>/<stage>, for error messages."""
    return (f"restore it, or train the model again with `{command(folder.name)} --fresh --out "
            f"{folder.parent}`")


def check_files(folder: Path) -> dict:
    """
    The content of provenance.json. UserError if weights or config.json are not those that `finish`
    has saved: one bit is enough to make all results wrong.
    """
    note = read_json(folder / "provenance.json", remedy(folder))
    files = note.get("files", {})
    check(isinstance(files, dict), f"{folder / 'provenance.json'} is damaged: {remedy(folder)}")
    for name, saved in files.items():
        try:
            now = checksum(folder / name)
        except UserError as error:
            raise UserError(f"{error}: {remedy(folder)}") from None
        check(now == saved, f"{folder / name} is not what training has saved: {remedy(folder)}")
    return note


def check_provenance(folder: Path, **sources: Path) -> dict[str, str]:
    """
    The checksums of weight files (name=path). UserError if the checkpoint or model of the folder
    started from others: a language model is of no use with the codes of another tokenizer.
    """
    now = {name: checksum(path) for name, path in sources.items()}
    then = check_files(folder) if has_model(folder) else newest_manifest(folder).get("sources")
    for name in now if then and isinstance(then, dict) else ():
        if then.get(name) != now[name]:
            check_files(sources[name].parent)       # or else it is that which is damaged
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
    note = path.with_suffix(".txt")         # the stamp, and the checksum of the file
    whole = world.is_main and _is_whole(path, note, stamp, shape)
    if world.all_gather(whole)[0]:          # every rank does what rank 0 has found
        return np.load(path, mmap_mode="r")
    part = path.with_suffix(".part")
    if world.is_main:
        writable(path.parent)
        check(not path.is_dir(), f"{path} is a folder, not a file: delete it")
        try:
            note.unlink(missing_ok=True)
            with open(part, "wb") as file:  # all of it: a full disk is an error now
                np.save(file, np.zeros(shape, np.uint8))
        except OSError as error:
            part.unlink(missing_ok=True)
            raise UserError(f"cannot write {path} ({error})") from None
    world.barrier()
    array = np.lib.format.open_memmap(part, "r+")
    mine = chunks[world.rank::world.size]
    for chunk in tqdm(mine, path.stem, ncols=100, mininterval=5, disable=not world.is_main):
        array[chunk] = make(chunk)
    array.flush()
    world.barrier()
    if world.is_main:
        part.replace(path)
        with replacing(note) as new:        # last: an array with a stamp is whole
            new.write_text(f"{stamp}\n{checksum(path)}\n", encoding="utf-8")
    world.barrier()
    return np.load(path, mmap_mode="r")


def _is_whole(path: Path, note: Path, stamp: str, shape: tuple) -> bool:
    try:
        array = np.load(path, mmap_mode="r")
        fits = array.shape == shape and array.dtype == np.uint8
        return fits and note.read_text(encoding="utf-8") == f"{stamp}\n{checksum(path)}\n"
    except (OSError, UserError, ValueError, EOFError):
        return False
