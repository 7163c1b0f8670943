"""
Clips of moving balls: splits, start rules, physics against the closed form, frames.

    pytest tests/test_sim.py

Takes 15 seconds on one CPU core, mostly to simulate 600 clips of every split.
"""
import math
import subprocess
import sys
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sim

ROOT = Path(__file__).parents[1]

# ------------------------------------------------------------------ what the paper says

# Phys-AR, section 4.1: radii and speeds as unions of intervals.
PAPER = {
    "pretrain": ([(0.8, 1.4)], [(1.5, 3.5)]),
    "posttrain": ([(0.7, 0.8), (1.4, 1.5)], [(1.0, 1.5), (3.5, 4.0)]),
    "iid": ([(0.7, 1.5)], [(1.0, 4.0)]),
    "ood": ([(0.3, 0.6), (1.5, 2.0)], [(0.0, 0.8), (4.5, 6.0)]),
}
R, V = PAPER["iid"]
OUT_R, OUT_V = PAPER["ood"]
SLOW, FAST = OUT_V[:1], OUT_V[1:]
SMALL, LARGE = OUT_R[:1], OUT_R[1:]

# split -> the ranges of the radius of each ball, then of the speed of each ball
IN_RANGE = ("pretrain", "posttrain", "iid")
ONE_BALL = {name: PAPER[name] for name in IN_RANGE} | {
    "ood-r": (OUT_R, V),
    "ood-v": (R, OUT_V),
    "ood-rv": (OUT_R, OUT_V),
    "slow": (R, SLOW),
    "fast": (R, FAST),
    "small": (SMALL, V),
    "large": (LARGE, V),
}
TWO_BALLS = {name: (r, r, v, v) for name, (r, v) in PAPER.items() if name in IN_RANGE} | {
    "ood-r1": (OUT_R, R, V, V),
    "ood-v1": (R, R, OUT_V, V),
    "ood-r1r2": (OUT_R, OUT_R, V, V),
    "ood-v1v2": (R, R, OUT_V, OUT_V),
    "ood-r1v1": (OUT_R, R, OUT_V, V),
    "ood-all": (OUT_R, OUT_R, OUT_V, OUT_V),
    "slow": (R, R, SLOW, V),
    "fast": (R, R, FAST, V),
    "small": (SMALL, R, V, V),
    "large": (LARGE, R, V, V),
}
RANGES = {"uniform": ONE_BALL, "parabola": ONE_BALL, "collision": TWO_BALLS}
LEVELS = {scenario: {name: x for name, x in ranges.items() if name.startswith("ood-")}
          for scenario, ranges in RANGES.items()}

NAMED = [(scenario, split) for scenario in RANGES for split in RANGES[scenario]]
OOD = [(scenario, "ood") for scenario in RANGES]
every_split = pytest.mark.parametrize("scenario, split", NAMED + OOD)
every_scenario = pytest.mark.parametrize("scenario", sim.SCENARIOS)


@lru_cache(None)
def clips_of(scenario, split):
    return sim.sample(scenario, split, 600)


def run(*arguments):
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def states(clips):
    """Initial states as `simulate` takes them."""
    return clips.radius, clips.velocity, clips.position[:, 0]


# ------------------------------------------------------------------ splits

@every_scenario
def test_split_names(scenario):
    assert set(sim.splits(scenario)) == set(RANGES[scenario])
    assert set(sim.levels(scenario)) == set(LEVELS[scenario])


@pytest.mark.parametrize("scenario, split", NAMED)
def test_radius_and_speed_fill_their_ranges(scenario, split):
    clips = clips_of(scenario, split)
    drawn = [*clips.radius.T, *clips.velocity.T]
    for values, intervals in zip(drawn, RANGES[scenario][split], strict=True):
        inside_any = torch.zeros(len(clips), dtype=torch.bool)
        for lo, hi in intervals:
            inside = (values >= lo - 1e-9) & (values <= hi + 1e-9)
            inside_any |= inside
            near = 0.06 * (hi - lo)                              # both ends are reached
            assert values[inside].min() < lo + near
            assert values[inside].max() > hi - near
        assert inside_any.all()


@every_scenario
def test_ood_is_every_level_in_equal_shares(scenario):
    """A clip's level is known from which of its values are out of distribution."""
    clips = clips_of(scenario, "ood")
    N = clips.radius.shape[1]
    values = torch.cat([clips.radius, clips.velocity], 1)                # (B, 2 N)
    low, high = torch.tensor([R[0]] * N + [V[0]] * N).T
    outside = (values < low) | (values > high)
    found, count = outside.unique(dim=0, return_counts=True)
    expected = {tuple(x in (OUT_R, OUT_V) for x in ranges) for ranges in LEVELS[scenario].values()}
    assert set(map(tuple, found.tolist())) == expected
    assert count.max() - count.min() <= 1


@every_scenario
def test_a_seed_names_its_clips(scenario):
    clips, again = (sim.sample(scenario, "iid", 20, seed=1) for _ in range(2))
    for name in ("radius", "velocity", "position", "inside"):
        assert torch.equal(getattr(clips, name), getattr(again, name))
    others = [sim.sample(scenario, "iid", 20, seed=2), sim.sample(scenario, "pretrain", 20, seed=1)]
    if scenario == "parabola":
        others.append(sim.sample("uniform", "iid", 20, seed=1))
    for other in others:
        assert not torch.isin(other.velocity, clips.velocity).any()


def test_a_seed_names_its_clips_in_every_process():
    code = "import sim; print(sim.sample('collision', 'ood', 12, seed=3).position.tolist())"
    clips = sim.sample("collision", "ood", 12, seed=3)
    assert run("-c", code).stdout.strip() == str(clips.position.tolist())


# ------------------------------------------------------------------ start rules (PhyWorld's)

def spread(value, low, high):
    """The values lie in [low, high] and, taken over the clips, fill it evenly."""
    assert (value >= low - 1e-9).all() and (value <= high + 1e-9).all()
    share = (value - low) / (high - low)
    assert abs(share.mean() - 0.5) < 0.06
    assert share.min() < 0.03 and share.max() > 0.97


@pytest.mark.parametrize("scenario, split", [x for x in NAMED + OOD if x[0] != "collision"])
def test_start_of_one_ball(scenario, split):
    clips = clips_of(scenario, split)
    r, v = clips.radius[:, 0], clips.velocity[:, 0]
    x, y = clips.position[:, 0, 0].unbind(-1)
    assert (clips.position[:, 1, 0, 0] >= x).all()                       # it moves right
    limit = 10 - (2.4 * v + r)                                           # in view for 24 frames
    spread(x, r, torch.where(limit >= r, limit, r + 0.5))
    spread(y, r + 0.5 if scenario == "uniform" else 8.5 - r, 9.5 - r)


@pytest.mark.parametrize("split", [*TWO_BALLS, "ood"])
def test_start_of_a_collision(split):
    clips = clips_of("collision", split)
    r1, r2 = clips.radius.T
    closing, touch, largest = clips.velocity.sum(1), r1 + r2, r1.maximum(r2)
    x1, x2 = clips.position[:, 0, :, 0].T
    y1, y2 = clips.position[:, 0, :, 1].T
    next1, next2 = clips.position[:, 1, :, 0].T
    assert (next1 >= x1).all() and (next2 <= x2).all()                   # towards each other
    assert torch.equal(y1, y2)
    spread(y1, largest + 0.5, 9.5 - largest)
    distance = x2 - x1
    spread(distance, 0.8 * closing + touch, (2.4 * closing + touch).minimum(10 - touch))
    spread(x1, r1, 10 - r2 - distance)
    impact = (distance - touch) / closing / 0.1                          # in frames
    assert impact.min() >= 7 and impact.max() < 24 + 1e-9


@every_split
def test_every_clip_can_be_measured(scenario, split):
    clips = clips_of(scenario, split)
    to_edge = torch.minimum(clips.position, 10 - clips.position).amin(-1)
    assert torch.equal(clips.inside, to_edge >= clips.radius[:, None])
    assert clips.inside[:, :3].all()                                     # the condition
    pair = clips.inside[:, 3:-1] & clips.inside[:, 4:]                   # predicted and in view
    if scenario == "collision":
        x1, x2 = clips.position[:, 0, :, 0].T
        gap = x2 - x1 - clips.radius.sum(1)
        impact = (gap / clips.velocity.sum(1) / 0.1)[:, None]
        frame = torch.arange(3, 31)
        pair &= ((frame + 1 <= impact) | (frame >= impact))[..., None]
    assert pair.any(2).any(1).all()


# ------------------------------------------------------------------ physics

@every_split
def test_positions_match_the_closed_form(scenario, split):
    clips = clips_of(scenario, split)
    off = (clips.position - sim.closed_form(clips)).norm(dim=-1).max()
    assert off <= (0.01 if scenario == "collision" else 1e-9)


@every_scenario
def test_closed_form_by_hand(scenario):
    """Against a loop over the textbook formulas."""
    clips = sim.sample(scenario, "iid", 5)
    expected = torch.zeros(5, 32, clips.radius.shape[1], 2, dtype=torch.float64)
    for b in range(5):
        r, v, start = (x[b].tolist() for x in states(clips))
        for f in range(32):
            t = 0.1 * f
            if scenario != "collision":
                (x, y), fall = start[0], 2.5 if scenario == "parabola" else 0.0
                expected[b, f, 0, 0] = x + v[0] * t
                expected[b, f, 0, 1] = y - fall * t * t / 2
                continue
            (x1, y), (x2, _) = start
            m1, m2, u1, u2 = r[0] ** 2, r[1] ** 2, v[0], -v[1]
            w1 = ((m1 - m2) * u1 + 2 * m2 * u2) / (m1 + m2)
            w2 = ((m2 - m1) * u2 + 2 * m1 * u1) / (m1 + m2)
            hit = (x2 - x1 - r[0] - r[1]) / (u1 - u2)
            before, after = min(t, hit), max(t - hit, 0)
            expected[b, f, 0, 0] = x1 + u1 * before + w1 * after
            expected[b, f, 1, 0] = x2 + u2 * before + w2 * after
            expected[b, f, :, 1] = y
    assert (sim.closed_form(clips) - expected).abs().max() < 1e-9


@pytest.mark.parametrize("split", [*TWO_BALLS, "ood"])
def test_collisions_keep_momentum_and_energy(split):
    clips = clips_of("collision", split)
    velocity = clips.position.diff(dim=1) / 0.1                          # (B, F-1, N, 2)
    mass = (clips.radius ** 2)[:, None, :, None]
    momentum, energy = (mass * velocity).sum(2), (mass * velocity ** 2).sum((2, 3))
    scale = (mass * velocity).norm(dim=-1).sum(2)[:, 0]                  # |p1| + |p2|
    impact = sim.impact_time(clips)[:, None] / 0.1
    after = torch.arange(31) >= impact + 0.01                            # noticed one step late
    assert after.any(1).all()
    change = (momentum - momentum[:, :1]).norm(dim=-1) / scale[:, None]
    assert change[after].max() < 1e-6
    assert (energy / energy[:, :1] - 1)[after].abs().max() < 1e-6
    assert ((velocity[:, 0] - velocity[:, -1]).norm(dim=-1) > 0.01).all()


@every_scenario
def test_clips_in_one_space_equal_a_space_per_clip(scenario):
    radius, velocity, start = states(sim.sample(scenario, "ood", 40))
    together = sim.simulate(scenario, radius, velocity, start)
    apart = sim.simulate(scenario, radius, velocity, start, scenes=1)
    assert (together - apart).abs().max() < 1e-10             # y + offset is rounded a little more
    sevens = sim.simulate(scenario, radius, velocity, start, scenes=7)
    assert torch.equal(sevens[..., 0], apart[..., 0])


@pytest.mark.parametrize("heights", [[[9.9, 9.9], [0.1, 0.1]], [[8.0, 7.0], [1.2, 1.2]]],
                         ids=["half out of view", "not head-on"])
def test_clips_in_one_space_never_touch(heights):
    """Starts with which they could are refused, or simulated as if each clip were alone."""
    radius, velocity = torch.ones(2, 2), torch.tensor([[4.0, 4.0], [0.5, 0.5]])
    start = torch.stack([torch.tensor([[2.0, 7.0], [2.5, 7.0]]), torch.tensor(heights)], -1)
    try:
        apart = sim.simulate("collision", radius, velocity, start, scenes=1)
        together = sim.simulate("collision", radius, velocity, start)
    except ValueError as error:
        assert "start" in str(error)
    else:
        assert (together - apart).abs().max() < 1e-9


# ------------------------------------------------------------------ bad input

@pytest.mark.parametrize("arguments, culprit", [
    (("rotation", "iid", 1), "rotation"),
    (("uniform", "oood", 1), "oood"),
    (("uniform", "ood-r1", 1), "ood-r1"),
    (("collision", "ood-rv", 1), "ood-rv"),
    (("uniform", "iid", 0), "n = 0"),
    (("uniform", "iid", -3), "n = -3"),
    (("uniform", "iid", 10 ** 12), "n = 1000000000000"),
    (("uniform", "iid", 1, -1), "seed = -1")])
def test_sample_refuses(arguments, culprit):
    with pytest.raises(ValueError, match=culprit):
        sim.sample(*arguments)


NAN, INF = math.nan, math.inf
GOOD = {"radius": [[1.0]], "velocity": [[2.0]], "start": [[[3.0, 5.0]]]}


@pytest.mark.parametrize("bad, culprit", [
    ({"radius": [[NAN]]}, "radius"),
    ({"radius": [[-1.0]]}, "radius"),
    ({"radius": [[0.0]]}, "radius"),
    ({"radius": [[INF]]}, "radius"),
    ({"radius": [[1e-170]]}, "radius must be at least"),
    ({"radius": [[1e300]]}, "start must lie within the view's height"),
    ({"velocity": [[1e300]]}, "velocity.* from 0 to"),
    ({"velocity": [[INF]]}, "velocity"),
    ({"start": [[[1e300, 5.0]]]}, "start must lie within"),
    ({"start": [[[-INF, 5.0]]]}, "start"),
    ({"radius": [1.0]}, r"\(1,\)"),
    ({"radius": 1.0}, r"got \(\)"),
    ({"radius": [[1.0, 1.0]]}, r"\(1, 2\)"),
    ({"velocity": [[NAN]]}, "velocity"),
    ({"velocity": [[-2.0]]}, "velocity"),
    ({"velocity": [[2.0], [2.0]]}, r"\(2, 1\)"),
    ({"start": [[[NAN, 5.0]]]}, "start"),
    ({"start": [[3.0, 5.0]]}, r"\(1, 2\)"),
    ({"start": [[[3.0, 5.0, 1.0]]]}, r"\(1, 1, 3\)")])
def test_simulate_refuses(bad, culprit):
    state = {name: torch.tensor(value, dtype=torch.float64) for name, value in (GOOD | bad).items()}
    with pytest.raises(ValueError, match=culprit):
        sim.simulate("uniform", **state)


def test_simulate_refuses_an_unknown_scenario_and_one_ball_for_a_collision():
    state = [torch.tensor(value) for value in GOOD.values()]
    with pytest.raises(ValueError, match="rotation"):
        sim.simulate("rotation", *state)
    with pytest.raises(ValueError, match="collision needs radius"):
        sim.simulate("collision", *state)


@pytest.mark.parametrize("x1, x2, met", [
    (3.0, 4.0, False), (7.0, 3.0, False), (3.0, 3.0, False), (3.0, 4.99, False),
    (3.0, 5.0, True), (3.0, 5.1, True)])
def test_balls_of_a_collision_are_apart_and_in_order(x1, x2, met):
    """Two of radius 1. Those that touch at t = 0 meet then, as in the closed form."""
    start = torch.tensor([[[x1, 5.0], [x2, 5.0]]], dtype=torch.float64)
    state = torch.ones(1, 2), torch.tensor([[1.0, 2.0]]), start
    if not met:
        with pytest.raises(ValueError, match="must not overlap"):
            sim.simulate("collision", *state)
        return
    clips = sim.Clips("collision", *state[:2], start[:, None], torch.ones(1, 1, 2).bool())
    assert (sim.simulate("collision", *state) - sim.closed_form(clips)).abs().max() < 0.003


@pytest.mark.parametrize("r1, r2", [(0.05, 0.05), (0.05, 4.0), (4.0, 0.05)])
def test_the_smallest_and_fastest_balls_do_not_pass_each_other(r1, r2):
    clips = sim.Clips("collision", torch.tensor([[r1, r2]], dtype=torch.float64),
                      torch.full((1, 2), sim.TOP_SPEED, dtype=torch.float64),
                      torch.tensor([[[[-10.0, 5], [20.0, 5]]]], dtype=torch.float64),
                      torch.ones(1, 1, 2).bool())
    error = (sim.play(clips).position - sim.closed_form(clips)).abs().max()
    assert error < 4 * sim.TOP_SPEED * sim.DT / sim.SUBSTEPS             # the head of SUBSTEPS


@pytest.mark.parametrize("scenario", sim.SCENARIOS)
def test_chosen_clips_are_what_they_are_among_all(scenario, monkeypatch):
    """Of two Spaces, in any order, one of them twice and two that had the same height."""
    monkeypatch.setattr(sim, "SCENES", 6)
    first = sim.first_frames(scenario, "posttrain", 11, seed=3)
    index = torch.tensor([9, 2, 3, 2, 8])
    monkeypatch.setattr(sim, "simulate", partial(sim.simulate, scenes=6))
    every, chosen = sim.play(first), sim.play(first, index)
    for name in ("radius", "velocity", "inside"):
        assert torch.equal(getattr(chosen, name), getattr(every, name)[index])
    x, y = (chosen.position - every.position[index]).unbind(-1)
    assert (x == 0).all() and y.abs().max() <= (1e-12 if scenario == "collision" else 0)


def test_solver_options_below_one_are_refused():
    state = [torch.tensor(value) for value in GOOD.values()]
    for options in ({"substeps": 0}, {"scenes": 0}):
        with pytest.raises(ValueError, match="at least one of each"):
            sim.simulate("uniform", *state, **options)


@pytest.mark.parametrize("position, radius, culprit", [
    (torch.ones(1, 1, 3, 2), torch.ones(1, 3), r"\(1, 1, 3, 2\)"),
    (torch.ones(1, 0, 1, 2), torch.ones(1, 1), r"\(1, 0, 1, 2\)"),
    (torch.ones(2, 1, 1, 2), torch.ones(1, 1), r"\(2, 1, 1, 2\)"),
    (torch.ones(1, 1, 1, 2), torch.zeros(1, 1), "radius must be > 0"),
    (torch.ones(1, 1, 1, 2), -torch.ones(1, 1), "radius must be > 0"),
    (torch.ones(1, 1, 1, 2), torch.full((1, 1), 1e300, dtype=torch.float64), "radius holds"),
    (torch.full((1, 1, 1, 2), 1e300, dtype=torch.float64), torch.ones(1, 1), "position holds"),
    (torch.full((1, 1, 1, 2), NAN), torch.ones(1, 1), "position"),
    (torch.ones(1, 1, 1, 2), torch.full((1, 1), NAN), "radius"),
    (torch.ones(1, 1, 2), torch.ones(1, 1), r"\(1, 1, 2\)"),
    (torch.ones(1, 1, 1, 2), torch.ones(1, 2), r"\(1, 2\)"),
    (torch.ones(1, 1, 1, 3), torch.ones(1, 1), r"\(1, 1, 1, 3\)")])
def test_render_refuses(position, radius, culprit):
    with pytest.raises(ValueError, match=culprit):
        sim.render(position, radius, 32)
    with pytest.raises(ValueError, match="size = 0"):
        sim.render(torch.ones(1, 1, 1, 2), torch.ones(1, 1), 0)


# ------------------------------------------------------------------ pictures

def paint(balls, size):
    """[(x, y, r), ...] -> one frame (3, size, size)."""
    x, y, r = torch.tensor(balls, dtype=torch.float64).T
    return sim.render(torch.stack([x, y], -1)[None, None], r[None], size)[0, 0]


def coverage(x, y, r, size, cuts=64):
    """The share of each pixel that a disc covers (size, size), by counting cuts x cuts points."""
    axis = (np.arange(size * cuts) + 0.5) / (size * cuts) * 10
    hit = (axis - x) ** 2 + (axis[::-1, None] - y) ** 2 <= r * r         # row 0 is on top
    return torch.from_numpy(hit.reshape(size, cuts, size, cuts).mean((1, 3)))


@pytest.mark.parametrize("x, y, r", [
    (5.03, 4.48, 1.37), (2.2, 7.71, 0.3), (3.127, 6.91, 0.71), (9.6, 5.2, 1.5), (0.35, 9.9, 2.0),
    (4.9, -0.8, 1.2), (10.9, 10.9, 1.9)])
def test_painted_coverage_is_the_area_a_ball_covers(x, y, r):
    expected = coverage(x, y, r, 32)
    frame = paint([(x, y, r)], 32)
    edge = (expected > 0) & (expected < 1)
    assert expected.max() > 0.1 and edge.any()
    for channel in frame[1:]:                                            # red lacks green and blue
        off = 1 - channel - expected
        assert off.abs().max() < 0.06
        assert off[edge].abs().mean() < 0.01
    assert (frame[0] == 1).all()


def paint_everywhere(position, radius, size, slices=8):
    """As sim.render, but over whole frames, without windows."""
    center = (position * (size / 10)).float()[..., None, None]           # (B, F, N, 2, 1, 1)
    cx, cy = center[:, :, :, 0], size - center[:, :, :, 1]
    r = (radius * (size / 10)).float()[:, None, :, None, None]
    left = torch.arange(size).float()
    top = left[:, None]
    covered = 0
    for i in range(slices):
        half = (r ** 2 - (left + (i + 0.5) / slices - cx) ** 2).clamp(min=0).sqrt()
        covered = covered + ((cy + half).minimum(top + 1) - (cy - half).maximum(top)).clamp(0, 1)
    red, blue = [*(covered / slices).unbind(2), torch.zeros(())][:2]
    frames = [1 - blue, 1 - red - blue, 1 - red]
    return torch.stack([x.expand_as(red) for x in frames], 2).clamp(0, 1)


@pytest.mark.parametrize("N", [1, 2])
@pytest.mark.parametrize("size", [1, 8, 33, 128])
@pytest.mark.parametrize("largest", [0.3, 2.0, 8.0])
def test_windows_hold_all_of_every_ball(N, size, largest):
    """Bit for bit the frames painted everywhere. Some balls are partly or wholly outside."""
    generator = torch.Generator().manual_seed(size)
    position = 16 * torch.rand(5, 27, N, 2, generator=generator, dtype=torch.float64) - 3
    radius = 0.01 + largest * torch.rand(5, N, generator=generator, dtype=torch.float64)
    for dtype in (torch.float32, torch.float64):
        state = position.to(dtype), radius.to(dtype)
        assert torch.equal(sim.render(*state, size), paint_everywhere(*state, size))


def test_a_ball_far_away_leaves_the_frame_white():
    for x in (-1e30, 1e30):
        assert (sim.render(torch.full((1, 2, 1, 2), x), torch.ones(1, 1), 16) == 1).all()


def test_gradients_of_painted_balls():
    generator = torch.Generator().manual_seed(0)
    state = [10 * torch.rand(2, 3, 2, 2, generator=generator), torch.full((2, 2), 1.3)]
    state = [x.requires_grad_() for x in state]
    weight = torch.rand(2, 3, 3, 24, 24, generator=generator)
    ours, expected = (torch.autograd.grad((paint(*state, 24) * weight).sum(), state)
                      for paint in (sim.render, paint_everywhere))
    for x, y in zip(ours, expected):
        assert y.abs().max() > 1
        torch.testing.assert_close(x, y)


def test_painted_area_is_that_of_the_disc():
    generator = torch.Generator().manual_seed(0)
    radius = 0.3 + 1.7 * torch.rand(50, 1, generator=generator)
    position = 2 + 6 * torch.rand(50, 1, 1, 2, generator=generator)      # wholly in view
    area = (1 - sim.render(position, radius, 64)[:, 0, 1]).sum((1, 2)) * (10 / 64) ** 2
    relative = area / (math.pi * radius[:, 0] ** 2) - 1
    assert relative.abs().max() < 0.005 and relative.mean().abs() < 0.001


def test_colours_and_orientation():
    frame = paint([(2.5, 7.5, 1.0), (7.5, 1.5, 1.0)], 40)                # 4 pixels per unit
    assert frame.dtype == torch.float32 and frame.shape == (3, 40, 40)
    assert frame.min() == 0 and frame.max() == 1
    assert frame[:, 10, 10].tolist() == [1, 0, 0]                        # red, up and left
    assert frame[:, 34, 30].tolist() == [0, 0, 1]                        # blue, low and right
    assert frame[:, 20, 20].tolist() == [1, 1, 1]                        # on white


def test_touching_and_overlapping_balls_stay_in_range():
    for gap in (2.0, 1.2):
        frame = paint([(4.0, 5.0, 1.0), (4.0 + gap, 5.03, 1.0)], 32)
        assert frame.min() >= 0 and frame.max() <= 1 and torch.isfinite(frame).all()


def test_render_shapes_and_uint8():
    clips = sim.sample("collision", "iid", 2)
    frames = sim.render(clips.position, clips.radius, 24)
    assert frames.shape == (2, 32, 3, 24, 24) and frames.dtype == torch.float32
    stored = sim.to_uint8(frames)
    assert stored.dtype == torch.uint8 and (stored / 255 - frames).abs().max() <= 0.5 / 255 + 1e-6
    assert sim.to_uint8(torch.tensor([-1.0, 2.0])).tolist() == [0, 255]


def test_clips_index_and_move():
    clips = sim.sample("collision", "iid", 6)
    picked = clips[torch.tensor([4, 1])]
    assert len(clips) == 6 and len(clips[1:3]) == 2 and len(picked) == 2
    assert picked.scenario == clips.to("meta").scenario == "collision"
    for name in ("radius", "velocity", "position", "inside"):
        whole = getattr(clips, name)
        assert torch.equal(getattr(clips[1:3], name), whole[1:3])
        assert torch.equal(getattr(picked, name), whole[[4, 1]])
        assert getattr(clips.to("meta"), name).device.type == "meta"
        assert whole.device.type == "cpu"


# ------------------------------------------------------------------ the command

def test_command(tmp_path):
    done = run("sim.py", "--out", tmp_path, "--size", "32")
    assert done.returncode == 0, done.stderr
    for scenario in sim.SCENARIOS:
        with Image.open(tmp_path / f"{scenario}.png") as strip:
            assert strip.width > 8 * 84 and strip.height > 4 * 84        # 4 rows of 8 pictures
        with Image.open(tmp_path / f"{scenario}.gif") as gif:
            assert gif.n_frames == 32
        assert scenario in done.stdout


@pytest.mark.parametrize("arguments, culprit", [
    (("--split", "nope"), "'nope'"),
    (("--size", "0"), "--size 0"),
    (("--size", "20000"), "--size 20000"),
    (("--out", ""), "--out"),
    (("--out", "/dev/null/x"), "/dev/null")])
def test_command_refuses(arguments, culprit, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        sim.main(["--out", str(tmp_path), *arguments])
    lines = capsys.readouterr().err.splitlines()
    complaint = [line for line in lines if "error" in line.lower()]
    assert stopped.value.code == 2 and complaint == lines[-1:] and culprit in complaint[0]
    assert not list(tmp_path.iterdir())


def test_command_names_a_picture_that_it_cannot_write(tmp_path, capsys):
    (tmp_path / "uniform.gif").mkdir()
    with pytest.raises(SystemExit):
        sim.main(["--out", str(tmp_path), "--size", "16"])
    assert "uniform.gif" in capsys.readouterr().err.splitlines()[-1]
