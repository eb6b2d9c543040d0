"""Golden manifests of the chart's examples: what an installation sends to Kubernetes.

    python tests/helm/golden.py

writes them anew; read the difference before committing it.
"""

import re
from pathlib import Path

from chart import example, files

GOLDEN = Path(__file__).parent / "golden"
INSTALLS = ("one-gpu", "four-gpus-autoscaling", "cpu-demo", "long-agents")


def golden(install):
    """All manifests of an example as one text; the random key has a name instead.

    The contents of the chart's own files are left out: they are under version control already.
    """
    parts = []
    for path, text in sorted(files(example(install)).items()):
        if path.endswith(".yaml"):
            text = re.sub(r"(?m)^(  api-key: )\S{20,}$", r"\1<random>", text)
            text = re.sub(
                r"(?m)^(  \S+\.(?:json|py): \|-\n)(?:    .*\n|\s*\n)+", r"\1    ...\n", text
            )
            text = re.sub(r"(?ms)^(spec:\n  )# Prometheus rules.*", r"\1...", text)
            parts.append(f"# {path}\n{text.strip()}\n")
    return "---\n".join(parts)


if __name__ == "__main__":
    for name in INSTALLS:
        (GOLDEN / f"{name}.yaml").write_text(golden(name))
