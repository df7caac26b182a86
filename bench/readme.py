"""Put a Markdown file between two marks of another: ``python bench/readme.py MARK TABLE.md [README.md]``."""

import sys
from pathlib import Path

from lalora_kernels.table import put_into

if __name__ == "__main__":
    mark, table, *page = sys.argv[1:]
    put_into(Path(page[0] if page else "README.md"), Path(table).read_text(), mark)
