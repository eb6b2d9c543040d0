"""How the chart calls vLLM and mdkv, put to their own parsers and to our settings."""

import pytest
from chart import containers, files, manifests, only, pod_templates
from modes import MODES

from mdkv_vllm.cli import _parser
from mdkv_vllm.config import MixedDimConfig

every_mode = pytest.mark.parametrize("values", MODES.values(), ids=MODES)


@pytest.fixture(scope="module")
def vllm_parser():
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    return make_arg_parser(FlexibleArgumentParser())


def servers(values):
    """The pods that run vLLM: one, or leader and worker."""
    documents = [d for d in manifests(values) if d["kind"] in ("Deployment", "LeaderWorkerSet")]
    return list(pod_templates(documents))


def parsed(template, parser):
    """Arguments of the server container, as vLLM reads them; what Kubernetes fills in is 2."""
    (container,) = template["spec"]["containers"]
    assert container["command"] == ["vllm"]
    serve, *arguments = container["args"]
    assert serve == "serve"
    expanded = [
        argument.replace("$(LWS_GROUP_SIZE)", "2").replace("$(LWS_WORKER_INDEX)", "1")
        for argument in arguments
    ]
    return parser.parse_args(expanded)


@every_mode
def test_vllm_and_our_settings_take_the_arguments(values, vllm_parser):
    for template in servers(values):
        options = parsed(template, vllm_parser)
        assert options.model_tag == values["model"]["name"]
        assert options.attention_backend.upper() == "MIXEDDIM"
        MixedDimConfig.from_additional_config(options.additional_config)
        ports = template["spec"]["containers"][0].get("ports")
        assert ports is None or options.port == ports[0]["containerPort"]
        grace = template["spec"]["terminationGracePeriodSeconds"]
        (container,) = template["spec"]["containers"]
        _, sleep = container["lifecycle"]["preStop"]["exec"]["command"]
        assert grace > options.shutdown_timeout + int(sleep)


@every_mode
def test_ranks_are_the_gpus(values, vllm_parser):
    templates = servers(values)
    gpus = 0
    for template in templates:
        limits = template["spec"]["containers"][0]["resources"].get("limits", {})
        gpus = limits.get("nvidia.com/gpu", 0)
        assert (gpus == 0) == (values.get("device") == "cpu")
    nodes = values.get("multiNode", {}).get("nodes", 2) if len(templates) == 2 else 1
    for template in templates:
        assert parsed(template, vllm_parser).tensor_parallel_size == max(1, gpus * nodes)


def test_a_group_over_several_nodes(vllm_parser):
    leader, worker = servers(MODES["several-nodes"])
    (group,) = [d for d in manifests(MODES["several-nodes"]) if d["kind"] == "LeaderWorkerSet"]
    assert group["spec"]["leaderWorkerTemplate"]["size"] == 4
    assert group["spec"]["replicas"] == 2
    for template in (leader, worker):
        options = parsed(template, vllm_parser)
        assert (options.nnodes, options.node_rank) == (2, 1)
        assert options.master_addr == "$(LWS_LEADER_ADDRESS)"
        assert options.tensor_parallel_size == 32
    assert not parsed(leader, vllm_parser).headless
    assert parsed(worker, vllm_parser).headless
    # A rank without an API server has nothing to probe.
    assert not [key for key in worker["spec"]["containers"][0] if key.endswith("Probe")]
    assert "startupProbe" in leader["spec"]["containers"][0]


def test_settings_reach_the_server_unchanged(vllm_parser):
    settings = {
        "budget_tokens": 123_456_789,
        "window": 32,
        "formats": ["drop", "r16i8", "full"],
        "head_power": 0.5,
        "heads": '/artifacts/with "quotes" and {{ braces }}',
        "enabled": False,
        "min_prompt_tokens": 1,
    }
    (template,) = servers({"model": {"name": "m"}, "mixeddim": settings})
    options = parsed(template, vllm_parser)
    assert options.additional_config == {"mixeddim": settings}


def test_server_settings(vllm_parser):
    (template,) = servers(MODES["server"])
    options = parsed(template, vllm_parser)
    assert (options.port, options.max_model_len, options.enforce_eager) == (8080, 8192, True)
    assert (options.revision, options.shutdown_timeout) == ("main", 0)
    variables = {v["name"]: v.get("value") for v in template["spec"]["containers"][0]["env"]}
    assert variables["VLLM_PLUGINS"] == "mixeddim"
    (template,) = servers(MODES["extras"])
    assert parsed(template, vllm_parser).max_num_seqs == 64
    (template,) = servers(MODES["cpu-demo"])
    assert parsed(template, vllm_parser).enforce_eager
    (template,) = servers(MODES["one-gpu"])
    assert not parsed(template, vllm_parser).enforce_eager
    assert parsed(template, vllm_parser).served_model_name == ["qwen3-8b"]


def test_the_api_key_is_on_unless_switched_off():
    for name, values in MODES.items():
        for template in servers(values):
            names = [v["name"] for v in template["spec"]["containers"][0]["env"]]
            assert ("VLLM_API_KEY" in names) == (name != "no-volumes")


def jobs(values):
    return [d for d in manifests(values) if d["kind"] == "Job"]


CALIBRATING = ["one-gpu", "cpu-demo", "basis", "basis-of-the-papers-formats",
               "own-scores-beside-calibration"]  # fmt: skip


@pytest.mark.parametrize("mode", CALIBRATING)
def test_servers_wait_for_what_the_jobs_write(mode, vllm_parser):
    values = MODES[mode]
    (template,) = servers(values)
    waited = {
        container["command"][-1]
        for container in template["spec"].get("initContainers", [])
        if container["name"].startswith("wait-for-")
    }
    written = set()
    for job in jobs(values):
        (container,) = job["spec"]["template"]["spec"]["containers"]
        program, *arguments = container["command"]
        assert program == "mdkv"
        options = _parser().parse_args(arguments)
        assert options.model == values["model"]["name"]
        written.add(str(options.out))
        mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
        assert mounts["/artifacts"]["readOnly"] is False
        gpus = container["resources"].get("limits", {}).get("nvidia.com/gpu", 0)
        assert gpus == values["calibration"].get("gpus", 0)
        if arguments[0] == "head-scores":
            assert options.device == ("cuda" if gpus else "cpu")
    settings = parsed(template, vllm_parser).additional_config["mixeddim"]
    used = {settings.get("heads"), settings.get("basis")} - {None}
    assert waited == written & used
    assert written
    # What the values name themselves is there already; it need not be waited for.
    assert (written == used) == (mode != "own-scores-beside-calibration")


def test_own_scores_win_over_calibrated_ones(vllm_parser):
    (template,) = servers(MODES["own-scores-beside-calibration"])
    settings = parsed(template, vllm_parser).additional_config["mixeddim"]
    assert settings == {"heads": "/artifacts/mine.safetensors"}


def test_a_changed_calibration_is_another_job():
    values = MODES["basis"]
    names = [job["metadata"]["name"] for job in jobs(values)]
    assert names == [job["metadata"]["name"] for job in jobs(values)]
    changed = {**values, "calibration": {**values["calibration"], "basisArgs": []}}
    assert len(set(names) & {job["metadata"]["name"] for job in jobs(changed)}) == 1
    upgraded = {**values, "image": {"tag": "0.2.0"}}
    assert not set(names) & {job["metadata"]["name"] for job in jobs(upgraded)}


@every_mode
def test_servers_cannot_write_artifacts(values):
    for template in servers(values):
        for container in containers([{"kind": "Pod", **template}]):
            for mount in container["volumeMounts"]:
                assert mount["mountPath"] != "/artifacts" or mount["readOnly"] is True


def test_the_embedded_model_is_unpacked_before_anyone_needs_it():
    (template,) = servers(MODES["cpu-demo"])
    first, *_ = template["spec"]["initContainers"]
    options = _parser().parse_args(first["command"][1:])
    model = MODES["cpu-demo"]["model"]["name"]
    assert str(options.out) == model
    (job,) = jobs(MODES["cpu-demo"])
    (wait,) = job["spec"]["template"]["spec"]["initContainers"]
    from mdkv_vllm.models.smollm2 import MANIFEST_NAME

    assert wait["command"][-1] == f"{model}/{MANIFEST_NAME}"


def test_the_smoke_test_asks_the_service():
    documents = manifests(MODES["names"])
    (container,) = only(documents, "Pod")["spec"]["containers"]
    variables = {v["name"]: v for v in container["env"]}
    service = only(documents, "Service")
    assert variables["BASE_URL"]["value"] == f"http://{service['metadata']['name']}:80"
    assert variables["MODEL"]["value"] == "/models/example"
    server = only(documents, "Deployment")["spec"]["template"]["spec"]["containers"][0]
    (key,) = [v for v in server["env"] if v["name"] == "VLLM_API_KEY"]
    assert variables["API_KEY"]["valueFrom"] == key["valueFrom"]


def test_the_notes_say_how_to_get_the_key():
    def notes(mode):
        return files(MODES[mode])["templates/NOTES.txt"]

    assert '{{ index .data "api-key" | base64decode }}' in notes("defaults")
    assert "There is no API key" in notes("no-volumes")
