"""JSON files that a question left, read back: what is damaged is named, with what to do about it."""

import json
from pathlib import Path
from typing import Any

from lalora_kernels.data import BadInput


def read_object(path: Path, cure: str, *names: str) -> dict[str, Any]:
    """The JSON object in ``path``. Raises BadInput, which ends with ``cure``, for another or one without ``names``."""
    return _object(path.read_bytes(), str(path), cure, names)


def read_lines(path: Path, cure: str, *names: str) -> list[dict[str, Any]]:
    """The JSON objects in ``path``, one a line. Raises as ``read_object``, with the line's number, from 1."""
    lines = path.read_bytes().splitlines()
    return [_object(line, f"{path}, line {i}", cure, names) for i, line in enumerate(lines, 1)]


def _object(text: bytes, where: str, cure: str, names: tuple[str, ...]) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{where} is damaged ({error}); {cure}") from error
    if not isinstance(found, dict) or not found.keys() >= set(names):
        wanted = f" with {', '.join(names)}" * bool(names)
        raise BadInput(f"{where} is damaged (it is no JSON object{wanted}); {cure}")
    return found
