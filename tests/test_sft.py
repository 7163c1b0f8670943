"""
Symbol learning: what is asked of the model and what it reads.

    pytest tests/test_sft.py
"""
import dataclasses
import inspect
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import ddt
import grpo
import sft
import sim
import train
from lm import CONFIGS, Cache, Llama, LlamaConfig

ALONE = train.World(0, 1, torch.device("cpu"))


def model(seed=0) -> Llama:
    torch.manual_seed(seed)
    llama = Llama(LlamaConfig(1 + 12, 32, 48, 2, 4, 2, 8, n_visual=12))
    for p in llama.parameters():
        if p.ndim == 2:
            torch.nn.init.normal_(p, std=0.3)
    return llama.requires_grad_(False)


def clips(B=3, F=4, K=2, seed=0):
    return torch.randint(12, (B, F, K), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def test_sequence():
    codes = clips()
    ids = sft.sequence(model(), codes)
    assert ids.shape == (3, 9) and ids.dtype == torch.int64
    assert (ids[:, 0] == 0).all() and torch.equal(ids[:, 1:] - 1, codes.flatten(1).long())


def test_loss_is_the_cross_entropy_of_the_next_code():
    llama, codes = model(), clips()
    ids = sft.sequence(llama, codes)
    loss = sft.NextToken(llama)(ids, ids)
    for i, clip in enumerate(codes.flatten(1).tolist()):
        total = 0.0
        for j, code in enumerate(clip):                          # one prefix after the other, over visual codes alone
            logits = llama.logits(llama(ids[i:i + 1, :j + 1]))[0, -1, 1:].double()
            total -= math.log(logits.softmax(-1)[code])
        assert abs(loss[i].item() - total / len(clip)) < 1e-5


def test_what_is_read_may_be_wrong_what_is_asked_is_true():
    llama = model()
    ids, others = sft.sequence(llama, clips()), sft.sequence(llama, clips(seed=1))
    read = torch.cat([ids[:, :5], others[:, 5:]], 1)
    loss = sft.NextToken(llama)(ids, read)
    logits = llama.visual_logits(llama(read[:, :-1])).log_softmax(-1)                # (B, S - 1, V)
    expected = -logits.gather(-1, ids[:, 1:, None] - 1).mean((1, 2))
    torch.testing.assert_close(loss, expected)
    assert not torch.allclose(loss, sft.NextToken(llama)(ids, ids))


def test_misread():
    """Given frames are read as they are, later ones as a near code, each equally often, but for a share read as any code."""
    codes = torch.randint(50, (400, 6, 3), generator=torch.Generator().manual_seed(0))
    near = (torch.arange(50)[:, None] + torch.arange(-1, 2)) % 50                            # itself and both neighbours
    read = lambda corrupt, near=near: sft.misread(codes, near, corrupt, torch.Generator().manual_seed(1))
    step = (read(0.0) - codes + 1) % 50                                                      # 0, 1, 2
    assert (step[:, :3] == 1).all() and torch.equal(step[:, 3:].unique(), torch.arange(3))
    shares = torch.bincount(step[:, 3:].flatten()) / step[:, 3:].numel()
    torch.testing.assert_close(shares, torch.full((3,), 1 / 3), rtol=0, atol=0.03)
    assert torch.equal(read(0.0, near[:, 1:2]), codes)
    wrong = (read(0.2, near[:, 1:2]) != codes).float().mean((0, 2))                          # one in 50 is right by chance
    torch.testing.assert_close(wrong, 0.2 * 49 / 50 * torch.tensor([0, 0, 0, 1.0, 1, 1]), rtol=0, atol=0.04)
    assert torch.equal(read(0.2), read(0.2))


def test_neighbours():
    """On a circle the codes on both sides; a code itself is the first, whatever its equals."""
    angle = torch.arange(256) * (2 * math.pi / 256)
    circle = torch.stack([angle.cos(), angle.sin(), torch.zeros(256)], -1)
    near, i = sft.neighbours(circle, 5), torch.arange(256)
    assert torch.equal(near[:, 0], i)
    assert torch.equal(near.sort().values, torch.stack([(i + j) % 256 for j in range(-2, 3)], -1).sort().values)
    circle[:100] = circle[7]
    assert torch.equal(sft.neighbours(circle, 1)[:, 0], i)


def test_what_is_asked_of_the_model_is_true():
    llama, codes = model(), clips(F=6).long()
    near = torch.stack([torch.arange(12), (torch.arange(12) + 1) % 12], 1)
    asked, read = sft.batch_of(llama, codes, near, 0.5, torch.Generator().manual_seed(0))
    assert torch.equal(asked, sft.sequence(llama, codes))
    given = 1 + sim.CONDITION * 2                                                            # BOS and 3 frames of 2 codes
    assert torch.equal(read[:, :given], asked[:, :given]) and (read[:, given:] != asked[:, given:]).any()


def test_near_codes_begin_alike():
    """Similarity of the rows falls with the angle between two codes as the kernel of the features does; BOS and scale stay."""
    torch.manual_seed(0)
    angle = torch.arange(256) * (2 * math.pi / 256)
    circle = torch.stack([angle.cos(), angle.sin(), torch.zeros(256)], -1)
    llama = Llama(LlamaConfig(257, 512, 48, 1, 4, 2, 8, n_visual=256))
    before = [w.clone() for w in (llama.model["embed_tokens"].weight, llama.lm_head.weight)]
    sft.begin_alike(llama, circle, 5.0)
    frequency = torch.logspace(0, math.log10(5), 512)
    for old, new in zip(before, (llama.model["embed_tokens"].weight, llama.lm_head.weight)):
        assert torch.equal(old[0], new[0]) and new[1:].std().item() == pytest.approx(old[1:].std().item(), rel=0.05)
        for steps in (1, 5, 20, 100):
            d = 2 * math.sin(math.pi * steps / 256)                                  # between codes so many steps apart
            kernel = torch.exp(-(frequency * d).square() / 2).mean().item()          # E cos(w d), w ~ N(0, s^2)
            found = torch.cosine_similarity(new[1:], new[1:].roll(steps, 0), dim=-1).mean().item()
            assert found == pytest.approx(kernel, abs=0.03)


# ------------------------------------------------------------------ training clips as codes


@pytest.fixture
def tokenizer(monkeypatch):
    """Codes that say which clip it is: x and y of every frame's centre, in hundredths of the view. And what was asked of it."""
    asked = []

    def tokenize(ddt, clips):
        asked.append(len(clips))
        return (clips.position[:, :, 0] * 10).round().to(torch.uint8)
    monkeypatch.setattr(sft, "tokenize", tokenize)
    return SimpleNamespace(config=SimpleNamespace(queries=2), quantizer=SimpleNamespace(codebook=torch.ones(2, 2)), asked=asked)


def test_training_codes_are_those_of_the_clips(tokenizer, tmp_path):
    config = sft.Config(scenario="all", clips=1100, seed=3)
    codes = sft.training_codes(config, tokenizer, tmp_path, ALONE)
    clips = {name: sim.sample(name, "pretrain", 1100, 3) for name in sim.SCENARIOS}
    expected = torch.cat([sft.tokenize(tokenizer, c) for c in clips.values()])
    rows = torch.tensor([0, 1023, 1024, 1099, 1100, 2200, 3299, 5])
    assert len(codes) == 3300 and len(codes.files) == 6 and codes[rows].dtype == torch.uint8
    assert torch.equal(codes[rows], expected[rows]) and torch.equal(codes[torch.arange(3300)], expected)


def test_training_codes_go_on_where_they_stopped(tokenizer, tmp_path):
    """What is there is not made again; what is missing, cut off or of another tokenizer is."""
    config = sft.Config(clips=2500, seed=3)
    whole = sft.training_codes(config, tokenizer, tmp_path, ALONE)[torch.arange(2500)]
    assert sum(tokenizer.asked) == 2500
    for damage, made in ((lambda path: None, 0), (lambda path: path.unlink(), 1024), (lambda path: path.write_bytes(b"ours?"), 1024),
                         (lambda path: path.write_bytes(path.read_bytes()[:-1]), 1024),
                         (lambda path: np.save(path, np.zeros((1024, 32, 3), np.uint8)), 1024)):
        tokenizer.asked.clear()
        damage(tmp_path / "uniform-00001.npy")
        assert torch.equal(sft.training_codes(config, tokenizer, tmp_path, ALONE)[torch.arange(2500)], whole)
        assert sum(tokenizer.asked) == made
    tokenizer.asked.clear()
    tokenizer.quantizer.codebook += 1
    sft.training_codes(config, tokenizer, tmp_path, ALONE)
    assert sum(tokenizer.asked) == 2500
    sft.training_codes(dataclasses.replace(config, clips=100), tokenizer, tmp_path, ALONE)
    assert [path.name for path in tmp_path.glob("*.npy")] == ["uniform-00000.npy"]


# ------------------------------------------------------------------ plans


def test_plan_of_8b_by_hand():
    """On 8 ranks: bf16 weights and gradients, a part of the fp32 masters and moments; 41.1 GiB. Reference and cache beside."""
    c, GIB = CONFIGS["llama-3.1-8b"], 2 ** 30
    D, V = c.hidden_size, c.vocab_size + 256
    layer = D * (D + 2 * 8 * 128) + D * D + 3 * D * c.intermediate_size + 2 * D
    N = 2 * V * D + 32 * layer + D
    plan = sft.plan(sft.Config(**{"preset": "paper"} | sft.PRESETS["paper"]), 8)
    parts = [plan.fixed[k] for k in ("parameters", "gradients", "masters and moments, fp32")]
    assert parts == pytest.approx([2 * N, 2 * N, 12 * N / 8]) and sum(parts) / GIB == pytest.approx(41.1, abs=0.1)
    assert plan.tokens == 768 * 512
    matrices = 32 * (layer - 2 * D) + 256 * D                                        # the head's rows of codes only
    assert plan.flops == pytest.approx(4 * plan.tokens * (2 * matrices + 4 * 32 * D * 512), rel=1e-6)
    rl = grpo.plan(grpo.Config(**{"preset": "paper"} | grpo.PRESETS["paper"]), 8)
    assert [rl.fixed[k] for k in ("parameters", "gradients", "masters and moments, fp32", "reference")] == pytest.approx([*parts, 2 * N])
    with torch.device("meta"):
        cache = Cache(dataclasses.replace(c, n_visual=256), 4 * 8, 513, dtype=torch.bfloat16)
    assert rl.passing["KV cache"] == cache.kv.nbytes * 9 / 8                          # the prompts', then the group's
    assert rl.tokens == 28 * 8 * 29 * 16
    assert 55 < rl.total / GIB < 79.3 and rl.total < grpo.plan(grpo.Config(**{"preset": "paper"} | grpo.PRESETS["paper"]), 4).total


def test_grpo_is_planned_for_the_model_there_is(tmp_path):
    """`sft.py --llm` makes another than the preset's. One file, however large: the stages look for model.safetensors."""
    config = grpo.Config(out=str(tmp_path))
    before = grpo.plan(config, 1)
    model = Llama(LlamaConfig(300, 256, 512, 2, 4, 4, 64, n_visual=256)).bfloat16()
    model.save(tmp_path / "sft")
    (tmp_path / "sft" / "trained.json").write_text('{"dtype": "bfloat16"}')
    assert grpo.plan(config, 1).fixed["parameters"] == 2 * sum(p.numel() for p in model.parameters()) != before.fixed["parameters"]
    assert inspect.signature(Llama.save).parameters["shard_bytes"].default > 10 ** 12


def test_tiny_is_planned_too_where_it_starts_from_weights(tmp_path, monkeypatch):
    Llama(LlamaConfig(300, 256, 512, 2, 4, 4, 64, bos_token_id=1)).save(tmp_path)
    monkeypatch.setattr(train.os, "sysconf", {"SC_PHYS_PAGES": 100, "SC_PAGE_SIZE": 4096}.__getitem__)
    train.check_fits(sft.plan, sft.Config(), ALONE)
    with pytest.raises(train.Problem, match="this run needs"):
        train.check_fits(sft.plan, sft.Config(llm=str(tmp_path)), ALONE)


def test_loading_writes_nothing(tmp_path):
    (tmp_path / "ddt.safetensors").write_bytes(b"tokenizer")
    Llama(LlamaConfig(257, 32, 48, 2, 4, 2, 8, n_visual=256)).save(tmp_path / "sft")
    train.made_of(tmp_path / "sft", ddt=tmp_path / "ddt.safetensors")
    note = (tmp_path / "sft" / "made_of.json").read_text()
    sft.load(str(tmp_path / "sft"))
    assert (tmp_path / "sft" / "made_of.json").read_text() == note


@pytest.mark.parametrize("checkpointing", [False, True])
def test_planned_activations_are_what_a_pass_keeps(checkpointing):
    """Against the tensors that a real forward pass saves, on the CPU."""
    c, rows, S = LlamaConfig(300, 64, 160, 3, 4, 4, 16, n_visual=256), 4, 65
    loss_of = sft.NextToken(Llama(c))
    loss_of.model.checkpointing = checkpointing
    ids = torch.randint(300, (rows, S))
    own, kept = {p.untyped_storage()._cdata for p in loss_of.parameters()}, {}

    def keep(x):
        kept[x.untyped_storage()._cdata] = x
        return x
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss = loss_of(ids.clamp(min=44), ids)
    real = sum(x.untyped_storage().nbytes() for i, x in kept.items() if i not in own)
    flops, planned = sft.language_model_pass(c, torch.float32, rows, S, checkpointing)
    if checkpointing:                                                                # a block's own are kept while it is done again
        block = sft.language_model_pass(c, torch.float32, rows, S, False)[1]
        assert real < planned < block
    else:
        assert planned == pytest.approx(real, rel=0.03)
    matrices = 3 * (4 * 64 * 64 + 3 * 64 * 160) + 256 * 64
    assert flops == pytest.approx(rows * 64 * (2 * matrices + 4 * 3 * 64 * 64))
    loss.sum().backward()


def test_plans_of_all_stages(capsys):
    for stage, preset in ((ddt, "tiny"), (ddt, "small"), (sft, "small"), (grpo, "tiny"), (grpo, "small")):
        stage.main(["--preset", preset, "--plan", "--world", "2"])
        out = capsys.readouterr().out
        assert f"{preset}, 2 ranks" in out and "at the peak" in out and "A800-80GB" in out and "H200" in out


def test_a_run_that_cannot_fit_is_refused(monkeypatch):
    config = sft.Config(preset="small", hidden=1024, ffn=4096, layers=24, heads=16, batch=64, steps=10)
    needed = sft.plan(config, 1).total
    there = {"SC_PHYS_PAGES": 2 ** 21, "SC_PAGE_SIZE": 4096}                         # 8 GiB
    monkeypatch.setattr(train.os, "sysconf", there.__getitem__)
    with pytest.raises(train.Problem) as problem:
        train.check_fits(sft.plan, config, ALONE)
    assert all(text in str(problem.value) for text in (f"{needed / 2 ** 30:.1f} GiB", "are 8.0", "--plan", "--micro 8", "--checkpointing"))
    train.check_fits(sft.plan, dataclasses.replace(config, micro=8, checkpointing=True), ALONE)
