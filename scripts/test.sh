#!/usr/bin/env bash
# From nothing to a verdict: environment, lint, format, types, every test.
# Usage: scripts/test.sh [PYTEST ARGUMENTS]      for example: scripts/test.sh -m "not slow"
set -euo pipefail
cd "$(dirname "$0")/.."

scripts/make_venv.sh dev
export PATH="$PWD/.venv/bin:$PATH"

ruff check .
ruff format --check .
pyright
exec pytest "$@"
