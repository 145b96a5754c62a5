#!/usr/bin/env bash
# Runs a benchmark as a CPU that has AVX2 and nothing newer would run it: with an AVX2 build of llama.cpp and ggml, and our AVX2 kernels.
#
#   LLAMA_CPP=llama-cpp-python==VERSION bench/avx2.sh bench.decode [its options]
#
# PYTHON is that of the environment. The libraries are compiled once, from the source of the pinned release, and kept in $LAZYNEURON_CACHE.
set -euo pipefail
cd "$(dirname "$0")/.."

readonly PYTHON=${PYTHON:-.venv/bin/python} CACHE=${LAZYNEURON_CACHE:-$HOME/.cache/lazyneuron}
readonly ON=(GGML_SSE42 GGML_AVX GGML_AVX2 GGML_FMA GGML_F16C GGML_BMI2)
readonly OFF=(GGML_NATIVE GGML_AVX_VNNI GGML_AVX512 GGML_AVX512_VBMI GGML_AVX512_VNNI GGML_AVX512_BF16 GGML_AMX_TILE GGML_AMX_INT8 GGML_AMX_BF16 LLAVA_BUILD)

say() { printf '%s\n' "$*" >&2; }

# Compiles the libraries into folder $1, which comes into being only when it is complete.
build() {
  local name arguments=()
  for name in "${ON[@]}"; do arguments+=("-D$name=ON"); done
  for name in "${OFF[@]}"; do arguments+=("-D$name=OFF"); done
  mkdir -p "$CACHE"
  work=$(mktemp -d "$CACHE/building.XXXXXX")
  trap 'rm -rf "$work"' EXIT
  say "compiling $LLAMA_CPP for AVX2 into $1: this takes some 10 minutes"
  CMAKE_ARGS="${arguments[*]}" "$PYTHON" -m pip --disable-pip-version-check wheel --quiet --no-cache-dir --no-binary llama-cpp-python --no-deps --wheel-dir "$work" "$LLAMA_CPP" >&2
  "$PYTHON" -m zipfile --extract "$work"/llama_cpp_python-*.whl "$work/unpacked"
  mv "$work/unpacked/llama_cpp/lib" "$1"
}

main() {
  local folder
  folder=$CACHE/${LLAMA_CPP/==/-}-avx2-$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_platform())')
  [ -d "$folder" ] || build "$folder"
  LLAMA_CPP_LIB_PATH=$folder LAZYNEURON_KERNELS=avx2 exec "$PYTHON" -m "$@"
}

: "${LLAMA_CPP:?which release? make bench-avx2 names that of pyproject.toml}"
main "$@"
