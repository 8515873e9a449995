"""Write a page about every feature of the shipped autoencoders, read off text that the model of Shakespeare wrote itself.

    python book/_ext/features.py        about two minutes for each autoencoder on two cores; written to book/pages/features/
"""
from pathlib import Path

from mechinterp_lib.core import home, load_table, sha256, write_json
from mechinterp_lib.experiments.sae_features import BY_HAND, EXPERIMENT, SHIPPED, Dictionary, reader
from mechinterp_lib.models import written_by
from mechinterp_lib.sae import feature_dashboard, load_sae


def descriptions(one: Dictionary) -> dict[int, str]:
    "What is said of its features: the listed descriptions that fit, and those by hand."
    table = load_table(EXPERIMENT, "described")
    own = table[(table.set == ("trained" if one.trained else "untrained")) & (table.layer == one.layer) & (table.seed == one.seed) & table.fits]
    by_hand = {feature: words for (layer, feature), (words, _) in BY_HAND.items() if (one.trained, one.seed, one.layer) == (True, 0, layer)}
    return dict(zip(own.feature, own.described)) | by_hand


def write_pages(one: Dictionary) -> Path:
    "The pages of one autoencoder, and of which weights they are."
    name, model = one.folder.relative_to(home() / "models").as_posix(), reader(one.trained)
    folder = home() / "book" / "pages" / "features" / name
    page = feature_dashboard(load_sae(one.folder, model=model), model, written_by(reader(), 400, 128), folder, k=8, before=32, after=8, ablate=1, descriptions=descriptions(one), title=f"{name}: features on text that the model wrote")
    write_json(folder / "made_from.json", {"weights": sha256(one.folder / "sae_weights.safetensors")})
    return page


if __name__ == "__main__":
    for one in SHIPPED: print(write_pages(one))
