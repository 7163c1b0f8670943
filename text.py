"""
Text in and out of the language model: the tokenizers of Llama 2, Llama 3 and Qwen, and a command
that continues a text. Of the training stages, only sft.py --llm DIR looks up words for numbers.

    text -> added tokens are cut out -> normalizer -> pre-tokenizer (words) -> BPE -> ids

tokenizer.json describes these steps; vocab.json + merges.txt (Qwen2) and Meta's tokenizer.model
(Llama 3) are brought into the same form. A tokenizer.model of Llama 2 is left to sentencepiece.
A setting that could change ids and is not followed here is refused by name.

    python text.py --llm DIR                # what is in a folder, and how it continues a text
    python text.py --llm DIR --prompt "The speed of light is" --tokens 50 --dtype bfloat16

Expect a sensible sentence: wrongly loaded weights give word salad.
"""
import argparse
import base64
import functools
import itertools
import json
import math
import re
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import sentencepiece
import torch

from lm import Cache, Llama, check_length, decode_step, draw, truncate
from weights import read_config, read_json

# ------------------------------------------------------------------ tokenizer


class Tokenizer:
    """
    Text <-> ids. The visual codes are the special tokens <|code_0|> .. <|code_255|>, whose ids
    follow the model's vocabulary.

    backend: BPE or SentencePiece. added: the tokens that are cut out of a text, with the fields
    that they have in tokenizer.json. bos: id of the token that texts begin with. first_code: id of
    code 0, by default the first free one. Some folders add a token behind the model's vocabulary
    (padding, often): a text that holds it is refused.
    """

    def __init__(self, backend, added: list[dict], bos: int | None = None,
                 first_code: int | None = None, n_visual: int = 256):
        self.backend, self.bos = backend, bos
        ids = backend.ids | {token["id"] for token in added}
        self.first_code = max(ids) + 1 if first_code is None else first_code
        if max(backend.ids) >= self.first_code:
            raise ValueError(f"the tokenizer has {max(ids) + 1} tokens, the model's vocabulary "
                             f"only {self.first_code}")
        self.size = max(i for i in ids if i < self.first_code) + 1
        added = [token if token["id"] < self.first_code else token | {"id": None}
                 for token in added]
        self.codes = {f"<|code_{i}|>": self.first_code + i for i in range(n_visual)}
        added += [added_token(name, i) for name, i in self.codes.items()]
        self.raw = {token["content"]: token for token in added if not token["normalized"]}
        self.normalized = {backend.normalize(token["content"]): token for token in added
                           if token["normalized"]}              # looked for in normalized text
        self.names = {token["id"]: name for name, token in (self.raw | self.normalized).items()
                      if token["id"] is not None}
        self.ids = backend.ids | self.names.keys()
        if bos is not None and bos not in self.ids:
            raise ValueError(f"the begin-of-text id {bos} stands for no token")

    @classmethod
    def load(cls, folder) -> "Tokenizer":
        """
        The tokenizer of a model's folder, from the first of these that it holds: tokenizer.json,
        vocab.json + merges.txt (Qwen2), tokenizer.model (Llama 3: lines of base64 and rank; Llama
        2: sentencepiece). Raises ValueError that names the file for what is missing, broken or not
        supported.
        """
        folder = Path(folder)
        codes = {}
        if (folder / "config.json").exists():
            config = read_config(folder)
            codes["first_code"] = config.vocab_size - config.n_visual
            if config.n_visual:
                codes["n_visual"] = config.n_visual
        for name, read in {"tokenizer.json": tokenizer_json, "vocab.json": qwen2,
                           "tokenizer.model": llama2_or_3,
                           "original/tokenizer.model": llama2_or_3}.items():
            path = folder / name
            if path.exists():
                break
        else:
            raise ValueError(f"{folder} holds no tokenizer: tokenizer.json, vocab.json + "
                             "merges.txt or tokenizer.model")
        settings, listed = read_settings(folder)
        try:
            backend, added, bos = read(path, settings, listed, codes.get("first_code"))
            added = merge_added(listed, added, backend)
            bos = begin_of_text(settings, bos, backend, added)
            added += unlisted(settings, added, backend)
            return cls(backend, added, bos, **codes)
        except (LookupError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} cannot be used ({type(error).__name__}: {error})") from None
        except ValueError as error:
            named = str(error).startswith(str(folder))
            raise ValueError(str(error) if named else f"{path}: {error}") from None

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """Ids of a text. bos: begin with the begin-of-text token, if the tokenizer adds one."""
        ids = [self.bos] if bos and self.bos is not None else []
        for place, part, token in cut_out(self.raw, text):
            if token is not None:
                ids.append(token)
                continue
            part = self.backend.normalize(part)
            for inner_place, inner, token in cut_out(self.normalized, part):
                if token is not None:
                    ids.append(token)
                else:
                    ids += self.backend.encode(inner, first=place == inner_place == 0)
        return ids

    def decode(self, ids: list[int]) -> str:
        """
        The text of ids. Bytes that are not UTF-8 become U+FFFD. Raises ValueError for an id that
        stands for no token.
        """
        unknown = [i for i in ids if i not in self.ids]
        if unknown:
            raise ValueError(f"id {unknown[0]} stands for no token")
        return self.backend.decode(ids, self.names)


def cut_out(tokens: dict[str, dict], text: str) -> Iterator[tuple[int, str, int | None]]:
    """Cuts a text at added tokens: (place, content, id) of these, (place, part, None) of others."""
    end = 0
    longest_first = sorted(tokens, key=len, reverse=True)
    pattern = "|".join(map(re.escape, longest_first)) or "(?!)"      # (?!): matches nothing
    for match in re.finditer(pattern, text):
        token, (start, stop) = tokens[match[0]], match.span()
        if token["single_word"] and any(map(in_word, text[:start][-1:] + text[stop:][:1])):
            continue
        if token["id"] is None:
            raise ValueError(f"{match[0]!r} has no id in this model's vocabulary")
        if token["lstrip"]:                                     # takes the spaces before it along
            start = max(end, len(text[:start].rstrip(WHITE)))
        if token["rstrip"]:
            stop = len(text) - len(text[stop:].lstrip(WHITE))
        if start > end:
            yield end, text[end:start], None
        yield start, match[0], token["id"]
        end = stop
    if end < len(text):
        yield end, text[end:], None


def in_word(c: str) -> bool:
    """Unicode's \\w, which unlike Python's has accents that combine, and no fractions."""
    kind = unicodedata.category(c)
    return kind[0] in "LM" or kind in ("Nd", "Nl", "Pc") or c in "\u200c\u200d"


# ------------------------------------------------------------------ byte-pair encoding


def gpt2_spelling() -> dict[int, str]:
    """GPT-2 writes a byte as a character that prints: itself, or one from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


SPELLING = gpt2_spelling()
BYTES = {c: b for b, c in SPELLING.items()}


class BPE:
    """
    Byte-pair encoding: a word is split into characters; the pair of neighbours that stands first
    in the list of merges becomes one token, until no pair is listed.

    raw: the content of tokenizer.json. Without model.merges all pairs that make a token are merged,
    those of the lowest id first.
    """

    def __init__(self, raw: dict):
        self.normalizer, self.pre_tokenizer = raw.get("normalizer"), raw.get("pre_tokenizer")
        self.decoder, model = raw.get("decoder"), raw["model"]
        check_fields("model", model, type=["BPE"], vocab=ANY, merges=ANY, dropout=[None, 0],
                     unk_token=ANY, fuse_unk=FLAG, byte_fallback=FLAG, ignore_merges=FLAG,
                     continuing_subword_prefix=[None, ""], end_of_word_suffix=[None, ""])
        self.vocab, self.model = model["vocab"], model
        self.ids = {*self.vocab.values()}
        if len(self.ids) < len(self.vocab) or any(type(i) is not int or i < 0 for i in self.ids):
            raise ValueError("the ids of its vocabulary are not different numbers")
        self.ranks = None
        if model["merges"] is not None:
            pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
            self.ranks = {(left, right): i for i, (left, right) in enumerate(pairs)}
            lost = [pair for pair in self.ranks if not {*pair, "".join(pair)} <= self.vocab.keys()]
            if lost:
                raise ValueError(f"its merges do not fit its vocabulary: {' + '.join(lost[0])}")
        # neighbours in some token: between all others a word can be cut before it is merged
        self.inside = {pair for token in self.vocab for pair in zip(token, token[1:])}
        self.tokens = {i: token for token, i in self.vocab.items()}
        normalize("a", self.normalizer)                         # refuses what is not known
        split("a", self.pre_tokenizer, True)
        join(["a"], self.decoder)

    def normalize(self, text: str) -> str:
        return normalize(text, self.normalizer)

    def encode(self, text: str, first: bool) -> list[int]:
        """first: whether this part is the beginning of the text."""
        tokens = []
        for word in split(text, self.pre_tokenizer, first):
            if self.model.get("ignore_merges") and word in self.vocab:
                tokens.append(word)
            else:
                tokens += self.merge(self.characters(word))
        return [self.vocab[token] for token in tokens]

    def characters(self, word: str) -> list[str]:
        tokens, unknown = [], self.model.get("unk_token")
        for c in word:
            if c in self.vocab:
                tokens.append(c)
                continue
            code = [f"<0x{b:02X}>" for b in c.encode()]
            if self.model.get("byte_fallback") and self.vocab.keys() >= {*code}:
                tokens += code
            elif unknown is None:
                raise ValueError(f"{c!r} has no token in this vocabulary")
            elif not (self.model.get("fuse_unk") and tokens[-1:] == [unknown]):
                tokens.append(unknown)
        return tokens

    def rank(self, left: str, right: str) -> float:
        if self.ranks is None:
            return self.vocab.get(left + right, math.inf)
        return self.ranks.get((left, right), math.inf)

    def merge(self, tokens: list[str]) -> list[str]:
        merged, begin = [], 0
        for end in range(1, len(tokens) + 1):
            if end < len(tokens) and (tokens[end - 1][-1], tokens[end][0]) in self.inside:
                continue
            part, begin = tokens[begin:end], end
            while len(part) > 1:
                ranks = [self.rank(*pair) for pair in zip(part, part[1:])]
                at = ranks.index(min(ranks))
                if ranks[at] == math.inf:
                    break
                part[at:at + 2] = [part[at] + part[at + 1]]
            merged += part
        return merged

    def decode(self, ids: list[int], names: dict[int, str]) -> str:
        """names: those of the added tokens."""
        tokens = [names[i] if i in names else self.tokens[i] for i in ids]
        return "".join(join(tokens, self.decoder))


class SentencePiece:
    """
    Llama 2's tokenizer.model. prefix: which of the parts of a text, between added tokens, begin
    with a space that is not there: "always", "first" or "never".
    """

    def __init__(self, path: Path, prefix: str):
        self.prefix, self.model = prefix, sentencepiece.SentencePieceProcessor()
        try:
            self.model.LoadFromSerializedProto(path.read_bytes())
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"neither a tiktoken nor a sentencepiece file ({error})") from None
        self.vocab = {self.model.id_to_piece(i): i for i in range(self.model.vocab_size())}
        self.ids = {*self.vocab.values()}

    def normalize(self, text: str) -> str:
        return text                                             # sentencepiece does it itself

    def encode(self, text: str, first: bool) -> list[int]:
        if self.prefix == "always" or self.prefix == "first" and first:
            return self.model.encode(text)
        mark = "\ue000"                     # takes the space, and merges with nothing
        return self.model.encode(mark + text)[len(self.model.encode(mark)):]

    def decode(self, ids: list[int], names: dict[int, str]) -> str:
        text = ""
        for is_added, run in itertools.groupby(ids, names.__contains__):
            text += "".join(map(names.get, run)) if is_added else self.model.decode([*run])
        return text


# ------------------------------------------------------------------ the parts of tokenizer.json
# {"type": ..., fields}. What `match` does not know, with all of its fields, is refused.

_WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS"
          r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
LLAMA3_WORDS = _WORDS.replace("DIGITS", "{1,3}")
QWEN2_WORDS = _WORDS.replace("DIGITS", "")
WHITE = "".join(c for c in map(chr, range(65536)) if c.isspace() and c not in "\x1c\x1d\x1e\x1f")
BYTE = re.compile("<0x[0-9A-F]{2}>")         # a byte as a token of byte_fallback
ANY, FLAG = None, [False, True]


@functools.cache
def category(kind: str) -> str:
    """All characters of a Unicode category, L (letters) or N (numbers), as ranges for a regex."""
    every = range(sys.maxunicode + 1)
    runs = itertools.groupby(every, lambda i: unicodedata.category(chr(i))[0] == kind)
    ranges = [[*run] for belongs, run in runs if belongs]
    return "".join(f"{chr(run[0])}-{chr(run[-1])}" for run in ranges)


@functools.cache
def translated(words: str) -> str:
    """LLAMA3_WORDS or QWEN2_WORDS for Python's re, which knows no \\p{L} and another \\s."""
    L, N = category("L"), category("N")
    for theirs, ours in ((r"[^\s\p{L}\p{N}]", f"[^{WHITE}{L}{N}]"),
                         (r"[^\r\n\p{L}\p{N}]", f"[^\r\n{L}{N}]"),
                         (r"\p{L}", f"[{L}]"), (r"\p{N}", f"[{N}]"),
                         (r"\s", f"[{WHITE}]"), (r"\S", f"[^{WHITE}]")):
        words = words.replace(theirs, ours)
    return words


def check_fields(what: str, part: dict, **allowed) -> None:
    """ValueError for a field that is not known or whose value is not in the list. ANY: all are."""
    for name, value in part.items():
        if name not in allowed:
            raise ValueError(f"{name} = {value!r} of its {what} is not known")
        if allowed[name] is not ANY and value not in allowed[name]:
            raise ValueError(f"{name} = {value!r} of its {what} is not supported")


def refuse(what: str, part: dict):
    raise ValueError(f"its {what} {json.dumps(part, ensure_ascii=False)} is not supported (only "
                     "those of Llama 2, Llama 3 and Qwen2)")


def normalize(text: str, part: dict | None) -> str:
    match part:
        case None:
            return text
        case {"type": "Sequence", "normalizers": steps, **other} if not other:
            for step in steps:
                text = normalize(text, step)
            return text
        case {"type": "NFC", **other} if not other:
            return unicodedata.normalize("NFC", text)
        case {"type": "Prepend", "prepend": prefix, **other} if not other:
            return prefix + text
        case {"type": "Replace", "pattern": {"String": old}, "content": new, **other} if not other:
            return text.replace(old, new)
    refuse("normalizer", part)


def split(text: str, part: dict | None, first: bool) -> list[str]:
    """The words of a text, by a pre_tokenizer."""
    match part:
        case None:
            words = [text]
        case {"type": "Sequence", "pretokenizers": steps, **other} if not other:
            words = [text]
            for step in steps:
                words = [word for i, longer in enumerate(words)
                         for word in split(longer, step, first and i == 0)]
        case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated",
              "invert": False, **other} if not other and pattern in (LLAMA3_WORDS, QWEN2_WORDS):
            words = re.findall(translated(pattern), text)
        case {"type": "ByteLevel", "add_prefix_space": space, "use_regex": False,
              "trim_offsets": _, **other} if not other:
            text = f" {text}" if space and text and text[0] != " " else text
            words = ["".join(SPELLING[b] for b in text.encode())]
        case {"type": "Metaspace", "replacement": mark, "split": cut, "prepend_scheme":
              "always" | "first" | "never" as scheme, **other} if not other:
            text = text.replace(" ", mark)
            if text and text[0] != mark and (scheme == "always" or scheme == "first" and first):
                text = mark + text
            words = re.split(f"(?={re.escape(mark)})", text) if cut else [text]
        case _:
            refuse("pre_tokenizer", part)
    return [word for word in words if word]


def join(tokens: list[str], part: dict | None) -> list[str]:
    """Tokens -> parts of the text, by a decoder."""
    match part:
        case None:
            return [" ".join(tokens)]
        case {"type": "Sequence", "decoders": steps, **other} if not other:
            for step in steps:
                tokens = join(tokens, step)
            return tokens
        case {"type": "ByteLevel"}:                             # whose fields only serve to encode
            codes = (bytes(BYTES[c] for c in token) if BYTES.keys() >= {*token} else token.encode()
                     for token in tokens)
            return [b"".join(codes).decode(errors="replace")]
        case {"type": "ByteFallback", **other} if not other:
            parts = []
            for is_byte, run in itertools.groupby(tokens, lambda t: bool(BYTE.fullmatch(t))):
                if is_byte:
                    code = bytes(int(token[3:5], 16) for token in run)
                    text = code.decode(errors="replace")
                    run = ["\ufffd" * len(code) if "\ufffd" in text else text]
                parts += run
            return parts
        case {"type": "Fuse", **other} if not other:
            return ["".join(tokens)]
        case {"type": "Replace", "pattern": {"String": old}, "content": new, **other} if not other:
            return [token.replace(old, new) for token in tokens]
        case {"type": "Strip", "content": c, "start": start, "stop": 0, **other} if not other:
            return [re.sub(f"^{re.escape(c)}{{0,{start}}}", "", token) for token in tokens]
    refuse("decoder", part)


# ------------------------------------------------------------------ files
# tokenizer_json, qwen2 and llama2_or_3 return the first arguments of Tokenizer.

LLAMA3_SPECIAL = [
    "begin_of_text", "end_of_text", "reserved_special_token_0", "reserved_special_token_1",
    "finetune_right_pad_id", "reserved_special_token_2", "start_header_id", "end_header_id",
    "eom_id", "eot_id", "python_tag", *(f"reserved_special_token_{i}" for i in range(3, 248))]
QWEN2_SPECIAL = ["endoftext", "im_start", "im_end"]


def added_token(content: str, id: int, **flags) -> dict:
    """An added token with all fields of tokenizer.json."""
    if not isinstance(content, str) or not content or type(id) is not int or id < 0:
        raise ValueError(f"added token {content!r} has the id {id!r}")
    check_fields(f"added token {content!r}", flags, single_word=FLAG, lstrip=FLAG, rstrip=FLAG,
                 normalized=FLAG, special=ANY)
    unset = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return unset | flags | {"content": content, "id": id}


def tokenizer_json(path: Path, settings: dict, listed: list[dict],
                   vocab_size: int | None) -> tuple:
    raw = read_json(path)
    padding = raw.get("padding") or {}
    changes_nothing = padding.get("strategy") == "BatchLongest" and \
        not padding.get("pad_to_multiple_of")                   # one text is the longest
    check_fields("top level (set it to null)", raw, version=ANY, truncation=[None],
                 padding=ANY if changes_nothing else [None], added_tokens=ANY, normalizer=ANY,
                 pre_tokenizer=ANY, post_processor=ANY, decoder=ANY, model=ANY)
    ids = before_text(raw.get("post_processor"))
    if len(ids) > 1:
        raise ValueError("its post_processor begins texts with more than one token")
    added = [added_token(**token) for token in raw.get("added_tokens") or []]
    backend = BPE(raw)
    size = len(backend.vocab)               # tokenizers gives new tokens the next ids, and no other
    listed = sorted(listed, key=lambda token: token["id"])
    for name, i in {token["content"]: token["id"] for token in [*added, *listed]}.items():
        if name not in backend.vocab and i != size:
            raise ValueError(f"added token {name!r} has the id {i}, but the next one is {size}")
        size = max(size, i + 1)
    spaced = split(backend.normalize("a"), backend.pre_tokenizer, True) != ["a"]
    if settings.get("add_prefix_space") not in (None, spaced):
        raise ValueError(f"it has add_prefix_space = {spaced}, tokenizer_config.json "
                         f"{not spaced}: make them agree")
    return backend, added, ids[0] if ids else None


def before_text(part: dict | None) -> list[int]:
    """The ids that a post_processor puts before a text."""
    match part:
        case None | {"type": "ByteLevel"}:                      # which changes no id
            return []
        case {"type": "Sequence", "processors": steps, **other} if not other:
            return [i for step in steps[::-1] for i in before_text(step)]
        case {"type": "TemplateProcessing", "single": [*before, {"Sequence": {"id": "A"}}],
              "special_tokens": special, "pair": _, **other} if not other:
            names = [piece["SpecialToken"]["id"] for piece in before]
            return [i for name in names for i in special[name]["ids"]]
    refuse("post_processor", part)


def qwen2(path: Path, settings: dict, listed: list[dict], vocab_size: int | None) -> tuple:
    """vocab.json and merges.txt."""
    vocab = read_json(path)
    lines = read_text(path.with_name("merges.txt")).split("\n")
    merges = [line for line in lines if line and not line.startswith("#version")]
    made = {line.replace(" ", "", 1) for line in merges} | {token["content"] for token in listed}
    lost = [token for token in vocab if len(token) > 1 and token not in made]
    if lost:
        raise ValueError(f"merges.txt does not make {len(lost)} of its tokens, the first of them "
                         f"{lost[0]!r}: it is not whole")
    size = max(vocab.values(), default=-1) + 1
    special = [added_token(f"<|{name}|>", size + i) for i, name in enumerate(QWEN2_SPECIAL)]
    model = byte_level(vocab, merges, QWEN2_WORDS, {"type": "NFC"},
                       bool(settings.get("add_prefix_space")))
    return model, [] if listed else special, None


def llama2_or_3(path: Path, settings: dict, listed: list[dict], vocab_size: int | None) -> tuple:
    """tokenizer.model: a base64 token and its rank per line (Llama 3), or a sentencepiece model."""
    if not re.match(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n", path.read_bytes()):
        legacy = settings.get("legacy", "tokenizer_class" not in settings)  # as transformers 5
        scheme = "always" if legacy else "first"
        backend = SentencePiece(path, "never" if settings.get("add_prefix_space") is False
                                else scheme)
        bos, *others = backend.model.bos_id(), backend.model.eos_id(), backend.model.unk_id()
        special = [added_token(backend.model.id_to_piece(i), i) for i in (bos, *others) if i >= 0]
        return backend, special, bos if bos >= 0 else None

    vocab: dict[str, int] = {}
    for number, line in enumerate(read_text(path).splitlines(), 1):
        try:
            token, rank = line.split()
            token = base64.b64decode(token, validate=True)
            vocab["".join(SPELLING[b] for b in token)] = int(rank)
        except ValueError:
            raise ValueError(f"line {number}: {line[:40]!r} is not a base64 token and its rank") \
                from None
    size = len(vocab)
    if sorted(vocab.values()) != [*range(size)] or not vocab.keys() >= BYTES.keys():
        raise ValueError("it lacks some of the 256 single bytes, or its ranks are not "
                         f"0..{size - 1}, each once: it is not whole")
    if vocab_size not in (None, size + 256):
        raise ValueError(f"it has {size} tokens, this model's vocabulary {vocab_size} less 256 "
                         "special ones: it is not whole, or another model's")
    special = [added_token(f"<|{name}|>", size + i) for i, name in enumerate(LLAMA3_SPECIAL)]
    return byte_level(vocab, None, LLAMA3_WORDS), [] if listed else special, size


def byte_level(vocab: dict[str, int], merges: list | None, words: str,
               normalizer: dict | None = None, spaced: bool = False) -> BPE:
    """A BPE of bytes, as tokenizer.json describes that of Llama 3 and Qwen2."""
    steps = [{"type": "Split", "pattern": {"Regex": words}, "behavior": "Isolated",
              "invert": False},
             {"type": "ByteLevel", "add_prefix_space": spaced, "use_regex": False,
              "trim_offsets": True}]
    return BPE({"pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
                "model": {"vocab": vocab, "merges": merges, "ignore_merges": merges is None},
                "normalizer": normalizer, "decoder": {"type": "ByteLevel"}})


def read_settings(folder: Path) -> tuple[dict, list[dict]]:
    """tokenizer_config.json, and the added tokens that it or added_tokens.json lists."""
    path, old = folder / "tokenizer_config.json", folder / "added_tokens.json"
    settings = read_json(path) if path.exists() else {}
    if (folder / "tokenizer.json").exists():                    # whose post_processor decides
        settings = {k: v for k, v in settings.items() if k not in ("add_bos_token",
                                                                   "add_eos_token")}
    for name in ("add_eos_token", "do_lower_case", "split_special_tokens", "sp_model_kwargs"):
        if settings.get(name):
            raise ValueError(f"{path}: {name} = {settings[name]!r} is not supported")
    tokens = settings.get("added_tokens_decoder")
    try:
        if tokens is None and old.exists():
            path, tokens = old, {i: {"content": name} for name, i in read_json(old).items()}
        return settings, [added_token(id=int(i), **token) for i, token in (tokens or {}).items()]
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path}: its added tokens cannot be used ({error})") from None


def merge_added(listed: list[dict], added: list[dict], backend) -> list[dict]:
    """The added tokens of tokenizer_config.json and of the tokenizer, which has the last word."""
    merged = {token["content"]: token for token in [*listed, *added]}
    tokens = {i: name for name, i in backend.vocab.items()}
    for token in [*listed, *added]:
        name, i = token["content"], token["id"]
        if merged[name]["id"] != i or backend.vocab.get(name, i) != i:
            raise ValueError(f"added token {name!r} has two ids")
        if tokens.setdefault(i, name) != name:
            raise ValueError(f"id {i} is that of {tokens[i]!r} and of added token {name!r}")
    return [*merged.values()]


def all_ids(backend, added: list[dict]) -> dict[str, int]:
    """Token -> id, added tokens included."""
    return backend.vocab | {token["content"]: token["id"] for token in added}


def unlisted(settings: dict, added: list[dict], backend) -> list[dict]:
    """Special tokens that only tokenizer_config.json names. As in transformers they are added."""
    named = [settings.get(f"{kind}_token")
             for kind in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")]
    for key in ("additional_special_tokens", "extra_special_tokens"):
        more = settings.get(key) or []
        named += more.values() if isinstance(more, dict) else more
    ids = all_ids(backend, added)
    known, new = {token["content"] for token in added}, []
    for token in named:
        fields = dict(token) if isinstance(token, dict) else {"content": token}
        fields.pop("__type", None)
        name = fields.get("content")
        if name and name not in known:
            known.add(name)
            ids.setdefault(name, max(ids.values()) + 1)
            new.append(added_token(id=ids[name], **fields))
    return new


def begin_of_text(settings: dict, bos: int | None, backend, added: list[dict]) -> int | None:
    """The id that texts begin with: add_bos_token of tokenizer_config.json overrides `bos`."""
    wanted, name = settings.get("add_bos_token"), settings.get("bos_token")
    if wanted is None or wanted and name is None:
        return bos
    name = name["content"] if isinstance(name, dict) else name
    ids = all_ids(backend, added)
    if wanted and name not in ids:
        raise ValueError(f"bos_token {name!r} of tokenizer_config.json is no token")
    return ids[name] if wanted else None


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
    if max(prompt) >= model.config.vocab_size:
        raise ValueError(f"id {max(prompt)} of the prompt is not in this model's vocabulary of "
                         f"{model.config.vocab_size}: visual codes need a model that has them")
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
        if args.top_k < 1 or not 0 < args.top_p <= 1:
            raise ValueError(f"--top_k {args.top_k} --top_p {args.top_p}: top_k must be at least 1 "
                             "(1 is greedy), top_p above 0 and at most 1 (1 is off)")
        dtype = getattr(torch, args.dtype) if args.dtype else None
        model = Llama.load(args.llm, dtype, args.device).requires_grad_(False)
        print(describe(model, args.device))
        tokenizer = Tokenizer.load(args.llm)
        kind = "BPE" if isinstance(tokenizer.backend, BPE) else "sentencepiece"
        print(f"tokenizer: {kind}, {tokenizer.size} tokens; {len(tokenizer.codes)} codes from id "
              f"{tokenizer.first_code}\n")
        ids = tokenizer.encode(args.prompt)
        generator = torch.Generator(args.device).manual_seed(args.seed)
        ids += continuation(model, ids, args.tokens, args.top_k, args.top_p, generator,
                            tokenizer.size)
        encoding = sys.stdout.encoding or "utf-8"               # which may lack some characters
        print(tokenizer.decode(ids).encode(encoding, "replace").decode(encoding))
    except (ValueError, RuntimeError, AssertionError) as error:     # no CUDA: AssertionError
        print(f"text.py: {str(error).splitlines()[0]}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
