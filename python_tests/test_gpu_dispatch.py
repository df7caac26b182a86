"""Never run, never default: on a GPU a kernel serves unasked only where a committed result shows that it passed."""

import contextlib
import gc
import json
import re
import weakref
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lalora_kernels import dispatch, gpu, segments

ROOT = Path(__file__).resolve().parent.parent
GPU_OPS = {"triton": set(dispatch.OPS), "cuda": set(dispatch.OPS)}


@pytest.fixture
def proofs(monkeypatch):
    shown: dict = {}
    monkeypatch.setattr(gpu, "proven", lambda: shown)
    monkeypatch.setattr(gpu, "family", lambda device=None: "sm_90")
    monkeypatch.setattr(gpu, "installed", lambda name: True)
    monkeypatch.delenv("LALORA_BACKEND", raising=False)
    return shown


def test_without_a_result_a_gpu_takes_the_reference(proofs):
    for op in dispatch.OPS:
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            assert dispatch.choose("cuda", dtype, op=op) == "reference"
            assert dispatch.choose("cuda", dtype, "triton", op) == "triton"
    assert gpu.marked("triton", "privatize") == "triton (unproven)"
    assert gpu.marked("reference", "privatize") == "reference" and gpu.marked("cpp", "privatize") == "cpp"


def test_a_result_counts_for_its_operation_and_family(proofs):
    proofs["triton"] = {"privatize": {"sm_90": "gpu-sm_90.json"}, "clip_reduce": {"sm_80": "gpu-sm_80.json"}}
    assert dispatch.choose("cuda", torch.float32, op="privatize") == "triton"
    assert dispatch.choose("cuda", torch.float64, op="privatize") == "reference"
    assert dispatch.choose("cuda", torch.float32, op="clip_reduce") == "reference"
    assert dispatch.choose("cuda", torch.float32, op="sample_grad") == "reference"
    assert gpu.marked("triton", "privatize") == "triton" and gpu.marked("triton", "clip_reduce") == "triton (unproven)"
    proofs["cuda"] = {op: {"sm_90": "gpu-sm_90.json"} for op in ("privatize", "sample_grad_clip")}
    assert dispatch.choose("cuda", torch.float32, op="privatize") == "cuda"
    assert dispatch.choose("cuda", torch.bfloat16, op="sample_grad_clip") == "reference"  # it does not hold every shape
    with dispatch.use_backend("reference"):
        assert dispatch.choose("cuda", torch.float32, op="privatize") == "reference"


def test_a_proven_kernel_that_is_not_installed_is_passed_over(proofs, monkeypatch):
    """A wheel holds no CUDA module: Triton's, proven on the same card, serves."""
    proofs["triton"] = {op: {"sm_90": "gpu-sm_90.json"} for op in dispatch.OPS}
    proofs["cuda"] = dict(proofs["triton"])
    monkeypatch.undo()
    monkeypatch.setattr(gpu, "proven", lambda: proofs)
    monkeypatch.setattr(gpu, "family", lambda device=None: "sm_90")
    monkeypatch.delenv("LALORA_BACKEND", raising=False)
    for missing, chosen in (("lalora_kernels._cuda", "triton"), ("triton", "cuda")):
        gpu.installed.cache_clear()
        monkeypatch.setattr(gpu, "find_spec", lambda name, missing=missing: None if name == missing else name)
        assert dispatch.choose("cuda", torch.float32, op="privatize") == chosen
        small = dispatch._by_size("sample_grad", "cuda", torch.bfloat16, None)
        assert small == (chosen == "cuda")
    gpu.installed.cache_clear()


def test_small_layers_take_the_cluster_kernel_where_it_is_proven_and_nobody_asks(proofs, monkeypatch):
    monkeypatch.setattr(dispatch, "_load", lambda op, name, *_: lambda *args, **kwargs: name)
    half = torch.device("cuda"), torch.bfloat16

    def serves(N=32, T=128, m=768, n=768, r=16, dtype=torch.bfloat16, like=half, backend=None):
        make = dict(dtype=dtype, device="meta")
        dy, B, x = torch.empty(N, T, m, **make), torch.empty(m, r, **make), torch.empty(N, T, n, **make)
        return dispatch.get("sample_grad", like, backend)(dy, B, 1.0, h=None, x=x)

    proofs["triton"] = {"sample_grad": {"sm_90": "gpu-sm_90.json"}}
    assert serves() == "triton"
    proofs["cuda"] = {"sample_grad": {"sm_90": "gpu-sm_90.json"}}
    assert serves() == "cuda" and serves(N=0) == "cuda"
    for large in (dict(T=257), dict(N=129, T=65), dict(m=4104), dict(n=4104), dict(N=64, n=2304), dict(r=17)):
        assert serves(**large) == "triton", large
    assert serves(dtype=torch.float32) == "triton"
    assert serves(like=(half[0], torch.float32)) == "triton" and serves(like=(half[0], torch.float64)) == "reference"
    assert serves(backend="triton") == "triton" and serves(backend="reference") == "reference"
    with dispatch.use_backend("triton"):
        assert serves() == "triton"
    monkeypatch.setattr(gpu, "family", lambda device=None: "sm_80")
    assert serves() == "reference"


def test_the_tensors_card_is_asked_about_not_the_current_one(proofs, monkeypatch):
    proofs["triton"] = {"privatize": {"sm_90": "gpu-sm_90.json"}}
    cards = {0: SimpleNamespace(major=8, minor=0), 1: SimpleNamespace(major=9, minor=0)}
    monkeypatch.undo()
    monkeypatch.setattr(gpu, "proven", lambda: proofs)
    monkeypatch.setattr(gpu, "installed", lambda name: True)
    monkeypatch.delenv("LALORA_BACKEND", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda d=0: cards[torch.device(d).index or 0])
    monkeypatch.setattr(dispatch, "_load", lambda op, name, *_: name)
    for device, chosen in (("cuda:0", "reference"), ("cuda:1", "triton"), ("cuda", "reference")):
        for d in (device, torch.device(device)):
            assert dispatch.get("privatize", (d, torch.float32)) == chosen
            assert dispatch.choose(d, torch.float32, op="privatize") == chosen


def test_whether_a_stream_is_captured_is_asked_on_the_tensors_card(monkeypatch):
    current = [0]

    @contextlib.contextmanager
    def device(d):
        before, current[0] = current[0], d.index
        yield
        current[0] = before

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: current[0] == 1)
    gpu.refuse_capture("privatize", torch.device("cuda", 0))
    with pytest.raises(RuntimeError, match="privatize: a captured CUDA graph"):
        gpu.refuse_capture("privatize", torch.device("cuda", 1))
    gpu.refuse_capture("privatize", torch.device("cpu"))


class Card:
    """A card for the table's cache: which stream is current, whether it is captured, and the tables built, alive."""

    def __init__(self, monkeypatch):
        self.stream, self.capturing, self.built = 1, False, []
        build = segments._build
        monkeypatch.setattr(segments, "_build", lambda *a: self.seen(build(*a[:-1], torch.device("cpu"))))
        monkeypatch.setattr(segments, "_tables", OrderedDict())
        monkeypatch.setattr(segments, "_captured", {})
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        monkeypatch.setattr(
            torch._C, "_cuda_getCurrentRawStream", lambda index: self.stream + 10 * index, raising=False
        )

    def seen(self, table):
        self.built.append(weakref.ref(table.rows))
        return table

    def table(self, k, card=0):
        rows = [(0, 0, 16, 16, 64 + k, 1, 1, 0, False)]
        return segments.table("clip_reduce", rows, 2048, torch.device("cuda", card))


def test_the_tables_of_a_captured_graph_are_never_freed(monkeypatch):
    """It keeps their addresses alone. What only ordinary launches took goes, as it did."""
    card = Card(monkeypatch)
    card.table(0), card.table(1)
    card.stream, card.capturing = 2, True
    captured = card.table(0)
    assert captured.rows is card.built[0](), "the graph takes what was copied on another stream before"
    with pytest.raises(RuntimeError, match="clip_reduce: tensors not seen before while a CUDA graph is captured"):
        card.table(2)
    del captured
    card.capturing = False
    for k in range(3, 3 + segments.KEPT):
        card.table(k)
    gc.collect()
    assert card.built[0]() is not None and card.built[1]() is None and len(segments._tables) == segments.KEPT
    card.capturing = True
    assert card.table(0).rows is card.built[0](), "a second graph of these tensors shares it"


def test_a_table_serves_the_stream_that_copied_it(monkeypatch):
    """Another might read it before it is copied, or write another table into its memory while this one reads."""
    card = Card(monkeypatch)
    first = card.table(0)
    assert card.table(0) is first
    card.stream = 2
    second = card.table(0)
    assert second is not first and card.table(0) is second and len(card.built) == 2
    card.stream = 1
    assert card.table(0) is first and len(card.built) == 2
    assert card.table(0, card=1) is not first and len(card.built) == 3


def test_a_filtered_axis_too_long_for_the_paddings_index_is_refused():
    def ask(length, smooth=True):
        rows = [(0, 0, 16, 16, length, length, 1, 0, smooth)]
        return segments._build("smooth", rows, 16384, torch.device("cpu"))

    with pytest.raises(ValueError, match=r"smooth: out\[0\] is filtered along an axis of 268435457 features; .* 2\^28"):
        ask(2**28 + 1)
    assert ask(2**28).smooth and not ask(2**28 + 1, smooth=False).smooth
    assert 5 * segments.MAX_LENGTH < 2**31, "index + 2 periods of twice the length"


def test_factors_whose_offsets_do_not_fit_32_bits_are_copied():
    """Of B over all its rows, as the kernels add row * stride to one pointer; of the others over a tile."""
    make = dict(device="meta", dtype=torch.bfloat16)
    dy = torch.empty(2, 4, 65_536, **make)
    for stride, as_it_lies in ((32_767, True), (40_000, False)):
        B = torch.empty_strided((65_536, 16), (stride, 1), **make)
        found = gpu.layer_inputs("sample_grad", dy, B, None, None)[1]
        assert (found is B) == as_it_lies and (as_it_lies or found.is_contiguous())
    x = torch.empty_strided((2, 4, 3), (400_000, 100_000, 1), **make)
    assert gpu.layer_inputs("sample_grad", dy, B, None, x)[3] is x


def test_every_proof_names_a_committed_result_that_passed():
    for backend, ops in gpu.proven().items():
        assert set(ops) <= GPU_OPS[backend]
        for op, families in ops.items():
            for family, name in families.items():
                result = json.loads((ROOT / "bench/results" / name).read_text())
                assert result["family"] == family and op in result["passed"][backend], name


def test_the_report_says_it(capsys):
    from lalora_kernels.__main__ import main

    main()
    printed = capsys.readouterr().out
    marks = re.findall(r"(?:triton|cuda) \(unproven\)", printed)
    assert len(marks) >= len(dispatch.OPS) - sum(len(ops) for ops in gpu.proven().values())
    assert "chosen only by name" in printed
