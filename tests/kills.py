"""
Kills training at random moments, starts it again until it is done, and compares the weights and the
log with those of an uninterrupted run, bit by bit: prior, VAE, DDT, VQGAN, DiT, SFT and GRPO, on 1
and 2 ranks. A checkpoint is saved after every step, thus many kills fall into the middle of a save.

    python tests/kills.py                # 200 kills
    python tests/kills.py --kills 24     # two of each stage and number of ranks
"""
import argparse
import dataclasses
import json
import multiprocessing
import multiprocessing.forkserver
import os
import random
import shutil
import socket
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch._dynamo          # torch.optim imports it: once here instead of in every process
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent.parent))
import checkpoint
import ddt
import grpo
import prior
import reward
import sft
import train
import vae
from experiments import dit, vqgan

CONFIGS = {
    "llm": prior.Config(steps=8, batch=5, length=24, save_every=1, micro_batch=2, hidden=32, ffn=64,
                        layers=1),
    "vae": vae.Config(steps=6, batch=4, warmup=1, width=8, clips=40, save_every=1, size=16),
    # code_dim: on the circle of tiny's codes, an untrained encoder's vectors lie so close that
    # rounding, which depends on the shards' sizes, decides which code is the nearest
    "ddt": ddt.Config(steps=8, batch=6, clips=40, frames=701, save_every=1, noise_below=9.0,
                      size=16, queries=2, code_dim=16, image_width=16, query_width=32,
                      encoder_layers=1, width=32, layers=1),
    "vqgan": vqgan.Config(steps=8, batch=6, clips=40, save_every=1, size=16, width=8, levels=3),
    "dit": dit.Config(steps=6, batch=5, clips=12, save_every=1, size=16, width=24, layers=1,
                      heads=2),
    "sft": sft.Config(llm="prior", steps=8, batch=5, clips=12, save_every=1, micro_batch=2),
    "grpo": grpo.Config(steps=5, prompts=3, group=2, clips=6, save_every=1),
}
BEFORE = {"llm": (), "vae": (), "ddt": ("vae",), "vqgan": (), "dit": ("vae",),
          "sft": ("llm", "vae", "ddt"), "grpo": ("vae", "ddt", "sft")}

# ------------------------------------------------------------------ processes


def context():
    """Starts processes from a server that has imported torch and this project once."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["kills"] + ["pytest"] * ("pytest" in sys.modules))
    before = os.environ.get("PYTHONPATH")               # where the server looks for modules
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(Path(__file__).parent), before)))
    multiprocessing.forkserver.ensure_running()
    if before is None:
        os.environ.pop("PYTHONPATH")
    else:
        os.environ["PYTHONPATH"] = before
    return server


def stage(name: str, out: str, rank: int, ranks: int, port: int, change: dict) -> None:
    """
    Trains one stage in the folder `out`, which holds those before it, as one rank of a group. What
    it prints is in <out>/printed<rank>.
    """
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port)}
    os.dup2(os.open(f"{out}/printed{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
    os.dup2(1, 2)
    train.cli(lambda: train_stage(name, out, change))


def train_stage(name: str, out: str, change: dict) -> None:
    world = train.start(0)
    torch.set_num_threads(1)
    config = dataclasses.replace(CONFIGS[name], out=out, **change)
    if name == "llm":
        prior.train_prior(config, world)
    elif name == "vae":
        vae.train_vae(config, world)
    elif name == "ddt":
        ddt.train_ddt(config, vae.VAE.load(f"{out}/vae"), world)
    elif name == "vqgan":
        vqgan.train_vqgan(config, world)
    elif name == "dit":
        dit.train_dit(config, vae.VAE.load(f"{out}/vae"), world)
    elif name == "sft":
        sft.train_sft(config, ddt.DDT.load(f"{out}/ddt"), world)
    else:
        reward.reward = brightness
        reference = sft.load(Path(out, "sft")).requires_grad_(False)
        grpo.train_grpo(config, ddt.DDT.load(f"{out}/ddt"), reference, world)


def brightness(frames, clips, horizon):
    """In place of reward.reward: a hardly trained tokenizer paints no ball that could be found."""
    ahead = 1e4 * frames.double().mean((2, 3, 4)).float()           # (B, F)
    mean = ahead.mean(1)                                            # (B,)
    return {"reward": mean, "velocity": mean, "mass": mean, "ahead": ahead}


def start(name: str, out: Path, ranks: int, **change) -> list:
    """Processes that train a stage, with some fields of its config changed."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    processes = [context().Process(target=stage, args=(name, str(out), rank, ranks, port, change))
                 for rank in range(ranks)]
    for process in processes:
        process.start()
    return processes


def run(name: str, out: Path, ranks: int, kill_at: tuple[int, float] | None = None,
        **change) -> bool:
    """
    -> whether it came to its end. kill_at (step, seconds): SIGKILL to all ranks so long after the
    saving of that step began.
    """
    processes = start(name, out, ranks, **change)
    if kill_at is not None:
        saved = out / name / f"checkpoint-{kill_at[0]:08d}"
        while not saved.exists() and processes[0].is_alive():
            time.sleep(0.001)
        time.sleep(kill_at[1])
        for process in processes:
            process.kill()
    for process in processes:
        process.join(120)
    return all(process.exitcode == 0 for process in processes)


def printed(out: Path) -> str:
    return "\n".join(path.read_text()[-2000:] for path in sorted(out.glob("printed*")))


# ------------------------------------------------------------------ runs


def whole_run(out: Path) -> None:
    """Every stage once, uninterrupted, on one rank."""
    for name in ("llm", "vae", "ddt", "dit", "sft", "grpo"):
        if not run(name, out, 1):
            raise RuntimeError(f"{name} failed: {printed(out)}")


def prepare(name: str, done: Path, out: Path) -> Path:
    """Copies what a stage starts from into the new folder `out`."""
    out.mkdir()
    for part in BEFORE[name]:
        shutil.copytree(done / part, out / part)
    return out


def log_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def result(folder: Path) -> tuple[dict[str, torch.Tensor], list[dict]]:
    """Weights, and the log without its times."""
    log = [{k: v for k, v in line.items() if k != "step_time"} for line in log_of(folder)]
    return load_file(next(folder.glob("*.safetensors"))), log


def survive(name: str, ranks: int, kills: int, done: Path, rng: random.Random) -> dict[str, int]:
    """
    Kills a stage `kills` times -> how many of them found a checkpoint to go on with, and how many
    an unfinished save. AssertionError where the end differs from that of an uninterrupted run.
    """
    count = {"kills": 0, "with a checkpoint": 0, "in a save": 0}
    what, last = f"{name}, {ranks} ranks", CONFIGS[name].steps - 1
    with tempfile.TemporaryDirectory() as folder:
        plain, out = Path(folder, "plain"), Path(folder, "killed")
        for copy in (plain, out):
            prepare(name, done, copy)
        assert run(name, plain, ranks), printed(plain)
        longest = max(line["step_time"] for line in log_of(plain / name)[1:])
        expected_weights, expected_log = result(plain / name)

        while count["kills"] < kills:
            shutil.rmtree(out / name, ignore_errors=True)
            finished, step = False, 0
            while not finished and step < last and count["kills"] < kills:
                step = rng.randint(step + 1, last)
                finished = run(name, out, ranks, (step, rng.uniform(0, 1.5 * longest)))
                if not finished:
                    saves = (out / name).glob("checkpoint-*")
                    unfinished = [s for s in saves if not (s / "manifest.json").exists()]
                    count["kills"] += 1
                    count["with a checkpoint"] += bool(checkpoint.checkpoints(out / name))
                    count["in a save"] += bool(unfinished)
            assert finished or run(name, out, ranks), printed(out)
            weights, log = result(out / name)
            assert log == expected_log, f"{what}: another log"
            assert weights.keys() == expected_weights.keys(), f"{what}: other weights"
            for key, x in expected_weights.items():
                assert torch.equal(weights[key], x), f"{what}: other weights in {key}"
    return count


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="how many (default: 200)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    args = parser.parse_args(argv)
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as done:
        whole_run(Path(done))
        cases = [(name, ranks) for name in CONFIGS for ranks in (1, 2)]
        for i, (name, ranks) in enumerate(cases):
            n = args.kills * (i + 1) // len(cases) - args.kills * i // len(cases)
            if n:
                count = survive(name, ranks, n, Path(done), rng)
                print(f"{name}, {ranks} rank{'s' * (ranks > 1)}: {count}", flush=True)
    print("every run ended with the weights and the log of the uninterrupted one")


if __name__ == "__main__":
    main()
