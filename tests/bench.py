"""
How fast the parts are. What is compared runs in alternating repeats in one process: whatever else
the machine does slows both. Printed are medians.

    python tests/bench.py               # every section
    python tests/bench.py sim           # clips simulated per second; frames beside a NumPy loop
    python tests/bench.py ddt           # frames per second of the tokenizer; EMA-VQ, brute force
    python tests/bench.py lm            # tokens per second of prefill, decoding and training
    python tests/bench.py grpo          # a step of GRPO by part, its memory beside the plan
    python tests/bench.py --small       # every section at its smallest size, in seconds
    python tests/bench.py lm --short    # one repeat after the warm-up; of 8B no plain loop
    torchrun --nproc_per_node=2 tests/bench.py grpo

Runs on the GPU where there is one, with larger sizes. On 2 CPU cores with nothing else to do, sim
takes 10 seconds, ddt 20, lm 2 minutes, grpo 1.
"""
import argparse
import contextlib
import copy
import dataclasses
import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Callable
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
import torch.nn.functional as nnf
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import ddt
import grpo
import lm
import reward
import sft
import sim
import train
import vae

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPE = torch.bfloat16 if CUDA else torch.float32
MIB = 2 ** 20
MOST_REPEATS = 99               # after the warm-up; --short: 1


def wait() -> None:
    """For the GPU to finish."""
    if CUDA:
        torch.cuda.synchronize()


def alternate(ways: dict[str, Callable], repeats: int = 5) -> dict[str, float]:
    """Functions by name -> median seconds per call. One call each to warm up, then in turn."""
    seconds = {name: [] for name in ways}
    for turn in range(min(repeats, MOST_REPEATS) + 1):
        for name, way in ways.items():
            begin = time.perf_counter()
            way()
            wait()
            if turn:
                seconds[name].append(time.perf_counter() - begin)
    return {name: median(values) for name, values in seconds.items()}


def machine(mib: int = 2048 if CUDA else 256,
            side: int = 8192 if CUDA else 1536) -> tuple[float, float]:
    """Prints and returns what the device can do at most: bytes copied, operations, per second."""
    x = torch.empty(mib * MIB, dtype=torch.uint8, device=DEVICE)
    z = torch.empty_like(x)
    a, b, y = (torch.randn(side, side, device=DEVICE, dtype=DTYPE) for _ in range(3))
    ways = {"copy": lambda: z.copy_(x), "matmul": lambda: torch.matmul(a, b, out=y)}
    seconds = alternate(ways, 9)
    bandwidth, rate = 2 * x.nbytes / seconds["copy"], 2 * side ** 3 / seconds["matmul"]
    name = torch.cuda.get_device_name() if CUDA else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}, {str(DTYPE).removeprefix('torch.')}: copies {bandwidth / 1e9:.1f} GB/s (read + "
          f"write), multiplies {side} x {side} matrices at {rate / 1e12:.3g} TFLOP/s")
    return bandwidth, rate


# ------------------------------------------------------------------ sim.py


def bench_sim(many: int = sim.SCENES, one: int = 32, sizes: tuple[int, ...] = (32, 64, 128),
              painted: int = 2) -> None:
    """
    sim.simulate: many clips in one Space beside one Space per clip, the same solver steps.
    sim.render and reward.detect of `painted` clips (as in training) beside a NumPy loop.
    """
    print(f"clips per second, {sim.SUBSTEPS} solver steps per frame, {sim.FRAMES} frames\n"
          f"{'':10s} {f'{many} in one Space':>18s} {'one Space per clip':>18s} {'ratio':>8s}")
    for scenario in sim.SCENARIOS:
        clips = sim.sample(scenario, "iid", many)
        few = clips[:one]

        def simulate(clips, **options):
            sim.simulate(scenario, clips.radius, clips.velocity, clips.position[:, 0], **options)
        ways = {"many": lambda: simulate(clips), "one": lambda: simulate(few, scenes=1)}
        seconds = alternate(ways)
        rate, alone = many / seconds["many"], one / seconds["one"]
        print(f"{scenario:10s} {rate:18.0f} {alone:18.0f} {rate / alone:7.1f}x")

    print(f"\nmicroseconds per frame, {painted * sim.FRAMES} frames a call, ours / NumPy loop\n"
          f"{'':10s} {'pixels':>6s} {'render':>16s} {'detect':>16s} {'ratio of both':>14s}")
    for scenario in ("uniform", "collision"):               # one ball, two balls
        clips = sim.sample(scenario, "iid", painted).to(DEVICE)
        N, numbers = clips.radius.shape[1], (clips.position.cpu().numpy(), clips.radius.tolist())
        for size in sizes:
            frames = sim.render(clips.position, clips.radius, size)
            plain = frames.cpu().numpy()
            ways = {"render": lambda: sim.render(clips.position, clips.radius, size),
                    "render, NumPy": lambda: numpy_render(*numbers, size),
                    "detect": lambda: reward.detect(frames, N),
                    "detect, NumPy": lambda: numpy_detect(plain, N)}
            seconds = alternate(ways, 9)
            a, b, c, d = (1e6 * s / painted / sim.FRAMES for s in seconds.values())
            print(f"{scenario:10s} {size:6d} {a:8.1f} {b:7.1f} {c:8.1f} {d:7.1f} "
                  f"{(b + d) / (a + c):13.2f}x")


def numpy_render(position: np.ndarray, radius: list[list[float]], size: int) -> np.ndarray:
    """A plain loop. An edge is a ramp one pixel wide: cheaper than sim.render, less exact."""
    B, F, N = position.shape[:3]
    frames = np.ones((B, F, 3, size, size), np.float32)
    axis = np.arange(size, dtype=np.float32) + 0.5
    for b in range(B):
        for f in range(F):
            for n in range(N):
                x, y = position[b, f, n] * size / sim.WORLD
                distance = np.sqrt((axis - x) ** 2 + (axis[:, None] - (size - y)) ** 2)
                covered = np.clip(radius[b][n] * size / sim.WORLD - distance + 0.5, 0, 1)
                frames[b, f, 1] -= covered
                frames[b, f, 2 - 2 * n] -= covered
            np.clip(frames[b, f], 0, 1, out=frames[b, f])
    return frames


def numpy_detect(frames: np.ndarray, n_balls: int) -> list[tuple]:
    """A plain loop: centre and area of the coverage of the whole frame, without reward's step 3."""
    size, balls = frames.shape[-1], []
    axis = np.arange(size, dtype=np.float32) + 0.5
    for red, green, blue in frames.reshape(-1, 3, size, size):
        for colour, other in ((red, blue), (blue, red))[:n_balls]:
            covered = np.minimum(colour - green, 1 - other)
            area = max(covered.sum(), 1e-6)
            x, y = covered.sum(0) @ axis / area, covered.sum(1) @ axis / area
            balls.append((x, size - y, np.sqrt(area / np.pi)))
    return balls


# ------------------------------------------------------------------ ddt.py


def bench_ddt(batch: int = 1024 if CUDA else 64, calls: int = 50,
              vectors: tuple[int, ...] = (512, 16384), **limits) -> None:
    """
    ddt.py at `tiny`: frames per second and the share of the matrix rate; EMA-VQ beside a
    brute-force one. calls: of the decoder, by Euler steps.
    """
    _, rate = machine(**limits)
    config = ddt.Config()
    tokenizer = ddt.DDT(config, vae.small_vae(vae.Config())).to(DEVICE).eval()
    frames = torch.rand(batch, 3, config.size, config.size, device=DEVICE)
    tokenizer.quantizer.fill(unit_vectors(4096, config.code_dim))
    codes, u = tokenizer.encode(frames), torch.rand(batch, device=DEVICE)

    def train_step():
        tokenizer.train()
        latent = tokenizer.latent(frames)
        tokenizer(latent, u, torch.randn_like(latent))["loss"].mean().backward()
        tokenizer.zero_grad()
        tokenizer.eval()
    euler = f"decode, {calls} calls"
    ways = {"encode": lambda: tokenizer.encode(frames),
            "decode, 1 call": lambda: tokenizer.decode(codes),
            euler: lambda: tokenizer.decode(codes, calls), "training step": train_step}
    seconds = alternate(ways)
    print(f"\nbatch {batch}, tiny {'frames per second':>23s} {'of the matrix rate':>20s}")
    for name, way in ways.items():
        for part in (tokenizer.encoder, tokenizer.quantizer, tokenizer.decoder):
            part.requires_grad_(way is train_step)          # the counter's hooks fail in no_grad
        with FlopCounterMode(display=False) as counter:
            way()
        share = counter.get_total_flops() / seconds[name] / rate
        print(f"{name:18s} {batch / seconds[name]:18,.0f} {share:20.1%}")

    print("\nEMA-VQ, ms per step\n"
          f"{'vectors':>10s} {'ours':>10s} {'brute force':>12s} {'ratio':>8s}")
    for n in vectors:
        z, q = unit_vectors(n, config.code_dim), tokenizer.quantizer
        with torch.no_grad():
            ways = {"ours": lambda: q.update(z, q.nearest(z)), "brute": brute_force(q, z)}
            s = alternate(ways, 9)
        ours, brute = 1e3 * s["ours"], 1e3 * s["brute"]
        print(f"{n:10d} {ours:10.2f} {brute:12.2f} {brute / ours:7.1f}x")


def unit_vectors(n: int, dim: int) -> Tensor:
    return nnf.normalize(torch.randn(n, dim, device=DEVICE), dim=-1)


def brute_force(q: ddt.EMAVectorQuantizer, z: Tensor) -> Callable:
    """EMAVectorQuantizer's step of training by distances to every code and one-hot sums."""
    def step():
        distance = (z[:, None] - q.codebook).square().sum(-1)                   # (n, V)
        hot = nnf.one_hot(distance.argmin(1), len(q.codebook)).to(z.dtype)      # (n, V)
        q.count.lerp_(hot.sum(0), 1 - q.decay)
        q.sum.lerp_(hot.T @ z, 1 - q.decay)
        q.codebook.copy_(nnf.normalize(q.sum, dim=-1))
    return step


# ------------------------------------------------------------------ lm.py


def plain_loop(model: lm.Llama, prompt: Tensor, n: int) -> Callable:
    """
    The baseline of `lm.generate`: caches that grow by torch.cat, keys and values repeated for every
    query head, and the head over the whole vocabulary. Returns a function that decodes n tokens
    after the prompt.
    """
    c = model.config

    def forward(ids, caches, start):
        cos, sin = lm.rope_table(c, start + ids.shape[1], ids.device)[:, start:]
        x = model.model["embed_tokens"](ids)
        for block, cache in zip(model.model["layers"], caches):
            a, h = block.self_attn, block.input_layernorm(x)
            qkv = a.qkv_proj(h).unflatten(-1, (-1, c.head_dim)).transpose(1, 2)
            q, k, v = qkv.split([a.heads, a.kv_heads, a.kv_heads], 1)
            new = [lm.rotate(k, cos, sin), v]
            cache[:] = [torch.cat(pair, 2) for pair in zip(cache, new)] if cache else new
            k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in cache)
            q, causal = lm.rotate(q, cos, sin), ids.shape[1] > 1
            h = nnf.scaled_dot_product_attention(q, k, v, is_causal=causal)
            x = x + a.o_proj(h.transpose(1, 2).flatten(2))
            x = x + block.mlp(block.post_attention_layernorm(x))
        return model.logits(model.model["norm"](x[:, -1]))

    filled = [[] for _ in range(c.num_hidden_layers)]
    first = forward(prompt, filled, 0)

    def decode():
        caches, logits = [list(cache) for cache in filled], first
        for i in range(n):
            logits = logits[:, model.first_code:]           # text words are masked
            ids = model.first_code + lm.draw(logits, lm.truncate(logits))
            logits = forward(ids[:, None], caches, prompt.shape[1] + i)
    return decode


@torch.no_grad()
def generate_loop(model: lm.Llama, prompt: Tensor, n: int, steps: int | None = None) -> Callable:
    """
    The loop of `lm.generate` over n codes after the first, or the first `steps` of them, as a
    function that is timed apart from the prefill and the capture of the graph.
    """
    loop = []

    def keep(step, cache, *state):
        start = [x.clone() for x in state]
        loop[:] = lm_capture(step, cache, *state), cache, list(zip(state, start)), step
        return lambda: None
    lm_capture = lm.capture
    with mock.patch.object(lm, "capture", keep):
        lm.generate(model, prompt, n + 1)

    def decode():
        replay, cache, states, _ = loop
        cache.length = prompt.shape[1]
        if cache.position is not None:
            cache.position.fill_(cache.length)
        for x, start in states:
            x.copy_(start)
        for _ in range(steps or n):
            replay()
    return decode


def compiled_loop(model: lm.Llama, *sizes) -> Callable:
    """generate_loop with kernels of torch.compile."""
    model.compile_decoding = True
    loop = generate_loop(model, *sizes)
    model.compile_decoding = False
    return loop


def used_parameters(model: lm.Llama) -> int:
    """Of the blocks, and of the head the rows of codes: text words are neither read nor trained."""
    blocks = [p.numel() for name, p in model.named_parameters()
              if "embed" not in name and "lm_head" not in name]
    return sum(blocks) + model.config.n_visual * model.config.hidden_size


@torch.no_grad()
def bench_decode(name: str, model: lm.Llama, bandwidth: float, batch: int, prompt: int,
                 n: int) -> None:
    c, size = model.config, model.head.element_size()
    ids = torch.randint(c.vocab_size, (batch, prompt), device=DEVICE)
    steps = min(n, 64) if CUDA else n       # in a graph, every step takes as long as the last
    ways = {"prefill": lambda: model(ids, lm.Cache(c, batch, prompt, DEVICE, DTYPE)),
            "decode": generate_loop(model, ids, n, steps)}
    if CUDA and train.can_compile(DEVICE, True):
        ways["compiled"] = compiled_loop(model, ids, n, steps)
    seconds = alternate(ways, 3)
    positions = prompt + (n if CUDA else n / 2)     # a graph's attention covers the whole capacity
    per_position = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim
    moved = size * (used_parameters(model) + batch * positions * per_position)
    prefill = batch * prompt / seconds.pop("prefill")
    line = f"{name:12s} {batch:5d} {moved / MIB:12,.1f} {prefill:14,.0f}"
    for way, s in seconds.items():
        rate, share = batch * steps / s, moved * steps / s / bandwidth
        line += f" {rate:13,.0f} {share:10.1%}"
    print(line)


def bench_training(name: str, model: lm.Llama, rate: float, batch: int, tokens: int) -> None:
    c = model.config
    ids = torch.randint(c.vocab_size, (batch, tokens + 1), device=DEVICE)

    def step():
        logits = model.visual_logits(model(ids[:, :-1]))
        targets = ids[:, 1:].flatten() % c.n_visual
        nnf.cross_entropy(logits.flatten(0, 1), targets).backward()
        model.zero_grad()
    seconds = alternate({"step": step}, 3)["step"]
    attention = 6 * c.num_hidden_layers * c.num_attention_heads * c.head_dim * tokens   # causal
    flops = batch * tokens * (6 * used_parameters(model) + attention)
    print(f"{name:12s} {batch:5d} {batch * tokens / seconds:14,.0f} {flops / seconds / rate:24.1%}")


# vocabulary beside the codes, hidden, ffn, layers, heads, key-value heads, head dimension
TINY = (128256, 128, 384, 4, 4, 2, 32)
SHAPES = {"tiny": TINY, "100M": (128256, 768, 2304, 14, 12, 4, 64)}


def bench_lm(shapes: dict[str, tuple] = SHAPES, batches: tuple[int, ...] = (1, 32, 224),
             prompt: int = 49, n: int = 16, train_batch: int = 4, train_tokens: int = 256,
             largest: bool = CUDA, **limits) -> None:
    """
    lm.py: against the machine's limits, the visual head against the full one, decoding against a
    plain loop. largest: Llama-3.1-8B, too, which is not trained: that takes a sharded optimizer.
    """
    bandwidth, rate = machine(**limits)
    models = {}
    for name, (words, *shape) in shapes.items():
        with DEVICE:
            models[name] = lm.Llama(lm.LlamaConfig(words + 256, *shape, n_visual=256)).to(DTYPE)
    if largest:
        n = 464
        with DEVICE:
            models["llama-3.1-8b"] = lm.Llama(lm.CONFIGS["llama-3.1-8b"]).to(DTYPE)
        models["llama-3.1-8b"].extend(256)
    print(f"\n{'':12s} {'batch':>5s} {'MiB per step':>12s} {'prefill tok/s':>14s} "
          f"{'decode tok/s':>13s} {'of copying':>10s}"
          + f" {'compiled':>13s} {'of copying':>10s}" * CUDA)
    for name, model in models.items():
        for batch in batches:
            bench_decode(name, model, bandwidth, batch, prompt, n)

    B = batches[len(batches) // 2]
    print(f"\nthe head alone, ms for {B} tokens\n"
          f"{'':12s} {'visual':>10s} {'full':>10s} {'ratio':>8s}")
    for name, model in models.items():
        hidden = torch.randn(B, model.config.hidden_size, device=DEVICE, dtype=DTYPE)
        ways = {"visual": lambda: model.visual_logits(hidden), "full": lambda: model.logits(hidden)}
        with torch.no_grad():
            s = alternate(ways, 9)
        visual, full = 1e3 * s["visual"], 1e3 * s["full"]
        print(f"{name:12s} {visual:10.3f} {full:10.3f} {full / visual:7.1f}x")

    print(f"\ndecoding {B} sequences, tokens per second\n"
          f"{'':12s} {'ours':>10s} {'plain loop':>10s} {'ratio':>8s}")
    for name, model in models.items():
        if MOST_REPEATS == 1 and name not in shapes:
            continue
        ids = torch.randint(model.config.vocab_size, (B, prompt), device=DEVICE)
        with torch.no_grad():
            ways = {"ours": generate_loop(model, ids, n), "plain": plain_loop(model, ids, n)}
            s = alternate(ways, 3)
        ours, plain = B * n / s["ours"], B * n / s["plain"]
        print(f"{name:12s} {ours:10,.0f} {plain:10,.0f} {ours / plain:7.1f}x")

    print(f"\nforward and backward pass of training\n"
          f"{'':12s} {'batch':>5s} {'tok/s':>14s} {'of the matrix rate':>24s}")
    for name in shapes:
        batch = 8 * train_batch if CUDA or name == "tiny" else train_batch
        bench_training(name, models[name], rate, batch, train_tokens)


# ------------------------------------------------------------------ grpo.py


def cut_llama(width: int, layers: int, words: int) -> lm.LlamaConfig:
    """Llama-3.1-8B's shape with fewer layers and words, at `width` of its 4096 channels."""
    c = lm.CONFIGS["llama-3.1-8b"]
    heads = c.num_attention_heads * width // 4096
    return dataclasses.replace(
        c, vocab_size=words + 256, hidden_size=width, bos_token_id=0,
        eos_token_id=None, n_visual=256,
        intermediate_size=c.intermediate_size * width // 4096, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads // 4)


class Watch:
    """Seconds of parts of a step, and bytes of its tensors, by wrapping the parts' functions."""

    def __init__(self):
        self.seconds, self.held, self.patches = {}, {}, contextlib.ExitStack()

    def wrap(self, owner, name: str, around: Callable) -> None:
        """around(plain function, *its arguments) is called in its place."""
        plain = getattr(owner, name)

        def call(*args, **kwargs):
            return around(plain, *args, **kwargs)
        self.patches.enter_context(mock.patch.object(owner, name, call))

    def time(self, owner, name: str, label: str | Callable) -> None:
        """label: of the part, or a function of the arguments that gives it."""
        def around(plain, *args, **kwargs):
            begin = time.perf_counter()
            result = plain(*args, **kwargs)
            wait()
            key = label if isinstance(label, str) else label(*args, **kwargs)
            self.seconds[key] = self.seconds.get(key, 0) + time.perf_counter() - begin
            return result
        self.wrap(owner, name, around)

    def weigh(self) -> None:
        """Gradients and optimizer state at the optimizer's step, the cache where it is copied."""
        def step(plain, optimizer, *args):
            self.held["gradients"] = sum(p.grad.nbytes for p in optimizer.params)
            plain(optimizer, *args)
            state = optimizer.state().values()
            self.held["masters and moments, fp32"] = sum(x.nbytes for x in state)

        def expand(plain, cache, group):
            self.held["KV cache"] = cache.kv.nbytes * (1 + group)
            return plain(cache, group)
        self.wrap(train.AdamW, "step", step)
        self.wrap(lm.Cache, "expand", expand)


def pass_of(model, ids, cache=None) -> str:
    if cache is None:
        return "log-probabilities, and forward of training"
    return "prefill" if ids.shape[1] > 1 else "decode"


def bench_grpo(width: int = 4096 if CUDA else 1024, layers: int = 2, words: int = 16384,
               queries: int = 16, prompts: int = 2, group: int = 4) -> None:
    """
    One step of GRPO with a cut Llama-3.1-8B in bf16, checkpointed: the tensors of a rank beside
    what experiments/plan.py says, and the seconds of every part. (The tokenizer is `tiny` with 16
    queries: the paper's would take a CPU minutes.)
    """
    from experiments import plan

    world, watch = train.start(0), Watch()
    device, held = world.device, watch.held
    config = grpo.Config(prompts=prompts, group=group, micro_batch=2, checkpointing=True, steps=2,
                         save_every=100)
    tokenizer = ddt.DDT(ddt.Config(queries=queries), vae.small_vae(vae.Config()))
    tokenizer = tokenizer.to(device).eval().requires_grad_(False)
    c = cut_llama(width, layers, words)
    reference = lm.Llama(c).to(device, torch.bfloat16).requires_grad_(False)
    policy = copy.deepcopy(reference).requires_grad_(True)
    policy.checkpointing = True
    policy_logits = train.distribute(grpo.CodeLogits(policy), world)
    clips, pretrain = (world.shard(sim.sample("uniform", split, prompts)).to(device)
                       for split in ("posttrain", "pretrain"))
    generators = [train.generator(0, 0, i, device=device) for i in range(prompts)]

    watch.weigh()
    watch.time(lm.Llama, "forward", pass_of)
    watch.time(sft, "decode", "codes to frames")
    watch.time(reward, "reward", "reward")
    watch.time(torch.Tensor, "backward", "backward, with the blocks' second forward")
    watch.time(train.AdamW, "step", "optimizer")
    held["parameters"] = held["reference"] = sum(p.nbytes for p in policy.parameters())
    with (tempfile.TemporaryDirectory() as folder, watch.patches,
          train.Run(Path(folder), policy, config, world) as run):
        begin = time.perf_counter()
        r, _ = grpo.rollout(policy, tokenizer, clips, config, world.shard(generators))
        held["supports of rollouts"] = r.support.nbytes
        n = world.accumulation_steps(prompts, config.micro_batch, group)
        known = grpo.known_sequences(reference, sft.tokenize(tokenizer, pretrain))
        total, T = 0.0, r.codes.shape[1]
        parts = [*grpo.micro_batches(r, n), known]
        for part in run.accumulate(parts, policy_logits):
            logits = policy_logits(part.ids, T)
            logits_ref = grpo.frozen_logits(reference, part.ids, T)
            if isinstance(part, grpo.Rollouts):
                loss = grpo.grpo_loss(logits, logits_ref, part.codes, part.support,
                                      part.logp_old, part.advantage, config.clip_eps, config.beta)
                loss = loss["loss"].sum() / (prompts * group)
            else:
                loss = grpo.kl_divergence(logits, logits_ref).mean(1).sum() / prompts
            (loss * world.size).backward()
            total += loss.detach()
        run.step(total)
        wait()
        whole = time.perf_counter() - begin

    planned = plan.plan_for(config, world.size, c, torch.bfloat16, tokenizer)
    parameters = sum(p.numel() for p in policy.parameters())
    world.print0(f"{world.size} rank{'s' * (world.size > 1)}, {parameters / 1e9:.3f}e9 parameters\n"
                 f"{'MiB on a rank':34s} {'held':>10s} {'planned':>10s}")
    for name, size in (planned.fixed | planned.passing).items():
        if name in held:
            world.print0(f"{name:34s} {held[name] / MIB:10.1f} {size / MIB:10.1f}")
    world.print0(f"\n{'seconds of a step':46s} {whole:8.2f}")
    for name, s in watch.seconds.items():
        world.print0(f"  {name:44s} {s:8.3f}")


# ------------------------------------------------------------------ the command

SECTIONS = {"sim": bench_sim, "ddt": bench_ddt, "lm": bench_lm, "grpo": bench_grpo}
SMALL_LIMITS = dict(mib=8, side=128)
SMALL = {
    "sim": dict(many=16, one=2, sizes=(16,), painted=1),
    "ddt": dict(batch=2, calls=2, vectors=(8, 64), **SMALL_LIMITS),
    "lm": dict(shapes={"tiny": (1000, 64, 96, 2, 4, 2, 16)}, batches=(1, 2), prompt=5, n=3,
               train_batch=1, train_tokens=8, largest=False, **SMALL_LIMITS),
    "grpo": dict(width=512, layers=1, words=100, queries=2, prompts=2, group=2)}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION",
                        help=f"{', '.join(SECTIONS)} (default: all)")
    parser.add_argument("--small", action="store_true", help="the smallest sizes, in seconds")
    parser.add_argument("--short", action="store_true", help="one repeat instead of the median of "
                        "several; no plain loop with Llama-3.1-8B")
    args = parser.parse_args(argv)
    global MOST_REPEATS
    MOST_REPEATS = 1 if args.short else MOST_REPEATS
    for name in args.sections:
        if name not in SECTIONS:
            parser.error(f"unknown section {name!r}: choose from {', '.join(SECTIONS)}")
    for name in args.sections or SECTIONS:
        if os.environ.get("RANK", "0") == "0":
            print(f"\n== {name}", flush=True)
        SECTIONS[name](**SMALL[name] if args.small else {})


if __name__ == "__main__":
    train.cli(main)
