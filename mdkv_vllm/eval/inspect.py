"""What compression kept of one prompt, token by token, and what became of the answer."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch

from mdkv_vllm.config import MixedDimConfig
from mdkv_vllm.core.formats import PageGeometry
from mdkv_vllm.eval.held_request import HeldRequest, generate
from mdkv_vllm.eval.methods.ours import MixedDim
from mdkv_vllm.models.held_cache import BLOCK_TOKENS, full_cache
from mdkv_vllm.models.in_process import InProcessModel

ANSWER_TOKENS = 32


@dataclass(frozen=True)
class Prompt:
    """A prompt's tokens and the text that each stands for.

    Attributes:
        token_ids: the prompt.
        pieces: text of each token, with the text before it that no token covers. A token that
            only ends a character begun by the one before it has none.
        wanted: the text that was looked for, or "".
        marked: indices of the tokens that overlap an occurrence of it.
    """

    token_ids: tuple[int, ...]
    pieces: tuple[str, ...]
    wanted: str = ""
    marked: tuple[int, ...] = ()


@dataclass(frozen=True)
class Inspection:
    """What one compressed prompt holds.

    Attributes:
        model: folder or hub name.
        dtype: compute type.
        prompt: its tokens.
        budget: share of the bytes that was asked for.
        settings: ``MixedDimConfig`` fields given beside the budget.
        share: share of the bytes really held, page table and unfilled pages included.
        compressed: False where the settings leave such a prompt alone.
        format_names: by index, cheapest first.
        format_shares: bytes of a token in each format over those at full size.
        formats: uint8 ``[layers, kv_heads, tokens]``, indices into ``format_names``.
        answer: what the model says after compression.
        full_answer: what it says with full attention.
    """

    model: str
    dtype: str
    prompt: Prompt
    budget: float
    settings: dict[str, Any]
    share: float
    compressed: bool
    format_names: tuple[str, ...]
    format_shares: tuple[float, ...]
    formats: torch.Tensor
    answer: str
    full_answer: str


def tokenise(tokenizer: Any, text: str, chat: bool | None, find: str = "") -> Prompt:  # noqa: ANN401
    """A prompt's tokens, and which of them are looked for.

    Args:
        tokenizer: a fast tokenizer, which knows where in the text a token lies.
        text: what the user says.
        chat: put it in the model's chat template; None: where the model has one.
        find: text to mark every occurrence of; any white space stands for any other, since
            files break lines where they please.

    Raises:
        ValueError: there is no chat template, no text, or nothing to mark in it.
    """
    if not tokenizer.is_fast:
        raise ValueError("the model's tokenizer does not say where tokens lie; use a fast one")
    if chat and tokenizer.chat_template is None:
        raise ValueError("--chat: the model has no chat template; use --no-chat")
    if not text.strip():
        raise ValueError("--prompt is empty; it needs some text")
    in_template = tokenizer.chat_template is not None and chat is not False
    if in_template:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
        )
    # The template has already put special tokens in.
    encoded = tokenizer(text, add_special_tokens=not in_template, return_offsets_mapping=True)
    ids, places = encoded.input_ids, encoded.offset_mapping
    pieces, end = [], 0
    for token, (start, stop) in zip(ids, places, strict=True):
        added = start == stop and token in tokenizer.all_special_ids
        pieces.append(tokenizer.convert_ids_to_tokens(token) if added else text[end:stop])
        end = max(end, stop)
    return Prompt(tuple(ids), tuple(pieces), find, _marked(text, places, find))


def inspect_prompt(model: InProcessModel, prompt: Prompt, config: MixedDimConfig) -> Inspection:
    """Compress a prompt as the server does and ask the model with and without.

    Args:
        model: the model.
        prompt: its tokens.
        config: the settings, with ``budget`` set.

    Raises:
        ValueError: formats or basis do not fit the model.
    """
    assert config.budget is not None
    given = {
        name: value
        for name, value in vars(config).items()
        if name != "budget" and value != getattr(MixedDimConfig, name)
    }
    prefill = model.prefill(prompt.token_ids)
    full = HeldRequest(model, full_cache(prefill), prefill.logits)
    ours = MixedDim("ours", given).begin(model, prefill, config.budget)
    answers = [generate([request], ANSWER_TOKENS)[0] for request in (ours, full)]
    texts = model.tokenizer.batch_decode(answers, skip_special_tokens=True)
    held = ours.cache
    # Bytes are counted against a 16-bit cache; which 16-bit type does not matter to them.
    formats = config.format_set(PageGeometry(BLOCK_TOKENS, model.head_size, torch.bfloat16))
    names, shares = list(formats.names), [BLOCK_TOKENS / f.tokens_per_page for f in formats.formats]
    if formats.drop:
        shares.insert(0, 0.0)
    if "full" not in names:  # the window stays full whatever the formats
        names, shares = [*names, "full"], [*shares, 1.0]
    chosen = held.formats
    if chosen is None:
        chosen = torch.full(held.kept.shape, names.index("full"))
    return Inspection(
        model=str(model.folder),
        dtype=str(model.dtype).removeprefix("torch."),
        prompt=prompt,
        budget=config.budget,
        settings=given,
        share=held.share,
        compressed=held.share < 1,
        format_names=tuple(names),
        format_shares=tuple(shares),
        formats=chosen.to(torch.uint8),
        answer=texts[0],
        full_answer=texts[1],
    )


def _marked(text: str, places: list[tuple[int, int]], find: str) -> tuple[int, ...]:
    """Tokens that share a character with an occurrence of a text."""
    if not find:
        return ()
    words = find.split()
    # Spaces at the ends would mark neighbours.
    found = list(re.finditer(r"\s+".join(map(re.escape, words)), text)) if words else []
    if not found:
        raise ValueError(
            f"--find: {find!r} does not occur in the prompt; allowed is text that does, in the "
            "same case"
        )
    return tuple(
        index
        for index, (start, stop) in enumerate(places)
        if any(start < match.end() and stop > match.start() for match in found)
    )
