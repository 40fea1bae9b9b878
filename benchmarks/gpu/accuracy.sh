#!/usr/bin/env bash
# Answers to problems on a GPU under many settings, in 400 seconds, and what they are worth, if math-verify is there; if
# not, see benchmarks/accuracy/collect.py. MODEL names a model and PROBLEMS a file of problems; CHECK_ARGS holds the
# settings and whatever else benchmarks.accuracy.collect takes. See parts.sh for the rest.
#
#   MODEL=... PROBLEMS=... CHECK_ARGS="--settings none rkv:128:32" bash benchmarks/gpu/accuracy.sh [--rehearse] [FOLDER]
. "$(dirname "${BASH_SOURCE[0]}")/parts.sh"
need_plugin
machine
asked=(${PROBLEMS:+--problems "$PROBLEMS"} --out "$OUT")
part answers 300 "$PYTHON" -m benchmarks.accuracy.collect "${asked[@]}" ${REHEARSE:+--smoke} --flags "$FLAGS" \
  ${MODEL:+--model "$MODEL"} ${CHECK_ARGS:-}
if "$PYTHON" -c 'import math_verify' 2> /dev/null; then
  part judged 100 "$PYTHON" -m benchmarks.accuracy --collected "$OUT/accuracy_answers.jsonl.gz" "${asked[@]}"
fi
finish
