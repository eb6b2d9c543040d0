"""values.schema.json: what it refuses, that Helm and Python agree, and what it is made from."""

import json
import re

import helm_python as helm
import jsonschema
import pytest
import yaml
from chart import CHART, EXAMPLES, MODEL, files, loaded, manifests
from golden import INSTALLS
from modes import MODES

from mdkv_vllm.settings_schema import settings_schema

SCHEMA = json.loads((CHART / "values.schema.json").read_text())
DEFAULTS = yaml.safe_load((CHART / "values.yaml").read_text())


def merged(values, over=DEFAULTS):
    """Values over the chart's defaults, as Helm merges them: maps deeply, null removes."""
    result = dict(over)
    for name, value in values.items():
        if value is None and name in over:
            del result[name]
        elif isinstance(value, dict) and isinstance(over.get(name), dict):
            result[name] = merged(value, over[name])
        else:
            result[name] = value
    return result


def test_the_settings_come_from_the_code():
    assert SCHEMA["properties"]["mixeddim"] == settings_schema(), "run: make chart"


def test_the_schema_is_one_and_names_every_value():
    jsonschema.Draft7Validator.check_schema(SCHEMA)
    # global is what Helm hands to a chart that is part of another.
    assert list(SCHEMA["properties"]) == ["global", *DEFAULTS]


@pytest.mark.parametrize("values", MODES.values(), ids=MODES)
def test_right_values_pass(values):
    jsonschema.validate(merged(values), SCHEMA)
    loaded().validate_schema(values)


WRONG = {
    "unknown": {"replicas": 2},
    "unknown-deeper": {"server": {"maxModelLength": 100}},
    "device": {"device": "gpu"},
    "port": {"server": {"port": 80}},
    "port-text": {"service": {"port": "80"}},
    "gpus": {"gpu": {"count": 0}},
    "replicas": {"replicaCount": 1.5},
    "digest": {"image": {"digest": "sha256:abc"}},
    "pull-policy": {"image": {"pullPolicy": "Sometimes"}},
    "quantity": {"sharedMemory": {"size": "8 GB"}},
    "resources": {"resources": {"limits": {"memory": "lots"}}},
    "volume": {"models": {"volume": "claim"}},
    "no-claim": {"models": {"volume": "existing"}},
    "no-artifacts-claim": {"artifacts": {"volume": "existing"}},
    "calibration-of-nothing": {
        "artifacts": {"volume": "new"},
        "calibration": {"enabled": True, "headScores": False},
    },
    "calibration-to-nowhere": {"calibration": {"enabled": True}},
    "nodes-without-gpus": {"device": "cpu", "multiNode": {"enabled": True}},
    "one-node": {"multiNode": {"enabled": True, "nodes": 1}},
    "embedded-on-gpu": {"model": {"embedded": True}},
    "embedded-nowhere": {
        "device": "cpu",
        "model": {"embedded": True},
        "models": {"volume": "none"},
    },
    "embedded-read-only": {
        "device": "cpu",
        "model": {"embedded": True},
        "models": {"readOnly": True},
    },
    "two-monitors": {
        "metrics": {"serviceMonitor": {"enabled": True}, "podMonitor": {"enabled": True}}
    },
    "no-host": {"ingress": {"enabled": True}},
    "no-parent": {"httpRoute": {"enabled": True}},
    "autoscaler": {"autoscaling": {"kind": "vpa"}},
    "kept-bytes": {"autoscaling": {"kind": "keda", "keptBytes": "40G"}},
    "settings-elsewhere": {"extraArgs": ["--additional-config={}"]},
    "budget": {"mixeddim": {"budget": 1.5}},
    "budget-name": {"mixeddim": {"budgt": 0.5}},
    "two-budgets": {"mixeddim": {"budget": 0.5, "budget_tokens": 100}},
    "window": {"mixeddim": {"window": 0}},
    "format": {"mixeddim": {"formats": ["drop", "i3"]}},
    "basis": {"mixeddim": {"basis": "prompt"}},
}


@pytest.mark.parametrize("values", WRONG.values(), ids=WRONG)
def test_wrong_values_are_refused(values):
    assert not jsonschema.Draft7Validator(SCHEMA).is_valid(merged(values))
    with pytest.raises(helm.HelmError):
        loaded().validate_schema(values)


def test_refusals_name_the_value():
    with pytest.raises(helm.HelmError, match="/mixeddim/budget"):
        files({**MODEL, "mixeddim": {"budget": 1.5}})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "model.name is empty"),
        (
            {
                **MODEL,
                "artifacts": {"volume": "new"},
                "calibration": {"enabled": True, "basis": True},
                "mixeddim": {"formats": ["drop", "i4", "full"]},
            },
            "no format with a rank",
        ),
        ({**MODEL, "autoscaling": {"kind": "hpa", "minReplicas": 5}}, "above autoscaling.max"),
    ],
)
def test_what_a_schema_cannot_say_is_refused_by_templates(values, message):
    with pytest.raises(helm.HelmRenderError, match=message):
        manifests(values)


def flattened(values, stops, prefix=""):
    """Values by dotted path, down to the paths in ``stops`` or to what is no map with entries."""
    for name, value in values.items():
        path = f"{prefix}{name}"
        if isinstance(value, dict) and value and path not in stops:
            yield from flattened(value, stops, f"{path}.")
        else:
            yield path, value


def test_the_readme_lists_every_value_with_its_default():
    table = (CHART / "README.md").read_text()
    rows = re.findall(r"^\| `([^`]+)` \| (?:`([^`]*)` )?\| (?:.+ )?\|$", table, re.M)
    listed = [(name, yaml.safe_load(default) if default else "") for name, default in rows]
    assert listed == list(flattened(DEFAULTS, dict(listed)))


def test_every_example_is_tested():
    names = {path.stem for path in EXAMPLES.glob("*.yaml")}
    assert names == {*INSTALLS, "production-stack"}
