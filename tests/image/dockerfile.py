"""The Dockerfile as stages of instructions."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "Dockerfile"


@dataclass
class Stage:
    """One FROM, and what follows it: instruction and the rest of its line."""

    name: str
    base: str
    instructions: list[tuple[str, str]] = field(default_factory=list)


def stages():
    """Stages by name, in the order of the file."""
    text = re.sub(r"(?m)^#.*\n", "", DOCKERFILE.read_text()).replace("\\\n", " ")
    found = {}
    stage = None
    for line in filter(None, map(str.strip, text.splitlines())):
        instruction, rest = line.split(maxsplit=1)
        if instruction == "FROM":
            base, _, name = rest.split()
            stage = found[name] = Stage(name, base)
        elif stage:
            stage.instructions.append((instruction, rest.strip()))
    return found


def lineage(name):
    """Instructions of a stage and of the stages it is built from, first to last."""
    every = stages()
    stage = every[name]
    before = lineage(stage.base) if stage.base in every else []
    return [*before, *stage.instructions]


def environment(name):
    """ENV of an image, with $PATH taken from a plain system."""
    variables = {"PATH": "/usr/local/bin:/usr/bin:/bin"}
    for instruction, rest in lineage(name):
        if instruction == "ENV":
            for variable, value in re.findall(r"(\w+)=(\S+)", rest):
                variables[variable] = value.replace("$PATH", variables["PATH"])
    return variables


def health_check(name):
    """The command of HEALTHCHECK."""
    (rest,) = [rest for instruction, rest in lineage(name) if instruction == "HEALTHCHECK"]
    return json.loads(rest[rest.index("CMD") + 3 :])
