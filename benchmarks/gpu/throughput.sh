#!/usr/bin/env bash
# Throughput on a GPU where memory is the limit, in 500 seconds: R-KV against SGLang as it is. See parts.sh for what it
# takes.
#
#   bash benchmarks/gpu/throughput.sh [--rehearse] [FOLDER]
. "$(dirname "${BASH_SOURCE[0]}")/parts.sh"
need_plugin
machine
part throughput 470 "$PYTHON" -m benchmarks.gpu.throughput --out "$OUT" ${REHEARSE:+--smoke} --flags "$FLAGS" ${CHECK_ARGS:-}
finish
