"""The report: pages from made-up run folders, whole, broken and hostile, and from a real tiny run."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import time
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser
from pathlib import Path

import pytest
from harness import RankPool
from train_cases import HALF, STEPS, tiny, train

from ray_deepep import InvalidArgumentError, run_files
from ray_deepep.cli import main
from ray_deepep.report import find_runs, read_run, render_page, write_report
from ray_deepep.report.summary import activities, expert_load, summarize
from train.metrics import read_metrics, run_stats

BEGAN = 2_000_000.0
VOID = {"meta", "br"}
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def step_record(step: int, **fields) -> dict:
    record = {"step": step, "loss": 6.0 / step + 0.0123, "aux_loss": 2.0, "lr": 1e-3, "tokens_per_s": 1000.0 + step}
    times = {"step_ms": 100.0 + step, "forward_ms": 40.0, "backward_ms": 45.0, "optimizer_ms": 5.0}
    record |= times | {"dispatch_ms": 7.0, "combine_ms": 3.0, "comm_calls": 8.0, "time_s": BEGAN + 10 + step}
    record |= {"val_loss": 5.0 / step} if step % 4 == 0 else {}
    return record | {"expert_tokens": [[10, 30, step, 0], [5, 5, 5, 5]]} | fields


def lines(records: list) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def make_run(path: Path, *, steps: int = 8, wanted: int = 8, **fields) -> Path:
    """A run of one start without faults, as the trainer leaves it."""
    path.mkdir(parents=True)
    config = {"name": "made-up", "model": {"hidden": 32}, "run": {"steps": wanted, "out_dir": str(path)} | fields}
    (path / run_files.CONFIG).write_text(json.dumps(config))
    (path / run_files.METRICS).write_text(lines([step_record(s) for s in range(1, steps + 1)]))
    start = {"time_s": BEGAN, "step": 0, "environment": {"ranks": 2, "torch": "2.13.0"}}
    (path / run_files.STARTS).write_text(lines([start]))
    return path


class Page(HTMLParser):
    """A parsed page; fails on what a browser would have to guess."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.source, self.tags, self.attributes, self.texts = source, [], [], []
        self._open: list[str] = []
        self.feed(source)
        self.close()
        assert not self._open, f"never closed: {self._open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open and self._open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.texts)

    def svgs(self) -> list[ElementTree.Element]:
        return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", self.source, re.DOTALL)]

    def row(self, name: str) -> list[str]:
        """Cells of the first table row with this heading."""
        found = re.search(
            rf'<tr[^>]*><th scope="row">(?:<span[^>]*>≠ </span>)?{re.escape(name)}</th>(.*?)</tr>', self.source
        )
        assert found, f"no row {name}"
        return [re.sub("<.*?>", "", cell) for cell in re.findall("<td.*?>(.*?)</td>", found.group(1))]


def page_of(*paths: Path, now: float | None = None) -> Page:
    """The page about these runs, an hour from now unless told; what holds for every page is checked."""
    page = Page(render_page(find_runs(paths), now=time.time() + 3600 if now is None else now))
    assert "script" not in page.tags
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    loads = [value for name, value in page.attributes if name in ("src", "href", "srcset", "action", "data")]
    assert all(value.startswith(("#", "data:image/png;base64,")) for value in loads), loads
    assert "url(" not in page.source and "@import" not in page.source
    for svg in page.svgs():
        numbers = " ".join(
            v for e in svg.iter() for k, v in e.attrib.items() if k in ("x", "y", "points", "width", "cx")
        )
        assert not re.search("nan|inf", numbers), numbers
    return page


def as_table(value: float, digits: int) -> str:
    return f"{value:,.{digits}f}"


def test_numbers_are_those_of_the_metrics(tmp_path):
    run = make_run(tmp_path / "a")
    page, stats = page_of(run), run_stats(read_metrics(run / run_files.METRICS))
    assert page.row("status") == ["finished: 8 steps"]
    assert page.row("first loss") == [as_table(stats.first_loss, 4)] == ["6.0123"]
    assert page.row("last loss") == [as_table(stats.last_loss, 4)]
    assert page.row("last validation loss") == [as_table(stats.val_loss, 4)] == ["0.6250"]
    assert page.row("tokens/s") == [as_table(stats.tokens_per_s, 0)]
    assert page.row("whole step") == [as_table(stats.step_ms, 2)] == ["105.50"]
    assert page.row("rest: batch, launches") == ["15.50"]
    assert page.row("dispatch (in forward and backward)") == ["7.00"]
    assert page.row("dispatch + combine, share of a step") == [f"{stats.comm_share:.1%}"]
    assert page.row("torch") == ["2.13.0"] and page.row("model.hidden") == ["32"]
    assert page.row("time from first start to last step") == ["18.0 s"]


def test_runs_of_other_lengths_side_by_side(tmp_path):
    long = make_run(tmp_path / "long", steps=2000, wanted=2000)
    page = page_of(long, make_run(tmp_path / "short", seed=7))
    assert page.row("status") == ["finished: 2000 steps", "finished: 8 steps"]
    assert page.row("run.steps") == ["2000", "8"] and page.row("run.seed") == ["–", "7"]
    marked = re.findall(r'<tr class="differs"><th scope="row"><span class="mark">≠ </span>([\w.]+)', page.source)
    assert marked == ["run.steps", "run.out_dir", "run.seed"]
    for svg in page.svgs():
        points = sum(len(e.get("points", "").split()) for e in svg.iter("polyline"))
        assert points < 3000, "long lines are thinned out"
    coloured = {e.get("class") for svg in page.svgs() for e in svg.iter("polyline")}
    assert {"line run0", "line over run1"} <= coloured


def test_a_run_that_crashed_before_its_first_step(tmp_path):
    crashed = make_run(tmp_path / "crashed", steps=0)
    page = page_of(crashed)
    assert page.row("status") == ["ended early: before step 1 of 8"]
    assert page.row("last loss") == page.row("tokens/s") == ["–"]
    assert page.row("ranks") == ["2"], "what it ran on is known"
    (crashed / run_files.METRICS).unlink()
    (crashed / run_files.STARTS).unlink()
    page = page_of(crashed)
    assert page.row("status") == ["ended early: before step 1 of 8"]
    assert "No run has noted what it ran on." in page.text


def test_a_run_without_a_config(tmp_path):
    run = make_run(tmp_path / "a")
    (run / run_files.CONFIG).write_text('{"name": ')
    assert "a: config.json is no JSON object" in page_of(run).text
    (run / run_files.CONFIG).unlink()
    page = page_of(run)
    assert "a: config.json is missing or empty" in page.text
    assert "No run has a configuration that can be read." in page.text


def test_a_run_that_still_goes(tmp_path):
    run = make_run(tmp_path / "going", steps=5)
    written = (run / run_files.METRICS).stat().st_mtime
    assert page_of(run, now=written + 3).row("status") == ["going: step 5 of 8, heard of 3 s ago"]
    assert page_of(run, now=written + 3600).row("status") == ["ended early: step 5 of 8"]


@pytest.mark.parametrize("tail", ['{"step": 9, "lo', '{"step": 9, "loss": 1.0, "text": "\xe4'])
def test_a_line_that_was_cut_is_left_out(tmp_path, tail):
    run = make_run(tmp_path / "a", wanted=20)
    with open(run / run_files.METRICS, "ab") as file:
        file.write(tail.encode()[:-1])
    page = page_of(run)
    assert "metrics.jsonl: line 9 is cut" in page.text
    assert page.row("last loss") == [as_table(6.0 / 8 + 0.0123, 4)]


def test_bad_lines_and_values_in_the_middle_are_left_out(tmp_path):
    run = make_run(tmp_path / "a", steps=0)
    records = [step_record(1, loss=math.nan), step_record(2, step_ms="fast"), step_record(3, lr=10**400), [4]]
    records += [
        step_record(5, expert_tokens=[[1, 2]]),
        step_record(6, expert_tokens="many"),
        {"step": -1},
        {"step": 1.5},
    ]
    records += [{"loss": 7.0}, step_record(8, loss=1.25), step_record(7), step_record(8, loss=1.5, time_s=True)]
    text = lines(records[:4]) + "\noops\n" + "[" * 100_000 + "\n" + lines(records[4:])
    (run / run_files.METRICS).write_text(text)
    (read,) = find_runs([run])
    assert [record["step"] for record in read.steps] == [1, 2, 3, 5, 6, 7, 8]
    assert read.series("loss")[0][0] == 2 and read.series("loss")[-1] == (8, 1.5)
    assert [step for step, _ in read.series("step_ms")] == [1, 3, 5, 6, 7, 8]
    assert list(expert_load(read)) == [1, 2, 3, 7, 8]
    text = page_of(run).text
    for number in (4, 6, 7):
        assert f"metrics.jsonl: line {number} is no JSON object" in text
    assert "line 5 " not in text, "an empty line is no fault"


def faulty_run(path: Path) -> Path:
    """Two faults; the first restart does two steps again, the second comes too late for any."""
    run = make_run(path, steps=0, wanted=20)
    times = {1: 11, 2: 12, 3: 13, 4: 14, 5: 45, 6: 46}
    records = [step_record(step, time_s=BEGAN + at, step_ms=1000.0) for step, at in times.items()]
    (run / run_files.METRICS).write_text(lines(records))
    starts = [{"time_s": BEGAN + at, "step": step, "environment": {}} for at, step in ((0, 0), (40, 4), (90, 6))]
    (run / run_files.STARTS).write_text(lines(starts))
    faults = [
        {"time_s": BEGAN + 16.5, "cause": "died", "rank": 1, "attempt": 1, "host": "node-a", "text": "rank 1 died"},
        {"time_s": BEGAN + 60, "cause": "late", "rank": 3, "attempt": 2, "gpu": "GPU-8a", "text": "rank 3 was late"},
    ]
    (run / run_files.FAULTS).write_text(lines(faults))
    return run


def test_faults_and_restarts(tmp_path):
    run = faulty_run(tmp_path / "faulty")
    (read,) = find_runs([run])
    first, second, third = activities(read)
    assert (first.training_s, first.ended_s) == (BEGAN + 10, BEGAN + 16.5), "until the fault: steps 5 and 6 were lost"
    assert (second.step, second.training_s, second.ended_s) == (4, BEGAN + 44, BEGAN + 60)
    assert (third.training_s, third.ended_s) == (None, BEGAN + 90)
    page = page_of(run)
    assert page.row("starts / faults") == ["3 / 2"]
    restarts, faults = re.findall(r"<h3>(?:Restarts|Faults)</h3>.*?<tbody>(.*?)</tbody>", page.source)
    rows = [re.findall("<td>(.*?)</td>", row) for row in re.findall("<tr>(.*?)</tr>", restarts)]
    assert [row[1:2] + row[3:] for row in rows] == [
        ["2", "died", "4", "27.5 s", "30.0 s"],
        ["3", "late", "6", "–", "–"],
    ]
    assert "rank 1 died" in faults and "node-a" in faults and "GPU-8a" in faults and "(+16.5 s)" in faults
    (lanes,) = [svg for svg in page.svgs() if svg.findtext("title") == "When the runs ran"]
    marks = {e.findtext("title") for e in lanes.iter("line") if e.get("class") == "fault"}
    assert marks == {"fault 1: died, 16.5 s in", "fault 2: late, 1 min 0 s in"}
    bars = [e.get("class") for e in lanes.iter("rect")]
    assert bars == ["run0 coming", "run0 training", "run0 coming", "run0 training", "run0 coming"]


def test_expert_load_over_time(tmp_path):
    page = page_of(make_run(tmp_path / "a"), make_run(tmp_path / "b"))
    images = [e for svg in page.svgs() for e in svg.iter("image")]
    assert len(images) == 4, "two layers of two runs"
    old = make_run(tmp_path / "old")
    (old / run_files.METRICS).write_text(lines([step_record(1, expert_tokens=None)]))
    assert "This run's metrics have no tokens per expert." in page_of(old).text


def test_hostile_text_stays_text(tmp_path):
    evil = '<script>alert(1)</script><img src=x onerror="alert(2)">&\x00\x1b'
    run = make_run(tmp_path / "<script>alert(0)", backend=evil, **{evil: evil})
    (run / run_files.SAMPLE).write_bytes(evil.encode() + b"\xff]]><!--</pre></style>")
    (run / run_files.FAULTS).write_text(lines([{"time_s": BEGAN + 3, "cause": evil, "rank": [evil], "text": evil}]))
    start = {"time_s": 1e14, "step": evil, "environment": {evil: {"nested": evil}}}
    (run / run_files.STARTS).write_text(lines([start, [evil], evil]))
    page = page_of(run)
    assert "img" not in page.tags and page.text.count("<script>alert(1)") >= 6
    assert "<script>alert(0)" in page.texts


def test_each_run_has_its_own_label_once(tmp_path):
    for name in ("x/stock", "y/stock", "y/ours"):
        make_run(tmp_path / name)
    (tmp_path / "y" / "notes.txt").write_text("no run")
    runs = find_runs([tmp_path / "x", tmp_path / "y", tmp_path / "y" / ".." / "x" / "stock"])
    assert [run.label for run in runs] == ["x/stock", "y/ours", "y/stock"]
    page_of(*(make_run(tmp_path / f"many{i}") for i in range(11)))


@pytest.mark.parametrize("kind", ["missing", "empty", "file"])
def test_what_is_no_run_is_an_error(tmp_path, capsys, kind):
    path = tmp_path / "it"
    if kind == "empty":
        path.mkdir()
    if kind == "file":
        path.write_text("x")
    good = make_run(tmp_path / "good")
    assert main(["report", str(good), str(path), "--out", str(tmp_path / "page.html")]) == 2
    error = capsys.readouterr().err
    assert str(path) in error and "must be the folder of a run (with config.json or metrics.jsonl" in error
    assert not (tmp_path / "page.html").exists()
    with pytest.raises(InvalidArgumentError, match="must be the folder of a run"):
        read_run(path, label="it")
    with pytest.raises(InvalidArgumentError, match="at least one"):
        find_runs([])


def test_command_writes_the_page(tmp_path, capsys, monkeypatch):
    run = make_run(tmp_path / "a")
    monkeypatch.chdir(tmp_path)
    assert main(["report", "a"]) == 0
    assert capsys.readouterr().out == "report.html: a\n"
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert page.row("folder") == ["a"]
    before = (run / run_files.METRICS).read_text()
    for out, rule in ((f"a/{run_files.METRICS}", "must end in .html"), ("no/x.html", "No such file or directory")):
        assert main(["report", "a", "--out", out]) == 2
        error = capsys.readouterr().err
        assert rule in error and out in error
    assert (run / run_files.METRICS).read_text() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "report.html"], "nothing half-written is left"


def test_checkpoint_is_the_newest_complete_one(tmp_path):
    run = make_run(tmp_path / "a")
    for step, seal in ((4, {"step": 4, "files": {"x": [2048, 1]}}), (8, {"step": 8, "files": {"x": [1024, 1]}})):
        folder = run / run_files.CHECKPOINTS / f"step_{step}"
        folder.mkdir(parents=True)
        (folder / run_files.CHECKPOINT_SEAL).write_text(json.dumps(seal))
    (run / run_files.CHECKPOINTS / "step_9").mkdir()
    assert page_of(run).row("newest checkpoint") == ["step 8, 1.0 KiB"]


def test_a_real_run_and_its_resume(tmp_path):
    out = tmp_path / "run"
    with RankPool(1, init_group=False) as alone:
        fields = {"run.steps": STEPS, "run.eval_batches": 1}
        alone.run(train, tiny(out, **fields).to_json(), deadline_s=120)
        fields |= {"run.on_existing": "resume", "run.steps": STEPS + HALF}
        alone.run(train, tiny(out, **fields).to_json(), deadline_s=120)
        again = tiny(shutil.copytree(out, tmp_path / "again"), **{"run.on_existing": "overwrite", "run.steps": 1})
        alone.run(train, again.to_json(), deadline_s=120)
    assert [start.step for start in find_runs([tmp_path / "again"])[0].starts] == [0], "an overwritten run is forgotten"
    page, steps = page_of(out, now=time.time()), read_metrics(out / run_files.METRICS)
    (read,) = find_runs([out])
    summary, stats = summarize(read, now=time.time()), run_stats(steps)
    assert read.notes == () and summary.status == f"finished: {STEPS + HALF} steps"
    assert (summary.first_loss, summary.last_loss, summary.last_val_loss) == (
        stats.first_loss,
        stats.last_loss,
        stats.val_loss,
    )
    assert (summary.tokens_per_s, summary.median_ms["step_ms"]) == (stats.tokens_per_s, stats.step_ms)
    assert [start.step for start in read.starts] == [0, STEPS]
    assert page.row("starts / faults") == ["2 / 0"] and page.row("ranks") == ["1"]
    assert page.row("newest checkpoint")[0].startswith(f"step {STEPS + HALF}, ")
    assert len([e for svg in page.svgs() for e in svg.iter("image")]) == 2


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH")
def test_chromium_draws_it_offline_without_complaint(tmp_path):
    from matplotlib.image import imread

    page = tmp_path / "page.html"
    write_report([make_run(tmp_path / "a"), faulty_run(tmp_path / "b")], page)
    colours = {"light": ((0x1F, 0x6F, 0xD6), (0xC2, 0x41, 0x0C)), "dark": ((0x6C, 0xB0, 0xFF), (0xFF, 0x9E, 0x64))}
    with ThreadPoolExecutor() as pool:
        said = dict(zip(colours, pool.map(lambda scheme: draw(page, tmp_path / f"{scheme}.png", scheme), colours)))
    for scheme, own in colours.items():
        assert "CONSOLE" not in said[scheme], said[scheme]
        pixels = imread(tmp_path / f"{scheme}.png")[..., :3] * 255
        assert (pixels[0, 0] > 230).all() if scheme == "light" else (pixels[0, 0] < 50).all()
        for colour in own:
            near = (abs(pixels - colour).max(axis=-1) < 3).sum()
            assert near > 300, f"the run drawn in {colour} is on the picture"


def draw(page: Path, picture: Path, scheme: str) -> str:
    """Make Chromium, cut off from the network, write the picture; returns what it printed."""
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--window-size=1320,3000"]
    options += ["--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={picture.with_suffix('.profile')}"]
    options += [f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}", f"--screenshot={picture}"]
    done = subprocess.run([CHROMIUM, *options, page.as_uri()], capture_output=True, text=True, timeout=60)
    assert picture.is_file(), done.stderr
    return done.stderr


def test_parts_of_the_model_are_shown_where_a_run_timed_them(tmp_path):
    plain, split = make_run(tmp_path / "plain"), make_run(tmp_path / "split")
    parts = {"attention_ms": 21.5, "gate_ms": 2.25, "experts_ms": 33.0}
    (split / run_files.METRICS).write_text(lines([step_record(s, **parts) for s in range(1, 9)]))
    assert summarize(find_runs([split])[0], now=BEGAN).median_ms["experts_ms"] == 33.0
    only_plain = "".join(Page(render_page(find_runs([plain]), now=BEGAN)).texts)
    both = "".join(Page(render_page(find_runs([plain, split]), now=BEGAN)).texts)
    for title in ("attention (in forward and backward)", "gates (in", "experts (in"):
        assert title in both and title not in only_plain
