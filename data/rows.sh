#!/bin/sh
# The nine rows of PhysMaster's Table 1 and their controls, from the shipped VAE and backbone, for the training seeds given:
#     sh data/rows.sh 0 1 2                 # about 80 minutes a seed on two cores of an EPYC; then: python eval.py --table
# Rows of a seed share the base, Stage I and its pairs; all seeds share the clips. What is done is left alone, what was cut
# off goes on. LAUNCH="torchrun --nproc_per_node=2" spreads the preference stages over processes.
set -e
cd "$(dirname "$0")/.."

sft() {                                     # a run of Stage I: its name, then its flags
    name=rows/$seed/$1; shift
    [ -e "out/$name/dit.safetensors" ] || ${PYTHON:-python} sft.py --resume=True --name="$name" --seed="$seed" \
        --steps=800 --eval_every=800 --foretell=False "$@"
}
dpo() {                                     # a run of preferences: its name, the file that ends it, then its flags
    name=rows/$seed/$1; last=$2; shift 2
    [ -e "out/$name/$last.safetensors" ] || ${LAUNCH:-${PYTHON:-python}} dpo.py --resume=True --name="$name" \
        --seed="$seed" "$@"
}

for seed in "$@"; do
    rows=out/rows/$seed
    I="--data=$rows/row3 --pool=$rows/pairs3"
    sft base --phys=False --physics=False --pool=out/pool_base             # 1: things move, but do not fall
    sft row2 --phys=False --init_from=$rows/base/dit.safetensors           # 2: SFT of the DiT
    sft row3 --init_from=$rows/base/dit.safetensors                        # 3: SFT of DiT and encoder: Stage I
    dpo row4 lora2 --data=$rows/row2 --pool=$rows/pairs2 --stages=2        # 4: row 2, DPO of the DiT
    dpo row8 head3 $I                                                      # 5 and 8: Stages II and III
    dpo row6 head3 $I --stages=head                                        # 6: Stage I, DPO of the encoder
    dpo row7 head3 $I --stages=both                                        # 7: Stage I, DPO of both
    dpo row9 head3 $I --stages=2,both                                      # 9: Stage II, DPO of both
    # Controls, after Stage I. 360 steps on truth take as many passes through the DiT as Stage II with its pairs does:
    # 320 scenes x 4 candidates x 12 sampler steps, and 150 steps x 16 pairs x 2 clips x (2 forward, 2 backward)
    sft more --init_from=$rows/row3/dit.safetensors --steps=360 --eval_every=360 --lr=2e-3 --adam_lr=1e-3 --warmup=40
    dpo winners lora2 $I --stages=2 --beta=0                               # SFT on the winners alone
    T="--data=$rows/row3 --pool=$rows/pairs3t --stages=2 --truth=True"
    dpo best lora2 $T                                                      # DPO, the truth a candidate
    dpo truth lora2 $T --beta=0                                            # SFT of the LoRA on the truth
done
