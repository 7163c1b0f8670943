# ------------------------------------------------------------------ text

TEXTS = ["Hello world", "The ball moves at 12345.678 units,\n\n  then it's gone.\r\n", "naïve Ünïcode — 漢字かな 🙂 e\u0301", "",
         "   ", "'LL it's I'VE", "tabs\tand\tspaces   end ", "a<|code_7|>b <|code_255|><|code_0|>"]
CORPUS = " ".join(f"ball {i} hits the wall at {i * 7 % 31} metres a second and it's reflected, then there the other one rests here" for i in range(300))


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
RANKS = {token: i for i, token in enumerate([*(bytes([b]) for b in range(256)), *(a + b for a, b in MERGES)])}


def spelled(token: bytes) -> str:
    """GPT-2's printable spelling of bytes, from its description: bytes that print stand for themselves, others from 256."""
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
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(f"{spelled(a)} {spelled(b)}" for a, b in MERGES) + "\n")


def tokenizer_json(folder: Path) -> None:
    split = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+"
    raw = {"model": {"type": "BPE", "vocab": {spelled(t): i for t, i in RANKS.items()},
                     "merges": [[spelled(a), spelled(b)] for a, b in MERGES]}, "normalizer": None,
           "pre_tokenizer": {"pretokenizers": [{"type": "Split", "pattern": {"Regex": split}}]},
           "added_tokens": [{"id": len(RANKS) + i, "content": f"<|{name}|>"} for i, name in enumerate(lm.LLAMA3_SPECIAL)]}
    (folder / "tokenizer.json").write_text(json.dumps(raw))


def llama2_files(folder: Path) -> None:
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(CORPUS.split(" and ")), model_writer=out, vocab_size=300,
                                             model_type="bpe", byte_fallback=True, minloglevel=2)
    (folder / "tokenizer.model").write_bytes(out.getvalue())


def config_file(folder: Path, vocab: int, bos: int, n_visual: int = 0) -> None:
    config = LlamaConfig(vocab + n_visual, 32, 48, 2, 4, 2, 8, bos_token_id=bos, n_visual=n_visual)
    (folder / "config.json").write_text(json.dumps(config.to_json()))


@pytest.mark.parametrize("files", [llama3_files, tokenizer_json])
@pytest.mark.parametrize("extended", [False, True])
def test_llama3_text(tmp_path, files, extended):
    files(tmp_path)
    first = len(RANKS) + 256
    config_file(tmp_path, first, len(RANKS), 256 if extended else 0)
    ours = Tokenizer.load(tmp_path)
    theirs = tiktoken.Encoding("x", pat_str=(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"),
        mergeable_ranks=RANKS, special_tokens={f"<|code_{i}|>": first + i for i in range(256)})
    assert (ours.size, ours.first_code, ours.bos) == (first, first, len(RANKS))
    for text in TEXTS:
        ids = theirs.encode(text, allowed_special="all")
        assert ours.encode(text) == [len(RANKS), *ids] and ours.encode(text, bos=False) == ids
        assert ours.decode(ids) == text
    assert ours.encode("<|begin_of_text|><|end_of_text|><|eot_id|>", bos=False) == [len(RANKS), len(RANKS) + 1, len(RANKS) + 9]
    assert ours.decode([first + 3]) == "<|code_3|>"
    with pytest.raises(ValueError, match="stands for no token"):
        ours.decode([first + 256])


@pytest.mark.parametrize("spelling", ["vocab.json", "tokenizer.json"])
def test_qwen_text(tmp_path, spelling):
    qwen_files(tmp_path)
    if spelling == "tokenizer.json":
        raw = {"model": {"type": "BPE", "vocab": json.loads((tmp_path / "vocab.json").read_text()),
                         "merges": (tmp_path / "merges.txt").read_text().splitlines()[1:]},
               "normalizer": {"type": "NFC"}, "pre_tokenizer": {"type": "Split", "pattern": {"Regex": r"\p{N}"}},
               "added_tokens": [{"id": len(RANKS), "content": "<|endoftext|>"}]}
        (tmp_path / "vocab.json").unlink()
        (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    first = len(RANKS) + 40                                      # the model's vocabulary is padded, as Qwen's is
    config_file(tmp_path, first, len(RANKS))
    ours = Tokenizer.load(tmp_path)
    theirs = tiktoken.Encoding("x", pat_str=(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"),
        mergeable_ranks=RANKS, special_tokens={f"<|code_{i}|>": first + i for i in range(256)})
    assert ours.first_code == first and ours.bos is None
    for text in TEXTS:
        composed = text.replace("e\u0301", "\u00e9")           # NFC
        ids = theirs.encode(composed, allowed_special="all")
        assert ours.encode(text) == ids and ours.decode(ids) == composed
    assert ours.encode("<|endoftext|>") == [len(RANKS)]
    with pytest.raises(ValueError, match="stands for no token"):
        ours.decode([first - 1])                                 # padding


def test_llama2_text(tmp_path):
    llama2_files(tmp_path)
    config_file(tmp_path, 300, 1)
    ours = Tokenizer.load(tmp_path)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    assert ours.size == ours.first_code == 300 and ours.bos == theirs.bos_id() == 1
    for text in TEXTS[:7]:
        ids = theirs.encode(text)
        assert ours.encode(text) == [1, *ids] and ours.decode(ids) == theirs.decode(ids)
    assert ours.encode("hits<|code_7|>") == [1, *theirs.encode("hits"), 307]
    assert ours.decode([*theirs.encode("hits"), 307, *theirs.encode("wall"), 300]) == "hits<|code_7|>wall<|code_0|>"
    with pytest.raises(ValueError, match="stands for no token"):
        ours.decode([300 + 256])


def edit(name: str, change):
    def damage(folder: Path) -> None:
        (folder / name).write_bytes(change((folder / name).read_bytes()))
    return damage


@pytest.mark.parametrize("files, damage, culprit", [
    (llama3_files, edit("tokenizer.model", lambda b: b[:3000]), "tokenizer.model"),
    (lambda f: [llama3_files(f), config_file(f, len(RANKS) + 256, 0)],
     edit("tokenizer.model", lambda b: b"".join(b.splitlines(True)[:300])), "300 tokens"),
    (tokenizer_json, edit("tokenizer.json", lambda b: b.replace(b"p{N}", b"d")), "tokenizer.json"),
    (tokenizer_json, edit("tokenizer.json", lambda b: b.replace(b'"model": {', b'"model": null, "other": {')), "tokenizer.json"),
    (llama3_files, edit("tokenizer.model", lambda b: b"".join(b.splitlines(True)[:250])), "256 single bytes"),
    (llama3_files, edit("tokenizer.model", lambda b: b.replace(b" 300\n", b" 301\n")), "tokenizer.model"),
    (llama3_files, edit("tokenizer.model", lambda b: b.replace(b" 300\n", b" three\n")), "line 301"),
    (llama3_files, edit("tokenizer.model", lambda b: b.replace(b" 300\n", b"\n")), "line 301"),
    (llama2_files, edit("tokenizer.model", lambda b: b[:len(b) // 2]), "tokenizer.model"),
    (llama2_files, edit("tokenizer.model", lambda b: b"\x89PNG" + b), "tokenizer.model"),
    (llama2_files, edit("tokenizer.model", lambda b: b""), "tokenizer.model"),
    (qwen_files, edit("vocab.json", lambda b: b[:500]), "vocab.json"),
    (qwen_files, edit("vocab.json", lambda b: b"[]"), "vocab.json"),
    (qwen_files, edit("merges.txt", lambda b: b[:len(b) // 2]), "merges"),
    (qwen_files, edit("merges.txt", lambda b: b"\n".join(b.split(b"\n")[::-1])), "merges"),
    (qwen_files, lambda f: (f / "merges.txt").unlink(), "merges.txt"),
    (tokenizer_json, edit("tokenizer.json", lambda b: b.replace(b'"BPE"', b'"Unigram"')), "tokenizer.json"),
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
    assert (tmp_path / "c" / "tokenizer.model").read_bytes() == (tmp_path / "a" / "tokenizer.model").read_bytes()
    tokenizer = Tokenizer.load(tmp_path / "c")
    assert tokenizer.first_code == 320 and tokenizer.encode("<|code_1|>") == [1, 321]


# ------------------------------------------------------------------ python lm.py


def run(*args) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, lm.__file__, *map(str, args)], capture_output=True, text=True)


def test_every_way_to_split_a_token_may_be_listed(tmp_path):
    """As transformers writes Llama 3's tokenizer.json: all pairs that make a token, in the order of the tokens."""
    tokenizer_json(tmp_path)
    raw = json.loads((tmp_path / "tokenizer.json").read_text())
    raw["model"]["vocab"] = {spelled(bytes([b])): b for b in range(256)} | {"ab": 256, "bc": 257, "abc": 258}
    raw["model"]["merges"] = ["a b", "b c", "a bc", "ab c"]
    raw["added_tokens"] = []
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.encode("abcbcab") == [258, 257, 256] and tokenizer.size == 259


def test_special_tokens_keep_their_names(tmp_path):
    qwen_files(tmp_path)
    added = {len(RANKS): "<|endoftext|>", len(RANKS) + 5: "<tool_call>", len(RANKS) + 6: "</tool_call>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(
        {"added_tokens_decoder": {str(i): {"content": name} for i, name in added.items()}}))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.encode("".join(added.values())) == list(added) and tokenizer.size == len(RANKS) + 7
    for bad in (-1, 2 ** 40, len(RANKS) + 4):
        with pytest.raises(ValueError, match="stands for no token"):
            tokenizer.decode([bad])


def test_the_original_tokenizer_travels_too(tmp_path):
    shutil.copytree(FIXTURES / "llama2", tmp_path / "a")
    (tmp_path / "a" / "original").mkdir()
    llama2_files(tmp_path / "a" / "original")
    before = os.getcwd()
    os.chdir(tmp_path)
    try:
        model = Llama.load("a")
    finally:
        os.chdir(before)
    model.save(tmp_path / "b")
    assert Tokenizer.load(tmp_path / "b").encode("ball") == Tokenizer.load(tmp_path / "a").encode("ball")


def test_command_line(tmp_path):
    folder = shutil.copytree(FIXTURES / "llama2", tmp_path / "m")
    llama2_files(folder)
    done = run("--llm", folder, "--prompt", "the ball hits", "--tokens", 8, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    model = Llama.load(folder)
    assert f"{sum(p.numel() for p in model.parameters()):,} parameters" in done.stdout
    assert "2 layers of width 64" in done.stdout and "sentencepiece, 300 tokens; 256 codes from id 320" in done.stdout
    assert "the ball hits" in done.stdout.splitlines()[-1]


@pytest.mark.parametrize("args, culprit", [(("--tokens", 0), "0 new ones"), (("--tokens", 500), "context is 256"),
                                           (("--device", "abacus"), "abacus"), (("--prompt", "ball " * 300), "context is 256")])
def test_command_line_with_bad_values(tmp_path, args, culprit):
    folder = shutil.copytree(FIXTURES / "llama2", tmp_path / "m")
    llama2_files(folder)
    done = run("--llm", folder, "--device", "cpu", *args)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and culprit in done.stderr, done.stderr


@pytest.mark.parametrize("damage, culprit", [
    (lambda f: shutil.rmtree(f), "config.json"),
    (lambda f: (f / "tokenizer.model").unlink(), "holds no tokenizer"),
    (lambda f: os.truncate(f / "model.safetensors", 1000), "model.safetensors")])
def test_command_line_on_bad_folders(tmp_path, damage, culprit):
    folder = shutil.copytree(FIXTURES / "llama2", tmp_path / "m")
    llama2_files(folder)
    damage(folder)
    done = run("--llm", folder, "--device", "cpu")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and culprit in done.stderr
