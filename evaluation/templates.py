"""Sentences of a class for zero-shot classification. "{}" stands for the class name.

    python -m evaluation.templates        prints the 80 for photographs
"""
import os

from runtime.errors import DataError

OF_PHOTOS = ("bad", "low resolution", "cropped", "bright", "dark", "close-up", "black and white",
             "pixelated", "jpeg corrupted", "blurry", "good")
OF_THINGS = ("hard to see", "clean", "dirty", "cool", "nice", "weird", "large", "small")
WORKS = ("sculpture", "rendering", "drawing", "painting", "doodle", "sketch", "rendition", "tattoo")
MATERIALS = ("embroidered", "plastic", "origami", "toy", "cartoon", "plushie")


def photo_templates() -> list[str]:
    """The 80 that CLIP (arXiv:2103.00020) averages for ImageNet."""
    templates = ["itap of my {}."]
    templates += [f"a photo of {word} {{}}." for word in ("a", "the", "my", "many", "one")]
    for article in ("a", "the"):
        templates += [f"a {word} photo of {article} {{}}." for word in OF_PHOTOS]
        templates += [f"a photo of {article} {word} {{}}." for word in OF_THINGS]
        templates += [f"a {work} of {article} {{}}." for work in WORKS]
        templates += [f"{work} of {article} {{}}." for work in ("graffiti", "art", "itap")]
        templates += [f"{article} {material} {{}}." for material in MATERIALS]
        templates.append(f"{article} {{}} in a video game.")
    return templates


def read_templates(text: str) -> list[str]:
    """The sentence itself, those of a file with one per line, or "photo" for CLIP's 80. DataError
    if there is none, or one has no {}."""
    if text == "photo":
        return photo_templates()
    templates = [text]
    if os.path.isfile(text):
        with open(text, encoding="utf-8-sig", errors="replace") as file:
            templates = [line.strip() for line in file if line.strip()]
        if not templates:
            raise DataError(f"--template {text} is empty: give one sentence per line")
    without = [template for template in templates if "{}" not in template]
    if without:
        raise DataError(f"--template: {without[0]!r} has no {{}} where the name goes, and is no "
                        "file of such sentences")
    return templates


if __name__ == "__main__":
    print("\n".join(photo_templates()))
