"""Parts of a result that takes long, stored one by one as they are made."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any


class Parts:
    """Numbered lists in a file to which a line is added for each; what a killed process left half-written is ignored.

    Args:
        path: the file, which is made when the first part is.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stored = self._read()

    def __contains__(self, number: int) -> bool:
        return number in self._stored

    def __getitem__(self, number: int) -> list[Any]:
        return self._stored[number]

    def add(self, number: int, values: list[Any]) -> None:
        """Stores a list under a number; from then on it is what JSON gives back."""
        text = json.dumps([number, values])
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            # A line feed first: the line before may have been cut short.
            file.write(f"\n{_digest(text)} {text}\n")
        self._stored[number] = json.loads(text)[1]

    def _read(self) -> dict[int, list[Any]]:
        try:
            lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
        except FileNotFoundError:
            return {}
        found = {}
        for line in lines:
            told, _, text = line.partition(" ")
            if text and told == _digest(text):
                number, values = json.loads(text)
                found[number] = values
        return found


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
