# Sourced by the scripts beside it, which take [--rehearse] [FOLDER]: how they run their parts.
#
# Results, logs and a summary lie in FOLDER (default benchmarks/results/<GPU>); a part that fails or runs out of time does
# not stop the others, and each writes after every row. PYTHON names the interpreter, FLAGS further flags of all servers.
# --rehearse runs every line on a CPU with a tiny model: what only a GPU can do is faked in benchmarks.common.device.py.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 1
SCRIPT=$(basename "$0" .sh)
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
FLAGS=${FLAGS:-}
export PYTHONUNBUFFERED=1
REHEARSE=
[ "${1:-}" != --rehearse ] || { REHEARSE=1; shift; }
if [ -n "$REHEARSE" ]; then
  export RKV_REHEARSE=1
  OUT=${1:-.cache/rehearsal/$SCRIPT}
else
  "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
    echo "$SCRIPT.sh needs a CUDA GPU and found none: give --rehearse to run it on a CPU with a tiny model" >&2
    exit 2
  }
  OUT=${1:-$("$PYTHON" -c 'from benchmarks.common.schema import hardware_folder; print(hardware_folder())')}
fi
mkdir -p "$OUT"
LOG=$OUT/$SCRIPT.log
: > "$LOG"
failed=0
summary=()

# part NAME SECONDS COMMAND...: run a part within its time, and remember how it went. A rehearsal has the time it needs.
part() {
  local name=$1 limit=$2 start=$SECONDS status=0 word
  shift 2
  [ -z "$REHEARSE" ] || limit=1500
  echo "== $name (at most $limit s)" | tee -a "$LOG"
  timeout -k 40 "$limit" "$@" 2>&1 | tee -a "$LOG" || status=$?
  [ $status = 0 ] || failed=$((failed + 1))
  case $status in 0) word=ok ;; 124 | 137) word="out of time" ;; *) word="FAILED ($status)" ;; esac
  summary+=("$(printf '%-16s %5d s  %s' "$name" $((SECONDS - start)) "$word")")
}

# Refuse a server that would not know --kv-policy: a package on the path alone has no entry point.
need_plugin() {
  "$PYTHON" -c 'import sys; from importlib.metadata import entry_points as found
sys.exit(not any(point.name == "rkv_sglang" for point in found(group="sglang.srt.plugins")))' || {
    echo "$SCRIPT.sh: SGLang would not find this plugin: install it, as in 'pip install --no-deps .'" >&2
    exit 2
  }
}

# Say how every part went, and end with the number of those that failed as a status.
finish() {
  printf '%s\n' "" "$SCRIPT: results in $OUT" "${summary[@]}" | tee -a "$LOG"
  exit $((failed > 0))
}

machine() {
  part machine 30 bash -c "nvidia-smi -L; nvidia-smi --query-gpu=driver_version,clocks.sm,clocks.mem --format=csv;
    '$PYTHON' -m pip list 2>/dev/null | grep -iE '^(sglang|torch|triton|flashinfer|rkv|numpy)'; true"
}
