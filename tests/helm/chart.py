"""The chart, rendered by Helm's own engine (PyPI helm-python-sdk: Helm 4 as a library)."""

from functools import cache
from pathlib import Path

import helm_python as helm
import yaml

CHART = Path(__file__).parents[2] / "deploy/helm/mdkv-vllm"
EXAMPLES = CHART / "examples"
NAME, NAMESPACE = "demo", "models"
FULL_NAME = "demo-mdkv-vllm"

MODEL = {"model": {"name": "/models/example"}}
"""The least that an installation has to say."""


def example(name):
    """Values of one of the chart's examples."""
    return yaml.safe_load((EXAMPLES / f"{name}.yaml").read_text())


def with_model(values):
    """Values with a model, where they name none."""
    return {**values, "model": {**MODEL["model"], **values.get("model", {})}}


@cache
def loaded():
    return helm.Chart.load(CHART)


def files(values):
    """Rendered text by template file, without what came out empty.

    Raises:
        helm.HelmError: the values are refused, or a template fails.
    """
    loaded().validate_schema(values)
    rendered = loaded().render(values, name=NAME, namespace=NAMESPACE)
    return {path.split("/", 1)[1]: text for path, text in rendered.items() if text.strip()}


def manifests(values):
    """Rendered manifests, as objects, in the order of their files."""
    found = []
    for path, text in sorted(files(values).items()):
        if path.endswith(".yaml"):
            found += [document for document in yaml.safe_load_all(text) if document]
    return found


def only(documents, kind, name=None):
    """The one manifest of a kind (and name)."""
    found = [d for d in documents if d["kind"] == kind and name in (None, d["metadata"]["name"])]
    assert len(found) == 1, f"{len(found)} of {kind} {name or ''}"
    return found[0]


def pod_templates(documents):
    """Every pod specification with its labels: of Deployments, Jobs, groups and bare pods."""
    for document in documents:
        spec = document.get("spec", {})
        if document["kind"] == "Pod":
            yield document
        elif document["kind"] in ("Deployment", "Job"):
            yield spec["template"]
        elif document["kind"] == "LeaderWorkerSet":
            yield spec["leaderWorkerTemplate"]["leaderTemplate"]
            yield spec["leaderWorkerTemplate"]["workerTemplate"]


def containers(documents):
    """Every container and init container."""
    for template in pod_templates(documents):
        yield from template["spec"].get("initContainers", [])
        yield from template["spec"]["containers"]
