#!/usr/bin/env bash
# The whole GPU round: tests marked gpu, compute-sanitizer on small shapes, the speed shapes.
#   benchmarks/gpu.sh OUT          on a machine with a CUDA device, about 10 minutes
#   DRY=1 benchmarks/gpu.sh OUT    tiny sizes on a CPU, to try this script
# Each part has its own limit and log; a part that fails does not stop the others.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:?usage: benchmarks/gpu.sh OUT}
python=${PYTHON:-python3}
mkdir -p "$out"
export PYTHONPATH=. PYTHONUNBUFFERED=1
COMMIT=${COMMIT:-$(git rev-parse --short HEAD 2>/dev/null || echo unknown)}
export COMMIT
failed=0

logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT
: >"$out/gpu.log"

part() { # name, seconds, command ...
    local name=$1 limit=$2
    shift 2
    echo "== $name"
    timeout "$limit" "$@" >"$logs/$name" 2>&1
    local status=$?
    { echo "== $name: $*"; cat "$logs/$name"; echo "== ended with $status"; } >>"$out/gpu.log"
    tail -n 3 "$logs/$name"
    [ $status -eq 0 ] || { echo "$name ended with $status"; failed=1; }
}

pytest="$python -m pytest -q -p no:cacheprovider"
# Compiling a form of the Triton kernel takes seconds, so the cases are shared out to processes.
shards() { # number
    local pids=() status=0 k
    for ((k = 0; k < $1; k++)); do
        $pytest -m gpu --shard "$k/$1" -k "not ($alone)" $tests >"$logs/shard-$k" 2>&1 &
        pids+=($!)
    done
    for k in "${pids[@]}"; do wait "$k" || status=1; done
    cat "$logs"/shard-*
    return $status
}
# What measures time, counts launches or fills the memory has the device to itself.
alone="half_padded or past_two_to or launch"
tests="tests/test_gpu.py tests/test_gpu_indexed.py"

if [ "${DRY:-0}" = 1 ]; then
    export TRITON_INTERPRET=1 DWL_KERNELS_CUDA_EMULATE=1
    part speed 120 "$python" -m benchmarks.speed --dry --out "$out"
    export -f shards
    export pytest tests alone logs
    part tests 120 bash -c "shards 2"
    exit $failed
fi

# The limits add up to less than ten minutes.
capability=$("$python" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')
part build 70 "$python" -m dwl_kernels build --cuda "$capability" --dim 16 32 64 96 128 192 256
# Named shapes leave out the growth, which `make bench` adds.
part speed 190 "$python" -m benchmarks.speed --out "$out" \
    --shapes small,two-tower,sequence,wide,catalogue,per-example
part alone 50 $pytest -m gpu -k "$alone" $tests
export -f shards
export pytest tests alone logs
part tests 210 bash -c "shards $(($(nproc) > 2 ? $(nproc) - 2 : 1))"
if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck; do
        part "$tool" 35 compute-sanitizer --tool "$tool" --error-exitcode 1 $pytest \
            tests/test_gpu.py -k "as_exact and everything and bfloat16"
    done
else
    echo "compute-sanitizer is not installed: memory checks left out" | tee -a "$out/gpu.log"
fi
exit $failed
