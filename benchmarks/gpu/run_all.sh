#!/usr/bin/env bash
# Everything that only a GPU can show, in one command:
#
#   bash benchmarks/gpu/run_all.sh [OUT]          within 9 minutes: kernel tests, kernel speed, served graphs, serving
#   DAY=1 MODEL=... bash benchmarks/gpu/run_all.sh [OUT]     every size, with a real model: most of a day
#
# Results, logs and a summary lie in OUT (default benchmarks/results/<GPU>); a part that fails or runs out of time does
# not stop the others. Needs this repository, torch, triton and sglang (with the plugin installed or on PYTHONPATH);
# PYTHON names the interpreter, FLAGS further flags of all servers.
set -uo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
FLAGS=${FLAGS:-}
export PYTHONUNBUFFERED=1
"$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
  echo "run_all.sh needs a CUDA GPU and found none: on a CPU run make bench-smoke" >&2
  exit 2
}
OUT=${1:-$("$PYTHON" -c 'from benchmarks.common.schema import hardware_folder; print(hardware_folder())')}
mkdir -p "$OUT"
LOG=$OUT/run_all.log
: > "$LOG"
failed=0
summary=()

# part NAME SECONDS COMMAND...
part() {
  local name=$1 limit=$2 start=$SECONDS status=0
  shift 2
  echo "== $name (at most $limit s)" | tee -a "$LOG"
  timeout -k 20 "$limit" "$@" 2>&1 | tee -a "$LOG" || status=$?
  [ $status = 0 ] || failed=$((failed + 1))
  case $status in 0) word=ok ;; 124 | 137) word="out of time" ;; *) word="FAILED ($status)" ;; esac
  summary+=("$(printf '%-16s %5d s  %s' "$name" $((SECONDS - start)) "$word")")
}

part machine 20 bash -c "nvidia-smi -L; '$PYTHON' -m pip list 2>/dev/null | grep -iE '^(sglang|torch|triton|flashinfer|rkv)'; true"
if [ -z "${DAY:-}" ]; then
  part kernel-tests 110 "$PYTHON" -m pytest -q -x -m gpu tests/kernels
  part kernels 130 "$PYTHON" -m benchmarks.kernels --lengths 1152 8320 --due 1 64 --out "$OUT"
  part serve-check 250 "$PYTHON" -m benchmarks.gpu.serve_check --out "$OUT" --flags "$FLAGS"
else
  : "${MODEL:?DAY=1 needs MODEL, a folder or hub name of a reasoning model}"
  part kernel-tests 900 "$PYTHON" -m pytest -q -m gpu tests
  part kernels 900 "$PYTHON" -m benchmarks.kernels --out "$OUT"
  part serve-check 1800 "$PYTHON" -m benchmarks.gpu.serve_check --out "$OUT" --num-tokens 8192 --flags "$FLAGS"
  part serving 14400 "$PYTHON" -m benchmarks.serving --model "$MODEL" --out "$OUT"
  part quality 7200 "$PYTHON" -m benchmarks.quality --model "$MODEL" --budgets 512,1024,2048 --num-tokens 4096 --out "$OUT"
  part accuracy 43200 "$PYTHON" -m benchmarks.accuracy --model "$MODEL" --out "$OUT" ${ACCURACY_ARGS:-}
fi
printf '\n%s\n' "results in $OUT" "${summary[@]}" | tee -a "$LOG"
exit $((failed > 0))
