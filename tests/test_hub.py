"""`hub.resolve`: local folders without a network, and downloads from a local Hub."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants
import pytest
from hub_server import COMMIT, HubServer, Repo, serve

from mlxvr.errors import CheckpointError, ConfigError
from mlxvr.porting import hub

WEIGHTS = bytes(range(256)) * 400  # 100 kB; nobody opens it here
FILES = {
    "config.json": b'{"model_type": "qwen3_vl"}',
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"x",
    "merges.txt": b"a b",
    "README.md": b"# model",
    "model.safetensors": WEIGHTS,
    "pytorch_model.bin": b"pickle",
    "training_args.bin": b"pickle",
    "modeling_evil.py": b"raise SystemExit",
    "onnx/model.safetensors": b"another export",
    "trainer_state.json": b"{}",
}
WANTED = {
    "config.json",
    "tokenizer.json",
    "chat_template.jinja",
    "merges.txt",
    "README.md",
    "model.safetensors",
}


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def at(monkeypatch, tmp_path):
    """Point the Hub client at a server, with an empty cache and no token of this machine's."""

    def point(server: HubServer | str) -> Path:
        cache = tmp_path / "cache"
        url = server if isinstance(server, str) else server.url
        constants = huggingface_hub.constants
        monkeypatch.setenv("HF_ENDPOINT", url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        return cache

    return point


def error_of(model: str, **options) -> str:
    with pytest.raises(CheckpointError) as caught:
        hub.resolve(model, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- local folders --------------------------------------------------------------------------------------


def test_a_local_folder_comes_back_untouched(tmp_path, no_network, monkeypatch):
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub.resolve("org/name") == Path("org/name")
    assert hub.resolve(tmp_path) == tmp_path
    assert hub.resolve(str(tmp_path)) == tmp_path


def test_a_local_folder_does_not_import_the_hub_client(tmp_path):
    code = f"import sys; from mlxvr.porting import hub; hub.resolve({str(tmp_path)!r}); "
    code += "assert 'huggingface_hub' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "path", ["./gone", "/gone/model", "~/gone", "../gone", "gone", "", "a/b/c", "gone/", "org/gone"]
)
def test_a_mistyped_path_never_reaches_the_network(path, tmp_path, no_network, monkeypatch):
    (tmp_path / "org").mkdir()
    monkeypatch.chdir(tmp_path)
    assert "no such folder" in error_of(path)


def test_a_folder_in_the_way_of_a_hub_id_is_told_with_the_way_round_it(tmp_path, no_network, monkeypatch):
    (tmp_path / "org").mkdir()
    monkeypatch.chdir(tmp_path)
    assert "hf://org/gone" in error_of("org/gone")


def test_a_file_is_not_a_model(tmp_path, no_network):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"")
    assert "is a file" in error_of(str(path))


def test_a_revision_of_a_local_folder_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no revisions"):
        hub.resolve(tmp_path, revision="main")


# --- downloads ------------------------------------------------------------------------------------------


def test_only_the_needed_files_are_downloaded(at):
    with serve(org__name=Repo(FILES, lfs={"model.safetensors"})) as server:
        at(server)
        folder = hub.resolve("org/name")
    assert {path.name for path in folder.iterdir()} == WANTED
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert hub.origin_of(folder) == ("org/name", COMMIT)
    asked = " ".join(path for _, path, _ in server.requests)
    assert ".bin" not in asked
    assert ".py" not in asked
    assert any(path.startswith("/cdn/") for _, path, _ in server.requests)  # the redirect was followed


def test_a_second_call_downloads_nothing(at):
    with serve(org__name=Repo(FILES)) as server:
        at(server)
        first = hub.resolve("org/name")
        server.requests.clear()
        assert hub.resolve("org/name") == first
        assert server.downloads("model.safetensors") == []


def test_a_cut_line_is_resumed_where_it_broke(at, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 10_000)
    repo = Repo(FILES, lfs={"model.safetensors"}, cut_once={"model.safetensors": 60_000})
    with serve(org__name=repo) as server:
        at(server)
        folder = hub.resolve("org/name")
        assert (folder / "model.safetensors").read_bytes() == WEIGHTS
        assert server.downloads("model.safetensors")[-1] == "bytes=60000-"


def test_a_revision_is_asked_for(at):
    with serve(org__name=Repo(FILES, branches=("main", "v2"))) as server:
        at(server)
        hub.resolve("org/name", revision="v2")
        assert ("GET", "/api/models/org/name/revision/v2", None) in server.requests
        assert "no revision 'v9'" in error_of("org/name", revision="v9")


def test_progress_counts_the_bytes(at):
    seen = []
    with serve(org__name=Repo(FILES)) as server:
        at(server)
        hub.resolve("org/name", progress=lambda *event: seen.append(event))
    assert {stage for stage, _, _ in seen} == {"download"}
    assert seen[-1][1] == seen[-1][2] == sum(len(FILES[name]) for name in WANTED)


def test_a_private_model_opens_with_its_token(at, monkeypatch):
    with serve(org__name=Repo(FILES, token="secret")) as server:
        at(server)
        message = error_of("org/name")
        assert "check the id" in message
        assert "hf auth login" in message
        monkeypatch.setenv("HF_TOKEN", "secret")
        assert hub.resolve("org/name").is_dir()


def test_hub_scheme_reaches_past_a_local_folder(at, tmp_path, monkeypatch):
    (tmp_path / "org").mkdir()
    monkeypatch.chdir(tmp_path)
    with serve(org__name=Repo(FILES)) as server:
        at(server)
        assert hub.resolve("hf://org/name").is_dir()


# --- refusals -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("repo", "says"),
    [
        (Repo(FILES, gated=True, token="t"), "accept its licence at http://127.0.0.1"),
        (Repo(FILES, refuse=403), "may not read"),
        (Repo(FILES, refuse=500), "trouble of its own (500)"),
        (Repo({"config.json": b"{}", "pytorch_model.bin": b"pickle"}), "no safetensors"),
    ],
)
def test_refusals_are_one_line_that_says_what_to_do(repo, says, at, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with serve(org__name=repo) as server:
        at(server)
        assert says in error_of("org/name")


def test_a_wrong_id_is_told(at):
    with serve() as server:
        at(server)
        assert "no model org/nmae" in error_of("org/nmae")


def test_no_server_at_all(at):
    with serve() as server:
        url = server.url
    at(url)
    assert f"cannot reach {url}" in error_of("org/name")


def test_the_environment_decides_in_a_fresh_process(tmp_path):
    code = "from mlxvr.porting import hub; from mlxvr.errors import CheckpointError\n"
    code += "try: print(hub.resolve('org/name'))\nexcept CheckpointError as error: print(error)"

    def run(**changes: str) -> str:
        env = {
            **os.environ,
            "HF_HOME": str(tmp_path),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            **changes,
        }
        env.pop("HF_TOKEN", None)
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    with serve(org__name=Repo(FILES)) as server:
        assert "HF_HUB_OFFLINE is set" in run(HF_ENDPOINT=server.url, HF_HUB_OFFLINE="1")
        assert server.requests == []
        folder = run(HF_ENDPOINT=server.url)
        assert folder.endswith(COMMIT)
        server.requests.clear()
        assert run(HF_ENDPOINT=server.url, HF_HUB_OFFLINE="1") == folder
        assert server.requests == []
