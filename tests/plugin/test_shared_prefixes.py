"""Leases that others read, against vLLM's real block pool."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("vllm")

from test_manager import BLOCK, BLOCKS, ROLLING, document, make_manager, make_request, spec_for
from vllm.lora.request import LoRARequest
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.sampling_params import SamplingParams
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHash
from vllm.v1.request import RequestStatus

from mdkv_vllm.config import REQUEST_BUDGET
from mdkv_vllm.core.plan import RequestPlan
from mdkv_vllm.core.segment import SharedSegment
from mdkv_vllm.plugin.metrics.recorder import current_recorder
from mdkv_vllm.plugin.metrics.table import (
    KEPT_BYTES,
    SEGMENTS_EVICTED,
    SEGMENTS_HIT,
    SEGMENTS_PUBLISHED,
    SHARED_TOKENS,
)
from mdkv_vllm.plugin.shared_prefixes import SharedPrefixes, shared_segments
from mdkv_vllm.request import CompressionRequest

PROMPT = 320


@pytest.fixture
def manager():
    return make_manager()


def counted(metric):
    return current_recorder().value(metric)


def prefill(manager, request):
    """Compute a prompt in one step; tokens that came from the cache."""
    manager.new_step_starts()
    hits, num_hit, _ = manager.get_computed_blocks(request)
    assert manager.allocate_slots(request, request.num_tokens - num_hit, num_hit, hits)
    request.status = RequestStatus.RUNNING
    request.num_computed_tokens = request.num_tokens
    return num_hit


def decode(manager, request, tokens):
    for _ in range(tokens):
        request.append_output_token_ids(7)
        manager.new_step_starts()
        assert manager.allocate_slots(request, 1)
        request.num_computed_tokens = request.num_tokens


def finish(manager, request, status=RequestStatus.FINISHED_STOPPED):
    request.status = status
    manager.free(request)


def told(request):
    """What the worker is told that a request shares."""
    args = request.sampling_params.extra_args
    return CompressionRequest.parse(request.request_id, request.num_prompt_tokens, args).shared


def first_turn(manager, answer=20):
    """A prompt of 320 tokens and its answer; the tokens of both."""
    request = make_request("first", document(0, PROMPT))
    prefill(manager, request)
    decode(manager, request, answer)
    finish(manager, request)
    return list(request.all_token_ids)


def test_a_second_turn_reads_the_first_ones_lease(manager):
    begun = first_turn(manager)
    assert counted(SEGMENTS_PUBLISHED) == 1
    free = manager.block_pool.get_num_free_blocks()
    assert free == BLOCKS - 1
    second = make_request("second", begun + document(2, 100))
    hit = prefill(manager, second)
    # The window of 8 tokens is computed again.
    assert hit == (PROMPT - 8) // BLOCK * BLOCK
    (segment,) = told(second)
    assert (segment.first_block, segment.end_block) == (0, hit // BLOCK)
    assert 0.3 < segment.num_lease_blocks / segment.end_block <= 0.4
    assert (counted(SEGMENTS_HIT), counted(SHARED_TOKENS)) == (1, hit)
    held = segment.num_lease_blocks + -(-len(second.all_token_ids) // BLOCK) - segment.end_block
    assert manager.block_pool.get_num_free_blocks() == free - held
    finish(manager, second)
    assert manager.block_pool.get_num_free_blocks() == BLOCKS - 1
    assert counted(KEPT_BYTES) == 0


def test_a_third_turn_reads_both(manager):
    begun = first_turn(manager)
    second = make_request("second", begun + document(2, 200))
    prefill(manager, second)
    decode(manager, second, 20)
    finish(manager, second)
    third = make_request("third", list(second.all_token_ids) + document(1, 60))
    hit = prefill(manager, third)
    assert [segment.first_block for segment in told(third)] == [0, (PROMPT - 8) // BLOCK]
    assert hit == told(third)[-1].end_block * BLOCK > 500


@pytest.mark.parametrize("changed", [0, 150, PROMPT - 1, PROMPT + 7])
def test_other_tokens_up_to_the_windows_end_read_nothing(manager, changed):
    """The last of these is in the answer: it ends the block in which the window ends."""
    tokens = first_turn(manager) + document(2, 100)
    assert -(-PROMPT // BLOCK) * BLOCK == PROMPT, "the window's end is a block's"
    tokens[changed] += 1
    request = make_request("other", tokens)
    prefill(manager, request)
    assert bool(told(request)) is (changed >= PROMPT)


def test_salt_and_own_budgets_read_nothing_compressed(manager):
    begun = first_turn(manager) + document(2, 100)
    for name, changes in (
        ("salted", {"cache_salt": "other"}),
        ("own", {"budget": 0.2}),
        ("more", {"budget": 0.9}),
        ("full", {"budget": 1.0}),
    ):
        request = make_request(name, begun, **changes)
        prefill(manager, request)
        assert not told(request), name
        finish(manager, request)


def adapter(name, folder="/adapters/one"):
    return {"lora_request": LoRARequest(name, 1, folder)}


def image(identity, offset=0):
    place = PlaceholderRange(offset=offset, length=64)
    return {"mm_features": [MultiModalFeatureSpec(None, "image", identity, place)]}


EMBEDDINGS = torch.rand(2, 1000, 8)


ALIKE = {
    "adapter": (adapter("a"), adapter("b")),
    "folder of an adapter": (adapter("a"), adapter("a", "/adapters/two")),
    "no adapter": (adapter("a"), {}),
    "image": (image("cat"), image("dog")),
    "place of an image": (image("cat"), image("cat", 1)),
    "no image": (image("cat"), {}),
    "salt": ({"cache_salt": "a"}, {"cache_salt": "b"}),
    "no salt": ({"cache_salt": "a"}, {}),
    "embeddings": ({"prompt_embeds": EMBEDDINGS[0]}, {"prompt_embeds": EMBEDDINGS[1]}),
}
"""What may differ between two requests of equal tokens."""


@pytest.mark.parametrize("differing", ALIKE)
def test_equal_tokens_of_different_content_never_share(manager, differing):
    """In both directions, and each is found by its own like."""

    def make(name, tokens, content):
        if (embeddings := content.get("prompt_embeds")) is not None:
            content = {"prompt_embeds": embeddings[: len(tokens)]}
        return make_request(name, tokens, **content)

    for number, (one, other) in enumerate((ALIKE[differing], ALIKE[differing][::-1])):
        prompt = [token + 50_000 * number for token in document(0, PROMPT)]
        first = make(f"first {number}", prompt, one)
        assert prefill(manager, first) == 0
        decode(manager, first, 20)
        finish(manager, first)
        tokens = [*first.all_token_ids, *document(2, 100)]
        for name, content, hits in (("same", one, True), ("other", other, False)):
            request = make(f"{name} {number}", tokens, content)
            assert bool(prefill(manager, request)) is hits, name
            assert bool(told(request)) is hits, name
            finish(manager, request)


def test_a_reset_while_requests_run_forgets_everything(manager):
    """vLLM preempts them all; they are compressed and found again."""
    begun = first_turn(manager)
    running = make_request("running", begun + document(2, 100))
    prefill(manager, running)
    assert told(running)
    assert not manager.reset_prefix_cache()
    finish(manager, running, RequestStatus.PREEMPTED)
    assert manager.reset_prefix_cache()
    running.num_computed_tokens = 0
    assert prefill(manager, running) == 0
    assert not told(running)
    decode(manager, running, 20)
    finish(manager, running)
    later = make_request("later", [*running.all_token_ids, 5])
    assert prefill(manager, later) > PROMPT


def test_what_an_own_budget_compressed_is_not_published(manager):
    request = make_request("own", document(0, PROMPT), 0.3)
    prefill(manager, request)
    decode(manager, request, 20)
    finish(manager, request)
    assert counted(SEGMENTS_PUBLISHED) == 0


def test_nothing_is_published_before_the_worker_has_written_it(manager):
    """A request that is preempted in the step in which its segment is due writes no lease."""
    request = make_request("a", document(0, PROMPT))
    prefill(manager, request)
    request.append_output_token_ids([7] * 20)  # the key block is known, the lease not written
    manager.new_step_starts()
    assert manager.allocate_slots(request, 1)
    finish(manager, request, RequestStatus.PREEMPTED)
    assert counted(SEGMENTS_PUBLISHED) == 0
    again = make_request("b", list(request.all_token_ids) + document(2, 50))
    prefill(manager, again)
    assert not told(again)


def test_one_that_is_resumed_forgets_what_it_shared(manager):
    """The worker is not told anew of one that it has met before."""
    second = make_request("second", first_turn(manager) + document(2, 100))
    prefill(manager, second)
    assert told(second)
    finish(manager, second, RequestStatus.PREEMPTED)
    second.num_computed_tokens = 0
    prefill(manager, second)
    assert not told(second)


def test_one_that_is_resumed_is_compressed_again(manager):
    """Though its own prompt is cached at full size by then, beyond its first lease's begin."""
    begun = first_turn(manager) + document(2, 100)
    second = make_request("second", begun)
    prefill(manager, second)
    finish(manager, second, RequestStatus.PREEMPTED)
    longer = make_request("longer", [*begun, *document(2, 300)], cache_salt=None)
    manager.reset_prefix_cache()
    prefill(manager, longer)
    second.num_computed_tokens = 0
    assert prefill(manager, second) > 0
    plan = manager.coordinator.single_type_managers[0].plan_of(second)
    assert isinstance(plan, RequestPlan)
    assert not plan.shared


def test_an_evicted_lease_is_not_found(manager):
    begun = first_turn(manager)
    pool = manager.block_pool
    taken = pool.get_new_blocks(pool.get_num_free_blocks() - 2)
    pool.free_blocks(taken)
    request = make_request("second", begun + document(2, 100))
    prefill(manager, request)
    assert not told(request)
    finish(manager, request)
    assert counted(SEGMENTS_EVICTED) == 1


def test_a_lease_that_lost_a_block_is_not_filled_up_with_anothers(manager):
    """Two computations of the same tokens need not give the same bytes."""
    begun = first_turn(manager)
    single, pool = manager.coordinator.single_type_managers[0], manager.block_pool
    lost = single._shared.find(make_request("q", [*begun, 1]).block_hashes, len(begun))[-1]
    pool.evict_blocks({lost.block_id})
    again = make_request("again", document(0, PROMPT))
    prefill(manager, again)
    decode(manager, again, 20)
    plan = single.plan_of(again)
    own = single.req_to_blocks["again"][slice(*plan.prompt_segments[0].lease)]
    found = single._shared.find(make_request("p", [*begun, 1]).block_hashes, len(begun))
    assert [block for block in found if not block.is_null] == own
    assert lost not in own


def test_what_is_computed_behind_leases_of_others_is_not_hashed(manager):
    second = make_request("second", first_turn(manager) + document(2, 200))
    prefill(manager, second)
    single = manager.coordinator.single_type_managers[0]
    tail = single.req_to_blocks["second"][told(second)[-1].end_block :]
    assert [block.block_hash for block in tail] == [None] * len(tail)


def test_a_session_is_told_again_when_it_brings_parameters_anew(manager):
    begun = first_turn(manager)
    session = make_request("session", begun + document(2, 100), resumable=True)
    prefill(manager, session)
    assert told(session)
    session.sampling_params = SamplingParams(max_tokens=50)
    manager.new_step_starts()
    session.append_output_token_ids(7)
    assert manager.allocate_slots(session, 1)
    assert told(session)
    assert session.sampling_params.extra_args[REQUEST_BUDGET] == 1.0


def test_many_paths_are_swept():
    """More than the cache has blocks for, in one chain longer than Python's stack is deep."""
    pool = BlockPool(64, enable_caching=True, hash_block_size=BLOCK)
    shared = SharedPrefixes(pool, 0, BLOCK)
    terms = replace(spec_for(ROLLING).policy.terms(0.3), window=BLOCK)
    hashes = [BlockHash(str(number).encode()) for number in range(9000)]
    path = shared._root
    for number, segment in zip(range(1200), RequestPlan(1, terms).segments(), strict=False):
        blocks = pool.get_new_blocks(segment.num_lease_blocks)
        path = shared.publish(path, segment, hashes, [None] * segment.first_lease_block + blocks)
        pool.free_blocks(blocks)
        assert shared._paths <= 64 + number
    shared._sweep()
    assert path.seen_cached
    kept = shared._paths
    pool.reset_prefix_cache()
    shared._sweep()
    assert (shared._paths, shared._root.following) == (0, {})
    assert path.forgotten
    assert kept > 0
    assert shared.evicted == 1200


def test_a_reset_forgets_everything(manager):
    begun = first_turn(manager)
    assert manager.reset_prefix_cache()
    request = make_request("second", begun + document(2, 100))
    assert prefill(manager, request) == 0


def test_a_lease_in_use_is_freed_with_its_last_reader(manager):
    begun = first_turn(manager)
    readers = [make_request(f"r{i}", begun + document(2, 40 + i)) for i in range(3)]
    for reader in readers:
        prefill(manager, reader)
    single = manager.coordinator.single_type_managers[0]
    (segment,) = told(readers[0])
    lease = single.req_to_blocks["r0"][slice(*segment.lease)]
    for left in (3, 2, 1):
        assert [block.ref_cnt for block in lease] == [left] * len(lease)
        finish(manager, readers[left - 1])
    assert [block.ref_cnt for block in lease] == [0] * len(lease)
    assert manager.block_pool.get_num_free_blocks() == BLOCKS - 1


def test_rolling_documents_are_shared_between_questions():
    manager = make_manager(config=ROLLING)
    asked = make_request("a", document(0, 310) + document(2, 40), config=ROLLING)
    prefill(manager, asked)
    decode(manager, asked, 20)
    finish(manager, asked)
    other = make_request("b", document(0, 310) + [5] * 60, config=ROLLING)
    hit = prefill(manager, other)
    assert [one.end_block for one in told(other)] == [6, 12, 18]
    assert hit == 18 * BLOCK


def test_leases_outlive_the_full_size_blocks_of_rolling_documents():
    """The cache holds three documents at full size, and the leases of six."""
    manager = make_manager(config=ROLLING)
    documents = [[10_000 * i + n for n in range(310)] for i in range(6)]
    for number, tokens in enumerate(documents):
        request = make_request(f"a{number}", tokens, config=ROLLING)
        prefill(manager, request)
        decode(manager, request, 3)
        finish(manager, request)
    for number, tokens in enumerate(documents):
        request = make_request(f"b{number}", [*tokens, 5, 6, 7], config=ROLLING)
        assert prefill(manager, request) >= 12 * BLOCK
        finish(manager, request)


def test_segments_are_read_off_the_table():
    class Block:
        def __init__(self, null):
            self.is_null = null

    def table(pattern):
        return [Block(letter == ".") for letter in pattern]

    assert shared_segments(table("")) == ()
    assert shared_segments(table("xxx")) == ()
    assert shared_segments(table("...xx.x")) == (SharedSegment(0, 3, 5), SharedSegment(5, 6, 7))
