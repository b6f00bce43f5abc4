"""
Write the example images data/*.png: first frames of test scenes that no model was trained on, each with its caption in
the PNG's "Description", which sample.py reads.

    python data/examples.py
"""
import os
import sys

from PIL import Image, PngImagePlugin

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))
import common
import simdata

SIZE = 256                                         # pixels: pictures are finer than the video and the encoder's view
SCENES = {"drop": ("drop", 2), "three": ("drop", 12), "collide": ("collide", 5), "roll": ("roll", 0),
          "tower": ("support", 0), "dominoes": ("dominoes", 1)}  # scenario and index in the test split, seed 100


def clip(scenario, index, **options):
    return simdata.make_batch(scenario, 1, 100, "test", start=index, truth=False, **options)


def main():
    if sys.argv[1:]:
        raise common.InputError(f"{sys.argv[1]}: this script has no flags, it writes data/*.png")
    for name, scene in SCENES.items():
        first = clip(*scene, frames=1, photo=SIZE)
        info = PngImagePlugin.PngInfo()
        info.add_text("Description", first["caption"][0])
        with common.atomic(f"{HERE}/{name}.png") as tmp:
            Image.fromarray(common.to_uint8(first["photo"][0][:, None])[0]).save(tmp, pnginfo=info)
        print(f"{name}.png: {first['caption'][0]}")


if __name__ == "__main__":
    common.run(main)
