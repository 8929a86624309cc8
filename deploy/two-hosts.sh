#!/usr/bin/env bash
# Two hosts on one machine: two network namespaces of Linux, joined by a link of a given rate, and torchrun in both. Needs root.
#
#   deploy/two-hosts.sh PROCESSES-PER-HOST MBIT COMMAND...
#   deploy/two-hosts.sh 2 200 train demo --out runs/two-hosts --steps 20 --set parallel.pipeline=2
#   sudo PYTHON="$(command -v python)" deploy/two-hosts.sh ...     # PYTHON: where anabranch is installed; sudo's own is another one
#
# Ranks 0 ... P - 1 are on the first host, P ... 2 P - 1 on the second, as torchrun numbers them. A folder that is named is one that both see.
set -euo pipefail
[ $# -ge 3 ] || { sed -n '2,8p' "$0"; exit 2; }
processes=$1 mbit=$2
shift 2
python=${PYTHON:-python3}
first=anabranch-host-a-$$ second=anabranch-host-b-$$

clean() {
    local left
    left=$(jobs -p)
    [ -z "$left" ] || kill $left 2>/dev/null || true
    wait 2>/dev/null || true
    for host in "$first" "$second"; do
        ip netns delete "$host" 2>/dev/null || true
        rm -rf "/etc/netns/$host"
    done
}
trap clean EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

ip netns add "$first"
ip netns add "$second"
ip link add link0 netns "$first" type veth peer name link0 netns "$second"
number=1
for host in "$first" "$second"; do
    # Names of its own, and no server to ask for others, which would be waited for in vain at every connection.
    mkdir -p "/etc/netns/$host"
    printf '%s\n' "127.0.0.1 localhost" "10.79.0.$number $(uname -n)" "10.79.0.1 host-a" "10.79.0.2 host-b" >"/etc/netns/$host/hosts"
    : >"/etc/netns/$host/resolv.conf"
    ip netns exec "$host" ip link set lo up
    ip netns exec "$host" ip address add "10.79.0.$number/24" dev link0
    ip netns exec "$host" ip link set link0 up
    ip netns exec "$host" tc qdisc add dev link0 root tbf rate "${mbit}mbit" burst 256kb latency 50ms
    number=$((number + 1))
done

# gloo takes the address of the host's name otherwise, which is not on this link.
export GLOO_SOCKET_IFNAME=link0 OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
start() {
    ip netns exec "$1" "$python" -m torch.distributed.run --nnodes 2 --node-rank "$2" --nproc-per-node "$processes" \
        --master-addr 10.79.0.1 --master-port 29400 -m anabranch "${@:3}"
}
# A job would have no standard input.
start "$first" 0 "$@" <&0 &
start "$second" 1 "$@" &
# A host that fails ends both.
wait -n
wait -n
