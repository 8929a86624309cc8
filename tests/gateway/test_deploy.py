"""What stands in ``deploy/``: files that other programs read, tried as far as these are here, and the command lines in them."""

import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import yaml

from anabranch.cli.main import main
from anabranch.config import from_dict
from anabranch.gateway.config.shared import SharedConfig
from gateway_process import served

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
CHART = DEPLOY / "helm" / "anabranch-gateway"
CONFIG = "/etc/anabranch/gateway.toml"
VARIABLES = ("OPENAI_API_KEY", "ANABRANCH_ADMIN_KEY", "PGPASSWORD")


def instructions():
    """Of the last stage of the file: word and rest."""
    text = (DEPLOY / "Containerfile").read_text().replace("\\\n", " ")
    last = re.split(r"(?m)^FROM ", text)[-1]
    lines = [line for line in last.splitlines()[1:] if line.strip() and not line.startswith("#")]
    return [line.split(None, 1) for line in lines]


@pytest.fixture
def right(tmp_path, monkeypatch, capsys):
    """Whether a command line of ours is right, told by ``--check``: its config is one that stands here, its store a file."""
    for name in VARIABLES:
        monkeypatch.setenv(name, "x")

    def check(words, config=DEPLOY / "gateway.toml"):
        assert words[:2] == ["gateway", "serve"]
        assert CONFIG in words
        line = [str(config) if word == CONFIG else word for word in words]
        code = main([*line, "--store", str(tmp_path / "g.db"), *([] if "--check" in words else ["--check"])])
        assert code == 0, capsys.readouterr().err
        assert "is right" in capsys.readouterr().err

    return check


def test_the_image_starts_a_gateway_and_sees_whether_it_lives(right):
    found = dict(instructions())
    words = json.loads(found["ENTRYPOINT"]) + json.loads(found["CMD"])
    right(words[1:])
    assert (found["USER"], found["STOPSIGNAL"]) == ("10001", "SIGTERM")
    command = json.loads(found["HEALTHCHECK"].partition(" CMD ")[2])
    assert command[0] == "python"
    with served() as running:
        code = command[2].replace("http://127.0.0.1:8080", running.url)
        assert code != command[2]
        assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
    gone = subprocess.run([sys.executable, "-c", code], timeout=60, check=False, capture_output=True)
    assert gone.returncode != 0


def test_the_image_is_made_of_what_is_there():
    text = (DEPLOY / "Containerfile").read_text()
    lines = re.findall(r"(?m)^COPY (?!--from)(.*)$", text)
    assert lines
    for line in lines:
        *names, _ = line.split()
        assert names
        assert [name for name in names if not (DEPLOY.parent / name).exists()] == []


@pytest.fixture
def build(tmp_path):
    """Runs the script that builds the image where there is nothing but the builders given: their names, and the first word they fail at."""
    bash, called = shutil.which("bash"), tmp_path / "called"
    if bash is None:
        pytest.skip("needs bash")

    def run(builders, *words, **variables):
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        called.write_text("")
        for name, fails_at in builders.items():
            fake = folder / name
            fake.write_text(f'#!{bash}\necho "{name} $*" >> "{called}"\n[ "$1" != "{fails_at}" ]\n')
            fake.chmod(0o755)
        environment = {"PATH": str(folder), **variables}
        done = subprocess.run(
            [bash, str(DEPLOY / "build-image.sh"), *words],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            env=environment,
            cwd=tmp_path,
        )
        return done, called.read_text().splitlines()

    return run


def test_an_image_is_built_and_started_by_the_first_builder_that_works(build):
    done, called = build({"podman": "info", "docker": ""}, "of-ours")
    assert (done.returncode, done.stderr) == (0, "")
    assert called == [
        "podman info",
        "docker info",
        "docker build -f deploy/Containerfile -t of-ours .",
        "docker run --rm of-ours --help",
    ]
    assert done.stdout == "built of-ours with docker, and its gateway starts\n"
    _, called = build({"podman": ""})
    assert called[1:] == [
        "podman build -f deploy/Containerfile -t anabranch-gateway .",
        "podman run --rm anabranch-gateway --help",
    ]


@pytest.mark.parametrize("word", ["build", "run"])
def test_what_is_not_built_or_does_not_start_is_no_image(build, word):
    done, called = build({"podman": word})
    assert done.returncode == 1
    assert called[-1].startswith(f"podman {word} ")
    assert done.stdout == ""


def test_without_a_builder_the_image_is_skipped_and_it_says_so(build):
    done, _ = build({})
    assert (done.returncode, done.stdout) == (77, "")
    assert done.stderr == "skipped: neither podman nor docker works here, so no image was built\n"
    done, called = build({"podman": ""}, BUILDER="buildah")
    assert (done.returncode, called) == (77, [])
    assert "buildah works here" in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_image_is_built_where_something_can():
    script = DEPLOY / "build-image.sh"
    done = subprocess.run([str(script), "anabranch-test"], capture_output=True, text=True, timeout=1700, check=False)
    if done.returncode == 77:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_services_of_the_compose_file_know_each_other(right):
    made = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    gateway, database = made["services"]["gateway"], made["services"]["postgres"]
    assert set(gateway["environment"]) == set(VARIABLES)
    assert set(gateway["depends_on"]) == {"postgres"}
    assert (DEPLOY / gateway["build"]["context"] / gateway["build"]["dockerfile"]).is_file()
    mounted = dict(volume.split(":")[:2] for volume in gateway["volumes"])
    assert mounted == {"./gateway.toml": CONFIG}
    user, name = database["environment"]["POSTGRES_USER"], database["environment"]["POSTGRES_DB"]
    assert f'store = "postgresql://{user}@postgres/{name}"' in (DEPLOY / "gateway.toml").read_text()
    right(["gateway", "serve", "--config", CONFIG])


def test_the_redis_of_the_compose_file_is_the_one_that_the_config_would_name():
    """It is taken in by uncommenting; nothing of it is kept, and it may be full."""
    made = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    text = (DEPLOY / "gateway.toml").read_text()
    wanted = re.sub(r"(?m)^# (\[shared\]|url = .*)$", r"\1", text)
    assert wanted != text
    shared = from_dict(SharedConfig, tomllib.loads(wanted)["shared"])
    assert urlsplit(shared.url).hostname in made
    assert made["redis"]["profiles"] == ["shared"]
    words = made["redis"]["command"]
    assert words[words.index("--maxmemory-policy") + 1].startswith("volatile")
    assert "redis]" in (DEPLOY / "Containerfile").read_text()


def unit():
    text = (DEPLOY / "systemd" / "anabranch-gateway.service").read_text()
    return text, {name: shlex.split(line) for name, line in re.findall(r"(?m)^(Exec\w+)=(.*)$", text)}


def test_the_unit_starts_a_gateway_that_has_time_to_end(right):
    text, commands = unit()
    for name in ("ExecStartPre", "ExecStart"):
        right(commands[name][1:])
    drain = int(commands["ExecStart"][commands["ExecStart"].index("--drain") + 1])
    assert int(re.search(r"TimeoutStopSec=(\d+)", text)[1]) > drain


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_systemd_can_read_the_unit(tmp_path):
    text, commands = unit()
    path = tmp_path / "anabranch-gateway.service"
    # Only the program is another one: here it is not installed where the unit wants it.
    path.write_text(text.replace(commands["ExecStart"][0], sys.executable))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(path)], capture_output=True, text=True, timeout=60, check=False
    )
    said = [line for line in done.stderr.splitlines() if path.name in line]
    assert (done.returncode, said) == (0, []), done.stderr


@pytest.mark.skipif(shutil.which("helm") is None, reason="needs helm")
def test_the_chart_is_right_and_refuses_what_would_lose_money(right, tmp_path):
    def helm(*words):
        done = subprocess.run(["helm", *words], capture_output=True, text=True, timeout=60, check=False)
        return done.returncode, done.stdout, done.stderr

    code, out, err = helm("lint", "--strict", str(CHART))
    assert code == 0, out + err
    code, out, err = helm("template", "of-ours", str(CHART))
    assert code == 0, err
    made = {one["kind"]: one for one in yaml.safe_load_all(out) if one}
    assert set(made) == {"ConfigMap", "Deployment", "Service"}
    pod = made["Deployment"]["spec"]["template"]
    container = pod["spec"]["containers"][0]
    config = tmp_path / "gateway.toml"
    config.write_text(made["ConfigMap"]["data"]["gateway.toml"])
    right(["gateway", "serve", *container["args"]], config)
    assert made["Service"]["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
    assert pod["spec"]["terminationGracePeriodSeconds"] > 30 + 5
    file = 'config=store = "/var/lib/anabranch/gateway.db"'
    code, _, err = helm("template", "x", str(CHART), "--set", file)
    assert code != 0
    assert "replicas is more than 1" in err
    code, out, err = helm("template", "x", str(CHART), "--set", file, "--set", "replicas=1", "--set", "volume.size=1Gi")
    assert code == 0, err
    assert {one["kind"] for one in yaml.safe_load_all(out) if one} == {*made, "PersistentVolumeClaim"}
    code, out, err = helm("template", "x", str(CHART), "--set", "redis.url=env:REDIS_URL")
    assert code == 0, err
    config = next(one["data"]["gateway.toml"] for one in yaml.safe_load_all(out) if one and one["kind"] == "ConfigMap")
    assert tomllib.loads(config)["shared"] == {"url": "env:REDIS_URL"}
    code, _, err = helm("template", "x", str(CHART), "--set", "volume.size=1Gi")
    assert code != 0
    assert "one replica has for itself" in err
