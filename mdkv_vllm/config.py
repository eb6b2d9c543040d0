"""Every setting, validated once."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from mdkv_vllm.core.formats import FormatError, FormatSet, PageGeometry, parse_formats
from mdkv_vllm.core.heads import HeadBudgets
from mdkv_vllm.core.losses import LOSSES
from mdkv_vllm.core.plan import Rule

BASIS_FILE = "mixeddim_basis.safetensors"
"""Name under which a calibrated basis is looked for in the model folder."""
HEADS_FILE = "mixeddim_heads.safetensors"
"""Name under which head scores are looked for in the model folder."""
PROMPT_BASIS = "prompt"
"""Value of ``basis`` that computes a basis from each prompt."""
EVEN_HEADS = "even"
"""Value of ``heads`` that gives every layer the same bytes."""
DEFAULT_BUDGET = 0.25
DEFAULT_SEGMENT_TOKENS = 512
DEFAULT_HEAD_SHARE = 0.67
DEFAULT_HEAD_POWER = 0.5
BLOCK_NAME = "mixeddim"
"""Key of our settings in ``--additional-config``."""
PRESETS = ("default", "paper")
KERNELS = ("auto", "autotune", "cpu", "triton", "cuda")
PREFILLS = ("auto", "flash", "xformers", "sdpa")
MAX_WINDOW = 1024
MIN_SEGMENT_TOKENS = 64
MAX_HEAD_POWER = 4
MAX_HEAD_SIZE = 1024
"""Ranks in ``formats`` are below it; the model's own head size is checked when it is known."""
REQUEST_BUDGET = "mixeddim_budget"
REQUEST_BUDGET_TOKENS = "mixeddim_budget_tokens"
REQUEST_FIELDS = (REQUEST_BUDGET, REQUEST_BUDGET_TOKENS)
"""Fields of ``vllm_xargs``."""
COMPRESSED, FULL_SIZE = "compressed", "full"
SHARED_PREFIXES = (COMPRESSED, FULL_SIZE)
"""What requests may find of others' prefixes."""


class ConfigError(ValueError):
    """A setting that is unknown or out of range; the message names it and what is allowed."""


@dataclass(frozen=True)
class Budget:
    """How much of a prompt to keep; exactly one of the two is set.

    Attributes:
        share: share of the prompt's KV bytes, in (0, 1]; 1 keeps all.
        tokens: full-dimension token equivalents per KV head.
    """

    share: float | None = None
    tokens: int | None = None

    def share_of(self, prompt_tokens: int) -> float:
        """The budget as a share of a prompt's bytes, at most 1."""
        if self.tokens is not None:
            return min(1.0, self.tokens / prompt_tokens)
        assert self.share is not None
        return self.share


@dataclass(frozen=True)
class MixedDimConfig:
    """Settings under ``--additional-config '{"mixeddim": {...}}'``.

    Attributes:
        enabled: compress at all; with False the backend serves a full cache.
        budget: share of each prompt's KV bytes to keep, in (0, 1]. Default 0.25.
        budget_tokens: the same in full-dimension token equivalents per KV head, from 1;
            replaces ``budget``.
        window: tokens behind a segment whose queries score it, 1 to 1024; of a prompt's last
            segment the prompt's last ones, which stay full.
        segment_tokens: tokens of a segment of an answer, and of a long prompt; a multiple of the
            block size, from 64.
        segments: ``prompt`` compresses each prompt as one segment when it has been prefilled;
            ``rolling`` by ``segment_tokens``, while it is being prefilled; ``auto`` rolls prompts
            of more than 8,192 tokens.
        shared_prefixes: ``compressed`` lets requests read the leases of others with the same
            prefix; ``full`` only blocks that are cached at full size.
        formats: ``default``, ``paper``, or a list of format names.
        basis: ``prompt``, a path to a calibrated basis, or None to look for
            ``mixeddim_basis.safetensors`` in the model folder.
        heads: ``even`` gives every layer the same bytes, for which its heads compete; otherwise
            each head has a budget of its own by its score: a path to head scores, or None to
            look for ``mixeddim_heads.safetensors`` in the model folder and be ``even`` without.
        head_share: part of the budget that goes by head scores, above 0, up to 1; the rest is
            the same for every head. Default 0.67.
        head_power: exponent of the scores, above 0, up to 4; the lower, the more alike are heads
            treated. Default 0.5.
        loss: ``hybrid``, ``pooled``, ``solo`` or ``paper``.
        min_prompt_tokens: shorter prompts are no segments of their own, from 1; they are part of
            their answer's first one.
        kernels: what decodes: ``cpu``, ``triton``, ``cuda``, ``auto`` for the device's default, or
            ``autotune`` for the faster of a GPU's, timed when the server starts.
        prefill: attention while prompts are prefilled: ``flash``, ``xformers``, ``sdpa``, or
            ``auto`` for what is best on the device.

    Raises:
        ConfigError: a value has the wrong type or is out of range.
    """

    enabled: bool = True
    budget: float | None = None
    budget_tokens: int | None = None
    window: int = 16
    segment_tokens: int = DEFAULT_SEGMENT_TOKENS
    segments: str = Rule.AUTO.value
    shared_prefixes: str = COMPRESSED
    formats: str | tuple[str, ...] = "default"
    basis: str | None = None
    heads: str | None = None
    head_share: float | None = None
    head_power: float | None = None
    loss: str = "hybrid"
    min_prompt_tokens: int = 256
    kernels: str = "auto"
    prefill: str = "auto"

    def __post_init__(self) -> None:
        if not isinstance(self.enabled, bool):
            raise ConfigError(f"mixeddim.enabled is {self.enabled!r}; allowed are true and false")
        if self.budget is not None and self.budget_tokens is not None:
            raise ConfigError("mixeddim.budget and mixeddim.budget_tokens are both set; give one")
        if self.budget is None and self.budget_tokens is None:
            object.__setattr__(self, "budget", DEFAULT_BUDGET)
        _check_budget("mixeddim.budget", self.budget)
        _check_budget_tokens("mixeddim.budget_tokens", self.budget_tokens)
        _check_int("mixeddim.window", self.window, 1, MAX_WINDOW)
        _check_int("mixeddim.segment_tokens", self.segment_tokens, MIN_SEGMENT_TOKENS, None)
        _check_choice("mixeddim.segments", self.segments, tuple(rule.value for rule in Rule))
        _check_choice("mixeddim.shared_prefixes", self.shared_prefixes, SHARED_PREFIXES)
        _check_int("mixeddim.min_prompt_tokens", self.min_prompt_tokens, 1, None)
        _check_choice("mixeddim.loss", self.loss, tuple(LOSSES))
        _check_choice("mixeddim.kernels", self.kernels, KERNELS)
        _check_choice("mixeddim.prefill", self.prefill, PREFILLS)
        self._check_formats()
        if self.basis is not None and (not isinstance(self.basis, str) or not self.basis):
            raise ConfigError(
                f"mixeddim.basis is {self.basis!r}; allowed are 'prompt', the path of a basis "
                "file, or nothing"
            )
        if self.basis == PROMPT_BASIS and self.segments == Rule.ROLLING.value:
            raise ConfigError(
                f"mixeddim.segments is {self.segments!r}, but mixeddim.basis is {PROMPT_BASIS!r}, "
                "with which a request has one segment, its prompt; leave one out"
            )
        self._check_heads()
        ranked = self.formats == "paper" or any(name.startswith("r") for name in self.formats)
        if self.basis is not None and not ranked:
            raise ConfigError(
                f"mixeddim.basis is {self.basis!r}, but no format has a rank that needs one; "
                "leave it out, or add a format such as r16"
            )

    def _check_heads(self) -> None:
        if self.heads is not None and (not isinstance(self.heads, str) or not self.heads):
            raise ConfigError(
                f"mixeddim.heads is {self.heads!r}; allowed are {EVEN_HEADS!r}, the path of a file "
                "of head scores, or nothing"
            )
        for name in ("head_share", "head_power"):
            if getattr(self, name) is not None and self.heads == EVEN_HEADS:
                raise ConfigError(
                    f"mixeddim.{name} is {getattr(self, name)!r}, but mixeddim.heads is "
                    f"{EVEN_HEADS!r}, which uses no scores; leave one out"
                )
        if self.head_share is not None:
            _check_above_0("mixeddim.head_share", self.head_share, 1)
        if self.head_power is not None:
            _check_above_0("mixeddim.head_power", self.head_power, MAX_HEAD_POWER)

    def _check_formats(self) -> None:
        if isinstance(self.formats, str):
            _check_choice("mixeddim.formats", self.formats, PRESETS)
            return
        if not isinstance(self.formats, (list, tuple)) or not all(
            isinstance(name, str) for name in self.formats
        ):
            raise ConfigError(
                f"mixeddim.formats is {self.formats!r}; allowed are {', '.join(PRESETS)} or a "
                "list of format names"
            )
        object.__setattr__(self, "formats", tuple(self.formats))
        try:
            parse_formats(tuple(self.formats), PageGeometry(16, MAX_HEAD_SIZE, torch.bfloat16))
        except FormatError as error:
            raise ConfigError(f"mixeddim.{error}") from error

    @classmethod
    def from_additional_config(cls, additional_config: Mapping[str, Any]) -> MixedDimConfig:
        """Read the ``mixeddim`` block of vLLM's ``--additional-config``.

        Raises:
            ConfigError: the block is no object, a name is unknown or misplaced, or a value is
                wrong.
        """
        block = additional_config.get(BLOCK_NAME, {})
        if not isinstance(block, Mapping):
            raise ConfigError(f"mixeddim is {block!r}; allowed is an object of settings")
        known = [f.name for f in fields(cls)]
        for name in additional_config:
            if name in known:
                raise ConfigError(f"{name} stands outside the {BLOCK_NAME} block; put it inside")
            if name != BLOCK_NAME and _is_like(name, (BLOCK_NAME,)):
                raise ConfigError(f"{name} is unknown; did you mean {BLOCK_NAME}?")
        for name in block:
            if name not in known:
                raise ConfigError(f"mixeddim.{name} is unknown{_nearest(name, known)}")
        return cls(**block)

    @property
    def default_budget(self) -> Budget:
        """The budget of requests that do not bring their own."""
        return Budget(self.budget, self.budget_tokens)

    def format_set(self, geometry: PageGeometry) -> FormatSet:
        """Formats that an allocation may choose from.

        Args:
            geometry: the cache's sizes.

        Raises:
            mdkv_vllm.core.formats.FormatError: a listed name does not fit the model.
        """
        if isinstance(self.formats, tuple):
            return parse_formats(self.formats, geometry)
        if self.formats == "default":
            return parse_formats(("drop", "i4", "i8", "full"), geometry)
        # Ranks are multiples of 4; head size 80 has no exact eighth.
        eighth, quarter = geometry.head_size // 32, geometry.head_size // 16
        return parse_formats(("drop", f"r{4 * eighth}", f"r{4 * quarter}", "full"), geometry)

    def basis_path(self, model: str) -> Path:
        """Where the calibrated basis is expected for a model folder."""
        return Path(self.basis) if self.basis else Path(model) / BASIS_FILE

    def head_budgets(self, scores: torch.Tensor) -> HeadBudgets:
        """Budgets by scores of KV heads, float ``[layers, kv_heads]``."""
        share = DEFAULT_HEAD_SHARE if self.head_share is None else self.head_share
        power = DEFAULT_HEAD_POWER if self.head_power is None else self.head_power
        return HeadBudgets(scores, share, power)

    def compresses_answers(self, head_scores: bool, drops: bool) -> bool:
        """Whether answers, and prompts by and by, are compressed.

        Not where every prompt has a basis of its own. Without head scores, tokens that were scored
        by the few behind their segment alone are lost when they matter much later
        (benchmarks/NOTES.md), unless nothing is dropped: then they have to be asked for.

        Args:
            head_scores: whether heads have budgets by their scores.
            drops: whether tokens may be dropped.
        """
        if self.basis == PROMPT_BASIS:
            return False
        return head_scores or self.segments == Rule.ROLLING.value or not drops

    def shares_prefixes(self, head_scores: bool) -> bool:
        """Whether requests with the server's budget read and publish compressed prefixes.

        A budget in tokens is another share of every prompt, so nothing of it fits another.

        Args:
            head_scores: whether heads have budgets by their scores.
        """
        drops = not isinstance(self.formats, tuple) or "drop" in self.formats
        compressed = self.enabled and self.budget is not None and self.budget < 1
        asked = self.shared_prefixes == COMPRESSED
        return asked and compressed and self.compresses_answers(head_scores, drops)

    def heads_path(self, model: str) -> Path | None:
        """File of head scores to use with a model folder; None for even budgets.

        Raises:
            ConfigError: ``heads`` names a file that does not exist, or ``head_share`` or
                ``head_power`` is set and there is no file.
        """
        if self.heads == EVEN_HEADS or not self.enabled:
            return None
        path = Path(self.heads) if self.heads else Path(model) / HEADS_FILE
        if path.is_file():
            return path
        for name in ("heads", "head_share", "head_power"):
            if getattr(self, name) is not None:
                raise ConfigError(
                    f"mixeddim.{name} is {getattr(self, name)!r}, but {path} does not exist; make "
                    f"it with 'mdkv head-scores', or set heads to {EVEN_HEADS!r} alone"
                )
        return None


def read_config(budget: float, settings: object) -> MixedDimConfig:
    """Check ``--budget`` and ``--settings`` before a model is loaded.

    Args:
        budget: share of the prompt's bytes to keep.
        settings: what the JSON of ``--settings`` says.

    Raises:
        ValueError: one of the two is out of range, or names no setting.
    """
    if not 0 < budget <= 1:
        raise ValueError(f"--budget is {budget}; allowed are numbers above 0, up to 1")
    if not isinstance(settings, dict):
        raise ValueError(f"--settings is {settings!r}; allowed is a JSON object of settings")
    for name in ("budget", "budget_tokens"):
        if name in settings:
            raise ValueError(f"--settings: {name} has a flag of its own; give --budget")
    try:
        return MixedDimConfig.from_additional_config({"mixeddim": {"budget": budget, **settings}})
    except ConfigError as error:
        raise ValueError(f"--settings: {error}") from error


def request_budget(extra_args: Mapping[str, Any] | None) -> Budget | None:
    """The budget a request brings in ``vllm_xargs``, or None.

    Raises:
        ConfigError: a ``mixeddim*`` field is unknown or out of range.
    """
    ours = {k: v for k, v in (extra_args or {}).items() if _is_like(k, REQUEST_FIELDS)}
    for name in ours:
        if name not in REQUEST_FIELDS:
            raise ConfigError(f"vllm_xargs.{name} is unknown{_nearest(name, REQUEST_FIELDS)}")
    if not ours:
        return None
    if len(ours) > 1:
        raise ConfigError(
            f"vllm_xargs.{REQUEST_BUDGET} and vllm_xargs.{REQUEST_BUDGET_TOKENS} are both set; "
            "give one"
        )
    share, tokens = ours.get(REQUEST_BUDGET), ours.get(REQUEST_BUDGET_TOKENS)
    if REQUEST_BUDGET in ours:
        _check_budget(f"vllm_xargs.{REQUEST_BUDGET}", share, required=True)
        return Budget(share=float(share))  # type: ignore[arg-type]
    _check_budget_tokens(f"vllm_xargs.{REQUEST_BUDGET_TOKENS}", tokens, required=True)
    return Budget(tokens=tokens)


def _is_like(name: str, known: tuple[str, ...]) -> bool:
    """Whether a name among other people's is probably meant to be one of ours."""
    lower = name.lower()
    return lower.startswith(BLOCK_NAME) or bool(difflib.get_close_matches(lower, known, 1, 0.8))


def _nearest(name: str, known: list[str] | tuple[str, ...]) -> str:
    close = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]}?" if close else ""
    return f"{hint} (allowed: {', '.join(known)})"


def _check_budget(name: str, value: Any, required: bool = False) -> None:  # noqa: ANN401
    if value is not None or required:
        _check_above_0(name, value, 1, " (no compression)")


def _check_above_0(name: str, value: Any, most: int, meaning: str = "") -> None:  # noqa: ANN401
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 < value <= most:
        raise ConfigError(
            f"{name} is {value!r}; allowed are numbers above 0, up to {most}{meaning}"
        )


def _check_budget_tokens(name: str, value: Any, required: bool = False) -> None:  # noqa: ANN401
    if value is None and not required:
        return
    _check_int(name, value, 1, None)


def _check_int(name: str, value: Any, low: int, high: int | None) -> None:  # noqa: ANN401
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or value < low or (high is not None and value > high):
        allowed = f"{low} to {high}" if high is not None else f"from {low} up"
        raise ConfigError(f"{name} is {value!r}; allowed are whole numbers {allowed}")


def _check_choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:  # noqa: ANN401
    if value not in allowed:
        raise ConfigError(f"{name} is {value!r}; allowed are {', '.join(allowed)}")
