#!/usr/bin/env bash
# On a machine with an NVIDIA GPU: builds this project with the PyTorch of python3, proves its CUDA work and measures it
# beside transformers, in one call of under ten minutes. Needs nvcc, cmake, ninja, and in python3 torch, transformers.
#
#   bash tests/gpu/run_all.sh [OUT]           logs and results to OUT [build/gpu], the tables in OUT/summary.md
#   bash tests/gpu/run_all.sh --pack FOLDER   on Debian: copies what the build needs besides (headers, sentencepiece) from
#                                             this system to FOLDER, for a machine that can install nothing
#
# There: GEMMA_TORCH_DEPS=FOLDER bash tests/gpu/run_all.sh. DEVICE=cpu tries the script itself, without a GPU.
set -uo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
repo=$(cd "$here/../.." && pwd)
device=${DEVICE:-cuda}
failed=0

pack() {   # FOLDER
  local folder=$1 file library
  local packages=(nlohmann-json3-dev libcli11-dev catch2 libsentencepiece-dev)
  mkdir -p "$folder" || exit
  for file in $(dpkg -L "${packages[@]}" | grep -E '^/usr/(include|lib|share/(cmake|pkgconfig))/'); do
    if [ -f "$file" ]; then cp -P --parents "$file" "$folder"; fi
  done
  library=$(find /usr/lib -name libsentencepiece.so | head -n 1)
  ldd "$library" | awk '/=> \/[^ ]*(protobuf|sentencepiece)/ {print $3}' | while read -r file; do
    cp -L --parents "$file" "$folder"
  done
  cp -L --parents "$library".0 "$folder"
  du -sh "$folder"
}

# step NAME COMMAND..: what it prints goes to OUT/NAME.log; a failure is told and does not stop the others.
step() {
  local name=$1 start=$SECONDS
  shift
  if "$@" > "$out/$name.log" 2>&1; then
    echo "ok      $name ($((SECONDS - start)) s)"
  else
    failed=$((failed + 1))
    echo "FAILED  $name ($((SECONDS - start)) s): $(grep -v '^ *$' "$out/$name.log" | tail -n 1)"
  fi
}

build() {
  local torch deps=${GEMMA_TORCH_DEPS:-}
  torch=$(python3 -c 'import torch; print(torch.utils.cmake_prefix_path)') || return
  if [ -n "$deps" ]; then deps=$(cd "$deps" && pwd)/usr || return; fi
  cmake -S "$repo" -B "$out/build" -G Ninja -D CMAKE_BUILD_TYPE=Release -D Torch_DIR="$torch/Torch" \
    -D CMAKE_PREFIX_PATH="$deps" ${CMAKE_FLAGS:-} && ninja -C "$out/build" gemma test_graph test_cuda
}

parity() {   # ENGINE DTYPE
  local ids
  ids=2,$(seq -s , 1000 997 60000)   # 61 tokens
  "$out/build/gemma" parity -m "$out/model" --device "$device" --engine "$1" --dtype "$2" --ids "$ids" -n 64 --json \
    > "$out/parity-$1-$2.json"
}

bench() {   # NAME FLAGS..
  local name=$1
  shift
  "$out/build/gemma" bench -m "$out/model" --device "$device" --dtype bfloat16 -r 5 -o json "$@" > "$out/bench-$name.json"
}

if [ "${1:-}" = --pack ]; then
  pack "${2:?a folder is missing}"
  exit
fi
out=${1:-$repo/build/gpu}
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit
rm -f "$out"/*.json "$out"/*.log
export LD_LIBRARY_PATH=${GEMMA_TORCH_DEPS:+$GEMMA_TORCH_DEPS/usr/lib/x86_64-linux-gnu:}${LD_LIBRARY_PATH:-}
if command -v nvidia-smi > /dev/null; then nvidia-smi -L | tee "$out/device.txt"; else echo "$device" > "$out/device.txt"; fi

step build build
step model python3 "$here/peers.py" model "$out/model"
step test_graph "$out/build/tests/test_graph"
step test_cuda "$out/build/tests/test_cuda"
for dtype in float32 bfloat16; do
  for engine in eager traced graph; do
    step "parity-$engine-$dtype" parity $engine $dtype
  done
done
step bench-eager bench eager --engine eager -p 512 -n 128
step bench-traced bench traced --engine traced -p 0 -n 128
step bench-graph-1 bench graph-1 --engine graph --launch-steps 1 -p 0 -n 128
step bench-graph-8 bench graph-8 --engine graph --launch-steps 8 -p 0 -n 128,256 -d 0,2048 --top-k 1,64
step bench-no-cache bench no-cache --engine eager --no-cache -p 0 -n 64
step transformers timeout 200 python3 "$here/peers.py" speed "$out/model" --device "$device" --out "$out/transformers.json"
python3 "$here/peers.py" summary "$out" | tee "$out/summary.md"
echo "$failed steps failed, $SECONDS s in all"
[ "$failed" = 0 ]
