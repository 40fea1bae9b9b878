"""A real headless Chromium: what a page shows, what it complains of, and what it asks the network for."""

import json
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
INSTALL = "no Chromium found: install one (Debian, Ubuntu: apt-get install chromium) or name one in the variable CHROME"
# A browser asks for updates and the like by itself: these flags end most of it, and names lead nowhere.
QUIET = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--no-pings"),
    *("--disable-background-networking", "--disable-component-update", "--disable-default-apps", "--disable-sync"),
    *("--disable-extensions", "--disable-domain-reliability", "--disable-client-side-phishing-detection"),
    *("--disable-features=NetworkTimeServiceQuerying", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"),
)
VOID = {"meta", "link", "br", "hr", "img", "input", "col", "base", "wbr", "area", "embed", "source", "track"}
# What the browser asks for on its own account comes from no page.
NO_PAGE = "not an origin"


def find_browser() -> str | None:
    """Return the browser's path: the one named by ``CHROME``, else the first of the usual names."""
    for name in filter(None, (os.environ.get("CHROME"), *NAMES)):
        if path := shutil.which(name):
            return path
    return None


@dataclass
class Element:
    """An element of the page as it stands: its tag, attributes, and all text within it."""

    tag: str
    attributes: dict[str, str]
    text: str = ""


@dataclass
class Visit:
    """What came of opening a page.

    Attributes:
        elements: All elements in document order.
        console: Lines that the page wrote to the console, errors of scripts and of the security policy among them.
        requests: Addresses that the page asked for over the network; files are none of them.
    """

    elements: list[Element]
    console: list[str]
    requests: list[str]

    def all(self, **attributes: str | None) -> list[Element]:
        """Return the elements with these attributes (``_`` stands for ``-``), of any value where None is given."""
        wanted = {name.replace("_", "-"): value for name, value in attributes.items()}
        return [
            element
            for element in self.elements
            if all(
                name in element.attributes and value in (None, element.attributes[name])
                for name, value in wanted.items()
            )
        ]

    def one(self, **attributes: str | None) -> Element:
        (found,) = self.all(**attributes)
        return found


def visit(page: Path, fragment: str = "") -> Visit:
    """Open a file in a fresh profile and return what it became after its scripts ran."""
    browser = find_browser()
    assert browser is not None, INSTALL
    with tempfile.TemporaryDirectory() as folder:
        net_log = Path(folder, "net.json")
        done = subprocess.run(
            [
                *(browser, *QUIET, f"--user-data-dir={folder}/profile", f"--log-net-log={net_log}"),
                *("--enable-logging=stderr", "--v=0", "--virtual-time-budget=20000", "--dump-dom"),
                f"{page.resolve().as_uri()}{fragment}",
            ],
            capture_output=True,
            timeout=120,
        )
        messages = done.stderr.decode(errors="replace")
        assert done.returncode == 0, messages
        parser = _Parser()
        parser.feed(done.stdout.decode())
        return Visit(parser.elements, re.findall(r":CONSOLE.*", messages), requested(json.loads(net_log.read_text())))


def requested(net_log: dict) -> list[str]:
    """Return every address in a net log that a page made a request for."""
    start = net_log["constants"]["logEventTypes"]["URL_REQUEST_START_JOB"]
    begun = [event.get("params", {}) for event in net_log["events"] if event["type"] == start]
    return [
        params["url"]
        for params in begun
        if params.get("initiator", NO_PAGE) != NO_PAGE and not params["url"].startswith("file://")
    ]


class _Parser(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[Element] = []
        self.open: list[Element] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, {name: value or "" for name, value in attrs})
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop().tag != tag:
            pass

    def handle_data(self, data: str) -> None:
        for element in self.open:
            element.text += data
