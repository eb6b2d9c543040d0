#!/usr/bin/env bash
# Build the CUDA kernels (csrc/cuda) into mdkv_vllm/libmdkv_cuda.so.
#
#   scripts/build-cuda.sh             every architecture that is meant, as far as nvcc knows it
#   scripts/build-cuda.sh 80 90a      these; code for later GPUs (PTX) is that of the last one
#
# NVCC=/path/to/nvcc picks the compiler; otherwise the one on the PATH, that of a CUDA toolkit in its usual
# place, or that in .venv. OUT= names another file, BUILD= the folder for objects and logs, JOBS= how many
# compilers run at once.
set -euo pipefail

readonly ARCHITECTURES=(80 89 90a 100 120)

cd "$(dirname "${BASH_SOURCE[0]}")/.."
readonly OUT="${OUT:-mdkv_vllm/libmdkv_cuda.so}"
readonly BUILD="${BUILD:-build/cuda}"
readonly JOBS="${JOBS:-2}"

fail() {
    printf 'build-cuda: %s\n' "$1" >&2
    exit 1
}

sizes="$(sed -n 's/^constexpr int kHeadSizes\[\] = {\(.*\)};/\1/p' csrc/cuda/tables.cuh | tr -d ,)"
read -ra HEAD_SIZES <<<"$sizes"
readonly HEAD_SIZES
((${#HEAD_SIZES[@]})) || fail "csrc/cuda/tables.cuh names no head sizes"

find_nvcc() {
    local candidate
    for candidate in "${NVCC:-}" nvcc /usr/local/cuda/bin/nvcc \
        .venv/lib/python3*/site-packages/nvidia/cu*/bin/nvcc; do
        if [[ -n "$candidate" ]] && command -v "$candidate" >/dev/null; then
            command -v "$candidate"
            return 0
        fi
    done
    return 1
}

nvcc="$(find_nvcc)" || fail "no nvcc found; install a CUDA toolkit of 12.0 or later, or set NVCC="
known="$("$nvcc" --list-gpu-arch)"

architectures=("$@")
if ((${#architectures[@]} == 0)); then
    for architecture in "${ARCHITECTURES[@]}"; do
        if grep -qx "compute_${architecture%a}" <<<"$known"; then
            architectures+=("$architecture")
        fi
    done
fi
targets=()
for architecture in "${architectures[@]}"; do
    grep -qx "compute_${architecture%a}" <<<"$known" ||
        fail "$nvcc knows no compute_$architecture; it knows $(tr '\n' ' ' <<<"$known")"
    targets+=(-gencode "arch=compute_$architecture,code=sm_$architecture")
done
newest="${architectures[-1]%a}"
targets+=(-gencode "arch=compute_$newest,code=compute_$newest")

flags=(-std=c++17 -O3 --compress-mode=size "${targets[@]}" -Werror all-warnings
    -Xcompiler "-fPIC,-fvisibility=hidden,-Wall,-Wextra,-Werror,-Wno-unknown-pragmas" -Xptxas -v)
# Older compilers do not know the option.
"$nvcc" --help | grep -q -- --compress-mode || flags=("${flags[@]/--compress-mode=size/}")

# compile NAME SOURCE [FLAG]: an object, and what ptxas says of its kernels in NAME.log.
compile() {
    local name="$1" source="$2"
    shift 2
    if ! "$nvcc" "${flags[@]}" "$@" -c "csrc/cuda/$source" -o "$BUILD/$name.o" \
        >"$BUILD/$name.log" 2>&1; then
        cat "$BUILD/$name.log" >&2
        return 1
    fi
}

mkdir -p "$BUILD" "$(dirname "$OUT")"
rm -f "$BUILD"/*.o "$BUILD"/*.log
objects=("$BUILD/mixed_decode.o")
compile mixed_decode mixed_decode.cu &
for size in $(printf '%s\n' "${HEAD_SIZES[@]}" | sort -rn); do # the longest first
    while (($(jobs -rp | wc -l) >= JOBS)); do wait -n || true; done
    compile "attend_$size" attend.cu "-DMDKV_HEAD_SIZE=$size" &
    objects+=("$BUILD/attend_$size.o")
done
wait
for object in "${objects[@]}"; do
    [[ -f "$object" ]] || fail "compiling failed"
done
# PyPI's compiler has its libraries in lib, a toolkit in lib64.
"$nvcc" -shared -cudart static -L"$(dirname "$(dirname "$nvcc")")/lib" "${objects[@]}" -o "$OUT" ||
    fail "linking failed"
printf 'build-cuda: %s for %s, and PTX of %s\n' "$OUT" "${architectures[*]}" "$newest"
