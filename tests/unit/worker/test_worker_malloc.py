from __future__ import annotations

import subprocess
import sys

COUNT_FAULTS = """
import resource, sys
from forebay.worker.malloc import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()
def send():
    return [b"x" * (1 << 20) for _ in range(8)] and None
send()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
send()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def num_faults(mode: str) -> int:
    script = [sys.executable, "-c", COUNT_FAULTS, mode]
    return int(subprocess.run(script, capture_output=True, text=True, check=True).stdout)


def test_the_pages_of_freed_messages_are_used_again() -> None:
    assert num_faults("kept") < 100 < 1000 < num_faults("as it is")
