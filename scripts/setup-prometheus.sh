#!/usr/bin/env bash
# Put Debian's prometheus and promtool into .venv/bin, for the tests of deploy/. Nothing is
# installed on the system and no service is started. Does nothing where both are on the PATH.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
readonly VENV="$PWD/.venv"
export PATH="$VENV/bin:$PATH"

if command -v prometheus >/dev/null && command -v promtool >/dev/null; then
    exit 0
fi
if ! command -v apt-get >/dev/null; then
    echo "setup-prometheus: no prometheus and promtool on the PATH, and no apt-get to get them" >&2
    exit 1
fi
# Package lists may be missing or old; with good ones, apt-get download needs no root.
if [[ "$(id -u)" == 0 ]]; then
    apt-get update
fi
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
(cd "$folder" && apt-get -o APT::Sandbox::User=root download prometheus)
dpkg-deb -x "$folder"/prometheus_*.deb "$folder/root"
install -m 755 "$folder/root/usr/bin/prometheus" "$folder/root/usr/bin/promtool" "$VENV/bin/"
