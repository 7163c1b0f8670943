"""
Detection, errors and reward: precision, the definitions against plain loops, and that losing a ball
never pays.

    pytest tests/test_reward.py

Takes 6 seconds on one CPU core.
"""
import dataclasses
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import evaluate
import reward
import sim

ROOT = Path(__file__).parents[1]
ERRORS = ("velocity_error", "drift_error", "radius_error", "missing")
every_scenario = pytest.mark.parametrize("scenario", sim.SCENARIOS)


def paint(clips, size=32, shift=0.0):
    """The clips as 8-bit frames, their centres moved by `shift`, broadcast to (B, F, N, 2)."""
    return stored(sim.render(clips.position + shift, clips.radius, size))


def stored(frames):
    return sim.to_uint8(frames).float() / 255


def after_condition(frames, predicted):
    return torch.cat([frames[:, :3], predicted.expand_as(frames)[:, 3:]], 1)


def noisy(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def thrown(speeds, radius=1.0):
    """Uniform clips of one ball with these speeds, from the left edge."""
    B = len(speeds)
    radius = torch.full((B, 1), radius).double()
    velocity = torch.tensor(speeds).double()[:, None]
    start = torch.tensor([1.2, 5.1]).double().expand(B, 1, 1, 2)
    return sim.play(sim.Clips("uniform", radius, velocity, start, torch.ones(B, 1, 1).bool()))


# ------------------------------------------------------------------ precision

@every_scenario
@pytest.mark.parametrize("split", ["iid", "ood"])
def test_perfect_frames(scenario, split):
    result = evaluate.evaluate(lambda frames: frames, scenario, split, 8,
                               size=128, shown=32, batch=4)
    assert result["velocity_error"] <= 0.005 and result["radius_error"] <= 0.005
    assert result["missing"] == 0 and result["reward"] > 4.97


@every_scenario
def test_noisy_frames(scenario):
    clips = sim.sample(scenario, "iid", 4)
    frames = sim.render(clips.position, clips.radius, 128)
    frames = frames + 0.02 * noisy(frames.shape)
    for pictures in (frames, stored(frames)):
        error = reward.errors(pictures, clips)
        assert error["velocity_error"].mean() <= 0.06
        assert error["radius_error"].mean() <= 0.02
        assert (error["missing"] == 0).all()


@pytest.mark.parametrize("size, close", [(32, 0.02), (128, 0.002)])
def test_detect_finds_exact_balls(size, close):
    generator = torch.Generator().manual_seed(0)
    radius = 0.3 + 0.9 * torch.rand(32, 2, generator=generator)
    position = 2 * torch.rand(32, 1, 2, 2, generator=generator)
    position += torch.tensor([[1.5, 4.0], [6.2, 4.0]])                   # red left, blue right
    painted = sim.render(position, radius, size)
    for frames in (painted, stored(painted)):
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
    center, found_radius, found = reward.detect(stored(sim.render(position, radius, 128)), 2)
    assert found.all()
    assert (center - position).abs().max() < 0.003
    assert (found_radius - radius).abs().max() < 0.003


def test_the_smallest_ball_is_found_anywhere_at_32_pixels():
    position = 5 + 10 / 32 * torch.rand(200, 1, 1, 2, generator=torch.Generator().manual_seed(0))
    frames = sim.render(position, torch.full((200, 1), 0.3), 32)
    center, _, found = reward.detect(stored(frames), 1)
    assert found.all() and (center - position).norm(dim=-1).max() < 0.03


def detect_everywhere(frame, blue):
    """One ball of one frame (3, H, W), as the head of reward.detect says -> x, y, r in pixels."""
    red, green, other = frame
    if blue:
        red, other = other, red
    coverage = (red - green).minimum(1 - other).double()
    y, x = torch.meshgrid(2 * [torch.arange(frame.shape[-1]).double() + 0.5], indexing="ij")
    rough = coverage > 0.5
    if not rough.any():
        return None
    distance = torch.hypot(x - x[rough].mean(), y - y[rough].mean())
    reach = (rough.sum() / math.pi).sqrt() + 2
    assert (distance - reach).abs().min() > 1e-5             # else: take another seed
    weight = coverage.where(distance <= reach, 0)
    area = weight.sum()
    if area < math.pi * (0.15 * frame.shape[-1] / 10) ** 2:
        return None
    return (weight * x).sum() / area, (weight * y).sum() / area, (area / math.pi).sqrt()


def strange_frames(size, generator):
    """Noise; patches of colour; stripes; and a half disc, which its circle overhangs the most."""
    axis = torch.arange(size)
    noise = torch.rand(4, 3, size, size, generator=generator)
    patches = torch.rand(12, 3, 4, 4, generator=generator).round()
    patches = torch.nn.functional.interpolate(patches, size=size, mode="bilinear")
    disc = (axis - size // 2) ** 2 + (axis[:, None] - size // 2) ** 2 < (size / 4) ** 2
    covered = torch.stack([(axis % 5 < 2).expand(size, size), (axis < 2).expand(size, size),
                           disc & (axis >= size // 2), disc & (axis <= size // 2)])
    covered = torch.cat([covered, covered.mT])[:, None].float()
    paler = 0.4 * torch.rand(8, 1, size, size, generator=generator)      # never half covered
    red = 1 - (covered + paler).clamp(max=1) * torch.tensor([0.0, 1, 1])[:, None, None]
    return torch.cat([noise, patches, red, red.flip(1)])                 # red, blue


@pytest.mark.parametrize("size", [8, 21, 64])
def test_windows_hold_all_that_detect_needs(size):
    """Whatever is in the frames, alone or beside others, against a plain loop."""
    generator = torch.Generator().manual_seed(size)
    frames = strange_frames(size, generator)
    count = 0
    for batch in (frames[None], frames[:, None], *frames[:, None, None]):    # (B, F, 3, H, W)
        center, radius, found = (x.flatten(0, 1) for x in reward.detect(batch, 2))
        for i, frame in enumerate(batch.flatten(0, 1)):
            for n in range(2):
                expected = detect_everywhere(frame, blue=n == 1)
                assert found[i, n] == (expected is not None)
                if expected is not None:
                    x, y, r = (10 / size * value for value in expected)
                    ours = torch.stack([*center[i, n], radius[i, n]]).double()
                    torch.testing.assert_close(ours, torch.stack([x, 10 - y, r]), rtol=0, atol=1e-4)
                    count += 1
    assert count > 30


def test_a_frame_is_measured_alike_in_any_batch():
    """Whatever size the windows have because of other frames."""
    clips = sim.sample("collision", "ood", 6)
    frames = paint(clips) + 0.02 * noisy((6, 32, 3, 32, 32))
    together = reward.detect(frames, 2)
    for i in range(6):
        for x, y in zip(reward.detect(frames[i:i + 1], 2), together):
            torch.testing.assert_close(x, y[i:i + 1], rtol=0, atol=0, equal_nan=True)


def test_gradients_of_measured_balls():
    """Of the centre by the frame, against a difference quotient."""
    frames = sim.render(torch.tensor([[[[4.1, 5.3]]]]), torch.tensor([[1.2]]), 24).double()
    frames.requires_grad_()
    center = reward.detect(frames, 1)[0][0, 0, 0, 0]
    gradient, = torch.autograd.grad(center, frames)
    step = torch.zeros_like(frames)
    step[0, 0, 1:, 9, 8] = 0.1                                           # within the disc
    change = reward.detect(frames.detach() + step, 1)[0][0, 0, 0, 0] - center.detach()
    assert (gradient * step).sum().item() == pytest.approx(change.item(), rel=0.05)


@pytest.mark.parametrize("colour", [
    (0, 1, 0), (0, 0, 0), (0, 0, 1), (0.5, 0.5, 0.5), (1, 1, 0), (0, 1, 1), (1, 0, 1)])
def test_wrong_colours_are_no_red_ball(colour):
    frames = paint(thrown([1.0, 1.4]))
    assert reward.detect(frames, 1)[2].all()
    covered = 1 - frames[:, :, 1:2]
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
    N = clips.radius.shape[1]
    center, radius, found = (x.tolist() for x in reward.detect(frames, N))
    position, true_radius = clips.position.tolist(), clips.radius.tolist()
    inside = clips.inside.tolist()
    result = {name: [] for name in ERRORS}
    for b in range(len(clips)):
        of_balls = {name: [] for name in ERRORS}
        for i in range(N):
            pairs = [f for f in range(3, 31) if inside[b][f][i] and inside[b][f + 1][i]]
            if clips.scenario == "collision":
                gap = position[b][0][1][0] - position[b][0][0][0] - sum(true_radius[b])
                impact = gap / clips.velocity[b].sum().item()
                pairs = [f for f in pairs if 0.1 * f >= impact
                         or not after_impact and 0.1 * (f + 1) <= impact]
            speed, drift, lost = 0.0, [0.0, 0.0], 0
            for f in pairs:
                if not (found[b][f][i] and found[b][f + 1][i]):
                    speed += 10
                    lost += 1
                    continue
                off = []
                for k in (0, 1):
                    v = (center[b][f + 1][i][k] - center[b][f][i][k]) / 0.1
                    true_v = (position[b][f + 1][i][k] - position[b][f][i][k]) / 0.1
                    off.append(v - true_v)
                length = math.hypot(*off)
                shrink = min(1, 10 / length) if length else 1            # to 10 at most
                speed += length * shrink
                drift = [drift[k] + off[k] * shrink for k in (0, 1)]
            if pairs:
                of_balls["velocity_error"].append(speed / len(pairs))
                of_balls["drift_error"].append((math.hypot(*drift) + 10 * lost) / len(pairs))
            counted = [f for f in range(3, 32) if inside[b][f][i]]
            sizes = [min(2, abs(radius[b][f][i] - true_radius[b][i])) if found[b][f][i] else 2
                     for f in counted]
            missing = [not found[b][f][i] for f in counted]
            if counted:
                of_balls["radius_error"].append(sum(sizes) / len(counted))
                of_balls["missing"].append(sum(missing) / len(counted))
        for name, values in of_balls.items():
            result[name].append(sum(values) / len(values) if values else math.nan)
    return {name: torch.tensor(values) for name, values in result.items()}


def spoil(clips, seed=0):
    """Frames in which centres wander, one ball jumps, and balls are missing now and then."""
    wander = 0.05 * noisy(clips.position.shape, seed).cumsum(1).double()
    wander[:, 10, 0, 0] += 2.5
    frames = paint(clips, shift=wander)
    gone = torch.rand(frames.shape[:2], generator=torch.Generator().manual_seed(seed)) < 0.1
    even = torch.arange(32) % 2 == 0
    no_red = (gone & even)[:, :, None, None]
    empty = (gone & ~even)[:, :, None, None, None]
    frames[:, :, 1] = torch.where(no_red, frames[:, :, 0], frames[:, :, 1])
    frames[:, :, 2] = torch.where(no_red, 1.0, frames[:, :, 2])
    return torch.where(empty, 1.0, frames)


@pytest.mark.parametrize("scenario, split", [
    ("uniform", "ood"), ("parabola", "iid"), ("parabola", "fast"), ("collision", "iid"),
    ("collision", "ood-all")])
def test_errors_equal_a_plain_loop(scenario, split):
    clips = sim.sample(scenario, split, 12)
    frames = spoil(clips)
    _, _, found = reward.detect(frames, clips.radius.shape[1])
    assert not found.all()
    error = reward.errors(frames, clips)
    expected = by_hand(frames, clips, after_impact=True)
    assert set(error) == set(ERRORS)
    for name in ERRORS:
        assert error[name].shape == (12,)
        torch.testing.assert_close(error[name].float(), expected[name],
                                   rtol=1e-4, atol=1e-4, equal_nan=True)
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
    assert (error["velocity_error"] - 2).abs().max() < 0.02              # 0.2 units every 0.1 s
    assert error["drift_error"].max() < 0.1


def test_before_the_impact_only_the_reward_looks():
    clips = sim.sample("collision", "iid", 6)
    impact = (sim.impact_time(clips) / 0.1)[:, None]                     # in frames
    frame = torch.arange(32)
    wobble = 0.05 * (-1.0) ** frame * (frame + 1 < impact)               # not in the impact's pair
    frames, moved = paint(clips), paint(clips, shift=wobble[:, :, None, None])
    expected, error = reward.errors(frames, clips), reward.errors(moved, clips)
    assert torch.equal(expected["velocity_error"], error["velocity_error"])
    assert torch.equal(expected["drift_error"], error["drift_error"])
    best, score = reward.reward(frames, clips), reward.reward(moved, clips)
    assert (score["velocity"] < best["velocity"] - 0.1).all()


def test_the_impacts_own_pair_counts_nowhere():
    clips = sim.sample("collision", "iid", 6)
    impact = (sim.impact_time(clips) / 0.1)[:, None]
    pixels = 2 * 10 / 32                                                 # whole ones: no rounding
    shift = pixels * (torch.arange(32) >= impact)[:, :, None, None] * torch.tensor([0.0, 1.0])
    top = (clips.position + shift)[..., 1] + clips.radius[:, None]
    room = (top < 10).all(-1).all(-1)
    assert room.sum() >= 3
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
    values = []
    for s in (0.0, 0.1, 0.3, 0.6, 1.0):
        frames = paint(clips, 64, shift=t * torch.tensor([0.0, s]))
        values.append(reward.reward(frames, clips)["reward"].item())
    assert values == sorted(values, reverse=True)
    assert 4.9 < values[0] <= 5 and values[0] - values[1] > 0.3


@every_scenario
@pytest.mark.parametrize("horizon", [1, 8, 32])
def test_the_reward_ahead_frame_by_frame(scenario, horizon):
    """Against a loop over frames. A horizon of 32 gives the whole clip's reward at frame 3."""
    clips = sim.sample(scenario, "ood", 6, seed=2)
    frames = spoil(clips)
    N = clips.radius.shape[1]
    center, radius, found = (x.double() for x in reward.detect(frames, N))
    speed = ((center - clips.position).diff(dim=1) / 0.1).norm(dim=-1).clamp(max=10)
    size = (radius - clips.radius[:, None]).abs().clamp(max=2)
    hit = sim.impact_time(clips) / 0.1
    result = reward.reward(frames, clips, horizon)

    def mean(of_balls):                                                  # over time, then balls
        means = [sum(x) / len(x) for x in of_balls if x]
        return sum(means) / len(means) if means else math.nan

    for b in range(len(clips)):
        for f in range(32):
            speeds, sizes = [[] for _ in range(N)], [[] for _ in range(N)]
            for n in range(N):
                for g in range(max(f, 3), min(f + horizon, 32)):
                    if clips.inside[b, g, n]:
                        sizes[n].append(size[b, g, n].item() if found[b, g, n] else 2)
                    at_impact = g - 1 < hit[b] < g
                    in_view = clips.inside[b, g, n] and clips.inside[b, g - 1, n]
                    if g > 3 and in_view and not at_impact:
                        both = found[b, g, n] and found[b, g - 1, n]
                        speeds[n].append(speed[b, g - 1, n].item() if both else 10)
            expected = 4 * math.exp(-1.4 * mean(speeds)) + 1 - mean(sizes)
            value = result["ahead"][b, f].item()
            assert value == pytest.approx(expected, abs=1e-4, nan_ok=True), (b, f)
    if horizon == 32:
        torch.testing.assert_close(result["ahead"][:, 3], result["reward"])
    assert reward.reward(frames, clips).keys() == {"reward", "velocity", "mass"}


# ------------------------------------------------------------------ no way of losing pays

def test_a_missing_ball_never_scores_better():
    """However fast the true ball and however wrong the painted one."""
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
        for share in (1.0, 0.5, 0.05):                                   # of frames without ball
            lost = torch.rand(7, 32, 1, 1, 1, generator=generator) < share
            blank = after_condition(frames, torch.where(lost, 1.0, pictures))
            assert (reward.reward(blank, clips)["reward"] <= score + 1e-5).all(), (name, share)
            worse = reward.errors(blank, clips)
            for key in ERRORS:
                assert (worse[key] >= error[key] - 1e-5).all(), (name, share)


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
    speed = clips.position.diff(dim=1).norm(dim=-1) / 0.1                # the error of frozen
    assert speed.min() < velocity[2] < speed.max()
    lost = reward.reward(after_condition(frames, green), clips)["reward"].mean()
    assert score[-1] - 1e-6 <= lost < score[1] - 1                       # one ball of one or two
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


@pytest.mark.parametrize("spoil, culprit", [
    (lambda frames: 2 * frames - 1, "from -1 to 1"),
    (lambda frames: 255 * frames, "from 0 to 255"),
    (lambda frames: 255 * frames.double(), "from 0 to 255"),
    (sim.to_uint8, "uint8"), (lambda frames: frames > 0.5, "bool"),
    (lambda frames: frames[..., :0, :0], "there is none")])
def test_frames_of_another_range_are_refused(spoil, culprit):
    frames = spoil(paint(CLIPS, 16))
    for measure, truth in ((reward.detect, 1), (reward.errors, CLIPS), (reward.reward, CLIPS)):
        with pytest.raises(ValueError, match=culprit):
            measure(frames, truth)


def test_frames_of_any_float_type_are_measured():
    frames = paint(CLIPS, 32)
    for dtype, close in ((torch.float64, 1e-6), (torch.float16, 0.01), (torch.bfloat16, 0.05)):
        difference = (reward.reward(frames.to(dtype), CLIPS)["reward"]
                      - reward.reward(frames, CLIPS)["reward"])
        assert difference.abs().max() < close


def test_what_does_not_belong_together_is_refused():
    frames = paint(CLIPS, 16)
    with pytest.raises(ValueError, match="sim.play"):
        reward.errors(frames, sim.first_frames("uniform", "iid", 2))
    with pytest.raises(ValueError, match="balls"):
        reward.errors(frames, CLIPS, reward.detect(frames, 2))
    for horizon in (-1, 33):
        with pytest.raises(ValueError, match=f"horizon = {horizon}"):
            reward.reward(frames, CLIPS, horizon)


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


# ------------------------------------------------------------------ the command

def test_command():
    command = [sys.executable, "reward.py", "--size", "32", "--n", "2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    videos = ("truth", "noise", "blur", "frozen", "shuffled", "all white", "truth, ood")
    for word in (*sim.SCENARIOS, *videos):
        assert word in done.stdout


@pytest.mark.parametrize("arguments, culprit", [
    (["--n", "0"], "n = 0"), (["--n", str(10 ** 12)], f"n = {10 ** 12}"), (["--n", "x"], "'x'"),
    (["--size", "3"], "--size 3"), (["--size", "20000"], "--size 20000")])
def test_command_refuses(arguments, culprit, capsys):
    with pytest.raises(SystemExit) as stopped:
        reward.main(arguments)
    assert stopped.value.code == 2 and culprit in capsys.readouterr().err.splitlines()[-1]
