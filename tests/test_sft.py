"""
SFT: the rows that codes start with, replay of number sequences, the cache of the clips' codes.

    pytest tests/test_sft.py
"""
import dataclasses
import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import checkpoint
import evaluate
import sft
import sim
import train
from checkpoint import UserError
from lm import Llama, LlamaConfig
from prior import circle

ALONE = train.World(0, 1, torch.device("cpu"))
FIXTURES = Path(__file__).parent / "fixtures"


# ------------------------------------------------------------------ training clips as codes


@pytest.fixture
def tokenizer(monkeypatch):
    """
    A tokenizer whose codes tell which clip they are of: x and y of every frame's centre, in
    hundredths of the view. Its `asked` lists the numbers of clips that it encoded.
    """
    asked = []

    def tokenize(_, clips):
        asked.append(len(clips))
        return (clips.position[:, :, 0] * 10).round().to(torch.uint8)
    monkeypatch.setattr(sft, "tokenize", tokenize)
    quantizer = SimpleNamespace(codebook=torch.ones(2, 2))
    return SimpleNamespace(config=SimpleNamespace(queries=2), quantizer=quantizer, asked=asked)


def test_training_codes_are_those_of_the_clips(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(sim, "SCENES", 128)
    config = sft.Config(scenario="all", clips=150, seed=3)
    codes = sft.training_codes(config, tokenizer, tmp_path / "codes.npy", ALONE)
    clips = [sim.sample(name, "pretrain", 150, 3) for name in sim.SCENARIOS]
    expected = torch.cat([sft.tokenize(tokenizer, c) for c in clips]).numpy()
    assert codes.shape == (450, 32, 2) and codes.dtype == np.uint8
    assert np.array_equal(codes, expected)
    assert tokenizer.asked[:6] == [128, 22] * 3             # in chunks
    saved = np.load(tmp_path / "codes.npy")
    assert np.array_equal(saved, expected)
    assert {path.name for path in tmp_path.iterdir()} == {"codes.npy", "codes.txt"}


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_share_the_training_codes(tokenizer, tmp_path, monkeypatch, ranks):
    """Every chunk is encoded by one rank, into the same file. The ranks are threads here."""
    monkeypatch.setattr(sim, "SCENES", 128)
    config = sft.Config(scenario="all", clips=150, seed=3)
    alone = sft.training_codes(config, tokenizer, tmp_path / "alone" / "codes.npy", ALONE)
    expected = np.array(alone)
    tokenizer.asked.clear()
    barrier = threading.Barrier(ranks, timeout=60)
    monkeypatch.setattr(train.World, "barrier", lambda world: barrier.wait())

    def of_rank(rank):
        world = train.World(rank, ranks, torch.device("cpu"))
        return sft.training_codes(config, tokenizer, tmp_path / "shared" / "codes.npy", world)
    with ThreadPoolExecutor(ranks) as pool:
        for codes in pool.map(of_rank, range(ranks)):
            assert np.array_equal(codes, expected)
    assert sum(tokenizer.asked) == 450


def test_training_codes_are_made_once(tokenizer, tmp_path):
    """What is there is not made again. What is missing, damaged or of another tokenizer is."""
    config = sft.Config(clips=200, seed=3)
    path, note = tmp_path / "codes.npy", tmp_path / "codes.txt"

    def made(config=config):
        """-> codes, and how many clips were encoded for them."""
        tokenizer.asked.clear()
        codes = sft.training_codes(config, tokenizer, path, ALONE)
        return np.array(codes), sum(tokenizer.asked)
    whole, n = made()
    assert n == 200
    damages = {
        "none": lambda: None,
        "missing": lambda: path.unlink(),
        "foreign": lambda: path.write_bytes(b"ours?"),
        "empty": lambda: path.write_bytes(b""),
        "cut off": lambda: path.write_bytes(path.read_bytes()[:-1]),
        "another shape": lambda: np.save(path, np.zeros((200, 32, 3), np.uint8)),
        "another type": lambda: np.save(path, np.zeros((200, 32, 2), np.int64)),
        "killed before the end": lambda: note.unlink(),
        "another note": lambda: note.write_text("{}")}
    for name, damage in damages.items():
        damage()
        codes, n = made()
        assert np.array_equal(codes, whole) and n == (0 if name == "none" else 200), name
    for change in (dict(clips=100), dict(seed=4), dict(scenario="parabola")):
        assert made(dataclasses.replace(config, **change))[1] == change.get("clips", 200)
    made()
    tokenizer.quantizer.codebook += 1
    assert made()[1] == 200
    assert {path.name for path in tmp_path.iterdir()} == {"codes.npy", "codes.txt"}


# ------------------------------------------------------------------ where codes start


def text_model(folder, size, seed=0) -> Llama:
    torch.manual_seed(seed)
    Llama(LlamaConfig(size, 32, 48, 1, 4, 2, 8)).save(folder)
    return Llama.load(folder, n_visual=256)


def llama3_with_numbers(folder) -> dict[str, int]:
    """A tokenizer like Llama 3's, with one token for each number and none added -> token, id."""
    tokenizer = json.loads((FIXTURES / "tokenizers" / "llama3.json").read_text())
    vocab, free = tokenizer["model"]["vocab"], len(tokenizer["model"]["vocab"])
    missing = [str(i) for i in reversed(range(256)) if str(i) not in vocab]
    vocab |= {word: free + i for i, word in enumerate(missing)}
    tokenizer |= {"added_tokens": [], "post_processor": None}
    tokenizer["model"]["ignore_merges"] = True              # as Llama 3 has it
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return vocab


def test_codes_start_as_the_words_of_stage_0(tmp_path):
    llama = text_model(tmp_path, 300)
    ids = torch.randperm(300)[:256].tolist()
    (tmp_path / "numbers.json").write_text(json.dumps({"ids": ids, "corpus": {}}))
    before = [llama.model["embed_tokens"].weight.clone(), llama.lm_head.weight.clone()]
    assert "starts as the word for the number i" in sft.init_code_embeddings(llama, tmp_path)
    for old, new in zip(before, (llama.model["embed_tokens"].weight, llama.head)):
        assert torch.equal(new[:300], old[:300]) and torch.equal(new[300:], old[ids])
    (tmp_path / "numbers.json").write_text(json.dumps({"ids": ids[:99]}))
    assert "has words for 99 numbers" in sft.init_code_embeddings(llama, tmp_path)
    for damaged in ("[]", "{", '{"corpus": {}}'):
        (tmp_path / "numbers.json").write_text(damaged)
        with pytest.raises(UserError, match="numbers.json is damaged"):
            sft.init_code_embeddings(llama, tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_start_as_the_words_of_llama_3(tmp_path, dtype):
    vocab = llama3_with_numbers(tmp_path)
    llama = text_model(tmp_path, max(vocab.values()) + 20).to(dtype)
    done = sft.init_code_embeddings(llama, tmp_path)
    assert "mean" not in done
    for weight in (llama.model["embed_tokens"].weight, llama.head):
        expected = weight[[vocab[str(i)] for i in range(256)]]
        assert torch.equal(weight[llama.first_code:], expected)


def test_codes_start_as_the_mean_of_digits(tmp_path):
    """Where a number is spelled in several tokens; that is said."""
    shutil.copy(FIXTURES / "tokenizers" / "qwen2.json", tmp_path / "tokenizer.json")
    vocab = json.loads((tmp_path / "tokenizer.json").read_text())["model"]["vocab"]
    llama = text_model(tmp_path, 1000)
    assert "the mean of up to 3 tokens" in sft.init_code_embeddings(llama, tmp_path)
    for weight in (llama.model["embed_tokens"].weight, llama.head):
        for number in ("7", "42", "255"):
            expected = torch.stack([weight[vocab[digit]] for digit in number]).mean(0)
            torch.testing.assert_close(weight[llama.first_code + int(number)], expected)


def test_codes_start_as_random_rows_without_a_tokenizer(tmp_path):
    llama = text_model(tmp_path, 300)
    before = llama.head.clone()
    assert "random rows" in sft.init_code_embeddings(llama, tmp_path)
    assert torch.equal(llama.head, before)


def test_tied_rows(tmp_path):
    torch.manual_seed(0)
    Llama(LlamaConfig(300, 32, 48, 1, 4, 2, 8, tie_word_embeddings=True)).save(tmp_path)
    (tmp_path / "numbers.json").write_text(json.dumps({"ids": list(range(256))}))
    llama = Llama.load(tmp_path, n_visual=256)
    sft.init_code_embeddings(llama, tmp_path)
    assert torch.equal(llama.head[300:], llama.head[:256])


# ------------------------------------------------------------------ replay


def test_the_batch_ends_with_number_sequences(tmp_path, monkeypatch):
    """Of the prior's corpus, as many as `replay` says; the loss is the mean over all sequences."""
    numbers_of_steps, batches = [], []
    real, forward = sft.number_sequences, sft.NextToken.forward

    def drawn(n, K, F, generator, **corpus):
        assert corpus == {"fastest": 7.0}
        numbers_of_steps.append(real(n, K, F, generator, **corpus))
        return numbers_of_steps[-1]

    def recorded(self, targets, inputs):
        nats = forward(self, targets, inputs)
        batches.append((targets, inputs, nats.detach()))
        return nats
    monkeypatch.setattr(sft, "number_sequences", drawn)
    monkeypatch.setattr(sft.NextToken, "forward", recorded)
    monkeypatch.setattr(sft, "training_codes", lambda *_: np.full((9, 32, 2), 5, np.uint8))
    llm = tmp_path / "llm"
    text_model(llm, 300)
    words = {"ids": list(range(44, 300)), "corpus": {"fastest": 7.0}}
    (llm / "numbers.json").write_text(json.dumps(words))
    (tmp_path / "ddt").mkdir()
    shutil.copy(llm / "model.safetensors", tmp_path / "ddt")
    quantizer = SimpleNamespace(codebook=circle(256))
    tokenizer = SimpleNamespace(config=SimpleNamespace(queries=2), quantizer=quantizer)
    config = sft.Config(out=str(tmp_path), llm="prior", steps=2, batch=4, replay=0.8,
                        corrupt=0.0)
    sft.train_sft(config, tokenizer, ALONE)
    lines = [json.loads(line) for line in (tmp_path / "sft" / "log.jsonl").read_text().splitlines()]
    assert len(batches) == len(lines) == 2
    for numbers, (targets, inputs, nats), line in zip(numbers_of_steps, batches, lines):
        assert targets.shape == (4 + 3, 65) and numbers.shape == (3, 32, 2)
        assert (targets[:4, 1:] == 300 + 5).all()
        assert torch.equal(targets[4:, 1:], 300 + numbers.flatten(1))
        away = (inputs - targets)[4:, 1:] % 256
        assert set(away.unique().tolist()) == {0, 1, 255} and (away[:, :6] == 0).all()
        assert line["loss"] == pytest.approx(nats.mean().item(), rel=1e-5)
        assert line["loss_clips"] == pytest.approx(nats[:4].mean().item(), rel=1e-5)
    assert not torch.equal(*numbers_of_steps)
    assert sft.replayed(sft.Config(llm="none")) == 0


# ------------------------------------------------------------------ models


def test_loading_writes_nothing(tmp_path):
    (tmp_path / "ddt.safetensors").write_bytes(b"tokenizer")
    Llama(LlamaConfig(257, 32, 48, 2, 4, 2, 8, n_visual=256)).save(tmp_path / "sft")
    config, source = sft.Config(), tmp_path / "ddt.safetensors"
    sums = checkpoint.start_stage(tmp_path / "sft", config, ALONE, ddt=source)
    checkpoint.write_json(tmp_path / "sft" / "provenance.json", sums)
    before = {path: path.read_bytes() for path in (tmp_path / "sft").iterdir()}
    sft.load(tmp_path / "sft")
    sft.load(tmp_path / "sft", ddt=tmp_path / "ddt.safetensors")
    assert {path: path.read_bytes() for path in (tmp_path / "sft").iterdir()} == before
    (tmp_path / "ddt.safetensors").write_bytes(b"another")
    with pytest.raises(UserError, match="was trained from another ddt"):
        sft.load(tmp_path / "sft", ddt=tmp_path / "ddt.safetensors")


def test_a_models_weights_are_one_file(tmp_path):
    """The stages look for model.safetensors, however large a model is."""
    llama = Llama(LlamaConfig(300, 256, 512, 2, 4, 4, 64, n_visual=256)).bfloat16()
    llama.save(tmp_path / "sft")
    names = {path.name for path in (tmp_path / "sft").glob("*.safetensors*")}
    assert names == {"model.safetensors"}


@pytest.mark.parametrize("argv, culprit", [
    (["--corrupt", "1"], "--corrupt 1.0: a share of"), (["--corrupt", "2"], "--corrupt 2.0"),
    (["--near", "257"], "--near 257"), (["--near", "0"], "--near 0"),
    (["--dtype", "float99"], "--dtype float99"), (["--tokenizer", "words"], "--tokenizer words"),
    (["--hidden", "130"], "--hidden 130"), (["--kv_heads", "3"], "--kv_heads 3"),
    (["--hidden", "1048576"], "--hidden"), (["--ffn", "1000000000"], "--ffn"),
    (["--layers", "1000000"], "--layers"), (["--batch", "1000000000"], "--batch"),
    (["--clips", "1000000000000"], "--clips"), (["--eval_clips", "1"], "--eval_clips 1"),
    (["--seed", "1000003"], "held-out clips"), (["--scenario", "rain"], "--scenario 'rain'"),
    (["--llm", "missing", "--layers", "2"], "--layers 2: the model of --llm missing has its own")])
def test_bad_flags(argv, culprit, tmp_path):
    with pytest.raises(UserError, match=culprit):
        sft.main([*argv, "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("scenario", sim.SCENARIOS)
def test_the_seed_of_the_held_out_clips_is_the_only_one_that_has_them(scenario):
    """What vae.py (ood) and grpo.py (posttrain) would see with that seed is what is evaluated."""
    def starts(split, seed):
        clips = sim.first_frames(scenario, split, 50, seed)
        return torch.cat([clips.radius, clips.velocity, clips.position.flatten(1)], 1)
    held_out = torch.cat([starts(split, evaluate.EVAL_SEED) for split in ("posttrain", "ood")])
    for split in ("pretrain", "posttrain", "ood"):
        for seed in (0, 1, evaluate.EVAL_SEED - 1, evaluate.EVAL_SEED + 2 ** 32):
            assert torch.cdist(starts(split, seed), held_out).min() > 1e-9
