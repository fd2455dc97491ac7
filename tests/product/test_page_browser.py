"""The page of a collection in a real browser: its layout, its colours, and that nothing in it runs.

Needs Chromium (Debian: ``apt-get install chromium``).  Where there is none the tests are skipped;
``make test-browser`` wants one, and fails without.
"""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

import rmmformat as rmm
from rmmformat.methods import choose_method
from rmmformat.page import collection_page
from rmmformat.pipeline import convert

from .conftest import make_tasks

BROWSER = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome", "chrome")
     if (found := shutil.which(name))),
    None,
)  # fmt: skip
if os.environ.get("RMM_BROWSER") != "required":
    pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium; see make test-browser")

#: Measures the page in a frame of a given width: overflow, and text outside its picture.
HARNESS = """<!DOCTYPE html><meta charset="utf-8"><body style="margin:0">
<iframe id="f" src="page.html" style="border:0;width:{width}px;height:2000px"></iframe>
<pre id="out"></pre><script>
window.onload = () => {{
  const page = document.getElementById("f").contentDocument, root = page.documentElement;
  const cut = [];
  for (const svg of page.querySelectorAll("svg")) {{
    const box = svg.getBoundingClientRect();
    for (const text of svg.querySelectorAll("text")) {{
      const at = text.getBoundingClientRect();
      if (at.left < box.left - 1 || at.right > box.right + 1 || at.top < box.top - 1 ||
          at.bottom > box.bottom + 1) cut.push(text.textContent);
    }}
  }}
  document.getElementById("out").textContent = JSON.stringify({{
    title: page.title, wide: root.scrollWidth - root.clientWidth, cut: cut,
    svgs: page.querySelectorAll("svg").length, scripts: page.querySelectorAll("script").length,
    rows: page.querySelectorAll("tbody tr").length, ran: !!window.ran,
    ground: getComputedStyle(page.body).backgroundColor, ink: getComputedStyle(page.body).color,
  }});
}};
</script>"""


def browse(url: str, *options: str) -> subprocess.CompletedProcess[str]:
    assert BROWSER is not None, "Chromium is wanted and not installed"
    return subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
         "--disable-dev-shm-usage", "--enable-logging=stderr", *options, url],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip


def measure(folder: Path, width: int, *options: str) -> dict[str, object]:
    harness = folder / f"harness-{width}.html"
    harness.write_text(HARNESS.format(width=width))
    done = browse(harness.as_uri(), "--allow-file-access-from-files", "--dump-dom",
                  "--virtual-time-budget=5000", *options)  # fmt: skip
    assert "Refused to" not in done.stderr
    found = re.search(r'<pre id="out">(.+?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stdout[-400:]
    result: dict[str, object] = json.loads(html.unescape(found[1]))
    return result


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, demo_adapters: Path) -> Path:
    folder = tmp_path_factory.mktemp("page")
    rmm.convert(demo_adapters, folder / "skills.rmm", size=0.06)
    with rmm.open(folder / "skills.rmm") as collection:
        (folder / "page.html").write_text(collection_page(collection), encoding="utf-8")
    return folder


@pytest.mark.parametrize("width", [400, 800, 1280])
def test_nothing_is_cut_and_nothing_overflows(page: Path, width: int) -> None:
    seen = measure(page, width)
    assert seen["title"] == "skills.rmm"
    assert seen["svgs"] == 3
    assert seen["rows"] == 8 + 16  # tasks, and two files of each
    assert seen["cut"] == []
    assert seen["wide"] == 0


def brightness(colour: object) -> float:
    parts = [float(part) for part in re.findall(r"[\d.]+", str(colour))[:3]]
    return sum(parts) / 3


def test_light_and_dark_can_be_read(page: Path) -> None:
    light = measure(page, 900, "--blink-settings=preferredColorScheme=1")
    dark = measure(page, 900, "--blink-settings=preferredColorScheme=0")
    assert brightness(light["ground"]) - brightness(light["ink"]) > 180
    assert brightness(dark["ink"]) - brightness(dark["ground"]) > 180


def test_the_picture_has_its_colours(page: Path, tmp_path: Path) -> None:
    from matplotlib.image import imread

    shot = tmp_path / "page.png"
    browse((page / "page.html").as_uri(), "--window-size=1280,1900", f"--screenshot={shot}",
           "--blink-settings=preferredColorScheme=1")  # fmt: skip
    pixels = np.asarray(imread(shot))[..., :3]
    assert pixels.shape[:2] == (1900, 1280)
    near = {
        name: int((np.abs(pixels - np.array(colour)).max(axis=-1) < 0.05).sum())
        for name, colour in {
            "white": (1, 1, 1), "full cell": (0.86, 0.34, 0.23), "own bytes": (0.18, 0.435, 0.816),
        }.items()
    }  # fmt: skip
    assert near["white"] > 0.5 * 1280 * 1900
    assert near["full cell"] > 300
    assert near["own bytes"] > 5000


def test_names_do_not_run_and_long_ones_fit(tmp_path: Path) -> None:
    tasks = make_tasks(20, sides=((12, 9),) * 3)
    tasks[0].name = "<script>parent.ran = 1</script><img src=x onerror='parent.ran = 1'>"
    tasks[1].name = "W" * 200
    tasks[2].name = "</title></style><svg onload='parent.ran = 1'>"
    convert(tasks, tmp_path / "x.rmm", choose_method(encoding="q4"))
    with rmm.open(tmp_path / "x.rmm") as collection:
        (tmp_path / "page.html").write_text(collection_page(collection), encoding="utf-8")
    for width in (400, 1280):
        seen = measure(tmp_path, width)
        assert seen["scripts"] == 0
        assert seen["ran"] is False
        assert seen["svgs"] == 3
        assert seen["wide"] == 0
        assert [text for text in seen["cut"] if "WWW" not in text] == []  # type: ignore[union-attr]
