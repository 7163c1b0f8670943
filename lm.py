"""
The language model: a Llama (or Qwen2) with a key-value cache, the policy that samples visual
codes from it, and weights in and out.

Source: Phys-AR, sections 3.3 and 4.1. The vocabulary of a Llama is extended by 256 visual codes,
and the model predicts the codes of the next frames. The logits of all text words are masked before
sampling, which uses top-k 50 and top-p 0.95.

Choices where the paper is silent
1. Parameters are named and laid out as in Hugging Face transformers (rotary halves, not pairs).
2. The codes are the last `n_visual` ids. Computing only their logits masks all text words.
3. Sampler and trainer share `truncate` and `logprobs`: before an update their ratio is exactly 1.
4. New rows of embedding and head have the mean and standard deviation of the old, per column.

    from lm import Llama, generate
    model = Llama.load("Llama-3.1-8B", n_visual=256)          # Llama 2, 3, 3.1; Qwen2, Qwen2.5
    codes, support = generate(model, prompt, max_new_tokens=464, group=8)

`python text.py --llm DIR` shows whether weights are loaded correctly: it continues a text.

Axes: B batch, G group (samples per prompt), S sequence, T sampled tokens, D width, V visual codes
or vocabulary.
"""
import dataclasses
import json
import math
import os
import pickle
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as nnf
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# ------------------------------------------------------------------ config


LLAMA3 = {                                  # how Llama 3.1 stretches its rotary positions
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@dataclass
class LlamaConfig:
    """The architecture. Fields are named as in Hugging Face's config.json."""
    vocab_size: int                         # rows of embedding and head, visual codes included
    hidden_size: int                        # D
    intermediate_size: int                  # width of the MLP
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int                # fewer than attention heads: grouped-query attention
    head_dim: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 500000.0
    rope_scaling: dict | None = None        # None, or a dictionary with the keys of LLAMA3
    tie_word_embeddings: bool = False       # the head is the embedding
    attention_bias: bool = False            # biases of q, k and v, which Qwen2 has
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = None
    max_position_embeddings: int = 8192     # context length
    n_visual: int = 0                       # the last ids of the vocabulary are visual codes

    def __post_init__(self):
        def check(good: bool, name: str, wanted: str) -> None:
            if not good:
                raise ValueError(f"{name} = {getattr(self, name)!r}: it must be {wanted}")

        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                     "num_attention_heads", "num_key_value_heads", "head_dim",
                     "max_position_embeddings"):
            value = getattr(self, name)
            check(type(value) is int and value > 0, name, "a positive integer")
        for name in ("rms_norm_eps", "rope_theta"):
            value = getattr(self, name)
            check(isinstance(value, (int, float)) and value > 0, name, "a positive number")
        for name in ("tie_word_embeddings", "attention_bias"):
            check(isinstance(getattr(self, name), bool), name, "true or false")
        for name in ("bos_token_id", "eos_token_id"):
            value = getattr(self, name)
            ids = value if isinstance(value, list) else [0 if value is None else value]
            check(all(type(i) is int and i >= 0 for i in ids), name, "an id")
        scaling = self.rope_scaling or LLAMA3
        for key in LLAMA3.keys() - {"rope_type"}:
            good = isinstance(scaling.get(key), (int, float))
            check(good, "rope_scaling", f"given a number for {key}")
        codes = self.n_visual
        check(type(codes) is int and 0 <= codes <= self.vocab_size, "n_visual", "0 to vocab_size")
        check(self.head_dim % 2 == 0, "head_dim", "even")
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if heads % kv_heads:
            raise ValueError(f"{heads} heads on {kv_heads} of keys and values: must be a multiple")


CONFIGS = {
    # vocabulary, width, MLP, layers, heads, key-value heads, head_dim, eps, theta
    "llama-2-7b": LlamaConfig(
        32000, 4096, 11008, 32, 32, 32, 128, 1e-5, 1e4,
        bos_token_id=1, eos_token_id=2, max_position_embeddings=4096),
    "llama-3.1-8b": LlamaConfig(
        128256, 4096, 14336, 32, 32, 8, 128, 1e-5, 5e5, LLAMA3,
        bos_token_id=128000, eos_token_id=128001, max_position_embeddings=131072),
    "qwen2.5-1.5b": LlamaConfig(
        151936, 1536, 8960, 28, 12, 2, 128, 1e-6, 1e6,
        tie_word_embeddings=True, attention_bias=True,
        bos_token_id=151643, eos_token_id=151643, max_position_embeddings=131072),
    "qwen2.5-7b": LlamaConfig(
        152064, 3584, 18944, 28, 28, 4, 128, 1e-6, 1e6,
        attention_bias=True,
        bos_token_id=151643, eos_token_id=151643, max_position_embeddings=131072),
}


# ------------------------------------------------------------------ model


def rope_frequencies(config: LlamaConfig, device=None) -> Tensor:
    """Radians per position for each pair of channels (head_dim / 2,), fp32."""
    channel = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device)
    frequency = config.rope_theta ** (-channel / config.head_dim)
    scaling = config.rope_scaling
    if not scaling:
        return frequency
    # Llama 3.1 divides slow frequencies by `factor`, keeps fast ones, and blends those between
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    wavelength = 2 * math.pi / frequency
    turns = scaling["original_max_position_embeddings"] / wavelength
    blend = ((turns - low) / (high - low)).clamp(0, 1)          # 0: slow, 1: fast
    return torch.lerp(frequency / scaling["factor"], frequency, blend)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """
    Rotary position embedding: x (B, heads, S, head_dim), cos and sin (S, head_dim) in fp32.
    Channels i and i + head_dim / 2 are rotated as a pair.
    """
    left, right = x.chunk(2, -1)
    turned = torch.cat([-right, left], -1)
    return (x * cos + turned * sin).to(x.dtype)


class Cache:
    """
    Keys and values of every layer, allocated once. The first `length` positions are in use.

    A CUDA graph needs fixed addresses and shapes. For it, a tensor `position` (1,) takes the place
    of `length`: each call writes one token, and attention covers the capacity under a mask.
    """

    def __init__(self, config: LlamaConfig, batch: int, capacity: int, device=None, dtype=None):
        shape = (config.num_hidden_layers, 2, batch, config.num_key_value_heads, capacity,
                 config.head_dim)
        self.kv = torch.zeros(shape, device=device, dtype=dtype)
        self.length = 0
        self.position: Tensor | None = None

    @property
    def capacity(self) -> int:
        return self.kv.shape[4]

    def write(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """k, v (B, kv_heads, S, head_dim) of the newest positions -> those of all positions."""
        keys, values = self.kv[layer, 0], self.kv[layer, 1]     # (B, kv_heads, capacity, head_dim)
        if self.position is not None:
            keys.index_copy_(2, self.position, k)
            values.index_copy_(2, self.position, v)
            return keys, values
        end = self.length + k.shape[2]
        keys[:, :, self.length:end] = k
        values[:, :, self.length:end] = v
        return keys[:, :, :end], values[:, :, :end]

    def expand(self, group: int) -> None:
        """Repeats every sequence `group` times: one prefill serves all samples of a prompt."""
        self.kv = self.kv.repeat_interleave(group, 2)


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        h = x.float()                                           # fp32 whatever the type of x
        weighted = self.weight.float() * h
        scale = torch.rsqrt(h.square().mean(-1, keepdim=True) + self.eps)
        return (weighted * scale).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        q_width = config.num_attention_heads * config.head_dim
        kv_width = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, q_width, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=config.attention_bias)
        self.o_proj = nn.Linear(q_width, config.hidden_size, bias=False)

    def heads(self, x: Tensor) -> Tensor:
        """(B, S, heads * head_dim) -> (B, heads, S, head_dim)."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: Cache | None = None,
                mask: Tensor | None = None) -> Tensor:
        B, S, _ = x.shape
        q = self.heads(self.q_proj(x))                          # (B, heads, S, head_dim)
        k = self.heads(self.k_proj(x))                          # (B, kv_heads, S, head_dim)
        v = self.heads(self.v_proj(x))
        q = rotate(q, cos, sin)
        k = rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.write(self.layer, k, v)                # of all positions so far
        kv_heads = k.shape[1]
        if S == 1:
            # the query heads of one key head become its queries: no key is copied for each of them
            q = q.view(B, kv_heads, -1, self.head_dim)
            x = nnf.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            return self.o_proj(x.reshape(B, 1, -1))
        x = nnf.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=q.shape[1] != kv_heads)
        return self.o_proj(x.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(nnf.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: Cache | None = None,
                mask: Tensor | None = None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, cache, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


def project(hidden: Tensor, weight: Tensor) -> Tensor:
    """
    hidden (..., D), weight (V, D) -> logits (..., V) in fp32. In bf16 the two largest would often
    be equal.
    """
    if weight.dtype == torch.float32:
        return nnf.linear(hidden, weight)
    hidden = hidden.float()
    chunks = weight.split(16384)            # avoids an fp32 copy of the whole matrix
    return torch.cat([nnf.linear(hidden, chunk.float()) for chunk in chunks], -1)


def more_rows(weight: Tensor, n: int, generator: torch.Generator) -> nn.Parameter:
    """weight (V, D) -> (V + n, D): n rows with the old ones' mean and deviation, per column."""
    V, D = weight.shape
    mean = weight.mean(0, dtype=torch.float32)                                     # (D,)
    norm = torch.linalg.vector_norm(weight, dim=0, dtype=torch.float32)
    variance = norm.square() / V - mean.square()
    noise = torch.randn(n, D, generator=generator).to(weight.device)
    new = mean + variance.clamp(min=0).sqrt() * noise                              # (n, D)
    both = torch.cat([weight, new.to(weight.dtype)])
    return nn.Parameter(both, requires_grad=weight.requires_grad)


class Llama(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.checkpointing = False          # keep only the blocks' inputs for the backward pass
        self.source: Path | None = None     # folder whose tokenizer `save` copies
        layers = range(config.num_hidden_layers)
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size),
            "layers": nn.ModuleList(Block(config, layer) for layer in layers),
            "norm": RMSNorm(config.hidden_size, config.rms_norm_eps),
        })
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        for name, p in self.named_parameters():                 # GPT-2's initialization
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                # their outputs are added to the residual stream, two per layer
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.num_hidden_layers))
            elif p.ndim == 2:
                nn.init.normal_(p, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    @property
    def head(self) -> Tensor:
        """Output matrix (V, D)."""
        tied = self.config.tie_word_embeddings
        return self.model.embed_tokens.weight if tied else self.lm_head.weight

    @property
    def first_code(self) -> int:
        """The id of visual code 0. Code c has id first_code + c."""
        return self.config.vocab_size - self.config.n_visual

    def forward(self, ids: Tensor, cache: Cache | None = None) -> Tensor:
        """
        ids (B, S) -> hidden states (B, S, D). With a cache, ids continue the sequences in it and
        are appended to it.
        """
        S, device = ids.shape[1], ids.device
        start = 0 if cache is None else cache.length
        if cache is not None and start + S > cache.capacity:
            raise ValueError(f"{start + S} tokens do not fit a cache of {cache.capacity}")
        static = cache is not None and cache.position is not None     # a CUDA graph: see Cache

        if static:
            position = cache.position                           # (1,)
        else:
            position = torch.arange(start, start + S, device=device)      # (S,)
        # computed here in fp32: a buffer would be cast to bf16 together with the weights
        angle = position[:, None] * rope_frequencies(self.config, device)
        angle = angle.repeat(1, 2)                              # (S, head_dim)
        cos, sin = angle.cos(), angle.sin()

        mask = None                         # causal attention, or one query that sees all keys
        if static:
            mask = torch.arange(cache.capacity, device=device) <= position[:, None]
        elif start > 0 and S > 1:
            mask = torch.arange(start + S, device=device) <= position[:, None]

        x = self.model.embed_tokens(ids)                        # (B, S, D)
        for block in self.model.layers:
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, cos, sin, cache, mask, use_reentrant=False)
            else:
                x = block(x, cos, sin, cache, mask)

        if static:
            cache.position += 1
        elif cache is not None:
            cache.length += S
        return self.model.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Over the whole vocabulary: hidden (..., D) -> (..., vocab_size), fp32."""
        return project(hidden, self.head)

    def visual_logits(self, hidden: Tensor) -> Tensor:
        """Over the visual codes only: hidden (..., D) -> (..., n_visual), fp32."""
        return project(hidden, self.head[self.first_code:])

    @torch.no_grad()
    def extend(self, n: int) -> None:
        """Appends n visual codes to the vocabulary: n rows to embedding and head."""
        config = self.config
        if config.n_visual or n < 1:
            raise ValueError(f"{n} rows asked for, {config.n_visual} visual codes there already")
        generator = torch.Generator().manual_seed(0)
        embedding = self.model.embed_tokens
        embedding.weight = more_rows(embedding.weight, n, generator)
        if not config.tie_word_embeddings:
            self.lm_head.weight = more_rows(self.lm_head.weight, n, generator)
        vocab_size = config.vocab_size + n
        self.config = dataclasses.replace(config, vocab_size=vocab_size, n_visual=n)

    @classmethod
    def load(cls, folder, dtype: torch.dtype | None = None, device=None,
             n_visual: int = 0) -> "Llama":
        """
        Opens a folder in Hugging Face's layout (config.json, one safetensors file or shards with
        an index) or Meta's (params.json, consolidated.00.pth). At its peak the device holds the
        model and one tensor more.

        dtype: None keeps that of the file's first tensor. n_visual > 0 extends the vocabulary by
        that many visual codes, unless the folder has them already. Raises ValueError that names
        file and tensor for what is missing, left over, misshapen or not finite.
        """
        return load_model(Path(folder), dtype, device, n_visual)

    def save(self, folder) -> None:
        """
        Writes a folder that transformers opens: config.json, generation_config.json,
        model.safetensors, and the tokenizer's files of the folder the model was loaded from.
        An interrupted save leaves the old tensors or the new ones, never a mixture.
        """
        save_model(self, Path(folder))


# ------------------------------------------------------------------ the policy


def truncate(logits: Tensor, top_k: int = 50, top_p: float = 0.95) -> Tensor:
    """
    The support of the policy: which codes may be drawn. logits (..., V) -> bool (..., V).

    The top_k most likely codes, and of these the fewest that hold top_p of their probability. Ties
    go to the lower index; at least one code stays. top_k = 1 is greedy decoding.
    """
    ordered, index = logits.float().sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(logits.shape[-1], device=logits.device)
    ordered = ordered.masked_fill(rank >= max(top_k, 1), -torch.inf)
    p = ordered.softmax(-1)
    before = p.cumsum(-1) - p                                   # held by the codes ranked higher
    keep = (before < top_p) | (top_p >= 1)
    keep = keep & (ordered > -torch.inf)
    keep[..., 0] = True
    return torch.zeros_like(keep).scatter(-1, index, keep)


def logprobs(logits: Tensor, codes: Tensor, support: Tensor) -> Tensor:
    """
    log pi(code), the log-softmax over the support, fp32.
    logits (..., V), codes (...), support (..., V) -> (...).
    """
    logp = logits.float().masked_fill(~support, -torch.inf).log_softmax(-1)
    return logp.gather(-1, codes[..., None])[..., 0]


def draw(logits: Tensor, support: Tensor,
         generator: torch.Generator | list[torch.Generator] | None = None) -> Tensor:
    """
    Samples one code from the policy: logits, support (..., V) -> (...).

    argmax of p / Exponential(1) is a sample of p (the Gumbel-max trick), without the wait for the
    device in torch.multinomial. Of several generators, each draws for an equal part of the batch.
    """
    p = logits.float().masked_fill(~support, -torch.inf).softmax(-1)
    noise = torch.empty_like(p)
    generators = generator if isinstance(generator, list) else [generator]
    for chunk, own_generator in zip(noise.chunk(len(generators)), generators):
        chunk.exponential_(generator=own_generator)
    return (p / noise).argmax(-1)


@torch.no_grad()
def generate(model: Llama, prompt: Tensor, max_new_tokens: int, group: int = 1, top_k: int = 50,
             top_p: float = 0.95, generator: torch.Generator | list[torch.Generator] | None = None,
             ) -> tuple[Tensor, Tensor]:
    """
    Samples T = max_new_tokens visual codes after each prompt, G = group times.

    prompt (B, S) ids -> codes (B, G, T) in [0, n_visual), and support (B, G, T, n_visual), the
    codes that each was drawn from. With a list of B generators, one per prompt, samples do not
    depend on which other prompts are in the batch. Raises ValueError for a model without visual
    codes and for more tokens than its context holds.
    """
    config, T = model.config, max_new_tokens
    if not config.n_visual:
        raise ValueError("this model has no visual codes: load it with n_visual=256")
    B, S = prompt.shape
    if min(B, group) < 1:
        raise ValueError(f"{B} prompts, group of {group}: at least one of each")
    check_length(config, S, T)

    cache = Cache(config, B, S + T, prompt.device, model.head.dtype)
    hidden = model(prompt, cache)[:, -1]                        # (B, D)
    cache.expand(group)
    hidden = hidden.repeat_interleave(group, 0)                 # (B G, D)
    logits = model.visual_logits(hidden)                        # (B G, V)

    shape = (B * group, T)
    codes = torch.empty(shape, dtype=torch.int64, device=prompt.device)
    support = torch.empty(*shape, config.n_visual, dtype=torch.bool, device=prompt.device)
    step = decode_step(model, cache, model.visual_logits)
    for t in range(T):                                          # no wait for the device in here
        support[:, t] = truncate(logits, top_k, top_p)
        codes[:, t] = draw(logits, support[:, t], generator)
        if t + 1 < T:
            logits = step(model.first_code + codes[:, t:t + 1])
    return codes.view(B, group, T), support.view(B, group, T, -1)


def check_length(config: LlamaConfig, S: int, T: int) -> None:
    if min(S, T) < 1:
        raise ValueError(f"a prompt of {S} tokens and {T} new ones: at least one of each")
    if S + T > config.max_position_embeddings:
        raise ValueError(f"prompt of {S} + {T} new tokens: this model's context is "
                         f"{config.max_position_embeddings}")


def decode_step(model: Llama, cache: Cache,
                head: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """
    Returns a function that appends ids (B, 1) to the cache and returns the logits (B, V) of the
    next token. head: model.visual_logits or model.logits.

    On CUDA the hundreds of kernels of a step are captured in a graph and replayed with one launch.
    Capturing takes about as long as ten steps. Every call overwrites the logits of the last.
    """
    @torch.no_grad()
    def step(ids: Tensor) -> Tensor:
        return head(model(ids, cache)[:, -1])

    if not cache.kv.is_cuda or cache.length == cache.capacity:
        return step

    device = cache.kv.device
    with torch.cuda.device(device):
        cache.position = torch.tensor([cache.length], device=device)
        ids = torch.zeros(cache.kv.shape[2], 1, dtype=torch.int64, device=device)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):       # warm-up: libraries allocate their workspaces
            step(ids)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = step(ids)
        # back to the start: what the warm-up wrote is masked until it is overwritten
        cache.position.fill_(cache.length)

    def replay(new: Tensor) -> Tensor:
        if cache.length == cache.capacity:
            raise ValueError(f"{cache.length + 1} tokens do not fit a cache of {cache.capacity}")
        cache.length += 1
        ids.copy_(new)
        graph.replay()
        return logits

    return replay


# ------------------------------------------------------------------ weights in and out


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
        scaling = LLAMA3 | {"factor": float(raw.get("rope_scaling_factor") or 8)}
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


def load_model(folder: Path, dtype: torch.dtype | None, device, n_visual: int) -> Llama:
    """Builds the model without memory, then puts the tensors in their places one by one."""
    config = read_config(folder)
    if n_visual and config.n_visual not in (0, n_visual):
        raise ValueError(f"{folder} has {config.n_visual} visual codes, not n_visual = {n_visual}")
    with torch.device("meta"):
        model = Llama(config)
    missing = dict(model.named_parameters())
    tensors = meta_tensors if is_meta(folder) else hugging_face_tensors
    for path, name, value in tensors(folder, config):
        if name not in missing:
            raise ValueError(f"{path} holds {name}: this model has none, or has it already")
        shape = missing.pop(name).shape
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
    if missing:
        raise ValueError(f"{folder} lacks {len(missing)} tensors, the first of them {min(missing)}")
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
            raise ValueError(f"{path} points outside its folder: {shard!r}")
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
