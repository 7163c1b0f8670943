"""
The language model: a Llama (or Qwen2) with a key-value cache, and the policy that samples visual
codes from it.

ddt.py turns a frame into K codes, numbers below 256. The vocabulary of the Llama is extended by
these 256 visual codes: code c has the id first_code + c. A prompt is BOS and the codes of the first
frames; the model generates the codes of the others. All sequences of a batch have one length.

Source: Phys-AR (Lin et al. 2025, https://arxiv.org/abs/2504.15932), sections 3.3 and 4.1. Sampling:
the logits of text words are masked, then top-k 50 and top-p 0.95.

Choices where the paper is silent
1. q, k and v come from one matrix product, gate and up from one; on disk they are Hugging Face's
   separate tensors (weights.py).
2. The codes are the last `n_visual` ids. Computing only their logits masks all text words.
3. `truncate` defines the policy's support, `logprobs` its log-probabilities: all of sampling and
   training use these two, and the ratio of new to old policy is 1 before the first update.
4. New rows are drawn from a normal with the old rows' mean and deviation, column by column.

    from lm import Llama, generate
    model = Llama.load("path/to/Llama-3.1-8B", n_visual=256)  # Llama 2, 3, 3.1; Qwen2, Qwen2.5
    codes, support = generate(model, prompt, max_new_tokens=464, group=8)   # 464: 29 frames x 16

`python text.py --llm DIR` shows whether weights are loaded correctly: it continues a text.

Axes: B batch (in `generate` prompts), G group (samples per prompt), R = B G rows of a sampling
step, S sequence, T sampled tokens, D width, d = head_dim, V visual codes (or vocabulary, if said).
"""
import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# ------------------------------------------------------------------ config

LLAMA31_ROPE = {                            # how Llama 3.1 stretches its rotary positions
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def is_positive(value) -> bool:
    """A finite number above 0; a bool does not count."""
    return type(value) in (int, float) and 0 < value < math.inf


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
    rope_scaling: dict | None = None        # None, or a dictionary like LLAMA31_ROPE
    tie_word_embeddings: bool = False       # the head is the embedding
    attention_bias: bool = False            # biases of q, k and v, which Qwen2 has
    bos_token_id: int | None = 0            # begin of text
    eos_token_id: int | list[int] | None = None        # end of text
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
            most = 1000 if name == "num_hidden_layers" else 2 ** 24
            check(type(value) is int and 0 < value <= most, name,
                  f"a positive integer, at most {most}")
        for name in ("rms_norm_eps", "rope_theta"):
            check(is_positive(getattr(self, name)), name, "a positive number")
        for name in ("tie_word_embeddings", "attention_bias"):
            check(isinstance(getattr(self, name), bool), name, "true or false")
        codes = self.n_visual
        check(type(codes) is int and 0 <= codes <= self.vocab_size, "n_visual", "0 to vocab_size")
        words = self.vocab_size - codes

        def is_word(value) -> bool:
            return type(value) is int and 0 <= value < words

        bos, eos = self.bos_token_id, self.eos_token_id
        check(bos is None or is_word(bos), "bos_token_id", f"an id below {words}, or null")
        check(eos is None or is_word(eos) or isinstance(eos, list) and all(map(is_word, eos)),
              "eos_token_id", f"an id below {words}, a list of ids or null")
        scaling = self.rope_scaling
        if scaling is not None:
            check(isinstance(scaling, dict), "rope_scaling", "null or an object")
            for key in [key for key in LLAMA31_ROPE if key != "rope_type"]:
                wanted = f"given a positive number for {key}"
                check(is_positive(scaling.get(key)), "rope_scaling", wanted)
            check(scaling["low_freq_factor"] < scaling["high_freq_factor"], "rope_scaling",
                  "given a high_freq_factor above low_freq_factor")
        check(self.head_dim % 2 == 0, "head_dim", "even")
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if heads % kv_heads:
            raise ValueError(f"{heads} heads on {kv_heads} of keys and values: the first must be "
                             "a multiple of the second")


# Published models: for estimates of memory and time without their weights, and for the special
# tokens that Meta's layout does not name.
CONFIGS = {
    "llama-2-7b": LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=32, head_dim=128,
        rms_norm_eps=1e-5, rope_theta=1e4, max_position_embeddings=4096,
        bos_token_id=1, eos_token_id=2),
    "llama-3.1-8b": LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, head_dim=128,
        rms_norm_eps=1e-5, rope_theta=5e5, max_position_embeddings=131072,
        rope_scaling=LLAMA31_ROPE, bos_token_id=128000, eos_token_id=128001),
    "qwen2.5-1.5b": LlamaConfig(
        vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28,
        num_attention_heads=12, num_key_value_heads=2, head_dim=128,
        rms_norm_eps=1e-6, rope_theta=1e6, max_position_embeddings=131072,
        tie_word_embeddings=True, attention_bias=True, bos_token_id=151643, eos_token_id=151643),
    "qwen2.5-7b": LlamaConfig(
        vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
        num_attention_heads=28, num_key_value_heads=4, head_dim=128,
        rms_norm_eps=1e-6, rope_theta=1e6, max_position_embeddings=131072,
        attention_bias=True, bos_token_id=151643, eos_token_id=151643),
}


# ------------------------------------------------------------------ model


def rope_frequencies(config: LlamaConfig, device=None) -> Tensor:
    """Radians per position (d / 2,) of each pair of channels (i, i + d / 2), fp32."""
    channel = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device)
    frequency = config.rope_theta ** (-channel / config.head_dim)
    scaling = config.rope_scaling
    if scaling is None:
        return frequency
    # Llama 3.1 divides slow frequencies by `factor`, keeps fast ones, and blends those between
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    wavelength = 2 * math.pi / frequency                        # positions per turn
    context = scaling["original_max_position_embeddings"]
    turns = context / wavelength                                # of a pair, over that context
    blend = ((turns - low) / (high - low)).clamp(0, 1)          # 0: slow, 1: fast
    return torch.lerp(frequency / scaling["factor"], frequency, blend)


def rope_table(config: LlamaConfig, positions: int, device=None) -> Tensor:
    """cos and sin of the angles of positions 0, 1, ...: (2, positions, d), fp32."""
    position = torch.arange(positions, device=device)
    angle = position[:, None] * rope_frequencies(config, device)            # (positions, d / 2)
    angle = angle.repeat(1, 2)                                  # (positions, d): pairs (i, i + d/2)
    return torch.stack([angle.cos(), angle.sin()])


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """
    Rotary position embedding: x (B, heads, S, d), cos and sin (S, d) in fp32 -> the shape of x.
    Channel i is rotated together with channel i + d / 2 (as in Hugging Face), not its neighbour.
    """
    left, right = x.chunk(2, -1)
    turned = torch.cat([-right, left], -1)
    return torch.addcmul(x * cos, turned, sin).to(x.dtype)      # x cos + turned sin


class Cache:
    """
    Keys and values of every layer; the first `length` positions are in use. For inference only: it
    is overwritten in place and carries no gradients.

    A CUDA graph (`capture`) repeats the same kernels on the same addresses and shapes. There the
    new token's position is read from `position` (1,), a tensor on the device, which the model's
    forward advances; `length`, which no kernel sees, is advanced by the function that replays.
    """

    def __init__(self, config: LlamaConfig, batch: int, capacity: int, device=None, dtype=None):
        shape = (config.num_hidden_layers, 2, batch, config.num_key_value_heads, capacity,
                 config.head_dim)
        self.kv = torch.zeros(shape, device=device, dtype=dtype)
        self.rope = rope_table(config, capacity, device)        # (2, capacity, d)
        self.length = 0
        self.position: Tensor | None = None

    @property
    def batch(self) -> int:
        return self.kv.shape[2]

    @property
    def capacity(self) -> int:
        return self.kv.shape[4]

    def require(self, n: int) -> None:
        """Raises ValueError unless n more tokens fit."""
        if self.length + n > self.capacity:
            raise ValueError(f"{self.length + n} tokens do not fit a cache of {self.capacity}")

    def room(self, S: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """
        For S new tokens (in a CUDA graph 1): their positions (S,); keys and values up to them, in a
        graph of the whole capacity (layers, 2, B, kv_heads, keys, d); the mask (S, keys) added to
        the scores, outside a graph None for an empty cache or S = 1. ValueError if they do not fit.
        """
        self.require(S)
        device, dtype = self.kv.device, self.kv.dtype
        in_graph = self.position is not None
        keys = self.capacity if in_graph else self.length + S
        position = self.position if in_graph else torch.arange(self.length, keys, device=device)
        mask = None
        if in_graph or (self.length > 0 and S > 1):
            later = torch.arange(keys, device=device) > position[:, None]
            mask = torch.zeros(S, keys, device=device, dtype=dtype).masked_fill(later, -torch.inf)
        return position, self.kv[..., :keys, :], mask

    def expand(self, group: int) -> None:
        """Repeats every sequence `group` times, in a new tensor: one prefill for a whole group."""
        self.kv = self.kv.repeat_interleave(group, 2)


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return nnf.rms_norm(x, self.weight.shape, self.weight, self.eps)    # computes in fp32


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """
    Attention of q (B, heads, S, d) to k, v (B, kv_heads, keys, d) -> (B, S, heads, d). Without a
    mask it is causal, and keys = S.
    """
    S, attention = q.shape[2], nnf.scaled_dot_product_attention
    gqa = q.shape[1] != k.shape[1]          # only then: not every attention kernel supports it
    if q.device.type != "cpu" or mask is not None or S <= 128:
        out = attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=gqa)
        return out.transpose(1, 2)
    # The CPU's kernel computes all S x S scores, then masks. Blocks of 128 queries save up to half.
    parts = []
    for i in range(0, S, 128):
        end = min(i + 128, S)
        causal = torch.ones(end - i, end, dtype=torch.bool).tril(i)         # key <= query
        part = attention(q[:, :, i:end], k[:, :, :end], v[:, :, :end], causal, enable_gqa=gqa)
        parts.append(part.transpose(1, 2))
    return torch.cat(parts, 1)


class Attention(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        width = (self.heads + 2 * self.kv_heads) * self.head_dim
        self.qkv_proj = nn.Linear(config.hidden_size, width, bias=config.attention_bias)
        self.o_proj = nn.Linear(self.heads * self.head_dim, config.hidden_size, bias=False)

    def forward(self, x: Tensor, rope: Tensor, position: Tensor | None = None,
                kv: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """
        x (B, S, D) -> (B, S, D). rope (2, S, d): cos and sin. With a cache (see Cache.room): kv
        (2, B, kv_heads, keys, d), into which keys and values are written at `position` (S,).
        """
        B, S, _ = x.shape
        heads, kv_heads = self.heads, self.kv_heads
        qkv = self.qkv_proj(x).view(B, S, heads + 2 * kv_heads, self.head_dim).transpose(1, 2)
        qk, v = qkv.split([heads + kv_heads, kv_heads], 1)      # (B, heads + kv_heads, S, d)
        q, k = rotate(qk, *rope).split([heads, kv_heads], 1)
        if kv is not None:
            kv.index_copy_(3, position, torch.stack([k, v]))
            k, v = kv                                           # of all positions
        if S == 1:
            # one new token: the query heads that share a key head become rows of one query matrix,
            # and keys need not be repeated; (B, heads, 1, d) -> (B, kv_heads, heads / kv_heads, d)
            q = q.view(B, kv_heads, -1, self.head_dim)
            out = nnf.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            return self.o_proj(out.reshape(B, 1, -1))
        return self.o_proj(attend(q, k, v, mask).flatten(2))


class MLP(nn.Module):
    """SwiGLU: x (B, S, D) -> (B, S, D)."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, -1)
        return self.down_proj(nnf.silu(gate) * up)


class Block(nn.Module):
    """A pre-norm transformer block: x (B, S, D) -> (B, S, D), with the arguments of Attention."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, rope: Tensor, position: Tensor | None = None,
                kv: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, position, kv, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


def call_block(block: Block, *inputs) -> Tensor:
    """What `compiled` compiles, once for all blocks: they have the same shapes."""
    return block(*inputs)


@functools.cache
def compiled(function: Callable) -> Callable:
    """torch.compile(function), in which element-wise operations are fused to few kernels."""
    return torch.compile(function)


def project(hidden: Tensor, weight: Tensor) -> Tensor:
    """
    hidden (..., D), weight (rows, D) -> logits (..., rows). In fp32, because bf16 often rounds the
    best two logits to the same number. In chunks, because an fp32 copy of the whole matrix would
    be large (where a gradient is wanted, autograd keeps the copies of all chunks).
    """
    if weight.dtype == torch.float32:
        return nnf.linear(hidden, weight)
    hidden = hidden.float()
    chunks = weight.split(16384)
    return torch.cat([nnf.linear(hidden, chunk.float()) for chunk in chunks], -1)


def more_rows(weight: Tensor, n: int, generator: torch.Generator) -> nn.Parameter:
    """weight (rows, D) -> (rows + n, D): new ones drawn with each column's mean and deviation."""
    rows, D = weight.shape
    mean = weight.mean(0, dtype=torch.float32)                  # (D,)
    # var = E[x^2] - E[x]^2, because torch.var takes no dtype: it would need an fp32 copy
    norm = torch.linalg.vector_norm(weight, dim=0, dtype=torch.float32)
    variance = norm.square() / rows - mean.square()
    noise = torch.randn(n, D, generator=generator).to(weight.device)
    new = mean + variance.clamp(min=0).sqrt() * noise           # (n, D)
    both = torch.cat([weight, new.to(weight.dtype)])
    return nn.Parameter(both, requires_grad=weight.requires_grad)


class Llama(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.checkpointing = False          # keep only the blocks' inputs for the backward pass
        self.compile_decoding = False       # torch.compile for sampling, and for blocks in a graph
        self.source: Path | None = None     # folder whose tokenizer `save` copies
        self.generation: dict = {}          # its generation_config.json
        self.model = nn.ModuleDict({        # for Hugging Face's names: model.embed_tokens.weight
            "embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size),
            "layers": nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers)),
            "norm": RMSNorm(config.hidden_size, config.rms_norm_eps),
        })
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        for name, p in self.named_parameters():                 # GPT-2's initialization
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                # two per layer are added to the residual stream: keeps its variance
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
        are appended to it. Raises ValueError if they do not fit.
        """
        position, kv, mask = None, [None] * len(self.model.layers), None
        # cos and sin are computed here: buffers would be cast to bf16 together with the weights
        if cache is None:
            rope = rope_table(self.config, ids.shape[1], ids.device)        # (2, S, d)
        else:
            position, kv, mask = cache.room(ids.shape[1])
            rope = cache.rope.index_select(1, position)
        in_graph = cache is not None and cache.position is not None     # fixed shapes: see Cache

        call = compiled(call_block) if in_graph and self.compile_decoding else call_block
        x = self.model.embed_tokens(ids)                        # (B, S, D)
        for i, block in enumerate(self.model.layers):
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, rope, position, kv[i], mask, use_reentrant=False)
            else:
                x = call(block, x, rope, position, kv[i], mask)

        if in_graph:
            cache.position += 1
        elif cache is not None:
            cache.length += ids.shape[1]
        return self.model.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Over the whole vocabulary: hidden (..., D) -> (..., vocab_size), fp32."""
        return project(hidden, self.head)

    @property
    def visual_head(self) -> Tensor:
        """The rows of the visual codes in the output matrix: (n_visual, D)."""
        return self.head[self.first_code:]

    def visual_logits(self, hidden: Tensor) -> Tensor:
        """Over the visual codes only: hidden (..., D) -> (..., n_visual), fp32."""
        return project(hidden, self.visual_head)

    @torch.no_grad()
    def extend(self, n: int) -> None:
        """Appends n visual codes: n rows to embedding and head. ValueError if there are some."""
        config = self.config
        if n < 1:
            raise ValueError(f"extend by {n} visual codes: at least one")
        if config.n_visual:
            raise ValueError(f"extend: {config.n_visual} visual codes there already")
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
        model and one tensor more. A head of its own is kept, even if config.json calls it tied.

        dtype: of all parameters (fp32, bf16 or fp16); None: that of the first tensor stored.
        n_visual > 0 extends the vocabulary by that many visual codes, unless the folder has them
        already.

        Raises ValueError if the folder has another number of visual codes, for a file (named) that
        is missing, damaged or not supported, for a setting (named) that would change the result
        and is not supported, and for a tensor (named) that is missing, unknown, there twice with
        different values, of another shape, neither fp32, bf16 nor fp16, or not finite.
        """
        import weights                      # here, because weights.py imports this file
        return weights.load_model(Path(folder), dtype, device, n_visual)

    def save(self, folder) -> None:
        """
        Writes a folder that transformers opens: config.json, generation_config.json,
        model.safetensors, and copies of the tokenizer's files and chat template if the folder that
        the model was loaded from has any. Shards of an earlier model are removed.

        An interrupted save leaves all old tensors or all new ones, never a mixture; config and
        tokenizer files may then be older or newer than they. Raises OSError (a full disk, say).
        """
        import weights
        weights.save_model(self, Path(folder))


# ------------------------------------------------------------------ the policy


def truncate(logits: Tensor, top_k: int = 50, top_p: float = 0.95) -> Tensor:
    """
    The support of the policy, a mask of the codes that may be drawn: logits (..., V) -> bool.

    First the top_k most likely codes are kept and renormalised, then of these the shortest prefix
    whose probability reaches top_p. Ties go to the lower index; at least one code stays. top_k = 1
    is greedy decoding; top_k = V and top_p = 1 keep all codes. 0 and -1, which mean "all" or greedy
    decoding in other libraries, raise ValueError, as does top_p outside (0, 1].
    """
    if top_k is None or not top_k >= 1:
        raise ValueError(f"top_k = {top_k}: it must be at least 1 (as large as V: all)")
    if top_p is None or not 0 < top_p <= 1:
        raise ValueError(f"top_p = {top_p}: it must be above 0 and at most 1 (1: all)")
    if top_k == 1:
        best = logits.argmax(-1, keepdim=True)                  # the first of equal ones
        return torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, best, True)
    ordered, index = logits.float().sort(dim=-1, descending=True, stable=True)
    ordered[..., top_k:] = -torch.inf
    p = ordered.softmax(-1)
    keep = ordered > -torch.inf
    if top_p < 1:                                               # 1: all, although cumsum rounds
        before = p.cumsum(-1) - p                               # probability of all ranked higher
        keep &= before < top_p
    keep[..., 0] = True
    return torch.empty_like(keep).scatter_(-1, index, keep)


def logprobs(logits: Tensor, codes: Tensor, support: Tensor) -> Tensor:
    """
    log pi(code), the log-softmax over the support, fp32 (-inf for a code outside it).
    logits (..., V), codes (...), support (..., V) -> (...).
    """
    logp = logits.float().masked_fill(~support, -torch.inf).log_softmax(-1)
    return logp.gather(-1, codes[..., None])[..., 0]


def gumbel_noise(shape: tuple[int, ...],
                 generator: torch.Generator | list[torch.Generator] | None = None,
                 device=None) -> Tensor:
    """
    -log of exponentially distributed numbers, fp32: argmax(logits + noise) is a sample of
    softmax(logits), the Gumbel-max trick. Unlike torch.multinomial it does not make the CPU wait
    for the GPU. Of a list of n generators, each draws an n-th of the rows, in order.
    """
    noise = torch.empty(shape, device=device)
    generators = generator if isinstance(generator, list) else [generator]
    for block, own_generator in zip(noise.chunk(len(generators)), generators):
        block.exponential_(generator=own_generator)
    return noise.log_().neg_()


def choose(logits: Tensor, support: Tensor, noise: Tensor | None = None) -> Tensor:
    """
    Argmax over the support of logits + noise (a sample, if it is `gumbel_noise`), or without noise
    of the logits (greedy decoding): logits, support, noise (..., V) -> codes (...).
    """
    scores = logits if noise is None else logits + noise
    return scores.masked_fill(~support, -torch.inf).argmax(-1)


def draw(logits: Tensor, support: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Samples one code from the policy: logits, support (..., V) -> (...)."""
    return choose(logits.float(), support, gumbel_noise(logits.shape, generator, logits.device))


def sample(hidden: Tensor, head: Tensor, noise: Tensor | None, top_k: int,
           top_p: float) -> tuple[Tensor, Tensor]:
    """hidden (R, D), head (V, D), noise (R, V) or None -> codes (R,) and their supports (R, V)."""
    logits = project(hidden, head)                              # (R, V)
    support = truncate(logits, top_k, top_p)
    return choose(logits, support, noise), support


@torch.no_grad()
def generate(model: Llama, prompt: Tensor, max_new_tokens: int, group: int = 1, top_k: int = 50,
             top_p: float = 0.95, generator: torch.Generator | list[torch.Generator] | None = None,
             ) -> tuple[Tensor, Tensor]:
    """
    Samples T = max_new_tokens visual codes after each prompt, G = group times.

    prompt (B, S) ids -> codes (B, G, T) in [0, n_visual), and support (B, G, T, n_visual), for each
    code the mask of the codes that could be drawn in its place. Of a list of B generators, each
    draws for one prompt: its samples do not depend on the draws of other prompts. Raises ValueError
    for a model without visual codes, ids outside its vocabulary, and sizes that do not fit.
    """
    config, T = model.config, max_new_tokens
    if not config.n_visual:
        raise ValueError("this model has no visual codes: load it with n_visual=256")
    B, S = prompt.shape
    if min(B, group) < 1:
        raise ValueError(f"{B} prompts, group of {group}: at least one of each")
    if isinstance(generator, list) and len(generator) != B:
        raise ValueError(f"{len(generator)} generators for {B} prompts: one per prompt")
    check_length(config, S, T)
    if prompt.min() < 0 or prompt.max() >= config.vocab_size:   # CUDA would end the process
        raise ValueError(f"a prompt with ids outside the vocabulary of {config.vocab_size}")

    device, R = prompt.device, B * group
    noise = None                            # greedy decoding
    if top_k != 1:                          # of all steps at once: one call for each generator
        noise = gumbel_noise((R, T, config.n_visual), generator, device)
    codes = torch.empty(R, T, dtype=torch.int64, device=device)
    support = torch.empty(R, T, config.n_visual, dtype=torch.bool, device=device)
    ids = torch.empty(R, 1, dtype=torch.int64, device=device)   # code t - 1, as an id
    t = torch.zeros(1, dtype=torch.int64, device=device)        # a tensor: a graph reads it anew
    sample_codes = compiled(sample) if model.compile_decoding else sample

    def append(hidden: Tensor) -> None:     # (R, D): samples code t, stores it and advances t
        noise_t = None if noise is None else noise.index_select(1, t)[:, 0]             # (R, V)
        codes_t, support_t = sample_codes(hidden, model.visual_head, noise_t, top_k, top_p)
        codes.index_copy_(1, t, codes_t[:, None])
        support.index_copy_(1, t, support_t[:, None])
        ids.copy_(model.first_code + codes_t[:, None])
        t.add_(1)

    cache = Cache(config, B, S + T - 1, device, model.head.dtype)       # code T - 1 is never input
    hidden = model(prompt, cache)[:, -1]                        # (B, D): one prefill for a group
    cache.expand(group)
    append(hidden.repeat_interleave(group, 0))
    step = capture(lambda: append(model(ids, cache)[:, -1]), cache, ids, t)
    for _ in range(T - 1):                  # nothing in here makes the CPU wait for the GPU
        step()
    return codes.view(B, group, T), support.view(B, group, T, -1)


def check_length(config: LlamaConfig, S: int, T: int) -> None:
    """ValueError unless a prompt of S tokens and T new ones fit into the model's context."""
    if min(S, T) < 1:
        raise ValueError(f"a prompt of {S} tokens and {T} new ones: at least one of each")
    if S + T > config.max_position_embeddings:
        raise ValueError(f"prompt of {S} + {T} new tokens: this model's context is "
                         f"{config.max_position_embeddings}")


def capture(step: Callable[[], Tensor | None], cache: Cache,
            *state: Tensor) -> Callable[[], Tensor | None]:
    """
    step, a function without arguments that appends one token to the cache -> a function that does
    the same. On CUDA its hundreds of kernels are captured in a graph and replayed with one launch;
    every call returns the same tensor, which the next call overwrites.

    Capturing takes as long as about ten steps. Before it `step` runs once, to warm up; the cache's
    position and `state`, other tensors that step both reads and changes, are then restored.
    """
    if not cache.kv.is_cuda or cache.length == cache.capacity:  # full: nothing to decode
        return step

    device, saved = cache.kv.device, [x.clone() for x in state]
    with torch.cuda.device(device):
        cache.position = torch.tensor([cache.length], device=device)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):       # warm-up: libraries allocate their workspaces
            step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):       # records the kernels, runs none
            result = step()
        # Undo the warm-up. The key and value that it wrote are overwritten by the first replay.
        cache.position.fill_(cache.length)
        for x, value in zip(state, saved):
            x.copy_(value)

    def replay() -> Tensor | None:
        cache.require(1)
        graph.replay()
        cache.length += 1
        return result

    return replay


def decode_step(model: Llama, cache: Cache,
                to_logits: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """
    Returns a function that appends ids (B, 1) to the cache and returns the logits (B, V) of the
    next token, until its next call (see `capture`). to_logits: model.visual_logits or model.logits.
    """
    ids = torch.zeros(cache.batch, 1, dtype=torch.int64, device=cache.kv.device)

    @torch.no_grad()
    def step() -> Tensor:
        return to_logits(model(ids, cache)[:, -1])

    run = capture(step, cache)

    def decode(new: Tensor) -> Tensor:                          # new (B, 1)
        ids.copy_(new)
        return run()

    return decode
