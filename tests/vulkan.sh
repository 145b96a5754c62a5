#!/usr/bin/env bash
# Runs the tests that need a GPU without one: on Mesa's software Vulkan, in an environment whose ggml is built for Vulkan.
#
#   LLAMA_CPP=llama-cpp-python==VERSION tests/vulkan.sh [pytest's arguments]
#
# PYTHON makes the environment. The wheel is compiled once and kept in $LAZYNEURON_CACHE: pip's own cache ignores CMAKE_ARGS and would take it for the plain one of the same name.
# System packages are checked, never installed.
set -euo pipefail
cd "$(dirname "$0")/.."

readonly PYTHON=${PYTHON:-python3} CACHE=${LAZYNEURON_CACHE:-$HOME/.cache/lazyneuron} VENV=build/venv-vulkan
readonly MODELS_PYTHON=${MODELS_PYTHON:-.venv/bin/python} # has transformers, which makes the tiny models
export LAZYNEURON_TEST_MODELS=$PWD/build/test-models
readonly DRIVER_PACKAGES=(mesa-vulkan-drivers) BUILD_PACKAGES=(glslc libvulkan-dev spirv-headers)
readonly DRIVERS=/usr/share/vulkan/icd.d
readonly HEADERS=1.4.309 HEADERS_RELEASE=trixie # the oldest Vulkan headers that ggml is known to compile with, and the Debian release that has them

say() { printf '%s\n' "$*" >&2; }

fail() { # what was found and expected, hint
  say "error: $1"
  say "hint: $2"
  exit 1
}

require_packages() {
  local package missing=()
  command -v dpkg-query apt-get >/dev/null ||
    fail "no apt on this system, expected Debian 12 or later" "on other systems, install llama-cpp-python for your own GPU: docs/install-gpu.md"
  for package; do
    [ "$(dpkg-query --show --showformat='${db:Status-Status}' "$package" 2>/dev/null)" = installed ] || missing+=("$package")
  done
  [ ${#missing[@]} = 0 ] || fail "missing Debian packages: ${missing[*]}" "sudo apt-get install ${missing[*]}"
}

headers_suffice() {
  c++ -std=c++17 -fsyntax-only -x c++ - 2>/dev/null <<<"#include <vulkan/vulkan_core.h>
    static_assert(VK_HEADER_VERSION_COMPLETE >= VK_MAKE_API_VERSION(0, ${HEADERS//./, }));"
}

# Unpacks the newer release's headers into folder $1; the system's packages stay as they are.
fetch_headers() {
  local mirror options
  mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Origin: Debian' 'Label: Debian' | head -n 1)
  [ -n "$mirror" ] ||
    fail "Vulkan headers older than $HEADERS, and apt knows no Debian mirror to fetch newer ones from" "sudo apt-get update, or upgrade libvulkan-dev"
  mkdir -p "$1/lists/partial" "$1/archives/partial"
  echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror $HEADERS_RELEASE main" >"$1/sources.list"
  options=(-qq -o "Dir::Etc::SourceList=$1/sources.list" -o Dir::Etc::SourceParts=- -o "Dir::State::Lists=$1/lists" -o "Dir::Cache=$1" -o APT::Sandbox::User=root)
  (cd "$1" && apt-get "${options[@]}" update && apt-get "${options[@]}" download "libvulkan-dev/$HEADERS_RELEASE") >&2 ||
    fail "no libvulkan-dev of Debian $HEADERS_RELEASE from $mirror" "see apt's message above"
  dpkg-deb --extract "$1"/libvulkan-dev_*.deb "$1"
}

# Compiles the wheel into folder $1, which comes into being only when it is complete.
build_wheel() {
  local arguments="-DGGML_VULKAN=on -DLLAVA_BUILD=off"
  mkdir -p "$CACHE"
  work=$(mktemp -d "$CACHE/building.XXXXXX")
  trap 'rm -rf "$work"' EXIT
  if ! headers_suffice; then
    say "fetching Vulkan headers $HEADERS of Debian $HEADERS_RELEASE"
    fetch_headers "$work/headers"
    arguments+=" -DVulkan_INCLUDE_DIR=$work/headers/usr/include"
  fi
  say "compiling $LLAMA_CPP for Vulkan into $1: this takes some 10 minutes"
  CMAKE_ARGS=$arguments "$VENV/bin/python" -m pip --disable-pip-version-check wheel --quiet --no-cache-dir --no-binary llama-cpp-python --no-deps --wheel-dir "$work/wheel" "$LLAMA_CPP" >&2
  mv "$work/wheel" "$1"
}

is_stale() { [ ! -e "$VENV/.setup" ] || [ -n "$(find pyproject.toml runtime/native tests/vulkan.sh -newer "$VENV/.setup")" ]; }

# The build folder of the package's own library is not that of the ordinary environment.
install() {
  local pip=("$VENV/bin/python" -m pip --disable-pip-version-check install --quiet)
  "${pip[@]}" "$1"/llama_cpp_python-*.whl filelock pytest pytest-timeout "scikit-build-core>=0.11" ninja >&2
  "${pip[@]}" --no-build-isolation --config-settings=build-dir=build/native-vulkan --editable . >&2
  touch "$VENV/.setup"
}

main() {
  local tag folder drivers
  tag=$("$PYTHON" -c 'import sys, sysconfig; print("cp{0}{1}".format(*sys.version_info), sysconfig.get_platform(), sep="-")')
  folder=$CACHE/${LLAMA_CPP/==/-}-vulkan-$tag
  if [ -d "$folder" ]; then require_packages "${DRIVER_PACKAGES[@]}"; else require_packages "${DRIVER_PACKAGES[@]}" "${BUILD_PACKAGES[@]}"; fi
  drivers=("$DRIVERS"/lvp_icd*.json)
  [ -e "${drivers[0]}" ] || fail "no lvp_icd*.json in $DRIVERS, expected Mesa's software driver" "sudo apt-get install --reinstall ${DRIVER_PACKAGES[*]}"

  [ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
  [ -d "$folder" ] || build_wheel "$folder"
  ! is_stale || install "$folder"

  "$MODELS_PYTHON" tests/make_models.py "$LAZYNEURON_TEST_MODELS" llama-gqa opt-pre-norm opt-post-norm mixtral-drelu-tied smallthinker-21b >&2
  export VK_DRIVER_FILES=${drivers[0]} # this driver alone, also where there is a GPU
  export GGML_VK_VISIBLE_DEVICES=0     # ggml passes over a Vulkan device of type CPU unless it is named
  "$VENV/bin/python" -m tests.devices >&2
  "$VENV/bin/python" -m pytest -m vulkan tests/test_vulkan.py tests/test_vulkan_bench.py "$@"
  say "once more, without F16 arithmetic on the device"
  GGML_VK_DISABLE_F16=1 "$VENV/bin/python" -m pytest -m vulkan tests/test_vulkan.py "$@"
}

: "${LLAMA_CPP:?which release? make test-vulkan names that of pyproject.toml}"
main "$@"
