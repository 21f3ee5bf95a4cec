import types

import pml_adversarial as pa


def test_all_that_a_user_calls_and_nothing_imported_by_the_way():
    public = {name for name in dir(pa.evaluation) if not name.startswith("_")}
    modules = {name for name in public if isinstance(getattr(pa.evaluation, name), types.ModuleType)}
    assert public - modules == set(pa.evaluation.__all__)
    assert all(getattr(pa.evaluation, name).__name__.startswith("pml_adversarial.evaluation.") for name in modules)


def test_names_of_functions_are_no_modules():
    for name in ("certify", "ers", "evaluate_robustness", "quick", "robrank_scores", "standard"):
        assert isinstance(getattr(pa.evaluation, name), types.FunctionType)


def test_suites_name_their_attacks():
    assert [attack.name for attack in pa.evaluation.quick()] == ["margin", "shift"]
    assert {attack.name for attack in pa.evaluation.standard()} > {"margin", "targeted", "apgd-ce", "square", "promote"}
