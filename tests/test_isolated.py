"""What minilora starts imports it and nothing of the current folder."""

import re
import subprocess
import sys
from pathlib import Path

from minilora.isolated import environment
from minilora.report.plot import plot_loss

ROOT = Path(__file__).parent.parent / "minilora"


def test_a_file_of_the_current_folder_is_not_imported(tmp_path, monkeypatch):
    for name in ("argparse", "torch", "json", "minilora"):
        (tmp_path / f"{name}.py").write_text("open('was-here', 'w').close()")
    monkeypatch.chdir(tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "minilora", "--version"], env=environment(), capture_output=True, check=True
    )
    assert done.stdout.startswith(b"minilora ") and not (tmp_path / "was-here").exists()


def test_every_process_is_started_so():
    """Python that is started by this one: isolated (-I), or in that environment; torchrun takes this process's."""
    for path in ROOT.rglob("*.py"):
        text = path.read_text()
        if re.search(r"\[\s*sys\.executable", text) and "kernels" not in path.parts:
            assert '"-I"' in text or "env=environment()" in text, path
    assert "os.environ.update(environment())" in (ROOT / "ranks" / "start.py").read_text()


def test_no_matplotlibrc_of_the_current_folder_is_read(tmp_path, monkeypatch):
    """Its axes.prop_cycle was evaluated as Python in matplotlib's older versions."""
    (tmp_path / "matplotlibrc").write_text("axes.prop_cycle: cycler(color=[1/0])")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # an import fails
    assert "the matplotlibrc in the current folder" in plot_loss(tmp_path)
