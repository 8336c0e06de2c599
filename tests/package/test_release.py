"""The files that the release script writes, and what it refuses. CI builds and tries the packages."""

import datetime
import importlib.machinery
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / ".ci" / "release"
DATE = datetime.date(2027, 1, 2)


@pytest.fixture(scope="module")
def release():
    loader = importlib.machinery.SourceFileLoader("release", str(SCRIPT))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("release", loader))
    loader.exec_module(module)
    return module


def test_the_entries_move_under_the_version(release):
    changelog = "# Changelog\n\n## [Unreleased]\n### Added\n- A.\n\n## [0.1.0] - 2026-01-01\n- B.\n"
    assert release.with_release(changelog, "0.2.0", DATE) == (
        "# Changelog\n\n## [Unreleased]\n\n## [0.2.0] - 2027-01-02\n### Added\n- A.\n\n"
        "## [0.1.0] - 2026-01-01\n- B.\n"
    )


@pytest.mark.parametrize(
    ("changelog", "reason"),
    [
        ("# Changelog\n", "no section"),
        ("## [Unreleased]\n\n## [0.1.0]\n- B.\n", "no entries"),
        ("## [Unreleased]\n- A.\n## [0.2.0]\n- B.\n", "already"),
    ],
)
def test_a_changelog_without_the_release_is_refused(release, changelog, reason):
    with pytest.raises(release.ReleaseError, match=reason):
        release.with_release(changelog, "0.2.0", DATE)


def test_the_version_is_set_where_the_package_and_its_metadata_read_it(release):
    text = (ROOT / release.VERSION_FILE).read_text()
    namespace = {}
    exec(release.with_version(text, "9.8.7rc1"), namespace)
    assert namespace["__version__"] == "9.8.7rc1"


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("0.1.0", "0.2", "not like"),
        ("0.1.0", "v0.2.0", "not like"),
        ("0.10.0", "0.9.0", "older"),
        ("0.2.0", "0.2.0rc1", "older"),
    ],
)
def test_bad_versions_are_refused(release, old, new, reason):
    with pytest.raises(release.ReleaseError, match=reason):
        release.with_version(f'__version__ = "{old}"\n', new)


def test_a_dirty_checkout_and_an_existing_tag_are_refused(tmp_path):
    for name in (".ci/release", "grinqh_jax/__init__.py", "CHANGELOG.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)

    def git(*arguments):
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True)

    def refusal():
        done = subprocess.run(
            [sys.executable, tmp_path / ".ci/release", "9.0.0"], capture_output=True, text=True
        )
        assert done.returncode == 2
        return done.stderr

    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "--message", "all")
    git("tag", "v9.0.0")
    assert "tag v9.0.0 exists" in refusal()
    (tmp_path / "CHANGELOG.md").write_text("changed")
    assert "uncommitted changes" in refusal()
