#!/usr/bin/env bash
# A server on a GPU, in 400 seconds: is every decode step a replayed graph, do all schedules give the same tokens, and
# what do steps cost with and without a policy? See parts.sh for what it takes.
#
#   bash benchmarks/gpu/serving.sh [--rehearse] [FOLDER]
. "$(dirname "${BASH_SOURCE[0]}")/parts.sh"
need_plugin
machine
part serve-check 380 "$PYTHON" -m benchmarks.gpu.serve_check --out "$OUT" ${REHEARSE:+--smoke} --flags "$FLAGS" ${CHECK_ARGS:-}
finish
