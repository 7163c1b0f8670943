"""
The language model: logits against transformers', the cache, sampling and scoring, weights in and
out.

    pytest tests/test_lm.py

fixtures/{llama31,llama2,qwen25-tied,qwen25-untied} are small random models that transformers wrote,
with their logits and greedy continuations.
"""
import json
import math
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lm
from lm import (CONFIGS, Cache, Llama, LlamaConfig, decode_step, draw, generate, logprobs,
                read_config, rope_frequencies, truncate)

FIXTURES = Path(__file__).parent / "fixtures"
FIXTURE = FIXTURES / "llama31"
PEERS = ["llama31", "llama2", "qwen25-tied", "qwen25-untied"]
SCALING = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 8192}


def small(kv_heads=2, n_visual=32, vocab=80, seed=0, **other) -> Llama:
    """A random model with weights so large that the logits of different prompts differ."""
    torch.manual_seed(seed)
    model = Llama(LlamaConfig(vocab, 32, 48, 2, 4, kv_heads, 8, n_visual=n_visual, **other))
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
    assert lm.config_from_json(lm.config_to_json(CONFIGS[name])) == CONFIGS[name]


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
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))[:max(top_k, 1)]
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

    def recording(logits, support, generator=None):
        used.append(logits.masked_fill(~support, -torch.inf).softmax(-1))
        return draw(logits, support, generator)
    monkeypatch.setattr(lm, "draw", recording)
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


def test_generate_without_visual_codes():
    with pytest.raises(ValueError, match="n_visual"):
        generate(small(n_visual=0), torch.zeros(1, 2, dtype=torch.int64), 3)


# ------------------------------------------------------------------ weights in and out


def same_weights(a: Llama, b: Llama) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("other", [{}, {"tie_word_embeddings": True}, {"attention_bias": True},
                                   {"rope_scaling": SCALING}])
@torch.no_grad()
def test_save_and_load(tmp_path, other):
    model = small(eos_token_id=7, **other)
    folder = tmp_path / "a" / "b"
    model.save(folder)
    loaded = Llama.load(folder, n_visual=32)                    # has its codes already: no more
    assert loaded.config == read_config(folder) == model.config and loaded.first_code == 48
    assert same_weights(model, loaded)
    ids = prompts_of(model)
    assert torch.equal(loaded.logits(loaded(ids)), model.logits(model(ids)))
    assert sorted(p.name for p in folder.iterdir()) == \
        ["config.json", "generation_config.json", "model.safetensors"]
    half = Llama.load(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    with pytest.raises(ValueError, match="32 visual codes"):
        Llama.load(folder, n_visual=16)


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_file_modes_follow_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        small().save(tmp_path / "m")
        assert os.umask(umask) == umask                         # and saving leaves it as it was
    finally:
        os.umask(before)
    for path in (tmp_path / "m").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask


@torch.no_grad()
def test_extension(tmp_path):
    old, new = Llama.load(FIXTURE), Llama.load(FIXTURE, n_visual=256)
    ids = load_file(FIXTURE / "expected.safetensors")["ids"]
    assert new.config.vocab_size == 320 + 256
    assert new.config.n_visual == 256 and new.first_code == 320
    assert new.head.shape == (576, 64) and new.model.embed_tokens.weight.shape == (576, 64)
    before, after = old.logits(old(ids)), new.logits(new(ids))
    torch.testing.assert_close(after[..., :320], before, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(new.visual_logits(new(ids)), after[..., 320:])
    prompt = torch.cat([ids[:, :4], torch.tensor([[320], [575]])], 1)
    codes, _ = generate(new, prompt, 8, generator=seeded())
    assert codes.max() < 256
    for rows in (new.head[320:], new.model.embed_tokens.weight[320:]):      # of usual size
        assert len(rows.unique(dim=0)) == 256 and 0.5 < rows.std() / old.head.std() < 2
    new.save(tmp_path)
    again = Llama.load(tmp_path, n_visual=256)
    assert again.config == new.config and torch.equal(again.head, new.head)


@torch.no_grad()
def test_extension_of_tied_embeddings(tmp_path):
    small(n_visual=0, vocab=48, tie_word_embeddings=True).save(tmp_path)
    model = Llama.load(tmp_path, n_visual=32)
    assert not hasattr(model, "lm_head") and model.head.shape == (80, 32)
    assert model.head is model.model.embed_tokens.weight
    assert generate(model, prompts_of(model), 4, generator=seeded())[0].shape == (3, 1, 4)


def edited(tmp_path, config=None, tensors=None):
    """A saved model with its config or its tensors changed."""
    small().save(tmp_path)
    if config:
        raw = json.loads((tmp_path / "config.json").read_text())
        config(raw)
        (tmp_path / "config.json").write_text(json.dumps(raw))
    if tensors:
        all_of_them = load_file(tmp_path / "model.safetensors")
        tensors(all_of_them)
        save_file(all_of_them, tmp_path / "model.safetensors")
    return tmp_path


NORM, DOWN = "model.norm.weight", "model.layers.1.mlp.down_proj.weight"
EXTRA = "model.layers.7.mlp.down_proj.weight"
INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize("change, culprit", [
    (lambda t: t.pop(NORM), NORM),
    (lambda t: t.update({EXTRA: t[DOWN].clone()}), EXTRA),
    (lambda t: t.update({DOWN: t[DOWN].T.contiguous()}), DOWN),
    (lambda t: t[DOWN].view(-1)[5:6].fill_(math.nan), DOWN),
    (lambda t: t[NORM][:1].fill_(math.inf), NORM),
    (lambda t: t.update({NORM: t[NORM].to(torch.int8)}), NORM),
    (lambda t: t.update({NORM: t[NORM].double()}), NORM)],
    ids=["missing", "extra", "shape", "nan", "inf", "int8", "float64"])
def test_bad_tensors_are_named(tmp_path, change, culprit):
    with pytest.raises(ValueError) as error:
        Llama.load(edited(tmp_path, tensors=change))
    assert culprit in str(error.value) and str(tmp_path) in str(error.value)


@pytest.mark.parametrize("change, culprit", [
    (lambda raw: raw.update(model_type="mamba"), "mamba"),
    (lambda raw: raw.pop("model_type"), "model_type"),
    (lambda raw: [raw.pop(k) for k in ("rope_parameters", "rope_theta", "rope_scaling")],
     "rope_theta"),
    (lambda raw: raw["rope_parameters"].update(rope_type="yarn"), "yarn"),
    (lambda raw: raw.pop("hidden_size"), "hidden_size"),
    (lambda raw: raw.update(hidden_size="32"), "hidden_size"),
    (lambda raw: raw.update(hidden_size=32.0), "hidden_size"),
    (lambda raw: raw.update(num_hidden_layers=None), "num_hidden_layers"),
    (lambda raw: raw.update(num_attention_heads=0, head_dim=None), ""),
    (lambda raw: raw.update(num_key_value_heads=3), "4 heads on 3"),
    (lambda raw: raw.update(head_dim=7), "head_dim"),
    (lambda raw: raw.update(rms_norm_eps=None), "rms_norm_eps"),
    (lambda raw: raw.update(eos_token_id="</s>"), "eos_token_id"),
    (lambda raw: raw.update(bos_token_id=-1), "bos_token_id"),
    (lambda raw: raw["rope_parameters"].update(rope_theta="1e4"), "rope_theta"),
    (lambda raw: raw.update(rope_parameters=[1]), "rope_parameters"),
    (lambda raw: raw["rope_parameters"].update(rope_type="llama3"), "rope_scaling"),
    (lambda raw: raw.update(n_visual=1000), "n_visual"),
    (lambda raw: raw.update(tie_word_embeddings="false"), "tie_word"),
    (lambda raw: raw.update(quantization_config={"bits": 4}), "quantized"),
    (lambda raw: raw.update(hidden_act="gelu"), "hidden_act"),
    (lambda raw: raw.update(attention_bias=True), "attention_bias"),
    (lambda raw: raw.update(mlp_bias=True), "mlp_bias")])
def test_bad_configs_are_named(tmp_path, change, culprit):
    with pytest.raises(ValueError, match=f"config.json.*{culprit}"):
        Llama.load(edited(tmp_path, config=change))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: os.truncate(path, 50)],
                         ids=["missing", "cut"])
def test_bad_files_are_named(tmp_path, name, damage):
    damage(edited(tmp_path) / name)
    with pytest.raises(ValueError, match=name):
        Llama.load(tmp_path)


@pytest.mark.parametrize("damage, culprit", [
    (lambda m: m.pop(NORM), NORM),
    (lambda m: m.update({NORM: "model-00001-of-00006.safetensors"}), "model-00001-of-00006"),
    (lambda m: m.update({NORM: "model-00009-of-00006.safetensors"}), "model-00009-of-00006"),
    (lambda m: m.update({"model.extra": m[NORM]}), "model-00005-of-00006.safetensors"),
    (lambda m: m.update({NORM: "../model.safetensors"}), "../model.safetensors"),
    (lambda m: m.update({NORM: "/etc/hosts"}), "/etc/hosts"),
    (lambda m: m.update({NORM: "sub/model.safetensors"}), "sub/model.safetensors")],
    ids=["not listed", "other shard", "no such shard", "listed, nowhere", "above", "absolute",
         "below"])
def test_bad_shards_are_named(tmp_path, damage, culprit):
    folder = shutil.copytree(FIXTURE, tmp_path / "m")
    index = json.loads((folder / INDEX).read_text())
    damage(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError) as error:
        Llama.load(folder)
    assert culprit in str(error.value)


@pytest.mark.parametrize("text", ["{", "{}"], ids=["cut", "no weight_map"])
def test_bad_indices_are_named(tmp_path, text):
    folder = shutil.copytree(FIXTURE, tmp_path / "m")
    (folder / INDEX).write_text(text)
    with pytest.raises(ValueError, match=INDEX):
        Llama.load(folder)


def sharded(folder: Path, model: Llama) -> None:
    """A model in two shards with their index, as transformers writes large ones."""
    model.save(folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = {name: files[i % 2] for i, name in enumerate(tensors)}
    for file in files:
        save_file({name: tensors[name] for name in tensors if index[name] == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"weight_map": index}))


@pytest.mark.parametrize("before", [Llama.save, lambda model, folder: sharded(folder, model)],
                         ids=["one file", "shards"])
def test_a_save_broken_off_is_no_mixture(tmp_path, monkeypatch, before):
    """Stopped at each of its renames in turn: the folder holds the old model or the new one."""
    old, new, last = small(seed=1), small(seed=2), small(seed=3)
    seen = set()
    for stop in range(20):
        folder = tmp_path / str(stop)
        before(old, folder)
        calls, replace = [], os.replace

        def stopping(a, b):
            calls.append(b)
            if len(calls) > stop:
                raise KeyboardInterrupt
            replace(a, b)
        with monkeypatch.context() as m:
            m.setattr(os, "replace", stopping)
            try:
                new.save(folder)
            except KeyboardInterrupt:
                pass
        loaded = Llama.load(folder)
        is_old, is_new = same_weights(loaded, old), same_weights(loaded, new)
        assert is_old != is_new
        seen.add("old" if is_old else "new")
        last.save(folder)                                       # nothing of it comes back later
        assert same_weights(Llama.load(folder), last)
        assert sorted(p.name for p in folder.iterdir()) == \
            ["config.json", "generation_config.json", "model.safetensors"]
        if len(calls) <= stop:
            break
    assert seen == {"old", "new"}, seen


def test_saving_leaves_other_files_alone(tmp_path):
    names = ("model_best.safetensors", "notes.txt.part", "log.jsonl")
    for name in names:
        (tmp_path / name).write_text("mine")
    small().save(tmp_path)
    small().save(tmp_path)
    assert all((tmp_path / name).read_text() == "mine" for name in names)


def test_extending_twice_is_refused():
    model = small(n_visual=0, vocab=48)
    model.extend(32)
    with pytest.raises(ValueError, match="32 visual codes there already"):
        model.extend(32)
    embedding, head = model.model.embed_tokens.weight[48:], model.lm_head.weight[48:]
    both = torch.stack([embedding.flatten(), head.flatten()])
    assert abs(torch.corrcoef(both)[0, 1]) < 0.2                # drawn apart


@pytest.mark.parametrize("name", PEERS)
@torch.no_grad()
def test_extended_saved_and_opened_again(tmp_path, name):
    """Every bit the same, config in both of transformers' spellings, tied where it was tied."""
    model = Llama.load(FIXTURES / name, n_visual=256)
    model.save(tmp_path)
    again = Llama.load(tmp_path, n_visual=256)
    assert same_weights(again, model)
    ids = load_file(FIXTURES / name / "expected.safetensors")["ids"]
    assert torch.equal(again.logits(again(ids)), model.logits(model(ids)))
    assert hasattr(again, "lm_head") == (name != "qwen25-tied")
    raw = json.loads((tmp_path / "config.json").read_text())
    old = json.loads((FIXTURES / name / "config.json").read_text())
    v4 = json.loads((FIXTURES / name / "config.v4.json").read_text())
    assert raw["vocab_size"] == 576 and raw["dtype"] == raw["torch_dtype"] == "float32"
    same = ("architectures", "model_type", "hidden_size", "intermediate_size", "num_hidden_layers",
            "num_attention_heads", "num_key_value_heads", "rms_norm_eps", "tie_word_embeddings",
            "hidden_act", "bos_token_id", "eos_token_id", "max_position_embeddings")
    assert {k: raw[k] for k in same} == {k: old[k] for k in same}
    assert raw["rope_parameters"] == old["rope_parameters"]
    assert raw["rope_theta"] == v4["rope_theta"]
    assert bool(raw["rope_scaling"]) == bool(v4["rope_scaling"])
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == 2


def test_new_rows_have_mean_and_spread_of_the_old(tmp_path):
    model = small(n_visual=0, vocab=4000)
    weight = model.model.embed_tokens.weight
    weight.copy_(torch.randn(4000, 32) * torch.linspace(0.1, 3, 32) + torch.linspace(-1, 1, 32))
    model.extend(4000)
    old, new = model.model.embed_tokens.weight.split(4000)
    assert torch.equal(old, weight)
    torch.testing.assert_close(new.mean(0), old.mean(0), rtol=0, atol=0.15)
    torch.testing.assert_close(new.std(0), old.std(0), rtol=0.07, atol=0)


def test_loading_holds_no_second_copy(tmp_path):
    """Anonymous memory while a model is opened grows by the model and one tensor, no second one."""
    with torch.device("meta"):
        model = Llama(LlamaConfig(2048, 512, 2048, 10, 4, 4, 128)).bfloat16()
    model = model.to_empty(device="cpu").requires_grad_(False)
    for p in model.parameters():
        p.zero_()
    size = sum(p.nbytes for p in model.parameters())
    model.save(tmp_path)
    code = """
import re, sys, threading, time
sys.path.insert(0, sys.argv[1])
import torch
from lm import Llama
held = lambda: int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
most, done = [0], []
def watch():
    while not done:
        most[0] = max(most[0], held())
        time.sleep(0.001)
Llama.load(sys.argv[3])                         # allocates what every later call needs, too
before, thread = held(), threading.Thread(target=watch)
thread.start()
model = Llama.load(sys.argv[2])
done.append(1)
thread.join()
print(most[0] - before)
"""
    command = [sys.executable, "-c", code, Path(lm.__file__).parent, tmp_path, FIXTURE]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert size > 80e6 and 0.9 * size < int(done.stdout) < 1.15 * size, (size, done.stdout)


# ------------------------------------------------------------------ Meta's layout

META_NAMES = {
    "self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv", "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3", "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm", "model.embed_tokens": "tok_embeddings",
    "model.norm": "norm", "lm_head": "output"}


def to_meta(folder: Path, model: Llama, **params) -> Path:
    """A model in Meta's layout: rows 2i, 2i + 1 of a head of q or k are our rows i, i + d/2."""
    c, weights = model.config, {"rope.freqs": torch.zeros(3)}
    for name, value in model.state_dict().items():
        if "q_proj" in name or "k_proj" in name:
            d, rows = c.head_dim, []
            for head in range(len(value) // d):
                for i in range(d // 2):
                    rows += [value[head * d + i], value[head * d + i + d // 2]]
            value = torch.stack(rows)
        for ours, theirs in META_NAMES.items():
            name = name.replace(ours, theirs)
        weights[name.removeprefix("model.")] = value
    folder.mkdir()
    torch.save(weights, folder / "consolidated.00.pth")
    params = {"dim": c.hidden_size, "n_layers": c.num_hidden_layers,
              "n_heads": c.num_attention_heads, "n_kv_heads": c.num_key_value_heads,
              "multiple_of": 8, "ffn_dim_multiplier": 0.85, "norm_eps": c.rms_norm_eps,
              "rope_theta": c.rope_theta, "vocab_size": -1} | params
    (folder / "params.json").write_text(json.dumps(params))
    return folder


@pytest.mark.parametrize("name, scaled", [("llama31", True), ("llama2", False)])
@torch.no_grad()
def test_metas_layout(tmp_path, name, scaled):
    """The same weights in either layout, the same logits. Meta's rope scaling is for 8192."""
    folder = shutil.copytree(FIXTURES / name, tmp_path / "hf")
    raw = json.loads((folder / "config.json").read_text())
    if scaled:
        raw["rope_parameters"]["original_max_position_embeddings"] = 8192
    (folder / "config.json").write_text(json.dumps(raw))
    model = Llama.load(folder)
    loaded = Llama.load(to_meta(tmp_path / "meta", model, use_scaled_rope=scaled))
    assert loaded.config.intermediate_size == model.config.intermediate_size == 144
    assert loaded.config.rope_scaling == model.config.rope_scaling
    ids = load_file(FIXTURES / name / "expected.safetensors")["ids"]
    assert torch.equal(loaded.logits(loaded(ids)), model.logits(model(ids)))
    if not scaled:
        expected = load_file(FIXTURES / name / "expected.safetensors")["logits"]
        assert (loaded.logits(loaded(ids)) - expected).abs().max() < 1e-4
    extended = Llama.load(tmp_path / "meta", torch.bfloat16, n_visual=256)
    extended.save(tmp_path / "saved")
    assert Llama.load(tmp_path / "saved").config == extended.config


@pytest.mark.parametrize("name", ["llama-3.1-8b", "llama-2-7b"])
def test_params_json_of_the_real_ones(name):
    ours = CONFIGS[name]
    raw = {"dim": 4096, "n_layers": 32, "n_heads": 32, "norm_eps": 1e-5, "vocab_size": -1,
           "multiple_of": 256}
    if name == "llama-3.1-8b":
        raw |= {"n_kv_heads": 8, "multiple_of": 1024, "ffn_dim_multiplier": 1.3,
                "rope_theta": 500000.0, "use_scaled_rope": True, "vocab_size": 128256}
    assert lm.config_from_meta(raw, ours.vocab_size) == ours


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def one_layer_more(folder: Path) -> None:
    path = folder / "params.json"
    path.write_text(path.read_text().replace('"n_layers": 2', '"n_layers": 3'))


@pytest.mark.parametrize("damage, culprit", [
    (lambda f: torch.save({"tok_embeddings.weight": Bomb()}, f / "consolidated.00.pth"),
     "consolidated.00.pth"),
    (lambda f: os.truncate(f / "consolidated.00.pth", 3000), "consolidated.00.pth"),
    (lambda f: (f / "consolidated.00.pth").write_bytes(b"no weights"), "consolidated.00.pth"),
    (lambda f: (f / "consolidated.00.pth").unlink(), "consolidated.00.pth"),
    (lambda f: torch.save([torch.zeros(2)], f / "consolidated.00.pth"), "consolidated.00.pth"),
    (lambda f: torch.save({"a.weight": torch.zeros(2)}, f / "consolidated.00.pth"),
     "tok_embeddings"),
    (lambda f: shutil.copy(f / "consolidated.00.pth", f / "consolidated.01.pth"), "2 GPUs"),
    (lambda f: (f / "params.json").write_text("{"), "params.json"),
    (lambda f: (f / "params.json").write_text('{"dim": 64}'), "params.json"),
    (one_layer_more, "model.layers.2")],
    ids=["bomb", "cut", "garbage", "missing", "list", "other", "several", "json", "keys",
         "layers"])
def test_bad_meta_folders_are_named(tmp_path, monkeypatch, damage, culprit):
    monkeypatch.chdir(tmp_path)
    folder = to_meta(tmp_path / "meta", Llama.load(FIXTURES / "llama2"))
    damage(folder)
    with pytest.raises(ValueError, match=culprit):
        Llama.load(folder)
    assert not (tmp_path / "exploded").exists()


def test_empty_folder(tmp_path):
    with pytest.raises(ValueError, match="config.json"):
        Llama.load(tmp_path)
