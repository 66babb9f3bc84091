#!/usr/bin/env bash
# From nothing to a verdict: environment, lint, format, types, every test.
# Usage: scripts/test.sh [PYTEST ARGUMENTS]      for example: scripts/test.sh -m "not slow"
set -euo pipefail
cd "$(dirname "$0")/.."

# Two tests at a time.
run_tests() {
  local venv="$1" status=0
  shift
  PATH="$PWD/$venv/bin:$PATH" pytest -n 2 "$@" || status=$?
  return $((status == 5 ? 0 : status))  # 5: the arguments chose none of them
}

is_all=true  # or certain tests only, which somebody asked for
for argument in "$@"; do
  [[ ! -e ${argument%%::*} ]] || is_all=false
done

trap 'kill $(jobs -p) 2>/dev/null || true' EXIT
scripts/make_venv.sh dev
export PATH="$PWD/.venv/bin:$PATH"
is_newest=true  # JAX: from 0.11 on, which takes Python 3.12, it interprets GPU kernels
python -c 'import jax, sys; sys.exit(jax.__version_info__ < (0, 11))' || is_newest=false
# While one core lints, the other makes the environments below and compiles the CPU's kernels, which
# every worker would otherwise do by itself.
if $is_all; then
  {
    scripts/make_venv.sh test,aot .venv-aot
    $is_newest || scripts/make_venv.sh test .venv-newest 3.12 || true  # looked at below
  } &
  making=$!
  python -c 'from pallas_kernels import linear, paged_attention
linear.prepare("cpu"), paged_attention.prepare("cpu")' &
fi
ruff check .
ruff format --check .
pyright
scripts/install_chromium.sh || echo "NOT RUN: the page's tests in a browser." >&2
# A file's tests together, since they share engines and compiled programs, and files in the order
# that tests/conftest.py gives them.
run_tests .venv --dist loadfile --no-loadscope-reorder "$@"
$is_all || exit 0  # they have had them

# The compilers of TPUs and GPUs live apart: with them installed, JAX looks for such devices.
wait "$making"
run_tests .venv-aot --dist worksteal "$@" tests/aot tests/pallas_kernels/*aot*.py

# Where the tests above had an older JAX, those that differ run once more with the newest.
newest_tests=(tests/pallas_kernels/test_*gpu.py tests/pallas_kernels/test_tpu_interpreter.py
  tests/engine/test_kernels.py::test_gpu_kernels)
! $is_newest || exit 0
made=0
scripts/make_venv.sh test .venv-newest 3.12 || made=$?
if ((made == 3)); then
  echo "NOT RUN: the GPU kernels' numerics (${newest_tests[*]}) take Python 3.12." >&2
  exit 0
elif ((made)); then
  exit "$made"
fi
run_tests .venv-newest --dist worksteal "$@" "${newest_tests[@]}"
