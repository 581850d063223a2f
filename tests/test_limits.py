"""The worst files that we could think of are refused within 10 CPU seconds and 1 GB, in a process of its own."""

import io
import json
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import noise_image, small_model
from PIL import Image

from vlprune.masks import Masks
from vlprune.models import save_model
from vlprune.models.official_masks import export_masks
from vlprune.store.masks import save_masks

# Reads each file as it is read by its kind; a line of JSON for each. The limit of memory goes for what comes on top of
# Python and the libraries.
CHILD = """
import json, resource, sys, time
from vlprune.data import load_pairs
from vlprune.data.decode import open_image
from vlprune.models import load_model
from vlprune.models.official_masks import import_masks
from vlprune.store.masks import load_masks

masked = load_model(sys.argv[1])
readers = {
    "model": load_model,
    "bundle": load_masks,
    "masks": lambda path: import_masks(path, masked),
    "pairs": lambda path: load_pairs(path, "train"),
    "image": lambda path: open_image({"path": path, "where": path}),
}
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 10**9, used + 10**9))
for kind, path in json.loads(sys.argv[2]):
    began, said = time.process_time(), None
    try:
        readers[kind](path)
    except Exception as error:
        said = [type(error).__name__, str(error)]
    print(json.dumps([said, time.process_time() - began]), flush=True)
"""


def changed(directory, weights=None, **settings):
    """A directory of a small model with other settings, or another file of weights."""
    save_model(small_model("xvlm"), directory)
    if settings:
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps({**config, **settings}))
    if weights is not None:
        (directory / "model.safetensors").unlink()
        (directory / weights[0]).write_bytes(weights[1])
    return directory


def safetensors_of(header):
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text


def torch_file(value):
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


class Program:
    def __reduce__(self):
        return os.system, ("touch started",)


def compressed(content):
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as new:
        for record in old.infolist():
            new.writestr(record.filename, old.read(record))
    return made.getvalue()


def pickle_of_many_names():
    """A file of torch with a dict of hundreds of thousands of names."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        archive.writestr("m/data.pkl", pickle.dumps(dict.fromkeys(map(str, range(300_000))), protocol=2))
        archive.writestr("m/version", "3\n")
        archive.writestr("m/byteorder", "little")
    return made.getvalue()


def legacy_of_a_large_claim():
    """A file of torch's older format whose one tensor is said to have 10^12 numbers."""
    file = io.BytesIO()
    torch.save({"a": torch.zeros(1_000_003)}, file, _use_new_zipfile_serialization=False)
    return file.getvalue().replace(struct.pack("<i", 1_000_003), struct.pack("<i", 2_000_000_000))[:2000]


def worst(root):
    """(kind, path, what is said of it)."""
    model = small_model("xvlm")
    ones = Masks({layer.name: torch.ones(layer.shape, dtype=torch.bool) for layer in model.graph})
    export_masks(ones, model, root / "masks.pth")
    whole = torch.load(root / "masks.pth", weights_only=True)
    first = next(iter(whole))
    torch.save({**whole, first: torch.ones(1).expand(10**5, 10**5)}, root / "masks.pth")
    yield "masks", root / "masks.pth", "claims 10,000,000,000 numbers, 1 are stored"

    save_masks(root / "bundle.safetensors", Masks({"a": torch.ones(2, 2, dtype=torch.bool)}), {})
    content = (root / "bundle.safetensors").read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["__metadata__"]["shapes"] = json.dumps({"a": [10**6, 10**6]})
    (root / "bundle.safetensors").write_bytes(safetensors_of(header) + content[8 + size :])
    yield "bundle", root / "bundle.safetensors", "not of the names and shapes that its header says"

    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    many = safetensors_of({f"{i}": empty for i in range(60_000)})  # nearly as many as are looked at
    yield "model", changed(root / "many", ("model.safetensors", many)), "60000 unknown"
    more = (100 << 20).to_bytes(8, "little") + many[8:]
    yield "model", changed(root / "more", ("model.safetensors", more)), "its names and shapes take 104,857,600 bytes"

    state = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    wide = {name: tensor.flatten()[:1].expand(10**5, 10**5) for name, tensor in state.items()}
    for name, content, said in (
        ("program", torch_file({**state, "x": Program()}), "more than tensors and plain values: posix.system"),
        ("expanded", torch_file(wide), "claims 10,000,000,000 numbers, 1 are stored"),
        ("compressed", compressed(torch_file({"a": torch.zeros(1_000_000)})), "its parts are compressed"),
        ("names", pickle_of_many_names(), "its names and shapes take"),
        ("older", legacy_of_a_large_claim(), "is damaged or holds more than tensors"),
        ("cut", torch_file(state)[:5000], "is damaged or holds more than tensors"),
        ("empty", b"", "is damaged or holds more than tensors"),
    ):
        yield "model", changed(root / name, ("pytorch_model.bin", content)), said

    config = json.loads((root / "cut" / "config.json").read_text())
    for name, part, values, said in (
        ("deep", "vision", {"num_hidden_layers": 10**6}, "num_hidden_layers = 1000000, its weights are"),
        ("wide", "text", {"hidden_size": 10**6}, "of another model|make no model|has shape"),
        ("wider", "text", {"hidden_size": 10**12}, "hold the number 1000000000000"),
        ("labels", "text", {"num_labels": 10**9}, "hold the number 1000000000"),
    ):
        yield "model", changed(root / name, **{part: {**config[part], **values}}), said

    for name, content, said in (
        ("nested", b"[" * 1_000_000, "is nested too deeply"),
        ("digits", b'[{"image":"a.png","caption":"x","image_id":' + b"1" * 1_000_000 + b"}]", "must be int or str"),
    ):
        (root / name).mkdir()
        noise_image(1).save(root / name / "a.png")
        (root / name / "a_train.json").write_bytes(content)
        yield "pairs", root / name, said

    Image.new("1", (13_000, 13_000)).save(root / "large.png")
    yield "image", root / "large.png", "13000 × 13000 pixels, more than 89,478,485"
    os.mkfifo(root / "fifo.png")
    yield "image", root / "fifo.png", "it is no regular file"


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory and its use are read as on Linux")
@pytest.mark.filterwarnings("ignore")
def test_the_worst_files_cost_little(tmp_path):
    save_model(small_model("xvlm"), tmp_path / "model")
    cases = list(worst(tmp_path))
    files = json.dumps([(kind, str(path)) for kind, path, _ in cases])
    here = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path / "model"), files],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(here), "VLPRUNE_CACHE": str(tmp_path / "cache")},
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines) == len(cases), done.stderr[-2000:]
    for (kind, path, said), (error, seconds) in zip(cases, lines, strict=True):
        assert error is not None, path
        assert error[0] in ("ValueError", "FileNotFoundError", "UnreadableImage"), (path, error)
        assert any(one in error[1] for one in said.split("|")), (path, error)
        assert "\n" not in error[1]
        assert "weights_only" not in error[1]
        assert str(path) in error[1], (kind, error)
        assert seconds < 10, (path, seconds)
    assert not (tmp_path / "started").exists()
