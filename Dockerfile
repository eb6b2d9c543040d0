# Images for CPUs and for NVIDIA GPUs: `vllm` and `mdkv` on the path.
#
#   docker build --target cpu --tag mdkv-vllm:0.1.0-cpu .
#   docker build --target cuda --tag mdkv-vllm:0.1.0-cuda .
#
# Runs as user 10001 and with a read-only root: what is written goes to /var/cache/mdkv (HOME:
# compiled kernels) and /tmp; models and hub downloads live in the volume /models, head scores and
# bases in /artifacts. How to run it is in docs/container.md.
#
# Base images are pinned by tag. A builder that can look them up should pin the digest as well:
#   --build-arg PYTHON_IMAGE=python:3.11.14-slim-bookworm@sha256:...
ARG PYTHON_IMAGE=python:3.11.14-slim-bookworm
# A glibc no newer than that of the image above.
ARG CUDA_IMAGE=nvidia/cuda:13.0.2-devel-ubuntu22.04

# What compiles; nothing of it is in an image but what is copied from it.
FROM ${PYTHON_IMAGE} AS build
# Debian keeps one version of a package per release, so that a pin would soon find nothing.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
ENV PIP_NO_CACHE_DIR=1
WORKDIR /opt/source
COPY scripts/install-image.sh scripts/packages.sh scripts/
COPY requirements requirements

FROM build AS cpu-dependencies
# torch must be the CPU build; see README.md.
ARG PIP_EXTRA_INDEX_URL
RUN scripts/install-image.sh dependencies cpu /opt/mdkv

FROM build AS cuda-dependencies
RUN scripts/install-image.sh dependencies cuda /opt/mdkv

FROM ${CUDA_IMAGE} AS cuda-kernels
WORKDIR /opt/source
COPY scripts/build-cuda.sh scripts/
COPY csrc/common csrc/common
COPY csrc/cuda csrc/cuda
RUN OUT=/opt/kernels/libmdkv_cuda.so scripts/build-cuda.sh

FROM cpu-dependencies AS cpu-package
COPY pyproject.toml setup.py README.md ./
COPY csrc csrc
COPY triton_kernels triton_kernels
COPY mdkv_vllm mdkv_vllm
RUN scripts/install-image.sh package /opt/mdkv /opt/package

FROM cuda-dependencies AS cuda-package
COPY pyproject.toml setup.py README.md ./
COPY csrc csrc
COPY triton_kernels triton_kernels
COPY mdkv_vllm mdkv_vllm
RUN scripts/install-image.sh package /opt/mdkv /opt/package

# What both images are but for their packages.
FROM ${PYTHON_IMAGE} AS runtime
RUN groupadd --gid 10001 mdkv \
    && useradd --uid 10001 --gid mdkv --no-create-home --home-dir /var/cache/mdkv mdkv \
    && install --directory --owner mdkv --group mdkv /var/cache/mdkv /models /artifacts
ENV HOME=/var/cache/mdkv \
    HF_HOME=/models/huggingface \
    PATH=/opt/mdkv/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    VLLM_NO_USAGE_STATS=1
WORKDIR /var/cache/mdkv
VOLUME ["/models", "/var/cache/mdkv"]
EXPOSE 8000
HEALTHCHECK --start-period=30m --interval=15s --timeout=10s --retries=4 \
    CMD ["python3", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health')"]
ENTRYPOINT ["vllm", "serve"]
ARG REVISION=""
LABEL org.opencontainers.image.title="mdkv-vllm" \
      org.opencontainers.image.description="vLLM with a mixed-dimension paged KV cache" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.revision="$REVISION"

FROM runtime AS cpu
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libgomp1 libnuma1 \
    && rm -rf /var/lib/apt/lists/*
COPY --from=cpu-dependencies /opt/mdkv /opt/mdkv
COPY --from=cpu-package /opt/package /opt/mdkv
USER 10001:10001

FROM runtime AS cuda
# Triton compiles launchers at run time.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev libgomp1 libnuma1 \
    && rm -rf /var/lib/apt/lists/*
# torch brings the CUDA libraries; the driver comes from the host through these two.
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=cuda-dependencies /opt/mdkv /opt/mdkv
COPY --from=cuda-package /opt/package /opt/mdkv
COPY --from=cuda-kernels /opt/kernels /opt/mdkv/lib/python3.11/site-packages/mdkv_vllm
USER 10001:10001
