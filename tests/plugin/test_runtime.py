"""Steps of the worker without vLLM's runner: what is captured, compressed, padded and copied."""

import random
from itertools import islice
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.core.sched.output import SchedulerOutput

from mdkv_vllm.config import MixedDimConfig
from mdkv_vllm.core.compress import Compressor
from mdkv_vllm.core.formats import PageGeometry
from mdkv_vllm.core.losses import LOSSES
from mdkv_vllm.core.plan import SLACK_TOKENS
from mdkv_vllm.core.segment import SharedSegment
from mdkv_vllm.kernels.cpu.decode import CpuDecode
from mdkv_vllm.kernels.interface import DecodeConfig, ReadConfig
from mdkv_vllm.kernels.registry import compression_kernels
from mdkv_vllm.plugin.kv_cache import load_tokens
from mdkv_vllm.plugin.metrics.configuration import configuration
from mdkv_vllm.plugin.metrics.recorder import Recorder
from mdkv_vllm.plugin.metrics.table import COMPRESSED_TOKENS, LEASE_BYTES
from mdkv_vllm.plugin.metrics.worker import WorkerMetrics
from mdkv_vllm.plugin.prefill.choose import choose_prefill
from mdkv_vllm.plugin.prefill.sdpa import SdpaPrefill
from mdkv_vllm.plugin.rows import RunnerV1Order, RunnerV2Order
from mdkv_vllm.plugin.worker_runtime.compression_runner import CompressionRunner
from mdkv_vllm.plugin.worker_runtime.metadata import StepLimits
from mdkv_vllm.plugin.worker_runtime.reports import Stopwatch
from mdkv_vllm.plugin.worker_runtime.request_table import HeldRequest
from mdkv_vllm.plugin.worker_runtime.runtime import Runtime
from mdkv_vllm.policy import Policy
from mdkv_vllm.request import CompressionRequest

LAYERS, HEADS, GROUP, SIZE, BLOCK, BLOCKS = 2, 2, 3, 64, 16, 96
PROMPT, ANSWER, LEASES, DRAFTS = 300, 160, 6, 4
REQUEST = CompressionRequest("a", PROMPT)


class RefusedKernel:
    """Stands where a kernel would read numbers; looks at shapes alone."""

    def attend(self, query, layer, batch, output, lse=None, recent=None):
        assert recent is None or (recent.shape == query.shape and recent.is_contiguous())
        assert output.shape == query.shape
        assert len(query) == len(batch.query_rows) == len(batch.lengths)
        assert batch.leases.shape[1:] == (6, 2)
        assert batch.block_table.shape[0] >= batch.leases.shape[0]


class NoPrefill(SdpaPrefill):
    """Of prompts without leases, on a device whose numbers nobody can read."""

    fewest_tokens = PROMPT


class Worker:
    """A runtime over random cached tokens, and what vLLM would do around it."""

    def __init__(self, graph_tokens=0, device="cpu", kernel=None, window=16, **settings):
        torch.manual_seed(1)
        config = MixedDimConfig(budget=0.4, heads="even", window=window, **settings)
        geometry = PageGeometry(BLOCK, SIZE, torch.float32)
        policy = Policy(config, geometry, LAYERS, HEADS, head_scores=True)
        self.kv_cache = torch.randn(BLOCKS, LAYERS * HEADS, BLOCK, 2 * SIZE).to(device)
        self.queries = torch.randn(LAYERS, PROMPT + ANSWER, HEADS * GROUP, SIZE)
        decode_config = DecodeConfig(
            self.kv_cache, policy.layout, GROUP, None, SIZE**-0.5, 8, LEASES
        )
        reader = ReadConfig(self.kv_cache, policy.layout, None)
        compressor = Compressor(
            policy.layout,
            LOSSES[config.loss],
            SIZE**-0.5,
            None,
            None,
            compression_kernels("auto", torch.device("cpu")),
        )
        self.batch_ids: list[str] = []
        self.computed: dict[str, int] = {}
        self.runtime = Runtime(
            policy,
            compressor,
            kernel or CpuDecode(decode_config),
            choose_prefill("sdpa", reader, torch.float32)[1] if device == "cpu" else NoPrefill(),
            self.kv_cache,
            HEADS * GROUP,
            torch.float32,
            StepLimits(512, 8, LEASES, graph_tokens, DRAFTS + 1),
            SimpleNamespace(request_ids=lambda batch: self.batch_ids),
        )
        self.device = torch.device(device)
        # Persistent, as vLLM's own are.
        self.table = torch.randperm(BLOCKS)[: 8 * 10].int().view(8, 10).repeat(1, 3).to(device)

    def step(self, finished=frozenset(), preempted=frozenset(), new=()):
        """A step that goes on with all requests that are left, and of them accepts every draft."""
        gone = finished | preempted
        self.computed = {i: tokens for i, tokens in self.computed.items() if i not in gone}
        return self.runtime.step(set(finished), set(preempted), new, self.computed)

    def batch(self, ids, counts, lengths, padded_to=None):
        """vLLM's metadata of a step; rows beyond the requests pad a graph's batch."""
        self.batch_ids = ids
        self.computed |= zip(ids, lengths, strict=True)
        rows = padded_to or len(ids)
        spare = rows - len(ids)
        starts = torch.tensor([0, *counts]).cumsum(0).int()
        starts = torch.cat((starts, starts[-1:].expand(spare)))
        total = padded_to or int(starts[-1])
        return CommonAttentionMetadata(
            query_start_loc=starts.to(self.device),
            query_start_loc_cpu=starts,
            seq_lens=torch.tensor([*lengths, *[0] * spare]).int().to(self.device),
            num_reqs=rows,
            num_actual_tokens=total,
            max_query_len=max(counts, default=1),
            max_seq_len=max(lengths, default=1),
            block_table_tensor=self.table[:rows],
            slot_mapping=torch.zeros(total, dtype=torch.int64, device=self.device),
            seq_lens_cpu_upper_bound=torch.tensor([*lengths, *[0] * spare]).int(),
        )

    def forward(self, metadata, query):
        """Every layer in turn, as the backend does it; the outputs."""
        outputs = []
        for layer in range(LAYERS):
            output = torch.full_like(query[layer], torch.nan)
            view = self.kv_cache[:, layer * HEADS : (layer + 1) * HEADS]
            self.runtime.attend(view, query[layer], None, None, metadata, SIZE**-0.5, output)
            outputs.append(output)
        return outputs

    def prefill(self, chunks, beside=()):
        """The prompt in chunks of those many tokens; then a step that compresses it."""
        done, new = 0, [REQUEST, *(CompressionRequest(i, 40) for i in beside)]
        for count in chunks:
            ids = [*beside, "a"]
            counts = [*[1] * len(beside), count]
            lengths = [*[50] * len(beside), done + count]
            with self.step(new=new):
                metadata = self.runtime.begin_step(self.batch(ids, counts, lengths))
                mine = self.queries[:, done : done + count]
                others = torch.randn(LAYERS, len(beside), *mine.shape[2:])
                self.forward(metadata, torch.cat((others, mine), 1))
            done, new = done + count, []
        with self.step():
            pass
        return self

    def lease(self):
        """Bytes of the prompt's lease."""
        (segment,) = self.runtime.policy.plan(PROMPT).prompt_segments
        row = self.batch_ids.index("a")
        blocks = self.table[row, slice(*segment.lease)].long()
        return self.kv_cache[blocks].view(torch.uint8)


@pytest.fixture(scope="module")
def whole():
    return Worker().prefill([PROMPT])


@pytest.mark.parametrize("graph_tokens", [0, 8])
@pytest.mark.parametrize("chunks", [[290, 10], [299, 1], [280, 8, 1, 1, 10], [284, 1, 15]])
def test_any_chunks_give_the_same_lease(whole, chunks, graph_tokens):
    """Also where a window query comes in a step that a CUDA graph may replay."""
    worker = Worker(graph_tokens).prefill(chunks)
    assert worker.runtime.totals.prompts == 1
    assert torch.equal(worker.lease(), whole.lease())


def answer(graph_tokens, chunks, tokens=150):
    """A worker that compresses an answer in segments of 64 tokens, after so many of them."""
    worker = Worker(graph_tokens, segment_tokens=64)
    worker.table = torch.randperm(BLOCKS)[:30].int().repeat(8, 1)
    worker.prefill(chunks)
    for length in range(PROMPT + 1, PROMPT + tokens + 1):
        with worker.step():
            metadata = worker.runtime.begin_step(worker.batch(["a"], [1], [length]))
            worker.forward(metadata, worker.queries[:, length - 1 : length])
    return worker


@pytest.mark.parametrize("graph_tokens", [0, 8])
def test_answers_are_compressed_where_they_lie(graph_tokens):
    """Each segment as by itself, whatever was compressed before it."""
    whole, worker = Worker(segment_tokens=64), answer(graph_tokens, [PROMPT])
    segments = list(islice(worker.runtime.policy.plan(PROMPT).segments(), 3))
    assert [segment.part for segment in segments] == ["prompt", "answer", "answer"]
    compressor = worker.runtime._runner._compressor
    for segment in segments:
        row = worker.table[0].long()
        blocks = row[segment.first_block : segment.loaded_end]
        load = [
            load_tokens(
                whole.kv_cache[:, layer * HEADS : (layer + 1) * HEADS],
                blocks,
                segment.loaded_tokens,
                torch.float32,
            )
            for layer in range(LAYERS)
        ]
        window = whole.queries[:, segment.window_start : segment.ripe_at].transpose(1, 2)
        expected = compressor.compress(load.__getitem__, window.contiguous(), segment).pages
        lease = worker.kv_cache[row[slice(*segment.lease)]].view(torch.uint8)
        assert torch.equal(lease.flatten(), expected.flatten())
    totals = worker.runtime.status()["totals"]
    assert (totals["prompts"], totals["segments"]) == (1, 3)


class Drafting(Worker):
    """A worker whose steps of one request write what vLLM would, that of rejected drafts too."""

    def __init__(self, graph_tokens):
        super().__init__(graph_tokens, segment_tokens=64)
        self.table = torch.randperm(BLOCKS)[:30].int().repeat(8, 1)
        self.truth = self.kv_cache.clone()
        self.kv_cache[self.table[0, -(-PROMPT // BLOCK) :].long()] = torch.nan
        self.outputs, self.leases_seen = {}, {}

    def decode(self, accepted, rejected=0):
        """One token, drafts that are accepted, and drafts that are not; each query's outputs."""
        begin, count = self.computed["a"], 1 + accepted + rejected
        end, kept = begin + count, begin + 1 + accepted
        query = self.queries[:, begin:end].clone()
        query[:, 1 + accepted :] = torch.randn(query[:, 1 + accepted :].shape)
        with self.step():
            self._store(begin, end)
            self.kv_cache[*self._slots(kept, end)] = torch.randn(rejected, LAYERS * HEADS, 2 * SIZE)
            metadata = self.runtime.begin_step(self.batch(["a"], [count], [end]))
            assert metadata.prefill is None
            outputs = torch.stack(self.forward(metadata, query), 1)
        for token in range(begin, kept):
            self.outputs[token] = outputs[token - begin]
            self.leases_seen[token] = len(self.runtime._table["a"].leases)
        self.computed["a"] = kept

    def _slots(self, begin, end):
        positions = torch.arange(begin, end)
        return self.table[0, positions // BLOCK].long(), slice(None), positions % BLOCK

    def _store(self, begin, end):
        where = self._slots(begin, end)
        self.kv_cache[*where] = self.truth[*where]


@pytest.mark.parametrize("graph_tokens", [0, 8])
def test_drafts_change_nothing(graph_tokens):
    """The same leases, byte for byte, and outputs; also where windows hold rejected drafts."""
    alone, drafting = Drafting(0).prefill([PROMPT]), Drafting(graph_tokens).prefill([PROMPT])
    segments = list(islice(alone.runtime.policy.plan(PROMPT).segments(), 3))
    ends = {segment.ripe_at for segment in segments[1:]}
    choose = random.Random(graph_tokens)
    while alone.computed["a"] < PROMPT + ANSWER - 10:
        alone.decode(0)
    while drafting.computed["a"] < PROMPT + ANSWER - 10:
        accepted, rejected = choose.choice([(0, 0), (0, DRAFTS), (1, 3), (2, 0), (4, 0)])
        done = drafting.computed["a"] + 1
        if end := ends & set(range(done + 1, done + DRAFTS + 1)):
            # A segment would ripen by drafts alone.
            ends -= end
            accepted, rejected = 0, DRAFTS
        drafting.decode(accepted, rejected)
    assert not ends
    for segment in segments:
        lease = alone.table[0, slice(*segment.lease)].long()
        mine, expected = (w.kv_cache.view(torch.uint8)[lease] for w in (drafting, alone))
        assert torch.equal(mine, expected)
    compared = [
        token
        for token in drafting.outputs.keys() & alone.outputs.keys()
        if drafting.leases_seen[token] == alone.leases_seen[token]
    ]
    assert len(compared) > ANSWER / 2
    for token in compared:
        torch.testing.assert_close(
            drafting.outputs[token], alone.outputs[token], atol=1e-4, rtol=1e-3
        )


class CountedParts:
    """Stands for a compressor of 30 layers, one at a time, and for each of its compressions."""

    parts = 30

    def __init__(self, done=None):
        self.done, self.parts_left = done, self.parts

    def start(self, *_):
        return CountedParts(self.done)

    def advance(self):
        self.parts_left -= 1
        self.done.append(self)

    def result(self):
        return None


@pytest.mark.parametrize("step_tokens", [1, 5])
def test_segments_that_ripen_together_are_spread_over_steps_and_none_is_late(step_tokens):
    """Forty answers in lock step: the scheduler counts with SLACK_TOKENS tokens."""
    policy = Worker(segment_tokens=64).runtime.policy
    segment = next(policy.plan(1).segments())
    parts, finished = [], []
    runner = CompressionRunner(policy, CountedParts(parts), torch.zeros(1), step_tokens)
    runner._tokens = lambda *_: None
    runner._finish = lambda ripe, _: finished.append(ripe.held.computed_tokens)
    requests = [HeldRequest(CompressionRequest(str(i), 1), policy.plan(1)) for i in range(40)]
    for request in requests:
        request.computed_tokens = segment.ripe_at
        request.windows[segment] = None
        request.blocks = torch.zeros(segment.loaded_end)
        runner.add(request, segment)
    most = 0
    while len(finished) < 39:
        before = len(parts)
        runner.run({"3"} if before == 0 else set())
        most = max(most, len(parts) - before)
        for request in requests:
            request.computed_tokens += step_tokens
    assert most == -(-39 * 30 // (-(-SLACK_TOKENS // step_tokens) + 1))
    assert max(finished) - segment.due_at < step_tokens
    assert len(parts) == 39 * 30


def test_a_preempted_request_begins_again():
    worker = answer(0, [PROMPT])
    held = worker.runtime._table["a"]
    leases = list(held.leases)
    assert len(leases) == 3
    with worker.step(preempted={"a"}):
        metadata = worker.runtime.begin_step(worker.batch(["a"], [400], [400]))
        assert metadata.decode is None
    with worker.step():
        held = worker.runtime._table["a"]
        assert held.leases == leases[:2]  # all that is ripe, for its tokens came at once


def test_the_workers_steps_end_prompts_in_inference_mode():
    """vLLM's steps run in it; what they make can be written to nowhere else."""
    from mdkv_vllm.plugin.worker import MixedDimWorker

    inside = []

    class Base:
        def execute_model(self, scheduler_output):
            inside.append(torch.is_inference_mode_enabled())

    class Tested(MixedDimWorker, Base):
        pass

    tested, worker = Tested(), Worker(graph_tokens=8)
    entered = worker.runtime.step

    def step(*arguments):
        inside.append(torch.is_inference_mode_enabled())
        return entered(*arguments)

    worker.runtime.step = step
    tested._runtime = worker.runtime
    tested.execute_model(SchedulerOutput.make_empty())
    assert inside == [True, True]


def test_batch_mates_change_nothing(whole):
    worker = Worker(8).prefill([299, 1], beside=("b", "c"))
    # The mates take the first rows of the table, so the prompt has other blocks with other tokens.
    assert not torch.equal(worker.lease(), whole.lease())
    alone = Worker(8)
    alone.table[0] = alone.table[2].clone()
    assert torch.equal(worker.lease(), alone.prefill([300]).lease())


def test_a_step_that_graphs_may_replay_keeps_its_queries():
    worker = Worker(graph_tokens=8)
    with worker.step(new=[REQUEST]):
        assert worker.runtime.begin_step(worker.batch(["a"], [299], [299])).recent == 0
    with worker.step():
        metadata = worker.runtime.begin_step(worker.batch(["a"], [1], [300]))
    assert metadata.recent == 1
    assert not metadata.captures


def test_a_step_that_vllm_makes_up_spares_the_window(whole):
    """An engine of several, idle for a step, replays a graph while the others run theirs."""
    worker = Worker(graph_tokens=8)
    with worker.step(new=[REQUEST]):
        metadata = worker.runtime.begin_step(worker.batch(["a"], [PROMPT - 1], [PROMPT - 1]))
        worker.forward(metadata, worker.queries[:, : PROMPT - 1])
    with worker.step():
        metadata = worker.runtime.begin_step(worker.batch(["a"], [1], [PROMPT]))
        worker.forward(metadata, worker.queries[:, PROMPT - 1 : PROMPT])
    made_up = worker.runtime.begin_step(worker.batch([], [], [], padded_to=1))
    assert made_up.recent == 1
    worker.forward(made_up, torch.randn(LAYERS, 1, HEADS * GROUP, SIZE))
    with worker.step():
        pass
    worker.batch_ids = ["a"]
    assert torch.equal(worker.lease(), whole.lease())


def test_padding_sees_nothing_and_addresses_stay():
    """A captured batch of 4 rows, then one of 2 requests in the same buffers."""
    worker = Worker(graph_tokens=8)
    captured = worker.runtime.begin_step(worker.batch([], [], [], padded_to=4)).decode.batch
    assert captured.lengths.tolist() == [0] * 4
    new = [CompressionRequest("b", 40), CompressionRequest("c", 40)]
    with worker.step(new=new):
        metadata = worker.runtime.begin_step(
            worker.batch(["b", "c"], [1, 1], [41, 55], padded_to=4)
        )
        outputs = worker.forward(metadata, torch.randn(LAYERS, 4, HEADS * GROUP, SIZE))
    decode = metadata.decode.batch
    assert decode.lengths.tolist() == [41, 55, 0, 0]
    assert captured.lengths.tolist() == [41, 55, 0, 0]
    for name in ("query_rows", "lengths", "leases", "block_table"):
        assert getattr(captured, name).data_ptr() == getattr(decode, name).data_ptr(), name
    for output in outputs:
        assert output[:2].isfinite().all()
        assert (output[2:] == 0).all()


def test_graphs_hold_drafts():
    """Two requests of three tokens each, padded to four; then one whose drafts are fewer."""
    worker = Worker(graph_tokens=12)
    new = [CompressionRequest("b", 40), CompressionRequest("c", 40)]
    with worker.step(new=new):
        batch = worker.batch(["b", "c"], [3, 3], [43, 57])
        batch.num_reqs, batch.num_actual_tokens = 4, 12
        batch.query_start_loc_cpu = torch.tensor([0, 3, 6, 6, 6]).int()
        batch.seq_lens_cpu_upper_bound = torch.tensor([43, 57, 0, 0]).int()
        batch.block_table_tensor = worker.table[:4]
        metadata = worker.runtime.begin_step(batch)
        outputs = worker.forward(metadata, torch.randn(LAYERS, 12, HEADS * GROUP, SIZE))
    assert metadata.recent == 12
    assert metadata.decode.batch.lengths.tolist() == [41, 42, 43, 55, 56, 57, *[0] * 6]
    assert metadata.decode.batch.query_rows.tolist() == [0, 0, 0, 1, 1, 1, *[0] * 6]
    for output in outputs:
        assert output[:6].isfinite().all()
        assert (output[6:] == 0).all()
    with worker.step():
        metadata = worker.runtime.begin_step(worker.batch(["b", "c"], [2, 1], [45, 58]))
    assert metadata.recent == 3
    assert metadata.decode.batch.lengths.tolist() == [44, 45, 58]


def test_rehearsals_touch_no_prompt():
    """vLLM runs batches of its own, with rows that look like requests, between two steps."""
    worker = Worker(graph_tokens=8)
    with worker.step(new=[REQUEST]):
        worker.runtime.begin_step(worker.batch(["a"], [290], [290]))
    metadata = worker.runtime.begin_step(worker.batch(["a"], [10], [300]))
    worker.computed["a"] = 290
    assert not metadata.captures
    assert metadata.prefill is None
    with worker.step():
        pass
    assert worker.runtime.totals.prompts == 0


@pytest.mark.parametrize(("finished", "preempted"), [({"a"}, set()), (set(), {"a"})])
def test_who_is_gone_is_not_compressed(finished, preempted):
    worker = Worker()
    before = worker.kv_cache.clone()
    with worker.step(new=[REQUEST]):
        metadata = worker.runtime.begin_step(worker.batch(["a"], [PROMPT], [PROMPT]))
        worker.forward(metadata, worker.queries[:, :PROMPT])
    with worker.step(finished, preempted):
        pass
    assert torch.equal(worker.kv_cache, before)


def test_nothing_on_the_device_is_read():
    """On torch's meta device there are no numbers: whoever reads one fails."""
    worker = Worker(graph_tokens=8, device="meta", kernel=RefusedKernel())
    with pytest.raises(RuntimeError, match="meta"):
        worker.table[0, 0].item()
    new = [REQUEST, CompressionRequest("b", 290), CompressionRequest("c", 40)]
    query = torch.randn(LAYERS, PROMPT + 8, HEADS * GROUP, SIZE, device="meta")
    with worker.step(new=new):
        batch = worker.batch(["c", "b", "a"], [1, 1, 299], [60, 280, 299])
        worker.forward(worker.runtime.begin_step(batch), query)
    with worker.step():
        batch = worker.batch(["c", "b"], [1, 1], [61, 281], padded_to=4)
        metadata = worker.runtime.begin_step(batch)
        assert metadata.recent == 4
        worker.forward(metadata, query[:, :4])
    with worker.step(preempted={"b"}):
        # A decode, a chunk, and another decode: their tokens do not lie side by side.
        batch = worker.batch(["c", "a", "c"], [1, 6, 1], [61, 8, 61])
        worker.forward(worker.runtime.begin_step(batch), query[:, :8])


def test_warm_up_runs_every_kernel_and_leaves_the_cache_alone():
    worker = Worker(graph_tokens=4)
    before = worker.kv_cache.clone()
    seen = []
    attend, compress = worker.runtime._decode.attend, Compressor.compress
    worker.runtime._decode.attend = lambda *args, recent=None: (
        seen.append((len(args[0]), recent is not None)),
        attend(*args, recent=recent),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Compressor, "compress", lambda *args: (seen.append(args[3]), compress(*args)))
        worker.runtime.warm_up(PROMPT)
    # Up to the largest graph, with the queries kept as well.
    decodes = [(1, False), (1, True), (2, False), (2, True), (4, False), (4, True), (8, False)]
    assert seen == [*decodes, *worker.runtime.policy.sample_segments(PROMPT)]
    assert torch.equal(worker.kv_cache, before)


def test_windows_of_all_segments_that_may_ripen_at_once():
    worker = Worker()
    one = LAYERS * HEADS * GROUP * 16 * SIZE * 4
    # Of every request's next segment, and 512 tokens hold two prompts of 256.
    assert worker.runtime.window_bytes == (8 + 2) * one


def test_orders_of_both_runners():
    batch = Worker().batch(["x"], [1], [5])
    v1 = RunnerV1Order(SimpleNamespace(input_batch=SimpleNamespace(req_ids=["b", "a"])))
    assert v1.request_ids(batch) == ["b", "a"]
    states = SimpleNamespace(index_to_req_id={7: "a", 2: "b"})
    v2 = RunnerV2Order(SimpleNamespace(req_states=states))
    batch.req_idx = torch.tensor([2, 7]).numpy()
    assert v2.request_ids(batch) == ["b", "a"]


def counted(worker):
    """Has the worker count from now on; where to look."""
    recorder = Recorder()
    policy = worker.runtime.policy
    labels = configuration(policy, "/nowhere")
    worker.runtime.start_counting(WorkerMetrics(policy, labels, HEADS, recorder))
    return recorder


def test_compressions_of_the_warm_up_are_not_counted():
    worker = Worker().prefill([PROMPT])
    recorder = counted(worker)
    assert worker.runtime.status()["totals"]["prompts"] == 0
    assert (
        recorder.value(LEASE_BYTES)
        == recorder.value(COMPRESSED_TOKENS, format="i4", part="prompt")
        == 0
    )


def test_a_lease_is_counted_while_its_request_lives():
    worker = Worker()
    recorder = counted(worker)
    worker.prefill([PROMPT])
    lease_blocks = worker.runtime.policy.plan(PROMPT).prompt_segments[0].num_lease_blocks
    block_bytes = LAYERS * HEADS * worker.runtime.policy.geometry.page_bytes
    assert recorder.value(LEASE_BYTES) == lease_blocks * block_bytes
    (request,) = worker.runtime.status()["requests"]
    assert request["prompt_tokens"] == PROMPT
    with worker.step(finished={"a"}):
        pass
    assert recorder.value(LEASE_BYTES) == 0
    assert worker.runtime.status()["requests"] == []


def test_numbers_that_come_after_a_preemption_count_no_lease(monkeypatch):
    worker = Worker()
    recorder = counted(worker)
    with monkeypatch.context() as slow:
        slow.setattr(Stopwatch, "finished", False)  # as a GPU that has not caught up
        worker.prefill([PROMPT])
        assert recorder.value(COMPRESSED_TOKENS, format="i4", part="prompt") == 0
        with worker.step(preempted={"a"}):
            pass
    assert worker.runtime.status()["totals"]["prompts"] == 1
    assert recorder.value(COMPRESSED_TOKENS, format="i4", part="prompt") > 0
    assert recorder.value(LEASE_BYTES) == 0


def test_leases_of_others_are_read():
    """Behind them a request begins, as if it had written them; not so after a preemption."""
    worker = Worker()
    worker.table = torch.randperm(BLOCKS)[:30].int().repeat(8, 1)
    worker.prefill([PROMPT])
    (segment,) = worker.runtime.policy.plan(PROMPT).prompt_segments
    end, upto = segment.end_token, PROMPT + 20
    with worker.step():
        batch = worker.batch(["a"], [20], [upto])
        own = worker.forward(worker.runtime.begin_step(batch), worker.queries[:, PROMPT:upto])
    shared = (SharedSegment(segment.first_block, *segment.lease),)
    other = CompressionRequest("b", PROMPT + 40, shared=shared)
    with worker.step(finished={"a"}, new=[other]):
        metadata = worker.runtime.begin_step(worker.batch(["b"], [upto - end], [upto]))
        read = worker.forward(metadata, worker.queries[:, end:upto])
    for mine, its in zip(read, own, strict=True):
        torch.testing.assert_close(mine[PROMPT - end :], its)
    assert worker.runtime.status()["requests"][0]["compressed_segments"] == 1
    with worker.step(preempted={"b"}):
        assert worker.runtime.status()["requests"][0]["compressed_segments"] == 0
