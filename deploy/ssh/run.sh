#!/usr/bin/env bash
# Usage: run.sh HOST0,HOST1,... [flags of python -m gptoss_jax.generate]
# Starts a process on each host; the first one has this script's standard input and output.
set -euo pipefail

if (($# < 1)); then
  echo "usage: $0 HOST0,HOST1,... [flags of python -m gptoss_jax.generate]" >&2
  exit 2
fi
IFS=, read -r -a hosts <<<"$1"
shift
directory=${DIRECTORY:-gptoss-jax}
address=${COORDINATOR:-${hosts[0]}:${PORT:-8476}}
read -r -a ssh <<<"${SSH:-ssh -o BatchMode=yes -o ServerAliveInterval=10 -o ServerAliveCountMax=2}"
pidfile=/tmp/gptoss-$(hostname)-$$.pid
secretfile=.gptoss-$(hostname)-$$.secret # in the home directory of each host
secret=$(head -c 32 /dev/urandom | base64)

words=""
(($# == 0)) || printf -v words '%q ' "$@"

start() { # NUMBER; the shell of the other host takes the words apart
  exec "${ssh[@]}" "${hosts[$1]}" "cd $(printf %q "$directory") && echo \$\$ >$pidfile.$1 &&
    exec .venv/bin/python -m gptoss_jax.generate --coordinator-address $(printf %q "$address") \
      --num-processes ${#hosts[@]} --process-id $1 --cluster-secret-file ~/$secretfile.$1 $words"
}

clean() {
  for ((i = 0; i < ${#hosts[@]}; i++)); do
    "${ssh[@]}" "${hosts[i]}" "rm -f $pidfile.$i ~/$secretfile.$i" </dev/null || true
  done
}
trap clean EXIT

interrupt() { # ssh passes no signals on, and process 0 ends all
  "${ssh[@]}" "${hosts[0]}" "kill -INT \$(cat $pidfile.0)" </dev/null || true
}
trap interrupt INT TERM

for ((i = 0; i < ${#hosts[@]}; i++)); do # through standard input: other users can see command lines
  "${ssh[@]}" "${hosts[i]}" "umask 077 && cat >~/$secretfile.$i" <<<"$secret"
done

exec 3<&0
for ((i = 1; i < ${#hosts[@]}; i++)); do
  start "$i" </dev/null &
done
start 0 <&3 &
first=$!

code=0
while wait "$first" || code=$?; kill -0 "$first" 2>/dev/null; do code=0; done
wait
exit "$code"
