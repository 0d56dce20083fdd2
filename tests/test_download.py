"""download.sh against a local server that fails in one way at a time: the right files appear, or none does."""

import hashlib
import os
import shutil
import signal
import subprocess
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(os.name == "nt", reason="builds a PATH from symbolic links; run it in WSL")

SCRIPT = Path(__file__).parents[1] / "download.sh"
TRAIN, VALID = "TinyStoriesV2-GPT4-train.txt", "TinyStoriesV2-GPT4-valid.txt"
FILES = {TRAIN: b"Once upon a time there was a cat.\n" * 9000, VALID: b"The end.\n" * 300}
HALF = len(FILES[TRAIN]) // 2
REVISION = "f54c09fd23315a6f9c86f9dc80f725de7d8f9c64"
HTML = b"<!doctype html><title>not a story</title>"
TOOLS = ["awk", "bash", "cat", "cut", "dirname", "mkdir", "mv", "rm", "sed", "sleep", "tail", "wc"]


class Handler(BaseHTTPRequestHandler):
    """Answers with the next entry of `server.plan`, or properly once the plan is used up."""

    def do_GET(self):
        self.server.requests.append((self.path, self.headers.get("Range")))
        answer = self.server.plan.pop(0) if self.server.plan else ranged
        answer(self, FILES[self.path.rsplit("/", 1)[-1]])

    def reply(self, status, body, length=None, **headers):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def ranged(handler, content, sent=None):
    """Honour Range, and break off after `sent` bytes."""
    header = handler.headers.get("Range")
    start = int(header.removeprefix("bytes=").split("-")[0]) if header else 0
    rest = content[start:]
    span = {"Content_Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if header else {}
    handler.reply(206 if header else 200, rest[:sent], length=len(rest), **span)


def cut(handler, content):
    ranged(handler, content, sent=HALF)


def quarter(handler, content):
    ranged(handler, content, sent=HALF // 2)


def silent(handler, content, sent=HALF):
    ranged(handler, content, sent)
    handler.server.released.wait()


def stalled(handler, content):
    silent(handler, content, sent=1000)  # little: curl compares its average over five seconds with the limit


def whole(handler, content):
    handler.reply(200, content)


def wrong(handler, content):
    handler.reply(200, content[:-1] + b"?")


def too_long(handler, content):
    handler.reply(200, content + b"more")


def page(status):
    return lambda handler, _content: handler.reply(status, HTML, Content_Type="text/html")


def redirect(handler, _content):
    handler.reply(302, HTML, Location="/storage" + handler.path)


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.plan, server.requests, server.released = [], [], threading.Event()
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.released.set()
    server.shutdown()
    thread.join()
    server.server_close()


class Checkout:
    """A folder that holds download.sh, and a PATH with only the tools named here. Without `df` no space is checked."""

    def __init__(self, root, server, *tools):
        self.root = root / "a checkout"
        self.data = self.root / "data" / "tinystories"
        self.bin = root / "bin"
        self.data.mkdir(parents=True)
        self.bin.mkdir()
        shutil.copy(SCRIPT, self.root)
        hasher = "sha256sum" if shutil.which("sha256sum") else "shasum"
        for tool in (*TOOLS, hasher, *tools):
            if shutil.which(tool) is None:
                pytest.skip(f"{tool} is not installed")
            (self.bin / tool).symlink_to(shutil.which(tool))
        manifest = root / "manifest"
        lines = (f"{len(text)} {hashlib.sha256(text).hexdigest()} {name}\n" for name, text in FILES.items())
        manifest.write_text("".join(lines), encoding="utf-8")
        self.env = {"PATH": str(self.bin), "HOME": str(root), "LC_ALL": "C", "HF_ENDPOINT": server.url}
        self.env |= {"DOWNLOAD_RETRY_SECONDS": "0", "DOWNLOAD_STALL_SECONDS": "1", "DOWNLOAD_MANIFEST": str(manifest)}

    def start(self, shell="bash"):
        """Start download.sh from another working directory, as the leader of its own process group."""
        return subprocess.Popen(
            [shutil.which(shell), str(self.root / "download.sh")],
            env=self.env,
            cwd=self.root.parent,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            # a suite that runs in the background ignores Ctrl-C, and a shell cannot trap what it was born ignoring
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def run(self, shell="bash"):
        """Return the exit status and everything that was printed."""
        process = self.start(shell)
        output, _ = process.communicate(timeout=30)
        return process.returncode, output

    def there(self):
        return {path.name: path.read_bytes() for path in self.data.iterdir()}

    def wait_for_half(self):
        part = self.data / (TRAIN + ".part")
        deadline = time.monotonic() + 30
        while not part.exists() or part.stat().st_size < HALF - 16384:
            assert time.monotonic() < deadline, "the download did not reach its half"
            time.sleep(0.01)


@pytest.fixture(params=["curl", "wget"])
def checkout(request, tmp_path, server):
    return Checkout(tmp_path, server, request.param)


def offsets(server, name=TRAIN):
    """First byte asked for by each request for `name`."""
    headers = [header for path, header in server.requests if path.endswith(name)]
    return [int(header.removeprefix("bytes=").rstrip("-")) if header else 0 for header in headers]


def test_both_files_come_and_a_second_run_asks_for_nothing(checkout, server):
    status, output = checkout.run()
    assert status == 0, output
    assert checkout.there() == FILES
    folder = f"/datasets/roneneldan/TinyStories/resolve/{REVISION}/"
    assert [path for path, _ in server.requests] == [folder + TRAIN, folder + VALID]
    assert output.rstrip().endswith("python pre_tokenize.py")
    server.requests.clear()
    status, output = checkout.run()
    assert status == 0 and output.count("already there") == 2
    assert server.requests == [] and checkout.there() == FILES


def test_the_script_is_executable_and_needs_no_modern_bash(tmp_path, server):
    assert os.access(SCRIPT, os.X_OK)
    status, output = Checkout(tmp_path, server, "curl").run("sh")  # a smaller language than bash 3.2 where sh is dash
    assert status == 0, output


@pytest.mark.parametrize(
    ("plan", "expected_offsets"),
    [
        pytest.param([redirect], [0, 0], id="redirect"),
        pytest.param([cut], [0, HALF], id="short body"),
        pytest.param([stalled], [0, 1000], id="stall"),
        pytest.param([page(503), page(429)], [0, 0, 0], id="busy server"),
        pytest.param([cut, page(416)], [0, HALF, 0], id="416"),
        pytest.param([wrong], [0, 0], id="wrong bytes"),
        pytest.param([too_long], [0, 0], id="too long"),
        pytest.param([page(200)], [0, 0], id="another page"),
        pytest.param([cut, page(200)], [0, HALF, 0], id="another page instead of the rest"),
        pytest.param(
            ([quarter] + [page(503)] * 4) * 2, [0] + [HALF // 2] * 5 + [HALF] * 5, id="progress renews the retries"
        ),
    ],
)
def test_survives_one_fault(checkout, server, plan, expected_offsets):
    server.plan += plan
    status, output = checkout.run()
    assert status == 0, output
    assert checkout.there() == FILES
    assert offsets(server) == expected_offsets


def test_ignored_range(checkout, server):
    server.plan += [cut, whole]
    status, output = checkout.run()
    assert status == 0, output
    assert checkout.there() == FILES
    # curl refuses the answer and starts over once; wget skips what it has
    assert offsets(server) in ([0, HALF, 0], [0, HALF])


@pytest.mark.parametrize(
    ("plan", "came", "requests"),
    [
        pytest.param([page(404)], "HTTP 404", 1, id="404"),
        pytest.param([page(403)], "HTTP 403", 1, id="403"),
        pytest.param([page(503)] * 9, "HTTP 503", 6, id="503 for ever"),
        pytest.param([wrong] * 9, hashlib.sha256(FILES[TRAIN][:-1] + b"?").hexdigest(), 2, id="wrong for ever"),
        pytest.param([too_long] * 9, f"{len(FILES[TRAIN]) + 4} bytes", 2, id="too long for ever"),
        pytest.param([page(200)] * 9, f"{len(HTML)} bytes", 2, id="another page for ever"),
        pytest.param([page(416)] * 9, "HTTP 416", 2, id="416 for ever"),
    ],
)
def test_gives_up_with_what_was_expected_and_what_came(checkout, server, plan, came, requests):
    server.plan += plan
    status, output = checkout.run()
    assert status == 1
    assert checkout.there() == {}
    message = output[output.index("could not be downloaded") :]
    assert f"{len(FILES[TRAIN])} bytes, SHA-256 {hashlib.sha256(FILES[TRAIN]).hexdigest()}" in message
    assert came in message and TRAIN in message and "HF_ENDPOINT" in message
    assert len(server.requests) == requests


def test_server_refuses_the_connection_and_the_next_run_continues(checkout, server):
    part = checkout.data / (TRAIN + ".part")
    part.write_bytes(FILES[TRAIN][:HALF])
    checkout.env["HF_ENDPOINT"] = "http://127.0.0.1:1"
    status, output = checkout.run()
    assert status == 1 and "HTTP 0" in output and "onnect" in output
    assert checkout.there() == {part.name: FILES[TRAIN][:HALF]}
    checkout.env["HF_ENDPOINT"] = server.url + "/mirror/"
    assert checkout.run()[0] == 0
    assert checkout.there() == FILES and offsets(server) == [HALF]
    assert server.requests[0][0].startswith("/mirror/datasets/")


@pytest.mark.parametrize("part", [FILES[TRAIN], FILES[TRAIN] + b"more", b"?" * HALF], ids=["complete", "long", "wrong"])
def test_part_file_of_an_earlier_run(checkout, server, part):
    (checkout.data / (TRAIN + ".part")).write_bytes(part)
    status, output = checkout.run()
    assert status == 0, output
    assert checkout.there() == FILES
    assert offsets(server) == {len(FILES[TRAIN]): [], HALF: [HALF, 0]}.get(len(part), [0])


@pytest.mark.parametrize("bad", [FILES[TRAIN] + b"x", FILES[TRAIN][:-1], b"?" * len(FILES[TRAIN]), HTML])
def test_bad_final_file_is_replaced_only_by_the_right_one(checkout, server, bad):
    (checkout.data / TRAIN).write_bytes(bad)
    server.plan += [page(404)]
    status, output = checkout.run()
    assert status == 1 and "not the official file" in output
    assert checkout.there() == {TRAIN: bad}
    assert checkout.run()[0] == 0
    assert checkout.there() == FILES


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_killed_half_way_then_continued(checkout, server, number):
    server.plan += [silent]
    checkout.env["DOWNLOAD_STALL_SECONDS"] = "30"
    process = checkout.start()
    checkout.wait_for_half()
    status, output = checkout.run()  # a second one at the same time
    assert status == 1 and "another download is running" in output
    process.send_signal(number)
    if number == signal.SIGKILL:  # only the script died: what it started still writes
        process.wait(timeout=30)
        assert "another download is running" in checkout.run()[1]
        os.killpg(process.pid, signal.SIGKILL)
        (checkout.data / ".download.lock").unlink()  # a container without an init process may keep the pid as a zombie
    else:
        assert "run ./download.sh again" in process.communicate(timeout=30)[0]
        assert set(checkout.there()) == {TRAIN + ".part"}
    process.stdout.close()
    kept = (checkout.data / (TRAIN + ".part")).read_bytes()
    assert kept and FILES[TRAIN].startswith(kept)
    status, output = checkout.run()
    assert status == 0, output
    assert checkout.there() == FILES
    assert offsets(server) == [0, len(kept)]


def test_lock_of_a_dead_run_is_ignored(tmp_path, server):
    checkout = Checkout(tmp_path, server, "curl")
    dead = subprocess.Popen(["true"])
    dead.wait()
    (checkout.data / ".download.lock").write_text(f"{dead.pid} {dead.pid}\n", encoding="utf-8")
    status, output = checkout.run()
    assert status == 0, output
    assert checkout.there() == FILES


def test_without_curl_and_wget_it_says_what_to_do_by_hand(tmp_path, server):
    checkout = Checkout(tmp_path, server)
    status, output = checkout.run()
    assert status == 1 and "neither curl nor wget" in output
    assert all(f"{REVISION}/{name}" in output for name in FILES) and str(checkout.data) in output


def test_full_disk_is_told_before_any_request(tmp_path, server):
    checkout = Checkout(tmp_path, server, "curl")
    df = checkout.bin / "df"  # names with blanks, as Git Bash prints them
    df.write_text('#!/bin/sh\necho "C:/Program Files/Git 900000 899900 100 99% /my disk"\n', encoding="utf-8")
    df.chmod(0o755)
    status, output = checkout.run()
    assert status == 1 and "0 MB are free" in output
    assert server.requests == [] and checkout.there() == {}


def test_a_normal_run_accepts_only_the_official_files(tmp_path, server):
    checkout = Checkout(tmp_path, server, "curl")
    del checkout.env["DOWNLOAD_MANIFEST"]
    for name, text in FILES.items():
        (checkout.data / name).write_bytes(text)
    server.plan += [page(404)]
    status, output = checkout.run()
    assert status == 1 and output.count("not the official file") == 1
    assert "2227753162 bytes, SHA-256 6418d412de72888f52b5142c761ac21a582f7d1166f0bfbdb5f03ccfdec90443" in output
    assert checkout.there() == FILES
    script = SCRIPT.read_text(encoding="utf-8")
    assert f"22502601 6874bae9a4c1a4e7edcf0e53b86c17817e9cf881fc75ff2368da457b80c0585d {VALID}" in script
