#!/usr/bin/env bash
# Hostile input for some minutes, over HTTP, gRPC and in files: no bug, no crash, no leaked page.
# Usage: scripts/fuzz.sh [--minutes 10]      after scripts/test.sh, which makes the environment
set -euo pipefail
cd "$(dirname "$0")/.."

minutes=10
if [[ ${1:-} == --minutes ]]; then
  minutes="$2"
elif (($#)); then
  sed -n '2,3s/^# //p' "$0" >&2
  exit 2
fi
export PATH="$PWD/.venv/bin:$PATH"

# Rounds with seeds of their own; what fails prints its seed.
end=$((SECONDS + minutes * 60)) rounds=0
while ((SECONDS < end)); do
  seed=$((RANDOM * 32768 + RANDOM))
  status=0
  timeout $((end - SECONDS + 1)) pytest -q -x -p no:cacheprovider --hypothesis-profile=rounds \
    --hypothesis-seed="$seed" tests/server/http/test_fuzz_http.py tests/server/test_fuzz_grpc.py \
    tests/checkpoints/test_fuzz_files.py \
    >"${TMPDIR:-/tmp}/jaxserve-fuzz.log" 2>&1 || status=$?
  if ((status == 124)); then # the time was up
    break
  elif ((status)); then
    cat "${TMPDIR:-/tmp}/jaxserve-fuzz.log"
    echo "round $((rounds + 1)) failed; again: pytest --hypothesis-profile=rounds --hypothesis-seed=$seed" >&2
    exit "$status"
  fi
  rounds=$((rounds + 1))
done
echo "$minutes minutes, $rounds whole rounds and a part of one: nothing found"
