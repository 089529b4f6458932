"""Draw the picture of the method: `python recipes/method_figure.py --output method.png`."""

import argparse

from smt_hf.publishing.method_figure import plot_method


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", default="model_cards/method.png", help="PNG file to write")
    parser.add_argument("--overwrite", action="store_true", help="replace the file if it exists")
    arguments = parser.parse_args()
    print(f"written: {plot_method(arguments.output, arguments.overwrite)}")


if __name__ == "__main__":
    main()
