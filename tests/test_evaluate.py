"""
Evaluation: the means and standard errors by hand, what a model is given, the table of results.

    pytest tests/test_evaluate.py

Takes 3 seconds on one CPU core.
"""
import json
import math
import os
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import evaluate
import reward
import sim
from checkpoint import UserError
from train import World

ALONE = World(0, 1, torch.device("cpu"))


def paint(clips, size=32):
    """The clips as 8-bit frames."""
    return sim.to_uint8(sim.render(clips.position, clips.radius, size)).float() / 255


# ------------------------------------------------------------------ evaluate

def freeze(frames):
    """A 'model' that repeats the last frame that it is given."""
    repeated = frames[:, -1:].expand(-1, 32 - frames.shape[1], -1, -1, -1)
    return torch.cat([frames, repeated], 1)


def truth(frames):
    """A 'model' that returns what it is given."""
    return frames


def test_evaluate_by_hand():
    result = evaluate.evaluate(freeze, "parabola", "iid", 7, seed=5, size=32, batch=3)
    clips = sim.sample("parabola", "iid", 7, seed=5)
    frames = freeze(paint(clips)[:, :3])
    for name, value in (reward.errors(frames, clips) | reward.reward(frames, clips)).items():
        values = value.tolist()
        mean = sum(values) / 7
        error = math.sqrt(sum((x - mean) ** 2 for x in values) / 6) / math.sqrt(7)
        assert result[name] == pytest.approx(mean, rel=1e-5, abs=1e-7)
        assert result[name + "_se"] == pytest.approx(error, rel=1e-4, abs=1e-7)
    assert result["n"] == 7 and result["left_out"] == 0


def test_evaluate_shows_the_condition_only():
    seen = []

    def predict(frames):
        seen.append(frames)
        return freeze(frames)

    evaluate.evaluate(predict, "collision", "ood", 5, size=16, batch=4)
    clips = sim.sample("collision", "ood", 5)
    assert [len(frames) for frames in seen] == [4, 1]
    assert torch.equal(torch.cat(seen), paint(clips, 16)[:, :3])


def test_evaluate_measures_8_bit_pictures():
    def result(predict):
        return evaluate.evaluate(predict, "uniform", "iid", 2, size=32, shown=32)

    assert result(lambda frames: frames - 0.4 / 255) == result(truth)    # rounded
    wide = result(lambda frames: 1.2 * frames - 0.1)
    assert wide == result(lambda frames: (1.2 * frames - 0.1).clamp(0, 1))


def test_evaluate_counts_clips_that_cannot_be_measured():
    """In a few collisions of `ood-all` both balls leave the view at the moment of the impact."""
    clips = sim.sample("collision", "ood-all", 80)
    frame = torch.arange(31)
    after = (frame >= (sim.impact_time(clips) / 0.1)[:, None]) & (frame >= 3)
    seen = (clips.inside[:, 1:] & clips.inside[:, :-1] & after[..., None]).any(2).any(1)
    result = evaluate.evaluate(truth, "collision", "ood-all", 80, size=16, shown=32)
    assert 0 < result["left_out"] == (~seen).sum() and result["n"] == seen.sum()
    assert all(math.isfinite(value) for value in result.values())


@pytest.mark.parametrize("predict, culprit", [
    (truth, r"\(2, 3, 3, 16, 16\)"),
    (lambda frames: freeze(frames)[:1], r"\(1, 32, 3, 16, 16\)"),
    (lambda frames: freeze(frames)[:, :, :1], r"\(2, 32, 1, 16, 16\)"),
    (lambda frames: freeze(frames) * 2 - 1, "from -1 to 1"),
    (lambda frames: freeze(frames) * 255, "from 0 to 255"),
    (lambda frames: sim.to_uint8(freeze(frames)), "uint8"),
    (lambda frames: freeze(frames).numpy(), "ndarray: give a tensor"),
    (lambda frames: freeze(frames) * math.nan, "NaN"),
    (lambda frames: freeze(frames) + math.inf, "infinity")])
def test_evaluate_refuses_a_wrong_prediction(predict, culprit):
    with pytest.raises(ValueError, match=culprit):
        evaluate.evaluate(predict, "uniform", "iid", 2, size=16)


def test_evaluate_refuses_bad_arguments():
    cases = [(("uniform", "iid", 0), "n = 0"),
             (("uniform", "nope", 1), "nope"),
             (("rotation", "iid", 1), "rotation")]
    for arguments, culprit in cases:
        with pytest.raises(ValueError, match=culprit):
            evaluate.evaluate(freeze, *arguments)
    for options in ({"shown": 0}, {"shown": 33}, {"batch": 0}):
        with pytest.raises(ValueError, match="shown = "):
            evaluate.evaluate(freeze, "uniform", "iid", 1, **options)


# ------------------------------------------------------------------ the file of results

def results_of(path, **rows):
    """A file with only what `difference` needs: row -> {measure: its value for each clip}."""
    path.write_text(json.dumps({row: {"uniform": {"iid": {"each": each}}}
                                for row, each in rows.items()}))
    return path


def test_difference_is_clip_by_clip(tmp_path):
    """Against numpy. A clip that was left out in one of the rows counts in neither."""
    a = {"reward": [1.0, 2.0, 4.0, math.nan], "drift_error": [0.5, 0.25, 1.0, 0.1]}
    b = {"reward": [1.5, 2.25, 4.5, 2.0], "drift_error": [0.25, 0.25, math.nan, 0.1]}
    path = results_of(tmp_path / "results.json", A=a, B=b)
    lines = evaluate.difference(path, "A", "B").splitlines()
    line = next(line for line in lines if "uniform, iid" in line)
    numbers = [float(x) for x in re.findall(r"[-+]?\d+\.\d+", line)]
    expected = []
    for change in (np.array([0.5, 0.25, 0.5]), np.array([-0.25, 0, 0])):
        mean, error = change.mean(), change.std(ddof=1) / 3 ** 0.5
        expected += [mean, error, mean / error]
    np.testing.assert_allclose(np.abs(numbers), np.abs(expected), atol=0.051)
    np.testing.assert_allclose(numbers[::3], expected[::3], atol=6e-4)   # means, with sign


@pytest.mark.parametrize("n", [1, 2])
def test_difference_of_equal_or_single_clips(tmp_path, n):
    each = {"reward": [1.0] * n, "drift_error": [0.5] * n}
    text = evaluate.difference(results_of(tmp_path / "results.json", A=each, B=each), "A", "B")
    assert "+0.000" in text and "nan" in text


def test_a_table_is_continued_not_measured_again(tmp_path):
    path, calls = tmp_path / "results.json", []

    def predict(frames):
        calls.append(len(frames))
        return freeze(frames)

    def add(splits, n=3, size=16):
        evaluate.add_row(path, "no motion", predict, ["uniform"], splits, n, size=size)

    add(("iid",))
    add(("iid", "slow"))
    assert calls == [3, 3]                                               # iid once, slow once
    before = path.read_text()
    add(("iid", "slow"))
    assert calls == [3, 3] and path.read_text() == before
    add(("iid",), n=4)                                                   # more clips
    add(("iid",), n=4, size=24)                                          # larger frames
    assert calls == [3, 3, 4, 4]
    slow = json.loads(path.read_text())["no motion"]["uniform"]["slow"]
    expected = evaluate.evaluate(freeze, "uniform", "slow", 3, evaluate.EVAL_SEED, size=16)
    assert slow["velocity_error"] == pytest.approx(expected["velocity_error"])
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]


def test_table(tmp_path):
    path = tmp_path / "results.json"
    evaluate.add_row(path, "no motion", freeze, ["uniform"], ("iid", "slow"), 3, size=16)
    evaluate.add_row(path, "truth", truth, ["uniform"], ("iid",), 3, size=16, shown=32)
    results = json.loads(path.read_text())
    text = evaluate.table(path)
    blocks = [block.splitlines() for block in text.strip().split("\n\n")]
    assert [block[0].split("  ")[0] for block in blocks] == ["uniform, iid", "uniform, slow"]
    names = [[line.split("  ")[1] for line in block[1:]] for block in blocks]
    assert names == [["no motion", "truth"], ["no motion"]]
    assert f"{results['truth']['uniform']['iid']['reward']:.3f}" in blocks[0][2]


def test_rows_of_other_weights_are_measured_again(tmp_path):
    """Rows know the weights that they were measured on, and those that were trained from them."""
    config = SimpleNamespace(out=str(tmp_path), scenario="uniform", eval_clips=2)
    measured = []

    def train(*stages):
        for stage in stages:
            (tmp_path / stage).mkdir(exist_ok=True)
            (tmp_path / stage / "model.safetensors").write_bytes(os.urandom(9))

    def add(row, *stages):
        def predict(frames):
            measured.append(row)
            return freeze(frames)
        path = evaluate.add_rows(config, {row: predict}, stages, 16, ALONE, splits=("iid",))
        assert path == tmp_path / "results.json"

    def all_rows():
        measured.clear()
        add("DDT", "ddt")
        add("SFT", "ddt", "sft")
        add("SFT + RL", "ddt", "sft", "grpo")
        return measured
    train("ddt", "sft", "grpo")
    assert all_rows() == ["DDT", "SFT", "SFT + RL"]
    assert all_rows() == []
    train("grpo")
    assert all_rows() == ["SFT + RL"]
    train("sft")
    measured.clear()
    add("SFT", "ddt", "sft")
    assert set(json.loads((tmp_path / "results.json").read_text())) == {"DDT", "SFT"}
    train("ddt")
    assert all_rows() == ["DDT", "SFT", "SFT + RL"]
    path = tmp_path / "results.json"                        # a row that does not say of what it is
    results = json.loads(path.read_text())
    results["SFT"]["uniform"]["iid"].pop("weights")
    path.write_text(json.dumps(results))
    assert all_rows() == ["SFT"]


SHAPES = ["{", "", "null", "[]", "3", '{"SFT": {', '{"SFT": 3}', '{"SFT": null}', '{"SFT": []}',
          '{"SFT": {"uniform": 3}}', '{"SFT": {"uniform": {"iid": 3}}}', "[" * 100_000]


@pytest.mark.parametrize("text", [*SHAPES, b"\xff\xfe{}"], ids=lambda text: repr(text[:20]))
def test_a_damaged_file_is_one_line(tmp_path, text):
    path = tmp_path / "results.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    for use in (lambda: evaluate.table(path),
                lambda: evaluate.difference(path, "SFT", "SFT + RL"),
                lambda: evaluate.drop_older(path, {"sft": "0"}),
                lambda: evaluate.add_row(path, "SFT", freeze, ["uniform"], ("iid",), 2, size=16)):
        with pytest.raises(UserError, match="results.json is damaged .* delete it, and") as error:
            use()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("damage", [
    lambda result: result.pop("drift_error_se"), lambda result: result.pop("n"),
    lambda result: result.update(reward="much"), lambda result: result.pop("each"),
    lambda result: result.update(each=[1, 2]), lambda result: result["each"]["reward"].pop(),
    lambda result: result.update(weights=3)])
def test_half_a_row_is_one_line(tmp_path, damage):
    path = tmp_path / "results.json"
    for row in ("SFT", "SFT + RL"):
        evaluate.add_row(path, row, freeze, ["uniform"], ("iid",), 3, size=16)
    results = json.loads(path.read_text())
    damage(results["SFT"]["uniform"]["iid"])
    path.write_text(json.dumps(results))
    with pytest.raises(UserError, match="results.json is damaged .* delete it"):
        evaluate.drop_older(path, {"sft": "0"})
        evaluate.table(path)
        evaluate.difference(path, "SFT", "SFT + RL")


def test_nan_is_null_in_the_file(tmp_path, monkeypatch):
    """JSON has no NaN: a clip that does not count, an error of one clip alone."""
    def strict(text):
        return json.loads(text, parse_constant=lambda name: pytest.fail(name))

    def all_but_one(*args, plain=reward.errors):
        errors = plain(*args)
        errors["velocity_error"][1:] = errors["drift_error"][1:] = math.nan
        return errors
    monkeypatch.setattr(reward, "errors", all_but_one)
    path = tmp_path / "results.json"
    for row in ("SFT", "SFT + RL"):
        evaluate.add_row(path, row, freeze, ["uniform"], ("iid",), 3, size=16)
    stored = strict(path.read_text())["SFT"]["uniform"]["iid"]
    assert stored["n"] == 1 and stored["drift_error_se"] is None
    assert stored["each"]["drift_error"][1:] == [None, None]
    read = evaluate.read_results(path)["SFT"]["uniform"]["iid"]
    assert math.isnan(read["drift_error_se"]) and math.isnan(read["each"]["drift_error"][2])
    assert read["reward"] == stored["reward"] and read["of"] == stored["of"]
    assert "nan" in evaluate.table(path) and "nan" in evaluate.difference(path, "SFT", "SFT + RL")
    evaluate.drop_older(path, {"sft": "0"})
    strict(path.read_text())


def test_results_that_cannot_be_written_are_named(tmp_path):
    (tmp_path / "results.json").mkdir()
    with pytest.raises(UserError, match="results.json is damaged .*directory"):
        evaluate.add_row(tmp_path / "results.json", "SFT", freeze, ["uniform"], ("iid",), 2,
                         size=16)
