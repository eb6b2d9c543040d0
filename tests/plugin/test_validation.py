"""Per-request settings at the server's door."""

import pytest

pytest.importorskip("vllm")

from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams

from mdkv_vllm.config import MixedDimConfig
from mdkv_vllm.plugin.validation import Room, admit


def admitted(config, **fields):
    params = SamplingParams(extra_args=fields or None)
    admit(params, config)
    return params


@pytest.mark.parametrize(
    ("default", "fields", "skips"),
    [
        ({"budget": 0.4}, {}, False),
        ({"budget": 0.4}, {"mixeddim_budget": 0.4}, False),
        ({"budget": 0.4}, {"mixeddim_budget": 0.2}, False),
        ({"budget": 0.4}, {"mixeddim_budget": 0.5}, True),
        ({"budget": 0.4}, {"mixeddim_budget": 1.0}, False),
        ({"budget": 0.4}, {"mixeddim_budget_tokens": 10}, True),
        # Nothing is leased by default, so no lease of one's own is expected.
        ({"budget": 1.0}, {"mixeddim_budget": 0.3}, True),
        ({"budget_tokens": 400}, {"mixeddim_budget_tokens": 100}, True),
        ({"budget_tokens": 400}, {"mixeddim_budget": 0.1}, True),
    ],
)
def test_leases_beyond_the_defaults_read_no_prefix_cache(default, fields, skips):
    params = admitted(MixedDimConfig(**default), **fields)
    assert bool(params.skip_reading_prefix_cache) is skips


@pytest.mark.parametrize("fields", [{"mixeddim_budget": 2}, {"mixeddim_budgett": 0.5}])
def test_wrong_fields_are_the_clients_fault(fields):
    with pytest.raises(VLLMValidationError, match=r"vllm_xargs\.mixeddim_budget"):
        admitted(MixedDimConfig(), **fields)


def test_no_budget_where_compression_is_off():
    off = MixedDimConfig(enabled=False)
    with pytest.raises(VLLMValidationError, match=r"mixeddim\.enabled is false"):
        admitted(off, mixeddim_budget=0.3)
    assert not admitted(off, mixeddim_budget=1.0).skip_reading_prefix_cache


@pytest.mark.parametrize(
    ("default", "fields", "refused"),
    [
        ({"budget": 0.4}, {"mixeddim_budget": 0.4}, False),
        ({"budget": 0.4}, {"mixeddim_budget": 0.5}, True),
        ({"budget": 0.4}, {"mixeddim_budget": 1.0}, False),
        ({"budget": 1.0}, {"mixeddim_budget": 0.3}, True),
        ({"budget": 0.4}, {"mixeddim_budget_tokens": 10}, True),
        ({"budget_tokens": 400}, {"mixeddim_budget_tokens": 400}, False),
        ({"budget_tokens": 400}, {"mixeddim_budget_tokens": 401}, True),
    ],
)
def test_gpus_hold_memory_for_the_servers_budget_alone(default, fields, refused):
    params = SamplingParams(extra_args=fields)
    if not refused:
        admit(params, MixedDimConfig(**default), Room(on_gpu=True))
        return
    with pytest.raises(VLLMValidationError, match=r"may keep more.*allowed are"):
        admit(params, MixedDimConfig(**default), Room(on_gpu=True))


@pytest.mark.parametrize(
    ("fields", "prompt", "answer", "refused"),
    [
        ({}, 3000, 1000, False),
        ({"mixeddim_budget": 0.4}, 3000, 1000, False),
        ({"mixeddim_budget": 0.2}, 3000, 1000, False),
        ({"mixeddim_budget": 0.5}, 1000, 1000, False),
        ({"mixeddim_budget": 0.5}, 1000, 1001, True),
        ({"mixeddim_budget": 1.0}, 1000, 1001, True),
        # No max_tokens is as many as the model allows.
        ({"mixeddim_budget": 1.0}, 10, None, True),
        ({"mixeddim_budget_tokens": 100}, 1500, 501, True),
    ],
)
def test_a_request_that_would_not_fit_at_its_own_budget(fields, prompt, answer, refused):
    """The cache holds 2,000 tokens at full size; start-up promised the server's budget alone."""
    room = Room(tokens=2000, longest=4096)
    params = SamplingParams(extra_args=fields, max_tokens=answer)
    if not refused:
        admit(params, MixedDimConfig(budget=0.4), room, prompt)
        return
    with pytest.raises(VLLMValidationError, match=r"holds 2000.*allowed are"):
        admit(params, MixedDimConfig(budget=0.4), room, prompt)
