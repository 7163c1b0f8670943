#!/usr/bin/env bash
# What only a GPU can show, in parts, each with a time limit. It needs no network.
#
#     tests/gpu.sh                    all parts, 18 minutes at most:
#     tests/gpu.sh tests              the test suite on CUDA                            (300 s)
#     tests/gpu.sh bench              bench.py lm, ddt and grpo, with short repeats     (90 s)
#     tests/gpu.sh small              the main job at `small`, from nothing             (500 s)
#     tests/gpu.sh sweep              twelve short trainings: experiments/sweep.py      (240 s)
#
#     OUT=DIR tests/gpu.sh ...        where logs, results and summary.txt go (default: runs/gpu)
#     WHEELS=DIR tests/gpu.sh ...     first installs the wheels in DIR
#     REHEARSE=1 tests/gpu.sh ...     on the CPU, at the smallest sizes: a minute on 2 cores
#
# OUT holds eight files at most: four logs, summary.txt, and of `small` its GIF, its film strip and
# small.tgz (results.json, the stages' log.jsonl, pictures). The exit status is 1 if a part failed.
set -uo pipefail
cd "$(dirname "$0")/.."
PARTS=(tests bench small sweep)
declare -A LIMIT=([tests]=300 [bench]=90 [small]=500 [sweep]=240)       # seconds
REHEARSE=${REHEARSE:-}

part_tests() {      # a process per file, eight at a time
    local files=(tests/test_*.py) jobs=8
    if [ "$REHEARSE" ]; then files=(tests/test_evaluate.py tests/test_lm.py) jobs=2; fi
    mkdir "$WORK/tests"
    printf '%s\n' "${files[@]}" | xargs -P "$jobs" -I{} bash -c '
        # two ranks need two GPUs, or none
        case {} in *test_scale.py) export CUDA_VISIBLE_DEVICES= ;; esac
        python3 -m pytest -q -p no:cacheprovider {} >"$WORK/{}.log" 2>&1'
    local status=$? file
    for file in "${files[@]}"; do       # those that failed in full
        echo "== $file: $(tail -n 1 "$WORK/$file.log")"
        grep -q "^\(FAILED\|ERROR\)" "$WORK/$file.log" && cat "$WORK/$file.log"
    done
    return $status
}

part_bench() {
    local size=--short
    [ -z "$REHEARSE" ] || size=--small
    python3 tests/bench.py lm ddt grpo $size
}

part_small() {
    if [ -z "$REHEARSE" ]; then
        python3 grpo.py --preset small --out "$WORK/run"; return
    fi
    python3 - "$WORK/run" <<'PYTHON'
import sys, ddt, evaluate, grpo, prior, sft, train, vae
for stage in (vae, ddt, prior, sft, grpo):
    cut = dict(steps=2, clips=4, eval_clips=2, batch=2, prompts=2, group=2, frames=8, size=32,
               encoder_layers=1, layers=1)
    stage.PRESETS["small"] |= {k: v for k, v in cut.items() if hasattr(stage.Config, k)}
evaluate.SPLITS = ("iid", "fast")
ddt.center_error.__defaults__ = (2,)                        # clips
train.cli(lambda: grpo.main(["--preset", "small", "--out", sys.argv[1]]))
PYTHON
}

part_sweep() {
    local flags=()
    if [ "$REHEARSE" ]; then
        flags=(--small --clips 16 --eval_clips 2 --sft_seconds 0.1 --grpo_seconds 0.1)
    fi
    python3 -m experiments.sweep --out "$WORK/sweep" "${flags[@]}"
}

collect() {         # what the part `small` has left, however it ended; prints its times
    find "$WORK/run" -maxdepth 1 -name 'clips.*' -exec cp {} "$OUT" \;
    (cd "$WORK/run" && find . -name '*.json*' -o -name '*.png' -o -name '*.gif' |
        tar czf "$OUT/small.tgz" -T -)
    python3 -m experiments.times "$WORK/run" | tee -a "$OUT/small.log"
} 2>>"$OUT/small.log"

stop() { echo "tests/gpu.sh: $1" >&2; exit 2; }

if [ "${1:-}" = --run ]; then           # one part, in a process that is killed after its time
    "part_$2"; exit
fi
for part in "$@"; do
    [[ " ${PARTS[*]} " == *" $part "* ]] || stop "unknown part '$part': choose from ${PARTS[*]}"
done
if [ "${WHEELS:-}" ]; then
    python3 -m pip install --quiet --no-deps --no-index "$WHEELS"/*.whl ||
        stop "the wheels in $WHEELS could not be installed"
fi
missing=$(python3 - <<'PYTHON'
from importlib.util import find_spec
names = "torch numpy pymunk PIL tqdm safetensors sentencepiece tiktoken einops pytest"
print(*(name for name in names.split() if not find_spec(name)))
PYTHON
) || stop "python3 does not run"
[ -z "$missing" ] || stop "python3 lacks $missing: pip install -r requirements.txt, or WHEELS=DIR"
if [ "$REHEARSE" ]; then
    export CUDA_VISIBLE_DEVICES=
    for part in "${PARTS[@]}"; do LIMIT[$part]=1200; done
elif ! python3 -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    stop "torch sees no CUDA GPU here. REHEARSE=1 tests/gpu.sh runs all parts on the CPU"
fi

OUT=$(realpath -m "${OUT:-runs/gpu}")
mkdir -p "$OUT" || stop "cannot write $OUT"
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
export WORK REHEARSE
failed=0
python3 - >"$OUT/summary.txt" <<'PYTHON'
import platform, torch
cuda = torch.cuda.is_available()
device = torch.cuda.get_device_name() if cuda else "CPU"
print(f"{device}, torch {torch.__version__}, Python {platform.python_version()}")
PYTHON
[ $# -gt 0 ] || set -- "${PARTS[@]}"
for part in "$@"; do
    log=$OUT/$part.log began=$SECONDS result=ok more=
    # KILL, to the whole group: a process that compiles does not always end at TERM
    timeout -s KILL "${LIMIT[$part]}" bash tests/gpu.sh --run "$part" >"$log" 2>&1
    code=$?
    [ $code -eq 0 ] || { result="FAILED ($code; 137: over its ${LIMIT[$part]} s)"; failed=1; }
    seconds=$((SECONDS - began))
    case $part in
        tests) more="$(grep -c "^== .* passed" "$log") files passed, of them $(
                   grep -c "^== .* failed" "$log") with failures";;
        # name, batch, tokens per second, share of the copy (last line: the matrix) rate: 100M at
        # batch 256, 8B at 1, 32 and 256, training of 100M
        bench) more=$(grep "^\(llama-3.1-8b\|100M\) .*%$" "$log" | tail -n 5 | tr -s " ");;
        small) more=$(collect | cut -c -29 | paste -sd";" | tr -s " ");;
        sweep) more="$(grep -c "^\(SFT\|RL\) .*[0-9]$" "$log") of 12 trainings";;
    esac
    echo "$part: $result, $seconds s: $more" >>"$OUT/summary.txt"
done
cat "$OUT/summary.txt"
exit $failed
