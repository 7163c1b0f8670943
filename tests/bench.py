"""
How fast are the parts? What is compared runs in alternating repeats in one process, so that whatever else the machine does
slows both; printed are medians.

    python tests/bench.py              # every section but the last
    python tests/bench.py sim          # one of them: clips simulated a second
    python tests/bench.py ddt          # frames a second through the tokenizer, EMA-VQ beside a brute-force one
    python tests/bench.py lm           # tokens a second of prefill, decode and training, on the GPU where there is one
    torchrun --nproc_per_node=2 tests/bench.py grpo     # a step of GRPO with a cut 8B, by part, and its memory beside the plan

sim takes 10 seconds on one CPU core, lm 2 minutes on two.
"""
import sys
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32


def alternate(ways, repeats=5):
    """{name: function} -> {name: median seconds a call}. One call each to warm up, then `repeats` in turn."""
    seconds = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, way in ways.items():
            begin = time.perf_counter()
            way()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            if turn:
                seconds[name].append(time.perf_counter() - begin)
    return {name: median(values) for name, values in seconds.items()}


def bench_sim():
    """sim.simulate: many scenes in one Space beside one Space a clip, with the same solver steps."""
    import sim
    many, one = sim.SCENES, 32                                           # clips a call
    print(f"clips a second, {sim.SUBSTEPS} solver steps a frame, {sim.FRAMES} frames\n"
          f"{'':10s} {f'{many} in one Space':>18s} {'one Space a clip':>18s} {'ratio':>8s}")
    for scenario in sim.SCENARIOS:
        clips = sim.sample(scenario, "iid", many)
        radius, velocity, start = clips.radius, clips.velocity, clips.position[:, 0]
        seconds = alternate({
            "many": lambda: sim.simulate(scenario, radius, velocity, start),
            "one": lambda: sim.simulate(scenario, radius[:one], velocity[:one], start[:one], scenes=1)})
        rate, alone = many / seconds["many"], one / seconds["one"]
        print(f"{scenario:10s} {rate:18.0f} {alone:18.0f} {rate / alone:7.1f}x")


def machine():
    """Prints and returns what the device can do at most: bytes copied (read + written) and operations a second."""
    x = torch.empty(2 ** (31 if DEVICE.type == "cuda" else 28), dtype=torch.uint8, device=DEVICE)
    n = 8192 if DEVICE.type == "cuda" else 1536
    a, b, y = (torch.randn(n, n, device=DEVICE, dtype=DTYPE) for _ in "aby")
    z = torch.empty_like(x)
    seconds = alternate({"copy": lambda: z.copy_(x), "matmul": lambda: torch.matmul(a, b, out=y)}, 9)
    bandwidth, rate = 2 * x.nbytes / seconds["copy"], 2 * n ** 3 / seconds["matmul"]
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}, {str(DTYPE).removeprefix('torch.')}: copies {bandwidth / 1e9:.1f} GB/s (read + write), "
          f"multiplies {n} x {n} matrices at {rate / 1e12:.3g} TFLOP/s")
    return bandwidth, rate


def plain_loop(model, prompt, n):
    """
    The baseline of `lm.generate`: caches that grow by torch.cat, keys and values repeated for every query head, and the
    head over the whole vocabulary. Returns a function that decodes n tokens after the prompt.
    """
    import torch.nn.functional as F

    import lm
    c = model.config

    def forward(ids, caches, start):
        angle = (torch.arange(start, start + ids.shape[1], device=ids.device)[:, None]
                 * lm.rope_frequencies(c, ids.device)).repeat(1, 2)
        cos, sin = angle.cos(), angle.sin()
        x = model.model["embed_tokens"](ids)
        for block, cache in zip(model.model["layers"], caches):
            a, h = block.self_attn, block.input_layernorm(x)
            q, k, v = (f(h).unflatten(-1, (-1, c.head_dim)).transpose(1, 2) for f in (a.q_proj, a.k_proj, a.v_proj))
            cache[:] = [torch.cat(pair, 2) for pair in zip(cache, (lm.rotate(k, cos, sin), v))] if cache else \
                [lm.rotate(k, cos, sin), v]
            k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in cache)
            h = F.scaled_dot_product_attention(lm.rotate(q, cos, sin), k, v, is_causal=ids.shape[1] > 1)
            x = x + a.o_proj(h.transpose(1, 2).flatten(2))
            x = x + block.mlp(block.post_attention_layernorm(x))
        return model.logits(model.model["norm"](x[:, -1]))

    filled = [[] for _ in range(c.num_hidden_layers)]
    first = forward(prompt, filled, 0)

    def decode():
        caches, logits = [list(cache) for cache in filled], first
        for i in range(n):
            logits = logits[:, model.first_code:]                        # text words are masked
            ids = model.first_code + lm.draw(logits, lm.truncate(logits))
            logits = forward(ids[:, None], caches, prompt.shape[1] + i)
    return decode


def static_loop(model, prompt, n):
    """What `lm.generate` does after its prefill, as a function that can be timed apart from it."""
    import lm
    cache = lm.Cache(model.config, len(prompt), prompt.shape[1] + n, prompt.device, model.head.dtype)
    first = model.visual_logits(model(prompt, cache)[:, -1]).clone()
    step = lm.decode_step(model, cache, model.visual_logits)

    def decode():
        cache.length, logits = prompt.shape[1], first
        if cache.position is not None:
            cache.position.fill_(cache.length)
        for _ in range(n):
            logits = step(model.first_code + lm.draw(logits, lm.truncate(logits))[:, None])
    return decode


@torch.no_grad()
def bench_decode(name, model, bandwidth, n):
    import lm
    c = model.config
    read = sum(p.nbytes for k, p in model.named_parameters() if "embed" not in k and "lm_head" not in k)
    read += c.n_visual * c.hidden_size * model.head.element_size()
    for B in (1, 32, 256 if DEVICE.type == "cpu" else 224):
        prompt = torch.randint(c.vocab_size, (B, 49), device=DEVICE)
        seconds = alternate({"prefill": lambda: model(prompt, lm.Cache(c, B, 49, DEVICE, DTYPE)),
                             "decode": static_loop(model, prompt, n)}, 3)
        positions = 49 + (n if DEVICE.type == "cuda" else n / 2)         # a graph's attention covers the whole capacity
        moved = read + 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * B * positions * model.head.element_size()
        print(f"{name:12s} {B:5d} {B * 49 / seconds['prefill']:14,.0f} {B * n / seconds['decode']:13,.0f} "
              f"{moved / 2 ** 20:12,.1f} {moved * n / seconds['decode'] / bandwidth:10.0%}")


def bench_training(name, model, rate, batch):
    c, ids = model.config, torch.randint(model.config.vocab_size, (batch, 257), device=DEVICE)

    def step():
        logits = model.visual_logits(model(ids[:, :-1]))
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten() % c.n_visual).backward()
        model.zero_grad()
    seconds, tokens = alternate({"step": step}, 3)["step"], batch * 256
    used = sum(p.numel() for k, p in model.named_parameters() if "embed" not in k and "lm_head" not in k)
    used += c.n_visual * c.hidden_size
    flops = tokens * (6 * used + 6 * c.num_hidden_layers * c.num_attention_heads * c.head_dim * 256)      # causal: half of 12
    print(f"{name:12s} {batch:5d} {tokens / seconds:14,.0f} {flops / seconds / rate:24.0%}")


def bench_lm():
    """lm.py: against the machine's limits, the visual head against the full one, and decoding against a plain loop."""
    import lm
    bandwidth, rate = machine()
    shapes = {"tiny": (128, 384, 4, 4, 2, 32), "100M": (768, 2304, 14, 12, 4, 64)}
    configs = {name: lm.LlamaConfig(128256 + 256, *shape, n_visual=256) for name, shape in shapes.items()}
    n = 16
    if DEVICE.type == "cuda":
        configs["llama-3.1-8b"], n = lm.CONFIGS["llama-3.1-8b"], 464
    models = {}
    for name, config in configs.items():
        with DEVICE:
            models[name] = lm.Llama(config).to(DTYPE)
        if not config.n_visual:
            models[name].extend(256)
    print(f"\n{'':12s} {'batch':>5s} {'prefill tok/s':>14s} {'decode tok/s':>13s} {'MiB a step':>12s} {'of copying':>10s}")
    for name, model in models.items():
        bench_decode(name, model, bandwidth, n)

    print(f"\nthe head alone, ms for 32 tokens\n{'':12s} {'visual':>10s} {'full':>10s} {'ratio':>8s}")
    for name, model in models.items():
        hidden = torch.randn(32, model.config.hidden_size, device=DEVICE, dtype=DTYPE)
        with torch.no_grad():
            s = alternate({"visual": lambda: model.visual_logits(hidden), "full": lambda: model.logits(hidden)}, 9)
        print(f"{name:12s} {1e3 * s['visual']:10.3f} {1e3 * s['full']:10.3f} {s['full'] / s['visual']:7.0f}x")

    print(f"\ndecoding 32 sequences, tokens a second\n{'':12s} {'ours':>10s} {'plain loop':>10s} {'ratio':>8s}")
    for name, model in models.items():
        prompt = torch.randint(model.config.vocab_size, (32, 49), device=DEVICE)
        with torch.no_grad():
            s = alternate({"ours": static_loop(model, prompt, n), "plain": plain_loop(model, prompt, n)}, 3)
        print(f"{name:12s} {32 * n / s['ours']:10,.0f} {32 * n / s['plain']:10,.0f} {s['plain'] / s['ours']:7.1f}x")

    print(f"\nforward and backward of training\n{'':12s} {'batch':>5s} {'tok/s':>14s} {'of the matrix rate':>24s}")
    for name, model in models.items():
        if name in shapes:                                               # 8B needs its optimizer sharded: train.py
            bench_training(name, model, rate, 32 if name == "tiny" or DEVICE.type == "cuda" else 4)


def brute_force(q, z):
    """What EMAVectorQuantizer does in a training step, by distances to every code and one-hot sums."""
    def step():
        distance = (z[:, None] - q.codebook).square().sum(-1)                        # (n, N)
        hot = torch.nn.functional.one_hot(distance.argmin(1), len(q.codebook)).to(z.dtype)
        q.count.lerp_(hot.sum(0), 1 - q.decay)
        q.sum.lerp_(hot.T @ z, 1 - q.decay)
        q.codebook.copy_(torch.nn.functional.normalize(q.sum, dim=-1))
    return step


def bench_ddt():
    """ddt.py at `tiny`: frames a second and the share of the matrix rate; EMA-VQ beside a brute-force one."""
    from torch.utils.flop_counter import FlopCounterMode

    import ddt
    _, rate = machine()
    config, size = ddt.Config(), 1024 if DEVICE.type == "cuda" else 64
    model = ddt.DDT(config, ddt.small_vae(config)).to(DEVICE)
    frames = torch.rand(size, 3, config.size, config.size, device=DEVICE)
    model.quantizer.fill(torch.nn.functional.normalize(torch.randn(4096, 16, device=DEVICE), dim=-1))
    model.eval()
    codes, u = model.encode(frames), torch.rand(size, device=DEVICE)

    def train_step():
        model.train()
        latent = model.latent(frames)
        model(latent, u, torch.randn_like(latent))["loss"].mean().backward()
        model.zero_grad()

    ways = {"encode": lambda: model.encode(frames), "decode, 1 call": lambda: model.decode(codes),
            "decode, 50 steps": lambda: model.decode(codes, 50), "training step": train_step}
    seconds = alternate(ways, 5)
    print(f"\nbatch {size}, tiny {'frames a second':>23s} {'of the matrix rate':>20s}")
    for name, way in ways.items():
        for part in (model.encoder, model.quantizer, model.decoder):
            part.requires_grad_(name == "training step")                 # the counter's hooks fail in no_grad otherwise
        with FlopCounterMode(display=False) as counter:
            way()
        print(f"{name:18s} {size / seconds[name]:18,.0f} {counter.get_total_flops() / seconds[name] / rate:20.0%}")

    print(f"\nEMA-VQ, ms a step\n{'vectors':>10s} {'ours':>10s} {'brute force':>12s} {'ratio':>8s}")
    for n in (512, 16384):
        z, q = torch.nn.functional.normalize(torch.randn(n, 16, device=DEVICE), dim=-1), model.quantizer
        with torch.no_grad():
            s = alternate({"ours": lambda: q.update(z, q.nearest(z)), "brute": brute_force(q, z)}, 9)
        print(f"{n:10d} {1e3 * s['ours']:10.2f} {1e3 * s['brute']:12.2f} {s['brute'] / s['ours']:7.1f}x")


def bench_grpo():
    """
    One step of GRPO with a Llama of the 8B's shape cut to 2 layers and 16K words, bf16, checkpointed, 2 prompts x 4
    rollouts of 16 tokens a frame: the tensors of a rank beside what --plan says, and the seconds of every part.
    (The tokenizer is `tiny` with 16 queries: the paper's would take a CPU minutes.)
    """
    import copy
    import dataclasses
    import tempfile

    import ddt
    import grpo
    import lm
    import reward
    import sft
    import sim
    import train
    world, seconds, held = train.start(0), {}, {}

    def timed(owner, name, label):
        plain = getattr(owner, name)

        def call(*args, **kwargs):
            begin = time.perf_counter()
            result = plain(*args, **kwargs)
            key = label(*args) if callable(label) else label
            seconds[key] = seconds.get(key, 0) + time.perf_counter() - begin
            return result
        setattr(owner, name, call)

    c = dataclasses.replace(lm.CONFIGS["llama-3.1-8b"], num_hidden_layers=2, vocab_size=16384 + 256, n_visual=256, bos_token_id=0)
    tokens = ddt.Config(queries=16)
    config = grpo.Config(prompts=2, group=4, micro=2, checkpointing=True, steps=2, save_every=100)
    tokenizer = ddt.DDT(tokens, ddt.small_vae(tokens)).eval().requires_grad_(False)
    reference = lm.Llama(c).bfloat16().requires_grad_(False)
    policy = copy.deepcopy(reference).requires_grad_(True)
    policy.checkpointing = True
    policy_logits = train.distribute(grpo.LastLogits(policy), world)
    clips = world.share(sim.sample("uniform", "posttrain", config.prompts))
    timed(lm.Llama, "forward", lambda model, ids, cache=None: "score, and forward of training" if cache is None else
          "prefill" if ids.shape[1] > 1 else "decode")
    timed(sft, "decode", "detokenise")
    timed(reward, "reward", "reward")
    timed(torch.Tensor, "backward", "backward, with the blocks' second forward")
    timed(train.AdamW, "step", "optimizer")
    step, expand = train.AdamW.step, lm.Cache.expand

    def weighed_step(self, *args):
        held["gradients"] = sum(p.grad.nbytes for p in self.params)
        step(self, *args)
        held["masters and moments, fp32"] = sum(x.nbytes for bucket in self.buckets for x in bucket.state().values())

    def weighed_expand(self, group):
        held["KV cache"] = self.kv.nbytes * (1 + group)
        return expand(self, group)
    train.AdamW.step, lm.Cache.expand = weighed_step, weighed_expand
    held["parameters"] = sum(p.nbytes for p in policy.parameters())
    held["reference"] = sum(p.nbytes for p in reference.parameters())
    with tempfile.TemporaryDirectory() as folder, train.Run(train.Path(folder), policy, config, world) as run:
        begin = time.perf_counter()
        generators = world.share([train.generator(0, 0, i) for i in range(config.prompts)])
        r = grpo.rollout(policy, reference, tokenizer, clips, config, generators)
        held["logits and supports of rollouts"] = r.logits_ref.nbytes + r.support.nbytes
        parts = len(r.ids) // config.micro
        known = grpo.true_clips(reference, tokenizer, world.share(sim.sample("uniform", "pretrain", config.prompts)))
        for part in run.accumulate(r.split(parts) + [known], policy_logits):
            logits = policy_logits(part.ids, part.logits_ref.shape[1])
            if isinstance(part, grpo.Rollout):
                loss = grpo.grpo_loss(logits, part.logits_ref, part.codes, part.support, part.logp_old, part.advantage,
                                      config.ratio_clip, config.beta)["loss"].sum()
            else:
                loss = grpo.kl_divergence(logits.log_softmax(-1), part.logits_ref.log_softmax(-1)).mean(1).sum()
            (loss * world.size).backward()
        run.step(loss.detach())
        whole = time.perf_counter() - begin
    plan = grpo.plan_for(config, world.size, c, torch.bfloat16, tokens)
    if world.is_main:
        print(f"{world.size} ranks, {sum(p.numel() for p in policy.parameters()) / 1e9:.2f}e9 parameters\n"
              f"{'MiB on a rank':34s} {'held':>10s} {'planned':>10s}")
        for name, size in (plan.fixed | plan.passing).items():
            if name in held:
                print(f"{name:34s} {held[name] / 2 ** 20:10.1f} {size / 2 ** 20:10.1f}")
        print(f"\n{'seconds of a step':44s} {whole:8.1f}")
        for name, s in seconds.items():
            print(f"  {name:42s} {s:8.1f}")


SECTIONS = {"sim": bench_sim, "ddt": bench_ddt, "lm": bench_lm, "grpo": bench_grpo}


def main(names):
    unknown = [name for name in names if name not in SECTIONS]
    if unknown:
        print(f"unknown section {unknown[0]!r}: choose from {', '.join(SECTIONS)}", file=sys.stderr)
        sys.exit(2)
    for name in names or ("sim", "ddt", "lm"):
        print(f"\n== {name}")
        SECTIONS[name]()


if __name__ == "__main__":
    main(sys.argv[1:])
