"""A model that prefills a prompt once and decodes from many simulated caches of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention

from mdkv_vllm.models.held_cache import HeldCache, Prefill, Recorder
from mdkv_vllm.models.windows import refuse_windows

Watch = Callable[[int, torch.Tensor], None]
"""Told, layer by layer, how decoding attends to the prompt: float32 ``[rows, query_heads, steps,
prompt_tokens]``."""
ATTENTION = "mixeddim_eval"
"""Name under which our attention is registered with transformers."""


MANY_TOKENS = 32
"""Tokens of a step from which reading a head's kept tokens alone pays for gathering them."""


class Extension(NamedTuple):
    """What came of running tokens behind those that are held."""

    cache: HeldCache
    """With the new tokens at full size."""
    queries: torch.Tensor
    """Of the new tokens, ``[layers, query_heads, new_tokens, head_size]``."""
    logits: torch.Tensor
    """After the last new tokens, float32 ``[tokens asked for, vocabulary]``."""


@dataclass
class _Decoding:
    """The caches that a decoding step reads, one batch row each."""

    keys: list[torch.Tensor]
    """Per layer float32 ``[rows * kv_heads, tokens, head_size]``."""
    values: list[torch.Tensor]
    hidden: list[torch.Tensor]
    """Per layer bool ``[rows * kv_heads, 1, tokens]``: what is not kept."""
    watch: Watch | None = None


class InProcessModel:
    """A Hugging Face causal language model whose attention reads caches that we supply.

    Args:
        folder: model folder or hub name.
        dtype: compute type, for example ``torch.bfloat16``.
        device: torch device.

    Raises:
        ValueError: there is no such device, or the model has sliding windows.
    """

    def __init__(
        self, folder: str | Path, dtype: torch.dtype = torch.bfloat16, device: str = "cpu"
    ) -> None:
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"--device is {device!r}, which cannot be used: {error}") from error
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.masking_utils import AttentionMaskInterface
        from transformers.modeling_utils import AttentionInterface

        refuse_windows(folder)
        AttentionInterface.register(ATTENTION, _attend)
        AttentionMaskInterface.register(ATTENTION, _no_mask)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self.model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation=ATTENTION
        ).to(device)
        self.model.eval().requires_grad_(False)
        self.device = torch.device(device)
        self.folder = Path(folder)
        self.dtype = dtype
        decoder = self.model.get_decoder()
        self.attentions: list[Any] = [layer.self_attn for layer in decoder.layers]
        for layer, attention in enumerate(self.attentions):
            attention.mixeddim_eval = (self, layer)
            # Peers rebuild queries from hidden states and expect this where kvpress puts it.
            attention.rotary_emb = decoder.rotary_emb
        config = self.model.config.get_text_config()
        self.num_layers: int = config.num_hidden_layers
        self.num_kv_heads: int = config.num_key_value_heads
        self.head_size: int = self.attentions[0].head_dim
        self.scale: float = self.attentions[0].scaling
        self.stop_tokens = _stop_tokens(self.model, self.tokenizer)
        self._recorder: Recorder | None = None
        self._decoding: _Decoding | None = None

    def prefill(self, token_ids: Sequence[int], window: int | None = None) -> Prefill:
        """Run a prompt and keep what methods may ask for.

        Args:
            token_ids: the prompt.
            window: its last tokens, whose queries are kept; None for all.
        """
        recorder = Recorder(window)
        hooks = [
            attention.register_forward_pre_hook(recorder.keep_inputs, with_kwargs=True)
            for attention in self.attentions
        ]
        self._recorder = recorder
        try:
            ids = torch.tensor([list(token_ids)], device=self.device)
            logits = self.model(ids, use_cache=False, logits_to_keep=1).logits[0, -1].float()
        finally:
            self._recorder = None
            for hook in hooks:
                hook.remove()
        return recorder.finish(tuple(token_ids), logits)

    def generate(
        self, prefill: Prefill, caches: Sequence[HeldCache], max_tokens: int
    ) -> list[list[int]]:
        """Greedy answers, one per cache; as in vLLM the first token comes from prefill.

        Args:
            prefill: the prompt.
            caches: what each row reads of it.
            max_tokens: tokens to generate at most.

        Returns:
            Token ids, without the stop token.
        """
        return self.go_on([prefill.logits] * len(caches), caches, max_tokens)

    def go_on(
        self, logits: Sequence[torch.Tensor], caches: Sequence[HeldCache], max_tokens: int
    ) -> list[list[int]]:
        """Greedy answers, one per cache.

        Args:
            logits: of each row's first token, float32 ``[vocabulary]``.
            caches: what each row reads, of equally many tokens.
            max_tokens: tokens to generate at most.

        Returns:
            Token ids, without the stop token.
        """
        rows = torch.stack(list(logits)).argmax(-1, keepdim=True)
        answers = [rows]
        stops = torch.tensor(sorted(self.stop_tokens), device=self.device)
        ended = torch.isin(rows[:, 0], stops)
        state = self._start(caches)
        while len(answers) < max_tokens and not bool(ended.all()):
            rows = state.step(rows)[:, -1].argmax(-1, keepdim=True)
            answers.append(rows)
            ended |= torch.isin(rows[:, 0], stops)
        self._decoding = None
        return [self._until_stop(row) for row in torch.cat(answers, 1).tolist()]

    def follow(
        self,
        caches: Sequence[HeldCache],
        continuation: Sequence[int],
        watch: Watch | None = None,
    ) -> torch.Tensor:
        """Logits along a given continuation of a prompt, read through each cache.

        Args:
            caches: what each row reads of the prompt.
            continuation: token ids after it.
            watch: told what every head looks at.

        Returns:
            float32 ``[caches, len(continuation), vocabulary]``; entry ``t`` predicts the token
            after ``continuation[t]``.
        """
        rows = torch.tensor([list(continuation)], device=self.device).expand(len(caches), -1)
        steps = self._start(caches)
        assert self._decoding is not None
        self._decoding.watch = watch
        logits = steps.step(rows)
        self._decoding = None
        return logits

    def extend(
        self, cache: HeldCache, token_ids: Sequence[int], every_logit: bool = True
    ) -> Extension:
        """Run tokens behind those that a cache holds, and keep their keys and values as well.

        Args:
            cache: what the tokens read of those before them.
            token_ids: the tokens, one or more.
            every_logit: whether logits after each of them are wanted, or after the last alone.
        """
        recorder = self._recorder = Recorder()
        steps = self._start([cache])
        try:
            rows = torch.tensor([list(token_ids)], device=self.device)
            logits = steps.step(rows, 0 if every_logit else 1)[0]
        finally:
            self._recorder = self._decoding = None
        keys, values, queries = recorder.tensors()
        return Extension(cache.grown(keys, values), queries, logits)

    def _start(self, caches: Sequence[HeldCache]) -> _Steps:
        def stacked(tensors: list[torch.Tensor]) -> torch.Tensor:
            return torch.cat(tensors).to(self.device, torch.float32)

        layers = range(self.num_layers)
        self._decoding = _Decoding(
            [stacked([c.keys[layer] for c in caches]) for layer in layers],
            [stacked([c.values[layer] for c in caches]) for layer in layers],
            [~torch.cat([c.kept[layer] for c in caches]).unsqueeze(1) for layer in layers],
        )
        return _Steps(self, caches[0].num_tokens)

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        """Attention of one layer; tensors ``[rows, heads, tokens, head_size]``."""
        if self._recorder is not None:
            self._recorder.keep_layer(query[0], key[0], value[0])
        if self._decoding is not None:
            many = query.shape[2] >= MANY_TOKENS and self._decoding.watch is None
            attend = self._attend_many if many else self._attend_decoding
            return attend(layer, query, key, value)
        return scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=self.scale, enable_gqa=True
        )

    def _attend_decoding(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        state = self._decoding
        assert state is not None
        rows, query_heads, count, size = query.shape
        kv_heads, total = key.shape[1], key.shape[2]
        group = query_heads // kv_heads
        grouped = query.float().reshape(rows * kv_heads, group * count, size) * self.scale
        prompt = torch.bmm(grouped, state.keys[layer].transpose(1, 2))
        prompt.masked_fill_(state.hidden[layer], -torch.inf)
        later = torch.bmm(grouped, key.float().flatten(0, 1).transpose(1, 2))
        future = torch.ones(count, total, dtype=torch.bool, device=query.device)
        later.masked_fill_(future.triu_(total - count + 1).repeat(group, 1), -torch.inf)
        weights = torch.cat((prompt, later), -1).softmax(-1)
        if state.watch is not None:
            seen = weights[..., : prompt.shape[-1]]
            state.watch(layer, seen.view(rows, query_heads, count, -1))
        output = torch.bmm(weights[..., : prompt.shape[-1]], state.values[layer])
        output += torch.bmm(weights[..., prompt.shape[-1] :], value.float().flatten(0, 1))
        return output.view(rows, query_heads, count, size).to(query.dtype)

    def _attend_many(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        """:meth:`_attend_decoding` of many tokens, without all scores in memory."""
        state = self._decoding
        assert state is not None
        rows, _, count, size = query.shape
        kv_heads, total = key.shape[1], key.shape[2]
        grouped = query.float().reshape(rows * kv_heads, -1, count, size)
        output = torch.empty_like(grouped)
        later = key.float().flatten(0, 1), value.float().flatten(0, 1)
        held = state.keys[layer], state.values[layer]
        for head, hidden in enumerate(state.hidden[layer]):
            kept = (~hidden[0]).nonzero().squeeze(1)
            keys, values = (
                torch.cat((before[head, kept], after[head])).view(1, 1, -1, size)
                for before, after in zip(held, later, strict=True)
            )
            seen = torch.ones(count, len(kept) + total, dtype=torch.bool, device=query.device)
            output[head : head + 1] = scaled_dot_product_attention(
                grouped[head : head + 1], keys, values, scale=self.scale, enable_gqa=True,
                attn_mask=seen.tril_(len(kept) + total - count),
            )  # fmt: skip
        return output.view(query.shape).to(query.dtype)

    def _until_stop(self, tokens: list[int]) -> list[int]:
        stop = next((i for i, token in enumerate(tokens) if token in self.stop_tokens), None)
        return tokens[:stop]


class _Steps:
    """Forward passes after a prompt; transformers' own cache holds only what came after it."""

    def __init__(self, model: InProcessModel, position: int) -> None:
        from transformers import DynamicCache

        self._model, self._position = model, position
        self._cache = DynamicCache(config=model.model.config)

    def step(self, token_ids: torch.Tensor, last: int = 0) -> torch.Tensor:
        """Append ``[rows, n]`` token ids; float32 logits ``[rows, n or last, vocabulary]``.

        Args:
            token_ids: the tokens.
            last: after how many of them logits are wanted, the last ones; 0 for all.
        """
        rows, count = token_ids.shape
        positions = torch.arange(self._position, self._position + count, device=token_ids.device)
        self._position += count
        logits = self._model.model(
            token_ids,
            position_ids=positions.expand(rows, -1),
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=last,
        ).logits
        return logits.float()


def _attend(
    module: Any,  # noqa: ANN401
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *args: Any,  # noqa: ANN401
    **kwargs: Any,  # noqa: ANN401
) -> tuple[torch.Tensor, None]:
    """Attention in the form transformers calls it."""
    del args, kwargs
    model, layer = module.mixeddim_eval
    return model.attend(layer, query, key, value).transpose(1, 2).contiguous(), None


def _no_mask(*args: Any, **kwargs: Any) -> None:  # noqa: ANN401
    """Masks are :meth:`InProcessModel.attend`'s own business."""
    del args, kwargs


def _stop_tokens(model: Any, tokenizer: Any) -> frozenset[int]:  # noqa: ANN401
    """End-of-sequence tokens, as vLLM collects them."""
    configured = model.generation_config.eos_token_id
    stops = configured if isinstance(configured, list) else [configured]
    return frozenset(t for t in (*stops, tokenizer.eos_token_id) if t is not None)
