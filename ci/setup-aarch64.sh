#!/usr/bin/env bash
# ci/setup-aarch64.sh DIR
#
# Prepares an x86-64 machine with apt for building and running aarch64 tests, and writes DIR/env.sh: source it, and cargo
# builds for aarch64-unknown-linux-gnu and runs what it built in qemu (QEMU_CPU names the processor).
#
# The standard library for aarch64 comes from rustup. Where rustup can't download, a whole compiler of Debian's is unpacked
# into DIR (a compiler and its standard library must be one build); the system keeps its own compiler and its own
# architecture. A second run with the same DIR finds everything there.
set -euo pipefail

dir=${1:?usage: setup-aarch64.sh DIR}
mkdir -p "$dir"
dir=$(cd "$dir" && pwd)
target=aarch64-unknown-linux-gnu
least=1.94

say() { echo "setup-aarch64: $*"; }
die() { say "$*" >&2; exit 1; }
root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi; }

installed() { [ "$(dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null)" = installed ]; }

updated=
update_lists() {
    [ -n "$updated" ] || root apt-get update -qq || say "apt-get update complained"
    updated=1
}

# install PACKAGE...: those that are not there, and nothing they recommend
install() {
    local p missing=()
    for p in "$@"; do installed "$p" || missing+=("$p"); done
    [ ${#missing[@]} -gt 0 ] || return 0
    update_lists
    say "installing ${missing[*]}"
    root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" \
        >"$dir/install.log" 2>&1 || { tail -20 "$dir/install.log" >&2; die "apt-get install failed"; }
}

has_std() { compgen -G "$("$1" --print target-libdir --target $target 2>/dev/null)/libcore-*.rlib" >/dev/null; }

write_env() {
    {
        for tool in rustc rustdoc; do
            [ -n "${1:-}" ] && echo "export ${tool^^}='$dir/bin/$tool'"
        done
        echo "export CARGO_BUILD_TARGET=$target"
        echo "export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc"
        echo "export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER='qemu-aarch64 -L /usr/aarch64-linux-gnu'"
    } >"$dir/env.sh"
    say "ready: . $dir/env.sh"
    exit 0
}

[ "$(dpkg --print-architecture 2>/dev/null)" = amd64 ] || die "an amd64 machine with apt is needed"
install gcc gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user
has_std rustc || timeout 120 rustup target add $target >"$dir/rustup.log" 2>&1 || say "rustup can't supply $target"
has_std rustc && write_env
[ -x "$dir/bin/rustc" ] && has_std "$dir/bin/rustc" && write_env unpacked

# ---- Debian's compiler. arm64 lists are read beside the system's, which learns no second architecture.
update_lists
mkdir -p "$dir"/apt/{lists/partial,archives/partial,parts}
: >"$dir/apt/status"
keyring=/usr/share/keyrings/debian-archive-keyring.gpg
options="arch=arm64$([ -e $keyring ] && echo " signed-by=$keyring")"
apt-get indextargets --format "deb [$options] \$(REPO_URI) \$(RELEASE) \$(COMPONENT)" \
    'Identifier: Packages' 'Origin: Debian' | sort -u >"$dir/apt/sources"
[ -s "$dir/apt/sources" ] || die "apt is configured with no Debian source"
cat >"$dir/apt/conf" <<END
APT::Architectures { "amd64"; "arm64"; };
APT::Sandbox::User "";
Acquire::Languages "none";
Acquire::IndexTargets::deb::DEP-11::DefaultEnabled "false";
Dir::Etc::sourcelist "$dir/apt/sources";
Dir::Etc::sourceparts "$dir/apt/parts";
Dir::State::lists "$dir/apt/lists";
Dir::State::status "$dir/apt/status";
Dir::Cache "$dir/apt";
END
arm() { APT_CONFIG="$dir/apt/conf" "$@"; }
arm apt-get update -qq

# Versions are compared without a rebuild's +bN, which may differ between architectures.
versions() { awk -F'|' '{ gsub(/ /, "", $2); print $2 }' | sort -uV; }
best='' std='' compiler='' arm_version=''
for pair in rustc-web:libstd-rust-web-dev:rust-web-clippy rustc:libstd-rust-dev:rust-clippy; do
    IFS=: read -r rustc libstd _ <<<"$pair"
    for v in $(apt-cache madison "$rustc" 2>/dev/null | versions); do
        for w in $(arm apt-cache madison "$libstd:arm64" 2>/dev/null | versions); do
            [ "${v%+b[0-9]*}" = "${w%+b[0-9]*}" ] || continue
            if [ -z "$best" ] || dpkg --compare-versions "$v" gt "$best"; then
                best=$v arm_version=$w compiler=$rustc std=$libstd
            fi
        done
    done
done
[ -n "$best" ] || die "apt offers no compiler for both architectures"
dpkg --compare-versions "$best" ge $least || die "apt's compiler is $best, $least is needed"
say "unpacking $compiler $best"

needs() { apt-cache show "$1=$2" | sed -n 's/^Depends: //p' | head -1 | tr ',' '\n' | awk '{ print $1 }'; }
driver=$(needs "$std" "$best" | grep -m1 -E '^libstd-rust-(web-)?[0-9]') || die "$std names no driver package"
mapfile -t libraries < <(needs "$driver" "$best" | grep -E '^(libllvm|libstdc|libgcc|libcurl|zlib)')
install "${libraries[@]}"
rm -rf "$dir"/{debs,rust} && mkdir -p "$dir"/{debs,rust,bin}
(
    cd "$dir/debs"
    apt-get download -qq -o APT::Sandbox::User= "$compiler=$best" "$driver=$best" "$std=$best"
    arm apt-get download -qq "$std:arm64=$arm_version"
)
for deb in "$dir"/debs/*.deb; do
    dpkg-deb --fsys-tarfile "$deb" | tar -x -C "$dir/rust" --exclude='./usr/share/*' --exclude='./usr/libexec/*'
done
# rustup's cargo puts its own libraries first: these must come before them.
for tool in rustc rustdoc; do
    cat >"$dir/bin/$tool" <<END
#!/bin/sh
LD_LIBRARY_PATH='$dir/rust/usr/lib/x86_64-linux-gnu'\${LD_LIBRARY_PATH:+:\$LD_LIBRARY_PATH}
export LD_LIBRARY_PATH
exec '$dir/rust/usr/bin/$tool' "\$@"
END
    chmod +x "$dir/bin/$tool"
done
rm -rf "$dir"/{apt,debs}
has_std "$dir/bin/rustc" || die "the unpacked compiler has no $target"
write_env unpacked
