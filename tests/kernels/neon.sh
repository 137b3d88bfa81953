#!/bin/sh
# neon.sh SOURCE BUILD FLAG..: compiles the kernels for AArch64, with FLAGs those of NEON, and runs kernels_check --small
# on them in an emulated CPU. Exit code 77 where the compiler or the emulator is missing.
set -e
source=$1
build=$2
shift 2
compiler=aarch64-linux-gnu-g++
if ! command -v $compiler >/dev/null || ! command -v qemu-aarch64 >/dev/null; then
  echo "skipped: needs a cross compiler and an emulator. Hint: apt-get install g++-aarch64-linux-gnu qemu-user"
  exit 77
fi
mkdir -p "$build"
cpu=$source/gemma_torch/kernels/cpu
objects=
# compile FILE FLAG..: one object, again only if one of the sources is newer
compile() {
  file=$1
  shift
  object=$build/$(basename "$file" .cpp).o
  objects="$objects $object"
  changed=$(find "$source/gemma_torch/kernels" "$source/tests/kernels" -newer "$object" 2>/dev/null | head -n 1)
  if [ ! -e "$object" ] || [ -n "$changed" ]; then
    $compiler -std=c++20 "-I$source" "-I$source/tests/kernels" "$@" -c "$file" -o "$object"
  fi
}
compile "$cpu/fused_kernels_neon.cpp" "$@"
compile "$cpu/training_kernels_neon.cpp" "$@"
for name in fused training; do
  compile "$cpu/${name}_kernels_generic.cpp" -O3 -ffp-contract=fast -Wno-psabi
done
for file in "$cpu/isa.cpp" "$cpu/packed.cpp" "$cpu/head_scan.cpp" "$cpu/fused_kernels.cpp" "$cpu/training_kernels.cpp" \
    "$source/gemma_torch/kernels/team.cpp" "$source"/tests/kernels/*.cpp; do
  compile "$file" -O2 -Wno-psabi
done
$compiler $objects -pthread -o "$build/kernels_check_neon"
qemu-aarch64 -L /usr/aarch64-linux-gnu "$build/kernels_check_neon" --small neon
