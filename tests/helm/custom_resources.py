"""Shapes of the custom resources the chart makes, from their published API references.

Kubernetes' own schemas do not hold them. Written by hand and closed: a field that is misspelt,
or at the wrong depth, is not in the shape. Only what the chart uses is listed.
"""

import jsonschema

STRING = {"type": "string", "minLength": 1}
STRINGS = {"type": "object", "additionalProperties": STRING}
DURATION = {"type": "string", "pattern": "^[0-9]+(ms|s|m|h)$"}
COUNT = {"type": "integer", "minimum": 1}
WINDOW = {"type": "integer", "minimum": 0, "maximum": 3600}


def closed(required=(), **properties):
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


def array(items, least=1):
    return {"type": "array", "items": items, "minItems": least}


SELECTOR = closed(["matchLabels"], matchLabels=STRINGS)
ENDPOINT = closed(
    ["port", "path", "interval"],
    port=STRING, path=STRING, interval=DURATION, scrapeTimeout=DURATION,
)  # fmt: skip
RULE = {
    "type": "object",
    "properties": {
        "alert": STRING, "record": STRING, "expr": {"type": ["string", "integer"]},
        "for": DURATION, "keep_firing_for": DURATION, "labels": STRINGS, "annotations": STRINGS,
    },
    "required": ["expr"],
    "oneOf": [{"required": ["alert"]}, {"required": ["record"]}],
    "additionalProperties": False,
}  # fmt: skip
TRIGGER = closed(
    ["type", "metadata"],
    type={"const": "prometheus"},
    metricType={"enum": ["AverageValue", "Value"]},
    metadata=closed(
        ["serverAddress", "query", "threshold"],
        serverAddress=STRING, query=STRING,
        threshold={"type": "string", "pattern": "^[0-9]+$"},
    ),
)  # fmt: skip
POD_TEMPLATE = closed(
    ["metadata", "spec"], metadata=closed([], labels=STRINGS, annotations=STRINGS), spec={}
)

SPECIFICATIONS = {
    ("monitoring.coreos.com/v1", "ServiceMonitor"): closed(
        ["selector", "endpoints"], selector=SELECTOR, endpoints=array(ENDPOINT)
    ),
    ("monitoring.coreos.com/v1", "PodMonitor"): closed(
        ["selector", "podMetricsEndpoints"], selector=SELECTOR, podMetricsEndpoints=array(ENDPOINT)
    ),
    ("monitoring.coreos.com/v1", "PrometheusRule"): closed(
        ["groups"],
        groups=array(closed(["name", "rules"], name=STRING, interval=DURATION, rules=array(RULE))),
    ),
    ("gateway.networking.k8s.io/v1", "HTTPRoute"): closed(
        ["parentRefs", "rules"],
        parentRefs=array(closed(["name"], name=STRING, namespace=STRING, sectionName=STRING)),
        hostnames=array(STRING),
        rules=array(
            closed(
                ["matches", "backendRefs"],
                matches=array(closed(path=closed(["type", "value"], type=STRING, value=STRING))),
                filters=array({"type": "object", "required": ["type"]}),
                backendRefs=array(closed(["name", "port"], name=STRING, port=COUNT)),
                timeouts=closed(request=DURATION, backendRequest=DURATION),
            )
        ),
    ),
    ("keda.sh/v1alpha1", "ScaledObject"): closed(
        ["scaleTargetRef", "triggers"],
        scaleTargetRef=closed(["name"], apiVersion=STRING, kind=STRING, name=STRING),
        minReplicaCount=COUNT,
        maxReplicaCount=COUNT,
        pollingInterval=COUNT,
        advanced=closed(
            horizontalPodAutoscalerConfig=closed(
                behavior=closed(scaleDown=closed(stabilizationWindowSeconds=WINDOW))
            )
        ),
        triggers=array(TRIGGER),
    ),
    ("leaderworkerset.x-k8s.io/v1", "LeaderWorkerSet"): closed(
        ["leaderWorkerTemplate"],
        replicas={"type": "integer", "minimum": 0},
        leaderWorkerTemplate=closed(
            ["size", "workerTemplate"],
            size=COUNT,
            restartPolicy={"enum": ["RecreateGroupOnPodRestart", "None"]},
            leaderTemplate=POD_TEMPLATE,
            workerTemplate=POD_TEMPLATE,
        ),
    ),
}


def is_custom(document):
    return (document["apiVersion"], document["kind"]) in SPECIFICATIONS


def check(document):
    """Raise unless a custom resource has its shape."""
    shape = closed(
        ["apiVersion", "kind", "metadata", "spec"],
        apiVersion=STRING,
        kind=STRING,
        metadata=closed(
            ["name", "namespace"], name=STRING, namespace=STRING, labels=STRINGS,
            annotations=STRINGS,
        ),
        spec=SPECIFICATIONS[document["apiVersion"], document["kind"]],
    )  # fmt: skip
    jsonschema.validate(document, shape)
