"""
Every section of bench.py runs at its smallest size and prints its tables.

    pytest tests/test_bench.py
"""
import re
import sys

import bench
import pytest

LINES = {                                   # section -> the first words of lines with numbers
    "sim": ["uniform", "parabola", "collision"],
    "ddt": ["encode", "decode, 1 call", "decode, 2 calls", "training step", "8 ", "64 "],
    "lm": ["tiny  1 ", "tiny  2 ", "tiny"],
    "grpo": ["parameters", "gradients", "masters and moments, fp32", "reference",
             "supports of rollouts", "KV cache", "seconds of a step", "prefill",
             "decode", "codes to frames", "reward", "optimizer", "log-probabilities",
             "backward, with the blocks' second forward"]}


@pytest.mark.parametrize("name", bench.SECTIONS)
def test_sections(name, capsys):
    bench.main([name, "--small"])
    out = capsys.readouterr().out
    lines = [re.sub(" +", " ", line).strip() for line in out.splitlines()]
    assert lines[1] == f"== {name}"
    for words in LINES[name]:
        words = words.replace("  ", " ")
        found = [line for line in lines if line.startswith(words) and re.search(r"\d\S*$", line)]
        assert found, words
        for line in found:
            values = re.findall(r"(?<= )[\d.,]+(?=[x%]?(?: |$))", line[len(words.strip()):])
            assert values and all(float(x.replace(",", "")) > 0 for x in values), line
    if name == "grpo":                      # what is counted exactly agrees with the plan
        exact = [line for line in lines if re.match("(parameters|gradients|reference|KV)", line)]
        assert len(exact) == 4 and all(line.split()[-1] == line.split()[-2] for line in exact)


def test_wrapped_functions_are_restored():
    before = bench.lm.Llama.forward, bench.train.AdamW.step, bench.torch.Tensor.backward
    watch = bench.Watch()
    watch.time(bench.lm.Llama, "forward", "x")
    watch.weigh()
    assert bench.train.AdamW.step is not before[1]
    watch.patches.close()
    after = bench.lm.Llama.forward, bench.train.AdamW.step, bench.torch.Tensor.backward
    assert before == after


@pytest.mark.parametrize("argv, code, words", [
    (["--help"], 0, "--small"), (["simm"], 2, "unknown section 'simm': choose from sim, ddt")])
def test_command(argv, code, words, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench.py"])
    with pytest.raises(SystemExit) as end:
        bench.main(argv)
    printed = capsys.readouterr()
    assert end.value.code == code and words in printed.out + printed.err


def test_help_of_kills(capsys):
    """The whole text, no sentence of it cut off."""
    import kills
    with pytest.raises(SystemExit):
        kills.main(["--help"])
    assert kills.__doc__.strip() in capsys.readouterr().out
