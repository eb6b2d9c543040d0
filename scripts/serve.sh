#!/usr/bin/env bash
# Serve a model with the mixed-dimension KV cache on this machine's CPU.
#
#   MODEL=   folder or hub name (default: the embedded SmolLM2-135M-Instruct)
#   PORT=    default 8000          BUDGET=  share of prompt KV bytes kept, default 0.25
#   SETTINGS='{"window": 64}'  further settings of the mixeddim block, as JSON
#   ARGS=    further arguments of `vllm serve`, which win over those set here
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly DEFAULT_MODEL="models/SmolLM2-135M-Instruct"
model="${MODEL:-$DEFAULT_MODEL}"
port="${PORT:-8000}"
export PATH="$PWD/.venv/bin:$PATH"

if [[ "${ARGS:-}" == *--additional-config* ]]; then
    echo "serve: ARGS may not hold --additional-config; give settings in SETTINGS='{...}'" >&2
    exit 2
fi
additional="$(python - "${BUDGET:-}" "${SETTINGS:-}" <<'END'
import json, sys

try:
    budget = {"budget": float(sys.argv[1])} if sys.argv[1] else {}
    settings = {**budget, **json.loads(sys.argv[2] or "{}")}
except (ValueError, TypeError) as error:
    sys.exit(f"serve: BUDGET={sys.argv[1]} SETTINGS={sys.argv[2]}: {error}")
print(json.dumps({"mixeddim": settings}))
END
)"

arguments=(--host 127.0.0.1 --port "$port" --attention-backend mixeddim --enforce-eager)
if [[ "$model" == "$DEFAULT_MODEL" ]]; then
    [[ -f "$model/mdkv_manifest.json" ]] || mdkv prepare-model --out "$model"
    [[ -f "$model/mixeddim_basis.safetensors" ]] || mdkv calibrate "$model" --max-tokens 8192
    [[ -f "$model/mixeddim_heads.safetensors" ]] || mdkv head-scores "$model"
    arguments+=(--served-model-name SmolLM2-135M-Instruct)
fi
# Without bf16 instructions the model computes faster in float32; its cache stays 16-bit.
if ! grep -qE 'avx512_bf16|amx_bf16' /proc/cpuinfo; then
    arguments+=(--dtype float32 --kv-cache-dtype bfloat16)
fi
# In GiB; 1 holds some 40,000 tokens of the default model. vLLM would otherwise take most memory.
export VLLM_CPU_KVCACHE_SPACE="${VLLM_CPU_KVCACHE_SPACE:-1}"
# Endpoint plugins are off unless named: this one is GET /mixeddim/status.
export VLLM_PLUGINS="${VLLM_PLUGINS:-mixeddim}"
export VLLM_NO_USAGE_STATS="${VLLM_NO_USAGE_STATS:-1}"

printf 'Serving %s on http://127.0.0.1:%s with %s\n' "$model" "$port" "$additional"
# shellcheck disable=SC2086 # ARGS is several words on purpose
exec vllm serve "$model" "${arguments[@]}" \
    --additional-config "$additional" ${ARGS:-}
