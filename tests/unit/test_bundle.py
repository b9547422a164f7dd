"""What `make bundle` takes along, and what it refuses; tests/stack/test_bundle.py installs one."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

import bundle
from stack import images, settings
from stack.compose import Compose, Config
from stack.console import Problem

BUILT = {"context": "."}
REPLICA = {"image": "fleet/replica:1-gpu", "build": BUILT, "environment": {"MODEL": "org/small"}}
CONFIG = {
    "services": {
        "gateway": {"image": "fleet/gateway:1", "build": BUILT},
        "vllm-0": REPLICA,
        "grafana": {"image": "grafana:1"},
    },
    "x-pins": {},
}


STACK = Config.model_validate(CONFIG)


class Stack(Compose):
    """The stack as Compose's files describe it where docker-compose.gpu.yml is among them."""

    def config(self) -> Config:
        assert "docker-compose.gpu.yml" in self.files
        return STACK


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The images of a machine whose stack runs on GPUs."""
    images = {"fleet/gateway:1", "fleet/replica:1-gpu"}
    monkeypatch.setattr(bundle, "Compose", Stack)
    monkeypatch.setattr(bundle, "running_files", lambda: ["docker-compose.gpu.yml"], raising=False)
    monkeypatch.setattr(bundle, "present", lambda image: image in images)
    return images


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with one model and with what does not belong into a bundle."""
    root = tmp_path / "checkout"
    for name in ("docker-compose.yml", "scripts/ü.py", ".env", "models/org/small/config.json", "models/README.md"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("{}")
    (root / ".env").write_text("MODEL=org/small\n")
    (root / ".gitignore").write_text("/.env\n/dist/\n/models/*\n!/models/README.md\n")
    monkeypatch.setattr(bundle, "ROOT", root)
    return root


def test_the_images_of_the_files_that_run_are_packed(here: set[str]) -> None:
    assert bundle._images(Stack("docker-compose.gpu.yml").config()) == sorted(here)


def test_an_image_that_the_stack_cannot_do_without_must_be_there(here: set[str]) -> None:
    here.remove("fleet/replica:1-gpu")
    with pytest.raises(Problem, match=r"fleet/replica:1-gpu is not on this machine: .*make up"):
        bundle._images(STACK)


def test_an_image_of_another_checkout_is_not_packed(
    here: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be refused where the bundle is installed, and there is no base there to build it anew."""
    (tmp_path / "Dockerfile").write_text("FROM base")
    service = {"image": "fleet/gateway:1", "build": {"context": str(tmp_path), "args": {"BASE": "base"}}}
    config = Config.model_validate({"services": {"gateway": service}, "x-pins": {}})
    label = images.recipe(images.builds_of(config)["fleet/gateway:1"])
    monkeypatch.setattr(bundle, "label_of", lambda *_: label)
    assert bundle._images(config) == ["fleet/gateway:1"]
    (tmp_path / "Dockerfile").write_text("FROM base\nUSER 1")
    with pytest.raises(Problem, match="fleet/gateway:1 is older than this checkout"):
        bundle._images(config)


@pytest.mark.parametrize("how", ["git", "no git", "within another checkout"])
def test_the_checkout_is_packed_with_git_or_without(checkout: Path, how: str) -> None:
    if how == "git":
        subprocess.run(["git", "init", "--quiet", checkout], check=True)
        subprocess.run(["git", "-C", checkout, "add", "."], check=True)
    if how == "within another checkout":
        subprocess.run(["git", "init", "--quiet", checkout.parent], check=True)
        (checkout.parent / ".gitignore").write_text("/checkout/\n")
    assert sorted(bundle._checkout()) == [".gitignore", "docker-compose.yml", "scripts/ü.py"]


def test_a_checkout_that_cannot_be_listed_is_a_problem(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(checkout))
    with pytest.raises(Problem, match="git is not installed"):
        bundle._checkout()


@pytest.mark.parametrize("name", ["org/small", "org", "org/small/"])
def test_a_model_is_a_folder_of_models(checkout: Path, name: str) -> None:
    assert bundle._model(name) == checkout / "models" / name


@pytest.mark.parametrize("name", ["../scripts", "org/../../scripts", "/etc", "org/large", ".", ""])
def test_another_folder_is_no_model(checkout: Path, name: str) -> None:
    (checkout / "scripts" / "config.json").write_text("{}")
    with pytest.raises(Problem, match="--model"):
        bundle._model(name)


@pytest.mark.usefixtures("checkout", "here")
def test_a_folder_that_cannot_be_written_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bundle.main(out=Path("/proc/bundle"))
    assert "/proc/bundle" in "".join(capsys.readouterr())


def test_an_archive_has_its_name_only_when_it_is_whole(tmp_path: Path) -> None:
    good, gone = tmp_path / "good", tmp_path / "gone"
    good.write_text("good")
    scratch, archive = tmp_path / "scratch", tmp_path / "fleet.tar"
    scratch.mkdir()
    with pytest.raises(OSError, match="gone"):
        bundle._write(archive, scratch, {"good": good, "gone": gone})
    assert not archive.exists()
    bundle._write(archive, scratch, {"good": good})
    with tarfile.open(archive) as tar:
        assert tar.getnames() == ["vllm-fleet", "vllm-fleet/good", "vllm-fleet/SHA256SUMS"]


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_every_user_can_read_what_a_bundle_leaves(checkout: Path, tmp_path: Path, umask: int) -> None:
    (checkout / "scripts" / "run.sh").write_text("#!/bin/sh")
    for path in checkout.rglob("*"):
        path.chmod(0o700 if path.is_dir() or path.name == "run.sh" else 0o600)
    scratch, archive = tmp_path / "scratch", tmp_path / "fleet.tar"
    scratch.mkdir()
    bundle._write(
        archive, scratch, {name: checkout / name for name in ("scripts/run.sh", "models/org/small/config.json")}
    )
    with tarfile.open(archive) as tar:
        assert {(entry.uid, entry.gid, entry.uname, entry.gname) for entry in tar} == {(0, 0, "", "")}
    subprocess.run(["tar", "xpf", archive], cwd=tmp_path, check=True, preexec_fn=lambda: os.umask(umask))
    there = tmp_path / "vllm-fleet"
    executable = {path for path in (there, *there.rglob("*")) if path.is_dir()} | {there / "scripts" / "run.sh"}
    for path in (there, *there.rglob("*")):
        assert path.stat().st_mode & 0o777 == (0o755 if path in executable else 0o644), path


def test_what_git_does_not_track_is_left_out_and_named(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    subprocess.run(["git", "init", "--quiet", checkout], check=True)
    subprocess.run(["git", "-C", checkout, "add", "."], check=True)
    (checkout / "notes.txt").write_text("mine")
    assert "notes.txt" not in bundle._checkout()
    assert "notes.txt is left out" in capsys.readouterr().out


@pytest.fixture
def packed(
    checkout: Path, here: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], dict[str, str]]:
    """Packs the checkout with what stands for images and wheels: the text of each file in the archive, by its name."""
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "docker").write_text('#!/bin/sh\n[ "$1" != save ] || exec touch "$3"\necho 1\n')
    (tools / "python").write_text('#!/bin/sh\nfor word; do case $word in --dest=*) mkdir "${word#*=}";; esac; done\n')
    for tool in tools.iterdir():
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tools), prepend=os.pathsep)
    monkeypatch.setattr(sys, "executable", str(tools / "python"))
    for name in ("HF_TOKEN_FILE", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)

    def pack() -> dict[str, str]:
        bundle.main(out=checkout / "dist")
        with tarfile.open(next((checkout / "dist").glob("*.tar"))) as tar:
            files = {entry.name.removeprefix("vllm-fleet/"): tar.extractfile(entry) for entry in tar}
            return {name: file.read().decode(errors="replace") for name, file in files.items() if file}

    return pack


def test_users_are_left_out_whole_and_make_up_takes_what_remains(
    checkout: Path, packed: Callable[[], dict[str, str]], tmp_path: Path
) -> None:
    (checkout / ".env").write_text(
        "USER_LIST='ALICE, BOB'\nALICE_USERNAME=alice\nALICE_HASHED_PASSWORD='$argon2id$x'\nBOB_USERNAME=bob\n"
        "BOB_ROLE=admin\nBOB_HASHED_PASSWORD='$argon2id$y'\nJWT_KEY=planted\nACCESS_TOKEN_EXPIRE_MINUTES=60\n"
    )
    there = tmp_path / "there.env"
    there.write_text(packed()[".env"])
    assert settings.with_users(there, {}) == {"ACCESS_TOKEN_EXPIRE_MINUTES": "60"}


def test_settings_are_packed_and_secrets_are_not(
    checkout: Path, packed: Callable[[], dict[str, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    (checkout / ".env").write_text(
        "# HF_TOKEN_FILE=/old\nMODEL=org/small\nHF_TOKEN_FILE=hf_token\nMAX_NUM_BATCHED_TOKENS=512\n"
        "HF_ENDPOINT=https://me:pass@word@mirror.example/hub\n"
    )
    (checkout / "hf_token").write_text("hf_secret")
    files = packed()
    assert files[".env"] == ("MODEL=org/small\nMAX_NUM_BATCHED_TOKENS=512\nHF_ENDPOINT=https://mirror.example/hub\n")
    assert "HF_TOKEN_FILE in .env is left out" in capsys.readouterr().out
    assert "hf_token" not in files
    assert not [name for name, text in files.items() if "hf_secret" in text or "pass" in text]
    assert " .env\n" not in files["SHA256SUMS"], "a changed one is no damage"


def test_a_model_that_is_a_link_is_packed(checkout: Path, packed: Callable[[], dict[str, str]]) -> None:
    (checkout / "models" / "org" / "small").rename(checkout.parent / "elsewhere")
    (checkout / "models" / "org" / "small").symlink_to(checkout.parent / "elsewhere")
    (checkout / "models" / "org" / "linked.json").symlink_to(checkout.parent / "elsewhere" / "config.json")
    files = packed()
    assert files["models/org/small/config.json"] == files["models/org/linked.json"] == "{}"


def test_a_model_that_is_served_and_left_out_is_named(
    checkout: Path, packed: Callable[[], dict[str, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    """As where plain `docker compose up` brought it into a volume."""
    other = checkout / "models" / "org" / "other"
    (checkout / "models" / "org" / "small").rename(other)
    with pytest.raises(SystemExit):
        packed()
    assert "download_model.py org/small" in capsys.readouterr().err
    bundle.main(out=checkout / "dist", model=["org/other"])
    assert "org/small, which the stack serves, is left out" in capsys.readouterr().out


@pytest.mark.parametrize("how", ["ignored", "tracked by mistake", "no git"])
def test_no_key_is_packed(checkout: Path, how: str) -> None:
    """Only what keeps the folder out of git goes along."""
    folder = checkout / "secrets" / "gateway"
    folder.mkdir(parents=True)
    (folder / ".gitignore").write_text("*\n!/.gitignore\n")
    (folder / "keys.json").write_text("{}")
    if how != "no git":
        subprocess.run(["git", "init", "--quiet", checkout], check=True)
        subprocess.run(["git", "-C", checkout, "add", "."], check=True)
    if how == "tracked by mistake":
        subprocess.run(["git", "-C", checkout, "add", "--force", folder / "keys.json"], check=True)
    assert {name for name in bundle._checkout() if name.startswith("secrets")} == {"secrets/gateway/.gitignore"}
