"""Programs that scripts/setup-cpu.sh --dev puts beside the interpreter."""

import os
import shutil
import sys
from pathlib import Path


def program(name, script):
    """Path of a program.

    Args:
        name: its name.
        script: what installs it.
    """
    beside = str(Path(sys.executable).parent)
    found = shutil.which(name, path=os.pathsep.join([beside, os.environ["PATH"]]))
    assert found, f"there is no {name}; {script} gets it"
    return found
