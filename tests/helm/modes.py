"""Values that turn on, between them, every template and every branch of the chart."""

from chart import example, with_model

ON = {"enabled": True}
ARTIFACTS = {"artifacts": {"volume": "new"}}

MODES = {
    "defaults": {},
    "one-gpu": example("one-gpu"),
    "four-gpus-autoscaling": example("four-gpus-autoscaling"),
    "cpu-demo": example("cpu-demo"),
    "long-agents": example("long-agents"),
    "several-nodes": {
        "multiNode": {"enabled": True, "nodes": 4},
        "gpu": {"count": 8, "runtimeClassName": "nvidia"},
        "replicaCount": 2,
        "podDisruptionBudget": ON,
        "topologySpreadConstraints": [
            {
                "maxSkew": 1,
                "topologyKey": "topology.kubernetes.io/zone",
                "whenUnsatisfiable": "DoNotSchedule",
                "labelSelector": {"matchLabels": {"app.kubernetes.io/component": "server"}},
            }
        ],
    },
    "several-nodes-keda": {
        "multiNode": ON,
        "autoscaling": {"kind": "keda"},
        "metrics": {"podMonitor": {"enabled": True, "labels": {"release": "prometheus"}}},
    },
    "hpa": {"autoscaling": {"kind": "hpa", "keptBytes": 40_000_000_000}},
    "hpa-on-waiting-alone": {"autoscaling": {"kind": "hpa"}},
    "several-nodes-hpa": {"multiNode": ON, "autoscaling": {"kind": "hpa"}},
    "basis": {
        **ARTIFACTS,
        "mixeddim": {"formats": ["drop", "r16", "r32i8", "i4", "full"], "budget_tokens": 1_000_000},
        "calibration": {"enabled": True, "basis": True, "basisArgs": ["--max-tokens", "4096"]},
    },
    "basis-of-the-papers-formats": {
        **ARTIFACTS,
        "mixeddim": {"formats": "paper"},
        "calibration": {"enabled": True, "headScores": False, "basis": True, "gpus": 1},
    },
    "own-scores-beside-calibration": {
        **ARTIFACTS,
        "mixeddim": {"heads": "/artifacts/mine.safetensors"},
        "calibration": ON,
    },
    "existing-volumes": {
        "models": {"volume": "existing", "existingClaim": "weights", "readOnly": True},
        "artifacts": {"volume": "existing", "existingClaim": "calibration"},
        "huggingFace": {"offline": True, "tokenSecret": "hub"},
    },
    "no-volumes": {"models": {"volume": "none"}, "apiKey": {"enabled": False}},
    "new-volumes": {
        **ARTIFACTS,
        "models": {
            "storageClassName": "fast",
            "accessModes": ["ReadWriteMany"],
            "annotations": {"team": "search"},
        },
    },
    "names": {
        "fullnameOverride": "vllm",
        "image": {"digest": f"sha256:{'0' * 64}", "pullSecrets": [{"name": "registry"}]},
        "serviceAccount": {"create": False, "name": "models"},
        "service": {
            "type": "LoadBalancer",
            "annotations": {"example.com/internal": "true"},
            "labels": {"tier": "gpu"},
        },
    },
    "long-names": {"nameOverride": "a-name-that-is-much-longer-than-it-should-ever-have-been"},
    "account": {"serviceAccount": {"annotations": {"example.com/role": "models"}}},
    "entrances": {
        "ingress": {
            "enabled": True,
            "annotations": {"nginx.ingress.kubernetes.io/proxy-read-timeout": "600"},
            "hosts": ["a.example.com", "b.example.com"],
        },
        "httpRoute": {
            "enabled": True,
            "parentRefs": [{"name": "public"}],
            "annotations": {"owner": "search"},
            "filters": [
                {
                    "type": "RequestHeaderModifier",
                    "requestHeaderModifier": {"remove": ["x-debug"]},
                }
            ],
        },
    },
    "no-policy": {"networkPolicy": {"enabled": False}},
    "own-egress": {
        "networkPolicy": {"extraEgress": [{"to": [{"ipBlock": {"cidr": "10.0.0.0/8"}}]}]}
    },
    "server": {
        "server": {
            "port": 8080,
            "maxModelLen": 8192,
            "enforceEager": True,
            "statusEndpoint": True,
            "drainSeconds": 0,
            "preStopSeconds": 0,
        },
        "model": {"revision": "main"},
    },
    "placement": {
        "affinity": {
            "podAntiAffinity": {
                "preferredDuringSchedulingIgnoredDuringExecution": [
                    {
                        "weight": 1,
                        "podAffinityTerm": {
                            "topologyKey": "kubernetes.io/hostname",
                            "labelSelector": {"matchLabels": {"app.kubernetes.io/name": "other"}},
                        },
                    }
                ]
            }
        },
        "podAnnotations": {"example.com/scrape": "no"},
        "podLabels": {"team": "search"},
        "resources": {"limits": None},
    },
    "extras": {
        "extraArgs": ["--max-num-seqs=64", "--generation-config", "vllm"],
        "extraEnv": [{"name": "VLLM_LOGGING_LEVEL", "value": "DEBUG"}],
        "extraVolumes": [{"name": "templates", "configMap": {"name": "chat-templates"}}],
        "extraVolumeMounts": [{"name": "templates", "mountPath": "/templates", "readOnly": True}],
        "extraManifests": [
            {
                "apiVersion": "v1",
                "kind": "ConfigMap",
                "metadata": {"name": '{{ include "mdkv-vllm.fullname" . }}-extra'},
                "data": {"port": "{{ .Values.service.port }}"},
            },
            "apiVersion: v1\nkind: ConfigMap\nmetadata:\n  name: {{ .Release.Name }}-text\n",
        ],
    },
    "monitoring": {
        "metrics": {
            "serviceMonitor": ON,
            "prometheusRule": ON,
            "dashboard": {"enabled": True, "annotations": {"grafana_folder": "vLLM"}},
        }
    },
}
MODES = {name: with_model(values) for name, values in MODES.items()}
