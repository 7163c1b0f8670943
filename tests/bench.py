"""
How fast are the parts? Every section times two ways of doing the same work, in alternating repeats, so that
whatever else the machine does slows both, and prints medians.

    python tests/bench.py              # every section
    python tests/bench.py sim          # one of them: clips simulated a second

Takes 10 seconds on one CPU core.
"""
import sys
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parents[1]))


def alternate(ways, repeats=5):
    """{name: function} -> {name: median seconds a call}. One call each to warm up, then `repeats` in turn."""
    seconds = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, way in ways.items():
            begin = time.perf_counter()
            way()
            if turn:
                seconds[name].append(time.perf_counter() - begin)
    return {name: median(values) for name, values in seconds.items()}


def bench_sim():
    """sim.simulate: many scenes in one Space beside one Space a clip, with the same solver steps."""
    import sim
    many, one = sim.SCENES, 32                                           # clips a call
    print(f"clips a second, {sim.SUBSTEPS} solver steps a frame, {sim.FRAMES} frames\n"
          f"{'':10s} {f'{many} in one Space':>18s} {'one Space a clip':>18s} {'ratio':>8s}")
    for scenario in sim.SCENARIOS:
        clips = sim.sample(scenario, "iid", many)
        radius, velocity, start = clips.radius, clips.velocity, clips.position[:, 0]
        seconds = alternate({
            "many": lambda: sim.simulate(scenario, radius, velocity, start),
            "one": lambda: sim.simulate(scenario, radius[:one], velocity[:one], start[:one], scenes=1)})
        rate, alone = many / seconds["many"], one / seconds["one"]
        print(f"{scenario:10s} {rate:18.0f} {alone:18.0f} {rate / alone:7.1f}x")


SECTIONS = {"sim": bench_sim}


def main(names):
    unknown = [name for name in names if name not in SECTIONS]
    if unknown:
        print(f"unknown section {unknown[0]!r}: choose from {', '.join(SECTIONS)}", file=sys.stderr)
        sys.exit(2)
    for name in names or SECTIONS:
        print(f"\n== {name}")
        SECTIONS[name]()


if __name__ == "__main__":
    main(sys.argv[1:])
