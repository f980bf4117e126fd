"""`upload`: a converted folder goes to a local Hub and comes back byte for byte; every refusal is one line."""

import json
import shutil
import socket
from pathlib import Path

import huggingface_hub.constants
import pytest
from checkpoints import write_checkpoint
from hub_server import Repo
from hub_uploads import Account, UploadServer, serve_uploads

from mlxvr.checkpoint import hub
from mlxvr.conversion.upload import check_upload, upload
from mlxvr.convert import convert, main
from mlxvr.errors import CheckpointError, ConfigError

ALICE = {"secret": Account("alice", orgs={"lab": "write", "club": "read"})}


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("upload")
    source = write_checkpoint(folder / "source", "qwen3_vl", dtype="BF16", shards=2)
    return convert(source, folder / "converted", bits=4, group_size=32).path


@pytest.fixture
def folder(converted, tmp_path):
    """A copy that a test may change."""
    return Path(shutil.copytree(converted, tmp_path / "converted"))


@pytest.fixture
def at(monkeypatch, tmp_path):
    """Point the Hub client at a server, as a user with a token, with an empty cache; nothing goes to Xet."""

    def point(server: UploadServer | str, token: str | None = "secret") -> None:
        constants = huggingface_hub.constants
        monkeypatch.setenv("HF_ENDPOINT", server if isinstance(server, str) else server.url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr("time.sleep", lambda seconds: None)
        if token is None:
            monkeypatch.delenv("HF_TOKEN", raising=False)
        else:
            monkeypatch.setenv("HF_TOKEN", token)

    return point


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def refusal(function, *arguments, error=ConfigError, **options) -> str:
    with pytest.raises(error) as caught:
        function(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- there and back ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("part_bytes", [None, 10_000])
def test_a_folder_goes_up_and_comes_back_byte_for_byte(part_bytes, converted, at):
    seen = []
    with serve_uploads(ALICE, part_bytes=part_bytes) as server:
        at(server)
        url = upload(converted, "alice/model", progress=lambda *event: seen.append(event))
        assert url == f"{server.url}/alice/model/commit/{server.repos['alice/model'].commit}"
        assert contents(hub.resolve("alice/model")) == contents(converted)
        assert server.sent("PUT /storage/") == (1 if part_bytes is None else -(-weights_size(converted) // part_bytes))
        assert server.sent("POST /lfs/verify") == 1
    assert server.repos["alice/model"].lfs == {"model.safetensors"}
    assert [(commit["revision"], commit["deletedFile"]) for commit in server.commits] == [("main", [])]  # one, atomic
    total = sum(map(len, contents(converted).values()))
    assert seen == [("upload", 0, total), ("upload", total, total)]


def weights_size(folder: Path) -> int:
    return (folder / "model.safetensors").stat().st_size


def test_only_the_files_of_a_converted_folder_are_sent(folder, at):
    for name in (".env", "notes.txt", "model.safetensors.partial", "adapters.safetensors", "training_args.bin"):
        (folder / name).write_bytes(b"private")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "config.json").write_text("{}")
    (folder / "state").mkdir()
    (folder / "state" / "model.safetensors").write_bytes(b"another")
    with serve_uploads(ALICE) as server:
        at(server)
        upload(folder, "alice/model")
    sent = set(server.repos["alice/model"].files) - {".gitattributes"}
    expected = {"model.safetensors", "model.safetensors.index.json", "config.json", "mlxvr.json", "README.md"}
    assert expected < sent
    assert not any(b"private" in content for content in server.repos["alice/model"].files.values())
    assert all("/" not in name for name in sent)


def test_a_new_version_replaces_the_weights_of_the_old_one_in_one_commit(converted, at):
    shards = {f"model-0000{number}-of-00002.safetensors": b"old" for number in (1, 2)}
    old = {"README.md": b"old", "demo.gif": b"old", **shards}
    repo = Repo(old, lfs=set(shards))
    with serve_uploads(ALICE, {"alice/model": repo}) as server:
        at(server)
        upload(converted, "alice/model")
        assert set(repo.files) == {*contents(converted), "demo.gif"}
        assert repo.files["demo.gif"] == b"old"
        assert len(server.commits) == 1
        assert contents(hub.resolve("alice/model")) == contents(converted)


def test_an_upload_of_the_same_again_changes_nothing(converted, at):
    with serve_uploads(ALICE) as server:
        at(server)
        first = upload(converted, "alice/model")
        assert upload(converted, "alice/model") == first
        assert len(server.commits) == 1
        assert server.sent("PUT /storage/") == 1


def test_an_upload_that_broke_does_not_send_the_weights_twice(converted, at):
    with serve_uploads(ALICE) as server:
        at(server)
        server.fail["commit"] = (500, 100)
        assert "trouble of its own (500: ordered by the test)" in refusal(upload, converted, "alice/model")
        assert server.commits == []
        assert set(server.repos["alice/model"].files) == {".gitattributes"}  # nothing, rather than a half
        server.fail.clear()
        upload(converted, "alice/model")
        assert server.sent("PUT /storage/") == 1
        assert contents(hub.resolve("alice/model")) == contents(converted)


def test_a_storage_with_hiccups_is_asked_again(converted, at):
    with serve_uploads(ALICE) as server:
        at(server)
        server.fail["put"] = (503, 2)
        upload(converted, "alice/model")
        assert contents(hub.resolve("alice/model")) == contents(converted)


def test_a_branch_is_made_when_it_is_new(converted, at):
    with serve_uploads(ALICE) as server:
        at(server)
        upload(converted, "alice/model", revision="4-bit")
        upload(converted, "alice/model", revision="4-bit")
        assert server.sent("POST /branch/") == 1
        assert server.commits[0]["revision"] == "4-bit"
        assert hub.resolve("alice/model", revision="4-bit").is_dir()


def test_a_private_upload_is_private(converted, at, monkeypatch):
    with serve_uploads(ALICE) as server:
        at(server)
        upload(converted, "alice/model", private=True)
        assert contents(hub.resolve("alice/model")) == contents(converted)
        at(server, token=None)
        shutil.rmtree(huggingface_hub.constants.HF_HUB_CACHE)
        assert "check the id" in refusal(hub.resolve, "alice/model", error=CheckpointError)


def test_a_private_upload_never_goes_to_a_public_repository(converted, at):
    with serve_uploads(ALICE, {"alice/model": Repo({"README.md": b"x"})}) as server:
        at(server)
        assert "exists and is public" in refusal(upload, converted, "alice/model", private=True)
        assert server.commits == []
        assert server.storage == {}


def test_the_token_of_hf_auth_login_is_used(converted, at):
    with serve_uploads(ALICE) as server:
        at(server, token=None)
        Path(huggingface_hub.constants.HF_TOKEN_PATH).write_text("secret\n")
        check_upload("lab/model")
        upload(converted, "lab/model")
    assert len(server.commits) == 1


# --- folders that are refused before a request ------------------------------------------------------------


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda folder: shutil.rmtree(folder), "has no mlxvr.json"),
        (lambda folder: (folder / "mlxvr.json").unlink(), "has no mlxvr.json"),
        (lambda folder: (folder / "mlxvr.json").write_text("{}"), "names no source"),
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (lambda folder: (folder / "README.md").unlink(), "has no README.md"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b""), "model.safetensors"),
        (lambda folder: cut(folder / "model.safetensors"), "is cut short"),
        (lambda folder: add_a_layer(folder / "config.json"), "lacks the tensor"),
    ],
)
def test_an_incomplete_folder_is_refused_before_any_request(spoil, says, folder, at):
    spoil(folder)
    with serve_uploads(ALICE) as server:
        at(server)
        assert says in refusal(upload, folder, "alice/model", error=CheckpointError)
        assert server.requests == []


def add_a_layer(path: Path) -> None:
    config = json.loads(path.read_text())
    config["text_config"]["num_hidden_layers"] += 1
    path.write_text(json.dumps(config))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    "repo_id", ["model", "", "a/b/c", "alice/", "/model", "alice/mo del", "alice/a--b", "../model"]
)
def test_an_id_that_cannot_be_is_refused_before_any_request(repo_id, converted, at, monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: pytest.fail("the network was touched"))
    for function in (lambda: check_upload(repo_id), lambda: upload(converted, repo_id)):
        assert "expected org/name" in refusal(function)


# --- what the Hub refuses ---------------------------------------------------------------------------------


def fine(**scoped: str) -> Account:
    return Account("alice", "fineGrained", scoped={name.replace("__", "/"): may for name, may in scoped.items()})


@pytest.mark.parametrize(
    ("account", "repo_id", "says"),
    [
        (Account("alice"), "alice/model", None),
        (Account("alice"), "hf://alice/model", None),
        (Account("alice"), "alice/there", None),
        (Account("alice", orgs={"lab": "write"}), "lab/model", None),
        (Account("alice", orgs={"lab": "write"}), "lab/there", None),
        (fine(alice="repo.write"), "alice/model", None),
        (fine(alice__there="repo.write"), "alice/there", None),
        (Account("alice", "read"), "alice/model", "may only read: make one with the role write at http"),
        (Account("alice", "read"), "alice/there", "may only read"),
        (Account("alice"), "bob/model", "no member of bob; expected alice/..."),
        (Account("alice", orgs={"lab": "write"}), "bob/model", "expected alice/... or lab/..."),
        (Account("alice"), "bob/there", "the token may not write to bob/there (403: You don't have the rights"),
        (Account("alice", orgs={"lab": "read"}), "lab/model", "alice may only read in lab"),
        (Account("alice", orgs={"lab": "read"}), "lab/there", "may not write to lab/there (403"),
        (fine(alice="repo.content.read"), "alice/model", "the token of alice may not write"),
        (fine(lab="repo.write"), "alice/model", "the token of alice may not write"),
        (fine(alice__model="repo.write"), "alice/there", "may not write to alice/there (403"),
    ],
)
def test_what_a_token_may_do_is_known_before_the_work_begins(account, repo_id, says, at):
    there = {f"{owner}/there": Repo({"README.md": b"x"}) for owner in ("alice", "bob", "lab")}
    with serve_uploads({"secret": account}, there) as server:
        at(server)
        if says is None:
            check_upload(repo_id)
        else:
            assert says in refusal(check_upload, repo_id)
        assert server.sent("POST ") == server.sent("PUT ") == 0  # it asks, and writes nothing


@pytest.mark.parametrize(
    "ask", [lambda folder: check_upload("alice/model"), lambda folder: upload(folder, "alice/model")]
)
def test_who_is_not_signed_in_is_told_how(ask, converted, at):
    with serve_uploads(ALICE) as server:
        at(server, token=None)
        message = refusal(ask, converted)
        assert "role write" in message
        assert "`hf auth login`" in message
        at(server, token="expired")
        message = refusal(ask, converted)
        assert "does not accept the token" in message
        assert "`hf auth login`" in message
        assert server.commits == []


@pytest.mark.parametrize(
    "ask", [lambda folder: check_upload("alice/model"), lambda folder: upload(folder, "alice/model")]
)
def test_without_a_network(ask, converted, at, monkeypatch):
    with serve_uploads(ALICE) as server:
        at(server)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        assert "HF_HUB_OFFLINE is set" in refusal(ask, converted)
        assert server.requests == []
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    assert f"cannot reach {server.url} for alice/model" in refusal(ask, converted)


@pytest.mark.parametrize(
    ("kind", "status", "says"),
    [
        ("create", 403, "may not write to alice/model (403: ordered by the test)"),
        ("create", 402, "refused the upload to alice/model (402: ordered by the test)"),
        ("create", 429, "limits the rate of requests (429); wait a few minutes, then upload again"),
        ("create", 500, "trouble of its own (500"),
        ("validate", 503, "trouble of its own (503"),
        ("preupload", 401, "does not accept the token (401"),
        ("preupload", 403, "may not write to alice/model (403"),
        ("batch", 429, "limits the rate"),
        ("put", 413, "too large for alice/model (413"),
        ("put", 403, "may not write"),
        ("put", 500, "trouble of its own (500"),
        ("verify", 500, "trouble of its own (500"),
        ("commit", 400, "refused the upload to alice/model (400: ordered by the test)"),
        ("commit", 403, "may not write"),
        ("commit", 404, "no model alice/model"),
        ("commit", 409, "being changed at the same time (409"),
        ("commit", 412, "being changed at the same time (412"),
        ("commit", 413, "too large"),
        ("commit", 429, "(429)"),
    ],
)
def test_refusals_are_one_line_that_says_what_to_do(kind, status, says, converted, at):
    with serve_uploads(ALICE) as server:
        at(server)
        server.fail[kind] = (status, 100)
        assert says in refusal(upload, converted, "alice/model")
        assert server.commits == []


@pytest.mark.parametrize("kind", ["whoami", "auth-check"])
@pytest.mark.parametrize(
    ("status", "says"),
    [(401, "not accept the token"), (403, "403"), (429, "(429); wait"), (500, "trouble of its own (500")],
)
def test_a_hub_that_cannot_be_asked(kind, status, says, at):
    with serve_uploads(ALICE) as server:
        at(server)
        server.fail[kind] = (status, 100)
        assert says in refusal(check_upload, "alice/model")


def test_a_card_that_the_hub_cannot_read(folder, at):
    (folder / "README.md").write_text("---\nlicense: [\n---\n")
    with serve_uploads(ALICE) as server:
        at(server)
        message = refusal(upload, folder, "alice/model")
        assert "refuses the model card" in message
        assert "YAML Metadata Error" in message
        assert "README.md" in message
        assert server.sent("PUT ") == 0


def test_a_converted_folder_that_was_downloaded_can_be_uploaded_again(converted, at):
    with serve_uploads(ALICE) as server:
        at(server)
        upload(converted, "alice/model")
        upload(hub.resolve("alice/model"), "alice/copy")
        assert contents(hub.resolve("alice/copy")) == contents(converted)
        assert json.loads((hub.resolve("alice/copy") / "mlxvr.json").read_bytes())["source"]


# --- the whole way, on the command line -----------------------------------------------------------------------


def test_from_the_hub_to_the_hub(at, tmp_path, capsys):
    source = write_checkpoint(tmp_path / "source", "qwen3_vl", dtype="BF16", shards=2)
    with serve_uploads(ALICE, {"lab/original": Repo(contents(source))}) as server:
        at(server)
        out = tmp_path / "out"
        arguments = ["--hf-path", "lab/original", "--mlx-path", str(out), "--upload-repo", "alice/mine", "--json"]
        assert main(arguments) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["uploaded"].startswith(f"{server.url}/alice/mine/commit/")
        assert report["source"] == "lab/original"
        assert contents(hub.resolve("alice/mine")) == contents(out)
        card = (out / "README.md").read_text()
        assert "# alice/mine\n" in card
        assert "base_model: lab/original" in card
        assert "mlxvr.generate --model alice/mine" in card


def test_a_conversion_whose_upload_would_be_refused_does_not_begin(at, tmp_path, capsys):
    source = write_checkpoint(tmp_path / "source", "qwen3_vl", dtype="BF16")
    with serve_uploads(ALICE) as server:
        at(server)
        arguments = ["--hf-path", str(source), "--mlx-path", str(tmp_path / "out"), "--upload-repo", "club/mine"]
        assert main(arguments) == 2
    assert "may only read in club" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
