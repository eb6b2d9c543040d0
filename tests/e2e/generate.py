"""Run one offline engine in a process of its own: JSON arguments in, JSON result out.

``{"engine": {...LLM arguments}, "prompts": [[ids]], "budgets": [...], "max_tokens": n,
"result": path}``; budgets are per prompt, null for the engine's own. ``"calls"``, lists of numbers
of prompts, has them generated one list after the other instead of all at once.
"""

import json
import sys
from pathlib import Path

from vllm import LLM, SamplingParams

DRAFTS = ("draft_tokens", "accepted_tokens")
"""What vLLM counts of drafts."""


def metric(llm, name):
    return sum(m.value for m in llm.get_metrics() if m.name == f"vllm:{name}")


def main():
    job = json.loads(sys.argv[1])
    llm = LLM(**job["engine"], enforce_eager=True, disable_log_stats=False)
    parameters = [
        SamplingParams(
            temperature=0,
            max_tokens=job["max_tokens"],
            ignore_eos=True,
            logprobs=2,
            detokenize=not job["engine"].get("skip_tokenizer_init", False),
            extra_args=budget and {"mixeddim_budget": budget},
        )
        for budget in job["budgets"]
    ]
    prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]
    answers, drafts, before = {}, [], [0, 0]
    for call in job["calls"] or [range(len(prompts))]:
        some = [prompts[i] for i in call], [parameters[i] for i in call]
        answers |= zip(call, llm.generate(*some, use_tqdm=False), strict=True)
        counts = [metric(llm, f"spec_decode_num_{kind}") for kind in DRAFTS]
        drafts.append([after - count for after, count in zip(counts, before, strict=True)])
        before = counts
    outputs = [answers[i] for i in range(len(prompts))]
    result = {
        "tokens": [list(o.outputs[0].token_ids) for o in outputs],
        "texts": [o.outputs[0].text for o in outputs],
        "logprobs": [
            [
                sorted((p.logprob for p in step.values()), reverse=True)
                for step in o.outputs[0].logprobs
            ]
            for o in outputs
        ],
        "runner": "V2" if llm.llm_engine.vllm_config.use_v2_model_runner else "V1",
        "preemptions": metric(llm, "num_preemptions"),
        "usage": metric(llm, "kv_cache_usage_perc"),
        "drafts": drafts,
    }
    if job["engine"].get("attention_backend") == "mixeddim":
        result["ranks"] = llm.collective_rpc("mixeddim_status")
    Path(job["result"]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
