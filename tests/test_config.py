"""Settings: what is refused, and what the message says."""

import pytest
import torch

from mdkv_vllm.config import HEADS_FILE, Budget, ConfigError, MixedDimConfig, request_budget
from mdkv_vllm.core.formats import PageGeometry


@pytest.mark.parametrize(
    ("additional", "message"),
    [
        ({"mixeddim": {"budgt": 0.3}}, "did you mean budget?"),
        ({"mixedim": {}}, "mixedim is unknown; did you mean mixeddim?"),
        ({"budget": 0.5}, "budget stands outside the mixeddim block"),
        ({"mixeddim": 3}, "allowed is an object"),
        ({"mixeddim": {"budget": 0}}, "mixeddim.budget is 0; allowed are numbers above 0, up to 1"),
        ({"mixeddim": {"budget": 0.3, "budget_tokens": 9}}, "both set"),
        ({"mixeddim": {"window": 0}}, "mixeddim.window is 0; allowed are whole numbers 1 to 1024"),
        ({"mixeddim": {"formats": ["i3"]}}, "mixeddim.formats: 'i3' is not a page format"),
        ({"mixeddim": {"formats": ["r10"]}}, "multiples of 4"),
        ({"mixeddim": {"formats": ["drop"]}}, "keeps no token"),
        ({"mixeddim": {"formats": "papre"}}, "allowed are default, paper"),
        ({"mixeddim": {"basis": "some.safetensors"}}, "no format has a rank"),
        ({"mixeddim": {"heads": 3}}, "allowed are 'even', the path"),
        ({"mixeddim": {"head_share": 1.5}}, "mixeddim.head_share is 1.5; allowed are numbers"),
        ({"mixeddim": {"heads": "even", "head_share": 0.5}}, "uses no scores; leave one out"),
        ({"mixeddim": {"loss": "mean"}}, "allowed are paper, solo, pooled, hybrid"),
        ({"mixeddim": {"enabled": "yes"}}, "allowed are true and false"),
    ],
)
def test_wrong_settings_are_named(additional, message):
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")):
        MixedDimConfig.from_additional_config(additional)


def test_other_plugins_settings_are_not_ours():
    config = MixedDimConfig.from_additional_config({"other": 1, "mixeddim": {"budget": 0.5}})
    assert config.default_budget == Budget(share=0.5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mixeddim_budget": 2}, "vllm_xargs.mixeddim_budget is 2"),
        ({"mixeddim_budget": "0.5"}, "allowed are numbers"),
        ({"mixeddim_budget_tokens": 1.5}, "allowed are whole numbers"),
        ({"mixeddim_budgett": 0.5}, "did you mean mixeddim_budget?"),
        ({"mixedim_budget": 0.5}, "did you mean mixeddim_budget?"),
        ({"Mixeddim_budget": 0.5}, "did you mean mixeddim_budget?"),
        ({"mixeddim_budget": 0.5, "mixeddim_budget_tokens": 9}, "both set"),
    ],
)
def test_wrong_request_fields_are_named(fields, message):
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")):
        request_budget(fields)


def test_other_request_fields_are_not_ours():
    assert request_budget({"top_n": 3, "report": 1}) is None
    assert request_budget({"top_n": 3, "mixeddim_budget": 1}) == Budget(share=1.0)


@pytest.mark.parametrize(("head_size", "ranks"), [(64, (8, 16)), (80, (8, 20)), (128, (16, 32))])
def test_the_papers_ranks_for_any_head_size(head_size, ranks):
    geometry = PageGeometry(16, head_size, torch.bfloat16)
    names = MixedDimConfig(formats="paper").format_set(geometry).names
    assert names == ("drop", f"r{ranks[0]}", f"r{ranks[1]}", "full")


def test_where_head_scores_are_looked_for(tmp_path):
    model = str(tmp_path)
    assert MixedDimConfig().heads_path(model) is None
    (tmp_path / HEADS_FILE).touch()
    assert MixedDimConfig().heads_path(model) == tmp_path / HEADS_FILE
    assert MixedDimConfig(heads="even").heads_path(model) is None
    assert MixedDimConfig(enabled=False).heads_path(model) is None
    missing = str(tmp_path / "other.safetensors")
    with pytest.raises(ConfigError, match="does not exist; make it with 'mdkv head-scores'"):
        MixedDimConfig(heads=missing).heads_path(model)
    with pytest.raises(ConfigError, match=r"mixeddim.head_share is 0.5, but .* does not exist"):
        MixedDimConfig(head_share=0.5).heads_path(str(tmp_path / "elsewhere"))
