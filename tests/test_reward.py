"""
Measuring balls in pictures: precision, the definitions against a plain loop, and that no way of losing pays.

    pytest tests/test_reward.py

Takes 15 seconds on one CPU core.
"""
import dataclasses
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import reward
import sim

ROOT = Path(__file__).parents[1]
ERRORS = ("velocity_error", "drift_error", "radius_error", "missing")
every_scenario = pytest.mark.parametrize("scenario", sim.SCENARIOS)


def paint(clips, size=32, shift=0.0):
    """The clips as 8-bit pictures, every centre moved by `shift`, which spreads to (B, F, N, 2)."""
    return sim.to_uint8(sim.render(clips.position + shift, clips.radius, size)).float() / 255


def after_condition(frames, predicted):
    return torch.cat([frames[:, :3], predicted.expand_as(frames)[:, 3:]], 1)


def noisy(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def thrown(speeds, radius=1.0):
    """Uniform clips of one ball with these speeds, from the left edge: the fastest is in view for 1.3 s."""
    B = len(speeds)
    radius, velocity = torch.full((B, 1), radius).double(), torch.tensor(speeds).double()[:, None]
    position = sim.simulate("uniform", radius, velocity, torch.tensor([1.2, 5.1]).expand(B, 1, 2))
    inside = ((position >= radius[:, None, :, None]) & (position <= 10 - radius[:, None, :, None])).all(-1)
    return sim.Clips("uniform", radius, velocity, position, inside)


# ------------------------------------------------------------------ precision

@every_scenario
@pytest.mark.parametrize("split", ["iid", "ood"])
def test_perfect_frames(scenario, split):
    result = reward.evaluate(lambda frames: frames, scenario, split, 8, size=128, shown=32, batch=4)
    assert result["velocity_error"] <= 0.005 and result["radius_error"] <= 0.005
    assert result["missing"] == 0 and result["reward"] > 4.97


@every_scenario
def test_noisy_frames(scenario):
    clips = sim.sample(scenario, "iid", 4)
    frames = sim.render(clips.position, clips.radius, 128)
    frames = frames + 0.02 * noisy(frames.shape)
    for pictures in (frames, sim.to_uint8(frames).float() / 255):        # as they are, and as stored
        error = reward.errors(pictures, clips)
        assert error["velocity_error"].mean() <= 0.06 and error["radius_error"].mean() <= 0.02
        assert (error["missing"] == 0).all()


@pytest.mark.parametrize("size, close", [(32, 0.02), (128, 0.002)])
def test_detect_finds_exact_balls(size, close):
    generator = torch.Generator().manual_seed(0)
    radius = 0.3 + 0.9 * torch.rand(32, 2, generator=generator)      # red on the left half, blue on the right
    position = torch.rand(32, 1, 2, 2, generator=generator) * 2 + torch.tensor([[1.5, 4.0], [6.2, 4.0]])
    painted = sim.render(position, radius, size)
    for frames in (painted, sim.to_uint8(painted) / 255):
        both = center, found_radius, found = reward.detect(frames, 2)
        assert found.all() and (center - position).abs().max() < close
        assert (found_radius - radius[:, None]).abs().max() < close
        for x, y in zip(reward.detect(frames, 1), both):                 # the red one only
            assert torch.equal(x, y[:, :, :1])


@pytest.mark.parametrize("direction", [0.0, 0.6, math.pi / 2])
def test_detect_parts_touching_balls(direction):
    radius, first = torch.tensor([[1.1, 0.7]]), torch.tensor([4.03, 4.41])
    apart = 1.8 * torch.tensor([math.cos(direction), math.sin(direction)])
    position = torch.stack([first, first + apart])[None, None]
    center, found_radius, found = reward.detect(sim.to_uint8(sim.render(position, radius, 128)) / 255, 2)
    assert found.all()
    assert (center - position).abs().max() < 0.003 and (found_radius - radius).abs().max() < 0.003


def test_the_smallest_ball_is_found_anywhere_at_32_pixels():
    position = 5 + 10 / 32 * torch.rand(200, 1, 1, 2, generator=torch.Generator().manual_seed(0))
    frames = sim.render(position, torch.full((200, 1), 0.3), 32)
    center, _, found = reward.detect(sim.to_uint8(frames) / 255, 1)
    assert found.all() and (center - position).norm(dim=-1).max() < 0.03


@pytest.mark.parametrize("colour", [(0, 1, 0), (0, 0, 0), (0, 0, 1), (0.5, 0.5, 0.5), (1, 1, 0), (0, 1, 1),
                                    (1, 0, 1)])
def test_wrong_colours_are_no_red_ball(colour):
    frames = paint(thrown([1.0, 1.4]))
    assert reward.detect(frames, 1)[2].all()
    covered = 1 - frames[:, :, 1:2]                                    # repaint: white where there is no ball
    frames = 1 - covered + covered * torch.tensor(colour)[:, None, None]
    center, radius, found = reward.detect(frames, 1)
    assert not found.any() and center.isnan().all() and radius.isnan().all()


@pytest.mark.parametrize("colour", [(1, 1, 1), (0, 0, 0), (0, 1, 0), (0.5, 0.5, 0.5)])
def test_an_empty_picture_holds_no_ball(colour):
    frames = torch.tensor(colour).float()[:, None, None].expand(1, 2, 3, 32, 32)
    for n_balls in (1, 2):
        assert not reward.detect(frames, n_balls)[2].any()
    assert not reward.detect(1 - 0.02 * noisy((1, 2, 3, 32, 32)).abs(), 2)[2].any()


# ------------------------------------------------------------------ definitions

def by_hand(frames, clips, after_impact):
    """The errors as the head of reward.py defines them, in plain loops over detect's balls."""
    center, radius, found = (x.tolist() for x in reward.detect(frames, clips.radius.shape[1]))
    position, true_radius, inside = clips.position.tolist(), clips.radius.tolist(), clips.inside.tolist()
    result = {name: [] for name in ERRORS}
    for b in range(len(clips)):
        ball_velocity, ball_drift, ball_radius, ball_missing = [], [], [], []
        for i in range(clips.radius.shape[1]):
            pairs = [f for f in range(3, 31) if inside[b][f][i] and inside[b][f + 1][i]]
            if clips.scenario == "collision":
                gap = position[b][0][1][0] - position[b][0][0][0] - sum(true_radius[b])
                impact = gap / clips.velocity[b].sum().item()
                pairs = [f for f in pairs if 0.1 * f >= impact
                         or not after_impact and 0.1 * (f + 1) <= impact]
            size, total, lost = 0.0, [0.0, 0.0], 0
            for f in pairs:
                if not (found[b][f][i] and found[b][f + 1][i]):
                    size, lost = size + 10, lost + 1
                    continue
                wrong = [(center[b][f + 1][i][k] - center[b][f][i][k]) / 0.1
                         - (position[b][f + 1][i][k] - position[b][f][i][k]) / 0.1 for k in (0, 1)]
                length = math.hypot(*wrong)
                shrink = min(1, 10 / length) if length else 1         # no pair is worse than a missing ball's
                size += length * shrink
                total = [total[k] + wrong[k] * shrink for k in (0, 1)]
            if pairs:
                ball_velocity.append(size / len(pairs))
                ball_drift.append((math.hypot(*total) + 10 * lost) / len(pairs))
            seen = [f for f in range(3, 32) if inside[b][f][i]]
            if seen:
                wrong = [min(2, abs(radius[b][f][i] - true_radius[b][i])) if found[b][f][i] else 2
                         for f in seen]
                ball_radius.append(sum(wrong) / len(seen))
                ball_missing.append(sum(not found[b][f][i] for f in seen) / len(seen))
        for name, values in zip(ERRORS, (ball_velocity, ball_drift, ball_radius, ball_missing)):
            result[name].append(sum(values) / len(values) if values else math.nan)
    return {name: torch.tensor(values) for name, values in result.items()}


def spoil(clips, seed=0):
    """Pictures with wandering centres, one ball that jumps, and balls that are missing now and then."""
    wander = 0.05 * noisy(clips.position.shape, seed).cumsum(1).double()
    wander[:, 10, 0, 0] += 2.5
    frames = paint(clips, shift=wander)
    gone = torch.rand(frames.shape[:2], generator=torch.Generator().manual_seed(seed)) < 0.1
    red = (gone & (torch.arange(32) % 2 == 0))[:, :, None, None]
    frames[:, :, 1] = torch.where(red, frames[:, :, 0], frames[:, :, 1])           # no red ball
    frames[:, :, 2] = torch.where(red, torch.ones(()), frames[:, :, 2])
    return torch.where((gone & (torch.arange(32) % 2 == 1))[:, :, None, None, None], torch.ones(()), frames)


@pytest.mark.parametrize("scenario, split", [("uniform", "ood"), ("parabola", "iid"), ("parabola", "fast"),
                                             ("collision", "iid"), ("collision", "ood-all")])
def test_errors_equal_a_plain_loop(scenario, split):
    clips = sim.sample(scenario, split, 12)
    frames = spoil(clips)
    assert not reward.detect(frames, clips.radius.shape[1])[2].all()     # some balls are missing, as meant
    error, expected = reward.errors(frames, clips), by_hand(frames, clips, after_impact=True)
    assert set(error) == set(ERRORS)
    for name in ERRORS:
        assert error[name].shape == (12,)
        torch.testing.assert_close(error[name].float(), expected[name], rtol=1e-4, atol=1e-4, equal_nan=True)
    expected = by_hand(frames, clips, after_impact=False)
    velocity = 4 * torch.exp(-1.4 * expected["velocity_error"])
    mass = 1 - expected["radius_error"]
    got = reward.reward(frames, clips)
    assert set(got) == {"reward", "velocity", "mass"}
    for name, value in (("velocity", velocity), ("mass", mass), ("reward", velocity + mass)):
        torch.testing.assert_close(got[name].float(), value, rtol=1e-3, atol=1e-3)


@every_scenario
def test_drift_is_at_most_velocity_error(scenario):
    for split in ("iid", "ood"):
        clips = sim.sample(scenario, split, 12, seed=1)
        for frames in (paint(clips), spoil(clips), paint(clips, shift=0.3 * noisy((12, 32, 1, 2)))):
            error = reward.errors(frames, clips)
            assert (error["drift_error"] <= error["velocity_error"] + 1e-5).all()


@pytest.mark.parametrize("offset", [(0.5, 0.0), (0.0, -0.4), (-0.3, 0.6)])
def test_a_constant_velocity_offset_is_both_errors(offset):
    clips = thrown([0.5, 1.0, 1.5])
    t = 0.1 * torch.arange(32)[:, None, None]
    error = reward.errors(paint(clips, 128, shift=t * torch.tensor(offset)), clips)
    for name in ("velocity_error", "drift_error"):
        assert (error[name] - math.hypot(*offset)).abs().max() < 0.01


def test_jitter_averages_out_of_the_drift():
    clips = thrown([0.5, 1.0, 1.5])
    jitter = 0.1 * (-1.0) ** torch.arange(32)[:, None, None] * torch.tensor([0.6, 0.8])
    error = reward.errors(paint(clips, 128, shift=jitter), clips)
    assert (error["velocity_error"] - 2).abs().max() < 0.02              # 0.2 units to and fro every 0.1 s
    assert error["drift_error"].max() < 0.1


def test_before_the_impact_only_the_reward_looks():
    clips = sim.sample("collision", "iid", 6)
    impact = (sim.impact_time(clips) / 0.1)[:, None]                     # in frames
    frame = torch.arange(32)
    wobble = 0.05 * (-1.0) ** frame * (frame + 1 < impact)         # still at both frames of the impact's pair
    frames, moved = paint(clips), paint(clips, shift=wobble[:, :, None, None])
    truth, wrong = reward.errors(frames, clips), reward.errors(moved, clips)
    assert torch.equal(truth["velocity_error"], wrong["velocity_error"])
    assert torch.equal(truth["drift_error"], wrong["drift_error"])
    assert (reward.reward(moved, clips)["velocity"] < reward.reward(frames, clips)["velocity"] - 0.1).all()


def test_the_impacts_own_pair_counts_nowhere():
    clips = sim.sample("collision", "iid", 6)
    impact = (sim.impact_time(clips) / 0.1)[:, None]
    pixels = 2 * 10 / 32                                           # a shift by whole pixels measures the same
    shift = pixels * (torch.arange(32) >= impact)[:, :, None, None] * torch.tensor([0.0, 1.0])
    room = (clips.position + shift + clips.radius[:, None, :, None] < 10)[..., 1].all(-1).all(-1)
    assert room.sum() >= 3                                               # of the balls below the upper edge
    clips, shift = clips[room], shift[room]
    frames, moved = paint(clips), paint(clips, shift=shift)
    for measure in (reward.errors, reward.reward):
        for name, value in measure(frames, clips).items():
            torch.testing.assert_close(measure(moved, clips)[name], value, rtol=0, atol=1e-3)


@every_scenario
def test_what_happens_in_the_condition_counts_nowhere(scenario):
    clips = sim.sample(scenario, "iid", 2)
    frames = paint(clips)
    other = frames.clone()
    other[:, :3] = 1
    for measure in (reward.errors, reward.reward):
        for name, value in measure(frames, clips).items():
            assert torch.equal(value, measure(other, clips)[name])


def test_reward_is_monotone_and_bounded():
    clips = thrown([1.0])
    t = 0.1 * torch.arange(32)[:, None, None]
    values = [reward.reward(paint(clips, 64, shift=t * torch.tensor([0.0, s])), clips)["reward"].item()
              for s in (0.0, 0.1, 0.3, 0.6, 1.0)]
    assert values == sorted(values, reverse=True) and 4.9 < values[0] <= 5 and values[0] - values[1] > 0.3


@every_scenario
@pytest.mark.parametrize("horizon", [1, 8, 32])
def test_the_reward_ahead_frame_by_frame(scenario, horizon):
    """Against a loop over frames; a horizon beyond the end is the whole clip's reward at the first predicted frame."""
    clips = sim.sample(scenario, "ood", 6, seed=2)
    frames = spoil(clips)
    center, radius, found = (x[:, :, :].double() for x in reward.detect(frames, clips.radius.shape[1]))
    hit = sim.impact_time(clips) / 0.1
    result = reward.reward(frames, clips, horizon)
    for b in range(len(clips)):
        for f in range(32):
            speeds, sizes = [], []
            for n in range(clips.radius.shape[1]):
                speed, size = [], []
                for g in range(max(f, 3), min(f + horizon, 32)):
                    if clips.inside[b, g, n]:
                        size.append(min(abs(radius[b, g, n] - clips.radius[b, n]).item(), 2.0) if found[b, g, n] else 2.0)
                    across = g - 1 < hit[b] < g                          # the impact's own pair
                    if g > 3 and clips.inside[b, g, n] and clips.inside[b, g - 1, n] and not across:
                        wrong = (center[b, g, n] - center[b, g - 1, n] - clips.position[b, g, n] + clips.position[b, g - 1, n]) / 0.1
                        speed.append(min(wrong.norm().item(), 10.0) if found[b, g, n] and found[b, g - 1, n] else 10.0)
                speeds += [sum(speed) / len(speed)] if speed else []
                sizes += [sum(size) / len(size)] if size else []
            expected = 4 * math.exp(-1.4 * sum(speeds) / len(speeds)) + 1 - sum(sizes) / len(sizes) if speeds else math.nan
            assert result["ahead"][b, f].item() == pytest.approx(expected, abs=1e-4, nan_ok=True), (b, f)
    if horizon == 32:
        torch.testing.assert_close(result["ahead"][:, 3], result["reward"])
    assert reward.reward(frames, clips).keys() == {"reward", "velocity", "mass"}


# ------------------------------------------------------------------ no way of losing pays

def test_a_missing_ball_never_scores_better():
    """However fast the true ball and however wrong the painted one, painting it over makes nothing better."""
    clips = thrown([0.0, 0.2, 0.8, 1.5, 3.0, 4.5, 6.0])
    frames = paint(clips)
    generator = torch.Generator().manual_seed(0)
    corner = torch.where(torch.arange(32) % 2 == 0, 1.2, 8.8)[:, None, None].expand(7, 32, 1, 2)
    present = {
        "truth": frames, "frozen": frames[:, 2:3], "backwards": frames.flip(1),
        "shuffled": frames[:, torch.randperm(32, generator=generator)],
        "offset": paint(clips, shift=torch.tensor([0.5, 2.0])),
        "teleporting": paint(clips, shift=corner - clips.position),
        "jittering": paint(clips, shift=0.5 * noisy((7, 32, 1, 2))),
        "too large": paint(dataclasses.replace(clips, radius=3 * clips.radius))}
    for name, pictures in present.items():
        pictures = after_condition(frames, pictures)
        score, error = reward.reward(pictures, clips)["reward"], reward.errors(pictures, clips)
        for share in (1.0, 0.5, 0.05):                                   # of the frames that lose their ball
            lost = torch.rand(7, 32, 1, 1, 1, generator=generator) < share
            blank = after_condition(frames, torch.where(lost, torch.ones(()), pictures))
            assert (reward.reward(blank, clips)["reward"] <= score + 1e-5).all(), (name, share)
            worse = reward.errors(blank, clips)
            assert all((worse[key] >= error[key] - 1e-5).all() for key in ERRORS), (name, share)


@every_scenario
def test_the_order_of_wrong_videos(scenario):
    clips = sim.sample(scenario, "iid", 6)
    frames = paint(clips, 64)
    noise = (frames + 0.02 * noisy(frames.shape)).clamp(0, 1)
    frozen = frames[:, 2:3].expand_as(frames)
    order = 3 + torch.randperm(29, generator=torch.Generator().manual_seed(0))
    shuffled = frames[:, torch.cat([torch.arange(3), order])]
    white, green = torch.ones_like(frames), frames[:, :, [1, 0, 2]]
    videos = [after_condition(frames, video) for video in (frames, noise, frozen, shuffled, white)]
    velocity = [reward.errors(video, clips)["velocity_error"].mean().item() for video in videos]
    score = [reward.reward(video, clips)["reward"].mean().item() for video in videos]
    assert all(a < b - 0.005 for a, b in zip(velocity, velocity[1:])), velocity
    assert all(a > b + 0.005 for a, b in zip(score, score[1:])), score
    speed = clips.position.diff(dim=1).norm(dim=-1) / 0.1                # frozen: wrong by the true speed
    assert speed.min() < velocity[2] < speed.max()
    lost = reward.reward(after_condition(frames, green), clips)["reward"].mean()
    assert score[-1] - 1e-6 <= lost < score[1] - 1             # green for red: one ball lost, or the only one
    assert velocity[-1] == 10 and score[-1] == pytest.approx(4 * math.exp(-14) - 1)


# ------------------------------------------------------------------ bad input

CLIPS = sim.sample("uniform", "iid", 2)


@pytest.mark.parametrize("measure", [reward.errors, reward.reward])
@pytest.mark.parametrize("shape", [(2, 31, 3, 16, 16), (1, 32, 3, 16, 16), (2, 32, 4, 16, 16),
                                   (2, 32, 3, 16, 20), (2, 32, 16, 16)])
def test_wrong_shapes_are_refused(measure, shape):
    with pytest.raises(ValueError, match=re.escape(str(shape))):
        measure(torch.ones(shape), CLIPS)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_frames_with_nan_are_refused(value):
    frames = paint(CLIPS, 16)
    frames[1, 20, 0, 3, 3] = value
    for measure, truth in ((reward.detect, 1), (reward.errors, CLIPS), (reward.reward, CLIPS)):
        with pytest.raises(ValueError, match="NaN"):
            measure(frames, truth)


def test_detect_refuses():
    with pytest.raises(ValueError, match="n_balls = 3"):
        reward.detect(torch.ones(1, 1, 3, 16, 16), 3)
    with pytest.raises(ValueError, match=r"\(3, 16, 16\)"):
        reward.detect(torch.ones(3, 16, 16), 1)


def test_a_clip_in_which_nothing_counts_is_nan():
    clips = sim.sample("parabola", "iid", 3)
    clips.inside[1, 3:] = False
    frames = paint(clips)
    for measure in (reward.errors, reward.reward):
        for name, value in measure(frames, clips).items():
            assert value.isnan().tolist() == [False, True, False], name


# ------------------------------------------------------------------ evaluation

def freeze(frames):
    """A 'model' that repeats the last frame it was shown."""
    return torch.cat([frames, frames[:, -1:].expand(-1, 32 - frames.shape[1], -1, -1, -1)], 1)


def test_evaluate_by_hand():
    result = reward.evaluate(freeze, "parabola", "iid", 7, seed=5, size=32, batch=3)
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

    reward.evaluate(predict, "collision", "ood", 5, size=16, batch=4)
    clips = sim.sample("collision", "ood", 5)
    assert [len(frames) for frames in seen] == [4, 1]
    assert torch.equal(torch.cat(seen), paint(clips, 16)[:, :3])


def test_evaluate_measures_8_bit_pictures():
    def result(predict):
        return reward.evaluate(predict, "uniform", "iid", 2, size=32, shown=32)

    assert result(lambda frames: frames - 0.4 / 255) == result(lambda frames: frames)          # rounded
    assert result(lambda frames: 3 * frames - 1) == result(lambda frames: (3 * frames - 1).clamp(0, 1))


def test_evaluate_counts_clips_that_cannot_be_measured():
    """Of collisions with both balls out of distribution, a few leave the view in the moment of the impact."""
    clips = sim.sample("collision", "ood-all", 80)
    frame = torch.arange(31)
    after = (frame >= (sim.impact_time(clips) / 0.1)[:, None]) & (frame >= 3)
    seen = (clips.inside[:, 1:] & clips.inside[:, :-1] & after[..., None]).any(2).any(1)
    result = reward.evaluate(lambda frames: frames, "collision", "ood-all", 80, size=16, shown=32)
    assert 0 < result["left_out"] == (~seen).sum() and result["n"] == seen.sum()
    assert all(math.isfinite(value) for value in result.values())


@pytest.mark.parametrize("predict, culprit", [
    (lambda frames: frames, r"\(2, 3, 3, 16, 16\)"),
    (lambda frames: freeze(frames)[:1], r"\(1, 32, 3, 16, 16\)"),
    (lambda frames: freeze(frames)[:, :, :1], r"\(2, 32, 1, 16, 16\)"),
    (lambda frames: freeze(frames) * math.nan, "NaN")])
def test_evaluate_refuses_a_wrong_prediction(predict, culprit):
    with pytest.raises(ValueError, match=culprit):
        reward.evaluate(predict, "uniform", "iid", 2, size=16)


def test_evaluate_refuses_bad_arguments():
    for arguments, culprit in ((("uniform", "iid", 0), "n = 0"), (("uniform", "nope", 1), "nope"),
                               (("rotation", "iid", 1), "rotation")):
        with pytest.raises(ValueError, match=culprit):
            reward.evaluate(freeze, *arguments)


# ------------------------------------------------------------------ the table of results

def test_difference_is_clip_by_clip(tmp_path):
    """Against numpy, on results written by hand; a clip that one of the two could not measure counts in neither."""
    a = {"reward": [1.0, 2.0, 4.0, math.nan], "drift_error": [0.5, 0.25, 1.0, 0.1]}
    b = {"reward": [1.5, 2.25, 4.5, 2.0], "drift_error": [0.25, 0.25, math.nan, 0.1]}
    path = tmp_path / "results.json"
    path.write_text(json.dumps({row: {"uniform": {"iid": {"each": each}}} for row, each in (("A", a), ("B", b))}))
    line = next(line for line in reward.difference(path, "A", "B").splitlines() if "uniform, iid" in line)
    numbers = [float(x) for x in re.findall(r"[-+]?\d+\.\d+", line)]
    up, down = np.array([0.5, 0.25, 0.5]), np.array([-0.25, 0, 0])
    expected = [x for d in (up, down) for x in (d.mean(), d.std(ddof=1) / 3 ** 0.5,
                                                d.mean() / (d.std(ddof=1) / 3 ** 0.5))]
    np.testing.assert_allclose(np.abs(numbers), np.abs(expected), atol=0.051)
    np.testing.assert_allclose([numbers[0], numbers[3]], [up.mean(), down.mean()], atol=6e-4)


@pytest.mark.parametrize("n", [1, 2])
def test_difference_of_equal_or_single_clips(tmp_path, n):
    each = {"reward": [1.0] * n, "drift_error": [0.5] * n}
    path = tmp_path / "results.json"
    path.write_text(json.dumps({row: {"uniform": {"iid": {"each": each}}} for row in "AB"}))
    assert "+0.000" in reward.difference(path, "A", "B") and "nan" in reward.difference(path, "A", "B")


def test_a_table_is_continued_not_measured_again(tmp_path):
    path, calls = tmp_path / "results.json", []

    def predict(frames):
        calls.append(len(frames))
        return freeze(frames)

    reward.add_row(path, "no motion", predict, ["uniform"], ("iid",), 3, size=16)
    reward.add_row(path, "no motion", predict, ["uniform"], ("iid", "slow"), 3, size=16)
    assert calls == [3, 3]                                               # iid once, slow once
    before = path.read_text()
    reward.add_row(path, "no motion", predict, ["uniform"], ("iid", "slow"), 3, size=16)
    assert calls == [3, 3] and path.read_text() == before
    reward.add_row(path, "no motion", predict, ["uniform"], ("iid",), 4, size=16)
    reward.add_row(path, "no motion", predict, ["uniform"], ("iid",), 4, size=24)
    assert calls == [3, 3, 4, 4]                                   # more clips or larger pictures: measured anew
    reward.add_row(path, "truth", lambda frames: frames, ["uniform"], ("iid",), 3, size=16, shown=32)
    results = json.loads(path.read_text())
    assert results["no motion"]["uniform"]["slow"]["velocity_error"] == pytest.approx(
        reward.evaluate(freeze, "uniform", "slow", 3, reward.EVAL_SEED, size=16)["velocity_error"])
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]

    text = reward.table(path)
    blocks = [block.splitlines() for block in text.strip().split("\n\n")]
    assert [block[0].split("  ")[0] for block in blocks] == ["uniform, iid", "uniform, slow"]
    names = [[line.split("  ")[1] for line in block[1:]] for block in blocks]
    assert names == [["no motion", "truth"], ["no motion"]]
    assert f"{results['truth']['uniform']['iid']['reward']:.3f}" in blocks[0][2]

    reward.drop_rows(path, "no motion")
    assert set(json.loads(path.read_text())) == {"truth"}
    reward.drop_rows(path, "never there")
    reward.drop_rows(tmp_path / "none.json", "truth")
    assert set(json.loads(path.read_text())) == {"truth"} and not (tmp_path / "none.json").exists()
    reward.add_row(path, "no motion", predict, ["uniform"], ("iid",), 3, size=16)
    assert len(calls) == 5
    reward.drop_rows(path, "no motion", "truth")
    assert json.loads(path.read_text()) == {}


# ------------------------------------------------------------------ the command

def run(*arguments):
    return subprocess.run([sys.executable, "reward.py", *arguments], cwd=ROOT, capture_output=True, text=True)


def test_command():
    done = run("--size", "32", "--n", "2")
    assert done.returncode == 0, done.stderr
    for word in (*sim.SCENARIOS, "truth", "noise", "blur", "frozen", "shuffled", "all white", "truth, ood"):
        assert word in done.stdout


@pytest.mark.parametrize("arguments, culprit", [(("--n", "0"), "n = 0"), (("--size", "3"), "--size 3"),
                                                (("--n", "x"), "'x'")])
def test_command_refuses(arguments, culprit):
    done = run(*arguments)
    assert done.returncode == 2 and culprit in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
