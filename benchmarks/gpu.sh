#!/usr/bin/env bash
# The GPU round in five steps, what decides first. The first four take ten minutes each at most:
#   benchmarks/gpu.sh OUT [STEP ...]   on a machine with a CUDA device; all steps where none is named
#     1  one small call, repeats, streams, graphs; speed of the Triton kernel, a process per shape
#     2  tile candidates of the Triton kernel, a process each
#     3  a profile of one launch of three shapes (ncu)
#     4  all tests marked gpu, those of the Triton kernel first
#     5  memcheck, the CUDA C++ kernel, rivals and host time; the figures of all steps as one JSON
# Every part has a limit and a process of its own, because a kernel that hangs or reads what is not
# its own ends its process; later parts and steps run all the same. LIMIT_<part>=SECONDS sets the
# limit of a part, SHAPES the shapes. Of step N, OUT has N.log, N.jsonl (every figure as it comes,
# and how each part ended) and N-clocks.csv.
#   DRY=1 benchmarks/gpu.sh OUT [STEP ...]   tiny sizes on a CPU, to try this script; with
#   FAULTS="SHAPE=crash SHAPE=hang SHAPE=nan" some shapes get a version that fails
set -uo pipefail
cd "$(dirname "$0")/.." || exit
out=${1:?usage: benchmarks/gpu.sh OUT [STEP ...]}
shift
[ $# -gt 0 ] || set -- 1 2 3 4 5
for step in "$@"; do
    [[ $step == [1-5] ]] || { echo "step $step; wanted some of 1 2 3 4 5" >&2 && exit 2; }
done
python=${PYTHON:-python3}
mkdir -p "$out"
out=$(cd "$out" && pwd)
export PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 PYTHONWARNINGS=ignore
COMMIT=${COMMIT:-$(git rev-parse --short HEAD 2>/dev/null || echo unknown)}
export COMMIT
dry=${DRY:-0}
gpu=null
suite=("$python" -m benchmarks.speed)
if [ "$dry" = 1 ]; then
    export TRITON_INTERPRET=1 PYTHONPATH=$PYTHONPATH:tests
    suite=("$python" -m cuda_emulator benchmarks.speed)
else
    gpu=\"$(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1)\"
fi
shapes=${SHAPES:-two-tower sequence catalogue wide small per-example odd unscaled}
ended=()

part() { # name, seconds, command ...
    local name=$1 seconds=$2 limit begin status how size
    shift 2
    limit=LIMIT_${name//[^a-zA-Z0-9]/_}
    seconds=${!limit:-$seconds}
    begin=$SECONDS
    echo "== $step: $name, at most $seconds s: $*" | tee -a "$log" | cut -c 1-200
    size=$(wc -c <"$log")
    timeout -k 3 "$seconds" "$@" >>"$log" 2>&1
    status=$?
    case $status in
        0) how=ok ;;
        124 | 137) how="stopped at its limit of $seconds s" ;;
        1 | 2) how=failed ;;
        *) how="crashed with status $status" ;;
    esac
    tail -c "+$((size + 1))" "$log" | tail -n 3 | cut -c 1-200
    printf '{"gpu": %s, "commit": "%s", "part": "%s", "status": %d, "how": "%s", "seconds": %d}\n' \
        "$gpu" "$COMMIT" "$name" "$status" "$how" $((SECONDS - begin)) >>"$lines"
    if [ "$status" -gt 2 ]; then # what was under way is the last that began
        how+="; last line: $(grep -v '"part"' "$lines" | tail -n 1 | cut -c 1-300)"
    fi
    ended+=("$step: $name: $how")
}

# A kernel that hangs cannot be interrupted, so the limit of a test ends its process.
pytest=("$python" -m pytest -v --tb=short -p no:cacheprovider --timeout 60 --timeout-method thread)
tests=(tests/test_gpu.py tests/test_gpu_indexed.py)
exact="tests/test_gpu.py::test_kernel_is_as_exact_as_eager"
# What measures time, counts launches or fills the memory has the device to itself.
alone="half_padded or past_two_to or launch"

speed() { # part, seconds, shape, versions
    local command=("${suite[@]}" --shapes "$3" --versions "$4" --log "$lines" --out "$out")
    if [ "$dry" = 1 ]; then
        command+=(--dry)
        for fault in ${FAULTS:-}; do
            [ "${fault%=*}" != "$3" ] || command+=(--fault "${fault#*=}")
        done
    fi
    part "$1" "$2" "${command[@]}"
}

step_1() {
    if [ "$dry" = 0 ]; then
        part first 90 "${pytest[@]}" "${exact}[triton-torch.bfloat16-everything]"
        part behaviour 60 "${pytest[@]}" "${tests[@]}" \
            -k "not cuda and (repeats or stream or graph or odd_addresses)"
    fi
    for shape in $shapes; do
        speed "$shape" 45 "$shape" "${VERSIONS:-eager,triton}"
    done
}

step_2() {
    local some=()
    [ "$dry" = 0 ] || some=(two-tower)
    part tiles 570 "$python" -m benchmarks.tiles "$lines" "${some[@]}"
}

step_3() {
    local profiler=() shape
    for shape in two-tower wide catalogue; do
        if command -v ncu >/dev/null && [ "$dry" = 0 ]; then
            profiler=(ncu --clock-control none -f -o "$out/3-$shape" -k "regex:softmax_loss" -s 2 -c 1)
            profiler+=(--section SpeedOfLight --section WarpStateStats)
            profiler+=(--section MemoryWorkloadAnalysis)
        else
            echo "no profile: ncu is not installed, or this is a dry run" | tee -a "$log"
        fi
        part "$shape" 150 "${profiler[@]}" "$python" -m benchmarks.speed.one "$shape"
    done
}

# Compiling a form of the Triton kernel takes seconds, so the cases are shared out to processes.
step_4() {
    local each=() workers=$(($(nproc) > 2 ? $(nproc) - 2 : 1))
    [ "$dry" = 0 ] || each=(--collect-only -q)
    if "$python" -c "import xdist" 2>/dev/null; then # it starts a worker that died anew
        each+=(-n "$workers")
    else
        echo "one process only: pytest-xdist is not installed" | tee -a "$log"
    fi
    export OMP_NUM_THREADS=1
    part triton 330 "${pytest[@]}" -m gpu "${each[@]}" -k "not cuda and not ($alone)" "${tests[@]}"
    [ "$dry" = 0 ] || return
    part alone 60 "${pytest[@]}" -m gpu -k "not cuda and ($alone)" "${tests[@]}"
    part cuda 180 "${pytest[@]}" -m gpu "${each[@]}" -k "cuda and not ($alone)" "${tests[@]}"
    unset OMP_NUM_THREADS
}

step_5() {
    local shape peer
    if [ "$dry" = 0 ]; then
        if command -v compute-sanitizer >/dev/null; then
            # Every tensor is an allocation with ends of its own.
            part memcheck 80 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck \
                --error-exitcode 1 "${pytest[@]}" --timeout 0 "${exact}[triton-torch.bfloat16-everything]"
        else
            echo "no memory check: compute-sanitizer is not installed" | tee -a "$log"
        fi
        part build 75 "$python" -m dwl_kernels build --cuda \
            "$("$python" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')" \
            --dim 64 128 256
        part cuda-first 60 "${pytest[@]}" "${exact}[cuda-torch.bfloat16-everything]"
        part host 20 "$python" -m benchmarks.host "$out"
    fi
    for shape in ${SHAPES:-two-tower catalogue wide}; do
        speed "cuda-$shape" 45 "$shape" cuda
        speed "rivals-$shape" 60 "$shape" torch.compile,chunked,linear_cross_entropy
    done
    for peer in liger-kernel quack-kernels cut-cross-entropy; do
        speed "$peer" 60 catalogue "$peer"
    done
    for peer in memeff siglip-kernel; do
        speed "$peer" 45 unscaled "$peer"
    done
    part figures 60 "$python" -m benchmarks.speed --load "$out"/[15].jsonl --out "$out"
}

clocks=
trap '[ -z "$clocks" ] || kill "$clocks"' EXIT
for step in "$@"; do
    log=$out/$step.log lines=$out/$step.jsonl
    : >"$log"
    : >"$lines"
    if [ "$dry" = 0 ]; then
        nvidia-smi --query-gpu=timestamp,name,clocks.sm,clocks.mem,power.draw,temperature.gpu \
            --format=csv -lms 500 >"$out/$step-clocks.csv" &
        clocks=$!
    fi
    "step_$step"
    [ -z "$clocks" ] || kill "$clocks"
    clocks=
done
printf '%s\n' "" "${ended[@]}"
printf '%s\n' "${ended[@]}" | grep -qv ": ok$" && exit 1
exit 0
