"""One engine of vLLM in a process of its own: whether it starts, its answers, its speed."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..jobs import Row

LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096,
    "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256,
    "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
    "torch_dtype": "bfloat16", "tie_word_embeddings": False, "hidden_act": "silu",
    "attention_bias": False, "mlp_bias": False, "bos_token_id": 128000, "eos_token_id": 128001,
}  # fmt: skip
"""Shapes of Llama-3.1-8B; weights are random, so that answers mean nothing but may be compared."""
TINY = LLAMA_8B | {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 512, "max_position_embeddings": 2048,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """What engines are asked.

    Attributes:
        config: of the model.
        prompts: requests of the full load.
        prompt_tokens: tokens of their prompts.
        new_tokens: tokens of their answers.
        compared: requests whose answers are compared with stock's, uncompressed.
        kv_bytes: of the cache, the same for every engine.
        graph_sizes: batches of CUDA graphs; empty where there are none.
    """

    config: dict[str, Any]
    prompts: int
    prompt_tokens: int
    new_tokens: int
    compared: int
    kv_bytes: int
    graph_sizes: tuple[int, ...]


H100 = Sizes(LLAMA_8B, 32, 8000, 256, 4, 8 << 30, (1, 2, 4, 8, 16, 32))
REHEARSED = Sizes(TINY, 6, 300, 12, 3, 2 << 20, ())


@dataclass(frozen=True)
class Engine:
    """How an engine is started.

    Attributes:
        name: in reports.
        options: of ``vllm.LLM``, beside those that all have.
        loaded: whether it gets the full load, or is only compared.
    """

    name: str
    options: dict[str, Any]
    loaded: bool = True


def run(engine: Engine, sizes: Sizes, model: Path, seed: int) -> Iterator[Row]:
    """Start an engine, compare it, and load it; a row after each."""
    from vllm import LLM

    begin = time.monotonic()
    llm = LLM(**options_of(engine, sizes, model))
    told = {"kind": "engine", "engine": engine.name}
    seconds = time.monotonic() - begin
    yield told | {"part": "start", "seconds": seconds, "kernels": kernels_of(llm), **_memory()}
    yield told | {"part": "compare"} | compare(llm, sizes, seed)
    if engine.loaded:
        yield told | {"part": "alone"} | alone(llm, sizes, seed)
        yield told | {"part": "full"} | full(llm, sizes, seed) | _memory()


def options_of(engine: Engine, sizes: Sizes, model: Path) -> dict[str, Any]:
    """Arguments of ``vllm.LLM``; writes the model's configuration into its folder."""
    model.mkdir(parents=True, exist_ok=True)
    (model / "config.json").write_text(json.dumps(sizes.config))
    length = sizes.prompt_tokens + sizes.new_tokens
    options: dict[str, Any] = {
        "model": str(model), "load_format": "dummy", "skip_tokenizer_init": True,
        "dtype": "bfloat16", "max_model_len": -(-length // 128) * 128,
        "max_num_seqs": sizes.prompts, "kv_cache_memory_bytes": sizes.kv_bytes,
        "enable_prefix_caching": False, "seed": 0, "disable_log_stats": False,
    }  # fmt: skip
    if sizes.graph_sizes:
        options |= {
            "max_num_batched_tokens": 8192,
            "compilation_config": {
                "mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY",
                "cudagraph_capture_sizes": list(sizes.graph_sizes),
            },
            "kernel_config": {"enable_jit_warmup": False, "enable_cutedsl_warmup": False},
        }  # fmt: skip
    else:
        options["enforce_eager"] = True
    return options | engine.options


def kernels_of(llm: Any) -> str:  # noqa: ANN401
    """Which attention kernels an engine in this process has chosen."""
    layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context.values()
    names = {layer.get_attn_backend().get_name() for layer in layers}
    if names != {"MIXEDDIM"}:
        return ", ".join(sorted(names))
    chosen = llm.collective_rpc("mixeddim_status")[0]["kernels"]
    return f"MIXEDDIM, decode by {chosen['decode']}, prefill by {chosen['prefill']}"


def prompts_of(sizes: Sizes, number: int, seed: int) -> list[dict[str, list[int]]]:
    """Random prompts, the same in every process."""
    source = random.Random(seed)
    some = range(3, sizes.config["vocab_size"])
    return [
        {"prompt_token_ids": source.choices(some, k=sizes.prompt_tokens)} for _ in range(number)
    ]


def _sampling(tokens: int, logprobs: int | None = None) -> Any:  # noqa: ANN401
    from vllm import SamplingParams

    return SamplingParams(
        temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False, logprobs=logprobs
    )


def compare(llm: Any, sizes: Sizes, seed: int) -> Row:  # noqa: ANN401
    """Tokens of a few answers with their log-probabilities."""
    outputs = llm.generate(
        prompts_of(sizes, sizes.compared, seed), _sampling(8, logprobs=1), use_tqdm=False
    )
    answers = [output.outputs[0] for output in outputs]
    return {
        "tokens": [list(answer.token_ids) for answer in answers],
        "logprobs": [
            [
                step[token].logprob
                for step, token in zip(answer.logprobs, answer.token_ids, strict=True)
            ]
            for answer in answers
        ],
    }


def alone(llm: Any, sizes: Sizes, seed: int) -> Row:  # noqa: ANN401
    """One request at a time: seconds to the first token, and per token after it."""
    prompts = prompts_of(sizes, 2, seed + 1)
    load(llm, [prompts[0]], sizes.new_tokens // 4)  # warms up
    answered = load(llm, [prompts[1]], sizes.new_tokens // 2)
    return {"first_token": answered["first_tokens"][0], "per_token": answered["per_token"]}


def full(llm: Any, sizes: Sizes, seed: int) -> Row:  # noqa: ANN401
    """All requests at once."""
    before = _preemptions(llm)
    answered = load(llm, prompts_of(sizes, sizes.prompts, seed + 2), sizes.new_tokens)
    answered["preemptions"] = _preemptions(llm) - before
    first = answered.pop("first_tokens")
    return answered | {"mean_first_token": sum(first) / len(first)}


def load(llm: Any, prompts: list[dict[str, list[int]]], tokens: int) -> Row:  # noqa: ANN401
    """Answer prompts, step by step; times are seconds from the beginning."""
    engine = llm.llm_engine
    begin = time.monotonic()
    for number, prompt in enumerate(prompts):
        engine.add_request(f"{number}-{begin}", prompt, _sampling(tokens))
    first: dict[str, float] = {}
    most = answered = decoded = 0
    decoding = 0.0
    while engine.has_unfinished_requests():
        step = time.monotonic()
        outputs = engine.step()
        now = time.monotonic()
        most = max(most, len(outputs))
        answered += len(outputs)
        started = [output.request_id for output in outputs if output.request_id not in first]
        first |= dict.fromkeys(started, now - begin)
        if outputs and not started:
            decoding, decoded = decoding + now - step, decoded + 1
    seconds = time.monotonic() - begin
    return {
        "seconds": seconds, "output_tokens_per_second": answered / seconds, "resident": most,
        "per_token": decoding / decoded if decoded else float("nan"),
        "first_tokens": list(first.values()),
    }  # fmt: skip


def _preemptions(llm: Any) -> float:  # noqa: ANN401
    return sum(m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions")


def _memory() -> Row:
    if not torch.cuda.is_available():
        return {"memory_bytes": None}
    free, total = torch.cuda.mem_get_info()
    return {"memory_bytes": total - free}
