#!/bin/bash
# Inside the image, as root: what both definitions install. /opt/miles is this source tree. The same for x86_64 and aarch64.
set -euo pipefail
export DEBIAN_FRONTEND=noninteractive PIP_NO_CACHE_DIR=1 PIP_BREAK_SYSTEM_PACKAGES=1
apt-get update
apt-get install -y --no-install-recommends python3 python3-dev python3-pip build-essential libnuma1 libibverbs1 librdmacm1 ibverbs-providers ca-certificates
# TORCH_INDEX: address of an index with builds for CUDA 13, where the default one has others.
python3 -m pip install ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch==2.11.0
python3 -m pip install '/opt/miles[train,sglang]'
python3 -c 'import miles, sglang, torch; print("torch", torch.__version__, "CUDA", torch.version.cuda)'
apt-get clean
rm -rf /var/lib/apt/lists/*
