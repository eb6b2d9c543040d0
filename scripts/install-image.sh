#!/usr/bin/env bash
# What an image holds: the RUN steps of the Dockerfile.
#
#   scripts/install-image.sh dependencies cpu|cuda VENV    make VENV: vLLM and what it needs
#   scripts/install-image.sh package VENV DIRECTORY        mdkv-vllm, to be copied over VENV
#
# Two steps make two layers of an image: the large one changes with the pins alone. Nothing is
# editable, and the source folder can go afterwards.
set -euo pipefail

readonly USAGE="usage: scripts/install-image.sh dependencies cpu|cuda VENV | package VENV DIRECTORY"

cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/packages.sh
source scripts/packages.sh

case "$#:${1:-}:${2:-}" in
    3:dependencies:cpu)
        readonly VENV="$3"
        "${PYTHON:-python3}" -m venv "$VENV"
        install_cpu_requirements
        install_vllm_metadata
        install_requirements requirements/default-model.txt
        ;;
    3:dependencies:cuda)
        readonly VENV="$3"
        "${PYTHON:-python3}" -m venv "$VENV"
        install_requirements requirements/cuda.txt
        ;;
    3:package:*)
        readonly VENV="$2"
        # Evaluation is for those who choose a budget, not for those who serve at it.
        export MDKV_SERVING_ONLY=1
        install_copy "$3" pyproject.toml setup.py README.md csrc mdkv_vllm triton_kernels
        ;;
    *)
        printf 'install-image: %s\n' "$USAGE" >&2
        exit 2
        ;;
esac
