"""The built pages in a real browser, at desktop and phone width: no console error, no request to another host, nothing wider than the screen.

Chromium is driven over its debugging socket with tornado, which Jupyter brings along. `MECHINTERP_SHOTS=FOLDER` keeps a picture of each page.
"""
import asyncio, base64, functools, http.server, json, os, re, shutil, subprocess, threading, time
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from project import SITE

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
if not BROWSER: pytest.skip("no Chromium on the PATH", allow_module_level=True)
if not (SITE / "index.html").exists(): pytest.skip("the book is not built: run make book", allow_module_level=True)

PAGES = sorted(p.relative_to(SITE).as_posix() for folder in ("book", "nbs") for p in (SITE / folder).glob("*.html")) + ["search.html?q=induction", "genindex.html"]
PAGES += [f"reference/{name}.html" for name in ("index", "models", "interventions", "experiments/addition_circuits")]       # the others are made the same way
SIZES = {"desktop": (1400, 900, False), "phone": (390, 844, True)}


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments): pass


@pytest.fixture(scope="module")
def site():
    "The site on a local port."
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=SITE))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    "The debugging port of a headless Chromium that can reach no other host."
    profile = tmp_path_factory.mktemp("chromium")
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--hide-scrollbars", "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1"]
    process = subprocess.Popen([BROWSER, *flags, f"--user-data-dir={profile}", "--remote-debugging-port=0", "about:blank"], stderr=subprocess.DEVNULL)
    port_file, deadline = profile / "DevToolsActivePort", time.monotonic() + 60
    while not (port_file.exists() and port_file.read_text()):
        assert process.poll() is None and time.monotonic() < deadline, "Chromium did not start"
        time.sleep(0.1)
    yield port_file.read_text().splitlines()
    process.terminate()
    process.wait(20)


class Tab:
    "One tab over the debugging protocol: commands in order, events kept."
    def __init__(self, socket): self.socket, self.count, self.session, self.events = socket, 0, None, []

    async def send(self, method, **parameters):
        self.count += 1
        message = {"id": self.count, "method": method, "params": parameters} | ({"sessionId": self.session} if self.session else {})
        await self.socket.write_message(json.dumps(message))
        while True:
            answer = await self.read()
            if answer.get("id") == self.count:
                assert "error" not in answer, answer
                return answer["result"]

    async def read(self):
        answer = json.loads(await asyncio.wait_for(self.socket.read_message(), 60))
        if "method" in answer: self.events.append(answer)
        return answer

    async def until(self, method):
        while not any(e["method"] == method for e in self.events): await self.read()


# A page is done when its equations are set and its figures drawn.
SETTLED = "(window.MathJax && MathJax.startup ? MathJax.startup.promise : Promise.resolve()).then(() => new Promise(r => setTimeout(r, 400)))"
WIDER = """[...document.querySelectorAll('.bd-article *')].filter(e => { let r = e.getBoundingClientRect(); if (r.width == 0 || r.right <= document.documentElement.clientWidth + 1) return false;
  for (let p = e.parentElement; p; p = p.parentElement) if (['auto', 'scroll', 'hidden', 'clip'].includes(getComputedStyle(p).overflowX)) return false; return true })
  .slice(0, 3).map(e => e.outerHTML.slice(0, 120))"""


async def visit(browser, url, width, height, phone, dark, shot=None):
    "Open `url`; what it logged as errors, what it asked of other hosts, what did not load, and what sticks out on the right."
    from tornado.websocket import websocket_connect
    port, path = browser
    tab = Tab(await websocket_connect(f"ws://127.0.0.1:{port}{path}", max_message_size=2**28))
    target = (await tab.send("Target.createTarget", url="about:blank"))["targetId"]
    tab.session = (await tab.send("Target.attachToTarget", targetId=target, flatten=True))["sessionId"]
    for domain in ("Page", "Runtime", "Log", "Network"): await tab.send(f"{domain}.enable")
    await tab.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)
    await tab.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])
    await tab.send("Page.navigate", url=url)
    await tab.until("Page.loadEventFired")
    await tab.send("Runtime.evaluate", expression=SETTLED, awaitPromise=True)
    wider = (await tab.send("Runtime.evaluate", expression=WIDER, returnByValue=True))["result"]["value"]
    if shot:
        tall = (await tab.send("Runtime.evaluate", expression="Math.min(12000, document.documentElement.scrollHeight)"))["result"]["value"]
        await tab.send("Emulation.setDeviceMetricsOverride", width=width, height=tall, deviceScaleFactor=1, mobile=phone)
        await asyncio.sleep(0.5)
        picture = await tab.send("Page.captureScreenshot", format="png")
        shot.parent.mkdir(parents=True, exist_ok=True)
        shot.write_bytes(base64.b64decode(picture["data"]))
    events, tab.session = tab.events, None
    await tab.send("Target.closeTarget", targetId=target)
    tab.socket.close()
    return problems(events, urlsplit(url).netloc) + [f"wider than the screen: {each}" for each in wider]


def problems(events, host) -> list[str]:
    "The browser's complaints, and the requests that went to another host."
    found = []
    for event in events:
        what, with_ = event["method"], event["params"]
        if what == "Runtime.exceptionThrown": found.append("exception: " + with_["exceptionDetails"].get("exception", {}).get("description", "?"))
        if what == "Runtime.consoleAPICalled" and with_["type"] in ("error", "assert"): found.append("console: " + str([a.get("value") for a in with_["args"]]))
        if what == "Log.entryAdded" and with_["entry"]["level"] == "error": found.append(f"log: {with_['entry']['text']} {with_['entry'].get('url', '')}")
        if what == "Network.requestWillBeSent":
            url = urlsplit(with_["request"]["url"])
            if url.scheme not in ("data", "blob", "about") and url.netloc != host: found.append(f"request to another host: {url.geturl()}")
    return found


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("page", PAGES, ids=lambda page: re.sub(r"\W", "-", page))
def test_page(browser, site, page, size):
    shots = os.environ.get("MECHINTERP_SHOTS")
    for dark in (False, True):
        name = f"{re.sub(r'[^a-z0-9]+', '-', page.lower())}-{size}-{'dark' if dark else 'light'}.png"
        assert asyncio.run(visit(browser, f"{site}/{page}", *SIZES[size], dark, Path(shots) / name if shots else None)) == []


def test_a_bad_page_is_noticed(browser, site):
    bad = SITE / "_bad.html"
    bad.write_text('<meta name="viewport" content="width=device-width"><div class="bd-article"><p style="width: 900px">wide</p></div>'
                   '<img src="https://example.org/x.png"><script>console.error("no"); nothing()</script>')
    try: found = "\n".join(asyncio.run(visit(browser, f"{site}/_bad.html", *SIZES["phone"], False)))
    finally: bad.unlink()
    for complaint in ("exception", "console", "another host", "wider than"): assert complaint in found
