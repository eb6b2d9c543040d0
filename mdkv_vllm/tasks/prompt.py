"""From an example to the text a model sees, the same for a server and in process."""

from __future__ import annotations

from typing import Any

from mdkv_vllm.tasks.example import Example


def prompt_text(tokenizer: Any, example: Example, turn: int) -> str:  # noqa: ANN401
    """The conversation up to where the answer of a turn begins.

    Earlier turns are answered by their references, so that every method reads the same prompt.

    Args:
        tokenizer: with a chat template; without one the parts are joined by blank lines.
        example: the example.
        turn: index into its turns.
    """
    messages = []
    for index, asked in enumerate(example.turns[: turn + 1]):
        context = f"{example.context}\n\n" if index == 0 else ""
        messages.append({"role": "user", "content": context + asked.question})
        if index < turn:
            answer = f"{asked.answer_prefix} {', '.join(asked.answers)}".strip()
            messages.append({"role": "assistant", "content": answer})
    prefix = example.turns[turn].answer_prefix
    if tokenizer.chat_template is None:
        return "\n\n".join([m["content"] for m in messages] + [prefix])
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return str(text) + prefix


def token_ids(tokenizer: Any, text: str) -> list[int]:  # noqa: ANN401
    """Tokens of a rendered prompt; the template has already put special tokens in."""
    return list(tokenizer(text, add_special_tokens=tokenizer.chat_template is None).input_ids)
