#!/usr/bin/env bash
# benches/memory.sh [FAMILY] [SIZES] [QUANTS] [THREADS] [BUDGETS]
#
# Runs made-up models of the published size under memory budgets, and prints budget, predicted and measured peak in MiB, with
# seconds of a step and of the decoder. Fails where measured <= predicted <= budget does not hold. Budgets are `least` (the
# smallest that is not refused), sizes like 300M, or `free`.
set -euo pipefail
cd "$(dirname "$0")/.."
family=${1:-sd15} sizes=${2:-512 768} quants=${3:-q8 q4} threads=${4:-1 2 4} budgets=${5:-least 300M free}
cargo build --release --locked -p sdfast 2>&1 | tail -1
sdfast=${CARGO_TARGET_DIR:-target}/release/sdfast

failed=0
printf '%-6s %-5s %-5s %-7s %8s %8s %8s %9s %8s %8s\n' \
    family size quant threads asked budget predicted measured step_s vae_s
for quant in $quants; do
    for size in $sizes; do
        run=("$sdfast" bench model --family "$family" --quant "$quant" -W "$size" -H "$size" --steps 2 -q)
        for n in $threads; do
            least=$({ "${run[@]}" --threads "$n" --ram 1M 2>&1 || true; } | sed -n "s/.*needs \([0-9]*\) MiB.*/\1/p")
            least=$((least + 1))M # what a process holds at its start moves a little
            for asked in $budgets; do
                case $asked in
                least) ram=(--ram "$least") ;;
                free) ram=() ;;
                *) ram=(--ram "$asked") ;;
                esac
                json=$("${run[@]}" --threads "$n" "${ram[@]}" --json)
                number() { sed -n "s/.*\"$1\": *\([0-9.]*\).*/\1/p" <<<"$json"; }
                mib() { echo $(($(number "$1") >> 20)); }
                step=$(tr -d '\n ' <<<"$json" | sed 's/.*"steps_s":\[\([^]]*\)\].*/\1/' | tr , '\n' | sort -g | head -1)
                note=
                if [ "$(number measured_peak_bytes)" -gt "$(number predicted_peak_bytes)" ] ||
                    [ "$(number predicted_peak_bytes)" -gt "$(number budget_bytes)" ]; then
                    note=BROKEN failed=1
                fi
                printf '%-6s %-5s %-5s %-7s %8s %8s %8s %9s %8.2f %8.2f %s\n' "$family" "$size" "$quant" "$n" "$asked" \
                    "$(mib budget_bytes)" "$(mib predicted_peak_bytes)" "$(mib measured_peak_bytes)" \
                    "$step" "$(number vae_s)" "$note"
            done
        done
    done
done
exit $failed
