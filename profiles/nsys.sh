#!/usr/bin/env bash
# Records iterations of a configuration with Nsight Systems.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: profiles/nsys.sh [OPTION]... CONFIG [KEY=VALUE]...

Records iterations of a configuration with Nsight Systems, after one that warms up.

  CONFIG             a recipe's name, such as tiny, or a YAML file
  KEY=VALUE          overrides, such as rollout.guidance_scale=3

  -n, --iterations N  iterations to record (1)
  -o, --output DIR    folder of the report, nsys.nsys-rep (profile)
      --dry-run       print the command and do nothing
  -h, --help          this text

PYTHON picks the interpreter (.venv/bin/python). profiles/README.md says how to read the report.
TEXT
}

fail() {
    echo "error: $1" >&2
    exit 2
}

value() {
    [[ $# -gt 1 ]] || fail "$1 needs a value"
}

iterations=1
output=profile
dry_run=
while [[ $# -gt 0 ]]; do
    case $1 in
        -h | --help) usage; exit ;;
        --dry-run) dry_run=yes; shift ;;
        -n | --iterations) value "$@"; iterations=$2; shift 2 ;;
        -o | --output) value "$@"; output=$2; shift 2 ;;
        -*) fail "unknown option $1; see --help" ;;
        *) break ;;
    esac
done
[[ $# -gt 0 ]] || fail "which configuration? see --help"
[[ $iterations =~ ^[1-9][0-9]*$ ]] || fail "--iterations: $iterations is not a number of iterations"
config=$1
shift
overrides=()
for override in "$@"; do
    overrides+=(--set "$override")
done

# graph nodes: without them a captured denoising step is one block on the timeline
command=(
    nsys profile
    "--trace=cuda,nvtx,cudnn,cublas"
    --sample=none
    --cpuctxsw=none
    --cuda-graph-trace=node
    --capture-range=nvtx
    --nvtx-capture=profile@loopfast
    --capture-range-end=stop
    --force-overwrite=true
    "--output=$output/nsys"
    "${PYTHON:-.venv/bin/python}" -m loopfast profile
    --config "$config"
    "--iterations=$iterations"
    --no-trace
    ${overrides[@]+"${overrides[@]}"} # bash before 4.4 takes an empty array for an unset one
)
if [[ $dry_run ]]; then
    printf '%q ' "${command[@]}"
    echo
    exit
fi
command -v nsys > /dev/null || fail "no nsys on the PATH: it comes with Nsight Systems"
mkdir -p "$output"
exec "${command[@]}"
