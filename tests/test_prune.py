"""The command line that prunes a model and writes it."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import small_model
from rich.console import Console
from safetensors import SafetensorError, safe_open

from vlprune.config import ConfigError
from vlprune.masks import mask_hash, measure, sparsity
from vlprune.models import build_model, load_model, save_model
from vlprune.prune import Arguments, main, prune
from vlprune.store.masks import load_masks, load_provenance

QUIET = Console(quiet=True)


@pytest.fixture(params=["blip", "xvlm"])
def source(request, tmp_path, dataset):
    """(directory of a small model, directory of a small data set)."""
    save_model(small_model(request.param), tmp_path / "dense")
    return str(tmp_path / "dense"), str(dataset)


def options(source, out, **others):
    model, data = source
    given = {"method": "multiflow", "sparsity": "0.75", "calibration": data, "n_batches": 2, "batch_size": 4}
    return Arguments(model=model, out=out, **{**given, **others})


def test_one_cell_is_a_directory_with_model_masks_and_card(source, tmp_path):
    out = tmp_path / "pruned"
    steps = prune(options(source, out), QUIET)
    model, masks = load_model(str(out)), load_masks(out / "masks.safetensors")
    edges = model.graph.n_edges
    assert measure(model) >= sparsity(masks) == round(0.75 * edges) / edges
    for name, mask in masks.items():
        assert not model.weight(name)[~mask].any()
    dense = load_model(source[0])
    masks.apply(dense)
    for name, parameter in dense.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name
    card = (out / "README.md").read_text()
    assert mask_hash(masks) in card
    assert "multiflow" in load_provenance(out / "masks.safetensors")["method"]
    assert steps.costs[0][0] == "load the model"
    assert not list(tmp_path.glob(".*.part"))


def test_a_model_with_zeros_is_said_to_have_them(source, tmp_path, caplog):
    first, second = tmp_path / "the first", tmp_path / "second"
    prune(options(source, first, method="omp"), QUIET)
    assert not caplog.text
    prune(options((str(first), source[1]), second, method="random", sparsity="0.5"), QUIET)
    assert "the first: 75.00 % of the prunable weights are zero already" in caplog.text
    card = (second / "README.md").read_text()
    assert "- before: `75.00 % of the prunable weights are zero already" in card
    assert f"# {first} pruned to 50.00 %" in card


def test_only_what_measures_says_on_what(source, tmp_path):
    for method in ("omp", "multiflow"):
        prune(options(source, tmp_path / method, method=method, masks_only=True), QUIET)
        provenance = load_provenance(tmp_path / method / "masks.safetensors")
        assert ("calibration" in provenance) == (method == "multiflow")


def test_broken_images_are_left_out_where_asked(source, tmp_path, caplog):
    for n in (1, 2):
        (tmp_path / "data" / "images" / f"{n:04d}.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="cannot read image"):
        prune(options(source, tmp_path / "out"), QUIET)
    prune(options(source, tmp_path / "out", skip_broken=True), QUIET)
    assert "left out" in caplog.text


def test_a_card_names_only_classes_that_hold_the_model(tmp_path):
    small = small_model("blip").config
    narrow = {**small["vision"], "hidden_size": 16, "intermediate_size": 32}
    config = {**small, "vision": narrow, "text": {**small["text"], "encoder_hidden_size": 16}}
    for trained_for, said in (("pretraining", "# or BlipForConditionalGeneration\n"), ("vqa", "vlprune.load_model(")):
        model = build_model({**config, "trained_for": trained_for}, small_model("blip").tokenizer)
        save_model(model, tmp_path / trained_for)
        out = tmp_path / f"{trained_for}-pruned"
        prune(options((str(tmp_path / trained_for), ""), out, method="omp"), QUIET)
        card = (out / "README.md").read_text()
        assert said in card
        assert "import BlipForQuestionAnswering" not in card


def test_masks_take_one_bit_an_edge(source, tmp_path):
    out = tmp_path / "pruned"
    prune(options(source, out, masks_only=True), QUIET)
    assert [path.name for path in out.iterdir()] == ["masks.safetensors"]
    edges = load_model(source[0]).graph.n_edges
    with safe_open(out / "masks.safetensors", framework="pt") as file:
        stored = sum(file.get_tensor(name).numel() for name in list(file.keys()))
    assert edges / 8 <= stored <= edges / 8 + len(load_masks(out / "masks.safetensors"))


def test_several_cells_are_what_each_would_be_alone(source, tmp_path):
    methods, few = ("omp", "snip", "chita++"), ("steps=2", "step_batches=1")
    together = options(source, tmp_path / "all", method="omp,snip,chita++", sparsity="0.5,0.9", options=few)
    prune(together, QUIET)
    assert sorted(p.name for p in (tmp_path / "all").iterdir()) == sorted(f"{m}-{s}" for m in methods for s in (50, 90))
    for method in methods:
        alone = options(
            source, tmp_path / method, method=method, sparsity="0.9", options=few if method == "chita++" else ()
        )
        prune(alone, QUIET)
        a = load_masks(tmp_path / "all" / f"{method}-90" / "masks.safetensors")
        b = load_masks(tmp_path / method / "masks.safetensors")
        assert mask_hash(a) == mask_hash(b)
        for name in ("model.safetensors", "config.json"):
            assert (tmp_path / method / name).read_bytes() == (tmp_path / "all" / f"{method}-90" / name).read_bytes()


def test_wrong_options_are_refused_before_anything_is_written(source, tmp_path):
    out = tmp_path / "pruned"

    def refused(match, **others):
        with pytest.raises((ConfigError, ValueError), match=match):
            prune(options(source, out, **others), QUIET)
        assert not out.exists()

    refused("unknown method 'multflow'; did you mean 'multiflow'", method="multflow")
    refused(r"did you mean 0.75\?", sparsity="75")
    refused("--sparsity must be numbers", sparsity="most")
    refused("must name each at least one, and none twice", sparsity="0.5,0.5")
    refused("takes no pattern", method="chita", pattern="2:4", sparsity="0.5")
    refused("unknown data set", calibration="nowhere")
    refused("unknown option 'lamb'; did you mean 'lam'", method="chita", options=("lamb=1",))
    refused("unknown option 'lam'", options=("lam=1",))
    refused("--options takes NAME=VALUE, got 'lam'", method="chita", options=("lam",))
    refused("lam must be above 0, got -1", method="chita", options=("lam=-1",))
    out.mkdir()
    (out / "thesis.tex").touch()
    with pytest.raises(ConfigError, match=r"--out must be a new or an empty directory"):
        prune(options(source, out), QUIET)
    assert (out / "thesis.tex").exists()


def test_a_full_disk_leaves_nothing_half_written(source, tmp_path, monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vlprune.models.directory.save_file", full)
    with pytest.raises(OSError, match="No space left on device"):
        prune(options(source, tmp_path / "pruned"), QUIET)
    assert sorted(p.name for p in tmp_path.iterdir() if "pruned" in p.name) == []


def test_the_command_line_says_what_it_cost(tmp_path, monkeypatch, capsys):
    arguments = ["prune", "--model", "tiny-xvlm", "--method", "omp", "--sparsity", "0.5", "--out", str(tmp_path / "x")]
    monkeypatch.setattr(sys, "argv", arguments)
    main()
    said = capsys.readouterr().out
    assert "prune by omp, 1 sparsity" in said
    assert "peak memory, GiB" in said
    monkeypatch.setattr(sys, "argv", [*arguments[:-1], str(tmp_path / "x")])
    with pytest.raises(SystemExit):
        main()
    assert capsys.readouterr().err.startswith("error: --out must be")


def test_a_full_disk_is_one_line_too_where_safetensors_meets_it(tmp_path, monkeypatch, capsys):
    def full(*_args, **_kwargs):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("vlprune.store.masks.save_file", full)
    arguments = ["prune", "--model", "tiny-xvlm", "--method", "omp", "--sparsity", "0.5", "--out", str(tmp_path / "x")]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as exit:
        main()
    assert exit.value.code == 2
    assert capsys.readouterr().err == "error: I/O error: No space left on device (os error 28)\n"
    assert not list(tmp_path.iterdir())


def test_the_code_of_a_card_loads_the_model_without_this_project(source, tmp_path):
    out = tmp_path / "pruned"
    prune(options(source, out, method="omp"), QUIET)
    code = (out / "README.md").read_text().split("```python\n")[1].split("```")[0]
    code = f"DIRECTORY = {str(out)!r}\n{code}\nimport sys; assert 'vlprune' not in sys.modules\n"
    code += "print(sum(int((p == 0).sum()) for p in model.parameters()), images.size, len(tokenizer))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[0]) > 0
    assert json.loads((out / "config.json").read_text())["model_type"] in ("blip", "xvlm")


def test_numbers_that_no_memory_or_directory_can_have_are_one_line(source, tmp_path):
    for limit in (float("inf"), float("nan"), -1.0):
        with pytest.raises(ConfigError, match="--memory-limit must be a number of GiB"):
            prune(options(source, tmp_path / "out", memory_limit=limit), QUIET)
    with pytest.raises(ConfigError, match="--sparsity must differ"):
        prune(options(source, tmp_path / "out", sparsity="0.5,0.5000000001"), QUIET)
    assert not (tmp_path / "out").exists()
