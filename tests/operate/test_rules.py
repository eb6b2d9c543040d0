"""The chart's Prometheus rules and dashboard, as Prometheus' own tool and docs see them."""

import json
import re
import subprocess
from pathlib import Path

import pytest
import yaml
from programs import program

from mdkv_vllm.plugin.metrics.table import METRICS

ROOT = Path(__file__).parents[2]
FILES = ROOT / "deploy" / "helm" / "mdkv-vllm" / "files"
GUIDE = (ROOT / "docs" / "operations.md").read_text()


def rules():
    groups = yaml.safe_load((FILES / "rules.yaml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def alerts():
    return [rule for rule in rules() if "alert" in rule]


def promtool(*arguments):
    command = [program("promtool", "scripts/setup-prometheus.sh"), *map(str, arguments)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def test_promtool_finds_no_fault():
    assert f"{len(rules())} rules found" in promtool("check", "rules", FILES / "rules.yaml")


def test_rules_do_what_they_say():
    assert "SUCCESS" in promtool("test", "rules", Path(__file__).with_name("rules_test.yaml"))


def test_every_alert_is_tested():
    tests = yaml.safe_load(Path(__file__).with_name("rules_test.yaml").read_text())["tests"]
    fired = {
        case["alertname"]
        for test in tests
        for case in test.get("alert_rule_test", [])
        if case["exp_alerts"]
    }
    assert fired == {rule["alert"] for rule in alerts()}


@pytest.mark.parametrize("rule", alerts(), ids=lambda rule: rule["alert"])
def test_every_alert_has_its_section(rule):
    name = rule["alert"]
    assert f"\n### {name}\n" in GUIDE
    assert rule["annotations"]["runbook_url"] == f"docs/operations.md#{name.lower()}"


def test_no_section_is_of_an_alert_that_does_not_exist():
    sections = re.findall(r"^### (MixedDim\w+)$", GUIDE, re.M)
    assert sections == [rule["alert"] for rule in alerts()]


def test_the_guide_has_exactly_the_metrics_that_exist():
    table = re.findall(r"^\| `(mixeddim:[\w:]+)` \|", GUIDE, re.M)
    recorded = [rule["record"] for rule in rules() if "record" in rule]
    assert table == [metric.exposed_name for metric in METRICS] + recorded


def test_labels_in_the_guide_are_those_of_the_metrics():
    for metric in METRICS:
        row = re.search(rf"^\| `{metric.exposed_name}` \|([^|]*)\|([^|]*)\|", GUIDE, re.M)
        assert row[1].strip() == metric.kind
        assert tuple(re.findall(r"`(\w+)`", row[2])) == metric.labels


def test_rules_and_dashboard_name_only_metrics_that_exist():
    names = {metric.exposed_name for metric in METRICS}
    for metric in METRICS:
        if metric.kind == "histogram":
            names |= {f"{metric.name}_{part}" for part in ("bucket", "sum", "count")}
    names |= {rule["record"] for rule in rules() if "record" in rule}
    text = (FILES / "rules.yaml").read_text() + (FILES / "dashboard.json").read_text()
    used = set(re.findall(r"mixeddim:[\w:]+", text))
    assert used <= names
    assert {metric.name for metric in METRICS} <= {
        re.sub("_(total|bucket|sum|count)$", "", name) for name in used
    }


def test_dashboard_panels_do_not_overlap():
    cells = set()
    panels = json.loads((FILES / "dashboard.json").read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        place = panel["gridPos"]
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert x < 24
                assert (x, y) not in cells, panel["title"]
                cells.add((x, y))
