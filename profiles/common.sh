# shellcheck shell=bash
# What nsys.sh and ncu.sh share: their last arguments and how they end.

output=profile
dry_run=
trained=() # arguments of `loopfast profile`: the configuration and its overrides

fail() {
    echo "error: $1" >&2
    exit 2
}

# value OPTION [VALUE]...: an option that takes a value has one
value() {
    [[ $# -gt 1 ]] || fail "$1 needs a value"
}

# positive OPTION VALUE WHAT
positive() {
    [[ $2 =~ ^[1-9][0-9]*$ ]] || fail "$1: $2 is not a number of $3"
}

# configuration CONFIG [KEY=VALUE]...
configuration() {
    [[ $# -gt 0 ]] || fail "which configuration? see --help"
    trained=(--config "$1")
    local override
    for override in "${@:2}"; do
        trained+=(--set "$override")
    done
}

# profile TOOL PACKAGE COMMAND...: what the script was called for
profile() {
    local command=("$1" "${@:3}")
    if [[ $dry_run ]]; then
        printf '%q ' "${command[@]}"
        echo
        exit
    fi
    command -v "$1" > /dev/null || fail "no $1 on the PATH: it comes with $2"
    mkdir -p "$output"
    exec "${command[@]}"
}
