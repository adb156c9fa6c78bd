#!/usr/bin/env bash
# A first day as the README tells it, in a fresh folder with only the wheel: a job, a terminal, mistakes, a run that is
# interrupted and goes on, its model back in Python, a sweep, a cluster. Ends with 1 at the first thing that is not as
# it is documented.   tests/newcomer.sh alone|cluster PYTHON SITE FOLDER [API]
# PYTHON: has the dependencies; SITE: a folder with what the wheel installs; FOLDER: a fresh one for "alone", the same
# again for "cluster", which takes the address of a cluster's job API.
set -euo pipefail

part=$1 python=$2 site=$3 folder=$4 api=${5:-}
mkdir -p "$folder/day" && cd "$folder/day"
export PATH="$(dirname "$python"):$PATH" PYTHONPATH=$site RAY_AUTH_MODE=disabled OMP_WAIT_POLICY=PASSIVE
unset RAY_ADDRESS
elastic() { "$python" -m elastic.cli "$@"; }
RAY_TMPDIR=$(mktemp -d /tmp/nXXXXXX) # a machine where nobody has started a Ray; paths of sockets may not be long
export RAY_TMPDIR
terminal="newcomer-$$"
cleaners=("rm -rf $RAY_TMPDIR")
clean() { for one in "${cleaners[@]}"; do eval "$one" || true; done; }
trap clean EXIT

screen() { tmux -L "$terminal" capture-pane -p 2> /dev/null || true; }
say() { echo; echo "== $*"; }
fail() { echo "NOT AS DOCUMENTED: $*" >&2; exit 1; }
# expect CODE TEXT COMMAND...: the command ends with the code, and says the text.
expect() {
    local code=$1 text=$2 got=0
    shift 2
    "$@" > said 2>&1 || got=$?
    [ "$got" = "$code" ] || { cat said; fail "'$*' ended with $got, not $code"; }
    grep -qF -- "$text" said || { cat said; fail "'$*' does not say: $text"; }
    echo "ok: $*   ($text)"
}
# wait_for SECONDS WHAT COMMAND...: until the command succeeds.
wait_for() {
    local left=$1 what=$2
    shift 2
    until "$@" > /dev/null 2>&1; do
        left=$((left - 1))
        [ "$left" -gt 0 ] || { screen; fail "waited in vain for $what"; }
        sleep 1
    done
}

alone() {
    say "a first job"
    expect 0 "wrote job.py; run it with: python job.py" elastic init job.py
    [ "$("$python" -c 'import elastic, os; print(os.path.dirname(os.path.dirname(elastic.__file__)))')" = "$site" ] ||
        fail "something else than the wheel is imported"
    expect 0 "--run.duration" python job.py --help
    expect 0 "4000 samples" python job.py --dry-run
    [ ! -e runs ] || fail "a dry run left something"

    say "mistakes"
    expect 2 "error: --epochs is no option; give --run.duration 5ep" python job.py --epochs 5
    expect 2 "error: --lr is no option; it is the job's own" python job.py --lr 0.1
    expect 2 "error: --parallel.compile takes no value" python job.py --parallel.compile true
    expect 2 "which has no '://'" python job.py --run.storage s3:/bucket/runs
    expect 2 "error: URL is 'runs', which is no folder" elastic runs

    say "a run, and a file of options"
    printf 'run: {duration: 2ep}\nscaling: {max-workers: 1, accelerator: cpu}\n' > options.yaml
    expect 0 "weights sha256" python job.py --run.name first --config options.yaml
    expect 0 "finished" elastic runs
    expect 0 "step 125 of 125" elastic status first
    expect 0 "accuracy" elastic evaluate first --job job.py
    expect 0 "in weights.safetensors" elastic checkpoints export first weights.safetensors
    expect 0 "Sequential False" "$python" -c '
import elastic
from job import Ring
model = elastic.load_model(Ring, "first")
print(type(model).__name__, model.training)'

    say "a terminal of 80 columns, Ctrl-C, and the same run again by its name; a second command beside it"
    tmux -L "$terminal" new-session -d -x 80 -y 40 "bash --norc"
    cleaners+=("tmux -L $terminal kill-server")
    type_in() { tmux -L "$terminal" send-keys "$@"; }
    type_in "PS1='ready> '; export PYTHONPATH=$PYTHONPATH PATH=$PATH RAY_AUTH_MODE=disabled RAY_TMPDIR=$RAY_TMPDIR; clear" Enter
    type_in "python job.py --run.name long --run.duration 4000ep --scaling.max-workers 1 --scaling.accelerator cpu" Enter
    shows_step() { screen | grep -Eq 'step [0-9]+/250000 +loss [0-9.]+ +accuracy'; }
    wait_for 90 "a step on the terminal" shows_step
    screen | grep -E 'step [0-9]+/250000' | tail -1
    expect 0 "weights sha256" python job.py --run.name beside --config options.yaml
    shows_step || fail "the first run is gone"
    type_in C-c
    wait_for 60 "the end of the run" eval 'screen | tr -d "\n" | grep -q "give --run.name long to go on"'
    if screen | grep -q "error:"; then screen; fail "to be interrupted is called an error"; fi
    expect 0 "paused" python job.py --run.name long --run.stop-after 1ep
    grep -qF -- "--run.duration 4000ep" said || fail "what the run was started with is not taken again"

    say "a sweep of the same file"
    expect 0 "try-0001" elastic sweep job.py --sweep.name try --search "batch.global-size=choice(64,128)" --trials 2 \
        --run.duration 1ep --scaling.max-workers 1 --scaling.accelerator cpu --no-plots
    expect 0 "try-0000" elastic report try
}

cluster() {
    say "a job that is submitted from this folder to a cluster"
    wait_for 60 "the job API" ray job list --address "$api"
    submit=(ray job submit --address "$api" --working-dir . --)
    expect 1 "a folder inside the package" "${submit[@]}" python job.py --run.name sent --scaling.accelerator cpu
    expect 0 "weights sha256" "${submit[@]}" python job.py --run.name sent --run.storage "$folder/shared" \
        --run.duration 1ep --scaling.max-workers 1 --scaling.accelerator cpu
    expect 0 "finished" elastic status "$folder/shared/sent"
}

"$part"
say "all as documented"
