"""A headless Chromium, spoken to through its debugging port: opens an address and takes a picture of the page."""

import asyncio
import base64
import json
import os
import shutil
import signal
import subprocess
import time
import urllib.request
from pathlib import Path

FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--use-angle=swiftshader",
    "--enable-unsafe-swiftshader",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-port=0",
    "--window-size=1000,800",
)


def find_chromium():
    """The browser's path, or None."""
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Browser:
    """Starts Chromium with an empty profile in a folder; ends it and all it started when left."""

    def __init__(self, profile: Path):
        self._profile = profile

    def __enter__(self):
        command = [find_chromium(), *FLAGS, f"--user-data-dir={self._profile}", "about:blank"]
        quiet = subprocess.DEVNULL
        self._process = subprocess.Popen(command, stdout=quiet, stderr=quiet, start_new_session=True)
        port_file = self._profile / "DevToolsActivePort"
        deadline = time.monotonic() + 60
        while not (port_file.exists() and port_file.read_text().strip()):
            assert time.monotonic() < deadline, "chromium did not start"
            time.sleep(0.1)
        port = port_file.read_text().split()[0]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json") as answer:
            pages = [page for page in json.load(answer) if page["type"] == "page"]
        self._socket_url = pages[0]["webSocketDebuggerUrl"]
        return self

    def __exit__(self, *_):
        os.killpg(self._process.pid, signal.SIGTERM)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(10)

    def photograph(self, url, is_ready, timeout_s=60):
        """Open an address; return the first picture, PNG as bytes, that ``is_ready`` accepts, or the last one."""
        return asyncio.run(self._photograph(url, is_ready, timeout_s))

    async def _photograph(self, url, is_ready, timeout_s):
        from tornado.websocket import websocket_connect

        socket = await websocket_connect(self._socket_url, max_message_size=1 << 26)
        await self._ask(socket, "Page.navigate", url=url)
        deadline = time.monotonic() + timeout_s
        while True:
            await asyncio.sleep(1.5)
            answer = await self._ask(socket, "Page.captureScreenshot", format="png")
            picture = base64.b64decode(answer["data"])
            if is_ready(picture) or time.monotonic() > deadline:
                socket.close()
                return picture

    _number = 0

    async def _ask(self, socket, method, **parameters):
        self._number += 1
        await socket.write_message(json.dumps({"id": self._number, "method": method, "params": parameters}))
        while True:
            answer = json.loads(await socket.read_message())
            if answer.get("id") == self._number:
                return answer["result"]
