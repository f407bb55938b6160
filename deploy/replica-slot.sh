#!/bin/sh
# Runs a command as the lowest replica whose slot is free: `replica-slot.sh DIRECTORY COMMAND...`.
#
# GPT_TRADER_REPLICA must be the same after a restart (its transactional id ends what the replica
# before it left open) and unlike that of all others alive. Scaled containers have no such name; a
# lock on a file in a volume they share gives one. The kernel frees it with the process, whatever
# ended that. On Kubernetes a StatefulSet's pod name does the same.
set -eu
slots=$1
shift
mkdir -p "$slots"
slot=0
while :; do
    exec 9> "$slots/$slot"
    if flock --nonblock 9; then
        GPT_TRADER_REPLICA=$slot
        export GPT_TRADER_REPLICA
        exec "$@"
    fi
    slot=$((slot + 1))
done
