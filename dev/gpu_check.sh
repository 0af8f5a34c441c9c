#!/usr/bin/env bash
# One command for a machine with a GPU: builds dino_d2 there, runs the op's tests, the benchmarks of the op, of inference
# and of a training step of DINO-4scale, and writes a report in Markdown. It needs Python 3.12 with PyTorch, nvcc, a C++
# compiler and the folder that `make gpu-wheels` filled elsewhere; no network. Each part has its time limit. Exit code:
# how many parts failed.
#
#     dev/gpu_check.sh [REPORT.md] [FOLDER OF WHEELS]
set -uo pipefail
cd "$(dirname "$0")/.."
report=$(realpath -m "${1:-gpu-report.md}")
wheels=$(realpath "${2:-build/gpu-wheels}")
work=$(mktemp -d)
failed=0

# Run a part within so many seconds and put what it printed under a heading: `table` as it is, `text` the end of it.
part() {
  local title=$1 style=$2 seconds=$3
  shift 3
  echo "== $title" >&2
  local began=$SECONDS code
  if [ "$(type -t "$1")" = function ]; then
    "$@" >"$work/out" 2>"$work/err"
  else
    timeout "$seconds" "$@" >"$work/out" 2>"$work/err"
  fi
  code=$?
  {
    printf '\n## %s\n\nexit code %s, %s s\n\n' "$title" "$code" "$((SECONDS - began))"
    if [ "$style" = table ]; then cat "$work/out"; else printf '```\n%s\n```\n' "$(tail -n 60 "$work/out")"; fi
    if [ "$code" -ne 0 ]; then printf '\n```\n%s\n```\n' "$(tail -n 40 "$work/err")"; fi
  } >>"$report"
  [ "$code" -eq 0 ] || { failed=$((failed + 1)); echo "   failed ($code)" >&2; }
}

install_all() {
  # A venv of its own over the Python that has torch, so that nothing of the machine's is changed.
  local above
  above=$(python3 -c 'import pathlib, torch; print(pathlib.Path(torch.__file__).parent.parent)') || return
  python3 -m venv --without-pip "$work/venv" || return
  site=$("$work/venv/bin/python" -c "import sysconfig; print(sysconfig.get_paths()['purelib'])")
  echo "$above" >"$site/above.pth"
  "$python" -m pip install -q --no-index --no-deps --no-compile --target "$site" --upgrade "$wheels"/*.whl || return
  tar -xzf "$wheels/detectron2.tar.gz" -C "$site" || return
  # The peer wants headers and a library that torch's wheels bring and some toolkits lack.
  mkdir "$work/lib" && ln -s "$above"/nvidia/*/lib/libcudart.so.* "$work/lib/libcudart.so"
  CPATH=$(echo "$above"/nvidia/*/include | tr ' ' ':') LIBRARY_PATH=$work/lib "$python" -m pip install -q --no-deps \
    --no-build-isolation --target "$work/peer" "$wheels"/torch_ms_deform_attn*.tar.gz ||
    echo "torch-ms-deform-attn did not build and is left out"
  "$python" setup.py -q build_ext --inplace || return
  "$python" -m pip install -q --no-deps --no-build-isolation --no-index --editable . || return
  echo "built for compute capability $TORCH_CUDA_ARCH_LIST"
}

export PYTHONUNBUFFERED=1 PYTHONWARNINGS=ignore FORCE_CUDA=1 MAX_JOBS="${MAX_JOBS:-$(nproc)}"
capability='import torch; print("{}.{}".format(*torch.cuda.get_device_capability()))'
: "${TORCH_CUDA_ARCH_LIST:=$(python3 -W ignore -c "$capability")}"
if [ -z "$TORCH_CUDA_ARCH_LIST" ]; then
  echo "torch sees no GPU here" >&2
  exit 1
fi
export TORCH_CUDA_ARCH_LIST
python=$work/venv/bin/python
site=

{
  echo "# dino_d2 on a GPU"
  echo
  echo "$(date -u +%Y-%m-%d), $(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader | head -n 1)," \
    "torch $(python3 -c 'import torch; print(torch.__version__)'), $(nvcc --version | tail -n 1)," \
    "commit $(git rev-parse --short HEAD 2>/dev/null || echo unknown)"
} >"$report"

part "Build" text 200 install_all
part "Doctor" text 60 "$python" -m dino_d2.doctor
part "Tests of the op" text 200 "$python" -m pytest tests/ops -q -p no:cacheprovider
export PYTHONPATH=$work/peer
for dtype in float32 bfloat16 float16; do
  part "Encoder, $dtype" table 60 "$python" dev/benchmark_op.py --device cuda --dtype "$dtype" --seconds 6
done
part "Encoder, random locations" table 60 "$python" dev/benchmark_op.py --device cuda --locations random --seconds 4
part "Decoder" table 60 "$python" dev/benchmark_op.py --device cuda --shape decoder --seconds 4
recipe=configs/dino_r50_4scale_12ep.yaml
part "Inference of DINO-4scale" table 120 "$python" dev/benchmark.py --config-file "$recipe" --device cuda \
  --rounds 5 --dtype float32 bfloat16 float16 --variant reference MODEL.DINO.OP reference
part "Training step of DINO-4scale" table 90 "$python" dev/benchmark.py --config-file "$recipe" --device cuda \
  --mode train --profile
sanitized="boxes and float32 and (as_accurate or contiguous)"
for tool in memcheck racecheck; do
  part "compute-sanitizer $tool" text 60 compute-sanitizer --tool "$tool" --error-exitcode 1 \
    "$python" -m pytest tests/ops/test_ms_deform_attn_fused.py -q -p no:cacheprovider -k "$sanitized"
done

echo "$report: $failed parts failed, $SECONDS s" >&2
rm -rf "$work"
exit "$failed"
