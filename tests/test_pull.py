"""Fetching official files: resumed, complete or not there, one clear line without a network."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from official_checkpoints import make_files

from milo_latent.cli import main
from milo_latent.convert import diffbir, pull
from milo_latent.diffbir.versions import FILES, OfficialFile

CONTENT = bytes(range(256)) * 40


class Handler(BaseHTTPRequestHandler):
    """Serves CONTENT, or files; cuts the first answer of "/cut" short; "/whole" knows no ranges."""

    requests: list = []  # noqa: RUF012
    folder = None

    def do_GET(self):
        self.requests.append((self.path, self.headers.get("Range")))
        if self.path == "/absent":
            self.send_error(404, "Not Found")
            return
        content = CONTENT if self.folder is None else (self.folder / self.path[1:]).read_bytes()
        wanted = self.headers.get("Range") if self.path != "/whole" else None
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
        if start >= len(content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(content)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        cut = self.path == "/cut" and len(self.requests) == 1
        self.wfile.write(content[start : start + 1000] if cut else content[start:])

    def log_message(self, *arguments):
        pass


@pytest.fixture
def address(monkeypatch):
    for name in ("HF_HUB_OFFLINE", "HF_ENDPOINT", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Handler, "requests", [])
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_an_interrupted_fetch_goes_on_where_it_stopped(address, tmp_path):
    with pytest.raises(OSError, match="part that came is kept"):
        pull.fetch(f"{address}/cut", tmp_path / "file.ckpt")
    assert not (tmp_path / "file.ckpt").exists()
    assert (tmp_path / "file.ckpt.partial").stat().st_size == 1000
    assert pull.fetch(f"{address}/cut", tmp_path / "file.ckpt").read_bytes() == CONTENT
    assert [wanted for _, wanted in Handler.requests] == [None, "bytes=1000-"]
    assert [path.name for path in tmp_path.iterdir()] == ["file.ckpt"]


def test_a_part_that_is_the_whole_is_taken(address, tmp_path):
    (tmp_path / "file.ckpt.partial").write_bytes(CONTENT)
    assert pull.fetch(f"{address}/file", tmp_path / "file.ckpt").read_bytes() == CONTENT


def test_a_server_without_ranges_sends_everything_again(address, tmp_path):
    (tmp_path / "file.ckpt.partial").write_bytes(b"old")
    assert pull.fetch(f"{address}/whole", tmp_path / "file.ckpt").read_bytes() == CONTENT


def test_files_at_hand_are_not_fetched_again(address, tmp_path):
    (tmp_path / "file.ckpt").write_bytes(b"mine")
    assert pull.fetch(f"{address}/file", tmp_path / "file.ckpt").read_bytes() == b"mine"
    assert Handler.requests == []


def test_an_absent_file_is_told_with_the_way_out(address, tmp_path):
    with pytest.raises(OSError, match=r"404 Not Found\. Download it by hand and put it at"):
        pull.fetch(f"{address}/absent", tmp_path / "file.ckpt")


def test_a_mirror_of_the_hub_is_used(address, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", address + "/")
    pull.fetch("https://huggingface.co/owner/file", tmp_path / "file.ckpt")
    assert Handler.requests == [("/owner/file", None)]


def test_offline_means_offline(address, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(OSError, match="HF_HUB_OFFLINE is set"):
        pull.fetch(f"{address}/file", tmp_path / "file.ckpt")
    assert Handler.requests == []


def test_a_version_needs_the_files_of_the_official_table():
    assert pull.official_files("v2", "sr") == {"sd": "sd_v2.1", "controlnet": "v2", "cleaner": "bsrnet"}
    faces = pull.official_files("v2.1", "unaligned_face")
    assert (faces["cleaner"], faces["background"]) == ("swinir_face", "swinir_realesrgan")


@pytest.fixture
def tiny_release(address, tmp_path, monkeypatch):
    """The official addresses, as if tiny networks lay there."""
    tiny = make_files(tmp_path)
    monkeypatch.setattr(Handler, "folder", tmp_path)
    names = {"sd": "sd_v2.1_zsnr", "controlnet": "v2.1", "cleaner": "swinir_realesrgan"}
    files = {
        names[part]: OfficialFile(f"{address}/{path.name}", FILES[names[part]].cleaner)
        for part, path in tiny.files.items()
    }
    monkeypatch.setattr(pull, "FILES", files)
    whole = diffbir.find_cleaner
    monkeypatch.setattr(
        diffbir, "find_cleaner", lambda state, kind, config, **rest: whole(state, kind, tiny.configs["cleaner"], **rest)
    )
    return tiny


def test_pull_fetches_and_converts_in_one_command(tiny_release, tmp_path, capsys):
    out = tmp_path / "pipeline"
    command = ["convert", "pull", "--version", "v2.1", "--task", "sr", "-o", str(out), "--tokenizer", "none"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "takes prompt_embeds, no tokenizer" in printed
    assert "The fetched files stay in" in printed
    assert (out / "model_index.json").is_file()
    assert {path.name for path in pull.downloads_dir().iterdir()} == {p.name for p in tiny_release.files.values()}
    Handler.requests.clear()
    assert main([*command[:7], str(tmp_path / "again"), "--tokenizer", "none"]) == 0
    assert Handler.requests == []  # the files were there


def test_nothing_is_fetched_for_a_folder_that_is_taken(tiny_release, tmp_path, capsys):
    assert main(["convert", "pull", "--version", "v2.1", "--task", "sr", "-o", str(tmp_path)]) == 1
    assert "holds something" in capsys.readouterr().err
    assert Handler.requests == []
