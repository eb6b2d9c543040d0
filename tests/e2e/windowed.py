"""Engines in this process, one after the other: what each answers, and how exact its decode is.

JSON arguments in, JSON result out: ``{"runs": {name: {...LLM arguments}}, "prompts": [[ids]],
"max_tokens": n, "result": path}``. Of an engine that is refused, the reason is what comes out.
"""

import gc
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

from mdkv_vllm.config import ConfigError
from mdkv_vllm.kernels.interface import DecodeConfig
from mdkv_vllm.kernels.reference import ReferenceDecode
from mdkv_vllm.kernels.sinks import SinkDecode
from mdkv_vllm.plugin.worker_runtime.runtime import current_runtime

SLOW = 8
"""Queries of a step, beyond which the reference takes too long: chunks of prompts."""


class CheckedDecode:
    """A decode kernel beside the float64 reference over the same leases."""

    def __init__(self, kernel, reference):
        self.kernel, self.reference = kernel, reference
        self.worst, self.behind_leases = 0.0, 0

    def attend(self, query, layer, batch, output, **more):
        self.kernel.attend(query, layer, batch, output, **more)
        if len(query) > SLOW:
            return
        exact = torch.empty(output.shape, dtype=torch.float64)
        self.reference.attend(query, layer, batch, exact)
        error = (output.double() - exact).abs().max() / exact.abs().max()
        self.worst = max(self.worst, float(error))
        self.behind_leases += int((batch.leases[batch.query_rows.long()] > 0).any((1, 2)).sum())


def check_decode(worker):
    runtime, decode = current_runtime(), current_runtime()._decode
    around = decode if isinstance(decode, SinkDecode) else SimpleNamespace(kernel=decode)
    known = around.kernel._config
    config = DecodeConfig(
        runtime.kv_cache, runtime.policy.layout, known.group, known.basis, known.scale, 1, 1
    )
    around.kernel = checked = CheckedDecode(around.kernel, ReferenceDecode(config))
    runtime._decode = around if isinstance(decode, SinkDecode) else checked
    runtime.checked = checked


def answers(llm, prompts, max_tokens):
    parameters = SamplingParams(
        temperature=0, max_tokens=max_tokens, ignore_eos=True, logprobs=2, detokenize=False
    )
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], parameters, use_tqdm=False)
    steps = [o.outputs[0].logprobs for o in outputs]
    return {
        "tokens": [list(o.outputs[0].token_ids) for o in outputs],
        "logprobs": [
            [sorted((p.logprob for p in step.values()), reverse=True) for step in answer]
            for answer in steps
        ],
        "cached": [o.num_cached_tokens for o in outputs],
    }


def run(engine, prompts, max_tokens):
    llm = LLM(
        **engine, enforce_eager=True, skip_tokenizer_init=True, dtype="float32",
        distributed_executor_backend="uni", disable_log_stats=False,
    )  # fmt: skip
    ours = engine.get("attention_backend") == "mixeddim"
    if ours:
        llm.collective_rpc(check_decode)
    result = answers(llm, prompts, max_tokens)
    result["again"] = answers(llm, prompts[-1:], max_tokens)
    result["preemptions"] = sum(
        m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions"
    )
    if ours:
        checked = current_runtime().checked
        result |= {"worst": checked.worst, "behind_leases": checked.behind_leases}
        [result["status"]] = llm.collective_rpc("mixeddim_status")
    llm.llm_engine.engine_core.shutdown()
    return result


def main():
    job = json.loads(sys.argv[1])
    results = {}
    for name, engine in job["runs"].items():
        try:
            results[name] = run(engine, job["prompts"], job["max_tokens"])
        except ConfigError as error:
            results[name] = str(error)
        gc.collect()
        cleanup_dist_env_and_memory()
    Path(job["result"]).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
