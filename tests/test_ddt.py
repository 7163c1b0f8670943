"""
The tokenizer: the prefix of tokens, the quantizer against a plain loop, the flow, frames and codes,
files, --fresh.

    pytest tests/test_ddt.py

Takes 30 seconds on one CPU core.
"""
import copy
import itertools
import json
import math
import os
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as nnf
from safetensors.torch import load_file, save_file
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.overrides import TorchFunctionMode

import checkpoint
import ddt
import evaluate
import prior
import train
import vae
from checkpoint import UserError
from ddt import (DDT, PRESETS, Config, EMAVectorQuantizer, MMDiT, QFormer, TokenLinear, crowding,
                 patchify, unpatchify)
from vae import VAE

SIZE, K, CELLS = 16, 5, 8                   # pixels per side, tokens, latent cells per side


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def noisy(*shape, seed=0):
    return torch.randn(shape, generator=seeded(seed))


def small_vae(**other) -> VAE:
    torch.manual_seed(0)
    fields = {"block_out_channels": [8, 16], "latent_channels": 3, "norm_num_groups": 4,
              "use_quant_conv": False, "use_post_quant_conv": False}
    return VAE(**fields | other)


def randomized(model: nn.Module) -> nn.Module:
    """No weight is zero: an input without influence would have none after training either."""
    torch.manual_seed(1)
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    return model


def config(**other) -> Config:
    fields = {"size": SIZE, "queries": K, "code_dim": 16, "patch": 2, "image_width": 16,
              "query_width": 32, "encoder_layers": 2, "width": 32, "layers": 2, "heads": 2}
    return Config(**fields | other)


def frames(n=6):
    return torch.rand(n, 3, SIZE, SIZE, generator=seeded(2))


@pytest.fixture
@torch.no_grad()
def tokenizer() -> DDT:
    """Random weights, and a codebook filled from the encoder's vectors."""
    model = DDT(config(), small_vae(scaling_factor=1.3, shift_factor=0.2))
    randomized(model.encoder)
    randomized(model.decoder)
    model.quantizer.fill(model.vectors(model.latent(frames(60))).flatten(0, 1))
    return model.eval()


# ------------------------------------------------------------------ on a GPU


def test_all_blocks_share_a_compilation(monkeypatch):
    """One of all blocks but the last, one of the last; none more in evaluation. Nothing changes."""
    counter, plain_compile = CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile", partial(plain_compile, backend=counter))
    monkeypatch.setattr(train, "can_compile", lambda *_: True)
    torch._dynamo.reset()
    model = DDT(config(encoder_layers=4, layers=4), small_vae())
    randomized(model.encoder)
    randomized(model.decoder)
    latent, u, noise = noisy(3, 3, CELLS, CELLS), torch.rand(3), noisy(3, 3, CELLS, CELLS, seed=1)

    def gradients():
        for _ in range(2):
            model.zero_grad()
            model(latent, u, noise)["loss"].sum().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    expected = gradients()
    world = train.World(0, 1, torch.device("cuda"))
    model.encoder.block = world.compile(QFormer.block)
    model.decoder.block = world.compile(MMDiT.block)
    for name, gradient in gradients().items():
        assert torch.equal(gradient, expected[name])
    assert counter.frame_count == 4
    model.decode(model.encode(frames()))
    assert counter.frame_count == 4


class OnOneDevice(TorchFunctionMode):
    """Whatever makes a tensor must name its device: by default, it would be the CPU."""
    MAKE = ("rand", "randn", "randint", "randperm", "arange", "tensor", "zeros", "ones", "full")

    def __init__(self):
        super().__init__()
        self.made = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function.__name__ in self.MAKE:
            assert "device" in (kwargs or {}), function
            self.made += 1
        return function(*args, **(kwargs or {}))


def test_a_step_draws_on_its_device():
    """The noise of a step and the inputs of the language model."""
    g, near = seeded(), torch.arange(256)[:, None]
    model, world = DDT(config(batch=4), small_vae()), train.World(0, 1, torch.device("cpu"))
    with OnOneDevice() as mode:
        ddt.draw_noise(model, (3, CELLS, CELLS), 0, world)
        prior.corrupt_inputs(prior.number_sequences(3, 2, 8, g), near, 0.1, g)
    assert mode.made > 15


def test_noise_on_the_cpu_is_what_it_was():
    """The same draws in the same order as with a generator on the CPU, for any number of ranks."""
    c, generator = config(batch=5), train.generator(0, 7)
    u = torch.rand(5, generator=generator)
    u[torch.rand(5, generator=generator) < c.pure_noise] = 1
    expected = [u, torch.randn(5, 3, CELLS, CELLS, generator=generator)]
    ranks = [ddt.draw_noise(DDT(c, small_vae()), (3, CELLS, CELLS), 7,
                            train.World(rank, 2, torch.device("cpu"))) for rank in range(2)]
    for i, x in enumerate(expected):
        assert torch.equal(torch.cat([drawn[i] for drawn in ranks]), x)


# ------------------------------------------------------------------ patches


@pytest.mark.parametrize("p", [1, 2, 4])
def test_patches(p):
    x, side = noisy(2, 3, 8, 8), 8 // p
    patches = patchify(x, p)
    assert patches.shape == (2, side * side, 3 * p * p)
    assert torch.equal(unpatchify(patches, p, side), x)
    for i in range(side * side):
        row, column = i // side * p, i % side * p
        patch = x[:, :, row:row + p, column:column + p]
        assert torch.equal(patches[:, i], patch.flatten(1))


# ------------------------------------------------------------------ the decoder sees a prefix


@pytest.fixture(scope="module")
def denoiser():
    """-> MMDiT without zeros, latent, time, tokens."""
    model = MMDiT(channels=3, side=CELLS, n_tokens=K, code_dim=16, width=32, layers=2, heads=2)
    t = torch.rand(4, generator=seeded(3))
    return randomized(model), noisy(4, 3, CELLS, CELLS, seed=4), t, noisy(4, K, 16, seed=5)


@pytest.mark.parametrize("k", range(K + 1))
def test_later_tokens_have_exactly_no_influence(denoiser, k):
    model, latent, t, tokens = denoiser
    visible = torch.full((4,), k)
    tokens = tokens.clone().requires_grad_()
    out = model(latent, t, tokens, visible)
    assert out.shape == latent.shape
    for scale in (1.0, 1e4):
        other = tokens.detach().clone()
        other[:, k:] = scale * noisy(4, K - k, 16, seed=6)
        assert torch.equal(model(latent, t, other, visible), out)
    gradient = torch.autograd.grad(out.square().sum(), tokens)[0]
    assert (gradient[:, k:] == 0).all()
    assert (gradient[:, :k].abs().sum(-1) > 0).all()        # and the earlier ones have some


@pytest.mark.parametrize("k", range(K))
@torch.no_grad()
def test_later_tokens_are_as_if_there_were_none(denoiser, k):
    model, latent, t, tokens = denoiser
    visible, shorter = torch.full((4,), k), copy.deepcopy(model)
    shorter.token_position = nn.Parameter(model.token_position[:k])
    shorter.token_in.weight = nn.Parameter(model.token_in.weight[:k])
    shorter.token_in.bias = nn.Parameter(model.token_in.bias[:k])
    expected = shorter(latent, t, tokens[:, :k], visible)
    torch.testing.assert_close(model(latent, t, tokens, visible), expected)


@torch.no_grad()
def test_every_sample_has_its_own_prefix_and_time(denoiser):
    model, latent, t, tokens = denoiser
    visible = torch.tensor([0, 2, K, 1])
    out = model(latent, t, tokens, visible)
    for i in range(4):
        alone = model(*(x[i:i + 1] for x in (latent, t, tokens, visible)))
        torch.testing.assert_close(out[i:i + 1], alone, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(out, model(latent, t, tokens, visible.clamp(min=1)))
    assert not torch.allclose(out, model(latent, 1 - t, tokens, visible))
    flipped = model(latent, t, tokens.flip(1), visible)     # the order of tokens matters
    assert not torch.allclose(out[2:3], flipped[2:3])


@pytest.mark.parametrize("shift", [1.0, 3.7, 20.0])
@pytest.mark.parametrize("queries", [1, 5, 8])
def test_times(shift, queries):
    model = DDT(config(shift=shift, queries=queries), small_vae())
    u = torch.linspace(0, 1, 2001)
    t, k = model.times(u)
    assert t[0] == 0 and t[-1] == pytest.approx(1, abs=1e-6) and (t.diff() > 0).all()
    torch.testing.assert_close(t, shift * u / (1 + (shift - 1) * u))
    assert k.dtype == torch.int64
    assert k[0] == 0 and k[-1] == queries and (k.diff() >= 0).all()
    shares = torch.bincount(k[1:], minlength=queries + 1)   # every k > 0 has an equal share of u
    assert shares[0] == 0 and (shares[1:] - 2000 / queries).abs().max() <= 1

    model.config.prefix = "all"
    t_all, k_all = model.times(u)
    assert torch.equal(t_all, t) and (k_all == queries).all()


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
        codes = []
        for vector in z:
            cosine = [sum(a * b for a, b in zip(vector, code)) for code in self.codebook]
            codes.append(cosine.index(max(cosine)))
        return codes

    def update(self, z, codes, random_vectors):
        V, dim, decay = len(self.codebook), len(z[0]), self.decay
        for j in range(V):
            mine = [vector for vector, code in zip(z, codes) if code == j]
            self.count[j] = decay * self.count[j] + (1 - decay) * len(mine)
            for d in range(dim):
                total = sum(vector[d] for vector in mine)
                self.sum[j][d] = decay * self.sum[j][d] + (1 - decay) * total
            length = math.sqrt(sum(x * x for x in self.sum[j]))
            self.codebook[j] = [x / length for x in self.sum[j]]
        uniform = len(z) / V
        for j in range(V):
            if self.count[j] < self.dead_below * uniform:
                self.revived += 1
                self.codebook[j] = list(random_vectors[j])
                self.count[j] = uniform
                self.sum[j] = [x * uniform for x in random_vectors[j]]


def test_every_token_has_its_own_projection():
    torch.manual_seed(0)
    layer, x = TokenLinear(3, 5, 2), noisy(4, 3, 5)
    by_hand = torch.stack([x[:, k] @ layer.weight[k] + layer.bias[k] for k in range(3)], 1)
    torch.testing.assert_close(layer(x), by_hand)
    assert 0.9 * 5 ** -0.5 < layer.weight.abs().max() <= 5 ** -0.5
    assert not torch.equal(layer.weight[0], layer.weight[1])


@torch.no_grad()
def test_ema_updates_against_a_plain_loop():
    q, g = quantizer(), seeded(5)
    by_hand = ByHand(q)
    centers = torch.randn(6, 6, generator=g)
    for step in range(50):
        visible = centers[step // 10:step // 10 + 2]        # the data move: codes die
        x = visible[torch.randint(2, (10, 4), generator=g)]
        x = x + 0.3 * torch.randn(10, 4, 6, generator=g)
        z = q.vectors(x).flatten(0, 1)
        expected, random_vectors = by_hand.nearest(z.tolist()), q.random_vectors(z).tolist()
        _, codes, _, vectors = q(x)
        assert codes.flatten().tolist() == expected and torch.equal(vectors.flatten(0, 1), z)
        q.update(z, codes.flatten())
        by_hand.update(z.tolist(), expected, random_vectors)
        for name in ("codebook", "count", "sum"):
            expected = torch.tensor(getattr(by_hand, name))
            torch.testing.assert_close(getattr(q, name), expected, rtol=1e-6, atol=1e-6)
        norm = q.codebook.norm(dim=-1)
        torch.testing.assert_close(norm, torch.ones(12), rtol=0, atol=1e-6)
    assert q.updates == 50 and 10 < by_hand.revived < 300


@torch.no_grad()
def test_revived_codes_live():
    """A revived code keeps its place: six vectors and six codes end as pairs, and stay pairs."""
    q = quantizer(codes=6, tokens=6)
    z = q.vectors(noisy(1, 6, 6).repeat(10, 1, 1))
    assert len(q.nearest(z).unique()) < 6
    for _ in range(400):
        q.update(z.flatten(0, 1), q.nearest(z).flatten())
    assert len(q.nearest(z).unique()) == 6
    torch.testing.assert_close(q.codebook[q.nearest(z)], z, rtol=0, atol=1e-4)


def test_random_vectors_are_rows():
    q, z = quantizer(), noisy(30, 4)
    drawn = q.random_vectors(z)
    assert drawn.shape == (12, 4) and all((z == row).all(1).any() for row in drawn)
    q.updates += 1
    assert not torch.equal(q.random_vectors(z), drawn)


@pytest.mark.parametrize("active", [True, False])
def test_only_update_changes_the_codebook_and_only_when_active(active):
    q = quantizer(active=active)
    before = {k: v.clone() for k, v in q.state_dict().items()}
    x = noisy(3, 4, 6)
    quantized, codes, commitment, z = q(x)
    if not active:
        q.update(z.flatten(0, 1), codes.flatten())
    assert all(torch.equal(v, before[k]) for k, v in q.state_dict().items())
    assert codes.shape == (3, 4) and commitment.shape == (3,)
    torch.testing.assert_close(quantized, q.codebook[codes] if active else q.vectors(x))
    assert (commitment > 0).all() if active else (commitment == 0).all()


def test_noise_until_quantization():
    """It is added to the unit vectors before quantization starts, and ignored afterwards."""
    x, noise = noisy(5, 4, 6), 0.3 * noisy(5, 4, 4, seed=1)
    for active in (False, True):
        q = quantizer(active=active).eval()
        plain, perturbed = q(x)[0], q(x, noise)[0]
        assert torch.equal(plain, perturbed) == active
        if not active:
            expected = q.vectors(x) + noise
            expected = expected / expected.norm(dim=-1, keepdim=True)
            torch.testing.assert_close(perturbed, expected)


def test_straight_through():
    """
    Forward it is the code, backward the vector; the commitment loss pulls the vector to its code.
    """
    q = quantizer()
    x, weight = noisy(3, 4, 6).requires_grad_(), noisy(3, 4, 4, seed=1)
    quantized, codes, commitment, _ = q(x)
    code = q.codebook[codes].clone()
    torch.testing.assert_close(quantized, code, rtol=0, atol=1e-6)
    gradient = torch.autograd.grad((quantized * weight).sum(), x, retain_graph=True)[0]
    expected = torch.autograd.grad((q.vectors(x) * weight).sum(), x)[0]
    torch.testing.assert_close(gradient, expected)

    by_hand = (q.vectors(x) - code).square().sum(-1).mean(-1)
    torch.testing.assert_close(commitment, by_hand)
    gradient = torch.autograd.grad(commitment.sum(), x)[0]
    expected = torch.autograd.grad(by_hand.sum(), x)[0]
    torch.testing.assert_close(gradient, expected)


def test_codes_are_the_nearest_by_cosine():
    q, z = quantizer(codes=40), noisy(200, 4)
    cosine = nnf.cosine_similarity(z[:, None], q.codebook, dim=-1)
    by_hand = [max(range(40), key=row.__getitem__) for row in cosine.tolist()]
    assert q.nearest(nnf.normalize(z, dim=-1)).tolist() == by_hand
    norm = q.vectors(noisy(2, 4, 6)).norm(dim=-1)
    torch.testing.assert_close(norm, torch.ones(2, 4))


@pytest.mark.parametrize("n", [1, 1023, 1024, 1025, 3000])
def test_the_nearest_of_many(n):
    """Of any number of vectors, in any shape; of two codes that are equal the first."""
    q = quantizer(codes=40)
    q.codebook[30] = q.codebook[7]
    z = nnf.normalize(noisy(n, 4), dim=-1)
    z[-1] = q.codebook[30]
    cosine = (z.double()[:, None] * q.codebook.double()).sum(-1)                # (n, V)
    by_hand = [row.index(max(row)) for row in cosine.tolist()]
    assert q.nearest(z).tolist() == by_hand and by_hand[-1] == 7
    assert torch.equal(q.nearest(z[None, :, None]), q.nearest(z)[None, :, None])


def test_moved_codes_are_those_of_the_mask():
    q, z, mask = quantizer(), noisy(12, 4, seed=3), torch.arange(12) % 3 == 0
    before = {k: v.clone() for k, v in q.state_dict().items()}
    q.move(mask, z, torch.tensor(5.0))
    for j in range(12):
        moved = j % 3 == 0
        assert torch.equal(q.codebook[j], z[j] if moved else before["codebook"][j])
        assert torch.equal(q.sum[j], 5 * z[j] if moved else before["sum"][j])
        assert q.count[j] == (5 if moved else before["count"][j])


def test_fill_uses_every_code():
    """From useless to used: 40 clusters far from the first codes."""
    q, g = quantizer(codes=32, dim=8, active=False), seeded(6)
    centers = torch.randn(40, 8, generator=g) + 3
    z = centers[torch.randint(40, (2000,), generator=g)] + 0.1 * torch.randn(2000, 8, generator=g)
    z = nnf.normalize(z, dim=-1)

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
    z = nnf.normalize(noisy(400, 4, seed=3), dim=-1)
    assert q.usage(q.nearest(z)) == {"codes_used": 0, "perplexity": 0.0}
    q.fill(z)
    assert q.usage(q.nearest(z))["codes_used"] == 32
    two = z[:2].repeat_interleave(torch.tensor([300, 100]), 0)
    for _ in range(50):
        q.update(two, q.nearest(two))
    perplexity = 0.75 ** -0.75 * 0.25 ** -0.25
    assert q.usage(q.nearest(two)) == {"codes_used": 2, "perplexity": pytest.approx(perplexity)}


def test_crowding():
    """Against a loop over pairs; 0 when all vectors are one; its gradient drives them apart."""
    z = nnf.normalize(noisy(5, 3, 4), dim=-1)
    for i in range(5):
        by_token = []
        for k in range(3):
            squares = [((z[i, k] - z[j, k]) ** 2).sum().item() for j in range(5)]
            by_token.append(math.log(sum(math.exp(-2 * d) for d in squares) / 5))
        assert crowding(z, z)[i].item() == pytest.approx(sum(by_token) / 3, abs=1e-5)
    same = crowding(z[:1].expand(5, -1, -1), z[:1])
    torch.testing.assert_close(same, torch.zeros(5), rtol=0, atol=1e-6)

    x = (torch.ones(5, 1, 4) + 0.1 * noisy(5, 1, 4, seed=1)).requires_grad_()
    optimizer = torch.optim.SGD([x], lr=0.3)
    for _ in range(300):
        unit = nnf.normalize(x, dim=-1)
        loss = crowding(unit, unit.detach()).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    unit = nnf.normalize(x[:, 0], dim=-1)
    cosine = unit @ unit.T
    assert cosine.fill_diagonal_(-1).max() < 0.2 and loss < crowding(z, z).mean()


@torch.no_grad()
def test_spread_begins_when_the_plateau_is_left():
    model = DDT(config(), small_vae())
    c = model.config
    latent, noise = noisy(2, 6, 3, CELLS, CELLS)
    for mse_noise in (1.0, 0.1):
        model.mse_noise.fill_(mse_noise)
        out = model(latent, torch.ones(6), noise)
        spread = c.spread * out["crowding"] if mse_noise < c.noise_below else 0
        expected = out["mse"] + c.commitment * out["commitment"] + spread
        torch.testing.assert_close(out["loss"], expected)
    assert c.spread > 0 and (out["crowding"] < 0).all()


def quantize(world):
    """fill and 20 updates on this rank's shard of 7 samples -> the state."""
    q, g = quantizer(), seeded(7)
    batches = torch.randn(20, 7, 4, 6, generator=g) + torch.randn(6, generator=g)
    with torch.no_grad():
        q.fill(q.vectors(world.shard(batches[0])).flatten(0, 1))
        for x in batches:
            z = q.vectors(world.shard(x))
            q.update(z.flatten(0, 1), q.nearest(z).flatten())
    return q.state_dict()


def crowd(world):
    """Crowding of this rank's shard of 7 samples, and its gradient."""
    x = noisy(7, 3, 4).requires_grad_()
    z = nnf.normalize(world.shard(x), dim=-1)
    result = crowding(z, ddt.all_gather(z))
    gradient = torch.autograd.grad(result.sum(), x)[0]
    return {"crowding": result.detach(), "gradient": world.shard(gradient).contiguous()}


def on_a_rank(rank, folder):
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    world = train.World(rank, 2, torch.device("cpu"))
    state = quantize(world) | crowd(world)
    checkpoint.write_safetensors(folder / f"{rank}.safetensors", state, {})
    dist.destroy_process_group()


def test_codebook_and_crowding_of_two_ranks_are_that_of_one(tmp_path):
    mp.spawn(on_a_rank, (tmp_path,), 2)
    files = [tmp_path / f"{rank}.safetensors" for rank in (0, 1)]
    first, second = (checkpoint.read_safetensors(file) for file in files)
    alone = train.World(0, 1, torch.device("cpu"))
    for name, value in crowd(alone).items():
        torch.testing.assert_close(torch.cat([first[name], second[name]]), value)
    for name, value in quantize(alone).items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dim", [2, 3, 16])
def test_closed_path_goes_round_a_circle(dim):
    """Shuffled points of a circle in any dimension, none in a gap of 40 degrees."""
    degrees = 20 + 320 * torch.rand(256, generator=seeded(1)).double()
    angle = degrees.deg2rad()
    plane = torch.linalg.qr(noisy(dim, 2, seed=2).double()).Q                   # (dim, 2)
    points = torch.stack([angle.cos(), angle.sin()], -1) @ plane.T
    order = ddt.closed_path(points)
    found = degrees[order]
    assert torch.equal(found, degrees.sort(descending=bool(found[0] > found[-1])).values)


def test_closed_path_is_about_the_shortest():
    """A 12 x 12 grid: 144 steps of 1 are the least; the nearest point alone needs 26 % more."""
    rows, columns = torch.meshgrid(torch.arange(12.0), torch.arange(12.0), indexing="ij")
    points = torch.stack([rows, columns], -1).flatten(0, 1)
    points = points[torch.randperm(144, generator=seeded())]
    path = points[ddt.closed_path(points)]
    assert len(path.unique(dim=0)) == 144
    assert (path - path.roll(-1, 0)).norm(dim=-1).sum() < 1.1 * 144


def test_numbering_changes_no_reconstruction(tokenizer):
    codes = tokenizer.encode(frames())
    decoded, quantizer = tokenizer.decode(codes, generator=seeded()), tokenizer.quantizer
    tied = torch.cat([quantizer.codebook, quantizer.count[:, None], quantizer.sum], 1)
    quantizer.number()
    renumbered = tokenizer.encode(frames())
    assert not torch.equal(renumbered, codes)
    assert torch.equal(tokenizer.decode(renumbered, generator=seeded()), decoded)
    rows = torch.cat([quantizer.codebook, quantizer.count[:, None], quantizer.sum], 1)
    assert torch.equal(rows.unique(dim=0), tied.unique(dim=0))          # what belongs together
    steps = (quantizer.codebook - quantizer.codebook.roll(-1, 0)).norm(dim=-1)
    assert steps.argmax() == 255                            # from the last code to the first


# ------------------------------------------------------------------ the flow


class Oracle(nn.Module):
    """A decoder that returns the clean latent and keeps its inputs."""

    def __init__(self, clean):
        super().__init__()
        self.clean, self.inputs = clean, []

    def forward(self, x, t, tokens, k):
        self.inputs.append((x, t, tokens, k))
        return self.clean


def per_pixel(x):
    return x[:, None, None, None]


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 50])
@torch.no_grad()
def test_euler_steps_recover_what_the_decoder_predicts(tokenizer, steps):
    clean, noise = noisy(2, 4, 3, CELLS, CELLS)
    tokenizer.decoder = Oracle(clean)
    assert torch.equal(tokenizer.sample(torch.zeros(4, K, 16), noise, steps), clean)
    assert len(tokenizer.decoder.inputs) == steps
    visible = []
    for x, t, _, k in tokenizer.decoder.inputs:             # on the line from noise to clean
        expected = per_pixel(t) * noise + (1 - per_pixel(t)) * clean
        torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-5)
        visible.append(k[0].item())
    assert visible == sorted(visible, reverse=True) and visible[0] == K


@torch.no_grad()
def test_one_step_is_one_call(tokenizer):
    tokens, noise = noisy(4, K, 16), noisy(4, 3, CELLS, CELLS, seed=1)
    expected = tokenizer.decoder(noise, torch.ones(4), tokens, torch.full((4,), K))
    torch.testing.assert_close(tokenizer.sample(tokens, noise, 1), expected, rtol=1e-5, atol=1e-4)
    assert not torch.allclose(tokenizer.sample(tokens, noise, 4), expected)


def test_training_loss(tokenizer):
    """The decoder predicts x_0 from x_t = t eps + (1 - t) x_0 and k(t) tokens."""
    clean, noise = noisy(2, 4, 3, CELLS, CELLS)
    u = torch.tensor([0.0, 0.3, 0.8, 1.0])
    offset = torch.tensor([0.0, 1.0, 2.0, 3.0])
    tokenizer.decoder = Oracle(clean + per_pixel(offset))
    out = tokenizer(clean, u, noise)
    (x, t, tokens, k), = tokenizer.decoder.inputs
    assert torch.equal(k, torch.tensor([0, 2, 4, 5])) and torch.equal(t, tokenizer.times(u)[0])
    assert torch.equal(x[0], clean[0]) and torch.equal(x[3], noise[3])
    torch.testing.assert_close(x[1], t[1] * noise[1] + (1 - t[1]) * clean[1])
    torch.testing.assert_close(tokens, tokenizer.quantizer.codebook[out["codes"]])
    torch.testing.assert_close(out["mse"], offset.square())
    loss = offset.square() + tokenizer.config.commitment * out["commitment"]
    torch.testing.assert_close(out["loss"], loss)


class MixtureOracle(nn.Module):
    """
    The best decoder for cells that are each drawn from a mixture of two Gaussians: E[x_0 | x_t], in
    closed form.
    """
    weight = torch.tensor([0.3, 0.7])
    mean = torch.tensor([-1.5, 1.0])
    std = torch.tensor([0.2, 0.4])

    def forward(self, x, t, tokens, k):
        x, t = x[..., None], per_pixel(t)[..., None]
        variance = (1 - t) ** 2 * self.std ** 2 + t ** 2    # of x_t, given the component
        off = x - (1 - t) * self.mean
        share = (self.weight.log() - variance.log() / 2 - off ** 2 / (2 * variance)).softmax(-1)
        x_0 = self.mean + (1 - t) * self.std ** 2 / variance * off
        return (share * x_0).sum(-1)


@torch.no_grad()
def test_euler_steps_sample_a_mixture(tokenizer):
    """500 steps draw from the distribution; one gives its mean."""
    tokenizer.decoder = oracle = MixtureOracle()
    tokens, noise = torch.zeros(4, K, 16), noisy(4, 10, 40, 40)
    mean = (oracle.weight * oracle.mean).sum().item()
    second_moment = (oracle.weight * (oracle.std ** 2 + oracle.mean ** 2)).sum().item()
    one_step = tokenizer.sample(tokens, noise, 1)
    torch.testing.assert_close(one_step, torch.full_like(noise, mean))
    x = tokenizer.sample(tokens, noise, 500)
    assert x.mean() == pytest.approx(mean, abs=0.02)
    assert x.var() == pytest.approx(second_moment - mean ** 2, rel=0.02)
    left = x < -0.4
    assert left.float().mean() == pytest.approx(0.3, abs=0.02)
    assert x[left].std() == pytest.approx(0.2, rel=0.1)
    assert x[~left].std() == pytest.approx(0.4, rel=0.1)


def test_the_loss_is_that_of_the_velocity_times_t_squared(tokenizer):
    """
    |x^_0 - x_0|^2 = t^2 |v^ - v|^2: the flow's velocity is v = eps - x_0, thus
    v^ = (x_t - x^_0) / t.
    """
    clean, noise, guess = noisy(3, 4, 3, CELLS, CELLS)
    tokenizer.decoder = Oracle(guess)
    mse = tokenizer(clean, torch.tensor([0.1, 0.3, 0.8, 1.0]), noise)["mse"]
    (x_t, t, _, _), = tokenizer.decoder.inputs
    t = per_pixel(t)
    error = ((x_t - guess) / t - (noise - clean)).square()
    torch.testing.assert_close(mse, (t ** 2 * error).mean((1, 2, 3)))


# ------------------------------------------------------------------ presets


def stream_parameters(width, inner, condition=0, last=False):
    attention = width * 3 * inner + 3 * inner
    mlp = norms = 0
    if not last:
        attention += inner * width + width
        mlp = 2 * 4 * width * width + 5 * width
    if condition:
        norms = (2 if last else 6) * width * (condition + 1)
    else:
        norms = (2 if last else 4) * width
    return attention + mlp + norms


def test_latents_are_encoded_once(tokenizer, monkeypatch):
    """As many as `frames`, the same in each start; all frames: none are kept."""
    world, encoded = train.World(0, 1, torch.device("cpu")), []
    latent = DDT.latent
    monkeypatch.setattr(DDT, "latent", lambda self, x: encoded.append(len(x)) or latent(self, x))
    c = config(clips=4, frames=100)
    latents, again = (ddt.Latents(tokenizer, c, world) for _ in range(2))
    assert len(latents) == 100 and sum(encoded) == 200
    assert torch.equal(latents.kept, again.kept)
    other = ddt.Latents(tokenizer, config(clips=4, frames=100, seed=1), world)
    assert not torch.equal(latents.kept, other.kept)

    encoded.clear()
    every = ddt.Latents(tokenizer, config(clips=4, frames=128), world)
    assert len(every) == 128 and every.kept is None and not encoded
    whole = every[torch.arange(128)].flatten(1)
    kept = latents[torch.arange(100)].flatten(1)
    distance = (kept[:, None] - whole).norm(dim=-1)         # (100, 128)
    assert distance.amin(1).max() < 1e-4                    # each is the latent of a frame,
    assert len(distance.argmin(1).unique()) == 100          # and no frame comes twice


@pytest.mark.parametrize("preset, millions, patches", [
    ("tiny", (0.490, 1.655), 16),
    ("small", (8.244, 30.578), 64),
    ("paper", (12.489, 111.101), 256)], ids=["tiny", "small", "paper"])
def test_presets_have_the_parameters_the_comment_says(preset, millions, patches):
    c = Config(**{"preset": preset} | PRESETS[preset])
    with torch.device("meta"):
        if preset == "paper":                               # SD3's VAE
            autoencoder = VAE([128, 256, 512, 512], 16, layers_per_block=2)
        else:
            autoencoder = vae.small_vae(vae.Config(**vae.PRESETS[preset]))
        model = DDT(c, autoencoder)
    encoder, decoder = (sum(p.numel() for p in part.parameters())
                        for part in (model.encoder, model.decoder))
    assert (round(encoder / 1e6, 3), round(decoder / 1e6, 3)) == millions
    assert len(model.encoder.position) == len(model.decoder.position) == patches

    # by hand: I and Q are the widths of the encoder's streams, D of the decoder's
    patch = autoencoder.config["latent_channels"] * c.patch ** 2
    I, Q, D = c.image_width, c.query_width, c.width
    ends = (patch + 1) * I + c.queries * Q + 2 * Q
    latent = (c.encoder_layers - 1) * stream_parameters(I, Q) + stream_parameters(I, Q, last=True)
    queries = c.encoder_layers * stream_parameters(Q, Q)
    assert encoder == ends + latent + queries

    ends = (patch + 1) * D + c.queries * (c.code_dim + 1) * D + c.queries * D
    ends += 257 * D + (D + 1) * D + (D + 1) * 2 * D + (D + 1) * patch
    streams = (2 * c.layers - 1) * stream_parameters(D, D, D)
    assert decoder == ends + streams + stream_parameters(D, D, D, last=True)


# ------------------------------------------------------------------ frames <-> codes


def test_encode_and_decode(tokenizer):
    codes = tokenizer.encode(frames())
    assert codes.shape == (6, K) and codes.dtype == torch.int64
    assert codes.min() >= 0 and codes.max() < 256
    assert len(codes.unique(dim=0)) == 6
    for steps in (1, 3):
        decoded = tokenizer.decode(codes, steps, seeded(1))
        assert decoded.shape == (6, 3, SIZE, SIZE) and decoded.dtype == torch.float32
        assert decoded.min() >= 0 and decoded.max() <= 1 and decoded.std() > 0.01
        assert torch.equal(decoded, tokenizer.decode(codes, steps, seeded(1)))
        assert not torch.equal(decoded, tokenizer.decode(codes, steps, seeded(2)))
        other_codes = (codes + 1) % 256
        assert not torch.equal(decoded, tokenizer.decode(other_codes, steps, seeded(1)))
    assert torch.equal(codes, tokenizer.encode(frames()))
    assert not tokenizer.decode(codes).requires_grad


@pytest.mark.parametrize("order", ["forward", "reverse"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_codes_of_any_integer_type(tokenizer, dtype, order):
    tokenizer.config.order = order
    codes = tokenizer.encode(frames())
    assert codes.max() > 127                                # where a signed byte would end
    decoded = tokenizer.decode(codes.to(dtype), generator=seeded())
    assert torch.equal(decoded, tokenizer.decode(codes, generator=seeded()))


def test_a_reconstruction_does_not_depend_on_the_others_of_its_batch(tokenizer):
    clips = torch.rand(5, 7, 3, SIZE, SIZE, generator=seeded(4))                # (B, F, 3, H, W)
    for options in ({}, {"steps": 3}):
        rebuild = ddt.reconstruction(tokenizer, **options)
        whole = rebuild(clips)
        assert whole.shape == clips.shape
        for size in (1, 2):
            parts = torch.cat([rebuild(part) for part in clips.split(size)])
            torch.testing.assert_close(parts, whole, rtol=0, atol=1e-4)
        torch.testing.assert_close(rebuild(clips.flip(0)), whole.flip(0), rtol=0, atol=1e-4)


def test_generators_share_the_rows(tokenizer):
    codes = tokenizer.encode(frames())
    both = tokenizer.decode(codes, generator=[seeded(1), seeded(2)])
    for rows, seed in ((slice(0, 3), 1), (slice(3, 6), 2)):
        alone = tokenizer.decode(codes[rows], generator=seeded(seed))
        torch.testing.assert_close(both[rows], alone, rtol=0, atol=1e-5)
    for n in (0, 4):
        with pytest.raises(ValueError, match=f"6 frames cannot be shared by {n}"):
            tokenizer.decode(codes, generator=[seeded()] * n)


def test_order_of_codes(tokenizer):
    """In reverse order the same codes are returned last first, and decode to the same pictures."""
    codes = tokenizer.encode(frames())
    decoded = tokenizer.decode(codes, generator=seeded())
    tokenizer.config.order = "reverse"
    reversed_codes = tokenizer.encode(frames())
    assert torch.equal(reversed_codes, codes.flip(1)) and not torch.equal(reversed_codes, codes)
    assert torch.equal(tokenizer.decode(reversed_codes, generator=seeded()), decoded)


def test_the_vae_stays_as_it_is(tokenizer):
    tokenizer.train()
    assert not tokenizer.vae.training and tokenizer.quantizer.training
    assert not any(p.requires_grad for p in tokenizer.vae.parameters())
    for part in (tokenizer.encoder, tokenizer.decoder):
        assert all(p.requires_grad for p in part.parameters())


# ------------------------------------------------------------------ bad input: ValueError


@pytest.mark.parametrize("shape", [
    (3, SIZE, SIZE), (2, 1, SIZE, SIZE), (2, 3, SIZE, 2 * SIZE), (2, 3, 2 * SIZE, 2 * SIZE),
    (1, 2, 3, SIZE, SIZE)])
def test_frames_of_another_shape(tokenizer, shape):
    with pytest.raises(ValueError) as error:
        tokenizer.encode(torch.zeros(shape))
    assert f"frames (B, 3, {SIZE}, {SIZE}); got {shape}" in str(error.value)


@pytest.mark.parametrize("spoil, culprit", [
    (lambda x: 2 * x - 1, "[0, 1]; these are from -0.9"), (lambda x: 255 * x, "[0, 1]; these are"),
    (lambda x: x * float("nan"), "NaN"), (lambda x: x / 0, "infinity"),
    (lambda x: (255 * x).byte(), "uint8: give a tensor of floats"), (lambda x: x.long(), "int64")])
def test_frames_that_are_none(tokenizer, spoil, culprit):
    with pytest.raises(ValueError) as error:
        tokenizer.encode(spoil(frames()))
    assert culprit in str(error.value)


def test_frames_of_any_float_type(tokenizer):
    assert torch.equal(tokenizer.encode(frames().double()), tokenizer.encode(frames()))
    assert tokenizer.encode(frames().half()).shape == (6, K)


@pytest.mark.parametrize("codes, culprit", [
    (torch.zeros(K), "(5,)"), (torch.zeros(2, K + 1), "(2, 6)"), (torch.zeros(2, K - 1), "(2, 4)"),
    (torch.zeros(1, 2, K), "(1, 2, 5)"), (torch.zeros(0, K), "(0, 5)"),
    (torch.full((2, K), 256), "256 to 256"), (torch.full((2, K), -1), "-1 to -1")])
def test_codes_that_are_none(tokenizer, codes, culprit):
    with pytest.raises(ValueError) as error:
        tokenizer.decode(codes.long())
    wanted = "codes must be in [0, 256)" if "to" in culprit else f"codes must be (B, {K})"
    assert wanted in str(error.value) and f"got {culprit}" in str(error.value)


def test_no_decoder_steps(tokenizer):
    with pytest.raises(ValueError, match="steps = 0: at least one call of the decoder"):
        tokenizer.decode(torch.zeros(1, K).long(), steps=0)


def test_a_size_that_does_not_divide(tmp_path):
    with pytest.raises(ValueError, match="size 18 must be a multiple of 4 .VAE 2 x patch 2."):
        DDT(config(size=18), small_vae())

    # the command makes one line of it, and leaves no model
    small_vae().save(tmp_path / "vae")
    with pytest.raises(UserError, match="--size 18 must be a multiple of 4 "):
        ddt.main(["--size", "18", "--out", str(tmp_path)])
    assert not list(tmp_path.rglob("model.safetensors"))


# ------------------------------------------------------------------ restarts


def ten_steps(folder, **other) -> tuple[dict, list[dict]]:
    """Trains a tokenizer in `folder` -> its weights, and the log without its times."""
    world = train.World(0, 1, torch.device("cpu"))
    fields = dict(steps=10, batch=4, clips=4, frames=100, save_every=1, quantize_at=0.5, warmup=1)
    c = config(out=str(folder), **fields | other)
    if not (folder / "vae").exists():
        small_vae().save(folder / "vae")
    model = ddt.train_ddt(c, VAE.load(folder / "vae"), world)
    lines = (folder / "ddt" / "log.jsonl").read_text().splitlines()
    log = [{k: v for k, v in json.loads(line).items() if k != "step_time"} for line in lines]
    return model.state_dict(), log


def same(a, b) -> bool:
    """Whether two answers of ten_steps are equal, but for the number of restarts in the log."""
    logs = [[{k: v for k, v in line.items() if k != "restarts"} for line in log]
            for _, log in (a, b)]
    equal = all(torch.equal(a[0][name], b[0][name]) for name in a[0])
    return a[0].keys() == b[0].keys() and equal and logs[0] == logs[1]


@pytest.fixture
def steps(monkeypatch) -> list:
    """Has a new element after every step of training."""
    done, step = [], train.Run.step
    monkeypatch.setattr(train.Run, "step", lambda *args: done.append(1) or step(*args))
    return done


def restarted(monkeypatch, folder, restarts: int, **fields):
    """What ten_steps gives if the first weights are those after so many restarts."""
    new = ddt.new_tokenizer
    with monkeypatch.context() as patch:
        patch.setattr(ddt, "new_tokenizer", lambda c, autoencoder: new(c, autoencoder, restarts))
        return ten_steps(folder, **fields)


def test_good_weights_are_trained_to_the_end(tmp_path, steps):
    trained = ten_steps(tmp_path / "a", restart_at=4, restart_above=100.0)
    assert len(steps) == 10 and same(trained, ten_steps(tmp_path / "b"))
    assert trained[1][-1]["restarts"] == 0


def test_restarts_until_the_error_is_small(tmp_path, monkeypatch, capsys, steps):
    """The training that goes on is that of its weights alone; step and error are as configured."""
    candidates = [restarted(monkeypatch, tmp_path / str(i), i, seed=1) for i in range(4)]
    errors = [log[3]["mse_noise"] for _, log in candidates]                 # after four steps
    best = min(range(4), key=errors.__getitem__)
    assert best > 1, "of no use: with this seed, there is at most one restart"
    threshold = sum(sorted(errors)[:2]) / 2
    steps.clear()
    capsys.readouterr()
    trained = ten_steps(tmp_path / "a", restart_at=4, restart_above=threshold, seed=1)
    assert len(steps) == 4 * best + 10 and same(trained, candidates[best])
    assert [line["restarts"] for line in trained[1]] == [best] * 10
    printed = capsys.readouterr().out
    assert [f"restart {i} of at most 9" in printed for i in range(1, 10)] == \
        [i <= best for i in range(1, 10)]
    assert f"step 4: the error at pure noise is {errors[0]:.2f}" in printed


def test_the_last_restart_goes_on(tmp_path, monkeypatch, steps):
    monkeypatch.setattr(ddt, "MAX_RESTARTS", 2)
    trained = ten_steps(tmp_path / "a", restart_at=4, restart_above=0.0)
    assert len(steps) == 18 and trained[1][-1]["restarts"] == 2
    assert same(trained, restarted(monkeypatch, tmp_path / "b", 2))
    loaded = DDT.load(tmp_path / "a" / "ddt").state_dict()
    assert loaded.keys() == trained[0].keys()
    assert all(torch.equal(loaded[name], x) for name, x in trained[0].items())


def test_which_presets_restart():
    def at(*argv):
        return train.parse(Config, PRESETS, list(argv)).restart_at

    assert at() == 600 and at("--restart_at", "0") == 0
    assert not any(at("--scenario", name) for name in ("parabola", "collision", "all"))
    assert not any(at("--preset", name) for name in ("small", "paper"))


def test_no_restart_once_it_quantizes(tmp_path, steps):
    ten_steps(tmp_path, restart_at=4, restart_above=0.0, quantize_at=0.3)
    assert len(steps) == 10


def test_restart_with_micro_batches(tmp_path, monkeypatch, steps):
    monkeypatch.setattr(ddt, "MAX_RESTARTS", 1)
    _, log = ten_steps(tmp_path / "a", restart_at=4, restart_above=0.0, micro_batch=3)
    _, expected = ten_steps(tmp_path / "b", restart_at=4, restart_above=0.0)
    assert len(steps) == 28
    for line, other in zip(log[:5], expected[:5]):          # before it quantizes
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-3)


def test_weights_are_a_function_of_seed_and_restarts():
    def queries(seed, restarts):
        return ddt.new_tokenizer(config(seed=seed), small_vae(), restarts).encoder.queries

    drawn = [queries(seed, restarts) for seed in (0, 1) for restarts in range(3)]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(drawn, 2))
    assert torch.equal(queries(1, 2), drawn[-1])


@pytest.mark.parametrize("save_every", [1, 3])
@pytest.mark.parametrize("at", [1, 5, 7, 8, 9, 11, 15])
def test_killed_before_and_after_restarts(tmp_path, monkeypatch, steps, at, save_every):
    """
    Killed in the `at`-th step of 4 + 4 + 10, while an older model is there: the same end, and only
    the steps after the last checkpoint are done again.
    """
    monkeypatch.setattr(ddt, "MAX_RESTARTS", 2)
    bad = dict(restart_at=4, restart_above=0.0, save_every=save_every)
    expected = ten_steps(tmp_path / "a", **bad)
    ten_steps(tmp_path / "b", seed=1)                       # the older model

    count, killed = train.Run.step, []

    def kill(self, loss):
        killed.append(1)
        if len(killed) == at:
            raise ZeroDivisionError
        return count(self, loss)

    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(train.Run, "step", kill)
        ten_steps(tmp_path / "b", fresh=True, **bad)
    if at > save_every:                                     # else nothing was saved yet
        assert not checkpoint.has_model(tmp_path / "b" / "ddt")
    steps.clear()
    again = ten_steps(tmp_path / "b", **bad)
    assert again[0].keys() == expected[0].keys() and again[1] == expected[1]
    assert all(torch.equal(again[0][name], x) for name, x in expected[0].items())
    done = 4 * ((at - 1) // 4) if at <= 8 else 8            # in runs before the one killed
    own = (at - 1 - done) // save_every * save_every        # steps of that one in a checkpoint
    before = 4 // save_every * save_every if done and not own else 0    # or of the one before
    lost = at - 1 - done - own + (4 - before if before else 0)
    assert len(steps) == 18 - (at - 1) + lost


# ------------------------------------------------------------------ files


def test_save_and_load(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "ddt")
    loaded = DDT.load(tmp_path / "ddt")
    assert loaded.config == tokenizer.config and loaded.vae.config == tokenizer.vae.config
    assert loaded.quantizer.active and not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    codes = tokenizer.encode(frames())
    assert torch.equal(loaded.encode(frames()), codes)
    for steps in (1, 4):
        decoded = tokenizer.decode(codes, steps, seeded())
        assert torch.equal(loaded.decode(codes, steps, seeded()), decoded)


@pytest.mark.parametrize("part", [
    "encoder.queries", "decoder.token_position", "quantizer.codebook"])
def test_a_tokenizer_trained_anew_is_another(tmp_path, part):
    """
    Whichever part has changed, however large the VAE: later stages need the codes as they were.
    """
    model = DDT(config(), small_vae(block_out_channels=[48, 96]))
    world = train.World(0, 1, torch.device("cpu"))
    folder, weights = tmp_path / "sft", tmp_path / "ddt" / ddt.MODEL
    train_config = ddt.Config()
    folder.mkdir()
    (folder / "model.safetensors").touch()
    model.save(tmp_path / "ddt")
    sums = checkpoint.start_stage(folder, train_config, world, ddt=weights)
    checkpoint.write_json(folder / "provenance.json", sums)
    checkpoint.check_provenance(folder, ddt=weights)
    model.state_dict()[part].mul_(-1)
    model.save(tmp_path / "ddt")
    for use in (lambda: checkpoint.check_provenance(folder, ddt=weights),
                lambda: checkpoint.start_stage(folder, train_config, world, ddt=weights)):
        with pytest.raises(UserError, match="another ddt"):
            use()


def edit(folder, part, **fields):
    path = folder / "config.json"
    raw = json.loads(path.read_text())
    raw[part] |= fields
    path.write_text(json.dumps(raw))


def shorten(path, n):
    os.truncate(path, path.stat().st_size - n)


DAMAGES = {                                 # what is done to the folder, culprit
    "no config": (lambda f: (f / "config.json").unlink(), "config.json"),
    "config cut": (lambda f: os.truncate(f / "config.json", 20), "config.json"),
    "config empty": (lambda f: (f / "config.json").write_text("{}"), "config.json"),
    "unknown field": (lambda f: edit(f, "ddt", no_such_field=1), "config.json"),
    "more layers": (lambda f: edit(f, "ddt", layers=3), "decoder.image_blocks.2"),
    "another size": (lambda f: edit(f, "ddt", size=18), "config.json"),
    "another VAE": (lambda f: edit(f, "vae", latent_channels=4), "vae.encoder.conv_out"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors"),
    "weights cut": (lambda f: os.truncate(f / "model.safetensors", 1000), "model.safetensors"),
    "a byte short": (lambda f: shorten(f / "model.safetensors", 1), "model.safetensors"),
}


@pytest.mark.parametrize("damage, culprit", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_tokenizer_is_named(tokenizer, tmp_path, damage, culprit):
    tokenizer.save(tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError) as error:
        DDT.load(tmp_path)
    assert culprit in str(error.value) and str(tmp_path) in str(error.value)


def test_weights_that_are_not_finite(tokenizer, tmp_path):
    """They are not written, and not read if something else wrote them."""
    tokenizer.save(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["decoder.token_position"][0, 0] = math.nan
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="decoder.token_position"):
        DDT.load(tmp_path)
    tokenizer.decoder.token_position.data[0, 0] = math.nan
    with pytest.raises(UserError, match="decoder.token_position"):
        tokenizer.save(tmp_path)


# ------------------------------------------------------------------ the command


@pytest.mark.parametrize("argv, culprit", [
    (["--prefix", "none"], "--prefix none: choose growing or all"),
    (["--order", "random"], "--order random: choose forward or reverse"),
    (["--code_dim", "2"], "--code_dim 2: at least 3"), (["--shift", "0"], "--shift 0"),
    (["--quantize_at", "1"], "--quantize_at 1"), (["--query_width", "30"], "--query_width 30"),
    (["--width", "24"], "--width 24"), (["--image_width", "18"], "--image_width 18"),
    (["--scenario", "rain"], "--scenario 'rain'"), (["--seed", "1000003"], "held-out clips"),
    (["--eval_clips", "1"], "--eval_clips 1: a standard"), (["--size", "1000000000"], "--size"),
    (["--clips", "1000000000000"], "--clips"), (["--batch", "1000000000"], "--batch"),
    (["--queries", "1000"], "--queries"), (["--patch", "100"], "--patch"),
    (["--encoder_layers", "1000000"], "--encoder_layers"), (["--layers", "1000000"], "--layers"),
    (["--width", "1048576"], "--width"), (["--shift", "1e9"], "--shift"),
    (["--pure_noise", "1.5"], "--pure_noise 1.5: must be from 0 to 1"),
    (["--token_noise", "1e9"], "--token_noise"), (["--commitment", "1e9"], "--commitment"),
    (["--spread", "1e9"], "--spread"), (["--noise_below", "1e9"], "--noise_below"),
    (["--restart_above", "1e9"], "--restart_above"),
    (["--pure_noise", "0"], "--pure_noise 0")])
def test_bad_flags(argv, culprit, tmp_path):
    with pytest.raises(UserError, match=culprit):
        ddt.main([*argv, "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_fresh_deletes_one_stage(tmp_path, monkeypatch, capsys):
    """`ddt.py --fresh` trains the tokenizer again and no VAE, `vae.py --fresh` only the VAE."""
    monkeypatch.setattr(evaluate, "SPLITS", ("iid",))
    both = ["--out", str(tmp_path), "--steps", "2", "--batch", "4", "--clips", "2", "--size", "16",
            "--eval_clips", "2"]
    of_ddt = [*both, "--width", "16", "--heads", "2", "--query_width", "16", "--image_width", "16"]
    weights = {"vae": tmp_path / "vae" / vae.WEIGHTS, "ddt": tmp_path / "ddt" / ddt.MODEL}

    def trained():
        return {stage: path.stat().st_mtime_ns for stage, path in weights.items()}

    vae.main(both)
    ddt.main(of_ddt)
    first = trained()
    ddt.main(of_ddt)
    assert trained() == first
    ddt.main([*of_ddt, "--fresh"])
    second = trained()
    assert second["vae"] == first["vae"] and second["ddt"] > first["ddt"]
    vae.main([*both, "--fresh", "--seed", "1"])
    third = trained()
    assert third["vae"] > second["vae"] and third["ddt"] == second["ddt"]
    capsys.readouterr()
    ddt.main([*of_ddt, "--fresh"])                          # on the new VAE, whatever its seed
    printed = capsys.readouterr().out
    assert "encoder" in printed and "VAE: " not in printed
    assert trained()["vae"] == third["vae"] and trained()["ddt"] > third["ddt"]
