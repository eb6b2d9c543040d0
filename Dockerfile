# CPU image: the same steps as `make serve`, by the same scripts.
#
#   docker build -t mdkv-vllm .
#   docker run --rm --init -p 127.0.0.1:8000:8000 mdkv-vllm
FROM python:3.11-slim-bookworm

RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ git libnuma1 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home mdkv \
    && install --directory --owner mdkv /opt/mdkv-vllm

USER mdkv
WORKDIR /opt/mdkv-vllm
# torch must be the CPU build; see README.
ARG PIP_EXTRA_INDEX_URL
COPY --chown=mdkv . .
RUN scripts/setup-cpu.sh

ENV ARGS="--host 0.0.0.0"
EXPOSE 8000
HEALTHCHECK --start-period=5m CMD ["python3", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health')"]
ENTRYPOINT ["scripts/serve.sh"]
