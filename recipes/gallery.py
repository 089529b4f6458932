"""Write one HTML page of model cards and figures: `python recipes/gallery.py --output gallery.html`."""

import argparse

from smt_hf.publishing.gallery import render_gallery


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model_cards", default="model_cards", help="folder of model cards")
    parser.add_argument("--output", default="gallery.html", help="file to write")
    arguments = parser.parse_args()
    print(f"written: {render_gallery(arguments.model_cards, arguments.output)}")


if __name__ == "__main__":
    main()
