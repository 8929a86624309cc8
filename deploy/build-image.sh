#!/usr/bin/env bash
# Builds the gateway's image from deploy/Containerfile, and runs its help in it. By podman or docker, whichever works first, or what BUILDER names.
#
#   deploy/build-image.sh [TAG]        # anabranch-gateway where none is given
#
# Where neither works nothing is built: it says so, and its exit code is 77, which test harnesses take for "skipped".
set -euo pipefail
[[ $0 != */* ]] || cd "${0%/*}"
cd ..
tag=${1:-anabranch-gateway}

builder=
for name in ${BUILDER:-podman docker}; do
    # One that is installed may have nobody to talk to.
    if command -v "$name" >/dev/null && "$name" info >/dev/null 2>&1; then
        builder=$name
        break
    fi
done
if [ -z "$builder" ]; then
    echo "skipped: ${BUILDER:-neither podman nor docker} works here, so no image was built" >&2
    exit 77
fi

"$builder" build -f deploy/Containerfile -t "$tag" .
"$builder" run --rm "$tag" --help >/dev/null
echo "built $tag with $builder, and its gateway starts"
