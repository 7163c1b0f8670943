"""
The language model: logits against transformers', the cache, sampling and scoring, weights in and out.

    pytest tests/test_lm.py

fixtures/llama31 is a small random Llama 3.1 that transformers wrote, with its logits and greedy continuation.
"""
import json
import math
import os
import shutil
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lm
from lm import Cache, Llama, LlamaConfig, draw, generate, logprobs, rope_frequencies, truncate

FIXTURE = Path(__file__).parent / "fixtures" / "llama31"
SCALING = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 8192}


def small(kv_heads=2, n_visual=32, vocab=80, seed=0, **other) -> Llama:
    """A random model whose weights are large enough for the logits of different prompts to differ."""
    torch.manual_seed(seed)
    model = Llama(LlamaConfig(vocab, 32, 48, 2, 4, kv_heads, 8, n_visual=n_visual, **other))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3) if p.ndim == 2 else torch.nn.init.uniform_(p, 0.5, 1.5)
    return model.requires_grad_(False)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# ------------------------------------------------------------------ against transformers


@pytest.fixture(params=["config.json", "config.v4.json"])
def llama31(request, tmp_path):
    """The fixture with either spelling of its config."""
    folder = shutil.copytree(FIXTURE, tmp_path / "llama31")
    shutil.copyfile(FIXTURE / request.param, folder / "config.json")
    return Llama.load(folder)


def test_logits_are_those_of_transformers(llama31):
    expected = load_file(FIXTURE / "expected.safetensors")
    with torch.no_grad():
        logits = llama31.logits(llama31(expected["ids"]))
    assert logits.dtype == torch.float32 and logits.shape == expected["logits"].shape
    assert (logits - expected["logits"]).abs().max() < 1e-4


@torch.no_grad()
def test_greedy_continuation_is_that_of_transformers(llama31):
    expected = load_file(FIXTURE / "expected.safetensors")["greedy"]
    ids, cache = expected[:, :24], Cache(llama31.config, len(expected), expected.shape[1])
    hidden = llama31(ids, cache)
    while ids.shape[1] < expected.shape[1]:
        new = llama31.logits(hidden[:, -1:]).argmax(-1)
        ids, hidden = torch.cat([ids, new], 1), llama31(new, cache)
    assert torch.equal(ids, expected)


# ------------------------------------------------------------------ rotary positions


@pytest.mark.parametrize("scaling", [SCALING, None,
                                     SCALING | {"factor": 32.0, "original_max_position_embeddings": 64}])
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


# ------------------------------------------------------------------ support, log-probability, drawing


def support_by_hand(logits: list[float], top_k: int, top_p: float) -> list[bool]:
    """In float64: the top_k largest (ties: lower index), of these the fewest whose share reaches top_p."""
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
    logits[100:] = (2 * logits[100:]).round() / 2                                 # full of ties
    logits[140:] = 0.0                                                            # nothing but ties
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
    logp = logprobs(logits[:, None].repeat(1, 40, 1), every, support[:, None].repeat(1, 40, 1))   # (50, V)
    torch.testing.assert_close(logp.logsumexp(-1), torch.zeros(50), rtol=0, atol=1e-6)
    assert torch.equal(logp > -torch.inf, support)
    difference = (logp - logits)[support]                                         # one constant per row
    rows = support.nonzero()[:, 0]
    torch.testing.assert_close(difference, torch.stack([difference[rows == i][0] for i in range(50)])[rows])


@pytest.mark.parametrize("top_k, top_p", [(40, 1.0), (12, 0.9), (2, 1.0)])
def test_frequencies_of_draw_are_the_truncated_softmax(top_k, top_p):
    n = 50_000
    logits = torch.randn(40, generator=seeded(1)).expand(n, 40)
    support = truncate(logits, top_k, top_p)
    counts = torch.bincount(draw(logits, support, seeded(2)), minlength=40).double()
    p = logits[0].double().masked_fill(~support[0], -torch.inf).softmax(-1)
    assert (counts[~support[0]] == 0).all()
    chi2, freedom = ((counts - n * p) ** 2 / (n * p))[support[0]].sum(), support[0].sum() - 1
    assert chi2 < freedom + 4 * (2 * freedom) ** 0.5             # mean + 4 standard deviations


# ------------------------------------------------------------------ generate


def prompts_of(model, B=3, S=5):
    """Different prompts, text and codes mixed."""
    prompts = torch.randint(0, model.config.vocab_size, (B, S), generator=seeded(5))
    assert len({tuple(row) for row in prompts.tolist()}) == B
    return prompts


def full_logits(model, prompt, codes):
    """Logits (B, G, n, V) for every code by one forward over prompt + codes, without a cache."""
    B, G, n = codes.shape
    ids = torch.cat([prompt.repeat_interleave(G, 0), model.first_code + codes.flatten(0, 1)], 1)
    hidden = model(ids[:, :-1])[:, -n:]
    return model.visual_logits(hidden).view(B, G, n, -1)


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("kv_heads", [4, 2])
@torch.no_grad()
def test_generate_at_temperature_zero_is_the_argmax(group, kv_heads):
    model = small(kv_heads)
    prompt = prompts_of(model)
    codes, support = generate(model, prompt, 10, group, top_k=1, generator=seeded())
    assert codes.shape == (3, group, 10) and support.shape == (3, group, 10, 32)
    assert torch.equal(codes, full_logits(model, prompt, codes).argmax(-1))
    assert torch.equal(support.sum(-1), torch.ones_like(codes))
    assert not torch.equal(codes[0], codes[1])                   # it is not the same whatever the prompt


@pytest.mark.parametrize("top_k, top_p", [(50, 0.95), (10, 0.95), (32, 1.0)])
@torch.no_grad()
def test_sampler_and_scorer_are_one_policy(monkeypatch, top_k, top_p):
    """What the sampler drew from, recorded in the act, is what a forward over the whole sequence scores."""
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
    assert (truncate(logits, top_k, top_p) == support).float().mean() > 0.9999    # rounding at the edge
    assert support.gather(-1, codes[..., None]).all()
    assert codes.min() >= 0 and codes.max() < 32 and len(codes.unique()) > 16
    assert len({tuple(row) for row in codes[0].tolist()}) == 4   # four samples, not one four times


@torch.no_grad()
def test_text_words_play_no_role():
    model = small()
    prompt = torch.randint(48, 80, (2, 5), generator=seeded())
    codes, support = generate(model, prompt, 20, 2, generator=seeded())
    model.lm_head.weight[:model.first_code] = 1e4
    again, support_again = generate(model, prompt, 20, 2, generator=seeded())
    assert (model.logits(model(prompt)).argmax(-1) < model.first_code).any()      # the full head says words
    assert torch.equal(codes, again) and torch.equal(support, support_again)


@torch.no_grad()
def test_generate_is_a_function_of_its_generator():
    model = small()
    prompt = prompts_of(model)
    first, again, other = (generate(model, prompt, 16, 2, generator=seeded(i))[0] for i in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_generate_without_visual_codes():
    with pytest.raises(ValueError, match="n_visual"):
        generate(small(n_visual=0), torch.zeros(1, 2, dtype=torch.int64), 3)


# ------------------------------------------------------------------ weights in and out


@pytest.mark.parametrize("other", [{}, {"tie_word_embeddings": True}, {"attention_bias": True},
                                   {"rope_scaling": SCALING}])
@torch.no_grad()
def test_save_and_load(tmp_path, other):
    model = small(eos_token_id=7, **other)
    model.save(tmp_path / "a" / "b")
    loaded = Llama.load(tmp_path / "a" / "b", n_visual=16)       # has codes already: keeps its own
    assert loaded.config == model.config and loaded.first_code == 48
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values()))
    ids = prompts_of(model)
    assert torch.equal(loaded.logits(loaded(ids)), model.logits(model(ids)))
    assert sorted(p.name for p in (tmp_path / "a" / "b").iterdir()) == ["config.json", "model.safetensors"]
    half = Llama.load(tmp_path / "a" / "b", dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert half.frequencies.dtype == torch.float32


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_file_modes_follow_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        small().save(tmp_path / "m")
        assert os.umask(umask) == umask                          # and saving leaves it as it was
    finally:
        os.umask(before)
    for path in (tmp_path / "m").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask


@torch.no_grad()
def test_extension(tmp_path):
    old, new = Llama.load(FIXTURE), Llama.load(FIXTURE, n_visual=256)
    ids = load_file(FIXTURE / "expected.safetensors")["ids"]
    assert new.config.vocab_size == 320 + 256 and new.config.n_visual == 256 and new.first_code == 320
    assert new.head.shape == (576, 64) and new.model["embed_tokens"].weight.shape == (576, 64)
    torch.testing.assert_close(new.logits(new(ids))[..., :320], old.logits(old(ids)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(new.visual_logits(new(ids)), new.logits(new(ids))[..., 320:])
    codes, _ = generate(new, torch.cat([ids[:, :4], torch.tensor([[320], [575]])], 1), 8, generator=seeded())
    assert codes.max() < 256
    for rows in (new.head[320:], new.model["embed_tokens"].weight[320:]):         # different, of usual size
        assert len(rows.unique(dim=0)) == 256 and 0.5 < rows.std() / old.head.std() < 2
    new.save(tmp_path)
    again = Llama.load(tmp_path, n_visual=256)
    assert again.config == new.config and torch.equal(again.head, new.head)


@torch.no_grad()
def test_extension_of_tied_embeddings(tmp_path):
    small(n_visual=0, vocab=48, tie_word_embeddings=True).save(tmp_path)
    model = Llama.load(tmp_path, n_visual=32)
    assert not hasattr(model, "lm_head") and model.head.shape == (80, 32)
    assert model.head is model.model["embed_tokens"].weight
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
    (lambda t: t[NORM][:1].fill_(math.inf), NORM)], ids=["missing", "extra", "shape", "nan", "inf"])
def test_bad_tensors_are_named(tmp_path, change, culprit):
    with pytest.raises(ValueError) as error:
        Llama.load(edited(tmp_path, tensors=change))
    assert culprit in str(error.value) and str(tmp_path) in str(error.value)


@pytest.mark.parametrize("change, culprit", [
    (lambda raw: raw.update(model_type="mamba"), "mamba"),
    (lambda raw: raw.pop("model_type"), "model_type"),
    (lambda raw: [raw.pop(k, None) for k in ("rope_parameters", "rope_theta", "rope_scaling")], "rope_theta"),
    (lambda raw: raw["rope_parameters"].update(rope_type="yarn"), "yarn"),
    (lambda raw: raw.pop("hidden_size"), "hidden_size")],
    ids=["model_type", "no model_type", "no rope", "yarn", "no size"])
def test_bad_configs_are_named(tmp_path, change, culprit):
    with pytest.raises(ValueError, match=culprit):
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
    (lambda m: m.update({NORM: "model-00001-of-00006.safetensors"}), "model-00001-of-00006.safetensors"),
    (lambda m: m.update({NORM: "model-00009-of-00006.safetensors"}), "model-00009-of-00006.safetensors"),
    (lambda m: m.update({"model.extra": m[NORM]}), "model-00005-of-00006.safetensors"),
    (lambda m: m.update({NORM: "../model.safetensors"}), "../model.safetensors"),
    (lambda m: m.update({NORM: "/etc/hosts"}), "/etc/hosts"),
    (lambda m: m.update({NORM: "sub/model.safetensors"}), "sub/model.safetensors")],
    ids=["not listed", "other shard", "no such shard", "listed, nowhere", "above", "absolute", "below"])
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
