"""One page of Qt's WebEngine, to be driven from outside: tests/browser.py starts it."""

import sys

from PySide6.QtWebEngineCore import QWebEngineSettings
from PySide6.QtWebEngineWidgets import QWebEngineView
from PySide6.QtWidgets import QApplication

if __name__ == "__main__":
    application = QApplication(sys.argv)
    view = QWebEngineView()
    allowed = QWebEngineSettings.WebAttribute
    for attribute in (allowed.JavascriptCanAccessClipboard, allowed.JavascriptCanPaste):
        view.settings().setAttribute(attribute, True)
    view.page().permissionRequested.connect(lambda permission: permission.grant())
    view.resize(1280, 900)
    view.load("about:blank")
    view.show()
    sys.exit(application.exec())
