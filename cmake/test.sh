#!/usr/bin/env bash
# Sets everything up, builds the tests and runs them. Arguments go to ctest: `bash cmake/test.sh -R tokenizer`.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
mkdir -p "$repo/build"

# Without a network the weights may be missing: that must not keep the other tests from running.
set_up() {
  exclusively "$repo/build" build_tests
  exclusively "$GEMMA_TORCH_CACHE" fetch_both ||
    say "gemma_torch: warning: the default weights could not be fetched; the tests that need them will skip"
}

build_tests() {
  fetch_cuda_headers ||
    say "gemma_torch: warning: no headers of CUDA: whether the CUDA sources compile will not be tested"
  build_program all
}

fetch_both() { fetch_weights "$GEMMA_TORCH_CACHE" && fetch_gguf "$GEMMA_TORCH_CACHE"; }

run_tests() {
  ctest --test-dir "$build" --output-on-failure -j "$(cores)" "$@" | tee "$build/ctest.log"
}

summary() {
  local all failed skipped
  read -r failed all < <(sed -n 's/.*, \([0-9]*\) tests* failed out of \([0-9]*\)$/\1 \2/p' "$build/ctest.log") || return 0
  skipped=$(grep -c '\*\*\*Skipped' "$build/ctest.log" || true)
  if [ ! -e "$GEMMA_TORCH_CACHE/$weights" ]; then
    echo "The cases on real weights were skipped. Hint: run this again with a network, which fetches them"
  fi
  echo "$((all - failed - skipped)) passed, $failed failed, $skipped skipped"
}

GEMMA_TORCH_CACHE=$(cache_folder)
export GEMMA_TORCH_CACHE
set_up < /dev/null >&2
if [ -e "$GEMMA_TORCH_CACHE/$weights" ]; then
  export GEMMA_TORCH_TEST_MODEL=$GEMMA_TORCH_CACHE/$weights
  [ -e "$GEMMA_TORCH_TEST_MODEL/SOURCE" ] ||
    say "gemma_torch: warning: $GEMMA_TORCH_TEST_MODEL was put there by hand; tests compare with the fetched weights"
fi
if [ -e "$GEMMA_TORCH_CACHE/$weights-Q4_K_M.gguf" ]; then
  export GEMMA_TORCH_TEST_GGUF=$GEMMA_TORCH_CACHE/$weights-Q4_K_M.gguf
fi
code=0
run_tests "$@" || code=$?
summary
exit "$code"
