"""Per-request settings, checked where a request enters the server."""

from __future__ import annotations

from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams

from mdkv_vllm.config import REQUEST_BUDGET, Budget, ConfigError, MixedDimConfig, request_budget


def admit(params: object, config: MixedDimConfig, on_gpu: bool = False) -> None:
    """Check a request's ``mixeddim_*`` fields.

    Args:
        params: the request's parameters.
        config: the server's settings.
        on_gpu: whether memory was set aside for compressing to the server's budget at most.

    Raises:
        VLLMValidationError: a field is unknown or out of range; vLLM answers HTTP 400 with
            its text. (Any other exception that comes from here would be a 500.)
    """
    if not isinstance(params, SamplingParams):
        return
    try:
        budget = request_budget(params.extra_args)
    except ConfigError as error:
        raise VLLMValidationError(str(error), parameter="vllm_xargs") from error
    if budget is not None and not config.enabled and budget.share != 1.0:
        raise VLLMValidationError(
            "compression is off on this server (mixeddim.enabled is false); allowed is "
            f"{REQUEST_BUDGET} 1.0, or none",
            parameter="vllm_xargs",
        )
    if budget is not None and on_gpu and _takes_more_memory(budget, config.default_budget):
        raise VLLMValidationError(
            "this request's budget may keep more than the server's, for which alone memory was set "
            "aside on the GPU; allowed are budgets up to the server's in the same unit, or "
            f"{REQUEST_BUDGET} 1.0 for no compression",
            parameter="vllm_xargs",
        )
    if budget is not None and _may_exceed(budget, config.default_budget):
        # The cap on prefix-cache hits assumes the default lease. A larger one reaches further
        # forward and could otherwise cover blocks that other requests share.
        params.skip_reading_prefix_cache = True


def _may_exceed(budget: Budget, default: Budget) -> bool:
    """Whether a budget may lease blocks before the default's lease for some prompt.

    So does any budget where the default leases nothing: a share of 1, or more tokens than the
    prompt has.
    """
    if budget.share == 1.0:
        return False
    if budget.share is None or default.share is None or default.share == 1.0:
        return True
    return budget.share > default.share


def _takes_more_memory(budget: Budget, default: Budget) -> bool:
    """Whether compressing to a budget may take more memory than to the default.

    A lease is made whole before it is written. Where the default keeps all there is none.
    """
    if budget.share == 1.0:
        return False
    if default.share == 1.0:
        return True
    if budget.tokens is not None and default.tokens is not None:
        return budget.tokens > default.tokens
    if budget.share is not None and default.share is not None:
        return budget.share > default.share
    return True
