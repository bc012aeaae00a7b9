"""What is said of a machine, and what is not."""

import getpass
import json
import os
import platform
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

import longvid
from longvid.environment import describe_machine


def test_facts_are_those_of_this_machine():
    facts = describe_machine("cpu")
    assert facts["ram_bytes"] == psutil.virtual_memory().total
    assert facts["num_torch_threads"] == torch.get_num_threads()
    assert (facts["python"], facts["torch"]) == (platform.python_version(), torch.__version__)
    assert facts["longvid"] == longvid.__version__
    assert facts["cpu"]


def test_facts_are_ready_for_json():
    facts = describe_machine("cpu")
    assert json.loads(json.dumps(facts)) == facts


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs CPU affinity")
def test_cores_are_those_that_may_be_used():
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert describe_machine("cpu")["num_cores"] == 1
    finally:
        os.sched_setaffinity(0, before)
    assert describe_machine("cpu")["num_cores"] == len(before)


def test_a_cpu_is_no_accelerator():
    facts = describe_machine("cpu")
    assert facts["accelerator"] is facts["accelerator_bytes"] is None


def test_an_accelerator_tells_name_and_memory(monkeypatch):
    class Properties:
        name, total_memory = "Some Card", 80 * 2**30

    class Module:
        @staticmethod
        def get_device_properties(device):
            return {torch.device("cuda:1"): Properties}[device]

    monkeypatch.setattr(torch, "get_device_module", lambda device: Module)
    facts = describe_machine("cuda:1")
    assert (facts["accelerator"], facts["accelerator_bytes"]) == ("Some Card", 80 * 2**30)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_real_accelerator_tells_name_and_memory():
    facts = describe_machine("cuda")
    assert facts["accelerator"] == torch.cuda.get_device_name()
    assert facts["accelerator_bytes"] > 2**30


@pytest.mark.parametrize("device", ["cuda:99", "no such device"])
def test_an_absent_accelerator_is_named_and_no_more(device):
    facts = describe_machine(device)
    assert (facts["accelerator"], facts["accelerator_bytes"]) == (device, None)


def test_the_owner_is_not_named():
    text = json.dumps(describe_machine("cpu"))
    for secret in (socket.gethostname(), str(Path.home()), str(Path.cwd()), sys.prefix):
        assert secret not in text
    if len(getpass.getuser()) > 4:  # a short one may be a part of a word
        assert getpass.getuser() not in text


def test_import_does_not_wait_for_torch():
    modules = "longvid.environment, longvid.reporting.recorder, longvid.reporting.page"
    code = f"import sys, {modules}; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"
