"""A sweep whose terminal is closed, gone or of another alphabet still does and stores all that it was asked for."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_recall import TABLE

SCRIPT = """
import sys
from functools import partial
from pathlib import Path

import fake_pipeline
from vlprune.sweep.command import sweep
from vlprune.sweep.local import local_pool
from vlprune.sweep.options import Options
from vlprune.sweep.screen import console

if __name__ == "__main__":
    screen = console()
    from test_recall import CountingPlanner

    options = Options(table=Path(sys.argv[1]), results=Path(sys.argv[2]), jobs=1)
    sys.exit(sweep(options, CountingPlanner(), partial(local_pool, fake_pipeline.work), screen))
"""


@pytest.mark.parametrize("shell", ["python {} >&-", "python {} <&- >&- 2>&-", "(python {}; echo $? >code) | head -1"])
@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
def test_the_display_never_decides_about_the_work(tmp_path, shell, encoding):
    table, results, script = tmp_path / "tåble–1.toml", tmp_path / "results [/x]", tmp_path / "script.py"
    table.write_text(TABLE.format(model="tiny-xvlm"))
    script.write_text(SCRIPT)
    words = [f"'{script}'", f"'{table}'", f"'{results}'"]
    code = tmp_path / "code"
    here = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    done = subprocess.run(
        ["bash", "-c", shell.replace("python", sys.executable).replace(">code", f">{code}").format(" ".join(words))],
        env={**os.environ, "PYTHONIOENCODING": encoding, "PYTHONPATH": os.pathsep.join(here)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",
    )
    assert (code.read_text().strip() if code.exists() else str(done.returncode)) == "0", done.stderr
    assert "Traceback" not in done.stderr
    assert len(list((results / "runs").glob("*/record.json"))) == 3
    assert (results / "tables" / "tåble–1.md").is_file()


def test_a_closed_descriptor_stays_taken_in_processes_that_are_started():
    code = "import subprocess, sys; from vlprune.sweep.screen import console; console(); "
    code += "sys.exit(subprocess.run([sys.executable, '-c', 'import os; os.fstat(1)']).returncode)"
    assert subprocess.run(["bash", "-c", f'{sys.executable} -c "{code}" >&-'], check=False).returncode == 0
