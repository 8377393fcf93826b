# From the project's root: bash benchmarks/gpu/run.sh [PART…]. D: device, SIZE: slice, full or emoji, PY: the Python.
source benchmarks/gpu/setup.sh
exec "${PY:-python3}" -m benchmarks.speed "$@" --device "${D:-cuda}" --size "${SIZE:-full}" --limit 540 --out "$OUT/speed" --json "$OUT/speed.json"
