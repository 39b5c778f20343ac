from __future__ import annotations

import json
import shutil
import signal
import subprocess
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from loopfast.errors import CheckpointError
from loopfast.run import checkpoints
from loopfast.run.checkpoints import CheckpointStore
from tests.forks import run_python


def groups(value: float = 0.0) -> dict[str, dict[str, torch.Tensor]]:
    return {
        "policy": {
            "weight": torch.full((3, 4), value),
            "half": torch.full((5,), value, dtype=torch.bfloat16),
        },
        "optimizer": {"step": torch.tensor(7)},
    }


def never(message: str) -> None:
    pytest.fail(f"unexpected warning: {message}")


def names(store: CheckpointStore) -> list[str]:
    return [path.name for path in store.paths()]


def entries(store: CheckpointStore) -> list[str]:
    return sorted(path.name for path in store.directory.iterdir())


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints", keep=2, keep_best=True)


def test_round_trip_is_exact(store: CheckpointStore) -> None:
    table = torch.randn(4, 6)
    tensors = {
        "policy": {
            "bfloat16": torch.randn(9).bfloat16(),
            "float64": torch.tensor([torch.pi, float("nan"), float("inf")], dtype=torch.float64),
            "transposed": table.t(),
            "row": table[1],
            "same row": table[1],
            "bool": torch.tensor([True, False]),
            "empty": torch.zeros(0, 3),
            "scalar": torch.tensor(3, dtype=torch.int64),
        },
        "empty-group": {},
    }
    state = {"rng": [1, 2**63], "running": {"a red circle": 0.1 + 0.2}, "none": None}
    path = store.save(20, 3, tensors, state, score=0.5)
    loaded = store.load(path)
    assert (loaded.path, loaded.iteration, loaded.update) == (path, 20, 3)
    assert path.name == "iteration-000020-update-3"
    assert loaded.state == state
    assert loaded.tensors.keys() == tensors.keys()
    for group, named in tensors.items():
        assert loaded.tensors[group].keys() == named.keys()
        for name, tensor in named.items():
            torch.testing.assert_close(loaded.tensors[group][name], tensor, rtol=0, atol=0, equal_nan=True)


def test_keeps_the_newest_and_the_best(store: CheckpointStore) -> None:
    for iteration, score in [(10, 0.1), (20, 0.9), (30, None), (40, 0.2), (50, 0.3)]:
        store.save(iteration, 0, groups(), {}, score)
    assert names(store) == ["iteration-000020", "iteration-000040", "iteration-000050"]
    best = store.best()
    assert best is not None
    assert best.name == "iteration-000020"


def test_without_keep_best_only_the_newest_stay(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=1, keep_best=False)
    store.save(10, 0, groups(), {}, 0.9)
    store.save(20, 0, groups(), {}, float("nan"))
    assert names(store) == ["iteration-000020"]
    assert store.best() is None


def test_of_equal_scores_the_newest_is_best(store: CheckpointStore) -> None:
    store.save(10, 0, groups(), {}, 0.5)
    store.save(20, 0, groups(), {}, 0.5)
    best = store.best()
    assert best is not None
    assert best.name == "iteration-000020"


def test_saving_again_keeps_the_score(store: CheckpointStore) -> None:
    store.save(10, 0, groups(), {}, 0.5)
    store.save(20, 0, groups(), {}, 0.1)
    store.save(10, 0, groups(), {"interrupted": True}, None)
    best = store.best()
    assert best is not None
    assert store.load(best).state == {"interrupted": True}


def test_updates_within_an_iteration_come_after_its_beginning(store: CheckpointStore) -> None:
    store.save(9, 0, groups(), {}, None)
    store.save(10, 0, groups(), {}, None)
    store.save(10, 2, groups(), {"at": "update 2"}, None)
    assert names(store) == ["iteration-000010", "iteration-000010-update-2"]
    latest = store.latest(never)
    assert latest is not None
    assert latest.state == {"at": "update 2"}


def test_an_empty_store_has_nothing(store: CheckpointStore) -> None:
    assert store.latest(never) is None
    assert store.best() is None
    assert store.paths() == []
    with pytest.raises(CheckpointError, match=r"iteration-000001 does not exist"):
        store.load(store.directory / "iteration-000001")


def test_saving_again_replaces(store: CheckpointStore) -> None:
    store.save(10, 0, groups(1.0), {"try": 1}, None)
    path = store.save(10, 0, groups(2.0), {"try": 2}, None)
    assert entries(store) == ["iteration-000010"]
    assert store.load(path).state == {"try": 2}
    assert store.load(path).tensors["policy"]["weight"].eq(2.0).all()


def test_going_back_removes_the_future_it_left(store: CheckpointStore) -> None:
    for iteration in (10, 20, 30):
        store.save(iteration, 0, groups(), {}, float(iteration))
    store.save(25, 0, groups(), {}, None)
    assert names(store) == ["iteration-000020", "iteration-000025"]


@pytest.mark.parametrize("keep", [0, -1])
def test_keeping_none_is_refused(tmp_path: Path, keep: int) -> None:
    with pytest.raises(ValueError, match=f"keep must be at least 1, got {keep}"):
        CheckpointStore(tmp_path, keep=keep, keep_best=False)


@pytest.mark.parametrize("group", ["../policy", "a/b", "", ".hidden", "a.b"])
def test_a_group_cannot_leave_its_folder(store: CheckpointStore, group: str) -> None:
    with pytest.raises(ValueError, match="group's name"):
        store.save(1, 0, {group: {}}, {}, None)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("file", "damage", "fault"),
    [
        ("policy.safetensors", truncate, r"policy\.safetensors has \d+ bytes instead of \d+"),
        ("policy.safetensors", flip, r"policy\.safetensors is not what was written"),
        ("optimizer.safetensors", Path.unlink, r"optimizer\.safetensors is missing"),
        ("state.json", flip, r"state\.json is not what was written"),
        ("manifest.json", truncate, r"manifest\.json cannot be read"),
        ("manifest.json", Path.unlink, r"manifest\.json is missing"),
        ("manifest.json", lambda path: path.write_text("[]"), r"manifest\.json is not a manifest"),
        ("manifest.json", lambda path: path.write_text('{"format": 1}'), r"manifest\.json lacks entries"),
        (
            "manifest.json",
            lambda path: path.write_text('{"format": 9, "loopfast": "7.0"}'),
            r"has format 9 and was written by loopfast 7\.0",
        ),
    ],
)
def test_a_damaged_checkpoint_is_refused_by_name_and_the_one_before_used(
    store: CheckpointStore, file: str, damage, fault: str
) -> None:
    store.save(10, 0, groups(), {"good": True}, 0.1)
    damaged = store.save(20, 0, groups(), {}, 0.2)
    damage(damaged / file)
    with pytest.raises(CheckpointError, match=fault) as caught:
        store.load(damaged)
    assert str(damaged) in str(caught.value)
    warnings: list[str] = []
    latest = store.latest(warnings.append)
    assert latest is not None
    assert latest.state == {"good": True}
    assert len(warnings) == 1
    assert "iteration-000020" in warnings[0]
    assert "using the one before it" in warnings[0]


def test_a_file_that_cannot_be_read_is_named(store: CheckpointStore) -> None:
    path = store.save(10, 0, groups(), {}, None)
    (path / "policy.safetensors").unlink()
    (path / "policy.safetensors").mkdir()
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["policy.safetensors"]["bytes"] = (path / "policy.safetensors").stat().st_size
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"policy\.safetensors cannot be read: Is a directory"):
        store.load(path)


def test_a_manifest_cannot_name_files_elsewhere(store: CheckpointStore) -> None:
    path = store.save(10, 0, groups(), {}, None)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["../other.safetensors"] = {"bytes": 0, "sha256": ""}
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="lacks entries"):
        store.load(path)


def test_files_that_match_their_hashes_but_make_no_sense_are_refused(store: CheckpointStore) -> None:
    path = store.save(10, 0, groups(), {}, None)
    (path / "policy.safetensors").write_bytes(b"not safetensors")
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["policy.safetensors"] = {
        "bytes": 15,
        "sha256": checkpoints._sha256(path / "policy.safetensors"),
    }
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="cannot be read"):
        store.load(path)


def test_all_damaged_means_none(store: CheckpointStore) -> None:
    truncate(store.save(10, 0, groups(), {}, 0.5) / "manifest.json")
    warnings: list[str] = []
    assert store.latest(warnings.append) is None
    assert store.best() is None
    assert len(warnings) == 1


def test_a_damaged_checkpoint_does_not_push_out_a_good_one(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=1, keep_best=False)
    for iteration in (10, 20):
        path = store.save(iteration, 0, groups(), {}, None)
        shutil.copytree(path, tmp_path / f"copy-{iteration}")
    shutil.copytree(tmp_path / "copy-10", tmp_path / "iteration-000010")
    truncate(tmp_path / "iteration-000020" / "state.json")
    store.save(15, 0, groups(), {}, None)  # resumed from 10, because 20 is damaged
    assert names(store) == ["iteration-000015"]


def test_what_a_killed_save_left_is_cleared(store: CheckpointStore) -> None:
    good = store.save(10, 0, groups(), {}, None)
    shutil.copytree(good, store.directory / ".tmp-iteration-000020")
    assert store.latest(never) is not None
    # whoever only reads leaves alone what may be a save of the run that goes on
    assert (store.directory / ".tmp-iteration-000020").is_dir()
    store.recover()
    assert entries(store) == ["iteration-000010"]


@pytest.mark.parametrize("new_in_place", [False, True])
def test_a_kill_while_replacing_loses_nothing(store: CheckpointStore, new_in_place: bool) -> None:
    good = store.save(10, 0, groups(), {}, None)
    replaced = store.directory / ".old-iteration-000010"
    if new_in_place:
        shutil.copytree(good, replaced)
    else:
        good.rename(replaced)
    store.recover()
    latest = store.latest(never)
    assert latest is not None
    assert latest.path == good
    assert entries(store) == ["iteration-000010"]


@pytest.mark.parametrize("where", ["save_file", "_sync", "rename"])
def test_a_full_disk_leaves_the_last_checkpoint_intact(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    store.save(10, 0, groups(), {"good": True}, None)

    def full(*_: object) -> None:
        if where == "save_file":
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(*((Path, "rename") if where == "rename" else (checkpoints, where)), full)
        with pytest.raises(CheckpointError) as caught:
            store.save(20, 0, groups(), {}, None)
    message = str(caught.value)
    assert "cannot save checkpoint iteration-000020" in message
    assert "No space left on device" in message
    assert "iteration-000010, is intact" in message
    assert entries(store) == ["iteration-000010"]
    latest = store.latest(never)
    assert latest is not None
    assert latest.state == {"good": True}


def test_a_state_json_cannot_hold_leaves_nothing_behind(store: CheckpointStore) -> None:
    with pytest.raises(TypeError, match="not JSON serializable"):
        store.save(10, 0, groups(), {"object": object()}, None)
    assert entries(store) == []


def in_a_process(store: CheckpointStore, code: str) -> subprocess.CompletedProcess[str]:
    program = f"""
        import os, resource, signal, torch
        from pathlib import Path
        from loopfast.run import checkpoints
        from loopfast.errors import CheckpointError
        store = checkpoints.CheckpointStore(Path({str(store.directory)!r}), keep=2, keep_best=True)
        {textwrap.indent(textwrap.dedent(code), " " * 8).strip()}
    """
    return run_python(textwrap.dedent(program))


def test_a_write_past_the_limit_of_the_file_system_is_reported(store: CheckpointStore) -> None:
    store.save(10, 0, groups(), {"good": True}, None)
    done = in_a_process(
        store,
        """
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            store.save(20, 0, {"policy": {"weight": torch.zeros(1_000_000)}}, {}, None)
        except CheckpointError as error:
            print(error)
        """,
    )
    assert done.returncode == 0, done.stderr
    assert "cannot save checkpoint iteration-000020" in done.stdout
    assert "File too large" in done.stdout
    assert entries(store) == ["iteration-000010"]
    assert store.latest(never) is not None


def test_kill_9_in_the_middle_of_a_save(store: CheckpointStore) -> None:
    store.save(10, 0, groups(), {"good": True}, None)
    done = in_a_process(
        store,
        """
        write = checkpoints.save_file
        def save_file(tensors, path):
            write(tensors, path)
            if path.name.startswith("policy"):
                os.kill(os.getpid(), signal.SIGKILL)
        checkpoints.save_file = save_file
        store.save(20, 0, {"optimizer": {}, "policy": {"weight": torch.zeros(10)}}, {}, None)
        """,
    )
    assert done.returncode == -signal.SIGKILL
    assert ".tmp-iteration-000020" in entries(store)
    store.recover()
    latest = store.latest(never)
    assert latest is not None
    assert latest.state == {"good": True}
    assert entries(store) == ["iteration-000010"]
