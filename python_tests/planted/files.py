"""Faults in what stands in files: whose records are set aside, who may write a ledger, what leaves the machine."""

from planted.fault import FEDERATED, REDUCTION, fault

DATA, LEDGER_FILE = "lalora_kernels/data.py", "lalora_kernels/privacy/ledger_file.py"

FILES = (
    fault(
        "records set aside by where they stand in the file",
        DATA,
        "hashlib.sha256(SPLIT_SALT + records.digest(i)).digest()",
        "hashlib.sha256(SPLIT_SALT + str(i).encode()).digest()",
        "data",
    ),
    fault(
        "a copy of the training records taken for public test records",
        DATA,
        "if len(test) and shared >= KNOWN_SHARE * len(test):",
        "if False:",
        "data_known",
    ),
    fault(
        "accuracy on private records logged as public",
        "lalora_kernels/loggers.py",
        "public_test = not record.get(PRIVATE_TEST)",
        "public_test = True",
        "loggers",
    ),
    fault(
        "a record's lifetime ledger depends on which labels others have",
        f"{FEDERATED}/lifetime.py",
        "frozenset(records.digest(i) for i in indices)",
        "frozenset(records.digest(i)[:31] + bytes([records[i][1]]) for i in indices)",
        "data",
    ),
    fault(
        "a ledger's file written over what another one charged",
        LEDGER_FILE,
        "if self.path.exists() and self.path.read_bytes() not in self._known:",
        "if False:",
        "ledger_at",
    ),
    fault(
        "two processes on one ledger",
        LEDGER_FILE,
        'FileLock(place.with_name(place.name + ".lock"))',
        'FileLock(place.with_name(f"{place.name}.{os.getpid()}.lock"))',
        "ledger_at",
    ),
    fault(
        "a run starts at zero from weights that another run trained",
        f"{FEDERATED}/run.py",
        "        task.refuse_trained()\n",
        "",
        "task",
    ),
    fault(
        "Ctrl-C loses an update that is paid for",
        f"{FEDERATED}/run.py",
        "with uninterrupted():  # between the two",
        "if True:  # between the two",
        "robustness",
    ),
    fault(
        "a message that comes again is refused while the first is answered",
        f"{FEDERATED}/node.py",
        'RunLock(self.home / "ledgers", PATIENCE)',
        'RunLock(self.home / "ledgers")',
        "flower_client",
    ),
    fault(
        "a loss that picks records taken for a sum",
        REDUCTION,
        "if idle := int(without_gradient(z, dz).sum()):",
        "if idle := 0:",
        "reduction",
    ),
    fault(
        "adapters that somebody froze train all the same",
        "lalora_kernels/privacy/trained.py",
        "if pair and not any(p is not None and p.requires_grad for p in pair):",
        "if False:",
        "refusals",
    ),
)  # fmt: skip
