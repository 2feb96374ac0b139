#!/usr/bin/env bash
# benches/container.sh [FAMILY] [LIMIT] [RAM] [STEPS]
#
# Makes the same picture twice with a made-up model of the published size: with all memory there is, and with a budget of RAM
# inside a control group that may hold LIMIT bytes, files in the page cache included, after the cache has been dropped. Fails
# where the second run is killed or gives another picture. Needs the right to make control groups.
set -euo pipefail
cd "$(dirname "$0")/.."
family=${1:-sd15} limit=${2:-200000000} ram=${3:-190M} steps=${4:-1}
cargo build --release --locked -p sdfast 2>&1 | tail -1
sdfast=$(realpath "${CARGO_TARGET_DIR:-target}/release/sdfast")
folder=$(mktemp -d)
group=
for root in /sys/fs/cgroup/memory /sys/fs/cgroup; do
    if [ -z "$group" ] && mkdir "$root/sdfast-bench-$$" 2>/dev/null; then
        group=$root/sdfast-bench-$$
    fi
done
trap 'rm -r "$folder"; rmdir "$group"' EXIT
if [ -f "$group/memory.max" ]; then
    echo "$limit" >"$group/memory.max"
else
    echo "$limit" >"$group/memory.limit_in_bytes"
fi

SDFAST_CACHE=${SDFAST_CACHE:-$HOME/.cache/sdfast}
"$sdfast" bench model --family "$family" --steps 1 -W 64 -H 64 -q >/dev/null # makes the file
file=$(ls -t "$SDFAST_CACHE/$family"-*.q8.sdq | head -1)
echo "$file: $(stat -c %s "$file") bytes, limit $limit, budget $ram"
picture() {
    SDFAST_CACHE='' "$sdfast" gen "a lighthouse in a storm" -m "$file" --seed 1 --steps "$steps" -q "$@"
}
picture -o "$folder/free.png" --json >"$folder/free.json"
sync
echo 3 >/proc/sys/vm/drop_caches
(
    echo "$BASHPID" >"$group/cgroup.procs"
    picture -o "$folder/tight.png" --ram "$ram" --json >"$folder/tight.json"
)
cmp "$folder/free.png" "$folder/tight.png" && echo "the same picture"
for run in free tight; do
    number() { sed -n "s/.*\"$1\": *\([0-9.]*\).*/\1/p" "$folder/$run.json"; }
    echo "$run: measured $(number measured_peak_bytes), predicted $(number predicted_peak_bytes)," \
        "decoder $(number vae_s) s, all $(number total_s) s"
done
most=$(cat "$group"/memory.max_usage_in_bytes "$group"/memory.peak 2>/dev/null || true)
echo "most that the group held: ${most:-unknown}"
