"""
Folders of weights: saved, loaded, extended, interrupted, damaged, and in Meta's layout.

    pytest tests/test_weights.py

The folders in fixtures/ are described in test_lm.py.
"""
import json
import math
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import weights
from lm import CONFIGS, LLAMA31_ROPE, Llama, LlamaConfig, generate
from test_lm import FIXTURES, PEERS, SCALING, prompts_of, seeded, small
from weights import read_config

FIXTURE = FIXTURES / "llama31"

# ------------------------------------------------------------------ saved and loaded


@pytest.mark.parametrize("name", CONFIGS)
def test_named_configurations_in_and_out(name):
    assert weights.config_from_json(weights.config_to_json(CONFIGS[name])) == CONFIGS[name]


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
    (lambda raw: raw.update(rope_theta=1.0), "rope_theta is 1.0 and, in rope_parameters, 500000"),
    (lambda raw: raw.update(rope_scaling={"type": "linear"}), "rope_type is linear and.* default"),
    (lambda raw: raw["rope_parameters"].update(factor=8.0), "factor = 8.0 .* rope_type default"),
    (lambda raw: raw["rope_parameters"].update(partial_rotary_factor=0.5), "partial_rotary_factor"),
    (lambda raw: raw["rope_parameters"].update(SCALING, low_freq_factor=4.0), "low_freq_factor"),
    (lambda raw: raw["rope_parameters"].update(SCALING, beta_fast=32), "beta_fast"),
    (lambda raw: raw["rope_parameters"].update(rope_type="yarn"), "yarn"),
    (lambda raw: raw.pop("hidden_size"), "hidden_size"),
    (lambda raw: raw.update(hidden_size="32"), "hidden_size"),
    (lambda raw: raw.update(hidden_size=32.0), "hidden_size"),
    (lambda raw: raw.update(num_hidden_layers=None), "num_hidden_layers"),
    (lambda raw: raw.update(num_attention_heads=0, head_dim=None), "num_attention_heads = 0"),
    (lambda raw: raw.update(num_attention_heads="4", head_dim=None), "num_attention_heads = '4'"),
    (lambda raw: raw.update(num_key_value_heads=3), "4 heads on 3"),
    (lambda raw: raw.update(num_key_value_heads=0), "num_key_value_heads"),
    (lambda raw: raw.update(head_dim=7), "head_dim"),
    (lambda raw: raw.update(head_dim=0), "head_dim"),
    (lambda raw: raw.update(num_hidden_layers=10 ** 9), "num_hidden_layers"),
    (lambda raw: raw.update(vocab_size=-1), "vocab_size"),
    (lambda raw: raw.update(rms_norm_eps=None), "rms_norm_eps"),
    (lambda raw: raw.update(eos_token_id="</s>"), "eos_token_id"),
    (lambda raw: raw.update(bos_token_id=-1), "bos_token_id"),
    (lambda raw: raw.update(bos_token_id=48), "bos_token_id = 48: .* below 48"),    # a visual code
    (lambda raw: raw.update(bos_token_id=[1]), "bos_token_id"),
    (lambda raw: raw.update(eos_token_id=[2, 151643]), "eos_token_id"),
    (lambda raw: raw["rope_parameters"].update(rope_theta="1e4"), "rope_theta"),
    (lambda raw: raw.update(rope_parameters=[1]), "rope_parameters"),
    (lambda raw: raw["rope_parameters"].update(rope_type="llama3"), "rope_scaling"),
    (lambda raw: raw["rope_parameters"].update(SCALING, factor="8"), "rope_scaling"),
    (lambda raw: raw.update(n_visual=1000), "n_visual"),
    (lambda raw: raw.update(tie_word_embeddings="false"), "tie_word"),
    (lambda raw: raw.update(quantization_config={"bits": 4}), "quantization_config")])
def test_bad_configs_are_named(tmp_path, change, culprit):
    with pytest.raises(ValueError, match=f"config.json.*{culprit}"):
        Llama.load(edited(tmp_path, config=change))


@pytest.mark.parametrize("field, value", [
    ("hidden_act", "gelu"), ("attention_bias", True), ("mlp_bias", True), ("is_causal", False),
    ("attention_dropout", 0.1), ("partial_rotary_factor", 0.5), ("rope_interleaved", True),
    ("sliding_window", 4), ("use_sliding_window", True), ("layer_types", ["sliding_attention"]),
    ("quantization", {"bits": 4}), ("per_layer_config", {"0": {"rms_norm_eps": 1.0}}),
    ("original_max_position_embeddings", 8192), ("final_logit_softcapping", 30.0),
    ("unheard_of", 3), ("unheard_of", False)])
def test_settings_that_are_not_followed_are_named(tmp_path, field, value):
    with pytest.raises(ValueError, match=f"config.json: {field} .*supported"):
        Llama.load(edited(tmp_path, config=lambda raw: raw.update({field: value})))


@pytest.mark.parametrize("rope_type", ["linear", "dynamic", "yarn", "longrope", "mrope"])
@pytest.mark.parametrize("key", ["type", "rope_type"])
def test_other_rope_types_are_named(tmp_path, rope_type, key):
    def change(raw):
        raw.pop("rope_parameters")
        raw["rope_scaling"] = {key: rope_type, "factor": 2.0}
    with pytest.raises(ValueError, match=f"config.json: rope_type '{rope_type}'"):
        Llama.load(edited(tmp_path, config=change))


@pytest.mark.parametrize("changes, good", [
    ({}, True), ({"use_sliding_window": True}, True),
    ({"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0}, True),
    ({"use_sliding_window": True, "max_window_layers": 2}, True),
    ({"use_sliding_window": True, "max_window_layers": 1}, False),
    ({"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 256}, True),
    ({"layer_types": ["full_attention"] * 2, "use_sliding_window": True, "max_window_layers": 1},
     True),
    ({"layer_types": ["full_attention", "sliding_attention"]}, False)])
def test_windows_of_qwen2(changes, good):
    """Of the two layers, those from max_window_layers (28) on slide: as in transformers."""
    raw = json.loads((FIXTURES / "qwen25-tied" / "config.json").read_text())
    del raw["layer_types"]
    raw["sliding_window"] = 4
    if good:
        weights.config_from_json(raw | changes)
    else:
        with pytest.raises(ValueError, match="max_window_layers|layer_types"):
            weights.config_from_json(raw | changes)


# What transformers 5.24 does with each of these folders was tried: it gives the logits of the
# unchanged one, which it wrote.


def rename_tensors(rename):
    def change(folder: Path) -> None:
        path = folder / "model.safetensors"
        save_file({rename(name): x for name, x in load_file(path).items()}, path)
    return change


def more_tensors(make, file="model.safetensors"):
    def change(folder: Path) -> None:
        save_file(make(load_file(folder / file)), folder / file)
    return change


def change_json(change, name="config.json"):
    def apply(folder: Path) -> None:
        raw = json.loads((folder / name).read_text())
        change(raw)
        (folder / name).write_text(json.dumps(raw))
    return apply


SHARD = "model-00001-of-00006.safetensors"
OPENED = {
    "no rope_theta": ("llama2", change_json(lambda raw: raw.pop("rope_parameters"))),
    "no rms_norm_eps": ("qwen25-tied", change_json(lambda raw: raw.pop("rms_norm_eps"))),
    "neutral fields": ("llama2", change_json(lambda raw: raw.update(
        pretraining_tp=2, auto_map={"AutoModel": "m.M"}, _name_or_path="x", torch_dtype="float16",
        unsloth_fixed=True, use_cache=False, temperature=0.6, max_length=4096, pruned_heads={},
        rope_interleaved=False, sliding_window=None, unheard_of=None))),
    "tied, with a head of its own": (
        "qwen25-untied", change_json(lambda raw: raw.update(tie_word_embeddings=True))),
    "tied, head stored too": ("qwen25-tied", more_tensors(
        lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"].clone()})),
    "tied, head stored only": ("qwen25-tied", rename_tensors(
        lambda name: name.replace("model.embed_tokens", "lm_head"))),
    "no prefix": ("qwen25-tied", rename_tensors(lambda name: name.removeprefix("model."))),
    "two prefixes": ("qwen25-tied", rename_tensors(lambda name: f"model.{name}")),
    "buffers": ("llama2", more_tensors(lambda t: t | {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
        "model.layers.1.self_attn.masked_bias": torch.ones(1)})),
    "stale index": ("llama2", lambda folder: (folder / INDEX).write_text(
        json.dumps({"weight_map": {NORM: "model-00001-of-00002.safetensors"}}))),
    "shard with a tensor more": ("llama31", more_tensors(
        lambda t: t | {"extra": torch.zeros(3)}, SHARD)),
    "shard with a tensor of another": ("llama31", more_tensors(
        lambda t: t | {NORM: norm_of(FIXTURE)}, SHARD)),
    "not listed": ("llama31", change_json(lambda raw: raw["weight_map"].pop(NORM), INDEX)),
    "listed elsewhere": (
        "llama31", change_json(lambda raw: raw["weight_map"].update({NORM: SHARD}), INDEX)),
    "listed, nowhere": (
        "llama31", change_json(lambda raw: raw["weight_map"].update(extra=SHARD), INDEX)),
}


def norm_of(folder: Path) -> torch.Tensor:
    index = json.loads((folder / INDEX).read_text())["weight_map"]
    return load_file(folder / index[NORM])[NORM]


@pytest.mark.parametrize("case", OPENED)
@torch.no_grad()
def test_what_transformers_opens_gives_its_logits(tmp_path, case):
    name, change = OPENED[case]
    folder = shutil.copytree(FIXTURES / name, tmp_path / "m")
    change(folder)
    expected = load_file(folder / "expected.safetensors")
    model = Llama.load(folder)
    assert (model.logits(model(expected["ids"])) - expected["logits"]).abs().max() < 1e-4
    model.save(tmp_path / "saved")
    again = Llama.load(tmp_path / "saved")
    assert same_weights(again, model) and again.config == model.config
    assert hasattr(model, "lm_head") == (name != "qwen25-tied")


def test_a_variant_is_read_where_it_is_alone(tmp_path):
    folder, path = edited(tmp_path), tmp_path / "model.safetensors"
    path.rename(tmp_path / "model.fp16.safetensors")
    assert same_weights(Llama.load(folder), small())
    shutil.copy(tmp_path / "model.fp16.safetensors", tmp_path / "model.bf16.safetensors")
    with pytest.raises(ValueError, match="model.bf16.safetensors.*rename") as error:
        Llama.load(folder)
    assert "model.fp16.safetensors" in str(error.value)
    for name in ("model.fp16.safetensors", "model.bf16.safetensors"):
        (tmp_path / name).unlink()
    sharded(folder, small())
    for file in [*folder.glob("model-*")]:
        file.rename(folder / file.name.replace("model-", "model.fp16-"))
    text = (folder / INDEX).read_text().replace("model-", "model.fp16-")
    (folder / INDEX).rename(folder / "model.safetensors.index.fp16.json").write_text(text)
    assert same_weights(Llama.load(folder), small())


@pytest.mark.parametrize("name, remedy", [
    ("pytorch_model.bin", "from_pretrained.*save_pretrained"),
    ("pytorch_model-00001-of-00002.bin", "from_pretrained.*save_pretrained"),
    ("model-00001-of-00002.safetensors", f"shards without their {INDEX}: download"),
    ("consolidated.safetensors", "only consolidated.safetensors: convert"),
    ("a.gguf", "only a.gguf: convert"), ("training_args.bin", "no model.safetensors$")])
def test_other_formats_are_named(tmp_path, name, remedy):
    (edited(tmp_path) / "model.safetensors").rename(tmp_path / name)
    with pytest.raises(ValueError, match=f"{tmp_path} has no model.safetensors.*") as error:
        Llama.load(tmp_path)
    assert re.search(remedy, str(error.value))


def test_a_head_that_may_be_tied_is_named(tmp_path):
    with pytest.raises(ValueError, match="lm_head.weight: .*tie_word_embeddings"):
        Llama.load(edited(tmp_path, tensors=lambda t: t.pop("lm_head.weight")))
    with pytest.raises(ValueError, match=f"{NORM}$"):
        Llama.load(edited(tmp_path, tensors=lambda t: t.pop(NORM)))


def test_a_pointer_of_git_lfs_is_named(tmp_path):
    (edited(tmp_path) / "model.safetensors").write_text("version https://git-lfs.github.com/")
    with pytest.raises(ValueError, match="model.safetensors.*git lfs pull"):
        Llama.load(tmp_path)


def test_an_adapter_is_named(tmp_path):
    (edited(tmp_path) / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="adapter_config.json.*merge"):
        read_config(tmp_path)


def test_two_values_for_one_tensor_are_named(tmp_path):
    folder = shutil.copytree(FIXTURE, tmp_path / "m")
    more_tensors(lambda t: t | {NORM: norm_of(FIXTURE) + 1}, SHARD)(folder)
    with pytest.raises(ValueError, match=f"{NORM}.*other values"):
        Llama.load(folder)


@pytest.mark.parametrize("change, culprit", [
    ({"dtype": torch.float64}, "dtype"), ({"dtype": "bfloat16"}, "dtype"),
    ({"dtype": torch.int8}, "dtype"), ({"n_visual": -1}, "n_visual = -1")])
def test_bad_arguments_are_named(change, culprit):
    with pytest.raises(ValueError, match=culprit):
        Llama.load(FIXTURES / "llama2", **change)


def test_generation_config_is_followed_and_travels(tmp_path):
    """As for Llama-3-8B-Instruct: config.json has one end token, generation_config.json two."""
    folder = shutil.copytree(FIXTURES / "llama2", tmp_path / "a")
    path = folder / "generation_config.json"
    settings = {"bos_token_id": 3, "eos_token_id": [2, 7], "temperature": 0.6}
    path.write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text("{{ é }}", encoding="utf-8")
    model = Llama.load(folder, n_visual=8)
    assert model.config.bos_token_id == 3 and model.config.eos_token_id == [2, 7]
    model.save(tmp_path / "b")
    Llama.load(tmp_path / "b").save(tmp_path / "c")
    assert json.loads((tmp_path / "c" / "generation_config.json").read_text()) == settings
    assert (tmp_path / "c" / "chat_template.jinja").read_bytes() == "{{ é }}".encode()
    assert read_config(tmp_path / "c") == model.config
    path.write_text('{"temperature": 0.6}')                     # none there: those of config.json
    assert read_config(folder).eos_token_id == 2
    for bad in ('{"eos_token_id": [2, 320]}', '{"bos_token_id": "<s>"}', "{"):
        path.write_text(bad)
        with pytest.raises(ValueError, match="generation_config.json"):
            Llama.load(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: os.truncate(path, 50)],
                         ids=["missing", "cut"])
def test_bad_files_are_named(tmp_path, name, damage):
    damage(edited(tmp_path) / name)
    with pytest.raises(ValueError, match=name):
        Llama.load(tmp_path)


@pytest.mark.parametrize("damage, culprit", [
    (lambda m: m.update({NORM: "model-00009-of-00006.safetensors"}), "model-00009-of-00006"),
    (lambda m: m.update({NORM: "../model.safetensors"}), "../model.safetensors"),
    (lambda m: m.update({NORM: "/etc/hosts"}), "/etc/hosts"),
    (lambda m: m.update({NORM: "sub/model.safetensors"}), "sub/model.safetensors")],
    ids=["no such shard", "above", "absolute", "below"])
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
    command = [sys.executable, "-c", code, Path(weights.__file__).parent, tmp_path, FIXTURE]
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
    c, tensors = model.config, {"rope.freqs": torch.zeros(3)}
    for name, value in weights.hugging_face_names(model).items():
        if "q_proj" in name or "k_proj" in name:
            d, rows = c.head_dim, []
            for head in range(len(value) // d):
                for i in range(d // 2):
                    rows += [value[head * d + i], value[head * d + i + d // 2]]
            value = torch.stack(rows)
        for ours, theirs in META_NAMES.items():
            name = name.replace(ours, theirs)
        tensors[name.removeprefix("model.")] = value
    folder.mkdir()
    torch.save(tensors, folder / "consolidated.00.pth")
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
    assert weights.config_from_meta(raw, ours.vocab_size) == ours


@pytest.mark.parametrize("change, culprit", [
    ({"quantization_args": {"group_size": 256}}, "quantization_args"),
    ({"lora_args": {"rank": 16}}, "lora_args"), ({"moe": False}, "moe"),
    ({"head_dim": 64}, "head_dim"), ({"vocab_size": 32016}, "vocab_size = 32016.*32000 rows"),
    ({"n_kv_heads": 0}, "n_kv_heads = 0"), ({"use_scaled_rope": "no"}, "use_scaled_rope"),
    ({"n_heads": 0}, "n_heads = 0"), ({"multiple_of": 0}, "multiple_of = 0"),
    ({"ffn_dim_multiplier": "1.3"}, "ffn_dim_multiplier = '1.3'"),
    ({"use_scaled_rope": True, "rope_scaling_factor": "8"}, "factor")])
def test_bad_params_are_named(change, culprit):
    raw = {"dim": 4096, "n_layers": 32, "n_heads": 32, "norm_eps": 1e-5}
    with pytest.raises(ValueError, match=culprit):
        weights.config_from_meta(raw | change, 32000)


def test_metas_rope_scaling_is_followed():
    """As in Llama 3.2's params.json; converted to Hugging Face's, the factor is 32 as well."""
    raw = {"dim": 2048, "n_layers": 16, "n_heads": 32, "n_kv_heads": 8, "norm_eps": 1e-5,
           "ffn_dim_multiplier": 1.5, "multiple_of": 256, "rope_theta": 500000.0,
           "vocab_size": 128256, "use_scaled_rope": True, "rope_scaling_factor": 32.0,
           "rope_high_freq_factor": 2.0, "lora_args": None, "max_seq_len": 2048}
    config = weights.config_from_meta(raw, 128256)
    assert config.rope_scaling == LLAMA31_ROPE | {"factor": 32.0, "high_freq_factor": 2.0}
    assert config.intermediate_size == 8192


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
