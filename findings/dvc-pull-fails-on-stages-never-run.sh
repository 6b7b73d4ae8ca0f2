#!/usr/bin/env bash
# `dvc pull` in a clone fails if any stage was never run, and `--allow-missing` succeeds where nothing was ever pushed.
#
# dvc 3.67.1.
# Expected: a pull fetches what dvc.lock names and succeeds when all of that is there; a stage that dvc.lock doesn't name has
# nothing to fetch. Where what it does name is nowhere, it fails.
# Seen: with one stage of two run and pushed, `dvc pull` fetches its output and exits with 1, naming the other stage's.
# `--allow-missing` exits with 0 then, but also, with a warning, where no object of dvc.lock is in the remote at all; a
# `dvc repro` that follows runs everything again. `dvc pull -d STAGE` tells the two cases apart.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet dvc==3.67.1
export PATH="$place/venv/bin:$PATH"
mkdir "$place/project" "$place/remote" "$place/nothing"
cd "$place/project"
git init --quiet && dvc init --quiet
cat > dvc.yaml <<'YAML'
stages:
  one: {cmd: echo 1 > one, outs: [one]}
  two: {cmd: cat one > two, deps: [one], outs: [two]}
YAML
dvc repro --quiet one
dvc remote add --quiet --default store "$place/remote"
dvc push --quiet
git add -A
git -c user.name=x -c user.email=x@example.com commit --quiet -m one

changed=0
try() {  # expected exit code, remote, then the arguments of dvc pull
  local expected=$1 remote=$2 seen=0
  shift 2
  rm -rf "$place/clone"
  git clone --quiet "$place/project" "$place/clone"
  (cd "$place/clone" && dvc remote modify --quiet --local store url "$remote" && dvc pull --quiet "$@") 2> /dev/null || seen=$?
  echo "dvc pull $* from $(basename "$remote"): exit code $seen, $(ls "$place/clone" | grep -c '^one$' || true) of 1 output"
  [ "$seen" = "$expected" ] || { echo "this changed: expected exit code $expected"; changed=1; }
}
try 1 "$place/remote"
try 0 "$place/remote" --allow-missing
try 0 "$place/nothing" --allow-missing
try 0 "$place/remote" -d one
try 1 "$place/nothing" -d one
exit $changed
