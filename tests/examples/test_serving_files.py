"""The container file and the systemd unit name extras, commands and flags that exist.

``.ci/container`` runs the steps of the container file.
"""

import json
import re
import shlex
import tomllib
from pathlib import Path

import pytest

from grinqh_jax.cli import serve

ROOT = Path(__file__).parents[2]
FILES = ROOT / "examples" / "serving"


@pytest.fixture(scope="module")
def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def instructions() -> list[tuple[str, str]]:
    """The instructions of the container file with their arguments."""
    lines = (FILES / "Containerfile").read_text(encoding="utf-8").splitlines()
    return [tuple(line.split(" ", 1)) for line in lines if line and not line.startswith("#")]


def arguments(name: str) -> list[str]:
    return [argument for instruction, argument in instructions() if instruction == name]


def served(command: list[str], project: dict):
    """Parses the flags of a command that serves."""
    program, verb, *flags = command
    assert Path(program).name in project["scripts"]
    assert verb == "serve"
    return serve.parser().parse_args(flags)


def test_the_container_installs_extras_that_exist_on_a_supported_python(project):
    (image,) = arguments("FROM")
    version = re.search(r"python:(3\.\d+)", image)[1]
    assert f"Programming Language :: Python :: {version}" in project["classifiers"]
    install = next(command for command in arguments("RUN") if command.startswith("pip install"))
    source, extras = re.search(r"'([^'\[]+)\[([^\]]+)\]'", install).groups()
    copied = [argument.split() for argument in arguments("COPY")]
    packages = {each[0] for each in copied if (ROOT / each[0]).is_dir()}
    assert packages == {path.parent.name for path in ROOT.glob("*/__init__.py")}
    for *names, target in copied:
        assert target.startswith(source)
        assert all((ROOT / name).exists() for name in names)
    assert {project["readme"], *project["license-files"], "pyproject.toml"} <= {*copied[0]}
    extras = extras.split(",")
    assert {"gpu", "serve"} == set(extras) <= set(project["optional-dependencies"])
    for requirement in project["optional-dependencies"]["gpu"]:
        least = re.search(r"python_version >= '3\.(\d+)'", requirement)
        assert least is None or int(version.split(".")[1]) >= int(least[1])


def test_the_container_serves(project):
    (entry,) = arguments("ENTRYPOINT")
    args = served(json.loads(entry), project)
    assert (args.host, args.model) == ("0.0.0.0", "/model")
    assert [str(args.port)] == arguments("EXPOSE")
    comments = (FILES / "Containerfile").read_text(encoding="utf-8")
    assert f":{args.model}:ro" in comments  # The command in the comment mounts the model there.
    assert f"-p {args.port}:{args.port}" in comments
    assert serve.API_KEY in comments
    (environment,) = arguments("ENV")
    cache = dict(pair.split("=") for pair in environment.split())["JAX_COMPILATION_CACHE_DIR"]
    assert cache.startswith("/")
    assert arguments("STOPSIGNAL") == ["SIGTERM"]
    made = next(command for command in arguments("RUN") if "install -d" in command)
    assert "$JAX_COMPILATION_CACHE_DIR" in made
    user = re.search(r"--uid (\d+)", made)[1]
    assert arguments("USER") == [user]
    order = [instruction for instruction, _ in instructions()]
    assert order.index("USER") > max(i for i, name in enumerate(order) if name == "RUN")


def test_the_health_check_asks_the_server(project):
    (check,) = arguments("HEALTHCHECK")
    _, code = json.loads(check.partition("CMD ")[2])[1:]
    compile(code, "check", "exec")
    port = served(json.loads(arguments("ENTRYPOINT")[0]), project).port
    assert f"http://127.0.0.1:{port}/health" in code


def test_the_unit_serves_and_waits_for_the_drain(project):
    lines = (FILES / "grinqh-jax.service").read_text(encoding="utf-8").splitlines()
    settings = dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))
    args = served(shlex.split(settings["ExecStart"]), project)
    assert args.api_key_file == "%d/keys"
    assert settings["LoadCredential"].startswith("keys:")
    assert int(settings["TimeoutStopSec"]) > args.drain_seconds


def test_the_readme_page_names_both_files():
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    assert "examples/serving" in page
    assert {path.name for path in FILES.iterdir()} == {"Containerfile", "grinqh-jax.service"}
