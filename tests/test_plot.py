"""The pictures: strips and GIFs (pictures.py), charts and heat maps (experiments/plot.py)."""
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageSequence

sys.path.insert(0, str(Path(__file__).parents[1]))

import pictures
import sim
from checkpoint import UserError
from experiments import plot

BLUE, GREY = (0, 90, 180), (190, 190, 190)              # frames of given and of other pictures


@pytest.fixture
def texts(monkeypatch):
    """Every text that is drawn: (canvas, box)."""
    seen, text = [], ImageDraw.ImageDraw.text

    def record(self, xy, words, fill=None, font=None, anchor=None, **options):
        if words:
            seen.append((self._image, self.textbbox(xy, words, font, anchor=anchor)))
        return text(self, xy, words, fill, font, anchor, **options)
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", record)
    return seen


def check_texts(texts):
    """No text leaves its canvas, none stands over another."""
    assert texts
    for i, (canvas, (a, b, c, d)) in enumerate(texts):
        assert a >= 0 and b >= 0 and c <= canvas.width and d <= canvas.height
        for other, (e, f, g, h) in texts[:i]:
            assert other is not canvas or g <= a or c <= e or h <= b or d <= f


# ------------------------------------------------------------------ strips and GIFs

@pytest.fixture(scope="module")
def clips():
    """Three clips, and predictions that are the truth for 3 frames and 1.5 units too high after."""
    truth = [sim.sample("uniform", "iid", 1, seed) for seed in (1, 2, 3)]
    frames = torch.cat([sim.render(clip.position, clip.radius, 32) for clip in truth])
    up = torch.zeros(1, 32, 1, 2, dtype=torch.float64)
    up[:, 3:, :, 1] = 1.5
    off = torch.cat([sim.render(clip.position + up, clip.radius, 32) for clip in truth])
    return truth, {"truth": frames, "SFT + RL": off}


def tiles(picture: Image.Image, side: int) -> list[tuple[int, int]]:
    """The upper left corners of the framed pictures, row by row."""
    pixels, found = np.array(picture.convert("RGB")), []
    framed = (pixels == BLUE).all(-1) | (pixels == GREY).all(-1)
    for y, x in zip(*np.nonzero(framed)):
        if framed[y, x:x + side].all() and framed[y:y + side, x].all() and (y, x) not in found:
            if not any(0 <= y - b < side and 0 <= x - a < side for a, b in found):
                found.append((x, y))
    return sorted(found, key=lambda place: place[::-1])


def test_strip(clips, tmp_path, texts):
    """Times over the columns, the given frame framed, the true ball outlined, clips set apart."""
    truth, videos = clips
    pictures.save_strip(tmp_path / "new" / "a.png", videos, ["a", "b", "c"], truth=truth, given=3)
    check_texts(texts)
    assert [x.name for x in (tmp_path / "new").iterdir()] == ["a.png"]
    picture = Image.open(tmp_path / "new" / "a.png").convert("RGB")
    places = tiles(picture, 80)
    shown = range(2, 32, 4)
    assert len(places) == 3 * 2 * len(shown)
    rows = sorted({y for _, y in places})
    steps = [b - a for a, b in zip(rows, rows[1:])]
    assert steps[0] == steps[2] == steps[4] == 84 and min(steps[1::2]) > 100
    for i, (x, y) in enumerate(places):
        row, column = divmod(i, len(shown))
        assert picture.getpixel((x + 1, y + 40)) == (BLUE if column == 0 else (255, 255, 255))
        clip, f = truth[row // 2], shown[column]
        center, radius = clip.position[0, f, 0] * 8, clip.radius[0, 0].item() * 8
        for angle in torch.linspace(0.3, 6.3, 16).tolist():
            a = center[0].item() + (radius - 0.5) * math.cos(angle)
            b = 80 - center[1].item() - (radius - 0.5) * math.sin(angle)
            if 4 < a < 76:
                around = [picture.getpixel((x + int(a) + i, y + int(b) + j))
                          for i in (-1, 0, 1) for j in (-1, 0, 1)]
                assert min(map(sum, around)) < 240, (row, column, angle)         # red alone is 255


def test_strip_shows_the_frames(clips, tmp_path):
    """Without truth, what is in a frame is what was given; headings stand for times."""
    _, videos = clips
    rows = {label: video[:1, :5] for label, video in videos.items()}
    headings = [f"{i}/4" for i in range(5)]
    pictures.save_strip(tmp_path / "a.png", rows, [""], columns=headings, pixels=32)
    picture = Image.open(tmp_path / "a.png").convert("RGB")
    places = tiles(picture, 32)
    assert len(places) == 2 * 5
    for i, (x, y) in enumerate(places):
        frame = list(rows.values())[i // 5][0, i % 5]
        expected = sim.to_uint8(frame).permute(1, 2, 0).numpy()[1:-1, 1:-1]
        shown = np.array(picture)[y + 1:y + 31, x + 1:x + 31]
        assert np.abs(shown.astype(int) - expected).max() < 40      # resampled twice
        assert np.mean(shown == expected) > 0.9


def test_gif(clips, tmp_path, texts):
    """Thirty-two frames, the given ones framed in blue and named, the true ball outlined."""
    truth, videos = clips
    names = [f"iid\nradius {clip.radius[0, 0]:.1f}, speed 2.0" for clip in truth]
    pictures.save_gif(tmp_path / "new" / "a.gif", videos, names, truth=truth, given=3)
    check_texts(texts)
    with Image.open(tmp_path / "new" / "a.gif") as gif:
        frames = [(x.info["duration"], x.convert("RGB"))
                  for x in ImageSequence.Iterator(gif)]
    assert [duration for duration, _ in frames] == [100, 100, 500] + 28 * [100] + [1500]
    for f, (_, picture) in enumerate(frames):
        assert picture.getpixel((0, 0)) == (255, 255, 255)
        blue = np.abs(np.array(picture).astype(int) - BLUE).sum(-1) < 30
        assert (blue.sum() > 1000) == (f < 3)


def test_pictures_of_other_shapes(clips, tmp_path):
    """No truth, no given frames, no labels: the films of `python sim.py`; still frames."""
    _, videos = clips
    still = torch.ones(2, 32, 3, 16, 16)
    pictures.save_gif(tmp_path / "a.gif", {"": still}, ["", ""])
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.n_frames == 32                                     # the time over them differs
    pictures.save_strip(tmp_path / "a.png", {"": videos["truth"]}, ["", "", ""])
    assert len(tiles(Image.open(tmp_path / "a.png"), 80)) == 3 * 8


@pytest.mark.parametrize("draw", [
    lambda path, video: pictures.save_strip(path.with_suffix(".png"), {"": video}, [""]),
    lambda path, video: pictures.save_gif(path.with_suffix(".gif"), {"": video}, [""]),
    lambda path, video: plot.chart(path.with_suffix(".png"), "x", "y", {"a": [(0, 0), (1, 1)]}),
    lambda path, video: plot.heat_maps(path.with_suffix(".png"), [("a", torch.eye(2), 1.0)],
                                       torch.arange(2.0), torch.arange(2.0))])
def test_a_broken_write_leaves_nothing(draw, clips, tmp_path, monkeypatch):
    def save(self, file, **options):
        Path(file).write_bytes(b"half a pict")
        raise OSError("disk full")
    for suffix in (".png", ".gif"):
        (tmp_path / "a").with_suffix(suffix).write_text("old")
    monkeypatch.setattr(Image.Image, "save", save)
    with pytest.raises(UserError, match="disk full"):
        draw(tmp_path / "a", clips[1]["truth"][:1])
    left = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert left == {"a.png": "old", "a.gif": "old"}


# ------------------------------------------------------------------ charts

def test_ticks():
    """Round, equally far apart, few, and they cover the range with less than a step left over."""
    generator = np.random.default_rng(0)
    for _ in range(500):
        low, high = sorted(generator.normal(size=2) * 10.0 ** generator.integers(-4, 7))
        whole = high - low > 5 and generator.random() < 0.5
        found = plot.ticks(low, high, whole=whole)
        step = found[1] - found[0]
        assert found[0] <= low < found[1] and found[-2] < high <= found[-1] and len(found) <= 8
        assert np.allclose(np.diff(found), step)
        assert any(math.isclose(step, factor * 10.0 ** k, rel_tol=1e-6)
                   for factor in (1, 2, 5) for k in range(-12, 9))
        assert np.allclose(np.array(found) / step, np.round(np.array(found) / step))
        assert not whole or all(x == int(x) for x in found)
        assert len(set(plot.written(found))) == len(found)


@pytest.mark.parametrize("low, high, expected", [
    (1, 4, [1, 2, 3, 4]), (1, 1, [1, 2]), (0, 49, [0, 10, 20, 30, 40, 50])])
def test_ticks_of_counts(low, high, expected):
    assert plot.ticks(low, high, whole=True) == expected


@pytest.mark.parametrize("low, high, expected", [
    (60, 6000, [50, 100, 200, 500, 1000, 2000, 5000, 10_000]), (100, 1000, [100, 200, 500, 1000]),
    (3, 3e6, [10 ** k for k in range(8)]), (100, 100, [100, 200])])
def test_ticks_of_sizes(low, high, expected):
    assert plot.log_ticks(low, high) == expected


@pytest.mark.parametrize("values, expected", [
    ([0, 0.5, 1], ["0.0", "0.5", "1.0"]), ([-1, 0, 1], ["-1", "0", "1"]),
    ([0.25, 0.5], ["0.25", "0.50"]), ([5000, 10_000, 5e5, 2e6], ["5000", "10k", "500k", "2M"])])
def test_written(values, expected):
    assert plot.written(values) == expected


def test_smooth():
    assert plot.smooth([(x, 2 * x) for x in range(7)], 5) == [(2, 4), (3, 6), (4, 8)]
    assert plot.smooth([(1, 5.0), (2, 7.0)], 1) == [(1, 5.0), (2, 7.0)]
    assert plot.smooth([(1, 5.0), (2, 7.0)], 5) == [(1.5, 6.0)] and plot.smooth([], 5) == []


@pytest.mark.parametrize("y, low, high", [
    ((0.0, 1.0), 0, 1), ((3.0, 3.5), 3, 3.5), ((1.0, 4.0), 0, 4), ((-1.0, 1.0), -1, 1),
    ((0.0, 0.0), 0, 1), ((2.0, 2.0), 2, 2.5)])
def test_chart(tmp_path, y, low, high):
    """The curve is where its points are, between the outermost ticks; near 0 it begins at 0."""
    line = {"line": [(2, y[0]), (3, y[1])]}
    plot.chart(tmp_path / "chart.png", "x", "y", line, width=720, height=400)
    picture = Image.open(tmp_path / "chart.png").convert("RGB")
    for x, value in ((78, y[0]), (695, y[1])):
        colored = [row for row in range(400) if picture.getpixel((x, row)) == plot.COLORS[0]]
        share = (value - low) / (high - low)
        assert sum(colored) / len(colored) == pytest.approx(342 - (342 - 16) * share, abs=2)


CHARTS = {
    "steps": ({f"a long name of curve {i}": [(x, math.sin(x + i)) for x in range(50)]
               for i in range(4)}, {"window": 5}),
    "sizes": ({f"uniform, {i}": [(60, 3 + i), (600, 2 + i), (6000, 1 + i)] for i in range(6)},
              {"log_x": True}),
    "holes": ({"a": [(1, 0.5), (2, math.nan), (3, 0.7)],
               "b": [(1, 0.932), (2, 0.862), (3, math.nan)]}, {}),
    "nothing found": ({"a": [(1, 0.5), (2, 0.7)], "b": [(1, math.nan), (2, math.nan)]}, {}),
    "negative": ({"a": [(x, -0.013 * x) for x in range(20)],
                  "b": [(x, 0.0) for x in range(20)]}, {}),
}


@pytest.mark.parametrize("name", CHARTS)
def test_chart_hides_nothing(name, tmp_path, texts):
    """Texts stand apart and inside the picture; the legend hides neither end of a curve."""
    curves, options = CHARTS[name]
    y_label = "cosine similarity of the embeddings"
    plot.chart(tmp_path / "chart.png", "ball moved by, units", y_label, curves, **options)
    check_texts(texts)
    picture = np.array(Image.open(tmp_path / "chart.png").convert("RGB")).astype(int)
    for edge in (picture[0], picture[-1], picture[:, 0], picture[:, -1]):
        assert (edge == 255).all()
    for color, points in zip(plot.COLORS, curves.values()):
        if math.isnan(points[0][1]):
            continue
        columns = (np.abs(picture - color).sum(-1) < 30).any(0).nonzero()[0]
        assert np.ptp(columns) > (250 if math.isnan(points[-1][1]) else 400)


def test_chart_smooths(tmp_path):
    """The mean of a zigzag is a level line, the zigzag pale behind it."""
    zigzag = {"a": [(x, float(x % 2)) for x in range(21)]}
    plot.chart(tmp_path / "chart.png", "x", "y", zigzag, window=2)
    picture = np.array(Image.open(tmp_path / "chart.png").convert("RGB"))
    rows = (picture == plot.COLORS[0]).all(-1).any(1).nonzero()[0]
    assert np.ptp(rows) < 10 and (picture[30:, 100:600] != 255).any(-1).any(0).mean() > 0.9


def test_chart_refuses_nothing(tmp_path):
    with pytest.raises(ValueError, match="no finite point"):
        plot.chart(tmp_path / "a.png", "x", "y", {"a": [(1, math.nan)]})
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------ maps

def test_heat_maps(tmp_path):
    """Slow and small is at the lower left; white is 0, dark red the top, grey nothing."""
    value = torch.tensor([[0.0, 1.0], [math.nan, 0.5]])                # (radius, speed)
    radii, speeds = torch.tensor([0.5, 1.9]), torch.tensor([0.3, 5.0])
    plot.heat_maps(tmp_path / "map.png", [("x", value, 1.0)], radii, speeds, side=200)
    picture = Image.open(tmp_path / "map.png").convert("RGB")

    def at(x, y):
        return picture.getpixel((58 + x, 32 + y))
    assert at(20, 180) == (255, 255, 255) and at(20, 20) == plot.SHADES[-1]
    assert at(180, 180) == plot.GREY and at(180, 20) == plot.shade(0.5) == plot.SHADES[2]
    for y, share in ((3, 0.985), (100, 0.5), (197, 0.015)):            # the colour bar
        assert np.abs(np.subtract(at(219, y), plot.shade(share))).max() < 6


def test_heat_maps_name_the_ranges(tmp_path, texts):
    """The ranges of training are drawn where they are; texts stand apart and inside the picture."""
    radii, speeds = torch.arange(0.35, 2.0, 0.1), torch.arange(0.25, 6.0, 0.5)
    blank = torch.zeros(len(radii), len(speeds))
    panels = [("SFT: drift error, units/s", blank, 2.0)] * 4
    plot.heat_maps(tmp_path / "map.png", panels, radii, speeds, side=280)
    check_texts(texts)
    picture = Image.open(tmp_path / "map.png").convert("RGB")

    def near(r, v, color):
        x, y = 58 + (r - 0.3) / 1.7 * 280, 32 + (6.0 - v) / 6.0 * 280
        return any(picture.getpixel((int(x) + i, int(y) + j)) == color
                   for i in range(-2, 3) for j in range(-2, 3))
    for r, v in ((0.8, 2.5), (1.4, 2.5), (1.1, 1.5), (1.1, 3.5)):
        assert near(r, v, plot.INK)
    for r in (0.7, 0.8, 1.4, 1.5):
        for v in (1.25, 3.75):
            assert near(r, v, plot.BLUE)
    assert not near(1.1, 2.5, plot.INK) and not near(0.5, 1.25, plot.BLUE)


@pytest.mark.parametrize("video", [255, math.nan])
def test_frames_that_cannot_be_shown(tmp_path, video):
    video = torch.full((1, 4, 3, 8, 8), video)
    with pytest.raises(ValueError, match="frames"):
        pictures.save_gif(tmp_path / "a.gif", {"": video}, [""])
    assert not list(tmp_path.iterdir())
