#!/usr/bin/env bash
# Measures kernels inside an iteration of a configuration with Nsight Compute.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: profiles/ncu.sh [OPTION]... CONFIG [KEY=VALUE]...

Measures kernels of an iteration of a configuration with Nsight Compute, after one iteration that warms up.

  CONFIG             a recipe's name, such as tiny, or a YAML file
  KEY=VALUE          overrides, such as rollout.cuda_graph=false

  -k, --kernel REGEX  kernels to measure, by name (those of the ops of loopfast)
  -r, --range NAME    only those started in this NVTX range (profile: the iteration as a whole); others: step,
                      denoiser, backward, decoder, reward, loss, optimizer
  -c, --count N       how many launches of them (20)
  -o, --output DIR    folder of the report, ncu.ncu-rep (profile)
      --clock-control MODE
                      none leaves the GPU's clocks as they are (none); base locks them for steadier times, which ncu does
                      by default: for others on the same machine, too
  -a, --argument ARG  one more argument for ncu, such as --set=full; may be given several times
      --dry-run       print the command and do nothing
  -h, --help          this text

PYTHON picks the interpreter (.venv/bin/python). profiles/README.md says how to read the report.
TEXT
}

# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

kernel='^(denoise_step|group_norm_silu|sum_rows|fold|loss|finish|mean|scale_gradients|transition_logprob|score|leave_one_out|philox_normal|advance)(_.*)?$'
range=profile
count=20
clocks=none
further=()
while [[ $# -gt 0 ]]; do
    case $1 in
        -h | --help) usage; exit ;;
        --dry-run) dry_run=yes; shift ;;
        -k | --kernel) value "$@"; kernel=$2; shift 2 ;;
        -r | --range) value "$@"; range=$2; shift 2 ;;
        -c | --count) value "$@"; count=$2; shift 2 ;;
        -o | --output) value "$@"; output=$2; shift 2 ;;
        --clock-control) value "$@"; clocks=$2; shift 2 ;;
        -a | --argument) value "$@"; further+=("$2"); shift 2 ;;
        -*) fail "unknown option $1; see --help" ;;
        *) break ;;
    esac
done
configuration "$@"
positive --count "$count" launches

# The slash says push/pop range. Scope process: autograd starts the kernels of the backward pass from another thread.
# Sections: speed of light and memory tables answer "is it at the bandwidth's limit?", the others "if not, why?".
profile ncu "Nsight Compute" \
    --nvtx \
    --nvtx-include "loopfast@$range/" \
    --nvtx-push-pop-scope process \
    --kernel-name "regex:$kernel" \
    --launch-count "$count" \
    --graph-profiling node \
    --clock-control "$clocks" \
    --section SpeedOfLight \
    --section MemoryWorkloadAnalysis \
    --section MemoryWorkloadAnalysis_Tables \
    --section LaunchStats \
    --section Occupancy \
    --section WarpStateStats \
    --force-overwrite \
    --export "$output/ncu" \
    ${further[@]+"${further[@]}"} \
    "${PYTHON:-.venv/bin/python}" -m loopfast profile \
    --iterations=1 \
    --no-trace \
    "${trained[@]}"
