"""The CPU image without a container engine: its install steps, then the chart's server in it.

The steps are the Dockerfile's own, run in a clean environment; the server runs as in the cluster:
as user 10001 without rights, on a read-only root, with the arguments that the chart renders.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from dockerfile import health_check
from image import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "helm"))
import chart

START_SECONDS = 600
MODEL = "/srv/SmolLM2-135M-Instruct"
KEY = "a-key-for-this-test"

allowed = subprocess.run(
    ["unshare", "--mount", "--propagation", "private", "true"], check=False, capture_output=True
)
pytestmark = [
    pytest.mark.server,
    pytest.mark.timeout(2400),
    pytest.mark.skipif(
        allowed.returncode != 0, reason="mount namespaces are not allowed to this user"
    ),
]


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    folder = tmp_path_factory.mktemp("image")
    made = Image(folder)
    with (folder / "build.log").open("w") as log:
        made.build("cpu", log)
    return made


@pytest.fixture(scope="module")
def run(image):
    """Run a command in the image; its output."""

    def output(*arguments, fails=False, **variables):
        done = subprocess.run(
            image.command(*arguments), env=image.environment("cpu", **variables),
            check=False, capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        assert (done.returncode != 0) == fails, done.stdout + done.stderr
        return done.stdout + done.stderr

    return output


def test_the_commands_are_on_the_path(run):
    assert run("mdkv", "--version").strip().startswith("mdkv-vllm 0.1.0")
    assert "0.32" in run("vllm", "--version")


def test_the_package_is_not_editable_and_its_ops_load(run):
    script = "import mdkv_vllm, mdkv_vllm.kernels.cpu, mdkv_vllm.kernels.triton as other; "
    script += "print(mdkv_vllm.__file__)"
    assert (
        run("python3", "-c", script)
        .strip()
        .endswith("/opt/mdkv/lib/python3.11/site-packages/mdkv_vllm/__init__.py")
    )


def test_evaluation_stays_outside_and_calibration_is_there(run):
    told = run("mdkv", "eval", "some/model", "--offline", fails=True)
    assert "evaluation is not part of a serving image" in told
    told = run("mdkv", "inspect", "--prompt", "file", "model", fails=True)
    assert "evaluation is not part of a serving image" in told
    assert "inspect.html" not in run("pip", "show", "--files", "mdkv-vllm")
    assert "--per-length" in run("mdkv", "head-scores", "--help")


def test_requirements_fit_each_other(run):
    conflicts = run("pip", "check", fails=True).splitlines()
    # What requirements/cpu.txt leaves out on purpose, and says so.
    absent = {
        line.split(" requires ")[1].split(",")[0] for line in conflicts if " requires " in line
    }
    assert not [line for line in conflicts if "but you have" in line]
    assert "torchvision" in absent


@pytest.mark.parametrize("path", ["/opt/mdkv/x", "/etc/x", "/usr/x", "/x"])
def test_the_root_is_read_only(run, path):
    assert "Read-only file system" in run("touch", path, fails=True)


def test_no_rights(run):
    status = run("cat", "/proc/self/status")
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert fields["Uid"].split() == ["10001"] * 4
    assert fields["Groups"].strip() == ""
    assert int(fields["CapEff"], 16) == int(fields["CapBnd"], 16) == 0
    assert fields["NoNewPrivs"] == "1"


@pytest.fixture(scope="module")
def server(image, run):
    """The chart's CPU demo, its init container first: address and pod."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    values = chart.example("cpu-demo")
    values["model"]["name"] = MODEL
    values["server"]["port"] = port
    values["server"]["drainSeconds"] = 20
    values["calibration"]["enabled"] = False
    pod = chart.only(chart.manifests(values), "Deployment")["spec"]["template"]["spec"]
    (unpack,) = pod["initContainers"]
    run(*unpack["command"])
    (container,) = pod["containers"]
    variables = {v["name"]: v["value"] for v in container["env"] if "value" in v}
    arguments = ["--host=127.0.0.1" if a == "--host=0.0.0.0" else a for a in container["args"]]
    with (image.folder / "server.log").open("w") as log:
        process = subprocess.Popen(
            image.command(*container["command"], *arguments),
            env=image.environment("cpu", **variables, VLLM_API_KEY=KEY),
            stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            urllib.request.urlopen(f"{url}/health", timeout=5)
            break
        except OSError:
            if process.poll() is not None or time.monotonic() > deadline:
                os.killpg(process.pid, signal.SIGKILL)
                text = (image.folder / "server.log").read_text()
                raise AssertionError(f"no server:\n{text[-5000:]}") from None
            time.sleep(0.5)
    yield url
    os.killpg(process.pid, signal.SIGTERM)
    process.wait(timeout=120)


def smoke_test(run, server, key):
    """The script as the chart's test pod has it."""
    documents = chart.manifests(chart.example("cpu-demo"))
    name = f"{chart.FULL_NAME}-smoke-test"
    script = chart.only(documents, "ConfigMap", name)["data"]["smoke_test.py"]
    (container,) = chart.only(documents, "Pod", name)["spec"]["containers"]
    assert container["command"] == ["python3", "/smoke-test/smoke_test.py"]
    return run(
        "python3", "-c", script, BASE_URL=server, MODEL="SmolLM2-135M-Instruct", API_KEY=key,
        fails=key != KEY,
    )  # fmt: skip


def test_the_charts_smoke_test_passes(run, server):
    assert "SmolLM2-135M-Instruct answered" in smoke_test(run, server, KEY)
    assert "401" in smoke_test(run, server, "another-key")


def test_the_health_check_passes_and_fails(run, server):
    program, option, code = health_check("cpu")
    run(program, option, code.replace("http://127.0.0.1:8000", server))
    run(program, option, code.replace("http://127.0.0.1:8000", "http://127.0.0.1:9"), fails=True)


def test_completions_want_the_key(server):
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{server}/v1/models", timeout=30)
    assert refused.value.code == 401


def test_compression_works_in_the_image(server):
    words = " ".join(f"word{n}" for n in range(400))
    body = {"model": "SmolLM2-135M-Instruct", "prompt": words, "max_tokens": 4}
    request = urllib.request.Request(
        f"{server}/v1/completions", json.dumps(body).encode(),
        {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"},
    )  # fmt: skip
    with urllib.request.urlopen(request, timeout=120) as reply:
        assert json.loads(reply.read())["usage"]["completion_tokens"] == 4


def test_only_the_volumes_were_written(image, server):
    assert (image.folder / "models/SmolLM2-135M-Instruct/config.json").is_file()
    written = {path.name for path in image.folder.iterdir() if path.is_dir()}
    assert written == {"opt", "cache", "models"}
