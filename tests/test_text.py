"""
Text: the tokenizers against tiktoken and sentencepiece, continuations, and the command.

    pytest tests/test_text.py

The vocabularies are small ones, learnt here from a made-up corpus.
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
    split = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+"
    special = [f"<|{name}|>" for name in text.LLAMA3_SPECIAL]
    raw = {"model": {"type": "BPE", "vocab": {spelled(t): i for t, i in RANKS.items()},
                     "merges": [[spelled(a), spelled(b)] for a, b in MERGES]},
           "normalizer": None,
           "pre_tokenizer": {"pretokenizers": [{"type": "Split", "pattern": {"Regex": split}}]},
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


@pytest.mark.parametrize("spelling", ["vocab.json", "tokenizer.json"])
def test_qwen_text(tmp_path, spelling):
    qwen_files(tmp_path)
    if spelling == "tokenizer.json":
        raw = {"model": {"type": "BPE", "vocab": json.loads((tmp_path / "vocab.json").read_text()),
                         "merges": (tmp_path / "merges.txt").read_text().splitlines()[1:]},
               "normalizer": {"type": "NFC"},
               "pre_tokenizer": {"type": "Split", "pattern": {"Regex": r"\p{N}"}},
               "added_tokens": [{"id": len(RANKS), "content": "<|endoftext|>"}]}
        (tmp_path / "vocab.json").unlink()
        (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
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
    (qwen_files, edit("merges.txt", lambda b: b"\n".join(b.split(b"\n")[::-1])), "merges"),
    (qwen_files, lambda f: (f / "merges.txt").unlink(), "merges.txt"),
    (tokenizer_json, replace("tokenizer.json", b"p{N}", b"d"), "tokenizer.json"),
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


def test_every_way_to_split_a_token_may_be_listed(tmp_path):
    """As in Llama 3's tokenizer.json: all pairs that make a token, in the order of the tokens."""
    tokenizer_json(tmp_path)
    raw = json.loads((tmp_path / "tokenizer.json").read_text())
    single = {spelled(bytes([b])): b for b in range(256)}
    raw["model"]["vocab"] = single | {"ab": 256, "bc": 257, "abc": 258}
    raw["model"]["merges"] = ["a b", "b c", "a bc", "ab c"]
    raw["added_tokens"] = []
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.encode("abcbcab") == [258, 257, 256] and tokenizer.size == 259


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
