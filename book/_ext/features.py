"""Write a page about every feature of the shipped autoencoders, read off text that the model of Shakespeare wrote itself.

    python book/_ext/features.py        about a minute and a half for each autoencoder on two cores; written to book/pages/features/
"""
from pathlib import Path

from mechinterp_lib.core import home, sha256, write_json, write_text
from mechinterp_lib.experiments.sae_features import SHIPPED, Dictionary, reader, shown_descriptions
from mechinterp_lib.models import written_by
from mechinterp_lib.sae import feature_dashboard, load_sae

HOME = "../../../../nbs/24_sae_features.html"                             # the chapter, from a page of the built book


def write_pages(one: Dictionary) -> Path:
    "The pages of one autoencoder, and of which weights they are."
    name, model = one.folder.relative_to(home() / "models").as_posix(), reader(one.trained)
    folder = home() / "book" / "pages" / "features" / name
    page = feature_dashboard(load_sae(one.folder, model=model), model, written_by(reader(), 400, 128), folder, k=8, before=32, after=8, ablate=1, descriptions=shown_descriptions(one), title=f"{name}: features on text that the model wrote")
    write_text(page, page.read_text(encoding="utf-8").replace("</h1>", f'</h1><p><a href="{HOME}">What sparse features find</a></p>', 1))
    write_json(folder / "made_from.json", {"weights": sha256(one.folder / "sae_weights.safetensors")})
    return page


if __name__ == "__main__":
    for one in SHIPPED: print(write_pages(one))
