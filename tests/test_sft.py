"""
SFT: sequences, targets and inputs, the cache of the clips' codes.

    pytest tests/test_sft.py
"""
import dataclasses
import math
import threading
from concurrent.futures import ThreadPoolExecutor
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

ALONE = train.World(0, 1, torch.device("cpu"))


def model(seed=0) -> Llama:
    torch.manual_seed(seed)
    llama = Llama(LlamaConfig(1 + 12, 32, 48, 2, 4, 2, 8, n_visual=12))
    for p in llama.parameters():
        if p.ndim == 2:
            torch.nn.init.normal_(p, std=0.3)
    return llama.requires_grad_(False)


def clips(B=3, F=4, K=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(12, (B, F, K), generator=g, dtype=torch.uint8)


def circle_of(n):
    """n codes (n, 3) on a circle."""
    angle = torch.arange(n) * (2 * math.pi / n)
    return torch.stack([angle.cos(), angle.sin(), torch.zeros(n)], -1)


# ------------------------------------------------------------------ inputs and targets


def test_sequence():
    codes = clips()
    ids = sft.sequence(model(), codes)
    assert ids.shape == (3, 9) and ids.dtype == torch.int64
    assert (ids[:, 0] == 0).all() and torch.equal(ids[:, 1:] - 1, codes.flatten(1).long())


def test_codes_of_another_model_are_no_sequence():
    for wrong in (clips() + 12, clips().long() - 13, clips().to(torch.int8) - 12):
        with pytest.raises(ValueError, match="0, 12"):
            sft.sequence(model(), wrong)


def test_loss_is_the_cross_entropy_of_the_next_code():
    llama, codes = model(), clips()
    ids = sft.sequence(llama, codes)
    loss = sft.NextToken(llama)(ids, ids)
    for i, clip in enumerate(codes.flatten(1).tolist()):
        total = 0.0
        for j, code in enumerate(clip):                     # one prefix after the other
            logits = llama.logits(llama(ids[i:i + 1, :j + 1]))
            logits = logits[0, -1, 1:].double()             # over visual codes alone
            total -= math.log(logits.softmax(-1)[code])
        assert abs(loss[i].item() - total / len(clip)) < 1e-5


def test_inputs_may_be_corrupt_targets_are_true():
    llama = model()
    targets, others = sft.sequence(llama, clips()), sft.sequence(llama, clips(seed=1))
    inputs = torch.cat([targets[:, :5], others[:, 5:]], 1)
    loss = sft.NextToken(llama)(targets, inputs)
    logits = llama.visual_logits(llama(inputs[:, :-1])).log_softmax(-1)         # (B, S - 1, V)
    expected = -logits.gather(-1, targets[:, 1:, None] - 1).mean((1, 2))
    torch.testing.assert_close(loss, expected)
    assert not torch.allclose(loss, sft.NextToken(llama)(targets, targets))


def test_corrupt_inputs():
    """
    Given frames stay. Later codes become a near one, each equally often, but for a share that
    becomes any code.
    """
    codes = torch.randint(50, (400, 6, 3), generator=torch.Generator().manual_seed(0))
    near = (torch.arange(50)[:, None] + torch.arange(-1, 2)) % 50   # itself and both neighbours
    itself = near[:, 1:2]

    def corrupted(share, near=near):
        return sft.corrupt_inputs(codes, near, share, torch.Generator().manual_seed(1))
    step = (corrupted(0.0) - codes + 1) % 50                # 0, 1, 2
    assert (step[:, :3] == 1).all() and torch.equal(step[:, 3:].unique(), torch.arange(3))
    shares = torch.bincount(step[:, 3:].flatten()) / step[:, 3:].numel()
    torch.testing.assert_close(shares, torch.full((3,), 1 / 3), rtol=0, atol=0.03)
    assert torch.equal(corrupted(0.0, itself), codes)
    wrong = (corrupted(0.2, itself) != codes).float().mean((0, 2))
    expected = 0.2 * 49 / 50 * torch.tensor([0, 0, 0, 1.0, 1, 1])   # one in 50 is right by chance
    torch.testing.assert_close(wrong, expected, rtol=0, atol=0.04)
    assert torch.equal(corrupted(0.2), corrupted(0.2))
    codes, same = codes.to(torch.uint8), corrupted(0.2)
    assert torch.equal(corrupted(0.2), same)


def test_nearest_codes():
    """On a circle the codes on both sides; a code itself is the first, whatever its equals."""
    circle, i = circle_of(256), torch.arange(256)
    near = sft.nearest_codes(circle, 5)
    around = torch.stack([(i + j) % 256 for j in range(-2, 3)], -1)
    assert torch.equal(near[:, 0], i)
    assert torch.equal(near.sort().values, around.sort().values)
    circle[:100] = circle[7]
    assert torch.equal(sft.nearest_codes(circle, 1)[:, 0], i)


def test_embeddings_of_near_codes_start_alike():
    """
    The similarity of the rows falls with the angle between two codes as the kernel of the features
    does. BOS and scale stay.
    """
    torch.manual_seed(0)
    circle = circle_of(256)
    llama = Llama(LlamaConfig(257, 512, 48, 1, 4, 2, 8, n_visual=256))
    weights = (llama.model["embed_tokens"].weight, llama.lm_head.weight)
    before = [w.clone() for w in weights]
    sft.init_code_embeddings(llama, circle, 5.0)
    frequency = torch.logspace(0, math.log10(5), 512)
    for old, new in zip(before, weights):
        assert torch.equal(old[0], new[0])
        assert new[1:].std().item() == pytest.approx(old[1:].std().item(), rel=0.05)
        for steps in (1, 5, 20, 100):
            d = 2 * math.sin(math.pi * steps / 256)         # between codes so many steps apart
            kernel = torch.exp(-(frequency * d).square() / 2).mean().item()     # E cos(w d)
            found = torch.cosine_similarity(new[1:], new[1:].roll(steps, 0), dim=-1)
            assert found.mean().item() == pytest.approx(kernel, abs=0.03)


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
    (["--llm", "missing", "--layers", "2"], "--layers 2: the model of --llm has its own size")])
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
