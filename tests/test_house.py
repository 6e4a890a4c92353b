"""The house: who imports whom, how long the files are, and that the README names what exists."""

import ast
import importlib
import re
import sys
from dataclasses import fields
from pathlib import Path

import pytest

import train

ROOT = Path(__file__).parents[1]
SEVEN = ["vq", "qpm", "losses", "model", "data", "evaluate", "train"]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def tree(name: str) -> ast.Module:
    return ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8"))


def imported(nodes) -> set[str]:
    """The first part of the names of what these statements import."""
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("name", ["vq", "qpm", "losses", "data"])
def test_the_ground_imports_none_of_the_others(name):
    assert imported(ast.walk(tree(name))) & set(SEVEN) == set()


@pytest.mark.parametrize("name", SEVEN)
def test_a_module_needs_four_packages_at_most_and_extras_only_where_asked_for(name):
    allowed = {"torch", "numpy", "nibabel", "matplotlib", *SEVEN, *sys.stdlib_module_names}
    assert imported(tree(name).body) <= allowed
    assert imported(ast.walk(tree(name))) <= allowed | {"extras"}


def test_the_seven_have_1450_lines_at_most_and_none_over_300():
    lines = [len((ROOT / f"{name}.py").read_text().splitlines()) for name in SEVEN]
    assert max(lines) <= 300 and sum(lines) <= 1450


def test_there_are_at_most_28_flags():
    assert len(fields(train.Settings)) <= 28


@pytest.mark.parametrize("name", SEVEN)
def test_a_function_fits_on_two_screens(name):
    functions = [n for n in ast.walk(tree(name)) if isinstance(n, ast.FunctionDef)]
    assert max(f.end_lineno - f.lineno + 1 for f in functions) <= 70


def test_the_method_fits_on_one_screen():
    functions = [n for n in tree("train").body if isinstance(n, ast.FunctionDef)]
    loss = next(f for f in functions if f.name == "vqseg_loss")
    assert loss.end_lineno - loss.lineno + 1 <= 45


def test_the_readme_has_170_lines_at_most():
    assert len(README.splitlines()) <= 170


@pytest.mark.parametrize("module, name", re.findall(rf"`({'|'.join(SEVEN)})\.(?!py)(\w+)`", README))
def test_functions_that_the_readme_names_exist(module, name):
    assert hasattr(importlib.import_module(module), name)


@pytest.mark.parametrize("path, name", re.findall(r"`([\w/]*tests/\w+\.py)::(\w+)`", README))
def test_tests_that_the_readme_names_exist(path, name):
    if not (ROOT / path.split("/")[0]).exists():
        pytest.skip("the folder extras is not here")
    assert f"def {name}(" in (ROOT / path).read_text(encoding="utf-8")


def test_requirements_are_five_packages():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    names = [re.match(r"[\w.-]*", line)[0] for line in lines]
    assert sorted(names) == ["matplotlib", "nibabel", "numpy", "pytest", "torch"]
