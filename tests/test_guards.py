"""Warnings about known traps."""

import pytest

from vlprune.data import annotation_files, load_questions
from vlprune.data.guards import missed_answers, seen_in_training

V2 = ["v2_OpenEnded_mscoco_train2014_questions.json", "v2_OpenEnded_mscoco_val2014_questions.json"]
LISTS = ["vqa_train.json", "vqa_val.json", "vqa_test.json", "vg_qa.json"]


@pytest.mark.parametrize(
    ("model", "architecture", "annotations", "split"),
    [
        ("Salesforce/blip-vqa-base", "", V2, "val"),
        ("Salesforce/blip-vqa-capfilt-large", "", LISTS, "val"),
        ("/models/model_base_vqa_capfilt_large.pth", "", LISTS, "train+val"),
        ("/models/mine", "BlipForQuestionAnswering", ["lmms-lab/VQAv2"], "val"),
        ("ALBEF_vqav2.pth", "", LISTS, "train"),
        ("blip-vqa", "", ["/data/VQAv2/validation-00000.parquet"], "validation"),
    ],
)
def test_checkpoints_of_vqa_have_seen_train_and_val(model, architecture, annotations, split):
    warning = seen_in_training(model, architecture, annotations, split)
    assert warning
    assert all(fact in warning for fact in (model, "VQA v2 train+val", f" {split};", "test-dev"))
    assert "\n" not in warning


@pytest.mark.parametrize(
    ("model", "architecture", "annotations", "split"),
    [
        ("Salesforce/blip-vqa-base", "", V2, "test-dev"),
        ("Salesforce/blip-vqa-base", "", LISTS, "test"),
        ("Salesforce/blip-vqa-base", "", ["val_questions.json"], "val"),
        ("Salesforce/blip-image-captioning-base", "BlipForConditionalGeneration", V2, "val"),
        ("14m-blip-vitB.pth", "", V2, "val"),
        ("tiny-blip", "", V2, "val"),
    ],
)
def test_other_models_data_and_splits_have_not(model, architecture, annotations, split):
    assert seen_in_training(model, architecture, annotations, split) is None


def test_files_of_a_directory_decide(dataset):
    assert annotation_files(str(dataset), "questions") == [f"{s}_questions.json" for s in ("test", "train", "val")]
    assert annotation_files(str(dataset), "pairs") == ["dataset_small.json"]
    assert annotation_files("someone/pictures", "pairs") == ["someone/pictures"]


def test_answer_list_should_hold_most_training_answers(dataset):
    train = load_questions(str(dataset), "train").remove_columns("image").to_list()
    assert missed_answers(["yes", "no"], train) is None
    assert missed_answers(["Yes."], train) is None  # half of them
    assert missed_answers([], []) is None
    warning = missed_answers(["maybe", "red"], train)
    assert all(fact in warning for fact in ("2 answers", " 0 %", "120 training answers"))
    assert " 40 %" in (missed_answers(["cat"], [{"answers": ["A cat.", "cat", "x", "y", "z"]}]) or "")
