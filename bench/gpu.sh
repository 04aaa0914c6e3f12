#!/usr/bin/env bash
# The kernel tests, then the microbenchmarks on the GPU, on a machine that need not reach anything.
#
#   bench/gpu.sh                    needs a Python with torch, triton, pytest, pytest-benchmark and hypothesis
#   WHEELS=folder bench/gpu.sh      takes what is missing from wheels in that folder (README.md beside this says which)
#   bench/gpu.sh --cpu              the same steps on the CPU, to try this script without a GPU: one round a case, whose
#                                   figures mean nothing, so none is required and none kept but where OUT says
#
# PYTHON names the interpreter (python3). Results go to $OUT, else to bench/results. With PEFT there, its layer is one of
# the ways compared; without the packages of bench/test_scoring_7b.py that case is skipped, and the exit status is 1.
# Exit status: 0 all passed, 1 a test or a case failed or the 7B case was not run, 2 it cannot run here.
set -uo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-python3}"
out="${OUT:-bench/results}"
device=cuda
[ "${1:-}" = --cpu ] && device=cpu
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT

if [ -n "${WHEELS:-}" ]; then
  # Beside the machine's own packages, not into them; and without requirements, so that its torch stays.
  "$python" -m pip install --quiet --no-index --no-deps --target "$work/site" "$WHEELS"/*.whl || exit 2
  export PYTHONPATH="$work/site${PYTHONPATH:+:$PYTHONPATH}"
fi

"$python" - "$device" <<'PY' || exit 2
import importlib.util
import sys

missing = [name for name in ("torch", "pytest", "pytest_benchmark", "hypothesis") if not importlib.util.find_spec(name)]
if missing:
    sys.exit(f"bench/gpu.sh: {sys.executable} has no {', '.join(missing)}; put the wheels into a folder and set WHEELS")
import torch

if sys.argv[1] == "cuda" and not torch.cuda.is_available():
    sys.exit("bench/gpu.sh: torch sees no CUDA device; --cpu tries the script without one")
triton = importlib.util.find_spec("triton") and importlib.import_module("triton").__version__
name = torch.cuda.get_device_name() if sys.argv[1] == "cuda" else "CPU"
print(f"{name}: Python {sys.version.split()[0]}, torch {torch.__version__}, triton {triton or 'missing'}")
PY

# Without a compiler the native ops are left out, and their tests say so.
"$python" setup.py --quiet build_ext --inplace >"$work/build" 2>&1 || { echo "csrc was not built:"; tail -3 "$work/build"; }
# Which of csrc's libraries load, with what built them, and whether a kernel of csrc/cuda spills.
"$python" -c 'from lorapar_kernels import native; s = native.status(); print(*(f"native {k}: {s[k]}" for k in native.KINDS), sep="\n")'
echo "csrc/cuda: $(grep -c "bytes spill stores" "$work/build") kernels compiled, $(grep "bytes spill stores" "$work/build" |
  grep -vc "0 bytes spill stores, 0 bytes spill loads") of them spill"

# Most of a CUDA test's time goes into compiling its kernels, so the layer's run beside each other, a process a dtype.
layer="test_cuda_equals_float64"
parts=("(cuda or gpu) and not $layer" "$layer and dtype0" "$layer and dtype1" "$layer and dtype2")
options=(--benchmark-only --benchmark-columns=median,iqr,rounds)
if [ "$device" = cpu ]; then
  parts=("not cuda and not gpu")
  options=(--benchmark-disable --no-requirements)
  out="${OUT:-$work/results}"
fi

status=0
echo "== kernel tests ($device)"
processes=()
for i in "${!parts[@]}"; do
  "$python" -m pytest tests/kernels --ignore=tests/kernels/interpret -q -p no:cacheprovider -m "not slow" -k "${parts[i]}" \
    >"$work/tests$i" 2>&1 &
  processes+=($!)
done
for i in "${!parts[@]}"; do
  wait "${processes[i]}" || status=1
  cat "$work/tests$i"
done
echo "== microbenchmarks ($device), after $SECONDS s"
# Within ten minutes whatever happens; interrupted, pytest still prints its table and writes what it has.
[ "$device" = cpu ] && ends=() || ends=(timeout --signal=INT "$((570 - SECONDS))")
"${ends[@]}" "$python" -m pytest bench -q -p no:cacheprovider -k "$device" --results "$out" \
  "${options[@]}" 2>&1 | tee "$work/bench" || status=1
# Where a package it needs is missing pytest skips it, which must not look like having reached what is required.
if ! grep -qF "scoring, 7B shape [$device]" "$work/bench"; then
  echo "== bench/test_scoring_7b.py was not run; $python -m pytest bench/test_scoring_7b.py -rs says why"
  status=1
fi
echo "== exit status $status after $SECONDS s"
exit "$status"
