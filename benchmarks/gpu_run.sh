#!/usr/bin/env bash
# Builds, tests and measures fused_rnn on a machine with an NVIDIA GPU.
#
#     benchmarks/gpu_run.sh [--phase NAME[,NAME...]] [--output DIR] [--time-limit SECONDS] [--quick]
#
#     facts        properties of the machine                             gpu_facts.json
#     build        builds the library into build/gpu                     gpu_run.log
#     correctness  tests/gpu/test_gpu.py; a few shapes without pytest    gpu_correctness.log
#     baselines    times of torch.nn, and the names of cuDNN's kernels   gpu_baselines.jsonl
#     grid         times of fused_rnn and torch.nn                       gpu_grid.jsonl, .png
#     sweep        times of every kernel on every shape                  gpu_sweep.jsonl
#     sanitizer    compute-sanitizer on tiny shapes; if it is named       gpu_sanitizer.log
#
# It needs torch with CUDA, nvcc and a C++ compiler, and downloads nothing. Every phase has a time limit, all together
# have SECONDS (default: 570), and results are written as they come, into DIR (default: build/benchmarks/gpu). Of a log
# the last 16 MiB are kept. If a phase fails, the later ones run nevertheless, except after a failed build. The exit
# status is 0 if all phases passed. The settings of the GPU are not changed. A call without the phase `build` uses the
# library that an earlier call has built, and builds it if there is none.
#
# Environment variables: PYTHON, the interpreter; GPU_RUN_COMMIT, the commit if there is no git; TORCH_CUDA_ARCH_LIST, the
# architectures to build for (default: that of this device); SANITIZER_KERNELS, a part of the names of the kernels that
# compute-sanitizer checks.
set -uo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
self=$root/benchmarks/gpu_run.sh
python=${PYTHON:-python3}
target=$root/build/gpu
export PYTHONUNBUFFERED=1 PYTHONPATH="$target${PYTHONPATH:+:$PYTHONPATH}"
export MAX_JOBS=${MAX_JOBS:-$(nproc)}

has_module() { "$python" -c "import $1" 2> /dev/null; }

build() {
  local module
  for module in torch setuptools; do
    has_module "$module" || { echo "the Python module $module is needed to build, and is not installed"; return 1; }
  done
  has_module wheel || echo "wheel is not installed: setuptools before 70.1 needs it"
  has_module pybind11 || echo "pybind11 is not installed: the headers that come with torch have to do"
  has_module ninja || command -v ninja || echo "ninja is not installed: the files are compiled one after the other"
  command -v nvcc || [ -x "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc" ] || { echo "there is no nvcc"; return 1; }
  echo "TORCH_CUDA_ARCH_LIST=$TORCH_CUDA_ARCH_LIST MAX_JOBS=$MAX_JOBS"
  rm -rf "$target"
  mkdir -p "$target"
  if has_module pip && "$python" -m pip install -v --no-build-isolation --no-deps --no-index --no-cache-dir \
    --disable-pip-version-check --target "$target" .; then
    return 0
  fi
  echo "pip could not install it: setup.py build_ext instead"
  rm -rf "$target"
  "$python" setup.py build_ext --build-lib "$target" && mkdir -p "$target/fused_rnn" \
    && cp -r fused_rnn/. "$target/fused_rnn/"
}

# Checks only the kernels of fused_rnn, because the sanitizer would slow down the many kernels of torch and cuDNN.
sanitize() {
  local tool filter=--kernel-name
  compute-sanitizer --help | grep -q -e "$filter" || filter=--kernel-regex
  for tool in memcheck racecheck; do
    echo "-- compute-sanitizer --tool $tool"
    compute-sanitizer --tool "$tool" --error-exitcode 86 "$filter" "kns=${SANITIZER_KERNELS:-fused_rnn}" \
      "$python" benchmarks/gpu/measure.py --errors --backend fused --shape 4,3,8,16,1 --shape 3,9,20,33,1,bi \
      --cell lstm gru --dtype bfloat16 float32 --mode training --output "$scratch" || return
  done
}

cd "$root" || exit 1
# `timeout` can run programs, but not shell functions. For these two functions it runs this script, which calls one of them.
case ${GPU_RUN_FUNCTION:-} in
  build | sanitize) "$GPU_RUN_FUNCTION"; exit ;;
esac

output=$root/build/benchmarks/gpu
total=570 # seconds for all phases
phases=facts,build,correctness,baselines,grid,sweep # the sanitizer slows everything down, and has a run of its own
all_phases=$phases,sanitizer
quick=()

usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; }

while [ $# -gt 0 ]; do
  case $1 in
    --phase | --output | --time-limit)
      [ $# -ge 2 ] || { echo "$1 needs a value" >&2; exit 2; }
      case $1 in
        --phase) phases=$2 ;;
        --output) output=$2 ;;
        *) total=$2 ;;
      esac
      shift 2
      ;;
    --quick) quick=(--quick); shift ;;
    --help | -h) usage; exit 0 ;;
    *) echo "unknown option $1; --help lists them" >&2; exit 2 ;;
  esac
done
for phase in ${phases//,/ }; do
  [[ ",$all_phases," == *",$phase,"* ]] || { echo "no phase is called $phase; there are $all_phases" >&2; exit 2; }
done

[[ $total =~ ^[1-9][0-9]*$ ]] || { echo "--time-limit needs a number of seconds, got $total" >&2; exit 2; }

mkdir -p "$output" || exit 1
output=$(cd "$output" && pwd)
scratch=$(mktemp -d)
export scratch
trap 'rm -rf "$scratch"' EXIT
log=$output/gpu_run.log
: > "$log"
summary=()
failed=0

selected() { [[ ",$phases," == *",$1,"* ]]; }

# time_limit SECONDS: prints the smaller of SECONDS and the time that is left; --quick halves SECONDS up to 200
time_limit() {
  local left=$((total - SECONDS))
  [ ${#quick[@]} -eq 0 ] || [ "$1" -gt 200 ] || set -- $(($1 / 2))
  echo $(($1 < left ? $1 : left))
}

# run_phase NAME SECONDS FILE COMMAND...: runs COMMAND with its output in FILE; sets `status` to its exit status
run_phase() {
  local name=$1 limit file=$3 began=$SECONDS
  limit=$(time_limit "$2")
  shift 3
  printf '\n== %s (%d s so far, limit %d s)\n' "$name" "$SECONDS" "$limit"
  if [ "$limit" -lt 5 ]; then
    echo "no time is left for it" | tee -a "$file"
    status=124
  else
    timeout --kill-after=5 "$limit" "$@" >> "$file" 2>&1
    status=$?
  fi
  local verdict
  case $status in
    0) verdict=passed ;;
    124 | 137) verdict="STOPPED at its limit of $limit s" ;;
    *) verdict="FAILED (exit status $status)" ;;
  esac
  [ "$status" -eq 0 ] || failed=1
  summary+=("$(printf '%-12s %4d s  %s' "$name" $((SECONDS - began)) "$verdict")")
}

# show FILE LINES: prints the last lines of a file
show() { [ ! -f "$1" ] || tail -n "$2" "$1" | cut -c1-240; }

# show_summary FILE LINES: prints the summary, which follows the first empty line; of a file without one, because its phase
# was stopped, prints the end
show_summary() {
  if grep -q '^$' "$1"; then
    sed '1,/^$/d' "$1" | cut -c1-240 | tail -n "$2"
  else
    show "$1" 20
  fi
}

# keep_end FILE: of a file of more than 16 MiB, keeps the end
keep_end() {
  [ "$(wc -c < "$1")" -gt $((16 << 20)) ] || return 0
  tail -c $((16 << 20)) "$1" > "$scratch/end" && cp "$scratch/end" "$1"
}

finish() {
  local file
  for file in "$output"/gpu_*.log; do [ ! -f "$file" ] || keep_end "$file"; done
  printf '\n== phases\n'
  printf '%s\n' "${summary[@]}"
  echo "Results: $output"
  exit "$failed"
}

library_is_built() { (cd "$target" 2> /dev/null && ls fused_rnn/_C*.so > /dev/null 2>&1); }

device_arch() {
  "$python" - << 'PYTHON'
import torch

major, minor = torch.cuda.get_device_capability()
print(f"{major}.{minor}{'a' if major >= 9 else ''}")  # from Hopper on, some instructions exist in the "a" variant only
PYTHON
}

has_module torch || { echo "torch is not installed for $python"; exit 1; }
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || { echo "torch sees no CUDA GPU"; exit 1; }

if selected facts; then
  run_phase facts 30 "$log" "$python" benchmarks/gpu/measure.py --facts --output "$output"
  [ "$status" -ne 0 ] || show "$output/gpu_facts.json" 60
fi

if selected build || { ! library_is_built && [[ "$phases" =~ correctness|grid|sweep|sanitizer ]]; }; then
  TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$(device_arch)}
  export TORCH_CUDA_ARCH_LIST
  GPU_RUN_FUNCTION=build run_phase build 240 "$log" bash "$self"
  if [ "$status" -ne 0 ]; then
    show "$log" 60
    finish
  fi
  ls -l "$target"/fused_rnn/*.so
fi

if selected correctness; then
  report=$output/gpu_correctness.log
  : > "$report"
  if has_module pytest; then
    run_phase correctness 90 "$report" "$python" -m pytest tests/gpu/test_gpu.py -m gpu -v --tb=short --maxfail=40 -rf \
      -p no:cacheprovider --durations=8
    echo "$(grep -c ' PASSED' "$report") passed, $(grep -c '^tests.* FAILED' "$report") failed," \
      "$(grep -c '^tests.* SKIPPED' "$report") skipped"
    [ "$status" -eq 0 ] || grep -E '^(FAILED|ERROR)' "$report" | cut -c1-200 | head -n 25
    show "$report" 1
  else
    echo "pytest is not installed: results are compared on a few shapes only"
    run_phase correctness 90 "$report" "$python" benchmarks/gpu/measure.py --errors --backend fused --budget 70 \
      --output "$scratch" --shape 5,3,7,20,2 --shape 7,17,10,77,1,bi --shape 1,1,1,1,1 \
      --shape 12,64,256,256,1 --shape 6,16,512,1024,1
    show "$report" 20
  fi
fi

if selected baselines; then
  run_phase baselines 60 "$scratch/baselines.log" "$python" benchmarks/gpu/measure.py --baselines --quick \
    --budget $(($(time_limit 60) - 15)) --output "$output"
  cat "$scratch/baselines.log" >> "$log"
  show_summary "$scratch/baselines.log" 45
fi

if selected grid; then
  run_phase grid 120 "$scratch/grid.log" "$python" benchmarks/gpu/measure.py "${quick[@]}" --backend fused \
    --budget $(($(time_limit 120) - 18)) --output "$output"
  cat "$scratch/grid.log" >> "$log"
fi

if selected sweep; then
  run_phase sweep 90 "$scratch/sweep.log" "$python" benchmarks/gpu/sweep.py --budget $(($(time_limit 90) - 12)) \
    --output "$output"
  cat "$scratch/sweep.log" >> "$log"
  show "$scratch/sweep.log" 60
fi

if selected sanitizer; then
  if command -v compute-sanitizer > /dev/null; then
    report=$output/gpu_sanitizer.log
    : > "$report"
    GPU_RUN_FUNCTION=sanitize run_phase sanitizer 100 "$report" bash "$self"
    grep -E 'ERROR SUMMARY|RACECHECK SUMMARY|^-- compute-sanitizer' "$report" | tail -n 6
  else
    summary+=("sanitizer    left out: compute-sanitizer is not installed")
  fi
fi

if [ -f "$scratch/grid.log" ]; then # last, so that it is in view when the script ends
  printf '\n== fused_rnn against torch.nn\n'
  show_summary "$scratch/grid.log" 70
fi
finish
