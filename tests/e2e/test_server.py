"""What clients of the server rely on, with compression in force."""

import json
import random
import threading
import time
import urllib.request

import pytest
from serving import haystack
from transformers import AutoTokenizer

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def prompt(model_folder):
    return haystack(AutoTokenizer.from_pretrained(model_folder), 1500, 4815162, 0.4, skip=90_000)


def test_blocks_are_returned_while_the_request_runs(server, prompt):
    server.text(prompt, max_tokens=4)
    report = server.status()["recent"][-1]
    assert report["prompt_tokens"] == len(prompt)
    assert report["kept_blocks"] <= 0.31 * report["full_blocks"]
    assert sum(report["tokens"].values()) % (30 * 3) == 0
    share = []

    def sample():
        for _ in range(100):
            share.append(server.metric("vllm:kv_cache_usage_perc"))
            time.sleep(0.03)

    sampler = threading.Thread(target=sample)
    sampler.start()
    server.text(prompt, max_tokens=64, ignore_eos=True)
    sampler.join()
    total = int(server.get("/metrics").split('num_gpu_blocks="', 1)[1].split('"', 1)[0])
    while_decoding = sorted(round(s * (total - 1)) for s in share if s > 0)
    most_decoded = report["kept_blocks"] + 64 // 16 + 2
    assert while_decoding[len(while_decoding) // 2] <= most_decoded
    assert server.metric("vllm:kv_cache_usage_perc") == 0


def test_the_same_prompt_cold_and_warm(server, prompt):
    salt = "cold and warm"
    cold = server.text(prompt, max_tokens=48, cache_salt=salt)
    hits = server.metric("vllm:prefix_cache_hits_total")
    warm = server.text(prompt, max_tokens=48, cache_salt=salt)
    assert server.metric("vllm:prefix_cache_hits_total") > hits
    assert "4815162" in cold
    assert warm == cold


def test_two_turns_of_a_chat(server):
    facts = " ".join(f"Item {i} is stored on shelf {i * 7 % 50}." for i in range(60))
    first = {"role": "user", "content": f"{facts} My name is Marta. What is my name?"}
    status, answer = server.post(
        "/v1/chat/completions", messages=[first], max_tokens=40, temperature=0
    )
    assert status == 200
    reply = answer["choices"][0]["message"]
    assert "Marta" in reply["content"]
    second = [first, {"role": "assistant", "content": reply["content"]}]
    second.append({"role": "user", "content": "Repeat my name only."})
    answers = []
    for salt in (None, "no shared prefix"):
        body = {"cache_salt": salt} if salt else {}
        status, answer = server.post(
            "/v1/chat/completions", messages=second, max_tokens=24, temperature=0, **body
        )
        assert status == 200
        answers.append(answer["choices"][0]["message"]["content"])
    # One reads the first turn compressed, the other computes it anew.
    assert all("Marta" in answer for answer in answers)


def test_sampling_features(server, prompt):
    several = server.complete(prompt, max_tokens=12, n=3, temperature=1, top_k=1)["choices"]
    assert len(several) == 3
    assert len({choice["text"] for choice in several}) == 1
    with_logprobs = server.complete(prompt, max_tokens=8, logprobs=2)["choices"][0]
    assert len(with_logprobs["logprobs"]["tokens"]) == 8
    stopped = server.complete(prompt, max_tokens=40, stop=["5162"])["choices"][0]
    assert stopped["finish_reason"] == "stop"
    assert "5162" not in stopped["text"]


def test_beams_and_priorities(server, prompt):
    """Of a beam search the answers are those of a full cache."""
    beams = server.complete(prompt, max_tokens=6, n=2, use_beam_search=True)["choices"]
    assert len({beam["text"] for beam in beams}) == 2
    assert beams[0]["text"].strip().startswith("4815")
    assert "4815162" in server.text(prompt, max_tokens=12, priority=-5)


SHELF = {
    "type": "object",
    "properties": {"item": {"type": "integer"}, "shelf": {"enum": ["top", "middle", "bottom"]}},
    "required": ["item", "shelf"],
    "additionalProperties": False,
}


def test_grammars_and_tools(server):
    facts = " ".join(f"Item {i} is stored on shelf {i * 7 % 50}." for i in range(60))
    asked = {
        "messages": [{"role": "user", "content": f"{facts} Where is item 7?"}],
        "max_tokens": 60,
        "temperature": 0,
    }

    def message(**fields):
        status, answer = server.post("/v1/chat/completions", **asked, **fields)
        assert status == 200, answer
        return answer["choices"][0]["message"]

    schema = {"type": "json_schema", "json_schema": {"name": "shelf", "schema": SHELF}}
    assert set(json.loads(message(response_format=schema)["content"])) == {"item", "shelf"}
    function = {"name": "look", "description": "Look at a shelf.", "parameters": SHELF}
    tools = [{"type": "function", "function": function}]
    choice = {"type": "function", "function": {"name": "look"}}
    (call,) = message(tools=tools, tool_choice=choice)["tool_calls"]
    assert call["function"]["name"] == "look"
    assert message(tools=tools, tool_choice="auto")["role"] == "assistant"


def test_a_reset_while_requests_run(server, prompt):
    """They begin again, and nothing of what was compressed before is found."""
    body = {"prompt": prompt, "cache_salt": "reset", "max_tokens": 100, "ignore_eos": True}
    answers = []
    running = threading.Thread(target=lambda: answers.append(server.text(**body)))
    running.start()
    deadline = time.monotonic() + 60
    while not server.metric("mixeddim:lease_bytes") and time.monotonic() < deadline:
        time.sleep(0.05)
    assert server.post("/reset_prefix_cache") == (200, {"success": False})
    status, answer = server.post("/reset_prefix_cache?reset_running_requests=true")
    assert (status, answer) == (200, {"success": True})
    running.join()
    assert "4815162" in answers[0]
    assert server.post("/reset_prefix_cache") == (200, {"success": True})
    before = server.metric("vllm:prefix_cache_hits_total")
    assert "4815162" in server.text(**body)
    assert server.metric("vllm:prefix_cache_hits_total") == before
    assert server.metric("mixeddim:full_bytes") == 0


def test_budget_in_tokens(server, prompt):
    status, _ = server.post(
        "/v1/completions", prompt=prompt, max_tokens=2, cache_salt="tokens",
        vllm_xargs={"mixeddim_budget_tokens": 400},
    )  # fmt: skip
    assert status == 200
    assert server.status()["recent"][-1]["kept_blocks"] == 400 // 16


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"mixeddim_budget": 0}, "mixeddim_budget is 0"),
        ({"mixeddim_budget": 1.5}, "above 0, up to 1"),
        ({"mixeddim_budget": "half"}, "'half'"),
        ({"mixeddim_budget": [0.5]}, "mixeddim_budget"),
        ({"mixeddim_budget_tokens": 2.5}, "whole numbers"),
        ({"mixeddim_bugdet": 0.5}, "did you mean mixeddim_budget"),
        ({"mixeddim_budget": 0.5, "mixeddim_budget_tokens": 5}, "give one"),
    ],
)
def test_wrong_fields_are_400_and_name_what_is_allowed(server, fields, named):
    status, answer = server.post("/v1/completions", prompt="Hello", max_tokens=2, vllm_xargs=fields)
    assert status == 400
    assert named in answer["error"]["message"]


def test_a_prompt_over_the_context_length_is_400(server):
    status, answer = server.post("/v1/completions", prompt=[5] * 5000, max_tokens=2)
    assert status == 400
    assert "4608" in answer["error"]["message"]


def test_32_mixed_requests_with_aborts_leave_nothing_behind(server, model_folder):
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    choose = random.Random(5)
    failures = []

    def one(index, tokens, budget, abort):
        prompt = haystack(tokenizer, tokens, 1000000 + index, 0.5, skip=1000 * (index % 3))
        body = {"prompt": prompt, "max_tokens": 24, "temperature": 0, "ignore_eos": True}
        try:
            if abort:
                abandon(server, body | {"vllm_xargs": {"mixeddim_budget": budget}, "stream": True})
            else:
                choice = server.complete(prompt, budget, 24, ignore_eos=True)
                assert choice["usage"]["completion_tokens"] == 24
        except Exception as error:
            failures.append((index, error))

    threads = [
        threading.Thread(
            target=one,
            args=(
                index,
                choose.choice([100, 300, 500, 900]),
                choose.choice([0.12, 0.2, 0.3, 0.5, 0.8, 1.0]),
                index % 4 == 3,
            ),
        )
        for index in range(32)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    deadline = time.monotonic() + 60
    while server.metric("vllm:num_requests_running") and time.monotonic() < deadline:
        time.sleep(0.5)
    assert server.metric("vllm:kv_cache_usage_perc") == 0
    assert "Paris" in server.text("The capital of France is", max_tokens=3)


def abandon(server, body):
    """Read one event of a stream and hang up."""
    request = urllib.request.Request(
        f"{server.url}/v1/completions",
        json.dumps({"model": "model", **body}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=600) as reply:
        reply.readline()
