"""Ask one offline engine about pictures: JSON arguments in, JSON result out.

``{"engine": {...LLM arguments}, "result": path}``.
"""

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from vllm import LLM, SamplingParams

PICTURES, SIZE = 16, 112
TEXT = "What is on these pictures? " * 10
MORE = "Say it once more, please, in other words. " * 2


def pictures(first):
    """Noise, of which the first picture alone is chosen."""
    seeds = [first, *range(100, 99 + PICTURES)]
    noise = [np.random.default_rng(seed).integers(0, 255, (SIZE, SIZE, 3)) for seed in seeds]
    return [Image.fromarray(pixels.astype(np.uint8)) for pixels in noise]


def main():
    job = json.loads(sys.argv[1])
    llm = LLM(
        **job["engine"], enforce_eager=True, disable_log_stats=False,
        limit_mm_per_prompt={"image": PICTURES},
    )  # fmt: skip

    def ask(first, text, budget=None, salt=None):
        prompt = {
            "prompt": "<image>" * PICTURES + text,
            "multi_modal_data": {"image": pictures(first)},
        } | ({"cache_salt": salt} if salt else {})
        extra = {"mixeddim_budget": budget} if budget else None
        params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, extra_args=extra)
        answer = llm.generate([prompt], params, use_tqdm=False)[0]
        return list(answer.outputs[0].token_ids), answer.num_cached_tokens

    result = {"full": [ask(first, TEXT, 1.0, salt="full")[0] for first in (0, 1)]}
    if job["engine"].get("attention_backend") == "mixeddim":
        for name, salts in (("shared", [None, None]), ("alone", ["first", "second"])):
            for text in (TEXT, TEXT + MORE):
                result[f"{name} {len(text) > len(TEXT)}"] = [
                    ask(first, text, salt=salt) for first, salt in enumerate(salts)
                ]
        result["recent"] = llm.collective_rpc("mixeddim_status")[0]["recent"]
    Path(job["result"]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
