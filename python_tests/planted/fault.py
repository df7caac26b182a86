"""What a planted fault is."""

from dataclasses import dataclass

ENGINE, MAKE, CLIPPING = (f"lalora_kernels/privacy/{name}.py" for name in ("engine", "make_private", "clipping"))
NOISE, SAMPLING, LEDGER = (f"lalora_kernels/privacy/{name}.py" for name in ("noise", "sampling", "ledger"))
RECORDERS, RULES, ACCOUNTANT = (f"lalora_kernels/privacy/{name}.py" for name in ("recorders", "rules", "accountant"))
TIES, REDUCTION, OPTIMIZER = (f"lalora_kernels/privacy/{name}.py" for name in ("ties", "reduction", "optimizer"))
REFERENCE, CPU, FEDERATED = "lalora_kernels/reference", "csrc/cpu", "lalora_kernels/federated"


@dataclass(frozen=True)
class Fault:
    """``tests`` are the files of python_tests that should notice, the likeliest first."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    @property
    def native(self) -> bool:
        """Whether the kernels must be built again."""
        return self.file.startswith("csrc/")


def fault(name: str, file: str, old: str, new: str, *tests: str) -> Fault:
    return Fault(name, file, old, new, tuple(f"test_{t}.py" for t in tests))
