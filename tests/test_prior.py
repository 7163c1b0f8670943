"""
The prior: number sequences against closed forms, sequences, targets and inputs, what it saves.

    pytest tests/test_prior.py
"""
import json
import math

import pytest
import torch

import checkpoint
import prior
import train
from checkpoint import UserError
from lm import Llama, LlamaConfig

ALONE = train.World(0, 1, torch.device("cpu"))
STEADY = dict.fromkeys(prior.CORPUS, 0.0)                   # hands that do nothing but turn


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


# ------------------------------------------------------------------ number sequences


def numbers(n=500, K=3, F=32, seed=0, **change):
    generator = torch.Generator().manual_seed(seed)
    return prior.number_sequences(n, K, F, generator, **STEADY | change)


def steps_of(sequences):
    """Places from frame to frame (n, F - 1, K), the short way round: -128 .. 127."""
    return (sequences.diff(dim=1) + 128) % 256 - 128


def test_steady_hands():
    """Every place is within rounding of the first one plus velocity times t, around the clock."""
    x = numbers(slowest=2.0, fastest=20.0)
    assert x.shape == (500, 32, 3) and x.dtype == torch.int64
    assert x.min() == 0 and x.max() == 255
    t, moved = torch.arange(1, 32), steps_of(x).cumsum(1)   # (n, 31, K), over several turns
    v = (moved * t[:, None]).sum(1) / t.square().sum()      # least squares, (n, K)
    assert (moved - v[:, None] * t[:, None]).abs().max() < 1.5
    assert v.abs().min() > 1.9 and v.abs().max() < 20.1
    speed = v.abs().flatten().sort().values                 # uniform in [2, 20], either way
    torch.testing.assert_close(speed, torch.linspace(2, 20, 1500), rtol=0, atol=1.0)
    assert 0.45 < (v > 0).double().mean() < 0.55
    start = x[:, 0].flatten().double().sort().values        # anywhere
    torch.testing.assert_close(start, torch.linspace(0, 255, 1500).double(), rtol=0, atol=15)


@pytest.mark.parametrize("still", [0.0, 0.4, 1.0])
def test_share_of_standing_hands(still):
    stands = (steps_of(numbers(still=still, slowest=1.0, fastest=24.0)) == 0).all(1)
    assert stands.double().mean().item() == pytest.approx(still, abs=0.04)


def test_accelerating_hands():
    """Half of them; the second differences of a place are its constant acceleration."""
    x = steps_of(numbers(n=2000, K=2, F=24, slowest=3.0, fastest=5.0, accelerate=0.5))
    a = (x[:, 12:].sum(1) - x[:, :11].sum(1)) / (11 * 12)   # mean gain of a step per frame
    assert (a.abs() > 0.02).double().mean().item() == pytest.approx(0.5 * 0.95, abs=0.05)
    assert a[a.abs() > 0.02].std().item() == pytest.approx(0.3, abs=0.03)


def test_hands_that_change_their_speed():
    """Half of them: two steady parts, with one uneven step between."""
    x = steps_of(numbers(n=1000, slowest=2.0, fastest=20.0, change=0.5)).double()
    changed = (x[:, 0] - x[:, -1]).abs() > 8                # of those that do, 3 in 5
    assert changed.double().mean().item() == pytest.approx(0.3, abs=0.04)
    bends = (x.diff(dim=1).abs() > 1).sum(1)                # steady steps differ by 1 at most
    assert (bends[changed] >= 1).all() and (bends <= 2).all()


def test_followers():
    """All follow here: each of two hands moves -1, 1, 2 or 3 times as far as the other did."""
    x, plain = numbers(K=2, slowest=10.0, fastest=10.0, follow=1.0), steps_of(numbers(K=2))
    assert (plain == 0).all()
    speeds = steps_of(x).double().mean(1).round().abs().flatten()
    assert speeds.unique().tolist() == [10, 20, 30]
    shares = [(speeds == v).double().mean().item() for v in (10, 20, 30)]
    assert shares == pytest.approx([0.5, 0.25, 0.25], abs=0.06)
    assert (numbers(K=1, slowest=10.0, fastest=10.0, follow=1.0) >= 0).all()


def test_warped_and_noisy_hands():
    """A warp changes the local speed by at most its share; a noisy hand wavers about its place."""
    step = steps_of(numbers(slowest=20.0, fastest=20.0, warp=0.35)).abs()
    assert 13 - 1 <= step.min() < 15 and 25 < step.max() <= 27.6 + 1
    assert step.double().mean().item() == pytest.approx(20, abs=0.2)    # a turn takes as long
    noisy = numbers(n=2000, noise=2.0)
    away = (noisy - noisy[:, :1] + 128) % 256 - 128         # of two draws: std sqrt(2) that of one
    spread = away[:, 1:].double().square().mean().sqrt().item()
    expected = math.sqrt(2 * (4 / 3 * 2.0 ** 2 + 1 / 12))   # E (2 u 2)^2 = 4/3 2^2; rounding
    assert spread == pytest.approx(expected, rel=0.05)


def test_the_numbers_are_a_function_of_the_generator():
    a, b, c = (prior.number_sequences(4, 3, 8, torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)


# ------------------------------------------------------------------ inputs and targets


def test_sequence():
    codes = clips()
    ids = prior.sequence(model(), codes)
    assert ids.shape == (3, 9) and ids.dtype == torch.int64
    assert (ids[:, 0] == 0).all() and torch.equal(ids[:, 1:] - 1, codes.flatten(1).long())


def test_codes_of_another_model_are_no_sequence():
    for wrong in (clips() + 12, clips().long() - 13, clips().to(torch.int8) - 12):
        with pytest.raises(ValueError, match="0, 12"):
            prior.sequence(model(), wrong)


def test_loss_is_the_cross_entropy_of_the_next_code():
    llama, codes = model(), clips()
    ids = prior.sequence(llama, codes)
    loss = prior.NextToken(llama)(ids, ids)
    for i, clip in enumerate(codes.flatten(1).tolist()):
        total = 0.0
        for j, code in enumerate(clip):                     # one prefix after the other
            logits = llama.logits(llama(ids[i:i + 1, :j + 1]))
            logits = logits[0, -1, 1:].double()             # over visual codes alone
            total -= math.log(logits.softmax(-1)[code])
        assert abs(loss[i].item() - total / len(clip)) < 1e-5


def test_inputs_may_be_corrupt_targets_are_true():
    llama = model()
    targets, others = prior.sequence(llama, clips()), prior.sequence(llama, clips(seed=1))
    inputs = torch.cat([targets[:, :5], others[:, 5:]], 1)
    loss = prior.NextToken(llama)(targets, inputs)
    logits = llama.visual_logits(llama(inputs[:, :-1])).log_softmax(-1)         # (B, S - 1, V)
    expected = -logits.gather(-1, targets[:, 1:, None] - 1).mean((1, 2))
    torch.testing.assert_close(loss, expected)
    assert not torch.allclose(loss, prior.NextToken(llama)(targets, targets))


def test_corrupt_inputs():
    """
    Given frames stay. Later codes become a near one, each equally often, but for a share that
    becomes any code.
    """
    codes = torch.randint(50, (400, 6, 3), generator=torch.Generator().manual_seed(0))
    near = (torch.arange(50)[:, None] + torch.arange(-1, 2)) % 50   # itself and both neighbours
    itself = near[:, 1:2]

    def corrupted(share, near=near):
        return prior.corrupt_inputs(codes, near, share, torch.Generator().manual_seed(1))
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
    near = prior.nearest_codes(circle, 5)
    around = torch.stack([(i + j) % 256 for j in range(-2, 3)], -1)
    assert torch.equal(near[:, 0], i)
    assert torch.equal(near.sort().values, around.sort().values)
    circle[:100] = circle[7]
    assert torch.equal(prior.nearest_codes(circle, 1)[:, 0], i)


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
    prior.init_near_alike(llama, circle, 5.0)
    frequency = torch.logspace(0, math.log10(5), 512)
    for old, new in zip(before, weights):
        assert torch.equal(old[0], new[0])
        assert new[1:].std().item() == pytest.approx(old[1:].std().item(), rel=0.05)
        for steps in (1, 5, 20, 100):
            d = 2 * math.sin(math.pi * steps / 256)         # between codes so many steps apart
            kernel = torch.exp(-(frequency * d).square() / 2).mean().item()     # E cos(w d)
            found = torch.cosine_similarity(new[1:], new[1:].roll(steps, 0), dim=-1)
            assert found.mean().item() == pytest.approx(kernel, abs=0.03)


# ------------------------------------------------------------------ the stage


CONFIG = prior.Config(hidden=32, ffn=48, layers=1, steps=4, batch=4, length=24)


def test_what_it_saves(tmp_path):
    """A model of text with a word for each number, the words' ids, and what was read."""
    config = prior.Config(**vars(CONFIG) | dict(out=str(tmp_path), slowest=3.0, still=0.25))
    trained = prior.train_prior(config, ALONE)
    folder = tmp_path / "llm"
    model = Llama.load(folder)
    assert model.config.n_visual == 0 and model.config.vocab_size == 257
    assert torch.equal(model.head, trained.head)
    found = json.loads((folder / "numbers.json").read_text())
    assert found["ids"] == list(range(1, 257))
    corpus = prior.corpus_of(folder)
    assert corpus["slowest"] == 3.0 and corpus["still"] == 0.25
    prior.number_sequences(1, 2, 8, torch.Generator(), **corpus)        # these are its parameters
    model.save(tmp_path / "sft")                            # passed on, like a tokenizer
    assert prior.corpus_of(tmp_path / "sft") == corpus
    assert prior.corpus_of(tmp_path) == {}


def test_ensure_trains_once(tmp_path, monkeypatch, capsys):
    tiny = {name: getattr(CONFIG, name) for name in ("hidden", "ffn", "layers", "steps", "length")}
    monkeypatch.setitem(prior.PRESETS, "tiny", tiny)
    config = prior.Config(out=str(tmp_path), seed=3)
    folder = tmp_path / "llm"
    prior.ensure(config, ALONE)
    assert "is missing: training it first" in capsys.readouterr().out
    before = (folder / "model.safetensors").read_bytes()
    prior.ensure(config, ALONE)
    assert not capsys.readouterr().out
    assert checkpoint.read_json(folder / "trained.json")["seed"] == 3
    assert (folder / "model.safetensors").read_bytes() == before
    (folder / "model.safetensors").write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    with pytest.raises(UserError, match="python prior.py --fresh"):
        prior.ensure(config, ALONE)
    with pytest.raises(UserError, match="no preset paper"):
        prior.ensure(prior.Config(out=str(tmp_path / "paper"), preset="paper"), ALONE)


def test_fresh_replaces_the_old_prior_at_the_end(tmp_path, monkeypatch, capsys):
    """Stopped before: the old one stays, counts as unfinished, and the next stage goes on first."""
    tiny = {name: getattr(CONFIG, name) for name in ("hidden", "ffn", "layers", "steps", "length")}
    monkeypatch.setitem(prior.PRESETS, "tiny", tiny)
    folder, config = tmp_path / "llm", prior.Config(**tiny | dict(out=str(tmp_path)))
    prior.run_stage(config, ALONE)
    old = (folder / "model.safetensors").read_bytes()
    again = prior.Config(**tiny | dict(out=str(tmp_path), seed=1, fresh=True))
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(checkpoint, "finish", lambda *_: exit(1))
        prior.run_stage(again, ALONE)
    assert (folder / "model.safetensors").read_bytes() == old
    assert checkpoint.checkpoints(folder) and not checkpoint.has_model(folder)
    with pytest.raises(UserError, match="seed was 1, is 0.*`python prior.py --fresh --out"):
        prior.ensure(config, ALONE)
    capsys.readouterr()
    prior.ensure(prior.Config(out=str(tmp_path), seed=1), ALONE)
    assert "training it first" in capsys.readouterr().out
    assert checkpoint.has_model(folder) and not checkpoint.checkpoints(folder)
    assert (folder / "model.safetensors").read_bytes() != old
    assert len((folder / "log.jsonl").read_text().splitlines()) == 4


def test_continuation_error():
    """That of a model which repeats the last frame: standing hands are right, others run away."""
    class Repeats:
        config = LlamaConfig(257, 32, 48, 1, 4, 2, 8, n_visual=256)
        head, first_code = torch.zeros(1), 1

    def generate(model, prompt, T, top_k):
        last = prompt[:, -3:] - 1
        return last.repeat(1, T // 3)[:, None], None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prior, "generate", generate)
        errors = {v: prior.continuation_error(Repeats(), v) for v in (0, 2, 128)}
    assert errors[0] == 0
    assert errors[2] == pytest.approx(2 * 15, abs=0.2)      # mean of 2, 4, .., 58
    assert errors[128] == pytest.approx(128 * 15 / 29, abs=0.1)         # half a turn, and back


@pytest.mark.parametrize("argv, culprit", [
    (["--hands", "2,x"], "--hands 2,x: whole numbers"), (["--hands", ""], "--hands : whole"),
    (["--hands", "0"], "--hands 0: a sequence"), (["--hands", "30"], "more than 3 frames of 30"),
    (["--slowest", "30"], "--slowest 30.0: above --fastest 24.0"),
    (["--fastest", "200"], "--fastest 200"), (["--still", "1.5"], "--still 1.5"),
    (["--accelerate", "0.6", "--change", "0.6"], "--accelerate and --change"),
    (["--corrupt", "1"], "--corrupt 1.0"), (["--hidden", "130"], "--hidden 130"),
    (["--length", "4000"], "--length 4000"), (["--dtype", "float99"], "--dtype float99")])
def test_bad_flags(argv, culprit, tmp_path):
    with pytest.raises(UserError, match=culprit):
        prior.main([*argv, "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())
