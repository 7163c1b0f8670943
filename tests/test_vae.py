"""
The VAE: shapes, diffusers' numbers and files, the loss of its training, frames of clips, bad input.

    pytest tests/test_vae.py

Takes 2 seconds on one CPU core.
"""
import json
import math
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import evaluate
import sim
import train
import vae as stage
from checkpoint import UserError
from vae import KL_WEIGHT, PRESETS, VAE, WEIGHTS, Config, Frames

SIZE = 16                                   # pixels per side
FIXTURES = Path(__file__).parent / "fixtures"   # random models, written and run by diffusers 0.42.1


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def small_vae(**other) -> VAE:
    torch.manual_seed(0)
    fields = {"block_out_channels": [8, 16], "latent_channels": 3, "norm_num_groups": 4,
              "use_quant_conv": False, "use_post_quant_conv": False}
    return VAE(**fields | other)


def randomized(model: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    return model


def images(n=2):
    return 2 * torch.rand(n, 3, SIZE, SIZE, generator=seeded(2)) - 1


# ------------------------------------------------------------------ model


@pytest.mark.parametrize("levels", [1, 2, 3])
@pytest.mark.parametrize("convs", [False, True])
def test_vae_shapes(levels, convs):
    vae = small_vae(block_out_channels=[8, 16, 16][:levels],
                    use_quant_conv=convs, use_post_quant_conv=convs)
    shrink = 2 ** (levels - 1)
    mean, logvar = vae.moments(images())
    assert vae.shrink == shrink
    assert mean.shape == logvar.shape == (2, 3, SIZE // shrink, SIZE // shrink)
    assert vae.encode(images()).shape == mean.shape
    assert vae.decode(mean).shape == images().shape


@pytest.mark.parametrize("latent, convs, tensors, parameters", [
    (4, True, 248, 83_653_863), (16, False, 244, 83_819_683)], ids=["SD1", "SD3"])
def test_vae_is_autoencoder_kl(latent, convs, tensors, parameters):
    """At their sizes, it has the tensors and parameters of Stable Diffusion's autoencoders."""
    with torch.device("meta"):
        vae = VAE([128, 256, 512, 512], latent, layers_per_block=2,
                  use_quant_conv=convs, use_post_quant_conv=convs)
    state = vae.state_dict()
    assert len(state) == tensors
    assert sum(p.numel() for p in state.values()) == parameters
    assert {"encoder.down_blocks.1.resnets.0.conv_shortcut.weight",
            "encoder.down_blocks.2.downsamplers.0.conv.bias",
            "decoder.up_blocks.0.resnets.2.conv2.weight",
            "decoder.up_blocks.2.upsamplers.0.conv.weight",
            "encoder.mid_block.attentions.0.to_out.0.weight",
            "decoder.mid_block.attentions.0.group_norm.bias"} <= state.keys()


@pytest.mark.parametrize("preset, millions", [("tiny", 0.242), ("small", 0.320)])
def test_preset_sizes(preset, millions):
    with torch.device("meta"):
        vae = stage.small_vae(Config(**PRESETS[preset]))
    parameters = sum(p.numel() for p in vae.parameters())
    assert round(parameters / 1e6, 3) == millions


@torch.no_grad()
def test_vae_shifts_and_scales():
    plain = randomized(small_vae())
    scaled = randomized(small_vae(scaling_factor=0.5, shift_factor=3.0))
    z = plain.encode(images())
    torch.testing.assert_close(scaled.encode(images()), (z - 3.0) * 0.5)
    decoded = scaled.decode((z - 3.0) * 0.5)
    torch.testing.assert_close(decoded, plain.decode(z), rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_the_pass_of_training_draws_from_the_posterior():
    """forward decodes mean + std * noise, without shift and scale."""
    vae = randomized(small_vae(scaling_factor=0.5, shift_factor=3.0))
    mean, logvar = vae.moments(images())
    noise = torch.randn(mean.shape, generator=seeded())
    reconstruction, *posterior = vae(images(), noise)
    assert torch.equal(posterior[0], mean) and torch.equal(posterior[1], logvar)
    z = mean + logvar.exp().sqrt() * noise
    torch.testing.assert_close(reconstruction, vae.reconstruct(z), rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------ diffusers' folders


def copy_fixture(name, folder, change=lambda tensors: tensors, **fields):
    """A fixture's folder, its tensors changed, with other fields in its config."""
    config = json.loads((FIXTURES / name / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))
    save_file(change(load_file(FIXTURES / name / WEIGHTS)), folder / WEIGHTS)
    return folder


def old_names(tensors):
    """The attention's matrices as diffusers named them at first."""
    new_to_old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.",
                  ".to_out.0.": ".proj_attn."}
    renamed = {}
    for name, x in tensors.items():
        for new, old in new_to_old.items():
            name = name.replace(new, old)
        renamed[name] = x
    assert sum("query" in name for name in renamed) == 4
    return renamed


@pytest.mark.parametrize("name", ["vae-sd1", "vae-sd3"])
@pytest.mark.parametrize("change", [lambda tensors: tensors, old_names],
                         ids=["names of today", "old names"])
@torch.no_grad()
def test_vae_matches_diffusers(name, change, tmp_path):
    vae = VAE.load(copy_fixture(name, tmp_path, change))
    expected = load_file(FIXTURES / name / "expected.safetensors")
    image, latent, decoded = (expected[key] for key in ("image", "latent", "decoded"))
    torch.testing.assert_close(vae.moments(image)[0], latent, atol=1e-4, rtol=0)
    torch.testing.assert_close(vae.reconstruct(latent), decoded, atol=1e-4, rtol=0)
    scale, shift = {"vae-sd1": (0.18215, 0.0), "vae-sd3": (1.5305, 0.0609)}[name]
    torch.testing.assert_close(vae.encode(image), (latent - shift) * scale, atol=2e-4, rtol=0)
    torch.testing.assert_close(vae.decode(vae.encode(image)), decoded, atol=1e-4, rtol=0)


@torch.no_grad()
def test_vae_of_half_precision_files_is_fp32(tmp_path):
    def half(tensors):
        return {name: x.half() for name, x in tensors.items()}
    vae = VAE.load(copy_fixture("vae-sd3", tmp_path, half))
    expected = load_file(FIXTURES / "vae-sd3" / "expected.safetensors")
    assert {p.dtype for p in vae.parameters()} == {torch.float32}
    mean = vae.moments(expected["image"])[0]
    torch.testing.assert_close(mean, expected["latent"], atol=2e-2, rtol=0)


def test_the_first_files_of_sd1_name_no_scale(tmp_path):
    path = copy_fixture("vae-sd1", tmp_path) / "config.json"
    config = json.loads(path.read_text())
    del config["scaling_factor"]
    path.write_text(json.dumps(config))
    assert VAE.load(tmp_path).config["scaling_factor"] == 0.18215
    path.write_text("[]")
    with pytest.raises(UserError, match="config.json is damaged .it holds no JSON object"):
        VAE.load(tmp_path)


@torch.no_grad()
def test_fields_that_change_no_number(tmp_path):
    """Names that diffusers gives the same function, tiles, half precision, notes."""
    fields = {"act_fn": "swish", "sample_size": [64, 64], "force_upcast": False,
              "latents_mean": None, "latents_std": None, "_name_or_path": "x"}
    vae = VAE.load(copy_fixture("vae-sd3", tmp_path, **fields))
    expected = load_file(FIXTURES / "vae-sd3" / "expected.safetensors")
    mean = vae.moments(expected["image"])[0]
    torch.testing.assert_close(mean, expected["latent"], atol=1e-4, rtol=0)
    vae.save(tmp_path / "copy")
    assert VAE.load(tmp_path / "copy").config == vae.config


def test_other_names_of_the_weights(tmp_path):
    """The only variant is read; of several, and of .bin, the message says what to do."""
    (tmp_path / "vae").mkdir()
    path = copy_fixture("vae-sd3", tmp_path / "vae") / WEIGHTS
    bias = VAE.load(tmp_path / "vae").encoder.conv_in.bias
    fp16 = path.rename(path.with_name("diffusion_pytorch_model.fp16.safetensors"))
    for folder in (tmp_path / "vae", tmp_path):             # the second as a whole pipeline
        assert torch.equal(VAE.load(folder).encoder.conv_in.bias, bias)
    ema = path.with_name("diffusion_pytorch_model.ema.safetensors")
    ema.write_bytes(fp16.read_bytes())
    with pytest.raises(UserError, match=f"ema.* and .*fp16.*: copy the one to use to {WEIGHTS}"):
        VAE.load(tmp_path)
    path.write_bytes(fp16.read_bytes())
    assert torch.equal(VAE.load(tmp_path).encoder.conv_in.bias, bias)
    for file in (ema, path):
        file.unlink()
    fp16.rename(fp16.with_suffix(".bin"))
    with pytest.raises(UserError, match='fp16.bin.*from_pretrained.*variant="fp16".*save') as error:
        VAE.load(tmp_path)
    assert "--fresh" not in str(error.value)


def test_the_same_weights_with_another_scale_are_another_vae(tmp_path):
    folders = [tmp_path / name for name in ("a", "b", "run")]
    for folder, scale in zip(folders, (1.0, 2.0, 1.0)):
        small_vae(scaling_factor=scale).save(folder)
    world = train.World(0, 1, torch.device("cpu"))
    assert stage.adopt(folders[2], folders[0], world).config["scaling_factor"] == 1
    with pytest.raises(UserError, match="holds another VAE"):
        stage.adopt(folders[2], folders[1], world)


def without(name):
    return lambda tensors: {k: x for k, x in tensors.items() if k != name}


def changed(name, f):
    return lambda tensors: tensors | {name: f(tensors[name]).contiguous()}


def with_extra(tensors):
    return tensors | {"extra.weight": torch.ones(2)}


BIAS = "encoder.mid_block.attentions.0.to_q.bias"
MISFITS = {                                 # change of the tensors, fields of the config, culprit
    "missing": (without(BIAS), {}, BIAS),
    "unexpected": (with_extra, {}, "extra.weight"),
    "shape": (changed(BIAS, lambda x: x[1:]), {}, BIAS),
    "NaN": (changed(BIAS, lambda x: x * math.nan), {}, BIAS),
    "no quant conv": (dict, {"use_quant_conv": False}, "quant_conv"),
    "latent channels": (dict, {"latent_channels": 8}, "encoder.conv_out"),
    "activation": (dict, {"act_fn": "relu"}, "act_fn"),
    "no attention": (dict, {"mid_block_add_attention": False}, "mid_block_add_attention"),
    "class": (dict, {"_class_name": "VQModel"}, "VQModel"),
    "blocks": (dict, {"down_block_types": ["AttnDownBlock2D"] * 4}, "AttnDownBlock2D"),
    "nested blocks": (dict, {"down_block_types": [["DownEncoderBlock2D"]]}, "down_block_types"),
    "channels": (dict, {"block_out_channels": 8}, "config.json"),
    "no channels": (dict, {"block_out_channels": []}, "config.json"),
    "negative channels": (dict, {"latent_channels": -1}, "config.json"),
    "too few blocks": (dict, {"up_block_types": ["UpDecoderBlock2D"]}, "up_block_types"),
    "latents' mean": (dict, {"latents_mean": [0.1] * 4}, "latents_mean"),
    "latents' deviation": (dict, {"latents_std": [2.0] * 4}, "latents_std"),
    "quant_conv": (dict, {"use_post_quant_conv": "no"}, "use_post_quant_conv"),
    "colours": (dict, {"in_channels": 1}, "in_channels"),
    "unknown field": (dict, {"patch_size": 2}, "patch_size"),
    "quantized": (changed(BIAS, lambda x: x.to(torch.int8)), {}, "int8"),
    "groups": (dict, {"norm_num_groups": 3}, "config.json"),
    "no groups": (dict, {"norm_num_groups": 0}, "config.json"),
    "scale is text": (dict, {"scaling_factor": "big"}, "scaling_factor"),
    "scale is 0": (dict, {"scaling_factor": 0}, "scaling_factor"),
    "shift is NaN": (dict, {"shift_factor": math.nan}, "shift_factor"),
}


@pytest.mark.parametrize("change, fields, culprit", MISFITS.values(), ids=MISFITS)
def test_a_vae_that_does_not_fit(change, fields, culprit, tmp_path):
    with pytest.raises(UserError) as error:
        VAE.load(copy_fixture("vae-sd1", tmp_path, change, **fields))
    assert culprit in str(error.value) and str(tmp_path) in str(error.value)


@pytest.mark.parametrize("convs", [False, True])
@torch.no_grad()
def test_vae_save_and_load(tmp_path, convs):
    vae = small_vae(use_quant_conv=convs, use_post_quant_conv=convs, scaling_factor=0.7)
    randomized(vae).save(tmp_path)
    loaded = VAE.load(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", WEIGHTS}
    latents = vae.encode(images())
    assert torch.equal(loaded.encode(images()), latents)
    assert torch.equal(loaded.decode(latents), vae.decode(latents))


@pytest.mark.parametrize("name", ["config.json", WEIGHTS])
@pytest.mark.parametrize("damage", [
    lambda path: path.unlink(),
    lambda path: os.truncate(path, 50),
    lambda path: path.write_text("{}")], ids=["missing", "cut", "empty"])
def test_a_damaged_vae_is_named(tmp_path, name, damage):
    small_vae().save(tmp_path)
    damage(tmp_path / name)
    with pytest.raises(UserError, match=name):
        VAE.load(tmp_path)


# ------------------------------------------------------------------ frames and training


@torch.no_grad()
def test_frames_are_those_of_the_clips():
    def rendered(scenario, split):
        clips = sim.sample(scenario, split, 3, 0)
        return sim.render(clips.position, clips.radius, SIZE).flatten(0, 1)     # (96, 3, H, W)

    data = Frames(Config(scenario="all", clips=3, size=SIZE), "cpu")
    for i, scenario in enumerate(sim.SCENARIOS):
        frames = data[96 * i + torch.arange(96)]
        expected = rendered(scenario, "pretrain")           # 0.006 units are 0.01 pixels
        torch.testing.assert_close(frames, expected, rtol=0, atol=0.05)
    assert len(data) == 3 * 96

    # those of a second split come after
    both = Frames(Config(clips=3, size=SIZE), "cpu", ("pretrain", "ood"))
    second = both[96 + torch.arange(96)]
    torch.testing.assert_close(second, rendered("uniform", "ood"), rtol=0, atol=0.05)
    assert torch.equal(both[torch.arange(96)], data[torch.arange(96)]) and len(both) == 2 * 96


COMMAND = ["--steps", "2", "--batch", "5", "--clips", "4", "--size", "16", "--width", "8",
           "--levels", "2", "--eval_clips", "2"]


def test_command(tmp_path, capsys, monkeypatch):
    """It trains, adds its rows to the table, and is not done again without --fresh."""
    monkeypatch.setattr(evaluate, "SPLITS", ("iid",))
    command = [*COMMAND, "--out", str(tmp_path)]
    stage.main(command)
    assert "ground truth" in (printed := capsys.readouterr().out) and "\n  VAE" in printed
    first, *rest = (tmp_path / "vae" / "log.jsonl").read_text().splitlines()
    assert len(rest) == 1
    line = json.loads(first)
    assert line["loss"] == pytest.approx(line["mse"] + KL_WEIGHT * line["kl"], rel=1e-4)
    assert line["kl"] > 0

    weights = tmp_path / "vae" / WEIGHTS
    trained, first = weights.stat().st_mtime_ns, load_file(weights)
    stage.main(command)
    assert "is trained" in capsys.readouterr().out and weights.stat().st_mtime_ns == trained
    with pytest.raises(UserError, match="seed was 0, is 1"):
        stage.main([*command, "--seed", "1"])
    stage.main([*command, "--fresh", "--micro_batch", "2"])     # the same in three micro-batches
    assert weights.stat().st_mtime_ns != trained
    for name, x in load_file(weights).items():
        torch.testing.assert_close(x, first[name], rtol=1e-3, atol=1e-4)


def test_latents_have_zero_mean_and_unit_variance(tmp_path, monkeypatch):
    """Those of the frames it was trained on."""
    monkeypatch.setattr(evaluate, "SPLITS", ("iid",))
    stage.main([*COMMAND, "--out", str(tmp_path)])
    data = Frames(Config(clips=4, size=SIZE), "cpu", ("pretrain", "ood"))
    frames = data[torch.arange(len(data))]
    latents = VAE.load(tmp_path / "vae").encode(2 * frames - 1)
    assert latents.mean().item() == pytest.approx(0, abs=0.02)
    assert latents.std().item() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("argv, culprit", [
    (["--size", "18"], "--size 18: must be a multiple of 4"),
    (["--width", "12"], "--width 12: must be a multiple of 8"),
    (["--scenario", "rain"], "--scenario 'rain'"), (["--seed", "1000003"], "held-out clips"),
    (["--eval_clips", "1"], "--eval_clips 1"), (["--eval_clips", "1000000000"], "--eval_clips"),
    (["--size", "1000000000"], "--size"), (["--clips", "1000000000000"], "--clips"),
    (["--batch", "1000000000"], "--batch"), (["--levels", "40"], "--levels 40"),
    (["--width", "1000000"], "--width"), (["--latent", "1000000"], "--latent")])
def test_bad_flags(argv, culprit, tmp_path):
    with pytest.raises(UserError, match=culprit):
        stage.main([*argv, "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())
