"""Put a Markdown file between two marks of another: ``python bench/readme.py MARK TABLE.md [README.md]``."""

import sys
from pathlib import Path


def insert(mark: str, table: str, page: str) -> str:
    """``page`` with ``table`` between <!-- mark:begin --> and <!-- mark:end -->. Raises ValueError without."""
    begin, end = f"<!-- {mark}:begin -->", f"<!-- {mark}:end -->"
    head, found, rest = page.partition(begin)
    _, closed, tail = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"the page has no {begin} ... {end}")
    return f"{head}{begin}\n\n{table.strip()}\n\n{end}{tail}"


if __name__ == "__main__":
    mark, table, *page = sys.argv[1:]
    path = Path(page[0] if page else "README.md")
    path.write_text(insert(mark, Path(table).read_text(), path.read_text()))
