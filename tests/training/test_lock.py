"""One run a folder: a second one is refused, whichever way it comes, and a killed one is in nobody's way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from peanut import PeanutError
from peanut.training.lock import alone
from peanut.training.run import train

HOLDER = """
import sys, time
from pathlib import Path
from peanut.training.lock import alone
with alone(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(100)
"""


@pytest.mark.skipif(os.name != "posix", reason="kills as only POSIX can")
def test_another_process_keeps_a_run_out_until_it_dies(run: dict[str, Any], tmp_path: Path) -> None:
    folder = Path(run["output"])
    folder.mkdir()
    (tmp_path / "link").symlink_to(folder)
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        for overwrite, output in ((False, folder), (True, folder), (True, tmp_path / "link")):
            with pytest.raises(PeanutError) as caught:
                train(run | {"output": str(output)}, overwrite=overwrite, quiet=True)
            assert str(caught.value).startswith(f"a run is going on in '{output}' (process {holder.pid} on ")
            assert "\n" not in str(caught.value)
        assert [path.name for path in folder.iterdir()] == [".lock"]
        holder.send_signal(signal.SIGKILL)
    with alone(folder):
        pass
    assert not list(folder.iterdir())


def test_of_many_threads_one_at_a_time_is_in(tmp_path: Path) -> None:
    inside, most, entered, kept_out = [0], [0], [0], [0]

    def work() -> None:
        for _ in range(100):
            try:
                with alone(tmp_path):
                    inside[0] += 1
                    most[0] = max(most[0], inside[0])
                    entered[0] += 1
                    inside[0] -= 1
            except PeanutError:  # noqa: PERF203 - it is what is counted
                kept_out[0] += 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]
    assert entered[0] + kept_out[0] == 400
    with alone(tmp_path), pytest.raises(PeanutError, match="a run is going on"), alone(tmp_path):
        pass


def test_a_lock_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / ".lock").mkdir()
    with pytest.raises(PeanutError, match="cannot write into folder"), alone(tmp_path):
        pass


def test_an_error_within_leaves_no_lock(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), alone(tmp_path):
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())


def test_only_the_first_process_of_a_distributed_run_takes_it(
    run: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(run["output"])
    folder.mkdir()
    monkeypatch.setenv("RANK", "1")
    with alone(folder), pytest.raises(PeanutError, match=r"no file 'none.csv'"):  # it came past the lock
        train(run | {"data": {"train": "none.csv"}}, quiet=True)
