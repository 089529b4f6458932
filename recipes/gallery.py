"""Write one HTML page of model cards and figures: `python recipes/gallery.py --output gallery.html`."""

import sys

from smt_hf.command_line import parse
from smt_hf.publishing.gallery import GalleryArguments, render_gallery
from smt_hf.recipe import run_to_end


def main() -> None:
    usage = "usage: python recipes/gallery.py [--model_cards DIR] [--output FILE.html]"
    print(f"written: {render_gallery(**vars(parse(GalleryArguments, sys.argv[1:], usage)))}")


if __name__ == "__main__":
    run_to_end(main)
