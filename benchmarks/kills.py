"""Kill a run at random moments, go on, and compare the bits: a thousand times, by default.

    OMP_NUM_THREADS=1 python benchmarks/kills.py --kills 1000

Each round kills a tiny run (SIGKILL, workers included) at moments drawn evenly over the time that
it needs, resumes it until it is done, and holds its weights and its logged numbers against those of
a run that nobody disturbed. Every tenth time `backfold stats` looks at the data in between.
Writes results/kills.json after every round, and goes on with what is there.
"""

import argparse
import csv
import json
import os
import random
import signal
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import torch
from safetensors.numpy import load_file

from backfold import api  # noqa: F401 - what the forks need is imported once
from backfold.cli.main import main
from backfold.files import write_json
from step_cost.measuring import facts

RUN = [
    "pretrain", "--backbone=vit_tiny_patch16_224", "--backbone-options.patch_size=7",
    "--backbone-options.embed_dim=16", "--backbone-options.depth=1",
    "--backbone-options.num_heads=2", "--image-size=28", "--batch-size=64", "--max-steps=30",
    "--epochs=1", "--watch-every=0.1", "--held-out=32", "--checkpoint-minutes=0.001",
    "--tasks.masking.mask-patch-size=7", "--accelerator=cpu", "--devices=1",
    "--precision=32-true", "--num-workers=1", "--compile=false",
]  # fmt: skip
TIMES = ("seconds", "images_per_second", "data_wait")


def run_and_kill(arguments: list[str], after: float | None) -> tuple[int | None, float]:
    """Exit code and seconds of the command line in a fork, None where it was killed first."""
    start, process = time.monotonic(), os.fork()
    if process == 0:
        os.setpgid(0, 0)
        nothing = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(nothing, stream)
        os._exit(main(arguments))
    with suppress(PermissionError):  # it has done so itself, and is on its way
        os.setpgid(process, process)  # or a kill could come before
    while True:
        finished, status = os.waitpid(process, os.WNOHANG)
        seconds = time.monotonic() - start
        if finished:
            return os.waitstatus_to_exitcode(status), seconds
        if after is not None and seconds >= after:
            os.killpg(process, signal.SIGKILL)
            os.waitpid(process, 0)
            return None, seconds
        time.sleep(0.002)


def result(out: Path) -> tuple[dict[str, bytes], list[dict[str, str]]]:
    """The weights' bits, and the logged rows without what a clock says."""
    weights = load_file(out / "backbone.safetensors")
    with (out / "metrics.csv").open() as file:
        rows = [{k: v for k, v in row.items() if k not in TIMES} for row in csv.DictReader(file)]
    return {name: weight.tobytes() for name, weight in weights.items()}, rows


def torn(out: Path, needed: float, draws: random.Random) -> int:
    """Kill and resume the run until it is done; returns how often it was killed."""
    kills = 0
    while True:
        start = "--resume" if (out / "config.yaml").exists() else "--overwrite"
        code, _ = run_and_kill([*RUN, f"--out={out}", start], draws.uniform(0.0, needed))
        if code == 0:
            return kills
        if code is not None:
            raise SystemExit(f"the run ended with code {code} after {kills} kills: see {out}")
        kills += 1
        if kills % 10 == 0:
            run_and_kill(["stats", "--max-images=20"], None)


def go() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results"))
    arguments = parser.parse_args()
    path = (arguments.out / "kills.json").resolve()
    found = json.loads(path.read_text()) if path.exists() else {"kills": 0, "rounds": 0, "same": 0}
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for _ in range(2):  # the first run reads from a cold disk
            code, needed = run_and_kill([*RUN, "--out=whole", "--overwrite"], None)
            assert code == 0, code
        whole = result(Path("whole"))
        while found["kills"] < arguments.kills:
            draws, out = random.Random(found["rounds"]), Path(f"round-{found['rounds']}")
            found["kills"] += torn(out, 0.9 * needed, draws)
            found["rounds"] += 1
            found["same"] += result(out) == whole
            found["machine"] = facts(torch.device("cpu"))
            write_json(path, found)
            print(f"{found['kills']} kills, {found['same']} of {found['rounds']} runs the same")
    sys.exit(found["same"] != found["rounds"])


if __name__ == "__main__":
    go()
