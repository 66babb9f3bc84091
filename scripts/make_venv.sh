#!/usr/bin/env bash
# Makes a virtual environment with jaxserve in it, editable, or does nothing where it is up to date.
# Usage: scripts/make_venv.sh [EXTRAS [FOLDER [PYTHON [BASE]]]]
#   EXTRAS   comma-separated: dev, aot, cuda12, cuda13, tpu, ... (see pyproject.toml)
#   FOLDER   where, .venv unless told otherwise
#   PYTHON   the oldest Python that will do, 3.11 unless told otherwise
#   BASE     an environment whose packages, and whose Python, the new one has as well
# Ends with 3 if this machine has no such Python.
set -euo pipefail
cd "$(dirname "$0")/.."
extras="${1:-}"
venv="${2:-.venv}"
oldest="${3:-3.11}"
base="${4:-}"

# Runs what it asks: a shim may be on PATH for a Python that it then refuses to start.
is_new_enough() {
  "$1" -c "import sys; sys.exit(sys.version_info < (${oldest/./, }))" 2>/dev/null
}

find_python() {
  local candidate
  for candidate in python3 python python3.1{4,3,2,1} \
    "${PYENV_ROOT:-$HOME/.pyenv}"/versions/*/bin/python; do
    if command -v "$candidate" >/dev/null && is_new_enough "$candidate"; then
      echo "$candidate"
      return
    fi
  done
  echo "There is no Python $oldest or newer on PATH or among pyenv's versions." >&2
  return 3
}

# Whether every extra wanted is among those installed. Any includes what the package itself needs.
has_extras() {
  local extra
  for extra in ${extras//,/ }; do
    [[ ",$1," == *",$extra,"* ]] || return 1
  done
}

# The stamp says what was installed.
stamp="$venv/.jaxserve-installed"
made_in="" made_from="" made_extras=""
if [[ -f $stamp ]]; then
  { read -r made_in; read -r made_from; read -r made_extras; } <"$stamp"
fi
project="$(cksum <pyproject.toml)"

if ! is_new_enough "$venv/bin/python" || [[ -n $made_in && $made_in != "$PWD" ]]; then
  # None yet, or one that was moved here: its scripts name the old folder.
  python="${base:+$base/bin/python}"
  python="${python:-$(find_python)}"
  echo "making $venv with $("$python" --version)" >&2
  rm -rf "$venv"
  "$python" -m venv ${base:+--without-pip} "$venv"
  if [[ -n $base ]]; then
    for folder in "$venv"/lib/python*/site-packages; do
      "$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' >"$folder/base.pth"
    done
  fi
elif [[ $made_from == "$project" ]] && has_extras "$made_extras"; then
  exit 0
fi
echo "installing jaxserve${extras:+[$extras]} into $venv, which takes a few minutes" >&2
rm -f "$stamp"
# Python compiles what is imported, once; pip would compile everything, which takes longer than the
# rest of what it does. Only an environment to serve from has it done now, or its first start would.
compile=--no-compile
[[ $extras =~ (dev|test|aot) ]] || compile=--compile
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$compile" \
  --editable ".${extras:+[$extras]}"
printf '%s\n' "$PWD" "$project" "$extras" >"$stamp"
