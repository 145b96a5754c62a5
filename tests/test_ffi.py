"""Every declared C function and struct, compared by the C compiler with the headers that llama-cpp-python installs."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from runtime.bindings import ffi, ggml, llama, sparse_ffn
from runtime.errors import UserError

HEADERS = ("ggml.h", "ggml-cpu.h", "ggml-alloc.h", "ggml-backend.h", "gguf.h", "llama.h")
LIBRARIES = (ffi.GGML_BASE, ffi.GGML_CPU, ffi.GGML, ffi.LLAMA)


def include_folder() -> Path:
    spec = importlib.util.find_spec("llama_cpp")
    assert spec and spec.origin
    return Path(spec.origin).parent.parent / "include"


def compile_c(source: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    compiler = shutil.which("cc") or shutil.which("gcc")
    assert compiler, "a C compiler is needed to compare the stubs with the headers"
    file = tmp_path / "check.c"
    file.write_text(source)
    return subprocess.run(
        [
            compiler,
            "-std=gnu11",
            "-fsyntax-only",
            "-Wno-deprecated-declarations",
            "-I",
            str(include_folder()),
            str(file),
        ],
        capture_output=True,
        text=True,
        check=False,
    )


def includes() -> str:
    return "#include <stddef.h>\n" + "".join(f'#include "{h}"\n' for h in HEADERS)


def prototype_check(name: str, function: object) -> str:
    *arguments, result = (ffi.c_type(a).spelling for a in function.__annotations__.values())  # type: ignore[attr-defined]
    pointer = f"{result} (*)({', '.join(arguments) or 'void'})"
    return f'_Static_assert(__builtin_types_compatible_p(__typeof__(&{name}), {pointer}), "{name}");\n'


def test_prototypes_match_the_headers(tmp_path: Path) -> None:
    checks = [prototype_check(n, f) for library in LIBRARIES for n, f in library.stubs.items()]
    assert len(checks) > 90
    done = compile_c(includes() + "".join(checks), tmp_path)
    assert done.returncode == 0, done.stderr


def test_a_wrong_prototype_would_be_caught(tmp_path: Path) -> None:
    wrong = '_Static_assert(__builtin_types_compatible_p(__typeof__(&ggml_nbytes), int (*)(const struct ggml_tensor *)), "ggml_nbytes");'
    done = compile_c(includes() + wrong, tmp_path)
    assert done.returncode != 0
    assert "ggml_nbytes" in done.stderr


def struct_checks(struct: type[ctypes.Structure], c_name: str) -> str:
    checks = [f'_Static_assert(sizeof({c_name}) == {ctypes.sizeof(struct)}, "{c_name} size");\n']
    for name, *_ in struct._fields_:
        if not name.startswith("_"):
            field = getattr(struct, name)
            where = f"offsetof({c_name}, {name}) == {field.offset}"
            size = f"sizeof((({c_name} *)0)->{name}) == {field.size}"
            checks.append(f'_Static_assert({where} && {size}, "{c_name}.{name}");\n')
    return "".join(checks)


def test_structs_match_the_headers(tmp_path: Path) -> None:
    checks = "".join(
        struct_checks(s, f"struct {s.__name__}")
        for s in (*ggml.STRUCTS, *llama.STRUCTS)
        if s is not llama.llama_token_data_array
    )
    checks += struct_checks(llama.llama_token_data_array, "llama_token_data_array")
    done = compile_c(includes() + checks, tmp_path)
    assert done.returncode == 0, done.stderr


def test_native_structs_match_their_header(tmp_path: Path) -> None:
    header = Path(__file__).parent.parent / "runtime/native/lazyneuron.h"
    source = f'#define LZN_API\n#include "ggml.h"\n#include <stddef.h>\n{_without_extern_c(header.read_text())}\n'
    source += struct_checks(sparse_ffn.Rows, "struct lzn_rows") + struct_checks(sparse_ffn.Ffn, "struct lzn_ffn")
    done = compile_c(source, tmp_path)
    assert done.returncode == 0, done.stderr


def _without_extern_c(header: str) -> str:
    return header.replace("#pragma once", "").replace('extern "C" ', "")


def test_enum_values_match_the_headers(tmp_path: Path) -> None:
    names = {name: f"GGML_TYPE_{name.upper()}" for name in ggml.TYPES}
    checks = [f'_Static_assert({c} == {ggml.TYPES[n]}, "{c}");\n' for n, c in names.items()]
    pairs = {
        "GGML_TYPE_COUNT": ggml.TYPE_COUNT,
        "GGML_STATUS_SUCCESS": ggml.STATUS_SUCCESS,
        "GGUF_TYPE_STRING": ggml.GGUF_TYPE_STRING,
        "GGUF_TYPE_ARRAY": ggml.GGUF_TYPE_ARRAY,
        "GGML_ROPE_TYPE_NORMAL": ggml.ROPE_TYPE_NORMAL,
        "GGML_ROPE_TYPE_NEOX": ggml.ROPE_TYPE_NEOX,
        "LLAMA_KV_OVERRIDE_TYPE_STR": llama.KV_OVERRIDE_TYPE_STR,
        "LLAMA_DEFAULT_SEED": llama.DEFAULT_SEED,
    }
    checks += [f'_Static_assert({c} == {v}, "{c}");\n' for c, v in pairs.items()]
    done = compile_c(includes() + "".join(checks), tmp_path)
    assert done.returncode == 0, done.stderr


def test_every_symbol_is_exported() -> None:
    for library in LIBRARIES:
        for name in library.stubs:
            library.symbol(name)


MAPPINGS = """
import pathlib, re, sys
def ours():
    from runtime.bindings import ggml, llama
    ggml.ggml_version(); llama.llama_model_default_params()
def theirs():
    import llama_cpp
    llama_cpp.llama_backend_init()
for load in ({order}):
    load()
files = {{line.split()[-1] for line in pathlib.Path("/proc/self/maps").read_text().splitlines() if re.search("lib(ggml|llama)[-.]", line)}}
names = sorted(re.sub(r"\\.so.*", "", pathlib.Path(f).name) for f in files)
print(*names)
"""


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc/self/maps")
@pytest.mark.parametrize("order", ["ours, theirs", "theirs, ours"])
def test_each_library_is_mapped_once(order: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", MAPPINGS.format(order=order)], capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["libggml", "libggml-base", "libggml-cpu", "libllama"], done.stdout + done.stderr


def run_with(environment: dict[str, str], code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )


REPORT = "import sys; from runtime.cli.program import run_command; from runtime.bindings import {module}; sys.exit(run_command({call}))"


def test_missing_libraries_are_one_line(tmp_path: Path) -> None:
    done = run_with({"LLAMA_CPP_LIB_PATH": str(tmp_path)}, REPORT.format(module="ggml", call="ggml.ggml_version"))
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: `{tmp_path}`: no libggml-base")
    assert "hint: reinstall" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_library_that_is_none_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "libggml-base.so").write_bytes(b"not a library")
    done = run_with({"LLAMA_CPP_LIB_PATH": str(tmp_path)}, REPORT.format(module="ggml", call="ggml.ggml_version"))
    assert (done.returncode, done.stderr.count("\n")) == (1, 2), done.stderr


def test_a_function_that_is_gone_is_a_user_error() -> None:
    with pytest.raises(UserError, match="no function `ggml_no_such_function`"):
        ffi.GGML_BASE.symbol("ggml_no_such_function")


def test_another_ggml_is_refused(tmp_path: Path) -> None:
    library = tmp_path / "liblazyneuron.so"
    source = tmp_path / "fake.c"
    source.write_text('#include <stddef.h>\nconst char * lzn_ggml_version(void) { return "0.9.0"; }\n'
                      + "".join(f"size_t {n}(void) {{ return 0; }}\n" for n in ("lzn_sizeof_tensor", "lzn_sizeof_ffn", "lzn_sizeof_product", "lzn_gate_size", "lzn_down_size")))  # fmt: skip
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)
    done = run_with({"LAZYNEURON_LIBRARY": str(library)}, REPORT.format(module="sparse_ffn", call="sparse_ffn.library"))
    assert done.returncode == 1
    assert "built for ggml 0.9.0, found ggml" in done.stderr
