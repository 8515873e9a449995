"The pages for users: every public name with its own signature, docstring and defining cell, and tables whose names exist."
import ast, importlib, inspect, re, sys
from pathlib import Path

import pytest
from project import NOTEBOOKS, ROOT, cells

sys.path.insert(0, str(ROOT / "book" / "_ext"))
import reference

MODULES = sorted(path for folder in ("mechinterp_lib", "mechinterp_lib/experiments") for path in (ROOT / folder).glob("[a-z]*.py"))
PROMISED = {
    "models": "load_model list_models save_model import_nanogpt import_llama2c",
    "activation_patching": "get_activations patch_activation ablate_component patch_layers patch_layer_scan patch_scan compute_patching_effect find_important_components path_patching find_circuit Scan",
    "attention_analysis": "extract_attention visualize_attention_head visualize_all_heads plot_attention_head plot_all_heads compute_attention_stats find_induction_heads categorize_attention_heads find_attention_patterns",
    "logit_lens": "logit_lens analyze plot_prediction_evolution visualize_evolution plot_evolution plot_probability_heatmap compare_positions measure_convergence compare_predictions sample_layers direct_logit_attribution fit_tuned_lens",
    "neuron_analysis": "get_neuron_activations find_max_activating_examples ablate_neuron visualize_neuron_activations compute_neuron_statistics find_feature_directions neuron_logit_effects",
    "circuits": "edge_attribution acdc evaluate_circuit draw_circuit find_circuit",
    "sae": "train_sae load_sae evaluate_sae feature_dashboard ablate_feature steer_with_feature"}
each_module = pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)


def entries(path: Path) -> dict[str, reference.Entry]:
    "The public names of a module, as its page shows them."
    return {entry.name: entry for entry in reference.public_entries(path.read_text(encoding="utf-8"))[1]}


def imported(path: Path):
    return importlib.import_module(path.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."))


@each_module
def test_every_public_name_is_there(path):
    found = entries(path)
    assert set(found) == set(imported(path).__all__)
    bare = [name for name, entry in found.items() if not entry.text and (entry.kind != "data" or path.parent.name != "experiments")]
    assert not bare, "a docstring, or the comment behind a constant, says what it is for"


@each_module
def test_signatures_are_the_functions_own(path):
    module = imported(path)
    for name, entry in entries(path).items():
        if entry.kind != "function": continue
        shown = ast.parse(f"def shown{entry.signature}: ...").body[0].args
        names = [each.arg for each in (*shown.posonlyargs, *shown.args, shown.vararg, *shown.kwonlyargs, shown.kwarg) if each]
        assert names == list(inspect.signature(getattr(module, name)).parameters), name


@each_module
def test_members_are_the_classes_own(path):
    for name, entry in entries(path).items():
        if entry.kind != "class": continue
        own = vars(getattr(imported(path), name))
        public = {key for key, value in own.items() if not key.startswith("_") and (callable(value) or isinstance(value, (property, classmethod, staticmethod)) or type(value).__name__ == "cached_property")}
        fields = {key for key, said in own.get("__annotations__", {}).items() if not str(said).startswith("ClassVar")}       # those declare methods that are attached later
        assert {member.name for member in entry.members} == public - fields, name


@each_module
def test_every_name_points_to_the_cell_that_defines_it(path):
    for name, entry in entries(path).items():
        notebook, cell = entry.cell
        source = next(c.source for c in cells(ROOT / "nbs" / notebook) if c.id == cell)
        assert source.startswith("#| export") and re.search(rf"(?:^|def |class |, ){name}\b", source, re.M), name


def test_cells_that_are_pointed_at_have_one_name():
    exported = [c.id for path in NOTEBOOKS for c in cells(path) if c.cell_type == "code" and c.source.startswith("#| export")]
    assert len(set(exported)) == len(exported)


@pytest.mark.parametrize("module", PROMISED)
def test_promised_names_are_there(module):
    assert set(PROMISED[module].split()) <= set(entries(ROOT / "mechinterp_lib" / f"{module}.py"))


def test_methods_that_come_later_are_there():
    scan = {member.name: member for member in entries(ROOT / "mechinterp_lib" / "activation_patching.py")["Scan"].members}
    assert scan["share"].kind == "property" and scan["plot"].signature.startswith("(interactive: bool") and scan["plot"].text


def test_shapes_are_shown():
    assert "Float[Tensor, '*batch query_pos key_pos']" in entries(ROOT / "mechinterp_lib" / "attention_analysis.py")["induction_scores"].signature


def test_a_name_without_a_definition_is_refused():
    with pytest.raises(ValueError, match="gone"): reference.public_entries('__all__ = ["gone"]')


def test_pages_are_written_again_only_if_they_change(tmp_path):
    (tmp_path / "mechinterp_lib").mkdir(), (tmp_path / "nbs").symlink_to(ROOT / "nbs")
    module = tmp_path / "mechinterp_lib" / "core.py"
    module.write_text((ROOT / "mechinterp_lib" / "core.py").read_text(encoding="utf-8"), encoding="utf-8")
    pages = {page.relative_to(tmp_path).as_posix(): page.stat().st_mtime_ns for page in reference.write_pages(tmp_path)}
    assert set(pages) == {"reference/core.md", "reference/index.md"}
    assert {page.relative_to(tmp_path).as_posix(): page.stat().st_mtime_ns for page in reference.write_pages(tmp_path)} == pages
    module.rename(module.with_name("kernel.py"))
    reference.write_pages(tmp_path)
    assert sorted(page.name for page in (tmp_path / "reference").iterdir()) == ["index.md", "kernel.md"]


# The tables of "Coming from ...": | there | here | what differs |

def table_rows(needle: str) -> list[list[str]]:
    "The rows below each table head that holds `needle`, as cells."
    text = "\n\n".join(c.source for c in cells(ROOT / "nbs" / "32_coming_from.ipynb") if c.cell_type == "markdown")
    tables = [block for block in re.findall(r"(?:^\|.*\|$\n?)+", text, re.M) if needle in block.splitlines()[0]]
    return [[cell.strip() for cell in line.strip("|").split("|")] for block in tables for line in block.splitlines()[2:]]


def called(cell: str) -> set[str]:
    "The names that a cell of a table calls, shows with a dot in front, or shows bare."
    codes = re.findall(r"`([^`]+)`", cell)
    return {name for code in codes for name in re.findall(r"(\w+)\(|^(?:model|scan|cache)\.(\w+)$|^([a-z0-9]+(?:_[a-z0-9]+)+)$", code) for name in name if name}


def test_names_of_this_library_are_there():
    from transformer_lens.model_bridge import TransformerBridge
    known = {name for path in MODULES for entry in reference.public_entries(path.read_text(encoding="utf-8"))[1] for name in (entry.name, *(member.name for member in entry.members))}
    rows = table_rows("Here")
    assert len(rows) > 35
    unknown = {name for row in rows for name in called(row[1])} - known - set(dir(TransformerBridge)) - {"get_act_name"}
    assert not unknown


def test_names_of_transformer_lens_are_there():
    import transformer_lens
    source = "\n".join(path.read_text(encoding="utf-8") for path in Path(transformer_lens.__file__).parent.rglob("*.py"))
    there = [row[0] for head in ("| There | Here | What differs, and why |", "| There, `patching.` |") for row in table_rows(head)]
    there = [cell for cell in there if not re.search(r"circuitsvis|ckpt|meta\.pkl|GPT\(|\.py|estimate_loss|SAE", cell)]
    names = {name for cell in there for code in re.findall(r"`([^`.]\S*?)[`(]", cell) for name in [code.rpartition(".")[2]] if name.isidentifier()}
    assert len(names) > 25 and not {name for name in names if not re.search(rf"\b{name}\b", source)}
