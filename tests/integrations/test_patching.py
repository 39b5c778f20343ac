from __future__ import annotations

import sys
from types import ModuleType

import pytest

from loopfast.errors import LoopfastError
from loopfast.integrations.patching import Patch, find_original, import_target


@pytest.fixture
def modules(monkeypatch) -> tuple[ModuleType, ModuleType]:
    """A module that defines ``step`` and another that has imported it under a name of its own."""

    def step(x):
        return x

    definer, user = ModuleType("definer"), ModuleType("user")
    definer.step = user.their_step = step
    for module in (definer, user):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return definer, user


def make(definer: ModuleType, result: str) -> Patch:
    return Patch([(find_original("patch()", definer, "step", "x"), lambda x: result, None)])


def test_replaces_every_name_and_restores_it(modules):
    definer, user = modules
    original = [definer.step]
    patch = make(definer, "patched")
    assert definer.step(1) == user.their_step(1) == "patched"
    patch.undo()
    assert definer.step is user.their_step is original[0]
    patch.undo()
    assert definer.step is original[0]


def test_is_a_context_manager_and_restores_after_an_exception(modules):
    definer, user = modules
    original = [definer.step]

    def fail() -> None:
        with make(definer, "patched") as patch:
            assert isinstance(patch, Patch)
            assert definer.step(1) == "patched"
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert definer.step is user.their_step is original[0]


def test_a_name_bound_while_the_patch_holds_is_restored(modules, monkeypatch):
    definer, _ = modules
    original = [definer.step]
    late = ModuleType("late")
    monkeypatch.setitem(sys.modules, "late", late)
    with make(definer, "patched"):
        late.step = definer.step
    assert late.step is original[0]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (1, 2, 0)])
def test_patches_nest_and_are_undone_in_any_order(modules, order):
    definer, user = modules
    original = [definer.step]
    patches = [make(definer, f"patch {index}") for index in range(3)]
    left = {0, 1, 2}
    for index in order:
        assert definer.step(1) == user.their_step(1) == f"patch {max(left)}"
        patches[index].undo()
        left.remove(index)
    assert definer.step is user.their_step is original[0]


def test_replaces_a_method(modules):
    class Trainer:
        def loss(self, x):
            return x

    class Own(Trainer):
        def loss(self, x):
            return super().loss(x)

    original = Trainer.loss
    with Patch([(original, lambda self, x: "patched", Trainer)]):
        assert Trainer().loss(1) == Own().loss(1) == "patched"
    assert Trainer.loss is original


def test_leaves_alone_what_another_patched_after_it(modules):
    definer, user = modules
    original = [user.their_step]
    patch = make(definer, "patched")

    def other(x):
        return "other"

    definer.step = other
    patch.undo()
    assert definer.step is other
    assert user.their_step is original[0]


def test_errors_say_what_is_wrong(modules):
    definer, _ = modules
    with pytest.raises(
        LoopfastError, match=r"patch\(\) needs Nothing: cannot import nowhere \(No module named"
    ):
        import_target("patch()", "nowhere", "Nothing")
    with pytest.raises(LoopfastError, match=r"version of definer\.leap: it is not there"):
        find_original("patch()", definer, "leap", "x")
    with pytest.raises(LoopfastError, match=r"version of definer\.step: it takes \(x\), known is \(x, y\)"):
        find_original("patch()", definer, "step", "x y")
