"""What cannot work is refused by the name of its flag, before anything is loaded."""

import pytest

pytest.importorskip("vllm")

from transformers import LlamaConfig
from vllm.config import KVEventsConfig
from vllm.engine.arg_utils import EngineArgs

EVENTS = KVEventsConfig(enable_kv_cache_events=True, publisher="null")
NGRAM = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model's configuration, which is all that start-up needs to refuse."""
    folder = tmp_path_factory.mktemp("model")
    config = LlamaConfig(
        hidden_size=256, intermediate_size=192, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, vocab_size=512, architectures=["LlamaForCausalLM"],
        max_position_embeddings=1024,
    )  # fmt: skip
    config.save_pretrained(folder)
    return str(folder)


def settings(**values):
    return {"additional_config": {"mixeddim": values}}


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (settings(bugdet=0.3), "did you mean budget"),
        (settings(budget=7), "mixeddim.budget is 7"),
        (settings(formats=["r7"]), "multiples of 4"),
        ({"kv_cache_dtype": "fp8"}, "--kv-cache-dtype fp8"),
        ({"speculative_config": NGRAM | {"method": "ngram_gpu"}}, "add --no-async-scheduling"),
        ({"speculative_config": NGRAM, "pipeline_parallel_size": 2}, "--pipeline-parallel-size"),
        (
            {"kv_transfer_config": {"kv_connector": "OffloadingConnector", "kv_role": "kv_both"}},
            "--kv-transfer-config",
        ),
        ({"kv_events_config": EVENTS, **settings(segments="rolling")}, "--kv-events-config"),
    ],
)
def test_start_up(model, arguments, named):
    engine = EngineArgs(model=model, attention_backend="mixeddim", enforce_eager=True, **arguments)
    with pytest.raises(ValueError, match=named.replace(".", r"\.")):
        engine.create_engine_config()


def test_drafts_by_layers_of_their_own(model):
    drafts = {"method": "draft_model", "model": model, "num_speculative_tokens": 2}
    engine = EngineArgs(model=model, attention_backend="mixeddim", speculative_config=drafts)
    with pytest.raises(ValueError, match=r"method draft_model.*allowed: ngram"):
        engine.create_engine_config()


def test_settings_without_the_backend(model):
    with pytest.raises(ValueError, match="add --attention-backend mixeddim"):
        EngineArgs(model=model, enforce_eager=True, **settings(budget=0.3)).create_engine_config()


@pytest.mark.parametrize("more", [{}, {"speculative_config": NGRAM}])
def test_what_is_supported_starts(model, more):
    made = EngineArgs(model=model, attention_backend="mixeddim", enforce_eager=True, **more)
    assert made.create_engine_config().cache_config.block_size == 16


@pytest.mark.parametrize(
    "more", [settings(segments="rolling", shared_prefixes="full"), {}], ids=["full", "no scores"]
)
def test_events_where_no_leases_are_shared(model, more):
    EngineArgs(
        model=model, attention_backend="mixeddim", enforce_eager=True, kv_events_config=EVENTS,
        **more,
    ).create_engine_config()  # fmt: skip
