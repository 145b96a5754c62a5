"""Stages as processes of a Ray cluster with several nodes, all on this machine."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracle import random_ids

import runtime
from runtime.compute.batch import Batch
from runtime.errors import UserError
from runtime.model import Model
from runtime.stages.opening import connect
from runtime.stages.staged_engine import StagedEngine, StageLostError

ray = pytest.importorskip("ray", reason='stages need Ray: pip install "lazyneuron[cluster]"')

pytestmark = pytest.mark.skipif(
    os.name == "nt", reason="a cluster of several nodes on one machine needs Linux or macOS"
)
KILLS = int(os.environ.get("LAZYNEURON_MOMENTS", "3"))
OPTIONS: dict[str, Any] = {"kv_type": "f32", "device": "none", "threads": 1, "n_ctx": 512}
ROOT = Path(__file__).parent.parent
PROMPT = "We the people"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Three nodes. Its processes find the packages that these tests see."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        path = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, path)))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_enable_worker_prestart", "0")
        node = {"num_cpus": 2, "object_store_memory": 100 << 20, "include_dashboard": False}
        try:
            made = Cluster(initialize_head=True, head_node_args=node)
        except Exception as error:  # it wants shared memory, ports and some seconds
            pytest.skip(f"Ray does not start on this machine: {error}")
        for _ in range(2):
            made.add_node(num_cpus=1, object_store_memory=100 << 20)
        patch.setenv("RAY_ADDRESS", made.address)
        yield made.address
        ray.shutdown()
        made.shutdown()


@contextmanager
def staged(path: Path, n: int | str, **options: Any) -> Iterator[tuple[Model, StagedEngine]]:
    with runtime.load(path, stages=n, **OPTIONS | options) as model:
        assert isinstance(model.engine, StagedEngine)
        yield model, model.engine


def greedy(model: Model, n: int = 64) -> list[int]:
    generation = model.generate(PROMPT, max_tokens=n, sampling=runtime.Sampling(temperature=0))
    list(generation)
    return generation.token_ids


@pytest.mark.parametrize(("n", "mode"), [(2, "exact"), (4, "predicted"), ("auto", "verified")])
def test_the_same_text(cluster: str, fitted_gguf: Path, n: int | str, mode: str) -> None:
    with runtime.load(fitted_gguf, ffn=mode, **OPTIONS) as model:
        wanted = greedy(model)
        logits = model.logits(random_ids(40, 4000, seed=1))
    with staged(fitted_gguf, n, ffn=mode) as (model, engine):
        assert greedy(model) == wanted
        assert np.array_equal(model.logits(random_ids(40, 4000, seed=1)), logits)
        assert len(engine.stages) == (3 if n == "auto" else n)
        assert len({about.pid for about in engine.stages} | {os.getpid()}) == len(engine.stages) + 1


def test_eight_sequences_at_once(cluster: str, fitted_gguf: Path) -> None:
    texts = [random_ids(12, 4000, seed=k) for k in range(8)]
    with staged(fitted_gguf, 2) as (model, engine):
        alone = [model.logits(ids) for ids in texts]
        engine.exclusively(engine.cells.clear)
        for at in range(12):
            batch = Batch.together([Batch.of([ids[at]], at, k) for k, ids in enumerate(texts)])
            for found, wanted in zip(engine.compute(batch), alone, strict=True):
                assert np.abs(found - wanted[at]).max() <= 1e-5 * np.abs(wanted).max()


def test_stages_that_are_killed(cluster: str, fitted_gguf: Path) -> None:
    """At random moments of a text: it goes on right or ends with one error, and the next one is right."""
    with runtime.load(fitted_gguf, **OPTIONS) as model:
        wanted = greedy(model)
    with staged(fitted_gguf, 2) as (model, engine):
        started = time.monotonic()
        assert greedy(model) == wanted
        usual = time.monotonic() - started
        lost = 0
        for k in range(KILLS * 2):
            victim = engine.stages[k % 2].pid
            generation = model.generate(PROMPT, max_tokens=64, sampling=runtime.Sampling(temperature=0))
            after, began, killed = random.Random(k).uniform(0, usual), time.monotonic(), False
            try:
                for _ in generation:
                    if not killed and time.monotonic() - began > after:
                        os.kill(victim, signal.SIGKILL)
                        killed = True
            except StageLostError as error:
                lost += 1
                assert "its process has ended; it is begun anew" in error.message
            assert generation.token_ids == wanted[: len(generation.token_ids)]
            if not killed:
                os.kill(victim, signal.SIGKILL)
            try:
                found = greedy(model)
            except StageLostError:  # where it was killed behind the last token
                lost += 1
                found = greedy(model)
            assert found == wanted
        assert lost == KILLS * 2
        assert engine.losses == lost


def test_a_stage_that_hangs(cluster: str, fitted_gguf: Path) -> None:
    with staged(fitted_gguf, 2, stage_timeout=8.0) as (model, engine):
        wanted = greedy(model)
        os.kill(engine.stages[1].pid, signal.SIGSTOP)
        with pytest.raises(StageLostError, match="did not answer within 8 s"):
            greedy(model)
        assert greedy(model) == wanted


def test_ctrl_c_ends_a_command_and_its_stages(cluster: str, fitted_gguf: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "runtime",
        "complete",
        str(fitted_gguf),
        "-p",
        PROMPT,
        "-n",
        "4000",
        "--stages",
        "2",
    ]
    with subprocess.Popen(
        [*command, "--threads", "1"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    ) as process:
        assert process.stdout and process.stdout.read(20)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=120)
    assert (process.returncode, err.splitlines()[-1]) == (130, "interrupted")
    connect()
    free = time.monotonic() + 60
    while ray.available_resources().get("CPU") != ray.cluster_resources()["CPU"]:  # that its stages had
        assert time.monotonic() < free
        time.sleep(0.2)


def test_other_files_are_refused(cluster: str, fitted_gguf: Path, tmp_path: Path) -> None:
    """A stage begun anew finds another file in the place of the first: it must not join."""
    path = tmp_path / "m.gguf"
    path.write_bytes(fitted_gguf.read_bytes())
    with staged(path, 2) as (model, engine):
        data = bytearray(fitted_gguf.read_bytes())
        at = data.index(b"general.name")
        data[at : at + 12] = b"general.nine"
        path.unlink()
        path.write_bytes(data)
        os.kill(engine.stages[0].pid, signal.SIGKILL)
        with pytest.raises(StageLostError):
            greedy(model)
        with pytest.raises(UserError, match=rf"stage 1 on {socket.gethostname()}: header .*, expected"):
            greedy(model)


def test_what_stages_refuse(cluster: str, fitted_gguf: Path, tmp_path: Path) -> None:
    for options, message in (
        ({"stages": 99}, "99 stages, expected 1 to 6"),
        ({"stages": 0}, "stages is 0"),
        ({"stages": 2, "threads": 64}, "CPUs, expected at least 128"),
        ({"stages": 2, "ram_budget": "1GiB"}, "stages with a budget of main memory"),
        ({"stages": 2, "trace": tmp_path / "t.json"}, "stages with a trace"),
        ({"stages": 2, "threads": None, "cpus": (0,)}, "stages with processors of this machine"),
    ):
        with pytest.raises(UserError, match=message), runtime.load(fitted_gguf, **OPTIONS | options):
            pass
