"""What the README shows is run as it stands."""

import re
from pathlib import Path

import pytest
import torch
from conftest import small_model

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def block(words: str) -> str:
    """The one Python block with these words, of at most 20 lines of code."""
    (found,) = [text for text in BLOCKS if words in text]
    assert len([line for line in found.splitlines() if line.strip()]) <= 20
    return found


def run(text: str, **given: object) -> dict:
    space: dict = dict(given)
    exec(compile(text, "README.md", "exec"), space)
    return space


def test_the_pruner():
    from vlprune.pruners import prune_masks

    pruner = run(block("taylor.py"))["TAYLOR"]
    weights = {"a": torch.tensor([[1.0, -2.0], [3.0, 4.0]])}
    stats = {"a": {"grad": torch.tensor([[1.0, 1.0], [0.1, 0.0]])}}
    [masks] = prune_masks(pruner, weights, stats, sparsities=[0.5], modality={"a": "text"})
    assert masks["a"].tolist() == [[True, True], [False, False]]


def test_the_masks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = run(block("export_masks"))["model"]
    assert sum(int((model.weight(layer.name) == 0).sum()) for layer in model.graph) >= 0.75 * model.graph.n_edges
    assert {path.name for path in tmp_path.iterdir()} == {"masks.pth", "masks.safetensors"}


def test_the_model(tmp_path, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[1])
    text = block("my-xvlm").replace('Path("my-xvlm")', f'Path("{tmp_path}/my-xvlm")')
    run(text)
    from vlprune import load_model

    assert load_model(str(tmp_path / "my-xvlm")).graph.n_edges > 100_000


def test_the_family(monkeypatch):
    from vlprune.models import checkpoints
    from vlprune.models.xvlm import XVLM

    family = run(block("summed.py"))["SummedXVLM"]
    monkeypatch.setitem(checkpoints.FAMILIES, "summed-xvlm", family)
    plain = small_model("xvlm")
    plain.__class__ = family
    tokens = plain.encode_images(torch.zeros(1, 3, 32, 32))
    texts = plain.encode_texts(["a dog"])
    similarity = torch.tensor([0.25])
    torch.testing.assert_close(
        plain.match(tokens, texts, similarity), XVLM.match(plain, tokens, texts, similarity) + similarity
    )


def test_the_task(dataset):
    from vlprune.data import load_pairs

    task = run(block("zeroshot.py"))["TASK"]
    test = load_pairs(str(dataset), "test")
    predictions = task.predict(small_model("xvlm"), test, None, task.prepare(test))
    assert set(task.score(predictions, test)) == set(task.metrics) == {task.headline}
    assert task.floors(test, test) == {"chance": {"itc_r1": pytest.approx(100 / 6)}}


def test_the_lines_in_python(monkeypatch, scenes_cache):
    monkeypatch.chdir(Path(__file__).parents[1])
    text = block("calibration_batches").split("\ndf = ")[0].replace("n_batches=8", "n_batches=1")
    metrics: list = []
    run(text.replace("print(", "metrics.append("), metrics=metrics)
    assert metrics[0]["tr_r1"] <= 100
