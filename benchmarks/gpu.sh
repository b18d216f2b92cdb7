#!/usr/bin/env bash
# The whole GPU round: tests marked gpu, compute-sanitizer on small shapes, the speed shapes.
#   benchmarks/gpu.sh OUT          on a machine with a CUDA device, less than 10 minutes
#   DRY=1 benchmarks/gpu.sh OUT    tiny sizes on a CPU, to try this script
# Each part has its own limit; a part that fails does not stop the others. OUT/gpu.log grows as they
# run, so that nothing is lost where time runs out. Peers that PYTHONPATH does not name, and that are
# not installed, are left out.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:?usage: benchmarks/gpu.sh OUT}
python=${PYTHON:-python3}
mkdir -p "$out"
out=$(cd "$out" && pwd)
export PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
COMMIT=${COMMIT:-$(git rev-parse --short HEAD 2>/dev/null || echo unknown)}
export COMMIT
failed=0
log=$out/gpu.log
: >"$log"

part() { # name, seconds, command ...
    local name=$1 limit=$2 begin
    shift 2
    echo "== $name"
    begin=$(wc -c <"$log")
    echo "== $name: $*" >>"$log"
    timeout -k 3 "$limit" "$@" >>"$log" 2>&1
    local status=$?
    echo "== $name ended with $status at $SECONDS s" >>"$log"
    tail -c "+$((begin + 1))" "$log" | grep -E ' (FAILED|ERROR) ' | head -n 20
    tail -n 4 "$log"
    [ $status -eq 0 ] || failed=1
}

# A kernel that hangs cannot be interrupted, so the limit of a test ends its process.
pytest="$python -m pytest -v --tb=short -p no:cacheprovider --timeout 60 --timeout-method thread"
# Compiling a form of the Triton kernel takes seconds, so the cases are shared out to processes.
shards() { # number
    local pids=() status=0 k
    for ((k = 0; k < $1; k++)); do
        (
            set -o pipefail
            $pytest -m gpu --shard "$k/$1" -k "not ($alone)" $tests 2>&1 | sed -u "s/^/$k: /"
        ) &
        pids+=($!)
    done
    for k in "${pids[@]}"; do wait "$k" || status=1; done
    return $status
}
# What measures time, counts launches or fills the memory has the device to itself.
alone="half_padded or past_two_to or launch"
tests="tests/test_gpu.py tests/test_gpu_indexed.py"
export -f shards
export pytest tests alone

if [ "${DRY:-0}" = 1 ]; then
    export TRITON_INTERPRET=1 DWL_KERNELS_CUDA_EMULATE=1
    part compile 120 "$python" -m benchmarks.speed.warm --dry
    part speed 120 "$python" -m benchmarks.speed --dry --out "$out"
    part tests 120 bash -c "shards 2"
    exit $failed
fi

# The limits add up to less than ten minutes.
exact="tests/test_gpu.py::test_kernel_is_as_exact_as_eager"
part first 40 $pytest "$exact[triton-torch.bfloat16-everything]"
capability=$("$python" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')
shapes=small,two-tower,sequence,wide,catalogue,per-example # the growth is left to `make bench`
part compile 75 bash -c "
    $python -m dwl_kernels build --cuda $capability --dim 16 32 64 96 128 192 256 & built=\$!
    $python -m benchmarks.speed.warm --shapes $shapes; warmed=\$?
    wait \$built && exit \$warmed"
part speed 200 "$python" -m benchmarks.speed --out "$out" --shapes $shapes
part host 20 "$python" -m benchmarks.host "$out"
part alone 45 $pytest -m gpu -k "$alone" $tests
export OMP_NUM_THREADS=1
part tests $((505 - SECONDS)) bash -c "shards $(($(nproc) > 2 ? $(nproc) - 2 : 1))"
if command -v compute-sanitizer >/dev/null; then
    export PYTORCH_NO_CUDA_MEMORY_CACHING=1 # every tensor an allocation with ends of its own
    for tool in memcheck racecheck; do
        part "$tool" 40 compute-sanitizer --tool "$tool" --error-exitcode 1 $pytest --timeout 0 \
            "$exact[triton-torch.bfloat16-everything]" "$exact[cuda-torch.bfloat16-everything]"
    done
else
    echo "compute-sanitizer is not installed: memory checks left out" | tee -a "$log"
fi
exit $failed
