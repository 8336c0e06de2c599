"""The writer: a checkpoint is complete or absent, a killed conversion resumes, two conversions never mix."""

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_checkpoint import HF_CONFIG, QUANTIZATION, assert_same, random_tree, write

from grinqh_jax.checkpoint import Writer, load
from grinqh_jax.companions import find_companions
from grinqh_jax.errors import CheckpointError

TESTS = Path(__file__).parents[1]
WRITERS = """
import json, os, sys
import tiny_checkpoint

for line in sys.stdin:
    script, arguments, output = json.loads(line)
    if not (child := os.fork()):
        descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.argv = ["writer", *arguments]
        exec(script, {})
        sys.stdout.flush()
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
"""Runs each script in a fork, because the imports take longer than the scripts."""

KILLED_WRITER = """
import os, signal, sys
from pathlib import Path
from tiny_checkpoint import write

left = int(sys.argv[2])
count = 0
EVENTS = {"os.mkdir", "os.rename", "os.link", "os.remove", "os.rmdir", "shutil.copyfile", "shutil.rmtree"}


def watch(event, args):
    global count
    if event in EVENTS or (event == "open" and isinstance(args[2], int) and args[2] & os.O_CREAT):
        count += 1
        if count == left:
            os.kill(os.getpid(), signal.SIGKILL)


sys.addaudithook(watch)
write(Path(sys.argv[1]))
print(count)
"""
"""Writes the tiny checkpoint and kills itself at its n-th change of the file system."""


@pytest.fixture(scope="module")
def run_writer(tmp_path_factory):
    """A function that runs a script in a process; it returns the exit code and what the script printed."""
    paths = os.pathsep.join([str(TESTS / "helpers"), str(TESTS.parent)])
    output = tmp_path_factory.mktemp("writers") / "output"
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", WRITERS],  # JAX warns of forks
        env=os.environ | {"PYTHONPATH": paths, "JAX_PLATFORMS": "cpu"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:

        def run(script: str, *arguments: str) -> tuple[int, str]:
            process.stdin.write(json.dumps([script, arguments, str(output)]) + "\n")
            process.stdin.flush()
            return int(process.stdout.readline()), output.read_text()

        yield run
        process.stdin.close()
    assert process.returncode == 0


def test_killed_writers_leave_nothing_that_loads_and_the_next_one_resumes(run_writer, tmp_path):
    code, printed = run_writer(KILLED_WRITER, str(tmp_path / "whole"), "0")
    assert code == 0, printed
    operations = int(printed)
    path = tmp_path / "killed"
    # Each writer resumes after the one before it. They are killed while parts are written, while parts are
    # merged, and while the checkpoint is moved into place.
    for share in (0.15, 0.45, 0.3, 0.5, 0.6):
        code, printed = run_writer(KILLED_WRITER, str(path), str(int(share * operations)))
        assert code == -signal.SIGKILL, printed
        assert not path.exists()
        with pytest.raises(CheckpointError, match="unfinished"):
            load(path)
        with pytest.raises(CheckpointError, match="unfinished"):
            load(path.with_name("killed.partial"))
    with Writer(path, fingerprint="tiny") as writer:
        assert writer.parts, "the killed writers got no part done: kill them later"
    assert_same(load(write(path)).model, random_tree())
    assert sorted(entry.name for entry in path.parent.iterdir() if entry.is_dir()) == ["killed", "whole"]


def test_a_subtree_is_read_back_as_its_parts_were_written(tmp_path):
    tree = random_tree()
    with Writer(tmp_path / "out", fingerprint="tiny") as writer:
        writer.save_part("embed", {"embed": tree["embed"]})
        for _ in range(2):
            np.testing.assert_array_equal(writer.read("embed")["embedding"], tree["embed"]["embedding"])
        writer.save_part("norm", {"norm": tree["norm"]})
        with pytest.raises(CheckpointError, match=r"layers\.0 has not been written"):
            writer.read("layers.0")
    with Writer(tmp_path / "out", fingerprint="tiny") as writer:  # another process, a later part
        read = writer.read("norm")
        assert list(read) == ["scale"]
        assert read["scale"].dtype == tree["norm"]["scale"].dtype
        np.testing.assert_array_equal(read["scale"], tree["norm"]["scale"])
        for norm in ("input_norm", "post_norm"):
            writer.save_part(f"layers.0.{norm}", {"layers": {"0": {norm: tree["layers"]["0"][norm]}}})
        read = writer.read("layers.0")
        assert list(read) == ["input_norm", "post_norm"]
        for norm, leaves in read.items():
            np.testing.assert_array_equal(leaves["scale"], tree["layers"]["0"][norm]["scale"])


def test_complete_parts_are_not_written_again(tmp_path):
    tree = random_tree()
    with Writer(tmp_path / "out", fingerprint="tiny") as writer:
        writer.save_part("embed", {"embed": tree["embed"]})
    with Writer(tmp_path / "out", fingerprint="tiny") as writer:
        assert writer.parts == {"embed"}
        with pytest.raises(CheckpointError, match="part embed has been written already"):
            writer.save_part("embed", {"embed": tree["embed"]})
        with pytest.raises(CheckpointError, match=r"embed\.embedding has been written already"):
            writer.save_part("again", {"embed": tree["embed"]})
        assert writer.parts == {"embed"}


def test_a_partial_directory_of_another_conversion_is_deleted_only_when_asked(tmp_path):
    with Writer(tmp_path / "out", fingerprint="one") as writer:
        writer.save_part("embed", {"embed": random_tree()["embed"]})
    with pytest.raises(CheckpointError, match=r"another model or with other options; .*--force"):
        Writer(tmp_path / "out", fingerprint="two")
    with Writer(tmp_path / "out", fingerprint="two", overwrite=True) as writer:
        assert writer.parts == frozenset()


def test_only_one_process_writes(tmp_path):
    with (
        Writer(tmp_path / "out", fingerprint="tiny"),
        pytest.raises(CheckpointError, match="being written by another process"),
    ):
        Writer(tmp_path / "out", fingerprint="tiny")
    Writer(tmp_path / "out", fingerprint="tiny").close()


def test_the_end_of_a_writer_leaves_the_next_one_alone(tmp_path, monkeypatch):
    """The next one starts as soon as the lock is free."""
    entered, rmtree = [], shutil.rmtree

    def remove(path, *arguments, **options):
        if not entered:
            with contextlib.suppress(CheckpointError):
                entered.append(Writer(tmp_path / "out", fingerprint="another", overwrite=True))
        rmtree(path, *arguments, **options)

    monkeypatch.setattr(shutil, "rmtree", remove)
    write(tmp_path / "out")
    (following,) = entered
    with following:
        following.save_part("norm", {"norm": random_tree()["norm"]})


def test_a_finished_checkpoint_is_replaced_only_when_asked(tmp_path):
    path = write(tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"exists; .*--force"):
        Writer(path, fingerprint="tiny")
    tree = random_tree()
    tree["norm"]["scale"] = tree["norm"]["scale"] * 2
    with Writer(path, fingerprint="tiny", overwrite=True) as writer:
        for part in tree:
            writer.save_part(part, {part: tree[part]})
        assert_same(load(path).model, random_tree())  # the old one stays until the new one is whole
        writer.finalize(HF_CONFIG, QUANTIZATION)
    assert_same(load(path).model, tree)
    assert [entry.name for entry in tmp_path.iterdir() if entry.is_dir()] == ["out"]


def test_a_directory_that_is_no_checkpoint_is_never_replaced(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").touch()
    with pytest.raises(CheckpointError, match="not a GRINQH checkpoint"):
        Writer(tmp_path / "out", fingerprint="tiny", overwrite=True)


def test_nonfinite_values_are_refused(tmp_path):
    scale = np.array([1.0, np.nan], np.float32)
    with (
        Writer(tmp_path / "out", fingerprint="tiny") as writer,
        pytest.raises(CheckpointError, match=r"norm\.scale holds NaN or Inf"),
    ):
        writer.save_part("norm", {"norm": {"scale": scale}})


def test_an_incomplete_tree_is_not_sealed(tmp_path):
    tree = random_tree()
    with Writer(tmp_path / "out", fingerprint="tiny") as writer:
        writer.save_part("norm", {"norm": tree["norm"], "extra": {"scale": tree["norm"]["scale"]}})
        with pytest.raises(CheckpointError) as caught:
            writer.finalize(HF_CONFIG, QUANTIZATION)
    for expected in ("embed.embedding is missing", "lm_head.columns is missing", "extra.scale is unknown"):
        assert expected in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_does_not_reveal_where_it_was_made(tmp_path):
    made_in = str(tmp_path).encode()
    out = write(tmp_path / "out")
    assert [path for path in out.rglob("*") if path.is_file() and made_in in path.read_bytes()] == []


def test_copied_files_do_not_replace_the_checkpoints_own(tmp_path):
    (tmp_path / "config.json").touch()
    tree = random_tree()
    with Writer(tmp_path / "out", fingerprint="tiny") as writer:
        for part in tree:
            writer.save_part(part, {part: tree[part]})
        with pytest.raises(CheckpointError, match="a checkpoint has a file config"):
            writer.finalize(HF_CONFIG, QUANTIZATION, [tmp_path / "config.json"])
        writer.finalize(HF_CONFIG, QUANTIZATION)
    assert_same(load(tmp_path / "out").model, tree)


def test_named_chat_templates_keep_their_folder(tmp_path):
    for name in ("chat_template.jinja", "additional_chat_templates/rag.jinja"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    files = find_companions(tmp_path)
    tree = random_tree()
    with Writer(tmp_path / "out", fingerprint="tiny") as writer:
        for part in tree:
            writer.save_part(part, {part: tree[part]})
        writer.finalize(HF_CONFIG, QUANTIZATION, files)
    load(tmp_path / "out")  # the manifest lists them
    copies = [str(file.relative_to(tmp_path / "out")) for file in find_companions(tmp_path / "out")]
    assert copies == ["chat_template.jinja", "additional_chat_templates/rag.jinja"]


def test_a_link_to_an_empty_directory_is_written_through(tmp_path):
    target, link = tmp_path / "target", tmp_path / "link"
    target.mkdir()
    link.symlink_to(target)
    assert write(link) == target
    assert link.is_symlink()
    assert_same(load(target).model, random_tree())
    (tmp_path / "dangling").symlink_to(tmp_path / "made")
    write(tmp_path / "dangling")
    assert_same(load(tmp_path / "made").model, random_tree())
    left = {entry.name for entry in tmp_path.iterdir() if entry.is_dir() and not entry.is_symlink()}
    assert left == {"target", "made"}


def test_a_mount_point_is_refused_before_any_work(monkeypatch, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda self: self == out)
    with pytest.raises(CheckpointError, match="is a mount point; choose a directory inside it"):
        Writer(out, fingerprint="tiny")


def test_a_full_disk_raises_oserror_and_the_next_run_resumes(monkeypatch, tmp_path):
    tree = random_tree()
    first, second, *_ = tree
    with Writer(tmp_path / "out", fingerprint="tiny") as writer:
        writer.save_part(first, {first: tree[first]})
        full = shutil.disk_usage(tmp_path)._replace(free=1 << 10)
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "disk_usage", lambda path: full)
            with pytest.raises(OSError, match=r"No space left on device.*out\.partial"):
                writer.save_part(second, {second: tree[second]})
    with Writer(tmp_path / "out", fingerprint="tiny") as writer:
        assert writer.parts == {first}
    write(tmp_path / "out")
    assert_same(load(tmp_path / "out").model, tree)


LIMITED_WRITER = """
import resource, signal, sys
from pathlib import Path
from tiny_checkpoint import write

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, resource.RLIM_INFINITY))
try:
    write(Path(sys.argv[1]))
except OSError as error:
    print(error.errno, error.filename)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(write(Path(sys.argv[1])))
"""


def test_a_system_error_inside_tensorstore_raises_oserror(run_writer, tmp_path):
    code, printed = run_writer(LIMITED_WRITER, str(tmp_path / "out"))
    assert code == 0, printed
    assert printed.splitlines() == [f"{errno.EFBIG} {tmp_path / 'out.partial'}", str(tmp_path / "out")]
    assert_same(load(tmp_path / "out").model, random_tree())


def test_an_infinite_number_under_an_unused_key_is_copied(tmp_path):
    tree = random_tree()
    config = HF_CONFIG | {
        "router_limit": [0.0, float("inf")],
        "other": {"x": -float("inf"), "y": float("nan")},
    }
    with Writer(tmp_path / "out", fingerprint="tiny") as writer:
        for part in tree:
            writer.save_part(part, {part: tree[part]})
        writer.finalize(config, QUANTIZATION)
    assert_same(load(tmp_path / "out").model, tree)
    carried = json.loads((tmp_path / "out" / "config.json").read_text())
    assert carried["router_limit"] == [0.0, float("inf")]
    assert str(carried["other"]) == "{'x': -inf, 'y': nan}"
