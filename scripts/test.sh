#!/usr/bin/env bash
# From nothing to a verdict: environment, lint, format, types, every test.
# Usage: scripts/test.sh [PYTEST ARGUMENTS]      for example: scripts/test.sh -m "not slow"
set -euo pipefail
cd "$(dirname "$0")/.."

scripts/make_venv.sh dev,aot
venv_path="$PWD/.venv/bin:$PATH"

PATH="$venv_path" ruff check .
PATH="$venv_path" ruff format --check .
PATH="$venv_path" pyright
# Two at a time, a file's tests together: a file shares its engines and compiled programs.
PATH="$venv_path" pytest -n 2 --dist loadfile "$@"

# Pallas' interpreter of GPU kernels is in JAX 0.11, which takes Python 3.12: where the tests
# above ran with less, those of GPU kernels run once more, in a second environment.
gpu_tests=(tests/pallas_kernels/*gpu*.py tests/engine/test_kernels.py)
for argument in "$@"; do
  if [[ -e ${argument%%::*} ]]; then
    exit 0  # somebody asked for certain tests, and has had them
  fi
done
if .venv/bin/python -c 'import jax, sys; sys.exit(jax.__version_info__ < (0, 11))'; then
  exit 0
fi
made=0
scripts/make_venv.sh test .venv-jax011 3.12 || made=$?
if ((made == 3)); then
  echo "NOT RUN: the GPU kernels' numerics (${gpu_tests[*]}) take JAX 0.11 and so Python 3.12." >&2
  exit 0
elif ((made)); then
  exit "$made"
fi
status=0
PATH="$PWD/.venv-jax011/bin:$PATH" pytest -n 2 "$@" "${gpu_tests[@]}" || status=$?
exit $((status == 5 ? 0 : status))  # 5: the arguments chose none of them
