"""Every template in every mode: manifests that Kubernetes would take, and that fit together."""

import re
import shutil
import subprocess

import custom_resources
import helm_python as helm
import kubernetes_validate
import pytest
import yaml
from chart import (
    CHART,
    FULL_NAME,
    NAME,
    NAMESPACE,
    containers,
    files,
    manifests,
    only,
    pod_templates,
)  # fmt: skip
from modes import MODES

KUBERNETES = ("1.27", "1.37")
"""The oldest version that Chart.yaml allows, and the newest with published schemas."""

every_mode = pytest.mark.parametrize("values", MODES.values(), ids=MODES)


@every_mode
def test_manifests_are_valid(values):
    for document in manifests(values):
        if custom_resources.is_custom(document):
            custom_resources.check(document)
        else:
            for version in KUBERNETES:
                kubernetes_validate.validate(document, version, strict=True)


@every_mode
def test_pods_in_custom_resources_are_valid(values):
    for document in filter(custom_resources.is_custom, manifests(values)):
        for template in pod_templates([document]):
            pod = {"apiVersion": "v1", "kind": "Pod", **template}
            for version in KUBERNETES:
                kubernetes_validate.validate(pod, version, strict=True)


def test_every_template_renders_in_some_mode():
    rendered = set().union(*(files(values) for values in MODES.values()))
    written = {str(p.relative_to(CHART)) for p in CHART.glob("templates/**/[!_]*.*")}
    assert rendered == written


@every_mode
def test_lint_finds_nothing(values):
    for version in KUBERNETES:
        report = helm.lint(CHART, values, strict=True, kube_version=f"v{version}.0")
        assert not report["errors"]
        # Information, no more: a chart of ours has no icon.
        assert [m["error"] for m in report["messages"]] == ["icon is recommended"]


@every_mode
def test_containers_have_no_rights(values):
    documents = manifests(values)
    assert list(containers(documents))
    for container in containers(documents):
        context = container["securityContext"]
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert context["readOnlyRootFilesystem"] is True
        assert context["allowPrivilegeEscalation"] is False
    for template in pod_templates(documents):
        context = template["spec"]["securityContext"]
        assert context["runAsNonRoot"] is True
        assert context["runAsUser"] > 0
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}
        assert template["spec"]["automountServiceAccountToken"] is False
        assert not template["spec"].keys() & {"hostNetwork", "hostPID", "hostIPC"}


@every_mode
def test_names_are_unique_and_short_enough(values):
    documents = manifests(values)
    names = [(d["kind"], d["metadata"]["name"]) for d in documents]
    assert len(set(names)) == len(names)
    for _, name in names:
        assert re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", name)


@every_mode
def test_what_is_mounted_is_there(values):
    documents = manifests(values)
    made = {(d["kind"], d["metadata"]["name"]) for d in documents}
    theirs = {"weights", "calibration", "chat-templates", "chat-api-key", "hub-token", "hub"}
    for template in pod_templates(documents):
        volumes = {volume["name"]: volume for volume in template["spec"]["volumes"]}
        for container in containers([{"kind": "Pod", **template}]):
            mounts = container.get("volumeMounts", [])
            assert {mount["name"] for mount in mounts} <= volumes.keys()
            assert len({mount["mountPath"] for mount in mounts}) == len(mounts)
            for variable in container.get("env", []):
                secret = variable.get("valueFrom", {}).get("secretKeyRef", {}).get("name")
                assert secret is None or secret in theirs or ("Secret", secret) in made
        for volume in volumes.values():
            claim = volume.get("persistentVolumeClaim", {}).get("claimName")
            assert claim is None or claim in theirs or ("PersistentVolumeClaim", claim) in made
            config = volume.get("configMap", {}).get("name")
            assert config is None or config in theirs or ("ConfigMap", config) in made
        account = template["spec"]["serviceAccountName"]
        assert ("ServiceAccount", account) in made or account == "models"


def selects(selector, labels):
    return selector.items() <= labels.items()


@every_mode
def test_selectors_find_the_servers(values):
    documents = manifests(values)
    workload = next(d for d in documents if d["kind"] in ("Deployment", "LeaderWorkerSet"))
    groups = workload["kind"] == "LeaderWorkerSet"
    template = next(pod_templates([workload]))
    pod = dict(template["metadata"]["labels"])
    ports = {port["name"] for port in template["spec"]["containers"][0]["ports"]}
    # What the controller of LeaderWorkerSets adds to each pod.
    worker = {**pod, "leaderworkerset.sigs.k8s.io/worker-index": "1"}
    if groups:
        pod["leaderworkerset.sigs.k8s.io/worker-index"] = "0"
    others = [
        t["metadata"]["labels"]
        for d in documents
        if d["kind"] in ("Job", "Pod")
        for t in pod_templates([d])
    ]
    service = only(documents, "Service")
    selectors = {"Service": service["spec"]["selector"]}
    if not groups:
        selectors["Deployment"] = workload["spec"]["selector"]["matchLabels"]
    for document in documents:
        if document["kind"] in ("PodDisruptionBudget", "PodMonitor"):
            selectors[document["kind"]] = document["spec"]["selector"]["matchLabels"]
        if document["kind"] == "ServiceMonitor":
            selector = document["spec"]["selector"]["matchLabels"]
            assert selects(selector, service["metadata"]["labels"])
            assert document["spec"]["endpoints"][0]["port"] == service["spec"]["ports"][0]["name"]
        if document["kind"] == "PodMonitor":
            assert document["spec"]["podMetricsEndpoints"][0]["port"] in ports
        if document["kind"] == "NetworkPolicy":
            selector = document["spec"]["podSelector"]["matchLabels"]
            assert selects(selector, pod)
            assert not any(selects(selector, labels) for labels in others)
            assert document["spec"]["ingress"][0]["ports"] == [{"port": "http"}]
        if document["kind"] in ("HorizontalPodAutoscaler", "ScaledObject"):
            target = document["spec"]["scaleTargetRef"]
            assert target == {
                "apiVersion": workload["apiVersion"],
                "kind": workload["kind"],
                "name": workload["metadata"]["name"],
            }
            assert "replicas" not in workload["spec"]
    for selector in selectors.values():
        assert selects(selector, pod)
        assert not any(selects(selector, labels) for labels in others)
        assert not groups or not selects(selector, worker)
    assert service["spec"]["ports"][0]["targetPort"] in ports


@every_mode
def test_routes_lead_to_the_service(values):
    documents = manifests(values)
    service = only(documents, "Service")
    name, port = service["metadata"]["name"], service["spec"]["ports"][0]
    for document in documents:
        if document["kind"] == "Ingress":
            for rule in document["spec"]["rules"]:
                (path,) = rule["http"]["paths"]
                assert path["path"] == "/v1"
                backend = path["backend"]["service"]
                assert backend == {"name": name, "port": {"name": port["name"]}}
        if document["kind"] == "HTTPRoute":
            (rule,) = document["spec"]["rules"]
            assert rule["matches"] == [{"path": {"type": "PathPrefix", "value": "/v1"}}]
            assert rule["backendRefs"] == [{"name": name, "port": port["port"]}]


def test_the_autoscaler_asks_for_our_pods_alone():
    documents = manifests(MODES["four-gpus-autoscaling"])
    waiting, kept = only(documents, "ScaledObject")["spec"]["triggers"]
    assert waiting["metadata"]["threshold"] == "8"
    assert kept["metadata"]["threshold"] == "60000000000"
    queries = {}
    for trigger in (waiting, kept):
        name, namespace, pods = re.fullmatch(
            r'sum\(([a-z_:]+)\{namespace="(.*)", pod=~"(.*)"\}\)', trigger["metadata"]["query"]
        ).groups()
        assert namespace == NAMESPACE
        queries[name] = pods
    assert queries.keys() == {"vllm:num_requests_waiting", "mixeddim:kept_bytes"}
    for pods in queries.values():
        # Prometheus anchors regular expressions.
        assert re.fullmatch(pods, f"{FULL_NAME}-5d8f9c7b6d-x2x4z")
        assert re.fullmatch(pods, f"{FULL_NAME}-0")
        assert not re.fullmatch(pods, f"{FULL_NAME}-5d8f9c7b6d-x2x4z-other")
        assert not re.fullmatch(pods, f"other-{FULL_NAME}-5d8f9c7b6d-x2x4z")


def test_the_horizontal_autoscaler_counts_both():
    metrics = only(manifests(MODES["hpa"]), "HorizontalPodAutoscaler")["spec"]["metrics"]
    assert {m["pods"]["metric"]["name"]: m["pods"]["target"]["averageValue"] for m in metrics} == {
        "vllm_num_requests_waiting": "5",
        "mixeddim_kept_bytes": "40000000000",
    }


def test_rules_and_dashboard_come_from_the_charts_files():
    documents = manifests(MODES["monitoring"])
    rules = yaml.safe_load((CHART / "files/rules.yaml").read_text())
    assert only(documents, "PrometheusRule")["spec"] == rules
    dashboard = only(documents, "ConfigMap", f"{FULL_NAME}-dashboard")["data"]["mixeddim.json"]
    assert dashboard.strip() == (CHART / "files/dashboard.json").read_text().strip()


def test_extra_manifests_are_templates():
    documents = manifests(MODES["extras"])
    assert only(documents, "ConfigMap", f"{FULL_NAME}-extra")["data"] == {"port": "80"}
    only(documents, "ConfigMap", f"{NAME}-text")


def test_a_key_is_made_and_differs():
    secrets = [only(manifests(MODES["defaults"]), "Secret") for _ in range(2)]
    keys = [secret["data"]["api-key"] for secret in secrets]
    assert keys[0] != keys[1]
    assert all(len(key) >= 40 for key in keys)
    assert not [d for d in manifests(MODES["one-gpu"]) if d["kind"] == "Secret"]
    assert not [d for d in manifests(MODES["no-volumes"]) if d["kind"] == "Secret"]


@pytest.mark.skipif(shutil.which("helm") is None, reason="the command helm is not installed")
def test_the_command_helm_agrees(tmp_path):
    def comparable(documents):
        return sorted(
            (d["kind"], d["metadata"]["name"], yaml.safe_dump(d))
            for d in documents
            if d and d["kind"] != "Secret"
        )

    for name, values in MODES.items():
        given = tmp_path / f"{name}.yaml"
        given.write_text(yaml.safe_dump(values))
        subprocess.run(["helm", "lint", "--strict", CHART, "--values", given], check=True)
        printed = subprocess.run(
            ["helm", "template", NAME, CHART, "--namespace", NAMESPACE, "--values", given],
            check=True, capture_output=True, text=True,
        ).stdout  # fmt: skip
        assert comparable(yaml.safe_load_all(printed)) == comparable(manifests(values))
