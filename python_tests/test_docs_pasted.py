"""The quickstart's first block in a process of its own, where nothing has mended torchvision's import before it."""

import subprocess
import sys

from test_docs import ROOT, blocks


def test_the_first_line_of_the_quickstart_mends_the_imports():
    _, text = blocks(ROOT / "docs" / "quickstart.md", "python")[0]
    first, rest = text.removeprefix("# ").split("\n", 1)
    imports = [line for line in rest.splitlines() if line.startswith(("import ", "from "))]
    assert first.startswith("from lalora_kernels.models import torchvision_beside_cpu_torch; ") and len(imports) == 5
    subprocess.run([sys.executable, "-c", "\n".join([first, *imports, "import timm, peft"])], check=True)
