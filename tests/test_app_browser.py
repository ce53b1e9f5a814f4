"""The app in a real browser, with a tiny model: pip install -e ".[app]" playwright, and a Chromium of the system."""

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("gradio", reason="needs gradio, of the extra `app`")
sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium, such as Debian's package chromium"),
]
PATIENCE = 120_000  # milliseconds, for machines that are busy


@pytest.fixture(scope="module")
def temporary(tmp_path_factory):
    return tmp_path_factory.mktemp("temporary")


@pytest.fixture(scope="module")
def address(model_folder, temporary):
    """The address of an app of its own process, which is ended as services are, and leaves no file behind."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "milo_latent", "app", "--model", model_folder, "--device", "cpu"]
    limits = ["--port", str(port), "--max-megabytes", "1", "--max-megapixels", "1"]
    environment = os.environ | {"TMPDIR": str(temporary), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen([*command, *limits], stdout=subprocess.PIPE, text=True, env=environment) as server:
        try:
            assert f"http://127.0.0.1:{port}" in server.stdout.readline()
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
            assert server.wait(60) == 0
    assert list(temporary.glob("milo_latent-*")) == []


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def visit(browser, address):
    """Return pages of users of their own; no page may ask another host for anything."""
    asked: list[str] = []
    with contextlib.ExitStack() as stack:

        def open_page():
            context = stack.enter_context(contextlib.closing(browser.new_context(accept_downloads=True)))
            page = context.new_page()
            page.set_default_timeout(PATIENCE)
            page.on("request", lambda request: asked.append(request.url))
            page.goto(address)
            page.wait_for_selector("#restore")
            return page

        yield open_page
    assert asked
    assert [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []


def drop(page, path, place="#photo"):
    page.set_input_files(f"{place} input[type=file]", path)
    page.wait_for_selector(f"{place} img", state="attached")


def wait_for_status(page, text):
    page.wait_for_function("text => document.querySelector('#status').innerText.includes(text)", arg=text)


def download(page, folder):
    with page.expect_download() as waiting:
        page.click("#download")
    path = folder / waiting.value.suggested_filename
    waiting.value.save_as(path)
    return path


def test_a_photo_is_restored_compared_and_downloaded(visit, photo, tmp_path):
    page = visit()
    drop(page, photo)
    page.get_by_text("Compare with a clean reference").click()
    drop(page, photo, "#reference")
    page.fill("#seed input", "5")
    page.click("#restore")
    wait_for_status(page, "Restored in")
    page.wait_for_selector("#masks img >> nth=3")
    page.wait_for_selector("#map img")
    assert "Result" in page.inner_text("#numbers")

    shown = page.locator("#slider img")
    assert shown.count() == 2
    sizes = shown.evaluate_all("images => images.map(image => [image.naturalWidth, image.naturalHeight])")
    assert sizes == [[61, 45], [61, 45]]
    place = page.locator("#slider img").nth(0).bounding_box()
    middle = place["y"] + place["height"] / 2
    before = shown.nth(1).get_attribute("style")
    page.mouse.move(place["x"] + place["width"] / 2, middle)
    page.mouse.down()
    page.mouse.move(place["x"] + place["width"] / 4, middle, steps=5)
    page.mouse.up()
    assert "50%" in before
    cut = re.search(r"([\d.]+)%", shown.nth(1).get_attribute("style"))[1]
    assert 23 < float(cut) < 27

    path = download(page, tmp_path)
    assert path.name == "photo_restored.png"
    with Image.open(path) as picture:
        settings = json.loads(picture.text["milo_latent"])["settings"]
    assert (settings["stage"], settings["seed"], settings["steps"]) == ("all", 5, 4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.write_bytes(b"\x89PNG no picture"), "which is damaged or another file"),
        (lambda path: Image.new("L", (1001, 1000)).save(path), "at most 1000000 pixels, got 1001x1000 in bad.png"),
    ],
)
def test_a_bad_file_is_told_and_the_next_photo_is_restored(visit, photo, tmp_path, make, message):
    make(tmp_path / "bad.png")
    page = visit()
    drop(page, tmp_path / "bad.png")
    page.click("#restore")
    page.get_by_text(message).wait_for()
    wait_for_status(page, "Not restored")
    page.click("#photo button[aria-label='Clear'], #photo button[title='Clear'], #photo .icon-button")
    drop(page, photo)
    page.click("#restore:not([disabled])")
    wait_for_status(page, "Restored in")


def test_an_upload_above_the_limit_is_refused(visit, tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (700, 700, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "large.png")
    page = visit()
    page.set_input_files("#photo input[type=file]", tmp_path / "large.png")
    page.wait_for_timeout(1500)
    page.screenshot(path=tmp_path / "large_page.png")
    page.click("#restore")
    page.get_by_text("Drop a photo first").wait_for()


def test_two_users_at_once_get_their_own_photos(visit, images, tmp_path):
    users, photos = [visit(), visit()], [images / "0.png", images / "1.png"]
    for page, path in zip(users, photos, strict=True):
        drop(page, path)
    for page in users:
        page.click("#restore")
    for number, (page, path) in enumerate(zip(users, photos, strict=True)):
        wait_for_status(page, "Restored in")
        (tmp_path / str(number)).mkdir()
        assert download(page, tmp_path / str(number)).name == f"{path.stem}_restored.png"
    assert (tmp_path / "0" / "0_restored.png").read_bytes() != (tmp_path / "1" / "1_restored.png").read_bytes()


def test_a_phone_shows_the_page_without_scrolling_sideways(visit, photo):
    page = visit()
    page.set_viewport_size({"width": 390, "height": 844})
    drop(page, photo)
    page.get_by_text("Compare with a clean reference").click()
    drop(page, photo, "#reference")
    page.click("#restore")
    wait_for_status(page, "Restored in")
    page.wait_for_selector("#map img")
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    columns = page.evaluate("getComputedStyle(document.querySelector('#masks .grid-container')).gridTemplateColumns")
    assert len(columns.split()) == 2


def test_cancel_stops_and_leaves_the_model_to_the_next(visit, photo, tmp_path):
    Image.new("RGB", (900, 900), "red").save(tmp_path / "red.png")
    page = visit()
    drop(page, tmp_path / "red.png")
    page.fill("#steps input[type=number]", "100")
    page.press("#steps input[type=number]", "Enter")
    page.click("#restore")
    wait_for_status(page, "step 1 of 100")
    page.click("#cancel")
    wait_for_status(page, "Cancelled")
    other = visit()
    drop(other, photo)
    other.click("#restore")
    wait_for_status(other, "Restored in")
    page.wait_for_timeout(1500)
    assert "Cancelled" in page.inner_text("#status")
    assert page.locator("#restore").is_enabled()


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "{repository}/README.md", "{temporary}/secret.txt", "%2e%2e/README.md"]
)
def test_no_other_file_can_be_reached(address, repository, temporary, path):
    (temporary / "secret.txt").write_text("secret")
    path = path.format(repository=repository, temporary=temporary)
    for prefix in ("/gradio_api/file=", "/file=", "/static/", "/"):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"{address}{prefix}{path}", timeout=60)
        assert refused.value.code in (403, 404, 405)


def test_a_path_in_place_of_an_upload_is_refused(address, repository):
    """As a program would send it: the page's events are private, but their addresses can be guessed."""
    photo = {"path": str(repository / "examples" / "cat_noisy.png"), "meta": {"_type": "gradio.FileData"}}
    with urllib.request.urlopen(f"{address}/config", timeout=60) as answer:
        events = json.load(answer)["dependencies"]
    event = next(each["id"] for each in events if len(each["inputs"]) == 9)
    data = [photo, None, "denoise", "all", 1.0, 0.5, "cosine", 4, 0]
    body = json.dumps({"data": data, "fn_index": event, "session_hash": "guess"}).encode()
    join = urllib.request.Request(f"{address}/gradio_api/queue/join", body, {"Content-Type": "application/json"})
    try:
        urllib.request.urlopen(join, timeout=60).close()
    except urllib.error.HTTPError:
        return
    with urllib.request.urlopen(f"{address}/gradio_api/queue/data?session_hash=guess", timeout=60) as stream:
        told = ""
        while "process_completed" not in told:
            told += stream.readline().decode()
    assert '"success":false' in told.replace(" ", "")
    assert "cat_noisy_restored" not in told


def test_it_listens_at_this_machine_alone(address):
    port = int(address.rpartition(":")[2])
    inodes = Path("/proc/net/tcp")
    if not inodes.is_file():
        pytest.skip("needs Linux's table of sockets")
    listening = [line.split()[1] for line in inodes.read_text().splitlines()[1:] if line.split()[3] == "0A"]
    assert [each for each in listening if each.endswith(f":{port:04X}")] == [f"0100007F:{port:04X}"]
