"""The tables of the papers on small random models and pictures, in the layout of the files that they are made for."""

import io
import json
import re
from functools import partial
from pathlib import Path

import pytest
from conftest import SMALL, noise_image, small_model
from rich.console import Console

from eval import command, get_task
from vlprune.config import CalibrationConfig
from vlprune.models import build_model, save_model
from vlprune.store.record import load_records
from vlprune.sweep.command import sweep
from vlprune.sweep.local import local_pool
from vlprune.sweep.options import Options
from vlprune.sweep.planner import Planner
from vlprune.sweep.table import load_table
from vlprune.sweep.worker import work

PAPER = Path(__file__).parents[1] / "experiments" / "paper"
THINGS = ("dog", "cat", "red bus", "bowl of soup", "man on a horse")


def write_list(path: Path, rows: list) -> None:
    path.write_text(json.dumps(rows))


def pictures(folder: Path, names: list[str]) -> list[str]:
    for i, name in enumerate(names):
        (folder / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        noise_image(i, 48).save(folder / "images" / name)
    return names


def captions(i: int, n: int) -> list[str]:
    return [f"a {THINGS[(i + j) % len(THINGS)]} number {i}" for j in range(n)]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Lists of ALBEF, BLIP and X-VLM: COCO pairs, VQA v2 with Visual Genome, CC3M and regions."""
    root = tmp_path_factory.mktemp("papers")
    coco, vqa, calibration = (root / name for name in ("coco", "vqa", "calibration"))
    for split, count in (("train", 10), ("val", 4), ("test", 5)):
        year = "train2014" if split == "train" else "val2014"
        ids = range(100 * len(split), 100 * len(split) + count)
        names = pictures(coco, [f"{year}/COCO_{year}_{i:012}.jpg" for i in ids])
        rows = [{"image": name, "caption": captions(i, 5)} for i, name in enumerate(names)]
        if split == "train":
            rows = [
                {"image": row["image"], "caption": text, "image_id": f"coco_{i}"}
                for i, row in enumerate(rows)
                for text in row["caption"][:2]
            ]
        write_list(coco / f"coco_karpathy_{split}.json", rows)
        names = pictures(vqa, [f"{split}2014/COCO_{split}2014_{i:012}.jpg" for i in ids])
        asked = [
            {"question_id": i, "question": "Is the dog on the left?", "image": name, "dataset": "vqa"}
            for i, name in zip(ids, names)
        ]
        if split != "test":
            asked = [{**row, "answer": ["yes"] * 6 + ["no"] * 4} for row in asked]
        write_list(vqa / f"vqa_{split}.json", asked)
    names = pictures(vqa, [f"vg/{i}.jpg" for i in range(4)])
    asked = [{"image": name, "question": "What is it?", "answer": "a dog", "dataset": "vg"} for name in names]
    write_list(vqa / "vg_qa.json", asked)
    write_list(vqa / "answer_list.json", ["yes", "no", "a dog"])
    names = pictures(calibration, [f"cc3m/{i}.jpg" for i in range(6)])
    write_list(calibration / "cc3m.json", [{"image": name, "caption": captions(0, 1)[0]} for name in names])
    names = pictures(calibration, [f"vg/{i}.jpg" for i in range(6)])
    elements = [{"bb": [4, 4, 20, 30], "caption": "a dog", "attributes": ["red"]}]
    write_list(calibration / "vg_regions.json", [{"image": name, "elems": elements} for name in names])
    return root


@pytest.fixture
def model(request, tmp_path) -> Path:
    """A small model of a family whose patches are large, so that 384 pixels are few of them."""
    config = SMALL[request.param]
    own = {**small_model(request.param).config, "vision": {**config["vision"], "image_size": 128, "patch_size": 64}}
    save_model(build_model(own, small_model(request.param).tokenizer), tmp_path / request.param)
    return tmp_path / request.param


@pytest.mark.parametrize(("model", "methods"), [("blip", ["multiflow"]), ("xvlm", ["itersnip"])], indirect=["model"])
def test_the_table_of_a_model_runs_on_a_few_samples(model, methods, data, tmp_path):
    options = Options(
        table=PAPER / f"{model.name}.toml",
        data=data,
        models=str(model),
        methods=",".join(methods),
        sparsities="0.75",
        seeds="6996",
        limit=8,
        jobs=1,
        results=tmp_path / "results",
    )
    console = Console(file=io.StringIO(), width=200)
    code = sweep(options, Planner(), partial(local_pool, work), console)
    text = console.file.getvalue()
    assert code == 0, text
    assert f"{model.name}-limit-8-selection: 6 runs, 0 done" in text
    assert text.count("not scored: ") == 2
    records = load_records(tmp_path / "results")
    assert {(record.config.pruning.method, record.config.task.name) for record in records} == {
        (method, task) for method in ("dense", *methods) for task in ("retrieval", "captioning", "vqa")
    }
    for record in records:
        task = record.config.task
        assert (get_task(task.name).headline in record.metrics) == (task.name != "vqa")
        assert record.sparsity == pytest.approx(record.config.pruning.sparsity, abs=1e-4)
        assert (task.image_size, record.config.finetuning.augment, task.limit) == (384, "paper", 8)
    path = re.search(r"not scored: .* (\S*predictions/\w+\.jsonl)", text)
    assert path is not None
    submission = tmp_path / "test.json"
    arguments = [path[1], str(data / "vqa" / "vqa_test.json"), "--evalai", str(submission)]
    command.run(get_task("vqa"), arguments=arguments)
    answers = json.loads(submission.read_text())
    assert [answer["question_id"] for answer in answers] == list(range(400, 405))
    assert {answer["answer"] for answer in answers} <= {"yes", "no", "a dog"}


@pytest.mark.parametrize(
    ("name", "lr", "epochs"),
    [
        ("blip", {"retrieval": 1e-5, "captioning": 1e-5, "vqa": 2e-5}, {"retrieval": 6, "captioning": 5, "vqa": 10}),
        ("xvlm", {"retrieval": 3e-5, "captioning": 1e-5, "vqa": 5e-5}, {"retrieval": 10, "captioning": 5, "vqa": 10}),
    ],
)
def test_the_tables_have_the_settings_of_the_papers(name, lr, epochs, data):
    cells = load_table(PAPER / f"{name}.toml", data=str(data)).cells
    options = {
        "itersnip": {"steps": 60, "step_batches": 50},
        "chita++": {"steps": 60, "step_batches": 50},
        "tamt": {"steps": 3000},
    }
    assert len(cells) == 3 * 3 * (1 + 9 * 3)
    for cell in cells:
        task, finetuning = cell.config.task, cell.config.finetuning
        assert (finetuning.lr, finetuning.epochs) == (lr[task.name], epochs[task.name])
        assert finetuning.batch_size == (128 if task.name == "retrieval" else 256)
        assert task.image_size == 384
        assert (
            dict(task.options)
            == {
                "retrieval": {"k_test": 256},
                "captioning": {"max_length": 20},  # of 3 beams and at least 5 tokens, which are the defaults
                "vqa": {"k_test": 128},
            }[task.name]
        )
        pruning = cell.config.pruning
        assert dict(pruning.options) == options.get(pruning.method, {})
        if pruning.method in ("snip", "multiflow"):
            assert cell.config.calibration == CalibrationConfig(str(data / "calibration"), 3000, 64)
        assert cell.config.seed in (0, 1, 6996)
