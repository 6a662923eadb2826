"""Python processes that minilora starts: they import it, and nothing that lies in the current folder.

`python -m` looks into the current folder first: there a file torch.py of a stranger's folder would be run.
"""

import os
from pathlib import Path

PARENT = Path(__file__).absolute().parents[1]


def environment() -> dict[str, str]:
    """The environment for such a process, which begins with `sys.executable -m minilora...`."""
    paths = filter(None, [str(PARENT), os.environ.get("PYTHONPATH")])
    return os.environ | {"PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join(paths)}
