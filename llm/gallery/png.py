"""A picture as PNG: a browser draws the SVG, since browsers draw text and colours as they are meant."""

import math
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)
INSTALL = "apt-get install -y chromium"


def find_browser() -> str | None:
    return next((path for name in BROWSERS if (path := shutil.which(name))), None)


def as_png(svg: str, scale: float = 2) -> bytes:
    """The picture with `scale` pixels for each of its units.

    Raises RuntimeError, with the command that installs one, where there is no browser.
    """
    browser = find_browser()
    if browser is None:
        raise RuntimeError(f"no browser to draw a PNG with: install Chromium ({INSTALL}), or write an .svg instead")
    width, height = (math.ceil(float(size)) for size in re.search(r'width="([\d.]+)" height="([\d.]+)"', svg).groups())
    with tempfile.TemporaryDirectory() as folder:
        page, picture = Path(folder) / "picture.html", Path(folder) / "picture.png"
        page.write_text(f"<body style='margin:0'>{svg}</body>", encoding="utf-8")
        size = [f"--window-size={width},{height}", f"--force-device-scale-factor={scale}"]
        command = [browser, *FLAGS, f"--user-data-dir={folder}/profile", *size, f"--screenshot={picture}"]
        subprocess.run([*command, page.as_uri()], check=True, capture_output=True, timeout=120)
        return picture.read_bytes()
