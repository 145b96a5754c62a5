#!/usr/bin/env bash
# Compiles the native library for the systems that people have, by the compilers in the wheel `ziglang`, and runs the row kernels' test for those whose programs run here.
#
#   tests/ports.sh [PORT ...]      (all of them)
#
# LINK=no compiles only. Linking takes the C++ library of the port, which is compiled from its source the first time: one to three minutes of a core each. It is kept in $LAZYNEURON_CACHE, as the compilers are.
# PYTHON is one that has llama-cpp-python, whose headers are used.
set -euo pipefail
cd "$(dirname "$0")/.."

readonly PYTHON=${PYTHON:-.venv/bin/python} LINK=${LINK:-yes} OUT=$PWD/build/ports
readonly ZIG=0.17.1 # of the wheel
CACHE=${LAZYNEURON_CACHE:-$HOME/.cache/lazyneuron}
readonly COMPILERS=$CACHE/ziglang-$ZIG
export ZIG_GLOBAL_CACHE_DIR=$CACHE/zig ZIG_LOCAL_CACHE_DIR=$CACHE/zig

# The port's name for Zig, for CMake (system and processor), and what runs its programs: the machine itself (env), an emulator, or nothing (-).
readonly PORTS="
windows-x86_64 x86_64-windows-gnu      Windows AMD64   -
macos-arm64    aarch64-macos           Darwin  arm64   -
macos-x86_64   x86_64-macos            Darwin  x86_64  -
linux-aarch64  aarch64-linux-gnu.2.28  Linux   aarch64 qemu-aarch64
musl-x86_64    x86_64-linux-musl       Linux   x86_64  env
"

say() { printf '%s\n' "$*" >&2; }

fail() {
  say "error: $1"
  exit 1
}

install_compilers() {
  [ -e "$COMPILERS/.complete" ] && return
  say "installing ziglang $ZIG into $COMPILERS"
  rm -rf "$COMPILERS"
  python3 -m venv "$COMPILERS" >&2
  "$COMPILERS/bin/python" -m pip --disable-pip-version-check install --quiet "ziglang==$ZIG" >&2
  touch "$COMPILERS/.complete"
}

# Writes program $1: Zig's part $2 with the arguments $3, as CMake wants to call it.
write_tool() {
  cat >"$1" <<END
#!/usr/bin/env bash
arguments=() linking=yes
for argument; do
  case \$argument in
    -c | -E | -S | --version | -v) linking=no ;;
    # Zig takes a CPU and its features here, in its own spelling.
    -march=armv8.*) argument=\${argument#-march=armv8.} argument=-mcpu=generic+v8_\${argument/-a/a} ;;
  esac
  arguments+=("\$argument")
done
if [ "$2" = c++ ] && [ "\$linking$LINK" = yesno ]; then exit 1; fi
exec "$ZIG_PROGRAM" $2 $3 "\${arguments[@]}"
END
  chmod +x "$1"
}

# Compiles port $1, whose names are $2 (Zig), $3 and $4 (CMake), and runs its test by $5.
build_port() {
  local build=$OUT/$1 tools=$OUT/$1/tools objects log=$OUT/$1.log
  mkdir -p "$tools"
  write_tool "$tools/c++" c++ "-target $2"
  write_tool "$tools/ar" ar ""
  write_tool "$tools/rc" rc ""
  cmake -S runtime/native -B "$build" -DPython_EXECUTABLE="$(realpath -s "$PYTHON")" -DCMAKE_TRY_COMPILE_TARGET_TYPE=STATIC_LIBRARY \
    -DCMAKE_SYSTEM_NAME="$3" -DCMAKE_SYSTEM_PROCESSOR="$4" -DCMAKE_CXX_COMPILER="$tools/c++" -DCMAKE_AR="$tools/ar" -DCMAKE_RC_COMPILER="$tools/rc" \
    -DCMAKE_INSTALL_NAME_TOOL=/bin/true --no-warn-unused-cli >"$log" 2>&1 || return 1
  if [ "$LINK" = no ]; then
    # The library's own; the tests' programs are for some systems only.
    mapfile -t objects < <(make -C "$build" help | sed -n 's/^\.\.\. \(.*\.o\(bj\)\?\)$/\1/p' | grep -v tests/native/)
    cmake --build "$build" --parallel "$(nproc)" --target "${objects[@]}" >>"$log" 2>&1 || return 1
    say "$1: compiled"
    return
  fi
  cmake --build "$build" --parallel "$(nproc)" --target lazyneuron >>"$log" 2>&1 || return 1
  if [ "$5" = - ]; then
    say "$1: compiled and linked"
  elif ! command -v "$5" >/dev/null; then
    say "$1: compiled and linked; not run, since $5 is not installed"
  else
    cmake --build "$build" --parallel "$(nproc)" --target row_kernels_test >>"$log" 2>&1 || return 1
    say "$1: compiled and linked; $(run_test "$5" "$build/row_kernels_test" 2>>"$log" | tail -1)" || return 1
  fi
}

# Runs program $2 by $1.
run_test() {
  QEMU_LD_PREFIX=/usr/aarch64-linux-gnu "$1" "$2" || fail "$2 failed"
}

main() {
  local name target system processor runner wanted=" $* " failed=()
  install_compilers
  ZIG_PROGRAM=$(echo "$COMPILERS"/lib/python3*/site-packages/ziglang/zig)
  while read -r name target system processor runner; do
    [ -n "$name" ] && [[ $# = 0 || $wanted == *" $name "* ]] || continue
    build_port "$name" "$target" "$system" "$processor" "$runner" || { failed+=("$name"); grep -E "error|FAIL" -A6 "$OUT/$name.log" | head -40 >&2; say "$name: failed, see $OUT/$name.log"; }
  done <<<"$PORTS"
  [ ${#failed[@]} = 0 ] || fail "not compiled: ${failed[*]}"
}

main "$@"
