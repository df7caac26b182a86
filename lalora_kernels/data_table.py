"""Tables of text: .tsv, .csv and .jsonl, also with .gz."""

import csv
import gzip
import json
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from lalora_kernels.data import BadInput, Data, labelled, no_such_file, refuse_training_records

LABEL_COLUMNS = ("label", "labels", "target", "class")
TEXT_COLUMNS = ("text", "sentence", "content", "review", "document")
TEXT_PAIRS = (  # the first of these that a table has goes before a single text: QNLI's question is half of its record
    ("premise", "hypothesis"),
    ("question", "sentence"),
    ("question1", "question2"),
    ("sentence1", "sentence2"),
    ("text1", "text2"),
)
OBJECT = 'each line is one record, {"text": "...", "label": 0}, with double quotes'
Rows = list[tuple[int, list[Any]]]  # (line, cells)


def load_table(path: Path, test: Path | None, text_column: str | None, label_column: str | None) -> Data:
    """``load_data`` of a table, whose first line names the columns, or whose lines are JSON objects of one kind each;
    raises BadInput as that does."""
    train = _read_table(path, text_column, label_column)
    if test is None:
        return labelled("text", path, train, None, None)
    refuse_training_records(path, test)
    return labelled("text", path, train, test, _read_table(test, text_column, label_column))


@contextmanager
def _fields_of_any_length() -> Iterator[None]:
    """A text may be long; the csv module stops at 131,072 characters, for the whole process, unless it is told."""
    own = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(own)


def _read_table(path: Path, text_column: str | None, label_column: str | None) -> tuple[list, list[str]]:
    header, rows = _rows(path)
    label = _column(path, header, label_column, LABEL_COLUMNS, "label", None)
    text = _text_columns(path, header, text_column, label)
    for number, row in rows:
        if len(row) != len(header):
            raise BadInput(f"{path}, line {number}: {len(row)} columns where the header has {len(header)}")
        for column in (label, *text):
            row[column] = _string(row[column], f"{path}, line {number}", header[column])
        if not row[label].strip():  # it would be a class of its own
            raise BadInput(f"{path}, line {number}: no {header[label]}; every record needs one, or take the line out")
    return _join([[row[i] for _, row in rows] for i in text]), [row[label] for _, row in rows]


def _rows(path: Path) -> tuple[list[str], Rows]:
    """The columns' names, and every record."""
    kind = path.name.removesuffix(".gz").rpartition(".")[2]
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        # utf-8-sig: Excel's "CSV UTF-8" begins with a mark, which is no part of the first column's name
        with opened(path, "rt", encoding="utf-8-sig", newline="") as file, _fields_of_any_length():
            if kind == "jsonl":
                return _objects(path, file)
            # a .tsv of this field holds bare quotes as ordinary characters; a .csv quotes as RFC 4180 does
            style = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if kind == "tsv" else {"strict": True}
            lines = csv.reader(file, **style)
            numbered: Rows = []
            try:
                numbered += ((lines.line_num, row) for row in lines)
            except csv.Error as error:
                raise BadInput(
                    f"{path}, line {lines.line_num}: not a readable .{kind}, corrupt or truncated ({error}); columns "
                    f"are parted by {'tabs' if kind == 'tsv' else 'commas, and a quote within quotes is written twice'}"
                ) from error
    except FileNotFoundError:
        raise no_such_file(path) from None
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: not in UTF-8 ({error}); save it as such, from Excel as 'CSV UTF-8'") from error
    except (OSError, EOFError, zlib.error) as error:
        raise BadInput(f"{path}: not a readable .{kind}, corrupt or truncated ({error})") from error
    if len(numbered) < 2:
        raise BadInput(f"{path}: needs a header line and at least one record")
    return numbered[0][1], numbered[1:]


def _objects(path: Path, file: TextIO) -> tuple[list[str], Rows]:
    """Of JSON objects, one a line; the first one's names are the columns."""
    header: list[str] = []
    rows: Rows = []
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise BadInput(f"{path}, line {number}: not JSON, corrupt or truncated ({error}); {OBJECT}") from error
        if not isinstance(found, dict):
            raise BadInput(f"{path}, line {number}: a {type(found).__name__} where each line is the object of a record")
        header = header or list(found)
        rows.append((number, [found.get(name) for name in header]))
    if not rows:
        raise BadInput(f"{path}: needs at least one record")
    return header, rows


def _string(cell: Any, where: str, name: str) -> str:
    """A text or a label, which may be a whole number or true or false in JSON."""
    if isinstance(cell, str):
        return cell
    if isinstance(cell, int):  # and no float: 1.0 would be another class than 1
        return json.dumps(cell)
    if cell is None:
        raise BadInput(f"{where}: no {name}; every record needs one, or take the line out")
    raise BadInput(f"{where}: {name} is a {type(cell).__name__}; give a string, or a whole number as a label")


def _join(columns: list[list[str]]) -> list[str] | list[tuple[str, str]]:
    return columns[0] if len(columns) == 1 else list(zip(*columns))


def _text_columns(where: object, header: Sequence[str], wanted: str | None, label: int) -> list[int]:
    """Where the text is, or the two of a pair."""
    names: Sequence[str | None]
    if wanted is None:
        rest = {name for i, name in enumerate(header) if i != label}
        names = next((pair for pair in TEXT_PAIRS if rest.issuperset(pair)), (None,))
    else:
        names = [wanted] if wanted in header else [name.strip() for name in wanted.split(",")]
    if len(names) > 2 or len(names) > len(set(names)):
        raise BadInput(f"{where}: --text-column names one column, or the two different ones of a pair; got {wanted!r}")
    found = [_column(where, header, name, TEXT_COLUMNS, "text", label) for name in names]
    if label in found:
        raise BadInput(f"{where}: column {header[label]!r} is the label, and cannot be the text as well")
    return found


def _column(
    where: object, header: Sequence[str], wanted: str | None, usual: Iterable[str], role: str, taken: int | None
) -> int:
    if wanted is not None:
        if wanted not in header:
            raise BadInput(f"{where}: no column {wanted!r}; the columns are {', '.join(header)}")
        usual = (wanted,)
    for name in usual:
        if header.count(name) > 1:
            raise BadInput(f"{where}: two columns are named {name!r}; which one is the {role}? Rename one")
        if name in header:
            return header.index(name)
    if taken is not None and len(header) == 2:
        return 1 - taken
    raise BadInput(
        f"{where}: which column is the {role}? Name it with --{role}-column; there are {', '.join(header)}. The first "
        f"line names the columns, with tabs between them in a .tsv and commas in a .csv"
    )
