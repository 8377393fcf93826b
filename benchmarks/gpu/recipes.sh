# From the project's root: the command line at FLUX.1's size, a 22 GB folder of random weights, 9 minutes and more: two calls.
# M: model folder, D: device, S: pixels, TINY=1: a tiny model, to try the commands on a CPU. Logs and peaks under $OUT.
source benchmarks/gpu/setup.sh
ROOT=$PWD M=${M:-$W/flux} D=${D:-cuda} S=${S:-1024} PY=${PY:-python3}
[ -f "$M/model_index.json" ] || "$PY" -c "
from pathlib import Path
from benchmarks import full_size
full_size.build(Path('$M'), tiny=bool(int('${TINY:-0}')))"
mkdir -p "$W/runs" && cd "$W/runs"
[ -d photos ] || "$PY" "$G/photos.py" photos 24 "$S"
export PEAK_LOG=$OUT/peaks
L="$PY -m libreflux"
common="model=$M data.0.path=photos device=$D samples.every=0 samples.at_start=false held_out.share=0 optimizer.warmup=0 save.every=1000 save.averages_every=null ${TINY:+resolution=$S}"
for name in flux-12gb-style flux-16gb-free flux-24gb-free flux-24gb-style flux-8xh100; do # what is foretold, to compare with the peaks below
  timed "dry-run-$name" $L train "$ROOT/recipes/$name.yaml" $common out="dry-$name" --dry-run
done
LIMIT=80 CAP_GIB=24 timed picture $L generate "a red fox in the snow" --negative blue --model "$M" --device "$D" --width "$S" --height "$S" --steps 28 --guidance 3.5 --out "$OUT/picture.png"
LIMIT=110 CAP_GIB=24 timed free $L train "$ROOT/recipes/flux-24gb-free.yaml" $common samples.at_start=true samples.prompts='["fox"]' samples.guidance='[1]' steps=8 out=free
LIMIT=90 CAP_GIB=24 timed style $L train "$ROOT/recipes/flux-24gb-style.yaml" $common steps=10 out=style
LIMIT=120 CAP_GIB=12 timed small $L train "$ROOT/recipes/flux-12gb-style.yaml" $common steps=4 out=small
LIMIT=120 CAP_GIB=16 timed middle $L train "$ROOT/recipes/flux-16gb-free.yaml" $common steps=4 out=middle
LIMIT=200 timed large $L train "$ROOT/recipes/flux-8xh100.yaml" $common steps=4 out=large
for run in free style small middle large; do tail -2 "$OUT/$run.log" | cut -c1-160; cut -c1-160 $run/metrics.jsonl 2>/dev/null | tail -2; done
grep -h "GiB" "$OUT"/dry-run-*.log | cut -c1-160
cat "$PEAK_LOG" 2>/dev/null
