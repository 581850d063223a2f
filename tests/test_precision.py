import pytest
import torch
from conftest import CAPTIONS, noise_image, small_model

from eval import TASKS
from eval.retrieval import RetrievalOptions
from vlprune.precision import computing_in

SETTINGS = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
CPU = torch.device("cpu")


@pytest.mark.parametrize(("precision", "set_to"), [("fp32", "ieee"), ("tf32", "tf32"), ("bf16", "ieee")])
def test_settings_of_the_process_are_put_back_after_an_error_too(precision, set_to):
    before = [setting.fp32_precision for setting in SETTINGS]

    def work():
        with computing_in(precision, CPU):
            assert [setting.fp32_precision for setting in SETTINGS] == [set_to] * 2
            assert torch.is_autocast_enabled("cpu") == (precision == "bf16")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        work()
    assert [setting.fp32_precision for setting in SETTINGS] == before
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("family", ["blip", "xvlm"])
def test_matching_in_bf16_is_near_fp32_and_tf32_is_fp32_on_a_cpu(family):
    model, scores = small_model(family), {}
    for precision in ("fp32", "tf32", "bf16"):
        with torch.inference_mode(), computing_in(precision, CPU):
            features, tokens = model.embed_images([noise_image(i) for i in range(2)])
            sentences, texts = model.embed_texts(CAPTIONS[:4])
            similarity = (features.repeat_interleave(2, 0) * sentences).sum(1)
            scores[precision] = model.match(tokens, texts, similarity).float()
    assert torch.equal(scores["fp32"], scores["tf32"])
    assert not torch.equal(scores["fp32"], scores["bf16"])
    torch.testing.assert_close(scores["bf16"], scores["fp32"], atol=0.05, rtol=0.05)


@pytest.mark.parametrize("family", ["blip", "xvlm"])
@pytest.mark.parametrize("task", TASKS)
def test_every_task_is_evaluated_in_bf16(family, task):
    examples = [
        {
            "image": noise_image(i),
            "image_id": i,
            "captions": [f"{text} {i}" for text in CAPTIONS],
            "question": f"what is {text}?",
            "question_id": i,
        }
        for i, text in enumerate(CAPTIONS)
    ]
    options = RetrievalOptions(10) if task == "retrieval" else TASKS[task].options()
    answers = ["yes", "no"] if TASKS[task].prepare else None
    with computing_in("bf16", CPU):
        assert TASKS[task].predict(small_model(family), examples, options, answers)
