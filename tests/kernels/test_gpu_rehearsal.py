"""The GPU kit's stages from start to end on a CPU, in an environment as bare as a GPU machine's.

Triton's kernels are interpreted, CUDA's run on the CPU. Neither vLLM nor the CPU extension can be
imported, and the project is not installed. NVIDIA's tools are programs that run what they are
given and print what the real ones print.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("triton")

import gpu_kit

from benchmarks.gpu.jobs import Ended, Job, run_jobs
from benchmarks.gpu.stages import Options, check, compress, decode, full, profile, sanitize

pytestmark = [pytest.mark.slow, pytest.mark.alone]

BARE = f"""
import sys

class Bare:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "vllm" or name == "mdkv_vllm._cpu":
            raise ModuleNotFoundError("No module named " + name + ", as on a bare machine")

sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in repr(f).lower()]
sys.path[:] = [p for p in sys.path if "editable" not in p and p != {str(gpu_kit.ROOT)!r}]
sys.meta_path.insert(0, Bare())
"""

TOOL = f"""#!{sys.executable}
import os, subprocess, sys
arguments = sys.argv[1:]
child = arguments[arguments.index(sys.executable):]
"""

NCU = (
    TOOL
    + """
done = subprocess.run(child)
if done.returncode:
    sys.exit(done.returncode)
names = arguments[arguments.index("--metrics") + 1].split(",")
print('"ID","Kernel Name",' + ",".join(f'"{n}"' for n in names))
print('"","",' + ",".join('"nsecond"' if "time" in n else '""' for n in names))
for number, kernel in enumerate(("attend_share", "merge_parts")):
    print(f'"{number}","{kernel}(Args)",' + ",".join('"1,000"' for _ in names))
"""
)

SANITIZER = (
    TOOL
    + """
if "True)" in child[-1]:  # the planted fault, which would end the process on a CPU
    print("========= ERROR SUMMARY: 3 errors")
    sys.exit(1)
done = subprocess.run(child) if "memcheck" in arguments else None
print("========= ERROR SUMMARY: 0 errors")
sys.exit(done.returncode if done else 0)
"""
)


@pytest.fixture(scope="module")
def environment(tmp_path_factory, cuda_host_library):
    folder = tmp_path_factory.mktemp("bare")
    (folder / "sitecustomize.py").write_text(BARE)
    for name, text in (("ncu", NCU), ("compute-sanitizer", SANITIZER)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return os.environ | {
        "PYTHONPATH": str(folder),
        "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
        "MDKV_CUDA_LIBRARY": str(cuda_host_library),
    }


def rehearse(environment, folder, stage, *options):
    """Run a stage; its exit status, what it printed, and its rows."""
    path = folder / f"{stage}.jsonl"
    command = [sys.executable, gpu_kit.FOLDER / "run.py", "--rehearse", "--stage", stage]
    command += ["--json", path, "--seed", "3", "--workers", "2", *options]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert "Traceback" not in done.stderr, done.stderr
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return done.returncode, done.stdout, rows


def of_kind(rows, kind):
    return [row for row in rows if row["kind"] == kind]


@pytest.fixture(scope="module")
def checked(environment, tmp_path_factory):
    """The stage without faults: what :func:`rehearse` returns, and the seconds it took."""
    began = time.monotonic()
    outcome = rehearse(environment, tmp_path_factory.mktemp("check"), "check")
    return *outcome, time.monotonic() - began


def test_check(checked):
    status, printed, rows, _ = checked
    assert status == 0, printed
    checked = sorted(row["name"].split()[0] for row in of_kind(rows, "check"))
    assert checked == ["CUDA"] * 3 + ["Triton"] * 3 + ["compress"]
    assert rows[0]["kind"] == "machine"
    assert {"torch", "triton", "seed"} <= rows[0].keys()
    assert printed.splitlines()[-1] == "8 of 8 jobs done"


def test_faulty_kernels_cost_their_own_jobs(environment, checked, tmp_path):
    """Wrong, raising, hanging and aborting kernels in the middle, under one deadline.

    The one that hangs leaves half of the workers to the others, so they need up to twice as long.
    """
    deadline = 2 * checked[-1] + 10
    began = time.monotonic()
    plants = [
        "Triton 64 x 1 bfloat16 r8=hangs",
        "CUDA 64 x 1 bfloat16 i8=aborts",
        "CUDA 64 x 1 bfloat16 r8=raises",
        "Triton 64 x 1 float16=wrong",
    ]
    status, printed, rows = rehearse(
        environment, tmp_path, "check", "--deadline", f"{deadline:.0f}", "--plant", *plants
    )
    assert time.monotonic() - began < deadline + 15
    assert status == 1
    states = {row["job"]: row["state"] for row in of_kind(rows, "ended")}
    assert states["CUDA 64 x 1 bfloat16 i8/full block 4"] == "died: SIGABRT"
    assert "illegal memory access" in states["CUDA 64 x 1 bfloat16 r8 2 leases block 4"]
    assert "its limit" in states["Triton 64 x 1 bfloat16 r8 2 leases block 4"]
    assert "relative error" in states["Triton 64 x 1 float16 i8/full block 4"]
    assert states["CUDA 64 x 1 float16 i8/full block 4"] == "ok"
    assert states["Triton 64 x 1 bfloat16 i8/full block 4"] == "ok"
    (place,) = [row for row in of_kind(rows, "place") if row["name"] == "i8"]
    assert place["text"].startswith("i8: wrong first with 1 tokens (page 0, slot 0)")
    lines = printed.splitlines()
    important = lines.index("CUDA kernels: taken from " + environment["MDKV_CUDA_LIBRARY"])
    assert any(
        "Triton 64 x 1 float16" in line and "i8: wrong" in line for line in lines[important:]
    )
    assert lines[-1].endswith("jobs done")


def test_decode(environment, tmp_path):
    status, printed, rows = rehearse(environment, tmp_path, "decode")
    assert status == 0, printed
    timed = of_kind(rows, "timing")
    ours = [(row["kernel"], row["holding"], row["layers"]) for row in timed if not row["note"]]
    for kernel in ("Triton", "CUDA"):
        assert [o[1:] for o in ours if o[0] == kernel] == [
            ("full", 1), ("mixed 0.5", 1), ("segments 0.5", 1), ("full", 3), ("full", 1)
        ]  # fmt: skip
    assert all(row["microseconds"] > 0 for row in timed if not row["note"])
    notes = {row["kernel"]: row["note"] for row in timed if row["note"]}
    assert "FLASH_ATTENTION_3" in notes["FlashAttention 3, paged"]
    assert "CUDA, full: a layer in a cache of 3 layers takes" in printed
    assert "CUDA, 2 x 150, segments 0.5: " in printed
    assert "CUDA against Triton: faster in" in printed


def test_a_hanging_kernel_leaves_the_other_times(environment, checked, tmp_path):
    plants = ["Triton, tiny, batch 2 x 150, full, mixed=hangs"]
    status, printed, rows = rehearse(
        environment, tmp_path, "decode", "--deadline", f"{checked[-1] + 10:.0f}", "--plant", *plants
    )
    assert status == 1
    assert "NOT DONE Triton, tiny, batch 2 x 150, full, mixed 0.5, segments 0.5: ended" in printed
    assert any(row["kernel"] == "FlashAttention 3, paged" for row in of_kind(rows, "timing"))


def test_compress(environment, tmp_path):
    status, printed, rows = rehearse(environment, tmp_path, "compress")
    assert status == 0, printed
    (timed,) = of_kind(rows, "compression")
    assert timed["tokens"] == 100
    assert timed["seconds"] > 0


def test_profile(environment, tmp_path):
    status, printed, rows = rehearse(environment, tmp_path, "profile")
    assert status == 0, printed
    found = [(row["title"].split(",")[0], row["name"]) for row in of_kind(rows, "profile")]
    assert found == [(k, n) for k in ("CUDA", "Triton") for n in ("attend_share", "merge_parts")]
    assert "warp instructions a page" in printed
    assert "issue slots 1000 %" in printed


def test_sanitize(environment, tmp_path):
    status, printed, rows = rehearse(environment, tmp_path, "sanitize")
    assert status == 0, printed
    lines = {row["text"] for row in of_kind(rows, "sanitizer")}
    assert lines == {
        f"{kernel} {end}"
        for kernel in ("Triton", "CUDA")
        for end in (
            "memcheck, planted fault: 3 errors",
            "memcheck: 0 errors",
            "racecheck: 0 errors",
            "synccheck: 0 errors",
        )
    }


def test_tools_that_are_not_there_are_told(environment, tmp_path):
    bare = environment | {"PATH": "/usr/bin:/bin"}
    status, printed, _ = rehearse(bare, tmp_path, "profile")
    assert status == 1
    assert "NoProfileError: ncu is not on the PATH" in printed


@pytest.mark.parametrize("stage", [check, compress, decode, full, profile, sanitize])
@pytest.mark.parametrize("everything", [False, True])
def test_jobs_of_a_stage_have_names_of_their_own(stage, everything):
    """And they wait for jobs that are there."""
    jobs = stage.STAGE.jobs(Options(1, 14, everything=everything))
    names = [job.name for job in jobs]
    assert len(set(names)) == len(names)
    assert set(names).issuperset(name for job in jobs for name in job.after)
    assert all(job.seconds < stage.STAGE.seconds for job in jobs)


def test_the_table_that_decides_has_some_forty_times():
    jobs = decode.STAGE.jobs(Options(1, 14))
    timings = [job for job in jobs if job.alone]
    ours = sum(len(job.arguments[1]) for job in timings if not job.name.startswith("full"))
    assert 40 <= ours <= 50


def _sleeps(seconds):
    yield {"at": "start"}
    time.sleep(seconds)
    yield {"at": "end"}


def _notes_time(path):
    Path(path).write_text(str(time.monotonic()))
    yield {}


def _leaves_a_child():
    subprocess.Popen(["sleep", "1000"])
    yield {}


@pytest.fixture
def importable(monkeypatch):
    """Processes of jobs find the kit."""
    monkeypatch.syspath_prepend(gpu_kit.FOLDER.parent)


def test_rows_arrive_when_they_are_made(importable):
    began = time.monotonic()
    events = run_jobs([Job("slow", _sleeps, (3.0,))], 1, began + 60)
    job, row = next(events)
    assert (job.name, row) == ("slow", {"at": "start"})
    assert time.monotonic() - began < 2.9
    rest = list(events)
    assert rest[0][1] == {"at": "end"}
    assert rest[1].ok


def test_a_job_waits_for_others_and_may_be_alone(importable, tmp_path):
    first = Job("first", _sleeps, (0.5,))
    beside = Job("beside", _sleeps, (1.0,))
    after = Job("after", _notes_time, (tmp_path / "after",), after=("first",))
    alone = Job("alone", _notes_time, (tmp_path / "alone",), alone=True)
    ended = {}
    for event in run_jobs([first, beside, after, alone], 3, time.monotonic() + 60):
        if isinstance(event, Ended):
            ended[event.job.name] = time.monotonic()
    times = {name: float((tmp_path / name).read_text()) for name in ("after", "alone")}
    assert times["after"] > ended["first"] - 0.2
    assert times["alone"] > max(ended["beside"], ended["after"]) - 0.2


def test_the_deadline_ends_what_runs_and_starts_nothing(importable):
    began = time.monotonic()
    jobs = [Job("long", _sleeps, (100.0,)), Job("later", _sleeps, (0.0,))]
    ended = [e for e in run_jobs(jobs, 1, began + 2) if isinstance(e, Ended)]
    assert time.monotonic() - began < 10
    assert [e.state.split(" ")[0] for e in ended] == ["ended", "not"]


def test_what_a_job_started_ends_with_it(importable):
    sleeping = "sleep\x001000\x00"

    def running():
        found = 0
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                found += path.read_text() == sleeping
            except OSError:
                continue
        return found

    before = running()
    (_, end) = run_jobs([Job("parent", _leaves_a_child)], 1, time.monotonic() + 60)
    assert end.ok
    give_up = time.monotonic() + 5
    while running() != before and time.monotonic() < give_up:
        time.sleep(0.05)
    assert running() == before


def test_a_failure_is_followed_up(importable):
    follow = Job("follow", _sleeps, (0.0,))
    broken = Job("broken", _sleeps, ("not a number",), on_failure=(follow,))
    ended = [e for e in run_jobs([broken], 1, time.monotonic() + 60) if isinstance(e, Ended)]
    assert [e.job.name for e in ended] == ["broken", "follow"]
    assert ended[0].state.startswith("failed: TypeError: ")
    assert "Traceback" in ended[0].output


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--stage", "chek"], "invalid choice: 'chek'"),
        (["--stage", "decode", "--rehearse", "--loads", "16"], "--loads '16'; allowed is"),
        (["--stage", "check", "--plant", "a=wrong"], "--plant is for --rehearse alone"),
    ],
)
def test_wrong_options_are_named(options, told):
    command = [sys.executable, gpu_kit.FOLDER / "run.py", *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert told in done.stderr
