"""python docs/pictures.py runs/toy/stage2: makes the README's pictures, docs/reward.svg and docs/tokens.png, of a run.

Both are taken from the run's report (hov2.tools.report) as headless Chromium shows it: the reward's chart as an SVG of its
own, in colours that can be read on white and on black, and the rollouts' view of the group in which the rewards differ
most. Needs requirements-dev.txt and Debian's chromium and chromium-driver.
"""

import base64
import io
import json
import re
import shutil
import sys
import tempfile
from pathlib import Path

import av
import numpy as np
from selenium import webdriver
from selenium.webdriver.support.wait import WebDriverWait

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from hov2.tools.report import make_report

STYLE = """<style>
text { fill: #848d97; font: 10.5px system-ui, sans-serif; text-anchor: end; }
path { fill: none; stroke: #8884; }
path.run { stroke: #4493f8; stroke-width: 2; stroke-linejoin: round; }
</style>"""
WIDTH, HEIGHT, CHART = 1180, 1000, 640  # of the picture, and the width of the chart; pixels
SEEN = 3  # completions in the picture
LEVELS = 85  # of a colour in the picture: the noise of frames is what takes room


def most_telling(folder):
    """(step, sample) of the group whose first completions differ most in the reward in which they differ least."""

    def _differ(record):
        credits = [name for name in record["completions"][0]["tokens"] if name.startswith("credit/")]
        firsts = {name: [c["tokens"][name][0] for c in record["completions"][:SEEN]] for name in credits}
        return min(max(values) - min(values) for values in firsts.values())

    with open(folder / "rollouts.jsonl", encoding="utf-8") as lines:
        record = max(map(json.loads, lines), key=_differ)
    return record["step"], record["sample"]


def smaller(png):
    """The same picture with fewer levels of each colour, packed more tightly than Chromium does."""
    with av.open(io.BytesIO(png)) as container:
        pixels = next(container.decode(video=0)).to_ndarray(format="rgb24")
    frame = av.VideoFrame.from_ndarray((np.rint(pixels / 255 * LEVELS) / LEVELS * 255).astype(np.uint8), format="rgb24")
    file = io.BytesIO()
    with av.open(file, "w", format="image2pipe") as container:
        stream = container.add_stream(
            "png",
            rate=1,
            width=frame.width,
            height=frame.height,
            pix_fmt="rgb24",
            options={"compression_level": "9", "pred": "mixed"},
        )
        container.mux([*stream.encode(frame), *stream.encode()])
    return file.getvalue()


def main(folder):
    """Writes both pictures of the run in `folder`."""
    step, sample = most_telling(folder)
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for argument in ("--headless=new", "--no-sandbox", "--hide-scrollbars", f"--window-size={WIDTH},{HEIGHT + 140}"):
        options.add_argument(argument)
    with tempfile.TemporaryDirectory() as temporary:
        page = Path(temporary) / "report.html"
        page.write_text(make_report([folder]), encoding="utf-8")
        service = webdriver.ChromeService(shutil.which("chromedriver"))
        with webdriver.Chrome(options=options, service=service) as browser:
            browser.get(page.as_uri())
            wait = WebDriverWait(browser, 20)
            wait.until(lambda _: browser.find_elements("css selector", "article"))
            chart = browser.execute_script("return document.querySelector('svg[aria-label=reward]').outerHTML")
            chart = re.sub(r' style="[^"]*"|(?<=\.\d)\d+', "", chart)  # the page's colours, and more than one decimal
            chart = chart.replace(">", f' xmlns="http://www.w3.org/2000/svg" width="{CHART}">{STYLE}', 1)
            (ROOT / "docs/reward.svg").write_text(chart + "\n", encoding="utf-8")
            prompt = browser.execute_async_script(
                """
                const [step, sample, done] = arguments;
                choose({step, prompt: 0}).then(() => {
                  const options = [...document.querySelector("select[name=prompt]").options];
                  const prompt = options.findIndex(option => option.text === sample);
                  choose({prompt}).then(() => done(prompt));
                });""",
                str(step),
                sample,
            )
            picture = {"clip": {"x": 0, "y": 0, "width": WIDTH, "height": HEIGHT, "scale": 1}}
            png = browser.execute_cdp_cmd("Page.captureScreenshot", picture)["data"]
    (ROOT / "docs/tokens.png").write_bytes(smaller(base64.b64decode(png)))
    print(f"docs/reward.svg, docs/tokens.png: step {step}, prompt {prompt} ({sample})")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
