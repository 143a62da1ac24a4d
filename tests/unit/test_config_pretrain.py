from __future__ import annotations

from pathlib import Path

import pytest

from hpcft.config.pretrain import Architecture, Recipe, load_recipe
from hpcft.config.training import Weights
from hpcft.config.yaml_file import dump_yaml
from hpcft.errors import UserError

VALID = """\
name: small
elements: [Cu, Au]
reference: {calculator: ase.calculators.emt.EMT}
data:
  structures_per_crystal: 10
model:
  channels: 32
train:
  epochs: 5
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(VALID)
    return path


def test_a_recipe_loads_with_defaults(file: Path) -> None:
    recipe = load_recipe(file)
    assert recipe.data.crystals == ("fcc", "L1_0", "L1_2")
    assert (recipe.data.repeat, recipe.data.max_strain, recipe.data.rattle) == (2, 0.04, 0.05)
    assert recipe.model == Architecture()
    assert (recipe.train.ranks, recipe.train.weights) == (1, Weights())


def test_a_recipe_dumped_to_yaml_and_loaded_again_is_equal(file: Path) -> None:
    recipe = load_recipe(file)
    file.write_text(dump_yaml(recipe.model_dump(mode="json")))
    assert load_recipe(file) == recipe
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("channels: 32", "chanels: 32", "7: model.chanels: unknown key; did you mean 'channels'?"),
        ("channels: 32", "cutoff: -5", "7: model.cutoff: must be greater than 0 Å, but is -5"),
        ("channels: 32", "channels: 64", "6: model.hidden_irreps: 32x0e is not 64 channels; write 64x0e"),
        (
            "channels: 32",
            "hidden_irreps: 8x0e + 8x1o",
            "7: model.hidden_irreps: 8x0e + 8x1o is not 32 channels",
        ),
        ("channels: 32", "hidden_irreps: 32", "7: model.hidden_irreps: must be text, but is 32"),
        (
            "channels: 32",
            "hidden_irreps: big",
            "7: model.hidden_irreps: 'big' is not allowed: write multiplicities",
        ),
        (
            "epochs: 5",
            "epochs: 5\n  ranks: 8",
            "8: train.batch_size: a batch of 4 leaves some of the 8 ranks",
        ),
        ("epochs: 5", "batch_size: 5", "8: train.epochs: this key is missing"),
        ("epochs: 5", "epochs: 5\n  precision: float64", "10: train.precision: unknown key"),
        ("[Cu, Au]", "[Cu]", "4: data.crystals: Cu alone makes no L1_0 or L1_2; write [fcc] or [diamond]"),
        ("EMT}", "EMT, elements: [Cu]}", "2: elements: Au cannot be labelled: not in reference.elements"),
        ("crystal: 10", "crystal: 0", "5: data.structures_per_crystal: must be at least 1, but is 0"),
        (
            "crystal: 10",
            "crystal: 1\n  crystals: [bcc]",
            "6: data.crystals[0]: must be 'fcc', 'diamond', 'L1_0' or 'L1_2', but",
        ),
        ("crystal: 10", "crystal: 1\n  crystals: [fcc, fcc]", "6: data.crystals: lists a crystal twice"),
        ("crystal: 10", "crystal: 1\n  rattle: -0.1", "6: data.rattle: must be at least 0 Å, but is -0.1"),
        ("crystal: 10", "crystal: 1\n  crystals: []", "6: data.crystals: the list is empty"),
        ("crystal: 10", "crystal: 1\n  validation: 1", "6: data.validation: must be less than 1, but is 1"),
    ],
)
def test_a_bad_value_is_told_with_line_key_and_remedy(file: Path, old: str, new: str, problem: str) -> None:
    assert file.read_text().count(old) == 1
    file.write_text(file.read_text().replace(old, new))
    with pytest.raises(UserError) as caught:
        load_recipe(file)
    (found,) = str(caught.value).splitlines()
    assert found.startswith(f"{file}:{problem}")
