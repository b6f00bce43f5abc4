#!/bin/sh
# Everything from nothing on one GPU of 80 GB, in minutes: VAE, backbone and readout, Stage I, preference pairs, Stages
# II and III. The weights go into a folder, by default data/ itself:
#     sh data/gpu.sh
#     DATA=out/mine sh data/gpu.sh
# Last comes their control, in out/more_gpu: Stage I going on with truth for as many passes through the DiT as the pairs
# and Stage II take (2,560 scenes x 4 candidates x 12 sampler steps, and 200 steps x 256 pairs x 2 clips x (2 forward,
# 2 backward) are 694 steps of 256 clips x (1 forward, 2 backward)).
set -e
trap 'kill $encoder 2>/dev/null || :' EXIT         # if one fails, what runs beside it ends, too
cd "$(dirname "$0")/.."
python=${PYTHON:-python} data=${DATA:-data}
mkdir -p "$data"
$python encoder.py --preset=gpu --out="$data/backbone.safetensors" & encoder=$!
$python vae.py --preset=gpu --out="$data/vae.safetensors"
$python sft.py --preset=gpu --data="$data" --name=pool_gpu --phys=False --steps=0     # the pool, meanwhile
wait $encoder
$python sft.py --preset=gpu --data="$data"
cp out/gpu/dit.safetensors out/gpu/head1.safetensors "$data/"
$python dpo.py --preset=gpu --data="$data"
cp out/dpo_gpu/lora2.safetensors out/dpo_gpu/head3.safetensors "$data/"
$python sft.py --preset=gpu --data="$data" --name=more_gpu --init_from="$data/dit.safetensors" --steps=694 \
    --eval_every=694 --lr=2e-3 --adam_lr=1e-3
