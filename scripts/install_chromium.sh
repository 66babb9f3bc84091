#!/usr/bin/env bash
# A Chromium for the tests of the page at `/`: the one that is there, or Debian's.
# Fails, and says why, where there is none and none can be installed; the tests are skipped then.
set -euo pipefail

for name in chromium chromium-browser google-chrome google-chrome-stable; do
  if command -v "$name" >/dev/null; then
    exit 0
  fi
done
give_up() {
  echo "no Chromium here, and $1" >&2
  exit 1
}
command -v apt-get >/dev/null || give_up "no apt-get to install it with"
[[ $(id -u) == 0 ]] || give_up "only root may install it (apt-get install chromium)"

# The download may be cut off when it takes too long; the installation must not be.
apt=(env DEBIAN_FRONTEND=noninteractive apt-get -qq -o Dpkg::Use-Pty=0)
download() {
  timeout 20 "${apt[@]}" update && timeout 60 "${apt[@]}" install -y --download-only \
    --no-install-recommends chromium
}
download >/dev/null 2>&1 || give_up "it could not be downloaded (apt-get install chromium)"
"${apt[@]}" install -y --no-install-recommends chromium >/dev/null 2>&1 ||
  give_up "apt-get could not install it"
