import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from oracle import Oracle, make_examples

from eval import vqa
from eval.answers import answer_type, normalized_accuracy
from eval.vqa import VqaOptions, accuracy, answer_list, normalize

GOLDEN = json.loads((Path(__file__).parent / "golden" / "vqa_accuracy.json").read_text())
# What normalising people's answers as well makes of them: (answer, first ground truth): (official, normalised).
SPELLING = {("2", "two"): (0, 100), ("t-shirt", "t-shirt"): (0, 100)}


@pytest.mark.parametrize("row", GOLDEN["normalisation"], ids=lambda row: repr(row["raw"]))
def test_normalize_equals_the_reference(row):
    assert normalize(row["raw"]) == row["final"]


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: f"{case['pred']}-{case['answers'][0]}")
def test_accuracy_is_the_official_one(case):
    official, normalized = SPELLING.get((case["pred"], case["answers"][0]), (case["accuracy"],) * 2)
    assert accuracy(case["pred"], case["answers"]) == pytest.approx(case["accuracy"]) == pytest.approx(official)
    assert normalized_accuracy(case["pred"], case["answers"]) == pytest.approx(normalized)


@pytest.mark.parametrize(("same", "expected"), [(0, 0), (1, 30), (2, 60), (3, 90), (4, 100), (10, 100)])
def test_accuracy_by_the_number_of_people_who_agree(same, expected):
    assert accuracy("cat", ["cat"] * same + ["dog"] * (10 - same)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("answer", "truths", "official", "normalized"),
    [
        ("don't know", ["dont know"] * 9 + ["don't know"], 30, 100),
        ("cat", ["the cat"] * 10, 0, 100),
        ("a", ["a"] * 10, 0, 100),
        ("somebody'd", ["somebodyd"] * 10, 100, 100),
        ("A Cat.", ["cat!"] * 8 + ["cat"] * 2, 60, 100),
        ("cat", ["cat!"] * 10, 0, 100),
        ("cat", ["cat."] * 5 + ["cat"] * 5, 100, 100),
        ("i'd've", ["id've"] * 10, 0, 0),
        ("lets go", ["lets go"] * 10, 100, 100),
    ],
)
def test_people_s_answers_lose_their_punctuation_where_they_differ(answer, truths, official, normalized):
    assert accuracy(answer, truths) == pytest.approx(official)
    assert normalized_accuracy(answer, truths) == pytest.approx(normalized)


@pytest.mark.parametrize(
    ("truths", "expected"),
    [(["Yes."] * 6 + ["no"] * 4, "yes_no"), (["two", "2", "3"], "number"), (["1,000"], "number"), (["a cat"], "other")],
)
def test_type_of_an_answer_is_that_of_the_most_frequent(truths, expected):
    assert answer_type(truths) == expected


def asked(number, answers, said, image=1, **more):
    return (
        {"question_id": number, "image_id": image, "question": f"{number}?", "answers": answers, **more},
        {"question_id": number, "answer": said},
    )


def test_metrics_of_each_answer_type():
    pairs = [
        asked(1, ["yes"] * 10, "yes"),
        asked(2, ["no"] * 10, "yes", image=2),
        asked(3, ["two"] * 9 + ["2"], "2", image=2),
        asked(4, ["red"] * 10, "red", image=3),
        asked(5, ["one way"] * 10, "x", image=3, answer_type="number"),
    ]
    examples, predictions = zip(*pairs)
    metrics = vqa.score(predictions, examples)
    assert metrics == pytest.approx({"accuracy": 46, "yes_no": 50, "number": 15, "other": 100, "normalized": 60})
    images = vqa.per_image(predictions, examples)
    assert images.keys() == metrics.keys()
    for metric, own in images.items():
        assert list(own) == ["1", "2", "3"]
        assert sum(own.values()) / 3 == pytest.approx(metrics[metric])
    assert images["other"] == pytest.approx({"1": 100, "2": 100, "3": 100})
    assert "number" not in vqa.score(predictions[:2], examples[:2])


def test_questions_with_one_answer_have_an_exact_match():
    examples, predictions = zip(asked(1, ["Two"], "2"), asked(2, ["yes"], "no"), asked(3, ["a cat"], "cat", image=2))
    vqa.check(VqaOptions(), examples)
    metrics = vqa.score(predictions, examples)
    assert metrics == pytest.approx({"exact_match": 200 / 3, "yes_no": 0, "number": 100, "other": 100})
    assert vqa.floors(examples, examples, VqaOptions())["question only"] == pytest.approx(dict.fromkeys(metrics, 100.0))


def test_accuracy_needs_someone_to_leave_out():
    with pytest.raises(ValueError, match="at least 2 answers, got 1"):
        accuracy("cat", ["cat"])


@given(st.text(alphabet="abe ',.?!-5017\tTHE", max_size=20))
def test_normalize_leaves_words_with_single_spaces(text):
    once = normalize(text)
    assert once == once.lower() == " ".join(once.split())
    assert not set(once) & set("?!-\t")
    assert not set(once.split()) & {"a", "the"}


def test_32_periods_go_as_in_the_official_code():
    assert normalize("." * 32 + "cat") == "cat"
    assert normalize("." * 40 + "cat") == "." * 8 + "cat"


def test_answer_list_counts_normalised_answers():
    examples = [{"answers": ["Two", "2", "a cat"]}, {"answers": ["dog", "cat", "the"]}]
    assert answer_list(examples) == ["2", "cat", "dog", "the"]
    assert answer_list(examples, size=2) == ["2", "cat"]
    with pytest.raises(ValueError, match="there are none"):
        answer_list([])


def test_loss_weighs_distinct_answers_by_their_share():
    model = Oracle()
    vqa.loss(model, make_examples(2), torch.Generator())
    numbers, questions, answers, weights = model.received["vqa"]
    assert numbers == [0, 1]
    assert questions[1] == "what animal is in picture 1?"
    assert answers == [["cat", "cats", "no idea"], ["dog", "dogs", "no idea"]]
    assert weights == [[0.8, 0.1, 0.1]] * 2


def test_loss_weighs_the_questions_of_visual_genome_by_half():
    model = Oracle()
    examples = make_examples(2)
    vqa.loss(model, [examples[0], {**examples[1], "weight": 0.5}], torch.Generator())
    assert model.received["vqa"][3] == [[0.8, 0.1, 0.1], [0.4, 0.05, 0.05]]


def test_predict_encodes_an_image_once_and_keeps_the_order(monkeypatch):
    monkeypatch.setattr(vqa, "IMAGES", 3)
    monkeypatch.setattr(vqa, "QUESTIONS", 2)
    examples = make_examples(7)
    again = [example | {"question_id": example["question_id"] + 500} for example in examples[::-1]]
    model = Oracle()
    answers = answer_list(examples)
    predictions = vqa.predict(model, examples + again, VqaOptions(10), answers)
    assert model.images_embedded == 7
    assert model.received["k"] == 10
    assert [row["question_id"] for row in predictions] == [*range(1000, 1007), *range(1506, 1499, -1)]
    assert set(vqa.score(predictions, examples + again).values()) == {100.0}
    monkeypatch.setattr(Oracle, "rank_answers", lambda *_: torch.full((1, 2), torch.nan))
    with pytest.raises(ValueError, match="answers with NaN"):
        vqa.predict(model, examples, VqaOptions(10), answers)


def test_predict_opens_a_picture_of_a_data_set_once():
    examples = make_examples(3)
    rows = [
        {"image": e["image_id"], **{k: e[k] for k in ("image_id", "question")}, "question_id": e["question_id"] + more}
        for e in examples
        for more in (0, 500)
    ]
    opened = []

    def open_images(batch):
        if "image" not in batch:
            return batch
        opened.extend(batch["image"])
        return {**batch, "image": [examples[number - 100]["image"] for number in batch["image"]]}

    answers = answer_list(examples)
    data = Dataset.from_list(rows).with_transform(open_images)
    predictions = vqa.predict(Oracle(), data, VqaOptions(10), answers)
    assert opened == [100, 101, 102]
    assert predictions == vqa.predict(Oracle(), list(data), VqaOptions(10), answers)


def test_floors_by_hand():
    def row(number, question, answer):
        return {"question_id": number, "question": question, "answers": [answer] * 10}

    train = [
        row(1, "Is it red?", "yes"),
        row(2, "Is it red?", "yes"),
        row(3, "Is it big?", "no"),
        row(4, "Is it new?", "no"),
    ]
    train += [
        row(5, "Is it old?", "no"),
        row(6, "What color?", "red"),
        row(7, "What color?", "red"),
        row(8, "Who?", "no"),
    ]
    test = [
        row(1, "is it red", "yes"),
        row(2, "Is it blue?", "no"),
        row(3, "What color is it?", "red"),
        row(4, "Why?", "no"),
    ]
    found = {name: floor["accuracy"] for name, floor in vqa.floors(train, test, VqaOptions()).items()}
    assert found == {"most frequent answer": 50.0, "question only": 100.0}
