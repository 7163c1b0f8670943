"""
The language model: logits against transformers', the cache, sampling and scoring.

    pytest tests/test_lm.py

fixtures/{llama31,llama2,qwen25-tied,qwen25-untied} are small random models that transformers wrote,
with their logits and greedy continuations.
"""
import contextlib
import dataclasses
import functools
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import lm
import train
from lm import (CONFIGS, Cache, Llama, LlamaConfig, capture, choose, decode_step, draw, generate,
                gumbel_noise, logprobs, rope_frequencies, truncate)

FIXTURES = Path(__file__).parent / "fixtures"
PEERS = ["llama31", "llama2", "qwen25-tied", "qwen25-untied"]
SCALING = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 8192}


def small(kv_heads=2, n_visual=32, vocab=80, seed=0, layers=2, **other) -> Llama:
    """A random model with weights so large that the logits of different prompts differ."""
    torch.manual_seed(seed)
    model = Llama(LlamaConfig(vocab, 32, 48, layers, 4, kv_heads, 8, n_visual=n_visual, **other))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3) if p.ndim == 2 else torch.nn.init.uniform_(p, 0.5, 1.5)
    return model.requires_grad_(False)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# ------------------------------------------------------------------ against transformers


@pytest.mark.parametrize("spelling", ["config.json", "config.v4.json"])
@pytest.mark.parametrize("name", PEERS)
@torch.no_grad()
def test_logits_are_those_of_transformers(tmp_path, name, spelling):
    """With the config in the spelling of transformers 5 and of transformers 4."""
    folder = shutil.copytree(FIXTURES / name, tmp_path / name)
    shutil.copyfile(FIXTURES / name / spelling, folder / "config.json")
    model, expected = Llama.load(folder), load_file(folder / "expected.safetensors")
    logits = model.logits(model(expected["ids"]))
    assert logits.dtype == torch.float32 and logits.shape == expected["logits"].shape
    assert (logits - expected["logits"]).abs().max() < 1e-4


@torch.no_grad()
def test_bf16_predicts_the_same():
    """
    Rounding the weights alone already swaps 4 of 768 argmaxes of these random models (computed in
    fp32).
    """
    agree = []
    for name in PEERS:
        expected = load_file(FIXTURES / name / "expected.safetensors")
        model = Llama.load(FIXTURES / name, torch.bfloat16)
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        logits = model.logits(model(expected["ids"]))
        assert logits.dtype == torch.float32
        agree.append((logits.argmax(-1) == expected["logits"].argmax(-1)).float().mean().item())
    assert sum(agree) / 4 >= 0.99 and min(agree) > 0.98, agree


@pytest.mark.parametrize("name, parameters", [
    ("llama-3.1-8b", 8_030_261_248), ("qwen2.5-1.5b", 1_543_714_304),
    ("qwen2.5-7b", 7_615_616_512), ("llama-2-7b", 6_738_415_616)])
def test_parameters_of_the_named_configurations(name, parameters):
    with torch.device("meta"):
        model = Llama(CONFIGS[name])
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize("change, culprit", [
    ({"rope_scaling": "llama3"}, "rope_scaling"),
    ({"rope_scaling": {}}, "rope_scaling .* factor"),
    ({"rope_scaling": SCALING | {"factor": 0}}, "rope_scaling .* factor"),
    ({"rope_scaling": SCALING | {"low_freq_factor": "1"}}, "rope_scaling .* low_freq_factor"),
    ({"rope_scaling": SCALING | {"high_freq_factor": math.nan}}, "rope_scaling"),
    ({"rms_norm_eps": True}, "rms_norm_eps"),
    ({"rope_theta": math.inf}, "rope_theta"),
    ({"rope_scaling": SCALING | {"high_freq_factor": 0.5}}, "high_freq_factor above low"),
    ({"eos_token_id": [1, -1]}, "eos_token_id .* an id below 80, a list of ids or null"),
    ({"eos_token_id": [None]}, "eos_token_id"),
    ({"eos_token_id": 80}, "eos_token_id"),
    ({"bos_token_id": 80}, "bos_token_id = 80: it must be an id below 80"),
    ({"bos_token_id": 70, "n_visual": 10}, "bos_token_id"),
    ({"n_visual": 81}, "n_visual"), ({"hidden_size": 10 ** 12}, "hidden_size"),
    ({"num_hidden_layers": 10 ** 6}, "num_hidden_layers")])
def test_bad_configurations_are_named(change, culprit):
    with pytest.raises(ValueError, match=culprit):
        dataclasses.replace(LlamaConfig(80, 32, 48, 2, 4, 2, 8), **change)


# ------------------------------------------------------------------ rotary positions


@pytest.mark.parametrize("scaling", [
    SCALING, None, SCALING | {"factor": 32.0, "original_max_position_embeddings": 64}])
def test_rope_frequencies(scaling):
    d, theta = 128, 500000.0
    expected = []
    for i in range(d // 2):
        f = theta ** (-2 * i / d)
        if scaling:
            factor, original = scaling["factor"], scaling["original_max_position_embeddings"]
            wavelength = 2 * math.pi / f
            if wavelength > original / scaling["low_freq_factor"]:
                f = f / factor
            elif wavelength >= original / scaling["high_freq_factor"]:
                s = (original / wavelength - scaling["low_freq_factor"]) / \
                    (scaling["high_freq_factor"] - scaling["low_freq_factor"])
                f = (1 - s) * f / factor + s * f
        expected.append(f)
    config = LlamaConfig(8, 128, 8, 1, 1, 1, d, rope_theta=theta, rope_scaling=scaling)
    torch.testing.assert_close(rope_frequencies(config), torch.tensor(expected), rtol=1e-5, atol=0)


# ------------------------------------------------------------------ the cache


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("chunks", [[12], [5] + [1] * 7, [4, 5, 3], [1, 6, 1, 4], [1] * 12])
@torch.no_grad()
def test_cached_decode_is_the_full_forward(kv_heads, chunks):
    model = small(kv_heads, rope_scaling=SCALING)
    ids = torch.randint(0, 80, (3, 12), generator=seeded())
    cache = Cache(model.config, 3, 20)
    parts = [model(part, cache) for part in ids.split(chunks, 1)]
    assert cache.length == 12
    torch.testing.assert_close(torch.cat(parts, 1), model(ids), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_later_tokens_do_not_reach_back():
    model, ids = small(), torch.randint(0, 80, (2, 10), generator=seeded())
    other = torch.cat([ids[:, :6], (ids[:, 6:] + 1) % 80], 1)
    assert torch.equal(model(ids)[:, :6], model(other)[:, :6])
    assert not torch.allclose(model(ids)[:, 6:], model(other)[:, 6:])


@torch.no_grad()
def test_cache_overflow():
    model = small()
    cache = Cache(model.config, 1, 4)
    model(torch.zeros(1, 3, dtype=torch.int64), cache)
    with pytest.raises(ValueError, match="5 tokens .* cache of 4"):
        model(torch.zeros(1, 2, dtype=torch.int64), cache)


@torch.no_grad()
def test_decode_at_fixed_shapes_is_the_full_forward():
    """What a CUDA graph replays, run eagerly: the position is a tensor, attention is masked."""
    model = small(kv_heads=2, rope_scaling=SCALING)
    ids = torch.randint(0, 80, (3, 12), generator=seeded())
    cache = Cache(model.config, 3, 20)
    parts = [model(ids[:, :5], cache)]
    cache.kv[:, :, :, :, 5:] = 7.0              # what a warm-up leaves behind must not be seen
    cache.position = torch.tensor([5])
    parts += [model(ids[:, i:i + 1], cache) for i in range(5, 12)]
    assert cache.position.item() == 12
    torch.testing.assert_close(torch.cat(parts, 1), model(ids), rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(),
                    reason="CUDA graphs need CUDA; the step they replay is tested above")
@torch.no_grad()
def test_cuda_graph_is_the_eager_step():
    model = small(kv_heads=2, rope_scaling=SCALING).cuda()
    ids = torch.randint(0, 80, (3, 12), generator=seeded()).cuda()
    cache = Cache(model.config, 3, 20, "cuda")
    model(ids[:, :5], cache)
    step = decode_step(model, cache, model.logits)
    parts = [step(ids[:, i:i + 1]).clone() for i in range(5, 12)]
    expected = model.logits(model(ids))[:, 5:]
    torch.testing.assert_close(torch.stack(parts, 1), expected, rtol=1e-3, atol=1e-3)


# ------------------------------------------------------------------ the policy


def support_by_hand(logits: list[float], top_k: int, top_p: float) -> list[bool]:
    """In float64: the top_k largest (ties: lower index), of these the fewest that reach top_p."""
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))[:top_k]
    weights = [math.exp(logits[i] - logits[order[0]]) for i in order]
    keep, held = set(), 0.0
    for i, w in zip(order, weights):
        if keep and held >= top_p:
            break
        keep.add(i)
        held += w / sum(weights)
    return [i in keep for i in range(len(logits))]


@pytest.mark.parametrize("top_k", [1, 2, 7, 20, 50, 1000])
@pytest.mark.parametrize("top_p", [1e-9, 0.31, 0.77, 0.96, 1.0])     # no multiple of 1 / 20: ties
def test_truncate_against_a_plain_loop(top_k, top_p):
    g = seeded(top_k)
    logits = torch.randn(150, 20, generator=g) * torch.tensor([0.5, 2.0, 6.0]).repeat(50)[:, None]
    logits[100:] = (2 * logits[100:]).round() / 2               # full of ties
    logits[140:] = 0.0                                          # nothing but ties
    expected = torch.tensor([support_by_hand(row, top_k, top_p) for row in logits.tolist()])
    support = truncate(logits, top_k, top_p)
    assert torch.equal(support, expected)
    assert support.any(-1).all() and (support.sum(-1) <= top_k).all()
    assert torch.equal(truncate(logits.view(3, 50, 20), top_k, top_p), expected.view(3, 50, 20))


def test_no_truncation_keeps_everything():
    logits = 3 * torch.randn(1000, 256, generator=seeded())
    assert truncate(logits, 256, 1.0).all()


@pytest.mark.parametrize("top_k, top_p, culprit", [
    (0, 0.95, "top_k = 0"), (-1, 0.95, "top_k = -1"), (None, 0.95, "top_k"),
    (math.nan, 0.95, "top_k"), (50, 0, "top_p = 0"), (50, 2, "top_p = 2"), (50, -0.1, "top_p"),
    (50, math.nan, "top_p = nan"), (50, math.inf, "top_p"), (50, None, "top_p")])
def test_truncations_that_mean_nothing_are_named(top_k, top_p, culprit):
    """Elsewhere top_k = 0 and -1 mean all codes. Here they would have been greedy decoding."""
    model = small()
    for use in (lambda: truncate(torch.zeros(3, 20), top_k, top_p),
                lambda: generate(model, prompts_of(model), 2, 1, top_k, top_p)):
        with pytest.raises(ValueError, match=culprit):
            use()


def test_logprobs_normalise_over_the_support():
    logits = 3 * torch.randn(50, 40, generator=seeded())
    support = truncate(logits, 12, 0.9)
    every = torch.arange(40).expand(50, 40)
    repeated = [x[:, None].repeat(1, 40, 1) for x in (logits, support)]
    logp = logprobs(repeated[0], every, repeated[1])            # (50, V)
    torch.testing.assert_close(logp.logsumexp(-1), torch.zeros(50), rtol=0, atol=1e-6)
    assert torch.equal(logp > -torch.inf, support)
    difference = (logp - logits)[support]                       # one constant per row
    row = support.nonzero()[:, 0]
    constant = torch.stack([difference[row == i][0] for i in range(50)])
    torch.testing.assert_close(difference, constant[row])


@pytest.mark.parametrize("top_k, top_p", [(40, 1.0), (12, 0.9), (2, 1.0)])
def test_frequencies_of_draw_are_the_truncated_softmax(top_k, top_p):
    n = 50_000
    logits = torch.randn(40, generator=seeded(1)).expand(n, 40)
    support = truncate(logits, top_k, top_p)
    counts = torch.bincount(draw(logits, support, seeded(2)), minlength=40).double()
    p = logits[0].double().masked_fill(~support[0], -torch.inf).softmax(-1)
    assert (counts[~support[0]] == 0).all()
    chi2, freedom = ((counts - n * p) ** 2 / (n * p))[support[0]].sum(), support[0].sum() - 1
    assert chi2 < freedom + 4 * (2 * freedom) ** 0.5            # mean + 4 standard deviations


def test_every_generator_has_its_block_of_noise():
    noise = gumbel_noise((6, 5, 4), [seeded(i) for i in range(3)])
    for i in range(3):
        assert torch.equal(noise[2 * i:2 * i + 2], gumbel_noise((2, 5, 4), seeded(i)))
    many = gumbel_noise((200_000,), seeded()).double()          # mean: Euler's constant
    assert abs(many.mean() - 0.5772157) < 4 * math.pi / 6 ** 0.5 / 200_000 ** 0.5
    assert abs(many.var() - math.pi ** 2 / 6) < 0.05


# ------------------------------------------------------------------ generate


def prompts_of(model, B=3, S=5):
    """Different prompts, text and codes mixed."""
    prompts = torch.randint(0, model.config.vocab_size, (B, S), generator=seeded(5))
    assert len({tuple(row) for row in prompts.tolist()}) == B
    return prompts


def full_logits(model, prompt, codes):
    """Logits (B, G, T, V) for every code by one forward over prompt + codes, without a cache."""
    B, G, T = codes.shape
    ids = torch.cat([prompt.repeat_interleave(G, 0), model.first_code + codes.flatten(0, 1)], 1)
    hidden = model(ids[:, :-1])[:, -T:]
    return model.visual_logits(hidden).view(B, G, T, -1)


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("kv_heads", [4, 2])
@torch.no_grad()
def test_greedy_decoding_is_the_argmax(group, kv_heads):
    model = small(kv_heads)
    prompt = prompts_of(model)
    codes, support = generate(model, prompt, 10, group, top_k=1, generator=seeded())
    assert codes.shape == (3, group, 10) and support.shape == (3, group, 10, 32)
    assert torch.equal(codes, full_logits(model, prompt, codes).argmax(-1))
    assert torch.equal(support.sum(-1), torch.ones_like(codes))
    assert not torch.equal(codes[0], codes[1])                  # the prompt matters


def test_one_prefill_serves_the_group():
    model, shapes = small(), []
    model.register_forward_hook(lambda module, args, output: shapes.append(tuple(args[0].shape)))
    generate(model, prompts_of(model), 4, group=6, generator=seeded())
    assert shapes == [(3, 5)] + 3 * [(18, 1)]


@pytest.mark.parametrize("prompt, T, group", [
    ((1, 0), 3, 1), ((0, 2), 3, 1), ((1, 2), 0, 1), ((1, 2), 3, 0)])
def test_nothing_to_generate(prompt, T, group):
    with pytest.raises(ValueError, match="at least one"):
        generate(small(), torch.zeros(prompt, dtype=torch.int64), max_new_tokens=T, group=group)


@pytest.mark.parametrize("i", [-1, 80])
def test_prompts_outside_the_vocabulary_are_named(i):
    with pytest.raises(ValueError, match="outside the vocabulary of 80"):
        generate(small(), torch.tensor([[1, i]]), 3)


@pytest.mark.parametrize("group", [1, 8])
@torch.no_grad()
def test_greedy_decoding_of_a_whole_clip(group):
    """The paper's sequence: BOS, 3 frames of 16 codes given and 29 generated, 513 tokens."""
    model = small(n_visual=256, vocab=257)
    prompt = torch.randint(1, 257, (3, 49), generator=seeded(9))
    prompt[:, 0] = 0
    codes, _ = generate(model, prompt, 464, group, top_k=1)
    logits = full_logits(model, prompt, codes)
    sure = logits.topk(2, -1).values.diff(dim=-1).abs()[..., 0] > 1e-4
    assert sure.float().mean() > 0.999 and torch.equal(codes[sure], logits.argmax(-1)[sure])
    assert len(codes[:, 0].unique()) > 20 and not torch.equal(codes[0], codes[1])


@torch.no_grad()
def test_longer_than_the_context():
    model = small(max_position_embeddings=12)
    generate(model, prompts_of(model), 7)
    with pytest.raises(ValueError, match="5 [+] 8 new .* 12"):
        generate(model, prompts_of(model), 8)


@pytest.mark.parametrize("top_k, top_p", [(50, 0.95), (10, 0.95), (32, 1.0)])
@torch.no_grad()
def test_sampler_and_scorer_are_one_policy(monkeypatch, top_k, top_p):
    """What the sampler drew from, recorded, is what a forward over the whole sequence scores."""
    model, used = small(), []

    def recording(logits, support, noise):
        used.append(logits.masked_fill(~support, -torch.inf).softmax(-1))
        return choose(logits, support, noise)
    monkeypatch.setattr(lm, "choose", recording)
    prompt = prompts_of(model)
    codes, support = generate(model, prompt, 24, 4, top_k, top_p, seeded())
    p = torch.stack(used, 1).view(3, 4, 24, 32).gather(-1, codes[..., None])[..., 0]
    logits = full_logits(model, prompt, codes)
    assert (logprobs(logits, codes, support) - p.log()).abs().max() < 1e-4
    agree = truncate(logits, top_k, top_p) == support
    assert agree.float().mean() > 0.9999                        # rounding at the edge
    assert support.gather(-1, codes[..., None]).all()
    assert codes.min() >= 0 and codes.max() < 32 and len(codes.unique()) > 16
    assert len({tuple(row) for row in codes[0].tolist()}) == 4  # four samples, not one four times


@torch.no_grad()
def test_frequencies_of_generate_are_the_policy():
    """The three tokens of 40,000 samples against the product of their truncated softmaxes."""
    model, n = small(n_visual=4, vocab=10), 40_000
    model.lm_head.weight.mul_(0.4)                              # no sequence is rare
    prompt = torch.tensor([[1, 7, 3]])
    codes, _ = generate(model, prompt, 3, n, top_k=3, top_p=0.8, generator=seeded(1))
    index = torch.tensor([16, 4, 1])
    counts = torch.bincount((codes[0] * index).sum(-1), minlength=64).double()
    every = torch.cartesian_prod(*[torch.arange(4)] * 3)        # (64, 3)
    logits = full_logits(model, prompt, every[None])
    logp = logprobs(logits, every[None], truncate(logits, 3, 0.8))[0].double()
    p = logp.sum(-1).exp()                                      # (64,)
    assert abs(p.sum() - 1) < 1e-5 and (counts[p == 0] == 0).all() and 5 < (p > 0).sum() < 27
    expected = n * p[p > 0]
    chi2, freedom = ((counts[p > 0] - expected) ** 2 / expected).sum(), len(expected) - 1
    assert chi2 < freedom + 4 * (2 * freedom) ** 0.5            # mean + 4 standard deviations


class OnCuda(torch.Tensor):
    """A tensor of the CPU that `capture` takes for one on a GPU."""
    is_cuda = True


@pytest.mark.parametrize("top_k", [1, 20])
@torch.no_grad()
def test_what_a_graph_replays_samples_the_same(monkeypatch, top_k):
    """
    `capture` with stand-ins for torch.cuda's functions: replaying is calling the step, at fixed
    shapes, after the warm-up and the capture have run it and have been undone.
    """
    model = small(rope_scaling=SCALING)
    prompt, steps = prompts_of(model), []
    expected = generate(model, prompt, 12, 2, top_k, generator=[seeded(i) for i in range(3)])

    def on_cuda(step, cache, *state):
        def counted():
            steps.append(cache.position.item())
            step()
        graph = SimpleNamespace(replay=counted)
        stream = SimpleNamespace(wait_stream=lambda other: None)
        for name in ("device", "stream", "graph"):
            monkeypatch.setattr(torch.cuda, name, lambda x: contextlib.nullcontext())
        for name in ("Stream", "current_stream"):
            monkeypatch.setattr(torch.cuda, name, lambda: stream)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
        cache.kv = cache.kv.as_subclass(OnCuda)
        return capture(counted, cache, *state)
    monkeypatch.setattr(lm, "capture", on_cuda)
    codes, support = generate(model, prompt, 12, 2, top_k, generator=[seeded(i) for i in range(3)])
    assert torch.equal(codes, expected[0]) and torch.equal(support, expected[1])
    assert steps == [5, 6, *range(5, 16)]                       # warm-up, capture, 11 replays


@torch.no_grad()
def test_compiled_steps_sample_the_same(monkeypatch):
    """
    All layers share one compiled block, at fixed shapes as in a graph. The backend is no compiler:
    it runs the traced operations one by one.
    """
    import torch._dynamo.testing                                # takes seconds
    model = small(layers=5)
    prompt = prompts_of(model)
    expected = generate(model, prompt, 12, 2, 20, generator=seeded())

    def at_fixed_shapes(step, cache, *state):
        cache.position = torch.tensor([cache.length])
        return step
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    monkeypatch.setattr(lm, "capture", at_fixed_shapes)
    monkeypatch.setattr(lm, "compiled", functools.cache(lm.compiled.__wrapped__))
    model.compile_decoding = True
    codes, support = generate(model, prompt, 12, 2, 20, generator=seeded())
    assert torch.equal(codes, expected[0]) and torch.equal(support, expected[1])
    assert counter.frame_count == 2                             # a block, and sampling


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA; with stand-ins above")
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("top_k", [1, 20])
@torch.no_grad()
def test_generate_on_cuda_is_the_policy(compile, top_k):
    device = torch.device("cuda")
    if compile and not train.can_compile(device, False):
        pytest.skip("torch.compile needs Triton and a C compiler")
    model, prompt = small(rope_scaling=SCALING).to(device), prompts_of(small()).to(device)
    model.compile_decoding = compile
    generators = [torch.Generator(device).manual_seed(i) for i in range(3)]
    codes, support = generate(model, prompt, 24, 4, top_k, generator=generators)
    agree = truncate(full_logits(model, prompt, codes), top_k) == support
    assert agree.float().mean() > 0.999 and support.gather(-1, codes[..., None]).all()
    generators = [torch.Generator(device).manual_seed(1)]
    alone, _ = generate(model, prompt[1:2], 24, 4, top_k, generator=generators)
    assert (alone[0] == codes[1]).float().mean() > 0.9          # products of other sizes round


@torch.no_grad()
def test_text_words_play_no_role():
    model = small()
    prompt = torch.randint(48, 80, (2, 5), generator=seeded())
    codes, support = generate(model, prompt, 20, 2, generator=seeded())
    model.lm_head.weight[:model.first_code] = 1e4
    again, support_again = generate(model, prompt, 20, 2, generator=seeded())
    full = model.logits(model(prompt))
    assert (full.argmax(-1) < model.first_code).any()           # the full head predicts words
    assert torch.equal(codes, again) and torch.equal(support, support_again)


@torch.no_grad()
def test_generate_is_a_function_of_its_generator():
    model = small()
    prompt = prompts_of(model)
    first, again, other = [generate(model, prompt, 16, 2, generator=seeded(i))[0]
                           for i in (1, 1, 2)]
    assert torch.equal(first, again) and not torch.equal(first, other)


@torch.no_grad()
def test_one_generator_per_prompt():
    model = small()
    prompt = prompts_of(model)
    codes, _ = generate(model, prompt, 8, 2, generator=[seeded(i) for i in range(3)])
    alone, _ = generate(model, prompt[1:2], 8, 2, generator=[seeded(1)])
    assert torch.equal(codes[1:2], alone)
    for n in (0, 1, 2, 6):
        with pytest.raises(ValueError, match=f"{n} generators for 3 prompts"):
            generate(model, prompt, 8, 2, generator=[seeded(i) for i in range(n)])


@pytest.mark.parametrize("T", [1, 2, 5])
def test_the_cache_is_no_longer_than_needed(monkeypatch, T):
    """The last code is not given to the model: the cache ends full, or full from the start."""
    model, caches = small(), []

    def recording(step, cache, *state):
        caches.append(cache)
        return capture(step, cache, *state)
    monkeypatch.setattr(lm, "capture", recording)
    codes, _ = generate(model, prompts_of(model), T, 2, generator=seeded())
    assert codes.shape == (3, 2, T)
    assert caches[0].length == caches[0].capacity == 5 + T - 1 and caches[0].batch == 6


def test_generate_without_visual_codes():
    with pytest.raises(ValueError, match="n_visual"):
        generate(small(n_visual=0), torch.zeros(1, 2, dtype=torch.int64), 3)


# ------------------------------------------------------------------ more visual codes


def test_extending_twice_is_refused():
    model = small(n_visual=0, vocab=48)
    model.extend(32)
    with pytest.raises(ValueError, match="32 visual codes there already"):
        model.extend(32)
    with pytest.raises(ValueError, match="by 0 visual codes"):
        small(n_visual=0, vocab=48).extend(0)
    embedding, head = model.model.embed_tokens.weight[48:], model.lm_head.weight[48:]
    both = torch.stack([embedding.flatten(), head.flatten()])
    assert abs(torch.corrcoef(both)[0, 1]) < 0.2                # drawn apart


def test_new_rows_have_mean_and_spread_of_the_old():
    model = small(n_visual=0, vocab=4000)
    weight = model.model.embed_tokens.weight
    weight.copy_(torch.randn(4000, 32) * torch.linspace(0.1, 3, 32) + torch.linspace(-1, 1, 32))
    model.extend(4000)
    old, new = model.model.embed_tokens.weight.split(4000)
    assert torch.equal(old, weight)
    torch.testing.assert_close(new.mean(0), old.mean(0), rtol=0, atol=0.15)
    torch.testing.assert_close(new.std(0), old.std(0), rtol=0.07, atol=0)
