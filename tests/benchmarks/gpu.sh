#!/usr/bin/env bash
# One session on a GPU, offline, with random weights, at most five minutes:
#   tests/benchmarks/gpu.sh RESULTS [WHEELS [PART...]]
# WHEELS: a folder of wheels that the machine lacks ("" for none). Parts: those below, all by default.
# Every part has its own time limit and its own JSON in RESULTS, so a session that is cut off leaves figures.
# COSETTLE_REHEARSE=1 runs tiny models on the CPU.
set -uo pipefail
cd "$(dirname "$0")/../.."
mkdir -p "$1"
results=$(cd "$1" && pwd)
wheels=${2:-}
parts=("${@:3}")
[ ${#parts[@]} -gt 0 ] || parts=(tests inference training extraction correspondence fitting profile nccl)
declare -A limits=([tests]=60 [inference]=100 [training]=50 [extraction]=30 [correspondence]=20 [fitting]=20
  [profile]=15 [nccl]=40)
options=(--device cuda)
patience=1
[ "${COSETTLE_REHEARSE:-}" = 1 ] && options=(--device cpu --quick) patience=10 # a busy CPU
site=
if [ -n "$wheels" ]; then
  site=$(mktemp -d)
  python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" "$wheels"/*.whl || exit 1
fi
export PYTHONPATH="$PWD:$PWD/tests:$site${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv >"$results/card.txt" 2>&1

for part in "${parts[@]}"; do
  case $part in
    tests) command=(-m pytest -q -m gpu -n 0 -p no:cacheprovider $(grep -rl "mark.gpu" tests --include="test_*.py")) ;;
    nccl) # two cards
      [ "$(python3 -c "import torch; print(torch.cuda.device_count())")" -gt 1 ] || continue
      command=(-m torch.distributed.run --standalone --nproc-per-node 2 tests/benchmarks/gpu.py training
        "${options[@]}" -o "$results/nccl.json")
      ;;
    *) command=(tests/benchmarks/gpu.py "$part" "${options[@]}" -o "$results/$part.json") ;;
  esac
  start=$SECONDS
  timeout -k 5 $((patience * ${limits[$part]:-30})) python3 "${command[@]}" >"$results/$part.log" 2>&1
  echo "$part: status $? after $((SECONDS - start)) of ${limits[$part]:-30} s" | tee -a "$results/summary.txt"
  tail -n 3 "$results/$part.log"
done
