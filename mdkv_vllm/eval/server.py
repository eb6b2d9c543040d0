"""A running OpenAI-compatible server, asked as a black box."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from mdkv_vllm.config import REQUEST_BUDGET
from mdkv_vllm.eval.rows import Row
from mdkv_vllm.tasks.example import Example
from mdkv_vllm.tasks.prompt import prompt_text


class ServerError(ValueError):
    """The server cannot be reached or refused a request."""


@dataclass(frozen=True)
class Server:
    """One server and how to ask it.

    Attributes:
        url: its address, for example ``http://127.0.0.1:8000``.
        name: how reports call it.
        tokenizer: of the model it serves; renders the chat template.
        seconds: longest wait for an answer.
    """

    url: str
    name: str
    tokenizer: Any
    seconds: float = 600.0

    @cached_property
    def model(self) -> str:
        """The name of the model it serves."""
        return str(self._get("/v1/models")["data"][0]["id"])

    def complete(self, prompt: str, max_tokens: int, budget: float | None) -> str:
        """A greedy completion of a rendered prompt."""
        body: dict[str, Any] = {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0,
            # The template already put the special tokens in.
            "add_special_tokens": self.tokenizer.chat_template is None,
        }
        if budget is not None:
            body["vllm_xargs"] = {REQUEST_BUDGET: budget}
        return str(self._get("/v1/completions", body)["choices"][0]["text"])

    def measure(self, example: Example, turn: int, budget: float | None) -> Row:
        """Answer one turn.

        Args:
            example: the example.
            turn: index of the turn.
            budget: per-request budget, or None for a server that knows none.
        """
        asked = example.turns[turn]
        # A server cannot be made to have generated something: it is part of its prompt.
        prompt = prompt_text(self.tokenizer, example, turn) + asked.given
        answer = self.complete(prompt, asked.max_tokens, budget)
        return Row.of(
            example,
            turn,
            method=self.name,
            budget=1.0 if budget is None else budget,
            share=None,
            divergence=None,
            agreement=None,
            answer=answer,
        )

    def _get(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            f"{self.url.rstrip('/')}{path}", data, {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=self.seconds) as answer:
                return dict(json.load(answer))
        except urllib.error.HTTPError as error:
            reason = f"{error} {error.read()[:300].decode(errors='replace')}"
        except OSError as error:
            reason = str(error)
        raise ServerError(f"--server {self.url}: {path}: {reason}")
