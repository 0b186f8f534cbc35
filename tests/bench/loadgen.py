"""MLPerf LoadGen drives a bundle, as a device would run it: SingleStream and Offline, performance mode.

    make bench-loadgen
    .venv/bin/python tests/bench/loadgen.py [BUNDLE] [--seconds 60] [--logs DIR]

A sample is a question and the bytes of an image; timed is all that `Session.run` does: decoding, pre-processing, every
component, the answer. Samples are drawn with replacement by LoadGen; nothing is kept from one to the next. Offline is
answered by two threads over one session. LoadGen's own logs stay in DIR/<scenario>; the exit code is 1 where one of
them does not say VALID. Rules: https://github.com/mlcommons/inference_policies/blob/master/inference_rules.adoc
"""

from __future__ import annotations

import argparse
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import mlperf_loadgen as lg

from edgemm import load_bundle
from edgemm.data.easy_vqa import samples
from edgemm.runtime.query import Query
from edgemm.runtime.session import Session

SAMPLES = 1024  # in memory, of the test split
WARM_UP = 500
LANES = {"SingleStream": 1, "Offline": 2}  # threads that answer
SLACK = 2.0  # what Offline issues over what should take --seconds, as it must not end before
SEED = 20261128


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path("out/x86-openvino/reasoner-x86-openvino.edgemm")
    parser.add_argument("bundle", type=Path, nargs="?", default=default)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--logs", type=Path, default=Path("out/loadgen"))
    arguments = parser.parse_args()
    session = load_bundle(arguments.bundle)
    queries = [Query(s.image.read_bytes(), s.text) for s in samples("test")[:SAMPLES]]
    valid = [
        measure(scenario, session, queries, lanes, arguments.seconds, arguments.logs / scenario)
        for scenario, lanes in LANES.items()
    ]
    return int(not all(valid))


def measure(scenario: str, session: Session, queries: list[Query], lanes: int, seconds: int, logs: Path) -> bool:
    """One LoadGen test with so many threads; prints its summary."""
    with ThreadPoolExecutor(lanes) as pool:
        began = time.perf_counter()
        list(pool.map(session.answer, queries[:WARM_UP]))
        rate = WARM_UP / (time.perf_counter() - began)
    settings = lg.TestSettings()
    settings.scenario = getattr(lg.TestScenario, scenario)
    settings.mode = lg.TestMode.PerformanceOnly
    settings.min_duration_ms = 1000 * seconds
    settings.min_query_count = 1 if scenario == "Offline" else SAMPLES
    settings.single_stream_expected_latency_ns = int(1e9 / rate)
    settings.offline_expected_qps = SLACK * rate
    settings.qsl_rng_seed = settings.sample_index_rng_seed = settings.schedule_rng_seed = SEED
    output = lg.LogOutputSettings()
    logs.mkdir(parents=True, exist_ok=True)
    output.outdir = str(logs)
    log = lg.LogSettings()
    log.log_output = output
    running: list[Future[None]] = []

    def answer(asked: list[lg.QuerySample]) -> None:
        for sample in asked:
            session.answer(queries[sample.index])
            lg.QuerySamplesComplete([lg.QuerySampleResponse(sample.id, 0, 0)])

    with ThreadPoolExecutor(lanes) as pool:

        def issue(asked: list[lg.QuerySample]) -> None:
            if lanes == 1:
                answer(asked)
            else:
                running.extend(pool.submit(answer, asked[i::lanes]) for i in range(lanes))

        sut = lg.ConstructSUT(issue, lambda: None)
        library = lg.ConstructQSL(len(queries), len(queries), lambda _: None, lambda _: None)
        lg.StartTestWithLogSettings(sut, library, settings, log, "")
        lg.DestroyQSL(library)
        lg.DestroySUT(sut)
    for lane in running:
        lane.result()
    summary = (logs / "mlperf_log_summary.txt").read_text(encoding="utf-8")
    sys.stdout.write(f"{summary}\n")
    return "Result is : VALID" in summary


if __name__ == "__main__":
    sys.exit(main())
