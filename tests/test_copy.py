"""
Each part of a model can be copied out of this repository alone.

COPIES lists the names that must come along. A test copies their source into an empty module, with
the third-party imports of their files and nothing of ours, and compares the copy with the original.

    pytest tests/test_copy.py

Takes 2 seconds on one CPU core.
"""
import ast
import builtins
import importlib
import inspect
import symtable
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lm import LLAMA31_ROPE

ROOT = Path(__file__).parents[1]
OURS = {path.stem for path in ROOT.glob("*.py")} | {"experiments"}
COPIES = {                                  # part: the names that are copied, itself the last
    "EMAVectorQuantizer": "ddt.all_reduce ddt.all_gather ddt.closed_path "
                          "ddt.EMAVectorQuantizer",
    "QFormer": "ddt.sincos ddt.sincos_2d ddt.patchify ddt.Modulation ddt.Stream ddt.QFormer",
    "MMDiT": "ddt.sincos ddt.sincos_2d ddt.patchify ddt.unpatchify ddt.modulate ddt.TokenLinear "
             "ddt.Modulation ddt.Stream ddt.MMDiT",
    "VAE": "vae.ResnetBlock vae.AttentionBlock vae.Downsample vae.Upsample vae.DownBlock "
           "vae.UpBlock vae.MidBlock vae.Encoder vae.Decoder vae.VAE",
    "Llama": "lm.LLAMA31_ROPE lm.is_positive lm.LlamaConfig lm.rope_frequencies lm.rope_table "
             "lm.rotate lm.Cache lm.RMSNorm lm.attend lm.Attention lm.MLP lm.Block "
             "lm.call_block lm.compiled lm.project lm.more_rows lm.Llama",
    "generate": "lm.LLAMA31_ROPE lm.is_positive lm.LlamaConfig lm.rope_frequencies lm.rope_table "
                "lm.rotate lm.Cache lm.RMSNorm lm.attend lm.Attention lm.MLP lm.Block "
                "lm.call_block lm.compiled lm.project lm.more_rows lm.Llama lm.truncate "
                "lm.gumbel_noise lm.choose lm.sample lm.check_length lm.capture lm.generate",
    "AdamW": "train.Bucket train.group_parameters train.AdamW",
    "number_sequences": "prior.PLACES prior.number_sequences",
    "advantages": "grpo.REWARD_NOISE grpo.advantages",
    "grpo_loss": "grpo.kl_divergence lm.logprobs grpo.grpo_loss",
}
# the methods that read and write folders (save, load) stay behind: they alone use these names
LEFT_BEHIND = {"VAE": {"save_folder", "load_vae", "WEIGHTS"}}


def source_of(name: str) -> str:
    module, name = name.split(".")
    value = getattr(importlib.import_module(module), name)
    return inspect.getsource(value) if callable(value) else f"{name} = {value!r}\n"


def imports_of(module: str) -> list[str]:
    """A file's imports of the standard library, torch, einops and safetensors."""
    allowed = sys.stdlib_module_names | {"torch", "einops", "safetensors"}
    lines = []
    for node in ast.parse((ROOT / f"{module}.py").read_text()).body:
        if isinstance(node, ast.Import):
            lines += [ast.unparse(ast.Import([name])) for name in node.names
                      if name.name.split(".")[0] in allowed - OURS]
        elif isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in allowed - OURS:
            lines.append(ast.unparse(node))
    return lines


def copy_of(part: str) -> ModuleType:
    """An empty module that the part's source and that of its helpers has been written into."""
    names = COPIES[part].split()
    files = dict.fromkeys(name.split(".")[0] for name in names)
    header = [line for file in files for line in imports_of(file)]
    copied = ModuleType("copied")
    exec("\n".join(header), copied.__dict__)
    exec("\n\n".join(map(source_of, names)), copied.__dict__)
    return copied


def global_names(table: symtable.SymbolTable) -> set[str]:
    """The names that source uses without defining them in the same function or class."""
    names = {symbol.get_name() for symbol in table.get_symbols()
             if symbol.is_referenced() and (symbol.is_global() or table.get_type() == "module")}
    return names.union(*map(global_names, table.get_children()))


@pytest.mark.parametrize("part", COPIES)
def test_it_uses_nothing_of_ours(part):
    """Also in the branches that no test runs, every name is the part's own or a third party's."""
    source = "\n\n".join(map(source_of, COPIES[part].split()))
    # Llama's load and save import weights.py where they run
    imported = our_imports(ast.walk(ast.parse(source)))
    assert imported == ({"weights"} if "lm.Llama" in COPIES[part].split() else set())
    used = global_names(symtable.symtable(source, part, "exec"))
    unknown = used - copy_of(part).__dict__.keys() - vars(builtins).keys()
    assert unknown == LEFT_BEHIND.get(part, set())
    assert not unknown & OURS


@pytest.mark.parametrize("part", COPIES)
def test_every_helper_is_needed(part):
    """The lists name no more than what must come along."""
    *helpers, last = COPIES[part].split()
    needed = [last]
    for name in needed:                                     # grows while it is walked through
        used = global_names(symtable.symtable(source_of(name), part, "exec"))
        needed += [x for x in helpers if x.split(".")[1] in used and x not in needed]
    assert set(needed) == {*helpers, last}


def our_imports(nodes) -> set[str]:
    roots = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            roots |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            roots.add(node.module.split(".")[0])
    return roots & OURS


def test_what_files_need():
    """At their head; a function may import more, such as `main` the pictures."""
    trees = {path.stem: ast.parse(path.read_text()) for path in ROOT.glob("*.py")}
    needs = {name: our_imports(tree.body) for name, tree in trees.items()}
    for alone in ("sim", "lm", "checkpoint"):
        assert not needs[alone]
    assert needs["weights"] == {"lm"} and needs["text"] == {"lm", "weights"}
    assert needs["reward"] == {"sim"}
    users = {name for name, tree in trees.items() if "experiments" in our_imports(ast.walk(tree))}
    assert users == {"sft"}


# ------------------------------------------------------------------ copy and original, same results


def noisy(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def randomized(model: nn.Module) -> nn.Module:
    """The parts that start at zero would hide what is computed before them."""
    torch.manual_seed(1)
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    return model


def learn(model: nn.Module, output: torch.Tensor) -> list[torch.Tensor]:
    """-> output, initial weights, gradients."""
    gradients = torch.autograd.grad(output.square().mean(), list(model.parameters()),
                                    allow_unused=True)
    return [output.detach(), *model.state_dict().values(),
            *(g for g in gradients if g is not None)]


def run_quantizer(module, folder):
    torch.manual_seed(0)
    quantizer = module.EMAVectorQuantizer(project=nn.Linear(6, 4), codes=8, dim=4, decay=0.9)
    quantizer.fill(quantizer.vectors(noisy(30, 5, 6)).flatten(0, 1).detach())
    results = []
    for seed in range(5):
        out, codes, commitment, z = quantizer(x=noisy(10, 5, 6, seed=seed))
        quantizer.update(z=z.flatten(0, 1).detach(), codes=codes.flatten())
        results += [out, codes, commitment, z]
    usage = quantizer.usage(codes.flatten())
    quantizer.number()
    return [*results, *quantizer.state_dict().values(), torch.tensor([*usage.values()])]


def run_q_former(module, folder):
    torch.manual_seed(0)
    model = module.QFormer(channels=3, side=8, queries=5, patch=2, image_width=16, query_width=32,
                           layers=2, heads=2)
    return learn(model, model(latent=noisy(4, 3, 8, 8)))


def run_mmdit(module, folder):
    torch.manual_seed(0)
    model = module.MMDiT(channels=3, side=8, n_tokens=5, code_dim=4, patch=2, width=32, layers=2,
                         heads=2)
    latent, t, tokens = noisy(4, 3, 8, 8), torch.rand(4), noisy(4, 5, 4, seed=1)
    k = torch.tensor([0, 2, 5, 1])
    initial = [*model.state_dict().values()]
    model = randomized(model)
    return [*initial, *learn(model, model(latent=latent, t=t, tokens=tokens, k=k))]


def run_vae(module, folder):
    torch.manual_seed(0)
    model = module.VAE(block_out_channels=[8, 16], latent_channels=3, layers_per_block=1,
                       norm_num_groups=4, scaling_factor=0.5, shift_factor=3.0)
    images = noisy(2, 3, 16, 16)
    latents = model.encode(images)
    out, mean, logvar = model(images=images, noise=noisy(2, 3, 8, 8))
    assert model.shrink == 2
    return [latents, model.decode(latents), mean, logvar, *learn(model, out)]


def small_llama(module):
    torch.manual_seed(0)
    config = module.LlamaConfig(
        vocab_size=20, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, rope_scaling=LLAMA31_ROPE)
    model = randomized(module.Llama(config))
    model.extend(12)
    return model


def run_llama(module, folder):
    model = small_llama(module)
    ids = torch.arange(18).view(2, 9) % 32
    hidden = model(ids)
    cache = module.Cache(model.config, batch=2, capacity=9)
    with torch.no_grad():
        stepwise = torch.cat([model(ids[:, :4], cache), model(ids[:, 4:], cache)], 1)
    return [hidden, stepwise, model.logits(hidden), *learn(model, model.visual_logits(hidden))]


def run_generate(module, folder):
    model = small_llama(module)
    prompt = torch.arange(8).view(2, 4)
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    return module.generate(model=model, prompt=prompt, max_new_tokens=6, group=3, top_k=8,
                           top_p=0.9, generator=generators)


def run_adamw(module, folder):
    """Three steps, and a fourth with the state from files that two ranks have written."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))

    def optimizer(rank=0, ranks=1):
        return module.AdamW(model, betas=(0.9, 0.99), eps=1e-6, weight_decay=0.1, rank=rank,
                            ranks=ranks, limit=12)

    def step(adamw, seed):
        model(noisy(7, 3, seed=seed)).square().mean().backward()
        adamw.step(lr=1e-2, scale=torch.tensor(0.5))
        adamw.zero_grad()

    def save(adamw, path):
        save_file({name: x.clone() for name, x in adamw.state().items()}, path)

    whole, halves = folder / "whole", [folder / "half0", folder / "half1"]
    adamw = optimizer()
    for seed in range(3):
        step(adamw, seed)
    save(adamw, whole)
    for rank, half in enumerate(halves):
        shard = optimizer(rank, ranks=2)
        shard.load([whole])
        save(shard, half)
    adamw = optimizer()
    adamw.load(halves)
    step(adamw, seed=3)
    return [*adamw.state().values(), *model.state_dict().values()]


def run_number_sequences(module, folder):
    generator = torch.Generator().manual_seed(0)
    return [module.number_sequences(n=5, K=K, F=6, generator=generator) for K in (1, 3)]


def run_advantages(module, folder):
    per_frame = module.advantages(score=noisy(2, 3, 5))
    return [per_frame, module.advantages(score=noisy(2, 3, seed=1))]


def run_grpo_loss(module, folder):
    R, T, V = 4, 6, 9
    logits, logits_ref = noisy(R, T, V).requires_grad_(), noisy(R, T, V, seed=1)
    support = noisy(R, T, V, seed=2) > -0.5
    codes = (support * noisy(R, T, V, seed=3).exp()).argmax(-1)
    out = module.grpo_loss(
        logits=logits, logits_ref=logits_ref, codes=codes, support=support,
        logp_old=-noisy(R, T, seed=4).abs(), advantage=noisy(R, T, seed=5), clip_eps=0.2, beta=0.1)
    kl = module.kl_divergence(logits=logits, logits_ref=logits_ref)
    gradient = torch.autograd.grad(out["loss"].sum(), logits)[0]
    return [kl, gradient, *out.values()]


RUNS = {"EMAVectorQuantizer": run_quantizer, "QFormer": run_q_former, "MMDiT": run_mmdit,
        "VAE": run_vae, "Llama": run_llama, "generate": run_generate, "AdamW": run_adamw,
        "number_sequences": run_number_sequences, "advantages": run_advantages,
        "grpo_loss": run_grpo_loss}


@pytest.mark.parametrize("part", COPIES)
def test_a_copy_computes_the_same(part, tmp_path):
    copied = copy_of(part)
    original = SimpleNamespace()
    for name in COPIES[part].split():
        module, name = name.split(".")
        setattr(original, name, getattr(importlib.import_module(module), name))
    assert getattr(copied, part) is not getattr(original, part)
    expected, results = (list(RUNS[part](module, tmp_path)) for module in (original, copied))
    assert len(results) == len(expected) > 1
    for a, b in zip(results, expected):
        assert torch.equal(a, b) and torch.isfinite(a).all()
