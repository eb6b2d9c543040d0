"""Turns of chats and questions about documents that read each other's compressed prefixes."""

import math
import random
import threading
import time
from itertools import takewhile

import pytest
from serving import NEEDLE, haystack
from test_server import abandon
from transformers import AutoTokenizer

pytestmark = pytest.mark.server

ANSWER = 24
COUNTED = ("hit", "published")


@pytest.fixture(scope="module")
def tokenizer(model_folder):
    return AutoTokenizer.from_pretrained(model_folder)


class Chat:
    """Turns of which each hides a number, and asks for one that was hidden before."""

    def __init__(self, server, tokenizer, seed, salt=None):
        self._server, self._tokenizer, self.salt = server, tokenizer, salt or f"chat {seed}"
        self._choose = random.Random(seed)
        self.secret = str(self._choose.randrange(10**6, 10**7))
        self.tokens = haystack(
            tokenizer, self._choose.randrange(600, 1100), self.secret, 0.4, skip=900 * (seed % 40)
        )
        self.answers = []

    def body(self):
        return {
            "prompt": self.tokens, "max_tokens": ANSWER, "temperature": 0, "ignore_eos": True,
            "cache_salt": self.salt,
        }  # fmt: skip

    def turn(self):
        """Ask; the answer stays in the conversation, and a further question comes behind it."""
        status, answer = self._server.post("/v1/completions", return_token_ids=True, **self.body())
        assert status == 200, answer
        choice = answer["choices"][0]
        self.answers.append(choice["text"])
        told = NEEDLE.format(self.secret).rsplit(" ", 1)[0]
        again = "<|im_end|>\n<|im_start|>user\nOnce more: which code is it?<|im_end|>\n"
        again += f"<|im_start|>assistant\n{told}"
        self.tokens = [
            *self.tokens, *choice["token_ids"],
            *self._tokenizer.encode(again, add_special_tokens=False),
        ]  # fmt: skip
        return answer["usage"]


def shared(server):
    return server.metric("mixeddim:shared_prefix_tokens_total")


def test_a_second_turn_reads_what_the_first_kept(server, tokenizer):
    chat = Chat(server, tokenizer, 1)
    chat.turn()
    first, before = len(chat.tokens), shared(server)
    usage = chat.turn()
    read = shared(server) - before
    # All of the first prompt but its window, and nothing of what came behind it.
    assert 0.85 * first < read < first
    assert usage["prompt_tokens"] - read < 160
    assert [chat.secret in answer for answer in chat.answers] == [True, True]


def test_cold_and_warm_turns(server, tokenizer):
    """Who reads the same segments answers the same; who computes the prompt anew nearly so."""
    chat = Chat(server, tokenizer, 2)
    chat.turn()
    turn = chat.body() | {"logprobs": 20}
    warm = [server.post("/v1/completions", **turn)[1]["choices"][0] for _ in range(2)]
    assert warm[0] == warm[1]
    before = shared(server)
    status, answer = server.post("/v1/completions", **{**turn, "cache_salt": "nobody's"})
    assert status == 200
    assert shared(server) == before
    cold = answer["choices"][0]
    assert chat.secret in cold["text"]
    assert chat.secret in warm[0]["text"]
    divergences = divergence(cold["logprobs"], warm[0]["logprobs"])
    assert 0 < sum(divergences) / len(divergences) < 0.05


def divergence(expected, found):
    """KL of each next token's distribution, over the 20 likeliest, as long as answers agree."""
    steps = []
    pairs = zip(expected["tokens"], found["tokens"], strict=True)
    same = len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
    for p, q in zip(expected["top_logprobs"][: same + 1], found["top_logprobs"], strict=False):
        least = min(q.values())
        steps.append(sum(math.exp(one) * (one - q.get(token, least)) for token, one in p.items()))
    return steps


def test_own_budgets_read_nothing(server, tokenizer):
    chat = Chat(server, tokenizer, 3)
    chat.turn()
    before = shared(server)
    for budget in (0.2, 0.3, 1.0):
        fields = {"mixeddim_budget": budget}
        status, answer = server.post("/v1/completions", vllm_xargs=fields, **chat.body())
        assert status == 200
        assert chat.secret in answer["choices"][0]["text"]
    assert shared(server) == before


def test_many_chats_at_once(fast_server, tokenizer):
    """With aborts, and pairs of chats that begin alike under salts of their own.

    No turn reads anything but its own chat's first prompt, whole blocks of it before its window.
    """
    server = fast_server
    chats = [Chat(server, tokenizer, seed, salt=f"salt {seed}") for seed in range(10, 34)]
    chats += [Chat(server, tokenizer, seed, salt="another") for seed in range(10, 18)]
    expected = [16 * ((len(chat.tokens) - 16) // 16) for chat in chats]
    failures = []

    def talk(number, chat):
        try:
            for turn in range(3):
                if number % 3 == 0 and turn == 1:
                    abandon(server, chat.body() | {"stream": True})
                usage = chat.turn()
                read = usage["prompt_tokens_details"]["cached_tokens"]
                assert read == (expected[number] if turn else 0)
        except Exception as error:
            failures.append((number, error))

    threads = [threading.Thread(target=talk, args=pair) for pair in enumerate(chats)]
    hit, published = (server.metric(f"mixeddim:segments_{name}_total") for name in COUNTED)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    found = [chat.secret in answer for chat in chats for answer in chat.answers]
    assert sum(found) >= len(found) - 4, [chat.answers for chat in chats]
    abandoned = sum(number % 3 == 0 for number in range(len(chats)))
    deadline = time.monotonic() + 60
    while server.metric("vllm:num_requests_running") and time.monotonic() < deadline:
        time.sleep(0.5)
    assert server.metric("vllm:kv_cache_usage_perc") == 0
    hit = server.metric("mixeddim:segments_hit_total") - hit
    assert hit == 2 * len(chats) + abandoned
    assert server.metric("mixeddim:segments_published_total") - published == len(chats)
