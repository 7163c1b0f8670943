"""
Text: the tokenizers against tiktoken, sentencepiece, tokenizers and transformers, continuations,
and the command.

    pytest tests/test_text.py

The vocabularies are small ones, learnt here from a made-up corpus, or by tokenizers 0.23.3 for
fixtures/tokenizers, where answers.json holds [text, ids, decoded ids] for each tokenizer.json.
llama2.model.json and qwen2.vocab.json: transformers 5.24's ids for each tokenizer_config.json.
"""
import base64
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
import tiktoken
import torch
from safetensors.torch import load_file

import text
from lm import Llama, LlamaConfig
from text import Tokenizer, continuation
from weights import config_to_json

FIXTURES = Path(__file__).parent / "fixtures"
TEXTS = ["Hello world", "The ball moves at 12345.678 units,\n\n  then it's gone.\r\n",
         "naïve Ünïcode — 漢字かな 🙂 e\u0301", "", "   ", "'LL it's I'VE",
         "tabs\tand\tspaces   end ", "a<|code_7|>b <|code_255|><|code_0|>",
         "<|code_256|>, which is no code"]
CORPUS = " ".join(f"ball {i} hits the wall at {i * 7 % 31} metres a second and it's reflected, "
                  "then there the other one rests here" for i in range(300))


# ------------------------------------------------------------------ continuing a text


@pytest.mark.parametrize("name", ["llama31", "llama2", "qwen25-tied", "qwen25-untied"])
def test_greedy_continuation_is_that_of_transformers(name):
    model = Llama.load(FIXTURES / name)
    for row in load_file(FIXTURES / name / "expected.safetensors")["greedy"].tolist():
        assert list(continuation(model, row[:24], 24, top_k=1)) == row[24:]


def test_continuation_ends_at_an_end_of_text():
    torch.manual_seed(0)
    model = Llama(LlamaConfig(80, 32, 48, 2, 4, 2, 8, eos_token_id=[3, 9], n_visual=32))
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        ids = list(continuation(model, [1, 2], 60, 80, 1.0, generator, words=12))
        assert max(ids, default=0) < 12 and not {3, 9} & set(ids)
        if len(ids) < 60:
            return
    raise AssertionError("none of 20 texts ended")


def test_continuation_longer_than_the_context():
    model = Llama(LlamaConfig(80, 32, 48, 2, 4, 2, 8, max_position_embeddings=12))
    assert len(list(continuation(model, [1, 2, 3, 4, 5], 7))) == 7
    with pytest.raises(ValueError, match="5 [+] 8 new .* 12"):
        list(continuation(model, [1, 2, 3, 4, 5], 8))


# ------------------------------------------------------------------ tokenizers


def trained_bpe(n: int) -> list[tuple[bytes, bytes]]:
    """n merges learnt from the corpus, the slow and plain way."""
    words = [[bytes([b]) for b in (" " + word).encode()] for word in CORPUS.split()]
    merges = []
    for _ in range(n):
        counts: dict = {}
        for word in words:
            for pair in zip(word, word[1:]):
                counts[pair] = counts.get(pair, 0) + 1
        best = max(counts, key=lambda pair: (counts[pair], pair))
        merges.append(best)
        for word in words:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == best:
                    word[i:i + 2] = [best[0] + best[1]]
                i += 1
    return merges


MERGES = trained_bpe(120)
TOKENS = [*(bytes([b]) for b in range(256)), *(a + b for a, b in MERGES)]
RANKS = {token: i for i, token in enumerate(TOKENS)}


def spelled(token: bytes) -> str:
    """GPT-2's spelling: a byte that prints stands for itself, others are numbered from 256."""
    table, n = {}, 0
    for b in range(256):
        if 33 <= b <= 126 or 161 <= b <= 172 or 174 <= b <= 255:
            table[b] = chr(b)
        else:
            table[b] = chr(256 + n)
            n += 1
    return "".join(table[b] for b in token)


def llama3_files(folder: Path) -> None:
    lines = [base64.b64encode(token).decode() + f" {rank}" for token, rank in RANKS.items()]
    (folder / "tokenizer.model").write_text("\n".join(lines) + "\n")


def qwen_files(folder: Path) -> None:
    (folder / "vocab.json").write_text(json.dumps({spelled(t): i for t, i in RANKS.items()}))
    lines = ["#version: 0.2", *(f"{spelled(a)} {spelled(b)}" for a, b in MERGES)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")


def tokenizer_json(folder: Path) -> None:
    split = {"type": "Split", "pattern": {"Regex": text.LLAMA3_WORDS}, "behavior": "Isolated",
             "invert": False}
    spell = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
             "use_regex": False}
    special = [f"<|{name}|>" for name in text.LLAMA3_SPECIAL]
    begin = {"id": special[0], "ids": [len(RANKS)], "tokens": [special[0]]}
    raw = {"model": {"type": "BPE", "vocab": {spelled(t): i for t, i in RANKS.items()},
                     "merges": [[spelled(a), spelled(b)] for a, b in MERGES]},
           "normalizer": None, "decoder": {"type": "ByteLevel"},
           "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, spell]},
           "post_processor": {"type": "TemplateProcessing", "pair": [],
                              "single": [{"SpecialToken": {"id": special[0], "type_id": 0}},
                                         {"Sequence": {"id": "A", "type_id": 0}}],
                              "special_tokens": {special[0]: begin}},
           "added_tokens": [{"id": len(RANKS) + i, "content": name}
                            for i, name in enumerate(special)]}
    (folder / "tokenizer.json").write_text(json.dumps(raw))


def llama2_files(folder: Path) -> None:
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS.split(" and ")), model_writer=out, vocab_size=300,
        model_type="bpe", byte_fallback=True, minloglevel=2)
    (folder / "tokenizer.model").write_bytes(out.getvalue())


def config_file(folder: Path, vocab: int, bos: int, n_visual: int = 0) -> None:
    config = LlamaConfig(vocab + n_visual, 32, 48, 2, 4, 2, 8, bos_token_id=bos, n_visual=n_visual)
    (folder / "config.json").write_text(json.dumps(config_to_json(config)))


def by_tiktoken(digits: str, first: int) -> tiktoken.Encoding:
    words = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS"
             r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+").replace("DIGITS", digits)
    codes = {f"<|code_{i}|>": first + i for i in range(256)}
    return tiktoken.Encoding("x", pat_str=words, mergeable_ranks=RANKS, special_tokens=codes)


@pytest.mark.parametrize("files", [llama3_files, tokenizer_json])
@pytest.mark.parametrize("extended", [False, True])
def test_llama3_text(tmp_path, files, extended):
    files(tmp_path)
    first = len(RANKS) + 256
    config_file(tmp_path, first, len(RANKS), 256 if extended else 0)
    ours = Tokenizer.load(tmp_path)
    theirs = by_tiktoken("{1,3}", first)
    assert (ours.size, ours.first_code, ours.bos) == (first, first, len(RANKS))
    for sample in TEXTS:
        ids = theirs.encode(sample, allowed_special="all")
        assert ours.encode(sample) == [len(RANKS), *ids] and ours.encode(sample, bos=False) == ids
        assert ours.decode(ids) == sample
    ids = ours.encode("<|begin_of_text|><|end_of_text|><|eot_id|>", bos=False)
    assert ids == [len(RANKS), len(RANKS) + 1, len(RANKS) + 9]
    assert ours.decode([first + 3]) == "<|code_3|>"
    with pytest.raises(ValueError, match="stands for no token"):
        ours.decode([first + 256])


def test_qwen_text(tmp_path):
    qwen_files(tmp_path)
    first = len(RANKS) + 40                     # the model's vocabulary is padded, as Qwen's is
    config_file(tmp_path, first, len(RANKS))
    ours = Tokenizer.load(tmp_path)
    theirs = by_tiktoken("", first)
    assert ours.first_code == first and ours.bos is None
    for sample in TEXTS:
        composed = sample.replace("e\u0301", "\u00e9")          # NFC
        ids = theirs.encode(composed, allowed_special="all")
        assert ours.encode(sample) == ids and ours.decode(ids) == composed
    assert ours.encode("<|endoftext|>") == [len(RANKS)]
    with pytest.raises(ValueError, match="stands for no token"):
        ours.decode([first - 1])                                # padding


def test_llama2_text(tmp_path):
    llama2_files(tmp_path)
    config_file(tmp_path, 300, 1)
    ours = Tokenizer.load(tmp_path)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    assert ours.size == ours.first_code == 300 and ours.bos == theirs.bos_id() == 1
    for sample in [*TEXTS[:7], TEXTS[8]]:
        ids = theirs.encode(sample)
        assert ours.encode(sample) == [1, *ids] and ours.decode(ids) == theirs.decode(ids)
    assert ours.encode("hits<|code_7|>") == [1, *theirs.encode("hits"), 307]
    ids = [*theirs.encode("hits"), 307, *theirs.encode("wall"), 300]
    assert ours.decode(ids) == "hits<|code_7|>wall<|code_0|>"
    with pytest.raises(ValueError, match="stands for no token"):
        ours.decode([300 + 256])


def edit(name: str, change):
    def damage(folder: Path) -> None:
        (folder / name).write_bytes(change((folder / name).read_bytes()))
    return damage


def replace(name: str, old: bytes, new: bytes):
    return edit(name, lambda content: content.replace(old, new))


def lines(name: str, n: int):
    return edit(name, lambda content: b"".join(content.splitlines(True)[:n]))


def llama3_model(folder: Path) -> None:
    llama3_files(folder)
    config_file(folder, len(RANKS) + 256, 0)


@pytest.mark.parametrize("files, damage, culprit", [
    (llama3_files, edit("tokenizer.model", lambda b: b[:3000]), "tokenizer.model"),
    (llama3_model, lines("tokenizer.model", 300), "300 tokens"),
    (llama3_files, lines("tokenizer.model", 250), "256 single bytes"),
    (llama3_files, replace("tokenizer.model", b" 300\n", b" 301\n"), "tokenizer.model"),
    (llama3_files, replace("tokenizer.model", b" 300\n", b" three\n"), "line 301"),
    (llama3_files, replace("tokenizer.model", b" 300\n", b"\n"), "line 301"),
    (llama2_files, edit("tokenizer.model", lambda b: b[:len(b) // 2]), "tokenizer.model"),
    (llama2_files, edit("tokenizer.model", lambda b: b"\x89PNG" + b), "tokenizer.model"),
    (llama2_files, edit("tokenizer.model", lambda b: b""), "tokenizer.model"),
    (qwen_files, edit("vocab.json", lambda b: b[:500]), "vocab.json"),
    (qwen_files, edit("vocab.json", lambda b: b"[]"), "vocab.json"),
    (qwen_files, edit("merges.txt", lambda b: b[:len(b) // 2]), "merges"),
    (qwen_files, lambda f: (f / "merges.txt").unlink(), "merges.txt"),
    (tokenizer_json, replace("tokenizer.json", b"p{N}", b"d"), "pre_tokenizer"),
    (tokenizer_json, replace("tokenizer.json", b'"model": {', b'"model": null, "other": {'),
     "tokenizer.json"),
    (tokenizer_json, replace("tokenizer.json", b'"BPE"', b'"Unigram"'), "tokenizer.json"),
    (tokenizer_json, edit("tokenizer.json", lambda b: b[:500]), "tokenizer.json"),
    (lambda f: None, lambda f: None, "holds no tokenizer")])
def test_broken_tokenizers_are_named(tmp_path, files, damage, culprit):
    files(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=culprit):
        Tokenizer.load(tmp_path)


def test_tokenizer_larger_than_the_model(tmp_path):
    qwen_files(tmp_path)
    config_file(tmp_path, 300, 0)
    with pytest.raises(ValueError, match=f"{len(RANKS) + 3} tokens.* 300"):
        Tokenizer.load(tmp_path)


def test_tokenizer_files_travel_with_the_model(tmp_path):
    shutil.copytree(FIXTURES / "llama2", tmp_path / "a")
    llama2_files(tmp_path / "a")
    Llama.load(tmp_path / "a", n_visual=256).save(tmp_path / "b")
    Llama.load(tmp_path / "b").save(tmp_path / "c")
    first, last = (tmp_path / folder / "tokenizer.model" for folder in "ac")
    assert last.read_bytes() == first.read_bytes()
    tokenizer = Tokenizer.load(tmp_path / "c")
    assert tokenizer.first_code == 320 and tokenizer.encode("<|code_1|>") == [1, 321]


# ------------------------------------------------------------------ tokenizers' own ids

ANSWERS = json.loads((FIXTURES / "tokenizers" / "answers.json").read_text(encoding="utf-8"))


def fixture(folder: Path, name: str, change=lambda raw: None) -> Tokenizer:
    """A tokenizer.json of the fixtures, loaded after a change."""
    raw = json.loads((FIXTURES / "tokenizers" / f"{name}.json").read_text(encoding="utf-8"))
    change(raw)
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    return Tokenizer.load(folder)


@pytest.mark.parametrize("name", ANSWERS)
def test_tokenizer_json_is_that_of_tokenizers(name, tmp_path):
    """Ids and text as tokenizers 0.23.3 gives them, added tokens and begin-of-text included."""
    tokenizer = fixture(tmp_path, name)
    for sample, ids, decoded in ANSWERS[name]:
        assert tokenizer.encode(sample) == ids, sample
        assert tokenizer.decode(ids) == decoded, sample


def configured(folder: Path, settings: dict, added: dict | None) -> Tokenizer:
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if added is not None:
        (folder / "added_tokens.json").write_text(json.dumps(added))
    return Tokenizer.load(folder)


def answers(name: str) -> dict:
    path = FIXTURES / "tokenizers" / name
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", answers("llama2.model.json"))
def test_llama2_model_is_that_of_transformers(case, tmp_path):
    """Ids of transformers 5.24: added and special tokens in the text, tokenizer_config.json."""
    shutil.copy(FIXTURES / "tokenizers" / "llama2.model", tmp_path / "tokenizer.model")
    settings, added, texts = answers("llama2.model.json")[case]
    tokenizer = configured(tmp_path, settings, added)
    for sample, ids in texts:
        assert tokenizer.encode(sample, bos=bool(settings)) == ids, sample
    assert tokenizer.decode([300, 2]) == "<|im_start|></s>"


@pytest.mark.parametrize("case", answers("qwen2.vocab.json"))
def test_qwen2_vocab_is_that_of_transformers(case, tmp_path):
    raw = json.loads((FIXTURES / "tokenizers" / "qwen2.json").read_text(encoding="utf-8"))
    settings, added, texts = answers("qwen2.vocab.json")[case]
    words = {token["content"] for token in raw["added_tokens"] if len(token["content"]) > 1}
    vocab = {token: i for token, i in raw["model"]["vocab"].items() if token not in words}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    merges = "\n".join(map(" ".join, raw["model"]["merges"]))
    (tmp_path / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
    tokenizer = configured(tmp_path, settings, added)
    for sample, ids in texts:
        assert tokenizer.encode(sample) == ids, sample


def put(value, *place):
    """A change: raw[place[0]][place[1]]... = value."""
    def change(raw: dict) -> None:
        for key in place[:-1]:
            raw = raw[key]
        raw[place[-1]] = value
    return change


DIGITS = {"type": "Digits", "individual_digits": True}
WORDS = ("pre_tokenizer", "pretokenizers")
UNFOLLOWED = {                              # fixture, change, what the message names
    "normalizer": ("qwen2", put({"type": "Lowercase"}, "normalizer"), "Lowercase"),
    "field": ("qwen2", put({"type": "NFC", "form": 2}, "normalizer"), "form"),
    "regex": ("llama2-prepend", put({"Regex": " "}, "normalizer", "normalizers", 1, "pattern"),
              "Regex"),
    "digits": ("qwen2", put(DIGITS, *WORDS, 0), "Digits"),
    "pattern": ("qwen2", put({"Regex": r"\p{N}{1,3}|\p{L}+"}, *WORDS, 0, "pattern"), "pattern"),
    "behavior": ("qwen2", put("Removed", *WORDS, 0, "behavior"), "Removed"),
    "invert": ("qwen2", put(True, *WORDS, 0, "invert"), "invert"),
    "use_regex": ("qwen2", put(True, *WORDS, 1, "use_regex"), "use_regex"),
    "scheme": ("llama2-metaspace", put("last", "pre_tokenizer", "prepend_scheme"), "scheme"),
    "decoder": ("qwen2", put({"type": "WordPiece"}, "decoder"), "WordPiece"),
    "dropout": ("qwen2", put(0.1, "model", "dropout"), "dropout"),
    "prefix": ("qwen2", put("##", "model", "continuing_subword_prefix"), "subword_prefix"),
    "suffix": ("qwen2", put("</w>", "model", "end_of_word_suffix"), "end_of_word_suffix"),
    "model": ("qwen2", put("Unigram", "model", "type"), "Unigram"),
    "model field": ("qwen2", put(1, "model", "temperature"), "temperature"),
    "added token": ("qwen2", put(True, "added_tokens", 0, "fuzzy"), "fuzzy"),
    "id": ("qwen2", put(7, "added_tokens", 0, "id"), "two ids"),
    "truncation": ("qwen2", put({"max_length": 5}, "truncation"), "truncation"),
    "padding": ("qwen2", put({"strategy": {"Fixed": 8}}, "padding"), "padding"),
    "end of text": ("llama2-prepend", lambda raw: raw["post_processor"]["single"].append(
        {"SpecialToken": {"id": "<s>", "type_id": 0}}), "post_processor"),
    "post_processor": ("qwen2", put({"type": "BertProcessing"}, "post_processor"), "Bert"),
    "other": ("qwen2", put({}, "spelling"), "spelling"),
    "merges": ("qwen2", lambda raw: raw["model"]["merges"].append(["q", "zq"]), "q \\+ zq")}


@pytest.mark.parametrize("name, change, culprit", UNFOLLOWED.values(), ids=UNFOLLOWED)
def test_what_is_not_followed_is_refused(name, change, culprit, tmp_path):
    with pytest.raises(ValueError, match=f"tokenizer.json.*{culprit}"):
        fixture(tmp_path, name, change)


def test_merges_go_before_ids(tmp_path):
    """ignore_merges takes a word that is a token as it is; otherwise only merges make tokens."""
    split, vocab = [["a", "b"], ["ab", "c"]], {"abc": 999, "ab": 998, "bc": 997, "abbc": 996}

    def change(raw):
        raw["model"]["merges"] = split
        raw["model"]["vocab"] = {t: i for t, i in raw["model"]["vocab"].items() if len(t) == 1}
        raw["model"]["vocab"] |= vocab
        raw["added_tokens"], raw["post_processor"] = [], None
    a, b, c = (fixture(tmp_path, "llama3", change).backend.vocab[x] for x in "abc")
    for ignore, ids in ((True, [996]), (False, [998, b, c])):
        tokenizer = fixture(tmp_path, "llama3", lambda raw: (
            change(raw), raw["model"].update(ignore_merges=ignore)))
        assert tokenizer.encode("abbc") == ids and tokenizer.encode("abcabc") == [999, 999]
        assert tokenizer.encode("cbc") == [c, b, c]


@pytest.mark.parametrize("settings, culprit", [
    ({"add_eos_token": True}, "add_eos_token"), ({"split_special_tokens": True}, "split_special"),
    ({"sp_model_kwargs": {"alpha": 0.1}}, "sp_model_kwargs"),
    ({"add_bos_token": True, "bos_token": "<begin>"}, "<begin>"),
    ({"added_tokens_decoder": {"999": {"content": "</s>"}}}, "two ids"),
    ({"added_tokens_decoder": {"5": {"content": "<x>"}}}, "id 5"),
    ({"added_tokens_decoder": {"x": {"content": "<x>"}}}, "added tokens"),
    ({"added_tokens_decoder": {"300": {"content": "<x>", "glued": True}}}, "glued")])
def test_settings_that_are_not_followed(settings, culprit, tmp_path):
    shutil.copy(FIXTURES / "tokenizers" / "llama2.model", tmp_path / "tokenizer.model")
    with pytest.raises(ValueError, match=f"{tmp_path}.*{culprit}"):
        configured(tmp_path, settings, None)


def test_the_post_processor_decides_and_not_tokenizer_config(tmp_path):
    """As in transformers 5, which drops add_bos_token where there is a tokenizer.json."""
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"add_bos_token": True, "bos_token": "<s>"}))
    assert fixture(tmp_path, "qwen2").bos is None
    assert fixture(tmp_path, "llama3").bos == 328 == fixture(tmp_path, "llama3").encode("<s>")[0]
    assert fixture(tmp_path, "llama3", put(None, "post_processor")).bos is None


def test_every_way_to_split_a_token_may_be_listed(tmp_path):
    """As in Llama 3's tokenizer.json: all pairs that make a token, in the order of the tokens."""
    tokenizer_json(tmp_path)
    raw = json.loads((tmp_path / "tokenizer.json").read_text())
    single = {spelled(bytes([b])): b for b in range(256)}
    raw["model"]["vocab"] = single | {"ab": 256, "bc": 257, "abc": 258}
    raw["model"]["merges"] = ["a b", "b c", "a bc", "ab c"]
    raw["added_tokens"], raw["post_processor"] = [], None
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.encode("abcbcab") == [258, 257, 256] and tokenizer.size == 259


def with_added(token: dict):
    """A change: one more added token, whose id is the next one."""
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return lambda raw: raw["added_tokens"].append(plain | {"content": "<x>", "special": False}
                                                  | token)


NEXT = max(token["id"] for token in answers("qwen2.json")["added_tokens"]) + 1
# what tokenizers 0.23.3 cuts out: white space is Unicode's, without the separators U+001C..1F
# that Python counts; letters are Unicode's, with accents that combine and without fractions
CUT = {"lstrip": [("a \x85\u3000<x>", ["a", NEXT]), ("a\x1c <x>", ["a\x1c", NEXT]),
                  ("a\u200b<x>", ["a\u200b", NEXT])],
       "rstrip": [("<x>\u2028\t!", [NEXT, "!"]), ("<x>\x1f!", [NEXT, "\x1f!"])],
       "single_word": [("\u00bd<x>\u00b2", ["\u00bd", NEXT, "\u00b2"]), ("_<x>", ["_<x>"]),
                       ("<x>\u0345", ["<x>\u0345"]), ("\u2167<x>", ["\u2167<x>"]),
                       ("<x>\u200d", ["<x>\u200d"]), ("-<x>.", ["-", NEXT, "."])]}


@pytest.mark.parametrize("flag", CUT)
def test_what_stands_beside_an_added_token(flag, tmp_path):
    tokenizer = fixture(tmp_path, "qwen2", with_added({"id": NEXT, flag: True}))
    for sample, parts in CUT[flag]:
        ids = [[part] if isinstance(part, int) else tokenizer.backend.encode(part, True)
               for part in parts]
        assert tokenizer.encode(sample) == sum(ids, []), ascii(sample)


def test_ids_that_tokenizers_would_not_give(tmp_path):
    """tokenizers 0.23.3 gives an added token the next id, whatever the file says."""
    assert fixture(tmp_path, "qwen2", with_added({"id": NEXT})).encode("<x>") == [NEXT]
    message = f"'<x>' has the id {NEXT + 9}, but the next one is {NEXT}"
    with pytest.raises(ValueError, match=message):
        fixture(tmp_path, "qwen2", with_added({"id": NEXT + 9}))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<x>": NEXT + 9}))
    with pytest.raises(ValueError, match=message):
        fixture(tmp_path, "qwen2")


@pytest.mark.parametrize("name, spaced", [("qwen2", False), ("llama3", False),
                                          ("llama2-prepend", True), ("llama2-metaspace", True),
                                          ("prefix-space", True)])
def test_two_values_of_add_prefix_space(name, spaced, tmp_path):
    for value in (None, spaced, not spaced):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_prefix_space": value}))
        if value in (None, spaced):
            fixture(tmp_path, name)
        else:
            with pytest.raises(ValueError, match="add_prefix_space.*make them agree"):
                fixture(tmp_path, name)


@pytest.mark.parametrize("settings, ids", [
    ({"pad_token": "[PAD]"}, [NEXT, "<x>", "!"]),
    ({"additional_special_tokens": ["<x>"], "pad_token": "[PAD]"}, [NEXT, NEXT + 1, "!"]),
    ({"extra_special_tokens": {"image_token": "<x>"}}, ["[PAD]", NEXT, "!"]),
    ({"eos_token": {"__type": "AddedToken", "content": "<x>", "special": True}},
     ["[PAD]", NEXT, "!"]),
    ({"bos_token": "", "eos_token": None, "unk_token": "!"}, ["[PAD]<x>", 0])])
def test_special_tokens_of_tokenizer_config_are_added(settings, ids, tmp_path):
    """As in transformers 5.24, in the order of its names: bos, eos, unk, pad, then the others."""
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = fixture(tmp_path, "qwen2")
    expected = [[part] if isinstance(part, int) else tokenizer.backend.encode(part, True)
                for part in ids]
    assert tokenizer.encode("[PAD]<x>!") == sum(expected, [])


def test_tokens_behind_the_vocabulary(tmp_path):
    """As the <pad> of some copies of Llama 2: 32000, where the model has 32000 rows."""
    shutil.copy(FIXTURES / "tokenizers" / "llama2.model", tmp_path / "tokenizer.model")
    (tmp_path / "added_tokens.json").write_text('{"<pad>": 300}')
    config_file(tmp_path, 300, 1)
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.size == tokenizer.first_code == 300
    assert tokenizer.encode("<|code_0|>") == [1, 300] and tokenizer.decode([300]) == "<|code_0|>"
    with pytest.raises(ValueError, match="'<pad>' has no id in this model's vocabulary"):
        tokenizer.encode("ball<pad>")
    config_file(tmp_path, 301, 1)
    assert Tokenizer.load(tmp_path).encode("<pad>") == [1, 300]


def test_special_tokens_keep_their_names(tmp_path):
    qwen_files(tmp_path)
    first = len(RANKS)
    added = {first: "<|endoftext|>", first + 5: "<tool_call>", first + 6: "</tool_call>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(
        {"added_tokens_decoder": {str(i): {"content": name} for i, name in added.items()}}))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.encode("".join(added.values())) == list(added)
    assert tokenizer.size == first + 7
    for bad in (-1, 2 ** 40, first + 4):
        with pytest.raises(ValueError, match="stands for no token"):
            tokenizer.decode([bad])


def test_the_original_tokenizer_travels_too(tmp_path, monkeypatch):
    shutil.copytree(FIXTURES / "llama2", tmp_path / "a")
    (tmp_path / "a" / "original").mkdir()
    llama2_files(tmp_path / "a" / "original")
    with monkeypatch.context() as m:
        m.chdir(tmp_path)
        model = Llama.load("a")
    model.save(tmp_path / "b")
    first, second = (Tokenizer.load(tmp_path / folder).encode("ball") for folder in "ab")
    assert first == second


# ------------------------------------------------------------------ python text.py


@pytest.fixture
def folder(tmp_path):
    llama2_files(shutil.copytree(FIXTURES / "llama2", tmp_path / "m"))
    return tmp_path / "m"


def test_command_line(folder):
    command = [sys.executable, text.__file__, "--llm", folder, "--prompt", "the ball hits",
               "--tokens", "8", "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    count = sum(p.numel() for p in Llama.load(folder).parameters())
    assert f"{count:,} parameters" in done.stdout and "2 layers of width 64" in done.stdout
    assert "sentencepiece, 300 tokens; 256 codes from id 320" in done.stdout
    assert "the ball hits" in done.stdout.splitlines()[-1]


def test_terminals_and_locales_that_are_not_utf8(tmp_path):
    """What cannot be printed becomes "?"; files are UTF-8 everywhere."""
    raw = json.loads((FIXTURES / "tokenizers" / "llama2-prepend.json").read_text(encoding="utf-8"))
    Llama(LlamaConfig(400, 32, 48, 2, 4, 2, 8)).save(tmp_path)
    content = json.dumps(raw, ensure_ascii=False)
    (tmp_path / "tokenizer.json").write_text(content, encoding="utf-8")
    arguments = ["--llm", str(tmp_path), "--prompt", "caf\u00e9 the", "--tokens", "1"]
    script = f"import text; text.main({ascii(arguments)} + ['--device', 'cpu'])"
    environment = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True,
                          env=os.environ | environment, cwd=Path(text.__file__).parent)
    assert done.returncode == 0, done.stderr
    assert "caf? the" in done.stdout


def refusal(capsys, *args) -> str:
    """The one line of error with which the command refuses."""
    with pytest.raises(SystemExit) as stop:
        text.main([str(a) for a in args])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    return error


@pytest.mark.parametrize("args, culprit", [
    (("--tokens", 0), "0 new ones"),
    (("--tokens", 500), "context is 256"),
    (("--top_k", 0), "--top_k 0"), (("--top_k", -1), "--top_k -1"),
    (("--top_p", 0), "--top_p 0"), (("--top_p", 2), "--top_p 2"), (("--top_p", "nan"), "nan"),
    (("--prompt", "<|code_3|>"), "id 323"),
    (("--device", "abacus"), "abacus"),
    (("--prompt", "ball " * 300), "context is 256")])
def test_command_line_with_bad_values(folder, capsys, args, culprit):
    assert culprit in refusal(capsys, "--llm", folder, "--device", "cpu", *args)


@pytest.mark.parametrize("damage, culprit", [
    (lambda f: shutil.rmtree(f), "config.json"),
    (lambda f: (f / "tokenizer.model").unlink(), "holds no tokenizer"),
    (lambda f: os.truncate(f / "model.safetensors", 1000), "model.safetensors")])
def test_command_line_on_bad_folders(folder, capsys, damage, culprit):
    damage(folder)
    assert culprit in refusal(capsys, "--llm", folder, "--device", "cpu")
