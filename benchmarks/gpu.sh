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

part() { # name, seconds, command ...
    local name=$1 limit=$2
    shift 2
    echo "== $name"
    timeout "$limit" "$@" >"$out/$name.log" 2>&1
    local status=$?
    tail -n 3 "$out/$name.log"
    [ $status -eq 0 ] || { echo "$name ended with $status"; failed=1; }
}

if [ "${DRY:-0}" = 1 ]; then
    export TRITON_INTERPRET=1 DWL_KERNELS_CUDA_EMULATE=1
    part speed 120 "$python" -m benchmarks.speed --dry --out "$out"
    part tests 120 "$python" -m pytest -q -p no:cacheprovider tests/test_gpu.py
    exit $failed
fi

capability=$("$python" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')
part build 200 "$python" -m dwl_kernels build --cuda "$capability" --dim 16 32 64 96 128 192 256
# Named shapes leave out the growth, which `make bench` adds.
part speed 240 "$python" -m benchmarks.speed --out "$out" \
    --shapes small,two-tower,sequence,wide,catalogue,per-example
part tests 240 "$python" -m pytest -q -p no:cacheprovider -m gpu tests/test_gpu.py
if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck; do
        part "$tool" 60 compute-sanitizer --tool "$tool" --error-exitcode 1 "$python" -m pytest -q \
            -p no:cacheprovider tests/test_gpu.py -k "as_exact and everything and bfloat16"
    done
else
    echo "compute-sanitizer is not installed: memory checks left out" | tee "$out/sanitizer.log"
fi
exit $failed
