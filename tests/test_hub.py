"""`hub.resolve`: local folders without a network, and downloads from a local Hub."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants
import pytest
from hub_server import COMMIT, HubServer, Repo, serve

from mlxvr.checkpoint import download_check, hub
from mlxvr.errors import CheckpointError, ConfigError

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
SIZE = sum(len(FILES[name]) for name in WANTED)


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
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # this server speaks plain HTTP
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
    code = f"import sys; from mlxvr.checkpoint import hub; hub.resolve({str(tmp_path)!r}); "
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
    for stage in ("download", "check"):
        assert [event for event in seen if event[0] == stage][-1][1:] == (SIZE, SIZE)
    stages = [stage for stage, _, _ in seen]
    assert stages == sorted(stages, reverse=True)  # one after the other


@pytest.mark.parametrize("place", ["HF_TOKEN", "the file of hf auth login"])
@pytest.mark.parametrize("gated", [False, True])
def test_a_closed_model_opens_with_its_token(place, gated, at, monkeypatch):
    repo = Repo(FILES, lfs={"model.safetensors"}, token="secret", gated=gated)
    with serve(org__name=repo) as server:
        at(server)
        message = error_of("org/name")
        assert ("accept its licence" if gated else "check the id") in message
        assert "hf auth login" in message
        if place == "HF_TOKEN":
            monkeypatch.setenv("HF_TOKEN", "secret")
        else:
            Path(huggingface_hub.constants.HF_TOKEN_PATH).write_text("secret\n")
        assert (hub.resolve("org/name") / "model.safetensors").read_bytes() == WEIGHTS


def test_a_wrong_token_does_not_open_it(at, monkeypatch):
    with serve(org__name=Repo(FILES, token="secret")) as server:
        at(server)
        monkeypatch.setenv("HF_TOKEN", "another")
        assert "hf auth login" in error_of("org/name")


def test_a_folder_that_was_cached_is_used_while_the_hub_is_in_trouble(at, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    repo = Repo(FILES)
    with serve(org__name=repo) as server:
        at(server)
        folder = hub.resolve("org/name")
        repo.refuse = 503
        assert hub.resolve("org/name") == folder


def test_hub_scheme_reaches_past_a_local_folder(at, tmp_path, monkeypatch):
    (tmp_path / "org").mkdir()
    monkeypatch.chdir(tmp_path)
    with serve(org__name=Repo(FILES)) as server:
        at(server)
        assert hub.resolve("hf://org/name").is_dir()


# --- refusals -------------------------------------------------------------------------------------------


WAIT = {"ratelimit": '"api";r=0;t=77'}


@pytest.mark.parametrize(
    ("repo", "says"),
    [
        (Repo(FILES, gated=True, token="t"), "accept its licence at http://127.0.0.1"),
        (Repo(FILES, refuse=401), "does not accept the token for org/name; sign in again with `hf auth login`"),
        (Repo(FILES, refuse=403), "may not read"),
        (
            Repo(FILES, refuse=403, refuse_headers={"X-Error-Message": "Access to this resource is disabled."}),
            "disabled",
        ),
        (Repo(FILES, refuse=404), "answered 404 for org/name; check the id"),
        (Repo(FILES, refuse=429), "limits the rate of requests (429); wait a few minutes, or sign in"),
        (Repo(FILES, refuse=429, refuse_headers={"Retry-After": "31"}), "(429); wait 31 seconds"),
        (Repo(FILES, refuse=429, refuse_headers=WAIT), "(429); wait 77 seconds"),
        (Repo(FILES, refuse=500), "trouble of its own (500)"),
        (Repo(FILES, refuse=503), "trouble of its own (503)"),
        (Repo({"config.json": b"{}", "pytorch_model.bin": b"pickle"}), "no safetensors"),
    ],
)
def test_refusals_are_one_line_that_says_what_to_do(repo, says, at, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with serve(org__name=repo) as server:
        at(server)
        assert says in error_of("org/name")


@pytest.mark.parametrize("status", [429, 503])
def test_a_hub_that_asks_for_patience_in_the_middle_gets_it(status, at, monkeypatch):
    slept = []
    monkeypatch.setattr("time.sleep", slept.append)
    answers = {"refuse": status, "refuse_only": "resolve", "refuse_first": 3, "refuse_headers": {"Retry-After": "7"}}
    with serve(org__name=Repo({"model.safetensors": WEIGHTS}, **answers)) as server:
        at(server)
        assert (hub.resolve("org/name") / "model.safetensors").read_bytes() == WEIGHTS
    assert slept == [8.0, 8.0]  # what the header says, and one second more


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
    code = "from mlxvr.checkpoint import hub; from mlxvr.errors import CheckpointError\n"
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


# --- what arrives is what was announced ------------------------------------------------------------------


SMALL = {"merges.txt": b"a c"}  # as long as what it stands for
LARGE = {"model.safetensors": WEIGHTS[:-1] + b"!"}


def note_in(cache: Path) -> Path:
    return cache / "models--org--name" / "mlxvr-unchecked.json"


@pytest.mark.parametrize("damage", [SMALL, LARGE, SMALL | LARGE], ids=["git", "lfs", "both"])
def test_a_damaged_file_is_named_removed_and_fetched_again(damage, at):
    repo = Repo(FILES, lfs={"model.safetensors"}, damage=dict(damage))
    with serve(org__name=repo) as server:
        cache = at(server)
        message = error_of("org/name")
        assert message.startswith(", ".join(sorted(damage)) + " arrived damaged")
        assert "run again" in message
        links = list(cache.glob("models--org--name/snapshots/*/*"))
        assert {link.name for link in links} == WANTED - set(damage)
        assert len(list(cache.glob("models--org--name/blobs/*"))) == len(WANTED - set(damage))
        repo.damage.clear()
        server.requests.clear()
        folder = hub.resolve("org/name")
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == {name: FILES[name] for name in WANTED}
    contents = {
        path.rpartition("/")[2] for method, path, _ in server.requests if method == "GET" and "/api/" not in path
    }
    assert contents == set(damage)  # nothing else was fetched twice
    assert not note_in(cache).exists()


def test_only_what_arrived_is_read_again(at, monkeypatch):
    hashed = []
    digest = download_check._digest
    monkeypatch.setattr(download_check, "_digest", lambda path, *rest: hashed.append(path.name) or digest(path, *rest))
    repo = Repo(dict(FILES), lfs={"model.safetensors"})
    with serve(org__name=repo) as server:
        at(server)
        hub.resolve("org/name")
        assert sorted(hashed) == sorted(WANTED)
        hashed.clear()
        hub.resolve("org/name")
        assert hashed == []
        repo.files["config.json"], repo.commit = b'{"model_type": "qwen2_5_vl"}', "f" * 40
        hub.resolve("org/name")
        assert hashed == ["config.json"]


def test_a_file_that_two_names_share(at):
    files = {**FILES, "vocab.json": FILES["tokenizer.json"]}
    with serve(org__name=Repo(files, damage={"tokenizer.json": b"[]", "vocab.json": b"[]"})) as server:
        cache = at(server)
        assert error_of("org/name").startswith("tokenizer.json, vocab.json arrived damaged")
        assert {link.name for link in cache.glob("models--org--name/snapshots/*/*")} == WANTED - {"tokenizer.json"}


@pytest.mark.parametrize("moment", ["before the check", "during the download"])
def test_a_process_that_died_before_the_check_leaves_it_to_the_next(moment, tmp_path):
    where = "download_check.check" if moment == "before the check" else "file_download._create_symlink"
    code = (
        "import os, sys; from huggingface_hub import file_download; from mlxvr.checkpoint import download_check, hub\n"
        "from mlxvr.errors import CheckpointError\n"
        f"if 'die' in sys.argv: {where} = lambda *args, **kwargs: os._exit(9)\n"
        "try: print(hub.resolve('org/name'))\nexcept CheckpointError as error: print(error)"
    )

    def run(url: str, *arguments: str) -> subprocess.CompletedProcess:
        env = {**os.environ, "HF_HOME": str(tmp_path), "HF_ENDPOINT": url, "HF_HUB_OFFLINE": "0"}
        env |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        env.pop("HF_TOKEN", None)
        return subprocess.run([sys.executable, "-c", code, *arguments], env=env, capture_output=True, text=True)

    repo = Repo({name: FILES[name] for name in LARGE}, lfs={"model.safetensors"}, damage=dict(LARGE))
    with serve(org__name=repo) as server:
        assert run(server.url, "die").returncode == 9
        assert note_in(tmp_path / "hub").exists()
        repo.damage.clear()
        found = run(server.url).stdout
        assert found.startswith("model.safetensors arrived damaged")
        folder = Path(run(server.url).stdout.strip())
        assert (folder / "model.safetensors").read_bytes() == WEIGHTS
        assert not note_in(tmp_path / "hub").exists()


@pytest.mark.parametrize("note", ["not JSON", "[[]]", "{"])
def test_a_note_that_cannot_be_read_vouches_for_nothing(note, at):
    repo = Repo(FILES, damage=dict(SMALL))
    with serve(org__name=repo) as server:
        cache = at(server)
        error_of("org/name")
        repo.damage.clear()
        hub.resolve("org/name")
        blob = next(cache.glob("models--org--name/snapshots/*/config.json")).resolve()
        blob.write_bytes(FILES["config.json"].upper())
        assert hub.resolve("org/name").is_dir()  # not read again
        note_in(cache).write_text(note)
        assert "config.json arrived damaged" in error_of("org/name")


def test_a_note_does_not_vouch_for_a_file_that_has_gone(at):
    repo = Repo(dict(FILES))
    with serve(org__name=repo) as server:
        cache = at(server)
        hub.resolve("org/name")
        repo.files["merges.txt"], repo.commit, repo.damage = b"a d", "e" * 40, dict(SMALL)
        error_of("org/name")  # leaves its note, which knows config.json
        link = cache / "models--org--name" / "snapshots" / repo.commit / "config.json"
        link.resolve().unlink()
        repo.damage = {"config.json": FILES["config.json"].upper()}
        assert "config.json arrived damaged" in error_of("org/name")


def test_nothing_is_left_of_a_model_that_does_not_exist(at):
    with serve() as server:
        cache = at(server)
        error_of("org/nmae")
    assert list(cache.glob("models--*")) == []


def test_the_clients_own_view_of_its_cache_is_not_disturbed(at):
    repo = Repo(FILES, damage=dict(SMALL))
    with serve(org__name=repo) as server:
        cache = at(server)
        error_of("org/name")
        assert note_in(cache).exists()
        seen = huggingface_hub.scan_cache_dir(cache)
    assert seen.warnings == []
    assert [(found.repo_id, found.nb_files) for found in seen.repos] == [("org/name", len(WANTED) - 1)]


def test_a_cache_that_cannot_be_written_still_serves_what_it_holds(at):
    with serve(org__name=Repo(FILES)) as server:
        cache = at(server)
        folder = hub.resolve("org/name")
        repository = cache / "models--org--name"
        repository.chmod(0o555)
        try:
            assert hub.resolve("org/name") == folder
        finally:
            repository.chmod(0o755)


@pytest.mark.parametrize("announced", [len(WEIGHTS) - 1, len(WEIGHTS) + 1])
def test_a_wrong_size_is_one_line_with_both(announced, at):
    repo = Repo(FILES, lfs={"model.safetensors"}, announce={"model.safetensors": announced})
    with serve(org__name=repo) as server:
        cache = at(server)
        message = error_of("org/name")
        assert message.startswith(f"model.safetensors of org/name came with {len(WEIGHTS)} bytes where")
        assert f"announced {announced};" in message
        assert not list(cache.glob("models--org--name/snapshots/*/model.safetensors"))
        assert not list(cache.glob("models--org--name/blobs/*.incomplete"))
