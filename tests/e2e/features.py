"""Every way of asking that vLLM has, in one offline engine: JSON arguments in, JSON result out.

``{"engine": {...LLM arguments}, "adapters": [folders], "weights": folder, "result": path}``.
Budgets are for our backend; stock vLLM does not look at them.
"""

import json
import random
import sys
from pathlib import Path

from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest
from vllm.sampling_params import BeamSearchParams, StructuredOutputsParams

ANSWER = 24
CHOICES = ["shelf one", "shelf two", "no shelf at all"]


def tokens(length, seed):
    choose = random.Random(seed)
    return [choose.randrange(300, 30_000) for _ in range(length)]


class Modes:
    """One engine, asked one request at a time."""

    def __init__(self, job):
        self.llm = LLM(**job["engine"], enforce_eager=True, disable_log_stats=False)
        self.adapters = [None] + [
            LoRARequest(str(number), number, folder)
            for number, folder in enumerate(job["adapters"], 1)
        ]
        self.weights = [job["engine"]["model"], job["weights"]]

    def ask(self, prompt, budget=None, salt=None, adapter=None, **sampling):
        """What vLLM answers to one request."""
        extra = {"mixeddim_budget": budget} if budget else None
        defaults = {"temperature": 0, "max_tokens": ANSWER, "ignore_eos": True}
        params = SamplingParams(**defaults | sampling, extra_args=extra)
        given = {"prompt_token_ids": prompt} | ({"cache_salt": salt} if salt else {})
        return self.llm.generate([given], params, use_tqdm=False, lora_request=adapter)[0]

    def answer(self, prompt, **asked):
        """Its tokens."""
        return list(self.ask(prompt, **asked).outputs[0].token_ids)

    def sampling(self, budget):
        """At some budget: several answers, probabilities, beams, a grammar."""
        prompt = tokens(600, 1)
        several = self.ask(prompt, budget, n=3, temperature=1, seed=3)
        steps = self.ask(prompt, budget, logprobs=2).outputs[0].logprobs
        of_prompt = self.ask(prompt, budget, prompt_logprobs=1, max_tokens=2).prompt_logprobs
        beams = BeamSearchParams(beam_width=3, max_tokens=6)
        found = self.llm.beam_search([{"prompt_token_ids": prompt[:400]}], beams)[0].sequences
        grammar = StructuredOutputsParams(choice=CHOICES)
        chosen = self.ask(prompt, budget, structured_outputs=grammar, ignore_eos=False)
        return {
            "several": [list(one.token_ids) for one in several.outputs],
            "logprobs": [[one.logprob for one in step.values()] for step in steps],
            "prompt_logprobs": [[p.logprob for p in one.values()] for one in of_prompt[1:]],
            "beams": [(beam.tokens[-6:], beam.cum_logprob) for beam in found],
            "chosen": chosen.outputs[0].text,
        }

    def turns(self, budget=None, salted=False):
        """Two turns with every adapter and without, all of the same first prompt."""
        first, more = tokens(600, 2), tokens(50, 3)
        salts = [f"salt {n}" if salted else None for n in range(len(self.adapters))]
        asked = [
            {"budget": budget, "salt": salt, "adapter": adapter}
            for salt, adapter in zip(salts, self.adapters, strict=True)
        ]
        answers = [self.answer(first, **one) for one in asked]
        second = [
            self.ask(first + answer + more, **one)
            for answer, one in zip(answers, asked, strict=True)
        ]
        return {
            "answers": answers + [list(one.outputs[0].token_ids) for one in second],
            "cached": [one.num_cached_tokens for one in second],
        }

    def chat(self):
        """Two turns of one that was had before; its answers, and what they got from the cache."""
        first = tokens(600, 4)
        one = self.ask(first)
        answer = list(one.outputs[0].token_ids)
        two = self.ask(first + answer + tokens(50, 5))
        return answer + list(two.outputs[0].token_ids), [
            one.num_cached_tokens,
            two.num_cached_tokens,
        ]

    def life(self):
        """Chats after everything that makes an engine forget its cache."""
        chats = {"cold": self.chat(), "warm": self.chat()}
        assert self.llm.reset_prefix_cache()
        chats["reset"] = self.chat()
        self.llm.sleep(level=1)
        self.llm.wake_up()
        chats["woken"] = self.chat()
        for name, folder in (("other", self.weights[1]), ("again", self.weights[0])):
            self.llm.collective_rpc("reload_weights", kwargs={"weights_path": folder})
            assert self.llm.reset_prefix_cache()
            chats[name] = self.chat()
        return chats

    def urgent(self):
        """Urgent requests come while others, at full budget, fill a tiny cache."""
        engine, finished, length = self.llm.llm_engine, {}, 120

        def add(name, number, priority, budget=None):
            extra = {"mixeddim_budget": budget} if budget else None
            params = SamplingParams(
                temperature=0, max_tokens=length, ignore_eos=True, extra_args=extra
            )
            prompt = {"prompt_token_ids": tokens(500, number), "cache_salt": name}
            engine.add_request(name, prompt, params, priority=priority)

        def step():
            for output in engine.step():
                if output.finished:
                    name = output.request_id.split("-")[0]
                    finished[name] = list(output.outputs[0].token_ids)

        for number in range(6):
            add(f"patient {number}", number, 10 - number, 1.0)
        for _ in range(12):
            step()
        for number in range(6, 9):
            add(f"urgent {number}", number, -1)
        while engine.has_unfinished_requests():
            step()
        metrics = self.llm.get_metrics()
        alone = {
            f"patient {number}": self.answer(tokens(500, number), budget=1.0, max_tokens=length)
            for number in range(6)
        }
        return {
            "answers": finished,
            "alone": alone,
            "preemptions": sum(m.value for m in metrics if m.name == "vllm:num_preemptions"),
        }


def main():
    job = json.loads(sys.argv[1])
    modes = Modes(job)
    if job["engine"].get("scheduling_policy") == "priority":
        Path(job["result"]).write_text(json.dumps(modes.urgent()))
        return
    ours = job["engine"].get("attention_backend") == "mixeddim"
    result = {"full": modes.sampling(1.0), "full turns": modes.turns(1.0)}
    if ours:
        result["compressed"] = modes.sampling(None)
        result["turns"], result["alone"] = modes.turns(), modes.turns(salted=True)
        result["life"] = modes.life()
    Path(job["result"]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
