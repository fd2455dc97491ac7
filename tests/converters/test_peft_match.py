"""Our copies of PEFT's naming rules against PEFT's own functions."""

from __future__ import annotations

import types

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rmmformat.converters.peft_match import TargetRule, covers_module, pattern_key

pytest.importorskip("peft")

from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

# Few and short words, so that prefixes, tails and dots often nearly match.
WORD = st.sampled_from(["q", "xq", "k", "layers", "h", "0", "1", "10", "lora", "q_proj"])
MODULE = st.lists(WORD, min_size=1, max_size=5).map(".".join)
PATTERN = st.one_of(
    MODULE,
    MODULE.map("^{}".format),
    MODULE.map(r".*\.{}".format),
    MODULE.map(lambda m: m.replace(".", r"\.")),
    st.sampled_from(
        [r"layers\.[01]\.q", r".*q", r"(q|k)", "layers..", r"\d+", "", "q|k", r".*\.\d\..*"]
    ),
)
MANY = settings(max_examples=400, deadline=None)


@MANY
@given(st.lists(PATTERN, max_size=4, unique=True), MODULE)
def test_pattern_key_is_pefts(patterns, module):
    theirs = get_pattern_key(patterns, module)
    assert (pattern_key(patterns, module) or module) == theirs


@MANY
@given(
    module=MODULE,
    targets=st.one_of(st.lists(MODULE, max_size=3), PATTERN),
    excluded=st.one_of(st.none(), st.lists(MODULE, max_size=2), MODULE),
    saved=st.one_of(st.none(), st.lists(WORD, max_size=2)),
    layers=st.one_of(st.none(), st.integers(0, 1), st.lists(st.integers(0, 10), max_size=2)),
    pattern=st.one_of(st.none(), WORD, st.lists(WORD, max_size=2)),
)
def test_target_rule_is_pefts(module, targets, excluded, saved, layers, pattern):
    config = {
        "target_modules": targets,
        "exclude_modules": excluded,
        "modules_to_save": saved,
        "layers_to_transform": layers,
        "layers_pattern": pattern,
    }
    full = types.SimpleNamespace(**config, target_parameters=None)
    try:
        theirs = bool(check_target_module_exists(full, module))
    except UnboundLocalError:  # PEFT's own, where a list of layer patterns is empty
        return
    assert TargetRule(config, [module]).allows(module) == theirs


@pytest.mark.parametrize("targets", [None, "all-linear"])
def test_what_depends_on_the_model_is_left_open(targets):
    assert TargetRule({"target_modules": targets}, ["q"]).allows("q") is None


def test_modules_to_save_match_without_a_dot_as_in_peft():
    torch = pytest.importorskip("torch")
    import peft

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.q = torch.nn.Linear(2, 2)
            self.pre_classifier = torch.nn.Linear(2, 2)
            self.classifier = torch.nn.Linear(2, 2)

    config = peft.LoraConfig(target_modules=["q"], modules_to_save=["classifier"])
    model = peft.get_peft_model(Model(), config).base_model.model
    for name in ("q", "pre_classifier", "classifier"):
        wrapped = type(model.get_submodule(name)).__name__ == "ModulesToSaveWrapper"
        assert covers_module(["classifier"], name) == wrapped
