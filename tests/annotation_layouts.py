"""The same pairs and questions written in every layout that directories come in."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq


@dataclass(frozen=True)
class Pair:
    """An image file with its number, split and captions."""

    file: Path
    number: int
    split: str
    captions: list[str]

    @property
    def name(self) -> str:
        """As COCO names its files: the folder, the split and twelve digits."""
        return f"{self.split}2014/COCO_{self.split}2014_{self.number:012d}{self.file.suffix}"


@dataclass(frozen=True)
class Question:
    """A question about an image, with its answers."""

    image: Pair
    number: int
    text: str
    answers: list[str]
    kind: str | None = None  # what the annotations say of its answers, such as "yes/no"

    @property
    def typed(self) -> dict[str, str]:
        """The entry `answer_type`, if there is one."""
        return {} if self.kind is None else {"answer_type": self.kind}


def put(path: Path, document: object) -> None:
    """Writes JSON, with its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document))


def copy_images(root: Path, pairs: list[Pair]) -> None:
    """Copies the images to where COCO has them below root."""
    for pair in pairs:
        (root / pair.name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(pair.file, root / pair.name)


def split_up(rows):
    """{split: rows}."""
    found = defaultdict(list)
    for row in rows:
        found[row.split if isinstance(row, Pair) else row.image.split].append(row)
    return found


def karpathy(root: Path, pairs: list[Pair]) -> None:
    copy_images(root / "images", pairs)
    images = [
        {
            "filepath": Path(p.name).parent.name,
            "filename": Path(p.name).name,
            "cocoid": p.number,
            "split": "restval" if p.split == "train" and i % 2 else p.split,
            "sentences": [{"raw": c} for c in p.captions],
        }
        for i, p in enumerate(pairs)
    ]
    put(root / "dataset_coco.json", {"images": images})


def lists(root: Path, pairs: list[Pair]) -> None:
    copy_images(root, pairs)
    for split, rows in split_up(pairs).items():
        whole = [{"image": p.name, "caption": p.captions} for p in rows]
        single = [{"image": p.name, "caption": c, "image_id": f"coco_{p.number}"} for p in rows for c in p.captions]
        put(root / f"coco_karpathy_{split}.json", single if split == "train" else whole)


def official(root: Path, pairs: list[Pair]) -> None:
    copy_images(root, pairs)
    for split, rows in split_up(pairs).items():
        images = [{"id": p.number, "file_name": Path(p.name).name} for p in rows]
        captions = [{"image_id": p.number, "id": 10 * p.number, "caption": c} for p in rows for c in p.captions]
        put(root / "annotations" / f"captions_{split}2014.json", {"images": images, "annotations": captions})


def image_folder(root: Path, pairs: list[Pair]) -> None:
    for split, rows in split_up(pairs).items():
        (root / split).mkdir(parents=True)
        lines = []
        for p in rows:
            shutil.copyfile(p.file, root / split / Path(p.name).name)
            lines.append(json.dumps({"file_name": Path(p.name).name, "image_id": p.number, "captions": p.captions}))
        (root / split / "metadata.jsonl").write_text("\n".join(lines))


def json_lines(root: Path, pairs: list[Pair]) -> None:
    copy_images(root, pairs)
    for split, rows in split_up(pairs).items():
        lines = [json.dumps({"image": p.name, "image_id": p.number, "captions": p.captions}) for p in rows]
        (root / f"list_{split}.jsonl").write_text("\n".join(lines))


def parquet(root: Path, pairs: list[Pair]) -> None:
    root.mkdir(parents=True)
    for split, rows in split_up(pairs).items():
        columns = {
            "image": [{"bytes": p.file.read_bytes(), "path": None} for p in rows for _ in p.captions],
            "cocoid": [p.number for p in rows for _ in p.captions],
            "sentences": [{"raw": c, "tokens": c.split()} for p in rows for c in p.captions],  # a row a caption
        }
        pq.write_table(pa.table(columns), root / f"{split}-00000-of-00001.parquet")


def shards(root: Path, pairs: list[Pair], per_shard: int = 4) -> None:
    root.mkdir(parents=True)
    for split, rows in split_up(pairs).items():
        for start in range(0, len(rows), per_shard):
            with tarfile.open(root / f"{split}-{start:06d}.tar", "w") as tar:
                for p in rows[start : start + per_shard]:
                    members = {
                        p.file.suffix: p.file.read_bytes(),
                        ".json": json.dumps({"caption": p.captions}).encode(),
                    }
                    for suffix, content in members.items():
                        info = tarfile.TarInfo(f"{p.number:09d}{suffix}")
                        info.size = len(content)
                        tar.addfile(info, io.BytesIO(content))


PAIRS: dict[str, Callable[[Path, list[Pair]], None]] = {
    each.__name__: each for each in (karpathy, lists, official, image_folder, json_lines, parquet, shards)
}


def vqa_official(root: Path, questions: list[Question]) -> None:
    copy_images(root / "images", [q.image for q in questions])
    for split, rows in split_up(questions).items():
        key = [{"question_id": q.number, "image_id": q.image.number} for q in rows]
        asked = [k | {"question": q.text} for k, q in zip(key, rows)]
        answered = [k | {"answers": [{"answer": a} for a in q.answers]} | q.typed for k, q in zip(key, rows)]
        put(root / f"v2_OpenEnded_mscoco_{split}2014_questions.json", {"questions": asked})
        put(root / f"v2_mscoco_{split}2014_annotations.json", {"annotations": answered})


def vqa_lists(root: Path, questions: list[Question]) -> None:
    copy_images(root, [q.image for q in questions])
    for split, rows in split_up(questions).items():
        items = [
            {
                "question_id": q.number,
                "question": q.text,
                "image": q.image.name,
                "dataset": "vqa",
                "answer": q.answers,
                **q.typed,
            }
            for q in rows
        ]
        put(root / f"vqa_{split}.json", items)


def vqa_parquet(root: Path, questions: list[Question]) -> None:
    root.mkdir(parents=True)
    for split, rows in split_up(questions).items():
        columns = {
            "image": [{"bytes": q.image.file.read_bytes(), "path": None} for q in rows],
            "image_id": [q.image.number for q in rows],
            "question_id": [q.number for q in rows],
            "question": [q.text for q in rows],
            "answers": [[{"answer": a, "answer_id": i} for i, a in enumerate(q.answers)] for q in rows],
            "answer_type": [q.kind for q in rows],
        }
        pq.write_table(pa.table(columns), root / f"{split}-00000-of-00001.parquet")


QUESTIONS: dict[str, Callable[[Path, list[Question]], None]] = {
    each.__name__: each for each in (vqa_official, vqa_lists, vqa_parquet)
}
