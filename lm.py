"""
The language model: Llama (and Qwen2) written out, weights in and out, a key-value cache, text tokenizers, and the sampling
of codes.

Source: Phys-AR section 3.3 and 4.1. A Llama whose vocabulary is extended by the 256 visual codes predicts the codes of the
next frames; the logits of all text words are masked before sampling; top-k 50, top-p 0.95.

Choices where the paper is silent
1. Names and layout of parameters are Hugging Face's (rotary halves, not pairs): folders load and save without permuting.
2. The visual codes are the last `n_visual` rows of the vocabulary, and `visual_logits` multiplies by these rows only. That
   is masking the text words, without computing them first (they are 99.8 % of Llama 3's head).
3. One definition of the policy. `truncate` says which codes may be drawn (the support), `logprobs` the log-probability of
   a code within it. Sampler and trainer call the same two, and the sampler hands its support on. So the ratio of
   new and old policy is exactly 1 before the first update, also under top-k and top-p.
4. New rows of embedding and head start at the mean and spread of the rows there are, column by column.

    python lm.py --llm DIR                                # what is in a folder, and a continuation: are the weights right?
    python lm.py --llm DIR --prompt "The speed of light is" --tokens 50 --dtype bfloat16 --device cuda

Folders: Hugging Face's (config.json, one safetensors file or shards with an index) and Meta's (params.json,
consolidated.00.pth). Llama 2, 3, 3.1 and Qwen2, Qwen2.5 (Table 1).

Axes: B batch, G group (samples per prompt), S sequence, D width, H heads, V vocabulary or visual codes.
"""
import argparse
import base64
import dataclasses
import json
import math
import os
import pickle
import re
import shutil
import sys
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Iterator

import sentencepiece
import tiktoken
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# ------------------------------------------------------------------ config


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}


@dataclass
class LlamaConfig:
    """Named as in Hugging Face's config.json, which `from_json` reads and `to_json` writes."""
    vocab_size: int                         # rows of embedding and head, visual codes included
    hidden_size: int                        # D
    intermediate_size: int                  # of the SwiGLU
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 500000.0
    rope_scaling: dict | None = None        # rope_type llama3: factor, low_freq_factor, high_freq_factor, original_max...
    tie_word_embeddings: bool = False
    attention_bias: bool = False            # on q, k and v: Qwen2
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = None
    max_position_embeddings: int = 8192
    n_visual: int = 0                       # the last rows of the vocabulary are visual codes

    def __post_init__(self):
        for name, value in dataclasses.asdict(self).items():
            if name in ("tie_word_embeddings", "attention_bias"):
                good, wanted = isinstance(value, bool), "true or false"
            elif name in ("rms_norm_eps", "rope_theta"):
                good, wanted = isinstance(value, (int, float)) and value > 0, "a number above 0"
            elif name == "rope_scaling":
                good = value is None or all(isinstance(value.get(k), (int, float)) for k in LLAMA3 if k != "rope_type")
                wanted = f"numbers for {', '.join(k for k in LLAMA3 if k != 'rope_type')}"
            elif name == "n_visual":
                good, wanted = type(value) is int and 0 <= value <= self.vocab_size, "0 to vocab_size"
            elif name in ("bos_token_id", "eos_token_id"):
                ids = value if isinstance(value, list) else [0 if value is None else value]
                good, wanted = all(type(i) is int and i >= 0 for i in ids), "an id"
            else:
                good, wanted = type(value) is int and value > 0, "a whole number above 0"
            if not good:
                raise ValueError(f"{name} = {value!r}: it must be {wanted}")
        if self.num_attention_heads % self.num_key_value_heads or self.head_dim % 2:
            raise ValueError(f"{self.num_attention_heads} heads on {self.num_key_value_heads} of keys and values, of width "
                             f"{self.head_dim}: the first must be a multiple of the second, the width even")

    @classmethod
    def from_json(cls, raw: dict) -> "LlamaConfig":
        """config.json of Llama or Qwen2 in either spelling: rope_theta + rope_scaling, or rope_parameters."""
        kind = raw.get("model_type")
        if kind not in ("llama", "qwen2"):
            raise ValueError(f"model_type {kind!r} is not supported: use a Llama or Qwen2 folder")
        for key, ours in (("hidden_act", "silu"), ("mlp_bias", False), ("use_sliding_window", False),
                          ("attention_bias", kind == "qwen2")):
            if raw.get(key, ours) != ours:
                raise ValueError(f"{key} = {raw[key]} is not supported for {kind}: only {ours}")
        if raw.get("quantization_config"):
            raise ValueError("quantized weights are not supported")
        rope = {"rope_theta": raw.get("rope_theta")}
        for key in ("rope_scaling", "rope_parameters"):
            if not isinstance(raw.get(key) or {}, dict):
                raise ValueError(f"{key} = {raw[key]!r}: it must be an object")
            rope |= raw.get(key) or {}
        if rope.get("rope_theta") is None:
            raise ValueError("neither rope_theta nor rope_parameters: the rotary base is unknown (10000 in Llama 2: add it)")
        scaling = {("rope_type" if k == "type" else k): v for k, v in rope.items() if k != "rope_theta"}
        if scaling.get("rope_type", "default") not in ("default", "llama3"):
            raise ValueError(f"rope_type {scaling['rope_type']!r} is not supported: default or llama3")
        heads = raw["num_attention_heads"]
        return cls(raw["vocab_size"], raw["hidden_size"], raw["intermediate_size"], raw["num_hidden_layers"], heads,
                   raw.get("num_key_value_heads") or heads, raw.get("head_dim") or raw["hidden_size"] // heads,
                   raw["rms_norm_eps"], rope["rope_theta"], scaling if scaling.get("rope_type") == "llama3" else None,
                   raw.get("tie_word_embeddings", False), kind == "qwen2", raw.get("bos_token_id"),
                   raw.get("eos_token_id"), raw.get("max_position_embeddings", 8192), raw.get("n_visual", 0))

    @classmethod
    def from_meta(cls, raw: dict, vocab_size: int) -> "LlamaConfig":
        """params.json of Meta's Llama folders. It does not name the special tokens: known vocabularies do."""
        D, heads = raw["dim"], raw["n_heads"]
        ffn = int((raw.get("ffn_dim_multiplier") or 1) * int(8 * D / 3))
        multiple = raw.get("multiple_of", 256)
        known = next((c for c in CONFIGS.values() if c.vocab_size == vocab_size), None)
        scaling = LLAMA3 | {"factor": float(raw.get("rope_scaling_factor") or 8)} if raw.get("use_scaled_rope") else None
        return cls(vocab_size, D, multiple * -(-ffn // multiple), raw["n_layers"], heads, raw.get("n_kv_heads") or heads,
                   D // heads, raw["norm_eps"], raw.get("rope_theta", 10000.0), scaling,
                   bos_token_id=known.bos_token_id if known else None, eos_token_id=known.eos_token_id if known else None,
                   max_position_embeddings=131072 if scaling else 4096)

    def to_json(self) -> dict:
        """As transformers 5 (rope_parameters) and 4 (rope_theta, rope_scaling) both read it."""
        raw = dataclasses.asdict(self)
        qwen = raw.pop("attention_bias")
        raw |= {"model_type": "qwen2" if qwen else "llama", "hidden_act": "silu", "use_cache": True,
                "architectures": ["Qwen2ForCausalLM" if qwen else "LlamaForCausalLM"]}
        raw["rope_parameters"] = {"rope_type": "default"} | (self.rope_scaling or {}) | {"rope_theta": self.rope_theta}
        return raw


CONFIGS = {                                 # vocabulary, D, ffn, layers, heads, kv heads, head_dim, eps, theta, ...
    "llama-2-7b": LlamaConfig(32000, 4096, 11008, 32, 32, 32, 128, 1e-5, 1e4, bos_token_id=1, eos_token_id=2,
                              max_position_embeddings=4096),
    "llama-3.1-8b": LlamaConfig(128256, 4096, 14336, 32, 32, 8, 128, 1e-5, 5e5, LLAMA3, bos_token_id=128000,
                                eos_token_id=128001, max_position_embeddings=131072),
    "qwen2.5-1.5b": LlamaConfig(151936, 1536, 8960, 28, 12, 2, 128, 1e-6, 1e6, None, True, True, 151643, 151643, 131072),
    "qwen2.5-7b": LlamaConfig(152064, 3584, 18944, 28, 28, 4, 128, 1e-6, 1e6, None, False, True, 151643, 151643, 131072),
}


# ------------------------------------------------------------------ model


def rope_frequencies(config: LlamaConfig, device=None) -> Tensor:
    """Angle per position and pair of channels (head_dim / 2,), fp32; Llama 3.1 stretches the slow ones."""
    f = config.rope_theta ** (-torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device) / config.head_dim)
    if s := config.rope_scaling:
        factor, low, high = s["factor"], s["low_freq_factor"], s["high_freq_factor"]
        wavelength = 2 * math.pi / f
        smooth = (s["original_max_position_embeddings"] / wavelength - low) / (high - low)
        f = torch.lerp(f / factor, f, smooth.clamp(0, 1))
    return f


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position: x (B, H, S, d), cos and sin (S, d) in fp32. Channel i turns with channel i + d/2."""
    left, right = x.chunk(2, -1)
    return (x * cos + torch.cat([-right, left], -1) * sin).to(x.dtype)


class Cache:
    """
    Keys and values of every layer, allocated once: (layers, 2, B, kv heads, capacity, d). `length` positions are in use.
    A CUDA graph replays the same addresses and sizes: for it `position` (1,), a tensor, takes the place of `length`, one
    token is written at a time, and attention runs over the whole capacity under a mask.
    """

    def __init__(self, config: LlamaConfig, batch: int, capacity: int, device=None, dtype=None):
        self.kv = torch.zeros(config.num_hidden_layers, 2, batch, config.num_key_value_heads, capacity, config.head_dim,
                              device=device, dtype=dtype)
        self.length, self.position = 0, None

    def write(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """k, v (B, H, S, d) of the newest positions -> those of all positions so far."""
        if self.position is not None:
            for kept, new in zip(self.kv[layer], (k, v)):
                kept.index_copy_(2, self.position, new)
            return self.kv[layer, 0], self.kv[layer, 1]
        end = self.length + k.shape[2]
        self.kv[layer, 0, :, :, self.length:end] = k
        self.kv[layer, 1, :, :, self.length:end] = v
        return self.kv[layer, 0, :, :, :end], self.kv[layer, 1, :, :, :end]

    @property
    def capacity(self) -> int:
        return self.kv.shape[4]

    def expand(self, group: int) -> "Cache":
        """Every sequence `group` times: one prefill serves all samples of a prompt."""
        other = object.__new__(Cache)
        other.kv, other.length, other.position = self.kv.repeat_interleave(group, 2), self.length, None
        return other


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:                                       # in fp32 whatever x is
        h = x.float()
        return (self.weight.float() * h * torch.rsqrt(h.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, c: LlamaConfig, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, c.num_attention_heads * c.head_dim, bias=c.attention_bias)
        self.k_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=c.attention_bias)
        self.v_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=c.attention_bias)
        self.o_proj = nn.Linear(c.num_attention_heads * c.head_dim, c.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: Cache | None, mask: Tensor | None) -> Tensor:
        B, S, _ = x.shape
        q, k, v = (f(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)        # (B, H, S, d)
                   for f in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.write(self.layer, k, v)                                  # (B, H_kv, length + S, d)
        if S == 1:      # the heads that share keys become the rows of one small attention: nothing is repeated
            x = F.scaled_dot_product_attention(q.view(B, k.shape[1], -1, self.head_dim), k, v, attn_mask=mask)
            return self.o_proj(x.reshape(B, 1, self.o_proj.in_features))
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None,
                                           enable_gqa=q.shape[1] != k.shape[1])
        return self.o_proj(x.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, c: LlamaConfig):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, c: LlamaConfig, layer: int):
        super().__init__()
        self.self_attn, self.mlp = Attention(c, layer), MLP(c)
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, x: Tensor, *context) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), *context)
        return x + self.mlp(self.post_attention_layernorm(x))


def project(hidden: Tensor, rows: Tensor) -> Tensor:
    """hidden (..., D), rows (V, D) -> logits (..., V) in fp32: in bf16 the two best are often the same number."""
    if rows.dtype == torch.float32:
        return F.linear(hidden, rows)
    return torch.cat([F.linear(hidden.float(), part.float()) for part in rows.split(16384)], -1)


class Llama(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.model = nn.ModuleDict({                                              # the prefix Hugging Face's names have
            "embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size),
            "layers": nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers)),
            "norm": RMSNorm(config.hidden_size, config.rms_norm_eps)})
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.source: Path | None = None                                           # folder whose tokenizer is saved along
        self.checkpointing = False                                                # keep only the blocks' inputs for the backward pass
        for name, p in self.named_parameters():                                   # GPT-2's initialization
            if p.ndim == 2:
                out = name.endswith(("o_proj.weight", "down_proj.weight"))        # what is added to the residual stream
                nn.init.normal_(p, std=0.02 / (math.sqrt(2 * config.num_hidden_layers) if out else 1))
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    @property
    def head(self) -> Tensor:
        """Output matrix (V, D)."""
        return self.model["embed_tokens"].weight if self.config.tie_word_embeddings else self.lm_head.weight

    @property
    def first_code(self) -> int:
        """The id of visual code 0; code c has id first_code + c."""
        return self.config.vocab_size - self.config.n_visual

    def forward(self, ids: Tensor, cache: Cache | None = None) -> Tensor:
        """ids (B, S) -> hidden states (B, S, D). With a cache, ids continue what is in it, and are added to it."""
        start, S = (cache.length if cache else 0), ids.shape[1]
        if cache and start + S > cache.capacity:
            raise ValueError(f"{start + S} tokens do not fit a cache of {cache.capacity}")
        fixed = cache is not None and cache.position is not None                  # shapes may not change: see Cache
        position = cache.position if fixed else torch.arange(start, start + S, device=ids.device)        # (S,)
        # computed here and not kept in a buffer, which would be cast to bf16 together with the weights
        angle = (position[:, None] * rope_frequencies(self.config, ids.device)).repeat(1, 2)             # (S, d)
        cos, sin = angle.cos(), angle.sin()
        x = self.model["embed_tokens"](ids)                                       # (B, S, D)
        mask = None                                                               # plain causal, or a single query
        if fixed or (start and S > 1):
            seen = cache.capacity if fixed else start + S
            mask = torch.arange(seen, device=ids.device) <= position[:, None]     # (S, seen)
        for block in self.model["layers"]:
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, cos, sin, cache, mask, use_reentrant=False)
            else:
                x = block(x, cos, sin, cache, mask)
        if fixed:
            cache.position += 1
        elif cache:
            cache.length += S
        return self.model["norm"](x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Over the whole vocabulary: hidden (..., D) -> (..., vocab_size), fp32."""
        return project(hidden, self.head)

    def visual_logits(self, hidden: Tensor) -> Tensor:
        """Over the visual codes only: hidden (..., D) -> (..., n_visual), fp32."""
        return project(hidden, self.head[self.first_code:])

    @torch.no_grad()
    def extend(self, n: int) -> None:
        """Appends n rows to embedding and head (one matrix when tied), drawn at the mean and spread of the rows there are."""
        if self.config.n_visual or n < 1:
            raise ValueError(f"{n} rows asked for, {self.config.n_visual} visual codes there already")
        generator = torch.Generator().manual_seed(0)

        def more(weight: Tensor) -> nn.Parameter:
            mean = weight.mean(0, dtype=torch.float32)                            # (D,)
            square = torch.linalg.vector_norm(weight, dim=0, dtype=torch.float32).square() / len(weight)
            noise = torch.randn(n, weight.shape[1], generator=generator).to(weight.device)
            new = mean + (square - mean.square()).clamp(min=0).sqrt() * noise     # (n, D)
            return nn.Parameter(torch.cat([weight, new.to(weight.dtype)]), requires_grad=weight.requires_grad)
        self.model["embed_tokens"].weight = more(self.model["embed_tokens"].weight)
        if not self.config.tie_word_embeddings:
            self.lm_head.weight = more(self.lm_head.weight)
        self.config = dataclasses.replace(self.config, vocab_size=self.config.vocab_size + n, n_visual=n)

    def save(self, folder, shard_bytes: int = 10 ** 15) -> None:
        """
        A folder that `transformers` opens: config.json, generation_config.json, model.safetensors (above shard_bytes:
        shards and their index; the stages look for the one file, however large), and the tokenizer's files of the folder
        the model was loaded from. All is written aside and then renamed, an index last, so that a save broken off never
        leaves old and new tensors mixed.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        shards, size = [{}], 0
        for name, tensor in self.state_dict().items():
            if shards[-1] and size + tensor.nbytes > shard_bytes:
                shards.append({})
                size = 0
            shards[-1][name] = tensor
            size += tensor.nbytes
        names = [WEIGHTS] if len(shards) == 1 else \
            [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
        special = {k: v for k in ("bos_token_id", "eos_token_id") if (v := getattr(self.config, k)) is not None}
        dtype = str(self.head.dtype).removeprefix("torch.")
        texts = {"config.json": self.config.to_json() | {"dtype": dtype, "torch_dtype": dtype},
                 "generation_config.json": {"_from_model_config": True} | special}
        if len(shards) > 1:
            texts[INDEX] = {"metadata": {"total_size": sum(t.nbytes for t in self.state_dict().values())},
                            "weight_map": {key: name for name, shard in zip(names, shards) for key in shard}}
        for name, shard in zip(names, shards):
            _write(shard, folder / (name + ".part"))
        for name, content in texts.items():
            (folder / (name + ".part")).write_text(json.dumps(content, indent=2) + "\n")
        copied = {} if self.source in (None, folder.resolve()) else \
            {name: path for name in TOKENIZER_FILES
             for path in (self.source / "original" / name, self.source / name) if path.exists()}
        for name, path in copied.items():
            shutil.copyfile(path, folder / (name + ".part"))
        if len(shards) > 1:
            (folder / INDEX).unlink(missing_ok=True)                              # until all shards are new
        for name in (*names, *copied, *texts):
            os.replace(folder / (name + ".part"), folder / name)
        for path in folder.iterdir():                                             # of an earlier save in other shards
            if re.fullmatch(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?(\.part)?", path.name) \
                    and path.name not in (*names, *texts):
                path.unlink()

    @classmethod
    def load(cls, folder, dtype: torch.dtype | None = None, device=None, n_visual: int = 0,
             check_finite: bool = True) -> "Llama":
        """
        Opens a folder in Hugging Face's or Meta's layout, tensor by tensor: at its peak the device holds the model and
        one tensor more. dtype: None keeps that of the file's first tensor. n_visual > 0 appends that many rows for visual
        codes, unless the folder has them already. check_finite looks for NaN and infinity in every tensor.

        Raises ValueError that names file and tensor for what is missing, left over, misshapen or not finite.
        """
        folder = Path(folder)
        config, tensors = _open(folder)
        if n_visual and config.n_visual not in (0, n_visual):
            raise ValueError(f"{folder} has {config.n_visual} visual codes already; {n_visual} were asked for")
        with torch.device("meta"):
            model = cls(config)
        missing = dict(model.named_parameters())
        for path, name, value in tensors:
            if name not in missing:
                raise ValueError(f"{path} holds {name}, which this model does not have (or has already)")
            if value.shape != missing[name].shape:
                raise ValueError(f"{path}: {name} is {tuple(value.shape)}, {folder.name}'s config asks for "
                                 f"{tuple(missing[name].shape)}")
            if value.dtype not in (torch.float32, torch.bfloat16, torch.float16):
                raise ValueError(f"{path}: {name} is {value.dtype}; only float32, bfloat16 and float16 are supported")
            dtype = dtype or value.dtype
            value = value.to(device or "cpu", dtype, copy=True)                   # a copy: no tie to the file
            if check_finite and not torch.isfinite(value).all():
                raise ValueError(f"{path}: {name} holds NaN or infinity (in {value.dtype})")
            module, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(module), leaf, nn.Parameter(value))
            del missing[name], value
        if missing:
            raise ValueError(f"{folder} lacks {len(missing)} tensors, the first of them {min(missing)}")
        model.source = folder.resolve()
        if n_visual and not config.n_visual:
            model.extend(n_visual)
        return model


# ------------------------------------------------------------------ files

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt",
                   "special_tokens_map.json", "added_tokens.json")


def _write(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        save_file({k: v.detach().contiguous().cpu() for k, v in tensors.items()}, path, {"format": "pt"})
    except SafetensorError as error:                                              # a full disk, for one
        raise OSError(f"{path} cannot be written ({error})") from None
    umask = os.umask(0)
    os.umask(umask)
    os.chmod(path, 0o666 & ~umask)                                                # safetensors writes 0600
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be used ({error}): is this a Llama or Qwen2 folder?") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} cannot be used: it holds no JSON object")
    return content


def _config(folder: Path) -> LlamaConfig:
    raw = _json(folder / "config.json")
    try:
        return LlamaConfig.from_json(raw)
    except KeyError as error:
        raise ValueError(f"{folder}/config.json lacks {error}") from None
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise ValueError(f"{folder}/config.json: {error}") from None


def read_config(folder) -> LlamaConfig:
    """The shape of the model in a folder, without its weights. Raises ValueError as Llama.load does."""
    return _open(Path(folder))[0]


def _open(folder: Path) -> tuple[LlamaConfig, Iterator[tuple[Path, str, Tensor]]]:
    is_meta = (folder / "params.json").exists() and not (folder / "config.json").exists()
    return _meta(folder) if is_meta else _hugging_face(folder)


def _hugging_face(folder: Path) -> tuple[LlamaConfig, Iterator[tuple[Path, str, Tensor]]]:
    """-> config; (file, name, tensor) one after the other, mapped from the file and not yet read."""
    config = _config(folder)
    shards: dict[Path, list[str]] = {folder / WEIGHTS: []}                        # no names: all there are
    if (folder / INDEX).exists():
        shards, listed = {}, _json(folder / INDEX).get("weight_map")
        if not isinstance(listed, dict) or not listed:
            raise ValueError(f"{folder / INDEX} cannot be used: it has no weight_map")
        for name, shard in listed.items():
            if not isinstance(shard, str) or Path(shard).name != shard:
                raise ValueError(f"{folder / INDEX} points outside its folder: {shard!r}")
            if not (folder / shard).exists():
                raise ValueError(f"{folder / shard} is missing; {INDEX} lists it")
            shards.setdefault(folder / shard, []).append(name)

    def tensors():
        for path, names in shards.items():
            try:
                with safe_open(path, "pt") as file:
                    for name in sorted({*names, *file.keys()}):
                        if names and name not in names:
                            raise ValueError(f"{path} holds {name}, which {INDEX} does not list there")
                        tied = name == "lm_head.weight" and config.tie_word_embeddings
                        if not tied and not name.endswith("rotary_emb.inv_freq"):     # both repeat what is known
                            yield path, name, file.get_tensor(name)
            except (OSError, SafetensorError) as error:
                raise ValueError(f"{path} cannot be read ({error})") from None
    return config, tensors()


META = {"attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj", "attention.wv": "self_attn.v_proj",
        "attention.wo": "self_attn.o_proj", "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj",
        "feed_forward.w3": "mlp.up_proj", "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
        "tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}


def _meta(folder: Path) -> tuple[LlamaConfig, Iterator[tuple[Path, str, Tensor]]]:
    """The same for Meta's layout, whose rotary pairs are neighbours (2i, 2i + 1): rows of q and k are put in our order."""
    params, path = _json(folder / "params.json"), folder / "consolidated.00.pth"
    if len(files := sorted(folder.glob("consolidated.*.pth"))) > 1:
        raise ValueError(f"{folder} is split for {len(files)} GPUs ({files[-1].name}): convert it to Hugging Face's layout")
    try:
        weights = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} cannot be read as plain weights ({str(error).splitlines()[0]})") from None
    if not isinstance(weights, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in weights.items()):
        raise ValueError(f"{path} is not a dictionary of tensors")
    if "tok_embeddings.weight" not in weights:
        raise ValueError(f"{path} lacks tok_embeddings.weight: it is not a whole Llama")
    try:
        config = LlamaConfig.from_meta(params, len(weights["tok_embeddings.weight"]))
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ValueError(f"{folder}/params.json cannot be used ({type(error).__name__}: {error})") from None

    def tensors():
        for theirs, value in weights.items():
            if theirs == "rope.freqs":
                continue
            found = re.fullmatch(r"(layers\.\d+\.)?(.+)\.weight", theirs)
            layer, stem = found.groups() if found else ("", theirs)
            if stem not in META:
                raise ValueError(f"{path} holds {theirs}, which this model does not have")
            name = f"model.{layer}{META[stem]}.weight" if layer else f"{META[stem]}.weight"
            if stem in ("attention.wq", "attention.wk") and value.ndim == 2 and value.shape[0] % config.head_dim == 0:
                value = value.view(-1, config.head_dim // 2, 2, value.shape[1]).transpose(1, 2).reshape(value.shape)
            yield path, name, value
    return config, tensors()


# ------------------------------------------------------------------ the policy


def truncate(logits: Tensor, top_k: int = 50, top_p: float = 0.95) -> Tensor:
    """
    The support: which codes may be drawn. logits (..., V) -> bool (..., V).

    The top_k most likely, and of these the fewest that hold top_p of their probability. Ties go to the lower index; at
    least one code stays. top_k = 1 is temperature 0.
    """
    ordered, index = logits.float().sort(dim=-1, descending=True, stable=True)
    ordered = ordered.masked_fill(torch.arange(logits.shape[-1], device=logits.device) >= max(top_k, 1), -torch.inf)
    p = ordered.softmax(-1)
    short = (p.cumsum(-1) - p < top_p) | (top_p >= 1)                             # the probability before it is short
    keep = short & (ordered > -torch.inf)
    keep[..., 0] = True
    return torch.zeros_like(keep).scatter(-1, index, keep)


def logprobs(logits: Tensor, codes: Tensor, support: Tensor) -> Tensor:
    """log pi(code): logits (..., V), codes (...), support (..., V) -> (...), the log-softmax over the support. fp32."""
    logp = logits.float().masked_fill(~support, -torch.inf).log_softmax(-1)
    return logp.gather(-1, codes[..., None])[..., 0]


def draw(logits: Tensor, support: Tensor, generator: torch.Generator | list[torch.Generator] | None = None) -> Tensor:
    """
    One code from the policy: logits, support (..., V) -> (...). The largest p / Exponential(1): no host sync.
    Of a list of generators each draws for an equal share of the rows.
    """
    p = logits.float().masked_fill(~support, -torch.inf).softmax(-1)
    noise = torch.empty_like(p)
    several = generator if isinstance(generator, list) else [generator]
    for part, g in zip(noise.chunk(len(several)), several):
        part.exponential_(generator=g)
    return (p / noise).argmax(-1)


def _check_length(config: LlamaConfig, S: int, n: int) -> None:
    if min(S, n) < 1:
        raise ValueError(f"a prompt of {S} tokens and {n} new ones: at least one of each")
    if S + n > config.max_position_embeddings:
        raise ValueError(f"prompt of {S} + {n} new tokens: this model's context is {config.max_position_embeddings}")


@torch.no_grad()
def generate(model: Llama, prompt: Tensor, n: int, group: int = 1, top_k: int = 50, top_p: float = 0.95,
             generator: torch.Generator | list[torch.Generator] | None = None) -> tuple[Tensor, Tensor]:
    """
    Samples n visual codes after each prompt, `group` times. With a generator for each prompt, in a list, what one of them
    is given does not depend on which others are in the batch.

    prompt (B, S) ids -> codes (B, G, n) in [0, n_visual), support (B, G, n, n_visual) the codes each was drawn from.
    A prompt is read once for its whole group. Raises ValueError for a model without visual codes, and for more tokens
    than its context holds.
    """
    c = model.config
    if not c.n_visual:
        raise ValueError("this model has no visual codes: load it with n_visual=256")
    B, S = prompt.shape
    if min(B, group) < 1:
        raise ValueError(f"{B} prompts, group of {group}: at least one of each")
    _check_length(c, S, n)
    cache = Cache(c, B, S + n, prompt.device, model.head.dtype)
    hidden = model(prompt, cache)[:, -1]                                          # (B, D)
    cache, hidden = cache.expand(group), hidden.repeat_interleave(group, 0)       # B -> B G
    codes = torch.empty(B * group, n, dtype=torch.int64, device=prompt.device)
    support = torch.empty(B * group, n, c.n_visual, dtype=torch.bool, device=prompt.device)
    logits = model.visual_logits(hidden)                                          # (B G, V)
    step = decode_step(model, cache, model.visual_logits)
    for i in range(n):                                                            # nothing here waits for the device
        support[:, i] = truncate(logits, top_k, top_p)
        codes[:, i] = draw(logits, support[:, i], generator)
        if i + 1 < n:
            logits = step(model.first_code + codes[:, i:i + 1])
    return codes.view(B, group, n), support.view(B, group, n, -1)


def decode_step(model: Llama, cache: Cache, head: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """
    ids (B, 1) -> logits (B, V) of the next token, by `head` (visual_logits, or logits), one token further in the cache.

    On CUDA the step's some hundred kernels are captured in a graph and replayed with one launch; the result is
    overwritten by the next call. Capturing takes about as long as ten steps.
    """
    @torch.no_grad()
    def step(ids: Tensor) -> Tensor:
        return head(model(ids, cache)[:, -1])
    if not cache.kv.is_cuda or cache.length == cache.capacity:
        return step
    with torch.cuda.device(cache.kv.device):
        cache.position = torch.tensor([cache.length], device=cache.kv.device)
        ids = torch.zeros(cache.kv.shape[2], 1, dtype=torch.int64, device=cache.kv.device)
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):                    # before capture, libraries allocate their workspaces
            step(ids)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = step(ids)
        cache.position.fill_(cache.length)                # what the warm-up wrote lies beyond, masked until overwritten

    def replay(new: Tensor) -> Tensor:
        if cache.length == cache.capacity:
            raise ValueError(f"{cache.length + 1} tokens do not fit a cache of {cache.capacity}")
        cache.length += 1
        ids.copy_(new)
        graph.replay()
        return logits
    return replay


@torch.no_grad()
def continuation(model: Llama, prompt: list[int], n: int, top_k: int = 50, top_p: float = 0.95,
                 generator: torch.Generator | None = None, words: int | None = None) -> Iterator[int]:
    """
    Up to n further ids of a text, one by one, drawn from the full head (its first `words` rows: behind the tokenizer's
    vocabulary come padding and visual codes). Ends before an end-of-text token.
    """
    _check_length(model.config, len(prompt), n)
    device, eos = model.head.device, model.config.eos_token_id
    ends = eos if isinstance(eos, list) else [eos]
    cache = Cache(model.config, 1, len(prompt) + n, device, model.head.dtype)
    logits = model.logits(model(torch.tensor([prompt], device=device), cache)[:, -1])             # (1, V)
    step = decode_step(model, cache, model.logits)
    for i in range(n):
        logits = logits[:, :words]
        new = draw(logits, truncate(logits, top_k, top_p), generator)             # (1,)
        if (token := new.item()) in ends:
            return
        yield token
        if i + 1 < n:
            logits = step(new[None])


# ------------------------------------------------------------------ text


WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
         r"|\s+(?!\S)|\s+")            # %s: how many digits make a word, {1,3} for Llama 3, one for Qwen
LLAMA3_SPECIAL = ["begin_of_text", "end_of_text", "reserved_special_token_0", "reserved_special_token_1",
                  "finetune_right_pad_id", "reserved_special_token_2", "start_header_id", "end_header_id", "eom_id",
                  "eot_id", "python_tag"] + [f"reserved_special_token_{i}" for i in range(3, 248)]
QWEN_SPECIAL = ["endoftext", "im_start", "im_end"]


def _behind(ranks: dict[bytes, int], names: list[str]) -> dict[str, int]:
    return {f"<|{name}|>": len(ranks) + i for i, name in enumerate(names)}


class Tokenizer:
    """
    Text <-> ids, from the files that come with the weights, told apart by what is in them:
    tokenizer.model of Llama 3 (lines of base64 token and rank) or Llama 2 (sentencepiece), vocab.json + merges.txt (Qwen),
    or tokenizer.json. The visual codes are the special tokens <|code_0|> .. <|code_255|> behind the model's vocabulary.
    """

    def __init__(self, ranks: dict[bytes, int] | None, sp=None, special: dict[str, int] = {}, digits: str = "",
                 nfc: bool = False, bos: int | None = None, first_code: int | None = None, n_visual: int = 256):
        """Either ranks and special tokens (byte-level BPE, by tiktoken) or sp, a SentencePieceProcessor."""
        self.sp, self.nfc, self.bos = sp, nfc, bos
        self.ids = {*range(sp.vocab_size() if sp else len(ranks)), *special.values()}
        self.size = max(self.ids) + 1
        self.first_code = self.size if first_code is None else first_code
        if self.first_code < self.size:
            raise ValueError(f"the tokenizer has {self.size} tokens, the model's vocabulary only {self.first_code}")
        self.codes = {f"<|code_{i}|>": self.first_code + i for i in range(n_visual)}
        self.ids |= {*self.codes.values()}
        if ranks:
            self.bpe = tiktoken.Encoding("text", pat_str=WORDS % digits, mergeable_ranks=ranks,
                                         special_tokens=special | self.codes)

    @classmethod
    def load(cls, folder) -> "Tokenizer":
        """The tokenizer of a model's folder. Raises ValueError that names the file for what is missing or broken."""
        folder, place, bos = Path(folder), {}, None
        if (folder / "config.json").exists():
            config = _config(folder)
            place, bos = {"first_code": config.vocab_size - config.n_visual}, config.bos_token_id
            place |= {"n_visual": config.n_visual} if config.n_visual else {}
        if (path := folder / "tokenizer.model").exists() or (path := folder / "original" / "tokenizer.model").exists():
            content = path.read_bytes()
            if re.match(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n", content):
                ranks = _ranks(path)
                if place and len(ranks) + 256 != place["first_code"]:
                    raise ValueError(f"{path} has {len(ranks)} tokens, this model's vocabulary {place['first_code']} less 256 "
                                     "special ones: it is not whole, or another model's")
                return cls(ranks, special=_behind(ranks, LLAMA3_SPECIAL), digits="{1,3}", bos=len(ranks), **place)
            try:
                sp = sentencepiece.SentencePieceProcessor()
                sp.LoadFromSerializedProto(content)
            except (OSError, RuntimeError, TypeError) as error:
                raise ValueError(f"{path} is neither a tiktoken nor a sentencepiece file ({error})") from None
            return cls(None, sp, bos=sp.bos_id() if sp.bos_id() >= 0 else None, **place)
        if (folder / "vocab.json").exists():
            merges = [line for line in _text(folder / "merges.txt").splitlines() if line and not line.startswith("#version")]
            ranks = _bpe_ranks(folder / "vocab.json", _json(folder / "vocab.json"), merges)
            if len(set(merges)) + 256 != len(ranks):
                raise ValueError(f"{folder / 'merges.txt'} makes {len(set(merges))} of {len(ranks) - 256} tokens: it is not whole")
            special = _behind(ranks, QWEN_SPECIAL)
            if (path := folder / "tokenizer_config.json").exists():
                try:
                    special |= {v["content"]: int(k) for k, v in _json(path).get("added_tokens_decoder", {}).items()}
                except (KeyError, TypeError, ValueError, AttributeError) as error:
                    raise ValueError(f"{path}: added_tokens_decoder cannot be used ({error})") from None
            return cls(ranks, special=special, nfc=True, **place)
        if (path := folder / "tokenizer.json").exists():
            raw = _json(path)
            try:
                split, nfc = json.dumps(raw.get("pre_tokenizer")), "NFC" in json.dumps(raw.get("normalizer"))
                if raw["model"].get("type", "BPE") != "BPE" or r"p{N}" not in split:
                    raise ValueError("its model is no BPE, or its words are not Llama 3's or Qwen's")
                special = {token["content"]: token["id"] for token in raw.get("added_tokens") or []}
                vocab = {token: i for token, i in raw["model"]["vocab"].items() if token not in special}
                ranks = _bpe_ranks(path, vocab, raw["model"]["merges"])
                llama3 = "{1,3}" in split
                return cls(ranks, special=special, digits="{1,3}" if llama3 else "", nfc=nfc, bos=bos if llama3 else None, **place)
            except (KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{path} is not a byte-level BPE tokenizer ({type(error).__name__}: {error})") from None
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from None
        raise ValueError(f"{folder} holds no tokenizer: tokenizer.model, vocab.json + merges.txt or tokenizer.json")

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """Ids of a text. `bos`: begins with the begin-of-text token, where the model was trained with one."""
        start = [self.bos] if bos and self.bos is not None else []
        text = unicodedata.normalize("NFC", text) if self.nfc else text
        if not self.sp:
            return start + self.bpe.encode(text, allowed_special="all")
        parts = re.split(r"(<\|code_\d+\|>)", text)
        return start + [i for part in parts if part
                        for i in ([self.codes[part]] if part in self.codes else self.sp.encode(part))]

    def decode(self, ids: list[int]) -> str:
        """The text of ids; bytes that are no UTF-8 become U+FFFD. Raises ValueError for an id nothing stands for."""
        if unknown := [i for i in ids if i not in self.ids]:
            raise ValueError(f"id {unknown[0]} stands for no token")
        if not self.sp:
            return self.bpe.decode(ids)
        names, text, run = {i: name for name, i in self.codes.items()}, "", []
        for i in [*ids, None]:
            if i in names or i is None:
                text, run = text + self.sp.decode(run) + names.get(i, ""), []
            else:
                run.append(i)
        return text


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read ({error})") from None


def _complete(path: Path, ranks: dict[bytes, int]) -> dict[bytes, int]:
    """tiktoken panics (not an Exception) on a vocabulary that cannot spell every byte: look first."""
    if len(lost := [b for b in range(256) if bytes([b]) not in ranks]):
        raise ValueError(f"{path} lacks {len(lost)} of the 256 single bytes, the first of them {lost[0]}: it is not whole")
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError(f"{path}: ranks are not 0..{len(ranks) - 1}, each once: it is not whole")
    return ranks


def _ranks(path: Path) -> dict[bytes, int]:
    """Llama 3's tokenizer.model: a base64 token and its rank a line."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(_text(path).splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            raise ValueError(f"{path}, line {number}: {line[:40]!r} is not a base64 token and its rank") from None
    return _complete(path, ranks)


def _bpe_ranks(path: Path, vocab: dict[str, int], merges: list) -> dict[bytes, int]:
    """
    GPT-2's spelling to tiktoken's. There every byte is written as a printable character, and pairs are merged in the
    order of `merges`; tiktoken merges the pair whose result has the lowest rank: the same when ids follow that order.
    (Llama 3's tokenizer.json lists every way to split a token, one after the other.)
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    byte = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
    try:
        ranks = {bytes(byte[c] for c in token): i for token, i in vocab.items()}
        pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in merges]
        order = [vocab[left + right] for left, right in pairs]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} and its merges do not fit together ({error})") from None
    if order != sorted(order):
        raise ValueError(f"{path}: its ids do not follow the order of the merges")
    return _complete(path, ranks)


# ------------------------------------------------------------------ python lm.py --llm DIR


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="What is in a folder of weights, and how it continues a text.")
    parser.add_argument("--llm", required=True, metavar="DIR", help="Hugging Face's or Meta's layout")
    parser.add_argument("--prompt", default="The speed of light is")
    parser.add_argument("--tokens", type=int, default=50)
    parser.add_argument("--top_k", type=int, default=50)
    parser.add_argument("--top_p", type=float, default=0.95)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: the file's")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    a = parser.parse_args(argv)
    try:
        model = Llama.load(a.llm, getattr(torch, a.dtype) if a.dtype else None, a.device).requires_grad_(False)
        c, weights = model.config, list(model.parameters())
        kv = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * model.head.element_size()
        print(f"{'Qwen2' if c.attention_bias else 'Llama'}: {c.num_hidden_layers} layers of width {c.hidden_size}, feed-forward "
              f"{c.intermediate_size}, {c.num_attention_heads} heads on {c.num_key_value_heads} of keys and values, vocabulary "
              f"{c.vocab_size}" + (f" ({c.n_visual} of them visual codes)" if c.n_visual else "")
              + (", tied" if c.tie_word_embeddings else ""))
        print(f"{sum(p.numel() for p in weights):,} parameters, {sum(p.nbytes for p in weights) / 2 ** 30:.2f} GiB in "
              f"{str(model.head.dtype).removeprefix('torch.')} on {a.device}; cache {kv / 2 ** 10:.0f} KiB a token; context "
              f"{c.max_position_embeddings}")
        tokenizer = Tokenizer.load(a.llm)
        print(f"tokenizer: {'sentencepiece' if tokenizer.sp else 'byte-level BPE'}, {tokenizer.size} tokens; "
              f"{len(tokenizer.codes)} codes from id {tokenizer.first_code}\n")
        ids = tokenizer.encode(a.prompt)
        generator = torch.Generator(a.device).manual_seed(a.seed)
        new = list(continuation(model, ids, a.tokens, a.top_k, a.top_p, generator, tokenizer.size))
        print(tokenizer.decode(ids + new))
    except (ValueError, RuntimeError, AssertionError) as error:                   # torch without CUDA asserts it
        print(f"lm.py: {str(error).splitlines()[0]}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
