"""Random damage to files that nobody vouches for: they are read, or refused in one line of our own.

A few hundred damaged files a run; `VLPRUNE_FUZZ=50` makes fifty times as many.
"""

import copy
import io
import json
import os
import zipfile
from pathlib import Path
from random import Random

import annotation_layouts as written
import pytest
import torch
from conftest import noise_image, small_model
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from vlprune.config import ConfigError
from vlprune.data import layouts
from vlprune.data.decode import UnreadableImage, open_image
from vlprune.data.source import find_source
from vlprune.masks import Masks
from vlprune.models import load_model, save_model
from vlprune.models.official_masks import export_masks, import_masks
from vlprune.models.state import read_state
from vlprune.store.masks import load_masks, load_provenance, save_masks

TIMES = int(os.environ.get("VLPRUNE_FUZZ", "1"))
OURS = {ValueError, ConfigError, FileNotFoundError, UnreadableImage}
HOSTILE = (
    *(None, True, 0, -1, 1.5, 2**31, 2**63, -(2**70), 10**400, float("nan"), float("inf"), 1e-320),
    *("", " ", "²", "\ud800", "\0", "a\nb", "../x", "/dev/zero", "x" * 9999, "[PAD]", "5", "-1"),
    *([], {}, [[]], [None], {"": {}}, [0] * 999, ["\udfff"]),
)


def fuzzed(examples):
    """Calls a test that takes a source of chance, with one seed after another; a failure names the seed."""
    often = settings(
        max_examples=examples * TIMES, deadline=None, database=None, derandomize=TIMES == 1, phases=[Phase.generate]
    )
    return lambda test: often(given(st.integers(0, 2**32 - 1))(lambda seed: test(Random(seed))))()


def read_or_refused(call, *names):
    """Calls, and if that raises, checks that it is an error of one printable line that names one of the files."""
    raised = None
    try:
        call()
    except Exception as error:
        raised = error
    if raised is not None:
        line = str(raised)
        assert type(raised) in OURS, f"{type(raised).__name__}: {line}"
        assert line.isprintable(), line
        assert len(line) < 3000
        assert any(str(name) in line for name in names), line


def damaged(chance, content, first=None):
    """Bytes of a file with some changed, cut out or doubled, most of them among the `first` ones."""
    found = bytearray(content)
    for _ in range(chance.randint(1, 4)):
        end = len(found) if first is None or chance.random() < 0.25 else min(first, len(found))
        at = chance.randrange(max(end, 1))
        to = at + chance.choice([1, 1, 1, 8, 64, 4096, len(found)])
        what = chance.choice(["change", "change", "change", "cut", "double", "end"])
        if what == "change":
            found[at : at + 1] = chance.choice([b"\0", b"\xff", b"\x7f", b"9", b"-", b'"', b"[", b"}", b"."])
        elif what == "cut":
            del found[at:to]
        elif what == "double":
            found[at:at] = found[at:to]
        else:
            del found[at:]
    return bytes(found)


def twisted(chance, document):
    """A JSON document with some of its values replaced by hostile ones, some left out and some keys renamed."""
    found = copy.deepcopy(document)
    for _ in range(chance.randint(1, 3)):
        holder = found
        while holder:
            key = chance.choice(list(holder)) if isinstance(holder, dict) else chance.randrange(len(holder))
            if isinstance(holder[key], dict | list) and holder[key] and chance.random() < 0.8:
                holder = holder[key]
                continue
            what = chance.choice(["replace", "replace", "replace", "leave out", "rename"])
            if what == "replace":
                holder[key] = copy.deepcopy(chance.choice(HOSTILE))
            else:
                value = holder.pop(key)
                if what == "rename" and isinstance(holder, dict):
                    holder[chance.choice(["x", "", "\ud800", "a\nb"])] = value
            break
    return found


# ---- annotations ----

READ_HERE = {
    "pairs": {name: written.PAIRS[name] for name in ("karpathy", "lists", "official")},
    "questions": {name: written.QUESTIONS[name] for name in ("vqa_official", "vqa_lists")},
}
BY_DATASETS = {
    "pairs": {name: written.PAIRS[name] for name in ("image_folder", "json_lines", "parquet", "shards")},
    "questions": {"vqa_parquet": written.QUESTIONS["vqa_parquet"]},
}


def data_set(root, kind, write):
    """A directory of two images of each split, and its annotation files {path: bytes}."""
    pairs = []
    for i, split in enumerate(["train", "train", "val", "val", "test", "test"]):
        noise_image(i, 8).save(file := root / f"{i}.png")
        pairs.append(written.Pair(file, 100 + i, split, ["a first picture", "a second"]))
    asked = [written.Question(pair, 10 + i, "what is it?", ["yes"] * 10) for i, pair in enumerate(pairs)]
    write(root / "d", pairs if kind == "pairs" else asked)
    if "dataset_coco.json" in os.listdir(root / "d"):
        elements = [{"bb": [0, 0, 4, 4], "caption": "a thing", "attributes": ["red"]}]
        written.put(root / "d" / "regions.json", [{"image": Path(pairs[0].name).name, "elems": elements}])
    annotations = (path for path in (root / "d").rglob("*") if path.is_file() and path.suffix != ".png")
    return root / "d", {path: path.read_bytes() for path in annotations}


def read_damaged(root, contents, changed, content, kind):
    """Reads a split while one annotation file is another."""
    changed.write_bytes(content)
    try:
        read_or_refused(lambda: layouts.read(find_source(str(root)), kind, "train"), root, changed.name)
    finally:
        changed.write_bytes(contents[changed])


@pytest.mark.parametrize(("kind", "layout"), [(kind, name) for kind, each in READ_HERE.items() for name in each])
def test_damaged_annotations(kind, layout, tmp_path):
    root, contents = data_set(tmp_path, kind, READ_HERE[kind][layout])
    documents = {path: json.loads(content) for path, content in contents.items()}

    @fuzzed(60)
    def run(chance):
        changed = chance.choice(sorted(contents))
        twist = json.dumps(twisted(chance, documents[changed])).encode()
        content = twist if chance.random() < 0.75 else damaged(chance, contents[changed])
        read_damaged(root, contents, changed, content, kind)


@pytest.mark.parametrize(("kind", "layout"), [(kind, name) for kind, each in BY_DATASETS.items() for name in each])
def test_damaged_tables(kind, layout, tmp_path, own_caches):
    root, contents = data_set(tmp_path, kind, BY_DATASETS[kind][layout])

    @fuzzed(4)
    def run(chance):
        changed = chance.choice(sorted(contents))
        read_damaged(root, contents, changed, damaged(chance, contents[changed]), kind)


# ---- images ----


@pytest.mark.filterwarnings("ignore::UserWarning:PIL", "ignore::Warning")
@pytest.mark.parametrize("form", ["BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP"])
def test_damaged_images(form):
    file = io.BytesIO()
    noise_image(1, 16).save(file, form)

    @fuzzed(30)
    def run(chance):
        content = damaged(chance, file.getvalue(), first=128)
        read_or_refused(lambda: open_image({"path": None, "bytes": content, "where": "a.json, item 0"}), "a.json, item")


# ---- checkpoints ----


@pytest.fixture(scope="module", params=["safetensors", "bin"])
def directory(request, tmp_path_factory):
    """A small X-VLM in a directory, and its file of weights."""
    root = tmp_path_factory.mktemp(request.param)
    model = small_model("xvlm")
    save_model(model, root)
    weights = root / "model.safetensors"
    if request.param == "bin":
        state = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        torch.save(state, root / "pytorch_model.bin")
        weights.unlink()
        weights = root / "pytorch_model.bin"
    return root, weights, weights.read_bytes()


def in_archive(content, pickled):
    """A file of torch with another pickle in it."""
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(made, "w") as new:
        for record in old.infolist():
            new.writestr(record.filename, pickled if record.filename.endswith("data.pkl") else old.read(record))
    return made.getvalue()


def pickle_of(content):
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))


def damaged_weights(chance, content):
    """A safetensors file or one of torch's, damaged in its names and shapes above all."""
    if content[:2] == b"PK" and chance.random() < 0.75:
        return in_archive(content, damaged(chance, pickle_of(content)))
    if content[:2] != b"PK" and chance.random() < 0.5:
        size = int.from_bytes(content[:8], "little")
        header = json.dumps(twisted(chance, json.loads(content[8 : 8 + size]))).encode()
        return len(header).to_bytes(8, "little") + header + content[8 + size :]
    return damaged(chance, content, first=4096)


def test_damaged_weights_of_a_directory(directory):
    root, weights, content = directory

    @fuzzed(80)
    def run(chance):
        weights.write_bytes(damaged_weights(chance, content))
        read_or_refused(lambda: read_state(root), root)

    weights.write_bytes(content)


def test_damaged_directories_become_models_or_are_refused(directory):
    root, weights, content = directory
    config = json.loads((root / "config.json").read_text())

    @fuzzed(10)
    def run(chance):
        if chance.random() < 0.5:
            weights.write_bytes(damaged_weights(chance, content))
        else:
            (root / "config.json").write_text(json.dumps(twisted(chance, config)))
        read_or_refused(lambda: load_model(str(root)), root)
        weights.write_bytes(content)
        (root / "config.json").write_text(json.dumps(config))


def test_damaged_official_checkpoints(tmp_path):
    path = tmp_path / "m.pth"
    model = small_model("blip")
    names = {f"visual_encoder.{name}": parameter.detach().clone() for name, parameter in model.named_parameters()}
    torch.save({"model": names}, path)
    content = path.read_bytes()

    @fuzzed(60)
    def run(chance):
        path.write_bytes(damaged_weights(chance, content))
        read_or_refused(lambda: load_model(str(path)), path)


# ---- masks ----


def test_damaged_mask_bundles(tmp_path):
    path = tmp_path / "masks.safetensors"
    layers = {"a.b": (3, 5), "c": (8, 8)}
    masks = {name: torch.rand(shape) > 0.5 for name, shape in layers.items()}
    save_masks(path, Masks(masks, {name: torch.rand(masks[name].shape) for name in masks}, {"c": ["d"]}), {"x": "y"})
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    inner = {key: header["__metadata__"][key] for key in ("shapes", "aliases", "provenance")}

    @fuzzed(150)
    def run(chance):
        changed = damaged_weights(chance, content)
        if chance.random() < 0.5:
            key = chance.choice(sorted(inner))
            said = json.dumps(twisted(chance, json.loads(inner[key])))
            whole = json.dumps({**header, "__metadata__": {**header["__metadata__"], key: said}}).encode()
            changed = len(whole).to_bytes(8, "little") + whole + content[8 + size :]
        path.write_bytes(changed)
        for load in (load_masks, load_provenance):
            read_or_refused(lambda load=load: load(path), path)


def test_damaged_masks_of_the_reference(tmp_path):
    path = tmp_path / "masks.pth"
    model = small_model("xvlm")
    export_masks(Masks({layer.name: torch.ones(layer.shape, dtype=torch.bool) for layer in model.graph}), model, path)
    content = path.read_bytes()

    @fuzzed(60)
    def run(chance):
        path.write_bytes(damaged_weights(chance, content))
        read_or_refused(lambda: import_masks(path, model), path)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_tensors_that_are_none_of_a_mask(tmp_path):
    """What torch can save as a value of a dict, in the place of a mask."""
    path = tmp_path / "masks.pth"
    model = small_model("xvlm")
    masks = Masks({layer.name: torch.ones(layer.shape, dtype=torch.bool) for layer in model.graph})
    export_masks(masks, model, path)
    whole = torch.load(path, weights_only=True)
    first = next(name for name in whole if name.endswith(".weight_pruning_mask"))
    shape = whole[first].shape
    for value in (
        torch.zeros(()),
        torch.zeros(0),
        torch.ones(1).expand(shape),
        torch.ones(shape).to_sparse(),
        torch.ones(shape, dtype=torch.complex64),
        torch.quantize_per_tensor(torch.ones(shape), 1.0, 0, torch.quint8),
        torch.empty(shape, device="meta"),
        torch.full(shape, float("nan")),
        [1],
        "x",
    ):
        torch.save({**whole, first: value}, path)
        with pytest.raises(ValueError, match=str(path)):
            import_masks(path, model)
        read_or_refused(lambda: import_masks(path, model), path)


def test_a_safetensors_file_without_metadata_is_no_bundle(tmp_path):
    save_file({"mask.a": torch.zeros(1, dtype=torch.uint8)}, tmp_path / "m.safetensors")
    read_or_refused(lambda: load_masks(tmp_path / "m.safetensors"), tmp_path)
