#!/usr/bin/env bash
# One command for a machine with a GPU: builds dino_d2 there, runs the op's tests, the benchmarks of the op, of inference
# and of a training step of DINO-4scale, sanitizers and a profiler, and writes a report in Markdown, with the whole
# output of every part in a folder beside it. It needs Python 3.12 with PyTorch, nvcc, a C++ compiler and the folder that
# `make gpu-wheels` filled elsewhere; no network. Exit code: how many parts failed or found no time.
#
#     dev/gpu_check.sh [-p PARTS] [-s SECONDS] [REPORT.md] [FOLDER OF WHEELS]
#
# PARTS: some of "doctor tests op model sanitizers profile", in one argument; all by default. The build comes always.
# SECONDS: for everything, 600 by default; each part has a limit of its own, too.
set -uo pipefail
cd "$(dirname "$0")/.."
parts="doctor tests op model sanitizers profile" seconds=600
while getopts p:s: option; do
  case $option in
    p) parts=$OPTARG ;;
    s) seconds=$OPTARG ;;
    *) exit 2 ;;
  esac
done
shift $((OPTIND - 1))
for name in $parts; do
  case $name in
    doctor | tests | op | model | sanitizers | profile) ;;
    *) echo "no part is called $name" >&2 && exit 2 ;;
  esac
done
report=$(realpath -m "${1:-gpu-report.md}")
wheels=$(realpath "${2:-build/gpu-wheels}")
logs=${report%.md}-logs
mkdir -p "$logs"
work=$(mktemp -d)
failed=0

wanted() { [[ " $parts " == *" $1 "* ]]; }

# Run something within so many seconds, and within those left, and put what it printed under a heading: `table` as it
# is, `text` the end of it.
part() {
  local title=$1 style=$2 limit=$3 log code=0
  shift 3
  log=$logs/$(tr -cs 'a-zA-Z0-9' '-' <<<"$title" | sed 's/-*$//').log
  local left=$((seconds - SECONDS)) began=$SECONDS
  [ "$left" -ge "$limit" ] || limit=$left
  echo "== $title" >&2
  if [ "$limit" -le 0 ]; then
    code="none: no time was left"
    : >"$log" >"$log.err"
  else
    timeout --kill-after=10 "$limit" "$@" >"$log" 2>"$log.err" || code=$?
  fi
  {
    printf '\n## %s\n\nexit code %s, %s s\n\n' "$title" "$code" "$((SECONDS - began))"
    if [ "$style" = table ]; then cat "$log"; else printf '```\n%s\n```\n' "$(tail -n 60 "$log")"; fi
    if [ "$code" != 0 ]; then printf '\n```\n%s\n```\n' "$(tail -n 40 "$log.err")"; fi
  } >>"$report"
  [ "$code" = 0 ] || { failed=$((failed + 1)); echo "   failed ($code)" >&2; }
}

install_all() {
  # A venv of its own over the Python that has torch, so that nothing of the machine's is changed.
  local above site
  above=$(python3 -c 'import pathlib, torch; print(pathlib.Path(torch.__file__).parent.parent)') || return
  python3 -m venv --without-pip "$work/venv" || return
  site=$("$python" -c "import sysconfig; print(sysconfig.get_paths()['purelib'])")
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
export TORCH_CUDA_ARCH_LIST work wheels python=$work/venv/bin/python
export -f install_all

{
  echo "# dino_d2 on a GPU"
  echo
  echo "$(date -u +%Y-%m-%d), $(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader | head -n 1)," \
    "torch $(python3 -c 'import torch; print(torch.__version__)'), $(nvcc --version | tail -n 1)," \
    "commit $(git rev-parse --short HEAD 2>/dev/null || echo unknown)"
} >"$report"

part "Build" text 240 bash -c install_all
if wanted doctor; then part "Doctor" text 60 "$python" -m dino_d2.doctor; fi
if wanted tests; then part "Tests of the op" text 150 "$python" -m pytest tests/ops -q -p no:cacheprovider; fi
export PYTHONPATH=$work/peer
if wanted op; then
  benchmark=("$python" dev/benchmark_op.py --device cuda)
  for dtype in float32 bfloat16 float16; do
    part "Encoder, $dtype" table 60 "${benchmark[@]}" --dtype "$dtype" --seconds 6
  done
  part "Encoder, random locations" table 60 "${benchmark[@]}" --locations random --seconds 4
  for dtype in float32 bfloat16; do
    part "Decoder, $dtype" table 60 "${benchmark[@]}" --shape decoder --dtype "$dtype" --seconds 4
  done
fi
if wanted profile; then
  metrics=gpu__time_duration.sum,smsp__inst_executed.sum,sm__warps_active.avg.pct_of_peak_sustained_active
  metrics+=,l1tex__t_sector_hit_rate.pct,l1tex__data_pipe_lsu_wavefronts.sum,l1tex__t_sectors.sum
  metrics+=,lts__t_sectors_op_red.sum,lts__t_sectors_op_read.sum,lts__t_sector_hit_rate.pct,dram__bytes.sum
  for dtype in float32 bfloat16; do
    part "Profile of the encoder, $dtype" text 60 ncu --kernel-name "regex:(forward|backward)_kernel" \
      --metrics "$metrics" "$python" dev/benchmark_op.py --device cuda --dtype "$dtype" --once
  done
fi
if wanted sanitizers; then
  # Of every layout one dtype, memory that is not aligned, and additions in fixed point.
  sanitized="(error_is and (float32 or bfloat16) and (32-37 or 20-37)) or anywhere or deterministic"
  for tool in memcheck racecheck synccheck initcheck; do
    part "compute-sanitizer $tool" text 60 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" \
      --error-exitcode 1 "$python" -m pytest tests/ops/test_on_gpu.py -q -p no:cacheprovider -k "$sanitized"
  done
fi
if wanted model; then
  recipe=configs/dino_r50_4scale_12ep.yaml
  part "Inference of DINO-4scale" table 120 "$python" dev/benchmark.py --config-file "$recipe" --device cuda \
    --rounds 5 --dtype float32 bfloat16 float16 --variant reference MODEL.DINO.OP reference
  part "Training step of DINO-4scale" table 90 "$python" dev/benchmark.py --config-file "$recipe" --device cuda \
    --mode train --profile
fi

echo "$report: $failed parts failed, $SECONDS s; logs in $logs" >&2
rm -rf "$work"
exit "$failed"
