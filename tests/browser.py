"""A real browser that reaches this machine alone; tests of pages are left out where there is none."""

import shutil
import subprocess

import pytest


BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
SCHEMES = {"dark": 0, "light": 1}  # as Blink numbers them


def show(page, folder, *, scheme="light", proxy=None):
    """Open a page, let its scripts run to the end, and return what it holds then.

    Args:
        page: URL, of this machine.
        folder: Scratch folder.
        scheme: The colours that the user prefers, "light" or "dark".
        proxy: Host and port that all requests go to, those of this machine, too.
    """
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}", "--no-first-run"]
    options += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    options += ["--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1"]
    options += [f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}"]
    if proxy is not None:
        options += [f"--proxy-server=http://{proxy}", "--proxy-bypass-list=<-loopback>"]
    command = [BROWSER, *options, "--virtual-time-budget=20000", "--dump-dom", page]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
