"""
Text in and out of the language model: the tokenizers of Llama 2, Llama 3 and Qwen, and a command
that continues a text. No training stage needs this file.

tiktoken and sentencepiece do the work; this file reads the formats in which vocabularies are
published.

    python text.py --llm DIR                # what is in a folder, and how it continues a text
    python text.py --llm DIR --prompt "The speed of light is" --tokens 50 --dtype bfloat16

Expect a sensible sentence: wrongly loaded weights give word salad.
"""
import argparse
import base64
import json
import re
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import sentencepiece
import tiktoken
import torch

from lm import Cache, Llama, check_length, decode_step, draw, truncate
from weights import read_config, read_json

# ------------------------------------------------------------------ tokenizer


WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
         r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
LLAMA3_DIGITS = "{1,3}"                     # up to three digits make a word; one in Qwen
LLAMA3_SPECIAL = [
    "begin_of_text", "end_of_text", "reserved_special_token_0", "reserved_special_token_1",
    "finetune_right_pad_id", "reserved_special_token_2", "start_header_id", "end_header_id",
    "eom_id", "eot_id", "python_tag", *(f"reserved_special_token_{i}" for i in range(3, 248))]
QWEN_SPECIAL = ["endoftext", "im_start", "im_end"]


class Tokenizer:
    """
    Text <-> ids. The visual codes are the special tokens <|code_0|> .. <|code_255|>, whose ids
    follow the model's vocabulary.

    backend: a tiktoken.Encoding or a SentencePieceProcessor, and ids, all ids it can decode.
    bos: id of the begin-of-text token. nfc: text is normalized to NFC. first_code: id of code 0,
    by default the first free one.
    """

    def __init__(self, backend, ids: set[int], bos: int | None = None, nfc: bool = False,
                 first_code: int | None = None, n_visual: int = 256):
        self.backend, self.bos, self.nfc = backend, bos, nfc
        self.is_bpe = isinstance(backend, tiktoken.Encoding)
        self.size = max(ids) + 1
        self.first_code = self.size if first_code is None else first_code
        if self.first_code < self.size:
            raise ValueError(f"the tokenizer has {self.size} tokens, the model's vocabulary only "
                             f"{self.first_code}")
        self.codes = {f"<|code_{i}|>": self.first_code + i for i in range(n_visual)}
        self.code_names = {i: name for name, i in self.codes.items()}
        self.code_pattern = "(" + "|".join(map(re.escape, self.codes)) + ")"
        self.ids = ids | self.code_names.keys()

    @classmethod
    def load(cls, folder) -> "Tokenizer":
        """
        The tokenizer of a model's folder, from the first of these that it holds: tokenizer.model
        (Llama 3: lines of base64 and rank; Llama 2: sentencepiece), vocab.json + merges.txt
        (Qwen), tokenizer.json. Raises ValueError that names the file for what is missing or broken.
        """
        folder = Path(folder)
        codes, model_bos = {}, None
        if (folder / "config.json").exists():
            config = read_config(folder)
            model_bos = config.bos_token_id
            codes["first_code"] = config.vocab_size - config.n_visual
            if config.n_visual:
                codes["n_visual"] = config.n_visual
        for path in (folder / "tokenizer.model", folder / "original" / "tokenizer.model"):
            if path.exists():
                if re.match(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n", path.read_bytes()):
                    return cls(*llama3(path, codes.get("first_code")), **codes)
                return cls(*llama2(path), **codes)
        if (folder / "vocab.json").exists():
            return cls(*qwen(folder), **codes)
        if (folder / "tokenizer.json").exists():
            return cls(*from_tokenizer_json(folder / "tokenizer.json", model_bos), **codes)
        raise ValueError(f"{folder} holds no tokenizer: tokenizer.model, vocab.json + merges.txt "
                         "or tokenizer.json")

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """Ids of a text. bos: begin with the begin-of-text token, if the model has one."""
        ids = [self.bos] if bos and self.bos is not None else []
        if self.nfc:
            text = unicodedata.normalize("NFC", text)
        options = {"allowed_special": "all"} if self.is_bpe else {}
        for part in re.split(self.code_pattern, text):
            if part in self.codes:
                ids.append(self.codes[part])
            else:
                ids += self.backend.encode(part, **options)
        return ids

    def decode(self, ids: list[int]) -> str:
        """
        The text of ids. Bytes that are not UTF-8 become U+FFFD. Raises ValueError for an id that
        stands for no token.
        """
        unknown = [i for i in ids if i not in self.ids]
        if unknown:
            raise ValueError(f"id {unknown[0]} stands for no token")
        text, run = "", []                  # run: ids since the last visual code
        for i in ids:
            if i in self.code_names:
                text += self.backend.decode(run) + self.code_names[i]
                run = []
            else:
                run.append(i)
        return text + self.backend.decode(run)


# ------------------------------------------------------------------ vocabularies
# Each function returns the first arguments of Tokenizer: backend, ids, bos, nfc.


def byte_level_bpe(ranks: dict[bytes, int], special: dict[str, int],
                   digits: str = "") -> tuple[tiktoken.Encoding, set[int]]:
    """A byte-level BPE tokenizer and its ids."""
    encoding = tiktoken.Encoding("text", pat_str=WORDS % digits, mergeable_ranks=ranks,
                                 special_tokens=special)
    return encoding, {*ranks.values(), *special.values()}


def special_tokens(names: list[str], first: int) -> dict[str, int]:
    return {f"<|{name}|>": first + i for i, name in enumerate(names)}


def llama2(path: Path) -> tuple:
    """tokenizer.model: a sentencepiece model."""
    model = sentencepiece.SentencePieceProcessor()
    try:
        model.LoadFromSerializedProto(path.read_bytes())
    except (OSError, RuntimeError, TypeError) as error:
        raise ValueError(f"{path} is neither a tiktoken nor a sentencepiece file ({error})") \
            from None
    bos = model.bos_id() if model.bos_id() >= 0 else None
    return model, {*range(model.vocab_size())}, bos, False


def llama3(path: Path, vocab_size: int | None) -> tuple:
    """tokenizer.model: a base64 token and its rank per line. 256 special tokens come after."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(read_text(path).splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            raise ValueError(f"{path}, line {number}: {line[:40]!r} is not a base64 token and its "
                             "rank") from None
    check_complete(path, ranks)
    bos = len(ranks)
    if vocab_size not in (None, bos + 256):
        raise ValueError(f"{path} has {bos} tokens, this model's vocabulary {vocab_size} less 256 "
                         "special ones: it is not whole, or another model's")
    encoding, ids = byte_level_bpe(ranks, special_tokens(LLAMA3_SPECIAL, bos), LLAMA3_DIGITS)
    return encoding, ids, bos, False


def qwen(folder: Path) -> tuple:
    """vocab.json, merges.txt, and the special tokens of tokenizer_config.json."""
    path = folder / "vocab.json"
    lines = read_text(folder / "merges.txt").splitlines()
    merges = [line for line in lines if line and not line.startswith("#version")]
    ranks = ranks_of(path, read_json(path), merges)
    made, wanted = len(set(merges)), len(ranks) - 256
    if made != wanted:
        raise ValueError(f"{folder}/merges.txt makes {made} of {wanted} tokens: it is not whole")
    special = special_tokens(QWEN_SPECIAL, len(ranks))
    path = folder / "tokenizer_config.json"
    if path.exists():
        added = read_json(path).get("added_tokens_decoder", {})
        try:
            special |= {token["content"]: int(i) for i, token in added.items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{path}: added_tokens_decoder cannot be used ({error})") from None
    encoding, ids = byte_level_bpe(ranks, special)
    return encoding, ids, None, True


def from_tokenizer_json(path: Path, model_bos: int | None) -> tuple:
    """tokenizer.json of Llama 3 or Qwen."""
    raw = read_json(path)
    try:
        words, model = json.dumps(raw.get("pre_tokenizer")), raw["model"]
        if model.get("type", "BPE") != "BPE" or r"p{N}" not in words:
            raise ValueError("its model is no BPE, or its words are not Llama 3's or Qwen's")
        special = {token["content"]: token["id"] for token in raw.get("added_tokens") or []}
        vocab = {token: i for token, i in model["vocab"].items() if token not in special}
        ranks = ranks_of(path, vocab, model["merges"])
        nfc = "NFC" in json.dumps(raw.get("normalizer"))
        is_llama3 = LLAMA3_DIGITS in words
        encoding, ids = byte_level_bpe(ranks, special, LLAMA3_DIGITS if is_llama3 else "")
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a byte-level BPE tokenizer ({type(error).__name__}: "
                         f"{error})") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return encoding, ids, model_bos if is_llama3 else None, nfc


def ranks_of(path: Path, vocab: dict[str, int], merges: list) -> dict[bytes, int]:
    """
    From GPT-2's format to tiktoken's. GPT-2 writes every byte as a printable character, and merges
    pairs in the order of `merges`; tiktoken merges the pair whose result has the lowest rank. That
    is the same when ids follow the order of the merges. (Llama 3's tokenizer.json lists every way
    to split a token, one after the other.)
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    byte = {chr(b): b for b in printable}
    byte |= {chr(256 + i): b for i, b in enumerate(others)}
    try:
        ranks = {bytes(byte[c] for c in token): i for token, i in vocab.items()}
        pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in merges]
        order = [vocab[left + right] for left, right in pairs]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} and its merges do not fit together ({error})") from None
    if order != sorted(order):
        raise ValueError(f"{path}: its ids do not follow the order of the merges")
    check_complete(path, ranks)
    return ranks


def check_complete(path: Path, ranks: dict[bytes, int]) -> None:
    """tiktoken panics (no Exception) on a vocabulary that lacks a byte: look first."""
    lost = [b for b in range(256) if bytes([b]) not in ranks]
    if lost:
        raise ValueError(f"{path} lacks {len(lost)} of the 256 single bytes, the first of them "
                         f"{lost[0]}: it is not whole")
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError(f"{path}: ranks are not 0..{len(ranks) - 1}, each once: it is not whole")


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read ({error})") from None


# ------------------------------------------------------------------ continuing a text


@torch.no_grad()
def continuation(model: Llama, prompt: list[int], max_new_tokens: int, top_k: int = 50,
                 top_p: float = 0.95, generator: torch.Generator | None = None,
                 words: int | None = None) -> Iterator[int]:
    """
    Yields up to max_new_tokens further ids of a text. Ends before an end-of-text token.

    words: only ids below it are drawn (padding and visual codes follow the tokenizer's vocabulary).
    """
    check_length(model.config, len(prompt), max_new_tokens)
    device, eos = model.head.device, model.config.eos_token_id
    ends = eos if isinstance(eos, list) else [eos]
    cache = Cache(model.config, 1, len(prompt) + max_new_tokens - 1, device, model.head.dtype)
    hidden = model(torch.tensor([prompt], device=device), cache)[:, -1]            # (1, D)
    logits = model.logits(hidden)                                                  # (1, V)
    step = decode_step(model, cache, model.logits)
    for t in range(max_new_tokens):
        logits = logits[:, :words]
        new = draw(logits, truncate(logits, top_k, top_p), generator)              # (1,)
        token = new.item()
        if token in ends:
            return
        yield token
        if t + 1 < max_new_tokens:
            logits = step(new[None])


def describe(model: Llama, device: str) -> str:
    config, weights = model.config, list(model.parameters())
    count, size = sum(p.numel() for p in weights), sum(p.nbytes for p in weights)
    dtype = str(model.head.dtype).removeprefix("torch.")
    per_token = Cache(config, 1, 1, dtype=model.head.dtype).kv.nbytes
    name = "Qwen2" if config.attention_bias else "Llama"
    codes = f" ({config.n_visual} of them visual codes)" if config.n_visual else ""
    tied = ", tied" if config.tie_word_embeddings else ""
    return (
        f"{name}: {config.num_hidden_layers} layers of width {config.hidden_size}, feed-forward "
        f"{config.intermediate_size}, {config.num_attention_heads} heads on "
        f"{config.num_key_value_heads} of keys and values, vocabulary {config.vocab_size}"
        f"{codes}{tied}\n"
        f"{count:,} parameters, {size / 2 ** 30:.2f} GiB in {dtype} on {device}; cache "
        f"{per_token / 2 ** 10:.0f} KiB a token; context {config.max_position_embeddings}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="What is in a folder of weights, and how it continues a text.")
    parser.add_argument("--llm", required=True, metavar="DIR",
                        help="Hugging Face's or Meta's layout")
    parser.add_argument("--prompt", default="The speed of light is")
    parser.add_argument("--tokens", type=int, default=50)
    parser.add_argument("--top_k", type=int, default=50)
    parser.add_argument("--top_p", type=float, default=0.95)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: the file's")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    try:
        dtype = getattr(torch, args.dtype) if args.dtype else None
        model = Llama.load(args.llm, dtype, args.device).requires_grad_(False)
        print(describe(model, args.device))
        tokenizer = Tokenizer.load(args.llm)
        kind = "byte-level BPE" if tokenizer.is_bpe else "sentencepiece"
        print(f"tokenizer: {kind}, {tokenizer.size} tokens; {len(tokenizer.codes)} codes from id "
              f"{tokenizer.first_code}\n")
        ids = tokenizer.encode(args.prompt)
        generator = torch.Generator(args.device).manual_seed(args.seed)
        ids += continuation(model, ids, args.tokens, args.top_k, args.top_p, generator,
                            tokenizer.size)
        print(tokenizer.decode(ids))
    except (ValueError, RuntimeError, AssertionError) as error:     # no CUDA: AssertionError
        print(f"text.py: {str(error).splitlines()[0]}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
