#!/usr/bin/env bash
# All the evidence that a GPU can give in some minutes, on a machine that need not reach anything.
#
#   bench/gpu.sh [--program kernels|training|method] [--budget SECONDS] [--limit SECONDS] [--only STEP,...] [--cpu] [--list]
#
# PYTHON names the interpreter (python3), OUT the folder for results (gpu-results). WHEELS=folder takes what is missing
# from the wheels there. bench/README.md says what each program needs, and what to do with the results.
set -uo pipefail
# The budget counts from here, the wheels included.
LORAPAR_GPU_BEGAN="$(date +%s)"
export LORAPAR_GPU_BEGAN
python="${PYTHON:-python3}"
[ -z "${OUT:-}" ] || { mkdir -p "$OUT" && OUT="$(cd "$OUT" && pwd)" && export OUT; }
[ -z "${WHEELS:-}" ] || WHEELS="$(cd "$WHEELS" && pwd)" || exit 2
cd "$(dirname "$0")/.." || exit 2
if [ -n "${WHEELS:-}" ]; then
  site="${SITE:-$(mktemp -d)/site}"
  # Beside the machine's own packages, not into them; and without requirements, so that its torch stays.
  "$python" -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target "$site" "$WHEELS"/*.whl || exit 2
  export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
fi
exec "$python" -m bench.gpu.driver "$@"
