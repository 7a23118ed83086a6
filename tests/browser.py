"""A page in a real browser: what a script finds in it, at a given width, and its PDF."""

import html
import json
import re
import shutil
import subprocess

from limits import HUNG_S

BROWSER = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chrome")

# A window without a screen is at least 500 pixels wide, so a narrow page stands in a frame.
FRAME = """<!doctype html><body style="margin:0">
<iframe width="{width}" height="800" style="border:0" srcdoc="{page}"></iframe>
<script>
document.querySelector("iframe").onload = (event) => document.body.append(
  event.target.contentDocument.getElementById("found").cloneNode(true));
</script></body>"""


def browse(folder, page, probe, *options, width=None):
    """The JSON that `probe` leaves in an element with the id "found".

    Args:
        folder: for the page and the browser's profile.
        page: its text.
        probe: a script element, put at the page's end.
        options: of the browser.
        width: of the page in pixels; default: the window's.
    """
    catch = '<script>window.errors = []; addEventListener("error", (e) => errors.push(e.message));</script>'
    text = page.replace("<head>", "<head>" + catch).replace("</body>", probe + "</body>")
    if width is not None:
        text = FRAME.format(width=width, page=html.escape(text))
    path = folder / "page.html"
    path.write_text(text, encoding="utf-8")
    done = subprocess.run(
        [*command(folder), "--dump-dom", *options, path.as_uri()],
        capture_output=True, text=True, timeout=HUNG_S,
    )  # fmt: skip
    found = re.findall(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr
    return json.loads(html.unescape(found[-1]))


def printed(folder, page):
    """The PDF of a page."""
    source, target = folder / "page.html", folder / "page.pdf"
    source.write_text(page, encoding="utf-8")
    done = [*command(folder), f"--print-to-pdf={target}", source.as_uri()]
    subprocess.run(done, check=True, capture_output=True, timeout=HUNG_S)
    return target.read_bytes()


def command(folder):
    """The browser's command, with a profile in `folder`."""
    flags = ["--headless", "--no-sandbox", "--disable-gpu"]
    return [BROWSER, *flags, f"--user-data-dir={folder}/profile"]
