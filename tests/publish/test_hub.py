"""Upload of a checkpoint to a stand-in of the hub."""

import hashlib

import hf_xet
import hub_stand_in
import huggingface_hub.constants
import pytest
import tiny_checkpoint

from checkpoints_tools.publish import command, hub
from grinqh_jax.errors import UsageError

# huggingface_hub 2.4 passes the content of a large file to its HTTP library in a deprecated way.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", hub_stand_in.TOKEN)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    with hub_stand_in.serving(hub_stand_in.Hub()) as served:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", served.address)
        yield served


@pytest.fixture
def checkpoint(tmp_path):
    return tiny_checkpoint.write(tmp_path / "model")


def test_every_file_of_a_checkpoint_arrives(stand_in, checkpoint, capsys):
    flags = ["--model", str(checkpoint), "--push-to-hub", "tester/tiny-grinqh"]
    assert command.main(flags) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"{stand_in.address}/tester/tiny-grinqh"
    files = {
        path.relative_to(checkpoint).as_posix(): path.read_bytes()
        for path in checkpoint.rglob("*")
        if path.is_file()
    }
    assert stand_in.repos == {"tester/tiny-grinqh": files}
    assert {"README.md", "manifest.json", "config.json"} <= files.keys()
    assert stand_in.blobs, "no large file was uploaded"
    assert command.main(flags) == 0  # again, into the same repository


def test_large_files_arrive_through_xet(checkpoint, tmp_path, monkeypatch):
    store = tmp_path / "xet"
    monkeypatch.setenv("HF_TOKEN", hub_stand_in.TOKEN)
    monkeypatch.setenv("HF_XET_CACHE", str(tmp_path / "cache"))
    with hub_stand_in.serving(hub_stand_in.Hub(store)) as served:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", served.address)
        flags = ["--model", str(checkpoint), "--push-to-hub", "tester/tiny-grinqh"]
        assert command.main(flags) == 0
    large = [path for path in (checkpoint / "state").rglob("*") if path.is_file()]
    contents = {path.relative_to(checkpoint).as_posix(): path.read_bytes() for path in large}
    pointers = {name: (hashlib.sha256(data).hexdigest(), len(data)) for name, data in contents.items()}
    assert served.pointers == pointers
    assert "config.json" in served.repos["tester/tiny-grinqh"]
    # The Xet client reads them back from its store.
    uploaded = [one for one in hf_xet.hash_files([str(path) for path in large]) if one.file_size]
    assert len(uploaded) == len([data for data in contents.values() if data]) > 0
    with hf_xet.XetSession().new_file_download_group(endpoint=f"local://{store}") as group:
        for i, one in enumerate(uploaded):
            group.start_download_file(hf_xet.XetFileInfo(one.hash, one.file_size), str(tmp_path / f"{i}"))
    read = sorted((tmp_path / f"{i}").read_bytes() for i in range(len(uploaded)))
    assert read == sorted(data for data in contents.values() if data)


@pytest.mark.parametrize("repo", ["no-owner", "two/slashes/here", "bad owner/name", "a/--b"])
def test_bad_names_are_refused_before_any_work(repo, stand_in):
    with pytest.raises(UsageError, match=f"--push-to-hub {repo}: "):
        hub.check(repo)


def test_a_wrong_token_is_refused_before_any_work(stand_in, monkeypatch):
    hub.check("tester/name")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(UsageError, match="log in with `hf auth login`"):
        hub.check("tester/name")


def test_a_refused_upload_is_one_line_that_says_how_to_try_again(stand_in, checkpoint, capsys):
    stand_in.refuse_commits = True
    assert command.main(["--model", str(checkpoint), "--push-to-hub", "tester/tiny"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --push-to-hub tester/tiny: ")
    assert error.count("\n") == 1
    assert "grinqh-jax publish --model" in error


def test_an_unreachable_hub_is_one_line(checkpoint, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", hub_stand_in.TOKEN)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert command.main(["--model", str(checkpoint), "--push-to-hub", "tester/tiny"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
