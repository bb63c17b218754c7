#!/usr/bin/env bash
# Sourced by train_8gpu.sh and train_multinode.sh: their arguments, and steps that a signal reaches.
#   arguments "$@"    RECIPE OUTPUT [--dry-run] [more ...]  ->  recipe, output, dry_run, more, and overrides: its --set
#   step COMMAND ...  says the command and runs it (with --dry-run: only says it); its status ends the script unless 0
# A signal is passed on to the step at hand, which saves and ends; then the script ends too.

python=${PYTHON:-$root/.venv/bin/python}
dry_run=no child="" stopped=no

die() { echo "$(basename -- "$0"): error: $*" >&2; exit 2; }

arguments() {
    local argument positional=() set=no
    more=() overrides=()
    for argument in "$@"; do
        case $argument in
            -h | --help) sed -n '2,${/^#/!q;s/^# \{0,1\}//p}' "$0"; exit 0 ;;
            --dry-run) dry_run=yes ;;
            -*) more+=("$argument") ;;
            # what follows an option (as in --set a=1 b=2) is its value
            *) if ((${#more[@]})); then more+=("$argument"); else positional+=("$argument"); fi ;;
        esac
    done
    for argument in ${more[@]+"${more[@]}"}; do
        if [[ $argument == -* ]]; then set=no; fi
        if [[ $argument == --set || $argument == --set=* ]]; then set=yes; fi
        if [[ $set == yes ]]; then overrides+=("$argument"); fi
    done
    ((${#positional[@]} == 2)) || die "give RECIPE and OUTPUT, then any options of vpae distill (--help tells more)"
    recipe=${positional[0]}
    # shellcheck disable=SC2034 # the scripts that source this use it
    output=${positional[1]}
    [[ -f $recipe ]] || die "no recipe at $recipe; the ones that ship are in recipes/"
    "$python" -c '' 2>/dev/null || die "no Python at $python: run ./launch/install.sh, or name one with PYTHON=..."
}

pass_on() {
    stopped=yes
    [[ -z $child ]] || kill -TERM "$child" 2>/dev/null || true
}
trap pass_on TERM INT HUP
# Each step is a process group of its own: Ctrl-C reaches this script alone, and the step hears of it once.
set -m

# Quoted only where it must be, so that it can be read and pasted.
show() {
    local word line=""
    for word in "$@"; do
        [[ $word =~ ^[[:alnum:]_./:=,+@-]+$ ]] || printf -v word '%q' "$word"
        line+=" $word"
    done
    echo "+$line"
}

step() {
    show "$@"
    if [[ $dry_run == yes ]]; then return; fi
    if [[ $stopped == yes ]]; then exit 0; fi
    # in the background: bash runs a trap only once the command in the foreground has ended
    "$@" &
    child=$!
    local status=0
    wait "$child" || status=$?
    while kill -0 "$child" 2>/dev/null; do
        status=0
        wait "$child" || status=$?
    done
    child=""
    if [[ $stopped == yes ]]; then
        echo "stopped by a signal; the same command goes on from what was saved"
        exit 0
    fi
    ((status == 0)) || exit "$status"
}
