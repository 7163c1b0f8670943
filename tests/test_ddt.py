"""
The tokenizer: VAE, the prefix of tokens, quantizer against a plain loop, the flow, frames and codes, files.

    pytest tests/test_ddt.py
"""
import copy
import json
import math
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

import sim
import train
from ddt import (DDT, PRESETS, VAE, AutoencoderLoss, Config, EMAVectorQuantizer, Frames, MMDiT, TokenLinear, crowding, of_all_ranks,
                 patchify, plan, unpatchify)
from ddt import VAE_WEIGHTS as WEIGHTS
from ddt import small_vae as autoencoder
from train import Problem

SIZE, K, CELLS = 16, 5, 8                   # pixels a side, tokens, latent cells a side


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def small_vae(**other) -> VAE:
    torch.manual_seed(0)
    return VAE({"block_out_channels": [8, 16], "layers_per_block": 1, "latent_channels": 3,
                "norm_num_groups": 4, "scaling_factor": 1.0, "shift_factor": 0.0, "use_quant_conv": False,
                "use_post_quant_conv": False} | other)


def randomized(model: nn.Module) -> nn.Module:
    """No weight is zero: what has no influence has none whatever is learnt."""
    torch.manual_seed(1)
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    return model


def config(**other) -> Config:
    return Config(**{"size": SIZE, "queries": K, "code_dim": 16, "patch": 2, "image_width": 16, "query_width": 32,
                     "encoder_layers": 2, "width": 32, "layers": 2, "heads": 2} | other)


@pytest.fixture
def ddt() -> DDT:
    """Random weights, the codebook filled from what the encoder says."""
    model = DDT(config(), small_vae(scaling_factor=1.3, shift_factor=0.2))
    randomized(model.encoder), randomized(model.decoder)
    with torch.no_grad():
        model.quantizer.fill(model.quantizer.vectors(model.encoder(model.latent(frames(60)))).flatten(0, 1))
    return model.eval()


def frames(n=6):
    return torch.rand(n, 3, SIZE, SIZE, generator=seeded(2))


# ------------------------------------------------------------------ VAE


@pytest.mark.parametrize("levels", [1, 2, 3])
@pytest.mark.parametrize("convs", [False, True])
def test_vae_shapes(levels, convs):
    vae = small_vae(block_out_channels=[8, 16, 16][:levels], use_quant_conv=convs, use_post_quant_conv=convs)
    shrink, images = 2 ** (levels - 1), 2 * frames(2) - 1
    mean, logvar = vae.moments(images)
    assert vae.shrink == shrink and mean.shape == logvar.shape == (2, 3, SIZE // shrink, SIZE // shrink)
    assert vae.encode(images).shape == mean.shape and vae.decode(mean).shape == images.shape


@pytest.mark.parametrize("latent, convs, tensors, parameters", [
    (4, True, 248, 83_653_863), (16, False, 244, 83_819_683)], ids=["SD1", "SD3"])
def test_vae_is_autoencoder_kl(latent, convs, tensors, parameters):
    """At their sizes, it has the tensors and parameters of Stable Diffusion's autoencoders."""
    with torch.device("meta"):
        vae = small_vae(block_out_channels=[128, 256, 512, 512], layers_per_block=2, latent_channels=latent,
                        norm_num_groups=32, use_quant_conv=convs, use_post_quant_conv=convs)
    state = vae.state_dict()
    assert len(state) == tensors and sum(p.numel() for p in state.values()) == parameters
    assert {"encoder.down_blocks.1.resnets.0.conv_shortcut.weight",
            "encoder.down_blocks.2.downsamplers.0.conv.bias",
            "decoder.up_blocks.0.resnets.2.conv2.weight", "decoder.up_blocks.2.upsamplers.0.conv.weight",
            "encoder.mid_block.attentions.0.to_out.0.weight",
            "decoder.mid_block.attentions.0.group_norm.bias"} <= state.keys()


@torch.no_grad()
def test_vae_shifts_and_scales():
    plain, scaled = randomized(small_vae()), randomized(small_vae(scaling_factor=0.5, shift_factor=3.0))
    images = 2 * frames(2) - 1
    z = plain.encode(images)
    torch.testing.assert_close(scaled.encode(images), (z - 3.0) * 0.5)
    torch.testing.assert_close(scaled.decode((z - 3.0) * 0.5), plain.decode(z), rtol=1e-3, atol=1e-3)


FIXTURES = Path(__file__).parent / "fixtures"       # random AutoencoderKLs, written and run by diffusers 0.42.1


def copied(name, folder, change=lambda tensors: tensors, **fields):
    """A fixture's folder, its tensors changed, with other fields in its config."""
    raw = json.loads((FIXTURES / name / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | fields))
    save_file(change(load_file(FIXTURES / name / WEIGHTS)), folder / WEIGHTS)
    return folder


def old_names(tensors):
    """What diffusers called the attention's matrices at first."""
    new_to_old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    renamed = {}
    for name, x in tensors.items():
        for new, old in new_to_old.items():
            name = name.replace(new, old)
        renamed[name] = x
    assert sum("query" in name for name in renamed) == 4
    return renamed


@pytest.mark.parametrize("name", ["vae-sd1", "vae-sd3"])
@pytest.mark.parametrize("change", [lambda tensors: tensors, old_names], ids=["names of today", "old names"])
@torch.no_grad()
def test_vae_matches_diffusers(name, change, tmp_path):
    vae, expected = VAE.load(copied(name, tmp_path, change)), load_file(FIXTURES / name / "expected.safetensors")
    mean, _ = vae.moments(expected["image"])
    torch.testing.assert_close(mean, expected["latent"], atol=1e-4, rtol=0)
    torch.testing.assert_close(vae.reconstruct(expected["latent"]), expected["decoded"], atol=1e-4, rtol=0)
    scale, shift = {"vae-sd1": (0.18215, 0.0), "vae-sd3": (1.5305, 0.0609)}[name]
    torch.testing.assert_close(vae.encode(expected["image"]), (expected["latent"] - shift) * scale, atol=2e-4, rtol=0)
    torch.testing.assert_close(vae.decode(vae.encode(expected["image"])), expected["decoded"], atol=1e-4, rtol=0)


@torch.no_grad()
def test_vae_of_half_precision_files_is_fp32(tmp_path):
    vae = VAE.load(copied("vae-sd3", tmp_path, lambda tensors: {k: x.half() for k, x in tensors.items()}))
    expected = load_file(FIXTURES / "vae-sd3" / "expected.safetensors")
    assert {p.dtype for p in vae.parameters()} == {torch.float32}
    torch.testing.assert_close(vae.moments(expected["image"])[0], expected["latent"], atol=2e-2, rtol=0)


def test_the_first_files_of_sd1_name_no_scale(tmp_path):
    folder = copied("vae-sd1", tmp_path)
    raw = json.loads((folder / "config.json").read_text())
    del raw["scaling_factor"]
    (folder / "config.json").write_text(json.dumps(raw))
    assert VAE.load(folder).config["scaling_factor"] == 0.18215
    (folder / "config.json").write_text("[]")
    with pytest.raises(Problem, match="holds no settings"):
        VAE.load(folder)


def without(name):
    return lambda tensors: {k: x for k, x in tensors.items() if k != name}


def changed(name, f):
    return lambda tensors: tensors | {name: f(tensors[name]).contiguous()}


BIAS = "encoder.mid_block.attentions.0.to_q.bias"


@pytest.mark.parametrize("change, fields, culprit", [
    (without(BIAS), {}, BIAS), (lambda tensors: tensors | {"extra.weight": torch.ones(2)}, {}, "extra.weight"),
    (changed(BIAS, lambda x: x[1:]), {}, BIAS), (changed(BIAS, lambda x: x * math.nan), {}, BIAS),
    (dict, {"use_quant_conv": False}, "quant_conv"), (dict, {"latent_channels": 8}, "encoder.conv_out"),
    (dict, {"act_fn": "relu"}, "act_fn"), (dict, {"mid_block_add_attention": False}, "mid_block_add_attention"),
    (dict, {"_class_name": "VQModel"}, "VQModel"), (dict, {"down_block_types": ["AttnDownBlock2D"] * 4}, "AttnDownBlock2D"),
    (dict, {"block_out_channels": 8}, "config.json"), (dict, {"norm_num_groups": 3}, "config.json"),
    (dict, {"scaling_factor": "big"}, "scaling_factor"), (dict, {"scaling_factor": 0}, "scaling_factor"),
    (dict, {"shift_factor": math.nan}, "shift_factor"), (dict, {"norm_num_groups": 0}, "config.json"),
    (dict, {"block_out_channels": []}, "config.json"), (dict, {"latent_channels": -1}, "config.json"),
    (dict, {"down_block_types": [["DownEncoderBlock2D"]]}, "down_block_types")],
    ids=["missing", "unexpected", "shape", "NaN", "no quant conv", "latent channels", "activation", "no attention", "class",
         "blocks", "channels", "groups", "scale is text", "scale is 0", "shift is NaN",
         "no groups", "no channels", "negative channels", "nested blocks"])
def test_a_vae_that_does_not_fit(change, fields, culprit, tmp_path):
    with pytest.raises(Problem) as problem:
        VAE.load(copied("vae-sd1", tmp_path, change, **fields))
    assert culprit in str(problem.value) and str(tmp_path) in str(problem.value)


# ------------------------------------------------------------------ patches


@pytest.mark.parametrize("p", [1, 2, 4])
def test_patches(p):
    x, side = torch.randn(2, 3, 8, 8, generator=seeded()), 8 // p
    patches = patchify(x, p)
    assert patches.shape == (2, side * side, 3 * p * p)
    assert torch.equal(unpatchify(patches, p, side), x)
    for i in range(side * side):
        row, column = i // side * p, i % side * p
        assert torch.equal(patches[:, i], x[:, :, row:row + p, column:column + p].flatten(1))


# ------------------------------------------------------------------ the decoder sees a prefix


@pytest.fixture(scope="module")
def denoiser():
    """-> MMDiT without zeros, latent, time, tokens"""
    g = seeded(3)
    model = randomized(MMDiT(3, CELLS, 16, config()))
    latent, t = torch.randn(4, 3, CELLS, CELLS, generator=g), torch.rand(4, generator=g)
    return model, latent, t, torch.randn(4, K, 16, generator=g)


@pytest.mark.parametrize("k", range(K + 1))
def test_later_tokens_have_exactly_no_influence(denoiser, k):
    model, latent, t, tokens = denoiser
    shown = torch.full((4,), k)
    tokens = tokens.clone().requires_grad_()
    out = model(latent, t, tokens, shown)
    assert out.shape == latent.shape
    for noise in (1.0, 1e4):
        other = tokens.detach().clone()
        other[:, k:] = noise * torch.randn(4, K - k, 16, generator=seeded(4))
        assert torch.equal(model(latent, t, other, shown), out)
    gradient = torch.autograd.grad(out.square().sum(), tokens)[0]
    assert (gradient[:, k:] == 0).all()
    assert (gradient[:, :k].abs().sum(-1) > 0).all()                     # and the earlier ones have some


@pytest.mark.parametrize("k", range(K))
@torch.no_grad()
def test_later_tokens_are_as_if_there_were_none(denoiser, k):
    model, latent, t, tokens = denoiser
    shown, shorter = torch.full((4,), k), copy.deepcopy(model)
    shorter.token_position = nn.Parameter(model.token_position[:k])
    shorter.token_in.weight, shorter.token_in.bias = (nn.Parameter(x[:k]) for x in model.token_in.parameters())
    torch.testing.assert_close(model(latent, t, tokens, shown), shorter(latent, t, tokens[:, :k], shown))


@torch.no_grad()
def test_every_row_has_its_own_prefix_and_time(denoiser):
    model, latent, t, tokens = denoiser
    shown = torch.tensor([0, 2, K, 1])
    out = model(latent, t, tokens, shown)
    for i in range(4):
        one = [x[i:i + 1] for x in (latent, t, tokens, shown)]
        torch.testing.assert_close(out[i:i + 1], model(*one), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(out, model(latent, t, tokens, shown.clamp(min=1)))
    assert not torch.allclose(out, model(latent, 1 - t, tokens, shown))
    assert not torch.allclose(out[2:3], model(latent, t, tokens.flip(1), shown)[2:3])    # their order matters


@pytest.mark.parametrize("shift", [1.0, 3.7, 8.0])
@pytest.mark.parametrize("queries", [1, 5, 8])
def test_times(shift, queries):
    model = DDT(config(shift=shift, queries=queries), small_vae())
    u = torch.linspace(0, 1, 2001)
    t, k = model.times(u)
    assert t[0] == 0 and t[-1] == pytest.approx(1, abs=1e-6) and (t.diff() > 0).all()
    torch.testing.assert_close(t, shift * u / (1 + (shift - 1) * u))
    assert k.dtype == torch.int64 and k[0] == 0 and k[-1] == queries and (k.diff() >= 0).all()
    shares = torch.bincount(k[1:], minlength=queries + 1)               # every k > 0 has an equal share of u
    assert shares[0] == 0 and (shares[1:] - 2000 / queries).abs().max() <= 1
    everything = DDT(config(shift=shift, queries=queries, prefix="all"), small_vae()).times(u)
    assert torch.equal(everything[0], t) and (everything[1] == queries).all()


# ------------------------------------------------------------------ quantizer


def quantizer(codes=12, dim=4, decay=0.9, active=True, width=6, tokens=4) -> EMAVectorQuantizer:
    torch.manual_seed(0)
    model = EMAVectorQuantizer(TokenLinear(tokens, width, dim), codes, dim, decay)
    model.active.fill_(active)
    return model.train()


class ByHand:
    """The same in plain Python floats, a loop over codes and vectors."""

    def __init__(self, q: EMAVectorQuantizer):
        self.decay, self.dead_below, self.revived = q.decay, q.dead_below, 0
        self.codebook, self.count, self.sum = q.codebook.tolist(), q.count.tolist(), q.sum.tolist()

    def nearest(self, z):
        similarity = [[sum(a * b for a, b in zip(v, code)) for code in self.codebook] for v in z]
        return [max(range(len(row)), key=row.__getitem__) for row in similarity]

    def update(self, z, codes, random_vectors):
        N, dim = len(self.codebook), len(z[0])
        for j in range(N):
            mine = [v for v, code in zip(z, codes) if code == j]
            self.count[j] = self.decay * self.count[j] + (1 - self.decay) * len(mine)
            for d in range(dim):
                self.sum[j][d] = self.decay * self.sum[j][d] + (1 - self.decay) * sum(v[d] for v in mine)
            length = math.sqrt(sum(x * x for x in self.sum[j]))
            self.codebook[j] = [x / length for x in self.sum[j]]
        share = len(z) / N
        for j in range(N):
            if self.count[j] < self.dead_below * share:
                self.revived += 1
                self.codebook[j] = list(random_vectors[j])
                self.count[j] = share
                self.sum[j] = [x * share for x in random_vectors[j]]


def test_every_token_has_its_own_projection():
    layer, x = TokenLinear(3, 5, 2), torch.randn(4, 3, 5, generator=seeded())
    by_hand = torch.stack([x[:, k] @ layer.weight[k] + layer.bias[k] for k in range(3)], 1)
    torch.testing.assert_close(layer(x), by_hand)
    assert 0.9 * 5 ** -0.5 < layer.weight.abs().max() <= 5 ** -0.5 and not torch.equal(layer.weight[0], layer.weight[1])


@torch.no_grad()
def test_ema_updates_against_a_plain_loop():
    q, g = quantizer(), seeded(5)
    by_hand = ByHand(q)
    centers = torch.randn(6, 6, generator=g)
    for step in range(50):
        visible = centers[step // 10:step // 10 + 2]                    # the data move: codes die
        x = visible[torch.randint(2, (10, 4), generator=g)] + 0.3 * torch.randn(10, 4, 6, generator=g)
        z = q.vectors(x).flatten(0, 1)
        expected, random_vectors = by_hand.nearest(z.tolist()), q.random_vectors(z).tolist()
        _, codes, _, vectors = q(x)
        assert codes.flatten().tolist() == expected and torch.equal(vectors.flatten(0, 1), z)
        q.update(z, codes.flatten())
        by_hand.update(z.tolist(), expected, random_vectors)
        for name in ("codebook", "count", "sum"):
            expected = torch.tensor(getattr(by_hand, name))
            torch.testing.assert_close(getattr(q, name), expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(q.codebook.norm(dim=-1), torch.ones(12), rtol=0, atol=1e-6)
    assert q.updates == 50 and 10 < by_hand.revived < 300


@torch.no_grad()
def test_revived_codes_live():
    """A revived code keeps what it was put on: six vectors and six codes end as pairs, and stay so."""
    q = quantizer(codes=6, tokens=6)
    x = torch.randn(1, 6, 6, generator=seeded()).repeat(10, 1, 1)
    assert len(q.nearest(q.vectors(x)).unique()) < 6
    z = q.vectors(x)
    for _ in range(400):
        q.update(z.flatten(0, 1), q.nearest(z).flatten())
    assert len(q.nearest(z).unique()) == 6
    torch.testing.assert_close(q.codebook[q.nearest(z)], z, rtol=0, atol=1e-4)


def test_random_vectors_are_rows():
    q, z = quantizer(), torch.randn(30, 4, generator=seeded())
    drawn = q.random_vectors(z)
    assert drawn.shape == (12, 4) and all((z == row).all(1).any() for row in drawn)
    q.updates += 1
    assert not torch.equal(q.random_vectors(z), drawn)


@pytest.mark.parametrize("active", [True, False])
def test_only_update_changes_the_codebook_and_only_when_active(active):
    q = quantizer(active=active)
    before = {k: v.clone() for k, v in q.state_dict().items()}
    x = torch.randn(3, 4, 6, generator=seeded())
    quantized, codes, commitment, z = q(x)
    if not active:
        q.update(z.flatten(0, 1), codes.flatten())
    assert all(torch.equal(v, before[k]) for k, v in q.state_dict().items())
    assert codes.shape == (3, 4) and commitment.shape == (3,)
    torch.testing.assert_close(quantized, q.codebook[codes] if active else q.vectors(x))
    assert (commitment > 0).all() if active else (commitment == 0).all()


def test_noise_until_quantization():
    """It turns the unit vectors before they are quantized, and is ignored once they are."""
    x, noise = torch.randn(5, 4, 6, generator=seeded()), 0.3 * torch.randn(5, 4, 4, generator=seeded(1))
    for active in (False, True):
        q = quantizer(active=active).eval()
        plain, noisy = q(x)[0], q(x, noise)[0]
        assert torch.equal(plain, noisy) == active
        if not active:
            expected = q.vectors(x) + noise
            torch.testing.assert_close(noisy, expected / expected.norm(dim=-1, keepdim=True))


def test_straight_through():
    """Forward the code, backward as if it were the vector; the commitment pulls the vector to its code."""
    q = quantizer()
    book = q.codebook.clone()
    x = torch.randn(3, 4, 6, generator=seeded()).requires_grad_()
    weight = torch.randn(3, 4, 4, generator=seeded(1))
    quantized, codes, commitment, _ = q(x)
    torch.testing.assert_close(quantized, book[codes], rtol=0, atol=1e-6)
    gradient = torch.autograd.grad((quantized * weight).sum(), x, retain_graph=True)[0]
    expected = torch.autograd.grad((q.vectors(x) * weight).sum(), x)[0]
    torch.testing.assert_close(gradient, expected)
    torch.testing.assert_close(commitment, (q.vectors(x) - book[codes]).square().sum(-1).mean(-1))
    gradient = torch.autograd.grad(commitment.sum(), x)[0]
    expected = torch.autograd.grad((q.vectors(x) - book[codes]).square().sum(-1).mean(-1).sum(), x)[0]
    torch.testing.assert_close(gradient, expected)


def test_codes_are_the_nearest_by_cosine():
    q, z = quantizer(codes=40), torch.randn(200, 4, generator=seeded())
    codes = q.nearest(F.normalize(z, dim=-1))
    by_hand = [max(range(40), key=lambda j: F.cosine_similarity(v, q.codebook[j], dim=0).item()) for v in z]
    assert codes.tolist() == by_hand
    torch.testing.assert_close(q.vectors(torch.randn(2, 4, 6)).norm(dim=-1), torch.ones(2, 4))


def test_fill_uses_every_code():
    """From useless to used: 40 clusters far from where the codes are."""
    q, g = quantizer(codes=32, dim=8, active=False), seeded(6)
    centers = torch.randn(40, 8, generator=g) + 3
    z = centers[torch.randint(40, (2000,), generator=g)] + 0.1 * torch.randn(2000, 8, generator=g)
    z = F.normalize(z, dim=-1)

    def distance():
        return (z - q.codebook[q.nearest(z)]).square().sum(-1).mean().item()
    before, used_before = distance(), len(q.nearest(z).unique())
    q.fill(z)
    assert q.active and q.decay == 0.9
    assert used_before < 16 and torch.equal(q.nearest(z).unique(), torch.arange(32))
    assert distance() < 0.1 * before
    torch.testing.assert_close(q.codebook.norm(dim=-1), torch.ones(32))


def test_usage_falls_when_codes_do():
    """Two vectors use two codes, though revival keeps the others' counts up."""
    q = quantizer(codes=32, dim=4, active=False)
    z = F.normalize(torch.randn(400, 4, generator=seeded(3)), dim=-1)
    assert q.usage(q.nearest(z)) == {"codes_used": 0, "perplexity": 0.0}
    q.fill(z)
    assert q.usage(q.nearest(z))["codes_used"] == 32
    two = z[:2].repeat_interleave(torch.tensor([300, 100]), 0)
    for _ in range(50):
        q.update(two, q.nearest(two))
    assert q.usage(q.nearest(two)) == {"codes_used": 2, "perplexity": pytest.approx(0.75 ** -0.75 * 0.25 ** -0.25)}


def test_crowding():
    """Against a loop over pairs; 0 when all vectors are one; its gradient drives the vectors apart."""
    z = F.normalize(torch.randn(5, 3, 4, generator=seeded()), dim=-1)
    for i in range(5):
        by_hand = [math.log(sum(math.exp(-2 * ((z[i, k] - z[j, k]) ** 2).sum()) for j in range(5)) / 5) for k in range(3)]
        assert crowding(z, z)[i].item() == pytest.approx(sum(by_hand) / 3, abs=1e-5)
    torch.testing.assert_close(crowding(z[:1].expand(5, -1, -1), z[:1]), torch.zeros(5), rtol=0, atol=1e-6)
    x = (torch.ones(5, 1, 4) + 0.1 * torch.randn(5, 1, 4, generator=seeded(1))).requires_grad_()
    optimizer = torch.optim.SGD([x], lr=0.3)
    for _ in range(300):
        unit = F.normalize(x, dim=-1)
        loss = crowding(unit, unit.detach()).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    similarity = F.normalize(x[:, 0], dim=-1) @ F.normalize(x[:, 0], dim=-1).T
    assert similarity.fill_diagonal_(-1).max() < 0.2 and loss < crowding(z, z).mean()


@torch.no_grad()
def test_spread_begins_when_the_plateau_is_left():
    ddt = DDT(config(), small_vae())
    latent, noise = torch.randn(2, 6, ddt.vae.config["latent_channels"], CELLS, CELLS, generator=seeded())
    for noise_mse in (1.0, 0.1):
        ddt.noise_mse.fill_(noise_mse)
        r = ddt(latent, torch.ones(6), noise)
        spread = ddt.config.spread * r["crowding"] if noise_mse < ddt.config.noise_below else 0
        torch.testing.assert_close(r["loss"], r["mse"] + ddt.config.commitment * r["commitment"] + spread)
    assert ddt.config.spread > 0 and (r["crowding"] < 0).all()


def quantize(world):
    """Fill and 20 updates on this rank's share of 7 rows -> the state."""
    q, g = quantizer(), seeded(7)
    rows = torch.randn(20, 7, 4, 6, generator=g) + torch.randn(6, generator=g)
    with torch.no_grad():
        q.fill(q.vectors(world.share(rows[0])).flatten(0, 1))
        for x in rows:
            z = q.vectors(world.share(x))
            q.update(z.flatten(0, 1), q.nearest(z).flatten())
    return q.state_dict()


def crowd(world):
    """Crowding of this rank's share of 7 rows, and its gradient."""
    x = torch.randn(7, 3, 4, generator=seeded()).requires_grad_()
    z = F.normalize(world.share(x), dim=-1)
    result = crowding(z, of_all_ranks(z))
    return {"crowding": result.detach(), "gradient": world.share(torch.autograd.grad(result.sum(), x)[0]).contiguous()}


def of_two_ranks(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    world = train.World(rank, 2, torch.device("cpu"))
    state = quantize(world) | crowd(world)
    train.write_safetensors(folder / f"{rank}.safetensors", state, {})
    dist.destroy_process_group()


def test_codebook_and_crowding_of_two_ranks_are_that_of_one(tmp_path):
    mp.spawn(of_two_ranks, (tmp_path,), 2)
    first, second = (train.read_safetensors(tmp_path / f"{rank}.safetensors")[0] for rank in (0, 1))
    alone = train.World(0, 1, torch.device("cpu"))
    for name, value in crowd(alone).items():
        torch.testing.assert_close(torch.cat([first[name], second[name]]), value)
    for name, value in quantize(alone).items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], value, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------ the flow


class Oracle(nn.Module):
    """A decoder that knows the clean latent, and remembers what it was asked."""

    def __init__(self, clean):
        super().__init__()
        self.clean, self.asked = clean, []

    def forward(self, x, t, tokens, k):
        self.asked.append((x, t, tokens, k))
        return self.clean


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 50])
@torch.no_grad()
def test_euler_steps_recover_what_the_decoder_knows(ddt, steps):
    clean, noise = torch.randn(2, 4, 3, CELLS, CELLS, generator=seeded())
    ddt.decoder = Oracle(clean)
    assert torch.equal(ddt.sample(torch.zeros(4, K, 16), noise, steps), clean)
    assert len(ddt.decoder.asked) == steps
    shown = []
    for x, t, _, k in ddt.decoder.asked:                                 # on the line from noise to clean
        torch.testing.assert_close(x, t[:, None, None, None] * noise + (1 - t[:, None, None, None]) * clean,
                                   rtol=1e-4, atol=1e-5)
        shown.append(k[0].item())
    assert shown == sorted(shown, reverse=True) and shown[0] == K


@torch.no_grad()
def test_one_step_is_one_call(ddt):
    tokens = torch.randn(4, K, 16, generator=seeded())
    noise = torch.randn(4, 3, CELLS, CELLS, generator=seeded(1))
    expected = ddt.decoder(noise, torch.ones(4), tokens, torch.full((4,), K))
    torch.testing.assert_close(ddt.sample(tokens, noise, 1), expected)
    assert not torch.allclose(ddt.sample(tokens, noise, 4), expected)


def test_training_loss(ddt):
    """The decoder is asked for x_0 at x_t = t eps + (1 - t) x_0 with k(t) tokens."""
    clean, noise = torch.randn(2, 4, 3, CELLS, CELLS, generator=seeded())
    u = torch.tensor([0.0, 0.3, 0.8, 1.0])
    offset = torch.tensor([0.0, 1.0, 2.0, 3.0])
    ddt.decoder = Oracle(clean + offset[:, None, None, None])
    result = ddt(clean, u, noise)
    (x, t, tokens, k), = ddt.decoder.asked
    assert torch.equal(k, torch.tensor([0, 2, 4, 5])) and torch.equal(t, ddt.times(u)[0])
    assert torch.equal(x[0], clean[0]) and torch.equal(x[3], noise[3])
    torch.testing.assert_close(x[1], t[1] * noise[1] + (1 - t[1]) * clean[1])
    torch.testing.assert_close(tokens, ddt.quantizer.codebook[result["codes"]])
    torch.testing.assert_close(result["mse"], offset.square())
    torch.testing.assert_close(result["loss"], offset.square() + ddt.config.commitment * result["commitment"])


class MixtureOracle(nn.Module):
    """The best decoder for cells that are each drawn from a mixture of two Gaussians: E[x_0 | x_t], in closed form."""
    weight, mean, std = torch.tensor([0.3, 0.7]), torch.tensor([-1.5, 1.0]), torch.tensor([0.2, 0.4])

    def forward(self, x, t, tokens, k):
        t = t[:, None, None, None, None]
        x, v = x[..., None], (1 - t) ** 2 * self.std ** 2 + t ** 2              # of x_t, given the component
        off = x - (1 - t) * self.mean
        share = (self.weight.log() - v.log() / 2 - off ** 2 / (2 * v)).softmax(-1)
        return (share * (self.mean + (1 - t) * self.std ** 2 / v * off)).sum(-1)


@torch.no_grad()
def test_euler_steps_sample_a_mixture(ddt):
    """200 steps draw from the distribution; one gives its mean."""
    ddt.decoder = oracle = MixtureOracle()
    tokens, noise = torch.zeros(4, K, 16), torch.randn(4, 25, 40, 40, generator=seeded())
    mean = (oracle.weight * oracle.mean).sum().item()
    variance = (oracle.weight * (oracle.std ** 2 + oracle.mean ** 2)).sum().item() - mean ** 2
    torch.testing.assert_close(ddt.sample(tokens, noise, 1), torch.full_like(noise, mean))
    x = ddt.sample(tokens, noise, 200)
    assert x.mean() == pytest.approx(mean, abs=0.02) and x.var() == pytest.approx(variance, rel=0.02)
    left = x < -0.4
    assert left.float().mean() == pytest.approx(0.3, abs=0.02)
    assert x[left].std() == pytest.approx(0.2, rel=0.1) and x[~left].std() == pytest.approx(0.4, rel=0.1)


def test_the_loss_is_that_of_the_velocity_times_t_squared(ddt):
    """|x^_0 - x_0|^2 = t^2 |v^ - v|^2: the flow's velocity is v = eps - x_0, and v^ = (x_t - x^_0) / t."""
    clean, noise, guess = torch.randn(3, 4, 3, CELLS, CELLS, generator=seeded())
    ddt.decoder = Oracle(guess)
    u = torch.tensor([0.1, 0.3, 0.8, 1.0])
    mse = ddt(clean, u, noise)["mse"]
    (x_t, t, _, _), = ddt.decoder.asked
    t = t[:, None, None, None]
    velocity = ((x_t - guess) / t - (noise - clean)).square()
    torch.testing.assert_close(mse, (t ** 2 * velocity).mean((1, 2, 3)))


# ------------------------------------------------------------------ presets


def parameters_of_a_stream(width, inner, condition=0, last=False):
    attention = width * 3 * inner + 3 * inner + (0 if last else inner * width + width)
    mlp = 0 if last else 2 * 4 * width * width + 5 * width
    shifts = (2 if last else 6) * width
    return attention + mlp + (shifts * (condition + 1) if condition else (2 if last else 4) * width)


@pytest.mark.parametrize("preset, millions", [("tiny", (0.242, 0.490, 1.656)), ("small", (1.258, 6.166, 41.221)),
                                              ("paper", (83.820, 12.489, 111.101))])
def test_presets_have_the_parameters_the_comment_says(preset, millions):
    c = Config(**{"preset": preset} | PRESETS[preset])
    with torch.device("meta"):
        vae = autoencoder(c) if preset != "paper" else small_vae(
            block_out_channels=[128, 256, 512, 512], layers_per_block=2, latent_channels=16, norm_num_groups=32)
        model = DDT(c, vae)
    count = [sum(p.numel() for p in part.parameters()) for part in (model.vae, model.encoder, model.decoder)]
    assert [round(n / 1e6, 3) for n in count] == list(millions)

    P, K, Q, I, D = vae.config["latent_channels"] * c.patch ** 2, c.queries, c.query_width, c.image_width, c.width
    assert count[1] == (P + 1) * I + K * Q + 2 * Q + (c.encoder_layers - 1) * parameters_of_a_stream(I, Q) \
        + parameters_of_a_stream(I, Q, last=True) + c.encoder_layers * parameters_of_a_stream(Q, Q)
    assert count[2] == (P + 1) * D + K * (c.code_dim + 1) * D + K * D + 257 * D + (D + 1) * D + (D + 1) * 2 * D + (D + 1) * P \
        + (2 * c.layers - 1) * parameters_of_a_stream(D, D, D) + parameters_of_a_stream(D, D, D, last=True)
    assert len(model.encoder.position) == len(model.decoder.position) == {"tiny": 16, "small": 64, "paper": 256}[preset]


def test_plan_counts_the_training_of_the_vae(tmp_path):
    """What a pass over its batch keeps; nothing with --vae, whose parameters count instead."""
    small = config(size=16, vae_batch=6)
    kept = []
    loss_of = AutoencoderLoss(autoencoder(small))
    own = {x.untyped_storage().data_ptr() for x in loss_of.state_dict().values()}
    images = torch.rand(6, 3, 16, 16)
    noise = torch.randn_like(loss_of.vae.moments(images)[0])
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        loss_of(images, noise)
    kept = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in kept}
    real = sum(size for place, size in kept.items() if place not in own)
    assert plan(small, 1).passing["activations of the VAE's training"] == pytest.approx(real, rel=0.02)
    with_own, with_sd3 = plan(small, 1), plan(config(size=16, vae=str(FIXTURES / "vae-sd3")), 1)
    assert with_sd3.passing.keys() == {"activations"}
    assert with_sd3.fixed["parameters"] != with_own.fixed["parameters"]


@torch.no_grad()
def test_frames_are_those_of_the_clips():
    data = Frames(Config(scenario="all", clips=3, size=16), "cpu")
    for i, name in enumerate(sim.SCENARIOS):
        clips = sim.sample(name, "pretrain", 3, 0)
        painted = sim.render(clips.position, clips.radius, 16).flatten(0, 1)                        # (96, 3, 16, 16)
        torch.testing.assert_close(data[96 * i + torch.arange(96)], painted, rtol=0, atol=0.05)     # 0.006 units are 0.01 pixels
    assert len(data) == 3 * 96
    both = Frames(Config(clips=3, size=16), "cpu", ("pretrain", "ood"))             # those of a second split come after
    unseen = sim.sample("uniform", "ood", 3, 0)
    painted = sim.render(unseen.position, unseen.radius, 16).flatten(0, 1)
    torch.testing.assert_close(both[96 + torch.arange(96)], painted, rtol=0, atol=0.05)
    assert torch.equal(both[torch.arange(96)], data[torch.arange(96)]) and len(both) == 2 * 96


# ------------------------------------------------------------------ frames <-> codes


def test_encode_and_decode(ddt):
    codes = ddt.encode(frames())
    assert codes.shape == (6, K) and codes.dtype == torch.int64 and codes.min() >= 0 and codes.max() < 256
    assert len(codes.unique(dim=0)) == 6
    for steps in (1, 3):
        decoded = ddt.decode(codes, steps, seeded(1))
        assert decoded.shape == (6, 3, SIZE, SIZE) and decoded.dtype == torch.float32
        assert decoded.min() >= 0 and decoded.max() <= 1 and decoded.std() > 0.01
        assert torch.equal(decoded, ddt.decode(codes, steps, seeded(1)))
        assert not torch.equal(decoded, ddt.decode(codes, steps, seeded(2)))
        assert not torch.equal(decoded, ddt.decode((codes + 1) % 256, steps, seeded(1)))
    assert torch.equal(codes, ddt.encode(frames()))
    assert not ddt.decode(codes).requires_grad


def test_order_of_codes(ddt):
    """Reversed, the same codes come last first, and mean the same pictures."""
    codes = ddt.encode(frames())
    painted = ddt.decode(codes, generator=seeded())
    ddt.config.order = "reverse"
    assert torch.equal(ddt.encode(frames()), codes.flip(1)) and not torch.equal(codes.flip(1), codes)
    assert torch.equal(ddt.decode(codes.flip(1), generator=seeded()), painted)


def test_the_vae_stays_as_it_is(ddt):
    ddt.train()
    assert not ddt.vae.training and ddt.quantizer.training
    assert not any(p.requires_grad for p in ddt.vae.parameters())
    assert all(p.requires_grad for p in [*ddt.encoder.parameters(), *ddt.decoder.parameters()])


@pytest.mark.parametrize("shape", [(3, SIZE, SIZE), (2, 1, SIZE, SIZE), (2, 3, SIZE, 2 * SIZE),
                                   (2, 3, 2 * SIZE, 2 * SIZE), (1, 2, 3, SIZE, SIZE)])
def test_frames_of_another_shape(ddt, shape):
    with pytest.raises(ValueError) as error:
        ddt.encode(torch.zeros(shape))
    assert str(shape) in str(error.value) and str(SIZE) in str(error.value)


@pytest.mark.parametrize("codes", [torch.zeros(K), torch.zeros(2, K + 1), torch.zeros(2, K - 1),
                                   torch.zeros(1, 2, K), torch.full((2, K), 256), torch.full((2, K), -1)])
def test_codes_that_are_none(ddt, codes):
    with pytest.raises(ValueError, match=r"\[0, 256\)"):
        ddt.decode(codes.long())


def test_a_size_that_does_not_divide():
    with pytest.raises(Problem, match="--size 18 .* 4"):
        DDT(config(size=18), small_vae())


# ------------------------------------------------------------------ files


def test_save_and_load(ddt, tmp_path):
    ddt.save(tmp_path / "ddt")
    loaded = DDT.load(tmp_path / "ddt")
    assert loaded.config == ddt.config and loaded.vae.config == ddt.vae.config and loaded.quantizer.active
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    codes = ddt.encode(frames())
    assert torch.equal(loaded.encode(frames()), codes)
    for steps in (1, 4):
        assert torch.equal(loaded.decode(codes, steps, seeded()), ddt.decode(codes, steps, seeded()))


@pytest.mark.parametrize("part", ["encoder.queries", "decoder.token_position", "quantizer.codebook"])
def test_a_tokenizer_trained_anew_is_another(tmp_path, part):
    """Whichever part has changed, however large the VAE: to later stages the codes mean something else."""
    model = DDT(config(), small_vae(block_out_channels=[48, 96]))
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "model.safetensors").touch()
    model.save(tmp_path / "ddt")
    train.made_of(tmp_path / "sft", ddt=tmp_path / "ddt" / "model.safetensors")
    model.state_dict()[part].mul_(-1)
    model.save(tmp_path / "ddt")
    with pytest.raises(Problem, match="another ddt"):
        train.made_of(tmp_path / "sft", ddt=tmp_path / "ddt" / "model.safetensors")


@pytest.mark.parametrize("convs", [False, True])
@torch.no_grad()
def test_vae_save_and_load(tmp_path, convs):
    vae = randomized(small_vae(use_quant_conv=convs, use_post_quant_conv=convs, scaling_factor=0.7))
    vae.save(tmp_path)
    loaded, images = VAE.load(tmp_path), 2 * frames() - 1
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", "diffusion_pytorch_model.safetensors"}
    latents = vae.encode(images)
    assert torch.equal(loaded.encode(images), latents)
    assert torch.equal(loaded.decode(latents), vae.decode(latents))


def edit(folder, part, **fields):
    raw = json.loads((folder / "config.json").read_text())
    raw[part] |= fields
    (folder / "config.json").write_text(json.dumps(raw))


def shorten(path, n):
    os.truncate(path, path.stat().st_size - n)


@pytest.mark.parametrize("damage, culprit", [
    (lambda f: (f / "config.json").unlink(), "config.json"),
    (lambda f: os.truncate(f / "config.json", 20), "config.json"),
    (lambda f: (f / "config.json").write_text("{}"), "config.json"),
    (lambda f: edit(f, "ddt", no_such_field=1), "config.json"),
    (lambda f: edit(f, "ddt", layers=3), "decoder.image_blocks.2"),
    (lambda f: edit(f, "vae", latent_channels=4), "vae.encoder.conv_out"),
    (lambda f: (f / "model.safetensors").unlink(), "model.safetensors"),
    (lambda f: os.truncate(f / "model.safetensors", 1000), "model.safetensors"),
    (lambda f: shorten(f / "model.safetensors", 1), "model.safetensors")],
    ids=["no config", "config cut", "config empty", "unknown field", "more layers", "other vae", "no weights",
         "weights cut", "a byte short"])
def test_a_damaged_tokenizer_is_named(ddt, tmp_path, damage, culprit):
    ddt.save(tmp_path)
    damage(tmp_path)
    with pytest.raises(Problem) as problem:
        DDT.load(tmp_path)
    assert culprit in str(problem.value) and str(tmp_path) in str(problem.value)


def test_weights_that_are_not_finite(ddt, tmp_path):
    ddt.decoder.token_position.data[0, 0] = math.nan
    ddt.save(tmp_path)
    with pytest.raises(Problem, match="decoder.token_position"):
        DDT.load(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "diffusion_pytorch_model.safetensors"])
@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: os.truncate(path, 50),
                                    lambda path: path.write_text("{}")], ids=["missing", "cut", "empty"])
def test_a_damaged_vae_is_named(tmp_path, name, damage):
    small_vae().save(tmp_path)
    damage(tmp_path / name)
    with pytest.raises(Problem, match=name):
        VAE.load(tmp_path)
