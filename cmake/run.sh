#!/usr/bin/env bash
# Sets everything up, then runs `gemma` with the arguments given: `bash cmake/run.sh generate -p "Once upon"`.
# Set-up writes to stderr and reads nothing; stdin, stdout, folder and exit code are the program's own.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
mkdir -p "$repo/build"

# Whether the command will load the default model.
needs_weights() {
  case ${1:-} in convert | -*) return 1 ;; esac
  local argument
  for argument; do
    case $argument in -m | -m[!-]* | --model | --model=* | -h | --help) return 1 ;; esac
  done
}

set_up() {
  exclusively "$repo/build" build_program gemma
  if [ -e "$GEMMA_TORCH_CACHE/$weights" ] || ! needs_weights "$@"; then return; fi
  if ! exclusively "$GEMMA_TORCH_CACHE" fetch_weights "$GEMMA_TORCH_CACHE"; then
    die "[weights] $GEMMA_TORCH_CACHE/$weights is missing and could not be fetched. Hint: give a Hugging Face" \
        "folder or a .gguf with -m PATH, or copy such a folder to that place"
  fi
}

[ $# -gt 0 ] || set -- generate -p "The capital of France is" -n 64
GEMMA_TORCH_CACHE=$(cache_folder)
export GEMMA_TORCH_CACHE
set_up "$@" < /dev/null >&2
exec "$build/gemma" "$@"
