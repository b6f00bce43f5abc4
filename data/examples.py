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
SCENES = {"drop": 5, "box": 43, "hit": 28, "pair": 44, "three": 12, "clay": 16}      # index in the test split, seed 100

for name, index in SCENES.items():
    clip = simdata.make_batch("drop", 1, 100, "test", frames=1, start=index, truth=False, photo=SIZE)
    info = PngImagePlugin.PngInfo()
    info.add_text("Description", clip["caption"][0])
    with common.atomic(f"{HERE}/{name}.png") as tmp:
        Image.fromarray(common.to_uint8(clip["photo"][0][:, None])[0]).save(tmp, pnginfo=info)
    print(f"{name}.png: {clip['caption'][0]}")
