"""What every task must do, the files and the command line."""

import json
import pickle
import subprocess
import sys
from dataclasses import FrozenInstanceError, fields
from typing import ClassVar

import pytest
import torch
from oracle import Oracle, make_examples
from parts import Stored
from pydantic import ValidationError

from eval import TASKS, captioning, command, get_task, retrieval, vqa
from eval.base import align
from eval.files import image_ids, read_references, read_rows
from eval.options import NoOptions

tasks = pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))


def predict(task, model, examples, **more):
    prepared = task.prepare(examples) if task.prepare else None
    return task.predict(model, examples, task.options(), prepared, **more)


def predictions_of(task, examples):
    return predict(task, Oracle(), examples)


def without_images(examples):
    return [{key: value for key, value in example.items() if key != "image"} for example in examples]


def test_names_and_tables_agree():
    assert {name: task.name for name, task in TASKS.items()} == {name: name for name in TASKS}
    assert all(task.headline in task.metrics for task in TASKS.values())


def test_unknown_task_is_named_with_the_nearest():
    with pytest.raises(ValueError, match=r"'captoning'.*'captioning'.*: retrieval, captioning, vqa$"):
        get_task("captoning")
    with pytest.raises(ValueError, match=r"unknown task 'x'. There are"):
        get_task("x")
    assert get_task("vqa") is TASKS["vqa"]


@tasks
def test_perfect_model_gets_the_top_score(task):
    examples = make_examples()
    metrics = task.score(predictions_of(task, examples), without_images(examples))
    assert tuple(metrics) == tuple(metric for metric in task.metrics if metric in metrics)
    assert all(type(value) is float for value in metrics.values())
    top = {"retrieval": "tr_r1", "captioning": "rougel", "vqa": "accuracy"}[task.name]
    assert metrics[top] == pytest.approx(100)


@tasks
def test_floors_are_below_the_top_score_and_have_all_metrics(task):
    examples = make_examples()
    metrics = task.score(predictions_of(task, examples), examples)
    floors = task.floors(examples[:6], examples, task.options())
    assert floors
    for floor in floors.values():
        assert floor.keys() == metrics.keys()
        assert floor[task.headline] < metrics[task.headline]


class Watched:
    """An oracle that remembers which of its methods were called."""

    def __init__(self):
        self.oracle, self.called = Oracle(), []

    def __getattr__(self, name):
        method = getattr(self.oracle, name)

        def call(*args, **kwargs):
            self.called.append(name)
            return method(*args, **kwargs)

        return call


class Watchful(dict):
    """An example that remembers in `opened` when its picture was looked at."""

    opened: ClassVar[list] = []

    def __getitem__(self, name):
        if name == "image":
            self.opened.append(super().__getitem__("image_id"))
        return super().__getitem__(name)


@tasks
def test_needs_are_the_methods_that_are_called(task):
    model, examples = Watched(), make_examples()
    task.loss(model, examples, torch.Generator())
    predict(task, model, examples)
    assert set(model.called) == task.needs


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(captioning, "BATCH", 5)
    monkeypatch.setattr(retrieval, "BATCH", 9)
    monkeypatch.setattr(vqa, "IMAGES", 4)


@tasks
def test_an_evaluation_goes_on_from_its_parts(task, small_parts, monkeypatch):
    examples = [Watchful(example) for example in make_examples()]
    whole = predict(task, Oracle(), examples)
    first = Stored()
    assert predict(task, Oracle(), examples, keep=first) == whole
    assert first.made == list(range(len(first.parts)))
    assert len(first.parts) >= 3

    half = Stored({number: part for number, part in first.parts.items() if number % 2})
    assert predict(task, Oracle(), examples, keep=half) == whole
    assert half.made == [number for number in first.parts if number % 2 == 0]
    assert half.parts == first.parts

    monkeypatch.setattr(Watchful, "opened", [])
    every, model = Stored(first.parts), Watched()
    assert json.dumps(predict(task, model, examples, keep=every)) == json.dumps(whole)
    assert every.made == []
    # Retrieval embeds anew, and matches nothing.
    embeds = task.name == "retrieval"
    assert set(model.called) == ({"embed_images", "embed_texts"} if embeds else set())
    assert Watchful.opened == ([example["image_id"] for example in examples] if embeds else [])


@tasks
def test_only_the_pictures_of_missing_parts_are_opened(task, small_parts, monkeypatch):
    examples = [Watchful(example) for example in make_examples()]
    first = Stored()
    whole = predict(task, Oracle(), examples, keep=first)
    del first.parts[1]
    monkeypatch.setattr(Watchful, "opened", [])
    assert predict(task, Oracle(), examples, keep=first) == whole
    expected = {"retrieval": range(12), "captioning": range(5, 10), "vqa": range(4, 8)}[task.name]
    assert Watchful.opened == [100 + i for i in expected]


@tasks
def test_options_are_strict_and_frozen(task):
    options = task.options()
    assert options == task.options()
    assert pickle.loads(pickle.dumps(options)) == options
    for field in fields(options):
        for wrong in ("3", 0, 2.5, True):
            with pytest.raises(ValidationError):
                task.options(**{field.name: wrong})
        with pytest.raises(FrozenInstanceError):
            setattr(options, field.name, 3)
    with pytest.raises(ValidationError):
        task.options(nothing=3)


def test_a_task_may_have_no_options():
    assert fields(NoOptions) == ()
    with pytest.raises(ValidationError):
        NoOptions(k_test=3)


@tasks
def test_examples_that_can_be_scored_pass_the_check(task):
    examples = [Watchful(example) for example in make_examples()]
    before = len(Watchful.opened)
    task.check(task.options(), examples)
    assert len(Watchful.opened) == before


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("retrieval", lambda rows: rows[:2], r"10 texts, .* 8$"),
        ("captioning", lambda rows: [{**rows[0], "captions": []}, *rows[1:]], r"of 12 images 1 .* image_id 100$"),
        (
            "vqa",
            lambda rows: [*rows[:-1], {**rows[-1], "answers": ["yes"]}],
            r"one answer .*, several .* or none; 1011 has 1 and 1000 has 10$",
        ),
        ("vqa", lambda rows: [{**rows[0], "answers": []}, *rows[1:]], r"1000 has 0 and 1001 has 10$"),
    ],
)
def test_examples_that_cannot_be_scored_do_not(name, change, message):
    task = TASKS[name]
    with pytest.raises(ValueError, match=message) as error:
        task.check(task.options(), change(make_examples()))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["captioning", "vqa"])
def test_examples_without_any_references_are_not_scored_and_pass(name):
    task = TASKS[name]
    task.check(task.options(), [{**row, task.references: []} for row in make_examples()])


def test_retrieval_needs_ten_candidates():
    check, examples = TASKS["retrieval"].check, make_examples()
    check(retrieval.RetrievalOptions(k_test=10), examples)
    with pytest.raises(ValueError, match=r"k_test must be at least 10\b.*, got 9$"):
        check(retrieval.RetrievalOptions(k_test=9), examples)


def test_captions_have_room_for_their_shortest():
    captioning.CaptioningOptions(max_length=5, min_length=5)
    with pytest.raises(ValidationError, match="max_length must be at least min_length = 5, got 4"):
        captioning.CaptioningOptions(max_length=4)


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
        ('{"a": 1}\n{"a": ' + "[" * 100_000, "p.jsonl, line 2: lists and objects are nested too deeply"),
        ("[" * 100_000, "p.jsonl: lists and objects are nested too deeply"),
        ('{"a": ' + "1" * 5000 + "}", "p.jsonl, line 1: a whole number has more digits than can be read"),
    ],
)
def test_malformed_lines_are_named(tmp_path, text, message):
    path = tmp_path / "p.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_rows(path)


@pytest.mark.parametrize(("content", "what"), [("[" * 100_000, "nested too deeply"), ("1" * 5000, "more digits")])
def test_references_that_python_cannot_read_are_one_line(tmp_path, content, what):
    path = tmp_path / "references.json"
    path.write_text('{"images": ' + content + "}")
    with pytest.raises(ValueError, match=f"references.json: .* {what}"):
        read_references(path, None)


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
    with pytest.raises(ValueError, match=r"Karpathy.*split 'test'"):
        read_references(written(coco), "test")
    vqa = {"annotations": [{"question_id": 3, "image_id": 1, "answers": [{"answer": "yes"}, {"answer": "no"}]}]}
    read = {"question_id": 3, "answers": ["yes", "no"], "answer_type": None}
    assert read_references(written(vqa), None) == [read]
    vqa["annotations"][0]["answer_type"] = "yes/no"
    assert read_references(written(vqa), None) == [{**read, "answer_type": "yes/no"}]
    with pytest.raises(ValueError, match="an entry has no 'answers': "):
        read_references(written({"annotations": [{"question_id": 3}]}), None)
    rows = [{"image_id": 1, "captions": ["a"]}, {"image_id": 2, "captions": ["b"]}]
    assert read_references(written("\n".join(map(json.dumps, rows))), None) == rows
    assert read_references(written(json.dumps(rows[0])), None) == rows[:1]


def test_karpathys_restval_is_train(tmp_path):
    images = [{"imgid": i, "split": s, "sentences": [{"raw": "x"}]} for i, s in enumerate(("restval", "val", "train"))]
    (tmp_path / "k.json").write_text(json.dumps({"images": images}))
    assert [row["image_id"] for row in read_references(tmp_path / "k.json", "train")] == [0, 2]
    with pytest.raises(ValueError, match="no split 'restval'; there are: train, val"):
        read_references(tmp_path / "k.json", "restval")


def test_lists_of_albef_are_references(tmp_path):
    path = tmp_path / "list.json"

    def read(rows):
        path.write_text(json.dumps(rows))
        return read_references(path, None)

    names = [f"val2014/COCO_val2014_{number:012d}.jpg" for number in (7, 40)]
    assert read([{"image": name, "caption": ["a", "b"]} for name in names]) == [
        {"image_id": 7, "captions": ["a", "b"]},
        {"image_id": 40, "captions": ["a", "b"]},
    ]
    single = [{"image": name, "caption": c, "image_id": "coco_7"} for name, c in zip([*names, names[0]], "abc")]
    assert read(single) == [{"image_id": 7, "captions": ["a", "c"]}, {"image_id": 40, "captions": ["b"]}]
    asked = {"question": "Who?", "image": names[0], "dataset": "vqa"}
    assert read([asked | {"question_id": 3, "answer": ["a", "b"]}, asked | {"question_id": 4, "answer": "c"}]) == [
        {"question_id": 3, "answers": ["a", "b"]},
        {"question_id": 4, "answers": ["c"]},
    ]
    with pytest.raises(ValueError, match="an entry has no 'caption'"):
        read([*single, {"image": names[0]}])
    with pytest.raises(ValueError, match="image must be a path, got 3"):
        read([{"image": 3, "caption": "x"}])


@pytest.mark.parametrize(
    ("names", "more", "ids"),
    [
        (["a/000012.jpg", "b/x_7.png"], {}, [12, 7]),
        (["a/1.jpg", "a/1.jpg", "a/2.jpg"], {}, [1, 1, 2]),
        (["a/1.jpg", "b/1.jpg"], {}, ["a/1.jpg", "b/1.jpg"]),  # two images of one number
        (["1000268201_693b08cb0e3.jpg"], {}, ["1000268201_693b08cb0e3.jpg"]),  # the end of a word is no number
        (["a/1.jpg", "a/b.jpg"], {}, ["a/1.jpg", "a/b.jpg"]),
        (["a/1.jpg", "a/2.jpg"], {"img_id": [10, 20]}, [10, 20]),
        (["a/1.jpg", "a/2.jpg"], {"image_id": [10, 10]}, [1, 2]),
        (["a/1.jpg", "a/2.jpg"], {"image_id": ["10", "20"]}, [1, 2]),
        (["a/1.jpg", "a/2.jpg", "a/1.jpg"], {"image_id": [10, 20, 20]}, [1, 2, 1]),
    ],
)
def test_images_of_lists_are_known_by_number_or_path(names, more, ids):
    rows = [{"image": name} | {key: values[i] for key, values in more.items()} for i, name in enumerate(names)]
    assert image_ids(rows) == ids


def submit(tmp_path, predictions, wanted=None, task="vqa"):
    """Runs the command line and returns what it wrote."""
    write_lines(tmp_path / "predictions.jsonl", predictions)
    arguments = [str(tmp_path / "predictions.jsonl"), "--evalai", str(tmp_path / "out.json")]
    if wanted is not None:
        (tmp_path / "wanted.json").write_text(json.dumps(wanted))
        arguments.insert(1, str(tmp_path / "wanted.json"))
    command.run(TASKS[task], arguments=arguments)
    return json.loads((tmp_path / "out.json").read_text())


def test_answers_are_written_as_evalai_takes_them(tmp_path, capsys):
    predictions = [{"question_id": "12", "answer": "yes", "score": 3}, {"question_id": 5, "answer": "ein Käse"}]
    expected = [{"question_id": 12, "answer": "yes"}, {"question_id": 5, "answer": "ein Käse"}]
    assert submit(tmp_path, predictions) == expected
    assert capsys.readouterr().out == f"{tmp_path}/out.json: 2 predictions\n"
    official = {"questions": [{"question_id": i, "image_id": 1, "question": "x"} for i in (5, 12)]}
    assert submit(tmp_path, predictions, official) == expected
    assert (
        submit(tmp_path, predictions, [{"question_id": i, "image": "x", "question": "x"} for i in (5, 12)]) == expected
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json", "predictions.jsonl", "wanted.json"]
    assert (tmp_path / "out.json").stat().st_mode == (tmp_path / "wanted.json").stat().st_mode


def test_captions_are_written_as_evalai_takes_them(tmp_path):
    predictions = [{"image_id": 7, "caption": "a cat"}]
    expected = [{"image_id": 7, "caption": "a cat"}]
    for wanted in (
        None,
        {"images": [{"id": 7, "file_name": "x"}]},
        {"images": [{"id": 7}], "annotations": []},
        [{"image": "val/x_7.jpg"}],
        [{"image": "val/x.jpg", "img_id": 7}],
        [{"image_id": 7}],
    ):
        assert submit(tmp_path, predictions, wanted, "captioning") == expected


@pytest.mark.parametrize(
    ("predictions", "wanted", "message"),
    [
        ([{"question_id": 5, "answer": "x"}] * 2, None, "question_id 5 occurs twice in the predictions"),
        ([{"question_id": "5", "answer": "x"}, {"question_id": 5, "answer": "y"}], None, "question_id 5 occurs twice"),
        ([{"question_id": "q5", "answer": "x"}], None, "number 1 of .*: question_id must be a whole number, got 'q5'"),
        ([{"question_id": True, "answer": "x"}], None, "must be a whole number, got True"),
        ([{"question_id": 5, "answer": None}], None, "number 1 of the predictions: answer must be a text, got None"),
        ([{"question_id": 5}], None, "number 1 of the predictions has no 'answer'; it has: question_id"),
        ([], None, "there are no predictions"),
        ([{"question_id": 5, "answer": "x"}], [5, 6, 7], "1 predictions for the 3 of .*: 2 have no prediction .* 6, 7"),
        ([{"question_id": i, "answer": "x"} for i in (5, 6)], [5], "1 are not among them .question_id 6"),
        ([{"question_id": 5, "answer": "x"}], ["a"], "wanted.json: question_id must be a whole number, got 'a'"),
    ],
)
def test_faulty_submissions_are_not_written(predictions, wanted, message, tmp_path):
    (tmp_path / "out.json").write_text('"before"')
    wanted = None if wanted is None else {"questions": [{"question_id": i} for i in wanted]}
    with pytest.raises(SystemExit, match=f"python -m eval.vqa: .*{message}"):
        submit(tmp_path, predictions, wanted)
    assert (tmp_path / "out.json").read_text() == '"before"'


def test_submission_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(SystemExit, match="No space left on device"):
        submit(tmp_path, [{"question_id": 5, "answer": "x"}])
    assert [path.name for path in tmp_path.iterdir()] == ["predictions.jsonl"]


def test_submission_is_the_old_one_or_the_new_one(tmp_path, monkeypatch):
    submit(tmp_path, [{"question_id": 5, "answer": "old"}])
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    with pytest.raises(SystemExit, match="Input/output error"):
        submit(tmp_path, [{"question_id": 5, "answer": "new"}])
    assert json.loads((tmp_path / "out.json").read_text()) == [{"question_id": 5, "answer": "old"}]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json", "predictions.jsonl"]


def test_scoring_needs_references_and_retrieval_has_no_submission(tmp_path, capsys):
    write_lines(tmp_path / "p", [{"question_id": 5, "answer": "x"}])
    with pytest.raises(SystemExit):
        command.run(TASKS["vqa"], arguments=[str(tmp_path / "p")])
    assert "references are needed to score" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command.run(TASKS["retrieval"], arguments=[str(tmp_path / "p"), "--evalai", "x"])
    assert "--evalai" in capsys.readouterr().err


@tasks
def test_command_line_prints_a_table_and_json(task, tmp_path, capsys):
    examples = make_examples()
    write_lines(tmp_path / "predictions.jsonl", predictions_of(task, examples))
    write_lines(tmp_path / "references.jsonl", without_images(examples))
    paths = [str(tmp_path / "predictions.jsonl"), str(tmp_path / "references.jsonl")]
    command.run(task, arguments=paths)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(task.score(predictions_of(task, examples), examples))
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
    printed = "accuracy     100.00\nyes_no       100.00\nnormalized   100.00\n"
    assert (done.stdout, done.stderr) == (printed, "")
