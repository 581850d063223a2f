import json
import shutil
import subprocess
from pathlib import Path

import pytest
from oracle import Oracle, make_examples

from eval import captioning
from eval.captioning import CaptioningOptions, score

ROOT = Path(__file__).parent
SHARED = ROOT.parent.parent / "shared"
PUBLISHED = json.loads((ROOT / "golden" / "caption_golden.json").read_text())
NAMES = {"bleu4": "Bleu_4", "rougel": "ROUGE_L", "cider": "CIDEr"}


@pytest.fixture(scope="module")
def known():
    data = json.loads((ROOT / "golden" / "caption_fakecap129.json").read_text())
    keys = [str(image) for image in data["images"]]
    return [data["hyps"][key] for key in keys], [data["refs"][key] for key in keys]


def published(case):
    return pytest.approx({ours: 100 * PUBLISHED[case]["scores"][theirs] for ours, theirs in NAMES.items()}, rel=1e-9)


def test_known_captions_score_as_with_the_java_tokenizer(known):
    assert score(*known) == published("fakecap_on_129_karpathy_test")


def test_human_captions_of_coco_score_as_with_the_java_tokenizer():
    path = SHARED / "data" / "text" / "coco_karpathy_test5k_captions.json"
    if not path.exists():
        pytest.skip(f"needs {path.name} in ../shared")
    captions = [[row["caption"] for row in image["captions"]][:5] for image in json.loads(path.read_text())]
    assert score([five[4] for five in captions], [five[:4] for five in captions]) == published(
        "human_coco5k_hyp5_vs_refs1-4"
    )


def test_human_captions_of_flickr8k_score_as_with_the_java_tokenizer():
    path = SHARED / "data" / "flickr8k_1k" / "dataset_flickr8k.json"
    if not path.exists():
        pytest.skip(f"needs {path.name} in ../shared")
    images = [image for image in json.loads(path.read_text())["images"] if image["split"] == "test"]
    captions = [[row["raw"] for row in image["sentences"]] for image in images]
    expected = published("human_flickr8k_test125inhand_hyp5_vs_refs1-4")
    assert score([five[4] for five in captions], [five[:4] for five in captions]) == expected


def test_copied_reference_scores_a_hundred_and_nothing_scores_zero():
    references = [["A cat sits on the red mat."], ["Two dogs run in the green park!"], ["a man, with a long hat"]]
    assert score(
        ["a cat sits on the red mat", "two dogs run in the green park", "A man with a long hat ."], references
    ) == (pytest.approx({"bleu4": 100, "rougel": 100, "cider": 1000}, rel=1e-6))
    assert score(["", "", ""], references) == pytest.approx({"bleu4": 0, "rougel": 0, "cider": 0}, abs=1e-6)


def test_rouge_by_hand():
    # Longest common subsequence "a cat on mat" = 4 of 5 and of 6 words; F with beta 1.2.
    precision, recall, square = 4 / 5, 4 / 6, 1.2**2
    expected = 100 * (1 + square) * precision * recall / (recall + square * precision)
    assert score(["a black cat on mat"], [["a cat sits on the mat"]])["rougel"] == pytest.approx(expected)


def test_faulty_input_is_an_error():
    with pytest.raises(ValueError, match="got 2 for 1"):
        score(["a", "b"], [["a"]])
    with pytest.raises(ValueError, match="got 0 for 0"):
        score([], [])
    with pytest.raises(ValueError, match="number 1 is \\[\\]"):
        score(["a", "b"], [["a"], []])
    with pytest.raises(ValueError, match="number 0 is 'a'"):
        score(["a"], ["a"])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="unknown extra metric 'bert'; there are: meteor, spice"):
        score(["a"], [["a"]], extra=("bert",))


@pytest.mark.parametrize("metric", ["meteor", "spice"])
def test_missing_java_is_one_clear_line(metric, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match=f"{metric.upper()} needs Java"):
        score(["a cat"], [["a cat"]], extra=(metric,))


def test_missing_models_of_spice_are_never_downloaded(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/java")
    monkeypatch.setattr(
        captioning, "find_spec", lambda name: type("Spec", (), {"submodule_search_locations": [tmp_path]})
    )
    with pytest.raises(RuntimeError, match=r"SPICE.* stanford-corenlp-3.6.0.jar and .*-models.jar in "):
        score(["a cat"], [["a cat"]], extra=("spice",))


def test_meteor_of_a_java_that_fails_is_one_clear_line(monkeypatch, tmp_path):
    java = tmp_path / "java"
    java.write_text("#!/bin/sh\necho no memory >&2\nexit 1\n")
    java.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(RuntimeError, match="METEOR's Java process failed: no memory"):
        score(["a cat"], [["a cat"]], extra=("meteor",))


@pytest.mark.skipif(shutil.which("java") is None, reason="needs Java")
def test_meteor_of_known_captions(known):
    assert score(*known, extra=("meteor",))["meteor"] == pytest.approx(
        100 * PUBLISHED["fakecap_on_129_karpathy_test"]["scores"]["METEOR"], rel=1e-6
    )


def test_predict_passes_the_options_and_batches(monkeypatch):
    monkeypatch.setattr(captioning, "BATCH", 5)
    model = Oracle()
    rows = captioning.predict(model, make_examples(12), CaptioningOptions(2, 20, 3))
    assert model.received["generate"] == (2, 20, 3)
    assert rows[11] == {"image_id": 111, "caption": "picture 11 has a frog"}


def test_floor_is_the_most_frequent_training_caption():
    train = [{"image_id": 1, "captions": ["A dog.", "A cat sits on the mat."]}]
    train += [{"image_id": 2, "captions": ["a cat sits on the mat", "a bird"]}]
    test = [
        {"image_id": i, "captions": [text]}
        for i, text in enumerate(("A cat sits on the mat", "two men run", "red sky"))
    ]
    floor = captioning.floors(train, test, CaptioningOptions())["constant caption"]
    assert floor == score(["a cat sits on the mat"] * 3, [row["captions"] for row in test])
    assert 0 < floor["cider"] < 1000 / 3 + 1


def test_scoring_starts_no_process(known, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("started a process")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    assert score(known[0][:3], known[1][:3])["rougel"] > 0
