#!/bin/sh
# What each part does to physics, one row a run, from the shipped VAE and backbone, for the training seeds given:
#     sh data/rows.sh table 0 1 2           # the nine rows of PhysMaster's Table 1 and their controls
#     sh data/rows.sh encoder 0             # what makes the encoder matter; DINO=FILE adds a real DINOv2 ViT-S/14
#     python eval.py --table --split=test   # how they all did
# Rows of a seed share the base, Stage I and its pairs; all seeds share the clips. What is done is left alone, what was
# cut off goes on. ONLY="base row3 row6" trains those rows alone, of which a later one needs the earlier ones. LAUNCH=
# "torchrun --nproc_per_node=2" spreads the preference stages over processes; on a few cores it is quicker to train two
# seeds beside each other, each with OMP_NUM_THREADS=1. GPU=1 runs Stage I as CUDA graphs.
set -e
cd "$(dirname "$0")/.."
python=${PYTHON:-python}

wanted() { case " ${ONLY:-$1} " in *" $1 "*) ;; *) return 1 ;; esac; }

sft() {                                     # a run of Stage I: its name, then its flags
    wanted "$1" || return 0
    name=rows/$seed/$1; shift
    [ -e "out/$name/dit.safetensors" ] || $python sft.py --resume=True --name="$name" --seed="$seed" \
        --steps=400 --eval_every=400 --warmup=50 --lr=1e-2 --adam_lr=4e-3 ${GPU:+--graphs=True} "$@"
}
dpo() {                                     # a run of preferences: its name, the file that ends it, then its flags
    wanted "$1" || return 0
    name=rows/$seed/$1; last=$2; shift 2
    [ -e "out/$name/$last.safetensors" ] || ${LAUNCH:-$python} dpo.py --resume=True --name="$name" --seed="$seed" \
        --pairs=320 --steps=150 --eval_every=50 --eval_clips=80 "$@"
}

table() {
    sft row3 --init_from=$rows/base/dit.safetensors                        # 3: SFT of DiT and encoder: Stage I
    # One pool of pairs for all rows after Stage I, which has those with the truth as well, for the controls that learn
    # from them; so it is made first, if any of these rows is wanted
    I="--data=$rows/row3 --pool=$rows/pairs3" T="--stages=2 --truth=True $one" pool=
    for row in row8 row6 winners best row7 row9 plain truth; do ! wanted $row || pool=made3; done
    [ -z "$pool" ] || [ -e $rows/row8/head3.safetensors ] || (ONLY=; dpo $pool none $I --truth=True --steps=0)
    dpo row8 head3 $I                                                      # 5 and 8: Stages II and III
    dpo row6 head3 $I --stages=head                                        # 6: Stage I, DPO of the encoder
    # Controls, after Stage I. 360 steps on truth take as many passes through the DiT as Stage II with its pairs does:
    # 320 scenes x 4 candidates x 12 sampler steps, and 150 steps x 16 pairs x 2 clips x (2 forward, 2 backward)
    sft more --init_from=$rows/row3/dit.safetensors $truth
    dpo winners lora2 $I --stages=2 $one --beta=0                          # SFT on the winners alone
    dpo best lora2 $I $T                                                   # DPO, the truth a candidate
    dpo row4 lora2 --data=$rows/row2 --pool=$rows/pairs2 --stages=2        # 4: row 2, DPO of the DiT
    sft row2_more --init_from=$rows/row2/dit.safetensors --phys=False $truth        # row 4's control
    [ "$seed" = 0 ] || return 0                                            # the rest is of less interest: one seed
    dpo row7 head3 $I --stages=both                                        # 7: Stage I, DPO of both
    dpo row9 head3 $I --stages=2,both                                      # 9: Stage II, DPO of both
    dpo plain lora2 $I --stages=2 $one --sft=0                             # the paper's pairs and its loss alone
    dpo truth lora2 $I $T --beta=0                                         # SFT of the LoRA on the truth
}

encoder() {
    from="--init_from=$rows/base/dit.safetensors" few="--clips=960 --pool=out/pool_few"
    # row 3's encoder foretells, where it can, what becomes of each body; PhysMaster's speaks of what is seen alone
    sft row3 $from
    sft paper $from --foretell=False
    dpo paper_dpo head3 --data=$rows/paper --pool=$rows/pairs_paper        # and its Stages II and III
    dpo paper_head head3 --data=$rows/paper --pool=$rows/pairs_paper --stages=head                # and its row 6
    sft paper_more --init_from=$rows/paper/dit.safetensors --foretell=False $truth               # and their control
    dpo paper_full head3 --data=$rows/paper --pool=$rows/pairs_paper_full $full                   # dpo.py's defaults
    sft paper_full_more --init_from=$rows/paper/dit.safetensors --foretell=False $truth --steps=1307 --eval_every=1307
    # and once more after that: preferences or truth where the truth has taught most of what it can
    dpo paper_late head3 --data=$rows/paper_full_more --pool=$rows/pairs_paper_late $full
    sft paper_late_more --init_from=$rows/paper_full_more/dit.safetensors --foretell=False $truth --steps=1307 \
        --eval_every=1307
    ! wanted random || [ -e out/random/vae.safetensors ] || {              # a backbone that was never trained
        $python encoder.py --name=random --scenes=6400 --steps=1 --lr=0 --adam_lr=0
        $python -c 'import shutil; shutil.copy("data/vae.safetensors", "out/random")'
    }
    sft random $from --foretell=False --data=out/random
    ! wanted depth || [ -e out/depth/vae.safetensors ] || {                # one that knows depth, as PhysMaster's does
        # as many FLOPs as encoder.py's default, not as the shipped backbone: 2 x 18 = 32 (1 + 1/8)
        $python encoder.py --name=depth --resume=True --depth_only=True --batch=18
        $python -c 'import shutil; shutil.copy("data/vae.safetensors", "out/depth")'
    }
    sft depth $from --foretell=False --data=out/depth
    sft depth_foretold $from --data=out/depth
    if [ -n "$DINO" ]; then
        ! wanted dino || [ -e out/dino/readout.safetensors ] || {
            $python data/fetch.py --model=nano --backbone="$DINO" --encoder=dinov2_vits14 --input_size=112 \
                --out=out/dino
            $python encoder.py --name=dino --scenes=6400 --backbone=out/dino/backbone.safetensors
        }
        sft dino $from --foretell=False --data=out/dino
        sft dino_foretold $from --data=out/dino
    fi
    sft few_plain $from $few --phys=False                                  # an eighth of the clips
    sft few_paper $from $few --foretell=False
    sft few_foretold $from $few
    sft tiny_base --model=tiny --phys=False --physics=False --pool=out/pool_base                    # a fifth of the DiT
    from="--init_from=$rows/tiny_base/dit.safetensors --model=tiny"
    sft tiny_plain $from --phys=False
    sft tiny_paper $from --foretell=False
    sft tiny_foretold $from
}

case "$1:$2" in
    table:[0-9]* | encoder:[0-9]*) what=$1; shift ;;
    *) echo "error: data/rows.sh $*: expected table or encoder and training seeds, for example table 0 1 2" >&2
       exit 2 ;;
esac
for seed in "$@"; do
    case "$seed" in *[!0-9]*)
        echo "error: data/rows.sh: $seed is no training seed; expected a number" >&2
        exit 2
    esac
done
for row in $ONLY; do                        # a name that is misspelt would train nothing, and say nothing
    grep -Eq "(sft|dpo|wanted) $row( |\$)" data/rows.sh || {
        echo "error: ONLY=$ONLY: data/rows.sh has no row $row" >&2
        exit 2
    }
done
truth="--steps=360 --eval_every=360 --lr=2e-3 --adam_lr=1e-3"              # going on with it, see table
full="--pairs=1280 --steps=500 --eval_every=125 --eval_clips=160"           # about four times the work
one="--best_only=True --mirror=False"                                       # best against worst, and no other pair
for seed in "$@"; do
    rows=out/rows/$seed
    sft base --phys=False --physics=False --pool=out/pool_base             # 1: things move, but do not fall
    sft row2 --phys=False --init_from=$rows/base/dit.safetensors           # 2: SFT of the DiT
    $what
done
