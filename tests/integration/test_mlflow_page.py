"""What a person sees in MLflow's page of a finished, a failed and a running job: `raymill ui` in a real browser."""

from __future__ import annotations

import getpass
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

from integration.commands import Home, wait_until
from raymill.files import read_record
from raymill.record.events import AttemptStarted, EvaluationDone, EventWriter, RunStopped, StepDone
from raymill.record.folder import RunFolder

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), None)

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(CHROMIUM is None, reason="needs a browser: install Chromium (Debian: apt-get install chromium)"),
]

# A page that is there is there at once; a machine that is busy may take its time.
expect.set_options(timeout=100_000)

FAILED, RUNNING = "smoke-20261125-101112-abcdef", "smoke-20261125-131415-fedcba"
CAUSE = "rank 0 failed: KeyError: 'weight', in jobs/smoke/task.py, line 31"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    """A project with three runs of a job: one finished and registered, one failed, one that goes on."""
    home = Home(tmp_path_factory.mktemp("home"))
    home.json("train", "smoke", "--json", "--in-process", "--set", "register={model: blobs}")
    finished = home.folder()
    failed, running = (another_run(home, finished, name) for name in (FAILED, RUNNING))
    with EventWriter(failed.events) as events:
        events.write(RunStopped(reason="failed", message=CAUSE))
    assert deliver(home, failed).wait(timeout=240) == 0, failed.tracking_log.read_text()
    tracker = deliver(home, running)
    try:
        wait_until(lambda: running.delivery.exists() and read_record(running.delivery)["offset"] > 0, tracker)
        yield home
    finally:
        tracker.kill()
        tracker.wait()


def another_run(home: Home, of: RunFolder, run_id: str) -> RunFolder:
    """A run of the same job that has made ten steps, driven by this process."""
    folder = RunFolder(home.path / "runs" / run_id)
    folder.path.mkdir()
    for record in (of.spec, of.plan, of.data_manifest, of.environment):
        shutil.copy(record, folder.path)
    with EventWriter(folder.events) as events:
        start = AttemptStarted(attempt=1, num_workers=2, step=0, num_total_steps=20, resumed=False, pid=os.getpid())
        events.write(start)
        for step in range(1, 11):
            events.write(StepDone(step=step, epoch=0, rows=60 * step, metrics={"train/loss": 1 / step}))
        events.write(EvaluationDone(step=10, epoch=0, rows=120, metrics={"validation/loss": 0.25}))
    return folder


def deliver(home: Home, folder: RunFolder) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "raymill.orchestration.tracker", str(folder.path)]
    with folder.tracking_log.open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, text=True, env=home.environment)


@pytest.fixture(scope="module")
def address(home: Home) -> Iterator[str]:
    """The direct link to the job's experiment, as `raymill ui` prints it, once the page is there."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = home.start("ui", "--port", str(port))
    assert process.stderr is not None
    reader = threading.Thread(target=process.stderr.read)
    try:
        link = next(found[1] for line in process.stderr if (found := re.search(r"^ +smoke: (http://\S+)$", line.rstrip())))
        # What the server prints goes on; somebody must read it.
        reader.start()
        wait_until(lambda: answers(port), process)
        yield link
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(timeout=60)
        if reader.ident is not None:
            reader.join()
        for pipe in (process.stdin, process.stdout, process.stderr):
            assert pipe is not None
            pipe.close()


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        # A sandbox of its own is refused to root; the only pages are this machine's.
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture
def page(browser: Browser, address: str) -> Iterator[Page]:
    """A browser that has never been here, at the address that was printed."""
    context = browser.new_context(viewport={"width": 1280, "height": 1400})
    context.set_default_timeout(100_000)
    opened = context.new_page()
    opened.goto(address)
    yield opened
    # For whoever wants to look: RAYMILL_PICTURES=folder
    if folder := os.environ.get("RAYMILL_PICTURES"):
        name = os.environ["PYTEST_CURRENT_TEST"].partition("::")[2].partition(" ")[0]
        opened.screenshot(path=Path(folder) / f"{name}.png")
    context.close()


def shown_names(home: Home) -> dict[str, str]:
    """Status -> what the run with that status is called."""
    (day, time, mark) = re.fullmatch(r"smoke-\d{4}(\d{4})-(\d{4})\d\d-(\w{3})\w{3}", finished_run(home).run_id).groups()  # type: ignore[union-attr]
    return {
        "finished": f"{day[:2]}-{day[2:]} {time[:2]}:{time[2:]} {mark} smoke",
        "failed": "11-25 10:11 abc smoke",
        "running": "11-25 13:14 fed smoke",
    }


def finished_run(home: Home) -> RunFolder:
    return next(RunFolder(run) for run in home.path.glob("runs/*/") if run.name not in (FAILED, RUNNING))


def open_run(page: Page, name: str) -> Locator:
    """Open a run's page as a person does, by a click on its name; returns what holds the page."""
    page.get_by_role("link", name=name).first.click()
    expect(page.get_by_role("heading", name=name)).to_be_visible()
    return page.get_by_role("main")


def facts(main: Locator, *texts: str | re.Pattern[str]) -> None:
    for text in texts:
        expect(main.get_by_text(text).first).to_be_visible()


def test_the_experiment_opens_as_training_runs_whose_names_differ_early(page: Page, home: Home) -> None:
    for name in shown_names(home).values():
        expect(page.get_by_role("link", name=name).first).to_be_visible()
    facts(page.get_by_role("main"), "The runs of the job smoke.", "raymill train smoke", "blobs")
    sidebar = page.get_by_role("navigation").first
    expect(sidebar.get_by_role("link", name="Runs", exact=True)).to_be_visible()
    expect(sidebar.get_by_role("link", name="Models", exact=True)).to_be_visible()
    # What MLflow shows of experiments with language models.
    expect(page.get_by_text("Evaluation runs")).to_have_count(0)
    expect(page.get_by_text("Judges")).to_have_count(0)
    expect(page.get_by_text("Ask questions about your experiments")).to_have_count(0)
    assert "/runs" in page.url


def test_a_finished_runs_page_says_what_came_of_it_what_ran_and_where_its_model_is(page: Page, home: Home) -> None:
    main = open_run(page, shown_names(home)["finished"])
    expect(page.get_by_text("Evaluation runs")).to_have_count(0)
    facts(main, "Finished", "at step 20 of 20", "raymill evaluate blobs@candidate")
    main.get_by_text("Show more").click()
    facts(main, "rows trained on", "1,200 of 1,200", finished_run(home).run_id)
    picture = main.locator("img[src*='pictures/curves.png']")
    expect(picture).to_be_visible()
    expect(picture).not_to_have_js_property("naturalWidth", 0)
    about = {"Created by": getpass.getuser(), "Source": "raymill train smoke", "Status": "Finished"}
    facts(main, *about, *about.values())
    facts(main, re.compile(r"^Metrics \(\d+\)"), "validation/accuracy", re.compile(r"^Parameters \(\d+\)"), "loop.seed")
    facts(main, "Logged models (1)", "Registered models")
    expect(main.get_by_role("link", name="blobs").first).to_be_visible()
    for tag in main.get_by_text(re.compile(r"[{\[]\"")).all():
        pytest.fail(f"raw JSON: {tag.text_content()}")


def test_a_finished_runs_curves_pictures_and_plan_are_there(page: Page, home: Home) -> None:
    main = open_run(page, shown_names(home)["finished"])
    main.get_by_role("tab", name="Model metrics").click()
    facts(main, re.compile(r"^train"), re.compile(r"^validation"), "accuracy", "loss")
    main.get_by_role("tab", name="Artifacts").click()
    facts(main, "pictures", "spec.json")
    main.get_by_text("plan.html").first.click()
    plan = main.frame_locator("iframe")
    expect(plan.get_by_role("heading", name="Plan of smoke")).to_be_visible()
    expect(plan.get_by_role("row", name=re.compile("total_steps 20"))).to_be_visible()


def test_a_failed_and_a_running_runs_pages_say_why_and_what_to_type(page: Page, address: str, home: Home) -> None:
    main = open_run(page, shown_names(home)["failed"])
    facts(main, "Failed", "at step 10 of 20", f"raymill train --resume {FAILED}")
    main.get_by_text("Show more").click()
    facts(main, CAUSE, "ray.log")
    page.goto(address)
    main = open_run(page, shown_names(home)["running"])
    facts(main, "Running", "attempt 1, 20 steps", f"raymill runs show {RUNNING}")


def test_the_registered_model_says_what_it_is_and_leads_to_its_run(page: Page, home: Home) -> None:
    main = open_run(page, shown_names(home)["finished"])
    main.get_by_role("link", name="blobs").last.click()
    origin = re.compile(rf"The best weights, step \d+, of run {finished_run(home).run_id}")
    facts(main, "Version 1", origin, "@ candidate")
    facts(main, "raymill evaluate blobs@candidate", shown_names(home)["finished"])
    main.get_by_role("link", name="blobs").first.click()
    facts(main, "What the job smoke trained", "Version 1")
