"""The script that a user with a GPU runs, as far as a processor can try it."""

import importlib
import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.fixture
def gpu_check(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "experiments" / "benchmarks"))
    return importlib.import_module("gpu_check")


def test_the_list_of_what_never_ran_on_a_gpu_is_what_is_checked(gpu_check):
    page = (ROOT / "docs" / "devices.md").read_text(encoding="utf-8").split("## What has never run on a GPU")[1]
    named = re.findall(r"^\| ([^|]+) \| [^|]+ \|$", page, re.MULTILINE)
    assert named == [*gpu_check.COMPARED, *gpu_check.WHOLE]


def test_without_a_gpu_it_says_so(gpu_check, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main([]) == 2
    assert capsys.readouterr().err.startswith("there is no CUDA device here")


def test_what_differs_or_raises_has_failed(gpu_check, monkeypatch, capsys):
    mask = torch.tensor([True, False])
    theirs = {name: ({"x": mask}, 0.0) for name in ("same", "error", "other")}
    ours = {**theirs, "error": ("RuntimeError: no luck", 0.0), "other": ({"x": ~mask}, 0.0)}
    monkeypatch.setattr(gpu_check, "COMPARED", dict.fromkeys(theirs, (None, gpu_check.equal)))
    assert gpu_check.compared(ours, theirs) == {
        "same": ("ok", 0.0, "equal bits"),
        "error": ("failed", 0.0, "RuntimeError: no luck"),
        "other": ("failed", 0.0, "1 of 1 differ, the first is x"),
    }
    monkeypatch.setattr(gpu_check, "on_both", lambda device: (ours, theirs))
    monkeypatch.setattr(gpu_check, "WHOLE", {"error of a device": gpu_check.device_error})
    assert gpu_check.main(["--device", "cpu"]) == 1
    assert "| error of a device | not tried | 0 | needs a GPU |" in capsys.readouterr().out


def test_every_check_of_numbers_runs_on_a_processor(gpu_check, scenes_cache):
    """All but the fine-tuning, which has tests of its own, in this process."""
    for name in ("selection", "masks", "gradient rows", "evaluation"):
        compute, agree = gpu_check.COMPARED[name]
        found = compute("cpu")
        assert agree(found, found)
        broken = {key: ~value if value.dtype == torch.bool else 2 * value + 1 for key, value in found.items()}
        with pytest.raises(AssertionError):
            agree(broken, found)
