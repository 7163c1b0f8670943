"""
The language model: Llama (and Qwen2) written out, weights in and out, a key-value cache, and the sampling of codes.

Source: Phys-AR section 3.3 and 4.1. A Llama whose vocabulary is extended by the 256 visual codes predicts the codes of the
next frames; the logits of all text words are masked before sampling; top-k 50, top-p 0.95.

Choices where the paper is silent
1. Names and layout of parameters are Hugging Face's (rotary halves, not pairs): folders load and save without permuting.
2. The visual codes are the last `n_visual` rows of the vocabulary, and `visual_logits` multiplies by these rows only. That
   is masking the text words, without computing them first (they are 99.8 % of Llama 3's head).
3. One definition of the policy. `truncate` says which codes may be drawn (the support), `logprobs` the log-probability of
   a code within it. Sampler and trainer call the same two, and the sampler hands its support on. So the ratio of
   new and old policy is exactly 1 before the first update, also under top-k and top-p.

Axes: B batch, G group (samples per prompt), S sequence, D width, H heads, V vocabulary or visual codes.
"""
import dataclasses
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

# ------------------------------------------------------------------ config


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
    bos_token_id: int = 0
    eos_token_id: int | None = None
    max_position_embeddings: int = 8192
    n_visual: int = 0                       # the last rows of the vocabulary are visual codes

    @classmethod
    def from_json(cls, raw: dict) -> "LlamaConfig":
        """config.json of Llama or Qwen2 in either spelling: rope_theta + rope_scaling, or rope_parameters."""
        kind = raw.get("model_type")
        if kind not in ("llama", "qwen2"):
            raise ValueError(f"model_type {kind!r} is not supported: use a Llama or Qwen2 folder")
        rope = raw.get("rope_parameters") or {"rope_theta": raw.get("rope_theta")} | (raw.get("rope_scaling") or {})
        if rope.get("rope_theta") is None:
            raise ValueError("config.json has neither rope_theta nor rope_parameters: the rotary base is unknown")
        scaling = {("rope_type" if k == "type" else k): v for k, v in rope.items() if k != "rope_theta"}
        if scaling.get("rope_type", "default") not in ("default", "llama3"):
            raise ValueError(f"rope_type {scaling['rope_type']!r} is not supported: default or llama3")
        heads = raw["num_attention_heads"]
        bos, eos = (x[0] if isinstance(x := raw.get(f"{name}_token_id"), list) else x for name in ("bos", "eos"))
        return cls(raw["vocab_size"], raw["hidden_size"], raw["intermediate_size"], raw["num_hidden_layers"], heads,
                   raw.get("num_key_value_heads") or heads, raw.get("head_dim") or raw["hidden_size"] // heads,
                   raw["rms_norm_eps"], rope["rope_theta"], scaling if scaling.get("rope_type") == "llama3" else None,
                   raw.get("tie_word_embeddings", False), raw.get("attention_bias", kind == "qwen2"), bos or 0, eos,
                   raw.get("max_position_embeddings", 8192), raw.get("n_visual", 0))

    def to_json(self) -> dict:
        raw = dataclasses.asdict(self)
        qwen = raw.pop("attention_bias")
        raw |= {"model_type": "qwen2" if qwen else "llama", "hidden_act": "silu", "use_cache": True,
                "architectures": ["Qwen2ForCausalLM" if qwen else "LlamaForCausalLM"]}
        raw["rope_parameters"] = {"rope_type": "default"} | (self.rope_scaling or {}) | {"rope_theta": self.rope_theta}
        return raw


# ------------------------------------------------------------------ model


def rope_frequencies(config: LlamaConfig) -> Tensor:
    """Angle per position and pair of channels (head_dim / 2,), fp32; Llama 3.1 stretches the slow ones."""
    f = config.rope_theta ** (-torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim)
    if s := config.rope_scaling:
        factor, low, high = s["factor"], s["low_freq_factor"], s["high_freq_factor"]
        wavelength = 2 * math.pi / f
        smooth = (s["original_max_position_embeddings"] / wavelength - low) / (high - low)
        f = torch.lerp(f / factor, f, smooth.clamp(0, 1))
    return f


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position: x (B, H, S, d), cos and sin (S, d). Channel i turns with channel i + d/2."""
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat([-right, left], -1) * sin


class Cache:
    """Keys and values of every layer, allocated once: (layers, 2, B, kv heads, capacity, d)."""

    def __init__(self, config: LlamaConfig, batch: int, capacity: int, device=None, dtype=None):
        self.kv = torch.zeros(config.num_hidden_layers, 2, batch, config.num_key_value_heads, capacity, config.head_dim,
                              device=device, dtype=dtype)
        self.length = 0

    def write(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """k, v (B, H, S, d) of the newest positions -> those of all positions so far."""
        end = self.length + k.shape[2]
        self.kv[layer, 0, :, :, self.length:end] = k
        self.kv[layer, 1, :, :, self.length:end] = v
        return self.kv[layer, 0, :, :, :end], self.kv[layer, 1, :, :, :end]

    def expand(self, group: int) -> "Cache":
        """Every sequence `group` times: one prefill serves all samples of a prompt."""
        other = object.__new__(Cache)
        other.kv, other.length = self.kv.repeat_interleave(group, 2), self.length
        return other


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:                                       # in fp32 whatever x is
        h = x.float()
        return self.weight * (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


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
        q, k, v = (f(x).view(B, S, -1, self.head_dim).transpose(1, 2)             # (B, H, S, d)
                   for f in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.write(self.layer, k, v)                                  # (B, H_kv, length + S, d)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and S > 1,
                                           enable_gqa=q.shape[1] != k.shape[1])
        return self.o_proj(x.transpose(1, 2).reshape(B, S, -1))


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
        self.register_buffer("frequencies", rope_frequencies(config), persistent=False)
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
        if cache and start + S > cache.kv.shape[4]:
            raise ValueError(f"{start + S} tokens do not fit a cache of {cache.kv.shape[4]}")
        position = torch.arange(start, start + S, device=ids.device)
        angle = (position[:, None] * self.frequencies.float()).repeat(1, 2)       # (S, d)
        x = self.model["embed_tokens"](ids)                                       # (B, S, D)
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        mask = None                                                               # plain causal, or a single query
        if start and S > 1:
            mask = torch.arange(start + S, device=ids.device) <= position[:, None]        # (S, start + S)
        for block in self.model["layers"]:
            x = block(x, cos, sin, cache, mask)
        if cache:
            cache.length += S
        return self.model["norm"](x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Over the whole vocabulary: hidden (..., D) -> (..., vocab_size)."""
        return F.linear(hidden, self.head)

    def visual_logits(self, hidden: Tensor) -> Tensor:
        """Over the visual codes only: hidden (..., D) -> (..., n_visual)."""
        return F.linear(hidden, self.head[self.first_code:])

    def save(self, folder) -> None:
        """A Hugging Face folder: config.json and model.safetensors, each written aside and renamed."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, write in (("config.json", lambda p: p.write_text(json.dumps(self.config.to_json(), indent=2) + "\n")),
                            ("model.safetensors", self._write)):
            aside = folder / (name + ".part")
            write(aside)
            os.replace(aside, folder / name)

    def _write(self, path: Path) -> None:
        save_file({k: v.detach().contiguous().cpu() for k, v in self.state_dict().items()}, path, {"format": "pt"})
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(path, 0o666 & ~umask)                                            # safetensors writes 0600
        with open(path, "rb") as file:
            os.fsync(file.fileno())

    @classmethod
    def load(cls, folder, dtype: torch.dtype | None = None, device=None, n_visual: int = 0) -> "Llama":
        """
        Opens a Hugging Face folder (one file or shards with an index). n_visual > 0 appends that many rows for visual
        codes, unless the folder has them already. dtype: None keeps the file's.
        Raises ValueError that names file and tensor for what is missing, left over, misshapen or not finite.
        """
        folder = Path(folder)
        try:
            config = LlamaConfig.from_json(json.loads((folder / "config.json").read_text()))
        except (OSError, KeyError, json.JSONDecodeError) as error:
            raise ValueError(f"{folder}/config.json cannot be used ({error}): is this a Llama or Qwen2 folder?") from None
        with torch.device("meta"):
            model = cls(config)
        missing = set(model.state_dict())
        for path, names in _shards(folder).items():
            try:
                with safe_open(path, "pt", device=str(device or "cpu")) as file:
                    for name in names or file.keys():
                        tied = name == "lm_head.weight" and config.tie_word_embeddings
                        if tied or name.endswith("rotary_emb.inv_freq"):              # nothing that is not elsewhere
                            continue
                        value = file.get_tensor(name)
                        module, _, leaf = name.rpartition(".")
                        if name not in missing:
                            raise ValueError(f"{path} holds {name}, which this model does not have")
                        expected = model.get_parameter(name).shape
                        if value.shape != expected:
                            raise ValueError(f"{path}: {name} is {tuple(value.shape)}, config.json asks for "
                                             f"{tuple(expected)}")
                        if not torch.isfinite(value).all():
                            raise ValueError(f"{path}: {name} holds NaN or infinity")
                        setattr(model.get_submodule(module), leaf, nn.Parameter(value.to(dtype) if dtype else value))
                        missing.remove(name)
            except (OSError, SafetensorError) as error:
                raise ValueError(f"{path} cannot be read ({error})") from None
        if missing:
            raise ValueError(f"{folder} lacks {len(missing)} tensors, the first of them {min(missing)}")
        model.frequencies = rope_frequencies(config).to(device or "cpu")
        if n_visual and not config.n_visual:
            model.extend(n_visual)
        return model

    @torch.no_grad()
    def extend(self, n: int) -> None:
        """Appends n rows to embedding and head, drawn at the mean and scale of the rows there are."""
        def more(weight: Tensor) -> nn.Parameter:
            rows, generator = weight.float().cpu(), torch.Generator().manual_seed(0)
            new = rows.mean(0) + rows.std(0) * torch.randn(n, rows.shape[1], generator=generator)
            return nn.Parameter(torch.cat([weight, new.to(weight)]))
        self.model["embed_tokens"].weight = more(self.model["embed_tokens"].weight)
        if not self.config.tie_word_embeddings:
            self.lm_head.weight = more(self.lm_head.weight)
        self.config = dataclasses.replace(self.config, vocab_size=self.config.vocab_size + n, n_visual=n)


def _shards(folder: Path) -> dict[Path, list[str]]:
    """Weight files of a folder -> the tensors to take from each (an empty list: all)."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return {folder / "model.safetensors": []}
    shards: dict[Path, list[str]] = {}
    try:
        listed = json.loads(index.read_text())["weight_map"]
    except (OSError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{index} cannot be used ({error})") from None
    for name, shard in listed.items():
        if Path(shard).name != shard:
            raise ValueError(f"{index} points outside its folder: {shard!r}")
        shards.setdefault(folder / shard, []).append(name)
    return shards


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


def draw(logits: Tensor, support: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """One code from the policy: logits, support (..., V) -> (...). The largest p / Exponential(1): no host sync."""
    p = logits.float().masked_fill(~support, -torch.inf).softmax(-1)
    return (p / torch.empty_like(p).exponential_(generator=generator)).argmax(-1)


@torch.no_grad()
def generate(model: Llama, prompt: Tensor, n: int, group: int = 1, top_k: int = 50, top_p: float = 0.95,
             generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """
    Samples n visual codes after each prompt, `group` times.

    prompt (B, S) ids -> codes (B, G, n) in [0, n_visual), support (B, G, n, n_visual) the codes each was drawn from.
    A prompt is read once for its whole group. Raises ValueError for a model without visual codes.
    """
    c = model.config
    if not c.n_visual:
        raise ValueError("this model has no visual codes: load it with n_visual=256")
    B, S = prompt.shape
    cache = Cache(c, B, S + n, prompt.device, model.head.dtype)
    hidden = model(prompt, cache)[:, -1]                                          # (B, D)
    cache, hidden = cache.expand(group), hidden.repeat_interleave(group, 0)       # B -> B G
    codes = torch.empty(B * group, n, dtype=torch.int64, device=prompt.device)
    support = torch.empty(B * group, n, c.n_visual, dtype=torch.bool, device=prompt.device)
    for i in range(n):
        logits = model.visual_logits(hidden)                                      # (B G, V)
        support[:, i] = truncate(logits, top_k, top_p)
        codes[:, i] = draw(logits, support[:, i], generator)
        if i + 1 < n:
            hidden = model(model.first_code + codes[:, i:i + 1], cache)[:, -1]
    return codes.view(B, group, n), support.view(B, group, n, -1)
