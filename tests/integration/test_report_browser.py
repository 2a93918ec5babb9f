"""The report in a real headless browser: what it shows, what the pointer finds, and that the console stays empty."""

import json
import shutil
import threading
from pathlib import Path

import pytest

from rwkv_accel.report import write_report
from rwkv_accel.report.serve import ReportServer
from tests.report_runs import TOKENS_PER_STEP, append, loss_at, step_records, write_run

pytest.importorskip("selenium", reason="selenium is not installed (pip install selenium)")
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="chromium or chromedriver is missing (apt-get install chromium chromium-driver)"
)
WAIT_SECONDS = 60
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=1280,900",
)  # fmt: skip
# Where a curve's canvas keeps its ticks, in pixels.
LEFT, RIGHT = 54, 12


class Page:
    """One tab, with the errors of its console."""

    def __init__(self, driver):
        self.driver = driver

    def open(self, url, width=1280, height=900, theme="light", is_phone=False):
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": is_phone}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        features = [{"name": "prefers-color-scheme", "value": theme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        self.driver.get_log("browser")
        self.driver.get(url if isinstance(url, str) else url.resolve().as_uri())
        return self

    def run(self, script, *arguments):
        return self.driver.execute_script(script, *arguments)

    def find(self, selector):
        return self.driver.find_elements("css selector", selector)

    def text(self, selector):
        return "\n".join(element.get_property("innerText") for element in self.find(selector))

    def click(self, selector):
        (element,) = self.find(selector)
        self.run("arguments[0].scrollIntoView({block: 'center'})", element)
        element.click()

    def until(self, condition):
        from selenium.webdriver.support.ui import WebDriverWait

        return WebDriverWait(self.driver, WAIT_SECONDS, poll_frequency=0.1).until(lambda _: condition())

    def plot(self, chart, share):
        """(element, x offset from its middle) of a place on a chart: 0 is the left end of its axis, 1 the right one."""
        (element,) = self.find(f"#chart-{chart} .plot")
        self.run("arguments[0].scrollIntoView({block: 'center'})", element)
        width = self.run("return arguments[0].clientWidth", element)
        return element, round(LEFT + share * (width - LEFT - RIGHT) - width / 2)

    def hover(self, chart, share):
        """Text of the tip with the pointer there."""
        from selenium.webdriver.common.action_chains import ActionChains

        element, x = self.plot(chart, share)
        ActionChains(self.driver, duration=0).move_to_element_with_offset(element, x, 0).perform()
        return self.text(f"#chart-{chart} .tip:not([hidden])")

    def drag(self, chart, start, end):
        from selenium.webdriver.common.action_chains import ActionChains

        element, x = self.plot(chart, start)
        _, to = self.plot(chart, end)
        pointer = ActionChains(self.driver, duration=0).move_to_element_with_offset(element, x, 0).click_and_hold()
        pointer.move_by_offset(to - x, 0).release().perform()

    def painted(self, chart, run):
        """Pixels of the chart in the colour of the run with this number."""
        return self.run(
            """
            const canvas = document.querySelector(`#chart-${arguments[0]} canvas`);
            const copy = document.createElement("canvas");
            [copy.width, copy.height] = [canvas.width, canvas.height];
            const probe = copy.getContext("2d", { willReadFrequently: true });
            probe.fillStyle = getComputedStyle(document.documentElement).getPropertyValue(`--run-${arguments[1]}`);
            probe.fillRect(0, 0, 1, 1);
            const want = probe.getImageData(0, 0, 1, 1).data;
            probe.clearRect(0, 0, 1, 1);
            probe.drawImage(canvas, 0, 0);
            const { data } = probe.getImageData(0, 0, copy.width, copy.height);
            let count = 0;
            for (let i = 0; i < data.length; i += 4) {
              if (data[i + 3] > 200 && [0, 1, 2].every((k) => Math.abs(data[i + k] - want[k]) < 8)) count++;
            }
            return count;
            """,
            chart,
            run,
        )

    def errors(self):
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.set_page_load_timeout(WAIT_SECONDS)
    yield Page(driver)
    driver.quit()


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    runs = [write_run(root / "first"), write_run(root / "second", scale=0.5, num_steps=80)]
    return write_report(runs, root / "report.html")


def rows_of(tip):
    """{name: value} of a tip's lines."""
    return dict(line.split("\t")[1:3] for line in tip.splitlines()[1:])


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_everything_is_drawn_without_complaint(browser, two_runs, theme, tmp_path):
    browser.open(two_runs, theme=theme)
    charts = [element.get_attribute("id").removeprefix("chart-") for element in browser.find(".chart")]
    assert charts == ["loss", "eval", "bits", "lr", "wd", "grad", "speed", "wait", "memory"]
    assert all(browser.painted(name, run) > 20 for name in ("loss", "eval", "lr", "grad") for run in (0, 1))
    paper = browser.run("return getComputedStyle(document.body).backgroundColor")
    assert paper == {"light": "rgb(246, 247, 249)", "dark": "rgb(18, 21, 27)"}[theme]
    assert "finished" in browser.text("#overview")
    assert "resumed at step 60" in browser.text("#messages")
    assert "[object" not in browser.text("body")
    assert browser.driver.title == "2 runs - rwkv_accel"
    assert browser.driver.save_screenshot(str(tmp_path / f"{theme}.png"))
    assert browser.errors() == []


def test_hovering_shows_the_values_of_all_runs_at_that_step(browser, two_runs):
    browser.open(two_runs)
    tip = browser.hover("loss", 42 / 100)
    assert tip.splitlines()[0] == f"step 42 · {42 * TOKENS_PER_STEP / 1000:.3g}k tokens · 0:00:21"
    rows = rows_of(tip)
    assert rows["first"] == f"{loss_at(42):.4f}"
    assert rows["second"] == f"{loss_at(42, 0.5):.4f}"
    assert set(rows) == {"first", "second"}
    assert [line.split("\t")[3].split()[0] for line in tip.splitlines()[1:]] == ["smoothed", "smoothed"]
    assert rows_of(browser.hover("lr", 0.8 * 0.2)) == {"first": "9.200e-4", "second": "4.500e-4"}
    assert rows_of(browser.hover("memory", 0.5)) == {"first": "3.00 GiB", "second": "3.00 GiB"}
    assert rows_of(browser.hover("eval", 50 / 100))["first"] == f"{loss_at(50) + 0.25:.4f}"
    assert set(rows_of(browser.hover("loss", 0.95))) == {"first"}, "the second ended at step 80"
    assert browser.errors() == []


def test_axes_are_steps_tokens_and_time(browser, two_runs):
    browser.open(two_runs)
    browser.click("#axis-tokens")
    assert browser.hover("speed", 0.5).startswith("step 50 · 32k tokens")
    browser.click("#axis-time")
    # Both runs take half a second per step: 50 seconds in all.
    assert browser.hover("speed", 0.24).splitlines()[0].endswith("0:00:12")
    assert browser.find("#axis-time")[0].get_attribute("aria-pressed") == "true"
    assert browser.errors() == []


def test_runs_can_be_hidden(browser, two_runs):
    browser.open(two_runs)
    browser.click(".legend .chip:nth-child(1)")
    assert browser.find(".legend .chip")[0].get_attribute("aria-pressed") == "false"
    assert browser.painted("loss", 0) == 0
    assert browser.painted("loss", 1) > 20
    assert set(rows_of(browser.hover("loss", 0.5))) == {"second"}
    assert browser.text("#comparison th").split() == browser.text("#comparison tbody th").split(), "one column is left"
    browser.click(".legend .chip:nth-child(2)")
    assert browser.text("#chart-loss .empty:not([hidden])") == "no values"
    browser.click(".legend .chip:nth-child(1)")
    assert browser.painted("loss", 0) > 20
    assert browser.errors() == []


def test_dragging_zooms_all_charts_and_a_double_click_ends_it(browser, two_runs):
    from selenium.webdriver.common.action_chains import ActionChains

    browser.open(two_runs)
    browser.drag("lr", 0.2, 0.6)
    low, high = browser.run("return view.zoom")
    assert low == pytest.approx(0 + 0.2 * 100, abs=1.5)
    assert high == pytest.approx(0 + 0.6 * 100, abs=1.5)
    assert browser.hover("loss", 0.5).startswith("step 40 ")
    ActionChains(browser.driver).double_click(browser.find("#chart-grad .plot")[0]).perform()
    assert browser.run("return view.zoom") is None
    browser.click("#zoom-in")
    assert browser.run("return view.range()[1] - view.range()[0]") == pytest.approx(50, abs=1)
    browser.click("#reset")
    assert browser.run("return view.range()") == [0, 100]
    assert browser.errors() == []


def test_keys_move_the_cursor_and_zoom(browser, two_runs):
    from selenium.webdriver.common.keys import Keys

    browser.open(two_runs)
    browser.hover("lr", 30 / 100)
    (plot,) = browser.find("#chart-lr .plot")
    browser.run("arguments[0].focus()", plot)
    start = int(browser.text("#chart-lr .tip").split()[1])
    plot.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_LEFT)
    assert browser.text("#chart-lr .tip").startswith(f"step {start + 1} ")
    plot.send_keys("+")
    assert browser.run("return view.zoom") is not None
    plot.send_keys(Keys.ESCAPE)
    assert browser.run("return view.zoom") is None
    assert browser.errors() == []


def test_many_runs_get_a_line_each(browser, tmp_path):
    runs = [write_run(tmp_path / f"run{number}", num_steps=30, resumed_at=9, scale=1 + number) for number in range(9)]
    browser.open(write_report(runs, tmp_path / "report.html"))
    assert browser.text("#overview tbody th").split() == [f"run{number}" for number in range(9)]
    assert (
        browser.text("#overview tbody tr:nth-child(3) td:nth-child(4)")
        == f"{loss_at(30, 3) + 0.25:.4f}\nvalidation, step 30"
    )
    assert len(rows_of(browser.hover("lr", 0.5))) == 9
    assert browser.run("return document.documentElement.scrollWidth <= innerWidth")
    assert browser.errors() == []


def test_numbers_that_nobody_foresaw_have_charts(browser, tmp_path):
    run = write_run(tmp_path / "run", loss_scale=lambda step: 2.0**step, skipped_steps=0)
    answers = [{"step": step, "set": "sums", "exact_match": step / 200, "examples": 40} for step in (50, 100)]
    append(run, "eval_data.json", answers)
    browser.open(write_report([run], tmp_path / "report.html"))
    titles = [element.get_property("innerText") for element in browser.find(".chart h3")]
    assert titles[-2:] == ["Validation, exact match", "loss scale"], "counts, and what is always 0, have none"
    assert rows_of(browser.hover("e-exact_match", 1.0)) == {"run, sums": "0.5000"}
    assert "sums" not in browser.text("#chart-eval"), "it has no loss"
    assert browser.errors() == []


def test_logarithmic_scale_and_smoothing(browser, two_runs):
    browser.open(two_runs)
    middle = "const y = view.charts.find((c) => c.spec.id === 'loss').y; return y.value((y.from + y.to) / 2)"
    low, high = 0.5 * 1.4, 4.6
    assert browser.run(middle) == pytest.approx((low + high) / 2, rel=0.1)
    browser.click("#log")
    assert browser.run(middle) == pytest.approx((low * high) ** 0.5, rel=0.1)
    browser.run("const s = document.getElementById('smoothing'); s.value = 0; s.dispatchEvent(new Event('input'))")
    assert "smoothed" not in browser.hover("loss", 0.5)
    assert browser.errors() == []


def test_recipe_shows_what_differs(browser, two_runs):
    browser.open(two_runs)
    assert browser.text("#config tbody th").split() == ["optim.lr_init", "out_dir"]
    browser.click("#config .switch button:nth-child(3)")
    assert "peft.rank" in browser.text("#config tbody th").split()
    browser.find("#config input")[0].send_keys("trainer")
    assert browser.text("#config tbody th").split() == ["trainer.max_epochs", "trainer.precision"]
    assert browser.errors() == []


def test_samples_over_the_steps(browser, two_runs):
    browser.open(two_runs)
    assert "I am fine." in browser.text("#samples")
    assert "aaaa" not in browser.text("#samples")
    browser.run("const s = document.querySelector('#samples input'); s.value = 1; s.dispatchEvent(new Event('input'))")
    assert "aaaa\nfirst, step 50, cut at the length limit" in browser.text("#samples")
    browser.click("#samples button")
    assert browser.text("#samples").count("I am fine.") == browser.text("#samples").count("aaaa") == 2
    assert browser.errors() == []


def test_theme_can_be_chosen_against_the_system(browser, two_runs):
    browser.open(two_runs, theme="light")
    seen = []
    for _ in range(3):
        seen.append((browser.text("#theme"), browser.run("return getComputedStyle(document.body).backgroundColor")))
        browser.click("#theme")
    light, dark = "rgb(246, 247, 249)", "rgb(18, 21, 27)"
    assert seen == [("theme: auto", light), ("theme: light", light), ("theme: dark", dark)]
    assert browser.errors() == []


@pytest.mark.parametrize("width", [360, 390])
def test_on_a_phone_nothing_sticks_out(browser, two_runs, width, tmp_path):
    browser.open(two_runs, width=width, height=800, is_phone=True)
    assert browser.run("return document.documentElement.scrollWidth") <= width
    touch = """
        const plot = document.querySelector("#chart-loss .plot"), box = plot.getBoundingClientRect();
        const at = { clientX: box.left + 54 + 0.5 * (box.width - 66), clientY: box.top + 40, pointerType: "touch" };
        plot.dispatchEvent(new PointerEvent("pointerdown", { ...at, bubbles: true }));
        return getComputedStyle(plot).touchAction;
    """
    assert browser.run(touch) == "pan-y", "the page still scrolls"
    assert browser.text("#chart-loss .tip").startswith("step 50 ")
    right_ends = (
        "return [...document.querySelectorAll('.card, button, .tip')].map((e) => e.getBoundingClientRect().right)"
    )
    assert max(browser.run(right_ends)) <= width
    assert browser.driver.save_screenshot(str(tmp_path / "phone.png"))
    assert browser.errors() == []


def test_text_of_a_run_is_only_text(browser, tmp_path):
    evil = "</script><img src=x onerror='window.hacked=1'><script>window.hacked=1</script>"
    run = write_run(tmp_path / "<b>run", answer=evil)
    append(run, "eval_data.json", [{"step": 70, "set": evil, "loss": 1.0}])
    append(run, "loss_data.json", [{"step": 101, evil: 3.0}])
    (run / "environment.json").write_text('{"python": "<img src=x onerror=window.hacked=1>"}')
    browser.open(write_report([run], tmp_path / "report.html"))
    assert evil in browser.text("#samples")
    assert evil in [h.get_property("innerText") for h in browser.find(".chart h3")]
    assert browser.run("return window.hacked") is None
    assert browser.find("#main img") == []
    assert browser.errors() == []


def test_tokens_are_coloured_by_their_loss(browser, tmp_path):
    from selenium.webdriver.common.action_chains import ActionChains

    run = write_run(tmp_path / "run")
    evil = "<b>x"
    tokens = [
        {"text": "Q:", "target": False, "loss": None},
        {"text": evil, "target": False, "loss": 1.0, "expected": [["a", 0.5]]},
        {"text": " low", "target": True, "loss": 0.5, "expected": [[" low", 0.60653], [evil, 0.25]]},
        {"text": " high", "target": True, "loss": 8.0, "expected": [["\n", 0.75]]},
    ]
    document = {"place": "x", "loss": 4.25, "num_targets": 2, "num_left_out": 6, "tokens": tokens}
    (run / "token_losses.json").write_text(json.dumps({"weights": "weights step-9", "documents": [document]}))
    browser.open(write_report([run], tmp_path / "report.html"))
    assert browser.text("#tokens .words") == f"Q:{evil} low high"
    assert "mean loss 4.2500 over 2 targets, the first 4 tokens" in browser.text("#tokens h3")
    shades = [span.value_of_css_property("background-color") for span in browser.find("#tokens .words span")]
    assert shades[:2] == ["rgba(0, 0, 0, 0)"] * 2, "context has no shade"
    opacities = [float(shade.split(",")[3].rstrip(")")) for shade in shades[2:]]
    assert 0.05 < opacities[0] < 0.2 < 0.6 < opacities[1] < 0.8, "the text above must stay readable"
    assert browser.text("#tokens .heat").split() == ["0", "1", "2", "4", "8", "nats"]
    word = browser.find("#tokens .words .target")[0]
    browser.run("arguments[0].scrollIntoView({block: 'center'})", word)
    ActionChains(browser.driver, duration=0).move_to_element(word).perform()
    facts = browser.text("#tokens .facts")
    assert '" low" loss 0.5000, probability 60.7%' in facts
    assert '" low" 60.7%' in facts
    assert f'"{evil}" 25.0%' in facts
    assert browser.errors() == []


def test_lost_missing_and_empty_values(browser, tmp_path):
    lost = write_run(tmp_path / "lost", loss=lambda step: None if 40 <= step < 60 else 2.0, grad_norm=None)
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "loss_data.json").write_text("[\n]")
    one = tmp_path / "one"
    one.mkdir()
    append(one, "loss_data.json", step_records(1))
    browser.open(write_report([lost, empty, one], tmp_path / "report.html"))
    assert rows_of(browser.hover("loss", 50 / 100))["lost"] == "not finite"
    assert browser.text("#overview .warnings") == "20 of 100 records have no finite loss, the first at step 40"
    assert browser.errors() == []
    browser.open(write_report([empty], tmp_path / "report.html"))
    assert "no records yet" in browser.text("#overview")
    assert browser.text("#chart-loss .empty") == "no values"
    assert browser.errors() == []


def test_a_run_that_has_diverged_says_so_and_its_curve_ends(browser, tmp_path):
    run = write_run(tmp_path / "diverged", loss=lambda step: None if step > 50 else 2.0)
    browser.open(write_report([run], tmp_path / "report.html"))
    assert "not finite\nsince step 51" in browser.text("#overview .cards")
    assert browser.text("#overview .lost") == "not finite"
    drawn = "return view.charts[0].lines.map((line) => line.ys.findLastIndex((y) => y !== null))"
    assert browser.run(drawn) == [49, 49]
    assert browser.errors() == []


def test_a_point_between_gaps_is_a_dot(browser, tmp_path):
    run = write_run(tmp_path / "one", loss=lambda step: 2.0 if step == 50 else None, smoothed_loss=None)
    browser.open(write_report([run], tmp_path / "report.html"))
    assert browser.painted("loss", 0) > 9


def test_steps_are_never_cut_in_parts(browser, tmp_path):
    run = write_run(tmp_path / "short", num_steps=2, resumed_at=0)
    browser.open(write_report([run], tmp_path / "report.html"))
    assert browser.run("return view.charts[0].x.ticks(15, view.axis)") == [0, 1, 2]


def test_a_spike_in_a_long_run_is_found(browser, tmp_path):
    run = tmp_path / "long"
    run.mkdir()
    records = step_records(100_000, loss=lambda step: 77.0 if step == 43_210 else 2.0)
    (run / "loss_data.json").write_text("[\n" + ",\n".join(map(json.dumps, records)) + "\n]")
    report = write_report([run], tmp_path / "report.html")
    assert report.stat().st_size < 2_000_000
    browser.open(report)
    browser.run("view.zoomTo([43000, 43400])")
    tip = browser.hover("loss", (43_210 - 43_000) / 400)
    assert tip.startswith("step 43,210 ")
    assert rows_of(tip)["long"] == "77.0000"
    assert browser.errors() == []


def test_a_live_run_is_followed(browser, tmp_path):
    run = write_run(tmp_path / "run", num_steps=50, resumed_at=20)
    with ReportServer([run], "127.0.0.1", 0, 1000) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            browser.open(server.url)
            assert browser.text("#live") == "live"
            browser.click("#axis-tokens")
            assert "step 50" in browser.text("#overview")
            browser.run("window.kept = [...document.querySelectorAll('#smoothing, #samples input, .words span')]")
            append(run, "loss_data.json", [{**step_records(60)[-1], "loss": 0.125}])
            browser.until(lambda: "step 60" in browser.text("#overview"))
            assert rows_of(browser.hover("loss", 1.0))["run"] == "0.1250"
            assert browser.find("#axis-tokens")[0].get_attribute("aria-pressed") == "true", "choices stay"
            assert browser.run("return window.kept.map((element) => element.isConnected)") == [True, True]
            append(run, "samples.json", [{"step": 60, "samples": [{"prompt": "New?", "text": "Yes", "stopped": True}]}])
            browser.until(lambda: "New?" in browser.text("#samples"))
            assert browser.errors() == []
            browser.driver.get("about:blank")
        finally:
            server.shutdown()
            thread.join(WAIT_SECONDS)
