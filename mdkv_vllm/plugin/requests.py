"""Per-request settings, checked where a request enters the server."""

from __future__ import annotations

from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams

from mdkv_vllm.config import REQUEST_BUDGET, Budget, ConfigError, MixedDimConfig, request_budget


def admit(params: object, config: MixedDimConfig) -> None:
    """Check a request's ``mixeddim_*`` fields.

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
