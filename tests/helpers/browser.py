"""Runs the script of a test in a page of a headless Chromium, QtWebEngine, as a separate process.

Usage: ``python browser.py URL SCRIPT``. Prints what the script, the body of an asynchronous function, returns
as JSON, together with the messages on the page's console.
"""

import json
import os
import sys

os.environ |= {
    "QT_QPA_PLATFORM": "offscreen",
    "QTWEBENGINE_DISABLE_SANDBOX": "1",  # Chromium's sandbox does not run as root.
    "QTWEBENGINE_CHROMIUM_FLAGS": "--disable-gpu",
}

from PyQt6.QtCore import QTimer, QUrl
from PyQt6.QtWebEngineCore import QWebEnginePage
from PyQt6.QtWidgets import QApplication

SECONDS = 60
RESULT = "RESULT "


class Page(QWebEnginePage):
    """A page that remembers the messages of its console and ends the process with a result."""

    def __init__(self):
        super().__init__()
        self.messages = []

    def javaScriptConsoleMessage(self, level, message, line, source):
        if message.startswith(RESULT):
            print(json.dumps({"result": json.loads(message[len(RESULT) :]), "console": self.messages}))
            QApplication.quit()
        else:
            self.messages.append(message)


def main(url: str, script: str) -> None:
    """Opens the page and runs the script when it has loaded."""
    app = QApplication(sys.argv[:1])
    page = Page()
    run = f"(async () => {{ {script} }})()"
    report = f"console.log({json.dumps(RESULT)} + JSON.stringify(value ?? null))"
    fail = f"console.log({json.dumps(RESULT)} + JSON.stringify(String(error)))"
    page.loadFinished.connect(
        lambda ok: page.runJavaScript(f"{run}.then((value) => {report}, (error) => {fail})")
    )
    page.load(QUrl(url))
    QTimer.singleShot(SECONDS * 1000, lambda: app.exit(1))
    sys.exit(app.exec())


main(*sys.argv[1:])
