#!/usr/bin/env bash
# From nothing to a verdict: environment, lint, format, types, every test.
# Usage: scripts/test.sh [PYTEST ARGUMENTS]      for example: scripts/test.sh -m "not slow"
#
# Two things go on at a time. The main tests have two workers; beside them, so that no core waits
# for the other, types are checked and the tests run that take an environment of their own. What
# the latter say is shown in the end.
set -euo pipefail
cd "$(dirname "$0")/.."
# Where it is set, as in some images, each of hundreds of processes would compile all that it imports.
unset PYTHONDONTWRITEBYTECODE

# Usage: run_tests ENVIRONMENT WORKERS PYTEST_ARGUMENTS...
run_tests() {
  local venv="$1" workers="$2" status=0
  shift 2
  PATH="$PWD/$venv/bin:$PATH" "$venv/bin/python" -m pytest -n "$workers" "$@" || status=$?
  return $((status == 5 ? 0 : status))  # 5: the arguments chose none of them
}

is_all=true  # or certain tests only, which somebody asked for
for argument in "$@"; do
  [[ ! -e ${argument%%::*} ]] || is_all=false
done

scripts/make_venv.sh dev
export PATH="$PWD/.venv/bin:$PATH"
ruff check .
ruff format --check .

run_beside() {
  local cache=.pytest_cache/beside  # the main tests have their own
  pyright
  $is_all || return 0  # they have had them

  # The compilers of TPUs and GPUs live apart: with them installed, JAX looks for such devices.
  scripts/make_venv.sh aot .venv-aot 3.11 .venv
  run_tests .venv-aot 1 -o "cache_dir=$cache" "$@" tests/aot tests/pallas_kernels/*aot*.py

  # Where the main tests have an older JAX, those that differ run once more with the newest: from
  # 0.11 on, which takes Python 3.12, it interprets GPU kernels.
  local made=0 newest_tests=(tests/pallas_kernels/test_*gpu.py
    tests/pallas_kernels/test_tpu_interpreter.py tests/engine/test_kernels.py::test_gpu_kernels)
  ! python -c 'import jax, sys; sys.exit(jax.__version_info__ < (0, 11))' || return 0
  scripts/make_venv.sh test .venv-newest 3.12 || made=$?
  if ((made == 3)); then
    echo "NOT RUN: the GPU kernels' numerics (${newest_tests[*]}) take Python 3.12."
    return 0
  fi
  ((made == 0))
  run_tests .venv-newest 1 -o "cache_dir=$cache" "$@" "${newest_tests[@]}"
}
beside="$(mktemp)"
trap 'for job in $(jobs -p); do kill -- "-$job" 2>/dev/null || true; done; rm -f "$beside"' EXIT
set -m  # in a process group of its own, to be ended with all that it has started
(run_beside "$@") >"$beside" 2>&1 &
running_beside=$!
set +m

scripts/install_chromium.sh || echo "NOT RUN: the page's tests in a browser." >&2
# Once, and not by every worker.
python -c 'from pallas_kernels import linear, paged_attention
from pallas_kernels.weights import Format
linear.prepare("cpu")
for kv_dtype in ("float32", "int8"):
    paged_attention.prepare("cpu", kv_dtype)
for activations in ("float", "int8"):
    linear.prepare("cpu", Format("int8"), activations)'
# A file's tests together, since they share engines and compiled programs, and files in the order
# that tests/conftest.py gives them.
status=0
run_tests .venv 2 --dist loadfile --no-loadscope-reorder "$@" || status=$?

wait "$running_beside" || { status=$?; echo "FAILED beside the main tests:" >&2; }
cat "$beside"
exit "$status"
