#!/bin/bash
# containers/enroot.sh FOLDER: makes FOLDER/miles-ARCHITECTURE.sqsh for pyxis. Run it on a node of the architecture that it is for, from this source tree.
set -euo pipefail
folder=${1:?which folder? containers/enroot.sh FOLDER}
image=$(realpath "$folder")/miles-$(uname -m).sqsh
[ ! -e "$image" ] || { echo "$image is there already; remove it first" >&2; exit 78; }
work=$(mktemp -d)
name=miles-build-$$
trap 'enroot remove -f "$name" 2>/dev/null || true; rm -rf "$work"' EXIT
enroot import -o "$work/cuda.sqsh" docker://nvidia/cuda:13.0.1-devel-ubuntu24.04
enroot create -n "$name" "$work/cuda.sqsh"
enroot start --root --rw -m "$PWD:/source" "$name" bash -c 'mkdir /opt/miles && tar -C /source --exclude=.venv --exclude=.git --exclude=runs -c . | tar -C /opt/miles -x && bash /opt/miles/containers/install.sh'
enroot export -o "$image" "$name"
echo "$image: set container_image of the group to it"
