"""The lease manager against vLLM's real KVCacheManager and BlockPool.

A model of the worker's memory runs beside it: which tokens each block really holds. Whatever
is admitted, prefilled in chunks, decoded, preempted, aborted or shared, a prefix-cache hit
must find the tokens it stands for, and a lease must be its request's alone.
"""

import math
from dataclasses import replace
from itertools import islice, takewhile

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from prometheus_client.utils import floatToGoString

pytest.importorskip("vllm")

from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheTensor,
)
from vllm.v1.request import Request, RequestStatus

from mdkv_vllm.config import REQUEST_BUDGET, MixedDimConfig
from mdkv_vllm.core.plan import RequestPlan, SkipReason
from mdkv_vllm.core.segment import Segment
from mdkv_vllm.plugin.metrics.recorder import current_recorder
from mdkv_vllm.plugin.metrics.table import (
    BLOCKS_RETURNED,
    FULL_BYTES,
    KEPT_BYTES,
    PROMPT_BUDGET,
    PROMPTS_COMPRESSED,
    PROMPTS_SKIPPED,
    SEGMENTS_COMPRESSED,
)
from mdkv_vllm.plugin.shared_prefixes import shared_segments
from mdkv_vllm.plugin.spec import MixedDimSpec, register_specs
from mdkv_vllm.plugin.validation import Room, admit
from mdkv_vllm.plugin.windowed import WindowedSpec

BLOCK, LAYERS, BLOCKS, IN_FLIGHT = 16, 2, 64, 500
SIZES = {"block_size": BLOCK, "num_kv_heads": 2, "head_size": 64, "dtype": torch.bfloat16}
BLOCK_BYTES = LAYERS * 2 * BLOCK * 2 * 64 * 2
CONFIG = MixedDimConfig(budget=0.4, window=8, min_prompt_tokens=48, segment_tokens=128)
NO_SAVING = MixedDimConfig(formats=("full",), window=8, min_prompt_tokens=48)
ROLLING = MixedDimConfig(
    budget=0.3, window=8, min_prompt_tokens=48, segment_tokens=96, segments="rolling"
)
register_specs()
init_none_hash(sha256)


def spec_for(config=CONFIG):
    full = FullAttentionSpec(**SIZES)
    return MixedDimSpec.of(full, config, LAYERS, head_scores=True, in_flight_tokens=IN_FLIGHT)


def make_manager(caching=True, config=CONFIG, windows=()):
    ours = replace(spec_for(config), other_layers=bool(windows))
    specs = [ours, *(WindowedSpec(sliding_window=window, **SIZES) for window in windows)]
    page, tensors, groups = ours.page_size_bytes, [], []
    for number, spec in enumerate(specs):
        layers = [f"layer{LAYERS * number + i}" for i in range(LAYERS)]
        tensors.append(KVCacheTensor(page * LAYERS * BLOCKS, layers, page, page * LAYERS))
        groups.append(KVCacheGroupSpec(layers, spec))
    return KVCacheManager(
        KVCacheConfig(BLOCKS, tensors, groups, prefix_cache_retention_interval=0),
        max_model_len=4096,
        max_in_flight_tokens=IN_FLIGHT,
        scheduler_block_size=BLOCK,
        hash_block_size=BLOCK,
        enable_caching=caching,
    )


def make_request(name, prompt, budget=None, config=CONFIG, others=None, **changes):
    extra = (others or {}) | ({REQUEST_BUDGET: budget} if budget else {})
    params = SamplingParams(max_tokens=100, extra_args=extra or None)
    admit(params, config, Room(shares=config.shares_prefixes(head_scores=True)))
    hasher = get_request_block_hasher(BLOCK, sha256)
    return Request(name, prompt, params, None, block_hasher=hasher, **changes)


def document(which, length):
    """Documents 0 and 1 share their first 100 tokens; 2 shares none."""
    shared = list(range(1000, 1100)) if which < 2 else []
    return (shared + [which * 10_000 + i for i in range(length)])[:length]


class LeaseLife(RuleBasedStateMachine):
    """Random lives of requests on one block pool."""

    caching = True
    config = CONFIG
    admitted_by = CONFIG
    windows = ()

    def __init__(self):
        super().__init__()
        self.manager = make_manager(self.caching, self.config, self.windows)
        self.single, *self.beside = self.manager.coordinator.single_type_managers
        self.pool = self.manager.block_pool
        self.waiting, self.running = [], []
        self.memory: dict[int, object] = {}
        self.processed: dict[str, int] = {}
        self.counted: dict[str, int] = {}
        self.tables: dict[str, list[int]] = {}
        self.compressed: dict[str, int] = {}
        self.ripe: list[tuple[Request, Segment]] = []
        self.count = 0
        self.admitted: dict[str, Request] = {}
        self.hits = self.windowed_hits = 0

    @rule(
        which=st.integers(0, 2),
        length=st.integers(20, 400),
        budget=st.sampled_from([None, None, 0.2, 0.4, 0.7, 0.95, 1.0]),
    )
    def submit(self, which, length, budget):
        self.count += 1
        prompt = document(which, length)
        self.waiting.append(make_request(f"r{self.count}", prompt, budget, self.admitted_by))

    @precondition(lambda self: self.waiting)
    @rule(chunk=st.integers(1, IN_FLIGHT), early=st.integers(0, 3))
    def admit_first(self, chunk, early):
        request = self.waiting[0]
        self.manager.new_step_starts()
        hits, num_hit, _ = self.manager.get_computed_blocks(request)
        self._check_hits(request, hits.blocks[0])
        self._check_windows(request, hits.blocks[1:], num_hit)
        chunk = min(chunk, request.num_tokens - num_hit)
        if self.manager.allocate_slots(request, chunk, num_hit, hits) is None:
            return
        self.waiting.pop(0)
        request.status = RequestStatus.RUNNING
        request.num_computed_tokens = num_hit
        self.running.append(request)
        self.admitted[request.request_id] = request
        self.compressed[request.request_id] = 0
        self.tables[request.request_id] = []
        self._run(request, chunk, early)

    def _check_hits(self, request, blocks):
        """They hold the request's tokens, or leases that depend on nothing else."""
        tokens, before = tuple(request.all_token_ids), ()
        shared = shared_segments(blocks)
        self.hits += bool(shared)
        for segment in shared:
            bounds = (segment.first_block, *segment.lease)
            for block in blocks[slice(*segment.lease)]:
                kind, seen, *where = self.memory[block.block_id]
                assert kind == "lease"
                assert seen == tokens[: len(seen)]
                assert where == [bounds, before]
            before += (bounds,)
        if not shared:
            for index, block in enumerate(blocks):
                assert self.memory[block.block_id] == tokens[: (index + 1) * BLOCK]

    def _check_windows(self, request, groups, num_hit):
        """What other layers found ends where our hit ends, and holds all that they will see.

        None of it was computed behind a lease.
        """
        tokens = tuple(request.all_token_ids)
        for window, blocks in zip(self.windows, groups, strict=True):
            assert len(blocks) * BLOCK == num_hit
            for index, block in enumerate(blocks):
                if (index + 1) * BLOCK > num_hit - window + 1:
                    held = self.memory[block.block_id]
                    assert held == ("window", window, tokens[: (index + 1) * BLOCK], False)
            self.windowed_hits += bool(num_hit)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), chunk=st.integers(1, 300), early=st.integers(0, 3))
    def continue_one(self, data, chunk, early):
        self._step(data.draw(st.sampled_from(self.running)), chunk, early)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), steps=st.integers(2, 150), in_flight=st.booleans())
    def decode_one(self, data, steps, in_flight):
        """Many tokens, each scheduled before or after the one before it is known to be done."""
        request = data.draw(st.sampled_from(self.running))
        for _ in range(steps):
            if request in self.running:
                request.num_in_flight_tokens = int(in_flight)
                self._step(request, 1, early=0)
                request.num_in_flight_tokens = 0

    @precondition(lambda self: self.running)
    @rule(
        data=st.data(),
        drafts=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=5, max_size=60),
    )
    def draft_one(self, data, drafts):
        """Steps of one token and drafts behind it, of which some are accepted."""
        request = data.draw(st.sampled_from(self.running))
        for accepted, rejected in drafts:
            one_left = request.num_tokens - request.num_computed_tokens == 1
            if request in self.running and one_left:
                self._step(request, 1, 0, [7] * accepted + [8] * rejected)

    def _step(self, request, chunk, early, drafts=()):
        chunk = min(chunk, request.num_tokens - request.num_computed_tokens) + len(drafts)
        self.manager.new_step_starts()
        while self.manager.allocate_slots(request, chunk) is None:
            victim = self.running[-1]
            self._preempt(victim)
            if victim is request:
                self._compress_due()  # a step without tokens is a step too
                return
        self._run(request, chunk, early, drafts)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def preempt_one(self, data):
        self._preempt(data.draw(st.sampled_from(self.running)))

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def finish_one(self, data):
        request = data.draw(st.sampled_from(self.running))
        request.status = RequestStatus.FINISHED_STOPPED
        self._leave(request)

    def _leave(self, request):
        self.running.remove(request)
        self.ripe = [one for one in self.ripe if one[0] is not request]
        self.manager.free(request)

    def _preempt(self, request):
        request.status = RequestStatus.PREEMPTED
        self._leave(request)
        request.num_computed_tokens = 0
        self.waiting.insert(0, request)

    def _run(self, request, chunk, early, drafts=()):
        """What the worker does in a step: compress what is due and some of the rest, then write.

        Drafts of 7 are accepted, others not.
        """
        self._count(request)
        self._compress_due()
        for one in self.ripe[:early]:
            self._compress(one)
        before = request.num_computed_tokens
        self.processed[request.request_id] = before - request.num_in_flight_tokens
        after = before + chunk
        blocks = self.single.req_to_blocks[request.request_id]
        table = self.tables[request.request_id]
        table += [block.block_id for block in blocks[len(table) :]]
        tokens = (*request.all_token_ids, *drafts)
        behind = self._leases(request)[-1][1] if self._leases(request) else 0
        for index in range(before // BLOCK, -(-after // BLOCK)):
            block = blocks[index]
            assert not block.is_null
            assert index >= behind, "written into a lease"
            upto = min((index + 1) * BLOCK, after)
            self.memory[block.block_id] = tokens[:upto]
            for manager, window in zip(self.beside, self.windows, strict=True):
                block = manager.req_to_blocks[request.request_id][index]
                assert not block.is_null
                self.memory[block.block_id] = ("window", window, tokens[:upto], behind > 0)
        accepted = [token for token in drafts if token == 7]
        request.num_computed_tokens = after - len(drafts) + len(accepted)
        request.append_output_token_ids(accepted)
        if request.num_computed_tokens == request.num_tokens:
            request.append_output_token_ids(7)

    def _count(self, request):
        """The worker learns how much of the request is computed, and so what is ripe."""
        name, plan = request.request_id, self.single.plan_of(request)
        self.counted[name] = request.num_computed_tokens
        if isinstance(plan, RequestPlan):
            known = self.compressed[name] + sum(one[0] is request for one in self.ripe)
            ripe = plan.ripe(request.num_computed_tokens)[known:]
            self.ripe += [(request, segment) for segment in ripe]

    def _compress_due(self):
        due = [one for one in self.ripe if self.counted[one[0].request_id] >= one[1].due_at]
        for one in due:
            self._compress(one)

    def _compress(self, one):
        request, segment = one
        ids = self.tables[request.request_id]
        self.ripe.remove(one)
        self.compressed[request.request_id] += 1
        # Some of them, those of the window among them, may be freed by now, but not given away.
        for index in range(segment.first_block, segment.loaded_end):
            upto = min(segment.ripe_at, (index + 1) * BLOCK)
            held = self.memory[ids[index]][:upto]
            assert held == tuple(request.all_token_ids[:upto]), "overwritten before compression"
        for index in range(*segment.lease):
            block = self.pool.blocks[ids[index]]
            assert block.ref_cnt == 1, "a lease block is shared"
            assert block.block_hash is None, "a lease block is hashed"
            self.memory[block.block_id] = self._content(request, segment)

    def _content(self, request, segment):
        """What its lease depends on: tokens, where it lies, and the leases before it."""
        plan = self.single.plan_of(request)
        own = takewhile(lambda one: one.end_block < segment.end_block, plan.segments())
        before = tuple((one.first_block, *one.lease) for one in [*plan.shared, *own])
        tokens = tuple(request.all_token_ids[: segment.ripe_at])
        return "lease", tokens, (segment.first_block, *segment.lease), before

    def _leases(self, request):
        plan = self.single.plan_of(request)
        if not isinstance(plan, RequestPlan):
            return []
        own = islice(plan.segments(), self.compressed[request.request_id])
        return [segment.lease for segment in [*plan.shared, *own]]

    @invariant()
    def no_leak_and_no_double_use(self):
        held = {}
        for request in self.running:
            for manager in (self.single, *self.beside):
                for block in manager.req_to_blocks[request.request_id]:
                    if not block.is_null:
                        held.setdefault(block.block_id, []).append(request.request_id)
        assert self.pool.get_num_free_blocks() == BLOCKS - 1 - len(held)
        for block_id, owners in held.items():
            assert self.pool.blocks[block_id].ref_cnt == len(owners)

    @invariant()
    def due_segments_gave_their_blocks_back_and_no_others(self):
        for request in self.running:
            plan = self.single.plan_of(request)
            blocks = self.single.req_to_blocks[request.request_id]
            if isinstance(plan, SkipReason):
                assert not any(block.is_null for block in blocks)
                continue
            due = plan.due(self.processed[request.request_id])
            gone = [*plan.shared, *due]
            freed = {b for s in gone for b in range(s.first_block, s.first_lease_block)}
            assert freed == {index for index, block in enumerate(blocks) if block.is_null}
            written = self.compressed[request.request_id]
            for number, segment in enumerate(plan.ripe(request.num_computed_tokens)):
                for block in blocks[slice(*segment.lease)]:
                    if number >= written:
                        assert block.block_hash is None
                    else:
                        assert self.memory[block.block_id] == self._content(request, segment)

    @invariant()
    def nobody_holds_more_than_declared(self):
        policy = self.single.kv_cache_spec.policy
        for request in self.running:
            if (request.sampling_params.extra_args or {}).get(REQUEST_BUDGET) is None:
                blocks = self.single.req_to_blocks[request.request_id]
                most = policy.most_blocks(len(blocks) * BLOCK, IN_FLIGHT)
                assert sum(not block.is_null for block in blocks) <= most

    @invariant()
    def metrics_are_exact(self):
        recorder = current_recorder()
        blocks = [b for r in self.running for b in self.single.req_to_blocks[r.request_id]]
        assert recorder.value(FULL_BYTES) == len(blocks) * BLOCK_BYTES
        kept = sum(not block.is_null for block in blocks)
        assert recorder.value(KEPT_BYTES) == kept * BLOCK_BYTES
        skipped = sum(recorder.value(PROMPTS_SKIPPED, reason=r.value) for r in SkipReason)
        plans = [self.single.plan_of(request) for request in self.admitted.values()]
        assert skipped == sum(isinstance(plan, SkipReason) for plan in plans)
        bounds = (*PROMPT_BUDGET.buckets, math.inf)
        assert len(plans) == sum(
            recorder.value(PROMPT_BUDGET, "mixeddim:prompt_budget_bucket", le=floatToGoString(b))
            for b in bounds
        )
        prompts = recorder.value(SEGMENTS_COMPRESSED, part="prompt")
        segments = prompts + recorder.value(SEGMENTS_COMPRESSED, part="answer")
        assert recorder.value(PROMPTS_COMPRESSED) <= prompts
        assert segments <= recorder.value(BLOCKS_RETURNED)

    def teardown(self):
        for request in self.running:
            self.manager.free(request)
        assert current_recorder().value(FULL_BYTES) == 0
        assert current_recorder().value(KEPT_BYTES) == 0
        assert self.pool.get_num_free_blocks() == BLOCKS - 1


class LeaseLifeWithoutPrefixCache(LeaseLife):
    caching = False


class LeaseLifeRolling(LeaseLife):
    """Prompts are compressed while they are prefilled."""

    config = admitted_by = ROLLING


class LeaseLifeBesideWindows(LeaseLife):
    """Other layers have blocks of their own in the same pool, with two sizes of windows."""

    windows = (40, 64)


class LeaseLifeRollingBesideWindows(LeaseLife):
    config = admitted_by = ROLLING
    windows = (40,)


class LeaseLifeOptIn(LeaseLife):
    """Nothing is compressed but what asks for it."""

    config = admitted_by = MixedDimConfig(
        budget=1, window=8, min_prompt_tokens=48, segment_tokens=128
    )


class LeaseLifeByTokens(LeaseLife):
    """Short prompts have no lease by default."""

    config = admitted_by = MixedDimConfig(
        budget_tokens=150, window=8, min_prompt_tokens=48, segment_tokens=128
    )


class LeaseLifeAdmittedByAnother(LeaseLife):
    """Two engines in one process: requests are admitted by the newer one's settings."""

    admitted_by = MixedDimConfig(budget=0.9, window=8, min_prompt_tokens=48, segment_tokens=128)


TestLeaseLife = LeaseLife.TestCase
TestLeaseLife.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
TestLeaseLifeWithoutPrefixCache = LeaseLifeWithoutPrefixCache.TestCase
TestLeaseLifeRolling = LeaseLifeRolling.TestCase
TestLeaseLifeBesideWindows = LeaseLifeBesideWindows.TestCase
TestLeaseLifeRollingBesideWindows = LeaseLifeRollingBesideWindows.TestCase
TestLeaseLifeOptIn = LeaseLifeOptIn.TestCase
TestLeaseLifeByTokens = LeaseLifeByTokens.TestCase
TestLeaseLifeAdmittedByAnother = LeaseLifeAdmittedByAnother.TestCase
for case in (
    TestLeaseLifeWithoutPrefixCache,
    TestLeaseLifeRolling,
    TestLeaseLifeBesideWindows,
    TestLeaseLifeRollingBesideWindows,
    TestLeaseLifeOptIn,
    TestLeaseLifeByTokens,
    TestLeaseLifeAdmittedByAnother,
):
    case.settings = settings(max_examples=30, stateful_step_count=40, deadline=None)


def run_prompt(manager, request):
    hits, num_hit, _ = manager.get_computed_blocks(request)
    assert manager.allocate_slots(request, request.num_tokens - num_hit, num_hit, hits)
    request.num_computed_tokens = request.num_tokens
    return num_hit


def test_freed_blocks_keep_their_hash_and_the_lease_is_recomputed():
    manager = make_manager()
    first = make_request("a", document(0, 320))
    plan = spec_for().policy.plan(320)
    run_prompt(manager, first)
    manager.remove_skipped_blocks("a", 320, 320)
    assert manager.block_pool.get_num_free_blocks() == BLOCKS - 1 - (20 - plan.first_lease_block)
    assert (
        run_prompt(manager, make_request("b", document(0, 320))) == plan.first_lease_block * BLOCK
    )


def test_budget_above_the_default_reads_no_prefix_cache():
    config = replace(CONFIG, shared_prefixes="full")
    manager = make_manager(config=config)
    run_prompt(manager, make_request("a", document(0, 320), config=config))
    assert run_prompt(manager, make_request("b", document(0, 320), 0.9, config)) == 0
    assert run_prompt(manager, make_request("c", document(0, 320), 0.2, config)) > 0


def test_opting_in_never_writes_shared_blocks():
    config = MixedDimConfig(budget=1.0, window=8, min_prompt_tokens=48)
    manager = make_manager(config=config)
    run_prompt(manager, make_request("a", document(0, 320), config=config))
    # As if admitted by other settings: the manager itself must notice.
    late = make_request("b", document(0, 320), 0.3, replace(CONFIG, shared_prefixes="full"))
    assert run_prompt(manager, late) > 0
    assert manager.coordinator.single_type_managers[0].plan_of(late) is SkipReason.FULL_BUDGET
    assert late.sampling_params.extra_args == {REQUEST_BUDGET: 1.0}
    shared = SkipReason.SHARED_BLOCKS.value
    assert current_recorder().value(PROMPTS_SKIPPED, reason=shared) == 1
    assert run_prompt(manager, make_request("c", document(0, 320), 0.3, config)) == 0


def test_sessions_that_may_grow_are_left_alone():
    manager = make_manager()
    others = {"another_plugin": {"keeps": ["this"]}}
    session = make_request("a", document(0, 320), 0.3, others=others, resumable=True)
    run_prompt(manager, session)
    manager.remove_skipped_blocks("a", 320, 320)
    assert manager.block_pool.get_num_free_blocks() == BLOCKS - 1 - 20
    # What the worker plans by, beside what other plugins put there:
    assert session.sampling_params.extra_args == others | {REQUEST_BUDGET: 1.0}


def test_disabled_compression_is_stock_behaviour():
    manager = make_manager(config=MixedDimConfig(enabled=False))
    run_prompt(manager, make_request("a", document(0, 320)))
    manager.remove_skipped_blocks("a", 320, 320)
    assert manager.block_pool.get_num_free_blocks() == BLOCKS - 1 - 20


def test_a_resumed_request_hits_nothing_of_its_own_lease():
    """Its prompt and its answer are cached by a longer prompt that begins with both."""
    manager = make_manager()
    resumed = make_request("a", document(0, 320))
    run_prompt(manager, resumed)
    resumed.append_output_token_ids([7] * 60)
    manager.free(resumed)
    resumed.status, resumed.num_computed_tokens = RequestStatus.PREEMPTED, 0
    longer = make_request("b", document(0, 320) + [7] * 60 + document(2, 320))
    run_prompt(manager, longer)
    first_lease = spec_for().policy.plan(320).first_lease_block
    assert spec_for().policy.plan(700).first_lease_block > first_lease
    assert run_prompt(manager, resumed) == first_lease * BLOCK


@pytest.mark.parametrize(
    ("length", "budget", "config", "changes", "reason"),
    [
        (320, 1.0, CONFIG, {}, SkipReason.FULL_BUDGET),
        (320, None, NO_SAVING, {}, SkipReason.NO_SAVING),
        (40, None, NO_SAVING, {}, SkipReason.TOO_SHORT),
        (320, None, MixedDimConfig(enabled=False), {}, SkipReason.DISABLED),
        (320, None, CONFIG, {"resumable": True}, SkipReason.SESSION),
    ],
)
def test_a_skipped_prompt_is_counted_once_by_its_reason(length, budget, config, changes, reason):
    manager = make_manager(config=config)
    request = make_request("a", document(0, length), budget, config, **changes)
    run_prompt(manager, request)
    manager.free(request)
    request.status, request.num_computed_tokens = RequestStatus.PREEMPTED, 0
    run_prompt(manager, request)
    counts = {r: current_recorder().value(PROMPTS_SKIPPED, reason=r.value) for r in SkipReason}
    assert {r: count for r, count in counts.items() if count} == {reason: 1}


def test_what_a_compression_gives_back_is_counted():
    manager = make_manager()
    run_prompt(manager, make_request("a", document(0, 320)))
    for _ in range(2):
        manager.remove_skipped_blocks("a", 320, 320)
    returned = spec_for().policy.plan(320).first_lease_block
    assert current_recorder().value(PROMPTS_COMPRESSED) == 1
    assert current_recorder().value(BLOCKS_RETURNED) == returned
    assert current_recorder().value(KEPT_BYTES) == (20 - returned) * BLOCK_BYTES
    bucket = {"sample": "mixeddim:prompt_budget_bucket", "le": "0.5"}
    assert current_recorder().value(PROMPT_BUDGET, **bucket) == 1


def test_hits_agree_with_what_layers_with_windows_still_have():
    """By vLLM's default these keep a window only where the prompt could go on."""
    window, needed = 40, 3
    manager = make_manager(windows=(window,))
    first = make_request("a", document(0, 320))
    first_lease = spec_for().policy.plan(320).first_lease_block
    run_prompt(manager, first)
    for computed in range(320, 400):
        first.append_output_token_ids([7])
        assert manager.allocate_slots(first, 1)
        first.num_computed_tokens = computed + 1
    ours, beside = (one.req_to_blocks["a"] for one in manager.coordinator.single_type_managers)
    assert sum(not block.is_null for block in beside) <= 4
    assert all(block.block_hash is None for block in ours[first_lease:] + beside[first_lease:])
    second = make_request("b", document(0, 320))
    hits, num_hit, _ = manager.get_computed_blocks(second)
    assert num_hit == first_lease * BLOCK
    assert len(hits.blocks[0]) == len(hits.blocks[1]) == first_lease
    assert sum(not block.is_null for block in hits.blocks[1]) == needed
    # Nothing is found where others have taken a block of the window.
    manager.block_pool.evict_blocks({hits.blocks[1][-1].block_id})
    assert manager.get_computed_blocks(second)[1] == 0
