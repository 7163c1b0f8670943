"""
Folders of weights: Hugging Face's layout in and out, Meta's in. `Llama.load` and `Llama.save` call
this file.

    from weights import read_config
    config = read_config("path/to/Llama-3.1-8B")                # the architecture, without weights

Hugging Face: config.json, model.safetensors (or shards with an index), as transformers 4 or 5
writes them. Meta: params.json, consolidated.00.pth, as in the downloads of Llama 2, 3 and 3.1.

Every parameter must be there once, with its shape, and finite; otherwise loading raises a
ValueError that names file and tensor. Pickled files are opened as plain tensors: no code runs.
"""
import dataclasses
import json
import math
import os
import pickle
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lm import CONFIGS, LLAMA31_ROPE, Llama, LlamaConfig

# ------------------------------------------------------------------ the architecture


WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "vocab.json",
                   "merges.txt", "special_tokens_map.json", "added_tokens.json")
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
    weights = read_meta(folder) if is_meta(folder) else {}
    path = folder / ("params.json" if weights else "config.json")
    raw = read_json(path)
    try:
        if weights:
            return config_from_meta(raw, len(weights["tok_embeddings.weight"]))
        return config_from_json(raw)
    except KeyError as error:
        raise ValueError(f"{path} lacks {error}") from None
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise ValueError(f"{path}: {error}") from None


def config_from_json(raw: dict) -> LlamaConfig:
    """From config.json of a Llama or Qwen2, as transformers 4 or 5 writes it."""
    kind = raw.get("model_type")
    if kind not in ("llama", "qwen2"):
        raise ValueError(f"model_type {kind!r} is not supported: use a Llama or Qwen2 folder")
    fixed = {"hidden_act": "silu", "mlp_bias": False, "use_sliding_window": False,
             "attention_bias": kind == "qwen2"}
    for key, ours in fixed.items():
        if raw.get(key, ours) != ours:
            raise ValueError(f"{key} = {raw[key]} is not supported for {kind}: only {ours}")
    if raw.get("quantization_config"):
        raise ValueError("quantized weights are not supported")

    rope = {"rope_theta": raw.get("rope_theta")}
    for key in ("rope_scaling", "rope_parameters"):             # transformers 4, transformers 5
        value = raw.get(key) or {}
        if not isinstance(value, dict):
            raise ValueError(f"{key} = {value!r}: it must be an object")
        rope |= value
    theta = rope.pop("rope_theta")
    if theta is None:
        raise ValueError("neither rope_theta nor rope_parameters: the rotary base is unknown "
                         "(10000 in Llama 2: add it)")
    if "type" in rope:                                          # an older name
        rope["rope_type"] = rope.pop("type")
    rope_type = rope.get("rope_type", "default")
    if rope_type not in ("default", "llama3"):
        raise ValueError(f"rope_type {rope_type!r} is not supported: default or llama3")

    heads = raw["num_attention_heads"]
    return LlamaConfig(
        raw["vocab_size"], raw["hidden_size"], raw["intermediate_size"], raw["num_hidden_layers"],
        num_attention_heads=heads,
        num_key_value_heads=raw.get("num_key_value_heads") or heads,
        head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
        rms_norm_eps=raw["rms_norm_eps"],
        rope_theta=theta,
        rope_scaling=rope if rope_type == "llama3" else None,
        tie_word_embeddings=raw.get("tie_word_embeddings", False),
        attention_bias=kind == "qwen2",
        bos_token_id=raw.get("bos_token_id"),
        eos_token_id=raw.get("eos_token_id"),
        max_position_embeddings=raw.get("max_position_embeddings", 8192),
        n_visual=raw.get("n_visual", 0))


def config_to_json(config: LlamaConfig) -> dict:
    """To a config.json for transformers 4 (rope_scaling) and 5 (rope_parameters)."""
    raw = dataclasses.asdict(config)
    qwen = raw.pop("attention_bias")
    raw |= {"model_type": "qwen2" if qwen else "llama", "hidden_act": "silu", "use_cache": True}
    raw["architectures"] = ["Qwen2ForCausalLM" if qwen else "LlamaForCausalLM"]
    rope = {"rope_type": "default"} | (config.rope_scaling or {})
    raw["rope_parameters"] = rope | {"rope_theta": config.rope_theta}
    return raw


def config_from_meta(raw: dict, vocab_size: int) -> LlamaConfig:
    """From Meta's params.json. It names no special tokens: vocab_size tells which they are."""
    width, heads = raw["dim"], raw["n_heads"]
    multiple = raw.get("multiple_of", 256)
    mlp_width = int((raw.get("ffn_dim_multiplier") or 1) * int(8 * width / 3))
    scaling = None
    if raw.get("use_scaled_rope"):
        scaling = LLAMA31_ROPE | {"factor": float(raw.get("rope_scaling_factor") or 8)}
    bos = eos = None
    for known in CONFIGS.values():
        if known.vocab_size == vocab_size:
            bos, eos = known.bos_token_id, known.eos_token_id
    return LlamaConfig(
        vocab_size, width, multiple * math.ceil(mlp_width / multiple), raw["n_layers"],
        num_attention_heads=heads,
        num_key_value_heads=raw.get("n_kv_heads") or heads,
        head_dim=width // heads,
        rms_norm_eps=raw["norm_eps"],
        rope_theta=raw.get("rope_theta", 10000.0),
        rope_scaling=scaling,
        bos_token_id=bos,
        eos_token_id=eos,
        max_position_embeddings=131072 if scaling else 4096)


# ------------------------------------------------------------------ the tensors


def load_model(folder: Path, dtype: torch.dtype | None, device, n_visual: int) -> Llama:
    """Builds the model without memory, then puts the tensors in their places one by one."""
    config = read_config(folder)
    if n_visual and config.n_visual not in (0, n_visual):
        raise ValueError(f"{folder} has {config.n_visual} visual codes, not n_visual = {n_visual}")
    with torch.device("meta"):
        model = Llama(config)
    wanted = dict(model.named_parameters())                     # and not found yet
    tensors = meta_tensors if is_meta(folder) else hugging_face_tensors
    for path, name, value in tensors(folder, config):
        if name not in wanted:
            raise ValueError(f"{path} holds {name}: this model has none, or has it already")
        shape = wanted.pop(name).shape
        if value.shape != shape:
            raise ValueError(f"{path}: {name} is {tuple(value.shape)}, the config asks for "
                             f"{tuple(shape)}")
        if value.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"{path}: {name} is {value.dtype}, not float32, bfloat16 or float16")
        dtype = dtype or value.dtype
        value = value.to(device or "cpu", dtype, copy=True)     # a copy: no tie to the file
        if not torch.isfinite(value).all():
            raise ValueError(f"{path}: {name} holds NaN or infinity (in {value.dtype})")
        module, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(module), leaf, nn.Parameter(value))
        del value                                               # free it before the next
    if wanted:
        raise ValueError(f"{folder} lacks {len(wanted)} tensors, the first of them {min(wanted)}")
    model.source = folder.resolve()
    if n_visual and not config.n_visual:
        model.extend(n_visual)
    return model


def hugging_face_tensors(folder: Path, config: LlamaConfig) -> Iterator[tuple[Path, str, Tensor]]:
    """(file, name, tensor) one by one, memory-mapped: read when they are used."""
    for path, names in shards(folder).items():
        try:
            with safe_open(path, "pt") as file:
                for name in sorted({*names, *file.keys()}):
                    if names and name not in names:
                        raise ValueError(f"{path} holds {name}, which {INDEX} does not list there")
                    if name == "lm_head.weight" and config.tie_word_embeddings:
                        continue                                # repeats the embedding
                    if name.endswith("rotary_emb.inv_freq"):
                        continue                                # repeats the config
                    yield path, name, file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} cannot be read ({error})") from None


def shards(folder: Path) -> dict[Path, list[str]]:
    """File -> names of the tensors that the index lists for it. Without an index: no names."""
    path = folder / INDEX
    if not path.exists():
        return {folder / WEIGHTS: []}
    listed = read_json(path).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise ValueError(f"{path} cannot be used: it has no weight_map")
    files: dict[Path, list[str]] = {}
    for name, shard in listed.items():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise ValueError(f"{path} lists {shard!r}, which is no file name in its folder")
        if not (folder / shard).exists():
            raise ValueError(f"{folder / shard} is missing; {INDEX} lists it")
        files.setdefault(folder / shard, []).append(name)
    return files


def read_meta(folder: Path) -> dict[str, Tensor]:
    """The tensors of Meta's layout under Meta's names, memory-mapped."""
    path = folder / "consolidated.00.pth"
    files = sorted(folder.glob("consolidated.*.pth"))
    if len(files) > 1:
        raise ValueError(f"{folder} is split for {len(files)} GPUs ({files[-1].name}): convert it "
                         "to Hugging Face's layout")
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


def meta_tensors(folder: Path, config: LlamaConfig) -> Iterator[tuple[Path, str, Tensor]]:
    """
    (file, name, tensor) one by one, under our names. Meta's rotary pairs are the neighbours
    (2i, 2i + 1), ours are (i, i + head_dim / 2): the rows of q and k are reordered.
    """
    path = folder / "consolidated.00.pth"
    half = config.head_dim // 2
    for theirs, value in read_meta(folder).items():
        if theirs == "rope.freqs":                              # repeats the config
            continue
        found = re.fullmatch(r"(layers\.\d+\.)?(.+)\.weight", theirs)
        layer, stem = found.groups() if found else (None, theirs)
        if stem not in META_NAMES:
            raise ValueError(f"{path} holds {theirs}, which this model does not have")
        prefix = f"model.{layer}" if layer else ""
        rotary = stem in ("attention.wq", "attention.wk")
        if rotary and value.ndim == 2 and value.shape[0] % config.head_dim == 0:
            pairs = value.view(-1, half, 2, value.shape[1])
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
    special = {k: config[k] for k in ("bos_token_id", "eos_token_id") if config[k] is not None}
    texts = {
        "config.json": config | {"dtype": dtype, "torch_dtype": dtype},
        "generation_config.json": {"_from_model_config": True} | special,
    }
    for name, content in texts.items():
        part(name).write_text(json.dumps(content, indent=2) + "\n")

    copied = []
    if model.source not in (None, folder.resolve()):
        for name in TOKENIZER_FILES:
            for path in (model.source / name, model.source / "original" / name):
                if path.exists() and name not in copied:
                    shutil.copyfile(path, part(name))
                    copied.append(name)

    tensors = {name: t.detach().contiguous().cpu() for name, t in model.state_dict().items()}
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
