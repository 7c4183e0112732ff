#!/usr/bin/env bash
# The benchmarks of docs/performance.md on a CUDA device, with one command; results go to benchmarks/results/cuda/.
#
#   benchmarks/gpu.sh [DRAFTER_DIR]
set -euo pipefail
cd "$(dirname "$0")/.."
drafter=${1:-models/smollm2-135m-instruct-redrafter}
results=benchmarks/results/cuda
python -c "import sys, torch; sys.exit(None if torch.cuda.is_available() else 'no CUDA device: expected one that torch sees')"

python benchmarks/profile_step.py --speculator_path "$drafter" --batch_sizes 1 4 8 16 --output "$results/profile-step.json"
python benchmarks/growth.py --speculator_path "$drafter" --output "$results/growth.json"
for batch in 1 4 8 16; do
    python benchmarks/peers.py --speculator_path "$drafter" --batch_size "$batch" --output "$results/peers-batch$batch.json"
done
python benchmarks/peers.py --speculator_path "$drafter" --temperature 1.0 --output "$results/peers-t1.json"
python benchmarks/calibration.py --speculator_path "$drafter" --output "$results/calibration.json"
