"""Fetching official files by the libraries: resumed, checked, one clear line without a network."""

import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import constants
from official_checkpoints import make_files

from milo_latent.cli import main
from milo_latent.convert import diffbir, pull
from milo_latent.diffbir.versions import FILES, OfficialFile

CONTENT = bytes(range(256)) * 40
ON_HUB = "https://huggingface.co/owner/name/resolve/main/"


class Handler(BaseHTTPRequestHandler):
    """Serves CONTENT, or files, with the hub's headers; 1000 bytes of "cut" once, and a page for "page"."""

    requests: list = []  # noqa: RUF012
    revisions: set = set()  # noqa: RUF012
    folder = None

    def do_HEAD(self):
        self.answer(head=True)

    def do_GET(self):
        self.answer(head=False)

    def answer(self, head):
        name = self.path.rpartition("/")[2]
        if self.path.startswith("/api/"):  # what the hub's library asks for by itself
            self.send_error(404)
            return
        if not head:
            self.requests.append((name, self.headers.get("Range")))
        if name == "absent":
            self.send_response(404, "Not Found")
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        content = CONTENT if self.folder is None else (self.folder / name).read_bytes()
        if name == "page":
            content = b"<!DOCTYPE html><html>Please log in</html>"
        wanted = self.headers.get("Range")
        start = int(wanted.removeprefix("bytes=").split("-")[0]) if wanted else 0
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.send_header("Accept-Ranges", "bytes")
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        if name != "page":
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", "0" * 40)
        self.end_headers()
        self.revisions.add(self.path.split("/")[-2])
        if name == "changed":
            content = content[:-1] + b"?"
        if not head:
            cut = name == "cut" and len(self.requests) == 1
            self.wfile.write(content[start : start + 1000] if cut else content[start:])

    def log_message(self, *arguments):
        pass


@pytest.fixture
def address(monkeypatch):
    """The address of a server that stands for GitHub and, at the hub's addresses, for the hub."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Handler, "requests", [])
    monkeypatch.setattr(Handler, "revisions", set())
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    found = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", found)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", found + "/{repo_id}/resolve/{revision}/{filename}")
    yield found
    server.shutdown()
    server.server_close()


@pytest.fixture
def fetch(address, tmp_path, monkeypatch):
    """Fetch a file by its address, of which a SHA-256 or a size may be published."""

    def fetch_address(url, published=""):
        monkeypatch.setattr(pull, "FILES", {"file": OfficialFile(url.replace("{server}", address))})
        monkeypatch.setattr(pull, "PUBLISHED", {"file": published} if published else {})
        return pull.fetch("file", tmp_path)

    return fetch_address


@pytest.mark.parametrize("place", [ON_HUB, "{server}/"])
def test_a_file_is_fetched_once_and_checked_each_time(fetch, place):
    digest = hashlib.sha256(CONTENT).hexdigest()
    path = fetch(place + "weights.pth", digest)
    assert path.read_bytes() == CONTENT
    assert fetch(place + "weights.pth", digest) == path
    assert len(Handler.requests) == 1
    path.write_bytes(b"changed")
    with pytest.raises(ValueError, match=rf"SHA-256 {digest} of the official weights\.pth.*Delete it"):
        fetch(place + "weights.pth", digest)


def test_an_interrupted_fetch_from_the_hub_is_resumed(fetch, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 500)
    assert fetch(ON_HUB + "cut", hashlib.sha256(CONTENT).hexdigest()).read_bytes() == CONTENT
    assert [wanted for _, wanted in Handler.requests] == [None, "bytes=1000-"]


def test_a_cut_body_is_refused(fetch):
    with pytest.raises(ValueError, match="damaged"):
        fetch("{server}/cut", hashlib.sha256(CONTENT).hexdigest())


def test_a_page_in_place_of_a_file_is_refused_in_one_line(fetch, tmp_path):
    with pytest.raises(ValueError, match="error page") as caught:
        fetch("{server}/page", "0" * 64)
    assert "\n" not in str(caught.value)
    (tmp_path / "page").unlink()
    with pytest.raises(OSError, match=r"Could not fetch .* Download it by hand") as caught:
        fetch(ON_HUB + "page")
    assert "\n" not in str(caught.value)


def test_what_the_hub_sends_has_the_checksum_that_it_tells(fetch, tmp_path):
    """Also where no checksum is published: a body of the right length that was changed on its way is not kept."""
    with pytest.raises(OSError, match=r"Could not fetch .* sent another, which is not kept"):
        fetch(ON_HUB + "changed")
    assert not (tmp_path / "changed").exists()
    assert fetch(ON_HUB + "weights.pth").read_bytes() == CONTENT
    assert Handler.revisions == {"main", "0" * 40}  # the file is that of the commit which was told


def test_a_size_is_compared_as_the_hub_writes_it(fetch, tmp_path):
    with pytest.raises(ValueError, match=r"a size of 90\.2 MB of the official weights\.pth, got 0\.0 MB"):
        fetch(ON_HUB + "weights.pth", "90.2 MB")
    with (tmp_path / "large.ckpt").open("wb") as file:
        file.truncate(5_163_000_000)  # takes no space
    assert fetch(ON_HUB + "large.ckpt", "5.16 GB") == tmp_path / "large.ckpt"


@pytest.mark.parametrize("place", [ON_HUB, "{server}/"])
def test_an_absent_file_is_told_with_the_way_out(fetch, place):
    with pytest.raises(OSError, match=r"404.*Download it by hand and put it at") as caught:
        fetch(place + "absent")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("place", [ON_HUB, "{server}/"])
def test_offline_means_offline(fetch, monkeypatch, place):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match="HF_HUB_OFFLINE is set"):
        fetch(place + "file")
    assert Handler.requests == []


def test_what_is_published_is_of_the_official_files():
    assert pull.PUBLISHED.keys() == FILES.keys() - {"v1_face", "v1_general"}
    for expected in pull.PUBLISHED.values():
        assert len(expected) == 64 or expected.endswith((" GB", " MB"))
    places = [pull.HUB_ADDRESS.fullmatch(file.url) for file in FILES.values()]
    assert sum(place is not None for place in places) == len(FILES) - 2  # BSRNet and SCUNet are on GitHub


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
        names[part]: OfficialFile(ON_HUB + path.name, FILES[names[part]].cleaner) for part, path in tiny.files.items()
    }
    monkeypatch.setattr(pull, "FILES", files)
    monkeypatch.setattr(pull, "PUBLISHED", {})
    whole = diffbir.find_network
    configs = {"SwinIR": tiny.configs["cleaner"]}
    monkeypatch.setattr(
        diffbir, "find_network", lambda kind, state, config, **rest: whole(kind, state, configs.get(kind), **rest)
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
    kept = {path.name for path in pull.downloads_dir().iterdir() if path.is_file()}
    assert kept == {path.name for path in tiny_release.files.values()}
    Handler.requests.clear()
    assert main([*command[:7], str(tmp_path / "again"), "--tokenizer", "none"]) == 0
    assert Handler.requests == []  # the files were there


def test_nothing_is_fetched_for_a_folder_that_is_taken(tiny_release, tmp_path, capsys):
    assert main(["convert", "pull", "--version", "v2.1", "--task", "sr", "-o", str(tmp_path)]) == 1
    assert "holds something" in capsys.readouterr().err
    assert Handler.requests == []
