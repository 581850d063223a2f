"""What every task must do, the files and the command line."""

import json
import subprocess
import sys

import pytest
import torch
from oracle import SETTINGS, Oracle, make_examples

from eval import TASKS, command, get_task
from eval.base import align
from eval.files import read_references, read_rows

tasks = pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))


def predictions_of(task, examples):
    return task.predict(Oracle(), examples, SETTINGS, task.prepare(examples))


def without_images(examples):
    return [{key: value for key, value in example.items() if key != "image"} for example in examples]


def test_names_and_tables_agree():
    assert {name: task.name for name, task in TASKS.items()} == {name: name for name in TASKS}
    assert all(task.headline in task.metrics for task in TASKS.values())


def test_unknown_task_is_named_with_the_nearest():
    with pytest.raises(
        ValueError, match=r"unknown task 'captoning'; did you mean 'captioning'. There are: retrieval, cap"
    ):
        get_task("captoning")
    with pytest.raises(ValueError, match=r"unknown task 'x'. There are"):
        get_task("x")
    assert get_task("vqa") is TASKS["vqa"]


@tasks
def test_perfect_model_gets_the_top_score(task):
    examples = make_examples()
    metrics = task.score(predictions_of(task, examples), without_images(examples))
    assert tuple(metrics) == task.metrics
    assert all(type(value) is float for value in metrics.values())
    top = {"retrieval": "tr_r1", "captioning": "rougel", "vqa": "accuracy"}[task.name]
    assert metrics[top] == pytest.approx(100)


@tasks
def test_floors_are_below_the_top_score_and_have_all_metrics(task):
    examples = make_examples()
    metrics = task.score(predictions_of(task, examples), examples)
    floors = task.floors(examples[:6], examples)
    assert floors
    for floor in floors.values():
        assert tuple(floor) == task.metrics
        assert 0 <= floor[task.headline] < metrics[task.headline]


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


@tasks
def test_stored_predictions_score_the_same_without_model_and_images(task, tmp_path):
    examples = make_examples()
    predictions = predictions_of(task, examples)
    write_lines(tmp_path / "predictions.jsonl", predictions)
    assert [path.name for path in tmp_path.iterdir()] == ["predictions.jsonl"]
    stored = read_rows(tmp_path / "predictions.jsonl")
    assert stored == predictions
    assert task.score(stored, without_images(examples)) == task.score(predictions, examples)
    assert task.score(stored[::-1], examples) == pytest.approx(task.score(predictions, examples))


@tasks
def test_missing_double_and_unknown_predictions_are_errors(task):
    examples = make_examples()
    predictions = predictions_of(task, examples)
    for faulty in (predictions[1:], [*predictions, predictions[0]], []):
        with pytest.raises(ValueError, match=r"100|1000|no predictions|predictions for"):
            task.score(faulty, examples)
    with pytest.raises(ValueError, match=r"occurs twice|only in one|have no reference|2 predictions for"):
        task.score(predictions, examples[:-1])
    with pytest.raises(ValueError, match="number 1 of the predictions has no"):
        task.score([{"nothing": 1}, *predictions[1:]], examples)


@tasks
def test_predictions_follow_the_order_of_the_examples(task):
    examples = make_examples()
    shuffled = [examples[i] for i in torch.randperm(len(examples), generator=torch.Generator().manual_seed(1))]
    key = "question_id" if task.name == "vqa" else "image_id"
    rows = predictions_of(task, shuffled)
    assert [row[key] for row in rows[: len(shuffled)]] == [example[key] for example in shuffled]


@tasks
def test_loss_takes_its_random_choices_from_the_generator(task):
    examples = make_examples()

    def received(seed):
        model = Oracle()
        generator = torch.Generator().manual_seed(seed)
        assert task.loss(model, examples, generator).ndim == 0
        return model.received[task.name][:3]

    assert received(0) == received(0)
    assert received(0)[0] == list(range(len(examples)))
    if task.name != "vqa":
        assert received(0)[1] != received(1)[1]
        assert all(text in example["captions"] for text, example in zip(received(0)[1], examples))


def test_align_takes_ids_of_either_type():
    rows = [{"id": 5, "x": "a"}, {"id": "7", "x": "b"}]
    assert align(rows, [{"id": 7, "y": 1}, {"id": "5", "y": 2}], key="id", said="x", wanted="y") == [("b", 1), ("a", 2)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1}\n{"a": }\n', r"p.jsonl, line 2: not JSON \(Expecting value at column 7\)"),
        ('{"a": 1}\n\n[1]\n', "p.jsonl, line 3: wanted a JSON object, found list"),
        ('[{"a": 1},\n 5]', "p.jsonl, entry 2: wanted a JSON object, found int"),
        ('[{"a": 1},\n {]', "p.jsonl, line 2: not JSON"),
    ],
)
def test_malformed_lines_are_named(tmp_path, text, message):
    path = tmp_path / "p.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_rows(path)


def test_file_that_is_not_text_is_an_error(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not a text file in UTF-8"):
        read_rows(path)


def test_reference_layouts(tmp_path):
    def written(content):
        path = tmp_path / "references"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    karpathy = {
        "images": [
            {"imgid": 0, "cocoid": 9, "split": "test", "sentences": [{"raw": "A cat."}, {"raw": "A pet."}]},
            {"imgid": 1, "split": "train", "sentences": [{"raw": "A dog."}]},
        ]
    }
    assert read_references(written(karpathy), "test") == [{"image_id": 9, "captions": ["A cat.", "A pet."]}]
    assert read_references(written(karpathy), "train") == [{"image_id": 1, "captions": ["A dog."]}]
    karpathy["images"][0] = {"filename": "a.jpg", "split": "test", "sentences": [{"raw": "A cat."}]}
    assert read_references(written(karpathy), "test") == [{"image_id": "a.jpg", "captions": ["A cat."]}]
    karpathy["images"][0]["cocoid"] = "1"
    with pytest.raises(ValueError, match="references: image_id 1 occurs twice"):
        read_references(written(karpathy), "test")
    with pytest.raises(ValueError, match="name a split; there are: test, train"):
        read_references(written(karpathy), None)
    with pytest.raises(ValueError, match="no split 'val'; there are: test, train"):
        read_references(written(karpathy), "val")
    coco = {
        "images": [{"id": 1}],
        "annotations": [{"image_id": i, "caption": c} for i, c in ((1, "a"), (2, "b"), (1, "c"))],
    }
    assert read_references(written(coco), None) == [
        {"image_id": 1, "captions": ["a", "c"]},
        {"image_id": 2, "captions": ["b"]},
    ]
    with pytest.raises(ValueError, match="only a Karpathy file has splits; leave out split 'test'"):
        read_references(written(coco), "test")
    vqa = {"annotations": [{"question_id": 3, "image_id": 1, "answers": [{"answer": "yes"}, {"answer": "no"}]}]}
    assert read_references(written(vqa), None) == [{"question_id": 3, "answers": ["yes", "no"]}]
    with pytest.raises(ValueError, match="an entry has no 'answers': "):
        read_references(written({"annotations": [{"question_id": 3}]}), None)
    rows = [{"image_id": 1, "captions": ["a"]}, {"image_id": 2, "captions": ["b"]}]
    assert read_references(written("\n".join(map(json.dumps, rows))), None) == rows
    assert read_references(written(json.dumps(rows[0])), None) == rows[:1]


@tasks
def test_command_line_prints_a_table_and_json(task, tmp_path, capsys):
    examples = make_examples()
    write_lines(tmp_path / "predictions.jsonl", predictions_of(task, examples))
    write_lines(tmp_path / "references.jsonl", without_images(examples))
    paths = [str(tmp_path / "predictions.jsonl"), str(tmp_path / "references.jsonl")]
    command.run(task, arguments=paths)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(task.metrics)
    assert len({len(line) for line in lines}) == 1
    command.run(task, arguments=[*paths, "--json"])
    assert json.loads(capsys.readouterr().out) == task.score(predictions_of(task, examples), examples)
    with pytest.raises(SystemExit, match=rf"python -m eval.{task.name}: .*nowhere"):
        command.run(task, arguments=[paths[0], str(tmp_path / "nowhere")])
    (tmp_path / "references.jsonl").write_text("{}\n")
    with pytest.raises(SystemExit, match="has no"):
        command.run(task, arguments=paths)


def test_module_runs_as_a_program(tmp_path):
    (tmp_path / "answers.json").write_text('[{"question_id": 3, "answer": "Yes."}]')
    (tmp_path / "annotations.json").write_text(
        json.dumps({"annotations": [{"question_id": 3, "answers": [{"answer": "yes"}] * 10}]})
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "eval.vqa", tmp_path / "answers.json", tmp_path / "annotations.json"],
        capture_output=True,
        text=True,
        check=False,
        cwd=__file__.rsplit("/", 2)[0],
    )
    assert (done.stdout, done.stderr) == ("accuracy   100.00\n", "")
