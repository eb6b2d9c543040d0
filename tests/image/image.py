"""The CPU image's folders, made by the Dockerfile's own steps where no container engine runs."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from dockerfile import ROOT, environment, lineage

SANDBOX = Path(__file__).parent / "sandbox.sh"
USER = 10001
NOT_RUN = ("apt-get update", "groupadd")
"""What the steps that are left out begin with: they change the system the image starts from."""


class Image:
    """A folder with an image's /opt and the volumes that a container writes.

    Attributes:
        folder: on this machine.
    """

    def __init__(self, folder):
        self.folder = folder
        for name in ("opt", "cache", "models"):
            (folder / name).mkdir(parents=True)
        for name in ("cache", "models"):
            os.chown(folder / name, USER, USER)

    def _path(self, path):
        """Where a path of the image lies on this machine."""
        assert path.startswith("/opt/"), path
        return self.folder / path.removeprefix("/")

    def build(self, target, log):
        """Do what the Dockerfile says for a target, and for the stages it copies from."""
        workdir, copied = None, []
        for instruction, rest in lineage(target):
            if instruction == "WORKDIR" and rest.startswith("/opt/"):
                workdir = rest
                self._path(workdir).mkdir(exist_ok=True)
            elif instruction == "COPY" and rest.startswith("--from="):
                stage, source, destination = rest.removeprefix("--from=").split()
                self.build(stage, log)
                copied.append((self._path(source), self._path(destination)))
            elif instruction == "COPY":
                *sources, destination = rest.split()
                for source in sources:
                    self._copy(source, self._path(workdir) / destination)
            elif instruction == "RUN" and rest.startswith("scripts/"):
                self._run(rest, log)
            elif instruction == "RUN":
                assert rest.startswith(NOT_RUN), rest
        for source, destination in copied:
            if source != destination:
                shutil.copytree(source, destination, symlinks=True, dirs_exist_ok=True)

    def _copy(self, source, destination):
        """COPY of what is under version control, as .dockerignore has it."""
        listed = subprocess.run(
            ["git", "ls-files", source], cwd=ROOT, check=True, capture_output=True, text=True
        ).stdout.split()
        assert listed, f"COPY {source} copies nothing"
        for name in listed:
            inside = Path(name).relative_to(source) if Path(name) != Path(source) else ""
            folder = destination / inside if inside else destination / Path(name).name
            folder.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder, follow_symlinks=False)

    def _run(self, command, log):
        stamp = self.folder / command.replace("/", "-")
        if stamp.exists():  # a stage that two others are built from is one stage
            return
        done = subprocess.run(
            [SANDBOX, "build", self.folder, *command.split()],
            env=self._machine() | {"PYTHON": f"{sys.base_prefix}/bin/python3"},
            stdout=log, stderr=subprocess.STDOUT, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}: {Path(log.name).read_text()[-3000:]}"
        stamp.touch()

    @staticmethod
    def _machine():
        """What a builder has: a path, and where pip finds packages."""
        pip = {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
        return {**pip, "PATH": "/usr/local/bin:/usr/bin:/bin", "PYTHON_PREFIX": sys.base_prefix}

    def command(self, *arguments):
        """A command line that runs in a container of the image."""
        return [str(SANDBOX), "run", str(self.folder), *arguments]

    def environment(self, target, **variables):
        """The image's environment and what an operator adds."""
        return {**environment(target), "PYTHON_PREFIX": sys.base_prefix, **variables}
