#!/usr/bin/env bash
# What pod.py asks of every host of a pod, over ssh:
#
#   on_host.sh install MARK COMMAND    unpack ~/omni-source.tar.gz and run COMMAND, once for a MARK
#   on_host.sh start RUN COMMAND...    run COMMAND in the background, unless it runs already
#   on_host.sh status RUN              running, stopped, lost, absent or exit CODE
#   on_host.sh stop RUN [SIGNAL]       TERM lets the run save itself
#   on_host.sh logs RUN LINES [follow]
#
# All is under ~/omni: source/, venv/, runs/RUN/{log,pid,exit,stopped,environment}. The answer is one line,
# `omni-host NUMBER WORD...` (a title before logs), so that a host without that line is one that did not answer.
set -euo pipefail

place="$HOME/omni"
attributes=http://metadata.google.internal/computeMetadata/v1/instance/attributes
number=$(curl --silent --fail --max-time 10 --header 'Metadata-Flavor: Google' "$attributes/agent-worker-number")

answer() { printf 'omni-host %s %s\n' "$number" "$*"; }

on_exit() { # whatever went wrong is an answer too
  local code=$?
  if [ "$code" != 0 ]; then answer "failed $code"; fi
}
trap on_exit EXIT

# The runner has the run's name among its arguments: a number alone may be another process after a restart of the host.
alive() {
  local process
  process=$(cat "$run/pid" 2>/dev/null) && grep --quiet --null-data --line-regexp --fixed-strings "omni-run:$name" \
    "/proc/$process/cmdline" 2>/dev/null
}

install() {
  local mark=$1 command=$2
  mkdir -p "$place"
  if [ "$(cat "$place/installed" 2>/dev/null)" = "$mark" ]; then
    answer "installed before"
    return
  fi
  rm -rf "$place/source" "$place/installed"
  mkdir -p "$place/source"
  tar -xzf "$HOME/omni-source.tar.gz" -C "$place/source"
  (cd "$place/source" && bash -euo pipefail -c "$command") >&2
  printf '%s' "$mark" >"$place/installed"
  answer "installed"
}

start() {
  if alive; then
    rm -f "$HOME/omni-environment.$name"
    answer "running before"
    return
  fi
  mkdir -p "$run"
  chmod 700 "$run"
  rm -f "$run/exit" "$run/stopped" "$run/environment"
  # Copied here before each start where there is one; it holds what must not stand on a command line.
  if [ -f "$HOME/omni-environment.$name" ]; then
    chmod 600 "$HOME/omni-environment.$name"
    mv "$HOME/omni-environment.$name" "$run/environment"
  fi
  cd "$place/source"
  # The trap makes bash outlive a TERM for its group, to write down how the command ended.
  # shellcheck disable=SC2016  # the runner expands them
  setsid bash -c '
    trap : TERM
    run=$1
    shift
    if [ -f "$run/environment" ]; then . "$run/environment"; fi
    export PATH="$HOME/omni/venv/bin:$PATH" OMNI_DISTRIBUTED=1
    echo "== $(date -u +%FT%TZ) $*"
    code=0
    "$@" || code=$?
    echo "$code" >"$run/exit.partial"
    mv "$run/exit.partial" "$run/exit"
  ' "omni-run:$name" "$run" "$@" >>"$run/log" 2>&1 </dev/null &
  echo $! >"$run/pid"
  answer "started"
}

status() {
  if alive; then
    answer "running"
  elif [ -f "$run/stopped" ]; then
    answer "stopped"
  elif [ -f "$run/exit" ]; then
    answer "exit $(cat "$run/exit")"
  elif [ -f "$run/pid" ]; then
    answer "lost" # the host was restarted under it, or it was killed with its runner
  else
    answer "absent"
  fi
}

stop() {
  if [ "$1" = TERM ] && [ -d "$run" ]; then touch "$run/stopped"; fi
  if alive; then
    kill -s "$1" -- "-$(cat "$run/pid")"
    answer "signalled"
  else
    answer "not running"
  fi
}

logs() {
  answer "log"
  local follow=()
  if [ "${2:-}" = follow ]; then follow=(-F); fi
  tail -n "$1" "${follow[@]}" "$run/log"
}

verb=$1
shift
if [ "$verb" = install ]; then
  install "$@"
else
  name=$1
  run="$place/runs/$name"
  shift
  case $verb in
    start | status | logs) "$verb" "$@" ;;
    stop) stop "${1:-TERM}" ;;
    *) exit 2 ;;
  esac
fi
