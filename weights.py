"""
Folders of weights: Hugging Face's layout in and out, Meta's in. `Llama.load` and `Llama.save` call
this file.

    from weights import read_config
    config = read_config("path/to/Llama-3.1-8B")                # the architecture, without weights

Hugging Face: config.json, model.safetensors (or shards with an index), as transformers 4 or 5
writes them. Meta: params.json, consolidated.00.pth, as in the downloads of Llama 2, 3 and 3.1.

Nothing is skipped in silence. A setting is followed, or is known to change nothing here (NEUTRAL),
or has the only value that this model can have (FIXED); any other raises a ValueError that names it.
Every parameter must be there, with its shape, and finite; otherwise a ValueError names file and
tensor. Pickled files are opened as plain tensors: no code runs.
"""
import dataclasses
import json
import math
import os
import pickle
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lm import CONFIGS, LLAMA31_ROPE, Llama, LlamaConfig, is_positive

# ------------------------------------------------------------------ the architecture


WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
GENERATION = "generation_config.json"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "vocab.json",
                   "merges.txt", "special_tokens_map.json", "added_tokens.json",
                   "chat_template.jinja", "chat_template.json",
                   "numbers.json")          # prior.py's
REPEATED = re.compile(r"(rotary_emb\.(inv_freq|cos_cached|sin_cached)|masked_bias)$")  # of config

# What transformers takes where a config.json lacks these fields
DEFAULTS = {
    "llama": {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048,
              "bos_token_id": 1, "eos_token_id": 2},
    "qwen2": {"rms_norm_eps": 1e-6, "max_position_embeddings": 32768},
}
# Fields of config.json that change no logits. The last lines are settings of transformers'
# `generate`, which it does not read from config.json either: how we sample is said by flags.
NEUTRAL = set("""
    architectures attn_implementation auto_map bos_token chunk_size_feed_forward
    decoder_start_token_id dtype eos_token finetuning_task gradient_checkpointing id2label
    initializer_range is_decoder is_llama_config label2id max_sequence_length model_max_length
    name_or_path num_labels output_attentions output_hidden_states pad_token pad_token_id prefix
    pretraining_tp problem_type return_dict sep_token_id task_specific_params tf_legacy_loss
    tokenizer_class torch_dtype torchscript transformers.js_config transformers_version unk_token
    unsloth_fixed unsloth_version use_bfloat16 use_cache use_flash_attn
    bad_words_ids begin_suppress_tokens diversity_penalty do_sample early_stopping
    encoder_no_repeat_ngram_size exponential_decay_length_penalty forced_bos_token_id
    forced_eos_token_id length_penalty max_length max_new_tokens min_length no_repeat_ngram_size
    num_beam_groups num_beams num_return_sequences output_scores remove_invalid_values
    repetition_penalty return_dict_in_generate suppress_tokens temperature top_k top_p typical_p
    """.split())
FIXED = {
    "hidden_act": "silu", "mlp_bias": False, "attention_dropout": 0, "is_causal": True,
    "partial_rotary_factor": 1, "rope_interleaved": False, "use_mrope": False,
    "add_cross_attention": False, "is_encoder_decoder": False, "tie_encoder_decoder": False,
}
FOLLOWED = {field.name for field in dataclasses.fields(LlamaConfig)} - {"attention_bias"} | {
    "model_type", "rope_parameters", "layer_types"}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
META_FOLLOWED = {"dim", "n_layers", "n_heads", "n_kv_heads", "multiple_of", "ffn_dim_multiplier",
                 "norm_eps", "rope_theta", "use_scaled_rope", "rope_scaling_factor",
                 "rope_high_freq_factor", "vocab_size", "max_batch_size", "max_seq_len"}
META_NAMES = {
    "tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head",
    "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj", "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
}


def read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be used ({error}): is this a Llama or Qwen2 folder?") \
            from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} cannot be used: it holds no JSON object")
    return content


def is_meta(folder: Path) -> bool:
    return (folder / "params.json").exists() and not (folder / "config.json").exists()


def read_config(folder) -> LlamaConfig:
    """The architecture of the model in a folder. Raises ValueError as Llama.load does."""
    folder = Path(folder)
    if (folder / "adapter_config.json").exists():
        raise ValueError(f"{folder} holds an adapter (adapter_config.json): merge it into its "
                         "model first (peft: merge_and_unload, save_pretrained)")
    if is_meta(folder):
        rows = len(read_meta(folder)["tok_embeddings.weight"])
        return config_of(folder / "params.json", lambda raw: config_from_meta(raw, rows))
    config = config_of(folder / "config.json", config_from_json)
    if not (folder / GENERATION).exists():
        return config
    # chat models have more end tokens there; the rest are settings of transformers' `generate`
    return config_of(folder / GENERATION,
                     lambda raw: dataclasses.replace(config, **special_tokens(raw)))


def config_of(path: Path, convert: Callable[[dict], LlamaConfig]) -> LlamaConfig:
    raw = read_json(path)
    try:
        return convert(raw)
    except KeyError as error:
        raise ValueError(f"{path} lacks {error}") from None
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise ValueError(f"{path}: {error}") from None


def special_tokens(raw: dict) -> dict:
    names = ("bos_token_id", "eos_token_id")
    return {name: raw[name] for name in names if raw.get(name) is not None}


def refuse_others(raw: dict, known: set[str], fixed: dict, where: str = "") -> None:
    """Raises ValueError for a field that is neither known nor of its fixed value nor empty."""
    for key, value in raw.items():
        if key in known or key.startswith("_") or value in (None, "", [], {}):
            continue
        said = f"{key} = {json.dumps(value)[:60]} is not supported{where}"
        if key not in fixed:
            raise ValueError(f"{said}. If you know that it changes nothing, delete it there")
        if value != fixed[key]:
            raise ValueError(f"{said}: only {json.dumps(fixed[key])}")


def check_numbers(raw: dict, keys: set[str]) -> None:
    """Raises ValueError for a field that is no positive number: others are computed from it."""
    for key in sorted(keys & raw.keys()):
        if not is_positive(raw[key]):
            raise ValueError(f"{key} = {raw[key]!r}: it must be a positive number")


def config_from_json(raw: dict) -> LlamaConfig:
    """From config.json of a Llama or Qwen2, as transformers 4 or 5 writes it."""
    kind = raw.get("model_type")
    if kind not in DEFAULTS:
        raise ValueError(f"model_type {kind!r} is not supported: use a Llama or Qwen2 folder")
    if raw.get("quantization_config"):
        raise ValueError("quantization_config: quantized weights are not supported, use the "
                         "model that they were made from")
    raw = DEFAULTS[kind] | raw
    check_numbers(raw, {"hidden_size", "num_attention_heads", "num_hidden_layers"})
    is_qwen = kind == "qwen2"
    known = FOLLOWED | NEUTRAL
    if is_qwen or raw.get("use_sliding_window") is False:
        refuse_windows(raw)
        known |= {"use_sliding_window", "sliding_window", "max_window_layers"}
    refuse_others(raw, known, FIXED | {"attention_bias": is_qwen})
    types = set(raw.get("layer_types") or [])
    if types - {"full_attention"}:
        raise ValueError(f"layer_types {sorted(types)}: only full_attention is supported")

    heads, width = raw["num_attention_heads"], raw["hidden_size"]
    kv_heads, head_dim = raw.get("num_key_value_heads"), raw.get("head_dim")
    theta, scaling = rotary(raw)
    return LlamaConfig(
        raw["vocab_size"], width, raw["intermediate_size"], raw["num_hidden_layers"],
        num_attention_heads=heads,
        num_key_value_heads=heads if kv_heads is None else kv_heads,
        head_dim=width // heads if head_dim is None else head_dim,
        rms_norm_eps=raw["rms_norm_eps"],
        rope_theta=theta,
        rope_scaling=scaling,
        tie_word_embeddings=raw.get("tie_word_embeddings", False),
        attention_bias=is_qwen,
        bos_token_id=raw.get("bos_token_id"),
        eos_token_id=raw.get("eos_token_id"),
        max_position_embeddings=raw["max_position_embeddings"],
        n_visual=raw.get("n_visual", 0))


def refuse_windows(raw: dict) -> None:
    """In a Qwen2, layers from max_window_layers on may attend to the last few tokens only."""
    window, first = raw.get("sliding_window", 4096), raw.get("max_window_layers", 28)
    if raw.get("use_sliding_window") and window is not None and not raw.get("layer_types") \
            and first < raw["num_hidden_layers"] and window < raw["max_position_embeddings"]:
        raise ValueError(f"use_sliding_window = true is not supported: {window} tokens in layers "
                         f"from {first} (max_window_layers) on")


def rotary(raw: dict) -> tuple[float, dict | None]:
    """
    rope_theta and rope_scaling of a config.json. They stand at its top and in rope_scaling
    (transformers 4), or in rope_parameters (transformers 5).
    """
    rope: dict = {}
    places = {"config.json": {"rope_theta": raw.get("rope_theta")},
              "rope_scaling": raw.get("rope_scaling") or {},
              "rope_parameters": raw.get("rope_parameters") or {}}
    for place, fields in places.items():
        if not isinstance(fields, dict):
            raise ValueError(f"{place} = {fields!r}: it must be an object")
        for key, value in fields.items():
            key = "rope_type" if key == "type" else key         # an older name
            if value is not None and rope.setdefault(key, value) != value:
                raise ValueError(f"{key} is {rope[key]} and, in {place}, {value}: which is right?")
    theta = rope.pop("rope_theta", 10000.0)                     # Llama 2 was published without
    kind = rope.pop("rope_type", "default")
    if kind not in ("default", "llama3"):
        raise ValueError(f"rope_type {kind!r} is not supported: default or llama3")
    known = LLAMA31_ROPE.keys() if kind == "llama3" else set()
    refuse_others(rope, known, FIXED, f" with rope_type {kind}")
    scaling = {"rope_type": kind} | {key: rope[key] for key in known & rope.keys()}
    return theta, scaling if kind == "llama3" else None


def config_to_json(config: LlamaConfig) -> dict:
    """To a config.json for transformers 4 (rope_scaling) and 5 (rope_parameters)."""
    raw = dataclasses.asdict(config)
    qwen = raw.pop("attention_bias")
    raw |= {"model_type": "qwen2" if qwen else "llama", "hidden_act": "silu", "use_cache": True}
    raw["architectures"] = ["Qwen2ForCausalLM" if qwen else "LlamaForCausalLM"]
    rope = {"rope_type": "default"} | (config.rope_scaling or {})
    raw["rope_parameters"] = rope | {"rope_theta": config.rope_theta}
    return raw


def config_from_meta(raw: dict, rows: int) -> LlamaConfig:
    """
    From Meta's params.json. It names neither special tokens nor context: rows, those of the
    embedding, tell which model it is.
    """
    refuse_others(raw, META_FOLLOWED, {})
    if raw.get("vocab_size", -1) not in (-1, rows):             # -1 in Llama 2
        raise ValueError(f"vocab_size = {raw['vocab_size']}, but the embedding has {rows} rows")
    raw = {key: value for key, value in raw.items() if value is not None}
    check_numbers(raw, META_FOLLOWED - {"vocab_size", "use_scaled_rope"})
    width, heads = raw["dim"], raw["n_heads"]
    multiple = raw.get("multiple_of", 256)
    mlp_width = int(raw.get("ffn_dim_multiplier", 1) * int(8 * width / 3))
    theta, scaled = raw.get("rope_theta", 10000.0), raw.get("use_scaled_rope", False)
    if not isinstance(scaled, bool):
        raise ValueError(f"use_scaled_rope = {scaled!r}: it must be true or false")
    scaling = None
    if scaled:
        scaling = LLAMA31_ROPE | {"factor": raw.get("rope_scaling_factor", 8.0),
                                  "high_freq_factor": raw.get("rope_high_freq_factor", 4.0)}
    bos = eos = None
    for known in CONFIGS.values():
        if known.vocab_size == rows:
            bos, eos = known.bos_token_id, known.eos_token_id
    return LlamaConfig(
        rows, width, multiple * math.ceil(mlp_width / multiple), raw["n_layers"],
        num_attention_heads=heads,
        num_key_value_heads=raw.get("n_kv_heads", heads),
        head_dim=width // heads,
        rms_norm_eps=raw["norm_eps"],
        rope_theta=theta,
        rope_scaling=scaling,
        bos_token_id=bos,
        eos_token_id=eos,
        max_position_embeddings=131072 if scaled else 8192 if theta > 10000 else 4096)


# ------------------------------------------------------------------ the tensors


def hugging_face_names(model: Llama) -> dict[str, Tensor]:
    """
    The parameters under Hugging Face's names, which has a matrix each for q, k, v, gate and up:
    views of the rows of qkv_proj and gate_up_proj.
    """
    c = model.config
    q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    parts = {"qkv_proj": {"q_proj": q, "k_proj": kv, "v_proj": kv},
             "gate_up_proj": {"gate_proj": c.intermediate_size, "up_proj": c.intermediate_size}}
    named = {}
    for name, value in model.state_dict().items():              # detached
        *prefix, module, leaf = name.split(".")
        rows = parts.get(module, {module: len(value)})
        for part, view in zip(rows, value.split([*rows.values()])):
            named[".".join([*prefix, part, leaf])] = view
    return named


def load_model(folder: Path, dtype: torch.dtype | None, device, n_visual: int) -> Llama:
    """Builds the model with empty tensors, then fills them one by one."""
    if dtype not in (None, *DTYPES):
        raise ValueError(f"dtype = {dtype}: it must be float32, bfloat16 or float16")
    config = read_config(folder)
    if n_visual < 0 or n_visual and config.n_visual not in (0, n_visual):
        raise ValueError(f"{folder} has {config.n_visual} visual codes, not n_visual = {n_visual}")
    with torch.device("meta"):
        model = Llama(config)
    known = hugging_face_names(model).keys()
    wanted = {*known}                                           # and not found yet
    own_head = None
    tensors = meta_tensors if is_meta(folder) else hugging_face_tensors
    for path, name, value in tensors(folder, model):
        if name == HEAD and config.tie_word_embeddings:
            own_head = path, value                              # memory-mapped: no copy yet
        elif name in wanted:
            put(model, path, name, value, dtype, device)
            wanted.remove(name)
        elif name not in known:
            raise ValueError(f"{path} holds {name}, which this model does not have")
        elif not is_equal(hugging_face_names(model)[name], value):
            raise ValueError(f"{path} holds {name}, which another file has with other values")
        del value                                               # free it before the next
    if own_head and EMBEDDING in wanted:                        # tied, stored under this name
        put(model, own_head[0], EMBEDDING, own_head[1], dtype, device)
        wanted.remove(EMBEDDING)
    if wanted:
        tied = ': if its head is the embedding, set "tie_word_embeddings": true in config.json'
        raise ValueError(f"{folder} lacks {len(wanted)} tensors, the first of them {min(wanted)}"
                         f"{tied if wanted == {HEAD} else ''}")
    if own_head and not is_equal(model.head, own_head[1]):      # so it is not tied
        head = nn.Linear(config.hidden_size, config.vocab_size, bias=False, device="meta")
        model.lm_head = head.to(model.head.dtype).to_empty(device=model.head.device)
        model.config = dataclasses.replace(config, tie_word_embeddings=False)
        put(model, own_head[0], HEAD, own_head[1], dtype, device)
    model.source = folder.resolve()
    model.generation = read_json(folder / GENERATION) if (folder / GENERATION).exists() else {}
    if n_visual and not config.n_visual:
        model.extend(n_visual)
    return model


def put(model: Llama, path: Path, name: str, value: Tensor, dtype: torch.dtype | None,
        device) -> None:
    """
    Copies a tensor of the file `path` to its place in the model, which the first one gives memory
    (dtype None: in its type). Raises ValueError if it does not fit.
    """
    place = hugging_face_names(model)[name]
    if value.shape != place.shape:
        raise ValueError(f"{path}: {name} is {tuple(value.shape)}, the config asks for "
                         f"{tuple(place.shape)}")
    if value.dtype not in DTYPES:
        raise ValueError(f"{path}: {name} is {value.dtype}, not float32, bfloat16 or float16")
    if place.is_meta:
        model.to(dtype or value.dtype).to_empty(device=device or "cpu")
        place = hugging_face_names(model)[name]
    place.copy_(value)
    if not torch.isfinite(place).all():
        raise ValueError(f"{path}: {name} holds NaN or infinity (in {place.dtype})")


def is_equal(parameter: Tensor, value: Tensor) -> bool:
    return torch.equal(parameter, value.to(parameter.device, parameter.dtype))


def hugging_face_tensors(folder: Path, model: Llama) -> Iterator[tuple[Path, str, Tensor]]:
    """
    (file, name, tensor) one by one, memory-mapped: read when they are used. As in transformers,
    names may lack the prefix "model.", and what an index does not list is read if it is needed.
    """
    known = {HEAD, *hugging_face_names(model)}
    files, listed = weight_files(folder)
    for path in files:
        try:
            with safe_open(path, "pt") as file:
                for stored in sorted(file.keys()):
                    spellings = (stored, f"model.{stored}", stored.removeprefix("model."))
                    name = next((n for n in spellings if n in known), stored)
                    extra = name not in known and listed and stored not in listed
                    if not extra and not REPEATED.search(name):
                        yield path, name, file.get_tensor(stored)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} cannot be read ({error}): if it was not downloaded whole, "
                             "download it again (git: git lfs pull)") from None


def weight_files(folder: Path) -> tuple[list[Path], set[str]]:
    """
    The files to read, and the names in their index, if there is one. As transformers, takes a whole
    file before an index. A variant (model.fp16.safetensors) is read where it is alone.
    """
    found = [path for path in (folder / WEIGHTS, folder / INDEX) if path.exists()]
    if not found:
        found = [path for pattern in ("model.safetensors.index.*.json", "model.*.safetensors")
                 for path in folder.glob(pattern) if "-of-" not in path.name]
        if len(found) > 1:
            raise ValueError(f"{folder} has {found[0].name} and {found[1].name}, but no {WEIGHTS}: "
                             "rename the one that you want")
    if not found:
        raise ValueError(f"{folder} has no {WEIGHTS}{other_format(folder)}")
    path = found[0]
    if path.suffix == ".safetensors":
        return [path], set()
    listed = read_json(path).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise ValueError(f"{path} cannot be used: it has no weight_map")
    for shard in listed.values():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise ValueError(f"{path} lists {shard!r}, which is no file name in its folder")
        if not (folder / shard).exists():
            raise ValueError(f"{folder / shard} is missing; {path.name} lists it")
    return [folder / shard for shard in sorted(set(listed.values()))], set(listed)


def other_format(folder: Path) -> str:
    """For an error message: what a folder has instead of WEIGHTS, and how to convert it."""
    if any(folder.glob("pytorch_model*.bin")):
        return (", only pytorch_model*.bin: to convert it, run transformers' AutoModelForCausalLM."
                f"from_pretrained('{folder}').save_pretrained('{folder}')")
    if any(folder.glob("model*-of-*.safetensors")):
        return f", only shards without their {INDEX}: download that too"
    others = [*folder.glob("*.safetensors"), *folder.glob("*.pth"), *folder.glob("*.gguf")]
    return f", only {others[0].name}: convert it to Hugging Face's layout" if others else ""


def read_meta(folder: Path) -> dict[str, Tensor]:
    """The tensors of Meta's layout under Meta's names, memory-mapped."""
    path = folder / "consolidated.00.pth"
    files = sorted(folder.glob("consolidated.*.pth"))
    if len(files) > 1:
        raise ValueError(f"{folder} is split for {len(files)} GPUs ({files[-1].name}): convert it "
                         "to Hugging Face's layout (transformers: convert_llama_weights_to_hf.py)")
    broken = (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError)
    try:
        weights = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except broken as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path} cannot be read as plain weights ({reason})") from None
    if not isinstance(weights, dict) or \
            not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in weights.items()):
        raise ValueError(f"{path} is not a dictionary of tensors")
    if "tok_embeddings.weight" not in weights:
        raise ValueError(f"{path} lacks tok_embeddings.weight: it is not a whole Llama")
    return weights


def meta_tensors(folder: Path, model: Llama) -> Iterator[tuple[Path, str, Tensor]]:
    """
    (file, name, tensor) one by one, under our names. Meta's rotary pairs are the neighbours
    (2i, 2i + 1), ours are (i, i + head_dim / 2): the rows of q and k are reordered.
    """
    path = folder / "consolidated.00.pth"
    d = model.config.head_dim
    for theirs, value in read_meta(folder).items():
        if theirs == "rope.freqs":                              # repeats the config
            continue
        found = re.fullmatch(r"(layers\.\d+\.)?(.+)\.weight", theirs)
        layer, stem = found.groups() if found else (None, theirs)
        if stem not in META_NAMES:
            raise ValueError(f"{path} holds {theirs}, which this model does not have")
        prefix = f"model.{layer}" if layer else ""
        rotary = stem in ("attention.wq", "attention.wk")
        if rotary and value.ndim == 2 and value.shape[0] % d == 0:
            pairs = value.view(-1, d // 2, 2, value.shape[1])
            value = pairs.transpose(1, 2).reshape(value.shape)
        yield path, f"{prefix}{META_NAMES[stem]}.weight", value


# ------------------------------------------------------------------ saving


def save_model(model: Llama, folder: Path) -> None:
    """Writes all files under another name (.part) first, then renames them."""
    folder.mkdir(parents=True, exist_ok=True)

    def part(name: str) -> Path:
        return folder / f"{name}.part"

    config = config_to_json(model.config)
    dtype = str(model.head.dtype).removeprefix("torch.")
    texts = {
        "config.json": config | {"dtype": dtype, "torch_dtype": dtype},
        GENERATION: (model.generation or {"_from_model_config": True}) | special_tokens(config),
    }
    for name, content in texts.items():
        part(name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    copied = []
    if model.source not in (None, folder.resolve()):
        for name in TOKENIZER_FILES:
            for path in (model.source / name, model.source / "original" / name):
                if path.exists() and name not in copied:
                    shutil.copyfile(path, part(name))
                    copied.append(name)

    tensors = {name: t.contiguous().cpu() for name, t in hugging_face_names(model).items()}
    try:
        save_file(tensors, part(WEIGHTS), {"format": "pt"})
    except SafetensorError as error:                            # a full disk, for one
        raise OSError(f"{part(WEIGHTS)} cannot be written ({error})") from None
    shutil.copymode(part("config.json"), part(WEIGHTS))         # safetensors writes 0600
    with open(part(WEIGHTS), "rb") as file:
        os.fsync(file.fileno())

    for name in (WEIGHTS, *copied, *texts):
        os.replace(part(name), folder / name)
    (folder / INDEX).unlink(missing_ok=True)                    # shards of an earlier model
    for path in folder.glob("model-*-of-*.safetensors"):
        path.unlink()
