#!/usr/bin/env bash
# A Debian package and a tarball of angler: program, man pages, completions, systemd unit, settings, licences.
#
#   cargo build --release --locked && deploy/package.sh
#   deploy/package.sh --binary FILE --out FOLDER      another program; target/package is the default folder
#   deploy/package.sh --compression none              for tests: xz takes a minute
#
# Wants dpkg-deb (Debian, Ubuntu). The program is run once for each page that it writes, so it must be of this machine's kind.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

die() {
  echo "package: $*" >&2
  exit 1
}

binary=$root/target/release/angler out=$root/target/package compression=xz
while (($#)); do
  case $1 in
  --binary) binary=$(realpath "$2") ;;
  --out) out=$(realpath -m "$2") ;;
  --compression) compression=$2 ;;
  *) die "unknown option $1; the head of this file says what there is" ;;
  esac
  shift 2 || die 'an option without its value'
done
[[ -x $binary ]] || die "there is no program $binary: cargo build --release --locked"

version=$("$binary" --version) version=${version#angler }
architecture=$(dpkg --print-architecture)
# The newest symbols of the C library that it asks for.
glibc=$(LC_ALL=C grep -ao 'GLIBC_2\.[0-9]*' "$binary" | sort -Vu | tail -n 1)
[[ $glibc ]] || die "$binary asks for no GLIBC: is it a program for Linux?"
# The same package of the same commit.
export SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git -C "$root" log -1 --format=%ct 2>/dev/null || date +%s)}

stage=$(mktemp -d)
trap 'rm -rf "$stage"' EXIT
chmod 755 "$stage"
tree=$stage/tree
put() { install -D --mode="$1" "$2" "$tree/$3"; } # MODE FROM TO

put 755 "$binary" usr/bin/angler
"$binary" man "$tree/usr/share/man/man1" >/dev/null
gzip --best --no-name "$tree"/usr/share/man/man1/*.1
mkdir -p "$tree"/usr/share/{bash-completion/completions,zsh/vendor-completions,fish/vendor_completions.d}
"$binary" completions bash >"$tree/usr/share/bash-completion/completions/angler"
"$binary" completions zsh >"$tree/usr/share/zsh/vendor-completions/_angler"
"$binary" completions fish >"$tree/usr/share/fish/vendor_completions.d/angler.fish"

put 644 "$root/deploy/systemd/angler.service" usr/lib/systemd/system/angler.service
put 644 "$root/deploy/systemd/sysusers.conf" usr/lib/sysusers.d/angler.conf
put 640 "$root/deploy/systemd/angler.env" etc/angler/angler.env
# Every setting, each a comment: what stays one follows the defaults of the next version.
"$binary" default-settings | sed -E 's/^([a-z0-9_]+ = )/#\1/' >"$tree/etc/angler/angler.toml"

docs=usr/share/doc/angler
for file in README.md CHANGELOG.md docs/operations.md docs/class-vectors.md deploy/systemd/cpu.conf models/efficientnet-lite0/NOTICE; do
  put 644 "$root/$file" "$docs/$(basename "$file")"
done
{
  printf 'Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/\nUpstream-Name: angler\n\n'
  printf 'Files: *\nCopyright: the authors of angler\nLicense: MIT or Apache-2.0\n'
  printf ' The texts of both, and the notice of the model inside the program, lie beside this file.\n'
} >"$tree/$docs/copyright"
put 644 "$root/LICENSE-MIT" "$docs/LICENSE-MIT"
put 644 "$root/LICENSE-APACHE" "$docs/LICENSE-APACHE"
# mktemp's and the caller's umask must not show.
find "$tree" -type d -exec chmod 755 {} +
find "$tree/usr/share" -type f -exec chmod 644 {} +
chmod 644 "$tree/etc/angler/angler.toml"

mkdir -p "$out"
name=angler-$version-$(uname -m)-linux-gnu
tar --create --gzip --file "$out/$name.tar.gz" --sort=name --owner=0 --group=0 --numeric-owner \
  --mtime="@$SOURCE_DATE_EPOCH" --transform "s#^\.#$name#" -C "$tree" .

mkdir "$tree/DEBIAN"
cat >"$tree/DEBIAN/control" <<CONTROL
Package: angler
Version: $version
Architecture: $architecture
Maintainer: the authors of angler <angler@localhost>
Section: science
Priority: optional
Installed-Size: $(du --summarize --block-size=1K --apparent-size "$tree" | cut -f 1)
Depends: libc6 (>= ${glibc#GLIBC_}), libgcc-s1, ca-certificates
Recommends: systemd, libstdc++6
Description: classifies images by metric learning: jobs from RabbitMQ, images from S3
 A worker takes image classification jobs from RabbitMQ, fetches the images from S3, embeds them in batches
 (ONNX Runtime on a GPU or a CPU, if its library is there; tract otherwise) and compares the embeddings with versioned class
 vectors. The same program classifies folders without any server.
CONTROL
printf '/etc/angler/angler.env\n/etc/angler/angler.toml\n' >"$tree/DEBIAN/conffiles"
install --mode=755 "$root/deploy/debian/postinst" "$root/deploy/debian/prerm" "$root/deploy/debian/postrm" "$tree/DEBIAN/"
dpkg-deb --build --root-owner-group "-Z$compression" "$tree" "$out/angler_${version}_$architecture.deb" >/dev/null

ls -l "$out/angler_${version}_$architecture.deb" "$out/$name.tar.gz"
