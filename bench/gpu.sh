#!/usr/bin/env bash
# Build, test and measure on this machine's card; `--dry` runs all of it, small, without one. No network is used.
# Python packages that are missing may lie as wheels in $LALORA_WHEELS (default: bench/wheels).
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-}
[ -n "$python" ] || { [ -x .venv/bin/python ] && python=.venv/bin/python || python=python3; }
wheels=${LALORA_WHEELS:-bench/wheels}
if compgen -G "$wheels/*.whl" >/dev/null; then
  site=$(mktemp -d)
  trap 'rm -rf "$site"' EXIT
  "$python" -m pip install -q --no-index --no-deps --no-compile --upgrade --target "$site" "$wheels"/*.whl
  export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
fi
dry=0
for argument in "$@"; do [ "$argument" = --dry ] && dry=1; done
if [ "$dry" = 1 ]; then
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TRITON_INTERPRET=1
  "$python" -c 'import lalora_kernels._C' 2>/dev/null || LALORA_NO_CUDA=1 "$python" setup.py -q build_ext --inplace
else
  export TRITON_INTERPRET=0
  arch=$("$python" -c 'import torch; print("".join(map(str, torch.cuda.get_device_capability())))') || {
    echo "no CUDA device; without one: bash bench/gpu.sh --dry" >&2
    exit 2
  }
  [ "$arch" = 90 ] && arch=90a # the cluster kernel's own target
  LALORA_CUDA_ARCHS=${LALORA_CUDA_ARCHS:-$arch} "$python" setup.py -q build_ext --inplace
fi
LALORA_GPU_SPENT=$SECONDS "$python" bench/gpu_run.py "$@"
