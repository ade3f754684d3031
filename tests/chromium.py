"""A headless Chromium, driven through a pair of pipes in the DevTools protocol.

https://chromedevtools.github.io/devtools-protocol/
"""

import contextlib
import fcntl
import itertools
import json
import os
import pathlib
import select
import shutil
import signal
import time
from collections.abc import Iterator
from typing import Any

_PATIENCE = 60.0  # seconds; a busy machine is slow
NAMES = ("chromium", "chromium-browser", "google-chrome")


def find_chromium() -> str | None:
    """The browser's program, if there is one."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Chromium:
    """A browser. Leave the `with` block to end it."""

    def __init__(self, folder: pathlib.Path) -> None:
        program = find_chromium()
        if program is None:
            raise FileNotFoundError(f"none of {', '.join(NAMES)} is installed")
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        flags += ["--remote-debugging-pipe", f"--user-data-dir={folder}", "--no-first-run"]
        flags += ["--disable-background-networking", "--disable-component-update", "about:blank"]
        to_read, self._write = map(_above_ten, os.pipe())
        self._read, to_write = map(_above_ten, os.pipe())
        log = _above_ten(os.open(folder / "log", os.O_WRONLY | os.O_CREAT))
        # Not subprocess: its fork would warn of JAX's threads where it has to place descriptors.
        self._pid = os.posix_spawn(
            program,
            [program, *flags],
            os.environ | {"HOME": str(folder)},
            file_actions=[
                (os.POSIX_SPAWN_DUP2, to_read, 3),
                (os.POSIX_SPAWN_DUP2, to_write, 4),
                (os.POSIX_SPAWN_DUP2, log, 1),
                (os.POSIX_SPAWN_DUP2, log, 2),
            ],
            setsid=True,
        )
        for descriptor in (to_read, to_write, log):
            os.close(descriptor)
        self._ids = itertools.count(1)
        self._unread = b""
        self.events: list[dict[str, Any]] = []

    def __enter__(self) -> "Chromium":
        return self

    def __exit__(self, *exception: object) -> None:
        with contextlib.suppress(OSError, TimeoutError):
            self.call("Browser.close")
        # What is left of it, so that the test run ends.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        os.close(self._read)
        os.close(self._write)

    def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """Calls a method of the protocol; RuntimeError: the browser refuses."""
        number = next(self._ids)
        message = {"id": number, "method": method, "params": params}
        message |= {} if session is None else {"sessionId": session}
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._write, data) :]
        for answer in self._messages():
            if answer.get("id") == number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]
            self.events.append(answer)
        raise EOFError("the browser has ended")

    def _messages(self) -> Iterator[dict[str, Any]]:
        deadline = time.monotonic() + _PATIENCE
        while True:
            text, found, rest = self._unread.partition(b"\0")
            if found:
                self._unread = rest
                yield json.loads(text)
                continue
            left = deadline - time.monotonic()
            if left < 0 or not select.select([self._read], [], [], left)[0]:
                raise TimeoutError(f"the browser has said nothing for {_PATIENCE} s")
            data = os.read(self._read, 1 << 16)
            if not data:
                return
            self._unread += data

    @contextlib.contextmanager
    def tab(self, url: str, *, width: int = 1280, height: int = 800) -> Iterator["Tab"]:
        """A tab of its own, with no storage of others, that has loaded an address."""
        context = self.call("Target.createBrowserContext")["browserContextId"]
        target = self.call("Target.createTarget", url="about:blank", browserContextId=context)
        target_id = target["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target_id, flatten=True)
        tab = Tab(self, attached["sessionId"])
        for domain in ("Page", "Runtime", "Log"):
            tab.call(f"{domain}.enable")
        tab.resize(width, height)
        tab.open(url)
        yield tab
        self.call("Target.closeTarget", targetId=target_id)
        self.call("Target.disposeBrowserContext", browserContextId=context)


class Tab:
    """A page in the browser."""

    def __init__(self, browser: Chromium, session: str) -> None:
        self._browser = browser
        self._session = session

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Calls a method of the protocol for this tab."""
        return self._browser.call(method, self._session, **params)

    def open(self, url: str) -> None:
        """Goes to an address, and waits until the page is there."""
        self.call("Page.navigate", url=url)
        self.until(f"location.href === {json.dumps(url)} && document.readyState", "complete")

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression, awaited."""
        answer = self.call(
            "Runtime.evaluate",
            expression=script,
            awaitPromise=True,
            returnByValue=True,
            userGesture=True,
        )
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{script}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def until(self, script: str, wanted: Any = True) -> Any:
        """Waits until an expression has a value; says which it had if it does not come."""
        deadline = time.monotonic() + _PATIENCE
        value = None
        while time.monotonic() < deadline:
            with contextlib.suppress(RuntimeError):  # the page changes
                if (value := self.run(script)) == wanted:
                    return value
            time.sleep(0.02)
        raise AssertionError(f"{script} is {value!r}, not {wanted!r}")

    def text(self, selector: str) -> str:
        """The text of the first element that a selector finds, as it is shown."""
        return self.run(f"document.querySelector({json.dumps(selector)}).innerText")

    def click(self, selector: str) -> None:
        """Presses the mouse in the middle of an element, which must be in sight."""
        x, y = self.run(
            f"""(() => {{
              const found = document.querySelector({json.dumps(selector)});
              const box = found.getBoundingClientRect();
              const [x, y] = [box.x + box.width / 2, box.y + box.height / 2];
              if (!found.contains(document.elementFromPoint(x, y))) throw Error("out of reach");
              return [x, y];
            }})()"""
        )
        for kind in ("mousePressed", "mouseReleased"):
            at = {"x": x, "y": y, "button": "left", "clickCount": 1}
            self.call("Input.dispatchMouseEvent", type=kind, **at)

    def type(self, text: str) -> None:
        """Writes into what has the focus."""
        self.call("Input.insertText", text=text)

    def press(self, key: str, *, shift: bool = False) -> None:
        """Presses Enter, Escape or Tab."""
        code = {"Enter": 13, "Escape": 27, "Tab": 9}[key]
        modifiers = 8 if shift else 0
        at = {"key": key, "code": key, "windowsVirtualKeyCode": code, "modifiers": modifiers}
        text = {"text": "\r"} if key == "Enter" else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", **at, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", **at)

    def resize(self, width: int, height: int) -> None:
        """Sets the size of the window, in the page's pixels."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **size)

    def prefer(self, theme: str) -> None:
        """Sets the system's theme, "dark" or "light"."""
        features = [{"name": "prefers-color-scheme", "value": theme}]
        self.call("Emulation.setEmulatedMedia", features=features)

    def complaints(self) -> list[str]:
        """What the browser has logged as an error: of scripts, of the policy, of loading."""
        self.call("Runtime.evaluate", expression="0")  # what came before it has been read
        found = []
        for event in self._browser.events:
            if event.get("sessionId") != self._session:
                continue
            if event["method"] == "Runtime.exceptionThrown":
                found.append(str(event["params"]["exceptionDetails"]))
            elif event["method"] == "Log.entryAdded":
                entry = event["params"]["entry"]
                if entry["level"] == "error":
                    found.append(entry["text"])
        return found


def _above_ten(descriptor: int) -> int:
    """The same file by a number that is none of the child's 1 to 4."""
    moved = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 10)
    os.close(descriptor)
    return moved
