"""
The plan of a stage, against counts by hand and against what real models and passes hold.

    pytest tests/test_plan.py
"""
import dataclasses
import inspect
from pathlib import Path

import pytest
import torch
import torch.nn.functional as nnf
from torch import nn

import ddt
import grpo
import prior
import sft
import train
import vae
from checkpoint import UserError
from experiments import plan
from experiments.plan import CARDS, GIB, Card, plan_ddt, plan_grpo, plan_sft, plan_vae
from lm import CONFIGS, Cache, Llama, LlamaConfig

FIXTURES = Path(__file__).parent / "fixtures"
TRAINING = ("parameters", "gradients", "masters and moments, fp32")


def preset(stage, name, **other):
    return stage.Config(**{"preset": name, "out": "missing"} | stage.PRESETS[name] | other)


def kept_by(forward, model) -> int:
    """Bytes of the tensors that a real forward pass keeps, but for the model's own."""
    own = {x.untyped_storage()._cdata for x in model.state_dict().values()}
    kept = {}

    def keep(x):
        kept[x.untyped_storage()._cdata] = x
        return x
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        forward()
    return sum(x.untyped_storage().nbytes() for key, x in kept.items() if key not in own)


# ------------------------------------------------------------------ the language model


def test_plan_of_8b_by_hand():
    """On 8 ranks: bf16 weights and gradients, a shard of the fp32 masters and moments; 41.1 GiB."""
    c = CONFIGS["llama-3.1-8b"]
    D, V = c.hidden_size, c.vocab_size + 256
    attention = D * (D + 2 * 8 * 128) + D * D
    layer = attention + 3 * D * c.intermediate_size + 2 * D
    N = 2 * V * D + 32 * layer + D
    held = [2 * N, 2 * N, 12 * N / 8]

    stage = plan_sft(preset(sft, "paper"), 8)
    assert [stage.fixed[name] for name in TRAINING] == pytest.approx(held)
    assert sum(held) / GIB == pytest.approx(41.1, abs=0.1)
    assert stage.tokens == 768 * 512
    matrices = 32 * (layer - 2 * D) + 256 * D                   # the head's rows of codes only
    forward = 2 * matrices + 4 * 32 * D * 512
    assert stage.flops == pytest.approx(4 * stage.tokens * forward, rel=1e-6)       # checkpointed

    rl = plan_grpo(preset(grpo, "paper"), 8)
    names = [*TRAINING, "reference"]
    assert [rl.fixed[name] for name in names] == pytest.approx([*held, 2 * N])
    with torch.device("meta"):
        extended = dataclasses.replace(c, vocab_size=V, n_visual=256)
        cache = Cache(extended, 4 * 8, 513, dtype=torch.bfloat16)
    assert rl.passing["KV cache"] == cache.kv.nbytes * 9 / 8    # the prompts', then the group's
    assert rl.tokens == 28 * 8 * 29 * 16
    words = 2 * V * D * 2                                       # embedding and head are not read
    assert rl.read == pytest.approx(29 * 16 * (2 * N - words + cache.kv.nbytes))
    assert 55 < rl.total / GIB < 79.3
    assert rl.total < plan_grpo(preset(grpo, "paper"), 4).total


@pytest.mark.parametrize("betas", [(0.0, 0.0), (0.05, 0.0), (0.05, 0.05)])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_flops_of_grpo_by_hand(betas, checkpointing):
    """In passes over the rollouts, of which each has so many FLOPs as its products."""
    c, P, G, K = LlamaConfig(300, 64, 160, 3, 4, 4, 16, n_visual=256), 6, 4, 3
    config = grpo.Config(prompts=P, group=G, micro_batch=3, beta_pretrain=betas[0],
                         beta_numbers=betas[1], checkpointing=checkpointing)
    tokenizer = plan.meta_tokenizer("ddt", "tiny", "uniform")
    planned = plan.plan_for(config, 2, c, torch.float32, tokenizer)
    matrices = 3 * (4 * 64 * 64 + 3 * 64 * 160) + 256 * 64
    clip = 32 * K * 2 * matrices + 4 * 3 * 64 * (32 * K) ** 2   # FLOPs of one clip
    trained = 4 if checkpointing else 3
    passes = P * G * (1 + 1 + trained)                          # old policy, reference, training
    passes += P * G * (29 * K) / (1 + 32 * K)                   # sampling
    for beta in betas:                                          # KL: reference, training
        passes += P * (1 + trained) if beta else 0
    assert planned.flops == pytest.approx(passes * clip)


def test_grpo_is_planned_for_the_defaults_of_its_motion(tmp_path):
    """Missing models are those that it would train first: here of another number of tokens."""
    of = {motion: grpo.Config(out=str(tmp_path), scenario=motion)
          for motion in ("uniform", "parabola")}
    planned = {motion: plan_grpo(config, 1) for motion, config in of.items()}
    for motion, config in of.items():
        tokenizer = train.stage_config("ddt", ddt.Config, ddt.PRESETS, config)
        model = train.stage_config("sft", sft.Config, sft.PRESETS, config)
        K = plan.meta_tokenizer("ddt", "tiny", motion).config.queries
        assert K == tokenizer.queries
        c = plan.llama_config(model, 1 + 32 * K)
        with torch.device("meta"):
            size = sum(p.numel() for p in Llama(c).parameters())
        assert planned[motion].fixed["parameters"] == 4 * size
    assert planned["parabola"].flops > planned["uniform"].flops


def test_grpo_is_planned_for_the_model_there_is(tmp_path):
    """`sft.py --llm` trains another than the preset's."""
    config = grpo.Config(out=str(tmp_path))
    before = plan_grpo(config, 1).fixed["parameters"]
    model = Llama(LlamaConfig(300, 256, 512, 2, 4, 4, 64, n_visual=256)).bfloat16()
    model.save(tmp_path / "sft")
    (tmp_path / "sft" / "trained.json").write_text('{"dtype": "bfloat16"}')
    after = plan_grpo(config, 1).fixed["parameters"]
    assert after == 2 * sum(p.numel() for p in model.parameters()) != before


@pytest.mark.parametrize("checkpointing", [False, True])
def test_planned_activations_are_what_a_pass_keeps(checkpointing):
    """Against the tensors that a real forward pass saves, on the CPU."""
    c, B, S = LlamaConfig(300, 64, 160, 3, 4, 4, 16, n_visual=256), 4, 65
    loss_of = sft.NextToken(Llama(c))
    loss_of.model.checkpointing = checkpointing
    ids = torch.randint(300, (B, S))
    real = kept_by(lambda: loss_of(ids.clamp(min=44), ids), loss_of)
    flops, planned = plan.llama_pass(c, torch.float32, B, S, checkpointing)
    if checkpointing:                       # one block keeps its own while it is recomputed
        without = plan.llama_pass(c, torch.float32, B, S, False).kept
        assert real < planned < without
    else:
        assert planned == pytest.approx(real, rel=0.03)
    matrices = 3 * (4 * 64 * 64 + 3 * 64 * 160) + 256 * 64
    assert flops == pytest.approx(B * 64 * (2 * matrices + 4 * 3 * 64 * 64))


# ------------------------------------------------------------------ VAE and tokenizer


def test_plan_of_the_vae():
    """Activations against those of a real pass over a batch, FLOPs against a direct count."""
    config = vae.Config(size=16, batch=6)
    model = vae.small_vae(config)
    images = torch.rand(6, 3, 16, 16)
    noise = torch.randn_like(model.moments(images)[0])

    def loss():
        reconstruction, mean, logvar = model(images, noise)
        mse = (reconstruction - images).square().mean((1, 2, 3))
        return mse + (mean.square() + logvar.exp() - 1 - logvar).sum((1, 2, 3))
    planned = plan_vae(config, 1)
    assert planned.passing["activations"] == pytest.approx(kept_by(loss, model), rel=0.02)
    assert planned.tokens == 6

    flops = 0

    def count(layer, inputs, output):
        nonlocal flops
        per_output = 2 * layer.weight[0].numel()                # a multiplication and an addition
        flops += per_output * output.numel()
    for layer in model.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            layer.register_forward_hook(count)
    loss()
    attention = 2 * 6 * 4 * (4 * 4) ** 2 * 32                   # encoder, decoder: 16 cells of 32
    assert planned.flops == pytest.approx(3 * (flops + attention))


def test_a_tokenizer_is_planned_on_the_vae_there_is(tmp_path):
    """That of --vae or <out>/vae counts; its parameters are kept, and have no gradients."""
    config = ddt.Config(size=16, out=str(tmp_path))
    assert plan.trains_vae(config)
    small = plan_ddt(config, 1)
    given = dataclasses.replace(config, vae=str(FIXTURES / "vae-sd3"))
    assert not plan.trains_vae(given)
    with_sd3 = plan_ddt(given, 1)
    assert small.passing.keys() == with_sd3.passing.keys() == {"activations"}
    model = ddt.DDT(config, vae.VAE.load(FIXTURES / "vae-sd3"))
    assert with_sd3.fixed["parameters"] == sum(p.nbytes for p in model.parameters())
    trained = [*model.encoder.parameters(), *model.quantizer.parameters()]
    trained += model.decoder.parameters()
    assert with_sd3.fixed["gradients"] == sum(p.nbytes for p in trained)
    assert with_sd3.fixed["parameters"] != small.fixed["parameters"]

    vae.VAE.load(FIXTURES / "vae-sd3").save(tmp_path / "vae")
    assert plan_ddt(config, 1) == with_sd3 and not plan.trains_vae(config)
    assert not plan.trains_vae(preset(ddt, "paper"))            # it stands on a pre-trained one
    assert plan_ddt(preset(ddt, "paper"), 32).fixed["parameters"] / 4e6 == pytest.approx(
        83.820 + 12.489 + 111.101, abs=0.1)                     # millions; projections beside


# ------------------------------------------------------------------ the prior


def test_plan_of_the_prior_by_hand():
    """Its longest sequences, 24 frames of 4 hands; all of the model is trained."""
    config = prior.Config(hands="4,5", length=99, micro_batch=5)
    planned = plan.plan_prior(config, 2)
    with torch.device("meta"):
        model = Llama(prior.new_shape(config, prior.CONTEXT, 256))
    weights = 4 * sum(p.numel() for p in model.parameters())
    assert [planned.fixed[name] for name in TRAINING] == [weights, weights, 3 * weights / 2]
    assert planned.tokens == 32 * 96
    matrices = 4 * (128 * (128 + 2 * 64) + 128 * 128 + 3 * 128 * 384) + 256 * 128
    forward = 2 * matrices + 4 * 4 * 128 * 96
    assert planned.flops == pytest.approx(3 * planned.tokens * forward)
    c = prior.new_shape(config, prior.CONTEXT, 256)         # 16 rows of a rank, in 4 micro-batches
    kept = plan.llama_pass(c, torch.float32, 4, 97, False).kept
    assert planned.passing == {"activations": kept}


# ------------------------------------------------------------------ parts of the method


def test_attention_keeps_what_a_fused_kernel_keeps():
    """q, k, v and the output; k and v of fewer heads; FLOPs of two products over all pairs."""
    with torch.device("meta"):
        x = nn.Parameter(torch.zeros(2, 5, 48))
        model = nn.Linear(48, 48)

    def forward():
        q = model(x).unflatten(-1, (4, 12)).transpose(1, 2)     # (2, 4, 5, 12)
        kv = x[..., :24].unflatten(-1, (2, 12)).transpose(1, 2) * 2
        return nnf.scaled_dot_product_attention(q, kv, kv + 1, is_causal=True, enable_gqa=True)
    flops, kept = plan.measure(forward, model)
    q, kv, linear_in = 2 * 5 * 48 * 4, 2 * 5 * 24 * 4, 2 * 5 * 48 * 4
    assert kept == 2 * q + 2 * kv + linear_in
    assert flops == 2 * (2 * 5) * 48 * 48 + 2 * (2 * 2 * 4 * 5 * 5 * 12)
    real = nnf.scaled_dot_product_attention(*(torch.ones(1, 1, 2, 2) for _ in range(3)))
    assert torch.equal(real, torch.ones(1, 1, 2, 2))            # afterwards it computes again


def test_memory_of_training_is_the_optimizer_s():
    """Against an AdamW of two ranks: its shard of masters and moments."""
    model = Llama(LlamaConfig(30, 16, 24, 2, 2, 2, 8)).bfloat16()
    planned = plan.training_memory(model, 2)
    held = 0
    for name, x in train.AdamW(model, rank=0, ranks=2).state().items():
        held += x.nbytes if not name.endswith("step") else 0
    assert planned["masters and moments, fp32"] == pytest.approx(held)
    assert planned["parameters"] == sum(p.nbytes for p in model.parameters())
    assert planned["gradients"] == planned["parameters"]
    matrices = sum(p.nbytes for p in model.parameters() if p.ndim == 2)
    assert planned["copies of a bucket"] == 2 * matrices
    assert inspect.signature(train.AdamW).parameters["limit"].default == plan.BUCKET


def test_largest_micro_batch():
    """Against the micro-batches that the ranks of a run really take."""
    cases = ((28, 8, 8, 8), (28, 8, 3, 8), (7, 3, 2, 1), (64, 1, 0, 1), (5, 4, 0, 3), (9, 2, 4, 1))
    for batch, ranks, micro_batch, rows in cases:
        sizes = []
        for rank in range(ranks):
            world = train.World(rank, ranks, torch.device("cpu"))
            shard = world.shard(torch.arange(batch)).repeat_interleave(rows)
            n = world.accumulation_steps(batch, micro_batch, rows)
            sizes += [len(part) for part in shard.tensor_split(n)]
        assert plan.largest_micro_batch(batch, ranks, micro_batch, rows) == max(sizes)


def test_hours():
    one = plan.Plan({"a": 1.0}, {"b": 2.0, "c": 5.0}, 1.0, 312e12 * 0.4 * 3600, 2e12 * 3600)
    assert one.total == 6
    assert one.hours("A800-80GB", 1, 3) == pytest.approx(6)     # an hour each to compute, to read
    assert one.hours("A800-80GB", 2, 3) == pytest.approx(4.5)   # each rank reads as much as before


# ------------------------------------------------------------------ the command


@pytest.mark.parametrize("stage, name", [("prior", "tiny"), ("prior", "small"),
                                         ("vae", "small"), ("ddt", "tiny"), ("ddt", "small"),
                                         ("ddt", "paper"), ("sft", "small"), ("sft", "paper"),
                                         ("grpo", "tiny"), ("grpo", "small")])
def test_plans_of_all_stages(stage, name, tmp_path, capsys):
    plan.main([stage, "--preset", name, "--world", "2", "--out", str(tmp_path / "run")])
    out = capsys.readouterr().out
    assert f"{stage}, {name}, 2 ranks" in out
    assert all(text in out for text in ("at the peak", "A800-80GB", "H200"))
    two = stage == "ddt" and name != "paper"                    # the VAE first
    assert out.count("at the peak") == 1 + two and (f"vae, {name}, 2 ranks" in out) == (
        two or stage == "vae")
    assert not (tmp_path / "run").exists()


def test_what_does_not_fit_is_said_with_flags(monkeypatch, capsys):
    flags = ["--preset", "small", "--hidden", "1024", "--ffn", "4096", "--layers", "24",
             "--heads", "16", "--kv_heads", "2", "--batch", "64", "--dtype", "float32",
             "--llm", "none"]
    monkeypatch.setattr(plan, "CARDS", {"A800-80GB": Card(8 * GIB, 1e12, 1e12)})
    plan.main(["sft", *flags])
    assert "DOES NOT FIT: --micro_batch 8 --checkpointing\n" in capsys.readouterr().out
    plan.main(["sft", *flags, "--micro_batch", "8", "--checkpointing"])
    assert "fits\n" in capsys.readouterr().out
    monkeypatch.setattr(plan, "CARDS", CARDS)
    plan.main(["grpo", "--preset", "paper", "--out", "missing"])
    assert "DOES NOT FIT: on 4 ranks\n" in capsys.readouterr().out
    monkeypatch.setattr(plan, "CARDS", {"A800-80GB": Card(1, 1e12, 1e12)})
    plan.main(["grpo", "--out", "missing"])
    assert "DOES NOT FIT: not with any setting" in capsys.readouterr().out


@pytest.mark.parametrize("command, text", [
    ("grpo --world 9", "a batch of 8 cannot be sharded over 9 ranks"),
    ("grpo --world 80", "a batch of 8 cannot be sharded over 80 ranks"),
    ("grpo --world 80 --preset paper", "a batch of 28 cannot be sharded over 80 ranks"),
    ("sft --world 80 --llm prior", "a batch of 32 cannot be sharded over 80 ranks"),
    ("sft --world 17 --llm none", "a batch of 16 cannot be sharded over 17 ranks"),
    ("prior --world 80", "a batch of 32 cannot be sharded over 80 ranks"),
    ("prior --hands 2,x", "--hands 2,x"),
    ("ddt --world 80", "a batch of 64 cannot be sharded over 80 ranks"),
    ("vae --world 80", "a batch of 64 cannot be sharded over 80 ranks"),
    ("grpo --world 40 --prompts 64", "sft is missing, and grpo.py trains it first: its batch of"),
    ("sft --world 80 --batch 96", "vae is missing, and sft.py trains it first: its batch of 64"),
    ("sft --world 80 --batch 96 --tokenizer vqgan", "vqgan is missing, and sft.py trains"),
    ("grpo --group 1", "--group 1"),
    ("grpo --top_p 2", "--top_p 2.0"),
    ("sft --seed 1000003", "held-out clips"),
    ("sft --world 33 --llm prior", "a batch of 32 cannot be sharded over 33 ranks"),
    ("sft --world 40 --batch 96 --llm prior", "llm is missing, and sft.py trains it first"),
    ("sft --world 0", "--world 0"),
    ("sft --heads 3", "--hidden 128"),
    ("sft --tokenizer mine", "--tokenizer mine"),
    ("sft --preset paper --dtype float99", "--dtype float99"),
    ("grpo --tokenizer vqgan --preset paper", "no preset paper"),
    ("vae --size 30", "--size 30"),
    ("ddt --code_dim 2", "--code_dim 2"),
    ("ddt --vae missing", "missing"),
])
def test_what_cannot_run_is_refused_in_one_line(command, text):
    with pytest.raises(UserError) as error:
        plan.main([*command.split(), "--out", "missing"])
    assert text in str(error.value) and "\n" not in str(error.value)


def test_help(capsys):
    plan.main(["--help"])
    assert "STAGE" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        plan.main(["grpo", "--help"])
    out = capsys.readouterr().out
    assert stop.value.code == 0 and "--world N" in out and "--beta_pretrain" in out
    for wrong in ([], ["dit"], ["grpo", "--beta_pretain", "1"]):
        with pytest.raises(SystemExit) as stop:
            plan.main(wrong)
        assert stop.value.code == 2
