"""How the scripts read: what a learner would stumble over, as far as a machine can see it."""

import ast
import importlib
import os
import sys

import pytest

from conftest import ROOT
from sae import SAEConfig

SCRIPTS = ("model", "sae", "train_gpt", "train_sae", "analyze")
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
every_script = pytest.mark.parametrize("script", SCRIPTS)


def read(script):
    with open(os.path.join(ROOT, f"{script}.py"), encoding="utf-8") as file:
        return file.read()


def functions(tree):
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


@every_script
def test_lines_and_functions_are_short(script):
    source = read(script)
    assert max(map(len, source.splitlines())) <= 100
    for function in functions(ast.parse(source)):
        length = function.end_lineno - function.lineno
        style = f"{function.name} has {length} lines, more than one reads at once (this is about style alone)"
        assert length < 66 or function.name == "parse_args", style


@every_script
def test_no_comprehension_stands_in_another(script):
    for node in ast.walk(ast.parse(read(script))):
        if isinstance(node, COMPREHENSIONS):
            inside = [other for other in ast.walk(node) if isinstance(other, COMPREHENSIONS)]
            assert inside == [node] and len(node.generators) == 1, f"line {node.lineno}"


@every_script
def test_no_local_name_hides_a_function_or_class_of_the_module(script):
    tree = ast.parse(read(script))
    known = {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module in SCRIPTS:
            known |= {alias.asname or alias.name for alias in node.names}
    for function in functions(tree):
        arguments = function.args
        local = {argument.arg for argument in arguments.args + arguments.kwonlyargs}
        for node in ast.walk(function):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                local.add(node.id)
        assert not local & known, function.name


@every_script
def test_every_function_of_a_module_says_what_it_does(script):
    tree = ast.parse(read(script))
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name not in ("main", "parse_args"):
            assert ast.get_docstring(node), node.name


@pytest.mark.parametrize("script", SCRIPTS[2:])
def test_help_shows_the_defaults_that_there_are(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit):
        importlib.import_module(script).parse_args()
    shown = " ".join(capsys.readouterr().out.split())
    assert "same files (default: 1337)" in shown
    assert ("(default: 0.0)" in shown) == (script == "train_sae")  # --toy_offset: 0 is a value
    for nothing in ("", "None", "False", "[]"):
        assert f"(default: {nothing})" not in shown


def test_recipes_are_named_in_their_table_and_as_a_default_alone():
    found = []
    for script in SCRIPTS:
        tree = ast.parse(read(script))
        for node in ast.walk(tree):
            table = isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") in ("RECIPES", "COMMANDS")
            if table or (isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("save", "figure")):
                for inner in ast.walk(node):  # analyze.py's command "scaling" is another thing
                    if isinstance(inner, ast.Constant):
                        inner.value = None
        names = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
        found += [f"{script}: {name}" for name in names if name in ("scaling", "towards", "tied")]
    assert found == [f"sae: {SAEConfig.recipe}"]
