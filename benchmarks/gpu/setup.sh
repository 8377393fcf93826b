# Sourced from the project's root: PYTHONPATH for a Python that has torch and lacks the rest. Nothing is downloaded:
# wheels come from .gpu/whl, see README.md.
G=$PWD/benchmarks/gpu OUT=${OUT:-$PWD/out/gpu} W=$(dirname "$(mktemp -u)")/libreflux-gpu
mkdir -p "$OUT" "$W"
if [ ! -f "$W/site/.done" ] && compgen -G '.gpu/whl/*.whl' > /dev/null; then
  python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$W/site" .gpu/whl/*.whl 2>&1 | grep -v WARN
  touch "$W/site/.done"
fi
export PYTHONPATH=$G/cap:$PWD:$PWD/src:$W/site PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 COLUMNS=160
timed() { # name command…: its log under $OUT, its time on stdout; ended after $LIMIT seconds
  local name=$1 start; shift; start=$(date +%s)
  timeout "${LIMIT:-200}" "$@" > "$OUT/$name.log" 2>&1; local rc=$?
  echo "-- $name rc $rc $(( $(date +%s) - start )) s"
}
