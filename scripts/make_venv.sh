#!/usr/bin/env bash
# Makes .venv with jaxserve in it, editable, or does nothing where it is up to date.
# Usage: scripts/make_venv.sh [EXTRA]      EXTRA: dev, cuda12, cuda13, tpu (see pyproject.toml)
set -euo pipefail
cd "$(dirname "$0")/.."
extra="${1:-}"

is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

find_python() {
  local name
  for name in python3 python python3.13 python3.12 python3.11; do
    if command -v "$name" >/dev/null && is_new_enough "$name"; then
      echo "$name"
      return
    fi
  done
  echo "jaxserve needs Python 3.11 or newer, and there is none on PATH." >&2
  return 1
}

# The stamp says what was installed. Any extra includes what the package itself needs.
stamp=.venv/.jaxserve-installed
made_in="" made_from="" made_extra=""
if [[ -f $stamp ]]; then
  { read -r made_in; read -r made_from; read -r made_extra; } <"$stamp"
fi
project="$(cksum <pyproject.toml)"

if ! is_new_enough .venv/bin/python || [[ -n $made_in && $made_in != "$PWD" ]]; then
  # None yet, or one that was moved here: its scripts name the old folder.
  python="$(find_python)"
  echo "making .venv with $("$python" --version)" >&2
  rm -rf .venv
  "$python" -m venv .venv
elif [[ $made_from == "$project" && (-z $extra || $made_extra == "[$extra]") ]]; then
  exit 0
fi
echo "installing jaxserve${extra:+[$extra]} into .venv" >&2
rm -f "$stamp"
.venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".${extra:+[$extra]}"
printf '%s\n' "$PWD" "$project" "[$extra]" >"$stamp"
