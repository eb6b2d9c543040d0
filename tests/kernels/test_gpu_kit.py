"""The GPU kit's parts that need no GPU: inputs, bytes, reference, report, and that checks fail."""

import json
import math
import os
import re
import subprocess
import sys
from dataclasses import asdict, replace

import interpreter
import pytest
import torch
from cuda_host import process as host

from mdkv_vllm.testing import leases

pytest.importorskip("triton")

import gpu_kit
from gpu_kit import (
    baselines,
    check,
    compress_check,
    compress_time,
    inputs,
    loads,
    ncu,
    record,
    reference,
    report,
    sanitize,
)
from gpu_kit import build as building

from mdkv_vllm.core import reference as specification
from mdkv_vllm.testing.leases import Model, Request, ragged

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
HEADS = loads.Heads("tiny", 2, 3, 64)
LOAD = loads.Load(HEADS, 2, 500)
HOLDINGS = [
    loads.FULL,
    loads.Holding("mixed", 0.5),
    loads.Holding("mixed", 0.125),
    loads.Holding("int", 0.5),
    loads.Holding("int", 0.25),
    loads.Holding("rank", 0.25),
    loads.Holding("mixed", 0.5, 160),
]


@pytest.fixture(scope="module")
def process():
    with interpreter.start() as running:
        yield running


def build(holding, load=LOAD, sets=2):
    return inputs.build(load, holding, sets, CPU, torch.Generator().manual_seed(3))


def by_name(holding):
    return holding.name


def read_both(module, made, index=0):
    """Attention of one set by one of the two references."""
    return module.mixed_decode(
        made.queries[index],
        made.kv_cache,
        0,
        made.layout,
        made.block_table,
        made.query_rows[index],
        made.lengths,
        made.leases,
        made.basis,
        0.125,
    )


@pytest.mark.parametrize("holding", HOLDINGS, ids=by_name)
def test_inputs_are_leases(holding):
    made = build(holding)
    for index in range(made.sets):
        expected, got = read_both(specification, made, index), read_both(reference, made, index)
        torch.testing.assert_close(got, expected)
        assert expected[0].isfinite().all()
    used = made.block_table[made.block_table >= 0]
    assert len(used) == len(used.unique())
    assert int(used.max()) < len(made.kv_cache)


@pytest.mark.parametrize("holding", HOLDINGS, ids=by_name)
def test_bytes_are_those_of_the_pages_listed(holding):
    made = build(holding)
    geometry, layout = made.layout.geometry, made.layout
    slot = 2 * geometry.head_size * geometry.dtype.itemsize
    listed = kept = 0
    tables, room = [], 0
    for row in made.query_rows[1].tolist():
        tail = 0
        for first, tail in specification.leases_of(made.leases, row):
            pages = specification.lease_pages(made.kv_cache, made.block_table[row, first:tail])
            tables.append(specification.read_page_table(pages, layout)[0])
            room += layout.list_pages(tail - first) * geometry.page_bytes
        listed += (int(made.lengths[0]) - tail * geometry.block_size) * slot * layout.num_kv_heads
    for table in tables:
        for lists in table.tolist():
            for fmt, (tokens, _) in zip(layout.formats.formats, lists, strict=True):
                kept += fmt.pages(tokens) * geometry.page_bytes
                listed += (
                    tokens
                    * slot
                    * fmt.bits
                    * fmt.rank
                    // (8 * geometry.dtype.itemsize * geometry.head_size)
                )
                listed += 4 * tokens if fmt.quantized else 0
    assert made.kv_bytes == listed
    assert made.kv_bytes < made.moved_bytes
    if holding.kind != "full":
        assert kept <= room
        if holding.kind != "rank":  # every token is held before the pages run out
            assert kept > 0.8 * room


@pytest.mark.parametrize("holding", loads.HOLDINGS, ids=by_name)
@pytest.mark.parametrize("heads", loads.MODELS, ids=lambda heads: heads.name)
def test_a_long_context_takes_its_budget(heads, holding):
    layout = loads.layout_of(heads, holding)
    if holding.kind == "full":
        return
    blocks = int(32768 * holding.budget) // 16
    shares = holding.shares(heads.kv_heads)
    tokens = inputs.list_tokens(layout, shares, blocks, 32768)
    per_token = torch.tensor([inputs.token_bytes(f) for f in layout.formats.formats])
    held = int((tokens * per_token).sum())
    assert 0.93 * holding.budget < held / (32768 * heads.token_bytes) <= holding.budget
    assert int(tokens.sum(1).max()) <= 32768


def test_poison_where_no_list_is():
    made = build(loads.Holding("mixed", 0.5))
    first, tail = made.leases[0, 0].tolist()
    pages = specification.lease_pages(made.kv_cache, made.block_table[0, first:tail])
    table = specification.read_page_table(pages, made.layout)[0]
    last_format = made.layout.formats.formats[-1]
    tokens, start = table[-1, -1].tolist()
    assert (pages[start + last_format.pages(tokens) :] == inputs.POISON).all()


@pytest.mark.parametrize("prompt_rank", [0, 24])
def test_reference_is_the_specification(prompt_rank):
    names = ("r8", "r24", "i4", "full") if prompt_rank else check.EVERY_FORMAT
    model = Model(names, prompt_basis_rank=prompt_rank, max_leases=1 if prompt_rank else 3)
    case = leases.Case(model, [*ragged(model), Request(6, 1, fill=0.0)])
    rows = torch.arange(len(case.totals), dtype=torch.int32)
    lengths = torch.tensor(case.totals, dtype=torch.int32)
    arguments = (case.kv_cache, 1, case.layout, case.block_table, rows, lengths, case.leases)
    query = case.randn(len(rows), 6, 64)
    expected = specification.mixed_decode(query, *arguments, case.calibrated, 0.125)
    got = reference.mixed_decode(query, *arguments, case.calibrated, 0.125)
    torch.testing.assert_close(got, expected)


SMALL = Model(check.EVERY_FORMAT, 64, 1, kv_heads=1, query_dtype=torch.bfloat16, max_leases=3)
MIX = [Request(6, 20), Request(0, 40), Request((8, 6, 7), 1, 0), Request(6, 3, fill=0.0)]


def test_check_passes(process):
    outcome = process.submit(gpu_kit.check_variant, SMALL, MIX, 5).result()
    assert outcome.failures == ()
    assert 0 < outcome.error < 8e-3


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("scaled", "relative error (4.9|5.[01])e-02"),
        ("unwritten", "relative error nan"),
        ("last token missed", "relative error"),
        ("cache written", "the cache was written to"),
        ("beside written", "something beside the output was written to"),
        ("padding written", "padding did not give zeros"),
        ("lse off", "lse off by 5"),
    ],
)
def test_check_finds(process, fault, told):
    outcome = process.submit(gpu_kit.check_variant, SMALL, MIX, 5, fault).result()
    assert re.search(told, outcome.failures[0])


def test_check_takes_the_cuda_kernels(cuda_host_library):
    """Run on the CPU, right and with a token too many."""
    with host.start(cuda_host_library) as process:
        right = process.submit(gpu_kit.check_cuda, SMALL, MIX, 5).result()
        assert right.failures == ()
        assert right.name.startswith("CUDA 64 x 1")
        wrong = process.submit(gpu_kit.check_cuda, SMALL, MIX, 5, 1).result()
        assert "relative error" in wrong.failures[0]


@pytest.mark.parametrize("fault", [None, "scaled", "unwritten", "last token missed"])
def test_long_check(process, fault):
    heads = replace(HEADS, kv_heads=1, group=1)
    load = loads.Load(heads, 2, 300)
    job = process.submit(gpu_kit.check_long, load, loads.Holding("mixed", 0.25), 5, fault)
    assert bool(job.result().failures) == bool(fault)


def test_variants_cover_what_they_should():
    models = check.variants()
    assert tuple(models[:2]) == check.SERVED
    every = [m for m in models if m.names == check.EVERY_FORMAT]
    pairs = {(m.head_size, m.dtype) for m in every}
    assert {(size, dtype) for size in check.GPU_HEAD_SIZES for dtype in check.DTYPES} <= pairs
    grouped = {(m.group, m.dtype) for m in every}
    assert {(group, dtype) for group in check.GROUPS for dtype in check.DTYPES} <= grouped
    assert len({check.name_of(m) for m in models}) == len(models)
    assert {1, 2, 3, 4, 5, 9} <= {m.max_leases for m in models}
    assert max(m.max_leases for m in models) > 32
    for model in models:
        most = max(len(request.leases) for request in check.requests(model))
        assert most == model.max_leases


def row(kernel, microseconds, holding="full", budget=1.0, kv_bytes=100_000_000, layers=1):
    return report.Timed(
        "some model",
        8,
        4096,
        layers,
        kernel,
        holding,
        budget,
        microseconds,
        0.01,
        True,
        kv_bytes,
        kv_bytes,
        4e12,
    )


ROWS = [
    row("torch flash", 50.0),
    row("FlashInfer", 40.0),
    row("xformers", math.nan),
    row("Triton", 41.0),
    row("Triton", 14.0, "mixed 0.25", 0.25, 25_000_000),
]
SLOWER_CUDA = row("CUDA", 50.0)
FASTER_CUDA = row("CUDA", 10.0, "mixed 0.25", 0.25, 25_000_000)


def test_report():
    table = report.table(ROWS, ("full", "mixed"), "Triton").splitlines()
    assert len(table) == 2
    assert "FlashInfer 40.0 us" in table[1]
    assert table[1].split()[-4:] == ["1.02x", "61%", "0.35x", "45%"]
    assert "mixed" not in report.table(ROWS, ("full", "rank"), "Triton")
    assert ROWS[3].line.endswith("41.0 us, 100.0 MB, 2439 GB/s, 61% of copy")
    copy, full, quarter = report.aims(ROWS)
    assert (copy.reached, copy.rows) == (0, 1)  # the smaller one need not reach it
    assert "0.61" in copy.worst
    assert (full.reached, full.rows) == (1, 1)
    assert (quarter.reached, quarter.rows) == (0, 1)
    assert quarter.line.endswith("0 of 1; worst 0.35 (some model, 8 x 4096, mixed 0.25)")


def test_report_of_both_kernels():
    rows = [*ROWS, SLOWER_CUDA, FASTER_CUDA]
    assert report.faster(rows) == [ROWS[3], FASTER_CUDA]
    assert report.best_full(rows) == report.best_full(ROWS)
    table = report.table(rows, ("full", "mixed"), "CUDA").splitlines()
    assert table[1].split()[-4:] == ["1.25x", "50%", "0.25x", "62%"]
    _, full, quarter = report.aims(rows)
    assert (full.reached, quarter.reached) == (1, 1)
    assert report.comparison(rows) == (
        "CUDA against Triton: faster in 1 of 2; time over Triton's 0.71 to 1.22, median 0.97"
    )
    assert report.comparison(ROWS).endswith("not both were timed")


def test_a_layer_among_many_is_compared():
    rows = [*ROWS, row("Triton", 82.0, layers=32), row("CUDA", 9.0, layers=32)]
    assert report.translation(rows) == [
        "Triton, full: a layer in a cache of 32 layers takes 2.00 x its time in a cache of one "
        "(41.0 us)"
    ]
    assert len(report.table(rows, ("full",), "Triton").splitlines()) == 2


def test_a_build_is_current_until_a_source_changes(tmp_path):
    library, sources = tmp_path / "library.so", tmp_path / "sources"
    sources.mkdir()
    (sources / "kernel.cu").touch()
    assert not building.is_current(library, sources)
    library.touch()
    os.utime(sources / "kernel.cu", (1, 1))
    assert building.is_current(library, sources)
    (sources / "kernel.cu").touch()
    os.utime(library, (2, 2))
    assert not building.is_current(library, sources)


def test_names_of_architectures():
    capabilities = [(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)]
    names = [building.architecture(capability) for capability in capabilities]
    assert names == ["80", "89", "90a", "100", "120"]


def test_report_without_baselines():
    rows = [row("Triton", 41.0), row("xformers", math.nan)]
    assert "none" in report.table(rows, ("full",), "Triton")
    assert report.aims(rows)[1].line.endswith("nothing measured")
    assert report.table([], ("full",), "Triton").startswith("model")


def test_rows_are_lines_of_json(tmp_path):
    """On disk as soon as they are written."""
    path = tmp_path / "new" / "rows.jsonl"
    written = record.Record(path)
    for timed in ROWS:
        written.write(kind="timing", **asdict(timed), **timed.derived)
    read = [json.loads(line) for line in path.read_text().splitlines()]
    assert read[2]["microseconds"] is None
    assert read[3]["gb_per_s"] == pytest.approx(1e8 / 41e-6 / 1e9)
    assert [report.Timed.of(one) for one in read if one["microseconds"]] == [
        timed for timed in ROWS if not math.isnan(timed.microseconds)
    ]


def full_cache():
    return baselines.FullCache.random(LOAD, 2, torch.Generator().manual_seed(1))


def test_baselines_are_called_as_they_should_be():
    cache = full_cache()
    step = baselines.torch_sdpa(cache, baselines.SDPBackend.MATH)
    assert cache.error(step(1), 1) < baselines.MAX_ERROR
    assert cache.error(step(1), 0) > baselines.MAX_ERROR


def test_a_kernel_that_is_not_there_is_noted():
    def missing(_):
        raise ModuleNotFoundError("No module named 'that'")

    timing, note = gpu_kit.measure.time_baseline(missing, full_cache(), 2)
    assert math.isnan(timing.seconds)
    assert note == "not importable: No module named 'that'"


def test_a_kernel_with_wrong_results_is_not_timed():
    cache = full_cache()
    timing, note = gpu_kit.measure.time_baseline(lambda _: torch.zeros_like, cache, 2)
    assert math.isnan(timing.seconds)
    assert note
    timing, note = gpu_kit.measure.time_baseline(lambda c: lambda i: c.queries[i] * 0, cache, 2)
    assert note == "wrong result, relative error 1.0e+00"


def test_every_kernel_and_holding_gets_a_row(monkeypatch):
    """All but the clock; too large a cache gets a reason."""

    class Copy:
        def bytes_per_second(self):
            return 1e12

    def timed(step, sets, in_graph=True):
        return gpu_kit.measure.Timing(1e-3, 0.0, in_graph)

    monkeypatch.setattr(gpu_kit.measure, "DeviceCopy", Copy)
    monkeypatch.setattr(gpu_kit.measure, "sets_for", lambda call_bytes: 2)
    monkeypatch.setattr(gpu_kit.measure, "time_calls", timed)
    full = list(gpu_kit.measure.time_full_caches(LOAD, list(baselines.BASELINES), 0))
    assert [r["kernel"] for r in full] == list(baselines.BASELINES)
    assert all(r["note"] for r in full if math.isnan(r["microseconds"]))
    ours = list(gpu_kit.measure.time_ours(LOAD, HOLDINGS, "Triton", 0))
    assert [r["holding"] for r in ours] == [h.name for h in HOLDINGS]
    assert ours[0]["kv_bytes"] == LOAD.full_bytes == full[0]["kv_bytes"]
    large = loads.Load(HEADS, 10_000, 500)
    (row,) = gpu_kit.measure.time_ours(large, [loads.FULL], "Triton", 0)
    assert row["note"] == "3 GB do not fit"
    assert math.isnan(row["microseconds"])


def test_layers_of_a_block_hold_the_same():
    """Each call reads its own layer, of as many bytes as a layer by itself."""
    many = replace(LOAD, layers=3)
    made, alone = build(loads.Holding("mixed", 0.5), many), build(loads.Holding("mixed", 0.5))
    assert made.kv_cache.shape[1] == 3 * alone.kv_cache.shape[1]
    assert made.kv_bytes == pytest.approx(alone.kv_bytes, rel=0.1)
    for layer in range(3):
        arguments = (
            made.kv_cache, layer, made.layout, made.block_table, made.query_rows[1], made.lengths,
            made.leases, made.basis, 0.125,
        )  # fmt: skip
        got = reference.mixed_decode(made.queries[1], *arguments)
        expected = specification.mixed_decode(made.queries[1], *arguments)
        torch.testing.assert_close(got, expected)
        assert got[0].isfinite().all()


def test_segments_are_several_leases():
    """Compared with one lease of the same budget; the kernels are told how many there may be."""
    in_segments = loads.Holding("mixed", 0.5, 160)
    made = build(in_segments)
    assert in_segments.name == "segments 0.5"
    assert [len(specification.leases_of(made.leases, row)) for row in range(4)] == [3] * 4
    assert made.leases.shape[1] == in_segments.max_leases(LOAD.tokens) == 3
    assert loads.SEGMENTS.max_leases(32768) == 32
    rows = [*ROWS, row("Triton", 15.4, "segments 0.25", 0.25, 25_000_000)]
    assert report.in_segments(rows) == [
        "Triton, 8 x 4096, segments 0.25: 1.10 x the time of one lease (14.0 us)"
    ]
    assert report.in_segments(ROWS) == []


def test_loads_are_named():
    assert loads.parse_loads(["16x32768"]) == (loads.Load(loads.LLAMA, 16, 32768),)
    for name in ("16", "x5", "0x5", "16x", "-1x4"):
        with pytest.raises(ValueError, match="--loads"):
            loads.parse_loads([name])


ONE_FORMAT = Model(("i8",), 64, 1, kv_heads=1, query_dtype=torch.bfloat16)


@pytest.mark.parametrize("max_leases", [1, 2])
@pytest.mark.parametrize("name", ["i8", "tail"])
def test_the_first_wrong_token_is_located(process, name, max_leases):
    model = replace(ONE_FORMAT, block_size=8, max_leases=max_leases)
    right = process.submit(gpu_kit.locate_fault, model, name, 5).result()
    assert right.tokens == 0
    assert "alone: right with 1 to " in right.text
    found = process.submit(gpu_kit.locate_fault, model, name, 5, "wrong from eleven").result()
    assert found.tokens == 11
    page = model.layout().formats.formats[0].tokens_per_page if name == "i8" else 8
    assert f"page {10 // page}, slot {10 % page}), head 0, dimensions 7 to 7 (1)" in found.text


TINY = compress_check.Case(
    ("drop", "i8", "full"), 64, 1, kv_heads=1, layers=2, tokens=200, budget=0.5
)


@pytest.mark.parametrize(
    "case",
    [
        TINY,
        replace(TINY, names=("i4", "r16i8", "full"), by_head=True, dtype=torch.float16),
        replace(TINY, names=("drop", "r8", "r16"), prompt_basis=True),
    ],
    ids=lambda case: case.name,
)
def test_compression_check_passes(process, case):
    outcome = process.submit(gpu_kit.check_compression, case, 6).result()
    assert outcome.failures == ()
    assert 0 < outcome.error < compress_check.DECODED_ERROR


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("losses", "relative error"),
        ("allocate", "tokens are not those of the choice"),
        ("pack", ""),
    ],
)
def test_compression_check_finds(process, fault, told):
    outcome = process.submit(gpu_kit.check_compression, TINY, 5, fault).result()
    found = [failure for failure in outcome.failures if failure.startswith(f"{fault}: ")]
    assert len(found) == 1, outcome.failures
    assert told in found[0]


def test_compression_cases_are_various():
    cases = compress_check.CASES
    assert {c.dtype for c in cases} == {torch.bfloat16, torch.float16}
    assert {True, False} == {c.by_head for c in cases} == {c.formats.drop for c in cases}
    assert len({c.name for c in cases}) == len(cases)
    assert all(c.segment.num_lease_blocks for c in cases)


def test_compression_is_timed(process):
    model = compress_time.Model(HEADS, 2, 32, 48)
    (timed,) = process.submit(gpu_kit.time_compression, model, (100,)).result()
    assert list(timed.parts) == ["losses", "allocate", "pack"]
    assert sum(timed.parts.values()) > 0
    assert timed.host_seconds > 0
    assert math.isnan(timed.device_seconds)
    weights = 32 * (6 * 2 + 2 * 2) * 64 + 3 * 32 * 48
    assert model.products(100) == 2 * weights * 2 * 100
    assert timed.product_seconds == pytest.approx(2 * weights * 200 / timed.product_rate)
    timed = replace(timed, seconds=1e-3, attention_seconds=2e-3)
    assert timed.share == pytest.approx(1e-3 / (timed.product_seconds + 2e-3))
    assert "share 0.1%, aim 2%: reached" in replace(timed, product_seconds=1.0).lines[1]
    assert "share 50.0%, aim 2%: missed" in replace(timed, product_seconds=0.0).lines[1]
    assert json.loads(json.dumps(timed.as_json()))["share"] == timed.share


@pytest.mark.parametrize(
    ("planted", "status", "text", "errors", "failed"),
    [
        (False, 0, "========= ERROR SUMMARY: 0 errors", 0, False),
        (False, 0, "========= ERROR SUMMARY: 3 errors", 3, True),
        (False, 0, "RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)", 2, True),
        (False, 1, "AssertionError\n========= ERROR SUMMARY: 0 errors", 1, True),
        (True, 1, "========= ERROR SUMMARY: 7 errors", 7, False),
        (True, 0, "========= ERROR SUMMARY: 0 errors", 0, True),
    ],
)
def test_what_the_sanitizer_says(planted, status, text, errors, failed):
    found = sanitize.finding("CUDA", "memcheck", planted, (status, text))
    assert (found.errors, found.failed) == (errors, failed)
    assert found.text.startswith("CUDA memcheck")
    assert ("FAILED" in found.text) == failed


@pytest.mark.parametrize(
    ("status", "text"),
    [
        (1, "Device not supported\n========= ERROR SUMMARY: 1 error"),
        (-9, "killed in the middle"),
        (0, ""),
    ],
)
def test_a_sanitizer_that_does_not_run_is_no_success(status, text):
    with pytest.raises(sanitize.NoSanitizerError, match="did not run to its end"):
        sanitize.finding("CUDA", "memcheck", False, (status, text))


NCU_OUTPUT = (
    "==PROF== Connected\nwhatever the program printed\n"
    '"ID","Kernel Name","gpu__time_duration.sum","dram__bytes_read.sum",'
    '"smsp__inst_executed.sum","sm__cycles_active.min","sm__cycles_active.avg",'
    '"sm__cycles_active.max",'
    '"smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio"\n'
    '"","","usecond","Mbyte","inst","cycle","cycle","cycle","inst"\n'
    '"0","attend_share<128>(DecodeArgs)","100","300","1,600,000","50","90","100","2.5"\n'
)


def test_what_ncu_says():
    (launch,) = ncu.parse(NCU_OUTPUT)
    assert launch["name"] == "attend_share"
    assert launch[ncu.TIME] == 1e5
    assert launch[ncu.INSTRUCTIONS] == 1.6e6
    lines = ncu.in_words("CUDA", launch, 1000)
    assert "100.0 us, 300.0 MB read (3000 GB/s)" in lines[0]
    assert lines[1] == "  1600 warp instructions a page, 1000 pages"
    assert "busy 50% to 100 % of the longest, mean 90%" in lines[2]
    assert lines[3].endswith("long_scoreboard 2.50")
    assert ncu.parse("==ERROR== no permission") == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_says_that_there_is_no_gpu(tmp_path):
    """Also that a checkout is enough, seen from elsewhere."""
    command = [sys.executable, gpu_kit.FOLDER / "run.py", "--stage", "check", "--json", "there"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "gpu/run.py: torch sees no CUDA GPU here; nothing was run\n"
    assert not list(tmp_path.iterdir())
