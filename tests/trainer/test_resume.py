"""A run that is killed goes on where it was, and ends with the numbers of one that was not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import REPO

ALWAYS = ["--show_progress=False", "--save_every_s=0"]
SMALL = ["--dataset=ml-100k", "--user_inter_num_interval=[20,40]"]
SHOP = [
    *(
        "--dataset=mm-demo",
        "--limit_users=60",
        "--epochs=2",
        "--n_candidates=6",
        "--topk=[5,10,25]",
    ),
    *("--ranker_batch_size=4", "--ranker_max_steps=6", "--ranker_eval_every=3"),
    *("--preference_batch_size=16", "--preference_max_steps=6", "--preference_eval_every=3"),
]
TITLES = [
    *("--dataset=mm-demo", "--limit_users=60", "--epochs=2", "--topk=[5,10,25]", "--backbone=tiny"),
    *("--n_samples=60", "--alignment_batch_size=8"),
    *("--alignment_max_steps=8", "--alignment_eval_every=3"),
]
PICTURES = [
    *("--dataset=mm-demo", "--limit_users=60", "--epochs=2", "--topk=[5,10,25]", "--backbone=tiny"),
    *("--alignment_batch_size=8", "--max_history=4", "--item_repr=image", "--ila_weight=1"),
    *("--alignment_max_steps=8", "--alignment_eval_every=3"),
]
DATA = {"--model=PRIME": SHOP, "--model=RARec": TITLES, "--model=ILLMRec": PICTURES}


def command(*flags: str) -> list[str]:
    named = any(flag.startswith("--dataset=") for flag in flags)
    data = [] if named else DATA.get(flags[0], SMALL)
    return [sys.executable, str(REPO / "run_recbole_mm.py"), *flags, *data, *ALWAYS]


def run(folder: Path, *flags: str) -> dict:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command(*flags, "--result_file=r.json"), cwd=folder, env=environment, capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    return json.loads((folder / "r.json").read_text())


def kill_when(folder: Path, ready, *flags: str) -> None:
    process = subprocess.Popen(
        command(*flags),
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if any(ready(json.loads(p.read_text())) for p in folder.glob("saved/*/state.json")):
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            return
        time.sleep(0.02)
    pytest.fail("the run ended before it could be killed")


@pytest.mark.parametrize(
    ("model", "flags", "ready"),
    [
        (
            "LRURec",
            ("--epochs=4", "--train_batch_size=16"),
            lambda s: s["stages"].get("train", {}).get("steps", 0) >= 30,
        ),
        (
            "SASRec",
            ("--epochs=4", "--n_layers=1"),
            lambda s: s["stages"].get("train", {}).get("epochs", 0) >= 2,
        ),
        ("BPR", ("--epochs=25",), lambda s: s["stages"].get("train", {}).get("epochs", 0) >= 5),
        ("PRIME", (), lambda s: s["stages"].get("ranker", {}).get("steps", 0) >= 4),
        ("PRIME", (), lambda s: s["stages"].get("preference", {}).get("steps", 0) >= 4),
        ("RARec", (), lambda s: s["stages"].get("alignment", {}).get("steps", 0) >= 4),
        ("ILLMRec", (), lambda s: s["stages"].get("alignment", {}).get("steps", 0) >= 4),
    ],
)
def test_killed_and_resumed_equals_uninterrupted(
    tmp_path: Path, model: str, flags: tuple, ready
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    expected = run(whole, f"--model={model}", *flags)
    kill_when(broken, ready, f"--model={model}", *flags)
    resumed = run(broken, f"--model={model}", *flags, "--resume")
    assert len(list(broken.glob("saved/*"))) == 1, "resuming must not start a second run"
    assert resumed["test"] == expected["test"]
    assert resumed["valid"] == expected["valid"]
    assert resumed["rows"] == expected["rows"]
    for name, stage in expected["stages"].items():
        for key in ("epochs", "steps", "stopped", "valid", "test"):
            assert resumed["stages"][name][key] == stage[key], (name, key)
    if model == "PRIME":
        said = resumed["stages"]["preference"]
        assert said["ranker_calls"] == expected["stages"]["preference"]["ranker_calls"] > 0
        assert said["retrieval_rate"] == said["after"]["retrieval_rate"]
        assert {*said["before"]} == {*said["after"]} == {"retrieval_rate", "recall@6", "ndcg@6"}


def test_a_finished_run_evaluates_again_in_a_fresh_process(tmp_path: Path) -> None:
    for model, flags in (("GRU4Rec", ["--epochs=1"]), ("EASE", []), ("LRURec", ["--epochs=1"])):
        first = run(tmp_path, f"--model={model}", *flags)
        again = run(tmp_path, f"--load={first['run_dir']}")
        assert again["test"] == first["test"], model
        assert again["config_hash"] == first["config_hash"], model
    masked = run(tmp_path, f"--load={first['run_dir']}", "--mask_history=True")
    assert masked["protocol"] == "full-masked"
    assert masked["test"] == first["test_protocols"]["full-masked"]


def test_max_minutes_ends_training_and_still_tests(tmp_path: Path) -> None:
    for model, key in (("LRURec", "max_minutes"), ("LRURec", "train_max_minutes"),
                       ("BPR", "max_minutes")):  # fmt: skip
        result = run(tmp_path, f"--model={model}", "--epochs=500", f"--{key}=0.02")
        assert result["stages"]["train"]["stopped"] == "time", model
        assert result["stages"]["train"]["epochs"] < 500
        assert result["test_users"] == 305
