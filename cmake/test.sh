#!/usr/bin/env bash
# Sets everything up, builds the tests and runs them. Arguments go to ctest: `bash cmake/test.sh -R tokenizer`.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
mkdir -p "$repo/build"

# Names the real weights to the tests; without them those tests skip.
set_up() {
  exclusively "$repo/build" build_program all
  exclusively "$GEMMA_TORCH_CACHE" fetch_both ||
    say "gemma_torch: warning: the default weights could not be fetched; the tests that need them will skip"
}

fetch_both() { fetch_weights "$GEMMA_TORCH_CACHE" && fetch_gguf "$GEMMA_TORCH_CACHE"; }

run_tests() {
  ctest --test-dir "$build" --output-on-failure -j "$(cores)" "$@" | tee "$build/ctest.log"
}

summary() {
  local all failed skipped
  read -r failed all < <(sed -n 's/.*, \([0-9]*\) tests* failed out of \([0-9]*\)$/\1 \2/p' "$build/ctest.log") || return 0
  skipped=$(grep -c '\*\*\*Skipped' "$build/ctest.log" || true)
  if [ "$skipped" -gt 0 ]; then
    echo "Skipped tests need the default weights in $GEMMA_TORCH_CACHE: run this again with a network."
  fi
  echo "$((all - failed - skipped)) passed, $failed failed, $skipped skipped"
}

GEMMA_TORCH_CACHE=$(cache_folder)
export GEMMA_TORCH_CACHE
set_up < /dev/null >&2
if [ -e "$GEMMA_TORCH_CACHE/$weights/SOURCE" ]; then   # not a folder copied there by hand: tests know its numbers
  export GEMMA_TORCH_TEST_MODEL=$GEMMA_TORCH_CACHE/$weights
fi
if [ -e "$GEMMA_TORCH_CACHE/$weights-Q4_K_M.gguf" ]; then
  export GEMMA_TORCH_TEST_GGUF=$GEMMA_TORCH_CACHE/$weights-Q4_K_M.gguf
fi
code=0
run_tests "$@" || code=$?
summary
exit "$code"
