"""`ngk scale`: the search, its records, one measurement in a process of its own, the table and the plots."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from neural_graphs import cli
from neural_graphs.models import NGT
from neural_graphs.scaling import measure as measuring
from neural_graphs.scaling import projection, show, study
from neural_graphs.scaling.methods import METHODS, parameters, select, width_for
from neural_graphs.scaling.study import Largest, Records, Settings, Study, edges_of, fits, gap, layout_of
from ngkernels.planner import parse_size

MIB = 1 << 20
SETTINGS = Settings(budgets=(8 * MIB,), refine=3)


class Machine:
    """Stands in for the measuring process: so many bytes and seconds per edge, out of memory beyond the limit."""

    def __init__(self, per_edge=1000.0, seconds=1e-6):
        self.per_edge, self.seconds, self.asked = per_edge, seconds, []

    def __call__(self, request, timeout):
        hidden = request["layout"][1]
        self.asked.append((request["method"], hidden))
        peak, seconds = int(self.per_edge * edges_of(hidden)), self.seconds * edges_of(hidden)
        if seconds > timeout:
            return {"outcome": "timeout", "reason": "no result"}
        if peak > request["limit_bytes"] * 1.1:
            return {"outcome": "out of memory", "reason": "can't allocate memory"}
        return {"outcome": "ok", "peak_bytes": peak, "seconds": seconds, "all_seconds": [seconds], "parameters": 94122}


@pytest.fixture
def fake(monkeypatch):
    machine = Machine()
    monkeypatch.setattr(study, "measure", machine)
    return machine


# ---- the search ----
def test_the_networks_of_the_study():
    assert layout_of(1024) == (2, 1024, 2048, 3) and edges_of(1024) == 2_105_344


def test_finds_the_largest_and_measures_every_size_on_the_way(fake, tmp_path):
    (found,) = Study(SETTINGS, tmp_path / "scale.jsonl").search(METHODS["dws"])
    assert [hidden for _, hidden in fake.asked] == [16, 32, 64, 48, 56]  # doubled, then halved on the grid of 8
    assert found.row["hidden"] == 56 and 1000 * edges_of(56) <= 8 * MIB < 1000 * edges_of(64)
    assert found.bound == "memory" and found.row["width"] == 32
    assert len((tmp_path / "scale.jsonl").read_text().splitlines()) == len(fake.asked)


def test_several_budgets_share_measurements(fake, tmp_path):
    budgets = (1 * MIB, 8 * MIB)
    found = Study(replace(SETTINGS, budgets=budgets), tmp_path / "scale.jsonl").search(METHODS["dws"])
    for budget, largest in zip(budgets, found, strict=True):
        assert largest.budget == budget and fits(largest.row, budget)
    assert found[0].row["hidden"] < found[1].row["hidden"] and len(fake.asked) == len(set(fake.asked))


def test_what_ends_the_search(fake, tmp_path):
    fake.per_edge = 1.0
    (found,) = Study(replace(SETTINGS, last=64), tmp_path / "a.jsonl").search(METHODS["dws"])
    assert (found.row["hidden"], found.bound) == (64, "study")
    fake.seconds = 0.1
    (found,) = Study(replace(SETTINGS, max_seconds=100.0, refine=0), tmp_path / "b.jsonl").search(METHODS["dws"])
    assert (found.row["hidden"], found.bound) == (16, "time")
    fake.per_edge = 1e6
    (found,) = Study(replace(SETTINGS, refine=0), tmp_path / "c.jsonl").search(METHODS["dws"])
    assert (found.row, found.bound) == (None, "memory")


def test_a_width_beyond_one_that_does_not_fit_does_not_count():
    rows = {h: {"outcome": "ok", "peak_bytes": peak} for h, peak in {16: 1, 32: 9, 64: 2}.items()}
    assert gap(rows, 5) == (16, 32) and gap(rows, 10) == (64, None) and gap(rows, 0) == (None, 16)


def test_sizes_that_take_too_long_are_projected(fake, tmp_path):
    """Beyond the time limit: the planner's peak, the time of smaller networks carried on; they count, and are measured if time allows."""
    fake.per_edge, fake.seconds = 8.0, 1e-3
    settings = replace(SETTINGS, budgets=(64 * MIB,), last=512, refine=0, max_seconds=30.0, project=True)
    (found,) = Study(settings, tmp_path / "scale.jsonl").search(METHODS["ng-gnn"])
    rows = [json.loads(line) for line in (tmp_path / "scale.jsonl").read_text().splitlines()]
    assert [row["hidden"] for row in rows if row["outcome"] == "ok"] == [16, 32, 64] == [hidden for _, hidden in fake.asked]
    assert [row["hidden"] for row in rows if row["outcome"] == "projected"] == [128, 256, 512] and found.row["hidden"] == 512
    assert found.row["seconds"] == pytest.approx(1e-3 * edges_of(512), rel=0.01) and 4 * edges_of(512) < found.row["peak_bytes"] < 64 * MIB
    text = show.page(settings, [found], rows)
    assert f"{found.row['seconds']:,.0f} s |" in text and "was not run" in text
    assert show.row_text(rows[-1]).endswith("(projected)") and f"{found.row['seconds']:.3g} s" in show.row_text(rows[-1])
    longer = replace(settings, max_seconds=1e6)
    (found,) = Study(longer, tmp_path / "scale.jsonl").search(METHODS["ng-gnn"])
    assert found.row["outcome"] == "ok" and 512 in [hidden for _, hidden in fake.asked]
    (alone,) = Study(replace(settings, project=False, last=128), tmp_path / "other.jsonl").search(METHODS["ng-gnn"])
    assert (alone.row["hidden"], alone.bound) == (64, "time")


def test_what_is_not_projected():
    rows = [{"outcome": "ok", "edges": e, "seconds": 2e-3 * e} for e in (1000, 2000)]
    request = {"method": "dws", "layout": layout_of(64), "width": 32, "weight_grads": False, "threads": 1, "device": "cpu"}
    assert projection.project(request, rows, 10**6, 10.0) is None  # the planner does not know it
    assert projection.project({**request, "method": "ng-gnn"}, rows, 1000, 10.0) is None and projection.seconds_at(rows[:1], 10) is None
    assert projection.seconds_at(rows, 4000) == pytest.approx(8.0)
    flat = [{"outcome": "ok", "edges": e, "seconds": 1.0} for e in (1000, 2000)]
    assert projection.seconds_at(flat, 4000) == pytest.approx(2.0)  # what does not grow yet grows in the end


def test_other_networks(fake, tmp_path):
    settings = replace(SETTINGS, last=16, refine=0, others=("mnist-inrs", "nerf"))
    made = Study(settings, tmp_path / "scale.jsonl")
    found = made.search(METHODS["dws"])
    rows = {row["hidden"]: row for row in made.records.latest()}
    assert rows["mnist-inrs"]["edges"] == 71_680 and rows["mnist-inrs"]["batch"] == 64 and rows["nerf"]["layout"][0] == 63
    text = show.page(settings, found, list(rows.values()))
    assert "| method | [2, 32, 32, 1] x 64 | [63, 256," in text and "| DWS |" in text
    count = len(fake.asked)
    Study(settings, tmp_path / "scale.jsonl").search(METHODS["dws"])
    assert len(fake.asked) == count
    with pytest.raises(ValueError, match="scale: expected others of mnist-inrs, .*, got 'x'"):
        replace(settings, others=("x",))


# ---- records ----
def test_an_interrupted_study_continues(monkeypatch, tmp_path):
    stopped = Machine()

    def interrupted(request, timeout):
        if len(stopped.asked) == 3:
            raise KeyboardInterrupt
        return stopped(request, timeout)

    path = tmp_path / "scale.jsonl"
    monkeypatch.setattr(study, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Study(SETTINGS, path).search(METHODS["dws"])
    path.write_text(path.read_text() + '{"schema": 1, "cut')  # and a line that was being written
    rest = Machine()
    monkeypatch.setattr(study, "measure", rest)
    known = []
    (found,) = Study(SETTINGS, path, lambda row, was: known.append(was)).search(METHODS["dws"])
    assert known[:3] == [True] * 3 and not any(known[3:]) and len(rest.asked) == len(known) - 3
    whole = Machine()
    monkeypatch.setattr(study, "measure", whole)
    (alone,) = Study(SETTINGS, tmp_path / "other.jsonl").search(METHODS["dws"])
    assert alone.row["hidden"] == found.row["hidden"] and whole.asked == stopped.asked + rest.asked
    assert [json.loads(line)["outcome"] for line in path.read_text().splitlines()] == ["ok"] * len(whole.asked)


def test_fresh_measures_again_and_keeps_what_is_there(fake, tmp_path):
    path = tmp_path / "scale.jsonl"
    Study(SETTINGS, path).search(METHODS["dws"])
    before, count = path.read_text(), len(fake.asked)
    fake.per_edge = 500.0
    Study(SETTINGS, path, fresh=True).search(METHODS["dws"])
    assert len(fake.asked) > count and path.read_text().startswith(before)
    records = Study(SETTINGS, path).records
    assert records.find("dws", 16, 8 * MIB, 600.0)["peak_bytes"] == 500 * edges_of(16)  # the later one
    assert [row["peak_bytes"] for row in records.latest() if row["hidden"] == 16] == [500 * edges_of(16)]


def test_which_records_answer(fake, tmp_path):
    path = tmp_path / "scale.jsonl"
    Study(SETTINGS, path).search(METHODS["dws"])
    count = len(fake.asked)
    Study(SETTINGS, path).search(METHODS["dws"])
    Study(replace(SETTINGS, budgets=(2 * MIB,), refine=0), path).search(METHODS["dws"])
    assert len(fake.asked) == count  # less memory: known
    Study(replace(SETTINGS, budgets=(20 * MIB,), refine=0), path).search(METHODS["dws"])
    assert len(fake.asked) > count  # more memory: larger networks
    for other in ({"dtype": "bf16"}, {"threads": 2}, {"weight_grads": True}, {"parameters": 50_000}):
        count = len(fake.asked)
        Study(replace(SETTINGS, refine=0, **other), path).search(METHODS["dws"])
        assert len(fake.asked) > count, other
    records = Records(path, Study(SETTINGS, path).records.key)
    assert records.find("dws", 16, 8 * MIB, 600.0)["outcome"] == "ok" and records.find("nfn", 16, 8 * MIB, 600.0) is None


def test_what_ran_out_of_less_does_not_answer(tmp_path):
    records = Records(tmp_path / "scale.jsonl", {})
    base = {"schema": 1, "key": {}, "method": "dws", "hidden": 16, "limit_bytes": 100, "max_seconds": 10.0}
    records.append({**base, "outcome": "out of memory", "reason": ""})
    assert records.find("dws", 16, 100, 10.0) and records.find("dws", 16, 101, 10.0) is None
    records.append({**base, "hidden": 32, "outcome": "timeout", "reason": ""})
    assert records.find("dws", 32, 100, 10.0) and records.find("dws", 32, 100, 11.0) is None
    records.append({**base, "hidden": 64, "outcome": "error", "reason": ""})
    assert records.find("dws", 64, 100, 10.0) is None


def test_broken_records_are_named(tmp_path):
    path = tmp_path / "scale.jsonl"
    path.write_text('{"schema": 1, "key": {}}\nx\n{"schema": 1, "key": {}}\n')
    with pytest.raises(ValueError, match=r"expected JSON lines, got line 2 of '.*scale.jsonl'.*; take that line out"):
        Records(path, {})
    path.write_text('{"schema": 0, "key": {}}\n{}\n')
    with pytest.raises(ValueError, match=r"expected schema 1 in '.*', got 0 in line 1; use another --out"):
        Records(path, {})


# ---- one measurement ----
REQUEST = {
    "method": "dws", "layout": (2, 8, 16, 3), "width": 16, "dtype": "fp32", "weight_grads": True, "threads": 1, "device": "cpu",
    "limit_bytes": 512 * MIB, "repeats": 2,
}  # fmt: skip


@pytest.mark.parametrize("method", ["dws", "ng-gnn", "ng-gnn-published", "ng-t", "ng-t-edges", "ng-t-published"])
def test_a_measurement(method: str):
    found = measuring.measure({**REQUEST, "method": method}, 300)
    assert found["outcome"] == "ok", found
    assert 0 < found["peak_bytes"] < 128 * MIB and len(found["all_seconds"]) >= 1 and min(found["all_seconds"]) > 0
    assert found["parameters"] == parameters(METHODS[method], REQUEST["layout"], 16)


def test_bf16_and_peaks_that_grow():
    """A bfloat16 step keeps less than a float32 one; both keep kilobytes for each of 33,792 edges."""
    peaks = {}
    for dtype in ("fp32", "bf16"):
        found = measuring.measure({**REQUEST, "method": "ng-gnn-pyg", "width": 32, "layout": (2, 128, 256, 3), "dtype": dtype}, 300)
        assert found["outcome"] == "ok", found
        peaks[dtype] = found["peak_bytes"] / edges_of(128)
    assert 2_000 < peaks["bf16"] < peaks["fp32"] < 12_000


def test_out_of_memory_is_a_result():
    found = measuring.measure({**REQUEST, "layout": (2, 256, 512, 3), "width": 32, "limit_bytes": 16 * MIB}, 300)
    assert found["outcome"] == "out of memory" and found["reason"]


def test_time_is_limited_and_errors_are_named():
    assert measuring.measure(REQUEST, 0.2) == {"outcome": "timeout", "reason": "no result after 0 s"}
    found = measuring.measure({**REQUEST, "layout": (2, 8, 3)}, 300)
    assert found["outcome"] == "error" and "expected layout of at least 4 layers" in found["reason"]


def test_outcomes_by_exit_status():
    assert measuring.classify(0, 'noise\n{"outcome": "ok"}\n', "") == {"outcome": "ok"}
    assert measuring.classify(-9, "", "")["outcome"] == "out of memory"
    for text in (
        "std::bad_alloc",
        "RuntimeError: DefaultCPUAllocator: can't allocate memory: you tried",
        "torch.OutOfMemoryError: CUDA out of memory.",
    ):
        assert measuring.classify(-6, "", f"Traceback\n{text}")["outcome"] == "out of memory"
    assert measuring.classify(1, "", "Traceback\nValueError: x") == {"outcome": "error", "reason": "ValueError: x"}
    assert measuring.classify(-11, "", "") == {"outcome": "error", "reason": "exit status -11"}


# ---- methods ----
@pytest.mark.parametrize("name", ["ng-gnn", "ng-t", "nfn", "dws"])
def test_widths_for_a_number_of_parameters(name: str):
    method = METHODS[name]
    width = width_for(method, 400_000)
    count = parameters(method, (2, 16, 32, 3), width)
    assert width % method.step == 0
    assert all(
        abs(parameters(method, (2, 16, 32, 3), w) - 400_000) >= abs(count - 400_000)
        for w in (width - method.step, width + method.step)
        if w > 0
    )


def test_every_ng_gnn_has_the_same_parameters():
    counts = {parameters(method, (2, 16, 32, 3), 32) for name, method in METHODS.items() if name.startswith("ng-gnn")}
    assert counts == {94_122}


def test_every_ng_t_has_the_same_parameters():
    """The published widths are the models' defaults."""
    layout = (2, 16, 32, 3)
    default = sum(p.numel() for p in NGT(layout, out_features=10).parameters() if p.requires_grad)
    assert {parameters(method, layout, 32) for name, method in METHODS.items() if name.startswith("ng-t")} == {default}


def test_select(monkeypatch):
    assert [m.name for m in select("dws, nfn,dws")[0]] == ["dws", "nfn"]
    assert {m.name for m in select("all")[0]} == set(METHODS)
    monkeypatch.setitem(METHODS, "dws", replace(METHODS["dws"], needs=("no_such_package",)))
    chosen, missing = select("all")
    assert "dws" not in {m.name for m in chosen} and "no_such_package is not installed" in missing["dws"]
    with pytest.raises(ValueError, match="--methods: dws cannot run: the package no_such_package is not installed"):
        select("dws")
    with pytest.raises(ValueError, match="--methods: expected all or some of .*, got 'x'"):
        select("dws,x")


# ---- table and plots ----
def test_slopes():
    assert show.slope([(x, 3 * x**1.5) for x in (1, 10, 100, 1000)]) == pytest.approx(1.5)
    assert show.slope([(1, 1)]) is None
    rows = [{"outcome": "ok", "edges": e, "peak_bytes": 50 + 7 * e} for e in (10, 1000, 100)] + [{"outcome": "timeout", "edges": 10_000}]
    assert show.per_edge(rows) == pytest.approx(7)


def test_page_and_plots(fake, tmp_path):
    settings = replace(SETTINGS, budgets=(1 * MIB, 8 * MIB))
    made = Study(settings, tmp_path / "scale.jsonl")
    results = made.search(METHODS["dws"])
    fake.per_edge = 1e9
    results += made.search(METHODS["nfn"])
    paths = show.publish(settings, results, made.records.latest(), tmp_path)
    text = paths[0].read_text()
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(lines) == 4 and len({line.count("|") for line in lines}) == 1
    assert "largest run at 1.0 MiB" in lines[0] and "‡" not in text and show.layout_text(results[1].row["layout"]) in lines[2]
    assert "| 1,000 | 1.00 | 1.00 | [2, 2048, 4096, 3] |" in lines[2] and lines[3].startswith("| NFN (NP) | - | none |")
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in paths[1:])


def test_what_was_run_and_what_is_projected(fake, tmp_path):
    """Of a method whose largest network was not run, both stand in the table; edges are set against the published implementation's."""

    def row(method: str, h: int, outcome: str) -> dict:
        known = {"machine": {"model": "m"}, "versions": {"torch": "1", "torch_geometric": "2"}, "git": "abc", "time": "2026", "parameters": 5, "limit_bytes": 9 * MIB}
        return {"method": method, "hidden": h, "edges": h * h, "layout": [2, h, 3], "outcome": outcome, "peak_bytes": h * 1000, "seconds": h, **known}

    rows = [row("ng-t-published", 10, "ok"), row("ng-t", 100, "ok"), row("ng-t", 400, "ok"), row("ng-t", 800, "projected"), row("ng-t", 9000, "ok")]
    largest = [Largest("ng-t-published", 8 * MIB, rows[0], "memory"), Largest("ng-t", 8 * MIB, rows[3], "memory")]
    settings = replace(SETTINGS, budgets=(8 * MIB,), weight_grads=True)
    paths = show.publish(settings, largest, rows, tmp_path)
    assert [p.name for p in paths] == ["scale-weight-grads.md", "scale-weight-grads-memory.png", "scale-weight-grads-time.png"]
    lines = [line for line in paths[0].read_text().splitlines() if line.startswith("| NG-T")]
    assert "| [2, 10, 3] | 100 | 1 | 9.8 KiB | 10 | - |" in lines[0]
    assert "| [2, 400, 3] | 160,000 | 1,600 | 390.6 KiB | 400 | 640,000 edges: 781.2 KiB, 800 s |" in lines[1]
    assert "with gradients of its weights" in paths[0].read_text() and "the peak is the planner's" in paths[0].read_text()


# ---- the command ----
def ngk(capsys, *arguments) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        cli.main([str(argument) for argument in arguments])
    shown = capsys.readouterr()
    return ended.value.code or 0, shown.out, shown.err


def test_command(tmp_path, capsys):
    options = ["scale", "--methods", "ng-gnn,dws", "--first", 8, "--last", 16, "--refine", 0, "--budget", "256MiB", "--out", tmp_path]
    status, out, _ = ngk(capsys, *options)
    assert status == 0 and out.count(" edges: ") == 4 and "(known)" not in out
    assert "ng-gnn at 256.0 MiB: [2, 16, 32, 3], the largest tried" in out and "dws at 256.0 MiB: [2, 16, 32, 3]" in out
    (folder,) = tmp_path.iterdir()
    assert sorted(p.name for p in folder.iterdir()) == ["scale-memory.png", "scale-time.png", "scale.jsonl", "scale.md"]
    rows = [json.loads(line) for line in (folder / "scale.jsonl").read_text().splitlines()]
    assert [(row["method"], row["hidden"], row["outcome"]) for row in rows] == [(m, h, "ok") for m in ("ng-gnn", "dws") for h in (8, 16)]
    assert all(row["peak_bytes"] > 0 and row["machine"]["model"] and row["versions"]["torch"] for row in rows)
    status, out, _ = ngk(capsys, *options)
    assert status == 0 and out.count("(known)") == 4 and len((folder / "scale.jsonl").read_text().splitlines()) == 4


def test_ctrl_c_keeps_what_is_measured(monkeypatch, tmp_path, capsys):
    machine = Machine()

    def interrupted(request, timeout):
        if machine.asked:
            raise KeyboardInterrupt
        return machine(request, timeout)

    monkeypatch.setattr(study, "measure", interrupted)
    status, _, err = ngk(capsys, "scale", "--methods", "dws", "--budget", "8MiB", "--out", tmp_path)
    assert status == 130 and err.startswith("stopped; the measurements so far are in") and "The same command continues" in err
    assert len(next(tmp_path.rglob("scale.jsonl")).read_text().splitlines()) == 1


def test_an_interrupted_measurement_leaves_no_process(monkeypatch):
    started = []

    class Interrupted(measuring.subprocess.Popen):
        def communicate(self, *args, timeout=None, **options):
            if not started:
                started.append(self)
                raise KeyboardInterrupt
            return super().communicate(*args, timeout=timeout, **options)

    monkeypatch.setattr(measuring.subprocess, "Popen", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        measuring.measure(REQUEST, 300)
    assert started[0].returncode == -9


def test_errors_are_one_sentence(tmp_path, capsys):
    for arguments, words in [
        (["--methods", "x"], "error: --methods: expected all or some of ng-gnn"),
        (["--budget", "much"], "error: expected a size such as 8GiB or 512MiB, got 'much'"),
        (["--budget", "900TiB"], "error: --budget: expected at most what is free"),
        (["--first", "12"], "error: scale: expected a first width that is a multiple of 8"),
        (["--dtype", "fp8"], "error: scale: expected dtype fp32 or bf16, got 'fp8'"),
    ]:
        status, _, err = ngk(capsys, "scale", "--out", tmp_path, *arguments)
        assert status == 1 and err.startswith(words) and len(err.strip().splitlines()) == 1
    status, out, _ = ngk(capsys, "scale", "--list-methods")
    assert status == 0 and all(name in out for name in METHODS)


def test_sizes_of_memory():
    assert [parse_size(t) for t in ("8GiB", "512 MiB", "1.5GB", "100", "2KB", "1tib")] == [
        8 << 30,
        512 << 20,
        1_500_000_000,
        100,
        2000,
        1 << 40,
    ]
    for text in ("", "GiB", "8 apples", "-1GiB"):
        with pytest.raises(ValueError, match="expected a size such as 8GiB"):
            parse_size(text)
