"""What a worker does while the models and data of a run change under it."""

import shutil
import threading

import pytest
from conftest import small_model, write_dataset

from vlprune.config import FinetuningConfig, ModelConfig, RunConfig, TaskConfig
from vlprune.execution import Execution
from vlprune.models import save_model
from vlprune.pipeline import chain
from vlprune.stages.fingerprints import Fingerprints
from vlprune.store.artifacts import intact, note_path
from vlprune.store.lease import Busy, claimed_at_once
from vlprune.store.record import read_record
from vlprune.store.verify import verify
from vlprune.sweep.job import Job
from vlprune.sweep.worker import work

FILES = {
    "weights": "model/model.safetensors",
    "configuration": "model/config.json",
    "annotations": "data/dataset_small.json",
    "image": "data/images/0018.png",
}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A directory with a small model and data, and parts of an evaluation that are small, too."""
    for name in ("retrieval.BATCH", "captioning.BATCH"):
        monkeypatch.setattr(f"eval.{name}", 3)
    save_model(small_model("xvlm"), tmp_path / "model")
    write_dataset(tmp_path / "data")
    return tmp_path


def job_in(place):
    config = RunConfig(
        model=ModelConfig(str(place / "model")),
        finetuning=FinetuningConfig(steps=3, batch_size=4),
        task=TaskConfig("retrieval", str(place / "data")),
    )
    key = chain(config, Fingerprints()).record.key
    return Job("record", (config,), (key,), (), (), key, place / "log.txt", "a run", True)


def done(results, job):
    return read_record(results / "runs" / job.name)


@pytest.mark.parametrize("back", [True, False])
@pytest.mark.parametrize("what", sorted(FILES))
def test_files_that_are_replaced_at_any_moment_leave_no_wrong_number(place, what, back):
    """Before the first step, between steps and between parts; put back at once, or after the run has failed."""
    path, job = place / FILES[what], job_in(place)
    own = path.read_bytes()
    other = {"annotations": own.replace(b"a dog number", b"a cat number"), "configuration": own + b" "}.get(
        what, own[:-1]
    )
    whole = place / "whole"
    asked = []
    work(job, Execution(store=whole, checkpoint_seconds=0.0), lambda: asked.append(0) is not None)
    expected = done(whole, job)
    assert len(asked) > 5
    for moment in range(len(asked)):
        results, calls = place / "results", []

        def stopping(calls=calls, moment=moment):
            calls.append(0)
            if len(calls) == moment + 1:
                path.write_bytes(other)
                if back:
                    path.write_bytes(own)
            return False

        execution = Execution(store=results, checkpoint_seconds=0.0)
        with pytest.raises(ValueError, match=r"replaced or touched|have changed since"):
            work(job, execution, stopping)
        assert done(results, job) is None
        path.write_bytes(own)
        work(job, execution, lambda: False)  # the same command again
        assert done(results, job).metrics == expected.metrics
        texts = [
            (root / "predictions" / f"{record.stages['predictions']}.jsonl").read_bytes()
            for root, record in ((whole, expected), (results, done(results, job)))
        ]
        assert texts[0] == texts[1]
        assert verify(results).faults == ()
        shutil.rmtree(results)


def test_no_flipped_bit_of_a_note_or_of_predictions_is_accepted(place):
    job, results = job_in(place), place / "results"
    work(job, Execution(store=results), lambda: False)
    record = done(results, job)
    path = results / "runs" / job.name / "record.json"
    predictions = results / "predictions" / f"{record.stages['predictions']}.jsonl"
    for file, accepted in (
        (note_path(path), lambda: done(results, job) not in (None, record)),
        (predictions, lambda: intact(predictions)),
    ):
        content = file.read_bytes()
        for bit in range(0, 8 * len(content), 23):
            flipped = bytearray(content)
            flipped[bit // 8] ^= 1 << bit % 8
            file.write_bytes(flipped)
            assert not accepted()
        file.write_bytes(content)
    assert done(results, job) == record


def test_a_job_that_somebody_else_is_at_work_on_is_left_to_him(place):
    job, execution = job_in(place), Execution(store=place / "results")
    own = chain(job.configs[0], Fingerprints()).record.path(place / "results")
    held, go = threading.Event(), threading.Event()

    def other():
        with claimed_at_once([own]):
            held.set()
            go.wait(60)

    thread = threading.Thread(target=other)
    thread.start()
    held.wait(60)
    try:
        with pytest.raises(Busy, match="process"):
            work(job, execution, lambda: False)
    finally:
        go.set()
        thread.join()
    work(job, execution, lambda: False)
    assert done(place / "results", job) is not None
