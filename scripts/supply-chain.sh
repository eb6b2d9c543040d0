#!/usr/bin/env bash
# Say what is installed, and what is known against it.
#
#   scripts/supply-chain.sh sbom PYTHON FILE     CycloneDX JSON of the environment of PYTHON
#   scripts/supply-chain.sh audit REQUIREMENTS...    known vulnerabilities, asked over the network
#
# The tools live in build/supply-chain and are installed when missing.
set -euo pipefail

readonly USAGE="usage: scripts/supply-chain.sh sbom PYTHON FILE | audit REQUIREMENTS..."

cd "$(dirname "${BASH_SOURCE[0]}")/.."
readonly VENV="$PWD/build/supply-chain"
# shellcheck source=scripts/packages.sh
source scripts/packages.sh

command="${1:-}"
if [[ ! "$command:$#" =~ ^(sbom:3|audit:([2-9]|[1-9][0-9]+))$ ]]; then
    printf 'supply-chain: %s\n' "$USAGE" >&2
    exit 2
fi
shift

if ! cmp --silent requirements/supply-chain.txt "$VENV/installed.txt"; then
    rm -rf "$VENV"
    python3 -m venv "$VENV"
    install_requirements requirements/supply-chain.txt >"$VENV/install.log" 2>&1 || {
        tail -n 20 "$VENV/install.log" >&2
        exit 1
    }
    cp requirements/supply-chain.txt "$VENV/installed.txt"
fi

if [[ "$command" == sbom ]]; then
    mkdir -p "$(dirname "$2")"
    "$VENV/bin/cyclonedx-py" environment --pyproject pyproject.toml --mc-type application \
        --output-reproducible --output-file "$2" "$1"
    printf 'Written: %s\n' "$2"
else
    # Every package has its exact version, so nothing is resolved; what could not be looked up fails.
    for requirements in "$@"; do
        printf '%s\n' "$requirements"
        "$VENV/bin/pip-audit" --strict --no-deps --disable-pip --requirement "$requirements"
    done
fi
