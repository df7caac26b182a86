"""Compiles every GPU kernel without a GPU and tabulates what the compiler made of it.

    python bench/gpu_compile.py [--only triton|cuda] [--quick] [--archs 80 90 gfx942] [--write bench/results]

Triton: the launchers of ``lalora_kernels.triton_ops`` run on CPU tensors of real sizes with the launch itself replaced
by ahead-of-time compilation, so what is compiled is what they launch, at its default configuration. CUDA:
``csrc/cuda`` as the build compiled it. Registers, shared memory (static) and spills come from the cubin's resource
table, kinds of instructions from its SASS; for AMD (gfx942) both from the assembler text, under NVIDIA's names.
Exit status 1 where a kernel spills or lacks the instructions that it is meant to have.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections import Counter
from functools import partial
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
TRITON_ARCHS = ("80", "90", "gfx942")
CUDA_ARCHS = ("80", "90a")
OPCODE = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.M)


def tool(name: str) -> str | None:
    """A program of the CUDA toolkit, from the path or from Triton's wheel."""
    found = shutil.which(name) or shutil.which(f"/usr/local/cuda/bin/{name}")
    if found:
        return found
    try:
        import triton
    except ImportError:
        return None
    bundled = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    return str(bundled) if bundled.exists() else None


def opcode_kinds(sass: str) -> dict[str, int]:
    """How often the SASS of one kernel uses each kind of instruction that the table shows."""
    opcodes = Counter(OPCODE.findall(sass))

    def count(*prefixes: str) -> int:
        return sum(n for op, n in opcodes.items() if op.startswith(prefixes))

    wide = sum(n for op, n in opcodes.items() if re.match(r"LDG\.E.*\.128|LDGSTS\..*128|LDG\.128|UTMALDG|UBLKCP", op))
    return {
        "hgmma": count("HGMMA"),
        "hmma": count("HMMA"),
        "ffma": count("FFMA"),
        "ldg": count("LDG.", "LDGSTS", "UTMALDG", "UBLKCP"),
        "ldg128": wide,
        "stg128": sum(n for op, n in opcodes.items() if op.startswith("STG") and "128" in op),
        "local": count("LDL", "STL"),
    }


def amd_kinds(assembly: str) -> dict[str, int]:
    """The same of AMD's assembler text, with its resources."""

    def field(name: str) -> int:
        return int(re.search(rf"^[\s-]*\.{name}:\s*(\d+)", assembly, re.M).group(1))

    def count(pattern: str) -> int:
        return len(re.findall(rf"^\s+{pattern}", assembly, re.M))

    return {
        "registers": field("vgpr_count") + field("agpr_count"),
        "stack": field("private_segment_fixed_size"),
        "local": field("vgpr_spill_count") + field("sgpr_spill_count"),
        "hgmma": 0,
        "hmma": count("v_mfma"),
        "ffma": count("v_(?:pk_)?fmac?_f32"),
        "ldg": count("(?:global|buffer)_load"),
        "ldg128": count("(?:global|buffer)_load_dwordx4"),
        "stg128": count("(?:global|buffer)_store_dwordx4"),
    }


def inspect(binary: Path, arch: str | None = None) -> dict[str, dict]:
    """Mangled kernel name -> resources and instruction kinds, of a cubin, or of a library's part for ``arch``."""

    def dump(what: str) -> str:
        command = [tool("cuobjdump"), f"--dump-{what}", *(["-arch", arch] if arch else []), binary]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    usage, sass, rows = dump("resource-usage"), dump("sass"), {}
    for name, text in re.findall(r"Function ([^\s:]+):\s*\n\s*(.*)", usage):
        fields = dict(re.findall(r"(\w+):(\d+)", text))
        rows[name] = {"registers": int(fields["REG"]), "shared": int(fields["SHARED"]), "stack": int(fields["STACK"])}
    for part in sass.split("Function : ")[1:]:
        name, _, body = part.partition("\n")
        if name.strip() in rows:
            rows[name.strip()].update(opcode_kinds(body))
    return rows


# ---------------------------------------------------------------- Triton


def signature_of(fn, args: tuple, kwargs: dict) -> tuple[dict, dict, dict]:
    """(signature, constants, attributes) under which Triton's JIT would compile this call."""
    types = {torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16",
             torch.int32: "i32", torch.int64: "i64"}  # fmt: skip
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(fn.params):
        value = args[i] if i < len(args) else kwargs[parameter.name]
        free = not parameter.do_not_specialize
        if parameter.is_constexpr or (free and type(value) is int and value == 1):
            signature[parameter.name], constants[(i,)] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[parameter.name], divisible = "*" + types[value.dtype], value.data_ptr() % 16 == 0
        elif isinstance(value, float):
            signature[parameter.name], divisible = "fp32", False
        else:
            signature[parameter.name] = "i32" if -(1 << 31) <= value < 1 << 31 else "i64"
            divisible = free and value % 16 == 0
        if divisible:
            attributes[(i,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def cases(quick: bool):
    """(name, what must be in the SASS, call) for every kernel; inputs have the shapes of real layers."""
    from lalora_kernels.triton_ops import chacha20_normal as noise
    from lalora_kernels.triton_ops import clip_reduce, privatize, sample_grad, sample_grad_clip

    def layer(dtype, N, T, m, r):
        dy, h = torch.empty(N, T, m, dtype=dtype), torch.empty(N, T, r, dtype=dtype)
        return dy, torch.empty(m, r, dtype=dtype), h, f"{str(dtype).removeprefix('torch.')} {N}x{T}x{m} r{r}"

    shapes = [(16, 512, 4096, 16), (8, 2048, 4096, 64), (64, 197, 768, 16), (64, 197, 768, 8), (4, 1024, 2048, 128)]
    shapes.append((4, 1024, 2048, 256))
    for dtype in (torch.bfloat16, torch.float16, torch.float32)[: 1 if quick else None]:
        matrix = ("mma", "ldg128") if dtype != torch.float32 else ("ldg128",)
        for shape in shapes[: 1 if quick else None]:
            dy, B, h, name = layer(dtype, *shape)
            yield f"sample_grad B {name}", matrix, partial(sample_grad, dy, B, 1.0, h=h)
            yield f"sample_grad A {name}", matrix, partial(sample_grad, dy, B, 1.0, x=dy)
        for m in (512, 128)[: 1 if quick else 2]:
            dy, B, h, name = layer(dtype, 256, 64, m, 16)
            clip = partial(sample_grad_clip, dy, B, 1.0, max_norm=1.0)
            yield f"sample_grad_clip B {name}", matrix, partial(clip, h=h)
            yield f"sample_grad_clip A {name}", matrix, partial(clip, x=dy)
    out, weights, key = [torch.empty(4096, 16), torch.empty(16, 4096)], torch.empty(2, 32), bytes(range(32))
    G = [torch.empty(32, *o.shape) for o in out]
    release = dict(noise_std=1.0, key=key, release=7, tensor_index=[0, 1], smooth_dim=[0, 1], divisor=16.0)
    streaming = ("ldg128", "stg128")
    yield "privatize float32", streaming, partial(privatize, G, [None, None], weights, out, **release)
    yield "clip_reduce float32", streaming, partial(clip_reduce, G, weights, out)
    made = dict(key=key, release=7, tensor_index=0, device="cpu")
    yield "chacha20_normal float32", ("stg128",), partial(noise, 1 << 20, **made)


def compile_triton(archs=TRITON_ARCHS, quick: bool = False) -> list[dict]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.jit import JITFunction

    from lalora_kernels.triton_ops import common

    if common.INTERPRET:
        raise RuntimeError("TRITON_INTERPRET=1 interprets the kernels; unset it to compile them")
    launches: list[tuple] = []
    launch = JITFunction.run
    JITFunction.run = lambda self, *args, grid, warmup, **kwargs: launches.append((self, args, kwargs))
    rows = []
    try:
        for arch in archs:
            amd = arch.startswith("gfx")
            common.assumed = common.Chip(80 if amd else int(arch), {"80": 108, "90": 132}.get(arch, 304))
            target = GPUTarget("hip", arch, 64) if amd else GPUTarget("cuda", int(arch), 32)
            seen = set()
            for name, wants, call in cases(quick):
                launches.clear()
                call()
                for fn, args, kwargs in launches:
                    signature, constants, attributes = signature_of(fn, args, kwargs)
                    options = {k: v for k, v in kwargs.items() if k in ("num_warps", "num_stages", "enable_fp_fusion")}
                    same = repr((fn.__name__, signature, constants, attributes, options))
                    if same in seen:
                        continue
                    seen.add(same)
                    source = ASTSource(fn, signature, constants, attributes)
                    compiled = triton.compile(source, target=target, options=options)
                    if amd:
                        found = amd_kinds(compiled.asm["amdgcn"])
                    else:
                        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
                            file.write(compiled.asm["cubin"])
                            file.flush()
                            found = inspect(Path(file.name))[fn.__name__]
                    found["shared"] = compiled.metadata.shared
                    helper = amd or fn.__name__ in ("finish_kernel", "add_up_kernel")
                    about = {"arch": arch if amd else f"sm_{arch}", "kernel": fn.__name__, "for": name}
                    threads = target.warp_size * compiled.metadata.num_warps
                    rows.append({**about, "threads": threads, "wants": [] if helper else list(wants), **found})
    finally:
        JITFunction.run, common.assumed = launch, None
    return rows


# ---------------------------------------------------------------- CUDA C++


def extension() -> Path | None:
    """The compiled csrc/cuda of this Python, as the build left it."""
    import lalora_kernels

    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    path = Path(lalora_kernels.__file__).with_name(f"_cuda{suffix}")
    return path if path.exists() else None


def wanted(kernel: str) -> list[str]:
    """What the SASS of a CUDA kernel must show."""
    if "sample_grad_clip" in kernel:
        return ["ldg128"] if "<float" in kernel or "Traits<float" in kernel else ["mma", "ldg128"]
    aligned = kernel.split("(")[0].endswith("true>")
    if "release_kernel" in kernel and aligned:
        return ["ldg128", "stg128"]
    return ["stg128"] if "chacha20_normal" in kernel and aligned else []


def readable(mangled: str) -> str:
    plain = subprocess.run(["c++filt", mangled], capture_output=True, text=True).stdout.strip() or mangled
    return re.sub(r"lalora::cuda::|\(anonymous namespace\)::|^void ", "", plain).split("(")[0]


def inspect_cuda(archs=CUDA_ARCHS) -> list[dict]:
    rows = []
    for arch in archs:
        for name, found in sorted(inspect(extension(), f"sm_{arch}").items()):
            kernel = readable(name)
            if "sample_grad_clip_kernel" in kernel and arch[:2] < "90":
                continue  # empty there: it needs clusters
            rows.append({"arch": f"sm_{arch}", "kernel": kernel, "for": "csrc/cuda", "wants": wanted(kernel), **found})
    return rows


# ---------------------------------------------------------------- verdict


def faults(row: dict) -> list[str]:
    """What is wrong with a kernel for NVIDIA; for AMD, where none has run, the table is all there is."""
    if row["arch"].startswith("gfx"):
        return []
    found = []
    if row["stack"] or row["local"]:
        found.append(f"spills: {row['stack']} bytes of stack, {row['local']} local accesses")
    have = {"mma": row["hmma"] + row["hgmma"], "ldg128": row["ldg128"], "stg128": row["stg128"]}
    return found + [f"no {kind} in its SASS" for kind in row["wants"] if not have[kind]]


COLUMNS = ("registers", "shared", "stack", "local", "hgmma", "hmma", "ffma", "ldg", "ldg128", "stg128")


def table(rows: list[dict]) -> str:
    lines = ["| arch | kernel | for | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 3) + "|"]
    for row in rows:
        cells = [row["arch"], row["kernel"], row["for"], *(str(row[c]) for c in COLUMNS)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("triton", "cuda"))
    parser.add_argument("--archs", nargs="*", help=f"for Triton; default {' '.join(TRITON_ARCHS)}")
    parser.add_argument("--quick", action="store_true", help="bfloat16 and one shape")
    parser.add_argument("--write", type=Path, help="folder for gpu_compile.json and gpu_compile.md")
    args = parser.parse_args()
    rows, versions = [], {"torch": torch.__version__}
    if args.only != "cuda":
        import triton

        versions["triton"] = triton.__version__
        rows += compile_triton(tuple(args.archs or TRITON_ARCHS), args.quick)
    if args.only != "triton":
        if extension() is None:
            print("lalora_kernels._cuda was not built (nvcc): csrc/cuda is left out", file=sys.stderr)
        else:
            rows += inspect_cuda()
    text = table(rows)
    print(text)
    bad = [f"{row['arch']} {row['kernel']} ({row['for']}): {fault}" for row in rows for fault in faults(row)]
    print("\n".join(bad) if bad else f"{len(rows)} kernels, no fault")
    if args.write:
        about = ", ".join(f"{k} {v}" for k, v in versions.items())
        head = (
            f"# GPU kernels, compiled ahead of time\n\n`make gpu-compile` with {about}. Registers a thread, shared "
            f"memory and stack in bytes, then counts of SASS instructions; `local`: accesses of spilled registers. "
            f"gfx942 is AMD's: hmma stands for MFMA, ldg and stg for global loads and stores. csrc/cuda: static shared "
            f"memory only, as the build compiled it.\n\n"
        )
        (args.write / "gpu_compile.md").write_text(head + text + "\n")
        record = json.dumps({"versions": versions, "kernels": rows}, indent=1)
        (args.write / "gpu_compile.json").write_text(record + "\n")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
