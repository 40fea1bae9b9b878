#!/usr/bin/env bash
# The kernels on a GPU, in 250 seconds: every test marked gpu, then the kernel benchmark. Needs torch and triton, no
# SGLang. See parts.sh for what it takes; RECORDED names a file of benchmarks.kernels.record_keys, measured too.
#
#   bash benchmarks/gpu/kernels.sh [--rehearse] [FOLDER]
. "$(dirname "${BASH_SOURCE[0]}")/parts.sh"
if [ -n "$REHEARSE" ]; then
  workers=2 sizes=(--lengths 160 --due 1)
else
  workers=8 sizes=(--lengths 1152 1664 --due 1 15 64)
fi
machine
# Warnings of other versions are no failures here.
part kernel-tests 130 "$PYTHON" -m pytest -q -m gpu -n "$workers" -W default -p no:cacheprovider tests/kernels
# Elsewhere the kernels are compiled; a rehearsal interprets them.
[ -z "$REHEARSE" ] || export TRITON_INTERPRET=1
part kernels 110 "$PYTHON" -m benchmarks.kernels "${sizes[@]}" ${RECORDED:+--recorded "$RECORDED"} --out "$OUT"
finish
