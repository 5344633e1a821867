"""What a person sees in MLflow's page of a finished, a failed and a running job: `raymill ui` in a real browser."""

from __future__ import annotations

import getpass
import os
import re
import shutil
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

from integration.commands import Home, wait_until
from raymill.files import read_record
from raymill.record.folder import RunFolder

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), None)

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(CHROMIUM is None, reason="needs a browser: install Chromium (Debian: apt-get install chromium)"),
]

# A page that is there is there at once; a machine that is busy may take its time.
expect.set_options(timeout=100_000)

CAUSE = "RuntimeError: made to fail at fault point before_forward"
JOB = ("train", "smoke", "--json", "--set", "loop.epochs=2")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    """A project with three runs of a job: one finished and registered, one that its code ended, one that goes on."""
    home = Home(tmp_path_factory.mktemp("home"))
    home.json(*JOB, "--in-process", "--set", "register={model: blobs}")
    failure = {"RAYMILL_FAULT": "before_forward:raise:step=12", "RAYMILL_FAULT_FOLDER": str(home.scratch)}
    code, _, stderr = home.run(*JOB, "--in-process", "--no-preflight", variables=failure)
    assert code == 1, stderr
    # It stands still in a step until it is ended.
    pause = {"RAYMILL_FAULT": "step_done:delay:rank=0:step=12:seconds=900", "RAYMILL_FAULT_FOLDER": str(home.scratch / "pause")}
    (home.scratch / "pause").mkdir()
    running = home.start(*JOB, "--no-preflight", "--set", "loop.stall_timeout_s=900", variables=pause)
    try:
        wait_until(lambda: is_delivered(home), running)
        yield home
    finally:
        stop_request = run_with(home, "running").stop_request
        running.send_signal(signal.SIGINT)
        wait_until(stop_request.exists, running)
        # The second ends it at once.
        running.send_signal(signal.SIGINT)
        running.communicate(timeout=120)


def run_with(home: Home, status: str) -> RunFolder:
    """The run that has this status."""
    runs = home.json("runs", "list", "--json")["runs"]
    return next(RunFolder(home.path / "runs" / run["run_id"]) for run in runs if run["status"] == status)


def is_delivered(home: Home) -> bool:
    """Whether MLflow has the evaluation after the first epoch of the run that goes on, the only one on Ray."""
    runs = [RunFolder(log.parent) for log in home.path.glob("runs/*/ray.log")]
    delivered = [run.events.read_bytes()[: read_record(run.delivery)["offset"]] for run in runs if run.delivery.exists()]
    return any(b'"evaluation"' in events for events in delivered)


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
    names = {}
    for status in ("finished", "failed", "running"):
        found = re.fullmatch(r"smoke-\d{4}(\d\d)(\d\d)-(\d\d)(\d\d)\d\d-(\w{3})\w{3}", run_with(home, status).run_id)
        assert found
        month, day, hour, minute, mark = found.groups()
        names[status] = f"{month}-{day} {hour}:{minute} {mark} smoke"
    return names


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
    facts(main, "rows trained on", "1,200 of 1,200", run_with(home, "finished").run_id)
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
    facts(main, "Failed", re.compile(r"at step 1\d of 20"), f"raymill train --resume {run_with(home, 'failed').run_id}")
    main.get_by_text("Show more").click()
    facts(main, CAUSE)
    page.goto(address)
    main = open_run(page, shown_names(home)["running"])
    facts(main, "Running", "attempt 1, 20 steps", f"raymill runs show {run_with(home, 'running').run_id}")


def test_the_registered_model_says_what_it_is_and_leads_to_its_run(page: Page, home: Home) -> None:
    main = open_run(page, shown_names(home)["finished"])
    main.get_by_role("link", name="blobs").last.click()
    origin = re.compile(rf"The best weights, step \d+, of run {run_with(home, 'finished').run_id}")
    facts(main, "Version 1", origin, "@ candidate")
    facts(main, "raymill evaluate blobs@candidate", shown_names(home)["finished"])
    main.get_by_role("link", name="blobs").first.click()
    facts(main, "What the job smoke trained", "Version 1")
