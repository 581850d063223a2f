import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode

from vlprune.calibrate.rows import Rows, WithRows
from vlprune.pruners import PRUNERS, prune_masks

SHAPES = {"vision": (30, 20), "text": (8, 50)}


def gradients(n=5):
    generator = torch.Generator().manual_seed(0)
    return [{name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()} for _ in range(n)]


def filled(**settings):
    rows = Rows(**settings)
    for batch in gradients():
        for name, gradient in batch.items():
            rows.append(name, gradient)
    return rows


@pytest.mark.parametrize("limit", [0, 5_000, 1 << 20])
def test_rows_are_what_was_added_wherever_they_are(tmp_path, limit):
    rows = filled(directory=tmp_path / "new", memory_limit=limit)
    assert rows.spilled == (limit < 1 << 20)
    for _ in range(2):
        for name in SHAPES:
            assert torch.equal(rows[name], torch.stack([batch[name].flatten() for batch in gradients()]))


def test_rows_leave_their_device_and_come_back_to_it_a_layer_at_a_time():
    rows = Rows()
    with FakeTensorMode():  # tensors without values, of devices that need not be there
        for _ in range(3):
            for name, shape in SHAPES.items():
                rows.append(name, torch.empty(shape, device="cuda"))
        for name, shape in SHAPES.items():
            assert rows[name].device.type == "cuda"
            assert rows[name].shape == (3, shape[0] * shape[1])
        stored = [row for own in rows._memory.values() for row in own]
    assert {row.device.type for row in stored} == {"cpu"}
    assert sum(row.nbytes for row in stored) == 3 * 4 * (600 + 400)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("limit", [0, 1 << 20])
def test_on_a_gpu_rows_take_the_memory_of_one_layer(tmp_path, limit):
    torch.cuda.reset_peak_memory_stats()
    before, rows = torch.cuda.memory_allocated(), Rows(tmp_path, limit)
    for batch in gradients():
        for name, gradient in batch.items():
            rows.append(name, gradient.cuda())
    assert torch.cuda.memory_allocated() == before
    for name in SHAPES:
        assert torch.equal(rows[name].cpu(), torch.stack([batch[name].flatten() for batch in gradients()]))


def test_rows_can_be_added_after_they_were_read(tmp_path):
    for limit in (0, 1 << 20):
        rows = filled(directory=tmp_path, memory_limit=limit)
        assert rows["text"].shape == (5, 400)
        rows.append("text", torch.ones(8, 50))
        assert rows["text"].shape == (6, 400)
        assert (rows["text"][-1] == 1).all()


def test_writing_into_rows_does_not_reach_the_file(tmp_path):
    rows = filled(directory=tmp_path, memory_limit=0)
    rows["text"].zero_()
    assert rows["text"].any()


def test_no_file_is_left_even_while_rows_are_in_use(tmp_path):
    rows = filled(directory=tmp_path, memory_limit=0)
    assert rows["text"].any()
    assert list(tmp_path.iterdir()) == []


def test_no_file_is_left_by_a_process_that_is_killed(tmp_path):
    code = (
        "import os, signal, sys, torch\nfrom pathlib import Path\nfrom vlprune.calibrate.rows import Rows\n"
        "rows = Rows(Path(sys.argv[1]), 0)\nrows.append('a', torch.ones(1000))\n"
        "assert rows['a'].sum() == 1000\nos.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=Path(__file__).parents[1], check=False)
    assert done.returncode == -9
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_a_full_disk_is_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.TemporaryFile", lambda dir: open("/dev/full", "wb", buffering=0))  # noqa: SIM115
    with pytest.raises(OSError, match=r"no space for 0.00 GiB of gradient rows in .*: name another directory") as error:
        filled(directory=tmp_path, memory_limit=0)
    assert error.value.errno == errno.ENOSPC


@pytest.mark.parametrize("method", ["chita", "chita++"])
def test_rows_on_disk_give_the_same_masks_as_rows_in_memory(tmp_path, method):
    generator = torch.Generator().manual_seed(1)
    weights = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    found = []
    for limit in (0, 1 << 20):
        rows = filled(directory=tmp_path, memory_limit=limit)
        stats = {name: WithRows({"row_size": torch.tensor(8.0)}, rows, name) for name in SHAPES}
        assert set(stats["text"]) == {"row_size", "grad_rows"}
        assert len(stats["text"]) == 2
        modality = {name: name for name in SHAPES}
        found += prune_masks(PRUNERS[method], weights, stats, sparsities=[0.75], modality=modality)
    for name in SHAPES:
        assert torch.equal(found[0][name], found[1][name])
        assert torch.equal(found[0].weights[name], found[1].weights[name])
